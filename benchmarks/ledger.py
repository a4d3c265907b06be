"""The record of measurements, ledger.jsonl: one JSON object per line, each with a key of its own.

Every entry has `key`, `date`, `card`, `commit`, `torch` and `command`, and then its numbers, with the unit at the end
of the name (`UNITS`). `what` says in words what was measured. An entry about somebody else's code or text has `source`
in place of `commit`. `commit_of` is "results" where only the commit that added the result is known, not that of the
code, and else "code".

Each benchmark appends to it with `--ledger benchmarks/ledger.jsonl`; `render.py` writes the pages that cite it.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks" / "ledger.jsonl"
UNITS = ("ms", "us", "s", "min", "gib", "mib", "bytes", "bytes_per_s", "mb_per_s", "tb_per_s", "tflop_per_s", "tflop")
UNITS += ("gflop_per_byte", "mflop_per_byte", "bpb", "percent", "ratio", "count")
TEXTS = ("key", "date", "card", "commit", "commit_of", "source", "torch", "command", "what", "code", "config", "note")


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Returns the entries by key, in the order of the file. Raises ValueError for a line that is no entry."""
    entries: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            key = entry["key"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(f"{file}:{number}: expected a JSON object with a key") from None
        if key in entries:
            raise ValueError(f"{file}:{number}: key {key} is there already; expected a key of its own")
        entries[key] = entry
    return entries


def append(file: str | Path, name: str, numbers: dict[str, Any], root: Path = ROOT, **texts: str) -> str:
    """Add one entry and return its key: name/card/date, with -2, -3, ... where that key is taken.

    `name` is like "train/hnet_1stage_small/graph". `root` is the checkout that was measured. `texts` are further fields
    in words, such as `what`.
    """
    file = Path(file)
    entries = read(file) if file.exists() else {}
    card, today = card_name(), date.today().isoformat()
    key = base = "/".join([name, short_name(card), today])
    for n in range(2, len(entries) + 3):
        if key not in entries:
            break
        key = f"{base}-{n}"
    entry = {"key": key, "date": today, "card": card, "commit": commit(root), "commit_of": "code"}
    entry |= {"torch": torch_version(), "command": command_line(), **texts}
    entry |= {n: rounded(x) for n, x in numbers.items() if x is not None and x == x}  # x == x: not NaN
    with open(file, "a", encoding="utf-8") as f:
        f.write(json.dumps(entry, ensure_ascii=False) + "\n")
    print(f"{file}: added {key}", file=sys.stderr)
    return key


def command_line() -> str:
    """This process's command, without --ledger; of a path outside this repository only the last name."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word == "--ledger":
            next(given, None)
        elif not word.startswith("--ledger="):
            words.append(Path(word).name if word.startswith("/") else word)
    return shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *words])


def rounded(x: Any) -> Any:
    """Floats with five significant digits: what a benchmark repeats varies from the third on."""
    return float(f"{x:.5g}") if isinstance(x, float) else [rounded(y) for y in x] if isinstance(x, list) else x


def short_name(card: str) -> str:
    """`h200` of "NVIDIA H200", `cpu` of a processor."""
    found = re.search(r"\b[A-Z]+\d+\b", card) if card.startswith(("NVIDIA", "AMD Instinct")) else None
    return found[0].lower() if found else "cpu"


def card_name() -> str:
    """The GPU's name, or the processor with the number of cores that this process may use."""
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU, {cores} core{'s' * (cores != 1)}, {platform.machine()}"


def torch_version() -> str:
    import torch

    return torch.__version__


def commit(root: Path) -> str:
    """The commit of a checkout, with + where its files differ from it; `unknown` outside git."""
    git = ["git", "-C", str(root)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, check=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changes = [line for line in changed.stdout.splitlines() if not line.endswith("benchmarks/ledger.jsonl")]
    return revision.stdout.strip() + "+" * bool(changes)


if __name__ == "__main__":
    sys.stderr.write("error: benchmarks/ledger.py is no command; expected python benchmarks/render.py\n")
    sys.exit(2)
