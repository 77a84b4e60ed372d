"""poemerge: model merging as MAP inference under a product of experts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poemerge.numerics.posterior import Posterior as Posterior
    from poemerge.numerics.solution import Factored as Factored
    from poemerge.numerics.solution import Outcome as Outcome
    from poemerge.numerics.solution import Solution as Solution
    from poemerge.numerics.solver import solve as solve

__all__ = ["Factored", "Outcome", "Posterior", "Solution", "solve"]

_HOME = {
    "Factored": "poemerge.numerics.solution",
    "Outcome": "poemerge.numerics.solution",
    "Posterior": "poemerge.numerics.posterior",
    "Solution": "poemerge.numerics.solution",
    "solve": "poemerge.numerics.solver",
}


def __getattr__(name: str) -> object:
    """Import the public names on first use (PEP 562): importing poemerge alone must not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
