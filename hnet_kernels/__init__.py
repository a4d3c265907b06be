"""Operations whose speed matters, each with its definition in plain torch. They take flat values and `cu_seqlens`.

`cu_seqlens` is int32 `(B + 1,)`: document b holds the rows `cu_seqlens[b]:cu_seqlens[b + 1]` of every flat tensor, and
nothing ever passes from one document to another.

`HNET_KERNELS` picks the implementation: `auto` (the default: a fast kernel where one exists and the device can run it),
`reference` (the plain-torch definitions), `triton` (only fast kernels; an operation that cannot run so is an error).
"""

from hnet_kernels.attention import attention, rotary_attention, rotate, tile_order
from hnet_kernels.boundaries import Chunks, cut
from hnet_kernels.conv import causal_conv_silu
from hnet_kernels.cross_entropy import cross_entropy
from hnet_kernels.dispatch import KernelError, kernel_report
from hnet_kernels.ema import ema_backward, ema_forward, smooth, sum_chunks
from hnet_kernels.linear import embed, linear, wide_linear, widen
from hnet_kernels.mamba2 import mamba2_inner
from hnet_kernels.norm import Residual, residual_stream, rms_norm
from hnet_kernels.pointwise import swiglu
from hnet_kernels.router import boundary_probability, take_rows, upsample
from hnet_kernels.ssd import ssd

__all__ = [
    "Chunks",
    "KernelError",
    "Residual",
    "attention",
    "boundary_probability",
    "causal_conv_silu",
    "cross_entropy",
    "cut",
    "ema_backward",
    "ema_forward",
    "embed",
    "kernel_report",
    "linear",
    "mamba2_inner",
    "residual_stream",
    "rms_norm",
    "rotary_attention",
    "rotate",
    "smooth",
    "ssd",
    "sum_chunks",
    "swiglu",
    "take_rows",
    "tile_order",
    "upsample",
    "wide_linear",
    "widen",
]
