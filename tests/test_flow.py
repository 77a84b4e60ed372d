"""The whole pipeline on tiny real models: `poemerge run` against its own Prefect server, MLflow and DVC."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from typing import Any

import pytest
from pipeline import environment, make_finished_project, poemerge, read_params, write_params
from safetensors.torch import load_file
from tiny import make_full_expert

from poemerge.project import STAGES, Project

pytestmark = pytest.mark.server


def run(project: Project, *, status: int = 0) -> dict[str, str]:
    """`poemerge run`; returns what each stage did, as it said on its plain lines."""
    done = poemerge(project, "run")
    assert done.returncode == status, done.stderr
    lines = [line.split() for line in done.stderr.splitlines()]
    return {
        line[0]: line[1] for line in lines if line and line[0] in STAGES and line[1] in {"ran", "restored", "unchanged"}
    }


def everything(action: str) -> dict[str, str]:
    return dict.fromkeys(STAGES, action)


def digest(project: Project) -> str:
    found: str = json.loads(project.merge_json.read_text(encoding="utf-8"))["digest"]
    return found


def flow_runs(project: Project) -> list[tuple[str, str]]:
    """Name and state of each flow run that the project's Prefect server has recorded, oldest first."""
    with sqlite3.connect(f"file:{project.prefect_home / 'prefect.db'}?mode=ro", uri=True) as database:
        return database.execute("select name, state_type from flow_run order by start_time").fetchall()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project after its first run, shared by the tests below, which leave it as they found it."""
    return make_finished_project(tmp_path_factory.mktemp("flow") / "project")


def test_the_first_run_makes_what_a_project_has(merged: Project) -> None:
    assert set(json.loads(merged.stage_seconds.read_text(encoding="utf-8"))) == set(STAGES), "every stage ran"
    for path in (
        merged.sources_lock,
        merged.task_vectors_manifest,
        merged.tail_json,
        merged.residuals_png,
        merged.expert_json,
        merged.merge_json,
        merged.ledger,
        merged.evaluation_json,
        merged.registration_json,
        merged.report_html,
    ):
        assert path.stat().st_size > 0, path
    assert set(load_file(merged.merged / "model.safetensors")) >= {"embeddings.word_embeddings.weight"}
    registration = json.loads(merged.registration_json.read_text(encoding="utf-8"))
    assert sorted(registration["aliases"]) == ["candidate", "champion"]
    assert registration["digest"] == digest(merged)
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status"], cwd=merged.root, env=environment(), capture_output=True, text=True
    )
    assert "up to date" in status.stdout


def test_prefect_has_the_run_its_stages_their_logs_and_artifacts(merged: Project) -> None:
    assert flow_runs(merged)[0] == ("by hand", "COMPLETED")
    with sqlite3.connect(f"file:{merged.prefect_home / 'prefect.db'}?mode=ro", uri=True) as database:
        tasks = {name for (name,) in database.execute("select name from task_run where state_type = 'COMPLETED'")}
        keys = {key for (key,) in database.execute("select key from artifact")}
        logs = " ".join(message for (message,) in database.execute("select message from log"))
    assert set(STAGES) <= tasks
    assert {"merge", "evaluate", "register", "tail-figure"} <= keys
    assert "> python -m tasks merge" in logs


def test_nothing_to_do_is_found_and_nothing_is_done(merged: Project) -> None:
    before = digest(merged)
    assert run(merged) == everything("unchanged")
    plan = json.loads(poemerge(merged, "plan", "--json").stdout)
    assert plan["work"] is False
    assert digest(merged) == before


def test_a_setting_of_the_merge_runs_what_follows_and_is_restored_when_set_back(merged: Project) -> None:
    params, before = read_params(merged.root), digest(merged)
    changed = params | {"merge": params["merge"] | {"scale_factor": 0.9}}
    write_params(merged.root, changed)
    stages: list[dict[str, Any]] = json.loads(poemerge(merged, "plan", "--json").stdout)["stages"]
    planned = {stage["stage"]: stage for stage in stages if stage["work"] != "none"}
    assert list(planned) == ["merge", "evaluate", "register"]
    assert planned["merge"]["reasons"] == [{"kind": "parameter", "what": "merge.scale_factor: None → 0.9"}]
    assert run(merged) == everything("unchanged") | {"merge": "ran", "evaluate": "ran", "register": "ran"}
    assert digest(merged) != before
    write_params(merged.root, params)
    done = run(merged)
    assert done["merge"] == "restored"
    assert digest(merged) == before
    assert done["register"] == "ran", "a version must be registered, not restored"


def test_one_more_expert_is_fetched_beside_those_that_are_there(merged: Project) -> None:
    params = read_params(merged.root)
    make_full_expert(merged.root / "models" / "base", merged.root / "models" / "figs", seed=11)
    inode = (merged.expert("apples") / "model.safetensors").stat().st_ino
    write_params(merged.root, params | {"experts": params["experts"] | {"figs": {"source": "models/figs"}}})
    try:
        plan = json.loads(poemerge(merged, "plan", "--json").stdout)
        assert [change["name"] for change in plan["sources"]] == ["figs"]
        status = json.loads(poemerge(merged, "status", "--json").stdout)
        assert [change["name"] for change in status["landed"]] == ["figs"]
        assert "figs" not in status["merged"]["experts"]
        done = run(merged)
        assert done["fetch"] == done["merge"] == done["register"] == "ran"
        assert (merged.expert("apples") / "model.safetensors").stat().st_ino == inode, (
            "what was there was not fetched again"
        )
        status = json.loads(poemerge(merged, "status", "--json").stdout)
        assert "figs" in status["merged"]["experts"]
        assert status["landed"] == []
    finally:
        write_params(merged.root, params)


def test_a_stage_that_fails_is_told_by_run_and_by_status_and_taken_up_again(merged: Project) -> None:
    suite = merged.root / "suites" / "pears" / "test.jsonl"
    good = suite.read_text(encoding="utf-8")
    suite.write_text('{"text": "w01", "label": 99}\n', encoding="utf-8")
    done = poemerge(merged, "run")
    suite.write_text(good, encoding="utf-8")
    assert done.returncode in (1, 2)
    assert "pears" in done.stderr
    assert "Traceback" not in done.stderr
    status = json.loads(poemerge(merged, "status", "--json").stdout)
    assert [failure["stage"] for failure in status["failures"]] == ["evaluate"]
    assert flow_runs(merged)[-1] == ("by hand", "FAILED")
    run(merged)
    assert json.loads(poemerge(merged, "status", "--json").stdout)["failures"] == []
