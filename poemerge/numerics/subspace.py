"""E on a plane of Θ: from the quadratic form of every residual there, its lowest point within the convex region."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.numerics.experts import Energy

__all__ = ["Quadratics", "search"]

_MAX_SEARCH_STEPS = 24
# A search step shorter than this fraction of Newton's has met the edge of the convex region.
_SHORTEST = 1 / 64
# The smallest eigenvalue, in units of the majorising curvature, at which E counts as convex.
_CONVEX = 1e-10


@dataclass(frozen=True)
class Quadratics:
    """Every r_i², and ‖Θ‖² as one more row, at Θ + a·step + b·last: value + 2 slope·(a, b) + (a, b) curvature (a, b)ᵀ.

    All in float64. The plain step of majorise–minimise is (1, 0).
    """

    energy: Energy
    value: Float[Tensor, "batch row"]
    slope: Float[Tensor, "batch row 2"]
    curvature: Float[Tensor, "batch row 2 2"]

    def rows(self, place: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch row"]:
        """r_i² and ‖Θ‖² at (a, b)."""
        bend = (self.curvature @ place[:, None, :, None]).squeeze(-1)
        return (self.value + ((2 * self.slope + bend) * place[:, None, :]).sum(-1)).clamp_min(0)

    def at(self, place: Float[Tensor, "batch 2"]) -> Float[Tensor, " batch"]:
        """E at (a, b)."""
        return self.energy.of_rows(self.rows(place))

    def shift(self, place: Float[Tensor, "batch 2"]) -> tuple[Float[Tensor, "batch row"], Float[Tensor, "batch row"]]:
        """Slope and curvature of every row along the move to (a, b), as seen from there."""
        bend = (self.curvature @ place[:, None, :, None]).squeeze(-1)
        curvature = (bend * place[:, None, :]).sum(-1)
        return (self.slope * place[:, None, :]).sum(-1) + curvature, curvature

    def derivatives(
        self, place: Float[Tensor, "batch 2"]
    ) -> tuple[Float[Tensor, "batch 2"], Float[Tensor, "batch 2 2"], Float[Tensor, "batch 2 2"]]:
        """Gradient of E at (a, b), its second derivative, and that of the quadratic that majorises E there."""
        residual_sq = self.rows(place)[:, :-1]
        weights = torch.cat([self.energy.weights(residual_sq), self.energy.prior[:, None]], 1)
        gradients = 2 * (self.slope + (self.curvature @ place[:, None, :, None]).squeeze(-1))
        majoriser = 2 * (weights[..., None, None] * self.curvature).sum(1)
        bending = self.energy.weight_slopes(residual_sq)[..., None, None] * gradients[:, :-1, :, None]
        second = majoriser + (bending * gradients[:, :-1, None, :]).sum(1)
        return (weights[..., None] * gradients).sum(1), second, majoriser


def search(plane: Quadratics) -> Float[Tensor, "batch 2"]:
    """From the plain step (1, 0) by Newton's method to the lowest E, no further than E is convex.

    Each Newton step is halved until E falls and is convex where it ends, so E never ends above the plain step's.
    """
    place = torch.zeros_like(plane.slope[:, 0])
    place[:, 0] = 1.0
    value = plane.at(place)
    gradient, second, majoriser = plane.derivatives(place)
    size = majoriser.diagonal(dim1=-2, dim2=-1).sqrt()
    # A direction that is not there yet (the first step has no predecessor) takes no part.
    missing = size == 0
    size = torch.where(missing, 1.0, size)
    newton, convex = _newton(gradient, second, size, missing)
    active = convex
    length = torch.ones_like(value)
    for _ in range(_MAX_SEARCH_STEPS):
        if not bool(active.any()):
            break
        trial = place + length[:, None] * newton
        trial_value = plane.at(trial)
        gradient, second, _ = plane.derivatives(trial)
        trial_newton, trial_convex = _newton(gradient, second, size, missing)
        kept = active & trial_convex & (trial_value < value)
        place = torch.where(kept[:, None], trial, place)
        newton = torch.where(kept[:, None], trial_newton, newton)
        enough = kept & (value - trial_value <= 1e-14 * value.abs())
        value = torch.where(kept, trial_value, value)
        length = torch.where(kept, 1.0, length / 2)
        active = active & ~enough & (length >= _SHORTEST)
    return place


def _newton(gradient: Tensor, second: Tensor, size: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """−second⁻¹ gradient, each direction in units of `size`, and where the second derivative is positive definite."""
    scaled = second / (size[:, :, None] * size[:, None, :])
    a = torch.where(missing[:, 0], 1.0, scaled[:, 0, 0])
    d = torch.where(missing[:, 1], 1.0, scaled[:, 1, 1])
    b = torch.where(missing.any(-1), 0.0, scaled[:, 0, 1])
    middle, spread = (a + d) / 2, (((a - d) / 2).square() + b.square()).sqrt()
    determinant = a * d - b * b
    convex = (middle - spread > _CONVEX) & (determinant > 0)
    x, y = (torch.where(missing, 0.0, gradient / size)).unbind(1)
    safe = torch.where(convex, determinant, 1.0)
    step = torch.stack([-(d * x - b * y) / safe, -(a * y - b * x) / safe], 1) / size
    return torch.where(missing, 0.0, step), convex
