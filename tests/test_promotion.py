"""Moving the champion: only from where the gates saw it, one at a time, and never to something half done."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from poemerge.cli import decisions
from poemerge.cli.main import main
from poemerge.cli.verdict import say_verdict
from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.registry import champion as moves
from poemerge.registry.champion import ChampionChangedError, move, rollback, settle, withdrawn
from poemerge.registry.gates import Gate
from poemerge.registry.journal import Journal, JournalConflictError, Line
from poemerge.registry.promotion import find_request, request_approval
from poemerge.registry.registration import Registration
from poemerge.registry.tracking import connect
from poemerge.registry.versions import CANDIDATE, CHAMPION, PREVIOUS, Version, alias_version, find_version
from poemerge.report.scores import lead
from tasks.register import _headline as stage_headline
from tests.registry_project import fresh_registry, write_params

MODEL = "tiny"


class Registry:
    """A registry with versions that hold nothing: moving an alias reads no weights."""

    def __init__(self, root: Path) -> None:
        self.project = Project(root)
        fresh_registry(self.project)
        self.client = connect(self.project)
        self.journal = Journal.open(self.client, self.project, MODEL)
        run = self.client.get_run(self.journal.run_id)
        for number in range(1, 6):
            self.client.create_model_version(MODEL, f"{root}/{number}", run_id=run.info.run_id)

    def promote(self, number: int, expected: int | None, **more: object) -> Line:
        target = find_version(self.client, MODEL, str(number))
        before = None if expected is None else str(expected)
        return move(self.client, self.journal, target, expected=before, **more)  # type: ignore[arg-type]

    def aliases(self) -> tuple[str | None, str | None]:
        return alias_version(self.client, MODEL, CHAMPION), alias_version(self.client, MODEL, PREVIOUS)

    def actions(self) -> list[tuple[str, str]]:
        return [(line.action, line.version) for line in self.journal.lines()]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


def test_promotions_keep_the_one_before_and_rollback_walks_back(registry: Registry) -> None:
    registry.promote(1, None)
    assert registry.aliases() == ("1", None)
    registry.promote(2, 1, reason="better", by="ann")
    registry.promote(3, 2)
    assert registry.aliases() == ("3", "2")
    line, version = rollback(registry.client, registry.journal, MODEL, reason="complaints", by="bob")
    assert (line.action, line.version, line.by, line.reason) == ("rolled_back", "2", "bob", "complaints")
    assert version.version == "2"
    assert registry.aliases() == ("2", "1")
    assert "complaints" in (withdrawn(registry.journal, "3") or "")
    assert withdrawn(registry.journal, "2") is None
    rollback(registry.client, registry.journal, MODEL, reason="again")
    assert registry.aliases() == ("1", None)
    with pytest.raises(RegistryError, match="no earlier champion"):
        rollback(registry.client, registry.journal, MODEL, reason="once more")
    registry.promote(3, 1)
    assert withdrawn(registry.journal, "3") is None, "promoted again by name"
    assert [line.action for line in registry.journal.lines()][::2] == ["claim"] * 6


def test_a_champion_that_changed_since_the_gates_is_not_replaced(registry: Registry) -> None:
    registry.promote(1, None)
    registry.promote(2, 1)
    with pytest.raises(ChampionChangedError, match="version 2"):
        registry.promote(3, 1)
    assert registry.aliases() == ("2", "1")


def test_an_alias_moved_by_hand_is_noticed(registry: Registry) -> None:
    registry.promote(1, None)
    registry.client.set_registered_model_alias(MODEL, CHAMPION, "4")
    with pytest.raises(ChampionChangedError, match="version 4"):
        registry.promote(2, 1)
    assert registry.aliases()[0] == "4"


def test_a_failure_after_the_move_takes_it_back(registry: Registry) -> None:
    registry.promote(1, None)
    registry.promote(2, 1)
    seen: list[tuple[str | None, str | None]] = []

    def fail() -> None:
        seen.append(registry.aliases())
        raise OSError("the artifact store is gone")

    with pytest.raises(OSError, match="artifact store"):
        registry.promote(3, 2, verify=fail)
    assert seen == [("3", "2")], "it had moved"
    assert registry.aliases() == ("2", "1")
    last = registry.journal.lines()[-1]
    assert last.action == "undone"
    assert "artifact store" in last.facts["error"]
    registry.promote(3, 2)
    assert registry.aliases() == ("3", "2")


def test_the_log_takes_a_line_once(registry: Registry) -> None:
    first = registry.journal.append(Line("requested", "1", "ann"), 0)
    with pytest.raises(JournalConflictError):
        registry.journal.append(Line("requested", "2", "bob"), 0)
    assert [line.by for line in registry.journal.lines()] == ["ann"]
    assert registry.journal.lines() == [first]
    registry.journal.add(Line("requested", "2", "bob", "x" * 20_000))
    assert registry.journal.lines()[1].reason == "x" * 1000


def test_the_log_is_made_once(registry: Registry) -> None:
    assert Journal.open(registry.client, registry.project, MODEL).run_id == registry.journal.run_id


# Processes that race and die. Each has its own connection; fork would share SQLite's, so they are spawned.


def _contend(root: str, number: int, rivals: int) -> None:
    """Promotes version `number` as soon as all `rivals` are ready; writes what came of it to a file."""
    registry = _attached(root)
    (Path(root) / f"{number}.ready").touch()
    deadline = time.monotonic() + 120
    while len(list(Path(root).glob("*.ready"))) < rivals and time.monotonic() < deadline:
        time.sleep(0.002)
    try:
        registry.promote(number, 1)
        told = "moved"
    except ChampionChangedError:
        told = "changed"
    (Path(root) / f"{number}.told").write_text(told)


def _die(root: str, after: str) -> None:
    """Promotes version 2 and is killed as kill -9 does, at the point named."""
    registry = _attached(root)

    def kill(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if after == "claim":
        moves._put_alias = kill  # type: ignore[assignment]
    elif after == "previous":
        MlflowClient.set_registered_model_alias = _kill_on(CHAMPION, kill)  # type: ignore[method-assign]
    registry.promote(2, 1, verify=kill)


def _kill_on(alias: str, kill: Callable[..., None]) -> Callable[..., None]:
    whole = MlflowClient.set_registered_model_alias

    def hooked(self: MlflowClient, name: str, given: str, version: str) -> None:
        if given == alias:
            kill()
        whole(self, name, given, version)

    return hooked


def _attached(root: str) -> Registry:
    registry = Registry.__new__(Registry)
    registry.project = Project(Path(root))
    registry.client = connect(registry.project)
    registry.journal = Journal.open(registry.client, registry.project, MODEL)
    return registry


def test_of_promotions_at_once_one_moves_and_the_others_are_told(registry: Registry) -> None:
    registry.promote(1, None)
    context = multiprocessing.get_context("spawn")
    root, numbers = registry.project.root, (2, 3, 4)
    workers = [context.Process(target=_contend, args=(str(root), number, len(numbers))) for number in numbers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    told = {number: (root / f"{number}.told").read_text() for number in numbers}
    assert sorted(told.values()) == ["changed", "changed", "moved"]
    (winner,) = (number for number, result in told.items() if result == "moved")
    assert registry.aliases() == (str(winner), "1")
    assert [action for action, _ in registry.actions()].count("promoted") == 2


@pytest.mark.parametrize(
    ("after", "champion", "closing"),
    [("claim", "1", "undone"), ("previous", "1", "undone"), ("champion", "2", "promoted")],
)
def test_kill_9_leaves_one_champion_and_the_next_command_closes_the_claim(
    registry: Registry, after: str, champion: str, closing: str
) -> None:
    registry.promote(1, None)
    worker = multiprocessing.get_context("spawn").Process(target=_die, args=(str(registry.project.root), after))
    worker.start()
    worker.join(300)
    assert worker.exitcode == -signal.SIGKILL
    assert registry.aliases()[0] == champion, "the champion is whole at every moment"
    assert registry.actions()[-1] == ("claim", "2")
    settle(registry.client, registry.journal, MODEL, lease=0.0)
    assert registry.actions()[-1] == (closing, "2")
    assert registry.aliases() == (champion, None if champion == "1" else "1")
    registry.promote(3, int(champion))
    assert registry.aliases() == ("3", champion)


def test_who_was_taken_over_does_not_undo_the_successor(registry: Registry) -> None:
    """A claim open longer than its lease is closed by another, who promotes; its owner wakes up and finds that out."""
    registry.promote(1, None)

    def taken_over() -> None:
        settle(registry.client, registry.journal, MODEL, lease=0.0)
        registry.client.set_registered_model_alias(MODEL, CHAMPION, "1")
        other = _attached(str(registry.project.root))
        other.promote(3, 1, lease=0.0)

    with pytest.raises(ChampionChangedError, match="taken over"):
        registry.promote(2, 1, verify=taken_over)
    assert registry.aliases() == ("3", "1")


def test_an_open_claim_is_waited_for(registry: Registry) -> None:
    registry.promote(1, None)
    last = registry.journal.lines()[-1].number
    claim = registry.journal.append(Line("claim", "2", "ann", champion="1", facts={"action": "promoted"}), last)
    began = time.monotonic()
    with pytest.raises(ChampionChangedError):
        registry.promote(3, 2, lease=1.0)
    assert time.monotonic() - began > 0.5
    assert registry.actions()[-1] == ("undone", "2")
    assert claim.number == last + 1
    assert replace(claim, number=0) != claim


# What people are told, and by which names they may ask.


@pytest.fixture
def checkout(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry of a project that is the working directory."""
    write_params(registry.project, {"a": 1}, {"model": MODEL, "approval": "required"})
    registry.project.dvc_yaml.write_text("stages: {}\n")
    monkeypatch.chdir(registry.project.root)
    return registry


def registered(project: Project, version: int, before: int, *, promoted: bool) -> None:
    """What the stages leave of a merge that was registered as `version` while `before` was champion."""
    registration = {"model": MODEL, "version": version, "digest": "", "run_id": "r", "gates": [], "promoted": promoted,
                    "aliases": ["champion"] if promoted else [], "champion_before": before}  # fmt: skip
    for path, content in (
        (project.registration_json, registration),
        (project.merge_json, {"digest": "", "method": "poe", "experts": {}}),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def verdict(project: Project) -> str:
    stream = io.StringIO()
    say_verdict(project, Console(file=stream, width=300))
    return stream.getvalue()


def status(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["merged"]["registered"]
    return {key: told[key] for key in ("version", "aliases", "champion")}


def test_after_a_rollback_and_an_approval_the_champion_is_who_the_registry_says(
    checkout: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.promote(1, None)
    checkout.promote(2, 1)
    registered(checkout.project, 2, 1, promoted=True)
    assert "Version 2 is champion; it was 1." in verdict(checkout.project)
    assert status(capsys) == {"version": 2, "aliases": ["champion"], "champion": 2}

    rollback(checkout.client, checkout.journal, MODEL, reason="complaints")
    told = verdict(checkout.project)
    assert "version 2 (no alias)" in told
    assert "Version 2 is champion no longer; version 1 is champion." in told
    assert status(capsys) == {"version": 2, "aliases": [], "champion": 1}
    assert main(["status"]) == 0
    assert "Champion     version 1\n" in capsys.readouterr().out

    registered(checkout.project, 3, 1, promoted=False)
    assert "Version 3 is a candidate; version 1 stays champion." in verdict(checkout.project)
    checkout.promote(3, 1)
    assert "Version 3 is champion; it was 1." in verdict(checkout.project)
    assert status(capsys) == {"version": 3, "aliases": ["champion"], "champion": 3}


@pytest.mark.parametrize(
    ("promoted", "before", "approval", "headline", "page"),
    [
        (True, None, False, "became the first champion", "became champion"),
        (True, "1", False, "became champion in place of version 1", "became champion, in place of version 1"),
        (False, "2", False, "was champion already", "stayed champion"),
        (False, "1", True, "passed every gate, and its promotion needed approval", None),
        (False, "1", False, "was not promoted, mean failed; version 1 stayed champion",
         "was not promoted; version 1 stayed champion"),
        (False, None, False, "was not promoted, mean failed; no champion", "was not promoted; there was no champion"),
    ],
)  # fmt: skip
def test_what_is_stored_of_a_registration_is_not_made_untrue_by_a_later_move(
    promoted: bool, before: str | None, approval: bool, headline: str, page: str | None
) -> None:
    """A stage that is up to date repeats its headline, and the page is written from what registering led to."""
    aliases = (CANDIDATE, CHAMPION) if promoted or before == "2" else (CANDIDATE,)
    gates = () if promoted or approval or before == "2" else (Gate("mean", "fail", {}, "it is behind"),)
    version = Version(MODEL, "2", "r", None, aliases, 0, {})
    registration = Registration(version, True, gates, promoted, before, approval)
    assert stage_headline(registration) == f"tiny version 2 {headline}"
    assert f"Version 2 {page or headline}</p>" in str(lead(None, registration.to_json(), "poe"))


def test_where_the_registry_does_not_answer_the_last_registration_is_told_as_such(
    checkout: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.promote(1, None)
    registered(checkout.project, 2, 1, promoted=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told = verdict(checkout.project)
    assert "Version 2 is champion; it was 1." in told
    assert "Registry: Not asked, so all this is as it was when it was registered." in told
    assert main(["status"]) == 0
    assert "Registry     Not asked" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.chdir(checkout.project.root)
    registered(checkout.project, 9, 1, promoted=True)
    assert "Version 9 is champion no longer; version 1 is champion." in verdict(checkout.project)
    assert "has no version 9" in verdict(checkout.project)


def test_a_request_is_found_by_the_alias_and_the_digest_of_its_version(checkout: Registry) -> None:
    checkout.client.set_registered_model_alias(MODEL, CANDIDATE, "3")
    checkout.client.set_model_version_tag(MODEL, "3", "poemerge.digest", "abcdef0123456789")
    checkout.client.set_registered_model_alias(MODEL, PREVIOUS, "2")
    asked = request_approval(checkout.project, "3", "ticket-3", by="ann", reason="")
    for wanted in ("3", "v3", "ticket-3", "candidate", "abcdef01"):
        assert find_request(checkout.project, wanted) == asked
    with pytest.raises(RegistryError, match="got:      previous, version 2\n"):
        find_request(checkout.project, "previous")
    checkout.client.delete_model_version(MODEL, "3")
    assert find_request(checkout.project, "3") == asked, "its version is gone, the request is not"


def test_promote_and_approve_by_alias_name_the_number(
    checkout: Registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.client.set_registered_model_alias(MODEL, CANDIDATE, "3")
    asked: list[str] = []

    def ask(project: Project, version: str, *, by: str, reason: str) -> None:
        asked.append(version)
        request_approval(project, version, "ticket-3", by=by, reason=reason)

    def answer(_project: Project, wanted: str, *, approve: bool, by: str, reason: str) -> dict[str, str]:
        asked.append(f"{wanted} {approve} {by} {reason}")
        return {"champion_before": "1"}

    monkeypatch.setattr(decisions, "promote", ask)
    monkeypatch.setattr(decisions, "answer", answer)
    assert main(["promote", "candidate", "--by", "ann"]) == 0
    assert capsys.readouterr().out == "version 3 passed every gate and waits for approval: poemerge approve 3\n"
    assert main(["approve", "candidate", "--by", "bob", "--reason", "good"]) == 0
    assert capsys.readouterr().out == "version 3 is champion in place of version 1\n"
    assert main(["reject", "candidate", "--by", "bob", "--reason", "bad"]) == 0
    assert capsys.readouterr().out == "version 3 is rejected; the champion stays\n"
    assert asked == ["3", "ticket-3 True bob good", "ticket-3 False bob bad"]
    assert main(["promote", "champion"]) == 1
    assert "No such version" in capsys.readouterr().err
