"""s3://bucket/prefix and every other URL that fsspec opens: a prefix of an object store, a folder of a file system."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from poemerge.sources.contents import Kind, needed, require_weights
from poemerge.sources.digests import copy_hashed
from poemerge.sources.refusal import Refusal, refusing
from poemerge.sources.source import Brought, Revision, Workplace

__all__ = ["StoreSource", "folders_in", "speaking_to_store"]


speaking_to_store = refusing(lambda error: _refuse(error))
"""Turn the many exceptions of fsspec's file systems into Refusals."""


@speaking_to_store
def folders_in(url: str) -> list[str]:
    """Names of the folders directly below `url`, sorted."""
    system, root = _open(url)
    return sorted(
        str(found["name"]).rstrip("/").rsplit("/", 1)[-1]
        for found in system.ls(root, detail=True, refresh=True)
        if found["type"] == "directory"
    )


@dataclass(frozen=True)
class StoreSource:
    """What lies below `url`; its revision is a digest of the listing: names, sizes and ETags (or times of change)."""

    url: str
    remote = True

    @speaking_to_store
    def resolve(self, place: Workplace, kind: Kind) -> Revision:  # noqa: ARG002 - a store needs no workplace
        """The listing's digest; reads no file."""
        return Revision(_revision(self._listing(kind)))

    @speaking_to_store
    def bring(self, place: Workplace, kind: Kind, revision: str, into: Path) -> Brought:  # noqa: ARG002
        """Copy the files, whose listing must be that of `revision` before and after."""
        system, _ = _open(self.url)
        listing = self._listing(kind)
        self._must_be(revision, listing)
        digests = {}
        for name, found in listing.items():
            with system.open(found["name"], "rb") as file:
                digests[name] = copy_hashed(file, into / name)
            got = (into / name).stat().st_size
            if got != found["size"]:
                raise Refusal(
                    f"{name} with {got} bytes", f"{found['size']} bytes, as listed", "try again", transient=True
                )
        self._must_be(revision, self._listing(kind))
        times = [t for t in (_time(found) for found in listing.values()) if t is not None]
        return Brought(digests, max(times).isoformat(timespec="seconds") if times else None)

    def _listing(self, kind: Kind) -> dict[str, dict[str, Any]]:
        """The needed files by name relative to the URL."""
        system, root = _open(self.url)
        system.invalidate_cache()
        found = system.find(root, detail=True)
        if not found:
            raise Refusal(f"nothing below {self.url}", "a checkpoint or data files", "check bucket and prefix")
        if set(found) == {root} and kind == "data":
            return {root.rsplit("/", 1)[-1]: found[root]}
        below = {path[len(root) :].lstrip("/"): facts for path, facts in found.items()}
        if kind == "checkpoint":
            require_weights(below)
        return {name: below[name] for name in needed(below, kind)}

    def _must_be(self, revision: str, listing: dict[str, dict[str, Any]]) -> None:
        if _revision(listing) != revision:
            raise Refusal(
                f"{self.url} changed after it was resolved",
                revision,
                "run again: the place is resolved anew",
                transient=True,
                exhausted=True,
            )


def _open(url: str) -> tuple[Any, str]:
    """The file system of `url` and the path in it."""
    import fsspec

    system, root = fsspec.core.url_to_fs(url)
    return system, str(root).rstrip("/")


def _revision(listing: dict[str, dict[str, Any]]) -> str:
    whole = hashlib.sha256()
    for name in sorted(listing):
        facts = listing[name]
        mark = next((facts[key] for key in ("ETag", "etag", "md5Hash", "mtime", "created") if facts.get(key)), "")
        whole.update(f"{name}\0{facts['size']}\0{mark}\n".encode())
    return f"listing:{whole.hexdigest()}"


def _time(facts: dict[str, Any]) -> datetime | None:
    for key in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = facts.get(key)
        if isinstance(value, datetime):
            return value.astimezone(UTC)
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC)
    return None


def _refuse(error: Exception) -> NoReturn:
    """Raise `error` as a Refusal where it is the store's doing, else as it is."""
    told = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        raise Refusal(f"nothing there: {told}", "an existing bucket and prefix", "check the URL") from error
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        raise Refusal(
            f"refused: {told}",
            "credentials that may read there",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what the store asks for",
        ) from error
    if isinstance(error, ImportError | ValueError):
        raise Refusal(
            told, "a URL that the installed fsspec opens", "mend it, or install the package it names"
        ) from error
    if isinstance(error, OSError) or type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
        raise Refusal(
            f"the store cannot be reached or broke off: {type(error).__name__}: {told}",
            "an answer of the store",
            "check the network and AWS_ENDPOINT_URL",
            transient=True,
        ) from error
    raise error
