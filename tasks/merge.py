"""Stage merge: the experts and the base become one model, by params.merge and the selected expert family."""

from __future__ import annotations

import logging
import time
from typing import Any

from poemerge.merging import MergeResult, Selection
from poemerge.merging import merge as merge_checkpoints
from poemerge.params import Params
from poemerge.project import Project
from tasks.report import StageReport

__all__ = ["merge"]

log = logging.getLogger(__name__)

_REPORT_SECONDS = 5.0


def merge(project: Project, params: Params) -> StageReport:
    """Merge data/experts into artifacts/merged, with the expert family that expert.json selects.

    Raises CheckpointError or BadInputError where base, experts and params do not fit together.
    """
    started = time.monotonic()
    result = merge_checkpoints(
        project.base,
        project.expert_folders(),
        project.merged,
        params.merge,
        Selection.read(project.expert_json),
        progress=_Logger(),
    )
    return _report(result, time.monotonic() - started)


class _Logger:
    """Progress as a log line every few seconds, and one when all is written."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._whole = False

    def __call__(self, done: int, total: int, name: str) -> None:
        if time.monotonic() - self._last >= _REPORT_SECONDS or (done == total and not self._whole):
            self._last, self._whole = time.monotonic(), done == total
            log.info("%.0f of %.0f MB written (%s)", done / 1e6, total / 1e6, name)


def _report(result: MergeResult, seconds: float) -> StageReport:
    record = result.record
    rules = record["rules"]
    headline = (
        f"{len(record['experts'])} experts by {record['method']}: {len(rules['merged'])} parameters merged, "
        f"{len(rules['averaged'])} averaged, {len(rules['left_at_base'])} left at the base, in {seconds:.1f} s"
    )
    if (refinement := record["refinement"])["steps"]:
        headline += ", refined" if refinement["kept"] else ", refined and left as it was, for nothing was won"
    rows: list[dict[str, Any]] = [
        {"outcome": outcome, "parameters": count} for outcome, count in record["outcomes"].items()
    ]
    rows.append({"outcome": "private (heads)", "parameters": sum(len(names) for names in rules["private"].values())})
    warnings = [
        f"{name} lacks {len(one['lacks'])} of the base's parameters"
        for name, one in record["experts"].items()
        if one["lacks"]
    ]
    warnings += [
        f"{record['outcomes'][outcome]} matrices ended with outcome {outcome}: see ledger.jsonl"
        for outcome in ("failed", "step-limit")
        if outcome in record["outcomes"]
    ]
    if (multiple := refinement.get("multiple", 1)) < 1:
        warnings.append(
            f"task vectors too long for one model: whole, their merge is farther from what the experts predict than "
            f"{multiple:g} of it, which was added. Shorter trainings or smaller rates merge better"
        )
    if refinement.get("failed"):
        warnings.append(f"not refined: {refinement['why']}")
    said = {name: one["sensitivity"] for name, one in record["experts"].items()}
    if "measured" in said.values():
        lacking = {name: why for name, why in said.items() if why != "measured"}
        warnings += [f"{name} is merged without its sensitivity: {why}" for name, why in lacking.items()]
    return StageReport(headline, rows, warnings=warnings)
