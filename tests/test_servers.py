"""Servers of our own: they start, they run what is scheduled, they end with whoever started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from pipeline import environment

from poemerge.errors import ServerError
from poemerge.filelock import exclusive, holder
from poemerge.project import Project
from poemerge.servers import answers, embedded_prefect, mlflow_server, publish, published

ROOT = Path(__file__).parents[1]

SCHEDULED = """
import time
from pathlib import Path
from poemerge.lifeline import Child
from poemerge.project import Project
from poemerge.servers import prefect_server, use_prefect

def completed(client):
    return [run for run in client.read_flow_runs() if run.state_type.value == "COMPLETED"]

project = Project(Path.cwd())
with prefect_server(project, schedules=True) as url, open("serving.log", "wb") as log:
    use_prefect(project, url)
    from prefect.client.orchestration import get_client
    with Child("serving", [], cwd=project.root, output=log), get_client(sync_client=True) as client:
        deadline = time.monotonic() + 240
        while not completed(client) and time.monotonic() < deadline:
            time.sleep(0.5)
        print([run.auto_scheduled for run in completed(client)][:1], Path("noted.txt").read_text(), flush=True)
"""

SERVING = """
from datetime import timedelta
from pathlib import Path
from prefect import flow

@flow
def noted():
    Path("noted.txt").write_text("ran")

if __name__ == "__main__":
    noted.serve("often", interval=timedelta(seconds=5))
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def start(code: str, project: Project, **more: str) -> subprocess.Popen[str]:
    env = environment() | {"PYTHONPATH": f"{ROOT}{os.pathsep}{project.root}", **more}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=project.root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def working_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and Path(process.cwd()) == folder:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def wait_until_nobody_works_in(folder: Path) -> None:
    deadline = time.monotonic() + 15
    while (left := working_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.mark.server
def test_a_prefect_server_starts_and_a_scheduled_run_happens(project: Project) -> None:
    # Versions of fastapi and sqlalchemy that pip calls compatible break one or the other.
    (project.root / "serving.py").write_text(SERVING)
    process = start(SCHEDULED, project)
    out, err = process.communicate(timeout=500)
    assert out.strip() == "[True] ran", err
    wait_until_nobody_works_in(project.root)


EMBEDDED = """
import os, sys, time
from pathlib import Path
from poemerge.project import Project
from poemerge.servers import embedded_prefect
from poemerge.cli.flows import ended_by_sigterm
with ended_by_sigterm(), embedded_prefect(Project(Path.cwd())) as url:
    print(url, flush=True)
    time.sleep(300)
"""


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_embedded_server_ends_with_its_starter(project: Project, number: signal.Signals) -> None:
    process = start(EMBEDDED, project)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert answers(f"{url}/health", seconds=10)
    with urllib.request.urlopen(f"{url}/admin/settings", timeout=20) as response:
        assert json.load(response)["server"]["analytics_enabled"] is False
    assert (project.prefect_home / "prefect.db").is_file()
    process.send_signal(number)
    process.wait(30)
    wait_until_nobody_works_in(project.root)
    assert not answers(f"{url}/health")


@pytest.mark.server
def test_an_mlflow_server_serves_the_projects_own_store_and_commands_find_it(project: Project) -> None:
    with mlflow_server(project) as url:
        with urllib.request.urlopen(f"{url}/", timeout=60) as response:
            assert b"MLflow" in response.read()
        with publish(project, {"mlflow": url, "prefect": "http://127.0.0.1:9/api"}):
            assert published(project) == {"mlflow": url}, "no dead ones"
        assert published(project) == {}
    assert project.mlflow_db.is_file()
    assert not answers(f"{url}/health")


def test_a_server_that_is_configured_must_answer(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(ServerError, match="PREFECT_API_URL"), embedded_prefect(project):
        pass


def test_who_holds_a_lock_is_known_and_a_dead_holder_holds_nothing(project: Project) -> None:
    lock = project.run_lock
    code = f"""
import sys; from pathlib import Path; from poemerge.filelock import exclusive; import time
with exclusive(Path({str(lock)!r})):
    print("held", flush=True); time.sleep(300)
"""
    process = start(code, project)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    assert holder(lock) == str(process.pid)
    process.kill()
    process.wait()
    assert holder(lock) is None
    with exclusive(lock):
        pass
