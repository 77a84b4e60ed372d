"""The settings of `solve`, and what makes them wrong."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from poemerge.errors import BadInputError, Problem
from poemerge.numerics.experts import Family
from poemerge.numerics.posterior import Side

__all__ = ["Prior", "Scale", "Settings", "bad_setting"]

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
