"""Launches of Triton kernels that take the CPU little time.

Triton's own launch takes 50 to 90 microseconds of Python, and a training step has a few hundred launches. Most of this
work is needed only once per kernel: Triton parses options into a key, compares global constants and calls hooks.
`kernel`, used instead of `triton.jit`, makes a kernel that stores what Triton has compiled. A later call computes how
Triton would specialise the arguments (dtypes, pointers and integers that 16 divides, integers that are 1, constants),
looks this up, and calls the compiled kernel's launcher. So a kernel compiled for other arguments is never launched.

A kernel assumes that the elements of a vector are adjacent, and those of each row of a matrix. So the caller passes
`x.contiguous()` or `dense_rows(x)`: a view such as the one that `expand` returns would be read beyond its end.

This relies on internals that are the same in Triton 3.6 and 3.7. With another version, or while launches are watched or
kernels debugged, Triton makes the launches itself.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITCallable, JITFunction, native_specialize_impl
from triton.tools.tensor_descriptor import TensorDescriptor

from hnet_kernels import cards

logger = logging.getLogger("hnet_kernels")

if architecture := cards.imitated_architecture():
    knobs.runtime.override_arch = architecture

KNOWN = ("3.6.", "3.7.")  # versions of Triton whose binder and launcher are as `Kernel` expects


def kernel(function: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`, for functions that are launched from Python. Those that kernels call need no more than that."""
    if function is None:
        return functools.partial(kernel, **options)
    if knobs.runtime.interpret or not _is_known(triton.__version__):
        return triton.jit(function, **options)
    return Kernel(function, **options)


@functools.cache
def _is_known(version: str) -> bool:
    if version.startswith(KNOWN):
        return True
    said = "Triton %s launches the kernels, which takes the CPU longer: our own launches need one of %s"
    logger.info(said, version, KNOWN)
    return False


def _is_watched() -> bool:
    """Whether a launch must also call a hook, or kernels are debugged or instrumented."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


@functools.cache
def _specialisation(types: tuple[type, ...]) -> Callable[..., tuple]:
    """A function from arguments of these types to what Triton specialises a kernel for, whatever `do_not_specialize`.

    For a tensor this is the dtype and whether 16 divides the address; for an integer whether 16 divides it, whether it
    is 1, and how many bits it takes; for others what Triton returns. It is generated code, as it runs at each launch.
    """
    terms = []
    for i, kind in enumerate(types):
        if issubclass(kind, Tensor):
            terms += [f"x{i}.dtype", f"x{i}.data_ptr() % 16 == 0"]
        elif kind is int:
            terms += [f"x{i} % 16 == 0", f"x{i} == 1", f"x{i} >> 31"]
        elif kind not in (float, type(None)):
            terms.append(f"specialise(BaseBackend, x{i}, False, True, True)")
    names = {"specialise": native_specialize_impl, "BaseBackend": BaseBackend}
    return eval(
        f"lambda {', '.join(f'x{i}' for i in range(len(types)))}: ({''.join(f'{term}, ' for term in terms)})", names
    )


class Launch(NamedTuple):
    """A launch that was recorded instead of made, with tensors that may be on the meta device."""

    kernel: "Kernel"
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def kind(self) -> tuple:
        """A key that is equal for launches of the same compiled kernel."""
        types = tuple(map(type, self.args))
        return self.kernel, types, *self.options, *self.options.values(), _specialisation(types)(*self.args)


_noted: list[Launch] | None = None
_before_first: Callable[[], None] | None = None


def before_first_launch(call: Callable[[], None]) -> None:
    """Calls this once, before the next launch of a kernel that has not been launched for such arguments."""
    global _before_first
    _before_first = call


def _call_before_first() -> None:
    global _before_first
    call, _before_first = _before_first, None
    if call:
        call()


@contextlib.contextmanager
def noting() -> Iterator[list[Launch]]:
    """Inside, launches are recorded in the returned list instead of being made."""
    global _noted
    _noted = found = []
    try:
        yield found
    finally:
        _noted = None


def _know_functions(module: dict[str, Any]) -> None:
    """Computes the cache keys of the functions that a module's kernels call, those of imported modules first."""
    for value in list(module.values()):
        if isinstance(value, JITCallable) and not isinstance(value, Kernel) and value.hash is None:
            if value.__globals__ is not module:
                _know_functions(value.__globals__)
            value.cache_key  # noqa: B018 (a property that remembers)


class Kernel(JITFunction):
    """A kernel whose later calls launch what Triton compiled at the first call with such arguments.

    Pass constants by name and all other arguments by position; otherwise Triton makes every launch. Options such as
    num_warps must be hashable.
    """

    def __init__(self, function: Callable, **options: Any):
        super().__init__(function, **options)
        self.compiled: dict[tuple, tuple[Any, ...]] = {}

    @property
    def cache_key(self) -> str:
        """Triton's name of the source in its cache, which is the same in whichever order kernels are compiled.

        Triton leaves the global constants of a function out of the key of one that calls it, unless it knows them from
        an earlier kernel: `_update_hash` reads `used_global_vals` before `cache_key`, which fills it, in
        github.com/triton-lang/triton/blob/main/python/triton/runtime/jit.py (3.6 and 3.7). So it is asked for those of
        a module's functions first. This can go when it reads them in the other order.
        """
        if self.hash is None:
            _know_functions(self.__globals__)
        return super().cache_key

    def __getitem__(self, grid: Sequence[int] | Callable[[dict], Sequence[int]]) -> Callable[..., Any]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: Sequence[int] | Callable[[dict], Sequence[int]], *args: Any, **options: Any) -> None:
        if _noted is not None:
            _noted.append(Launch(self, args, options))
            return
        active = driver.active
        device = active.get_current_device()
        types = tuple(map(type, args))
        key = device, types, *options, *options.values(), _specialisation(types)(*args)
        found = self.compiled.get(key)
        if found is None or self.pre_run_hooks or _is_watched():
            _call_before_first()
            variant = self.run(*args, grid=grid, warmup=False, **options)
            self._remember(key, variant, len(args), options)
            return
        launcher, function, metadata, constants = found
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, (*args, *constants))))
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        launcher(x, y, z, stream, function, metadata, None, None, None, *args, *constants)

    def _remember(self, key: tuple, variant: Any, n: int, options: dict[str, Any]) -> None:
        """variant: the compiled kernel that Triton has launched, for n arguments by position and others by name."""
        given, others = self.params[:n], self.params[n:]
        if any(p.is_constexpr for p in given) or not all(p.is_constexpr for p in others):
            return
        backend = type(self.device_caches[key[0]][3])
        if backend.get_tensor_specialization is not BaseBackend.get_tensor_specialization:
            return  # a GPU for which tensors are specialised by more than `_specialisation` knows
        if isinstance(variant, CompiledKernel):  # not one whose compilation goes on in the background
            constants = tuple(options.get(p.name, p.default) for p in others)
            self.compiled[key] = variant.run, variant.function, variant.packed_metadata, constants


@functools.cache
def row_width(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The number of elements of a row of this shape, or None where they are not adjacent in memory."""
    width = 1
    for size, stride in zip(reversed(shape), reversed(strides)):
        if size > 1 and stride != width:
            return None
        width *= size
    return width


_widths: dict[tuple, int] = {}  # of matrices that Triton's checks have passed


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The descriptor of a (T, ...) tensor as a matrix (T, W), in tiles of (rows, columns).

    Triton checks each shape and layout once. Raises AssertionError where the tensor can have no descriptor.
    """
    shape, strides = x.shape, x.stride()
    T, stride, key = shape[0], strides[0], (x.dtype, shape[1:], strides, rows, columns)
    width = _widths.get(key)
    if width is None or not T or x.data_ptr() % 16:
        width = row_width(shape[1:], strides[1:])
        assert width is not None, f"rows are not dense: shape {tuple(shape)}, strides {strides}"
        checked = TensorDescriptor(x, [T, width], [stride, 1], [rows, columns])
        _widths[key] = width
        return checked
    found = TensorDescriptor.__new__(TensorDescriptor)  # for what is not set, a dataclass has its defaults
    found.base, found.shape, found.strides, found.block_shape = x, [T, width], [stride, 1], [rows, columns]
    return found


# a matrix (rows, width) for kernels that compute addresses: its memory, rows, width, and the stride of rows
Pointers = tuple[Tensor, int, int, int]
Rows = TensorDescriptor | Pointers


def rows_of(x: Tensor, rows: int, columns: int) -> Rows:
    """A (T, ...) tensor as a matrix (T, W), as kernels read or write it in tiles of (rows, columns)."""
    if cards.has_descriptors(x.device, x.dtype):
        return descriptor(x, rows, columns)
    width = row_width(x.shape[1:], x.stride()[1:])
    assert width is not None, f"rows are not dense: shape {tuple(x.shape)}, strides {x.stride()}"
    return x, len(x), width, x.stride(0)


_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """`torch.cuda.device_of(x)`, which takes longer, unless that device is the current one as it mostly is."""
    return _HERE if x.is_cuda and x.get_device() == torch.cuda.current_device() else torch.cuda.device_of(x)


def dense_rows(x_TD: Tensor) -> Tensor:
    """x, or its copy where the elements of a row are not adjacent in memory."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def cdiv(n: int, size: int) -> int:
    """n / size, rounded up. `triton.cdiv` can run in kernels too, and on the host takes ten times as long."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more, for n of 1 or more."""
    return 1 << (n - 1).bit_length()
