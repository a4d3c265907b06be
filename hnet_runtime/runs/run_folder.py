"""The checkpoints in a run's folder: which are complete, with which flags, steps and model code they were saved.

Nothing here imports torch: train.py reads the flags of a resumed run before anything else.
"""

import ast
import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from hnet_runtime import UserError
from hnet_runtime.pages.reports import write_atomically

WITHOUT = "without this folder, --resume auto resumes from the checkpoint before"


ROOT = Path(__file__).resolve().parents[2]
MODEL = "hnet_trainable.py"  # this and what it imports has the model's formulas


def model_code() -> dict[str, str]:
    """Fingerprints of the files with the model's formulas, as they are now: each file, and hnet_kernels as a whole."""
    found: dict[str, str] = {}
    left = [MODEL]
    while left:
        name = left.pop()
        if name in found or not (ROOT / name).exists():
            continue
        files = sorted((ROOT / name).glob("*.py")) or [ROOT / name]
        found[name] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
        if name.endswith(".py"):
            left += [name if name == "hnet_kernels" else f"{name}.py" for name in _imported(ROOT / name)]
    return dict(sorted(found.items()))


def _imported(file: Path) -> list[str]:
    """The first parts of the names of the modules that a file imports; none where it can't be parsed."""
    with contextlib.suppress(SyntaxError):
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
        return [name.partition(".")[0] for name in names]
    return []


def keep_model_files(run: Path) -> None:
    """Copies hnet_trainable.py and the files that it imports into a run's folder, with fingerprints in their names."""
    for name, fingerprint in model_code().items():
        copy = run / f"{name.removesuffix('.py')}-{fingerprint}.py"
        if name.endswith(".py") and not (copy.is_file() and copy.stat().st_size == (ROOT / name).stat().st_size):
            write_atomically(copy, lambda scratch, name=name: scratch.write_bytes((ROOT / name).read_bytes()))


def changed_model(train: dict[str, Any]) -> str:
    """That a checkpoint with this `train.json` was written by other files; empty if not, or where it does not say."""
    ours, theirs = model_code(), train.get("model_code") or {}
    differing = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
    changed = [f"{name} (fingerprint {theirs[name]}, here {ours[name]})" for name in differing]
    return f"was written with another {' and '.join(changed)}" if changed else ""


class CheckpointError(UserError):
    """Weights can't be read or don't fit. The message names the file and what was expected."""


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step_{step:08d}"


def is_complete(folder: Path) -> bool:
    """Whether the manifest exists and every file in it has the size given there."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        sizes_fit = all((folder / name).stat().st_size == size for name, size in manifest.items())
        return sizes_fit and ".metadata" in manifest
    except (OSError, ValueError, AttributeError):
        return False


def _steps(run: Path) -> list[Path]:
    return sorted(p for p in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8,}(\.writing)?", p.name))


def complete(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [p for p in _steps(run) if p.suffix != ".writing" and is_complete(p)]


def oldest_step(run: Path) -> int:
    """The steps done by the oldest complete checkpoint of a run; 0 if there is none."""
    found = complete(run)
    return int(found[0].name.removeprefix("step_")) if found else 0


def incomplete(run: Path) -> list[Path]:
    """The folders of checkpoints that a crash left unfinished or that were damaged later."""
    return [p for p in _steps(run) if p.suffix == ".writing" or not is_complete(p)]


def read_train(checkpoint: Path) -> dict[str, Any]:
    """The `train` argument of `save`, plus `step`. Raises UserError for a folder that isn't a complete checkpoint."""
    if not is_complete(checkpoint):
        raise UserError(f"{checkpoint}: not a complete checkpoint (no manifest.json, or files that differ from it)")
    try:
        train = json.loads((checkpoint / "train.json").read_text(encoding="utf-8"))
    except ValueError:
        train = None
    if not isinstance(train, dict) or not isinstance(train.get("config", {}), dict):
        raise CheckpointError(f"{checkpoint / 'train.json'}: damaged, not what train.py writes; {WITHOUT}")
    return train


def train_config_of(source: str) -> dict[str, Any] | None:
    """The flags of train.py of a run or one of its checkpoints; None for other weights."""
    folder = Path(source)
    if found := complete(folder):
        folder = found[-1]
    return read_train(folder)["config"] if (folder / "train.json").exists() else None
