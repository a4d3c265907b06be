"""Learning-rate multipliers, parameter groups, initial weights and FLOPs of the model file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_io import pack
from small_models import TWO_STAGES, build, random_documents
from torch import nn

import hnet_trainable as H
from hnet_runtime import flops

CONFIGS = Path(__file__).parent.parent / "configs"


def two_stages(**overrides):
    return H.HNetConfig.load({**TWO_STAGES, **overrides})


def meta_model(config):
    with torch.device("meta"):
        return H.HNetLM(config)


# ------------------------------------------------------------------------------------------- learning-rate modulation


def test_multipliers_that_the_paper_prints():
    """To the digits printed there: 3.03, 1.43, 0.715 (2-stage XL) and 2.63, 0.88 (1-stage L)."""
    xl = H.lr_modulation(H.HNetConfig.load(CONFIGS / "hnet_2stage_XL.json"))
    assert [round(x, 2) for x in xl[:2]] == [3.03, 1.43] and round(xl[2], 3) == 0.715
    large = H.lr_modulation(H.HNetConfig.load(CONFIGS / "hnet_1stage_L.json"))
    assert [round(x, 2) for x in large] == [2.63, 0.88]


def test_multipliers_of_unequal_ratios_by_hand():
    """Eq. 11 for N = 3 then 2 and widths 32, 64, 64: prod_{i >= s} N^i is 6, 2, 1, and 6 stands below."""
    got = H.lr_modulation(two_stages(N_compress=[1, 3, 6]))
    wanted = [math.sqrt(4.6 * 6 / 6 * 2), math.sqrt(4.6 * 2 / 6 * 1), math.sqrt(4.6 * 1 / 6 * 1)]
    assert got == pytest.approx(wanted, rel=1e-12)


def test_a_plain_model_has_one_multiplier():
    config = H.HNetConfig.load(CONFIGS / "isotropic_tiny.json")
    assert H.lr_modulation(config) == pytest.approx([math.sqrt(4.6)])


# --------------------------------------------------------------------------------------------------- parameter groups


def by_name(groups):
    return {name: group for group in groups for name in group["names"]}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["hnet_1stage_tiny", "hnet_2stage_tiny", "isotropic_tiny", "hnet_2stage_L"])
def test_every_parameter_is_in_exactly_one_group(name, tied):
    """Among them an innermost stage as wide as the one around it (2stage_L's outer two) and tied embeddings."""
    model = meta_model(H.HNetConfig.load(CONFIGS / f"{name}.json", tie_embeddings=tied))
    groups = H.parameter_groups(model, lr=1.0, weight_decay=0.1)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(p) for p in model.parameters()}
    named = dict(model.named_parameters())
    for group in groups:
        assert [id(named[n]) for n in group["names"]] == [id(p) for p in group["params"]]
    assert [g["stage"] for g in groups] == sorted(g["stage"] for g in groups)


def test_groups_of_a_model_whose_innermost_stage_is_as_wide_as_the_one_around_it():
    model = meta_model(two_stages())
    assert model.backbone.main_network.main_network.pad_dimension is None
    groups = H.parameter_groups(model, lr=1.0, weight_decay=0.1)
    assert {g["stage"] for g in groups} == {0, 1, 2}


def test_groups_carry_rate_and_multiplier():
    model = meta_model(two_stages(N_compress=[1, 3, 6]))
    multipliers = H.lr_modulation(model.config)
    for group in H.parameter_groups(model, lr=2e-3, weight_decay=0.1):
        assert group["multiplier"] == multipliers[group["stage"]]
        assert group["lr"] == pytest.approx(2e-3 * group["multiplier"])
        assert group["weight_decay"] in (0.0, 0.1)
    torch.optim.AdamW(H.parameter_groups(model, lr=2e-3, weight_decay=0.1))  # keys that an optimizer takes


def test_stages_by_name():
    """Embeddings and lm_head with stage 0; E, D, router and residual_proj with their stage; pad_dimension inside."""
    groups = by_name(H.parameter_groups(meta_model(two_stages()), lr=1.0, weight_decay=0.1))
    inside, inmost = "backbone.main_network.", "backbone.main_network.main_network."
    wanted = {
        0: ["embeddings.weight", "lm_head.weight", "backbone.encoder.rmsnorm.weight"]
        + ["backbone.routing_module.q_proj_layer.weight", "backbone.residual_proj.bias"]
        + ["backbone.decoder.layers.0.mixer.Wqkv.weight"],
        1: [inside + "pad_dimension", inside + "encoder.layers.0.mixer.Wqkv.weight"]
        + [inside + "residual_proj.weight", inside + "routing_module.k_proj_layer.weight"]
        + [inside + "decoder.layers.1.mlp.fc2.weight"],
        2: [inmost + "main_network.layers.0.norm1.weight", inmost + "main_network.rmsnorm.weight"],
    }
    for stage, names in wanted.items():
        assert {groups[n]["stage"] for n in names} == {stage}, names
    assert {g["stage"] for n, g in groups.items() if n.startswith(inmost)} == {2}


UNDECAYED = {"A_log", "D", "dt_bias", "bias", "pad_dimension"}


def test_weight_decay_by_name():
    """Two-dimensional weights, the convolution's and the embeddings' decay. Named one by one below as a second list."""
    model = meta_model(H.HNetConfig.load({**TWO_STAGES, "arch_layout": ["m1", ["T1m1", ["t1M1"], "m1T1"], "t1"]}))
    groups = by_name(H.parameter_groups(model, lr=1.0, weight_decay=0.1))
    for name, parameter in model.named_parameters():
        norm = "norm" in name.split(".")[-2]
        decays = groups[name]["weight_decay"] == 0.1
        assert decays == (not norm and name.split(".")[-1] not in UNDECAYED), name
        assert decays == (parameter.ndim >= 2), name
    decayed = {tuple(n.split(".")[-2:]) for n, g in groups.items() if g["weight_decay"]}
    assert decayed == {
        (module, "weight")
        for module in ("embeddings", "lm_head", "in_proj", "out_proj", "conv1d", "Wqkv", "fc1", "fc2")
        + ("q_proj_layer", "k_proj_layer", "residual_proj")
    }


# ---------------------------------------------------------------------------------------------------- initial weights


def initialised(config, seed=0, dtype=torch.float32):
    return dict(H.init_weights(H.HNetLM(config).to(dtype), seed).named_parameters())


def test_initial_weights_depend_on_seed_and_name_alone():
    """Not on the order of drawing, the dtype, the global generator or other parameters."""
    config = two_stages()
    first = initialised(config)
    torch.manual_seed(123)
    torch.rand(7)
    second = initialised(config)
    double = initialised(config, dtype=torch.float64)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value.double(), double[name]), name
        assert torch.equal(value, H.initial_weight(name, value.shape, config, 0)), name
    other = initialised(config, seed=1)
    random = [n for n, v in first.items() if v.numel() > 1 and v.std() > 0 and "routing" not in n]
    assert len(random) > 20
    assert not any(torch.equal(first[n], other[n]) for n in random)
    of_a_shape: dict[tuple, list] = {}
    for n in random:
        of_a_shape.setdefault(tuple(first[n].shape), []).append(first[n])
    assert max(len(values) for values in of_a_shape.values()) > 1
    for values in of_a_shape.values():
        assert len({v.flatten()[0].item() for v in values}) == len(values)  # each name has its own numbers


def test_initial_weights_leave_the_global_generator_alone():
    model = H.HNetLM(two_stages())
    state = torch.get_rng_state()
    H.init_weights(model, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_initial_weights_of_the_outer_stages_survive_more_depth():
    """Same name and shape, same value, but for the scale of out_proj and fc2, which counts residual branches."""
    deep = {**TWO_STAGES, "arch_layout": ["m1", ["T1m1", ["t1M3T2"], "m1T1"], "t1"]}
    shallow, deeper = initialised(two_stages()), initialised(H.HNetConfig.load(deep))
    common = [n for n in shallow if n in deeper and shallow[n].shape == deeper[n].shape]
    inmost = "backbone.main_network.main_network."
    assert len(common) > 40
    for name in common:
        if name.startswith(inmost) and name.split(".")[-2] in ("out_proj", "fc2"):
            ratio = shallow[name] / deeper[name]
            torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.flatten()[0].item()))
            assert ratio.flatten()[0] > 1
        else:
            assert torch.equal(shallow[name], deeper[name]), name


def test_initial_weights_as_the_released_code_draws_them():
    """Each rule on the real numbers: deviations within 5 standard errors (1 / sqrt(2 n) of the deviation)."""
    config = two_stages(d_model=[96, 128, 192], d_intermediate=[0, 128, 256])
    weights = initialised(config)
    # residual branches: m1 and t1 outside (2), then T1m1 and m1T1 (6 more), then t1M1 (3 more)
    branches = {0: 2, 1: 8, 2: 11}
    seen = set()

    def check_normal(name, value, std):
        assert value.mean().abs() < 5 * std / math.sqrt(value.numel()), name
        assert abs(value.std().item() / std - 1) < 5 / math.sqrt(2 * value.numel()), name
        share = (value.abs() < std).double().mean().item()  # 0.683 for a normal distribution, 0.577 for a uniform one
        assert abs(share - 0.6827) < 5 * math.sqrt(0.22 / value.numel()), name

    def check_uniform(name, value, low, high):
        assert low <= value.min() and value.max() <= high, name
        width = high - low
        assert (value.mean() - (low + high) / 2).abs() < 5 * width / math.sqrt(12 * value.numel()), name
        if value.numel() >= 100:
            assert value.min() < low + 0.1 * width and value.max() > high - 0.1 * width, name

    for name, value in weights.items():
        stage = name.count("main_network.") if name.startswith("backbone") else 0
        stage = min(stage, 2)
        module, leaf = name.split(".")[-2:]
        seen.add((module, leaf))
        if module in ("out_proj", "fc2"):
            check_normal(name, value, 0.02 / math.sqrt(branches[stage]))
        elif module in ("in_proj", "Wqkv", "fc1", "lm_head"):
            check_normal(name, value, 0.02)
        elif module == "embeddings":
            check_normal(name, value, 1.0)
        elif module in ("q_proj_layer", "k_proj_layer"):
            assert torch.equal(value, torch.eye(len(value))), name
        elif (module, leaf) == ("residual_proj", "weight") or leaf == "pad_dimension":
            assert not value.any(), name
        elif module == "residual_proj":  # torch's default for a bias: 1 / sqrt(fan in)
            check_uniform(name, value, -(len(value) ** -0.5), len(value) ** -0.5)
        elif module == "conv1d":  # torch's default, fan in = width of the filter
            check_uniform(name, value, -0.5, 0.5)
        elif leaf == "A_log":
            check_uniform(name, value.exp(), 1 - 1e-4, 16 + 1e-4)
        elif leaf == "dt_bias":
            dt = nn.functional.softplus(value.double())
            check_uniform(name, dt.log(), math.log(1e-3) - 1e-4, math.log(0.1) + 1e-4)
        else:
            assert leaf == "D" or "norm" in module, name
            assert torch.equal(value, torch.ones_like(value)), name
    assert len(seen) >= 18  # every rule has met a parameter


def test_heads_draw_their_own_a_and_dt():
    weights = initialised(H.HNetConfig.load(CONFIGS / "hnet_1stage_tiny.json", d_model=[2048, 2048]))
    A = torch.cat([v.exp() for n, v in weights.items() if n.endswith("A_log")])
    dt = torch.cat([nn.functional.softplus(v) for n, v in weights.items() if n.endswith("dt_bias")])
    assert len(A) == len(dt) == 128 and len(A.unique()) > 120 and len(dt.unique()) > 120
    assert A.min() < 3 and A.max() > 14
    assert dt.min() < 2e-3 and dt.max() > 0.05
    assert abs(dt.log().mean() - math.log(1e-2)) < 5 * math.log(100) / math.sqrt(12 * 128)


def test_tied_embeddings_start_small():
    """They are lm_head too, whose logits would else start with a deviation of sqrt(D)."""
    weights = initialised(two_stages(tie_embeddings=True))
    assert "lm_head.weight" not in weights
    assert weights["embeddings.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_a_fresh_model_starts_near_the_uniform_distribution():
    """Its loss is that of guessing, ln 256, and the router, comparing neighbours with identity weights, cuts some."""
    model = H.init_weights(H.HNetLM(H.HNetConfig.load(CONFIGS / "hnet_1stage_tiny.json")), seed=0)
    rng = np.random.RandomState(0)
    out = model(*pack([rng.randint(0, 256, 400).astype(np.uint8) for _ in range(2)]))
    assert out.ce.item() == pytest.approx(math.log(256), abs=0.3)
    assert 0.1 < out.stages[0].F.item() < 0.9


# -------------------------------------------------------------------------------------------------------------- flops


def stage_lengths_of(out, iids):
    """The lengths of documents at every stage."""
    lengths = [iids.offsets().diff().tolist()]
    for stage in out.stages:
        lengths.append([int(row.sum()) for row in stage.boundary_mask.unbind()])
    return lengths


@pytest.mark.parametrize("name", ["two_stages", "hnet_1stage_tiny", "isotropic_tiny"])
def test_matmul_flops_equal_those_of_the_linear_layers(name):
    """Counted by hooks: 2 x in x out for each token that reaches a linear layer, and twice that backwards."""
    raw = TWO_STAGES if name == "two_stages" else json.loads((CONFIGS / f"{name}.json").read_text())
    model = build(H, raw, dtype=torch.float32)
    counted = 0

    def count(module, args, out):
        nonlocal counted
        counted += 2 * args[0].shape[0] * module.in_features * module.out_features

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    iids, labels = pack(random_documents([70, 1, 33]))
    lengths = stage_lengths_of(model(iids, labels), iids)
    assert all(sum(inner) < sum(outer) for outer, inner in zip(lengths, lengths[1:]))
    found = flops.count_flops(model.config, lengths)
    assert found.matmul == 3 * counted
    assert found.total == found.matmul + found.mixing


@pytest.mark.parametrize("window", [-1, 0, 1, 3, 7, 8, 100])
def test_attention_flops_equal_a_count_of_pairs(window):
    """4 x width for each pair of a query and a key it sees (score, and weighted sum), and twice that backwards."""
    attn = {**TWO_STAGES["attn_cfg"], "window_size": [window, window, window]}
    config = two_stages(attn_cfg=attn, arch_layout=["t1", ["T1", ["t1"], "T2"], "t1"])
    lengths = [[9, 1, 0, 8], [7, 1, 0, 3], [2, 1, 0, 1]]
    layers, widths, wanted = (2, 3, 1), (32, 64, 64), 0
    for s in range(3):
        pairs = 0
        for length in lengths[s]:
            pairs += sum(1 for i in range(length) for j in range(i + 1) if window < 0 or i - j <= window)
        wanted += 3 * 4 * widths[s] * pairs * layers[s]
    assert flops.count_flops(config, lengths).mixing == wanted


def test_scan_flops_by_hand():
    """Per token, channel and state: decay and add (2 + 2: h = a h + B x), read out (2); and twice that backwards."""
    config = two_stages(arch_layout=["m1", ["M1", ["m1"], "m2"], "m0"])
    lengths = [[10, 5], [4, 1], [2, 1]]
    # stage 0: m1 of width 32, stage 1: three of width 64, stage 2: one; expand 2, 16 states
    per_token = [1 * 64 * 16, 3 * 128 * 16, 1 * 128 * 16]
    wanted = sum(3 * 6 * n * sum(lengths[s]) for s, n in enumerate(per_token))
    assert flops.count_flops(config, lengths).mixing == wanted


def test_mixing_flops_add_up_over_letters():
    """Each mixer counts its own FLOPs: a model with both letters has the sum of models with one each."""
    lengths = [[10, 5], [4, 1], [2, 1]]
    layouts = (
        ["m1", ["M1t1", ["t1"], "m2"], "t1"],
        ["m1", ["M1", ["t0"], "m2"], "m0"],
        ["m0", ["t1", ["t1"], "m0"], "t1"],
    )
    both, scans, attention = (flops.count_flops(two_stages(arch_layout=x), lengths).mixing for x in layouts)
    assert both == scans + attention and scans and attention


def test_inner_stages_count_the_tokens_they_see():
    """With half the chunks, inner stages have half the FLOPs; the outer stage is unchanged."""
    config = two_stages()
    many, few = ([[64], [32], [16]], [[64], [32], [8]])
    alone = flops.count_flops(config, [[64], [32], [0]])
    gap = [flops.count_flops(config, lengths).matmul - alone.matmul for lengths in (many, few)]
    assert gap[0] == 2 * gap[1] > 0


def test_flops_need_a_list_a_stage():
    with pytest.raises(ValueError, match="stage_lengths: 2 lists for 3 stages"):
        flops.count_flops(two_stages(), [[5], [3]])
