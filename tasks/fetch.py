"""fetch: the base, every expert and every suite's data, at the revisions that sources.lock names."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poemerge.checkpoints import ExpertSet
from poemerge.errors import BadInputError, CheckpointError, Problem, ProjectError, SourceError
from poemerge.params import Params
from poemerge.project import Project
from poemerge.sources import Entry, Lock, Refusal, RetryPolicy, bring, holds, read_source_json, recover, workplace
from poemerge.sources.contents import Kind
from poemerge.sources.source import Workplace
from poemerge.wholefile import write_whole
from tasks.report import StageReport

__all__ = ["fetch"]

log = logging.getLogger(__name__)
THREADS = 4


@dataclass(frozen=True)
class _Outcome:
    """What became of one source: `state` is fetched, kept (it was there) or skipped, with the problems that say why."""

    what: str
    name: str
    entry: Entry
    state: str
    problems: tuple[Problem, ...] = ()
    transient: bool = False


def fetch(project: Project, params: Params, policy: RetryPolicy | None = None) -> StageReport:
    """Bring into data/ exactly what sources.lock names, and remove experts and suites that it does not name.

    What is there with the same revision and digests stays. Experts come side by side. An expert that cannot be had, is
    malformed or does not fit the base ends the stage, or with `fetch.on_bad_expert: skip` keeps its last good revision
    and is named in the report's warnings.

    Raises BadInputError or SourceError listing every source that failed; each folder then is as before, or whole.
    """
    lock = Lock.read(project.sources_lock)
    if lock is None:
        raise ProjectError(
            f"No {project.sources_lock}.\n  expected: the file that resolving the sources writes\n"
            "  next:     start with `poemerge run`, which resolves them first"
        )
    place = workplace(project)
    scratch = project.base.parent / "fetch.partial"  # a name that git and DVC ignore
    jobs = [("suite", name, entry, project.suite(name)) for name, entry in lock.suites.items()]
    jobs += [("expert", name, entry, project.expert(name)) for name, entry in lock.experts.items()]
    recover(scratch, [project.base, *(target for *_, target in jobs)])

    def fetch_one(what: str, name: str, entry: Entry, target: Path) -> _Outcome:
        return _fetch_one(what, name, entry, target, place, scratch, project.base, policy)

    outcomes = [fetch_one("base", "base", lock.base, project.base)]
    if outcomes[0].problems:
        raise _error(outcomes)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") as pool:
        outcomes += pool.map(lambda job: fetch_one(*job), jobs)
    place.digests.save()
    shutil.rmtree(scratch, ignore_errors=True)

    skip = params.fetch.on_bad_expert == "skip"
    failed = [o for o in outcomes if o.problems and not (skip and o.what == "expert")]
    if failed:
        raise _error(failed)
    _remove_others(project.experts, lock.experts)
    _remove_others(project.suites, lock.suites)
    skipped = [outcome for outcome in outcomes if outcome.problems]
    for outcome in skipped:
        _drop_if_unfit(project, outcome.name)
    _remember_to_try_again(project, [outcome for outcome in skipped if outcome.transient])
    if not project.expert_folders():
        raise _error(skipped)
    return _report(project, lock, outcomes)


def _fetch_one(
    what: str,
    name: str,
    entry: Entry,
    target: Path,
    place: Workplace,
    scratch: Path,
    base: Path,
    policy: RetryPolicy | None,
) -> _Outcome:
    kind: Kind = "data" if what == "suite" else "checkpoint"
    where = f"{what} {name} from {entry.source}" if what != "base" else f"base from {entry.source}"
    expert = name if what == "expert" else None

    def fits(folder: Path) -> None:
        ExpertSet.open(base, {name: folder}).close()

    try:
        if holds(target, entry, place.digests):
            if what == "expert":
                fits(target)
            return _Outcome(what, name, entry, "kept")
        size = bring(
            entry, kind, target, place, scratch=scratch, check=fits if what == "expert" else None, policy=policy
        )
    except Refusal as refusal:
        return _Outcome(what, name, entry, "skipped", (refusal.problem(where, expert),), refusal.transient)
    except CheckpointError as error:
        return _Outcome(what, name, entry, "skipped", error.problems)
    except OSError as error:
        problem = Problem(where, str(error), "files that can be read and written", "check disk and rights", expert)
        return _Outcome(what, name, entry, "skipped", (problem,), transient=True)
    log.info("%s: %s, %.1f MB", where, entry.revision[:19], size / 1e6)
    return _Outcome(what, name, entry, "fetched")


def _remove_others(folder: Path, wanted: Iterable[str]) -> None:
    """Remove what is in `folder` and not `wanted`; the folder itself is an output and always exists."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in wanted:
            log.info("%s is no longer in params.yaml: removed from %s", path.name, folder)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _drop_if_unfit(project: Project, name: str) -> None:
    """The last good revision of a skipped expert stays only while it fits the base of now."""
    folder = project.expert(name)
    if folder.exists():
        try:
            ExpertSet.open(project.base, {name: folder}).close()
        except CheckpointError:
            shutil.rmtree(folder)


def _remember_to_try_again(project: Project, outcomes: list[_Outcome]) -> None:
    """Tell the next resolve which revisions the network failed, so that DVC runs this stage again for them."""
    path = project.state / "fetch_again.json"
    if not outcomes:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({outcome.name: outcome.entry.revision for outcome in outcomes}))


def _error(outcomes: list[_Outcome]) -> BadInputError | SourceError:
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    if all(outcome.transient for outcome in outcomes):
        return SourceError("\n\n".join(str(problem) for problem in problems))
    return BadInputError(problems)


def _report(project: Project, lock: Lock, outcomes: list[_Outcome]) -> StageReport:
    rows: list[dict[str, Any]] = []
    warnings = []
    for outcome in outcomes:
        folder = {"base": project.base, "expert": project.expert(outcome.name), "suite": project.suite(outcome.name)}
        known = read_source_json(folder[outcome.what])
        rows.append(
            {
                "what": outcome.what,
                "name": outcome.name,
                "source": outcome.entry.source,
                "revision": known["revision"] if known else None,
                "digest": known["digest"] if known else None,
                "size": known["size"] if known else None,
                "license": known["license"] if known else None,
                "state": outcome.state,
                "reason": "",
            }
        )
        if outcome.problems:
            reasons = "; ".join(f"got {p.got}, expected {p.expected}" for p in outcome.problems)
            rows[-1]["reason"] = f"{outcome.entry.revision}: {reasons}"
    for name, why in lock.skipped.items():
        known = next((row for row in rows if (row["what"], row["name"]) == ("expert", name)), None)
        if known is None:
            known = dict.fromkeys(rows[0]) | {"what": "expert", "name": name}
            rows.append(known)
        known |= {"state": "skipped", "reason": f"cannot be resolved: {why}"}
    for row in rows:
        if row["state"] == "skipped":
            keeps = f"keeps {row['revision']}" if row["revision"] else "left out: no earlier revision"
            warnings.append(f"expert {row['name']} skipped ({keeps}): {row['reason']}")
    states = [row["state"] for row in rows]
    experts = len(project.expert_folders())
    return StageReport(
        headline=f"{experts} experts, {len(lock.suites)} suites: {states.count('fetched')} fetched, "
        f"{states.count('kept')} already there" + (f", {len(warnings)} skipped" if warnings else ""),
        table=rows,
        warnings=warnings,
    )
