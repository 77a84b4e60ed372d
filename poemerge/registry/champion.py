"""Moving the champion: one at a time, only from where the gates saw it, undone when anything fails on the way.

The log of decisions decides: who writes the line `claim` may move the aliases and closes the claim with `promoted`,
`rolled_back` or `undone`. Aliases are moved `previous` first, `champion` last, so the champion is a complete, gated
version at every moment. A claim that nobody closes (its owner was killed) is closed by whoever comes next, by what
the alias says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from poemerge.errors import RegistryError
from poemerge.registry.gates import Gate
from poemerge.registry.journal import Action, Journal, JournalConflictError, Line, whoami
from poemerge.registry.versions import CHAMPION, PREVIOUS, Version, alias_version, find_version

__all__ = ["ChampionChangedError", "move", "rollback", "settle", "withdrawn"]

LEASE = 60.0
"""Seconds after which a claim that is still open counts as left behind: moving two aliases takes well under one."""


class ChampionChangedError(RegistryError):
    """The champion is not the one that the gates compared with: they must run again."""


def move(
    client: MlflowClient,
    journal: Journal,
    version: Version,
    *,
    expected: str | None,
    gates: Sequence[Gate] = (),
    reason: str = "",
    by: str | None = None,
    facts: dict[str, Any] | None = None,
    verify: Callable[[], None] | None = None,
    lease: float = LEASE,
) -> Line:
    """Makes `version` the champion, and the champion before it `previous`; returns the line `promoted` of the log.

    Arguments: `expected`, the version that was champion when the gates ran (None: there was none); `gates`, whose
    verdicts are recorded; `verify`, called after the move, whose failure undoes it; `lease`, seconds for which
    another's open claim holds.
    Raises ChampionChangedError when the champion is another one by now, whatever `verify` raised after undoing the
    move, and RegistryError.
    """
    told = {**(facts or {}), "gates": {gate.name: f"{gate.verdict}: {gate.reason}" for gate in gates}}
    before = alias_version(client, version.model, PREVIOUS)
    return _act(client, journal, version, "promoted", expected, expected or before, reason, by, told, verify, lease)


def rollback(
    client: MlflowClient, journal: Journal, model: str, *, reason: str, by: str | None = None, lease: float = LEASE
) -> tuple[Line, Version]:
    """Restores `previous` as champion at once; returns the line of the log and the version that is champion now.

    The version that was champion counts as withdrawn: it is not promoted by itself again. `previous` becomes what was
    champion before the restored one, so that a second rollback goes one further back.
    Raises RegistryError when there is no previous champion.
    """
    champion, previous = alias_version(client, model, CHAMPION), alias_version(client, model, PREVIOUS)
    if previous is None or previous == champion:
        raise RegistryError(
            f"{model} has no earlier champion to go back to.\n  got:      champion {champion or '(none)'}, no other "
            "`previous`\n  expected: a version that was champion before\n"
            "  next:     `poemerge promote VERSION` makes another one champion"
        )
    target = find_version(client, model, previous)
    before = _champion_before(journal, previous)
    facts = {"withdrawn": champion}
    line = _act(client, journal, target, "rolled_back", champion, before, reason, by, facts, None, lease)
    return line, find_version(client, model, previous)


def withdrawn(journal: Journal, version: str) -> str | None:
    """Why `version` was rolled back when it last was champion, or None when it was not, or was promoted again since."""
    why: str | None = None
    for line in journal.lines():
        if line.action == "rolled_back" and line.facts.get("withdrawn") == version:
            why = f"{line.by}, {line.at[:16]}: {line.reason or 'no reason given'}"
        elif line.action in ("promoted", "rolled_back") and line.version == version:
            why = None
    return why


def settle(client: MlflowClient, journal: Journal, model: str, lease: float = LEASE) -> int:
    """Waits for an open claim, or closes it when its owner is gone; returns the number of the last line (0: none)."""
    while True:
        lines = journal.lines()
        claim = _open_claim(lines)
        if claim is None:
            return lines[-1].number if lines else 0
        if claim.age < lease:
            time.sleep(min(0.2, lease))
            continue
        intended: Action = claim.facts["action"]
        if alias_version(client, model, CHAMPION) == claim.version:
            closing = _closing(claim, intended, {"recovered": "the process that moved it ended before it could say so"})
        else:
            _put_alias(client, model, PREVIOUS, claim.previous)
            closing = _closing(
                claim, "undone", {"recovered": "the process that claimed the move ended before it moved"}
            )
        try:
            return journal.append(closing, lines[-1].number).number
        except JournalConflictError:
            continue


def _act(
    client: MlflowClient,
    journal: Journal,
    version: Version,
    action: Action,
    expected: str | None,
    new_previous: str | None,
    reason: str,
    by: str | None,
    facts: dict[str, Any],
    verify: Callable[[], None] | None,
    lease: float,
) -> Line:
    """The claim, the move of both aliases, the closing line."""
    model = version.model
    while True:
        last = settle(client, journal, model, lease)
        _expect(client, model, expected)
        claim = Line(
            "claim",
            version.version,
            by or whoami(),
            reason,
            champion=expected,
            previous=alias_version(client, model, PREVIOUS),
            facts={"action": action},
        )
        try:
            claim = journal.append(claim, last)
            break
        except JournalConflictError:
            # Somebody else wrote a line meanwhile: look again whether the champion is still the same.
            continue
    try:
        # Somebody may have moved the alias by hand, past the log.
        _expect(client, model, expected)
        if version.version != expected:
            _put_alias(client, model, PREVIOUS, new_previous if new_previous != version.version else None)
            client.set_registered_model_alias(model, CHAMPION, version.version)
        _expect(client, model, version.version)
        if verify is not None:
            verify()
        return _close(journal, claim, action, facts)
    except BaseException as error:
        _undo(client, journal, model, claim, error)
        raise


def _close(journal: Journal, claim: Line, action: Action, facts: dict[str, Any]) -> Line:
    """Writes the closing line of `claim`. Raises ChampionChangedError when somebody else closed it: it was open too
    long.
    """
    while True:
        lines = journal.lines()
        if not _is_open(lines, claim):
            raise ChampionChangedError(
                _changed("the model", claim.champion, "the claim was taken over: it was open too long")
            )
        try:
            return journal.append(_closing(claim, action, facts), lines[-1].number)
        except JournalConflictError:
            continue


def _undo(client: MlflowClient, journal: Journal, model: str, claim: Line, error: BaseException) -> None:
    """Aliases as they were at the claim; unless the claim was taken from us, in which case they are the successor's."""
    lines = journal.lines()
    if _is_open(lines, claim):
        if alias_version(client, model, CHAMPION) == claim.version:
            _put_alias(client, model, CHAMPION, claim.champion)
        _put_alias(client, model, PREVIOUS, claim.previous)
        _close(journal, claim, "undone", {"error": f"{type(error).__name__}: {error}"[:1000]})
        return
    settled = [line for line in lines if line.action in ("promoted", "rolled_back")]
    if settled and settled[-1].number > claim.number:
        _put_alias(client, model, CHAMPION, settled[-1].version)


def _is_open(lines: Sequence[Line], claim: Line) -> bool:
    found = _open_claim(lines)
    return found is not None and found.token == claim.token


def _open_claim(lines: Sequence[Line]) -> Line | None:
    """The claim that nobody has closed, or None. Lines about approval may stand behind it."""
    for line in reversed(lines):
        if line.action in ("promoted", "rolled_back", "undone"):
            return None
        if line.action == "claim":
            return line
    return None


def _closing(claim: Line, action: Action, facts: dict[str, Any]) -> Line:
    return Line(
        action, claim.version, claim.by, claim.reason, claim.champion, claim.previous, {"claim": claim.token, **facts}
    )


def _champion_before(journal: Journal, version: str) -> str | None:
    """What was champion when `version` was last promoted, unless that one was withdrawn."""
    for line in reversed(journal.lines()):
        if line.action == "promoted" and line.version == version:
            return line.champion if line.champion is None or withdrawn(journal, line.champion) is None else None
    return None


def _expect(client: MlflowClient, model: str, expected: str | None) -> None:
    found = alias_version(client, model, CHAMPION)
    if found != expected:
        raise ChampionChangedError(_changed(model, expected, f"version {found}" if found else "none"))


def _changed(model: str, expected: str | None, found: str) -> str:
    wanted = f"version {expected}" if expected else "none"
    return (
        f"The champion of {model} changed.\n  got:      {found}\n"
        f"  expected: {wanted}, which the gates compared with\n"
        "  next:     promote again: the gates run against the champion there is now"
    )


def _put_alias(client: MlflowClient, model: str, alias: str, version: str | None) -> None:
    if version is not None:
        client.set_registered_model_alias(model, alias, version)
        return
    try:
        client.delete_registered_model_alias(model, alias)
    except MlflowException as error:
        if error.get_http_status_code() != 404:
            raise
