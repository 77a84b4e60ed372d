"""Re-merge: sources are resolved, the seven stages run in their order, and what they made is kept and registered.

Order and policy live here; whether a stage has work is DVC's to say, what a stage does is tasks/NAME.py's.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.tasks import exponential_backoff
from pydantic import BaseModel, ConfigDict, Field

from poemerge.filelock import exclusive
from poemerge.landings import note_merged
from poemerge.lifeline import leash
from poemerge.preflight import preflight
from poemerge.project import STAGES, Project
from poemerge.sources import Change, Lock, resolve
from tasks.stage import StageOutcome, has_remote, push, run_stage, worth_retrying

__all__ = ["Landing", "Remerge", "remerge"]

HOURS = {"fetch": 6, "task_vectors": 2, "tail": 2, "expert": 1, "merge": 12, "evaluate": 12, "register": 1}
"""Time limits of the stages; a stage that takes longer is ended, and the next run takes it up again."""

RETRIED = ("fetch", "register")
"""Stages that talk to other machines; the rest would only fail again."""


class Landing(BaseModel):
    """An expert (or base, or suite) whose source has a new revision, as the event `poemerge.expert.landed` says it."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="Its name in params.yaml, or in its collection")
    source: str = Field(description="As params.yaml spells it")
    old: str = Field(default="", description="The revision merged last; empty when it is new")
    new: str = Field(default="", description="The revision it has now; empty when the event does not know it")


class Remerge(BaseModel):
    """What to re-merge for."""

    model_config = ConfigDict(frozen=True)

    reason: str = Field(default="by hand", description="Kept with the run, for people")
    landing: Landing | None = Field(default=None, description="What landed, when an event started this run")
    settle_seconds: float = Field(
        default=0.0, ge=0, description="How long to wait for further landings, so that several make one re-merge"
    )


@flow(name="remerge", flow_run_name="{request.reason}", retries=0)
def remerge(request: Remerge = Remerge()) -> dict[str, Any]:  # noqa: B008 - frozen
    """Bring every stage of the project around the working directory up to date.

    Returns a summary: what each stage did ("ran", "restored", "unchanged"), the sources that changed, what became of an
    approval that is needed, and the seconds it took. Raises BadInputError before any work when params.yaml or the
    checkpoints are wrong, SourceError when a source cannot be had, StageError when a stage fails.
    """
    logger = get_run_logger()
    project = Project.find()
    leash()
    began = time.monotonic()
    if request.settle_seconds > 0:
        logger.info("Waiting %g s for further landings", request.settle_seconds)
        time.sleep(request.settle_seconds)
    with exclusive(project.run_lock, lambda pid: logger.info("Waiting for the re-merge of process %s", pid)):
        params = preflight(project)
        before = Lock.read(project.sources_lock)
        lock = resolve(project, params)
        changes = lock.changes(before)
        for change in changes:
            logger.info("%s", _told(change))
        for name, why in lock.skipped.items():
            logger.warning("Expert %s is skipped and keeps its last good revision, if it has one: %s", name, why)
        outcomes = [_run(project, stage) for stage in STAGES]
        _push_what_is_new(project)
        note_merged(project, lock)
    approval = _ask_for_approval(project)
    return {
        "reason": request.reason,
        "stages": {outcome.stage: outcome.action for outcome in outcomes},
        "headlines": {outcome.stage: outcome.report.headline for outcome in outcomes},
        "changed_sources": [vars(change) for change in changes],
        "skipped": dict(lock.skipped),
        "approval": approval,
        "seconds": round(time.monotonic() - began, 1),
    }


def _run(project: Project, stage: str) -> StageOutcome:
    """Run one stage; before registering, what was made is sent to the remote: a version's bytes must not be lost."""
    if stage == "register":
        _push_what_is_new(project)
    stage_task = run_stage.with_options(tags=[f"stage:{stage}"])
    if stage in RETRIED:
        stage_task = stage_task.with_options(
            retries=3,
            retry_delay_seconds=exponential_backoff(backoff_factor=5),
            retry_jitter_factor=0.5,
            retry_condition_fn=worth_retrying,
        )
    return stage_task(stage, project.root, timeout_seconds=3600.0 * HOURS[stage])


def _push_what_is_new(project: Project) -> None:
    """`dvc push` to the default remote, if there is one and dvc.lock differs from the one pushed last."""
    if not has_remote(project):
        return
    pushed = project.state / "pushed"
    digest = hashlib.sha256(project.dvc_lock.read_bytes()).hexdigest()
    if pushed.is_file() and pushed.read_text(encoding="utf-8") == digest:
        return
    push(project.root, timeout_seconds=6 * 3600.0)
    pushed.write_text(digest, encoding="utf-8")


def _ask_for_approval(project: Project) -> str | None:
    """Have the deployment `promote` ask for the approval that the candidate needs; once a version, whatever the answer.

    Returns None when none is needed, "requested" when the candidate waits for it, "answered" when it has waited before,
    "by hand" when the server has no deployment that a worker serves: then the log tells the command.
    """
    registration = json.loads(project.registration_json.read_text(encoding="utf-8"))
    if not registration["awaits_approval"]:
        return None
    from poemerge.registry.promotion import requests  # imports mlflow

    version = str(registration["version"])
    asked = [request for request in requests(project) if request.version == version]
    if asked:
        return "requested" if asked[-1].answer is None else "answered"
    logger = get_run_logger()
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name("promote/promote")
        except ObjectNotFound:
            deployment = None
        if deployment is None or deployment.work_pool_name is None:
            logger.info("Version %s waits for approval: `poemerge promote %s` asks for it", version, version)
            return "by hand"
        request = {"version": version, "by": "remerge", "reason": "it passed every gate when it was registered"}
        client.create_flow_run_from_deployment(
            deployment.id,
            parameters={"request": request},
            idempotency_key=f"{registration['model']} {registration['run_id']}",
        )
    logger.info("Version %s waits for approval: `poemerge approve %s`", version, version)
    return "requested"


def _told(change: Change) -> str:
    if change.old is None:
        return f"{change.what} {change.name} is new: {change.source} at {change.new}"
    if change.new is None:
        return f"{change.what} {change.name} is gone: {change.source}"
    return f"{change.what} {change.name} changed: {change.source} from {change.old} to {change.new}"
