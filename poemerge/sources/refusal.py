"""Why a source cannot be had, before it is known which key of params.yaml and which expert it stands for."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, ParamSpec, TypeVar

from poemerge.errors import Problem

__all__ = ["Refusal", "RetryPolicy", "refusing", "retrying"]

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class Refusal(Exception):  # noqa: N818 - it becomes a Problem of an error, and is none itself
    """A source says no: what was `got`, what was `expected`, the `next_step`.

    `transient` is true when the same request may be answered later (the network, a busy hub, a file being written);
    `wait` is how many seconds the other side asked us to stay away, where it said so; `exhausted` says that
    trying again in this run is of no use.
    """

    def __init__(
        self,
        got: str,
        expected: str,
        next_step: str,
        *,
        transient: bool = False,
        wait: float | None = None,
        exhausted: bool = False,
    ) -> None:
        super().__init__(got)
        self.got = got
        self.expected = expected
        self.next_step = next_step
        self.transient = transient
        self.wait = wait
        self.exhausted = exhausted

    def problem(self, where: str, expert: str | None) -> Problem:
        """This refusal as a Problem of the params key `where`."""
        return Problem(where, self.got, self.expected, self.next_step, expert=expert)


def refusing(refuse: Callable[[Exception], NoReturn]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that passes what the decorated function raises, Refusals apart, to `refuse`, which raises it anew: as
    a Refusal where it is the other side's or the network's doing, else as it is.
    """

    def decorate(work: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(work)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return work(*args, **kwargs)
            except Refusal:
                raise
            except Exception as error:
                refuse(error)

        return wrapped

    return decorate


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` in all; the wait doubles from `first_wait` to `longest_wait` seconds, each shortened by up to half."""

    attempts: int = 4
    first_wait: float = 1.0
    longest_wait: float = 30.0

    def wait(self, attempt: int) -> float:
        """Seconds to wait after the failed `attempt` (from 1): random, so that many clients do not return at once."""
        whole = min(self.longest_wait, self.first_wait * 2.0 ** (attempt - 1))
        return whole * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards nothing


def retrying(work: Callable[[], R], what: str, policy: RetryPolicy) -> R:
    """What `work()` returns; a transient Refusal is tried again as `policy` says, any other is raised at once.

    `what` names the work in the log.
    """
    for attempt in range(1, policy.attempts + 1):
        try:
            return work()
        except Refusal as refusal:
            if not refusal.transient or refusal.exhausted:
                raise
            if attempt == policy.attempts:
                raise Refusal(
                    f"{refusal.got} (tried {attempt} times)", refusal.expected, refusal.next_step, transient=True
                ) from refusal
            wait = max(policy.wait(attempt), min(refusal.wait or 0.0, policy.longest_wait))
            log.warning("%s: %s; trying again in %.1f s (%d of %d)", what, refusal, wait, attempt, policy.attempts)
            time.sleep(wait)
    raise AssertionError("a policy has at least one attempt")
