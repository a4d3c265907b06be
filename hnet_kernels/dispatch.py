"""Which implementation of an operation runs: chosen once for each (operation, device type, dtype), logged once.

And in which dtype a definition computes.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger("hnet_kernels")

CHOICES = ("auto", "reference", "triton")
_chosen: dict[tuple[str, str, torch.dtype], str] = {}


class KernelError(RuntimeError):
    """An implementation was forced that cannot run here."""


def wide(x: Tensor) -> Tensor:
    """x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@functools.cache
def requested() -> str:
    """The value of `HNET_KERNELS`, read once."""
    choice = os.environ.get("HNET_KERNELS", "auto")
    if choice not in CHOICES:
        raise KernelError(f"HNET_KERNELS={choice}: expected one of {', '.join(CHOICES)}")
    return choice


def obstacle_anywhere(x: Tensor, widest: int | None = None) -> str | None:
    """Why a Triton kernel that runs on any GPU cannot run on x, or None.

    widest: the longest row that it takes, where it holds whole rows in the registers of one program.
    """
    if x.device.type != "cuda":
        return "no CUDA device"
    if x.dtype == torch.float64:
        return "dtype float64"
    if widest is not None and x.shape[1] > widest:
        return f"rows of {x.shape[1]}, more than {widest}"
    return None if importlib.util.find_spec("triton") else "no triton"


@torch.compiler.assume_constant_result  # a compiled region asks while it is traced and keeps the answer
def use_fast(operation: str, device_type: str, dtype: torch.dtype, obstacle: str | None) -> bool:
    """Whether `operation` on tensors of this device type and dtype runs its fast kernel.

    `obstacle` says in a few words why the fast kernel cannot run on them, or is None where it can.
    Raises KernelError where `HNET_KERNELS=triton` forces a kernel that cannot run.
    """
    choice = requested()
    if choice == "triton" and obstacle:
        raise KernelError(f"HNET_KERNELS=triton: no fast kernel for {operation} here ({obstacle}); use auto")
    fast = choice != "reference" and obstacle is None
    key = (operation, device_type, dtype)
    if key not in _chosen:
        _chosen[key] = "fast" if fast else "reference" + (f" ({obstacle})" if obstacle else "")
        logger.info("%s on %s %s: %s", operation, device_type, str(dtype).removeprefix("torch."), _chosen[key])
    return fast


def kernel_report() -> dict[str, str]:
    """What has been chosen so far, e.g. `{"attention cuda bfloat16": "fast"}`."""
    return {f"{op} {device} {str(dtype).removeprefix('torch.')}": how for (op, device, dtype), how in _chosen.items()}
