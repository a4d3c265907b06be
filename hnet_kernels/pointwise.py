"""Elementwise operations that would otherwise take several passes over memory, or slow ones: SwiGLU, rotation, casts.

Legend: T tokens, I inner channels of a SwiGLU, H heads, P channels per head, R = half the rotary dimensions, M
positions.

This file has the definitions and the dispatch; the Triton kernels for GPUs are in pointwise_triton.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import operation, use_fast, why_unsupported, wide
from hnet_kernels.recompute import mode, recomputed_from, save, saved
from hnet_kernels.saved import save_if


def _fast(operation: str, x: Tensor) -> bool:
    return use_fast(operation, x.device.type, x.dtype, why_unsupported(x))


def to_float32(x: Tensor) -> Tensor:
    """x.to(float32) for a contiguous x of 16 bits; others unchanged. Torch's copy moves 2 of an H200's 4.3 TB/s."""
    if x.dtype.itemsize > 2:
        return x
    if _fast("to_float32", x):
        from hnet_kernels import pointwise_triton  # not above: triton is not everywhere

        return pointwise_triton.to_float32(x)
    return x.float()


@operation
def swiglu(both_T2I: Tensor) -> Tensor:
    """silu(gate) * value of rows (value, gate): (T, 2 I) -> (T, I)."""
    value_TI, gate_TI = both_T2I.chunk(2, dim=-1)
    return F.silu(gate_TI) * value_TI


class SwiGLU(torch.autograd.Function):
    """Gradient: of the value and the gate."""

    @staticmethod
    def forward(ctx, both_T2I: Tensor, is_saved: bool) -> Tensor:
        save(ctx, both_T2I)
        with save_if(is_saved):
            return swiglu_forward(both_T2I)

    @staticmethod
    def backward(ctx, dh_TI: Tensor):
        return swiglu_backward(dh_TI, *saved(ctx), recompute_h=False)[0], None


@swiglu.fast
def _(both_T2I: Tensor) -> Tensor:
    if both_T2I.ndim != 2:
        return swiglu.definition(both_T2I)
    how = mode()
    h_TI = SwiGLU.apply(both_T2I, how == "none")
    return h_TI if how == "none" else recomputed_from(h_TI, both_T2I, swiglu_forward)


def swiglu_forward(both_T2I: Tensor) -> Tensor:
    """silu(gate) * value of rows (value, gate), computed in at least float32. Returns h_TI in their dtype."""
    if _fast("swiglu", both_T2I):
        from hnet_kernels import pointwise_triton

        return pointwise_triton.swiglu_forward(both_T2I)
    value_TI, gate_TI = wide(both_T2I).chunk(2, dim=-1)
    return (F.silu(gate_TI) * value_TI).to(both_T2I.dtype)


def swiglu_backward(dh_TI: Tensor, both_T2I: Tensor, recompute_h: bool = True) -> tuple[Tensor, Tensor | None]:
    """(dboth_T2I, h_TI) of `swiglu_forward`, the latter the same bits as there; None if `recompute_h` is False."""
    if _fast("swiglu", both_T2I):
        from hnet_kernels import pointwise_triton

        return pointwise_triton.swiglu_backward(dh_TI, both_T2I, recompute_h)
    value_TI, gate_TI = wide(both_T2I).chunk(2, dim=-1)
    silu_TI = F.silu(gate_TI)
    dvalue_TI = wide(dh_TI) * silu_TI
    dgate_TI = torch.ops.aten.silu_backward(wide(dh_TI) * value_TI, gate_TI)
    dboth_T2I = torch.cat([dvalue_TI, dgate_TI], dim=-1)
    return dboth_T2I.to(both_T2I.dtype), (silu_TI * value_TI).to(both_T2I.dtype) if recompute_h else None


def _turned(x_THP: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    R = cos_TR.shape[1]
    a, b, rest = x_THP[..., :R], x_THP[..., R : 2 * R], x_THP[..., 2 * R :]
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    return torch.cat([(a * cos - b * sin).to(x_THP.dtype), (b * cos + a * sin).to(x_THP.dtype), rest], dim=-1)


def rotate_(qkv_T3HP: Tensor, cos_MR: Tensor, sin_MR: Tensor, position_T: Tensor, back: bool = False) -> Tensor:
    """Rotates q and k in place: of each head, dimensions [0, R) and [R, 2R) by the angles of the token's position.

    `back` rotates by the negative angles: it turns the gradient of the result into the gradient of the input.
    """
    if _fast("rotary", qkv_T3HP):
        from hnet_kernels import pointwise_triton

        return pointwise_triton.rotate_(qkv_T3HP, cos_MR, sin_MR, position_T, back)
    cos_TR, sin_TR = cos_MR[position_T], sin_MR[position_T] * (-1 if back else 1)
    for x_THP in qkv_T3HP.unbind(1)[:2]:
        x_THP.copy_(_turned(x_THP, cos_TR, sin_TR))
    return qkv_T3HP
