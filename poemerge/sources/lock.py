"""sources.lock: the one immutable revision of every source that fetch brings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from poemerge.errors import ProjectError
from poemerge.wholefile import write_whole

__all__ = ["Change", "Entry", "Lock"]

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One source: as params.yaml spells it, its resolved revision, and its digest where that is known beforehand.

    `license` is what params.yaml says of it; `collection` the collection it is a member of; `attempt` counts how often
    fetching this very revision was begun anew after the network had failed it.
    """

    source: str
    revision: str
    digest: str | None = None
    license: str | None = None
    collection: str | None = None
    attempt: int = 0


@dataclass(frozen=True)
class Change:
    """One source that differs between two locks; `old` or `new` is None when it came or went."""

    what: str
    name: str
    source: str
    old: str | None
    new: str | None


@dataclass(frozen=True)
class Lock:
    """What every source holds: `base`, `experts` and `suites` by name.

    `skipped` are experts that could not be resolved, with the reason (their last good revision, if there is one, stays
    in `experts`); `waiting` are members of collections that are not whole yet, which is never written.
    """

    base: Entry
    experts: Mapping[str, Entry]
    suites: Mapping[str, Entry] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    waiting: Mapping[str, str] = field(default_factory=dict, compare=False)

    @staticmethod
    def read(path: Path) -> Lock | None:
        """The lock at `path`, or None when there is none. Raises ProjectError when it cannot be understood."""
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise _unreadable(path, str(error)) from error
        try:
            if raw["format"] != FORMAT:
                raise _unreadable(path, f"format {raw['format']}")
            return Lock(
                base=Entry(**raw["base"]),
                experts={name: Entry(**entry) for name, entry in raw["experts"].items()},
                suites={name: Entry(**entry) for name, entry in raw["suites"].items()},
                skipped=raw["skipped"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, repr(error)) from error

    def write(self, path: Path) -> bool:
        """Write the lock to `path`, whole or not at all, unless it says the same already; returns whether it wrote."""
        text = json.dumps(
            {
                "format": FORMAT,
                "base": asdict(self.base),
                "experts": {name: asdict(self.experts[name]) for name in sorted(self.experts)},
                "suites": {name: asdict(self.suites[name]) for name in sorted(self.suites)},
                "skipped": dict(sorted(self.skipped.items())),
            },
            indent=2,
            ensure_ascii=False,
        )
        text += "\n"
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return False
        write_whole(path, text)
        return True

    def changes(self, before: Lock | None) -> list[Change]:
        """The sources whose revision differs from `before` (None: all are new): base, then experts, then suites."""
        found = []
        for what, name, new, old in self._pairs(before):
            if (old.revision if old else None) != (new.revision if new else None):
                entry = new or old
                assert entry is not None
                found.append(
                    Change(what, name, entry.source, old.revision if old else None, new.revision if new else None)
                )
        return found

    def restated(self, before: Lock | None) -> list[str]:
        """The sources of which params.yaml says something else than in `before`, though the revision is the same."""
        return [
            f"{what} {name}"
            for what, name, new, old in self._pairs(before)
            if new is not None and old is not None and new != old and new.revision == old.revision
        ]

    def _pairs(self, before: Lock | None) -> list[tuple[str, str, Entry | None, Entry | None]]:
        pairs: list[tuple[str, str, Entry | None, Entry | None]] = [
            ("base", "base", self.base, before.base if before else None)
        ]
        for what in ("experts", "suites"):
            mine: Mapping[str, Entry] = getattr(self, what)
            theirs: Mapping[str, Entry] = getattr(before, what) if before else {}
            pairs += [
                (what.removesuffix("s"), name, mine.get(name), theirs.get(name)) for name in sorted({*mine, *theirs})
            ]
        return pairs


def _unreadable(path: Path, why: str) -> ProjectError:
    return ProjectError(
        f"{path} cannot be understood.\n  got:      {why}\n  expected: what resolving the sources writes\n"
        "  next:     delete it; the next run resolves every source again"
    )
