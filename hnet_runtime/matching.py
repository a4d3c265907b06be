"""Configs that train with equal FLOPs per byte, for fair comparisons.

FLOPs depend on the lengths of rows (attention) and on how many chunks routers open. So they are counted over rows of
the text at hand and with rates of chunks that were measured, such as in a pilot run.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fineweb
from hnet_config import HNetConfig, parse_layout
from hnet_runtime import UserError
from hnet_runtime.flops import count_flops
from hnet_runtime.runs.metrics import read_metrics

TOLERANCE = 0.03  # how far two configs may differ and still count as equal
WIDTHS, HEAD = range(64, 4097, 64), 64  # widths that are tried, and the width of a head
ROTARY = 32
# width over depth that is aimed at: LlamaByte of the paper has 16 layers of width 1,024, MambaByte 28
SHAPES = {"T": 1024 / 16, "m": 1024 / 28}


def row_lengths(stream: fineweb.ByteStream, slices: int = 64) -> list[int]:
    """The lengths of the rows in the first slices that a run reads from this stream."""
    return [int(n) for i in range(slices) for n in stream.slice(i).row_lengths]


def planned_rates(config: HNetConfig) -> list[float]:
    """The share of tokens that open a chunk at each stage, if every stage meets its target."""
    return [1 / N for N in config.target_ratios]


def flops_per_byte(config: HNetConfig, rows: Sequence[int], rates: Sequence[float]) -> float:
    """FLOPs of a training step per byte: matrix products and mixing, forward and backward.

    rows: lengths of rows. rates: the share of each stage's tokens that open a chunk; every row opens one at least.
    """
    if len(rates) != config.num_stages:
        raise UserError(f"{len(rates)} rates of chunks for {config.num_stages} chunking stages; give one for each")
    lengths = [list(rows)]
    for rate in rates:
        lengths.append([max(1, round(n * rate)) for n in lengths[-1]])
    return count_flops(config, lengths).total / sum(rows)


def match(
    config: HNetConfig, target: float, rows: Sequence[int], rates: Sequence[float], tolerance: float = TOLERANCE
) -> HNetConfig:
    """The config with as many innermost layers as bring its FLOPs per byte nearest to `target`.

    If whole layers are too coarse, the inner width of the innermost MLPs changes as well, in steps of 128.
    Raises UserError if the nearest is not within the tolerance.
    """

    def off(candidate: HNetConfig) -> float:
        return flops_per_byte(candidate, rows, rates) / target - 1

    one, two = (off(_with_depth(config, n)) for n in (1, 2))
    depth = max(1, round(1 - one / (two - one)))
    found = _with_depth(config, depth)
    if abs(off(found)) > tolerance and any(
        layer.has_mlp for layer in parse_layout(config.layouts(config.num_stages)[0])
    ):
        widths = list(found.d_intermediate)
        near = [_with(found, d_intermediate=[*widths[:-1], w]) for w in range(128, 2 * widths[-1] + 128, 128)]
        found = min(near, key=lambda candidate: abs(off(candidate)))
    if abs(off(found)) > tolerance:
        raise UserError(
            f"{in_words(found)}: its FLOPs per byte are {1 + off(found):.3f} times the target, and no other number of "
            f"innermost layers is nearer; expected within {tolerance:.0%}"
        )
    return found


def isotropic(
    letter: str, target: float, rows: Sequence[int], like: HNetConfig, tolerance: float = TOLERANCE
) -> HNetConfig:
    """A byte model without chunks whose FLOPs per byte are the target: blocks of one letter at one width.

    Attention has the window of the other config's byte stage. Of all widths and depths within the tolerance it takes
    the one that is near the target and near the shape of the paper's models (SHAPES): half a percent of FLOPs counts as
    much as a fifth of the shape. like: gives options and the window. Raises UserError if there is none.
    """
    found = []
    for width in WIDTHS:
        usual = max(1, round(width * 8 / 3 / 128)) if letter.isupper() else 0
        for mlp in sorted({max(1, usual + change) for change in (-1, 0, 1)} if usual else {0}):
            make = functools.partial(_isotropic, letter, width, mlp=128 * mlp, like=like)
            one, two = (flops_per_byte(make(depth=n), rows, []) for n in (1, 2))
            depth = max(1, round(1 + (target - one) / (two - one)))
            off = abs((one + (depth - 1) * (two - one)) / target - 1)
            shape = abs(math.log2(width / depth / SHAPES.get(letter, 64))) + abs(mlp - usual) / 4
            if off <= tolerance:
                found.append((shape + 50 * off, width, depth, mlp))
        if one > 2 * target:
            break
    if not found:
        raise UserError(f"no model of {letter} layers has {target:.3g} FLOPs per byte within {tolerance:.0%}")
    _, width, depth, mlp = min(found)
    return _isotropic(letter, width, depth, 128 * mlp, like)


def _isotropic(letter: str, width: int, depth: int, mlp: int, like: HNetConfig) -> HNetConfig:
    attention = {"num_heads": [width // HEAD], "rotary_emb_dim": [ROTARY]}
    return HNetConfig.load(
        {
            "arch_layout": [f"{letter}{depth}"],
            "d_model": [width],
            "d_intermediate": [mlp],
            "vocab_size": like.vocab_size,
            "ssm_cfg": dataclasses.asdict(like.ssm_cfg),
            "attn_cfg": attention | {"window_size": [like.attn_cfg.window_size[0]]},
            "N_compress": [1],
        }
    )


def _with(config: HNetConfig, **keys: Any) -> HNetConfig:
    return HNetConfig.load(config.to_dict(), **keys)


def _with_depth(config: HNetConfig, depth: int) -> HNetConfig:
    """The config with so many layers in the last run of letters of its innermost network."""

    def deepen(node: Any, s: int) -> Any:
        if s == config.num_stages:
            return [re.sub(r"[0-9]+$", str(depth), node[0])]
        return [node[0], deepen(node[1], s + 1), node[2]]

    return _with(config, arch_layout=deepen(config.arch_layout, 0))


def in_words(config: HNetConfig) -> str:
    """Layout and widths: `m4 (T16) m4, 512/1024`."""

    def layout(node: Any) -> str:
        return node[0] if len(node) == 1 else f"{node[0]} ({layout(node[1])}) {node[2]}"

    return f"{layout(config.arch_layout)}, {'/'.join(map(str, config.d_model))}"


def of_run(folder: str | Path) -> tuple[HNetConfig, list[float]]:
    """A run's config, and the rates of chunks that it saw: means over the second half of its steps so far."""
    config, records = HNetConfig.load(Path(folder) / "config.json"), read_metrics(Path(folder) / "metrics.jsonl")
    if not records:
        raise UserError(f"{folder}: has no metrics; expected a run of train.py")
    return config, seen_rates(records, config.num_stages)


def seen_rates(records: Sequence[dict[str, Any]], stages: int) -> list[float]:
    """The share of tokens that open a chunk at each stage, in the second half of these records."""
    half = records[len(records) // 2 :]
    return [sum(record[f"stage{s}_F"] for record in half) / len(half) for s in range(stages)]
