"""From a version back to every input, from an input forward to every version; and the version as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from poemerge.cli.main import main
from poemerge.errors import BadInputError
from poemerge.project import Project
from poemerge.provenance import code_of, file_sha256
from poemerge.registry.export import export
from poemerge.registry.lineage import recall
from poemerge.registry.record import record
from poemerge.registry.tracking import connect
from tasks.register import register
from tests.hub_server import Hub
from tests.registry_project import copied, land, merge_and_score


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two versions: a at seed 1 and b at seed 2; then b retrained."""
    project = copied(tmp_path_factory.mktemp("lineage") / "project")
    project.expert_json.write_text('{"family": "cauchy", "reason": "heavier tails held out"}')
    register(project, project.load_params())
    land(project, "b", 7)
    merge_and_score(project)
    (project.root / "dvc.yaml").write_text("stages: {}\n# changed\n")
    record(connect(project), project, project.load_params())
    return project


def run(project: Project, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(project.root)
    return main(arguments)


def test_the_chain_names_every_input(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, monkeypatch, "lineage", "1", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["git"] == {"commit": code_of(project.root).commit, "dirty": False, "changed": []}
    assert document["dvc_lock_digest"] == file_sha256(project.dvc_lock)
    assert document["base"]["digest"] == json.loads((project.base / "source.json").read_text())["digest"]
    assert document["experts"]["b"]["revision"] == "b-2"
    assert len(document["experts"]["b"]["digest"]) == 64
    assert (
        document["suites"]["a"]["data_digest"]
        == json.loads(project.evaluation_json.read_text())["suites"]["a"]["data_digest"]
    )
    assert document["selected"]["reason"] == "heavier tails held out"
    assert document["device"] == "cpu"
    assert {"torch", "mlflow", "python"} <= set(document["versions"])
    assert [line["action"] for line in document["decisions"]] == ["claim", "promoted"]
    assert document["aliases"] == ["champion"]


def test_changed_code_is_told_and_kept(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, monkeypatch, "lineage", "candidate") == 0
    text = capsys.readouterr().out
    assert "changed: dvc.yaml" in text
    assert "expert b: elsewhere/b at b-7" in text
    client = connect(project)
    run_id = client.get_model_version_by_alias("tiny", "candidate").run_id
    patch = Path(client.download_artifacts(run_id, "project/code.patch", str(project.state)))
    assert "+# changed" in patch.read_text()


def test_the_graph_is_a_flowchart(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, monkeypatch, "lineage", "--graph") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "flowchart LR"
    assert '  e1["b<br/>elsewhere/b<br/>b-2"]' in lines
    assert {"  base --> merge", "  e0 --> merge", "  e1 --> merge", "  merge --> model"} <= set(lines)


@pytest.mark.parametrize(("wanted", "versions"), [("b-2", ["1"]), ("b-7", ["2"]), ("b", ["2", "1"]), ("b-9", [])])
def test_a_recall_finds_the_versions_that_hold_it(project: Project, wanted: str, versions: list[str]) -> None:
    assert [version.version for version, _ in recall(connect(project), "tiny", wanted)] == versions


def test_a_recall_by_digest(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = json.loads((project.expert("b") / "source.json").read_text())["digest"]
    assert run(project, monkeypatch, "lineage", "--recall", digest[:12], "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"version": 2, "aliases": ["candidate"], "removed": False, "holds": ["b"]}
    ]


def test_the_list_of_models(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project, monkeypatch, "models", "--json") == 0
    newest, first = json.loads(capsys.readouterr().out)
    assert (newest["version"], newest["aliases"]) == (2, ["candidate"])
    assert (first["version"], first["aliases"]) == (1, ["champion"])
    assert newest["digest"] == json.loads(project.merge_json.read_text())["digest"]
    assert newest["accuracy"] == pytest.approx(json.loads(project.evaluation_json.read_text())["mean"]["merged"])
    assert sorted(newest["experts"]) == ["a", "b"]


def test_export_to_a_hub_is_one_commit_of_the_whole_folder(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The hub of the tests speaks LFS. The client reads this once, when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert run(project, monkeypatch, "export", "1", "--out", "hf://acme/tiny") == 1
        assert "set HF_TOKEN" in capsys.readouterr().err
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        for number in ("1", "2", "1"):
            assert run(project, monkeypatch, "export", number, "--out", "hf://acme/tiny") == 0
        out = capsys.readouterr().out
        repository = hub.repositories["models", "acme/tiny"]
        empty, *commits = repository.commits.values()
        assert [commit.sha in out for commit in commits] == [True] * 3
        assert (empty.files, commits[0].files) == ({}, commits[2].files)
        assert {"config.json", "model.safetensors", "heads/a.safetensors", "lineage.json"} <= set(commits[1].files)
        assert commits[1].files["model.safetensors"] != commits[0].files["model.safetensors"]
        assert b"# acme/tiny" in commits[0].files["README.md"]

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
        assert run(project, monkeypatch, "export", "2", "--out", "hf://acme/tiny") == 1
        assert "HF_HUB_DISABLE_XET=1" in capsys.readouterr().err
        assert len(repository.commits) == 4


def test_export_is_a_folder_that_transformers_loads(project: Project, tmp_path: Path) -> None:
    from transformers import AutoModel

    out = tmp_path / "exported"
    version = export(project, "candidate", out)
    AutoModel.from_pretrained(out)
    card = (out / "README.md").read_text()
    assert version.digest in card
    assert "elsewhere/b" in card
    assert "## Evaluation" in card
    assert json.loads((out / "lineage.json").read_text())["version"] == 2
    assert (out / "heads" / "a.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    with pytest.raises(BadInputError, match="not empty"):
        export(project, "candidate", out)
