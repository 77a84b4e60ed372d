"""What has landed since the last complete re-merge, and when it is told: at once, and again while it is not merged."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from poemerge.filelock import holder
from poemerge.project import Project
from poemerge.sources import Change, Lock, resolve
from poemerge.wholefile import write_whole

__all__ = ["RETELL_SECONDS", "due", "forget_told", "landed", "merged_last", "note_merged", "note_told"]

RETELL_SECONDS = (300.0, 1_800.0, 10_800.0)
"""How long after each telling a landing that is still not merged is told again. Then no more: what fails four times in
four hours needs a person, or another revision."""


def landed(project: Project) -> list[Change]:
    """Sources whose revision of now is not the one merged last; nothing is written.

    Raises BadInputError and SourceError as resolving the sources does.
    """
    return resolve(project, project.load_params(), write=False).changes(merged_last(project))


def merged_last(project: Project) -> Lock | None:
    """The lock of the last re-merge that went through to its end; None where there was none.

    sources.lock says more: what was resolved last, whatever became of it.
    """
    lock = Lock.read(_merged_file(project))
    # A project whose state was removed, but not what it made.
    return lock or (Lock.read(project.sources_lock) if project.registration_json.is_file() else None)


def note_merged(project: Project, lock: Lock) -> None:
    """Remember that a re-merge of `lock` has gone through to its end."""
    project.state.mkdir(parents=True, exist_ok=True)
    lock.write(_merged_file(project))


def due(project: Project, changes: Iterable[Change], settle_seconds: float = 0.0) -> list[Change]:
    """Those of `changes` that are to be told now.

    A revision is told at once when it is new; again after each of RETELL_SECONDS (and `settle_seconds`, for which a
    re-merge waits before it begins) if it is still not merged by then and no re-merge is at work.
    """
    known = _told(project)
    at_work = holder(project.run_lock) is not None
    found = []
    for change in changes:
        entry = known.get(_place(change))
        if entry is None or entry["revision"] != _revision(change):
            found.append(change)
        elif not at_work and entry["times"] <= len(RETELL_SECONDS):
            wait = settle_seconds + RETELL_SECONDS[entry["times"] - 1]
            if time.time() >= entry["at"] + wait:
                found.append(change)
    return found


def note_told(project: Project, changes: Iterable[Change]) -> None:
    """Remember that `changes` were told now."""
    known = _told(project)
    for change in changes:
        entry = known.get(_place(change))
        again = entry is not None and entry["revision"] == _revision(change)
        times = 1 + (entry["times"] if entry is not None and again else 0)
        known[_place(change)] = {"revision": _revision(change), "times": times, "at": time.time()}
    path = _told_file(project)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(known, indent=2) + "\n")


def forget_told(project: Project) -> None:
    """Have everything told again that is not merged."""
    _told_file(project).unlink(missing_ok=True)


def _place(change: Change) -> str:
    """A suite has its expert's name as a rule: only both say which landing it is."""
    return f"{change.what} {change.name}"


def _revision(change: Change) -> str:
    return f"{change.old or ''}>{change.new or ''}"


def _told(project: Project) -> dict[str, dict[str, Any]]:
    try:
        known: dict[str, dict[str, Any]] = json.loads(_told_file(project).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return known


def _told_file(project: Project) -> Path:
    return project.state / "told.json"


def _merged_file(project: Project) -> Path:
    return project.state / "merged.lock"
