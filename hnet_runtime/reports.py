"""Results as files that appear whole, and an evaluation's as a page of Markdown tables."""

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hnet_runtime import UserError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write a file that becomes `path` once it is complete; until then, what was there stays.

    Raises UserError where that can't be done.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        scratch = Path(name)
        try:
            write(scratch)
            scratch.chmod(0o644)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None


def markdown(result: dict[str, Any]) -> str:
    """`result`: what scripts/evaluate.py writes as JSON."""
    lines = [f"# {result['checkpoint']}", "", f"{result['dtype']} on {result['device']}, {result['seconds']} s"]
    if text := result.get("text"):
        lines += ["", f"## Bits per byte: {text['data']}", "", f"Rows: {text['rows']}. Each byte is scored once."]
        groups = [("all", text)]
        for kind, prefix in (("by_label", ""), ("by_length", "documents of "), ("by_position", "bytes at ")):
            groups += [(f"{prefix}{name}", row) for name, row in text.get(kind, {}).items()]
        table = [("", "bits per byte", "95% interval", "documents", "bytes")]
        for name, row in groups:
            interval = "{:.4f} to {:.4f}".format(*row["ci95"]) if row.get("ci95") else ""
            table.append((name, f"{row['bpb']:.4f}", interval, f"{row.get('documents', '')}", f"{row['bytes']:,}"))
        lines += ["", *_table(table)]
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
        table = [("task", "metric", "value")]
        for task, metrics in tasks.items():
            table += [(task, name, f"{value:.4f}") for name, value in metrics.items()]
        lines += ["", "## lm-evaluation-harness", "", *_table(table)]
    return "\n".join(lines)


def _score(score: float | None) -> str:
    return "not above chance" if score is None else f"{score:.1f}"


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    head, *body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [head, "|" + "-|" * (head.count("|") - 1), *body]
