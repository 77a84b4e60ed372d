"""What can be found wrong before any server or stage is started: params.yaml, the local folders, their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from poemerge.errors import BadInputError, CheckpointError, ParamsError, Problem
from poemerge.params import ExpertParams, Params, ScheduleParams, SourceParams, SuiteParams
from poemerge.project import Project
from poemerge.sources import find_problems

__all__ = ["preflight"]

Section = TypeVar("Section", bound=BaseModel)


def preflight(project: Project) -> Params:
    """Params of the project, once they and the checkpoints in local folders have been found to fit together.

    Changes nothing. Raises BadInputError with every problem at once: of params.yaml, of folders that are missing or not
    whole, and of experts that were not fine-tuned from the base. With `fetch.on_bad_expert: skip` the problems of an
    expert are left to the fetching, which skips it and says so.
    """
    problems: list[Problem] = []
    try:
        params: Params | None = project.load_params()
    except ParamsError as error:
        params, problems = None, list(error.problems)
    problems += _untracked(project)
    # What can be read of a file with mistakes is checked too, so that all mistakes are told together.
    base, experts, suites = (
        _legible(project.params_yaml)
        if params is None
        else (params.base, dict(params.experts), dict(params.evaluate.suites))
    )
    include, exclude = (("*",), ()) if params is None else (params.merge.include, params.merge.exclude)
    problems += _suites(suites)
    if params is not None:
        problems += _schedule(params.schedule)
    found = find_problems(project.root, base, experts, suites)
    missing = {problem.expert for problem in found if problem.expert is not None}
    found += _misfits(project, base, {n: e for n, e in experts.items() if n not in missing}, include, exclude)
    if params is not None and params.fetch.on_bad_expert == "skip":
        found = [problem for problem in found if problem.expert is None]
    if params is None or problems or found:
        raise BadInputError([*problems, *found])
    return params


def _untracked(project: Project) -> list[Problem]:
    """Sections that dvc.yaml tracks and params.yaml leaves to its defaults: DVC refuses to run without them."""
    raw = _mapping(project.params_yaml)
    stages: dict[str, dict[str, Any]] = _mapping(project.dvc_yaml).get("stages", {})
    tracked = {str(key).partition(".")[0]: stage for stage, facts in stages.items() for key in facts.get("params", ())}
    return [
        Problem(
            f"params.yaml {key}",
            got="nothing",
            expected=f"the section, because DVC tracks it for the stage {stage}",
            next_step=f"add `{key}: {{}}` for its defaults",
        )
        for key, stage in tracked.items()
        if raw and key not in raw
    ]


def _suites(suites: Mapping[str, SuiteParams]) -> list[Problem]:
    """Kinds, options and metrics that there are not."""
    from poemerge.errors import SuiteError
    from poemerge.suites.protocol import SuiteSpec, open_suite  # imports torch

    problems = []
    for name, settings in suites.items():
        try:
            open_suite(SuiteSpec(name, settings))
        except SuiteError as error:
            where, said = f"params.yaml evaluate.suites.{name}", error.problem
            problems.append(
                Problem(where, str(error), "a suite that can be opened", "mend it")
                if said is None
                else replace(said, where=f"{where}: {said.where}")
            )
    return problems


def _schedule(schedule: ScheduleParams) -> list[Problem]:
    if schedule.cron in {None, ScheduleParams().cron}:
        return []
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    except ValidationError:
        expected = "five fields: minute, hour, day of the month, month, day of the week"
        return [Problem("params.yaml schedule.cron", repr(schedule.cron), expected, "for instance 0 3 * * *")]
    return []


def _misfits(
    project: Project,
    base: SourceParams | None,
    experts: Mapping[str, ExpertParams],
    include: Sequence[str],
    exclude: Sequence[str],
) -> list[Problem]:
    """One problem for each expert in a local folder that does not fit the base, with its first tensor that shows it."""
    from poemerge.checkpoints import ExpertSet  # imports torch

    folders = {name: folder for name, e in experts.items() if (folder := _local(project, e.source)) is not None}
    base_folder = _local(project, base.source) if base is not None else None
    if base_folder is None and (project.base / "source.json").is_file():
        base_folder = project.base
    if base_folder is None or not base_folder.is_dir() or not folders:
        return []
    try:
        ExpertSet.open(base_folder, folders, include, exclude).close()
    except CheckpointError as error:
        return _one_each(error.problems)
    return []


def _one_each(problems: Sequence[Problem]) -> list[Problem]:
    by_expert: dict[str | None, list[Problem]] = {}
    for problem in problems:
        by_expert.setdefault(problem.expert, []).append(problem)
    told = []
    for expert, own in by_expert.items():
        first = next((problem for problem in own if problem.tensor is not None), own[0])
        more = f" (and {len(own) - 1} more of its parameters or settings differ)" if len(own) > 1 else ""
        key = "base.source" if expert is None else f"experts.{expert}.source"
        told.append(replace(first, where=f"params.yaml {key}: {first.where}", got=first.got + more))
    return told


def _local(project: Project, source: str) -> Path | None:
    """The folder that `source` spells, or None when it lies elsewhere."""
    if "://" in source or source.startswith("models:/"):
        return None
    return project.root / Path(source).expanduser()


def _legible(path: Path) -> tuple[SourceParams | None, dict[str, ExpertParams], dict[str, SuiteParams]]:
    """The base, experts and suites of a params.yaml that is not valid as a whole, as far as they are valid."""
    raw = _mapping(path)
    evaluate = raw.get("evaluate")
    return (
        _section(SourceParams, raw.get("base")),
        _sections(ExpertParams, raw.get("experts")),
        _sections(SuiteParams, evaluate.get("suites") if isinstance(evaluate, dict) else None),
    )


def _mapping(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`, empty when it holds none."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _sections(model: type[Section], raw: Any) -> dict[str, Section]:
    if not isinstance(raw, dict):
        return {}
    return {str(name): section for name, value in raw.items() if (section := _section(model, value)) is not None}


def _section(model: type[Section], raw: Any) -> Section | None:
    try:
        return model.model_validate(raw)
    except ValidationError:
        return None
