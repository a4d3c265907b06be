"""Functions that several Triton kernels call."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32; zero where the result is below float32's normal range.

    The relative error is about 2e-7 for x > -2, and |x| 6e-8 below, where the rounding of the exponent dominates.
    It takes four instructions; `1 / (1 + tl.exp(-x))` takes twelve, most of them for values outside that range.
    """
    e = tl.exp2(x * -LOG2_E)
    if _COMPILED:
        s = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        s = 1 / (1 + e)
    return s
