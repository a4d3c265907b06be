"""Depthwise causal convolution over packed documents and the SiLU after it (the short convolution of a Mamba-2 layer).

Legend: T tokens of all documents together, B documents, D channels, K taps.

This file has the definition and the operation; the Triton kernels for GPUs are in conv_triton.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import dispatched, has_triton, takes_kernels, use_fast
from hnet_kernels.gradients import PartialSums, Slot

MAX_TAPS = 4


def _clear(x_TD: Tensor, rows: Tensor) -> None:
    """Zeroes these rows of x in place; rows outside of x are ignored."""
    x_TD[rows[(rows >= 0) & (rows < len(x_TD))]] = 0


def conv_forward(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor) -> Tensor:
    """The convolution without SiLU, tap by tap: K multiply-adds of x, each shifted by one more token."""
    taps_KD, start_B = weight_D1K[:, 0].T.flip(0), (position_T == 0).nonzero()
    y_TD = torch.addcmul(bias_D, x_TD, taps_KD[0])
    x_TD = x_TD.clone(memory_format=torch.contiguous_format)
    for k in range(1, min(len(taps_KD), len(x_TD))):
        _clear(x_TD, start_B - k)  # the last k tokens before a document starts must not reach into it
        y_TD[k:].addcmul_(x_TD[:-k], taps_KD[k])
    return y_TD


def conv_backward(dy_TD: Tensor, x_TD: Tensor, weight_D1K: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `conv_forward` for x, weight and bias. Overwrites dy."""
    taps_KD, start_B = weight_D1K[:, 0].T.flip(0), (position_T == 0).nonzero()
    dtaps_KD = torch.zeros_like(taps_KD)
    dbias_D = dy_TD.sum(0)
    dx_TD = dy_TD * taps_KD[0]
    torch.sum(dy_TD * x_TD, 0, out=dtaps_KD[0])
    for k in range(1, min(len(taps_KD), len(x_TD))):
        _clear(dy_TD, start_B + k - 1)  # the first k tokens of a document saw nothing k tokens before
        dx_TD[:-k].addcmul_(dy_TD[k:], taps_KD[k])
        torch.sum(dy_TD[k:] * x_TD[:-k], 0, out=dtaps_KD[k])
    return dx_TD, dtaps_KD.flip(0).T[:, None], dbias_D


def _why_unsupported(x_TD: Tensor, K: int) -> str | None:
    """Why the kernels of conv_triton.py cannot run on these, or None."""
    if not takes_kernels(x_TD.device.type):
        return "no CUDA device"
    if x_TD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {str(x_TD.dtype).removeprefix('torch.')}"
    if K > MAX_TAPS:
        return f"{K} taps, more than {MAX_TAPS}"
    if not has_triton():
        return "no triton"
    return None


@dispatched
def causal_conv_silu(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor) -> Tensor:
    """silu(bias + sum_k weight[K - 1 - k] x_{t - k}), over the tokens before t in its own document. Returns y_TD.

    x, weight and bias: one floating dtype. position_T: int32 or int64, each token's position in its document, from 0.
    Saves only its inputs for the backward, which recomputes the convolution.
    """
    return causal_conv_silu_forward(x_TD, weight_D1K, bias_D, position_T)


def causal_conv_silu_forward(x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor) -> Tensor:
    """`causal_conv_silu`, for callers that write their own backward."""
    if use_fast("causal_conv_silu", x_TD.device.type, x_TD.dtype, _why_unsupported(x_TD, weight_D1K.shape[-1])):
        from hnet_kernels import conv_triton  # not above: triton is not everywhere

        return conv_triton.conv_silu_forward(x_TD, weight_D1K, bias_D, position_T)
    return F.silu(conv_forward(x_TD, weight_D1K, bias_D, position_T)).contiguous()


@torch.library.register_fake(causal_conv_silu)
def _(x_TD, weight_D1K, bias_D, position_T):
    return x_TD.new_empty(x_TD.shape)


@dispatched
def causal_conv_silu_backward(
    dy_TD: Tensor, x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `causal_conv_silu` for x, weight and bias."""
    if use_fast("causal_conv_silu", x_TD.device.type, x_TD.dtype, _why_unsupported(x_TD, weight_D1K.shape[-1])):
        from hnet_kernels import conv_triton

        slot = PartialSums().slot(weight_D1K, bias_D)
        dx_TD = conv_triton.conv_silu_backward(dy_TD, x_TD, weight_D1K, bias_D, position_T, slot)
        return dx_TD, *(x.clone() for x in slot.gradients())  # an operation's results must not share memory
    before_TD = conv_forward(x_TD, weight_D1K, bias_D, position_T)
    dbefore_TD = torch.ops.aten.silu_backward(dy_TD, before_TD)
    return tuple(grad.contiguous() for grad in conv_backward(dbefore_TD, x_TD, weight_D1K, position_T))


@torch.library.register_fake(causal_conv_silu_backward)
def _(dy_TD, x_TD, weight_D1K, bias_D, position_T):
    return x_TD.new_empty(x_TD.shape), weight_D1K.new_empty(weight_D1K.shape), bias_D.new_empty(bias_D.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


torch.library.register_autograd(
    causal_conv_silu, lambda ctx, dy: (*causal_conv_silu_backward(dy, *ctx.saved_tensors), None), setup_context=_setup
)


def causal_conv_silu_backward_to(
    dx_TD: Tensor, dy_TD: Tensor, x_TD: Tensor, weight_D1K: Tensor, bias_D: Tensor, position_T: Tensor, dweights: Slot
) -> None:
    """Gradients of `causal_conv_silu`. Writes x's to dx_TD, whose rows may be parts of longer rows, and fills the slot
    of the gradients of weight and bias.
    """
    if use_fast("causal_conv_silu", x_TD.device.type, x_TD.dtype, _why_unsupported(x_TD, weight_D1K.shape[-1])):
        from hnet_kernels import conv_triton

        conv_triton.conv_silu_backward(dy_TD, x_TD, weight_D1K, bias_D, position_T, dweights, dx_TD)
    else:
        found_TD, *found = causal_conv_silu_backward(dy_TD, x_TD, weight_D1K, bias_D, position_T)
        dx_TD.copy_(found_TD)
        dweights.fill(*found)
