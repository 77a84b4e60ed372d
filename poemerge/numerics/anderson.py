"""Anderson acceleration of one fixed-point iteration x ← g(x) in a few dimensions (type II, Walker & Ni 2011)."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Anderson"]

_DEPTH = 5
# Singular values of the past steps below this fraction of the largest carry rounding, not direction.
_DIRECTION_RTOL = 1e-6


class Anderson:
    """Past points x and misfits g(x) − x, and the extrapolation they allow."""

    def __init__(self) -> None:
        self._points: list[Tensor] = []
        self._misfits: list[Tensor] = []

    def extrapolate(self, point: Float[Tensor, " n"], image: Float[Tensor, " n"]) -> Float[Tensor, " n"] | None:
        """x + (the step at which the misfit, linear in the past ones, is smallest), after recording x and g(x).

        None as long as there is no past, and where the iteration does not look like a descent towards a minimum: the
        Jacobian of majorise–minimise there has its eigenvalues between 0 and 1, and beyond 1 near a saddle or a ridge,
        where an extrapolation could cross into another basin.
        """
        self._points = [*self._points[-_DEPTH:], point]
        self._misfits = [*self._misfits[-_DEPTH:], image - point]
        if len(self._points) < 2:
            return None
        moves = torch.stack(self._points, 1).diff(dim=1)
        changes = torch.stack(self._misfits, 1).diff(dim=1)
        jacobian = torch.linalg.pinv(moves, rtol=_DIRECTION_RTOL) @ (moves + changes)
        rates = torch.linalg.eigvals(jacobian).real
        if not bool(rates.isfinite().all() & (rates.max() < 1) & (rates.min() > -0.2)):
            return None
        coefficients = torch.linalg.pinv(changes, rtol=_DIRECTION_RTOL**2) @ self._misfits[-1]
        extrapolated = image - (moves + changes) @ coefficients
        return extrapolated if bool(extrapolated.isfinite().all()) else None
