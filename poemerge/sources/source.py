"""What every kind of source can do: say which revision it has now, and bring exactly that revision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from poemerge.sources.contents import Kind
from poemerge.sources.digests import DigestCache

__all__ = ["Brought", "Revision", "Source", "Workplace"]


@dataclass(frozen=True)
class Workplace:
    """What a source needs to know of the project: its root, its digests, and where its MLflow is."""

    root: Path
    digests: DigestCache
    tracking_uri: str


@dataclass(frozen=True)
class Revision:
    """An immutable name of what a source holds; `digest` where it is known before anything is brought."""

    name: str
    digest: str | None = None


@dataclass(frozen=True)
class Brought:
    """SHA-256 of each file brought by relative path; `time` is when the source last changed (ISO 8601, UTC)."""

    files: dict[str, str]
    time: str | None


class Source(Protocol):
    """A place one checkpoint, or one suite's data, comes from. Refusal is all that its methods raise on purpose."""

    @property
    def remote(self) -> bool:
        """Whether the network is involved, so that trying again may help."""

    def resolve(self, place: Workplace, kind: Kind) -> Revision:
        """The revision that the source has now. Reads no weights over the network; checks what it can see."""

    def bring(self, place: Workplace, kind: Kind, revision: str, into: Path) -> Brought:
        """Write the needed files of `revision` into the new folder `into`, verified by the source's own digests."""
