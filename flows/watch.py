"""Watch: what landed since the last complete re-merge is told as an event each, on which a deployment of `remerge`
starts.

A landing is told once, so a second look, or a second identical call of the webhook, starts nothing; and again, some
times and ever later, while it is not merged (poemerge.landings).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.events import Event, Resource

from flows.remerge import Landing
from poemerge import landings
from poemerge.filelock import exclusive
from poemerge.project import Project
from poemerge.sources import Change

__all__ = ["EVENT", "look", "tell", "watch"]

EVENT = "poemerge.expert.landed"


@flow(name="watch", retries=0)
def watch() -> list[Landing]:
    """Look at every source once and tell what landed; returns what was told, empty when nothing is new."""
    told = look(Project.find())
    logger = get_run_logger()
    for landing in told:
        logger.info("%s landed: %s at %s", landing.name, landing.source, landing.new)
    return told


def look(project: Project) -> list[Landing]:
    """What landed and was told now, as `watch` does it, outside of a flow run."""
    return tell(project, landings.landed(project))


def tell(project: Project, changes: Iterable[Change]) -> list[Landing]:
    """Emit an event for each change that is due; returns what was told.

    Raises what Prefect's client raises when the server does not take them; then nothing is remembered.
    """
    settle = project.load_params().schedule.watch.settle_seconds
    with exclusive(project.state / "told.lock"):
        fresh = landings.due(project, changes, settle)
        told = [
            Landing(name=change.name, source=change.source, old=change.old or "", new=change.new or "")
            for change in fresh
        ]
        if told:
            with get_client(sync_client=True) as client:
                events = [_event(landing).model_dump(mode="json") for landing in told]
                client.request("POST", "/events", json=events).raise_for_status()
            landings.note_told(project, fresh)
    return told


def _event(landing: Landing) -> Event:
    return Event(
        id=uuid.uuid4(),
        event=EVENT,
        resource=Resource(
            {"prefect.resource.id": f"poemerge.source.{landing.name}", "prefect.resource.name": landing.name}
        ),
        payload=landing.model_dump(),
    )
