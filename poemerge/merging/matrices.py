"""Matrices merged: deltas or factors in, the merged weights and their ledger entries out. No I/O."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import poemerge
from poemerge.errors import NumericsError
from poemerge.merging.elementwise import row_blocks
from poemerge.merging.merged import Merged, NotFiniteError, stored_as
from poemerge.merging.settings import ELEMENTWISE, SOLVED, ParameterSettings
from poemerge.numerics.adapters import Adapters
from poemerge.numerics.breadth import breadth, pooling_by_breadth
from poemerge.numerics.length import length
from poemerge.numerics.rounding import rounding_edge
from poemerge.numerics.solution import Factored
from poemerge.numerics.spectral import farthest, within

__all__ = ["merge_matrices", "solve_as_merged", "with_length"]


def merge_matrices(
    names: Sequence[str],
    experts: Sequence[str],
    base: Tensor,
    deltas: Tensor | list[tuple[Tensor, Tensor, float]],
    settings: ParameterSettings,
    transposed: bool,
    dtype: torch.dtype,
    total_experts: int,
    sensitivity: Tensor | None = None,
) -> list[Merged]:
    """Merge a batch of parameters of one shape, every one as a matrix (or a stack of matrices).

    Arguments: `base` `[batch, *shape]` in its stored dtype; `deltas` float32 `[batch, expert, *shape]`, or one factored
    adapter an expert with a batch of one; `transposed` says that the weights are stored as [in, out]; `sensitivity`
    float32 `[batch, expert, out, s]` is what poe on both sides takes for its experts' own.
    """
    started = time.perf_counter()
    minded = [None] * len(names) if sensitivity is None else list(sensitivity)
    if isinstance(deltas, Tensor):
        results = (
            [
                _dense(name, experts, one_base, one, settings, transposed, dtype, total_experts, own)
                for name, one_base, one, own in zip(names, base, deltas, minded, strict=True)
            ]
            if settings.method != "poe" or deltas.ndim != 4 or base.device.type == "cpu"
            else _batched(names, experts, base, deltas, settings, transposed, dtype, sensitivity)
        )
    else:
        results = [_factored(names[0], experts, base[0], deltas, settings, transposed, dtype, minded[0])]
    seconds = (time.perf_counter() - started) / len(results)
    return [Merged(one.weight, {**one.entry, "seconds": seconds}) for one in results]


def solve_as_merged(
    deltas: Tensor,
    base: Tensor,
    settings: ParameterSettings,
    *,
    transposed: bool = False,
    sensitivity: Tensor | None = None,
) -> poemerge.Solution:
    """`poemerge.solve` of one matrix, or a batch of them, as the settings say; theta is [out, in].

    Arguments: `deltas` `[*batch, expert, *shape]` and the `base`'s weights `[*batch, *shape]`, `transposed` if stored
    as [in, out]; `sensitivity` `[*batch, expert, out, s]`. What the rounding of a stored checkpoint made of a task
    vector is not taken for something that it tells.
    """
    deltas, base = (deltas.mT, base.mT) if transposed else (deltas, base)
    pooling = None
    if settings.pooling is None and settings.side == "both" and settings.row_blocks is None:
        edge = torch.stack([rounding_edge(one + base.to(one.dtype)) for one in deltas.unbind(-3)], -1)
        pooling = pooling_by_breadth(breadth(deltas, edge=edge)) if bool(edge.any()) else None
    return _solve(deltas, settings, sensitivity, pooling)


def _solve(
    deltas: Tensor | Adapters, settings: ParameterSettings, sensitivity: Tensor | None, pooling: Tensor | None = None
) -> poemerge.Solution:
    return poemerge.solve(
        deltas,
        expert=settings.family,
        tail_index=settings.tail_index,
        scale=settings.scale,
        scale_factor=settings.scale_factor,
        prior=settings.prior,
        prior_precision=settings.prior_precision,
        side=settings.side,
        pooling=settings.pooling if pooling is None else pooling,
        max_steps=settings.max_steps,
        rtol=settings.rtol,
        sensitivity=sensitivity,
        row_blocks=settings.row_blocks if isinstance(deltas, Tensor) else None,
    )


def _dense(
    name: str,
    experts: Sequence[str],
    base: Tensor,
    deltas: Tensor,
    settings: ParameterSettings,
    transposed: bool,
    dtype: torch.dtype,
    total_experts: int,
    sensitivity: Tensor | None = None,
) -> Merged:
    """One parameter from dense deltas `[expert, *shape]`; a 3-D one of method poe is a stack of matrices."""
    norms = torch.linalg.vector_norm(deltas.reshape(len(deltas), -1), dim=1)
    _check_finite(name, experts, norms, base)
    if not bool(norms.any()):
        return Merged(None, {"outcome": "unchanged"})
    if settings.method in SOLVED and deltas.ndim == 4:
        slices = [
            _dense(f"{name}[{i}]", experts, base[i], deltas[:, i], settings, transposed, dtype, total_experts)
            for i in range(deltas.shape[1])
        ]
        weight = torch.stack(
            [
                stored_as(name, b, dtype) if one.weight is None else one.weight
                for one, b in zip(slices, base, strict=True)
            ]
        )
        return Merged(weight, _joined([one.entry for one in slices], experts))
    if settings.method == "poe":
        solution = solve_as_merged(deltas, base, settings, transposed=transposed, sensitivity=sensitivity)
        return _mode_added(name, experts, base, deltas, solution, settings, transposed, dtype, sensitivity)
    theta = _baseline(deltas, settings, transposed, total_experts)
    theta = theta.mT if transposed and settings.method in SOLVED else theta
    return _added(name, base, theta, settings, dtype, {"outcome": settings.method})


def _mode_added(
    name: str,
    experts: Sequence[str],
    base: Tensor,
    deltas: Tensor,
    solution: poemerge.Solution,
    settings: ParameterSettings,
    transposed: bool,
    dtype: torch.dtype,
    sensitivity: Tensor | None,
) -> Merged:
    """The base with one matrix's mode added: within its bound, at its length, and turned as it is stored."""
    theta, held = _bounded(solution.dense(), deltas, settings)
    settled = with_length(settings, deltas, base, sensitivity)
    theta = theta.mT if transposed else theta
    return _added(name, base, theta, settled, dtype, _entry(solution, experts, settled, held))


def _batched(
    names: Sequence[str],
    experts: Sequence[str],
    base: Tensor,
    deltas: Tensor,
    settings: ParameterSettings,
    transposed: bool,
    dtype: torch.dtype,
    sensitivity: Tensor | None = None,
) -> list[Merged]:
    """Several matrices of one shape in one call of the solver: what fills a GPU."""
    norms = torch.linalg.vector_norm(deltas.flatten(2), dim=2).cpu()
    for name, own, one_base in zip(names, norms, base, strict=True):
        _check_finite(name, experts, own, one_base)
    solutions = solve_as_merged(deltas, base, settings, transposed=transposed, sensitivity=sensitivity).unbind()
    merged = []
    known = [None] * len(names) if sensitivity is None else list(sensitivity)
    for name, own, one_base, one, solution, minded in zip(names, norms, base, deltas, solutions, known, strict=True):
        if bool(own.any()):
            merged.append(_mode_added(name, experts, one_base, one, solution, settings, transposed, dtype, minded))
        else:
            merged.append(Merged(None, {"outcome": "unchanged"}))
    return merged


def _factored(
    name: str,
    experts: Sequence[str],
    base: Tensor,
    factors: list[tuple[Tensor, Tensor, float]],
    settings: ParameterSettings,
    transposed: bool,
    dtype: torch.dtype,
    sensitivity: Tensor | None = None,
) -> Merged:
    """One matrix from LoRA factors: solved in their subspaces, added to the base as one low-rank product."""
    # (B A)ᵀ = Aᵀ Bᵀ: the factors are of the stored layout, the solver wants [out, in].
    given = [(a.mT, b.mT, s) if transposed else (b, a, s) for b, a, s in factors]
    try:
        adapters = Adapters(given)
    except NumericsError:
        for expert, (b, a, _) in zip(experts, factors, strict=True):
            if not bool(b.isfinite().all() & a.isfinite().all()):
                raise NotFiniteError(name, expert) from None
        raise
    solution = _solve(adapters, settings, sensitivity)
    theta = solution.theta
    assert isinstance(theta, Factored)
    middle, held = _bounded(theta.X, adapters, settings)
    theta = theta.between(middle) if held else theta
    settings = with_length(settings, adapters, base, sensitivity)
    left, right = (one.to(torch.float32) for one in theta.pair())
    left, right = (right, left) if transposed else (left, right)
    merged = _add_product(name, base, left, right, settings.multiple, dtype)
    return Merged(merged, _entry(solution, experts, settings, held))


def _add_product(name: str, base: Tensor, left: Tensor, right: Tensor, multiple: float, dtype: torch.dtype) -> Tensor:
    """base + multiple·left·rightᵀ in float32, rounded to `dtype`; in the base's memory where that is its own."""
    whole = base.dtype == dtype == torch.float32
    merged = base if base.dtype == dtype else torch.empty_like(base, dtype=dtype)
    # A block of rows at a time, which stays in the cache while it is checked.
    for rows in row_blocks(base.shape):
        block = base[rows] if whole else base[rows].to(torch.float32)
        block.addmm_(left[rows], right.mT, alpha=multiple)
        # A sum costs a tenth of asking every entry; it may overflow where they are finite: they have the last word.
        if not math.isfinite(float(block.sum())) and not bool(block.isfinite().all()):
            product = multiple * (left[rows] @ right.mT)
            raise _not_finite(name, bool(product.isfinite().all()))
        if not whole:
            merged[rows] = stored_as(name, block, dtype)
    return merged


def _bounded(theta: Tensor, deltas: Tensor | Adapters, settings: ParameterSettings) -> tuple[Tensor, int]:
    """Θ, or what lies between its orthonormal bases, within the reach of the experts (poemerge.numerics.spectral); and
    how many directions were held back. A coefficient that is given says itself how long Θ is to be."""
    return (theta, 0) if settings.coefficient is not None else within(theta, farthest(deltas), settings.overshoot)


def with_length(
    settings: ParameterSettings, deltas: Tensor | Adapters, base: Tensor, sensitivity: Tensor | None
) -> ParameterSettings:
    """The settings with a coefficient: where none is given, by the task vectors' length beside the base's weight.

    It is 1 where the `sensitivity` `[expert, out, s]` of every expert that moved the matrix is known: then each one
    holds what it did not move. `deltas` `[expert, out, in]` or adapters, and `base`, are of one matrix as it is stored.
    """
    if settings.coefficient is not None:
        return settings
    if sensitivity is not None:
        sizes = deltas.flatten(1).norm(dim=1) if isinstance(deltas, Tensor) else deltas.norm_sq()[0]
        if bool((sensitivity.flatten(1).any(1) | (sizes == 0)).all()):
            return replace(settings, coefficient=1.0)
    return replace(settings, coefficient=length(deltas, base))


def _baseline(deltas: Tensor, settings: ParameterSettings, transposed: bool, total_experts: int) -> Tensor:
    """Θ of a baseline: `[*shape]` from `[expert, *shape]`; methods for matrices see [out, in], others one long row."""
    if settings.method in ELEMENTWISE:
        total = deltas.sum(0)
        return total if settings.method == "task_arithmetic" else total / total_experts
    import poemerge.baselines as baselines

    method = getattr(baselines, settings.method)
    stack = (deltas.mT if transposed else deltas) if settings.method in SOLVED else deltas.reshape(len(deltas), 1, -1)
    extra = {"seed": settings.seed} if settings.method == "dare_ties" else {}
    theta: Tensor = method(stack, **extra)
    return theta if settings.method in SOLVED else theta.reshape(deltas.shape[1:])


def _added(
    name: str, base: Tensor, theta: Tensor, settings: ParameterSettings, dtype: torch.dtype, entry: dict[str, Any]
) -> Merged:
    merged = base.to(torch.float32).add(theta.to(torch.float32), alpha=settings.multiple)
    _check_merged(name, base, merged)
    return Merged(stored_as(name, merged, dtype), entry)


def _check_merged(name: str, base: Tensor, merged: Tensor) -> None:
    # One sum costs a tenth of asking every entry; it may overflow where they are finite, so they have the last word.
    if math.isfinite(float(merged.sum())) or bool(merged.isfinite().all()):
        return
    raise _not_finite(name, not bool(base.isfinite().all()))


def _not_finite(name: str, base: bool) -> NumericsError:
    """The error for a merged weight that is not finite, by fault of the `base` or, that being finite, of the solve."""
    if base:
        return NotFiniteError(name, None)
    return NumericsError(
        f"{name}: the merged weight is not finite although its inputs are. "
        "Next: raise prior_precision, or override the method for this parameter."
    )


def _check_finite(name: str, experts: Sequence[str], norms: Tensor, base: Tensor) -> None:
    if bool(norms.isfinite().all()):
        return
    if not bool(base.isfinite().all()):
        raise NotFiniteError(name, None)
    raise NotFiniteError(
        name, next(expert for expert, norm in zip(experts, norms, strict=True) if not math.isfinite(norm))
    )


def _entry(
    solution: poemerge.Solution, experts: Sequence[str], settings: ParameterSettings, held: int
) -> dict[str, Any]:
    weights = solution.weights.double().reshape(-1, len(experts)).mean(0)
    total = float(weights.sum())
    return {
        "weights": {e: float(w) / total if total > 0 else 0.0 for e, w in zip(experts, weights, strict=True)},
        "coefficient": settings.multiple,
        "held": held,
        "steps": solution.steps,
        "energy_first": float(solution.energy[0]),
        "energy_last": float(solution.energy[-1]),
        "energy": [float(f"{value:.6g}") for value in solution.energy.tolist()],
        "outcome": solution.outcome.code,
    }


def _joined(entries: list[dict[str, Any]], experts: Sequence[str]) -> dict[str, Any]:
    """One entry for a stack of matrices: energies and steps added up, weights averaged, the commonest outcome."""
    solved = [entry for entry in entries if "weights" in entry]
    if not solved:
        return entries[0]
    outcomes = [entry["outcome"] for entry in solved]
    return {
        "weights": {e: sum(entry["weights"][e] for entry in solved) / len(solved) for e in experts},
        "coefficient": sum(entry["coefficient"] for entry in solved) / len(solved),
        "held": sum(entry["held"] for entry in solved),
        "steps": sum(entry["steps"] for entry in solved),
        "energy_first": sum(entry["energy_first"] for entry in solved),
        "energy_last": sum(entry["energy_last"] for entry in solved),
        "outcome": max(set(outcomes), key=lambda code: (outcomes.count(code), code)),
    }
