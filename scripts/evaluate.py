"""Measure a checkpoint: bits per byte of any text, robustness on multiple-choice questions, lm-evaluation-harness.

python scripts/evaluate.py RUN                                 the held-out text of the run, as training validates
python scripts/evaluate.py RUN --data texts/ --stride 4096     any text that fineweb.py reads, whole documents
python scripts/evaluate.py RUN --data a.jsonl --by language    bits per byte of each language
python scripts/evaluate.py RUN --choices hellaswag_val.jsonl   accuracy and the five-perturbation robustness score
python scripts/evaluate.py RUN --tasks arc_easy,lambada_openai
torchrun --nproc-per-node 8 scripts/evaluate.py ...            the same numbers, sooner
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import fineweb
from hnet_runtime import UserError, checkpoint, choices, distributed, harness, scoring
from hnet_runtime.reports import markdown, write_whole
from hnet_runtime.weights import load_training
from hnet_trainable import ConfigError


@dataclass
class Options:
    """Bits per byte of held-out or other text, robustness, and lm-evaluation-harness, for one checkpoint."""

    checkpoint: tyro.conf.Positional[str]
    """A run or checkpoint of train.py, a .pt or .safetensors file or its folder, or hf:owner/name."""
    config: Annotated[str, tyro.conf.arg(aliases=["-c"])] = ""
    """Model config, for weights that come without one."""
    data: str = ""
    """Text to score: a folder of `fineweb.py prepare`, or what that command takes: files, a folder, stdlib,
    hf:owner/name. Empty: what the run validates on, cut into rows as there, which gives the run's val_bpb."""
    split: Literal["validation", "train"] = "validation"
    """Which part of a prepared folder."""
    text_column: str = "text"
    """Where .jsonl and .parquet have their text."""
    by: str = ""
    """Also bits per byte by group: `script`, told from the letters, or a column of .jsonl and .parquet with labels."""
    context: int = 0
    """Most bytes that the model reads at once. 0: 8192, or with the run's own text the rows of training."""
    stride: int = 0
    """Bytes that each row after a document's first scores, the others being context. 0: as many as --context."""
    limit: int = 0
    """Score only so many documents (or questions, or items of each task); 0: all."""
    batch: int = 16
    """Rows that run together. Changes the speed alone."""
    choices: str = ""
    """A .jsonl file of questions in the HellaSwag format."""
    seed: int = 0
    """Seed of the random perturbations."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness, joined by commas (needs the extra lm_eval)."""
    out: str = ""
    """Write OUT.json and OUT.md."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision; auto: bfloat16 on CUDA, float32 on the CPU."""


def main(argv: Sequence[str]) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    for name, least in (("context", 0), ("stride", 0), ("limit", 0), ("batch", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: expected {least} or more")
    if options.stride > (options.context or scoring.CONTEXT):
        raise UserError(f"--stride {options.stride}: expected at most --context {options.context or scoring.CONTEXT}")
    if options.out and not os.access(folder := Path(options.out).absolute().parent, os.W_OK):
        raise UserError(f"--out {options.out}: {folder} is no folder that can be written to")
    began = time.perf_counter()
    questions = choices.read_questions(options.choices) if options.choices else []
    world = distributed.start(options.device)
    if options.tasks and world.size > 1:
        raise UserError(f"--tasks: runs on one process, not {world.size}")
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if world.device.type == "cuda" else "float32"
    model = load_training(options.checkpoint, options.config or None, world.device, getattr(torch, dtype)).eval()

    result: dict[str, Any] = {"checkpoint": options.checkpoint, "dtype": dtype, "device": world.device.type}
    if options.data or not (options.choices or options.tasks):
        how, rows, labels = rows_to_score(options)
        tallies = scoring.tally(model, rows, options.batch, world)
        result["text"] = how | scoring.summarise(tallies, labels)
    if questions and world.is_main:
        likelihoods = scoring.Likelihoods(model, options.context or scoring.CONTEXT, options.batch)
        some = questions[: options.limit or None]
        result["choices"] = {"file": options.choices} | choices.robustness(likelihoods, some, options.seed)
    if options.tasks:
        context = options.context or scoring.CONTEXT
        result["tasks"] = harness.run_tasks(
            model, options.tasks.split(","), context, options.batch, options.limit or None
        )
    result["seconds"] = round(time.perf_counter() - began, 1)
    if world.is_main:
        print(markdown(result))
        if options.out:
            pages = {"json": json.dumps(result, indent=1), "md": markdown(result)}
            for form, text in pages.items():
                write_whole(Path(f"{options.out}.{form}"), lambda scratch, text=text: scratch.write_text(text + "\n"))
    distributed.stop()


def rows_to_score(options: Options) -> tuple[dict[str, Any], Iterator[scoring.Row], dict[int, str]]:
    """What is scored and how, in words; the rows; and the documents' labels, filled as the rows are read."""
    labels: dict[int, str] = {}
    trained = None if options.data else checkpoint.train_config_of(options.checkpoint)
    data = options.data or (trained or {}).get("data", "")
    if not data:
        raise UserError(f"--data: name the text to score; {options.checkpoint} is no run of train.py, which would know")
    if not (options.data or options.context or options.stride or options.by or options.limit):
        stream = fineweb.ByteStream(data, "validation", slice_bytes=trained["mbs"], max_doc=trained["max_doc"])
        slices = trained["val_slices"]
        rows = f"as in training: {slices or 'all'} slices of {trained['mbs']}, none beyond {trained['max_doc']} bytes"
        return {"data": data, "rows": rows}, scoring.training_rows(stream, slices or None), labels
    context = options.context or scoring.CONTEXT
    stride = options.stride or context
    how = {"data": data, "rows": f"whole documents, context {context} bytes, stride {stride} bytes"}

    def rows() -> Iterator[scoring.Row]:
        for n, document in enumerate(documents(data, options)):
            if options.limit and n == options.limit:
                return
            labels[n] = scoring.script_of(document.text) if options.by == "script" else document.label
            yield from scoring.windows(document.text, context, stride, n)

    return how, rows(), labels


def documents(data: str, options: Options) -> Iterator[scoring.Document]:
    column = "" if options.by == "script" else options.by
    mixture = [data] if Path(data).exists() else [part.rsplit(":", 1)[0] for part in data.split(",")]
    if not all((Path(folder) / "manifest.json").exists() for folder in mixture):
        try:
            for _, text, label in fineweb.read_documents(data, options.text_column, column):
                yield scoring.Document(text, label)
        except fineweb.DataError as error:
            if column and repr(column) in str(error):  # there it is a column like any other
                raise UserError(str(error).replace("--text-column", "--by")) from None
            raise
        return
    if column:
        raise UserError(
            f"--by {column}: prepared folders keep no labels; name what {data} was made from, or --by script"
        )
    yield from scoring.held_out(fineweb.ByteStream(data, options.split, slice_bytes=1 << 20, max_doc=1 << 20))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, ConfigError, fineweb.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
