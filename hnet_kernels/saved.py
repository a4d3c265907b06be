"""Memory for what a forward keeps for its backward, apart from what it needs meanwhile.

By default that is torch's, as for anything else. A caller who gives memory to many forwards in turn, such as CUDA
graphs that are replayed one after the other, lets them share the latter and not the former: see `keeping`.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor


class Keeper(Protocol):
    """Where tensors are kept."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """New memory there."""

    def keep(self, x: Tensor) -> Tensor:
        """x if it lies there, else a copy that does. Without a gradient."""


_KEEPER: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


@contextlib.contextmanager
def keeping(keeper: Keeper | None) -> Iterator[None]:
    """Forwards inside keep what they keep in `keeper`; None: as by default."""
    token = _KEEPER.set(keeper)
    try:
        yield
    finally:
        _KEEPER.reset(token)


def keeping_if(condition: bool) -> contextlib.AbstractContextManager[None]:
    """Where not: what forwards inside would keep is not kept this time."""
    return contextlib.nullcontext() if condition else keeping(None)


def kept_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, for what a forward keeps."""
    keeper = _KEEPER.get()
    return (
        like.new_empty(shape, dtype=dtype) if keeper is None else keeper.empty(shape, dtype or like.dtype, like.device)
    )


def keep(x: Tensor) -> Tensor:
    """x, for what a forward keeps otherwise than by autograd's `save_for_backward`."""
    keeper = _KEEPER.get()
    return x if keeper is None else keeper.keep(x)
