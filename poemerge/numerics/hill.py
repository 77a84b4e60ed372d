"""The Hill estimator of the tail index, with its exact interval, over a range of k."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from poemerge.errors import NumericsError

__all__ = ["HillCurve", "hill"]


@dataclass(frozen=True)
class HillCurve:
    """Tail index from the k largest magnitudes, for a range of k, and the k at which it is read off.

    `k`, `tail_index`, `low` and `high` run in parallel; `chosen` is a position in them. (low, high) is the exact
    interval of probability `level` for a Pareto tail and independent entries.
    """

    k: tuple[int, ...]
    tail_index: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    chosen: int
    level: float


def hill(
    magnitudes: Float[Tensor, " entry"],
    *,
    fractions: tuple[float, float] = (0.001, 0.05),
    points: int = 40,
    level: float = 0.95,
) -> HillCurve:
    """Hill's estimator α(k) = k / Σ_{i≤k} log(X₍ᵢ₎/X₍ₖ₊₁₎) over the k largest of the entries (Hill, Ann. Stat. 1975).

    With a Pareto tail 2kα/α(k) is χ² with 2k degrees of freedom: that gives the interval. The k that is read off has
    the smallest Kolmogorov–Smirnov distance between the k exceedances and the fitted Pareto tail (Clauset, Shalizi &
    Newman, SIAM Review 2009): at small k noise dominates it, at large k the bias from the density's body.

    Arguments:
        magnitudes: |R| > 0, any float type, any order.
        fractions: the smallest and largest k as shares of the entries; k is never under 20.
        points: how many k, evenly spaced in log k.
        level: probability of the intervals.

    Raises NumericsError under 100 entries, where no tail can be seen, and when the top entries are all equal.
    """
    count = magnitudes.numel()
    if count < 100:
        raise NumericsError(
            f"Too few residual entries for a tail.\n  got:      {count}\n  expected: at least 100\n"
            "  next:     raise tail.entries_per_matrix, or leave this group out"
        )
    smallest = max(20, int(fractions[0] * count))
    largest = max(smallest + 1, min(count - 1, int(fractions[1] * count)))
    ks = np.unique(np.geomspace(smallest, largest, points).astype(np.int64))
    top = torch.topk(magnitudes.double(), int(ks[-1]) + 1).values.numpy()
    logs = np.log(top)
    means = np.cumsum(logs)[ks - 1] / ks - logs[ks]  # (1/k) Σ log X₍ᵢ₎ − log X₍ₖ₊₁₎
    if not np.all(means > 0):
        raise NumericsError(
            "The largest residual entries are all equal.\n  got:      no spread among the top entries\n"
            "  expected: magnitudes that differ\n  next:     check that the task vectors are not quantised or constant"
        )
    estimates = 1 / means
    # Quantiles of χ²(2k)/(2k), by the inverse of the regularised incomplete gamma function.
    low = estimates * special.gammaincinv(ks, (1 - level) / 2) / ks
    high = estimates * special.gammaincinv(ks, (1 + level) / 2) / ks
    distances = [_pareto_distance(logs, int(k), float(alpha)) for k, alpha in zip(ks, estimates, strict=True)]
    return HillCurve(
        k=tuple(int(k) for k in ks),
        tail_index=tuple(map(float, estimates)),
        low=tuple(map(float, low)),
        high=tuple(map(float, high)),
        chosen=int(np.argmin(distances)),
        level=level,
    )


def _pareto_distance(logs: np.ndarray, k: int, tail_index: float) -> float:
    """Kolmogorov–Smirnov distance of the k exceedances (logs descending) from 1 − (x/X₍ₖ₊₁₎)^−α."""
    fitted = -np.expm1(-tail_index * (logs[:k][::-1] - logs[k]))
    steps = np.arange(k + 1) / k
    return float(max(np.max(steps[1:] - fitted), np.max(fitted - steps[:-1])))
