"""Shows the chunks of a text in one HTML file that needs no network.

    python scripts/explore.py RUN --text article.txt --out page.html
    python scripts/explore.py RUN_A RUN_B --text article.txt
        two checkpoints side by side

The page shows the nested chunks of every stage, boundary probabilities on hover, and the bits of each byte as a heat
map.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from hnet_runtime import UserError
from hnet_runtime.commands import parse, read_text, run

TEXT = "Grüße! The model reads bytes; where it begins a chunk is its own choice.\n" * 4


@dataclass
class Options:
    """Writes a page that shows how one or two checkpoints cut a text into chunks."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run or checkpoint of train.py, a .pt or .safetensors file or its folder, or hf:owner/name."""
    other: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN]")] = ""
    """A second one, shown beside the first."""
    text: str = ""
    """File with the text, of any bytes. Empty: a few example lines."""
    out: str = "chunks.html"
    """HTML file to write."""
    config: Annotated[str, tyro.conf.arg(aliases=["-c"])] = ""
    """Model config, for weights that come without one."""
    config_other: str = ""
    """The same for the second."""
    context: int = 8192
    """Most bytes that the model reads at once; a longer text is read in rows that overlap by half."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: CUDA if torch has it."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype."""


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, __doc__)
    if options.context < 2:
        raise UserError(f"--context {options.context}: expected 2 or more")
    if options.config_other and not options.other:
        raise UserError(f"--config-other {options.config_other}: expected also a second model, which it is for")
    text = read_text(options.text, "--text") if options.text else TEXT.encode()
    import torch

    from hnet_runtime.checks import agreement
    from hnet_runtime.pages import explorer
    from hnet_runtime.pages.reports import write_atomically
    from hnet_runtime.runs.weights import load_training

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    sources = [(options.checkpoint, options.config)]
    if options.other:
        sources.append((options.other, options.config_other))
    analyses, targets, given_cuts, seconds = [], [], [], 0.0
    for source, config in sources:
        model = load_training(source, config or None, device, getattr(torch, options.dtype))
        agreement.choose_implementations(torch.device(device), getattr(torch, options.dtype), model.config)
        began = time.perf_counter()
        analyses.append(explorer.analyse(model, text, options.context, options.context // 2))
        seconds += time.perf_counter() - began
        targets.append(model.config.learned_ratios)
        given_cuts.append(bool(model.config.stages_not_causal))
    names = [source for source, _ in sources]
    title = Path(options.text).name or "A few lines"
    page = explorer.page(text, names, analyses, targets, title, given_cuts)
    write_atomically(Path(options.out), lambda scratch: scratch.write_bytes(page.encode("utf-8", "backslashreplace")))
    speed = len(text) * len(sources) / max(seconds, 1e-9)
    size = f"{len(page) / 1e6:.1f} MB"
    print(f"{options.out}: {len(text):,} bytes of text, read at {speed:,.0f} bytes/s, {size}; open it in a browser")


if __name__ == "__main__":
    run(main, smaller="--context")
