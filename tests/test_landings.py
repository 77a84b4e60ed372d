"""What has landed since the last complete re-merge, when it is told, and that a look that finds nothing is nothing."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from tiny import make_base, make_full_expert

import flows.watch
from poemerge.filelock import exclusive
from poemerge.landings import RETELL_SECONDS, due, forget_told, landed, merged_last, note_merged, note_told
from poemerge.project import Project
from poemerge.sources import Change, resolve


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """Two experts, merged; and no Prefect server, so that whoever tells something is found out."""
    base = make_base(tmp_path / "models" / "base")
    for seed, name in enumerate(("a", "b")):
        make_full_expert(base, tmp_path / "models" / name, seed)
    (tmp_path / "dvc.yaml").touch()
    experts = "{a: {source: models/a}, b: {source: models/b}}"
    (tmp_path / "params.yaml").write_text(f"base: {{source: models/base}}\nexperts: {experts}\n")
    project = Project(tmp_path)
    note_merged(project, resolve(project, project.load_params()))
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        yield project


def retrain(project: Project, name: str, seed: int) -> None:
    make_full_expert(project.root / "models" / "base", project.root / "models" / name, seed)


def names(changes: list[Change]) -> list[str]:
    return [change.name for change in changes]


def test_what_was_resolved_and_not_merged_has_still_landed(project: Project) -> None:
    retrain(project, "a", 7)
    assert names(landed(project)) == ["a"]
    lock = resolve(project, project.load_params())
    assert names(landed(project)) == ["a"], "a re-merge that failed after resolving its sources"
    note_merged(project, lock)
    assert landed(project) == []
    assert merged_last(project) == lock


def test_without_its_state_a_project_is_taken_at_what_it_registered(project: Project) -> None:
    shutil.rmtree(project.state)
    assert names(landed(project)) == ["base", "a", "b"], "it has never merged"
    project.registration_json.parent.mkdir()
    project.registration_json.write_text("{}")
    assert landed(project) == []


def test_a_landing_is_told_once_and_again_ever_later_and_then_no_more(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    retrain(project, "a", 7)
    changes = landed(project)
    told = []
    for wait in (0.0, *RETELL_SECONDS):
        now += wait + 29
        assert due(project, changes, settle_seconds=30) == ([] if wait else changes)
        now += 1
        assert due(project, changes, settle_seconds=30) == changes
        note_told(project, changes)
        told.append(now)
        assert due(project, changes) == [], "told once"
    assert len(told) == 4
    now += 1e9
    assert due(project, changes) == [], "given up"

    retrain(project, "a", 8)
    retrain(project, "b", 8)
    assert names(due(project, landed(project))) == ["a", "b"], "another revision is another landing"
    forget_told(project)
    assert names(due(project, changes)) == ["a"]


def test_an_expert_and_its_suite_are_two_landings(project: Project) -> None:
    changes = [Change("expert", "a", "models/a", "1", "2"), Change("suite", "a", "suites/a", "3", "4")]
    note_told(project, changes)
    assert due(project, changes) == []


def test_nothing_is_told_again_while_a_re_merge_is_at_work(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain(project, "a", 7)
    note_told(project, landed(project))
    retrain(project, "b", 7)
    later = time.time() + 10_000
    monkeypatch.setattr(time, "time", lambda: later)
    assert names(due(project, landed(project))) == ["a", "b"]
    with exclusive(project.run_lock):
        assert names(due(project, landed(project))) == ["b"], "which it may not have seen"


def test_a_look_at_100_sources_that_finds_nothing_tells_reads_and_writes_nothing(project: Project) -> None:
    for number in range(98):
        shutil.copytree(project.root / "models" / "a", project.root / "models" / f"x{number}")
    experts = {path.name: {"source": f"models/{path.name}"} for path in (project.root / "models").glob("[abx]*")}
    del experts["base"]
    assert len(experts) == 100
    params = {"base": {"source": "models/base"}, "experts": experts}
    project.params_yaml.write_text(json.dumps(params))
    # Files that were written just now are read again until they have settled, so these are made older.
    old = 1_500_000_000
    for file in project.root.glob("models/*/*"):
        os.utime(file, (old, old))
    note_merged(project, resolve(project, project.load_params()))
    # Other bytes of the same size, time and inode: only one who reads the weights would find them.
    for file in project.root.glob("models/*/model.safetensors"):
        with file.open("r+b") as weights:
            weights.seek(-4, os.SEEK_END)
            weights.write(b"\1\2\3\4")
        os.utime(file, (old, old))
    made = {path: path.stat().st_mtime_ns for path in project.root.rglob("*") if path.is_file()}
    assert flows.watch.look(project) == []
    after = {path: path.stat().st_mtime_ns for path in project.root.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != made.get(path)} <= {project.state / "told.lock"}

    retrain(project, "x5", 9)
    with pytest.raises((httpx.ConnectError, RuntimeError)):
        flows.watch.look(project)
    assert not (project.state / "told.json").exists(), "what no server took was not told"
