"""What is done to each parameter: the merge's settings with overrides applied and the expert family filled in."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from poemerge.checkpoints import Rule
from poemerge.checkpoints.roles import role
from poemerge.errors import BadInputError, Problem
from poemerge.numerics.presets import PRESETS
from poemerge.params import Family, MergeParams, Method, Preset, Scale, Side

__all__ = ["ELEMENTWISE", "SOLVED", "FamilyChoice", "ParameterSettings", "Selection", "resolve"]

ELEMENTWISE: frozenset[str] = frozenset({"mean", "task_arithmetic", "average", "rows"})
"""Methods that treat every entry or row alone, so that a parameter can be merged in blocks."""

SOLVED: frozenset[str] = frozenset({"poe", "tsv_m", "iso_c", "wudi"})
"""Methods defined on matrices; what is no matrix is averaged beside them."""

_PRECISE = 1e-6
"""rtol where a setting of the paper is to be reproduced, not a good merge to be had soon."""

DEFAULT_COEFFICIENT: Mapping[str, float] = {"task_arithmetic": 0.4}
"""Task arithmetic adds up all task vectors: 0.4 is its paper's single recommendation, https://arxiv.org/abs/2212.04089."""


@dataclass(frozen=True)
class FamilyChoice:
    """An expert family, with its tail index where it is Student-t."""

    family: Family = "cauchy"
    tail_index: float | None = None


@dataclass(frozen=True)
class Selection:
    """The family of the product's experts: one for the model, and others for some layer groups."""

    model: FamilyChoice = FamilyChoice()
    groups: Mapping[str, FamilyChoice] = field(default_factory=dict)

    def of(self, name: str) -> FamilyChoice:
        """The choice for the parameter `name`."""
        return self.groups.get(role(name), self.model) if self.groups else self.model

    @staticmethod
    def read(path: Path) -> Selection:
        """The selection in expert.json: family and tail_index, and the same by group under `groups` if it has any."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            groups = {name: _choice(one) for name, one in (raw.get("groups") or {}).items() if one.get("family")}
            return Selection(_choice(raw), groups)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise BadInputError(
                Problem(
                    str(path),
                    f"{type(error).__name__}: {error}",
                    "what the expert stage writes",
                    "run the expert stage again: dvc repro expert",
                )
            ) from error


def _choice(raw: Mapping[str, Any]) -> FamilyChoice:
    return FamilyChoice(raw["family"], raw.get("tail_index") if raw["family"] == "student_t" else None)


@dataclass(frozen=True)
class ParameterSettings:
    """Everything that decides one merged parameter, beside its deltas. Method `average`: the mean over the experts
    whose delta is not zero, for what is no matrix; `rows`: the product of experts of an embedding."""

    method: Method | Literal["average", "rows"]
    family: Family
    tail_index: float | None
    side: Side
    pooling: float | None
    scale: Scale
    scale_factor: float
    prior: Literal["relative", "absolute"]
    prior_precision: float
    coefficient: float | None
    """None: of method poe, by the length of the task vectors (poemerge.numerics.length)."""
    max_steps: int
    rtol: float
    seed: int
    row_blocks: Literal["square"] | None = None
    overshoot: float = 6.0
    """How many times as far as the farthest expert Θ may go in a direction, before all of it is held to once."""

    @property
    def multiple(self) -> float:
        """The coefficient, once it is settled."""
        if self.coefficient is None:
            raise ValueError("this coefficient waits for the task vectors' length: see matrices.with_length")
        return self.coefficient


def resolve(params: MergeParams, selection: Selection, name: str, rule: Rule) -> ParameterSettings:
    """Settings of the parameter `name`: those of `params`, then the overrides whose glob matches, the last one wins.

    A method for matrices becomes `average` on what is no matrix, and poe `rows` on an embedding, unless an override
    names a method for it that it can have.
    """
    choice = selection.of(name)
    settings = ParameterSettings(
        method=params.method,
        family=choice.family,
        tail_index=choice.tail_index,
        side=params.side,
        pooling=params.pooling,
        scale=params.scale,
        scale_factor=params.scale_factor,
        prior=params.prior,
        prior_precision=params.prior_precision,
        coefficient=_own_coefficient(params.method) if params.coefficient is None else params.coefficient,
        max_steps=params.max_steps,
        rtol=params.rtol,
        seed=params.seed,
    )
    if params.preset is not None and settings.method == "poe":
        settings = _released(settings, params.preset, params.model_fields_set, name)
    if rule != "matrix" and settings.method in SOLVED:
        of_rows = settings.method == "poe" and rule == "embedding" and params.preset is None
        settings = replace(settings, method="rows" if of_rows else "average", coefficient=1.0)
    for glob, override in params.overrides.items():
        if fnmatchcase(name, glob):
            given = override.model_dump(exclude_none=True)
            if given.get("family", "student_t") != "student_t":
                given["tail_index"] = None
            if "method" in given and "coefficient" not in given:
                given["coefficient"] = _own_coefficient(given["method"])
            settings = replace(settings, **given)
    return settings


def _own_coefficient(method: str) -> float | None:
    """What a method's Θ is multiplied with when nobody says; None for poe, where the task vectors' length decides."""
    return None if method == "poe" else DEFAULT_COEFFICIENT.get(method, 1.0)


def _released(settings: ParameterSettings, preset: Preset, given: Collection[str], name: str) -> ParameterSettings:
    """The settings of the paper's released code under `preset`, but for those whose names are `given`: they stay."""
    released = dict(PRESETS[preset])
    if any(fnmatchcase(name, glob) for glob in released.pop("average")):
        return replace(settings, method="average", coefficient=1.0)
    del released["init"]  # how every merge starts
    released |= {"family": released.pop("expert"), "tail_index": None, "rtol": _PRECISE}
    return replace(settings, **{key: value for key, value in released.items() if key not in given})
