"""RMS norms with what stands before them, forward and backward each in one pass over memory.

Legend: T tokens, D channels. Everything is computed in at least float32.

This file has the definitions and the choice; the Triton kernels that run on a GPU are in norm_triton.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import obstacle_anywhere, use_fast, wide

WIDEST = 8192  # channels: a row must fit into the registers of one program


def _fast(operation: str, x_TD: Tensor) -> bool:
    return use_fast(operation, x_TD.device.type, x_TD.dtype, obstacle_anywhere(x_TD, WIDEST))


def _norm(u_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale_T = torch.rsqrt(u_TD.square().mean(-1) + eps)
    return (u_TD * scale_T[:, None] * weight_D).to(weight_D.dtype), scale_T


def _norm_backward(dx_TD: Tensor, u_TD: Tensor, scale_T: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(du_TD, dweight_D, x_TD) of x = u * scale * weight, scale being 1 / rms(u)."""
    dx_TD, unit_TD = wide(dx_TD), u_TD * scale_T[:, None]
    g_TD = dx_TD * weight_D
    du_TD = scale_T[:, None] * (g_TD - unit_TD * (g_TD * unit_TD).mean(-1, keepdim=True))
    return du_TD, (dx_TD * unit_TD).sum(0).to(weight_D.dtype), (unit_TD * weight_D).to(weight_D.dtype)


def add_norm_forward(
    residual_TD: Tensor | None, delta_TD: Tensor, weight_D: Tensor, eps: float, keep_x: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum_TD, x_TD, scale_T): sum = residual + delta, x = sum * scale * weight, scale = 1 / rms(sum).

    residual_TD: at least float32, or None for zeros. sum_TD and scale_T have its dtype, x_TD that of weight_D.
    keep_x: a backward will need x_TD too.
    """
    if _fast("add_norm", delta_TD):
        from hnet_kernels import norm_triton  # not above: triton is not everywhere

        return norm_triton.add_norm_forward(residual_TD, delta_TD, weight_D, eps, keep_x)
    sum_TD = wide(delta_TD).clone() if residual_TD is None else residual_TD + delta_TD
    return sum_TD, *_norm(sum_TD, weight_D, eps)


class Parted(NamedTuple):
    """Numbers in a dtype that products take, and what rounding to it took from them, see `part`."""

    x: Tensor
    rest: Tensor | None


def part(x: Tensor, dtype: torch.dtype) -> Parted:
    """x in `dtype`. Of a float32 x that is made bfloat16, which has its first 8 significant bits, `rest` has the next
    8, rounded, as int8: together they are off by 2^-16 at most, by 2^-15 where 128 would have been next. None for
    other dtypes."""
    rounded = x.to(dtype)
    if (x.dtype, dtype) != (torch.float32, torch.bfloat16):
        return Parted(rounded, None)
    rest = x.view(torch.int32) - (rounded.view(torch.int16).to(torch.int32) << 16)
    return Parted(rounded, ((rest + 128) >> 8).clamp_max(127).to(torch.int8))


def whole(x: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `part` has parted, in the dtype that it had."""
    if rest is None:
        return x.to(dtype)
    return ((x.view(torch.int16).to(torch.int32) << 16) + (rest.to(torch.int32) << 8)).view(torch.float32)


def add_norm_backward(
    dx_TD: Tensor, dsum: Parted | None, sum_TD: Tensor, scale_T: Tensor, weight_D: Tensor, again: bool = True
) -> tuple[Parted, Tensor, Tensor | None]:
    """(dboth, dweight_D, x_TD) of `add_norm_forward`: the gradient of residual and of delta, which is that of their
    sum; and x_TD, the same bits as there, or None if not wanted `again`.

    dsum: the gradient of sum_TD but for what comes through x_TD, None for zeros. It and dboth are `part`ed, in dx_TD's
    dtype: products want it so, and along a residual stream it is not to be rounded at each step.
    """
    if _fast("add_norm", dx_TD):
        from hnet_kernels import norm_triton

        dboth_TD, rest_TD, dweight_D, x_TD = norm_triton.add_norm_backward(
            dx_TD, *(dsum or (None, None)), sum_TD, scale_T, weight_D, again
        )
        return Parted(dboth_TD, rest_TD), dweight_D, x_TD
    d_TD, dweight_D, x_TD = _norm_backward(dx_TD, sum_TD, scale_T, weight_D)
    if dsum is not None:
        d_TD = d_TD + whole(*dsum, d_TD.dtype)
    return part(d_TD, dx_TD.dtype), dweight_D, x_TD if again else None


def gated_norm_forward(y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x_TD, scale_T): the norm of u = y silu(z), x = u * scale * weight, scale = 1 / rms(u).

    y_TD, z_TD: one floating dtype; rows of z_TD may be parts of longer ones. x_TD has weight_D's dtype.
    """
    if _fast("gated_norm", y_TD):
        from hnet_kernels import norm_triton

        return norm_triton.gated_norm_forward(y_TD, z_TD, weight_D, eps)
    return _norm(wide(y_TD) * F.silu(wide(z_TD)), weight_D, eps)


def gated_norm_backward(
    dx_TD: Tensor, y_TD: Tensor, z_TD: Tensor, scale_T: Tensor, weight_D: Tensor, dz_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy_TD, dweight_D, x_TD) of `gated_norm_forward`, the last the same bits as there.

    Writes z's gradient to dz_TD, perhaps parts of longer rows.
    """
    if _fast("gated_norm", y_TD):
        from hnet_kernels import norm_triton

        return norm_triton.gated_norm_backward(dx_TD, y_TD, z_TD, scale_T, weight_D, dz_TD)
    y, z = wide(y_TD), wide(z_TD)
    gate_TD = F.silu(z)
    du_TD, dweight_D, x_TD = _norm_backward(dx_TD, y * gate_TD, scale_T, weight_D)
    dz_TD.copy_(torch.ops.aten.silu_backward(du_TD * y, z))
    return (du_TD * gate_TD).to(y_TD.dtype), dweight_D, x_TD
