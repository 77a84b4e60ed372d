"""Several machines: the shards of a merge spread over a Dask cluster that sees the same folders.

A task is one output shard: its worker reads the tensors that it solves and writes the shard and its record to the
staging folder. A lost worker's shards go to others; what it left half-written has a name of its own and is removed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from poemerge.checkpoints import ExpertSet
from poemerge.errors import BadInputError, PoemergeError, Problem
from poemerge.merging.engine import Job, Progress, open_job, run_shards
from poemerge.merging.identity import input_identities
from poemerge.merging.plan import Plan
from poemerge.merging.staging import Staging

__all__ = ["merge_shard", "run_on_cluster"]

log = logging.getLogger(__name__)

_CONNECT_SECONDS = "20s"

_one_at_a_time = threading.Lock()
"""A worker with several threads must not hold several budgets of memory."""


def run_on_cluster(
    job: Job, plan: Plan, pending: Sequence[int], staging: Staging, progress: Progress | None = None
) -> None:
    """Merge the shards `pending` on the cluster at params.dask_address; returns when all are in the staging folder.

    Workers that declare the resource GPU are used for devices of CUDA, one shard a GPU. Raises BadInputError without an
    address or extra packages, PoemergeError where the cluster cannot be reached, and what a worker raised.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise BadInputError(
            Problem("merge.engine", "dask, which is not installed", "the extra `dask`", "pip install 'poemerge[dask]'")
        ) from error
    address = job.params.dask_address
    if not address:
        raise BadInputError(
            Problem("merge.dask_address", "nothing", "HOST:PORT of a Dask scheduler", "start one with `dask scheduler`")
        )
    try:
        client = Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, TimeoutError) as error:
        raise PoemergeError(
            f"Cannot reach the Dask scheduler at {address}\n  got:      {error}\n  expected: a running scheduler\n"
            "  next:     start it with `dask scheduler`, and workers with `dask worker ADDRESS --nthreads 1`"
        ) from error
    with client:
        workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
        on_gpu = any("GPU" in (worker.get("resources") or {}) for worker in workers.values())
        log.info("%d shards over %d workers", len(pending), len(workers))
        identities = input_identities(job)
        futures = {
            client.submit(
                merge_shard,
                job,
                index,
                str(staging.out),
                staging.key,
                identities,
                pure=False,
                resources={"GPU": 1} if on_gpu and job.params.device != "cpu" else None,
            ): index
            for index in pending
        }
        total, done = sum(plan.shards[index].nbytes for index in pending), 0
        try:
            for future in as_completed(list(futures)):
                index = futures[future]
                future.result()
                if staging.finished(plan.shards[index]) is None:
                    raise PoemergeError(
                        f"{plan.shards[index].file} is not in {staging.folder}, though a worker says that it wrote it\n"
                        f"  got:      no such file here\n  expected: one storage that all machines see under one path\n"
                        "  next:     mount it, or write --out to a folder that is shared"
                    )
                done += plan.shards[index].nbytes
                if progress is not None:
                    progress(done, total, plan.shards[index].file)
        finally:
            client.cancel(list(futures))


def merge_shard(job: Job, index: int, out: str, key: str, identities: dict[str, Any]) -> int:
    """On a worker: merge and write shard `index` of the job; returns `index`.

    Raises PoemergeError when this machine sees other inputs than the one that planned.
    """
    if input_identities(job) != identities:
        raise PoemergeError(
            "This worker sees other inputs than the machine that planned the merge\n  got:      files of other size or "
            "time\n  expected: one storage that all machines see under one path\n  next:     mount it on all of them"
        )
    with _one_at_a_time:
        experts, plan, device = _opened(key, job)
        run_shards(experts, plan, [index], Staging(Path(out), key), device)
    return index


class _ByKey:
    """A job that counts as equal to another of the same key: params hold mappings, which cannot be hashed."""

    def __init__(self, key: str, job: Job) -> None:
        self.key = key
        self.job = job

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByKey) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _opened(key: str, job: Job) -> tuple[ExpertSet, Plan, str]:
    return _open_once(_ByKey(key, job))


@lru_cache(maxsize=1)
def _open_once(keyed: _ByKey) -> tuple[ExpertSet, Plan, str]:
    return open_job(keyed.job)
