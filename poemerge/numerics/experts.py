"""The three expert families: their energy of a residual, and the weight majorise-minimise gives them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Energy", "Expert", "Family"]

Family = Literal["gaussian", "student_t", "cauchy"]


@dataclass(frozen=True)
class Expert:
    """ρ(r²) of one expert: Student-t with `tail_index` ν; ν = 1 is Cauchy, ν = ∞ is Gaussian (arXiv 2607.01689).

    Both methods take r² and γ² as float64 tensors of shape `[batch, expert]`.
    """

    tail_index: float

    @classmethod
    def of(cls, family: Family, tail_index: float | None) -> "Expert":
        """The expert of a family name; `tail_index` is read for `student_t` only."""
        if family == "student_t":
            assert tail_index is not None
            return cls(tail_index)
        return cls(1.0 if family == "cauchy" else math.inf)

    @property
    def quadratic(self) -> bool:
        """True for the Gaussian, whose weight does not depend on the residual."""
        return math.isinf(self.tail_index)

    def energy(
        self, residual_sq: Float[Tensor, "batch expert"], scale_sq: Float[Tensor, "batch expert"]
    ) -> Float[Tensor, "batch expert"]:
        """ρ(r²) = (ν+1)/2 · log(1 + r²/(νγ²)); r²/(2γ²) for the Gaussian."""
        if self.quadratic:
            return residual_sq / (2 * scale_sq)
        return (self.tail_index + 1) / 2 * torch.log1p(residual_sq / (self.tail_index * scale_sq))

    def weight(
        self, residual_sq: Float[Tensor, "batch expert"], scale_sq: Float[Tensor, "batch expert"]
    ) -> Float[Tensor, "batch expert"]:
        """w = ρ′(r²) = (ν+1) / (2(νγ² + r²)); 1/(2γ²) for the Gaussian."""
        if self.quadratic:
            return 1 / (2 * scale_sq)
        return (self.tail_index + 1) / (2 * (self.tail_index * scale_sq + residual_sq))

    def weight_slope(
        self, residual_sq: Float[Tensor, "batch expert"], scale_sq: Float[Tensor, "batch expert"]
    ) -> Float[Tensor, "batch expert"]:
        """ρ″(r²) = −2w²/(ν+1): how the weight falls as the residual grows; 0 for the Gaussian."""
        return -2 / (self.tail_index + 1) * self.weight(residual_sq, scale_sq).square()


@dataclass(frozen=True)
class Energy:
    """E = Σ ρ(r_i²) + λ‖Θ‖² of a batch; an absent expert (zero delta) has no part in it."""

    expert: Expert
    scale_sq: Float[Tensor, "batch expert"]
    prior: Float[Tensor, " batch"]
    present: Bool[Tensor, "batch expert"]

    def of(
        self, residual_sq: Float[Tensor, "batch expert"], norm_sq: Float[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """E for given r_i² and ‖Θ‖²."""
        return self.expert.energy(residual_sq, self.scale_sq).sum(-1) + self.prior * norm_sq

    def of_rows(self, rows: Float[Tensor, "batch row"]) -> Float[Tensor, " batch"]:
        """E for every r_i², and ‖Θ‖² as the last row."""
        return self.of(rows[:, :-1], rows[:, -1])

    def weights(self, residual_sq: Float[Tensor, "batch expert"]) -> Float[Tensor, "batch expert"]:
        """w_i = ρ′(r_i²); 0 for an absent expert."""
        return torch.where(self.present, self.expert.weight(residual_sq, self.scale_sq), 0.0)

    def log_weights(self, residual_sq: Float[Tensor, "batch expert"]) -> Float[Tensor, "batch expert"]:
        """log w_i; 0 for an absent expert."""
        return torch.where(self.present, self.expert.weight(residual_sq, self.scale_sq).log(), 0.0)

    def weight_slopes(self, residual_sq: Float[Tensor, "batch expert"]) -> Float[Tensor, "batch expert"]:
        """ρ″(r_i²); 0 for an absent expert."""
        return torch.where(self.present, self.expert.weight_slope(residual_sq, self.scale_sq), 0.0)
