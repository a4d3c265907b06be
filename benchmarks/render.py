"""Write the figures of the record (ledger.jsonl) into README.md, docs/*.md and the drawing of speed over time.

    python benchmarks/render.py                    rewrite what stands between the marks, and the drawings
    python benchmarks/render.py --check            change nothing; name the files that differ, status 1 if any
    python benchmarks/render.py --print XL         the entries whose key contains XL

A mark in a page names one key and a field of its entry, keys and a field (the lowest to the highest value), or keys and
one of the TABLES:

    A step takes <!-- ledger: train/a/h200/2026-11-29 as step_ms -->31.7 ms<!-- end -->.

    <!-- ledger: train/a/h200/2026-11-29 peers/a/h200/2026-11-21 as training -->
    (a table)
    <!-- end -->
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
from ledger import FILE, ROOT, read, short_name  # noqa: E402 (run from anywhere)

from hnet_runtime import UserError  # noqa: E402
from hnet_runtime.commands import Parser, run  # noqa: E402

MARK = re.compile(r"<!-- ledger: ([^>]+?) as (\w+) -->(.*?)<!-- end -->", re.DOTALL)
Entry = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------- numbers


def number(field: str, value: Any) -> str:
    """A value with its unit, which the field's name ends with. A list is a range, or a value for each stage."""
    if isinstance(value, list):
        texts = [number(field, v) for v in value]
        joint = " and " if field == "chunks_percent" else " to "
        return joint.join(
            [*(text.split(" ")[0].rstrip("%") if joint == " to " else text for text in texts[:-1]), texts[-1]]
        )
    if not isinstance(value, int | float):
        return str(value)
    if field.endswith("bytes_per_s"):
        if value < 1e4 or field != "bytes_per_s":  # of generation
            return f"{value:,.0f} bytes/s"
        return f"{value / 1e6:.2f} MB/s" if value >= 1e6 else f"{value / 1e3:.0f} kB/s"
    if field == "chunk_bytes":
        return f"{value:.1f}"
    if field.endswith("_ratio"):
        return f"{value:.3f}".rstrip("0")
    for unit, text in (
        ("_tb_per_s", "{:.1f} TB/s"),
        ("_ms", "{:.1f} ms"), ("_us", "{:.1f} us"), ("_gib", "{:.1f} GiB"), ("_percent", "{:.1f}%"), ("_s", "{:.0f} s"),
        ("_min", "{:.1f} min"), ("_bpb", "{:.3f}"), ("_count", "{:,.0f}"), ("_bytes", "{:,.0f}"),
    ):  # fmt: skip
        if field.endswith(unit):
            return text.format(value)
    return f"{value:,.4g}"


def field(name: str) -> Callable[[Entry], str]:
    return lambda entry: number(name, entry[name]) if name in entry else "-"


def seconds(name: str) -> Callable[[Entry], str]:
    """A time of less than a minute, to a tenth of a second."""
    return lambda entry: f"{entry[name]:.1f} s" if name in entry else "-"


def measured(entry: Entry) -> str:
    """When, on what and of which commit, or whose figure it is."""
    if "card" not in entry:
        return entry["source"]
    card = entry["card"].removeprefix("NVIDIA ").removesuffix(" 80GB HBM3")
    if "source" in entry:
        return f"{entry['date']}, {card}, by us"
    return f"{entry['date']}, {card}, {'at' if entry['commit_of'] == 'code' else 'before'} `{entry['commit']}`"


def when(entry: Entry) -> str:
    """As `measured`, without the commit."""
    return measured(entry).partition(", at `")[0].partition(", before `")[0]


def memory(entry: Entry) -> str:
    kinds = [kind for kind in ("reserved", "allocated") if f"{kind}_gib" in entry]
    return f"{number('reserved_gib', entry[f'{kinds[0]}_gib'])} {kinds[0]}" if kinds else "-"


def code(entry: Entry) -> str:
    ways = {"graph": "CUDA graphs", "eager": "eager", "block": "compiled blocks", "plain": "plain steps"}
    if "code" in entry:
        return entry["code"]
    way = ways[entry["compile"]] if "compile" in entry else ""
    more = f", `--ac {entry['ac']}`" if entry.get("ac", "none") != "none" else ""
    return f"**this project**, {way}{more}" if way else "**this project**"


def decoder(entry: Entry) -> str:
    """Whose code decodes, and how."""
    return entry["code"] if "source" in entry else code({k: v for k, v in entry.items() if k != "code"})


def opened(entry: Entry) -> str:
    """The share of bytes that open a chunk of the outermost stage."""
    return f"{entry['chunks_percent'][0]:.0f}%" if "chunks_percent" in entry else "-"


TABLES: dict[str, dict[str, Callable[[Entry], str]]] = {
    "training": {
        "Config": field("config"), "Code": code, "Step": field("step_ms"), "Speed": field("bytes_per_s"),
        "MFU": field("mfu_percent"), "GPU memory": memory, "First step": field("first_step_s"), "Measured": measured,
    },
    "results": {
        "Config": field("config"), "Code": code, "Step": field("step_ms"), "MFU": field("mfu_percent"),
        "GPU memory": memory, "Measured": when,
    },
    "memory": {
        "Config": field("config"), "`--ac`": lambda e: e.get("ac", "none"), "Reserved": field("reserved_gib"),
        "Step": field("step_ms"), "Boundaries": field("boundaries"), "Measured": measured,
    },
    "sizes": {
        "Bytes per step": field("step_bytes"), "Step": field("step_ms"), "Speed": field("bytes_per_s"),
        "Reserved": field("reserved_gib"), "Measured": measured,
    },
    "gpus": {
        "Config": field("config"), "What": field("what"), "Bytes per step": field("step_bytes"),
        "Step": field("step_ms"), "MFU": field("mfu_percent"), "GPU memory": memory, "Measured": measured,
    },
    "history": {
        "Date": lambda e: e["date"].replace("-", "\u2011"), "Card": lambda e: short_name(e["card"]).upper(),
        "Change": field("what"),
        "Step": field("step_ms"), "MFU": field("mfu_percent"), "Launches": field("launches_count"),
        "GPU busy": field("gpu_busy_ms"),
    },
    "profile": {
        "Config": field("config"), "Matmuls": field("matmul_ms"), "Scan": field("scan_ms"),
        "Attention": field("attention_ms"), "Optimizer": field("optimizer_ms"), "Norms": field("norm_ms"),
        "Gated norm": field("gated_norm_ms"), "Conv": field("convolution_ms"),
        "SwiGLU, rotary": field("swiglu_rotary_ms"), "Other": field("other_ms"), "Gaps": field("gap_ms"),
    },
    "turns": {
        "Config": field("config"), "`--ac`": lambda e: e.get("ac", "none"), "Old": field("old_step_ms"),
        "New": field("step_ms"),
        "New / old": field("new_over_old_ratio"),
        "Memory, old": field("old_reserved_gib"), "Memory, new": field("reserved_gib"),
    },
    "edits": {
        "Edit": field("what"), "Runs as": lambda e: {"graph": "CUDA graphs", "eager": "eager"}[e["compile"]],
        "Operations by definition": field("definitions_count"), "Step": field("waited_step_ms"),
    },
    "generation": {
        "Config": field("config"), "Code": decoder, "Batch": field("batch_count"),
        "Bytes that open a chunk": opened, "Speed": field("decoded_bytes_per_s"), "Measured": when,
    },
    "decoding": {
        "Config": field("config"), "Code": decoder,
        "Weights": lambda e: "random" if "random" in e["what"] else "trained", "Batch": field("batch_count"),
        "Bytes that open a chunk": opened, "Speed": field("decoded_bytes_per_s"),
        "Share of the memory's speed": field("floor_percent"), "Measured": measured,
    },
    "paper": {
        "Size": field("config"), "Model": field("code"), "Bits per byte": field("val_bpb"),
        "Zero-shot accuracy": field("zero_shot_percent"), "Bytes per chunk": field("chunk_bytes"),
    },
    "quality": {
        "Model": field("what"), "Parameters": field("parameters_count"),
        "Training MFLOP per byte": field("mflop_per_byte"), "Bits per byte": field("val_bpb"),
        "Bytes per chunk": field("chunk_bytes"), "Measured": when,
    },
    "runs": {
        "Command": lambda e: f"`{e['command']}`", "Bits per byte": field("val_bpb"),
        "Bytes per chunk": field("chunk_bytes"), "Word edges, times chance": field("edges_ratio"),
        "Measured": measured,
    },
    "starts": {
        "Config": field("config"), "Kernels in the cache": lambda e: "none" if "parts-empty" in e["key"] else "all",
        "Start of Python": seconds("python_s"), "Import of torch": seconds("import_torch_s"),
        "Other imports": seconds("import_rest_s"), "Compiler processes": seconds("fork_s"),
        "Processes and device": seconds("processes_s"), "Check of operations": seconds("check_operations_s"),
        "of which waiting for kernels": seconds("compiler_s"), "Check of steps": seconds("check_steps_s"),
        "Weights": seconds("weights_s"), "Check of captured steps": seconds("check_captured_s"),
        "Run folder, check of generation": seconds("open_run_s"), "First step": seconds("first_step_s"),
        "Whole start": seconds("start_s"), "Whole start, before": seconds("before_s"),
    },
}  # fmt: skip


TURNED = ("profile", "starts")


def table(name: str, entries: list[Entry]) -> str:
    """A row for each entry, or, of a table in TURNED, a column. What no entry has is left out."""
    units = re.compile(r"(?<=\d) (?=(s|ms|GiB|[kM]?B/s|bytes/s)\b)")
    columns = [[title, *(show(entry) for entry in entries)] for title, show in TABLES[name].items()]
    columns = [column for column in columns if any(cell != "-" for cell in column[1:])]
    rows = columns if name in TURNED else [list(row) for row in zip(*columns)]
    lines = ["| " + " | ".join(units.sub("\u00a0", cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "-|" * len(rows[0]), *lines[1:]])


def rendered(text: str, entries: dict[str, Entry]) -> str:
    """The page with what its marks name. Raises ValueError for a key, a table or a field that is not there."""

    def one(match: re.Match[str]) -> str:
        keys, name = match[1].split(), match[2]
        for key in keys:
            if key not in entries:
                raise ValueError(f"{key}: no entry of {FILE.name} has this key")
        head = f"<!-- ledger: {match[1]} as {name} -->"
        if name in TABLES:
            return f"{head}\n{table(name, [entries[key] for key in keys])}\n<!-- end -->"
        if any(name not in entries[key] for key in keys):
            raise ValueError(f"{match[1]} as {name}: expected one of {', '.join(TABLES)}, or a field of each entry")
        if len(keys) == 1:
            return f"{head}{number(name, entries[keys[0]][name])}<!-- end -->"
        values = [entries[key][name] for key in keys]
        if not all(isinstance(value, int | float) for value in values):
            raise ValueError(f"{match[1]} as {name}: expected a number in each entry")
        return f"{head}{number(name, [min(values), max(values)])}<!-- end -->"

    return MARK.sub(one, text)


# ------------------------------------------------------------------------------------------------------------- drawing

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 880, 380, 66, 184, 44, 44
COLOURS = {
    "light": dict(ink="#1f2328", soft="#59636e", line="#d1d9e0", h200="#0969da", h100="#bc4c00"),
    "dark": dict(ink="#f0f6fc", soft="#9198a1", line="#3d444d", h200="#4493f8", h100="#f0883e"),
}


def curve(entries: dict[str, Entry]) -> list[Entry]:
    """Each version's time for the same work: one GPU, 32,768 bytes, no checkpointing, its fastest mode of that day."""
    return [
        e for e in entries.values()
        if e["key"].startswith("train/hnet_1stage_small/") and (e["gpus_count"], e["step_bytes"]) == (1, 32768)
        and e.get("ac", "none") == "none" and (e["compile"] != "eager" or e["date"] == "2026-11-21")
    ]  # fmt: skip


def drawing(entries: dict[str, Entry], colours: dict[str, str]) -> str:
    """Milliseconds per step of hnet_1stage_small over time, as SVG."""
    points = curve(entries)
    days = sorted({e["date"] for e in points})
    low, high = 10.0, 400.0

    def y(ms: float) -> float:
        share = math.log(ms / low) / math.log(high / low)
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    def text(at_x: float, at_y: float, what: str, fill: str = "ink", anchor: str = "start", more: str = "") -> str:
        place = f'x="{at_x:.1f}" y="{at_y:.1f}" fill="{colours[fill]}" text-anchor="{anchor}"'
        return f"<text {place}{more}>{escape(what)}</text>"

    title = f"hnet_1stage_small: time of a training step of 32,768 bytes on one GPU, {days[0][:4]} (logarithmic)"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, -apple-system, Segoe UI, sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        text(LEFT, 22, title, more=' font-size="15" font-weight="600"'),
    ]
    end = WIDTH - RIGHT
    for ms in (10, 20, 50, 100, 200, 400):
        lines.append(f'<path d="M{LEFT} {y(ms):.1f}H{end}" stroke="{colours["line"]}" stroke-width="1"/>')
        lines.append(text(LEFT - 8, y(ms) + 4, f"{ms} ms", "soft", "end"))
    for key, label in (
        ("peers/hnet_1stage_small/main-horse/h200/2026-11-21", "main-horse/hnet"),
        ("peers/hnet_1stage_small/hnet-impl/h200/2026-11-21", "hnet-impl"),
        ("floor/hnet_1stage_small/h200/2026-11-21", "counted FLOPs"),
    ):
        ms = entries[key]["step_ms"]
        lines.append(f'<path d="M{LEFT} {y(ms):.1f}H{end}" stroke="{colours["soft"]}" stroke-dasharray="6 5"/>')
        lines.append(text(end + 8, y(ms) + 4, f"{ms:.3g} ms, {label}", "soft"))
    placed, at_x = [], float(LEFT)
    slot = (end - LEFT) / (len(points) + len(days))  # one for each version, and half a one on each side of a day
    for day in days:
        of_day = [e for e in points if e["date"] == day]
        placed += [(at_x + (n + 1) * slot, e) for n, e in enumerate(of_day)]
        width = (len(of_day) + 1) * slot
        lines.append(text(at_x + width / 2, HEIGHT - BOTTOM + 20, day[5:], "soft", "middle"))
        at_x += width
        if day != days[-1]:
            lines.append(f'<path d="M{at_x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{colours["line"]}"/>')
    for card in ("h100", "h200"):
        shown = [(px, e) for px, e in placed if short_name(e["card"]) == card]
        path = " ".join(f"{'ML'[n > 0]}{px:.1f} {y(e['step_ms']):.1f}" for n, (px, e) in enumerate(shown))
        lines.append(f'<path d="{path}" fill="none" stroke="{colours[card]}" stroke-width="2" opacity=".55"/>')
        for px, e in shown:
            lines.append(f'<circle cx="{px:.1f}" cy="{y(e["step_ms"]):.1f}" r="4" fill="{colours[card]}">')
            lines.append(f"<title>{escape(e['date'])}: {e['step_ms']:.1f} ms, {escape(e['what'])}</title></circle>")
    newest = placed[-1][1]
    lines.append(
        text(
            end + 8,
            y(newest["step_ms"]) + 4,
            f"{newest['step_ms']:.1f} ms, this project",
            "h200",
            more=' font-weight="600"',
        )
    )
    for n, card in enumerate(("h200", "h100")):
        lines.append(f'<circle cx="{end - 150 + 80 * n}" cy="{TOP + 14}" r="4" fill="{colours[card]}"/>')
        lines.append(text(end - 140 + 80 * n, TOP + 18, card.upper()))
    return "\n".join([*lines, "</svg>"]) + "\n"


# --------------------------------------------------------------------------------------------------------------- files


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def outputs(file: Path = FILE) -> dict[Path, str]:
    """What each page and drawing has to contain."""
    entries = read(file)
    found = {}
    for page in pages():
        try:
            found[page] = rendered(page.read_text(encoding="utf-8"), entries)
        except ValueError as error:
            raise ValueError(f"{page.relative_to(ROOT)}: {error}") from None
    for scheme, colours in COLOURS.items():
        found[ROOT / "docs" / "images" / f"speed-{scheme}.svg"] = drawing(entries, colours)
    return found


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; name the files that differ")
    parser.add_argument("--print", metavar="TEXT", help="print the entries whose key contains TEXT")
    args = parser.parse_args(argv)
    try:
        if args.print is not None:
            shown = [entry for key, entry in read().items() if args.print in key]
            print("\n".join(json.dumps(entry, ensure_ascii=False, indent=1) for entry in shown))
            return 0 if shown else 1
        wanted = outputs()
    except ValueError as error:
        raise UserError(str(error)) from None
    differing = [f for f, text in wanted.items() if not f.exists() or f.read_text(encoding="utf-8") != text]
    for file in differing:
        if not args.check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(wanted[file], encoding="utf-8")
        print(f"{file.relative_to(ROOT)}: {'differs from the ledger' if args.check else 'written'}")
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    run(main)
