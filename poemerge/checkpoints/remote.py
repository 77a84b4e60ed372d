"""Checkpoints in object storage, s3:// and what else fsspec knows, behind the few methods of Path that we use."""

from __future__ import annotations

import fnmatch
import io
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from poemerge.errors import BadInputError, Problem

__all__ = ["RemotePath", "as_path"]


def as_path(text: str | Path) -> Path:
    """A local path, or for SCHEME://… a RemotePath, which has the methods of Path that reading a checkpoint needs."""
    place: Any = text
    if isinstance(text, str):
        place = RemotePath(text.rstrip("/")) if "://" in text else Path(text)
    return cast(Path, place)


@dataclass(frozen=True)
class _Stat:
    st_size: int
    st_mtime_ns: str


@dataclass(frozen=True)
class RemotePath:
    """An object or a prefix of an object store. Reading is by ranges; nothing is kept on this machine."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}")

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    @property
    def name(self) -> str:
        """Last component."""
        return posixpath.basename(self.url)

    @property
    def suffix(self) -> str:
        """Extension with its dot."""
        return posixpath.splitext(self.url)[1]

    @property
    def parent(self) -> RemotePath:
        """The prefix that it lies under."""
        return RemotePath(posixpath.dirname(self.url))

    def absolute(self) -> RemotePath:
        """Itself: a URL is absolute."""
        return self

    def is_file(self) -> bool:
        """Whether it is an object."""
        return bool(self._store().isfile(self.url))

    def is_dir(self) -> bool:
        """Whether objects lie under it."""
        return bool(self._store().isdir(self.url))

    def stat(self) -> _Stat:
        """Size, and the store's own mark of a version (ETag) for a time."""
        info = self._store().info(self.url)
        mark = info.get("ETag") or info.get("LastModified") or info.get("created") or info.get("mtime")
        return _Stat(int(info["size"]), str(mark))

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly under it."""
        scheme = self.url.partition("://")[0]
        for name in self._store().ls(self.url, detail=False):
            yield RemotePath(f"{scheme}://{str(name).lstrip('/').rstrip('/')}")

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies directly under it and matches."""
        return (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def rglob(self, _: str) -> Iterator[RemotePath]:
        """All objects under it."""
        scheme = self.url.partition("://")[0]
        return (RemotePath(f"{scheme}://{str(name).lstrip('/')}") for name in self._store().find(self.url))

    def read_bytes(self) -> bytes:
        """The whole object."""
        return cast(bytes, self._store().cat_file(self.url))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def open(self, mode: str = "r", encoding: str | None = None) -> Any:
        """The object as a file for reading, bytes or text."""
        handle = self._store().open(self.url, "rb")
        return handle if "b" in mode else io.TextIOWrapper(handle, encoding=encoding or "utf-8")

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`."""
        return cast(bytes, self._store().cat_file(self.url, start=start, end=end))

    def _store(self) -> Any:
        return _store(self.url.partition("://")[0])


@lru_cache
def _store(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        raise BadInputError(
            Problem(
                f"{scheme}://", str(error), "a kind of storage that fsspec knows here", "for s3://: pip install s3fs"
            )
        ) from error
