"""How many directions a task vector tells about."""

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.numerics.one_sided import gram

__all__ = ["breadth"]

# Eigenvalues below this part of the largest are the rounding of a float32 product: an adapter has none there.
_ROUNDING = 1e-6


def breadth(
    deltas: Float[Tensor, "*batch expert out in"], directions: int | None = None
) -> Float[Tensor, "*batch expert"]:
    """ρ = ‖A‖_*²/(d·‖A‖²_F) in [0, 1]: the share of the d `directions` that A has (its smaller side by default).

    With singular values σ this is (Σσ)²/(d·Σσ²): 1 for d equal ones, r/d for r equal ones, about 0.7 for noise, and no
    more than r/d for an adapter of rank r. Float64; 0 for a task vector of zeros.
    """
    largest = torch.linalg.vector_norm(deltas, ord=torch.inf, dim=(-2, -1), keepdim=True)
    deltas = deltas / torch.where(largest > 0, largest, 1.0)  # squares of tiny entries would vanish
    tall = deltas if deltas.shape[-1] <= deltas.shape[-2] else deltas.mT
    values = torch.linalg.eigvalsh(gram(tall.mT).double()).clamp_min(0)
    values = torch.where(values > _ROUNDING * values[..., -1:], values, 0.0)
    total = values.sum(-1)
    share: Tensor = torch.where(total > 0, values.sqrt().sum(-1).square() / total, 0.0)
    return (share / (directions or tall.shape[-1])).clamp_max(1)
