"""Triton kernels for the operations of boundaries.py, where the definitions are.

Legend: T tokens, at most C chunks, B documents, K blocks of tokens.

There are three launches, because each needs the full result of the one before: `_count` counts the chunks of each block
of tokens, `_number` numbers the chunks, `_documents` finds where documents begin and end. There are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels.boundaries import Chunks
from hnet_kernels.launch import cdiv, kernel, on_device_of

BLOCK = 1024  # tokens, chunks or documents per thread block


@kernel(do_not_specialize=["T"])
def _count(
    p_ptr, position_ptr, opens_ptr, tokens_ptr, p_out_ptr, b_ptr, counts_ptr, sums_ptr, T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """b, and p with a zero appended; counts_K: the chunks that a block opens; sums_K: the sum of its p."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = t < tl.load(tokens_ptr)
    p = tl.load(p_ptr + t, mask=t < T, other=0.0)
    position = tl.load(position_ptr + t, mask=real & (t < T), other=1)
    opens = (tl.load(opens_ptr + t, mask=real & (t < T), other=0) != 0) | (position == 0)
    opens = (opens & real).to(tl.int32)
    tl.store(p_out_ptr + t, p, mask=t <= T)
    tl.store(b_ptr + t, opens, mask=t < T)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(opens, 0))
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.where(real, p, 0.0), 0))


@kernel(do_not_specialize=["T", "C", "K"])
def _number(
    b_ptr, counts_ptr, sums_ptr, tokens_ptr, chunk_ptr, start_ptr, shares_ptr, shares_stride, T, C, K,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """chunk_T of a block of tokens and start_C of a block of chunks (T for no chunk). The first block: F and G."""
    block = tl.program_id(0)
    before = tl.full((), 0, tl.int32)
    chunks = tl.full((), 0, tl.int32)
    total_p = tl.full((), 0.0, tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        counts = tl.load(counts_ptr + k, mask=k < K, other=0)
        before += tl.sum(tl.where(k < block, counts, 0), 0)
        chunks += tl.sum(counts, 0)
        total_p += tl.sum(tl.load(sums_ptr + k, mask=k < K, other=0.0), 0)
    t = block * BLOCK + tl.arange(0, BLOCK)
    opens = tl.load(b_ptr + t, mask=t < T, other=0).to(tl.int32)
    chunk = before + tl.cumsum(opens, 0) - 1
    tl.store(chunk_ptr + t, chunk, mask=t < T)
    tl.store(start_ptr + chunk, t, mask=opens != 0)
    tl.store(start_ptr + t, T, mask=(t >= chunks) & (t < C))
    if block == 0:
        tokens = tl.load(tokens_ptr).to(tl.float32)
        tl.store(shares_ptr, chunks.to(tl.float32) / tokens)
        tl.store(shares_ptr + shares_stride, total_p / tokens)


@triton.jit
def _chunks_before(chunk_ptr, t, inside):
    """The number of chunks that begin before token t."""
    return tl.load(chunk_ptr + t - 1, mask=inside & (t > 0), other=-1) + 1


@kernel(do_not_specialize=["T", "C", "B"])
def _documents(
    chunk_ptr, start_ptr, position_ptr, cu_ptr, inner_cu_ptr, inner_position_ptr, counts_ptr, T, C, B,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first block: cu_seqlens and counts. The others: position_C. A document's first token opens a chunk."""
    chunks = tl.load(chunk_ptr + T - 1) + 1
    if tl.program_id(0) == 0:
        longest = tl.full((), 0, tl.int64)
        for first in range(0, B + 1, BLOCK):
            d = first + tl.arange(0, BLOCK)
            begin = _chunks_before(chunk_ptr, tl.load(cu_ptr + d, mask=d <= B, other=0), d <= B)
            end = _chunks_before(chunk_ptr, tl.load(cu_ptr + d + 1, mask=d < B, other=0), d < B)
            tl.store(inner_cu_ptr + d, begin, mask=d <= B)
            longest = tl.maximum(longest, tl.max(tl.where(d < B, end - begin, 0), 0))
        tl.store(counts_ptr, chunks)
        tl.store(counts_ptr + 1, longest)
    else:
        k = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        there = k < chunks
        t = tl.load(start_ptr + k, mask=there, other=0)
        begin_t = t - tl.load(position_ptr + t, mask=there, other=0)
        tl.store(inner_position_ptr + k, k - tl.load(chunk_ptr + begin_t, mask=there, other=chunks), mask=k < C)


@kernel(do_not_specialize=["T"])
def _add_mean_gradient(dp_ptr, dmean_ptr, tokens_ptr, out_ptr, T, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.load(tokens_ptr)
    share = tl.load(dmean_ptr) / tokens.to(tl.float32)
    dp = tl.load(dp_ptr + t, mask=t < T, other=0.0)
    tl.store(out_ptr + t, tl.where(t < tokens, dp + share, dp), mask=t < T)


def find_chunks(p_T: Tensor, opens_T: Tensor, position_T: Tensor, cu_seqlens: Tensor, to: Chunks) -> None:
    """`find_chunks` of boundaries.py."""
    T, C, B, tokens = len(p_T), len(to.start_C), len(cu_seqlens) - 1, cu_seqlens[-1]
    K, p_T, b_T = cdiv(T + 1, BLOCK), p_T.contiguous(), to.b_T.view(torch.uint8)
    counts_K, sums_K = p_T.new_empty(K, dtype=torch.int32), p_T.new_empty(K)
    opens_T, position_T = opens_T.contiguous().view(torch.uint8), position_T.contiguous()
    cu_seqlens = cu_seqlens.contiguous()
    with on_device_of(p_T):
        _count[(K,)](p_T, position_T, opens_T, tokens, to.p_T, b_T, counts_K, sums_K, T, BLOCK=BLOCK)
        _number[(cdiv(C, BLOCK),)](
            b_T, counts_K, sums_K, tokens, to.chunk_T, to.start_C, to.shares, to.shares.stride(0), T, C, K,
            BLOCK=BLOCK,
        )  # fmt: skip
        _documents[(1 + cdiv(C, BLOCK),)](
            to.chunk_T, to.start_C, position_T, cu_seqlens, to.cu_seqlens, to.position_C, to.counts, T, C, B,
            BLOCK=BLOCK,
        )  # fmt: skip


def add_mean_gradient(dp_T: Tensor, dmean: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`add_mean_gradient` of boundaries.py."""
    dp_T, out_T = dp_T.contiguous(), dp_T.new_empty(len(dp_T))
    with on_device_of(dp_T):
        _add_mean_gradient[(cdiv(len(dp_T), BLOCK),)](dp_T, dmean, cu_seqlens[-1], out_T, len(dp_T), BLOCK=BLOCK)
    return out_T
