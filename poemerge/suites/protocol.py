"""What a suite is: load, predict, score; and how a kind is found, ours or another package's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from poemerge.errors import Problem, SuiteError
from poemerge.params import SuiteParams
from poemerge.suites.scores import Columns, Metric

if TYPE_CHECKING:
    from poemerge.suites.runtime import Runtime

__all__ = ["GROUP", "Model", "Suite", "SuiteSpec", "kinds", "open_suite"]

GROUP = "poemerge.suites"
"""The entry-point group in which other packages offer kinds: `kind = "package.module:callable"`."""

_OURS = {
    "text-classification": "poemerge.suites.text_classification:TextClassification",
    "image-classification": "poemerge.suites.image_classification:ImageClassification",
    "seq2seq": "poemerge.suites.seq2seq:Seq2Seq",
    "lm-eval": "poemerge.suites.lm_eval_harness:LmEvalHarness",
    "perplexity": "poemerge.suites.perplexity:Perplexity",
}


@dataclass(frozen=True)
class Model:
    """A model to score.

    Arguments: `name` for the log; `folder`, a Hugging Face folder or a PEFT adapter; `base`, the base's folder, from
    which an adapter's weights, the tokenizer and the image processor come; `head`, a safetensors file with the task's
    private parameters, or None; `config`, the folder whose config.json names the task's architecture (the expert's,
    where it is a full model), or None for `folder`'s own.
    """

    name: str
    folder: Path
    base: Path
    head: Path | None = None
    config: Path | None = None


@dataclass(frozen=True)
class SuiteSpec:
    """What a kind is opened with: the suite's `name`, its `settings` in params.yaml, and the folder of its `data`."""

    name: str
    settings: SuiteParams
    data: Path | None = None

    def options(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The kind's own settings: `known` names them with their defaults; raises SuiteError on others."""
        unknown = [key for key in self.settings.options if key not in known]
        if unknown:
            close = difflib.get_close_matches(unknown[0], known, n=1)
            raise self.error(
                f"options.{unknown[0]}",
                got="an option that this kind does not have",
                expected=f"one of {', '.join(known)}",
                next_step=f"did you mean {close[0]!r}?" if close else "remove it",
            )
        return {**known, **self.settings.options}

    def error(self, what: str, *, got: str, expected: str, next_step: str) -> SuiteError:
        """A SuiteError about `what` in this suite."""
        return SuiteError(Problem(f"suite {self.name} ({self.settings.kind}): {what}", got, expected, next_step))


class Suite(Protocol):
    """An opened suite. A kind is a callable that takes a SuiteSpec and returns one of these."""

    metric: Metric
    """The score that the suite is judged by; known after `load`."""

    version: int
    """Raised when the kind's predictions change for the same inputs: scores kept from earlier are then made again."""

    def load(self) -> int:
        """Read and check the examples; returns how many there are. Raises SuiteError when they are not fit."""
        ...

    def predict(self, model: Model, runtime: Runtime) -> Columns:
        """One entry an example in each column, in an order that is the same for every model.

        Calls `runtime.tick(n)` after each `n` examples.
        """
        ...

    def score(self, predictions: Columns) -> dict[str, float]:
        """Every metric that these predictions allow, by name; the suite's own `metric` among them."""
        ...


def kinds() -> dict[str, EntryPoint]:
    """The kinds there are, by name: ours, and those that installed packages offer in the entry-point group `GROUP`."""
    found = {point.name: point for point in entry_points(group=GROUP)}
    return found | {name: EntryPoint(name, value, GROUP) for name, value in _OURS.items()}


def open_suite(spec: SuiteSpec) -> Suite:
    """The suite that `spec` describes, not yet loaded.

    Raises SuiteError when its kind does not exist, cannot be imported, or refuses its options.
    """
    known = kinds()
    kind = spec.settings.kind
    if kind not in known:
        close = difflib.get_close_matches(kind, known, n=1)
        raise spec.error(
            "kind",
            got=repr(kind),
            expected=f"one of {', '.join(known)}",
            next_step=f"did you mean {close[0]!r}?" if close else "install the package that offers it",
        )
    try:
        make = cast("Callable[[SuiteSpec], Suite]", known[kind].load())
    except ImportError as error:
        raise spec.error(
            "kind",
            got=f"{known[kind].value} cannot be imported: {error}",
            expected="an installed package",
            next_step="pip install 'poemerge[suites]', or the package that offers this kind",
        ) from error
    try:
        return make(spec)
    except SuiteError as error:
        problem = error.problem
        if problem is None or spec.name in problem.where:
            raise
        got, expected, next_step = problem.got, problem.expected, problem.next_step
        raise spec.error(problem.where, got=got, expected=expected, next_step=next_step) from error
