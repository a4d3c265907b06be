"""The model card of a saved folder: what the model is, how to load it, what it was trained on, how it cuts text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hnet_runtime.pages.chunks import pieces_of, style_of
from hnet_runtime.pages.reports import write_atomically
from hnet_trainable import BOS

TEXT = (
    "Nobody tells this model what a word is. It reads bytes, and decides for each whether a new chunk begins. "
    "def add(first, second): return first + second"
)
FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- hnet
- byte-level
- custom_code
---

# H-Net
"""
ABOUT = (
    "A language model that reads bytes and learns where to cut them into chunks "
    "([arXiv:2507.07955](https://arxiv.org/abs/2507.07955))"
)
LOAD = """## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "..."  # this repository, or a folder with its files
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
inputs = tokenizer("The river", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=200, do_sample=True)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

Only torch and transformers are needed. The Python files are the model's code, from the repository hnet-trainable
(Apache-2.0). A token is a byte. A text begins with the byte 254, which the tokenizer adds.
"""
COLUMNS = 76  # characters in a line of the picture
CHUNKS, CURVE = "chunks.png", "curve.png"


def write_card(model: Any, folder: Path, with_pictures: bool = True) -> None:
    """Writes README.md, and beside it the pictures that it shows: chunks of a text and, of a run, the curve."""
    curve = (model.config.trained or {}).get("curve") or []
    pictures = {}
    if with_pictures and model.config.hnet_config.num_stages:
        pictures[CHUNKS] = draw_chunks(model, TEXT.encode())
    if len(curve) > 1:
        pictures[CURVE] = draw_curve(curve)
    for name, png in pictures.items():
        write_atomically(folder / name, lambda scratch, png=png: scratch.write_bytes(png))
    text = card(model, set(pictures))
    write_atomically(folder / "README.md", lambda scratch: scratch.write_text(text, encoding="utf-8"))


def card(model: Any, pictures: set[str]) -> str:
    """The text of README.md, beside which there are these pictures."""
    config, trained = model.config.hnet_config, model.config.trained
    count = sum(parameter.numel() for parameter in model.parameters())
    target = " and ".join(f"{ratio:g}" for ratio in config.target_ratios)
    stages = {0: "no chunking stage", 1: "one chunking stage"}.get(S := config.num_stages, f"{S} chunking stages")
    aim = f", trained towards {target} tokens per chunk" if target else ""
    lines = [FRONT, f"{ABOUT}. {count:,} parameters; {stages}{aim}.", "", LOAD]
    if CHUNKS in pictures:
        lines += ["## Chunks", "", f"![A text in which each chunk has a colour]({CHUNKS})", ""]
        lines += ["Each colour is one chunk of a text that was written for this picture.", ""]
    lines += ["## Training", ""]
    if trained:
        seen = f" and {trained['bytes']:,} bytes" if trained.get("bytes") else ""
        lines += [f"Trained on `{trained['data']}` for {trained['steps']:,} steps{seen}.", ""]
        if trained.get("curve"):
            lines += [f"**{trained['curve'][-1][1]:.3f} bits per byte** on held-out text of the same data.", ""]
        if CURVE in pictures:
            lines += [f"![Bits per byte of held-out text over the bytes seen]({CURVE})", ""]
    else:
        lines += ["Nothing is recorded here of how these weights were trained.", ""]
    lines += ["## Config", "", "```json", json.dumps(config.to_dict(), indent=1), "```", ""]
    return "\n".join(lines)


@torch.no_grad()
def draw_chunks(model: Any, text: bytes) -> bytes:
    """A PNG of a text with one colour per chunk."""
    ids_BL = torch.tensor([[BOS, *text]], device=model.device)
    was_training = model.training
    starts = model.eval()(ids_BL, output_boundaries=True).boundaries[0, 1:]
    model.train(was_training)
    starts[0] = True
    cells = []
    for piece in pieces_of(text, starts.tolist()):
        colour = style_of(piece).bgcolor
        cells += [(character, colour.name if colour else "white") for character in piece.text]
    rows = -(-len(cells) // COLUMNS)
    figure = Figure((COLUMNS * 0.11, rows * 0.24), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, COLUMNS), ylim=(rows, 0))
    axes.axis("off")
    for n, (character, colour) in enumerate(cells):
        row, column = divmod(n, COLUMNS)
        axes.add_patch(Rectangle((column, row), 1, 0.92, color=colour, linewidth=0))
        axes.text(column + 0.5, row + 0.5, character, ha="center", va="center", family="monospace", size=9)
    return _png(figure)


def draw_curve(curve: list[list[float]]) -> bytes:
    """A PNG of bits per byte over bytes seen."""
    figure = Figure((6, 3), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([seen for seen, _ in curve], [bpb for _, bpb in curve], marker="." if len(curve) < 40 else "")
    axes.set(xlabel="bytes seen in training", ylabel="bits per byte, held-out text")
    axes.grid(alpha=0.3)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
