"""Writes result files atomically, and an evaluation as a page of Markdown tables."""

import contextlib
import fcntl
import glob
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hnet_runtime import UserError


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file atomically: `write` writes a temporary file, which is renamed to `path` when it is on disk.

    Raises UserError if it can't be written.
    """
    try:
        _remove_left_over(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        scratch = Path(name)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            write(scratch)
            scratch.chmod(0o644)
            with open(scratch, "rb") as written:
                os.fsync(written.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
            os.close(handle)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None


def _remove_left_over(path: Path) -> None:
    """Removes the temporary files that killed writers of a file left. One that is being written is locked."""
    for scratch in path.parent.glob(f".{glob.escape(path.name)}.????????{glob.escape(path.suffix)}"):
        with contextlib.suppress(OSError), open(scratch, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            scratch.unlink()


def markdown(result: dict[str, Any]) -> str:
    """The Markdown page of a result, as scripts/evaluate.py writes it in JSON."""
    lines = [f"# {result['checkpoint']}", "", f"{result['dtype']} on {result['device']}, {result['seconds']} s"]
    if speed := result.get("bytes_per_s"):
        lines[-1] += f", text scored at {speed:,.0f} bytes/s"
    if text := result.get("text"):
        name = "bpb" if "bpb" in text else "bpb_given_cuts"
        lines += ["", f"## Bits per byte: {text['data']}", "", f"Rows: {text['rows']}. Each byte is scored once."]
        if name != "bpb":
            lines += ["", "Chunks of this model begin where later bytes say, which tells it something of those bytes."]
            lines += ["These numbers do not compare with those of other models."]
        groups = [("all", text)]
        for kind, named in (("by_label", "{}"), ("by_length", "documents of {} bytes"), ("by_position", "bytes {}")):
            groups += [(named.format(name), row) for name, row in text.get(kind, {}).items()]
        table = [("", name.replace("bpb", "bits per byte").replace("_", " "), "95% interval", "documents", "bytes")]
        for group, row in groups:
            interval = "{:.4f} to {:.4f}".format(*row["ci95"]) if row.get("ci95") else ""
            table.append((group, f"{row[name]:.4f}", interval, f"{row.get('documents', '')}", f"{row['bytes']:,}"))
        lines += ["", *_table(table)]
        if found := text.get("cuts"):
            lines += ["", "## Where chunks begin", "", *cuts_in_words(found), "", *cuts_table(found)]
    if choices := result.get("choices"):
        lines += ["", f"## Multiple choice: {choices['file']}", ""]
        lines += [
            f"{choices['questions']} questions; accuracy {choices['accuracy']:.1f}%, per byte "
            f"{choices['accuracy_per_byte']:.1f}%, by chance {choices['chance']:.1f}%.",
            "",
        ]
        table = [("perturbed, accuracy per byte", "prompt", "endings", "both", "mean", "robustness")]
        for name, row in choices["perturbed"].items():
            table.append(
                (name, *(f"{row[p]:.1f}" for p in ("prompt", "endings", "both", "mean")), _score(row["score"]))
            )
        table.append(("all five", "", "", "", "", _score(choices["robustness"])))
        lines += _table(table)
    if tasks := result.get("tasks"):
        table = [("task", "metric", "value", "standard error")]
        for task, metrics in tasks.items():
            for name, value in metrics.items():
                metric, comma, of_filter = name.partition(",")
                if not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr{comma}{of_filter}")
                    table.append((task, name, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
        lines += ["", "## lm-evaluation-harness", "", *_table(table), "", *_of_requests(result.get("harness", {}))]
    return "\n".join(lines)


def cuts_in_words(found: dict[str, Any]) -> list[str]:
    """A line for each stage of `evaluation.boundaries.summary`."""
    lines = []
    for s, stage in enumerate(found["stages"]):
        enrichment, entropy = ("-" if x is None else f"{x:.2f}" for x in (stage["enrichment"], stage["p_entropy"]))
        lines.append(
            f"- Stage {s}: {stage['cuts']:,} chunks; surprisal of the bytes that open them {enrichment} times the "
            f"mean; entropy of p {entropy} bits."
        )
    return lines


def cuts_table(found: dict[str, Any]) -> list[str]:
    """A table of the places where the chunks of `evaluation.boundaries.summary` begin, beside chance."""
    from hnet_runtime.evaluation.boundaries import IN_WORDS

    head = ["first byte of a chunk", "share of all bytes"]
    head += [f"of chunks of stage {s}" for s in range(len(found["stages"]))]
    table = [tuple(head)]
    for name, chance in found["chance"].items():
        shares = [stage["places"][name] for stage in found["stages"]]
        cells = [f"{share:.1%} ({share / chance:.2f} times)" if chance else f"{share:.1%}" for share in shares]
        table.append((IN_WORDS.get(name, name), f"{chance:.1%}", *cells))
    return _table(table)


def _of_requests(how: dict[str, Any]) -> list[str]:
    """Sentences about shortened requests of the harness."""
    lines = []
    if made := how.get("loglikelihood"):
        cut = made["prompts_cut_on_the_left"]
        lines.append(f"{made['requests']:,} log-likelihoods; {cut:,} of their prompts lost their beginning.")
    if made := how.get("loglikelihood_rolling"):
        lines.append(
            f"{made['requests']:,} log-likelihoods of whole texts; {made['read_in_windows']:,} read in windows."
        )
    if made := how.get("generate_until"):
        lines.append(
            f"{made['requests']:,} answers at {made['bytes_per_s']:,.0f} bytes/s; {made['ended_at_limit']:,} ended at "
            f"their limit, a token being counted as {how['bytes_per_token']:g} bytes; "
            f"{made['limits_shortened_to_context']:,} limits were shortened to fit the context."
        )
    if lines:
        lines.append(f"Context: {how['context']:,} bytes.")
    if ignored := how.get("ignored_options"):
        lines.append(f"Generation options of tasks that were ignored: {', '.join(ignored)}.")
    return lines


def _score(score: float | None) -> str:
    return "not above chance" if score is None else f"{score:.1f}"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    head, *body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [head, "|" + "-|" * (head.count("|") - 1), *body]
