"""A run's metrics: one JSON record per step; wandb or TensorBoard on request; and warnings about routers."""

import contextlib
import itertools
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from hnet_runtime import UserError, WriteFailed
from hnet_runtime.data.stream import sync_folder
from hnet_runtime.pages.reports import write_atomically
from hnet_runtime.runs.run_folder import complete

logger = logging.getLogger("hnet")


class Sink(Protocol):
    """Receives records: numbers, `sample` (text with bars between chunks), `sample_html` (in colours, for wandb)."""

    def log(self, step: int, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonlSink:
    """`metrics.jsonl`: one line per step. A resumed run drops the lines after the step from which it resumes.

    A run from the beginning renames existing metrics to metrics-1.jsonl, metrics-2.jsonl, ...
    """

    def __init__(self, path: Path, first_step: int):
        if first_step == 0 and path.exists() and path.stat().st_size:
            kept_as = _free_name(path)
            path.rename(kept_as)
            logger.warning("%s: these metrics are of an earlier start; they are kept as %s", path, kept_as.name)
        rows = [row for row in read_metrics(path) if row["step"] <= first_step]
        missing = first_step - len({row["step"] for row in rows})
        if missing and (rows or complete(path.parent)):  # else a run that branches off in a folder of its own
            logger.warning(f"{path}: has no line for {missing} of the {first_step} steps before the checkpoint")
        kept = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(path, lambda scratch: scratch.write_text(kept, encoding="utf-8"))
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def log(self, step: int, record: dict[str, Any]) -> None:
        safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        safe.pop("sample_html", None)
        with self._writing():
            self._file.write(json.dumps({"step": step, **safe}) + "\n")

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        with self._writing():
            os.fsync(self._file.fileno())
            sync_folder(Path(self._file.name).parent)

    def close(self) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteFailed(
                f"{self._file.name}: can't be written ({error.strerror}); checkpoints are untouched"
            ) from None


def _free_name(path: Path) -> Path:
    """`metrics-1.jsonl` beside `metrics.jsonl`, or the first free number after 1."""
    names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def read_lines(path: Path) -> list[bytes]:
    """The complete lines of a metrics file, without a last line that a crash cut off. Empty if there is no file."""
    if not path.exists():
        return []
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); expected the metrics of a run") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, in step order. Raises UserError for a line that is no record."""
    records = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            records.append(json.loads(line.decode()))
            assert isinstance(records[-1]["step"], int)
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            raise UserError(f"{path}, line {number}: expected a JSON object with a step") from None
    return records


GROUPS = {  # panel -> prefixes of the keys in it, for wandb and TensorBoard
    "loss": ("bpb", "ce", "val_bpb", "val_bytes"),
    "stages": ("stage", "val_stage", "val_edge", "val_chance"),
    "optimizer": ("lr", "grad"),
    "speed": ("step_ms", "bytes", "rows", "mfu", "save_ms", "peak_gib", "reserved_gib", "recomputed", "graphs"),
}


def panel(key: str) -> str:
    """`stage0_F` -> `stages/stage0_F`: wandb and TensorBoard group curves by the part before the slash."""
    return next((f"{group}/{key}" for group, prefixes in GROUPS.items() if key.startswith(prefixes)), f"other/{key}")


class WandbSink:
    """wandb, online or offline. The run's id is stored in its folder, so a resumed run continues the same curves.

    Curves are drawn over `step`, the optimizer steps done. wandb's own step must increase from record to record, or its
    server drops records, but a resumed run repeats steps. So wandb's step is the time since the run began, in ms.
    """

    def __init__(self, run: Path, first_step: int, config: dict[str, Any]):
        import wandb

        id_file = run / "wandb_id"
        if first_step == 0 or not id_file.exists():  # a run from the beginning has new curves
            write_atomically(id_file, lambda scratch: scratch.write_text(secrets.token_hex(4), encoding="utf-8"))
        self._began, self._own_step = id_file.stat().st_mtime, 0
        run_id = id_file.read_text(encoding="utf-8")
        keywords = dict(project="hnet", name=run.name, id=run_id, resume="allow", dir=run, config=config)
        try:
            self._run = wandb.init(settings=wandb.Settings(init_timeout=30), **keywords)
        except Exception as error:  # no error of wandb may stop training
            logger.warning("wandb: %s; this run is logged offline", str(error).strip().splitlines()[0])
            wandb.teardown()  # its service still uses the id
            try:
                self._run = wandb.init(mode="offline", **keywords)
            except Exception as error:
                raise UserError(f"--logger wandb: can't start ({str(error).strip().splitlines()[0]})") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._samples: list[list[Any]] = []
        self._table, self._html = wandb.Table, wandb.Html

    def log(self, step: int, record: dict[str, Any]) -> None:
        values = {panel(key): value for key, value in record.items() if not key.startswith("sample")}
        if record.get("sample_html"):
            self._samples.append([step, self._html(record["sample_html"])])
            values["samples"] = self._table(columns=["step", "sample, chunks in colours"], data=list(self._samples))
        self._own_step = max(self._own_step + 1, int(1000 * (time.time() - self._began)))
        self._run.log({"step": step, **values}, step=self._own_step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """TensorBoard's event files, in the run's folder. Steps that a resumed run repeats are purged."""

    def __init__(self, run: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if key == "sample_html":
                continue
            if isinstance(value, str):
                self._writer.add_text(panel(key), value, step)
            else:
                self._writer.add_scalar(panel(key), value, step)

    def close(self) -> None:
        self._writer.close()


class Metrics:
    """Passes each record to all sinks. A sink that fails, other than the JSONL file, is dropped with one warning."""

    def __init__(self, sinks: list[Sink]):
        self._sinks = sinks

    def log(self, step: int, record: dict[str, Any]) -> None:
        self._each(lambda sink: sink.log(step, record))

    def sync(self) -> None:
        """Waits until the JSONL file is on disk, so that a checkpoint never has steps that it lacks."""
        for sink in self._sinks:
            if isinstance(sink, JsonlSink):
                sink.sync()

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                if isinstance(sink, JsonlSink):
                    raise
                logger.warning("%s failed (%s): training continues without it", type(sink).__name__, error)
                self._sinks.remove(sink)


class RouterHealth:
    """Reports a problem of a router in one line when it starts, from numbers that are read anyway.

    - dead: for PATIENCE steps in a row no chunk began except at the beginning of a row;
    - collapse: for as many steps nearly every token opened a chunk, or less than a tenth of the target share did;
    - oscillation: the smoothed share of boundaries moved between 1.25 and 0.8 times the target SWINGS times in SPAN
      steps.

    A resumed run counts from the steps before, as if it had not been interrupted. Only a router that has been stuck for
    longer than PATIENCE gets as much time again, perhaps with other flags.
    """

    PATIENCE, SWINGS, SPAN = 50, 4, 200
    SMOOTHING = 0.1  # a mean over about ten steps: one long document can fill several small batches

    def __init__(self, targets: Sequence[float | None], slice_bytes: int, earlier: Iterable[dict[str, Any]] = ()):
        """targets: tokens per chunk of each stage; None for a rule, which has no such problems.

        earlier: the records of the steps before, for a resumed run.
        """
        self.targets, self.slice_bytes = targets, slice_bytes
        self.since = [{"dead": 0, "high": 0, "low": 0} for _ in targets]  # steps in a row
        self.smooth, self.side = [None for _ in targets], [0 for _ in targets]
        self.swings: list[list[int]] = [[] for _ in targets]
        self.swinging = [False for _ in targets]
        for record in earlier:
            self.look(record["step"], record)
        self.since = [{name: n if n <= self.PATIENCE else 0 for name, n in signs.items()} for signs in self.since]

    def look(self, step: int, record: dict[str, Any]) -> list[str]:
        """The problems that start at this step. record: as in metrics.jsonl, with `rows`, the mean rows per slice."""
        said, tokens = [], float(self.slice_bytes)
        for s, N in enumerate(self.targets):
            N = record.get(f"stage{s}_target", N)  # of this step, where the target changes
            F = record[f"stage{s}_F"]
            tokens *= F
            if N is None:
                continue
            signs = {"dead": tokens <= record["rows"] * 1.001, "high": F > 0.98, "low": F < 0.1 / N}
            words = {
                "dead": "is dead: no chunk begins except at the beginning of a row",
                "high": f"collapsed: {F:.0%} of its tokens open a chunk, 1 in {N:g} should",
                "low": f"collapsed: 1 in {1 / F:.0f} of its tokens opens a chunk, 1 in {N:g} should",
            }
            for name, there in signs.items():
                self.since[s][name] = self.since[s][name] + 1 if there else 0
                if self.since[s][name] == self.PATIENCE and not (name == "low" and self.since[s]["dead"]):
                    said.append(f"stage {s} {words[name]} (for {self.PATIENCE} steps)")
            said += self._swing(s, step, F * N)
        return said

    @property
    def stuck(self) -> bool:
        """Whether a stage is dead or has collapsed at the last step that `look` was given."""
        return any(n >= self.PATIENCE for signs in self.since for n in signs.values())

    def _swing(self, s: int, step: int, relative: float) -> list[str]:
        before = self.smooth[s]
        self.smooth[s] = now = relative if before is None else before + self.SMOOTHING * (relative - before)
        side = 1 if now > 1.25 else -1 if now < 0.8 else self.side[s]
        if self.side[s] and side != self.side[s]:
            self.swings[s].append(step)
        self.side[s] = side
        self.swings[s] = [at for at in self.swings[s] if at > step - self.SPAN]
        started = len(self.swings[s]) >= self.SWINGS and not self.swinging[s]
        self.swinging[s] = len(self.swings[s]) >= self.SWINGS
        swings = f"{len(self.swings[s])} swings about its target in {self.SPAN} steps"
        return [f"stage {s} oscillates: the share of its tokens that open a chunk made {swings}"] if started else []


def duration(seconds: float) -> str:
    """`93784` -> `26:03:04`; below an hour `3:04`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
