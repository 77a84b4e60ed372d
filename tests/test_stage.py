"""A stage's process through DVC: what it says, how it ends, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from poemerge.errors import StageError
from poemerge.project import Project
from tasks import stage as stage_module
from tasks.stage import StageEvent, run_dvc

SLEEPER = "import subprocess, time; subprocess.Popen(['sleep', '300']); print('begun', flush=True); time.sleep(300)"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A DVC repository with a stage that answers, one that fails, and one that never ends."""
    (tmp_path / "work.py").write_text(
        "import pathlib, sys, os\n"
        "print('value', pathlib.Path('in.txt').read_text(), os.path.dirname(sys.executable))\n"
        "pathlib.Path('out.txt').write_text(pathlib.Path('in.txt').read_text() * 2)\n"
    )
    (tmp_path / "fail.py").write_text("import sys; print('ERROR of the stage'); sys.exit(3)\n")
    (tmp_path / "sleep.py").write_text(SLEEPER)
    (tmp_path / "in.txt").write_text("7")
    (tmp_path / "params.yaml").write_text("{}\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n"
        "  work:\n    cmd: python work.py\n    deps: [in.txt, work.py]\n    outs: [out.txt]\n"
        "  fail:\n    cmd: python fail.py\n    outs: [never.txt]\n"
        "  sleep:\n    cmd: python sleep.py\n    outs: [slept.txt]\n"
    )
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    return Project(tmp_path)


def processes_of(project: Project) -> list[psutil.Process]:
    """Every process that works in the project's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and Path(process.cwd()) == project.root:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_until_empty(project: Project, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while (left := processes_of(project)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"orphans: {left}"


def action_of(project: Project) -> str:
    return stage_module._action(run_dvc(project, ["repro", "--single-item", "work"], None, stage="work"))


def test_runs_skips_and_restores_and_says_which(project: Project) -> None:
    assert action_of(project) == "ran"
    assert (project.root / "out.txt").read_text() == "77"
    assert action_of(project) == "unchanged"
    (project.root / "in.txt").write_text("8")
    assert action_of(project) == "ran"
    (project.root / "in.txt").write_text("7")
    assert action_of(project) == "restored"
    assert (project.root / "out.txt").read_text() == "77"


def test_the_stage_runs_under_this_interpreter_and_listeners_hear_its_lines(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    heard: list[StageEvent] = []
    monkeypatch.setattr(stage_module, "listeners", [heard.append])
    run_dvc(project, ["repro", "--single-item", "work"], None, stage="work")
    assert f"value 7 {Path(sys.executable).parent}" in [event.text for event in heard]


def test_a_failure_carries_the_command_and_what_the_stage_wrote(project: Project) -> None:
    with pytest.raises(StageError, match=r"failed to run: python fail\.py, exited with 3"):
        run_dvc(project, ["repro", "--single-item", "fail"], None, stage="fail")


def test_a_stages_own_message_and_exit_status_come_through(project: Project) -> None:
    failure = project.stage_failure("fail")
    failure.parent.mkdir(parents=True)
    failure.write_text(json.dumps({"message": "expert cats is bad", "exit_status": 2}))
    with pytest.raises(StageError, match="expert cats is bad") as caught:
        run_dvc(project, ["repro", "--single-item", "fail"], None, stage="fail")
    assert caught.value.exit_status == 2


def test_out_of_time_ends_the_whole_group(project: Project) -> None:
    with pytest.raises(StageError, match="did not end in time"):
        run_dvc(project, ["repro", "--single-item", "sleep"], 4.0, stage="sleep")
    wait_until_empty(project)


# A shell has its background jobs ignore SIGINT, and what they start inherits that: tests must not.
RUNNER = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "import sys; from pathlib import Path; from poemerge.project import Project\n"
    "from tasks.stage import run_dvc, listeners\n"
    "listeners.append(lambda event: print(event.text, flush=True))\n"
    "run_dvc(Project(Path(sys.argv[1])), ['repro', '--single-item', 'sleep'], None, stage='sleep')\n"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ending_the_caller_ends_the_stage(project: Project, number: signal.Signals) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(project.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert caller.stdout is not None
    for line in caller.stdout:
        if line.strip() == "begun":
            break
    assert len(processes_of(project)) >= 3, "dvc, the stage and its own child"
    caller.send_signal(number)
    caller.wait(10)
    caller.stdout.close()
    wait_until_empty(project)
    # What was killed holds nothing: the next stage runs.
    assert action_of(project) == "ran"


def test_threads_of_one_process_take_turns(project: Project) -> None:
    def work(name: str) -> None:
        run_dvc(project, ["repro", "--single-item", name], None, stage=name)

    (project.root / "dvc.yaml").write_text(
        "stages:\n"
        + "".join(
            f"  s{k}:\n    cmd: date +%s.%N > a{k} && sleep 0.3 && date +%s.%N > b{k}\n    outs: [a{k}, b{k}]\n"
            for k in (0, 1)
        )
    )
    threads = [threading.Thread(target=work, args=(f"s{k}",)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = [[float((project.root / f"{end}{k}").read_text()) for end in "ab"] for k in (0, 1)]
    first, second = sorted(times)
    assert first[1] < second[0]


def test_python_m_tasks_refuses_a_stage_that_does_not_exist(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tasks", "mergee"], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "task_vectors" in done.stderr
