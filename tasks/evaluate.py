"""Stage `evaluate`: the base, the experts, the merged model and the baselines on every suite."""

from __future__ import annotations

import json
import time

from poemerge.contenders import Field, open_suites
from poemerge.params import Params
from poemerge.project import Project
from poemerge.report.bars import draw_bars
from poemerge.suites.evaluation import evaluate_models
from poemerge.suites.runtime import choose_runtime
from poemerge.suites.store import ScoreStore
from poemerge.suites.summary import summarise, table_of, verdict_of
from tasks.report import StageReport

__all__ = ["evaluate"]


def evaluate(project: Project, params: Params) -> StageReport:
    """Writes metrics/evaluation.json and, in artifacts/scores, each score with its per-example predictions.

    What was scored before with the same bytes is not scored again; baselines are merged one at a time, and only for
    scores that are missing. Raises BadSuitesError, before any scoring, with everything that is wrong with the suites.
    """
    started = time.monotonic()
    settings = params.evaluate
    runtime = choose_runtime(settings.device, settings.dtype, settings.batch_size)
    suites = open_suites(project, settings.suites)
    field = Field.of(project)
    # Merged first: what we came for is known while the others are still scored.
    contenders = [field.merged(), field.base(), field.expert()]
    contenders += [field.baseline(method, params.merge) for method in settings.baselines]
    store = ScoreStore(project.scores)
    results = evaluate_models(suites, contenders, store, runtime)
    evaluation = summarise(suites, results, store, project.root, samples=settings.bootstrap_samples, seed=settings.seed)
    evaluation |= {"runtime": runtime.settings, "seconds": round(time.monotonic() - started, 1)}
    project.evaluation_json.parent.mkdir(parents=True, exist_ok=True)
    partial = project.evaluation_json.with_name("evaluation.json.partial")
    partial.write_text(json.dumps(evaluation, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(project.evaluation_json)
    figure = project.scores / "normalised.png"
    draw_bars(evaluation, figure)
    alone = [suite.name for suite in suites if suite.expert is None]
    return StageReport(
        headline=verdict_of(evaluation),
        table=table_of(evaluation),
        figure=figure.relative_to(project.root).as_posix(),
        warnings=[f"suite {name} belongs to no expert: it counts in no mean" for name in alone],
    )
