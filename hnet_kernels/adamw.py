"""AdamW over flat memory: weights, gradients, moments and the weights' copies, each in one pass. And gradients' norms.

Legend: K blocks, B = BLOCK elements of one, G groups of parameters. A block belongs to one parameter, and so to one
group. What fills up a parameter's last block is zero in every tensor, and stays so.

This file has the definition and the choice; the Triton kernel that runs on a GPU is in adamw_triton.py.
"""

import importlib.util

import torch
from torch import Tensor

from hnet_kernels.dispatch import use_fast

BLOCK = 1024
NAN_BITS = 0x7FC00000


def _fast(operation: str, device: torch.device, dtype: torch.dtype) -> bool:
    obstacle = None
    if device.type != "cuda":
        obstacle = "no CUDA device"
    elif dtype != torch.float32:
        obstacle = f"dtype {str(dtype).removeprefix('torch.')}"
    elif importlib.util.find_spec("triton") is None:
        obstacle = "no triton"
    return use_fast(operation, device.type, dtype, obstacle)


def norms(g_KB: Tensor, first_P: Tensor, dtype: torch.dtype) -> Tensor:
    """The norms of P runs of blocks, (P,), in `dtype`: the same bits wherever a run lies.

    g_KB: contiguous, of that dtype or another, such as bfloat16. first_P: int32 (P + 1,), where each run begins and the
    one before ends.
    """
    if _fast("norms", g_KB.device, dtype):
        from hnet_kernels import adamw_triton  # not above: triton is not everywhere

        return adamw_triton.norms(g_KB, first_P)
    norm_K = torch.linalg.vector_norm(g_KB, dim=1, dtype=dtype)
    first, *ends = first_P.tolist()
    runs = [norm_K[begin:end].clone().norm() for begin, end in zip([first, *ends], ends)]
    return torch.stack(runs) if runs else norm_K.new_empty(0)


def halve(w: Tensor) -> tuple[Tensor, Tensor]:
    """(copy, rest) of float32 numbers: rounded to bfloat16, and the difference of their bits, int16.

    Halfway between two bfloat16 numbers the larger in size is taken, so that every difference fits into 16 bits. All
    that is not a number becomes one nan, as others would be rounded to numbers.
    """
    bits = torch.where(w.isnan(), NAN_BITS, w.view(torch.int32))
    copy = (bits + 2**15) >> 16
    return copy.to(torch.int16).view(torch.bfloat16), (bits - (copy << 16)).to(torch.int16)


def join(copy: Tensor, rest: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 numbers that `halve` was given, bit by bit. out: where they go, else new memory."""
    out = torch.empty_like(rest, dtype=torch.float32) if out is None else out
    bits = out.view(torch.int32).copy_(copy.view(torch.int16))
    bits.bitwise_left_shift_(16).add_(rest)
    return out


@torch.no_grad()
def adamw_(
    w_KB: Tensor | None,
    copy_KB: Tensor | None,
    rest_KB: Tensor | None,
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
    """One step of AdamW (Loshchilov and Hutter, 2019) in place; where found_inf isn't 0, nothing changes.

    w_KB, m_KB, v_KB: weights, first and second moments, of one dtype. g_KB: gradients, which are divided by scale, of
    that dtype or another, such as bfloat16. All contiguous.
    copy_KB: gets the weights, in its own dtype; None: there is none.
    rest_KB: None, or with copy_KB the weights as `halve` gives them; then w_KB is None.
    group_K: int32, each block's group. rates_G2: float64, (lr, lr * weight decay) of each.
    bias_2: float64, 1 - betas ** steps. scale, found_inf: one floating number each.
    """
    if _fast("adamw", m_KB.device, m_KB.dtype):
        from hnet_kernels import adamw_triton

        return adamw_triton.adamw_(
            w_KB, copy_KB, rest_KB, g_KB, m_KB, v_KB, group_K, rates_G2, bias_2, scale, found_inf, betas, eps
        )
    (beta1, beta2), root = betas, bias_2[1].sqrt()
    lr_K1, decay_K1 = rates_G2.to(m_KB.dtype)[group_K].split(1, dim=1)
    w = w_KB if rest_KB is None else join(copy_KB, rest_KB)
    g = g_KB.to(m_KB.dtype) / scale
    m = m_KB + (1 - beta1) * (g - m_KB)
    v = beta2 * v_KB + (1 - beta2) * g.square()
    w = w - decay_K1 * w - lr_K1 / bias_2[0] * m / (v.sqrt() / root + eps)
    copy, rest = (w, None) if rest_KB is None else halve(w)
    for old, new in ((w_KB, w), (copy_KB, copy), (rest_KB, rest), (g_KB, g), (m_KB, m), (v_KB, v)):
        if old is not None:
            old.copy_(torch.where(found_inf == 0, new, old))
