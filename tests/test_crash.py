"""kill -9 at any stage: nothing is left running, and the next run completes with the bytes of an undisturbed one.

Three points by default; with POEMERGE_CRASH_MATRIX set, every stage × who is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipeline import environment, make_finished_project, poemerge, read_params, working_in, write_params
from tiny import make_full_expert

from poemerge.filelock import holder
from poemerge.project import STAGES, Project

pytestmark = pytest.mark.server

VICTIMS = ("stage", "flow", "everything")
POINTS = (
    [(stage, victim) for stage in STAGES for victim in VICTIMS]
    if os.environ.get("POEMERGE_CRASH_MATRIX")
    else [("merge", "flow"), ("evaluate", "stage"), ("register", "everything")]
)

CHANGES: dict[str, dict[str, Any]] = {
    "tail": {"tail": {"seed": 7}},
    "expert": {"expert": {"family": "student_t", "tail_index": 2.5}},
    "merge": {"merge": {"scale_factor": 0.7}},
    "evaluate": {"evaluate": {"bootstrap_samples": 150}},
    "register": {"register": {"approval_hours": 12}},
}
"""What gives a stage work, and none to those before it; the first two have work when an expert lands."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_finished_project(tmp_path_factory.mktemp("crash") / "project")


def stage_process(project: Project, stage: str) -> psutil.Process | None:
    for process in working_in(project.root):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:] == ["-m", "tasks", stage]:
                return process
    return None


def give_work_to(project: Project, stage: str, count: int) -> None:
    if stage in CHANGES:
        params = read_params(project.root)
        ((section, values),) = CHANGES[stage].items()
        # A value that no earlier point has used: DVC's run cache would restore what that one made.
        fresh = {key: value + count if type(value) in (int, float) else value for key, value in values.items()}
        write_params(project.root, params | {section: params[section] | fresh})
    else:
        make_full_expert(project.root / "models" / "base", project.root / "models" / "apples", seed=100 + count)


def undisturbed_digest(project: Project, stage: str, folder: Path) -> str:
    """What the stages from `stage` to merge make of the same inputs when nobody kills them."""
    shutil.copytree(project.root, folder, ignore=shutil.ignore_patterns(".poemerge", "cache", "merged"))
    for name in STAGES[STAGES.index(stage) : STAGES.index("merge") + 1]:
        subprocess.run(
            [sys.executable, "-m", "tasks", name], cwd=folder, env=environment(), check=True, capture_output=True
        )
    return digest(Project(folder))


def flow_runs(project: Project) -> list[str]:
    """The state of each flow run, oldest first."""
    with sqlite3.connect(f"file:{project.prefect_home / 'prefect.db'}?mode=ro", uri=True) as database:
        return [state for (state,) in database.execute("select state_type from flow_run order by start_time")]


def digest(project: Project) -> str:
    found: str = json.loads(project.merge_json.read_text(encoding="utf-8"))["digest"]
    return found


@pytest.mark.parametrize(("stage", "victim"), POINTS)
def test_kill_9(finished: Project, stage: str, victim: str, tmp_path: Path) -> None:
    give_work_to(finished, stage, POINTS.index((stage, victim)))
    flow = subprocess.Popen(
        [sys.executable, "-m", "poemerge", "run"],
        cwd=finished.root,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while (at_work := stage_process(finished, stage)) is None and flow.poll() is None:
        time.sleep(0.01)
    assert at_work is not None, flow.communicate()[1]
    if victim == "stage":
        at_work.kill()
        _, err = flow.communicate(timeout=120)
        assert flow.returncode == 1
        assert f"{stage} failed" in err
    else:
        for process in working_in(finished.root) if victim == "everything" else [psutil.Process(flow.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        flow.communicate(timeout=120)
    deadline = time.monotonic() + 20
    while (left := working_in(finished.root)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "orphans"
    assert holder(finished.run_lock) is None

    done = poemerge(finished, "run")
    assert done.returncode == 0, done.stderr
    lines = [line.split()[:2] for line in done.stderr.splitlines() if len(line.split()) > 1]
    said = {words[0]: words[1] for words in lines if words[1] != "warning"}
    assert said[stage] in {"ran", "restored"}
    assert all(said[before] == "unchanged" for before in STAGES[: STAGES.index(stage)]), "it resumes where it was"
    assert json.loads(finished.registration_json.read_text(encoding="utf-8"))["digest"] == digest(finished)
    assert flow_runs(finished)[-2:] == ["FAILED" if victim == "stage" else "CRASHED", "COMPLETED"], "none seems alive"
    plan = json.loads(poemerge(finished, "plan", "--json").stdout)
    assert plan["work"] is False
    if STAGES.index(stage) <= STAGES.index("merge"):
        assert digest(finished) == undisturbed_digest(finished, stage, tmp_path / "control")
