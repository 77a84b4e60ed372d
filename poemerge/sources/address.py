"""How params.yaml spells a source, and which class reads it."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from poemerge.sources.folder import FolderSource
from poemerge.sources.hub import HubSource
from poemerge.sources.refusal import Refusal
from poemerge.sources.registered import RegisteredSource
from poemerge.sources.source import Source
from poemerge.sources.store import StoreSource

__all__ = ["is_remote", "parse", "with_revision"]

SPELLINGS = "a folder, hf://owner/name[@revision], models:/NAME@alias, models:/NAME/VERSION or a URL that fsspec opens"
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")
REGISTERED = re.compile(r"models:/(?P<name>[^/@:*]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")
HUB = re.compile(r"hf://(?P<datasets>datasets/)?(?P<path>[\w.-]+(?:/[\w.-]+)*)(?:@(?P<revision>[^@\s?]+))?")


def with_revision(source: str, revision: str | None) -> str:
    """`source` with the key `revision` of params.yaml written into it, so that one string says all.

    Raises Refusal when the source cannot have one, or says another already.
    """
    if revision is None:
        return source
    if not source.startswith("hf://"):
        raise Refusal(
            f"revision {revision!r} with {source}",
            "a revision only with hf:// (models:/ names its version, a folder's revision is what it holds)",
            "remove the key `revision`",
        )
    if "@" in source and source.rsplit("@", 1)[1] != revision:
        raise Refusal(f"{source} and revision {revision!r}", "one revision", "remove one of the two")
    return source if "@" in source else f"{source}@{revision}"


def is_remote(source: str) -> bool:
    """Whether `source` is spelt as a place that only a network or a server can answer for."""
    return ("://" in source and not source.startswith("file://")) or source.startswith("models:")


def parse(source: str) -> Source:
    """The source that `source` spells. Raises Refusal when it is none."""
    if source.startswith("hf://"):
        return _hub(source)
    if source.startswith("models:"):
        return _registered(source)
    if source.startswith("file://"):
        return FolderSource(unquote(urlsplit(source).path))
    if "://" in source:
        return _store(source)
    if SCHEME.match(source):
        raise Refusal(source, SPELLINGS, "mend the address: a scheme ends with ://")
    return FolderSource(source)


def _registered(source: str) -> RegisteredSource:
    match = REGISTERED.fullmatch(source)
    if match is None:
        next_step = "a pattern names a collection: move it under `collections`" if "*" in source else "mend the address"
        raise Refusal(source, "models:/NAME@alias or models:/NAME/VERSION", next_step)
    return RegisteredSource(match["name"], alias=match["alias"], version=match["version"])


def _store(source: str) -> StoreSource:
    from fsspec import available_protocols

    scheme = source.split("://", 1)[0].split("::")[0]
    if scheme not in available_protocols():
        raise Refusal(source, SPELLINGS, f"mend the address: fsspec knows no {scheme}://")
    return StoreSource(source.rstrip("/"))


def _hub(source: str) -> HubSource:
    match = HUB.fullmatch(source)
    if match is None:
        next_step = "a query names a collection: move it under `collections`" if "?" in source else "mend the address"
        raise Refusal(source, "hf://owner/name[@revision] or hf://datasets/owner/name[@revision]", next_step)
    parts = match["path"].split("/")
    return HubSource(
        repo_id="/".join(parts[:2]),
        repo_type="dataset" if match["datasets"] else "model",
        folder="/".join(parts[2:]),
        revision=match["revision"] or "main",
    )
