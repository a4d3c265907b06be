"""RMS norms fused with the operation before them, forward and backward each in one pass over memory; and the residual
stream, which is stored in 24 bits per element.

Legend: T tokens, D channels. Everything is computed in at least float32.

This file has the definitions and the dispatch; the Triton kernels for GPUs are in norm_triton.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from hnet_kernels.dispatch import operation, use_fast, why_unsupported, wide
from hnet_kernels.gradients import Slot, slot_of
from hnet_kernels.recompute import mode, recomputed
from hnet_kernels.saved import save_if, save_tensor

WIDEST = 8192  # channels: a row must fit into the registers of one thread block


def _fast(operation: str, x_TD: Tensor) -> bool:
    return use_fast(operation, x_TD.device.type, x_TD.dtype, why_unsupported(x_TD, WIDEST))


def rms_norm(x_TD: "Tensor | Residual", weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, computed in at least float32, returned in the weight's dtype (the compute dtype).

    Where x is a `Residual`, the same pass also adds its pending term to the sum.
    """
    if isinstance(x_TD, Residual):
        return x_TD.norm(weight_D, eps)
    return _norm(wide(x_TD), weight_D, eps)[0]


@operation
def residual_stream(x_TD: Tensor) -> "Tensor | Residual":
    """A residual stream that starts with x: a tensor in at least float32, or a `Residual`, which acts like one."""
    return x_TD.to(torch.promote_types(x_TD.dtype, torch.float32), copy=True)


def _norm(u_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale_T1 = torch.rsqrt(u_TD.square().mean(-1, keepdim=True) + eps)
    return (u_TD * scale_T1 * weight_D).to(weight_D.dtype), scale_T1[:, 0]


def _norm_backward(dx_TD: Tensor, u_TD: Tensor, scale_T: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(du_TD, dweight_D, x_TD) of x = u * scale * weight, where scale is 1 / rms(u). dweight_D is at least float32."""
    dx_TD, unit_TD = wide(dx_TD), u_TD * scale_T[:, None]
    g_TD = dx_TD * weight_D
    du_TD = scale_T[:, None] * (g_TD - unit_TD * (g_TD * unit_TD).mean(-1, keepdim=True))
    return du_TD, (dx_TD * unit_TD).sum(0), (unit_TD * weight_D).to(weight_D.dtype)


class Split24(NamedTuple):
    """Float32 values as their high 16 bits, rounded to bfloat16, and the next 8 bits as int8.

    Where low is None, high has the values in any floating dtype. Both are contiguous and have one shape.
    """

    high: Tensor
    low: Tensor | None


def split24(x: Tensor, dtype: torch.dtype) -> Split24:
    """x as high and low bits where dtype, the compute dtype, is bfloat16; else x in that dtype.

    The error is at most 2^-16 of the value, or 2^-15 where low would have been 128.
    """
    rounded = x.to(dtype)
    if (x.dtype, dtype) != (torch.float32, torch.bfloat16):
        return Split24(rounded, None)
    low = x.view(torch.int32) - (rounded.view(torch.int16).to(torch.int32) << 16)
    return Split24(rounded, ((low + 128) >> 8).clamp_max(127).to(torch.int8))


def join24(x: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values that `split24` was given, up to its error, in their dtype."""
    if low is None:
        return x.to(dtype)
    return ((x.view(torch.int16).to(torch.int32) << 16) + (low.to(torch.int32) << 8)).view(torch.float32)


def add_norm_forward(
    residual: Split24 | None, delta_TD: Tensor, weight_D: Tensor, eps: float, save_x: bool = False
) -> tuple[Split24, Tensor, Tensor]:
    """(sum, x_TD, scale_T): sum = residual + delta, x = sum * scale * weight, scale = 1 / rms(sum).

    residual: None for zeros. It and the sum are split where delta is bfloat16, else at least float32; scale_T is at
    least float32. x_TD has weight_D's dtype. save_x: the backward will need x_TD too.
    """
    if _fast("add_norm", delta_TD):
        from hnet_kernels import norm_triton  # not above: triton is not everywhere

        sum_TD, low_TD, *others = norm_triton.add_norm_forward(
            *(residual or (None, None)), delta_TD, weight_D, eps, save_x
        )
        return Split24(sum_TD, low_TD), *others
    # without a residual and not in bfloat16, the sum may be delta itself
    wide_TD = wide(delta_TD) if residual is None else join24(*residual, wide(delta_TD).dtype) + delta_TD
    sum_ = split24(wide_TD, torch.bfloat16 if delta_TD.dtype == torch.bfloat16 else wide_TD.dtype)
    return sum_, *_norm(join24(*sum_, wide_TD.dtype), weight_D, eps)


def recompute_norm(sum_: Split24, scale_T: Tensor, weight_D: Tensor) -> Tensor:
    """x_TD of `add_norm_forward`, with the same bits."""
    if _fast("add_norm", sum_.high):
        from hnet_kernels import norm_triton

        return norm_triton.recompute_norm(*sum_, scale_T, weight_D)
    return (join24(*sum_, scale_T.dtype) * scale_T[:, None] * weight_D).to(weight_D.dtype)


def add_norm_backward(
    dx_TD: Tensor, dsum: Split24 | None, sum_: Split24, scale_T: Tensor, weight_D: Tensor, dweight: Slot,
    recompute_x: bool = True,
) -> tuple[Split24, Tensor | None]:  # fmt: skip
    """(dboth, x_TD) of `add_norm_forward`. Fills the slot of weight_D's gradient.

    dboth: the gradient of the sum, which is that of residual and of delta. x_TD: the same bits as in the forward, or
    None where `recompute_x` is False. dsum: the gradient of the sum without what comes through x_TD; None for zeros.
    dsum and dboth are split where dx_TD is bfloat16, so that gradients along a residual stream are not rounded to
    bfloat16 at each step; else they have dx_TD's dtype.
    """
    if _fast("add_norm", dx_TD):
        from hnet_kernels import norm_triton

        dboth_TD, low_TD, x_TD = norm_triton.add_norm_backward(
            dx_TD, *(dsum or (None, None)), *sum_, scale_T, weight_D, dweight, recompute_x
        )
        return Split24(dboth_TD, low_TD), x_TD
    d_TD, dweight_D, x_TD = _norm_backward(dx_TD, join24(*sum_, scale_T.dtype), scale_T, weight_D)
    if dsum is not None:
        d_TD = d_TD + join24(*dsum, d_TD.dtype)
    dweight.fill(dweight_D)
    return split24(d_TD, dx_TD.dtype), x_TD if recompute_x else None


def gated_norm_forward(
    y_TD: Tensor, z_TD: Tensor, weight_D: Tensor, eps: float, save_x: bool = False
) -> tuple[Tensor, Tensor]:
    """(x_TD, scale_T): the norm of u = y silu(z): x = u * scale * weight, scale = 1 / rms(u).

    y_TD, z_TD: one floating dtype; rows of z_TD may be parts of longer rows. x_TD has weight_D's dtype. save_x: the
    backward will need x_TD too.
    """
    if _fast("gated_norm", y_TD):
        from hnet_kernels import norm_triton

        return norm_triton.gated_norm_forward(y_TD, z_TD, weight_D, eps, save_x)
    return _norm(wide(y_TD) * F.silu(wide(z_TD)), weight_D, eps)


def gated_norm_backward(
    dx_TD: Tensor, y_TD: Tensor, z_TD: Tensor, scale_T: Tensor, weight_D: Tensor, dz_TD: Tensor, dweight: Slot,
    recompute_x: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dy_TD, x_TD) of `gated_norm_forward`; x_TD has the same bits as there, or is None where `recompute_x` is False.

    Writes z's gradient to dz_TD, whose rows may be parts of longer rows, and fills the slot of weight_D's gradient.
    """
    if _fast("gated_norm", y_TD):
        from hnet_kernels import norm_triton

        return norm_triton.gated_norm_backward(dx_TD, y_TD, z_TD, scale_T, weight_D, dz_TD, dweight, recompute_x)
    y, z = wide(y_TD), wide(z_TD)
    gate_TD = F.silu(z)
    du_TD, dweight_D, x_TD = _norm_backward(dx_TD, y * gate_TD, scale_T, weight_D)
    dz_TD.copy_(torch.ops.aten.silu_backward(du_TD * y, z))
    dweight.fill(dweight_D)
    return (du_TD * gate_TD).to(y_TD.dtype), x_TD if recompute_x else None


class _StreamSum:
    """The sum of a residual stream at one point of it: the tensor that autograd knows, and what it does not know.

    high and low: the sum, see `Split24`. Gradients of the sum are split too. Autograd passes on their high bits alone,
    and would add gradients in bfloat16. So each reader of the sum leaves its full gradient in `gradients`, and the
    backward that made the sum adds them. Each comes with the number of the backward pass that left it.
    """

    def __init__(self):
        self.high: Tensor | None = None
        self.low: Tensor | None = None
        self.gradients: list[tuple[int, Split24 | Tensor]] = []


def _add_gradient(gradients: list[tuple[int, Split24 | Tensor]], gradient: Split24 | Tensor) -> None:
    gradients.append((torch._C._current_graph_task_id(), gradient))


def _total_gradient(gradients: list[tuple[int, Split24 | Tensor]], dx_TD: Tensor) -> Split24:
    """The sum of the gradients left for a `_StreamSum`, split where dx_TD is bfloat16. Empties the list.

    dx_TD: the gradient that autograd passes on. Gradients left by another backward pass are ignored, unless one is that
    very tensor: then this pass continues where another one ended.
    """
    now, dtype = torch._C._current_graph_task_id(), dx_TD.dtype
    found = [x for number, x in gradients if number == now]
    if not found:
        same = (x for _, x in reversed(gradients) if isinstance(x, Split24) and x.high.data_ptr() == dx_TD.data_ptr())
        found = [x for x in [next(same, None)] if x is not None]
    gradients.clear()
    if not found:
        raise RuntimeError("a residual stream's sum was read by something other than rms_norm and Residual.value")
    if len(found) == 1 and isinstance(found[0], Split24):
        return found[0]
    wide_dtype = torch.promote_types(dtype, torch.float32)
    tensors = [join24(*x, wide_dtype) if isinstance(x, Split24) else x for x in found]
    return split24(sum(tensors), dtype)


class AddNorm(torch.autograd.Function):
    """Adds delta to a sum and returns the norm of the result. Gradients: of the sum, of delta and of the weight."""

    @staticmethod
    def forward(ctx, how, before: _StreamSum | None, after: _StreamSum, _, delta_TD: Tensor, weight_D: Tensor):
        eps, saves_x = how
        ctx.set_materialize_grads(False)
        residual = None if before is None else Split24(before.high.detach(), before.low)
        with save_if(saves_x is not None):
            sum_, x_TD, scale_T = add_norm_forward(residual, delta_TD.detach(), weight_D, eps, bool(saves_x))
        if saves_x is not None:
            sum_, scale_T = Split24(*(None if x is None else save_tensor(x) for x in sum_)), save_tensor(scale_T)
        if sum_.high.data_ptr() == delta_TD.data_ptr():  # an output must not be an input
            sum_ = Split24(sum_.high.clone(), sum_.low)
        after.low, after.scale_T = sum_.low, scale_T
        ctx.save_for_backward(sum_.high, sum_.low, scale_T, weight_D)
        ctx.before, ctx.after = None if before is None else before.gradients, after.gradients
        ctx.slot = slot_of("norm", weight_D)
        return x_TD, sum_.high

    @staticmethod
    def backward(ctx, dx_TD: Tensor | None, dsum_TD: Tensor | None):
        sum_TD, low_TD, scale_T, weight_D = ctx.saved_tensors
        dsum = None if dsum_TD is None else _total_gradient(ctx.after, dsum_TD)
        if dx_TD is None:
            dboth, dweight_D = dsum, None
        else:
            sum_ = Split24(sum_TD, low_TD)
            dboth, _ = add_norm_backward(dx_TD, dsum, sum_, scale_T, weight_D, ctx.slot, recompute_x=False)
            (dweight_D,) = ctx.slot.gradients()
        if ctx.before is None:
            return None, None, None, None, dboth.high, dweight_D
        _add_gradient(ctx.before, dboth)
        return None, None, None, dboth.high, dboth.high, dweight_D


class ReadSum(torch.autograd.Function):
    """A sum of a residual stream as a tensor in at least float32."""

    @staticmethod
    def forward(ctx, sum_: _StreamSum, x_TD: Tensor):
        ctx.gradients, ctx.dtype = sum_.gradients, x_TD.dtype
        return join24(x_TD, sum_.low, torch.promote_types(x_TD.dtype, torch.float32))

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        _add_gradient(ctx.gradients, dx_TD)
        return None, dx_TD.to(ctx.dtype)


class ReplacedSum(torch.autograd.Function):
    """The sum of `before`, as `after` has it, where another tensor took its place, such as by hooks of FSDP or at the
    cut between two backward parts. Gradient: that of `after`, as one gradient of `before`.
    """

    @staticmethod
    def forward(ctx, before: _StreamSum, after: _StreamSum, x_TD: Tensor) -> Tensor:
        ctx.before, ctx.after = before.gradients, after.gradients
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        gradient = _total_gradient(ctx.after, dx_TD)
        _add_gradient(ctx.before, gradient)
        return None, None, gradient.high


class Residual:
    """A residual stream: the sum of what blocks have added, and the term that the last block adds.

    It acts like the tensor in at least float32 that `value` returns. The addition waits for the next `rms_norm`, which
    does both in one pass. With bfloat16 the sum takes three bytes per element, not four.
    """

    def __init__(self, delta_TD: Tensor | None, sum_: _StreamSum | None = None):
        self._delta_TD, self._sum = delta_TD, sum_

    def value(self) -> Tensor:
        """The stream as a tensor in at least float32, with its gradient."""
        if self._sum is None:
            return self._delta_TD.to(torch.promote_types(self._delta_TD.dtype, torch.float32), copy=True)
        sum_TD = ReadSum.apply(self._sum, self._sum.high)
        return sum_TD if self._delta_TD is None else sum_TD + self._delta_TD

    def norm(self, weight_D: Tensor, eps: float) -> Tensor:
        """`rms_norm` of the stream. It adds the pending term to the sum."""
        if self._delta_TD is None:
            return rms_norm(self.value(), weight_D, eps)
        after, how = _StreamSum(), mode()
        saves_x = {"none": True, "selective": False, "block": False}[how] if torch.is_grad_enabled() else None
        x = None if self._sum is None else self._sum.high
        x_TD, after.high = AddNorm.apply((eps, saves_x), self._sum, after, x, self._delta_TD, weight_D)
        if how != "none":
            sum_, scale_T = Split24(after.high.detach(), after.low), after.scale_T
            weight_D = save_tensor(weight_D.detach())
            recomputed(x_TD, lambda: recompute_norm(sum_, scale_T, weight_D))
        del after.scale_T
        self._delta_TD, self._sum = None, after
        return x_TD

    def __add__(self, other):
        like = self._sum.high if self._delta_TD is None else self._delta_TD
        if self._delta_TD is None and isinstance(other, Tensor) and other.dtype == like.dtype:
            return Residual(other, self._sum) if other.shape == like.shape else self.value() + other
        return self.value() + (other.value() if isinstance(other, Residual) else other)

    __radd__ = __add__

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.add, Tensor.add, Tensor.__add__) and len(args) == 2 and not kwargs:
            return args[1] + args[0] if isinstance(args[1], Residual) else args[0] + args[1]
        args, kwargs = pytree.tree_map_only(
            Residual, Residual.value, (args, kwargs or {}), is_leaf=lambda x: isinstance(x, Residual)
        )
        return function(*args, **kwargs)


def _as_tensor(name: str):
    def call(self, *args):
        return getattr(self.value(), name)(*(x.value() if isinstance(x, Residual) else x for x in args))

    return call


for _name in (
    *("__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__pow__", "__neg__", "__matmul__"),
    *("__getitem__", "__len__", "__lt__", "__le__", "__gt__", "__ge__", "__float__", "__bool__"),
):
    setattr(Residual, _name, _as_tensor(_name))

# FSDP looks for tensors in the arguments and results of modules
pytree.register_pytree_node(
    Residual,
    lambda residual: (
        [residual._delta_TD, None if residual._sum is None else residual._sum.high],
        residual._sum,
    ),
    lambda tensors, sum_: Residual(tensors[0], _with_high(sum_, tensors[1])),
)


def _with_high(sum_: _StreamSum | None, x: Tensor | None) -> _StreamSum | None:
    if sum_ is None or x is sum_.high:
        return sum_
    other = _StreamSum()
    other.low = sum_.low
    other.high = ReplacedSum.apply(sum_, other, x)
    return other


@residual_stream.fast
def _(x_TD: Tensor) -> Residual:
    return Residual(x_TD)
