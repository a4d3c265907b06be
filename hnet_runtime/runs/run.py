"""A run's folder: opening, locking and resuming; and its code revision, compiled kernels and interrupts."""

import contextlib
import dataclasses
import fcntl
import logging
import os
import signal
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import yaml

from hnet_runtime import UserError
from hnet_runtime.distributed import World
from hnet_runtime.pages.reports import write_atomically
from hnet_runtime.runs import checkpoint
from hnet_runtime.runs.flags import OF_ONE_START, TrainConfig
from hnet_runtime.runs.metrics import JsonlSink, Metrics, TensorBoardSink, WandbSink, read_metrics
from hnet_runtime.steps.segments import memory_ran_out
from hnet_trainable import HNetConfig

logger = logging.getLogger("hnet")
Returned = TypeVar("Returned")


def open_folder(save_dir: str, name: str, world: World) -> Path:
    """The run's folder, created and locked: `save_dir`, or runs/<name>-<time>.

    Raises UserError if another live run uses it. The lock ends with its process, however that ends.
    """

    def make() -> Path:
        run = Path(save_dir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
        is_new = not run.exists()
        try:
            run.mkdir(parents=True, exist_ok=True)
            if is_new:
                _made.add(run)
            lock = open(run / ".lock", "wb")  # noqa: SIM115 (held until the process ends)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locks.append(lock)
        except BlockingIOError:
            raise UserError(f"--save-dir {run}: another run is writing there; name another folder") from None
        except OSError as error:
            if file := next((path for path in (run, *run.parents) if path.is_file()), None):
                what = "a file" if file == run else f"{file} is a file"
                raise UserError(f"--save-dir {run}: {what}; expected a folder, or a name for a new one") from None
            raise UserError(f"--save-dir {run}: can't be made or written to ({error.strerror})") from None
        return run

    return of_main(make, world)


def of_main(call: Callable[[], Returned], world: World) -> Returned:
    """The result of `call` on rank 0, returned on every rank. A UserError raised there is raised on every rank.

    For what ranks could see differently, such as a folder that one of them has already changed.
    """
    found, mistake = None, None
    if world.is_main:
        try:
            found = call()
        except UserError as error:
            mistake = str(error)
    decided = [found, mistake]
    dist.broadcast_object_list(decided)
    found, mistake = decided
    if mistake:
        raise UserError(mistake)
    return found


def remove_unused(run: Path, world: World) -> None:
    """Removes the folder of a run that was refused, if `open_folder` created it."""
    if world.is_main and run in _made and [path.name for path in run.iterdir()] == [".lock"]:
        (run / ".lock").unlink()
        run.rmdir()


_locks: list = []
_made: set[Path] = set()


def checkpoint_to_resume(run: Path, resume: str, world: World) -> Path | None:
    """The checkpoint of `--resume`. auto: the newest complete one of the run, or None. A path: that one. Empty: None.

    Raises UserError if the folder has a run that is not being resumed, checkpoints later than the named one, or files
    of no run. A run that ended in its first steps, without a checkpoint, is replaced.
    """
    return of_main(lambda: _choose_checkpoint(run, resume), world)


def newest(path: Path) -> Path:
    """The newest complete checkpoint of a run; any other path unchanged."""
    found = checkpoint.complete(path)
    return found[-1] if found else path


def _has_steps(metrics: Path) -> bool:
    """Whether a run did more than its first step."""
    return any(record.get("step", 0) > 1 for record in read_metrics(metrics))


def _refuse_files_of_others(run: Path) -> None:
    """Raises UserError if a folder without the flags of a run has files that a run would overwrite."""
    flags = run / "train.yaml"
    if flags.is_file() and "global_slices" in flags.read_text(encoding="utf-8", errors="replace"):
        return  # a run that ended before its first checkpoint
    names = ("train.yaml", "config.json", "plots.png", "plots.html", "cuts", "wandb_id")
    if found := [name for name in names if (run / name).exists()]:
        raise UserError(f"--save-dir {run}: has no run, but {found[0]}, which a run would replace; name another folder")


def say_what_changed(source: Path, about: dict[str, Any]) -> None:
    """Logs how a run that resumes from a checkpoint differs from the run that wrote it: model files and flags."""
    saved = checkpoint.read_train(source)
    if changed := checkpoint.changed_model(saved):
        logger.warning("%s %s: the run uses the files as they are now", source, changed)
    theirs, ours = saved["config"], about["config"]
    for name in ours:
        if name not in OF_ONE_START and name in theirs and theirs[name] != ours[name]:
            logger.info(f"with --{name.replace('_', '-')} {ours[name]}, which was {theirs[name]}")


def _choose_checkpoint(run: Path, resume: str) -> Path | None:
    found = checkpoint.complete(run)
    metrics = run / "metrics.jsonl"
    has_checkpoints = bool(found or checkpoint.incomplete(run))
    holds_a_run = has_checkpoints or (metrics.exists() and metrics.stat().st_size > 0)
    if not has_checkpoints:
        _refuse_files_of_others(run)
    if resume:
        read_metrics(metrics)  # reports a damaged line now, on all ranks
    if resume == "auto":
        for folder in checkpoint.incomplete(run):
            logger.warning("skipped %s: not a complete checkpoint", folder)
        if not found and holds_a_run:
            logger.warning("%s: no complete checkpoint to resume from; the run starts from the beginning", run)
        elif not found:
            logger.info("no checkpoint in %s: a new run starts", run)
        return found[-1] if found else None
    if not resume and holds_a_run and not (has_checkpoints or _has_steps(metrics)):
        return None  # it ended in its first steps
    if not resume and holds_a_run:
        raise UserError(f"--save-dir {run}: holds a run already; resume it with --resume auto, or name another folder")
    if not resume:
        return None
    source = newest(Path(resume))
    if holds_a_run and source.resolve().parent.parent != run.resolve():
        raise UserError(f"--save-dir {run}: holds another run than {source}; name another folder")
    if found and source.name < found[-1].name:  # a later --resume auto would resume from there
        raise UserError(
            f"--save-dir {run}: holds {found[-1].name}, which is later than {source}; name another folder, or delete "
            "what is later"
        )
    return source


class Compilations:
    """Counts the kernels that Triton compiles from now on in this process, and the seconds that it takes.

    on_gpu: elsewhere nothing is compiled, so Triton is not imported.
    """

    def __init__(self, on_gpu: bool):
        self.new, self.cached, self.seconds = 0, 0, 0.0
        if on_gpu:
            with contextlib.suppress(ImportError):  # no Triton, or a version without this hook (before 3.4)
                from triton import knobs

                knobs.compilation.listener = self._count

    def _count(self, times: Any = None, cache_hit: bool = False, **_: Any) -> None:
        """The arguments differ between versions of Triton; a difference must not stop a run."""
        self.new, self.cached = self.new + (not cache_hit), self.cached + cache_hit
        self.seconds += getattr(times, "total", 0) / 1e6  # from microseconds

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s for {self.new} kernels compiled and {self.cached} from Triton's cache"


def code_revision() -> str:
    """The git revision of this checkout, with `+` where files differ from it; `unknown` outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        is_ours = [*git, "ls-files", "--error-unmatch", __file__]  # an installed package may be inside another checkout
        subprocess.run(is_ours, capture_output=True, check=True)
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.decode().strip() + ("+" if changed.stdout.strip() else "")


class Interrupts:
    """Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP request a save and an orderly end after this step.

    To be made when the steps begin: before, a signal ends the process at once, though it waits for one that has died.
    A second Ctrl-C ends the program at once. SIGHUP comes when a terminal is closed or an ssh connection is lost; under
    nohup it stays ignored.
    """

    def __init__(self):
        self.received: str | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            os._exit(130)
        self.received = signal.Signals(number).name


def in_words(error: BaseException, ac: str = "none") -> str:
    """What to do if the error says that memory is full, else the class of the error. ac: --ac of the run."""
    if memory_ran_out(error):
        first = {"selective": "--ac block, ", "block": ""}.get(ac, "--ac selective or block, ")
        return f"the GPU's memory is full: take {first}a smaller --mbs with more --global-slices, or more processes"
    return type(error).__name__


def open_metrics(run: Path, step: int, about: dict, hnet: HNetConfig, config: TrainConfig, world: World) -> Metrics:
    """Writes the run's configs and model files, and opens what its records go to: on rank 0, else to nothing."""
    if not world.is_main:
        return Metrics([])
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_ONE_START}
    flags = yaml.safe_dump(flags, sort_keys=False)
    write_atomically(run / "train.yaml", lambda scratch: scratch.write_text(flags, encoding="utf-8"))
    write_atomically(run / "config.json", lambda scratch: checkpoint.write_json(scratch, hnet.to_dict()))
    checkpoint.keep_model_files(run)
    sinks = [JsonlSink(run / "metrics.jsonl", step)]
    if config.logger == "wandb":
        sinks.append(WandbSink(run, step, about | {"model": hnet.to_dict()}))
    elif config.logger == "tensorboard":
        sinks.append(TensorBoardSink(run, step))
    return Metrics(sinks)
