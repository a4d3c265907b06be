"""Configs with equal FLOPs per byte."""

import json

import pytest

import fineweb
from hnet_runtime import UserError, matching
from hnet_runtime.commands import user_errors
from hnet_trainable import HNetConfig, HNetLM
from scripts import match

ROWS = [8192, 8192, 700, 33, 1]


def by_hand(letter: str, width: int, mlp: int, depth: int, window: int, d_state: int) -> float:
    """FLOPs per byte of a model without chunks, from its matrices and the lengths of rows."""
    if letter == "T":
        matrices, others = 4 * width**2 + 3 * width * mlp, 0
        for n in ROWS:
            others += sum(4 * width * min(i + 1, window + 1) for i in range(n))
    else:
        inner = 2 * width
        matrices = width * (2 * inner + 2 * d_state + inner // 64) + inner * width
        others = sum(6 * inner * d_state * n for n in ROWS)
    return 6 * (depth * matrices + 256 * width) + 3 * depth * others / sum(ROWS)


@pytest.mark.parametrize("letter, reference, rate", [("T", "hnet_1stage_small", 0.18), ("m", "hnet_1stage_L", 0.2)])
def test_a_model_without_chunks_has_the_flops_of_another(letter, reference, rate):
    like = HNetConfig.load(reference)
    target = matching.flops_per_byte(like, ROWS, [rate])
    found = matching.isotropic(letter, target, ROWS, like)
    (layout,), (width,), (mlp,) = found.arch_layout, found.d_model, found.d_intermediate
    assert layout[0] == letter and found.num_stages == 0
    counted = by_hand(letter, width, mlp, int(layout[1:]), like.attn_cfg.window_size[0], like.ssm_cfg.d_state)
    assert counted == pytest.approx(matching.flops_per_byte(found, ROWS, []), rel=1e-9)
    assert counted == pytest.approx(target, rel=0.03)
    assert 0.5 < width / int(layout[1:]) / matching.SHAPES[letter] < 2, "of a usual shape"


def test_the_number_of_innermost_layers_is_matched():
    reference, other = HNetConfig.load("hnet_1stage_small"), HNetConfig.load("hnet_2stage_small")
    target = matching.flops_per_byte(reference, ROWS, [0.18])
    found = matching.match(other, target, ROWS, [0.34, 0.31])
    assert matching.flops_per_byte(found, ROWS, [0.34, 0.31]) == pytest.approx(target, rel=0.03)
    assert found.d_model == other.d_model and found.arch_layout[1][1][0] != other.arch_layout[1][1][0]
    fewer = matching.match(other, target, ROWS, [0.5, 0.5])
    assert int(fewer.arch_layout[1][1][0][1:]) < int(found.arch_layout[1][1][0][1:]), "more chunks, fewer layers"
    tiny = HNetConfig.load("hnet_1stage_tiny")
    deeper = HNetConfig.load(tiny.to_dict(), arch_layout=["m1", ["T5"], "m1"])
    between = sum(matching.flops_per_byte(config, ROWS, [0.4]) for config in (tiny, deeper)) / 2
    finer = matching.match(tiny, between, ROWS, [0.4])
    assert matching.flops_per_byte(finer, ROWS, [0.4]) == pytest.approx(between, rel=0.03)
    assert finer.d_intermediate[1] != tiny.d_intermediate[1], "one layer more or less is too coarse"
    with pytest.raises(UserError, match="within 3%"):
        matching.match(reference, target / 5, ROWS, [0.18])


def test_chunks_of_a_row_are_counted_for_each_row():
    """The innermost attention sees rate times the bytes of each row, and at least one chunk."""
    config = HNetConfig.load("hnet_1stage_tiny")
    model = HNetLM(config)
    inner = [layer.mixer.flops([1638, 1638, 140, 7, 1]) for layer in model.backbone.main_network.main_network.layers]
    rest = matching.flops_per_byte(config, ROWS, [1e-9]) * sum(ROWS)
    one_chunk = [layer.mixer.flops([1] * 5) for layer in model.backbone.main_network.main_network.layers]
    matrices = sum(p.numel() for p in model.backbone.main_network.parameters() if p.ndim == 2)
    wanted = rest + 3 * (sum(inner) - sum(one_chunk)) + 6 * matrices * (1638 + 1638 + 140 + 7 + 1 - 5)
    assert matching.flops_per_byte(config, ROWS, [0.2]) * sum(ROWS) == pytest.approx(wanted, rel=1e-9)


def test_the_command_writes_a_config_and_compares_runs(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"text {i} " * 400)
    fineweb.prepare(str(tmp_path / "texts"), str(tmp_path / "data"), holdout=0)
    capsys.readouterr()
    common = ["hnet_1stage_tiny", "--data", str(tmp_path / "data"), "--mbs", "2048", "--rates", "0.2"]
    match.main([*common, "--layers", "m", "--out", str(tmp_path / "iso.json")])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("planned, hnet_1stage_tiny: m1 (T4) m1, 192/256")
    assert 0.97 <= float(said[1].split("per byte, ")[1].split()[0]) <= 1.03
    assert HNetConfig.load(tmp_path / "iso.json").num_stages == 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(HNetConfig.load("hnet_1stage_tiny").to_dict()))
    rows = [{"step": step + 1, "stage0_F": F} for step, F in enumerate([0.9, 0.9, 0.1, 0.3])]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    match.main([*common, "--runs", str(run)])
    assert f"as seen, {run}: " in (said := capsys.readouterr().out) and "rates 0.200" in said and "1.000 of the" in said
    for flags, message in (
        (["--rates", "0.2,0.3", "--layers", "T"], "--rates 0.2,0.3: expected 1 shares"),
        (["--layers", "T", "--change", "x"], "expected one of them"),
        (["--layers", "T", "--change-rates", "0.1"], "--change-rates 0.1: expected also --change"),
        (["--runs", "x", "--out", "y"], "--out y: --runs finds no config to write"),
        (["--layers", "T", "--mbs", "0"], "^--mbs 0: expected 1 or more"),
        (["--layers", "T", "--max-doc", f"{2**70}"], f"^--max-doc {2**70}: expected 1 or more, and less than 2"),
        (["--layers", "T1"], "^--layers T1: expected one letter of m, t, M, T$"),
    ):
        with pytest.raises(user_errors(), match=message):
            match.main([*common[:-2], *flags])
