"""What this repository adds to loading and saving with transformers: runs, official files, and complete folders.

A folder that `save_pretrained` writes holds weights, config, tokenizer, a model card, and the code that loads them
without this repository. Nothing of this file is in such a folder.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hnet_config import HNetConfig
from hnet_runtime.checks import agreement
from hnet_runtime.runs import checkpoint as own
from hnet_runtime.runs import weights
from hnet_runtime.runs.metrics import read_metrics
from hnet_transformers.configuration_hnet import HNetTransformersConfig

CURVE_POINTS = 60  # of a run, in the config


class HubMixin:
    """`from_pretrained` of a run, official or exported weights; `save_pretrained` and `push_to_hub` of all there is.

    And the checks with which the scripts begin: that an edit of hnet_trainable.py is what runs.
    """

    def check_edits(self, generates: bool) -> None:
        """Definitions run where kernels differ from them. ValueError where generation differs from training."""
        checked, what = vars(self).setdefault("_checked_edits", set()), (self.device, self.dtype, generates)
        if what in checked:
            return
        config = json.dumps(self.config.hnet)
        with torch.enable_grad(), torch.random.fork_rng(), torch.autocast(self.device.type, enabled=False):
            _choose_implementations(self.device, self.dtype if self.device.type == "cuda" else torch.float64, config)
            if generates and (difference := _difference_of_generation(config)):
                raise ValueError(difference)
        checked.add(what)

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        if source is None or is_of_transformers(str(source), kwargs):
            if isinstance(config, HNetConfig | Mapping):
                config = HNetTransformersConfig(config)
            return super().from_pretrained(source, *args, config=config, **kwargs)
        checkpoint = load(str(source), config, kwargs)
        kwargs.pop("revision", None)  # of which the weights are now
        flags = own.train_config_of(str(source)) if Path(source).is_dir() else None
        given = config.ratio_weight if isinstance(config, HNetTransformersConfig) else None
        weight = given if given is not None else (flags or {}).get("alpha", 0.03)
        described = HNetTransformersConfig(checkpoint.config, weight, trained=facts_of(Path(source), flags))
        loaded = super().from_pretrained(None, *args, config=described, state_dict=checkpoint.weights, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = str(source)
        return loaded

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, repo_id: str = "", **kwargs: Any
    ) -> None:
        """Weights, config, tokenizer, code and model card; an adapter's folder gets only what peft writes."""
        upload = _for_upload(kwargs)
        is_complete = not (self.is_remote_code() or getattr(self, "_hf_peft_config_loaded", False))
        if is_complete:
            from hnet_transformers.folder import AUTO_MAP, code_files

            code_files()  # what cannot be exported is refused before anything is written
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        if is_complete and kwargs.get("is_main_process", True):
            from hnet_transformers import folder

            folder.complete(self, Path(save_directory), with_pictures=kwargs.get("state_dict") is None)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(save_directory).name, **upload)

    def push_to_hub(
        self, repo_id: str, *, commit_message: str = "Upload an H-Net", private: bool | None = None,
        token: str | bool | None = None, revision: str | None = None, create_pr: bool = False,
        max_shard_size: int | str = "50GB",
    ) -> str:  # fmt: skip
        """Uploads what `save_pretrained` writes to a repository of the Hub, made if need be. Returns its URL."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision,
                create_pr=create_pr,
            )  # fmt: skip


@functools.cache
def _choose_implementations(device: torch.device, dtype: torch.dtype, config: str) -> None:
    agreement.choose_implementations(device, dtype, HNetConfig.load(json.loads(config)))


@functools.cache
def _difference_of_generation(config: str) -> str | None:
    return agreement.generation(HNetConfig.load(json.loads(config)))


def _for_upload(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of an upload out of those of `save_pretrained`."""
    names = ("commit_message", "private", "token", "revision", "create_pr")
    return {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}


def is_of_transformers(source: str, options: Mapping[str, Any]) -> bool:
    """Whether a folder, or a repository of the Hub, holds a model (or an adapter) in the form of transformers."""
    path = Path(source)
    if path.exists():
        return (path / "adapter_config.json").is_file() or _names_model_type(path / "config.json")
    if source.startswith("hf:"):
        return False
    from transformers.utils import cached_file

    names = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    options = {name: options[name] for name in names if options.get(name) is not None}
    try:
        found = cached_file(source, "config.json", **options, **quiet)
    except OSError:  # no such repository, or no name of one
        return False
    return bool(found) and _names_model_type(Path(found))


def _names_model_type(file: Path) -> bool:
    try:
        return "model_type" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def load(source: str, config: Any, options: Mapping[str, Any]) -> weights.Checkpoint:
    """Weights in one of the repository's own forms, see hnet_runtime.runs.weights; a name on the Hub needs no `hf:`."""
    if isinstance(config, HNetTransformersConfig):
        config = config.hnet_config
    elif isinstance(config, Mapping):
        config = HNetConfig.load(config)
    if Path(source).exists() or source.startswith("hf:"):
        return weights.load(source, config)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise weights.CheckpointError(f"{source}: no such file or folder, and no name on the Hub (owner/name)")
    for name in ("token", "cache_dir", "subfolder", "variant"):
        if options.get(name):
            raise weights.CheckpointError(f"{source}: {name} can't be used for weights that are not of transformers")
    revision = options.get("revision")
    return weights.load(f"hf:{source}@{revision}" if revision else f"hf:{source}", config)


def facts_of(source: Path, flags: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the model card says of a run of train.py: its data, steps, bytes and curve. None for other weights.

    source: a run or one of its checkpoints. flags: those of train.py.
    """
    run = source.parent.parent if source.parent.name == "checkpoints" else source
    records = read_metrics(run / "metrics.jsonl")
    if flags is None or not records:
        return None
    last = own.read_train(own.complete(run)[-1] if run == source else source)["step"]
    records = [record for record in records if record["step"] <= last]
    curve = [[r["bytes_seen"], round(r["val_bpb"], 4)] for r in records if r.get("val_bpb") and r.get("bytes_seen")]
    every = max(1, -(-len(curve) // CURVE_POINTS))
    return {
        "data": ", ".join(Path(part.rsplit(":", 1)[0]).name for part in flags["data"].split(",")),  # no paths of others
        "steps": last,
        "bytes": records[-1].get("bytes_seen") if records else None,
        "curve": curve[::-1][::every][::-1],  # [bytes seen, bits per byte of held-out text]
    }


def export(source: str, folder: Path, config: str | None = None, dtype: str | None = None) -> list[Path]:
    """Writes the weights of a source in the form of transformers, complete; returns the files.

    dtype: as in `hnet_runtime.runs.weights.cast`; by default that of the weights. A file has its final name when all
    are written. Raises CheckpointError.
    """
    from hnet_transformers.modeling_hnet import HNetForCausalLM

    weights.refuse_files_of_others(folder, ("config.json", "README.md"))
    model = HNetForCausalLM.from_pretrained(source, config=config, dtype=dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as scratch:
            model.save_pretrained(scratch)
            files = sorted(Path(scratch).iterdir(), key=lambda file: (file.suffix == ".py", file.name))
            weights.refuse_files_of_others(folder, [file.name for file in files])
            return [file.replace(folder / file.name) for file in files]
    except (OSError, SafetensorError) as error:
        raise weights.CheckpointError(f"{folder}: can't be written ({getattr(error, 'strerror', error)})") from None
