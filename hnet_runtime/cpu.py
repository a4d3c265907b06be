"""Memory and threads of training on a CPU."""

import ctypes
import logging
import math
import os
import time
from pathlib import Path

import torch

logger = logging.getLogger("hnet")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step, instead of returning it to the kernel, which zeroes it.

    For training on a CPU: it avoids 6,000 to 10,000 page faults per step of 1,024 bytes of the default model. Without
    glibc it does nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def threads_beside(cores: int, load: float) -> int:
    """Threads for a step on a CPU of which other programs keep `load` cores busy: all, or at high load the free ones.

    A step's threads wait for each other, so one that gets no core delays them all. On 2 cores with a load of 5 a step
    took up to 15 s with 2 threads instead of 0.4 s.
    """
    return cores if load < cores / 2 else max(1, cores - round(load))


def share_cores() -> None:
    """Lowers torch's number of threads if other programs are busy on this CPU and OMP_NUM_THREADS does not set it."""
    cores, chosen = os.cpu_count() or 1, torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):
        return
    load = os.getloadavg()[0]
    if threads_beside(cores, load) < chosen:
        load = min(load, running_beside())  # the average of a minute still counts a program that has just ended
    if (threads := threads_beside(cores, load)) < chosen:
        torch.set_num_threads(threads)
        logger.info(
            f"{cores} CPU cores, load {load:.1f} by other programs: {threads} thread{'s' * (threads > 1)}; "
            f"OMP_NUM_THREADS={chosen} asks for more"
        )


def running_beside() -> float:
    """Threads of other programs that run or wait for a core, on average over 0.3 s. Infinite except on Linux."""
    counts = []
    for _ in range(10):
        time.sleep(0.03)
        try:
            counts.append(int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1)  # without this one
        except (OSError, ValueError, IndexError):
            return math.inf
    return sum(counts) / len(counts)
