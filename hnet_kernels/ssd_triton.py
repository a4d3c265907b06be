"""Triton kernels for `hnet::ssd` and its gradient. The definition, and the choice between the two, is in ssd.py.

Legend: T tokens, H heads, P channels a head, N state size, Q tokens a chunk, C chunks, S segments (runs of chunks that
one program walks through), G groups of heads. Log decays are in powers of two.

With h_n the state (P, N) before chunk n, g the gain dt, and decays that are zero across documents, a chunk does

    y_i = start_i C_i h_n^T + sum_{j <= i} (C_i . B_j) decay_ij g_j x_j
    h_{n+1} = decay_n h_n + sum_j end_j g_j x_j B_j^T

and the gradient runs the same recurrence backwards: with dy for g x, C for B, start for end. A program walks through a
segment with the state in registers, so that forward reads x twice and writes y, and nothing else grows with T H:

    _prepare    decays within and across chunks, and the products C_i . B_j, which all heads share
    _totals     what every segment adds to the state at its end
    _outputs    y, each program starting from the states that reach its segment

    _totals, _states    backward: the same, both ways, keeping h and its gradient at every chunk in the dtype of x
    _gradients  dx and what the decays get, per head; dB and dC, summed over the heads of a group in registers
    _finish     sums over groups, and from flows between tokens to dt and A

No atomics: the same bits every time on one kind of GPU.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

TRACE = tl.constexpr(True)
LOG2_E = tl.constexpr(1.4426950408889634)
SUM, SOURCE, GAIN, START, END = (tl.constexpr(i) for i in range(5))  # of vectors_5HT, see _prepare
INTO, LATER, DGAIN = (tl.constexpr(i) for i in range(3))  # of flows_3HT, see _gradients


@triton.jit
def _document(cu_seqlens_ptr, n_docs, bisections, t):
    """How many documents end at or before token t: the document it belongs to."""
    low = t * 0
    high = low + n_docs
    for _ in range(bisections):
        middle = (low + high) // 2
        open_ = low < high
        ended = tl.load(cu_seqlens_ptr + 1 + middle, mask=open_, other=0).to(tl.int32) <= t
        low = tl.where(open_ & ended, middle + 1, low)
        high = tl.where(open_ & ~ended, middle, high)
    return low


@triton.jit
def _add_in_document(left_sum, left_opens, right_sum, right_opens):
    """Joins the sums of neighbouring runs of tokens; a run in which a document begins has that of its last document."""
    return tl.where(right_opens != 0, right_sum, left_sum + right_sum), left_opens | right_opens


@triton.jit(do_not_specialize=["T", "H", "n_docs", "bisections"])
def _prepare(
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    cu_seqlens_ptr,
    vectors_ptr,
    decay_ptr,
    document_ptr,
    scores_ptr,
    T,
    H,
    n_docs,
    bisections,
    dt_stride,
    B_stride,
    C_stride,
    N: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WITH_SCORES: tl.constexpr,
):
    """One program a chunk: vectors_5HT, decay_CH (through the chunk), document_T, scores_CQQ (C B^T, zero where
    nothing may flow). The vectors: sums of log decays from the start of the chunk or, in it, the document; log gains
    less these sums (SOURCE); gains; decays from before the chunk (START) and to its end (END)."""
    c = tl.program_id(0)
    padded = tl.num_programs(0) * Q
    q = tl.arange(0, Q)
    t = c * Q + q
    h = tl.arange(0, BLOCK_H)
    document = _document(cu_seqlens_ptr, n_docs, bisections, t)
    tl.store(document_ptr + t, document)
    opens = tl.where(tl.load(cu_seqlens_ptr + document).to(tl.int32) == t, 1, 0)  # whether t is its document's first
    fresh = tl.sum(tl.where(q == 0, opens, 0), 0)  # whether the chunk begins with a document
    first, last = tl.min(document, 0), tl.max(document, 0)

    gain_QH = tl.load(dt_ptr + t[:, None] * dt_stride + h[None, :], mask=(t < T)[:, None] & (h < H)[None, :], other=0.0)
    A_H = tl.load(A_ptr + h, mask=h < H, other=0.0)
    opens_QH = tl.broadcast_to(opens[:, None], (Q, BLOCK_H))
    sum_QH, _ = tl.associative_scan((gain_QH * (A_H * LOG2_E)[None, :], opens_QH), 0, _add_in_document)
    total_H = tl.sum(tl.where(q[:, None] == Q - 1, sum_QH, 0.0), 0)
    start_QH = tl.where(((document == first) & (fresh == 0))[:, None], tl.exp2(sum_QH), 0.0)
    end_QH = tl.where((document == last)[:, None], tl.exp2(total_H[None, :] - sum_QH), 0.0)
    tl.store(decay_ptr + c * H + h, tl.where((first == last) & (fresh == 0), tl.exp2(total_H), 0.0), mask=h < H)
    row = vectors_ptr + h[None, :] * padded + t[:, None]
    valid = (h < H)[None, :] & (t >= 0)[:, None]
    tl.store(row + SUM * H * padded, sum_QH, mask=valid)
    tl.store(row + SOURCE * H * padded, tl.log2(gain_QH) - sum_QH, mask=valid)
    tl.store(row + GAIN * H * padded, gain_QH, mask=valid)
    tl.store(row + START * H * padded, start_QH, mask=valid)
    tl.store(row + END * H * padded, end_QH, mask=valid)

    if WITH_SCORES:
        B_QN = _rows(B_ptr, B_stride, c, T, Q, N, WHOLE)
        C_QN = _rows(C_ptr, C_stride, c, T, Q, N, WHOLE)
        scores_QQ = tl.dot(C_QN, tl.trans(B_QN), input_precision="ieee")
        allowed_QQ = (q[:, None] >= q[None, :]) & (document[:, None] == document[None, :])
        scores_QQ = tl.where(allowed_QQ, scores_QQ, 0.0).to(scores_ptr.dtype.element_ty)
        tl.store(scores_ptr + tl.cast(c, tl.int64) * Q * Q + q[:, None] * Q + q[None, :], scores_QQ)


@triton.jit
def _rows(ptr, stride, c, T, Q: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    """Rows c Q ... c Q + Q - 1 of a flat tensor; zeros past its end."""
    q = tl.arange(0, Q)
    at = ptr + tl.cast(c * Q, tl.int64) * stride + (q[:, None] * stride + tl.arange(0, WIDTH)[None, :])
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=(c * Q + q < T)[:, None], other=0.0)


@triton.jit
def _store_rows(ptr, stride, c, T, tile, Q: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr):
    q = tl.arange(0, Q)
    at = ptr + tl.cast(c * Q, tl.int64) * stride + (q[:, None] * stride + tl.arange(0, WIDTH)[None, :])
    if WHOLE:
        tl.store(at, tile.to(ptr.dtype.element_ty))
    else:
        tl.store(at, tile.to(ptr.dtype.element_ty), mask=(c * Q + q < T)[:, None])


@triton.jit
def _exp2(x):
    """Decays within a chunk, finite also from later to earlier tokens, where the scores that they multiply are zero."""
    return tl.exp2(tl.minimum(x, 64.0))


@triton.jit
def _tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _arriving(totals_ptr, decay_ptr, h, s, H, S, P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr):
    """The state (P, N) that reaches segment s from those before it; REVERSE: its gradient, from those after it.

    Looks back no further than anything is carried: a document rarely spans more than a few segments.
    """
    STEP: tl.constexpr = 1 if REVERSE else -1
    state_PN = tl.zeros((P, N), tl.float32)
    weight = tl.full((), 1.0, tl.float32)
    m = s + STEP
    while (m >= 0) & (m < S) & (weight > 0):
        state_PN += weight * tl.load(totals_ptr + (m * H + h) * (P * N) + _tile(P, N))
        weight *= tl.load(decay_ptr + m * H + h)
        m += STEP
    return state_PN


@triton.jit
def _walk(
    values_ptr,
    values_stride,
    keys_ptr,
    keys_stride,
    vectors_ptr,
    decay_ptr,
    states_ptr,
    state_PN,
    first,
    end,
    h,
    T,
    H,
    padded,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
    REVERSE: tl.constexpr,
    STORE: tl.constexpr,
):
    """Carries a state through chunks first ... end - 1, or its gradient through them from the last to the first.

    Returns it and the decay through all of them; STORE keeps what arrives at each chunk in states_CHPN.
    """
    through = tl.full((), 1.0, tl.float32)
    q = tl.arange(0, Q)
    for k in range(end - first):
        if REVERSE:
            c = end - 1 - k
        else:
            c = first + k
        at = h * padded + c * Q + q
        if REVERSE:
            weight_Q = tl.load(vectors_ptr + START * H * padded + at)
        else:
            weight_Q = tl.load(vectors_ptr + END * H * padded + at) * tl.load(vectors_ptr + GAIN * H * padded + at)
        decay = tl.load(decay_ptr + c * H + h)
        values_QP = _rows(values_ptr + h * P, values_stride, c, T, Q, P, WHOLE)
        keys_QN = _rows(keys_ptr, keys_stride, c, T, Q, N, WHOLE)
        if STORE:
            state_at = states_ptr + tl.cast(c * H + h, tl.int64) * (P * N) + _tile(P, N)
            tl.store(state_at, state_PN.to(states_ptr.dtype.element_ty))
        values_QP = (values_QP * weight_Q[:, None]).to(keys_QN.dtype)
        state_PN = tl.dot(tl.trans(values_QP), keys_QN, state_PN * decay, input_precision="ieee")
        through *= decay
    return state_PN, through


@triton.jit(do_not_specialize=["T", "H", "n_chunks", "chunks_per_segment"])
def _totals(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    decay_ptr,
    totals_ptr,
    segment_decay_ptr,
    T,
    H,
    n_chunks,
    chunks_per_segment,
    x_stride,
    dy_stride,
    B_stride,
    C_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One program a segment, head and way. totals_2SHPN: what a segment adds to the state at its end, and to the
    gradient of the state at its start; segment_decay_SH: the decay through it."""
    pid = tl.program_id(0)
    h, s = pid % H, pid // H
    S = tl.num_programs(0) // H
    first = s * chunks_per_segment
    end = tl.minimum(first + chunks_per_segment, n_chunks)
    state_PN = tl.zeros((P, N), tl.float32)
    if tl.program_id(1) == 0:
        state_PN, through = _walk(
            x_ptr, x_stride, B_ptr, B_stride, vectors_ptr, decay_ptr, totals_ptr, state_PN, first, end, h, T, H,
            n_chunks * Q, P, N, Q, WHOLE, False, False,
        )  # fmt: skip
        tl.store(totals_ptr + pid * (P * N) + _tile(P, N), state_PN)
        tl.store(segment_decay_ptr + pid, through)
    else:
        state_PN, _ = _walk(
            dy_ptr, dy_stride, C_ptr, C_stride, vectors_ptr, decay_ptr, totals_ptr, state_PN, first, end, h, T, H,
            n_chunks * Q, P, N, Q, WHOLE, True, False,
        )  # fmt: skip
        tl.store(totals_ptr + (S * H + pid) * (P * N) + _tile(P, N), state_PN)


@triton.jit(do_not_specialize=["T", "H", "n_chunks", "chunks_per_segment"])
def _states(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    decay_ptr,
    totals_ptr,
    segment_decay_ptr,
    states_ptr,
    T,
    H,
    n_chunks,
    chunks_per_segment,
    x_stride,
    dy_stride,
    B_stride,
    C_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One program a segment, head and way. states_2CHPN: the state before each chunk, and the gradient of the state
    after each chunk."""
    pid = tl.program_id(0)
    h, s = pid % H, pid // H
    S = tl.num_programs(0) // H
    first = s * chunks_per_segment
    end = tl.minimum(first + chunks_per_segment, n_chunks)
    if tl.program_id(1) == 0:
        state_PN = _arriving(totals_ptr, segment_decay_ptr, h, s, H, S, P, N, False)
        _walk(
            x_ptr, x_stride, B_ptr, B_stride, vectors_ptr, decay_ptr, states_ptr, state_PN, first, end, h, T, H,
            n_chunks * Q, P, N, Q, WHOLE, False, True,
        )  # fmt: skip
    else:
        state_PN = _arriving(totals_ptr + S * H * (P * N), segment_decay_ptr, h, s, H, S, P, N, True)
        _walk(
            dy_ptr, dy_stride, C_ptr, C_stride, vectors_ptr, decay_ptr,
            states_ptr + tl.cast(n_chunks * H, tl.int64) * (P * N), state_PN, first, end, h, T, H,
            n_chunks * Q, P, N, Q, WHOLE, True, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "n_chunks", "chunks_per_segment"])
def _outputs(
    x_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    decay_ptr,
    scores_ptr,
    totals_ptr,
    segment_decay_ptr,
    y_ptr,
    T,
    H,
    n_chunks,
    chunks_per_segment,
    x_stride,
    B_stride,
    C_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One program a segment and head: y_THP, the state in registers."""
    pid = tl.program_id(0)
    h, s = pid % H, pid // H
    S = tl.num_programs(0) // H
    padded = n_chunks * Q
    first = s * chunks_per_segment
    end = tl.minimum(first + chunks_per_segment, n_chunks)
    q = tl.arange(0, Q)
    state_PN = _arriving(totals_ptr, segment_decay_ptr, h, s, H, S, P, N, False)
    for c in range(first, end):
        at = vectors_ptr + h * padded + c * Q + q
        sum_Q = tl.load(at + SUM * H * padded)
        source_Q = tl.load(at + SOURCE * H * padded)
        gain_Q = tl.load(at + GAIN * H * padded)
        start_Q = tl.load(at + START * H * padded)
        end_Q = tl.load(at + END * H * padded)
        decay = tl.load(decay_ptr + c * H + h)
        x_QP = _rows(x_ptr + h * P, x_stride, c, T, Q, P, WHOLE)
        B_QN = _rows(B_ptr, B_stride, c, T, Q, N, WHOLE)
        C_QN = _rows(C_ptr, C_stride, c, T, Q, N, WHOLE)
        scores_QQ = tl.load(scores_ptr + tl.cast(c, tl.int64) * Q * Q + _tile(Q, Q))

        y_QP = tl.dot(C_QN, tl.trans(state_PN.to(x_QP.dtype)), input_precision="ieee") * start_Q[:, None]
        weights_QQ = (scores_QQ * _exp2(sum_Q[:, None] + source_Q[None, :])).to(x_QP.dtype)
        y_QP = tl.dot(weights_QQ, x_QP, y_QP, input_precision="ieee")
        _store_rows(y_ptr + h * P, H * P, c, T, y_QP, Q, P, WHOLE)

        x_QP = (x_QP * (end_Q * gain_Q)[:, None]).to(B_QN.dtype)
        state_PN = tl.dot(tl.trans(x_QP), B_QN, state_PN * decay, input_precision="ieee")


@triton.jit
def _allowed(document_ptr, c, Q: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """(Q, Q): the row's token comes after the column's (TRANSPOSED: before), or is it, in one document."""
    q = tl.arange(0, Q)
    document_Q = tl.load(document_ptr + c * Q + q)
    same_QQ = document_Q[:, None] == document_Q[None, :]
    if TRANSPOSED:
        return same_QQ & (q[:, None] <= q[None, :])
    return same_QQ & (q[:, None] >= q[None, :])


@triton.jit
def _gradients_of_outputs(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    decay_ptr,
    document_ptr,
    states_ptr,
    dC_ptr,
    flows_ptr,
    through_ptr,
    c,
    first,
    end,
    T,
    H,
    n_chunks,
    x_stride,
    dy_stride,
    B_stride,
    C_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What leads to the outputs of chunk c: dC, the flows INTO its tokens and the flow through it. Rows: outputs."""
    padded = n_chunks * Q
    q = tl.arange(0, Q)
    B_QN = _rows(B_ptr, B_stride, c, T, Q, N, WHOLE)
    C_QN = _rows(C_ptr, C_stride, c, T, Q, N, WHOLE)
    scores_QQ = tl.dot(C_QN, tl.trans(B_QN), input_precision="ieee")
    scores_QQ = tl.where(_allowed(document_ptr, c, Q), scores_QQ, 0.0).to(B_QN.dtype)
    dscores_QQ = tl.zeros((Q, Q), tl.float32)
    dC_QN = tl.zeros((Q, N), tl.float32)
    dstates_ptr = states_ptr + tl.cast(n_chunks * H, tl.int64) * (P * N)
    for h in range(first, end):
        at = h * padded + c * Q + q
        sum_Q = tl.load(vectors_ptr + SUM * H * padded + at)
        source_Q = tl.load(vectors_ptr + SOURCE * H * padded + at)
        start_Q = tl.load(vectors_ptr + START * H * padded + at)
        decay = tl.load(decay_ptr + c * H + h)
        x_QP = _rows(x_ptr + h * P, x_stride, c, T, Q, P, WHOLE)
        dy_QP = _rows(dy_ptr + h * P, dy_stride, c, T, Q, P, WHOLE)
        state_at = tl.cast(c * H + h, tl.int64) * (P * N) + _tile(P, N)
        state_PN = tl.load(states_ptr + state_at)
        dstate_PN = tl.load(dstates_ptr + state_at)

        dscores_h_QQ = tl.dot(dy_QP, tl.trans(x_QP), input_precision="ieee")
        dscores_h_QQ *= _exp2(sum_Q[:, None] + source_Q[None, :])
        dscores_QQ += dscores_h_QQ
        into_Q = tl.sum(dscores_h_QQ * scores_QQ, 1)

        dy_start_QP = dy_QP * start_Q[:, None]
        into_Q += tl.sum(dy_start_QP * tl.dot(C_QN, tl.trans(state_PN), input_precision="ieee"), 1)
        dC_QN = tl.dot(dy_start_QP.to(dy_QP.dtype), state_PN, dC_QN, input_precision="ieee")
        tl.store(flows_ptr + INTO * H * padded + at, into_Q)
        if TRACE:
            product_PP = tl.dot(state_PN, tl.trans(dstate_PN), input_precision="ieee")
            p = tl.arange(0, P)
            product_PP = tl.where(p[:, None] == p[None, :], product_PP, 0.0)
            through = tl.sum(tl.sum(product_PP, 1), 0)
        else:
            through = tl.sum(tl.sum(state_PN.to(tl.float32) * dstate_PN.to(tl.float32), 1), 0)
        tl.store(through_ptr + c * H + h, decay * through)

    dscores_QQ = tl.where(_allowed(document_ptr, c, Q), dscores_QQ, 0.0).to(x_ptr.dtype.element_ty)
    B_QN = _rows(B_ptr, B_stride, c, T, Q, N, WHOLE)  # again, rather than kept through the loop
    dC_QN = tl.dot(dscores_QQ, B_QN, dC_QN, input_precision="ieee")
    _store_rows(dC_ptr, N, c, T, dC_QN, Q, N, WHOLE)


@triton.jit
def _gradients_of_inputs(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    document_ptr,
    dstates_ptr,
    dx_ptr,
    dB_ptr,
    flows_ptr,
    c,
    first,
    end,
    T,
    H,
    n_chunks,
    x_stride,
    dy_stride,
    B_stride,
    C_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """What the inputs of chunk c lead to: dx, dB, the gradient of the gain and the flow LATER. Rows: inputs."""
    padded = n_chunks * Q
    q = tl.arange(0, Q)
    B_QN = _rows(B_ptr, B_stride, c, T, Q, N, WHOLE)
    C_QN = _rows(C_ptr, C_stride, c, T, Q, N, WHOLE)
    scores_QQ = tl.dot(B_QN, tl.trans(C_QN), input_precision="ieee")
    scores_QQ = tl.where(_allowed(document_ptr, c, Q, True), scores_QQ, 0.0).to(B_QN.dtype)
    dscores_QQ = tl.zeros((Q, Q), tl.float32)
    dB_QN = tl.zeros((Q, N), tl.float32)
    for h in range(first, end):
        at = h * padded + c * Q + q
        sum_Q = tl.load(vectors_ptr + SUM * H * padded + at)
        gain_Q = tl.load(vectors_ptr + GAIN * H * padded + at)
        end_Q = tl.load(vectors_ptr + END * H * padded + at)
        x_QP = _rows(x_ptr + h * P, x_stride, c, T, Q, P, WHOLE)
        dy_QP = _rows(dy_ptr + h * P, dy_stride, c, T, Q, P, WHOLE)
        dstate_PN = tl.load(dstates_ptr + tl.cast(c * H + h, tl.int64) * (P * N) + _tile(P, N))

        within_QQ = _exp2(sum_Q[None, :] - sum_Q[:, None])
        ddecayed_QQ = tl.dot(x_QP, tl.trans(dy_QP), input_precision="ieee") * within_QQ
        dscores_QQ += ddecayed_QQ * gain_Q[:, None]
        dgain_Q = tl.sum(ddecayed_QQ * scores_QQ, 1)
        weights_QQ = (within_QQ * scores_QQ).to(x_QP.dtype)

        dinput_QP = tl.dot(B_QN, tl.trans(dstate_PN), input_precision="ieee") * end_Q[:, None]
        later_Q = tl.sum(x_QP * dinput_QP, 1)
        dinput_QP = tl.dot(weights_QQ, dy_QP, dinput_QP, input_precision="ieee")
        x_end_QP = (x_QP * (end_Q * gain_Q)[:, None]).to(x_QP.dtype)
        dB_QN = tl.dot(x_end_QP, dstate_PN, dB_QN, input_precision="ieee")

        _store_rows(dx_ptr + h * P, H * P, c, T, dinput_QP * gain_Q[:, None], Q, P, WHOLE)
        tl.store(flows_ptr + DGAIN * H * padded + at, dgain_Q + later_Q)
        tl.store(flows_ptr + LATER * H * padded + at, later_Q * gain_Q)

    dscores_QQ = tl.where(_allowed(document_ptr, c, Q, True), dscores_QQ, 0.0).to(x_ptr.dtype.element_ty)
    C_QN = _rows(C_ptr, C_stride, c, T, Q, N, WHOLE)  # again, rather than kept through the loop
    dB_QN = tl.dot(dscores_QQ, C_QN, dB_QN, input_precision="ieee")
    _store_rows(dB_ptr, N, c, T, dB_QN, Q, N, WHOLE)


@triton.jit(do_not_specialize=["T", "H", "n_chunks", "heads_per_group"])
def _gradients(
    x_ptr,
    dy_ptr,
    B_ptr,
    C_ptr,
    vectors_ptr,
    decay_ptr,
    document_ptr,
    states_ptr,
    dx_ptr,
    dB_ptr,
    dC_ptr,
    flows_ptr,
    through_ptr,
    T,
    H,
    n_chunks,
    heads_per_group,
    x_stride,
    dy_stride,
    B_stride,
    C_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Two programs a chunk and group of heads, side by side so that they share what they load through the cache:
    dx_THP, dB_GTN and dC_GTN of the group and, for the decays, flows_3HT and through_CH.

    The flow from j to i is (dL/dy_i) . (what j's input adds to y_i). flows_3HT: the flow INTO a token, its flow to
    LATER chunks, and the gradient of its gain (which is all its flow, to its chunk and later, over the gain).
    """
    c, group = tl.program_id(0) // 2, tl.program_id(1)
    first = group * heads_per_group
    end = first + heads_per_group
    part = tl.cast(group * T, tl.int64) * N
    if tl.program_id(0) % 2 == 0:
        _gradients_of_outputs(
            x_ptr, dy_ptr, B_ptr, C_ptr, vectors_ptr, decay_ptr, document_ptr, states_ptr, dC_ptr + part, flows_ptr,
            through_ptr, c, first, end, T, H, n_chunks, x_stride, dy_stride, B_stride, C_stride, P, N, Q, WHOLE,
        )  # fmt: skip
    else:
        dstates_ptr = states_ptr + tl.cast(n_chunks * H, tl.int64) * (P * N)
        _gradients_of_inputs(
            x_ptr, dy_ptr, B_ptr, C_ptr, vectors_ptr, document_ptr, dstates_ptr, dx_ptr, dB_ptr + part, flows_ptr,
            c, first, end, T, H, n_chunks, x_stride, dy_stride, B_stride, C_stride, P, N, Q, WHOLE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H"])
def _finish(
    dt_ptr,
    A_ptr,
    document_ptr,
    flows_ptr,
    through_ptr,
    dB_GTN_ptr,
    dC_GTN_ptr,
    ddt_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    T,
    H,
    dt_stride,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program a chunk: ddt_TH, the chunk's part of dA (dA_CH), and dB and dC summed over GROUPS > 1 groups.

    A token's log decay gets what flows across it: from all before it to itself and all after it.
    """
    c = tl.program_id(0)
    padded = tl.num_programs(0) * Q
    q, h, n = tl.arange(0, Q), tl.arange(0, BLOCK_H), tl.arange(0, N)
    t = c * Q + q
    document_Q = tl.load(document_ptr + t)
    at_QH = h[None, :] * padded + t[:, None]
    valid_QH = (t < T)[:, None] & (h < H)[None, :]
    gain_QH = tl.load(dt_ptr + t[:, None] * dt_stride + h[None, :], mask=valid_QH, other=0.0)
    A_H = tl.load(A_ptr + h, mask=h < H, other=0.0)
    into_QH = tl.load(flows_ptr + INTO * H * padded + at_QH, mask=valid_QH, other=0.0)
    later_QH = tl.load(flows_ptr + LATER * H * padded + at_QH, mask=valid_QH, other=0.0)
    dgain_QH = tl.load(flows_ptr + DGAIN * H * padded + at_QH, mask=valid_QH, other=0.0)
    through_H = tl.load(through_ptr + c * H + h, mask=h < H, other=0.0)

    inside_QH = into_QH - (gain_QH * dgain_QH - later_QH)  # less its flow to its chunk
    same_QQ = document_Q[:, None] == document_Q[None, :]
    from_here_QQ = tl.where(same_QQ & (q[:, None] <= q[None, :]), 1.0, 0.0)
    earlier_QQ = tl.where(same_QQ & (q[:, None] > q[None, :]), 1.0, 0.0)
    dlog_QH = tl.dot(from_here_QQ, inside_QH, input_precision="ieee")
    dlog_QH = tl.dot(earlier_QQ, later_QH, dlog_QH, input_precision="ieee") + through_H[None, :]
    tl.store(ddt_ptr + t[:, None] * H + h[None, :], dgain_QH + dlog_QH * A_H[None, :], mask=valid_QH)
    tl.store(dA_ptr + c * H + h, tl.sum(dlog_QH * gain_QH, 0), mask=h < H)

    if GROUPS > 1:
        at_QN = t.to(tl.int64)[:, None] * N + n[None, :]
        mask_QN = (t < T)[:, None]
        dB_QN = tl.zeros((Q, N), tl.float32)
        dC_QN = tl.zeros((Q, N), tl.float32)
        for g in range(GROUPS):
            part = tl.cast(T * g, tl.int64) * N + at_QN
            dB_QN += tl.load(dB_GTN_ptr + part, mask=mask_QN, other=0.0)
            dC_QN += tl.load(dC_GTN_ptr + part, mask=mask_QN, other=0.0)
        tl.store(dB_ptr + at_QN, dB_QN.to(dB_ptr.dtype.element_ty), mask=mask_QN)
        tl.store(dC_ptr + at_QN, dC_QN.to(dC_ptr.dtype.element_ty), mask=mask_QN)


LAUNCH = {  # (warps, stages of the pipeline that loads): measured on an H200, see docs/PERFORMANCE.md
    torch.bfloat16: {
        "_prepare": (4, 1),
        "_totals": (4, 3),
        "_states": (4, 3),
        "_outputs": (4, 2),
        "_gradients": (4, 2),
        "_finish": (4, 1),
    },
    # full-precision products do without tensor cores: more registers, so more threads and fewer tokens a chunk
    torch.float32: {
        "_prepare": (8, 1),
        "_totals": (8, 1),
        "_states": (8, 1),
        "_outputs": (16, 1),
        "_gradients": (16, 1),
        "_finish": (4, 1),
    },
}
CHUNK = {torch.bfloat16: 64, torch.float32: 32}  # tokens; 64: the rows of one tensor-core instruction on Hopper


def _launch(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    warps, stages = LAUNCH[dtype][kernel]
    return {"num_warps": warps, "num_stages": stages}


def _dense(x: Tensor) -> Tensor:
    """x, or a copy, with its rows at any stride and everything within a row side by side."""
    return x if x[:1].is_contiguous() else x.contiguous()


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs at once keep a device busy, two on a multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


class _Plan:
    """What both directions begin with: sizes, and what `_prepare` computes."""

    def __init__(self, x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor):
        (self.T, self.H, self.P), self.N, self.Q = x_THP.shape, B_TN.shape[1], CHUNK[x_THP.dtype]
        self.n_chunks = triton.cdiv(self.T, self.Q)
        self.chunks_per_segment = triton.cdiv(self.n_chunks * self.H, _programs(x_THP.device))
        self.segments = triton.cdiv(self.n_chunks, self.chunks_per_segment)
        self.shape = {"P": self.P, "N": self.N, "Q": self.Q, "WHOLE": self.T % self.Q == 0}
        self.inputs = dt_TH, A_H, B_TN, C_TN, cu_seqlens
        self.vectors_5HT = dt_TH.new_empty(5, self.H, self.n_chunks * self.Q)
        self.decay_CH = dt_TH.new_empty(self.n_chunks, self.H)
        self.document_T = cu_seqlens.new_empty(self.n_chunks * self.Q, dtype=torch.int32)

    def prepare(self, with_scores: bool) -> Tensor:
        """Launches `_prepare`; returns scores_CQQ."""
        dt_TH, _, B_TN, C_TN, cu_seqlens = self.inputs
        n_docs = len(cu_seqlens) - 1
        scores_CQQ = B_TN.new_empty(self.n_chunks if with_scores else 0, self.Q, self.Q)
        _prepare[(self.n_chunks,)](
            *self.inputs, self.vectors_5HT, self.decay_CH, self.document_T, scores_CQQ,
            self.T, self.H, n_docs, n_docs.bit_length(), dt_TH.stride(0), B_TN.stride(0), C_TN.stride(0),
            N=self.N, Q=self.Q, WHOLE=self.shape["WHOLE"], BLOCK_H=triton.next_power_of_2(self.H),
            WITH_SCORES=with_scores, **_launch("_prepare", B_TN.dtype),
        )  # fmt: skip
        return scores_CQQ


def scan_forward(x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_THP of `hnet::ssd`. x, B, C: one of the dtypes of CHUNK; dt, A: float32; N a power of two from 16 on."""
    x_THP, dt_TH, B_TN, C_TN = (_dense(t) for t in (x_THP, dt_TH, B_TN, C_TN))
    plan = _Plan(x_THP, dt_TH, A_H.contiguous(), B_TN, C_TN, cu_seqlens.contiguous())
    y_THP = x_THP.new_empty(x_THP.shape)
    totals_SHPN = dt_TH.new_empty(plan.segments, plan.H, plan.P, plan.N)
    segment_decay_SH = dt_TH.new_empty(plan.segments, plan.H)
    sizes = plan.T, plan.H, plan.n_chunks, plan.chunks_per_segment
    strides = x_THP.stride(0), B_TN.stride(0), C_TN.stride(0)
    decays = plan.vectors_5HT, plan.decay_CH
    with torch.cuda.device_of(x_THP):
        scores_CQQ = plan.prepare(with_scores=True)
        _totals[(plan.segments * plan.H, 1)](
            x_THP, x_THP, B_TN, C_TN, *decays, totals_SHPN, segment_decay_SH, *sizes, x_THP.stride(0), *strides,
            **plan.shape, **_launch("_totals", x_THP.dtype),
        )  # fmt: skip
        _outputs[(plan.segments * plan.H,)](
            x_THP, B_TN, C_TN, *decays, scores_CQQ, totals_SHPN, segment_decay_SH, y_THP, *sizes, *strides,
            **plan.shape, **_launch("_outputs", x_THP.dtype),
        )  # fmt: skip
    return y_THP


def scan_backward(
    dy_THP: Tensor, x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `hnet::ssd` for x, dt, A, B and C; computes the states again."""
    dy_THP, x_THP, dt_TH, B_TN, C_TN = (_dense(t) for t in (dy_THP, x_THP, dt_TH, B_TN, C_TN))
    A_H = A_H.contiguous()
    plan = _Plan(x_THP, dt_TH, A_H, B_TN, C_TN, cu_seqlens.contiguous())
    T, H, P, N, n_chunks = plan.T, plan.H, plan.P, plan.N, plan.n_chunks
    groups = _groups(n_chunks, H, x_THP.device)
    totals_2SHPN = dt_TH.new_empty(2, plan.segments, H, P, N)
    segment_decay_SH = dt_TH.new_empty(plan.segments, H)
    states_2CHPN = x_THP.new_empty(2, n_chunks, H, P, N)
    dx_THP, ddt_TH, dB_TN, dC_TN = (t.new_empty(t.shape) for t in (x_THP, dt_TH, B_TN, C_TN))
    parts_2GTN = dt_TH.new_empty(2, groups, T, N) if groups > 1 else (dB_TN, dC_TN)
    flows_3HT = dt_TH.new_empty(3, H, n_chunks * plan.Q)
    through_CH, dA_CH = dt_TH.new_empty(2, n_chunks, H)
    inputs = x_THP, dy_THP, B_TN, C_TN, plan.vectors_5HT, plan.decay_CH
    strides = x_THP.stride(0), dy_THP.stride(0), B_TN.stride(0), C_TN.stride(0)
    with torch.cuda.device_of(x_THP):
        plan.prepare(with_scores=False)
        _totals[(plan.segments * H, 2)](
            *inputs, totals_2SHPN, segment_decay_SH, T, H, n_chunks, plan.chunks_per_segment, *strides,
            **plan.shape, **_launch("_totals", x_THP.dtype),
        )  # fmt: skip
        _states[(plan.segments * H, 2)](
            *inputs, totals_2SHPN, segment_decay_SH, states_2CHPN, T, H, n_chunks, plan.chunks_per_segment, *strides,
            **plan.shape, **_launch("_states", x_THP.dtype),
        )  # fmt: skip
        _gradients[(2 * n_chunks, groups)](
            *inputs, plan.document_T, states_2CHPN, dx_THP, *parts_2GTN, flows_3HT, through_CH,
            T, H, n_chunks, H // groups, *strides, **plan.shape, **_launch("_gradients", x_THP.dtype),
        )  # fmt: skip
        _finish[(n_chunks,)](
            dt_TH, A_H, plan.document_T, flows_3HT, through_CH, *parts_2GTN, ddt_TH, dA_CH, dB_TN, dC_TN,
            T, H, dt_TH.stride(0), N=N, Q=plan.Q, BLOCK_H=max(16, triton.next_power_of_2(H)), GROUPS=groups,
            **_launch("_finish", x_THP.dtype),
        )  # fmt: skip
        return dx_THP, ddt_TH, dA_CH.sum(0), dB_TN, dC_TN


def _groups(n_chunks: int, H: int, device: torch.device) -> int:
    """Groups of heads in `_gradients`: the fewest, so that few sums are left, that still keep the device busy."""
    enough = -(-3 * _programs(device) // (2 * n_chunks))
    return next(g for g in range(1, H + 1) if H % g == 0 and (g >= enough or 2 * g >= H))
