"""Triton kernels for what sampling.py defines.

Legend: B rows, V = 256 bytes, N random numbers, X states of the UTF-8 automaton, S chunking stages. In a draw a block
takes one row. As in the definition, probabilities are float64, so that a draw is the same byte but where two sums
differ in their last bits. The bookkeeping of all rows is one block, since its time is that of a launch.
"""

import torch
import triton.language as tl
from torch import Tensor

from hnet_kernels.launch import kernel, next_power_of_2

SEEN = 16  # bytes that all others are compared with at a time


@kernel
def _draw(
    logits_ptr, stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, noise_ptr, drawn_ptr, left_ptr, utf8_ptr,
    stops_ptr, active_ptr, byte_ptr, log_probability_ptr, allowed_ptr, next_ptr, scratch_ptr,
    N: tl.constexpr, X: tl.constexpr, V: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    if tl.load(active_ptr + b) == 0:
        return
    v = tl.arange(0, V)
    logits = tl.load(logits_ptr + b.to(tl.int64) * stride + v).to(tl.float64)
    left, utf8 = tl.load(left_ptr + b), tl.load(utf8_ptr + b)
    allowed = tl.load(allowed_ptr + (tl.minimum(left, 4) * X + utf8) * V + v) != 0
    may_end = (tl.load(stops_ptr + b) != 0) | (utf8 == X - 1)
    allowed = allowed & ((v < V - 1) | may_end)
    of_model = logits - tl.max(logits, 0)
    normal = tl.log(tl.sum(tl.exp(of_model), 0))
    masked = tl.where(allowed, logits, -float("inf"))
    highest = tl.max(masked, 0)
    byte = tl.min(tl.where(masked == highest, v, V), 0)  # the first of the most likely
    temperature = tl.load(temperature_ptr + b)
    drawn = tl.load(drawn_ptr + b)
    if temperature > 0:
        prob = tl.exp((masked - highest) / temperature)
        prob /= tl.sum(prob, 0)
        top_k, top_p, min_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b), tl.load(min_p_ptr + b)
        keep = prob >= min_p * tl.max(prob, 0)
        if (top_k > 0) | (top_p < 1):
            # of each byte: how many are more likely, or as likely and before it; and their probability
            tl.store(scratch_ptr + b * V + v, prob)
            tl.debug_barrier()
            rank, mass = tl.zeros((V,), tl.int32), tl.zeros((V,), tl.float64)
            for first in range(0, V, SEEN):
                u = first + tl.arange(0, SEEN)
                other = tl.load(scratch_ptr + b * V + u)
                as_likely_before = (other[None, :] == prob[:, None]) & (u[None, :] < v[:, None])
                ahead = (other[None, :] > prob[:, None]) | as_likely_before
                rank += tl.sum(ahead.to(tl.int32), 1)
                mass += tl.sum(tl.where(ahead, other[None, :], 0.0), 1)
            keep = keep & ((mass < top_p) | (rank == 0)) & ((top_k == 0) | (rank < top_k))
        sums = tl.cumsum(tl.where(keep, prob, 0.0), 0)
        uniform = tl.load(noise_ptr + b * N + drawn % N)
        byte = tl.sum((sums <= uniform * tl.max(sums, 0)).to(tl.int32), 0)
    byte = tl.minimum(byte, V - 1)
    log_probability = tl.sum(tl.where(v == byte, of_model, 0.0), 0) - normal
    tl.store(byte_ptr + b, byte.to(tl.int64))
    tl.store(log_probability_ptr + b, log_probability.to(tl.float32))
    tl.store(utf8_ptr + b, tl.load(next_ptr + utf8 * V + byte))
    tl.store(drawn_ptr + b, drawn + 1)
    tl.store(left_ptr + b, left - 1)


def draw_rows(logits_BV: Tensor, rows) -> None:
    """See sampling.py."""
    B, V, X = len(logits_BV), rows.next_XV.shape[1], len(rows.next_XV)
    _draw[(B,)](
        logits_BV, logits_BV.stride(0), rows.temperature_B, rows.top_k_B, rows.top_p_B, rows.min_p_B, rows.noise_BN,
        rows.drawn_B, rows.left_B, rows.utf8_B, rows.stops_B, rows.active_B, rows.byte_B, rows.log_probability_B,
        rows.allowed_LXV, rows.next_XV, rows.scratch_BV,
        N=rows.noise_BN.shape[1], X=X, V=V, SEEN=SEEN, num_warps=4,
    )  # fmt: skip


@kernel
def _note_starts(
    starts_ptr, p_ptr, begins_ptr, of_stage_ptr, p_stride, opens_ptr, new_ptr, B, S, s, BLOCK_B: tl.constexpr
):  # fmt: skip
    b = tl.arange(0, BLOCK_B)
    inside = b < B
    opens = tl.load(opens_ptr + b, mask=inside, other=0)
    new = tl.load(new_ptr + b, mask=inside, other=0) != 0
    p = tl.where(new, tl.load(of_stage_ptr + b * p_stride, mask=inside, other=0.0), 0.0)
    if s == 0:
        for inner in range(1, S):
            tl.store(starts_ptr + b * S + inner, tl.zeros((BLOCK_B,), tl.int8), mask=inside)
            tl.store(p_ptr + b * S + inner, tl.zeros((BLOCK_B,), p_ptr.dtype.element_ty), mask=inside)
    tl.store(starts_ptr + b * S + s, opens, mask=inside)
    tl.store(p_ptr + b * S + s, p.to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(begins_ptr + s, tl.max((opens != 0).to(tl.int32), 0).to(tl.int8))


def note_starts(events, s: int, p_B1: Tensor, opens_B1: Tensor, new_B1: Tensor) -> None:
    """See sampling.py."""
    B, S = events.starts_BS.shape
    opens_B1, new_B1 = opens_B1.contiguous(), new_B1.contiguous()
    _note_starts[(1,)](
        events.starts_BS.view(torch.int8), events.p_BS, events.begins_S.view(torch.int8), p_B1, p_B1.stride(0),
        opens_B1.view(torch.int8), new_B1.view(torch.int8), B, S, s, BLOCK_B=next_power_of_2(B),
    )  # fmt: skip


@kernel
def _record(
    byte_ptr, log_probability_ptr, left_ptr, stops_ptr, active_ptr, starts_ptr, p_ptr, past_ptr, written_ptr, B, S,
    EOS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BLOCK_B)
    inside = b < B
    active = tl.load(active_ptr + b, mask=inside, other=0) != 0
    byte = tl.where(active, tl.load(byte_ptr + b, mask=inside, other=0), -1)
    written = tl.load(written_ptr)
    dtype: tl.constexpr = past_ptr.dtype.element_ty
    row = past_ptr + (written * B + b) * (2 + 2 * S)
    tl.store(row, byte.to(dtype), mask=inside)
    tl.store(row + 1, tl.load(log_probability_ptr + b, mask=inside, other=0.0).to(dtype), mask=inside)
    for s in range(S):
        tl.store(row + 2 + s, tl.load(starts_ptr + b * S + s, mask=inside, other=0).to(dtype), mask=inside)
        tl.store(row + 2 + S + s, tl.load(p_ptr + b * S + s, mask=inside, other=0.0), mask=inside)
    tl.debug_barrier()
    tl.store(written_ptr, written + 1)
    left = tl.load(left_ptr + b, mask=inside, other=0)
    stops = tl.load(stops_ptr + b, mask=inside, other=0) != 0
    goes_on = active & (left > 0) & ~((byte == EOS) & stops)
    tl.store(active_ptr + b, goes_on.to(tl.int8), mask=inside)


def record(events, rows) -> None:
    """See sampling.py."""
    B, S = events.starts_BS.shape
    _record[(1,)](
        rows.byte_B, rows.log_probability_B, rows.left_B, rows.stops_B.view(torch.int8), rows.active_B.view(torch.int8),
        events.starts_BS.view(torch.int8), events.p_BS, events.past_EBX, events.written, B, S,
        EOS=255, BLOCK_B=next_power_of_2(B),
    )  # fmt: skip
