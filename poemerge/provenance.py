"""Where a result comes from: the code (git), the data and its digests (dvc.lock, source.json), the libraries, the
device.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from poemerge.errors import Problem, ProjectError
from poemerge.project import Project

__all__ = ["Code", "Origin", "code_of", "code_patch", "file_sha256", "library_versions", "origin_of", "origins"]

LIBRARIES = ("poemerge", "torch", "safetensors", "transformers", "numpy", "scipy", "mlflow", "dvc", "prefect")
RECORDED_WHOLE = {"params.yaml", "dvc.lock", "sources.lock"}
"""Files that a registered version carries as they were, so a change in them does not make the code a different one."""


@dataclass(frozen=True)
class Code:
    """The state of the checkout: its `commit` (None without git), the `changed` paths that differ from it, and whether
    any does (`dirty`). params.yaml, dvc.lock and sources.lock do not count: they are recorded whole."""

    commit: str | None
    changed: tuple[str, ...] = ()

    @property
    def dirty(self) -> bool:
        return bool(self.changed)


@dataclass(frozen=True)
class Origin:
    """What data/…/source.json says of one input: its source, the resolved revision, the digest of its files."""

    source: str
    revision: str | None
    digest: str
    license: str | None = None


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints, or None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def code_of(root: Path) -> Code:
    """The commit that the checkout at `root` stands on, and which of its files differ from it, untracked ones too."""
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return Code(None)
    status = _git(root, "status", "--porcelain", "--untracked-files=all", "-z", "--", ".") or ""
    names = sorted(entry[3:] for entry in status.split("\0") if len(entry) > 3 and entry[2] == " ")
    return Code(commit.strip(), tuple(name for name in names if Path(name).name not in RECORDED_WHOLE))


def code_patch(root: Path) -> str:
    """The tracked files' differences from the commit as a patch that `git apply` takes; empty when there are none."""
    skip = [f":(exclude){name}" for name in sorted(RECORDED_WHOLE)]
    return _git(root, "diff", "--binary", "HEAD", "--", ".", *skip) or ""


def file_sha256(path: Path) -> str | None:
    """sha256 of the file, in hexadecimal; None when it does not exist."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def origin_of(folder: Path) -> Origin:
    """What the source.json of a fetched `folder` says.

    Raises ProjectError when there is no readable source.json.
    """
    path = folder / "source.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Origin(known["source"], known.get("revision"), known["digest"], known.get("license"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProjectError(
            str(
                Problem(
                    str(path),
                    got=f"{type(error).__name__}: {error}",
                    expected="source.json with source, revision and digest, as the fetch stage writes it",
                    next_step="run `poemerge run`, which fetches it again",
                    expert=folder.name,
                )
            )
        ) from error


def origins(project: Project) -> dict[str, dict[str, Origin]]:
    """{"base": {"base": …}, "experts": {name: …}, "suites": {name: …}} of everything that fetch brought.

    Raises ProjectError when the source.json of one of them cannot be read.
    """
    suites = sorted(project.suites.iterdir()) if project.suites.is_dir() else []
    return {
        "base": {"base": origin_of(project.base)},
        "experts": {name: origin_of(folder) for name, folder in project.expert_folders().items()},
        "suites": {folder.name: origin_of(folder) for folder in suites if (folder / "source.json").is_file()},
    }


def library_versions() -> dict[str, str]:
    """Versions of Python, the platform and the libraries that decide the bytes of a merge."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
