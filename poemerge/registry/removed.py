"""What is still known of versions that were removed: a poisoned expert must be found in them too, for they may be in
use somewhere."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from poemerge.registry.journal import Journal, Line, whoami
from poemerge.registry.versions import Version

__all__ = ["keep_record", "removed_versions"]

FOLDER = "removed"


def keep_record(journal: Journal, version: Version) -> None:
    """Keeps the tags of `version` (digest, base, experts with their revisions, scores, gates) with the log of
    decisions, and writes into the log that it is removed. Repeated, it writes once."""
    if any(line.action == "removed" and line.version == version.version for line in journal.lines()):
        return
    journal.client.log_dict(journal.run_id, asdict(version), f"{FOLDER}/{version.version}.json")
    journal.add(Line("removed", version.version, whoami(), "an old candidate", facts={"digest": version.digest}))


def removed_versions(journal: Journal) -> list[Version]:
    """The versions that were removed, newest first, without aliases."""
    if not any(line.action == "removed" for line in journal.lines()):
        return []
    with tempfile.TemporaryDirectory(prefix="poemerge-") as scratch:
        folder = Path(journal.client.download_artifacts(journal.run_id, FOLDER, scratch))
        found = [Version(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    return sorted((replace(version, aliases=()) for version in found), key=lambda version: -int(version.version))
