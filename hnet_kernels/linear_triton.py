"""A Triton kernel for the product of one or two rows with a weight, which reads the weight once and as fast as it can.

Legend: T rows, I and O channels in and out. A block takes some outputs and all inputs: many loads are under way at
once, and each sum has one order.
"""

import triton.language as tl
from torch import Tensor

from hnet_kernels.launch import cdiv, kernel, next_power_of_2
from hnet_kernels.triton_math import let_next_begin, overlap, wait_for_inputs

ROWS = 2  # more are faster through cuBLAS, whose time hardly depends on the rows
TILE, WARPS = 8192, 8  # elements of the weight that a block takes


@kernel
def _few_rows(
    x_ptr, weight_ptr, bias_ptr, y_ptr, O,
    I: tl.constexpr, T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, HAS_BIAS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAPS)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    in_O, in_I = o < O, i < I
    at = weight_ptr + o[:, None].to(tl.int64) * I + i[None, :]
    weight = tl.load(at, mask=in_O[:, None] & in_I[None, :], other=0.0)
    wait_for_inputs(OVERLAPS)
    bias = tl.load(bias_ptr + o, mask=in_O, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    for t in tl.static_range(T):
        x = tl.load(x_ptr + t * I + i, mask=in_I, other=0.0).to(tl.float32)
        y = tl.sum(weight.to(tl.float32) * x[None, :], 1) + bias
        tl.store(y_ptr + t * O + o, y.to(y_ptr.dtype.element_ty), mask=in_O)


def few_rows(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias in the weight's dtype, summed in float32. At most `ROWS` rows; both contiguous."""
    (T, I), O = x_TI.shape, len(weight_OI)  # noqa: E741
    y_TO, block_I = weight_OI.new_empty(T, O), next_power_of_2(I)
    block_O = max(1, TILE // block_I)
    bias_O = None if bias_O is None else bias_O.contiguous()
    _few_rows[(cdiv(O, block_O),)](
        x_TI, weight_OI, bias_O, y_TO, O, I=I, T=T, BLOCK_O=block_O, BLOCK_I=block_I, HAS_BIAS=bias_O is not None,
        num_warps=WARPS, **overlap(x_TI),
    )  # fmt: skip
    return y_TO
