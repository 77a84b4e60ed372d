"""Approval: a flow run that waits without a process and survives the Prefect server; who may answer, and until when."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import flows
import tasks
from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.registry.journal import Journal
from poemerge.registry.promotion import ask, decide, expire, find_request, open_requests, request_approval
from poemerge.registry.tracking import connect
from poemerge.registry.versions import CHAMPION, alias_version
from tasks.register import register
from tests.registry_project import copied, write_params

APPROVAL = {"approval": "required", "two_person": True}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Version 1 is registered and no champion: it waits for approval."""
    project = copied(tmp_path / "project", APPROVAL)
    report = register(project, project.load_params())
    assert "passed every gate, and its promotion needed approval" in report.headline
    return project


def champion(project: Project) -> str | None:
    return alias_version(connect(project), "tiny", CHAMPION)


def command(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return subprocess.run(
        [sys.executable, "-m", "poemerge", *arguments],
        cwd=project.root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.server
def test_a_promotion_waits_over_a_restart_of_the_server_until_a_second_person_approves(project: Project) -> None:
    """Each command starts a Prefect server of its own on the project's database, and ends it."""
    for package in (flows, tasks):
        shutil.copytree(
            Path(package.__path__[0]),
            project.root / package.__name__,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    asked = command(project, "promote", "1", "--by", "ann", "--reason", "the first")
    assert asked.returncode == 0, asked.stderr
    assert "version 1 passed every gate and waits for approval" in asked.stdout
    assert champion(project) is None
    (waiting,) = open_requests(project)
    assert (waiting.version, waiting.by, waiting.reason) == ("1", "ann", "the first")

    own = command(project, "approve", "1", "--by", "ann")
    assert own.returncode == 1
    assert "must be approved by somebody else" in own.stderr
    assert champion(project) is None

    approved = command(project, "approve", "1", "--by", "bob", "--reason", "checked")
    assert approved.returncode == 0, approved.stderr
    assert "version 1 is champion" in approved.stdout
    assert champion(project) == "1"
    journal = Journal.find(connect(project), "tiny")
    assert journal is not None
    told = [(line.action, line.by, line.reason) for line in journal.lines()]
    assert told == [
        ("requested", "ann", "the first"),
        ("approved", "bob", "checked"),
        ("claim", "ann", "the first"),
        ("promoted", "ann", "the first"),
    ]
    assert "finite" in journal.lines()[-1].facts["gates"]

    again = command(project, "approve", "1", "--by", "eve")
    assert again.returncode == 1
    assert "does not wait" in again.stderr


def test_a_request_is_made_once_and_answered_once(project: Project) -> None:
    assert ask(project, "candidate").needs_approval
    first = request_approval(project, "1", "run-1", by="ann", reason="r")
    assert request_approval(project, "1", "run-1", by="ann", reason="r") == first, "the flow starts again from the top"
    with pytest.raises(RegistryError, match="waits for approval already"):
        request_approval(project, "1", "run-2", by="cid", reason="r")
    with pytest.raises(RegistryError, match="somebody else"):
        decide(project, "run-1", approve=True, by="ann", reason="")
    assert decide(project, "run-1", approve=False, by="ann", reason="I was wrong") is False, "one may reject one's own"
    assert decide(project, "run-1", approve=True, by="bob", reason="") is False, "the answer stands"
    assert open_requests(project) == []
    answer = find_request(project, "1").answer
    assert answer is not None
    assert (answer.action, answer.by, answer.reason) == ("rejected", "ann", "I was wrong")
    request_approval(project, "1", "run-2", by="ann", reason="again")
    assert decide(project, "run-2", approve=True, by="bob", reason="")
    with pytest.raises(RegistryError, match="Nothing to answer"):
        find_request(project, "7")


def test_a_run_that_waited_goes_on_with_the_version_that_it_asked_for(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.promote as module

    asked = Mock(side_effect=RegistryError("far enough"))
    monkeypatch.setattr(module.promotion, "ask", asked)
    monkeypatch.setattr(module, "get_run_logger", Mock())
    monkeypatch.chdir(project.root)
    request_approval(project, "1", "run-1", by="ann", reason="r")
    for ticket, meant in (("run-1", "1"), ("run-2", "candidate")):
        monkeypatch.setattr(module, "flow_run", SimpleNamespace(id=ticket))
        with pytest.raises(RegistryError, match="far enough"):
            module.promote.fn(module.Promotion(version="candidate", by="ann"))
        assert asked.call_args.args[1] == meant


def test_an_answer_that_comes_too_late_does_not_count(project: Project) -> None:
    write_params(project, {"a": 1, "b": 2}, {**APPROVAL, "approval_hours": 1e-9})
    request_approval(project, "1", "run-1", by="ann", reason="r")
    with pytest.raises(RegistryError, match="has expired"):
        decide(project, "run-1", approve=True, by="bob", reason="")
    assert [request.ticket for request in expire(project)] == ["run-1"]
    assert open_requests(project) == []
    assert expire(project) == []
    with pytest.raises(RegistryError, match="has expired"):
        decide(project, "run-1", approve=True, by="bob", reason="")
    request_approval(project, "1", "run-2", by="ann", reason="asked again")
