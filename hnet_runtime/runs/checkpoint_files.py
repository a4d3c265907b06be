"""Writes and reads the tensors of a checkpoint with torch's distributed checkpointing (DCP).

Importing DCP takes a second or two. So checkpoint.py and weights.py import this module where they write or read, and a
run that has done neither does not wait for it.
"""

import pickle
import warnings
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)

from hnet_runtime.runs.run_folder import WITHOUT, CheckpointError
from hnet_runtime.steps.flat_adamw import FlatAdamW, fill_state


def write(state: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Writes this rank's state; every rank of the group calls it. Raises OSError with the reason of a failure."""
    try:
        dcp.save(state, checkpoint_id=folder, process_group=group)
    except dcp.CheckpointException as error:
        raise OSError(_reason(error)) from error


def read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Reads model and optimizer in place; every rank calls it. Raises CheckpointError."""
    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    saved = _saved(folder)
    _require_same_weights(folder, state["model"].keys(), saved.keys())
    if optimizer is not None:
        is_elsewhere = isinstance(optimizer, FlatAdamW) and optimizer.shards_updates  # the state of some weights
        fill_state(optimizer)
        has_states = any(key.startswith("optimizer.state.") for key in saved)
        for name, p in model.named_parameters():
            prefix, keys = f"optimizer.state.{name}.", set(optimizer.state.get(p, ()))
            found = {key.removeprefix(prefix): entry for key, entry in saved.items() if key.startswith(prefix)}
            if has_states and not found:  # it has had no gradient so far
                optimizer.state.pop(p, None)
            elif keys and keys < found.keys():  # of state that a later step allocates
                for key in found.keys() - keys:
                    size, dtype = found[key].size, found[key].properties.dtype
                    like = p if size == p.shape else p.new_empty(size)
                    optimizer.state[p][key] = torch.zeros_like(like, dtype=dtype, requires_grad=False)
            elif saved and found.keys() != keys and (keys or not is_elsewhere):
                raise CheckpointError(
                    f"{folder}: its optimizer saved {_listed(found)} of {name}, that of make_optimizer in train.py has "
                    f"{_listed(keys)}; to begin with another optimizer from these weights use -p"
                )
            state |= {prefix + key: value for key, value in optimizer.state.get(p, {}).items()}
    try:
        dcp.load(state, storage_reader=SafeReader(folder))  # in place: an optimizer's parts may share its state
    except dcp.CheckpointException as error:
        reason = _reason(error)
        raise CheckpointError(
            f"{folder}: can't be read ({'damaged' if 'weights_only' in reason else reason}); {WITHOUT}"
        ) from None
    set_model_state_dict(model, state["model"])
    if isinstance(optimizer, FlatAdamW) and not optimizer.rule:
        optimizer.load_state_dict(optimizer.state_dict())  # what it did not find above gets its step


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _saved(folder: Path) -> dict[str, Any]:
    """The tensors in a checkpoint, by name; none where it can't be read: whoever reads the rest says why."""
    try:
        return SafeReader(folder).read_metadata().state_dict_metadata
    except Exception:
        return {}


def _require_same_weights(folder: Path, ours: Set[str], saved: Set[str]) -> None:
    theirs = {key.removeprefix("model.") for key in saved if key.startswith("model.")}
    for what, names in (
        ("lacks weights of the model", ours - theirs if saved else ()),
        ("has weights that the model lacks", theirs - ours),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{folder}: {what} as hnet_trainable.py is now ({min(names)}{more}); undo the edit, or start a run in "
                "another --save-dir"
            )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The unsharded weights by official name, in this process alone. Raises CheckpointError."""
    try:
        reader = SafeReader(folder)
        index = reader.read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in index.items()
            if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():  # it warns that one process alone loads, which is intended
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(state, storage_reader=reader, no_dist=True)
    except CheckpointError:
        raise
    except (Exception, dcp.CheckpointException):  # the latter, a BaseException, wraps any error of a file
        raise CheckpointError(f"{folder}: damaged or incomplete") from None
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


def _reason(error: dcp.CheckpointException) -> str:
    first = next(iter(error.failures.values()))[0]
    said = getattr(first, "strerror", None) or str(first).splitlines()[0]
    return f"writing ended early, as on a full disk: {said}" if "inline_container" in said else said


class SafeReader(dcp.FileSystemReader):
    """torch's reader of checkpoint folders, except that an index with an unlisted name raises CheckpointError."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Opens a checkpoint's index with an allow-list; torch 2.11 and 2.13 use the full pickle module for it."""

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
