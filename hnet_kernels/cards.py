"""What a GPU can do, found once per device; and the imitation of one GPU by another.

Kernels differ between GPUs by compute capability alone: by the shared memory of a thread block, and by whether a copy
engine reads tensor descriptors. Their launch options are in launch_options.py.

`HNET_GPU=a100` makes a larger GPU imitate an A100: it has the A100's launch options, memory and intermediate code of
kernels, and no descriptors or overlapping launches. This does not test the machine code of an A100, and times say
nothing about an A100. For a B200, whose instructions no other GPU has, only launch options and memory are imitated.
"""

import functools
import logging
import os
from typing import NamedTuple

import torch

from hnet_kernels.dispatch import KernelError

logger = logging.getLogger("hnet_kernels")

Capability = tuple[int, int]

# KiB of shared memory that a thread block can use (CUDA programming guide), by compute capability
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
TRIED = {(9, 0)}  # capabilities on which the tests have run


class Card(NamedTuple):
    """A kind of GPU. gib: memory that PyTorch can allocate. tflops: dense, in bfloat16 with sums in float32."""

    name: str
    capability: Capability
    gib: float
    tflops: float
    gb_per_s: float


CARDS = {  # peaks of NVIDIA's data sheets and architecture papers
    "a100": Card("A100", (8, 0), 78.5, 312, 2039),
    "rtx3090": Card("RTX 3090", (8, 6), 23, 71, 936),
    "rtx4090": Card("RTX 4090", (8, 9), 23, 165, 1008),
    "l4": Card("L4", (8, 9), 21.5, 121, 300),
    "l40s": Card("L40S", (8, 9), 43.5, 362, 864),
    "h100": Card("H100", (9, 0), 78.5, 989, 3350),
    "h200": Card("H200", (9, 0), 139, 989, 4800),
    "b200": Card("B200", (10, 0), 177, 2250, 8000),
    "rtx5090": Card("RTX 5090", (12, 0), 30.5, 209, 1792),
}


def named(name: str) -> Card | None:
    """The card with the name that CUDA gives a GPU, such as NVIDIA A100-SXM4-80GB; None where it is not in CARDS."""
    words = name.replace("-", " ").split()
    return next((card for card in CARDS.values() if card.name.split()[-1] in words), None)


@functools.cache
def imitated() -> Card | None:
    """The card that `HNET_GPU` names, read once. Raises KernelError for an unknown name."""
    name = os.environ.get("HNET_GPU", "")
    if name and name.lower() not in CARDS:
        raise KernelError(f"HNET_GPU={name}: expected one of {', '.join(CARDS)}")
    return CARDS[name.lower()] if name else None


class Properties(NamedTuple):
    """What kernels depend on. sms: streaming multiprocessors."""

    capability: Capability
    sms: int


# of devices that are no GPU: of a CPU under Triton's interpreter, and of the meta device, where kernels are foreseen
_elsewhere = Properties((9, 0), 3)


def foresee_for(gpu: Properties) -> None:
    """Makes the kernels of the meta device those of this GPU. Call it before any kernel has run there."""
    global _elsewhere
    _elsewhere = gpu


@functools.cache
def properties(device: torch.device) -> Properties:
    """The properties of a GPU; of other devices those of `foresee_for`, or of a small GPU of capability 9.0."""
    if device.type != "cuda":
        return _elsewhere
    found = torch.cuda.get_device_properties(device)
    return Properties((found.major, found.minor), found.multi_processor_count)


@functools.cache
def capability(device: torch.device) -> Capability:
    """The compute capability for which kernels are chosen."""
    card = imitated()
    return card.capability if card else properties(device).capability


@functools.cache
def why_unsupported(device: torch.device) -> str | None:
    """Why a GPU cannot run the kernels that need launch options for it, and so no graphs; or None where it can."""
    found = capability(device)
    if found in SHARED and torch.version.hip is None:
        return None
    known = ", ".join(f"{major}.{minor}" for major, minor in SHARED)
    return f"compute capability {found[0]}.{found[1]}, not one of {known}"


@functools.cache
def has_descriptors(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels read tiles of a dtype through tensor descriptors; elsewhere they compute addresses.

    12.0 has descriptors too, and 10.0 has them for float32: see launch_options.py.
    """
    found = capability(device)
    return found == (9, 0) or (found == (10, 0) and dtype != torch.float32)


def imitated_architecture() -> str | None:
    """The architecture for which Triton compiles all but the last step, if this is not the GPU's own."""
    card = imitated()
    if card is None or card.capability in ((9, 0), (10, 0)):
        return None
    major, minor = min(card.capability, (8, 9))  # 12.0 has the tensor-core instructions of 8.9
    return f"sm{major}{minor}"


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether a kernel can begin before the one before it has ended (programmatic dependent launch)."""
    return torch.version.hip is None and capability(device) >= (9, 0) and imitated() is None


def memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a GPU's memory; of the imitated card, as far as this process uses it."""
    free, total = torch.cuda.mem_get_info(device)
    if card := imitated():
        total = min(total, int(card.gib * 2**30))
        free = min(free, total - torch.cuda.memory_reserved(device))
    return max(0, free), total


@functools.cache
def start(device: torch.device) -> None:
    """Limits memory to that of an imitated card, and logs once what has to be known about the GPU.

    Raises KernelError if the GPU has less memory than the card that it should imitate.
    """
    card = imitated()
    if device.type != "cuda":
        if card:
            logger.warning("HNET_GPU=%s: without a GPU, nothing is imitated", os.environ["HNET_GPU"])
        return
    name, total = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    if card:
        share = card.gib * 2**30 / total
        if share > 1.01:
            raise KernelError(
                f"HNET_GPU={os.environ['HNET_GPU']}: the {name} here has less memory than the {card.name}"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), index)
        logger.warning(
            "HNET_GPU: this %s imitates the %s (launch options, %.0f GiB); that is no test of the machine code of that "
            "card, and times are no estimate for it", name, card.name, card.gib
        )  # fmt: skip
    elif capability(device) not in TRIED and not why_unsupported(device):
        logger.warning(
            "%s (compute capability %s.%s): the kernels have been compiled for such a GPU, but nobody has reported a "
            "run; python benchmarks/tune.py checks them in ten minutes", name, *capability(device)
        )  # fmt: skip
