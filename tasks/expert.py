"""Stage expert: which family each layer group's experts get, from the tail fit or from params.yaml, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from poemerge.errors import StageError
from poemerge.params import Params, SelectionParams
from poemerge.project import Project
from poemerge.wholefile import write_whole
from tasks.report import StageReport

__all__ = ["expert"]

NO_RESIDUAL = {
    "family": "gaussian",
    "tail_index": None,
    "reason": "no residual differs from zero, so nothing tells the families apart: the one with a closed form is taken",
}


def expert(project: Project, params: Params) -> StageReport:
    """Write expert.json: the family and tail index of the model and of each layer group, with the reason of each.

    `expert.family: auto` takes the family with the best held-out likelihood among those that the merge can use, per
    model or per layer group; a fixed family is taken as it is, beside what the tail fit would have said.
    Raises StageError when tail.json is not what the tail stage writes.
    """
    try:
        tail = json.loads(project.tail_json.read_text(encoding="utf-8"))
        fitted = {group: _fitted(fits["pooled"]) for group, fits in tail["groups"].items()}
        model = _fitted(tail["model"]["pooled"]) or {**NO_RESIDUAL, "best": None, "best_reason": None}
        chosen = _chosen(params.expert, model)
        groups = {
            group: {
                **(_chosen(params.expert, own or model) if params.expert.per == "group" else chosen),
                "fitted": own,
                "matrices": tail["groups"][group]["matrices"],
            }
            for group, own in fitted.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{project.tail_json} cannot be used.\n  got:      {type(error).__name__}: {error}\n"
            "  expected: what the tail stage writes\n  next:     run it again: dvc repro tail"
        ) from error
    document = {**chosen, "per": params.expert.per, "side": tail["side"], "fitted": model, "groups": groups}
    project.expert_json.parent.mkdir(parents=True, exist_ok=True)
    write_whole(project.expert_json, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return _report(document, params)


def _fitted(pooled: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the tail fit says of one set of residuals: the family for the merge, and the best one of all."""
    if pooled is None:
        return None
    usable, best = pooled["usable"], pooled["best"]
    reason = usable["reason"]
    if best["family"] != usable["family"]:
        reason = (
            f"{best['family']} describes the residuals ({best['reason']}), "
            f"but its energy is not one that the merge can use; of those it can: {reason}"
        )
    return {
        "family": usable["family"],
        "tail_index": usable["parameters"].get("tail_index"),
        "reason": reason,
        "best": best["family"],
        "best_reason": best["reason"],
    }


def _chosen(settings: SelectionParams, fitted: Mapping[str, Any]) -> dict[str, Any]:
    if settings.family == "auto":
        return {key: fitted[key] for key in ("family", "tail_index", "reason")}
    return {
        "family": settings.family,
        "tail_index": settings.tail_index,
        "reason": f"fixed in params.yaml; the tail fit says {_named(fitted)}: {fitted['reason']}",
    }


def _named(one: Mapping[str, Any]) -> str:
    return f"student_t with ν = {one['tail_index']:.2f}" if one["family"] == "student_t" else str(one["family"])


def _report(document: Mapping[str, Any], params: Params) -> StageReport:
    rows = [{"group": "whole model", "expert": _named(document), "reason": document["reason"]}]
    if params.expert.per == "group":
        rows += [
            {"group": group, "expert": _named(one), "reason": one["reason"]}
            for group, one in document["groups"].items()
        ]
    warnings = []
    if params.expert.family == "auto" and params.merge.method == "poe" and params.merge.side != document["side"]:
        warnings.append(
            f"the tail was fitted on side {document['side']} and the merge works on side {params.merge.side}: "
            "set tail.side to the same"
        )
    groups = f" and {len(document['groups'])} layer groups apart" if params.expert.per == "group" else ""
    fitted = document["fitted"]
    how = (
        f"selected by the tail fit (best of all families: {fitted['best'] or 'none, nothing to fit'})"
        if params.expert.family == "auto"
        else f"fixed in params.yaml; the tail fit says {_named(fitted)}"
    )
    return StageReport(f"{_named(document)}{groups}, {how}", rows, warnings=warnings)
