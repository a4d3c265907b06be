"""Triton kernels for `hnet::ssd` and its gradient. The definition and the dispatch are in ssd.py.

Legend: T tokens, H heads, P channels per head, N state size, Q tokens per chunk, C chunks, S segments (runs of chunks
that one thread block walks through), G groups of heads. Log decays are base-2 logarithms.

With h_n the state (P, N) before chunk n, g the gain dt, and decays that are zero across documents, a chunk computes

    y_i = start_i C_i h_n^T + sum_{j <= i} (C_i . B_j) decay_ij g_j x_j
    h_{n+1} = decay_n h_n + sum_j end_j g_j x_j B_j^T

The gradient runs the same recurrence in reverse, with dy for g x, C for B, and start for end. A thread block walks
through a segment with the state in registers. So the forward reads x twice, writes y, and nothing else grows with T H:

    _prepare    gains, decays within and across chunks, and the products C_i . B_j, which all heads share
    _totals     what each segment adds to the state at its end
    _outputs    y; each thread block starts from the states that arrive at its segment

    _totals, _states    backward: the same in reverse. They save the gradient of h at every chunk in x's dtype, and h
                itself unless `_outputs` saved it
    _gradients  dx, and the flows between tokens, per head; the sums of dB and dC over a group of heads in registers
    _finish     dB and dC; the gradients of dt, A, the bias and D from the flows

There are no atomics: the same bits every time on one kind of GPU. Tiles are loaded and stored as `load_tile` in
triton_math.py says: through tensor descriptors where the chip has a copy engine for them, which saves the registers of
addresses. Rows past T are read as zeros and not written.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels import cards, launch_options
from hnet_kernels.gradients import Slot
from hnet_kernels.launch import Rows, cdiv, kernel, next_power_of_2, on_device_of, row_width, rows_of
from hnet_kernels.launch_options import Options, launch
from hnet_kernels.norm_triton import sum_rows
from hnet_kernels.saved import save_if, saved_empty
from hnet_kernels.triton_math import LOG2_E, load_tile, store_tile

SUM, SOURCE, GAIN, START, END = (tl.constexpr(i) for i in range(5))  # of vectors_5HT, see _prepare
INSIDE, BEFORE, LATER, DGAIN, ITSELF = (tl.constexpr(i) for i in range(5))  # of flows_5HT, see _gradients


@triton.jit
def _tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _exp2(x):
    """exp2 for decays within a chunk; finite also from later to earlier tokens, where their scores are zero."""
    return tl.exp2(tl.minimum(x, 64.0))


@triton.jit
def _documents(cu_seqlens_ptr, n_docs, t, Q: tl.constexpr):
    """Each token's document, as the number of documents that end at or before it, and whether it opens it (1, 0)."""
    BLOCK: tl.constexpr = 64
    document_Q = tl.zeros((Q,), tl.int32)
    opens_Q = tl.where(t == 0, 1, 0)
    for first in range(0, n_docs, BLOCK):
        b = first + tl.arange(0, BLOCK)
        ends = tl.load(cu_seqlens_ptr + 1 + b, mask=b < n_docs, other=2**31 - 1).to(tl.int32)
        document_Q += tl.sum((ends[:, None] <= t[None, :]).to(tl.int32), 0)
        opens_Q |= tl.max((ends[:, None] == t[None, :]).to(tl.int32), 0)
    return document_Q, opens_Q


@triton.jit
def _add_in_document(left_sum, left_opens, right_sum, right_opens):
    """Joins the sums of adjacent runs of tokens. A run in which a document begins has the sum of its last document."""
    return tl.where(right_opens != 0, right_sum, left_sum + right_sum), left_opens | right_opens


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|).

    log(1 + e) is computed as 2 artanh(e / (2 + e)), whose series is short and accurate where 1 + e loses bits.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    artanh = s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))
    return tl.maximum(x, 0.0) + 2 * artanh


@triton.jit
def _softplus_slope(y):
    """softplus's derivative where its value is y: 1 - exp(-y), by its series for small y."""
    series = y * (1 - y / 2 * (1 - y / 3 * (1 - y / 4 * (1 - y / 5 * (1 - y / 6)))))
    return tl.where(y < 0.1, series, 1 - tl.exp(-y))


@kernel(do_not_specialize=["T", "H", "n_docs"])
def _prepare(
    dt_ptr,
    bias_ptr,
    A_ptr,
    B_rows,
    C_rows,
    cu_seqlens_ptr,
    vectors_ptr,
    decay_ptr,
    document_ptr,
    scores_ptr,
    T,
    H,
    n_docs,
    dt_stride,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WITH_SCORES: tl.constexpr,
):
    """One thread block per chunk: vectors_5HT, decay_CH (through the chunk), document_T, scores_CQQ (C B^T, zero where
    nothing may flow). The vectors: sums of log decays from the start of the chunk or, in it, the document; log gains
    less these sums (SOURCE); gains; decays from before the chunk (START) and to its end (END)."""
    c = tl.program_id(0)
    padded = tl.num_programs(0) * Q
    q, h = tl.arange(0, Q), tl.arange(0, BLOCK_H)
    t = c * Q + q
    valid_QH = (t < T)[:, None] & (h < H)[None, :]
    gain_QH = tl.load(dt_ptr + t.to(tl.int64)[:, None] * dt_stride + h[None, :], mask=valid_QH, other=0.0)
    A_H = tl.load(A_ptr + h, mask=h < H, other=0.0)
    if HAS_BIAS:
        bias_H = tl.load(bias_ptr + h, mask=h < H, other=0.0)
    if WITH_SCORES:  # these wait for their loads, so they come after all other loads
        B_QN, C_QN = load_tile(B_rows, c * Q, 0, Q, N), load_tile(C_rows, c * Q, 0, Q, N)
    gain_QH = gain_QH.to(tl.float32)
    if HAS_BIAS:
        gain_QH = tl.where(valid_QH, _softplus(gain_QH + bias_H[None, :]), 0.0)
        A_H = -tl.exp(A_H)
    document_Q, opens_Q = _documents(cu_seqlens_ptr, n_docs, t, Q)
    tl.store(document_ptr + t, document_Q)
    before = tl.min(document_Q - tl.where(q == 0, opens_Q, 0), 0)  # the document that continues into the chunk, if any
    last = tl.max(document_Q, 0)

    gain_HQ = tl.trans(gain_QH)
    opens_HQ = tl.broadcast_to(opens_Q[None, :], (BLOCK_H, Q))
    sum_HQ, _ = tl.associative_scan((gain_HQ * (A_H * LOG2_E)[:, None], opens_HQ), 1, _add_in_document)
    total_H = tl.sum(tl.where(q[None, :] == Q - 1, sum_HQ, 0.0), 1)
    row = vectors_ptr + h[:, None] * padded + t[None, :]
    valid = (h < H)[:, None] & (q >= 0)[None, :]
    tl.store(row + SUM * H * padded, sum_HQ, mask=valid)
    tl.store(row + SOURCE * H * padded, tl.log2(gain_HQ) - sum_HQ, mask=valid)
    tl.store(row + GAIN * H * padded, gain_HQ, mask=valid)
    tl.store(row + START * H * padded, tl.where((document_Q == before)[None, :], tl.exp2(sum_HQ), 0.0), mask=valid)
    to_end_HQ = tl.where((document_Q == last)[None, :], tl.exp2(total_H[:, None] - sum_HQ), 0.0)
    tl.store(row + END * H * padded, to_end_HQ, mask=valid)
    tl.store(decay_ptr + c * H + h, tl.where(before == last, tl.exp2(total_H), 0.0), mask=h < H)

    if WITH_SCORES:
        scores_QQ = tl.dot(C_QN, tl.trans(B_QN), input_precision="ieee")
        allowed_QQ = (q[:, None] >= q[None, :]) & (document_Q[:, None] == document_Q[None, :])
        scores_QQ = tl.where(allowed_QQ, scores_QQ, 0.0).to(scores_ptr.dtype.element_ty)
        tl.store(scores_ptr + tl.cast(c, tl.int64) * Q * Q + _tile(Q, Q), scores_QQ)


@triton.jit
def _arriving(
    totals_ptr, decay_ptr, h, s, H, S, P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The state (P, N) that arrives at segment s from those before it; REVERSE: its gradient, from those after it.

    Looks back only as far as the decay is not zero: a document rarely spans more than a few segments.
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
def _weights(vectors_ptr, at, stride, REVERSE: tl.constexpr):
    """The factors of a head's values when they enter the state, or of their gradients for its gradient."""
    if REVERSE:
        weight_Q = tl.load(vectors_ptr + START * stride + at)
    else:
        weight_Q = tl.load(vectors_ptr + END * stride + at) * tl.load(vectors_ptr + GAIN * stride + at)
    return weight_Q


@triton.jit
def _cut(decay_ptr, first, end, h, H, REVERSE: tl.constexpr):
    """The chunks (first, end) of a segment that reach its end; REVERSE: that reach its start.

    Nothing passes through a chunk whose decay is zero, where a document begins; its own tokens count on the near side.
    """
    BLOCK: tl.constexpr = 64
    for c_first in range(first, end, BLOCK):
        c = c_first + tl.arange(0, BLOCK)
        nothing = tl.load(decay_ptr + c * H + h, mask=c < end, other=1.0) == 0
        if REVERSE:
            end = tl.minimum(end, tl.min(tl.where(nothing, c, end), 0) + 1)
        else:
            first = tl.maximum(first, tl.max(tl.where(nothing, c, first), 0))
    return first, end


@kernel(do_not_specialize=["H", "n_chunks", "chunks_per_segment"])
def _totals(
    values_rows,
    keys_rows,
    vectors_ptr,
    decay_ptr,
    totals_ptr,
    segment_decay_ptr,
    H,
    n_chunks,
    chunks_per_segment,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One thread block per segment and head. totals_SHPN: what a segment adds to the state at its end (values x, keys
    B). segment_decay_SH: the decay through it. REVERSE: what it adds to the gradient of the state at its start (dy, C).

    It walks away from that end, so that each value is weighted once and the growing sum is not.
    """
    pid = tl.program_id(0)
    h, s = pid % H, pid // H
    STEP: tl.constexpr = 1 if REVERSE else -1
    padded = n_chunks * Q
    first = s * chunks_per_segment
    first, end = _cut(decay_ptr, first, tl.minimum(first + chunks_per_segment, n_chunks), h, H, REVERSE)
    state_PN = tl.zeros((P, N), tl.float32)
    through = tl.full((), 1.0, tl.float32)
    c = first if REVERSE else end - 1
    decay = tl.load(decay_ptr + c * H + h)
    for k in range(end - first):
        # a scalar loaded where it is used would stall: the next chunk's is loaded now
        next_decay = tl.load(decay_ptr + (c + STEP) * H + h, mask=k + 1 < end - first, other=0.0)
        weight_Q = _weights(vectors_ptr, h * padded + c * Q + tl.arange(0, Q), H * padded, REVERSE) * through
        keys_QN = load_tile(keys_rows, c * Q, 0, Q, N)
        values_QP = (load_tile(values_rows, c * Q, h * P, Q, P) * weight_Q[:, None]).to(keys_QN.dtype)
        state_PN = tl.dot(tl.trans(values_QP), keys_QN, state_PN, input_precision="ieee")
        through *= decay
        decay = next_decay
        c += STEP
    tl.store(totals_ptr + (s * H + h) * (P * N) + _tile(P, N), state_PN)
    if not REVERSE:
        tl.store(segment_decay_ptr + s * H + h, through)


@kernel(do_not_specialize=["H", "n_chunks", "chunks_per_segment"])
def _states(
    values_rows,
    keys_rows,
    vectors_ptr,
    decay_ptr,
    totals_ptr,
    segment_decay_ptr,
    states_rows,
    H,
    n_chunks,
    chunks_per_segment,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One thread block per segment and head. states_CHPN: the state before each chunk. REVERSE: the gradient of the
    state after each chunk."""
    pid = tl.program_id(0)
    h, s = pid % H, pid // H
    S = tl.num_programs(0) // H
    STEP: tl.constexpr = -1 if REVERSE else 1
    padded = n_chunks * Q
    first = s * chunks_per_segment
    end = tl.minimum(first + chunks_per_segment, n_chunks)
    state_PN = _arriving(totals_ptr, segment_decay_ptr, h, s, H, S, P, N, REVERSE)
    c = end - 1 if REVERSE else first
    decay = tl.load(decay_ptr + c * H + h)
    for k in range(end - first):
        next_decay = tl.load(decay_ptr + (c + STEP) * H + h, mask=k + 1 < end - first, other=0.0)  # see `_totals`
        weight_Q = _weights(vectors_ptr, h * padded + c * Q + tl.arange(0, Q), H * padded, REVERSE)
        values_QP = load_tile(values_rows, c * Q, h * P, Q, P)
        keys_QN = load_tile(keys_rows, c * Q, 0, Q, N)
        store_tile(states_rows, (c * H + h) * P, 0, state_PN.to(keys_QN.dtype))
        values_QP = (values_QP * weight_Q[:, None]).to(keys_QN.dtype)
        state_PN = tl.dot(tl.trans(values_QP), keys_QN, state_PN * decay, input_precision="ieee")
        decay = next_decay
        c += STEP


@kernel(do_not_specialize=["H", "n_chunks", "chunks_per_segment"])
def _outputs(
    x_rows,
    B_rows,
    C_rows,
    vectors_ptr,
    decay_ptr,
    scores_rows,
    totals_ptr,
    segment_decay_ptr,
    D_ptr,
    y_rows,
    states_ptr,
    H,
    n_chunks,
    chunks_per_segment,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HAS_D: tl.constexpr,
    SAVE_STATES: tl.constexpr,
):
    """One thread block per segment and head: y_THP, with the state in registers.

    HAS_D: with the skip D x. SAVE_STATES: also states_CHPN, as in `_states`.
    """
    pid = tl.program_id(0)
    h, s = pid % H, pid // H
    S = tl.num_programs(0) // H
    padded = n_chunks * Q
    first = s * chunks_per_segment
    end = tl.minimum(first + chunks_per_segment, n_chunks)
    q = tl.arange(0, Q)
    vectors_ptr += h * padded + q
    state_PN = _arriving(totals_ptr, segment_decay_ptr, h, s, H, S, P, N, False)
    decay = tl.load(decay_ptr + first * H + h)
    if HAS_D:
        D = tl.load(D_ptr + h)
    start_Q = tl.load(vectors_ptr + START * H * padded + first * Q)
    for c in range(first, end):
        # loads outside of the pipeline are made one chunk ahead
        next_decay = tl.load(decay_ptr + (c + 1) * H + h, mask=c + 1 < end, other=0.0)
        next_start_Q = tl.load(vectors_ptr + START * H * padded + (c + 1) * Q, mask=(q >= 0) & (c + 1 < end), other=0.0)
        sum_Q = tl.load(vectors_ptr + SUM * H * padded + c * Q)
        source_Q = tl.load(vectors_ptr + SOURCE * H * padded + c * Q)
        gain_Q = tl.load(vectors_ptr + GAIN * H * padded + c * Q)
        end_Q = tl.load(vectors_ptr + END * H * padded + c * Q)
        x_QP = load_tile(x_rows, c * Q, h * P, Q, P)
        B_QN = load_tile(B_rows, c * Q, 0, Q, N)
        C_QN = load_tile(C_rows, c * Q, 0, Q, N)
        scores_QQ = load_tile(scores_rows, c * Q, 0, Q, Q)

        y_QP = tl.dot(C_QN, tl.trans(state_PN.to(x_QP.dtype)), input_precision="ieee") * start_Q[:, None]
        weights_QQ = (scores_QQ * _exp2(sum_Q[:, None] + source_Q[None, :])).to(x_QP.dtype)
        y_QP = tl.dot(weights_QQ, x_QP, y_QP, input_precision="ieee")
        if HAS_D:
            y_QP += D * x_QP
        store_tile(y_rows, c * Q, h * P, y_QP.to(x_QP.dtype))

        if SAVE_STATES:
            # here and not through a descriptor: it reuses the shared memory of finished products, so that two blocks
            # still fit on an SM
            at = states_ptr + tl.cast(c * H + h, tl.int64) * (P * N)
            tl.store(at + _tile(P, N), state_PN.to(x_QP.dtype))
        x_QP = (x_QP * (end_Q * gain_Q)[:, None]).to(B_QN.dtype)
        state_PN = tl.dot(tl.trans(x_QP), B_QN, state_PN * decay, input_precision="ieee")
        decay, start_Q = next_decay, next_start_Q


@triton.jit
def _gradients_within(
    x_rows,
    dy_rows,
    B_rows,
    C_rows,
    vectors_ptr,
    document_ptr,
    dstates_rows,
    dx_rows,
    dscores_rows,
    flows_ptr,
    D_ptr,
    c,
    group,
    first,
    end,
    H,
    n_chunks,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HAS_D: tl.constexpr,
):
    """dx, the gradient of the scores, and the flows from the inputs of chunk c. Rows are inputs."""
    padded = n_chunks * Q
    q = tl.arange(0, Q)
    document_Q = tl.load(document_ptr + c * Q + q)
    allowed_QQ = (q[:, None] <= q[None, :]) & (document_Q[:, None] == document_Q[None, :])
    B_QN = load_tile(B_rows, c * Q, 0, Q, N)
    scores_QQ = tl.dot(B_QN, tl.trans(load_tile(C_rows, c * Q, 0, Q, N)), input_precision="ieee")
    scores_QQ = tl.where(allowed_QQ, scores_QQ, 0.0)
    dscores_QQ = tl.zeros((Q, Q), tl.float32)
    for h in range(first, end):
        at = h * padded + c * Q + q
        sum_Q = tl.load(vectors_ptr + SUM * H * padded + at)
        gain_Q = tl.load(vectors_ptr + GAIN * H * padded + at)
        end_Q = tl.load(vectors_ptr + END * H * padded + at)
        x_QP = load_tile(x_rows, c * Q, h * P, Q, P)
        dy_QP = load_tile(dy_rows, c * Q, h * P, Q, P)
        dstate_PN = load_tile(dstates_rows, (c * H + h) * P, 0, P, N)

        within_QQ = _exp2(sum_Q[None, :] - sum_Q[:, None])
        dscores_h_QQ = tl.dot(x_QP, tl.trans(dy_QP), input_precision="ieee") * within_QQ  # without the gain
        dscores_QQ += dscores_h_QQ * gain_Q[:, None]
        flow_QQ = dscores_h_QQ * scores_QQ
        dgain_Q = tl.sum(flow_QQ, 1)
        inside_Q = tl.sum(flow_QQ * gain_Q[:, None], 0) - dgain_Q * gain_Q
        weights_QQ = within_QQ * scores_QQ * gain_Q[:, None]
        if HAS_D:  # the skip weights a token itself without decay, so x . dy is on the diagonal
            itself_QQ = q[:, None] == q[None, :]
            weights_QQ += tl.where(itself_QQ, tl.load(D_ptr + h), 0.0)
            tl.store(flows_ptr + ITSELF * H * padded + at, tl.sum(tl.where(itself_QQ, dscores_h_QQ, 0.0), 1))

        dinput_QP = tl.dot(B_QN, tl.trans(dstate_PN), input_precision="ieee") * end_Q[:, None]
        later_Q = tl.sum(x_QP * dinput_QP, 1)
        dinput_QP = tl.dot(weights_QQ.to(x_QP.dtype), dy_QP, dinput_QP * gain_Q[:, None], input_precision="ieee")
        store_tile(dx_rows, c * Q, h * P, dinput_QP.to(x_QP.dtype))
        tl.store(flows_ptr + INSIDE * H * padded + at, inside_Q)
        tl.store(flows_ptr + LATER * H * padded + at, later_Q * gain_Q)
        tl.store(flows_ptr + DGAIN * H * padded + at, dgain_Q + later_Q)

    dscores_QQ = tl.where(allowed_QQ, dscores_QQ, 0.0).to(B_QN.dtype)
    store_tile(dscores_rows, group * padded + c * Q, 0, dscores_QQ)


@triton.jit
def _gradients_across(
    x_rows,
    dy_rows,
    C_rows,
    vectors_ptr,
    decay_ptr,
    states_rows,
    dstates_rows,
    parts_rows,
    flows_ptr,
    through_ptr,
    c,
    group,
    first,
    end,
    H,
    n_chunks,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
):
    """The parts of dB and dC that come through the states around chunk c, and the flows into and through it."""
    padded = n_chunks * Q
    p = tl.arange(0, P)
    C_QN = load_tile(C_rows, c * Q, 0, Q, N)
    dB_QN = tl.zeros((Q, N), tl.float32)
    dC_QN = tl.zeros((Q, N), tl.float32)
    for h in range(first, end):
        at = h * padded + c * Q + tl.arange(0, Q)
        gain_Q = tl.load(vectors_ptr + GAIN * H * padded + at)
        start_Q = tl.load(vectors_ptr + START * H * padded + at)
        end_Q = tl.load(vectors_ptr + END * H * padded + at)
        decay = tl.load(decay_ptr + c * H + h)
        x_QP = load_tile(x_rows, c * Q, h * P, Q, P)
        dy_QP = load_tile(dy_rows, c * Q, h * P, Q, P)
        state_PN = load_tile(states_rows, (c * H + h) * P, 0, P, N)
        dstate_PN = load_tile(dstates_rows, (c * H + h) * P, 0, P, N)

        x_end_QP = (x_QP * (end_Q * gain_Q)[:, None]).to(x_QP.dtype)
        dB_QN = tl.dot(x_end_QP, dstate_PN, dB_QN, input_precision="ieee")
        dy_start_QP = dy_QP * start_Q[:, None]
        dC_QN = tl.dot(dy_start_QP.to(dy_QP.dtype), state_PN, dC_QN, input_precision="ieee")
        before_Q = tl.sum(dy_start_QP * tl.dot(C_QN, tl.trans(state_PN), input_precision="ieee"), 1)
        tl.store(flows_ptr + BEFORE * H * padded + at, before_Q)
        # the sum over state * dstate as the trace of a product: fewer registers than to load both tiles
        product_PP = tl.dot(state_PN, tl.trans(dstate_PN), input_precision="ieee")
        through_P = tl.sum(tl.where(p[:, None] == p[None, :], product_PP, 0.0), 1)
        tl.store(through_ptr + (c * H + h) * P + p, decay * through_P)

    row = group * 2 * padded + c * Q
    store_tile(parts_rows, row, 0, dB_QN.to(C_QN.dtype))
    store_tile(parts_rows, row + padded, 0, dC_QN.to(C_QN.dtype))


@kernel(do_not_specialize=["H", "n_chunks", "heads_per_group"])
def _gradients(
    x_rows,
    dy_rows,
    B_rows,
    C_rows,
    vectors_ptr,
    decay_ptr,
    document_ptr,
    states_rows,
    dstates_rows,
    dx_rows,
    dscores_rows,
    parts_rows,
    flows_ptr,
    through_ptr,
    D_ptr,
    H,
    n_chunks,
    heads_per_group,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    HAS_D: tl.constexpr,
):
    """Two thread blocks per chunk and group of heads, adjacent so that they share loads in the cache.

    They write dx_THP; for dB and dC, dscores_GCQQ (transposed: rows of B, columns of C) and parts_G2TN; for the decays,
    flows_5HT and through_CHP. HAS_D: with the skip, whose weight's gradient is the sum of the last flow.

    The flow from j to i is (dL/dy_i) . (what j's input adds to y_i). flows_5HT: the flow INSIDE the chunk into a token
    less that from it; from BEFORE the chunk; to LATER chunks; the gradient of a token's gain (all its flow over the
    gain); a token's x . dy, from ITSELF to itself. through_CHP: the flow through a chunk, by channel; `_finish` sums
    the channels.
    """
    c, group = tl.program_id(0) // 2, tl.program_id(1)
    first = group * heads_per_group
    end = first + heads_per_group
    if tl.program_id(0) % 2 == 0:
        _gradients_within(
            x_rows, dy_rows, B_rows, C_rows, vectors_ptr, document_ptr, dstates_rows, dx_rows, dscores_rows, flows_ptr,
            D_ptr, c, group, first, end, H, n_chunks, P, N, Q, HAS_D,
        )  # fmt: skip
    else:
        _gradients_across(
            x_rows, dy_rows, C_rows, vectors_ptr, decay_ptr, states_rows, dstates_rows, parts_rows, flows_ptr,
            through_ptr, c, group, first, end, H, n_chunks, P, N, Q,
        )  # fmt: skip


@kernel(do_not_specialize=["T", "H", "n_chunks"], do_not_specialize_on_alignment=["sums_ptr"])
def _finish(
    A_ptr,
    B_rows,
    C_rows,
    vectors_ptr,
    document_ptr,
    dscores_rows,
    parts_rows,
    flows_ptr,
    through_ptr,
    ddt_ptr,
    sums_ptr,
    dB_rows,
    dC_rows,
    T,
    H,
    n_chunks,
    ddt_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
):
    """One thread block per chunk: ddt_TH, dB_TN, dC_TN, and its partial sums of dA, the bias's gradient and D's, one
    after the other in sums_CW.

    The gradient of a token's log decay is the flow across it: from all tokens before it to itself and all after it.
    """
    c = tl.program_id(0)
    padded = n_chunks * Q
    q, h = tl.arange(0, Q), tl.arange(0, BLOCK_H)
    t = c * Q + q
    document_Q = tl.load(document_ptr + t)
    next_document_Q = tl.load(document_ptr + t + 1, mask=q < Q - 1, other=0)
    at_HQ = h[:, None] * padded + t[None, :]
    valid_HQ = (h < H)[:, None] & (t < T)[None, :]
    A_H = tl.load(A_ptr + h, mask=h < H, other=0.0)
    if HAS_BIAS:
        A_H = -tl.exp(A_H)
    through_HP = tl.load(through_ptr + c * H * P + _tile(BLOCK_H, P), mask=(h < H)[:, None], other=0.0)
    through_H = tl.sum(through_HP, 1)
    gain_HQ = tl.load(vectors_ptr + GAIN * H * padded + at_HQ, mask=valid_HQ, other=0.0)
    into_HQ = tl.load(flows_ptr + INSIDE * H * padded + at_HQ, mask=valid_HQ, other=0.0)
    into_HQ += tl.load(flows_ptr + BEFORE * H * padded + at_HQ, mask=valid_HQ, other=0.0)
    later_HQ = tl.load(flows_ptr + LATER * H * padded + at_HQ, mask=valid_HQ, other=0.0)
    dgain_HQ = tl.load(flows_ptr + DGAIN * H * padded + at_HQ, mask=valid_HQ, other=0.0)

    closes_HQ = tl.broadcast_to((document_Q != next_document_Q).to(tl.int32)[None, :], (BLOCK_H, Q))
    dlog_HQ, _ = tl.associative_scan((into_HQ, closes_HQ), 1, _add_in_document, reverse=True)
    dlog_HQ += (
        tl.cumsum(later_HQ, 1) - later_HQ + through_H[:, None]
    )  # only a chunk's last document continues into later chunks
    dA_H = tl.sum(dlog_HQ * gain_HQ, 1)
    ddt_HQ = dgain_HQ + dlog_HQ * A_H[:, None]
    if HAS_BIAS:
        dA_H *= A_H
        ddt_HQ *= _softplus_slope(gain_HQ)
    sums_ptr += c * (1 + HAS_BIAS + HAS_D) * H + h
    tl.store(sums_ptr, dA_H, mask=h < H)
    if HAS_BIAS:
        tl.store(sums_ptr + H, tl.sum(ddt_HQ, 1), mask=h < H)
    if HAS_D:
        itself_HQ = tl.load(flows_ptr + ITSELF * H * padded + at_HQ, mask=valid_HQ, other=0.0)
        tl.store(sums_ptr + (1 + HAS_BIAS) * H, tl.sum(itself_HQ, 1), mask=h < H)
    ddt_QH = tl.trans(ddt_HQ).to(ddt_ptr.dtype.element_ty)
    at_QH = t.to(tl.int64)[:, None] * ddt_stride + h[None, :]
    tl.store(ddt_ptr + at_QH, ddt_QH, mask=(t < T)[:, None] & (h < H)[None, :])

    dscores_QQ = load_tile(dscores_rows, c * Q, 0, Q, Q).to(tl.float32)
    dB_QN = load_tile(parts_rows, c * Q, 0, Q, N).to(tl.float32)
    dC_QN = load_tile(parts_rows, padded + c * Q, 0, Q, N).to(tl.float32)
    for g in range(1, GROUPS):
        dscores_QQ += load_tile(dscores_rows, g * padded + c * Q, 0, Q, Q)
        dB_QN += load_tile(parts_rows, 2 * g * padded + c * Q, 0, Q, N)
        dC_QN += load_tile(parts_rows, (2 * g + 1) * padded + c * Q, 0, Q, N)
    B_QN, C_QN = load_tile(B_rows, c * Q, 0, Q, N), load_tile(C_rows, c * Q, 0, Q, N)
    dscores_QQ = dscores_QQ.to(B_QN.dtype)
    dB_QN = tl.dot(dscores_QQ, C_QN, dB_QN, input_precision="ieee")
    dC_QN = tl.dot(tl.trans(dscores_QQ), B_QN, dC_QN, input_precision="ieee")
    store_tile(dB_rows, c * Q, 0, dB_QN.to(B_QN.dtype))
    store_tile(dC_rows, c * Q, 0, dC_QN.to(B_QN.dtype))


def _launch_for_heads(options: Options, dtype: torch.dtype, H: int) -> dict[str, int | None]:
    """The launch options of a kernel whose thread block has all heads of a chunk.

    With 33 to 64 heads two blocks per SM must be requested: it saves 19 of 58 us per layer with 48 heads. With fewer
    heads it is slower; more would not fit (benchmarks/results/h200-2026-11-28-3/scan_ways.txt).
    """
    registers = 128 if 32 < H <= 64 and dtype == torch.bfloat16 else options.registers
    return launch(options) | {"BLOCK_H": next_power_of_2(H), "maxnreg": registers}


def _dense(x: Tensor) -> Tensor:
    """x, or a copy of it if its rows are not dense or not aligned as a descriptor needs them."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    is_dense = aligned and row_width(x.shape[1:], x.stride()[1:]) is not None
    return x if is_dense else x.clone(memory_format=torch.contiguous_format)


def _tiled(x: Tensor, rows: int, columns: int) -> Rows:
    """A (T, ...) tensor as a matrix (T, W) that kernels read and write in tiles of (rows, columns)."""
    return rows_of(_dense(x), rows, columns)


class SavedScan(NamedTuple):
    """The tensors that a forward saves: C chunks of Q tokens, S segments; Tc = C Q. All but the states are float32."""

    vectors_5HT: Tensor  # (5, H, Tc), as decay_CH, and document_T (Tc,) of int32: see `_prepare`
    decay_CH: Tensor
    document_T: Tensor
    segment_decay_SH: Tensor  # see `_totals`
    states_CHPN: Tensor  # (C * H * P, N), in x's dtype: the state before each chunk


class _Plan:
    """Sizes and descriptors that forward and backward share."""

    def __init__(self, x_THP: Tensor, B_TN: Tensor, C_TN: Tensor):
        (self.T, self.H, self.P), self.N = x_THP.shape, B_TN.shape[1]
        self.options = launch_options.scan(x_THP.device, x_THP.dtype)
        self.Q = self.options.tokens
        self.dtype = x_THP.dtype
        self.n_chunks = cdiv(self.T, self.Q)
        # two thread blocks, with one segment each, fit on an SM
        self.chunks_per_segment = cdiv(self.n_chunks * self.H, 2 * cards.properties(x_THP.device).sms)
        self.segments = cdiv(self.n_chunks, self.chunks_per_segment)
        self.B, self.C = (_tiled(t, self.Q, self.N) for t in (B_TN, C_TN))
        self.sizes = self.H, self.n_chunks, self.chunks_per_segment
        self.shape = {"P": self.P, "N": self.N, "Q": self.Q}

    def empty(self, A_H: Tensor, with_states: bool) -> SavedScan:
        """Memory for a `SavedScan`; for the states only if `with_states`."""
        rows = self.n_chunks * self.Q
        return SavedScan(
            saved_empty(A_H, 5, self.H, rows),
            saved_empty(A_H, self.n_chunks, self.H),
            saved_empty(A_H, rows, dtype=torch.int32),
            saved_empty(A_H, self.segments, self.H),
            saved_empty(A_H, self.n_chunks * self.H * self.P if with_states else 0, self.N, dtype=self.dtype),
        )

    def prepare(
        self,
        saved: SavedScan,
        dt_TH: Tensor,
        bias_H: Tensor | None,
        A_H: Tensor,
        cu_seqlens: Tensor,
        scores_CQQ: Tensor | None,
    ) -> None:
        dt_TH = dt_TH if dt_TH.stride(1) == 1 else dt_TH.contiguous()
        _prepare[(self.n_chunks,)](
            dt_TH, bias_H, A_H.contiguous(), self.B, self.C, cu_seqlens.contiguous(),
            saved.vectors_5HT, saved.decay_CH, saved.document_T, scores_CQQ,
            self.T, self.H, len(cu_seqlens) - 1, dt_TH.stride(0),
            N=self.N, Q=self.Q, HAS_BIAS=bias_H is not None, WITH_SCORES=scores_CQQ is not None,
            **_launch_for_heads(self.options.prepare, self.dtype, self.H),
        )  # fmt: skip

    def totals(self, values_THP: Tensor, keys: Rows, saved: SavedScan, reverse: bool) -> Tensor:
        """totals_SHPN; without `reverse` also writes saved.segment_decay_SH."""
        totals_SHPN = saved.decay_CH.new_empty(self.segments, self.H, self.P, self.N)
        _totals[(self.segments * self.H,)](
            _tiled(values_THP, self.Q, self.P), keys, saved.vectors_5HT, saved.decay_CH, totals_SHPN,
            saved.segment_decay_SH, *self.sizes, **self.shape, REVERSE=reverse, **launch(self.options.totals),
        )  # fmt: skip
        return totals_SHPN

    def states(self, values_THP: Tensor, keys: Rows, saved: SavedScan, states_CHPN: Tensor, reverse: bool) -> None:
        totals_SHPN = self.totals(values_THP, keys, saved, reverse)
        _states[(self.segments * self.H,)](
            _tiled(values_THP, self.Q, self.P), keys, saved.vectors_5HT, saved.decay_CH, totals_SHPN,
            saved.segment_decay_SH, _tiled(states_CHPN, self.P, self.N), *self.sizes,
            **self.shape, REVERSE=reverse, **launch(self.options.states),
        )  # fmt: skip


def scan_forward(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    cu_seqlens: Tensor,
    D_H: Tensor | None = None,
    save: bool = False,
    bias_H: Tensor | None = None,
) -> tuple[Tensor, SavedScan | None]:
    """y_THP of `hnet::ssd`, plus D x where D_H is given. x, B, C: bfloat16 or float32; the others: float32.

    bias_H: if given, Mamba-2's weights are used: softplus(dt + bias) for dt, which may have any dtype, and -exp(A) for
    A. `save`: also returns what `scan_backward` can use, among it the states; None without tokens.
    """
    y_THP = saved_empty(x_THP, *x_THP.shape)
    if not len(x_THP):
        return y_THP, None
    plan = _Plan(x_THP, B_TN, C_TN)
    with save_if(save):
        saved = plan.empty(A_H, with_states=save)
    scores_CQQ = B_TN.new_empty(plan.n_chunks * plan.Q, plan.Q)
    with on_device_of(x_THP):
        plan.prepare(saved, dt_TH, bias_H, A_H, cu_seqlens, scores_CQQ)
        totals_SHPN = plan.totals(x_THP, plan.B, saved, reverse=False)
        x, y = (_tiled(t, plan.Q, plan.P) for t in (x_THP, y_THP))
        scores = _tiled(scores_CQQ, plan.Q, plan.Q)
        _outputs[(plan.segments * plan.H,)](
            x, plan.B, plan.C, saved.vectors_5HT, saved.decay_CH, scores, totals_SHPN, saved.segment_decay_SH,
            D_H, y, saved.states_CHPN if save else None, *plan.sizes,
            **plan.shape, HAS_D=D_H is not None, SAVE_STATES=save, **launch(plan.options.outputs),
        )  # fmt: skip
    return y_THP, saved if save else None


class Gradients(NamedTuple):
    """Of `scan_forward`'s inputs; None for an input that was not given or whose gradient went to a slot."""

    dx_THP: Tensor
    ddt_TH: Tensor
    dA_H: Tensor | None
    dB_TN: Tensor
    dC_TN: Tensor
    dD_H: Tensor | None = None
    dbias_H: Tensor | None = None


def can_write(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can write to these tensors, whose rows may be parts of longer rows."""
    return all(_dense(t) is t for t in tensors)


def scan_backward(
    dy_THP: Tensor,
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    cu_seqlens: Tensor,
    D_H: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    saved: SavedScan | None = None,
    bias_H: Tensor | None = None,
    dweights: Slot | None = None,
) -> Gradients:
    """Gradients of `scan_forward`.

    `out`: where to write dx, dB, dC (see `can_write`) and ddt. `saved`: from the forward of the same inputs; without it
    decays and states are recomputed to the same bits. `dweights`: the slot for the gradients of A, bias and D, which
    are then not returned.
    """
    dx_THP, dB_TN, dC_TN, ddt_TH = out or tuple(t.new_empty(t.shape) for t in (x_THP, B_TN, C_TN, dt_TH))
    assert ddt_TH.stride(1) == 1
    of_heads = {"dA_H": A_H, "dbias_H": bias_H, "dD_H": D_H}  # in this order below
    of_heads = {name: x for name, x in of_heads.items() if x is not None}
    if not len(x_THP):
        if dweights is not None:
            dweights.rows(0, sum_rows)
        none = {name: torch.zeros_like(x) for name, x in of_heads.items()}
        return Gradients(dx_THP, ddt_TH, dB_TN=dB_TN, dC_TN=dC_TN, **none)
    plan, recompute = _Plan(x_THP, B_TN, C_TN), saved is None
    H, P, N, Q, n_chunks = plan.H, plan.P, plan.N, plan.Q, plan.n_chunks
    groups = _groups(n_chunks, H, x_THP.device)
    saved = plan.empty(A_H, with_states=True) if recompute else saved
    dstates_CHPN = x_THP.new_empty(saved.states_CHPN.shape)
    states, dstates = (_tiled(x, P, N) for x in (saved.states_CHPN, dstates_CHPN))
    dscores_GCQQ = _tiled(x_THP.new_empty(groups * n_chunks * Q, Q), Q, Q)
    parts_G2TN = _tiled(x_THP.new_empty(groups * 2 * n_chunks * Q, N), Q, N)
    flows_5HT = A_H.new_empty(5, H, n_chunks * Q)
    # Zeros, because a kernel writes them: descriptors need the context that a thread's first launch binds, and the
    # thread on which autograd runs a backward may have launched nothing ("invalid device context" with Triton 3.6; with
    # other kernels: github.com/pytorch/pytorch/issues/124565). To be removed when Triton binds the context itself. A
    # caller with a slot writes its own backward, in which matrix products come first.
    sums_CW = A_H.new_zeros(n_chunks, len(of_heads) * H) if dweights is None else dweights.rows(n_chunks, sum_rows)
    through_CHP = A_H.new_empty(n_chunks, H, P)
    with on_device_of(x_THP):
        if recompute:
            plan.prepare(saved, dt_TH, bias_H, A_H, cu_seqlens, scores_CQQ=None)
            plan.states(x_THP, plan.B, saved, saved.states_CHPN, reverse=False)
        plan.states(dy_THP, plan.C, saved, dstates_CHPN, reverse=True)
        _gradients[(2 * n_chunks, groups)](
            *(_tiled(t, Q, P) for t in (x_THP, dy_THP)), plan.B, plan.C,
            saved.vectors_5HT, saved.decay_CH, saved.document_T, states, dstates,
            _tiled(dx_THP, Q, P), dscores_GCQQ, parts_G2TN, flows_5HT, through_CHP, D_H, H, n_chunks, H // groups,
            **plan.shape, HAS_D=D_H is not None, **launch(plan.options.gradients),
        )  # fmt: skip
        _finish[(n_chunks,)](
            A_H.contiguous(), plan.B, plan.C, saved.vectors_5HT, saved.document_T, dscores_GCQQ, parts_G2TN,
            flows_5HT, through_CHP, ddt_TH, sums_CW, *(_tiled(t, Q, N) for t in (dB_TN, dC_TN)),
            plan.T, H, n_chunks, ddt_TH.stride(0), **plan.shape, GROUPS=groups, HAS_BIAS=bias_H is not None,
            HAS_D=D_H is not None, **_launch_for_heads(plan.options.finish, x_THP.dtype, H),
        )  # fmt: skip
        sums_nH = sum_rows(sums_CW[None], A_H.dtype).view(-1, H) if dweights is None else [None] * len(of_heads)
        return Gradients(dx_THP, ddt_TH, dB_TN=dB_TN, dC_TN=dC_TN, **dict(zip(of_heads, sums_nH)))


def _groups(n_chunks: int, H: int, device: torch.device) -> int:
    """The number of groups of heads in `_gradients` that takes the least time, measured in the time of a head.

    Two thread blocks per SM run at once. Besides its heads each writes sums, which take about as long as one head.
    """
    rounds = {g: cdiv(2 * n_chunks * g, 2 * cards.properties(device).sms) for g in range(1, H + 1) if H % g == 0}
    return min(rounds, key=lambda g: rounds[g] * (H // g + 1))
