"""benchmarks/recipe.py: its variants are what their lines say, and its table has the numbers of the runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fineweb
from hnet_runtime import UserError
from hnet_runtime.runs.flags import read_config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import recipe  # noqa: E402
from study import Results  # noqa: E402


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "texts").mkdir()
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(f"The number {i} is followed by {i + 1}, and so on. " * 9)
    fineweb.prepare(str(folder / "texts"), str(folder / "data"), holdout=0.2)
    return folder / "data"


def flags(corpus: Path, out: Path, *more: str) -> list[str]:
    given = {
        "data": corpus, "device": "cpu", "config": "hnet_1stage_tiny", "mbs": 256, "bytes": 2048, "seeds": 1,
        "val-slices": 1, "variants": "paper,small-batch", "out": out,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--page", "/nope"], "--page /nope: can't be read"),
        (["--seconds", "nan"], "--seconds nan: expected a finite number"),
        (["--flags", "alpha"], "--flags alpha: expected name=value"),
    ],
)
def test_mistakes_are_named_before_the_first_run(corpus, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        recipe.main(flags(corpus, tmp_path / "recipe", *more))
    assert not (tmp_path / "recipe").exists()


def test_every_variant_is_the_first_with_one_change(corpus, tmp_path):
    """Its flags are flags of train.py, and differ from those of `paper` in what it names."""
    plan = recipe.RecipePlan(recipe.Recipe(data=str(corpus), out=str(tmp_path)), Results(tmp_path))
    tasks = {task.architecture: task for task in plan.tasks("main")}
    assert list(tasks) == list(recipe.VARIANTS)
    paper = vars(read_config([*tasks["paper"].flags, "-c", "hnet_1stage_small"]))
    assert (paper["lr"], paper["mbs"], paper["steps"], paper["alpha"]) == (6.25e-4, 32768, 732, 0.03)
    expected = {
        "alpha": {"alpha": 0.2}, "slow-router": {"router_lr": 0.1}, "hinge": {"ratio_form": "hinge"},
        "rising": {"ratio_from": "1-1.5", "ratio_rise": 0.5}, "low-lr": {"lr": 3.12e-4}, "shallow": {},
        "small-batch-lr": {"mbs": 8192, "steps": 2930, "val_every": 733, "val_slices": 128, "log_every": 2930},
    }  # fmt: skip
    for name, wanted in expected.items():
        found = vars(read_config([*tasks[name].flags, "-c", "hnet_1stage_small"]))
        changed = {key: value for key, value in found.items() if value != paper[key]}
        assert {k: v for k, v in changed.items() if k != "lr"} == {k: v for k, v in wanted.items() if k != "lr"}, name
        assert found["lr"] == pytest.approx(wanted.get("lr", 6.25e-4), rel=0.01)
        assert found["mbs"] * found["steps"] == pytest.approx(24e6, rel=1e-3), "equal bytes"
    assert tasks["shallow"].config["arch_layout"] == ["m1", ["T16"], "m1"]
    assert tasks["paper"].config["arch_layout"] == ["m4", ["T16"], "m4"]
    assert len({task.key for task in plan.tasks("main")}) == 2 * len(tasks), "two seeds of each"


def test_runs_are_made_once_and_tabulated(corpus, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "recipe.py"), *flags(corpus, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["architecture"] for row in rows] == ["paper", "small-batch"]
    for row, (steps, every) in zip(rows, ((8, 2), (32, 8))):
        assert row["steps"] == steps and row["train_bytes"] == 2048
        assert [v["step"] for v in row["validations"]] == [every, 2 * every, 3 * every, steps]
    assert "0 runs" not in done.stdout and (tmp_path / "recipe.md").read_text() == recipe.tables(rows)
    before = (tmp_path / "results.jsonl").read_bytes()
    assert recipe.main(flags(corpus, tmp_path)) == 0
    assert (tmp_path / "results.jsonl").read_bytes() == before, "what is there is not run again"


def row(name: str, seed: int, edges: list[float], bits: float) -> dict:
    """A result whose chunks begin at word edges so many times as often as by chance."""
    validation = {"val_edge_base": 0.4, "val_bpb": bits, "val_stage0_enrichment": 1.5, "val_stage0_compression": 6.04}
    validation |= {"val_chance_space": 0.2, "val_stage0_at_space": 0.3, "val_chance_punctuation": 0.1}
    validation |= {"val_chance_letter_1": 0.0, "val_stage0_at_letter_1": 0.0, "val_stage0_at_punctuation": 0.05}
    about = {"date": "2026-01-02", "card": "CPU", "torch": "2", "commit": "abc", "train_flags": "alpha=0.03"}
    validations = [validation | {"val_edge_share": 0.4 * edge} for edge in edges]
    return about | {"architecture": name, "seed": seed, "validations": validations, "train_bytes": 24e6}


def test_the_table_shows_each_seed_and_means_of_the_way_there():
    rows = [row("hinge", 0, [1.0, 1.1, 1.2, 1.3], 2.0), row("paper", 1, [0.7, 0.8, 0.9, 1.0], 2.1)]
    rows += [row("paper", 0, [0.5, 0.6, 0.7, 0.8], 2.3), {"architecture": "alpha", "seed": 0, "failed": "why"}]
    *_, paper, hinge = recipe.tables(rows).splitlines()
    wanted = "| the paper's: alpha 0.03 | 2.200 | 0.80, 1.00 | 0.60, 0.70, 0.80 | 1.50, 1.50 | -, - | 0.50, 0.50 |"
    assert paper == f"{wanted} 1.50, 1.50 | 6.0 |"
    assert hinge.startswith("| only too many chunks cost | 2.000 | 1.30 | 1.00, 1.10, 1.20 |")
    assert recipe.tables([]) == ""


@pytest.mark.parametrize(
    "more, said",
    [
        (["--variants", "paper,magic"], "--variants magic: expected names of paper"),
        (["--bytes", "0"], "--bytes 0.0: expected more than 0"),
        (["--config", "hnet_2stage_tiny"], "--config hnet_2stage_tiny: has 2 chunking stages; expected 1"),
    ],
)
def test_wrong_flags_are_named(corpus, tmp_path, more, said):
    with pytest.raises(UserError, match=said):
        recipe.main(flags(corpus, tmp_path, *more, "--plan"))
