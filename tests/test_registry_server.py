"""With a real MLflow server that has users: who may only read cannot promote, and a promotion calls the webhook."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.registry.export import export
from poemerge.registry.promotion import carry_out, roll_back
from poemerge.registry.tracking import connect
from poemerge.registry.versions import CHAMPION, alias_version
from poemerge.webhook import authentic
from tasks.register import register
from tests.registry_project import copied, merge_and_score, write_params

pytestmark = pytest.mark.server

ADMIN = ("admin", "password1234567")
SECRET = "a shared secret"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server with basic-auth; users may read unless they are given more."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder}/auth.db\nadmin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
        # Every request would hash the password anew otherwise.
        "auth_cache_ttl_seconds = 60\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")),
    ]
    environment = {
        **os.environ,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for this test",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # MLflow remembers for a minute that an event had no webhook, and the fixture sets aliases before one exists.
        "MLFLOW_WEBHOOK_CACHE_TTL": "0",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https",
        "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, folder / "log")
        for user in ("ann", "reader"):
            body = {"username": user, "password": f"{user}-password-1"}
            answer = requests.post(f"{url}/api/2.0/mlflow/users/create", json=body, auth=ADMIN, timeout=60)
            assert answer.ok, answer.text
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if requests.get(f"{url}/health", timeout=2).ok:
                return
        except requests.RequestException:
            time.sleep(0.3)
    raise AssertionError(log.read_text())


class Calls:
    """What the webhook was called with: headers and body."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        calls = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                calls.got.append((dict(self.headers), body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def of(self, alias: str, version: str) -> tuple[dict[str, str], bytes]:
        """The call that told of this alias; waits for it."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for headers, body in list(self.got):
                data = json.loads(body)["data"]
                if data.get("alias") == alias and str(data.get("version")) == version:
                    return headers, body
            time.sleep(0.1)
        raise AssertionError(f"no call for {alias} {version} among {self.got}")


def be(monkeypatch: pytest.MonkeyPatch, user: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", f"{user}-password-1")


@pytest.fixture
def project(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Two versions that ann registered: 1 is champion, 2 passes the gates of the params that stand now."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    be(monkeypatch, "ann")
    project = copied(tmp_path / "project")
    register(project, project.load_params())
    merge_and_score(project, noise=0.01)
    write_params(
        project, {"a": 1, "b": 2}, {"gates": {"min_gain": -1.0, "max_suite_drop": 1.0}, "approval": "required"}
    )
    register(project, project.load_params())
    assert alias_version(connect(project), "tiny", CHAMPION) == "1"
    return project


def test_a_reader_is_refused_and_a_promotion_calls_the_webhook(
    project: Project, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ADMIN[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN[1])
    url = f"http://127.0.0.1:{calls.http.server_port}/"
    events = ["model_version_alias.created", "model_version.created"]
    MlflowClient(server, server).create_webhook("promotions", url, events, secret=SECRET)

    be(monkeypatch, "reader")
    export(project, "2", tmp_path / "read")  # reading is theirs
    for act in (
        lambda: carry_out(project, "2", by="reader", reason="I want it"),
        lambda: roll_back(project, by="reader", reason="no"),
        lambda: register(project, project.load_params()),
    ):
        with pytest.raises(RegistryError) as refused:
            act()
        if "no earlier champion" not in str(refused.value):
            assert "reader may not do that" in str(refused.value)
            assert "(403)" in str(refused.value)
    assert alias_version(connect(project), "tiny", CHAMPION) == "1"

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(RegistryError, match="does not know you"):
        carry_out(project, "2", by="reader", reason="")

    be(monkeypatch, "ann")
    assert carry_out(project, "2", by="ann", reason="better").moved
    headers, body = calls.of(CHAMPION, "2")
    assert authentic(headers, body, SECRET.encode(), time.time())
    assert not authentic(headers, body.replace(b"champion", b"campaign"), SECRET.encode(), time.time())
    assert not authentic(headers, body, b"another secret", time.time())
