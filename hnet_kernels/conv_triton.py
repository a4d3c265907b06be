"""Triton kernels for `hnet::causal_conv_silu` and its gradient. The definition is in conv.py.

Legend: T tokens, D channels, K <= 4 taps, S runs of tokens.

Both are bound by memory: the forward reads x and writes y, the backward reads x and dy and writes dx. A thread block
walks along a run of tokens with a row of channels. It holds the last three rows of x in registers, so each element is
read once. With u = bias + the convolution and du = dy silu'(u),

    dx_t = sum_k weight[K - 1 - k] du_{t + k}    over the tokens of t's document

so the backward walks three tokens further and stores each dx when its last term is known. The partial sums for the
weights and the bias stay in registers and are reduced over the runs at the end. There are no atomics: the same bits
every time on one kind of GPU, whose number of SMs decides the length of the backward's runs.

Tokens are taken in groups of AHEAD. All rows of the next group are loaded before the current group is computed. A load
between the stores of a group would wait for them, because the compiler does not know that they write elsewhere. A group
that is far enough from the start of its document needs no taps cut off; other groups take the slower path (CUT).

The number of instructions is kept small. D and the strides are constants, so that the rows of a group are at constant
distances. Two bfloat16 are loaded as one int32 (PAIRS) and separated by a shift and a mask. Weights and bias are scaled
by C = -log2(e), so that with v = C u and s = sigmoid(u) / C

    silu(u) = v s,    silu'(u) = C s (1 + v (1 / C - s)),    s = 1 / (C + C 2^v)

and the weights' C cancels that of du / C in dx.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels import cards
from hnet_kernels.gradients import Slot
from hnet_kernels.launch import cdiv, dense_rows, kernel, on_device_of
from hnet_kernels.norm_triton import sum_rows
from hnet_kernels.saved import saved_empty

FORWARD = (32, 128, 1)  # tokens per thread block (a multiple of a turn's), its channels, its warps
BACKWARD = (16, 128, 1)  # blocks per SM, channels and warps of a block; all run at once, see `_run`
AHEAD = tl.constexpr(4)  # tokens of a group, at least 3
UNROLL = tl.constexpr(2)  # groups per turn of the loop: values passed between them stay in their registers
C, C_INVERSE = tl.constexpr(-1.4426950408889634), tl.constexpr(-0.6931471805599453)
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _scaled_sigmoid(v):
    """sigmoid(v / C) / C; zero where the sigmoid is below float32's normal range."""
    e = tl.exp2(v) * C + C
    if _COMPILED:
        s = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [e], dtype=tl.float32, is_pure=True, pack=1)
    else:
        s = 1 / e
    return s


@triton.jit
def _tap(weight_ptr, k: tl.constexpr, d, in_D, K: tl.constexpr):
    """C times the weights of tap k (k tokens before); zero where there are fewer taps."""
    return tl.load(weight_ptr + d * K + (K - 1 - k), mask=in_D & (k < K), other=0.0).to(tl.float32) * C


@triton.jit
def _bias_and_taps(weight_ptr, bias_ptr, d, in_D, K: tl.constexpr):
    return (
        tl.load(bias_ptr + d, mask=in_D, other=0.0).to(tl.float32) * C,
        _tap(weight_ptr, 0, d, in_D, K),
        _tap(weight_ptr, 1, d, in_D, K),
        _tap(weight_ptr, 2, d, in_D, K),
        _tap(weight_ptr, 3, d, in_D, K),
    )


@triton.jit
def _words(x_ptr, PAIRS: tl.constexpr):
    """The pointer from which rows are loaded. With PAIRS a word has two channels, else one."""
    return x_ptr.to(tl.pointer_type(tl.int32)) if PAIRS else x_ptr


@triton.jit
def _wide(row, PAIRS: tl.constexpr):
    """A row's channels in float32. PAIRS: a word has two bfloat16 channels."""
    if PAIRS:
        x = tl.interleave((row << 16).to(tl.float32, bitcast=True), (row & -65536).to(tl.float32, bitcast=True))
    else:
        x = row.to(tl.float32)
    return x


@triton.jit
def _rows(x_at, inside, there, STRIDE: tl.constexpr, EVEN: tl.constexpr):
    """AHEAD rows, where `there`. EVEN: all channels are inside."""
    rows = ()
    for j in tl.static_range(AHEAD):
        rows = rows + (tl.load(x_at + j * STRIDE, mask=there if EVEN else inside & there, other=0),)
    return rows


@triton.jit
def _rows_left(x_at, inside, left, STRIDE: tl.constexpr):
    """AHEAD rows; zeros after the `left` rows that exist."""
    rows = ()
    for j in tl.static_range(AHEAD):
        rows = rows + (tl.load(x_at + j * STRIDE, mask=inside & (j < left), other=0),)
    return rows


@triton.jit
def _rows_before(x_at, inside, t, STRIDE: tl.constexpr, PAIRS: tl.constexpr):
    """The three rows before t, the nearest first; zeros before the first token."""
    return (
        _wide(tl.load(x_at - STRIDE, mask=inside & (t >= 1), other=0), PAIRS),
        _wide(tl.load(x_at - 2 * STRIDE, mask=inside & (t >= 2), other=0), PAIRS),
        _wide(tl.load(x_at - 3 * STRIDE, mask=inside & (t >= 3), other=0), PAIRS),
    )


@triton.jit
def _within(position_at, left, GROUP: tl.constexpr):
    """Whether all taps of a group's tokens are in their document, and the group has no more tokens than are left.

    GROUP: 0 for the group at `position_at`, 1 for the next.
    """
    last: tl.constexpr = (GROUP + 1) * AHEAD - 1
    return tl.load(position_at + last, mask=last < left, other=0) >= AHEAD + 2


@triton.jit
def _cut(x, position, k: tl.constexpr, CUT: tl.constexpr):
    """x; CUT: zero where the token k tokens before is in another document."""
    return tl.where(position >= k, x, 0.0) if CUT else x


@triton.jit
def _put(at, x, inside, MASK: tl.constexpr):
    if MASK:
        tl.store(at, x.to(at.dtype.element_ty), mask=inside)
    else:
        tl.store(at, x.to(at.dtype.element_ty))


@triton.jit
def _forward_steps(
    rows, position_at, y_at, left, in_D, taps, last,
    D: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Computes a group of AHEAD tokens and returns the last three rows of x."""
    bias, w0, w1, w2, w3 = taps
    x1, x2, x3 = last
    for j in tl.static_range(AHEAD):
        x = _wide(rows[j], PAIRS)
        position = tl.load(position_at + j, mask=j < left, other=0) if CUT else 0
        v = bias + w0 * x + w1 * _cut(x1, position, 1, CUT)
        v += w2 * _cut(x2, position, 2, CUT)
        v += w3 * _cut(x3, position, 3, CUT)
        inside = in_D & (j < left) if CUT else in_D
        _put(y_at + j * D, v * _scaled_sigmoid(v), inside, CUT or not EVEN)
        x1, x2, x3 = x, x1, x2
    return x1, x2, x3


@kernel(do_not_specialize=["T"])
def _forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    y_ptr,
    T,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    EVEN: tl.constexpr = D % BLOCK_D == 0
    WORD: tl.constexpr = 2 if PAIRS else 1
    STRIDE: tl.constexpr = X_STRIDE // WORD
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    word = tl.program_id(0) * (BLOCK_D // WORD) + tl.arange(0, BLOCK_D // WORD)
    in_D, inside = d < D, word < D // WORD
    first = tl.program_id(1).to(tl.int64) * RUN
    left = tl.minimum(T - first, RUN).to(tl.int32)
    position_at = position_ptr + first
    x_at = _words(x_ptr, PAIRS) + first * STRIDE + word
    y_at = y_ptr + first * D + d
    rows = _rows_left(x_at, inside, left, STRIDE)
    last = _rows_before(x_at, inside, first, STRIDE, PAIRS)
    within = _within(position_at, left, 0)
    taps = _bias_and_taps(weight_ptr, bias_ptr, d, in_D, K)
    for _ in range(0, RUN, UNROLL * AHEAD):
        for _ in tl.static_range(UNROLL):
            # an incomplete next group loads its own rows; a load right before its use would stall
            next_rows = _rows(x_at + AHEAD * STRIDE, inside, left >= 2 * AHEAD, STRIDE, EVEN)
            next_within = _within(position_at, left, 1)
            if within:
                last = _forward_steps(rows, position_at, y_at, left, in_D, taps, last, D, PAIRS, EVEN, False)
            else:
                rows = _rows_left(x_at, inside, left, STRIDE)
                last = _forward_steps(rows, position_at, y_at, left, in_D, taps, last, D, PAIRS, EVEN, True)
            rows, within = next_rows, next_within
            x_at += AHEAD * STRIDE
            y_at += AHEAD * D
            position_at += AHEAD
            left -= AHEAD


@triton.jit
def _backward_steps(
    rows, dy_rows, position_at, dx_at, left, inner, in_D, taps, last, dxs, sums,
    DX_STRIDE: tl.constexpr, PAIRS: tl.constexpr, EVEN: tl.constexpr, CUT: tl.constexpr, OURS: tl.constexpr,
):  # fmt: skip
    """Computes a group of AHEAD tokens. inner: it is not the run's first. OURS: its tokens belong to the run; else they
    are the three tokens after it, which count in the sums of the next run."""
    bias, w0, w1, w2, w3 = taps
    x1, x2, x3 = last
    dx1, dx2, dx3 = dxs
    sum_bias, sum0, sum1, sum2, sum3 = sums
    for j in tl.static_range(AHEAD if OURS else 3):
        x, dy = _wide(rows[j], PAIRS), _wide(dy_rows[j], PAIRS)
        position = tl.load(position_at + j, mask=j < left, other=0) if CUT else 0
        seen1, seen2, seen3 = _cut(x1, position, 1, CUT), _cut(x2, position, 2, CUT), _cut(x3, position, 3, CUT)
        v = bias + w0 * x + w1 * seen1
        v += w2 * seen2
        v += w3 * seen3
        s = _scaled_sigmoid(v)
        du = dy * s * (1 - v * (s - C_INVERSE))  # / C
        dx3 += _cut(w3, position, 3, CUT) * du
        inside = in_D & inner if j < 3 else in_D
        if CUT:
            inside &= j - 3 < left
        _put(dx_at + (j - 3) * DX_STRIDE, dx3, inside, CUT or not EVEN or j < 3)
        dx3 = dx2 + _cut(w2, position, 2, CUT) * du
        dx2 = dx1 + _cut(w1, position, 1, CUT) * du
        dx1 = w0 * du
        if OURS:
            sum_bias += du
            sum0 += du * x
            sum1 += du * seen1
            sum2 += du * seen2
            sum3 += du * seen3
        x1, x2, x3 = x, x1, x2
    return (x1, x2, x3), (dx1, dx2, dx3), (sum_bias, sum0, sum1, sum2, sum3)


@kernel(do_not_specialize=["T", "run"])
def _backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    dx_ptr,
    sums_ptr,
    T,
    run,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    DY_STRIDE: tl.constexpr,
    DX_STRIDE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """dx_TD, and the partial sums of a run for the weight and the bias: sums_SKD, with the bias as tap K."""
    EVEN: tl.constexpr = D % BLOCK_D == 0
    WORD: tl.constexpr = 2 if PAIRS else 1
    STRIDE: tl.constexpr = X_STRIDE // WORD
    DY: tl.constexpr = DY_STRIDE // WORD
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    word = tl.program_id(0) * (BLOCK_D // WORD) + tl.arange(0, BLOCK_D // WORD)
    in_D, inside = d < D, word < D // WORD
    first = tl.program_id(1).to(tl.int64) * run
    left = tl.minimum(T - first, run + AHEAD).to(tl.int32)
    position_at = position_ptr + first
    x_at = _words(x_ptr, PAIRS) + first * STRIDE + word
    dy_at = _words(dy_ptr, PAIRS) + first * DY + word
    dx_at = dx_ptr + first * DX_STRIDE + d
    rows, dy_rows = _rows_left(x_at, inside, left, STRIDE), _rows_left(dy_at, inside, left, DY)
    last = _rows_before(x_at, inside, first, STRIDE, PAIRS)
    within = _within(position_at, left, 0)
    taps = _bias_and_taps(weight_ptr, bias_ptr, d, in_D, K)
    zero = tl.zeros((BLOCK_D,), tl.float32)
    dxs = zero, zero, zero  # of the last three tokens, not yet complete
    sums = zero, zero, zero, zero, zero
    for i in range(0, run, UNROLL * AHEAD):
        for group in tl.static_range(UNROLL):
            whole = left >= 2 * AHEAD  # the next group is full; as in the forward
            next_rows = _rows(x_at + AHEAD * STRIDE, inside, whole, STRIDE, EVEN)
            next_dy_rows = _rows(dy_at + AHEAD * DY, inside, whole, DY, EVEN)
            next_within = _within(position_at, left, 1)
            inner = i + group > 0
            if within:
                last, dxs, sums = _backward_steps(
                    rows, dy_rows, position_at, dx_at, left, inner, in_D, taps, last, dxs, sums,
                    DX_STRIDE, PAIRS, EVEN, False, True,
                )  # fmt: skip
            else:
                rows, dy_rows = _rows_left(x_at, inside, left, STRIDE), _rows_left(dy_at, inside, left, DY)
                last, dxs, sums = _backward_steps(
                    rows, dy_rows, position_at, dx_at, left, inner, in_D, taps, last, dxs, sums,
                    DX_STRIDE, PAIRS, EVEN, True, True,
                )  # fmt: skip
            rows, dy_rows, within = next_rows, next_dy_rows, next_within
            x_at += AHEAD * STRIDE
            dy_at += AHEAD * DY
            dx_at += AHEAD * DX_STRIDE
            position_at += AHEAD
            left -= AHEAD
    dx_at = dx_ptr + (first + run) * DX_STRIDE + d  # computed anew: values that leave a loop have lost their layout
    if within:
        _backward_steps(
            rows, dy_rows, position_at, dx_at, left, True, in_D, taps, last, dxs, sums,
            DX_STRIDE, PAIRS, EVEN, False, False,
        )  # fmt: skip
    else:
        x_at = _words(x_ptr, PAIRS) + (first + run) * STRIDE + word
        dy_at = _words(dy_ptr, PAIRS) + (first + run) * DY + word
        rows, dy_rows = _rows_left(x_at, inside, left, STRIDE), _rows_left(dy_at, inside, left, DY)
        _backward_steps(
            rows, dy_rows, position_at, dx_at, left, True, in_D, taps, last, dxs, sums,
            DX_STRIDE, PAIRS, EVEN, True, False,
        )  # fmt: skip
    row = sums_ptr + tl.program_id(1).to(tl.int64) * (K + 1) * D + d
    tl.store(row + K * D, sums[0] * C, mask=in_D)
    tl.store(row + (K - 1) * D, sums[1] * C, mask=in_D)
    tl.store(row + (K - 2) * D, sums[2] * C, mask=in_D & (K > 1))
    tl.store(row + (K - 3) * D, sums[3] * C, mask=in_D & (K > 2))
    tl.store(row + (K - 4) * D, sums[4] * C, mask=in_D & (K > 3))


def _in_pairs(*tensors: Tensor) -> bool:
    """Whether all rows of these can be read as pairs of bfloat16."""
    return all(
        x.dtype == torch.bfloat16 and x.shape[1] % 2 == x.stride(0) % 2 == x.data_ptr() % 4 == 0 for x in tensors
    )


def _run(T: int, D: int, device: torch.device) -> int:
    """Tokens per thread block in the backward, chosen so that all blocks run at once.

    A second round would leave much of the GPU idle. Shorter runs would reread more tokens at their edges.
    """
    blocks_per_sm, channels, _ = BACKWARD
    runs = max(1, blocks_per_sm * cards.properties(device).sms // cdiv(D, channels))
    turn = UNROLL.value * AHEAD.value
    return max(4 * turn, cdiv(cdiv(T, runs), turn) * turn)


def conv_silu_forward(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor) -> Tensor:
    """y_TD of `hnet::causal_conv_silu`."""
    (T, D), K = x_TD.shape, weight_D1K.shape[-1]
    y_TD = saved_empty(x_TD, T, D)
    if not T:
        return y_TD
    x_TD = dense_rows(x_TD)
    run, channels, warps = FORWARD
    with on_device_of(x_TD):
        _forward[(cdiv(D, channels), cdiv(T, run))](
            x_TD, weight_D1K.contiguous(), bias_D.contiguous(), position_T.contiguous(), y_TD, T,
            D=D, X_STRIDE=x_TD.stride(0), K=K, RUN=run, BLOCK_D=channels, PAIRS=_in_pairs(x_TD),
            num_warps=warps,
        )  # fmt: skip
    return y_TD


def conv_silu_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weight_D1K: Tensor,
    bias_D: Tensor,
    position_T: Tensor,
    dweights: Slot,
    out_TD: Tensor | None = None,
) -> Tensor:
    """dx_TD of `hnet::causal_conv_silu`; fills the slot of the gradients of weight and bias.

    out_TD: where dx_TD is written, with dense rows.
    """
    (T, D), K = x_TD.shape, weight_D1K.shape[-1]
    dx_TD = x_TD.new_empty(T, D) if out_TD is None else out_TD
    blocks_per_sm, channels, warps = BACKWARD
    run, registers = _run(T, D, x_TD.device), min(255, 2**16 // (32 * warps * blocks_per_sm))
    runs = cdiv(T, run)
    sums_SKD = dweights.rows(runs, functools.partial(sum_rows, turned=(K, D)))
    if not T:
        return dx_TD
    x_TD, dy_TD = dense_rows(x_TD), dense_rows(dy_TD)
    with on_device_of(x_TD):
        _backward[(cdiv(D, channels), runs)](
            dy_TD, x_TD, weight_D1K.contiguous(), bias_D.contiguous(), position_T.contiguous(), dx_TD, sums_SKD, T,
            run, D=D, X_STRIDE=x_TD.stride(0), DY_STRIDE=dy_TD.stride(0), DX_STRIDE=dx_TD.stride(0), K=K,
            BLOCK_D=channels, PAIRS=_in_pairs(x_TD, dy_TD), num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    return dx_TD
