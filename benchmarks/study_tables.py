"""The tables of study.py: differences paired by document and over seeds, and what was run."""

import base64
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hnet_config import HNetConfig
from hnet_runtime.evaluation.boundaries import IN_WORDS, PLACES
from hnet_runtime.evaluation.scoring import Tally, ratio
from hnet_runtime.matching import in_words

Row = dict[str, Any]
# two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom (any table of it)
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
Z95 = 1.96


def t95(freedom: int) -> float:
    """The factor of a 95% interval; infinite without a degree of freedom."""
    return math.inf if freedom < 1 else T95[freedom - 1] if freedom <= len(T95) else Z95 + 2.5 / freedom


def unpacked(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """(nats, bytes) of each held-out document, float64 and int."""
    nats, size = (base64.b64decode(row[name]) for name in ("document_nats", "document_bytes"))
    return np.frombuffer(nats, "<f8"), np.frombuffer(size, "<i4")


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """(deviation of a value from the mean of its group, pooled over groups; degrees of freedom)."""
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((x - statistics.fmean(group)) ** 2 for group in groups for x in group)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


class Difference(NamedTuple):
    """Bits per byte of one architecture minus another's, with half widths of 95% intervals."""

    value: float
    documents: float  # over documents, paired, for these weights
    seeds: float  # over seeds; infinite where no architecture has two

    @property
    def both(self) -> float:
        return math.hypot(self.documents, self.seeds)

    @property
    def is_resolved(self) -> bool:
        return abs(self.value) > self.both


def difference(ours: Sequence[Row], theirs: Sequence[Row], deviation: float, freedom: int) -> Difference:
    """Over documents: the ratio of two sums whose terms are paired. Over seeds: two means with a pooled deviation."""
    means, sizes = [], None
    for rows in (ours, theirs):
        found = [unpacked(row) for row in rows]
        means.append(np.mean([nats for nats, _ in found], axis=0))
        sizes = found[0][1]
    tallies = [Tally(d, n, None, None, n) for d, n in zip((means[0] - means[1]).tolist(), sizes.tolist())]
    numbers = ratio(tallies)
    documents = (numbers["ci95"][1] - numbers["ci95"][0]) / 2 if numbers["ci95"] else math.inf
    spread = math.sqrt(1 / len(ours) + 1 / len(theirs))
    return Difference(numbers["bpb"], documents, t95(freedom) * deviation * spread if freedom else math.inf)


def paired_by_seed(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[float, float] | None:
    """(mean difference over the seeds that both have, half width of its 95% interval), or None below two of them."""
    of_seed = {row["seed"]: row["val_bpb"] for row in theirs}
    gaps = [row["val_bpb"] - of_seed[row["seed"]] for row in ours if row["seed"] in of_seed]
    if len(gaps) < 2:
        return None
    return statistics.fmean(gaps), t95(len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))


def page(rows: list[Row], words: dict[str, str], reference: str) -> str:
    """All tables as Markdown: for each text and number of bytes of the main phase, then learning rates and pilots."""
    failed = [f"{row['key']} failed: {row['failed']}." for row in rows if "failed" in row]
    rows = [row for row in rows if "failed" not in row]
    lines = []
    for heading, some in _groups([row for row in rows if row["phase"] == "main"], rows):
        some, others = _one_rate(some)
        lines += [f"### {heading}", "", *_what_was_run(some), *others, "", *_main(some, words, reference), ""]
        lines += [*_seen(some, words), "", *_while_training(some, words, reference), ""]
        lines += [*_places(some, words), "", *_robustness(some, words), ""]
    for heading, some in _groups(rates_compared(rows), rows):
        lines += [f"### Learning rates: {heading}", "", *_what_was_run(some), "", *_rates(some, words), ""]
    if some := [row for row in rows if row["phase"] == "pilot"]:
        lines += ["### Pilots", "", *_what_was_run(some), "", *_seen(some, words), ""]
    return "\n".join([*lines, *failed]).rstrip("\n") + "\n"


def _groups(rows: list[Row], of_all: list[Row]) -> list[tuple[str, list[Row]]]:
    """(heading, runs) for each text, number of bytes and set of flags. With several texts, headings name the text."""
    texts = list(dict.fromkeys(row["text"]["train"] for row in of_all))
    found = defaultdict(list)
    for row in rows:
        found[(texts.index(row["text"]["train"]), row["train_bytes"], row["train_flags"])].append(row)
    return [
        (f"{size / 1e6:.0f} MB of {f'the text `{texts[text]}`' if len(texts) > 1 else 'text'}", some)
        for (text, size, _), some in sorted(found.items(), key=lambda item: item[0])
    ]


def _one_rate(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The runs of each architecture with the learning rate that has most seeds, and a sentence about the others."""
    found = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["architecture"]][row["lr"]].append(row)
    chosen = {name: max(by_rate, key=lambda lr, r=by_rate: len(r[lr])) for name, by_rate in found.items()}
    kept = [row for row in rows if row["lr"] == chosen[row["architecture"]]]
    left = [f"{row['architecture']} {row['lr']:g}" for row in rows if row not in kept]
    return kept, [f"Left out here, with other learning rates: {', '.join(sorted(set(left)))}."] if left else []


def rates_compared(rows: list[Row]) -> list[Row]:
    """The runs that compare learning rates: of the lr phase, and of the main phase where only the rate differs."""
    same = ("architecture", "seed", "steps", "mbs", "train_flags", "text")
    found = defaultdict(list)
    for row in rows:
        if row["phase"] in ("lr", "main"):
            found[json.dumps([row[name] for name in same], sort_keys=True)].append(row)
    return [
        row
        for some in found.values()
        for row in some
        if len({row["lr"] for row in some}) > 1 or any(row["phase"] == "lr" for row in some)
    ]


def _by_architecture(rows: list[Row], words: dict[str, str]) -> dict[str, list[Row]]:
    found = {name: sorted((r for r in rows if r["architecture"] == name), key=lambda r: r["seed"]) for name in words}
    return {name: some for name, some in found.items() if some}


def _what_was_run(rows: list[Row]) -> list[str]:
    def all_of(name: str) -> str:
        return ", ".join(sorted({str(row[name]) for row in rows}))

    sizes = ", ".join(f"{size / 1e6:.3g} MB" for size in sorted({row["train_bytes"] for row in rows}))
    epochs = ", ".join(sorted({f"{row['epochs']:.2f}" for row in rows}))
    flags = ", ".join(f"`{text}`" for text in sorted({row["train_flags"] for row in rows}))
    return [
        f"{len(rows)} runs of {sizes} ({epochs} epochs of the text), {all_of('mbs')} bytes a step, flags {flags}. "
        f"Scored on {all_of('val_documents')} held-out documents ({all_of('val_bytes')} bytes). Measured "
        f"{all_of('date')}, {all_of('card')}, torch {all_of('torch')}, commit {all_of('commit')}."
    ]


def _main(rows: list[Row], words: dict[str, str], reference: str) -> list[str]:
    found = _by_architecture(rows, words)
    deviation, freedom = pooled_deviation([[r["val_bpb"] for r in some] for some in found.values()])
    table = [["", "bits per byte", "of each seed", "minus the reference", "95%: documents", "95%: seeds", "resolved",
              "paired by seed"]]  # fmt: skip
    for name, some in found.items():
        values = [row["val_bpb"] for row in some]
        cells = [words[name], f"{statistics.fmean(values):.4f}", ", ".join(f"{x:.4f}" for x in values)]
        if name == reference or reference not in found:
            cells += [""] * 5
        else:
            gap = difference(some, found[reference], deviation, freedom)
            seeds = f"±{gap.seeds:.4f}" if math.isfinite(gap.seeds) else "unknown"
            cells += [f"{gap.value:+.4f}", f"±{gap.documents:.4f}", seeds, "yes" if gap.is_resolved else "no"]
            paired = paired_by_seed(some, found[reference])
            cells.append("{:+.4f} ±{:.4f}".format(*paired) if paired else "")
        table.append(cells)
    if freedom:
        note = f"Deviation over seeds, pooled over architectures: {deviation:.4f} ({freedom} degrees of freedom)."
    else:
        note = (
            "Each architecture has one seed, so how far seeds differ is unknown, and no difference counts as resolved."
        )
    return [*_markdown(table), "", note]


def _seen(rows: list[Row], words: dict[str, str]) -> list[str]:
    """Sizes and speeds; FLOPs as planned and with the rates of chunks that runs saw."""
    table = [
        ["", "model", "parameters", "rate", "MFLOP per byte: planned", "seen", "bytes per chunk", "surprisal",
         "entropy of p", "MB/s", "MFU", "GiB"]
    ]  # fmt: skip
    for name, some in _by_architecture(rows, words).items():
        row, config = some[0], HNetConfig.load(some[0]["config"])
        mean = lambda key, some=some: _mean([r.get(key) for r in some])  # noqa: E731
        alone = lambda key, some=some: _mean([r.get(key) for r in some if not r.get("shares_gpu")])  # noqa: E731
        seen = [math.prod(r["rates"]) for r in some]
        stages = [[r["cuts"]["stages"][s] for r in some] for s in range(config.num_stages)]
        enrichment = ", ".join(_number(_mean([s["enrichment"] for s in stage]), 2) for stage in stages)
        entropy = ", ".join(_number(_mean([s["p_entropy"] for s in stage]), 2) for stage in stages)
        table.append(
            [words[name], in_words(config), f"{row['parameters'] / 1e6:.1f}M", f"{row['lr']:g}",
             f"{mean('flops_per_byte') / 1e6:.1f}", f"{mean('flops_seen') / 1e6:.1f}",
             f"{1 / statistics.fmean(seen):.2f}" if config.num_stages else "", enrichment, entropy,
             _number(alone("bytes_per_s") / 1e6, 2), _number(alone("mfu"), 3), _number(mean("peak_gib"), 1)]
        )  # fmt: skip
    note = (
        "Surprisal is that of the bytes that open a chunk over the mean, for each stage, outermost first. Bytes per "
        "chunk are those of the innermost stage in the second half of training. Speeds are those of runs that had "
        "a GPU for themselves."
    )
    return [*_markdown(table), "", note]


def _while_training(rows: list[Row], words: dict[str, str], reference: str) -> list[str]:
    """Loss minus that of the reference on the same batches, in each fifth of the steps."""
    found = _by_architecture(rows, words)
    curves = {row["seed"]: dict(row["bpb_curve"]) for row in found.pop(reference, [])}
    table = [["bits per byte of training text, minus the reference", "seed", "first fifth of the steps", "second",
              "third", "fourth", "last"]]  # fmt: skip
    for name, some in found.items():
        for row in some:
            theirs = curves.get(row["seed"], {})
            gaps = [bpb - theirs[step] for step, bpb in row["bpb_curve"] if step in theirs]
            if len(gaps) >= 5:
                fifths = np.array_split(np.array(gaps), 5)
                table.append([words[name], str(row["seed"]), *(f"{fifth.mean():+.3f}" for fifth in fifths)])
    if len(table) == 1:
        return []
    return [*_markdown(table), "", "A seed gives all architectures the same batches, so these differences are paired."]


def _places(rows: list[Row], words: dict[str, str]) -> list[str]:
    """Where chunks of stage 0 begin, over chance."""
    found = {name: some for name, some in _by_architecture(rows, words).items() if some[0]["cuts"]["stages"]}
    if not found:
        return []
    table = [["chunks of stage 0 begin at", "share of all bytes", *(words[name] for name in found)]]
    for place in PLACES:
        chance = _mean([row["cuts"]["chance"][place] for some in found.values() for row in some])
        cells = [IN_WORDS.get(place, place), f"{chance:.1%}"]
        for some in found.values():
            share = _mean([row["cuts"]["stages"][0]["places"][place] for row in some])
            cells.append(f"{share:.1%} ({share / chance:.2f} times)" if chance else f"{share:.1%}")
        table.append(cells)
    return _markdown(table)


def _robustness(rows: list[Row], words: dict[str, str]) -> list[str]:
    rows = [row for row in rows if row["perturbed_bpb"]]
    if not rows:
        return []
    names = [name for name in rows[0]["perturbed_bpb"] if name != "none"]
    table = [["bits per byte of perturbed text", "unperturbed", *names, "mean increase"]]
    for name, some in _by_architecture(rows, words).items():
        plain = _mean([row["perturbed_bpb"]["none"] for row in some])
        changed = [_mean([row["perturbed_bpb"][change] for row in some]) for change in names]
        increase = statistics.fmean(changed) - plain
        table.append([words[name], f"{plain:.3f}", *(f"{x:.3f}" for x in changed), f"{increase:+.3f}"])
    lines = _markdown(table)
    if any("choices" in row for row in rows):
        table = [["multiple choice", "accuracy per byte", "robustness"]]
        for name, some in _by_architecture(rows, words).items():
            answers = [row["choices"] for row in some if "choices" in row]
            scores = [a["robustness"] for a in answers if a["robustness"] is not None]
            table.append(
                [words[name], f"{_mean([a['accuracy_per_byte'] for a in answers]):.1f}%", _number(_mean(scores), 1)]
            )
        lines += ["", *_markdown(table)]
    return lines


def _rates(rows: list[Row], words: dict[str, str]) -> list[str]:
    found = _by_architecture(rows, words)
    rates = sorted({row["lr"] for row in rows})
    table = [["bits per byte with the learning rate", *(f"{lr:g}" for lr in rates)]]
    for name, some in found.items():
        by_rate = {row["lr"]: row["val_bpb"] for row in some}
        best = min(by_rate, key=by_rate.__getitem__)
        cells = [f"{by_rate[lr]:.4f}" if lr in by_rate else "" for lr in rates]
        table.append([words[name], *(f"**{c}**" if lr == best else c for lr, c in zip(rates, cells))])
    return _markdown(table)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table]
    return [head, "|" + "-|" * len(table[0]), *body]
