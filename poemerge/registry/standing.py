"""Where the version that was registered here stands now: its aliases may have been moved since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.registry.tracking import connect, no_registry, speaking, tracking_uri
from poemerge.registry.versions import CHAMPION, list_versions

__all__ = ["Standing", "standing"]


@dataclass(frozen=True)
class Standing:
    """The aliases of a version, and the model's champion (None: there is none), as the registry has them now; `note`
    says so where it does not, and why.
    """

    aliases: tuple[str, ...]
    champion: int | None
    note: str | None = None


def standing(project: Project, registration: Mapping[str, Any]) -> Standing:
    """How the version of metrics/registration.json, `registration`, stands; where the registry does not answer, how it
    stood when it was registered.
    """
    version, uri = registration["version"], tracking_uri(project)
    try:
        if no_registry(project):
            raise RegistryError(f"There is no {project.mlflow_db}.")
        with speaking(uri):
            versions = list_versions(connect(project), registration["model"])
    except (RegistryError, SQLAlchemyError) as error:
        aliases = tuple(registration["aliases"])
        champion = version if CHAMPION in aliases else registration.get("champion_before")
        return Standing(aliases, champion, f"Not asked, so all this is as it was when it was registered. {error}")
    champion = next((int(item.version) for item in versions if CHAMPION in item.aliases), None)
    for item in versions:
        if int(item.version) == version and item.digest == registration["digest"]:
            return Standing(item.aliases, champion)
    return Standing((), champion, f"{uri} has no version {version} with this digest.")
