"""Trains different architectures with equal FLOPs on equal text, and compares them: docs/STUDY.md.

    python benchmarks/study.py --data DIR --plan            # the runs, their FLOPs and time; needs no GPU
    python benchmarks/study.py --data DIR --out FOLDER --gpus 2 --seconds 500
    python benchmarks/study.py --out FOLDER --tables --page docs/STUDY.md    # the tables of what is there
    python benchmarks/study.py --data data/stdlib --device cpu --config hnet_1stage_tiny --config2 hnet_2stage_tiny \\
        --mbs 1024 --bytes 4e5 --lr-bytes 1e5 --pilot-steps 20 --out FOLDER       # tried on a CPU

The same command starts and resumes it. A finished run is one line of FOLDER/results.jsonl; what is there is not run
again. No run starts that would not end within --seconds. Three phases follow each other:

    pilot   some steps of the learned routers, for the rates of chunks with which FLOPs are matched
    lr      for each architecture, one run of --lr-bytes with each of --lrs; the best one is used in main
    main    all architectures and seeds, --bytes each; a seed also sets the order of the text, so it is the same for all
"""

import base64
import functools
import gc
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from hnet_config import ConfigError, HNetConfig  # noqa: E402 (run from anywhere)
from hnet_runtime import DataError, RunFailed, UserError  # noqa: E402
from hnet_runtime.commands import parse, run  # noqa: E402

LEARNED, LEARNED2, STRIDE, SPACE = "learned", "learned2", "stride", "space"
ARCHITECTURES = {  # name -> what it is, in words
    LEARNED: "learned, one stage",
    LEARNED2: "learned, two stages",
    STRIDE: "every K-th byte",
    SPACE: "where spacelike bytes begin (SpaceByte's rule)",
    "transformer": "byte Transformer without chunks",
    "mamba": "byte Mamba-2 without chunks",
}
LETTERS = {"transformer": "T", "mamba": "m"}
PHASES = ("pilot", "lr", "main")
# before a run has measured it: FLOPs per second, and seconds from a run's start to its first step, first and later
SPEED = {"cuda": 2.5e14, "cpu": 2e10}
START = {"cuda": (60.0, 20.0), "cpu": (15.0, 10.0)}
# flags of train.py that the study sets
OF_THE_STUDY = {
    "config", "config-file", "pt-ckpt", "n-compression", "data", "mbs", "max-doc", "device", "global-slices", "seed",
    "lr", "steps", "val-every", "val-slices", "sample-bytes", "save-every", "save-dir", "resume", "stats-every",
    "log-every", "early-exit",
}  # fmt: skip
OF_ROUTERS = {"ratio-form", "ratio-from", "ratio-rise", "router-lr"}
MARGIN = 1.15  # a run is taken to need this many times its estimate
TEXT_BYTES = 2048  # of each document of the robustness measurement


@dataclass
class Study:
    """Which runs to make."""

    data: str = "data/stdlib"
    """Folder made by `fineweb.py prepare`, with held-out text."""
    out: str = "runs/study"
    """Folder of the results; runs write into it, too, and are removed when their line is written."""
    config: str = "hnet_1stage_small"
    """The reference: a config with one learned stage. The FLOPs per byte of all others are matched to it."""
    config2: str = "hnet_2stage_small"
    """The config with two learned stages."""
    architectures: str = ",".join(ARCHITECTURES)
    """Which ones, separated by commas; the reference, learned, is always there."""
    phases: str = ",".join(PHASES)
    """Which phases, separated by commas."""
    bytes: float = 90e6
    """Bytes of each run of the main phase."""
    lr_bytes: float = 30e6
    """Bytes of each run of the lr phase."""
    pilot_steps: int = 300
    """Steps of a pilot run."""
    seeds: int = 3
    """Seeds of each architecture."""
    reference_seeds: int = 5
    """Seeds of the reference, which tell how far seeds differ."""
    tolerance: float = 0.03
    """How far FLOPs per byte may differ from the reference's."""
    lrs: str = "1.5e-4,3e-4,6.25e-4"
    """Learning rates of the lr phase, separated by commas."""
    lr: float = 3e-4
    """Learning rate of the pilot, and of the main phase where the lr phase has no result."""
    rates: str = ""
    """Rates of chunks in place of a pilot: learned:0.18 learned2:0.34,0.31."""
    mbs: int = 32768
    """Bytes per step, in one slice."""
    max_doc: int = 8192
    """Longest row."""
    flags: str = "alpha=0.03 schedule=wsd decay=0.2"
    """More flags of train.py for every run, without their dashes, such as "alpha=0.2 router-lr=0.5". Those of routers
    are left out for architectures without a learned one."""
    gpus: int = 1
    """Runs side by side, each on a GPU of its own. With CUDA_VISIBLE_DEVICES=0,0 two share one, and have no speeds."""
    seconds: float = 0
    """Start no run that would not end within so many seconds. 0: no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device, as in train.py."""
    val_slices: int = 0
    """Held-out slices to score; 0: all."""
    robust_texts: int = 40
    """Held-out documents that are scored with perturbations; 0: none."""
    choices: str = ""
    """A .jsonl file of questions in the HellaSwag format: also measures accuracy and its robustness."""
    page: str = ""
    """Markdown page in which the tables replace what is between <!-- study --> and <!-- end -->."""
    plan: bool = False
    """Print the runs with their FLOPs and estimated time, and stop."""
    tables: bool = False
    """Write the tables of the results so far, and stop."""

    def check(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a finite number")
        for name in ("bytes", "lr_bytes", "lr", "mbs", "max_doc", "pilot_steps", "seeds", "reference_seeds", "gpus"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected more than 0")
        for name in ("seconds", "val_slices", "robust_texts"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 or more")
        for flag, names, known in (
            ("--architectures", self.names, list(ARCHITECTURES)),
            ("--phases", self.phases.split(","), list(PHASES)),
        ):
            if unknown := [name for name in names if name not in known]:
                raise UserError(f"{flag} {unknown[0]}: expected names of {', '.join(known)}")
        if not 0 < self.tolerance < 1:
            raise UserError(f"--tolerance {self.tolerance}: expected a share between 0 and 1, such as 0.03")
        self.check_train_flags()
        self.learning_rates()
        self.given_rates()

    @property
    def names(self) -> list[str]:
        """The architectures, the reference first."""
        given = [name.strip() for name in self.architectures.split(",") if name.strip()]
        return list(dict.fromkeys([LEARNED, *given]))

    def train_flags(self, learns: bool = True) -> list[str]:
        """--flags as train.py takes them for a model with a router that learns, or without one."""
        found = []
        for part in self.flags.split():
            name, equals, value = part.partition("=")
            if not equals or name.startswith("-"):
                raise UserError(f"--flags {part}: expected name=value, such as alpha=0.2")
            if name.replace("_", "-") in OF_THE_STUDY:
                raise UserError(f"--flags {part}: the study sets this flag itself; expected another")
            if learns or name.replace("_", "-") not in OF_ROUTERS:
                found += [f"--{name}", value]
        return found

    def check_train_flags(self) -> None:
        """Raises UserError for flags in --flags that train.py would refuse."""
        from hnet_runtime.runs.flags import read_config

        given = self.train_flags()
        try:
            read_config(given)
        except UserError as error:
            raise UserError(f"--flags {self.flags}: {error}") from None

    def check_inputs(self) -> None:
        """Raises UserError for what the runs would need only later: a device, questions, a page for the tables."""
        from hnet_runtime import distributed
        from hnet_runtime.evaluation import choices

        if not visible_gpus():
            distributed.require_device(self.device)
        if self.choices:
            choices.read_questions(self.choices)
        if self.page:
            parts_of_page(Path(self.page), "study")

    def learning_rates(self) -> list[float]:
        try:
            found = [float(lr) for lr in self.lrs.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < lr < math.inf for lr in found):
            raise UserError(f"--lrs {self.lrs}: expected numbers above 0, separated by commas")
        return found

    def given_rates(self) -> dict[str, list[float]]:
        found = {}
        for part in self.rates.split():
            name, _, numbers = part.partition(":")
            try:
                found[name] = [float(rate) for rate in numbers.split(",")]
            except ValueError:
                found[name] = []
            wanted = {LEARNED: 1, LEARNED2: 2}.get(name)
            if len(found[name]) != wanted or not all(0 < rate <= 1 for rate in found[name]):
                raise UserError(f"--rates {part}: expected learned:RATE or learned2:RATE,RATE, shares of tokens")
        return found


class Task(NamedTuple):
    """A run to make."""

    key: str
    phase: str
    architecture: str
    seed: int
    lr: float
    steps: int
    config: dict[str, Any]
    rates: list[float]  # of chunks, as planned
    flops_per_byte: float  # as planned
    flags: list[str]  # of train.py


# ------------------------------------------------------------------------------------------------------------- results


class Results:
    """The finished runs, one line each. A last line that a crash cut off is dropped."""

    def __init__(self, folder: Path):
        self.file = folder / "results.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        if not self.file.exists():
            return
        try:
            *lines, torn = self.file.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"{self.file}: can't be read ({error.strerror})") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode())
                self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.file}, line {number}: expected the result of a run") from None
        if torn:
            with open(self.file, "r+b") as f:
                f.truncate(self.file.stat().st_size - len(torn))

    def require(self) -> None:
        """Raises UserError if there are none."""
        if not self.rows:
            raise UserError(
                f"--out {self.file.parent}: has no results.jsonl with results; expected the folder of a study"
            )

    def add(self, row: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.rows[row["key"]] = row

    @property
    def good(self) -> list[dict[str, Any]]:
        """Those of runs that reached their last step."""
        return [row for row in self.rows.values() if "failed" not in row]

    def of(self, phase: str, architecture: str) -> list[dict[str, Any]]:
        return [row for row in self.good if (row["phase"], row["architecture"]) == (phase, architecture)]

    def has(self, key: str) -> bool:
        """Whether a run was made, in any phase: a key begins with the phase, and the rest says what the run is."""
        return key.partition("/")[2] in {one.partition("/")[2] for one in self.rows}


# ---------------------------------------------------------------------------------------------------------------- plan


class Plan:
    """What there is to run, given the results so far."""

    def __init__(self, study: Study, results: Results):
        import fineweb
        from hnet_runtime import matching

        self.study, self.results, self.matching = study, results, matching
        self.reference, self.second = HNetConfig.load(study.config), HNetConfig.load(study.config2)
        for config, flag, stages in ((self.reference, "--config", 1), (self.second, "--config2", 2)):
            if config.num_stages != stages:
                raise UserError(f"{flag}: has {config.num_stages} chunking stages; expected {stages}")
        sizes = {"slice_bytes": study.mbs, "max_doc": study.max_doc}
        self.stream = fineweb.ByteStream(study.data, "train", **sizes)
        self.stream.require(study.mbs)
        if fineweb.validation_stream(study.data, **sizes) is None:
            raise DataError(f"{study.data}: has no held-out text; expected a folder prepared with some")
        self.rows, self.text = matching.row_lengths(self.stream), self.stream.fingerprint
        self._configs: dict[str, tuple[HNetConfig, list[float]]] = {}

    def tasks(self, phase: str) -> list[Task]:
        """All runs of a phase, done or not. Those of a later phase depend on the results of earlier ones."""
        study = self.study
        if phase == "pilot":
            given = study.given_rates()
            names = [name for name in study.names if name in (LEARNED, LEARNED2) and name not in given]
            known = {LEARNED: self.reference, LEARNED2: self.second}
            return [self._task(phase, name, 0, study.lr, study.pilot_steps, known[name]) for name in names]
        if phase == "lr":
            steps = max(1, round(study.lr_bytes / study.mbs))
            return [
                self._task(phase, name, 0, lr, steps, self.config_of(name)[0])
                for lr in study.learning_rates()
                for name in study.names
            ]
        steps = max(1, round(study.bytes / study.mbs))
        return [
            self._task(phase, name, seed, self.best_lr(name), steps, self.config_of(name)[0])
            for seed in range(max(study.seeds, study.reference_seeds))
            for name in study.names
            if seed < (study.reference_seeds if name == LEARNED else study.seeds)
        ]

    def pending(self, phase: str) -> list[Task]:
        return [task for task in self.tasks(phase) if not self.results.has(task.key)]

    def rates_of(self, name: str) -> list[float]:
        """The rates of chunks of a learned architecture: given, or of the pilot, or the targets."""
        if given := self.study.given_rates().get(name):
            return given
        config = {LEARNED: self.reference, LEARNED2: self.second}[name]
        pilots = [r for r in self.results.of("pilot", name) if r["steps"] == self.study.pilot_steps]
        if pilots := [r for r in pilots if r["text"]["train"] == self.text]:
            return pilots[-1]["rates"]
        return self.matching.planned_rates(config)

    def best_lr(self, name: str) -> float:
        """The learning rate with the fewest bits per byte in the lr phase, or --lr."""
        from study_tables import rates_compared

        steps = max(1, round(self.study.lr_bytes / self.study.mbs))
        rows = [
            row
            for row in rates_compared([row for row in self.results.good if row["text"]["train"] == self.text])
            if (row["architecture"], row["steps"]) == (name, steps)
        ]
        return min(rows, key=lambda row: row["val_bpb"])["lr"] if rows else self.study.lr

    def config_of(self, name: str) -> tuple[HNetConfig, list[float]]:
        """The config of an architecture, matched to the reference, and its rates of chunks."""
        rates = self.rates_of(LEARNED)
        key = json.dumps([name, rates, self.rates_of(LEARNED2) if name == LEARNED2 else []])
        if key not in self._configs:
            self._configs[key] = self._matched(name, rates)
        return self._configs[key]

    def _matched(self, name: str, rates: list[float]) -> tuple[HNetConfig, list[float]]:
        from hnet_runtime.data.cuts import with_measured_rate

        if name == LEARNED:
            return self.reference, rates
        target = self.matching.flops_per_byte(self.reference, self.rows, rates)
        off = self.study.tolerance
        if name in LETTERS:
            return self.matching.isotropic(LETTERS[name], target, self.rows, self.reference, off), []
        if name == LEARNED2:
            config, rates = self.second, self.rates_of(LEARNED2)
        elif name == STRIDE:
            K = max(2, round(1 / rates[0]))
            config, rates = self._with_router(f"stride:{K}", K), [1 / K]
        else:
            config, _ = with_measured_rate(self._with_router("space", 6), self.stream)
            rates = self.matching.planned_rates(config)
        return self.matching.match(config, target, self.rows, rates, off), rates

    def _with_router(self, router: str, N: float) -> HNetConfig:
        return HNetConfig.load(self.reference.to_dict(), routers=[router], N_compress=[1, N])

    def _task(self, phase: str, name: str, seed: int, lr: float, steps: int, config: HNetConfig) -> Task:
        study = self.study
        rates = self.rates_of(name) if name in (LEARNED, LEARNED2) else self.config_of(name)[1]
        flags = ["--data", study.data, "--mbs", str(study.mbs), "--max-doc", str(study.max_doc), "--device"]
        flags += [
            study.device,
            *study.train_flags(name in (LEARNED, LEARNED2)),
            "--global-slices",
            "1",
            "--seed",
            str(seed),
            "--lr",
            f"{lr:g}",
        ]
        flags += ["--steps", str(steps), "--val-every", "0", "--val-slices", "1", "--sample-bytes", "0", "--save-every"]
        flags += ["0", "--stats-every", "0", "--log-every", str(max(1, steps // 4))]
        what = [config.to_dict(), flags[6:], study.max_doc, study.mbs, self.text]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]
        key = f"{phase}/{name}/lr{lr:g}/seed{seed}/{steps * study.mbs / 1e6:.3g}MB/{digest}"
        planned = self.matching.flops_per_byte(config, self.rows, rates)
        return Task(key, phase, name, seed, lr, steps, config.to_dict(), rates, planned, flags)

    def estimate(self, task: Task, is_first: bool, kind: str) -> float:
        """Seconds that a run will take. is_first: of its process, which compiles kernels."""
        total = task.steps * self.study.mbs
        done = self.results.good
        rates = [r["bytes_per_s"] for r in done if r["architecture"] == task.architecture]
        rates = rates or [r["bytes_per_s"] * r["flops_per_byte"] / task.flops_per_byte for r in done]
        speed = statistics.median(rates) if rates else SPEED[kind] / task.flops_per_byte
        starts = [r["start_s"] for r in done if r["is_first"] == is_first]
        start = statistics.median(starts) if starts else START[kind][0 if is_first else 1]
        return start + total / speed


# ---------------------------------------------------------------------------------------------------------------- runs


class Runner:
    """Makes runs one after the other in one process, which imports and compiles once."""

    def __init__(self, study: Study):
        self.study, self.made = study, 0
        self.checked: set[str] = set()  # configs whose steps as graphs were checked in this process

    def make(self, task: Task) -> dict[str, Any]:
        """The result of a run. Raises UserError for a mistake, which is no result of the run."""
        import torch

        import train
        from hnet_runtime.runs.flags import read_config
        from hnet_runtime.runs.metrics import read_metrics

        began, is_first = time.perf_counter(), not self.made
        folder = Path(self.study.out) / "runs" / task.key.replace("/", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        config_file = Path(f"{folder}.json")
        config_file.write_text(json.dumps(task.config), encoding="utf-8")
        flags = read_config([*task.flags, "-c", str(config_file), "--save-dir", str(folder)])
        same = json.dumps(task.config, sort_keys=True)  # the checks depend on no flag that differs between runs
        found: dict[str, Any] = {}
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()

        def then(finished: train.Run) -> None:
            found["trained_s"] = time.perf_counter() - began
            found.update(measure(finished, self.study))

        try:
            train.train(flags, then, is_checked=same in self.checked)
        except RunFailed as error:  # a result, too
            self.clean(folder)
            return {"failed": str(error), "seconds": time.perf_counter() - began}
        if not found:
            raise UserError(f"{task.key}: was asked to stop before its last step; the same command resumes the study")
        self.checked.add(same)
        records = read_metrics(folder / "metrics.jsonl")
        stages = len(task.rates)
        step_ms = statistics.median(r["step_ms"] for r in records[len(records) // 2 :])
        speed = flags.mbs / step_ms * 1000
        from hnet_runtime import matching

        found["rates"] = matching.seen_rates(records, stages)
        found["validations"] = [
            {k: v for k, v in r.items() if k == "step" or k.startswith("val_")} for r in records if "val_bytes" in r
        ]
        found["bpb_curve"] = [[r["step"], round(r["bpb"], 4)] for r in records[:: max(1, len(records) // 100)]]
        found |= {"bytes_per_s": speed, "step_ms": step_ms, "peak_gib": records[-1].get("peak_gib")}
        found["mfu"] = statistics.median(r["mfu"] or 0 for r in records[len(records) // 2 :]) or None
        found["train_bytes"] = task.steps * flags.mbs
        found["start_s"] = max(0.0, time.perf_counter() - began - found["train_bytes"] / speed)
        self.clean(folder)
        self.made += 1
        found["seconds"] = time.perf_counter() - began
        return found | {"is_first": is_first}

    def clean(self, folder: Path) -> None:
        """Frees what a run leaves in memory and on disk."""
        import torch

        shutil.rmtree(folder, ignore_errors=True)
        Path(f"{folder}.json").unlink(missing_ok=True)
        gc.unfreeze()  # train.py freezes what lives after its first step; this run is over
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(finished: Any, study: Study) -> dict[str, Any]:
    """What the study reports of a trained model, on held-out text."""
    import numpy as np
    import torch

    from hnet_runtime.evaluation import boundaries, choices, scoring

    run_, model = finished, finished.state.evaluated
    run_.state.steps.free_memory()
    rows = scoring.training_rows(run_.val_stream, study.val_slices or None)
    tallies, counts = scoring.tally_with_cuts(model, rows, 16, run_.world)
    numbers = scoring.ratio(list(tallies.values()))
    nats = np.array([t.nats for t in tallies.values()], "<f8")
    sizes = np.array([t.bytes for t in tallies.values()], "<i4")
    found: dict[str, Any] = {"val_bpb": numbers["bpb"], "val_documents": numbers["documents"]}
    found |= {"val_bytes": numbers["bytes"], "document_nats": packed(nats), "document_bytes": packed(sizes)}
    found["cuts"] = boundaries.summary(counts)
    found["text"] = {"train": run_.train_stream.fingerprint, "validation": run_.val_stream.fingerprint}
    found["epochs"] = run_.config.steps * run_.config.mbs / run_.train_stream.pairs_per_epoch
    found["parameters"] = sum(p.numel() for p in run_.state.parameters)
    found["perturbed_bpb"] = perturbed_bits(model, run_.val_stream, run_.world, study.robust_texts)
    if study.choices:
        questions = choices.read_questions(study.choices)
        found["choices"] = choices.robustness(scoring.Likelihoods(model), questions)
    kind = run_.world.device.type
    found |= {"device": kind, "torch": torch.__version__}
    return found


def perturbed_bits(model: Any, stream: Any, world: Any, limit: int) -> dict[str, float]:
    """Bits per byte of the beginnings of held-out documents, as they are and with each perturbation of `choices`."""
    import itertools
    import random

    from hnet_runtime.evaluation import choices, scoring

    if not limit:
        return {}
    documents = itertools.islice(scoring.held_out(stream), limit)
    texts = [document.text[:TEXT_BYTES].decode(errors="ignore") for document in documents]
    changes = {"none": lambda text, draw: text} | choices.PERTURBATIONS
    found = {}
    for name, change in changes.items():
        changed = [change(text, random.Random(f"{n} {name}")).encode() for n, text in enumerate(texts)]
        rows = [row for n, text in enumerate(changed) for row in scoring.windows(text, scoring.CONTEXT, 4096, n)]
        found[name] = scoring.ratio(list(scoring.tally(model, rows, 16, world).values()))["bpb"]
    return found


def packed(array: Any) -> str:
    """An array's bytes as text; `study_tables.unpacked` reads it."""
    return base64.b64encode(array.tobytes()).decode()


def about(study: Study) -> dict[str, Any]:
    """When, where and with which code."""
    from ledger import card_name, commit

    return {"date": date.today().isoformat(), "card": card_name(), "commit": commit(ROOT), "mbs": study.mbs}


def result_of(task: Task, found: dict[str, Any], study: Study) -> dict[str, Any]:
    """A line of results.jsonl."""
    planned = {"planned_rates": task.rates, "flops_per_byte": task.flops_per_byte}
    row = task._asdict() | planned | {"train_flags": study.flags} | found
    del row["flags"]
    return row


# ------------------------------------------------------------------------------------------------------------ schedule


def gpus_of(study: Study) -> list[str]:
    """The GPU of each worker, as CUDA_VISIBLE_DEVICES names it; none on a CPU. Raises UserError if they are too few."""
    found = [] if study.device == "cpu" else visible_gpus()
    if 0 < len(found) < study.gpus:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        where = f"CUDA_VISIBLE_DEVICES={named} gives" if named else "this machine has"
        raise UserError(f"--gpus {study.gpus}: {where} {len(found)} GPU{'s' * (len(found) != 1)}")
    return found


def visible_gpus() -> list[str]:
    """The GPUs that exist, as CUDA_VISIBLE_DEVICES names them; one that is named twice is here twice.

    CUDA is not started, so that compile_ahead can still fork. CUDA and torch find no GPU at all where one is named
    twice, and none after one that does not exist.
    """
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = [name.strip() for name in given.split(",") if name.strip()]
    distinct = list(dict.fromkeys(named))
    if named:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(distinct)
    count = torch.cuda.device_count()
    if named:
        os.environ["CUDA_VISIBLE_DEVICES"] = given
    return [name for name in named if name in distinct[:count]] if named else [str(n) for n in range(count)]


def work(study: Study, number: int, link: Connection) -> None:
    """A process that makes the runs which it is sent, on a GPU of its own."""
    shares_gpu = False
    if gpus := gpus_of(study):
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number]
        shares_gpu = gpus[: study.gpus].count(gpus[number]) > 1
    log = open(Path(study.out) / f"worker-{number}.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    sys.stdout = sys.stderr = log
    runner = Runner(study)
    while (task := link.recv()) is not None:
        try:
            found = runner.make(task)
            link.send((task, found | about(study) | {"shares_gpu": shares_gpu}, ""))
        except BaseException as error:  # the others go on
            import traceback

            traceback.print_exc()
            link.send((task, {}, f"{type(error).__name__}: {error}"))
            return
    from hnet_runtime import distributed

    distributed.stop()


def execute(study: Study, plan: Plan, results: Results, began: float) -> int:
    """Makes the runs that are left, as far as time allows. Returns the exit status."""
    kind = device_kind(study)
    left = lambda: study.seconds - (time.perf_counter() - began) if study.seconds else math.inf  # noqa: E731
    pool: dict[Connection, Any] = {}
    made, busy, failed = dict.fromkeys(range(study.gpus), 0), {}, set()
    context = multiprocessing.get_context("spawn")
    idle: list[tuple[Connection, int]] = []
    runner = Runner(study) if study.gpus == 1 else None
    if not runner:
        gpus_of(study)  # too few end it before a process starts
        for n in range(study.gpus):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(study, n, theirs), daemon=True)
            process.start()
            pool[ours] = process
            idle.append((ours, n))

    def report(task: Task, found: dict[str, Any]) -> None:
        if "failed" not in found:
            seen = plan.matching.flops_per_byte(HNetConfig.load(task.config), plan.rows, found["rates"])
            found["flops_seen"] = seen
        results.add(result_of(task, found, study))
        if "failed" in found:
            say(f"{task.key}: failed, {found['failed']}")
            return
        say(
            f"{task.key}: {found['val_bpb']:.4f} bits per byte; {found['seconds']:.0f} s, of which "
            f"{found['start_s']:.0f} s to start and measure; {1 - left() / study.seconds if study.seconds else 0:.0%} "
            "of --seconds used"
        )

    for phase in [phase for phase in PHASES if phase in study.phases.split(",")]:
        while True:
            running = {task.key for task, _, _ in busy.values()}
            todo = [task for task in plan.pending(phase) if task.key not in running | failed]
            fits = [t for t in todo if MARGIN * plan.estimate(t, not min(made.values()), kind) <= left()]
            if runner and fits:
                task = fits[0]
                say(f"{task.key}: starts; {plan.estimate(task, not made[0], kind):.0f} s expected")
                report(task, runner.make(task) | about(study))
                made[0] += 1
                continue
            while idle and fits:
                (link, n), task = idle.pop(0), fits.pop(0)
                say(f"{task.key}: starts on {n}; {plan.estimate(task, not made[n], kind):.0f} s expected")
                link.send(task)
                busy[link] = task, n, time.perf_counter()
            if not busy:
                break
            for link in wait(list(busy)):
                task, n, _ = busy.pop(link)
                try:
                    task, found, mistake = link.recv()
                except EOFError:
                    found, mistake = {}, "its process ended"
                if mistake:
                    failed.add(task.key)
                    say(f"{task.key}: failed, {mistake}; see {study.out}/worker-{n}.log")
                    continue  # its process is gone
                report(task, found)
                made[n] += 1
                idle.append((link, n))
        if pending := plan.pending(phase):
            say(f"{len(pending)} runs of the phase {phase} are left; the same command resumes")
            break
    for link, _ in idle:
        link.send(None)
    for process in pool.values():
        process.join(timeout=30)
    if runner and runner.made:
        from hnet_runtime import distributed

        distributed.stop()
    return 1 if failed else 0


def device_kind(study: Study) -> str:
    return "cuda" if study.device != "cpu" and visible_gpus() else "cpu"


def say(text: str) -> None:
    print(text, flush=True)


def show_plan(study: Study, plan: Plan) -> None:
    """Prints all runs, done or not."""
    kind = "cpu" if study.device == "cpu" else "cuda"
    seconds, started = 0.0, 0
    for phase in [phase for phase in PHASES if phase in study.phases.split(",")]:
        for task in plan.tasks(phase):
            done = plan.results.has(task.key)
            took = plan.estimate(task, started < study.gpus, kind)
            seconds, started = seconds + (0 if done else took), started + (not done)
            total = task.flops_per_byte * task.steps * study.mbs
            config = HNetConfig.load(task.config)
            say(
                f"{'done ' if done else '     '}{task.key:52} {plan.matching.in_words(config):44} "
                f"{config.count_parameters() / 1e6:6.1f}M parameters  {task.flops_per_byte / 1e6:8.2f} MFLOP per byte  "
                f"{total / 1e15:8.3f} PFLOP  {took:5.0f} s"
            )
    say(f"{seconds:.0f} s of runs are left: {seconds / study.gpus:.0f} s with {study.gpus} side by side (estimated)")


def write_tables(study: Study, results: Results) -> None:
    from study_tables import page

    from hnet_runtime.pages.reports import write_atomically

    if results.rows:
        content = page(list(results.rows.values()), ARCHITECTURES, LEARNED)
        write_atomically(Path(study.out) / "study.md", lambda scratch: scratch.write_text(content, encoding="utf-8"))
        say(f"{study.out}/study.md: the tables of {len(results.rows)} runs")
        if study.page:
            write_into(Path(study.page), content)


def parts_of_page(file: Path, mark: str) -> tuple[str, str]:
    """A page up to its mark <!-- `mark` -->, and from <!-- end -->. Raises UserError if it has no such marks."""
    begin, end = f"<!-- {mark} -->\n", "<!-- end -->"
    try:
        before, found, rest = file.read_text(encoding="utf-8").partition(begin)
    except OSError as error:
        raise UserError(f"--page {file}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--page {file}: not UTF-8; expected a Markdown page") from None
    _, last, after = rest.partition(end)
    if not (found and last):
        raise UserError(f"--page {file}: expected the marks <!-- {mark} --> and <!-- end -->, each once")
    return before + begin, end + after


def write_into(file: Path, tables: str, mark: str = "study") -> None:
    """Puts the tables between the marks of a page."""
    from hnet_runtime.pages.reports import write_atomically

    before, after = parts_of_page(file, mark)
    content = f"{before}\n{tables}\n{after}"
    write_atomically(file, lambda scratch: scratch.write_text(content, encoding="utf-8"))


def make_folder(out: str) -> None:
    """Makes the folder of --out. Raises UserError if that is not possible."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: can't be made ({error.strerror}); expected a folder") from None


def main(argv: Sequence[str], began: float | None = None) -> int:
    """began: when the process started, from which --seconds counts."""
    began = began or time.perf_counter()
    study = parse(Study, argv, __doc__)
    study.check()
    try:
        results = Results(Path(study.out))
        if study.tables:
            results.require()
            write_tables(study, results)
            return 0
        plan = Plan(study, results)
        if study.plan:
            show_plan(study, plan)
            return 0
        study.check_inputs()
        make_folder(study.out)
        status = execute(study, plan, results, began)
        write_tables(study, results)
        return status
    except ConfigError as error:
        raise UserError(str(error)) from None


if __name__ == "__main__":
    run(functools.partial(main, began=BEGAN))
