"""Training steps as CUDA graphs: a few launches replace thousands, so that the CPU is no longer the limit.

A step waits for the device once per stage, for the number of chunks, which decides the sizes of tensors. There the
model is cut into parts:

    enter 0 | pass 0 | enter 1 | pass 1 | inner | leave 1 | leave 0, with the loss

`pass` computes a stage's residual connection, which does not depend on the number of chunks. The device runs it while
the host reads that number and launches the next part. In the backward it comes after `leave`.

Each part is a `Segment` for fixed sizes: one graph for its forward and one for its backward. A graph has fixed sizes
and addresses. So the documents of an inner stage are padded to one of a few sizes by a document of zeros that affects
no output, statistic or gradient. Unused rows are empty documents. Values that go from one part to another are stored in
`StageBuffers`, for all sizes, and so are their gradients; a `Packing` has the documents of a stage. Everything is flat.
A segment reads weights in the compute dtype, which the optimizer writes from the float32 master weights, and writes
each weight's gradient to where the optimizer reads it.

All graphs share their memory, except for what forwards save for their backwards: see segments.py.

Where several processes reduce their gradients, the backward of a part with many weights is several graphs. The
gradients of the first are reduced while the next compute.

Legend: T tokens, C chunks (the T of the stage inside), B documents, M tokens of the longest document; all with padding,
but B without the document of zeros. D channels, s a stage.
"""

import collections
import contextlib
import copy
import functools
import gc
import importlib.util
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hnet_kernels import Chunks, cards, cross_entropy, cut, take_rows
from hnet_kernels.conv import MAX_TAPS
from hnet_kernels.dispatch import forcing, requested
from hnet_kernels.gradients import Destinations, settle, writing_to
from hnet_kernels.recompute import recomputing
from hnet_routers import check_cuts, inner_cuts
from hnet_runtime import UserError
from hnet_runtime.distributed import PLAIN_FLOAT32, Fetched, World
from hnet_runtime.steps.flat_adamw import FlatAdamW, MakeOptimizer, ParameterSpan, adamw
from hnet_runtime.steps.plain import Losses, check_losses
from hnet_runtime.steps.segments import BackwardPart, Leaf, Outputs, SavedPool, Segment, memory_ran_out
from hnet_trainable import (
    Block,
    Documents,
    HNet,
    HNetConfig,
    HNetLM,
    Isotropic,
    Packing,
    StageOutput,
    positions,
    rotary_tables,
    training_loss,
)

logger = logging.getLogger("hnet")
Returned = TypeVar("Returned")

# an inner T is rounded up to a multiple of TOKENS, and to one of SIZES_PER_OCTAVE sizes between powers of two. In the
# first EARLY_STEPS of a run, where the routers' shares change from step to step, there are EARLY_SIZES_PER_OCTAVE: a
# tenth more computation, but a third of the captures
TOKENS, SIZES_PER_OCTAVE = 128, 32
EARLY_STEPS, EARLY_SIZES_PER_OCTAVE = 100, 4
DOCUMENTS, LONGEST = 16, 1024  # smallest B, and M, of a segment; larger ones are powers of two
CACHED = 32  # segments per part: those of the sizes used last
# with several processes, a backward part ends before the block that follows this many weights, 1 GiB in float32
WEIGHTS_PER_PART = 1 << 28
FREE_SHARE = 8  # 1 / FREE_SHARE of a GPU's memory stays free for validation, samples and saving


def why_unsupported(config: HNetConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why steps of this model in this compute dtype cannot run as graphs on a device; None where they can.

    On a GPU each operation needs a fast kernel: some definitions wait for the device, which ends a capture.
    """
    if device.type != "cuda":
        return None
    if requested() == "reference":
        return "HNET_KERNELS=reference forbids the kernels they need"
    if dtype != torch.bfloat16:
        return f"on a GPU they compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if reason := cards.why_unsupported(device):
        return f"{torch.cuda.get_device_name(device)} has {reason}"
    if config.ssm_cfg.d_state not in (16, 32, 64, 128) or config.ssm_cfg.d_conv > MAX_TAPS:
        return "ssm_cfg has sizes for which there is no kernel"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def frozen(model: HNetLM | HNetConfig) -> str | None:
    """Why a GraphedModel cannot train this model: it updates all weights, and one needs no gradient. Else None.

    Fast implementations write the gradients of all weights, and FlatAdamW decays all of them.
    """
    if isinstance(model, HNetConfig):
        with torch.device("meta"):
            model = HNetLM(model)
    name = next((name for name, p in model.named_parameters() if not p.requires_grad), None)
    return name and f"{name} needs no gradient (requires_grad), and steps as graphs update every weight"


def _stays_float32(name: str) -> bool:
    """Whether the model computes with the float32 weight of this name."""
    return name.rpartition(".")[2] in PLAIN_FLOAT32 or "residual_proj" in name


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _increment(T: int, per_octave: int = SIZES_PER_OCTAVE) -> int:
    """Sizes of inner stages near T are rounded up to a multiple of this. The document of zeros has fewer tokens."""
    return max(TOKENS, _power(T) // (2 * per_octave))


def _padded(T: int, per_octave: int = SIZES_PER_OCTAVE) -> int:
    """The padded size of an inner stage with T tokens."""
    return -(-T // _increment(T, per_octave)) * _increment(T, per_octave)


def _weights(module: nn.Module | nn.Parameter | None) -> list[nn.Parameter]:
    if module is None:
        return []
    return list(module.parameters()) if isinstance(module, nn.Module) else [module]


class Sizes(NamedTuple):
    """The sizes for which a segment is captured."""

    T: int
    B: int
    M: int


class StageBuffers:
    """The values that segments of stage s pass to each other, for at most T tokens and C chunks.

    The stage inside takes the rows of `x_TD` and `p_T` at `start_C`. An entry of start_C without a chunk is the size of
    stage s: the index of a row of zeros behind its tokens. Names with a leading d are gradients.
    """

    def __init__(self, T: int, C: int, D: int, dtype: torch.dtype, shares: Tensor, inner: Packing):
        """shares: where F and G are written. inner: the documents of the stage inside."""
        device = shares.device
        wide = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        self.x_TD, self.dx_TD = (torch.zeros(T + 1, D, dtype=dtype, device=device) for _ in "xd")  # after the encoder
        p_T, self.dp_T = (torch.zeros(T + 1, **wide) for _ in "pd")
        self.residual_TD, self.dresidual_TD = (torch.zeros(T, D, **wide) for _ in "rd")
        self.z_CD, self.dz_CD = (torch.zeros(C, D, **wide) for _ in "zd")  # the result of the stage inside, smoothed
        self.chunks = Chunks(
            p_T,
            torch.zeros(T, dtype=torch.bool, device=device),
            *(torch.zeros(n, dtype=torch.int64, device=device) for n in (T, C)),
            inner.cu_seqlens,
            inner.position_T,
            torch.zeros(2, dtype=torch.int64, device=device),
            shares,
        )

    def of(self, T: int, C: int, B: int) -> Chunks:
        """The chunks of T tokens, C of them with padding, in B documents."""
        all_ = self.chunks
        tokens = {"p_T": all_.p_T[: T + 1], "b_T": all_.b_T[:T], "chunk_T": all_.chunk_T[:T]}
        return all_._replace(
            **tokens, start_C=all_.start_C[:C], cu_seqlens=all_.cu_seqlens[: B + 1], position_C=all_.position_C[:C]
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.chunks, *(x for x in vars(self).values() if isinstance(x, Tensor))]


class CopyTo(torch.autograd.Function):
    """Copies x to a fixed address, from which the forward continues."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, to_TD: Tensor) -> Tensor:
        return to_TD.copy_(x_TD)

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        return dx_TD, None


class GraphedModel:
    """Runs the training steps of an unsharded HNetLM as graphs.

    masters: the HNetLM with the float32 master weights. Gradients are written to their `grad`.
    alpha: the weight of the ratio losses. Graphs read a tensor's value at each step, and capture that of a float. The
        same holds for the model's `ratio_targets`.
    world: several processes have replicas of the weights. Gradients are averaged over them, those of a backward part
        while the next part runs. Each process updates one shard of the weights: see FlatAdamW.
    groups: parameter groups of the optimizer, by default one.
    make_optimizer: from groups, an optimizer. FlatAdamW takes the place of AdamW, and runs any other, in one process.
    ac: activation checkpointing, see hnet_kernels/recompute.py.
    accumulates: whether a step may have several micro-batches.
    captures: if False, each step runs the model's own forward eagerly. Weights and gradients are as described here, but
        the model is not divided into parts, and the caller sets up activation checkpointing.

    `model` is a copy of the masters with the weights in the compute dtype. The graphs capture its modules; it also
    evaluates and generates. `optimizer` updates the master weights and the compute weights. Everything else reads and
    changes master weights inside `optimizer.full_precision()`. `captured` is the number of segments captured so far;
    `capture_seconds` is their time, some tens of milliseconds each.

    Gradients of bfloat16 weights are float32 where they are added over processes or micro-batches. Otherwise they are
    bfloat16, rounded once at the end of their matrix product.
    """

    def __init__(
        self,
        masters: HNetLM,
        compute_dtype: torch.dtype,
        alpha: float | Tensor,
        world: World | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        ac: str = "none",
        accumulates: bool = False,
        captures: bool = True,
        make_optimizer: MakeOptimizer = adamw,
    ):
        config: HNetConfig = masters.config
        self.masters, self.alpha, self.S = masters, alpha, config.num_stages
        self.size, self.accumulates = world.size if world else 1, accumulates
        self.dtype, self.device = compute_dtype, next(masters.parameters()).device
        self.captures, self.found_stages = captures, None
        if captures and (reason := why_unsupported(config, self.device, compute_dtype)):
            raise ValueError(f"steps as graphs: {reason}")
        if reason := frozen(masters):
            raise ValueError(f"GraphedModel: {reason}; use PlainModel")
        parameters, compute_weights = dict(masters.named_parameters()), []  # pairs (compute weight, master weight)
        computed: dict[int, Any] = {id(x): x for x in (config, *masters.buffers())}  # buffers are shared
        for name, p in parameters.items():
            computed[id(p)] = p
            if not _stays_float32(name) and p.dtype != compute_dtype:
                computed[id(p)] = nn.Parameter(p.detach().to(compute_dtype), p.requires_grad)
                compute_weights.append((computed[id(p)], p))
        self.model: HNetLM = copy.deepcopy(masters, computed)
        self.levels: list[HNet] = [self.model.backbone]
        for _ in range(self.S):
            self.levels.append(self.levels[-1].main_network)
        names = {p: name for name, p in self.model.named_parameters()}
        modules = self._modules()
        uses = collections.Counter(p for found in modules.values() for module in found for p in _weights(module))
        self.shared = [name for p, name in names.items() if uses[p] != 1]  # any part may read these
        spans = itertools.count() if self.size > 1 else itertools.repeat(0)
        # of each part, in the order of the forward: (first block, names of weights, span of the optimizer)
        self.backward_parts = {
            part: [
                (block, [names[p] for p in weights if uses[p] == 1], next(spans))
                for block, weights in self._split_backward(found)
            ]
            for part, found in modules.items()
        }
        everything = {"params": list(parameters.values())}
        made = make_optimizer(groups or [everything])
        rule = None if FlatAdamW.replaces(made) else made
        if rule and self.size > 1:
            raise UserError(
                f"make_optimizer: {type(rule).__name__} with these options runs as graphs with one process alone; use "
                "--compile eager without --replicate"
            )
        spans, rank = self._spans(parameters), world.rank if world else 0
        is_narrow = self.size == 1 and not accumulates and compute_dtype == torch.bfloat16 and not rule
        self.optimizer = FlatAdamW(
            made.param_groups, spans, compute_weights=compute_weights, rank=rank, narrow=[0] * is_narrow, rule=rule
        )
        own = [name for name in parameters if name not in self.shared]
        self.all_gradients = self._gradients(own), self._gradients(self.shared)
        # sums of micro-batches' gradients; allocated now, so that graphs do not take the memory
        self.sums = [torch.zeros_like(gradient) for gradient in self.optimizer.gradients] if accumulates else []
        # a stream for captures alone: torch's capture stream is one of the 32 that it gives to everyone (see
        # github.com/pytorch/pytorch/blob/main/c10/cuda/CUDAStream.h)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.ac = ac
        wide = {"dtype": torch.promote_types(compute_dtype, torch.float32), "device": self.device}
        self.losses, self.dlosses = torch.zeros(2, 1 + 3 * self.S, **wide)  # ce, ratio losses, F, G
        self.share, self.dloss = 0.0, torch.zeros((), **wide)
        self.saved: dict[str, tuple[int, int]] = {}  # per part, of its largest segment: (bytes saved, tokens)
        self.captured, self.capture_seconds = 0, 0.0
        self.capacity = 0  # the most bytes of a micro-batch for which memory is allocated
        self.sizes_per_octave = SIZES_PER_OCTAVE
        self.segments: dict[str, OrderedDict[Sizes, Segment]] = {}
        self.forget()

    def _modules(self) -> dict[str, list[nn.Module | nn.Parameter | None]]:
        """The modules of each part, in the order of the forward. One with another name may be read by any part."""
        found: dict[str, list[Any]] = {}
        for s, hnet in enumerate(self.levels):
            if s == self.S:
                found[f"inner {s}"] = [hnet.pad_dimension, hnet.main_network]
            else:
                found[f"enter {s}"] = [hnet.pad_dimension, getattr(hnet, "encoder", None), hnet.routing_module]
        for s in reversed(range(self.S)):
            found[f"pass {s}"] = [self.levels[s].residual_proj]
            found[f"leave {s}"] = [getattr(self.levels[s], "decoder", None)]
        first, last = next(iter(found)), list(found)[-1]
        found[first].insert(0, getattr(self.model, "embeddings", None))
        found[last].append(getattr(self.model, "lm_head", None))
        return found

    def _split_backward(
        self, modules: Sequence[nn.Module | nn.Parameter | None]
    ) -> list[tuple[Block | None, list[Tensor]]]:
        """The backward parts of a part with these modules: (first block, or None for the start; weights)."""
        parts: list[tuple[Block | None, list[Tensor]]] = [(None, [])]
        for module in modules:
            for one in [*module.layers, module.rmsnorm] if isinstance(module, Isotropic) else [module]:
                many = sum(p.numel() for p in parts[-1][1]) >= WEIGHTS_PER_PART
                if self.size > 1 and many and isinstance(one, Block):
                    parts.append((one, []))
                parts[-1][1].extend(_weights(one))
        return parts

    def _spans(self, parameters: dict[str, nn.Parameter]) -> list[ParameterSpan]:
        """The order of parameters in the optimizer's memory.

        With several processes there is a span for each backward part, sharded over them. The last span has the few
        weights that stay float32, which the forward reads directly.
        """
        small = [p for name, p in parameters.items() if _stays_float32(name)]
        others = [p for name, p in parameters.items() if name in self.shared and not _stays_float32(name)]
        if self.size == 1:
            spans: list[ParameterSpan] = [[[p for name, p in parameters.items() if not _stays_float32(name)]]]
        else:
            spans = []
            for _, names, _ in itertools.chain.from_iterable(self.backward_parts.values()):
                parts: list[list[nn.Parameter]] = [[] for _ in range(self.size)]
                large = [parameters[name] for name in names if not _stays_float32(name)]
                for p in sorted(large, key=torch.numel, reverse=True):
                    min(parts, key=lambda part: sum(map(torch.numel, part))).append(p)
                spans.append(parts)
            if others:  # their gradients are complete after the first part's first blocks
                spans[0][0] += others
        return [*spans, [small]] if small else spans

    def forget(self) -> None:
        """Frees all graphs and their memory; the next steps capture new ones."""
        had_graphs = any(self.segments.values())
        if had_graphs and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # no graph is running
        self.segments = {part: OrderedDict() for part in self.backward_parts}
        self.pools: dict[str, SavedPool] = {}
        # What a part's forward saves is not needed when another segment of the part runs, so its segments share a
        # SavedPool. All other memory is needed only while one graph runs, so all graphs share a memory pool. The last
        # part's backward follows its forward directly. The pool is new because torch accepts no pool without graphs.
        self.graph_pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.most_B, self.most_M = DOCUMENTS, [LONGEST] * (self.S + 1)
        if had_graphs:  # a collection takes a tenth of a second, and a start comes here several times
            self._return_memory()

    def _return_memory(self) -> None:
        """Gives memory that nothing uses back to the GPU."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def free_memory(self) -> None:
        """Frees all graphs if they leave too little GPU memory for validation, samples and saving.

        Early in training a router may have needed far larger graphs than now.
        """
        if self.device.type == "cuda":
            free, everything = cards.memory(self.device)
            if free < everything // FREE_SHARE:
                self.forget()

    def full_precision(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the masters have their weights in float32, which may be read and changed."""
        return self.optimizer.full_precision()

    def begin_step(self, done: int, seed: int = 0) -> None:
        """Chooses few sizes of segments early in a run, many later. done: steps so far. seed: as for `PlainModel`."""
        self.sizes_per_octave = EARLY_SIZES_PER_OCTAVE if done < EARLY_STEPS else SIZES_PER_OCTAVE
        if not self.captures:
            torch.manual_seed(seed)

    def finish_step(self) -> None:
        """Gives the masters the buffers that a forward has replaced. Gradients stay: each step overwrites them all."""
        if not self.captures:
            for masters, computed in zip(self.masters.modules(), self.model.modules(), strict=True):
                masters._buffers.update(computed._buffers)

    def retry_without_graphs(self, call: Callable[[], Returned]) -> Returned:
        """The result of `call`. If it runs out of GPU memory, frees all graphs and calls it a second time."""
        try:
            return call()
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if not memory_ran_out(error):
                raise
        logger.info("the GPU's memory is full: all graphs are freed")  # here, where the exception holds no memory
        self.forget()
        self._return_memory()
        return call()

    def _allocate(self, T: int) -> None:
        """Allocates the tensors that segments read and write, for micro-batches of at most T bytes."""
        self.capacity = 0
        self.forget()
        documents, wide = _power(max(T, DOCUMENTS)), self.losses.dtype
        self.iids_T, self.labels_T = torch.zeros(2, T, dtype=torch.int64, device=self.device)
        sizes = [T]
        while len(sizes) <= self.S:
            sizes.append(_padded(sizes[-1]))
        takes_cuts = bool(self.masters.config.stages_by_cuts)
        self.packings: list[Packing] = []
        for hnet, n in zip(self.levels, sizes):
            cuts_T = torch.zeros(n + 1, dtype=torch.int8, device=self.device) if takes_cuts else None
            ends, position_T = (torch.zeros(m, dtype=torch.int32, device=self.device) for m in (documents + 2, n))
            tables = rotary_tables(_power(max(n, LONGEST)), hnet.rotary_dim, wide, self.device)
            self.packings.append(Packing(ends, position_T, *tables, None if self.packings else self.iids_T, cuts_T))
        shares_S2 = self.losses[1 + self.S :].view(2, -1).T
        self.buffers = [
            StageBuffers(sizes[s], sizes[s + 1], D, self.dtype, shares_S2[s], self.packings[s + 1])
            for s, D in enumerate(self.masters.config.d_model[:-1])
        ]
        static = [*self.model.parameters(), *self.optimizer.weights, *self.optimizer.compute_weights]
        static += [self.iids_T, self.labels_T, self.losses, *(x for at in self.buffers for x in at.tensors)]
        static += [x for packing in self.packings for x in vars(packing).values() if isinstance(x, Tensor)]
        self.static = frozenset(x.untyped_storage().data_ptr() for x in static if x is not None)
        self.capacity = len(self.iids_T)

    # --------------------------------------------------------------------------------------- what each segment computes

    def _packing(self, s: int, sizes: Sizes) -> Packing:
        """The documents of stage s; the last one of an inner stage is the document of zeros."""
        T, B, M = sizes
        at = self.packings[s]
        byte_T, cuts_T = (x_T if x_T is None else x_T[:T] for x_T in (at.byte_T, at.cuts_T))
        return Packing(
            at.cu_seqlens[: B + 1 + (s > 0)], at.position_T[:T], at.cos_MR[:M], at.sin_MR[:M], byte_T, cuts_T
        )

    def _stage_input(self, s: int, sizes: Sizes, leaf: Leaf) -> Tensor:
        """The input of stage s: bytes, or the tokens of the stage outside that open chunks."""
        T, B, _ = sizes
        if s == 0:
            return self.model.embed(self.iids_T[:T])
        outer = self.buffers[s - 1]
        self.packings[s].cu_seqlens[B + 1].fill_(T)
        if (cuts_T := self.packings[s].cuts_T) is not None:
            cuts_T[:T].copy_(inner_cuts(self.packings[s - 1].cuts_T, outer.chunks.start_C[:T]))
        return take_rows(leaf(outer.x_TD, outer.dx_TD, adds=True), outer.chunks.start_C[:T])

    def _stage_output(self, s: int, x_TD: Tensor, packing: Packing, leaf: Leaf) -> Outputs:
        """The output of stage s: smoothed for the stage outside, or the loss."""
        if s == 0:
            ce = cross_entropy(self.model.head(x_TD), self.labels_T[: len(x_TD)])
            self.losses[0].copy_(ce.detach())
            of_stages = slice(1, 1 + self.S)  # this is the last part, so all ratio losses are known
            ratio_losses = leaf(self.losses[of_stages], self.dlosses[of_stages])
            return [(training_loss(ce, ratio_losses, self.alpha), self.dloss)]
        outer, C = self.buffers[s - 1], len(x_TD)
        p_C = take_rows(leaf(outer.chunks.p_T, outer.dp_T, adds=True), outer.chunks.start_C[:C])
        z_CD = self.levels[s - 1].smooth(x_TD, p_C, packing.cu_seqlens)
        outer.z_CD[:C].copy_(z_CD.detach())
        return [(z_CD, outer.dz_CD[:C])]

    def _enter(self, s: int, sizes: Sizes, leaf: Leaf) -> Outputs:
        hnet, to, T = self.levels[s], self.buffers[s], sizes.T
        packing = self._packing(s, sizes)
        x_TD = hnet.encode(self._stage_input(s, sizes, leaf), packing)
        to.x_TD[T].zero_()
        x_TD = CopyTo.apply(x_TD, to.x_TD[:T])
        p_T = hnet.routing_module(x_TD, packing)
        documents = packing.cu_seqlens[: sizes.B + 1]
        b_T = hnet.routing_module.opens(p_T)
        p_T, G, chunks = cut(p_T, b_T, packing.position_T, documents, to.of(T, _padded(T), sizes.B))
        outputs = [(x_TD, to.dx_TD[:T])]
        if hnet.routing_module.is_learned:  # a rule's p has no gradient, and its ratio loss is 0
            ratio = self.model.ratio_loss(s, StageOutput(p_T, chunks.b_T, chunks.shares[0], G, None))
            self.losses[1 + s].copy_(ratio.detach())
            outputs += [(p_T, to.dp_T[:T]), (ratio, self.dlosses[1 + s])]
        return outputs

    def _inner(self, s: int, sizes: Sizes, leaf: Leaf) -> Outputs:
        packing = self._packing(s, sizes)
        x_TD = self.levels[s].run_innermost(self._stage_input(s, sizes, leaf), packing)
        return self._stage_output(s, x_TD, packing, leaf)

    def _pass(self, s: int, sizes: Sizes, leaf: Leaf) -> Outputs:
        hnet, at, T = self.levels[s], self.buffers[s], sizes.T
        residual_TD = hnet.residual_proj(leaf(at.x_TD[:T], at.dx_TD[:T]))
        at.residual_TD[:T].copy_(residual_TD.detach())
        return [(residual_TD, at.dresidual_TD[:T])]

    def _leave(self, s: int, sizes: Sizes, leaf: Leaf) -> Outputs:
        hnet, at, T, C = self.levels[s], self.buffers[s], sizes.T, _padded(sizes.T)
        chunks, packing = at.of(T, C, sizes.B), self._packing(s, sizes)
        p_T, z_CD = leaf(chunks.p_T[:T], at.dp_T[:T]), leaf(at.z_CD[:C], at.dz_CD[:C])
        residual_TD = leaf(at.residual_TD[:T], at.dresidual_TD[:T])
        spare = _increment(T, EARLY_SIZES_PER_OCTAVE)  # the most that any size adds
        x_TD = hnet.upsample(z_CD, p_T, chunks, residual_TD, self.dtype, spare)
        return self._stage_output(s, hnet.decode(x_TD, packing), packing, leaf)

    # --------------------------------------------------------------------------------------------- capturing segments

    def _sizes(self, s: int, T: int, M: int, outer_T: int | None = None) -> Sizes:
        """The padded sizes of stage s. B and M never shrink, so that most steps find a captured segment.

        outer_T: the padded size of the stage outside, which limits T: its buffers have space for that many chunks.
        """
        if s:
            M = max(M, _increment(T, self.sizes_per_octave))
            T = min(_padded(T, self.sizes_per_octave), _padded(outer_T or self.capacity))
        self.most_M[s] = max(self.most_M[s], _power(M))
        return Sizes(T, self.most_B, self.most_M[s])

    def _segment(self, part: str, sizes: Sizes) -> Segment:
        """The segment of a part for these sizes, captured on first use."""
        segments = self.segments[part]
        if sizes not in segments:
            if len(segments) == CACHED:
                segments.popitem(last=False)
            last = part == list(self.backward_parts)[-1]
            pool = None if last else self.pools.setdefault(part, SavedPool(self.static, self.device))
            segment = self._new_segment(part, sizes, pool)
            if self.device.type == "cuda":
                self._capture(part, sizes, segment)
            segments[sizes] = segment
            self.captured += 1
        segments.move_to_end(sizes)
        return segments[sizes]

    def _new_segment(self, part: str, sizes: Sizes, pool: SavedPool | None) -> Segment:
        """A segment that is not captured yet."""
        kind, s = part.split()
        run = {"enter": self._enter, "pass": self._pass, "inner": self._inner, "leave": self._leave}[kind]
        parts = [BackwardPart(block, self._gradients(names), span) for block, names, span in self.backward_parts[part]]
        run = functools.partial(self._run, functools.partial(run, int(s), sizes))
        return Segment(run, parts, self._gradients(self.shared), pool)

    def _gradients(self, names: Sequence[str]) -> dict[Tensor, Tensor]:
        """The model's weights of these names, each with the memory of its gradient."""
        return {self.model.get_parameter(name): self.masters.get_parameter(name).grad for name in names}

    def _run(self, run: Callable[[Leaf], Outputs], leaf: Leaf) -> Outputs:
        on_cpu = forcing(True) if self.device.type == "cpu" else contextlib.nullcontext()
        with recomputing(self.ac), on_cpu:
            return run(leaf)

    def _capture(self, part: str, sizes: Sizes, segment: Segment) -> None:
        pool = segment.pool
        if part not in self.saved:
            segment.try_out(self.stream)
            self.saved[part] = (pool.used if pool else 0), sizes.T
        began = time.perf_counter()
        used, T = self.saved[part]
        self._grow_pool(part, used * sizes.T / T)
        while not segment.capture(self.graph_pool, self.stream):  # such as when a longer document needs larger tables
            self._grow_pool(part, pool.used)
        self.capture_seconds += time.perf_counter() - began
        if pool and sizes.T >= T:
            self.saved[part] = pool.used, sizes.T

    def _grow_pool(self, part: str, need: float) -> None:
        """Grows a part's pool to at least so many bytes."""
        pool = self.pools.get(part)
        if pool and need > len(pool.buffer):
            torch.cuda.synchronize(self.device)  # no graph that uses the old buffer is running
            self.segments[part].clear()
            pool.grow(need)

    def foresee(self, T: int, documents: int, shares: Sequence[float]) -> None:
        """Runs the segments of a micro-batch of T bytes on the meta device, where nothing is computed or captured.

        `compile_ahead` notes the kernels that they would launch. documents: the most that a micro-batch has.
        shares: F of each chunking stage, the share of its tokens that open a chunk.
        """
        self.most_B = max(self.most_B, _power(documents))
        sizes = [self._sizes(0, T, T)]
        for s, share in enumerate(shares):
            sizes.append(self._sizes(s + 1, max(1, int(share * sizes[-1].T)), LONGEST))
        for part in self.backward_parts:
            segment = self._new_segment(part, sizes[int(part.split()[1])], None)
            segment.forward()
            segment.backward()

    # ---------------------------------------------------------------------------------------------------------- a step

    def forward_backward(self, batches: Sequence[tuple[Tensor, ...]], reduces: bool = True) -> Losses:
        """Losses of the micro-batches; writes the gradient of the mean of ce + alpha * ratio losses to the masters'
        `grad`.

        batches: n times what `HNetLM.forward` takes, (iids, labels) or with cuts; more than one needs `accumulates`.
        reduces: the gradients become the mean over all processes, each of which gets that of the weights it updates;
        otherwise they are those of this process's micro-batches.
        Raises ValueError for more than one without it.
        """
        reduces = reduces and self.size > 1
        *earlier, last = batches
        if earlier and not self.accumulates:
            raise ValueError(f"steps as graphs: {len(batches)} micro-batches, but not `accumulates`")
        share = 1 / (len(batches) * (self.size if reduces else 1))
        if share != self.share:
            self.share = share
            self.dloss.fill_(share)
        gradients, losses = self.optimizer.gradients, []
        for batch in earlier:  # the next one overwrites the gradients
            add = torch._foreach_add_ if losses else torch._foreach_copy_
            losses.append(self._micro_batch(batch))
            add(self.sums, gradients)

        def finished(span: int) -> None:
            if earlier:
                gradients[span] += self.sums[span]
            if reduces:
                self.optimizer.reduce_gradients(span)

        losses.append(self._micro_batch(last, finished if reduces else lambda span: None))
        parts = sum(map(len, self.backward_parts.values())) if reduces else 0
        for span in range(parts, len(self.optimizer.spans)):  # all spans, or that of float32 weights
            finished(span)
        self.optimizer.wait_for_gradients()
        ce, *of_stages = torch.stack(losses).split([1, self.S, self.S, self.S], dim=1)
        return Losses(ce.squeeze(1), *of_stages)

    def _micro_batch(self, batch: tuple[Tensor, ...], finished: Callable[[int], None] = lambda span: None) -> Tensor:
        """The losses of a micro-batch, ordered as in `losses`. finished: see `Segment.backward`."""
        if not self.captures:
            losses = self._eagerly(batch)
            for span in reversed(range(sum(map(len, self.backward_parts.values())) if self.size > 1 else 0)):
                finished(span)
            return losses
        segments = self.retry_without_graphs(functools.partial(self._forward, *batch))
        for name in self.shared:  # every part adds to these
            self.masters.get_parameter(name).grad.zero_()
        for segment in reversed(segments):
            segment.backward(finished)
        return self.losses.clone()  # the next micro-batch overwrites them

    def _eagerly(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Runs a micro-batch through the model's own forward."""
        own, shared = self.all_gradients
        destinations = Destinations(own)
        for gradient in shared.values():
            gradient.zero_()
        with writing_to(destinations):
            out = self.model(*batch)
        check_losses(out)
        loss = training_loss(out.ce, out.ratio_losses, self.alpha)
        wanted = [*destinations.by_tensor, *shared]
        gradients = torch.autograd.grad(loss, wanted, self.dloss.to(loss.dtype), allow_unused=True)
        settle(destinations, dict(zip(wanted, gradients)), shared)
        self.found_stages = [stage.detach() for stage in out.stages]
        shares = [stage.F for stage in self.found_stages] + [stage.G for stage in self.found_stages]
        return torch.cat([out.ce.detach()[None], out.ratio_losses.detach(), *(x[None] for x in shares)])

    def _forward(self, iids: Tensor, labels: Tensor, cuts: Tensor | None = None) -> list[Segment]:
        """Runs a micro-batch's forward. Returns its segments; their backwards run in reverse order."""
        T, offsets = len(iids.values()), iids.offsets()
        if self.capacity < T:
            self._allocate(T)
        self.iids_T[:T].copy_(iids.values())
        self.labels_T[:T].copy_(labels.values())
        check_cuts(cuts, iids, self.masters.config)
        if cuts is not None:
            self.packings[0].cuts_T[:T].copy_(cuts.values())
        ends, position_T = self.packings[0].cu_seqlens, self.packings[0].position_T
        position_T[:T].copy_(positions(iids))
        ends[: len(offsets)].copy_(offsets)
        ends[len(offsets) :].fill_(T)
        self.documents = len(offsets) - 1
        self.most_B = max(self.most_B, _power(self.documents))
        sizes, self.tokens = self._sizes(0, T, iids._get_max_seqlen()), [T]

        def run(part: str, sizes: Sizes) -> Segment:
            segment = self._segment(part, sizes)
            segment.forward()
            return segment

        found, way_in, passed = [], [], []
        for s in range(self.S):
            found.append(run(f"enter {s}", sizes))
            counts = Fetched(self.buffers[s].chunks.counts)
            passed.append(run(f"pass {s}", sizes))
            way_in.append(sizes)
            C, longest = counts.numbers().tolist()  # the only wait of a stage
            self.tokens.append(C)
            sizes = self._sizes(s + 1, C, longest, sizes.T)
        found.append(run(f"inner {self.S}", sizes))
        for s in reversed(range(self.S)):
            found += [passed[s], run(f"leave {s}", way_in[s])]
        return found

    def stages(self) -> list[StageOutput]:
        """The routers' decisions in the last micro-batch; to be read before the next one overwrites them."""
        if not self.captures:
            return self.found_stages
        found = []
        for s, (at, T) in enumerate(zip(self.buffers, self.tokens)):
            offsets = self.packings[s].cu_seqlens[: self.documents + 1].to(torch.int64)
            p_Bj = Documents.between(offsets, 0, self.most_M[s]).nest(at.chunks.p_T[:T])
            found.append(StageOutput(at.chunks.p_T[:T], at.chunks.b_T[:T], *at.chunks.shares, p_Bj))
        return found
