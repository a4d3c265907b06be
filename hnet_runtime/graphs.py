"""CUDA graphs of the stacks of blocks: a step's thousands of launches become a few, which a CPU can keep up with.

A graph holds fixed sizes and addresses. So a stack's input is copied into a buffer of one of a few sizes, filled up
with a document of zeros that nobody reads, and its weights, which FSDP gathers anew in every step, into another.

Legend: T tokens, B documents, M the longest document's tokens; "padded" where they are rounded up.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hnet_trainable import HNetLM, Isotropic, Packing, rotary_tables

TOKENS = 512  # T is rounded up to a multiple of this
SPARE = 16  # a graph also serves down to 1 - 1 / SPARE of its tokens (or TOKENS fewer): a capture takes a second
DOCUMENTS, LONGEST = 64, 1024  # the least room for documents and for a document; more is a power of two
KEPT = 8  # graphs of a stack: the sizes last used


class Sizes(NamedTuple):
    """What a graph is captured for."""

    T: int
    B: int
    M: int

    @classmethod
    def of(cls, x_TD: Tensor, packing: Packing) -> "Sizes":
        """What a batch needs: with one document more, of zeros."""
        return cls(len(x_TD), len(packing.cu_seqlens), len(packing.cos_MR))

    def rounded(self) -> "Sizes":
        B, M = (1 << (max(size, least) - 1).bit_length() for size, least in ((self.B, DOCUMENTS), (self.M, LONGEST)))
        return Sizes(-(-self.T // TOKENS) * TOKENS, B, M)

    def hold(self, needed: "Sizes") -> bool:
        """Whether a graph of these sizes serves a batch, without wasting much and with M for the document of zeros."""
        spare = max(TOKENS, self.T // SPARE)
        enough = self.B >= needed.B and self.M >= needed.M
        return enough and 0 <= self.T - needed.T <= min(spare, self.M)


class Captured:
    """A stack's forward and backward for one choice of sizes, each a graph or, on a CPU, the calls themselves."""

    def __init__(self, stack: "GraphedStack", x_TD: Tensor, packing: Packing, sizes: Sizes):
        device, self.stack = x_TD.device, stack
        self.x_TD = torch.zeros(sizes.T, x_TD.shape[1], dtype=x_TD.dtype, device=device, requires_grad=True)
        self.cu_seqlens = torch.full((sizes.B + 1,), sizes.T, dtype=torch.int32, device=device)
        self.cu_seqlens[0] = 0
        self.position_T = torch.arange(sizes.T, dtype=torch.int32, device=device)
        self.from_zero_T = self.position_T.clone()
        tables = rotary_tables(sizes.M, stack.rotary_dim, packing.cos_MR.dtype, device)
        self.packing = Packing(self.cu_seqlens, self.position_T, *tables)
        self.forward_graph = self.backward_graph = None
        if device.type != "cuda":
            return
        self._fill(x_TD, packing)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles and loads whatever has not run yet
            self._forward()
            self.dout_TD = torch.zeros_like(self.out_TD)
            self._backward()
        torch.cuda.current_stream().wait_stream(aside)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, pool=stack.pool):
            self._forward()
        with torch.cuda.graph(self.backward_graph, pool=stack.pool):
            self._backward()

    def _forward(self) -> None:
        with torch.enable_grad():
            self.with_grad_TD = self.stack.run(self.x_TD, self.packing)
        self.out_TD = self.with_grad_TD.detach()

    def _backward(self) -> None:
        inputs = [self.x_TD, *self.stack.weights]
        self.dx_TD, *gradients = torch.autograd.grad(self.with_grad_TD, inputs, self.dout_TD)
        torch._foreach_copy_(self.stack.gradients, gradients)
        del self.with_grad_TD  # and with it, what the forward saved

    def _fill(self, x_TD: Tensor, packing: Packing) -> None:
        T, B = len(x_TD), len(packing.cu_seqlens) - 1
        self.x_TD.detach()[:T].copy_(x_TD)
        self.x_TD.detach()[T:].zero_()
        self.cu_seqlens[: B + 1].copy_(packing.cu_seqlens)
        self.cu_seqlens[B + 1 :].fill_(len(self.x_TD))
        self.position_T[:T].copy_(packing.position_T)
        self.position_T[T:].copy_(self.from_zero_T[: len(self.x_TD) - T])

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        self._fill(x_TD, packing)
        if self.forward_graph:
            self.forward_graph.replay()
        else:
            self._forward()
        return self.out_TD[: len(x_TD)]

    def backward(self, dout_TD: Tensor) -> Tensor:
        T = len(dout_TD)
        if self.backward_graph:
            self.dout_TD[:T].copy_(dout_TD)
            self.dout_TD[T:].zero_()
            self.backward_graph.replay()
        else:
            self.dout_TD = torch.cat([dout_TD, dout_TD.new_zeros(len(self.x_TD) - T, dout_TD.shape[1])])
            self._backward()
        return self.dx_TD[:T]


class _Replay(torch.autograd.Function):
    """x_TD and the weights -> out_TD. Gradients: of all of them."""

    @staticmethod
    def forward(ctx, captured: Captured, packing: Packing, x_TD: Tensor, *weights: Tensor) -> Tensor:
        ctx.captured = captured
        torch._foreach_copy_(captured.stack.weights, weights)
        return captured.forward(x_TD, packing).detach()

    @staticmethod
    def backward(ctx, dout_TD: Tensor):
        dx_TD = ctx.captured.backward(dout_TD)
        # autograd keeps what it is handed. FSDP turns 16-bit gradients into float32 ones at once; float32 ones may stay
        # as they are for another micro-batch, while the next replay writes here.
        gradients = (g.clone() if g.dtype == torch.float32 else g.detach() for g in ctx.captured.stack.gradients)
        return None, None, dx_TD.detach(), *gradients


class GraphedStack:
    """Takes the place of an Isotropic's forward; captures on the first call of each size."""

    def __init__(self, stack: Isotropic):
        self.eager, self.rotary_dim = stack.forward, stack.rotary_dim
        # the same blocks without the stack itself, so that a call runs none of the hooks that FSDP has put there
        self.bare = nn.Module()
        self.bare.layers, self.bare.rmsnorm = stack.layers, stack.rmsnorm
        self.bare.forward = lambda x_TD, packing: Isotropic.forward(self.bare, x_TD, packing)
        places = [(name.rpartition("."), name) for name, _ in self.bare.named_parameters()]
        self.places = {name: (self.bare.get_submodule(path), leaf) for (path, _, leaf), name in places}
        self.captured: OrderedDict[Sizes, Captured] = OrderedDict()
        self.weights = self.gradients = self.pool = None

    def run(self, x_TD: Tensor, packing: Packing) -> Tensor:
        return functional_call(self.bare, dict(zip(self.places, self.weights)), (x_TD, packing))

    def __call__(self, x_TD: Tensor, packing: Packing) -> Tensor:
        if not torch.is_grad_enabled():
            return self.eager(x_TD, packing)
        weights = [module._parameters[leaf] for module, leaf in self.places.values()]
        if self.weights is None:
            self.weights = [w.detach().clone().requires_grad_() for w in weights]
            self.gradients = [torch.empty_like(w) for w in self.weights]
            self.pool = torch.cuda.graph_pool_handle() if x_TD.is_cuda else None
        needed = Sizes.of(x_TD, packing)
        sizes = min((sizes for sizes in self.captured if sizes.hold(needed)), default=needed.rounded())
        if sizes not in self.captured:
            if len(self.captured) == KEPT:
                self.captured.popitem(last=False)
            self.captured[sizes] = Captured(self, x_TD, packing, sizes)
        self.captured.move_to_end(sizes)
        return _Replay.apply(self.captured[sizes], packing, x_TD, *weights)


def graph_stacks(model: HNetLM) -> None:
    """Run the training steps of every stack of blocks as CUDA graphs. Call it after `compile_blocks`, if at all.

    Needs one FSDP group a stack, as `shard_model` makes for a process alone: graphs have no place for hooks inside.
    """
    for module in model.modules():
        if isinstance(module, Isotropic):
            module.forward = GraphedStack(module)
