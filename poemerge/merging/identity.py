"""What tells one set of inputs from another without reading their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poemerge.checkpoints.digest import file_digest, folder_digest, folder_files
from poemerge.checkpoints.remote import as_path
from poemerge.merging.card import licence_of

if TYPE_CHECKING:
    from poemerge.merging.engine import Job

__all__ = ["identity_of", "input_identities", "source_record"]


def source_record(folder: Path, with_digest: bool) -> dict[str, Any]:
    """Where a checkpoint comes from: what its source.json says, else its path; a digest where known or asked for."""
    try:
        found = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    known = found if isinstance(found, dict) else {}
    digest = known.get("digest")
    if digest is None and with_digest:
        digest = folder_digest(folder) if folder.is_dir() else file_digest(folder)
    source = known.get("source") or str(folder)
    return {"source": source, "revision": known.get("revision"), "digest": digest, "license": licence_of(folder)}


def input_identities(job: Job) -> dict[str, Any]:
    """By expert ("" is the base): its recorded digest, else names, sizes and times of its files."""
    return {name: identity_of(as_path(path)) for name, path in [("", job.base), *job.experts.items()]}


def identity_of(folder: Path) -> Any:
    """A checkpoint's recorded digest, else names, sizes and times of its files."""
    digest = source_record(folder, with_digest=False)["digest"]
    if digest is not None:
        return digest
    files = [file for _, file in folder_files(folder)] if folder.is_dir() else [folder]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
