"""`poemerge serve`: everything that makes re-merging happen by itself, on one machine, in one process tree."""

from __future__ import annotations

import argparse
import logging
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import threading

    from poemerge.project import Project

__all__ = ["add_parser", "run"]

log = logging.getLogger(__name__)

DESCRIPTION = """\
Serve the project's deployments until Ctrl-C: a Prefect server (or the one PREFECT_API_URL names), a work pool with a
worker, the deployments of prefect.yaml with the schedule of params.yaml, and the automation that finds dead runs.

$ poemerge serve
Prefect:     http://127.0.0.1:4200
Deployments: remerge (by cron 0 3 * * *, and 30 s after a landing), watch, promote, remind, sweep
Sources:     looked at each 60 s
Worker:      at work

With POEMERGE_WEBHOOK_SECRET (or POEMERGE_WEBHOOK_SECRET_FILE) set, --webhook opens an endpoint for a hub, an MLflow
registry or a CI: a signed POST /landed makes it look at the sources at once. docs/scheduling.md shows each of them.

--install puts work pool, deployments and automation on the server and ends: for a team whose workers run elsewhere.
There the deployment `watch` looks at the sources.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="re-merge by itself when something lands",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--install", action="store_true", help="install on the configured server, and end")
    parser.add_argument(
        "--port", type=int, default=None, help="of our own Prefect server (default: 4200, or a free one)"
    )
    parser.add_argument("--webhook", default=None, metavar="HOST:PORT", help="open the endpoint for landings there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start, install, supervise until Ctrl-C. Raises ServerError when our own Prefect server ends by itself."""
    import contextlib
    import os
    import threading

    from poemerge.cli.flows import ended_by_sigterm, load
    from poemerge.deployments import write_deployments
    from poemerge.filelock import exclusive
    from poemerge.landings import forget_told
    from poemerge.leftovers import crash_leftovers
    from poemerge.preflight import preflight
    from poemerge.project import Project
    from poemerge.servers import prefect_server, publish, use_prefect
    from poemerge.webhook import read_secret, webhook

    configured = os.environ.get("PREFECT_API_URL")
    address, secret = _address(args.webhook), read_secret()
    _refuse_half_a_wish(args, configured, address, secret)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for client in ("httpx", "httpx2"):  # Prefect's and the hub's tell each request of each look
        logging.getLogger(client).setLevel(logging.WARNING)
    project = Project.find()
    params = preflight(project)
    os.chdir(project.root)
    with ended_by_sigterm(), contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        if not args.install:
            stack.enter_context(exclusive(project.serve_lock, _refuse_a_second))
        url = configured
        if url is None:
            url = stack.enter_context(prefect_server(project, schedules=True, port=args.port, usual_port=4200))
            use_prefect(project, url)
            # Workers end with their `serve`: what counts as run by one was killed, and holds its deployment's slot.
            crash_leftovers(url, workers=True)
            stack.enter_context(publish(project, {"prefect": url}))
        print(f"Prefect:     {url.removesuffix('/api')}", flush=True)
        server = load(project, "flows.server")
        server.install()
        # Here this process looks at the sources: a flow run for each look would cost seconds of CPU and a row each.
        names = server.deploy(project, write_deployments(project, params.schedule, watched=not args.install))
        watch, cron = params.schedule.watch, params.schedule.cron
        told = f"remerge ({f'by cron {cron}, and ' if cron else ''}{watch.settle_seconds} s after a landing)"
        print(f"Deployments: {', '.join(told if name == 'remerge' else name for name in names)}", flush=True)
        if args.install:
            return 0
        forget_told(project)
        asked = threading.Event()
        if address is not None and secret is not None:
            port = stack.enter_context(webhook(*address, secret, asked))
            print(f"Webhook:     http://{address[0]}:{port}/landed", flush=True)
        print(f"Sources:     looked at each {watch.interval_seconds} s", flush=True)
        worker = stack.enter_context(_Worker(project, server.POOL, server.HEARTBEAT_SECONDS))
        print("Worker:      at work", flush=True)
        _supervise(project, worker, asked, watch.interval_seconds, server=None if configured else url)
    return 0


class _Worker:
    """A Prefect worker, and a new one when it dies."""

    def __init__(self, project: Project, pool: str, heartbeat: int) -> None:
        import os

        from poemerge.lifeline import SERVE_LOCK

        self._project = project
        self._arguments = ["worker", "start", "--pool", pool, "--type", "process", "--limit", "4"]
        self._env = os.environ | {
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(heartbeat),
            "PREFECT_WORKER_QUERY_SECONDS": "3",
            SERVE_LOCK: str(project.serve_lock),
        }

    def __enter__(self) -> _Worker:
        from poemerge.lifeline import Child

        path = self._project.state / "logs" / "worker.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as output:
            self._child = Child("prefect", self._arguments, cwd=self._project.root, env=self._env, output=output)
        return self

    def __exit__(self, *_: object) -> None:
        self._child.end()

    def mind(self) -> None:
        """Start another worker if this one has ended."""
        status = self._child.poll()
        if status is not None:
            log.warning("The worker ended with status %s; starting another", status)
            self._child.end()
            self.__enter__()


def _supervise(
    project: Project, worker: _Worker, asked: threading.Event, interval: float, *, server: str | None
) -> NoReturn:
    """Look at the sources each `interval` seconds and when `asked`, and mind the worker and our own `server`."""
    from poemerge.cli.flows import load
    from poemerge.errors import ServerError
    from poemerge.servers import answers

    watch = load(project, "flows.watch")
    next_look, silent = time.monotonic(), 0
    while True:
        if asked.wait(1.0) or time.monotonic() >= next_look:
            asked.clear()
            next_look = time.monotonic() + interval
            try:
                for landing in watch.look(project):
                    log.info("%s landed: %s at %s", landing.name, landing.source, landing.new)
            except Exception as error:
                # A source or a server that is down is told and looked at again; serving goes on.
                log.warning("Looking at the sources failed: %s", error)
        worker.mind()
        # A server that is only slow answers within one of these; a team's own server is the team's to mind.
        silent = 0 if server is None or answers(f"{server}/health", seconds=5.0) else silent + 1
        if silent >= 12:
            raise ServerError(
                f"The Prefect server ended.\n  got:      no answer from {server}\n"
                f"  next:     read {project.state / 'logs' / 'prefect.log'}, then start `poemerge serve` again"
            )


def _refuse_a_second(process: str) -> NoReturn:
    from poemerge.errors import ServerError

    raise ServerError(
        f"This project is served already.\n  got:      `poemerge serve` in process {process}\n"
        "  next:     `poemerge status` tells what it does; end it before you start another"
    )


def _address(text: str | None) -> tuple[str, int] | None:
    """HOST:PORT as a pair. Raises ParamsError when it is none."""
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    if host and port.isdigit() and int(port) < 65536:
        return host, int(port)
    from poemerge.errors import ParamsError, Problem

    raise ParamsError(Problem("--webhook", got=text, expected="HOST:PORT", next_step="for instance 127.0.0.1:8787"))


def _refuse_half_a_wish(
    args: argparse.Namespace, configured: str | None, address: tuple[str, int] | None, secret: bytes | None
) -> None:
    from poemerge.errors import ParamsError, Problem

    problems = []
    if args.install and configured is None:
        problems.append(
            Problem("--install", "no PREFECT_API_URL", "the server to install on", "set it, or leave --install out")
        )
    if address is not None and secret is None:
        problems.append(
            Problem(
                "--webhook",
                got="no POEMERGE_WEBHOOK_SECRET",
                expected="a secret that senders sign with",
                next_step="make one with `openssl rand -hex 32`",
            )
        )
    if problems:
        raise ParamsError(problems)
