"""SHA-256 of files, remembered by path, size, modification time and inode, so that a poll reads no bytes twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

__all__ = ["DigestCache", "copy_hashed", "digest_of"]

CHUNK = 1 << 20
RACY_NS = 2_000_000_000
"""A file written less than this before it was read may change again under the same modification time."""


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of a folder whose files have these SHA-256: sha256 over its sorted lines `path NUL sha256`.

    The same as `poemerge.checkpoints.digest.folder_digest` says of a folder that holds exactly `files`.
    """
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(f"{path}\0{files[path]}\n".encode())
    return whole.hexdigest()


def copy_hashed(source: BinaryIO, target: Path) -> str:
    """Copy an open file to `target` in one pass and return the SHA-256 of what was written."""
    whole = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        while chunk := source.read(CHUNK):
            whole.update(chunk)
            out.write(chunk)
    return whole.hexdigest()


class DigestCache:
    """SHA-256 by (path, size, mtime_ns, inode), kept in the JSON file `path`; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._changed = False
        try:
            self._known: dict[str, list[object]] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def sha256(self, path: Path) -> str:
        """SHA-256 of the file at `path`, read only when its stat differs from that of the last time."""
        before = path.stat()
        key = [before.st_size, before.st_mtime_ns, before.st_ino]
        with self._guard:
            known = self._known.get(str(path))
        if known is not None and known[:3] == key:
            return str(known[3])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = path.stat()
        settled = time.time_ns() - after.st_mtime_ns > RACY_NS
        if settled and key == [after.st_size, after.st_mtime_ns, after.st_ino]:
            with self._guard:
                self._known[str(path)] = [*key, digest]
                self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learnt, whole or not at all; files that are gone are forgotten."""
        with self._guard:
            if not self._changed:
                return
            kept = {path: value for path, value in self._known.items() if os.path.exists(path)}  # noqa: PTH110 - str
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps(kept), encoding="utf-8")
            partial.replace(self._path)
            self._changed = False
