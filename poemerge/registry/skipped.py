"""Experts that fetch skipped (`fetch.on_bad_expert: skip`), told by the registered version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient

from poemerge.project import Project
from poemerge.registry.versions import SKIPPED, Version

__all__ = ["skipped_experts", "skipped_tags", "tell_skipped"]

LONGEST_REASON = 1_000


def skipped_experts(project: Project) -> dict[str, dict[str, Any]]:
    """By expert that fetch skipped last: the revision that it `keeps` (None: it is left out) and the `reason`."""
    report = project.stage_report("fetch")
    if not report.is_file():
        return {}
    return {
        row["name"]: {"keeps": row["revision"], "reason": row["reason"]}
        for row in json.loads(report.read_text(encoding="utf-8"))["table"]
        if row["state"] == "skipped"
    }


def skipped_tags(skipped: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The tags of a version that tell what `skipped_experts` says, one an expert."""
    return {
        SKIPPED + name: json.dumps({**facts, "reason": facts["reason"][:LONGEST_REASON]}, ensure_ascii=False)
        for name, facts in skipped.items()
    }


def tell_skipped(client: MlflowClient, version: Version, skipped: Mapping[str, Mapping[str, Any]]) -> None:
    """Bring the tags of an earlier version up to date: with an expert skipped at its last good revision the merged
    bytes are those of before."""
    tags = skipped_tags(skipped)
    for key, value in tags.items():
        client.set_model_version_tag(version.model, version.version, key, value)
    for name in version.skipped:
        if SKIPPED + name not in tags:
            client.delete_model_version_tag(version.model, version.version, SKIPPED + name)
