"""Triton kernels for `hnet::causal_conv_silu` and its gradient. The definition is in conv.py.

Legend: T tokens, D channels, K <= 4 taps, S runs of tokens.

Both are bound by memory: forward reads x and writes y, backward reads x and dy and writes dx. A program walks along a
run of tokens with a row of channels, the last three rows of x in registers, so that it reads each element once. With
u = bias + the convolution and du = dy silu'(u),

    dx_t = sum_k weight[K - 1 - k] du_{t + k}    over the tokens of t's document

so backward walks three tokens further, and hands each dx on when its last term has come. Sums for the weights and the
bias stay in registers and are added up over the runs at the end: no atomics, the same bits every time. Rows are loaded
AHEAD tokens before they are used: with few warps on a multiprocessor that keeps enough bytes under way. Loops are
unrolled by as many tokens, so that what each hands on to the next need not be moved from register to register, and so
many tokens at a time are either all so far from the start of their document that no tap need be cut off, or not.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hnet_kernels.kept import kept_empty
from hnet_kernels.norm_triton import sum_rows
from hnet_kernels.sums import Slot
from hnet_kernels.triton_math import sigmoid

FORWARD, BACKWARD = (32, 128, 1), (64, 128, 1)  # a program's tokens, a multiple of AHEAD, and channels; warps
AHEAD = tl.constexpr(4)


@triton.jit
def _tap(weight_ptr, k: tl.constexpr, d, in_D, K: tl.constexpr):
    """The weights of what is k tokens before; zero where there are fewer taps."""
    return tl.load(weight_ptr + d * K + (K - 1 - k), mask=in_D & (k < K), other=0.0).to(tl.float32)


@triton.jit
def _row(x_ptr, t, d, in_D, T, stride):
    return tl.load(x_ptr + t * stride + d, mask=in_D & (t < T), other=0.0)


@triton.jit
def _rows_before(x_ptr, t, d, in_D, stride):
    """The three rows before t, the last first; zeros before the first token."""
    return (
        tl.load(x_ptr + (t - 1) * stride + d, mask=in_D & (t >= 1), other=0.0).to(tl.float32),
        tl.load(x_ptr + (t - 2) * stride + d, mask=in_D & (t >= 2), other=0.0).to(tl.float32),
        tl.load(x_ptr + (t - 3) * stride + d, mask=in_D & (t >= 3), other=0.0).to(tl.float32),
    )


@triton.jit
def _first_rows(x_ptr, t, d, in_D, T, stride):
    return (
        _row(x_ptr, t, d, in_D, T, stride),
        _row(x_ptr, t + 1, d, in_D, T, stride),
        _row(x_ptr, t + 2, d, in_D, T, stride),
        _row(x_ptr, t + 3, d, in_D, T, stride),
    )


@triton.jit
def _within(position_ptr, t, T):
    """Whether all taps of AHEAD tokens from t on lie in the same document, and the tokens in the batch."""
    last = t + AHEAD - 1
    return tl.load(position_ptr + last, mask=last < T, other=0) >= AHEAD + 2


@triton.jit
def _cut(x, position, k: tl.constexpr, CUT: tl.constexpr):
    """x; CUT: zero where what lies k tokens before is in another document."""
    return tl.where(position >= k, x, 0.0) if CUT else x


@triton.jit
def _forward_steps(
    x_ptr, position_ptr, y_ptr, t, d, in_D, T, D, x_stride, bias, w0, w1, w2, w3, x1, x2, x3, row0, row1, row2, row3,
    CUT: tl.constexpr,
):  # fmt: skip
    """AHEAD tokens from t on; returns the last three rows of x, and those that are loaded ahead."""
    for j in tl.static_range(AHEAD):
        x = row0.to(tl.float32)
        row0, row1, row2, row3 = row1, row2, row3, _row(x_ptr, t + j + AHEAD, d, in_D, T, x_stride)
        position = tl.load(position_ptr + t + j, mask=t + j < T, other=0) if CUT else 0
        u = bias + w0 * x + w1 * _cut(x1, position, 1, CUT)
        u += w2 * _cut(x2, position, 2, CUT)
        u += w3 * _cut(x3, position, 3, CUT)
        inside = in_D & (t + j < T) if CUT else in_D
        tl.store(y_ptr + (t + j) * D + d, (u * sigmoid(u)).to(y_ptr.dtype.element_ty), mask=inside)
        x1, x2, x3 = x, x1, x2
    return x1, x2, x3, row0, row1, row2, row3


@triton.jit(do_not_specialize=["T"])
def _forward(
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    y_ptr,
    T,
    D,
    x_stride,
    K: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d < D
    first = tl.program_id(1).to(tl.int64) * RUN
    bias = tl.load(bias_ptr + d, mask=in_D, other=0.0).to(tl.float32)
    w0, w1, w2, w3 = (
        _tap(weight_ptr, 0, d, in_D, K),
        _tap(weight_ptr, 1, d, in_D, K),
        _tap(weight_ptr, 2, d, in_D, K),
        _tap(weight_ptr, 3, d, in_D, K),
    )
    x1, x2, x3 = _rows_before(x_ptr, first, d, in_D, x_stride)
    row0, row1, row2, row3 = _first_rows(x_ptr, first, d, in_D, T, x_stride)
    within = _within(position_ptr, first, T)
    for i in range(0, RUN, AHEAD):
        t = first + i
        next_within = _within(position_ptr, t + AHEAD, T)  # what is loaded where it is used holds everything up
        if within:
            x1, x2, x3, row0, row1, row2, row3 = _forward_steps(
                x_ptr, position_ptr, y_ptr, t, d, in_D, T, D, x_stride, bias, w0, w1, w2, w3,
                x1, x2, x3, row0, row1, row2, row3, False,
            )  # fmt: skip
        else:
            x1, x2, x3, row0, row1, row2, row3 = _forward_steps(
                x_ptr, position_ptr, y_ptr, t, d, in_D, T, D, x_stride, bias, w0, w1, w2, w3,
                x1, x2, x3, row0, row1, row2, row3, True,
            )  # fmt: skip
        within = next_within


@triton.jit
def _du(dy, bias, w0, w1, w2, w3, x, x1, x2, x3):
    u = bias + w0 * x + w1 * x1
    u += w2 * x2
    u += w3 * x3
    s = sigmoid(u)
    return dy * (s * (1 + u * (1 - s)))


@triton.jit
def _backward_steps(
    dy_ptr, x_ptr, position_ptr, dx_ptr, i, first, d, in_D, T, x_stride, dy_stride, dx_stride,
    bias, w0, w1, w2, w3, x1, x2, x3, row0, row1, row2, row3, dy0, dy1, dy2, dy3, dx1, dx2, dx3,
    sum_bias, sum0, sum1, sum2, sum3, CUT: tl.constexpr, OURS: tl.constexpr,
):  # fmt: skip
    """AHEAD tokens from the run's i-th on. OURS: they are the run's, else the next run counts them in its sums."""
    t = first + i
    for j in tl.static_range(AHEAD):
        x, dy = row0.to(tl.float32), dy0.to(tl.float32)
        row0, row1, row2, row3 = row1, row2, row3, _row(x_ptr, t + j + AHEAD, d, in_D, T, x_stride)
        dy0, dy1, dy2, dy3 = dy1, dy2, dy3, _row(dy_ptr, t + j + AHEAD, d, in_D, T, dy_stride)
        position = tl.load(position_ptr + t + j, mask=t + j < T, other=0) if CUT else 0
        seen1, seen2, seen3 = _cut(x1, position, 1, CUT), _cut(x2, position, 2, CUT), _cut(x3, position, 3, CUT)
        du = _du(dy, bias, w0, w1, w2, w3, x, seen1, seen2, seen3)
        dx3 += _cut(w3, position, 3, CUT) * du
        inside = in_D & (i + j >= 3)
        if CUT:
            inside &= t + j - 3 < T
        if OURS or j < 3:
            tl.store(dx_ptr + (t + j - 3) * dx_stride + d, dx3.to(dx_ptr.dtype.element_ty), mask=inside)
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
    rows = x1, x2, x3, row0, row1, row2, row3, dy0, dy1, dy2, dy3
    return rows, (dx1, dx2, dx3), (sum_bias, sum0, sum1, sum2, sum3)


@triton.jit(do_not_specialize=["T"])
def _backward(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    dx_ptr,
    sums_ptr,
    T,
    D,
    x_stride,
    dy_stride,
    dx_stride,
    K: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx_TD, and a run's part of the sums for the weight and the bias: sums_SKD, with the bias as tap K."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_D = d < D
    first = tl.program_id(1).to(tl.int64) * RUN
    bias = tl.load(bias_ptr + d, mask=in_D, other=0.0).to(tl.float32)
    w0, w1, w2, w3 = (
        _tap(weight_ptr, 0, d, in_D, K),
        _tap(weight_ptr, 1, d, in_D, K),
        _tap(weight_ptr, 2, d, in_D, K),
        _tap(weight_ptr, 3, d, in_D, K),
    )
    x1, x2, x3 = _rows_before(x_ptr, first, d, in_D, x_stride)
    row0, row1, row2, row3 = _first_rows(x_ptr, first, d, in_D, T, x_stride)
    dy0, dy1, dy2, dy3 = _first_rows(dy_ptr, first, d, in_D, T, dy_stride)
    zero = tl.zeros((BLOCK_D,), tl.float32)
    dx1, dx2, dx3 = zero, zero, zero  # of the last three tokens, as far as they are known
    sum_bias, sum0, sum1, sum2, sum3 = zero, zero, zero, zero, zero
    within = _within(position_ptr, first, T)
    for i in range(0, RUN, AHEAD):
        next_within = _within(position_ptr, first + i + AHEAD, T)
        if within:
            rows, dxs, sums = _backward_steps(
                dy_ptr, x_ptr, position_ptr, dx_ptr, i, first, d, in_D, T, x_stride, dy_stride, dx_stride,
                bias, w0, w1, w2, w3, x1, x2, x3, row0, row1, row2, row3, dy0, dy1, dy2, dy3, dx1, dx2, dx3,
                sum_bias, sum0, sum1, sum2, sum3, False, True,
            )  # fmt: skip
        else:
            rows, dxs, sums = _backward_steps(
                dy_ptr, x_ptr, position_ptr, dx_ptr, i, first, d, in_D, T, x_stride, dy_stride, dx_stride,
                bias, w0, w1, w2, w3, x1, x2, x3, row0, row1, row2, row3, dy0, dy1, dy2, dy3, dx1, dx2, dx3,
                sum_bias, sum0, sum1, sum2, sum3, True, True,
            )  # fmt: skip
        x1, x2, x3, row0, row1, row2, row3, dy0, dy1, dy2, dy3 = rows
        dx1, dx2, dx3 = dxs
        sum_bias, sum0, sum1, sum2, sum3 = sums
        within = next_within
    _backward_steps(
        dy_ptr, x_ptr, position_ptr, dx_ptr, RUN, first, d, in_D, T, x_stride, dy_stride, dx_stride,
        bias, w0, w1, w2, w3, x1, x2, x3, row0, row1, row2, row3, dy0, dy1, dy2, dy3, dx1, dx2, dx3,
        sum_bias, sum0, sum1, sum2, sum3, True, False,
    )  # fmt: skip
    row = sums_ptr + tl.program_id(1).to(tl.int64) * (K + 1) * D + d
    tl.store(row + K * D, sum_bias, mask=in_D)
    tl.store(row + (K - 1) * D, sum0, mask=in_D)
    tl.store(row + (K - 2) * D, sum1, mask=in_D & (K > 1))
    tl.store(row + (K - 3) * D, sum2, mask=in_D & (K > 2))
    tl.store(row + (K - 4) * D, sum3, mask=in_D & (K > 3))


def _dense_rows(x_TD: Tensor) -> Tensor:
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def conv_silu_forward(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor) -> Tensor:
    """y_TD of `hnet::causal_conv_silu`."""
    (T, D), K = x_TD.shape, weight_D1K.shape[-1]
    y_TD = kept_empty(x_TD, T, D)
    if not T:
        return y_TD
    x_TD = _dense_rows(x_TD)
    run, channels, warps = FORWARD
    with torch.cuda.device_of(x_TD):
        _forward[(triton.cdiv(D, channels), triton.cdiv(T, run))](
            x_TD, weight_D1K.contiguous(), bias_D.contiguous(), position_T, y_TD, T, D, x_TD.stride(0),
            K=K, RUN=run, BLOCK_D=channels, num_warps=warps,
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
    """dx_TD of `hnet::causal_conv_silu`; fills the slot of the gradients of weight and bias. out_TD: where dx_TD goes,
    with dense rows."""
    (T, D), K = x_TD.shape, weight_D1K.shape[-1]
    dx_TD = x_TD.new_empty(T, D) if out_TD is None else out_TD
    run, channels, warps = BACKWARD
    runs = triton.cdiv(T, run)
    sums_SKD = dweights.rows(runs, functools.partial(sum_rows, turned=(K, D)))
    if not T:
        return dx_TD
    x_TD, dy_TD = _dense_rows(x_TD), _dense_rows(dy_TD)
    with torch.cuda.device_of(x_TD):
        _backward[(triton.cdiv(D, channels), runs)](
            dy_TD, x_TD, weight_D1K.contiguous(), bias_D.contiguous(), position_T, dx_TD, sums_SKD,
            T, D, x_TD.stride(0), dy_TD.stride(0), dx_TD.stride(0),
            K=K, RUN=run, BLOCK_D=channels, num_warps=warps,
        )  # fmt: skip
    return dx_TD
