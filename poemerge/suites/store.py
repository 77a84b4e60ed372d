"""Scores that were made before, kept by what they depend on: a JSON and a parquet of per-example predictions each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from poemerge.suites.scores import Columns

__all__ = ["ScoreStore", "Scored", "score_key"]


@dataclass(frozen=True)
class Scored:
    """What scoring one model on one suite gave: every score by name, and how long it took."""

    key: str
    scores: Mapping[str, float]
    examples: int
    seconds: float


def score_key(**inputs: Any) -> str:
    """The key of a score: 32 hexadecimal digits of the sha256 of everything that it depends on."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class ScoreStore:
    """Scores in the folder `root`; those in `others` are read too and never written.

    Files are written whole under a new name: links to DVC's cache are safe.
    """

    def __init__(self, root: Path, *others: Path) -> None:
        self.root = root
        self._places = (root, *others)
        self._used: set[str] = set()

    def parquet(self, key: str) -> Path:
        """Where the predictions of `key` lie, or will."""
        return self._place(key) / f"{key}.parquet"

    def has(self, key: str) -> bool:
        """Whether the score of `key` is there, whole."""
        return (self._place(key) / f"{key}.json").is_file()

    def _place(self, key: str) -> Path:
        def whole(folder: Path) -> bool:
            return (folder / f"{key}.json").is_file() and (folder / f"{key}.parquet").is_file()

        return next((folder for folder in self._places if whole(folder)), self.root)

    def get(self, key: str) -> tuple[Scored, Columns]:
        """The score and predictions kept under `key`; marks them as used."""
        import pyarrow.parquet as pq

        self._used.add(key)
        content = json.loads((self._place(key) / f"{key}.json").read_text(encoding="utf-8"))
        # The path as a file: pyarrow takes a folder `a=b` on the way as a partition otherwise.
        with self.parquet(key).open("rb") as stream:
            table = pq.ParquetFile(stream).read()
        columns = {name: table[name].to_numpy() for name in table.column_names}
        scored = {name: content[name] for name in ("key", "scores", "examples", "seconds")}
        return Scored(**scored), columns

    def put(self, scored: Scored, columns: Columns, about: Mapping[str, Any]) -> None:
        """Keep a score with its predictions; `about` says what it is of, for people who read the file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.root.mkdir(parents=True, exist_ok=True)
        partial = self.root / f"{scored.key}.parquet.partial"
        pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), partial)
        partial.replace(self.root / f"{scored.key}.parquet")
        partial = self.root / f"{scored.key}.json.partial"
        content = json.dumps({**about, **asdict(scored)}, indent=1, ensure_ascii=False)
        partial.write_text(content + "\n", encoding="utf-8")
        partial.replace(self.root / f"{scored.key}.json")
        self._used.add(scored.key)

    def prune(self) -> int:
        """Removes what was neither read nor written through this object; returns how many scores went."""
        gone = 0
        for path in self.root.glob("*.json") if self.root.is_dir() else ():
            if path.stem not in self._used:
                path.unlink()
                gone += 1
        for path in self.root.glob("*.parquet"):
            if path.stem not in self._used:
                path.unlink()
        for path in self.root.glob("*.partial"):
            path.unlink()
        return gone
