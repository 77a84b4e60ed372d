"""From params.yaml to sources.lock: every source at its revision of now, all problems told at once."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from poemerge.errors import BadInputError, Problem, SourceError
from poemerge.own_registry import own_uri
from poemerge.params import ExpertParams, Params, SourceParams, SuiteParams
from poemerge.project import Project
from poemerge.sources.address import is_remote, parse, with_revision
from poemerge.sources.digests import DigestCache
from poemerge.sources.lock import Entry, Lock
from poemerge.sources.refusal import Refusal, RetryPolicy, retrying
from poemerge.sources.source import Workplace
from poemerge.sources.wanted import Wanted, members, named

__all__ = ["find_problems", "resolve", "workplace"]

log = logging.getLogger(__name__)
THREADS = 16
POLL = RetryPolicy(attempts=3, first_wait=0.5, longest_wait=5.0)
"""A poll comes again soon, so it gives up sooner than a download does."""
QUIET_SECONDS = 2.0
"""A dropped folder in which a file was written less than this ago may have more files to come."""


def workplace(project: Project) -> Workplace:
    """The project as the sources see it; MLflow is the configured one, else the project's own."""
    return Workplace(
        root=project.root,
        digests=DigestCache(project.state / "digests.json"),
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or own_uri(project),
    )


def resolve(project: Project, params: Params, *, write: bool = True) -> Lock:
    """The lock of all sources of `params` as they are now; with `write`, sources.lock says it afterwards.

    Local folders are read only where a file's stat changed; of remote ones the revision alone is asked, all at once.
    Members of a collection become experts when they are whole; those that are not stay as they were locked, or out, and
    the lock's `waiting` says so. Without `write` it is a poll: a source that may answer later waits likewise.
    With `fetch.on_bad_expert: skip` an expert that cannot be resolved keeps its locked revision, or is left out, and
    the lock's `skipped` says so.

    Raises BadInputError when what params.yaml names is not there or no checkpoint, SourceError when a place does not
    answer; either lists every problem.
    """
    place = workplace(project)
    before = Lock.read(project.sources_lock)
    locked = _locked(before)
    asked = list(named(params.base, params.experts, params.evaluate.suites))
    refusals: dict[Wanted, Refusal] = {}
    for name, collection in params.collections.items():
        listing = Wanted("collection", name, f"params.yaml collections.{name}.source", "checkpoint", collection.source)
        try:
            asked += retrying(lambda c=collection, n=name: members(n, c, params, place), name, POLL)  # type: ignore[misc]
        except Refusal as refusal:
            refusals[listing] = refusal
    refusals |= _same_names(asked)
    asked = [one for one in asked if one not in refusals]
    entries, refused = _resolve_all(asked, place, locked)
    refusals |= refused
    place.digests.save()

    skipped: dict[str, str] = {}
    waiting: dict[str, str] = {}
    for one, why in list(refusals.items()):
        if one.collection is not None or (not write and why.transient):
            waiting[one.name] = str(why)
        elif params.fetch.on_bad_expert == "skip" and one.what in {"expert", "collection"}:
            skipped[one.name] = str(why)
        else:
            continue
        del refusals[one]
        entries = _as_locked(one, locked) | entries
    if refusals:
        raise _error(refusals)
    for name, reason in waiting.items():
        log.warning("%s is not taken yet: %s", name, reason)
    lock = _lock(entries, skipped, waiting)
    if write:
        lock = _begin_anew(project, lock, before)
        lock.write(project.sources_lock)
    return lock


def find_problems(
    root: Path, base: SourceParams | None, experts: Mapping[str, ExpertParams], suites: Mapping[str, SuiteParams]
) -> list[Problem]:
    """What is wrong with the local sources among these, as far as stats and headers tell; asks no server.

    For checks before params.yaml as a whole is known to be good.
    """
    place = Workplace(root, DigestCache(root / ".poemerge" / "digests.json"), "")
    problems = []
    for one in named(base, experts, suites):
        try:
            source = parse(with_revision(one.source, one.revision))
            if not source.remote:
                source.resolve(place, one.kind)
        except Refusal as refusal:
            problems.append(refusal.problem(one.where, one.expert))
    place.digests.save()
    return problems


Key = tuple[str, str]


def _locked(before: Lock | None) -> dict[Key, Entry]:
    if before is None:
        return {}
    locked = {("base", "base"): before.base}
    locked |= {("expert", name): entry for name, entry in before.experts.items()}
    return locked | {("suite", name): entry for name, entry in before.suites.items()}


def _as_locked(one: Wanted, locked: Mapping[Key, Entry]) -> dict[Key, Entry]:
    """What the lock holds for a source, or for all members of a collection that could not be listed."""
    if one.what == "collection":
        return {key: entry for key, entry in locked.items() if entry.collection == one.name}
    key = (one.what, one.name)
    return {key: locked[key]} if key in locked else {}


def _lock(entries: Mapping[Key, Entry], skipped: Mapping[str, str], waiting: Mapping[str, str]) -> Lock:
    experts = {name: entry for (what, name), entry in entries.items() if what == "expert"}
    base = entries.get(("base", "base"))
    if base is None or not experts:
        reasons = "".join(f"\n  {name}: {why}" for name, why in {**skipped, **waiting}.items())
        raise SourceError(f"No {'base' if base is None else 'expert'} can be had.{reasons}")
    suites = {name: entry for (what, name), entry in entries.items() if what == "suite"}
    return Lock(base, experts, suites, skipped, waiting)


def _same_names(asked: list[Wanted]) -> dict[Wanted, Refusal]:
    """Members whose name another expert has already: two folders of data/experts cannot be one."""
    first: dict[Key, Wanted] = {}
    clashes = {}
    for one in asked:
        taken = first.setdefault((one.what, one.name), one)
        if taken is not one:
            clashes[one] = Refusal(
                f"{one.source} would be named {one.name}, as {taken.source} is",
                "experts of different names",
                "exclude it in the collection, or name it under `experts`",
            )
    return clashes


def _resolve_all(
    asked: list[Wanted], place: Workplace, locked: Mapping[Key, Entry]
) -> tuple[dict[Key, Entry], dict[Wanted, Refusal]]:
    entries: dict[Key, Entry] = {}
    refusals: dict[Wanted, Refusal] = {}

    def resolve_one(one: Wanted) -> Entry | Refusal:
        try:
            entry = _resolve(one, place)
            if one.drop and locked.get((one.what, one.name)) != entry:
                _wait_until_quiet(place.root / one.source)
                if _resolve(one, place) != entry:
                    raise Refusal("files are being written", "a folder at rest", "wait for the copy", transient=True)
        except Refusal as refusal:
            return refusal
        return entry

    with ThreadPoolExecutor(THREADS, thread_name_prefix="resolve") as pool:
        for one, found in zip(asked, pool.map(resolve_one, asked), strict=True):
            if isinstance(found, Refusal):
                refusals[one] = found
            else:
                entries[one.what, one.name] = found
    return entries, refusals


def _resolve(one: Wanted, place: Workplace) -> Entry:
    text = with_revision(one.source, one.revision)
    source = parse(text)
    policy = POLL if source.remote else RetryPolicy(attempts=1)
    found = retrying(lambda: source.resolve(place, one.kind), one.source, policy)
    return Entry(text, found.name, found.digest, one.license, one.collection)


def _wait_until_quiet(folder: Path) -> None:
    """Sleep until no file of `folder` was written in the last QUIET_SECONDS; the time of change cannot be set back."""
    try:
        newest = max((file.stat().st_ctime for file in folder.iterdir()), default=0.0)
    except OSError:  # it is being moved or removed: it will be looked at again at once
        return
    time.sleep(min(QUIET_SECONDS, max(0.0, newest + QUIET_SECONDS - time.time())))


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


def _error(refusals: Mapping[Wanted, Refusal]) -> BadInputError | SourceError:
    problems = [refusal.problem(one.where, one.expert) for one, refusal in refusals.items()]
    if all(refusal.transient and is_remote(one.source) for one, refusal in refusals.items()):
        return SourceError("\n\n".join(str(problem) for problem in problems))
    return BadInputError(problems)
