"""Mixers in generation: they read L new tokens of each of B sequences, and continue from a state.

A step reads one token of each. It has Triton kernels in generation_triton.py beside the definitions here.

Legend: B sequences, L new tokens of each (padded on the right; 1 in a step), T = B L rows, H heads, P channels a head,
N state size, C channels of a convolution, W slots of a key-value ring or of a convolution's past, R half the rotary
dimensions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.attention import attention, rotary_attention, rotate, tile_order
from hnet_kernels.conv import causal_conv_silu_forward
from hnet_kernels.dispatch import OPERATIONS, use_fast, why_unsupported, wide
from hnet_kernels.mamba2 import mamba2_inner
from hnet_kernels.norm import gated_norm_forward
from hnet_kernels.ssd import mamba2_scan_forward, ssd

WIDEST = 8192  # channels that a kernel holds in the registers of one block
MIN_SLOTS = 64  # a key-value ring starts with as many


class once:  # noqa: N801 (a decorator)
    """A property that is computed once. Until Python 3.12 functools.cached_property takes a lock, where torch.compile
    would divide a step in two (docs.python.org/3/library/functools.html). To be removed with Python 3.11."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        value = owner.__dict__[self.function.__name__] = self.function(owner)
        return value


@dataclasses.dataclass(frozen=True)
class Span:
    """The positions of the new tokens of a stage: sequence b has length[b] of them, from position start[b] on.

    In a step, L = 1, and the sequences that are not active have length 0. Their state does not change. The layers of
    the stage share one Span, which computes its properties once.
    """

    start_B: Tensor  # int64
    length_B: Tensor  # int64
    valid_BL: Tensor  # bool; False on padding, which is on the right, where causality hides it
    past: int  # the largest start
    cos_MR: Tensor  # rotary tables of positions 0 ... M - 1, where M exceeds all positions
    sin_MR: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.valid_BL.shape

    @once
    def position_T(self) -> Tensor:
        """int32 (T,), positions of the new tokens. Those of padding are limited to the last one of the tables."""
        offset_L = torch.arange(self.shape[1], device=self.start_B.device)
        position_T = (self.start_B[:, None] + offset_L).flatten()
        return position_T.clamp_max(len(self.cos_MR) - 1).to(torch.int32)

    @once
    def angles(self) -> tuple[Tensor, Tensor]:
        """The rows (T, R) of both rotary tables for the new tokens."""
        return self.cos_MR[self.position_T], self.sin_MR[self.position_T]

    @once
    def documents(self) -> Tensor:
        """cu_seqlens of the new tokens: B documents of L tokens, with their padding."""
        return even_documents(*self.shape, self.start_B.device)

    @once
    def _tiles(self) -> dict[int, Tensor | None]:
        return {}

    def tiles(self, x_TX: Tensor, head_dim: int) -> Tensor | None:
        """`tile_order` of the new tokens."""
        if head_dim not in self._tiles:
            self._tiles[head_dim] = tile_order(x_TX, head_dim, self.documents)
        return self._tiles[head_dim]


def take(x_BLX: Tensor, index_BK: Tensor) -> Tensor:
    """Rows of each sequence: x[b, index[b, k]] for x (B, L, ...) -> (B, K, ...)."""
    return x_BLX[torch.arange(len(x_BLX), device=x_BLX.device)[:, None], index_BK]


def even_documents(B: int, L: int, device: torch.device) -> Tensor:
    """cu_seqlens, int32 (B + 1,), of B documents of L rows each."""
    return torch.arange(B + 1, dtype=torch.int32, device=device) * L


TRAINED_BY = {"mamba2_step": "mamba2_inner", "attention_step": "rotary_attention"}


def _fast(operation: str, x_TX: Tensor, widest: int, reason: str = "") -> bool:
    """Whether the kernel of `operation` runs. It does not where training runs an edited definition."""
    if OPERATIONS[TRAINED_BY[operation]].uses_definition:
        return False
    reason = why_unsupported(x_TX) or reason or (f"rows of {widest}" if widest > WIDEST else None)
    return use_fast(operation, x_TX.device.type, x_TX.dtype, reason)


# ------------------------------------------------------------------------------------------------------------- Mamba-2


@dataclasses.dataclass
class MambaState:
    """The last inputs of the convolution and the state of the recurrence."""

    conv_BWC: Tensor  # W = taps - 1, compute dtype
    ssm_BHPN: Tensor  # at least float32


class MambaWeights(NamedTuple):
    """A Mamba-2 mixer's weights between its projections, as `mamba2_inner` takes them."""

    conv_C1K: Tensor
    conv_bias_C: Tensor
    dt_bias_H: Tensor | None
    A_log_H: Tensor
    D_H: Tensor | None
    norm_D: Tensor


def mamba2_prefill(projected_TX: Tensor, weights: MambaWeights, state: MambaState, span: Span, eps: float) -> Tensor:
    """`mamba2_inner` of new tokens, continued from a state, which it updates. Returns (T, D).

    It runs the kernels of training from h = 0 and adds the contribution of the state: the recurrence is linear in h.
    """
    conv_C1K, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_D = weights
    H, D, C = len(A_log_H), len(norm_D), len(conv_bias_C)
    N, A_log_H = (C - D) // 2, wide(A_log_H)
    dt_bias_H, D_H = (torch.zeros_like(A_log_H) if w is None else wide(w) for w in (dt_bias_H, D_H))
    z_TD, xBC_TC, dt_TH = projected_TX.split([D, C, H], dim=-1)
    xBC_TC = _convolve(xBC_TC, conv_C1K, conv_bias_C, state, span)
    x_TD, B_TN, C_TN = xBC_TC.split([D, N, N], dim=-1)
    x_THP = x_TD.unflatten(-1, (H, D // H))
    raw_TH, dt_TH, A_H = dt_TH, F.softplus(dt_TH.to(A_log_H.dtype) + dt_bias_H), -A_log_H.exp()
    runs_fast = mamba2_inner.runs_fast(projected_TX)  # rounds as training does
    if runs_fast:
        y_THP, _ = mamba2_scan_forward(x_THP, raw_TH, dt_bias_H, A_log_H, B_TN, C_TN, D_H, span.documents)
    else:
        y_THP = ssd(x_THP, dt_TH, A_H, B_TN, C_TN, span.documents) + D_H[:, None] * x_THP
    y_TD = _continue(y_THP, x_THP, dt_TH, A_H, B_TN, C_TN, state, span).flatten(1)
    return gated_norm_forward(y_TD, z_TD, norm_D, eps)[0] if runs_fast else _gated_norm(y_TD, z_TD, norm_D, eps)


def _gated_norm(y_TD: Tensor, z_TD: Tensor, norm_D: Tensor, eps: float) -> Tensor:
    u_TD = wide(y_TD) * F.silu(wide(z_TD))
    return (u_TD * torch.rsqrt(u_TD.square().mean(-1, keepdim=True) + eps) * norm_D).to(norm_D.dtype)


def mamba2_step(projected_TX: Tensor, weights: MambaWeights, state: MambaState, span: Span, eps: float) -> Tensor:
    """`mamba2_prefill` of one token per sequence. The result for a sequence that is not active is meaningless."""
    H, D = len(weights.A_log_H), len(weights.norm_D)
    if _fast("mamba2_step", projected_TX, D, f"heads of {D // H}, not a power of two" if D // H & (D // H - 1) else ""):
        from hnet_kernels import generation_triton  # not above: triton is not everywhere

        states = state.conv_BWC, state.ssm_BHPN
        return generation_triton.mamba2_step(projected_TX, weights, *states, span.valid_BL, eps)
    return _mamba2_step(projected_TX, weights, state, span, eps)


def _mamba2_step(projected_BX: Tensor, weights: MambaWeights, state: MambaState, span: Span, eps: float) -> Tensor:
    conv_C1K, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_D = weights
    (_, H, P, N), D, dtype = state.ssm_BHPN.shape, len(norm_D), state.ssm_BHPN.dtype
    z_BD, newest_BC, dt_BH = projected_BX.split([D, len(conv_bias_C), H], dim=-1)
    past_BKC = torch.cat([state.conv_BWC, newest_BC[:, None]], dim=1)
    torch.where(span.valid_BL[..., None], past_BKC[:, 1:], state.conv_BWC, out=state.conv_BWC)
    xBC = (wide(past_BKC) * wide(conv_C1K).squeeze(1).T).sum(1) + conv_bias_C
    x_BD, B_BN, C_BN = F.silu(xBC.to(newest_BC.dtype)).to(dtype).split([D, N, N], dim=-1)
    dt_BH = F.softplus(dt_BH.to(dtype) if dt_bias_H is None else dt_BH.to(dtype) + dt_bias_H)
    dt_BH1 = (dt_BH * span.valid_BL)[..., None]  # dt = 0 leaves the state as it is
    decay_BH1 = (dt_BH1 * -wide(A_log_H).exp()[:, None]).exp()
    x_BHP = x_BD.unflatten(-1, (H, P))
    state.ssm_BHPN.mul_(decay_BH1[..., None]).addcmul_((x_BHP * dt_BH1)[..., None], B_BN[:, None, None])
    y_BD = torch.bmm(state.ssm_BHPN.flatten(1, 2), C_BN[..., None]).squeeze(-1).to(newest_BC.dtype)
    if D_H is not None:
        y_BD = y_BD + (D_H[:, None] * x_BHP).flatten(1)
    return _gated_norm(y_BD, z_BD, norm_D, eps)


def _convolve(x_TC: Tensor, conv_C1K: Tensor, bias_C: Tensor, state: MambaState, span: Span) -> Tensor:
    """Depthwise causal convolution and SiLU of the inputs in the state, followed by the new ones; updates the state."""
    (B, L), W = span.shape, state.conv_BWC.shape[1]
    x_BXC = torch.cat([state.conv_BWC, x_TC.unflatten(0, (B, L))], dim=1)
    state.conv_BWC.copy_(take(x_BXC, span.length_B[:, None] + torch.arange(W, device=x_TC.device)))
    position_T = torch.arange(W + L, dtype=torch.int32, device=x_TC.device).repeat(B)
    y_TC = causal_conv_silu_forward(x_BXC.flatten(0, 1), conv_C1K, bias_C, position_T)
    return y_TC.unflatten(0, (B, W + L))[:, W:].flatten(0, 1)


def _continue(y_THP, x_THP, dt_TH, A_H, B_TN, C_TN, state: MambaState, span: Span) -> Tensor:
    """Adds the contribution of the state to y, which was computed from h = 0; updates the state."""
    (B, L), h_BHPN, dtype = span.shape, state.ssm_BHPN, state.ssm_BHPN.dtype
    x_BLHP, dt_BLH, B_BLN, C_BLN = (t.unflatten(0, (B, L)).to(dtype) for t in (x_THP, dt_TH, B_TN, C_TN))
    dt_BHL = (dt_BLH * span.valid_BL[..., None]).transpose(1, 2)  # padding neither decays the state nor adds to it
    sum_BHL = (dt_BHL * A_H[:, None]).double().contiguous().cumsum(-1)
    if span.past:
        kept_BLHP = torch.einsum("bln,bhpn->blhp", C_BLN, h_BHPN) * sum_BHL.exp().to(dtype).transpose(1, 2)[..., None]
        y_THP = (y_THP + kept_BLHP.flatten(0, 1)).to(y_THP.dtype)
    gain_BHL = (sum_BHL[..., -1:] - sum_BHL).exp().to(dtype) * dt_BHL
    added_BXN = (x_BLHP * gain_BHL.transpose(1, 2)[..., None]).flatten(2).mT @ B_BLN
    h_BHPN.mul_(sum_BHL[..., -1].exp().to(dtype)[..., None, None]).add_(added_BXN.view_as(h_BHPN))
    return y_THP


# ----------------------------------------------------------------------------------------------------------- attention


@dataclasses.dataclass
class KVState:
    """Rotated keys and values in ring buffers: position i is in slot i mod W. W >= positions, or W = window + 1."""

    k_BWHP: Tensor
    v_BWHP: Tensor
    window: int  # -1: all earlier positions are visible, and no slot is written twice

    def reserve(self, tokens: int) -> None:
        """Grows to `ring_slots(tokens, window)` slots, if there are fewer. A ring that grows has never been full."""
        more = ring_slots(tokens, self.window) - self.k_BWHP.shape[1]
        if more > 0:
            self.k_BWHP, self.v_BWHP = (F.pad(t, (0, 0, 0, 0, 0, more)) for t in (self.k_BWHP, self.v_BWHP))


def ring_slots(tokens: int, window: int) -> int:
    """Slots for `tokens` positions: the next power of two from MIN_SLOTS on, but no more than the window shows."""
    slots = max(MIN_SLOTS, 1 << max(tokens - 1, 0).bit_length())
    return slots if window < 0 else min(slots, window + 1)


def attention_prefill(qkv_TX: Tensor, n_heads: int, state: KVState, span: Span) -> Tensor:
    """`rotary_attention` of new tokens, continued from a state, which it updates. Returns (T, H P).

    If all sequences are empty, they are documents as in training. Otherwise the same kernel runs over [earlier | new]
    tokens, with zeros as queries of the earlier ones. Where a sequence has fewer earlier tokens than the longest one,
    the unused rows at its front are a document of their own.
    """
    (B, L), W, window, device = span.shape, state.k_BWHP.shape[1], state.window, qkv_TX.device
    begins = not span.past and rotary_attention.runs_fast(qkv_TX)
    if begins:  # rotates q and k in place
        tables, P = (span.cos_MR, span.sin_MR), qkv_TX.shape[1] // (3 * n_heads)
        o_TD = rotary_attention(
            qkv_TX, n_heads, window, *tables, span.position_T, span.documents, span.tiles(qkv_TX, P)
        )
        _, k_BLHP, v_BLHP = qkv_TX.unflatten(0, (B, L)).unflatten(-1, (3, n_heads, P)).unbind(2)
    else:
        q_BLHP, k_BLHP, v_BLHP = _rotated(qkv_TX, n_heads, span)
    both = (state.k_BWHP, k_BLHP), (state.v_BWHP, v_BLHP)
    if begins and L <= W:
        for ring, new in both:
            ring[:, :L] = new  # nothing sees the slots of padding before they are written again
        return o_TD
    if not begins:
        past = span.past if window < 0 else min(span.past, window)
        before_BX = span.start_B[:, None] - torch.arange(past, 0, -1, device=device)
        k, v = (torch.cat([take(ring, before_BX % W), new], dim=1) for ring, new in both)
        q = F.pad(q_BLHP, (0, 0, 0, 0, past, 0))
        junk_B = (past - span.start_B).clamp_min(0).to(torch.int32)
        cu = even_documents(B, past + L, device)
        cu = torch.cat([torch.stack([cu[:-1], cu[:-1] + junk_B], 1).flatten(), cu[-1:]])
        o = attention(*(t.flatten(0, 1).contiguous() for t in (q, k, v)), cu, past + L, window)
        o_TD = o.unflatten(0, (B, past + L))[:, past:].flatten(0, 1).flatten(1)

    # each slot keeps the last position that falls on it; those from `start` on are new
    end_B1, slot_W = (span.start_B + span.length_B)[:, None], torch.arange(W, device=device)
    new_BW = end_B1 - 1 - (end_B1 - 1 - slot_W) % W - span.start_B[:, None]
    for ring, new in both:
        ring.copy_(torch.where((new_BW >= 0)[..., None, None], take(new, new_BW.clamp_min(0)), ring))
    return o_TD


def attention_step(qkv_TX: Tensor, n_heads: int, state: KVState, span: Span) -> Tensor:
    """`attention_prefill` of one token per sequence.

    For a sequence that is not active the result is meaningless, and no visible slot of its ring changes.
    """
    if _fast("attention_step", qkv_TX, qkv_TX.shape[1] // (3 * n_heads)):
        from hnet_kernels import generation_triton

        rings = state.k_BWHP, state.v_BWHP
        return generation_triton.attention_step(qkv_TX, *rings, span.start_B, span.valid_BL, span.cos_MR, span.sin_MR)
    return _attention_step(qkv_TX, n_heads, state, span)


def _attention_step(qkv_TX: Tensor, n_heads: int, state: KVState, span: Span) -> Tensor:
    # writes for all: a sequence that is not active overwrites only its next slot, which nothing sees until then
    q_B1HP, k_B1HP, v_B1HP = _rotated(qkv_TX, n_heads, span)
    (B, W), device = state.k_BWHP.shape[:2], qkv_TX.device
    everyone_B, slot_B = torch.arange(B, device=device), span.start_B % W
    state.k_BWHP[everyone_B, slot_B] = k_B1HP[:, 0]
    state.v_BWHP[everyone_B, slot_B] = v_B1HP[:, 0]
    seen_BW = torch.arange(W, device=device) <= span.start_B[:, None]
    q, k, v = (t.transpose(1, 2) for t in (q_B1HP, state.k_BWHP, state.v_BWHP))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BW[:, None, None]).transpose(1, 2).flatten(1)


def _rotated(qkv_TX: Tensor, n_heads: int, span: Span) -> list[Tensor]:
    """q, k and v, each (B, L, H, P)."""
    qk, v = qkv_TX.unflatten(-1, (3, n_heads, -1)).split([2, 1], dim=1)
    q, k = rotate(qk.flatten(1, 2), *span.angles).chunk(2, dim=1)
    return [t.unflatten(0, span.shape) for t in (q, k, v.squeeze(1))]
