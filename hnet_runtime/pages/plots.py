"""Curves of one or several runs: a PNG, and one HTML file that needs no network."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from hnet_config import ConfigError, HNetConfig
from hnet_runtime import UserError
from hnet_runtime.pages.reports import write_atomically
from hnet_runtime.runs.metrics import read_metrics

TEMPLATE = Path(__file__).with_name("plots.html")
POINTS = 1200  # per curve; longer curves are thinned
RARE = 0.01  # a quotient of smaller shares is mostly noise
FEW = 40  # a curve of fewer points is drawn with dots and is not smoothed
PANELS = (  # title, pattern of the keys, logarithmic, smoothed
    ("bits per byte", r"(val_)?bpb", False, True),
    ("bits per byte given cuts that depend on later bytes", r"(val_)?bpb_given_cuts", False, True),
    ("ratio loss (1 at the target)", r"stage\d+_ratio_loss", False, True),
    ("tokens per chunk, and the target", r"stage\d+_(compression|target)", True, True),
    ("chunk length: mean and longest", r"stage\d+_chunk_(mean|max)", True, False),
    ("share of boundaries", r"stage0_at_(whitespace|punctuation|inside)", False, False),
    ("held-out chunks that begin at a place, times chance", r"val_stage0_times_\w+", False, False),
    ("surprisal of the bytes that open chunks, times the mean", r"val_stage\d+_enrichment", False, False),
    ("entropy of p in bits, and share of the cuts that moved", r"val_stage\d+_(p_entropy|moved)", False, False),
    ("learning rate", r"(stage\d+_)?lr", False, False),
    ("gradient norm", r"(stage\d+_)?grad_norm", True, True),
    ("update over weights", r"stage\d+_update_ratio", True, False),
    ("bytes per second", r"bytes_per_s", False, True),
    ("MFU", r"mfu", False, True),
    ("held-out bits per byte by length of the document", r"val_bpb_(le_\d+|longer)", False, False),
    ("held-out bits per byte by position in the document", r"val_bpb_at_\w+", False, False),
)
# distinguishable for the colour-blind: eight of Okabe and Ito, four of Tol
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d00")
COLOURS += ("#882255", "#44aa99", "#332288", "#999933")
DASHES = ("", "6 3", "8 3 2 3", "12 4")  # of the first twelve curves of a panel, the next twelve, and so on
OF_TARGETS = "2 3"
AXES = {"bytes": "bytes_so_far", "seconds": "seconds_so_far", "flops": "flops_so_far"}  # other than steps


class Curve(NamedTuple):
    """One curve of a panel. dash: as in SVG; dots: whether there are few points."""

    name: str
    run: int
    colour: str
    dash: str
    dots: bool
    points: list[tuple[int, float]]  # step, value
    means: list[float] | None  # of the last `window` points up to each point; None if the curve is not smoothed
    window: int


class Panel(NamedTuple):
    title: str
    logarithmic: bool
    curves: list[Curve]


def read_run(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, with values derived from config.json.

    Each has `bytes_so_far`, `seconds_so_far` (of steps, without validation and saving) and `flops_so_far` (of matrix
    products, as in MFU) if they are known, and each stage's learning rate. A last line that a crash cut off is left
    out. Raises UserError with the folder or the line.
    """
    from hnet_runtime.evaluation.boundaries import PLACES  # imports torch
    from hnet_trainable import lr_modulation

    path = Path(run) / "metrics.jsonl"
    records = read_metrics(path)
    if not records:
        what = "holds no whole record yet" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}; expected the metrics of a run of train.py")
    try:
        config = HNetConfig.load(Path(run) / "config.json")
        multipliers = lr_modulation(config)
    except ConfigError:
        config, multipliers = None, []
    for record in records:
        if _is_number(record.get("lr")):
            record |= {f"stage{s}_lr": record["lr"] * m for s, m in enumerate(multipliers)}
        record |= _over_chance(record, PLACES)
    _add_progress(records, config)
    return records


def _over_chance(record: dict[str, Any], places: Sequence[str]) -> dict[str, float]:
    """How many times as often as by chance chunks of stage 0 begin at each place that is not rare."""
    found = {}
    for name in places:
        share, chance = record.get(f"val_stage0_at_{name}"), record.get(f"val_chance_{name}")
        if _is_number(share) and _is_number(chance) and chance > RARE:
            found[f"val_stage0_times_{name}"] = share / chance
    return found


def _add_progress(records: list[dict[str, Any]], config: HNetConfig | None) -> None:
    """Adds the sums up to each step. A step without a record counts like the next one."""
    from hnet_runtime.flops import count_flops

    stages = range(config.num_stages + 1) if config else ()
    per_token = [count_flops(config, [[1] if i == s else [] for i in stages]).matmul for s in stages] if config else []
    step, reached = 0, dict.fromkeys(AXES.values(), 0.0)
    for record in records:
        steps, step = record["step"] - step, record["step"]
        if _is_number(record.get("bytes_seen")):
            reached["bytes_so_far"] = record["bytes_seen"]
            shares = [record.get(f"stage{s}_F") for s in stages[:-1]]  # of tokens that the next stage gets
            if all(map(_is_number, shares)):
                tokens = accumulate(shares, lambda n, share: n * share, initial=record["bytes_seen"] / max(step, 1))
                reached["flops_so_far"] += steps * sum(n * flops for n, flops in zip(tokens, per_token))
        if _is_number(record.get("step_ms")):
            reached["seconds_so_far"] += steps * record["step_ms"] / 1000
        record |= {name: value for name, value in reached.items() if value}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300  # not NaN


def panels_of(runs: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """The panels of runs (records by name). Panels and curves without values are left out.

    The curves of a panel differ in colour, and after the twelfth in dashes. A target is a lighter, dotted line.
    """
    panels = []
    for title, pattern, logarithmic, smoothed in PANELS:
        keys = {key for records in runs.values() for r in records for key in r if re.fullmatch(pattern, key)}
        keys = sorted(keys, key=lambda key: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", key)])
        if "stage0_lr" in keys:
            keys.remove("lr")
        found = []
        for key in keys:
            for n, (run, records) in enumerate(runs.items()):
                points = [
                    (r["step"], r[key]) for r in records if _is_number(r.get(key)) and (r[key] > 0 or not logarithmic)
                ]
                if points:
                    found.append((key, f"{run}: {_words(key)}" if len(runs) > 1 else _words(key), n, points))
        numbers = {(key, n): i for i, (key, _, n, _) in enumerate(x for x in found if not x[0].endswith("_target"))}
        curves = []
        for key, name, n, points in found:
            is_target = key.endswith("_target")
            i = numbers.get((key.replace("_target", "_compression"), n), 0)
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            if is_target:
                colour, dash = _lighter(colour), OF_TARGETS
            window = len(points) // FEW if smoothed and not is_target else 1
            means = _thinned(_running_mean([value for _, value in points], window)) if window > 1 else None
            curves.append(Curve(name, n, colour, dash, len(points) < FEW, _thinned(points), means, max(window, 1)))
        if curves:
            panels.append(Panel(title, logarithmic, curves))
    return panels


def _words(key: str) -> str:
    return re.sub(r"^(val_)?stage(\d+)_", r"\1stage \2 ", key).replace("_", " ")


def _lighter(colour: str) -> str:
    """The colour halfway to white."""
    return "#" + "".join(f"{(int(colour[i : i + 2], 16) + 255) // 2:02x}" for i in (1, 3, 5))


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """For each value the mean of the last `window` values up to it."""
    sums = [0.0, *accumulate(values)]
    firsts = [max(0, i - window) for i in range(1, len(sums))]
    return [(sums[i] - sums[first]) / (i - first) for i, first in enumerate(firsts, 1)]


def _thinned(points: list) -> list:
    step = -(-len(points) // POINTS)
    return points[::step] if step == 1 or (len(points) - 1) % step == 0 else [*points[::step], points[-1]]


def about_smoothing(panels: list[Panel]) -> str:
    """One sentence about thick and faint curves; empty if nothing is smoothed."""
    windows = {curve.window for panel in panels for curve in panel.curves if curve.means}
    if not windows:
        return ""
    steps = f"{min(windows):,}" if len(windows) == 1 else f"{min(windows):,} to {max(windows):,}"
    return (
        f"Curves are smoothed: a thick line is the mean of the last {steps} steps, a fortieth of the run. The faint "
        "line behind it shows each step."
    )


def _label(name: str) -> str:
    """A name for matplotlib, which would hide `_a` and read `$a$` as a formula."""
    return " " * name.startswith("_") + name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def write_png(panels: list[Panel], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), layout="tight", squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        for curve in panel.curves:
            dash = (0, [float(x) for x in curve.dash.split()]) if curve.dash else "-"
            marker = "o" if curve.dots else None
            style = {"color": curve.colour, "linestyle": dash, "marker": marker, "markersize": 3, "linewidth": 1}
            steps, values = zip(*curve.points)
            if curve.means:
                axis.plot(steps, values, color=curve.colour, alpha=0.25, linewidth=0.7)
                style["linewidth"] = 1.6
            axis.plot(steps, curve.means or values, label=_label(curve.name), **style)
        if panel.logarithmic:
            axis.set_yscale("log")
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        axis.set_xlabel("step", fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    if about := about_smoothing(panels):
        figure.text(0.5, 0.0, about, fontsize=7, ha="center", va="top", wrap=True)
    write_atomically(path, lambda scratch: figure.savefig(scratch, format="png", dpi=100, bbox_inches="tight"))
    plt.close(figure)


def progress_table(runs: dict[str, list[dict[str, Any]]], panels: list[Panel]) -> list[dict[str, Any]]:
    """For each run its `name`, the `steps` of its points, and for each of AXES the value reached there.

    None for values that a run does not have.
    """
    tables = []
    for n, (name, records) in enumerate(runs.items()):
        used = {step for panel in panels for curve in panel.curves if curve.run == n for step, _ in curve.points}
        at = [record for record in records if record["step"] in used]
        table: dict[str, Any] = {"name": name, "steps": [record["step"] for record in at]}
        for axis, key in AXES.items():
            known = at and all(key in record for record in at)
            table[axis] = [record[key] for record in at] if known else None
        tables.append(table)
    return tables


def write_html(panels: list[Panel], runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    data = [panel._asdict() | {"curves": [c._asdict() for c in panel.curves]} for panel in panels]
    parts = {
        "TITLE": html.escape(", ".join(runs)),
        "SMOOTHING": html.escape(about_smoothing(panels)),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
        "RUNS": json.dumps(progress_table(runs, panels)).replace("<", "\\u003c"),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    content = re.sub(f"__({'|'.join(parts)})__", lambda place: parts[place[1]], template)
    write_atomically(path, lambda scratch: scratch.write_bytes(content.encode(errors="backslashreplace")))


def plot(runs: list[str | Path], out: Path) -> list[Path]:
    """Writes OUT.png and OUT.html for the folders of one or several runs; returns the two paths."""
    names = [Path(run).resolve().name for run in runs]
    if len(set(names)) < len(names):  # folders with the same name
        names = [str(run) for run in runs]
    records = {name: read_run(run) for name, run in zip(names, runs)}
    panels = panels_of(records)
    if not panels:
        raise UserError(f"{runs[0]}: its metrics hold nothing to plot")
    files = [out.with_name(out.name + suffix) for suffix in (".png", ".html")]
    write_png(panels, files[0])
    write_html(panels, records, files[1])
    return files
