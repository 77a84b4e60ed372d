"""Moving the champion: only from where the gates saw it, one at a time, and never to something half done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.registry import champion as moves
from poemerge.registry.champion import ChampionChangedError, move, rollback, settle, withdrawn
from poemerge.registry.journal import Journal, JournalConflictError, Line
from poemerge.registry.tracking import connect
from poemerge.registry.versions import CHAMPION, PREVIOUS, alias_version, find_version
from tests.registry_project import fresh_registry

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
