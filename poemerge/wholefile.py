"""Files that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, text: str) -> None:
    """Write `text` as UTF-8 under a temporary name beside `path`, then give it its name; the folder must be there.

    Who reads `path` finds the old file or the new one. Raises OSError as writing and renaming do.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
