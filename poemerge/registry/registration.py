"""Registering what was merged, judging it, and making it champion where that needs nobody's word."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from poemerge.params import Params
from poemerge.project import Project
from poemerge.registry.champion import ChampionChangedError, move, settle
from poemerge.registry.evidence import gates_of, log_verdicts
from poemerge.registry.gates import Gate, passed
from poemerge.registry.journal import Journal, Line
from poemerge.registry.record import record
from poemerge.registry.tracking import connect, speaking, tracking_uri
from poemerge.registry.versions import CHAMPION, Version, alias_version, find_version
from poemerge.wholefile import write_whole

__all__ = ["Registration", "judge_and_move", "log_report", "register_merged"]

log = logging.getLogger(__name__)
TRIES = 5


@dataclass(frozen=True)
class Registration:
    """What registering led to: the `version` and whether it is new (`created`), its gates, whether it became champion
    now, who was champion before, and whether its promotion waits for somebody's approval.
    """

    version: Version
    created: bool
    gates: tuple[Gate, ...]
    promoted: bool
    champion_before: str | None
    awaits_approval: bool

    def to_json(self) -> dict[str, Any]:
        """The content of metrics/registration.json."""
        version = self.version
        return {
            "model": version.model,
            "version": int(version.version),
            "digest": version.digest,
            "aliases": list(version.aliases),
            "run_id": version.run_id,
            "created": self.created,
            "gates": [asdict(gate) for gate in self.gates],
            "promoted": self.promoted,
            "champion_before": None if self.champion_before is None else int(self.champion_before),
            "awaits_approval": self.awaits_approval,
        }


def register_merged(project: Project, params: Params) -> Registration:
    """Registers artifacts/merged, judges it against the champion, and promotes it when every gate passes and
    params.yaml asks for no approval; writes metrics/registration.json. Raises RegistryError.
    """
    client = connect(project)
    with speaking(tracking_uri(project)):
        version, created = record(client, project, params)
        journal = Journal.open(client, project, version.model)
        if params.register_.approval == "required":
            settle(client, journal, version.model)
            before = alias_version(client, version.model, CHAMPION)
            gates = gates_of(client, project, params, version, before, journal)
            log_verdicts(client, version, gates, before)
            line = None
        else:
            gates, line, before = judge_and_move(client, project, params, version, journal, reason="every gate passed")
        version = find_version(client, version.model, version.version)
        registration = Registration(
            version,
            created,
            tuple(gates),
            line is not None,
            before,
            params.register_.approval == "required" and passed(gates) and before != version.version,
        )
    _write(project, registration)
    return registration


def log_report(project: Project, version: Version, page: Path) -> None:
    """Keeps the report, `page`, with the run of `version`. Raises RegistryError."""
    client = connect(project)
    with speaking(tracking_uri(project)):
        client.log_artifact(version.run_id, str(page), "report")


def judge_and_move(
    client: MlflowClient,
    project: Project,
    params: Params,
    version: Version,
    journal: Journal,
    *,
    reason: str,
    by: str | None = None,
    facts: dict[str, Any] | None = None,
    verify: Callable[[], None] | None = None,
    ignore: Sequence[str] = (),
) -> tuple[list[Gate], Line | None, str | None]:
    """The gates of `version` against the champion there is, and the move when all pass; again when the champion changed
    between the two. Gates named in `ignore` are judged and recorded, and do not hold it up.

    Returns the gates, the line of the move (None: a gate failed, or it is champion already) and the champion before.
    """
    for attempt in range(TRIES):
        settle(client, journal, version.model)
        champion = alias_version(client, version.model, CHAMPION)
        gates = gates_of(client, project, params, version, champion, journal)
        log_verdicts(client, version, gates, champion)
        if champion == version.version or not passed([gate for gate in gates if gate.name not in ignore]):
            return gates, None, champion
        try:
            line = move(
                client,
                journal,
                version,
                expected=champion,
                gates=gates,
                reason=reason,
                by=by,
                facts=facts,
                verify=verify,
            )
        except ChampionChangedError:
            if attempt == TRIES - 1:
                raise
            log.info("The champion of %s changed while the gates ran: they run again", version.model)
            continue
        return gates, line, champion
    raise AssertionError("unreachable")


def _write(project: Project, registration: Registration) -> None:
    path = project.registration_json
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(registration.to_json(), indent=2, ensure_ascii=False) + "\n")
