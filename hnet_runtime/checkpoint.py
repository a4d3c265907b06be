"""Checkpoints: a folder a step, written by torch's distributed checkpointing under a temporary name, then renamed.

RUN/checkpoints/step_00000450/
    .metadata, *.distcp     DCP: `model.<official name>`, `optimizer.<...>`
    config.json             the model's config, as `HNetConfig.load` reads it
    train.json              the training config and the position: steps done, data fingerprint, code revision
    manifest.json           every file with its size; written last, so a folder without it is incomplete
"""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hnet_runtime import UserError


class CheckpointError(UserError):
    """Weights that can't be read or don't fit; one sentence that names the file and what was expected."""


_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def save(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, train: dict[str, Any], keep: int
) -> Path:
    """Write the checkpoint of `step` steps done, on every rank; keep the newest `keep` (0: all). Returns its folder.

    Until the last rename the checkpoint doesn't exist under its name, so a crash leaves the one before as the newest.
    Raises UserError where the disk is full or the folder can't be written.
    """
    final = step_folder(run, step)
    scratch = final.with_name(final.name + ".writing")
    is_main = dist.get_rank() == 0
    try:
        if is_main:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        dist.barrier()
        state = {
            "model": get_model_state_dict(model),
            "optimizer": _tensors(get_optimizer_state_dict(model, optimizer, options=_OPTIONS)),
        }
        dcp.save(state, checkpoint_id=scratch)
        if is_main:
            write_json(scratch / "config.json", model.config.to_dict())
            write_json(scratch / "train.json", {**train, "step": step})
            write_json(scratch / "manifest.json", {f.name: f.stat().st_size for f in sorted(scratch.iterdir())})
            if final.exists():
                shutil.rmtree(final)
            os.replace(scratch, final)
            _sync(final.parent)
            for old in complete(run)[:-keep] if keep else []:
                shutil.rmtree(old)
    except (OSError, dcp.CheckpointException) as error:
        if is_main:
            shutil.rmtree(scratch, ignore_errors=True)
        raise UserError(
            f"{final}: the checkpoint could not be written ({_reason(error)}); earlier ones are untouched"
        ) from None
    dist.barrier()
    return final


def _reason(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that it's on disk when this returns."""
    with open(path, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file in it has its size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in manifest.items())
    except (OSError, ValueError):
        return False


def _steps(run: Path) -> list[Path]:
    return sorted(p for p in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8,}(\.writing)?", p.name))


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [p for p in _steps(run) if p.suffix != ".writing" and is_complete(p)]


def incomplete(run: Path) -> list[Path]:
    """Folders that a crash left unfinished, or that were damaged since."""
    return [p for p in _steps(run) if p.suffix == ".writing" or not is_complete(p)]


def read_train(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `train`, plus `step`. Raises UserError for a folder that isn't a complete checkpoint."""
    if not is_complete(checkpoint):
        raise UserError(f"{checkpoint}: not a complete checkpoint (no manifest.json, or files that differ from it)")
    return json.loads((checkpoint / "train.json").read_text())


def train_config_of(source: str) -> dict[str, Any] | None:
    """The flags of train.py that a run or one of its checkpoints was made with; None for weights from elsewhere."""
    folder = Path(source)
    if found := complete(folder):
        folder = found[-1]
    return read_train(folder)["config"] if (folder / "train.json").exists() else None


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Fill model and optimizer in place, at whatever world size and sharding they have. Called by every rank.

    Raises UserError where the checkpoint is incomplete or its model config is another one (naming the first keys).
    """
    read_train(checkpoint)
    theirs, ours = json.loads((checkpoint / "config.json").read_text()), model.config.to_dict()
    differing = [f"{key} ({theirs.get(key)} there, {ours[key]} here)" for key in ours if theirs.get(key) != ours[key]]
    if differing:
        raise UserError(f"{checkpoint}: its model config differs in {'; '.join(differing[:3])}")
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        everything = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
        state["optimizer"] = _tensors(everything)
    try:
        dcp.load(state, storage_reader=SafeReader(checkpoint))
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{checkpoint}: can't be read ({_reason(error)})") from None
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, everything | state["optimizer"], options=_OPTIONS)


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """What of an optimizer is saved: rates and decays come from the config, and tensors need no pickle."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


class SafeReader(dcp.FileSystemReader):
    """torch's reader of checkpoint folders, but for how it opens the index: an unlisted name raises CheckpointError."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Opens a checkpoint's index, for which torch 2.11 and 2.13 use the full pickle module, with an allow-list."""

    _METADATA = "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties"
    _METADATA += " MetadataIndex StorageMeta _MEM_FORMAT_ENCODING"
    ALLOWED = {f"torch.distributed.checkpoint.metadata.{name}" for name in _METADATA.split()} | {
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.serialization._get_layout",
        "torch.Size",
        "pathlib.PosixPath",
        "collections.OrderedDict",
    }

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.source = file.name

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if f"{module}.{name}" not in self.ALLOWED:
            raise CheckpointError(
                f"{self.source}: refused, because it holds more than weights ({module}.{name}); nothing of it was run"
            )
        return super().find_class(module, name)
