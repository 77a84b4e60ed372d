"""Starting and resuming the promote flow: here, in this process, or by the worker of a team's server."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, cast
from uuid import UUID

from poemerge.errors import RegistryError, StageError
from poemerge.project import Project

__all__ = ["answer", "promote"]

NAME = "promote"
WORKER_SECONDS = 120.0
"""How long a worker may take to begin and end a promotion before the command goes home without its outcome."""


def promote(project: Project, version: str, *, by: str, reason: str) -> dict[str, Any] | None:
    """Runs the promote flow for `version`; returns its result, or None when it waits for approval.

    Raises what the flow raises.
    """
    with _prefect(project) as (client, flow):
        deployment = _deployment(client, project)
        parameters = {"request": {"version": version, "by": by, "reason": reason}}
        run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        if deployment.work_pool_name is not None:
            return _followed(client, run.id)
        return _run_here(client, flow, run.id)


def answer(project: Project, wanted: str, *, approve: bool, by: str, reason: str) -> dict[str, Any] | None:
    """Answers the request to promote `wanted` (a version, or the flow run) and carries it on; returns the flow's
    result.

    Raises RegistryError when nothing waits for it, it has expired, or this person's answer does not count.
    """
    from poemerge.registry import promotion

    request = promotion.find_request(project, wanted)
    # Written by who answers, with that person's rights on the registry; the flow finds it in the log.
    standing = promotion.decide(project, request.ticket, approve=approve, by=by, reason=reason)
    if standing != approve:
        raise RegistryError(
            f"The request to promote version {request.version} was answered before.\n"
            f"  got:      {'approve' if approve else 'reject'}, and it was {'approved' if standing else 'rejected'}\n"
            f"  expected: one answer\n  next:     poemerge promote {request.version} asks again"
        )
    with _prefect(project) as (client, flow):
        from prefect.flow_runs import resume_flow_run

        run = client.read_flow_run(UUID(request.ticket))
        if run.state is None or not run.state.is_paused():
            raise StageError(
                f"The flow run of this request does not wait.\n  got:      state {run.state and run.state.name}\n"
                f"  expected: Suspended\n  next:     poemerge promote {request.version}"
            )
        resume_flow_run(run.id, run_input={"approve": approve, "by": by, "reason": reason})
        deployment = client.read_deployment(run.deployment_id)
        if deployment.work_pool_name is not None:
            return _followed(client, run.id)
        return _run_here(client, flow, run.id)


@contextlib.contextmanager
def _prefect(project: Project) -> Iterator[tuple[Any, Any]]:
    """A client of the Prefect server, and the project's promote flow."""
    from poemerge.cli.flows import load
    from poemerge.servers import embedded_prefect

    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.chdir(project.root)
    with embedded_prefect(project):
        from prefect.client.orchestration import get_client
        from prefect.logging.handlers import APILogHandler

        try:
            with get_client(sync_client=True) as client:
                yield client, load(project, "flows.promote").promote
        finally:
            # Prefect sends its last lines in the background, and the server may end with this block.
            APILogHandler().flush()


def _deployment(client: Any, project: Project) -> Any:
    """The deployment of the flow that the server has, else one of our own without a worker: only deployed runs can
    wait.
    """
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_deployment_by_name(f"{NAME}/{NAME}")
    except ObjectNotFound:
        made = client.create_deployment(
            flow_id=client.create_flow_from_name(NAME),
            name=NAME,
            entrypoint=f"flows/{NAME}.py:{NAME}",
            path=str(project.root),
            enforce_parameter_schema=False,
        )
        return client.read_deployment(made)


def _run_here(client: Any, flow: Any, run_id: UUID) -> dict[str, Any] | None:
    from prefect.exceptions import Pause
    from prefect.flow_engine import run_flow

    run = client.read_flow_run(run_id)
    parameters = flow.validate_parameters(run.parameters)
    try:
        return cast("dict[str, Any]", run_flow(flow, flow_run=run, parameters=parameters))
    except Pause:
        return None


def _followed(client: Any, run_id: UUID) -> dict[str, Any] | None:
    """Waits for the worker's outcome."""
    deadline = time.monotonic() + WORKER_SECONDS
    while time.monotonic() < deadline:
        run = client.read_flow_run(run_id)
        if run.state.is_paused():
            return None
        if run.state.is_completed():
            return {"version": run.parameters["request"]["version"]}
        if run.state.is_final():
            raise StageError(f"The promotion ended in state {run.state.name}: {run.state.message}")
        time.sleep(1.0)
    raise StageError(
        f"No worker has finished the promotion.\n  got:      state {run.state.name} after {WORKER_SECONDS:.0f} s\n"
        f"  expected: a worker of the work pool\n  next:     look at flow run {run_id} on the Prefect page"
    )
