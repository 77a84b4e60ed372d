"""The Laplace posterior of Θ at the mode of a product of experts."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.numerics.solution import Factored
from poemerge.numerics.two_sided import TwoSided, output_factor

__all__ = ["Posterior"]

Side = Literal["output", "input", "both"]

# Of the linear solve behind a two-sided sample: far below the sample's own spread.
_SAMPLE_RTOL = 1e-8


@dataclass(frozen=True)
class Posterior:
    """exp(−E) near its mode, with the curvature of the quadratic that majorises E there (the Gauss–Newton part).

    One side: Θ is matrix-normal with row precision 2H(w) (side "output") or column precision 2H(w) ("input"): twice the
    normal matrix, as E is a sum of squares without a half. Both sides: the precision 2(Σ w_i L_i ⊗ R_i + λ) is no
    Kronecker product for more than one expert, so it has no matrix of its own here; samples are exact all the same.
    For factored deltas the posterior is the one within the experts' common subspaces, Θ = Q X Vᵀ.

    The energies treat r as one number a matrix, so samples at `temperature` 1 are as wide as one observation a matrix
    leaves them, often much wider than theta is long: choose the temperature on a validation split.
    """

    mean: Tensor | Factored
    side: Side
    deltas: Float[Tensor, "expert k l"]
    weights: Float[Tensor, " expert"]
    prior_precision: Float[Tensor, ""]
    pooling: float | Float[Tensor, " expert"] = 0.0
    sensitivity: Float[Tensor, "expert k s"] | None = None

    @property
    def precision(self) -> Float[Tensor, "k k"]:
        """2H(w) of a one-sided posterior, float64: over the rows of Θ (X when factored), or its columns ("input")."""
        if self.side == "both":
            raise ValueError(
                'the two-sided precision is not one matrix; mean_precision and sample work for side="both"'
            )
        deltas = self.deltas if self.side == "output" else self.deltas.mT
        weighted = self.weights.sqrt()[:, None, None] * deltas
        matrix = 2 * (weighted @ weighted.mT).sum(0)
        matrix.diagonal().add_(2 * self.prior_precision)
        return matrix

    @property
    def mean_precision(self) -> float:
        """Mean diagonal entry of the precision: how strongly this matrix is held, in 1/units² of the deltas."""
        if self.side != "both":
            return float(self.precision.diagonal().mean())
        norm_sq = self.deltas.square().sum((-1, -2)).clamp_min(torch.finfo(torch.float64).tiny)
        # Â_i has unit norm, so both of its Grams have trace 1.
        entries = self.deltas.shape[-2] * self.deltas.shape[-1]
        held = torch.where(norm_sq > torch.finfo(torch.float64).tiny, self.weights, 0.0).sum()
        return float(2 * (held / entries + self.prior_precision))

    def sample(self, count: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor | Factored:
        """`count` draws of Θ, `[count, out, in]` (or `Factored`), in theta's dtype.

        `generator` is a CPU generator, so a seed gives the same draws on every device. The covariance is multiplied by
        `temperature`.
        """
        core = self.mean.X if isinstance(self.mean, Factored) else self.mean
        noise = self._noise(count, generator, core.device) * temperature**0.5
        samples: Tensor = (core.double() + noise).to(core.dtype)
        if isinstance(self.mean, Factored):
            return Factored(self.mean.Q.expand(count, -1, -1), samples, self.mean.V.expand(count, -1, -1))
        return samples

    def _noise(self, count: int, generator: torch.Generator, device: torch.device) -> Float[Tensor, "count k l"]:
        experts, rows, columns = self.deltas.shape

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        if self.side != "both":
            draws = normal(count, rows, columns)
            factor = torch.linalg.cholesky(self.precision)
            tall = draws if self.side == "output" else draws.mT
            noise: Tensor = torch.linalg.solve_triangular(factor.mT, tall, upper=True)
            return noise if self.side == "output" else noise.mT
        # Perturb and solve (Papandreou & Yuille 2010): noise of covariance K through K⁻¹ has covariance K⁻¹.
        norm = self.deltas.square().sum((-1, -2), keepdim=True).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        unit = output_factor(self.deltas / norm, self.sensitivity)
        strength = (2 * self.weights).sqrt()[:, None, None]
        sensitivity = None if self.sensitivity is None else self.sensitivity.unsqueeze(0)
        pooling = self.pooling.unsqueeze(0) if isinstance(self.pooling, Tensor) else self.pooling
        problem = TwoSided(self.deltas.unsqueeze(0), rows * columns, pooling, sensitivity)
        # R_i = F_i F_iᵀ, with R_i in the coordinates that the problem is solved in.
        values, vectors = torch.linalg.eigh(problem.input_grams().squeeze(0))
        factor = problem.right_basis @ (vectors * values.clamp_min(0).sqrt().unsqueeze(-2))
        samples = []
        for _ in range(count):
            right = (strength * (unit @ normal(experts, unit.shape[-1], columns) @ factor.mT)).sum(0)
            right = right + (2 * self.prior_precision).sqrt() * normal(rows, columns)
            solved = problem.invert(2 * self.weights[None], 2 * self.prior_precision[None], right[None], _SAMPLE_RTOL)
            samples.append(solved.squeeze(0))
        return torch.stack(samples)
