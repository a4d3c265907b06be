"""Model configs: the files in configs/, and the messages for invalid ones."""

import copy
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hnet_trainable as H
from hnet_runtime import UserError, distributed

ROOT = Path(__file__).parent.parent
FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.json"))
GOOD = {
    "arch_layout": ["m2", ["T1m1", ["T2"], "m1T1"], "m2"],
    "d_model": [64, 64, 128],
    "d_intermediate": [0, 128, 256],
    "vocab_size": 256,
    "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
    "attn_cfg": {"num_heads": [2, 2, 4], "rotary_emb_dim": [16, 16, 32], "window_size": [7, 7, -1]},
    "tie_embeddings": False,
}
ISOTROPIC = {
    "arch_layout": ["T2"],
    "d_model": [64],
    "d_intermediate": [64],
    "attn_cfg": {"num_heads": [2], "rotary_emb_dim": [16], "window_size": [-1]},
}
THREE = {
    "arch_layout": ["m1", ["m1", ["m1", ["t1"], "m1"], "m1"], "m1"],
    "d_model": [64] * 4,
    "d_intermediate": [0] * 4,
    "attn_cfg": {"num_heads": [2] * 4, "rotary_emb_dim": [16] * 4, "window_size": [-1] * 4},
}


def changed(raw: dict, path: str, value) -> dict:
    """A copy of `raw` with the value at a dotted path replaced, or dropped where it is `...`."""
    raw = copy.deepcopy(raw)
    *sections, key = path.split(".")
    place = raw
    for section in sections:
        place = place[section]
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return raw


# ---------------------------------------------------------------------------------------------------------- good files


def parameters_by_hand(raw: dict) -> int:
    """The number of parameters from the JSON keys alone."""
    ssm, total = raw["ssm_cfg"], raw["vocab_size"] * raw["d_model"][0] * (1 if raw["tie_embeddings"] else 2)
    node = raw["arch_layout"]
    for s, D in enumerate(raw["d_model"]):
        inner, N = ssm["expand"] * D, ssm["d_state"]
        heads, channels, mlp = inner // 64, inner + 2 * N, math.ceil(raw["d_intermediate"][s] / 128) * 128
        mamba = D * (inner + channels + heads) + channels * (ssm["d_conv"] + 1) + 3 * heads + inner + inner * D
        sizes = {"m": mamba, "t": 4 * D * D}
        for layout in node[::2]:
            total += D  # the final norm
            for letter, count in re.findall("([a-zA-Z])([0-9]+)", layout):
                block = sizes[letter.lower()] + D + (3 * D * mlp + D if letter.isupper() else 0)
                total += int(count) * block
        if s < len(raw["d_model"]) - 1:
            total += 3 * D * D + D  # router and residual_proj
            node = node[1]
        total += D - raw["d_model"][s - 1] if s else 0  # pad_dimension
    return total


def test_there_are_configs():
    names = {path.stem for path in FILES}
    official = {"1stage_L", "1stage_XL", "2stage_L", "2stage_XL", "2stage_XL_chinese", "2stage_XL_code"}
    assert {f"hnet_{name}" for name in official | {"1stage_small", "2stage_small"}} <= names
    assert any("tiny" in name for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_file_builds_the_model_it_describes(path):
    raw = json.loads(path.read_text())
    config = H.HNetConfig.load(path)
    with torch.device("meta"):
        model = H.HNetLM(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters_by_hand(raw) == config.count_parameters()
    low, high = (0, 20e6) if "tiny" in path.stem else (50e6, 500e6) if "small" in path.stem else (0.5e9, 2.5e9)
    assert low < count < high
    assert H.HNetConfig.load(config.to_dict()) == config
    groups = H.parameter_groups(model, lr=1.0, weight_decay=0.1)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


OFFICIAL = {  # layouts from outside in, widths, MLP widths; heads 16, window 1023 except innermost, as in the paper
    "1stage_L": (["m4", "T22", "m4"], [1024, 1536], [0, 4096], [32, 48]),
    "1stage_XL": (["m4", "T24", "m4"], [1024, 2048], [0, 5504], [32, 64]),
    "2stage_L": (["m4", "T1m4", "T26", "m4T1", "m4"], [1024, 1024, 1536], [0, 2816, 4096], [32, 32, 48]),
    "2stage_XL": (["m4", "T1m4", "T27", "m4T1", "m4"], [1024, 1536, 2048], [0, 4096, 5504], [32, 48, 64]),
    "2stage_XL_chinese": (["m4", "T1m4", "T30", "m4T1", "m4"], [1024, 1536, 2048], [0, 4096, 5504], [32, 48, 64]),
    "2stage_XL_code": (["m4", "T1m4", "T28", "m4T1", "m4"], [1024, 1536, 2048], [0, 4096, 5504], [32, 48, 64]),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_hold_the_official_numbers(name):
    config = H.HNetConfig.load(FILES[0].parent / f"hnet_{name}.json")
    layouts, widths, intermediates, rotary = OFFICIAL[name]
    S = len(widths) - 1
    found = [config.layouts(s)[0] for s in range(S + 1)] + [config.layouts(s)[1] for s in reversed(range(S))]
    assert found == layouts
    assert config.d_model == tuple(widths) and config.d_intermediate == tuple(intermediates)
    attn = H.AttnConfig((16,) * (S + 1), tuple(rotary), (1023,) * S + (-1,))
    assert config.attn_cfg == attn
    assert config.ssm_cfg == H.SSMConfig(chunk_size=256, d_conv=4, d_state=128, expand=2)
    assert (config.vocab_size, config.tie_embeddings) == (256, False)
    assert config.N_compress == ((1, 6) if S == 1 else (1, 3, 9))


def test_defaults_and_overrides(tmp_path):
    short = {key: GOOD[key] for key in ("arch_layout", "d_model", "d_intermediate", "attn_cfg")}
    config = H.HNetConfig.load(short)
    assert config == H.HNetConfig.load(GOOD)
    assert config.N_compress == (1, 3, 9) and config.target_ratios == (3, 3) and config.num_stages == 2
    assert H.HNetConfig.load(ISOTROPIC).N_compress == (1,)
    assert H.HNetConfig.load(ISOTROPIC).target_ratios == ()
    path = tmp_path / "model.json"
    path.write_text(json.dumps(GOOD))
    for source in (path, str(path), GOOD):
        loaded = H.HNetConfig.load(source, tie_embeddings=True, N_compress=[1, 2.5, 4])
        assert loaded.tie_embeddings and loaded.N_compress == (1, 2.5, 4)
        assert loaded.target_ratios == (2.5, 1.6)
    assert json.loads(path.read_text()) == GOOD  # nothing writes into the caller's file or mapping


def test_a_config_is_a_value():
    config = H.HNetConfig.load(GOOD)
    assert config == H.HNetConfig.load(json.loads(json.dumps(config.to_dict())))
    with pytest.raises(AttributeError):
        config.vocab_size = 300


def test_layouts():
    letters = [(layer.mixer, layer.has_mlp) for layer in H.parse_layout("T1m2M1t10")]
    assert letters == [("t", True), ("m", False), ("m", False), ("m", True)] + [("t", False)] * 10
    config = H.HNetConfig.load(GOOD)
    assert [config.layouts(s) for s in range(3)] == [("m2", "m2"), ("T1m1", "m1T1"), ("T2",)]


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_share_one_tensor_on_the_meta_device_too(tied):
    with torch.device("meta"):
        model = H.HNetLM(H.HNetConfig.load(GOOD, tie_embeddings=tied))
    assert (model.lm_head.weight is model.embeddings.weight) == tied
    assert sum(p.numel() for p in model.parameters()) == parameters_by_hand({**GOOD, "tie_embeddings": tied})


def test_mlp_widths_round_up_to_128():
    model = H.HNetLM(H.HNetConfig.load({**ISOTROPIC, "d_intermediate": [129]}))
    assert model.backbone.main_network.layers[0].mlp.fc2.weight.shape == (64, 256)


def test_heads_that_nothing_uses_do_not_matter():
    """Stages without attention may leave zeros there, stages without MLP a zero width."""
    raw = changed(changed(GOOD, "attn_cfg.num_heads", [0, 2, 4]), "attn_cfg.rotary_emb_dim", [3, 16, 32])
    H.HNetLM(H.HNetConfig.load(raw))


# ----------------------------------------------------------------------------------------------------------- bad input

LAYOUT_JUNK = [
    *(
        "",
        "T",
        "4T",
        "T1x4",
        "T1 m4",
        "T1m4junk",
        "junkT1",
        " T1",
        "T1 ",
        "T1\n",
        "T-1",
        "T1.5",
        "T1m",
        "x4",
        "T1,m4",
        "T٤",
        "T1m４",
    ),
    *(4, None, ["T1"], True, {"T": 1}),
]


@pytest.mark.parametrize("junk", LAYOUT_JUNK, ids=repr)
def test_junk_in_a_layout(junk):
    with pytest.raises(H.ConfigError, match="arch_layout.*T1m4"):
        H.parse_layout(junk)
    for arch in ([junk], ["m2", [junk], "m2"], [junk, ["T1"], "m2"], ["m2", ["T1"], junk]):
        stages = len(arch) // 2 + 1
        raw = {**GOOD, "arch_layout": arch, "d_model": [64] * stages, "d_intermediate": [64] * stages}
        raw["attn_cfg"] = {key: values[:stages] for key, values in GOOD["attn_cfg"].items()}
        with pytest.raises(H.ConfigError, match="arch_layout"):
            H.HNetConfig.load(raw)


WRONG = [
    # unknown, missing
    ("d_mode", [64], "unknown key d_mode; known are .*d_model"),
    ("ssm_cfg.dstate", 64, r"unknown key ssm_cfg\.dstate; known are .*d_state"),
    ("attn_cfg.heads", [2, 2, 4], r"unknown key attn_cfg\.heads; known are num_heads"),
    ("arch_layout", ..., "arch_layout: missing"),
    ("d_model", ..., "d_model: missing"),
    ("d_intermediate", ..., "d_intermediate: missing"),
    ("attn_cfg", ..., "attn_cfg: missing"),
    ("attn_cfg.num_heads", ..., r"attn_cfg\.num_heads: 0 numbers for 3 widths"),
    ("attn_cfg.window_size", ..., r"attn_cfg\.window_size: 0 numbers for 3 widths"),
    # lengths of lists
    ("d_model", [64, 128], "d_intermediate: 3 numbers for 2 widths in d_model"),
    ("d_model", [], "d_model: an empty list; expected one width per stage"),
    ("d_intermediate", [0, 128], "d_intermediate: 2 numbers for 3 widths in d_model"),
    ("d_intermediate", [0, 128, 256, 256], "d_intermediate: 4 numbers for 3 widths in d_model"),
    ("attn_cfg.num_heads", [2, 2], r"attn_cfg\.num_heads: 2 numbers for 3 widths"),
    ("attn_cfg.rotary_emb_dim", [16] * 4, r"attn_cfg\.rotary_emb_dim: 4 numbers for 3 widths"),
    ("attn_cfg.window_size", [], r"attn_cfg\.window_size: 0 numbers for 3 widths"),
    ("N_compress", [1, 6], "N_compress: 2 numbers for 3 widths"),
    # nesting
    ("arch_layout", "m2", "arch_layout: .* for stage 0 of 3"),
    ("arch_layout", ["T2"], "arch_layout: .* for stage 0 of 3"),
    ("arch_layout", ["m2", "T2", "m2"], "arch_layout: 'T2' for stage 1 of 3"),
    ("arch_layout", ["m2", ["T2"], "m2"], r"arch_layout: \['T2'\] for stage 1 of 3"),
    ("arch_layout", ["m2", ["m2", ["T2", "m2"], "m2"], "m2"], r"arch_layout: \['T2', 'm2'\] for stage 2 of 3"),
    ("arch_layout", ["m2", ["m2", "T2", "m2"], "m2"], "arch_layout: 'T2' for stage 2 of 3"),
    ("arch_layout", ["m2", ["m2", ["T1", ["T1"], "m1"], "m2"], "m2"], "arch_layout: .* for stage 2 of 3"),
    ("arch_layout", ["m2", ["m2", [], "m2"], "m2"], r"arch_layout: \[\] for stage 2"),
    ("arch_layout", ["m2", ["m2", ["T2"]], "m2"], "arch_layout: .* for stage 1"),
    ("arch_layout", None, "arch_layout"),
    # widths, heads, rotary, windows
    ("d_model", [128, 64, 128], r"d_model: \[128, 64, 128\] shrinks"),
    ("d_model", [64, 128, 64], "d_model: .* shrinks"),
    ("d_model", [0, 64, 128], "d_model: 0"),
    ("d_model", [-64, 64, 128], "d_model: -64"),
    ("d_model", [48, 64, 128], r"d_model: 48 \* ssm_cfg\.expand .* 64"),
    ("attn_cfg.num_heads", [2, 3, 4], r"attn_cfg\.num_heads: 3 does not divide d_model 64 of stage 1"),
    ("attn_cfg.num_heads", [2, 2, 0], r"attn_cfg\.num_heads: 0"),
    ("attn_cfg.num_heads", [2, 2, -4], r"attn_cfg\.num_heads: -4"),
    ("attn_cfg.rotary_emb_dim", [16, 16, 15], r"attn_cfg\.rotary_emb_dim: 15 for stage 2; .* even"),
    ("attn_cfg.rotary_emb_dim", [16, 34, 16], r"attn_cfg\.rotary_emb_dim: 34 for stage 1; .* 32"),
    ("attn_cfg.rotary_emb_dim", [16, 16, -2], r"attn_cfg\.rotary_emb_dim: -2 for stage 2"),
    ("attn_cfg.window_size", [7, -2, -1], r"attn_cfg\.window_size: -2 for stage 1"),
    ("d_intermediate", [0, 0, 256], "d_intermediate: 0 for stage 1, whose M and T layers"),
    ("d_intermediate", [0, 128, -1], "d_intermediate: -1 for stage 2"),
    # N_compress
    ("N_compress", [2, 3, 9], r"N_compress: \[2, 3, 9\]"),
    ("N_compress", [1, 3, 3], r"N_compress: \[1, 3, 3\]"),
    ("N_compress", [1, 9, 3], r"N_compress: \[1, 9, 3\]"),
    ("N_compress", [1, 1, 9], r"N_compress: \[1, 1, 9\]"),
    ("N_compress", [0, 3, 9], "N_compress"),
    # kinds of values
    ("d_model", 64, "d_model: 64; expected a list"),
    ("d_model", "64", "d_model: '64'; expected a list"),
    ("d_model", [64, 64.0, 128], r"d_model: 64\.0 in the list"),
    ("d_model", [64, "64", 128], "d_model: '64' in the list"),
    ("d_model", [64, True, 128], "d_model: True in the list"),
    ("d_model", [64, None, 128], "d_model: None in the list"),
    ("d_intermediate", [False, 128, 256], "d_intermediate: False in the list"),
    ("d_intermediate", None, "d_intermediate: None"),
    ("attn_cfg.num_heads", 16, r"attn_cfg\.num_heads: 16; expected a list"),
    ("attn_cfg.num_heads", [2, 2.0, 4], r"attn_cfg\.num_heads: 2\.0 in the list"),
    ("attn_cfg.rotary_emb_dim", [16, "16", 32], r"attn_cfg\.rotary_emb_dim: '16' in the list"),
    ("attn_cfg.window_size", [True, 7, -1], r"attn_cfg\.window_size: True in the list"),
    ("attn_cfg", [16], "attn_cfg: expected an object"),
    ("attn_cfg", None, "attn_cfg: expected an object"),
    ("ssm_cfg", 128, "ssm_cfg: expected an object"),
    ("ssm_cfg", None, "ssm_cfg: expected an object"),
    ("ssm_cfg.d_state", "128", r"ssm_cfg\.d_state: '128'; expected a whole number"),
    ("ssm_cfg.d_state", 128.0, r"ssm_cfg\.d_state: 128\.0"),
    ("ssm_cfg.d_state", True, r"ssm_cfg\.d_state: True"),
    ("ssm_cfg.d_state", 0, r"ssm_cfg\.d_state: 0; expected 1 or more"),
    ("ssm_cfg.d_conv", 0, r"ssm_cfg\.d_conv: 0"),
    ("ssm_cfg.chunk_size", -1, r"ssm_cfg\.chunk_size: -1"),
    ("ssm_cfg.expand", 0, r"ssm_cfg\.expand: 0"),
    ("vocab_size", "256", "vocab_size: '256'"),
    ("vocab_size", True, "vocab_size: True"),
    ("vocab_size", 256.0, r"vocab_size: 256\.0"),
    ("vocab_size", 255, "vocab_size: 255; .* 256"),
    ("tie_embeddings", "false", "tie_embeddings: 'false'; expected true or false"),
    ("tie_embeddings", 0, "tie_embeddings: 0"),
    ("tie_embeddings", None, "tie_embeddings: None"),
    ("N_compress", 6, "N_compress: 6; expected a list"),
    ("N_compress", [1, "3", 9], "N_compress: '3' in the list"),
    ("N_compress", [True, 3, 9], "N_compress: True in the list"),
]


@pytest.mark.parametrize("path, value, message", WRONG, ids=lambda x: None if x is ... else repr(x)[:40])
def test_what_is_wrong_is_named(path, value, message, tmp_path):
    raw = changed(GOOD, path, value)
    with pytest.raises(H.ConfigError, match=f"^{message}"):
        H.HNetConfig.load(raw)
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(H.ConfigError, match=f"wrong.json: {message}"):
        H.HNetConfig.load(file)


HUGE = [
    ("d_model", [64, 64, 2**40], r"d_model: 1099511627776 in the list; expected at most 65,536"),
    ("d_model", [64, 64, 10**5000], r"d_model: a number of about 5000 digits in the list; expected at most 65,536"),
    ("d_model", [-(10**30)] * 3, r"d_model: a number of about 30 digits in the list; expected 0 or more"),
    ("d_model", [64] * 100_000, r"d_model: a list of 100,000 numbers; expected at most 17"),
    ("d_model", [64, 64, math.nan], "d_model: nan in the list; expected whole numbers"),
    ("d_intermediate", [0, 0, 10**12], r"d_intermediate: 1000000000000 in the list; expected at most 1,048,576"),
    ("vocab_size", 10**12, "vocab_size: 1000000000000; expected at most 1,048,576"),
    ("vocab_size", math.inf, "vocab_size: inf; expected a whole number"),
    ("arch_layout", ["m2", ["T1m1", ["T999999999"], "m1T1"], "m2"], "arch_layout: 'T999999999' .* at most 10,000"),
    ("arch_layout", ["m2", ["T1m1", ["T" + "9" * 6000], "m1"], "m2"], "arch_layout: 'T9999.*' .* at most 10,000"),
    ("arch_layout", ["m2", ["T1m1", ["m9000T9000"], "m1T1"], "m2"], "arch_layout: 'm9000T9000' .* at most 10,000"),
    ("arch_layout", ["m2", ["x" * 10**6, ["T1"], "m1"], "m2"], r"arch_layout: 'x+\.\.\.x+' is not a layout"),
    ("ssm_cfg.d_state", 2**40, r"ssm_cfg\.d_state: 1099511627776; expected at most 65,536"),
    ("ssm_cfg.d_conv", 10**9, r"ssm_cfg\.d_conv: 1000000000; expected at most 1,024"),
    ("ssm_cfg.expand", 10**9, r"ssm_cfg\.expand: 1000000000; expected at most 256"),
    ("ssm_cfg.chunk_size", 10**9, r"ssm_cfg\.chunk_size: 1000000000; expected at most 1,048,576"),
    ("ssm_cfg.d_state", math.nan, r"ssm_cfg\.d_state: nan; expected a whole number"),
    ("attn_cfg.num_heads", [2, 2, 2**40], r"attn_cfg\.num_heads: 1099511627776 in the list; expected at most 65,536"),
    ("attn_cfg.rotary_emb_dim", [16, 16, 2**40], r"attn_cfg\.rotary_emb_dim: 1099511627776 .* at most 65,536"),
    ("attn_cfg.window_size", [7, 7, 10**18], r"attn_cfg\.window_size: a number of about 18 digits .* at most 1,073,7"),
    ("attn_cfg.window_size", [7, 7, -(10**18)], r"attn_cfg\.window_size: a number of about 18 .* expected -1 or more"),
    ("N_compress", [1, 3, 10**400], "N_compress: a number of about 400 digits in the list; expected at most 1,000,000"),
    ("N_compress", [1, 3, math.nan], "N_compress: nan in the list; expected finite numbers"),
    ("N_compress", [1, 3, 1e300], r"N_compress: 1e\+300 in the list; expected at most 1,000,000"),
    ("tie_embeddings", "x" * 10**6, r"tie_embeddings: 'x+\.\.\.x+'; expected true or false"),
]


@pytest.mark.parametrize("path, value, message", HUGE, ids=lambda x: repr(x)[:30] if not isinstance(x, list) else None)
def test_absurd_sizes_are_refused_at_once(path, value, message, tmp_path):
    began = time.process_time()
    raw = changed(GOOD, path, value)
    with pytest.raises(H.ConfigError, match=f"^{message}") as refused:
        H.HNetConfig.load(raw)
    assert len(str(refused.value)) < 250
    if "5000" not in message:  # json can't write that one
        file = tmp_path / "huge.json"
        file.write_text(json.dumps(raw))
        with pytest.raises(H.ConfigError, match=f"huge.json: {message}"):
            H.HNetConfig.load(file)
    assert time.process_time() - began < 1


def test_sizes_that_are_only_together_absurd_are_refused():
    wide = changed(changed(GOOD, "d_model", [64, 64, 65_536]), "arch_layout", ["m2", ["m1", ["T9000"], "m1"], "m2"])
    with pytest.raises(H.ConfigError, match="^d_model: with these widths and layers the model has .* parameters"):
        H.HNetConfig.load(wide)


def test_files_that_python_itself_would_not_read(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(GOOD).replace('"vocab_size": 256', '"vocab_size": ' + "7" * 100_000))
    with pytest.raises(H.ConfigError, match="model.json: vocab_size: a number of about 1000 digits; expected at most"):
        H.HNetConfig.load(path)
    path.write_text('{"arch_layout": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(H.ConfigError, match="model.json: not a model config .its lists are nested too deep"):
        H.HNetConfig.load(path)
    path.write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")  # as some editors begin a file
    assert H.HNetConfig.load(path) == H.HNetConfig.load(GOOD)


def test_three_stages_need_their_ratios():
    with pytest.raises(H.ConfigError, match="N_compress: missing; .* 3 stages: give 4 numbers"):
        H.HNetConfig.load(THREE)
    assert H.HNetConfig.load({**THREE, "N_compress": [1, 2, 4, 8]}).target_ratios == (2, 2, 2)


def test_a_wrong_override_is_named_like_a_wrong_file():
    with pytest.raises(H.ConfigError, match="unknown key d_mode"):
        H.HNetConfig.load(GOOD, d_mode=[1])
    with pytest.raises(H.ConfigError, match="vocab_size: 3"):
        H.HNetConfig.load(GOOD, vocab_size=3)


@pytest.mark.parametrize("content", ["", "{", "{'d_model': [1]}", "d_model: [64]\n", '{"d_model": [64],}', "\x00"])
def test_a_file_that_is_not_json(tmp_path, content):
    path = tmp_path / "model.yaml"
    path.write_text(content)
    with pytest.raises(H.ConfigError, match=r"model\.yaml: not JSON"):
        H.HNetConfig.load(path)


@pytest.mark.parametrize("content", ["[]", "3", '"m4"', "null", "[[1, 2]]"])
def test_json_that_is_no_object(tmp_path, content):
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(H.ConfigError, match=r"model\.json: expected a JSON object with the keys arch_layout"):
        H.HNetConfig.load(path)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "model.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(H.ConfigError, match=r"model\.json: not JSON"):
        H.HNetConfig.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(H.ConfigError, match=r"nowhere\.json: no such config file"):
        H.HNetConfig.load(tmp_path / "nowhere.json")


def test_a_file_that_is_there_and_cannot_be_read(tmp_path):
    """The message says why, and lists no other configs."""
    (tmp_path / "loop.json").symlink_to("loop.json")
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "loop.json", "Too many levels of symbolic links")):
        with pytest.raises(H.ConfigError) as error:
            H.HNetConfig.load(path)
        assert str(error.value) == f"{path}: can't be read ({why}); expected a JSON file"


def test_a_config_error_is_a_value_error():
    assert issubclass(H.ConfigError, ValueError)


def test_reading_a_config_loads_no_torch():
    program = "import hnet_config, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=FILES[0].parent.parent, check=True)


def test_a_model_larger_than_the_machines_memory_is_refused_before_it_is_made():
    layers = {"arch_layout": ["m1", ["T40"], "m1"], "d_model": [2**15] * 2, "d_intermediate": [0, 2**17]}
    heads = {"num_heads": [2, 2], "rotary_emb_dim": [16, 16], "window_size": [-1, -1]}
    config = H.HNetConfig.load({**layers, "attn_cfg": heads})
    world = SimpleNamespace(device=torch.device("cpu"), shards=1)
    with pytest.raises(UserError, match="the model has .* parameters, whose weights alone take .* GB per process"):
        distributed.build_model(config, world, torch.float32, seed=0)


def test_a_new_key_of_a_group_is_read_and_reaches_the_small_models_of_the_checks(tmp_path):
    source = (ROOT / "hnet_config.py").read_text()
    for old, new in (
        ("    expand: int = 2\n", "    n_groups: int = 1\n"),
        ("    window_size: tuple[int, ...] = ()\n", "    cap: tuple[int, ...] = ()\n"),
    ):
        assert old in source
        source = source.replace(old, old + new)
    (tmp_path / "hnet_config.py").write_text(source)
    program = """
import json, pathlib, sys
from hnet_config import HNetConfig
from hnet_runtime.checks.agreement import toy_config
raw = json.loads(pathlib.Path(sys.argv[1]).read_text())
raw["ssm_cfg"]["n_groups"], raw["attn_cfg"]["cap"] = 2, [0, 30]
for config in (HNetConfig.load(raw), toy_config(HNetConfig.load(raw))):
    assert config.ssm_cfg.n_groups == 2 and config.attn_cfg.cap == (0, 30)
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", program, str(ROOT / "configs" / "hnet_1stage_tiny.json")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
