"""Triton kernels for attention over packed documents and its gradient. The definition is in attention.py.

Legend: T tokens, B documents, H heads, P channels a head, M queries and N keys of a tile. Scores are in powers of two.

As flash attention does, no scores go to memory: forward keeps each query's log-sum of exponentials, backward computes
the weights again, once for the keys' gradients and once for the queries'. What differs is the grid: chunks make short
documents, for which a grid of (longest document) x (documents) is mostly empty. Here a program finds its tile in the
list of the tiles that there are, which all fit into T / M + B. No atomics: the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels.kept import kept_empty

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Tile sizes and launch options of a kernel."""

    M: int
    N: int
    warps: int
    stages: int


# the fastest of those that benchmarks/bench_kernels.py --sweep tries, on an H100 with chunks of text
FORWARD, KEYS, QUERIES = Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3)


@triton.jit
def _find(cu_seqlens_ptr, B, tile, SIZE: tl.constexpr, BLOCK_B: tl.constexpr):
    """(start, end, first token) of the document and the tile of SIZE tokens in it; start == end where there is none.

    A document's tiles come from its last to its first: those that see most keys begin first.
    """
    b = tl.arange(0, BLOCK_B)
    start_B = tl.load(cu_seqlens_ptr + b, mask=b < B, other=0)
    end_B = tl.load(cu_seqlens_ptr + 1 + b, mask=b < B, other=0)
    tiles_B = tl.where(b < B, (end_B - start_B + SIZE - 1) // SIZE, 0)
    upto_B = tl.cumsum(tiles_B, 0)
    here_B = b == tl.sum((upto_B <= tile).to(tl.int32), 0)
    start, end = tl.sum(tl.where(here_B, start_B, 0), 0), tl.sum(tl.where(here_B, end_B, 0), 0)
    left = tl.sum(tl.where(here_B, upto_B, 0), 0) - 1 - tile
    return start, end, start + left * SIZE


@triton.jit
def _attend(
    q_MP, o_MP, sum_M, most_M, k_ptr, v_ptr, stride, m, first, end, scale, window,
    P: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Adds keys first ... end - 1 to the running softmax of some queries; MASK where not all of them may be seen."""
    p = tl.arange(0, P)
    for n_first in range(first, end, N):
        n = n_first + tl.arange(0, N)
        at = n.to(tl.int64)[:, None] * stride + p[None, :]
        if MASK:
            k_NP = tl.load(k_ptr + at, mask=(n < end)[:, None], other=0.0)
        else:
            k_NP = tl.load(k_ptr + at)
        scores_MN = tl.dot(q_MP, tl.trans(k_NP)) * scale
        if MASK:
            seen_MN = n[None, :] <= m[:, None]
            if WINDOW:
                seen_MN &= n[None, :] >= m[:, None] - window
            scores_MN = tl.where(seen_MN, scores_MN, -1e30)
        now_M = tl.maximum(most_M, tl.max(scores_MN, 1))
        weights_MN = tl.exp2(scores_MN - now_M[:, None])
        if MASK:
            weights_MN = tl.where(seen_MN, weights_MN, 0.0)  # also where a query has seen none yet
        shrink_M = tl.exp2(most_M - now_M)
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        if MASK:
            v_NP = tl.load(v_ptr + at, mask=(n < end)[:, None], other=0.0)
        else:
            v_NP = tl.load(v_ptr + at)
        o_MP = tl.dot(weights_MN.to(v_NP.dtype), v_NP, o_MP * shrink_M[:, None])
        most_M = now_M
    return o_MP, sum_M, most_M


@triton.jit(do_not_specialize=["B", "T"])
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_seqlens_ptr, B, T, stride, o_stride, scale, window,
    P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_B: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and head: o_THP and lse_HT."""
    h = tl.program_id(0)
    start, end, first = _find(cu_seqlens_ptr, B, tl.program_id(1), M, BLOCK_B)
    if start == end:
        return
    m, p = first + tl.arange(0, M), tl.arange(0, P)
    q_MP = tl.load(q_ptr + h * P + m.to(tl.int64)[:, None] * stride + p[None, :], mask=(m < end)[:, None], other=0.0)
    o_MP, sum_M, most_M = tl.zeros((M, P), tl.float32), tl.zeros((M,), tl.float32), tl.full((M,), -1e30, tl.float32)
    k_ptr, v_ptr = k_ptr + h * P, v_ptr + h * P
    if WINDOW:
        whole = start + tl.maximum(first - window - start, 0) // N * N
    else:  # the keys before the tile are seen by all its queries
        whole = first
        o_MP, sum_M, most_M = _attend(
            q_MP, o_MP, sum_M, most_M, k_ptr, v_ptr, stride, m, start, whole, scale, window,
            P, N, False, WINDOW,
        )  # fmt: skip
    o_MP, sum_M, most_M = _attend(
        q_MP, o_MP, sum_M, most_M, k_ptr, v_ptr, stride, m, whole, tl.minimum(first + M, end), scale, window,
        P, N, True, WINDOW,
    )  # fmt: skip
    o_MP = o_MP / sum_M[:, None]
    inside = (m < end)[:, None]
    at = h * P + m.to(tl.int64)[:, None] * o_stride + p[None, :]
    tl.store(o_ptr + at, o_MP.to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + h * T + m, most_M + tl.log2(sum_M), mask=m < end)


@triton.jit(do_not_specialize=["T"])
def _delta(o_ptr, do_ptr, delta_ptr, T, o_stride, do_stride, P: tl.constexpr, M: tl.constexpr):
    """delta_HT: o . do, what the softmax's gradient subtracts."""
    h, m, p = tl.program_id(0), tl.program_id(1) * M + tl.arange(0, M), tl.arange(0, P)
    inside, row = (m < T)[:, None], m.to(tl.int64)[:, None]
    o_MP = tl.load(o_ptr + h * P + row * o_stride + p[None, :], mask=inside, other=0.0).to(tl.float32)
    do_MP = tl.load(do_ptr + h * P + row * do_stride + p[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(delta_ptr + h * T + m, tl.sum(o_MP * do_MP, 1), mask=m < T)


@triton.jit
def _for_keys(
    k_NP, v_NP, dk_NP, dv_NP, q_ptr, do_ptr, lse_ptr, delta_ptr, stride, do_stride, n, first, end, scale, window,
    P: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Adds what queries first ... end - 1 give to the gradients of some keys and values."""
    p = tl.arange(0, P)
    for m_first in range(first, end, M):
        m = m_first + tl.arange(0, M)
        row = m.to(tl.int64)[:, None]
        if MASK:
            inside = m < end
            q_MP = tl.load(q_ptr + row * stride + p[None, :], mask=inside[:, None], other=0.0)
            do_MP = tl.load(do_ptr + row * do_stride + p[None, :], mask=inside[:, None], other=0.0)
            lse_M = tl.load(lse_ptr + m, mask=inside, other=0.0)
            delta_M = tl.load(delta_ptr + m, mask=inside, other=0.0)
        else:
            q_MP, do_MP = tl.load(q_ptr + row * stride + p[None, :]), tl.load(do_ptr + row * do_stride + p[None, :])
            lse_M, delta_M = tl.load(lse_ptr + m), tl.load(delta_ptr + m)
        weights_NM = tl.exp2(tl.dot(k_NP, tl.trans(q_MP)) * scale - lse_M[None, :])
        if MASK:
            seen_NM = (n[:, None] <= m[None, :]) & inside[None, :]
            if WINDOW:
                seen_NM &= n[:, None] >= m[None, :] - window
            weights_NM = tl.where(seen_NM, weights_NM, 0.0)
        dv_NP = tl.dot(weights_NM.to(do_MP.dtype), do_MP, dv_NP)
        dscores_NM = weights_NM * (tl.dot(v_NP, tl.trans(do_MP)) - delta_M[None, :])
        dk_NP = tl.dot(dscores_NM.to(q_MP.dtype), q_MP, dk_NP)
    return dk_NP, dv_NP


@triton.jit(do_not_specialize=["B", "T"])
def _backward_keys(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr, B, T, stride, do_stride, d_stride,
    scale, dscale, window,
    P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_B: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys and head: dk_THP and dv_THP."""
    h = tl.program_id(0)
    start, end, first = _find(cu_seqlens_ptr, B, tl.program_id(1), N, BLOCK_B)
    if start == end:
        return
    n, p = first + tl.arange(0, N), tl.arange(0, P)
    at = h * P + n.to(tl.int64)[:, None] * stride + p[None, :]
    inside = (n < end)[:, None]
    k_NP, v_NP = tl.load(k_ptr + at, mask=inside, other=0.0), tl.load(v_ptr + at, mask=inside, other=0.0)
    dk_NP, dv_NP = tl.zeros((N, P), tl.float32), tl.zeros((N, P), tl.float32)
    q_ptr, do_ptr, lse_ptr, delta_ptr = q_ptr + h * P, do_ptr + h * P, lse_ptr + h * T, delta_ptr + h * T
    masked = tl.minimum(first + N, end)  # up to here some keys come after some queries
    if WINDOW:
        masked = tl.minimum(first + N + window, end)
    dk_NP, dv_NP = _for_keys(
        k_NP, v_NP, dk_NP, dv_NP, q_ptr, do_ptr, lse_ptr, delta_ptr, stride, do_stride, n, first, masked, scale, window,
        P, M, True, WINDOW,
    )  # fmt: skip
    if not WINDOW:
        whole = masked + (end - masked) // M * M
        dk_NP, dv_NP = _for_keys(
            k_NP, v_NP, dk_NP, dv_NP, q_ptr, do_ptr, lse_ptr, delta_ptr, stride, do_stride, n, masked, whole, scale,
            window, P, M, False, WINDOW,
        )  # fmt: skip
        dk_NP, dv_NP = _for_keys(
            k_NP, v_NP, dk_NP, dv_NP, q_ptr, do_ptr, lse_ptr, delta_ptr, stride, do_stride, n, whole, end, scale,
            window, P, M, True, WINDOW,
        )  # fmt: skip
    at = h * P + n.to(tl.int64)[:, None] * d_stride + p[None, :]
    tl.store(dk_ptr + at, (dk_NP * dscale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv_NP.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _for_queries(
    q_MP, do_MP, lse_M, delta_M, dq_MP, k_ptr, v_ptr, stride, m, first, end, scale, window,
    P: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Adds what keys first ... end - 1 give to the gradients of some queries."""
    p = tl.arange(0, P)
    for n_first in range(first, end, N):
        n = n_first + tl.arange(0, N)
        at = n.to(tl.int64)[:, None] * stride + p[None, :]
        if MASK:
            inside = (n < end)[:, None]
            k_NP, v_NP = tl.load(k_ptr + at, mask=inside, other=0.0), tl.load(v_ptr + at, mask=inside, other=0.0)
        else:
            k_NP, v_NP = tl.load(k_ptr + at), tl.load(v_ptr + at)
        weights_MN = tl.exp2(tl.dot(q_MP, tl.trans(k_NP)) * scale - lse_M[:, None])
        if MASK:
            seen_MN = n[None, :] <= m[:, None]
            if WINDOW:
                seen_MN &= n[None, :] >= m[:, None] - window
            weights_MN = tl.where(seen_MN, weights_MN, 0.0)
        dscores_MN = weights_MN * (tl.dot(do_MP, tl.trans(v_NP)) - delta_M[:, None])
        dq_MP = tl.dot(dscores_MN.to(k_NP.dtype), k_NP, dq_MP)
    return dq_MP


@triton.jit(do_not_specialize=["B", "T"])
def _backward_queries(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_seqlens_ptr, B, T, stride, do_stride, d_stride,
    scale, dscale, window,
    P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_B: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries and head: dq_THP."""
    h = tl.program_id(0)
    start, end, first = _find(cu_seqlens_ptr, B, tl.program_id(1), M, BLOCK_B)
    if start == end:
        return
    m, p = first + tl.arange(0, M), tl.arange(0, P)
    row, inside = m.to(tl.int64)[:, None], (m < end)[:, None]
    q_MP = tl.load(q_ptr + h * P + row * stride + p[None, :], mask=inside, other=0.0)
    do_MP = tl.load(do_ptr + h * P + row * do_stride + p[None, :], mask=inside, other=0.0)
    lse_M = tl.load(lse_ptr + h * T + m, mask=m < end, other=0.0)
    delta_M = tl.load(delta_ptr + h * T + m, mask=m < end, other=0.0)
    dq_MP = tl.zeros((M, P), tl.float32)
    if WINDOW:
        whole = start + tl.maximum(first - window - start, 0) // N * N
    else:
        whole = first
        dq_MP = _for_queries(
            q_MP, do_MP, lse_M, delta_M, dq_MP, k_ptr + h * P, v_ptr + h * P, stride, m, start, whole, scale, window,
            P, N, False, WINDOW,
        )  # fmt: skip
    dq_MP = _for_queries(
        q_MP, do_MP, lse_M, delta_M, dq_MP, k_ptr + h * P, v_ptr + h * P, stride, m, whole,
        tl.minimum(first + M, end), scale, window, P, N, True, WINDOW,
    )  # fmt: skip
    tl.store(dq_ptr + h * P + row * d_stride + p[None, :], (dq_MP * dscale).to(dq_ptr.dtype.element_ty), mask=inside)


def _options(tiles: Tiles, P: int, cu_seqlens: Tensor, window: int) -> dict:
    sizes = {"P": P, "M": tiles.M, "N": tiles.N, "BLOCK_B": triton.next_power_of_2(len(cu_seqlens) - 1)}
    return sizes | {"WINDOW": window >= 0, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _grid(T: int, H: int, size: int, cu_seqlens: Tensor) -> tuple[int, int]:
    return H, triton.cdiv(T, size) + len(cu_seqlens) - 1


def attention_forward(qkv_T3HP: Tensor, cu_seqlens: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(o_THP, lse_HT). qkv_T3HP: dense; cu_seqlens: int32, documents that hold all T rows."""
    T, _, H, P = qkv_T3HP.shape
    q, k, v = qkv_T3HP.unbind(1)
    o_THP, lse_HT = kept_empty(q, T, H, P), kept_empty(q, H, T, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _forward[_grid(T, H, FORWARD.M, cu_seqlens)](
            q, k, v, o_THP, lse_HT, cu_seqlens, len(cu_seqlens) - 1, T, q.stride(0), o_THP.stride(0),
            P**-0.5 * LOG2_E, window, **_options(FORWARD, P, cu_seqlens, window),
        )  # fmt: skip
    return o_THP, lse_HT


def attention_backward(
    do_THP: Tensor, qkv_T3HP: Tensor, o_THP: Tensor, lse_HT: Tensor, cu_seqlens: Tensor, window: int
) -> Tensor:
    """dqkv_T3HP, given the gradient of o_THP."""
    T, _, H, P = qkv_T3HP.shape
    q, k, v = qkv_T3HP.unbind(1)
    do_THP, delta_HT, dqkv_T3HP = do_THP.contiguous(), lse_HT.new_empty(H, T), qkv_T3HP.new_empty(T, 3, H, P)
    dq, dk, dv = dqkv_T3HP.unbind(1)
    inputs = q, k, v, do_THP, lse_HT, delta_HT
    B, strides = len(cu_seqlens) - 1, (q.stride(0), do_THP.stride(0), dq.stride(0))
    scales = P**-0.5 * LOG2_E, P**-0.5, window
    with torch.cuda.device_of(q):
        _delta[(H, triton.cdiv(T, 64))](o_THP, do_THP, delta_HT, T, o_THP.stride(0), do_THP.stride(0), P=P, M=64)
        _backward_keys[_grid(T, H, KEYS.N, cu_seqlens)](
            *inputs, dk, dv, cu_seqlens, B, T, *strides, *scales, **_options(KEYS, P, cu_seqlens, window)
        )
        _backward_queries[_grid(T, H, QUERIES.M, cu_seqlens)](
            *inputs, dq, cu_seqlens, B, T, *strides, *scales, **_options(QUERIES, P, cu_seqlens, window)
        )
    return dqkv_T3HP
