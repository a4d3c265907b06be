"""A part of a model as CUDA graphs: its forward, and its backward in one piece or several.

All graphs share their memory, as one runs after the other, but for what a forward keeps for its backward: that lies in
an `Arena`. On a CPU the same path runs without capture.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hnet_kernels.kept import keeping
from hnet_runtime.fused import gradients_into, noting_seams
from hnet_trainable import Block


def memory_ran_out(error: BaseException) -> bool:
    """Whether it says that a GPU's memory is full: that which torch gives out or, as for graphs, the driver."""
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError)


Ends = Sequence[tuple[Tensor, Tensor]]  # outputs that have a gradient, each with where it will lie
Leaf = Callable[[Tensor, Tensor], Tensor]


class Arena:
    """What forwards of a part keep for their backwards, from the start of a buffer on: that of the one that ran last.

    So all else that they and the backwards need meanwhile can be shared with those of other parts. It can go when torch
    lets one capture allocate from two pools (proposed in github.com/pytorch/pytorch/pull/187929).
    static: where (`data_ptr` of storages) tensors lie that need not be kept, as nothing writes to them meanwhile.
    """

    ALIGNED = 512  # bytes, as torch's allocator has it

    def __init__(self, static: Collection[int], device: torch.device):
        self.static, self.buffer = static, torch.empty(0, dtype=torch.uint8, device=device)
        self.begin()

    def begin(self) -> None:
        self.used = 0  # bytes
        self.beside: list[Tensor] = []  # what finds no room. In graphs that must not be: others write there
        self.known = {*self.static, self.buffer.untyped_storage().data_ptr()}

    def grow(self, need: float) -> None:
        """Another buffer, with room for so many bytes, in whole MiB."""
        self.buffer = self.buffer[:0].clone()  # this one's memory goes first
        if self.buffer.is_cuda:
            torch.cuda.empty_cache()  # else a hole is left, in which the new one has no room
        self.buffer = self.buffer.new_empty(math.ceil(need / 2**20) * 2**20)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """New memory."""
        begin = self.used
        self.used += -(-math.prod(shape) * dtype.itemsize // self.ALIGNED) * self.ALIGNED
        if self.used > len(self.buffer):
            self.beside.append(torch.empty(shape, dtype=dtype, device=device))
            self.known.add(self.beside[-1].untyped_storage().data_ptr())
            return self.beside[-1]
        # not as a view: autograd takes what writes to one for a change of all of them
        x = torch.empty(0, dtype=dtype, device=device)
        return x.set_(self.buffer.untyped_storage(), begin // dtype.itemsize, torch.Size(shape))

    def keep(self, x: Tensor) -> Tensor:
        """x, or a copy of it where it would be overwritten; without its gradient, which would keep it alive."""
        x = x.detach()
        if x.is_nested:  # autograd keeps an NJT for its shape alone
            return x
        if x.untyped_storage().data_ptr() in self.known or x.device != self.buffer.device:
            return x
        return self.empty(x.shape, x.dtype, x.device).copy_(x)


class Piece(NamedTuple):
    """Of a segment: what it reads from a block on (None: from the start) to where the next piece begins."""

    block: Block | None
    targets: dict[Tensor, Tensor]  # weights, each read once, and where their gradients go
    span: int  # of the optimizer's


class Segment:
    """A part of the model for fixed sizes: its forward, and a backward for each piece; graphs, on a CPU plain calls.

    run: reads and writes tensors that stay where they are. Of those whose gradient is wanted it takes `leaf(tensor,
    gradient)`, which names the place for that; it returns its `Ends`.
    pieces: what else `run` reads, in that order.
    arena: for what the forward keeps; None where nothing else runs before the backward.
    """

    def __init__(self, run: Callable[[Leaf], Ends], pieces: Sequence[Piece], arena: Arena | None):
        self.run, self.pieces, self.arena = run, pieces, arena
        self.steps = self._calls()

    def _calls(self) -> list[Callable[[], None]]:
        return [self._forward, *(self._backward for _ in self.pieces)]

    def capture(self, pool: Any, stream: torch.cuda.Stream) -> bool:
        """Makes graphs of it, whose memory is the pool's. All that `run` calls has run in this process before.

        stream: on which nothing else runs, in no thread, as all of that would be captured.
        False: its arena is too small, see `used`. What found no room in there lies in the pool, where graphs that were
        captured before would overwrite it; so this must be called again with a larger one.
        """
        steps = []  # former graphs stay until there are new ones: torch takes no pool that all have left
        for call in self._calls():
            graph = torch.cuda.CUDAGraph()
            # "relaxed": a kernel that sizes like these are the first to call may be loaded meanwhile, and another
            # thread may be saving a checkpoint. The outer stream: where a capture cannot be ended, `torch.cuda.graph`
            # leaves its own the current one (2.11, 2.13); to go when its `__exit__` has a finally
            capturing = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="relaxed")
            with torch.cuda.stream(torch.cuda.current_stream()), capturing:
                call()
            steps.append(graph.replay)
        self.steps = steps
        self._let_go()
        return not (self.arena and self.arena.beside)

    def _let_go(self) -> None:
        """Of what the forward saved: others use that memory too."""
        del self.ends, self.seams, self.wanted, self.copied

    def try_out(self, stream: torch.cuda.Stream) -> None:
        """Compiles and loads what the segment calls, on another stream as captures want it, and finds what it keeps."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(trial=True)
            for backward in self.steps[1:]:
                backward()
            self._let_go()
            if self.arena:
                self.arena.beside.clear()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # what lies beside the pool is of no use to it

    def _kept(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.arena:
            self.arena.begin()
            stack.enter_context(keeping(self.arena))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.arena.keep, lambda x: x))
        return stack

    def _forward(self, trial: bool = False) -> None:
        """trial: the gradients of what comes from other segments go nowhere, for one may lie where its tensor does."""
        self.seams: dict[nn.Module, Tensor | None] = {piece.block: None for piece in self.pieces[1:]}
        self.wanted = [list(piece.targets) for piece in self.pieces]
        # where gradients go, without those that the backward itself will write
        self.copied = {x: place for piece in self.pieces for x, place in piece.targets.items()}

        def leaf(x: Tensor, gradient: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            passed = sum(seam is not None for seam in self.seams.values())
            self.wanted[passed].append(x)
            self.copied[x] = gradient.clone() if trial else gradient
            return x

        with torch.enable_grad(), gradients_into(self.copied), noting_seams(self.seams), self._kept():
            self.ends = self.run(leaf)

    def _backward(self) -> None:
        """Of the last piece that is left."""
        outputs, doutputs = zip(*self.ends)
        wanted = self.wanted.pop()
        seam = [self.seams.popitem()[1]] if self.seams else []
        gradients = torch.autograd.grad(outputs, [*wanted, *seam], doutputs, allow_unused=True)
        self.ends = list(zip(seam, gradients[len(wanted) :]))
        found = dict(zip(wanted, gradients))
        copied = [x for x in wanted if x in self.copied]
        if {x for x in wanted if found[x] is not None} != set(copied):
            raise RuntimeError("a weight is not used, or twice")
        for dtype in dict.fromkeys(x.dtype for x in copied):  # a launch for each
            same = [x for x in copied if x.dtype == dtype]
            torch._foreach_copy_([self.copied[x] for x in same], [found[x] for x in same])

    def forward(self) -> None:
        self.steps[0]()

    def backward(self, finished: Callable[[int], None] = lambda span: None) -> None:
        """finished: told the span of each piece whose gradients have been launched."""
        for piece, backward in zip(reversed(self.pieces), self.steps[1:]):
            backward()
            finished(piece.span)
