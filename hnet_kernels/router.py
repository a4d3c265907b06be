"""What surrounds an inner network, in few passes over memory: the router's probabilities, what enters the network, and
upsampling onto the residual.

Legend: T tokens, C chunks, D channels. Everything is computed in at least float32.

This file has the definitions and the choice; the Triton kernels that run on a GPU are in router_triton.py.
"""

import torch
from torch import Tensor

from hnet_kernels.dispatch import obstacle_anywhere, use_fast, wide
from hnet_kernels.ema import sum_chunks

WIDEST = 8192  # channels: a row must fit into the registers of one program


def _fast(operation: str, x_TD: Tensor) -> bool:
    return use_fast(operation, x_TD.device.type, x_TD.dtype, obstacle_anywhere(x_TD, WIDEST))


def _units(q_TD: Tensor, k_TD: Tensor) -> tuple[Tensor, ...]:
    """q of the token before, and k, in unit length; and their lengths (T, 1)."""
    q, k = wide(q_TD).roll(1, 0), wide(k_TD)
    q_T1, k_T1 = (x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
    return q / q_T1, k / k_T1, q_T1, k_T1


def boundary_forward(q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> Tensor:
    """p_t = (1 - cos(q_{t-1}, k_t)) / 2 in [0, 1], and 1 where position_T is 0. Returns p_T in at least float32."""
    if _fast("router", q_TD):
        from hnet_kernels import router_triton  # not above: triton is not everywhere

        return router_triton.boundary_forward(q_TD, k_TD, position_T)
    q, k, *_ = _units(q_TD, k_TD)
    return ((1 - (q * k).sum(-1)) / 2).clamp(0, 1).masked_fill(position_T == 0, 1.0)


def boundary_backward(dp_T: Tensor, q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """(dq_TD, dk_TD) of `boundary_forward`; none where p is a constant, or was clamped."""
    if _fast("router", q_TD):
        from hnet_kernels import router_triton

        return router_triton.boundary_backward(dp_T, q_TD, k_TD, position_T)
    q, k, q_T1, k_T1 = _units(q_TD, k_TD)
    cos_T1 = (q * k).sum(-1, keepdim=True)
    constant_T1 = (position_T == 0)[:, None] | (cos_T1.abs() > 1)
    dcos_T1 = (-dp_T[:, None] / 2).masked_fill(constant_T1, 0)
    dq_TD = (dcos_T1 * (k - cos_T1 * q) / q_T1).roll(-1, 0)
    return dq_TD.to(q_TD.dtype), (dcos_T1 * (q - cos_T1 * k) / k_T1).to(k_TD.dtype)


def upsample_forward(z_CD: Tensor, chunk_T: Tensor, residual_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """z of each token's chunk + residual, in dtype. z_CD, residual_TD: float32 or float64; chunk_T: int64."""
    if _fast("upsample", z_CD):
        from hnet_kernels import router_triton

        return router_triton.upsample_forward(z_CD, chunk_T, residual_TD, dtype)
    return (z_CD[chunk_T] + residual_TD).to(dtype)


def upsample_backward(
    dout_TD: Tensor,
    z_CD: Tensor,
    chunk_T: Tensor,
    start_C: Tensor,
    dz_CD: Tensor | None = None,
    spare: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(dscale_T, dz_CD), the former of a factor that each token's z had, which was 1; in z's dtype.

    The residual's gradient is dout_TD.
    start_C: int64, the first token of each chunk, growing from 0, T for a chunk without tokens.
    dz_CD: where to write that, contiguous; may be z_CD itself. spare: see `sum_chunks`.
    """
    if _fast("upsample", z_CD):
        from hnet_kernels import router_triton

        return router_triton.upsample_backward(dout_TD, z_CD, chunk_T, start_C, dz_CD, spare)
    dout_TD = dout_TD.to(z_CD.dtype)
    return (z_CD[chunk_T] * dout_TD).sum(-1), sum_chunks(dout_TD, start_C, dz_CD, spare)


def take_rows(x_TD: Tensor, place_C: Tensor, pad_E: Tensor | None) -> Tensor:
    """x[place], and pad behind each row. place_C: int64. x is not empty and contiguous; pad has its dtype."""
    if _fast("take_rows", x_TD):
        from hnet_kernels import router_triton

        return router_triton.take_rows(x_TD, place_C, pad_E)
    rows_CD = x_TD[place_C]
    return rows_CD if pad_E is None else torch.cat([rows_CD, pad_E.expand(len(rows_CD), -1)], 1)


def add_rows_(x_TD: Tensor, place_C: Tensor, rows_CD: Tensor) -> Tensor:
    """x[place] += rows, in place; x_TD is contiguous. place_C: int64, each once, but where rows are zeros."""
    if len(rows_CD) and _fast("add_rows", x_TD):
        from hnet_kernels import router_triton

        return router_triton.add_rows_(x_TD, place_C, rows_CD)
    return x_TD.index_add_(0, place_C, rows_CD)
