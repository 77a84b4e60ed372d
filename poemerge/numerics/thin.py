"""The two-sided product of adapters: what A_i = P_iQ_iᵀ asks of Θ is seen through P_iᵀΘ, r rows an expert."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.numerics.adapters import LowRank
from poemerge.numerics.one_sided import Referenced
from poemerge.numerics.two_sided import Kronecker, for_each

__all__ = ["ThinTwoSided"]


class ThinTwoSided(Kronecker, Referenced):
    """`TwoSided` for experts of low rank: with Â_i = P_iQ_iᵀ and M_i = P_iᵀP_i,
    R_i = (1 − y) Q_iM_iQ_iᵀ + y·pooled, all products through the rank.

    r_i² = ⟨K_i Z_i R_i, Z_i⟩ with Z_i = P_iᵀ(Θ − A_i) and K_i = Q_iᵀQ_i, kept about a reference C as in the dense
    problem: Z_i(Θ) = Z_i(C) + P_iᵀ(Θ − C).
    """

    def __init__(self, deltas: LowRank, mean_over: int, pooling: float | Float[Tensor, "batch expert"]) -> None:
        """`mean_over`: how many diagonal entries the mean diagonal averages over (out·in of the full matrix)."""
        dtype = deltas.dtype
        self.mean_over = mean_over
        self.pooling = for_each(pooling, deltas.left)
        left, right = deltas.left, deltas.right
        middle, inner = right.mT @ right, left.mT @ left
        length = (middle * inner).sum((-2, -1)).double().clamp_min(0).sqrt()
        shrink = torch.where((length > 0) & (deltas.sizes > 0), 1 / length, 0.0).to(dtype)[..., None, None]
        left = left * shrink
        self.inner = inner * shrink.square()
        self.left_basis = torch.linalg.eigh(_joint(left @ middle, left))[1]
        summed, self.right_basis = torch.linalg.eigh(_joint(right @ self.inner, right))
        left = self.left_basis.mT.unsqueeze(1) @ left
        right = self.right_basis.mT.unsqueeze(1) @ right
        # In this basis the pooled input Gram is diagonal.
        present = (shrink > 0).sum(1).clamp_min(1).to(dtype)
        self.pooled = (summed.clamp_min(0) / present[..., 0]).unsqueeze(-2)
        sizes = length * deltas.sizes
        self.norm_sq = sizes.square()
        self.left, self.middle, self.right = left, middle, right
        self.long = left.transpose(1, 2).flatten(2)
        self.target = (sizes.to(dtype)[..., None, None] * (left.mT @ left)) @ right.mT
        self.start_residual_sq = self._form(self.target, self.target)
        share = (sizes / sizes.shape[1]).to(dtype)[..., None, None]
        self._refer(self.long @ (share * right.mT).flatten(1, 2))
        self.left_diagonal = ((left @ middle) * left).sum(-1)
        own = ((right @ self.inner) * right).sum(-1)
        self.right_diagonal = own.lerp(self.pooled.expand_as(own), self.pooling.squeeze(-1))
        self.trace = self.left_diagonal.double().sum(-1) * self.right_diagonal.double().sum(-1)

    def _through(self, seen: Float[Tensor, "batch expert r in"]) -> Float[Tensor, "batch expert r in"]:
        """Z_i R_i."""
        own: Tensor = ((1 - self.pooling) * (seen @ self.right @ self.inner)) @ self.right.mT
        return own.addcmul_(seen, self.pooling * self.pooled.unsqueeze(1)) if bool(self.pooling.any()) else own

    def _operator(
        self, weights: Float[Tensor, "batch expert"], prior: Float[Tensor, "batch 1 1"]
    ) -> Callable[[Float[Tensor, "batch out in"]], Float[Tensor, "batch out in"]]:
        """Θ ↦ Σ w_i L_i Θ R_i + λΘ, the sum over experts inside one long product."""
        weighed = (weights[..., None, None] * self.left) @ self.middle
        summed = (self.pooling * weighed).transpose(1, 2).flatten(2) @ self.long.mT
        rights = ((1 - self.pooling) * self.inner @ self.right.mT).flatten(1, 2)

        def operate(theta: Tensor) -> Tensor:
            across = (weighed @ (self._seen(theta) @ self.right)).transpose(1, 2).flatten(2)
            out: Tensor = across @ rights
            return out.addcmul_(summed @ theta, self.pooled).addcmul_(prior, theta)

        return operate

    def _refer(self, reference: Float[Tensor, "batch out in"]) -> None:
        self.reference = reference
        self.misfit = self._seen(reference) - self.target
        self.pull = self.middle @ self._through(self.misfit)
        self.reference_residual_sq = _sum(self.pull * self.misfit).clamp_min(0)

    def _seen(self, theta: Float[Tensor, "batch out _"]) -> Float[Tensor, "batch expert r _"]:
        """P_iᵀΘ."""
        batch, experts, _, rank = self.left.shape
        return (self.long.mT @ theta).reshape(batch, experts, rank, -1)

    def _form(self, one: Tensor, other: Tensor) -> Float[Tensor, "batch expert"]:
        """⟨K_i Z_i R_i, Z_i′⟩, each row in the tensors' own dtype and the sum over rows in float64."""
        return _sum((self.middle @ self._through(one)) * other)

    def _slope(self, weights: Float[Tensor, "batch expert"]) -> Float[Tensor, "batch out in"]:
        """Σ w_i P_i K_i Z_i R_i at the reference."""
        return self.long @ (weights[..., None, None] * self.pull).flatten(1, 2)

    def residual_sq(self, theta: Float[Tensor, "batch out in"]) -> Float[Tensor, "batch expert"]:
        """r_i², never below 0."""
        misfit = self._seen(theta - self.reference) + self.misfit
        return self._form(misfit, misfit).clamp_min(0)

    def _expand(
        self,
        theta: Float[Tensor, "batch out in"],
        step: Float[Tensor, "batch out in"],
        last: Float[Tensor, "batch out in"],
    ) -> tuple[Float[Tensor, "batch expert"], Float[Tensor, "batch expert"], Float[Tensor, "batch expert"]]:
        offset, along, before = self._seen(torch.cat([theta - self.reference, step, last], -1)).chunk(3, -1)
        image = self.middle @ self._through(along)
        return _sum(image * (offset + self.misfit)), _sum(image * along), _sum(image * before)


def _sum(products: Float[Tensor, "batch expert r in"]) -> Float[Tensor, "batch expert"]:
    total: Tensor = products.sum(-1).double().sum(-1)
    return total


def _joint(one: Float[Tensor, "batch expert k r"], other: Float[Tensor, "batch expert k r"]) -> Float[Tensor, "_ k k"]:
    """Σ X_iY_iᵀ."""
    return one.transpose(1, 2).flatten(2) @ other.transpose(1, 2).flatten(2).mT
