"""A sweep in MLflow: a run for the whole, and a run nested in it for each trial."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from poemerge.project import Project
from poemerge.registry.tracking import connect, experiment_id, speaking, tracking_uri

__all__ = ["SweepRun"]

EXPERIMENT = "poemerge sweeps"


class SweepRun:
    """The MLflow runs of one sweep. Its methods raise RegistryError when MLflow cannot be reached."""

    def __init__(self, project: Project, name: str, settings: Mapping[str, Any]) -> None:
        self.uri = tracking_uri(project)
        self.client: MlflowClient = connect(project)
        with speaking(self.uri):
            self.experiment = experiment_id(self.client, project, EXPERIMENT)
            run = self.client.create_run(self.experiment, run_name=name, tags={"poemerge.kind": "sweep"})
            self.run_id: str = run.info.run_id
            params = [Param(key, json.dumps(value)) for key, value in settings.items()]
            self.client.log_batch(self.run_id, params=params)

    def trial(
        self,
        number: int,
        point: Mapping[str, Any],
        score: float,
        suites: Mapping[str, float],
        seconds: float,
        note: str,
    ) -> None:
        """One trial as a nested run; the parent's metric `score` is the best so far, a step a trial."""
        now = int(time.time() * 1000)
        metrics = [Metric("score", score, now, 0), Metric("seconds", seconds, now, 0)]
        metrics += [Metric(f"suite.{name}", value, now, 0) for name, value in suites.items()]
        with speaking(self.uri):
            child = self.client.create_run(
                self.experiment,
                run_name=f"trial {number}",
                tags={"mlflow.parentRunId": self.run_id, "poemerge.kind": "trial"},
            ).info.run_id
            tags = [RunTag("poemerge.note", note[:4_900])] if note else []
            self.client.log_batch(
                child, params=[Param(key, str(value)) for key, value in point.items()], metrics=metrics, tags=tags
            )
            self.client.set_terminated(child)
            self.client.log_metric(self.run_id, "score", score, step=number)

    def end(self, best: Mapping[str, Any], score: float, status: str = "FINISHED", *files: Path) -> None:
        """Close the sweep's run with the winner and the `files` that tell of it."""
        with speaking(self.uri):
            metrics = [Metric("best", score, int(time.time() * 1000), 0)]
            tags = [RunTag("poemerge.best", json.dumps(dict(best)))]
            self.client.log_batch(self.run_id, metrics=metrics, tags=tags)
            for path in files:
                self.client.log_artifact(self.run_id, str(path))
            self.client.set_terminated(self.run_id, status)

    def fail(self) -> None:
        """Close the sweep's run after an error."""
        with speaking(self.uri):
            self.client.set_terminated(self.run_id, "FAILED")
