"""What evaluating shows while it works: a bar with an estimate on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["EvaluationProgress"]

log = logging.getLogger(__name__)

_EVERY_SECONDS = 15.0


class EvaluationProgress:
    """Counts examples over all models and suites; a context manager."""

    def __init__(self, total: int, console: Console | None = None) -> None:
        self.total = total
        self.done = 0
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._busy = 0.0
        self._since = 0.0
        self._told = 0.0
        self._what = ""

    def __enter__(self) -> EvaluationProgress:
        if self._console.is_terminal and self.total:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("examples"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._bar.start()
            self._bar.add_task("evaluate", total=self.total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def prepare(self, name: str) -> None:
        """The model `name` is made ready: read, or merged first."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=f"{name}: making it ready")

    def begin(self, what: str) -> None:
        """`what` (a model on a suite) is scored from now on."""
        self._what = what
        self._since = time.monotonic()
        self._told = self._told or self._since
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=what)

    def tick(self, count: int) -> None:
        """`count` more examples are done."""
        self.done += count
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)
        elif time.monotonic() - self._told > _EVERY_SECONDS:
            self._told = time.monotonic()
            log.info("%s: %d of %d examples%s", self._what, self.done, self.total, self._estimate())

    def end(self, result: str) -> None:
        """What `begin` named is scored: `result`."""
        seconds = time.monotonic() - self._since
        self._busy += seconds
        line = f"{self._what}: {result}, {seconds:.1f} s"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            self._told = time.monotonic()
            log.info("%s%s", line, self._estimate())

    def say(self, line: str) -> None:
        """A line about work that has no examples."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            log.info("%s", line)

    def _estimate(self) -> str:
        busy = self._busy or time.monotonic() - self._since
        left = busy / max(self.done, 1) * (self.total - self.done)
        return f"; about {left:.0f} s of scoring left" if left >= 1 else ""
