"""The report, MLflow's and Prefect's pages of one run in a real browser: they show what the run made, and ask nothing
of other machines."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pipeline import environment, make_finished_project

from poemerge.project import STAGES, Project
from poemerge.servers import mlflow_server, prefect_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--v=0", "--virtual-time-budget=30000", "--window-size=1280,900",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
ITS_OWN = ("google.com", "googleapis.com", "gvt1.com")
"""Hosts that Chromium itself asks for, whatever page is open; here they are not found."""

pytestmark = pytest.mark.server
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_finished_project(tmp_path_factory.mktemp("pages") / "project")


def browse(url: str, folder: Path) -> tuple[str, set[str]]:
    """The page at `url` once its scripts have run, and the hosts that it asked; asserts a silent console."""
    log = folder / "net.json"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    shown = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=300, check=True)
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line and re.search("Uncaught|ERR_|rror", line)]
    assert not said, said
    hosts = set(re.findall(r'"url":"(?:https?|wss?)://([^/:"]+)', log.read_text()))
    return shown.stdout, {host for host in hosts if not host.endswith(ITS_OWN)}


def asked(url: str, body: object) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@needs_chromium
def test_report_of_a_run_shows_its_figures(project: Project, tmp_path: Path) -> None:
    page, hosts = browse(project.report_html.as_uri(), tmp_path)
    assert not hosts
    assert "Version 1 became champion" in page
    titles = re.findall(r'role="img"[^>]*><title id="[^"]*">([^<]*)</title>', page)
    assert titles == [
        "Normalised accuracy by task and method",
        "Share of the weights by expert and matrix",
        "Energy by step",
        "Cosine similarity of the task vectors",
    ]
    assert re.search(r'<img [^>]*src="data:image/png;base64,[^"]{10000,}', page), "the residuals' tails"


@needs_chromium
def test_mlflows_pages_show_the_version_and_its_report(project: Project, tmp_path: Path) -> None:
    registration = json.loads(project.registration_json.read_text())
    client = MlflowClient(f"sqlite:///{project.mlflow_db}")
    run = client.get_run(registration["run_id"])
    (tmp_path / "run").mkdir()
    (tmp_path / "model").mkdir()
    with mlflow_server(project) as url:
        page, hosts = browse(f"{url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}", tmp_path / "run")
        assert hosts == {"127.0.0.1"}
        assert run.info.run_name in page
        page, hosts = browse(f"{url}/#/models/tiny/versions/1", tmp_path / "model")
        assert hosts == {"127.0.0.1"}
        assert registration["digest"][:12] in page
        assert "champion" in page


@needs_chromium
def test_prefects_page_shows_the_run_and_its_stages(project: Project, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "artifact").mkdir()
    with prefect_server(project, schedules=False) as api:
        (run,) = asked(f"{api}/flow_runs/filter", {})
        ui = api.removesuffix("/api")
        page, hosts = browse(f"{ui}/runs/flow-run/{run['id']}", tmp_path / "run")
        assert hosts == {"127.0.0.1"}
        assert run["name"] in page
        assert f"{len(STAGES)} Task runs" in page
        assert "Completed" in page
        assert "python -m tasks fetch" in page, "the stages' own lines are in the log"
        found = asked(f"{api}/artifacts/filter", {"artifacts": {"key": {"any_": ["evaluate-figure"]}}})
        page, hosts = browse(f"{ui}/artifacts/artifact/{found[0]['id']}", tmp_path / "artifact")
        assert hosts == {"127.0.0.1"}
        assert re.search(r'<img [^>]*src="data:image/png;base64,[^"]{10000,}', page)


def test_dvc_shows_the_figures_of_a_run_beside_those_of_another(project: Project, tmp_path: Path) -> None:
    for command in (
        ["git", "add", "dvc.lock"],
        ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "The first run"],
        [sys.executable, "-m", "dvc", "plots", "diff", "HEAD", "--out", str(tmp_path / "plots")],
    ):
        done = subprocess.run(command, cwd=project.root, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    shown = {path.name: path.read_bytes() for path in (tmp_path / "plots/static").iterdir()}
    for figure in (project.residuals_png, project.scores / "normalised.png"):
        name = "_".join(figure.relative_to(project.root).parts)
        assert shown[f"HEAD_{name}"] == shown[f"workspace_{name}"] == figure.read_bytes()
