"""One-sided products of adapters in their dual form: everything from two Gram matrices, whatever the matrix's size."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from poemerge.numerics.one_sided import AsGiven, without_size

__all__ = ["DualOneSided", "Grams", "own_blocks"]

# Of a Gram matrix's mean diagonal: added to it, it is rounding, and adapters without their full rank can be factorised.
_NUGGET = 1e-14
# Of the dual matrix's mean diagonal: the least prior that keeps its rounding out where adapters share directions.
_LEAST_PRIOR = 1e-12


def own_blocks(gram: Float[Tensor, "batch stacked stacked"], experts: int) -> Float[Tensor, "batch expert r r"]:
    """Every expert's own block of the inner products of all; a view where `gram` lies in one piece."""
    rank = gram.shape[-1] // experts
    return gram.reshape(-1, experts, rank, experts, rank).diagonal(dim1=1, dim2=3).movedim(-1, 1)


@dataclass(frozen=True)
class Grams:
    """Task vectors A_i = P_iQ_iᵀ of a batch: the inner products of all columns of the P_i, and of the Q_i; float64."""

    left: Float[Tensor, "batch stacked stacked"]
    right: Float[Tensor, "batch stacked stacked"]
    experts: int
    dtype = torch.float64

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, chunk: slice | list[int]) -> "Grams":
        return Grams(self.left[chunk], self.right[chunk], self.experts)

    @property
    def mT(self) -> "Grams":  # noqa: N802  (as tensors spell it)
        """The transposed task vectors."""
        return Grams(self.right, self.left, self.experts)

    def over(self, unit: Float[Tensor, " batch"]) -> "Grams":
        """Every member's task vectors divided by its unit."""
        return Grams(self.left / unit.square()[:, None, None], self.right, self.experts)

    def double(self) -> "Grams":
        """Themselves."""
        return self

    def joined(self, blocks: Float[Tensor, "batch expert r r"]) -> Float[Tensor, "batch stacked stacked"]:
        """The matrix of these blocks, zero elsewhere."""
        whole = blocks.new_zeros(self.left.shape)
        own_blocks(whole, self.experts).copy_(blocks)
        return whole

    @cached_property
    def norm_sq(self) -> Float[Tensor, "batch expert"]:
        """‖A_i‖²_F."""
        left, right = (own_blocks(gram, self.experts) for gram in (self.left, self.right))
        return (left * right).sum((-2, -1)).clamp_min(0)

    @property
    def sizes(self) -> Float[Tensor, "batch expert"]:
        """‖A_i‖_F."""
        return self.norm_sq.sqrt()

    def mean(self) -> Float[Tensor, "batch stacked stacked"]:
        """The coefficients of the experts' mean."""
        identity = torch.eye(self.left.shape[-1], dtype=self.dtype, device=self.left.device)
        return (identity / self.experts).expand_as(self.left)


class DualOneSided(AsGiven):
    """`OneSided` for Θ = Σ P_i W_ij Q_jᵀ, solved for the coefficients W.

    With M and N the inner products of all P and of all Q, T = diag(M_ii), K_i = N_ii and D = diag(w_i K_i),

        r_i² = ⟨K_i (MW − T)_i, ((MW − T)N)_i⟩      ‖Θ‖² = ⟨W, MWN⟩      (DM + λ)W = DT

    (the gradient of E is P(D(MW − T) + λW)Qᵀ). With K_i = C_iC_iᵀ and W = C w^½ Y the last is symmetric and positive:
    (w^½ CᵀMC w^½ + λ)Y = w^½ CᵀT. No basis of the spans is needed, and adapters may share their directions.
    """

    def __init__(self, given: Grams, unit: Float[Tensor, " batch"], mean_over: int) -> None:
        """`unit`: what the task vectors are divided by. `mean_over`: how many diagonal entries mean diag H averages
        over (the full `out`)."""
        scaled = given.over(unit)
        self.mean_over, self.unit = mean_over, unit[:, None, None]
        self.left, self.right = scaled.left, scaled.right
        own, self.middle = (own_blocks(gram, given.experts) for gram in (self.left, self.right))
        self.trace = self.norm_sq = given.norm_sq / unit.square().unsqueeze(-1)
        self.reference = scaled.mean()
        self.rank = own.shape[-1]
        self.start_residual_sq = ((self.middle @ own) * (own @ self.middle)).sum((-2, -1)).clamp_min(0)
        self.target = scaled.joined(own)
        self.target_image = (own @ self._split(self.right)).flatten(1, 2)
        nugget = _NUGGET * self.middle.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(torch.float64).tiny
        identity = torch.eye(self.rank, dtype=self.left.dtype, device=self.left.device)
        self.root = torch.linalg.cholesky_ex(self.middle + nugget[..., None, None] * identity)[0]
        rooted = (self.root.mT @ self._split(self.left)).flatten(1, 2)
        self.rooted = (self.root.mT @ self._split(rooted.mT)).flatten(1, 2)
        self.rooted_own = self.root.mT @ own

    def minimise(
        self,
        weights: Float[Tensor, "batch expert"],
        prior: Float[Tensor, " batch"],
        start: Float[Tensor, "batch stacked stacked"] | None,  # noqa: ARG002  (the two-sided problem iterates from it)
        rtol: float,  # noqa: ARG002
    ) -> tuple[Float[Tensor, "batch stacked stacked"], Bool[Tensor, " batch"]]:
        """W(w) by Cholesky, and where the factorisation succeeded."""
        weights, prior = without_size(weights, prior)
        roots = weights.sqrt().repeat_interleave(self.rank, 1).unsqueeze(-1)
        matrix = self.rooted * roots * roots.mT
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        # Directions that several adapters share, and a prior of zero: then the shortest Θ.
        diagonal += torch.maximum(prior.unsqueeze(-1), _LEAST_PRIOR * diagonal.mean(-1, keepdim=True))
        factor, info = torch.linalg.cholesky_ex(matrix)
        # The right side is a block an expert, so the inverse costs less than solving for it.
        pulled = roots.reshape(len(roots), -1, self.rank, 1) * self.rooted_own
        inverse = self._split(torch.cholesky_inverse(factor)).mT
        solved = (inverse @ pulled).movedim(1, -2).flatten(-2)
        theta = roots * (self.root @ self._split(solved)).flatten(1, 2)
        return theta, (info == 0) & theta.sum((-2, -1)).isfinite()

    def rows(self, theta: Float[Tensor, "batch stacked stacked"]) -> Float[Tensor, "batch row"]:
        """Every r_i², and ‖Θ‖² as the last row."""
        seen, image = self._seen(theta)
        own = self._per_expert(seen - self.target, image - self.target_image)
        return torch.cat([own, (theta * image).sum((-2, -1))[:, None]], 1).clamp_min(0)

    def expand(
        self,
        theta: Float[Tensor, "batch stacked stacked"],
        step: Float[Tensor, "batch stacked stacked"],
        last: Float[Tensor, "batch stacked stacked"],
    ) -> tuple[Float[Tensor, "batch row"], Float[Tensor, "batch row"], Float[Tensor, "batch row"]]:
        """Half of every row's slope at Θ along `step`, and the curvatures ⟨step, step⟩ and ⟨step, last⟩ of its form."""
        along, image = self._seen(step)
        seen = (self.left @ theta - self.target, along, self.left @ last)
        found = []
        for places, one in zip((theta, step, last), seen, strict=True):
            norm = (places * image).sum((-2, -1))[:, None]
            found.append(torch.cat([self._per_expert(one, image), norm], 1))
        return found[0], found[1], found[2]

    def recentre(
        self,
        theta: Float[Tensor, "batch stacked stacked"],  # noqa: ARG002
        rows: Float[Tensor, "batch row"],
    ) -> Float[Tensor, "batch row"]:
        """`rows` as they are: residuals are formed before they are squared."""
        return rows

    def leave(self, theta: Float[Tensor, "batch stacked stacked"]) -> Float[Tensor, "batch stacked stacked"]:
        """The coefficients that give Θ over the unit, of the task vectors as they came."""
        return theta / self.unit

    def _split(self, matrix: Float[Tensor, "batch stacked k"]) -> Float[Tensor, "batch expert r k"]:
        return matrix.reshape(len(matrix), -1, self.rank, matrix.shape[-1])

    def _seen(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """MW and MWN."""
        seen = self.left @ theta
        return seen, seen @ self.right

    def _per_expert(self, seen: Tensor, image: Tensor) -> Float[Tensor, "batch expert"]:
        """⟨K_i Z_i, E_i⟩."""
        products: Tensor = (self.middle @ self._split(seen)) * self._split(image)
        return products.sum((-2, -1))
