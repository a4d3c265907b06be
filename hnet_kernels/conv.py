"""Depthwise causal convolution over packed documents (the short convolution of a Mamba-2 layer).

Legend: T tokens of all documents together, D channels, K taps, L rows of the layout with gaps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.ssd import document_ids


def _rows_with_gaps(total: int, K: int, cu_seqlens: Tensor) -> tuple[Tensor, int]:
    """(row of each token, number of rows L) in a layout with K - 1 empty rows before each document."""
    doc_T = document_ids(cu_seqlens, total)
    rows_T = torch.arange(total, device=cu_seqlens.device) + (K - 1) * (doc_T + 1)
    return rows_T, total + (K - 1) * len(cu_seqlens)


def _spread(x_TD: Tensor, rows_T: Tensor, L: int) -> Tensor:
    """(1, D, L): x at its rows, zero elsewhere, as torch's convolutions take it."""
    return x_TD.new_zeros(L, x_TD.shape[1]).index_copy_(0, rows_T, x_TD).T[None]


@torch.library.custom_op("hnet::causal_conv", mutates_args=())
def causal_conv(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, cu_seqlens: Tensor) -> Tensor:
    """y_t = bias + sum_k weight[K - 1 - k] x_{t - k}, over the tokens before t in its own document. Returns y_TD.

    x, weight and bias: one floating dtype. cu_seqlens: int32 or int64 (B + 1,).
    """
    K = weight_D1K.shape[-1]
    rows_T, L = _rows_with_gaps(len(x_TD), K, cu_seqlens)
    y_1DL = F.conv1d(_spread(x_TD, rows_T, L), weight_D1K, bias_D, groups=x_TD.shape[1])
    return y_1DL[0].T[rows_T - (K - 1)]


@causal_conv.register_fake
def _(x_TD, weight_D1K, bias_D, cu_seqlens):
    return x_TD.new_empty(x_TD.shape)


@torch.library.custom_op("hnet::causal_conv_backward", mutates_args=())
def causal_conv_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D1K: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `causal_conv` for x, weight and bias."""
    D, K = x_TD.shape[1], weight_D1K.shape[-1]
    rows_T, L = _rows_with_gaps(len(x_TD), K, cu_seqlens)
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


@causal_conv_backward.register_fake
def _(dy_TD, x_TD, weight_D1K, cu_seqlens):
    return x_TD.new_empty(x_TD.shape), weight_D1K.new_empty(weight_D1K.shape), x_TD.new_empty(x_TD.shape[1])


def _setup(ctx, inputs, output):
    x_TD, weight_D1K, _, cu_seqlens = inputs
    ctx.save_for_backward(x_TD, weight_D1K, cu_seqlens)


causal_conv.register_autograd(
    lambda ctx, dy: (*causal_conv_backward(dy, *ctx.saved_tensors), None), setup_context=_setup
)
