"""What `poemerge run` shows on a terminal: stages at work and done, and the verdict with its gain at the end."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from poemerge.cli.progress import StageDisplay
from poemerge.cli.verdict import say_verdict
from poemerge.project import STAGES, Project
from tasks.report import StageReport
from tasks.stage import StageEvent, StageOutcome

BARS = """
from pathlib import Path
from poemerge.cli.progress import StageDisplay
from poemerge.project import Project

with StageDisplay(Project(Path.cwd()), []):
    from dvc.progress import Tqdm

    class Terminal:
        isatty = staticmethod(lambda: True)
        write = staticmethod(lambda text: None)
        flush = staticmethod(lambda: None)

    with Tqdm(desc="hashing", file=Terminal()) as bar:
        Path("said").write_text("nothing drawn" if bar.disable else "bars")
"""


def test_stages_on_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Marks and times keep their columns, a key figure is shown whole, what a stage says now is cut to its line."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "90")
    project = Project(tmp_path)
    project.stage_seconds.parent.mkdir(parents=True)
    project.stage_seconds.write_text(json.dumps({"tail": 50.0}))
    listeners: list[Callable[[Any], None]] = []
    headline = " ".join(f"figure{i}" for i in range(20))
    with StageDisplay(project, listeners) as display:
        (hear,) = listeners
        hear(StageEvent("fetch", "began"))
        outcome = StageOutcome("fetch", "ran", 12.34, StageReport(headline))
        hear(StageEvent("fetch", "ended", outcome=outcome))
        hear(StageEvent("tail", "began"))
        hear(StageEvent("tail", "line", "INFO tasks.tail: residuals [of] " + "x" * 200))
        display._live.refresh()
    assert not listeners
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    last = shown[shown.rindex("fetch") - 3 :]
    assert re.search(r"✓ +fetch +ran +12\.3 s +figure0 ", last)
    for i in range(20):
        assert f"figure{i}" in last
    assert re.search(r"▶ +tail +at work +0 of about 50 s +residuals \[of\] x+…", last)
    for stage in STAGES[2:]:
        assert stage in last
    assert all(len(line.rstrip()) <= 90 for line in last.splitlines())


def test_dvc_draws_no_bars_across_the_table(tmp_path: Path) -> None:
    """In a process of its own: DVC's first import sets the level that its bars follow."""
    environment = os.environ | {
        "FORCE_COLOR": "1",
        "TERM": "xterm-256color",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", BARS], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (tmp_path / "said").read_text() == "nothing drawn"


@pytest.mark.parametrize("terminal", [True, False])
def test_warnings_are_seen_and_those_of_gates_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    listeners: list[Callable[[Any], None]] = []
    with StageDisplay(Project(tmp_path), listeners):
        for stage, warning in (("task_vectors", "one [two] points against the others"), ("register", "gate mean: low")):
            listeners[0](StageEvent(stage, "began"))
            report = StageReport("done", warnings=[warning])
            listeners[0](StageEvent(stage, "ended", outcome=StageOutcome(stage, "unchanged", 1.0, report)))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()
    told = [" ".join(line.split()) for line in shown if "points against" in line]
    start = "! task_vectors:" if terminal else "task_vectors warning"
    assert told == [f"{start} one [two] points against the others"]
    assert not any("gate mean" in line for line in shown)


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (
            [0.0042, 0.02],
            "interval +0.0042 to +0.0200: more than chance explains.",
        ),
        ([-0.001, 0.02], "interval -0.0010 to +0.0200: inside the noise."),
    ],
)
def test_run_ends_with_the_verdict_by_how_much_and_how_sure(tmp_path: Path, interval: list[float], said: str) -> None:
    project = Project(tmp_path)
    figures = {"gain": 0.0123, "interval": interval}
    gates = [{"name": "mean", "verdict": "pass", "figures": figures, "reason": "better [than before]"}]
    registration = {"model": "wren", "version": 2, "digest": "d" * 64, "aliases": ["champion"], "gates": gates,
                    "promoted": True, "champion_before": 1}  # fmt: skip
    project.registration_json.parent.mkdir(parents=True)
    project.registration_json.write_text(json.dumps(registration))
    stream = io.StringIO()
    say_verdict(project, Console(file=stream, width=200))
    text = stream.getvalue()
    assert "pass  mean: better [than before]" in text
    assert f"Version 2 is champion; it was 1. Mean normalised score +0.0123 against the champion before, {said}" in text
