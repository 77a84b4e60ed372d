"""What a run would do and why: sources that moved, params that changed, code and files that DVC finds different."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from poemerge.errors import ProjectError
from poemerge.params import Params
from poemerge.project import STAGES, Project
from poemerge.sources import Change, Lock, resolve

__all__ = ["Plan", "Reason", "StagePlan", "make_plan"]

Kind = Literal["source", "parameter", "code", "input", "output", "command", "new", "stage"]


@dataclass(frozen=True)
class Reason:
    """Why a stage has work: `kind`, and in words `what` changed."""

    kind: Kind
    what: str


@dataclass(frozen=True)
class StagePlan:
    """One stage: `work` is "run" when something it depends on has changed, "perhaps" when a stage before it has work
    (it then runs only if that changes its inputs), "none" otherwise; `seconds` is how long it took last."""

    stage: str
    work: Literal["run", "perhaps", "none"]
    reasons: tuple[Reason, ...]
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a run would do: the sources that it would take up, and the stages in their order."""

    sources: tuple[Change, ...]
    skipped: Mapping[str, str]
    waiting: Mapping[str, str]
    stages: tuple[StagePlan, ...]

    @property
    def has_work(self) -> bool:
        return any(stage.work != "none" for stage in self.stages)

    def as_json(self) -> dict[str, Any]:
        """The plan as `poemerge plan --json` prints it."""
        return {
            "work": self.has_work,
            "sources": [asdict(change) for change in self.sources],
            "skipped": dict(self.skipped),
            "waiting": dict(self.waiting),
            "stages": [asdict(stage) for stage in self.stages],
        }


def make_plan(project: Project, params: Params, changed: Mapping[str, list[Any]]) -> Plan:
    """The plan of a run of `project` now; nothing is written.

    Arguments: `changed`, what `dvc status` says of each stage that is not up to date.
    Raises BadInputError and SourceError as resolving the sources does.
    """
    lock, before = resolve(project, params, write=False), Lock.read(project.sources_lock)
    sources = tuple(lock.changes(before))
    stages: dict[str, dict[str, Any]] = yaml.safe_load(project.dvc_yaml.read_text(encoding="utf-8"))["stages"]
    recorded = _recorded(project)
    seconds = _seconds(project)
    plans: list[StagePlan] = []
    for name in STAGES:
        reasons = list(_reasons(changed.get(name, []), stages[name], recorded.get(name), project))
        if name == "fetch":
            # That sources.lock changed says less than which source did, or that an earlier run did not get to fetch it.
            resolved = [r for r in reasons if r.what == project.sources_lock.name]
            reasons = [r for r in reasons if r not in resolved]
            reasons += [Reason("source", _told(change)) for change in sources]
            reasons += [Reason("source", f"what is said of {one} changed") for one in lock.restated(before)]
            if resolved and not sources:
                reasons.append(Reason("source", "what was resolved last is not fetched yet"))
        ahead = [plan.stage for plan in plans if plan.work != "none" and _feeds(stages[plan.stage], stages[name])]
        if reasons:
            plans.append(StagePlan(name, "run", tuple(reasons), seconds.get(name)))
        elif ahead:
            why = tuple(Reason("stage", f"{stage} comes before it") for stage in ahead)
            plans.append(StagePlan(name, "perhaps", why, seconds.get(name)))
        else:
            plans.append(StagePlan(name, "none", (), seconds.get(name)))
    return Plan(sources, lock.skipped, lock.waiting, tuple(plans))


def _told(change: Change) -> str:
    if change.old is None:
        return f"{change.what} {change.name} is new: {change.source}"
    if change.new is None:
        return f"{change.what} {change.name} is gone: {change.source}"
    return f"{change.what} {change.name} moved: {change.source} from {change.old[:19]} to {change.new[:19]}"


def _reasons(
    status: list[Any], definition: dict[str, Any], recorded: dict[str, Any] | None, project: Project
) -> Iterator[Reason]:
    if recorded is None:
        yield Reason("new", "it has never run here")
        return
    for entry in status:
        if isinstance(entry, str):
            yield Reason("command", definition["cmd"])
            continue
        for path, what in entry.get("changed deps", {}).items():
            if path == project.params_yaml.name:
                yield from _parameters(recorded.get("params", {}).get(path, {}), definition["params"], project)
            else:
                code = PurePosixPath(path).parts[0] in {"tasks", "poemerge"}
                yield Reason("code" if code else "input", path if what == "modified" else f"{path} ({what})")
        for path, what in entry.get("changed outs", {}).items():
            yield Reason("output", f"{path} is {what} since the stage wrote it")


def _parameters(recorded: Mapping[str, Any], tracked: list[str], project: Project) -> Iterator[Reason]:
    """Keys whose value now is not the one that the stage ran with."""
    now = yaml.safe_load(project.params_yaml.read_text(encoding="utf-8"))
    for section in tracked:
        value: Any = now
        for key in section.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        before, after = dict(_leaves(section, recorded.get(section))), dict(_leaves(section, value))
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                yield Reason("parameter", f"{key}: {before.get(key)} → {after.get(key)}")


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}", inner)
    else:
        yield prefix, value


def _feeds(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether something that the stage `one` writes is, contains or lies in something that `other` reads."""
    written = [PurePosixPath(p) for kind in ("outs", "metrics") for p in map(_path, one.get(kind, ()))]
    read = [PurePosixPath(p) for p in other.get("deps", ())]
    return any(w == r or w in r.parents or r in w.parents for w in written for r in read)


def _path(out: str | dict[str, Any]) -> str:
    return out if isinstance(out, str) else next(iter(out))


def _recorded(project: Project) -> dict[str, Any]:
    """What dvc.lock says of each stage's last run."""
    if not project.dvc_lock.is_file():
        return {}
    lock = yaml.safe_load(project.dvc_lock.read_text(encoding="utf-8"))
    if not isinstance(lock, dict):
        raise ProjectError(f"{project.dvc_lock} cannot be understood.\n  next:     restore it with git")
    stages: dict[str, Any] = lock.get("stages") or {}
    return stages


def _seconds(project: Project) -> dict[str, float]:
    """How long each stage took when it last ran."""
    try:
        known: dict[str, float] = json.loads(project.stage_seconds.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return known
