"""What is removed, and that nothing needed ever is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from poemerge.cli.gc import cache_files
from poemerge.cli.main import main
from poemerge.project import Project
from poemerge.registry.evidence import model_folder
from poemerge.registry.gc import plan
from poemerge.registry.journal import Journal
from poemerge.registry.promotion import request_approval
from poemerge.registry.record import record
from poemerge.registry.tracking import connect
from poemerge.registry.versions import find_version, list_versions
from tasks.register import register
from tests.registry_project import copied, merge_and_score


def put(cache: Path, digest: str, content: str) -> Path:
    path = cache / digest[:2] / digest[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def lock(*digests: str) -> str:
    outs = "".join(f"    - path: p{n}\n      hash: md5\n      md5: {digest}\n" for n, digest in enumerate(digests))
    return f"schema: '2.0'\nstages:\n  merge:\n    cmd: x\n    outs:\n{outs}"


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Five versions: 1 is champion, 5 is candidate, each with its own DVC cache entry beside a shared one."""
    project = copied(tmp_path_factory.mktemp("gc") / "project")
    cache = project.root / ".dvc" / "cache" / "files" / "md5"
    put(cache, "aa" * 16, "an expert of all versions")
    for number in range(1, 6):
        own = f"{number}" * 32
        put(cache, f"{number}{'0' * 31}", f"shard of {number}")
        put(cache, own + ".dir", json.dumps([{"md5": f"{number}{'0' * 31}", "relpath": "model.safetensors"}]))
        project.dvc_lock.unlink()
        project.dvc_lock.write_text(lock("aa" * 16, own + ".dir"))
        merge_and_score(project, noise=0.0 if number == 1 else 0.3, seed=number)
        if number == 1:
            register(project, project.load_params())
        else:
            record(connect(project), project, project.load_params())
    return project


def numbers(project: Project) -> list[str]:
    return [version.version for version in list_versions(connect(project), "tiny")]


def test_nothing_goes_while_it_cannot_be_read_what_stays_needs(
    versions: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(versions)
    monkeypatch.chdir(versions.root)
    locks = {}
    for number in "24":
        artifacts = client.get_run(find_version(client, "tiny", number).run_id).info.artifact_uri
        locks[number] = Path(artifacts.removeprefix("file://")) / "project" / "dvc.lock"
    stays, goes = locks["4"], locks["2"]
    kept = stays.read_text()
    stays.unlink()
    assert main(["gc", "--keep", "2"]) == 1
    told = capsys.readouterr()
    assert "What version 4 needs cannot be read" in told.err
    assert "removed" not in told.out
    assert numbers(versions) == ["5", "4", "3", "2", "1"]
    cache = versions.root / ".dvc" / "cache" / "files" / "md5"
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 11

    stays.write_text(kept)
    gone = goes.read_text()
    goes.unlink()
    assert plan(versions, 2).locks["2"] == "", "it goes, and what it shares with nothing stays in the cache"
    goes.write_text(gone)


@pytest.mark.parametrize("harm", [Path.unlink, lambda entry: entry.write_text('[{"md5": "4')])
def test_no_cache_file_goes_while_a_version_that_stays_may_need_it(
    versions: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], Any]
) -> None:
    """Which files a folder holds is known by its entry alone: without it, what others list may be its files too."""
    monkeypatch.chdir(versions.root)
    entry = versions.root / ".dvc" / "cache" / "files" / "md5" / "44" / ("4" * 30 + ".dir")
    listed = entry.read_text()
    harm(entry)
    try:
        assert main(["gc", "--keep", "2", "--dry-run"]) == 0
    finally:
        entry.write_text(listed)
    told = capsys.readouterr().out
    assert "would remove 2 versions: 3" in told
    assert "would remove 0 cache files" in told
    assert "every cache file stays" in told
    assert "  version 4: p1\n" in told
    assert "version 5" not in told
    assert main(["gc", "--keep", "2", "--dry-run"]) == 0
    assert "would remove 4 cache files" in capsys.readouterr().out


def test_old_candidates_go_with_what_only_they_need(
    versions: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(versions)
    monkeypatch.chdir(versions.root)
    request_approval(versions, "3", "ticket", by="ann", reason="")
    what = plan(versions, 2)
    assert [version.version for version in what.gone] == ["2"], "4 and 5 are new, 1 is champion, 3 waits for approval"
    (gone,) = what.gone
    folder = model_folder(gone)
    assert main(["gc", "--keep", "2", "--dry-run"]) == 0
    assert "would remove 1 version: 2" in capsys.readouterr().out
    assert numbers(versions) == ["5", "4", "3", "2", "1"]
    assert folder.is_dir()

    assert main(["gc", "--keep", "2"]) == 0
    out = capsys.readouterr().out
    assert "removed 1 version: 2" in out
    assert "removed 2 cache files" in out
    assert numbers(versions) == ["5", "4", "3", "1"]
    assert not folder.exists()
    assert client.get_run(gone.run_id).info.lifecycle_stage == "deleted"
    with pytest.raises(MlflowException):
        client.get_model_version("tiny", "2")
    cache = versions.root / ".dvc" / "cache" / "files" / "md5"
    left = {path.parent.name + path.name for path in cache.rglob("*") if path.is_file()}
    assert left == {"aa" * 16} | {f"{n}{'0' * 31}" for n in "1345"} | {f"{n}" * 32 + ".dir" for n in "1345"}
    for version in list_versions(client, "tiny"):
        assert (model_folder(version) / "model.safetensors").is_file()

    # What it was made of is still known, and said to be gone.
    assert main(["lineage", "--recall", "b-2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["version"], row["removed"]) for row in rows] == [
        *((number, False) for number in (5, 4, 3, 1)),
        (2, True),
    ]
    assert main(["lineage", "--recall", gone.digest[:20]]) == 0
    assert "no version" in capsys.readouterr().out, "a recall is of inputs"
    assert [(row.action, row.version, row.facts) for row in Journal.open(client, versions, "tiny").lines()][-1] == (
        "removed",
        "2",
        {"digest": gone.digest},
    )

    assert main(["gc", "--keep", "2"]) == 0
    assert "removed 0 versions\n" in capsys.readouterr().out


def test_cache_files_of_a_lock(tmp_path: Path) -> None:
    folder, member, gone = "b" * 32 + ".dir", "c" * 32, "d" * 32 + ".dir"
    put(tmp_path, folder, json.dumps([{"md5": member, "relpath": "x"}]))
    found = cache_files(tmp_path, [lock(folder, gone)])
    assert {path.parent.name + path.name for path in found} == {folder, member, gone}
    assert cache_files(tmp_path, ["outs:\n- md5: " + "e" * 32 + "\n  path: x\n"]) == {tmp_path / "ee" / ("e" * 30)}
