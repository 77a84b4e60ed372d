"""Sweep: a search for the merge's settings on validation data, recorded in MLflow, published on the run's page."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from pydantic import BaseModel, ConfigDict, Field

from poemerge.project import Project
from poemerge.registry.sweeps import SweepRun
from poemerge.report.surface import write_surface
from poemerge.search.sweep import SweepSettings, Trial, check_settings
from poemerge.search.sweep import sweep as search
from poemerge.search.write_back import write_back

__all__ = ["Sweep", "sweep"]


class Sweep(BaseModel):
    """How long and where to search."""

    model_config = ConfigDict(frozen=True)

    trials: int = Field(default=20, ge=1, description="At most this many merges, the present settings included")
    minutes: float | None = Field(default=None, gt=0, description="No trial starts after this many minutes")
    methods: tuple[str, ...] = Field(default=("poe",), min_length=1, description="Methods to choose from")
    split: str = Field(default="validation", description="Split of the suites to score on; never the pipeline's own")
    max_examples: int | None = Field(default=None, ge=1, description="Of each suite; all where it is not given")
    seed: int = 0
    write: bool = Field(default=False, description="Put the winner into params.yaml")


@flow(name="sweep", flow_run_name="{request.trials} trials")
def sweep(request: Sweep = Sweep()) -> dict[str, Any]:  # noqa: B008 - frozen
    """Search, and say what was found: {best, score, current, trials, page, written}."""
    logger = get_run_logger()
    project = Project.find()
    params = project.load_params()
    settings = SweepSettings(**request.model_dump(exclude={"write"}))
    check_settings(params, settings)  # before a record is opened of a search that cannot be
    record = SweepRun(project, f"sweep of {params.register_.model}", asdict(settings))

    def on_trial(trial: Trial) -> None:
        record.trial(trial.number, trial.point, trial.score, trial.suites, trial.seconds, trial.note)
        logger.info(
            "trial %d: %.4f, %.0f s, %s", trial.number, trial.score, trial.seconds, json.dumps(dict(trial.point))
        )

    try:
        result = search(project, params, settings, on_trial)
        folder = project.state / "sweep"
        result.write(folder / "sweep.json")
        page = write_surface(asdict(result), folder / "index.html", params.register_.model)
        record.end(result.best.point, result.best.score, "FINISHED", folder / "sweep.json", page)
    except BaseException:
        record.fail()
        raise
    written = request.write and result.best.score > result.current.score
    if written:
        write_back(project.params_yaml, result.best.point, result.tail_index)
    _publish(asdict(result), page, written)
    return {
        "best": dict(result.best.point),
        "score": result.best.score,
        "current": result.current.score,
        "trials": len(result.trials),
        "page": str(page),
        "written": written,
        "run_id": record.run_id,
    }


def _publish(result: dict[str, Any], page: Path, written: bool) -> None:
    best = result["best"]
    now = result["current"]["score"]
    text = f"Best {best['score']:.4f} with `{json.dumps(best['point'])}`; params.yaml had {now:.4f}."
    text += " The winner stands in params.yaml now." if written else ""
    create_markdown_artifact(f"{text}\n\nPage: {page}", key="sweep", description="What the sweep found")
    rows = [{"trial": t["number"], **t["point"], "score": round(t["score"], 5)} for t in result["trials"]]
    create_table_artifact(rows, key="sweep-trials", description="Every trial")
