"""`poemerge serve`: a landing becomes a version with nobody touching anything, and dead runs free their slot."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipeline import environment, make_finished_project, poemerge, read_params, write_params
from tiny import make_full_expert

from poemerge.filelock import holder
from poemerge.project import Project

pytestmark = pytest.mark.server

PATIENCE = 500.0


def working_in(folder: Path) -> list[psutil.Process]:
    """Every process whose working directory is `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and Path(process.cwd()) == folder:
                found.append(process)
    return found


def at_work(project: Project) -> psutil.Process | None:
    """The stage that runs now."""
    for process in working_in(project.root):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "tasks"]:
                return process
    return None


class Served:
    """A project with `poemerge serve` running in it."""

    def __init__(self, project: Project, process: subprocess.Popen[bytes], log: Path) -> None:
        self.project, self.process, self.log = project, process, log

    @property
    def api(self) -> str:
        url: str = json.loads((self.project.state / "servers.json").read_text(encoding="utf-8"))["prefect"]
        return url

    def ask(self, path: str, question: dict[str, Any]) -> Any:
        body = json.dumps(question).encode()
        request = urllib.request.Request(f"{self.api}{path}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or b"null")

    def remerges(self) -> list[dict[str, Any]]:
        question = {"deployments": {"name": {"any_": ["remerge"]}}, "sort": "START_TIME_ASC"}
        return self.ask("/flow_runs/filter", question)

    def wait(self, what: str, happened: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = happened()
            if found:
                return found
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.3)
        raise AssertionError(f"waited in vain for {what}\n{self.log.read_text()}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    project = make_finished_project(tmp_path_factory.mktemp("serve") / "project")
    log = project.root.parent / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "poemerge", "serve", "--webhook", "127.0.0.1:0"],
            cwd=project.root,
            env=environment() | {"POEMERGE_WEBHOOK_SECRET": "0123456789abcdef"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    one = Served(project, process, log)
    try:
        one.wait("the worker", lambda: "Worker:" in log.read_text())
        yield one
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def landing(project: Project, name: str, seed: int) -> str:
    """A new revision of the expert `name`; returns the digest that its lock entry will have."""
    make_full_expert(project.root / "models" / "base", project.root / "models" / name, seed=seed)
    return name


def merged_revisions(project: Project) -> dict[str, str]:
    merge = json.loads(project.merge_json.read_text(encoding="utf-8"))
    return {name: facts["revision"] for name, facts in merge["experts"].items()}


def test_landings_close_together_become_one_registered_version(served: Served) -> None:
    project = served.project
    before, version = merged_revisions(project), json.loads(project.registration_json.read_text())["version"]
    for seed, name in ((41, "apples"), (42, "pears")):
        landing(project, name, seed)

    def registered() -> dict[str, Any] | None:
        registration: dict[str, Any] = json.loads(project.registration_json.read_text(encoding="utf-8"))
        return registration if registration["version"] != version else None

    registration = served.wait("a new version", registered)
    after = merged_revisions(project)
    assert {name for name in after if after[name] != before[name]} == {"apples", "pears"}
    assert registration["version"] == version + 1
    served.wait("the runs' end", lambda: all(run["state_type"] == "COMPLETED" for run in served.remerges()))
    assert json.loads(project.registration_json.read_text(encoding="utf-8"))["version"] == version + 1
    lineage = poemerge(project, "lineage", str(version + 1), "--json")
    assert after["apples"] in lineage.stdout, lineage.stderr
    status = json.loads(poemerge(project, "status", "--json").stdout)
    assert status["server"] == served.api
    assert status["landed"] == []
    assert status["failed_runs"] == []


def test_looking_again_and_asking_again_start_nothing(served: Served) -> None:
    count = len(served.remerges())
    url = next(line.split()[-1] for line in served.log.read_text().splitlines() if line.startswith("Webhook:"))
    for _ in range(3):
        request = urllib.request.Request(url, b"{}", {"X-Webhook-Secret": "0123456789abcdef"})
        with urllib.request.urlopen(request, timeout=10) as response:
            assert response.status == 202
    time.sleep(8)
    assert len(served.remerges()) == count


@pytest.mark.skipif("POEMERGE_CRASH_MATRIX" not in os.environ, reason="waits for missing heartbeats: see test_crash.py")
def test_a_killed_run_and_worker_free_their_slot_and_the_next_run_completes(served: Served) -> None:
    project = served.project
    deployment = served.ask("/deployments/filter", {"deployments": {"name": {"any_": ["remerge"]}}})[0]
    assert deployment["global_concurrency_limit"]["limit"] == 1
    landing(project, "apples", 51)

    stage = served.wait("a stage at work", lambda: at_work(project))
    running = [run for run in served.remerges() if run["state_type"] == "RUNNING"]
    assert len(running) == 1
    # From the stage up: its shell, DVC, the flow run, the worker, `serve`.
    above = stage.parents()
    worker = next(process for process in above if "worker" in process.cmdline())
    flow = above[above.index(worker) - 1]
    for process in (worker, flow):
        process.kill()
    psutil.wait_procs([stage], timeout=20)
    assert not stage.is_running(), "the stage ended with its flow"
    served.wait("another worker", lambda: "starting another" in served.log.read_text())

    def crashed() -> bool:
        question = {"flow_runs": {"id": {"any_": [running[0]["id"]]}}}
        return bool(served.ask("/flow_runs/filter", question)[0]["state_type"] == "CRASHED")

    served.wait("the run to be found dead", crashed)
    served.ask(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": {"request": {"reason": "again"}}})
    served.wait(
        "the next run", lambda: any(r["name"] == "again" and r["state_type"] == "COMPLETED" for r in served.remerges())
    )
    assert json.loads(poemerge(project, "plan", "--json").stdout)["work"] is False


def test_kill_9_of_serve_in_the_midst_of_a_run_leaves_nothing_and_the_project_whole(served: Served) -> None:
    project = served.project
    landing(project, "plums-full", 61)
    params = read_params(project.root)
    params["experts"]["plums"] = {"source": "models/plums-full"}
    write_params(project.root, params)
    served.wait("a stage at work", lambda: at_work(project))
    served.process.kill()
    served.process.wait()
    deadline = time.monotonic() + 60
    while (left := working_in(project.root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    assert holder(project.run_lock) is None
    done = poemerge(project, "run")
    assert done.returncode == 0, done.stderr
    assert "plums-full" in json.dumps(json.loads(project.merge_json.read_text(encoding="utf-8"))["experts"])
