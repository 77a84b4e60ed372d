"""Where things are kept between runs that can be had again: downloads, measurements."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """`$POEMERGE_CACHE`, else `~/.cache/poemerge`; removing it loses time alone."""
    root = os.environ.get("POEMERGE_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "poemerge"
