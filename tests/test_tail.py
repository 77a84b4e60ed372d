"""Laws of the tail fit: known samples give known families, scipy agrees, units and zeros change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from poemerge.errors import NumericsError
from poemerge.numerics.families import FAMILIES, TAIL_INDEX_BOUNDS, fit_student_t
from poemerge.numerics.hill import hill
from poemerge.numerics.tail import (
    STANDARD_ERRORS,
    USABLE,
    TailFit,
    fit_tail,
    log_histogram,
    residual_entries,
    select,
    standardised,
)

SAMPLES = 20
ENTRIES = 20_000


def student(tail_index: float, seed: int, count: int = ENTRIES) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(tail_index, count))


def fitted(entries: torch.Tensor, seed: int = 0) -> TailFit:
    return fit_tail(standardised(entries)[0], seed=seed)


@pytest.mark.parametrize(
    ("tail_index", "family"),
    [(1.0, "cauchy"), (1.5, "student_t"), (2.0, "student_t"), (3.0, "student_t"), (5.0, "student_t")],
)
def test_student_t_samples_are_named_and_measured(tail_index: float, family: str) -> None:
    named = 0
    for seed in range(SAMPLES):
        fit = fitted(student(tail_index, seed), seed)
        named += select(fit).family == family
        assert fit.fits["student_t"].parameters["tail_index"] == pytest.approx(tail_index, rel=0.1)
    assert named >= 19


def test_thirty_degrees_of_freedom_are_gaussian_until_there_are_entries_enough_to_tell() -> None:
    few = [select(fitted(student(30, seed, 2_000), seed)).family for seed in range(SAMPLES)]
    many = [fitted(student(30, seed, 60_000), seed) for seed in range(SAMPLES)]
    assert few.count("gaussian") >= 17
    assert [select(fit).family for fit in many].count("student_t") >= 19
    assert np.median([fit.fits["student_t"].parameters["tail_index"] for fit in many]) == pytest.approx(30, rel=0.1)


@pytest.mark.parametrize(
    ("family", "usable", "draw"),
    [
        ("gaussian", "gaussian", lambda rng: rng.normal(size=ENTRIES)),
        ("laplace", "student_t", lambda rng: rng.laplace(size=ENTRIES)),
        ("weibull", "student_t", lambda rng: rng.weibull(0.7, ENTRIES) * rng.choice([-1, 1], ENTRIES)),
        ("weibull", "gaussian", lambda rng: rng.weibull(1.5, ENTRIES) * rng.choice([-1, 1], ENTRIES)),
    ],
)
def test_other_families_are_named_and_mapped_to_a_usable_one(
    family: str, usable: str, draw: Callable[[np.random.Generator], np.ndarray]
) -> None:
    fits = [fitted(torch.from_numpy(draw(np.random.default_rng(seed))), seed) for seed in range(SAMPLES)]
    assert [select(fit).family for fit in fits].count(family) >= 19
    assert [select(fit, USABLE).family for fit in fits].count(usable) >= 19


def test_the_simpler_family_is_rarely_refused_by_chance() -> None:
    gains = [fitted(student(1, seed, 4_000), seed).gains["student_t"]["cauchy"] for seed in range(100)]
    assert sum(gain.mean > STANDARD_ERRORS * gain.standard_error for gain in gains) <= 1


@pytest.mark.parametrize("tail_index", [0.7, 1.5, 4.0, 12.0])
def test_maximum_likelihood_agrees_with_scipy(tail_index: float) -> None:
    sample = 0.03 * student(tail_index, 3, 3_000)
    magnitudes, scale = standardised(sample)
    fit = fit_tail(magnitudes)
    x = sample.numpy()

    nu, _, s = stats.t.fit(x, floc=0)
    ours = fit.fits["student_t"].parameters
    likelihood = stats.t.logpdf(x, ours["tail_index"], scale=ours["scale"] * scale).sum()
    assert ours["tail_index"] == pytest.approx(nu, rel=2e-3)
    assert ours["scale"] * scale == pytest.approx(s, rel=2e-3)
    assert likelihood >= stats.t.logpdf(x, nu, scale=s).sum() - 1e-6 * abs(likelihood)

    k, _, s = stats.weibull_min.fit(abs(x), floc=0)
    assert fit.fits["weibull"].parameters["shape"] == pytest.approx(k, rel=1e-3)
    assert fit.fits["weibull"].parameters["scale"] * scale == pytest.approx(s, rel=1e-3)
    assert fit.fits["gaussian"].parameters["scale"] * scale == pytest.approx(stats.norm.fit(x, floc=0)[1])
    assert fit.fits["laplace"].parameters["scale"] * scale == pytest.approx(stats.laplace.fit(x, floc=0)[1])
    assert fit.fits["cauchy"].parameters["scale"] * scale == pytest.approx(stats.cauchy.fit(x, floc=0)[1], rel=2e-3)


def test_densities_likelihoods_and_distances_are_scipys() -> None:
    magnitudes, _ = standardised(student(3, 5, 1_000))
    x = magnitudes.numpy()
    fit = fit_tail(magnitudes)
    frozen = {
        "gaussian": lambda p: stats.norm(scale=p["scale"]),
        "laplace": lambda p: stats.laplace(scale=p["scale"]),
        "student_t": lambda p: stats.t(p["tail_index"], scale=p["scale"]),
        "cauchy": lambda p: stats.cauchy(scale=p["scale"]),
        "weibull": lambda p: stats.dweibull(p["shape"], scale=p["scale"]),
    }
    for name, family in FAMILIES.items():
        p = fit.fits[name].parameters
        theirs = frozen[name](p)
        log_density = family.log_density(magnitudes, p).numpy()
        np.testing.assert_allclose(log_density, theirs.logpdf(x), rtol=1e-9, atol=1e-9)
        assert fit.fits[name].log_likelihood == pytest.approx(theirs.logpdf(x).mean())
        assert fit.fits[name].bic == pytest.approx(len(p) * math.log(1_000) - 2 * theirs.logpdf(x).sum())
        distance = stats.kstest(x, lambda values, theirs=theirs: 2 * theirs.cdf(values) - 1).statistic
        assert fit.fits[name].ks == pytest.approx(distance, abs=1e-9)
        assert fit.fits[name].held_out < fit.fits[name].log_likelihood + 0.01


def test_the_student_t_fit_stands_where_the_likelihood_is_flat() -> None:
    for seed, tail_index in enumerate((0.3, 1.0, 2.5, 8.0, 40.0)):
        x, _ = standardised(student(tail_index, seed, 4_000))
        p = fit_student_t(x)
        log_density = FAMILIES["student_t"].log_density
        best = float(log_density(x, p).sum())
        for name in p:
            for factor in (0.99, 1.01):
                assert float(log_density(x, p | {name: p[name] * factor}).sum()) <= best


def test_bounded_entries_reach_the_gaussian_bound() -> None:
    uniform = torch.rand(5_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e-9
    fit = fit_tail(uniform)
    assert fit.fits["student_t"].parameters["tail_index"] == pytest.approx(TAIL_INDEX_BOUNDS[1])
    assert select(fit, USABLE).family == "gaussian"


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e9])
def test_units_change_scales_alone(factor: float) -> None:
    sample = student(2.5, 11, 5_000)
    assert select(fitted(sample)).family == select(fitted(sample * factor)).family
    unstandardised = fit_tail(sample.abs() * factor)
    for name, fit in unstandardised.fits.items():
        reference = fit_tail(sample.abs()).fits[name]
        assert fit.parameters["scale"] == pytest.approx(reference.parameters["scale"] * factor, rel=1e-6)
        assert fit.log_likelihood == pytest.approx(reference.log_likelihood - math.log(factor), abs=1e-6)
        assert fit.ks == pytest.approx(reference.ks, abs=1e-6)


def test_entries_of_one_residual_do_not_count_as_independent() -> None:
    sample = student(2.5, 4, 4_000).abs()
    clones = sample.repeat_interleave(5)
    origins = torch.arange(4_000).repeat_interleave(5)
    alone = fit_tail(clones).gains["student_t"]["gaussian"].standard_error
    clustered = fit_tail(clones, origins=origins).gains["student_t"]["gaussian"].standard_error
    assert clustered / alone == pytest.approx(math.sqrt(5), rel=0.05)


def test_one_far_entry_does_not_speak_for_the_gaussian() -> None:
    sample = student(1, 0, 2_000)
    sample[7] = 1e9
    assert select(fitted(sample), USABLE).family == "cauchy"


def test_a_sample_gives_the_same_fit_twice() -> None:
    magnitudes, _ = standardised(student(2, 9, 3_000))
    assert fit_tail(magnitudes, seed=5) == fit_tail(magnitudes, seed=5)
    assert fit_tail(magnitudes, seed=5).gains != fit_tail(magnitudes, seed=6).gains


def test_entries_that_cannot_be_fitted_are_refused() -> None:
    for bad in (torch.ones(50), torch.zeros(500), torch.full((500,), math.nan), torch.tensor([math.inf] * 500)):
        with pytest.raises(NumericsError):
            fit_tail(bad)
    with pytest.raises(NumericsError, match="one magnitude"):
        fit_tail(torch.ones(500))


# Residuals.


def textbook_residual(delta: torch.Tensor, theta: torch.Tensor, side: str) -> torch.Tensor:
    if side == "output":
        return delta.T @ (theta - delta)
    if side == "input":
        return (theta - delta) @ delta.T
    unit = delta / torch.linalg.matrix_norm(delta)
    residual: torch.Tensor = unit.T @ (theta - delta) @ unit.T
    return residual


@pytest.mark.parametrize("side", ["output", "input", "both"])
def test_residual_entries_are_those_of_the_textbook(side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 7, 11, generator=generator, dtype=torch.float64)
    references = torch.stack([deltas.mean(0), 0.4 * deltas.sum(0)])
    entries = residual_entries(deltas, references, side=side, count=10_000, generator=generator)
    for j, theta in enumerate(references):
        for i, delta in enumerate(deltas):
            whole = textbook_residual(delta, theta, side).flatten().sort().values
            torch.testing.assert_close(entries[j, i].sort().values, whole)


def test_a_sample_of_a_large_residual_has_its_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    deltas = torch.randn(2, 200, 400, generator=generator)
    reference = deltas.mean(0)
    sample = residual_entries(deltas, reference[None], side="output", count=2_000, generator=generator)
    assert sample.shape == (1, 2, 2_000)
    whole = textbook_residual(deltas[0], reference, "output")
    _, scale = standardised(sample[0, 0])
    assert scale == pytest.approx(float(whole.abs().median()), rel=0.1)
    again = residual_entries(
        deltas, reference[None], side="output", count=50, generator=torch.Generator().manual_seed(2)
    )
    same = residual_entries(
        deltas, reference[None], side="output", count=50, generator=torch.Generator().manual_seed(2)
    )
    assert torch.equal(again, same)


def test_an_all_zero_delta_contributes_nothing() -> None:
    deltas = torch.zeros(2, 6, 5)
    deltas[0] = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    for side in ("output", "input", "both"):
        entries = residual_entries(
            deltas, deltas.mean(0)[None], side=side, count=100, generator=torch.Generator().manual_seed(0)
        )
        magnitudes, scale = standardised(entries[0, 1])
        assert magnitudes.numel() == 0
        assert scale == 0.0
        assert standardised(entries[0, 0])[0].numel() == entries.shape[-1]


def test_exact_zeros_leave_the_fit_alone() -> None:
    sample = student(3, 2, 3_000)
    sparse = torch.cat([sample, torch.zeros(5_000, dtype=sample.dtype)])
    assert torch.equal(standardised(sample)[0], standardised(sparse)[0])


def test_residuals_of_bad_tensors_are_refused() -> None:
    deltas = torch.ones(1, 2, 2)
    generator = torch.Generator()
    with pytest.raises(NumericsError, match="Unknown side"):
        residual_entries(deltas, deltas, side="left", count=4, generator=generator)
    with pytest.raises(NumericsError, match="not finite"):
        residual_entries(deltas * math.nan, deltas, side="output", count=4, generator=generator)


# Hill.


def test_hill_is_the_textbooks_on_pareto_samples_and_its_interval_covers() -> None:
    covered = 0
    for seed in range(100):
        sample = torch.from_numpy(np.random.default_rng(seed).pareto(2.5, 5_000) + 1)
        curve = hill(sample)
        covered += curve.low[10] <= 2.5 <= curve.high[10]
        descending = np.sort(sample.numpy())[::-1]
        k = curve.k[10]
        assert curve.tail_index[10] == pytest.approx(k / np.sum(np.log(descending[:k] / descending[k])))
    assert 88 <= covered <= 100


@pytest.mark.parametrize("tail_index", [1.0, 2.0, 3.0])
def test_hill_reads_the_tail_index_of_a_student_t(tail_index: float) -> None:
    curve = hill(student(tail_index, 1, 200_000).abs())
    assert curve.tail_index[curve.chosen] == pytest.approx(tail_index, rel=0.15)
    assert all(low < mid < high for low, mid, high in zip(curve.low, curve.tail_index, curve.high, strict=True))
    assert list(curve.k) == sorted(set(curve.k))


def test_hill_does_not_know_units_and_refuses_what_has_no_tail() -> None:
    sample = student(2, 3, 5_000).abs()
    assert hill(sample).tail_index == pytest.approx(hill(sample * 1e-7).tail_index)
    with pytest.raises(NumericsError, match="Too few"):
        hill(sample[:50])
    with pytest.raises(NumericsError, match="all equal"):
        hill(torch.ones(500))


def test_the_histogram_is_a_density_of_both_signs() -> None:
    magnitudes, _ = standardised(student(1, 6, 200_000))
    centres, density = log_histogram(magnitudes)
    p = fit_tail(magnitudes).fits["cauchy"].parameters
    expected = FAMILIES["cauchy"].log_density(torch.tensor(centres, dtype=torch.float64), p).exp()
    middle = slice(5, 30)
    np.testing.assert_allclose(density[middle], expected[middle].numpy(), rtol=0.1)
