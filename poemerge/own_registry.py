"""The registry that a project keeps itself, without an MLflow server, and whether a checkout that holds one owns it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from poemerge.errors import Problem
from poemerge.project import Project

__all__ = ["EXPERIMENT", "of_another_checkout", "own_uri"]

EXPERIMENT = "poemerge"


def own_uri(project: Project) -> str:
    """An SQLite file inside the project (an absolute path: MLflow's own default depends on the working directory)."""
    return f"sqlite:///{project.mlflow_db}"


def of_another_checkout(client: Any, project: Project) -> Problem | None:
    """What is wrong when the experiments of the project's own database, which the MLflow `client` asks, keep their
    artifacts in another folder; None where they do not.

    Their places are absolute: a copy of a checkout would write into the original's, and remove from it.
    """
    for experiment in client.search_experiments(filter_string=f"name LIKE '{EXPERIMENT}%'"):
        place = urlsplit(experiment.artifact_location)
        if experiment.name.split(" ")[0] != EXPERIMENT or place.scheme != "file":
            continue
        there = Path(unquote(place.path))
        if there.resolve() != project.mlflow_artifacts.resolve():
            return Problem(
                "The registry in this checkout belongs to a checkout elsewhere.",
                got=f"{project.mlflow_db}, whose artifacts lie in {there}",
                expected=f"artifacts in {project.mlflow_artifacts}",
                next_step=f"if this checkout was moved, move it back (or link {there.parents[2]} to it); if it is a "
                "copy, `rm -r .poemerge/mlflow metrics/registration.json` here: `poemerge run` then starts a registry "
                "of its own",
            )
    return None
