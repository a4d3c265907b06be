"""Tells what FSDP2 has sharded from what it has not.

These functions look for an attribute and not for a class: importing `torch.distributed.fsdp` or `.tensor` takes a
second or two, which only runs with sharded weights should wait for.
"""

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank stores a shard of the tensor (torch's DTensor)."""
    return hasattr(tensor, "placements")


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor
