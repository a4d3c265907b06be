"""A trainable H-Net: a byte-level language model that learns where to cut text into chunks (arXiv 2507.07955).

    encoder -> router -> keep the boundaries -> inner network -> smooth and upsample -> decoder

The inner network is again an H-Net, or, innermost, a stack of blocks. Documents of any lengths are packed: a batch is a
nested tensor of jagged layout (NJT, `torch.nested`) of shape `(B, j, ...)`: B documents of lengths j, which differ
from stage to stage.

What this file says is what runs: training as CUDA graphs, eagerly or sharded by FSDP2, validation, generation and
evaluation all call the modules below. Speed comes from the operations in hnet_kernels/, each a definition in plain
torch with a fast implementation beside it.

Read top to bottom: what a block gets of its stage (`Packing`), layers, mixers, blocks, nested tensors, router and
chunks, HNet, HNetLM, then what training needs: learning-rate modulation, parameter groups, initial weights. The config
is in hnet_config.py.

Shape legend, as suffixes of names: B documents, j their lengths at this stage (jD: nested), k their lengths at the
stage inside, T tokens of all documents of a stage together, C chunks (the T of the stage inside), D width, H heads,
P channels per head, N state size, R rotary dimensions / 2, M positions, V vocabulary, S number of chunking stages.

Equation numbers and sections are those of the paper; "code" is the released one, github.com/goombalab/hnet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nested._internal.nested_tensor import NestedTensor

from hnet_config import (  # noqa: F401
    BOS,
    EOS,
    HEADDIM,
    MIXERS,
    ROUTERS,
    AttnConfig,
    ConfigError,
    HNetConfig,
    Layer,
    SSMConfig,
    parse_layout,
    parse_router,
)
from hnet_kernels import (
    Chunks,
    Residual,
    boundary_probability,
    cross_entropy,
    cut,
    embed,
    linear,
    mamba2_inner,
    residual_stream,
    rms_norm,
    rotary_attention,
    smooth,
    swiglu,
    take_rows,
    tile_order,
    upsample,
    wide_linear,
    widen,
)
from hnet_kernels.generation import (
    KVState,
    MambaState,
    MambaWeights,
    Span,
    attention_prefill,
    attention_step,
    mamba2_prefill,
    mamba2_step,
)
from hnet_kernels.router import TakeRows
from hnet_routers import Router, check_cuts, inner_cuts

NORM_EPS = 1e-5
EMA_CLAMP = 1e-4  # the smoothing's P stays in [1e-4, 1 - 1e-4] (code)
N_GPT = 4.6  # bytes per token of GPT-2's tokenizer (section 2.3.2)


# ------------------------------------------------------------------------------------------------------------ packing


@dataclasses.dataclass
class Packing:
    """Where T flat tokens are in documents of at most M tokens, and the rotary tables of positions 0 ... M - 1.

    A stage unwraps its NJT once. Its blocks and router get the values (T, D) and this.
    """

    cu_seqlens: Tensor  # int32 (B + 1,)
    position_T: Tensor  # int32, from 0 in each document
    cos_MR: Tensor  # at least float32
    sin_MR: Tensor
    byte_T: Tensor | None = None  # int64, the input bytes; only at stage 0
    cuts_T: Tensor | None = None  # bool or integer, for routers that read `cuts`: see `HNetLM.forward`
    _tiles: dict[int, Tensor | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, x_BjD: Tensor, rotary_dim: int, byte_T: Tensor | None = None, cuts_T: Tensor | None = None) -> Packing:
        x_TD = x_BjD._values
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        tables = rotary_tables(x_BjD._get_max_seqlen(), rotary_dim, dtype, x_TD.device)
        return cls(cu_seqlens(x_BjD), positions(x_BjD).to(torch.int32), *tables, byte_T, cuts_T)

    def mix(self, mixer: nn.Module, x_TD: Tensor) -> Tensor:
        """The mixer's output for complete documents. Generation continues from a cache: `hnet_simple.Continued`."""
        return mixer(x_TD, self)

    def tiles(self, x_TD: Tensor, head_dim: int) -> Tensor | None:
        """The order of tiles in attention's kernels (`tile_order`), computed once for all layers."""
        if head_dim not in self._tiles:
            self._tiles[head_dim] = tile_order(x_TD, head_dim, self.cu_seqlens)
        return self._tiles[head_dim]


def rotary_tables(M: int, rotary_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos_MR and sin_MR of the angles by which positions 0 ... M - 1 rotate; R = rotary_dim / 2."""
    exponent_R = torch.arange(0, rotary_dim, 2, device=device, dtype=dtype) / max(rotary_dim, 1)
    angle_MR = torch.arange(M, device=device).to(dtype)[:, None] * 10000.0**-exponent_R
    return angle_MR.cos(), angle_MR.sin()


# ------------------------------------------------------------------------------------------------------------- layers


class Linear(nn.Linear):
    """x W^T without a bias. is_saved: the next operation saves the result for its backward (`hnet_kernels.linear`)."""

    def __init__(self, inputs: int, outputs: int, is_saved: bool = False):
        super().__init__(inputs, outputs, bias=False)
        self.is_saved = is_saved

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self.weight, self.is_saved)


class WideLinear(nn.Linear):
    """x W^T + bias in float32, whatever the compute dtype."""

    def forward(self, x_TD: Tensor) -> Tensor:
        return wide_linear(x_TD, self.weight, self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:  # on the meta device, drawing normal numbers imports torch._dynamo
        nn.init.zeros_(self.weight) if self.weight.is_meta else nn.init.normal_(self.weight)

    def forward(self, iids_T: Tensor) -> Tensor:
        return embed(iids_T, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least float32, returned in the weight's dtype (the compute dtype)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TD: Tensor | Residual) -> Tensor:
        return rms_norm(x_TD, self.weight, NORM_EPS)


class SwiGLU(nn.Module):
    """fc2(silu(gate) * value); fc1 gives value, then gate. Inner width: the next multiple of 128 (code)."""

    def __init__(self, width: int, d_intermediate: int):
        super().__init__()
        inner = -(-d_intermediate // 128) * 128
        self.fc1 = Linear(width, 2 * inner, is_saved=True)
        self.fc2 = Linear(inner, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.fc2(swiglu(self.fc1(x_TD)))


# ------------------------------------------------------------------------------------------------------------- mixers
#
# A mixer is a letter of a layout: a class that is built from (config, stage) and maps (x_TD, packing) to what a block
# adds to its residual stream. That is enough to train. To generate it also needs `new_state`, `prefill` and `step`.
# `flops` counts the mixer's work beside matrix products with its weights, for hnet_runtime/flops.py.


class Weights(nn.Module):
    """Named weights without a computation: the module around them uses them."""

    def __init__(self, **shapes: Sequence[int]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(*shape)))


class Mamba2(nn.Module):
    """Mamba-2 mixer (arXiv 2405.21060) with one group: B and C are shared by all heads. See `mamba2_inner`."""

    def __init__(self, config: HNetConfig, s: int):
        super().__init__()
        width, ssm = config.d_model[s], config.ssm_cfg
        d_inner, conv_dim = ssm.expand * width, ssm.expand * width + 2 * ssm.d_state
        n_heads, self.d_state = d_inner // HEADDIM, ssm.d_state
        self.in_proj = Linear(width, d_inner + conv_dim + n_heads, is_saved=True)  # z, x, B, C, dt
        self.conv1d = Weights(weight=(conv_dim, 1, ssm.d_conv), bias=(conv_dim,))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads))
        self.norm = Weights(weight=(d_inner,))
        self.out_proj = Linear(d_inner, width)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        y_TD = mamba2_inner(self.in_proj(x_TD), *self.weights(), packing.position_T, packing.cu_seqlens, NORM_EPS)
        return self.out_proj(y_TD)

    def weights(self) -> MambaWeights:
        conv = self.conv1d
        for name, module in (("conv1d", conv), ("norm", self.norm)):
            if not isinstance(module, Weights):  # an adapter's forward would not be called
                raise TypeError(
                    f"{name} of a Mamba-2 mixer was replaced by {type(module).__name__}, which has no effect"
                )
        return MambaWeights(conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, self.norm.weight)

    def new_state(self, batch: int) -> MambaState:
        """The state of `batch` sequences without tokens."""
        d_inner, (conv_dim, _, taps) = self.out_proj.in_features, self.conv1d.weight.shape
        new, wide = self.in_proj.weight.new_zeros, torch.promote_types(self.A_log.dtype, torch.float32)
        ssm = new(batch, d_inner // HEADDIM, HEADDIM, self.d_state, dtype=wide)
        return MambaState(new(batch, taps - 1, conv_dim), ssm)

    def prefill(self, x_TD: Tensor, state: MambaState, span: Span) -> Tensor:
        """`forward` for L new tokens of each of B sequences, from a state that it updates: (B L, D) -> (B L, D)."""
        return self.out_proj(mamba2_prefill(self.in_proj(x_TD), self.weights(), state, span, NORM_EPS))

    def step(self, x_BD: Tensor, state: MambaState, span: Span) -> Tensor:
        """`prefill` with one new token of each sequence."""
        return self.out_proj(mamba2_step(self.in_proj(x_BD), self.weights(), state, span, NORM_EPS))

    def flops(self, lengths: Sequence[int]) -> float:
        """FLOPs of the recurrence in a forward: to decay h, add to it and read it out, 2 each per element of h."""
        return 6 * self.out_proj.in_features * self.d_state * sum(lengths)


class Attention(nn.Module):
    """Causal multi-head attention within documents, with partial rotary embeddings and optionally a window."""

    def __init__(self, config: HNetConfig, s: int):
        super().__init__()
        width = config.d_model[s]
        self.n_heads, self.window = config.attn_cfg.num_heads[s], config.attn_cfg.window_size[s]
        self.Wqkv = Linear(width, 3 * width, is_saved=True)
        self.out_proj = Linear(width, width)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        o_TD = rotary_attention(
            self.Wqkv(x_TD), self.n_heads, self.window, packing.cos_MR, packing.sin_MR, packing.position_T,
            packing.cu_seqlens, packing.tiles(x_TD, self.out_proj.in_features // self.n_heads),
        )  # fmt: skip
        return self.out_proj(o_TD)

    def new_state(self, batch: int) -> KVState:
        """The state of `batch` sequences without tokens."""
        heads = self.n_heads, self.out_proj.in_features // self.n_heads
        return KVState(*(self.Wqkv.weight.new_zeros(batch, 0, *heads) for _ in "kv"), self.window)

    def prefill(self, x_TD: Tensor, state: KVState, span: Span) -> Tensor:
        """`forward` for L new tokens of each of B sequences, from a state that it updates: (B L, D) -> (B L, D)."""
        return self.out_proj(attention_prefill(self.Wqkv(x_TD), self.n_heads, state, span))

    def step(self, x_BD: Tensor, state: KVState, span: Span) -> Tensor:
        """`prefill` with one new token of each sequence."""
        return self.out_proj(attention_step(self.Wqkv(x_BD), self.n_heads, state, span))

    def flops(self, lengths: Sequence[int]) -> float:
        """FLOPs of the scores and the weighted sums of values in a forward, over `visible_pairs`."""
        return 4 * self.out_proj.in_features * sum(visible_pairs(length, self.window) for length in lengths)


def visible_pairs(length: int, window: int) -> int:
    """Pairs (i, j) with max(0, i - window) <= j <= i in a document of `length` tokens."""
    if window < 0 or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * (window + 1)


MIXERS |= {"m": Mamba2, "t": Attention}


# ------------------------------------------------------------------------------------------------------------- blocks


class Block(nn.Module):
    """Pre-norm residual block. The residual stream is at least float32; mixer and MLP compute in the weights' dtype."""

    def __init__(self, layer: Layer, config: HNetConfig, s: int):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model[s])
        self.mixer = MIXERS[layer.mixer](config, s)
        if layer.has_mlp:
            self.norm2 = RMSNorm(config.d_model[s])
            self.mlp = SwiGLU(config.d_model[s], config.d_intermediate[s])
        self.has_mlp = layer.has_mlp

    def forward(self, residual_TD: Tensor | Residual, packing: Packing) -> Tensor | Residual:
        residual_TD = residual_TD + packing.mix(self.mixer, self.norm1(residual_TD))
        if self.has_mlp:
            residual_TD = residual_TD + self.mlp(self.norm2(residual_TD))
        return residual_TD


class Isotropic(nn.Module):
    """A stack of blocks at one width and a final norm: an encoder, a decoder or the innermost network."""

    def __init__(self, layout: str, config: HNetConfig, s: int):
        super().__init__()
        self.layers = nn.ModuleList(Block(layer, config, s) for layer in parse_layout(layout))
        self.rmsnorm = RMSNorm(config.d_model[s])

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        residual_TD = residual_stream(x_TD)
        for layer in self.layers:
            residual_TD = layer(residual_TD, packing)
        return self.rmsnorm(residual_TD)


# ----------------------------------------------------------------------------------------------------- nested tensors
#
# Blocks compute on flat tensors. `flat` takes the values of an NJT, and `nested_like` wraps values as an NJT again,
# with the *same offsets object*: torch combines only NJTs that share it. Torch's own `values()` and
# `nested_tensor_from_jagged` do the same, but their backwards run in Python and they import torch._dynamo (1 s).


class Documents(NamedTuple):
    """What an NJT has beside its values: where documents begin, and bounds of their lengths."""

    offsets: Tensor  # int64 (B + 1,)
    seqlens: dict[str, Tensor]  # torch's cache: a bound is the first size of an empty tensor

    @classmethod
    def of(cls, x: Tensor) -> Documents:
        return cls(x._offsets, x._metadata_cache)

    @classmethod
    def between(cls, offsets: Tensor, shortest: int, longest: int) -> Documents:
        """Documents between consecutive offsets, of `shortest` to `longest` tokens each."""
        return cls(offsets, {"min_seqlen": torch.zeros(shortest, 0), "max_seqlen": torch.zeros(longest, 0)})

    def nest(self, values: Tensor) -> Tensor:
        """The values (T, ...) as an NJT (B, j, ...), without their gradient."""
        values = values.detach()
        if torch.compiler.is_compiling():
            return NestedTensor(values, self.offsets, _metadata_cache=self.seqlens)
        # without the rest of the constructor, which imports torch._dynamo to mark sizes as dynamic for torch.compile
        x = NestedTensor.__new__(NestedTensor, values, self.offsets)
        x._values, x._offsets, x._lengths, x._metadata_cache = values, self.offsets, None, self.seqlens
        return x


class Flat(torch.autograd.Function):
    """x_BjD -> x_TD. The gradient of x is an NJT."""

    @staticmethod
    def forward(ctx, x_BjD: Tensor) -> Tensor:
        ctx.documents = Documents.of(x_BjD)
        return x_BjD._values.detach()

    @staticmethod
    def backward(ctx, grad_x_TD: Tensor) -> Tensor:
        return ctx.documents.nest(grad_x_TD)


class Nested(torch.autograd.Function):
    """x_TD -> x_BjD. The gradient of x is flat."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, documents: Documents) -> Tensor:
        ctx.set_materialize_grads(False)  # autograd can't make zeros of an NJT's shape
        return documents.nest(x_TD)

    @staticmethod
    def backward(ctx, grad_x_BjD: Tensor | None):
        return None if grad_x_BjD is None else grad_x_BjD._values, None


def flat(x: Tensor) -> Tensor:
    """The values `(T, ...)` of the NJT `x`, document after document. Differentiable."""
    return Flat.apply(x)


def nested_like(values: Tensor, like: Tensor) -> Tensor:
    """Flat `values` `(T, ...)` as an NJT with the documents of the NJT `like`. Differentiable."""
    return Nested.apply(values, Documents.of(like))


def cu_seqlens(x: Tensor) -> Tensor:
    """The offsets of an NJT as the kernels take them: int32 `(B + 1,)`."""
    return x.offsets().to(torch.int32)


def positions(x: Tensor) -> Tensor:
    """Each token's position in its document, from 0: int64 `(T,)` for an NJT of T tokens."""
    offsets = x.offsets()
    t = torch.arange(len(x._values), device=offsets.device)
    return t - offsets[torch.bucketize(t, offsets[1:], right=True)]


# torch 2.13's own `nested_tensor_from_jagged` calls a function that logs a warning about itself
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in record.getMessage())


# -------------------------------------------------------------------------------------------------- router and chunks


class StageOutput(NamedTuple):
    """What a chunking stage decided, on the device. In steps as graphs, p_T and b_T are followed by padding."""

    p_T: Tensor  # boundary probabilities, at least float32
    b_T: Tensor  # bool: which tokens open a chunk
    F: Tensor  # scalar: share of tokens that open a chunk
    G: Tensor  # scalar: mean of p; the gradient of the ratio loss goes through it
    like: Tensor  # an NJT (B, j, ...) of the stage's documents; in steps as graphs None

    @property
    def boundary_prob(self) -> Tensor:
        """The p of each document, NJT (B, j)."""
        return nested_like(self.p_T, self.like)

    @property
    def boundary_mask(self) -> Tensor:
        """The b of each document, NJT (B, j)."""
        return nested_like(self.b_T, self.like)

    def detach(self) -> StageOutput:
        *flat, like = self
        return StageOutput(*(x.detach() for x in flat), Documents.of(like).nest(like._values))


class RoutingModule(Router):
    """The router `learned`, which decides where chunks begin (section 2.2.1). hnet_routers.py has rules instead."""

    usage, is_learned = "learned", True

    def __init__(self, width: int, argument: str = ""):
        super().__init__()
        self.q_proj_layer = Linear(width, width, is_saved=True)
        self.k_proj_layer = Linear(width, width, is_saved=True)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        """p_T of eq. 4, in at least float32."""
        return boundary_probability(self.q_proj_layer(x_TD), self.k_proj_layer(x_TD), packing.position_T)

    def opens(self, p_T: Tensor) -> Tensor:
        """b_T (bool): which tokens open a chunk. `cut` adds each document's first. p = 0.5 is no boundary (code)."""
        return p_T.detach() > 0.5


ROUTERS["learned"] = RoutingModule


class SelectChunks(torch.autograd.Function):
    """Downsampler (section 2.2.1): selects the tokens that open chunks. x_BjD -> h_BkD, one row per chunk.

    The gradient of x is zero for all other tokens. The host waits here for the number of chunks, once per stage.
    """

    @staticmethod
    def forward(ctx, x_BjD: Tensor, chunks: Chunks) -> Tensor:
        ctx.set_materialize_grads(False)  # see `Nested`
        ctx.documents = Documents.of(x_BjD)
        total, longest = chunks.counts.tolist()
        h_CD = TakeRows.forward(ctx, x_BjD._values, chunks.start_C[:total])
        return Documents.between(chunks.cu_seqlens.to(torch.int64), 0, longest).nest(h_CD)

    @staticmethod
    def backward(ctx, grad_h_BkD: Tensor | None):
        if grad_h_BkD is None:
            return None, None
        return ctx.documents.nest(TakeRows.backward(ctx, grad_h_BkD._values)[0]), None


def ratio_loss(stage: StageOutput, N: float | Tensor) -> Tensor:
    """Eq. 10: N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)), which is 1 at F = G = 1 / N. Only G has a gradient."""
    return N / (N - 1) * ((N - 1) * stage.F * stage.G + (1 - stage.F) * (1 - stage.G))


def ratio_hinge(stage: StageOutput, N: float | Tensor) -> Tensor:
    """Eq. 10 where F > 1 / N, else 1: only too many chunks cost, as in FLEXITOKENS (arXiv 2507.12720). Not the default.

    Eq. 10 is 1 + N / (N - 1) * (N F - 1) (G - 1 / N), so its gradient pushes G down where F > 1 / N and up elsewhere.
    """
    return 1 + N / (N - 1) * (N * stage.F - 1).clamp_min(0) * (stage.G - 1 / N)


def training_loss(ce: Tensor, ratio_losses: Tensor, alpha: float | Tensor) -> Tensor:
    """What a training step minimises: the cross entropy plus alpha times the sum of the ratio losses (S,)."""
    return ce + alpha * ratio_losses.sum()


# -------------------------------------------------------------------------------------------------------------- model


class HNet(nn.Module):
    """Stage s and all stages inside it. Input and output are NJTs (B, j, D) of the outer stage's width D.

    `forward` calls the methods below it one after the other, on flat tensors. Steps as CUDA graphs call them too.
    """

    def __init__(self, config: HNetConfig, s: int = 0):
        super().__init__()
        self.outer_width, width = config.d_model[max(s - 1, 0)], config.d_model[s]
        layouts, self.rotary_dim = config.layouts(s), config.attn_cfg.rotary_emb_dim[s]
        wider = width > self.outer_width
        self.pad_dimension = nn.Parameter(torch.empty(width - self.outer_width)) if wider else None
        self.is_innermost = s == config.num_stages
        if self.is_innermost:
            self.main_network = Isotropic(layouts[0], config, s)
            return
        self.encoder = Isotropic(layouts[0], config, s)
        kind, argument = parse_router(config.routers[s], s)
        self.routing_module = kind(width, argument)
        self.residual_proj = WideLinear(width, width)
        self.main_network = HNet(config, s + 1)
        self.decoder = Isotropic(layouts[1], config, s)

    def forward(
        self, x_BjD: Tensor, byte_T: Tensor | None = None, cuts_T: Tensor | None = None
    ) -> tuple[Tensor, list[StageOutput]]:
        """The output, and the StageOutputs of this stage and those inside. byte_T, cuts_T: see `Packing`."""
        packing = Packing.of(x_BjD, self.rotary_dim, byte_T, cuts_T)
        if self.is_innermost:
            return nested_like(self.run_innermost(flat(x_BjD), packing), x_BjD), []
        x_TD = self.encode(flat(x_BjD), packing)
        p_T = self.routing_module(x_TD, packing)
        p_T, G, chunks = cut(p_T, self.routing_module.opens(p_T), packing.position_T, packing.cu_seqlens)
        residual_TD = self.residual_proj(x_TD)
        h_BkD = SelectChunks.apply(nested_like(x_TD, x_BjD), chunks)
        start_C = chunks.start_C[: len(h_BkD._values)]  # `cut` has allocated T entries, of which C are chunks
        y_BkD, inner = self.main_network(h_BkD, None, None if cuts_T is None else inner_cuts(cuts_T, start_C))
        z_CD = self.smooth(flat(y_BkD), take_rows(p_T, start_C), chunks.cu_seqlens)
        x_TD = self.upsample(z_CD, p_T, chunks._replace(start_C=start_C), residual_TD, x_TD.dtype)
        stage = StageOutput(p_T, chunks.b_T, chunks.shares[0], G, x_BjD)  # shares[0] is F
        return nested_like(self.decode(x_TD, packing), x_BjD), [stage, *inner]

    def encode(self, x_TD: Tensor, packing: Packing) -> Tensor:
        """Appends `pad_dimension`, if this stage is wider than the outer one, and runs the encoder."""
        return self.encoder(x_TD if self.pad_dimension is None else widen(x_TD, self.pad_dimension), packing)

    def run_innermost(self, x_TD: Tensor, packing: Packing) -> Tensor:
        """Appends `pad_dimension` as `encode` does, runs the main network, and returns to the outer stage's width."""
        x_TD = x_TD if self.pad_dimension is None else widen(x_TD, self.pad_dimension)
        return self.main_network(x_TD, packing)[:, : self.outer_width]

    def smooth(self, y_CD: Tensor, p_C: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Eq. 5: z_k = P_k y_k + (1 - P_k) z_{k-1} in each document, where P is p, clamped."""
        return smooth(y_CD, p_C.clamp(EMA_CLAMP, 1 - EMA_CLAMP), cu_seqlens)

    def upsample(
        self, z_CD: Tensor, p_T: Tensor, chunks: Chunks, residual_TD: Tensor, dtype: torch.dtype,
        spare: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Eq. 6 to 9: z of each token's chunk, times STE(c), plus the residual. spare: see `hnet_kernels.upsample`."""
        c_T = torch.where(chunks.b_T, p_T, 1 - p_T)  # eq. 6: the router's confidence in its decision
        ste_T = 1 + (c_T - c_T.detach())  # eq. 7: 1 in the forward; in the backward, the gradient of c
        return upsample(z_CD, ste_T, chunks.chunk_T, chunks.start_C, residual_TD, dtype, spare)

    def decode(self, x_TD: Tensor, packing: Packing) -> Tensor:
        """Runs the decoder, and returns to the outer stage's width by dropping the channels behind it."""
        return self.decoder(x_TD, packing)[:, : self.outer_width]


class HNetOutput(NamedTuple):
    """What `HNetLM.forward` returns."""

    logits: Tensor  # NJT (B, j0, V), in the compute dtype
    ce: Tensor | None  # scalar: cross entropy in nats, mean over labels; None without labels
    ratio_losses: Tensor  # (S,); 0 for a stage whose router is a rule
    stages: list[StageOutput]  # S, outermost first


class HNetLM(nn.Module):
    """The language model: bytes in, logits of the next byte out. Can be built under `torch.device("meta")`.

    `__init__` draws no weights: call `init_weights`, or load a state dict, which has the keys of the released code.
    """

    def __init__(self, config: HNetConfig):
        super().__init__()
        self.config = config
        self.ratio_form, self.ratio_targets = "both", config.learned_ratios  # training sets them: losses.attach
        self.embeddings = Embedding(config.vocab_size, config.d_model[0])
        self.backbone = HNet(config)
        self.lm_head = Linear(config.d_model[0], config.vocab_size, is_saved=True)
        if config.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:  # leaving the meta device makes new parameters, which must stay one
            self.lm_head.weight = self.embeddings.weight
        return self

    def forward(self, iids: Tensor, labels: Tensor | None = None, cuts: Tensor | None = None) -> HNetOutput:
        """The logits for each byte of `iids`, and the losses.

        iids, labels: NJTs (B, j0) of int64, with the same document lengths and at least one byte. labels: next bytes.
        cuts: for the routers `given` and `tokens:FILE`, an NJT (B, j0). With one such stage it is bool: does the byte
        open a chunk? With several it is the number of stages, from stage 0 on, at which the byte opens a chunk.
        Raises ValueError for anything else. Values are checked on the CPU only: see `check_documents`.
        """
        config = self.config
        check_documents(iids, labels, config.vocab_size)
        check_cuts(cuts, iids, config)
        byte_T, cuts_T = flat(iids), None if cuts is None else cuts._values
        x_BjD, stages = self.backbone(nested_like(self.embed(byte_T), iids), byte_T, cuts_T)
        logits_TV = self.head(flat(x_BjD))
        ce = None if labels is None else cross_entropy(logits_TV, flat(labels))
        losses = [self.ratio_loss(s, stage) for s, stage in enumerate(stages)]
        ratio_losses = torch.stack(losses) if losses else logits_TV.new_zeros(0)
        return HNetOutput(nested_like(logits_TV, iids), ce, ratio_losses, stages)

    def ratio_loss(self, s: int, stage: StageOutput) -> Tensor:
        """The ratio loss of stage s, in the form and with the target of this step; 0 if its router is a rule."""
        N = self.ratio_targets[s]
        if N is None:
            return torch.zeros_like(stage.G)
        form = ratio_hinge if self.ratio_form == "hinge" else ratio_loss
        return form(stage, N)

    def embed(self, iids_T: Tensor) -> Tensor:
        return self.embeddings(iids_T)

    def head(self, x_TD: Tensor) -> Tensor:
        return self.lm_head(x_TD)


def check_documents(iids: Tensor, labels: Tensor | None, vocab_size: int = 256) -> None:
    """Raises ValueError unless these are NJTs (B, j) of int64, with equal document lengths and values below vocab_size.

    Values are checked on the CPU only: to read them from a GPU, the host would wait for it. On a GPU a value outside
    the vocabulary ends the process, so call this before the copy to the device. The bytes of `fineweb.ByteStream`, of
    validation and of scripts/evaluate.py need no check: every vocabulary has at least 256 values.
    """
    given = {"iids": iids} if labels is None else {"iids": iids, "labels": labels}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a nested tensor (B, j) of jagged layout, got {type(x).__name__}")
        if not (isinstance(x, NestedTensor) and x.dim() == 2):
            kind = f"a nested tensor of layout {x.layout}" if x.is_nested else f"a tensor of shape {tuple(x.shape)}"
            raise ValueError(f"{name}: expected a nested tensor (B, j) of jagged layout, got {kind}")
        if (dtype := x._values.dtype) != torch.int64:
            raise ValueError(f"{name}: expected int64, got {str(dtype).removeprefix('torch.')}")
        if x.lengths() is not None:
            raise ValueError(f"{name}: expected documents without gaps between them; call .contiguous() first")
    if not len(iids._values):
        raise ValueError("iids: expected at least one byte, got none")
    if labels is not None and labels.offsets() is not iids.offsets() and not labels.offsets().equal(iids.offsets()):
        raise ValueError(
            f"labels: expected documents as long as those of iids; iids has {iids.shape[0]} of together "
            f"{len(iids._values)} bytes, labels {labels.shape[0]} of together {len(labels._values)}"
        )
    for name, x in given.items():
        if x._values.device.type == "cpu":
            least, most = (int(bound) for bound in x._values.aminmax())
            if least < 0 or most >= vocab_size:
                value = least if least < 0 else most
                raise ValueError(f"{name}: holds the value {value}; expected 0 to {vocab_size - 1}, the vocabulary")


# ------------------------------------------------------------------------------------------------- what training needs


def stage_of(name: str, config: HNetConfig) -> int:
    """The stage of a parameter: embeddings and lm_head belong to 0, `pad_dimension` to the stage that it widens to."""
    return min(name.removeprefix("backbone.").count("main_network."), config.num_stages)


def lr_modulation(config: HNetConfig) -> list[float]:
    """Learning-rate multipliers of stages 0..S (eq. 11): sqrt(N_GPT prod_{i>=s} N^i / prod_{i>=0} N^i * D^S / D^s).

    N^S = 1. The multiplier grows with the stage's tokens per byte, and shrinks with its width.
    """
    ratios, widths = (*config.target_ratios, 1.0), config.d_model
    everything = math.prod(ratios)
    return [math.sqrt(N_GPT * math.prod(ratios[s:]) / everything * widths[-1] / widths[s]) for s in range(len(widths))]


NO_DECAY = ("bias", "A_log", "D", "dt_bias", "pad_dimension")


def has_weight_decay(name: str) -> bool:
    """Matrices, the convolution and the embeddings decay; norms, biases, A_log, D, dt_bias and pad_dimension do not.

    Embeddings decay because nothing else bounds the rows of rare bytes. With tied embeddings they are also lm_head.
    """
    *_, module, leaf = ("", *name.split("."))
    return leaf not in NO_DECAY and not module.startswith("norm") and module != "rmsnorm"


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, router_lr: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one per stage and weight decay, outermost stage first.

    A group has `params`, `names`, `lr` (base rate times `multiplier`, eq. 11), `weight_decay`, `stage`, `multiplier`.
    router_lr: a factor on the multiplier of W_q and W_k, which then have groups of their own. The paper has none (1).
    model: an HNetLM, sharded or not.
    """
    multipliers = lr_modulation(model.config)
    groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: stage_of(item[0], model.config)):
        s, decays = stage_of(name, model.config), has_weight_decay(name)
        has_own_rate = router_lr != 1 and "routing_module" in name
        multiplier = multipliers[s] * (router_lr if has_own_rate else 1)
        new = {"params": [], "names": [], "stage": s, "multiplier": multiplier}
        group = groups.setdefault((s, decays, has_own_rate), new)
        group |= {"lr": lr * multiplier, "weight_decay": weight_decay if decays else 0.0}
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def residual_branches(config: HNetConfig, s: int) -> int:
    """The number of mixers and MLPs in stage s and the stages around it. It scales their outputs' initial weights."""
    layers = [layer for i in range(s + 1) for layout in config.layouts(i) for layer in parse_layout(layout)]
    return sum(1 + layer.has_mlp for layer in layers)


def initial_weight(name: str, shape: Sequence[int], config: HNetConfig, seed: int) -> Tensor | None:
    """The initial value (float32, CPU) of one parameter, as in the released code; it depends on (seed, name) alone.

    Linear layers: N(0, 0.02), for out_proj and fc2 divided by sqrt(`residual_branches`). Embeddings: N(0, 1), or
    N(0, 0.02) where they are tied to lm_head, whose logits would otherwise have a standard deviation of sqrt(D). W_q
    and W_k: the identity. residual_proj: zero, with torch's default bias. conv1d: torch's default. A: uniform in
    [1, 16]. dt: log-uniform in [1e-3, 0.1], stored as dt_bias through the inverse softplus. D and norms: 1.
    pad_dimension: 0. Returns None for other names: these keep the value that `__init__` gives them.
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
    if leaf == "D" or (leaf == "weight" and (module.startswith("norm") or module == "rmsnorm")):
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
    if leaf != "weight" or module not in ("embeddings", "lm_head", "in_proj", "Wqkv", "out_proj", "fc1", "fc2"):
        return None
    std = 1.0 if module == "embeddings" and not config.tie_embeddings else 0.02
    if module in ("out_proj", "fc2"):
        std /= math.sqrt(residual_branches(config, stage_of(name, config)))
    return torch.randn(*shape, generator=generator, **plain) * std


@torch.no_grad()
def init_weights(model: HNetLM, seed: int) -> HNetLM:
    """Sets an unsharded model's weights to `initial_weight` and returns it. train.py does not call this function."""
    for name, parameter in model.named_parameters():
        if (value := initial_weight(name, parameter.shape, model.config, seed)) is not None:
            parameter.copy_(value)
    return model
