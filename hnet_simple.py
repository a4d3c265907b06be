"""Generating with an H-Net: the model of hnet_trainable.py, run a byte at a time with caches (arXiv 2507.07955).

    bytes -> encoder -> router: does a chunk begin here? -> if so, the inner network -> smooth -> decoder -> next byte

`prefill` reads many bytes at once, `step` reads one byte. Both continue from a `Cache` and update it. A batch holds
sequences of any lengths, and each has its own chunks, so its position differs from the others' at every stage. In a
prefill, shorter sequences are padded on the right. In a step, every stage runs on all sequences, and those for which no
chunk begins keep their state. So buffers have fixed shapes, and no layer waits for the device.

hnet_decoder.py repeats steps, with many texts in one batch and on a GPU as CUDA graphs: `generate` and `stream`.

The layers are those of hnet_trainable.py: its modules run on flat rows in generation as in training, and each mixer has
a `prefill` and a `step` of its own. Read in this order: caches, stages, HNetInference (prefill, step, weights borrowed
from training), sampling.

Shape legend, as suffixes of names: B sequences, L new tokens of a stage (padded in a prefill, 1 in a step), K those of
the stage inside, X = 1 + L or 1 + K: the token before, then the new ones; T rows (B L or B X), C chunks (B K), D width,
H heads, P channels per head, W slots of a key-value ring, V vocabulary, S stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hnet_kernels import Chunks, ema_forward
from hnet_kernels.generation import KVState, Span, even_documents, ring_slots, take
from hnet_kernels.sampling import draw
from hnet_trainable import BOS, EMA_CLAMP, HNet, HNetConfig, HNetLM, Isotropic, rotary_tables

TRAINED_LENGTH = 8192  # bytes of a training document in the paper's recipe; longer inputs get a warning


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ------------------------------------------------------------------------------------------------------------- caches


class GenerationError(RuntimeError):
    """A model cannot generate. The message names the reason: a mixer, a router, or the memory of the GPU."""


def why_no_generation(config: HNetConfig) -> str | None:
    """The reason why no model of this config can generate, or None. Routers must not need later bytes or `cuts`."""
    for s in sorted({*config.stages_not_causal, *config.stages_by_cuts}):
        why = "depends on later bytes" if s in config.stages_not_causal else "is told by the caller where chunks begin"
        return f"the model cannot generate: the router {config.routers[s]} of stage {s} {why}"
    return None


@dataclasses.dataclass
class StageState:
    """What one stage stores of the tokens that it has read."""

    position_B: Tensor  # int64: the number of tokens read, which is the position of the next one
    tokens: list[int]  # the same on the host
    layers: dict[nn.Module, Any]  # the state of each mixer
    dtype: torch.dtype  # the compute dtype
    last_hidden_state_BD: Tensor | None = None  # the router's x_{t-1}; not innermost
    ema_BD: Tensor | None = None  # z of the current chunk (eq. 5), at least float32; not innermost
    last_byte_B: Tensor | None = None  # int64, the byte before, for a router that reads bytes
    tables: tuple[Tensor, Tensor] | None = None  # rotary tables of the reserved positions

    @classmethod
    def new(cls, stage: HNet, batch: int) -> StageState:
        parts = [part for part in stage.children() if not isinstance(part, HNet)]
        stacks = [stack for part in parts for stack in part.modules() if isinstance(stack, Isotropic)]
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
            if stage.routing_module.reads_bytes:
                state.last_byte_B = some.new_zeros(batch, dtype=torch.int64)
        return state

    def reserve(self, tokens: int, stage: HNet) -> None:
        """Allocates space for so many tokens of each sequence."""
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

    def step_span(self, new_B1: Tensor) -> Span:
        """One new token of each sequence where new_B1 is True."""
        return Span(self.position_B, new_B1[:, 0].long(), new_B1, max(self.tokens), *self.tables)

    def add_tokens(self, tokens: Sequence[int | bool]) -> None:
        """Adds to the number of tokens of each sequence, on the host."""
        self.tokens = [old + new for old, new in zip(self.tokens, tokens)]

    def tensors(self) -> list[Tensor]:
        """All buffers with a row for each sequence; the rotary tables have none."""
        layers = [t for layer in self.layers.values() for t in vars(layer).values() if isinstance(t, Tensor)]
        own = self.position_B, self.last_hidden_state_BD, self.ema_BD, self.last_byte_B
        return [t for t in (*own, *layers) if t is not None]

    def bytes_of(self, tokens: int) -> int:
        """The bytes on the device that one sequence of so many tokens takes."""
        rings = [layer for layer in self.layers.values() if isinstance(layer, KVState)]
        key_bytes = [ring.k_BWHP.element_size() * math.prod(ring.k_BWHP.shape[2:]) for ring in rings]
        of_rings = sum(2 * size * ring_slots(tokens, ring.window) for ring, size in zip(rings, key_bytes))
        return of_rings + sum(t[:1].nbytes for t in self._but_rings())

    def reset(self) -> None:
        """Forgets all tokens. Key-value rings keep their contents, which no token can see any more."""
        self.tokens = [0] * len(self.tokens)
        torch._foreach_zero_(self._but_rings())

    def _but_rings(self) -> list[Tensor]:
        rings = {id(t) for layer in self.layers.values() if isinstance(layer, KVState) for t in vars(layer).values()}
        return [t for t in self.tensors() if id(t) not in rings]

    def replace(self, rows: Sequence[int], other: StageState, tokens: Sequence[int]) -> None:
        """Replaces the sequences in `rows` by the first ones of `other`, which have read `tokens` tokens.

        Call `reserve` for as many tokens before.
        """
        rows_B = torch.tensor(rows).to(self.position_B.device, non_blocking=True)
        for mine, theirs in zip(self.tensors(), other.tensors()):
            if theirs.ndim == 1:
                mine[rows_B] = theirs[: len(rows)]
            else:  # rings may differ in their slots: the shorter one is not full yet
                both = min(mine.shape[1], theirs.shape[1])
                mine[rows_B, :both] = theirs[: len(rows), :both]
        for row, n in zip(rows, tokens):
            self.tokens[row] = n


class Continued(NamedTuple):
    """Takes the place of a Packing in generation: mixers continue each sequence from its state in a cache."""

    state: StageState
    span: Span
    is_step: bool

    def mix(self, mixer: nn.Module, x_TD: Tensor) -> Tensor:
        method = mixer.step if self.is_step else mixer.prefill
        return method(x_TD, self.state.layers[mixer], self.span)


class Rows(NamedTuple):
    """What the router needs of a Packing."""

    position_T: Tensor
    byte_T: Tensor | None  # only for a router that reads bytes


@dataclasses.dataclass
class Cache:
    """The state of a batch of sequences. `HNetInference.new_cache` makes it; `prefill` and `step` change it in place.

    Its size in bytes, with c bytes per element of the compute dtype and a = 4 (8 in float64), is B times the sum of
        8                                                       for each stage: a position,
        (d_conv - 1) (expand D + 2 d_state) c + expand D d_state a   for each Mamba-2 layer,
        2 W D c                                                 for each attention layer,
        D c + D a                                               for each chunking stage: router and smoothing,
        8                                                       for a router that reads bytes: the last one,
    where D is the stage's width and W = ring_slots(tokens, window): for n tokens seen by the longest sequence at that
    stage the next power of two from 64 on, at most window + 1. Only W grows, and only in layers of attention.
    """

    stages: list[StageState]

    @property
    def batch(self) -> int:
        return len(self.stages[0].tokens)

    def cache_bytes(self) -> int:
        """Bytes of all buffers on the device; the class's docstring has the formula."""
        return sum(t.nbytes for stage in self.stages for t in stage.tensors())


# -------------------------------------------------------------------------------------------------------------- stages
#
# What is computed for each token alone runs on flat rows, T = B L of them, as in training.


def route(stage: HNet, x_TD: Tensor, state: StageState, span: Span, byte_BL: Tensor) -> Tensor:
    """p (B, L) of new tokens. Each is compared with the token before it; that of the first is in the state.

    byte_BL: the new bytes; only stage 0 uses them.
    """
    (B, L), byte_T = span.shape, None
    x_BXD = torch.cat([state.last_hidden_state_BD[:, None], x_TD.unflatten(0, (B, L))], dim=1)
    state.last_hidden_state_BD.copy_(take(x_BXD, span.length_B[:, None])[:, 0])
    position_BX = span.start_B[:, None] + torch.arange(-1, L, device=x_TD.device)
    if state.last_byte_B is not None:
        byte_BX = torch.cat([state.last_byte_B[:, None], byte_BL], dim=1)
        state.last_byte_B.copy_(byte_BX.gather(1, span.length_B[:, None])[:, 0])
        byte_T = byte_BX.flatten()
    p_T = stage.routing_module(x_BXD.flatten(0, 1), Rows(position_BX.flatten(), byte_T))
    return p_T.unflatten(0, (B, 1 + L))[:, 1:]


class Reading(NamedTuple):
    """L new tokens of each sequence in a prefill, between the encoder and the decoder of a stage."""

    x_TD: Tensor
    p_BL: Tensor
    b_BL: Tensor  # bool: does it open a chunk? False on padding
    first_BL: Tensor  # int64: the tokens that open chunks, in their order, then the others
    how: Continued

    def chunks(self, K: int) -> Tensor:
        """The tokens that open chunks, padded to K of each sequence: (B K, D)."""
        return take(self.x_TD.unflatten(0, self.p_BL.shape), self.first_BL[:, :K]).flatten(0, 1)


def enter_prefill(stage: HNet, state: StageState, x_TD: Tensor, length_B: Tensor, byte_BL: Tensor) -> Reading:
    """Encoder and router for length_B[b] new tokens of each sequence, padded to T / B. byte_BL: as in `route`."""
    how = Continued(state, state.span(length_B, len(x_TD) // len(length_B)), is_step=False)
    x_TD = stage.encode(x_TD, how)
    p_BL = route(stage, x_TD, state, how.span, byte_BL)
    b_BL = stage.routing_module.opens(p_BL) & how.span.valid_BL
    state.position_B += length_B
    return Reading(x_TD, p_BL, b_BL, b_BL.logical_not().to(torch.int8).argsort(dim=1, stable=True), how)


def chunk_starts(readings: Sequence[Reading], byte_BL: Tensor, S: int) -> Tensor:
    """bool (B, L, S): does this byte open a chunk of stage s? readings: those of the stages that got tokens."""
    starts_BLS = torch.zeros(*byte_BL.shape, S, dtype=torch.bool, device=byte_BL.device)
    origin_BL = torch.arange(byte_BL.shape[1], device=byte_BL.device).expand_as(byte_BL)  # each token's first byte
    for s, reading in enumerate(readings):
        origin_BL = origin_BL[:, : reading.b_BL.shape[1]]
        starts_BLS[..., s].scatter_(1, origin_BL, reading.b_BL)
        origin_BL = origin_BL.gather(1, reading.first_BL)
    return starts_BLS


def inner_prefill(stage: HNet, state: StageState, x_TD: Tensor, length_B: Tensor) -> Tensor:
    """The innermost stage for length_B[b] new tokens of each sequence, padded to T / B."""
    y_TD = stage.run_innermost(x_TD, Continued(state, state.span(length_B, len(x_TD) // len(length_B)), is_step=False))
    state.position_B += length_B
    return y_TD


def leave_prefill(stage: HNet, reading: Reading, y_TD: Tensor | None) -> Tensor:
    """Smoothing, upsampling and decoder. y_TD: the inner network's output (B K, D); None where no chunk began."""
    (B, _), state = reading.p_BL.shape, reading.how.state
    kept_BK = reading.first_BL[:, : 0 if y_TD is None else len(y_TD) // B]
    y_BKD = None if y_TD is None else y_TD.unflatten(0, kept_BK.shape)
    z_BLD = smooth_prefill(y_BKD, reading.p_BL, reading.b_BL, kept_BK, state)
    return leave(stage, z_BLD.flatten(0, 1), reading.p_BL, reading.b_BL, reading.x_TD, reading.how)


def smooth_prefill(y_BKD: Tensor, p_BL: Tensor, b_BL: Tensor, kept_BK: Tensor, state: StageState) -> Tensor:
    """Eq. 5 and 8: z_k = P_k y_k + (1 - P_k) z_{k-1}; returns (B, L, D), for each new token the z of its chunk."""
    B, K = kept_BK.shape
    z_BXD = state.ema_BD[:, None]  # X = 1 + K: tokens before the first new chunk belong to the chunk before
    if K:
        P_BK = p_BL.gather(1, kept_BK).clamp(EMA_CLAMP, 1 - EMA_CLAMP)
        z_CD = ema_forward(y_BKD.flatten(0, 1), P_BK.flatten(), even_documents(B, K, y_BKD.device))
        carried_BK1 = torch.log1p(-P_BK).cumsum(1).exp()[..., None]
        z_BXD = torch.cat([z_BXD, z_CD.unflatten(0, (B, K)) + carried_BK1 * z_BXD], dim=1)
    z_BLD = take(z_BXD, b_BL.cumsum(1))
    state.ema_BD.copy_(z_BLD[:, -1])
    return z_BLD


def leave(stage: HNet, z_TD: Tensor, p_BL: Tensor, b_BL: Tensor, x_TD: Tensor, how: Continued) -> Tensor:
    """Eq. 6 to 9 and the decoder. z_TD: for each token the z of its chunk."""
    each_T = torch.arange(len(z_TD), device=z_TD.device)
    chunks = Chunks(None, b_BL.flatten(), each_T, each_T, *[None] * 4)
    residual_TD = stage.residual_proj(x_TD)
    return stage.decode(stage.upsample(z_TD, p_BL.flatten(), chunks, residual_TD, x_TD.dtype), how)


class Token(NamedTuple):
    """A new token of each sequence in a step, between the encoder and the decoder of a stage."""

    x_BD: Tensor
    p_B1: Tensor
    opens_B1: Tensor  # bool: does it open a chunk?
    how: Continued


def enter_step(stage: HNet, state: StageState, x_BD: Tensor, new_B1: Tensor, byte_B: Tensor) -> Token:
    """Encoder and router for one new token of each sequence where new_B1 is True. byte_B: as in `route`."""
    how = Continued(state, state.step_span(new_B1), is_step=True)
    x_BD = stage.encode(x_BD, how)
    last_BD, start_B = state.last_hidden_state_BD, state.position_B
    x_TD = torch.stack([last_BD, x_BD], dim=1).flatten(0, 1)  # each token behind the one before it
    byte_T, last_B = None, state.last_byte_B
    if last_B is not None:
        byte_T = torch.stack([last_B, byte_B], dim=1).flatten()
        torch.where(new_B1[:, 0], byte_B, last_B, out=last_B)
    p_T = stage.routing_module(x_TD, Rows(start_B[:, None].expand(-1, 2).flatten(), byte_T))
    torch.where(new_B1, x_BD, last_BD, out=last_BD)
    p_B1 = p_T[1::2, None]
    return Token(x_BD, p_B1, stage.routing_module.opens(p_B1) & new_B1, how)


def inner_step(stage: HNet, state: StageState, x_BD: Tensor, new_B1: Tensor) -> Tensor:
    """The innermost stage for one new token of each sequence where new_B1 is True."""
    return stage.run_innermost(x_BD, Continued(state, state.step_span(new_B1), is_step=True))


def smooth_step(y_BD: Tensor, token: Token) -> None:
    """Eq. 5 where a chunk begins: updates the stage's z, (B, D)."""
    z_BD, P_B1 = token.how.state.ema_BD, token.p_B1.clamp(EMA_CLAMP, 1 - EMA_CLAMP)
    torch.where(token.opens_B1, P_B1 * y_BD.to(P_B1.dtype) + (1 - P_B1) * z_BD, z_BD, out=z_BD)


def leave_step(stage: HNet, token: Token) -> Tensor:
    """Upsampling and decoder, after `smooth_step`: the stage's z is that of the current chunk."""
    return leave(stage, token.how.state.ema_BD, token.p_B1, token.opens_B1, token.x_BD, token.how)


# -------------------------------------------------------------------------------------------------------------- model


@dataclasses.dataclass
class Prefill:
    """What a prefill computed for every new byte; rows past a sequence's length are padding."""

    logits_BLV: Tensor
    lengths: list[int]  # new bytes of each sequence
    probabilities: list[Tensor]  # of each stage: (B, its L), at least float32; (B, 0) where no chunk reached it
    boundaries: list[Tensor]  # the same, bool; False on padding
    starts_BLS: Tensor  # bool: does this byte open a chunk of stage s; a chunk of s + 1 begins where one of s does
    cache: Cache

    def last_logits(self) -> Tensor:
        """(B, V): the next byte's logits of each sequence (meaningless for one that got no byte)."""
        last_B1 = torch.tensor(self.lengths).sub(1).clamp_min(0)[:, None].to(self.logits_BLV.device, non_blocking=True)
        return take(self.logits_BLV, last_B1)[:, 0]


@dataclasses.dataclass
class Step:
    """The result of one byte. `bytes` and `starts` are on the host; one copy brought both."""

    logits_BV: Tensor
    bytes: list[int]  # the byte that went in
    starts: list[tuple[bool, ...]]  # for each sequence: does the byte open a chunk of stage 0, 1, ...
    probabilities: list[Tensor]  # (B,) a stage, at least float32; meaningless where the stage was not active


def gathers_weights(module: nn.Module) -> bool:
    """Whether FSDP2 gathers weights for the module (FSDPModule, a class whose import takes a second or two)."""
    return hasattr(module, "unshard")


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

        Raises GenerationError for a config whose routers cannot generate.
        """
        if batch < 1:
            raise ValueError(f"batch: {batch}; expected 1 or more")
        if reason := why_no_generation(self.config):
            raise GenerationError(reason)
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
        device = next(self.parameters()).device
        cache, lengths = cache or self.new_cache(len(rows)), [len(row) for row in rows]
        byte_BL = pad_sequence(rows, batch_first=True).to(device, non_blocking=True)
        (B, L), tokens, x_TD = byte_BL.shape, lengths, self.embed(byte_BL.flatten())
        readings, y_TD = [], None
        for stage, state in zip(self.stages, cache.stages):
            if not len(x_TD):  # no chunk began: the stages inside have nothing to do
                break
            tokens_B = torch.tensor(tokens).to(device, non_blocking=True)
            state.reserve(max(map(sum, zip(state.tokens, tokens))), stage)
            if stage.is_innermost:
                y_TD = inner_prefill(stage, state, x_TD, tokens_B)
                state.add_tokens(tokens)
                break
            readings.append(reading := enter_prefill(stage, state, x_TD, tokens_B, byte_BL))
            state.add_tokens(tokens)
            tokens = reading.b_BL.sum(1).tolist()  # the stage's only wait
            x_TD = reading.chunks(max(tokens))
        for stage, reading in reversed(list(zip(self.stages, readings))):
            y_TD = leave_prefill(stage, reading, y_TD)
        logits_BLV = self.head(y_TD).unflatten(0, (B, L))
        starts_BLS = chunk_starts(readings, byte_BL, self.config.num_stages)
        probabilities, boundaries = ([r[i] for r in readings] for i in (1, 2))
        for _ in range(len(readings), self.config.num_stages):  # stages that got nothing
            probabilities.append(probabilities[-1][:, :0])
            boundaries.append(boundaries[-1][:, :0])
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
        new_B1 = torch.tensor(active).to(byte_B.device, non_blocking=True)[:, None]
        for stage, state in zip(self.stages, cache.stages):
            state.reserve(max(state.tokens) + 1, stage)
        *outer, innermost = zip(self.stages, cache.stages)
        x_BD, news, tokens = self.embed(byte_B), [new_B1], []
        for stage, state in outer:
            tokens.append(enter_step(stage, state, x_BD, news[-1], byte_B))
            x_BD, _, opens_B1, _ = tokens[-1]
            news.append(opens_B1)
        fed, *opens = torch.stack([byte_B, *(new_B1[:, 0] for new_B1 in news[1:])]).tolist()  # the only wait
        reached = [active, *([bool(b) for b in row] for row in opens)]
        if any(reached[-1]):
            y_BD = inner_step(*innermost, x_BD, news[-1])
        for s in reversed(range(len(outer))):
            if any(reached[s + 1]):
                smooth_step(y_BD, tokens[s])
            if any(reached[s]):
                y_BD = leave_step(outer[s][0], tokens[s])
        for state, new, new_B1 in zip(cache.stages, reached, news):
            state.add_tokens(new)
            state.position_B += new_B1[:, 0]
        starts = list(zip(*reached[1:])) if reached[1:] else [()] * cache.batch
        return Step(self.head(y_BD), fed, starts, [token.p_B1[:, 0] for token in tokens])

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
        """An inference model whose weights and buffers *are* those of the HNetLM `model`: always up to date.

        Its modules are those of `model`, too. But where that is sharded (FSDP2) they are other ones, with unsharded
        weights only inside `with inference.unsharded():`. Raises GenerationError for a subclass that `own` names.
        """
        own = [name for name in ("forward", "embed", "head") if getattr(type(model), name) is not getattr(HNetLM, name)]
        if own:
            raise GenerationError(f"{type(model).__name__} has its own {own[0]}, which generation would not call")
        with torch.device("meta"):
            inference = cls(model.config)
        inference._training_model.append(model)
        if not any(map(gathers_weights, model.modules())):
            inference._modules.update(model._modules)
        inference._point_to_training()
        return inference

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[HNetInference]:
        """While inside, the parameters are the gathered weights of the sharded model that `from_training` got.

        Every rank must enter and leave (both gather and release); what happens inside needs no other rank. The weights
        have the dtype in which training computes. Does nothing where the model is not sharded or none was borrowed.
        """
        modules = self._training_model[0].modules() if self._training_model else []
        sharded = list(filter(gathers_weights, modules))
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
            ours = dict(self.named_modules(remove_duplicate=False))
            for name, theirs in model.named_modules(remove_duplicate=False):
                ours[name]._parameters.update(theirs._parameters)
                ours[name]._buffers.update(theirs._buffers)
                vars(ours[name]).update((key, x) for key, x in vars(theirs).items() if isinstance(x, Tensor))

    def _check_weights(self) -> None:
        if hasattr(first := next(self.parameters()), "device_mesh"):
            raise RuntimeError("the training model is sharded: generate inside `with inference.unsharded():`")
        if first.is_meta:
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
        return draw(logits_BV, uniform_B, *dataclasses.astuple(self), allowed_BV)


class Noise:
    """Uniform numbers in [0, 1 - 2^-24] for each sequence from a generator of its own, so independent of the batch."""

    BLOCK = 256  # numbers drawn at a time

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators, self.device, self.drawn = [torch.Generator().manual_seed(s) for s in seeds], device, 0

    @classmethod
    def block(cls, generator: torch.Generator) -> Tensor:
        return torch.rand(cls.BLOCK, generator=generator).double()

    def next(self) -> Tensor:
        """float64 (B,)."""
        if self.drawn % self.BLOCK == 0:
            block_XB = torch.stack([self.block(g) for g in self.generators], dim=1)
            self.block_XB = block_XB.to(self.device, non_blocking=True)
        self.drawn += 1
        return self.block_XB[(self.drawn - 1) % self.BLOCK]
