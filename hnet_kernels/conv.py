"""Depthwise causal convolution over packed documents and the SiLU after it (the short convolution of a Mamba-2 layer).

Legend: T tokens of all documents together, D channels, K taps, L rows of the layout with gaps.

This file has the definition and the operation; the Triton kernels that it runs on a GPU are in conv_triton.py.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import use_fast

MAX_TAPS = 4


def _rows_with_gaps(position_T: Tensor, K: int) -> tuple[Tensor, int]:
    """(row of each token, number of rows L) in a layout with K - 1 empty rows before each document."""
    document_T = (position_T == 0).cumsum(0)  # from 1
    rows_T = torch.arange(len(position_T), device=position_T.device) + (K - 1) * document_T
    return rows_T, len(position_T) + (K - 1) * int(document_T[-1:].sum())


def _spread(x_TD: Tensor, rows_T: Tensor, L: int) -> Tensor:
    """(1, D, L): x at its rows, zero elsewhere, as torch's convolutions take it."""
    return x_TD.new_zeros(L, x_TD.shape[1]).index_copy_(0, rows_T, x_TD).T[None]


def conv_forward(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor) -> Tensor:
    """The convolution alone, by torch's."""
    K = weight_D1K.shape[-1]
    rows_T, L = _rows_with_gaps(position_T, K)
    y_1DL = F.conv1d(_spread(x_TD, rows_T, L), weight_D1K, bias_D, groups=x_TD.shape[1])
    return y_1DL[0].T[rows_T - (K - 1)]


def conv_backward(dy_TD: Tensor, x_TD: Tensor, weight_D1K: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `conv_forward` for x, weight and bias, by torch's convolution."""
    D, K = x_TD.shape[1], weight_D1K.shape[-1]
    rows_T, L = _rows_with_gaps(position_T, K)
    dx_1DL, dweight_D1K, dbias_D = torch.ops.aten.convolution_backward(
        _spread(dy_TD, rows_T - (K - 1), L - (K - 1)),
        _spread(x_TD, rows_T, L),
        weight_D1K,
        bias_sizes=[D],
        stride=[1],
        padding=[0],
        dilation=[1],
        transposed=False,
        output_padding=[0],
        groups=D,
        output_mask=[True, True, True],
    )
    return dx_1DL[0].T[rows_T], dweight_D1K, dbias_D


def _obstacle(x_TD: Tensor, K: int) -> str | None:
    """Why the kernels of conv_triton.py cannot run on these, or None."""
    if x_TD.device.type != "cuda":
        return "no CUDA device"
    if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {str(x_TD.dtype).removeprefix('torch.')}"
    if K > MAX_TAPS:
        return f"{K} taps, more than {MAX_TAPS}"
    if importlib.util.find_spec("triton") is None:
        return "no triton"
    return None


@torch.library.custom_op("hnet::causal_conv_silu", mutates_args=())
def causal_conv_silu(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor) -> Tensor:
    """silu(bias + sum_k weight[K - 1 - k] x_{t - k}), over the tokens before t in its own document. Returns y_TD.

    x, weight and bias: one floating dtype. position_T: int32 or int64, each token's place in its document, from 0.
    Keeps only its inputs for the backward, which convolves again.
    """
    if use_fast("causal_conv_silu", x_TD.device.type, x_TD.dtype, _obstacle(x_TD, weight_D1K.shape[-1])):
        from hnet_kernels import conv_triton  # not above: triton is not everywhere

        return conv_triton.conv_silu_forward(x_TD, weight_D1K, bias_D, position_T)
    return F.silu(conv_forward(x_TD, weight_D1K, bias_D, position_T)).contiguous()


@causal_conv_silu.register_fake
def _(x_TD, weight_D1K, bias_D, position_T):
    return x_TD.new_empty(x_TD.shape)


@torch.library.custom_op("hnet::causal_conv_silu_backward", mutates_args=())
def causal_conv_silu_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `causal_conv_silu` for x, weight and bias."""
    if use_fast("causal_conv_silu", x_TD.device.type, x_TD.dtype, _obstacle(x_TD, weight_D1K.shape[-1])):
        from hnet_kernels import conv_triton

        return conv_triton.conv_silu_backward(dy_TD, x_TD, weight_D1K, bias_D, position_T)
    before_TD = conv_forward(x_TD, weight_D1K, bias_D, position_T)
    dbefore_TD = torch.ops.aten.silu_backward(dy_TD, before_TD)
    return tuple(grad.contiguous() for grad in conv_backward(dbefore_TD, x_TD, weight_D1K, position_T))


@causal_conv_silu_backward.register_fake
def _(dy_TD, x_TD, weight_D1K, bias_D, position_T):
    return x_TD.new_empty(x_TD.shape), weight_D1K.new_empty(weight_D1K.shape), bias_D.new_empty(bias_D.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


causal_conv_silu.register_autograd(
    lambda ctx, dy: (*causal_conv_silu_backward(dy, *ctx.saved_tensors), None), setup_context=_setup
)
