"""Generating with an H-Net: the model of hnet_trainable.py, run a byte at a time with caches (arXiv 2507.07955).

    bytes -> encoder -> router: does a chunk begin here? -> if so, the inner network -> smooth -> decoder -> next byte

`prefill` reads many bytes at once, `step` one byte; both leave a `Cache` with which either can go on. A batch holds
sequences of any lengths, and each cuts its own chunks: at every stage a sequence stands at a position of its own. In a
prefill shorter sequences are padded on the right; in a step every stage runs on the whole batch, and sequences for
which no chunk begins keep their state. So buffers have fixed shapes, no layer waits for the device, and a step copies
to the host once: the byte and who begins a chunk, after the last router and before the inner network, which can be
left out when nobody does.

The layers are those of hnet_trainable.py: its modules run on flat rows in generation as in training, and each mixer has
a `prefill` and a `step` of its own. Read in this order: caches, stages, HNetInference (prefill, step, weights borrowed
from training), sampling, UTF-8, generate.

Shape legend, as suffixes of names: B sequences, L new tokens of a stage (padded in a prefill, 1 in a step), K those of
the stage inside, D width, C channels of a convolution, H heads, P channels a head, N state size, W slots of a key-value
ring, R rotary dimensions / 2, V vocabulary, S number of chunking stages. "code" is github.com/goombalab/hnet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence

from hnet_kernels import Chunks, ema_forward
from hnet_kernels.generation import KVState, Span, even_documents, ring_slots, take
from hnet_trainable import BOS, EMA_CLAMP, EOS, HNet, HNetConfig, HNetLM, Isotropic, rotary_tables

TRAINED_LENGTH = 8192  # bytes of a training document in the paper's recipe; longer inputs get a warning


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ------------------------------------------------------------------------------------------------------------- caches


class GenerationError(RuntimeError):
    """A mixer that cannot generate."""


@dataclasses.dataclass
class StageState:
    """What one stage remembers of its tokens."""

    position_B: Tensor  # int64: tokens seen, so the position of the next one
    tokens: list[int]  # the same on the host
    layers: dict[nn.Module, Any]  # a state for each mixer
    dtype: torch.dtype  # that of the computation
    last_hidden_state_BD: Tensor | None = None  # the router's x_{t-1}; not innermost
    ema_BD: Tensor | None = None  # the smoothing's z of the chunk at hand, at least float32; not innermost
    tables: tuple[Tensor, Tensor] | None = None  # rotary, of as many positions as were reserved

    @classmethod
    def new(cls, stage: HNet, batch: int) -> StageState:
        stacks = [stack for stack in stage.children() if isinstance(stack, Isotropic)]
        mixers = [layer.mixer for stack in stacks for layer in stack.layers]
        for mixer in mixers:
            if lacks := [name for name in ("new_state", "prefill", "step") if not hasattr(mixer, name)]:
                raise GenerationError(
                    f"{type(mixer).__name__} trains, but cannot generate: it has no {' and no '.join(lacks)}"
                )
        some = stacks[0].rmsnorm.weight
        layers = {mixer: mixer.new_state(batch) for mixer in mixers}
        state = cls(some.new_zeros(batch, dtype=torch.int64), [0] * batch, layers, some.dtype)
        if not stage.is_innermost:
            state.last_hidden_state_BD = some.new_zeros(batch, len(some))
            state.ema_BD = some.new_zeros(batch, len(some), dtype=at_least_float32(some.dtype))
        return state

    def reserve(self, tokens: int, stage: HNet) -> None:
        """Room for so many tokens of each sequence."""
        if self.tables is None or len(self.tables[0]) < tokens:
            dtype = at_least_float32(self.dtype)
            self.tables = rotary_tables(ring_slots(tokens, -1), stage.rotary_dim, dtype, self.position_B.device)
        for layer in self.layers.values():
            if isinstance(layer, KVState):
                layer.reserve(tokens)

    def span(self, length_B: Tensor, L: int) -> Span:
        """L new tokens of each sequence, length_B of which are real."""
        offset_L = torch.arange(L, device=length_B.device)
        return Span(self.position_B.clone(), length_B, offset_L < length_B[:, None], max(self.tokens), *self.tables)

    def advance(self, tokens: Sequence[int | bool], tokens_B: Tensor) -> None:
        self.tokens = [old + new for old, new in zip(self.tokens, tokens)]
        self.position_B += tokens_B


class Continued(NamedTuple):
    """What generation hands to modules where training hands them a Packing: texts go on from a cache."""

    state: StageState
    span: Span
    is_step: bool

    def mix(self, mixer: nn.Module, x_TD: Tensor) -> Tensor:
        method = mixer.step if self.is_step else mixer.prefill
        return method(x_TD, self.state.layers[mixer], self.span)


class Rows(NamedTuple):
    """What the router needs of a Packing."""

    position_T: Tensor


@dataclasses.dataclass
class Cache:
    """All that a batch of sequences needs to go on; made by `HNetInference.new_cache`, changed in place by its calls.

    Its size in bytes, with c bytes per number of the compute dtype and a = 4 (8 in float64), is B times the sum of
        8                                                       for each stage: a position,
        (d_conv - 1) (expand D + 2 d_state) c + expand D d_state a   for each Mamba-2 layer,
        2 W D c                                                 for each attention layer,
        D c + D a                                               for each chunking stage: router and smoothing,
    where D is the stage's width and W = ring_slots(tokens, window): for n tokens seen by the longest sequence at that
    stage the next power of two from 64 on, at most window + 1. Only W grows, and only in layers of attention.
    """

    stages: list[StageState]

    @property
    def batch(self) -> int:
        return len(self.stages[0].tokens)

    def cache_bytes(self) -> int:
        """Bytes of all buffers on the device; the class's docstring has the formula."""
        tensors = [t for stage in self.stages for t in (stage.position_B, stage.last_hidden_state_BD, stage.ema_BD)]
        for layer in (layer for stage in self.stages for layer in stage.layers.values()):
            tensors += [t for t in vars(layer).values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors if t is not None)


# -------------------------------------------------------------------------------------------------------------- stages
#
# All that is computed for each token alone runs on flat rows, as in training: T = B L of them.


def route(stage: HNet, x_TD: Tensor, state: StageState, span: Span) -> Tensor:
    """p (B, L) of new tokens, each compared with the one before, of which the first is in the state."""
    B, L = span.shape
    x_BXD = torch.cat([state.last_hidden_state_BD[:, None], x_TD.unflatten(0, (B, L))], dim=1)
    state.last_hidden_state_BD.copy_(take(x_BXD, span.length_B[:, None])[:, 0])
    position_BX = span.start_B[:, None] + torch.arange(-1, L, device=x_TD.device)
    p_T = stage.routing_module(x_BXD.flatten(0, 1), Rows(position_BX.flatten()))
    return p_T.unflatten(0, (B, 1 + L))[:, 1:]


def smooth_prefill(y_BKD: Tensor, p_BL: Tensor, b_BL: Tensor, kept_BK: Tensor, state: StageState) -> Tensor:
    """Eq. 5 and 8: z_k = P_k y_k + (1 - P_k) z_{k-1}, and the z of its chunk for each of the L tokens."""
    B, K = kept_BK.shape
    z_BXD = state.ema_BD[:, None]  # X = 1 + K: tokens before the first new chunk still belong to the one before
    if K:
        P_BK = p_BL.gather(1, kept_BK).clamp(EMA_CLAMP, 1 - EMA_CLAMP)
        z_CD = ema_forward(y_BKD.flatten(0, 1), P_BK.flatten(), even_documents(B, K, y_BKD.device))
        carried_BK1 = torch.log1p(-P_BK).cumsum(1).exp()[..., None]
        z_BXD = torch.cat([z_BXD, z_CD.unflatten(0, (B, K)) + carried_BK1 * z_BXD], dim=1)
    z_BLD = take(z_BXD, b_BL.cumsum(1))
    state.ema_BD.copy_(z_BLD[:, -1])
    return z_BLD


def smooth_step(y_BD: Tensor, p_B: Tensor, b_B1: Tensor, state: StageState) -> None:
    P_B1 = p_B.clamp(EMA_CLAMP, 1 - EMA_CLAMP)[:, None]
    z_BD = P_B1 * y_BD.to(p_B.dtype) + (1 - P_B1) * state.ema_BD
    state.ema_BD.copy_(torch.where(b_B1, z_BD, state.ema_BD))


def leave(stage: HNet, z_TD: Tensor, p_BL: Tensor, b_BL: Tensor, x_TD: Tensor, how: Continued) -> Tensor:
    """Eq. 6 to 9, where each token has a z of its own, and the decoder."""
    each_T = torch.arange(len(z_TD), device=z_TD.device)
    chunks = Chunks(None, b_BL.flatten(), each_T, each_T, *[None] * 4)
    residual_TD = stage.residual_proj(x_TD)
    return stage.decode(stage.upsample(z_TD, p_BL.flatten(), chunks, residual_TD, x_TD.dtype), how)


# -------------------------------------------------------------------------------------------------------------- model


@dataclasses.dataclass
class Prefill:
    """What a prefill computed for every new byte; rows past a sequence's length are padding."""

    logits_BLV: Tensor
    lengths: list[int]  # new bytes of each sequence
    probabilities: list[Tensor]  # one a chunking stage: (B, its L), at least float32; K = 0 inside where no chunk began
    boundaries: list[Tensor]  # the same, bool; False on padding
    starts_BLS: Tensor  # bool: does this byte open a chunk of stage s; a chunk of s + 1 begins where one of s does
    cache: Cache

    def last_logits(self) -> Tensor:
        """(B, V): the next byte's logits of each sequence (meaningless for one that got no byte)."""
        last_B1 = torch.tensor(self.lengths).sub(1).clamp_min(0)[:, None].to(self.logits_BLV.device, non_blocking=True)
        return take(self.logits_BLV, last_B1)[:, 0]


@dataclasses.dataclass
class Step:
    """What one byte led to. The lists are on the host: they came with the step's only copy."""

    logits_BV: Tensor
    bytes: list[int]  # the byte that went in
    starts: list[tuple[bool, ...]]  # for each sequence: does the byte open a chunk of stage 0, 1, ...
    probabilities: list[Tensor]  # (B,) a stage, at least float32; meaningless where the stage was not active


class HNetInference(HNetLM):
    """The language model for generation: an HNetLM that reads texts piece by piece.

    Load a state dict (see `hnet_runtime.runs.weights`), or borrow the modules of a training model with `from_training`.
    """

    def __init__(self, config: HNetConfig):
        super().__init__(config)
        self._training_model: list[nn.Module] = []  # in a list, so that it is no submodule

    @property
    def stages(self) -> list[HNet]:
        """The S chunking stages, outermost first, then the innermost."""
        stages = [self.backbone]
        while not stages[-1].is_innermost:
            stages.append(stages[-1].main_network)
        return stages

    def new_cache(self, batch: int, max_len: int | Sequence[int] = 0) -> Cache:
        """A cache for `batch` sequences that have seen nothing. ValueError unless `batch` is 1 or more.

        `max_len` reserves for that many tokens a sequence, at every stage or given stage by stage: up to there buffers
        keep their size and place. Without it, or beyond, the rings of attention layers grow as they must.
        """
        if batch < 1:
            raise ValueError(f"batch: {batch}; expected 1 or more")
        cache = Cache([StageState.new(stage, batch) for stage in self.stages])
        for s, (stage, state) in enumerate(zip(self.stages, cache.stages)):
            state.reserve(max_len if isinstance(max_len, int) else max_len[s], stage)
        return cache

    @torch.no_grad()
    def prefill(self, iids: Tensor | Sequence[Tensor | bytes | Sequence[int]], cache: Cache | None = None) -> Prefill:
        """Read many bytes of B sequences at once, after what `cache` holds (None: from their beginnings).

        iids: an NJT (B, j) or a list of B sequences of byte values; BOS is the caller's. With a cache that has been
        used a sequence may be empty. The cache is changed in place and is part of what returns. One wait a stage.
        Raises ValueError for values outside the vocabulary, an empty beginning, or another batch size than the cache's.
        """
        rows = self._check(iids, cache)
        device = self.embeddings.weight.device
        cache, lengths = cache or self.new_cache(len(rows)), [len(row) for row in rows]
        byte_BL = pad_sequence(rows, batch_first=True).to(device, non_blocking=True)
        (B, L), tokens, x_TD = byte_BL.shape, lengths, self.embed(byte_BL.flatten())
        origin_BL = torch.arange(L, device=device).expand(B, L)  # the byte at which each token of the stage begins
        starts_BLS = torch.zeros(B, L, self.config.num_stages, dtype=torch.bool, device=device)
        probabilities, boundaries, way_back, y_TD = [], [], [], None
        for s, (stage, state) in enumerate(zip(self.stages, cache.stages)):
            if not len(x_TD):  # no chunk began: the stages inside have nothing to do
                probabilities += [] if stage.is_innermost else [probabilities[-1][:, :0]]
                boundaries += [] if stage.is_innermost else [boundaries[-1][:, :0]]
                continue
            tokens_B = torch.tensor(tokens).to(device, non_blocking=True)
            state.reserve(max(map(sum, zip(state.tokens, tokens))), stage)
            span = state.span(tokens_B, len(x_TD) // B)
            state.advance(tokens, tokens_B)
            how = Continued(state, span, is_step=False)
            if stage.is_innermost:
                y_TD = stage.run_innermost(x_TD, how)
                break
            x_TD = stage.encode(x_TD, how)
            p_BL = route(stage, x_TD, state, span)
            b_BL = stage.routing_module.opens(p_BL) & span.valid_BL
            tokens = b_BL.sum(1).tolist()  # the stage's only wait
            kept_BK = b_BL.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, : max(tokens)]
            starts_BLS[..., s].scatter_(1, origin_BL, b_BL)
            way_back.append((stage, how, x_TD, p_BL, b_BL, kept_BK))
            probabilities.append(p_BL)
            boundaries.append(b_BL)
            x_TD, origin_BL = take(x_TD.unflatten(0, span.shape), kept_BK).flatten(0, 1), origin_BL.gather(1, kept_BK)
        for stage, how, x_TD, p_BL, b_BL, kept_BK in reversed(way_back):
            y_BKD = None if y_TD is None else y_TD.unflatten(0, kept_BK.shape)
            z_BLD = smooth_prefill(y_BKD, p_BL, b_BL, kept_BK, how.state)
            y_TD = leave(stage, z_BLD.flatten(0, 1), p_BL, b_BL, x_TD, how)
        logits_BLV = self.head(y_TD).unflatten(0, (B, L))
        return Prefill(logits_BLV, lengths, probabilities, boundaries, starts_BLS, cache)

    @torch.no_grad()
    def step(self, byte_B: Tensor, cache: Cache, active: Sequence[bool] | None = None) -> Step:
        """Read one byte of each sequence, int64 (B,) on the model's device, and predict the next.

        Sequences that are False in `active` keep their state; their outputs mean nothing. Waits for the device once.
        """
        self._check_weights()
        active = [True] * cache.batch if active is None else list(active)
        if not len(byte_B) == len(active) == cache.batch:
            raise ValueError(f"step: {len(byte_B)} bytes, {len(active)} flags for a cache of {cache.batch} sequences")
        if not any(active):
            raise ValueError("active: every sequence is False; a step needs one that goes on")
        new_B = torch.tensor(active).to(byte_B.device, non_blocking=True).long()
        x_BD, way_back, probabilities, y_BD = self.embed(byte_B), [], [], None
        for stage, state in zip(self.stages, cache.stages):
            state.reserve(max(state.tokens) + 1, stage)
            how = Continued(state, state.span(new_B, 1), is_step=True)
            p_B1 = None
            if not stage.is_innermost:
                x_BD = stage.encode(x_BD, how)
                p_B1 = route(stage, x_BD, state, how.span)
                probabilities.append(p_B1[:, 0])
                new_B = (stage.routing_module.opens(p_B1) & how.span.valid_BL)[:, 0].long()
            way_back.append((stage, how, x_BD, p_B1))
        reached = torch.stack([byte_B, *(how.span.length_B for _, how, _, _ in way_back[1:])]).tolist()  # the only wait
        fed, reached = reached[0], [active, *([bool(b) for b in row] for row in reached[1:])]
        for s, (stage, how, x_BD, p_B1) in reversed(list(enumerate(way_back))):
            if not any(reached[s]):
                continue
            if stage.is_innermost:
                y_BD = stage.run_innermost(x_BD, how)
            else:
                opens_B1 = way_back[s + 1][1].span.valid_BL
                if any(reached[s + 1]):
                    smooth_step(y_BD, p_B1[:, 0], opens_B1, how.state)
                y_BD = leave(stage, how.state.ema_BD, p_B1, opens_B1, x_BD, how)
            how.state.advance(reached[s], how.span.length_B)
        starts = list(zip(*reached[1:])) if reached[1:] else [()] * cache.batch
        return Step(self.head(y_BD), fed, starts, probabilities)

    def _check(self, iids, cache: Cache | None) -> list[Tensor]:
        self._check_weights()
        nested = isinstance(iids, Tensor) and iids.is_nested
        rows = [torch.as_tensor(list(r) if isinstance(r, bytes) else r) for r in (iids.unbind() if nested else iids)]
        if not rows or (cache is not None and cache.batch != len(rows)):
            raise ValueError(f"iids: {len(rows)} sequences; expected {cache.batch if cache else '1 or more'}")
        for b, row in enumerate(rows):
            if row.ndim != 1 or (len(row) and (row.is_floating_point() or row.dtype == torch.bool)):
                raise ValueError(f"iids: sequence {b} is {row.dtype} {tuple(row.shape)}; expected whole numbers (j,)")
            if not len(row) and (cache is None or not cache.stages[0].tokens[b]):
                raise ValueError(f"iids: sequence {b} is empty; it must begin with at least one byte (BOS is {BOS})")
            if len(row) and not 0 <= int(row.min()) <= int(row.max()) < self.config.vocab_size:
                raise ValueError(f"iids: sequence {b} has values outside 0..{self.config.vocab_size - 1}")
        if not any(map(len, rows)):
            raise ValueError("iids: every sequence is empty; nothing to read")
        return [row.to(torch.int64) for row in rows]

    # ------------------------------------------------------------------------- weights borrowed from a training model

    @classmethod
    def from_training(cls, model: HNetLM) -> HNetInference:
        """An inference model whose parameters *are* those of the HNetLM `model`: no memory, and always up to date.

        Its modules are those of `model`, too. But where that is sharded (FSDP2) they are other ones, which only have
        its whole weights inside `with inference.unsharded():`.
        """
        with torch.device("meta"):
            inference = cls(model.config)
        inference._training_model.append(model)
        if not any(isinstance(module, FSDPModule) for module in model.modules()):
            for name, child in model.named_children():
                setattr(inference, name, child)
        inference._point_to_training()
        return inference

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[HNetInference]:
        """While inside, the parameters are the gathered weights of the sharded model that `from_training` got.

        Every rank must enter and leave (both gather and release); what happens inside needs no other rank. The weights
        have the dtype in which training computes. Does nothing where the model is not sharded or none was borrowed.
        """
        modules = self._training_model[0].modules() if self._training_model else []
        sharded = [module for module in modules if isinstance(module, FSDPModule)]
        try:
            for module in sharded:
                module.unshard()
            self._point_to_training()
            yield self
        finally:
            for module in sharded:
                module.reshard()
            self._point_to_training()

    def _point_to_training(self) -> None:
        for model in self._training_model:
            modules = dict(self.named_modules(remove_duplicate=False))
            for name, parameter in model.named_parameters(remove_duplicate=False):
                place, _, leaf = name.rpartition(".")
                modules[place]._parameters[leaf] = parameter

    def _check_weights(self) -> None:
        if hasattr(self.embeddings.weight, "device_mesh"):
            raise RuntimeError("the training model is sharded: generate inside `with inference.unsharded():`")
        if self.embeddings.weight.is_meta:
            raise RuntimeError("the model has no weights yet: load a checkpoint or use HNetInference.from_training")


# ----------------------------------------------------------------------------------------------------------- sampling


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next byte is drawn. Every filter looks at the same distribution, softmax(logits / temperature).

    temperature: 0 takes the most likely byte, exactly. top_k: only the k most likely (0: all). top_p: only the fewest
    most likely that together reach p. min_p: only those at least min_p times as likely as the most likely one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature: {self.temperature}; expected 0 (the most likely byte) or more")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k: {self.top_k}; expected a whole number, 0 for all bytes")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}; expected more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: {self.min_p}; expected 0 to 1")

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, allowed_BV: Tensor | None = None) -> Tensor:
        """One byte per row, int64 (B,). `uniform_B`: float64 in [0, 1 - 2^-24]; `allowed_BV`: what may be drawn.

        Inverts the cumulative distribution in the order of the bytes, so a draw depends on its own row alone.
        """
        logits_BV = logits_BV[:, :256].double()
        if allowed_BV is not None:
            logits_BV = logits_BV.masked_fill(~allowed_BV, -torch.inf)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        highest_B1 = logits_BV.amax(-1, keepdim=True)
        prob_BV = ((logits_BV - highest_B1) / self.temperature).softmax(-1)
        sorted_BV, order_BV = prob_BV.sort(dim=-1, descending=True, stable=True)
        keep_BV = sorted_BV >= self.min_p * sorted_BV[:, :1]
        if self.top_p < 1:
            keep_BV &= sorted_BV.cumsum(-1) - sorted_BV < self.top_p
        if self.top_k:
            keep_BV[:, self.top_k :] = False
        keep_BV[:, 0] = True
        prob_BV = torch.zeros_like(prob_BV).scatter_(1, order_BV, sorted_BV * keep_BV)
        sum_BV = prob_BV.cumsum(-1)
        return (sum_BV <= uniform_B[:, None] * sum_BV[:, -1:]).sum(-1)


# -------------------------------------------------------------------------------------------------------------- UTF-8
#
# An automaton over bytes (the table of well-formed sequences in the Unicode standard, section 3.9): state 0 is between
# characters, 1 to 3 wait for that many continuation bytes, 4 to 7 for those after E0, ED, F0 and F4, which rule out
# overlong forms, surrogates and what lies past U+10FFFF.

UTF8_MISSING = torch.tensor([0, 1, 2, 3, 2, 2, 3, 3])  # bytes to the end of the character


def _utf8_next() -> Tensor:
    """int64 (8, 256): the state after a byte, -1 where the byte cannot come."""
    table = torch.full((8, 256), -1)
    leads = [(0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEF, 2), (0xED, 0xED, 5)]
    leads += [(0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7)]
    continuations = {1: (0x80, 0xBF, 0), 2: (0x80, 0xBF, 1), 3: (0x80, 0xBF, 2), 4: (0xA0, 0xBF, 1)}
    continuations |= {5: (0x80, 0x9F, 1), 6: (0x90, 0xBF, 2), 7: (0x80, 0x8F, 2)}
    for state, first, last, then in [(0, *lead) for lead in leads] + [(s, *row) for s, row in continuations.items()]:
        table[state, first : last + 1] = then
    return table


UTF8_NEXT = _utf8_next()


def utf8_state(data: bytes) -> int:
    """The automaton's state after `data`; what is not UTF-8 is skipped, a character cut off at the end is awaited."""
    state = 0
    for byte in data[-3:]:  # a character that is cut off has at most three
        state = int(UTF8_NEXT[state, byte])
        state = max(int(UTF8_NEXT[0, byte]), 0) if state < 0 else state
    return state


class Utf8Guard:
    """Which bytes may come next in each of B sequences so that their text decodes, cut after `bytes_left` more bytes.

    EOS may come between characters, if `eos`. Nothing here waits for the device.
    """

    def __init__(self, states: Sequence[int], eos: bool, device: torch.device):
        self.state_B, self.next = torch.tensor(states).to(device), UTF8_NEXT.to(device)
        missing = torch.where(UTF8_NEXT >= 0, UTF8_MISSING[UTF8_NEXT], 9)
        allowed = torch.stack([missing < left for left in range(5)])  # by bytes left, this one included; 4 is plenty
        allowed[1:, 0, EOS] = eos
        self.allowed = allowed.to(device)

    def mask(self, bytes_left: int) -> Tensor:
        """bool (B, 256)."""
        return self.allowed[min(bytes_left, 4)][self.state_B]

    def feed(self, byte_B: Tensor) -> None:
        self.state_B = self.next[self.state_B, byte_B].clamp_min(0)


# ----------------------------------------------------------------------------------------------------------- generate


class Emitted(NamedTuple):
    """One byte of a stream, with whether it opens a chunk of each chunking stage, outermost first."""

    sequence: int
    byte: int
    starts: tuple[bool, ...]


@dataclasses.dataclass
class Generation:
    """A finished text: `starts` has one entry for each byte of prompt and continuation (see Emitted)."""

    prompt: bytes
    continuation: bytes = b""
    starts: list[tuple[bool, ...]] = dataclasses.field(default_factory=list)

    @property
    def data(self) -> bytes:
        return self.prompt + self.continuation

    @property
    def text(self) -> str:
        return self.data.decode(errors="replace")


class Noise:
    """Uniform numbers in [0, 1 - 2^-24] for each sequence from a generator of its own, so independent of the batch."""

    BLOCK = 256  # numbers drawn at a time

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators, self.device, self.drawn = [torch.Generator().manual_seed(s) for s in seeds], device, 0

    def next(self) -> Tensor:
        """float64 (B,)."""
        if self.drawn % self.BLOCK == 0:
            block_XB = torch.stack([torch.rand(self.BLOCK, generator=g) for g in self.generators], dim=1)
            self.block_XB = block_XB.double().to(self.device, non_blocking=True)
        self.drawn += 1
        return self.block_XB[(self.drawn - 1) % self.BLOCK]


def as_bytes(prompt: str | bytes) -> bytes:
    """A prompt's bytes. ValueError for a str that UTF-8 cannot hold (lone surrogates)."""
    if isinstance(prompt, bytes):
        return prompt
    try:
        return prompt.encode()
    except UnicodeEncodeError as error:
        found = prompt[error.start]
        raise ValueError(f"prompt: character {error.start} ({found!r}) is no text; pass raw bytes as bytes") from None


def stream(
    model: HNetInference,
    prompts: Sequence[str | bytes],
    max_bytes: int = 256,
    sampling: Sampling = Sampling(),
    seed: int | Sequence[int] = 0,
    valid_utf8: bool = False,
    stop_at_eos: bool = True,
    echo: bool = False,
) -> Iterator[Emitted]:
    """Continue each prompt by up to `max_bytes` bytes; yields them as they are decided, sequence by sequence.

    BOS goes before each prompt; an empty one is BOS alone. Sequence b draws from its own generator, seeded with
    seed[b] (seed + b for a single number), so that it gets the same bytes in any batch. A sequence ends at EOS, which
    is not yielded, unless `stop_at_eos` is False. With `valid_utf8` prompt and continuation together are UTF-8, also
    where `max_bytes` ends it (if the prompt is, but for a character cut off at its end, which is completed).
    `echo` yields the prompts' bytes first.

    Raises ValueError for no prompt, max_bytes < 1 or too few to complete a character, or a wrong number of seeds; warns
    of lengths beyond TRAINED_LENGTH.
    """
    data = [as_bytes(prompt) for prompt in prompts]
    seeds = [seed + b for b in range(len(data))] if isinstance(seed, int) else list(seed)
    if not data or len(seeds) != len(data):
        raise ValueError(
            f"prompts: {len(data)} with {len(seeds)} seeds; expected at least one prompt and a seed for each"
        )
    states = [utf8_state(prompt) if valid_utf8 else 0 for prompt in data]
    least = max(1, *(int(UTF8_MISSING[state]) for state in states))
    if max_bytes < least:
        why = "expected 1 or more" if least == 1 else f"a prompt ends in a character that needs {least} more"
        raise ValueError(f"max_bytes: {max_bytes}; {why}")
    longest = max(map(len, data))
    if longest + max_bytes > TRAINED_LENGTH:
        warnings.warn(
            f"a prompt of {longest} bytes and {max_bytes} more exceed the {TRAINED_LENGTH} that H-Nets are trained on; "
            "expect worse text",
            stacklevel=2,
        )
    return _stream(model, data, max_bytes, sampling, seeds, states if valid_utf8 else None, stop_at_eos, echo)


def _stream(model, data, max_bytes, sampling, seeds, utf8_states, stop_at_eos, echo) -> Iterator[Emitted]:
    first = model.prefill([bytes([BOS]) + prompt for prompt in data])
    if echo:
        for b, prompt in enumerate(data):
            for byte, starts in zip(prompt, first.starts_BLS[b, 1:].tolist()):
                yield Emitted(b, byte, tuple(starts))
    logits_BV, cache, active = first.last_logits(), first.cache, [True] * len(data)
    guard = None if utf8_states is None else Utf8Guard(utf8_states, stop_at_eos, logits_BV.device)
    noise = Noise(seeds, logits_BV.device)
    for n in range(max_bytes):
        byte_B = sampling.draw(logits_BV, noise.next(), guard and guard.mask(max_bytes - n))
        if guard:
            guard.feed(byte_B)
        out = model.step(byte_B, cache, active)
        logits_BV = out.logits_BV
        for b in [b for b, goes_on in enumerate(active) if goes_on]:
            active[b] = not (stop_at_eos and out.bytes[b] == EOS)
            if active[b]:
                yield Emitted(b, out.bytes[b], out.starts[b])
        if not any(active):
            return


def generate(model: HNetInference, prompts: Sequence[str | bytes], **options) -> list[Generation]:
    """`stream` with the same options, collected: a Generation per prompt, with the chunk starts of prompt and rest."""
    done = [Generation(as_bytes(prompt)) for prompt in prompts]
    for emitted in stream(model, prompts, **{**options, "echo": True}):
        generation = done[emitted.sequence]
        if len(generation.starts) >= len(generation.prompt):
            generation.continuation += bytes([emitted.byte])
        generation.starts.append(emitted.starts)
    return done
