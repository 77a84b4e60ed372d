"""A lock between processes and between threads, which the kernel frees when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["attended", "exclusive", "holder"]


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[str], None] | None = None, poll_seconds: float = 0.1) -> Iterator[None]:
    """Hold the lock file `path`; a second holder, thread or process, waits until the first has let go.

    Arguments: `on_wait` is told once, when there is something to wait for, who holds the lock (a process id, or "");
    `poll_seconds` between tries, so that signals are heard while waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # flock belongs to the open file, so two threads that open it apart exclude each other; it is not inherited by
    # children, because Python opens files close-on-exec.
    with path.open("a+", encoding="utf-8") as file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told and on_wait is not None:
                    file.seek(0)
                    on_wait(file.read().strip())
                    told = True
                time.sleep(poll_seconds)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def attended(path: Path, first: Callable[[], object]) -> Iterator[None]:
    """Hold the lock file `path` together with others; whoever finds nobody there does `first`, while others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            first()
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def holder(path: Path) -> str | None:
    """The process id of who holds the lock file `path` now, or None when nobody does."""
    try:
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip()
    except FileNotFoundError:
        pass
    return None
