"""A part of a model as CUDA graphs: one for its forward, and one or several for its backward.

All graphs share their memory, as one runs after the other, but for what a forward saves for its backward: that is in a
`SavedPool`. On a CPU the same path runs without capture.
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
    """Whether it says that a GPU's memory is full: that which torch gives out or, as for graphs, the driver."""
    if isinstance(error, torch.AcceleratorError):
        return "out of memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError)


Outputs = Sequence[tuple[Tensor, Tensor]]  # each with where its gradient will be
Leaf = Callable[..., Tensor]  # (tensor, memory of its gradient, adds=False)


class SavedPool:
    """What forwards of a part save for their backwards, from the start of a buffer on: that of the one that ran last.

    So all else that they and the backwards need meanwhile can be shared with those of other parts. It can go when torch
    lets one capture allocate from two pools (proposed in github.com/pytorch/pytorch/pull/187929).
    static: where (`data_ptr` of storages) tensors are that need no copy, as nothing writes to them meanwhile.
    """

    ALIGNED = 512  # bytes, as torch's allocator has it

    def __init__(self, static: Collection[int], device: torch.device):
        self.static, self.buffer = static, torch.empty(0, dtype=torch.uint8, device=device)
        self.begin()

    def begin(self) -> None:
        self.used = 0  # bytes
        self.beside: list[Tensor] = []  # what does not fit. In graphs there must be none: others write there
        self.known = {*self.static, self.buffer.untyped_storage().data_ptr()}

    def grow(self, need: float) -> None:
        """Another buffer, with room for so many bytes, in whole MiB."""
        self.buffer = self.buffer[:0].clone()  # this one's memory goes first
        if self.buffer.is_cuda:
            torch.cuda.empty_cache()  # else a hole is left, into which the new one does not fit
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

    def save(self, x: Tensor) -> Tensor:
        """x, or a copy of it where it would be overwritten; without its gradient, which would keep it alive."""
        x = x.detach()
        if x.is_nested:  # autograd saves an NJT for its shape alone
            return x
        if x.untyped_storage().data_ptr() in self.known or x.device != self.buffer.device:
            return x
        return self.empty(x.shape, x.dtype, x.device).copy_(x)


class BackwardPart(NamedTuple):
    """One backward graph of a segment: from `block` (None: the start) to where the next one begins."""

    block: Block | None
    gradients: dict[Tensor, Tensor]  # the weights that are read there, and where their gradients go
    span: int  # of the optimizer's


class Segment:
    """A part of the model for fixed sizes: its forward, and its backward parts; graphs, on a CPU plain calls.

    run: reads and writes tensors at fixed addresses. For those whose gradient is wanted it takes `leaf(tensor,
    gradient)`, which names the place for that, or with `adds` where it is added up; it returns its `Outputs`.
    parts: its backward parts, in the order of the forward.
    shared: weights that other segments may read as well, with where their gradients are added up.
    pool: for what the forward saves; None where nothing else runs before the backward.
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
        """Makes graphs of it, whose memory is graph_pool's. All that `run` calls has run in this process before.

        stream: on which nothing else runs, in no thread, as all of that would be captured.
        False: its SavedPool is too small, see `used`. What did not fit is in memory that graphs captured before would
        overwrite; so this must be called again with a larger one.
        """
        steps = []  # former graphs stay until there are new ones: torch takes no pool that all have left
        for call in self._calls():
            graph = torch.cuda.CUDAGraph()
            # "relaxed": a kernel that sizes like these are the first to call may be loaded meanwhile, and another
            # thread may be saving a checkpoint. The outer stream: where a capture cannot be ended, `torch.cuda.graph`
            # leaves its own the current one (2.11, 2.13); to go when its `__exit__` has a finally
            capturing = torch.cuda.graph(graph, pool=graph_pool, stream=stream, capture_error_mode="relaxed")
            with torch.cuda.stream(torch.cuda.current_stream()), capturing:
                call()
            steps.append(graph.replay)
        self.steps = steps
        self._let_go()
        return not (self.pool and self.pool.beside)

    def _let_go(self) -> None:
        """Of what the forward saved: others use that memory too."""
        del self.outputs, self.cuts, self.destinations

    def try_out(self, stream: torch.cuda.Stream) -> None:
        """Compiles and loads what the segment calls, on another stream as captures want it, and finds what it saves."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(trial=True)
            for backward in self.steps[1:]:
                backward()
            self._let_go()
            if self.pool:
                self.pool.beside.clear()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # what is beside the pool is of no use to it

    def _saving(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.pool:
            self.pool.begin()
            stack.enter_context(save_in(self.pool))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.pool.save, lambda x: x))
        return stack

    def _forward(self, trial: bool = False) -> None:
        """trial: gradients of what comes from other segments go nowhere, so that theirs stay."""
        self.destinations = [Destinations(part.gradients) for part in self.parts]
        # where one backward part ends and the next begins: outputs of the blocks before, and the leaves in their place
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
        """Of the last part that is left."""
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
        """finished: told the span of each part whose gradients have been launched."""
        for part, backward in zip(reversed(self.parts), self.steps[1:]):
            backward()
            finished(part.span)
