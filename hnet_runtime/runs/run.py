"""A run's folder and what can happen to it: opening, locking, resuming, interrupting."""

import contextlib
import ctypes
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

from hnet_runtime import UserError
from hnet_runtime.distributed import World
from hnet_runtime.runs import checkpoint
from hnet_runtime.runs.metrics import read_metrics
from hnet_runtime.steps.segments import memory_ran_out

logger = logging.getLogger("hnet")
Returned = TypeVar("Returned")


def open_folder(save_dir: str, name: str, world: World) -> Path:
    """The run's folder, made and locked: `save_dir`, or runs/<name>-<time>. Raises UserError where a live run has it.

    The lock goes with its process, however that ends.
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
            raise UserError(f"--save-dir {run}: can't be made or written to ({error.strerror})") from None
        return run

    return of_main(make, world)


def of_main(call: Callable[[], Returned], world: World) -> Returned:
    """What `call` returns on rank 0, on every rank; where it raises a UserError there, every rank does.

    For what ranks could see differently, as where one of them has gone on already.
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


def leave_unused(run: Path, world: World) -> None:
    """Removes the folder, if `open_folder` has made it, of a run that was refused then."""
    if world.is_main and run in _made and [path.name for path in run.iterdir()] == [".lock"]:
        (run / ".lock").unlink()
        run.rmdir()


_locks: list = []
_made: set[Path] = set()


def checkpoint_to_resume(run: Path, resume: str, world: World) -> Path | None:
    """The checkpoint that `--resume` means: `auto` the run's newest complete one, if any; a path that one; empty none.

    Raises UserError where the folder holds a run that is not being resumed, or checkpoints later than the one named.
    """
    return of_main(lambda: _choose_checkpoint(run, resume), world)


def newest(path: Path) -> Path:
    """A run's newest complete checkpoint; anything else as it is."""
    found = checkpoint.complete(path)
    return found[-1] if found else path


def _choose_checkpoint(run: Path, resume: str) -> Path | None:
    found = checkpoint.complete(run)
    holds_a_run = bool(found) or (run / "metrics.jsonl").exists()
    if resume:
        read_metrics(run / "metrics.jsonl")  # a damaged line is told now, to all ranks
    if resume == "auto":
        for folder in checkpoint.incomplete(run):
            logger.warning("passed over %s: not a complete checkpoint", folder)
        if not found and holds_a_run:
            logger.warning("%s: no complete checkpoint to resume from; the run starts from the beginning", run)
        return found[-1] if found else None
    if not resume and holds_a_run:
        raise UserError(f"--save-dir {run}: holds a run already; go on with --resume auto, or name another folder")
    if not resume:
        return None
    source = newest(Path(resume))
    if holds_a_run and source.resolve().parent.parent != run.resolve():
        raise UserError(f"--save-dir {run}: holds another run than {source}; name another folder")
    if found and source.name < found[-1].name:  # a later --resume auto would go on from there
        raise UserError(
            f"--save-dir {run}: holds {found[-1].name}, which is later than {source}; name another folder, or delete "
            "what is later"
        )
    return source


class Compilations:
    """Counts the kernels that Triton compiles from now on in this process, with how long that takes."""

    def __init__(self):
        self.new, self.cached, self.seconds = 0, 0, 0.0
        with contextlib.suppress(ImportError):  # no Triton, or one that tells nobody (before 3.4)
            from triton import knobs

            knobs.compilation.listener = self._count

    def _count(self, times: Any = None, cache_hit: bool = False, **_: Any) -> None:
        """What is told differs with Triton's version, and must not stop a run."""
        self.new, self.cached = self.new + (not cache_hit), self.cached + cache_hit
        self.seconds += getattr(times, "total", 0) / 1e6  # from microseconds

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s for {self.new} kernels compiled and {self.cached} from Triton's cache"


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, rather than hand it back and have the kernel zero it anew.

    For training on a CPU: 6,000 to 10,000 page faults in a step of 1,024 bytes of the default model become a few.
    Elsewhere than on glibc: nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def code_revision() -> str:
    """The git revision of this checkout, with `+` where files differ from it; `unknown` outside git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        is_ours = [*git, "ls-files", "--error-unmatch", __file__]  # an installed package may lie in another's checkout
        subprocess.run(is_ours, capture_output=True, check=True)
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision.stdout.decode().strip() + ("+" if changed.stdout.strip() else "")


class Interrupts:
    """Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP ask for a save and an orderly end after this step.

    A second Ctrl-C ends at once. SIGHUP comes where a terminal is closed or ssh loses its connection; under nohup it is
    ignored from the start, and stays so.
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


def in_words(error: BaseException) -> str:
    """What went wrong, for the sentence that ends a run."""
    if memory_ran_out(error):
        return (
            "the GPU's memory is full: take --ac selective or block, a smaller --mbs with more --global-slices, "
            "or more processes"
        )
    return type(error).__name__
