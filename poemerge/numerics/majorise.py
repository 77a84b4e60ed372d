"""Majorise–minimise with Anderson acceleration on the logarithms of the weights, for a batch of problems at once."""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from poemerge.numerics.experts import Expert

__all__ = ["Mode", "Problem", "find_mode"]

# How many past steps Anderson acceleration looks back on.
_DEPTH = 6


class Problem(Protocol):
    """What majorise–minimise asks of a least-squares problem: its minimiser for given weights, and its residuals.

    `exact` says that the minimiser comes from a factorisation, not from iterations with a precision of their own.
    """

    exact: bool

    def minimise(
        self, weights: Tensor, prior: Tensor, start: Tensor | None, rtol: float
    ) -> tuple[Float[Tensor, "batch out in"], Bool[Tensor, " batch"]]:
        """Θ(w), and where it could be had."""
        ...

    def residual_sq(self, theta: Tensor) -> Float[Tensor, "batch expert"]:
        """r_i² at Θ."""
        ...


@dataclass(frozen=True)
class Mode:
    """Where majorise–minimise ended: see `Solution`; `gap` is the last relative change of the weights."""

    theta: Float[Tensor, "batch out in"]
    residual_sq: Float[Tensor, "batch expert"]
    energy: Float[Tensor, "step batch"]
    steps: Int[Tensor, " batch"]
    gap: Float[Tensor, " batch"]
    ok: Bool[Tensor, " batch"]
    exhausted: Bool[Tensor, " batch"]


def find_mode(
    problem: Problem,
    expert: Expert,
    *,
    scale_sq: Float[Tensor, "batch expert"],
    prior: Float[Tensor, " batch"],
    present: Bool[Tensor, "batch expert"],
    theta: Float[Tensor, "batch out in"],
    residual_sq: Float[Tensor, "batch expert"],
    max_steps: int,
    rtol: float,
    accelerate: bool = True,
) -> Mode:
    """Minimise E(Θ) = Σ ρ(r_i²) + λ‖Θ‖² from `theta`, whose residuals are given.

    A plain step solves for Θ(w) at w_i = ρ′(r_i²) and never raises E. An accelerated one solves at extrapolated log w;
    it is kept only when E falls, else the plain step is taken from the last kept point.
    """

    def energy_of(theta: Tensor, residual_sq: Tensor) -> Tensor:
        return expert.energy(residual_sq, scale_sq).sum(-1) + prior * theta.double().square().sum((-1, -2))

    def target_of(residual_sq: Tensor) -> Tensor:
        return torch.where(present, expert.weight(residual_sq, scale_sq).log(), 0.0)

    batch = len(prior)
    device = prior.device
    energy = energy_of(theta, residual_sq)
    trace = [energy]
    # Rounding of the energy: a rise within it is no rise.
    slack = 64 * torch.finfo(theta.dtype).eps
    target = target_of(residual_sq)
    history = _History(batch, target.shape[1], device)
    propose_plain = torch.ones(batch, dtype=torch.bool, device=device)
    active = torch.ones(batch, dtype=torch.bool, device=device)
    exhausted = torch.zeros(batch, dtype=torch.bool, device=device)
    ok = torch.ones(batch, dtype=torch.bool, device=device)
    steps = torch.zeros(batch, dtype=torch.int64, device=device)
    gap = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
    proposal = target
    for _ in range(max_steps):
        weights = torch.where(present, proposal.exp(), 0.0)
        inner_rtol = 0.1 * max(rtol, min(1e-2, float(gap[active].min())))
        trial, solved = problem.minimise(weights, prior, theta, inner_rtol)
        trial_residual_sq = problem.residual_sq(trial)
        trial_energy = energy_of(trial, trial_residual_sq)
        steps += active
        ok &= solved | ~propose_plain | ~active
        lower = solved & (trial_energy <= torch.where(propose_plain, energy * (1 + slack), energy))
        kept = active & lower
        # A plain step that does not lower the energy has met the rounding of the dtype.
        exhausted |= active & propose_plain & ~lower
        active &= ~(propose_plain & ~lower)
        theta = torch.where(kept[:, None, None], trial, theta)
        residual_sq = torch.where(kept[:, None], trial_residual_sq, residual_sq)
        energy = torch.where(kept, torch.minimum(trial_energy, energy), energy)
        trace.append(energy)
        target = torch.where(kept[:, None], target_of(residual_sq), target)
        change = (target - proposal).abs().amax(-1)
        gap = torch.where(kept, change, gap)
        active &= ~(kept & (change <= rtol) & (problem.exact or inner_rtol <= rtol))
        if not bool(active.any()):
            break
        extrapolated = history.extrapolate(proposal, target, kept)
        rejected = active & ~kept
        history.forget(rejected)
        propose_plain = rejected if accelerate else torch.ones_like(rejected)
        propose_plain = propose_plain | ~history.ready
        proposal = torch.where(propose_plain[:, None], target, extrapolated)
    return Mode(theta, residual_sq, torch.stack(trace), steps, gap, ok, exhausted)


class _History:
    """Anderson's memory (type II, Walker & Ni 2011): past log-weights x and their images g(x) = log ρ′(r²(Θ(x)))."""

    def __init__(self, batch: int, experts: int, device: torch.device) -> None:
        shape = (_DEPTH, batch, experts)
        self._points = torch.zeros(shape, dtype=torch.float64, device=device)
        self._misfits = torch.zeros(shape, dtype=torch.float64, device=device)
        self._last: tuple[Tensor, Tensor] | None = None
        self._valid = torch.zeros(batch, dtype=torch.bool, device=device)
        self._count = 0
        self.ready = torch.zeros(batch, dtype=torch.bool, device=device)

    def extrapolate(self, point: Tensor, image: Tensor, kept: Tensor) -> Tensor:
        """g(x) − (ΔX + ΔF)c with c the least-squares fit of F by ΔF, after recording x where it was kept."""
        misfit = image - point
        if self._last is not None:
            slot = self._count % _DEPTH
            fresh = (kept & self._valid)[:, None]
            self._points[slot] = torch.where(fresh, point - self._last[0], 0.0)
            self._misfits[slot] = torch.where(fresh, misfit - self._last[1], 0.0)
            self._count += 1
            self._last = (
                torch.where(kept[:, None], point, self._last[0]),
                torch.where(kept[:, None], misfit, self._last[1]),
            )
            self.ready = self.ready | fresh.squeeze(-1)
        else:
            self._last = (point, misfit)
        self._valid = self._valid | kept
        differences = self._misfits.permute(1, 2, 0)
        normal = differences.mT @ differences
        ridge = 1e-14 * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + torch.finfo(torch.float64).tiny
        normal = normal + ridge[:, None, None] * torch.eye(_DEPTH, dtype=normal.dtype, device=normal.device)
        right = differences.mT @ misfit.unsqueeze(-1)
        coefficients = torch.linalg.solve_ex(normal, right)[0].nan_to_num(0.0, 0.0, 0.0)
        shift: Tensor = (self._points + self._misfits).permute(1, 2, 0) @ coefficients
        return image - shift.squeeze(-1)

    def forget(self, which: Bool[Tensor, " batch"]) -> None:
        """Drop what was learnt for these members: it misled."""
        self._points[:, which] = 0.0
        self._misfits[:, which] = 0.0
        self._valid = self._valid & ~which
        self.ready = self.ready & ~which
