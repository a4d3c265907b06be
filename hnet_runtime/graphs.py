"""Whole training steps as CUDA graphs: thousands of launches become a few, which a CPU can keep up with.

The model is cut where the number of chunks decides how large tensors are, which is where a step waits for the device,
once a stage:

    enter 0 | enter 1 | inner | leave 1 | leave 0, with the loss

Each part is a `Segment` for fixed sizes: one graph for its forward, one for its backward. A graph holds fixed sizes and
addresses. So the documents of an inner stage are filled up to one of a few sizes with a document of zeros that reaches
no output, statistic or gradient; rows without documents are empty documents. The weights that it reads are copies of
the float32 masters in the compute dtype, which the optimizer writes; it writes each weight's gradient, in float32, to
where the optimizer reads it.

Legend: T tokens, B documents, M the longest document's tokens; all three with what fills them up. s: a stage.
"""

import functools
import gc
import importlib.util
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nested import nested_tensor_from_jagged

from hnet_kernels.conv import MAX_TAPS
from hnet_kernels.dispatch import requested
from hnet_runtime.distributed import BETAS, Averaging, World
from hnet_runtime.flat_adamw import FlatAdamW
from hnet_runtime.fused import HeadLoss, fuse, gradients_into
from hnet_trainable import HNet, HNetConfig, HNetLM, StageOutput, chunk_offsets, nested_like, ratio_loss

logger = logging.getLogger("hnet")

FLOAT32 = ("A_log", "dt_bias", "D")  # computed with in float32, as residual_proj is: no copies
TOKENS, STEPS = 512, 8  # an inner T is rounded up to a multiple of TOKENS, and to one of STEPS sizes an octave
DOCUMENTS, LONGEST = 16, 1024  # the least room for documents and for a document; more is a power of two
KEPT = 16  # segments of a part: the sizes last used, two octaves of them; a capture takes 0.1 to 0.3 s
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
    if dtype not in (torch.bfloat16, torch.float16):
        return f"on a GPU they compute in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"they need a Hopper GPU, which {torch.cuda.get_device_name(device)} is not"
    if config.ssm_cfg.d_state not in (16, 32, 64, 128) or config.ssm_cfg.d_conv > MAX_TAPS:
        return "ssm_cfg has sizes for which there is no kernel"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _power(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


class Sizes(NamedTuple):
    """What a segment is captured for."""

    T: int
    B: int
    M: int

    def rounded(self, exact: bool) -> "Sizes":
        """With room to spare. `exact`: for the outermost stage, whose T never varies; inner ones take B from there."""
        if exact:
            return Sizes(self.T, _power(max(self.B, DOCUMENTS)), _power(max(self.M, LONGEST)))
        step = max(TOKENS, _power(self.T) // (2 * STEPS))  # the most tokens that the document of zeros can have
        return Sizes(-(-self.T // step) * step, self.B, _power(max(self.M, LONGEST, step)))

    def hold(self, needed: "Sizes", exact: bool) -> bool:
        """Whether these sizes serve a batch without wasting much."""
        T, _, M = needed.rounded(exact)
        return self.T == T and self.B >= needed.B and self.M >= M


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: what is freed on a stream is only used again there."""
    return torch.cuda.Stream(device)


class Segment:
    """A part of the model for fixed sizes: its forward and its backward, each a graph, or on a CPU plain calls.

    inputs: tensors that stay where they are; those that require a gradient get one, in `dinputs`.
    run: the inputs -> outputs. `outputs` stay where they are too, and so do the gradients of those that have one,
    `doutputs`, which the caller fills before `backward` and may provide.
    weights, gradients: what `run` reads beside its inputs, each once, and where its gradient goes; `span` is their part
    of the flat gradient.
    warm: all that `run` calls has run in this process. Where it has not, it runs once before the capture, in memory
    beside the graphs'.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        span: slice,
        pool: tuple[int, int] | None,
        doutputs: list[Tensor] | None = None,
        warm: bool = False,
    ):
        self.run, self.inputs, self.doutputs = run, inputs, doutputs
        self.targets, self.span = dict(zip(weights, gradients)), span
        self.graphs: list[torch.cuda.CUDAGraph] = []
        if not inputs[0].is_cuda:
            self._forward()
            self.outputs = [x.detach().clone() for x in self.live]
            self.doutputs = self.doutputs or [torch.zeros_like(x) for x in self.live if x.requires_grad]
            return
        if not warm:
            self._warm_up()
        self._capture(self._forward, pool)
        self.outputs = [x.detach() for x in self.live]
        self.doutputs = self.doutputs or [torch.zeros_like(x) for x in self.live if x.requires_grad]
        self._capture(self._backward, pool)
        del self.live  # and with it, what the forward saved: the pool's other segments use that memory too

    def _warm_up(self) -> None:
        """Compiles and loads what the segment calls, on another stream as captures want it."""
        aside = _side_stream(self.inputs[0].device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._forward()
            self.doutputs = self.doutputs or [torch.zeros_like(x) for x in self.live if x.requires_grad]
            self._backward()
            del self.live, self.dinputs
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.empty_cache()  # what lies beside the pools is of no use to them

    def _capture(self, part: Callable[[], None], pool: tuple[int, int] | None) -> None:
        self.graphs.append(torch.cuda.CUDAGraph())
        # "relaxed": a kernel that sizes like these are the first to call may be loaded meanwhile, and another thread
        # may be saving a checkpoint
        with torch.cuda.graph(self.graphs[-1], pool=pool, capture_error_mode="relaxed"):
            part()

    def _forward(self) -> None:
        self.copied = dict(self.targets)  # without those that the backward itself will write
        with torch.enable_grad(), gradients_into(self.copied):
            self.live = self.run(*self.inputs)

    def _backward(self) -> None:
        ends = [x for x in self.live if x.requires_grad]
        inputs = [x for x in self.inputs if x.requires_grad]
        wanted = [*inputs, *self.targets]
        found = dict(zip(wanted, torch.autograd.grad(ends, wanted, self.doutputs, allow_unused=True)))
        if {x for x in wanted if found[x] is not None} != {*inputs, *self.copied}:
            raise RuntimeError("a weight is not used, or twice")
        self.dinputs = [found[x] for x in inputs]
        torch._foreach_copy_(list(self.copied.values()), [found[x] for x in self.copied])

    def forward(self) -> None:
        if self.graphs:
            self.graphs[0].replay()
        else:
            self._forward()
            for kept, new in zip(self.outputs, self.live):
                kept.copy_(new.detach())

    def backward(self) -> None:
        if self.graphs:
            self.graphs[1].replay()
        else:
            self._backward()


class Place:
    """What stands between the segments of a stage, for fixed sizes: its documents, what enters and what leaves."""

    def __init__(self, s: int, sizes: Sizes, width: int, dtype: torch.dtype, device: torch.device):
        self.s, self.sizes = s, sizes
        self.offsets = torch.full((sizes.B + 1,), sizes.T, device=device)  # int64
        self.offsets[0] = 0
        self.count = torch.full((), sizes.T, device=device)  # int64: tokens without those that fill up
        self.tokens = sizes.T  # the same, on the host
        if s == 0:
            self.x_T, self.labels_T = torch.zeros(2, sizes.T, dtype=torch.int64, device=device)
        else:
            self.x_TD, self.y_TD = (torch.zeros(sizes.T, width, dtype=dtype, device=device) for _ in "xy")
            self.dy_TD = torch.zeros_like(self.x_TD)
            self.x_TD.requires_grad_()
            self.y_TD.requires_grad_()

    def nested(self, values: Tensor) -> Tensor:
        return nested_tensor_from_jagged(values, self.offsets, min_seqlen=0, max_seqlen=self.sizes.M)

    def fill(self, x_TD: Tensor, kept_C: Tensor, offsets: Tensor) -> None:
        """Takes those rows of the stage outside, in documents of these offsets; fills up with a document of zeros."""
        rows_TD, C = self.x_TD.detach(), len(kept_C)
        torch.index_select(x_TD, 0, kept_C, out=rows_TD[:C])
        rows_TD[C:].zero_()
        self.offsets[: len(offsets)].copy_(offsets)
        self.offsets[len(offsets) :].fill_(self.sizes.T)
        self.count.copy_(offsets[-1])
        self.tokens = C


class Losses(NamedTuple):
    """Of one micro-batch, on the device; each (S,) but for ce."""

    ce: Tensor
    ratio: Tensor
    F: Tensor
    G: Tensor


class GraphedModel:
    """Runs the training steps of an HNetLM on one process as graphs.

    `masters`: the HNetLM whose float32 parameters are trained. `model`: an HNetLM of copies in the compute dtype, for
    whoever evaluates or generates. Gradients go to the masters' `grad`, which lie in one flat tensor, `gradient`.
    `fused`: it computes as fused.py writes it, with activation checkpointing as `ac` says there.

    `optimizer` is what changes the masters, and the copies with them; groups: its parameter groups, by default one.
    Whatever else changes the masters calls `optimizer.refresh` afterwards.

    world: where several processes have a copy of the weights each, gradients are averaged over them, those of a segment
    while the backward of others goes on.
    """

    def __init__(
        self,
        masters: HNetLM,
        compute_dtype: torch.dtype,
        alpha: float,
        fused: bool = True,
        world: World | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        ac: str = "none",
    ):
        config: HNetConfig = masters.config
        self.masters, self.alpha, self.S = masters, alpha, config.num_stages
        self.size = world.size if world else 1
        self.dtype, self.device = compute_dtype, masters.lm_head.weight.device
        if reason := obstacle(config, self.device, compute_dtype):
            raise ValueError(f"steps as graphs: {reason}")
        with torch.device("meta"):
            self.model = HNetLM(config)
        parameters = dict(masters.named_parameters())
        copies: list[tuple[Tensor, Tensor]] = []  # (copy, master)
        for name, p in parameters.items():
            path, _, leaf = name.rpartition(".")
            whole = leaf in FLOAT32 or "residual_proj" in name or p.dtype == compute_dtype
            used = p if whole else nn.Parameter(p.detach().to(compute_dtype))
            if not whole:
                copies.append((used, p))
            self.model.get_submodule(path)._parameters[leaf] = used
        in_order = list(parameters.values())
        self.optimizer = FlatAdamW(groups or [{"params": in_order}], in_order, BETAS, copies=copies)
        self.gradient = self.optimizer.gradient
        self.fused = fused
        if fused:
            fuse(self.model, ac)
        self.levels: list[HNet] = [self.model.backbone]
        for _ in range(self.S):
            self.levels.append(self.levels[-1].main_network)
        self.warm: set[str] = set()  # parts that have run
        self.forget()
        self.documents = 0  # of the last micro-batch

    def forget(self) -> None:
        """Drops all graphs and their memory; the next steps make new ones."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # none is being replayed
        self.places: list[OrderedDict[Sizes, Place]] = [OrderedDict() for _ in self.levels]
        self.segments: dict[str, OrderedDict] = {}
        self.pools: dict[str, tuple[int, int]] = {}  # new ones: torch takes none that all graphs have left
        self.routed: list[tuple[Place, Segment]] = []  # the last micro-batch's stages and their ways in
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

    # ------------------------------------------------------------------------------------------- what segments compute

    def _begin(self, place: Place, x: Tensor) -> Tensor:
        x_BjD = place.nested(x)
        return self.model.embeddings(x_BjD) if place.s == 0 else x_BjD

    def _end(self, place: Place, x_BjD: Tensor) -> tuple[Tensor]:
        if place.s:
            place.y_TD.detach().copy_(x_BjD.values().detach())
            return (x_BjD.values(),)
        if self.fused:
            return (HeadLoss.apply(x_BjD.values(), self.model.lm_head.weight, place.labels_T),)
        logits_TV = self.model.lm_head(x_BjD).values()
        loss_dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        return (F.cross_entropy(logits_TV.to(loss_dtype), place.labels_T),)

    def _enter(self, place: Place, x: Tensor) -> tuple[Tensor, ...]:
        x_BjD, stage, residual_BjD = self.levels[place.s].enter(self._begin(place, x))
        p_T = stage.boundary_prob.values()
        real_T = torch.arange(place.sizes.T, device=p_T.device) < place.count
        b_T = stage.boundary_mask.values() & real_T
        share, mean = b_T.to(p_T.dtype).sum() / place.count, (p_T * real_T).sum() / place.count
        ratio = ratio_loss(stage._replace(F=share, G=mean), self.masters.config.target_ratios[place.s])
        inner = chunk_offsets(b_T, place.offsets)
        counts = torch.stack([inner[-1], inner.diff().max()])
        return x_BjD.values(), residual_BjD.values(), p_T, ratio, b_T, inner, counts, share, mean.detach()

    def _leave(self, place: Place, inside: Place, b_T: Tensor, y_CD: Tensor, residual_TD: Tensor, p_T: Tensor):
        p_Bj = place.nested(p_T)
        stage = StageOutput(p_Bj, nested_like(b_T, p_Bj), None, None)
        x_BjD = self.levels[place.s].leave(inside.nested(y_CD), stage, nested_like(residual_TD, p_Bj))
        return self._end(place, x_BjD)

    def _inner(self, place: Place, x: Tensor) -> tuple[Tensor]:
        return self._end(place, self.levels[place.s](self._begin(place, x))[0])

    # ----------------------------------------------------------------------------------------- finding and making them

    def _place(self, s: int, needed: Sizes) -> Place:
        places, exact = self.places[s], s == 0
        sizes = min((z for z in places if z.hold(needed, exact)), default=None)
        if sizes is None:
            if len(places) == KEPT:
                self._drop(places.popitem(last=False)[1])
            sizes = needed.rounded(exact)
            places[sizes] = Place(s, sizes, self.masters.config.d_model[max(s - 1, 0)], self.dtype, self.device)
        places.move_to_end(sizes)
        return places[sizes]

    def _drop(self, place: Place) -> None:
        for segments in self.segments.values():
            for key in [key for key in segments if place in key]:
                del segments[key]

    def _segment(self, part: str, key: tuple[Place, ...], modules: Sequence, run, inputs: Sequence[Tensor]) -> Segment:
        """The segment of a part for these places, made on first use; `modules` hold its weights."""
        name, outermost = f"{part} {key[0].s}", key[0].s == 0
        segments = self.segments.setdefault(name, OrderedDict())
        if key not in segments:
            if self.device.type == "cuda" and name not in self.pools:
                self.pools[name] = torch.cuda.graph_pool_handle()
            if len(segments) == KEPT:
                segments.popitem(last=False)
            modules = [*modules, self.model.embeddings if outermost and part != "leave" else None]
            modules += [self.model.lm_head if outermost and part != "enter" else None]
            names = {id(p): full for full, p in self.model.named_parameters()}
            weights = [m for m in modules if isinstance(m, Tensor)]
            weights += [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()]
            masters = [self.masters.get_parameter(names[id(p)]) for p in weights]
            gradients, span = [p.grad for p in masters], self.optimizer.slice_of(masters)
            doutputs = [key[0].dy_TD] if part != "enter" and not outermost else None
            pool, warm = self.pools.get(name), name in self.warm
            segments[key] = Segment(run, inputs, weights, gradients, span, pool, doutputs, warm)
            self.warm.add(name)
        segments.move_to_end(key)
        return segments[key]

    # ---------------------------------------------------------------------------------------------------------- a step

    def forward_backward(self, batches: Sequence[tuple[Tensor, Tensor]]) -> Losses:
        """Mean losses of some micro-batches; puts the gradient of ce + alpha * ratio losses into the masters' `grad`.

        batches: NJTs (iids, labels), each (B, j) of int64.
        """
        *earlier, last = batches
        share, averaging, sum_ = 1 / (len(batches) * self.size), Averaging(self.size), None
        found = []
        for pair in earlier:  # the next one writes to the same place
            found.append(self._micro_batch(*pair, share))
            sum_ = self.gradient.clone() if sum_ is None else sum_.add_(self.gradient)

        def finished(segment: Segment) -> None:
            part = self.gradient[segment.span]
            if sum_ is not None:
                part += sum_[segment.span]
            averaging.start(part)

        found.append(self._micro_batch(*last, share, finished))
        averaging.finish()
        return Losses(*(torch.stack(values).mean(0) for values in zip(*found)))

    def _micro_batch(
        self, iids: Tensor, labels: Tensor, share: float, finished: Callable[[Segment], None] = lambda segment: None
    ) -> Losses:
        """share: of the loss in the step's. finished: told of each segment whose gradients have all been launched."""
        try:
            last, backward = self._forward(iids, labels, share, finished)
        except torch.OutOfMemoryError:
            last = None  # what the exception holds must go first
        if last is None:
            logger.info("the GPU's memory is full: graphs for other numbers of chunks are dropped")
            self.forget()
            last, backward = self._forward(iids, labels, share, finished)
        last.doutputs[0].fill_(share)
        backward()
        ce = last.outputs[0].clone()  # the stacks below copy too: the next micro-batch writes to the same places
        columns = zip(*((ratio, F_, G) for *_, ratio, _, _, _, F_, G in (enter.outputs for _, enter in self.routed)))
        return Losses(ce, *([torch.stack(column) for column in columns] or [ce.new_zeros(0)] * 3))

    def _forward(
        self, iids: Tensor, labels: Tensor, share: float, finished: Callable[[Segment], None]
    ) -> tuple[Segment, Callable[[], Tensor | None]]:
        """A micro-batch's forward. Returns what `_run` does."""
        offsets = iids.offsets()
        place = self._place(0, Sizes(len(iids.values()), len(offsets) - 1, iids._get_max_seqlen()))
        place.x_T.copy_(iids.values())
        place.labels_T.copy_(labels.values())
        place.offsets[: len(offsets)].copy_(offsets)
        place.offsets[len(offsets) :].fill_(place.sizes.T)
        self.routed, self.documents = [], len(offsets) - 1
        return self._run(place, share, finished)

    def stages(self) -> list[StageOutput]:
        """What the routers decided in the last micro-batch; to be read before the next writes to the same places."""
        found = []
        for place, enter in self.routed:
            _, _, p_T, _, b_T, _, _, F_, G = enter.outputs
            offsets = place.offsets[: self.documents + 1]
            p_Bj = nested_tensor_from_jagged(p_T[: place.tokens], offsets, min_seqlen=0, max_seqlen=place.sizes.M)
            found.append(StageOutput(p_Bj, nested_like(b_T[: place.tokens], p_Bj), F_, G))
        return found

    def _run(
        self, place: Place, share: float, finished: Callable[[Segment], None]
    ) -> tuple[Segment, Callable[[], Tensor | None]]:
        """The forward of a stage. Returns its last segment and its backward, which returns the gradient of its x_TD."""
        s, hnet = place.s, self.levels[place.s]
        x = place.x_TD if s else place.x_T
        if s == self.S:
            modules = hnet.pad_dimension, hnet.main_network
            inner = self._segment("inner", (place,), modules, lambda *at: self._inner(place, *at), [x])
            inner.forward()

            def back() -> Tensor | None:
                inner.backward()
                finished(inner)
                return inner.dinputs[0] if s else None

            return inner, back

        modules = hnet.pad_dimension, hnet.encoder, hnet.routing_module, hnet.residual_proj
        enter = self._segment("enter", (place,), modules, lambda *at: self._enter(place, *at), [x])
        enter.forward()
        x_TD, residual_TD, p_T, _, b_T, offsets, counts, _, _ = enter.outputs
        self.routed.append((place, enter))
        total, longest = counts.tolist()  # the one wait of a stage
        inside = self._place(s + 1, Sizes(total, place.sizes.B + 1, longest))
        kept_C = torch.nonzero_static(b_T, size=total).squeeze(1)
        inside.fill(x_TD, kept_C, offsets)
        _, inside_back = self._run(inside, share, finished)
        leaves = [x.detach().requires_grad_() for x in (residual_TD, p_T)]
        leave = self._segment(
            "leave", (place, inside), [hnet.decoder], lambda *at: self._leave(place, inside, b_T, *at),
            [inside.y_TD, *leaves],
        )  # fmt: skip
        leave.forward()

        def back() -> Tensor | None:
            leave.backward()
            finished(leave)
            dy_CD, dresidual_TD, dp_T = leave.dinputs
            inside.dy_TD.copy_(dy_CD)
            dinside_TD = inside_back()
            enter.doutputs[0].zero_().index_copy_(0, kept_C, dinside_TD[:total])
            enter.doutputs[1].copy_(dresidual_TD)
            enter.doutputs[2].copy_(dp_T)
            enter.doutputs[3].fill_(share * self.alpha)
            enter.backward()
            finished(enter)
            return enter.dinputs[0] if s else None

        return leave, back
