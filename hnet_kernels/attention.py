"""Causal attention over packed documents, with an optional sliding window.

Legend: T tokens of all documents together, H heads, P channels per head.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hnet_kernels import cards
from hnet_kernels.dispatch import assume_constant, dispatched, has_triton, operation, takes_kernels, use_fast
from hnet_kernels.pointwise import rotate_
from hnet_kernels.recompute import Recomputed, mode, recomputed, recomputed_of
from hnet_kernels.saved import save_if, save_tensor

QUERY_BLOCK = 128  # queries at a time in the definition, which limits the memory of the scores


class Span(NamedTuple):
    """Adjacent queries and the keys that any of them may see, as slices of the flat tensors."""

    queries: slice
    keys: slice
    hidden_QK: Tensor  # bool: the keys that a query may not see


def _spans(cu_seqlens: Tensor, window: int) -> Iterator[Span]:
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds[:-1], bounds[1:]):
        for first in range(start, end, QUERY_BLOCK):
            stop = min(first + QUERY_BLOCK, end)
            seen = start if window < 0 else max(start, first - window)
            i_Q1 = torch.arange(first, stop, device=cu_seqlens.device)[:, None]
            j_K = torch.arange(seen, stop, device=cu_seqlens.device)
            hidden_QK = j_K > i_Q1 if window < 0 else (j_K > i_Q1) | (j_K < i_Q1 - window)
            yield Span(slice(first, stop), slice(seen, stop), hidden_QK)


def _softmax_scores(q_THP: Tensor, k_THP: Tensor, span: Span) -> Tensor:
    """(H, Q, K) attention weights of one span, in at least float32."""
    dtype = torch.promote_types(q_THP.dtype, torch.float32)
    q_HQP = q_THP[span.queries].transpose(0, 1).to(dtype) * q_THP.shape[-1] ** -0.5
    k_HKP = k_THP[span.keys].transpose(0, 1).to(dtype)
    return (q_HQP @ k_HKP.mT).masked_fill_(span.hidden_QK, -torch.inf).softmax(-1)


@dispatched
def attention_definition(q_THP: Tensor, k_THP: Tensor, v_THP: Tensor, cu_seqlens: Tensor, window: int) -> Tensor:
    """Softmax attention of position i on j in [i - window, i] of its own document (on all j <= i where window < 0)."""
    o_THP = torch.zeros_like(q_THP, memory_format=torch.contiguous_format)
    for span in _spans(cu_seqlens, window):
        weights_HQK = _softmax_scores(q_THP, k_THP, span)
        v_HKP = v_THP[span.keys].transpose(0, 1).to(weights_HQK.dtype)
        o_THP[span.queries] = (weights_HQK @ v_HKP).transpose(0, 1).to(o_THP.dtype)
    return o_THP


@torch.library.register_fake(attention_definition)
def _(q_THP, k_THP, v_THP, cu_seqlens, window):
    return q_THP.new_empty(q_THP.shape)


@dispatched
def attention_definition_backward(
    do_THP: Tensor, q_THP: Tensor, k_THP: Tensor, v_THP: Tensor, cu_seqlens: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_definition` for q, k and v; recomputes the attention weights."""
    dtype = torch.promote_types(q_THP.dtype, torch.float32)
    dq_THP, dk_THP, dv_THP = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (q_THP, k_THP, v_THP))
    scale = q_THP.shape[-1] ** -0.5
    for span in _spans(cu_seqlens, window):
        weights_HQK = _softmax_scores(q_THP, k_THP, span)
        q_HQP, do_HQP = (t[span.queries].transpose(0, 1).to(dtype) for t in (q_THP, do_THP))
        k_HKP, v_HKP = (t[span.keys].transpose(0, 1).to(dtype) for t in (k_THP, v_THP))
        dweights_HQK = do_HQP @ v_HKP.mT
        dscores_HQK = weights_HQK * (dweights_HQK - (dweights_HQK * weights_HQK).sum(-1, keepdim=True)) * scale
        dq_THP[span.queries] += (dscores_HQK @ k_HKP).transpose(0, 1)
        dk_THP[span.keys] += (dscores_HQK.mT @ q_HQP).transpose(0, 1)
        dv_THP[span.keys] += (weights_HQK.mT @ do_HQP).transpose(0, 1)
    return dq_THP.to(q_THP.dtype), dk_THP.to(k_THP.dtype), dv_THP.to(v_THP.dtype)


@torch.library.register_fake(attention_definition_backward)
def _(do_THP, q_THP, k_THP, v_THP, cu_seqlens, window):
    return tuple(t.new_empty(t.shape) for t in (q_THP, k_THP, v_THP))


def _setup(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, do_THP):
    return (*attention_definition_backward(do_THP, *ctx.saved_tensors, ctx.window), None, None)


torch.library.register_autograd(attention_definition, _backward, setup_context=_setup)


@assume_constant
def _why_no_flash(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if not takes_kernels(device_type):
        return "no CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention computes in 16 bits, not {dtype}"
    if head_dim > 256:
        return f"head size {head_dim} is over 256"
    if cards.capability(torch.device(device_type)) < (8, 0):
        return "flash attention needs compute capability 8.0"
    return None


def attention(
    q_THP: Tensor, k_THP: Tensor, v_THP: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int = -1
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v within each document; position i sees [i - window, i], or all before where window < 0.

    q_THP, k_THP, v_THP: one floating dtype. cu_seqlens: int32 (B + 1,). max_seqlen: tokens, at least the longest
    document. Returns o_THP. On CUDA in 16 bits this is torch's varlen flash attention, else `attention_definition`.
    """
    kind = q_THP.device.type, q_THP.dtype
    if use_fast("attention", *kind, _why_no_flash(*kind, q_THP.shape[-1])):
        from torch.nn.attention.varlen import varlen_attn

        size = (window, 0) if window >= 0 else (-1, 0)
        return varlen_attn(q_THP, k_THP, v_THP, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=size)
    return attention_definition(q_THP, k_THP, v_THP, cu_seqlens, window)


def _why_no_packed(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels of attention_triton.py cannot run on these, or None."""
    reason = _why_no_flash(device_type, dtype, head_dim)
    if reason:
        return reason
    if head_dim % 16 or head_dim > 128:
        return f"head size {head_dim}, not a multiple of 16 up to 128"
    return cards.why_unsupported(torch.device(device_type)) or (None if has_triton() else "no triton")


class Attended(NamedTuple):
    """Packed attention's output, and what its backward needs."""

    o_THP: Tensor
    lse_HT: Tensor | None  # from the Triton kernels; else None
    graph: tuple[Tensor, ...]  # q, k, v and o with autograd's graph between them


def tile_order(x_TD: Tensor, head_dim: int, cu_seqlens: Tensor) -> Tensor | None:
    """The order in which `packed_attention` and its backward take tiles, int32 (3, I): see attention_triton.py.

    It depends only on the documents, so all layers of a stack share it. x_TD: has the device and dtype of q, k and v.
    None where the Triton kernels cannot run.
    """
    kind = x_TD.device.type, x_TD.dtype
    if not use_fast("packed_attention", *kind, _why_no_packed(*kind, head_dim)):
        return None
    from hnet_kernels import attention_triton  # not above: triton is not everywhere

    return attention_triton.tile_order(len(x_TD), cu_seqlens)


def packed_attention(
    qkv_T3HP: Tensor, cu_seqlens: Tensor, max_seqlen: int, window: int, order: Tensor | None
) -> Attended:
    """`attention` of q, k and v in one tensor, for callers that write their own backward.

    The documents contain all rows. order: their `tile_order`. With it our own Triton kernels run, else `attention`.
    """
    if order is not None:
        from hnet_kernels import attention_triton

        return Attended(*attention_triton.attention_forward(qkv_T3HP, order, window), ())
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in qkv_T3HP.unbind(1)]
        o_THP = attention(*leaves, cu_seqlens, max_seqlen, window)
    return Attended(save_tensor(o_THP.detach()), None, (*leaves, o_THP))


def packed_attention_backward(
    do_THP: Tensor, qkv_T3HP: Tensor, attended: Attended, window: int, order: Tensor | None
) -> Tensor:
    """dqkv_T3HP, given the gradient of o_THP. order: that of `packed_attention`."""
    if order is not None:
        from hnet_kernels import attention_triton

        return attention_triton.attention_backward(do_THP, qkv_T3HP, *attended[:2], order, window)
    *leaves, o_THP = attended.graph
    return torch.stack(torch.autograd.grad(o_THP, leaves, do_THP, retain_graph=True), dim=1)


@operation
def rotary_attention(
    qkv_TX: Tensor, n_heads: int, window: int, cos_MR: Tensor, sin_MR: Tensor, position_T: Tensor, cu_seqlens: Tensor,
    order: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`attention` of q, k and v in one tensor (T, 3 H P), with q and k rotated by their positions' angles.

    cos_MR, sin_MR: of positions 0 ... M - 1; no document is longer than M. order: `tile_order` of the documents, which
    all layers of a stack can share. Returns (T, H P). The fast implementation rotates q and k in place: nothing else
    may read qkv afterwards. Where another operation saved it, autograd raises an error.
    """
    q_THP, k_THP, v_THP = qkv_TX.unflatten(-1, (3, n_heads, -1)).unbind(1)
    cos_TR, sin_TR = cos_MR[position_T], sin_MR[position_T]
    q_THP, k_THP = (rotate(x, cos_TR, sin_TR) for x in (q_THP, k_THP))
    return attention(q_THP, k_THP, v_THP, cu_seqlens, len(cos_MR), window).flatten(1)


def rotate(x_THP: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Partial RoPE: of each head, dimensions [0, R) and [R, 2R) are rotated as pairs; the others are unchanged."""
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    R = cos.shape[-1]
    a, b, rest = x_THP[..., :R], x_THP[..., R : 2 * R], x_THP[..., 2 * R :]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_THP.dtype)
    return torch.cat([turned, rest], dim=-1)


class RotaryAttention(torch.autograd.Function):
    """Gradient: of qkv."""

    @staticmethod
    def forward(ctx, qkv_TX: Tensor, how, packing: tuple[Tensor, ...], result: list):
        mode_, n_heads, window = how
        *angles, cu_seqlens, order = packing
        before = recomputed_of(qkv_TX) if mode_ == "block" else None

        def attend(qkv_TX: Tensor) -> tuple[Tensor, Attended]:
            qkv_T3HP = qkv_TX.unflatten(-1, (3, n_heads, -1))
            rotate_(qkv_T3HP, *angles)
            torch.autograd.graph.increment_version(qkv_TX)  # a Triton kernel does not do this
            return qkv_T3HP, packed_attention(qkv_T3HP, cu_seqlens, len(angles[0]), window, order)

        with save_if(mode_ != "block"):
            qkv_T3HP, attended = attend(qkv_TX.detach())
        ctx.recompute = None
        if before is not None:
            before.users += 1
            ctx.recompute = Recomputed(lambda: attend(before.get() if before.users <= 1 else before.get().clone()))
            ctx.recompute.users += 1
            ctx.save_for_backward()
        else:
            ctx.save_for_backward(qkv_T3HP, attended.o_THP, attended.lse_HT)
            ctx.graph = attended.graph
        ctx.angles, ctx.order, ctx.window = angles, order, window
        result.append(ctx.recompute)
        return attended.o_THP.flatten(1)

    @staticmethod
    def backward(ctx, do_TD: Tensor):
        if ctx.recompute is not None:
            qkv_T3HP, attended = ctx.recompute.get()
        else:
            qkv_T3HP, o_THP, lse_HT = ctx.saved_tensors
            attended = Attended(o_THP, lse_HT, ctx.graph)
        do_THP = do_TD.reshape(attended.o_THP.shape)
        dqkv_T3HP = packed_attention_backward(do_THP, qkv_T3HP, attended, ctx.window, ctx.order)
        return rotate_(dqkv_T3HP, *ctx.angles, back=True).flatten(1), None, None, None


@rotary_attention.fast
def _(qkv_TX, n_heads, window, cos_MR, sin_MR, position_T, cu_seqlens, order=None) -> Tensor:
    how, recompute = mode(), []
    if order is None:
        order = tile_order(qkv_TX, qkv_TX.shape[1] // (3 * n_heads), cu_seqlens)
    packing = tuple(None if x is None else save_tensor(x) for x in (cos_MR, sin_MR, position_T, cu_seqlens, order))
    o_TD = RotaryAttention.apply(qkv_TX, (how, n_heads, window), packing, recompute)
    if recompute[0] is not None:
        recompute[0].users += 1
        recomputed(o_TD, lambda: recompute[0].get()[1].o_THP.flatten(1))
    return o_TD
