"""What a stage says of its work: small, JSON, and the same whether Prefect or DVC ran it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from poemerge.wholefile import write_whole

__all__ = ["StageReport"]


@dataclass(frozen=True)
class StageReport:
    """`headline` is the key figure in one line, `table` its rows, `figure` a PNG relative to the project's root."""

    headline: str
    table: list[dict[str, Any]] = field(default_factory=list)
    figure: str | None = None
    warnings: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write it to `path` as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def read(path: Path) -> StageReport:
        """The report at `path`."""
        return StageReport(**json.loads(path.read_text(encoding="utf-8")))
