"""Bringing one locked source into its folder under data/: whole and verified, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from poemerge.sources.address import parse
from poemerge.sources.contents import Kind, check_complete, license_of
from poemerge.sources.digests import DigestCache, digest_of
from poemerge.sources.folder import files_below
from poemerge.sources.lock import Entry
from poemerge.sources.refusal import RetryPolicy, retrying
from poemerge.sources.source import Workplace

__all__ = ["bring", "holds", "read_source_json", "recover"]


def read_source_json(folder: Path) -> dict[str, Any] | None:
    """What source.json in `folder` says, or None when there is none that can be read."""
    try:
        known = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and isinstance(known.get("files"), dict) else None


def holds(folder: Path, entry: Entry, digests: DigestCache) -> bool:
    """Whether `folder` holds exactly what `entry` names: its source.json says so and every file has its digest."""
    known = read_source_json(folder)
    if known is None or (known.get("source"), known.get("revision")) != (entry.source, entry.revision):
        return False
    if entry.license is not None and known.get("license") != entry.license:
        return False
    files: dict[str, dict[str, Any]] = known["files"]
    if set(files_below(folder)) != {*files, "source.json"}:
        return False
    try:
        return all(
            (folder / name).stat().st_size == fact["size"] and digests.sha256(folder / name) == fact["sha256"]
            for name, fact in files.items()
        )
    except (OSError, KeyError):
        return False


def bring(
    entry: Entry,
    kind: Kind,
    target: Path,
    place: Workplace,
    *,
    scratch: Path,
    check: Callable[[Path], None] | None = None,
    policy: RetryPolicy | None = None,
) -> int:
    """Bring what `entry` names into the folder `target`; returns the number of bytes.

    It is written below `scratch` (on the same file system), verified, passed to `check`, and then renamed: `target` is
    the old folder or the new one, never a mixture, and no file is written in place (DVC's cache may share its inode).
    A remote source is tried again as `policy` says. Raises Refusal, and whatever `check` raises.
    """
    source = parse(entry.source)
    partial = scratch / "new" / target.parent.name / target.name

    def attempt() -> dict[str, Any]:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        brought = source.bring(place, kind, entry.revision, partial)
        if kind == "checkpoint":
            check_complete(partial)
        return {
            "source": entry.source,
            "revision": entry.revision,
            "digest": digest_of(brought.files),
            "license": entry.license or license_of(partial),
            "size": sum((partial / name).stat().st_size for name in brought.files),
            "files": {
                name: {"size": (partial / name).stat().st_size, "sha256": sha256}
                for name, sha256 in sorted(brought.files.items())
            },
            "time": brought.time,
        }

    try:
        if source.remote:
            facts = retrying(attempt, f"{target.name} from {entry.source}", policy or RetryPolicy())
        else:
            facts = attempt()
        if check is not None:
            check(partial)
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        (partial / "source.json").write_text(text, encoding="utf-8")
        _sync(partial)
        _swap(partial, target, scratch)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return int(facts["size"])


def recover(scratch: Path, targets: Iterable[Path]) -> None:
    """Put back what a fetch that was killed between its two renames had moved aside, and clear `scratch`."""
    for target in targets:
        old = _aside(target, scratch)
        if old.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            old.rename(target)
    shutil.rmtree(scratch, ignore_errors=True)


def _aside(target: Path, scratch: Path) -> Path:
    return scratch / "old" / target.parent.name / target.name


def _sync(folder: Path) -> None:
    """Have the bytes on disk before the rename says that they are there."""
    for name in files_below(folder):
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(partial: Path, target: Path, scratch: Path) -> None:
    old = _aside(target, scratch)
    shutil.rmtree(old, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old.parent.mkdir(parents=True, exist_ok=True)
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
