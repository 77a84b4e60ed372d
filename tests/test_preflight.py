"""Mistakes of every kind are told together, before anything is started or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import environment, make_project, poemerge, read_params, write_params
from tiny import make_base, make_full_expert

from poemerge.cli.doctor import _repository
from poemerge.errors import BadInputError
from poemerge.preflight import preflight
from poemerge.project import Project


@pytest.fixture
def tiny_project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "project")


def snapshot(root: Path) -> dict[str, int]:
    """Modification time of every file but the cache of digests."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != "digests.json"]
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files}


def test_a_typo_a_missing_folder_and_a_foreign_expert_are_told_at_once(tiny_project: Project) -> None:
    root = tiny_project.root
    foreign = make_base(root / "models" / "foreign-base", layers=1)
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(vocab_size=95, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ).save_pretrained(foreign)
    params = read_params(root)
    params["merge"]["scale_facto"] = 0.2
    params["experts"]["ghost"] = {"source": "models/ghost"}
    params["experts"]["alien"] = {"source": "models/foreign-base"}
    write_params(root, params)
    before = snapshot(root)
    done = poemerge(tiny_project, "run")
    assert done.returncode == 2, done.stderr
    assert "3 problems" in done.stderr
    assert "merge.scale_facto" in done.stderr
    assert "'scale_factor'" in done.stderr, "the nearest key"
    assert "experts.ghost.source" in done.stderr
    alien = done.stderr[done.stderr.index("experts.alien.source") :]
    for word in ("expert:   alien", "tensor: ", "got: ", "expected: ", "next: "):
        assert word in alien
    assert snapshot(root) == before
    assert not (root / "sources.lock").exists()
    assert not tiny_project.prefect_home.exists(), "no server was started"


def test_suites_and_the_schedule_are_checked_before_anything_runs(tiny_project: Project) -> None:
    params = read_params(tiny_project.root)
    suites = params["evaluate"]["suites"]
    first, second = list(suites)[:2]
    suites[first]["metric"] = "acc"
    suites[second]["kind"] = "text-clasification"
    params["schedule"] = {"cron": "at night"}
    write_params(tiny_project.root, params)
    with pytest.raises(BadInputError) as caught:
        preflight(tiny_project)
    told = {problem.where: problem for problem in caught.value.problems}
    assert [where.partition(":")[0].removeprefix("params.yaml ") for where in told] == [
        f"evaluate.suites.{first}", f"evaluate.suites.{second}", "schedule.cron"
    ]  # fmt: skip
    metric, kind, cron = told.values()
    assert (metric.got, "accuracy" in metric.expected) == ("'acc'", True)
    assert "text-classification" in kind.next_step
    assert cron.got == "'at night'"


def test_a_section_that_dvc_tracks_must_be_there(tiny_project: Project) -> None:
    params = read_params(tiny_project.root)
    del params["tail"]
    write_params(tiny_project.root, params)
    with pytest.raises(BadInputError, match=r"add `tail: \{\}`"):
        preflight(tiny_project)


def test_an_expert_that_may_be_skipped_is_left_to_the_fetching(tiny_project: Project) -> None:
    params = read_params(tiny_project.root)
    params["experts"]["ghost"] = {"source": "models/ghost"}
    params["fetch"]["on_bad_expert"] = "skip"
    write_params(tiny_project.root, params)
    assert set(preflight(tiny_project).experts) == {"apples", "pears", "plums", "ghost"}


def test_another_base_is_told_once_per_expert(tiny_project: Project) -> None:
    root = tiny_project.root
    other = make_base(root / "models" / "other", seed=99)
    make_full_expert(other, root / "models" / "stranger", seed=5)
    params = read_params(root)
    params["experts"]["stranger"] = {"source": "models/stranger"}
    write_params(root, params)
    with pytest.raises(BadInputError, match="another base") as caught:
        preflight(tiny_project)
    assert [problem.expert for problem in caught.value.problems] == ["stranger"]


def test_outside_a_project_every_command_says_what_to_do(tmp_path: Path) -> None:
    for command in ("run", "plan", "status", "ui", "serve"):
        done = subprocess.run(
            [sys.executable, "-m", "poemerge", command],
            cwd=tmp_path,
            env=environment() | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "No project here" in done.stderr


def test_the_doctor_says_that_dvc_needs_a_repository(tmp_path: Path) -> None:
    def verdict() -> str:
        return next(check.verdict for check in _repository(Project(tmp_path)) if check.what == "git")

    assert verdict() == "bad"
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    assert verdict() == "warn"
