"""Promote: gates, approval where params.yaml asks for it, the move. And a reminder of what waits for approval.

A run that waits is suspended: no process stays, the server keeps it, and whoever answers starts it again from the top.
What happened before is in the log of decisions, which is also what this flow looks at first when it starts again.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.registry import promotion
from poemerge.registry.gates import Gate

__all__ = ["Decision", "Promotion", "promote", "remind"]

ANSWERS = 20
"""How often an answer may be refused (the second person was the first) before the run gives up."""


class Promotion(BaseModel):
    """Which version is to become champion, who asks for it, and why."""

    model_config = ConfigDict(frozen=True)

    version: str = Field(description="A version's number, an alias, or the beginning of its digest")
    by: str = Field(min_length=1, description="Who asks for it")
    reason: str = Field(default="", description="Kept in the log of decisions")


class Decision(RunInput):
    """The answer to a request: approve or reject, your name, and why."""

    approve: bool
    by: str = Field(min_length=1, description="Your name")
    reason: str = Field(default="", description="Why; kept in the log of decisions")


@flow(name="promote", flow_run_name="version {request.version}", persist_result=True)
def promote(request: Promotion) -> dict[str, Any]:
    """Make a version champion: every gate passes, somebody approves where that is required, and the alias moves.

    Returns {version, champion_before, moved, approved}. Raises RegistryError with the reasons of the gates that fail.
    """
    logger = get_run_logger()
    project = Project.find()
    ticket = str(flow_run.id)
    # Suspended, a run starts again from the top: with the version that it asked for, wherever an alias stands by now.
    meant = next((one.version for one in promotion.requests(project) if one.ticket == ticket), request.version)
    asked = promotion.ask(project, meant)
    _publish(asked.version, asked.gates)
    if not asked.passed:
        raise RegistryError(f"Version {asked.version} may not become champion: {'; '.join(asked.failures)}")
    if asked.needs_approval and asked.champion != asked.version:
        waiting = promotion.request_approval(project, asked.version, ticket, by=request.by, reason=request.reason)
        if not _answered(project, waiting, asked):
            logger.info("Version %s was rejected", asked.version)
            return {"version": asked.version, "champion_before": asked.champion, "moved": False, "approved": False}
    done = promotion.carry_out(project, asked.version, by=request.by, reason=request.reason)
    _publish(done.version, done.gates)
    logger.info(
        "Version %s is champion%s", done.version, f" in place of {done.champion_before}" if done.moved else " already"
    )
    emit_event(
        "poemerge.champion.moved",
        resource={"prefect.resource.id": f"poemerge.version.{done.version}"},
        payload={"version": done.version, "digest": done.digest, "before": done.champion_before},
    )
    return {"version": done.version, "champion_before": done.champion_before, "moved": done.moved, "approved": True}


@flow(name="remind")
def remind() -> int:
    """Tell of every promotion that waits for approval (event `poemerge.approval.waiting`), close those whose time is
    over.

    Returns how many wait.
    """
    logger = get_run_logger()
    project = Project.find()
    for request in promotion.expire(project):
        logger.warning("The request to promote version %s expired: nobody answered", request.version)
        _tell("poemerge.approval.expired", request)
    waiting = promotion.open_requests(project)
    for request in waiting:
        logger.warning(
            "Version %s waits for approval: asked for by %s at %s (%s), until %s",
            request.version,
            request.by,
            request.at[:16],
            request.reason,
            request.expires[:16],
        )
        _tell("poemerge.approval.waiting", request)
    return len(waiting)


def _answered(project: Project, waiting: promotion.Request, asked: promotion.Asked) -> bool:
    """Suspends the run until somebody answers; returns whether they approve. An answer that does not count is asked
    again.
    """
    logger = get_run_logger()
    told = "\n".join(f"- **{gate.name}**: {gate.verdict}. {gate.reason}" for gate in asked.gates)
    form = Decision.with_initial_data(
        description=f"Version {asked.version} in place of {asked.champion or 'no champion'}; "
        f"asked for by {waiting.by}: {waiting.reason or '(no reason given)'}\n\n{told}",
        approve=False,
        by="",
    )
    for attempt in range(ANSWERS):
        decision = suspend_flow_run(
            wait_for_input=form, key=f"approval-{attempt}", timeout=max(1, int(3600 * asked.hours))
        )
        try:
            return promotion.decide(
                project, waiting.ticket, approve=decision.approve, by=decision.by, reason=decision.reason
            )
        except RegistryError as error:
            if "expired" in str(error):
                raise
            logger.warning("%s", error)
    raise RegistryError(f"{ANSWERS} answers did not count: the request is given up")


def _publish(version: str, gates: tuple[Gate, ...]) -> None:
    """The gates as a table on the run's page."""
    rows = [{"gate": gate.name, "verdict": gate.verdict, "reason": gate.reason} for gate in gates]
    if rows:
        create_table_artifact(table=rows, key="gates", description=f"Gates of version {version}")


def _tell(event: str, request: promotion.Request) -> None:
    emit_event(
        event,
        resource={"prefect.resource.id": f"poemerge.version.{request.version}"},
        payload={"by": request.by, "reason": request.reason, "since": request.at, "until": request.expires},
    )
