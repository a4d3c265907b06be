"""Plots one or several runs in one figure: a PNG and one HTML file that needs no network.

python scripts/plot.py runs/a
    writes runs/a/plots.png and runs/a/plots.html
python scripts/plot.py runs/a runs/b --out compared
    writes compared.png and compared.html
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hnet_runtime import UserError
from hnet_runtime.commands import parse, run


@dataclass
class Options:
    """Loss, compression, learning rates, speed and chunk lengths of runs, as PNG and HTML."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[RUN ...]")]
    """Folders of runs of train.py."""
    out: str = ""
    """Write OUT.png and OUT.html. Empty: plots.png and plots.html in the folder of the first run."""


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, __doc__)
    if not options.runs:
        raise UserError("expected the folder of at least one run")
    if options.out.endswith("/"):
        raise UserError(f"--out {options.out}: expected a name in that folder, to which .png and .html are added")
    from hnet_runtime.pages.plots import plot

    for file in plot(list(options.runs), Path(options.out or Path(options.runs[0]) / "plots")):
        print(file)


if __name__ == "__main__":
    run(main)
