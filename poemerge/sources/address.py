"""How params.yaml spells a source, and which class reads it."""

from __future__ import annotations

import re

from poemerge.sources.folder import FolderSource
from poemerge.sources.hub import HubSource
from poemerge.sources.refusal import Refusal
from poemerge.sources.source import Source

__all__ = ["parse", "with_revision"]

SPELLINGS = "a folder, hf://owner/name[@revision], models:/NAME@alias, models:/NAME/VERSION or a URL that fsspec opens"
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


def parse(source: str) -> Source:
    """The source that `source` spells. Raises Refusal when it is none."""
    if source.startswith("hf://"):
        return _hub(source)
    if "://" in source:
        raise Refusal(source, SPELLINGS, "mend the address")
    return FolderSource(source)


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
