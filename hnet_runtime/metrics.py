"""What a run writes down: one JSON record a step, a line on the console, wandb or TensorBoard where asked for."""

import json
import logging
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hnet_runtime import UserError

logger = logging.getLogger("hnet")


class Sink(Protocol):
    def log(self, step: int, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonlSink:
    """`metrics.jsonl`: one line a step, each step once. A resumed run drops the lines past the step it starts from."""

    def __init__(self, path: Path, first_step: int):
        kept = [line for line in read_lines(path) if json.loads(line)["step"] <= first_step]
        scratch = path.with_suffix(".writing")
        scratch.write_text("".join(line + "\n" for line in kept))
        os.replace(scratch, path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (lives as long as the run)

    def log(self, step: int, record: dict[str, Any]) -> None:
        safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps({"step": step, **safe}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[str]:
    """The whole lines of a metrics file; a last line that a crash tore is left out. Empty if there is no file."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, in step order."""
    return [json.loads(line) for line in read_lines(path)]


GROUPS = {  # panel -> prefixes of the keys in it, for wandb and TensorBoard
    "loss": ("bpb", "ce", "val_bpb", "val_bytes"),
    "stages": ("stage", "val_stage", "val_edge"),
    "optimizer": ("lr", "grad"),
    "speed": ("step_ms", "bytes", "mfu", "save_ms", "peak_gib", "recomputed"),
}


def panel(key: str) -> str:
    """`stage0_F` -> `stages/stage0_F`: wandb and TensorBoard group curves by what stands before the slash."""
    return next((f"{group}/{key}" for group, prefixes in GROUPS.items() if key.startswith(prefixes)), f"other/{key}")


class WandbSink:
    """wandb, online or offline; the run's id is kept in its folder, so a resumed run goes on in the same curves."""

    def __init__(self, run: Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("--logger wandb: wandb is not installed; pip install 'hnet-trainable[wandb]'") from None
        id_file = run / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        keywords = dict(project="hnet", name=run.name, id=id_file.read_text(), resume="allow", dir=run, config=config)
        try:
            self._run = wandb.init(settings=wandb.Settings(init_timeout=30), **keywords)
        except Exception as error:  # whatever wandb raises, it must not stop training
            logger.warning("wandb: %s; this run is logged offline", str(error).strip().splitlines()[0])
            wandb.teardown()  # its service still holds the id
            self._run = wandb.init(mode="offline", **keywords)
        self._samples: list[list[Any]] = []
        self._table = wandb.Table

    def log(self, step: int, record: dict[str, Any]) -> None:
        values = {panel(key): value for key, value in record.items() if key != "sample"}
        if record.get("sample"):
            self._samples.append([step, record["sample"]])
            values["samples"] = self._table(columns=["step", "sample, chunks between bars"], data=list(self._samples))
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """TensorBoard's event files, in the run's folder; what a resumed run repeats is purged."""

    def __init__(self, run: Path, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            message = "--logger tensorboard: tensorboard is not installed; pip install 'hnet-trainable[tensorboard]'"
            raise UserError(message) from None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, str):
                self._writer.add_text(panel(key), value, step)
            else:
                self._writer.add_scalar(panel(key), value, step)

    def close(self) -> None:
        self._writer.close()


class Metrics:
    """Hands each record to all sinks. One that fails, other than the JSONL file, is dropped with one line."""

    def __init__(self, sinks: list[Sink]):
        self._sinks = sinks

    def log(self, step: int, record: dict[str, Any]) -> None:
        self._each(lambda sink: sink.log(step, record))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                if isinstance(sink, JsonlSink):
                    raise
                logger.warning("%s failed (%s): training goes on without it", type(sink).__name__, error)
                self._sinks.remove(sink)


def duration(seconds: float) -> str:
    """`93784` -> `26:03:04`; below an hour `3:04`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def plot_losses(records: list[dict[str, Any]], path: Path) -> None:
    """`loss.png`: bits per byte, the ratio losses and each stage's compression against its target, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4), constrained_layout=True)

    def draw(axis, key: str, label: str, **style) -> None:
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axis.plot(*zip(*points), label=label, **style)

    draw(axes[0], "bpb", "training", linewidth=0.7)
    draw(axes[0], "val_bpb", "validation", marker="o", markersize=3)
    axes[0].set_title("bits per byte")
    stages = range(
        sum(key.startswith("stage") and key.endswith("_compression") for key in records[-1]) if records else 0
    )
    for s in stages:
        draw(axes[1], f"stage{s}_ratio_loss", f"stage {s}", linewidth=0.7)
        draw(axes[2], f"stage{s}_compression", f"stage {s}", linewidth=0.7)
        draw(axes[2], f"stage{s}_target", f"stage {s} target", linestyle=":", color="gray")
    axes[1].set_title("ratio loss (1 at the target)")
    axes[2].set_title("tokens per chunk")
    axes[2].set_yscale("log")  # the first steps may find a chunk or two in a slice
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    scratch = path.with_name(path.name + ".writing")
    figure.savefig(scratch, format="png", dpi=120)
    plt.close(figure)
    os.replace(scratch, path)
