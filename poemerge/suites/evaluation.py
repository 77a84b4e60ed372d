"""Several models on several suites: each scored once for the same bytes, in one pass a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poemerge.errors import BadInputError, BadSuitesError, SuiteError
from poemerge.suites.progress import EvaluationProgress
from poemerge.suites.protocol import Model, Suite, SuiteSpec, open_suite
from poemerge.suites.runtime import Runtime
from poemerge.suites.scores import Columns
from poemerge.suites.store import Scored, ScoreStore, score_key

__all__ = ["Contender", "OpenSuite", "Results", "evaluate_models", "load_suites"]


@dataclass(frozen=True)
class OpenSuite:
    """A suite that is loaded and checked: its task model `expert` (None where it has none) and its data's digest."""

    spec: SuiteSpec
    suite: Suite
    examples: int
    expert: str | None
    data_digest: str

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True)
class Contender:
    """A model that takes part, by `name` (base, expert, merged, or a method).

    `digest(suite)` identifies its bytes for a suite, its head included, or is None where it does not take part in it;
    `open()` makes it ready (a baseline is merged there) and gives the model for each suite until it is closed.
    """

    name: str
    digest: Callable[[OpenSuite], str | None]
    open: Callable[[], AbstractContextManager[Callable[[OpenSuite], Model]]]


Results = Mapping[str, Mapping[str, tuple[Scored, Columns]]]
"""suite → contender → its score and predictions."""


def load_suites(
    specs: Sequence[SuiteSpec], expert_of: Callable[[SuiteSpec], str | None], digest_of: Callable[[Path], str]
) -> list[OpenSuite]:
    """The suites, opened and their examples read. Raises BadSuitesError that lists what is wrong with each of them."""
    loaded, problems = [], []
    for spec in specs:
        try:
            suite = open_suite(spec)
            examples = suite.load()
        except (SuiteError, BadInputError) as error:
            problems.append(str(error))
            continue
        own = getattr(suite, "data_digest", None)
        digest = own() if own is not None else digest_of(spec.data) if spec.data is not None else score_key(data=None)
        loaded.append(OpenSuite(spec, suite, examples, expert_of(spec), digest))
    if problems:
        raise BadSuitesError("\n\n".join(problems))
    return loaded


def evaluate_models(
    suites: Sequence[OpenSuite],
    contenders: Sequence[Contender],
    store: ScoreStore,
    runtime: Runtime,
    *,
    keep_others: bool = False,
) -> Results:
    """Scores of every contender on every suite, taken from `store` where the same bytes were scored before.

    A contender with nothing to score is not opened, so a baseline that was scored before is not merged again. Scores
    that this evaluation does not use leave the store at the end, unless `keep_others`.
    """
    results: dict[str, dict[str, tuple[Scored, Columns]]] = {suite.name: {} for suite in suites}
    plan: list[tuple[Contender, list[tuple[OpenSuite, str]]]] = []
    for contender in contenders:
        missing = []
        for suite in suites:
            digest = contender.digest(suite)
            if digest is None:
                continue
            key = _key(suite, digest, runtime)
            if store.has(key):
                results[suite.name][contender.name] = store.get(key)
            else:
                missing.append((suite, key))
        plan.append((contender, missing))
    total = sum(suite.examples for _, missing in plan for suite, _ in missing)
    before = runtime.tick
    with EvaluationProgress(total) as progress:
        runtime.tick = progress.tick
        for contender, missing in plan:
            if missing:
                progress.prepare(contender.name)
                with contender.open() as model_for:
                    for suite, key in missing:
                        progress.begin(f"{contender.name} on {suite.name}")
                        scored = _score(contender.name, suite, model_for(suite), runtime, store, key)
                        results[suite.name][contender.name] = scored
                        progress.end(f"{suite.suite.metric.name} {scored[0].scores[suite.suite.metric.name]:.4f}")
                runtime.release()
    runtime.tick = before  # what comes later is none of these examples
    if not keep_others:
        store.prune()
    order = [contender.name for contender in contenders]
    return {name: {who: row[who] for who in order if who in row} for name, row in results.items()}


def _key(suite: OpenSuite, digest: str, runtime: Runtime) -> str:
    settings: dict[str, Any] = suite.spec.settings.model_dump(exclude={"metric", "expert", "head", "data"})
    return score_key(
        model=digest, data=suite.data_digest, settings=settings, runtime=runtime.settings, version=suite.suite.version
    )


def _score(
    name: str, suite: OpenSuite, model: Model, runtime: Runtime, store: ScoreStore, key: str
) -> tuple[Scored, Columns]:
    started = time.monotonic()
    columns = suite.suite.predict(model, runtime)
    lengths = {column: len(values) for column, values in columns.items()}
    if set(lengths.values()) != {suite.examples}:
        raise suite.spec.error(
            "predictions",
            got=f"columns of {lengths} entries",
            expected=f"one entry for each of the {suite.examples} examples",
            next_step="mend the kind's predict",
        )
    scored = Scored(key, suite.suite.score(columns), suite.examples, round(time.monotonic() - started, 3))
    about = {"model": name, "suite": suite.name, "kind": suite.spec.settings.kind, "data_digest": suite.data_digest}
    store.put(scored, columns, about | {"runtime": runtime.settings})
    return scored, columns
