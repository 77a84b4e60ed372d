"""The one-sided product of experts: residual A_iᵀ(Θ − A_i), normal matrix H(w) = Σ w_i A_iA_iᵀ + λI."""

import itertools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["AsGiven", "OneSided", "Referenced", "dot", "gram", "inner", "norm_sq", "normal_solve", "without_size"]

# Up to this many rows the factorisation runs in float64 whatever the deltas are in: it is a few percent of a step.
_FLOAT64_ROWS = 1024
# From this many rows on a CPU, a Gram matrix is worth its blocks.
_BLOCKED_ROWS = 512
_BLOCKS = 4
# Inner products sum this many entries in the tensors' own dtype at a time: long rows for speed, few for the digits.
_INNER_ENTRIES = 1 << 14


def inner(many: Float[Tensor, "batch expert i j"], one: Float[Tensor, "batch i j"]) -> Float[Tensor, "batch expert"]:
    """⟨X_i, Y⟩ for every expert: some rows at a time in the tensors' own dtype, and the sum over those in float64."""
    if many.device.type != "cpu":  # one row at a time, all of them at once
        return (many.transpose(1, 2) @ one.unsqueeze(-1)).squeeze(-1).double().sum(1)
    rows = max(1, _INNER_ENTRIES // many.shape[-1])
    total = torch.zeros(many.shape[:2], dtype=torch.float64, device=many.device)
    for first in range(0, many.shape[-2], rows):
        end = first + rows
        total += (many[:, :, first:end].flatten(2) @ one[:, first:end].flatten(1).unsqueeze(-1)).squeeze(-1)
    return total


def dot(a: Float[Tensor, "batch i j"], b: Float[Tensor, "batch i j"]) -> Float[Tensor, " batch"]:
    """⟨X, Y⟩, as `inner` takes it."""
    return inner(a.unsqueeze(1), b).squeeze(1)


def norm_sq(matrices: Float[Tensor, "*many i j"]) -> Float[Tensor, "*many"]:
    """‖X‖²_F, each row in the tensor's own dtype and the sum over rows in float64."""
    squares: Tensor = torch.linalg.vector_norm(matrices, dim=-1).double().square().sum(-1)
    return squares


def gram(matrices: Float[Tensor, "*many i j"]) -> Float[Tensor, "*many i i"]:
    """X Xᵀ; a large one block by block, so that the half that mirrors the other is not multiplied out."""
    rows = matrices.shape[-2]
    if rows < _BLOCKED_ROWS or matrices.device.type != "cpu":
        product: Tensor = matrices @ matrices.mT
        return product
    product = matrices.new_empty(*matrices.shape[:-1], rows)
    bounds = [rows * block // _BLOCKS for block in range(_BLOCKS + 1)]
    for first, end in itertools.pairwise(bounds):
        below = matrices[..., first:, :] @ matrices[..., first:end, :].mT
        product[..., first:, first:end] = below
        product[..., first:end, end:] = below[..., end - first :, :].mT
    return product


def without_size(weights: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and prior over the largest of them: their common size cancels in Θ(w), and cannot overflow float32 so."""
    size = torch.maximum(weights.amax(-1), prior).clamp_min(torch.finfo(torch.float64).tiny)
    return weights / size.unsqueeze(-1), prior / size


def normal_solve(
    matrix: Float[Tensor, "batch out out"],
    prior: Float[Tensor, " batch"],
    slopes: Float[Tensor, "batch out in"],
    reference: Float[Tensor, "batch out in"],
) -> tuple[Float[Tensor, "batch out in"], Bool[Tensor, " batch"]]:
    """C − (M + λI)⁻¹(S + λC) by Cholesky, and where that succeeded; a float64 M is overwritten."""
    if matrix.shape[-1] <= _FLOAT64_ROWS:
        matrix = matrix.double()
    matrix.diagonal(dim1=-2, dim2=-1).add_(prior.to(matrix.dtype).unsqueeze(-1))
    right = slopes.to(matrix.dtype) + prior.to(matrix.dtype)[:, None, None] * reference.to(matrix.dtype)
    factor, info = torch.linalg.cholesky_ex(matrix)
    step = torch.cholesky_solve(right, factor).to(reference.dtype)
    theta = reference - step
    return theta, (info == 0) & norm_sq(theta).isfinite()


class Referenced:
    """Energies kept about a reference C, so that what cancels is of the size of the residuals there."""

    reference: Tensor
    reference_residual_sq: Tensor

    def _refer(self, reference: Float[Tensor, "batch out in"]) -> None:
        raise NotImplementedError

    def residual_sq(self, theta: Float[Tensor, "batch out in"]) -> Float[Tensor, "batch expert"]:
        """r_i², never below 0."""
        raise NotImplementedError

    def _expand(
        self,
        theta: Float[Tensor, "batch out in"],
        step: Float[Tensor, "batch out in"],
        last: Float[Tensor, "batch out in"],
    ) -> tuple[Float[Tensor, "batch expert"], Float[Tensor, "batch expert"], Float[Tensor, "batch expert"]]:
        """Half the slope of r_i² at Θ along `step`, and the curvatures ⟨step, step⟩ and ⟨step, last⟩ of its form."""
        raise NotImplementedError

    def rows(self, theta: Float[Tensor, "batch out in"]) -> Float[Tensor, "batch row"]:
        """Every r_i², and ‖Θ‖² as the last row."""
        return _with_norm(self.residual_sq(theta), norm_sq(theta))

    def expand(
        self,
        theta: Float[Tensor, "batch out in"],
        step: Float[Tensor, "batch out in"],
        last: Float[Tensor, "batch out in"],
    ) -> tuple[Float[Tensor, "batch row"], Float[Tensor, "batch row"], Float[Tensor, "batch row"]]:
        """Half of every row's slope at Θ along `step`, and the curvatures ⟨step, step⟩ and ⟨step, last⟩ of its form."""
        slope, own, across = self._expand(theta, step, last)
        return (
            _with_norm(slope, dot(theta, step)),
            _with_norm(own, norm_sq(step)),
            _with_norm(across, dot(step, last)),
        )

    def recentre(
        self, theta: Float[Tensor, "batch out in"], rows: Float[Tensor, "batch row"]
    ) -> Float[Tensor, "batch row"]:
        """`rows` at Θ, recomputed about Θ where an r_i² is so small beside that at the reference that rounding would
        show."""
        floor = torch.finfo(theta.dtype).eps ** 0.5 * self.reference_residual_sq
        if bool((rows[:, :-1] < floor).any()):
            self._refer(theta)
            return _with_norm(self.reference_residual_sq, rows[:, -1])
        return rows


def _with_norm(experts: Float[Tensor, "batch expert"], norm: Float[Tensor, " batch"]) -> Float[Tensor, "batch row"]:
    return torch.cat([experts, norm.unsqueeze(1)], 1)


class AsGiven:
    """What one-sided problems share, dense or thin: solved in the coordinates of the deltas."""

    # r is in the units of the deltas to this power.
    residual_degree = 2
    mean_over: int
    trace: Float[Tensor, "batch expert"]

    def mean_diagonal(self, weights: Float[Tensor, "batch expert"]) -> Float[Tensor, " batch"]:
        """Mean diagonal entry of Σ w_i G_i."""
        return (weights * self.trace).sum(-1) / self.mean_over

    def enter(self, theta: Float[Tensor, "batch out in"]) -> Float[Tensor, "batch out in"]:
        """Into the coordinates that the problem is solved in: the given ones."""
        return theta

    def leave(self, theta: Float[Tensor, "batch out in"]) -> Float[Tensor, "batch out in"]:
        """Back to the coordinates of the deltas."""
        return theta


class OneSided(AsGiven, Referenced):
    """H(w)Θ = Σ w_i G_i A_i on the output side, for a batch of equal shapes (transpose the deltas for the input side).

    Everything is kept about a reference C: with S_i = G_i(C − A_i) and Δ = Θ − C,

        r_i² = r_i²(C) + 2⟨S_i, Δ⟩ + ⟨G_i, ΔΔᵀ⟩        H(w)Δ = −Σ w_i S_i − λC

    so a step costs one factorisation, one solve and one ΔΔᵀ whatever the number of experts, and what cancels is of the
    size of the residual at C instead of ‖G_i‖².
    """

    def __init__(self, deltas: Float[Tensor, "batch expert out in"], mean_over: int) -> None:
        """`mean_over`: how many diagonal entries mean diag H averages over (the full `out` for a factored solve)."""
        self.deltas = deltas
        self.mean_over = mean_over
        self.grams = gram(deltas)
        self.trace = self.grams.diagonal(dim1=-2, dim2=-1).double().sum(-1)
        self.start_residual_sq = norm_sq(self.grams)
        self._refer(deltas.mean(1))

    def _refer(self, reference: Float[Tensor, "batch out in"]) -> None:
        difference = reference.unsqueeze(1) - self.deltas
        self.reference = reference
        if 2 * self.deltas.shape[-1] < self.deltas.shape[-2]:
            residual = self.deltas.mT @ difference
            self.slopes = self.deltas @ residual
            self.reference_residual_sq = norm_sq(residual)
        else:
            self.slopes = self.grams @ difference
            self.reference_residual_sq = (self.slopes * difference).sum(-1).double().sum(-1).clamp_min(0)

    def minimise(
        self,
        weights: Float[Tensor, "batch expert"],
        prior: Float[Tensor, " batch"],
        start: Float[Tensor, "batch out in"] | None,  # noqa: ARG002  (the two-sided problem iterates from it)
        rtol: float,  # noqa: ARG002
    ) -> tuple[Float[Tensor, "batch out in"], Bool[Tensor, " batch"]]:
        """Θ(w) = H(w)⁻¹ Σ w_i G_i A_i by Cholesky, and where the factorisation succeeded."""
        weights, prior = without_size(weights, prior)
        rows = self.grams.shape[-1]
        matrix = (weights.to(self.grams.dtype).unsqueeze(1) @ self.grams.flatten(2)).view(-1, rows, rows)
        slopes = (weights.to(self.slopes.dtype).unsqueeze(1) @ self.slopes.flatten(2)).view_as(self.reference)
        return normal_solve(matrix, prior, slopes, self.reference)

    def residual_sq(self, theta: Float[Tensor, "batch out in"]) -> Float[Tensor, "batch expert"]:
        """r_i² = ‖A_iᵀ(Θ − A_i)‖²_F, never below 0."""
        step = theta - self.reference
        linear, quadratic = inner(self.slopes, step), inner(self.grams, gram(step))
        return (self.reference_residual_sq + 2 * linear + quadratic).clamp_min(0)

    def _expand(
        self,
        theta: Float[Tensor, "batch out in"],
        step: Float[Tensor, "batch out in"],
        last: Float[Tensor, "batch out in"],
    ) -> tuple[Float[Tensor, "batch expert"], Float[Tensor, "batch expert"], Float[Tensor, "batch expert"]]:
        across = torch.cat([theta - self.reference, step, last], 1) @ step.mT
        offset, own, other = (inner(self.grams, block) for block in across.chunk(3, dim=1))
        return inner(self.slopes, step) + offset, own, other
