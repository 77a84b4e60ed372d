"""How many directions a task vector tells about."""

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.numerics.one_sided import gram

__all__ = ["breadth", "breadth_of_factors", "pooling_by_breadth"]

# Singular values below this part of the largest are rounding: of a densified adapter, and of a float32 Gram.
_ROUNDING = 1e-3
# The least y, however much a task vector tells; chosen on validation splits, see docs/method.md.
_LEAST_POOLING = 0.1


def pooling_by_breadth(share: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
    """y = max(0.1, 1 − ρ): how far an expert's input Gram is shrunk to the mean of all."""
    return (1 - share).clamp_min(_LEAST_POOLING)


def breadth(
    deltas: Float[Tensor, "*batch expert out in"],
    directions: int | None = None,
    edge: Float[Tensor, "*batch expert"] | None = None,
) -> Float[Tensor, "*batch expert"]:
    """ρ = rank(A)/d in [0, 1]: the share of the d `directions` (the smaller side by default) that A tells about.

    1 for a full fine-tune, but for a few directions that it hardly moved; r/d for an adapter of rank r, densified or
    not; 0 for a task vector of zeros. Singular values up to `edge` (0 by default) count as noise. Float64.
    """
    matrices = deltas.flatten(0, -3)
    edges = torch.zeros(len(matrices)) if edge is None else edge.flatten()
    # One at a time: all Gram matrices of a large layer in float64 would be more than its task vectors.
    ranks = [_rank_of(matrix, float(least)) for matrix, least in zip(matrices, edges, strict=True)]
    return torch.stack(ranks).reshape(deltas.shape[:-2]).double() / (directions or min(deltas.shape[-2:]))


def breadth_of_factors(
    left: Float[Tensor, "*batch expert out r"], right: Float[Tensor, "*batch expert in r"], directions: int
) -> Float[Tensor, "*batch expert"]:
    """The same ρ of A = P Qᵀ for `left` P and `right` Q, from their Gram matrices."""
    values, vectors = torch.linalg.eigh(left.double().mT @ left.double())
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    return _rank(root.mT @ (right.double().mT @ right.double()) @ root).double() / directions


def _rank_of(matrix: Float[Tensor, "out in"], edge: float) -> Tensor:
    largest = torch.linalg.vector_norm(matrix, ord=torch.inf)
    scale = torch.where(largest > 0, largest, 1.0)
    matrix = matrix / scale  # squares of tiny entries would vanish
    tall = matrix if matrix.shape[1] <= matrix.shape[0] else matrix.mT
    return _rank(gram(tall.mT).double(), edge / scale.double())


def _rank(product: Float[Tensor, "*batch k k"], edge: Tensor | float = 0.0) -> Float[Tensor, "*batch"]:
    """How many singular values of X are above rounding and above `edge`, from XᵀX in float64."""
    values = torch.linalg.eigvalsh(product)
    least = torch.as_tensor(edge, device=values.device).square().clamp_min(_ROUNDING**2 * values[..., -1:])
    rank: Tensor = (values > least).sum(-1)
    return rank
