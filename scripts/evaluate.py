"""Evaluates a checkpoint: bits per byte of any text, robustness on multiple-choice questions, lm-evaluation-harness.

python scripts/evaluate.py RUN
    held-out text of the run, as in validation during training
python scripts/evaluate.py RUN --data texts/ --stride 4096
    any text that fineweb.py reads, in complete documents
python scripts/evaluate.py RUN --data a.jsonl --by language
    bits per byte of each language
python scripts/evaluate.py RUN --choices hellaswag_val.jsonl
    accuracy and the five-perturbation robustness score
python scripts/evaluate.py RUN --tasks arc_easy,lambada_openai
    lm-evaluation-harness (the extra lm_eval)
torchrun --nproc-per-node 8 scripts/evaluate.py ...
    the same results in less time
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from hnet_runtime import UserError
from hnet_runtime.commands import parse, run

if TYPE_CHECKING:
    from hnet_runtime.evaluation import scoring


@dataclass
class Options:
    """Bits per byte of held-out or other text, robustness, and lm-evaluation-harness, for one checkpoint."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run or checkpoint of train.py, a .pt or .safetensors file or its folder, or hf:owner/name."""
    config: Annotated[str, tyro.conf.arg(aliases=["-c"])] = ""
    """Model config, for weights that come without one."""
    data: str = ""
    """Text to score: a folder made by `fineweb.py prepare`, or a source of that command: a file, a folder, stdlib,
    hf:owner/name. Empty: the validation text of the run in the same rows, which gives the run's val_bpb."""
    split: Literal["validation", "train"] = "validation"
    """Split of a prepared folder."""
    text_column: str = "text"
    """Column with the text of .jsonl and .parquet."""
    by: str = ""
    """Bits per byte also by group: `script`, found from the letters, or a column with labels of .jsonl and .parquet."""
    context: int = 0
    """Most bytes that the model reads at once. 0: 8192, or for the run's own text the rows of training."""
    stride: int = 0
    """Bytes scored by each row after a document's first; the others are context. 0: the value of --context."""
    limit: int = 0
    """Score only this many first documents (or questions, or items of each task); 0: all."""
    batch: int = 16
    """Rows per batch. It changes only the speed."""
    choices: str = ""
    """A .jsonl file of questions in the HellaSwag format."""
    seed: int = 0
    """Seed of the random perturbations."""
    tasks: str = ""
    """Tasks of lm-evaluation-harness, or .yaml files of tasks, separated by commas (needs the extra lm_eval)."""
    include_path: str = ""
    """A file or folder of your own tasks (.yaml) for --tasks. Without --tasks all of them run."""
    num_fewshot: int | None = None
    """Solved examples before each question of --tasks. None: the number that each task sets."""
    bytes_per_token: float = 4.0
    """Bytes of an answer per token of a task's limit, which is in tokens."""
    out: str = ""
    """Write OUT.json and OUT.md."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: CUDA if torch has it."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute dtype; auto: bfloat16 on CUDA, float32 on the CPU."""


def main(argv: Sequence[str]) -> None:
    options = parse(Options, argv, __doc__)
    check(options)
    import torch

    from hnet_runtime import distributed
    from hnet_runtime.checks import agreement
    from hnet_runtime.evaluation import boundaries, choices, harness, scoring
    from hnet_runtime.evaluation.validation import bits_name
    from hnet_runtime.pages.progress_bar import Progress
    from hnet_runtime.pages.reports import markdown, write_atomically
    from hnet_runtime.runs.weights import checkpoint_of, load_training

    began = time.perf_counter()
    questions = choices.read_questions(options.choices)[: options.limit or None] if options.choices else []
    world = distributed.start(options.device)
    tasks = [task.strip() for task in options.tasks.split(",") if task.strip()]
    asks_harness = bool(tasks or options.include_path)
    if asks_harness and world.size > 1:
        raise UserError(f"--tasks: runs on one process, not {world.size}")
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if world.device.type == "cuda" else "float32"
    model = load_training(options.checkpoint, options.config or None, world.device, getattr(torch, dtype)).eval()
    agreement.choose_implementations(world.device, getattr(torch, dtype), model.config)
    context = options.context or scoring.CONTEXT
    if model.config.stages_not_causal and (questions or asks_harness):
        flag, router = "--choices" if questions else "--tasks", model.config.routers[model.config.stages_not_causal[0]]
        raise UserError(
            f"{flag}: the router {router} opens chunks by bytes that come later, so the likelihoods of this model do "
            "not compare with those of others"
        )

    result: dict[str, Any] = {
        "checkpoint": checkpoint_of(options.checkpoint),
        "dtype": dtype,
        "device": world.device.type,
    }
    if options.data or not (options.choices or asks_harness):
        text = text_to_score(options)
        total = text.labels_in_all() if world.is_main else None
        scoring_began = time.perf_counter()
        with Progress("bits per byte", total, "bytes", world.is_main) as progress:
            tallies, of_cuts = scoring.tally_with_cuts(model, text.rows(), options.batch, world, progress.advance)
        seconds = time.perf_counter() - scoring_began
        scores = scoring.summarise(tallies, text.groups)
        result["text"] = text.how | scoring.renamed(scores, bits_name(model.config))
        if model.config.num_stages:
            result["text"]["cuts"] = boundaries.summary(of_cuts)
        result["bytes_per_s"] = round(result["text"]["bytes"] / seconds, 1)
    if questions and world.is_main:
        likelihoods = scoring.Likelihoods(model, context, options.batch)
        with Progress("multiple choice", choices.work(questions), "endings") as progress:
            likelihoods.advance = progress.advance
            result["choices"] = {"file": options.choices} | choices.robustness(likelihoods, questions, options.seed)
    if asks_harness:
        result["tasks"], result["harness"] = harness.run_tasks(
            model,
            tasks,
            context,
            options.batch,
            options.limit or None,
            options.bytes_per_token,
            options.num_fewshot,
            options.include_path,
        )
    result["seconds"] = round(time.perf_counter() - began, 1)
    page = markdown(result) if world.is_main else ""
    if options.out and world.is_main:
        for form, content in {"json": json.dumps(result, indent=1), "md": page}.items():
            content = (content + "\n").encode("utf-8", "backslashreplace")  # file names may not be UTF-8
            write_atomically(
                Path(f"{options.out}.{form}"), lambda scratch, content=content: scratch.write_bytes(content)
            )
    distributed.stop()
    if world.is_main:  # last, because the reader may have closed the output
        print(page)


def check(options: Options) -> None:
    """Raises UserError for flags that can't be used."""
    for name, least in (("context", 0), ("stride", 0), ("limit", 0), ("batch", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
        if value is not None and value >= 2**31:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected less than 2**31")
    most = options.context or 8192
    if options.stride > most:
        raise UserError(f"--stride {options.stride}: expected at most --context {most}")
    if not 0 < options.bytes_per_token < 1e6:
        raise UserError(f"--bytes-per-token {options.bytes_per_token}: expected more than 0, such as 4")
    if options.tasks and not options.tasks.replace(",", "").strip():
        raise UserError(f"--tasks {options.tasks!r}: names no task")
    asks_harness = bool(options.tasks or options.include_path)
    reads_text = bool(options.data) or not (options.choices or asks_harness)
    for name, is_used, flag in (
        *((name, asks_harness, "--tasks") for name in ("num_fewshot", "bytes_per_token")),
        ("seed", bool(options.choices), "--choices"),
        *((name, reads_text, "--data") for name in ("by", "stride", "split")),
        ("text_column", bool(options.data), "--data"),
    ):
        value = getattr(options, name)
        if value != getattr(Options, name) and not is_used:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected also {flag}, which it is for")
    if options.out.endswith("/"):
        raise UserError(f"--out {options.out}: expected a name in that folder, to which .json and .md are added")
    if options.out and not os.access(folder := Path(options.out).absolute().parent, os.W_OK):
        raise UserError(f"--out {options.out}: {folder} is no folder that can be written to")


class Text(NamedTuple):
    """The text to score."""

    how: dict[str, Any]  # its source and how it is cut, in words
    rows: "Callable[[], Iterator[scoring.Row]]"  # the same rows at each call
    groups: dict[int, str]  # the documents' labels, filled as the rows are read
    is_near: bool = True  # False for text from the network, which is read only once

    def labels_in_all(self) -> int | None:
        """The number of labels of all rows, counted by reading them; None if that would download the text twice."""
        from hnet_runtime.evaluation.scoring import labels_of

        return labels_of(self.rows()) if self.is_near else None


def text_to_score(options: Options) -> Text:
    """The text selected by the flags. Raises UserError if they select none."""
    import fineweb
    from hnet_runtime.evaluation import scoring
    from hnet_runtime.runs import checkpoint

    groups: dict[int, str] = {}
    limit = f", of the first {options.limit:,} documents at most" if options.limit else ""
    trained = None if options.data else checkpoint.train_config_of(options.checkpoint)
    data = options.data or (trained or {}).get("data", "")
    if not data:
        raise UserError(f"--data: name the text to score; {options.checkpoint} is no run of train.py, which would know")
    if trained and not (options.context or options.stride):
        mbs, max_doc, slices = trained["mbs"], trained["max_doc"], trained["val_slices"]
        stream = fineweb.ByteStream(data, options.split, slice_bytes=mbs, max_doc=max_doc)
        if options.by:
            groups |= {n: group_of(document, options) for n, document in enumerate(documents(data, options))}
        total = stream.slices_in_all
        of_slices = f"{min(slices or total, total):,} of {total:,} slice{'s' * (total != 1)} of up to {mbs:,} bytes"
        how = f"as in training: {of_slices}, in rows of up to {max_doc:,}{limit}"
        rows = lambda: scoring.first_documents(scoring.training_rows(stream, slices or None), options.limit)  # noqa: E731
        return Text({"data": data, "rows": how}, rows, groups)
    context = options.context or scoring.CONTEXT
    stride = options.stride or context

    def rows() -> "Iterator[scoring.Row]":
        is_first = not groups and os.environ.get("RANK", "0") == "0"
        for n, document in enumerate(documents(data, options, says=is_first)):
            if options.limit and n == options.limit:
                return
            groups[n] = group_of(document, options)
            yield from scoring.windows(document.text, context, stride, n)

    how = f"whole documents, context {context} bytes, stride {stride} bytes{limit}"
    return Text({"data": data, "rows": how}, rows, groups, not data.startswith("hf:"))


def group_of(document: "scoring.Document", options: Options) -> str:
    from hnet_runtime.evaluation.scoring import script_of

    return script_of(document.text) if options.by == "script" else document.label


def documents(data: str, options: Options, says: bool = True) -> "Iterator[scoring.Document]":
    """The documents of `data`. says: print on standard error which files are left out."""
    import fineweb
    from hnet_runtime.evaluation import scoring

    column = "" if options.by == "script" else options.by
    mixture = [data] if Path(data).exists() else [part.rsplit(":", 1)[0] for part in data.split(",")]
    if not all((Path(folder) / "manifest.json").exists() for folder in mixture):
        if options.split != Options.split:
            raise UserError(f"--split {options.split}: {data} is not prepared, so it has no splits")
        try:
            for _, text, label in fineweb.read_documents(data, options.text_column, column, says):
                yield scoring.Document(text, label)
        except fineweb.DataError as error:
            if column and repr(column) in str(error):  # there the label is a column like others
                raise UserError(str(error).replace("--text-column", "--by")) from None
            raise
        return
    if options.text_column != "text":
        raise UserError(f"--text-column {options.text_column}: {data} is prepared, its texts have no columns")
    if column:
        raise UserError(
            f"--by {column}: prepared folders keep no labels; name what {data} was made from, or --by script"
        )
    yield from scoring.held_out(fineweb.ByteStream(data, options.split, slice_bytes=1 << 20, max_doc=1 << 20))


if __name__ == "__main__":
    run(main, smaller="--batch or --context")
