"""The settings of `solve`, and what makes them wrong."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from poemerge.errors import BadInputError, Problem
from poemerge.numerics.adapters import LowRank
from poemerge.numerics.breadth import breadth, breadth_of_factors, pooling_by_breadth
from poemerge.numerics.experts import Family
from poemerge.numerics.posterior import Side
from poemerge.numerics.precision import working_dtype

__all__ = ["Prior", "Scale", "Settings", "bad_setting", "expert_scales", "settled"]

Scale = Literal["common", "task-norm", "gram-norm", "fitted"]
Prior = Literal["relative", "absolute"]


@dataclass(frozen=True)
class Settings:
    """What `solve` was told: its keyword arguments, see there."""

    expert: Family
    tail_index: float | None
    scale: Scale | Tensor
    scale_factor: float
    prior: Prior
    prior_precision: float
    side: Side
    pooling: float | Tensor | None
    init: Literal["gaussian", "mean"] | Tensor
    max_steps: int
    rtol: float
    accelerate: bool
    sensitivity: Tensor | None = None

    def of(self, members: slice | list[int], dtype: torch.dtype) -> "Settings":
        """The settings of some members of a batch: what is a tensor of them all, indexed, in `dtype`."""
        sensitivity = None if self.sensitivity is None else self.sensitivity[members].to(dtype)
        pooling = self.pooling[members].to(dtype) if isinstance(self.pooling, Tensor) else self.pooling
        return replace(self, sensitivity=sensitivity, pooling=pooling)

    def check(self) -> None:
        """Refuse settings that make no sense, all of them at once."""
        problems: list[Problem] = []

        def need(condition: bool, where: str, got: object, expected: str, next_step: str) -> None:
            if not condition:
                problems.append(Problem(where, str(got), expected, next_step))

        def one_of(where: str, value: object, names: Any) -> None:
            need(
                value in get_args(names),
                where,
                repr(value),
                f"one of {', '.join(get_args(names))}",
                "choose one of them",
            )

        one_of("expert", self.expert, Family)
        one_of("prior", self.prior, Prior)
        one_of("side", self.side, Side)
        if isinstance(self.scale, str):
            one_of("scale", self.scale, Scale)
        if isinstance(self.init, str):
            one_of("init", self.init, Literal["gaussian", "mean"])
        if self.expert == "student_t":
            valid = self.tail_index is not None and self.tail_index > 0
            need(valid, "tail_index", self.tail_index, "degrees of freedom above 0", "give tail_index, 1 is Cauchy")
        else:
            need(
                self.tail_index is None,
                "tail_index",
                self.tail_index,
                f"None with expert={self.expert!r}",
                'leave it out, or use expert="student_t"',
            )
        positive = 0 < self.scale_factor < math.inf
        need(positive, "scale_factor", self.scale_factor, "a finite number above 0", "give one, 0.1 say")
        bounded = 0 <= self.prior_precision < math.inf
        need(bounded, "prior_precision", self.prior_precision, "a finite number, 0 or more", "give one, 1e-3 say")
        if self.pooling is not None:
            given = torch.as_tensor(self.pooling)
            inside = bool(((given >= 0) & (given <= 1)).all())
            need(inside, "pooling", self.pooling, "numbers from 0 to 1", "leave it out, or give one")
        if self.sensitivity is not None:
            need(self.side == "both", "sensitivity", f"side {self.side!r}", 'side "both"', "leave it out")
        need(self.max_steps >= 1, "max_steps", self.max_steps, "1 or more", "raise it")
        need(0 < self.rtol < 1, "rtol", self.rtol, "a number between 0 and 1", "give one, 1e-6 say")
        if problems:
            raise BadInputError(problems)


def bad_setting(where: str, got: str, expected: str, next_step: str) -> BadInputError:
    """The error for one setting that makes no sense."""
    return BadInputError(Problem(where, got, expected, next_step))


def expert_scales(scale: Scale | Tensor, batch: tuple[int, ...], experts: int, device: torch.device) -> Tensor | None:
    """The γ_i of a tensor `scale` as float64 `[batch, expert]`."""
    if not isinstance(scale, Tensor):
        return None
    try:
        scales = scale.to(device, torch.float64).expand(*batch, experts).reshape(-1, experts)
    except RuntimeError:
        expected = f"{[*batch, experts]}, a scale for each expert"
        raise bad_setting("scale", f"shape {list(scale.shape)}", expected, "give γ_i for every expert") from None
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise bad_setting(
            "scale", "a value that is zero, negative or not finite", "γ_i > 0", "give γ_i in the units of r"
        )
    return scales


def settled(settings: Settings, deltas: Tensor | LowRank, shape: tuple[int, ...], directions: int) -> Settings:
    """The settings with F_i checked, as `[flat, expert, out, s]`, and y_i settled where none is given.

    `deltas` are `[flat, expert, out, in]`, `shape` is [*batch, expert, out] and `directions` the matrix's smaller side.
    """
    given, pooling = settings.sensitivity, settings.pooling
    if given is not None:
        if given.shape[:-1] != shape or not given.is_floating_point() or not bool(given.isfinite().all()):
            got = (
                f"{given.dtype} of shape {list(given.shape)}"
                if given.shape[:-1] != shape
                else "entries that are not finite"
            )
            expected = f"finite floating point {[*shape, 's']}, a factor for each expert"
            raise bad_setting("sensitivity", got, expected, "give F_i for every expert, zeros where nothing is known")
        device = deltas.left.device if isinstance(deltas, LowRank) else deltas.device
        given = given.to(device).reshape(-1, *shape[-2:], given.shape[-1])
    if settings.side == "both" and pooling is None:
        told = (
            breadth_of_factors(deltas.left, deltas.right, directions)
            if isinstance(deltas, LowRank)
            else breadth(deltas.to(working_dtype(deltas.dtype)), directions)
        )
        pooling = pooling_by_breadth(told)
    elif isinstance(pooling, Tensor):
        if pooling.shape != shape[:-1]:
            got, expected = f"shape {list(pooling.shape)}", f"{list(shape[:-1])}, a number for each expert"
            raise bad_setting("pooling", got, expected, "give one number, or one for each expert")
        pooling = pooling.reshape(-1, shape[-2])
    return replace(settings, sensitivity=given, pooling=pooling)
