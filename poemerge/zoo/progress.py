"""What a build shows: bars with an estimate on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["Progress"]


class Progress:
    """Follows several trainings at once; its methods may be called from several threads."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bars: Bars | None = None
        self._rows: dict[str, TaskID] = {}
        self._fractions: dict[str, float] = {}
        self._started = 0.0

    def say(self, line: str) -> None:
        """One line about a step that has no bar."""
        self.console.print(line, highlight=False)

    @contextmanager
    def tracking(self, names: Sequence[str]) -> Iterator[None]:
        """Shows a bar for the whole and one for each of `names` that is under way."""
        self._fractions = dict.fromkeys(names, 0.0)
        self._started = time.monotonic()
        if not self.console.is_terminal:
            self.say(f"training {len(names)} experts")
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, TimeRemainingColumn(), console=self.console) as bars:
            self._bars = bars
            self._rows = {"": bars.add_task("all experts", total=100)}
            yield
        self._bars = None

    def step(self, name: str, step: int, steps: int) -> None:
        """Training `name` has done `step` of `steps`."""
        if step == 1 and self._bars is None:
            self.say(f"{name}: started, {steps} steps")
        self._fractions[name] = step / steps
        if self._bars is not None:
            if name not in self._rows:
                self._rows[name] = self._bars.add_task(name, total=steps)
            self._bars.update(self._rows[name], completed=step)
            self._bars.update(self._rows[""], completed=round(100 * self._whole()))

    def done(self, name: str, result: str) -> None:
        """Training `name` has ended with `result`."""
        self._fractions[name] = 1.0
        if self._bars is not None and name in self._rows:
            self._bars.remove_task(self._rows.pop(name))
        elapsed = time.monotonic() - self._started
        left = elapsed / max(self._whole(), 1e-9) - elapsed
        self.say(f"{name}: {result}" + (f"; about {left:.0f} s left" if left >= 1 else ""))

    def _whole(self) -> float:
        return sum(self._fractions.values()) / max(len(self._fractions), 1)
