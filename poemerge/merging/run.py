"""`merge`: from checkpoints to a finished folder, the same for the pipeline's stage and the command line."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poemerge.checkpoints import ExpertSet, write_index
from poemerge.checkpoints.remote import as_path
from poemerge.merging.engine import Job, Progress, open_job, run_shards
from poemerge.merging.identity import input_identities
from poemerge.merging.output import write_companions
from poemerge.merging.panel import NetworkError
from poemerge.merging.plan import Plan
from poemerge.merging.refinement import refine, why_not_asked
from poemerge.merging.sensitivity import gather
from poemerge.merging.settings import Selection
from poemerge.merging.staging import Staging, check_output, job_key
from poemerge.params import MergeParams

__all__ = ["MergeResult", "merge", "prepare"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: its folder, the content of its merge.json, and how many shards an earlier run had finished."""

    out: Path
    record: Mapping[str, Any]
    resumed_shards: int


def prepare(
    base: Path, experts: Mapping[str, Path], params: MergeParams, selection: Selection | None = None
) -> tuple[Job, ExpertSet, Plan]:
    """The job, its checkpoints and its plan, everything checked and nothing written: what `--dry-run` shows.

    Raises CheckpointError or BadInputError with every problem.
    """
    job = Job(
        str(as_path(base).absolute()),
        {name: str(as_path(path).absolute()) for name, path in sorted(experts.items())},
        params,
        selection if selection is not None and params.preset is None else Selection(),  # a preset has its own family
    )
    checkpoints, plan, _ = open_job(job)
    return job, checkpoints, plan


def merge(
    base: Path,
    experts: Mapping[str, Path],
    out: Path,
    params: MergeParams,
    selection: Selection | None = None,
    *,
    digests: bool = False,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge `experts` (name → folder) of `base` into the folder `out`, which appears when it is whole.

    A run that was killed goes on at its first unwritten shard when it is started again with the same inputs and
    settings; an earlier merge at `out` is replaced. Arguments: `selection` gives the expert family of method poe
    (default Cauchy); `digests` hashes inputs that have no source.json; `progress(done, total, name)` is told bytes
    after each unit. Raises CheckpointError or BadInputError before any work where the input is wrong, PoemergeError
    where the disk refuses.
    """
    place = Path(out).resolve()  # a link stays a link, and what it leads to is replaced
    check_output(place)
    job, checkpoints, plan = prepare(base, experts, params, selection)
    try:
        key = job_key({"inputs": input_identities(job), **job.description()})
        staging = Staging(place, key)
        with staging.hold():
            if any(one.minded for one in plan.parameters):
                reasons = gather(checkpoints, plan.not_measured, staging.sensitivities)
            else:
                reasons = dict.fromkeys(checkpoints.experts, "no matrix is solved with it") | dict(plan.not_measured)
            refinement = staging.refined()
            pending = _pending(plan, staging)
            if refinement is not None and pending:
                staging.unrefine()
                refinement, pending = None, _pending(plan, staging)
            resumed = len(plan.shards) - len(pending)
            if params.engine == "dask":
                from poemerge.merging.cluster import run_on_cluster

                run_on_cluster(job, plan, pending, staging, progress)
            else:
                run_shards(checkpoints, plan, pending, staging, job.device(), progress)
            if refinement is None:
                refinement = _refinement(checkpoints, plan, staging, params.refinement_steps, reasons, progress)
            write_index(staging.folder, plan.shards)
            record = write_companions(job, checkpoints, plan, staging, digests, reasons, refinement)
            staging.publish()
        return MergeResult(Path(out), record, resumed)
    finally:
        checkpoints.close()


def _pending(plan: Plan, staging: Staging) -> list[int]:
    """The shards that no earlier run has left whole."""
    return [index for index, shard in enumerate(plan.shards) if staging.finished(shard) is None]


def _refinement(
    experts: ExpertSet,
    plan: Plan,
    staging: Staging,
    steps: int,
    not_measured: Mapping[str, str],
    progress: Progress | None,
) -> dict[str, Any]:
    """Shorten and refine the merge where the experts can be asked; what merge.json says of it."""
    why = why_not_asked(experts, plan, steps, not_measured)
    if why is not None:
        return {"steps": 0, "why": why}

    def told(step: int) -> None:
        if progress is not None:
            progress(plan.bytes_written, plan.bytes_written, f"refined by step {step} of {steps}")

    try:
        return refine(experts, plan, staging, steps, told)
    except NetworkError as error:  # what was solved is a merge, and is not lost
        log.warning("not refined: %s", error)
        return {"steps": 0, "why": str(error), "failed": True}
