"""Majorise–minimise for a batch of problems, accelerated without leaving the basin that the plain steps lead to."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from poemerge.numerics.anderson import Anderson
from poemerge.numerics.experts import Energy
from poemerge.numerics.subspace import Quadratics, search

__all__ = ["Mode", "Problem", "find_mode", "settled_gap"]

# The weights count as settled, as far as the dtype allows, after this many steps in which their change did not shrink.
_STALLED_STEPS = 4


@runtime_checkable
class Problem(Protocol):
    """What majorise–minimise asks of a least-squares problem: its minimiser for given weights, and its residuals."""

    def minimise(
        self, weights: Tensor, prior: Tensor, start: Tensor | None, rtol: float
    ) -> tuple[Float[Tensor, "batch out in"], Bool[Tensor, " batch"]]:
        """Θ(w), and where it could be had."""
        ...

    def rows(self, theta: Tensor) -> Float[Tensor, "batch row"]:
        """Every r_i² at Θ, and ‖Θ‖² as the last row."""
        ...

    def expand(
        self, theta: Tensor, step: Tensor, last: Tensor
    ) -> tuple[Float[Tensor, "batch row"], Float[Tensor, "batch row"], Float[Tensor, "batch row"]]:
        """Half of every row's slope at Θ along `step`, and the curvatures ⟨step, step⟩ and ⟨step, last⟩ of its form."""
        ...


@dataclass(frozen=True)
class Mode:
    """Where majorise–minimise is: see `Solution`; `gap` is the last relative change of the weights."""

    theta: Float[Tensor, "batch out in"]
    rows: Float[Tensor, "batch row"]
    trace: list[Float[Tensor, " batch"]]
    steps: Int[Tensor, " batch"]
    gap: Float[Tensor, " batch"]
    ok: Bool[Tensor, " batch"]
    exhausted: Bool[Tensor, " batch"]

    @property
    def residual_sq(self) -> Float[Tensor, "batch expert"]:
        """r_i² at Θ."""
        return self.rows[:, :-1]


def find_mode(
    problem: Problem,
    energy: Energy,
    *,
    theta: Float[Tensor, "batch out in"],
    rows: Float[Tensor, "batch row"],
    max_steps: int,
    rtol: float,
    accelerate: bool,
) -> Mode:
    """Minimise E from `theta`, whose `rows` (every r_i², and ‖Θ‖²) are given.

    A plain step solves for Θ(w) at w_i = ρ′(r_i²) and never raises E. Accelerated, a single problem first extrapolates
    log w by Anderson's method, as long as E falls and the steps look like those towards a minimum; after that, and in a
    batch, every plain step is followed by a search for the lowest E in the plane of that step and the one before, as
    far as E is convex there. No accelerated step is kept that leaves E higher than before.
    """
    batch, device = len(energy.prior), energy.prior.device
    mode = Mode(
        theta,
        rows,
        [energy.of_rows(rows)],
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.full((batch,), torch.inf, dtype=torch.float64, device=device),
        torch.ones(batch, dtype=torch.bool, device=device),
        torch.zeros(batch, dtype=torch.bool, device=device),
    )
    if accelerate and batch == 1 and not energy.expert.quadratic:
        mode = _extrapolate(problem, energy, mode, max_steps, rtol)
        if not bool(mode.ok) or bool(mode.gap <= settled_gap(theta.dtype, rtol)):
            return mode
    return _descend(problem, energy, mode, max_steps, rtol, accelerate)


def settled_gap(dtype: torch.dtype, rtol: float) -> float:
    """The change of the weights at which theta is within `rtol`: a tenth of it, as the last change is less than all to
    come; and not less than what the dtype resolves."""
    return max(0.1 * rtol, 64 * torch.finfo(dtype).eps)


def _extrapolate(problem: Problem, energy: Energy, mode: Mode, max_steps: int, rtol: float) -> Mode:
    """Anderson's phase of a single problem: until the weights settle, or an extrapolation is refused."""
    anderson = Anderson()
    proposal, plain = energy.log_weights(mode.residual_sq), True
    slack = 64 * torch.finfo(mode.theta.dtype).eps
    while int(mode.steps) < max_steps:
        weights = torch.where(energy.present, proposal.exp(), 0.0)
        theta, solved = problem.minimise(weights, energy.prior, mode.theta, rtol)
        rows = problem.rows(theta)
        value, before = energy.of_rows(rows), mode.trace[-1]
        mode = replace(mode, steps=mode.steps + 1, trace=[*mode.trace, torch.minimum(value, before)])
        if not bool(solved & (value <= before * (1 + slack * plain))):
            mode.trace[-1] = before
            return replace(mode, ok=mode.ok & (solved | (not plain)))
        image = energy.log_weights(rows[:, :-1])
        gap = (image - proposal).abs().amax(-1)
        mode = replace(mode, theta=theta, rows=rows, gap=gap)
        if bool(gap <= settled_gap(theta.dtype, rtol)):
            return mode
        extrapolated = anderson.extrapolate(proposal[0], image[0])
        if extrapolated is None and not plain:
            return mode
        plain = extrapolated is None
        proposal = image if extrapolated is None else extrapolated.unsqueeze(0)
    return mode


def _descend(problem: Problem, energy: Energy, mode: Mode, max_steps: int, rtol: float, accelerate: bool) -> Mode:
    """Plain steps, each followed by a search in the plane of the last two when `accelerate` is on."""
    eps = torch.finfo(mode.theta.dtype).eps
    goal = settled_gap(mode.theta.dtype, rtol)
    theta, rows, value, steps, gap = mode.theta, mode.rows, mode.trace[-1], mode.steps, mode.gap
    trace, ok, exhausted = list(mode.trace), mode.ok, mode.exhausted
    plain = torch.zeros(len(value), 2, dtype=torch.float64, device=value.device)
    plain[:, 0] = 1.0
    last = torch.zeros_like(theta)
    last_slope, last_curvature = torch.zeros_like(rows), torch.zeros_like(rows)
    smallest, stalled = torch.full_like(gap, torch.inf), torch.zeros_like(steps)
    active = torch.ones_like(ok)
    while bool((active := active & (steps < max_steps)).any()):
        trial, solved = problem.minimise(energy.weights(rows[:, :-1]), energy.prior, theta, rtol)
        step = torch.where(solved[:, None, None], trial - theta, 0.0)
        slope, own, across = problem.expand(theta, step, last)
        plane = Quadratics(
            energy,
            rows,
            torch.stack([slope, last_slope], -1),
            torch.stack([own, across, across, last_curvature], -1).view(*own.shape, 2, 2),
        )
        plain_rows = plane.rows(plain)
        plain_value = energy.of_rows(plain_rows)
        kept = active & solved & (plain_value <= value + 64 * eps * value)
        steps, ok = steps + active, ok & (solved | ~active)
        # A plain step that does not lower the energy has met the rounding of the dtype.
        exhausted = exhausted | (active & solved & ~kept)
        change = (energy.log_weights(plain_rows[:, :-1]) - energy.log_weights(rows[:, :-1])).abs().amax(-1)
        gap = torch.where(kept, change, gap)
        place = torch.where(kept[:, None], search(plane) if accelerate else plain, 0.0)
        rows = plane.rows(place)
        last_slope, last_curvature = plane.shift(place)
        along, again = place.to(theta.dtype)[:, :, None, None].unbind(1)
        last = along * step + again * last
        theta = theta + last
        value = torch.minimum(energy.of_rows(rows), value)
        trace.append(value)
        stalled = torch.where(gap < smallest, 0, stalled + 1)
        smallest = torch.minimum(gap, smallest)
        exhausted = exhausted | (active & (stalled >= _STALLED_STEPS) & (smallest < eps**0.5))
        active = active & kept & (gap > goal) & ~exhausted
    return Mode(theta, rows, trace, steps, gap, ok, exhausted)
