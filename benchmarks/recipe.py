"""Tries what might move learned chunks to the edges of words, one change at a time: the tables of docs/STUDY.md.

    python benchmarks/recipe.py --data DIR --plan               # the variants and their flags; needs no GPU
    python benchmarks/recipe.py --data DIR --out FOLDER --gpus 2 --seconds 500
    python benchmarks/recipe.py --out FOLDER --tables --page docs/STUDY.md
    CUDA_VISIBLE_DEVICES=0,1,0,1 python benchmarks/recipe.py --gpus 4 ...       # two at a time on each of two GPUs
    python benchmarks/recipe.py --data data/stdlib --device cpu --config hnet_1stage_tiny --mbs 1024 --bytes 4e5 ...

All variants differ from the first in what their line says. The same command starts and resumes: as study.py, with which
it shares the runs, it adds a line to FOLDER/results.jsonl for each run that has ended. At four points of a run some
held-out text is scored, so that the tables also show how chunks move.
"""

import functools
import hashlib
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from study import START, Results, Study, Task, execute, make_folder, parts_of_page, say, write_into  # noqa: E402 (run from anywhere)

from hnet_config import HNetConfig  # noqa: E402
from hnet_runtime import UserError  # noqa: E402
from hnet_runtime.commands import parse, run  # noqa: E402

VALIDATIONS = 4  # of a run


class Variant(NamedTuple):
    """What a run changes. flags: of train.py. config: keys of the model's config. batch: of --mbs."""

    words: str
    flags: str = ""
    config: dict[str, Any] = {}
    batch: float = 1


VARIANTS = {
    "paper": Variant("the paper's: alpha 0.03"),
    "alpha": Variant("alpha 0.2", "alpha=0.2"),
    "strong": Variant("alpha 1", "alpha=1"),
    "slow-router": Variant("router's learning rate x 0.1", "router-lr=0.1"),
    "slower-router": Variant("router's learning rate x 0.01", "router-lr=0.01"),
    "slow-strong": Variant("router's learning rate x 0.1, alpha 0.2", "router-lr=0.1 alpha=0.2"),
    "fast-router": Variant("router's learning rate x 4", "router-lr=4"),
    "hinge": Variant("only too many chunks cost", "ratio-form=hinge"),
    "rising": Variant("target rises from 1.5 over half of the run", "ratio-from=1-1.5 ratio-rise=0.5"),
    "rising-strong": Variant("the same, alpha 0.2", "ratio-from=1-1.5 ratio-rise=0.5 alpha=0.2"),
    "low-lr": Variant("learning rate x 0.5", "lr=0.5"),
    "lower-lr": Variant("learning rate x 0.25", "lr=0.25"),
    "small-batch": Variant("a quarter of the bytes per step, learning rate x 0.5", "lr=0.5", batch=0.25),
    "small-batch-lr": Variant("a quarter of the bytes per step", batch=0.25),
    "short-chunks": Variant("target of 4 bytes per chunk", config={"N_compress": [1, 4]}),
    "shallow": Variant("encoder and decoder of one layer", config={"arch_layout": ["m1", ["T16"], "m1"]}),
    "deep": Variant("encoder and decoder of eight layers", config={"arch_layout": ["m8", ["T12"], "m8"]}),
    "attention": Variant("attention before the router", config={"arch_layout": ["m3t1", ["T16"], "m4"]}),
    "attention-first": Variant("attention as the first layer", config={"arch_layout": ["t1m3", ["T16"], "m4"]}),
    "small": Variant("one layer outside, four inside", config={"arch_layout": ["m1", ["T4"], "m1"]}),
    "small-inner": Variant("inner network of four layers", config={"arch_layout": ["m4", ["T4"], "m4"]}),
}


@dataclass
class Recipe:
    """Which runs to make."""

    data: str = "data/stdlib"
    """Folder made by `fineweb.py prepare`, with held-out text."""
    out: str = "runs/recipe"
    """Folder of the results."""
    config: str = "hnet_1stage_small"
    """The model of all variants, with one learned stage."""
    variants: str = ",".join(VARIANTS)
    """Which variants, separated by commas, in the order of their runs."""
    bytes: float = 24e6
    """Bytes of each run."""
    seeds: int = 2
    """Seeds of each variant: first one of all, then the next."""
    lr: float = 6.25e-4
    """Learning rate."""
    mbs: int = 32768
    """Bytes per step."""
    flags: str = "alpha=0.03 schedule=wsd decay=0.2"
    """Flags of train.py for all variants; those of a variant come after them."""
    gpus: int = 1
    """Runs side by side, each on the GPU of this place in CUDA_VISIBLE_DEVICES."""
    seconds: float = 0
    """Start no run that would not end within so many seconds. 0: no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device, as in train.py."""
    val_slices: int = 32
    """Held-out slices of --mbs bytes to score at each of four points."""
    page: str = ""
    """Markdown page in which the tables replace what is between <!-- recipe --> and <!-- end -->."""
    plan: bool = False
    """Print the runs, and stop."""
    tables: bool = False
    """Write the tables of the results so far, and stop."""

    def check(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a finite number")
        for name in ("bytes", "lr", "mbs", "seeds", "gpus", "val_slices"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected more than 0")
        if self.seconds < 0:
            raise UserError(f"--seconds {self.seconds}: expected 0 or more")
        if unknown := [name for name in self.variants.split(",") if name not in VARIANTS]:
            raise UserError(f"--variants {unknown[0]}: expected names of {', '.join(VARIANTS)}")
        self.as_study().check_train_flags()

    def as_study(self) -> Study:
        """What study.py needs to make a run."""
        return Study(
            data=self.data, out=self.out, config=self.config, mbs=self.mbs, gpus=self.gpus, seconds=self.seconds,
            device=self.device, val_slices=1, robust_texts=0, flags=self.flags,
        )  # fmt: skip


class RecipePlan:
    """The runs that there are to make, for `study.execute`."""

    def __init__(self, recipe: Recipe, results: Results):
        import fineweb
        from hnet_runtime import matching

        self.recipe, self.results, self.matching = recipe, results, matching
        self.model = HNetConfig.load(recipe.config)
        if self.model.num_stages != 1:
            raise UserError(f"--config {recipe.config}: has {self.model.num_stages} chunking stages; expected 1")
        self.stream = fineweb.ByteStream(recipe.data, "train", slice_bytes=recipe.mbs, max_doc=8192)
        self.rows = matching.row_lengths(self.stream)

    def tasks(self, phase: str) -> list[Task]:
        if phase != "main":
            return []
        names = self.recipe.variants.split(",")
        return [self._task(name, seed) for seed in range(self.recipe.seeds) for name in names]

    def pending(self, phase: str) -> list[Task]:
        return [task for task in self.tasks(phase) if task.key not in self.results.rows]

    def estimate(self, task: Task, is_first: bool, kind: str) -> float:
        """Seconds that a run will take: those that others took, or twice the time to start."""
        took = [row["seconds"] for row in self.results.good]
        return statistics.median(took) if took else 2 * START[kind][0 if is_first else 1]

    def _task(self, name: str, seed: int) -> Task:
        recipe, variant = self.recipe, VARIANTS[name]
        config = HNetConfig.load(self.model.to_dict(), **variant.config)
        given = dict(part.split("=") for part in f"{recipe.flags} {variant.flags}".split())
        lr, mbs = recipe.lr * float(given.pop("lr", 1)), max(1, round(recipe.mbs * variant.batch))
        steps = max(VALIDATIONS, round(recipe.bytes / mbs))
        given |= {
            "lr": f"{lr:g}", "mbs": mbs, "steps": steps, "seed": seed, "data": recipe.data, "device": recipe.device,
            "global-slices": 1, "val-every": -(-steps // VALIDATIONS), "sample-bytes": 0, "save-every": 0,
            "val-slices": max(1, round(recipe.val_slices / variant.batch)), "stats-every": 0, "log-every": steps,
        }  # fmt: skip
        flags = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
        digest = hashlib.sha256(json.dumps([config.to_dict(), flags, self.stream.fingerprint]).encode()).hexdigest()[:8]
        rates = self.matching.planned_rates(config)
        flops = self.matching.flops_per_byte(config, self.rows, rates)
        key = f"{name}/seed{seed}/{steps * mbs / 1e6:.3g}MB/{digest}"
        return Task(key, "main", name, seed, lr, steps, config.to_dict(), rates, flops, flags)


# -------------------------------------------------------------------------------------------------------------- tables


def tables(rows: list[dict[str, Any]]) -> str:
    """A line for each variant: means over seeds, and at which places of a word chunks begin."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "failed" not in row:
            found[row["architecture"]].append(row)
    if not found:
        return ""
    some = [row for runs in found.values() for row in runs]
    one = lambda name: ", ".join(sorted({str(row[name]) for row in some}))  # noqa: E731
    lines = [
        f"{len(some)} runs of {statistics.median(row['train_bytes'] for row in some) / 1e6:.0f} MB each, flags "
        f"`{one('train_flags')}` except where a line says so. Measured {one('date')}, {one('card')}, torch "
        f"{one('torch')}, commit {one('commit')}. x: times chance; each seed's own value where there are several.",
        "",
        "| variant | bits per byte | at word edges, x | after a quarter, half, three quarters | at spaces, x | "
        "at first letters, x | at punctuation, x | enrichment | bytes per chunk |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for name in [name for name in VARIANTS if name in found]:
        runs = sorted(found[name], key=lambda row: row["seed"])
        last, edges = [row["validations"][-1] for row in runs], [edges_of(row) for row in runs]
        earlier = [f"{statistics.fmean(of_runs):.2f}" for of_runs in list(zip(*edges))[:-1]]
        places = "space", "letter_1", "punctuation"
        cells = [
            VARIANTS[name].words,
            f"{statistics.fmean(v['val_bpb'] for v in last):.3f}",
            ", ".join(f"{of_run[-1]:.2f}" for of_run in edges),
            ", ".join(earlier),
            *(", ".join(shown(times_chance(v, place)) for v in last) for place in places),
            ", ".join(shown(v.get("val_stage0_enrichment", math.nan)) for v in last),
            f"{statistics.fmean(v['val_stage0_compression'] for v in last):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def edges_of(row: dict[str, Any]) -> list[float]:
    """How often chunks begin at word edges, times chance, at each validation of a run."""
    return [v["val_edge_share"] / v["val_edge_base"] for v in row["validations"]]


def times_chance(validation: dict[str, Any], place: str) -> float:
    share, chance = (validation.get(f"val_{name}_{place}", math.nan) for name in ("stage0_at", "chance"))
    return share / chance if chance else math.nan


def write_tables(recipe: Recipe, results: Results) -> None:
    from hnet_runtime.pages.reports import write_atomically

    if content := tables(list(results.rows.values())):
        write_atomically(Path(recipe.out) / "recipe.md", lambda scratch: scratch.write_text(content, encoding="utf-8"))
        say(f"{recipe.out}/recipe.md: the table of {len(results.rows)} runs")
        if recipe.page:
            write_into(Path(recipe.page), content, "recipe")


def main(argv: Sequence[str], began: float | None = None) -> int:
    """began: when the process started, from which --seconds counts."""
    began = began or time.perf_counter()
    recipe = parse(Recipe, argv, __doc__)
    recipe.check()
    results = Results(Path(recipe.out))
    if recipe.tables:
        results.require()
        write_tables(recipe, results)
        return 0
    plan = RecipePlan(recipe, results)
    if recipe.plan:
        for task in plan.tasks("main"):
            done = "done " if task.key in results.rows else "     "
            say(f"{done}{task.key:40} {VARIANTS[task.architecture].words}: {' '.join(task.flags)}")
        return 0
    plan.stream.require(recipe.mbs)
    recipe.as_study().check_inputs()
    if recipe.page:
        parts_of_page(Path(recipe.page), "recipe")
    make_folder(recipe.out)
    status = execute(recipe.as_study(), plan, results, began)
    write_tables(recipe, results)
    return status


if __name__ == "__main__":
    run(functools.partial(main, began=BEGAN))
