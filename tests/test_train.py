"""train.py as a user runs it: real processes, a tiny model, real text."""

import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_train, start_train

import fineweb
import train
from hnet_runtime import UserError, cpu, distributed
from hnet_runtime.runs import checkpoint, statistics
from hnet_runtime.runs.flags import read_config
from hnet_runtime.runs.metrics import GROUPS, JsonlSink, WandbSink, panel
from hnet_runtime.runs.progress import Progress
from hnet_runtime.runs.run import Compilations, Interrupts, code_revision, in_words, newest
from hnet_runtime.runs.weights import export, load
from hnet_trainable import ConfigError, HNetConfig, HNetLM, init_weights

ROOT = Path(__file__).parent.parent
MODEL = {
    "arch_layout": ["m1", ["T1"], "m1"],
    "d_model": [32, 64],
    "d_intermediate": [0, 64],
    "ssm_cfg": {"d_state": 16},
    "attn_cfg": {"num_heads": [1, 2], "rotary_emb_dim": [8, 8], "window_size": [-1, -1]},
}
OF_THE_PROCESS = ("step_ms", "bytes_per_s", "mfu", "save_ms", "graphs_captured")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """40 documents of 300 to 3000 bytes and a model's config beside their shards."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "bytes",
        "become",
        "chunks",
        "of",
        "text",
    ]
    rng = random.Random(0)
    (folder / "texts").mkdir()
    for i in range(40):
        text = " ".join(rng.choices(words, k=rng.randint(60, 600)))
        (folder / "texts" / f"{i}.txt").write_text(text)
    fineweb.prepare(str(folder / "texts"), str(folder / "data"), holdout=0.2)
    (folder / "model.json").write_text(json.dumps(MODEL))
    return folder


def command(corpus: Path, *more: str) -> list[str]:
    flags = f"-c {corpus}/model.json --data {corpus}/data --mbs 256 --lr 2e-3 --schedule wsd --decay 0.2 --device cpu"
    flags += " --val-slices 4 --log-every 5 --stats-every 5"
    return [sys.executable, str(ROOT / "train.py"), *flags.split(), *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(corpus: Path, *more: str) -> subprocess.CompletedProcess:
    return run_train(command(corpus, *more)[2:], corpus, environment())


def succeed(corpus: Path, *more: str) -> str:
    done = run(corpus, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in OF_THE_PROCESS} for record in records(folder)]


@pytest.fixture(scope="module")
def undisturbed(corpus) -> Path:
    folder = corpus / "undisturbed"
    output = succeed(corpus, "--steps", "20", "--save-every", "4", "--val-every", "10", "--save-dir", str(folder))
    assert "bits per byte" in output and "edge of a word" in output
    (corpus / "undisturbed.log").write_text(output)
    return folder


def test_a_run_learns_and_leaves_its_records(undisturbed):
    rows = records(undisturbed)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[-1]["bpb"] < 0.7 * rows[0]["bpb"]
    wanted = {"bpb", "ce", "lr", "grad_norm", "bytes_per_s", "stage0_ratio_loss", "stage0_compression", "stage0_F"}
    assert all(wanted <= set(row) for row in rows)
    assert [row["step"] for row in rows if "val_bpb" in row] == [10, 20]
    assert {"val_edge_share", "val_edge_base", "val_stage0_compression"} <= set(rows[-1])
    assert {panel(key).split("/")[0] for row in rows for key in row if key not in ("step", "sample")} == set(GROUPS)
    assert "</html>" in (undisturbed / "plots.html").read_text()
    assert (undisturbed / "plots.png").read_bytes().startswith(b"\x89PNG")
    kept = sorted(p.name for p in (undisturbed / "checkpoints").iterdir())
    assert kept == ["step_00000016", "step_00000020"]
    assert json.loads((undisturbed / "config.json").read_text())["N_compress"] == [1, 6]
    saved = json.loads((undisturbed / "checkpoints" / "step_00000020" / "train.json").read_text())
    assert saved["step"] == 20 and saved["config"]["mbs"] == 256 and saved["code"] == code_revision()


def test_lines_give_means_since_the_line_before(corpus, undisturbed):
    rows, lines = records(undisturbed), (corpus / "undisturbed.log").read_text().splitlines()
    found = [
        re.match(r"step +(\d+)/20  bpb ([\d.]+)  ratio loss ([\d.]+)  bytes per chunk ([\d.]+)/6", x) for x in lines
    ]
    found = [[float(x) for x in line.groups()] for line in found if line]
    assert [step for step, *_ in found] == [1, 5, 10, 15, 20]
    for (before, *_), (step, bpb, ratio, chunk) in zip(found, found[1:]):
        since = rows[int(before) : int(step)]
        mean = {key: sum(row[key] for row in since) / len(since) for key in ("bpb", "stage0_ratio_loss", "stage0_F")}
        assert bpb == pytest.approx(mean["bpb"], abs=6e-4)
        assert ratio == pytest.approx(mean["stage0_ratio_loss"], abs=6e-3)
        assert chunk == pytest.approx(1 / mean["stage0_F"], abs=6e-2)


def test_a_run_validates_three_times_by_default(corpus, tmp_path):
    output = succeed(corpus, "--steps", "9", "--log-every", "100", "--save-dir", str(tmp_path / "run"))
    assert [row["step"] for row in records(tmp_path / "run") if "val_bpb" in row] == [3, 6, 9]
    assert output.count("  val bpb ") == 3


def test_statistics_come_every_so_many_steps(undisturbed):
    rows = records(undisturbed)
    for name in statistics.names(1):
        assert [row["step"] for row in rows if name in row] == [5, 10, 15, 20], name
    last = rows[-1]
    assert last["stage0_chunk_mean"] <= last["stage0_chunk_max"] <= 256 and last["stage1_weight_norm"] > 0
    assert sum(last[f"stage0_p_0.{i}"] for i in range(10)) == pytest.approx(1, abs=1e-5)


def test_a_prompt_may_be_any_bytes(corpus, tmp_path):
    """As passed by a shell. A run must not end at its last step because of them."""
    flags = ["--prompt", os.fsdecode(b"a\xff"), "--steps", "2", "--sample-bytes", "4", "--stats-every", "0"]
    assert "the model writes" in succeed(corpus, *flags, "--save-dir", str(tmp_path / "run"))
    assert newest(tmp_path / "run").name == "step_00000002"


def test_a_dead_router_is_named_and_stops_the_run(corpus, tmp_path):
    """W_q = 0 makes every cosine 0 and p = 0.5, which is no boundary; the rate is too small to change that."""
    model = init_weights(HNetLM(HNetConfig.load(MODEL)), 0)
    with torch.no_grad():
        model.backbone.routing_module.q_proj_layer.weight.zero_()
    export(model, tmp_path / "dead", "safetensors")
    flags = ["-p", str(tmp_path / "dead"), "--steps", "80", "--lr", "1e-30", "--sample-bytes", "0"]
    done = run(corpus, *flags, "--on-collapse", "stop", "--save-dir", str(tmp_path / "run"))
    # reported at step 50; the run ends after the step that was launched
    assert done.returncode == 1 and "--on-collapse stop" in done.stderr and "step 51" in done.stderr, done.stderr[
        -2000:
    ]
    assert len(records(tmp_path / "run")) == 51
    assert (tmp_path / "run" / "checkpoints" / "step_00000051" / "manifest.json").exists()
    # a run that is interrupted and resumed stops at the same step; one that has stopped gets as many steps again
    resumed = [*flags, "--save-dir", str(tmp_path / "resumed")]
    succeed(corpus, *resumed, "--steps", "30")
    resumed += ["--resume", "auto", "--on-collapse", "stop"]
    assert "step 51: a router is stuck" in refused(corpus, *resumed, status=1)
    succeed(corpus, *resumed)
    assert len(records(tmp_path / "resumed")) == 80


def test_the_learning_rate_warms_up_and_decays(undisturbed):
    rates = [row["lr"] for row in records(undisturbed)]
    assert rates[0] == pytest.approx(1e-3) and rates[1:17] == [2e-3] * 16
    assert rates[17] == pytest.approx(2e-3 * (1 - 0.5)) and 0 < rates[19] < rates[18] < rates[17]


def kill_and_resume(corpus: Path, folder: Path, seed: int, steps: int = 20, kills: int = 1) -> None:
    """Starts the undisturbed run in `folder`, kills it (-9) at a random moment, and resumes until it is done."""
    rng = random.Random(seed)
    flags = ["--steps", str(steps), "--save-every", "4", "--val-every", "10", "--save-dir", str(folder)]
    for _ in range(kills):
        process = subprocess.Popen(
            command(corpus, *flags, "--resume", "auto"), cwd=corpus, env=environment(), stdout=subprocess.DEVNULL
        )
        target, metrics = rng.randint(0, steps - 2), folder / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > target):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
    succeed(corpus, *flags, "--resume", "auto")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in (1, 2))])
def test_killed_and_resumed_equals_undisturbed(corpus, undisturbed, tmp_path, seed):
    kill_and_resume(corpus, tmp_path / "run", seed)
    assert timeless(tmp_path / "run") == timeless(undisturbed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 107))
def test_killed_three_times_and_resumed_equals_undisturbed(corpus, undisturbed, tmp_path, seed):
    kill_and_resume(corpus, tmp_path / "run", seed, kills=3)
    assert timeless(tmp_path / "run") == timeless(undisturbed)


def test_a_torn_checkpoint_is_passed_over(corpus, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    torn = folder / "checkpoints" / "step_00000020"
    shard = next(torn.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (folder / "checkpoints" / "step_00000024.writing").mkdir()
    flags = ["--steps", "20", "--save-every", "4", "--val-every", "10", "--save-dir", str(folder), "--resume", "auto"]
    output = succeed(corpus, *flags)
    assert "skipped" in output and "step_00000020" in output and "step_00000016" in output
    assert timeless(folder) == timeless(undisturbed)


@pytest.mark.parametrize("manifest", ["[]", "{}", "3", '{"train.json": 3}', '{"nowhere": 3}', "{"])
def test_a_folder_without_a_manifest_of_all_is_no_checkpoint(undisturbed, tmp_path, manifest):
    folder = shutil.copytree(newest(undisturbed), tmp_path / "step_00000020")
    assert checkpoint.is_complete(folder)
    (folder / "manifest.json").write_text(manifest)
    assert not checkpoint.is_complete(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}'])
def test_a_damaged_train_json_is_named(undisturbed, tmp_path, content):
    folder = shutil.copytree(newest(undisturbed), tmp_path / "step_00000020")
    (folder / "train.json").write_text(content)
    sizes = {f.name: f.stat().st_size for f in folder.iterdir() if f.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(sizes))
    with pytest.raises(checkpoint.CheckpointError, match="train.json: damaged"):
        checkpoint.read_train(folder)


SMALL = [pytest.param(name, marks=pytest.mark.soak) for name in ("train.json", "config.json", ".metadata")]


@pytest.mark.parametrize("name", ["__0_0.distcp", "sha256.json", *SMALL])
def test_a_checkpoint_whose_bytes_have_changed_is_named(corpus, undisturbed, tmp_path, name):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    last = newest(folder)
    content = bytearray((last / name).read_bytes())
    at = {"train.json": content.find(b"seed"), "sha256.json": 0}.get(name, len(content) // 2)
    content[at] ^= 1  # a flag of another name; no JSON; elsewhere in the middle
    (last / name).write_bytes(content)
    resume = ["--save-dir", str(folder), "--resume", "auto", "--steps", "21"]
    assert f"{last / name}: damaged" in refused(corpus, *resume)
    if name == "__0_0.distcp":
        assert f"{last / name}: damaged" in refused(corpus, "-p", str(last))
    shutil.rmtree(last)
    before = newest(folder)
    (before / "sha256.json").unlink()  # as earlier versions wrote them
    manifest = json.loads((before / "manifest.json").read_text())
    (before / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "sha256.json"}))
    assert f"resuming from {before}" in succeed(corpus, *resume)


def test_a_finished_run_does_not_resume_in_another_folder(corpus, undisturbed, tmp_path):
    said = refused(corpus, "--resume", str(undisturbed), "--save-dir", str(tmp_path / "new"))
    assert "steps already" in said and not (tmp_path / "new").exists()


def test_no_checkpoint_is_lost_when_a_run_resumes_from_another_one(corpus, undisturbed, tmp_path):
    """--resume auto would resume from later ones, and the new ones would be deleted first."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    contents = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    first, *_, last = checkpoint.complete(folder)
    said = refused(corpus, "--resume", str(first), "--save-dir", str(folder))
    assert f"holds {last.name}, which is later than {first}" in said
    assert "holds another run" in refused(corpus, "--resume", str(undisturbed), "--save-dir", str(folder))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == contents
    done = int(first.name.removeprefix("step_")) + 1
    succeed(corpus, "--resume", str(first), "--save-dir", str(tmp_path / "branch"), "--steps", str(done))
    assert records(tmp_path / "branch")[-1]["step"] == done


@pytest.mark.parametrize("flag", ["-p", "-c"])
def test_a_run_goes_on_without_what_it_began_with(corpus, undisturbed, tmp_path, flag):
    """Its checkpoints have the weights and the model's config."""
    source, folder = tmp_path / "source", tmp_path / "run"
    shutil.copytree(newest(undisturbed), source) if flag == "-p" else shutil.copy(corpus / "model.json", source)
    succeed(corpus, "--steps", "2", flag, str(source), "--save-dir", str(folder))
    source.rename(tmp_path / "elsewhere")
    done = run_train(["--save-dir", str(folder), "--resume", "auto", "--steps", "3"], corpus, environment())
    assert done.returncode == 0 and records(folder)[-1]["step"] == 3, done.stderr[-2000:]


def test_weights_to_start_from_are_not_used_where_a_checkpoint_is(corpus, undisturbed, tmp_path):
    """The same command starts a run from weights and resumes it. Others than its own are named, and enter no flags."""
    folder, own = tmp_path / "run", str(newest(undisturbed))
    flags = ["--save-dir", str(folder), "--resume", "auto", "-p"]
    for steps in ("2", "3"):
        done = run(corpus, *flags, own, "--steps", steps)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    flags_before = (folder / "train.yaml").read_text()
    done = run(corpus, *flags, "/does/not/exist", "--steps", "3")
    said = f"warning: -p /does/not/exist is not used: {folder} has a checkpoint, whose weights the run resumes\n"
    assert (done.returncode, done.stderr) == (0, said) and "which was" not in done.stdout
    assert (folder / "train.yaml").read_text() == flags_before and f"pt_ckpt: {own}" in flags_before
    assert "-c nope: no such config file" in refused(corpus, *flags[:-1], "-c", "nope")


def test_a_kill_during_a_save_leaves_the_checkpoint_before(corpus, undisturbed, tmp_path):
    folder = tmp_path / "run"
    flags = ["--steps", "20", "--save-every", "4", "--val-every", "10", "--save-dir", str(folder), "--resume", "auto"]
    process = subprocess.Popen(command(corpus, *flags), cwd=corpus, env=environment(), stdout=subprocess.DEVNULL)
    torn = folder / "checkpoints" / "step_00000008.writing"
    while not torn.exists():
        time.sleep(0.0002)
    process.kill()
    process.wait()
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert "step_00000004" in kept
    output = succeed(corpus, *flags)
    if torn.name in kept:  # the kill came before the rename
        assert f"skipped {torn}" in output and "resuming from" in output and "step_00000004" in output
    assert timeless(folder) == timeless(undisturbed)
    assert not torn.exists()


def limit_files(size: int):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_leaves_nothing_torn(corpus, tmp_path):
    """A limit on file sizes imitates a full disk: writes fail halfway with an error of the system."""
    folder = tmp_path / "run"
    flags = ["--steps", "4", "--save-every", "2", "--save-dir", str(folder)]
    done = subprocess.run(
        command(corpus, *flags),
        cwd=corpus,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=limit_files(100_000),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "step_00000002" in done.stderr and "could not be written" in done.stderr
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("size", [700, 20_000])
def test_a_disk_that_is_full_at_the_start_leaves_nothing_torn(corpus, tmp_path, size):
    """Such a limit lets a run write some of its first files. With room again it starts, and its files are complete."""
    folder = tmp_path / "run"
    argv = command(corpus, "--steps", "1", "--save-dir", str(folder), "--resume", "auto")
    limits = {"cwd": corpus, "env": environment(), "timeout": 100, "preexec_fn": limit_files(size)}
    done = subprocess.run(argv, **limits, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr[-2000:]
    assert "can't be written (File too large)" in done.stderr
    code = checkpoint.model_code()
    copies = {f"{name}-{code[f'{name}.py']}.py": f"{name}.py" for name in ("hnet_trainable", "hnet_routers")}
    for copy, original in copies.items():
        if (folder / copy).exists():
            assert (folder / copy).read_bytes() == (ROOT / original).read_bytes()
    (folder / next(iter(copies))).write_bytes(b"cut off")  # as earlier versions left it
    succeed(corpus, "--steps", "1", "--save-dir", str(folder), "--resume", "auto")
    assert [(folder / copy).read_bytes() for copy in copies] == [
        (ROOT / original).read_bytes() for original in copies.values()
    ]
    assert not [path.name for path in folder.iterdir() if path.name[0] == "." and path.name != ".lock"]


def test_a_disk_that_is_full_at_the_end_is_no_mistake_of_the_user(corpus, tmp_path):
    """The limit is above the copies of the model's files and below the plots."""
    folder = tmp_path / "run"
    argv = command(corpus, "--steps", "4", "--save-every", "0", "--save-dir", str(folder))
    limits = {"cwd": corpus, "env": environment(), "timeout": 100, "preexec_fn": limit_files(60_000)}
    done = subprocess.run(argv, **limits, capture_output=True, text=True)
    said = "can't be written (File too large); the run is complete except for its plots"
    assert (done.returncode, done.stderr) == (1, f"error: {folder}/plots.png: {said}\n")
    assert [row["step"] for row in records(folder)] == [1, 2, 3, 4] and "val_bpb" in records(folder)[-1]


def test_a_continuation_on_other_data_is_refused(corpus, undisturbed, tmp_path):
    source = ["--resume", str(undisturbed / "checkpoints" / "step_00000020"), "--steps", "30"]
    assert "--seed" in refused(corpus, *source, "--seed", "1", "--save-dir", str(tmp_path / "a"))
    assert "--mbs" in refused(corpus, *source, "--mbs", "128", "--save-dir", str(tmp_path / "b"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("another text " * 500)
    (tmp_path / "texts" / "b.txt").write_text("and one more " * 500)
    fineweb.prepare(str(tmp_path / "texts"), str(tmp_path / "data"), holdout=0.5)
    message = refused(corpus, *source, "--data", str(tmp_path / "data"), "--save-dir", str(tmp_path / "c"))
    assert "the text in --data" in message


LIKE_SIGTERM = [pytest.param(number, marks=pytest.mark.soak) for number in (signal.SIGUSR1, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *LIKE_SIGTERM])
def test_a_signal_saves_and_ends_well(corpus, undisturbed, tmp_path, number):
    folder, logs = tmp_path / "run", (tmp_path / "stdout", tmp_path / "stderr")
    flags = ["--steps", "20", "--save-every", "1000", "--val-every", "10", "--save-dir", str(folder)]
    process = start_train(command(corpus, *flags)[2:], corpus, environment(), logs)
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 3:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(240)
    assert process.exitcode == 0 and "--resume auto" in logs[0].read_text(), logs[1].read_text()
    assert 3 <= len(records(folder)) < 20
    succeed(corpus, *flags, "--resume", "auto")
    assert timeless(folder) == timeless(undisturbed)


def test_a_closed_terminal_is_nothing_to_what_nohup_started():
    """SIGHUP is ignored; the other signals still request a save."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        interrupts = Interrupts()
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupts.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received == "SIGTERM"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_output_that_nobody_reads_ends_no_run(corpus, tmp_path):
    """The reader closes the output after the first line, as in `| head -1`, also when the run is resumed."""
    folder, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    flags = ["--save-every", "4", "--val-every", "3", "--save-dir", str(folder), "--log-every", "1"]
    for more in (["--steps", "6"], ["--steps", "8", "--resume", "auto"]):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        process = start_train(command(corpus, *flags, *more)[2:], corpus, environment(), (pipe, tmp_path / "stderr"))
        os.set_blocking(reader, True)
        while b"\n" not in os.read(reader, 4096):
            time.sleep(0.01)  # it has not opened the pipe yet
        os.close(reader)
        process.join(240)
        assert (process.exitcode, (tmp_path / "stderr").read_text()) == (0, "")
        assert newest(folder).name == f"step_0000000{more[1]}"
        assert records(folder)[-1]["step"] == int(more[1]) and "sample" in records(folder)[-1]
        assert "val_bpb" in records(folder)[-1] and (folder / "plots.html").exists()


def test_a_prompt_without_samples_is_named(corpus, tmp_path):
    said = succeed(corpus, "--steps", "1", "--sample-bytes", "0", "--prompt", "a", "--save-dir", str(tmp_path / "run"))
    assert "no samples (--sample-bytes 0): --prompt and --sample-every have no effect" in said


def test_an_encoding_that_lacks_characters_ends_no_run(corpus, tmp_path):
    """Characters that can't be printed are shown as numbers; files are UTF-8 or ASCII in any locale."""
    folder = tmp_path / "run"
    argv = command(corpus, "--steps", "2", "--prompt", "日本", "--sample-bytes", "4", "--save-dir", str(folder))
    (tmp_path / "flags.yaml").write_text("prompt: 日本", encoding="utf-8")
    argv += ["--config-file", str(tmp_path / "flags.yaml")]
    more = {"PYTHONIOENCODING": "latin-1", "PYTHONWARNDEFAULTENCODING": "1"}  # warns where a file has the locale's
    done = subprocess.run(argv, cwd=corpus, env=environment() | more, capture_output=True, timeout=100)
    assert done.returncode == 0 and b"\\u65e5" in done.stdout, done.stderr[-2000:]
    warnings = [line for line in done.stderr.decode().splitlines() if "EncodingWarning" in line]
    ours = [line for line in warnings if line.startswith((f"{ROOT}/train.py", f"{ROOT}/hnet_runtime"))]
    assert ours == []
    assert "日本" in records(folder)[-1]["sample"].replace("|", "")
    assert newest(folder).name == "step_00000002"


def test_a_second_ctrl_c_ends_at_once():
    """Sent by the program itself, so that the two signals can't be merged."""
    program = "import os, signal; from hnet_runtime.runs.run import Interrupts; "
    program += "Interrupts(); print('set', flush=True); "
    program += "os.kill(os.getpid(), signal.SIGINT); print('asked', flush=True); "
    program += "os.kill(os.getpid(), signal.SIGINT); print('too late', flush=True)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stdout.split() == ["set", "asked"], done.stderr


def refused(corpus: Path, *flags: str, status: int = 2) -> str:
    """The single line of a mistake, with this exit status and without traceback."""
    done = run(corpus, *flags)
    assert done.returncode == status, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "flags, said",
    [
        (["-c", "key.json"], "d_hidden"),
        (["-c", "nowhere.json"], "no such config file"),
        (["-c", "."], ".: can't be read (Is a directory); expected a JSON file"),
        (["--config-file", "."], ".: can't be read (Is a directory); expected a YAML file"),
        (["--config-file", "run.yaml"], "'step'"),
        (["--config-file", "type.yaml"], "expected int"),
        (["-N", "1-x"], "1-3-9"),
        (["-N", "1-3-9"], "N_compress"),
        (["--lr", "0.0"], "--lr"),
        (["--sample-bytes", "10000000000"], "--sample-bytes 10000000000: expected at most 65536"),
        (["--timeout", "1e300"], "--timeout 1e+300: expected at most 1e7 seconds"),
        (["--steps", "1" + 400 * "0"], "expected less than 2**53"),
        (["--dry-run", "--mbs", "900000000000"], "--mbs 900000000000: expected less than 2**31"),
        (["--timeout", "inf"], "--timeout inf: expected a finite number"),
        (["--resume", "auto"], "--save-dir"),
        (["-e", "generate", "--resume", "somewhere"], "-p"),
        (["--resume", "runs/nope"], "--resume runs/nope: no such folder; expected auto, or the folder of a run"),
        (["--resume", "run.yaml"], "--resume run.yaml: a file; expected auto, or the folder of a run"),
        (["--save-dir", "run.yaml"], "--save-dir run.yaml: a file; expected a folder, or a name for a new one"),
        (["--save-dir", "run.yaml/a/b"], "--save-dir run.yaml/a/b: run.yaml is a file; expected a folder"),
    ],
)
def test_mistakes_in_flags_are_named(tmp_path, monkeypatch, flags, said):
    """An error that the program turns into a sentence and status 2, see below."""
    monkeypatch.chdir(tmp_path)
    Path("key.json").write_text(json.dumps({**MODEL, "d_hidden": 3}))
    Path("run.yaml").write_text("step: 3\n")
    Path("type.yaml").write_text("steps: many\n")
    with pytest.raises((UserError, ConfigError)) as mistake:
        train.train(read_config(flags))
    assert said in str(mistake.value) and "\n" not in str(mistake.value)


@pytest.mark.parametrize("flags, status, said", [(["--help"], 0, "--val-every"), (["--logger", "neptune"], 2, "wandb")])
def test_flags_are_answered_before_torch_is_imported(flags, status, said):
    program = "import runpy, sys\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    program += "except SystemExit as end: print('status', end.code, 'torch' in sys.modules)"
    argv = [sys.executable, "-c", program, *flags]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert f"status {status} False" in done.stdout and said in done.stdout + done.stderr


def test_mistakes_end_in_one_sentence(corpus, undisturbed, tmp_path):
    (tmp_path / "not.json").write_text("arch_layout: T12")
    (tmp_path / "empty").mkdir()
    assert "--stepz" in refused(corpus, "--stepz", "3")
    assert "not JSON" in refused(corpus, "-c", str(tmp_path / "not.json"))
    of_the_model = ["-C", "graph", "--max-chunks-per-rank", "9"]  # the data is opened before the model is checked
    assert "empty" in refused(corpus, "--data", str(tmp_path / "empty"), *of_the_model)
    assert "one batch" in refused(corpus, "--mbs", "1000000")
    assert "--resume auto" in refused(corpus, "--steps", "20", "--save-dir", str(undisturbed))
    (tmp_path / "other.json").write_text(json.dumps({**MODEL, "d_intermediate": [0, 128]}))
    other = ["-c", str(tmp_path / "other.json"), "--save-dir", str(tmp_path / "other"), "--steps", "21"]
    message = refused(corpus, *other, "--resume", str(undisturbed / "checkpoints" / "step_00000020"))
    assert "d_intermediate" in message


def test_a_folder_in_use_is_refused(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = ["--steps", "1000", "--save-dir", str(folder)]
    process = subprocess.Popen(command(corpus, *flags), cwd=corpus, env=environment(), stdout=subprocess.DEVNULL)
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    assert "another run" in refused(corpus, *flags, "--resume", "auto")
    process.kill()
    process.wait()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = ["--steps", "20", "--save-every", "1", "--save-dir", str(folder), "--clip", "0", "--warmup", "0"]
    message = refused(corpus, *flags, "--lr", "1e30", status=1)
    rows, found = records(folder), checkpoint.complete(folder)
    assert all(row["ce"] is not None for row in rows) and found[-1].name == f"step_{len(rows):08d}"
    # the newest checkpoint has the weights that gave the loss; those before it gave finite losses
    failed = len(rows) + 1
    assert f"error: step {failed}: cross entropy nan, gradient norm nan; stopped before" in message
    assert f"They come from the weights of {found[-1]}, with which step {failed} may fail again. " in message
    assert message.endswith(f"The last good checkpoint: {found[-2] if len(found) > 1 else 'none'}\n")


def test_weights_that_gave_a_finite_loss_since_are_good(corpus, tmp_path):
    folder = tmp_path / "run"
    flags = ["--save-every", "1", "--save-dir", str(folder), "--clip", "0", "--warmup", "0"]
    succeed(corpus, "--steps", "2", *flags, "--lr", "1e-3", "--val-every", "0")
    more = ["--steps", "20", *flags, "--save-every", "9", "--lr", "1e30", "--resume", "auto"]
    message = refused(corpus, *more, status=1)
    assert f"reached the weights. The last good checkpoint: {folder}/checkpoints/step_00000002\n" in message


def test_a_loss_that_is_not_finite_is_reported_after_the_next_launch(corpus, tmp_path):
    flags = ["--steps", "20", "--save-dir", str(tmp_path / "run"), "--clip", "0", "--warmup", "0", "--lr", "1e30"]
    message = refused(corpus, *flags, status=1)
    finite = records(tmp_path / "run")
    assert f"step {len(finite) + 1}: cross entropy" in message
    assert message.endswith("weights. The last good checkpoint: none\n")
    assert [row["step"] for row in finite] == list(range(1, len(finite) + 1)) and len(finite) < 19


def test_weights_of_a_last_step_that_compute_nothing_are_not_saved(corpus, tmp_path):
    message = refused(corpus, "--steps", "1", "--lr", "1e30", "--save-dir", str(tmp_path / "run"), status=1)
    assert "step 1: nan bits per byte of held-out text. The last good checkpoint: none\n" in message
    assert checkpoint.complete(tmp_path / "run") == []


def test_decay_counts_only_in_schedules_that_have_one():
    assert read_config(["--schedule", "cosine", "--warmup", "0.9"]).warmup == 0.9
    with pytest.raises(UserError, match="--decay 0.25: expected at most 1 together with --warmup 0.9"):
        read_config(["--warmup", "0.9"])


def test_graphs_train_as_eager_steps_do(corpus, tmp_path):
    """On the CPU without capture: the same float32 sums in another order; training amplifies the difference."""
    flags = ["--steps", "8", "--global-slices", "2", "--save-every", "4", "--save-dir"]
    for mode in ("eager", "graph"):
        succeed(corpus, *flags, str(tmp_path / mode), "-C", mode)
    eager, graph = records(tmp_path / "eager"), records(tmp_path / "graph")
    for key in ("ce", "grad_norm", "stage0_F", "stage0_ratio_loss"):
        assert [row[key] for row in graph] == pytest.approx([row[key] for row in eager], rel=1e-3), key
    assert graph[-1]["val_bpb"] == pytest.approx(eager[-1]["val_bpb"], rel=1e-3)
    shutil.copytree(tmp_path / "graph", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000008")
    succeed(corpus, *flags, str(tmp_path / "resumed"), "-C", "graph", "--resume", "auto")
    assert timeless(tmp_path / "resumed") == timeless(tmp_path / "graph")


@pytest.mark.soak
def test_graphs_in_bfloat16(corpus, tmp_path):
    """The optimizer has split weights, whose high bits graphs read; checkpoints have float32 weights."""
    folder, flags = tmp_path / "run", ["--steps", "20", "-C", "graph", "--dtype", "bfloat16", "--stats-every", "5"]
    succeed(corpus, *flags, "--save-every", "9", "--save-dir", str(folder))
    assert records(folder)[-1]["bpb"] < 0.75 * records(folder)[0]["bpb"]
    shutil.copytree(folder, tmp_path / "resumed")
    for later in ("step_00000018", "step_00000020"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / later)
    succeed(corpus, *flags, "--save-every", "9", "--save-dir", str(tmp_path / "resumed"), "--resume", "auto")
    assert timeless(tmp_path / "resumed") == timeless(folder)


def test_graphs_say_what_they_cannot_do(corpus, tmp_path):
    assert "--max-chunks-per-rank" in refused(corpus, "--max-chunks-per-rank", "9", "-C", "graph")


def test_a_run_goes_on_with_its_own_flags(corpus, tmp_path):
    """Only the given flags change, and they are named."""
    folder = tmp_path / "run"
    flags = ["--alpha", "0.05", "--save-every", "2", "--steps", "4", "--save-dir", str(folder)]
    whole = tmp_path / "whole"
    succeed(corpus, *flags[:-1], str(whole))
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    bare = ["--device", "cpu", "--save-dir", str(folder), "--resume", "auto"]
    done = run_train(bare, corpus, environment())
    assert done.returncode == 0 and "which was" not in done.stdout, done
    assert timeless(folder) == timeless(whole)
    assert "all 4 steps are done" in run_train(bare, corpus, environment()).stdout
    done = run_train([*bare, "--steps", "5", "--lr", "1e-3"], corpus, environment())
    assert "with --lr 0.001, which was 0.002" in done.stdout and "with --steps 5, which was 4" in done.stdout
    assert len(records(folder)) == 5
    done = run_train([*bare, "--steps", "3"], corpus, environment())
    assert done.returncode == 2 and "--steps 3" in done.stderr and "has done 5 steps" in done.stderr
    shutil.rmtree(folder / "checkpoints")  # as if it had died before its first save
    earlier = (folder / "metrics.jsonl").read_bytes()
    done = run_train(["--device", "cpu", "--save-dir", str(folder), "--resume", "auto"], corpus, environment())
    assert done.returncode == 0 and len(records(folder)) == 5
    assert f"{folder}: no complete checkpoint" in done.stdout and "metrics-1.jsonl" in done.stdout
    assert (folder / "metrics-1.jsonl").read_bytes() == earlier, "nothing is overwritten"
    flags = (folder / "train.yaml").read_text()
    assert "alpha: 0.05" in flags and "save_dir" not in flags, "what another run can take from it"
    shutil.copytree(folder, tmp_path / "damaged")
    with open(tmp_path / "damaged" / "metrics.jsonl", "a") as file:
        file.write("{\n")
    done = run_train([*bare[:2], "--save-dir", str(tmp_path / "damaged"), "--resume", "auto"], corpus, environment())
    assert done.returncode == 2 and "metrics.jsonl, line 6" in done.stderr and "Traceback" not in done.stderr
    other = ["--resume", str(folder), "--save-dir", str(tmp_path / "other"), "--steps", "6", "--device", "cpu"]
    assert "resuming from" in run_train(other, corpus, environment()).stdout


@pytest.mark.parametrize(
    "text, said",
    [
        ("device: gpu", "device: 'gpu'; expected one of auto, cpu, cuda"),
        ("steps: true", "steps: True; expected int"),
        ("lr: fast", "lr: 'fast'; expected float"),
        ("stepz: 3", "unknown key 'stepz'"),
        ("- 3", "expected flags"),
        ("a: [", "not a readable YAML file"),
    ],
)
def test_what_a_yaml_file_gives_wrong_is_named(tmp_path, text, said):
    (tmp_path / "flags.yaml").write_text(text)
    for argv in (["--config-file", str(tmp_path / "flags.yaml")], [f"--config-file={tmp_path}/flags.yaml"]):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            read_config(argv)
        assert "flags.yaml" in str(error.value)


def test_a_yaml_file_may_write_numbers_in_any_way(tmp_path):
    (tmp_path / "flags.yaml").write_text("lr: 1e-3\nalpha: 1\nseed: 7")
    config = read_config(["--config-file", str(tmp_path / "flags.yaml"), "--seed", "8"])
    assert (config.lr, config.alpha, config.seed) == (1e-3, 1.0, 8)


@pytest.mark.parametrize("what", ["a file", "a logger that is not there", "a checkpoint that is not there"])
def test_a_refused_start_leaves_nothing(corpus, tmp_path, monkeypatch, what):
    folder = tmp_path / "run"
    if what == "a file":
        folder.write_text("mine")
        assert f"--save-dir {folder}" in refused(corpus, "--save-dir", str(folder))
        assert folder.read_text() == "mine"
        return
    if what == "a logger that is not there":
        if importlib.util.find_spec("wandb"):
            pytest.skip("wandb is installed")
        assert "wandb is not installed" in refused(corpus, "-l", "wandb", "--save-dir", str(folder))
    else:
        nowhere = ["--resume", str(tmp_path / "nowhere"), "--save-dir"]
        refused(corpus, *nowhere, str(folder))
        (tmp_path / "mine").mkdir()
        refused(corpus, *nowhere, str(tmp_path / "mine"))
        assert (tmp_path / "mine").is_dir(), "it was there before"
    assert not folder.exists()


def test_metrics_that_are_damaged_or_cannot_be_written_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        JsonlSink(path, 1)
    path.unlink()
    sink = JsonlSink(path, 0)
    sink._file.close()
    sink._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match="/dev/full: can't be written"):
        sink.log(1, {})


@pytest.mark.parametrize("damage", ["a byte", "a folder"])
def test_metrics_that_cannot_be_read_are_named(corpus, undisturbed, tmp_path, damage):
    """The line where one byte is not UTF-8, and a folder of that name."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    content = bytearray(metrics.read_bytes())
    content[content.find(b"\n", content.find(b"\n") + 1) + 20] = 0xFF
    metrics.unlink()
    metrics.mkdir() if damage == "a folder" else metrics.write_bytes(content)
    said = f"{metrics}, line 3: expected a JSON object" if damage == "a byte" else f"{metrics}: can't be read (Is a dir"
    assert said in refused(corpus, "--steps", "21", "--save-dir", str(folder), "--resume", "auto")
    called = [sys.executable, str(ROOT / "scripts" / "plot.py"), str(folder)]
    done = subprocess.run(called, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {said}"), done.stderr


def test_metrics_are_on_disk_before_the_checkpoint_of_their_step(corpus, tmp_path):
    """Without that, a power failure leaves a checkpoint without the lines before it. Files of earlier versions may."""
    program = """
import os, runpy, sys
def noted(call, name):
    def do(*args, **keywords):
        if name == "fsync": print("SYNC", os.readlink(f"/proc/self/fd/{args[0]}"), flush=True)
        else: print("NAME", args[1], os.path.exists(args[1]), flush=True)
        return call(*args, **keywords)
    return do
os.fsync, os.replace = noted(os.fsync, "fsync"), noted(os.replace, "replace")
runpy.run_path(sys.argv.pop(0) and sys.argv[0], run_name="__main__")
"""
    folder = tmp_path / "run"
    flags = ["--steps", "4", "--save-every", "2", "--save-dir", str(folder)]
    argv = [sys.executable, "-c", program, *command(corpus, *flags)[1:]]
    more = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=corpus, env=environment() | more, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for name in ("step_00000002", "step_00000004"):
        at = lines.index(["NAME", f"{folder}/checkpoints/{name}", "False"])
        before, after = lines[:at], lines[at:]
        for synced in (f"{folder}/metrics.jsonl", f"{folder}/checkpoints/{name}.writing", str(folder)):
            assert ["SYNC", synced] in before, synced
        assert ["SYNC", f"{folder}/checkpoints"] in after
        lines = after
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))  # as if two lines had been lost
    said = succeed(corpus, *flags, "--steps", "5", "--resume", "auto")
    assert f"{metrics}: has no line for 2 of the 4 steps before the checkpoint" in said
    assert [row["step"] for row in records(folder)] == [1, 2, 5]


def test_a_folder_whose_run_ended_in_its_first_steps_may_be_used_again(corpus, tmp_path):
    """Such a run leaves train.yaml, config.json and at most one line of metrics. A second step counts as a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.yaml").write_text("global_slices: 1\n")
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).touch()
    assert "1 step of 256 bytes" in succeed(corpus, "--steps", "1", "--save-dir", str(folder))
    assert "holds a run already" in refused(corpus, "--steps", "1", "--save-dir", str(folder))
    shutil.rmtree(folder / "checkpoints")
    succeed(corpus, "--steps", "2", "--save-dir", str(folder))
    assert [record["step"] for record in records(folder)] == [1, 2]
    shutil.rmtree(folder / "checkpoints")
    assert "holds a run already" in refused(corpus, "--steps", "1", "--save-dir", str(folder))


@pytest.mark.parametrize(
    "name, metrics",
    [
        ("config.json", None),
        ("config.json", ""),
        ("config.json", '{"step": 1}\n'),
        ("train.yaml", None),
        ("plots.html", None),
        ("plots.png", None),
        ("cuts", None),
    ],
)
def test_files_of_others_are_not_replaced(corpus, tmp_path, name, metrics):
    """Also beside metrics, which other programs write as well."""
    (tmp_path / name).write_text("mine")
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    for more in [], ["--resume", "auto"]:
        said = refused(corpus, "--steps", "1", "--save-dir", str(tmp_path), *more)
        assert name in said and ("which a run would replace" in said or more and name == "train.yaml"), said
    assert (tmp_path / name).read_text() == "mine"


def test_a_checkpoint_of_another_model_file_is_named(corpus, undisturbed, tmp_path, caplog):
    """By a run that resumes and by whoever loads its weights. The run has copies of its model files."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    code = checkpoint.model_code()
    for name in ("hnet_trainable", "hnet_routers", "hnet_config"):
        assert (folder / f"{name}-{code[f'{name}.py']}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()
    load(folder)
    assert "fingerprint" not in caplog.text
    saved = newest(folder)
    about, digests = saved / "train.json", saved / "sha256.json"
    before, text = hashlib.sha256(about.read_bytes()).hexdigest(), about.read_text()
    for name in ("hnet_kernels", "hnet_trainable.py"):
        text = text.replace(code[name], "0" * 12)
    about.write_text(text)
    digests.write_text(digests.read_text().replace(before, hashlib.sha256(about.read_bytes()).hexdigest()))
    load(folder)
    changed = [
        f"{name} (fingerprint 000000000000, here {code[name]})" for name in ("hnet_kernels", "hnet_trainable.py")
    ]
    assert f"{saved} was written with another {' and '.join(changed)}: what follows" in caplog.text
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / "manifest.json").unlink()
    load(copy)  # as it is
    flags = ["--steps", "20", "--val-every", "10", "--save-dir", str(folder), "--resume", "auto"]
    assert "the run uses the files as they are now" in succeed(corpus, *flags)


def test_a_checkpoint_with_other_weights_than_the_model_is_explained(undisturbed, tmp_path):
    saved, config = newest(undisturbed), HNetConfig.load(newest(undisturbed) / "config.json")
    more, fewer = HNetLM(config), HNetLM(config)
    more.gain = torch.nn.Parameter(torch.ones(1))
    del fewer.lm_head
    lacks, has = r"lacks weights of the model .*\(gain\)", r"has weights that the model lacks .*\(lm_head.weight\)"
    for model, said in ((more, lacks), (fewer, has)):
        with pytest.raises(UserError, match=said):
            checkpoint.load(saved, model, None)


def test_resuming_where_no_checkpoint_is_starts_a_run_and_says_so(corpus, tmp_path):
    said = succeed(corpus, "--steps", "1", "--save-dir", str(tmp_path / "run"), "--resume", "auto")
    assert f"no checkpoint in {tmp_path}/run: a new run starts\n" in said


def test_the_time_left_is_that_of_the_steps():
    """A validation, a sample and a save take time between steps, which `step_ms` does not contain."""
    config, hnet = read_config(["--steps", "140", "--log-every", "20"]), HNetConfig.load(MODEL)
    config.global_slices, progress = 1, Progress(hnet, config, 0)
    numbers = {"bpb": 3.0, "lr": 1e-3, "grad_norm": 1.0, "stage0_ratio_loss": 1.0, "stage0_F": 0.2, "step_ms": 1000.0}
    assert "ETA 2:19" in progress.add(1, numbers)
    lines = [progress.add(step, numbers | {"step_ms": 2000.0}) for step in range(2, 21)]
    assert lines[:-1] == [None] * 18 and "ETA 4:00" in lines[-1]
    assert "ETA 1:59" in progress.add(21, numbers | {"val_bpb": 2.5})


@pytest.mark.parametrize(
    "cores, load, threads",
    [(2, 0.3, 2), (2, 1.0, 1), (2, 1.4, 1), (2, 5.1, 1), (1, 3.0, 1), (16, 7.9, 16), (16, 9.2, 7), (16, 40.0, 1)],
)
def test_a_busy_cpu_gets_a_thread_for_each_free_core(cores, load, threads):
    assert cpu.threads_beside(cores, load) == threads


@pytest.mark.parametrize("variable, average, threads", [("", 500.0, 1), ("", 0.0, 3), ("3", 500.0, 3)])
def test_threads_are_lowered_only_without_the_variable(monkeypatch, caplog, variable, average, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (average, average, average))
    monkeypatch.setattr(cpu, "running_beside", lambda: average)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with caplog.at_level("INFO"):
            cpu.share_cores()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    said = "4 CPU cores, load 500.0 by other programs: 1 thread; OMP_NUM_THREADS=3 asks for more"
    assert caplog.messages == [said] * (threads == 1)


def test_a_yaml_file_gives_flags_and_flags_win(corpus, tmp_path):
    (tmp_path / "run.yaml").write_text(f"steps: 7\nweight_decay: 0.3\nsave_dir: {tmp_path}/run\nmbs: 128\n")
    succeed(corpus, "--config-file", str(tmp_path / "run.yaml"), "--steps", "2")
    rows = records(tmp_path / "run")
    assert len(rows) == 2 and rows[-1]["bytes_seen"] == 2 * 256  # --mbs 256 is on the command line
    assert "weight_decay: 0.3" in (tmp_path / "run" / "train.yaml").read_text()


def test_dumpparams_lists_every_parameter(corpus):
    output = succeed(corpus, "-e", "dumpparams")
    assert "backbone.encoder.layers.0.mixer.A_log" in output and "no decay" in output and "lr x 3.0" in output


def test_lovely_tensors_summaries_are_asked_for_by_the_environment(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("LOVELY_TENSORS", "1")
    (tmp_path / "lovely_tensors.py").write_text("lovely = lambda t: f'lovely {t.numel()}'")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert f"lovely {256 * 32}" in succeed(corpus, "-e", "dumpparams")
    (tmp_path / "lovely_tensors.py").write_text("raise ImportError")
    assert "not installed" in succeed(corpus, "-e", "dumpparams")


def test_the_equivalence_check_as_a_command(corpus, undisturbed):
    assert "are one model" in succeed(corpus, "-e", "generate")
    assert "are one model" in succeed(corpus, "-e", "generate", "-p", str(undisturbed))


def test_fine_tuning_starts_from_a_checkpoint_of_any_kind(corpus, undisturbed, tmp_path):
    export = [sys.executable, str(ROOT / "scripts" / "export.py"), str(undisturbed), str(tmp_path / "e")]
    subprocess.run(export, check=True, capture_output=True, env=environment(), timeout=60)
    official, safetensors = (next((tmp_path / "e").rglob(f"*.{form}")) for form in ("pt", "safetensors"))
    last = records(undisturbed)[-1]["val_bpb"]
    for i, weights in enumerate((undisturbed, official, safetensors)):
        folder = tmp_path / f"tuned{i}"
        succeed(corpus, "--steps", "1", "--lr", "1e-12", "-p", str(weights), "--save-dir", str(folder))
        assert records(folder)[-1]["val_bpb"] == pytest.approx(last, abs=1e-6)


def test_evaluate_gives_the_validation_of_training(corpus, undisturbed, tmp_path):
    """On two processes, the run's last val_bpb, with other rows per batch than in training."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += [str(ROOT / "scripts" / "evaluate.py"), str(undisturbed), "--device", "cpu", "--batch", "3"]
    launch += ["--out", str(tmp_path / "out")]
    done = subprocess.run(launch, cwd=corpus, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    result, last = json.loads((tmp_path / "out.json").read_text())["text"], records(undisturbed)[-1]
    assert result["bpb"] == pytest.approx(last["val_bpb"], abs=1e-4) and result["bytes"] == last["val_bytes"]
    for groups, key in (("by_position", "val_bpb_at"), ("by_length", "val_bpb_le")):
        ends = {f"{key}_{name.split('to ')[-1].replace(',', '')}": row["bpb"] for name, row in result[groups].items()}
        assert ends == pytest.approx({name: x for name, x in last.items() if name.startswith(key)}, abs=1e-4), groups


def test_samples_are_printed_and_logged(corpus, tmp_path):
    flags = ["--steps", "4", "--sample-every", "2", "--sample-bytes", "30", "--prompt", "the ", "--save-dir"]
    output = succeed(corpus, *flags, str(tmp_path / "run"))
    assert output.count("the model writes") == 2
    rows = records(tmp_path / "run")
    assert [row["step"] for row in rows if "sample" in row] == [2, 4]
    assert rows[-1]["sample"].replace("|", "").startswith("the ")


def test_a_sample_that_cannot_be_made_costs_no_step(corpus, tmp_path):
    """A warning stands in its place; metrics and checkpoint of the step are written."""
    program = "import runpy, sys\nfrom hnet_runtime.runs import progress\n"
    program += "def generate(*_, **__): raise MemoryError('out of memory\\n(a detail)')\n"
    program += "progress.generate = generate\nrunpy.run_path(sys.argv.pop(0) and sys.argv[0], run_name='__main__')"
    flags = ["--steps", "2", "--save-dir", str(tmp_path / "run")]
    argv = [sys.executable, "-c", program, *command(corpus, *flags)[1:]]
    more = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=corpus, env=environment() | more, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "no sample: it can't be made (out of memory)\n" in done.stdout, done.stderr
    assert [row["step"] for row in records(tmp_path / "run")] == [1, 2]
    assert newest(tmp_path / "run").name == "step_00000002"


@pytest.mark.parametrize("taken", ["cuts", "cuts/step_00000002.npz", "cuts/step_00000009.npz"])
def test_a_run_goes_on_where_cuts_cannot_be_stored(corpus, tmp_path, taken):
    """A file in place of the folder, a folder in place of a file, and one in place of a later file."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.yaml").write_text("global_slices: 1\n")  # of a run that ended in its first step
    (folder / taken).write_text("mine") if taken == "cuts" else (folder / taken).mkdir(parents=True)
    done = run(corpus, "--steps", "3", "--val-every", "2", "--save-dir", str(folder))
    assert done.returncode == 0 and newest(folder).name == "step_00000003", done.stderr
    said = "the next validation does not say how many cuts have moved"
    assert (said in done.stdout) == (taken != "cuts/step_00000009.npz") and len(records(folder)) == 3


def test_a_folder_in_place_of_a_file_of_the_run_is_named(corpus, tmp_path):
    folder = tmp_path / "run"
    (folder / "config.json").mkdir(parents=True)
    (folder / "train.yaml").write_text("global_slices: 1\n")
    said = refused(corpus, "--steps", "1", "--save-dir", str(folder))
    assert f"{folder}/config.json: can't be written (Is a directory)" in said


def test_curves_in_wandb_go_by_steps_of_our_own(tmp_path, monkeypatch):
    """wandb drops records whose step does not increase, and a resumed run repeats steps."""
    logged, metrics, ids = [], {}, []
    run = SimpleNamespace(
        define_metric=lambda name, step_metric=None: metrics.update({name: step_metric}),
        log=lambda values, step=None: logged.append((values["step"], step)),
        finish=lambda: None,
    )
    wandb = SimpleNamespace(Settings=dict, Table=None, Html=None)
    wandb.init = lambda **keywords: ids.append(keywords["id"]) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first, steps in ((0, range(1, 9)), (5, range(6, 11))):
        sink = WandbSink(tmp_path, first, {})
        for step in steps:
            sink.log(step, {"bpb": 1.0})
        time.sleep(0.02)  # a start takes longer
    assert metrics == {"step": None, "*": "step"} and ids[0] == ids[1]
    assert [step for step, _ in logged] == [*range(1, 9), *range(6, 11)]
    own = [step for _, step in logged]
    assert all(a < b for a, b in zip(own, own[1:]))
    WandbSink(tmp_path, 0, {})
    assert ids[2] != ids[0], "what starts over has curves of its own"


def test_wandb_offline(corpus, tmp_path):
    pytest.importorskip("wandb")
    os.environ["WANDB_MODE"] = "offline"
    try:
        succeed(corpus, "--steps", "2", "-l", "wandb", "--save-dir", str(tmp_path / "run"))
        succeed(corpus, "--steps", "3", "-l", "wandb", "--save-dir", str(tmp_path / "run"), "--resume", "auto")
    finally:
        del os.environ["WANDB_MODE"]
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
    assert len({p.name.split("-")[-1] for p in (tmp_path / "run" / "wandb").glob("offline-run-*")}) == 1


def test_wandb_that_cannot_start_is_named(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(UserError, match="--logger wandb: can't start"):
        WandbSink(tmp_path, 0, {})


@pytest.mark.soak
def test_wandb_without_a_network_goes_on_offline(corpus, tmp_path, monkeypatch):
    """Waits half a minute for a server that doesn't exist, then continues offline."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "logged offline" in succeed(corpus, "--steps", "2", "-l", "wandb", "--save-dir", str(tmp_path / "run"))
    assert len(records(tmp_path / "run")) == 2
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 1


def test_tensorboard(corpus, tmp_path):
    pytest.importorskip("tensorboard")
    succeed(corpus, "--steps", "2", "-l", "tensorboard", "--save-dir", str(tmp_path / "run"))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


GB = 10**9


@pytest.mark.parametrize(
    "changed, taken, copies",
    [
        ({}, True, 1),
        ({"size": 2}, True, 2),
        ({"size": 2, "replicate": 1}, False, 1),
        ({"size": 2, "memory": 5 * GB}, False, 1),  # 214 million parameters, 14 bytes each: 3.0 GB
        ({"size": 8, "memory": 5 * GB}, True, 8),  # 11 bytes: 2.4 GB
        ({"ac": "block"}, True, 1),
        ({"size": 2, "max_chunks_per_rank": 5000}, False, 1),
        ({"size": 2, "device": "cpu"}, False, 1),
        ({"size": 2, "device": "cpu", "compile": "graph"}, True, 2),
    ],
    ids=[
        "alone",
        "two",
        "told to cut",
        "too large",
        "shared by more",
        "recomputing",
        "guarded",
        "on a CPU",
        "asked for",
    ],
)
def test_graphs_and_replicas_are_used_where_possible(monkeypatch, changed, taken, copies):
    """Imitates a GPU that graphs support."""
    changed = dict(changed)
    memory = changed.pop("memory", 80 * GB)
    device, size = torch.device(changed.pop("device", "cuda")), changed.pop("size", 1)
    monkeypatch.setattr(train.graphs, "why_unsupported", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
    monkeypatch.setattr(distributed, "make_mesh", lambda kind, size, replicate: SimpleNamespace(copies=replicate))
    monkeypatch.setattr(distributed, "anywhere", lambda world, *flags: list(flags))  # there is one process

    class One(distributed.World):
        shards = property(lambda self: self.size // self.mesh.copies)

    hnet = train.HNetConfig.load(ROOT / "configs" / "hnet_1stage_small.json")
    world = One(0, size, device, SimpleNamespace(copies=1))
    found, world = train.takes_graphs(train.TrainConfig(**changed), hnet, torch.bfloat16, world)
    assert (found, world.mesh.copies) == (taken, copies)


def test_compilations_are_counted_and_cached(tmp_path, monkeypatch):
    """Triton can compile for a GPU that the machine doesn't have."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from hnet_kernels.norm_triton import _sum_rows

    if not hasattr(_sum_rows, "arg_names"):
        pytest.skip("under Triton's interpreter nothing is compiled")
    counted = Compilations(on_gpu=True)
    types = {
        "parts_ptr": "*fp32",
        "sum_ptr": "*fp32",
        "N": "i32",
        "D": "i32",
        "K": "i32",
        "W": "i32",
        "ROWS": "constexpr",
        "BLOCK_D": "constexpr",
    }
    for _ in range(2):
        source = ASTSource(fn=_sum_rows, signature=types, constexprs={"ROWS": 64, "BLOCK_D": 32})
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert (counted.new, counted.cached) == (1, 1) and 0 < counted.seconds < 100
    assert str(counted).endswith("s for 1 kernels compiled and 1 from Triton's cache")


def test_a_full_gpu_is_told_with_flags_that_there_are():
    said = in_words(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 76.00 MiB."))
    assert "memory is full" in said and "\n" not in said
    flags = {word.removeprefix("--").replace("-", "_") for word in said.replace(",", "").split() if word[:2] == "--"}
    assert flags == {"mbs", "global_slices", "ac"}
    assert flags <= set(vars(train.TrainConfig()))
