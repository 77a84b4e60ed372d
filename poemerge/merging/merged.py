"""What merging one parameter gives, and the error for one that is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poemerge.errors import NumericsError

__all__ = ["Merged", "NotFiniteError", "stored_as"]


@dataclass(frozen=True)
class Merged:
    """The merged weight in its output dtype (None: the base's own bytes stay), and what the ledger says of it."""

    weight: Tensor | None
    entry: dict[str, Any]


class NotFiniteError(NumericsError):
    """An expert's tensor (or the base's: expert None) holds NaN or infinite entries."""

    def __init__(self, name: str, expert: str | None) -> None:
        super().__init__(f"{name}: entries of {expert or 'the base'} are NaN or infinite")
        self.name = name
        self.expert = expert

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[str, str | None]]:
        return type(self), (self.name, self.expert)


def stored_as(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the output's dtype. Raises NumericsError where an entry is too large for it: in float16."""
    stored = weight.to(dtype)
    if dtype == torch.float16 and weight.dtype != dtype and bool((stored.isinf() & weight.isfinite()).any()):
        largest, limit = float(weight.abs().max()), torch.finfo(dtype).max
        raise NumericsError(
            f"{name}: entries up to {largest:g} do not fit float16, which ends at {limit:g}. "
            "Next: write bfloat16 or float32 (merge.dtype, --dtype)."
        )
    return stored
