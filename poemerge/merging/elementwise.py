"""Parameters merged entry by entry: sums, means, rows of embeddings, TIES; in blocks of rows where they are large."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoints import ExpertSet, Loaded
from poemerge.merging.merged import Merged, NotFiniteError, stored_as
from poemerge.merging.settings import ParameterSettings

__all__ = ["merge_elementwise", "merge_trimmed", "row_blocks", "ties_thresholds"]

_BLOCK_ENTRIES = 1 << 19
"""Of a block of rows: 2 MB in float32, what a cache of one core holds."""


def merge_elementwise(
    loaded: Loaded, settings: ParameterSettings, moved: Sequence[bool], experts: int, dtype: torch.dtype
) -> Merged:
    """mean: base + c·Σδ/N over all N `experts`; average: over those that `moved`; task_arithmetic: base + c·Σδ; rows:
    in every row base + Σ‖δ‖²δ/Σ‖δ‖².

    The last is the mode of the product of experts of a layer that is looked up: its inputs are one-hot, their Gram is
    diagonal, and an expert's precision for a token is the squared length of what it did to the token's row.

    Sums in float32. `loaded` may be a block of rows; the entry counts what belongs to that block.
    """
    started = time.perf_counter()
    base = loaded.base.to(torch.float32)
    total: Tensor | None = None
    count = 0
    if settings.method == "rows":
        total, moved = _weighted_rows(loaded), [False] * len(moved)
    for expert, counts in zip(loaded.experts, moved, strict=True):
        whole = loaded.whole.pop(expert, None)
        if not counts:
            continue
        if whole is not None:
            delta = whole.to(torch.float32).sub_(base)  # in place: what was read is ours
            total = delta if total is None else total.add_(delta)
        if expert in loaded.factors:
            b, a, scaling = loaded.factors[expert]
            total = torch.zeros_like(base) if total is None else total
            total.addmm_(b.to(torch.float32), a.to(torch.float32), alpha=scaling)
        count += 1
    outcome = {"task_arithmetic": "sum", "rows": "rows"}.get(settings.method, "mean")
    entry: dict[str, Any] = {"outcome": outcome}
    # One pass tells both: a sum that is not finite, and, but for rare cancellation, one that is zero everywhere.
    signal = 0.0 if total is None else float(total.sum())
    if not math.isfinite(signal):
        raise NotFiniteError(loaded.name, None)
    if total is None or (signal == 0 and not bool(total.any())):
        return Merged(None, {**entry, "outcome": "unchanged", "seconds": time.perf_counter() - started})
    share = {"mean": 1 / experts, "average": 1 / max(count, 1)}.get(settings.method, 1.0)
    # The sum's memory becomes the result's: the base may be the very tensor that was read.
    merged = torch.add(base, total, alpha=settings.multiple * share, out=total)
    return Merged(stored_as(loaded.name, merged, dtype), {**entry, "seconds": time.perf_counter() - started})


def _weighted_rows(loaded: Loaded) -> Tensor:
    """Σ‖δ‖²δ/Σ‖δ‖² of every row, 0 where no expert moved it; float32."""
    total = torch.zeros_like(loaded.base, dtype=torch.float32)
    weights = torch.zeros((*total.shape[:-1], 1), dtype=torch.float32, device=total.device)
    for expert in loaded.experts:
        delta = loaded.delta(expert)
        weight = delta.square().sum(-1, keepdim=True)
        weights += weight
        total += delta.mul_(weight)
    return total.div_(weights.clamp_min(torch.finfo(torch.float32).tiny))


def ties_thresholds(experts: ExpertSet, name: str) -> Tensor:
    """For every expert that touches `name`, the least size that TIES keeps; one expert is read at a time, in blocks."""
    shape = experts.base.shape(name)
    row = math.prod(shape[1:])
    sizes = torch.empty(math.prod(shape), dtype=torch.float32)
    found = []
    for expert in experts.touching(name):
        for rows in row_blocks(shape):
            sizes[rows.start * row : rows.stop * row] = experts.delta(expert, name, rows).flatten()
        found.append(_threshold(name, expert, sizes))
    return torch.stack(found)


def _threshold(name: str, expert: str, sizes: Tensor) -> Tensor:
    """The least size that TIES keeps of a flat delta, which is overwritten; NumPy's partition is 6 times kthvalue."""
    import poemerge.baselines as baselines

    density: float = inspect.signature(baselines.ties).parameters["density"].default
    if not math.isfinite(float(sizes.abs_().sum())):
        raise NotFiniteError(name, expert)
    place = len(sizes) - max(1, math.ceil(density * len(sizes)))
    sizes.numpy().partition(place)
    return sizes[place].clone()


def row_blocks(shape: Sequence[int], experts: int = 1) -> Iterator[slice]:
    """Rows, block by block, of which as many matrices as there are `experts` fit a cache."""
    step = max(1, _BLOCK_ENTRIES // max(1, math.prod(shape[1:]) * experts))
    for first in range(0, shape[0], step):
        yield slice(first, min(first + step, shape[0]))


def merge_trimmed(
    loaded: Loaded, settings: ParameterSettings, dtype: torch.dtype, thresholds: Tensor | None = None
) -> Merged:
    """TIES on a parameter, or on some of its rows with the `thresholds` `[expert]` of the whole; on the CPU.

    Only a block of the deltas exists at a time; where the base has the result's dtype, its memory is the result's.
    """
    import poemerge.baselines as baselines

    started = time.perf_counter()
    shape = loaded.base.shape
    if not shape:
        scalars = {expert: own.reshape(1) for expert, own in loaded.whole.items()}
        loaded = Loaded(loaded.name, loaded.experts, loaded.base.reshape(1), scalars, {})
    if thresholds is None:
        thresholds = torch.stack([_threshold(loaded.name, e, loaded.delta(e).flatten()) for e in loaded.experts])
    merged = loaded.base if loaded.base.dtype == dtype else torch.empty_like(loaded.base, dtype=dtype)
    changed = False
    for rows in row_blocks(loaded.base.shape, len(loaded.experts)):
        block = loaded.rows(rows)
        theta = baselines.ties(block.deltas(), thresholds=thresholds)
        changed = changed or bool(theta.any())
        merged[rows] = stored_as(loaded.name, block.base.to(torch.float32).add(theta, alpha=settings.multiple), dtype)
    entry = {"outcome": "ties" if changed else "unchanged", "seconds": time.perf_counter() - started}
    return Merged(merged.reshape(shape) if changed else None, entry)
