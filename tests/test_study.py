"""The study: its plan, its resumption after a kill, and the numbers in its tables."""

import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fineweb
from hnet_runtime import DataError, UserError
from hnet_runtime.commands import parse

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import study  # noqa: E402
from study_tables import difference, page, paired_by_seed, pooled_deviation, t95  # noqa: E402

ONE = {
    "arch_layout": ["m1", ["T2"], "m1"], "d_model": [64, 64], "d_intermediate": [0, 128], "ssm_cfg": {"d_state": 16},
    "attn_cfg": {"num_heads": [2, 2], "rotary_emb_dim": [8, 8], "window_size": [31, -1]},
}  # fmt: skip
TWO = {
    "arch_layout": ["m1", ["m1", ["T2"], "m1"], "m1"], "d_model": [64] * 3, "d_intermediate": [0, 0, 128],
    "ssm_cfg": {"d_state": 16},
    "attn_cfg": {"num_heads": [2] * 3, "rotary_emb_dim": [8] * 3, "window_size": [31, 31, -1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "texts").mkdir()
    words, draw = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"], random.Random(0)
    for i in range(40):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(draw.choices(words, k=draw.randint(30, 100))))
    fineweb.prepare(str(folder / "texts"), str(folder / "data"), holdout=0.2)
    (folder / "one.json").write_text(json.dumps(ONE))
    (folder / "two.json").write_text(json.dumps(TWO))
    return folder


def flags(corpus: Path, out: Path, *more: str) -> list[str]:
    given = {
        "data": corpus / "data", "device": "cpu", "config": corpus / "one.json", "config2": corpus / "two.json",
        "mbs": 128, "bytes": 512, "lr-bytes": 256, "architectures": "learned,space,mamba", "phases": "lr,main",
        "lrs": "1e-3", "seeds": 1, "reference-seeds": 2, "val-slices": 2, "robust-texts": 1, "tolerance": 0.4,
        "out": out,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.mark.soak
def test_a_study_resumes_after_a_kill_between_runs(corpus, tmp_path):
    out = tmp_path / "study"
    command = [sys.executable, str(ROOT / "benchmarks" / "study.py"), *flags(corpus, out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    results, deadline = out / "results.jsonl", time.monotonic() + 300
    while not (results.exists() and results.read_text().count("\n") >= 1):
        assert process.poll() is None and time.monotonic() < deadline, "no run has finished"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results.read_text()
    with open(results, "a") as file:
        file.write('{"key": "torn')
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results.read_text().startswith(before), "what was there is not run again"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    made = [(row["phase"], row["architecture"], row["seed"]) for row in rows]
    wanted = [(phase, name, 0) for phase in ("lr", "main") for name in ("learned", "space", "mamba")]
    assert made == [*wanted, ("main", "learned", 1)]
    assert len({row["key"] for row in rows}) == 7 and not list((out / "runs").iterdir())
    for row in rows:
        assert row["train_bytes"] == {"lr": 256, "main": 512}[row["phase"]] and row["lr"] == 1e-3
        assert math.isfinite(row["val_bpb"]) and set(row["perturbed_bpb"]) > {"none", "Drop"}
        assert row["flops_per_byte"] == pytest.approx(rows[0]["flops_per_byte"], rel=0.4)
        assert len(row["rates"]) == (row["architecture"] != "mamba")
    tables = (out / "study.md").read_text()
    (tmp_path / "page.md").write_text("before\n<!-- study -->\nold\n<!-- end -->\nafter\n")
    study.main(flags(corpus, out, "--tables", "--page", str(tmp_path / "page.md")))
    assert (tmp_path / "page.md").read_text() == f"before\n<!-- study -->\n\n{tables}\n<!-- end -->\nafter\n"
    assert "| learned, one stage |" in tables and "4 runs of 0.000512 MB" in tables
    assert "1 degrees of freedom" in tables


def test_the_plan_needs_no_run_and_time_limits_it(corpus, tmp_path, capsys):
    out = tmp_path / "study"
    study.main(flags(corpus, out, "--plan"))
    said = capsys.readouterr().out
    assert [line.split("/")[0].strip() for line in said.splitlines()[:-1]] == ["lr"] * 3 + ["main"] * 4
    assert "MFLOP per byte" in said and "s of runs are left" in said and not out.exists()
    assert study.main(flags(corpus, out, "--seconds", "0.01")) == 0
    assert "3 runs of the phase lr are left" in capsys.readouterr().out
    assert not (out / "results.jsonl").exists(), "no run starts that would not end in time"


def test_a_run_counts_in_each_phase_that_asks_for_it(corpus, tmp_path, capsys):
    """One of the main phase is not made again to compare learning rates, and the best rate is chosen with it."""
    out = tmp_path / "study"
    same = ["--bytes", "256", "--architectures", "learned", "--reference-seeds", "1"]

    def planned(*more: str) -> list[list[str]]:
        study.main(flags(corpus, out, *same, *more, "--plan"))
        return [line.split() for line in capsys.readouterr().out.splitlines()[:-1]]

    ((main, *_),) = planned("--phases", "main", "--lr", "2e-3")
    assert main.startswith("main/learned/lr0.002/seed0/")
    row = {
        "architecture": "learned", "seed": 0, "steps": 2, "mbs": 128, "train_flags": "", "bytes_per_s": 1e3,
        "text": {"train": fineweb.load_manifest(corpus / "data")["splits"]["train"]["fingerprint"]},
        "flops_per_byte": 1e6, "start_s": 1.0, "is_first": True,
    }  # fmt: skip
    out.mkdir()
    results = [row | {"key": main, "phase": "main", "lr": 2e-3, "val_bpb": 2.0}]
    (out / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in results))
    tasks = planned("--phases", "lr,main", "--lrs", "1e-3,2e-3", "--bytes", "512")
    assert [task[:2] for task in tasks[1:2]] == [["done", main.replace("main", "lr")]]
    assert tasks[0][0].startswith("lr/learned/lr0.001/")
    results.append(row | {"key": tasks[0][0], "phase": "lr", "lr": 1e-3, "val_bpb": 2.5})
    (out / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in results))
    assert planned("--phases", "main", "--lrs", "1e-3,2e-3", "--bytes", "512")[0][0].startswith("main/learned/lr0.002/")


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "results.jsonl").write_bytes(b'{"key": "a"}\n{"key": "\xff"}\n')
    with pytest.raises(UserError, match="results.jsonl, line 2: expected the result of a run"):
        study.Results(tmp_path)
    (tmp_path / "results.jsonl").write_bytes(b'{"key": "a"}\n{"key": "\xff')
    assert list(study.Results(tmp_path).rows) == ["a"]
    assert (tmp_path / "results.jsonl").read_bytes() == b'{"key": "a"}\n'


def test_flags_of_routers_reach_only_models_that_have_one():
    given = study.Study(flags="alpha=0.2 router-lr=0.5")
    assert given.train_flags() == ["--alpha", "0.2", "--router-lr", "0.5"]
    assert given.train_flags(learns=False) == ["--alpha", "0.2"]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--architectures", "rnn"], "--architectures rnn: expected names of learned"),
        (["--flags", "lr=1"], "--flags lr=1: the study sets this flag itself"),
        (["--flags", "alpha"], "--flags alpha: expected name=value"),
        (["--rates", "learned:2"], "--rates learned:2: expected learned:RATE"),
        (["--lrs", "1e-3,x"], "--lrs 1e-3,x: expected numbers above 0"),
        (["--bytes", "0"], "--bytes 0.0: expected more than 0"),
        (["--bytes", "inf"], "--bytes inf: expected a finite number"),
        (["--lr-bytes", "inf"], "--lr-bytes inf: expected a finite number"),
        (["--lr", "inf"], "--lr inf: expected a finite number"),
        (["--seconds", "nan"], "--seconds nan: expected a finite number"),
        (["--flags", "alpha=x"], "--flags alpha=x: --alpha x: expected a number"),
        (["--mbs", "1000000"], "data: [0-9,]+ bytes are less than one batch"),
        (["--tables"], "--out .*study: has no results.jsonl with results"),
        (["--config", "hnet_2stage_tiny"], "--config: has 2 chunking stages; expected 1"),
    ],
)
def test_wrong_flags_are_named(corpus, tmp_path, more, said):
    with pytest.raises((UserError, DataError), match=said):
        study.main(flags(corpus, tmp_path / "study", *more, "--plan"))


@pytest.mark.parametrize(
    "more, said",
    [
        (["--choices", "/nope"], "--choices /nope: can't be read"),
        (["--page", "/nope"], "--page /nope: can't be read"),
        (["--page", "{corpus}/one.json"], "one.json: expected the marks <!-- study -->"),
        (["--device", "cuda"], "--device cuda: "),
        (["--out", "{corpus}/one.json"], "--out .*one.json: can't be made"),
    ],
)
def test_what_runs_need_at_their_end_is_checked_before_the_first(corpus, tmp_path, monkeypatch, more, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        study.main(flags(corpus, tmp_path / "study", *(word.format(corpus=corpus) for word in more)))
    assert not (tmp_path / "study").exists()


def test_a_mistake_is_no_result_and_a_loss_that_is_not_finite_is_one(corpus, tmp_path):
    """After a mistake the corrected command makes the run; what is not finite would be so again."""
    out = tmp_path / "study"
    command = [sys.executable, str(ROOT / "benchmarks" / "study.py")]
    command += flags(corpus, out, "--phases", "lr", "--architectures", "learned", "--lrs", "1e30")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(more: str) -> subprocess.CompletedProcess:
        given = [*command, "--flags", f"clip=0 warmup=0 {more}"]
        return subprocess.run(given, env=environment, capture_output=True, text=True, timeout=100)

    done = run("replicate=3")
    assert done.returncode == 2 and done.stderr.startswith("error: --replicate 3: expected a divisor"), done.stderr
    assert not (out / "results.jsonl").exists()
    done = run("alpha=0.03")
    assert done.returncode == 0 and "failed, step " in done.stdout, done.stderr
    (row,) = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert "gradient norm" in row["failed"]
    assert "starts" not in run("alpha=0.03").stdout


def rows_of(name: str, values: np.ndarray, sizes: np.ndarray) -> list[dict]:
    """Results of seeds with these nats of documents, (seeds, documents)."""
    common = {"architecture": name, "document_bytes": study.packed(sizes.astype("<i4"))}
    return [
        common | {"document_nats": study.packed(nats.astype("<f8")), "val_bpb": nats.sum() / sizes.sum() / math.log(2)}
        for nats in values
    ]


def test_differences_are_paired_and_deviations_pooled():
    rng = np.random.RandomState(0)
    sizes = rng.randint(100, 1000, 50)
    hard = rng.uniform(0.5, 2, 50) * sizes  # documents differ far more than architectures
    ours = hard * 1.01 + rng.normal(0, 1, (3, 50))
    theirs = hard + rng.normal(0, 1, (5, 50))
    a, b = rows_of("a", ours, sizes), rows_of("b", theirs, sizes)
    groups = [[row["val_bpb"] for row in rows] for rows in (a, b)]
    deviation, freedom = pooled_deviation(groups)
    assert freedom == 6
    assert deviation == pytest.approx(
        math.sqrt((2 * statistics.variance(groups[0]) + 4 * statistics.variance(groups[1])) / 6)
    )
    found = difference(a, b, deviation, freedom)
    assert found.value == pytest.approx(statistics.fmean(groups[0]) - statistics.fmean(groups[1]), rel=1e-9)
    draws = rng.randint(0, 50, (4000, 50))  # a bootstrap over documents, with the pairs kept
    gap = (ours.mean(0) - theirs.mean(0))[draws].sum(1) / sizes[draws].sum(1) / math.log(2)
    assert found.documents == pytest.approx(
        1.96 * gap.std(), rel=0.1
    )  # 4,000 draws: 1% of noise; the rest is curvature
    assert found.seeds == pytest.approx(2.447 * deviation * math.sqrt(1 / 3 + 1 / 5))
    assert found.is_resolved == (abs(found.value) > math.hypot(found.documents, found.seeds))
    alone = difference(a[:1], b[:1], *pooled_deviation([groups[0][:1], groups[1][:1]]))
    assert alone.seeds == math.inf and not alone.is_resolved, "one seed each says nothing of seeds"
    assert (t95(1), t95(30), t95(1000)) == (12.706, 2.042, pytest.approx(1.96, abs=0.01))
    assert page([], study.ARCHITECTURES, "learned") == "\n"


def a_run(**different) -> dict:
    """The line of a run of `learned` on a GPU, with some values replaced."""
    lines = (ROOT / "benchmarks" / "results" / "h200-2026-11-30" / "study.jsonl").read_text().splitlines()
    return json.loads(lines[0]) | different


def test_differences_of_the_same_seeds_have_an_interval_of_their_own():
    ours = [{"seed": seed, "val_bpb": bpb} for seed, bpb in enumerate((1.3, 2.2, 3.4))]
    theirs = [{"seed": seed, "val_bpb": bpb} for seed, bpb in ((0, 1.0), (2, 3.0), (1, 2.0), (3, 9.0))]
    value, half = paired_by_seed(ours, theirs)
    assert value == pytest.approx(0.3)
    assert half == pytest.approx(4.303 * 0.1 / math.sqrt(3)), "the deviation of 0.3, 0.2 and 0.4"
    assert paired_by_seed(ours[:1], theirs) is None


def test_tables_keep_texts_and_learning_rates_apart():
    other = {"train": "abc", "validation": "def"}
    curve = [[step, 2.0] for step in range(10)]
    runs = [a_run(key="1", phase="main", bpb_curve=curve, val_bpb=1.5)]
    runs += [a_run(key="2", phase="main", seed=1, val_bpb=1.6), a_run(key="3", phase="main", lr=1e-4, val_bpb=1.25)]
    stride = [[step, 2.0 + step // 2 / 10] for step in range(10)]
    runs += [a_run(key="4", phase="main", architecture="stride", bpb_curve=stride, val_bpb=1.75)]
    runs += [a_run(key="5", phase="main", text=other, lr=0.5)]
    found = page(runs, study.ARCHITECTURES, "learned")
    first, second, rates = re.split("^### ", found, flags=re.MULTILINE)[1:]
    assert first.startswith("36 MB of the text `5397e5d1065e6c11`\n") and second.startswith("36 MB of the text `abc`\n")
    assert "| learned, one stage | 1.5500 | 1.5000, 1.6000 |" in first, "the rate with most seeds"
    assert "Left out here, with other learning rates: learned 0.0001." in first
    assert "| every K-th byte | 0 | +0.000 | +0.100 | +0.200 | +0.300 | +0.400 |" in first, "of the same batches"
    assert "| learned, one stage | **1.2500** | 1.5000 |" in rates, "where only the rate differs"
    assert rates.startswith("Learning rates: 36 MB of the text `5397e5d1065e6c11`\n"), "the only one of the other text"


def test_the_best_rate_is_that_of_the_same_text(corpus, tmp_path):
    """Rates that were found on another text don't count."""
    settings = flags(corpus, tmp_path, "--lr", "7e-4", "--lrs", "1e-3,2e-3", "--phases", "main")
    asked = parse(study.Study, settings, "study")
    plan = study.Plan(asked, study.Results(tmp_path))
    steps = round(asked.lr_bytes / asked.mbs)
    row = a_run(phase="lr", lr=2e-3, steps=steps)
    study.Results(tmp_path).add(row)
    assert study.Plan(asked, study.Results(tmp_path)).best_lr("learned") == 7e-4
    study.Results(tmp_path).add(row | {"key": "here", "text": {"train": plan.text, "validation": "x"}})
    assert study.Plan(asked, study.Results(tmp_path)).best_lr("learned") == 2e-3


def test_runs_that_share_a_gpu_have_no_speed():
    """Their steps wait for each other."""
    row = a_run()

    def speed(*rows: dict) -> str:
        (line,) = re.findall(
            r"^\| learned, one stage \| m4 .*$", page(rows, study.ARCHITECTURES, "learned"), re.MULTILINE
        )
        return line.split(" | ")[9]

    shared = row | {"shares_gpu": True, "bytes_per_s": 4e5}
    assert speed(row) == speed(row, shared) == "1.03"
    assert speed(shared) == "-"


def two_gpus() -> int:
    """What torch.cuda.device_count says on a machine with two: nothing of one that is named twice, or after a gap."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = ["0", "1"] if given is None else given.split(",")
    return 0 if len(set(names)) < len(names) else sum(1 for _ in itertools.takewhile(("0", "1").__contains__, names))


@pytest.mark.parametrize(
    "given, found", [("1", ["1"]), ("0,0", ["0", "0"]), ("1, 0", ["1", "0"]), ("0,7", ["0"]), ("7", []), ("", [])]
)
def test_gpus_are_those_that_exist_also_where_one_is_named_twice(monkeypatch, given, found):
    monkeypatch.setattr("torch.cuda.device_count", two_gpus)
    assert study.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert study.visible_gpus() == found and os.environ["CUDA_VISIBLE_DEVICES"] == given


def test_more_workers_than_gpus_are_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", two_gpus)
    wanted = [word for word in flags(corpus, tmp_path / "study", "--gpus", "3") if word not in ("--device", "cpu")]
    with pytest.raises(UserError, match="--gpus 3: this machine has 2 GPUs"):
        study.main(wanted)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7")
    with pytest.raises(UserError, match="--gpus 3: CUDA_VISIBLE_DEVICES=1,7 gives 1 GPU"):
        study.main(wanted)
