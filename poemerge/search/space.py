"""What a sweep may change, and what a point of it is as settings of a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from poemerge.merging import FamilyChoice, Selection
from poemerge.params import MergeParams, Params

if TYPE_CHECKING:
    import optuna

__all__ = ["METHODS", "Point", "current", "settings_of", "suggest"]

Point = Mapping[str, Any]
"""Values by name: method, coefficient, and for method poe also family, side, pooling (side both), scale_factor (not
Gaussian), prior_precision. A point without a coefficient has the method's own: for poe the automatic length."""

METHODS = ("poe", "mean", "task_arithmetic", "ties", "dare_ties", "tsv_m", "iso_c")
FAMILIES = ("gaussian", "student_t", "cauchy")
SIDES = ("both", "output", "input")
LENGTHS = ("automatic", "coefficient")
DEFAULT_TAIL_INDEX = 4.0


def suggest(trial: optuna.Trial, methods: Sequence[str]) -> dict[str, Any]:
    """A point that `trial` proposes. Ranges: scale factor 1e-3 to 10 and prior precision 1e-4 to 1 by powers, pooling
    0.1 to 1 (below, a merge takes several times as long), coefficient 0.2 to 1.5. Method poe takes the automatic length
    or a coefficient; the mean has none.
    """
    point: dict[str, Any] = {"method": trial.suggest_categorical("method", list(methods))}
    length = "automatic" if point["method"] == "mean" else "coefficient"
    if point["method"] == "poe":
        point["family"] = trial.suggest_categorical("family", list(FAMILIES))
        point["side"] = trial.suggest_categorical("side", list(SIDES))
        if point["side"] == "both":
            point["pooling"] = trial.suggest_float("pooling", 0.1, 1.0)
        if point["family"] != "gaussian":
            point["scale_factor"] = trial.suggest_float("scale_factor", 1e-3, 10.0, log=True)
        point["prior_precision"] = trial.suggest_float("prior_precision", 1e-4, 1.0, log=True)
        length = trial.suggest_categorical("length", list(LENGTHS))
    if length == "coefficient":
        point["coefficient"] = trial.suggest_float("coefficient", 0.2, 1.5)
    # Three digits are all that the search resolves; what is written into params.yaml is what was scored.
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in point.items()}


def current(params: Params, selection: Selection) -> dict[str, Any]:
    """The settings that params.yaml has now, as a point."""
    merge = params.merge
    point: dict[str, Any] = {"method": merge.method}
    if merge.method == "poe":
        point |= {"family": selection.model.family, "side": merge.side}
        if merge.side == "both" and merge.pooling is not None:
            point["pooling"] = merge.pooling
        if selection.model.family != "gaussian":
            point["scale_factor"] = merge.scale_factor
        point["prior_precision"] = merge.prior_precision
    if merge.coefficient is not None:
        point["coefficient"] = merge.coefficient
    return point


def settings_of(point: Point, params: Params, tail_index: float | None) -> tuple[MergeParams, Selection]:
    """The merge that `point` stands for; what it does not name is as in `params`, but for the coefficient."""
    given = params.merge.model_dump(include=params.merge.model_fields_set - {"coefficient"})
    given |= {name: value for name, value in point.items() if name != "family"}
    family = point.get("family", "cauchy")
    choice = FamilyChoice(family, (tail_index or DEFAULT_TAIL_INDEX) if family == "student_t" else None)
    return MergeParams.model_validate(given), Selection(choice)
