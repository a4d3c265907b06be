"""Triton kernels for the norms of norm.py, where the definitions are.

Legend: T tokens, D channels, N thread blocks, L layers. The kernels are bound by memory: each reads its inputs once and
writes its outputs once. A thread block takes a few full rows at a time. In the backward it walks along its share of the
rows with the partial sums for the weight's gradient in registers; `sum_rows` reduces them. There are no atomics: the
results have the same bits every time on one kind of GPU. A block loads the next rows before it computes with the
current ones, so that it does not wait for memory. Rows longer than a tile are taken one at a time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels import cards
from hnet_kernels.gradients import Slot
from hnet_kernels.launch import cdiv, dense_rows, kernel, next_power_of_2, on_device_of
from hnet_kernels.saved import saved_empty
from hnet_kernels.triton_math import let_next_begin, overlap, sigmoid, wait_for_inputs

TILE = 2048  # elements of rows per thread block, in the forward


class Walk(NamedTuple):
    """How a backward walks through rows."""

    tile: int  # elements of rows that a thread block takes at a time
    blocks_per_sm: int
    warps: int


def _walk_add_norm(D: int) -> Walk:
    """Among the fastest on an H200 for rows of 512 to 2,048 (benchmarks/results/h200-2026-11-28-3/norm_ways.txt)."""
    return Walk(512, 6 if D <= 1024 else 3, max(4, next_power_of_2(D) // 512))


def _walk_gated_norm(D: int) -> Walk:
    """The same for rows of 1,024, 1,536, 2,048 and 3,072; 1,536 and 3,072 are padded to a power of two.

    Larger tiles would not fit into the registers of four warps.
    """
    few_warps = 1024 < D <= 3072 and D != 2048
    if few_warps:
        return Walk(1024, 3 if D < 2048 else 2, 4)
    return Walk(1024, 4 if D <= 1024 else 6, max(8, next_power_of_2(D) // 512))


@triton.jit
def _silu_parts(z):
    """silu(z) and its derivative."""
    s = sigmoid(z)
    return z * s, s * (1 + z * (1 - s))


@triton.jit
def _split24(x):
    """`split24` of norm.py, to bfloat16."""
    rounded = x.to(tl.bfloat16)
    low = x.to(tl.int32, bitcast=True) - (rounded.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return rounded, tl.minimum((low + 128) >> 8, 127).to(tl.int8)


@triton.jit
def _join24(x, low, SPLIT: tl.constexpr):
    """`join24` of norm.py, in float32."""
    if SPLIT:
        bits = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16) + (low.to(tl.int32) << 8)
        number = bits.to(tl.float32, bitcast=True)
    else:
        number = x.to(tl.float32)
    return number


@kernel(do_not_specialize=["T"])
def _add_norm(
    residual_ptr, residual_low_ptr, delta_ptr, weight_ptr, sum_ptr, low_ptr, x_ptr, scale_ptr, T, delta_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAPS)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    row = t.to(tl.int64)[:, None]
    wait_for_inputs(OVERLAPS)
    u = tl.load(delta_ptr + row * delta_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    at = row * D + d[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
        low = tl.load(residual_low_ptr + at, mask=inside, other=0) if SPLIT else 0
        u += _join24(residual, low, SPLIT)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    if SPLIT:
        first, low = _split24(u)
        tl.store(sum_ptr + at, first, mask=inside)
        tl.store(low_ptr + at, low, mask=inside)
        u = _join24(first, low, SPLIT)
    else:
        tl.store(sum_ptr + at, u, mask=inside)
    scale = 1 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
    x = u * scale[:, None] * weight[None, :]
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + t, scale, mask=t < T)


@kernel(do_not_specialize=["T"])
def _recompute_norm(
    sum_ptr, low_ptr, scale_ptr, weight_ptr, x_ptr, T,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    at = t.to(tl.int64)[:, None] * D + d[None, :]
    first = tl.load(sum_ptr + at, mask=inside, other=0.0)
    low = tl.load(low_ptr + at, mask=inside, other=0) if SPLIT else 0
    scale, weight = tl.load(scale_ptr + t, mask=t < T, other=0.0), tl.load(weight_ptr + d, mask=d < D, other=0.0)
    x = _join24(first, low, SPLIT) * scale[:, None] * weight.to(tl.float32)[None, :]
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_rows(ptr, t, stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows t of a (T, D) tensor; zeros from row `end` on."""
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(ptr + t.to(tl.int64)[:, None] * stride + d, mask=(t < end)[:, None] & (d < D), other=0.0)


@kernel(do_not_specialize=["T", "rows_per_block"])
def _add_norm_backward(
    dx_ptr, dsum_ptr, dsum_low_ptr, sum_ptr, sum_low_ptr, scale_ptr, weight_ptr, dboth_ptr, low_ptr, dweight_ptr,
    x_ptr, T, rows_per_block,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, HAS_DSUM: tl.constexpr, SPLIT: tl.constexpr,
    RECOMPUTE_X: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.program_id(0) * rows_per_block
    end = tl.minimum(first + rows_per_block, T)
    t = first + tl.arange(0, ROWS)
    next_dx = _load_rows(dx_ptr, t, D, end, D, BLOCK_D)
    next_sum = _load_rows(sum_ptr, t, D, end, D, BLOCK_D)
    next_sum_low = _load_rows(sum_low_ptr, t, D, end, D, BLOCK_D) if SPLIT else 0
    next_dsum = _load_rows(dsum_ptr, t, D, end, D, BLOCK_D) if HAS_DSUM else 0.0
    next_dsum_low = _load_rows(dsum_low_ptr, t, D, end, D, BLOCK_D) if HAS_DSUM and SPLIT else 0
    next_scale = tl.load(scale_ptr + t, mask=t < end, other=0.0)
    for start in range(first, end, ROWS):
        dx, scale = next_dx.to(tl.float32), next_scale
        unit = _join24(next_sum, next_sum_low, SPLIT) * scale[:, None]
        dsum = _join24(next_dsum, next_dsum_low, SPLIT) if HAS_DSUM else 0.0
        t = start + tl.arange(0, ROWS)
        inside = (t < end)[:, None] & (d < D)[None, :]
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        next_dx = _load_rows(dx_ptr, t + ROWS, D, end, D, BLOCK_D)
        next_sum = _load_rows(sum_ptr, t + ROWS, D, end, D, BLOCK_D)
        if SPLIT:
            next_sum_low = _load_rows(sum_low_ptr, t + ROWS, D, end, D, BLOCK_D)
        if HAS_DSUM:
            next_dsum = _load_rows(dsum_ptr, t + ROWS, D, end, D, BLOCK_D)
            if SPLIT:
                next_dsum_low = _load_rows(dsum_low_ptr, t + ROWS, D, end, D, BLOCK_D)
        next_scale = tl.load(scale_ptr + t + ROWS, mask=t + ROWS < end, other=0.0)
        if RECOMPUTE_X:
            tl.store(x_ptr + at, (unit * weight[None, :]).to(x_ptr.dtype.element_ty), mask=inside)
        dweight += tl.sum(dx * unit, 0)
        g = dx * weight[None, :]
        du = scale[:, None] * (g - unit * (tl.sum(g * unit, 1) / D)[:, None])
        if HAS_DSUM:
            du += dsum
        if SPLIT:
            dboth, low = _split24(du)
            tl.store(low_ptr + at, low, mask=inside)
        else:
            dboth = du.to(dboth_ptr.dtype.element_ty)
        tl.store(dboth_ptr + at, dboth, mask=inside)
    tl.store(dweight_ptr + tl.program_id(0) * D + d, dweight, mask=d < D)


@kernel(do_not_specialize=["T"])
def _gated_norm(
    y_ptr, z_ptr, weight_ptr, x_ptr, scale_ptr, T, y_stride, z_stride, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    inside = (t < T)[:, None] & (d < D)[None, :]
    row = t.to(tl.int64)[:, None]
    y = tl.load(y_ptr + row * y_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    gate, _ = _silu_parts(z)
    u = y * gate
    scale = 1 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
    x = u * scale[:, None] * weight[None, :]
    tl.store(x_ptr + row * D + d[None, :], x.to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + t, scale, mask=t < T)


@kernel(do_not_specialize=["T", "rows_per_block"])
def _gated_norm_backward(
    dx_ptr, y_ptr, z_ptr, scale_ptr, weight_ptr, dy_ptr, dz_ptr, dweight_ptr, x_ptr, T, rows_per_block,
    y_stride, z_stride, dz_stride,
    RECOMPUTE_X: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_D,), tl.float32)
    first = tl.program_id(0) * rows_per_block
    end = tl.minimum(first + rows_per_block, T)
    t = first + tl.arange(0, ROWS)
    next_dx = _load_rows(dx_ptr, t, D, end, D, BLOCK_D)
    next_y = _load_rows(y_ptr, t, y_stride, end, D, BLOCK_D)
    next_z = _load_rows(z_ptr, t, z_stride, end, D, BLOCK_D)
    next_scale = tl.load(scale_ptr + t, mask=t < end, other=0.0)
    for start in range(first, end, ROWS):
        dx, y, z, scale = next_dx.to(tl.float32), next_y.to(tl.float32), next_z.to(tl.float32), next_scale
        t = start + tl.arange(0, ROWS)
        inside = (t < end)[:, None] & (d < D)[None, :]
        row = t.to(tl.int64)[:, None]
        next_dx = _load_rows(dx_ptr, t + ROWS, D, end, D, BLOCK_D)
        next_y = _load_rows(y_ptr, t + ROWS, y_stride, end, D, BLOCK_D)
        next_z = _load_rows(z_ptr, t + ROWS, z_stride, end, D, BLOCK_D)
        next_scale = tl.load(scale_ptr + t + ROWS, mask=t + ROWS < end, other=0.0)
        gate, dgate = _silu_parts(z)
        unit = y * gate * scale[:, None]
        if RECOMPUTE_X:
            tl.store(x_ptr + row * D + d[None, :], (unit * weight[None, :]).to(x_ptr.dtype.element_ty), mask=inside)
        dweight += tl.sum(dx * unit, 0)
        g = dx * weight[None, :]
        du = scale[:, None] * (g - unit * (tl.sum(g * unit, 1) / D)[:, None])
        tl.store(dy_ptr + row * D + d[None, :], (du * gate).to(dy_ptr.dtype.element_ty), mask=inside)
        tl.store(dz_ptr + row * dz_stride + d[None, :], (du * y * dgate).to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + tl.program_id(0) * D + d, dweight, mask=d < D)


@kernel(do_not_specialize=["N"])
def _sum_rows(parts_ptr, sum_ptr, N, D, K, W, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    layer = tl.program_id(1).to(tl.int64)
    parts_ptr += layer * N * D
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(0, N, ROWS):
        n = first + tl.arange(0, ROWS)
        total += tl.load(parts_ptr + n[:, None] * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    to = tl.where(d < K * W, d % W * K + d // W, d)
    tl.store(sum_ptr + layer * D + to, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=d < D)


def sum_rows(parts_LND: Tensor, dtype: torch.dtype, turned: tuple[int, int] = (1, 1)) -> Tensor:
    """parts.sum(1) of float32 partial sums, in a dtype. torch's sum takes three times as long for a few hundred rows.

    turned: (K, W): the first K W sums of a layer are returned as (W, K) rather than as (K, W).
    """
    (L, N, D), (K, W) = parts_LND.shape, turned
    sum_LD = parts_LND.new_empty(L, D, dtype=dtype)
    with on_device_of(parts_LND):
        _sum_rows[(cdiv(D, 16), L)](parts_LND, sum_LD, N, D, K, W, ROWS=128, BLOCK_D=16, num_warps=8)
    return sum_LD


def _blocks(D: int, tile: int = TILE, warps: int | None = None) -> dict[str, int]:
    block = next_power_of_2(D)
    return {"D": D, "BLOCK_D": block, "ROWS": max(1, tile // block), "num_warps": warps or max(4, block // 1024)}


def _shares(T: int, rows: int, blocks_per_sm: int, device: torch.device) -> tuple[int, int]:
    """(thread blocks, rows of each): full tiles of `rows`, spread evenly over that many blocks per SM."""
    share = rows * max(1, cdiv(T, rows * blocks_per_sm * cards.properties(device).sms))
    return cdiv(T, share), share


def add_norm_forward(
    residual_TD: Tensor | None, residual_low_TD: Tensor | None, delta_TD: Tensor, weight_D: Tensor, eps: float,
    save_x: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(sum_TD, its low bits, x_TD, scale_T) of `add_norm_forward` in norm.py."""
    (T, D), delta_TD = delta_TD.shape, dense_rows(delta_TD)
    split, blocks = delta_TD.dtype == torch.bfloat16, _blocks(D)
    sum_TD = saved_empty(delta_TD, T, D, dtype=torch.bfloat16 if split else torch.float32)
    low_TD = saved_empty(delta_TD, T, D, dtype=torch.int8) if split else None
    x_TD = saved_empty(weight_D, T, D) if save_x else weight_D.new_empty(T, D)
    scale_T = saved_empty(delta_TD, T, dtype=torch.float32)
    with on_device_of(delta_TD):
        _add_norm[(cdiv(T, blocks["ROWS"]),)](
            residual_TD, residual_low_TD, delta_TD, weight_D.contiguous(), sum_TD, low_TD, x_TD, scale_T, T,
            delta_TD.stride(0), eps, HAS_RESIDUAL=residual_TD is not None, SPLIT=split, **blocks, **overlap(delta_TD),
        )  # fmt: skip
    return sum_TD, low_TD, x_TD, scale_T


def recompute_norm(sum_TD: Tensor, low_TD: Tensor | None, scale_T: Tensor, weight_D: Tensor) -> Tensor:
    """x_TD of `add_norm_forward`."""
    (T, D), x_TD = sum_TD.shape, weight_D.new_empty(sum_TD.shape)
    blocks = _blocks(D)
    with on_device_of(sum_TD):
        _recompute_norm[(cdiv(T, blocks["ROWS"]),)](
            sum_TD, low_TD, scale_T, weight_D.contiguous(), x_TD, T, SPLIT=low_TD is not None, **blocks
        )
    return x_TD


def add_norm_backward(
    dx_TD: Tensor, dsum_TD: Tensor | None, dsum_low_TD: Tensor | None, sum_TD: Tensor, sum_low_TD: Tensor | None,
    scale_T: Tensor, weight_D: Tensor, dweight: Slot, recompute_x: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dboth_TD, its low bits, x_TD) of `add_norm_backward` in norm.py."""
    (T, D), dx_TD = dx_TD.shape, dx_TD.contiguous()
    tile, blocks_per_sm, warps = _walk_add_norm(D)
    dboth_TD, blocks, split = dx_TD.new_empty(T, D), _blocks(D, tile, warps), dx_TD.dtype == torch.bfloat16
    low_TD = dx_TD.new_empty(T, D, dtype=torch.int8) if split else None
    thread_blocks, rows = _shares(T, blocks["ROWS"], blocks_per_sm, dx_TD.device)
    dweight_ND, x_TD = dweight.rows(thread_blocks, sum_rows), weight_D.new_empty(T, D) if recompute_x else None
    with on_device_of(dx_TD):
        _add_norm_backward[(thread_blocks,)](
            dx_TD, dsum_TD, dsum_low_TD, sum_TD, sum_low_TD, scale_T, weight_D.contiguous(), dboth_TD, low_TD,
            dweight_ND, x_TD, T, rows, HAS_DSUM=dsum_TD is not None, SPLIT=split, RECOMPUTE_X=recompute_x, **blocks,
        )  # fmt: skip
    return dboth_TD, low_TD, x_TD


def gated_norm_forward(
    y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, eps: float, save_x: bool = False
) -> tuple[Tensor, Tensor]:
    """(x_TD, scale_T) of `gated_norm_forward` in norm.py."""
    T, D = y_TD.shape
    y_TD, z_TD = dense_rows(y_TD), dense_rows(z_TD)
    x_TD = saved_empty(weight_D, T, D) if save_x else weight_D.new_empty(T, D)
    scale_T, blocks = saved_empty(y_TD, T, dtype=torch.float32), _blocks(D)
    with on_device_of(y_TD):
        _gated_norm[(cdiv(T, blocks["ROWS"]),)](
            y_TD, z_TD, weight_D.contiguous(), x_TD, scale_T, T, y_TD.stride(0), z_TD.stride(0), eps, **blocks
        )
    return x_TD, scale_T


def gated_norm_backward(
    dx_TD: Tensor, y_TD: Tensor, z_TD: Tensor, scale_T: Tensor, weight_D: Tensor, dz_TD: Tensor, dweight: Slot,
    recompute_x: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dy_TD, x_TD) of `gated_norm_backward` in norm.py; fills dz_TD, whose rows are dense."""
    T, D = y_TD.shape
    dx_TD, y_TD, z_TD = dx_TD.contiguous(), dense_rows(y_TD), dense_rows(z_TD)
    tile, blocks_per_sm, warps = _walk_gated_norm(D)
    dy_TD, blocks = y_TD.new_empty(T, D), _blocks(D, tile, warps)
    thread_blocks, rows = _shares(T, blocks["ROWS"], blocks_per_sm, dx_TD.device)
    dweight_ND, x_TD = dweight.rows(thread_blocks, sum_rows), weight_D.new_empty(T, D) if recompute_x else None
    with on_device_of(dx_TD):
        _gated_norm_backward[(thread_blocks,)](
            dx_TD, y_TD, z_TD, scale_T, weight_D.contiguous(), dy_TD, dz_TD, dweight_ND, x_TD, T, rows,
            y_TD.stride(0), z_TD.stride(0), dz_TD.stride(0), RECOMPUTE_X=recompute_x, **blocks,
        )  # fmt: skip
    return dy_TD, x_TD
