"""Whether two models mean the same by the rows of their embeddings: token by token, from their tokenizers' files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from poemerge.errors import Problem

__all__ = ["vocabulary_problems"]

_LIMIT = 200_000_000


def vocabulary_problems(base: Path, path: Path, expert: str) -> Iterator[Problem]:
    """Token ids that stand for other tokens in the expert's tokenizer than in the base's.

    Silent where either has none that can be read (tokenizer.json, vocab.txt, vocab.json): adapters bring none.
    """
    for name in ("tokenizer.json", "vocab.txt", "vocab.json"):
        ours, theirs = _read(base / name), _read(path / name)
        if ours is None or theirs is None:
            continue
        if ours != theirs:
            yield from _differences(_tokens(name, ours), _tokens(name, theirs), path / name, expert)
        return


def _differences(ours: dict[int, str], theirs: dict[int, str], path: Path, expert: str) -> Iterator[Problem]:
    differing = [i for i, token in ours.items() if theirs.get(i, token) != token]
    if differing:
        first = min(differing)
        yield Problem(
            str(path),
            f"{len(differing)} token ids with another meaning, {first} for instance is {theirs[first]!r}",
            f"the base's tokens: {first} is {ours[first]!r}",
            "an embedding's rows cannot be merged so: fine-tune with the base's tokenizer, or leave the expert out",
            expert,
        )


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= _LIMIT else None
    except OSError:
        return None


def _tokens(name: str, content: bytes) -> dict[int, str]:
    """Token by id; empty where the file is not of a form that we know."""
    try:
        text = content.decode("utf-8")
        if name == "vocab.txt":
            return dict(enumerate(text.splitlines()))
        raw = json.loads(text)
        if name == "tokenizer.json":
            raw = raw["model"]["vocab"]
        if isinstance(raw, list):  # Unigram: [token, score] by position
            return {i: str(entry[0]) for i, entry in enumerate(raw)}
        return {int(i): str(token) for token, i in raw.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return {}
