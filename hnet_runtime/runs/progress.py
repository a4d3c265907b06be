"""What a training run reports: a step's numbers by name, lines on the console, samples, and final results."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hnet_decoder import generate
from hnet_runtime import UserError, WriteFailed, distributed
from hnet_runtime.checks import equivalence
from hnet_runtime.data.stream import ByteStream
from hnet_runtime.distributed import World
from hnet_runtime.evaluation.validation import bits_name, chunks_of
from hnet_runtime.flops import count_flops, peak_flops
from hnet_runtime.pages.chunks import bars, print_chunks, to_html
from hnet_runtime.pages.plots import plot
from hnet_runtime.runs import statistics
from hnet_runtime.runs.flags import TrainConfig
from hnet_runtime.runs.metrics import duration, read_metrics
from hnet_runtime.runs.statistics import StepNumbers
from hnet_simple import HNetInference
from hnet_trainable import HNetConfig, HNetLM

logger = logging.getLogger("hnet")


def describe(numbers: StepNumbers, hnet: HNetConfig, config: TrainConfig) -> dict[str, Any]:
    """A step's numbers, which are on the host, by their names in metrics.jsonl."""
    bits = numbers.ce.item() / math.log(2)
    record = {bits_name(hnet): bits * config.mbs / numbers.text_bytes.item(), "ce": numbers.ce.item()}
    record |= {"rows": numbers.rows.item(), "grad_norm": numbers.grad_norm.item()}
    per_stage = (numbers.ratio_S, numbers.F_S, numbers.G_S, numbers.imbalance_S)
    for s, (ratio, F, G, imbalance) in enumerate(zip(*(x_S.tolist() for x_S in per_stage))):
        record |= {f"stage{s}_F": F, f"stage{s}_G": G, f"stage{s}_compression": 1 / F}
        if hnet.is_learned[s]:
            record[f"stage{s}_ratio_loss"] = ratio
        record |= {f"stage{s}_imbalance": imbalance}
    return record | dict(zip(statistics.names(hnet.num_stages), numbers.more.tolist()))


def speed(
    record: dict[str, Any], seconds: float, hnet: HNetConfig, config: TrainConfig, world: World
) -> dict[str, Any]:
    """The speed of a step. MFU counts matrix products only, for the tokens that each stage really had."""
    tokens = [float(config.mbs * config.global_slices)]
    for s in range(hnet.num_stages):
        tokens.append(tokens[-1] * record[f"stage{s}_F"])
    peak = peak_flops(world.device) * world.size
    flops = count_flops(hnet, [[n] for n in tokens]).matmul
    measured = {"step_ms": 1000 * seconds, "bytes_per_s": tokens[0] / seconds, "mfu": flops / seconds / peak}
    if world.device.type == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        measured["reserved_gib"] = torch.cuda.memory_reserved() / 2**30  # with the memory of graphs
    return measured


class Progress:
    """The lines on the console. Each gives means over the steps since the previous line."""

    def __init__(self, hnet: HNetConfig, config: TrainConfig, first_step: int):
        self.hnet, self.config, self.first_step = hnet, config, first_step
        self._records: list[dict[str, Any]] = []

    def add(self, step: int, record: dict[str, Any]) -> str | None:
        """Adds a step's record. Returns a line every --log-every steps and with a validation, else None."""
        self._records.append(record)
        is_due = step in (self.first_step + 1, self.config.steps) or step % self.config.log_every == 0
        if not is_due and f"val_{bits_name(self.hnet)}" not in record:
            return None
        seconds_left = self._mean("step_ms") / 1000 * (self.config.steps - step)  # without validations and saves
        line = self._line(step, record, seconds_left)
        self._records = []
        return line

    def _line(self, step: int, record: dict[str, Any], seconds_left: float) -> str:
        name = bits_name(self.hnet)
        shown = name.replace("_", " ")
        parts = [f"step {step:>{len(str(self.config.steps))}}/{self.config.steps}", f"{shown} {self._mean(name):.3f}"]
        if targets := self.hnet.learned_ratios:
            targets = [N and record.get(f"stage{s}_target", N) for s, N in enumerate(targets)]
            losses = [f"{self._mean(f'stage{s}_ratio_loss'):.2f}" for s, N in enumerate(targets) if N]
            parts += [f"ratio loss {' '.join(losses)}"] * bool(losses)
            found = [f"{1 / self._mean(f'stage{s}_F'):.1f}" + (f"/{N:.3g}" if N else "") for s, N in enumerate(targets)]
            parts.append(f"{'bytes per chunk' if len(found) == 1 else 'compression'} {' '.join(found)}")
        parts += [f"lr {record['lr']:.1e}", f"grad {self._mean('grad_norm'):.2f}"]
        rate = self.config.mbs * self.config.global_slices / self._mean("step_ms")  # bytes per ms, which is kB per s
        parts += [f"{rate:.1f} kB/s", f"ETA {duration(seconds_left)}"]
        if f"val_{name}" in record:
            parts.append(f"val {shown} {record[f'val_{name}']:.3f}")
        return "  ".join(parts)

    def _mean(self, key: str) -> float:
        return sum(record[key] for record in self._records) / len(self._records)


class Sample(NamedTuple):
    """Generated bytes, and for each byte whether a chunk of each stage starts there."""

    data: bytes
    starts: Sequence[Sequence[bool]]

    def record(self) -> dict[str, str]:
        """The sample for the metrics: with bars between chunks, and in colours."""
        return {"sample": bars(self.data, self.starts), "sample_html": to_html(self.data, self.starts)}


def sample(inference: HNetInference, config: TrainConfig, world: World) -> Sample | None:
    """A generated sample on rank 0, None on others or where none can be made. Called by every rank."""
    with inference.unsharded():  # gathers the weights of all ranks; then rank 0 alone generates
        if not world.is_main:
            return None
        inference.eval()  # its layers are those of the model that trains
        size, seed = config.sample_bytes, config.seed
        try:
            (written,) = generate(inference, [os.fsencode(config.prompt)], max_bytes=size, seed=seed, valid_utf8=True)
        except Exception as error:  # the metrics and the checkpoint of the step do not depend on its sample
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("no sample: it can't be made (%s)", reason)
            return None
        finally:
            inference.train()
    return Sample(written.data, written.starts)


def _write_plots(run: Path) -> None:
    try:
        plot([run], run / "plots")
    except UserError as error:
        raise WriteFailed(f"{error}; the run is complete except for its plots") from None


def show_results(model: HNetLM, val_stream: ByteStream | None, run: Path, world: World) -> None:
    """Prints the last validation and held-out text with the model's chunks in colours, and writes the run's plots."""
    if val_stream is None:
        if world.is_main:
            _write_plots(run)
            logger.info(f"curves in {run / 'plots.html'}; there was no held-out text to validate on")
        return
    *_, slice_ = val_stream.slices_once(2)  # the first and one from the middle
    text = bytes(slice_.labels[: slice_.row_lengths[0]]).rstrip(b"\xff")[:800]
    opens = chunks_of(model, text, world)
    if not world.is_main:
        return
    _write_plots(run)
    records = [record for record in read_metrics(run / "metrics.jsonl") if "val_bytes" in record]
    if not records:
        return
    last = records[-1]
    if opens:
        logger.info("held-out text in the chunks that the model cut:")
        print_chunks(text, list(zip(*opens)))
        share, base = last["val_edge_share"], last["val_edge_base"]
        compared = f": {share / base:.1f} times as often as by chance" if base else ""
        logger.info(
            f"{share:.0%} of the chunks begin at the edge of a word, where {base:.0%} of all bytes do{compared}"
        )
    name = bits_name(model.config)
    given = "" if name == "bpb" else ", given chunks that depend on later bytes"
    logger.info(
        f"{last[f'val_{name}']:.3f} bits per byte on {last['val_bytes']:,} bytes of held-out text{given}; "
        f"curves in {run / 'plots.html'}"
    )


def dump_parameters(model: HNetLM, groups: list[dict[str, Any]]) -> None:
    """Prints modules and parameters; with LOVELY_TENSORS=1 also a summary of each by lovely-tensors."""
    lovely = None
    if os.environ.get("LOVELY_TENSORS") == "1" and not (lovely := equivalence.lovely_summary()):
        logger.warning("LOVELY_TENSORS=1: lovely-tensors is not installed; pip install -e '.[debug]'")
    print(model)
    group_of = {name: group for group in groups for name in group["names"]}
    for name, p in model.named_parameters():
        group, dtype = group_of[name], str(p.dtype).removeprefix("torch.")
        decay = f"decay {group['weight_decay']:g}" if group["weight_decay"] else "no decay"
        rate = f"stage {group['stage']}  lr x {group['multiplier']:.3f}"
        summary = f"  {lovely(distributed.unsharded(p.detach()))}" if lovely else ""
        print(f"{name:72} {str(tuple(p.shape)):14} {dtype}  {rate}  {decay}{summary}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
