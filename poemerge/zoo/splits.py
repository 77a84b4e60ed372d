"""Train, validation and test splits: the source's own where it has one, else by a hash; no text is in two of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from poemerge.wholefile import write_whole
from poemerge.zoo.tasks import Example

__all__ = ["SPLITS", "make_splits", "read_split", "write_suite"]

SPLITS = ("train", "validation", "test")
TEST_SHARE = 0.25
VALIDATION_SHARE = 0.2


def make_splits(
    examples: Mapping[str, Sequence[Example]], *, validation_cap: int, test_cap: int
) -> dict[str, list[Example]]:
    """Three disjoint splits of a task's examples, each in an order that depends on the texts alone.

    Arguments: `examples` as `Task.load` gives them; the caps bound validation and test. A text that occurs twice (white
    space and case aside) is kept once; a text of the source's own test split is never trained on.
    """
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    # The test split first: where a text is in both, training loses it.
    for source in ("test", "train", "all"):
        for text, label in examples.get(source, ()):
            key = _normalised(text)
            if not key or key in seen:
                continue
            seen.add(key)
            splits[_split(key, source)].append((text, label))
    for rows in splits.values():
        rows.sort(key=lambda row: _fraction("order", _normalised(row[0])))
    splits["validation"] = splits["validation"][:validation_cap]
    splits["test"] = splits["test"][:test_cap]
    return splits


def write_suite(folder: Path, splits: Mapping[str, Sequence[Example]], description: Mapping[str, object]) -> None:
    """Writes TRAIN/VALIDATION/TEST.jsonl (a line: text, label) and labels.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows)
        write_whole(folder / f"{name}.jsonl", "".join(line + "\n" for line in lines))
    write_whole(folder / "labels.json", json.dumps(description, indent=1, ensure_ascii=False) + "\n")


def read_split(folder: Path, split: str) -> list[Example]:
    """The examples of one split of a suite's folder."""
    # Not splitlines(): texts may hold the Unicode line separators that it would break at.
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    rows = (json.loads(line) for line in lines if line)
    return [(row["text"], row["label"]) for row in rows]


def _split(key: str, source: str) -> str:
    if source == "test":
        return "test"
    fraction = _fraction("split", key)
    if source == "train":
        return "validation" if fraction < VALIDATION_SHARE else "train"
    if fraction < TEST_SHARE:
        return "test"
    return "validation" if fraction < TEST_SHARE + VALIDATION_SHARE * (1 - TEST_SHARE) else "train"


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())


def _fraction(purpose: str, key: str) -> float:
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{key}".encode()).digest()[:8], "big") / 2**64
