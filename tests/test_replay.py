"""A registered version made again in a fresh clone from git, the DVC remote and the registry: the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import tasks
from poemerge.cli.main import main
from poemerge.project import Project
from poemerge.registry.replay import Recipe, compare
from poemerge.registry.versions import Version
from tasks.register import register
from tests.registry_project import copied, merge_and_score, rewrite

PIPELINE = {
    "stages": {
        "fetch": {"cmd": "true", "outs": ["data/base", "data/experts", "artifacts/expert.json"]},
        "merge": {
            "cmd": "python -m tasks merge",
            "deps": ["data/base", "data/experts", "artifacts/expert.json"],
            "params": ["merge"],
            "outs": ["artifacts/merged"],
        },
    }
}


def call(*command: str, cwd: Path) -> None:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def git(*arguments: str, cwd: Path) -> None:
    call("git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose version 1 was merged by the real stage, tracked by DVC, pushed, and registered."""
    folder = tmp_path_factory.mktemp("replay")
    project = copied(folder / "origin")
    root = project.root
    shutil.copytree(Path(tasks.__path__[0]), root / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "dvc.yaml").write_text(yaml.safe_dump(PIPELINE))
    params = yaml.safe_load(project.params_yaml.read_text())
    params |= {"merge": {"method": "poe", "device": "cpu"}}
    project.params_yaml.write_text(yaml.safe_dump(params))
    (root / "dvc.lock").unlink()
    call(sys.executable, "-m", "dvc", "init", "-q", cwd=root)
    call(sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "store", str(folder / "remote"), cwd=root)
    git("add", "-A", cwd=root)
    git("commit", "-q", "-m", "pipeline", cwd=root)
    merge_and_score(project)
    call(sys.executable, "-m", "dvc", "commit", "-q", "-f", cwd=root)
    call(sys.executable, "-m", "dvc", "push", "-q", cwd=root)
    # Neither in the commit: what the registry keeps has to do.
    register(project, project.load_params())
    return project


def test_a_fresh_clone_makes_the_registered_bytes_again(
    origin: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clone = tmp_path / "clone"
    git("clone", "-q", str(origin.root), str(clone), cwd=tmp_path)
    assert not (clone / "data").exists()
    assert not (clone / "dvc.lock").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{origin.mlflow_db}")
    monkeypatch.chdir(clone)
    before = sorted(path.name for path in clone.iterdir())
    assert main(["replay", "champion", "--json", "--out", str(tmp_path / "again")]) == 0
    told = json.loads(capsys.readouterr().out)
    digest = json.loads(origin.merge_json.read_text())["digest"]
    assert told["identical"] is True
    assert told["registered"] == told["replayed"] == digest
    first = (origin.merged / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    assert sorted(path.name for path in clone.iterdir()) == sorted({*before, ".poemerge"})
    listed = subprocess.run(["git", "worktree", "list"], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1


def test_a_difference_is_measured_and_named(origin: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "again"
    shutil.copytree(origin.merged, folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    tensors[name][3, 4] += 1e-5 * tensors[name].abs().max()
    rewrite(folder / "model.safetensors", tensors)
    record = json.loads((folder / "merge.json").read_text())
    (folder / "merge.json").unlink()
    (folder / "merge.json").write_text(json.dumps({**record, "digest": "0" * 64}))
    document = {"digest": record["digest"], "device": "cpu", "versions": {}}
    version = Version("tiny", "1", "", None, (), 0, {})
    monkeypatch.setattr("poemerge.registry.replay.model_folder", lambda _version: origin.merged)
    libraries = "poemerge.registry.replay.library_versions"
    monkeypatch.setattr(libraries, dict)
    same = compare(origin, Recipe(version, document, folder), folder)
    assert not same.identical
    assert same.tensor == name
    assert same.relative == pytest.approx(1e-5, rel=0.02)
    assert same.changed == {}
    assert not same.reproduced, "the same device and libraries must give the same bytes"
    monkeypatch.setattr(libraries, lambda: {"torch": "9"})
    other = compare(origin, Recipe(version, document, folder), folder)
    assert other.changed == {"torch": (None, "9")}
    assert other.reproduced


def test_code_that_this_clone_lacks_is_told(
    origin: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(origin.root / name, other)
    git("init", "-q", cwd=other)
    git("add", "-A", cwd=other)
    git("commit", "-q", "-m", "another history", cwd=other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{origin.mlflow_db}")
    monkeypatch.chdir(other)
    assert main(["replay", "1"]) == 2
    assert "The code of this version is not in this clone" in capsys.readouterr().err
