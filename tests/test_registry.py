"""Registering: one run and one version a merge, the same bytes the same version, nothing half registered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from poemerge.cli.main import main
from poemerge.errors import BadInputError, RegistryError
from poemerge.project import Project
from poemerge.provenance import code_of, code_patch
from poemerge.registry.record import record
from poemerge.registry.tracking import connect, speaking, tracking_uri
from poemerge.registry.versions import find_version, list_versions
from poemerge.sources import resolve
from tasks.register import register
from tests.registry_project import copied, merge_and_score, rewrite


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return copied(tmp_path / "project")


def registration(project: Project) -> dict[str, object]:
    return dict(json.loads(project.registration_json.read_text()))


def test_the_first_merge_is_candidate_and_champion(project: Project) -> None:
    report = register(project, project.load_params())
    assert "first champion" in report.headline
    client = connect(project)
    (version,) = list_versions(client, "tiny")
    assert version.version == "1"
    assert version.aliases == ("candidate", "champion")
    written = registration(project)
    assert written["version"] == 1
    assert written["digest"] == version.digest == json.loads(project.merge_json.read_text())["digest"]
    assert written["promoted"] is True
    assert written["champion_before"] is None
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["poemerge.git.commit"] == code_of(project.root).commit
    assert run.data.tags["poemerge.git.dirty"] == "false"
    assert run.data.tags["poemerge.expert.a.revision"] == "a-1"
    assert run.data.params["merge.method"] == "mean"
    evaluation = json.loads(project.evaluation_json.read_text())
    assert run.data.metrics["mean.normalised"] == pytest.approx(evaluation["mean"]["normalised"])
    assert run.data.metrics["a.merged"] == pytest.approx(evaluation["suites"]["a"]["merged"])
    inputs = {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
    assert inputs == {name: evaluation["suites"][name]["data_digest"][:36] for name in ("a", "b")}
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{version.run_id}'")
    assert {child.data.tags["mlflow.runName"] for child in children} == {"suite a", "suite b", "baseline mean"}
    assert {item.path for item in client.list_artifacts(version.run_id)} >= {
        "lineage.json",
        "evidence.json",
        "gates.json",
        "project",
        "merge",
        "evaluation",
        "predictions",
        "report",
    }


def test_the_same_bytes_are_the_same_version_and_the_alias_moves_back(project: Project) -> None:
    client = connect(project)
    params = project.load_params()
    first, created = record(client, project, params)
    assert created
    merge_and_score(project, noise=0.01)
    second, created = record(client, project, params)
    assert created
    assert (second.version, second.aliases) == ("2", ("candidate",))
    merge_and_score(project)
    again, created = record(client, project, params)
    assert not created
    assert again.version == first.version
    assert again.digest == first.digest
    assert again.aliases == ("candidate",)
    assert len(list_versions(client, "tiny")) == 2


def test_a_skipped_expert_is_told_by_the_version_until_it_can_be_had_again(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps its last good revision, so the bytes, and with them the version, are those of before."""
    client = connect(project)
    params = project.load_params()
    assert record(client, project, params)[0].skipped == {}
    report = project.stage_report("fetch")
    report.parent.mkdir(parents=True, exist_ok=True)
    kept = {"what": "expert", "name": "a", "revision": "a-1", "state": "kept", "reason": ""}
    bad = {"what": "expert", "name": "b", "revision": "b-2", "state": "skipped", "reason": "b-3: got NaN " + "x" * 9000}

    def fetched(*rows: dict[str, str]) -> None:
        report.write_text(json.dumps({"headline": "", "table": rows, "figure": None, "warnings": []}))

    fetched(kept, bad)
    version, created = record(client, project, params)
    assert (version.version, created) == ("1", False)
    assert version.skipped == {"b": {"keeps": "b-2", "reason": bad["reason"][:1000]}}
    monkeypatch.chdir(project.root)
    assert main(["models"]) == 0
    told = capsys.readouterr().out
    assert "2, 1 skipped" in told
    assert "version 1, expert b skipped, keeps b-2: b-3: got NaN" in told
    assert main(["lineage", "1"]) == 0
    assert "skipped b, keeps b-2: b-3: got NaN" in capsys.readouterr().out

    fetched(kept, {**bad, "state": "fetched", "reason": ""})
    assert record(client, project, params)[0].skipped == {}


def test_a_half_merged_folder_is_refused_before_anything_is_written(project: Project) -> None:
    client = connect(project)
    project.ledger.unlink()
    (project.merged / "model-2.safetensors.partial").write_bytes(b"x")
    with pytest.raises(RegistryError, match=r"ledger\.jsonl"):
        record(client, project, project.load_params())
    assert list_versions(client, "tiny") == []
    assert client.search_experiments(filter_string="name LIKE 'poemerge%'") == []


def test_a_failure_while_logging_leaves_no_version(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect(project)
    project.mlflow_artifacts.mkdir(parents=True)
    monkeypatch.setattr("poemerge.registry.record.MODEL_CODE", project.root / "absent.py")
    with pytest.raises(FileNotFoundError):
        record(client, project, project.load_params())
    assert list_versions(client, "tiny") == []
    runs = client.search_runs([client.get_experiment_by_name("poemerge").experiment_id])
    assert {run.info.status for run in runs if run.data.tags["poemerge.kind"] == "merge"} == {"FAILED"}
    monkeypatch.undo()
    version, created = record(client, project, project.load_params())
    assert created
    assert version.version == "1"


def test_another_head_on_the_same_weights_is_another_version(project: Project) -> None:
    client = connect(project)
    first, _ = record(client, project, project.load_params())
    head = project.merged / "heads" / "a.safetensors"
    rewrite(head, {"head.weight": load_file(head)["head.weight"] * 2})
    second, created = record(client, project, project.load_params())
    assert created
    assert (first.version, second.version) == ("1", "2")
    assert first.digest == second.digest


def test_two_that_register_the_same_digest_end_with_one_version(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks before the first has written, then finds that it was not first."""
    client = connect(project)
    params = project.load_params()
    seen: list[str] = []

    def blind(_client: MlflowClient, _model: str, identity: str) -> None:
        seen.append(identity)

    monkeypatch.setattr("poemerge.registry.record.with_identity", blind)
    first, _ = record(client, project, params)
    second, _ = record(client, project, params)
    assert len(seen) == 2
    assert first.version == second.version == "1"
    assert [version.version for version in list_versions(client, "tiny")] == ["1"]


def test_a_version_that_mlflow_was_asked_for_twice_is_there_once_with_its_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client sends a request again whose answer was lost, though the server may have done what it asked."""
    create = MlflowClient.create_model_version

    def sent_again(client: MlflowClient, *args: Any, **settings: Any) -> Any:
        create(client, *args, **settings)
        return create(client, *args, **settings)

    monkeypatch.setattr(MlflowClient, "create_model_version", sent_again)
    client = connect(project)
    version, created = record(client, project, project.load_params())
    assert created
    assert [(each.version, each.aliases) for each in list_versions(client, "tiny")] == [("1", ("candidate",))]
    run = client.get_run(version.run_id).info
    assert (run.status, run.lifecycle_stage) == ("FINISHED", "active")


def test_versions_are_found_by_number_alias_and_digest(project: Project) -> None:
    client = connect(project)
    version, _ = record(client, project, project.load_params())
    for wanted in ("1", "v1", "candidate", version.digest[:10], version.digest):
        assert find_version(client, "tiny", wanted).version == "1"
    with pytest.raises(RegistryError, match=r"champion[\s\S]*expected: one of 1 \(candidate\)"):
        find_version(client, "tiny", "champion")


def test_code_that_differs_from_its_commit_is_told(project: Project) -> None:
    assert not code_of(project.root).dirty
    project.params_yaml.write_text(project.params_yaml.read_text() + "# a remark\n")
    assert not code_of(project.root).dirty, "params.yaml is recorded whole"
    (project.root / "dvc.yaml").write_text("stages: {}\n# changed\n")
    (project.root / "new.py").write_text("x = 1\n")
    assert code_of(project.root).changed == ("dvc.yaml", "new.py")
    assert "# changed" in code_patch(project.root)
    assert "a remark" not in code_patch(project.root)


def test_a_copied_checkout_does_not_write_into_the_registry_of_the_original(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(connect(project), project, project.load_params())
    copy = Project(tmp_path / "copy of it")
    shutil.copytree(project.root, copy.root, symlinks=True)
    with pytest.raises(RegistryError, match=r"got: .*/project/\.poemerge[\s\S]*expected: .*/copy of it/\.poemerge"):
        register(copy, copy.load_params())
    monkeypatch.chdir(copy.root)
    for server in ("prefect_server", "mlflow_server"):
        monkeypatch.setattr(f"poemerge.servers.{server}", lambda *_, **__: pytest.fail("it was started"))
    for command in ("models", "ui"):
        assert main([command]) == 1
        assert "rm -r .poemerge/mlflow" in capsys.readouterr().err
    copy.params_yaml.write_text(
        "base: {source: data/base}\nexperts: {a: {source: data/experts/a}, own: {source: models:/tiny/1}}\n"
        "collections: {all: {source: models:/other*}}\n"
    )
    with pytest.raises(BadInputError) as caught:
        resolve(copy, copy.load_params())
    told = [(problem.where, problem.got, problem.next_step) for problem in caught.value.problems]
    assert [where for where, _, _ in told] == ["params.yaml collections.all.source", "params.yaml experts.own.source"]
    assert all("/project/.poemerge" in got and "rm -r .poemerge/mlflow" in then for _, got, then in told)

    # Another copy, for this process holds the removed database of the first one open.
    copy = Project(tmp_path / "copy without it")
    shutil.copytree(project.root, copy.root, symlinks=True, ignore=shutil.ignore_patterns("mlflow"))
    version, created = record(connect(copy), copy, copy.load_params())
    assert created
    assert connect(copy).get_run(version.run_id).info.artifact_uri.startswith(copy.mlflow_artifacts.as_uri())

    # A server of the team's has places of its own, whichever checkout asks.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(project))
    assert [item.version for item in list_versions(connect(copy), "tiny")] == ["1"]


def test_a_moved_checkout_works_again_when_it_is_moved_back_or_the_old_place_links_to_it(
    project: Project, tmp_path: Path
) -> None:
    record(connect(project), project, project.load_params())
    moved = Project(project.root.rename(tmp_path / "moved"))
    with pytest.raises(RegistryError, match="was moved, move it back"):
        connect(moved)
    project.root.symlink_to(moved.root)
    assert [item.version for item in list_versions(connect(moved), "tiny")] == ["1"]
    project.root.unlink()
    moved.root.rename(project.root)
    connect(project)


def test_the_registry_is_where_it_is_said_to_be(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(project) == f"sqlite:///{project.root}/.poemerge/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = connect(project)
    with (
        pytest.raises(RegistryError, match=r"expected: an answer from http://127\.0\.0\.1:9"),
        speaking(tracking_uri(project)),
    ):
        list_versions(client, "tiny")
