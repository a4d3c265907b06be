"""Matrix products with weights, and the embeddings.

Legend: T tokens, I and O channels in and out, V vocabulary, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hnet_kernels.dispatch import operation, takes_kernels, use_fast, why_unsupported
from hnet_kernels.gradients import destination_of, slot_of, write_product
from hnet_kernels.pointwise import to_float32
from hnet_kernels.recompute import mode, recomputed_from, recomputed_of, save, saved
from hnet_kernels.saved import save_tensor, saved_empty


def _compiled_rows(x_TI: Tensor, weight_OI: Tensor) -> Tensor | None:
    """x W^T of one or two rows on a CPU, as torch.compile computes it fastest; None where it does not apply.

    Its loop reads the weights at twice the speed of MKL, which it would otherwise call.
    """
    if not torch.compiler.is_compiling() or torch.is_grad_enabled() or x_TI.device.type != "cpu":
        return None
    if x_TI.ndim != 2 or not 0 < len(x_TI) <= 2:
        return None
    return (x_TI[:, None] * weight_OI).sum(-1)


@operation
def linear(x_TI: Tensor, weight_OI: Tensor, is_saved: bool = False) -> Tensor:
    """x W^T, in one floating dtype.

    is_saved: the next operation saves the result for its backward. This decides where the result is allocated, and that
    `block` recomputes it; it does not change the result.
    """
    if (y_TO := _compiled_rows(x_TI, weight_OI)) is not None:
        return y_TO
    return F.linear(x_TI, weight_OI)


class Linear(torch.autograd.Function):
    """Gradients: of x and W."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: Tensor, is_saved: bool) -> Tensor:
        save(ctx, x_TI, weight_OI)
        ctx.destination = destination_of(weight_OI) if ctx.needs_input_grad[1] else None
        if not is_saved:
            return x_TI @ weight_OI.T
        return torch.mm(x_TI, weight_OI.T, out=saved_empty(x_TI, len(x_TI), len(weight_OI)))

    @staticmethod
    def backward(ctx, dy_TO: Tensor):
        x_TI, weight_OI = saved(ctx)
        of_x, of_weight, _ = ctx.needs_input_grad
        dx_TI = dy_TO @ weight_OI if of_x else None
        return dx_TI, write_product(dy_TO, x_TI, weight_OI, ctx.destination) if of_weight else None, None


def _few_rows(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor | None:
    """x W^T + bias by a kernel for one or two rows, as generation has them; None where it does not apply."""
    if torch.is_grad_enabled() or x_TI.ndim != 2 or not 0 < len(x_TI) <= 2 or not takes_kernels(x_TI.device.type):
        return None
    if not (x_TI.is_contiguous() and weight_OI.is_contiguous()):
        return None
    if not use_fast("few_rows", x_TI.device.type, weight_OI.dtype, why_unsupported(weight_OI)):
        return None
    from hnet_kernels import linear_triton  # not above: triton is not everywhere

    return linear_triton.few_rows(x_TI, weight_OI, bias_O)


@linear.fast
def _(x_TI: Tensor, weight_OI: Tensor, is_saved: bool = False) -> Tensor:
    if (y_TO := _few_rows(x_TI, weight_OI)) is not None:
        return y_TO
    if x_TI.ndim != 2 or x_TI.dtype != weight_OI.dtype:
        return F.linear(x_TI, weight_OI)
    how = mode()
    y_TO = Linear.apply(x_TI, weight_OI, is_saved and how != "block")
    if is_saved and how == "block" and recomputed_of(x_TI):
        weight_OI = save_tensor(weight_OI.detach())
        return recomputed_from(y_TO, x_TI, lambda x_TI: x_TI @ weight_OI.T)
    return y_TO


@operation
def wide_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """x W^T + bias in W's dtype, at least float32; x may have another. On a GPU the product may use TF32."""
    x_TI = x_TI.to(weight_OI.dtype)
    if (y_TO := _compiled_rows(x_TI, weight_OI)) is not None:
        return y_TO + bias_O
    return F.linear(x_TI, weight_OI, bias_O)


class WideLinear(torch.autograd.Function):
    """Gradients: of x, W and the bias. The gradient of the result is rounded to x's dtype."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        save(ctx, x_TI, weight_OI)
        ctx.destination, ctx.slot = destination_of(weight_OI), slot_of("bias", bias_O)
        ctx.destination_of_x = destination_of(x_TI)
        return torch.addmm(bias_O, to_float32(x_TI.contiguous()).to(weight_OI.dtype), weight_OI.T)

    @staticmethod
    def backward(ctx, dy_TO: Tensor):
        x_TI, weight_OI = saved(ctx)
        dy_TO = dy_TO.to(x_TI.dtype)
        dbias_1O = weight_OI.new_empty(1, len(weight_OI))
        ones_1T = dy_TO.new_ones(1, len(dy_TO))
        if dy_TO.dtype == dbias_1O.dtype:
            torch.mm(ones_1T, dy_TO, out=dbias_1O)
        elif dy_TO.is_cuda:  # at most half the time of torch's sum
            torch.mm(ones_1T, dy_TO, out_dtype=dbias_1O.dtype, out=dbias_1O)
        else:
            torch.sum(dy_TO, 0, keepdim=True, dtype=dbias_1O.dtype, out=dbias_1O)
        ctx.slot.fill(dbias_1O)
        weight_in_x = weight_OI.to(dy_TO.dtype)
        if ctx.destination_of_x is None:
            dx_TI = dy_TO @ weight_in_x
        else:
            dx_TI, ctx.destination_of_x.written = None, True
            torch.mm(dy_TO, weight_in_x, out=ctx.destination_of_x.tensor)
        return dx_TI, write_product(dy_TO, x_TI, weight_OI, ctx.destination), *ctx.slot.gradients()


@wide_linear.fast
def _(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    y_TO = _few_rows(x_TI, weight_OI, bias_O)
    return WideLinear.apply(x_TI, weight_OI, bias_O) if y_TO is None else y_TO


@operation
def embed(iids_T: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows of the embeddings. iids: int64, of any shape."""
    return F.embedding(iids_T, weight_VD)


class Embed(torch.autograd.Function):
    """Gradient: of the embeddings, as a matrix product with one-hot rows, whose order of summation is fixed."""

    @staticmethod
    def forward(ctx, iids_T: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(iids_T, weight_VD)
        ctx.destination = destination_of(weight_VD)
        return weight_VD[iids_T]

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        iids_T, weight_VD = ctx.saved_tensors
        hot_TV = dx_TD.new_zeros(len(iids_T), len(weight_VD)).scatter_(1, iids_T[:, None], 1.0)
        return None, write_product(hot_TV, dx_TD, weight_VD, ctx.destination)


@embed.fast
def _(iids_T: Tensor, weight_VD: Tensor) -> Tensor:
    return Embed.apply(iids_T, weight_VD) if iids_T.ndim == 1 else F.embedding(iids_T, weight_VD)


@operation
def widen(x_CD: Tensor, pad_E: Tensor) -> Tensor:
    """x with `pad` appended to each row: (C, D) and (E,) -> (C, D + E)."""
    return torch.cat([x_CD, pad_E.to(x_CD.dtype).expand(*x_CD.shape[:-1], -1)], dim=-1)


class Widen(torch.autograd.Function):
    """Gradients: of x and of pad."""

    @staticmethod
    def forward(ctx, x_CD: Tensor, pad_E: Tensor) -> Tensor:
        ctx.width, ctx.slot, ctx.dtype = x_CD.shape[1], slot_of("pad", pad_E), pad_E.dtype
        return torch.cat([x_CD, pad_E.to(x_CD.dtype).expand(len(x_CD), -1)], dim=-1)

    @staticmethod
    def backward(ctx, dout: Tensor):
        dpad_E = (dout.new_ones(1, len(dout)) @ dout[:, ctx.width :])[0]  # faster than torch's sum
        ctx.slot.fill(dpad_E.to(ctx.dtype))
        return dout[:, : ctx.width], *ctx.slot.gradients()


@widen.fast
def _(x_CD: Tensor, pad_E: Tensor) -> Tensor:
    return Widen.apply(x_CD, pad_E) if x_CD.ndim == 2 else widen.definition(x_CD, pad_E)
