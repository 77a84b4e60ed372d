"""Asking DVC, in this process, what is not up to date."""

from __future__ import annotations

from typing import Any

from poemerge.errors import ProjectError
from poemerge.project import STAGES, Project

__all__ = ["dvc_status"]


def dvc_status(project: Project) -> dict[str, list[Any]]:
    """What `dvc status` says of each of our stages that is not up to date.

    Raises ProjectError when DVC is not initialised here, or busy with a run.
    """
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo(str(project.root)) as repo:
            status: dict[str, list[Any]] = repo.status()
    except NotDvcRepoError as error:
        raise ProjectError(
            f"{project.root} is no DVC repository.\n  got:      no .dvc folder\n  next:     `dvc init` in it"
        ) from error
    except LockError as error:
        raise ProjectError(
            "DVC is busy here.\n  got:      another command holds its lock\n  next:     try again when it has ended"
        ) from error
    except DvcException as error:
        raise ProjectError(
            f"DVC cannot read this project.\n  got:      {error}\n  next:     mend what it names"
        ) from error
    return {name: entries for name, entries in status.items() if name in STAGES}
