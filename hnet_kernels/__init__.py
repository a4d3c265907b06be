"""Operations whose speed matters, each with its definition in plain torch. They take flat values and `cu_seqlens`.

`cu_seqlens` is int32 `(B + 1,)`: document b holds the rows `cu_seqlens[b]:cu_seqlens[b + 1]` of every flat tensor, and
nothing ever passes from one document to another.

`HNET_KERNELS` picks the implementation: `auto` (the default: a fast kernel where one exists and the device can run it),
`reference` (the plain-torch definitions), `triton` (only fast kernels; an operation that cannot run so is an error).
"""

from hnet_kernels.attention import attention
from hnet_kernels.conv import causal_conv_silu
from hnet_kernels.dispatch import KernelError, kernel_report
from hnet_kernels.ema import ema_backward, ema_forward, sum_chunks
from hnet_kernels.ssd import ssd

__all__ = [
    "KernelError",
    "attention",
    "causal_conv_silu",
    "ema_backward",
    "ema_forward",
    "kernel_report",
    "ssd",
    "sum_chunks",
]
