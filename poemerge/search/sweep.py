"""The sweep: Optuna proposes settings, each is merged and scored on the validation split, the best is kept."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import optuna

from poemerge.contenders import Field, open_suites
from poemerge.errors import ParamsError, PoemergeError, Problem
from poemerge.merging import FamilyChoice, Selection
from poemerge.numerics.reuse import reusing
from poemerge.params import Params, parse_bytes
from poemerge.project import Project
from poemerge.search.space import METHODS, Point, current, settings_of, suggest
from poemerge.suites.evaluation import Contender, OpenSuite, evaluate_models
from poemerge.suites.runtime import choose_runtime
from poemerge.suites.scores import normalised
from poemerge.suites.store import ScoreStore
from poemerge.wholefile import write_whole

__all__ = ["SweepResult", "SweepSettings", "Trial", "check_settings", "sweep"]

log = logging.getLogger(__name__)

CURRENT = "as in params.yaml"


@dataclass(frozen=True)
class SweepSettings:
    """How long and where to search: `trials` at most, `minutes` at most (None: no limit), among `methods`, scored on
    `split`, by proposals drawn with `seed`; `max_examples` of each suite (None: all)."""

    trials: int = 20
    minutes: float | None = None
    methods: tuple[str, ...] = ("poe",)
    split: str = "validation"
    max_examples: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """One point: its `score` (mean of merged ÷ expert over the suites), each suite's own score, and its seconds."""

    number: int
    point: Point
    score: float
    suites: dict[str, float]
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class SweepResult:
    """Every trial, the best of them, the one that params.yaml stands for, and the tail index that Student-t took."""

    trials: list[Trial]
    best: Trial
    current: Trial
    settings: SweepSettings
    tail_index: float | None
    suites: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """All of it as JSON at `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(self), indent=1) + "\n")


def sweep(
    project: Project, params: Params, settings: SweepSettings, on_trial: Callable[[Trial], None] = lambda _: None
) -> SweepResult:
    """Search for the merge with the best mean normalised score on the validation split.

    The first trial is what params.yaml has now, so the winner is never worse than it there. Test data takes no part:
    raises ParamsError when `split` is one that the pipeline scores on. A trial whose merge fails counts as 0. Trials
    share the Gram products of their experts, up to merge.max_memory.
    """
    check_settings(params, settings)
    suites = _validation_suites(project, params, settings)
    tail_index, selection = _selected(project, params)
    field_ = Field.of(project)
    evaluation = params.evaluate
    runtime = choose_runtime(evaluation.device, evaluation.dtype, evaluation.batch_size)
    store = ScoreStore(project.state / "scores", project.scores)

    def score(contenders: list[Contender]) -> dict[str, dict[str, float]]:
        results = evaluate_models(suites, contenders, store, runtime, keep_others=True)
        return {s.name: {who: scored.scores[s.suite.metric.name] for who, (scored, _) in results[s.name].items()}
                for s in suites}  # fmt: skip

    experts = {name: row["expert"] for name, row in score([field_.expert()]).items()}
    trials: list[Trial] = []

    def run(point: Point, note: str = "") -> Trial:
        began = time.monotonic()
        name = f"trial {len(trials)}"
        merge, chosen = (params.merge, selection) if note else settings_of(point, params, tail_index)
        try:
            own = {suite: row[name] for suite, row in score([field_.merging(name, merge, chosen)]).items()}
        except PoemergeError as error:
            if note:
                raise
            log.warning("%s failed: %s", name, error)
            trial = Trial(len(trials), point, 0.0, {}, time.monotonic() - began, str(error))
        else:
            ratios = [normalised(own[s.name], experts[s.name], s.suite.metric.higher_is_better) for s in suites]
            trial = Trial(len(trials), point, float(np.mean(ratios)), own, time.monotonic() - began, note)
        trials.append(trial)
        log.info("%s: %.4f %s", name, trial.score, json.dumps(dict(point)))
        on_trial(trial)
        return trial

    began = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        # Joint proposals within each branch of the space: experimental to Optuna, pinned and tested here.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(seed=settings.seed, multivariate=True, group=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    with reusing(parse_bytes(params.merge.max_memory)):
        now = run(current(params, selection), CURRENT)
        for _ in range(settings.trials - 1):
            if settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes:
                log.info("%.1f minutes are over after %d trials", settings.minutes, len(trials))
                break
            proposal = study.ask()
            study.tell(proposal, run(suggest(proposal, settings.methods)).score)
    best = max(trials, key=lambda trial: trial.score)
    return SweepResult(trials, best, now, settings, tail_index, [suite.name for suite in suites])


def check_settings(params: Params, settings: SweepSettings) -> None:
    """Raises ParamsError for methods that there are not, and for a split that the pipeline scores on."""
    problems = [
        Problem(
            f"params.yaml evaluate.suites.{name}.split",
            got=f"{suite.split!r}, on which the pipeline scores",
            expected="another split to search on",
            next_step="give the suite a validation split of its own, and name it with --split",
        )
        for name, suite in params.evaluate.suites.items()
        if suite.split == settings.split
    ]
    unknown = [name for name in settings.methods if name not in METHODS]
    problems += [Problem("--method", name, f"one of {', '.join(METHODS)}", "choose one") for name in unknown]
    if problems:
        raise ParamsError(problems)


def _validation_suites(project: Project, params: Params, settings: SweepSettings) -> Sequence[OpenSuite]:
    chosen = dict(params.evaluate.suites)
    if settings.max_examples is not None:
        chosen = {
            name: suite.model_copy(update={"max_examples": settings.max_examples}) for name, suite in chosen.items()
        }
    suites = [suite for suite in open_suites(project, chosen, settings.split) if suite.expert is not None]
    if not suites:
        raise ParamsError(
            Problem("params.yaml evaluate.suites", "no suite of an expert", "at least one", "add a suite for an expert")
        )
    return suites


def _selected(project: Project, params: Params) -> tuple[float | None, Selection]:
    """The tail index that the tail fit found (or params.yaml gives), and the selection that the merge uses now."""
    if params.expert.family != "auto":
        return params.expert.tail_index, Selection(FamilyChoice(params.expert.family, params.expert.tail_index))
    if not project.expert_json.is_file():
        return None, Selection()
    selection = Selection.read(project.expert_json)
    return selection.model.tail_index, selection
