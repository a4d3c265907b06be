"""A Mamba-2 mixer (arXiv 2405.21060) between its two projections: convolution, scan, skip, gate and norm.

Legend: T tokens, H heads, P channels per head, D = H P inner channels, N state size, K taps, X channels of the input
projection's result: z (D), x (D), B (N), C (N), dt (H).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.conv import causal_conv_silu, causal_conv_silu_backward_to, causal_conv_silu_forward
from hnet_kernels.dispatch import operation, wide
from hnet_kernels.gradients import slot_of
from hnet_kernels.norm import gated_norm_backward, gated_norm_forward
from hnet_kernels.recompute import Recomputed, mode, recomputed, recomputed_of
from hnet_kernels.saved import save_if, save_tensor
from hnet_kernels.ssd import mamba2_scan_backward, mamba2_scan_forward, ssd


@operation
def mamba2_inner(
    projected_TX: Tensor, conv_D1K: Tensor, conv_bias_D: Tensor, dt_bias_H: Tensor | None, A_log_H: Tensor,
    D_H: Tensor | None, norm_D: Tensor, position_T: Tensor, cu_seqlens: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """The mixer from the input projection's result to the output projection's input, (T, D).

    x, B, C = silu(conv(x, B, C)); h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T with dt = softplus(dt + dt_bias) and
    A = -exp(A_log); y_t = h_t C_t + D x_t; then the norm of y * silu(z), the gate before the norm. h = 0 before each
    document. None for dt_bias or D: zeros.

    projected_TX, convolution and norm_D: the compute dtype. A_log, dt_bias, D: at least float32.
    """
    H, D, conv_dim = len(A_log_H), len(norm_D), len(conv_bias_D)
    N, dtype = (conv_dim - D) // 2, torch.promote_types(A_log_H.dtype, torch.float32)
    z_TD, xBC, dt_TH = projected_TX.split([D, conv_dim, H], dim=-1)
    x_TD, B_TN, C_TN = causal_conv_silu(xBC, conv_D1K, conv_bias_D, position_T).split([D, N, N], dim=-1)
    x_THP = x_TD.unflatten(-1, (H, D // H))
    dt_TH = F.softplus(dt_TH.to(dtype) + (0 if dt_bias_H is None else dt_bias_H))
    y_THP = ssd(x_THP, dt_TH, -A_log_H.to(dtype).exp(), B_TN, C_TN, cu_seqlens)
    y_THP = y_THP if D_H is None else y_THP + D_H[:, None] * x_THP
    u_TD = wide(y_THP.flatten(1)) * F.silu(wide(z_TD))
    return (u_TD * torch.rsqrt(u_TD.square().mean(-1, keepdim=True) + eps) * norm_D).to(norm_D.dtype)


class Mixed:
    """The results of the mixer's steps. `states`: what the scan saves for its backward."""

    def __init__(self, projected_TX, weights, position_T, cu_seqlens, eps, all_saved: bool):
        (conv_D1K, conv_bias_D), (A_log_H, dt_bias_H, D_H), norm_D = weights
        self.projected_TX = projected_TX
        z_TD, before, raw_TH = projected_TX.split([len(norm_D), len(conv_bias_D), len(A_log_H)], dim=-1)
        with save_if(all_saved):
            self.after = causal_conv_silu_forward(before, conv_D1K, conv_bias_D, position_T)
        x_THP, B_TN, C_TN = _parts(self.after, len(A_log_H), len(norm_D))
        y_THP, self.states = mamba2_scan_forward(
            x_THP, raw_TH, wide(dt_bias_H), wide(A_log_H), B_TN, C_TN, wide(D_H), cu_seqlens, all_saved
        )
        self.y_TD = y_THP.flatten(1)
        self.gated_TD, self.scale_T = gated_norm_forward(self.y_TD, z_TD, norm_D, eps, all_saved)


def _parts(after: Tensor, H: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, B and C as views of the convolution's result."""
    N = (after.shape[1] - D) // 2
    x_TD, B_TN, C_TN = after.split([D, N, N], dim=-1)
    return x_TD.unflatten(-1, (H, D // H)), B_TN, C_TN


class Mamba2Inner(torch.autograd.Function):
    """Gradients: of all inputs but the documents."""

    @staticmethod
    def forward(
        ctx, projected_TX, conv_D1K, conv_bias_D, dt_bias_H, A_log_H, D_H, norm_D, position_T, cu_seqlens, eps,
        how: str, result: list,
    ) -> Tensor:  # fmt: skip
        ctx.slots = (
            slot_of("convolution", conv_D1K, conv_bias_D),
            slot_of("heads", A_log_H, dt_bias_H, D_H),
            slot_of("gated norm", norm_D),
        )
        conv_D1K, conv_bias_D, A_log_H, dt_bias_H, D_H, norm_D = (
            save_tensor(x.detach()) for x in (conv_D1K, conv_bias_D, A_log_H, dt_bias_H, D_H, norm_D)
        )
        weights = (conv_D1K, conv_bias_D), (A_log_H, dt_bias_H, D_H), norm_D
        with save_if(how != "block"):
            mixed = Mixed(projected_TX.detach(), weights, position_T, cu_seqlens, eps, how == "none")
        before = recomputed_of(projected_TX)
        ctx.weights, ctx.position_T, ctx.cu_seqlens, ctx.recompute = weights, position_T, cu_seqlens, None
        if how == "block" and before is not None:
            before.users += 1
            ctx.recompute = Recomputed(lambda: Mixed(before.get(), weights, position_T, cu_seqlens, eps, True))
            ctx.recompute.users += 1
            ctx.save_for_backward()
        elif how == "none":
            ctx.save_for_backward(projected_TX, mixed.y_TD, mixed.scale_T, mixed.after, *mixed.states)
        else:
            mixed.y_TD, mixed.scale_T = save_tensor(mixed.y_TD), save_tensor(mixed.scale_T)
            ctx.save_for_backward(projected_TX, mixed.y_TD, mixed.scale_T)
        result += [ctx.recompute, mixed.y_TD]
        return mixed.gated_TD

    @staticmethod
    def backward(ctx, dgated_TD: Tensor):
        (conv_D1K, conv_bias_D), (A_log_H, dt_bias_H, D_H), norm_D = ctx.weights
        conv, heads, gate = ctx.slots
        if ctx.recompute is not None:
            mixed = ctx.recompute.get()
            projected_TX, y_TD, scale_T = mixed.projected_TX, mixed.y_TD, mixed.scale_T
            after, states = mixed.after, mixed.states
            del mixed
        else:
            projected_TX, y_TD, scale_T, *more = ctx.saved_tensors
            after, *states = more or [None]
        dprojected_TX = torch.empty_like(projected_TX)
        widths = [len(norm_D), len(conv_bias_D), len(A_log_H)]
        z, before, raw_TH = projected_TX.split(widths, dim=-1)
        dz, dbefore, draw_TH = dprojected_TX.split(widths, dim=-1)
        dy_TD, _ = gated_norm_backward(dgated_TD, y_TD, z, scale_T, norm_D, dz, gate, recompute_x=False)
        del y_TD, dgated_TD  # freed before the scan, which needs most memory
        if after is None:
            after = causal_conv_silu_forward(before, conv_D1K, conv_bias_D, ctx.position_T)
        dafter = torch.empty_like(after)
        x_THP, *BC = _parts(after, len(A_log_H), len(norm_D))
        out = *_parts(dafter, len(A_log_H), len(norm_D)), draw_TH
        mamba2_scan_backward(
            dy_TD.view_as(x_THP), x_THP, raw_TH, wide(dt_bias_H), wide(A_log_H), *BC, wide(D_H),
            ctx.cu_seqlens, out, heads, states,
        )  # fmt: skip
        causal_conv_silu_backward_to(dbefore, dafter, before, conv_D1K, conv_bias_D, ctx.position_T, conv)
        dA_log_H, ddt_bias_H, dD_H = heads.gradients()
        return (
            dprojected_TX, *conv.gradients(), ddt_bias_H, dA_log_H, dD_H, *gate.gradients(), None, None, None, None,
            None,
        )  # fmt: skip


@mamba2_inner.fast
def _(projected_TX, conv_D1K, conv_bias_D, dt_bias_H, A_log_H, D_H, norm_D, position_T, cu_seqlens, eps) -> Tensor:
    how, made = mode(), []
    dt_bias_H, D_H = (torch.zeros_like(A_log_H) if x is None else x for x in (dt_bias_H, D_H))
    position_T, cu_seqlens = save_tensor(position_T), save_tensor(cu_seqlens)
    gated_TD = Mamba2Inner.apply(
        projected_TX, conv_D1K, conv_bias_D, dt_bias_H, A_log_H, D_H, norm_D, position_T, cu_seqlens, eps, how, made
    )
    recompute, y_TD = made
    if recompute is not None:
        recompute.users += 1
        return recomputed(gated_TD, lambda: recompute.get().gated_TD)
    if how == "selective":
        z_TD, weight_D = save_tensor(projected_TX.detach())[:, : len(norm_D)], save_tensor(norm_D.detach())
        return recomputed(gated_TD, lambda: gated_norm_forward(y_TD, z_TD, weight_D, eps)[0])
    return gated_TD
