"""Functions that run many times: on a GPU captured as CUDA graphs, on a CPU compiled to C++."""

import functools
import time
import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures. One is enough, and cuBLAS allocates some MB for each stream that it sees."""
    return torch.cuda.Stream(device)


class CapturedFunctions:
    """Named functions without arguments, as CUDA graphs. The tensors that they read and write keep their addresses.

    A function must do the same work in each call: it may not read a value from the device, nor depend on values of the
    host that change. A tensor that it stores in an attribute for other functions is allocated once; each replay writes
    to it again.

    `failure`: the error of a capture that failed, such as of a function that waits for the device. After it, functions
    run without graphs.
    """

    keeps = False  # True: the graphs stay readable, for benchmarks (`keep_graph` of torch.cuda.CUDAGraph)

    def __init__(self, device: torch.device, captures: bool):
        self.device, self.captures = device, captures
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.key: Hashable = None
        self.failure: Exception | None = None
        self.captured, self.seconds = 0, 0.0  # the number of functions so far, and the time of capturing them
        self.calls: dict[Hashable, int] = {}  # of `run`
        self.pool: tuple[int, int] | None = None

    def prepare(
        self, key: Hashable, functions: dict[Hashable, Callable[[], None]], idle: Callable[[], Callable[[], None]]
    ) -> None:
        """Captures the functions, unless `key` is that of the last capture.

        key: what their work depends on, such as the addresses of weights.
        idle: called first. After it, the functions change no state, since each runs once to compile its kernels. It
        returns a function that ends this.
        """
        if not self.captures or key == self.key:
            return
        began = time.perf_counter()
        self.graphs.clear()
        pool, stream = torch.cuda.graph_pool_handle(), _capture_stream(self.device)
        undo = idle()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for function in functions.values():
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            for name, function in functions.items():
                self._capture(name, function, pool)
        except Exception as error:  # of a mixer that somebody has written: anything
            self.give_up(error.with_traceback(None))
        finally:
            undo()
        self.key = key
        self.seconds += time.perf_counter() - began

    def _capture(self, name: Hashable, function: Callable[[], None], pool: tuple[int, int]) -> None:
        graph = torch.cuda.CUDAGraph(keep_graph=self.keeps)
        with torch.cuda.stream(_capture_stream(self.device)):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        self.graphs[name] = graph
        self.captured += 1

    def run(self, name: Hashable, function: Callable[[], None]) -> None:
        """Runs a function. Its second call captures it, since work that comes twice will come again."""
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.captures and name not in self.graphs and self.calls[name] > 1:
            began = time.perf_counter()
            try:
                torch.cuda.synchronize()
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self._capture(name, function, self.pool)
            except Exception as error:
                self.give_up(error.with_traceback(None))
            self.seconds += time.perf_counter() - began
        if not self.replay(name):
            function()

    def give_up(self, error: Exception) -> None:
        """Frees the graphs. From now on, nothing is captured or replayed."""
        self.failure, self.captures = error, False
        self.graphs.clear()

    def replay(self, name: Hashable) -> bool:
        """Replays the function if it is captured. Returns whether it is."""
        graph = self.graphs.get(name)
        if graph is None or not self.captures:
            return False
        graph.replay()
        return True


class Compiled(NamedTuple):
    """A compiled function, with the interface of a CUDA graph."""

    replay: Callable[[], None]


class CompiledFunctions(CapturedFunctions):
    """Functions on a CPU, compiled to C++ by torch.compile, and again when the size of a buffer changes.

    Needs a C++ compiler: see `why_no_compiler`.
    """

    def __init__(self):
        super().__init__(torch.device("cpu"), captures=True)

    def prepare(
        self, key: Hashable, functions: dict[Hashable, functools.partial[None]], idle: Callable[[], Callable[[], None]]
    ) -> None:
        """Compiles the functions, unless `key` is that of the last call. See `CapturedFunctions.prepare`."""
        if not self.captures or key == self.key:
            return
        began, undo = time.perf_counter(), idle()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*lru_cache")  # it warns of tracing cached functions
                for name, function in functions.items():
                    if name not in self.graphs:
                        self.graphs[name] = Compiled(functools.partial(torch.compile(function.func), *function.args))
                        self.captured += 1
                    self.replay(name)  # this compiles it
        except Exception as error:  # of torch.compile: anything
            self.give_up(error.with_traceback(None))
        finally:
            undo()
        self.key = key
        self.seconds += time.perf_counter() - began


def why_no_compiler() -> str | None:
    """Why torch.compile cannot compile for a CPU, in one line, or None where it can."""
    try:
        torch.compile(torch.neg)(torch.zeros(2))
    except Exception as error:  # of torch.compile: anything
        return str(error).strip().splitlines()[0]
    return None
