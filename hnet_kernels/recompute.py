"""Activation checkpointing inside operations: what a backward recomputes instead of saving it.

`none` saves everything that backwards read. `selective` saves what is costly to compute: the results of matrix
products, of attention and of the scan. `block` saves little more than the terms of the residual stream. Gradients have
the same bits in all three.

An operation whose result is cheap to recompute attaches a `Recomputed` to it. An operation that would save that result
for its own backward keeps the `Recomputed` instead.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from hnet_kernels.saved import save_tensor

MODES = ("none", "selective", "block")
_MODE: ContextVar[str] = ContextVar("mode", default="none")


@contextlib.contextmanager
def recomputing(mode: str) -> Iterator[None]:
    """Inside, forwards save what `mode` (one of MODES) says; their backwards recompute the rest."""
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)


def mode() -> str:
    """The mode of the current forward; `block` where there will be no backward."""
    return _MODE.get() if torch.is_grad_enabled() else "block"


class Recomputed:
    """A result that backwards recompute: once for all of them, kept from the first to the last that needs it."""

    def __init__(self, compute: Callable[[], Any], version: int = 0):
        """version: that of the result, which may be changed in place later."""
        self.compute, self.version, self.users, self.value = compute, version, 0, None

    def get(self) -> Any:
        value = self.compute() if self.value is None else self.value
        self.users -= 1
        self.value = value if self.users > 0 else None
        return value


def recomputed(x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """x, which backwards recompute by compute() instead of saving it. compute: the same bits, without autograd."""
    if torch.is_grad_enabled():
        x.recomputed = Recomputed(compute, x._version)
    return x


def recomputed_of(x: Tensor | None) -> Recomputed | None:
    """The `Recomputed` attached to x, or None if there is none or x has been changed in place since."""
    found = getattr(x, "recomputed", None)
    return found if found is not None and found.version == x._version else None


def recomputed_from(y: Tensor, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """y, which backwards recompute by compute(x). x is saved, or itself recomputed."""
    if not torch.is_grad_enabled():
        return y
    before = recomputed_of(x)
    if before is None:
        x = save_tensor(x.detach())
        return recomputed(y, lambda: compute(x))
    before.users += 1
    return recomputed(y, lambda: compute(before.get()))


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, except for tensors that can be recomputed."""
    ctx.recomputed = [recomputed_of(x) for x in tensors]
    for found in filter(None, ctx.recomputed):
        found.users += 1
    ctx.save_for_backward(*(x if found is None else None for x, found in zip(tensors, ctx.recomputed)))


def saved(ctx: Any) -> list[Tensor | None]:
    """The tensors that `save` was given."""
    return [x if found is None else found.get() for x, found in zip(ctx.saved_tensors, ctx.recomputed)]
