"""Child processes that end when the process that started them ends, however it ends: by signal, kill -9, power.

A child is started in a process group of its own with the reading end of a pipe as its standard input; the starter keeps
the writing end and writes nothing. When the starter is gone the kernel closes the pipe, the child reads the end of the
file, and ends its whole group.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from poemerge.filelock import holder

__all__ = ["SERVE_LOCK", "Child", "hold", "leash"]

GROUP = "POEMERGE_LIFELINE_GROUP"
"""Environment variable with the id of the process group that the lifeline ends."""

SERVE_LOCK = "POEMERGE_SERVE_LOCK"
"""Environment variable with the path of the lock that a `poemerge serve` holds while it runs."""


def hold() -> None:
    """End this process's group when standard input ends, if the process was started with a lifeline; else nothing."""
    if os.environ.get(GROUP) != str(os.getpgrp()):
        return
    threading.Thread(target=_wait_for_the_end, name="lifeline", daemon=True).start()


def _wait_for_the_end() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def leash() -> None:
    """End this process's group when the `poemerge serve` that it works for has ended, however that ended.

    Between the two stand a worker and its supervisor, which close pipes: here it is a lock that `serve` holds, whose
    path it puts in the environment. Without that nothing is done.
    """
    path = os.environ.get(SERVE_LOCK)
    if path is not None:
        threading.Thread(target=_wait_for_release, args=(Path(path),), name="leash", daemon=True).start()


def _wait_for_release(path: Path) -> None:
    while holder(path) is not None:
        time.sleep(1.0)
    os.killpg(os.getpgrp(), signal.SIGKILL)


class Child:
    """`python -m MODULE ARGUMENTS` in its own process group, ended with all its descendants by `end` or with us.

    Arguments: `module` and `arguments`; `cwd`; `env`, the whole environment (default: ours); `output`, where stdout and
    stderr go together: an open file, or None for a pipe that `stdout` reads as text.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
    ) -> None:
        read_end, self._write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "poemerge.lifeline", module, *arguments],
                cwd=cwd,
                env=dict(os.environ if env is None else env),
                stdin=read_end,
                stdout=subprocess.PIPE if output is None else output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._write_end)
            raise
        finally:
            os.close(read_end)

    @property
    def pid(self) -> int:
        """Its process id, which is its group's id too."""
        return self._process.pid

    @property
    def stdout(self) -> IO[bytes] | None:
        return self._process.stdout

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status once it has ended; raises subprocess.TimeoutExpired after `timeout` seconds."""
        return self._process.wait(timeout)

    def end(self, grace: float = 10.0) -> None:
        """End it and its whole group: SIGTERM, then SIGKILL for what is left after `grace` seconds. Safe to repeat."""
        deadline = time.monotonic() + grace
        self._signal(signal.SIGTERM)
        while self._group_lives() and time.monotonic() < deadline:
            self._process.poll()
            time.sleep(0.02)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _group_lives(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()


def _main() -> None:
    """Run the module named by the first argument as `python -m` does, with the lifeline held."""
    if os.getpid() == os.getpgrp():
        os.environ[GROUP] = str(os.getpgrp())
    hold()
    module, sys.argv[:] = sys.argv[1], sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
