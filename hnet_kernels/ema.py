"""Exponential moving average over packed documents: the smoothing of chunks (H-Net paper, section 2.2.2).

Legend: T tokens and C chunks of all documents together, D channels.

This file has the definitions and the dispatch; the Triton kernels for GPUs are in ema_triton.py.
"""

import torch
from torch import Tensor

from hnet_kernels.dispatch import has_triton, operation, takes_kernels, use_fast
from hnet_kernels.ssd import document_ids, scan_forward


def _recurrence(x_CD: Tensor, gain_C: Tensor, log_a_C: Tensor, cu_seqlens: Tensor) -> Tensor:
    """s_k = exp(log_a_k) s_{k-1} + gain_k x_k: Mamba-2's scan with one head and a state of one element per channel."""
    one_C1 = torch.ones_like(x_CD[:, :1])
    return scan_forward(x_CD[:, None], gain_C[:, None], log_a_C[:, None], one_C1, one_C1, cu_seqlens)[:, 0]


def _fast(x: Tensor, compute: Tensor) -> bool:
    """Whether the kernels of ema_triton.py run on x. They compute in float32, which `compute`'s dtype must be."""
    reason = None
    if not takes_kernels(x.device.type):
        reason = "no CUDA device"
    elif compute.dtype != torch.float32 or x.dtype == torch.float64:
        reason = f"dtype {str(compute.dtype).removeprefix('torch.')}"
    elif not has_triton():
        reason = "no triton"
    return use_fast("ema", x.device.type, x.dtype, reason)


@operation
def smooth(y_CD: Tensor, p_C: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Smoothing (arXiv 2507.07955, eq. 5): z_k = p_k y_k + (1 - p_k) z_{k-1}, with z = 0 before each document.

    y_CD: any floating dtype. p_C: float32 or float64, strictly between 0 and 1. Returns z_CD in p's dtype.
    """
    document_C, k_C = document_ids(cu_seqlens, len(p_C)), torch.arange(len(p_C), device=p_C.device)
    counts_CC = (k_C[:, None] >= k_C) & (document_C[:, None] == document_C)  # y_j in z_k
    log_C = torch.log1p(-p_C).double().cumsum(0)
    fading_CC = (log_C[:, None] - log_C).masked_fill(~counts_CC, -torch.inf).exp().to(p_C.dtype)
    return (fading_CC * p_C) @ y_CD.to(p_C.dtype)


smooth.fast_everywhere = True  # the definition takes C^2 memory


class Smooth(torch.autograd.Function):
    """Gradients: of y and p."""

    @staticmethod
    def forward(ctx, y_CD: Tensor, p_C: Tensor, cu_seqlens: Tensor) -> Tensor:
        z_CD = ema_forward(y_CD, p_C, cu_seqlens)
        ctx.save_for_backward(y_CD, p_C, z_CD, cu_seqlens)
        return z_CD

    @staticmethod
    def backward(ctx, dz_CD: Tensor):
        return *ema_backward(dz_CD, *ctx.saved_tensors), None


@smooth.fast
def _(y_CD: Tensor, p_C: Tensor, cu_seqlens: Tensor) -> Tensor:
    return Smooth.apply(y_CD, p_C, cu_seqlens)


def ema_forward(y_CD: Tensor, p_C: Tensor, cu_seqlens: Tensor) -> Tensor:
    """z_k = p_k y_k + (1 - p_k) z_{k-1}, with z = 0 before each document.

    y_CD: any floating dtype. p_C: float32 or float64, strictly between 0 and 1. cu_seqlens: int (B + 1,).
    Returns z_CD in p's dtype, in which everything is computed.
    """
    if _fast(y_CD, p_C):
        from hnet_kernels import ema_triton  # not above: triton is not everywhere

        return ema_triton.ema_forward(y_CD, p_C, cu_seqlens)
    return _recurrence(y_CD.to(p_C.dtype), p_C, torch.log1p(-p_C), cu_seqlens)


def ema_backward(dz_CD: Tensor, y_CD: Tensor, p_C: Tensor, z_CD: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (dy_CD in y's dtype, dp_C in p's) of `ema_forward`, given the gradient dz_CD of its output z_CD.

    With g_k = dz_k + (1 - p_{k+1}) g_{k+1}, the same kind of recurrence in reverse:
    dy_k = p_k g_k and dp_k = g_k . (y_k - z_{k-1}).
    """
    if _fast(y_CD, p_C):
        from hnet_kernels import ema_triton

        return ema_triton.ema_backward(dz_CD.to(p_C.dtype), y_CD, p_C, z_CD, cu_seqlens)
    total = y_CD.shape[0]
    doc_C = document_ids(cu_seqlens, total)
    follows_C = (doc_C[1:] == doc_C[:-1]).to(p_C.dtype)  # chunk k + 1 belongs to the document of chunk k
    log_a_C = torch.cat([torch.log1p(-p_C[1:]), p_C.new_zeros(1)])  # the decay of g from k + 1 to k
    reversed_cu = (cu_seqlens[-1] - cu_seqlens).flip(0)
    g_CD = _recurrence(dz_CD.to(p_C.dtype).flip(0), torch.ones_like(p_C), log_a_C.flip(0), reversed_cu).flip(0)
    before_CD = torch.cat([z_CD.new_zeros(1, z_CD.shape[1]), z_CD[:-1] * follows_C[:, None]])
    return (p_C[:, None] * g_CD).to(y_CD.dtype), (g_CD * (y_CD.to(p_C.dtype) - before_CD)).sum(-1)


def sum_chunks(x_TD: Tensor, start_C: Tensor, out_CD: Tensor | None = None, spare: int | None = None) -> Tensor:
    """The sum of x over each chunk, (C, D): the gradient of giving every token the row of its chunk.

    start_C: int64, the first token of each chunk, increasing from 0; T for a chunk without tokens.
    x_TD: float32 or float64. out_CD: where to write the sums, contiguous.
    spare: the number of chunks without tokens whose sums, zeros, are written; the rows of the others are not defined.
    None: all are written.
    """
    if _fast(x_TD, x_TD):
        from hnet_kernels import ema_triton

        return ema_triton.sum_chunks(x_TD, start_C, out_CD, spare)
    chunk_T = torch.bucketize(torch.arange(len(x_TD), device=x_TD.device), start_C, right=True) - 1
    out_CD = x_TD.new_empty(len(start_C), x_TD.shape[1]) if out_CD is None else out_CD
    out_CD[: None if spare is None else int((start_C < len(x_TD)).sum()) + spare].zero_()
    return out_CD.index_add_(0, chunk_T, x_TD)
