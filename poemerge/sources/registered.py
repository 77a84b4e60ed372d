"""models:/NAME@alias and models:/NAME/VERSION: a model version of an MLflow registry."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from poemerge.own_registry import of_another_checkout, own_uri
from poemerge.project import Project
from poemerge.sources.contents import Kind, needed, require_weights
from poemerge.sources.refusal import Refusal, refusing
from poemerge.sources.source import Brought, Revision, Workplace

__all__ = ["RegisteredSource", "client", "speaking_to_mlflow"]


def client(place: Workplace) -> Any:
    """A client of the MLflow that the workplace names. Raises Refusal when that is the registry of another checkout,
    which this one was copied from."""
    from mlflow import MlflowClient

    project = Project(place.root)
    made = MlflowClient(tracking_uri=place.tracking_uri, registry_uri=place.tracking_uri)
    if place.tracking_uri == own_uri(project) and (problem := of_another_checkout(made, project)) is not None:
        raise Refusal(problem.got, problem.expected, problem.next_step)
    return made


speaking_to_mlflow = refusing(lambda error: _refuse(error))
"""Turn MLflow's exceptions into Refusals. Its client has tried again by itself before it raises."""


@dataclass(frozen=True)
class RegisteredSource:
    """The version of the registered model `name` that has `alias`, or the one numbered `version`."""

    name: str
    alias: str | None = None
    version: str | None = None
    remote = True

    @speaking_to_mlflow
    def resolve(self, place: Workplace, kind: Kind) -> Revision:  # noqa: ARG002 - artifacts are not listed
        """The version that the alias points to now; refuses one that is not ready."""
        registry = client(place)
        if self.alias is not None:
            found = registry.get_model_version_by_alias(self.name, self.alias)
        else:
            found = registry.get_model_version(self.name, self.version)
        if found.status != "READY":
            raise Refusal(
                f"version {found.version} is {found.status}", "a version that is READY", "wait for it", transient=True
            )
        return Revision(f"models:/{self.name}/{found.version}")

    @speaking_to_mlflow
    def bring(self, place: Workplace, kind: Kind, revision: str, into: Path) -> Brought:
        """Download the needed files of the one checkpoint among the version's artifacts."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        registry = client(place)
        version = revision.rsplit("/", 1)[1]
        repository = get_artifact_repository(
            registry.get_model_version_download_uri(self.name, version),
            tracking_uri=place.tracking_uri,
            registry_uri=place.tracking_uri,
        )
        sizes = dict(_files(repository))
        folder = "" if kind == "data" else _checkpoint_folder(sizes)
        below = {path[len(folder) :]: path for path in sizes if path.startswith(folder)}
        if kind == "checkpoint":
            require_weights(below)
        download = into / ".download"
        download.mkdir()
        digests = {}
        for name in needed(below, kind):
            path = Path(repository.download_artifacts(below[name], dst_path=str(download)))
            if sizes[below[name]] is not None and path.stat().st_size != sizes[below[name]]:
                raise Refusal(
                    f"{name} with {path.stat().st_size} bytes",
                    f"{sizes[below[name]]} bytes, as MLflow lists it",
                    "if it stays, look at the artifact store",
                    transient=True,
                )
            with path.open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(into / name)
        shutil.rmtree(download)
        made = registry.get_model_version(self.name, version).creation_timestamp
        return Brought(digests, datetime.fromtimestamp(made / 1000, UTC).isoformat(timespec="seconds"))


def _files(repository: Any) -> Iterator[tuple[str, int | None]]:
    """Path and size of every artifact below the repository's root."""
    folders: list[str | None] = [None]
    while folders:
        for found in repository.list_artifacts(folders.pop()):
            if found.is_dir:
                folders.append(found.path)
            else:
                yield found.path, found.file_size


def _checkpoint_folder(paths: Iterable[str]) -> str:
    """The one folder (with a final /, or "") that is a checkpoint, the nearest to the root: flavours nest it."""
    by_folder: dict[str, set[str]] = {}
    for path in paths:
        parent = PurePosixPath(path).parent.as_posix()
        by_folder.setdefault("" if parent == "." else f"{parent}/", set()).add(PurePosixPath(path).name)
    found = [
        folder
        for folder, names in by_folder.items()
        if {"config.json", "adapter_config.json"} & names and any(name.endswith(".safetensors") for name in names)
    ]
    nearest = [folder for folder in found if folder.count("/") == min(f.count("/") for f in found)]
    if len(nearest) > 1:
        raise Refusal(
            f"several checkpoints: {', '.join(sorted(nearest))}",
            "one checkpoint in a model version",
            "register each as a model of its own",
        )
    return nearest[0] if nearest else ""


def _refuse(error: Exception) -> NoReturn:
    """Raise `error` as a Refusal where it is MLflow's or the network's doing, else as it is."""
    from mlflow.exceptions import MlflowException

    told = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, MlflowException):
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"}:
            raise Refusal(
                told, "a registered model with that version or alias", "check name, version and alias"
            ) from error
        if error.error_code in {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}:
            raise Refusal(
                told, "a user who may read the model", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
    elif not (isinstance(error, OSError) or type(error).__module__.startswith(("requests", "urllib3", "sqlalchemy"))):
        raise error
    raise Refusal(
        f"MLflow does not answer: {told}",
        "an answer of MLflow",
        "check MLFLOW_TRACKING_URI and that the server runs",
        transient=True,
        exhausted=True,
    ) from error
