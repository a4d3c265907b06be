"""The Triton kernels of adamw.py, where the definitions are.

Legend: K blocks of B elements, G parameter groups. The kernels are bound by memory. A step moves 24 bytes per element,
plus 2 or 4 for its gradient (twice that where gradients are scaled), plus 2 for a 16-bit compute weight that is not
part of a split weight. A thread block takes one block of elements. It loads the values of its group, which are cached,
after the elements, so that the elements do not wait. Norms read their input once.
"""

import torch
import triton.language as tl
from torch import Tensor

from hnet_kernels.adamw import NAN_BITS
from hnet_kernels.launch import cdiv, kernel, on_device_of

NAN = tl.constexpr(NAN_BITS)


@kernel
def _adamw(
    w_ptr, compute_ptr, low_ptr, g_ptr, m_ptr, v_ptr, group_ptr, rates_ptr, bias_ptr, scale_ptr, found_inf_ptr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_COMPUTE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """SPLIT: compute_ptr has the high 16 bits of the weights and low_ptr the low ones, see `split_float32`."""
    k = tl.program_id(0).to(tl.int64)
    at = k * BLOCK + tl.arange(0, BLOCK)
    if SPLIT:
        bits = (tl.load(compute_ptr + at).to(tl.int32) << 16) + tl.load(low_ptr + at)
        w = bits.to(tl.float32, bitcast=True)
    else:
        w = tl.load(w_ptr + at)
    g, m, v = tl.load(g_ptr + at), tl.load(m_ptr + at), tl.load(v_ptr + at)
    rates = rates_ptr + 2 * tl.load(group_ptr + k)
    lr, decay = tl.load(rates).to(tl.float32), tl.load(rates + 1).to(tl.float32)
    step_size = lr / tl.load(bias_ptr).to(tl.float32)
    unbias = 1 / tl.sqrt(tl.load(bias_ptr + 1).to(tl.float32))
    scale = tl.load(scale_ptr).to(tl.float32)
    finite = tl.load(found_inf_ptr) == 0
    g = g.to(tl.float32) * (1 / scale)
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    w -= decay * w
    w -= step_size * m / (tl.sqrt(v) * unbias + EPS)
    if SPLIT:
        bits = tl.where(w == w, w.to(tl.int32, bitcast=True), NAN)
        high = (bits + 32768) >> 16
        tl.store(compute_ptr + at, high.to(tl.int16), mask=finite)
        tl.store(low_ptr + at, (bits - (high << 16)).to(tl.int16), mask=finite)
    else:
        tl.store(w_ptr + at, w, mask=finite)
        if HAS_COMPUTE:
            tl.store(compute_ptr + at, w.to(compute_ptr.dtype.element_ty), mask=finite)
    tl.store(m_ptr + at, m, mask=finite)
    tl.store(v_ptr + at, v, mask=finite)
    tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), mask=finite & (scale != 1))


@kernel(do_not_specialize=["K"])
def _block_norms(g_ptr, norm_ptr, K, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = k.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    g = tl.load(g_ptr + at, mask=(k < K)[:, None], other=0.0).to(tl.float32)
    tl.store(norm_ptr + k, tl.sqrt_rn(tl.sum(g * g, 1)), mask=k < K)


@kernel
def _run_norms(norm_ptr, first_ptr, run_norm_ptr, BLOCK: tl.constexpr):
    """One thread block per run of blocks."""
    p = tl.program_id(0)
    first, end = tl.load(first_ptr + p), tl.load(first_ptr + p + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        k = start + tl.arange(0, BLOCK)
        norm = tl.load(norm_ptr + k, mask=k < end, other=0.0)
        total += norm * norm
    tl.store(run_norm_ptr + p, tl.sqrt_rn(tl.sum(total, 0)))


def norms(g_KB: Tensor, first_P: Tensor) -> Tensor:
    """`norms` of adamw.py, in float32."""
    (K, B), P, rows = g_KB.shape, len(first_P) - 1, 4
    assert g_KB.is_contiguous()
    norm_K, norm_P = (g_KB.new_empty(n, dtype=torch.float32) for n in (K, P))
    if P:
        with on_device_of(g_KB):
            _block_norms[(cdiv(K, rows),)](g_KB, norm_K, K, BLOCK=B, ROWS=rows)
            _run_norms[(P,)](norm_K, first_P, norm_P, BLOCK=1024)
    return norm_P


def adamw_(
    w_KB: Tensor | None, compute_KB: Tensor | None, low_KB: Tensor | None, g_KB: Tensor, m_KB: Tensor, v_KB: Tensor,
    group_K: Tensor, rates_G2: Tensor, bias_2: Tensor, scale: Tensor, found_inf: Tensor, betas: tuple[float, float],
    eps: float,
) -> None:  # fmt: skip
    """`adamw_` of adamw.py."""
    (K, B), split = m_KB.shape, low_KB is not None
    assert all(x is None or x.is_contiguous() for x in (w_KB, compute_KB, low_KB, g_KB, m_KB, v_KB, rates_G2))
    if K:
        with on_device_of(m_KB):
            _adamw[(K,)](
                w_KB, compute_KB.view(torch.int16) if split else compute_KB, low_KB, g_KB, m_KB, v_KB, group_K,
                rates_G2, bias_2, scale, found_inf, BETA1=betas[0], BETA2=betas[1], EPS=eps, BLOCK=B,
                HAS_COMPUTE=compute_KB is not None, SPLIT=split,
            )  # fmt: skip
