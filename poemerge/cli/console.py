"""Where commands print their tables."""

from __future__ import annotations

from rich.console import Console

__all__ = ["plain_console"]

_PIPED_WIDTH = 160


def plain_console() -> Console:
    """Standard output without colours for numbers: a terminal as wide as it is, and a pipe or a log, which has no width
    of its own to be cut to, wide."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH)
