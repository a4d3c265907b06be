"""Triton kernels for the smoothing of chunks and for the gradient of its upsampling. The definitions are in ema.py.

Legend: T tokens, C chunks, D channels, S runs of chunks.

z_k = a_k z_{k-1} + p_k y_k, where a_k is 1 - p_k, or 0 where a document begins. The kernels are bound by memory and
take two passes. `_totals` walks along each run of chunks as if it were the first. `_smooth` (in the backward
`_smooth_gradient`) adds the values that arrive from the runs before (after) its own, as far back as the decay is not
zero, and walks along the run once more. There are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels.launch import cdiv, dense_rows, kernel, on_device_of
from hnet_kernels.saved import saved_empty

RUN, CHANNELS, WARPS = 32, 128, 1  # chunks and channels of a thread block
SUM_CHUNKS, SUM_CHANNELS, SUM_WARPS = 4, 512, 4  # of a thread block that sums the tokens of some chunks


@triton.jit
def _decay(p_ptr, opens_ptr, k, C):
    """The decay of z from chunk k - 1 to k; 0 outside."""
    inside = (k >= 0) & (k < C)
    p = tl.load(p_ptr + k, mask=inside, other=1.0)
    return tl.where(tl.load(opens_ptr + k, mask=inside, other=1) != 0, 0.0, 1.0 - p)


@triton.jit
def _arriving(totals_ptr, through_ptr, s, S, d, in_D, D, REVERSE: tl.constexpr):
    STEP: tl.constexpr = 1 if REVERSE else -1
    state = tl.zeros(d.shape, tl.float32)
    weight = tl.full((), 1.0, tl.float32)
    m = s + STEP
    while (m >= 0) & (m < S) & (weight > 0):
        state += weight * tl.load(totals_ptr + m.to(tl.int64) * D + d, mask=in_D, other=0.0)
        weight *= tl.load(through_ptr + m)
        m += STEP
    return state


@kernel(do_not_specialize=["C"])
def _totals(
    x_ptr,
    p_ptr,
    opens_ptr,
    totals_ptr,
    through_ptr,
    C,
    D,
    x_stride,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """totals_SD: z at the end of each run (REVERSE: its gradient at the start); through_S: the decay of a run."""
    s = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d < D
    state = tl.zeros((BLOCK_D,), tl.float32)
    through = tl.full((), 1.0, tl.float32)
    for i in range(RUN):
        k = s * RUN + (RUN - 1 - i if REVERSE else i)
        x = tl.load(x_ptr + k.to(tl.int64) * x_stride + d, mask=in_D & (k < C), other=0.0).to(tl.float32)
        if REVERSE:
            a = _decay(p_ptr, opens_ptr, k + 1, C)
        else:
            a = _decay(p_ptr, opens_ptr, k, C)
            x *= tl.load(p_ptr + k, mask=k < C, other=0.0)
        state = a * state + x
        through *= a
    tl.store(totals_ptr + s.to(tl.int64) * D + d, state, mask=in_D)
    tl.store(through_ptr + s, through)


@kernel(do_not_specialize=["C", "S"])
def _smooth(
    y_ptr,
    p_ptr,
    opens_ptr,
    totals_ptr,
    through_ptr,
    z_ptr,
    C,
    S,
    D,
    y_stride,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    s = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d < D
    state = _arriving(totals_ptr, through_ptr, s, S, d, in_D, D, False)
    for i in range(RUN):
        k = s * RUN + i
        y = tl.load(y_ptr + k.to(tl.int64) * y_stride + d, mask=in_D & (k < C), other=0.0).to(tl.float32)
        state = _decay(p_ptr, opens_ptr, k, C) * state + tl.load(p_ptr + k, mask=k < C, other=0.0) * y
        tl.store(z_ptr + k.to(tl.int64) * D + d, state, mask=in_D & (k < C))


@kernel(do_not_specialize=["C", "S"])
def _smooth_gradient(
    dz_ptr,
    y_ptr,
    p_ptr,
    opens_ptr,
    totals_ptr,
    through_ptr,
    z_ptr,
    dy_ptr,
    dp_ptr,
    C,
    S,
    D,
    y_stride,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dy_CD, and the partial sums of dp over a block of channels, (blocks, C)."""
    s = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d < D
    g = _arriving(totals_ptr, through_ptr, s, S, d, in_D, D, True)
    for i in range(RUN):
        k = s * RUN + RUN - 1 - i
        inside = in_D & (k < C)
        row = k.to(tl.int64) * D + d
        dz = tl.load(dz_ptr + row, mask=inside, other=0.0)
        y = tl.load(y_ptr + k.to(tl.int64) * y_stride + d, mask=inside, other=0.0).to(tl.float32)
        opens = tl.load(opens_ptr + k, mask=k < C, other=1)
        before = tl.load(z_ptr + row - D, mask=inside & (opens == 0), other=0.0)
        g = _decay(p_ptr, opens_ptr, k + 1, C) * g + dz
        dy = tl.load(p_ptr + k, mask=k < C, other=0.0) * g
        tl.store(dy_ptr + row, dy.to(dy_ptr.dtype.element_ty), mask=inside)
        tl.store(dp_ptr + tl.program_id(0) * C + k, tl.sum(g * (y - before), 0), mask=k < C)


@kernel(do_not_specialize=["T", "C", "spare"])
def _sum_chunks(
    x_ptr, scale_ptr, start_ptr, sum_ptr, T, C, D, spare,
    SCALED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k_first = tl.program_id(0) * CHUNKS  # CUDA allows 65,535 thread blocks on the second axis
    if tl.load(start_ptr + k_first - spare, mask=k_first >= spare, other=-1) >= T:
        return
    k = k_first + tl.arange(0, CHUNKS)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = (d < D)[None, :]
    first = tl.load(start_ptr + k, mask=k < C, other=T)
    end = tl.load(start_ptr + k + 1, mask=k + 1 < C, other=T)
    total = tl.zeros((CHUNKS, BLOCK_D), tl.float32)
    for i in range(0, tl.max(end - first, 0), 4):
        for j in tl.static_range(4):  # tokens of each chunk, so that loads do not wait for each other
            t = first + i + j
            x = tl.load(x_ptr + t[:, None] * D + d[None, :], mask=(t < end)[:, None] & in_D, other=0.0)
            x = x.to(tl.float32)
            if SCALED:
                x *= tl.load(scale_ptr + t, mask=t < end, other=0.0)[:, None]
            total += x
    tl.store(sum_ptr + k.to(tl.int64)[:, None] * D + d[None, :], total, mask=(k < C)[:, None] & in_D)


def _opens(cu_seqlens: Tensor, C: int) -> Tensor:
    """int8 (C,): 1 where a document begins."""
    opens = torch.zeros(C + 1, dtype=torch.int8, device=cu_seqlens.device)
    return opens.index_fill_(0, cu_seqlens.long(), 1)  # the last entry is the end


def _walk(x_CD: Tensor, p_C: Tensor, opens_C: Tensor, reverse: bool) -> tuple[tuple, tuple[Tensor, Tensor], dict]:
    """The grid, the results of `_totals`, and the block sizes."""
    C, D = x_CD.shape
    grid = cdiv(D, CHANNELS), cdiv(C, RUN)
    blocks = {"RUN": RUN, "BLOCK_D": CHANNELS, "num_warps": WARPS}
    totals_SD, through_S = p_C.new_empty(grid[1], D), p_C.new_empty(grid[1])
    _totals[grid](x_CD, p_C, opens_C, totals_SD, through_S, C, D, x_CD.stride(0), REVERSE=reverse, **blocks)
    return grid, (totals_SD, through_S), blocks


def ema_forward(y_CD: Tensor, p_C: Tensor, cu_seqlens: Tensor) -> Tensor:
    """z_CD (float32) of `ema_forward` in ema.py. p_C: float32."""
    C, D = y_CD.shape
    z_CD = saved_empty(p_C, C, D)
    y_CD, p_C, opens_C = dense_rows(y_CD), p_C.contiguous(), _opens(cu_seqlens, C)
    with on_device_of(y_CD):
        grid, found, blocks = _walk(y_CD, p_C, opens_C, False)
        _smooth[grid](y_CD, p_C, opens_C, *found, z_CD, C, grid[1], D, y_CD.stride(0), **blocks)
    return z_CD


def ema_backward(dz_CD: Tensor, y_CD: Tensor, p_C: Tensor, z_CD: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(dy_CD, dp_C) of `ema_backward` in ema.py. dz_CD, p_C, z_CD: float32."""
    C, D = y_CD.shape
    dz_CD, z_CD, p_C = dz_CD.contiguous(), z_CD.contiguous(), p_C.contiguous()
    y_CD, opens_C = dense_rows(y_CD), _opens(cu_seqlens, C)
    dy_CD, dp_PC = y_CD.new_empty(C, D), p_C.new_empty(cdiv(D, CHANNELS), C)
    with on_device_of(y_CD):
        grid, found, blocks = _walk(dz_CD, p_C, opens_C, True)
        _smooth_gradient[grid](
            dz_CD, y_CD, p_C, opens_C, *found, z_CD, dy_CD, dp_PC, C, grid[1], D, y_CD.stride(0), **blocks
        )
    return dy_CD, dp_PC.sum(0)


def sum_chunks(
    x_TD: Tensor, start_C: Tensor, out_CD: Tensor | None = None, spare: int | None = None,
    scale_T: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(C, D), float32, of `sum_chunks` in ema.py, of x * scale. x_TD: float32 or of 16 bits."""
    (T, D), C = x_TD.shape, len(start_C)
    x_TD, sum_CD = x_TD.contiguous(), x_TD.new_empty(C, D, dtype=torch.float32) if out_CD is None else out_CD
    with on_device_of(x_TD):
        _sum_chunks[(cdiv(C, SUM_CHUNKS), cdiv(D, SUM_CHANNELS))](
            x_TD, x_TD if scale_T is None else scale_T.contiguous(), start_C.contiguous(), sum_CD, T, C, D,
            C if spare is None else spare, SCALED=scale_T is not None,
            CHUNKS=SUM_CHUNKS, BLOCK_D=SUM_CHANNELS, num_warps=SUM_WARPS,
        )  # fmt: skip
    return sum_CD
