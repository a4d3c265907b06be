"""Chooses the implementation of an operation.

An `Operation` is a definition in plain torch with a fast implementation beside it. Inside fast implementations,
`use_fast` chooses Triton kernels; each choice is logged once per (kernel, device type, dtype). On a CPU and in float64,
where no Triton kernel runs, the log level is DEBUG.
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("hnet_kernels")

CHOICES = ("auto", "reference", "triton")
_chosen: dict[tuple[str, str, torch.dtype], str] = {}


class KernelError(RuntimeError):
    """HNET_KERNELS asks for an implementation that cannot run here."""


def wide(x: Tensor) -> Tensor:
    """x, of a floating dtype, in at least float32."""
    return x if x.dtype.itemsize >= 4 else x.float()


@functools.cache
def requested() -> str:
    """The value of `HNET_KERNELS`, read once."""
    choice = os.environ.get("HNET_KERNELS", "auto")
    if choice not in CHOICES:
        raise KernelError(f"HNET_KERNELS={choice}: expected one of {', '.join(CHOICES)}")
    return choice


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed. Asked at each operation, so looked up once."""
    return importlib.util.find_spec("triton") is not None


OPERATIONS: dict[str, "Operation"] = {}
_forced: list[bool] = []  # set by `forcing`; the last one counts


class Operation:
    """A definition in plain torch, differentiated by autograd, and a fast implementation with its own backward.

    A call runs the fast implementation on CUDA devices, except in float64. It runs the definition elsewhere and with
    `HNET_KERNELS=reference`. `uses_definition`: set by a check that found a difference. `fast_everywhere`: the
    definition takes too much time or memory for anything but checks.
    """

    fast_everywhere = False

    def __init__(self, definition: Callable[..., Any]):
        functools.update_wrapper(self, definition)
        self.definition, self.name, self.uses_definition = definition, definition.__name__, False
        OPERATIONS[self.name] = self

    def fast(self, implementation: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: registers the implementation for CUDA devices, which takes the arguments of the definition."""
        self.implementation = implementation
        return implementation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        chosen = self.implementation if self.runs_fast(first) else self.definition
        return chosen(*args, **kwargs)

    def runs_fast(self, x: Tensor) -> bool:
        if self.uses_definition:
            return False
        if _forced:
            return _forced[-1]
        if self.fast_everywhere or (x.is_cuda and x.dtype != torch.float64):
            return requested() != "reference"
        return requested() == "triton"  # the kernel then raises KernelError with the reason


def operation(definition: Callable[..., Any]) -> Operation:
    """Decorator over a definition: see `Operation`."""
    return Operation(definition)


@contextlib.contextmanager
def forcing(fast: bool) -> Iterator[None]:
    """Inside, operations run their fast implementations (or their definitions) on any device, for checks and tests.

    Without a GPU a fast implementation runs its own backward on the definitions of its kernels.
    """
    _forced.append(fast)
    try:
        yield
    finally:
        _forced.pop()


_foresees = [False]


@contextlib.contextmanager
def foreseeing() -> Iterator[None]:
    """Inside, operations on the meta device call the kernels that they would call on a GPU; nothing is launched."""
    _foresees.append(True)
    try:
        yield
    finally:
        _foresees.pop()


def takes_kernels(device_type: str) -> bool:
    """Whether Triton kernels run on tensors of a device type, or are foreseen there."""
    return device_type == "cuda" or (device_type == "meta" and _foresees[-1])


_overlaps = [True]


def kernels_overlap() -> bool:
    """Whether a kernel may begin before the previous one has ended: see `overlap` in triton_math.py."""
    return _overlaps[-1]


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """Inside, each kernel that is launched or captured begins after the previous one has ended."""
    _overlaps.append(False)
    try:
        yield
    finally:
        _overlaps.pop()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def why_unsupported(x: Tensor, widest: int | None = None) -> str | None:
    """Why a Triton kernel that needs no options for its GPU cannot run on x, or None where it can.

    widest: for a kernel that holds full rows in registers, the longest row that fits into one thread block.
    """
    if not takes_kernels(x.device.type):
        return "no CUDA device"
    if x.dtype == torch.float64:
        return "dtype float64"
    if widest is not None and x.shape[1] > widest:
        return f"rows of {x.shape[1]}, more than {widest}"
    return None if has_triton() else "no triton"


def assume_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile traces calls as constants.

    `torch.compiler.assume_constant_result` sets the same attribute (torch 2.11, 2.13), but imports torch._dynamo, which
    takes one to two seconds of every start. To be removed when it no longer does.
    """
    function._dynamo_marked_constant = True
    return function


_LIBRARY = torch.library.Library("hnet", "FRAGMENT")


def dispatched(function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Decorator: an operation of torch's dispatcher, `torch.ops.hnet.<name>`, into which torch.compile does not look.

    Its results must not share memory with its arguments. Its types come from the annotations. Give it a fake and a
    gradient with `torch.library.register_fake` and `register_autograd`.

    `torch.library.custom_op` does this too, but the first call then imports torch._dynamo, which takes a second
    (torch 2.11, 2.13).
    """
    name = function.__name__
    while hasattr(torch.ops.hnet, name):  # that of another copy of this file, such as one that transformers loaded
        name += "_"
    schema = torch.library.infer_schema(function, mutates_args=(), op_name=name)
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.hnet, name).default


@assume_constant
def use_fast(operation: str, device_type: str, dtype: torch.dtype, reason: str | None) -> bool:
    """Whether `operation` on tensors of this device type and dtype runs its fast kernel.

    `reason` says in a few words why the fast kernel cannot run on them, or is None where it can.
    Raises KernelError where `HNET_KERNELS=triton` forces a kernel that cannot run.
    """
    choice = requested()
    if choice == "triton" and reason:
        raise KernelError(f"HNET_KERNELS=triton: no fast kernel for {operation} here ({reason}); use auto")
    fast = choice != "reference" and reason is None
    if _foresees[-1]:
        return fast
    key = (operation, device_type, dtype)
    if key not in _chosen:
        _chosen[key] = "fast" if fast else "reference" + (f" ({reason})" if reason else "")
        level = logging.DEBUG if device_type == "cpu" or dtype == torch.float64 else logging.INFO
        shown = str(dtype).removeprefix("torch.")
        logger.log(level, "%s on %s %s: %s", operation, device_type, shown, _chosen[key])
    return fast


def kernel_report() -> dict[str, str]:
    """The choices made so far, such as `{"attention cuda bfloat16": "fast"}`."""
    return {f"{op} {device} {str(dtype).removeprefix('torch.')}": how for (op, device, dtype), how in _chosen.items()}
