"""Compiles the kernels of a run in threads before they are needed, the longest first.

The steps of a thin model (the widths of the config, few layers) are traced on the meta device: nothing is computed, and
each launch of a kernel is noted with its arguments. Triton tells kernels apart by dtypes, alignments and constants, so
what is noted is what the run will launch. Compilation then goes on in threads, since Triton's passes and ptxas do not
hold Python's lock, while this thread builds the model. A launch of a kernel that is not ready waits for it.

What is not foreseen is compiled at its first launch, as ever: this changes when kernels are compiled, never which.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hnet_kernels import cards
from hnet_kernels.dispatch import forcing, foreseeing, has_triton, requested
from hnet_runtime.checks import agreement
from hnet_runtime.steps.graphs import GraphedModel
from hnet_trainable import HNetConfig, HNetLM

if TYPE_CHECKING:
    from hnet_kernels.launch import Launch  # which imports triton

META = torch.device("meta")
# the longest to compile first; others in the order of their first launch. Seconds of one core, Triton 3.7.1, for 9.0
LONG = ("_gradients", "_backward_keys", "_finish", "_forward", "_backward_queries", "_backward", "_outputs", "_prepare")


def foresee(config: HNetConfig, mbs: int, ac: str, dtype: torch.dtype, accumulates: bool = False) -> "list[Launch]":
    """The launches of the checks before a run and of its steps as graphs, on tensors of the meta device.

    Code that does not run on the meta device, such as an edit that reads a value, ends the list early.
    """
    from hnet_kernels.launch import noting

    with noting() as found, foreseeing(), forcing(True):
        for example in agreement.EXAMPLES:
            with contextlib.suppress(Exception):
                agreement.call_example(example, META, dtype)
        with contextlib.suppress(Exception):
            _steps(agreement.thin_config(config), mbs, ac, dtype, accumulates)
    return found


def _steps(config: HNetConfig, mbs: int, ac: str, dtype: torch.dtype, accumulates: bool) -> None:
    with torch.device("meta"):
        model = HNetLM(config).train()
    graphed = GraphedModel(model, dtype, agreement.ALPHA, ac=ac, accumulates=accumulates)
    for T in dict.fromkeys((1024, mbs)):  # of the check of captured steps, and of the run
        graphed._allocate(T)
        shares = [1 / ratio for ratio in config.target_ratios]
        graphed.foresee(T, shares)
    with contextlib.suppress(Exception):
        graphed.optimizer.step()


class Ahead:
    """Compiles launches in threads and loads the kernels onto the current GPU. It ends by itself."""

    def __init__(self, launches: "Iterable[Launch]", threads: int | None = None):
        from triton.runtime import _async_compile

        from hnet_kernels.launch import Kernel

        self.began = time.perf_counter()
        self.pool = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1), "compile")
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

        class Mode(_async_compile.AsyncCompileMode):
            def submit(self, key, compile_, finalize):
                return super().submit(key, lambda: _loaded(compile_(), gpu), finalize)

        def rank(launch: "Launch") -> int:
            name = launch.kernel.__name__
            return LONG.index(name) if name in LONG else len(LONG)

        self.mode = Mode(self.pool)
        token = _async_compile.active_mode.set(self.mode)
        try:
            for launch in sorted(launches, key=rank):
                with contextlib.suppress(Exception):  # then its first launch says what is wrong
                    Kernel.run(launch.kernel, *launch.args, grid=(1,), warmup=True, **launch.options)
        finally:
            _async_compile.active_mode.reset(token)
        self.pool.shutdown(wait=False)  # what was submitted is still compiled

    @property
    def kernels(self) -> int:
        return len(self.mode.raw_futures)

    def wait(self) -> float:
        """Waits until all are compiled. Returns the seconds since the start."""
        self.pool.shutdown(wait=True)
        return time.perf_counter() - self.began


def _loaded(kernel: Any, gpu: int | None) -> Any:
    """The compiled kernel with its launcher, which Triton 3.6 compiles with gcc, and on the GPU."""
    if gpu is not None:
        try:
            torch.cuda.set_device(gpu)  # of this thread
            kernel._init_handles()
        except Exception:  # then its first launch does it anew, or says what is wrong
            kernel._run = kernel.module = None
    return kernel


def start(config: HNetConfig, mbs: int, ac: str, dtype: torch.dtype, accumulates: bool, device: torch.device) -> None:
    """Begins to compile the kernels of a run, if its device has kernels that can be compiled ahead.

    A file in Triton's cache notes runs whose kernels have all been compiled: for those nothing is foreseen.
    """
    if device.type != "cuda" or requested() == "reference" or not has_triton() or cards.why_unsupported(device):
        return
    from hnet_kernels import norm_triton
    from hnet_kernels.launch import Kernel

    if not isinstance(norm_triton._add_norm, Kernel):
        return  # under the interpreter, or with a version of Triton that is not known
    note = note_of(config, mbs, ac, dtype, accumulates, torch.cuda.get_device_name(device))
    if note.exists():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, each of which compiles
    threads = max(2, min(16, (os.cpu_count() or 1) // processes))
    ahead = Ahead(foresee(config, mbs, ac, dtype, accumulates), threads)

    def write_note() -> None:
        ahead.wait()
        with contextlib.suppress(OSError):
            note.touch()

    threading.Thread(target=write_note, name="compiled", daemon=True).start()


def note_of(config: HNetConfig, mbs: int, ac: str, dtype: torch.dtype, accumulates: bool, gpu: str) -> Path:
    """The file that notes that all kernels of such runs are in Triton's cache, with the kernels' code as it is now."""
    import triton

    code = [file.read_bytes() for file in sorted(Path(cards.__file__).parent.glob("*.py"))]
    what = config.to_dict(), mbs, ac, str(dtype), accumulates, gpu, triton.__version__, os.environ.get("HNET_GPU", "")
    digest = hashlib.sha256(b"".join([*code, json.dumps(what).encode()])).hexdigest()
    return Path(triton.knobs.cache.dir) / f"hnet-{digest[:32]}"
