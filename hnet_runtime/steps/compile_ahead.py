"""Compiles the kernels of a run in other processes while it starts, the longest first.

A process that uses CUDA cannot be forked. So `Compiler` forks one process before CUDA starts. Later it is told what is
trained on which GPU, and forks at most 16 processes, one for a core. They compile into Triton's cache, from which this
process takes the kernels. Its first launch waits until those of training are there, or without training all.

Which kernels: the steps of a thin model (the widths of the config, few layers) are traced on the meta device. Nothing
is computed there, and each launch of a kernel is noted with its arguments. Triton tells kernels apart by dtypes,
alignments and constants, so what is noted is what the run will launch.

What is not foreseen is compiled at its first launch, as ever: this changes when kernels are compiled, never which.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from hnet_kernels import cards
from hnet_kernels.dispatch import forcing, foreseeing, has_triton, one_after_the_other, requested
from hnet_runtime.checks import agreement
from hnet_runtime.steps import graphs
from hnet_simple import HNetInference
from hnet_trainable import HNetConfig, HNetLM

if TYPE_CHECKING:
    from hnet_kernels.launch import Launch  # which imports triton

META = torch.device("meta")
PROMPT = 64  # bytes of a prompt that is foreseen; Triton tells few sizes apart
SHORT_DOCUMENTS = 64  # in a micro-batch
PATIENCE = 300  # seconds; after that a kernel is compiled at its first launch
# the longest to compile first, 2.8 to 0.4 s of one core (Triton 3.6, for 9.0); the others as they are launched
LONG = (
    "_backward", "_gradients", "_backward_keys", "_forward", "_outputs", "_backward_queries", "_add_norm", "_prepare"
)  # fmt: skip


class Work(NamedTuple):
    """What is compiled for: the steps of a model, or generation with it, or both.

    mbs: bytes of a micro-batch of training; 0: none. ac: as train.py's --ac. accumulates: a step has several
    micro-batches. texts: how many are generated together; 0: none.
    """

    config: HNetConfig
    dtype: torch.dtype
    mbs: int = 0
    ac: str = "none"
    accumulates: bool = False
    texts: int = 0


def foresee_steps(work: Work) -> "list[Launch]":
    """The launches of the checks before a run and of its steps as graphs, on tensors of the meta device.

    Code that does not run on the meta device, such as an edit that reads a value, ends the list early.
    """
    from hnet_kernels.launch import noting

    with noting() as found, foreseeing(), forcing(True):
        for example in agreement.EXAMPLES:
            with contextlib.suppress(Exception):
                agreement.call_example(example, META, work.dtype)
        with contextlib.suppress(Exception):
            _run_steps(work)
    return found


def _run_steps(work: Work) -> None:
    if not work.mbs:
        return
    config = agreement.thin_config(work.config)
    with META:
        model = HNetLM(config).train()
    graphed = graphs.GraphedModel(model, work.dtype, agreement.ALPHA, ac=work.ac, accumulates=work.accumulates)
    # of the check of captured steps, and of the run with documents that are long or short
    for T, documents in (agreement.CAPTURED_BYTES, 1), (work.mbs, 1), (work.mbs, SHORT_DOCUMENTS):
        graphed._allocate(T)
        graphed.foresee(T, documents, [1 / ratio for ratio in config.target_ratios])
    with contextlib.suppress(Exception):
        graphed.optimizer.step()


def foresee_generation(work: Work) -> "list[Launch]":
    """The launches of a step of generation and of a short prefill; as `foresee_steps`."""
    from hnet_decoder import Decoder, PaddedPrefill
    from hnet_kernels.launch import noting
    from hnet_runtime.runs.weights import cast

    with noting() as found, foreseeing(), forcing(True), contextlib.suppress(Exception):
        with META:
            model = HNetInference(agreement.thin_config(work.config)).eval()
        model.load_state_dict(cast(model.state_dict(), work.dtype), assign=True)
        decoder = Decoder(model, work.texts, captures=False, host_decides=False)
        prefill = PaddedPrefill(model, work.texts, PROMPT, captures=False)
        for mode in (contextlib.nullcontext(), one_after_the_other()):  # graphs are compared with the second
            with mode:
                decoder.foresee()
                prefill.foresee()
    return found


class Compiler:
    """Compiles the kernels of steps in processes of their own. None of its calls raises an error for a kernel."""

    def __init__(self):
        """Forks its process. Not by multiprocessing, which refuses that inside a worker of a pool."""
        self.connection, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():  # of Python 3.12: numpy's threads, which are idle, are not in the fork
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process = os.fork()
        if not self.process:
            try:
                _serve(theirs, self.connection)
            finally:
                os._exit(0)
        theirs.close()

    def begin(self, work: Work, gpu: cards.Properties, note: Path | None = None) -> None:
        """Begins to compile. The next launch of a kernel waits for those of training, or without training for all.

        note: a file that is written when all is in the cache.
        """
        from hnet_kernels.launch import before_first_launch

        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, each of which compiles
        workers = max(1, min(16, (os.cpu_count() or 1) // processes))
        with contextlib.suppress(OSError):
            self.connection.send((work._replace(config=work.config.to_dict()), gpu, workers, note))
            before_first_launch(self.wait)

    def wait(self) -> int:
        """Waits until they are in the cache. Returns their number; 0 if the compiler was stopped or hangs."""
        kernels = 0
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll(PATIENCE):
                kernels = self.connection.recv() or 0
        self.close()
        return kernels

    def close(self) -> None:
        """Ends its process, unless that compiles: then it ends when it is done."""
        self.connection.close()


def prepare(device: str, is_wanted: bool = True) -> Compiler | None:
    """A compiler, to be made before CUDA starts; None if there is nothing to compile ahead. device: as for train.py."""
    if not is_wanted or device == "cpu" or torch.cuda.is_initialized() or dist.is_initialized():
        return None
    # `torch.cuda.is_available` would start CUDA, in a way that a fork does not survive
    if not torch.cuda.device_count() or not can_compile():
        return None
    compiler = Compiler()
    threading.Thread(target=_hash_triton, daemon=True).start()  # while this process starts CUDA
    return compiler


def _hash_triton() -> None:
    """Has Triton hash its own files, as it does for the first kernel: of 400 MB, which takes half a second."""
    with contextlib.suppress(ImportError):  # a version that has it elsewhere
        from triton.runtime.cache import triton_key

        triton_key()


def begin(compiler: Compiler | None, work: Work, device: torch.device) -> None:
    """Compiles the kernels of a run on this device, unless a note in Triton's cache says that it has them."""
    if compiler is None:
        return
    note = note_of(work, torch.cuda.get_device_name(device))
    if note.exists() or cards.why_unsupported(device):
        compiler.close()
    else:
        compiler.begin(work, cards.properties(device), note)


def _serve(connection: Connection, other_end: Connection) -> None:
    """The compiler's process: waits for its one task, and answers with the number of kernels."""
    other_end.close()  # so that the end of the first process is the end of the connection
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # whoever reads what a run prints waits for no compiler
        os.dup2(nowhere, stream)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else autograd would start CUDA here
    with contextlib.suppress(EOFError, OSError):
        # while the first process starts CUDA
        torch.arange(1, device=META)  # imports much of torch
        for file in Path(cards.__file__).parent.glob("*_triton.py"):
            importlib.import_module(f"hnet_kernels.{file.stem}")
        _hash_triton()
        gc.freeze()
        work, gpu, workers, note = connection.recv()
        work = work._replace(config=HNetConfig.load(work.config))
        compiles_for(gpu)
        if work.mbs:
            done = [compile_all(foresee_steps(work), workers)]
            connection.send(done[0])
            os.nice(10)  # the rest goes on beside the run
            if work.texts:
                done.append(compile_all(foresee_generation(work), workers))
        else:
            done = [compile_all([*foresee_steps(work), *foresee_generation(work)], workers)]
            connection.send(done[0])
        if note and None not in done:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()


def compiles_for(gpu: cards.Properties) -> None:
    """From now on this process foresees and compiles kernels for a GPU, which need not be here, and launches none."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    major, minor = gpu.capability

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 10 * major + minor, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)

    cards.foresee_for(gpu)
    driver.set_active(Driver())


def compile_all(launches: "Sequence[Launch]", workers: int) -> int | None:
    """Compiles the kernels of launches in forked processes. Returns their number; None if one fails.

    To be called after `compiles_for`, in a process without CUDA and threads.
    """
    from triton.backends.nvidia.driver import CudaUtils

    def rank(launch: "Launch") -> int:
        name = launch.kernel.__name__
        return LONG.index(name) if name in LONG else len(LONG)

    launches = list({launch.kind: launch for launch in sorted(launches, key=rank)}.values())
    taken, done = (multiprocessing.get_context("fork").Value("i", 0) for _ in range(2))  # launches begun and compiled

    def next_launches() -> "Iterator[Launch]":
        while True:
            with taken.get_lock():
                i, taken.value = taken.value, taken.value + 1
            if i >= len(launches):
                return
            yield launches[i]

    children = []
    for _ in range(min(workers, len(launches))):
        if not (child := os.fork()):
            if not children:
                with contextlib.suppress(BaseException):
                    CudaUtils()  # Triton's own calls of CUDA, which gcc compiles
            with contextlib.suppress(BaseException):
                for launch in next_launches():
                    if _compile(launch):
                        with done.get_lock():
                            done.value += 1
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return len(launches) if done.value == len(launches) else None


def _compile(launch: "Launch") -> bool:
    """Compiles a kernel into Triton's cache, and its launcher, which Triton 3.6 has gcc compile."""
    from triton.backends.nvidia.driver import CudaLauncher

    from hnet_kernels.launch import Kernel

    try:
        compiled = Kernel.run(launch.kernel, *launch.args, grid=(1,), warmup=True, **launch.options)
    except Exception:  # then its first launch says what is wrong
        return False
    with contextlib.suppress(Exception):  # Triton 3.7 makes launchers without gcc, and asks the GPU
        CudaLauncher(compiled.src, compiled.metadata)
    return True


def can_compile() -> bool:
    """Whether kernels run on a GPU, and Triton is one that can compile them ahead."""
    if requested() == "reference" or not has_triton():
        return False
    from hnet_kernels import norm_triton
    from hnet_kernels.launch import Kernel

    return isinstance(norm_triton._add_norm, Kernel)  # not the interpreter, and a version of Triton that is known


def note_of(work: Work, gpu: str) -> Path:
    """The file that notes that all kernels of such runs are in Triton's cache, with the code as it is now."""
    import triton

    import hnet_decoder
    import hnet_simple
    import hnet_trainable

    modules = hnet_trainable, hnet_simple, hnet_decoder, graphs, agreement
    files = [*sorted(Path(cards.__file__).parent.glob("*.py")), *(Path(module.__file__) for module in modules)]
    code = [file.read_bytes() for file in files]
    what = work.config.to_dict(), *map(str, work[1:]), gpu, triton.__version__, os.environ.get("HNET_GPU", "")
    digest = hashlib.sha256(b"".join([*code, json.dumps(what).encode()])).hexdigest()
    return Path(triton.knobs.cache.dir) / f"hnet-{digest[:32]}"
