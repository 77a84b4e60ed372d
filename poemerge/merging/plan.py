"""What a merge will do, decided before any weight is read: rules, order, bytes, memory, time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch

from poemerge.checkpoints import ExpertSet, Shard, plan_shards
from poemerge.checkpoints.safetensors_file import FLOATS
from poemerge.errors import BadInputError, Problem
from poemerge.merging.predictor import asked_by
from poemerge.merging.sensitivity import columns, why_not
from poemerge.merging.settings import ELEMENTWISE, SOLVED, ParameterSettings, Selection, resolve
from poemerge.numerics.factored import FLOAT32_RTOL, THIN, in_dual_form
from poemerge.params import MergeParams, Side, parse_bytes

__all__ = ["Action", "ParameterPlan", "Plan", "Unit", "make_plan"]

Action = Literal["merged", "averaged", "left_at_base"]

BLOCK_BYTES = 1 << 22
"""Entry by entry merges go through a parameter in blocks of rows of about this size (float32): a few fit a cache."""

TRIMMED_BYTES = 1 << 28
"""TIES reads a parameter twice, in blocks, where the experts' tensors are larger than this: embeddings, mostly."""

BASELINE_WORKING_SETS: Mapping[str, float] = {"tsv_m": 5.0, "iso_c": 4.0, "wudi": 12.0, "karcher": 22.0}
"""Memory that a baseline takes for one matrix beside its stack of deltas, in stacks; 7 where it is not named."""


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter of the base: what becomes of it, by which settings, from which experts, in which dtype."""

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype
    action: Action
    settings: ParameterSettings | None
    experts: tuple[str, ...]
    factored: bool
    transposed: bool
    why: str = ""
    minded: bool = False
    """Whether experts' measured sensitivities count in it: a matrix solved on both sides."""
    rank: int = 0
    """Of a factored parameter: the largest of its adapters' ranks."""

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def outputs(self) -> int:
        """Of a matrix: the number of its layer's outputs."""
        return self.shape[1 if self.transposed else 0]

    @property
    def elementwise(self) -> bool:
        """Whether it is merged entry by entry, in blocks."""
        return self.settings is not None and self.settings.method in ELEMENTWISE

    @property
    def trimmed(self) -> bool:
        """Whether it is merged by TIES, which needs one threshold for each expert and goes entry by entry then."""
        return self.settings is not None and self.settings.method == "ties"


@dataclass(frozen=True)
class Unit:
    """What is read, computed and written in one go: some parameters of one shape, or some rows of one parameter."""

    parameters: tuple[ParameterPlan, ...]
    rows: slice | None
    last: bool
    memory: int


@dataclass(frozen=True)
class Plan:
    """All a merge will do. `order` holds, by shard, the units in the order in which they are read and written."""

    parameters: tuple[ParameterPlan, ...]
    shards: tuple[Shard, ...]
    order: tuple[tuple[Unit, ...], ...]
    private: Mapping[str, tuple[str, ...]]
    not_measured: Mapping[str, str]
    """Why an expert's sensitivity counts nowhere, by expert."""
    bytes_read: int
    bytes_written: int
    max_memory: int
    largest_unit: int
    flops: float

    def names(self, action: Action) -> list[str]:
        """Names of the parameters that `action` befalls, in order of name."""
        return sorted(one.name for one in self.parameters if one.action == action)


def make_plan(experts: ExpertSet, params: MergeParams, selection: Selection, device: str) -> Plan:
    """The plan of merging `experts` by `params` on `device`; nothing is read but what opening the set read.

    Raises BadInputError when a parameter needs more memory than params.max_memory, or no parameter is merged.
    """
    limit = parse_bytes(params.max_memory)
    not_measured = dict.fromkeys(experts.experts, "off") if params.sensitivity == "off" else why_not(experts, limit)
    measured = set(experts.experts) - set(not_measured)
    private = {name: tuple(one.private_names()) for name, one in experts.experts.items()}
    trained = any(asked_by(private[name], experts.config) == "classifier" for name in measured)
    parameters = [_parameter(experts, params, selection, name, measured, trained) for name in experts.names()]
    shards = plan_shards([(p.name, p.dtype, p.shape) for p in parameters], parse_bytes(params.max_shard_size))
    by_name = {p.name: p for p in parameters}
    order: list[tuple[Unit, ...]] = []
    laid_out: list[Shard] = []
    for shard in shards:
        units = tuple(_units([by_name[name] for name, _, _ in shard.tensors], limit, batch=device != "cpu"))
        order.append(units)
        names = [one.name for unit in units for one in unit.parameters if unit.last]
        tensors = {tensor[0]: tensor for tensor in shard.tensors}
        laid_out.append(Shard(shard.file, tuple(tensors[name] for name in names)))
    largest = max((unit for group in order for unit in group), key=lambda unit: unit.memory)
    problems = []
    if largest.memory > limit:
        one = largest.parameters[0]
        problems.append(
            Problem(
                "merge.max_memory",
                f"{limit:,} bytes",
                f"at least {largest.memory:,} bytes, for one {'×'.join(map(str, one.shape))} matrix of "
                f"{len(one.experts)} experts by {one.settings.method if one.settings else 'copying'}",
                _advice(one),
                tensor=one.name,
            )
        )
    problems += _idle_globs(experts, params)
    if not any(p.action != "left_at_base" for p in parameters):
        problems.append(
            Problem(
                "merge.include, merge.exclude",
                "no parameter that is both selected and touched by an expert",
                "at least one parameter to merge",
                "loosen the globs",
            )
        )
    if problems:
        raise BadInputError(problems)
    return Plan(
        parameters=tuple(parameters),
        shards=tuple(laid_out),
        order=tuple(order),
        private=private,
        not_measured=not_measured,
        bytes_read=sum(_bytes_read(experts, p) for p in parameters),
        bytes_written=sum(shard.nbytes for shard in shards),
        max_memory=limit,
        largest_unit=largest.memory,
        flops=sum(_flops(experts, p) for p in parameters),
    )


def _idle_globs(experts: ExpertSet, params: MergeParams) -> Iterator[Problem]:
    """Globs that match no parameter."""
    names = {*experts.names(), *(name for one in experts.experts.values() for name in one.private_names())}
    globs = {"merge.include": params.include, "merge.exclude": params.exclude, "merge.overrides": params.overrides}
    for where, given in globs.items():
        for glob in given:
            if not any(fnmatchcase(name, glob) for name in names):
                got, expected = f"{glob!r}, which matches no parameter", "a glob over the models' parameter names"
                yield Problem(where, got, expected, f"mend or remove it; names are like {experts.names()[0]}")


def _advice(p: ParameterPlan) -> str:
    """What to do about a matrix that does not fit: a side that needs less, with its need, or a method in blocks."""
    if p.settings is None or p.settings.method != "poe":
        return "raise it, or override the method for this parameter (mean, task_arithmetic and ties go block by block)"
    sides: tuple[Side, ...] = ("output", "input")
    needs = {side: _memory(replace(p, settings=replace(p.settings, side=side))) for side in sides}
    side = min(sides, key=lambda one: needs[one])
    less = f"side {side}, which needs {needs[side]:,} bytes, " if needs[side] < _memory(p) else ""
    return f"raise it, or override this parameter: {less}or method mean, task_arithmetic or ties, block by block"


def _parameter(
    experts: ExpertSet, params: MergeParams, selection: Selection, name: str, measured: Set[str], trained: bool
) -> ParameterPlan:
    shape, stored = experts.base.shape(name), experts.base.dtype(name)
    dtype = stored if params.dtype == "base" or stored not in FLOATS else getattr(torch, params.dtype)
    touching = tuple(experts.touching(name))
    if not touching or 0 in shape:
        excluded = experts.rules[name] == "base"
        why = "no weight" if stored not in FLOATS else "not selected" if excluded else "no expert holds it"
        why = "no entries" if 0 in shape else why
        return ParameterPlan(name, shape, stored, dtype, "left_at_base", None, (), False, False, why)
    settings = resolve(params, selection, name, experts.rule(name))
    if settings.method in SOLVED and len(shape) not in {2, 3}:  # by an override's glob, meant for the matrices there
        settings = replace(settings, method="average", coefficient=1.0)
    if trained:  # heads that chance put near each other ask for much the same outputs, and are not refined
        settings = replace(settings, overshoot=1.0)
    factored = experts.is_factored(name) and settings.method == "poe"
    action: Action = "averaged" if settings.method in {"average", "mean", "rows"} else "merged"
    both = settings.method == "poe" and settings.side == "both" and len(shape) == 2
    return ParameterPlan(
        name,
        shape,
        stored,
        dtype,
        action,
        settings,
        touching,
        factored,
        experts.transposed(name),
        minded=both and not measured.isdisjoint(touching),
        rank=max(experts.experts[expert].rank(name) for expert in touching) if factored else 0,
    )


def _units(parameters: Sequence[ParameterPlan], limit: int, batch: bool) -> Iterator[Unit]:
    """The units of one shard, in the order of the files; `batch` puts equal shapes together, up to half the budget."""
    if batch:
        first: dict[object, int] = {}
        for i, p in enumerate(parameters):
            first.setdefault(_alike(p), i)
        parameters = sorted(parameters, key=lambda p: first[_alike(p)])
    waiting: list[ParameterPlan] = []
    for p in parameters:
        if waiting and (not batch or _alike(p) != _alike(waiting[0]) or (len(waiting) + 1) * _memory(p) > limit // 2):
            yield Unit(tuple(waiting), None, True, sum(_memory(one) for one in waiting))
            waiting = []
        if p.action == "left_at_base" or p.elementwise or p.trimmed:
            yield from _blocks(p)
        else:
            waiting.append(p)
            if p.factored or len(p.shape) != 2:
                yield Unit((p,), None, True, _memory(p))
                waiting = []
    if waiting:
        yield Unit(tuple(waiting), None, True, sum(_memory(one) for one in waiting))


def _alike(p: ParameterPlan) -> tuple[object, ...]:
    return (
        (p.shape, p.stored, p.dtype, p.settings, p.experts, p.factored, p.transposed)
        if not p.elementwise
        else (p.name,)
    )


def _blocks(p: ParameterPlan) -> Iterator[Unit]:
    """A parameter in blocks of rows, or whole where it is small or TIES has room for all experts' tensors at once."""
    rows = p.shape[0] if p.shape else 1
    step = max(1, rows * BLOCK_BYTES // max(4 * p.entries, 1))
    if p.trimmed and p.stored.itemsize * p.entries * len(p.experts) <= TRIMMED_BYTES:
        step = rows
    # TIES finds a threshold for each expert in a delta of its own; one of all rows comes with the first block.
    thresholds = 4 * p.entries if p.trimmed else 0
    for first in range(0, rows, step) if rows else (0,):
        count = min(step, rows - first)
        memory = _block_memory(p, p.entries // max(rows, 1) * count) + (thresholds if first == 0 else 0)
        whole = step >= rows
        yield Unit((p,), None if whole else slice(first, first + count), first + count == rows, memory)


def _block_memory(p: ParameterPlan, entries: int) -> int:
    """Base, sum, one expert's rows in float32 and as stored, the output."""
    return entries * (16 + p.stored.itemsize + p.dtype.itemsize + len(p.experts) * p.stored.itemsize)


def _memory(p: ParameterPlan) -> int:
    """Bytes that one matrix takes while under way: the stored tensors, the stack of deltas, the solver, the output."""
    assert p.settings is not None
    stored = p.entries * (p.stored.itemsize + p.dtype.itemsize + 8)
    if p.factored:
        return stored + _factored_memory(p)
    stack = 4 * p.entries * len(p.experts)
    own = _working_sets(p)
    if len(p.shape) == 3:  # a stack of matrices is solved one by one
        return stored + 2 * stack + int(own * stack / p.shape[0])
    return stored + int((1 + own) * stack)


def _factored_memory(p: ParameterPlan) -> int:
    """Stacks of the adapters' factors, Gram matrices in float64, and what is solved within the joint subspaces."""
    assert p.settings is not None
    count, rank = len(p.experts), p.rank
    stacked = count * rank
    rows, columns = (min(side, stacked) for side in p.shape)
    width = 4 if p.settings.rtol >= FLOAT32_RTOL else 8
    spans = 24 * sum(p.shape) * stacked + 64 * stacked**2
    if p.minded:  # whole on the output side
        core = replace(p, shape=(p.outputs, columns if not p.transposed else rows), factored=False, transposed=False)
        return spans + int(width * (1 + _working_sets(core)) * count * math.prod(core.shape))
    if in_dual_form(p.settings.side, stacked, p.shape):
        return spans + 128 * stacked**2
    if p.settings.side == "both" and THIN * rank <= min(rows, columns):
        return spans + 32 * width * stacked**2
    core = replace(p, shape=(rows, columns), factored=False, transposed=False)
    return spans + int(width * (1 + _working_sets(core)) * count * rows * columns)


def _working_sets(p: ParameterPlan) -> float:
    """Memory that the solver takes beside the stack of deltas, in stacks: an upper bound of what was measured on a CPU.

    The Grams grow with the square of their side, matrices like Θ do not grow with the number of experts.
    """
    assert p.settings is not None
    if p.settings.method != "poe":
        return BASELINE_WORKING_SETS.get(p.settings.method, 7.0)
    rows, wide = (p.shape[-2:] if len(p.shape) > 1 else (1, p.entries))[:: -1 if p.transposed else 1]
    count = len(p.experts)
    if p.settings.side == "both":
        # A sensitivity: as it is read, at unit norm, beside Â_i, and that in the eigenbasis and weighed.
        minded = 5 * columns(rows) / wide + 2 if p.minded else 0
        return 9 + 28 / count + (rows / wide + wide / rows) / 2 + minded
    return 5.5 + 8 / count + 3 * (rows / wide if p.settings.side == "output" else wide / rows)


def _bytes_read(experts: ExpertSet, p: ParameterPlan) -> int:
    total = experts.base.nbytes(p.name)
    for name in p.experts:
        expert = experts.experts[name]
        if p.name in expert.full:
            total += expert.weights.nbytes(expert.stored(expert.full[p.name]))
        total += expert.factor_bytes(p.name)
    return total


def _flops(experts: ExpertSet, p: ParameterPlan) -> float:
    """Floating-point operations of one parameter, to about a factor of two: products of the solver's inner loop."""
    if p.settings is None or p.elementwise:
        return 2.0 * p.entries * len(p.experts)
    n, rows, columns = len(p.experts), *(p.shape[-2:] if len(p.shape) > 1 else (1, p.entries))
    stacked = p.entries / max(rows * columns, 1)
    if p.factored:
        rank = sum(experts.experts[name].rank(p.name) for name in p.experts)
        return 2.0 * rank * rows * columns + 8.0 * rank**2 * (rows + columns) + 320.0 * rank**3
    if p.settings.method != "poe":
        return 20.0 * n * rows * columns * min(rows, columns)
    products = 2.0 * n * rows * columns * (rows + columns)
    return stacked * products * (30.0 if p.settings.side == "both" else 2.0)
