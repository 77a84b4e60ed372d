"""What a run shows while it works: a live table of stages on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from poemerge.project import STAGES, Project

__all__ = ["StageDisplay"]

MARKS = {"waiting": "[dim]·[/]", "at work": "[cyan]▶[/]", "failed": "[red]✗[/]"}
DONE = "[green]✓[/]"
ORIGIN = re.compile(r"^INFO [\w.]+: ")
"""Where a stage's line comes from: for the log, not for a table that has the stage beside it."""


class StageDisplay:
    """Listens to the stages of a run of `project` and shows them on stderr while the block runs, then their warnings.

    Arguments: `listeners`, the list of tasks/stage.py that it joins; `verbose`, whether every line of every stage is
    shown on a terminal too (elsewhere they always are).
    """

    def __init__(self, project: Project, listeners: list[Callable[[Any], None]], *, verbose: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._listeners = listeners
        self._verbose = verbose or not self._console.is_terminal
        self._state = dict.fromkeys(STAGES, "waiting")
        self._text = dict.fromkeys(STAGES, "")
        self._began: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._warnings: list[tuple[str, str]] = []
        self._estimates = _estimates(project)
        self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=4)

    def __enter__(self) -> StageDisplay:
        self._listeners.append(self._hear)
        if self._console.is_terminal:
            # DVC, asked in this process, draws bars of its own across the table; they follow its logger's level, which
            # its first import sets.
            import dvc  # noqa: F401

            logging.getLogger("dvc").setLevel(logging.CRITICAL)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listeners.remove(self._hear)
        if self._console.is_terminal:
            self._live.stop()
            for stage, text in self._warnings:
                self._console.print(f"[yellow]! {stage}[/]: {escape(text)}", soft_wrap=True)

    def _hear(self, event: Any) -> None:
        """Take up a StageEvent of tasks/stage.py."""
        stage = event.stage
        if stage not in self._state:
            return
        if event.kind == "began":
            self._state[stage] = "at work"
            self._began[stage] = time.monotonic()
        elif event.kind == "line":
            self._text[stage] = ORIGIN.sub("", event.text)
            if self._verbose:
                self._console.print(f"[dim]{stage}: {escape(event.text)}[/]", soft_wrap=True)
        elif event.kind == "failed":
            self._state[stage] = "failed"
            self._text[stage] = event.text.splitlines()[0]
            self._seconds[stage] = time.monotonic() - self._began[stage]
        else:
            outcome = event.outcome
            self._state[stage], self._text[stage] = outcome.action, outcome.report.headline
            self._seconds[stage] = outcome.seconds
            if not self._console.is_terminal:
                text = f"{stage:<13} {outcome.action:<10} {outcome.seconds:7.1f} s  {outcome.report.headline}"
                self._console.print(escape(text), soft_wrap=True)
            if stage == "register":
                return  # it warns of the gates that failed, which the verdict shows
            for warning in outcome.report.warnings:
                if self._console.is_terminal:
                    self._warnings.append((stage, warning))
                else:
                    self._console.print(f"{stage:<13} warning    {escape(warning)}", soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False, expand=True)
        # Widths are fixed but for the last: rich would take from the narrow columns first.
        table.add_column(width=1)
        table.add_column(width=max(map(len, STAGES)))
        table.add_column(width=len("unchanged"))
        table.add_column(width=len("999 of about 999 s"), justify="right")
        table.add_column(ratio=1)
        for stage in STAGES:
            state, text = self._state[stage], Text(self._text[stage])
            if state == "at work":
                # What it says now is one line; a key figure is shown whole.
                text = Text(self._text[stage], style="dim", no_wrap=True, overflow="ellipsis")
            table.add_row(MARKS.get(state, DONE), stage, state, self._time(stage), text)
        return table

    def _time(self, stage: str) -> str:
        if stage in self._seconds:
            return f"{self._seconds[stage]:.1f} s"
        estimate = self._estimates.get(stage)
        if stage not in self._began:
            return ""
        elapsed = time.monotonic() - self._began[stage]
        return f"{elapsed:.0f} s" if estimate is None else f"{elapsed:.0f} of about {max(estimate, elapsed):.0f} s"


def _estimates(project: Project) -> dict[str, float]:
    """How long each stage took when it last ran."""
    try:
        known: dict[str, float] = json.loads(project.stage_seconds.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known
