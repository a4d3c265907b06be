"""Finds a model that trains with as many FLOPs per byte as another, and writes its config.

    python scripts/match.py hnet_1stage_L --data DIR --rates 0.18 --layers T --out t.json
        a byte Transformer without chunks: width and depth; m is Mamba-2
    python scripts/match.py hnet_1stage_L --data DIR --rates 0.18 --change hnet_2stage_L
        another H-Net, with the number of innermost layers that matches
    python scripts/match.py hnet_1stage_L --data DIR --runs runs/a runs/b
        FLOPs per byte of runs, from the rates of chunks in their later half

A rate is the share of a stage's tokens that open a chunk, such as 0.18. Without --rates, each stage is counted at its
target compression.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from hnet_runtime import UserError
from hnet_runtime.commands import parse, run


@dataclass
class Options:
    """Finds a model with as many FLOPs per byte as another."""

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """The config to match: a JSON file, or a name from configs/."""
    data: str = "data/stdlib"
    """Folder made by `fineweb.py prepare`: the lengths of its documents count."""
    rates: str = ""
    """Rates of chunks of the config, outermost first, separated by commas. Empty: those of its targets."""
    layers: str = ""
    """Letter of the layers of a model without chunks, such as T or m."""
    change: str = ""
    """Config whose number of innermost layers is to change."""
    change_rates: str = ""
    """Rates of chunks of --change. Empty: those of its targets."""
    runs: Annotated[list[str], tyro.conf.arg(metavar="RUN ...")] = field(default_factory=list)
    """Runs of train.py, to compare what they saw with the plan."""
    mbs: int = 32768
    """Bytes per slice, as in train.py."""
    max_doc: int = 8192
    """Longest row, as in train.py."""
    seed: int = 0
    """Seed of the order of the text, as in train.py."""
    tolerance: float = 0.03
    """How far FLOPs per byte may differ."""
    out: str = ""
    """Write the config to this JSON file."""


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, __doc__)
    if bool(options.layers) + bool(options.change) + bool(options.runs) != 1:
        raise UserError("--layers, --change, --runs: expected one of them")
    if options.change_rates and not options.change:
        raise UserError(f"--change-rates {options.change_rates}: expected also --change, which it is for")
    if options.out and options.runs:
        raise UserError(f"--out {options.out}: --runs finds no config to write; expected --layers or --change")
    if not 0 < options.tolerance < 1:
        raise UserError(f"--tolerance {options.tolerance}: expected a share between 0 and 1, such as 0.03")
    for name in ("mbs", "max_doc"):
        if not 1 <= getattr(options, name) < 2**31:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(options, name)}: expected 1 or more, and less than 2**31")
    import fineweb
    from hnet_config import MIXERS
    from hnet_runtime import matching
    from hnet_runtime.pages.reports import write_atomically
    from hnet_runtime.runs.checkpoint import write_json
    from hnet_trainable import HNetConfig

    letters = [*MIXERS, *map(str.upper, MIXERS)]  # after hnet_trainable.py has registered its own
    if options.layers and options.layers not in letters:
        raise UserError(f"--layers {options.layers}: expected one letter of {', '.join(letters)}")
    sizes = {"slice_bytes": options.mbs, "max_doc": options.max_doc, "seed": options.seed}
    rows = matching.row_lengths(fineweb.ByteStream(options.data, "train", **sizes))
    reference = HNetConfig.load(options.config)
    rates = read_rates(options.rates, "--rates", reference)
    target = matching.flops_per_byte(reference, rows, rates)

    def show(config: HNetConfig, rates: Sequence[float], how: str) -> None:
        flops = matching.flops_per_byte(config, rows, rates)
        of = f", rates {', '.join(f'{rate:.3f}' for rate in rates)}" if rates else ""
        print(
            f"{how}: {matching.in_words(config)}, {config.count_parameters() / 1e6:.1f}M parameters{of}: "
            f"{flops / 1e6:.1f} MFLOP per byte, {flops / target:.3f} of the first"
        )

    show(reference, rates, f"planned, {options.config}")
    for folder in options.runs:
        config, seen = matching.of_run(folder)
        show(config, seen, f"as seen, {folder}")
    if options.runs:
        return
    if options.layers:
        found, found_rates = matching.isotropic(options.layers, target, rows, reference, options.tolerance), []
    else:
        other = HNetConfig.load(options.change)
        found_rates = read_rates(options.change_rates, "--change-rates", other)
        found = matching.match(other, target, rows, found_rates, options.tolerance)
    if options.out:
        write_atomically(Path(options.out), lambda scratch: write_json(scratch, found.to_dict()))
    show(found, found_rates, f"planned, {options.out or 'matched'}")


def read_rates(text: str, flag: str, config) -> list[float]:
    from hnet_runtime import matching

    if not text:
        return matching.planned_rates(config)
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate <= 1 for rate in rates) or len(rates) != config.num_stages:
        raise UserError(f"{flag} {text}: expected {config.num_stages} shares above 0 and at most 1, joined by commas")
    return rates


if __name__ == "__main__":
    run(main, smaller="--mbs")
