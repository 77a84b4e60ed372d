"""Starting a flow of the project in this process, as a Prefect deployment does by its entrypoint."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType, ModuleType
from typing import Any, NoReturn

from poemerge.project import Project
from poemerge.servers import embedded_prefect

__all__ = ["ended_by_sigterm", "load", "prefect_here", "run_remerge"]


def load(project: Project, module: str) -> ModuleType:
    """A module of the project's own flows/ or tasks/, which are no part of the installed package."""
    root = str(project.root)
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(module)


def run_remerge(project: Project, *, reason: str, verbose: bool = False) -> dict[str, Any]:
    """Run flows/remerge.py here, on the configured Prefect server or one of our own, and show its stages live.

    Returns the flow's summary; raises what the flow raises.
    """
    from poemerge.cli.progress import StageDisplay

    # What Prefect would write on the terminal tears the display; all of it is on the run's page.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    with prefect_here(project):
        remerge, stage = load(project, "flows.remerge"), load(project, "tasks.stage")
        with StageDisplay(project, stage.listeners, verbose=verbose):
            summary: dict[str, Any] = remerge.remerge(remerge.Remerge(reason=reason))
    return summary


@contextlib.contextmanager
def prefect_here(project: Project) -> Iterator[None]:
    """Within this block flows run in this process, in the project's root, on the configured Prefect server or our own.

    Enter it before prefect is imported.
    """
    os.chdir(project.root)
    with ended_by_sigterm(), embedded_prefect(project):
        try:
            yield
        finally:
            from prefect.events.worker import EventsWorker
            from prefect.logging.handlers import APILogWorker

            # Prefect sends its last lines and events in the background, and the server may end with this block: what
            # is left then is tried again and again at exit.
            for worker in (APILogWorker, EventsWorker):
                worker.drain_all(timeout=10)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within this block SIGTERM unwinds as Ctrl-C does, so that servers and stages are ended in order."""

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
