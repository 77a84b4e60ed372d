"""Watch: what landed since the last resolve is told as an event each, on which a deployment of `remerge` starts.

A landing is told once: what was told is remembered in the project, so a second look, or a second identical call of the
webhook, starts nothing. What failed to merge is taken up by the nightly run or by `poemerge run`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.events import Event, Resource

from flows.remerge import Landing
from poemerge.filelock import exclusive
from poemerge.project import Project
from poemerge.sources import Lock, resolve

__all__ = ["EVENT", "landed", "tell", "watch"]

EVENT = "poemerge.expert.landed"


@flow(name="watch", retries=0)
def watch() -> list[Landing]:
    """Look at every source once and tell what landed; returns what was told, empty when nothing is new."""
    told = tell(project := Project.find(), landed(project))
    logger = get_run_logger()
    for landing in told:
        logger.info("%s landed: %s at %s", landing.name, landing.source, landing.new)
    return told


def landed(project: Project) -> list[Landing]:
    """Sources whose revision of now differs from the one in sources.lock; nothing is written."""
    lock = resolve(project, project.load_params(), write=False)
    return [
        Landing(name=change.name, source=change.source, old=change.old or "", new=change.new or "")
        for change in lock.changes(Lock.read(project.sources_lock))
    ]


def tell(project: Project, landings: Iterable[Landing]) -> list[Landing]:
    """Emit an event for each landing that was not told before; returns those told.

    Raises what Prefect's client raises when the server does not take them; then nothing is remembered.
    """
    record = project.state / "landings.json"
    with exclusive(record.with_suffix(".lock")):
        known: dict[str, str] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        fresh = [landing for landing in landings if known.get(landing.name) != f"{landing.old}>{landing.new}"]
        if fresh:
            with get_client(sync_client=True) as client:
                events = [_event(landing).model_dump(mode="json") for landing in fresh]
                client.request("POST", "/events", json=events).raise_for_status()
            known |= {landing.name: f"{landing.old}>{landing.new}" for landing in fresh}
            partial = record.with_name(record.name + ".partial")
            partial.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
            partial.replace(record)
    return fresh


def _event(landing: Landing) -> Event:
    return Event(
        id=uuid.uuid4(),
        event=EVENT,
        resource=Resource(
            {"prefect.resource.id": f"poemerge.source.{landing.name}", "prefect.resource.name": landing.name}
        ),
        payload=landing.model_dump(),
    )
