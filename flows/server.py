"""What a Prefect server must have to run this project: a work pool, the deployments, and an eye on runs that die."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists

from poemerge.errors import ServerError
from poemerge.project import Project

__all__ = ["HEARTBEAT_SECONDS", "POOL", "SILENCE_SECONDS", "deploy", "install"]

POOL = "poemerge"

HEARTBEAT_SECONDS = 30
"""How often a flow run says that it lives (Prefect's least); a worker's PREFECT_FLOWS_HEARTBEAT_FREQUENCY."""

SILENCE_SECONDS = 65
"""Two heartbeats and a little: a run silent for longer is dead, together with the worker that would have told so."""

CRASHES = "poemerge: runs whose heartbeats stop are crashed"


def install(silence_seconds: float = SILENCE_SECONDS) -> None:
    """Have the server hold the work pool, and mark runs silent for `silence_seconds` as crashed: their slot is freed.

    Safe to repeat: the pool that is there stays, the automation of this name is replaced.
    """
    beat = "prefect.flow-run.heartbeat"
    ends = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "Paused", "Cancelling", "AwaitingRetry")
    automation = AutomationCore(
        name=CRASHES,
        description="A killed worker cannot tell that its run is dead; without this the run holds its slot for ever.",
        trigger=EventTrigger(
            after={beat},
            expect={beat, *(f"prefect.flow-run.{state}" for state in ends)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                name="Crashed",
                state=StateType.CRASHED,
                force=False,
                message=f"No sign of life for {silence_seconds:g} seconds",
            )
        ],
    )
    with get_client(sync_client=True) as client:
        with contextlib.suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        for known in client.read_automations_by_name(CRASHES):
            client.delete_automation(known.id)
        client.create_automation(automation)


def deploy(project: Project, file: Path) -> list[str]:
    """Install every deployment of `file`, a prefect.yaml, on the configured server; returns their names.

    Raises ServerError with what `prefect deploy` said when it fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
        cwd=project.root,
        # PWD, which prefect.yaml asks for, is the shell's word for the working directory: it does not follow `cwd`.
        env=os.environ | {"PWD": str(project.root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = " / ".join(line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip())
        raise ServerError(
            f"The deployments were not installed.\n  got:      {said[-600:]}\n  expected: every deployment of {file}\n"
            "  next:     mend prefect.yaml, or check that the flows it names can be imported"
        )
    return [deployment["name"] for deployment in yaml.safe_load(file.read_text(encoding="utf-8"))["deployments"]]
