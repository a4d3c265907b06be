"""One part of a model as CUDA graphs: one for its forward, and one or several for its backward.

All graphs share their memory, because they run one after the other. Only what a forward saves for its backward is
apart, in a `SavedPool`. On a CPU the same code runs without capture.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hnet_kernels.gradients import Destinations, settle, switch_to, writing_to
from hnet_kernels.saved import save_in
from hnet_trainable import Block


def memory_ran_out(error: BaseException) -> bool:
    """Whether the error says that a GPU ran out of memory: of torch's allocator or, for graphs, of the driver."""
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError)


Outputs = Sequence[tuple[Tensor, Tensor]]  # (output, its gradient)
Leaf = Callable[..., Tensor]  # (tensor, memory of its gradient, adds=False)


class SavedPool:
    """The memory for what a part's forward saves for its backward: a buffer that each forward fills from its start.

    All other memory of forwards and backwards can then be shared with other parts. This class can be removed when torch
    lets one capture allocate from two pools (proposed in github.com/pytorch/pytorch/pull/187929).
    static: the storages (`data_ptr`) of tensors that need no copy, because nothing overwrites them in between.
    """

    ALIGNED = 512  # bytes, as torch's allocator has it

    def __init__(self, static: Collection[int], device: torch.device):
        self.static, self.buffer = static, torch.empty(0, dtype=torch.uint8, device=device)
        self.begin()

    def begin(self) -> None:
        self.used = 0  # bytes
        self.beside: list[Tensor] = []  # what did not fit; graphs would overwrite it
        self.known = {*self.static, self.buffer.untyped_storage().data_ptr()}

    def grow(self, need: float) -> None:
        """Replaces the buffer by one of at least `need` bytes, in full MiB."""
        self.buffer = self.buffer[:0].clone()  # frees this one's memory first
        if self.buffer.is_cuda:
            torch.cuda.empty_cache()  # else the freed block may be too small for the new buffer
        self.buffer = self.buffer.new_empty(math.ceil(need / 2**20) * 2**20)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor in the buffer, or beside it where the buffer is full."""
        begin = self.used
        self.used += -(-math.prod(shape) * dtype.itemsize // self.ALIGNED) * self.ALIGNED
        if self.used > len(self.buffer):
            self.beside.append(torch.empty(shape, dtype=dtype, device=device))
            self.known.add(self.beside[-1].untyped_storage().data_ptr())
            return self.beside[-1]
        # not a view: autograd treats a write to one view as a change of all
        x = torch.empty(0, dtype=dtype, device=device)
        return x.set_(self.buffer.untyped_storage(), begin // dtype.itemsize, torch.Size(shape))

    def save(self, x: Tensor) -> Tensor:
        """x without its gradient, which would keep it alive; a copy where x would be overwritten."""
        x = x.detach()
        if x.is_nested:  # autograd saves an NJT only for its shape
            return x
        if x.untyped_storage().data_ptr() in self.known or x.device != self.buffer.device:
            return x
        return self.empty(x.shape, x.dtype, x.device).copy_(x)


class BackwardPart(NamedTuple):
    """One backward graph of a segment: from `block` (None: the start) to where the next one begins."""

    block: Block | None
    gradients: dict[Tensor, Tensor]  # the weights read there, and the memory of their gradients
    span: int  # of the optimizer's


class Segment:
    """A part of the model for fixed sizes, with its forward and backward parts: graphs, or plain calls on a CPU.

    run: reads and writes tensors at fixed addresses. For an input that needs a gradient it calls `leaf(tensor,
    gradient)`, where gradient is the memory to write it to; with `adds` it is added there. It returns its `Outputs`.
    parts: the backward parts, in the order of the forward.
    shared: weights that other segments may read too, with the memory to which their gradients are added.
    pool: memory for what the forward saves; None where the backward follows directly.
    """

    def __init__(
        self,
        run: Callable[[Leaf], Outputs],
        parts: Sequence[BackwardPart],
        shared: dict[Tensor, Tensor],
        pool: SavedPool | None,
    ):
        self.run, self.parts, self.shared, self.pool = run, parts, shared, pool
        self.steps = self._calls()

    def _calls(self) -> list[Callable[[], None]]:
        return [self._forward, *(self._backward for _ in self.parts)]

    def capture(self, graph_pool: Any, stream: torch.cuda.Stream) -> bool:
        """Captures the segment as graphs with memory of graph_pool. `run` must have run in this process before.

        stream: a stream that no thread uses for anything else, because all work on it is captured.
        Returns False where the SavedPool is too small, see `used`: what did not fit would be overwritten by other
        graphs. Then call this again with a larger pool.
        """
        steps = []  # the old graphs stay until then: torch accepts no pool without graphs
        for call in self._calls():
            graph = torch.cuda.CUDAGraph()
            # "relaxed": sizes may need a kernel that is loaded only now, and another thread may be saving a checkpoint.
            # The outer stream: where ending a capture fails, `torch.cuda.graph` leaves its own stream current (2.11,
            # 2.13); to be removed when its `__exit__` has a finally
            capturing = torch.cuda.graph(graph, pool=graph_pool, stream=stream, capture_error_mode="relaxed")
            with torch.cuda.stream(torch.cuda.current_stream()), capturing:
                call()
            steps.append(graph.replay)
        self.steps = steps
        self._release()
        return not (self.pool and self.pool.beside)

    def _release(self) -> None:
        """Drops the references to what the forward saved: other segments use that memory too."""
        del self.outputs, self.cuts, self.destinations

    def try_out(self, stream: torch.cuda.Stream) -> None:
        """Runs the segment once on the capture stream: compiles and loads its kernels and measures what it saves."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(trial=True)
            for backward in self.steps[1:]:
                backward()
            self._release()
            if self.pool:
                self.pool.beside.clear()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # memory beside the pool is not used again

    def _saving(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.pool:
            self.pool.begin()
            stack.enter_context(save_in(self.pool))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.pool.save, lambda x: x))
        return stack

    def _forward(self, trial: bool = False) -> None:
        """trial: gradients of inputs from other segments are written to copies, not to their memory."""
        self.destinations = [Destinations(part.gradients) for part in self.parts]
        # between backward parts: the outputs of the blocks before the cut, and the leaves that replace them
        self.cuts: list[list[tuple[Tensor, Tensor]]] = []

        def leaf(x: Tensor, gradient: Tensor, adds: bool = False) -> Tensor:
            x = x.detach().requires_grad_()
            self.destinations[len(self.cuts)].add(x, gradient.clone() if trial else gradient, adds)
            return x

        def cut(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            flat, spec = pytree.tree_flatten(inputs)
            found = {i: x for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad}
            leaves = {i: x.detach().requires_grad_() for i, x in found.items()}
            self.cuts.append([(x, leaves[i]) for i, x in found.items()])
            switch_to(self.destinations[len(self.cuts)])
            return pytree.tree_unflatten([leaves.get(i, x) for i, x in enumerate(flat)], spec)

        hooks = [part.block.register_forward_pre_hook(cut) for part in self.parts[1:]]
        try:
            with torch.enable_grad(), writing_to(self.destinations[0]), self._saving():
                self.outputs = self.run(leaf)
        finally:
            for hook in hooks:
                hook.remove()

    def _backward(self) -> None:
        """Runs the backward of the last part that has not run."""
        outputs, doutputs = zip(*self.outputs)
        i = len(self.cuts)
        destinations, cut = self.destinations[i], self.cuts.pop() if self.cuts else []
        wanted = [*destinations.by_tensor, *self.shared, *(leaf for _, leaf in cut)]
        gradients = dict(zip(wanted, torch.autograd.grad(outputs, wanted, doutputs, allow_unused=True)))
        self.outputs = [(x, gradients[leaf]) for x, leaf in cut if gradients[leaf] is not None]
        settle(destinations, gradients, self.shared)

    def forward(self) -> None:
        self.steps[0]()

    def backward(self, finished: Callable[[int], None] = lambda span: None) -> None:
        """Runs all backward parts. finished: called with the span of each part after its launch."""
        for part, backward in zip(reversed(self.parts), self.steps[1:]):
            backward()
            finished(part.span)
