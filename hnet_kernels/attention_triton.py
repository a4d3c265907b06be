"""Triton kernels for attention over packed documents and its gradient. The definition is in attention.py.

Legend: T tokens, B documents, H heads, P channels per head, M queries and N keys of a tile. Scores are base-2
logarithms. In a tile a head has W channels, the least power of two that is P or more; the extra channels are zero.

As in flash attention, no scores go to memory. The forward saves each query's log-sum of exponentials. The backward
recomputes the weights, once for the keys' gradients and once for the queries'. The grid differs: chunks make short
documents, for which a grid of (longest document) x (documents) would be mostly empty. Here a thread block works for a
tile of SIZE queries or keys, which it finds in a list of at most I = T / SIZE + B tiles. The tiles with most work
(without a window) come first, so that all blocks end at about the same time. There are no atomics: the same bits every
time.

Loops load their tiles as in ssd_triton.py. A tile may contain rows of the next document
and, where W > P, channels of the next head. These are multiplied by zero or not stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels import launch_options
from hnet_kernels.launch import Rows, cdiv, kernel, next_power_of_2, on_device_of, rows_of
from hnet_kernels.launch_options import Options, launch
from hnet_kernels.saved import saved_empty
from hnet_kernels.triton_math import LOG2_E, load_tile

SIZE = 64  # tokens of the tile that a thread block works for; other sizes are slower


@kernel(do_not_specialize=["B", "n", "steps"])
def _order(cu_seqlens_ptr, tiles_ptr, B, n, steps, SIZE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr):
    """tiles_3I: see `tile_order`.

    S(j) tiles have j or more tiles before them in their document; S is a sum over documents that decreases with j. In
    the order of decreasing j, the i-th tile therefore has the largest j with S(j) > i.
    """
    i, b = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_B)
    start_B = tl.load(cu_seqlens_ptr + b, mask=b < B, other=0)
    end_B = tl.load(cu_seqlens_ptr + 1 + b, mask=b < B, other=0)
    tiles_B = (end_B - start_B + SIZE - 1) // SIZE
    low, high = tl.zeros((BLOCK_I,), tl.int32), tl.zeros((BLOCK_I,), tl.int32) + tl.max(tiles_B, 0)
    for _ in range(steps):
        middle = (low + high) // 2
        many = tl.sum(tl.maximum(tiles_B[None, :] - middle[:, None], 0), 1) > i
        low, high = tl.where(many, middle, low), tl.where(many, high, middle)
    rank = i - tl.sum(tl.maximum(tiles_B[None, :] - low[:, None] - 1, 0), 1)  # among tiles with as many before them
    has = (tiles_B[None, :] > low[:, None]).to(tl.int32)
    here = (has != 0) & (tl.cumsum(has, 1) - 1 == rank[:, None])
    start, end = tl.sum(tl.where(here, start_B[None, :], 0), 1), tl.sum(tl.where(here, end_B[None, :], 0), 1)
    tl.store(tiles_ptr + i, start, mask=i < n)
    tl.store(tiles_ptr + n + i, end, mask=i < n)
    tl.store(tiles_ptr + 2 * n + i, start + low * SIZE, mask=i < n)


@triton.jit
def _tile(tiles_ptr, H):
    """(start, end, first token) of this thread block's document and of its tile.

    The heads of a tile are adjacent in the grid. It has one axis, since CUDA allows 65,535 blocks on the others.
    """
    i, n = tl.program_id(0) // H, tl.num_programs(0) // H
    return tl.load(tiles_ptr + i), tl.load(tiles_ptr + n + i), tl.load(tiles_ptr + 2 * n + i)


@triton.jit
def _rows(ptr, row, stride, inside, P: tl.constexpr, W: tl.constexpr):
    """A tile's rows of a head; zeros outside."""
    p = tl.arange(0, W)
    at = row.to(tl.int64)[:, None] * stride + p[None, :]
    return tl.load(ptr + at, mask=inside[:, None] & (p < P)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, row, stride, inside, x, P: tl.constexpr, W: tl.constexpr):
    p = tl.arange(0, W)
    at = row.to(tl.int64)[:, None] * stride + p[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside[:, None] & (p < P)[None, :])


@triton.jit
def _window_begins(start, first, window, M: tl.constexpr, N: tl.constexpr):
    """The start of the first tile of keys that some query of a tile sees, and of the first that all queries see."""
    reached = start + tl.maximum(first - window - start, 0) // N * N
    whole = start + (tl.maximum(first + M - 1 - window - start, 0) + N - 1) // N * N
    return reached, tl.minimum(whole, first)


@triton.jit
def _attend(
    q_MP, o_MP, sum_M, most_M, kv_rows, k_column, v_column, m, first, end, scale, window,
    P: tl.constexpr, W: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Adds keys first ... end - 1 to the running softmax of a tile of queries; MASK: some keys may not be seen."""
    for n_first in range(first, end, N):
        n = n_first + tl.arange(0, N)
        k_NP = load_tile(kv_rows, n_first, k_column, N, W, W == P)
        scores_MN = tl.dot(q_MP, tl.trans(k_NP))
        if MASK:
            seen_MN = n[None, :] <= m[:, None]
            if WINDOW:
                seen_MN &= n[None, :] >= m[:, None] - window
            scores_MN = tl.where(seen_MN, scores_MN, -1e30)
        now_M = tl.maximum(most_M, tl.max(scores_MN, 1) * scale)
        weights_MN = tl.exp2(scores_MN * scale - now_M[:, None])
        if MASK:
            weights_MN = tl.where(seen_MN, weights_MN, 0.0)  # also for queries that have seen no key
        shrink_M = tl.exp2(most_M - now_M)
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        v_NP = load_tile(kv_rows, n_first, v_column, N, W, W == P)
        o_MP = tl.dot(weights_MN.to(v_NP.dtype), v_NP, o_MP * shrink_M[:, None])
        most_M = now_M
    return o_MP, sum_M, most_M


@kernel(do_not_specialize=["T", "H"])
def _forward(
    q_ptr, kv_rows, o_ptr, lse_ptr, tiles_ptr, T, H, stride, o_stride, scale, window,
    P: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One thread block per tile of queries and head: o_THP and lse_HT."""
    h = tl.program_id(0) % H
    start, end, first = _tile(tiles_ptr, H)
    if start == end:
        return
    m = first + tl.arange(0, M)
    q_MP = _rows(q_ptr + h * P, m, stride, m < end, P, W)
    o_MP, sum_M, most_M = tl.zeros((M, W), tl.float32), tl.zeros((M,), tl.float32), tl.full((M,), -1e30, tl.float32)
    k_column, v_column = (H + h) * P, (2 * H + h) * P
    whole = start
    if WINDOW:
        reached, whole = _window_begins(start, first, window, M, N)
        o_MP, sum_M, most_M = _attend(
            q_MP,
            o_MP,
            sum_M,
            most_M,
            kv_rows,
            k_column,
            v_column,
            m,
            reached,
            whole,
            scale,
            window,
            P,
            W,
            N,
            True,
            True,
        )
    o_MP, sum_M, most_M = _attend(
        q_MP, o_MP, sum_M, most_M, kv_rows, k_column, v_column, m, whole, first, scale, window, P, W, N, False, WINDOW
    )
    o_MP, sum_M, most_M = _attend(
        q_MP, o_MP, sum_M, most_M, kv_rows, k_column, v_column, m, first, tl.minimum(first + M, end), scale,
        window, P, W, N, True, WINDOW,
    )  # fmt: skip
    _store_rows(o_ptr + h * P, m, o_stride, m < end, o_MP / sum_M[:, None], P, W)
    tl.store(lse_ptr + h * T + m, most_M + tl.log2(sum_M), mask=m < end)


@triton.jit
def _for_keys(
    k_NP, v_NP, dk_NP, dv_NP, q_rows, do_rows, column, lse_ptr, delta_ptr, n, first, end, scale, window,
    P: tl.constexpr, W: tl.constexpr, M: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Adds the contributions of queries first ... end - 1 to the gradients of a tile of keys and values."""
    for m_first in range(first, end, M):
        m = m_first + tl.arange(0, M)
        inside = m < end
        q_MP = load_tile(q_rows, m_first, column, M, W, W == P)
        do_MP = load_tile(do_rows, m_first, column, M, W, W == P)
        if MASK:
            lse_M = tl.load(lse_ptr + m, mask=inside, other=0.0)
            delta_M = tl.load(delta_ptr + m, mask=inside, other=0.0)
        else:
            lse_M, delta_M = tl.load(lse_ptr + m), tl.load(delta_ptr + m)
        scores_NM = tl.dot(k_NP, tl.trans(q_MP))
        dweights_NM = tl.dot(v_NP, tl.trans(do_MP))  # issued here, so that the exponentials do not wait for it
        weights_NM = tl.exp2(scores_NM * scale - lse_M[None, :])
        if MASK:
            seen_NM = (n[:, None] <= m[None, :]) & inside[None, :]
            if WINDOW:
                seen_NM &= n[:, None] >= m[None, :] - window
            weights_NM = tl.where(seen_NM, weights_NM, 0.0)
        dv_NP = tl.dot(weights_NM.to(do_MP.dtype), do_MP, dv_NP)
        dscores_NM = weights_NM * (dweights_NM - delta_M[None, :])
        dk_NP = tl.dot(dscores_NM.to(q_MP.dtype), q_MP, dk_NP)
    return dk_NP, dv_NP


@kernel(do_not_specialize=["T", "H"])
def _backward_keys(
    q_rows, k_ptr, v_ptr, do_rows, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tiles_ptr, T, H, stride, d_stride,
    scale, dscale, window,
    P: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One thread block per tile of keys and head: dk_THP and dv_THP."""
    h = tl.program_id(0) % H
    start, end, first = _tile(tiles_ptr, H)
    if start == end:
        return
    # the list is ordered for queries; for keys the tiles of a document are taken in reverse order
    first = start + ((end - start - 1) // N - (first - start) // N) * N
    n = first + tl.arange(0, N)
    k_NP = _rows(k_ptr + h * P, n, stride, n < end, P, W)
    v_NP = _rows(v_ptr + h * P, n, stride, n < end, P, W)
    dk_NP, dv_NP = tl.zeros((N, W), tl.float32), tl.zeros((N, W), tl.float32)
    column, lse_ptr, delta_ptr = h * P, lse_ptr + h * T, delta_ptr + h * T
    masked = tl.minimum(first + N, end)  # before this query some keys come after their query
    seen_by_all = end
    if WINDOW:
        seen_by_all = tl.minimum(first + window + 1, end)
        end = tl.minimum(first + N + window, end)
    whole = masked + tl.maximum(seen_by_all - masked, 0) // M * M
    dk_NP, dv_NP = _for_keys(
        k_NP, v_NP, dk_NP, dv_NP, q_rows, do_rows, column, lse_ptr, delta_ptr, n, first, masked, scale, window,
        P, W, M, True, WINDOW,
    )  # fmt: skip
    dk_NP, dv_NP = _for_keys(
        k_NP, v_NP, dk_NP, dv_NP, q_rows, do_rows, column, lse_ptr, delta_ptr, n, masked, whole, scale, window,
        P, W, M, False, WINDOW,
    )  # fmt: skip
    dk_NP, dv_NP = _for_keys(
        k_NP, v_NP, dk_NP, dv_NP, q_rows, do_rows, column, lse_ptr, delta_ptr, n, whole, end, scale, window,
        P, W, M, True, WINDOW,
    )  # fmt: skip
    _store_rows(dk_ptr + h * P, n, d_stride, n < end, dk_NP * dscale, P, W)
    _store_rows(dv_ptr + h * P, n, d_stride, n < end, dv_NP, P, W)


@triton.jit
def _for_queries(
    q_MP, do_MP, lse_M, delta_M, dq_MP, kv_rows, k_column, v_column, m, first, end, scale, window,
    P: tl.constexpr, W: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Adds the contributions of keys first ... end - 1 to the gradients of a tile of queries."""
    for n_first in range(first, end, N):
        n = n_first + tl.arange(0, N)
        k_NP = load_tile(kv_rows, n_first, k_column, N, W, W == P)
        v_NP = load_tile(kv_rows, n_first, v_column, N, W, W == P)
        scores_MN = tl.dot(q_MP, tl.trans(k_NP))
        dweights_MN = tl.dot(do_MP, tl.trans(v_NP))
        weights_MN = tl.exp2(scores_MN * scale - lse_M[:, None])
        if MASK:
            seen_MN = n[None, :] <= m[:, None]
            if WINDOW:
                seen_MN &= n[None, :] >= m[:, None] - window
            weights_MN = tl.where(seen_MN, weights_MN, 0.0)
        dscores_MN = weights_MN * (dweights_MN - delta_M[:, None])
        dq_MP = tl.dot(dscores_MN.to(k_NP.dtype), k_NP, dq_MP)
    return dq_MP


@kernel(do_not_specialize=["T", "H"])
def _backward_queries(
    q_ptr, kv_rows, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr, T, H, stride, do_stride, d_stride,
    scale, dscale, window,
    P: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One thread block per tile of queries and head: dq_THP; and delta_HT = o . do, for the softmax's gradient."""
    h = tl.program_id(0) % H
    start, end, first = _tile(tiles_ptr, H)
    if start == end:
        return
    m = first + tl.arange(0, M)
    q_MP = _rows(q_ptr + h * P, m, stride, m < end, P, W)
    do_MP = _rows(do_ptr + h * P, m, do_stride, m < end, P, W)
    k_column, v_column = (H + h) * P, (2 * H + h) * P
    lse_M = tl.load(lse_ptr + h * T + m, mask=m < end, other=0.0)
    o_MP = _rows(o_ptr + h * P, m, do_stride, m < end, P, W)
    delta_M = tl.sum(o_MP.to(tl.float32) * do_MP.to(tl.float32), 1)
    tl.store(delta_ptr + h * T + m, delta_M, mask=m < end)
    dq_MP = tl.zeros((M, W), tl.float32)
    whole = start
    if WINDOW:
        reached, whole = _window_begins(start, first, window, M, N)
        dq_MP = _for_queries(
            q_MP, do_MP, lse_M, delta_M, dq_MP, kv_rows, k_column, v_column, m, reached, whole, scale, window,
            P, W, N, True, True,
        )  # fmt: skip
    dq_MP = _for_queries(
        q_MP, do_MP, lse_M, delta_M, dq_MP, kv_rows, k_column, v_column, m, whole, first, scale, window,
        P, W, N, False, WINDOW,
    )  # fmt: skip
    dq_MP = _for_queries(
        q_MP, do_MP, lse_M, delta_M, dq_MP, kv_rows, k_column, v_column, m, first,
        tl.minimum(first + M, end), scale, window, P, W, N, True, WINDOW,
    )  # fmt: skip
    _store_rows(dq_ptr + h * P, m, d_stride, m < end, dq_MP * dscale, P, W)


def _constants(options: Options, M: int, N: int, P: int, window: int) -> dict:
    sizes = {"P": P, "W": next_power_of_2(P), "M": M, "N": N, "WINDOW": window >= 0}
    return sizes | launch(options)


def _tiled(x: Tensor, rows: int, P: int) -> Rows:
    """A dense (T, ..., P) tensor as rows, in tiles of that many rows and one head."""
    return rows_of(x, rows, next_power_of_2(P))


def tile_order(T: int, cu_seqlens: Tensor) -> Tensor:
    """tiles_3I, int32: for each tile of queries the start and the end of its document and its own first token.

    The tiles with most keys before them come first; unused entries are zero. cu_seqlens: int32.
    """
    B = len(cu_seqlens) - 1
    n, block = cdiv(T, SIZE) + B, next_power_of_2(B)
    tiles_3I, block_I = cu_seqlens.new_empty(3, n), max(1, min(128, 4096 // block))
    with on_device_of(cu_seqlens):
        _order[(cdiv(n, block_I),)](
            cu_seqlens.contiguous(), tiles_3I, B, n, n.bit_length(), SIZE=SIZE, BLOCK_B=block, BLOCK_I=block_I
        )
    return tiles_3I


def attention_forward(qkv_T3HP: Tensor, tiles_3I: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(o_THP, lse_HT). qkv_T3HP: dense. tiles_3I: `tile_order` of documents that contain all T rows."""
    T, _, H, P = qkv_T3HP.shape
    q = qkv_T3HP[:, 0]
    o_THP, lse_HT = saved_empty(q, T, H, P), saved_empty(q, H, T, dtype=torch.float32)
    options = launch_options.attention(q.device, P).forward
    assert SIZE % options.tokens == 0  # the keys before a tile of queries are full tiles
    if not T:
        return o_THP, lse_HT
    keys = _tiled(qkv_T3HP, options.tokens, P)
    with on_device_of(q):
        _forward[(H * tiles_3I.shape[1],)](
            q, keys, o_THP, lse_HT, tiles_3I, T, H, q.stride(0), o_THP.stride(0),
            P**-0.5 * LOG2_E.value, window, **_constants(options, SIZE, options.tokens, P, window),
        )  # fmt: skip
    return o_THP, lse_HT


def attention_backward(
    do_THP: Tensor, qkv_T3HP: Tensor, o_THP: Tensor, lse_HT: Tensor, tiles_3I: Tensor, window: int
) -> Tensor:
    """dqkv_T3HP, given the gradient of o_THP."""
    T, _, H, P = qkv_T3HP.shape
    q, k, v = qkv_T3HP.unbind(1)
    o_THP, do_THP = o_THP.contiguous(), do_THP.contiguous()
    delta_HT, dqkv_T3HP = lse_HT.new_empty(H, T), qkv_T3HP.new_empty(T, 3, H, P)
    dq, dk, dv = dqkv_T3HP.unbind(1)
    _, of_keys, of_queries = launch_options.attention(q.device, P)
    assert SIZE % of_queries.tokens == 0
    if not T:
        return dqkv_T3HP
    queries, do_queries = (_tiled(x, of_keys.tokens, P) for x in (qkv_T3HP, do_THP))
    keys = _tiled(qkv_T3HP, of_queries.tokens, P)
    grid, stride, do_stride = (H * tiles_3I.shape[1],), q.stride(0), do_THP.stride(0)
    scales = P**-0.5 * LOG2_E.value, P**-0.5, window
    with on_device_of(q):
        _backward_queries[grid](
            q, keys, o_THP, do_THP, lse_HT, delta_HT, dq, tiles_3I, T, H, stride, do_stride, dq.stride(0), *scales,
            **_constants(of_queries, SIZE, of_queries.tokens, P, window),
        )  # fmt: skip
        _backward_keys[grid](
            queries, k, v, do_queries, lse_HT, delta_HT, dk, dv, tiles_3I, T, H, stride, dq.stride(0), *scales,
            **_constants(of_keys, of_keys.tokens, SIZE, P, window),
        )  # fmt: skip
    return dqkv_T3HP
