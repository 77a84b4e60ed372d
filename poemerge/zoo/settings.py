"""How a zoo is trained: the demonstration's setting, the benchmark's, and the digest that makes builds incremental."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["DEMO", "FULL", "PROTOCOL", "ExpertPlan", "Settings", "Training", "digest_of"]

PROTOCOL = 2
"""Raised when the meaning of a setting, a split or a head changes: every expert is then trained anew."""

Kind = Literal["full", "lora"]


@dataclass(frozen=True)
class Training:
    """What one expert's training depends on besides its data.

    Arguments: `examples` of the train split used, `epochs`, `batch` size, `max_tokens` per text, `rate_full` and
    `rate_lora` (AdamW's peak rates; warm-up over a tenth of the steps, then linear to 0), `rank` and `alpha` of LoRA,
    and the `seed` of order and dropout.
    """

    examples: int
    epochs: int
    batch: int = 32
    max_tokens: int = 64
    rate_full: float = 1.0e-4
    rate_lora: float = 5.0e-4
    rank: int = 16
    alpha: int = 16
    seed: int = 1


@dataclass(frozen=True)
class ExpertPlan:
    """One expert to train: its `task`, its `kind`, and the task whose labels replace its own (wrong on purpose)."""

    task: str
    kind: Kind
    labels_from: str | None = None

    @property
    def name(self) -> str:
        """The folder's name below `experts/`: the task, with `-lora` and `-wrong` where that is so."""
        return self.task + ("-lora" if self.kind == "lora" else "") + ("-wrong" if self.labels_from else "")


@dataclass(frozen=True)
class Settings:
    """A whole zoo: its experts, how they are trained, and how many examples its suites keep."""

    name: str
    training: Training
    plans: tuple[ExpertPlan, ...]
    validation_cap: int
    test_cap: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the plans mention, in their order, each once."""
        named = [task for plan in self.plans for task in (plan.task, plan.labels_from) if task is not None]
        return tuple(dict.fromkeys(named))


TASK_ORDER = ("newsgroups", "reuters", "topics", "authors", "movies", "editorials", "tweets", "reviews")

DEMO = Settings(
    name="demo",
    training=Training(examples=768, epochs=2),
    plans=(
        ExpertPlan("newsgroups", "full"),
        ExpertPlan("reuters", "full"),
        ExpertPlan("authors", "full"),
        ExpertPlan("movies", "full"),
        ExpertPlan("editorials", "lora"),
        ExpertPlan("tweets", "lora"),
        ExpertPlan("reviews", "lora"),
    ),
    validation_cap=300,
    test_cap=300,
)
"""About half a minute a task on one core; four full fine-tunes and three LoRA adapters."""

FULL = Settings(
    name="full",
    training=Training(examples=2000, epochs=3),
    plans=tuple(ExpertPlan(task, kind) for kind in ("full", "lora") for task in TASK_ORDER),
    validation_cap=1000,
    test_cap=2500,
)
"""The benchmark's: every task as a full fine-tune and as a LoRA adapter."""


def digest_of(value: Any) -> str:
    """Sha256 of a dataclass or plain value as canonical JSON: what an expert was made from, in 64 letters."""
    plain = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
