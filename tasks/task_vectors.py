"""Stage task_vectors: how far each expert moved from the base, where, and in which direction."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from poemerge.checkpoints import ExpertSet, layer_group
from poemerge.checkpoints.statistics import TaskVectorStatistics, cosines, opposed, task_vector_statistics
from poemerge.params import Params
from poemerge.project import Project
from poemerge.wholefile import write_whole
from tasks.report import StageReport

__all__ = ["task_vectors"]

log = logging.getLogger(__name__)

_FAR, _SAME = 0.5, 0.99


def task_vectors(project: Project, params: Params) -> StageReport:
    """Write the manifest of task vectors: norm, density and kind by expert and parameter, cosines between experts.

    Raises CheckpointError with every reason why base and experts do not fit together, non-finite tensors included.
    """
    del params  # the statistics cover every parameter, whatever the merge includes
    experts = ExpertSet.open(project.base, project.expert_folders())
    log.info("reading %d parameters of the base and %d experts", len(experts.names()), len(experts.experts))
    statistics = task_vector_statistics(experts)
    manifest = _manifest(experts, statistics)
    path = project.task_vectors_manifest
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(manifest, indent=1) + "\n")
    experts.close()
    rows = [_row(name, manifest) for name in manifest["experts"]]
    low, high = _extremes(manifest["cosine"]["whole"])
    headline = (
        f"{len(rows)} task vectors, norms {min(r['norm'] for r in rows):.3g} to {max(r['norm'] for r in rows):.3g}"
    )
    if len(rows) > 1:
        headline += f", cosines {low:.3f} to {high:.3f}"
    return StageReport(headline, rows, warnings=manifest["warnings"])


def _manifest(experts: ExpertSet, statistics: TaskVectorStatistics) -> dict[str, Any]:
    names = list(experts.experts)
    by_expert: dict[str, dict[str, Any]] = {name: {} for name in names}
    base_norm_sq = sum(one.base_norm_sq for one in statistics.parameters)
    for one in statistics.parameters:
        for i, expert in enumerate(one.experts):
            norm = math.sqrt(max(float(one.gram[i, i]), 0.0))
            by_expert[expert][one.name] = {
                "norm": norm,
                "relative_norm": norm / math.sqrt(one.base_norm_sq) if one.base_norm_sq else None,
                "density": one.changed[i] / math.prod(one.shape),
                "kind": "factored" if one.factored else "dense",
                "rule": one.rule,
            }
    cosine = {group: matrix.tolist() for group, matrix in cosines(statistics.parameters, names).items()}
    whole = cosine.pop("")
    entries = {one.name: math.prod(one.shape) for one in statistics.parameters}
    summary: dict[str, Any] = {}
    for name, parameters in by_expert.items():
        norm = math.sqrt(sum(p["norm"] ** 2 for p in parameters.values()))
        changed = sum(p["density"] * entries[parameter] for parameter, p in parameters.items())
        summary[name] = {
            "kind": experts.experts[name].kind,
            "norm": norm,
            "relative_norm": norm / math.sqrt(base_norm_sq) if base_norm_sq else None,
            "density": changed / sum(entries.values()) if entries else 0.0,
            "lacks": experts.experts[name].lacks,
            "private": experts.experts[name].private_names(),
            "parameters": parameters,
        }
    return {
        "parameters": {
            one.name: {"shape": list(one.shape), "rule": one.rule, "group": layer_group(one.name)}
            for one in statistics.parameters
        },
        "experts": summary,
        "cosine": {"experts": names, "whole": whole, "groups": cosine},
        "warnings": _warnings(
            summary, names, whole, opposed(statistics.parameters, {name: one["norm"] for name, one in summary.items()})
        ),
    }


def _warnings(
    summary: dict[str, Any], names: list[str], whole: list[list[float]], against: dict[str, tuple[int, int]]
) -> list[str]:
    found = []
    for name, one in summary.items():
        if one["norm"] == 0:
            found.append(f"{name} is identical to the base: it contributes nothing")
        elif one["relative_norm"] is not None and one["relative_norm"] > _FAR:
            found.append(
                f"{name} lies {one['relative_norm']:.2f} times the base's norm away from it: is this its base?"
            )
        if one["lacks"]:
            found.append(f"{name} lacks {len(one['lacks'])} of the base's parameters: {', '.join(one['lacks'][:4])}")
    found += [
        f"{name} points against the others in {count} of {told} parameters, as fine-tunes of one base seldom do: "
        "were base and expert swapped, or a sign lost?"
        for name, (count, told) in against.items()
    ]
    for i, one in enumerate(names):
        found += [
            f"{one} and {names[j]} are nearly the same task vector (cosine {whole[i][j]:.3f}): it counts twice"
            for j in range(i)
            if whole[i][j] > _SAME
        ]
    return found


def _row(name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    one = manifest["experts"][name]
    at = manifest["cosine"]["experts"].index(name)
    others = [
        (c, n) for c, n in zip(manifest["cosine"]["whole"][at], manifest["cosine"]["experts"], strict=True) if n != name
    ]
    nearest = max(others, default=None)
    relative = one["relative_norm"]
    return {
        "expert": name,
        "kind": one["kind"],
        "norm": round(one["norm"], 4),
        "relative_norm": None if relative is None else round(relative, 5),
        "density": round(one["density"], 4),
        "nearest": None if nearest is None else f"{nearest[1]} ({nearest[0]:.3f})",
        "private": len(one["private"]),
    }


def _extremes(matrix: list[list[float]]) -> tuple[float, float]:
    values = [matrix[i][j] for i in range(len(matrix)) for j in range(i)]
    return (min(values), max(values)) if values else (0.0, 0.0)
