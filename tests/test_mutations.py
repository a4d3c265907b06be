"""The tests can fail: wrong versions of the maths, each caught by the test named beside it.

A mutation replaces the function of a role, such as the ratio loss, by a wrong version. ROLES has the function of each
role: after a rename only its line there changes.
"""

import ast
import functools
import importlib
import inspect
import math
import re
import textwrap
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import test_config
import test_golden
import test_kernels
import test_model
import test_njt_ops
import test_training_parts
import torch
import torch.nn.functional as F
from golden_io import pack
from small_models import TWO_STAGES, build, random_documents
from torch import Tensor
from torch.nn.functional import pad

import hnet_config
import hnet_kernels as K
import hnet_trainable as H
from hnet_kernels.dispatch import forcing
from hnet_kernels.gradients import Destinations, writing_to
from hnet_kernels.recompute import recomputing
from hnet_runtime import flops
from hnet_runtime.checks import agreement

# by import_module, as the package exports functions under the names of some of these files
attention, boundaries, cross_entropy, ema, gradients, linear, mamba2, norm, pointwise, router, ssd = (
    importlib.import_module(f"hnet_kernels.{name}")
    for name in (
        *("attention", "boundaries", "cross_entropy", "ema", "gradients", "linear", "mamba2", "norm", "pointwise"),
        *("router", "ssd"),
    )
)

ROLES: dict[str, tuple[Any, str]] = {
    # constants of the model
    "least P": (H, "EMA_CLAMP"),
    "epsilon of norms": (H, "NORM_EPS"),
    "bytes of a GPT-2 token": (H, "N_GPT"),
    # definitions of operations
    "attention": (K.rotary_attention, "definition"),
    "cross entropy": (K.cross_entropy, "definition"),
    "cutting": (K.cut, "definition"),
    "gated MLP": (K.swiglu, "definition"),
    "Mamba-2": (K.mamba2_inner, "definition"),
    "residual stream": (K.residual_stream, "definition"),
    "router probability": (K.boundary_probability, "definition"),
    "smoothing": (K.smooth, "implementation"),  # which runs on CPUs, too
    "upsampling": (K.upsample, "definition"),
    "widening": (K.widen, "definition"),
    # what those call
    "rotation of queries and keys": (attention, "rotate"),
    "precision of the router": (router, "wide"),
    "scan in Mamba-2": (mamba2, "ssd"),
    # parts of the model
    "block": (H.Block, "forward"),
    "confidence": (H.HNet, "upsample"),
    "encoding": (H.HNet, "encode"),
    "opening chunks": (H.RoutingModule, "opens"),
    "ratio loss": (H, "ratio_loss"),
    "rotary tables": (H, "rotary_tables"),
    "routing": (H.RoutingModule, "forward"),
    "smoothing with clamped p": (H.HNet, "smooth"),
    "stack of blocks": (H.Isotropic, "forward"),
    # what surrounds it
    "check of documents": (H, "check_documents"),
    "count of FLOPs": (flops, "count_flops"),
    "initial weight": (H, "initial_weight"),
    "learning-rate multipliers": (H, "lr_modulation"),
    "parser of layouts": (H, "parse_layout"),
    "parser of layouts in configs": (hnet_config, "parse_layout"),
    "residual branches": (H, "residual_branches"),
    "stage of a weight": (H, "stage_of"),
    "target ratios": (hnet_config.HNetConfig, "target_ratios"),
    "visible pairs": (H, "visible_pairs"),
    "weight decay": (H, "has_weight_decay"),
    # the scan's, attention's and the smoothing's kernels, by their definitions
    "decays": (ssd, "_decays"),
    "decays within a chunk": (ssd.Decays, "within"),
    "handing on states": (ssd, "_hand_on"),
    "scan backward": (ssd, "scan_backward"),
    "attention weights": (attention, "_softmax_scores"),
    "spans of attention": (attention, "_spans"),
    "attention backward": (attention, "attention_definition_backward"),
    "documents of chunks": (ema, "document_ids"),
    "tested smoothing forward": (test_kernels, "ema_forward"),
    "tested smoothing backward": (test_kernels, "ema_backward"),
    # backwards of the fast implementations
    "linear backward": (linear.Linear, "backward"),
    "wide linear backward": (linear.WideLinear, "backward"),
    "gradient of a matrix": (linear, "write_product"),
    "embeddings backward": (linear.Embed, "backward"),
    "widening backward": (linear.Widen, "backward"),
    "gated MLP backward": (pointwise, "swiglu_backward"),
    "rotation in fast attention": (attention, "rotate_"),
    "fast attention backward": (attention, "packed_attention_backward"),
    "Mamba-2 backward": (mamba2.Mamba2Inner, "backward"),
    "gated norm backward": (mamba2, "gated_norm_backward"),
    "scan in Mamba-2 backward": (mamba2, "mamba2_scan_backward"),
    "convolution in Mamba-2 backward": (mamba2, "causal_conv_silu_backward_to"),
    "norm backward": (norm, "_norm_backward"),
    "adding to the residual backward": (norm, "add_norm_backward"),
    "gradients of the residual": (norm, "_total_gradient"),
    "reading the residual backward": (norm.ReadSum, "backward"),
    "recomputed norm": (norm, "recompute_norm"),
    "recomputed product": (linear, "recomputed_from"),
    "recomputed gated MLP": (pointwise, "recomputed_from"),
    "router probability backward": (router, "boundary_backward"),
    "scattering of rows": (router, "add_rows_"),
    "upsampling backward": (router.Upsample, "backward"),
    "sums over chunks": (router, "sum_chunks"),
    "smoothing backward": (ema, "ema_backward"),
    "gradient of a mean": (boundaries, "add_mean_gradient"),
    "cross entropy backward": (cross_entropy, "cross_entropy_backward"),
    "sums of small gradients": (gradients.PartialSums, "total"),
    "writing of small gradients": (gradients.Destinations, "finish"),
    "destination of a gradient": (gradients.Destinations, "take"),
}


class Mutation(NamedTuple):
    what: str
    caught_by: Callable[[], None]
    changes: tuple[tuple[str, Callable[[Any], Any]], ...]  # (role, what makes a wrong version of the right one)


def mutation(what: str, caught_by: Callable[[], None], *changes: Any):
    """changes: role, wrong, role, wrong, ..."""
    return pytest.param(Mutation(what, caught_by, tuple(zip(changes[::2], changes[1::2]))), id=what.replace(" ", "_"))


def mutate(monkeypatch, changes) -> None:
    for role, wrong in changes:
        owner, name = ROLES[role]
        right = inspect.getattr_static(owner, name)
        if isinstance(right, staticmethod):
            changed = staticmethod(wrong(right.__func__))
        elif isinstance(right, property):
            changed = property(wrong(right.fget))
        else:
            changed = wrong(right)
        monkeypatch.setattr(owner, name, changed)


def edited(function: FunctionType, change: Callable[[ast.AST], ast.AST | None]) -> FunctionType:
    """The function with one node of its source replaced, the only one for which `change` returns another."""
    found = []

    class Edit(ast.NodeTransformer):
        def visit(self, node):
            node = self.generic_visit(node)
            other = change(node)
            found.extend([] if other is None else [node])
            return node if other is None else other

    tree = Edit().visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
    assert len(found) == 1, f"{len(found)} places in {function.__name__}"
    made: dict[str, FunctionType] = {}
    exec(compile(ast.fix_missing_locations(tree), function.__name__, "exec"), function.__globals__, made)
    return made[function.__name__]


def constant(value: Any) -> Callable[[Any], Any]:
    return lambda right: value


def argument(i: int, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A wrong version that gets another i-th argument."""
    return lambda right: lambda *args, **kwargs: right(*args[:i], change(args[i]), *args[i + 1 :], **kwargs)


def result(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A wrong version that returns something else."""
    return lambda right: lambda *args, **kwargs: change(right(*args, **kwargs))


def results(changes: dict[int, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """A wrong version that returns something else in some places of the tuple."""
    return result(lambda found: tuple(changes[i](x) if i in changes else x for i, x in enumerate(found)))


def one_document(cu: Tensor) -> Tensor:
    return cu[[0, -1]]


def before(x: Tensor) -> Tensor:
    """x with each row replaced by the one before."""
    return x.roll(1, 0)


def with_gradient(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """x with a changed gradient."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(change)
    return x


# What a mutation can fail. The goldens in float32 are quicker and see whatever matters by more than 1e-4.


def one_stage_float64():
    test_golden.test_float64("one_stage")


def one_stage_float32():
    test_golden.test_float32("one_stage")


def two_stage_float32():
    test_golden.test_float32("two_stage")


def definition():
    """The example with all letters, three stages and tied embeddings against reference.py."""
    check = test_model.test_packed_documents_equal_documents_alone_and_the_definition.hypothesis.inner_test
    check(test_model.THREE_STAGES, [65, 1, 0, 2, 63], 40, 3)


def dtypes_in_bfloat16():
    test_model.test_residual_stream_router_and_loss_keep_at_least_float32(torch.bfloat16)


def long_document():
    test_model.test_no_limit_on_document_length_and_positions_are_relative(torch.float64, 1e-9)


def range_of_p():
    test_njt_ops.test_boundary_probability_is_clamped_where_rounding_leaves_its_range(torch.float32)


def matmul_flops():
    test_training_parts.test_matmul_flops_equal_those_of_the_linear_layers("two_stages")


def attention_flops():
    test_training_parts.test_attention_flops_equal_a_count_of_pairs(3)


def junk_in_a_layout():
    test_config.test_junk_in_a_layout("T1m4junk")


multipliers, multipliers_by_hand = (
    test_training_parts.test_multipliers_that_the_paper_prints,
    test_training_parts.test_multipliers_of_unequal_ratios_by_hand,
)
weight_decay, stages_by_name = test_training_parts.test_weight_decay_by_name, test_training_parts.test_stages_by_name
seed_and_name, released_init = (
    test_training_parts.test_initial_weights_depend_on_seed_and_name_alone,
    test_training_parts.test_initial_weights_as_the_released_code_draws_them,
)

# ----------------------------------------------------------------------------------------- the model and what it calls


def starts_at_y(right):
    return lambda y, p, cu: right(y, p.index_fill(0, cu[:-1].long(), 1 - 1e-15), cu)


def clamp_passes_gradients(right):
    def smooth(self, y_CD, p_C, cu):
        clamped_C = p_C.clamp(1e-4, 1 - 1e-4)
        return K.smooth(y_CD, p_C + (clamped_C - p_C).detach(), cu)

    return smooth


def confidence(change: Callable[[Tensor, H.Chunks], tuple[Tensor, H.Chunks]]):
    """A wrong version of upsampling in the model, with another p or other chunks."""
    return lambda right: lambda self, z, p, chunks, *rest: right(self, z, *change(p, chunks), *rest)


def confidence_scales(right):
    def upsample(self, z_CD, p_T, chunks, residual_TD, dtype, spare=None):
        c_T = torch.where(chunks.b_T, p_T, 1 - p_T)
        return K.upsample(z_CD, c_T, chunks.chunk_T, chunks.start_C, residual_TD, dtype, spare)

    return upsample


def first_p_has_a_gradient(right):
    def probability(q_TD, k_TD, position_T):
        p_T, as_any_other_T = right(q_TD, k_TD, position_T), right(q_TD, k_TD, position_T + 1)
        return torch.where(position_T == 0, p_T + as_any_other_T - as_any_other_T.detach(), p_T)

    return probability


def unclamped(right):
    def probability(q_TD, k_TD, position_T):
        q_TD, k_TD = F.normalize(q_TD.roll(1, 0), dim=-1), F.normalize(k_TD, dim=-1)
        return ((1 - (q_TD * k_TD).sum(-1)) / 2).masked_fill(position_T == 0, 1.0)

    return probability


def remember_what_enters(right):
    def encode(self, x_TD, packing):
        entered_TD = x_TD if self.pad_dimension is None else K.widen(x_TD, self.pad_dimension)
        self.routing_module.entered_TD = entered_TD
        return right(self, x_TD, packing)

    return encode


def route_what_entered(right):
    return lambda self, x_TD, packing: right(self, self.entered_TD, packing)


def qkv(change: Callable[..., list[Tensor]]):
    """A wrong version of attention, with other (q, k, v), which `change` makes of (q, k, v, cos_TR, sin_TR)."""

    def wrong(right):
        def attend(qkv_TX, n_heads, window, cos_MR, sin_MR, position_T, *rest):
            parts = qkv_TX.unflatten(-1, (3, n_heads, -1)).unbind(1)
            parts = change(*parts, cos_MR[position_T], sin_MR[position_T])
            return right(torch.stack(parts, 1).flatten(1), n_heads, window, cos_MR, sin_MR, position_T, *rest)

        return attend

    return wrong


def keys_turn_back(q, k, v, cos_TR, sin_TR):
    for _ in range(2):  # once for the turn that follows
        k = K.rotate(k, cos_TR, -sin_TR)
    return [q, k, v]


def interleaved(right):
    def rotate(x_THP, cos_TR, sin_TR):
        n = 2 * cos_TR.shape[-1]
        return right(torch.cat([x_THP[..., :n:2], x_THP[..., 1:n:2], x_THP[..., n:]], -1), cos_TR, sin_TR)

    return rotate


def base_5000(right):
    def tables(M, rotary_dim, dtype, device):
        exponent_R = torch.arange(0, rotary_dim, 2, device=device, dtype=dtype) / max(rotary_dim, 1)
        angle_MR = torch.arange(M, device=device).to(dtype)[:, None] * 5000.0**-exponent_R
        return angle_MR.cos(), angle_MR.sin()

    return tables


ONE_OF_SILU = 1.278464542761073795  # silu(x) = 1


def norm_before_gate(right):
    """The norm of y alone, with a gate of one; then the gate."""

    def inner(projected_TX, *rest):
        z_TD, others = projected_TX.tensor_split([len(rest[5])], dim=-1)
        ungated = torch.cat([torch.full_like(z_TD, ONE_OF_SILU), others], dim=-1)
        return right(ungated, *rest) * F.silu(z_TD)

    return inner


def parts_in_another_order(right):
    """As if the convolution's input came first, then z."""

    def inner(projected_TX, conv, bias_D, *rest):
        inputs, z, dt = projected_TX.split([len(bias_D), len(rest[3]), len(rest[1])], dim=-1)
        return right(torch.cat([z, inputs, dt], dim=-1), conv, bias_D, *rest)

    return inner


def positions_go_on(right):
    def inner(*args):
        *first, position_T, cu, eps = args
        return right(*first, torch.arange(len(position_T)), cu, eps)

    return inner


def no_final_norm(right):
    def stack(self, x_TD, packing):
        hook = self.rmsnorm.register_forward_hook(lambda module, args, out: args[0] + 0 * out)
        try:
            return right(self, x_TD, packing)
        finally:
            hook.remove()

    return stack


def mlp_beside_the_mixer(right):
    def block(self, residual_TD, packing):
        after_TD = residual_TD + packing.mix(self.mixer, self.norm1(residual_TD))
        return after_TD + self.mlp(self.norm2(residual_TD)) if self.has_mlp else after_TD

    return block


def other_initial_weights(change: Callable[[str, Tensor], Tensor]):
    return lambda right: lambda name, *rest: change(name.rpartition(".")[2], right(name, *rest))


def shuffled(leaf: str, value: Tensor) -> Tensor:
    return value.flatten()[torch.randperm(value.numel())].view_as(value)


def longest_good_prefix(right):
    return lambda layout: right(re.match(r"([mMtT][0-9]+)+", layout)[0] if isinstance(layout, str) else layout)


MUTATIONS = [
    # smoothing
    mutation("no clamp of P", one_stage_float64, "least P", constant(1e-12)),
    mutation("z starts at y_0", one_stage_float64, "smoothing", starts_at_y),
    mutation("smoothing crosses documents", one_stage_float64, "smoothing", argument(2, one_document)),
    mutation(
        "gradient of p where the clamp acts",
        test_njt_ops.test_smoothing_clamps_p_and_cuts_its_gradient_there,
        "smoothing with clamped p",
        clamp_passes_gradients,
    ),
    mutation(
        "a token gets the chunk before its own",
        definition,
        "upsampling",
        argument(2, lambda chunk_T: (chunk_T - 1).clamp_min(0)),
    ),
    mutation(
        "confidence is p everywhere",
        definition,
        "confidence",
        confidence(lambda p_T, chunks: (p_T, chunks._replace(b_T=torch.ones_like(chunks.b_T)))),
    ),
    mutation(
        "straight-through drops its gradient",
        definition,
        "confidence",
        confidence(lambda p_T, chunks: (p_T.detach(), chunks)),
    ),
    mutation("confidence scales the output", definition, "confidence", confidence_scales),
    mutation("no residual projection", definition, "upsampling", argument(4, lambda residual_TD: 0 * residual_TD)),
    # router
    mutation("query and key of one position", definition, "router probability", argument(0, lambda q: q.roll(-1, 0))),
    mutation("router one position later", two_stage_float32, "router probability", argument(0, before)),
    mutation(
        "query and key swapped", definition, "router probability", lambda right: lambda q, k, *rest: right(k, q, *rest)
    ),
    mutation(
        "a tie is a boundary",
        test_model.test_an_exact_tie_is_no_boundary,
        "opening chunks",
        constant(lambda self, p_T: p_T.detach() >= 0.5),
    ),
    mutation(
        "documents open with p = 0.9",
        definition,
        "router probability",
        lambda right: lambda q, k, position_T: right(q, k, position_T).masked_fill(position_T == 0, 0.9),
    ),
    mutation(
        "gradient of the first p",
        test_njt_ops.test_first_tokens_have_p_one_without_a_gradient,
        "router probability",
        first_p_has_a_gradient,
    ),
    mutation("p outside of 0 to 1", range_of_p, "router probability", unclamped),
    mutation(
        "gradient of the query at its key",
        definition,
        "router probability",
        argument(0, lambda q_TD: with_gradient(q_TD, before)),
    ),
    mutation("router before the encoder", definition, "encoding", remember_what_enters, "routing", route_what_entered),
    # losses
    mutation(
        "ratio loss without N / (N - 1)",
        two_stage_float32,
        "ratio loss",
        lambda right: lambda stage, N: right(stage, N) * (N - 1) / N,
    ),
    mutation(
        "ratio loss with N for N - 1",
        definition,
        "ratio loss",
        lambda right: lambda stage, N: right(stage, N) + N / (N - 1) * stage.F * stage.G,
    ),
    mutation("G without gradient", definition, "cutting", results({1: torch.Tensor.detach})),
    mutation(
        "ratio loss without gradient",
        two_stage_float32,
        "ratio loss",
        argument(0, lambda stage: stage._replace(G=stage.G.detach())),
    ),
    mutation(
        "target ratios reversed",
        test_model.test_ratio_loss_and_target_ratios_take_each_stage_its_own_n,
        "target ratios",
        result(lambda ratios: ratios[::-1]),
    ),
    mutation(
        "cross entropy summed, not averaged",
        definition,
        "cross entropy",
        lambda right: lambda logits, labels: right(logits, labels) * len(labels),
    ),
    # blocks
    mutation("eps 1e-6", one_stage_float64, "epsilon of norms", constant(1e-6)),
    mutation("norm before gate", one_stage_float32, "Mamba-2", norm_before_gate),
    mutation("window one wider", two_stage_float32, "attention", argument(2, lambda w: w + (w >= 0))),
    mutation("window one narrower", two_stage_float32, "attention", argument(2, lambda w: max(w - 1, -1))),
    mutation("window ignored", two_stage_float32, "attention", argument(2, lambda w: -1)),
    mutation("attention crosses documents", definition, "attention", argument(6, one_document)),
    mutation("state crosses documents", one_stage_float32, "Mamba-2", argument(8, one_document)),
    mutation("convolution crosses documents", definition, "Mamba-2", positions_go_on),
    mutation("convolution backwards in time", definition, "Mamba-2", argument(1, lambda taps: taps.flip(-1))),
    mutation("rotary interleaved", two_stage_float32, "rotation of queries and keys", interleaved),
    mutation("rotary turns the other way for keys", definition, "attention", qkv(keys_turn_back)),
    mutation("rotary base 5000", definition, "rotary tables", base_5000),
    mutation(
        "rotary tables end",
        long_document,
        "rotary tables",
        result(lambda tables: [x_MR[torch.arange(len(x_MR)).clamp(max=2047)] for x_MR in tables]),
    ),
    mutation("query, key and value in another order", definition, "attention", qkv(lambda q, k, v, *_: [k, q, v])),
    mutation("SwiGLU swapped", two_stage_float32, "gated MLP", argument(0, lambda x: x.roll(x.shape[1] // 2, 1))),
    mutation("in_proj in another order", definition, "Mamba-2", parts_in_another_order),
    mutation(
        "B and C swapped",
        definition,
        "scan in Mamba-2",
        lambda right: lambda x, dt, A, B, C, cu: right(x, dt, A, C, B, cu),
    ),
    mutation("D skipped", one_stage_float32, "Mamba-2", argument(5, lambda D_H: 0 * D_H)),
    mutation("dt clamped", definition, "scan in Mamba-2", argument(1, lambda dt_TH: dt_TH.clamp(1e-3, 0.1))),
    mutation("no norm at the end of a stack", definition, "stack of blocks", no_final_norm),
    mutation("MLP beside the mixer", definition, "block", mlp_beside_the_mixer),
    mutation(
        "padding in front", definition, "widening", lambda right: lambda x, pad_E: right(x, pad_E).roll(len(pad_E), 1)
    ),
    mutation(
        "capital M has no MLP",
        test_config.test_layouts,
        "parser of layouts",
        result(lambda layers: [layer._replace(has_mlp=layer.has_mlp and layer.mixer == "t") for layer in layers]),
    ),
    mutation("residual stream in 16 bits", dtypes_in_bfloat16, "residual stream", constant(lambda x_TD: x_TD.clone())),
    mutation("router in 16 bits", dtypes_in_bfloat16, "precision of the router", constant(lambda x: x)),
    mutation(
        "float32 in a float64 run",
        definition,
        "rotary tables",
        result(lambda tables: [x_MR.float().to(x_MR.dtype) for x_MR in tables]),
    ),
    # what training needs
    mutation(
        "multipliers without denominator",
        multipliers,
        "learning-rate multipliers",
        lambda right: lambda config: [x * math.sqrt(math.prod(config.target_ratios)) for x in right(config)],
    ),
    mutation("4.5 for 4.6", multipliers, "bytes of a GPT-2 token", constant(4.5)),
    mutation(
        "multipliers with reversed ratios",
        multipliers_by_hand,
        "learning-rate multipliers",
        argument(0, lambda config: SimpleNamespace(target_ratios=config.target_ratios[::-1], d_model=config.d_model)),
    ),
    mutation(
        "pad_dimension decays",
        weight_decay,
        "weight decay",
        lambda right: lambda name: right(name) or name.endswith("pad_dimension"),
    ),
    mutation(
        "dt_bias decays",
        weight_decay,
        "weight decay",
        lambda right: lambda name: right(name) or name.endswith("dt_bias"),
    ),
    mutation(
        "norms decay",
        weight_decay,
        "weight decay",
        lambda right: lambda name: right(name) or "norm" in name.split(".")[-2],
    ),
    mutation(
        "pad_dimension with the outer stage",
        stages_by_name,
        "stage of a weight",
        lambda right: lambda name, config: right(name, config) - name.endswith("pad_dimension"),
    ),
    mutation(
        "initial weights from the seed and the kind alone",
        seed_and_name,
        "initial weight",
        argument(0, lambda name: ".".join(name.split(".")[-2:])),
    ),
    mutation(
        "initial weights from the global generator", seed_and_name, "initial weight", other_initial_weights(shuffled)
    ),
    mutation(
        "init counts this stage's branches only",
        released_init,
        "residual branches",
        lambda right: lambda config, s: right(config, s) - (right(config, s - 1) if s else 0),
    ),
    mutation(
        "init counts one branch a layer",
        released_init,
        "residual branches",
        constant(lambda config, s: sum(len(H.parse_layout(x)) for i in range(s + 1) for x in config.layouts(i))),
    ),
    mutation(
        "init of dt without inverse softplus",
        released_init,
        "initial weight",
        other_initial_weights(lambda leaf, value: F.softplus(value) if leaf == "dt_bias" else value),
    ),
    mutation(
        "init of A without its logarithm",
        released_init,
        "initial weight",
        other_initial_weights(lambda leaf, value: value.exp() if leaf == "A_log" else value),
    ),
    mutation(
        "FLOPs with the outer length in every stage",
        matmul_flops,
        "count of FLOPs",
        argument(1, lambda lengths: [lengths[0]] * len(lengths)),
    ),
    mutation("FLOPs without the window", attention_flops, "visible pairs", argument(1, lambda window: -1)),
    mutation(
        "labels of any shape",
        test_model.test_labels_of_another_shape_than_the_inputs_are_refused,
        "check of documents",
        constant(lambda *args: None),
    ),
    mutation(
        "junk at the end of a layout",
        junk_in_a_layout,
        *("parser of layouts", longest_good_prefix),
        *("parser of layouts in configs", longest_good_prefix),
    ),
]

# ----------------------------------------------------------------------------------------------- definitions of kernels


def scan():
    test_kernels.test_ssd_equals_the_recurrence([65, 200, 3])


def attend():
    test_kernels.test_attention_equals_the_definition([30, 3, 20], 7)


def smoothing():
    test_kernels.test_ema_equals_the_recurrence([65, 70, 3])


def decays(**changes: Callable[[Any], Tensor]):
    """A wrong version of the scan's decays, with some fields made anew, of log decays summed in chunks (C, Q, H)."""

    def change(found):
        sum_CQH = found.sum_HCQ.permute(1, 2, 0)
        return found._replace(**{name: make(sum_CQH) for name, make in changes.items()})

    return result(change)


def own_decay_after_input(right):
    def within(self, h, dtype):
        sum_CQ = self.sum_HCQ[h]
        shifted = self._replace(sum_HCQ=torch.zeros_like(self.sum_HCQ))
        less_CQQ = sum_CQ[:, :, None] - pad(sum_CQ, (1, -1))[:, None, :]
        return less_CQQ.exp().to(dtype) * right(shifted, h, dtype)

    return within


def end_of_chunk_without(dropped: type):
    """The scan's backward without one term of the gradient of the sum at a chunk's end, by its kind of node."""

    def change(node):
        at_end = isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript)
        if at_end and isinstance(node.value, ast.BinOp) and ast.unparse(node.target.slice).endswith("-1)"):
            (node.value,) = [x for x in (node.value.left, node.value.right) if not isinstance(x, dropped)]
            return node

    return lambda right: edited(right, change)


def products_alone(transposed: bool):
    """The scan's backward without the part of C's gradient (`transposed`: B's) that comes through states."""

    def change(node):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and isinstance(node.right, ast.Call):
            product = node.left
            is_product = isinstance(product, ast.BinOp) and isinstance(product.op, ast.MatMult)
            if is_product and isinstance(product.left, ast.Attribute) == transposed:
                return product

    return lambda right: edited(right, change)


def v_without_weights(right):
    def backward(do_THP, q_THP, k_THP, v_THP, cu, window):
        dq_THP, dk_THP, _ = right(do_THP, q_THP, k_THP, v_THP, cu, window)
        dv_THP = torch.zeros_like(v_THP)
        for span in attention._spans(cu, window):
            dv_THP[span.keys] += do_THP[span.queries].sum(0)
        return dq_THP, dk_THP, dv_THP

    return backward


def y_across_documents(right):
    def backward(dz, y, p, z, cu):
        return right(dz, y, p, z, one_document(cu))[0], right(dz, y, p, z, cu)[1]

    return backward


def decay_of_its_own_chunk(right):
    def backward(dz_CD, y_CD, p_C, z_CD, cu):
        dy_CD, dp_C = right(dz_CD, y_CD, before(p_C), z_CD, cu)
        return dy_CD / before(p_C)[:, None] * p_C[:, None], dp_C

    return backward


def p_of_the_next_chunk(right):
    return lambda y_CD, p_C, cu: right(y_CD * (p_C / before(p_C))[:, None], before(p_C), cu)


def of_state(sum_CQH: Tensor) -> Tensor:
    return sum_CQH.exp()[..., None]


KERNEL_MUTATIONS = [
    mutation(
        "state is handed on across a document's end",
        scan,
        "decays",
        decays(across_CH1=lambda sum_CQH: of_state(sum_CQH[:, -1])),
    ),
    mutation(
        "state crosses documents within a chunk",
        scan,
        "decays",
        decays(hidden_CQQ=lambda sum_CQH: torch.ones(len(sum_CQH), *sum_CQH.shape[1:2] * 2, dtype=torch.bool).triu_(1)),
    ),
    mutation("state of the document before reaches all of a chunk", scan, "decays", decays(from_start_CQH1=of_state)),
    mutation(
        "state takes in documents that ended before its chunk did",
        scan,
        "decays",
        decays(to_end_CQH1=lambda sum_CQH: of_state(sum_CQH[:, -1:] - sum_CQH)),
    ),
    mutation("no state between chunks", scan, "handing on states", result(torch.zeros_like)),
    mutation("own decay acts after the input", scan, "decays within a chunk", own_decay_after_input),
    mutation("gradient of A misses the decays across chunks", scan, "scan backward", end_of_chunk_without(ast.Name)),
    mutation("gradient of A misses the end of the chunk", scan, "scan backward", end_of_chunk_without(ast.Call)),
    mutation("gradient of C misses the state before", scan, "scan backward", products_alone(transposed=False)),
    mutation("gradient of B misses the state after", scan, "scan backward", products_alone(transposed=True)),
    mutation("gradient of dt misses its gain", scan, "scan backward", results({1: torch.zeros_like})),
    mutation("kernel's window one narrower", attend, "spans of attention", argument(1, lambda window: window - 1)),
    mutation("kernel's window one wider", attend, "spans of attention", argument(1, lambda window: window + 1)),
    mutation("attention without its scale", attend, "attention weights", argument(0, lambda q: q * q.shape[-1] ** 0.5)),
    mutation(
        "gradient of q without its scale",
        attend,
        "attention backward",
        results({0: lambda dq: dq * dq.shape[-1] ** 0.5, 1: lambda dk: dk * dk.shape[-1] ** 0.5}),
    ),
    mutation("gradient of v without weights", attend, "attention backward", v_without_weights),
    mutation("gradient of p with z across documents", smoothing, "documents of chunks", result(torch.zeros_like)),
    mutation("gradient of y across documents", smoothing, "tested smoothing backward", y_across_documents),
    mutation(
        "gradient with the decay of its own chunk", smoothing, "tested smoothing backward", decay_of_its_own_chunk
    ),
    mutation("p of the next chunk", smoothing, "tested smoothing forward", p_of_the_next_chunk),
]

# -------------------------------------------------------------------------------------------- the fast implementations


def compare(ours: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, x in wanted.items():
        torch.testing.assert_close(ours[name], x, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def gradients_of_a_model(fast: bool, ac: str = "none") -> dict[str, Tensor]:
    model = build(H, TWO_STAGES)
    with forcing(fast), recomputing(ac):
        out = model(*pack(random_documents([40, 1, 17])))
        loss = H.training_loss(out.ce, out.ratio_losses, 0.3)
    loss.backward()
    return {"loss": loss.detach(), "logits": out.logits.values().detach()} | {
        name: p.grad for name, p in model.named_parameters()
    }


@functools.cache
def wanted_of_a_model() -> dict[str, Tensor]:
    return gradients_of_a_model(fast=False)


def fast(ac: str = "none") -> None:
    """Fast implementations give the gradients of the definitions, in float64."""
    compare(gradients_of_a_model(True, ac), wanted_of_a_model())


def selective():
    fast("selective")


def block():
    fast("block")


def graphs() -> None:
    """Steps as graphs give the gradients of the model: parts, with padding, and destinations of gradients."""
    said = agreement.steps_as_graphs(H.HNetConfig.load(TWO_STAGES))
    if said and "fails with" in said:
        raise RuntimeError(said)  # a mutation gives wrong numbers, no error
    assert said is None, said


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def readers() -> None:
    """A residual stream that is read more than once between two additions."""
    found = []
    for is_fast in (True, False):
        x_TD, weight_D = normal(7, 6, seed=0), normal(6, seed=1)
        with forcing(is_fast):
            residual_TD = K.residual_stream(x_TD * 1)
            residual_TD = residual_TD + K.rms_norm(residual_TD, weight_D, 1e-5).sin()
            first, second = (K.rms_norm(residual_TD, weight_D, 1e-5) for _ in "12")
            residual_TD = residual_TD + first * second.cos()
            out_TD = K.rms_norm(residual_TD, weight_D, 1e-5) * 0.5 + residual_TD * 0.7
        out_TD.sin().sum().backward()
        found.append({"out": out_TD.detach(), "x": x_TD.grad, "weight": weight_D.grad})
    compare(*found)


def weights_with_destinations() -> None:
    """A matrix and a norm's weight, each used twice: the first gradient is written, the second returned."""
    x_TD, weights = normal(7, 6, seed=0), [normal(6, 6, seed=1), normal(6, seed=2)]
    found = []
    for places in ([torch.full_like(w, torch.nan) for w in weights], []):
        destinations = Destinations(dict(zip(weights, places)))
        with forcing(bool(places)), writing_to(destinations if places else None):
            residual_TD = K.residual_stream(K.linear(x_TD, weights[0]))
            residual_TD = residual_TD + K.linear(K.rms_norm(residual_TD, weights[1], 1e-5), weights[0])
            out_TD = K.rms_norm(residual_TD, weights[1], 1e-5)
        returned = torch.autograd.grad(out_TD.sin().sum(), weights, materialize_grads=True)
        destinations.finish()
        both = [a + b for a, b in zip(places, returned)] if places else returned
        found.append({"matrix": both[0], "norm": both[1]})
    compare(*found)


def bias_misses_a_token(right):
    def backward(ctx, dy_TO):
        dx_TI, dweight_OI, dbias_O = right(ctx, dy_TO)
        return dx_TI, dweight_OI, dbias_O - dy_TO[-1]

    return backward


def last_of_a_byte(right):
    def backward(ctx, dx_TD):
        iids_T, weight_VD = ctx.saved_tensors
        return None, torch.zeros_like(weight_VD).index_copy_(0, iids_T, dx_TD)

    return backward


def swapped(i: int, j: int):
    """A wrong version with two results swapped."""

    def change(found):
        found = list(found)
        found[i], found[j] = found[j], found[i]
        return tuple(found)

    return result(change)


def no_gradient_of_gates(right):
    def backward(dx, y, z, scale, weight, dz, *rest, **options):
        found = right(dx, y, z, scale, weight, dz, *rest, **options)
        dz.zero_()
        return found

    return backward


def scale_is_constant(right):
    def backward(dx_TD, u_TD, scale_T, weight_D):
        return scale_T[:, None] * dx_TD * weight_D, *right(dx_TD, u_TD, scale_T, weight_D)[1:]

    return backward


def nothing_collected(right):
    return lambda found, dtype: found.clear()


def last_collected(right):
    def collected(found, dtype):
        del found[:-1]
        return right(found, dtype)

    return collected


def reads_nothing_back(right):
    def backward(ctx, dx_TD):
        found = right(ctx, dx_TD)
        number, _ = ctx.gradients[-1]
        ctx.gradients[-1] = number, torch.zeros_like(dx_TD)
        return found

    return backward


def first_token_alone(right):
    def sum_chunks(x_TD, start_C, *rest):
        first_T1 = torch.zeros_like(x_TD[:, :1])
        first_T1[start_C[start_C < len(x_TD)]] = 1
        return right(x_TD * first_T1, start_C, *rest)

    return sum_chunks


def z_before_forgotten(right):
    def backward(dz, y, p, z, cu):
        return right(dz, y, p, z, cu)[0], right(dz, y, p, torch.zeros_like(z), cu)[1]

    return backward


def layers_reversed(right):
    """Each layer gets the gradient of another layer of its shape."""

    def total(self):
        found, by_shape = right(self), {}
        for weight, gradient in found:
            by_shape.setdefault(weight.shape, []).append(gradient)
        return [(weight, by_shape[weight.shape].pop()) for weight, _ in found]

    return total


def not_written(right):
    return lambda self: self.sums.clear()


def written_and_returned(right):
    def write_product(dy, x, weight, destination):
        found = right(dy, x, weight, destination)
        return destination.tensor.clone() if found is None else found

    return write_product


def taken_twice(right):
    def take(self, *weights):
        found = right(self, *weights)
        self.free.update(weights if found else ())
        return found

    return take


def of_rows_before(right):
    """The recomputed result is that of the rows before."""
    return lambda y, x, compute: right(y, x, lambda x: compute(before(x)))


FAST_MUTATIONS = [
    # matrix products, embeddings, widths
    mutation("gradient of x of the row before", fast, "linear backward", results({0: before})),
    mutation("gradient of W from the rows before", fast, "gradient of a matrix", argument(1, before)),
    mutation("a gradient that has been written is returned too", graphs, "gradient of a matrix", written_and_returned),
    mutation("gradient of a bias misses a token", fast, "wide linear backward", bias_misses_a_token),
    mutation("residual projection hands nothing back", fast, "wide linear backward", results({0: torch.zeros_like})),
    mutation("a byte keeps the gradient of its last place", fast, "embeddings backward", last_of_a_byte),
    mutation(
        "gradient of padding from the first token",
        fast,
        "widening backward",
        lambda right: lambda ctx, dout: (right(ctx, dout)[0], dout[0, ctx.width :]),
    ),
    # MLP, attention, Mamba-2
    mutation(
        "gradients of value and gate swapped",
        fast,
        "gated MLP backward",
        results({0: lambda dboth: dboth.roll(dboth.shape[1] // 2, 1)}),
    ),
    mutation(
        "gradients of query and key are not turned back",
        fast,
        "rotation in fast attention",
        lambda right: lambda x, *args, back=False: x if back else right(x, *args),
    ),
    mutation(
        "gradients of query and key are turned on",
        fast,
        "rotation in fast attention",
        lambda right: lambda *args, back=False: right(*args),
    ),
    mutation(
        "gradients of query and key swapped", fast, "fast attention backward", result(lambda dqkv: dqkv[:, [1, 0, 2]])
    ),
    mutation("gradients of A and dt swapped", fast, "Mamba-2 backward", swapped(3, 4)),
    mutation("the gate has no gradient", fast, "gated norm backward", no_gradient_of_gates),
    mutation("no gradient through the skip", fast, "scan in Mamba-2 backward", argument(7, lambda D_H: 0 * D_H)),
    mutation("gradient of states across documents", fast, "scan in Mamba-2 backward", argument(8, one_document)),
    mutation(
        "gradient of the convolution across documents",
        fast,
        "convolution in Mamba-2 backward",
        argument(5, lambda position_T: torch.arange(len(position_T))),
    ),
    # norms and the residual stream
    mutation("gradient of a norm with a constant scale", fast, "norm backward", scale_is_constant),
    mutation(
        "a norm forgets the stream's gradient", fast, "adding to the residual backward", argument(1, constant(None))
    ),
    mutation("the stream's gradient gets lost", fast, "gradients of the residual", nothing_collected),
    mutation("the last reader of the stream counts", readers, "gradients of the residual", last_collected),
    mutation("a reader of the stream counts as none", readers, "reading the residual backward", reads_nothing_back),
    # router and chunks
    mutation("gradient of q at its key, fast", fast, "router probability backward", results({0: before})),
    mutation(
        "gradient of the first p, fast", fast, "router probability backward", argument(3, lambda position: position + 1)
    ),
    mutation(
        "gradient of a chunk one token earlier",
        fast,
        "scattering of rows",
        argument(1, lambda place_C: (place_C - 1).clamp_min(0)),
    ),
    mutation(
        "gradient of chunks in place of others",
        graphs,
        "scattering of rows",
        constant(lambda x_TD, place_C, rows_CD: x_TD.index_copy_(0, place_C, rows_CD)),
    ),
    mutation("gradient of z from its first token", fast, "sums over chunks", first_token_alone),
    mutation("confidence has no gradient, fast", fast, "upsampling backward", results({1: torch.zeros_like})),
    mutation("gradient of P forgets z before", fast, "smoothing backward", z_before_forgotten),
    mutation("G has no gradient, fast", fast, "gradient of a mean", constant(lambda dp_T, *rest: dp_T)),
    mutation(
        "padding has a part in G",
        graphs,
        "gradient of a mean",
        constant(lambda dp_T, dmean, cu: dp_T + dmean / len(dp_T)),
    ),
    mutation("gradient of the label before", fast, "cross entropy backward", argument(2, before)),
    mutation(
        "gradient of the summed cross entropy",
        fast,
        "cross entropy backward",
        lambda right: lambda dloss, logits, *rest: right(dloss * len(logits), logits, *rest),
    ),
    # recomputation
    mutation("norm recomputed without its weight", selective, "recomputed norm", argument(2, torch.ones_like)),
    mutation("product recomputed of other rows", block, "recomputed product", of_rows_before),
    mutation("gated MLP recomputed of other rows", selective, "recomputed gated MLP", of_rows_before),
    # where gradients go
    mutation("gradients of another layer's norm", graphs, "sums of small gradients", layers_reversed),
    mutation("gradients of small weights are not written", graphs, "writing of small gradients", not_written),
    mutation(
        "a destination for both uses of a weight", weights_with_destinations, "destination of a gradient", taken_twice
    ),
]

# ---------------------------------------------------------------------------------------------------------------- tests

EVERYTHING = [*MUTATIONS, *KERNEL_MUTATIONS, *FAST_MUTATIONS]


@pytest.mark.parametrize("mutation", EVERYTHING)
def test_a_wrong_version_is_caught(mutation, monkeypatch):
    wanted_of_a_model()  # before anything is changed
    mutate(monkeypatch, mutation.changes)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        mutation.caught_by()


def test_the_right_version_passes():
    """Every check of a mutation passes without it."""
    checks = {param.values[0].caught_by for param in EVERYTHING}
    assert len(checks) > 20
    for check in checks:
        check()


def test_every_role_is_played():
    """Every role is used by a mutation, and has a function."""
    used = {role for param in EVERYTHING for role, _ in param.values[0].changes}
    assert used == set(ROLES)
    for owner, name in ROLES.values():
        inspect.getattr_static(owner, name)
