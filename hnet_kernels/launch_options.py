"""The launch options of the scan and of attention on each kind of GPU. Other kernels have the same ones everywhere.

Three families differ in how tensor cores get their operands:

    hopper      9.0: from shared memory, filled through tensor descriptors
    blackwell   10.0: the same, into a memory of their own
    registers   8.0, 8.6, 8.9 and 12.0: from registers, of which large tiles take more than a thread has. 12.0 has
                descriptors too, but with them its kernels spill four times as many bytes; the same in float32 on 10.0

Options of hopper were measured on an H200. Those of the others were compiled, not run: of the options that fit, they
spill least (docs/CARDS.md). `benchmarks/tune.py` measures their neighbours on a card.
"""

import functools
from typing import NamedTuple

import torch

from hnet_kernels import cards


class Options(NamedTuple):
    """Launch options. stages: of the pipeline that loads. registers: at most, per thread. tokens: of a loop's tile."""

    warps: int
    stages: int
    registers: int | None = None
    tokens: int = 64


class Scan(NamedTuple):
    """Options of the kernels of ssd_triton.py. tokens: of a chunk."""

    tokens: int
    prepare: Options
    totals: Options
    states: Options
    outputs: Options
    gradients: Options
    finish: Options


class Attention(NamedTuple):
    """Options of the kernels of attention_triton.py."""

    forward: Options
    keys: Options
    queries: Options


HALF, FULL = torch.bfloat16, torch.float32

# 64 tokens: the rows of one tensor-core instruction on Hopper. In float32, products use no tensor cores: more
# registers, so more threads and fewer tokens.
_HOPPER = {
    HALF: Scan(64, Options(8, 1), Options(4, 4), Options(4, 4), Options(4, 2), Options(4, 2), Options(8, 1)),
    FULL: Scan(32, Options(8, 1), Options(8, 1), Options(8, 1), Options(8, 1), Options(16, 1), Options(8, 1)),
}
_REGISTERS = {
    # 255: without it ptxas gives kernels that spill 32 registers
    HALF: Scan(
        32, Options(8, 1), Options(4, 3), Options(4, 3), Options(8, 2, 255), Options(8, 2, 255), Options(8, 1)
    ),
    FULL: Scan(
        16, Options(8, 1), Options(8, 1), Options(8, 1), Options(8, 1, 255), Options(16, 1, 128), Options(8, 1, 255)
    ),
}  # fmt: skip
SCAN = {
    "hopper": _HOPPER,
    "blackwell": {
        HALF: _HOPPER[HALF]._replace(states=Options(4, 1)),  # a store through a descriptor stops Triton's pipeline
        FULL: _REGISTERS[FULL],
    },
    "registers": _REGISTERS,
}

# For heads of up to 64 channels, and of up to 128. Hopper: the fastest of those in benchmarks/results,
# h200-2026-11-28/kernels_sweep.txt and h200-2026-11-28-2/attention_ways.txt. 168 registers: three blocks per SM.
ATTENTION = {
    "hopper": (
        Attention(Options(4, 2), Options(4, 2, 168), Options(4, 3)),
        Attention(Options(4, 3), Options(4, 2, None, 32), Options(4, 2)),
    ),
    "blackwell": (
        Attention(Options(4, 2), Options(4, 2), Options(4, 3)),
        Attention(Options(4, 3), Options(4, 2, None, 32), Options(4, 2)),
    ),
    "registers": (
        Attention(Options(4, 2), Options(4, 2), Options(4, 2)),
        Attention(Options(4, 2), Options(4, 2, None, 32), Options(4, 2, None, 32)),
    ),
}


def family(capability: cards.Capability) -> str:
    return {(9, 0): "hopper", (10, 0): "blackwell"}.get(capability, "registers")


@functools.cache
def scan(device: torch.device, dtype: torch.dtype) -> Scan:
    """The options of the scan on a device, in bfloat16 or float32."""
    return SCAN[family(cards.capability(device))][dtype]


@functools.cache
def attention(device: torch.device, channels: int) -> Attention:
    """The options of attention on a device, for heads of this many channels."""
    return ATTENTION[family(cards.capability(device))][channels > 64]


def launch(options: Options) -> dict[str, int | None]:
    """The options as arguments of a launch."""
    return {"num_warps": options.warps, "num_stages": options.stages, "maxnreg": options.registers}
