"""The servers a project brings along when none is configured: Prefect's and MLflow's, on loopback, on SQLite."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from poemerge.errors import ServerError
from poemerge.filelock import attended, holder
from poemerge.leftovers import crash_leftovers
from poemerge.lifeline import Child
from poemerge.project import Project
from poemerge.wholefile import write_whole

__all__ = ["answers", "embedded_prefect", "mlflow_server", "prefect_server", "publish", "published", "use_prefect"]

START_SECONDS = 300.0
"""A first start creates the database; on a busy machine that takes a while."""


@contextlib.contextmanager
def embedded_prefect(project: Project) -> Iterator[str]:
    """The URL of a Prefect API for this process and its children, whose environment is set to use it.

    PREFECT_API_URL when it is set; else the server that a `poemerge ui` or `poemerge serve` of this project keeps; else
    a server of our own that ends with this block, or with this process. Enter it before prefect is imported, for that
    is when Prefect reads its settings. Raises ServerError when no server answers.
    """
    configured = os.environ.get("PREFECT_API_URL")
    if configured:
        _check(configured)
        yield configured
        return
    with contextlib.ExitStack() as stack:
        url = published(project).get("prefect")
        if url is None:
            # A run by hand needs what records it; what starts other runs (schedules, triggers) belongs to `serve`.
            url = stack.enter_context(prefect_server(project, schedules=False))
        use_prefect(project, url)
        # Where no other command is at work, runs of commands that count as running were killed, and those of workers
        # too unless a `serve` lives.
        served = holder(project.serve_lock) is not None
        sweep_up = functools.partial(crash_leftovers, url, commands=True, workers=not served)
        stack.enter_context(attended(project.state / "commands.lock", sweep_up))
        yield url


def use_prefect(project: Project, url: str) -> None:
    """Point this process and its children at the Prefect API `url`, with a home inside the project."""
    os.environ.update(_prefect_environment(project) | {"PREFECT_API_URL": url})


def _prefect_environment(project: Project) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(project.prefect_home),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


@contextlib.contextmanager
def prefect_server(
    project: Project, *, schedules: bool, port: int | None = None, usual_port: int | None = None
) -> Iterator[str]:
    """A Prefect server on the project's SQLite file, ended with this block; yields the URL of its API.

    Arguments: `schedules`, whether it also starts runs by schedule and by trigger; `port` (default: `usual_port` where
    it is free, else any free one).
    """
    port = port or _free_port(usual_port)
    url = f"http://127.0.0.1:{port}/api"
    project.prefect_home.mkdir(parents=True, exist_ok=True)
    services = ("SCHEDULER", "LATE_RUNS", "TRIGGERS")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env |= _prefect_environment(project) | {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{project.prefect_home / 'prefect.db'}",
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # An event is acted on within a second or two rather than within ten.
        "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT1S",
        **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": str(schedules).lower() for name in services},
    }
    arguments = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with _server(project, "prefect", arguments, env, lambda: answers(f"{url}/health")):
        yield url


@contextlib.contextmanager
def mlflow_server(project: Project, *, port: int | None = None, usual_port: int | None = None) -> Iterator[str]:
    """An MLflow server on the project's SQLite file and artifacts, ended with this block; yields its URL.

    Arguments: `port` (default: `usual_port` where it is free, else any free one).
    """
    port = port or _free_port(usual_port)
    project.mlflow_artifacts.mkdir(parents=True, exist_ok=True)
    arguments = [
        "server",
        *("--backend-store-uri", f"sqlite:///{project.mlflow_db}"),
        *("--artifacts-destination", project.mlflow_artifacts.as_uri()),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    env = {**os.environ, "DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # seven processes that run jobs which nobody here submits
    url = f"http://127.0.0.1:{port}"
    with _server(project, "mlflow", arguments, env, lambda: answers(f"{url}/health")):
        yield url


def published(project: Project) -> dict[str, str]:
    """The URLs, by name (prefect, mlflow), of servers that this project's `ui` or `serve` keeps running now."""
    try:
        urls: dict[str, str] = json.loads(_published_file(project).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return {name: url for name, url in urls.items() if answers(f"{url}/health", seconds=2.0)}


@contextlib.contextmanager
def publish(project: Project, urls: Mapping[str, str]) -> Iterator[None]:
    """Let other commands of the project find the servers `urls` while this block runs."""
    path = _published_file(project)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(dict(urls)) + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _published_file(project: Project) -> Path:
    return project.state / "servers.json"


@contextlib.contextmanager
def _server(
    project: Project, name: str, arguments: list[str], env: Mapping[str, str], healthy: Callable[[], bool]
) -> Iterator[None]:
    log = project.state / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, Child(name, arguments, cwd=project.root, env=env, output=output) as child:
        deadline = time.monotonic() + START_SECONDS
        while not healthy():
            if child.poll() is not None or time.monotonic() > deadline:
                raise ServerError(_no_start(name, log, child.poll()))
            time.sleep(0.1)
        yield


def _no_start(name: str, log: Path, status: int | None) -> str:
    last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-3:]
    got = "no answer in time" if status is None else f"it ended with status {status}: {' / '.join(last)}"
    return (
        f"The {name} server did not start.\n  got:      {got}\n  expected: an answer from it\n"
        f"  next:     read {log}; `poemerge doctor` checks the versions it needs"
    )


def _check(url: str) -> None:
    if not answers(f"{url.rstrip('/')}/health", seconds=10.0):
        raise ServerError(
            f"No Prefect server answers.\n  got:      nothing from PREFECT_API_URL={url}\n"
            "  expected: a running Prefect server\n  next:     start it, or unset PREFECT_API_URL to use one of our own"
        )


def answers(url: str, seconds: float = 1.0) -> bool:
    """Whether a server answers a GET of `url` within `seconds`."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:  # noqa: S310 - http(s) URLs of our servers
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        # A team's server may ask for credentials on every route; it is there all the same.
        return error.code in (401, 403)
    except (OSError, ValueError):
        return False


def _free_port(usual: int | None = None) -> int:
    with socket.socket() as listener:
        # A port that a server of ours has just left counts as free, for the next one to have the same address.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", usual or 0))
        except OSError:
            listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
