"""A local folder, or for a suite's data a single file; its revision is the digest of what it holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from poemerge.sources.contents import Kind, check_complete, needed
from poemerge.sources.digests import copy_hashed, digest_of
from poemerge.sources.refusal import Refusal
from poemerge.sources.source import Brought, Revision, Workplace

__all__ = ["FolderSource", "files_below"]


@dataclass(frozen=True)
class FolderSource:
    """`path` is absolute, or relative to the project's root."""

    path: str
    remote = False

    def resolve(self, place: Workplace, kind: Kind) -> Revision:
        """The digest of the needed files, of which only those whose stat changed are read."""
        try:
            files = self._files(place, kind)
            digest = digest_of({name: place.digests.sha256(path) for name, path in files.items()})
        except OSError as error:
            raise Refusal(
                f"{type(error).__name__}: {error}", "files that can be read", "check the rights", transient=True
            ) from error
        return Revision(f"sha256:{digest}", digest)

    def bring(self, place: Workplace, kind: Kind, revision: str, into: Path) -> Brought:
        """Copy the files; what changed since `revision` was resolved is refused."""
        files = self._files(place, kind)
        digests = {}
        for name, path in files.items():
            with path.open("rb") as source:
                digests[name] = copy_hashed(source, into / name)
        if f"sha256:{digest_of(digests)}" != revision:
            raise Refusal(
                f"{self.path} changed after it was resolved",
                f"{revision[:19]}…",
                "run again: the folder is resolved anew",
                transient=True,
                exhausted=True,
            )
        newest = max(path.stat().st_mtime for path in files.values())
        return Brought(digests, datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"))

    def _files(self, place: Workplace, kind: Kind) -> dict[str, Path]:
        """The needed files by relative name; refuses what is missing, empty, no checkpoint or not whole."""
        folder = place.root / Path(self.path).expanduser()
        if kind == "data" and folder.is_file():
            return {folder.name: folder}
        if not folder.is_dir():
            raise Refusal(
                f"{folder} is a file" if folder.exists() else f"no folder {folder}",
                "a folder" if kind == "checkpoint" else "a folder or a file",
                "check the path (relative ones start at the project's root)",
            )
        if kind == "checkpoint":
            check_complete(folder)
        files = {name: folder / name for name in needed(files_below(folder), kind)}
        if not files:
            raise Refusal(f"{folder} is empty", "a folder with data files", "check the path")
        return files


def files_below(folder: Path) -> Iterator[str]:
    """Relative paths (with /) of the files in `folder` and below, in no order."""
    for here, _, names in os.walk(folder):
        relative = Path(here).relative_to(folder).as_posix()
        for name in names:
            yield name if relative == "." else f"{relative}/{name}"
