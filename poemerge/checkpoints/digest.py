"""Digests of files and folders: the identity of every input and output."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["file_digest", "folder_digest", "folder_files"]

_CHUNK = 1 << 22


def file_digest(path: Path) -> str:
    """sha256 of the bytes of the file `path`, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_files(path: Path) -> list[tuple[str, Path]]:
    """(name below the folder, file) of every file in or below a folder, which may be remote, in order of name.

    Names that begin with a dot, and *.partial, are left out.
    """
    top = path.absolute()
    named = ((str(file)[len(str(top)) + 1 :], file) for file in top.rglob("*") if file.is_file())
    return sorted((name, file) for name, file in named if "/." not in f"/{name}" and not name.endswith(".partial"))


def folder_digest(path: Path) -> str:
    """sha256 over the folder's sorted lines "relative path, NUL, sha256 of the file, newline", in hexadecimal.

    Of the files of `folder_files`, source.json at the top is left out: it records this digest.
    """
    lines = (f"{name}\0{file_digest(file)}\n" for name, file in folder_files(path) if name != "source.json")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
