"""Laws of the solver: what must hold for any deltas, shapes, scales, families and sides."""

import itertools
import math
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from poemerge import Factored, Solution, solve
from poemerge.errors import BadInputError, NumericsError
from poemerge.numerics.majorise import find_mode
from poemerge.numerics.one_sided import OneSided, gram

SIDES = ("output", "input", "both")
LAW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@st.composite
def problems(draw: Any, most_experts: int = 8) -> Tensor:
    """Random deltas `[expert, out, in]` in float64: any rank, experts of unequal size."""
    experts = draw(st.integers(1, most_experts))
    rows, columns = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    rank = draw(st.integers(1, min(rows, columns)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(experts, rows, rank) @ normal(experts, rank, columns) * torch.exp(0.7 * normal(experts, 1, 1))


@st.composite
def choices(draw: Any) -> dict[str, Any]:
    """Settings of a solve, over families, scales, priors and sides."""
    family = draw(st.sampled_from(["gaussian", "student_t", "cauchy"]))
    return {
        "expert": family,
        "tail_index": draw(st.floats(0.5, 20)) if family == "student_t" else None,
        "scale": draw(st.sampled_from(["common", "task-norm", "gram-norm", "fitted"])),
        "scale_factor": 10 ** draw(st.floats(-2, 0.5)),
        "prior_precision": 10 ** draw(st.floats(-3, -1)),
        "side": draw(st.sampled_from(SIDES)),
        "pooling": draw(st.sampled_from([0.0, 0.3, 1.0])),
    }


def input_grams(unit: Tensor, pooling: float) -> Tensor:
    """(1 − y) Â_iᵀÂ_i + y·mean_j Â_jᵀÂ_j, from the definition."""
    grams = unit.mT @ unit
    return (1 - pooling) * grams + pooling * grams.mean(0)


def apart(theta: Tensor, reference: Tensor) -> float:
    """‖Θ − reference‖ / ‖reference‖."""
    return float((theta - reference).norm() / reference.norm().clamp_min(1e-300))


def tight(deltas: Any, **chosen: Any) -> Solution:
    """A solve to many digits; plain steps, whose path does not depend on rounding as an extrapolation does."""
    return solve(deltas, **{"rtol": 1e-10, "max_steps": 2000, "accelerate": False, **chosen})


@LAW
@given(problems(), choices(), st.sampled_from([torch.float32, torch.float64]), st.integers(-6, 3), st.booleans())
def test_energy_never_rises(
    deltas: Tensor, chosen: dict[str, Any], dtype: torch.dtype, power: int, accelerate: bool
) -> None:
    solution = solve((deltas * 10.0**power).to(dtype), accelerate=accelerate, **chosen)
    assert solution.outcome.ok
    assert solution.theta.dtype == dtype
    assert bool((solution.energy.diff() <= 0).all())
    if chosen["expert"] != "gaussian":
        assert len(solution.energy) == solution.steps + 1


@LAW
@given(problems(), choices())
def test_the_energy_is_the_one_of_theta(deltas: Tensor, chosen: dict[str, Any]) -> None:
    """E recomputed from the definition at the theta that is returned; the weights are ρ′ there."""
    scales = torch.linspace(0.5, 2.0, len(deltas), dtype=torch.float64) * deltas.norm(dim=(1, 2))
    chosen = {**chosen, "scale": scales}
    solution = solve(deltas, rtol=1e-8, **chosen)
    theta = solution.theta
    unit = deltas / deltas.norm(dim=(1, 2), keepdim=True)
    gap = theta - deltas
    residual_sq = {
        "output": (deltas.mT @ gap).square(),
        "input": (gap @ deltas.mT).square(),
        "both": (unit @ unit.mT @ gap @ input_grams(unit, chosen["pooling"])) * gap,
    }[chosen["side"]].sum((1, 2))
    ratio = residual_sq / scales.square()
    tail = {"gaussian": math.inf, "cauchy": 1.0, "student_t": chosen["tail_index"]}[chosen["expert"]]
    if math.isinf(tail):
        rho, weights = ratio / 2, 1 / (2 * scales.square())
    else:
        rho = (tail + 1) / 2 * torch.log1p(ratio / tail)
        weights = (tail + 1) / (2 * scales.square() * (tail + ratio))
    energy = rho.sum() + solution.prior_precision * theta.square().sum()
    assert float(solution.energy[-1]) == pytest.approx(float(energy), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(solution.weights, weights, rtol=1e-5, atol=0)


@LAW
@given(problems(), choices())
def test_theta_is_stationary(deltas: Tensor, chosen: dict[str, Any]) -> None:
    """At a converged theta the normal equations hold with the weights of theta itself."""
    solution = solve(deltas, rtol=1e-9, max_steps=500, **chosen)
    theta, weights = solution.theta, solution.weights[:, None, None]
    if chosen["side"] == "both":
        unit = deltas / deltas.norm(dim=(1, 2), keepdim=True)
        pull = weights * (unit @ unit.mT @ (deltas - theta) @ input_grams(unit, chosen["pooling"]))
    elif chosen["side"] == "output":
        pull = weights * (deltas @ deltas.mT @ (deltas - theta))
    else:
        pull = weights * ((deltas - theta) @ deltas.mT @ deltas)
    if solution.outcome.code in {"converged", "closed-form"}:
        balance = pull.sum(0) - solution.prior_precision * theta
        assert float(balance.norm()) <= 1e-5 * float(pull.norm(dim=(1, 2)).sum())


@LAW
@given(problems(), choices(), st.randoms(use_true_random=False))
def test_permuting_experts_changes_nothing(deltas: Tensor, chosen: dict[str, Any], random: Any) -> None:
    order = list(range(len(deltas)))
    random.shuffle(order)
    first, second = tight(deltas, **chosen), tight(deltas[order], **chosen)
    assert apart(second.theta, first.theta) < 1e-6
    torch.testing.assert_close(second.weights, first.weights[order], rtol=1e-5, atol=0)


@LAW
@given(problems(1), st.integers(1, 32), choices())
def test_identical_experts_give_that_expert(deltas: Tensor, count: int, chosen: dict[str, Any]) -> None:
    """As the prior vanishes; one expert alone is the case of a count of one. Its unseen directions are zero anyway."""
    values = torch.linalg.svdvals(deltas[0])
    power = 4 if chosen["side"] == "both" else 2
    seen = (values[values > 1e-9 * values[0]] / values[0]).min() ** power
    prior = 1e-9 * float(seen)
    solution = tight(deltas.expand(count, -1, -1), **{**chosen, "prior_precision": prior})
    assert apart(solution.theta, deltas[0]) < 1e-4


@LAW
@given(problems(), choices(), st.floats(-6, 3))
def test_scale_equivariance(deltas: Tensor, chosen: dict[str, Any], power: float) -> None:
    """Merging c·A gives c·merge(A) for the scales that follow the deltas; on both sides task-norm is one of them."""
    if chosen["scale"] == "task-norm" and chosen["side"] != "both":
        chosen = {**chosen, "scale": "gram-norm"}
    factor = 10.0**power
    first, second = tight(deltas, **chosen), tight(deltas * factor, **chosen)
    assert apart(second.theta / factor, first.theta) < 1e-5


@LAW
@given(problems(), choices())
def test_transposing_swaps_the_sides(deltas: Tensor, chosen: dict[str, Any]) -> None:
    """Unless the input side alone is pooled."""
    chosen = {**chosen, "pooling": 0.0}
    swapped = {"output": "input", "input": "output", "both": "both"}[chosen["side"]]
    # Pooling is of the input side alone.
    chosen = {**chosen, "pooling": 0.0}
    first = tight(deltas, **chosen)
    second = tight(deltas.mT, **{**chosen, "side": swapped})
    assert apart(second.theta.mT, first.theta) < 1e-6


@LAW
@given(problems(), choices(), st.data())
def test_zero_deltas_contribute_nothing(deltas: Tensor, chosen: dict[str, Any], data: Any) -> None:
    place = data.draw(st.integers(0, len(deltas)))
    padded = torch.cat([deltas[:place], torch.zeros_like(deltas[:1]), deltas[place:]])
    first, second = tight(deltas, **chosen), tight(padded, **chosen)
    assert float(second.weights[place]) == 0
    assert apart(second.theta, first.theta) < 1e-6


@LAW
@given(problems(), choices())
def test_student_t_limits(deltas: Tensor, chosen: dict[str, Any]) -> None:
    """ν = 1 is the Cauchy expert, ν → ∞ the Gaussian."""
    chosen = {key: value for key, value in chosen.items() if key not in {"expert", "tail_index"}}
    cauchy = tight(deltas, expert="cauchy", **chosen)
    assert apart(tight(deltas, expert="student_t", tail_index=1.0, **chosen).theta, cauchy.theta) < 1e-8
    gaussian = tight(deltas, expert="gaussian", **chosen)
    assert apart(tight(deltas, expert="student_t", tail_index=1e12, **chosen).theta, gaussian.theta) < 1e-5


@LAW
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), choices(), st.integers(0, 2**32), st.booleans())
def test_factored_equals_dense(ranks: list[int], chosen: dict[str, Any], seed: int, shared: bool) -> None:
    """Ranks differ, subspaces may be shared, and together they may exceed the matrix."""
    generator = torch.Generator().manual_seed(seed)
    adapters = [
        (
            torch.randn(12, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, 9, generator=generator, dtype=torch.float64),
            0.5,
        )
        for rank in ranks
    ]
    if shared:
        adapters.append((adapters[0][0], 2 * adapters[0][1], 1.0))
    dense = torch.stack([scaling * (b @ a) for b, a, scaling in adapters])
    factored, whole = tight(adapters, **chosen), tight(dense, **chosen)
    assert isinstance(factored.theta, Factored)
    assert factored.theta.shape == whole.theta.shape
    # Where experts share every direction but the prior's, tight scales make nearly flat energies: 1e-5 is the law.
    assert apart(factored.dense(), whole.theta) < 1e-5
    assert float(factored.energy[-1]) == pytest.approx(float(whole.energy[-1]), rel=1e-6)


@LAW
@given(problems(4), choices(), st.integers(1, 4))
def test_batching_changes_nothing(deltas: Tensor, chosen: dict[str, Any], count: int) -> None:
    """A batch is what its members are alone, bit for bit on a CPU, in any leading shape."""
    batch = torch.stack([deltas * (1 + 0.1 * index) + 0.01 * index for index in range(count)])
    together = solve(batch, **chosen)
    alone = [solve(one, **chosen) for one in batch]
    assert torch.equal(together.theta, torch.stack([one.theta for one in alone]))
    assert torch.equal(together.weights, torch.stack([one.weights for one in alone]))
    assert together.steps == max(one.steps for one in alone)
    assert [member.outcome for member in together.unbind()] == [one.outcome for one in alone]
    nested = solve(batch.unsqueeze(1), **chosen)
    assert torch.equal(nested.theta.squeeze(1), together.theta)
    assert nested.energy.shape == (*together.energy.shape[:1], count, 1)


@LAW
@given(problems(4), choices(), st.integers(2, 4))
def test_the_batched_core_equals_one_by_one(deltas: Tensor, chosen: dict[str, Any], count: int) -> None:
    """The path that a GPU takes: members of one batch, which end at different steps, do not touch each other."""
    from poemerge.numerics.core import solve_core
    from poemerge.numerics.settings import Settings

    batch = torch.stack([deltas * (1 + 0.3 * index) + 0.02 * index for index in range(count)])
    wanted = Settings(
        **{"prior": "relative", "init": "gaussian", "max_steps": 2000, "rtol": 1e-9, "accelerate": False, **chosen}
    )
    size = (batch.shape[-2], batch.shape[-1])
    together = solve_core(batch, size, None, None, wanted)
    for member, one in zip(together, batch, strict=True):
        alone = tight(one, **{**chosen, "rtol": 1e-9})
        assert apart(member.dense(), alone.theta) < 1e-3
        assert float(member.energy[-1]) == pytest.approx(float(alone.energy[-1]), rel=1e-7)
        assert bool((member.energy.diff() <= 0).all())


@LAW
@given(problems(), choices())
def test_accelerated_ends_no_higher_than_plain(deltas: Tensor, chosen: dict[str, Any]) -> None:
    plain = solve(deltas, max_steps=2000, accelerate=False, **chosen)
    fast = solve(deltas, max_steps=2000, **chosen)
    bound = float(plain.energy[-1])
    assert float(fast.energy[-1]) <= bound + 1e-6 * abs(bound) + 1e-12


def test_accelerated_needs_half_of_the_steps_of_a_stiff_problem(stiff: Tensor) -> None:
    plain = solve(stiff, side="output", scale="task-norm", scale_factor=1e-3, max_steps=2000, accelerate=False)
    fast = solve(stiff, side="output", scale="task-norm", scale_factor=1e-3, max_steps=2000)
    assert plain.outcome.code == fast.outcome.code == "converged"
    assert 2 * fast.steps <= plain.steps
    assert apart(fast.theta, plain.theta) < 1e-5


@pytest.fixture
def stiff() -> Tensor:
    """Power-law spectra with shared subspaces, as fine-tuned models have them."""
    generator = torch.Generator().manual_seed(0)

    def basis(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]

    left, right = basis(64), basis(64)
    spectrum = torch.arange(1, 65, dtype=torch.float64) ** -0.7
    return torch.stack(
        [
            torch.linalg.qr(left + basis(64))[0] * spectrum @ torch.linalg.qr(right + basis(64))[0].mT * 0.6 * size
            for size in (0.7, 0.9, 1.0, 1.1, 1.3, 0.8, 1.2, 1.0)
        ]
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused_by_the_name_of_the_expert(side: str, value: float) -> None:
    deltas = torch.ones(3, 4, 5)
    deltas[1, 2, 3] = value
    with pytest.raises(NumericsError, match="expert 1 of 3"):
        solve(deltas, side=side)
    adapters = [(torch.ones(4, 2), torch.ones(2, 5), 1.0) for _ in range(3)]
    adapters[2][1][0, 0] = value
    with pytest.raises(NumericsError, match=r"expert 2 of 3.*factor A"):
        solve(adapters, side=side)


def test_deltas_that_do_not_fit_are_refused() -> None:
    with pytest.raises(NumericsError, match="floating point"):
        solve(torch.ones(3, 4, 5, dtype=torch.int64))
    with pytest.raises(NumericsError, match="expert, out, in"):
        solve(torch.ones(4, 5))
    with pytest.raises(NumericsError, match="at least one"):
        solve([])
    with pytest.raises(NumericsError, match="expert 1 of 2"):
        solve([(torch.ones(4, 2), torch.ones(2, 5), 1.0), (torch.ones(4, 2), torch.ones(3, 5), 1.0)])


def test_all_wrong_settings_are_listed_at_once() -> None:
    with pytest.raises(BadInputError) as caught:
        solve(torch.ones(2, 3, 3), expert="student_t", scale="norm", scale_factor=-1.0, max_steps=0, rtol=2.0)
    wrong = {problem.where for problem in caught.value.problems}
    assert wrong == {"tail_index", "scale", "scale_factor", "max_steps", "rtol"}
    with pytest.raises(BadInputError, match="tail_index"):
        solve(torch.ones(2, 3, 3), tail_index=2.0)
    with pytest.raises(BadInputError, match="scale"):
        solve(torch.ones(2, 3, 3), scale=torch.tensor([1.0, 0.0]))
    with pytest.raises(BadInputError, match="scale"):
        solve(torch.ones(2, 3, 3), scale=torch.ones(3))
    with pytest.raises(BadInputError, match="init"):
        solve(torch.ones(2, 3, 3), init=torch.ones(2, 2))


@pytest.mark.parametrize("side", SIDES)
def test_a_solve_that_fails_says_so_and_gives_the_mean(side: str) -> None:
    """Without a prior, a rank-one expert leaves the system singular."""
    deltas = torch.ones(2, 4, 4)
    solution = solve(deltas, side=side, prior_precision=0.0)
    if side == "both":  # conjugate gradients need no inverse: they give the solution of least norm
        torch.testing.assert_close(solution.theta, deltas.mean(0))
        return
    assert solution.outcome.code == "failed"
    assert not solution.outcome.ok
    assert "prior_precision" in solution.outcome.next_step
    assert torch.equal(solution.theta, deltas.mean(0))


@pytest.mark.parametrize("side", SIDES)
def test_nothing_to_merge_is_zero(side: str) -> None:
    solution = solve(torch.zeros(3, 4, 5), side=side)
    assert solution.outcome.code == "empty"
    assert torch.equal(solution.theta, torch.zeros(4, 5))
    assert torch.equal(solution.weights, torch.zeros(3, dtype=torch.float64))
    assert bool(solution.energy.isfinite().all())


def test_one_bad_member_of_a_batch_does_not_hide() -> None:
    batch = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    batch[1] = 1.0
    solution = solve(batch, side="output", scale="task-norm", scale_factor=0.01, prior_precision=0.0, max_steps=500)
    assert solution.outcome.code == "failed"
    assert [member.outcome.ok for member in solution.unbind()] == [True, False, True]


def test_the_step_limit_is_told(stiff: Tensor) -> None:
    solution = solve(stiff, side="output", scale="task-norm", scale_factor=1e-3, max_steps=2)
    assert solution.outcome.code == "step-limit"
    assert solution.outcome.ok
    assert solution.steps == 2
    assert "max_steps" in solution.outcome.next_step


def test_narrow_dtypes_are_worked_on_in_float32() -> None:
    deltas = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    solution = solve(deltas)
    assert solution.theta.dtype == torch.float32
    torch.testing.assert_close(solution.theta, solve(deltas.float()).theta)


def test_autocast_and_matmul_precision_have_no_say() -> None:
    deltas = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = solve(deltas)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solution = solve(deltas)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(solution.theta, expected.theta)


def test_a_named_start_is_where_the_energy_begins(stiff: Tensor) -> None:
    theta = solve(stiff).theta
    again = solve(stiff, side="output", init=theta, scale=torch.ones(8), prior="absolute", prior_precision=1e-3)
    residual_sq = (stiff.mT @ (theta - stiff)).square().sum((1, 2))
    energy = residual_sq.log1p().sum() + 1e-3 * theta.square().sum()
    assert float(again.energy[0]) == pytest.approx(float(energy), rel=1e-9)


def test_an_outlier_is_outvoted() -> None:
    """Seven experts near one delta and one of noise, three times as long: Cauchy gives it the least say."""
    generator = torch.Generator().manual_seed(0)
    common = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    deltas = torch.stack([common + 0.02 * torch.randn(16, 16, generator=generator) for _ in range(7)])
    noise = torch.randn(16, 16, generator=generator)
    deltas = torch.cat([deltas, (3 * common.norm() / noise.norm() * noise)[None]])
    for side in SIDES:
        cauchy = solve(deltas, scale="gram-norm", scale_factor=0.01, side=side)
        share = cauchy.weights * deltas.norm(dim=(1, 2)) ** (2 if side != "both" else 0)
        assert int(share.argmin()) == 7
        assert apart(cauchy.theta, common) < 0.5 * apart(deltas.mean(0), common)


@pytest.mark.parametrize("side", ["output", "input"])
def test_posterior_samples_have_the_precision_that_is_said(side: str) -> None:
    deltas = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = solve(deltas, side=side, prior_precision=0.1)
    posterior = solution.posterior
    grams = deltas @ deltas.mT if side == "output" else deltas.mT @ deltas
    expected = 2 * (solution.weights[:, None, None] * grams).sum(0)
    expected += 2 * solution.prior_precision * torch.eye(len(expected), dtype=torch.float64)
    torch.testing.assert_close(posterior.precision, expected)
    assert posterior.mean_precision == pytest.approx(float(expected.diagonal().mean()))
    samples = posterior.sample(20_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(samples, posterior.sample(20_000, generator=torch.Generator().manual_seed(1)))
    spread = samples - solution.theta
    covariance = (spread @ spread.mT if side == "output" else spread.mT @ spread).mean(0)
    other = spread.shape[-1] if side == "output" else spread.shape[-2]
    torch.testing.assert_close(covariance / other, expected.inverse(), rtol=0.1, atol=0.02 * float(covariance.max()))
    cold = posterior.sample(2_000, generator=torch.Generator().manual_seed(1), temperature=0.01) - solution.theta
    assert float(cold.std() / spread.std()) == pytest.approx(0.1, rel=0.1)


def test_two_sided_posterior_samples_have_the_kronecker_covariance() -> None:
    deltas = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = solve(deltas, side="both", prior_precision=0.1)
    unit = deltas / deltas.norm(dim=(1, 2), keepdim=True)
    precision = 2 * solution.prior_precision * torch.eye(6, dtype=torch.float64)
    for weight, one in zip(solution.weights, unit, strict=True):
        pooled = 0.7 * one.mT @ one + 0.3 * (unit.mT @ unit).mean(0)
        precision += 2 * weight * torch.kron(one @ one.mT, pooled)
    posterior = solution.posterior
    assert posterior.mean_precision == pytest.approx(float(precision.diagonal().mean()))
    with pytest.raises(ValueError, match="both"):
        _ = posterior.precision
    samples = posterior.sample(2_000, generator=torch.Generator().manual_seed(0))
    spread = (samples - solution.theta).flatten(1)
    covariance = spread.mT @ spread / len(spread)
    torch.testing.assert_close(covariance, precision.inverse(), rtol=0.15, atol=0.05 * float(covariance.max()))


def test_factored_posterior_stays_in_the_adapters_subspaces() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [(torch.randn(9, 2, generator=generator), torch.randn(2, 7, generator=generator), 1.0) for _ in range(2)]
    solution = solve(adapters)
    samples = solution.posterior.sample(3, generator=torch.Generator().manual_seed(0))
    assert isinstance(samples, Factored)
    assert samples.dense().shape == (3, 9, 7)
    basis = torch.linalg.qr(torch.cat([b for b, _, _ in adapters], 1))[0]
    outside = samples.dense() - basis @ (basis.mT @ samples.dense())
    assert float(outside.norm()) < 1e-5 * float(samples.dense().norm())
    with pytest.raises(ValueError, match="unbind"):
        _ = solve(torch.randn(2, 2, 3, 3)).posterior


def test_a_gram_matrix_in_blocks_is_the_gram_matrix() -> None:
    matrices = torch.randn(2, 601, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gram(matrices), matrices @ matrices.mT)


def test_the_float32_error_is_below_the_textbooks(stiff: Tensor) -> None:
    """Against float64: the textbook step in float32 throughout, on the same float32 deltas."""
    deltas = stiff.float()
    chosen = {"scale": "task-norm", "scale_factor": 0.01, "prior": "absolute", "prior_precision": 1e-3}
    exact = tight(deltas.double(), **chosen).theta
    grams = deltas @ deltas.mT
    scale_sq = 0.01 * deltas.square().sum((1, 2))
    weights = torch.ones(8)
    for _ in range(200):
        matrix = (weights[:, None, None] * grams).sum(0) + 1e-3 * torch.eye(64)
        theta = torch.linalg.solve(matrix, (weights[:, None, None] * (grams @ deltas)).sum(0))
        weights = 1 / (scale_sq + (deltas.mT @ (theta - deltas)).square().sum((1, 2)))
    assert apart(solve(deltas, **chosen).theta.double(), exact) <= apart(theta.double(), exact)


def test_find_mode_keeps_the_start_when_no_step_is_allowed(stiff: Tensor) -> None:
    from poemerge.numerics.experts import Energy, Expert

    problem = OneSided(stiff.unsqueeze(0), 64)
    energy = Energy(
        Expert(1.0), torch.ones(1, 8, dtype=torch.float64), torch.ones(1).double(), torch.ones(1, 8, dtype=torch.bool)
    )
    start = stiff[:1]
    mode = find_mode(problem, energy, theta=start, rows=problem.rows(start), max_steps=0, rtol=1e-6, accelerate=True)
    assert torch.equal(mode.theta, start)
    assert int(mode.steps) == 0


def test_importing_poemerge_does_not_import_torch() -> None:
    code = "import sys, poemerge; assert 'torch' not in sys.modules; poemerge.solve; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import poemerge.baselines as b; from poemerge import solve, Solution, Outcome, Posterior; b.mean"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shapes_hold_at_run_time() -> None:
    """Every annotated shape in the numerics, checked by jaxtyping and beartype on calls of each kind."""
    script = """
    from jaxtyping import TypeCheckError, install_import_hook

    names = "solver solution experts majorise anderson subspace one_sided two_sided dual thin adapters posterior "
    names += "baselines precision"
    with install_import_hook([f"poemerge.numerics.{name}" for name in names.split()], "beartype.beartype"):
        import poemerge.numerics.baselines as baselines
        import poemerge.numerics.solver as solver
    import torch

    deltas = torch.randn(2, 3, 6, 5)
    adapters = [(torch.randn(6, rank), torch.randn(rank, 5), 1.0) for rank in (1, 2)]
    generator = torch.Generator().manual_seed(0)
    for side in ("output", "input", "both"):
        for family in ("gaussian", "cauchy"):
            solver.solve(deltas, side=side, expert=family, row_blocks="square")
            solver.solve(deltas, side=side, expert=family).unbind()[0].posterior.sample(2, generator=generator)
            solver.solve(adapters, side=side, expert=family).posterior.sample(2, generator=generator).dense()
    for name in ("tsv_m", "iso_c", "wudi", "wudi_descent", "karcher"):
        getattr(baselines, name)(deltas)
    baselines.slerp(deltas[:, :2])
    for name in ("mean", "ties", "task_arithmetic"):
        getattr(baselines, name)(deltas[0])
    baselines.dare_ties(deltas[0], seed=0)
    try:
        solver.solve(deltas.long())
    except TypeCheckError:
        print("checked")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "checked\n"


@pytest.mark.gpu
@pytest.mark.parametrize(("side", "family"), itertools.product(SIDES, ["gaussian", "cauchy"]))
def test_gpu_equals_cpu(stiff: Tensor, side: str, family: str) -> None:
    batch = torch.stack([stiff, 2 * stiff, stiff.flip(1)])
    chosen = {"side": side, "expert": family, "scale": "gram-norm", "scale_factor": 0.1, "prior_precision": 1e-2}
    assert apart(solve(batch.cuda(), **chosen).theta.cpu(), solve(batch, **chosen).theta) < 1e-5
    single = batch.float()
    assert apart(solve(single.cuda(), **chosen).theta.cpu(), solve(single, **chosen).theta) < 1e-3
