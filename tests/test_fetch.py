"""The stage fetch: data/ becomes what sources.lock names, whole folders at a time, and never by writing in place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_base, make_full_expert, make_lora_expert, make_suite

from poemerge.checkpoints import folder_digest
from poemerge.errors import BadInputError, ProjectError
from poemerge.project import Project
from poemerge.sources import read_source_json, resolve
from tasks.fetch import fetch
from tasks.report import StageReport

PARAMS = """
base: {source: models/base}
experts: {full: {source: models/full, license: mit}, lora: {source: models/lora}}
evaluate: {suites: {full: {data: models/suite}}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base")
    make_full_expert(base, root / "full", 1)
    make_lora_expert(base, root / "lora", 2)
    make_suite(root / "suite")
    make_full_expert(make_base(root / "other-base", seed=9, layers=1), root / "other", 3)
    return root


@pytest.fixture
def project(tmp_path: Path, models: Path) -> Project:
    root = tmp_path / "project"
    for file in models.rglob("*.*"):
        target = root / "models" / file.relative_to(models)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (root / "dvc.yaml").touch()
    (root / "params.yaml").write_text(PARAMS)
    return Project(root)


def fetched(project: Project, params: str | None = None) -> StageReport:
    if params is not None:
        project.params_yaml.write_text(params)
    resolve(project, project.load_params())
    return fetch(project, project.load_params())


def move_weights(folder: Path, by: float = 0.1) -> None:
    weights = folder / "model.safetensors"
    moved = {n: v + by if v.is_floating_point() else v for n, v in load_file(weights).items()}
    save_file(moved, weights, metadata={"format": "pt"})


def snapshot(project: Project) -> dict[str, int]:
    data = project.base.parent
    return {p.relative_to(data).as_posix(): p.stat().st_ino for p in data.rglob("*") if p.is_file()}


def test_everything_is_brought_with_its_origin(project: Project, models: Path) -> None:
    report = fetched(project)
    for folder, source in ((project.base, "base"), (project.expert("full"), "full"), (project.suite("full"), "suite")):
        known = read_source_json(folder)
        assert known is not None
        assert known["source"] == f"models/{source}"
        assert known["digest"] == folder_digest(folder) == folder_digest(models / source)
        assert known["size"] == sum(fact["size"] for fact in known["files"].values())
        assert known["time"].endswith("+00:00")
    assert {row["name"]: row["license"] for row in report.table if row["what"] == "expert"} == {
        "full": "mit",
        "lora": None,
    }
    assert report.headline == "2 experts, 1 suites: 4 fetched, 0 already there"
    assert not (project.base.parent / "fetch.partial").exists()


def test_what_is_there_stays(project: Project) -> None:
    fetched(project)
    before = snapshot(project)
    report = fetched(project)
    assert report.headline == "2 experts, 1 suites: 0 fetched, 4 already there"
    assert snapshot(project) == before


def test_one_changed_expert_moves_one_folder_and_writes_no_file_in_place(project: Project, tmp_path: Path) -> None:
    fetched(project)
    before = snapshot(project)
    cached = tmp_path / "dvc-cache-file"
    os.link(project.expert("full") / "model.safetensors", cached)
    content = cached.read_bytes()
    move_weights(project.root / "models" / "full")
    fetched(project)
    assert cached.read_bytes() == content
    after = snapshot(project)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name.split("/")[1] for name in changed} == {"full"}
    assert folder_digest(project.expert("full")) == folder_digest(project.root / "models" / "full")


@pytest.mark.parametrize("harm", ["bytes", "extra", "missing", "source.json"])
def test_what_was_changed_under_data_is_brought_anew(project: Project, harm: str) -> None:
    fetched(project)
    folder = project.expert("full")
    if harm == "bytes":
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    elif harm == "extra":
        (folder / "extra.json").write_text("{}")
    elif harm == "missing":
        (folder / "vocab.txt").unlink()
    else:
        (folder / "source.json").write_text("{")
    assert fetched(project).headline == "2 experts, 1 suites: 1 fetched, 3 already there"
    assert folder_digest(folder) == folder_digest(project.root / "models" / "full")


def test_fetching_again_gives_the_same_bytes(project: Project) -> None:
    fetched(project)
    first = (project.expert("full") / "source.json").read_bytes()
    fetched(project, PARAMS.replace("full: {source: models/full, license: mit}, ", ""))
    assert not project.expert("full").exists()
    fetched(project, PARAMS)
    assert (project.expert("full") / "source.json").read_bytes() == first


def test_an_expert_of_another_architecture_ends_the_stage_and_changes_nothing_else(project: Project) -> None:
    fetched(project)
    before = snapshot(project)
    with pytest.raises(BadInputError) as caught:
        fetched(project, PARAMS.replace("models/full,", "models/other,"))
    assert {problem.expert for problem in caught.value.problems} == {"full"}
    assert snapshot(project) == before


def test_skip_keeps_the_last_good_revision_and_says_so(project: Project) -> None:
    fetched(project, PARAMS + "fetch: {on_bad_expert: skip}\n")
    good = folder_digest(project.expert("full"))
    make_full_expert(make_base(project.root / "models" / "b1", layers=1), project.root / "models" / "full", 4)
    report = fetched(project)
    assert folder_digest(project.expert("full")) == good
    (warning,) = report.warnings
    assert warning.startswith(f"expert full skipped (keeps sha256:{good}): sha256:")
    assert "1 skipped" in report.headline
    (row,) = [row for row in report.table if (row["what"], row["name"]) == ("expert", "full")]
    assert (row["state"], row["revision"]) == ("skipped", f"sha256:{good}")
    assert row["reason"] in warning
    # A malformed revision stays malformed: the lock does not change, so DVC does not run this stage again for it.
    lock = project.sources_lock.read_bytes()
    resolve(project, project.load_params())
    assert project.sources_lock.read_bytes() == lock


def test_skip_leaves_out_what_no_longer_fits_a_new_base(project: Project, models: Path) -> None:
    fetched(project, PARAMS + "fetch: {on_bad_expert: skip}\n")
    make_base(project.root / "models" / "base", seed=5, layers=1)
    make_lora_expert(project.root / "models" / "base", project.root / "models" / "lora", 6)
    report = fetched(project)
    assert set(project.expert_folders()) == {"lora"}
    assert "left out" in report.warnings[0]


def test_no_expert_at_all_is_an_error_under_skip_too(project: Project) -> None:
    with pytest.raises(BadInputError):
        fetched(
            project,
            "base: {source: models/base}\nexperts: {x: {source: models/other}}\nfetch: {on_bad_expert: skip}\n",
        )


def test_a_folder_that_changes_after_it_was_resolved_is_refused(project: Project) -> None:
    resolve(project, project.load_params())
    move_weights(project.root / "models" / "full")
    with pytest.raises(Exception, match="changed after it was resolved"):
        fetch(project, project.load_params())
    assert not project.expert("full").exists()
    assert set(project.expert_folders()) == {"lora"}


def test_the_lock_must_be_there(project: Project) -> None:
    with pytest.raises(ProjectError, match="poemerge run"):
        fetch(project, project.load_params())


def test_what_is_no_longer_named_goes(project: Project) -> None:
    fetched(project)
    (project.experts / "stray").mkdir()
    (project.experts / "stray" / "file").touch()
    fetched(project, "base: {source: models/base}\nexperts: {lora: {source: models/lora}}\n")
    assert [path.name for path in project.experts.iterdir()] == ["lora"]
    assert list(project.suites.iterdir()) == []


def test_an_interrupted_fetch_is_cleared_away(project: Project) -> None:
    leftover = project.base.parent / "fetch.partial" / "new" / "experts" / "full"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    fetched(project)
    assert not leftover.exists()
    assert torch.equal(
        load_file(project.expert("full") / "model.safetensors")["head.weight"],
        load_file(project.root / "models" / "full" / "model.safetensors")["head.weight"],
    )


def test_killed_between_its_two_renames_the_old_folder_comes_back(project: Project) -> None:
    fetched(project, PARAMS + "fetch: {on_bad_expert: skip}\n")
    good = folder_digest(project.expert("full"))
    aside = project.base.parent / "fetch.partial" / "old" / "experts" / "full"
    aside.parent.mkdir(parents=True)
    project.expert("full").rename(aside)
    make_full_expert(make_base(project.root / "models" / "b1", layers=1), project.root / "models" / "full", 4)
    assert "keeps sha256:" in fetched(project).warnings[0]
    assert folder_digest(project.expert("full")) == good


def test_the_report_is_small_json(project: Project, tmp_path: Path) -> None:
    fetched(project).write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["table"][0]["what"] == "base"
