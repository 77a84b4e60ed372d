"""Which MLflow a project talks to, and its errors in our words."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

from poemerge.errors import RegistryError
from poemerge.own_registry import EXPERIMENT, of_another_checkout, own_uri
from poemerge.project import Project

__all__ = ["EXPERIMENT", "check_own", "connect", "experiment_id", "no_registry", "speaking", "tracking_uri"]

logging.getLogger("mlflow").setLevel(logging.WARNING)
# SQLAlchemy's migrations tell each table they create.
logging.getLogger("alembic").setLevel(logging.WARNING)


def tracking_uri(project: Project) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the project's own."""
    return os.environ.get("MLFLOW_TRACKING_URI") or own_uri(project)


def no_registry(project: Project) -> bool:
    """Whether the project would use a database of its own, and nothing has been written to it yet."""
    return tracking_uri(project) == own_uri(project) and not project.mlflow_db.is_file()


def connect(project: Project) -> MlflowClient:
    """A client of the project's MLflow; tracking and registry are the same place, for mlflow's global functions too.

    Raises RegistryError when the place cannot be reached, or when it is the registry of another checkout, which this
    one was copied from.
    """
    uri = tracking_uri(project)
    if uri.startswith("sqlite:///"):
        project.mlflow_db.parent.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    with speaking(uri):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        # MLflow writes its choice into the environment, where it would look as if somebody had asked for it.
        if given is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        if uri == own_uri(project):
            check_own(project)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def check_own(project: Project) -> None:
    """Raises RegistryError when the project's own database is the registry of another checkout, which this one was
    copied from. One that is not there yet is made by who writes first, which takes seconds.
    """
    if not project.mlflow_db.is_file():
        return
    uri = own_uri(project)
    with speaking(uri):
        problem = of_another_checkout(MlflowClient(tracking_uri=uri, registry_uri=uri), project)
    if problem is not None:
        raise RegistryError(str(problem))


def experiment_id(client: MlflowClient, project: Project, name: str = EXPERIMENT) -> str:
    """The id of the experiment `name`, which is created when it does not exist.

    Without an MLflow server in between its artifacts lie in the project; a server has a place of its own.
    """
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    served = tracking_uri(project).startswith(("http://", "https://"))
    try:
        return str(
            client.create_experiment(name, artifact_location=None if served else project.mlflow_artifacts.as_uri())
        )
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
        # Another process was faster.
        return str(client.get_experiment_by_name(name).experiment_id)


@contextmanager
def speaking(uri: str) -> Iterator[None]:
    """Turns MLflow's exceptions into RegistryError: what was refused, by which server, and what to do."""
    try:
        yield
    except MlflowException as error:
        status = error.get_http_status_code()
        text = " ".join(str(error).split())
        if status == 403 or "PERMISSION_DENIED" in text or "Permission denied" in text:
            user = os.environ.get("MLFLOW_TRACKING_USERNAME", "an anonymous user")
            raise RegistryError(
                f"The model registry refused this.\n  got:      {user} may not do that on {uri} (403)\n"
                "  expected: a user with the right to edit the registered model\n"
                "  next:     ask somebody with that right to do it, or the server's administrator for it"
            ) from error
        if status == 401 or "not authenticated" in text:
            raise RegistryError(
                f"The model registry does not know you.\n  got:      no or wrong credentials for {uri} (401)\n"
                "  expected: a user of that server\n"
                "  next:     set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        raise RegistryError(
            f"The model registry refused this.\n  got:      {text[:500]}\n  expected: an answer from {uri}\n"
            "  next:     check that it runs and holds what you asked for"
        ) from error
