"""The one Prefect task: it runs a stage through DVC, which decides whether there is work and keeps the bytes.

Prefect's own caching is off here: DVC's skip is what makes a second run resume.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from prefect import get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import MissingContextError
from prefect.tasks import Task

from poemerge.errors import StageError
from poemerge.filelock import exclusive
from poemerge.lifeline import Child
from poemerge.project import Project
from poemerge.wholefile import write_whole
from tasks.report import StageReport

__all__ = [
    "Action",
    "StageEvent",
    "StageOutcome",
    "has_remote",
    "listeners",
    "push",
    "run_dvc",
    "run_stage",
    "worth_retrying",
]

Action = Literal["ran", "restored", "unchanged"]
"""What DVC did: ran the command, took the outputs from its run cache, or found nothing to do."""

HINTS = (
    "To track the changes with git",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc push`",
)
"""What DVC says after every stage to somebody who types its commands: not of use here."""

MAX_IMAGE_BYTES = 2_000_000
"""Figures up to this size go into the Prefect page; larger ones stay in the report."""


@dataclass(frozen=True)
class StageOutcome:
    """How a stage ended: what DVC did, in how many seconds, and the stage's own report."""

    stage: str
    action: Action
    seconds: float
    report: StageReport


@dataclass(frozen=True)
class StageEvent:
    """Something a listener may show: a stage began, wrote a line, ended with `outcome`, or failed with `text`."""

    stage: str
    kind: Literal["began", "line", "ended", "failed"]
    text: str = ""
    outcome: StageOutcome | None = None


listeners: list[Callable[[StageEvent], None]] = []
"""Called in this process with every event of a stage: how a terminal shows live what happens."""


class _ToldError(StageError):
    """A failure that the stage itself explained; without that it was killed, or DVC refused to run it."""


def worth_retrying(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether a stage that failed may succeed when tried again: the network may come back, bad input stays bad."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, _ToldError) and error.exit_status == 1


@task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(stage: str, root: Path, timeout_seconds: float | None = None) -> StageOutcome:
    """Run the stage `stage` of the project at `root` by `dvc repro`, unless DVC finds that nothing changed.

    Every line goes to the logger of the task run; whatever ends this call early (an exception, a cancelled run, a
    signal, `timeout_seconds`) ends DVC, the stage and all their children. Raises StageError with the stage's own
    message, and its exit status 2 when its input was bad.
    """
    project = Project(root)
    _tell(StageEvent(stage, "began"))
    began = time.monotonic()
    try:
        project.stage_failure(stage).unlink(missing_ok=True)
        action: Action = "unchanged"
        if not _is_up_to_date(project, stage):
            action = _action(run_dvc(project, ["repro", "--single-item", stage], timeout_seconds, stage=stage))
        report = StageReport.read(project.stage_report(stage))
        outcome = StageOutcome(stage, action, time.monotonic() - began, report)
    except Exception as error:
        _tell(StageEvent(stage, "failed", str(error)))
        raise
    if outcome.action == "ran":
        _remember_seconds(project, stage, outcome.seconds)
    if outcome.action != "unchanged":
        _publish(project, outcome)
    _logger().info("%s: %s, %.1f s. %s", stage, outcome.action, outcome.seconds, outcome.report.headline)
    for warning in outcome.report.warnings:
        _logger().warning("%s: %s", stage, warning)
    _tell(StageEvent(stage, "ended", outcome=outcome))
    return outcome


@task(name="push", cache_policy=NO_CACHE, persist_result=False, retries=3, retry_delay_seconds=[2, 8, 32])
def push(root: Path, timeout_seconds: float | None = None) -> None:
    """Send the bytes of the project at `root` to DVC's default remote."""
    run_dvc(Project(root), ["push"], timeout_seconds, stage="push")


def _is_up_to_date(project: Project, stage: str) -> bool:
    """Whether `dvc repro` would skip the stage, asked in this process: that is five times as fast as asking `dvc`."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    with exclusive(project.dvc_guard), contextlib.suppress(DvcException), Repo(str(project.root)) as repo:
        return not repo.status(targets=[stage])
    # DVC is busy, or does not like the project: `dvc repro` waits, or says why.
    return False


def has_remote(project: Project) -> bool:
    """Whether DVC has a default remote, to which the project's bytes go."""
    from dvc.config import Config

    return bool(Config(str(project.root / ".dvc"))["core"].get("remote"))


def run_dvc(project: Project, arguments: Sequence[str], timeout_seconds: float | None, *, stage: str) -> list[str]:
    """Run `dvc ARGUMENTS` in the project's root; one at a time in a project, whoever calls.

    Returns the lines it wrote, which also go to the logger and to the listeners as lines of `stage`. Raises StageError
    when it fails, or when it takes longer than `timeout_seconds`.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    waited = False
    with exclusive(project.dvc_guard, lambda pid: _logger().info("Waiting for DVC work of process %s", pid)):
        while True:
            status, lines = _run_once(project, arguments, deadline, stage)
            if status == 0:
                return lines
            # A `dvc repro` by hand holds files that we need: DVC fails at once there, and we wait.
            if not any("is busy, it is being blocked by" in line for line in lines):
                raise _failure(project, stage, status, lines)
            if not waited:
                _logger().info("Waiting for another DVC command in this project")
                waited = True
            if deadline is not None and time.monotonic() > deadline:
                raise _failure(project, stage, status, lines)
            time.sleep(1.0)


def _run_once(project: Project, arguments: Sequence[str], deadline: float | None, stage: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    logger = _logger()
    with Child("dvc", ["--wait-for-lock", *arguments], cwd=project.root, env=_environment()) as child:
        for line in _read_lines(child, deadline, stage):
            lines.append(line)
            logger.log(_level(line), "%s", line)
            _tell(StageEvent(stage, "line", line))
        return child.wait(), lines


def _environment() -> dict[str, str]:
    """Ours, with the `python` of dvc.yaml's commands being this interpreter."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.environ | {
        "PATH": os.pathsep.join(folders),
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def _read_lines(child: Child, deadline: float | None, stage: str) -> Iterator[str]:
    """Lines as they come, until the child has ended; a descendant that keeps the pipe open does not hold us."""
    assert child.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_fill, args=(child.stdout, lines), name=f"lines of {stage}", daemon=True).start()
    ended_at: float | None = None
    while True:
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            if ended_at is None and child.poll() is not None:
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > 2.0:
                return
            if deadline is not None and time.monotonic() > deadline and ended_at is None:
                raise StageError(
                    f"The stage {stage} did not end in time and was ended.\n"
                    "  next:     raise its time limit in flows/remerge.py, or see in its log what it waited for"
                ) from None
            continue
        if line is None:
            return
        yield line


def _fill(stream: IO[bytes], lines: queue.SimpleQueue[str | None]) -> None:
    for raw in stream:
        # A progress bar overwrites its line with carriage returns: what it showed last is the line.
        text = raw.decode("utf-8", errors="replace").rstrip("\r\n").rpartition("\r")[2].rstrip()
        if text and not text.lstrip().startswith(HINTS):
            lines.put(text)
    lines.put(None)


def _level(line: str) -> int:
    if line.startswith("ERROR"):
        return logging.ERROR
    return logging.WARNING if line.startswith("WARNING") else logging.INFO


def _action(lines: Sequence[str]) -> Action:
    if any(line.startswith("Running stage") for line in lines):
        return "ran"
    return "restored" if any("is cached - skipping run" in line for line in lines) else "unchanged"


def _failure(project: Project, stage: str, status: int, lines: Sequence[str]) -> StageError:
    try:
        told = json.loads(project.stage_failure(stage).read_text(encoding="utf-8"))
    except FileNotFoundError:
        last = [line for line in lines if line.startswith("ERROR")] or list(lines)[-3:]
        return StageError(
            f"{stage} failed.\n"
            f"  got:      {' '.join(last) or f'exit status {status} without a word'}\n"
            "  next:     see the lines above; a stage that was killed leaves no message (was memory short?)"
        )
    error = _ToldError(f"The stage {stage} failed: {told['message']}")
    error.exit_status = int(told["exit_status"])
    return error


def _remember_seconds(project: Project, stage: str, seconds: float) -> None:
    """Keep how long the stage took, for the estimates of the next run."""
    path = project.stage_seconds
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[stage] = round(seconds, 2)
    write_whole(path, json.dumps(known, indent=2) + "\n")


def _publish(project: Project, outcome: StageOutcome) -> None:
    """The stage's report on the Prefect page: its headline, its table, its figure."""
    key, report = outcome.stage.replace("_", "-"), outcome.report
    warnings = "".join(f"\n- Warning: {text}" for text in report.warnings)
    create_markdown_artifact(f"{report.headline}\n{warnings}", key=key, description=f"{outcome.stage}: key figure")
    if report.table:
        create_table_artifact(report.table, key=f"{key}-table", description=f"{outcome.stage}: table")
    figure = project.root / report.figure if report.figure else None
    if figure is not None and figure.is_file() and figure.stat().st_size <= MAX_IMAGE_BYTES:
        encoded = base64.b64encode(figure.read_bytes()).decode("ascii")
        create_image_artifact(
            f"data:image/png;base64,{encoded}", key=f"{key}-figure", description=f"{outcome.stage}: figure"
        )


def _tell(event: StageEvent) -> None:
    for listener in listeners:
        listener(event)


def _logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)
