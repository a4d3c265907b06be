"""Jobs of several processes, forked from a server that has imported everything: a rank costs no start-up time.

A rank is a process of its own with gloo between them; it can be killed or stopped like any other.
"""

import contextlib
import fcntl
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["train", "torch._dynamo", "hnet_runtime.runs.checkpoint_files", "test_distributed"])


def start_server() -> None:
    """The server looks for what it imports in PYTHONPATH alone (Python before 3.14)."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [before])])
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(function: Callable, args: Sequence[Any], environment: dict[str, str], log: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= environment | {"OMP_NUM_THREADS": "1"}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    function(*args)


def made_once(tmp_path_factory, worker_id: str, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, once for all of pytest's processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / name
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


class Job:
    """`size` ranks that each run `function(*args[rank])`; what rank r prints goes to folder/rank{r}.log."""

    def __init__(self, folder: Path, size: int, function: Callable, args: Callable[[int], Sequence[Any]]):
        start_server()
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(size)]
        self.ranks, where = [], {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank, log in enumerate(self.logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            process = context.Process(target=_rank, args=(function, args(rank), where | place, log), daemon=True)
            process.start()
            self.ranks.append(process)

    def wait(self, timeout: float = 600) -> list[int | None]:
        """Exit codes of all ranks. Whatever still runs after `timeout` seconds is killed, its code None."""
        until = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0, until - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        for process in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.join()
        return codes

    def printed(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def succeed(self) -> str:
        codes = self.wait()
        if codes != [0] * len(codes):
            raise AssertionError(f"exit codes {codes}\n{self.printed()[-4000:]}")
        return self.printed()


def program(*argv: str) -> None:
    """train.py as a command of this process."""
    sys.argv = [str(ROOT / "train.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _alone(argv: Sequence[str], folder: Path, environment: dict[str, str], logs: Sequence[str | Path]) -> None:
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    os.chdir(folder)
    for name, descriptor, log in zip(("stdout", "stderr"), (1, 2), logs):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        encoding = environment.get("PYTHONIOENCODING", "utf-8")
        setattr(sys, name, open(descriptor, "w", encoding=encoding, closefd=False))  # noqa: SIM115
    program(*argv)


def start_train(
    argv: Sequence[str], folder: Path, environment: dict[str, str], logs: Sequence[str | Path]
) -> multiprocessing.Process:
    """train.py in `folder`, in a process of its own but without its start-up time; `logs` take stdout and stderr."""
    start_server()
    process = context.Process(target=_alone, args=(argv, folder, environment, logs), daemon=True)
    process.start()
    return process


def run_train(
    argv: Sequence[str], folder: Path, environment: dict[str, str], timeout: float = 240
) -> subprocess.CompletedProcess:
    """As subprocess.run of train.py, captured; see `start_train`."""
    with tempfile.TemporaryDirectory() as scratch:
        logs = f"{scratch}/stdout", f"{scratch}/stderr"
        process = start_train(argv, folder, environment, logs)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(["train.py", *argv], timeout)
        return subprocess.CompletedProcess(argv, process.exitcode, *(Path(log).read_text() for log in logs))
