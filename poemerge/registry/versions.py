"""Registered versions as they stand: digest, aliases, scores, experts, verdicts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from poemerge.errors import RegistryError

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "PREVIOUS",
    "SKIPPED",
    "Version",
    "alias_version",
    "find_version",
    "list_versions",
    "with_identity",
]

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
SKIPPED = "poemerge.skipped."
"""Beginning of the tags that name the experts which fetch skipped."""
PAGE = 200


@dataclass(frozen=True)
class Version:
    """One registered version: its number (text, as MLflow has it), the run it came from, its aliases and tags."""

    model: str
    version: str
    run_id: str
    model_id: str | None
    aliases: tuple[str, ...]
    created: int
    tags: dict[str, str]

    @property
    def digest(self) -> str:
        """The digest of the merged weight files."""
        return self.tags.get("poemerge.digest", "")

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """{name: {source, revision, digest, license}} of what was merged."""
        prefix = "poemerge.expert."
        return {
            key[len(prefix) :]: json.loads(value) for key, value in sorted(self.tags.items()) if key.startswith(prefix)
        }

    @property
    def base(self) -> dict[str, Any]:
        """{source, revision, digest, license} of the base."""
        return dict(json.loads(self.tags.get("poemerge.base", "{}")))

    @property
    def skipped(self) -> dict[str, dict[str, Any]]:
        """{name: {keeps, reason}} of the experts that could not be had when this was last registered: each stands at
        the revision it `keeps`, or (None) is left out."""
        return {
            key[len(SKIPPED) :]: json.loads(value)
            for key, value in sorted(self.tags.items())
            if key.startswith(SKIPPED)
        }

    @property
    def mean(self) -> dict[str, float]:
        """{base, expert, merged, normalised}: means over the suites; {} where nothing was scored."""
        return dict(json.loads(self.tags.get("poemerge.mean", "{}")))

    @property
    def gates(self) -> dict[str, str]:
        """{gate: "verdict: reason"} as last judged."""
        prefix = "poemerge.gate."
        return {key[len(prefix) :]: value for key, value in sorted(self.tags.items()) if key.startswith(prefix)}

    def to_json(self) -> dict[str, Any]:
        """What `poemerge models --json` prints of it."""
        return {
            "version": int(self.version),
            "aliases": list(self.aliases),
            "digest": self.digest,
            "method": self.tags.get("poemerge.method"),
            "accuracy": self.mean.get("merged"),
            "normalised": self.mean.get("normalised"),
            "mean": self.mean,
            "experts": self.experts,
            "skipped": self.skipped,
            "gates": self.gates,
            "run_id": self.run_id,
            "created": self.created,
        }


def list_versions(client: MlflowClient, model: str, where: str = "") -> list[Version]:
    """All versions of `model`, newest first; [] where there is no such model. `where` is a further MLflow filter."""
    try:
        aliases = client.get_registered_model(model).aliases
    except MlflowException as error:
        if error.get_http_status_code() == 404:
            return []
        raise
    found: list[Version] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(
            f"name = '{model}'" + (f" AND {where}" if where else ""),
            max_results=PAGE,
            order_by=["version_number DESC"],
            page_token=token,
        )
        found += [_version(item, aliases) for item in page]
        token = page.token
        if not token:
            return sorted(found, key=lambda item: -int(item.version))


def with_identity(client: MlflowClient, model: str, identity: str) -> Version | None:
    """The first version of `model` with these weights and heads (lineage.identity), or None."""
    found = list_versions(client, model, f"tags.`poemerge.identity` = '{identity}'")
    return found[-1] if found else None


def alias_version(client: MlflowClient, model: str, alias: str) -> str | None:
    """The version that `alias` stands on, or None."""
    try:
        version = client.get_registered_model(model).aliases.get(alias)
    except MlflowException as error:
        if error.get_http_status_code() == 404:
            return None
        raise
    return None if version is None else str(version)


def find_version(client: MlflowClient, model: str, wanted: str) -> Version:
    """The version that `wanted` names: a number (3, v3), an alias, or the beginning of a digest (8 characters or more).

    Raises RegistryError listing what there is.
    """
    known = list_versions(client, model)
    number = wanted.removeprefix("v")
    for item in known:
        if item.version == number or wanted in item.aliases:
            return item
    by_digest = [item for item in known if len(wanted) >= 8 and item.digest.startswith(wanted)]
    if len(by_digest) == 1:
        return by_digest[0]
    there = ", ".join(f"{item.version}{''.join(f' ({alias})' for alias in item.aliases)}" for item in known[:20])
    raise RegistryError(
        f"No such version of {model}.\n  got:      {wanted}\n  expected: one of {there or '(none is registered yet)'}\n"
        f"  next:     {'`poemerge models` lists them' if known else '`poemerge run` registers the first one'}"
    )


def _version(item: Any, aliases: dict[str, Any]) -> Version:
    mine = tuple(sorted(alias for alias, version in aliases.items() if str(version) == str(item.version)))
    return Version(
        item.name, str(item.version), item.run_id, item.model_id, mine, int(item.creation_timestamp), dict(item.tags)
    )
