"""`solve`: the mode of a product of experts over one weight matrix, or a batch of equal shapes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from poemerge.errors import BadInputError, NumericsError, Problem
from poemerge.numerics import solution as ended
from poemerge.numerics.adapters import Adapter, Adapters, LowRank, not_finite
from poemerge.numerics.experts import Energy, Expert, Family
from poemerge.numerics.majorise import Mode, find_mode, settled_gap
from poemerge.numerics.one_sided import OneSided, norm_sq
from poemerge.numerics.posterior import Posterior, Side
from poemerge.numerics.precision import full_precision, working_dtype
from poemerge.numerics.solution import Basis, Factored, Outcome, Solution, join
from poemerge.numerics.thin import ThinOneSided, ThinTwoSided
from poemerge.numerics.two_sided import TwoSided

__all__ = ["Adapter", "solve"]

_AnyProblem = OneSided | TwoSided | ThinOneSided | ThinTwoSided
Scale = Literal["common", "task-norm", "gram-norm", "fitted"]
Prior = Literal["relative", "absolute"]

# "fitted" never takes experts to agree better than this fraction of ‖R_i(0)‖²: the scale must stay above zero.
_LEAST_FITTED = 1e-6
# Adapters are worked on through their rank where their joint span is at least this many times as wide.
THIN = 3
# From this rtol on the small problem of float32 adapters runs in float32, else in float64.
FLOAT32_RTOL = 1e-3


def solve(
    deltas: Float[Tensor, "*batch expert out in"] | Sequence[Adapter] | Adapters,
    *,
    expert: Family = "cauchy",
    tail_index: float | None = None,
    scale: Scale | Float[Tensor, "*batch expert"] = "common",
    scale_factor: float = 0.1,
    prior: Prior = "relative",
    prior_precision: float = 1e-2,
    side: Side = "both",
    pooling: float = 0.5,
    init: Literal["gaussian", "mean"] | Float[Tensor, "*batch out in"] = "gaussian",
    max_steps: int = 50,
    rtol: float = 1e-6,
    sensitivity: Float[Tensor, "*batch expert out s"] | None = None,
    row_blocks: Literal["square"] | None = None,
    accelerate: bool = True,
) -> Solution:
    """Θ = argmin Σ_i ρ_i(r_i²) + λ‖Θ‖²_F, by majorise–minimise: the merged delta of arXiv 2607.01689.

    The residual is R_i = A_iᵀ(Θ − A_i) (side "output"), (Θ − A_i)A_iᵀ ("input") or Â_iᵀ(Θ − A_i)Â_iᵀ with
    Â_i = A_i/‖A_i‖ ("both"), and r_i = ‖R_i‖_F.

    Arguments:
    - `deltas`: fine-tuned minus base, `[*batch, expert, out, in]`; or one adapter an expert, `(B [*batch, out, r],
      A [*batch, r, in], scaling)` for the delta scaling·B A, ranks free to differ: solved exactly within the adapters'
      subspaces, no dense delta is formed, and theta is `Factored`. Products run in float32 (float64 for float64
      deltas), sums and small factorisations in float64.
    - `expert`: "gaussian", "student_t" (with `tail_index` ν > 0) or "cauchy".
    - `scale`: γ_i. "task-norm": γ_i² = f‖A_i‖² (the paper's); "gram-norm": γ_i² = f‖R_i(0)‖², on one side f‖A_iA_iᵀ‖²;
      "common": γ² = f·mean_j‖R_j(0)‖², one for all experts; "fitted": γ_i² = f‖R_i(0)‖² · median_j(r_j²/‖R_j(0)‖²) at
      the start; f is `scale_factor`. A tensor `[*batch, expert]` is γ_i itself, in the units of r.
    - `prior_precision`: λ if `prior` is "absolute"; if "relative", λ is this many times the mean diagonal entry of
      Σ w_i G_i (of its Kronecker form for both sides) at the weights the start gives, fixed from there on.
    - `pooling`: y in [0, 1], for both sides alone: the input Gram Â_iᵀÂ_i is shrunk to the mean over the experts,
      S_i² = (1 − y) Â_iᵀÂ_i + y·mean_j Â_jᵀÂ_j; 0 leaves each its own, and the residual is then Âᵀ_i(Θ − A_i)Âᵀ_i.
    - `sensitivity`: F_i, for both sides alone: what else expert i minds than the directions it moved, with F_iF_iᵀ the
      covariance of its gradients at the layer's outputs. The output Gram becomes the mean of Â_iÂ_iᵀ and
      F_iF_iᵀ/‖F_i‖²; a matrix of zeros says nothing.
    - `init`: "gaussian" starts from the solution for w_i = 1, "mean" from the plain mean, a tensor from itself (dense
      deltas only). The energy is not convex, so the start matters.
    - `max_steps`: linear solves after the start, at most. `rtol`: relative precision of theta to stop at, judged by the
      weights' last change.
    - `row_blocks`: "square" solves each block of `in` rows of a taller matrix as a matrix of its own (the released
      code's setting); theta, and each row of weights, are then of the blocks.
    - `accelerate`: Anderson acceleration; False for plain majorise–minimise.

    Returns a `Solution`. Raises `NumericsError` for deltas that are not finite or do not fit together (it names the
    expert) and `BadInputError` for settings that make no sense.
    """
    settings = _Settings(
        expert,
        tail_index,
        scale,
        scale_factor,
        prior,
        prior_precision,
        side,
        pooling,
        init,
        max_steps,
        rtol,
        accelerate,
        sensitivity,
    )
    settings.check()
    with torch.no_grad(), full_precision():
        if not isinstance(deltas, Tensor):
            if row_blocks is not None:
                raise _bad("row_blocks", repr(row_blocks), "None for factored deltas", "densify the adapters first")
            return _solve_factored(deltas if isinstance(deltas, Adapters) else Adapters(deltas), settings)
        _check_dense(deltas)
        if row_blocks is not None and deltas.shape[-2] > deltas.shape[-1]:
            return _solve_blocks(deltas, settings)
        return _solve_dense(deltas, settings)


@dataclass(frozen=True)
class _Settings:
    expert: Family
    tail_index: float | None
    scale: Scale | Tensor
    scale_factor: float
    prior: Prior
    prior_precision: float
    side: Side
    pooling: float
    init: Literal["gaussian", "mean"] | Tensor
    max_steps: int
    rtol: float
    accelerate: bool
    sensitivity: Tensor | None = None

    def check(self) -> None:
        """Refuse settings that make no sense, all of them at once."""
        problems: list[Problem] = []

        def need(condition: bool, where: str, got: object, expected: str, next_step: str) -> None:
            if not condition:
                problems.append(Problem(where, str(got), expected, next_step))

        def one_of(where: str, value: object, names: Any) -> None:
            need(
                value in get_args(names),
                where,
                repr(value),
                f"one of {', '.join(get_args(names))}",
                "choose one of them",
            )

        one_of("expert", self.expert, Family)
        one_of("prior", self.prior, Prior)
        one_of("side", self.side, Side)
        if isinstance(self.scale, str):
            one_of("scale", self.scale, Scale)
        if isinstance(self.init, str):
            one_of("init", self.init, Literal["gaussian", "mean"])
        if self.expert == "student_t":
            valid = self.tail_index is not None and self.tail_index > 0
            need(valid, "tail_index", self.tail_index, "degrees of freedom above 0", "give tail_index, 1 is Cauchy")
        else:
            need(
                self.tail_index is None,
                "tail_index",
                self.tail_index,
                f"None with expert={self.expert!r}",
                'leave it out, or use expert="student_t"',
            )
        positive = 0 < self.scale_factor < math.inf
        need(positive, "scale_factor", self.scale_factor, "a finite number above 0", "give one, 0.1 say")
        bounded = 0 <= self.prior_precision < math.inf
        need(bounded, "prior_precision", self.prior_precision, "a finite number, 0 or more", "give one, 1e-3 say")
        need(0 <= self.pooling <= 1, "pooling", self.pooling, "a number from 0 to 1", "give one, 0.5 say")
        if self.sensitivity is not None:
            need(self.side == "both", "sensitivity", f"side {self.side!r}", 'side "both"', "leave it out")
        need(self.max_steps >= 1, "max_steps", self.max_steps, "1 or more", "raise it")
        need(0 < self.rtol < 1, "rtol", self.rtol, "a number between 0 and 1", "give one, 1e-6 say")
        if problems:
            raise BadInputError(problems)


def _bad(where: str, got: str, expected: str, next_step: str) -> BadInputError:
    return BadInputError(Problem(where, got, expected, next_step))


def _check_dense(deltas: Tensor) -> None:
    if deltas.ndim < 3 or not deltas.is_floating_point() or 0 in deltas.shape:
        raise NumericsError(
            f"deltas: got {deltas.dtype} of shape {list(deltas.shape)}, expected floating point "
            "[*batch, expert, out, in] with no empty dimension. Next: stack one matrix's deltas over the experts."
        )
    if not all(bool(bound.isfinite()) for bound in torch.aminmax(deltas)):
        finite = deltas.isfinite()
        for index in range(deltas.shape[-3]):
            wrong = int((~finite[..., index, :, :]).sum())
            if wrong:
                raise not_finite(index, deltas.shape[-3], "delta", wrong)


def _expert_scales(scale: Scale | Tensor, batch: tuple[int, ...], experts: int, device: torch.device) -> Tensor | None:
    """The γ_i of a tensor `scale` as float64 `[batch, expert]`."""
    if not isinstance(scale, Tensor):
        return None
    try:
        scales = scale.to(device, torch.float64).expand(*batch, experts).reshape(-1, experts)
    except RuntimeError:
        expected = f"{[*batch, experts]}, a scale for each expert"
        raise _bad("scale", f"shape {list(scale.shape)}", expected, "give γ_i for every expert") from None
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise _bad("scale", "a value that is zero, negative or not finite", "γ_i > 0", "give γ_i in the units of r")
    return scales


def _solve_dense(deltas: Tensor, settings: _Settings) -> Solution:
    batch = tuple(deltas.shape[:-3])
    experts, rows, columns = deltas.shape[-3:]
    scales = _expert_scales(settings.scale, batch, experts, deltas.device)
    dtype = working_dtype(deltas.dtype)
    start = None
    if isinstance(settings.init, Tensor):
        if settings.init.shape != (*batch, rows, columns):
            got, expected = f"shape {list(settings.init.shape)}", f"{[*batch, rows, columns]}, the shape of theta"
            raise _bad("init", got, expected, 'give a matrix of that shape, or init="gaussian"')
        start = settings.init.to(deltas).reshape(-1, rows, columns)
    members: list[Solution] = []
    stacked = deltas.reshape(-1, experts, rows, columns)
    sensitivity = _checked_sensitivity(settings, (*batch, experts, rows), deltas.device)
    # On a CPU one at a time: a batch gains nothing there, and every member is then bit for bit what it is alone.
    stride = 1 if deltas.device.type == "cpu" else max(1, len(stacked))
    for first in range(0, len(stacked), stride):
        chunk = slice(first, first + stride)
        members += _solve_core(
            stacked[chunk].to(dtype),
            (rows, columns),
            None if scales is None else scales[chunk],
            None if start is None else start[chunk].to(dtype),
            settings if sensitivity is None else replace(settings, sensitivity=sensitivity[chunk].to(dtype)),
        )
    return join(members, batch, single=not batch)


def _checked_sensitivity(settings: _Settings, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """F_i as `[flat, expert, out, s]`; `shape` is [*batch, expert, out]."""
    given = settings.sensitivity
    if given is None:
        return None
    if given.shape[:-1] != shape or not given.is_floating_point() or not bool(given.isfinite().all()):
        got = (
            f"{given.dtype} of shape {list(given.shape)}"
            if given.shape[:-1] != shape
            else "entries that are not finite"
        )
        expected = f"finite floating point {[*shape, 's']}, a factor for each expert"
        raise _bad("sensitivity", got, expected, "give F_i for every expert, zeros where nothing is known")
    return given.to(device).reshape(-1, *shape[-2:], given.shape[-1])


def _solve_blocks(deltas: Tensor, settings: _Settings) -> Solution:
    """Square blocks of rows, each a problem of its own; a last block of fewer rows is solved as it is."""
    columns = deltas.shape[-1]
    if any(isinstance(one, Tensor) for one in (settings.init, settings.scale, settings.sensitivity)):
        expected = "named scale and init, and no sensitivity"
        raise _bad("row_blocks", "'square'", expected, "pass the blocks to solve one by one")
    blocks = [_solve_dense(block.contiguous(), settings) for block in torch.split(deltas, columns, dim=-2)]
    batch = tuple(deltas.shape[:-3])
    whole = []
    for parts in zip(*(block.unbind() for block in blocks), strict=True):
        length = max(len(part.energy) for part in parts)
        energies = [torch.cat([p.energy, p.energy[-1:].expand(length - len(p.energy))]) for p in parts]
        whole.append(
            Solution(
                theta=torch.cat([part.dense() for part in parts]),
                outcome=max((part.outcome for part in parts), key=lambda outcome: outcome.severity),
                steps=max(part.steps for part in parts),
                energy=torch.stack(energies).sum(0),
                weights=torch.stack([part.weights for part in parts]),
                prior_precision=torch.stack([part.prior_precision for part in parts]),
            )
        )
    return join(whole, batch, single=not batch)


def _solve_factored(adapters: Adapters, settings: _Settings) -> Solution:
    """Solve within span{B_i} × span{A_iᵀ}: there Θ = Q X Vᵀ exactly, the prior included."""
    if isinstance(settings.init, Tensor):
        raise _bad("init", "a tensor", '"gaussian" or "mean" for factored deltas', "densify the adapters first")
    if settings.sensitivity is not None:
        return _solve_minded(adapters, settings)
    left, cores, right = adapters.within()
    device = cores.left.device
    scales = _expert_scales(settings.scale, adapters.batch, adapters.count, device)
    if adapters.dtype == torch.float32 and settings.rtol >= FLOAT32_RTOL:
        cores = cores.float()
    narrow = THIN * cores.left.shape[-1] <= min(cores.left.shape[-2], cores.right.shape[-2])
    given: Tensor | LowRank = cores if narrow else cores.dense()
    stride = 1 if device.type == "cpu" else max(1, len(given))
    members: list[Solution] = []
    for first in range(0, len(given), stride):
        chunk = slice(first, first + stride)
        own_scales = None if scales is None else scales[chunk]
        members += _solve_core(given[chunk], adapters.size, own_scales, None, settings)
    lifted = [_lift(member, left[i], right[i]) for i, member in enumerate(members)]
    return join(lifted, adapters.batch, single=not adapters.batch)


def _solve_minded(adapters: Adapters, settings: _Settings) -> Solution:
    """With sensitivities Θ leaves the span of the B_i but not that of the A_iᵀ: solved whole on one side, Θ = X Vᵀ."""
    right, inside = adapters.right.basis()
    experts, device = adapters.count, inside.device
    left = adapters.left.stack
    left = left.reshape(*left.shape[:-1], experts, -1).transpose(1, 2)
    dtype = adapters.dtype if settings.rtol >= FLOAT32_RTOL else torch.float64
    scaled = left.double() * adapters.scaling[:, None, None]
    cores = (scaled @ inside.mT).to(dtype)
    scales = _expert_scales(settings.scale, adapters.batch, experts, device)
    sensitivity = _checked_sensitivity(settings, (*adapters.batch, experts, adapters.size[0]), device)
    assert sensitivity is not None
    stride = 1 if device.type == "cpu" else max(1, len(cores))
    members: list[Solution] = []
    for first in range(0, len(cores), stride):
        chunk = slice(first, first + stride)
        own_scales = None if scales is None else scales[chunk]
        own = replace(settings, sensitivity=sensitivity[chunk].to(dtype))
        members += _solve_core(cores[chunk], adapters.size, own_scales, None, own)
    lifted = []
    for i, member in enumerate(members):
        columns, core = torch.linalg.qr(member.dense())
        theta = Factored(columns.to(adapters.dtype), core.to(adapters.dtype), right[i])
        lifted.append(replace(member, theta=theta, make_posterior=_whole_rows(member, right[i])))
    return join(lifted, adapters.batch, single=not adapters.batch)


def _whole_rows(member: Solution, right: Basis) -> Callable[[], Posterior]:
    """The posterior of Θ = X Vᵀ, all rows of X free."""

    def posterior() -> Posterior:
        core = member.dense().to(right.stack.dtype)
        whole = torch.eye(len(core), dtype=core.dtype, device=core.device)
        return replace(member.posterior, mean=Factored(whole, core, right))

    return posterior


def _lift(member: Solution, left: Basis, right: Basis) -> Solution:
    theta = Factored(left, member.dense().to(left.stack.dtype), right)

    def posterior() -> Posterior:
        return replace(member.posterior, mean=theta)

    return replace(member, theta=theta, make_posterior=posterior)


def _solve_core(
    deltas: Float[Tensor, "batch expert k l"] | LowRank,
    size: tuple[int, int],
    scales: Float[Tensor, "batch expert"] | None,
    start: Float[Tensor, "batch k l"] | None,
    settings: _Settings,
) -> list[Solution]:
    """Solve a batch; members that fail in float32 are solved again in float64, and fall back to the mean after that."""
    solutions = _solve_once(deltas, size, scales, start, settings)
    failed = [i for i, solution in enumerate(solutions) if not solution.outcome.ok]
    if failed and deltas.dtype != torch.float64:
        again = _solve_once(
            deltas[failed].double(),
            size,
            None if scales is None else scales[failed],
            None if start is None else start[failed].double(),
            settings
            if settings.sensitivity is None
            else replace(settings, sensitivity=settings.sensitivity[failed].double()),
        )
        for i, solution in zip(failed, again, strict=True):
            solutions[i] = replace(solution, theta=solution.dense().to(deltas.dtype))
    return solutions


def _unit(given: Float[Tensor, "batch expert k l"] | LowRank) -> Float[Tensor, " batch"]:
    """A power of two near the deltas' common size, float64: divided out it changes no digit, and nothing overflows."""
    if isinstance(given, LowRank):
        largest = given.sizes.amax(-1)
        least = torch.finfo(torch.float64).tiny
    else:
        low, high = torch.aminmax(given.flatten(1), dim=1)
        largest, least = torch.maximum(-low, high), torch.finfo(given.dtype).tiny
    return torch.exp2(torch.log2(torch.where(largest > 0, largest.clamp_min(least), 1.0).double()).round())


def _problem(
    given: Float[Tensor, "batch expert k l"] | LowRank,
    unit: Float[Tensor, " batch"],
    size: tuple[int, int],
    settings: _Settings,
) -> tuple[_AnyProblem, Float[Tensor, "batch expert"]]:
    """The problem of the deltas divided by `unit`, and their ‖A_i‖²."""
    rows, columns = size if settings.side != "input" else size[::-1]
    if isinstance(given, LowRank):
        factors = given.over(unit)
        factors = factors.mT if settings.side == "input" else factors
        if settings.side == "both":
            thin: ThinOneSided | ThinTwoSided = ThinTwoSided(factors, rows * columns, settings.pooling)
        else:
            thin = ThinOneSided(factors, rows)
        return thin, thin.norm_sq
    deltas = given * (1 / unit).to(given.dtype)[:, None, None, None]
    if settings.side == "input":
        deltas = deltas.mT.contiguous()
    if settings.side == "both":
        return TwoSided(deltas, rows * columns, settings.pooling, settings.sensitivity), norm_sq(deltas)
    return OneSided(deltas, rows), norm_sq(deltas)


def _solve_once(
    given: Float[Tensor, "batch expert k l"] | LowRank,
    size: tuple[int, int],
    scales: Float[Tensor, "batch expert"] | None,
    start: Float[Tensor, "batch k l"] | None,
    settings: _Settings,
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
    residual_sq = problem.recentre(theta, problem.residual_sq(theta))
    if scale_sq is None:
        scale_sq = _scale_sq(settings, problem, task_norm_sq, unit, residual_sq, present, scales)
    prior = prior_at(torch.where(present, expert.weight(residual_sq, scale_sq), 0.0))
    energy = Energy(expert, scale_sq, prior, present)
    at_mode = at_once and start is None and settings.init == "gaussian"
    mode = find_mode(
        problem,
        energy,
        theta=theta,
        residual_sq=residual_sq,
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
    settings: _Settings,
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


def _outcome(index: int, ok: bool, present: bool, mode: Mode, expert: Expert, settings: _Settings) -> Outcome:
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
    given: Tensor | LowRank,
    theta: Tensor,
    weights: Tensor,
    prior: Tensor,
    mode: Mode,
    settings: _Settings,
) -> Solution:
    steps = int(mode.steps[index])
    own, own_weights = theta[index], weights[index]
    energy = torch.stack(mode.trace[: steps + 1])[:, index]
    if outcome is ended.EMPTY:
        own, own_weights, energy = torch.zeros_like(own), torch.zeros_like(own_weights), torch.zeros_like(energy[:1])
    elif outcome is ended.CLOSED_FORM:
        steps = 1
    elif not outcome.ok:
        own, own_weights, energy = _matrices(given, index).mean(0), torch.zeros_like(own_weights), energy[:1]

    def posterior() -> Posterior:
        minded = None if settings.sensitivity is None else settings.sensitivity[index].double()
        matrices = _matrices(given, index).double()
        return Posterior(own, settings.side, matrices, own_weights, prior[index], settings.pooling, minded)

    return Solution(own, outcome, steps, energy, own_weights, prior[index], make_posterior=posterior)


def _matrices(given: Tensor | LowRank, index: int) -> Float[Tensor, "expert k l"]:
    """One member's task vectors as matrices."""
    member: Tensor = given[[index]].dense()[0] if isinstance(given, LowRank) else given[index]
    return member
