"""Checkpoints: one folder per step, written by torch's distributed checkpointing (DCP) and renamed when complete.

RUN/checkpoints/step_00000450/
    .metadata, *.distcp     DCP: `model.<official name>`, `optimizer.<...>`
    config.json             the model's config, as `HNetConfig.load` reads it
    train.json              the training config, steps done, code revision, fingerprints of text and model code
    sha256.json             the digest of each of these, checked when training resumes from here
    manifest.json           every file with its size; written last, so a folder without it is incomplete
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from hnet_config import LEARNED
from hnet_kernels import cards
from hnet_runtime import UserError, WriteFailed
from hnet_runtime.data.stream import sync_folder
from hnet_runtime.runs.run_folder import (  # noqa: F401 (some are for importers of this module)
    WITHOUT,
    CheckpointError,
    changed_model,
    complete,
    incomplete,
    is_complete,
    keep_model_files,
    model_code,
    oldest_step,
    read_train,
    step_folder,
    train_config_of,
)
from hnet_runtime.sharded import is_sharded, local_shard
from hnet_runtime.steps.flat_adamw import ADAMW, FlatAdamW, SplitFloat32, as_tensor, rule_of

logger = logging.getLogger("hnet")

SET_BY_A_RUN = ("lr", "grad_scale", "found_inf")  # in an optimizer or its groups


class Saver:
    """Writes a run's checkpoints in the background. Every rank creates one and calls its methods in the same order.

    `start` copies the state and returns. A thread writes the copy with DCP, over a process group of its own. On a GPU
    as much as fits into free memory is first copied there, in milliseconds. The rest is copied to the host during the
    next forward and backward; training waits for it before that step changes the weights (`staged`). When all ranks
    have written, rank 0 adds the manifest and renames the folder. Until then the checkpoint doesn't exist under its
    name, so after a crash the one before is the newest.

    torch's own `dcp.async_save` can replace this when torch 2.11 is no longer supported: there its stager fails at its
    second use (github.com/pytorch/pytorch/issues/183413).

    keep: the number of newest checkpoints to keep (0: all). keep_every: checkpoints of every so many steps are kept.
    """

    def __init__(
        self, run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int = 0, keep_every: int = 0
    ):
        self.run, self.model, self.optimizer, self.keep, self.keep_every = run, model, optimizer, keep, keep_every
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        # One OpenMP thread in the saver's thread: with a team there would be more threads than cores, and libgomp would
        # then hardly spin at barriers, which makes later steps on a CPU a third slower
        # (gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html)
        self._thread = ThreadPoolExecutor(1, "saver", initializer=torch.set_num_threads, initargs=(1,))
        # Training launches kernels while the saver plans its files in Python. It gets the interpreter back after this
        # many seconds (by default 5 ms), and needs it some hundred times per step
        sys.setswitchinterval(1e-4)
        self._device = next(model.parameters()).device
        # One stream for all saves: torch gives out 32 in turn, and a new one per save would at some point be that on
        # which training captures graphs (github.com/pytorch/pytorch/blob/main/c10/cuda/CUDAStream.h)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._host: dict[str, Tensor] = {}  # on a GPU: page-locked, so allocated once
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}  # for copies of shards on the host
        for mesh in dict.fromkeys(p.device_mesh for p in model.parameters() if is_sharded(p)):
            on_cpu = mesh.device_type == "cpu"
            self._meshes[mesh] = mesh if on_cpu else DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        # on a GPU the thread joins split weights here; later there may be no free memory
        lengths = [x.high.numel() for x in self._state().values() if isinstance(x, SplitFloat32)]
        self._scratch = torch.empty(max(lengths, default=0), device=self._device)
        self._staging: Future | None = None
        self._written: Future | None = None
        self._step, self._stall = 0, 0.0
        self._unsaved = _unsaved(optimizer)
        self._is_needed, self._is_closed = threading.Event(), False  # the host memory, by a save

    @contextlib.contextmanager
    def ready_to_save(self, will_save: bool = True) -> Iterator[None]:
        """While inside, the thread allocates the host memory of the first save, if a run on a GPU will save.

        It is page-locked. That takes long and blocks other CUDA calls, so there are pauses between tensors.
        """
        if will_save and self._device.type == "cuda":
            self._thread.submit(self._lock_pages, self._state(), 3.0)
        try:
            yield
        finally:  # the program waits for the thread
            self._is_closed = True
            self._is_needed.set()

    def check_state(self) -> None:
        """Call it after the first step: warns of what checkpoints do not save. Raises as `require_tensors` does."""
        require_tensors(self.optimizer)
        changed = {at[1] for at, value in _unsaved(self.optimizer).items() if value != self._unsaved.get(at)}
        for name in sorted(changed):
            logger.warning(
                "make_optimizer: a step of %s changes %s, which no checkpoint saves: a resumed run begins with its "
                "first value; expected a tensor in the state of a weight",
                type(rule_of(self.optimizer)).__name__,
                name,
            )

    def start(self, step: int, train: dict[str, Any]) -> None:
        """Starts to write the checkpoint after `step` steps. Finishes an earlier one first; raises as `finish` does."""
        began = time.perf_counter()
        self._is_needed.set()
        self.finish()
        self._step, error = step, None
        final = step_folder(self.run, step)
        scratch = final.with_name(final.name + ".writing")
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
            except OSError as failure:
                error = failure
        self._raise_together(error)
        state, copies, ready, free = self._state(), {}, None, _free_gpu_memory(self._device)
        for name, tensor in state.items():
            size = local_shard(tensor).nbytes
            if size <= free:
                free -= size
                copies[name] = tensor.clone()
        if self._device.type == "cuda":
            ready = torch.cuda.current_stream().record_event()
        rest = {name: tensor for name, tensor in state.items() if name not in copies}
        self._staging, self._written, train = Future(), Future(), {**train, "step": step}
        self._thread.submit(self._write, rest, copies, ready, self._staging, self._written, final, scratch, train)
        self._stall += time.perf_counter() - began

    def _state(self) -> dict[str, Tensor | SplitFloat32]:
        """The state that this rank writes, as torch's `get_model_state_dict` and `get_optimizer_state_dict` have it.

        With unsharded weights each rank writes a part of the state: what it alone updates, if there is any such thing.
        """
        weights = self.model.state_dict()  # first: it restores the shards of weights that FSDP has gathered
        parameters = dict(self.model.named_parameters())
        names = {id(p): name for name, p in parameters.items()}
        everything = dict(self.model.named_parameters(remove_duplicate=False))  # a weight may have a second name
        values = {names[id(p)]: found for p, found in self.optimizer.state.items() if found}
        flat = isinstance(self.optimizer, FlatAdamW)
        if flat:
            weights |= {name: self.optimizer.master_weight(p) for name, p in everything.items()}
        sharded = flat and self.optimizer.shards_updates
        if sharded:
            owned = {names[id(p)] for p in self.optimizer.owned}
            values = {name: found for name, found in values.items() if name in owned or dist.get_rank() == 0}
            ours = {id(parameters[name]) for name in values}
            buffers = weights.keys() - everything.keys() if dist.get_rank() == 0 else ()
            weights = {name: w for name, w in weights.items() if name in buffers or id(everything.get(name)) in ours}
        state = {f"model.{name}": tensor for name, tensor in weights.items()}
        for name, found in values.items():
            state |= {f"optimizer.state.{name}.{key}": value for key, value in found.items()}
        if self._meshes or sharded:
            return state
        size, mine, end = dist.get_world_size(), {}, 0
        share = max(1, -(-sum(tensor.nbytes for tensor in state.values()) // size))
        for name, tensor in state.items():
            if end // share == dist.get_rank():
                mine[name] = tensor
            end += tensor.nbytes
        return mine

    def _write(
        self,
        rest: dict[str, Tensor | SplitFloat32],
        copies: dict[str, Tensor | SplitFloat32],
        ready: torch.cuda.Event | None,
        staging: Future,
        written: Future,
        final: Path,
        scratch: Path,
        train: dict[str, Any],
    ) -> None:
        """Runs in the thread: copies the state to the host if it is on a GPU, writes it and renames the folder."""
        try:
            try:
                state = self._to_host(rest, ready)
            finally:
                staging.set_result(None)
            state |= self._to_host(copies, ready)
            copies.clear()
            from hnet_runtime.runs import checkpoint_files  # not above: see there

            checkpoint_files.write(state, scratch, self._group)
            if dist.get_rank() == 0:
                write_json(scratch / "config.json", self.model.config.to_dict())
                write_json(scratch / "train.json", train)
                write_json(scratch / "sha256.json", {f.name: _sha256(f) for f in sorted(scratch.iterdir())})
                write_json(scratch / "manifest.json", {f.name: f.stat().st_size for f in sorted(scratch.iterdir())})
                sync_folder(scratch)
                if final.exists():
                    shutil.rmtree(final)
                os.replace(scratch, final)
                for folder in (final.parent, self.run):  # the run's is new at the first save
                    sync_folder(folder)
                self._remove_old()  # a failure there is only a warning: this checkpoint is complete
            written.set_result(final)
        except BaseException as failure:  # reported by `finish`
            if dist.get_rank() == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            written.set_exception(failure)

    def _to_host(self, state: dict[str, Tensor | SplitFloat32], ready: torch.cuda.Event | None) -> dict[str, Tensor]:
        if ready is None:
            return {name: as_tensor(x) for name, x in state.items()}
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.no_grad():
            ready.wait()
            self._lock_pages(state)
            for name, tensor in state.items():
                self._host[name].copy_(as_tensor(local_shard(tensor), self._scratch), non_blocking=True)
            self._stream.synchronize()
        return {name: self._like(tensor, self._host[name]) for name, tensor in state.items()}

    def _lock_pages(self, state: dict[str, Tensor | SplitFloat32], pause: float = 0.0) -> None:
        """Allocates the page-locked host memory that is not there yet.

        pause: after each tensor, this many times the time that it took, until a save needs the memory.
        """
        with torch.cuda.device(self._device):
            for name, tensor in state.items():
                if pause and self._is_closed:
                    return
                if name not in self._host:
                    began = time.perf_counter()
                    self._host[name] = torch.empty(local_shard(tensor).shape, dtype=tensor.dtype, pin_memory=True)
                    self._is_needed.wait(pause * (time.perf_counter() - began))

    def _like(self, tensor: Tensor | SplitFloat32, local: Tensor) -> Tensor:
        """`local` itself, or where `tensor` is a DTensor, `local` as its shard on the host."""
        if not is_sharded(tensor):
            return local
        mesh, sizes = self._meshes[tensor.device_mesh], {"shape": tensor.shape, "stride": tensor.stride()}
        return type(tensor).from_local(local, mesh, tensor.placements, run_check=False, **sizes)

    def staged(self) -> None:
        """Waits until the state has been copied. To be called before it changes."""
        if self._staging is not None:
            began = time.perf_counter()
            self._staging.result()
            self._staging = None
            self._stall += time.perf_counter() - began

    def stall(self) -> float:
        """The seconds that training has waited in `start` and `staged` since the last call."""
        seconds, self._stall = self._stall, 0.0
        return seconds

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the last checkpoint could not be written; `finish` then raises the reason."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def finish(self) -> Path | None:
        """Waits until the checkpoint that was started last is complete. Returns its folder.

        Raises UserError on every rank if the disk is full or the folder can't be written.
        """
        if self._written is None:
            return None
        self.staged()
        error = self._written.exception()
        self._written = None
        if error is not None and not isinstance(error, OSError):
            raise error
        self._raise_together(error)
        return step_folder(self.run, self._step)

    def last_good(self, failed: int = 0) -> str:
        """The newest complete checkpoint, also one that is being written, in words. Raises as `finish` does.

        failed: the step whose numbers are not finite. They come from the weights after the step before, so a checkpoint
        with these weights is named as such, and the one before it as good.
        """
        self.finish()
        found, why = complete(self.run), ""
        if found and found[-1] == step_folder(self.run, failed - 1):
            why = f"They come from the weights of {found.pop()}, with which step {failed} may fail again. "
        return f"{why}The last good checkpoint: {found[-1] if found else 'none'}"

    def _raise_together(self, error: BaseException | None) -> None:
        reasons: list = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, error and _reason(error), group=self._group)
        for reason in filter(None, reasons):
            raise WriteFailed(
                f"{step_folder(self.run, self._step)}: the checkpoint could not be written ({reason}); "
                "earlier ones are untouched"
            )

    def _remove_old(self) -> None:
        """Removes the checkpoints before the newest --keep, complete or not. What can't be removed is a warning."""
        found = complete(self.run)
        if not self.keep or len(found) < self.keep:
            return
        first = found[-self.keep]  # that stays
        for old in sorted(found[: -self.keep] + [path for path in incomplete(self.run) if path.name < first.name]):
            step = int(old.name.removeprefix("step_").removesuffix(".writing"))
            if self.keep_every and step % self.keep_every == 0 and old.suffix != ".writing":
                continue
            try:
                shutil.rmtree(old)
            except OSError as error:
                logger.warning("%s: can't be removed (%s); --keep leaves it", old, error.strerror)


def _free_gpu_memory(device: torch.device) -> float:
    """The bytes on a GPU that are not reserved, less an eighth of its memory: a step's need varies with the chunks.

    Memory that torch has reserved and does not use may belong to graphs, which alone can use it.
    """
    if device.type == "cpu":
        return math.inf
    free, everything = cards.memory(device)
    return free - everything // 8


def save(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, train: dict[str, Any], keep: int
) -> Path:
    """Writes the checkpoint after `step` steps and waits for it, on every rank; see `Saver`. Returns its folder."""
    saver = Saver(run, model, optimizer, keep)
    saver.start(step, train)
    return saver.finish()


def require_disk_space(run: Path, parameters: int) -> None:
    """Raises UserError if a checkpoint does not fit on the disk of `run`: float32 weights with two moments each."""
    needed, free = 12 * parameters, shutil.disk_usage(run).free
    if free < needed:
        raise UserError(f"--save-dir {run}: {free / 1e6:,.1f} MB are free and a checkpoint takes {needed / 1e6:,.1f}")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def write_json(path: Path, content: Any) -> None:
    """Writes JSON and waits until it is on disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_contents(folder: Path) -> None:
    """Raises CheckpointError on every rank if a file differs from what was written. Rank 0 reads all files.

    A checkpoint of an earlier version, without digests, passes.
    """
    damaged = [damaged_file(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(damaged)
    if damaged[0]:
        raise CheckpointError(f"{folder / damaged[0]}: damaged, it is not as it was written; {WITHOUT}")


def damaged_file(folder: Path) -> str | None:
    """The first file of a checkpoint that differs from what was written, or None."""
    noted = folder / "sha256.json"
    if not noted.exists():
        return None
    try:
        digests = json.loads(noted.read_text(encoding="utf-8"))
        return next((name for name, digest in digests.items() if _sha256(folder / name) != digest), None)
    except (OSError, ValueError, AttributeError):
        return noted.name


def require_tensors(optimizer: torch.optim.Optimizer) -> None:
    """Raises UserError if the optimizer has a state that a checkpoint can't save. Call it after a step."""
    rule = rule_of(optimizer)
    kind = f"make_optimizer: the state %s of {type(rule).__name__}"
    weights = {p for group in rule.param_groups for p in group["params"]}
    for p, state in rule.state.items():
        if p not in weights:
            raise UserError(f"{kind % p} belongs to no weight; expected state of weights, as checkpoints save no other")
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise UserError(
                    f"{kind % key} is of type {type(value).__name__}; expected tensors, as checkpoints save no other"
                )
            if p.grad is not None and _memory(value) == _memory(p.grad):
                raise UserError(f"{kind % key} is the gradient, which the next step overwrites; expected a clone of it")
    for name, value in vars(rule).items():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, torch.optim.Optimizer) and part.state and part.state is not rule.state:
                raise UserError(
                    f"make_optimizer: {name} of {type(rule).__name__} has a state of its own, which no checkpoint "
                    "saves; expected it to have the state of the whole"
                )


def _unsaved(optimizer: torch.optim.Optimizer) -> dict[tuple, Any]:
    """What an optimizer may count outside its state: numbers and versions of tensors, by where they are."""
    rule = rule_of(optimizer)
    places = [{} if type(rule) in ADAMW else vars(rule), *rule.param_groups]
    found = {(i, key): value for i, place in enumerate(places) for key, value in place.items()}
    found = {at: (id(x), x._version) if isinstance(x, Tensor) else x for at, x in found.items()}
    return {at: x for at, x in found.items() if type(x) in (int, float, tuple) and at[1] not in SET_BY_A_RUN}


def _memory(tensor: Tensor) -> int:
    return local_shard(tensor).untyped_storage().data_ptr()


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Loads model and optimizer in place, with any world size and sharding. Called by every rank.

    Raises UserError if the checkpoint is incomplete or has another model config (it names the first differing keys).
    """
    read_train(checkpoint)
    theirs, ours = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")), model.config.to_dict()
    for raw in (ours, theirs):  # a tokenizer may have moved; its contents are compared where the run resumes
        routers = raw.get("routers", [LEARNED] * (len(raw["d_model"]) - 1))
        raw["routers"] = [re.sub("^tokens:.*/", "tokens:", router) for router in routers]
    keys = [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]
    differing = [f"{key} ({theirs.get(key)} there, {ours.get(key)} here)" for key in keys]
    if differing:
        raise UserError(f"{checkpoint}: its model config differs in {'; '.join(differing[:3])}")
    from hnet_runtime.runs import checkpoint_files  # not above: see there

    checkpoint_files.read(checkpoint, model, optimizer)
