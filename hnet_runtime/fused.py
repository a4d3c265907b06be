"""The model with its backward written out: what hnet_trainable.py computes, in fewer passes over memory.

A block is one or two branches, a mixer and perhaps an MLP, each behind a norm. Here a branch takes `delta`, what the
branch before it adds to the residual stream; so the sum and the norm of it are one kernel, and backwards too. The sum's
gradient is that of each of its terms: autograd hands it on as that of delta, and a `ResidualStream` has the rest.
Gradients of parts of a matrix product's output are written into one tensor. The maths is that of hnet_trainable.py;
tests compare the two in float64. But with bfloat16 a residual stream and its gradient have 16 significant bits in
memory, not float32's 24: see `Parted`. Legend: as in hnet_trainable.py.

Gradients of weights that are matrix products can go straight to where an optimizer reads them, see `gradients_into`.
Those of small weights, such as a norm's, are sums of parts, which wait for those of all other layers: branches leave
them in slots, and `SmallWeights` hands them on.

Activation checkpointing is part of a branch's backward, which computes again what its forward did not keep. Behind the
sum every branch keeps all that its backward reads (`none`); or what comes of its first product, of attention and of the
scan (`selective`: the rest takes little time to compute); or nothing (`block`). What enters a weight's product and is
not kept, such as a norm, is written by the kernel that has read its inputs for their gradients anyway. The results are
the same bits.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hnet_kernels import ema_backward, ema_forward
from hnet_kernels.attention import Attended, packed_attention, packed_attention_backward, tile_order
from hnet_kernels.boundaries import Boundaries, add_ratio_gradient, find_boundaries
from hnet_kernels.conv import causal_conv_silu_backward_to, causal_conv_silu_forward
from hnet_kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward
from hnet_kernels.dispatch import wide
from hnet_kernels.kept import keep, keeping_if, kept_empty
from hnet_kernels.norm import (
    Parted,
    add_norm_backward,
    add_norm_forward,
    gated_norm_backward,
    gated_norm_forward,
    norm_again,
)
from hnet_kernels.pointwise import rotate_, swiglu_backward, swiglu_forward, to_float32
from hnet_kernels.router import (
    add_rows_,
    boundary_backward,
    boundary_forward,
    take_rows,
    upsample_backward,
    upsample_forward,
)
from hnet_kernels.ssd import mamba2_scan_backward, mamba2_scan_forward
from hnet_kernels.sums import Slot, Sums
from hnet_trainable import (
    EMA_CLAMP,
    HEADDIM,
    NORM_EPS,
    CausalConv1d,
    GatedRMSNorm,
    HNet,
    HNetLM,
    Isotropic,
    Mamba2,
    Packing,
    RMSNorm,
    RoutingModule,
    StageOutput,
    cu_seqlens,
    nested_like,
    on_values,
    positions,
)

CHECKPOINTING = ("none", "selective", "block")


def fuse(model: HNetLM, ac: str = "none") -> None:
    """Let the model compute as is written here: its stacks of blocks, routers, ways out of a stage, and embeddings.

    ac: activation checkpointing of the blocks, one of CHECKPOINTING.
    """
    for module in model.modules():
        if isinstance(module, Isotropic):
            module.forward = functools.partial(run_stack, module, ac)
        elif isinstance(module, RoutingModule):
            module.forward = functools.partial(_route, module)
        elif isinstance(module, HNet):
            module.leave = functools.partial(_leave, module)
    model.embeddings.forward = functools.partial(_embed, model.embeddings)


_TARGETS: ContextVar[dict[Tensor, Tensor]] = ContextVar("targets")


@contextlib.contextmanager
def gradients_into(targets: dict[Tensor, Tensor]) -> Iterator[None]:
    """Where forwards inside find a weight in `targets` (weight: contiguous tensor of its shape; its dtype or float32),
    their backward writes its gradient there, over what was there, and returns None for it.

    They take what they find out of `targets`, so a weight is written for its first use alone; those that are left have
    gradients as ever.
    """
    token = _TARGETS.set(targets)
    try:
        yield
    finally:
        _TARGETS.reset(token)


_SEAMS: ContextVar[dict[nn.Module, Tensor | None]] = ContextVar("seams")


@contextlib.contextmanager
def noting_seams(seams: dict[nn.Module, Tensor | None]) -> Iterator[None]:
    """Where forwards inside come to a block in `seams`, they note there the `delta` that enters it.

    So a backward can stop at this tensor and go on from it later.
    """
    token = _SEAMS.set(seams)
    try:
        yield
    finally:
        _SEAMS.reset(token)


def _take_targets(*weights: Tensor) -> list[Tensor | None]:
    return [_TARGETS.get({}).pop(weight, None) for weight in weights]


def _product(dy_OT: Tensor, x_TI: Tensor, target_OI: Tensor | None) -> Tensor | None:
    """A weight's gradient; None where it has been written to a target, in the target's dtype from the sums on."""
    if target_OI is None:
        return dy_OT @ x_TI
    if target_OI.dtype == x_TI.dtype:
        torch.mm(dy_OT, x_TI, out=target_OI)
    elif x_TI.is_cuda:
        torch.mm(dy_OT, x_TI, out_dtype=target_OI.dtype, out=target_OI)
    else:
        torch.mm(dy_OT.to(target_OI.dtype), x_TI.to(target_OI.dtype), out=target_OI)
    return None


def _kept_product(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T, in memory for what a forward keeps."""
    return torch.mm(x_TI, weight_OI.T, out=kept_empty(x_TI, len(x_TI), len(weight_OI)))


def _embed(embeddings: nn.Embedding, iids: Tensor) -> Tensor:
    return nested_like(Embed.apply(iids.values(), embeddings.weight), iids)


def _route(router: RoutingModule, x_BjD: Tensor) -> StageOutput:
    weights = router.q_proj_layer.weight, router.k_proj_layer.weight
    p_T = Route.apply(x_BjD.values(), positions(x_BjD), *weights)
    p_Bj, b_T = nested_like(p_T, x_BjD), p_T.detach() > 0.5
    return StageOutput(p_Bj, nested_like(b_T, p_Bj), b_T.to(p_T.dtype).mean(), p_T.mean())


def _leave(hnet: HNet, y_BkD: Tensor, stage: StageOutput, residual_BjD: Tensor) -> Tensor:
    p_Bj, y_CD = stage.boundary_prob, y_BkD.values()
    p_T, b_T = p_Bj.values(), stage.boundary_mask.values()
    start_C = torch.nonzero_static(b_T, size=len(y_CD)).squeeze(1)
    z_CD = Smooth.apply(y_CD, Take.apply(p_T, start_C, None).clamp(EMA_CLAMP, 1 - EMA_CLAMP), cu_seqlens(y_BkD))
    x_TD = Upsample.apply(z_CD, p_T, b_T, b_T.cumsum(0) - 1, start_C, residual_BjD.values(), None, y_CD.dtype, None)
    return hnet.narrow(on_values(hnet.decoder, nested_like(x_TD, p_Bj)))


class Embed(torch.autograd.Function):
    """Rows of the embeddings. Gradient: of them, as a product with one-hot rows, whose sum has no order to vary."""

    @staticmethod
    def forward(ctx, iids_T: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(iids_T)
        ctx.V, ctx.targets = len(weight_VD), _take_targets(weight_VD)
        return weight_VD[iids_T]

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        (iids_T,) = ctx.saved_tensors
        hot_TV = dx_TD.new_zeros(len(iids_T), ctx.V).scatter_(1, iids_T[:, None], 1.0)
        return None, _product(hot_TV.T, dx_TD, *ctx.targets)


class HeadLoss(torch.autograd.Function):
    """The mean cross entropy of x W^T, computed in float32 at least: x_TD, W_VD, labels_T (int64, 0 to V - 1) -> ().

    Gradients: of x and W.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        logits_TV = x_TD @ weight_VD.T
        loss_T, lse_T = cross_entropy_forward(logits_TV, labels_T)
        ctx.save_for_backward(x_TD, weight_VD, labels_T, logits_TV, lse_T)
        ctx.targets = _take_targets(weight_VD)
        return loss_T.mean()

    @staticmethod
    def backward(ctx, dloss: Tensor):
        x_TD, weight_VD, labels_T, logits_TV, lse_T = ctx.saved_tensors
        dlogits_TV = cross_entropy_backward(dloss / len(labels_T), logits_TV, labels_T, lse_T)
        return dlogits_TV @ weight_VD, _product(dlogits_TV.T, x_TD, *ctx.targets), None


class Route(torch.autograd.Function):
    """Router (eq. 4): x_TD -> p_T. Gradients: of x and both weights; what has none: see `BoundaryProbability`."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, position_T: Tensor, Wq: Tensor, Wk: Tensor) -> Tensor:
        q_TD, k_TD = _kept_product(x_TD, Wq), _kept_product(x_TD, Wk)
        ctx.save_for_backward(x_TD, q_TD, k_TD, position_T, Wq, Wk)
        ctx.targets = _take_targets(Wq, Wk)
        return boundary_forward(q_TD, k_TD, position_T)

    @staticmethod
    def backward(ctx, dp_T: Tensor):
        x_TD, q_TD, k_TD, position_T, Wq, Wk = ctx.saved_tensors
        dq_TD, dk_TD = boundary_backward(dp_T, q_TD, k_TD, position_T)
        products = (_product(d_TD.T, x_TD, target) for d_TD, target in zip((dq_TD, dk_TD), ctx.targets))
        return (dq_TD @ Wq).addmm_(dk_TD, Wk), None, *products


class Cut(torch.autograd.Function):
    """Where chunks begin, and what follows from that, see `find_boundaries`: p_T -> (p_T as it lies there, ratio loss).

    Gradient: of p; the ratio loss's through G alone.
    """

    @staticmethod
    def forward(
        ctx, p_T: Tensor, position_T: Tensor, cu: Tensor, N: float, to: Boundaries, forced_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        find_boundaries(p_T, position_T, cu, N, to, forced_T)
        ctx.save_for_backward(to.losses, cu)
        ctx.N = N
        return to.p_T[:-1].detach(), to.losses[0].detach()

    @staticmethod
    def backward(ctx, dp_T: Tensor, dratio: Tensor):
        return add_ratio_gradient(dp_T, dratio, *ctx.saved_tensors, ctx.N), None, None, None, None, None


class Take(torch.autograd.Function):
    """Rows of x at some places, (T, ...) -> (C, ...); (T, D) with pad behind each row. Gradients: of x and pad.

    A target's rows get the gradient added to what lies there; each place is asked for once, or its gradient is zero.
    """

    @staticmethod
    def forward(ctx, x: Tensor, place_C: Tensor, pad_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(place_C)
        ctx.like, ctx.targets = x.detach(), _take_targets(x)
        rows_CD = take_rows(x.view(len(x), -1), place_C, pad_E)
        return rows_CD if pad_E is not None else rows_CD.view(-1, *x.shape[1:])

    @staticmethod
    def backward(ctx, dout: Tensor):
        (place_C,), (target,) = ctx.saved_tensors, ctx.targets
        dx = torch.zeros_like(ctx.like) if target is None else target
        dx_TD, drows_CD, dpad_E = dx.view(len(dx), -1), dout.reshape(len(dout), -1), None
        D = dx_TD.shape[1]
        add_rows_(dx_TD, place_C, drows_CD[:, :D])
        if ctx.needs_input_grad[2]:
            dpad_E = (dout.new_ones(1, len(dout)) @ drows_CD[:, D:])[0]  # faster than torch's sum
        return dx if target is None else None, None, dpad_E


class Put(torch.autograd.Function):
    """Moves x to where others find it, and goes on with it there."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, place_TD: Tensor) -> Tensor:
        return place_TD.copy_(x_TD)

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        return dx_TD, None


class ResidualProjection(torch.autograd.Function):
    """Writes x W^T + bias to residual_TD, in W's dtype: float32 whatever x has.

    Returns proxy_TD, which stands for it in the backward and has no numbers: the residual's gradient is that of what it
    is added up to, see `Upsample`, and so has x's dtype. Gradients: of x and W to their targets, which there must be
    (see `gradients_into`), and of bias; x's with W rounded to x's dtype.
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_DD: Tensor, bias_D: Tensor, residual_TD: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_DD)
        ctx.targets = _take_targets(weight_DD, x_TD)
        torch.addmm(bias_D, to_float32(x_TD).to(weight_DD.dtype), weight_DD.T, out=residual_TD)
        return x_TD.new_zeros(()).expand(residual_TD.shape)

    @staticmethod
    def backward(ctx, dout_TD: Tensor):
        (x_TD, weight_DD), (into_weight, into_x) = ctx.saved_tensors, ctx.targets
        _product(dout_TD.T, x_TD, into_weight)  # both factors have x's dtype: nothing is rounded for that
        torch.mm(dout_TD, weight_DD.to(dout_TD.dtype), out=into_x)  # a gradient of x's dtype, as any other product's
        dbias_1D = weight_DD.new_empty(1, len(weight_DD))
        _product(dout_TD.new_ones(1, len(dout_TD)), dout_TD, dbias_1D)  # half the time of torch's sum, or less
        return None, None, dbias_1D[0], None


class Smooth(torch.autograd.Function):
    """Smoothing (eq. 5): y_CD, P_C strictly between 0 and 1 -> z_CD in P's dtype. Gradients: of y and P."""

    @staticmethod
    def forward(ctx, y_CD: Tensor, P_C: Tensor, cu: Tensor) -> Tensor:
        z_CD = ema_forward(y_CD, P_C, cu)
        ctx.save_for_backward(y_CD, P_C, z_CD, cu)
        return z_CD

    @staticmethod
    def backward(ctx, dz_CD: Tensor):
        return *ema_backward(dz_CD, *ctx.saved_tensors), None


class Upsample(torch.autograd.Function):
    """Upsampling and residual (eq. 6 to 9): z_CD, p_T, b_T, residual_TD -> x_TD in `dtype`.

    chunk_T: each token's chunk. start_C: each chunk's first token, T where there is none.
    proxy_TD: of `dtype`, or None: gets the residual's gradient for it, see `ResidualProjection`.
    spare: of so many chunks without tokens the gradient is wanted, see `sum_chunks`.
    Gradients: of z, p and the residual; what has none: see `EmaUpsample` and `StraightThrough`.
    """

    @staticmethod
    def forward(
        ctx, z_CD, p_T, b_T, chunk_T, start_C, residual_TD: Tensor, proxy_TD: Tensor | None, dtype: torch.dtype,
        spare: int | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(z_CD, b_T, chunk_T, start_C)
        ctx.targets, ctx.wide, ctx.spare = _take_targets(z_CD), residual_TD.dtype, spare
        return upsample_forward(z_CD, chunk_T, residual_TD, dtype)

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        z_CD, b_T, chunk_T, start_C = ctx.saved_tensors
        (target,) = ctx.targets
        dconfidence_T, dz_CD = upsample_backward(dx_TD, z_CD, chunk_T, start_C, target, ctx.spare)
        dp_T = torch.where(b_T, dconfidence_T, -dconfidence_T)  # eq. 6
        *_, of_residual, of_proxy, _, _ = ctx.needs_input_grad
        dresidual_TD, dproxy_TD = dx_TD.to(ctx.wide) if of_residual else None, dx_TD if of_proxy else None
        return dz_CD if target is None else None, dp_T, None, None, None, dresidual_TD, dproxy_TD, None, None


class Summed(NamedTuple):
    """What a branch keeps of its norm."""

    sum_TD: Tensor
    rest_TD: Tensor | None
    scale_T: Tensor

    @property
    def sum(self) -> Parted:
        return Parted(self.sum_TD, self.rest_TD)

    def norm(self, weight: Slot) -> Tensor:
        """x_TD as the forward had it."""
        return norm_again(self.sum, self.scale_T, *weight.weights)


class ResidualStream:
    """A residual stream, as it goes from branch to branch, and its gradient, as it goes back."""

    sum: Parted | None = None  # of what the branches so far have added
    drest_TD: Tensor | None = None  # of its gradient, the rest that is beside what autograd hands on

    def norm(self, delta_TD: Tensor, weight: Slot, keep_x: bool = False) -> tuple[Tensor, Summed]:
        """Adds delta; x_TD is the norm of the sum."""
        self.sum, x_TD, scale_T = add_norm_forward(self.sum, delta_TD, *weight.weights, NORM_EPS, keep_x)
        return x_TD, Summed(*self.sum, scale_T)

    def norm_backward(
        self, dx_TD: Tensor, dout_TD: Tensor | None, summed: Summed, weight: Slot, again: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(ddelta_TD, x_TD if wanted `again`); fills the weight's slot. dout_TD: the gradient of what the branch has
        returned. The next one has added that to the sum, so it is that of the sum, too. None: nobody has."""
        dsum = None if dout_TD is None else Parted(dout_TD, self.drest_TD)
        (ddelta_TD, self.drest_TD), x_TD = add_norm_backward(
            dx_TD, dsum, summed.sum, summed.scale_T, *weight.weights, weight, again
        )
        return ddelta_TD, x_TD


def run_stack(stack: Isotropic, ac: str, x_TD: Tensor, packing: Packing) -> Tensor:
    """`Isotropic.forward`, with activation checkpointing."""
    stream, delta_TD, order = ResidualStream(), x_TD, None
    packing = Packing(*map(keep, packing))
    seams, modules = _SEAMS.get({}), [*stack.layers, stack.rmsnorm]
    for i, module in enumerate(modules):
        if module in seams:
            seams[module] = delta_TD
        if module in seams or i == 0:
            others = itertools.takewhile(lambda other: other not in seams, modules[i + 1 :])
            delta_TD, slots = _enter(delta_TD, [module, *others])
        if module is stack.rmsnorm:
            break
        norm, mixer = slots[module.norm1], module.mixer
        if isinstance(mixer, Mamba2):
            small = norm, slots[mixer.conv1d], slots[mixer], slots[mixer.norm]
            how = ac if torch.is_grad_enabled() else "block"  # without a backward nothing need be kept
            weights = mixer.in_proj.weight, mixer.out_proj.weight
            delta_TD = MambaBranch.apply(stream, packing, how, small, delta_TD, *weights)
        else:
            if order is None:
                order = tile_order(delta_TD, mixer.Wqkv.weight.shape[1] // mixer.n_heads, packing.cu_seqlens)
                order = None if order is None else keep(order)
            how = ac, mixer.n_heads, mixer.window, order
            weights = mixer.Wqkv.weight, mixer.out_proj.weight
            delta_TD = AttentionBranch.apply(stream, packing, how, norm, delta_TD, *weights)
        if module.has_mlp:
            weights = module.mlp.fc1.weight, module.mlp.fc2.weight
            delta_TD = MlpBranch.apply(stream, ac, slots[module.norm2], delta_TD, *weights)
    return FinalNorm.apply(stream, slots[stack.rmsnorm], delta_TD)


SMALL = {  # modules whose own weights' gradients are sums over tokens; the weights in the order that kernels have
    RMSNorm: ("weight",),
    GatedRMSNorm: ("weight",),
    CausalConv1d: ("weight", "bias"),
    Mamba2: ("A_log", "dt_bias", "D"),
}


def _enter(x_TD: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, dict[nn.Module, Slot]]:
    """x_TD on its way into some modules of a stack, and slots for their small weights."""
    inside = [inner for module in modules for inner in module.modules()]
    sums, weights, slots = [], [], {}
    for kind, names in SMALL.items():
        alike = [module for module in inside if type(module) is kind]
        if alike:
            sums.append(Sums([[getattr(module, name) for name in names] for module in alike]))
            weights += [weight for layer in sums[-1].layers for weight in layer]
            slots |= zip(alike, sums[-1].slots())
    return SmallWeights.apply(sums, x_TD, *weights), slots


class SmallWeights(torch.autograd.Function):
    """x, as it is. Its backward is the last of what x goes into. Gradients: of x and of the small weights there."""

    @staticmethod
    def forward(ctx, sums: list[Sums], x_TD: Tensor, *weights: Tensor) -> Tensor:
        ctx.sums = sums
        return x_TD

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        return None, dx_TD, *(gradient for sums in ctx.sums for gradient in sums.total())


class FinalNorm(torch.autograd.Function):
    """Adds delta to the stream and returns its norm. Gradient: of delta."""

    @staticmethod
    def forward(ctx, stream: ResidualStream, norm: Slot, delta_TD: Tensor) -> Tensor:
        x_TD, summed = stream.norm(delta_TD, norm)
        ctx.save_for_backward(*summed)
        ctx.stream, ctx.norm = stream, norm
        stream.sum = None  # nobody adds to it: once it is used up here it can go
        return x_TD

    @staticmethod
    def backward(ctx, dx_TD: Tensor):
        return None, None, ctx.stream.norm_backward(dx_TD, None, Summed(*ctx.saved_tensors), ctx.norm, again=False)[0]


class MlpBranch(torch.autograd.Function):
    """Adds delta to the stream and returns the SwiGLU of its norm. Gradients: of delta and of the products' weights."""

    @staticmethod
    def forward(ctx, stream: ResidualStream, ac: str, norm: Slot, delta_TD: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        all_kept = ac == "none"
        x_TD, summed = stream.norm(delta_TD, norm, keep_x=all_kept)
        with keeping_if(ac != "block"):
            both_T2I = _kept_product(x_TD, fc1)
        with keeping_if(all_kept):
            h_TI = swiglu_forward(both_T2I)
        kept = [both_T2I if ac != "block" else None, *((x_TD, h_TI) if all_kept else (None, None))]
        ctx.save_for_backward(*summed, fc1, fc2, *kept)
        ctx.stream, ctx.norm, ctx.targets = stream, norm, _take_targets(fc1, fc2)
        return h_TI @ fc2.T

    @staticmethod
    def backward(ctx, dout_TD: Tensor):
        *summed, fc1, fc2, both_T2I, x_TD, h_TI = ctx.saved_tensors
        summed = Summed(*summed)
        if both_T2I is None:
            both_T2I = summed.norm(ctx.norm) @ fc1.T
        into1, into2 = ctx.targets
        dboth_T2I, h_again = swiglu_backward(dout_TD @ fc2, both_T2I, again=h_TI is None)
        dfc2 = _product(dout_TD.T, h_again if h_TI is None else h_TI, into2)
        del both_T2I, h_TI, h_again
        ddelta_TD, x_again_TD = ctx.stream.norm_backward(dboth_T2I @ fc1, dout_TD, summed, ctx.norm, x_TD is None)
        dfc1 = _product(dboth_T2I.T, x_again_TD if x_TD is None else x_TD, into1)
        return None, None, None, ddelta_TD, dfc1, dfc2


class AttentionBranch(torch.autograd.Function):
    """Adds delta to the stream and returns the attention of its norm. Gradients: of delta and the products' weights.

    how: (activation checkpointing, heads, window, `tile_order`).
    """

    @staticmethod
    def forward(
        ctx, stream: ResidualStream, packing: Packing, how, norm: Slot, delta_TD, Wqkv: Tensor, out_proj: Tensor
    ) -> Tensor:
        ac, ctx.n_heads, ctx.window, ctx.order = how
        x_TD, summed = stream.norm(delta_TD, norm, keep_x=ac == "none")
        with keeping_if(ac != "block"):
            qkv_T3HP, attended = AttentionBranch.attend(ctx, packing, x_TD, Wqkv)
        ctx.stream, ctx.packing, ctx.norm, ctx.targets = stream, packing, norm, _take_targets(Wqkv, out_proj)
        ctx.attended = attended if ac != "block" else None
        kept = qkv_T3HP if ac != "block" else None, x_TD if ac == "none" else None
        ctx.save_for_backward(*summed, Wqkv, out_proj, *kept)
        return attended.o_THP.flatten(1) @ out_proj.T

    @staticmethod
    def attend(ctx, packing: Packing, x_TD: Tensor, Wqkv: Tensor) -> tuple[Tensor, Attended]:
        qkv_T3HP = _kept_product(x_TD, Wqkv).unflatten(-1, (3, ctx.n_heads, -1))
        rotate_(qkv_T3HP, packing.cos_MR, packing.sin_MR, packing.position_T)
        return qkv_T3HP, packed_attention(qkv_T3HP, packing.cu_seqlens, len(packing.cos_MR), ctx.window, ctx.order)

    @staticmethod
    def backward(ctx, dout_TD: Tensor):
        *summed, Wqkv, out_proj, qkv_T3HP, x_TD = ctx.saved_tensors
        summed = Summed(*summed)
        _, position_T, *tables = ctx.packing
        attended = ctx.attended
        ctx.attended = None  # what is used up can go
        if attended is None:
            qkv_T3HP, attended = AttentionBranch.attend(ctx, ctx.packing, summed.norm(ctx.norm), Wqkv)
        o_THP = attended.o_THP
        do_THP = (dout_TD @ out_proj).view_as(o_THP)
        dqkv_T3HP = packed_attention_backward(do_THP, qkv_T3HP, attended, ctx.window, ctx.order)
        dqkv_TD, o_TD = rotate_(dqkv_T3HP, *tables, position_T, back=True).flatten(1), o_THP.flatten(1)
        del attended
        ddelta_TD, x_again_TD = ctx.stream.norm_backward(dqkv_TD @ Wqkv, dout_TD, summed, ctx.norm, x_TD is None)
        into_qkv, into_out = ctx.targets
        dWqkv = _product(dqkv_TD.T, x_again_TD if x_TD is None else x_TD, into_qkv)
        return None, None, None, None, ddelta_TD, dWqkv, _product(dout_TD.T, o_TD, into_out)


class MambaBranch(torch.autograd.Function):
    """Adds delta to the stream and returns the Mamba-2 of its norm. Gradients: of delta and of the products' weights.

    small: slots of the norm, the convolution, the heads and the gated norm.
    """

    @staticmethod
    def forward(
        ctx, stream: ResidualStream, packing: Packing, ac: str, small: Sequence[Slot], delta_TD, in_proj, out_proj
    ) -> Tensor:
        norm, *of_mixer = small
        all_kept = ac == "none"
        x_TD, summed = stream.norm(delta_TD, norm, keep_x=all_kept)
        with keeping_if(ac != "block"):
            projected, y_TD, gate_scale_T, after, gated_TD, *states = MambaBranch.mix(
                packing, x_TD, all_kept, in_proj, *of_mixer
            )
        kept = (projected, y_TD, gate_scale_T) if ac != "block" else (None,) * 3
        kept += (after, gated_TD, x_TD, *states) if all_kept else (None,) * 3
        ctx.stream, ctx.packing, ctx.small, ctx.targets = stream, packing, small, _take_targets(in_proj, out_proj)
        ctx.save_for_backward(*summed, in_proj, out_proj, *kept)
        return gated_TD @ out_proj.T

    @staticmethod
    def mix(packing, x_TD, all_kept: bool, in_proj, conv: Slot, heads: Slot, gate: Slot) -> tuple[Tensor, ...]:
        """What comes of each step, the input of out_proj last; and where all is kept, what the scan keeps."""
        (conv_D1K, conv_bias_D), (A_log_H, dt_bias_H, D_H), (gate_D,) = conv.weights, heads.weights, gate.weights
        projected = _kept_product(x_TD, in_proj)
        z, before, raw_TH = projected.split([len(gate_D), len(conv_bias_D), len(D_H)], dim=-1)
        with keeping_if(all_kept):
            after = causal_conv_silu_forward(before, conv_D1K, conv_bias_D, packing.position_T)
        u_THP, B_TN, C_TN = _parts(after, len(D_H))
        y_THP, states = mamba2_scan_forward(
            u_THP, raw_TH, wide(dt_bias_H), wide(A_log_H), B_TN, C_TN, wide(D_H), packing.cu_seqlens, all_kept
        )
        y_TD = y_THP.flatten(1)
        gated_TD, gate_scale_T = gated_norm_forward(y_TD, z, gate_D, NORM_EPS, all_kept)
        return projected, y_TD, gate_scale_T, after, gated_TD, *states

    @staticmethod
    def backward(ctx, dout_TD: Tensor):
        *summed, in_proj, out_proj, projected, y_TD, gate_scale_T, after, gated_TD, x_TD = ctx.saved_tensors[:11]
        summed, states, (norm, conv, heads, gate) = Summed(*summed), ctx.saved_tensors[11:], ctx.small
        (conv_D1K, conv_bias_D), (A_log_H, dt_bias_H, D_H), (gate_D,) = conv.weights, heads.weights, gate.weights
        if projected is None:
            projected, y_TD, gate_scale_T, after, gated_TD, *states = MambaBranch.mix(
                ctx.packing, summed.norm(norm), True, in_proj, conv, heads, gate
            )
        widths = [len(gate_D), len(conv_bias_D), len(D_H)]
        dprojected = torch.empty_like(projected)
        (z, before, raw_TH), (dz, dbefore, draw_TH) = (x.split(widths, dim=-1) for x in (projected, dprojected))
        into_in, into_out = ctx.targets
        dgated_TD = dout_TD @ out_proj
        dy_TD, gated_again = gated_norm_backward(
            dgated_TD, y_TD, z, gate_scale_T, gate_D, dz, gate, again=gated_TD is None
        )
        dout_proj = _product(dout_TD.T, gated_again if gated_TD is None else gated_TD, into_out)
        del y_TD, gated_TD, gated_again, dgated_TD  # what is used up can go before the scan needs most
        if after is None:
            after = causal_conv_silu_forward(before, conv_D1K, conv_bias_D, ctx.packing.position_T)
        dafter = torch.empty_like(after)
        u_THP, *BC = _parts(after, len(D_H))
        mamba2_scan_backward(
            dy_TD.view_as(u_THP), u_THP, raw_TH, wide(dt_bias_H), wide(A_log_H), *BC, wide(D_H),
            ctx.packing.cu_seqlens, (*_parts(dafter, len(D_H)), draw_TH), heads, states,
        )  # fmt: skip
        causal_conv_silu_backward_to(dbefore, dafter, before, conv_D1K, conv_bias_D, ctx.packing.position_T, conv)
        ddelta_TD, x_again_TD = ctx.stream.norm_backward(dprojected @ in_proj, dout_TD, summed, norm, x_TD is None)
        din_proj = _product(dprojected.T, x_again_TD if x_TD is None else x_TD, into_in)
        return None, None, None, None, ddelta_TD, din_proj, dout_proj


def _parts(after: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, B and C as views of what the convolution gives."""
    width = n_heads * HEADDIM
    N = (after.shape[1] - width) // 2
    x, B_TN, C_TN = after.split([width, N, N], dim=-1)
    return x.unflatten(-1, (n_heads, HEADDIM)), B_TN, C_TN
