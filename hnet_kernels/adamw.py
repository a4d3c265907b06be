"""AdamW over flat memory: weights, compute weights, gradients and moments in one pass; and norms of gradients.

Legend: K blocks of B = BLOCK elements, G parameter groups. A block belongs to one parameter, and so to one group. The
padding of a parameter's last block is zero in every tensor, and stays zero.

This file has the definition and the dispatch; the Triton kernel for GPUs is in adamw_triton.py.
"""

import torch
from torch import Tensor

from hnet_kernels.dispatch import has_triton, takes_kernels, use_fast

BLOCK = 1024
NAN_BITS = 0x7FC00000


def _fast(operation: str, device: torch.device, dtype: torch.dtype) -> bool:
    reason = None
    if not takes_kernels(device.type):
        reason = "no CUDA device"
    elif dtype != torch.float32:
        reason = f"dtype {str(dtype).removeprefix('torch.')}"
    elif not has_triton():
        reason = "no triton"
    return use_fast(operation, device.type, dtype, reason)


def norms(g_KB: Tensor, first_P: Tensor, dtype: torch.dtype) -> Tensor:
    """The norms of P runs of blocks, (P,), in `dtype`. The bits do not depend on where a run is stored.

    g_KB: contiguous, of that dtype or another, such as bfloat16. first_P: int32 (P + 1,): the first block of each run,
    and the end of the last.
    """
    if _fast("norms", g_KB.device, dtype):
        from hnet_kernels import adamw_triton  # not above: triton is not everywhere

        return adamw_triton.norms(g_KB, first_P)
    norm_K = torch.linalg.vector_norm(g_KB, dim=1, dtype=dtype)
    first, *ends = first_P.tolist()
    runs = [norm_K[begin:end].clone().norm() for begin, end in zip([first, *ends], ends)]
    return torch.stack(runs) if runs else norm_K.new_empty(0)


def split_float32(w: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) of float32 values: rounded to bfloat16, and the difference of their bits as int16.

    Ties are rounded away from zero, so that every difference fits into 16 bits. Every nan becomes the same nan, because
    rounding could turn others into numbers.
    """
    bits = torch.where(w.isnan(), NAN_BITS, w.view(torch.int32))
    high = (bits + 2**15) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_float32(high: Tensor, low: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 values that `split_float32` was given, bit by bit. out: the result, else new memory."""
    out = torch.empty_like(low, dtype=torch.float32) if out is None else out
    bits = out.view(torch.int32).copy_(high.view(torch.int16))
    bits.bitwise_left_shift_(16).add_(low)
    return out


@torch.no_grad()
def adamw_(
    w_KB: Tensor | None,
    compute_KB: Tensor | None,
    low_KB: Tensor | None,
    g_KB: Tensor,
    m_KB: Tensor,
    v_KB: Tensor,
    group_K: Tensor,
    rates_G2: Tensor,
    bias_2: Tensor,
    scale: Tensor,
    found_inf: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) in place; where found_inf is not 0, nothing changes.

    w_KB, m_KB, v_KB: weights, first and second moments, of one dtype. g_KB: gradients, which are divided by scale, of
    that dtype or another, such as bfloat16. All are contiguous.
    compute_KB: receives the weights in its own dtype; or None.
    low_KB: None, or with compute_KB the weights as `split_float32` gives them; then w_KB is None.
    group_K: int32, the group of each block. rates_G2: float64, (lr, lr * weight decay) of each group.
    bias_2: float64, 1 - betas ** steps. scale, found_inf: one floating-point element each.
    """
    if _fast("adamw", m_KB.device, m_KB.dtype):
        from hnet_kernels import adamw_triton

        return adamw_triton.adamw_(
            w_KB, compute_KB, low_KB, g_KB, m_KB, v_KB, group_K, rates_G2, bias_2, scale, found_inf, betas, eps
        )
    (beta1, beta2), root = betas, bias_2[1].sqrt()
    lr_K1, decay_K1 = rates_G2.to(m_KB.dtype)[group_K].split(1, dim=1)
    w = w_KB if low_KB is None else join_float32(compute_KB, low_KB)
    g = g_KB.to(m_KB.dtype) / scale
    m = m_KB + (1 - beta1) * (g - m_KB)
    v = beta2 * v_KB + (1 - beta2) * g.square()
    w = w - decay_K1 * w - lr_K1 / bias_2[0] * m / (v.sqrt() / root + eps)
    high, low = (w, None) if low_KB is None else split_float32(w)
    for old, new in ((w_KB, w), (compute_KB, high), (low_KB, low), (g_KB, g), (m_KB, m), (v_KB, v)):
        if old is not None:
            old.copy_(torch.where(found_inf == 0, new, old))
