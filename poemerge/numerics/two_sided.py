"""The two-sided (Kronecker) product of experts: residual Â_iᵀ(Θ − A_i)R_i^½ with Â_i = A_i/‖A_i‖_F."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from poemerge.numerics.one_sided import Referenced, dot, gram, inner, norm_sq, without_size
from poemerge.numerics.reuse import kept

__all__ = ["Kronecker", "TwoSided", "for_each", "output_factor"]

_MAX_CONJUGATE_STEPS = 400


class Kronecker:
    """What two-sided problems share: the joint eigenbases, and conjugate gradients in them.

    There the operator's own diagonal, Σ w_i diag L_i ⊗ diag R_i + λ, is a strong preconditioner: a Kronecker product of
    the summed Grams, exact on their diagonals and free to follow the weights.
    """

    residual_degree = 1
    mean_over: int
    reference: Tensor
    left_basis: Tensor
    right_basis: Tensor
    left_diagonal: Tensor
    right_diagonal: Tensor
    trace: Tensor

    def _operator(self, weights: Tensor, prior: Tensor) -> Callable[[Tensor], Tensor]:
        """Θ ↦ Σ w_i L_i Θ R_i + λΘ."""
        raise NotImplementedError

    def _slope(self, weights: Tensor) -> Tensor:
        """Σ w_i L_i (C − A_i) R_i at the reference C."""
        raise NotImplementedError

    def mean_diagonal(self, weights: Float[Tensor, "batch expert"]) -> Float[Tensor, " batch"]:
        """Mean diagonal entry of Σ w_i L_i ⊗ R_i."""
        mean: Tensor = (weights * self.trace).sum(-1) / self.mean_over
        return mean

    def minimise(
        self,
        weights: Float[Tensor, "batch expert"],
        prior: Float[Tensor, " batch"],
        start: Float[Tensor, "batch out in"] | None,
        rtol: float,
    ) -> tuple[Float[Tensor, "batch out in"], Bool[Tensor, " batch"]]:
        """Θ(w) by preconditioned conjugate gradients from `start`, to about `rtol` of its own size.

        Each iteration lowers the majorising quadratic, so even a truncated solve never raises the energy.
        """
        weights, prior = without_size(weights, prior)
        dtype = self.reference.dtype
        right = -self._slope(weights.to(dtype)) - prior.to(dtype)[:, None, None] * self.reference
        step = None if start is None else start - self.reference
        step = self._invert(weights, prior, right, step, rtol, norm_sq(self.reference))
        theta = self.reference + step
        return theta, norm_sq(theta).isfinite()

    def invert(
        self,
        weights: Float[Tensor, "batch expert"],
        prior: Float[Tensor, " batch"],
        right: Float[Tensor, "batch out in"],
        rtol: float,
    ) -> Float[Tensor, "batch out in"]:
        """The X with Σ w_i L_i X R_i + λX = `right`, both in the coordinates of the deltas."""
        return self.leave(self._invert(weights, prior, self.enter(right), None, rtol, torch.zeros_like(prior)))

    def _invert(
        self,
        weights: Float[Tensor, "batch expert"],
        prior: Float[Tensor, " batch"],
        right: Float[Tensor, "batch out in"],
        start: Float[Tensor, "batch out in"] | None,
        rtol: float,
        least_size: Float[Tensor, " batch"],
    ) -> Float[Tensor, "batch out in"]:
        dtype = right.dtype
        weights, shrink = weights.to(dtype), prior.to(dtype)[:, None, None]
        scaled = (weights.unsqueeze(-1) * self.left_diagonal).mT @ self.right_diagonal + shrink
        precondition = 1 / scaled.clamp_min(torch.finfo(dtype).eps * scaled.amax((-1, -2), keepdim=True))
        step = torch.zeros_like(right) if start is None else start.clone()
        operate = self._operator(weights, shrink)
        misfit = right.clone() if start is None else right - operate(step)
        conditioned = precondition * misfit
        direction = conditioned.clone()
        power = dot(misfit, direction)
        goal = max(rtol, 4 * torch.finfo(dtype).eps) ** 2
        for _ in range(_MAX_CONJUGATE_STEPS):
            # The preconditioned misfit is, to first order, the error of X itself.
            active = norm_sq(conditioned) > goal * torch.maximum(norm_sq(step), least_size)
            if not bool(active.any()):
                break
            image = operate(direction)
            curvature = dot(direction, image)
            length = torch.where(active & (curvature > 0), power / curvature, 0.0).to(dtype)[:, None, None]
            step.addcmul_(length, direction)
            misfit.addcmul_(length, image, value=-1)
            torch.mul(precondition, misfit, out=conditioned)
            previous, power = power, dot(misfit, conditioned)
            ratio = torch.where(previous > 0, power / previous, 0.0).to(dtype)[:, None, None]
            direction.mul_(ratio).add_(conditioned)
        return step

    def enter(self, theta: Float[Tensor, "batch *expert out in"]) -> Float[Tensor, "batch *expert out in"]:
        """Into the joint eigenbases."""
        if theta.ndim == 3:
            left, right = self.left_basis.mT, self.right_basis
        else:
            left, right = self.left_basis.mT.unsqueeze(1), self.right_basis.unsqueeze(1)
        entered: Tensor = left @ theta @ right
        return entered

    def leave(self, theta: Float[Tensor, "batch out in"]) -> Float[Tensor, "batch out in"]:
        """Back to the coordinates of the deltas."""
        given: Tensor = self.left_basis @ theta @ self.right_basis.mT
        return given


class TwoSided(Kronecker, Referenced):
    """Σ w_i L_i Θ R_i + λΘ = Σ w_i L_i A_i R_i, with L_i = Â_iÂ_iᵀ and R_i = (1 − y) Â_iᵀÂ_i + y·mean_j Â_jᵀÂ_j.

    `pooling` y, one for all or one each: an input Gram is a noisy estimate of what a task's inputs look like here, and
    tasks share most of that, so it is shrunk to the pooled one. Without it nobody guards the directions in which only
    some other expert moves, and Θ overshoots. The output Gram is the task's own, and stays.

    `sensitivity` F: where it is given, and not zero, the output Gram is the mean of that one and F̂_iF̂_iᵀ, of unit
    trace like it: what the task minds beside the directions that it moved.

    The problem is solved in the eigenbases of Σ L_i and Σ R_i. Energies are kept about a reference as in `OneSided`.
    """

    def __init__(
        self,
        deltas: Float[Tensor, "batch expert out in"],
        mean_over: int,
        pooling: float | Float[Tensor, "batch expert"],
        sensitivity: Float[Tensor, "batch expert out s"] | None = None,
    ) -> None:
        """`mean_over`: how many diagonal entries the mean diagonal averages over (out·in of the full matrix)."""
        self.mean_over = mean_over
        self.pooling = for_each(pooling, deltas)
        norm = norm_sq(deltas).sqrt()[..., None, None]
        shrink = torch.where(norm > 0, 1 / norm, 0.0).to(deltas.dtype)
        rows, columns = deltas.shape[-2:]
        width = columns if sensitivity is None else columns + sensitivity.shape[-1]
        # Whether `left` holds the L_i themselves or factors P_i with L_i = P_iP_iᵀ.
        self.formed = _gram_pays(rows, columns, width)
        # All that does not depend on the settings: a sweep makes it once.
        self.left_basis, self.right_basis, summed, self.deltas, self.unit, self.left = kept(
            (deltas,) if sensitivity is None else (deltas, sensitivity),
            lambda: self._products(deltas, shrink, sensitivity),
        )
        # In this basis the pooled input Gram is diagonal.
        present = (norm > 0).sum(1).clamp_min(1).to(deltas.dtype)
        self.pooled = (summed.clamp_min(0) / present[..., 0]).unsqueeze(-2)
        self.right = self.input_grams() if _gram_pays(columns, rows, rows) else None
        self.left_diagonal = self.left.diagonal(dim1=-2, dim2=-1) if self.formed else self.left.square().sum(-1)
        own = self.unit.square().sum(-2)
        self.right_diagonal = own.lerp(self.pooled.expand_as(own), self.pooling.squeeze(-1))
        self.trace = self.left_diagonal.double().sum(-1) * self.right_diagonal.double().sum(-1)
        self.start_residual_sq = (self.deltas * self._each(self.deltas)).sum(-1).double().sum(-1).clamp_min(0)
        self._refer(self.deltas.mean(1))

    def _products(
        self, deltas: Tensor, shrink: Tensor, sensitivity: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Joint eigenbases, the input side's eigenvalues; in them A_i, Â_i, and L_i or P_i."""
        unit = deltas * shrink
        factor = output_factor(unit, sensitivity)
        self.left_basis = torch.linalg.eigh(gram(factor.transpose(1, 2).flatten(2)))[1]
        summed, self.right_basis = torch.linalg.eigh(gram(unit.flatten(1, 2).mT))
        entered = self.enter(unit)
        # The input side's basis leaves Â_iÂ_iᵀ as it is.
        factor = entered if sensitivity is None else self.left_basis.mT.unsqueeze(1) @ factor
        left = gram(factor) if self.formed else factor
        return self.left_basis, self.right_basis, summed, self.enter(deltas), entered, left

    def input_grams(self) -> Float[Tensor, "batch expert in in"]:
        """R_i, in the coordinates that the problem is solved in."""
        grams: Tensor = (1 - self.pooling) * gram(self.unit.mT)
        grams.diagonal(dim1=-2, dim2=-1).add_(self.pooling.squeeze(-1) * self.pooled)
        return grams

    def _each(self, theta: Float[Tensor, "batch #expert out in"]) -> Float[Tensor, "batch expert out in"]:
        """L_i Θ R_i for every expert, of one Θ or of one each."""
        each: Tensor
        if self.right is None:
            each = ((1 - self.pooling) * (self.left @ (theta @ self.unit.mT))) @ self.unit
            if bool(self.pooling.any()):
                each += (self.left @ theta) * (self.pooling * self.pooled.unsqueeze(1))
        elif self.formed:
            each = self.left @ theta @ self.right
        else:
            each = self.left @ (self.left.mT @ theta @ self.right)
        return each

    def _operator(
        self, weights: Float[Tensor, "batch expert"], prior: Float[Tensor, "batch 1 1"]
    ) -> Callable[[Float[Tensor, "batch out in"]], Float[Tensor, "batch out in"]]:
        """Θ ↦ Σ w_i L_i Θ R_i + λΘ, the sum over experts inside one long product."""
        heavy = weights[:, :, None, None]
        unit, left, right = self.unit, self.left, self.right
        if right is None:
            own = ((1 - self.pooling) * heavy) * left
            summed = (self.pooling * heavy * left).sum(1)
            long = unit.flatten(1, 2)

            def wide(theta: Tensor) -> Tensor:
                narrow = own @ (theta.unsqueeze(1) @ unit.mT)
                out: Tensor = narrow.transpose(1, 2).flatten(2) @ long
                return out.addcmul_(summed @ theta, self.pooled).addcmul_(prior, theta)

            return wide
        formed = self.formed
        long = (heavy * left).transpose(1, 2).flatten(2)

        def tall(theta: Tensor) -> Tensor:
            narrow = theta.unsqueeze(1) if formed else left.mT @ theta.unsqueeze(1)
            out: Tensor = long @ (narrow @ right).flatten(1, 2)
            return out.addcmul_(prior, theta)

        return tall

    def _slope(self, weights: Float[Tensor, "batch expert"]) -> Float[Tensor, "batch out in"]:
        """Σ w_i L_i (C − A_i) R_i at the reference C."""
        return (weights.unsqueeze(1) @ self.slopes.flatten(2)).view_as(self.reference)

    def _refer(self, reference: Float[Tensor, "batch out in"]) -> None:
        difference = reference.unsqueeze(1) - self.deltas
        self.reference = reference
        self.slopes = self._each(difference)
        self.reference_residual_sq = (self.slopes * difference).sum(-1).double().sum(-1).clamp_min(0)

    def residual_sq(self, theta: Float[Tensor, "batch out in"]) -> Float[Tensor, "batch expert"]:
        """r_i² = ⟨L_i(Θ − A_i)R_i, Θ − A_i⟩, never below 0."""
        step = theta - self.reference
        linear, quadratic = inner(self.slopes, step), inner(self._each(step.unsqueeze(1)), step)
        return (self.reference_residual_sq + 2 * linear + quadratic).clamp_min(0)

    def _expand(
        self,
        theta: Float[Tensor, "batch out in"],
        step: Float[Tensor, "batch out in"],
        last: Float[Tensor, "batch out in"],
    ) -> tuple[Float[Tensor, "batch expert"], Float[Tensor, "batch expert"], Float[Tensor, "batch expert"]]:
        images = self._each(step.unsqueeze(1))
        slope = inner(self.slopes, step) + inner(images, theta - self.reference)
        return slope, inner(images, step), inner(images, last)


def for_each(
    pooling: float | Float[Tensor, "batch expert"], like: Float[Tensor, "batch expert _ _"]
) -> Float[Tensor, "#batch #expert 1 1"]:
    """One number for all experts, or one each, in the shape that multiplies their matrices."""
    numbers = torch.as_tensor(pooling).to(like)
    return numbers[..., None, None] if numbers.ndim else numbers.expand(1, 1, 1, 1)


def _gram_pays(side: int, other: int, width: int) -> bool:
    """Whether (XXᵀ)YZ takes fewer operations than X(XᵀYZ): XXᵀ of this `side`, X of `width`, Z of the `other` side.

    For one side of a matrix at least it does.
    """
    return side * (side + other) < width * (2 * side + other)


def output_factor(
    unit: Float[Tensor, "*batch expert out in"], sensitivity: Float[Tensor, "*batch expert out s"] | None
) -> Float[Tensor, "*batch expert out f"]:
    """P_i with L_i = P_iP_iᵀ: Â_i alone, or [Â_i, F̂_i]/√2 with F̂_i the sensitivity at unit norm.

    An expert whose delta is zero keeps L_i = 0, and one whose sensitivity is zero its own Gram.
    """
    if sensitivity is None:
        return unit
    size = torch.linalg.vector_norm(sensitivity, dim=(-2, -1), keepdim=True)
    moved = torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True) > 0
    known = (size > 0) & moved
    own = torch.where(known, 0.5**0.5, 1.0).to(unit.dtype)
    other = torch.where(known, 0.5**0.5 / size, 0.0).to(unit.dtype)
    return torch.cat([own * unit, other * sensitivity.to(unit.dtype)], -1)
