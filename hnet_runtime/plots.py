"""Curves of one or several runs: a PNG, and one HTML file that needs no network."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from hnet_runtime import UserError
from hnet_runtime.metrics import read_metrics
from hnet_runtime.reports import write_whole
from hnet_trainable import ConfigError, HNetConfig, lr_modulation

TEMPLATE = Path(__file__).with_name("plots.html")
POINTS = 1200  # of a curve; longer ones are thinned
PANELS = (  # title, pattern of the keys, logarithmic
    ("bits per byte", r"(val_)?bpb", False),
    ("ratio loss (1 at the target)", r"stage\d+_ratio_loss", False),
    ("tokens a chunk, and the target", r"stage\d+_(compression|target)", True),
    ("chunk length: mean and longest", r"stage\d+_chunk_(mean|max)", True),
    ("share of boundaries", r"stage0_at_(whitespace|punctuation|inside)", False),
    ("learning rate", r"(stage\d+_)?lr", False),
    ("gradient norm", r"(stage\d+_)?grad_norm", True),
    ("update over weights", r"stage\d+_update_ratio", True),
    ("bytes a second", r"bytes_per_s", False),
    ("MFU", r"mfu", False),
    ("held-out bits per byte by length of the document", r"val_bpb_(le_\d+|longer)", False),
    ("held-out bits per byte by position in the document", r"val_bpb_at_\w+", False),
)
# apart for the colour-blind (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d00")
DASHES = ("", "6 3", "2 2", "8 3 2 3")


class Curve(NamedTuple):
    """One line of a panel. `dash` as SVG has it; `dots` where there are few points."""

    name: str
    colour: str
    dash: str
    dots: bool
    points: list[tuple[int, float]]  # step, value


class Panel(NamedTuple):
    title: str
    logarithmic: bool
    curves: list[Curve]


def read_run(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, with each stage's learning rate where config.json tells the multipliers.

    A last line that a crash tore is left out. Raises UserError naming the folder or the line.
    """
    path = Path(run) / "metrics.jsonl"
    records = read_metrics(path)
    if not records:
        what = "holds no whole record yet" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}; expected the metrics of a run of train.py")
    try:
        multipliers = lr_modulation(HNetConfig.load(Path(run) / "config.json"))
    except ConfigError:
        multipliers = []
    for record in records:
        if record.get("lr") is not None:
            record |= {f"stage{s}_lr": record["lr"] * m for s, m in enumerate(multipliers)}
    return records


def panels_of(runs: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """`runs`: records by name. A panel that no run has numbers for is left out, and so is a curve without numbers."""
    panels = []
    for title, pattern, logarithmic in PANELS:
        keys = sorted({key for records in runs.values() for r in records for key in r if re.fullmatch(pattern, key)})
        if "stage0_lr" in keys:
            keys.remove("lr")
        curves = []
        for n, (run, records) in enumerate(runs.items()):
            for k, key in enumerate(keys):
                points = [
                    (r["step"], r[key])
                    for r in records
                    if isinstance(r.get(key), int | float) and (r[key] > 0 or not logarithmic)
                ]
                if not points:
                    continue
                several = len(runs) > 1
                target = key.endswith("_target")
                colour = "#777777" if target else COLOURS[(n if several else k) % len(COLOURS)]
                dash = "2 4" if target else DASHES[k % len(DASHES)] if several else ""
                name = f"{run}: {_words(key)}" if several else _words(key)
                curves.append(Curve(name, colour, dash, len(points) < 40, _thinned(points)))
        if curves:
            panels.append(Panel(title, logarithmic, curves))
    return panels


def _words(key: str) -> str:
    return re.sub(r"^stage(\d+)_", r"stage \1 ", key).replace("_", " ")


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    step = -(-len(points) // POINTS)
    return points[::step] if step == 1 or (len(points) - 1) % step == 0 else [*points[::step], points[-1]]


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
            axis.plot(*zip(*curve.points), label=curve.name, **style)
        if panel.logarithmic:
            axis.set_yscale("log")
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        axis.set_xlabel("step", fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    write_whole(path, lambda scratch: figure.savefig(scratch, format="png", dpi=100))
    plt.close(figure)


def write_html(panels: list[Panel], title: str, path: Path) -> None:
    data = json.dumps([panel._asdict() | {"curves": [c._asdict() for c in panel.curves]} for panel in panels])
    content = (
        TEMPLATE.read_text().replace("__TITLE__", html.escape(title)).replace("__DATA__", data.replace("<", "\\u003c"))
    )
    write_whole(path, lambda scratch: scratch.write_bytes(content.encode(errors="backslashreplace")))


def plot(runs: list[str | Path], out: Path) -> list[Path]:
    """Writes OUT.png and OUT.html for the folders of one or several runs; returns the two paths."""
    names = [Path(run).resolve().name for run in runs]
    if len(set(names)) < len(names):  # folders of one name in different places
        names = [str(run) for run in runs]
    panels = panels_of({name: read_run(run) for name, run in zip(names, runs)})
    if not panels:
        raise UserError(f"{runs[0]}: its metrics hold nothing to plot")
    files = [out.with_name(out.name + suffix) for suffix in (".png", ".html")]
    write_png(panels, files[0])
    write_html(panels, ", ".join(names), files[1])
    return files
