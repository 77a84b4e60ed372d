"""The merge itself: a plan carried out shard by shard, resumable, its output named only when whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoints import ExpertSet, Loaded, ShardFile
from poemerge.checkpoints.remote import as_path
from poemerge.errors import CheckpointError, Problem
from poemerge.merging.device import Transfer, choose_device
from poemerge.merging.elementwise import merge_elementwise, merge_trimmed, ties_thresholds
from poemerge.merging.matrices import merge_matrices
from poemerge.merging.merged import Merged, NotFiniteError, stored_as
from poemerge.merging.plan import ParameterPlan, Plan, Unit, make_plan
from poemerge.merging.sensitivity import Sensitivities
from poemerge.merging.settings import Selection
from poemerge.merging.staging import Staging
from poemerge.merging.stream import keep_freed_memory, processors, single_threaded, stream
from poemerge.params import MergeParams

__all__ = ["Job", "Progress", "open_job", "run_shards"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Told after each unit: bytes written, bytes in all, the name of the parameter."""


@dataclass(frozen=True)
class Job:
    """What is merged and how; small, so that it can be sent to another machine that sees the same folders."""

    base: str
    experts: Mapping[str, str]
    params: MergeParams
    selection: Selection = field(default_factory=Selection)

    def device(self) -> str:
        """The torch device of this machine that the job is for; raises BadInputError where the machine lacks it."""
        return choose_device(self.params.device)

    def description(self) -> dict[str, Any]:
        """The settings that decide the output's bytes, as JSON."""
        irrelevant = {"engine", "dask_address"}
        return {
            "params": self.params.model_dump(mode="json", exclude=irrelevant),
            "selection": asdict(self.selection),
            "device": self.device().split(":")[0] if self.params.engine == "local" else self.params.device,
        }


def open_job(job: Job) -> tuple[ExpertSet, Plan, str]:
    """The job's checkpoints, its plan and the device; raises CheckpointError or BadInputError with every problem."""
    device = job.device()
    experts = ExpertSet.open(
        as_path(job.base),
        {name: as_path(path) for name, path in job.experts.items()},
        job.params.include,
        job.params.exclude,
    )
    return experts, make_plan(experts, job.params, job.selection, device), device


def run_shards(
    experts: ExpertSet,
    plan: Plan,
    indices: Sequence[int],
    staging: Staging,
    device: str,
    progress: Progress | None = None,
) -> None:
    """Merge and write the shards `indices` of the plan into the staging folder, each with its record.

    Raises CheckpointError naming file, expert and tensor where an input is not finite.
    """
    keep_freed_memory()
    work = _Work(experts, plan, staging, device, progress)
    try:
        with single_threaded():
            stream(
                work.units(indices),
                lambda item: item[1].memory,
                work.read,
                work.compute,
                work.write,
                workers=processors() if device == "cpu" else 2,
                limit=plan.max_memory,
            )
    except NotFiniteError as error:
        raise CheckpointError(_not_finite(experts, error)) from error
    finally:
        work.close()


@dataclass
class _Input:
    """What was read for a unit: one Loaded a parameter, and (for blocks that average) which experts moved it."""

    loaded: list[Loaded]
    moved: list[bool] | None = None
    thresholds: Tensor | None = None
    sensitivity: Tensor | None = None
    ready: Any = None


class _Work:
    """The steps of the stream, with what they share: the shard being written and its ledger lines."""

    def __init__(
        self, experts: ExpertSet, plan: Plan, staging: Staging, device: str, progress: Progress | None
    ) -> None:
        self._experts = experts
        self._plan = plan
        self._staging = staging
        self._sensitivities = Sensitivities(staging.sensitivities)
        self._device = torch.cuda.get_device_name(device) if device != "cpu" else "cpu"
        self._transfer = Transfer(device) if device != "cpu" else None
        self._progress = progress
        self._moved: dict[str, list[bool]] = {}
        self._thresholds: dict[str, Tensor] = {}
        self._file: ShardFile | None = None
        self._ledger: list[dict[str, Any]] = []
        self._seconds: dict[str, float] = {}
        self._entry: dict[str, dict[str, Any]] = {}
        self._written = 0
        self._total = 0

    def units(self, indices: Sequence[int]) -> Iterator[tuple[int, Unit]]:
        self._total = sum(self._plan.shards[index].nbytes for index in indices)
        for index in indices:
            for unit in self._plan.order[index]:
                yield index, unit

    def read(self, item: tuple[int, Unit]) -> _Input:
        """On the reader's thread: the unit's tensors, on their way to the device where they are solved there."""
        _, unit = item
        first = unit.parameters[0]
        if first.elementwise or first.action == "left_at_base":
            loaded = self._experts.load(first.name, unit.rows)
            moved = None
            if first.settings is not None and first.settings.method == "average" and unit.rows is not None:
                if first.name not in self._moved:
                    self._moved[first.name] = self._experts.moved(first.name)
                moved = self._moved.pop(first.name) if unit.last else self._moved[first.name]
            return _Input([loaded], moved)
        if first.trimmed:
            thresholds = None
            if unit.rows is not None:
                if first.name not in self._thresholds:
                    self._thresholds[first.name] = ties_thresholds(self._experts, first.name)
                thresholds = self._thresholds.pop(first.name) if unit.last else self._thresholds[first.name]
            return _Input([self._experts.load(first.name, unit.rows)], thresholds=thresholds)
        many = [self._experts.load(p.name, pin=self._transfer is not None) for p in unit.parameters]
        sensitivity = self._minded(unit)
        if self._transfer is None:
            return _Input(many, sensitivity=sensitivity)
        many, ready = self._transfer.send(many)
        return _Input(many, sensitivity=sensitivity, ready=ready)

    def _minded(self, unit: Unit) -> Tensor | None:
        """The measured sensitivities `[matrix, expert, out, s]` of a unit's matrices, where there are any."""
        first = unit.parameters[0]
        if not first.minded:
            return None
        found = [self._sensitivities.read(p.name, p.experts, p.outputs) for p in unit.parameters]
        known = next((one for one in found if one is not None), None)
        if known is None:
            return None
        return torch.stack([torch.zeros_like(known) if one is None else one for one in found])

    def compute(self, item: tuple[int, Unit], read: _Input) -> list[Merged]:
        """On a worker's thread."""
        _, unit = item
        first = unit.parameters[0]
        if first.action == "left_at_base":
            return [_whole(Merged(None, {"outcome": "unchanged", "seconds": 0.0}), first, read.loaded[0].base)]
        assert first.settings is not None
        if first.elementwise:
            loaded = read.loaded[0]
            moved = read.moved
            if moved is None:
                check = first.settings.method == "average"
                moved = [not check or _differs(loaded, expert) for expert in loaded.experts]
            one = merge_elementwise(loaded, first.settings, moved, len(self._experts.experts), first.dtype)
            return [_whole(one, first, loaded.base)]
        if first.trimmed:
            loaded = read.loaded[0]
            one = merge_trimmed(loaded, first.settings, first.dtype, read.thresholds)
            return [_whole(one, first, loaded.base)]
        if self._transfer is not None:
            self._transfer.receive(read.loaded, read.ready)
        if first.factored:
            loaded = read.loaded[0]
            bases = loaded.base.unsqueeze(0)
            deltas: Tensor | list[tuple[Tensor, Tensor, float]] = [loaded.factors[expert] for expert in loaded.experts]
        elif len(read.loaded) == 1:
            bases = read.loaded[0].base.unsqueeze(0)
            deltas = read.loaded[0].deltas().unsqueeze(0)
        else:
            bases = torch.stack([one.base for one in read.loaded])
            deltas = torch.stack([one.deltas() for one in read.loaded])
        read.loaded.clear()
        results = merge_matrices(
            [p.name for p in unit.parameters],
            first.experts,
            bases,
            deltas,
            first.settings,
            first.transposed,
            first.dtype,
            len(self._experts.experts),
            read.sensitivity if read.sensitivity is None else read.sensitivity.to(bases.device),
        )
        whole = [_whole(one, p, base) for one, p, base in zip(results, unit.parameters, bases, strict=True)]
        if self._transfer is None:
            return whole
        weights = self._transfer.fetch([one.weight for one in whole if one.weight is not None])
        return [Merged(weight, one.entry) for weight, one in zip(weights, whole, strict=True)]

    def write(self, item: tuple[int, Unit], results: list[Merged]) -> None:
        """On the caller's thread, in order: weights into the shard, a line into its ledger for each whole parameter."""
        index, unit = item
        shard = self._plan.shards[index]
        if self._file is None:
            self._file = ShardFile(self._staging.folder, shard)
        for p, one in zip(unit.parameters, results, strict=True):
            assert one.weight is not None
            self._file.write(p.name, one.weight, 0 if unit.rows is None else unit.rows.start)
            self._written += one.weight.numel() * one.weight.element_size()
            self._seconds[p.name] = self._seconds.get(p.name, 0.0) + one.entry["seconds"]
            known = self._entry.setdefault(p.name, one.entry)
            if known["outcome"] == "unchanged":  # a block may be unchanged where the parameter is not
                self._entry[p.name] = one.entry
            if unit.last:
                self._ledger.append(_line(p, self._entry.pop(p.name), self._seconds.pop(p.name)))
            if self._progress is not None:
                self._progress(self._written, self._total, p.name)
        if unit is self._plan.order[index][-1]:
            self._staging.record(shard, self._file.finish(), self._ledger, self._device)
            self._file, self._ledger = None, []

    def close(self) -> None:
        """Remove the shard that was being written, if any."""
        if self._file is not None:
            self._file.abandon()
            self._file = None


def _whole(one: Merged, p: ParameterPlan, base: Tensor) -> Merged:
    """The merged weight, or the base's own where that stays."""
    return one if one.weight is not None else Merged(stored_as(p.name, base, p.dtype), one.entry)


def _differs(loaded: Loaded, expert: str) -> bool:
    if expert in loaded.whole and not torch.equal(loaded.whole[expert], loaded.base.to(loaded.whole[expert].dtype)):
        return True
    return expert in loaded.factors and all(bool(factor.any()) for factor in loaded.factors[expert][:2])


def _line(p: ParameterPlan, entry: dict[str, Any], seconds: float) -> dict[str, Any]:
    settings = p.settings
    poe = settings is not None and settings.method == "poe"
    return {
        "name": p.name,
        "shape": list(p.shape),
        "rule": "left_at_base" if entry["outcome"] == "unchanged" else p.action,
        "method": None if settings is None else settings.method,
        "family": settings.family if poe and settings is not None else None,
        "tail_index": settings.tail_index if poe and settings is not None else None,
        "side": settings.side if poe and settings is not None else None,
        "factored": p.factored,
        "experts": list(p.experts),
        "weights": entry.get("weights", {}),
        "coefficient": entry.get("coefficient"),
        "held": entry.get("held", 0),  # directions that were held back, poemerge.numerics.spectral
        "steps": entry.get("steps", 0),
        "energy_first": entry.get("energy_first"),
        "energy_last": entry.get("energy_last"),
        "energy": entry.get("energy", []),  # by step; left out for a stack of matrices
        "outcome": entry["outcome"],
        "seconds": round(seconds, 6),
        "refined": None,  # how far the refinement took it, in parts of how far the merge had
    }


def _not_finite(experts: ExpertSet, error: NotFiniteError) -> Problem:
    name = error.name.partition("[")[0]
    expert = error.expert
    if expert is None:
        # Entry by entry merges see only the sum: look at who brought it.
        loaded = experts.load(name)
        brought = [*loaded.whole.items(), *((one, own) for one, (b, a, _) in loaded.factors.items() for own in (b, a))]
        if bool(loaded.base.isfinite().all()):
            expert = next((one for one, own in brought if not bool(own.isfinite().all())), None)
    one = experts.experts[expert] if expert is not None else None
    own = None if one is None else one.full.get(name) or one.lora.get(name)
    path = experts.base.file(name).path
    if one is not None:
        path = one.weights.file(one.stored(one.full[name])).path if name in one.full else one.weights.path
    return Problem(
        str(path),
        "NaN or infinite entries",
        "finite numbers",
        "check how this model was trained and saved, or leave it out",
        expert,
        own or name,
    )
