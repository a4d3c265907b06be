"""A trainable H-Net: a byte-level language model that learns where to cut text into chunks (arXiv 2507.07955).

    encoder -> router -> keep the boundaries -> inner network -> smooth and upsample -> decoder

The inner network is again an H-Net, or, innermost, a stack of blocks. Documents of any lengths are packed: a batch is
an NJT (`torch.nested`, jagged layout) `(B, j, ...)`, B documents of lengths j. Every stage has its own j.

Read in this order: hnet_config.py, NJT operations, blocks, router / chunk / dechunk, HNet, HNetLM, then what training
needs: learning-rate modulation, parameter groups, initial weights, FLOPs. `python hnet_trainable.py` checks this
machine.

Shape legend, as suffixes of names: B documents, j ragged length of the stage at hand (jD: nested), k that of the stage
inside, T tokens of all documents of a stage together, C chunks (the T of the stage inside), D width, H heads,
P channels a head, N state size, R rotary dimensions, V vocabulary, S number of chunking stages.

Equation numbers and sections are those of the paper; "code" is the released one, github.com/goombalab/hnet.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nested import nested_tensor_from_jagged

from hnet_config import HEADDIM, AttnConfig, ConfigError, HNetConfig, Layer, SSMConfig, parse_layout  # noqa: F401
from hnet_kernels import attention, causal_conv_silu, ema_backward, ema_forward, ssd, sum_chunks

BOS, EOS = 0xFE, 0xFF  # neither byte occurs in UTF-8 (code)
NORM_EPS = 1e-5
EMA_CLAMP = 1e-4  # the smoothing's P stays in [1e-4, 1 - 1e-4] (code)
N_GPT = 4.6  # bytes a token of GPT-2's tokenizer covers (section 2.3.2)


# ----------------------------------------------------------------------------------------------------- NJT operations
#
# The contract: take `values()`, compute on flat tensors, wrap again with the *same offsets object*: only NJTs that
# share it can be combined. What autograd lacks for NJTs is written out below as autograd functions on NJTs.


def nested_like(values: Tensor, like: Tensor) -> Tensor:
    """Flat `values` `(T, ...)` as an NJT with the documents (the very offsets) of the NJT `like`. Differentiable."""
    return nested_tensor_from_jagged(
        values, like.offsets(), min_seqlen=like._maybe_min_seqlen, max_seqlen=like._maybe_max_seqlen
    )


def cu_seqlens(x: Tensor) -> Tensor:
    """The offsets of an NJT as the kernels take them: int32 `(B + 1,)`."""
    return x.offsets().to(torch.int32)


def positions(x: Tensor) -> Tensor:
    """Each token's place in its document, from 0: int64 `(T,)` for an NJT of T tokens."""
    offsets = x.offsets()
    t = torch.arange(x.values().shape[0], device=offsets.device)
    return t - offsets[torch.bucketize(t, offsets[1:], right=True)]


def register_njt_ops() -> None:
    """Teach torch's NJT what it lacks and we use. The one place for torch's private NJT names; calling twice is safe.

    - The backward of a slice of the last dimension, `x_BjD[..., :d]`: `aten.slice_backward` has no jagged kernel in
      torch 2.11 and 2.13. It goes when torch has one (NJT's future: github.com/pytorch/pytorch/issues/155065).
    - torch 2.13's own `nested_tensor_from_jagged` calls a function that logs a warning about itself; it is left out.
    """
    logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in record.getMessage())
    from torch.nested._internal import ops

    slice_backward = torch.ops.aten.slice_backward.default
    if slice_backward in ops.JAGGED_OPS_TABLE:
        return

    @ops.register_jagged_func(
        slice_backward, "grad_output: jt_all, input_sizes: any, dim: any, start: any, end: any, step: any"
    )
    def _(func, *args, **kwargs):
        grad_BjD, sizes, dim, start, end, step = args
        if dim != len(sizes) - 1:
            raise NotImplementedError("the backward of an NJT's slice: only the last dimension is supported")
        flat = grad_BjD.values()
        return nested_like(
            slice_backward(flat, [*flat.shape[:-1], sizes[-1]], flat.ndim - 1, start, end, step), grad_BjD
        )


register_njt_ops()


class BoundaryProbability(torch.autograd.Function):
    """Router (eq. 4): p_t = (1 - cos(q_{t-1}, k_t)) / 2 in [0, 1]; a document's first token has p = 1.

    q_BjD, k_BjD -> p_Bj in at least float32. Gradients: of q and k. Left out: none reaches the first tokens' constant
    p, nor a p that rounding took out of [0, 1] before the clamp.
    """

    @staticmethod
    def forward(ctx, q_BjD: Tensor, k_BjD: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # autograd can't make zeros of an NJT's shape
        dtype = torch.promote_types(q_BjD.dtype, torch.float32)
        q_TD, k_TD = q_BjD.values().to(dtype).roll(1, 0), k_BjD.values().to(dtype)
        q_norm_T1 = q_TD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        k_norm_T1 = k_TD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        cos_T = (q_TD / q_norm_T1 * (k_TD / k_norm_T1)).sum(-1)
        first_T = positions(k_BjD) == 0
        ctx.like = k_BjD
        ctx.save_for_backward(q_BjD, k_BjD, q_norm_T1, k_norm_T1, cos_T, first_T)
        return nested_like(((1 - cos_T) / 2).clamp(0, 1).masked_fill(first_T, 1.0), k_BjD)

    @staticmethod
    def backward(ctx, grad_p_Bj: Tensor | None):
        if grad_p_Bj is None:
            return None, None
        q_BjD, k_BjD, q_norm_T1, k_norm_T1, cos_T, first_T = ctx.saved_tensors
        q_unit_TD = q_BjD.values().to(cos_T.dtype).roll(1, 0) / q_norm_T1
        k_unit_TD = k_BjD.values().to(cos_T.dtype) / k_norm_T1
        constant_T = first_T | (cos_T.abs() > 1)
        grad_cos_T1 = (-grad_p_Bj.values() / 2).masked_fill(constant_T, 0)[:, None]
        grad_q_TD = grad_cos_T1 * (k_unit_TD - cos_T[:, None] * q_unit_TD) / q_norm_T1
        grad_k_TD = grad_cos_T1 * (q_unit_TD - cos_T[:, None] * k_unit_TD) / k_norm_T1
        grad_q_TD = grad_q_TD.roll(-1, 0).to(q_BjD.dtype)
        return nested_like(grad_q_TD, q_BjD), nested_like(grad_k_TD.to(k_BjD.dtype), k_BjD)


def chunk_offsets(b_T: Tensor, offsets: Tensor) -> Tensor:
    """The offsets (B + 1,) of documents counted in chunks, where b_T (bool) opens a chunk."""
    return F.pad(b_T.cumsum(0), (1, 0))[offsets]


class SelectChunks(torch.autograd.Function):
    """Downsampler (section 2.2.1): keep x_t where b_t. x_BjD, b_Bj (bool) -> h_BkD, one row a chunk.

    Gradient: of x, scattered back, zero where b is false. Left out: b is discrete and has none. The lengths come to the
    host in one copy, the only synchronisation of a stage.
    """

    @staticmethod
    def forward(ctx, x_BjD: Tensor, b_Bj: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # autograd can't make zeros of an NJT's shape
        b_T = b_Bj.values()
        inner_offsets = chunk_offsets(b_T, b_Bj.offsets())
        lengths = inner_offsets.diff()
        total, shortest, longest = torch.stack([inner_offsets[-1], lengths.min(), lengths.max()]).tolist()
        kept_C = torch.nonzero_static(b_T, size=total).squeeze(1)
        ctx.like, ctx.kept_C = x_BjD.detach(), kept_C
        h_CD = x_BjD.values()[kept_C]
        return nested_tensor_from_jagged(h_CD, inner_offsets, min_seqlen=shortest, max_seqlen=longest)

    @staticmethod
    def backward(ctx, grad_h_BkD: Tensor | None):
        if grad_h_BkD is None:
            return None, None
        grad_TD = grad_h_BkD.values().new_zeros(ctx.like.values().shape)
        grad_TD[ctx.kept_C] = grad_h_BkD.values()
        return nested_like(grad_TD, ctx.like), None


class EmaUpsample(torch.autograd.Function):
    """Smoothing and upsampling (eq. 5 and 8): token t gets z of its chunk, z_k = P_k y_k + (1 - P_k) z_{k-1}.

    y_BkD (one row a chunk), p_Bj, b_Bj -> up_BjD in p's dtype; P is p at the boundaries, clamped to [1e-4, 1 - 1e-4].
    Gradients: of y and p. Left out: p where the clamp acts (so every document's first token), b.
    """

    @staticmethod
    def forward(ctx, y_BkD: Tensor, p_Bj: Tensor, b_Bj: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # autograd can't make zeros of an NJT's shape
        p_T, b_T = p_Bj.values(), b_Bj.values()
        chunk_T = b_T.cumsum(0) - 1
        kept_C = torch.nonzero_static(b_T, size=y_BkD.values().shape[0]).squeeze(1)
        raw_C = p_T[kept_C]
        P_C = raw_C.clamp(EMA_CLAMP, 1 - EMA_CLAMP)
        cu = cu_seqlens(y_BkD)
        z_CD = ema_forward(y_BkD.values(), P_C, cu)
        ctx.y, ctx.p = y_BkD.detach(), p_Bj.detach()
        ctx.save_for_backward(kept_C, raw_C == P_C, P_C, z_CD, cu)
        return nested_like(z_CD[chunk_T], p_Bj)

    @staticmethod
    def backward(ctx, grad_up_BjD: Tensor | None):
        if grad_up_BjD is None:
            return None, None, None
        kept_C, inside_C, P_C, z_CD, cu = ctx.saved_tensors
        grad_z_CD = sum_chunks(grad_up_BjD.values().to(z_CD.dtype), kept_C)
        grad_y_CD, grad_P_C = ema_backward(grad_z_CD, ctx.y.values(), P_C, z_CD, cu)
        grad_p_T = torch.zeros_like(ctx.p.values())
        grad_p_T[kept_C] = grad_P_C * inside_C
        return nested_like(grad_y_CD, ctx.y), nested_like(grad_p_T, ctx.p), None


class StraightThrough(torch.autograd.Function):
    """STE (eq. 7): 1 on the way forward, the identity on the way back. c_Bj -> ones_Bj."""

    @staticmethod
    def forward(ctx, c_Bj: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # autograd can't make zeros of an NJT's shape
        return nested_like(torch.ones_like(c_Bj.values()), c_Bj)

    @staticmethod
    def backward(ctx, grad_Bj: Tensor | None):
        return grad_Bj


# ------------------------------------------------------------------------------------------------------------- blocks
#
# Inside a stack of blocks everything is flat: the NJT is unwrapped once to (T, D) and what the blocks must know of the
# documents travels beside it.


class Packing(NamedTuple):
    """How T flat tokens fall into documents of at most M tokens, and the rotary tables of positions 0 ... M - 1.

    Tensors alone, M being a size: a compiled block takes other sizes without another compilation, but not other ints.
    """

    cu_seqlens: Tensor  # int32 (B + 1,)
    position_T: Tensor  # int32, from 0 in each document
    cos_MR: Tensor  # R = half the rotary dimensions; at least float32
    sin_MR: Tensor

    @classmethod
    def of(cls, x_BjD: Tensor, rotary_dim: int) -> Packing:
        dtype = torch.promote_types(x_BjD.dtype, torch.float32)
        tables = rotary_tables(x_BjD._get_max_seqlen(), rotary_dim, dtype, x_BjD.device)
        return cls(cu_seqlens(x_BjD), positions(x_BjD).to(torch.int32), *tables)


def rotary_tables(M: int, rotary_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos_MR and sin_MR of the angles that positions 0 ... M - 1 turn by."""
    exponent_R = torch.arange(0, rotary_dim, 2, device=device, dtype=dtype) / max(rotary_dim, 1)
    angle_MR = torch.arange(M, device=device).to(dtype)[:, None] * 10000.0**-exponent_R
    return angle_MR.cos(), angle_MR.sin()


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32, returned in the weight's dtype (the compute dtype)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: Tensor) -> Tensor:
        x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)
        return (x * self.weight).to(self.weight.dtype)


class GatedRMSNorm(RMSNorm):
    """norm(y * silu(z)): the gate acts before the norm."""

    def forward(self, y_TD: Tensor, z_TD: Tensor) -> Tensor:
        dtype = torch.promote_types(y_TD.dtype, torch.float32)
        return super().forward(y_TD.to(dtype) * F.silu(z_TD.to(dtype)))


class CausalConv1d(nn.Module):
    """Depthwise causal convolution and SiLU along each document; weight `(D, 1, width)`, its last tap the present."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x_TD: Tensor, position_T: Tensor) -> Tensor:
        return causal_conv_silu(x_TD, self.weight, self.bias, position_T)


class Mamba2(nn.Module):
    """Mamba-2 mixer (arXiv 2405.21060) with one group: B and C are shared by all heads."""

    def __init__(self, width: int, config: SSMConfig):
        super().__init__()
        self.d_inner, self.d_state = config.expand * width, config.d_state
        self.n_heads = self.d_inner // HEADDIM
        conv_dim = self.d_inner + 2 * self.d_state
        self.in_proj = nn.Linear(width, self.d_inner + conv_dim + self.n_heads, bias=False)  # z, x, B, C, dt
        self.conv1d = CausalConv1d(conv_dim, config.d_conv)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(self.d_inner)
        self.out_proj = nn.Linear(self.d_inner, width, bias=False)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        z, xBC, dt_TH = self.in_proj(x_TD).split([self.d_inner, self.d_inner + 2 * self.d_state, self.n_heads], dim=-1)
        xBC = self.conv1d(xBC, packing.position_T)
        x, B_TN, C_TN = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        x_THP = x.unflatten(-1, (self.n_heads, HEADDIM))
        dtype = torch.promote_types(self.dt_bias.dtype, torch.float32)
        dt_TH = F.softplus(dt_TH.to(dtype) + self.dt_bias)
        y_THP = ssd(x_THP, dt_TH, -self.A_log.to(dtype).exp(), B_TN, C_TN, packing.cu_seqlens)
        y_THP = y_THP + self.D[:, None] * x_THP
        return self.out_proj(self.norm(y_THP.flatten(1), z))


def rotate(x_THP: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Partial RoPE, halves rotated: of each head, dimensions [0, R) turn against [R, 2R); the rest stays."""
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    R = cos.shape[-1]
    a, b, rest = x_THP[..., :R], x_THP[..., R : 2 * R], x_THP[..., 2 * R :]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_THP.dtype)
    return torch.cat([turned, rest], dim=-1)


class Attention(nn.Module):
    """Causal multi-head attention with partial rotary embeddings, within documents, in a window or not."""

    def __init__(self, width: int, n_heads: int, window: int):
        super().__init__()
        self.n_heads, self.window = n_heads, window
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        q_THP, k_THP, v_THP = self.Wqkv(x_TD).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        cos_TR, sin_TR = (table_MR[packing.position_T] for table_MR in (packing.cos_MR, packing.sin_MR))
        q_THP, k_THP = (rotate(x, cos_TR, sin_TR) for x in (q_THP, k_THP))
        o_THP = attention(q_THP, k_THP, v_THP, packing.cu_seqlens, len(packing.cos_MR), self.window)
        return self.out_proj(o_THP.flatten(1))


class SwiGLU(nn.Module):
    """fc2(silu(gate) * value); fc1 gives value, then gate. Inner width: the next multiple of 128 (code)."""

    def __init__(self, width: int, d_intermediate: int):
        super().__init__()
        inner = -(-d_intermediate // 128) * 128
        self.fc1 = nn.Linear(width, 2 * inner, bias=False)
        self.fc2 = nn.Linear(inner, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        value, gate = self.fc1(x_TD).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm residual block. The residual stream is at least float32, what runs beside it in the weights' dtype."""

    def __init__(self, layer: Layer, config: HNetConfig, s: int):
        super().__init__()
        width = config.d_model[s]
        self.norm1 = RMSNorm(width)
        if layer.mixer == "m":
            self.mixer = Mamba2(width, config.ssm_cfg)
        else:
            self.mixer = Attention(width, config.attn_cfg.num_heads[s], config.attn_cfg.window_size[s])
        if layer.has_mlp:
            self.norm2 = RMSNorm(width)
            self.mlp = SwiGLU(width, config.d_intermediate[s])
        self.has_mlp = layer.has_mlp

    def forward(self, residual_TD: Tensor, packing: Packing) -> Tensor:
        residual_TD = residual_TD + self.mixer(self.norm1(residual_TD), packing)
        if self.has_mlp:
            residual_TD = residual_TD + self.mlp(self.norm2(residual_TD))
        return residual_TD


class Isotropic(nn.Module):
    """A stack of blocks at one width and a final norm: an encoder, a decoder or the innermost network."""

    def __init__(self, layout: str, config: HNetConfig, s: int):
        super().__init__()
        self.rotary_dim = config.attn_cfg.rotary_emb_dim[s] if re.search("[tT]", layout) else 0
        self.layers = nn.ModuleList(Block(layer, config, s) for layer in parse_layout(layout))
        self.rmsnorm = RMSNorm(config.d_model[s])

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        # A copy even where the dtype stays: values() is a view of the NJT, and a compiled block that is handed one also
        # gets the NJT's symbolic sizes, on which inductor fails (torch 2.13: "For s + 1, expected [s]").
        residual_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32), copy=True)
        for layer in self.layers:
            residual_TD = layer(residual_TD, packing)
        return self.rmsnorm(residual_TD)


def on_values(stack: Isotropic, x_BjD: Tensor) -> Tensor:
    return nested_like(stack(x_BjD.values(), Packing.of(x_BjD, stack.rotary_dim)), x_BjD)


# ---------------------------------------------------------------------------------------------- router, chunk, dechunk


class StageOutput(NamedTuple):
    """What a chunking stage decided. F and G are tensors, so that nothing waits for the device."""

    boundary_prob: Tensor  # NJT (B, j), at least float32
    boundary_mask: Tensor  # NJT (B, j), bool
    F: Tensor  # scalar: share of tokens that open a chunk
    G: Tensor  # scalar: mean boundary probability


class RoutingModule(nn.Module):
    """Where chunks begin (section 2.2.1). x_BjD -> StageOutput; b_t = p_t > 0.5, so a tie is no boundary (code)."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj_layer = nn.Linear(width, width, bias=False)
        self.k_proj_layer = nn.Linear(width, width, bias=False)

    def forward(self, x_BjD: Tensor) -> StageOutput:
        p_Bj = BoundaryProbability.apply(self.q_proj_layer(x_BjD), self.k_proj_layer(x_BjD))
        p_T = p_Bj.values()
        b_T = p_T.detach() > 0.5
        return StageOutput(p_Bj, nested_like(b_T, p_Bj), b_T.to(p_T.dtype).mean(), p_T.mean())


def dechunk(y_BkD: Tensor, stage: StageOutput, residual_BjD: Tensor) -> Tensor:
    """Back to the tokens of the stage (eq. 5 to 9): up_t * STE(c_t) + residual_t, in at least float32."""
    p_Bj, b_Bj = stage.boundary_prob, stage.boundary_mask
    up_BjD = EmaUpsample.apply(y_BkD, p_Bj, b_Bj)
    p_T = p_Bj.values()
    confidence_Bj = nested_like(torch.where(b_Bj.values(), p_T, 1 - p_T), p_Bj)  # eq. 6
    return nested_like(
        up_BjD.values() * StraightThrough.apply(confidence_Bj).values()[:, None] + residual_BjD.values(), p_Bj
    )


def ratio_loss(stage: StageOutput, N: float) -> Tensor:
    """Eq. 10: N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)); 1 where F = G = 1 / N. Gradient through G alone."""
    return N / (N - 1) * ((N - 1) * stage.F * stage.G + (1 - stage.F) * (1 - stage.G))


# -------------------------------------------------------------------------------------------------------------- model


class HNet(nn.Module):
    """Stage s: an NJT of the outer stage's width in, the same out, with the StageOutputs from s inwards."""

    def __init__(self, config: HNetConfig, s: int = 0):
        super().__init__()
        self.outer_width = config.d_model[max(s - 1, 0)]
        layouts, width = config.layouts(s), config.d_model[s]
        if width > self.outer_width:
            self.pad_dimension = nn.Parameter(torch.empty(width - self.outer_width))
        else:
            self.register_parameter("pad_dimension", None)
        self.is_innermost = s == config.num_stages
        if self.is_innermost:
            self.main_network = Isotropic(layouts[0], config, s)
            return
        self.encoder = Isotropic(layouts[0], config, s)
        self.routing_module = RoutingModule(width)
        self.residual_proj = nn.Linear(width, width)  # float32 whatever the compute dtype
        self.main_network = HNet(config, s + 1)
        self.decoder = Isotropic(layouts[1], config, s)

    def forward(self, x_BjD: Tensor) -> tuple[Tensor, list[StageOutput]]:
        if self.is_innermost:
            return self.narrow(on_values(self.main_network, self.widen(x_BjD))), []
        x_BjD, stage, residual_BjD = self.enter(x_BjD)
        y_BkD, inner = self.main_network(SelectChunks.apply(x_BjD, stage.boundary_mask))
        return self.leave(y_BkD, stage, residual_BjD), [stage, *inner]

    def widen(self, x_BjD: Tensor) -> Tensor:
        if self.pad_dimension is None:
            return x_BjD
        x_TD = x_BjD.values()
        pad_TD = self.pad_dimension.to(x_TD.dtype).expand(x_TD.shape[0], -1)
        return nested_like(torch.cat([x_TD, pad_TD], dim=-1), x_BjD)

    def narrow(self, x_BjD: Tensor) -> Tensor:
        return x_BjD if self.pad_dimension is None else x_BjD[..., : self.outer_width]

    def enter(self, x_BjD: Tensor) -> tuple[Tensor, StageOutput, Tensor]:
        """The way in: x_BjD after the encoder, where the router cuts it, and the residual that `leave` adds."""
        x_BjD = on_values(self.encoder, self.widen(x_BjD))
        stage = self.routing_module(x_BjD)
        residual_BjD = self.residual_proj(x_BjD.to(self.residual_proj.weight.dtype))
        return x_BjD, stage, residual_BjD

    def leave(self, y_BkD: Tensor, stage: StageOutput, residual_BjD: Tensor) -> Tensor:
        """The way out: the inner network's outputs, one a chunk, to x_BjD of the outer stage's width."""
        return self.narrow(on_values(self.decoder, dechunk(y_BkD, stage, residual_BjD).to(y_BkD.dtype)))


class HNetOutput(NamedTuple):
    """`logits`: NJT (B, j0, V); `ce`: nats, mean over labels, None without labels; `ratio_losses` (S,); S `stages`."""

    logits: Tensor
    ce: Tensor | None
    ratio_losses: Tensor
    stages: list[StageOutput]


class HNetLM(nn.Module):
    """The language model: bytes in, logits of the next byte out. Can be built under `torch.device("meta")`.

    The weights are not drawn here: call `init_weights`, or load a state dict (its keys are the official ones).
    """

    def __init__(self, config: HNetConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model[0])
        self.backbone = HNet(config)
        self.lm_head = nn.Linear(config.d_model[0], config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:  # leaving the meta device makes new parameters, which must stay one
            self.lm_head.weight = self.embeddings.weight
        return self

    def forward(self, iids: Tensor, labels: Tensor | None = None) -> HNetOutput:
        """`iids` and `labels`: NJTs (B, j0) of int64, at least one byte in all.

        Raises ValueError for anything else, and where the documents of the two differ in length. Values beyond the
        vocabulary are refused on the CPU; on another device the caller answers for them (see `check_documents`).
        """
        check_documents(iids, labels, self.config.vocab_size)
        x_BjD, stages = self.backbone(self.embeddings(iids))
        logits = self.lm_head(x_BjD)
        logits_TV = logits.values()
        loss_dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        ce = None if labels is None else F.cross_entropy(logits_TV.to(loss_dtype), labels.values())
        losses = [ratio_loss(stage, N) for stage, N in zip(stages, self.config.target_ratios)]
        return HNetOutput(logits, ce, torch.stack(losses) if losses else logits_TV.new_zeros(0), stages)


def check_documents(iids: Tensor, labels: Tensor | None, vocab_size: int = 256) -> None:
    """ValueError unless these are NJTs (B, j) of int64, of the same document lengths, with values in 0..vocab_size - 1.

    The values are looked at on the CPU alone: reading them from another device would wait for it. There a value beyond
    the vocabulary stops the process, so check what you give, by calling this before the copy to the device. The bytes
    of `fineweb.ByteStream`, of validation and of scripts/evaluate.py are uint8, which every vocabulary holds.
    """
    for name, x in (("iids", iids), ("labels", labels)):
        if x is None and name == "labels":
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a nested tensor (B, j) of jagged layout, got {type(x).__name__}")
        if not (x.is_nested and x.layout == torch.jagged and x.dim() == 2):
            kind = f"a nested tensor of layout {x.layout}" if x.is_nested else f"a tensor of shape {tuple(x.shape)}"
            raise ValueError(f"{name}: expected a nested tensor (B, j) of jagged layout, got {kind}")
        if x.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64, got {str(x.dtype).removeprefix('torch.')}")
        if x.lengths() is not None:
            raise ValueError(f"{name}: expected documents without gaps between them; call .contiguous() first")
    if not iids.values().shape[0]:
        raise ValueError("iids: expected at least one byte, got none")
    same = labels is None or iids.offsets() is labels.offsets()
    if not same and not (iids.offsets().shape == labels.offsets().shape and iids.offsets().equal(labels.offsets())):
        raise ValueError(
            f"labels: expected documents as long as those of iids; iids has {iids.shape[0]} of together "
            f"{iids.values().shape[0]} bytes, labels {labels.shape[0]} of together {labels.values().shape[0]}"
        )
    for name, x in (("iids", iids), ("labels", labels)):
        if x is not None and x.device.type == "cpu":
            least, most = (int(bound) for bound in x.values().aminmax())
            if least < 0 or most >= vocab_size:
                value = least if least < 0 else most
                raise ValueError(f"{name}: holds the value {value}; expected 0 to {vocab_size - 1}, the vocabulary")


# ------------------------------------------------------------------------------------------------- what training needs


def stage_of(name: str, config: HNetConfig) -> int:
    """The stage that a parameter belongs to: `pad_dimension` to the wider, inner one; embeddings and lm_head to 0."""
    return min(name.removeprefix("backbone.").count("main_network."), config.num_stages)


def lr_modulation(config: HNetConfig) -> list[float]:
    """Eq. 11, learning-rate multipliers of stages 0..S: sqrt(N_GPT prod_{i>=s} N^i / prod_{i>=0} N^i * D^S / D^s).

    N^S = 1, so the innermost's own numerator is 1: the multiplier grows with the bytes a stage sees per step.
    """
    ratios, widths = (*config.target_ratios, 1.0), config.d_model
    everything = math.prod(ratios)
    return [math.sqrt(N_GPT * math.prod(ratios[s:]) / everything * widths[-1] / widths[s]) for s in range(len(widths))]


NO_DECAY = ("bias", "A_log", "D", "dt_bias", "pad_dimension")


def has_weight_decay(name: str) -> bool:
    """Matrices, the convolution and the embeddings decay; norms, biases, A_log, D, dt_bias and pad_dimension do not.

    Embeddings do because nothing else bounds rows of bytes that are rare, and with tied embeddings they are lm_head.
    """
    *_, module, leaf = ("", *name.split("."))
    return leaf not in NO_DECAY and not module.startswith("norm") and module != "rmsnorm"


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: one for each (stage, decay or not), outermost first, every parameter in exactly one.

    Each has `params`, `names`, `lr` (base rate times `multiplier`, eq. 11), `weight_decay`, `stage` and `multiplier`.
    `model` is an HNetLM, plain or sharded.
    """
    multipliers = lr_modulation(model.config)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: stage_of(item[0], model.config)):
        s, decays = stage_of(name, model.config), has_weight_decay(name)
        group = groups.setdefault((s, decays), {"params": [], "names": [], "stage": s, "multiplier": multipliers[s]})
        group |= {"lr": lr * multipliers[s], "weight_decay": weight_decay if decays else 0.0}
        group["params"].append(parameter)
        group["names"].append(name)
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}
    return list(groups.values())


def residual_branches(config: HNetConfig, s: int) -> int:
    """Residual branches of stage s's blocks and of all stages around it: what scales the init of their outputs."""
    layers = [layer for i in range(s + 1) for layout in config.layouts(i) for layer in parse_layout(layout)]
    return sum(1 + layer.has_mlp for layer in layers)


def initial_weight(name: str, shape: Sequence[int], config: HNetConfig, seed: int) -> Tensor:
    """The initial value (float32, CPU) of one parameter, from (seed, name) alone, as the released code initialises.

    Linears N(0, 0.02), out_proj and fc2 divided by sqrt(residual branches); W_q and W_k the identity; residual_proj
    zero with torch's default bias; conv1d torch's default; embeddings N(0, 1), or 0.02 where they are tied to lm_head,
    whose logits would else start with a deviation of sqrt(D); A uniform in [1, 16]; dt log-uniform in [1e-3, 0.1],
    stored through the inverse softplus; D and norms 1; pad_dimension 0.
    """
    *_, module, leaf = ("", *name.split("."))
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    plain = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are set to

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(*shape, generator=generator, **plain) * (high - low) + low

    if leaf == "A_log":
        return uniform(1, 16).log()
    if leaf == "dt_bias":
        dt = uniform(math.log(1e-3), math.log(0.1)).exp()
        return dt + torch.log(-torch.expm1(-dt))
    if leaf == "D" or module.startswith("norm") or module == "rmsnorm":
        return torch.ones(*shape, **plain)
    if leaf == "pad_dimension" or (module == "residual_proj" and leaf == "weight"):
        return torch.zeros(*shape, **plain)
    if module == "residual_proj":
        bound = config.d_model[stage_of(name, config)] ** -0.5
        return uniform(-bound, bound)
    if module == "conv1d":
        bound = config.ssm_cfg.d_conv**-0.5
        return uniform(-bound, bound)
    if module in ("q_proj_layer", "k_proj_layer"):
        return torch.eye(*shape, **plain)
    std = 0.02
    if module == "embeddings" and not config.tie_embeddings:
        std = 1.0
    if module in ("out_proj", "fc2"):
        std /= math.sqrt(residual_branches(config, stage_of(name, config)))
    return torch.randn(*shape, generator=generator, **plain) * std


def initial_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Each parameter of an HNetLM (plain, sharded or on meta) with its whole initial value; see `initial_weight`."""
    for name, parameter in model.named_parameters():
        yield name, parameter, initial_weight(name, parameter.shape, model.config, seed)


@torch.no_grad()
def init_weights(model: HNetLM, seed: int) -> HNetLM:
    """Draw all weights of an unsharded model in place; the same for any device and dtype. Returns the model."""
    for _, parameter, value in initial_weights(model, seed):
        parameter.copy_(value)
    return model


class Flops(NamedTuple):
    """Floating-point operations of one forward and backward (a multiply-add counts two)."""

    matmul: float  # 6 x parameters of matrix products x tokens that really reach them
    attention: float  # scores and their use, causal, within the window
    scan: float  # Mamba-2's recurrence

    @property
    def total(self) -> float:
        return sum(self)


def count_flops(config: HNetConfig, stage_lengths: Sequence[Sequence[int]]) -> Flops:
    """FLOPs of a training step from the lengths really seen. `stage_lengths[s]` holds stage s's document lengths.

    Model FLOPs: what is computed again (recomputation, activation checkpointing) does not count.
    """
    if len(stage_lengths) != config.num_stages + 1:
        raise ValueError(f"stage_lengths: {len(stage_lengths)} lists for {config.num_stages + 1} stages")
    matmul = attn = scan = 0.0
    ssm = config.ssm_cfg
    for s, lengths in enumerate(stage_lengths):
        D, tokens, window = config.d_model[s], sum(lengths), config.attn_cfg.window_size[s]
        pairs = sum(_visible_pairs(length, window) for length in lengths)
        weights = config.vocab_size * D if s == 0 else 0  # lm_head
        if s < config.num_stages:
            weights += 3 * D * D  # W_q, W_k, residual_proj
        inner, d_inner = -(-config.d_intermediate[s] // 128) * 128, ssm.expand * D
        for layer in (layer for layout in config.layouts(s) for layer in parse_layout(layout)):
            weights += 3 * D * inner if layer.has_mlp else 0
            if layer.mixer == "t":
                weights += 4 * D * D
                attn += 3 * 4 * D * pairs
            else:
                weights += D * (2 * d_inner + 2 * ssm.d_state + d_inner // HEADDIM) + d_inner * D
                scan += 3 * 6 * d_inner * ssm.d_state * tokens  # decay and add to h, read it out
        matmul += 6 * weights * tokens
    return Flops(matmul, attn, scan)


def _visible_pairs(length: int, window: int) -> int:
    """Pairs (i, j) with max(0, i - window) <= j <= i in a document of `length` tokens."""
    if window < 0 or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * (window + 1)


# --------------------------------------------------------------------------------------------------------- self-check


def compile_blocks(model: nn.Module) -> None:
    """Compile each kind of block once, fullgraph, for any T, B and M. Call it before the first forward.

    Only flat tensors enter a block: torch 2.11 can't compile autograd functions on NJTs, which stay outside. A kind is
    a letter at a stage. Each gets a code object of its own, which is what dynamo keeps its compilations by: it guards
    too little of a module that FSDP manages to tell kinds apart, and stops at 8 compilations of one code object.
    """
    kinds: dict[str, Any] = {}
    for name, block in model.named_modules():
        if isinstance(block, Block):
            kind = f"block_{type(block.mixer).__name__}{block.has_mlp:d}_{stage_of(name + '.', model.config)}"
            if kind not in kinds:
                code = Block.forward.__code__.replace(co_name=kind)
                kinds[kind] = torch.compile(types.FunctionType(code, globals(), kind), fullgraph=True)
            block.forward = functools.partial(_call_with_any_sizes, kinds[kind], block)


def _call_with_any_sizes(compiled: Any, block: Block, residual_TD: Tensor, packing: Packing) -> Tensor:
    for tensor in (residual_TD, *packing):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return compiled(block, residual_TD, packing)


def self_check(device: str) -> bool:
    """Forward and backward of documents packed against each alone, eager and compiled. Prints; True if all agree.

    In float32: sums in another order differ by 1e-6 of the largest value; 1e-3 leaves room for TF32 and many terms.
    """
    layout = ["m1", ["T1m1", ["t1T1"], "M1"], "t1m1"]
    heads = AttnConfig(num_heads=(2, 2, 4), rotary_emb_dim=(16, 16, 16), window_size=(31, -1, -1))
    fields = {"d_model": [64, 64, 128], "d_intermediate": [0, 128, 128], "ssm_cfg": {"d_state": 16}}
    config = HNetConfig.load({"arch_layout": layout, "attn_cfg": dataclasses.asdict(heads), **fields})
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(256, (n,), generator=generator).to(device) for n in (1, 2, 65, 200)]

    def run(model: HNetLM, docs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        iids = torch.nested.nested_tensor(docs, layout=torch.jagged)
        model.zero_grad()
        out = model(iids)
        out.logits.values().square().sum().backward()
        return out.logits.values().detach(), [p.grad for p in model.parameters()]

    def agree(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= 1e-3 * b.abs().max().clamp_min(1e-6))

    model = init_weights(HNetLM(config).to(device), seed=0)
    alone = [run(model, [doc]) for doc in documents]
    expected = torch.cat([logits for logits, _ in alone]), [sum(g) for g in zip(*(grads for _, grads in alone))]
    good = True
    for name in ("eager", "compile"):
        if name == "compile":
            compile_blocks(model)
        try:
            logits, grads = run(model, documents)
        except Exception as error:
            if name == "eager":
                raise
            # a machine without a C++ compiler (CPU) or a C compiler and Python's headers (CUDA) can still train
            print(f"compile not possible here: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        wrong = [n for (n, _), g, e in zip(model.named_parameters(), grads, expected[1]) if not agree(g, e)]
        wrong = wrong if agree(logits, expected[0]) else ["logits", *wrong]
        print(f"{name} ok" if not wrong else f"{name} WRONG: packed differs from alone in {', '.join(wrong)}")
        good = good and not wrong
    return good


if __name__ == "__main__":
    best = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if best == 'cuda' else 'CPU'}")
    raise SystemExit(not self_check(best))
