"""Triton kernels for the operations of pointwise.py, where the definitions are.

Legend: T tokens, I inner channels of a SwiGLU, H heads, P channels per head, R = half the rotary dimensions, M
positions. All are bound by memory: each element is read once and written once.
"""

import torch
import triton.language as tl
from torch import Tensor

from hnet_kernels.launch import cdiv, kernel, next_power_of_2, on_device_of
from hnet_kernels.saved import saved_empty
from hnet_kernels.triton_math import let_next_begin, overlap, sigmoid, wait_for_inputs

ELEMENTS = 1024  # of a thread block of SwiGLU
TOKENS = 32  # of a thread block of the rotation


@kernel  # n is specialized: where 16 divides it, several elements are moved at once
def _to_float32(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32), mask=i < n)


@kernel
def _swiglu(both_ptr, h_ptr, inner, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    let_next_begin(OVERLAPS)
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inner
    wait_for_inputs(OVERLAPS)
    value = tl.load(both_ptr + t * 2 * inner + i, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both_ptr + t * 2 * inner + inner + i, mask=inside, other=0.0).to(tl.float32)
    h = gate * sigmoid(gate) * value
    tl.store(h_ptr + t * inner + i, h.to(h_ptr.dtype.element_ty), mask=inside)


@kernel
def _swiglu_backward(dh_ptr, both_ptr, dboth_ptr, h_ptr, inner, BLOCK: tl.constexpr, RECOMPUTE_H: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inner
    dh = tl.load(dh_ptr + t * inner + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(both_ptr + t * 2 * inner + i, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both_ptr + t * 2 * inner + inner + i, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    if RECOMPUTE_H:
        h = gate * s * value  # the same bits as in the forward
        tl.store(h_ptr + t * inner + i, h.to(h_ptr.dtype.element_ty), mask=inside)
    dvalue = dh * gate * s
    dgate = dh * value * s * (1 + gate * (1 - s))
    tl.store(dboth_ptr + t * 2 * inner + i, dvalue.to(dboth_ptr.dtype.element_ty), mask=inside)
    tl.store(dboth_ptr + t * 2 * inner + inner + i, dgate.to(dboth_ptr.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["T"])
def _rotate(
    x_ptr, cos_ptr, sin_ptr, position_ptr, T, stride,
    P: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rotates one head of some tokens in place by the angles of their positions; BACK: by the negative angles."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)[None, :]
    inside = (t < T)[:, None] & (r < R)
    angle = tl.load(position_ptr + t, mask=t < T, other=0)[:, None] * R + r
    cos, sin = tl.load(cos_ptr + angle, mask=inside, other=0.0), tl.load(sin_ptr + angle, mask=inside, other=0.0)
    if BACK:
        sin = -sin
    head = x_ptr + t.to(tl.int64)[:, None] * stride + tl.program_id(1) * P + r
    a = tl.load(head, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(head + R, mask=inside, other=0.0).to(tl.float32)
    tl.store(head, (a * cos - b * sin).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(head + R, (b * cos + a * sin).to(x_ptr.dtype.element_ty), mask=inside)


def to_float32(x: Tensor) -> Tensor:
    """`to_float32` of pointwise.py."""
    assert x.is_contiguous()
    out, n = x.new_empty(x.shape, dtype=torch.float32), x.numel()
    if n:
        with on_device_of(x):
            _to_float32[(cdiv(n, 2 * ELEMENTS),)](x, out, n, BLOCK=2 * ELEMENTS)
    return out


def swiglu_forward(both_T2I: Tensor) -> Tensor:
    """h_TI of `swiglu_forward` in pointwise.py."""
    T, inner, both_T2I = len(both_T2I), both_T2I.shape[1] // 2, both_T2I.contiguous()
    h_TI = saved_empty(both_T2I, T, inner)
    with on_device_of(h_TI):
        _swiglu[(T, cdiv(inner, ELEMENTS))](both_T2I, h_TI, inner, BLOCK=ELEMENTS, **overlap(h_TI))
    return h_TI


def swiglu_backward(dh_TI: Tensor, both_T2I: Tensor, recompute_h: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dboth_T2I, h_TI) of `swiglu_backward` in pointwise.py."""
    T, inner = dh_TI.shape
    both_T2I, dh_TI = both_T2I.contiguous(), dh_TI.contiguous()
    dboth_T2I, h_TI = both_T2I.new_empty(T, 2 * inner), both_T2I.new_empty(T, inner) if recompute_h else None
    with on_device_of(dh_TI):
        _swiglu_backward[(T, cdiv(inner, ELEMENTS))](
            dh_TI, both_T2I, dboth_T2I, h_TI, inner, BLOCK=ELEMENTS, RECOMPUTE_H=recompute_h
        )
    return dboth_T2I, h_TI


def rotate_(qkv_T3HP: Tensor, cos_MR: Tensor, sin_MR: Tensor, position_T: Tensor, back: bool) -> Tensor:
    """`rotate_` of pointwise.py; each token's q, k and v are adjacent."""
    (T, _, H, P), R = qkv_T3HP.shape, cos_MR.shape[1]
    assert qkv_T3HP[:1].is_contiguous()
    if T and R:
        with on_device_of(qkv_T3HP):
            _rotate[(cdiv(T, TOKENS), 2 * H)](
                qkv_T3HP, cos_MR.contiguous(), sin_MR.contiguous(), position_T.contiguous(), T, qkv_T3HP.stride(0),
                P=P, R=R, BLOCK_T=TOKENS, BLOCK_R=next_power_of_2(R), BACK=back, num_warps=2,
            )  # fmt: skip
    return qkv_T3HP
