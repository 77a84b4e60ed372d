"""Stage tail: how heavy-tailed the experts' residuals are, by layer group, with the paper's figure."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoints import ExpertSet
from poemerge.checkpoints.roles import ROLES, role
from poemerge.numerics.baselines import mean, task_arithmetic, ties
from poemerge.numerics.families import fit_student_t
from poemerge.numerics.hill import hill
from poemerge.numerics.tail import USABLE, fit_tail, log_histogram, residual_entries, select, standardised
from poemerge.params import Params, TailParams
from poemerge.project import Project
from poemerge.report.residuals import draw_residuals
from poemerge.wholefile import write_whole
from tasks.report import StageReport

__all__ = ["tail"]

REFERENCES: Mapping[str, Callable[[Tensor], Tensor]] = {"mean": mean, "task_arithmetic": task_arithmetic, "ties": ties}

ENTRIES_PER_FIT = 2**17
"""Entries that the fit of a group takes at most: ν to about 1 %, closer than the matrices of a group agree on it."""

FEWEST_ENTRIES = 100
"""A residual with fewer entries that are not zero is left out."""

MEMORY = 4 * 10**9
"""Bytes that the matrices being worked on may take together; one is worked on whatever its size."""

logger = logging.getLogger(__name__)


_Pool = dict[str, dict[str, Tensor]]
"""Standardised magnitudes of a layer group's residuals: reference → origin (matrix and expert) → entries."""


@dataclass(frozen=True)
class _Matrix:
    """What one matrix gives: each residual's own fit by expert and reference, and entries for its group's pool."""

    name: str
    shape: list[int]
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    residuals: _Pool = field(default_factory=dict)


def tail(project: Project, params: Params) -> StageReport:
    """Take residual entries at the reference merges, matrix by matrix, fit every family, and write tail.json and the
    figure.

    The matrices are those that the merge solves; embeddings, norms and biases, which it averages, are left out and
    listed. docs/tail.md has the schema of tail.json.
    """
    settings = params.tail
    folders = project.expert_folders()
    experts = ExpertSet.open(project.base, folders)
    try:
        names = [name for name in experts.names() if experts.rule(name) == "matrix"]
        left_out = {name: experts.rule(name) for name in experts.names() if experts.rule(name) != "matrix"}
        groups = {group: [name for name in names if role(name) == group] for group in ROLES}
        groups = {group: members for group, members in groups.items() if members}
        pools: dict[str, _Pool] = {group: {} for group in groups}
        matrices: dict[str, Any] = {}

        def sample(name: str) -> list[_Matrix]:
            keep = max(FEWEST_ENTRIES, ENTRIES_PER_FIT // (len(groups[role(name)]) * len(folders)))
            return [_fit_matrix(experts, name, *one, settings, keep) for one in _matrices(experts, name)]

        with _workers(experts, names) as executor:
            for done, (name, sampled) in enumerate(zip(names, executor.map(sample, names), strict=True), start=1):
                for matrix in sampled:
                    matrices[matrix.name] = {"group": role(name), "shape": matrix.shape, "experts": matrix.fits}
                    for reference, residuals in matrix.residuals.items():
                        pools[role(name)].setdefault(reference, {}).update(residuals)
                if done % 20 == 0 or done == len(names):
                    logger.info("residuals of %d of %d matrices", done, len(names))
            whole: _Pool = {
                reference: {
                    origin: entries for pool in pools.values() for origin, entries in pool.get(reference, {}).items()
                }
                for reference in settings.references
            }
            fitted = list(executor.map(lambda pool: _fit_pool(pool, settings), [whole, *pools.values()]))
    finally:
        experts.close()
    document = {
        "side": settings.side,
        "references": list(settings.references),
        "entries_per_matrix": settings.entries_per_matrix,
        "seed": settings.seed,
        "experts": list(folders),
        "model": fitted[0],
        "groups": {group: {"matrices": groups[group], **fits} for group, fits in zip(groups, fitted[1:], strict=True)},
        "matrices": matrices,
        "left_out": left_out,
    }
    project.tail.mkdir(parents=True, exist_ok=True)
    write_whole(project.tail_json, json.dumps(_rounded(document), indent=1, ensure_ascii=False) + "\n")
    draw_residuals(document, project.residuals_png)
    return _report(project, document)


@contextmanager
def _workers(experts: ExpertSet, names: Sequence[str]) -> Iterator[ThreadPoolExecutor]:
    """Threads that each take a matrix at a time: as many as torch would use, fewer where the matrices are large.

    Operations here are too small to be shared between threads, so each worker runs them in one.
    """
    largest = max((math.prod(experts.base.shape(name)) for name in names), default=1)
    footprint = 4 * 4 * largest * (len(experts.experts) + 1)  # float32 deltas and TIES' three copies of them
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(
        max(1, min(threads, MEMORY // footprint)), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _matrices(experts: ExpertSet, name: str) -> Iterator[tuple[str, Tensor]]:
    """The deltas of `name` as `[expert, out, in]`; a stack of matrices (experts of a mixture) comes one by one."""
    deltas = experts.deltas(name)
    if deltas.ndim == 4:
        for index in range(deltas.shape[1]):
            yield f"{name}[{index}]", deltas[:, index]
    else:
        yield name, deltas.mT if experts.transposed(name) else deltas


def _fit_matrix(experts: ExpertSet, name: str, matrix: str, deltas: Tensor, settings: TailParams, keep: int) -> _Matrix:
    """Fit each residual of one matrix by itself, in its own units, and keep `keep` entries of it for the pool."""
    # A stream of its own for each matrix: the sample does not depend on which other matrices there are.
    digest = hashlib.sha256(f"{settings.seed}:{matrix}".encode()).digest()
    entries = residual_entries(
        deltas,
        torch.stack([REFERENCES[reference](deltas) for reference in settings.references]),
        side=settings.side,
        count=settings.entries_per_matrix,
        generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1),
    )
    out, width = deltas.shape[1:]
    cells = {"output": width * width, "input": out * out, "both": width * out}[settings.side]
    one = _Matrix(matrix, [out, width])
    for i, expert in enumerate(experts.touching(name)):
        one.fits[expert] = {}
        for j, reference in enumerate(settings.references):
            magnitudes, median = standardised(entries[j, i])
            filled = magnitudes.numel() / entries.shape[-1]
            row: dict[str, Any] = {"zeros": 1 - filled}
            if magnitudes.numel() >= FEWEST_ENTRIES:
                fit = fit_student_t(magnitudes)
                entry_scale = fit["scale"] * median
                # r_i is the norm of the whole residual: its scale is an entry's, over all that are not zero.
                scale = entry_scale * math.sqrt(cells * filled)
                row |= {"tail_index": fit["tail_index"], "median": median, "entry_scale": entry_scale, "scale": scale}
                # float() copies, so that the pool does not hold on to all entries of the matrix.
                one.residuals.setdefault(reference, {})[f"{matrix} {expert}"] = magnitudes[:keep].float()
            one.fits[expert][reference] = row
    return one


def _fit_pool(pool: _Pool, settings: TailParams) -> dict[str, Any]:
    parts = {reference: list(pool.get(reference, {}).items()) for reference in settings.references}
    each = {reference: _fit(one, settings.seed) for reference, one in parts.items()}
    return {"pooled": _fit([part for one in parts.values() for part in one], settings.seed), "references": each}


def _fit(parts: list[tuple[str, Tensor]], seed: int) -> dict[str, Any] | None:
    """Everything that is told of one set of entries, or None when it is empty."""
    if not parts:
        return None
    share = max(1, ENTRIES_PER_FIT // len(parts))
    number = {origin: i for i, origin in enumerate(dict.fromkeys(origin for origin, _ in parts))}
    magnitudes = torch.cat([values[:share] for _, values in parts]).double()
    origins = torch.cat([torch.full((min(share, len(values)),), number[origin]) for origin, values in parts])
    fit = fit_tail(magnitudes, origins=origins if len(number) > 1 else None, seed=seed)
    best = select(fit)
    centres, density = log_histogram(magnitudes)
    return {
        **asdict(fit),
        "hill": asdict(hill(magnitudes)),
        "histogram": {"magnitude": centres, "density": density},
        "best": asdict(best),
        "usable": asdict(best if best.family in USABLE else select(fit, USABLE)),
    }


def _rounded(value: Any) -> Any:
    """`value` with its floats at six digits, which is more than a sample supports."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value


def _report(project: Project, document: Mapping[str, Any]) -> StageReport:
    fits = {"whole model": document["model"], **document["groups"]}
    rows = [_row(group, one["pooled"]) for group, one in fits.items() if one["pooled"] is not None]
    empty = [group for group, one in document["groups"].items() if one["pooled"] is None]
    model = document["model"]["pooled"]
    if model is None:
        headline = "no residual differs from zero: the experts equal the base"
    else:
        headline = (
            f"residuals of {len(document['experts'])} experts, side {document['side']}: "
            f"{model['best']['family']} fits best; "
            f"Student-t has ν = {model['fits']['student_t']['parameters']['tail_index']:.2f}"
        )
    warnings = [f"no expert changed the matrices of the group {group}" for group in empty]
    return StageReport(headline, rows, str(project.residuals_png.relative_to(project.root)), warnings)


def _row(group: str, pooled: Mapping[str, Any]) -> dict[str, Any]:
    curve = pooled["hill"]
    at = curve["chosen"]
    gain = pooled["gains"]["student_t"]["gaussian"]
    return {
        "group": group,
        "best family": pooled["best"]["family"],
        "best for the merge": pooled["usable"]["family"],
        "Student-t ν": round(pooled["fits"]["student_t"]["parameters"]["tail_index"], 2),
        "Hill (95 %)": f"{curve['tail_index'][at]:.2f} [{curve['low'][at]:.2f}, {curve['high'][at]:.2f}]",
        "Student-t over Gaussian, nats an entry": f"{gain['mean']:.3f} ± {gain['standard_error']:.3f}",
        "KS of the best": round(pooled["fits"][pooled["best"]["family"]]["ks"], 4),
        "entries": pooled["entries"],
    }
