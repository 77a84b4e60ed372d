"""prefect.yaml with the schedule that this project's params.yaml asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from poemerge.params import ScheduleParams
from poemerge.project import Project

__all__ = ["scheduled", "write_deployments"]


def scheduled(deployments: dict[str, Any], schedule: ScheduleParams, *, watched: bool = False) -> dict[str, Any]:
    """The content of prefect.yaml with `schedule` in the place of the times that stand there.

    With `watched` the schedule of `watch` is installed asleep, because somebody else looks at the sources.
    """
    settle = schedule.watch.settle_seconds
    changed = []
    for deployment in deployments["deployments"]:
        one = dict(deployment)
        if one["name"] == "remerge":
            one["schedules"] = [
                nightly | {"cron": schedule.cron, "timezone": schedule.timezone}
                for nightly in one["schedules"]
                if schedule.cron is not None
            ]
            one["triggers"] = [_settling(trigger, settle) for trigger in one["triggers"]]
        elif one["name"] == "watch":
            every = {"interval": schedule.watch.interval_seconds, **({"active": False} if watched else {})}
            one["schedules"] = [poll | every for poll in one["schedules"]]
        changed.append(one)
    return deployments | {"deployments": changed}


def _settling(trigger: dict[str, Any], settle: int) -> dict[str, Any]:
    request = trigger["parameters"]["request"] | {"settle_seconds": settle}
    return trigger | {"within": settle, "parameters": {"request": request}}


def write_deployments(project: Project, schedule: ScheduleParams, *, watched: bool) -> Path:
    """Write what `prefect deploy` is to install for this project, as `scheduled` says; returns the file."""
    content = yaml.safe_load((project.root / "prefect.yaml").read_text(encoding="utf-8"))
    path = project.state / "prefect.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(scheduled(content, schedule, watched=watched), sort_keys=False), encoding="utf-8")
    return path
