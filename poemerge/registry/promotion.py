"""Asking for a promotion, approving or rejecting it, carrying it out, and taking it back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from mlflow import MlflowClient

from poemerge.errors import RegistryError
from poemerge.params import Params
from poemerge.project import Project
from poemerge.registry.champion import rollback as restore_previous
from poemerge.registry.champion import settle
from poemerge.registry.evidence import gates_of, log_verdicts, model_folder
from poemerge.registry.gates import Gate, passed
from poemerge.registry.journal import Action, Journal, Line, whoami
from poemerge.registry.registration import judge_and_move
from poemerge.registry.tracking import connect, speaking, tracking_uri
from poemerge.registry.versions import CHAMPION, Version, alias_version, find_version

__all__ = [
    "Asked",
    "Promoted",
    "Request",
    "ask",
    "carry_out",
    "decide",
    "expire",
    "find",
    "find_request",
    "open_requests",
    "request_approval",
    "requests",
    "roll_back",
]

NOT_WITHDRAWN = ("not_withdrawn",)
"""A version that was rolled back may be promoted again when a person asks for it by name."""


@dataclass(frozen=True)
class Request:
    """A promotion that needs approval: its `ticket` (the flow run), the version, who asked, why, since and until
    when, and the answer when there is one.
    """

    ticket: str
    version: str
    by: str
    reason: str
    at: str
    expires: str
    answer: Line | None = None

    @property
    def expired(self) -> bool:
        """Whether it is too late to approve it."""
        return datetime.now(UTC) >= datetime.fromisoformat(self.expires)


@dataclass(frozen=True)
class Asked:
    """The gates of the version asked for, and what comes next: nothing where one failed, approval, or the move."""

    version: str
    champion: str | None
    gates: tuple[Gate, ...]
    needs_approval: bool
    hours: float

    @property
    def passed(self) -> bool:
        """Whether every gate that counts passed."""
        return passed([gate for gate in self.gates if gate.name not in NOT_WITHDRAWN])

    @property
    def failures(self) -> list[str]:
        """`name: reason` of the gates that failed."""
        return [f"{g.name}: {g.reason}" for g in self.gates if g.verdict == "fail" and g.name not in NOT_WITHDRAWN]


@dataclass(frozen=True)
class Promoted:
    """The outcome of a promotion: the version, the champion before, and whether it `moved` (False: it was champion)."""

    version: str
    digest: str
    champion_before: str | None
    moved: bool
    gates: tuple[Gate, ...]


@dataclass(frozen=True)
class _Registry:
    project: Project
    params: Params
    client: MlflowClient
    journal: Journal

    @property
    def model(self) -> str:
        return self.params.register_.model

    def version(self, wanted: str) -> Version:
        return find_version(self.client, self.model, wanted)


def _open(project: Project) -> _Registry:
    params = project.load_params()
    client = connect(project)
    journal = Journal.find(client, params.register_.model)
    if journal is None:
        raise RegistryError(
            f"Nothing is registered as {params.register_.model} yet.\n  got:      {tracking_uri(project)} without it\n"
            "  expected: a registered version\n  next:     `poemerge run` merges and registers the first one"
        )
    return _Registry(project, params, client, journal)


def find(project: Project, wanted: str) -> Version:
    """The version that `wanted` (number, alias, digest) names now. Raises RegistryError when there is none."""
    with speaking(tracking_uri(project)):
        return _open(project).version(wanted)


def ask(project: Project, wanted: str) -> Asked:
    """The gates of the version `wanted` (number, alias, digest), judged now against the champion, and kept with it.

    Raises RegistryError when there is no such version.
    """
    with speaking(tracking_uri(project)):
        registry = _open(project)
        version = registry.version(wanted)
        settle(registry.client, registry.journal, registry.model)
        champion = alias_version(registry.client, registry.model, CHAMPION)
        gates = gates_of(registry.client, project, registry.params, version, champion, registry.journal)
        log_verdicts(registry.client, version, gates, champion)
        rules = registry.params.register_
        return Asked(version.version, champion, tuple(gates), rules.approval == "required", float(rules.approval_hours))


def request_approval(project: Project, version: str, ticket: str, *, by: str, reason: str) -> Request:
    """Writes into the log that `version` waits for approval under `ticket`; the same ticket is written once.

    Raises RegistryError when the version waits under another ticket already.
    """
    with speaking(tracking_uri(project)):
        registry = _open(project)
        for open_one in _requests(registry.journal):
            if open_one.ticket == ticket:
                return open_one
            if open_one.version == version and open_one.answer is None and not open_one.expired:
                raise RegistryError(
                    f"Version {version} waits for approval already.\n  got:      a request by {open_one.by} since "
                    f"{open_one.at[:16]}\n  expected: one request a version\n"
                    f"  next:     poemerge approve {version}, or poemerge reject {version}"
                )
        expires = datetime.now(UTC) + timedelta(hours=registry.params.register_.approval_hours)
        facts = {"ticket": ticket, "expires": expires.isoformat(timespec="seconds")}
        registry.journal.add(Line("requested", version, by, reason, facts=facts))
        return next(item for item in _requests(registry.journal) if item.ticket == ticket)


def open_requests(project: Project) -> list[Request]:
    """The requests that nobody has answered, oldest first; those that have expired too."""
    with speaking(tracking_uri(project)):
        return [item for item in _requests(_open(project).journal) if item.answer is None]


def requests(project: Project) -> list[Request]:
    """Every request for approval there was, oldest first."""
    with speaking(tracking_uri(project)):
        return _requests(_open(project).journal)


def find_request(project: Project, wanted: str) -> Request:
    """The newest request to promote `wanted`, a version (number, alias, digest) or a ticket, answered or not.

    Raises RegistryError when there is none.
    """
    number = wanted.removeprefix("v")
    with speaking(tracking_uri(project)):
        registry = _open(project)
        known = _requests(registry.journal)
        # A ticket is no version, and a version that was asked for may be gone.
        with suppress(RegistryError):
            number = registry.version(wanted).version
    for item in reversed(known):
        if number == item.version or wanted == item.ticket:
            return item
    named = "" if number == wanted.removeprefix("v") else f", version {number}"
    waiting = [f"version {item.version} (asked for by {item.by})" for item in known if item.answer is None]
    raise RegistryError(
        f"Nothing to answer.\n  got:      {wanted}{named}\n"
        f"  expected: a version that waits for approval: {', '.join(waiting) or 'none does'}\n"
        "  next:     `poemerge promote VERSION` asks for one"
    )


def decide(project: Project, ticket: str, *, approve: bool, by: str, reason: str) -> bool:
    """Writes the answer to the request `ticket` into the log; returns whether the version may be promoted.

    An answer that stands in the log already is the answer. Raises RegistryError when there is no such request, it has
    expired, or, with `two_person`, the one who approves is the one who asked.
    """
    with speaking(tracking_uri(project)):
        registry = _open(project)
        request = next((item for item in _requests(registry.journal) if item.ticket == ticket), None)
        if request is None:
            raise RegistryError(
                f"Nobody asked for a promotion under {ticket}; `poemerge models --decisions` lists them"
            )
        closed = request.answer is not None and request.answer.action == "expired"
        if request.answer is not None and not closed:
            return request.answer.action == "approved"
        if closed or request.expired:
            raise RegistryError(
                f"The request to promote version {request.version} has expired.\n  got:      an answer after "
                f"{request.expires[:16]} UTC\n  expected: one before\n  next:     poemerge promote {request.version}"
            )
        if approve and registry.params.register_.two_person and by == request.by:
            raise RegistryError(
                f"Version {request.version} must be approved by somebody else.\n  got:      {by}, who asked for it\n"
                "  expected: a second person (register.two_person)\n"
                f"  next:     let a colleague run `poemerge approve {request.version}`"
            )
        action: Action = "approved" if approve else "rejected"
        registry.journal.add(Line(action, request.version, by, reason, facts={"ticket": ticket}))
        return approve


def expire(project: Project) -> list[Request]:
    """Closes in the log the requests whose time is over; returns them."""
    with speaking(tracking_uri(project)):
        registry = _open(project)
        over = [item for item in _requests(registry.journal) if item.answer is None and item.expired]
        for item in over:
            facts = {"ticket": item.ticket}
            registry.journal.add(Line("expired", item.version, whoami(), "nobody answered in time", facts=facts))
        return over


def carry_out(project: Project, wanted: str, *, by: str, reason: str) -> Promoted:
    """Makes the version `wanted` champion if every gate passes against the champion there is at that moment.

    After the move it is checked that the version's files can be had; else the move is undone.
    Raises RegistryError with the reasons of the gates that failed, and when the registry refuses.
    """
    with speaking(tracking_uri(project)):
        registry = _open(project)
        version = registry.version(wanted)

        def verify() -> None:
            folder = model_folder(version)
            if not list(folder.glob("*.safetensors")):
                raise RegistryError(f"version {version.version} has no weights at {folder}")

        gates, line, before = judge_and_move(
            registry.client,
            project,
            registry.params,
            version,
            registry.journal,
            reason=reason,
            by=by,
            verify=verify,
            ignore=NOT_WITHDRAWN,
        )
        if line is None and before != version.version:
            failed = [f"{gate.name}: {gate.reason}" for gate in gates if gate.verdict == "fail"]
            raise RegistryError(
                f"Version {version.version} may not become champion.\n  got:      {'; '.join(failed)}\n"
                "  expected: every gate of register.gates to pass\n"
                f"  next:     `poemerge lineage {version.version}` tells what it was made of"
            )
        return Promoted(version.version, version.digest, before, line is not None, tuple(gates))


def roll_back(project: Project, *, by: str, reason: str) -> Promoted:
    """Restores `previous` as champion at once, without gates: it passed them when it became champion.

    Raises RegistryError when there is none.
    """
    with speaking(tracking_uri(project)):
        registry = _open(project)
        line, version = restore_previous(registry.client, registry.journal, registry.model, reason=reason, by=by)
        return Promoted(version.version, version.digest, line.champion, True, ())


def _requests(journal: Journal) -> list[Request]:
    """All requests, oldest first."""
    found: dict[str, Request] = {}
    for line in journal.lines():
        ticket = line.facts.get("ticket")
        if ticket is None:
            continue
        if line.action == "requested":
            found[ticket] = Request(ticket, line.version, line.by, line.reason, line.at, line.facts["expires"])
        elif ticket in found and found[ticket].answer is None:
            found[ticket] = replace(found[ticket], answer=line)
    return list(found.values())
