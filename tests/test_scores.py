"""Scores against scikit-learn and scipy, and whether the intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from poemerge.errors import SuiteError
from poemerge.suites.scores import (
    METRICS,
    expected_calibration_error,
    interval,
    mcnemar,
    mean_of_ratios,
    metric_named,
    normalised,
    ratio_of_means,
    resampled,
)

seeds = st.integers(0, 2**32 - 1)


def labels(seed: int, classes: int = 4) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 60))
    target = rng.integers(0, classes, count)
    return target, np.where(rng.random(count) < 0.6, target, rng.integers(0, classes, count))


@settings(deadline=None)
@given(seeds)
def test_accuracy_and_macro_f1_are_scikit_learns(seed: int) -> None:
    target, predicted = labels(seed)
    columns = {"target": target, "predicted": predicted}
    assert METRICS["accuracy"](columns) == sklearn.metrics.accuracy_score(target, predicted)
    expected = sklearn.metrics.f1_score(target, predicted, average="macro", zero_division=0)
    assert METRICS["macro_f1"](columns) == pytest.approx(expected, rel=1e-14)


@settings(deadline=None)
@given(seeds)
def test_resamples_score_as_each_would_by_itself(seed: int) -> None:
    target, predicted = labels(seed)
    columns = {"target": target, "predicted": predicted}
    index = np.random.default_rng(seed).integers(0, len(target), (5, len(target)))
    for name, theirs in (
        ("accuracy", sklearn.metrics.accuracy_score),
        ("macro_f1", lambda t, p: sklearn.metrics.f1_score(t, p, average="macro", zero_division=0)),
    ):
        got = METRICS[name].at(columns, index)
        assert got == pytest.approx([theirs(target[row], predicted[row]) for row in index], rel=1e-14)


@settings(deadline=None)
@given(seeds)
def test_spearman_is_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    target, predicted = rng.integers(0, 5, 30).astype(float), rng.normal(size=30).round(1)
    got = METRICS["spearman"]({"target_value": target, "predicted_value": predicted})
    assert got == pytest.approx(scipy.stats.spearmanr(target, predicted).statistic, abs=1e-13)
    assert METRICS["spearman"]({"target_value": target, "predicted_value": np.ones(30)}) == 0


def test_nll_and_perplexity() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(5), 50)
    target = rng.integers(0, 5, 50)
    nll = -np.log(shares[np.arange(50), target])
    assert METRICS["nll"]({"nll": nll}) == pytest.approx(sklearn.metrics.log_loss(target, shares, labels=range(5)))
    tokens = rng.integers(1, 30, 50)
    assert METRICS["perplexity"]({"nll": nll, "tokens": tokens}) == pytest.approx(np.exp(nll.sum() / tokens.sum()))
    assert not METRICS["perplexity"].higher_is_better


def test_calibration_error_by_the_definition() -> None:
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.2, 1, 500)
    right = rng.random(500) < confidence**2
    total = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, right) == pytest.approx(total, rel=1e-12)
    assert expected_calibration_error(np.ones(4), np.array([True] * 4)) == 0
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == pytest.approx(0.5)


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_mcnemar_is_the_binomial_test(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.random((2, 80)) < [[0.7], [0.6]]
    found = mcnemar(first, second)
    b, c = (first & ~second).sum(), (~first & second).sum()
    # Twice the smaller tail, by its definition.
    tail = scipy.stats.binom.cdf(min(b, c), b + c, 0.5)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))
    assert (found.first_only, found.second_only) == (b, c)
    assert mcnemar(second, first).p_value == pytest.approx(found.p_value)
    assert mcnemar(first, first).p_value == 1


def test_both_forms_of_normalised_accuracy() -> None:
    merged, expert = np.array([[0.8], [0.3]]), np.array([[0.9], [0.6]])
    assert mean_of_ratios(merged, expert) == pytest.approx([(0.8 / 0.9 + 0.3 / 0.6) / 2])
    assert ratio_of_means(merged, expert) == pytest.approx([1.1 / 1.5])
    assert normalised(20.0, 10.0, higher_is_better=False) == pytest.approx(0.5)
    assert np.isnan(normalised(0.5, 0.0))


def test_resampling_pairs_models_and_does_not_depend_on_chunks() -> None:
    target, predicted = labels(3)
    models = [{"target": target, "predicted": p} for p in (predicted, predicted, target)]
    draws = [
        resampled(METRICS["accuracy"], models, samples=300, rng=np.random.default_rng(7), chunk=chunk)
        for chunk in (1 << 21, 100)
    ]
    assert (draws[0] == draws[1]).all()
    assert (draws[0][0] == draws[0][1]).all(), "the same resamples for every model"
    assert (draws[0][2] == 1).all()


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_intervals_cover(metric: str) -> None:
    """Of 300 data sets drawn from one known truth, about 95 % of the intervals hold the true score."""
    rng = np.random.default_rng(5)
    confusion = np.array([[0.30, 0.05, 0.05], [0.06, 0.20, 0.04], [0.05, 0.05, 0.20]])
    true_accuracy = confusion.trace()
    f1 = 2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1))
    truth = {"accuracy": true_accuracy, "macro_f1": f1.mean()}[metric]
    covered, repeats = 0, 300
    for _ in range(repeats):
        cell = rng.choice(9, size=300, p=confusion.ravel())
        columns = {"target": cell // 3, "predicted": cell % 3}
        low, high = interval(resampled(METRICS[metric], [columns], samples=400, rng=rng)[0])
        covered += low <= truth <= high
    # 0.95 ± three standard errors of 300 trials, and a point for the percentile form's known optimism.
    assert 0.90 <= covered / repeats <= 0.99


def test_interval_of_a_paired_lead_covers() -> None:
    """The difference of two models on the same examples: pairing is what makes its interval this narrow."""
    rng = np.random.default_rng(6)
    patterns = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    shares = [0.70, 0.08, 0.04, 0.18]
    covered, repeats, widths = 0, 300, []
    for _ in range(repeats):
        both = patterns[rng.choice(4, size=400, p=shares)]
        ours, theirs = resampled(METRICS["value"], [{"value": both[:, 0]}, {"value": both[:, 1]}], samples=400, rng=rng)
        low, high = interval(ours - theirs)
        covered += low <= 0.04 <= high
        widths.append(high - low)
    assert 0.90 <= covered / repeats <= 0.99
    unpaired = 2 * 1.96 * np.sqrt((0.78 * 0.22 + 0.74 * 0.26) / 400)
    assert np.mean(widths) < 0.7 * unpaired


def test_unknown_metric_and_missing_column_are_refused() -> None:
    with pytest.raises(SuiteError, match="accuracy, macro_f1"):
        metric_named("acuracy")
    with pytest.raises(SuiteError, match="predicted"):
        METRICS["accuracy"]({"target": np.array([1])})
