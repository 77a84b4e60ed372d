"""`poemerge status`: what is merged, what has landed since, what runs, what comes next, what failed last."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poemerge.project import Project

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Say what is merged now, what has landed since, what runs, when the next run is, and what failed last.

$ poemerge status
Merged       poemerge-demo version 3 (candidate, champion), digest 4c1f0a9be2d7
  movies     hf://acme/movies@main  9f2c1b7a0d3e
Landed       tweets: models:/tweets@champion, 4 → 5
Runs now     nothing
Next run     2026-11-23 03:00 UTC (remerge)
Failed last  merge: expert movies has non-finite values …
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `status` to the command line."""
    parser = subparsers.add_parser(
        "status",
        help="what is merged, what has landed, what runs",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the status; 0 whatever it is."""
    from poemerge.project import Project

    project = Project.find()
    status = _status(project)
    if args.json:
        print(json.dumps(status, indent=2, ensure_ascii=False))
    else:
        _show(status)
    return 0


def _status(project: Project) -> dict[str, Any]:
    from poemerge.errors import PoemergeError
    from poemerge.landings import merged_last
    from poemerge.sources import resolve

    landed: Iterable[dict[str, Any]] = []
    waiting: dict[str, str] = {}
    trouble = None
    try:
        lock = resolve(project, project.load_params(), write=False)
        landed, waiting = map(vars, lock.changes(merged_last(project))), {**lock.waiting, **lock.skipped}
    except PoemergeError as error:
        # A source that is down or wrong is part of the status, not the end of it.
        trouble = str(error)
    return {
        "merged": _merged(project),
        "landed": list(landed),
        "waiting": waiting,
        "trouble": trouble,
        "failures": _failures(project),
        **_server(project),
    }


def _merged(project: Project) -> dict[str, Any] | None:
    merge = _read(project.merge_json)
    if merge is None:
        return None
    sources = _read(project.sources_lock) or {"experts": {}}
    registration = _read(project.registration_json)
    current = registration if registration and registration["digest"] == merge["digest"] else None
    return {
        "digest": merge["digest"],
        "method": merge["method"],
        "experts": {
            name: {
                "source": sources["experts"].get(name, {}).get("source"),
                "revision": facts.get("revision"),
                "digest": facts.get("digest"),
            }
            for name, facts in merge["experts"].items()
        },
        # A merge whose evaluation or registration has not happened yet is no version.
        "registered": current and _registered(project, current),
    }


def _registered(project: Project, registration: dict[str, Any]) -> dict[str, Any]:
    """The version of metrics/registration.json, with its aliases and the champion as they are now."""
    from poemerge.registry.standing import standing

    told = ("model", "version", "promoted", "run_id")
    facts: dict[str, Any] = {key: registration[key] for key in told if key in registration}
    return facts | vars(standing(project, registration))


def _failures(project: Project) -> list[dict[str, Any]]:
    """Stages whose last run failed, with their messages."""
    from poemerge.project import STAGES

    found = []
    for stage in STAGES:
        failure = _read(project.stage_failure(stage))
        if failure is not None:
            found.append({"stage": stage, "message": failure["message"]})
    return found


def _server(project: Project) -> dict[str, Any]:
    """What the Prefect server knows, when one is configured or served here; and who holds the run lock."""
    import os

    from poemerge.filelock import holder
    from poemerge.servers import answers, published, use_prefect

    nothing: dict[str, Any] = {"server": None, "running": [], "next": None, "failed_runs": []}
    nothing["process"] = holder(project.run_lock)
    url = os.environ.get("PREFECT_API_URL")
    if url is None:
        url = published(project).get("prefect")
        if url is None:
            return nothing
        use_prefect(project, url)
    if not answers(f"{url}/health", seconds=5.0):
        return nothing | {"server": f"{url} does not answer"}
    return nothing | {"server": url, **_runs()}


def _runs() -> dict[str, Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        DeploymentFilterTags,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import FlowRun, StateType
    from prefect.client.schemas.sorting import FlowRunSort

    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=["poemerge"]))
    merging = DeploymentFilter(name=DeploymentFilterName(any_=["remerge"]))

    def runs(*states: StateType, of: DeploymentFilter = ours, sort: FlowRunSort, limit: int) -> list[FlowRun]:
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states)))
        with get_client(sync_client=True) as client:
            return client.read_flow_runs(
                flow_run_filter=FlowRunFilter(state=state), deployment_filter=of, sort=sort, limit=limit
            )

    now = runs(StateType.RUNNING, StateType.PENDING, sort=FlowRunSort.START_TIME_DESC, limit=10)
    coming = runs(StateType.SCHEDULED, of=merging, sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC, limit=1)
    failed = runs(StateType.FAILED, StateType.CRASHED, sort=FlowRunSort.END_TIME_DESC, limit=5)
    first = coming[0] if coming else None
    return {
        "running": [{"name": run.name, "since": run.start_time and run.start_time.isoformat()} for run in now],
        "next": first and {"name": first.name, "at": first.next_scheduled_start_time.isoformat()}
        if first and first.next_scheduled_start_time
        else None,
        "failed_runs": [
            {
                "name": run.name,
                "at": run.end_time and run.end_time.isoformat(),
                "message": run.state.message if run.state else None,
            }
            for run in failed
        ],
    }


def _show(status: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)

    def line(what: str, text: str) -> None:
        console.print(f"{what:<12} {text}", markup=False)

    merged = status["merged"]
    if merged is None:
        line("Merged", "nothing yet; `poemerge run` merges")
    else:
        version = merged["registered"]
        told = (
            f"{version['model']} version {version['version']} ({', '.join(version['aliases']) or 'no alias'})"
            if version
            else "not registered yet"
        )
        line("Merged", f"{told}, digest {merged['digest'][:12]}")
        for name, expert in merged["experts"].items():
            line(f"  {name}", f"{expert['source']}  {str(expert['revision'])[:19]}")
        if version and version["champion"] != version["version"]:
            line("Champion", "none" if version["champion"] is None else f"version {version['champion']}")
        if version and version["note"]:
            line("Registry", version["note"].replace("\n", "\n" + " " * 13))
    for change in status["landed"]:
        line("Landed", f"{change['name']}: {change['source']}, {_short(change['old'])} → {_short(change['new'])}")
    for name, why in status["waiting"].items():
        line("Not taken", f"{name}: {why}")
    if status["trouble"]:
        line("Trouble", status["trouble"].replace("\n", "\n" + " " * 13))
    running = ", ".join(run["name"] for run in status["running"])
    line("Runs now", running or (f"process {status['process']}" if status["process"] else "nothing"))
    if status["next"]:
        line("Next run", f"{status['next']['at']} ({status['next']['name']})")
    else:
        line("Next run", "none is scheduled; `poemerge serve` schedules them")
    for failure in status["failures"]:
        line("Failed last", f"{failure['stage']}: {failure['message'].splitlines()[0]}")
    for run in status["failed_runs"]:
        line("Failed run", f"{run['name']} at {run['at']}: {(run['message'] or '').splitlines()[:1]}")


def _short(revision: str | None) -> str:
    return "nothing" if revision is None else revision[:19]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return read
