"""Scores and how sure we are of them: metrics of per-example predictions, bootstrap intervals, McNemar, calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poemerge.errors import Problem, SuiteError

__all__ = [
    "METRICS",
    "Columns",
    "McNemar",
    "Metric",
    "expected_calibration_error",
    "interval",
    "mcnemar",
    "mean_of_ratios",
    "metric_named",
    "normalised",
    "ratio_of_means",
    "resampled",
]

Columns = Mapping[str, NDArray[Any]]
"""Predictions by column, each `[example]`: what a suite's predict gave, see docs/evaluation.md."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A score of many samples at once.

    `columns` are those it reads; `of` maps them, each `[sample, example]`, to one number a sample, `[sample]`.
    """

    name: str
    columns: tuple[str, ...]
    of: Callable[..., Floats]
    higher_is_better: bool = True

    def __call__(self, predictions: Columns) -> float:
        """The score of `predictions`; raises SuiteError when they lack a column."""
        return float(self.of(*(self._column(predictions, name)[None] for name in self.columns))[0])

    def at(self, predictions: Columns, index: NDArray[np.int64]) -> Floats:
        """The scores `[sample]` of the resamples `index [sample, example]` of `predictions`."""
        return self.of(*(self._column(predictions, name)[index] for name in self.columns))

    def _column(self, predictions: Columns, name: str) -> NDArray[Any]:
        if name not in predictions:
            raise SuiteError(
                f"metric {self.name}: the predictions have no column {name!r}\n  got:      {', '.join(predictions)}\n"
                f"  expected: {', '.join(self.columns)}\n  next:     choose a metric that this kind of suite supports"
            )
        return predictions[name]


def _share_equal(target: NDArray[Any], predicted: NDArray[Any]) -> Floats:
    equal: Floats = np.mean(target == predicted, axis=1, dtype=np.float64)
    return equal


def _macro_f1(target: NDArray[np.int64], predicted: NDArray[np.int64]) -> Floats:
    """F1 = 2·TP/(2·TP + FP + FN) averaged over the classes that the sample's targets or predictions hold."""
    samples, classes = len(target), int(max(target.max(), predicted.max())) + 1
    row = np.arange(samples)[:, None] * classes

    def count(labels: NDArray[np.int64], where: NDArray[np.bool_] | None = None) -> Floats:
        keys = (row + labels)[where] if where is not None else (row + labels).ravel()
        return np.bincount(keys, minlength=samples * classes).reshape(samples, classes).astype(np.float64)

    both = count(target) + count(predicted)  # = 2·TP + FP + FN
    f1 = np.divide(2 * count(target, target == predicted), both, out=np.zeros_like(both), where=both > 0)
    scores: Floats = f1.sum(1) / (both > 0).sum(1)
    return scores


def _mean(values: NDArray[Any]) -> Floats:
    means: Floats = np.mean(values, axis=1, dtype=np.float64)
    return means


def _spearman(target: NDArray[np.float64], predicted: NDArray[np.float64]) -> Floats:
    """Pearson's correlation of the ranks, ties at their mean rank; 0 where either side is constant."""
    from scipy.stats import rankdata

    x, y = rankdata(target, axis=1), rankdata(predicted, axis=1)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    norm = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    scores: Floats = np.divide((x * y).sum(1), norm, out=np.zeros_like(norm), where=norm > 0)
    return scores


def _perplexity(nll: NDArray[np.float64], tokens: NDArray[np.float64]) -> Floats:
    """exp(Σ nll / Σ tokens); `nll` is the sum over the tokens of an example, in nats."""
    scores: Floats = np.exp(nll.sum(1) / tokens.sum(1))
    return scores


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", ("target", "predicted"), _share_equal),
        Metric("macro_f1", ("target", "predicted"), _macro_f1),
        Metric("exact_match", ("target_text", "predicted_text"), _share_equal),
        Metric("spearman", ("target_value", "predicted_value"), _spearman),
        Metric("nll", ("nll",), _mean, higher_is_better=False),
        Metric("perplexity", ("nll", "tokens"), _perplexity, higher_is_better=False),
        Metric("value", ("value",), _mean),
        Metric("loss", ("value",), _mean, higher_is_better=False),
    )
}
"""The metrics by name. `value` and `loss` are means of one number an example, for kinds that score by themselves."""


def metric_named(name: str) -> Metric:
    """The metric `name`; raises SuiteError listing those there are.

    `value:NAME` and `loss:NAME` are the metrics value and loss under a name that says what the numbers are.
    """
    kind, _, given = name.partition(":")
    if given and kind in ("value", "loss"):
        return replace(METRICS[kind], name=name)
    if name not in METRICS:
        next_step = "mend `metric` of the suite in params.yaml"
        raise SuiteError(Problem("metric", repr(name), f"one of {', '.join(METRICS)}", next_step))
    return METRICS[name]


def expected_calibration_error(confidence: NDArray[Any], right: NDArray[np.bool_], bins: int = 15) -> float:
    """ECE = Σ_b n_b/n · |share right in b − mean confidence in b| over `bins` equal bins of (0, 1].

    Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    confidence = confidence.astype(np.float64)
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(which, right.astype(np.float64) - confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))


@dataclass(frozen=True)
class McNemar:
    """`first_only` and `second_only` right, and the exact two-sided `p_value` that both are right equally often."""

    first_only: int
    second_only: int
    p_value: float


def mcnemar(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test on paired outcomes `[example]`: of the discordant pairs, half on each side (binomial)."""
    from scipy.stats import binomtest

    first = int(np.sum(first_right & ~second_right))
    second = int(np.sum(second_right & ~first_right))
    p = float(binomtest(first, first + second, 0.5).pvalue) if first + second else 1.0
    return McNemar(first, second, p)


def resampled(
    metric: Metric, models: Sequence[Columns], *, samples: int, rng: np.random.Generator, chunk: int = 1 << 21
) -> Floats:
    """Scores `[model, sample]` of `samples` bootstrap resamples of the examples, the same resamples for each model.

    Arguments: `models`, the predictions of each on the same examples in the same order; `chunk`, entries of the index
    held at a time (the result does not depend on it).
    """
    count = len(next(iter(models[0].values())))
    parts = [
        np.stack([metric.at(columns, index) for columns in models])
        for index in _indices(count, samples, rng, max(1, chunk // count))
    ]
    return np.concatenate(parts, axis=1)


def _indices(count: int, samples: int, rng: np.random.Generator, at_a_time: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, samples, at_a_time):
        yield rng.integers(0, count, (min(at_a_time, samples - start), count))


def interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap `values [sample]` that holds `level` of them."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def normalised(merged: Floats | float, expert: Floats | float, higher_is_better: bool = True) -> Floats:
    """merged ÷ expert, turned round where less is better; NaN where the divisor is 0."""
    above, below = np.broadcast_arrays(
        np.asarray(merged if higher_is_better else expert, dtype=np.float64),
        np.asarray(expert if higher_is_better else merged, dtype=np.float64),
    )
    out: Floats = np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)
    return out


def mean_of_ratios(merged: Floats, experts: Floats) -> Floats:
    """Normalised accuracy as the papers average it: mean over suites (axis 0) of merged ÷ expert."""
    return np.asarray(normalised(merged, experts).mean(axis=0), dtype=np.float64)


def ratio_of_means(merged: Floats, experts: Floats) -> Floats:
    """Mean of merged ÷ mean of expert over suites (axis 0): strong suites weigh more than in mean_of_ratios."""
    return normalised(merged.mean(axis=0), experts.mean(axis=0))
