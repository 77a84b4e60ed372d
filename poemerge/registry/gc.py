"""Old candidates go, with their artifacts; what an alias, a champion of any time, or a waiting request needs stays."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.registry.journal import Journal
from poemerge.registry.promotion import open_requests
from poemerge.registry.removed import keep_record
from poemerge.registry.tracking import EXPERIMENT, connect, speaking, tracking_uri
from poemerge.registry.versions import Version, list_versions

__all__ = ["Plan", "plan", "remove"]

STALE_HOURS = 24.0
"""A run that has no version after this long belongs to a registration that died."""


@dataclass(frozen=True)
class Plan:
    """The versions that go and those that stay; `locks`, the dvc.lock of each by version, of both kinds; `runs` without
    a version that a registration left behind."""

    gone: tuple[Version, ...]
    kept: tuple[Version, ...]
    locks: dict[str, str]
    runs: tuple[str, ...]


def plan(project: Project, keep: int) -> Plan:
    """What goes when the newest `keep` versions stay, and whatever has an alias, was ever champion, or waits for
    approval.

    Raises RegistryError when it cannot be read what a version that stays needs.
    """
    with speaking(tracking_uri(project)):
        client = connect(project)
        model = project.load_params().register_.model
        versions = list_versions(client, model)
        journal = Journal.find(client, model)
        lines = [] if journal is None else journal.lines()
        needed = {line.version for line in lines if line.action in ("claim", "promoted", "rolled_back")}
        needed |= {line.champion for line in lines if line.champion is not None}
        if journal is not None:
            needed |= {request.version for request in open_requests(project)}
        gone: list[Version] = []
        kept: list[Version] = []
        for place, version in enumerate(versions):
            stays = place < keep or version.aliases or version.version in needed
            (kept if stays else gone).append(version)
        locks = {version.version: _lock(client, version, stays=True) for version in kept}
        locks |= {version.version: _lock(client, version, stays=False) for version in gone}
        return Plan(tuple(gone), tuple(kept), locks, tuple(_left_behind(client, model, versions)))


def remove(project: Project, what: Plan) -> None:
    """Removes versions, their runs, nested runs and artifacts. A version goes first: nothing registered lacks its
    files. What it was made of stays with the log of decisions, where a recall finds it.
    """
    with speaking(tracking_uri(project)):
        client = connect(project)
        for version in what.gone:
            keep_record(Journal.open(client, project, version.model), version)
            client.delete_model_version(version.model, version.version)
            _remove_run(client, version.run_id)
        for run_id in what.runs:
            _remove_run(client, run_id)


def _remove_run(client: MlflowClient, run_id: str) -> None:
    run = client.get_run(run_id)
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=1000)
    for model in client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'"):
        _remove_artifacts(model.artifact_location)
        client.delete_logged_model(model.model_id)
    for one in (*children, run):
        _remove_artifacts(one.info.artifact_uri)
        client.delete_run(one.info.run_id)


def _remove_artifacts(uri: str) -> None:
    # Removed before, by a command that was ended in the middle.
    with contextlib.suppress(FileNotFoundError):
        get_artifact_repository(uri).delete_artifacts()


def _lock(client: MlflowClient, version: Version, *, stays: bool) -> str:
    """The dvc.lock that `version` was registered with; "" where there is none, or it cannot be read and the version
    goes anyway.
    """
    with tempfile.TemporaryDirectory(prefix="poemerge-") as scratch:
        try:
            path = Path(client.download_artifacts(version.run_id, "project/dvc.lock", scratch))
            return path.read_text(encoding="utf-8")
        except Exception as error:  # each kind of artifact store has errors of its own
            # Taken as empty, the lock of a version that stays would let go of everything that the version needs.
            if stays and _has_lock(client, version):
                raise RegistryError(
                    f"What version {version.version} needs cannot be read, and it stays.\n"
                    f"  got:      {' '.join(str(error).split())[:500]}\n"
                    f"  expected: project/dvc.lock of its run {version.run_id}\n"
                    "  next:     see that the artifact store answers, and run it again; nothing was removed"
                ) from error
            return ""


def _has_lock(client: MlflowClient, version: Version) -> bool:
    """Whether `version` was registered with a dvc.lock: one that was registered by hand has none."""
    return bool(version.run_id) and "poemerge.dvc_lock.digest" in client.get_run(version.run_id).data.tags


def _left_behind(client: MlflowClient, model: str, versions: Sequence[Version]) -> list[str]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    mine = {version.run_id for version in versions}
    found = client.search_runs(
        [experiment.experiment_id],
        f"tags.`poemerge.kind` = 'merge' AND tags.`poemerge.model` = '{model}'",
        max_results=1000,
    )
    now = datetime.now(UTC).timestamp()
    return [
        run.info.run_id
        for run in found
        if run.info.run_id not in mine and now - run.info.start_time / 1000 > STALE_HOURS * 3600
    ]
