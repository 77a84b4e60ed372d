"""Statistics of task vectors, from one reading of the base and of every expert: norms, densities, cosines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poemerge.checkpoints.expert_set import ExpertSet
from poemerge.checkpoints.names import Rule, layer_group
from poemerge.errors import CheckpointError, Problem

__all__ = ["ParameterStatistics", "TaskVectorStatistics", "cosines", "opposed", "task_vector_statistics"]

_BLOCK_ENTRIES = 1 << 23
"""Entries of one parameter held at once for each expert; larger ones (embeddings) are read in blocks of rows."""

_CHANCE = 0.02
"""Of a sign test: what an expert is told at that has no direction in common with the others."""


@dataclass
class ParameterStatistics:
    """One parameter: `gram[i, j]` = ⟨A_i, A_j⟩ over the experts that touch it (float64), entries changed, base norm².

    `changed` counts entries that differ from the base; a factored delta counts as dense unless it is zero.
    """

    name: str
    rule: Rule
    shape: tuple[int, ...]
    experts: list[str]
    base_norm_sq: float
    gram: Tensor
    changed: list[int]
    factored: bool


@dataclass
class TaskVectorStatistics:
    """All parameters that some expert touches, and what is not finite."""

    parameters: list[ParameterStatistics] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def task_vector_statistics(experts: ExpertSet) -> TaskVectorStatistics:
    """Statistics of every parameter of `experts` that has entries, each file read once, front to back.

    Adapters stay factored: ⟨B_i A_i, B_j A_j⟩ = Σ (B_iᵀB_j) ∘ (A_i A_jᵀ). Raises CheckpointError naming every tensor
    that is not finite.
    """
    found = TaskVectorStatistics()
    for name in experts.names():
        if experts.rule(name) == "base" or not math.prod(experts.base.shape(name)):
            continue
        one = _factored(experts, name) if experts.is_factored(name) else _dense(experts, name)
        found.parameters.append(one)
        for i, expert in enumerate(one.experts):
            if not math.isfinite(float(one.gram[i, i])):
                found.problems.append(_not_finite(experts, expert, name))
    if found.problems:
        raise CheckpointError(found.problems)
    return found


def cosines(parameters: list[ParameterStatistics], names: list[str]) -> dict[str, Tensor]:
    """Cosine matrices `[expert, expert]` in the order of `names`: under "" the whole vector, else by layer group.

    Entries that need an expert with a zero task vector are 0.
    """
    position = {name: i for i, name in enumerate(names)}
    grams: dict[str, Tensor] = {"": torch.zeros(len(names), len(names), dtype=torch.float64)}
    for one in parameters:
        rows = torch.tensor([position[expert] for expert in one.experts])
        for group in ("", layer_group(one.name)):
            gram = grams.setdefault(group, torch.zeros_like(grams[""]))
            gram[rows.unsqueeze(1), rows] += one.gram
    return {group: _normalised(gram) for group, gram in grams.items()}


def opposed(parameters: list[ParameterStatistics], norms: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    """Experts that point against the others, with the number of parameters where they do, and of those that tell.

    Fine-tunes of one base share a little of their direction whatever they were trained for, so an expert's inner
    product with the sum of the others' task vectors, each of unit length, is above zero, in most parameters and over
    all. It is told where the product is negative over all, and in more parameters than a fair coin would have it
    (one-sided sign test, 0.02). `norms` are the task vectors' lengths; nobody is told of fewer than three above zero.
    """
    from scipy.stats import binomtest

    along: dict[str, list[float]] = {expert: [] for expert, norm in norms.items() if norm > 0}
    for one in parameters:
        units = torch.tensor([1 / norms[e] if e in along else 0.0 for e in one.experts], dtype=torch.float64)
        with_others = (one.gram - torch.diag(one.gram.diagonal())) @ units
        for expert, product in zip(one.experts, with_others.tolist(), strict=True):
            if expert in along and product != 0:
                along[expert].append(product)
    found = {}
    for expert, products in along.items():
        against, told = sum(product < 0 for product in products), len(products)
        if len(along) > 2 and sum(products) < 0 and binomtest(against, told, alternative="greater").pvalue < _CHANCE:
            found[expert] = (against, told)
    return found


def _normalised(gram: Tensor) -> Tensor:
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    return (gram * scale.unsqueeze(1) * scale).clamp(-1, 1)


def _factored(experts: ExpertSet, name: str) -> ParameterStatistics:
    touching = experts.touching(name)
    factors = [(scaling * b.double(), a.double()) for b, a, scaling in experts.factors(name)]
    gram = torch.zeros(len(touching), len(touching), dtype=torch.float64)
    for i, (b_i, a_i) in enumerate(factors):
        for j, (b_j, a_j) in enumerate(factors[: i + 1]):
            gram[i, j] = gram[j, i] = ((b_i.T @ b_j) * (a_i @ a_j.T)).sum()
    shape = experts.base.shape(name)
    base_norm_sq = sum(float(block.double().square().sum()) for block in _blocks(experts, name))
    changed = [math.prod(shape) if float(gram[i, i]) != 0 else 0 for i in range(len(touching))]
    return ParameterStatistics(name, experts.rule(name), shape, touching, base_norm_sq, gram, changed, True)


def _dense(experts: ExpertSet, name: str) -> ParameterStatistics:
    touching = experts.touching(name)
    gram = torch.zeros(len(touching), len(touching), dtype=torch.float64)
    changed = [0] * len(touching)
    base_norm_sq = 0.0
    for rows in _row_blocks(experts.base.shape(name)):
        loaded = experts.load(name, rows)
        base_norm_sq += float(loaded.base.double().square().sum())
        flat = loaded.deltas().reshape(len(touching), loaded.base.numel())
        changed = [known + int(count) for known, count in zip(changed, (flat != 0).sum(1), strict=True)]
        # float32 products summed in float64 over short pieces: exact enough for a cosine, and no float64 copy.
        for piece in flat.split(1 << 16, dim=1):  # type: ignore[no-untyped-call]
            gram += (piece @ piece.T).double()
    return ParameterStatistics(
        name, experts.rule(name), experts.base.shape(name), touching, base_norm_sq, gram, changed, False
    )


def _row_blocks(shape: tuple[int, ...]) -> Iterator[slice | None]:
    count = math.prod(shape)
    if not shape or count <= _BLOCK_ENTRIES:
        yield None
        return
    rows = max(1, _BLOCK_ENTRIES * shape[0] // count)
    for first in range(0, shape[0], rows):
        yield slice(first, first + rows)


def _blocks(experts: ExpertSet, name: str) -> Iterator[Tensor]:
    for rows in _row_blocks(experts.base.shape(name)):
        yield experts.base.read(name, rows)


def _not_finite(experts: ExpertSet, expert: str, name: str) -> Problem:
    one = experts.experts[expert]
    own = one.full.get(name) or one.lora[name]
    return Problem(
        str(one.weights.path),
        "NaN or infinite entries (here, or in the base's tensor of that name)",
        "finite numbers",
        "check how this model was trained and saved, or leave it out",
        expert,
        own,
    )
