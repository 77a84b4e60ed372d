"""Read ahead, compute beside, write behind: units of work in order, within a budget of memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from typing import TypeVar

import torch

__all__ = ["MemoryGate", "keep_freed_memory", "processors", "single_threaded", "stream"]

_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_THRESHOLD = -1, -3
"""M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h."""

_SPARE_UNITS = 3
"""Beside those that are computed: one that is read, one that is written, one that waits."""

Unit = TypeVar("Unit")
Loaded = TypeVar("Loaded")
Result = TypeVar("Result")


class MemoryGate:
    """Admits work in order while what is admitted stays within `limit` bytes and `count` pieces.

    A piece larger than the limit is admitted alone.
    """

    def __init__(self, limit: int, count: int) -> None:
        self._limit = limit
        self._count = count
        self._used = 0
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()

    def acquire(self, nbytes: int) -> bool:
        """Wait until `nbytes` fit; False when the gate was closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._inside or self._fits(nbytes))
            if not self._closed:
                self._used += nbytes
                self._inside += 1
            return not self._closed

    def _fits(self, nbytes: int) -> bool:
        return self._inside < self._count and self._used + nbytes <= self._limit

    def release(self, nbytes: int) -> None:
        """Give `nbytes` back."""
        with self._changed:
            self._used -= nbytes
            self._inside -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Turn away everybody who waits, and who comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def stream(
    units: Iterable[Unit],
    memory: Callable[[Unit], int],
    read: Callable[[Unit], Loaded],
    compute: Callable[[Unit, Loaded], Result],
    write: Callable[[Unit, Result], None],
    *,
    workers: int,
    limit: int,
) -> None:
    """Carry every unit through read (one thread), compute (`workers` threads) and write (the caller's), in order.

    At most `limit` bytes are under way by the units' own account, `memory(unit)`, and no more units than keep the
    workers busy: a slow writer or solver holds the reader back. The first exception of any step is raised here, after
    the threads have ended.
    """
    gate = MemoryGate(limit, workers + _SPARE_UNITS)
    # A reader that has died must still be heard, so it hands its exception on in the queue's order.
    queue: Queue[tuple[Unit, Future[Result]] | BaseException | None] = Queue()
    with ThreadPoolExecutor(workers, "merge-compute") as pool:

        def read_ahead() -> None:
            try:
                for unit in units:
                    if not gate.acquire(memory(unit)):
                        return
                    queue.put((unit, pool.submit(compute, unit, read(unit))))
                queue.put(None)
            except BaseException as error:
                queue.put(error)

        reader = threading.Thread(target=read_ahead, name="merge-read", daemon=True)
        reader.start()
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                unit, future = item
                del item
                result = future.result()
                del future
                write(unit, result)
                del result
                gate.release(memory(unit))
        finally:
            gate.close()
            reader.join()
            pool.shutdown(cancel_futures=True)


def keep_freed_memory() -> None:
    """Ask the C library to keep blocks of a few MB that are freed, up to 64 MB a thread.

    A merge frees and takes such blocks with every matrix; each time the system would have to find and clear their pages
    anew, which costs more than reading what goes into them. Nothing happens where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MALLOC_TRIM_THRESHOLD, 1 << 26)
        libc.mallopt(_MALLOC_MMAP_THRESHOLD, 1 << 25)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """One torch thread a matrix: matrices are what runs in parallel, and no result depends on the number of cores."""
    before = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
