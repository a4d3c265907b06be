"""The tests can fail: wrong versions of the maths, each caught by the test that is named beside it.

A mutant is the real source with one piece of text replaced, run as a module of its own. The text must occur exactly
once: where the source has moved on, rewrite the mutation.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import golden_io
import pytest
import test_config
import test_golden
import test_kernels
import test_model
import test_njt_ops
import test_training_parts
import torch

import hnet_config
import hnet_kernels
import hnet_trainable

CONFIG, MODEL = Path(hnet_config.__file__), Path(hnet_trainable.__file__)
KERNELS = Path(hnet_kernels.__file__).parent
number = itertools.count()


def mutant(monkeypatch, path: Path, *changes: tuple[str, str]) -> ModuleType:
    """The module at `path` with each (old, new) replaced, under a name of its own."""
    source = path.read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in {path.name}: {old}"
        source = source.replace(old, new)
    name = f"mutant{next(number)}"
    source = source.replace('"hnet::', f'"{name}::')  # torch knows one operation by each name
    module = ModuleType(name)
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    exec(compile(source, f"{name} of {path.name}", "exec"), module.__dict__)
    return module


def mutant_model(monkeypatch, *changes: tuple[str, str]) -> ModuleType:
    """hnet_trainable with each (old, new) replaced, in it or in the config that it imports."""
    config = CONFIG.read_text()
    if of_config := [change for change in changes if change[0] in config]:
        monkeypatch.setitem(sys.modules, "hnet_config", mutant(monkeypatch, CONFIG, *of_config))
    return mutant(monkeypatch, MODEL, *(change for change in changes if change not in of_config))


def put_model(monkeypatch, module: ModuleType) -> None:
    """Hand the tests this model instead of the real one."""
    for name in ("HNetLM", "HNetConfig"):
        monkeypatch.setattr(golden_io, name, getattr(module, name))
    for tests in (test_config, test_model, test_njt_ops, test_training_parts):
        monkeypatch.setattr(tests, "H", module)


# What a mutant can fail. The goldens in float32 are quicker and see whatever matters by more than 1e-4.


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
    test_training_parts.test_matmul_flops_equal_what_the_linear_layers_really_compute("two_stages")


def attention_flops():
    test_training_parts.test_attention_flops_equal_a_count_of_pairs(3)


def junk_after_a_layout():
    with pytest.raises(test_config.H.ConfigError):
        test_config.H.parse_layout("T1m4junk")


class Mutation(NamedTuple):
    what: str
    caught_by: Callable[[], None]
    changes: tuple[tuple[str, str], ...]


def mutation(what: str, caught_by: Callable[[], None], *texts: str):
    """`texts`: old, new, old, new, ..."""
    return pytest.param(Mutation(what, caught_by, tuple(zip(texts[::2], texts[1::2]))), id=what.replace(" ", "_"))


WINDOWED = "len(packing.cos_MR), self.window)"
NORM = "F.silu(z_TD.to(dtype))"
LAST_GROUP = '"dt_bias", "pad_dimension")'

MUTATIONS = [
    # smoothing
    mutation("no clamp of P", one_stage_float64, "EMA_CLAMP = 1e-4", "EMA_CLAMP = 1e-12"),
    mutation(
        "z starts at y_0",
        one_stage_float64,
        "z_CD = ema_forward(y_BkD.values(), P_C, cu)",
        "z_CD = ema_forward(y_BkD.values(), P_C.index_fill(0, cu[:-1].long(), 1 - 1e-15), cu)",
    ),
    mutation(
        "smoothing crosses documents", one_stage_float64, "cu = cu_seqlens(y_BkD)", "cu = cu_seqlens(y_BkD)[[0, -1]]"
    ),
    mutation(
        "gradient of p where the clamp acts",
        test_njt_ops.test_ema_upsample_clamps_p_and_cuts_its_gradient_there,
        "= grad_P_C * inside_C",
        "= grad_P_C",
    ),
    mutation(
        "a token gets the chunk before its own",
        definition,
        "chunk_T = b_T.cumsum(0) - 1",
        "chunk_T = (b_T.cumsum(0) - 2).clamp_min(0)",
    ),
    mutation("confidence is p everywhere", definition, "torch.where(b_Bj.values(), p_T, 1 - p_T)", "p_T"),
    mutation("straight-through drops its gradient", definition, "        return grad_Bj\n", "        return None\n"),
    mutation(
        "confidence scales the output",
        definition,
        "nested_like(torch.ones_like(c_Bj.values()), c_Bj)",
        "nested_like(c_Bj.values().clone(), c_Bj)",
    ),
    mutation("no residual projection", definition, "+ residual_BjD.values()", "+ 0 * residual_BjD.values()"),
    # router
    mutation(
        "query and key of one position",
        definition,
        "q_BjD.values().to(dtype).roll(1, 0)",
        "q_BjD.values().to(dtype)",
    ),
    mutation(
        "router one position later",
        two_stage_float32,
        "q_BjD.values().to(dtype).roll(1, 0)",
        "q_BjD.values().to(dtype).roll(2, 0)",
    ),
    mutation(
        "query and key swapped",
        definition,
        "self.q_proj_layer(x_BjD), self.k_proj_layer(x_BjD)",
        "self.k_proj_layer(x_BjD), self.q_proj_layer(x_BjD)",
    ),
    mutation(
        "a tie is a boundary", test_model.test_an_exact_tie_is_no_boundary, "p_T.detach() > 0.5", "p_T.detach() >= 0.5"
    ),
    mutation("documents open with p = 0.9", definition, "first_T, 1.0)", "first_T, 0.9)"),
    mutation(
        "gradient of the first p",
        test_njt_ops.test_first_tokens_have_p_one_without_a_gradient,
        "first_T | (cos_T.abs() > 1)",
        "cos_T.abs() > 1",
    ),
    mutation("p outside of 0 to 1", range_of_p, "((1 - cos_T) / 2).clamp(0, 1)", "((1 - cos_T) / 2)"),
    mutation(
        "gradient of the query at its key",
        definition,
        "grad_q_TD = grad_q_TD.roll(-1, 0).to(q_BjD.dtype)",
        "grad_q_TD = grad_q_TD.to(q_BjD.dtype)",
    ),
    mutation(
        "router before the encoder",
        definition,
        "stage = self.routing_module(x_BjD)",
        "stage = self.routing_module(given_BjD)",
        "        x_BjD = on_values(self.encoder, self.widen(x_BjD))",
        "        given_BjD = self.widen(x_BjD)\n        x_BjD = on_values(self.encoder, given_BjD)",
    ),
    # losses
    mutation("ratio loss without N / (N - 1)", two_stage_float32, "return N / (N - 1) * (", "return ("),
    mutation("ratio loss with N for N - 1", definition, "((N - 1) * stage.F", "(N * stage.F"),
    mutation("ratio loss without gradient", definition, "p_T.mean())", "p_T.detach().mean())"),
    mutation(
        "target ratios reversed",
        test_model.test_ratio_loss_and_target_ratios_take_each_stage_its_own_n,
        "return tuple(inner / outer for outer, inner in zip(self.N_compress, self.N_compress[1:]))",
        "return tuple(inner / outer for outer, inner in zip(self.N_compress, self.N_compress[1:]))[::-1]",
    ),
    mutation(
        "cross entropy summed, not averaged",
        definition,
        "labels.values())\n        losses",
        'labels.values(), reduction="sum")\n        losses',
    ),
    # blocks
    mutation("eps 1e-6", one_stage_float64, "NORM_EPS = 1e-5", "NORM_EPS = 1e-6"),
    mutation(
        "norm before gate",
        one_stage_float32,
        f"super().forward(y_TD.to(dtype) * {NORM})",
        f"(super().forward(y_TD.to(dtype)) * {NORM}).to(self.weight.dtype)",
    ),
    mutation("window one wider", two_stage_float32, WINDOWED, "len(packing.cos_MR), self.window + (self.window >= 0))"),
    mutation("window one narrower", two_stage_float32, WINDOWED, "len(packing.cos_MR), max(self.window - 1, -1))"),
    mutation("window ignored", two_stage_float32, WINDOWED, "len(packing.cos_MR), -1)"),
    mutation(
        "attention crosses documents",
        definition,
        f"attention(q_THP, k_THP, v_THP, packing.cu_seqlens, {WINDOWED}",
        f"attention(q_THP, k_THP, v_THP, packing.cu_seqlens[[0, -1]], {WINDOWED}",
    ),
    mutation(
        "state crosses documents",
        one_stage_float32,
        "B_TN, C_TN, packing.cu_seqlens)",
        "B_TN, C_TN, packing.cu_seqlens[[0, -1]])",
    ),
    mutation(
        "convolution crosses documents",
        definition,
        "self.conv1d(xBC, packing.position_T)",
        "self.conv1d(xBC, torch.arange(len(xBC)))",
    ),
    mutation(
        "convolution backwards in time",
        definition,
        "causal_conv_silu(x_TD, self.weight,",
        "causal_conv_silu(x_TD, self.weight.flip(-1),",
    ),
    mutation(
        "rotary interleaved",
        two_stage_float32,
        "x_THP[..., :R], x_THP[..., R : 2 * R]",
        "x_THP[..., : 2 * R : 2], x_THP[..., 1 : 2 * R : 2]",
    ),
    mutation(
        "rotary turns the other way for keys",
        definition,
        "(rotate(x, cos_TR, sin_TR) for x in (q_THP, k_THP))",
        "(rotate(x, cos_TR, s) for x, s in ((q_THP, sin_TR), (k_THP, -sin_TR)))",
    ),
    mutation("rotary base 5000", definition, "10000.0**-exponent_R", "5000.0**-exponent_R"),
    mutation(
        "rotary tables end",
        long_document,
        "torch.arange(M, device=device).to",
        "torch.arange(M, device=device).clamp(max=2047).to",
    ),
    mutation(
        "query, key and value in another order",
        definition,
        "q_THP, k_THP, v_THP = self.Wqkv",
        "k_THP, q_THP, v_THP = self.Wqkv",
    ),
    mutation("SwiGLU swapped", two_stage_float32, "value, gate = self.fc1", "gate, value = self.fc1"),
    mutation(
        "in_proj in another order",
        definition,
        "z, xBC, dt_TH = self.in_proj(x_TD).split([self.d_inner, self.d_inner + 2 * self.d_state,",
        "xBC, z, dt_TH = self.in_proj(x_TD).split([self.d_inner + 2 * self.d_state, self.d_inner,",
    ),
    mutation("B and C swapped", definition, "x, B_TN, C_TN = xBC", "x, C_TN, B_TN = xBC"),
    mutation("D skipped", one_stage_float32, "y_THP + self.D[:, None] * x_THP", "y_THP + 0 * self.D[:, None] * x_THP"),
    mutation(
        "dt clamped",
        definition,
        "dt_TH = F.softplus(dt_TH.to(dtype) + self.dt_bias)",
        "dt_TH = F.softplus(dt_TH.to(dtype) + self.dt_bias).clamp(1e-3, 0.1)",
    ),
    mutation(
        "no norm at the end of a stack",
        definition,
        "return self.rmsnorm(residual_TD)",
        "return residual_TD + 0 * self.rmsnorm(residual_TD)",
    ),
    mutation(
        "MLP beside the mixer",
        definition,
        "self.mlp(self.norm2(residual_TD))",
        "self.mlp(self.norm2(before_TD))",
        "        residual_TD = residual_TD + self.mixer(",
        "        before_TD = residual_TD\n        residual_TD = residual_TD + self.mixer(",
    ),
    mutation("padding in front", definition, "torch.cat([x_TD, pad_TD], dim=-1)", "torch.cat([pad_TD, x_TD], dim=-1)"),
    mutation(
        "capital M has no MLP",
        test_config.test_layouts,
        "Layer(letter.lower(), letter.isupper())",
        'Layer(letter.lower(), letter == "T")',
    ),
    mutation(
        "residual stream in 16 bits",
        dtypes_in_bfloat16,
        "residual_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32)",
        "residual_TD = x_TD.to(x_TD.dtype",
    ),
    mutation(
        "router in 16 bits",
        dtypes_in_bfloat16,
        "dtype = torch.promote_types(q_BjD.dtype, torch.float32)",
        "dtype = q_BjD.dtype",
    ),
    mutation("float32 in a float64 run", definition, "10000.0**-exponent_R", "(10000.0**-exponent_R).float()"),
    mutation(
        "multipliers without denominator",
        test_training_parts.test_multipliers_that_the_paper_prints,
        "/ everything * widths",
        "* widths",
    ),
    mutation("4.5 for 4.6", test_training_parts.test_multipliers_that_the_paper_prints, "N_GPT = 4.6", "N_GPT = 4.5"),
    mutation(
        "multipliers with reversed ratios",
        test_training_parts.test_multipliers_of_unequal_ratios_by_hand,
        "(*config.target_ratios, 1.0), config.d_model",
        "(*config.target_ratios[::-1], 1.0), config.d_model",
    ),
    mutation("pad_dimension decays", test_training_parts.test_weight_decay_by_name, LAST_GROUP, '"dt_bias")'),
    mutation("dt_bias decays", test_training_parts.test_weight_decay_by_name, LAST_GROUP, '"pad_dimension")'),
    mutation(
        "norms decay",
        test_training_parts.test_weight_decay_by_name,
        'not module.startswith("norm") and module != "rmsnorm"',
        "True",
    ),
    mutation(
        "pad_dimension with the outer stage",
        test_training_parts.test_stages_by_name,
        'count("main_network."), config.num_stages)',
        'count("main_network.") - name.endswith("pad_dimension"), config.num_stages)',
    ),
    mutation(
        "initial weights from the seed alone",
        test_training_parts.test_initial_weights_depend_on_seed_and_name_alone,
        'f"{seed}:{name}"',
        'f"{seed}"',
    ),
    mutation(
        "initial weights from the global generator",
        test_training_parts.test_initial_weights_depend_on_seed_and_name_alone,
        "torch.randn(*shape, generator=generator, **plain)",
        "torch.randn(*shape)",
    ),
    mutation(
        "init counts this stage's branches only",
        test_training_parts.test_initial_weights_as_the_released_code_draws_them,
        "for i in range(s + 1) for layout",
        "for i in [s] for layout",
    ),
    mutation(
        "init counts one branch a layer",
        test_training_parts.test_initial_weights_as_the_released_code_draws_them,
        "sum(1 + layer.has_mlp for",
        "sum(1 for",
    ),
    mutation(
        "init of dt without inverse softplus",
        test_training_parts.test_initial_weights_as_the_released_code_draws_them,
        "return dt + torch.log(-torch.expm1(-dt))",
        "return dt",
    ),
    mutation(
        "init of A without its logarithm",
        test_training_parts.test_initial_weights_as_the_released_code_draws_them,
        "uniform(1, 16).log()",
        "uniform(1, 16)",
    ),
    mutation(
        "FLOPs with the outer length in every stage",
        matmul_flops,
        "sum(lengths), config.attn_cfg",
        "sum(stage_lengths[0]), config.attn_cfg",
    ),
    mutation("FLOPs without the window", attention_flops, "if window < 0 or window >= length:", "if True:"),
    mutation("junk in a layout ignored", junk_after_a_layout, "re.fullmatch", "re.match"),
    mutation(
        "labels of any shape",
        test_model.test_labels_of_another_shape_than_the_inputs_are_refused,
        "        check_documents(iids, labels, self.config.vocab_size)\n",
        "        pass\n",
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_model_is_caught(mutation, monkeypatch):
    put_model(monkeypatch, mutant_model(monkeypatch, *mutation.changes))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        mutation.caught_by()


def test_an_unchanged_copy_passes(monkeypatch):
    """Every check that a mutant fails, on a copy that went through the same machinery."""
    put_model(monkeypatch, mutant(monkeypatch, MODEL))
    checks = {param.values[0].caught_by for param in MUTATIONS}
    assert len(checks) > 10
    for check in checks:
        check()


# ------------------------------------------------------------------------------------------------------------- kernels


def scan():
    test_kernels.test_ssd_equals_the_recurrence([65, 200, 3])


def attention():
    test_kernels.test_attention_equals_the_definition([30, 3, 20], 7)


def smoothing():
    test_kernels.test_ema_equals_the_recurrence([65, 70, 3])


KERNEL_MUTATIONS = [
    mutation(
        "state is handed on across a document's end",
        scan,
        "_decay(total_C1H[:, 0], last_C1 != before_C1, dtype)",
        "_decay(total_C1H[:, 0], last_C1 < 0, dtype)",
    ),
    mutation(
        "state crosses documents within a chunk",
        scan,
        "(doc_CQ[:, :, None] == doc_CQ[:, None, :]).tril_()",
        "torch.ones_like(doc_CQ[:, :, None] == doc_CQ[:, None, :]).tril_()",
    ),
    mutation(
        "state of the document before reaches all of a chunk",
        scan,
        "(doc_CQ != before_C1)[..., None]",
        "(doc_CQ < 0)[..., None]",
    ),
    mutation(
        "state takes in documents that ended before its chunk did",
        scan,
        "(doc_CQ != last_C1)[..., None]",
        "(doc_CQ < 0)[..., None]",
    ),
    mutation("no state between chunks", scan, "out=state[following])", "out=state[following]).zero_()"),
    mutation(
        "own decay acts after the input",
        scan,
        "sum_CQ[:, :, None] - sum_CQ[:, None, :]",
        "sum_CQ[:, :, None] - pad(sum_CQ, (1, -1))[:, None, :]",
    ),
    mutation("gradient of A misses the decays across chunks", scan, " + across_CH\n", "\n"),
    mutation("gradient of A misses the end of the chunk", scan, "to_end_CQH.sum(1) + across_CH", "across_CH"),
    mutation("gradient of C misses the state before", scan, " + _inner_sum(dy_start_CQHP, before_CNHP)", ""),
    mutation("gradient of B misses the state after", scan, " + _inner_sum(x_end_CQHP, dafter_CNHP)", ""),
    mutation("gradient of dt misses its gain", scan, "dgain_TH + dlog_a_TH * A_H", "dlog_a_TH * A_H"),
]


@pytest.mark.parametrize("mutation", KERNEL_MUTATIONS)
def test_a_wrong_scan_is_caught(mutation, monkeypatch):
    module = mutant(monkeypatch, KERNELS / "ssd.py", *mutation.changes)
    monkeypatch.setattr(test_kernels, "ssd", module.ssd)
    with pytest.raises(AssertionError):
        mutation.caught_by()


ATTENTION_MUTATIONS = [
    mutation("window one narrower", attention, "(j_K < i_Q1 - window)", "(j_K <= i_Q1 - window)"),
    mutation("window one wider", attention, "(j_K < i_Q1 - window)", "(j_K < i_Q1 - window - 1)"),
    mutation("attention without its scale", attention, ".to(dtype) * q_THP.shape[-1] ** -0.5", ".to(dtype)"),
    mutation("gradient of q without its scale", attention, "keepdim=True)) * scale", "keepdim=True))"),
    mutation(
        "gradient of v without weights",
        attention,
        "dv_THP[span.keys] += (weights_HQK.mT",
        "dv_THP[span.keys] += (torch.ones_like(weights_HQK).mT",
    ),
]


@pytest.mark.parametrize("mutation", ATTENTION_MUTATIONS)
def test_a_wrong_attention_is_caught(mutation, monkeypatch):
    module = mutant(monkeypatch, KERNELS / "attention.py", *mutation.changes)
    monkeypatch.setattr(test_kernels, "attention", module.attention)
    with pytest.raises(AssertionError):
        mutation.caught_by()


EMA_MUTATIONS = [
    mutation("gradient of p with z across documents", smoothing, " * follows_C[:, None]])", "])"),
    mutation(
        "gradient of y across documents", smoothing, "(cu_seqlens[-1] - cu_seqlens).flip(0)", "cu_seqlens[[0, -1]]"
    ),
    mutation(
        "gradient with the decay of its own chunk",
        smoothing,
        "torch.cat([torch.log1p(-p_C[1:]), p_C.new_zeros(1)])",
        "torch.log1p(-p_C)",
    ),
    mutation(
        "p of the next chunk",
        smoothing,
        "p_C, torch.log1p(-p_C), cu_seqlens)",
        "p_C, torch.log1p(-p_C.roll(1)), cu_seqlens)",
    ),
]


@pytest.mark.parametrize("mutation", EMA_MUTATIONS)
def test_a_wrong_smoothing_is_caught(mutation, monkeypatch):
    module = mutant(monkeypatch, KERNELS / "ema.py", *mutation.changes)
    monkeypatch.setattr(test_kernels, "ema_forward", module.ema_forward)
    monkeypatch.setattr(test_kernels, "ema_backward", module.ema_backward)
    with pytest.raises(AssertionError):
        mutation.caught_by()
