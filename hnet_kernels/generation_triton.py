"""Triton kernels for one new token of each sequence: a Mamba-2 mixer between its projections; attention over a ring.

The definitions are in generation.py. Legend: B sequences, H heads, P channels a head, N state size, C channels of the
convolution, W slots of a ring, S splits of it.

All are bound by memory: states, keys and values are read once. A sequence that is not active costs nothing: its blocks
return at once, its state is not touched, and its output is zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels.launch import cdiv, dense_rows, kernel, next_power_of_2
from hnet_kernels.ssd_triton import _softplus as softplus
from hnet_kernels.triton_math import LOG2_E, let_next_begin, overlap, sigmoid, wait_for_inputs

SCAN_P, SCAN_WARPS = 32, 4  # channels of a head that a block takes where rows abound
SHIFTED = 1024  # channels of the convolution's past that a block moves
SLOTS = 64  # slots of a ring that a block of attention reads at a time
MULTIPROCESSORS = 132  # of a Hopper GPU; elsewhere the sizes are as right


# ------------------------------------------------------------------------------------------------------------- Mamba-2


@triton.jit
def _convolve(row_ptr, past_ptr, taps_ptr, bias_ptr, c, C, inside, W: tl.constexpr):
    """SiLU of the convolution at channels c, where the past has W inputs; rounded as the definition rounds."""
    acc = tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(W):
        tap = tl.load(taps_ptr + c * (W + 1) + k, mask=inside, other=0.0).to(tl.float32)
        acc += tap * tl.load(past_ptr + k * C + c, mask=inside, other=0.0).to(tl.float32)
    tap = tl.load(taps_ptr + c * (W + 1) + W, mask=inside, other=0.0).to(tl.float32)
    acc += tap * tl.load(row_ptr + c, mask=inside, other=0.0).to(tl.float32)
    x = acc.to(row_ptr.dtype.element_ty).to(tl.float32)
    return (x * sigmoid(x)).to(row_ptr.dtype.element_ty).to(tl.float32)


@kernel
def _mamba_scan(
    projected_ptr, past_ptr, taps_ptr, conv_bias_ptr, dt_bias_ptr, A_log_ptr, D_ptr, ssm_ptr, active_ptr, gated_ptr,
    stride, H, D, N, C,
    P: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, HAS_D: tl.constexpr, EARLY: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Convolution, recurrence and gate of some channels of one head: what the norm takes, in float32.

    EARLY: loads the state, which only an earlier step has written, before it is known whether the row is active.
    """
    let_next_begin(OVERLAPS)
    b, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    h, p = part // (P // BLOCK_P), (part % (P // BLOCK_P)) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    at = ssm_ptr + ((b * H + h) * P + p[:, None]) * N + n[None, :]
    in_N = n < N
    if EARLY:
        state = tl.load(at, mask=in_N[None, :], other=0.0)
    wait_for_inputs(OVERLAPS)
    if tl.load(active_ptr + b) == 0:
        return
    if not EARLY:
        state = tl.load(at, mask=in_N[None, :], other=0.0)
    row_ptr = projected_ptr + b * stride + D  # behind z
    past_ptr += b * W * C
    x = _convolve(row_ptr, past_ptr, taps_ptr, conv_bias_ptr, h * P + p, C, p < P, W)
    B = _convolve(row_ptr, past_ptr, taps_ptr, conv_bias_ptr, D + n, C, in_N, W)
    C_ = _convolve(row_ptr, past_ptr, taps_ptr, conv_bias_ptr, D + N + n, C, in_N, W)
    dt = tl.load(row_ptr + C + h).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias_ptr + h)) if HAS_DT_BIAS else softplus(dt)
    decay = tl.exp(-tl.exp(tl.load(A_log_ptr + h)) * dt)
    state = state * decay + (x * dt)[:, None] * B[None, :]
    tl.store(at, state, mask=in_N[None, :])
    y = tl.sum(state * C_[None, :], 1)
    if HAS_D:
        y += tl.load(D_ptr + h) * x
    z = tl.load(projected_ptr + b * stride + h * P + p).to(tl.float32)
    tl.store(gated_ptr + b * D + h * P + p, y * z * sigmoid(z))


@kernel
def _mamba_norm(
    projected_ptr, past_ptr, weight_ptr, active_ptr, gated_ptr, out_ptr, stride, D, C, eps,
    W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The norm, by the first block of a row; the others move the convolution's past on by one."""
    let_next_begin(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    b, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    active = tl.load(active_ptr + b) != 0
    if block == 0:
        d = tl.arange(0, BLOCK_D)
        u = tl.load(gated_ptr + b * D + d, mask=(d < D) & active, other=0.0)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        u *= 1 / tl.sqrt(tl.sum(u * u, 0) / D + eps) * weight
        tl.store(out_ptr + b * D + d, u.to(out_ptr.dtype.element_ty), mask=d < D)
    elif active:
        c = (block - 1) * BLOCK_C + tl.arange(0, BLOCK_C)
        past_ptr += b * W * C
        for k in tl.static_range(W - 1):
            tl.store(past_ptr + k * C + c, tl.load(past_ptr + (k + 1) * C + c, mask=c < C), mask=c < C)
        newest = tl.load(projected_ptr + b * stride + D + c, mask=c < C)
        tl.store(past_ptr + (W - 1) * C + c, newest, mask=c < C)


def mamba2_step(projected_BX: Tensor, weights, conv_BWC: Tensor, ssm_BHPN: Tensor, valid_B1: Tensor, eps: float):
    """See generation.py. Two kernels: heads are independent up to the norm, which takes whole rows."""
    conv_C1K, conv_bias_C, dt_bias_H, A_log_H, D_H, norm_D = (w if w is None else w.contiguous() for w in weights)
    projected_BX, valid_B1 = dense_rows(projected_BX), valid_B1.contiguous()
    (B, W, C), (_, H, P, N), D = conv_BWC.shape, ssm_BHPN.shape, len(norm_D)
    gated_BD, out_BD = projected_BX.new_empty(B, D, dtype=torch.float32), norm_D.new_empty(B, D)
    is_few, overlaps, stride = B * H < 2 * MULTIPROCESSORS, overlap(projected_BX), projected_BX.stride(0)
    BLOCK_P = max(P // 4, 1) if is_few else min(P, SCAN_P)  # few rows: more blocks
    _mamba_scan[(H * (P // BLOCK_P), B)](
        projected_BX, conv_BWC, conv_C1K, conv_bias_C, dt_bias_H, A_log_H, D_H, ssm_BHPN, valid_B1, gated_BD,
        stride, H, D, N, C, P=P, W=W, BLOCK_P=BLOCK_P, BLOCK_N=next_power_of_2(N), HAS_DT_BIAS=dt_bias_H is not None,
        HAS_D=D_H is not None, EARLY=is_few, num_warps=4 if is_few else SCAN_WARPS, **overlaps,
    )  # fmt: skip
    blocks = 1 + (cdiv(C, SHIFTED) if W else 0)
    _mamba_norm[(blocks, B)](
        projected_BX, conv_BWC, norm_D, valid_B1, gated_BD, out_BD, stride, D, C, eps,
        W=W, BLOCK_D=next_power_of_2(D), BLOCK_C=SHIFTED, num_warps=8, **overlaps,
    )  # fmt: skip
    return out_BD


# ----------------------------------------------------------------------------------------------------------- attention


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, position, p, inside, R: tl.constexpr):
    """Channels p of one head, turned by the angles of its position, rounded to x's dtype."""
    x = tl.load(x_ptr + p, mask=inside, other=0.0).to(tl.float32)
    if R > 0:
        turns, first = p < 2 * R, p < R
        other = tl.load(x_ptr + tl.where(first, p + R, p - R), mask=turns, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + position * R + p % R, mask=turns, other=1.0)
        sin = tl.load(sin_ptr + position * R + p % R, mask=turns, other=0.0)
        x = x * cos + tl.where(first, -other, other) * sin
    return x.to(x_ptr.dtype.element_ty)


@kernel
def _attend(
    qkv_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, start_ptr, active_ptr, out_ptr, parts_ptr, scale, H, W, S,
    P: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: writes the new key and value, attends over the ring. SPLIT: over one part of it."""
    let_next_begin(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    h, b, s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    p = tl.arange(0, BLOCK_P)
    inside = p < P
    D = H * P
    at_part = ((b * H + h) * S + s) * (P + 2)
    row_ptr = qkv_ptr + b * 3 * D + h * P
    is_active, start = tl.load(active_ptr + b) != 0, tl.load(start_ptr + b)
    v_new = tl.load(row_ptr + 2 * D + p, mask=inside, other=0.0)
    if not is_active:
        if not SPLIT:
            tl.store(out_ptr + b * D + h * P + p, tl.zeros((BLOCK_P,), out_ptr.dtype.element_ty), mask=inside)
        return
    slot = start % W
    q = _rotated(row_ptr, cos_ptr, sin_ptr, start, p, inside, R).to(tl.float32) * scale
    ring = b * W * D + h * P
    acc = tl.zeros((BLOCK_P,), tl.float32)
    highest, total = tl.full((), -float("inf"), tl.float32), tl.full((), 0.0, tl.float32)
    if s == 0:  # the token itself
        k = _rotated(row_ptr + D, cos_ptr, sin_ptr, start, p, inside, R)
        tl.store(k_ptr + ring + slot * D + p, k, mask=inside)
        tl.store(v_ptr + ring + slot * D + p, v_new, mask=inside)
        highest, total, acc = tl.sum(q * k.to(tl.float32), 0), tl.full((), 1.0, tl.float32), v_new.to(tl.float32)
    filled = tl.minimum(start, W)
    each = tl.cdiv(tl.cdiv(filled, S), BLOCK_W) * BLOCK_W  # slots of a part
    for first in range(s * each, tl.minimum(s * each + each, filled), BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        seen = (w < filled) & (w != slot)  # that slot's key, where it has one, has just left the window
        at = ring + w[:, None].to(tl.int64) * D + p[None, :]
        both = seen[:, None] & inside[None, :]
        k = tl.load(k_ptr + at, mask=both, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=both, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(q[None, :] * k, 1), -float("inf"))
        new = tl.maximum(highest, tl.max(score, 0))
        safe = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet: all weights are zero
        kept, weight = tl.exp2((highest - safe) * LOG2_E), tl.exp2((score - safe) * LOG2_E)
        total = total * kept + tl.sum(weight, 0)
        acc = acc * kept + tl.sum(weight[:, None] * v, 0)
        highest = new
    if SPLIT:
        tl.store(parts_ptr + at_part + p, acc, mask=inside)
        tl.store(parts_ptr + at_part + P, highest)
        tl.store(parts_ptr + at_part + P + 1, total)
    else:
        tl.store(out_ptr + b * D + h * P + p, (acc / total).to(out_ptr.dtype.element_ty), mask=inside)


@kernel
def _combine(
    parts_ptr, active_ptr, out_ptr, H, S,
    P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Attention over a whole ring from that over its parts."""
    let_next_begin(OVERLAPS)
    wait_for_inputs(OVERLAPS)
    h, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s, p = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_P)
    there, inside = s < S, p < P
    row = tl.zeros((BLOCK_P,), tl.float32)
    if tl.load(active_ptr + b) != 0:
        at = parts_ptr + ((b * H + h) * S + s) * (P + 2)
        highest = tl.load(at + P, mask=there, other=-float("inf"))
        weight = tl.exp2((highest - tl.max(highest, 0)) * LOG2_E)
        acc = tl.load(at[:, None] + p[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total = tl.sum(weight * tl.load(at + P + 1, mask=there, other=0.0), 0)
        row = tl.sum(weight[:, None] * acc, 0) / total
    tl.store(out_ptr + b * H * P + h * P + p, row.to(out_ptr.dtype.element_ty), mask=inside)


def attention_step(
    qkv_BX: Tensor, k_BWHP: Tensor, v_BWHP: Tensor, start_B: Tensor, valid_B1: Tensor, cos_MR: Tensor, sin_MR: Tensor
) -> Tensor:
    """See generation.py. A long ring is read in parts where sequences and heads alone would leave the GPU idle."""
    B, W, H, P = k_BWHP.shape
    qkv_BX, start_B, valid_B1, cos_MR, sin_MR = (x.contiguous() for x in (qkv_BX, start_B, valid_B1, cos_MR, sin_MR))
    S = max(1, min(W // (2 * SLOTS), 2 * MULTIPROCESSORS // (B * H)))
    out_BD = qkv_BX.new_empty(B, H * P)
    parts = out_BD if S == 1 else qkv_BX.new_empty(B, H, S, P + 2, dtype=torch.float32)
    BLOCK_P = next_power_of_2(P)
    _attend[(H, B, S)](
        qkv_BX, k_BWHP, v_BWHP, cos_MR, sin_MR, start_B, valid_B1, out_BD, parts, P**-0.5, H, W, S,
        P=P, R=cos_MR.shape[1], BLOCK_P=BLOCK_P, BLOCK_W=SLOTS, SPLIT=S > 1, num_warps=4, **overlap(qkv_BX),
    )  # fmt: skip
    if S > 1:
        _combine[(H, B)](
            parts, valid_B1, out_BD, H, S,
            P=P, BLOCK_P=BLOCK_P, BLOCK_S=next_power_of_2(S), num_warps=2, **overlap(qkv_BX),
        )  # fmt: skip
    return out_BD
