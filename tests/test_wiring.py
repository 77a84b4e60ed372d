"""dvc.yaml, project.py, params.py, tasks/, flows/ and prefect.yaml say the same."""

from __future__ import annotations

import importlib
import inspect
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import prefect
import pytest
import yaml

import flows.remerge
import flows.watch
from poemerge.deployments import scheduled
from poemerge.params import Params, ScheduleParams, WatchParams
from poemerge.project import STAGES, Project

ROOT = Path(__file__).parents[1]
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
DEPLOYMENTS: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))


def outs(stage: str) -> set[str]:
    facts = DVC["stages"][stage]
    entries = [*facts.get("outs", ()), *facts.get("metrics", ())]
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def overlap(one: str, other: str) -> bool:
    a, b = PurePosixPath(one), PurePosixPath(other)
    return a == b or a in b.parents or b in a.parents


def test_dvc_has_the_stages_in_the_order_in_which_the_flow_runs_them() -> None:
    assert tuple(DVC["stages"]) == STAGES == tuple(flows.remerge.HOURS)
    assert set(flows.remerge.RETRIED) <= set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reads_only_what_stands_in_the_checkout_or_comes_from_a_stage_before(stage: str) -> None:
    before = [out for earlier in STAGES[: STAGES.index(stage)] for out in outs(earlier)]
    for dep in DVC["stages"][stage]["deps"]:
        assert (
            dep == Project(ROOT).sources_lock.name or (ROOT / dep).exists() or any(overlap(dep, o) for o in before)
        ), dep
        after = [out for later in STAGES[STAGES.index(stage) :] for out in outs(later)]
        assert not any(overlap(dep, out) for out in after), f"{stage} reads {dep}, which is made later"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_one_function_that_its_command_runs_and_its_code_is_a_dependency(stage: str) -> None:
    facts = DVC["stages"][stage]
    assert facts["cmd"] == f"python -m tasks {stage}"
    assert f"tasks/{stage}.py" in facts["deps"]
    module = importlib.import_module(f"tasks.{stage}")
    assert module.__all__ == [stage]
    assert list(inspect.signature(getattr(module, stage)).parameters)[:2] == ["project", "params"]


def test_every_output_is_a_path_that_project_spells() -> None:
    project = Project(ROOT)
    spelt = {
        str(getattr(project, name).relative_to(ROOT))
        for name, value in vars(Project).items()
        if isinstance(value, property)
    }
    spelt |= {str(project.stage_report(stage).relative_to(ROOT)) for stage in STAGES}
    for stage in STAGES:
        assert str(project.stage_report(stage).relative_to(ROOT)) in outs(stage)
        for out in outs(stage):
            assert out in spelt or any(PurePosixPath(out) in PurePosixPath(path).parents for path in spelt), out


def test_tracked_params_are_sections_of_params() -> None:
    known = {field.alias or name for name, field in Params.model_fields.items()}
    tracked = {key.partition(".")[0] for facts in DVC["stages"].values() for key in facts.get("params", ())}
    assert tracked <= known
    assert tracked <= set(yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")))
    # What no stage tracks is resolved into sources.lock, or is about when to run.
    assert known - tracked == {"base", "experts", "collections", "schedule"}


def test_each_deployment_is_a_flow_of_its_own_name_with_the_default_schedule() -> None:
    for deployment in DEPLOYMENTS["deployments"]:
        file, _, name = deployment["entrypoint"].partition(":")
        flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
        assert isinstance(flow, prefect.Flow)
        assert flow.name == deployment["name"]
        flow.validate_parameters(deployment["parameters"]) if "parameters" in deployment else None
    assert scheduled(DEPLOYMENTS, ScheduleParams()) == DEPLOYMENTS


def test_the_trigger_waits_for_the_event_that_watch_emits_and_settles_as_params_say() -> None:
    params = ScheduleParams(cron=None, watch=WatchParams(interval_seconds=7, settle_seconds=11))
    by_name = {d["name"]: d for d in scheduled(DEPLOYMENTS, params)["deployments"]}
    (trigger,) = by_name["remerge"]["triggers"]
    assert trigger["expect"] == [flows.watch.EVENT]
    assert timedelta(seconds=trigger["within"]).total_seconds() == 11
    landing = flows.remerge.Landing(name="cats", source="models/cats", old="1", new="2")
    templates = trigger["parameters"]["request"]["landing"]
    assert {key: f"{{{{ event.payload.{key} }}}}" for key in landing.model_dump()} == templates
    assert trigger["parameters"]["request"]["settle_seconds"] == 11
    assert by_name["remerge"]["schedules"] == []
    assert by_name["watch"]["schedules"][0]["interval"] == 7
    asleep = {d["name"]: d for d in scheduled(DEPLOYMENTS, params, watched=True)["deployments"]}
    assert [schedule["active"] for schedule in asleep["watch"]["schedules"]] == [False]
    assert by_name["remerge"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
