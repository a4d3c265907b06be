"""Memory for the tensors that a forward saves for its backward, apart from its temporary memory.

By default torch allocates both. A caller that runs many forwards in turn in the same memory, such as replayed CUDA
graphs, lets them share their temporary memory but not the saved tensors: see `save_in`.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class SavedMemory(Protocol):
    """Memory that holds saved tensors."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor in this memory, not initialized."""

    def save(self, x: Tensor) -> Tensor:
        """x, without its gradient, if it is in this memory; else a copy of it that is."""


_MEMORY: ContextVar[SavedMemory | None] = ContextVar("saved_memory", default=None)


@contextlib.contextmanager
def save_in(memory: SavedMemory | None) -> Iterator[None]:
    """Forwards inside save their tensors in `memory`; None: torch allocates them."""
    token = _MEMORY.set(memory)
    try:
        yield
    finally:
        _MEMORY.reset(token)


def save_if(condition: bool) -> contextlib.AbstractContextManager[None]:
    """Where the condition is false, what forwards inside would save is temporary this time."""
    return contextlib.nullcontext() if condition else save_in(None)


def saved_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)` for a tensor that the forward saves."""
    memory = _MEMORY.get()
    return (
        like.new_empty(shape, dtype=dtype) if memory is None else memory.empty(shape, dtype or like.dtype, like.device)
    )


def save_tensor(x: Tensor) -> Tensor:
    """x, or its copy in the memory of `save_in`, for what is saved without autograd's `save_for_backward`."""
    memory = _MEMORY.get()
    return x if memory is None else memory.save(x)
