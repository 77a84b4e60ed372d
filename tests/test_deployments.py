"""`poemerge serve`: a landing becomes a version with nobody touching anything, and dead runs free their slot."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hub_server import Hub
from pipeline import environment, make_finished_project, poemerge, read_params, working_in, write_params
from tiny import make_full_expert

from poemerge.checkpoints import folder_digest
from poemerge.filelock import holder
from poemerge.project import Project
from poemerge.registry.promotion import open_requests
from poemerge.registry.tracking import connect, experiment_id
from poemerge.registry.versions import alias_version

pytestmark = pytest.mark.server
long = pytest.mark.skipif("POEMERGE_CRASH_MATRIX" not in os.environ, reason="long: set POEMERGE_CRASH_MATRIX")

PATIENCE = 500.0
ENDS = ("COMPLETED", "CRASHED")
SCHEDULED = {"type": "SCHEDULED"}


def at_work(project: Project) -> psutil.Process | None:
    """The stage that runs now."""
    for process in working_in(project.root):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "tasks"]:
                return process
    return None


class Served:
    """A project with `poemerge serve` running in it."""

    process: subprocess.Popen[bytes]

    def __init__(self, project: Project, hub: Hub, log: Path) -> None:
        self.project, self.hub, self.log = project, hub, log

    @property
    def api(self) -> str:
        url: str = json.loads((self.project.state / "servers.json").read_text(encoding="utf-8"))["prefect"]
        return url

    def ask(self, path: str, question: dict[str, Any]) -> Any:
        """What the server answers; asked again where it is busy, as Prefect's own client asks (503, no answer)."""
        body = json.dumps(question).encode()
        request = urllib.request.Request(f"{self.api}{path}", body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    return json.loads(response.read() or b"null")
            except (urllib.error.HTTPError, TimeoutError) as error:
                busy = isinstance(error, TimeoutError) or error.code == 503
                if not busy or time.monotonic() > deadline:
                    log = self.project.state / "logs" / "prefect.log"
                    raise AssertionError(f"{path} {question}: {error}\n{log.read_text()}") from error
                time.sleep(1.0)

    def runs(self, deployment: str, *states: str) -> list[dict[str, Any]]:
        """The runs of a deployment, those in one of `states` where some are given, oldest first."""
        question = {"deployments": {"name": {"any_": [deployment]}}, "sort": "START_TIME_ASC"}
        runs: list[dict[str, Any]] = self.ask("/flow_runs/filter", question)
        return [run for run in runs if not states or run["state_type"] in states]

    def remerges(self) -> list[dict[str, Any]]:
        return self.runs("remerge")

    def start_run(self, deployment: str, parameters: dict[str, Any]) -> None:
        """A run of a deployment, as a click on Prefect's page starts it."""
        (known,) = self.ask("/deployments/filter", {"deployments": {"name": {"any_": [deployment]}}})
        # Asked again, it is the same run.
        run = {"parameters": parameters, "state": SCHEDULED, "idempotency_key": uuid.uuid4().hex}
        self.ask(f"/deployments/{known['id']}/create_flow_run", run)

    def wait(self, what: str, happened: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = happened()
            if found:
                return found
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.3)
        raise AssertionError(f"waited in vain for {what}\n{self.log.read_text()}")

    def start(self) -> None:
        """`poemerge serve`, until its worker is at work."""
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "poemerge", "serve", "--webhook", "127.0.0.1:0"],
                cwd=self.project.root,
                env=environment()
                | {"POEMERGE_WEBHOOK_SECRET": "0123456789abcdef"}
                | {"HF_ENDPOINT": self.hub.endpoint, "HF_HUB_CACHE": str(self.project.root.parent / "hub-cache")},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.wait("the worker", lambda: "Worker:" in self.log.read_text())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A finished project with a collection of each kind, still empty, and `poemerge serve` at work in it."""
    project = make_finished_project(tmp_path_factory.mktemp("serve") / "project")
    params = read_params(project.root)
    params["collections"] = {
        "dropped": {"source": "drop"},
        "team": {"source": "hf://team"},
        "registered": {"source": "models:/task-*"},
    }
    # No version that the tests make becomes champion by itself.
    params["register"]["gates"] = {"floors": {"apples": 2.0}}
    write_params(project.root, params)
    (project.root / "drop").mkdir()
    with Hub() as hub:
        one = Served(project, hub, project.root.parent / "serve.log")
        try:
            one.start()
            yield one
        finally:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
                one.process.wait(60)


def retrained(served: Served, name: str, seed: int) -> Path:
    """A new expert or a new revision of one, beside the project; returns its folder."""
    return make_full_expert(served.project.root / "models" / "base", served.project.root.parent / name, seed=seed)


def land(project: Project, name: str, seed: int) -> None:
    """A new revision of a local expert."""
    make_full_expert(project.root / "models" / "base", project.root / "models" / name, seed=seed)


def drop(served: Served, name: str, folder: Path) -> str:
    """A new folder in the drop folder, renamed into it; returns its revision."""
    digest = folder_digest(folder)
    folder.rename(served.project.root / "drop" / name)
    return f"sha256:{digest}"


def push(served: Served, name: str, folder: Path) -> str:
    """A commit on the hub; returns its sha."""
    return served.hub.push(f"team/{name}", folder)


def register(served: Served, name: str, folder: Path) -> str:
    """A new version in the project's MLflow registry; returns its URI."""
    client = connect(served.project)
    run = client.create_run(experiment_id(client, served.project, "teams"))
    client.log_artifacts(run.info.run_id, str(folder), "model")
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    version = client.create_model_version(name, f"{run.info.artifact_uri}/model", run.info.run_id)
    return f"models:/{name}/{version.version}"


def registered(project: Project) -> int:
    version: int = json.loads(project.registration_json.read_text(encoding="utf-8"))["version"]
    return version


def new_version(served: Served, before: int, runs: int) -> dict[str, Any]:
    """The lineage of the one version that comes after the version `before`, by one run after `runs`."""
    served.wait("a new version", lambda: registered(served.project) != before)
    served.wait("the runs' end", lambda: all(run["state_type"] == "COMPLETED" for run in served.remerges()))
    assert registered(served.project) == before + 1
    assert len(served.remerges()) == runs + 1
    lineage = poemerge(served.project, "lineage", str(before + 1), "--json")
    assert lineage.returncode == 0, lineage.stderr
    return dict(json.loads(lineage.stdout))


def test_three_landings_within_a_second_become_one_version(served: Served) -> None:
    before, runs = registered(served.project), len(served.remerges())
    ways = {"task-grapes": register, "quinces": push, "cherries": drop}
    folders = {name: retrained(served, name, seed) for seed, name in enumerate(ways, start=41)}
    revisions = {name: land_one(served, name, folders[name]) for name, land_one in ways.items()}
    document = new_version(served, before, runs)
    assert {name: document["experts"][name]["revision"] for name in revisions} == revisions
    assert len(document["experts"]) == 6


@long
@pytest.mark.parametrize(
    ("land_one", "name"),
    [(drop, "melons"), (push, "quinces"), (register, "task-grapes")],
    ids=["drop", "hub", "mlflow"],
)
def test_each_landing_becomes_a_version_that_names_it(
    served: Served, land_one: Callable[[Served, str, Path], str], name: str
) -> None:
    before, runs = registered(served.project), len(served.remerges())
    revision = land_one(served, name, retrained(served, name, 50 + before))
    document = new_version(served, before, runs)
    assert document["experts"][name]["revision"] == revision


def test_a_version_that_passes_its_gates_asks_for_approval_by_itself_and_is_approved(served: Served) -> None:
    project, version = served.project, str(registered(served.project))
    params = read_params(project.root)
    loose = {"gates": {"min_gain": -1.0, "max_suite_drop": 1.0}, "approval": "required", "two_person": True}
    write_params(project.root, params | {"register": params["register"] | loose})
    served.start_run("remerge", {"request": {"reason": "looser gates"}})
    served.wait("a promotion that waits", lambda: served.runs("promote", "PAUSED"))
    (request,) = open_requests(project)
    assert (request.version, request.by) == (version, "remerge")

    # Registered again, it is not asked for again; and the reminder tells that it waits.
    write_params(project.root, params | {"register": params["register"] | loose | {"approval_hours": 48}})
    served.start_run("remerge", {"request": {"reason": "longer hours"}})
    served.start_run("remind", {})
    served.wait("the reminder", lambda: served.runs("remind", "COMPLETED"))
    waiting = {"filter": {"event": {"name": ["poemerge.approval.waiting"]}}}
    events = served.wait("its event", lambda: served.ask("/events/filter", waiting)["events"])
    assert [event["payload"]["by"] for event in events] == ["remerge"]
    served.wait("the run's end", lambda: {run["state_type"] for run in served.remerges()} == {"COMPLETED"})

    done = poemerge(project, "approve", version, "--by", "ann", "--reason", "looked at it")
    assert done.returncode == 0, done.stderr
    assert f"version {version} is champion" in done.stdout
    assert alias_version(connect(project), "tiny", "champion") == version
    assert len(served.runs("promote")) == 1
    write_params(project.root, params)


def test_status_knows_what_is_served_and_that_nothing_is_left(served: Served) -> None:
    project = served.project
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


@long
def test_a_killed_run_and_worker_free_their_slot_and_the_next_run_completes(served: Served) -> None:
    project = served.project
    deployment = served.ask("/deployments/filter", {"deployments": {"name": {"any_": ["remerge"]}}})[0]
    assert deployment["global_concurrency_limit"]["limit"] == 1
    land(project, "apples", 51)

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
    served.start_run("remerge", {"request": {"reason": "again"}})
    served.wait(
        "the next run", lambda: any(r["name"] == "again" and r["state_type"] == "COMPLETED" for r in served.remerges())
    )
    assert json.loads(poemerge(project, "plan", "--json").stdout)["work"] is False


def test_kill_9_of_serve_in_the_midst_of_a_run_leaves_nothing_and_the_project_whole(served: Served) -> None:
    project = served.project
    before = registered(project)
    land(project, "apples", 61)
    served.wait("a stage at work", lambda: at_work(project))
    served.process.kill()
    served.process.wait()
    deadline = time.monotonic() + 60
    while (left := working_in(project.root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    assert holder(project.run_lock) is None

    # Started again, it holds no slot for the dead run, and tells anew what was not merged.
    served.start()
    served.wait("a new version", lambda: registered(project) != before)
    served.wait("the runs' end", lambda: all(run["state_type"] in ENDS for run in served.remerges()))
    states = [run["state_type"] for run in served.remerges()]
    assert states.count("CRASHED") >= 1
    assert states[-1] == "COMPLETED"
    assert registered(project) == before + 1
    assert json.loads(poemerge(project, "status", "--json").stdout)["landed"] == []
