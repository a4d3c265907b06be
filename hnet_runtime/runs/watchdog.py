"""Ends a job in which a rank died or hangs, and names the rank, its step and the last good checkpoint.

Every rank reports its state to the job's store once a second. A rank that is silent for `timeout` seconds is dead, or
its machine is. If no rank makes progress for `timeout` seconds, the ranks furthest behind hang and the others wait for
them. All ranks then write their state to RUN/failure/ (Python's stacks, and with NCCL its flight recorder) and end with
status 1. torchrun ends the remaining processes and may restart the job.
"""

import contextlib
import faulthandler
import json
import logging
import os
import secrets
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hnet_runtime import DataError, UserError
from hnet_runtime.distributed import World
from hnet_runtime.runs import checkpoint
from hnet_runtime.runs.run import in_words
from hnet_trainable import ConfigError

logger = logging.getLogger("hnet")

PASSING = (UserError, ConfigError, DataError)  # mistakes of the user, which the program itself reports
SILENT = 4.0  # seconds of silence after which a rank counts as dead, once communication has failed
WRITING = 2.0  # seconds for the other ranks to write their state


class Watchdog:
    """A context around the training loop; with one process it does nothing.

    `at` reports what this rank does; each forward of `model` also counts as progress.
    """

    def __init__(self, run: Path, world: World, timeout: float, model: nn.Module):
        self.run, self.world, self.timeout = run, world, timeout
        self.step, self.doing, self.moves = 0, "starting", 0
        self.lost = ""  # the reason why the store can't be reached
        self._stop = threading.Event()
        if world.size == 1:
            return
        names = [secrets.token_hex(8)]  # a restarted job finds the store as it was left
        dist.broadcast_object_list(names)
        self._keys = [f"watchdog/{names[0]}/{rank}" for rank in range(world.size)]
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=timeout))
        self._beats = 0
        self._announce()
        dist.barrier()
        now = time.monotonic()
        self._known = [(-1, -1, 0, "")] * world.size  # (beats, moves, step, doing) of each rank
        self._heard, self._moved = [now] * world.size, [now] * world.size  # times of their last changes
        self._thread = threading.Thread(target=self._watch, daemon=True)
        model.register_forward_pre_hook(lambda *_: self.at(self.step, self.doing))

    def at(self, step: int, doing: str) -> None:
        """Reports what this rank does in `step` (from 1). All ranks must call it equally often: counts are compared."""
        self.step, self.doing, self.moves = step, doing, self.moves + 1

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Replaces an error caused by a dead rank by that rank's name. Mistakes of the user pass through."""
        if self.world.size == 1:
            return
        if isinstance(error, Exception) and not isinstance(error, PASSING):
            self._explain(error)
        self._stop.set()
        self._thread.join()

    def _announce(self) -> None:
        self._beats += 1
        self._store.set(self._keys[self.world.rank], json.dumps([self._beats, self.moves, self.step, self.doing]))

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.timeout / 10)):
            try:
                self._announce()
                reports = [tuple(json.loads(value)) for value in self._store.multi_get(self._keys)]
            except Exception as error:  # any error of the store: without it no rank can be watched
                self.lost = str(error).splitlines()[0]
                if not self._stop.is_set():
                    gone = f"{self._names([0])} died, or its machine: the job's store there does not answer"
                    self._end([0], f"{gone} ({self.lost})")
                return
            now = time.monotonic()
            for rank, (new, old) in enumerate(zip(reports, self._known)):
                if new[0] != old[0]:
                    self._heard[rank] = now
                if new[1] != old[1]:
                    self._moved[rank] = now
            self._known = reports
            if silent := self._silent(self.timeout):
                self._end(silent, f"{self._names(silent)} has not been heard of for {self.timeout:g} s")
            elif now - max(self._moved) > self.timeout:
                fewest = min(moves for _, moves, *_ in reports)
                behind = [rank for rank, (_, moves, *_) in enumerate(reports) if moves == fewest]
                self._end(behind, f"{self._names(behind)} hangs: no progress for {self.timeout:g} s")

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, heard in enumerate(self._heard) if now - heard > seconds]

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {r} (step {self._known[r][2]}, {self._known[r][3]})" for r in ranks)

    def _explain(self, error: Exception) -> None:
        """After a failure of communication or of this rank: waits for a rank to fall silent, then ends the job."""
        until = time.monotonic() + 2 * SILENT
        while time.monotonic() < until:
            if self.lost:
                self._thread.join()  # it reports that and ends
            if silent := self._silent(SILENT):
                self._end(silent, f"{self._names(silent)} died")
            time.sleep(0.1)
        traceback.print_exception(error)
        self._end([], f"rank {self.world.rank} failed in step {self.step} ({self.doing}): {in_words(error)}")

    def _end(self, culprits: list[int], reason: str) -> None:
        """Writes this rank's state and exits. The first rank that is no culprit prints the reason."""
        rank = self.world.rank
        speaks = rank == min(set(range(self.world.size)) - set(culprits), default=0) or not culprits
        if speaks:
            saved = checkpoint.complete(self.run)
            print(
                f"error: {reason}; the job ends. The last good checkpoint: {saved[-1] if saved else 'none yet'}",
                file=sys.stderr,
                flush=True,
            )
        with contextlib.suppress(OSError):  # a full disk keeps no rank from ending
            folder = self.run / "failure"
            folder.mkdir(exist_ok=True)
            with open(folder / f"rank{rank}.stacks", "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file)
            if self.world.device.type == "cuda" and hasattr(torch._C._distributed_c10d, "_dump_nccl_trace"):
                (folder / f"rank{rank}.nccl").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
        time.sleep(WRITING if speaks else 2 * WRITING)
        os._exit(1)
