"""Triton kernels for `hnet::causal_conv_silu` and its gradient. The definition is in conv.py.

Legend: T tokens, D channels, K taps, S runs of tokens.

Both are bound by memory: forward reads x and writes y, backward reads x and dy and writes dx, each element once from
memory; the K - 1 rows before a tile (and after it, backward) come from the cache. With u = bias + the convolution,

    dx_t = sum_k weight[K - 1 - k] du_{t + k}    over the tokens of t's document, du = dy silu'(u)

so a program computes u again for its own rows and for the K - 1 after them. Sums for the weights and the bias are kept
in registers over a run of tiles and added up at the end: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS, WARPS = 16, 64, 4  # a tile
TILES = 8  # in a run, backward


@triton.jit
def _silu_gradient(u):
    s = 1 / (1 + tl.exp(-u))
    return s * (1 + u * (1 - s))


@triton.jit
def _before(x_ptr, position, k, t, d, in_D, T, x_stride):
    """x of k tokens before, in float32; zero where that is another document. `position`: that of the tokens t."""
    seen = ((t < T) & (position >= k))[:, None] & in_D[None, :]
    return tl.load(x_ptr + (t - k)[:, None] * x_stride + d[None, :], mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _tap(weight_ptr, k, d, in_D, K: tl.constexpr):
    """The weight (1, D) of what is k tokens before."""
    return tl.load(weight_ptr + d * K + (K - 1 - k), mask=in_D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _convolve(x_ptr, weight_ptr, bias, position, t, d, in_D, T, x_stride, K: tl.constexpr):
    u = tl.zeros((t.shape[0], d.shape[0]), tl.float32) + bias[None, :]
    for k in tl.static_range(K):
        u += _tap(weight_ptr, k, d, in_D, K) * _before(x_ptr, position, k, t, d, in_D, T, x_stride)
    return u


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
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + t, mask=t < T, other=0)
    u = _convolve(x_ptr, weight_ptr, bias, position, t, d, d < D, T, x_stride, K)
    y = u / (1 + tl.exp(-u))
    inside = (t < T)[:, None] & (d < D)[None, :]
    tl.store(y_ptr + t[:, None] * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "tiles"])
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
    tiles,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx_TD, and a run's part of the sums for the weight and the bias: sums_SKD, with the bias as tap K."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    run = tl.program_id(1)
    in_D = d < D
    bias = tl.load(bias_ptr + d, mask=in_D, other=0.0).to(tl.float32)
    sum_bias = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    sum_0, sum_1, sum_2, sum_3 = sum_bias, sum_bias, sum_bias, sum_bias  # of the taps 0 ... 3 tokens before
    for tile in range(tiles):
        t = (run.to(tl.int64) * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        dx = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for k in tl.static_range(K):
            position = tl.load(position_ptr + t + k, mask=t + k < T, other=0)
            u = _convolve(x_ptr, weight_ptr, bias, position, t + k, d, in_D, T, x_stride, K)
            reached = ((t + k < T) & (position >= k))[:, None] & in_D[None, :]
            dy = tl.load(dy_ptr + (t + k)[:, None] * dy_stride + d[None, :], mask=reached, other=0.0)
            du = dy.to(tl.float32) * _silu_gradient(u)
            dx += _tap(weight_ptr, k, d, in_D, K) * du
            if k == 0:
                sum_bias += du
                sum_0 += du * _before(x_ptr, position, 0, t, d, in_D, T, x_stride)
                if K > 1:
                    sum_1 += du * _before(x_ptr, position, 1, t, d, in_D, T, x_stride)
                if K > 2:
                    sum_2 += du * _before(x_ptr, position, 2, t, d, in_D, T, x_stride)
                if K > 3:
                    sum_3 += du * _before(x_ptr, position, 3, t, d, in_D, T, x_stride)
        inside = (t < T)[:, None] & in_D[None, :]
        tl.store(dx_ptr + t[:, None] * D + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    row = sums_ptr + run.to(tl.int64) * (K + 1) * D + d
    tl.store(row + K * D, tl.sum(sum_bias, 0), mask=in_D)
    tl.store(row + (K - 1) * D, tl.sum(sum_0, 0), mask=in_D)
    if K > 1:
        tl.store(row + (K - 2) * D, tl.sum(sum_1, 0), mask=in_D)
    if K > 2:
        tl.store(row + (K - 3) * D, tl.sum(sum_2, 0), mask=in_D)
    if K > 3:
        tl.store(row + (K - 4) * D, tl.sum(sum_3, 0), mask=in_D)


def _dense_rows(x_TD: Tensor) -> Tensor:
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def conv_silu_forward(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor) -> Tensor:
    """y_TD of `hnet::causal_conv_silu`."""
    (T, D), K = x_TD.shape, weight_D1K.shape[-1]
    y_TD = x_TD.new_empty(T, D)
    if not T:
        return y_TD
    x_TD = _dense_rows(x_TD)
    with torch.cuda.device_of(x_TD):
        _forward[(triton.cdiv(D, CHANNELS), triton.cdiv(T, TOKENS))](
            x_TD, weight_D1K.contiguous(), bias_D.contiguous(), position_T, y_TD, T, D, x_TD.stride(0),
            K=K, BLOCK_T=TOKENS, BLOCK_D=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return y_TD


def conv_silu_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx_TD, dweight_D1K, dbias_D) of `hnet::causal_conv_silu`."""
    (T, D), K = x_TD.shape, weight_D1K.shape[-1]
    dx_TD = x_TD.new_empty(T, D)
    if not T:
        return dx_TD, torch.zeros_like(weight_D1K), torch.zeros_like(bias_D)
    x_TD, dy_TD = _dense_rows(x_TD), _dense_rows(dy_TD)
    runs = triton.cdiv(T, TOKENS * TILES)
    sums_SKD = x_TD.new_empty(runs, K + 1, D, dtype=torch.float32)
    with torch.cuda.device_of(x_TD):
        _backward[(triton.cdiv(D, CHANNELS), runs)](
            dy_TD, x_TD, weight_D1K.contiguous(), bias_D.contiguous(), position_T, dx_TD, sums_SKD,
            T, D, x_TD.stride(0), dy_TD.stride(0), TILES,
            K=K, BLOCK_T=TOKENS, BLOCK_D=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    sums_KD = sums_SKD.sum(0)
    dweight_D1K = sums_KD[:K].T.to(weight_D1K.dtype).contiguous()[:, None]
    return dx_TD, dweight_D1K, sums_KD[K].to(bias_D.dtype)
