"""Digests of files and folders: the identity of every input and output."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

__all__ = ["DigestCache", "file_digest", "folder_digest"]

_CHUNK = 1 << 22


class DigestCache:
    """File digests kept in a JSON file by (path, size, mtime_ns, inode), so that an unchanged file is hashed once.

    A file that is changed within its time stamp's resolution, to the same size, keeps its old digest: use it for
    inputs that other programs write, never for our own output.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, str] = known if isinstance(known, dict) else {}

    def get(self, path: Path) -> str | None:
        """The digest kept for the file `path` as it is now, or None."""
        return self._known.get(self._key(path))

    def put(self, path: Path, digest: str) -> None:
        """Keep `digest` for the file `path` as it is now, on disk at once."""
        self._known[self._key(path)] = digest
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self._known, indent=0), encoding="utf-8")
        partial.replace(self.path)

    @staticmethod
    def _key(path: Path) -> str:
        stat = path.stat()
        return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"


def file_digest(path: Path, cache: DigestCache | None = None) -> str:
    """sha256 of the bytes of the file `path`, in hexadecimal; with a `cache`, hashed only when the file has changed."""
    known = cache.get(path) if cache is not None else None
    if known is not None:
        return known
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    if cache is not None:
        cache.put(path, digest.hexdigest())
    return digest.hexdigest()


def folder_digest(path: Path, cache: DigestCache | None = None) -> str:
    """sha256 over the folder's sorted lines "relative path, NUL, sha256 of the file, newline", in hexadecimal.

    source.json at the top is left out (it records this digest), and so are names beginning with a dot and *.partial.
    """
    files = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not file.name.endswith(".partial")
    )
    lines = (f"{name}\0{file_digest(file, cache)}\n" for name, file in files if name != "source.json")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
