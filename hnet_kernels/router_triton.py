"""Triton kernels for the operations of router.py, where the definitions are.

Legend: T tokens, C chunks, D channels. All are bound by memory: a thread block takes a few full rows and reads each
once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels.ema_triton import sum_chunks
from hnet_kernels.launch import cdiv, kernel, next_power_of_2, on_device_of

TILE = 2048  # elements of rows per thread block


@triton.jit
def _cosine(q_ptr, k_ptr, row, before, d, inside, D):
    """The previous token's q and this token's k as unit vectors; one over their lengths; their dot product."""
    q = tl.load(q_ptr + before * D + d, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    over_q = 1 / tl.maximum(tl.sqrt(tl.sum(q * q, 1)), 1e-12)
    over_k = 1 / tl.maximum(tl.sqrt(tl.sum(k * k, 1)), 1e-12)
    q, k = q * over_q[:, None], k * over_k[:, None]
    return q, k, over_q, over_k, tl.sum(q * k, 1)


@kernel(do_not_specialize=["T"])
def _boundary(q_ptr, k_ptr, position_ptr, p_ptr, T, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < T)[:, None] & (d < D)
    row = t.to(tl.int64)[:, None]
    before = tl.where(row > 0, row - 1, T - 1)
    _, _, _, _, cos = _cosine(q_ptr, k_ptr, row, before, d, inside, D)
    p = tl.minimum(tl.maximum((1 - cos) / 2, 0.0), 1.0)
    position = tl.load(position_ptr + t, mask=t < T, other=0)
    tl.store(p_ptr + t, tl.where(position == 0, 1.0, p), mask=t < T)


@kernel(do_not_specialize=["T"])
def _boundary_backward(
    dp_ptr, q_ptr, k_ptr, position_ptr, dq_ptr, dk_ptr, T,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < T)[:, None] & (d < D)
    row = t.to(tl.int64)[:, None]
    before = tl.where(row > 0, row - 1, T - 1)
    q, k, over_q, over_k, cos = _cosine(q_ptr, k_ptr, row, before, d, inside, D)
    position = tl.load(position_ptr + t, mask=t < T, other=0)
    dcos = tl.load(dp_ptr + t, mask=t < T, other=0.0) / -2
    dcos = tl.where((position == 0) | (tl.abs(cos) > 1), 0.0, dcos)
    dq = (dcos * over_q)[:, None] * (k - cos[:, None] * q)
    dk = (dcos * over_k)[:, None] * (q - cos[:, None] * k)
    tl.store(dq_ptr + before * D + d, dq.to(dq_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptr + row * D + d, dk.to(dk_ptr.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["T"])
def _upsample(
    z_ptr, scale_ptr, chunk_ptr, residual_ptr, out_ptr, T,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < T)[:, None] & (d < D)
    row = t.to(tl.int64)[:, None]
    chunk = tl.load(chunk_ptr + t, mask=t < T, other=0)[:, None]
    scale = tl.load(scale_ptr + t, mask=t < T, other=0.0)[:, None]
    out = tl.load(z_ptr + chunk * D + d, mask=inside, other=0.0) * scale
    out += tl.load(residual_ptr + row * D + d, mask=inside, other=0.0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=inside)


@kernel(do_not_specialize=["T"])
def _upsample_backward(
    dout_ptr, z_ptr, chunk_ptr, dscale_ptr, T,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (t < T)[:, None] & (d < D)
    row = t.to(tl.int64)[:, None]
    dout = tl.load(dout_ptr + row * D + d, mask=inside, other=0.0).to(tl.float32)
    chunk = tl.load(chunk_ptr + t, mask=t < T, other=0)[:, None]
    z = tl.load(z_ptr + chunk * D + d, mask=inside, other=0.0)
    tl.store(dscale_ptr + t, tl.sum(z * dout, 1), mask=t < T)


@kernel(do_not_specialize=["C"])
def _gather_rows(
    x_ptr, place_ptr, pad_ptr, rows_ptr, C, x_width,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (k < C)[:, None] & (d < D)
    at = tl.load(place_ptr + k, mask=k < C, other=0)[:, None] * x_width + d
    x = tl.load(x_ptr + at, mask=inside & (d < x_width), other=0.0)
    x = tl.where(d < x_width, x, tl.load(pad_ptr + d - x_width, mask=(d >= x_width) & (d < D), other=0.0))
    tl.store(rows_ptr + k.to(tl.int64)[:, None] * D + d, x, mask=inside)


@kernel(do_not_specialize=["C"])
def _add_rows(
    x_ptr, place_ptr, rows_ptr, C, rows_stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (k < C)[:, None] & (d < D)
    at = tl.load(place_ptr + k, mask=k < C, other=0)[:, None] * D + d
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(rows_ptr + k.to(tl.int64)[:, None] * rows_stride + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=inside)


def _blocks(x_TD: Tensor) -> tuple[tuple[int], dict[str, int]]:
    T, D = x_TD.shape
    block = next_power_of_2(D)
    rows = max(1, TILE // block)
    return (cdiv(T, rows),), {"D": D, "BLOCK_D": block, "ROWS": rows}


def boundary_forward(q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> Tensor:
    """p_T (float32) of `boundary_forward` in router.py."""
    q_TD, k_TD, p_T = q_TD.contiguous(), k_TD.contiguous(), q_TD.new_empty(len(q_TD), dtype=torch.float32)
    grid, blocks = _blocks(q_TD)
    with on_device_of(q_TD):
        _boundary[grid](q_TD, k_TD, position_T.contiguous(), p_T, len(q_TD), **blocks)
    return p_T


def boundary_backward(dp_T: Tensor, q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """(dq_TD, dk_TD) of `boundary_backward` in router.py."""
    q_TD, k_TD = q_TD.contiguous(), k_TD.contiguous()
    dq_TD, dk_TD = (x.new_empty(x.shape) for x in (q_TD, k_TD))
    grid, blocks = _blocks(q_TD)
    with on_device_of(q_TD):
        _boundary_backward[grid](
            dp_T.contiguous(), q_TD, k_TD, position_T.contiguous(), dq_TD, dk_TD, len(q_TD), **blocks
        )
    return dq_TD, dk_TD


def upsample_forward(z_CD: Tensor, scale_T: Tensor, chunk_T: Tensor, residual_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """`upsample_forward` of router.py."""
    residual_TD, out_TD = residual_TD.contiguous(), residual_TD.new_empty(residual_TD.shape, dtype=dtype)
    (grid, blocks), chunk_T = _blocks(residual_TD), chunk_T.contiguous()
    with on_device_of(z_CD):
        _upsample[grid](z_CD.contiguous(), scale_T.contiguous(), chunk_T, residual_TD, out_TD, len(chunk_T), **blocks)
    return out_TD


def upsample_backward(
    dout_TD: Tensor,
    z_CD: Tensor,
    scale_T: Tensor,
    chunk_T: Tensor,
    start_C: Tensor,
    dz_CD: Tensor | None,
    spare: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`upsample_backward` of router.py."""
    dout_TD, dscale_T = dout_TD.contiguous(), z_CD.new_empty(len(dout_TD))
    grid, blocks = _blocks(dout_TD)
    with on_device_of(z_CD):
        _upsample_backward[grid](dout_TD, z_CD.contiguous(), chunk_T.contiguous(), dscale_T, len(chunk_T), **blocks)
    return dscale_T, sum_chunks(dout_TD, start_C, dz_CD, spare, scale_T)


def gather_rows(x_TD: Tensor, place_C: Tensor, pad_E: Tensor | None) -> Tensor:
    """`gather_rows` of router.py."""
    assert x_TD.is_contiguous()
    width = x_TD.shape[1]
    rows_CD = x_TD.new_empty(len(place_C), width + (0 if pad_E is None else len(pad_E)))
    grid, blocks = _blocks(rows_CD)
    with on_device_of(x_TD):
        _gather_rows[grid](
            x_TD,
            place_C.contiguous(),
            x_TD if pad_E is None else pad_E.contiguous(),
            rows_CD,
            len(rows_CD),
            width,
            **blocks,
        )
    return rows_CD


def add_rows_(x_TD: Tensor, place_C: Tensor, rows_CD: Tensor) -> Tensor:
    """`add_rows_` of router.py."""
    assert x_TD.is_contiguous()
    rows_CD = rows_CD if rows_CD.stride(1) == 1 else rows_CD.contiguous()
    grid, blocks = _blocks(rows_CD)
    with on_device_of(x_TD):
        _add_rows[grid](x_TD, place_C.contiguous(), rows_CD, len(rows_CD), rows_CD.stride(0), **blocks)
    return x_TD
