"""Generating with an H-Net: the model of hnet_trainable.py, run a byte at a time with caches (arXiv 2507.07955).

    bytes -> encoder -> router: does a chunk begin here? -> if so, the inner network -> smooth -> decoder -> next byte

`prefill` reads many bytes at once, `step` one byte; both leave a `Cache` with which either can go on. A batch holds
sequences of any lengths, and each cuts its own chunks: at every stage a sequence stands at a position of its own. In a
prefill shorter sequences are padded on the right; in a step every stage runs on the whole batch, and sequences for
which no chunk begins keep their state. So buffers have fixed shapes, no layer waits for the device, and a step copies
to the host once: the byte and who begins a chunk, after the last router and before the inner network, which can be
left out when nobody does.

Read in this order: caches, layers, router, HNet, HNetInference (prefill, step, weights borrowed from training),
sampling, UTF-8, generate.

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hnet_kernels import attention, ema_forward, ssd
from hnet_trainable import (
    BOS,
    EMA_CLAMP,
    EOS,
    HEADDIM,
    GatedRMSNorm,
    HNetConfig,
    Layer,
    RMSNorm,
    SwiGLU,
    parse_layout,
    rotate,
)

TRAINED_LENGTH = 8192  # bytes of a training document in the paper's recipe; longer inputs get a warning
MIN_SLOTS = 64  # a key-value ring starts with as many


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ------------------------------------------------------------------------------------------------------------- caches


class Span(NamedTuple):
    """Where new tokens of one stage stand: sequence b adds length[b] of them, from position start[b].

    In a step L = 1, and sequences of length 0 are those that are not active: they keep all their state.
    """

    is_step: bool
    start_B: Tensor  # int64
    length_B: Tensor  # int64
    valid_BL: Tensor  # bool; the rest is padding, always on the right, so that causality hides it
    past: int  # the most tokens that any sequence had before
    cos_TR: Tensor  # T = B * L
    sin_TR: Tensor


@dataclasses.dataclass
class MambaState:
    """The last inputs of the convolution and the state of the recurrence."""

    conv_BWC: Tensor  # W = d_conv - 1, compute dtype
    ssm_BHPN: Tensor  # at least float32


@dataclasses.dataclass
class KVState:
    """Rotated keys and values in a ring: position i lies in slot i mod W, where W >= positions or W = window + 1."""

    k_BWHP: Tensor
    v_BWHP: Tensor
    window: int  # -1: everything before is visible, and the ring never turns

    def reserve(self, tokens: int) -> None:
        """Grow to `ring_slots(tokens, window)` slots, if there are fewer. Until it is full, slot i is position i."""
        more = ring_slots(tokens, self.window) - self.k_BWHP.shape[1]
        if more > 0:
            self.k_BWHP, self.v_BWHP = (F.pad(t, (0, 0, 0, 0, 0, more)) for t in (self.k_BWHP, self.v_BWHP))


def ring_slots(tokens: int, window: int) -> int:
    """Slots for `tokens` positions: the next power of two from MIN_SLOTS on, but no more than the window shows."""
    slots = max(MIN_SLOTS, 1 << max(tokens - 1, 0).bit_length())
    return slots if window < 0 else min(slots, window + 1)


@dataclasses.dataclass
class StageState:
    """What one stage remembers of its tokens. The innermost has only `inner`; the others the rest."""

    position_B: Tensor  # int64: tokens seen, so the position of the next one
    tokens: list[int]  # the same on the host
    encoder: list[MambaState | KVState] = dataclasses.field(default_factory=list)
    decoder: list[MambaState | KVState] = dataclasses.field(default_factory=list)
    inner: list[MambaState | KVState] = dataclasses.field(default_factory=list)
    last_hidden_state_BD: Tensor | None = None  # the router's x_{t-1}
    ema_BD: Tensor | None = None  # the smoothing's z of the chunk at hand, at least float32

    @property
    def layers(self) -> list[MambaState | KVState]:
        return [*self.encoder, *self.inner, *self.decoder]

    def reserve(self, tokens: int) -> None:
        for layer in self.layers:
            if isinstance(layer, KVState):
                layer.reserve(tokens)

    def advance(self, tokens: Sequence[int | bool], tokens_B: Tensor) -> None:
        self.tokens = [old + new for old, new in zip(self.tokens, tokens)]
        self.position_B += tokens_B


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
        for layer in (layer for stage in self.stages for layer in stage.layers):
            tensors += [t for t in vars(layer).values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in tensors if t is not None)


# ------------------------------------------------------------------------------------------------------------- layers
#
# Each takes x_BLD, its state and the Span that says where the tokens stand, and brings the state up to date.


class CausalConv1d(nn.Module):
    """Depthwise causal convolution with bias; the W = width - 1 inputs before the first come in front of `x`."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x_BXC: Tensor) -> Tensor:
        """X = W + L inputs -> L outputs."""
        dtype = at_least_float32(x_BXC.dtype)
        x, taps_XC = x_BXC.to(dtype), self.weight.to(dtype).squeeze(1).T  # the last tap meets the newest input
        L = x.shape[1] - len(taps_XC) + 1
        return (self.bias + sum(tap_C * x[:, k : k + L] for k, tap_C in enumerate(taps_XC))).to(x_BXC.dtype)


class Mamba2(nn.Module):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t (arXiv 2405.21060)."""

    def __init__(self, config: HNetConfig, s: int):
        super().__init__()
        width, ssm = config.d_model[s], config.ssm_cfg
        self.d_inner, self.d_state, self.d_conv = ssm.expand * width, ssm.d_state, ssm.d_conv
        self.n_heads, self.conv_dim = self.d_inner // HEADDIM, self.d_inner + 2 * ssm.d_state
        self.in_proj = nn.Linear(width, self.d_inner + self.conv_dim + self.n_heads, bias=False)  # z, x, B, C, dt
        self.conv1d = CausalConv1d(self.conv_dim, ssm.d_conv)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, width, bias=False)

    def new_state(self, batch: int) -> MambaState:
        weight, dtype = self.in_proj.weight, at_least_float32(self.dt_bias.dtype)
        return MambaState(
            weight.new_zeros(batch, self.d_conv - 1, self.conv_dim),
            weight.new_zeros(batch, self.n_heads, HEADDIM, self.d_state, dtype=dtype),
        )

    def forward(self, x_BLD: Tensor, state: MambaState, span: Span) -> Tensor:
        z, xBC, dt = self.in_proj(x_BLD).split([self.d_inner, self.conv_dim, self.n_heads], dim=-1)
        x, B, C = self.convolve(xBC, state, span).split([self.d_inner, self.d_state, self.d_state], dim=-1)
        x = x.unflatten(-1, (self.n_heads, HEADDIM))
        dt = F.softplus(dt.to(at_least_float32(self.dt_bias.dtype)) + self.dt_bias)
        scan = self.scan_step if span.is_step else self.scan_prefill
        y = scan(x, dt, -self.A_log.to(dt.dtype).exp(), B, C, state, span) + self.D[:, None] * x
        return self.out_proj(self.norm(y.flatten(-2), z))

    def convolve(self, x_BLC: Tensor, state: MambaState, span: Span) -> Tensor:
        x_BXC = torch.cat([state.conv_BWC, x_BLC], dim=1)
        last_BW = span.length_B[:, None] + torch.arange(self.d_conv - 1, device=x_BLC.device)
        state.conv_BWC.copy_(take(x_BXC, last_BW))
        return F.silu(self.conv1d(x_BXC))

    def scan_prefill(self, x_BLHP, dt_BLH, A_H, B_BLN, C_BLN, state: MambaState, span: Span) -> Tensor:
        """The training kernel from h = 0, plus what the state before contributes: the recurrence is linear."""
        B, L = dt_BLH.shape[:2]
        rows = [t.flatten(0, 1).contiguous() for t in (x_BLHP, dt_BLH, B_BLN, C_BLN)]
        y_BLHP = ssd(*rows[:2], A_H, *rows[2:], even_documents(B, L, x_BLHP.device)).unflatten(0, (B, L))
        h_BHPN, dtype = state.ssm_BHPN, state.ssm_BHPN.dtype
        dt_BLH = dt_BLH * span.valid_BL[..., None]  # padding neither decays the state nor adds to it
        sum_BLH = (dt_BLH * A_H).double().cumsum(1)
        kept_BLHP = torch.einsum("bln,bhpn->blhp", C_BLN.to(dtype), h_BHPN) * sum_BLH.exp().to(dtype)[..., None]
        gain_BLH = (sum_BLH[:, -1:] - sum_BLH).exp().to(dtype) * dt_BLH
        added_BHPN = torch.einsum("blhp,bln->bhpn", x_BLHP.to(dtype) * gain_BLH[..., None], B_BLN.to(dtype))
        h_BHPN.mul_(sum_BLH[:, -1].exp().to(dtype)[..., None, None]).add_(added_BHPN)
        return (y_BLHP + kept_BLHP).to(x_BLHP.dtype)

    def scan_step(self, x_B1HP, dt_B1H, A_H, B_B1N, C_B1N, state: MambaState, span: Span) -> Tensor:
        h_BHPN, dtype = state.ssm_BHPN, state.ssm_BHPN.dtype
        dt_BH = (dt_B1H * span.valid_BL[..., None])[:, 0]  # dt = 0 leaves h as it is
        added_BHP = x_B1HP[:, 0].to(dtype) * dt_BH[..., None]
        h_BHPN.mul_((dt_BH * A_H).exp()[..., None, None]).add_(added_BHP[..., None] * B_B1N.to(dtype)[:, :, None])
        return torch.einsum("bhpn,bln->blhp", h_BHPN, C_B1N.to(dtype)).to(x_B1HP.dtype)


class Attention(nn.Module):
    """Causal attention with partial rotary embeddings; position i sees i - window..i, or all before where it is -1."""

    def __init__(self, config: HNetConfig, s: int):
        super().__init__()
        width = config.d_model[s]
        self.n_heads, self.window = config.attn_cfg.num_heads[s], config.attn_cfg.window_size[s]
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def new_state(self, batch: int) -> KVState:
        heads = (self.n_heads, self.out_proj.in_features // self.n_heads)
        return KVState(*(self.Wqkv.weight.new_zeros(batch, 0, *heads) for _ in "kv"), self.window)

    def forward(self, x_BLD: Tensor, state: KVState, span: Span) -> Tensor:
        q_THP, k_THP, v_THP = self.Wqkv(x_BLD).flatten(0, 1).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        q_THP, k_THP = (rotate(t, span.cos_TR, span.sin_TR) for t in (q_THP, k_THP))
        q, k, v = (t.unflatten(0, x_BLD.shape[:2]) for t in (q_THP, k_THP, v_THP))
        attend = self.step if span.is_step else self.prefill
        return self.out_proj(attend(q, k, v, state, span).flatten(-2))

    def prefill(self, q_BLHP: Tensor, k_BLHP: Tensor, v_BLHP: Tensor, state: KVState, span: Span) -> Tensor:
        """The training kernel over [what was before | what is new], with empty queries for what was before.

        Sequences that have less before them than the longest have junk at the front: a document of its own.
        """
        B, L = q_BLHP.shape[:2]
        W, device = state.k_BWHP.shape[1], q_BLHP.device
        past = span.past if self.window < 0 else min(span.past, self.window)
        before_BX = span.start_B[:, None] - torch.arange(past, 0, -1, device=device)
        both = (state.k_BWHP, k_BLHP), (state.v_BWHP, v_BLHP)
        k, v = (torch.cat([take(ring, before_BX % W), new], dim=1) for ring, new in both)
        q = F.pad(q_BLHP, (0, 0, 0, 0, past, 0))
        junk_B = (past - span.start_B).clamp_min(0).to(torch.int32)
        cu = even_documents(B, past + L, device)
        cu = torch.cat([torch.stack([cu[:-1], cu[:-1] + junk_B], 1).flatten(), cu[-1:]])
        o = attention(*(t.flatten(0, 1).contiguous() for t in (q, k, v)), cu, past + L, self.window)

        # each slot keeps the last position that falls on it; those from `start` on are new
        end_B1, slot_W = (span.start_B + span.length_B)[:, None], torch.arange(W, device=device)
        new_BW = end_B1 - 1 - (end_B1 - 1 - slot_W) % W - span.start_B[:, None]
        for ring, new in both:
            ring.copy_(torch.where((new_BW >= 0)[..., None, None], take(new, new_BW.clamp_min(0)), ring))
        return o.unflatten(0, (B, past + L))[:, past:]

    def step(self, q_B1HP: Tensor, k_B1HP: Tensor, v_B1HP: Tensor, state: KVState, span: Span) -> Tensor:
        """Writes for all: a sequence that is not active overwrites only its next slot, which nothing sees till then."""
        (B, W), device = state.k_BWHP.shape[:2], q_B1HP.device
        everyone_B, slot_B = torch.arange(B, device=device), span.start_B % W
        state.k_BWHP[everyone_B, slot_B] = k_B1HP[:, 0]
        state.v_BWHP[everyone_B, slot_B] = v_B1HP[:, 0]
        seen_BW = torch.arange(W, device=device) <= span.start_B[:, None]
        q, k, v = (t.transpose(1, 2) for t in (q_B1HP, state.k_BWHP, state.v_BWHP))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BW[:, None, None]).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm residual block; the residual stream is at least float32."""

    def __init__(self, layer: Layer, config: HNetConfig, s: int):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model[s])
        self.mixer = (Mamba2 if layer.mixer == "m" else Attention)(config, s)
        if layer.has_mlp:
            self.norm2 = RMSNorm(config.d_model[s])
            self.mlp = SwiGLU(config.d_model[s], config.d_intermediate[s])
        self.has_mlp = layer.has_mlp

    def forward(self, residual: Tensor, state: MambaState | KVState, span: Span) -> Tensor:
        residual = residual + self.mixer(self.norm1(residual), state, span)
        return residual + self.mlp(self.norm2(residual)) if self.has_mlp else residual


class Isotropic(nn.Module):
    """A stack of blocks and a final norm: an encoder, a decoder or the innermost network."""

    def __init__(self, layout: str, config: HNetConfig, s: int):
        super().__init__()
        self.layers = nn.ModuleList(Block(layer, config, s) for layer in parse_layout(layout))
        self.rmsnorm = RMSNorm(config.d_model[s])

    def new_state(self, batch: int) -> list[MambaState | KVState]:
        return [layer.mixer.new_state(batch) for layer in self.layers]

    def forward(self, x: Tensor, states: list[MambaState | KVState], span: Span) -> Tensor:
        residual = x.to(at_least_float32(x.dtype))
        for layer, state in zip(self.layers, states):
            residual = layer(residual, state, span)
        return self.rmsnorm(residual)


def take(x_BLX: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of each sequence: x[b, index[b, k]] for x (B, L, ...) -> (B, K, ...)."""
    return x_BLX[torch.arange(len(x_BLX), device=x_BLX.device)[:, None], index_BK]


def even_documents(B: int, L: int, device: torch.device) -> Tensor:
    """cu_seqlens, int32 (B + 1,), of B documents of L rows each."""
    return torch.arange(B + 1, dtype=torch.int32, device=device) * L


# ------------------------------------------------------------------------------------------------------ router, stages


class RoutingModule(nn.Module):
    """p_t = (1 - cos(W_q x_{t-1}, W_k x_t)) / 2 (eq. 4), 1 at a sequence's first token; returns it in >= float32."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj_layer = nn.Linear(width, width, bias=False)
        self.k_proj_layer = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, state: StageState, span: Span) -> Tensor:
        x_BXD, dtype = torch.cat([state.last_hidden_state_BD[:, None], x_BLD], dim=1), at_least_float32(x_BLD.dtype)
        state.last_hidden_state_BD.copy_(take(x_BXD, span.length_B[:, None])[:, 0])
        first = span.start_B[:, None] + torch.arange(x_BLD.shape[1], device=x_BLD.device) == 0
        q, k = self.q_proj_layer(x_BXD[:, :-1]).to(dtype), self.k_proj_layer(x_BLD).to(dtype)
        cos = (F.normalize(q, dim=-1, eps=1e-12) * F.normalize(k, dim=-1, eps=1e-12)).sum(-1)
        return ((1 - cos) / 2).clamp(0, 1).masked_fill(first, 1.0)


class HNet(nn.Module):
    """The weights of stage s and of all inside it, and what a stage computes around the one inside."""

    def __init__(self, config: HNetConfig, s: int = 0):
        super().__init__()
        self.outer_width, width = config.d_model[max(s - 1, 0)], config.d_model[s]
        layouts = config.layouts(s)
        attends = any(layer.mixer == "t" for layout in layouts for layer in parse_layout(layout))
        self.rotary_dim = config.attn_cfg.rotary_emb_dim[s] if attends else 0
        wider = width > self.outer_width
        self.pad_dimension = nn.Parameter(torch.empty(width - self.outer_width)) if wider else None
        self.is_innermost = s == config.num_stages
        if self.is_innermost:
            self.main_network = Isotropic(layouts[0], config, s)
            return
        self.encoder = Isotropic(layouts[0], config, s)
        self.routing_module = RoutingModule(width)
        self.residual_proj = nn.Linear(width, width)
        self.main_network = HNet(config, s + 1)
        self.decoder = Isotropic(layouts[1], config, s)

    def new_state(self, batch: int) -> StageState:
        some = (self.main_network if self.is_innermost else self.encoder).rmsnorm.weight
        state = StageState(some.new_zeros(batch, dtype=torch.int64), [0] * batch)
        if self.is_innermost:
            state.inner = self.main_network.new_state(batch)
            return state
        state.encoder, state.decoder = self.encoder.new_state(batch), self.decoder.new_state(batch)
        state.last_hidden_state_BD = some.new_zeros(batch, len(some))
        state.ema_BD = some.new_zeros(batch, len(some), dtype=at_least_float32(some.dtype))
        return state

    def enter(self, x: Tensor) -> Tensor:
        """To this stage's width: the learned `pad_dimension` behind the outer stage's channels."""
        if self.pad_dimension is None:
            return x
        return torch.cat([x, self.pad_dimension.to(x.dtype).expand(*x.shape[:-1], -1)], dim=-1)

    def span(self, state: StageState, x_BLD: Tensor, length_B: Tensor, is_step: bool = False) -> Span:
        start_B, offset_L = state.position_B.clone(), torch.arange(x_BLD.shape[1], device=x_BLD.device)
        tables = rotary_tables((start_B[:, None] + offset_L).flatten(), self.rotary_dim, x_BLD.dtype)
        return Span(is_step, start_B, length_B, offset_L < length_B[:, None], max(state.tokens), *tables)

    def smooth_prefill(self, y_BKD: Tensor, p_BL: Tensor, b_BL: Tensor, kept_BK: Tensor, state: StageState) -> Tensor:
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

    def smooth_step(self, y_BD: Tensor, p_B: Tensor, b_B1: Tensor, state: StageState) -> None:
        P_B1 = p_B.clamp(EMA_CLAMP, 1 - EMA_CLAMP)[:, None]
        z_BD = P_B1 * y_BD.to(p_B.dtype) + (1 - P_B1) * state.ema_BD
        state.ema_BD.copy_(torch.where(b_B1, z_BD, state.ema_BD))

    def decode(self, z: Tensor, x: Tensor, state: StageState, span: Span) -> Tensor:
        """Eq. 9 with a straight-through confidence of 1, the decoder, and back to the outer stage's width."""
        z = z + self.residual_proj(x.to(self.residual_proj.weight.dtype))
        return self.decoder(z.to(x.dtype), state.decoder, span)[..., : self.outer_width]


def rotary_tables(position_T: Tensor, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (T, R) of the angles that `position_T` turns by, in at least float32."""
    dtype = at_least_float32(dtype)
    exponent_R = torch.arange(0, rotary_dim, 2, device=position_T.device, dtype=dtype) / max(rotary_dim, 1)
    angle_TR = position_T.to(dtype)[:, None] * 10000.0**-exponent_R
    return angle_TR.cos(), angle_TR.sin()


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


class HNetInference(nn.Module):
    """The language model for generation. Parameters carry the official names; built with uninitialised weights.

    Load a state dict (`hnet_runtime.weights` does), or borrow those of a training model with `from_training`.
    """

    def __init__(self, config: HNetConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model[0])
        self.backbone = HNet(config)
        self.lm_head = nn.Linear(config.d_model[0], config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight
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
        cache = Cache([stage.new_state(batch) for stage in self.stages])
        for s, state in enumerate(cache.stages):
            state.reserve(max_len if isinstance(max_len, int) else max_len[s])
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
        (B, L), tokens, x = byte_BL.shape, lengths, self.embeddings(byte_BL)
        origin_BL = torch.arange(L, device=device).expand(B, L)  # the byte at which each token of the stage begins
        starts_BLS = torch.zeros(B, L, self.config.num_stages, dtype=torch.bool, device=device)
        probabilities, boundaries, way_back, y = [], [], [], None
        for s, (stage, state) in enumerate(zip(self.stages, cache.stages)):
            if not x.shape[1]:  # no chunk began: the stages inside have nothing to do
                probabilities += [] if stage.is_innermost else [probabilities[-1][:, :0]]
                boundaries += [] if stage.is_innermost else [boundaries[-1][:, :0]]
                continue
            x, tokens_B = stage.enter(x), torch.tensor(tokens).to(device, non_blocking=True)
            span = stage.span(state, x, tokens_B)
            state.reserve(max(map(sum, zip(state.tokens, tokens))))
            state.advance(tokens, tokens_B)
            if stage.is_innermost:
                y = stage.main_network(x, state.inner, span)[..., : stage.outer_width]
                break
            x = stage.encoder(x, state.encoder, span)
            p_BL = stage.routing_module(x, state, span)
            b_BL = (p_BL > 0.5) & span.valid_BL
            tokens = b_BL.sum(1).tolist()  # the stage's only wait
            kept_BK = b_BL.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, : max(tokens)]
            starts_BLS[..., s].scatter_(1, origin_BL, b_BL)
            way_back.append((stage, state, span, x, p_BL, b_BL, kept_BK))
            probabilities.append(p_BL)
            boundaries.append(b_BL)
            x, origin_BL = take(x, kept_BK), origin_BL.gather(1, kept_BK)
        for stage, state, span, x, p_BL, b_BL, kept_BK in reversed(way_back):
            y = stage.decode(stage.smooth_prefill(y, p_BL, b_BL, kept_BK, state), x, state, span)
        return Prefill(self.lm_head(y), lengths, probabilities, boundaries, starts_BLS, cache)

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
        x, way_back, probabilities = self.embeddings(byte_B)[:, None], [], []
        for stage, state in zip(self.stages, cache.stages):
            x = stage.enter(x)
            state.reserve(max(state.tokens) + 1)
            span = stage.span(state, x, new_B, is_step=True)
            if not stage.is_innermost:
                x = stage.encoder(x, state.encoder, span)
                p_BL = stage.routing_module(x, state, span)
                probabilities.append(p_BL[:, 0])
                new_B = ((p_BL > 0.5) & span.valid_BL)[:, 0].long()
            way_back.append((stage, state, span, x))
        reached = torch.stack([byte_B, *(span.length_B for _, _, span, _ in way_back[1:])]).tolist()  # the only wait
        fed, reached = reached[0], [active, *([bool(b) for b in row] for row in reached[1:])]
        y = None
        for s, (stage, state, span, x) in reversed(list(enumerate(way_back))):
            if not any(reached[s]):
                continue
            if stage.is_innermost:
                y = stage.main_network(x, state.inner, span)[..., : stage.outer_width]
            else:
                if y is not None:
                    stage.smooth_step(y[:, 0], probabilities[s], way_back[s + 1][2].valid_BL, state)
                y = stage.decode(state.ema_BD[:, None], x, state, span)
            state.advance(reached[s], span.length_B)
        starts = list(zip(*reached[1:])) if reached[1:] else [()] * cache.batch
        return Step(self.lm_head(y)[:, 0], fed, starts, probabilities)

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
    def from_training(cls, model: nn.Module) -> HNetInference:
        """An inference model whose parameters *are* those of the HNetLM `model`: no memory, and always up to date.

        Where `model` is sharded (FSDP2), its whole weights exist only inside `with inference.unsharded():`.
        """
        with torch.device("meta"):
            inference = cls(model.config)
        inference._training_model.append(model)
        inference._point_to_training()
        return inference

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[HNetInference]:
        """While inside, the parameters are the gathered weights of the sharded model that `from_training` got.

        Every rank must enter and leave (both gather and release); what happens inside needs no other rank. The weights
        have the dtype in which training computes. Does nothing where the model is not sharded or none was borrowed.
        """
        from torch.distributed.fsdp import FSDPModule

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
            modules = dict(self.named_modules())
            for name, parameter in model.named_parameters(remove_duplicate=False):
                name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
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
