"""What merging one parameter gives, and the error for one that is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poemerge.errors import NumericsError

__all__ = ["Merged", "NotFiniteError"]


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
