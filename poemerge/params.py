"""params.yaml as frozen models, one section a stage: unknown keys are refused, all problems are told at once."""

from __future__ import annotations

import math
import re
import zoneinfo
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

__all__ = [
    "BaselineName",
    "CollectionParams",
    "EvaluateParams",
    "ExpertParams",
    "FetchParams",
    "GateParams",
    "MergeOverride",
    "MergeParams",
    "Method",
    "Params",
    "RegisterParams",
    "ScheduleParams",
    "SourceParams",
    "SuiteParams",
    "TailParams",
    "WatchParams",
    "parse_bytes",
]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""Names of experts, suites and models become file names, so they are held to what every file system takes."""

BaselineName = Literal["mean", "task_arithmetic", "ties", "dare_ties", "tsv_m", "iso_c", "wudi", "karcher"]
Method = Literal["poe", "mean", "task_arithmetic", "ties", "dare_ties", "tsv_m", "iso_c", "wudi", "karcher"]
Family = Literal["gaussian", "student_t", "cauchy"]
Preset = Literal["paper-vit", "paper-t5", "paper-lora"]
Scale = Literal["common", "task-norm", "gram-norm", "fitted"]
Side = Literal["output", "input", "both"]
ByteCount = Annotated[int | str, Field(union_mode="left_to_right")]

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: int | str) -> int:
    """Number of bytes that `text` says: 8GB, 500MiB, 1e9, 1000000.

    Raises ValueError when it is no positive amount.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{text!r} is no amount of memory; write for instance 8GB, 500MiB or 1000000")
    count = float(match[1]) * UNITS[match[2].upper()]
    if not 1 <= count < math.inf:
        raise ValueError(f"{text!r} is not positive" if count < 1 else f"{text!r} is more than any number")
    return int(count)


class Section(BaseModel):
    """A frozen section: values cannot change after loading and keys nobody knows are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SourceParams(Section):
    """Where a checkpoint comes from: hf://owner/name, a folder, models:/NAME@alias, s3://bucket/prefix."""

    source: str = Field(min_length=1)
    revision: str | None = None


class ExpertParams(SourceParams):
    """One task model: its source, and its licence where the source does not say it."""

    license: str | None = None


class CollectionParams(Section):
    """A place whose members become experts as they appear: hf://owner?tag=…, a drop folder, models:/PATTERN*."""

    source: str = Field(min_length=1)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


class FetchParams(Section):
    """What fetching does when an expert cannot be had or is malformed."""

    on_bad_expert: Literal["fail", "skip"] = "fail"


class TailParams(Section):
    """The tail fit: at which reference merges residuals are taken, on which side, and how many entries of each matrix.

    `side` is best that of `merge.side`: the families are then compared on the residuals that the merge weighs.
    """

    side: Side = "both"
    references: tuple[Literal["mean", "task_arithmetic", "ties"], ...] = Field(
        default=("mean", "task_arithmetic", "ties"), min_length=1
    )
    entries_per_matrix: int = Field(default=20_000, ge=1_000)
    seed: int = 0


class SelectionParams(Section):
    """Which expert family the merge uses: fixed by name, or `auto`, from the tail fit."""

    family: Literal["auto", "gaussian", "student_t", "cauchy"] = "auto"
    tail_index: float | None = Field(default=None, gt=0)
    per: Literal["model", "group"] = "model"

    @model_validator(mode="after")
    def _tail_index_belongs_to_student_t(self) -> SelectionParams:
        if self.family == "student_t" and self.tail_index is None:
            raise ValueError("family student_t needs a tail_index (or family: auto, which fits it)")
        if self.family in {"gaussian", "cauchy"} and self.tail_index is not None:
            raise ValueError(f"tail_index belongs to family student_t, not {self.family}")
        return self


class MergeOverride(Section):
    """Settings for the parameters whose name matches the glob it stands under; what is not given is inherited."""

    method: Method | None = None
    family: Family | None = None
    tail_index: float | None = Field(default=None, gt=0)
    side: Side | None = None
    pooling: float | None = Field(default=None, ge=0, le=1)
    scale: Scale | None = None
    scale_factor: float | None = Field(default=None, gt=0)
    prior: Literal["relative", "absolute"] | None = None
    prior_precision: float | None = Field(default=None, ge=0)
    coefficient: float | None = None

    @model_validator(mode="after")
    def _tail_index_belongs_to_student_t(self) -> MergeOverride:
        if (self.family == "student_t") != (self.tail_index is not None):
            raise ValueError("family student_t and a tail_index go together: give both or neither")
        return self


class MergeParams(Section):
    """The merge: method, energy, prior, and how the work is carried out."""

    method: Method = "poe"
    preset: Preset | None = None
    side: Side = "both"
    pooling: float | None = Field(default=None, ge=0, le=1)
    scale: Scale = "common"
    scale_factor: float = Field(default=0.1, gt=0)
    prior: Literal["relative", "absolute"] = "relative"
    prior_precision: float = Field(default=1e-2, ge=0)
    coefficient: float | None = None
    sensitivity: Literal["auto", "off"] = "auto"
    refinement_steps: int = Field(default=96, ge=0)
    max_steps: int = Field(default=50, ge=1)
    rtol: float = Field(default=3e-3, gt=0, lt=1)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: Mapping[str, MergeOverride] = Field(default_factory=dict)
    device: str = "auto"
    dtype: Literal["base", "float32", "float16", "bfloat16"] = "base"
    max_memory: ByteCount = "4GB"
    max_shard_size: ByteCount = "5GB"
    engine: Literal["local", "dask"] = "local"
    dask_address: str | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _amounts_are_amounts(self) -> MergeParams:
        parse_bytes(self.max_memory)
        parse_bytes(self.max_shard_size)
        return self


class SuiteParams(Section):
    """One evaluation suite: its kind, data and split; `expert` is the task model it belongs to (default: its own name).

    `options` are the kind's own settings, checked by the kind.
    """

    kind: str = "text-classification"
    data: str | None = None
    split: str = "test"
    metric: str = "accuracy"
    expert: str | None = None
    head: str | None = None
    max_examples: int | None = Field(default=None, ge=1)
    options: Mapping[str, Any] = Field(default_factory=dict)


class EvaluateParams(Section):
    """What is scored: suites by name, and the methods merged and scored beside ours."""

    suites: Mapping[Name, SuiteParams] = Field(default_factory=dict)
    baselines: tuple[BaselineName, ...] = ("mean", "task_arithmetic", "ties")
    batch_size: int = Field(default=64, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    bootstrap_samples: int = Field(default=2_000, ge=100)
    seed: int = 0


class GateParams(Section):
    """What a candidate must show before it may become champion."""

    min_gain: float = 0.0
    max_suite_drop: float = Field(default=0.02, ge=0)
    level: float = Field(default=0.05, gt=0, lt=1)
    floors: Mapping[str, float] = Field(default_factory=dict)
    min_weight_share: float = Field(default=0.0, ge=0, lt=1)
    licenses: tuple[str, ...] | None = None
    max_size: ByteCount | None = None

    @model_validator(mode="after")
    def _the_size_is_one(self) -> GateParams:
        if self.max_size is not None:
            parse_bytes(self.max_size)
        return self


class RegisterParams(Section):
    """The registered model's name, and how promotion is decided."""

    model: Name = "poemerge"
    gates: GateParams = GateParams()
    approval: Literal["none", "required"] = "none"
    two_person: bool = False
    approval_hours: float = Field(default=72.0, gt=0)


class WatchParams(Section):
    """How often sources are looked at, and how long to wait for further landings before one re-merge."""

    interval_seconds: int = Field(default=60, ge=1)
    settle_seconds: int = Field(default=30, ge=0)


class ScheduleParams(Section):
    """When re-merging happens by itself."""

    cron: str | None = "0 3 * * *"
    timezone: str = "UTC"
    watch: WatchParams = WatchParams()

    @field_validator("timezone")
    @classmethod
    def _is_a_time_zone(cls, name: str) -> str:
        if name not in zoneinfo.available_timezones():
            raise ValueError(f"{name!r} is no time zone; write for instance UTC or Europe/Berlin")
        return name


class Params(Section):
    """params.yaml, whole."""

    base: SourceParams
    experts: Mapping[Name, ExpertParams] = Field(default_factory=dict)
    collections: Mapping[Name, CollectionParams] = Field(default_factory=dict)
    fetch: FetchParams = FetchParams()
    tail: TailParams = TailParams()
    expert: SelectionParams = SelectionParams()
    merge: MergeParams = MergeParams()
    evaluate: EvaluateParams = EvaluateParams()
    register_: RegisterParams = Field(default=RegisterParams(), alias="register")
    schedule: ScheduleParams = ScheduleParams()

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="after")
    def _has_experts(self) -> Params:
        if not self.experts and not self.collections:
            raise ValueError("no experts: name at least one under `experts` (or a collection under `collections`)")
        return self

    @model_validator(mode="after")
    def _a_preset_has_its_own_family(self) -> Params:
        if self.merge.preset is not None and self.expert.family not in {"auto", "cauchy"}:
            family, preset = self.expert.family, self.merge.preset
            raise ValueError(f"expert.family is {family}, but merge.preset {preset} has Cauchy experts: leave one out")
        return self
