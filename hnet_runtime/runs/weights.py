"""Loading and exporting weights: official .pt files, safetensors and our checkpoints, by path or from the Hub.

A source is one of
    model.pt, model.safetensors        a file; its config is beside it (the first of model.pt.json, config.json
                                       and model.json) or is passed
    RUN/checkpoints/step_00000450      a checkpoint of train.py (torch's distributed checkpointing); the folder RUN
                                       means its newest complete one
    FOLDER                             a folder with a .safetensors or .pt file
    hf:owner/name                      a repository of the Hugging Face Hub, downloaded once to its client's cache

No file is trusted. Pickles are opened with `weights_only=True` and an allow-list, and so is the index of our
checkpoints, which torch would open with the full pickle module. Every problem raises a CheckpointError.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hnet_config import CONFIGS, find_config
from hnet_runtime import UserError
from hnet_runtime.distributed import PLAIN_FLOAT32, Given, fill_other_tensors, ties
from hnet_runtime.pages.reports import write_atomically
from hnet_runtime.runs import checkpoint as own
from hnet_runtime.runs.checkpoint import CheckpointError
from hnet_simple import HNetInference
from hnet_trainable import ConfigError, HNetConfig, HNetLM, parse_layout

logger = logging.getLogger("hnet")
MODEL_CODE = "model_code."  # before a file's name: its fingerprint, in the metadata of a safetensors file


class Checkpoint(NamedTuple):
    """Weights by official name, on the CPU in the dtype of the file, with their model's config.

    model_code: fingerprints of the files with the model's formulas when the weights were trained, where that is known.
    """

    config: HNetConfig
    weights: dict[str, Tensor]
    model_code: Mapping[str, str] = {}


# ------------------------------------------------------------------------------------------------------------- loading


def load(
    source: str | Path, config: HNetConfig | str | Path | None = None, N_compress: Sequence[float] | None = None
) -> Checkpoint:
    """Reads weights and config from a source, see the module's description.

    config: a config or its file, for weights that come without one. If they come with one, it must agree in everything
    that changes results. N_compress: the target compression, which replaces the config's. Configs for the released code
    have none: then the default is used, and the log says so.
    Raises CheckpointError, and ConfigError for a config file that is not one.
    """
    path = fetch(str(source)) if str(source).startswith("hf:") else Path(source)
    path = _inside(path, str(source))
    given = HNetConfig.load(config) if isinstance(config, str | Path) else config
    place = _config_beside(path, str(source))
    beside = _load_beside(place, path) if place else None
    if given and beside:
        _check_configs(source, given, beside)
    chosen = given or beside
    if chosen is None:
        raise CheckpointError(f"{source}: no config.json beside the weights; name the model's config file")
    if N_compress is None and not isinstance(config, HNetConfig):
        named = next((file for file in (config, place) if file and names_target(file)), None)
        if named is None and chosen.num_stages:
            target = "-".join(f"{N:g}" for N in chosen.N_compress)
            logger.warning(
                f"{config or place}: no target compression (N_compress) there, the default {target} is taken"
            )
        elif named and named == place:
            N_compress = beside.N_compress
    if N_compress is not None:
        chosen = HNetConfig.load(chosen.to_dict(), N_compress=N_compress)
    about: dict[str, Any] = {}
    if path.is_dir():
        if damaged := own.damaged_file(path):
            raise CheckpointError(f"{path / damaged}: damaged, it is not as it was written (see sha256.json beside it)")
        about = own.read_train(path) if own.is_complete(path) and (path / "train.json").exists() else {}
        weights = load_own_checkpoint(path)
    elif path.suffix == ".safetensors":
        weights, about["model_code"] = _load_safetensors(path)
    else:
        weights = _load_pt(path)
    if changed := own.changed_model(about):
        logger.warning("%s %s: what follows uses the files as they are now", path, changed)
    return Checkpoint(chosen, fit(weights, chosen, str(source)), about.get("model_code") or {})


def checkpoint_of(source: str | Path) -> str:
    """The source itself, or of a run's folder the checkpoint that `load` reads there."""
    found = own.complete(Path(source)) if not str(source).startswith("hf:") else []
    return str(found[-1] if found else source)


def load_inference(
    source: str | Path,
    config: HNetConfig | str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> HNetInference:
    """An HNetInference with the weights of a source. dtype: see `cast`; by default that of the file."""
    checkpoint = load(source, config)
    return _build(HNetInference, checkpoint, device, dtype).eval()


def load_training(
    source: str | Path,
    config: HNetConfig | str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> HNetLM:
    """An unsharded HNetLM with the weights of a source."""
    return _build(HNetLM, load(source, config), device, dtype)


def _build(kind: type, checkpoint: Checkpoint, device, dtype) -> Any:
    with torch.device("meta"):
        model = kind(checkpoint.config)
    weights = dict(cast(checkpoint.weights, dtype) if dtype else checkpoint.weights)
    for name, buffer in model.named_buffers():  # as in training, which computes with buffers as they are
        if name in weights:
            weights[name] = checkpoint.weights[name].to(buffer.dtype)
    model.load_state_dict({name: t.to(device) for name, t in weights.items()}, assign=True)
    fill_other_tensors(model, Given(checkpoint.config, seed=0), device, weights)
    if checkpoint.config.tie_embeddings:
        model.lm_head.weight = model.embeddings.weight
    return model


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in a compute dtype; A_log, dt_bias, D and residual_proj in at least float32, as in training.

    Tensors that are not floating-point, such as a buffer of indices, stay as they are.
    """

    def wanted(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        precise = name.rsplit(".", 1)[-1] in PLAIN_FLOAT32 or "residual_proj" in name
        return torch.promote_types(dtype, torch.float32) if precise else dtype

    return {name: tensor.to(wanted(name, tensor)) for name, tensor in weights.items()}


def _inside(path: Path, source: str) -> Path:
    """The file or the checkpoint folder that a path stands for."""
    if not path.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    if not path.is_dir():
        if path.suffix not in (".pt", ".pth", ".bin", ".safetensors"):
            raise CheckpointError(f"{source}: expected a .pt or .safetensors file or a checkpoint folder")
        return path
    if complete := own.complete(path):
        for folder in own.incomplete(path):
            if folder.name > complete[-1].name and folder.suffix != ".writing":
                logger.warning("skipped %s: damaged or incomplete; %s is read", folder, complete[-1].name)
        return complete[-1]
    if (path / ".metadata").exists():
        if (path / "manifest.json").exists() and not own.is_complete(path):
            raise CheckpointError(f"{source}: damaged or incomplete (its files are not those of manifest.json)")
        return path
    if unfinished := own.incomplete(path):
        raise CheckpointError(
            f"{source}: holds no complete checkpoint ({unfinished[-1].name} is damaged or incomplete)"
        )
    for pattern in ("*.safetensors", "*.pt"):
        if found := sorted(path.glob(pattern)):
            if len(found) > 1:
                names = ", ".join(file.name for file in found[:3])
                raise CheckpointError(f"{source}: holds {len(found)} weight files ({names}); name one of them")
            return found[0]
    raise CheckpointError(f"{source}: holds no checkpoint (.safetensors, .pt, or a step of train.py)")


def _config_beside(path: Path, source: str) -> Path | None:
    """The config file of weights. The first one tried is the full config that `export` writes beside a .pt."""
    name = source.rsplit("/", 1)[-1]
    places = [path / "config.json"]
    if not path.is_dir():  # official checkpoints come without their config
        places = [path.with_name(f"{path.name}.json"), path.parent / "config.json", path.with_suffix(".json")]
        places += [CONFIGS / f"{path.stem}.json", CONFIGS / f"{name}.json"]
    return next((place for place in places if place.is_file()), None)


def _load_beside(place: Path, path: Path) -> HNetConfig:
    try:
        return HNetConfig.load(place)
    except ConfigError as error:
        where = "in" if path.is_dir() else "beside"
        raise CheckpointError(f"{error}; it is {where} {path.name}: name another config file") from None


def names_target(config_file: str | Path) -> bool:
    """Whether a config file, which has been read before, names the target compression."""
    keys = json.loads(find_config(config_file).read_text(encoding="utf-8-sig"))
    return bool(keys.get("N_compress") or keys.get("hnet", {}).get("N_compress"))


def _check_configs(source: str | Path, given: HNetConfig, theirs: HNetConfig) -> None:
    ours, found = ({"routers": list(config.routers)} | _flat(config.to_dict()) for config in (given, theirs))
    differing = [key for key in ours if ours[key] != found[key] and key not in ("N_compress", "ssm_cfg.chunk_size")]
    if differing:
        pairs = "; ".join(f"{key} is {found[key]} there, {ours[key]} in the one given" for key in differing[:3])
        raise CheckpointError(f"{source}: its config differs: {pairs}")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


# ------------------------------------------------------------------------------------------------------------- formats


class _Ignored:
    """Replaces every harmless global of a pickled OmegaConf config: takes any arguments and stores nothing."""

    def __new__(cls, *args: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_OMEGACONF = [f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "Node", "Container")]
_OMEGACONF += ["omegaconf.listconfig.ListConfig", "omegaconf.dictconfig.DictConfig"]
_OMEGACONF += [
    f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")
]
_BESIDE_THEM = ["typing.Any", "collections.defaultdict", "builtins.dict", "builtins.list", "builtins.int"]


def _load_pt(path: Path) -> dict[str, Tensor]:
    allowed = [(_Ignored, name) for name in _OMEGACONF + _BESIDE_THEM]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if foreign := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path}: refused, because it holds more than weights ({foreign[1]}); nothing of it was run"
            ) from None
        raise CheckpointError(f"{path}: not a file of weights, or damaged") from None
    except Exception:  # unpickling a damaged file can raise anything
        raise _unreadable(path) from None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected a state dict")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _unreadable(path: Path) -> CheckpointError:
    """What is wrong with a file that could not be loaded: it can't be opened, or its bytes are damaged."""
    try:
        open(path, "rb").close()
    except OSError as error:
        return CheckpointError(f"{path}: can't be read ({error.strerror})")
    return CheckpointError(f"{path}: damaged or cut short ({path.stat().st_size} bytes)")


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a file, and the fingerprints that `export` has written into it."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            noted = file.metadata() or {}
        found = {name: noted.get(f"{MODEL_CODE}{name}", "") for name in own.model_code()}
        return load_file(path), {name: code for name, code in found.items() if re.fullmatch("[0-9a-f]{12}", code)}
    except (SafetensorError, OSError, ValueError):
        raise _unreadable(path) from None


def load_own_checkpoint(path: Path) -> dict[str, Tensor]:
    """The unsharded weights of a checkpoint folder of train.py, written by any number of processes."""
    from hnet_runtime.runs import checkpoint_files  # not above: see there

    return checkpoint_files.read_weights(path)


def fetch(source: str) -> Path:
    """The folder of `hf:owner/name` (or `hf:owner/name@revision`) in the Hub client's cache, downloaded if needed."""
    name, _, revision = source.removeprefix("hf:").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"{source}: expected hf:owner/name")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = ["*.json", "*.safetensors", "*.pt"]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise CheckpointError(f"{source}: the Hub has no such repository, or it is private") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(f"{source}: the Hub can't be reached, and nothing of this name is cached") from None
    except Exception as error:  # its HTTP library's errors differ between versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{source}: could not be fetched ({reason})") from None


# ------------------------------------------------------------------------------------------------------------- fitting


def fit(weights: Mapping[str, Tensor], config: HNetConfig, source: str) -> dict[str, Tensor]:
    """The weights under their official names, complete and without others.

    Removes wrappers' prefixes and rotary tables, which are computed; fills tied weights. Raises CheckpointError with
    the config keys that the weights contradict, or the names that are missing, unknown or of another shape.
    """
    names = {name: re.sub(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|module)(?=\.)", "", name) for name in weights}
    weights = {names[name].lstrip("."): tensor for name, tensor in weights.items()}
    with torch.device("meta"):
        model = HNetInference(config)
    expected = model.state_dict()
    for name, first in ties(model).items():
        if first in weights:
            weights.setdefault(name, weights[first])
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected and not name.endswith("inv_freq")]
    shapes = [n for n in expected if n in weights and weights[n].shape != expected[n].shape]
    if not (missing or unknown or shapes):
        return {name: weights[name] for name in expected}
    ours = _flat(config.to_dict()) | {"d_intermediate": _rounded(config)}
    contradictions = [
        f"{key} is {value} in the weights, {ours[key]} in the config"
        for key, value in structure(weights).items()
        if value != ours[key]
    ]
    details = contradictions[:3] or [
        f"{len(found)} {what} ({', '.join(found[:2])}{', ...' if len(found) > 2 else ''})"
        for found, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
        if found
    ]
    raise CheckpointError(f"{source}: the weights don't fit the config: {'; '.join(details)}")


def _rounded(config: HNetConfig) -> list[int]:
    """d_intermediate as the weights show it: 0 in stages without an MLP."""
    layers = [[parse_layout(layout) for layout in config.layouts(s)] for s in range(config.num_stages + 1)]
    uses = [any(layer.has_mlp for stack in stacks for layer in stack) for stacks in layers]
    return [-(-width // 128) * 128 if used else 0 for width, used in zip(config.d_intermediate, uses)]


def structure(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config keys that follow from the names and shapes of weights; {} if they are not those of an H-Net."""

    def stack(prefix: str) -> str:
        letters = []
        while any(name.startswith(f"{prefix}layers.{len(letters)}.") for name in weights):
            layer = f"{prefix}layers.{len(letters)}."
            letter = "m" if f"{layer}mixer.in_proj.weight" in weights else "t"
            letters.append(letter.upper() if f"{layer}mlp.fc2.weight" in weights else letter)
        return "".join(f"{run[0]}{len(run[0] + run[1])}" for run in re.findall(r"(.)(\1*)", "".join(letters)))

    def stage(prefix: str) -> list:
        if any(name.startswith(f"{prefix}encoder.") for name in weights):
            return [stack(f"{prefix}encoder."), stage(f"{prefix}main_network."), stack(f"{prefix}decoder.")]
        return [stack(f"{prefix}main_network.")]

    layout, widths, inner, prefix, node = stage("backbone."), [], [], "backbone.", None
    while node is None or len(node) == 3:
        node = layout if node is None else node[1]
        part = f"{prefix}{'encoder' if len(node) == 3 else 'main_network'}."
        if f"{part}rmsnorm.weight" not in weights or "embeddings.weight" not in weights:
            return {}
        widths.append(len(weights[f"{part}rmsnorm.weight"]))
        fc2 = [w for n, w in weights.items() if re.match(rf"{re.escape(prefix)}\w+\.layers\.\d+\.mlp\.fc2\.weight$", n)]
        inner.append(fc2[0].shape[1] if fc2 else 0)
        prefix += "main_network."
    found = {"arch_layout": layout, "d_model": widths, "d_intermediate": inner}
    return {**found, "vocab_size": len(weights["embeddings.weight"])}


# ----------------------------------------------------------------------------------------------------------- exporting


def refuse_files_of_others(folder: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError if a folder without an export has one of the files that an export would write.

    An export is weights with the config of an H-Net, in the repository's own form or that of transformers.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: a file; expected a folder, or a name for a new one")
    has_weights = (folder / "model.pt").exists() or any(folder.glob("model*.safetensors"))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        is_ours = isinstance(config, dict) and ("arch_layout" in config or "hnet" in config)
    except (OSError, ValueError):
        is_ours = False
    if has_weights and is_ours:
        return
    if found := [name for name in names if (folder / name).exists()]:
        raise CheckpointError(f"{folder}: has a {found[0]} that is of no export; name another folder")


def export(
    model: nn.Module | Checkpoint, folder: str | Path, form: str, dtype: torch.dtype | None = None
) -> list[Path]:
    """Writes weights and config.json into `folder`; returns the files. No incomplete file keeps its name.

    model: an unsharded HNetLM or HNetInference, or a Checkpoint. form: `safetensors`, with the full config, and the
    fingerprints of the files that trained the weights as metadata; or `pt`, a state dict for the released code, with a
    config.json of the keys that it knows and the full config in model.pt.json. dtype: see `cast`.
    """
    if form not in ("pt", "safetensors"):
        raise ValueError(f"form: {form!r}; expected pt or safetensors")
    is_loaded = isinstance(model, Checkpoint)
    config, weights, code = model if is_loaded else (model.config, model.state_dict(), own.model_code())
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    weights = cast(weights, dtype) if dtype else weights
    folder = Path(folder)
    file, whole = folder / f"model.{form}", config.to_dict()
    configs = {"config.json": whole}
    if form == "pt":
        if not all(config.is_learned):
            raise CheckpointError(
                f"--form pt: the released code has no router {', '.join(config.routers)}; export safetensors"
            )
        known = {key: value for key, value in whole.items() if key not in ("N_compress", "routers")}
        configs = {"config.json": known, "model.pt.json": whole}
    refuse_files_of_others(folder, [*configs, file.name])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if form == "pt":
            write_atomically(file, lambda temporary: torch.save(weights, temporary))
        else:
            from safetensors.torch import save_file

            separate = {name: tensor.clone() for name, tensor in weights.items()}  # tied weights share memory
            noted = {"format": "pt"} | {f"{MODEL_CODE}{name}": fingerprint for name, fingerprint in code.items()}
            write_atomically(file, lambda temporary: save_file(separate, temporary, metadata=noted))
        for name, keys in configs.items():
            text = json.dumps(keys, indent=2) + "\n"
            write_atomically(folder / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    except (UserError, OSError, RuntimeError) as error:
        said = str(error).splitlines()[0] if isinstance(error, RuntimeError) else str(error)
        raise CheckpointError(f"{folder}: can't be written ({getattr(error, 'strerror', None) or said})") from None
    return [file, *(folder / name for name in configs)]
