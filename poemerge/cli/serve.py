"""`poemerge serve`: everything that makes re-merging happen by itself, on one machine, in one process tree."""

from __future__ import annotations

import argparse
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poemerge.project import Project

__all__ = ["add_parser", "run"]

log = logging.getLogger(__name__)

DESCRIPTION = """\
Serve the project's deployments until Ctrl-C: a Prefect server (or the one PREFECT_API_URL names), a work pool with a
worker, the deployments of prefect.yaml with the schedule of params.yaml, and the automation that finds dead runs.

$ poemerge serve
Prefect:     http://127.0.0.1:4200
Deployments: remerge (nightly 0 3 * * *, and 30 s after a landing), watch (each 60 s), promote, remind, sweep
Worker:      at work

With POEMERGE_WEBHOOK_SECRET (or POEMERGE_WEBHOOK_SECRET_FILE) set, --webhook opens an endpoint for a hub, an MLflow
registry or a CI: a signed POST /landed makes it look at the sources at once. docs/scheduling.md shows each of them.

--install puts work pool, deployments and automation on the server and ends: for a team whose workers run elsewhere.
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

    from poemerge.cli.flows import ended_by_sigterm, load
    from poemerge.deployments import write_deployments
    from poemerge.preflight import preflight
    from poemerge.project import Project
    from poemerge.servers import prefect_server, publish, use_prefect
    from poemerge.webhook import read_secret, webhook

    configured = os.environ.get("PREFECT_API_URL")
    address, secret = _address(args.webhook), read_secret()
    _refuse_half_a_wish(args, configured, address, secret)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    project = Project.find()
    params = preflight(project)
    os.chdir(project.root)
    with ended_by_sigterm(), contextlib.ExitStack() as stack, contextlib.suppress(KeyboardInterrupt):
        url = configured
        if url is None:
            url = stack.enter_context(prefect_server(project, schedules=True, port=args.port, usual_port=4200))
            use_prefect(project, url)
            stack.enter_context(publish(project, {"prefect": url}))
        print(f"Prefect:     {url.removesuffix('/api')}", flush=True)
        server = load(project, "flows.server")
        server.install()
        names = server.deploy(project, write_deployments(project, params.schedule))
        watch, cron = params.schedule.watch, params.schedule.cron
        told = {
            "remerge": f"remerge ({f'by cron {cron}, and ' if cron else ''}{watch.settle_seconds} s after a landing)",
            "watch": f"watch (each {watch.interval_seconds} s)",
        }
        print(f"Deployments: {', '.join(told.get(name, name) for name in names)}", flush=True)
        if args.install:
            return 0
        if address is not None and secret is not None:
            flow = load(project, "flows.watch")
            port = stack.enter_context(webhook(*address, secret, lambda: flow.tell(project, flow.landed(project))))
            print(f"Webhook:     http://{address[0]}:{port}/landed", flush=True)
        _keep_a_worker(project, url, own=configured is None, pool=server.POOL, heartbeat=server.HEARTBEAT_SECONDS)
    return 0


def _keep_a_worker(project: Project, url: str, *, own: bool, pool: str, heartbeat: int) -> None:
    """A worker, and a new one when it dies; with its group end the runs that it had begun."""
    import os

    from poemerge.errors import ServerError
    from poemerge.lifeline import Child
    from poemerge.servers import answers

    env = os.environ | {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(heartbeat),
        "PREFECT_WORKER_QUERY_SECONDS": "3",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }
    arguments = ["worker", "start", "--pool", pool, "--type", "process", "--limit", "4"]
    log_file = project.state / "logs" / "worker.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with (
            log_file.open("ab") as output,
            Child("prefect", arguments, cwd=project.root, env=env, output=output) as child,
        ):
            print("Worker:      at work", flush=True)
            silent = 0
            while child.poll() is None:
                time.sleep(1.0)
                # A server that is only slow answers within one of these; a team's own server is the team's to mind.
                silent = 0 if not own or answers(f"{url}/health", seconds=5.0) else silent + 1
                if silent >= 12:
                    raise ServerError(
                        f"The Prefect server ended.\n  got:      no answer from {url}\n"
                        f"  next:     read {project.state / 'logs' / 'prefect.log'}, then start `poemerge serve` again"
                    )
            log.warning("The worker ended with status %s; starting another", child.poll())
        time.sleep(2.0)


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
