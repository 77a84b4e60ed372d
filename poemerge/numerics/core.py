"""One batch of equal shapes from task vectors to modes: units, scales, priors, and what became of each member."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from poemerge.numerics import solution as ended
from poemerge.numerics.adapters import LowRank
from poemerge.numerics.dual import DualOneSided, Grams
from poemerge.numerics.experts import Energy, Expert
from poemerge.numerics.majorise import Mode, find_mode, settled_gap
from poemerge.numerics.one_sided import OneSided, norm_sq
from poemerge.numerics.posterior import Posterior
from poemerge.numerics.settings import Settings
from poemerge.numerics.solution import Outcome, Solution
from poemerge.numerics.thin import ThinTwoSided
from poemerge.numerics.two_sided import TwoSided

__all__ = ["solve_core"]

_AnyDeltas = Float[Tensor, "batch expert k l"] | LowRank | Grams
_AnyProblem = OneSided | TwoSided | ThinTwoSided | DualOneSided

# "fitted" never takes experts to agree better than this fraction of ‖R_i(0)‖²: the scale must stay above zero.
_LEAST_FITTED = 1e-6


def solve_core(
    deltas: _AnyDeltas,
    size: tuple[int, int],
    scales: Float[Tensor, "batch expert"] | None,
    start: Float[Tensor, "batch k l"] | None,
    settings: Settings,
) -> list[Solution]:
    """Solve a batch; members that fail in float32 are solved again in float64, and fall back to the mean after that.

    For `Grams`, theta is the coefficients W of Θ = Σ P_i W_ij Q_jᵀ, and there is no posterior.
    """
    solutions = _solve_once(deltas, size, scales, start, settings)
    failed = [i for i, solution in enumerate(solutions) if not solution.outcome.ok]
    if failed and deltas.dtype != torch.float64:
        again = _solve_once(
            deltas[failed].double(),
            size,
            None if scales is None else scales[failed],
            None if start is None else start[failed].double(),
            settings.of(failed, torch.float64),
        )
        for i, solution in zip(failed, again, strict=True):
            solutions[i] = replace(solution, theta=solution.dense().to(deltas.dtype))
    return solutions


def _unit(given: _AnyDeltas) -> Float[Tensor, " batch"]:
    """A power of two near the deltas' common size, float64: divided out it changes no digit, and nothing overflows."""
    if isinstance(given, LowRank | Grams):
        largest = given.sizes.amax(-1)
        least = torch.finfo(torch.float64).tiny
    else:
        low, high = torch.aminmax(given.flatten(1), dim=1)
        largest, least = torch.maximum(-low, high), torch.finfo(given.dtype).tiny
    return torch.exp2(torch.log2(torch.where(largest > 0, largest.clamp_min(least), 1.0).double()).round())


def _problem(
    given: _AnyDeltas,
    unit: Float[Tensor, " batch"],
    size: tuple[int, int],
    settings: Settings,
) -> tuple[_AnyProblem, Float[Tensor, "batch expert"]]:
    """The problem of the deltas divided by `unit`, and their ‖A_i‖²."""
    rows, columns = size if settings.side != "input" else size[::-1]
    if isinstance(given, Grams):
        dual = DualOneSided(given.mT if settings.side == "input" else given, unit, rows)
        return dual, dual.norm_sq
    if isinstance(given, LowRank):
        assert settings.side == "both"
        assert settings.pooling is not None
        thin = ThinTwoSided(given.over(unit), rows * columns, settings.pooling)
        return thin, thin.norm_sq
    deltas = given * (1 / unit).to(given.dtype)[:, None, None, None]
    if settings.side == "input":
        deltas = deltas.mT.contiguous()
    if settings.side == "both":
        assert settings.pooling is not None
        return TwoSided(deltas, rows * columns, settings.pooling, settings.sensitivity), norm_sq(deltas)
    return OneSided(deltas, rows), norm_sq(deltas)


def _solve_once(
    given: _AnyDeltas,
    size: tuple[int, int],
    scales: Float[Tensor, "batch expert"] | None,
    start: Float[Tensor, "batch k l"] | None,
    settings: Settings,
) -> list[Solution]:
    expert = Expert.of(settings.expert, settings.tail_index)
    unit = _unit(given)
    problem, task_norm_sq = _problem(given, unit, size, settings)
    degree = problem.residual_degree
    # Also absent is an expert so much smaller than the others that its Gram matrix underflows.
    present = (problem.trace > 0) & (problem.start_residual_sq > 0)

    def prior_at(weights: Tensor) -> Tensor:
        if settings.prior == "absolute":
            return settings.prior_precision * unit.square()
        return settings.prior_precision * problem.mean_diagonal(weights)

    # Gaussian experts have their weights, and so the mode, at once; only a fitted scale needs a residual first.
    at_once = expert.quadratic and (isinstance(settings.scale, Tensor) or settings.scale != "fitted")
    scale_sq = _scale_sq(settings, problem, task_norm_sq, unit, None, present, scales) if at_once else None
    ok = torch.ones(len(given), dtype=torch.bool, device=unit.device)
    if start is not None:
        assert not isinstance(problem, DualOneSided)
        oriented = start.mT if settings.side == "input" else start
        theta = problem.enter(oriented / unit.to(start.dtype)[:, None, None])
    elif settings.init == "mean":
        theta = problem.reference
    else:
        if scale_sq is None:
            first = present * unit.unsqueeze(-1) ** (2 * degree)
        else:
            first = torch.where(present, expert.weight(torch.zeros_like(scale_sq), scale_sq), 0.0)
        theta, ok = problem.minimise(first, prior_at(first), None, settings.rtol)
    rows = problem.recentre(theta, problem.rows(theta))
    residual_sq = rows[:, :-1]
    if scale_sq is None:
        scale_sq = _scale_sq(settings, problem, task_norm_sq, unit, residual_sq, present, scales)
    prior = prior_at(torch.where(present, expert.weight(residual_sq, scale_sq), 0.0))
    energy = Energy(expert, scale_sq, prior, present)
    at_mode = at_once and start is None and settings.init == "gaussian"
    mode = find_mode(
        problem,
        energy,
        theta=theta,
        rows=rows,
        max_steps=0 if at_mode else (1 if expert.quadratic else settings.max_steps),
        rtol=settings.rtol,
        accelerate=settings.accelerate,
    )
    theta = problem.leave(mode.theta)
    if settings.side == "input":
        theta = theta.mT
    theta = theta * unit.to(given.dtype)[:, None, None]
    weights = energy.weights(mode.residual_sq) / unit.unsqueeze(-1) ** (2 * degree)
    prior = prior / unit.square()
    ok = ok & mode.ok & norm_sq(theta).isfinite()
    return [
        _member(
            i,
            _outcome(i, bool(ok[i]), bool(present[i].any()), mode, expert, settings),
            given,
            theta,
            weights,
            prior,
            mode,
            settings,
        )
        for i in range(len(given))
    ]


def _scale_sq(
    settings: Settings,
    problem: _AnyProblem,
    task_norm_sq: Float[Tensor, "batch expert"],
    unit: Float[Tensor, " batch"],
    residual_sq: Float[Tensor, "batch expert"] | None,
    present: Bool[Tensor, "batch expert"],
    scales: Float[Tensor, "batch expert"] | None,
) -> Float[Tensor, "batch expert"]:
    """γ_i², in the units of the deltas divided by `unit`; 1 where the expert is absent. Fitted needs the residuals."""
    degree = problem.residual_degree
    if scales is not None:
        scale_sq = (scales / unit.unsqueeze(-1) ** degree).square()
    elif settings.scale == "task-norm":
        scale_sq = settings.scale_factor * task_norm_sq * unit.unsqueeze(-1) ** (2 - 2 * degree)
    elif settings.scale == "common":
        total = torch.where(present, problem.start_residual_sq, 0.0).sum(-1, keepdim=True)
        scale_sq = settings.scale_factor * total / present.sum(-1, keepdim=True).clamp_min(1)
    else:
        scale_sq = settings.scale_factor * problem.start_residual_sq
        if settings.scale == "fitted":
            assert residual_sq is not None
            ratio = torch.where(present, residual_sq / problem.start_residual_sq, torch.nan)
            median = ratio.nanquantile(0.5, dim=-1, keepdim=True).nan_to_num(1.0).clamp_min(_LEAST_FITTED)
            scale_sq = scale_sq * median
    return torch.where(present, scale_sq, 1.0)


def _outcome(index: int, ok: bool, present: bool, mode: Mode, expert: Expert, settings: Settings) -> Outcome:
    if not present:
        return ended.EMPTY
    if not ok:
        return ended.FAILED
    if expert.quadratic:
        return ended.CLOSED_FORM
    if bool(mode.gap[index] <= settled_gap(mode.theta.dtype, settings.rtol)):
        return ended.CONVERGED
    return ended.ROUNDING if bool(mode.exhausted[index]) else ended.STEP_LIMIT


def _member(
    index: int,
    outcome: Outcome,
    given: _AnyDeltas,
    theta: Tensor,
    weights: Tensor,
    prior: Tensor,
    mode: Mode,
    settings: Settings,
) -> Solution:
    steps = int(mode.steps[index])
    own, own_weights = theta[index], weights[index]
    energy = torch.stack(mode.trace[: steps + 1])[:, index]
    if outcome is ended.EMPTY:
        own, own_weights, energy = torch.zeros_like(own), torch.zeros_like(own_weights), torch.zeros_like(energy[:1])
    elif outcome is ended.CLOSED_FORM:
        steps = 1
    elif not outcome.ok:
        mean = given.mean()[index] if isinstance(given, Grams) else _matrices(given, index).mean(0)
        own, own_weights, energy = mean, torch.zeros_like(own_weights), energy[:1]

    def posterior() -> Posterior:
        assert not isinstance(given, Grams)
        minded = None if settings.sensitivity is None else settings.sensitivity[index].double()
        matrices = _matrices(given, index).double()
        pooling = settings.pooling[index].double() if isinstance(settings.pooling, Tensor) else settings.pooling or 0.0
        return Posterior(own, settings.side, matrices, own_weights, prior[index], pooling, minded)

    return Solution(own, outcome, steps, energy, own_weights, prior[index], make_posterior=posterior)


def _matrices(given: Tensor | LowRank, index: int) -> Float[Tensor, "expert k l"]:
    """One member's task vectors as matrices."""
    member: Tensor = given[[index]].dense()[0] if isinstance(given, LowRank) else given[index]
    return member
