"""The operations around an inner network, each in few passes over memory: the router's probabilities, the rows that
enter the network, and upsampling onto the residual.

Legend: T tokens, C chunks, D channels. Everything is computed in at least float32.

This file has the definitions and the dispatch; the Triton kernels for GPUs are in router_triton.py.
"""

import torch
from torch import Tensor

from hnet_kernels.dispatch import operation, use_fast, why_unsupported, wide
from hnet_kernels.ema import sum_chunks
from hnet_kernels.gradients import destination_of
from hnet_kernels.recompute import save, saved

WIDEST = 8192  # channels: a row must fit into the registers of one thread block


def _fast(operation: str, x_TD: Tensor) -> bool:
    return use_fast(operation, x_TD.device.type, x_TD.dtype, why_unsupported(x_TD, WIDEST))


def _units(q_TD: Tensor, k_TD: Tensor) -> tuple[Tensor, ...]:
    """The previous token's q and this token's k as unit vectors, and their lengths (T, 1)."""
    q, k = wide(q_TD).roll(1, 0), wide(k_TD)
    q_T1, k_T1 = (x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
    return q / q_T1, k / k_T1, q_T1, k_T1


@operation
def boundary_probability(q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> Tensor:
    """Router (arXiv 2507.07955, eq. 4): p_t = (1 - cos(q_{t-1}, k_t)) / 2, and 1 where position_T is 0.

    Returns p_T in [0, 1], in at least float32. No gradient reaches the constant p of a document's first token, nor a p
    that rounding took out of [0, 1] before the clamp.
    """
    q, k, *_ = _units(q_TD, k_TD)
    cos_T = (q * k).sum(-1)
    p_T = (1 - cos_T) / 2
    p_T = torch.where(cos_T.abs() > 1, p_T.clamp(0, 1).detach(), p_T)
    return p_T.masked_fill(position_T == 0, 1.0)


class BoundaryProbability(torch.autograd.Function):
    """Gradients: of q and k."""

    @staticmethod
    def forward(ctx, q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> Tensor:
        save(ctx, q_TD, k_TD, position_T)
        return boundary_forward(q_TD, k_TD, position_T)

    @staticmethod
    def backward(ctx, dp_T: Tensor):
        return *boundary_backward(dp_T, *saved(ctx)), None


@boundary_probability.fast
def _(q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> Tensor:
    return BoundaryProbability.apply(q_TD, k_TD, position_T)


@operation
def take_rows(x_TD: Tensor, place_C: Tensor) -> Tensor:
    """x[place]: (T, ...) -> (C, ...). place_C: int64, increasing."""
    return x_TD[place_C]


class TakeRows(torch.autograd.Function):
    """Gradient: of x, zero in other rows. Each row is taken once, or has a zero gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, place_C: Tensor) -> Tensor:
        ctx.save_for_backward(place_C)
        ctx.shape, ctx.destination = x.shape, destination_of(x, adds=True)
        return gather_rows(x.reshape(len(x), -1).contiguous(), place_C, None).view(-1, *x.shape[1:])

    @staticmethod
    def backward(ctx, drows: Tensor):
        (place_C,) = ctx.saved_tensors
        dx = drows.new_zeros(ctx.shape) if ctx.destination is None else ctx.destination.tensor
        add_rows_(dx.view(len(dx), -1), place_C, drows.reshape(len(drows), -1))
        if ctx.destination is None:
            return dx, None
        ctx.destination.written = True
        return None, None


@take_rows.fast
def _(x_TD: Tensor, place_C: Tensor) -> Tensor:
    return TakeRows.apply(x_TD, place_C)


@operation
def upsample(
    z_CD: Tensor, scale_T: Tensor, chunk_T: Tensor, start_C: Tensor, residual_TD: Tensor, dtype: torch.dtype,
    spare: int | None = None,
) -> Tensor:  # fmt: skip
    """z of each token's chunk, times the token's scale, plus the residual (arXiv 2507.07955, eq. 8 and 9), in `dtype`.

    z_CD, scale_T, residual_TD: at least float32. chunk_T: int64, each token's chunk. start_C: int64, each chunk's first
    token, T for a chunk without tokens. spare: the number of such chunks whose gradient is written (None: all).
    """
    return (z_CD[chunk_T] * scale_T[:, None] + residual_TD).to(dtype)


class Upsample(torch.autograd.Function):
    """Gradients: of z, the scale and the residual."""

    @staticmethod
    def forward(ctx, z_CD, scale_T, chunk_T, start_C, residual_TD: Tensor, dtype: torch.dtype, spare: int | None):
        ctx.save_for_backward(z_CD, scale_T, chunk_T, start_C)
        ctx.destination, ctx.wide, ctx.spare = destination_of(z_CD), residual_TD.dtype, spare
        return upsample_forward(z_CD, scale_T, chunk_T, residual_TD, dtype)

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        into = None if ctx.destination is None else ctx.destination.tensor
        z_CD, scale_T, chunk_T, start_C = ctx.saved_tensors
        dscale_T, dz_CD = upsample_backward(dx_TD, z_CD, scale_T, chunk_T, start_C, into, ctx.spare)
        if ctx.destination is not None:
            ctx.destination.written, dz_CD = True, None
        return dz_CD, dscale_T, None, None, dx_TD.to(ctx.wide), None, None


@upsample.fast
def _(z_CD, scale_T, chunk_T, start_C, residual_TD, dtype, spare=None) -> Tensor:
    return Upsample.apply(z_CD, scale_T, chunk_T, start_C, residual_TD, dtype, spare)


def boundary_forward(q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> Tensor:
    """p_t = (1 - cos(q_{t-1}, k_t)) / 2 in [0, 1], and 1 where position_T is 0. Returns p_T in at least float32."""
    if _fast("router", q_TD):
        from hnet_kernels import router_triton  # not above: triton is not everywhere

        return router_triton.boundary_forward(q_TD, k_TD, position_T)
    q, k, *_ = _units(q_TD, k_TD)
    return ((1 - (q * k).sum(-1)) / 2).clamp(0, 1).masked_fill(position_T == 0, 1.0)


def boundary_backward(dp_T: Tensor, q_TD: Tensor, k_TD: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """(dq_TD, dk_TD) of `boundary_forward`; zero where p is constant or was clamped."""
    if _fast("router", q_TD):
        from hnet_kernels import router_triton

        return router_triton.boundary_backward(dp_T, q_TD, k_TD, position_T)
    q, k, q_T1, k_T1 = _units(q_TD, k_TD)
    cos_T1 = (q * k).sum(-1, keepdim=True)
    constant_T1 = (position_T == 0)[:, None] | (cos_T1.abs() > 1)
    dcos_T1 = (-dp_T[:, None] / 2).masked_fill(constant_T1, 0)
    dq_TD = (dcos_T1 * (k - cos_T1 * q) / q_T1).roll(-1, 0)
    return dq_TD.to(q_TD.dtype), (dcos_T1 * (q - cos_T1 * k) / k_T1).to(k_TD.dtype)


def upsample_forward(
    z_CD: Tensor, scale_T: Tensor, chunk_T: Tensor, residual_TD: Tensor, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """z of each token's chunk * scale + residual, in dtype. z_CD, scale_T, residual_TD: float32 or float64."""
    if _fast("upsample", z_CD):
        from hnet_kernels import router_triton

        return router_triton.upsample_forward(z_CD, scale_T, chunk_T, residual_TD, dtype)
    return upsample.definition(z_CD, scale_T, chunk_T, None, residual_TD, dtype)


def upsample_backward(
    dout_TD: Tensor,
    z_CD: Tensor,
    scale_T: Tensor,
    chunk_T: Tensor,
    start_C: Tensor,
    dz_CD: Tensor | None = None,
    spare: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(dscale_T, dz_CD) in z's dtype.

    The residual's gradient is dout_TD.
    start_C: int64, the first token of each chunk, increasing from 0, T for a chunk without tokens.
    dz_CD: where to write that, contiguous; may be z_CD itself. spare: see `sum_chunks`.
    """
    if _fast("upsample", z_CD):
        from hnet_kernels import router_triton

        return router_triton.upsample_backward(dout_TD, z_CD, scale_T, chunk_T, start_C, dz_CD, spare)
    dout_TD = dout_TD.to(z_CD.dtype)
    return (z_CD[chunk_T] * dout_TD).sum(-1), sum_chunks(dout_TD * scale_T[:, None], start_C, dz_CD, spare)


def gather_rows(x_TD: Tensor, place_C: Tensor, pad_E: Tensor | None) -> Tensor:
    """x[place], with pad appended to each row. place_C: int64. x: contiguous and not empty; pad has its dtype."""
    if _fast("take_rows", x_TD):
        from hnet_kernels import router_triton

        return router_triton.gather_rows(x_TD, place_C, pad_E)
    rows_CD = x_TD[place_C]
    return rows_CD if pad_E is None else torch.cat([rows_CD, pad_E.expand(len(rows_CD), -1)], 1)


def add_rows_(x_TD: Tensor, place_C: Tensor, rows_CD: Tensor) -> Tensor:
    """x[place] += rows, in place; x_TD is contiguous. place_C: int64, each once, except where rows are zeros."""
    if len(rows_CD) and _fast("add_rows", x_TD):
        from hnet_kernels import router_triton

        return router_triton.add_rows_(x_TD, place_C, rows_CD)
    return x_TD.index_add_(0, place_C, rows_CD)
