"""Whole training steps as CUDA graphs: thousands of launches become a few, which a CPU can keep up with.

The model is cut where the number of chunks decides how large tensors are, which is where a step waits for the device,
once a stage:

    enter 0 | pass 0 | enter 1 | pass 1 | inner | leave 1 | leave 0, with the loss

What a stage's residual connection computes (`pass`) needs no number of chunks: the device does that while the host
reads the number and launches what is next. Backwards it comes after `leave`.

Each part is a `Segment` for fixed sizes: one graph for its forward, one for its backward. A graph holds fixed sizes and
addresses. So the documents of an inner stage are filled up to one of a few sizes with a document of zeros that reaches
no output, statistic or gradient; rows without documents are empty documents. What goes from one part to another lies
in a `Crossing`, whatever the sizes, and so do the gradients on their way back; how the tokens of a stage fall into
documents, in its `Packing`. Everything is flat. The weights that a segment reads are copies of the float32 masters in
the compute dtype, which the optimizer writes; it writes each weight's gradient to where the optimizer reads it.

All graphs share their memory but for what forwards keep for their backwards, see segments.py.

Where several processes add up their gradients, the backward of a part with many weights is several graphs, so that the
sums of what the first has computed are under way while the next compute.

Legend: T tokens, C chunks (the T of the stage inside), B documents, M the longest document's tokens; all with what
fills them up, but B without the document of zeros. D width, s a stage.
"""

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
from torch.nested import nested_tensor_from_jagged

from hnet_kernels.boundaries import Boundaries
from hnet_kernels.conv import MAX_TAPS
from hnet_kernels.dispatch import requested
from hnet_runtime.distributed import BETAS, PLAIN_FLOAT32, Fetched, World
from hnet_runtime.flat_adamw import FlatAdamW, Span
from hnet_runtime.fused import (
    Cut,
    Embed,
    HeadLoss,
    Put,
    ResidualProjection,
    Route,
    Smooth,
    Take,
    Upsample,
    fuse,
)
from hnet_runtime.segments import Arena, Ends, Leaf, Piece, Segment, memory_ran_out
from hnet_trainable import (
    EMA_CLAMP,
    Block,
    HNet,
    HNetConfig,
    HNetLM,
    Isotropic,
    Packing,
    StageOutput,
    nested_like,
    positions,
    rotary_tables,
)

logger = logging.getLogger("hnet")
Returned = TypeVar("Returned")

TOKENS, STEPS = 128, 32  # an inner T is rounded up to a multiple of TOKENS, and to one of STEPS sizes an octave
DOCUMENTS, LONGEST = 16, 1024  # the least room for documents and for a document; more is a power of two
KEPT = 32  # segments of a part: the sizes last used, an octave of them
PIECE = 1 << 28  # with several processes, a backward is cut before a block once so many weights have been used: 1 GiB
ROOM = 8  # of a GPU's memory, one part in so many is kept free for validation, samples and saving


def obstacle(config: HNetConfig, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model's steps cannot run as graphs on a device, computing in dtype; None where they can.

    On a GPU each operation must have a fast kernel: some of the definitions wait for the device, which ends a capture.
    """
    if config.tie_embeddings:
        return "they do not know tied embeddings"
    if device.type != "cuda":
        return None
    if requested() == "reference":
        return "HNET_KERNELS=reference forbids the kernels they need"
    if dtype != torch.bfloat16:
        return f"on a GPU they compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"they need a Hopper GPU, which {torch.cuda.get_device_name(device)} is not"
    if config.ssm_cfg.d_state not in (16, 32, 64, 128) or config.ssm_cfg.d_conv > MAX_TAPS:
        return "ssm_cfg has sizes for which there is no kernel"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _stays_float32(name: str) -> bool:
    """Whether the model computes with the float32 weight of that name."""
    return name.rpartition(".")[2] in PLAIN_FLOAT32 or "residual_proj" in name


def _power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def _step(T: int) -> int:
    """Inner sizes of about T are multiples of this, so the document of zeros has fewer tokens."""
    return max(TOKENS, _power(T) // (2 * STEPS))


def _filled_up(T: int) -> int:
    """The size of an inner stage with T tokens."""
    return -(-T // _step(T)) * _step(T)


class Sizes(NamedTuple):
    """What a segment is captured for."""

    T: int
    B: int
    M: int


class Crossing:
    """Where stage s, of at most T tokens, meets the one inside, whose tokens are its chunks, at most C.

    Rows of `x_TD` and `p_T` at `start_C` are what the stage inside takes. Where it has no chunk, start_C is the size
    that stage s has, one row past its tokens, and that row is zero.
    """

    def __init__(self, T: int, C: int, D: int, dtype: torch.dtype, residual: torch.dtype, device: torch.device):
        at = {"device": device}
        wide = at | {"dtype": torch.promote_types(dtype, torch.float32)}
        self.x_TD, self.dx_TD = (torch.zeros(T + 1, D, dtype=dtype, **at) for _ in "xd")  # after the encoder
        self.p_T, self.dp_T = (torch.zeros(T + 1, **wide) for _ in "pd")
        self.b_T = torch.zeros(T, dtype=torch.bool, **at)
        self.chunk_T, self.start_C = (torch.zeros(n, dtype=torch.int64, **at) for n in (T, C))
        # past the inner stage; the gradient has the dtype of what the residual is added up to
        self.residual_TD, self.dresidual_TD = (torch.zeros(T, D, dtype=kind, **at) for kind in (residual, dtype))
        self.z_CD = torch.zeros(C, D, **wide)  # what comes from inside, smoothed; then the gradient of that
        self.counts = torch.zeros(2, dtype=torch.int64, **at)  # of all chunks, and of the longest document's


class Losses(NamedTuple):
    """Of one micro-batch, on the device; each (S,) but for ce."""

    ce: Tensor
    ratio: Tensor
    F: Tensor
    G: Tensor


class GraphedModel:
    """Runs the training steps of an HNetLM on one process as graphs.

    `masters`: the HNetLM whose float32 parameters are trained. `model`: an HNetLM of copies in the compute dtype, for
    whoever evaluates or generates; it computes as fused.py writes it, with activation checkpointing as `ac` says there.
    Gradients go to the masters' `grad`. Those of bfloat16 copies are float32 where they are added up, over processes or
    (`accumulates`) over the micro-batches of a step; else bfloat16, rounded once, at the end of their product.

    `optimizer` is what changes the masters, and the copies with them; groups: its parameter groups, by default one.
    Whatever else reads or changes the masters does so inside `optimizer.whole()`.

    world: where several processes have a copy of the weights each, gradients are averaged over them, those of a piece
    while the backward of others goes on, and each process updates a part of the weights: see FlatAdamW.

    `captured`: how many segments have been made so far, in `capture_seconds`; each took a tenth of a second or some.
    `forced`: for benchmarks, (S, T) of bool: which tokens open chunks, instead of those whose p is above 0.5.
    """

    forced: Tensor | None = None

    def __init__(
        self,
        masters: HNetLM,
        compute_dtype: torch.dtype,
        alpha: float,
        world: World | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        ac: str = "none",
        accumulates: bool = False,
    ):
        config: HNetConfig = masters.config
        self.masters, self.alpha, self.S = masters, alpha, config.num_stages
        self.size, self.accumulates = world.size if world else 1, accumulates
        self.dtype, self.device = compute_dtype, masters.lm_head.weight.device
        if reason := obstacle(config, self.device, compute_dtype):
            raise ValueError(f"steps as graphs: {reason}")
        with torch.device("meta"):
            self.model = HNetLM(config)
        self.levels: list[HNet] = [self.model.backbone]
        for _ in range(self.S):
            self.levels.append(self.levels[-1].main_network)
        names = {p: name for name, p in self.model.named_parameters()}
        spans = itertools.count() if self.size > 1 else itertools.repeat(0)
        self.weights = {
            part: [(block, [names[p] for p in weights], next(spans)) for block, weights in pieces]
            for part, pieces in self._pieces().items()
        }
        parameters = dict(masters.named_parameters())
        copies: list[tuple[Tensor, Tensor]] = []  # (copy, master)
        for name, p in parameters.items():
            path, _, leaf = name.rpartition(".")
            whole = _stays_float32(name) or p.dtype == compute_dtype
            used = p if whole else nn.Parameter(p.detach().to(compute_dtype))
            if not whole:
                copies.append((used, p))
            self.model.get_submodule(path)._parameters[leaf] = used
        everything = {"params": list(parameters.values())}
        spans, rank = self._spans(parameters), world.rank if world else 0
        narrow = [0] if self.size == 1 and not accumulates and compute_dtype == torch.bfloat16 else []
        self.optimizer = FlatAdamW(groups or [everything], spans, BETAS, copies=copies, rank=rank, narrow=narrow)
        # of micro-batches' gradients; there from the start, so that graphs do not take its memory
        self.sums = [torch.zeros_like(gradient) for gradient in self.optimizer.gradients] if accumulates else []
        # for captures, and nobody else's: torch's own for them is one of the 32 that it hands out to all (see
        # github.com/pytorch/pytorch/blob/main/c10/cuda/CUDAStream.h)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        fuse(self.model, ac)
        wide = {"dtype": torch.promote_types(compute_dtype, torch.float32), "device": self.device}
        self.losses = torch.zeros(1 + 3 * self.S, **wide)  # ce, ratio losses, F, G
        self.share, (self.dce, self.dratio) = 0.0, torch.zeros(2, **wide)
        self.kept: dict[str, tuple[int, int]] = {}  # bytes that a part's forward kept for most tokens, and these tokens
        self.captured, self.capture_seconds = 0, 0.0
        self.room = 0  # of how many bytes the steps may be
        self.forget()

    def _pieces(self) -> dict[str, list[tuple[Block | None, list[Tensor]]]]:
        """The model's weights by the part and piece that use them; the backward goes through them in reverse."""
        found: dict[str, list[Any]] = {}
        for s, hnet in enumerate(self.levels):
            parts = [hnet.encoder, hnet.routing_module] if s < self.S else [hnet.main_network]
            found[f"enter {s}" if s < self.S else f"inner {s}"] = [hnet.pad_dimension, *parts]
        for s in reversed(range(self.S)):
            found[f"pass {s}"], found[f"leave {s}"] = [self.levels[s].residual_proj], [self.levels[s].decoder]
        first, last = next(iter(found)), list(found)[-1]
        found[first].insert(0, self.model.embeddings)
        found[last].append(self.model.lm_head)
        return {part: self._cut(modules) for part, modules in found.items()}

    def _cut(self, modules: Sequence[nn.Module | nn.Parameter | None]) -> list[tuple[Block | None, list[Tensor]]]:
        pieces: list[tuple[Block | None, list[Tensor]]] = [(None, [])]
        for module in modules:
            for one in [*module.layers, module.rmsnorm] if isinstance(module, Isotropic) else [module]:
                many = sum(p.numel() for p in pieces[-1][1]) >= PIECE
                if self.size > 1 and many and isinstance(one, Block):
                    pieces.append((one, []))
                if one is not None:
                    pieces[-1][1].extend(one.parameters() if isinstance(one, nn.Module) else [one])
        return pieces

    def _spans(self, parameters: dict[str, nn.Parameter]) -> list[Span]:
        """How parameters lie in the optimizer's memory: with several processes a span for each piece, cut into a part
        for each of them; and then what stays float32, which is little and which a forward reads as it is."""
        small = [p for name, p in parameters.items() if _stays_float32(name)]
        if self.size == 1:
            spans: list[Span] = [[[p for name, p in parameters.items() if not _stays_float32(name)]]]
        else:
            spans = []
            for _, names, _ in [piece for pieces in self.weights.values() for piece in pieces]:
                parts: list[list[nn.Parameter]] = [[] for _ in range(self.size)]
                large = [parameters[name] for name in names if not _stays_float32(name)]
                for p in sorted(large, key=torch.numel, reverse=True):
                    min(parts, key=lambda part: sum(map(torch.numel, part))).append(p)
                spans.append(parts)
        return [*spans, [small]] if small else spans

    def forget(self) -> None:
        """Drops all graphs and their memory; the next steps make new ones."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # none is being replayed
        self.segments: dict[str, OrderedDict[Sizes, Segment]] = {part: OrderedDict() for part in self.weights}
        self.arenas: dict[str, Arena] = {}
        # What a part's forward keeps is no longer needed when another segment of that part runs, so they share an
        # arena; all else is only needed while one graph runs, so they all share a pool. The last part's backward
        # follows its forward at once. A new pool: torch takes none that all graphs have left.
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.most_B, self.most_M = DOCUMENTS, [LONGEST] * (self.S + 1)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def make_room(self) -> None:
        """Drops all graphs where they leave too little of the GPU's memory to what runs between steps.

        A young router may have needed far larger ones than are needed now.
        """
        if self.device.type == "cuda":
            free, everything = torch.cuda.mem_get_info(self.device)
            if free < everything // ROOM:
                self.forget()

    def with_room(self, call: Callable[[], Returned]) -> Returned:
        """What `call` returns; where the GPU's memory is too full for it, of a second call, without any graphs."""
        try:
            return call()
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            if not memory_ran_out(error):
                raise
        logger.info("the GPU's memory is full: all graphs are dropped")  # here, where the exception holds nothing more
        self.forget()
        return call()

    def _allocate(self, T: int) -> None:
        """What segments read and write, for steps of at most T bytes."""
        self.room = 0
        self.forget()
        dtypes = self.dtype, self.masters.lm_head.weight.dtype
        documents = _power(max(T, DOCUMENTS))
        self.iids_T, self.labels_T = torch.zeros(2, T, dtype=torch.int64, device=self.device)
        self.crossings: list[Crossing] = []
        self.packings: list[Packing] = []
        for s, D in enumerate(self.masters.config.d_model):
            ends, position_T = (torch.zeros(n, dtype=torch.int32, device=self.device) for n in (documents + 2, T))
            rotary_dim = max(stack.rotary_dim for stack in self.levels[s].children() if isinstance(stack, Isotropic))
            tables = rotary_tables(_power(max(T, LONGEST)), rotary_dim, self.losses.dtype, self.device)
            self.packings.append(Packing(ends, position_T, *tables))
            if s < self.S:
                self.crossings.append(Crossing(T, _filled_up(T), D, *dtypes, self.device))
                T = _filled_up(T)
        static = [*self.optimizer.weights, *self.optimizer.copies, self.iids_T, self.labels_T, self.losses]
        static += [x for packing in self.packings for x in packing]
        static += [x for crossing in self.crossings for x in vars(crossing).values()]
        self.static = frozenset(x.untyped_storage().data_ptr() for x in static if x is not None)
        self.room = len(self.iids_T)

    # ------------------------------------------------------------------------------------------- what segments compute

    def _packing(self, s: int, sizes: Sizes) -> Packing:
        """How stage s's tokens fall into documents, of which the last of an inner stage is that of zeros."""
        T, B, M = sizes
        ends, position_T, cos_MR, sin_MR = self.packings[s]
        return Packing(ends[: B + 1 + (s > 0)], position_T[:T], cos_MR[:M], sin_MR[:M])

    def _begin(self, s: int, sizes: Sizes, leaf: Leaf) -> Tensor:
        """What enters stage s."""
        T, B, _ = sizes
        if s == 0:
            return Embed.apply(self.iids_T[:T], self.model.embeddings.weight)
        outer = self.crossings[s - 1]
        self.packings[s].cu_seqlens[B + 1].fill_(T)
        return Take.apply(leaf(outer.x_TD, outer.dx_TD), outer.start_C[:T], self.levels[s].pad_dimension)

    def _end(self, s: int, x_TD: Tensor, packing: Packing, leaf: Leaf) -> Ends:
        """What leaves stage s: smoothed, to the stage outside; or to the loss."""
        x_TD = self.levels[s].narrow(x_TD)
        if s == 0:
            ce = HeadLoss.apply(x_TD, self.model.lm_head.weight, self.labels_T[: len(x_TD)])
            self.losses[0].copy_(ce.detach())
            return [(ce, self.dce)]
        outer, C = self.crossings[s - 1], len(x_TD)
        P_C = Take.apply(leaf(outer.p_T, outer.dp_T), outer.start_C[:C], None).clamp(EMA_CLAMP, 1 - EMA_CLAMP)
        z_CD = Smooth.apply(x_TD, P_C, packing.cu_seqlens)
        outer.z_CD[:C].copy_(z_CD.detach())
        return [(z_CD, outer.z_CD[:C])]

    def _enter(self, s: int, sizes: Sizes, leaf: Leaf) -> Ends:
        hnet, to, (T, B, _), C = self.levels[s], self.crossings[s], sizes, _filled_up(sizes.T)
        packing, inner = self._packing(s, sizes), self.packings[s + 1]
        x_TD = hnet.encoder(self._begin(s, sizes, leaf), packing)
        to.x_TD[T].zero_()
        x_TD = Put.apply(x_TD, to.x_TD[:T])
        router = hnet.routing_module
        p_T = Route.apply(x_TD, packing.position_T, router.q_proj_layer.weight, router.k_proj_layer.weight)
        of_tokens = to.p_T[: T + 1], to.b_T[:T], to.chunk_T[:T]
        of_chunks = to.start_C[:C], inner.cu_seqlens[: B + 1], inner.position_T[:C], to.counts
        found = Boundaries(*of_tokens, *of_chunks, self.losses[1:].view(3, -1)[:, s])
        N, forced_T = self.masters.config.target_ratios[s], None if self.forced is None else self.forced[s, :T]
        p_T, ratio = Cut.apply(p_T, packing.position_T, packing.cu_seqlens[: B + 1], N, found, forced_T)
        return [(x_TD, to.dx_TD[:T]), (p_T, to.dp_T[:T]), (ratio, self.dratio)]

    def _inner(self, s: int, sizes: Sizes, leaf: Leaf) -> Ends:
        packing = self._packing(s, sizes)
        return self._end(s, self.levels[s].main_network(self._begin(s, sizes, leaf), packing), packing, leaf)

    def _pass(self, s: int, sizes: Sizes, leaf: Leaf) -> Ends:
        linear, at, T = self.levels[s].residual_proj, self.crossings[s], sizes.T
        x_TD = leaf(at.x_TD[:T], at.dx_TD[:T])
        proxy_TD = ResidualProjection.apply(x_TD, linear.weight, linear.bias, at.residual_TD[:T])
        return [(proxy_TD, at.dresidual_TD[:T])]

    def _leave(self, s: int, sizes: Sizes, leaf: Leaf) -> Ends:
        hnet, at, T, C = self.levels[s], self.crossings[s], sizes.T, _filled_up(sizes.T)
        p_T, z_CD = leaf(at.p_T[:T], at.dp_T[:T]), leaf(at.z_CD[:C], at.z_CD[:C])
        proxy_TD = leaf(at.dresidual_TD[:T], at.dresidual_TD[:T])
        of_chunks = at.b_T[:T], at.chunk_T[:T], at.start_C[:C]
        x_TD = Upsample.apply(z_CD, p_T, *of_chunks, at.residual_TD[:T], proxy_TD, self.dtype, _step(T))
        packing = self._packing(s, sizes)
        return self._end(s, hnet.decoder(x_TD, packing), packing, leaf)

    # ----------------------------------------------------------------------------------------- finding and making them

    def _sizes(self, s: int, T: int, M: int) -> Sizes:
        """With room to spare. Room for documents is not given back, so that most steps find what was captured."""
        if s:
            T, M = _filled_up(T), max(M, _step(T))
        self.most_M[s] = max(self.most_M[s], _power(M))
        return Sizes(T, self.most_B, self.most_M[s])

    def _segment(self, part: str, sizes: Sizes) -> Segment:
        """The segment of a part for these sizes, made on first use."""
        segments = self.segments[part]
        if sizes not in segments:
            if len(segments) == KEPT:
                segments.popitem(last=False)
            kind, s = part.split()
            run = {"enter": self._enter, "pass": self._pass, "inner": self._inner, "leave": self._leave}[kind]
            pieces = []
            for block, names, span in self.weights[part]:
                masters = [self.masters.get_parameter(name) for name in names]
                targets = {self.model.get_parameter(name): p.grad for name, p in zip(names, masters)}
                pieces.append(Piece(block, targets, span))
            last = part == list(self.weights)[-1]
            arena = None if last else self.arenas.setdefault(part, Arena(self.static, self.device))
            segment = Segment(functools.partial(run, int(s), sizes), pieces, arena)
            if self.device.type == "cuda":
                self._capture(part, sizes, segment)
            segments[sizes] = segment
            self.captured += 1
        segments.move_to_end(sizes)
        return segments[sizes]

    def _capture(self, part: str, sizes: Sizes, segment: Segment) -> None:
        arena = segment.arena
        if part not in self.kept:
            segment.try_out(self.stream)
            self.kept[part] = (arena.used if arena else 0), sizes.T
        began = time.perf_counter()
        used, T = self.kept[part]
        self._make_room_in(part, used * sizes.T / T)
        while not segment.capture(self.pool, self.stream):  # as where a longer document makes larger tables
            self._make_room_in(part, arena.used)
        self.capture_seconds += time.perf_counter() - began
        if arena and sizes.T >= T:
            self.kept[part] = arena.used, sizes.T

    def _make_room_in(self, part: str, need: float) -> None:
        """Room for so many bytes in a part's arena."""
        arena = self.arenas.get(part)
        if arena and need > len(arena.buffer):
            torch.cuda.synchronize(self.device)  # none of those that know the former buffer is being replayed
            self.segments[part].clear()
            arena.grow(need)

    # ---------------------------------------------------------------------------------------------------------- a step

    def forward_backward(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Losses:
        """Mean losses of some micro-batches; puts the gradient of ce + alpha * ratio losses into the masters' `grad`.

        batches: NJTs (iids, labels), each (B, j) of int64; more than one with `accumulates` alone.
        """
        *earlier, last = batches
        if earlier and not self.accumulates:
            raise ValueError(f"steps as graphs: {len(batches)} micro-batches, but not `accumulates`")
        share = 1 / (len(batches) * self.size)
        if share != self.share:
            self.share = share
            self.dce.fill_(share)
            self.dratio.fill_(share * self.alpha)
        gradients, losses = self.optimizer.gradients, []
        for pair in earlier:  # the next one writes to the same place
            add = torch._foreach_add_ if losses else torch._foreach_copy_
            losses.append(self._micro_batch(*pair))
            add(self.sums, gradients)

        def finished(span: int) -> None:
            if earlier:
                gradients[span] += self.sums[span]
            self.optimizer.add_up(span)

        losses.append(self._micro_batch(*last, finished if self.size > 1 else lambda span: None))
        pieces = sum(map(len, self.weights.values())) if self.size > 1 else 0
        for span in range(pieces, len(self.optimizer.spans)):  # all of it, or what stays float32
            finished(span)
        self.optimizer.added_up()
        ce, *of_stages = torch.stack(losses).mean(0).split([1, self.S, self.S, self.S])
        return Losses(ce.squeeze(0), *of_stages)

    def _micro_batch(self, iids: Tensor, labels: Tensor, finished: Callable[[int], None] = lambda span: None) -> Tensor:
        """Its losses, as they lie in `losses`. finished: as `Segment.backward` says."""
        segments = self.with_room(functools.partial(self._forward, iids, labels))
        for segment in reversed(segments):
            segment.backward(finished)
        return self.losses.clone()  # the next micro-batch writes to the same place

    def _forward(self, iids: Tensor, labels: Tensor) -> list[Segment]:
        """A micro-batch's forward. Returns the segments that have run, in the order whose reverse is the backward's."""
        T, offsets = len(iids.values()), iids.offsets()
        if self.room < T:
            self._allocate(T)
        self.iids_T[:T].copy_(iids.values())
        self.labels_T[:T].copy_(labels.values())
        ends, position_T, *_ = self.packings[0]
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
            counts = Fetched(self.crossings[s].counts)
            passed.append(run(f"pass {s}", sizes))
            way_in.append(sizes)
            C, longest = counts.numbers().tolist()  # the one wait of a stage
            self.tokens.append(C)
            sizes = self._sizes(s + 1, C, longest)
        found.append(run(f"inner {self.S}", sizes))
        for s in reversed(range(self.S)):
            found += [passed[s], run(f"leave {s}", way_in[s])]
        return found

    def stages(self) -> list[StageOutput]:
        """What the routers decided in the last micro-batch; to be read before the next writes to the same places."""
        found = []
        for s, (at, T) in enumerate(zip(self.crossings, self.tokens)):
            offsets = self.packings[s].cu_seqlens[: self.documents + 1].to(torch.int64)
            p_Bj = nested_tensor_from_jagged(at.p_T[:T], offsets, min_seqlen=0, max_seqlen=self.most_M[s])
            _, F_, G = self.losses[1:].view(3, -1)[:, s]
            found.append(StageOutput(p_Bj, nested_like(at.b_T[:T], p_Bj), F_, G))
        return found
