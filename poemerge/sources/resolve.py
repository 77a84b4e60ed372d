"""From params.yaml to sources.lock: every source at its revision of now, all problems told at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from poemerge.errors import BadInputError, Problem, SourceError
from poemerge.params import ExpertParams, Params, SourceParams, SuiteParams
from poemerge.project import Project
from poemerge.sources.address import parse, with_revision
from poemerge.sources.contents import Kind
from poemerge.sources.digests import DigestCache
from poemerge.sources.lock import Entry, Lock
from poemerge.sources.refusal import Refusal, RetryPolicy, retrying
from poemerge.sources.source import Workplace

__all__ = ["find_problems", "resolve", "workplace"]

THREADS = 16
POLL = RetryPolicy(attempts=3, first_wait=0.5, longest_wait=5.0)
"""A poll comes again soon, so it gives up sooner than a download does."""


@dataclass(frozen=True)
class _Wanted:
    """One source of params.yaml: the key it stands under, its name, and what it is to be."""

    what: str
    name: str
    where: str
    kind: Kind
    source: str
    revision: str | None = None
    license: str | None = None

    @property
    def expert(self) -> str | None:
        return self.name if self.what == "expert" else None


def workplace(project: Project) -> Workplace:
    """The project as the sources see it; MLflow is the configured one, else the project's own."""
    return Workplace(
        root=project.root,
        digests=DigestCache(project.state / "digests.json"),
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project.mlflow_db}",
    )


def resolve(project: Project, params: Params, *, write: bool = True) -> Lock:
    """The lock of all sources of `params` as they are now; with `write`, sources.lock says it afterwards.

    Local folders are read only where a file's stat changed; of remote ones the revision alone is asked, all at once.
    With `fetch.on_bad_expert: skip` an expert that cannot be resolved keeps its locked revision, or is left out, and
    the lock's `skipped` says so.

    Raises BadInputError when what params.yaml names is not there or no checkpoint, SourceError when a place does not
    answer; either lists every problem.
    """
    place = workplace(project)
    before = Lock.read(project.sources_lock)
    wanted = list(_wanted(params.base, params.experts, params.evaluate.suites))
    entries, refusals = _resolve_all(wanted, place)
    skipped: dict[str, str] = {}
    if params.fetch.on_bad_expert == "skip":
        for one in [one for one in refusals if one.what == "expert"]:
            skipped[one.name] = str(refusals.pop(one))
            kept = before.experts.get(one.name) if before else None
            if kept is not None:
                entries["expert", one.name] = kept
    place.digests.save()
    if refusals:
        raise _error(refusals)
    lock = Lock(
        base=entries["base", "base"],
        experts={name: entry for (what, name), entry in entries.items() if what == "expert"},
        suites={name: entry for (what, name), entry in entries.items() if what == "suite"},
        skipped=skipped,
    )
    if not lock.experts:
        raise SourceError("No expert can be had.\n" + "\n".join(f"  {n}: {why}" for n, why in skipped.items()))
    if write:
        lock = _begin_anew(project, lock, before)
        lock.write(project.sources_lock)
    return lock


def _begin_anew(project: Project, lock: Lock, before: Lock | None) -> Lock:
    """`lock` with attempts counted: one more where fetching skipped that very revision because of the network.

    DVC runs fetch again only when the lock differs; a revision that was malformed stays so and is not tried again.
    """
    marker = project.state / "fetch_again.json"
    again: dict[str, str] = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
    experts = {}
    for name, entry in lock.experts.items():
        old = before.experts.get(name) if before else None
        attempt = old.attempt if old is not None and old.revision == entry.revision else 0
        experts[name] = replace(entry, attempt=attempt + (again.get(name) == entry.revision))
    marker.unlink(missing_ok=True)
    return replace(lock, experts=experts)


def find_problems(
    root: Path, base: SourceParams | None, experts: Mapping[str, ExpertParams], suites: Mapping[str, SuiteParams]
) -> list[Problem]:
    """What is wrong with the local sources among these, as far as stats and headers tell; asks no server.

    For checks before params.yaml as a whole is known to be good.
    """
    place = Workplace(root, DigestCache(root / ".poemerge" / "digests.json"), "")
    problems = []
    for one in _wanted(base, experts, suites):
        try:
            source = parse(with_revision(one.source, one.revision))
            if not source.remote:
                source.resolve(place, one.kind)
        except Refusal as refusal:
            problems.append(refusal.problem(one.where, one.expert))
    place.digests.save()
    return problems


def _wanted(
    base: SourceParams | None, experts: Mapping[str, ExpertParams], suites: Mapping[str, SuiteParams]
) -> Iterator[_Wanted]:
    if base is not None:
        yield _Wanted("base", "base", "params.yaml base.source", "checkpoint", base.source, base.revision)
    for name, expert in experts.items():
        where = f"params.yaml experts.{name}.source"
        yield _Wanted("expert", name, where, "checkpoint", expert.source, expert.revision, expert.license)
    for name, suite in suites.items():
        if suite.data is not None:
            yield _Wanted("suite", name, f"params.yaml evaluate.suites.{name}.data", "data", suite.data)


def _resolve_all(
    wanted: list[_Wanted], place: Workplace
) -> tuple[dict[tuple[str, str], Entry], dict[_Wanted, Refusal]]:
    entries: dict[tuple[str, str], Entry] = {}
    refusals: dict[_Wanted, Refusal] = {}

    def resolve_one(one: _Wanted) -> Entry | Refusal:
        try:
            text = with_revision(one.source, one.revision)
            source = parse(text)
            policy = POLL if source.remote else RetryPolicy(attempts=1)
            found = retrying(lambda: source.resolve(place, one.kind), one.source, policy)
        except Refusal as refusal:
            return refusal
        return Entry(text, found.name, found.digest, one.license)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="resolve") as pool:
        for one, found in zip(wanted, pool.map(resolve_one, wanted), strict=True):
            if isinstance(found, Refusal):
                refusals[one] = found
            else:
                entries[one.what, one.name] = found
    return entries, refusals


def _error(refusals: Mapping[_Wanted, Refusal]) -> BadInputError | SourceError:
    problems = [refusal.problem(one.where, one.expert) for one, refusal in refusals.items()]
    if all(refusal.transient and parse(one.source).remote for one, refusal in refusals.items()):
        return SourceError("\n\n".join(str(problem) for problem in problems))
    return BadInputError(problems)
