"""Ends a job in which a rank died or hangs, and says which: rank, step and the last good checkpoint.

Every rank tells the job's store once a second that it lives and how far it is. A rank that is silent for `timeout`
seconds is dead (or its machine is); where no rank gets any further for `timeout` seconds, those furthest behind hang,
and the others wait for them. All ranks then write where they stand to RUN/failure/ (Python's stacks, and with NCCL its
flight recorder) and end with status 1; torchrun ends whoever is left and may start the job again.
"""

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

PASSING = (UserError, ConfigError, DataError)  # mistakes of a person, told by the program itself
SILENT = 4.0  # seconds without a word after which a rank is taken for dead, once communication has failed
WRITING = 2.0  # seconds that the others have to write where they stand


class Watchdog:
    """Used as a context around the training loop; does nothing where there is one process.

    `at` tells what this rank does now; each forward of `model` counts as progress too.
    """

    def __init__(self, run: Path, world: World, timeout: float, model: nn.Module):
        self.run, self.world, self.timeout = run, world, timeout
        self.step, self.doing, self.moves = 0, "starting", 0
        self.lost = ""  # why the store can't be reached
        self._stop = threading.Event()
        if world.size == 1:
            return
        names = [secrets.token_hex(8)]  # a job that torchrun starts again finds the store as it was left
        dist.broadcast_object_list(names)
        self._keys = [f"watchdog/{names[0]}/{rank}" for rank in range(world.size)]
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=timeout))
        self._beats = 0
        self._announce()
        dist.barrier()
        now = time.monotonic()
        self._known = [(-1, -1, 0, "")] * world.size  # (beats, moves, step, doing) of each rank
        self._heard, self._moved = [now] * world.size, [now] * world.size  # when these last changed
        self._thread = threading.Thread(target=self._watch, daemon=True)
        model.register_forward_pre_hook(lambda *_: self.at(self.step, self.doing))

    def at(self, step: int, doing: str) -> None:
        """This rank is in `step` (the first is 1) and does that. All ranks call it equally often: it's compared."""
        self.step, self.doing, self.moves = step, doing, self.moves + 1

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Where an error comes from a rank that died, its rank is told instead. Mistakes of a person's pass through."""
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
                told = [tuple(json.loads(value)) for value in self._store.multi_get(self._keys)]
            except Exception as error:  # whatever the store raises: without it nobody can be watched
                self.lost = str(error).splitlines()[0]
                if not self._stop.is_set():
                    gone = f"{self._names([0])} died, or its machine: the job's store there does not answer"
                    self._end([0], f"{gone} ({self.lost})")
                return
            now = time.monotonic()
            for rank, (new, old) in enumerate(zip(told, self._known)):
                if new[0] != old[0]:
                    self._heard[rank] = now
                if new[1] != old[1]:
                    self._moved[rank] = now
            self._known = told
            if silent := self._silent(self.timeout):
                self._end(silent, f"{self._names(silent)} has not been heard of for {self.timeout:g} s")
            elif now - max(self._moved) > self.timeout:
                fewest = min(moves for _, moves, *_ in told)
                behind = [rank for rank, (_, moves, *_) in enumerate(told) if moves == fewest]
                self._end(behind, f"{self._names(behind)} hangs: no progress for {self.timeout:g} s")

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, heard in enumerate(self._heard) if now - heard > seconds]

    def _names(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {r} (step {self._known[r][2]}, {self._known[r][3]})" for r in ranks)

    def _explain(self, error: Exception) -> None:
        """Communication failed, or this rank did: wait for a rank to fall silent, then end."""
        until = time.monotonic() + 2 * SILENT
        while time.monotonic() < until:
            if self.lost:
                self._thread.join()  # it says so and ends
            if silent := self._silent(SILENT):
                self._end(silent, f"{self._names(silent)} died")
            time.sleep(0.1)
        traceback.print_exception(error)
        self._end([], f"rank {self.world.rank} failed in step {self.step} ({self.doing}): {in_words(error)}")

    def _end(self, culprits: list[int], reason: str) -> None:
        """Write where this rank stands; the first rank that is no culprit says why; exit."""
        rank = self.world.rank
        speaks = rank == min(set(range(self.world.size)) - set(culprits), default=0) or not culprits
        if speaks:
            saved = checkpoint.complete(self.run)
            print(
                f"error: {reason}; the job ends. The last good checkpoint: {saved[-1] if saved else 'none yet'}",
                file=sys.stderr,
                flush=True,
            )
        folder = self.run / "failure"
        folder.mkdir(exist_ok=True)
        with open(folder / f"rank{rank}.stacks", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        if self.world.device.type == "cuda" and hasattr(torch._C._distributed_c10d, "_dump_nccl_trace"):
            (folder / f"rank{rank}.nccl").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
        time.sleep(WRITING if speaks else 2 * WRITING)
        os._exit(1)
