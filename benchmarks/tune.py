"""Checks the kernels on the GPU here, times launch options near those of the table, and writes what to send in.

python benchmarks/tune.py                      # about ten minutes; writes tune-<card>.json
python benchmarks/tune.py --minutes 3          # less: only the checks, and as many options as there is time for

It compares every operation with its definition in float64, in bfloat16 and float32: in the examples of a run's checks,
and at the sizes of hnet_1stage_small. Then it changes one launch option at a time, of the scan and of attention, and
keeps what is faster and still right. It prints the better entry for hnet_kernels/launch_options.py.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hnet_runtime import UserError, commands  # noqa: E402
from hnet_runtime.pages.reports import write_atomically  # noqa: E402

FASTER = 0.99  # of the time: less is noise


@dataclass
class Tune:
    minutes: float = 10
    """Time for launch options, after the checks."""
    out: str = ""
    """The JSON file. Empty: tune-<card>.json."""


def neighbours(name: str, options: tuple) -> Iterator[tuple]:
    """Options that differ from these in one entry. name: of the field of `Scan` or `Attention`."""
    for warps in (options.warps // 2, options.warps * 2):
        if 2 <= warps <= 16:
            yield options._replace(warps=warps, registers=None if warps == 16 else options.registers)
    for stages in (options.stages - 1, options.stages + 1):
        if 1 <= stages <= 5:
            yield options._replace(stages=stages)
    for registers in (None, 128, 168, 255):
        fits = registers is None or registers * 32 * options.warps <= 65536
        if registers != options.registers and fits:
            yield options._replace(registers=registers)
    if name in ("keys", "forward", "queries"):  # of attention: tokens of the tile in the loop
        for tokens in (32, 64):
            if tokens != options.tokens:
                yield options._replace(tokens=tokens)


def improve(
    table: Any, measure: Callable[[Any], float | None], time_left: Callable[[], bool], say: Callable[[str], None]
) -> tuple[Any, list[dict[str, Any]]]:
    """A table (`Scan` or `Attention`) at least as fast as this one, and all that was timed, in milliseconds.

    measure: the milliseconds of a table, or None where it is wrong or does not run. One option at a time is changed.
    """
    best = measure(table)
    tried = [{"table": table, "ms": best}]
    for name in table._fields:
        before = getattr(table, name)
        others = [n for n in (16, 32, 64) if n != before] if isinstance(before, int) else neighbours(name, before)
        for other in others:
            if not time_left():
                say(f"  {name}: no time left")
                break
            changed = table._replace(**{name: other})
            found = measure(changed)
            tried.append({"table": changed, "ms": found})
            faster = found is not None and (best is None or found < FASTER * best)
            shown = "wrong, or does not run" if found is None else f"{found:.3f} ms"
            say(f"  {name} {other}: {shown}{', taken' * faster}")
            if faster:
                table, best = changed, found
    return table, tried


def main(argv: list[str]) -> int:
    options = commands.parse(Tune, argv, __doc__)
    import torch

    if not torch.cuda.is_available():
        raise UserError("benchmarks/tune.py: needs a GPU, and torch finds none")
    import triton

    from hnet_kernels import cards, launch_options
    from hnet_runtime.checks import agreement

    device = torch.device("cuda", torch.cuda.current_device())
    if reason := cards.why_unsupported(device):
        raise UserError(f"benchmarks/tune.py: {torch.cuda.get_device_name(device)} has {reason}")
    cards.start(device)
    name, family = torch.cuda.get_device_name(device), launch_options.family(cards.capability(device))
    imitated = cards.imitated()
    print(f"{name}, compute capability {'.'.join(map(str, cards.capability(device)))}: the options of {family}")
    about = {
        "gpu": name, "imitates": imitated.name if imitated else None, "capability": cards.capability(device),
        "family": family, "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }  # fmt: skip

    wrong = {}
    for dtype in (torch.bfloat16, torch.float32):
        for operation, how in agreement.operations(device, dtype).items():
            wrong[f"{operation} in {str(dtype).removeprefix('torch.')}"] = how
    from benchmarks import tune_cases

    for label, gap in tune_cases.gaps(device).items():
        if not gap <= tune_cases.ALLOWED:  # not a number is wrong too
            wrong[label] = f"off by {gap:.1e}"
    print("\n".join(f"wrong: {label}: {how}" for label, how in wrong.items()) or "all operations are right")

    until, found, entries = time.monotonic() + 60 * options.minutes, {}, {}
    for label, case in tune_cases.cases(device).items():
        print(label)
        table, tried = improve(case.table, case.measure, lambda: time.monotonic() < until, print)
        case.use(case.table)
        found[label] = [{"options": _plain(one["table"]), "ms": one["ms"]} for one in tried]
        if table != case.table:
            entries[label] = table
    for label, table in entries.items():
        print(f"better for {label}:\n    {table}")
    if not entries:
        print("the table's options are the fastest of those timed")
    path = Path(options.out or f"tune-{name.replace(' ', '-').lower()}.json")
    better = {label: _plain(table) for label, table in entries.items()}
    text = json.dumps(about | {"wrong": wrong, "better": better, "timed": found}, indent=1) + "\n"
    write_atomically(path, lambda scratch: scratch.write_text(text))
    print(f"{path}: please open an issue with this file")
    return 1 if wrong else 0


def _plain(table: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in table._asdict().items()}


if __name__ == "__main__":
    commands.run(main)
