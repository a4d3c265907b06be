"""RMS norms with what stands before them, forward and backward each in one pass over memory.

Legend: T tokens, D channels. Everything is computed in at least float32.

This file has the definitions and the choice; the Triton kernels that run on a GPU are in norm_triton.py.
"""

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


def add_norm_backward(
    dx_TD: Tensor, dsum_TD: Tensor | None, sum_TD: Tensor, scale_T: Tensor, weight_D: Tensor, again: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dresidual_TD, ddelta_TD, dweight_D, x_TD) of `add_norm_forward`, the last the same bits as there; None if not
    wanted `again`.

    dsum_TD: the gradient of sum_TD, None for zeros. dresidual_TD and ddelta_TD are the same numbers, in the dtypes of
    sum_TD and of dx_TD.
    """
    if _fast("add_norm", dx_TD):
        from hnet_kernels import norm_triton

        return norm_triton.add_norm_backward(dx_TD, dsum_TD, sum_TD, scale_T, weight_D, again)
    d_TD, dweight_D, x_TD = _norm_backward(dx_TD, sum_TD, scale_T, weight_D)
    if dsum_TD is not None:
        d_TD = d_TD + dsum_TD
    return d_TD, d_TD.to(dx_TD.dtype), dweight_D, x_TD if again else None


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
