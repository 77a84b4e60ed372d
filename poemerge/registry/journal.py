"""The append-only log of decisions about a registered model, which is also what makes moving an alias safe.

MLflow moves an alias in one call but cannot compare before it swaps. It does refuse a second value for a parameter of
a run that already has one, in the store's own transaction. So the log is one run a model, its lines are the
parameters 000001, 000002, …, and who wants to act writes the next line first: of two, one succeeds, the other is told
and looks again.
"""

from __future__ import annotations

import getpass
import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS, ErrorCode

from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.registry.tracking import experiment_id

__all__ = ["Action", "Journal", "JournalConflictError", "Line", "whoami"]

JOURNAL_TAG = "poemerge.journal"
EXPERIMENT = "poemerge decisions"
LONGEST_LINE = 5_800  # MLflow takes 6000 characters

Action = Literal[
    "claim", "promoted", "rolled_back", "undone", "requested", "approved", "rejected", "expired", "removed"
]
"""claim: somebody is about to move the champion. promoted, rolled_back: it was moved. undone: the claimed move failed
or its owner died, the champion is as it was. removed: `poemerge gc` took an old candidate away. The others belong to
approval."""


class JournalConflictError(RegistryError):
    """Somebody else wrote the next line first."""


def whoami() -> str:
    """The MLflow user where one is named, else the user of this machine."""
    return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()


@dataclass(frozen=True)
class Line:
    """One decision: what was done (`action`) to which `version`, by whom, when (UTC, ISO 8601), why; the version that
    was `champion` before, the `previous` alias before, and `facts` such as the gates' verdicts. `number` is its place
    in the log.
    """

    action: Action
    version: str
    by: str
    reason: str = ""
    champion: str | None = None
    previous: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    number: int = 0

    @property
    def age(self) -> float:
        """Seconds since it was written, by this machine's clock."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.at)).total_seconds()

    def to_json(self) -> str:
        """One line of JSON that MLflow takes: a reason or facts that are too long are cut."""
        content = asdict(self)
        del content["number"]
        text = json.dumps(content, ensure_ascii=False)
        if len(text) > LONGEST_LINE:
            content |= {
                "reason": self.reason[:1000],
                "facts": {"cut": "too long for one line; see the run of the version"},
            }
            text = json.dumps(content, ensure_ascii=False)
        return text


class Journal:
    """The log of one registered model."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.run_id = run_id

    @staticmethod
    def open(client: MlflowClient, project: Project, model: str) -> Journal:
        """The log of `model`; the registered model and its log are created when they do not exist.

        Of two processes that create it at once one wins, since a model's name is unique; the other takes the winner's
        log.
        """
        run_id = _journal_of(client, model)
        if run_id is not None:
            return Journal(client, run_id)
        run = client.create_run(
            experiment_id(client, project, EXPERIMENT),
            run_name=f"{model}: decisions",
            tags={"poemerge.kind": "decisions", "poemerge.model": model},
        )
        client.set_terminated(run.info.run_id)
        try:
            client.create_registered_model(
                model,
                tags={JOURNAL_TAG: run.info.run_id},
                description="Merged by poemerge. Aliases: candidate, champion, previous.",
            )
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
            found = _journal_of(client, model)
            if found is not None:
                client.delete_run(run.info.run_id)
                return Journal(client, found)
            # The model was made by hand, without a log.
            client.set_registered_model_tag(model, JOURNAL_TAG, run.info.run_id)
        return Journal(client, _journal_of(client, model) or run.info.run_id)

    @staticmethod
    def find(client: MlflowClient, model: str) -> Journal | None:
        """The log of `model`, or None when there is none yet."""
        run_id = _journal_of(client, model)
        return None if run_id is None else Journal(client, run_id)

    def lines(self) -> list[Line]:
        """All lines, oldest first."""
        params = self.client.get_run(self.run_id).data.params
        return [Line(**json.loads(params[key]), number=int(key)) for key in sorted(params) if key.isdigit()]

    def append(self, line: Line, after: int) -> Line:
        """Writes `line` as number `after` + 1 and returns it with its number.

        Raises JournalConflictError when that place is taken: somebody else acted since `after` was read.
        """
        try:
            self.client.log_param(self.run_id, f"{after + 1:06d}", line.to_json())
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE) and "already" in str(error):
                raise JournalConflictError(
                    f"line {after + 1} of the log of decisions was written by somebody else"
                ) from error
            raise
        return Line(**{**asdict(line), "number": after + 1})

    def add(self, line: Line) -> Line:
        """Writes `line` at the end, wherever that is by then: for records that depend on no state."""
        while True:
            lines = self.lines()
            try:
                return self.append(line, lines[-1].number if lines else 0)
            except JournalConflictError:
                continue


def _journal_of(client: MlflowClient, model: str) -> str | None:
    try:
        run_id = client.get_registered_model(model).tags.get(JOURNAL_TAG)
    except MlflowException as error:
        if error.get_http_status_code() == 404:
            return None
        raise
    return None if run_id is None else str(run_id)
