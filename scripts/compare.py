"""Runs two checkpoints, or one in two ways, on the same text and shows where they differ.

python scripts/compare.py RUN_A RUN_B --text article.txt
    two models: bits per byte, chunks, predictions
python scripts/compare.py RUN --how-a training --how-b steps
    one model: training forward against steps
python scripts/compare.py RUN --how-b prefill --tolerance 1e-3
    exits with status 1 if a difference exceeds the tolerance
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hnet_runtime import UserError
from hnet_runtime.commands import parse, read_text, run

if TYPE_CHECKING:
    from rich.console import Console

    from hnet_runtime.checks.equivalence import Trace

How = Literal["training", "prefill", "steps"]
TEXT = "Grüße! The model reads bytes; where it begins a chunk is its own choice.\n" * 4


@dataclass
class Options:
    """Compare two checkpoints, or two ways to run one, on given text."""

    a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_A")]
    """A run or checkpoint of train.py, a .pt or .safetensors file or its folder, or hf:owner/name."""
    b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN_B]")] = ""
    """The second; empty: the first again."""
    text: str = ""
    """File with the text, of any bytes."""
    prompt: str = ""
    """The text itself."""
    limit: int = 4096
    """Read this many bytes of the text at most."""
    how_a: How = "training"
    """How the first runs."""
    how_b: How = "training"
    """How the second runs."""
    config_a: str = ""
    """Model config, for weights that come without one."""
    config_b: str = ""
    """The same for the second."""
    tolerance: float = math.inf
    """Exit with status 1 if logits differ by more than this."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: CUDA if torch has it."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype."""
    chunks: Annotated[bool, tyro.conf.arg(aliases=["-k"])] = False
    """Print the text with the chunks of each."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, __doc__)
    if options.text and options.prompt:
        raise UserError("--prompt: given with --text; give one of them")
    if options.limit < 1:
        raise UserError(f"--limit: {options.limit}; expected 1 or more")
    if not options.tolerance >= 0:
        raise UserError(f"--tolerance {options.tolerance}: expected 0 or more")
    if options.config_b and not options.b:
        raise UserError(f"--config-b {options.config_b}: expected also a second model, which it is for")
    text = text_of(options)[: options.limit]
    b, config_b = (options.b, options.config_b) if options.b else (options.a, options.config_a)
    if (options.a, options.how_a) == (b, options.how_b):
        raise UserError("nothing to compare: name a second checkpoint, or another --how-b")
    from rich.console import Console

    from hnet_runtime.pages.chunks import print_chunks

    sides, given_cuts = zip(
        trace(options.a, options.config_a, options.how_a, text, options),
        trace(b, config_b, options.how_b, text, options),
    )
    console = Console(highlight=False)
    names = f"A: {options.a}, {options.how_a}", f"B: {b}, {options.how_b}"
    for name, side in zip(names, sides):
        console.print(name, markup=False, soft_wrap=True)
        if options.chunks:
            print_chunks(text, byte_starts(side)[1:], console)
    worst = report(console, text, *sides, given_cuts)
    return int(not worst <= options.tolerance)  # NaN is too far as well


def text_of(options: Options) -> bytes:
    if not options.text:
        return os.fsencode(options.prompt) or TEXT.encode()
    return read_text(options.text, "--text")


def trace(source: str, config: str, how: How, text: bytes, options: Options) -> "tuple[Trace, bool]":
    """A run of a model on the text, and whether a router of the model depends on later bytes."""
    import torch

    from hnet_runtime.checks import agreement
    from hnet_runtime.checks.equivalence import trace_prefill, trace_steps, trace_training
    from hnet_runtime.runs.weights import load_inference, load_training
    from hnet_simple import why_no_generation
    from hnet_trainable import BOS

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    load = load_training if how == "training" else load_inference
    model = load(source, config or None, device, getattr(torch, options.dtype))
    agreement.choose_implementations(torch.device(device), getattr(torch, options.dtype), model.config)
    run_model = {"training": trace_training, "prefill": trace_prefill, "steps": trace_steps}[how]
    if how != "training" and (reason := why_no_generation(model.config)):
        raise UserError(f"{source}: {reason}; only --how-a and --how-b training are possible")
    return run_model(model, [bytes([BOS]) + text]), bool(model.config.stages_not_causal)


def byte_starts(trace: "Trace") -> list[tuple[bool, ...]]:
    """For BOS and each byte: whether it opens a chunk of stage 0, 1, ..."""
    import torch

    n = len(trace.logits[0])
    at, masks = torch.arange(n), []
    for (b,) in trace.b:
        at = at[b.cpu()]
        masks.append(torch.zeros(n, dtype=torch.bool).index_fill_(0, at, True).tolist())
    return list(zip(*masks)) if masks else [()] * n


def report(console: "Console", text: bytes, a: "Trace", b: "Trace", given_cuts: Sequence[bool]) -> float:
    """Prints the tables. Returns the largest difference of logits.

    given_cuts: whether chunks of A and of B depend on later bytes. Such bits per byte are not shown beside others.
    """
    import torch
    import torch.nn.functional as F
    from rich.table import Table

    from hnet_runtime.evaluation.boundaries import moved

    logits = [trace.logits[0][:, :256].double().cpu() for trace in (a, b)]
    log_p = [x.log_softmax(-1) for x in logits]
    labels = torch.tensor(list(text))
    starts = [byte_starts(trace) for trace in (a, b)]
    table = Table("", "A", "B")
    bits = (f"{F.nll_loss(x[:-1], labels).item() / math.log(2):.4f}" for x in log_p)
    table.add_row("bits per byte", *("given cuts" if given else n for n, given in zip(bits, given_cuts)))
    for s in range(max(len(row[0]) for row in starts)):
        lengths = [len(row) / sum(flags[s] for flags in row) if s < len(row[0]) else None for row in starts]
        table.add_row(f"bytes per chunk of stage {s}", *("" if n is None else f"{n:.2f}" for n in lengths))
    console.print(table)

    difference = (logits[0] - logits[1]).abs().amax(-1)
    kl = (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1)
    table = Table("A against B", "")
    table.add_row("largest difference of logits", f"{difference.max():.2e} at byte {int(difference.argmax())}")
    table.add_row("mean KL divergence, nats", f"{kl.mean():.2e}")
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
    table.add_row("same most likely byte", f"{same:.2%}")
    for s in range(min(len(row[0]) for row in starts)):
        masks = [torch.tensor([flags[s] for flags in row]) for row in starts]
        both, either = (masks[0] & masks[1]).sum().item(), (masks[0] | masks[1]).sum().item()
        first = next(iter((masks[0] != masks[1]).nonzero().flatten().tolist()), None)
        where = "" if first is None else f", first at byte {first}"
        share = moved(*(mask.numpy() for mask in masks))
        table.add_row(f"chunk starts of stage {s}", f"{both} shared, {either - both} not ({share:.1%} of all){where}")
    if a.p and b.p:
        table.add_row(
            "largest difference of p, stage 0", f"{(a.p[0][0].double() - b.p[0][0].double()).abs().max():.2e}"
        )
    console.print(table)
    return difference.nan_to_num(nan=math.inf).max().item()


if __name__ == "__main__":
    run(main, smaller="--limit")
