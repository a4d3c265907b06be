"""Functions that several Triton kernels call; and kernels that begin before the one before them has ended.

On Hopper GPUs a kernel that is launched so (programmatic dependent launch) can load what no kernel before it writes,
such as weights, while they run. In generation, where a kernel takes a few microseconds, that hides much of its start.
Such a kernel calls `let_next_begin` first, and `wait_for_inputs` before it reads or writes anything else, in every
block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from hnet_kernels import cards
from hnet_kernels.dispatch import kernels_overlap, takes_kernels

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


@triton.jit
def load_tile(x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr = True):
    """A tile of a matrix that `rows_of` in launch.py describes; zeros outside of it.

    EXACT: the tile ends at or before the matrix's last column. Only then may pointers leave out that comparison.
    """
    if isinstance(x, tl.core.tensor_descriptor_base):  # else (pointer, rows, width, stride)
        tile = x.load([row, column])
    else:
        t, d = row + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        at = x[0] + tl.cast(row, tl.int64) * x[3] + column + (tl.arange(0, ROWS) * x[3])[:, None] + d[None, :]
        if EXACT:
            tile = tl.load(at, mask=(t < x[1])[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=(t < x[1])[:, None] & (column + d < x[2])[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(x, row, column, tile):
    """Stores a tile that ends at or before the last column of a matrix of `rows_of`, as far as it has such rows."""
    if isinstance(x, tl.core.tensor_descriptor_base):
        x.store([row, column], tile)
    else:
        ROWS: tl.constexpr = tile.shape[0]
        COLUMNS: tl.constexpr = tile.shape[1]
        t, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        at = x[0] + tl.cast(row, tl.int64) * x[3] + column + (t * x[3])[:, None] + d[None, :]
        tl.store(at, tile, mask=(row + t < x[1])[:, None])


FEW_ROWS = 256  # with more, kernels take long enough


def overlap(x_TX: Tensor) -> dict[str, Any]:
    """Options of a launch on few rows outside of training: OVERLAPS for the kernel, and what Triton needs to know."""
    overlaps = takes_kernels(x_TX.device.type) and len(x_TX) <= FEW_ROWS and not torch.is_grad_enabled()
    overlaps = overlaps and kernels_overlap() and cards.can_overlap(x_TX.device)
    return {"OVERLAPS": True, "launch_pdl": True} if overlaps else {"OVERLAPS": False}


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    if OVERLAPS:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    if OVERLAPS:
        cuda.gdc_wait()
