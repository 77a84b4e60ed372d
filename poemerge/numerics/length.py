"""How long the merged delta should be: the part of Θ that is added to the base."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from poemerge.numerics.adapters import Adapter, Adapters
from poemerge.numerics.spectral import norms_sq

__all__ = ["length"]

STRENGTH = 30.0
"""φ per squared relative size of the task vectors; chosen on validation splits, see docs/method.md."""

_LANCZOS_STEPS = 8


def length(
    deltas: Float[Tensor, "expert out in"] | Sequence[Adapter] | Adapters,
    base: Float[Tensor, "out in"],
) -> float:
    """c = (1 + φ)/(1 + Nφ), with N = n²/‖Σ Â_i‖²_F experts in effect and φ = STRENGTH · mean_i ‖A_i‖₂²/‖W‖₂².

    The mode of a product of experts keeps each task vector whole in the directions of its own expert and lets all the
    others pass beside it. That cross-talk is no matter while task vectors are small beside the base's weight W, and
    ruins the merge when they are long. Let every expert mind the directions that it did not move φ times as much as
    those that it did: for n task vectors orthogonal to each other the best multiple of Θ is then c, between 1 (short
    task vectors, one expert, or experts that agree) and 1/N, the plain mean.

    Arguments: `deltas` as `poemerge.solve` takes them for one matrix, a delta of zeros counts as absent; `base` is W.
    Returns c in (0, 1]; 1 where all deltas are zero. Spectral norms by Lanczos, in the deltas' own dtype.
    """
    task_vectors = deltas if isinstance(deltas, Tensor | Adapters) else Adapters(deltas)
    if isinstance(task_vectors, Tensor):
        stack = task_vectors
        sizes = torch.linalg.vector_norm(stack, dim=(-2, -1)).double()
        present = sizes > 0
        if not bool(present.any()):
            return 1.0
        unit_sum = torch.einsum("eoi,e->oi", stack, torch.where(present, 1 / sizes, 0.0).to(stack.dtype))
        agreement = float(torch.linalg.vector_norm(unit_sum).double().square())
    else:
        adapters = task_vectors
        norm_sq = adapters.norm_sq()[0]
        present = norm_sq > 0
        if not bool(present.any()):
            return 1.0
        per_size = torch.where(present, adapters.scaling / norm_sq.sqrt(), 0.0)
        experts, rank = len(present), adapters.left.gram.shape[-1] // len(present)
        overlaps = (adapters.left.gram[0] * adapters.right.gram[0]).reshape(experts, rank, experts, rank)
        agreement = float(per_size @ overlaps.sum((1, 3)) @ per_size)
    count = int(present.sum())
    effective = min(float(count), count**2 / agreement) if agreement > 0 else float(count)
    base_sq = float(norms_sq(base.to(torch.float32).unsqueeze(0), _LANCZOS_STEPS))
    mean_sq = float(norms_sq(task_vectors, _LANCZOS_STEPS).sum()) / count
    if base_sq == 0:
        return 1 / effective
    phi = STRENGTH * mean_sq / base_sq
    return min(1.0, (1 + phi) / (1 + effective * phi))
