"""Activation checkpointing inside operations: what a backward computes again instead of saving it.

`none` saves all that backwards read. `selective` saves what is costly to compute: the results of matrix products, of
attention and of the scan. `block` saves little more than what the residual stream adds up. Gradients are the same bits.

An operation whose result is cheap to compute again leaves a `Recomputed` beside it. Whoever would save that result for
its own backward keeps the `Recomputed` instead.
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
    """Backwards of forwards inside compute again as `mode` says, one of MODES."""
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)


def mode() -> str:
    """What forwards should save; `block` where there will be no backward."""
    return _MODE.get() if torch.is_grad_enabled() else "block"


class Recomputed:
    """A result that backwards compute again: once for all of them, from the first to the last that needs it."""

    def __init__(self, compute: Callable[[], Any], version: int = 0):
        """version: of the result, as somebody may change that in place afterwards."""
        self.compute, self.version, self.users, self.value = compute, version, 0, None

    def get(self) -> Any:
        value = self.compute() if self.value is None else self.value
        self.users -= 1
        self.value = value if self.users > 0 else None
        return value


def recomputed(x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """x, of which backwards take compute() instead of saving it. compute: the same bits, without autograd."""
    if torch.is_grad_enabled():
        x.recomputed = Recomputed(compute, x._version)
    return x


def recomputed_of(x: Tensor | None) -> Recomputed | None:
    """What `recomputed` left beside x, unless x has been changed in place since."""
    found = getattr(x, "recomputed", None)
    return found if found is not None and found.version == x._version else None


def recomputed_from(y: Tensor, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """y, of which backwards take compute(x), where x is saved or itself computed again."""
    if not torch.is_grad_enabled():
        return y
    before = recomputed_of(x)
    if before is None:
        x = save_tensor(x.detach())
        return recomputed(y, lambda: compute(x))
    before.users += 1
    return recomputed(y, lambda: compute(before.get()))


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """`ctx.save_for_backward`, but what can be recomputed is not saved."""
    ctx.recomputed = [recomputed_of(x) for x in tensors]
    for found in filter(None, ctx.recomputed):
        found.users += 1
    ctx.save_for_backward(*(x if found is None else None for x, found in zip(tensors, ctx.recomputed)))


def saved(ctx: Any) -> list[Tensor | None]:
    """What `save` got."""
    return [x if found is None else found.get() for x, found in zip(ctx.saved_tensors, ctx.recomputed)]
