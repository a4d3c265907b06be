"""RMS norms with what stands before them, forward and backward each in one pass over memory; and the parts in which
they leave a residual stream and its gradient there.

Legend: T tokens, D channels. Everything is computed in at least float32.

This file has the definitions and the choice; the Triton kernels that run on a GPU are in norm_triton.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import obstacle_anywhere, use_fast, wide
from hnet_kernels.sums import Slot

WIDEST = 8192  # channels: a row must fit into the registers of one program


def _fast(operation: str, x_TD: Tensor) -> bool:
    return use_fast(operation, x_TD.device.type, x_TD.dtype, obstacle_anywhere(x_TD, WIDEST))


def _norm(u_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale_T = torch.rsqrt(u_TD.square().mean(-1) + eps)
    return (u_TD * scale_T[:, None] * weight_D).to(weight_D.dtype), scale_T


def _norm_backward(dx_TD: Tensor, u_TD: Tensor, scale_T: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(du_TD, dweight_D, x_TD) of x = u * scale * weight, scale being 1 / rms(u). dweight_D is at least float32."""
    dx_TD, unit_TD = wide(dx_TD), u_TD * scale_T[:, None]
    g_TD = dx_TD * weight_D
    du_TD = scale_T[:, None] * (g_TD - unit_TD * (g_TD * unit_TD).mean(-1, keepdim=True))
    return du_TD, (dx_TD * unit_TD).sum(0), (unit_TD * weight_D).to(weight_D.dtype)


class Parted(NamedTuple):
    """Float32 numbers as bfloat16, which has their first 8 significant bits, and the next 8, as int8, of one shape. Or,
    with None for a rest, numbers of any floating dtype. Contiguous."""

    x: Tensor
    rest: Tensor | None


def part(x: Tensor, dtype: torch.dtype) -> Parted:
    """x in parts where dtype, that of products with it, is bfloat16: off by 2^-16 at most, or by 2^-15 where 128 would
    have been the rest. Else x in that dtype."""
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


def add_norm_forward(
    residual: Parted | None, delta_TD: Tensor, weight_D: Tensor, eps: float, keep_x: bool = False
) -> tuple[Parted, Tensor, Tensor]:
    """(sum, x_TD, scale_T): sum = residual + delta, x = sum * scale * weight, scale = 1 / rms(sum).

    residual: None for zeros. It and the sum are in parts where delta is bfloat16, else at least float32; scale_T is at
    least float32. x_TD has weight_D's dtype. keep_x: a backward will need x_TD too.
    """
    if _fast("add_norm", delta_TD):
        from hnet_kernels import norm_triton  # not above: triton is not everywhere

        sum_TD, rest_TD, *others = norm_triton.add_norm_forward(
            *(residual or (None, None)), delta_TD, weight_D, eps, keep_x
        )
        return Parted(sum_TD, rest_TD), *others
    # without a residual, the sum of what is not bfloat16 may be delta itself
    wide_TD = wide(delta_TD) if residual is None else whole(*residual, wide(delta_TD).dtype) + delta_TD
    sum_ = part(wide_TD, torch.bfloat16 if delta_TD.dtype == torch.bfloat16 else wide_TD.dtype)
    return sum_, *_norm(whole(*sum_, wide_TD.dtype), weight_D, eps)


def norm_again(sum_: Parted, scale_T: Tensor, weight_D: Tensor) -> Tensor:
    """x_TD of `add_norm_forward`, the same bits."""
    if _fast("add_norm", sum_.x):
        from hnet_kernels import norm_triton

        return norm_triton.norm_again(*sum_, scale_T, weight_D)
    return (whole(*sum_, scale_T.dtype) * scale_T[:, None] * weight_D).to(weight_D.dtype)


def add_norm_backward(
    dx_TD: Tensor, dsum: Parted | None, sum_: Parted, scale_T: Tensor, weight_D: Tensor, dweight: Slot,
    again: bool = True,
) -> tuple[Parted, Tensor | None]:  # fmt: skip
    """(dboth, x_TD) of `add_norm_forward`: the gradient of residual and of delta, which is that of their sum; and x_TD,
    the same bits as there, or None if not wanted `again`. Fills the slot of weight_D's gradient.

    dsum: the gradient of the sum but for what comes through x_TD, None for zeros. It and dboth are in parts where dx_TD
    is bfloat16, so along a residual stream they are not rounded to that at each step; else they have dx_TD's dtype.
    """
    if _fast("add_norm", dx_TD):
        from hnet_kernels import norm_triton

        dboth_TD, rest_TD, x_TD = norm_triton.add_norm_backward(
            dx_TD, *(dsum or (None, None)), *sum_, scale_T, weight_D, dweight, again
        )
        return Parted(dboth_TD, rest_TD), x_TD
    d_TD, dweight_D, x_TD = _norm_backward(dx_TD, whole(*sum_, scale_T.dtype), scale_T, weight_D)
    if dsum is not None:
        d_TD = d_TD + whole(*dsum, d_TD.dtype)
    dweight.fill(dweight_D)
    return part(d_TD, dx_TD.dtype), x_TD if again else None


def gated_norm_forward(
    y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, eps: float, keep_x: bool = False
) -> tuple[Tensor, Tensor]:
    """(x_TD, scale_T): the norm of u = y silu(z), x = u * scale * weight, scale = 1 / rms(u).

    y_TD, z_TD: one floating dtype; rows of z_TD may be parts of longer ones. x_TD has weight_D's dtype. keep_x: a
    backward will need it too.
    """
    if _fast("gated_norm", y_TD):
        from hnet_kernels import norm_triton

        return norm_triton.gated_norm_forward(y_TD, z_TD, weight_D, eps, keep_x)
    return _norm(wide(y_TD) * F.silu(wide(z_TD)), weight_D, eps)


def gated_norm_backward(
    dx_TD: Tensor, y_TD: Tensor, z_TD: Tensor, scale_T: Tensor, weight_D: Tensor, dz_TD: Tensor, dweight: Slot,
    again: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dy_TD, x_TD) of `gated_norm_forward`, the latter the same bits as there, or None if not wanted `again`.

    Writes z's gradient to dz_TD, perhaps parts of longer rows, and fills the slot of weight_D's.
    """
    if _fast("gated_norm", y_TD):
        from hnet_kernels import norm_triton

        return norm_triton.gated_norm_backward(dx_TD, y_TD, z_TD, scale_T, weight_D, dz_TD, dweight, again)
    y, z = wide(y_TD), wide(z_TD)
    gate_TD = F.silu(z)
    du_TD, dweight_D, x_TD = _norm_backward(dx_TD, y * gate_TD, scale_T, weight_D)
    dz_TD.copy_(torch.ops.aten.silu_backward(du_TD * y, z))
    dweight.fill(dweight_D)
    return (du_TD * gate_TD).to(y_TD.dtype), x_TD if again else None
