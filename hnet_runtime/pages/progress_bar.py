"""Shows progress on stderr: a bar with the time left on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS = 10  # between lines without a terminal


class Progress:
    """A context manager that shows progress; call `advance` for work done. It prints nothing if `shown` is False.

    what: the first words of the bar or line. total: the amount of work; None if unknown. unit: that of `total` and of
    `advance`, such as "bytes"; the speed is in this unit per second.
    """

    def __init__(self, what: str, total: float | None, unit: str, shown: bool = True):
        self.what, self.total, self.unit, self.shown = what, total, unit, shown
        self.done = 0.0
        self.began = self.said = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = TextColumn(self.what), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}")
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, speed="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, amount: float) -> None:
        """Reports that `amount` more is done."""
        self.done += amount
        now = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, speed=self._speed(now))
        elif self.shown and now - self.said >= SECONDS:
            self.said = now
            if self.total:
                left = max(0.0, (now - self.began) * (self.total / self.done - 1))
                far = f"{min(1.0, self.done / self.total):.0%}, {self._speed(now)}, {left:.0f} s left"
            else:
                far = f"{self.done:,.0f} {self.unit}, {self._speed(now)}"
            print(f"{self.what}: {far}", file=sys.stderr, flush=True)

    def _speed(self, now: float) -> str:
        speed = self.done / max(now - self.began, 1e-3)
        return f"{speed:,.{0 if speed >= 100 else 1}f} {self.unit}/s"
