"""Stage tail: how heavy-tailed the experts' residuals are, by layer group, with the paper's figure."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from poemerge.params import Params
from poemerge.project import Project
from poemerge.report.residuals import draw_residuals
from tasks.report import StageReport

__all__ = ["tail"]

REFERENCES: Mapping[str, Callable[[Tensor], Tensor]] = {"mean": mean, "task_arithmetic": task_arithmetic, "ties": ties}

ENTRIES_PER_FIT = 2**17
"""Entries that the fit of a group takes at most: ν to about 1 %, closer than the matrices of a group agree on it."""

FEWEST_ENTRIES = 100
"""A residual with fewer entries that are not zero is left out."""

logger = logging.getLogger(__name__)


@dataclass
class _Pool:
    """Standardised magnitudes of the residuals of one layer group: reference → origin (matrix and expert) → entries."""

    names: list[str] = field(default_factory=list)
    residuals: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def parts(self, references: Sequence[str]) -> list[tuple[str, Tensor]]:
        return [part for reference in references for part in self.residuals.get(reference, {}).items()]


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
        groups = {group: _Pool([name for name in names if role(name) == group]) for group in ROLES}
        groups = {group: pool for group, pool in groups.items() if pool.names}
        matrices: dict[str, Any] = {}
        for done, name in enumerate(names, start=1):
            group = role(name)
            keep = max(FEWEST_ENTRIES, ENTRIES_PER_FIT // (len(groups[group].names) * len(folders)))
            for matrix, deltas in _matrices(experts, name):
                entries = residual_entries(
                    deltas,
                    torch.stack([REFERENCES[reference](deltas) for reference in settings.references]),
                    side=settings.side,
                    count=settings.entries_per_matrix,
                    generator=_generator(settings.seed, matrix),
                )
                out, width = deltas.shape[1:]
                cells = {"output": width * width, "input": out * out, "both": width * out}[settings.side]
                residuals = _each(entries, settings.references, experts.touching(name))
                fits = _fit_matrix(matrix, residuals, cells, keep, groups[group])
                matrices[matrix] = {"group": group, "shape": [out, width], "experts": fits}
            if done % 20 == 0 or done == len(names):
                logger.info("residuals of %d of %d matrices", done, len(names))
        left_out = {name: experts.rule(name) for name in experts.names() if experts.rule(name) != "matrix"}
    finally:
        experts.close()
    whole = _Pool(names)
    for pool in groups.values():
        for reference, residuals_of in pool.residuals.items():
            whole.residuals.setdefault(reference, {}).update(residuals_of)
    document = {
        "side": settings.side,
        "references": list(settings.references),
        "entries_per_matrix": settings.entries_per_matrix,
        "seed": settings.seed,
        "experts": list(folders),
        "model": _fit_pool(whole, settings.references, settings.seed),
        "groups": {
            group: {"matrices": pool.names, **_fit_pool(pool, settings.references, settings.seed)}
            for group, pool in groups.items()
        },
        "matrices": matrices,
        "left_out": left_out,
    }
    project.tail.mkdir(parents=True, exist_ok=True)
    partial = project.tail_json.with_name(project.tail_json.name + ".partial")
    partial.write_text(json.dumps(_rounded(document), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(project.tail_json)
    draw_residuals(document, project.residuals_png)
    return _report(project, document)


def _matrices(experts: ExpertSet, name: str) -> Iterator[tuple[str, Tensor]]:
    """The deltas of `name` as `[expert, out, in]`; a stack of matrices (experts of a mixture) comes one by one."""
    deltas = experts.deltas(name)
    if deltas.ndim == 4:
        for index in range(deltas.shape[1]):
            yield f"{name}[{index}]", deltas[:, index]
    else:
        yield name, deltas.mT if experts.transposed(name) else deltas


def _generator(seed: int, matrix: str) -> torch.Generator:
    """A stream of its own for each matrix: the sample does not depend on which other matrices there are."""
    digest = hashlib.sha256(f"{seed}:{matrix}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _each(entries: Tensor, references: Sequence[str], experts: Sequence[str]) -> Iterator[tuple[str, str, Tensor]]:
    for j, reference in enumerate(references):
        for i, expert in enumerate(experts):
            yield reference, expert, entries[j, i]


def _fit_matrix(
    matrix: str, residuals: Iterator[tuple[str, str, Tensor]], cells: int, keep: int, pool: _Pool
) -> dict[str, dict[str, Any]]:
    """expert → reference → its own Student-t fit, in the residual's units; `keep` entries of each go to the pool."""
    fits: dict[str, dict[str, Any]] = {}
    for reference, expert, entries in residuals:
        magnitudes, median = standardised(entries)
        filled = magnitudes.numel() / entries.numel()
        row: dict[str, Any] = {"zeros": 1 - filled}
        if magnitudes.numel() >= FEWEST_ENTRIES:
            fit = fit_student_t(magnitudes)
            entry_scale = fit["scale"] * median
            # r_i is the norm of the whole residual, so its scale is the entries' over all that are not zero.
            row |= {
                "tail_index": fit["tail_index"],
                "median": median,
                "entry_scale": entry_scale,
                "scale": entry_scale * (cells * filled) ** 0.5,
            }
            # float() copies, so the pool does not hold on to all entries of the matrix.
            pool.residuals.setdefault(reference, {})[f"{matrix} {expert}"] = magnitudes[:keep].float()
        fits.setdefault(expert, {})[reference] = row
    return fits


def _fit_pool(pool: _Pool, references: Sequence[str], seed: int) -> dict[str, Any]:
    each = {reference: _fit(pool.parts([reference]), seed) for reference in references}
    return {"pooled": _fit(pool.parts(references), seed), "references": each}


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
