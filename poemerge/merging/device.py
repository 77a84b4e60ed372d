"""Moving parameters to a CUDA device and back: pinned buffers, a stream of its own for the copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from poemerge.checkpoints import Loaded
from poemerge.errors import BadInputError, Problem

__all__ = ["Transfer", "choose_device"]


def choose_device(wanted: str) -> str:
    """The torch device to solve on: `auto` is cuda where there is one, else cpu.

    Raises BadInputError for a device that this machine lacks.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind == "cpu" and not index:
        return "cpu"
    if (
        kind == "cuda"
        and torch.cuda.is_available()
        and (not index or (index.isdigit() and int(index) < torch.cuda.device_count()))
    ):
        return wanted
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    raise BadInputError(
        Problem(
            "merge.device",
            wanted,
            "auto, cpu" + "".join(f", cuda:{i}" for i in range(count)) + ("" if count else " (no CUDA device here)"),
            "choose one of those",
        )
    )


class Transfer:
    """Copies to and from one CUDA device. `send` runs on the reader's thread beside the solver's kernels."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def send(self, many: Sequence[Loaded]) -> tuple[list[Loaded], torch.cuda.Event]:
        """The same parameters on the device (from pinned memory, without waiting), and the event of their arrival."""
        with torch.cuda.stream(self._copies):
            moved = [
                replace(
                    one,
                    base=self._to(one.base),
                    whole={expert: self._to(own) for expert, own in one.whole.items()},
                    factors={expert: (self._to(b), self._to(a), s) for expert, (b, a, s) in one.factors.items()},
                )
                for one in many
            ]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._copies)
        return moved, event

    def receive(self, many: Sequence[Loaded], arrival: torch.cuda.Event) -> None:
        """Make the current stream wait for what `send` copies, and keep that memory until it is done with it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrival)
        for one in many:
            factors = [factor for b, a, _ in one.factors.values() for factor in (b, a)]
            for tensor in (one.base, *one.whole.values(), *factors):
                tensor.record_stream(current)

    def fetch(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """`weights` in pinned memory of the host, complete."""
        out = []
        for weight in weights:
            host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
            out.append(host.copy_(weight, non_blocking=True))
        torch.cuda.current_stream(self.device).synchronize()
        return out

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
