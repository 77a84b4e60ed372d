"""What a plan will cost on this machine: memory by the plan's own account, time from rates measured just now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from poemerge.checkpoints import ExpertSet
from poemerge.merging.plan import Plan
from poemerge.merging.refinement import refinement_flops, refinement_memory
from poemerge.merging.sensitivity import measuring_flops
from poemerge.merging.stream import processors, single_threaded

__all__ = ["Cost", "estimate"]

_PROCESS = 350_000_000
"""Resident memory of Python with torch loaded and nothing at work."""

_WRITE_RATE = 0.8e9
_PROBE_BYTES = 1 << 26
_PROBE_SIZE = 768


@dataclass(frozen=True)
class Cost:
    """`peak_memory` in bytes, `seconds` to about a factor of two, and the `rates` it was reckoned with."""

    peak_memory: int
    seconds: float
    rates: Mapping[str, float]


def estimate(experts: ExpertSet, plan: Plan, refinement_steps: int | None = None) -> Cost:
    """Cost of `plan`: reading, solving and writing overlap, so the longest of them counts; measuring experts that no
    earlier merge has measured comes before, and asking and refining by `refinement_steps` (None: neither) after.

    Takes about a tenth of a second: a piece of the base is read, and one product of matrices timed.
    """
    read = _read_rate(experts)
    flops = _flop_rate() * processors()
    seconds = max(plan.bytes_read / read, plan.flops / flops, plan.bytes_written / _WRITE_RATE)
    asking = 0.0 if refinement_steps is None else refinement_flops(experts, plan, refinement_steps)
    seconds += (measuring_flops(experts, plan) + asking) / flops
    under_way = min(plan.max_memory, sum(unit.memory for units in plan.order for unit in units))
    refining = 0 if refinement_steps is None else refinement_memory(experts)
    peak = _PROCESS + max(under_way, plan.largest_unit, refining)
    return Cost(peak, seconds, {"read_bytes": read, "flops": flops, "write_bytes": _WRITE_RATE})


def _read_rate(experts: ExpertSet) -> float:
    """Bytes a second of reading the base's first tensors."""
    started, done = time.perf_counter(), 0
    for name in experts.base.names():
        done += experts.base.read(name).nbytes
        if done >= _PROBE_BYTES:
            break
    return max(done, 1) / max(time.perf_counter() - started, 1e-6)


def _flop_rate() -> float:
    """Floating-point operations a second of one thread on float32 matrices."""
    matrix = torch.ones(_PROBE_SIZE, _PROBE_SIZE)
    with single_threaded():
        matrix @ matrix
        started = time.perf_counter()
        matrix @ matrix
        return 2.0 * _PROBE_SIZE**3 / max(time.perf_counter() - started, 1e-6)
