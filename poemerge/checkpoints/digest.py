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


def folder_files(path: Path) -> list[Path]:
    """The files in a folder and the folders below, in order; names beginning with a dot and *.partial are left out."""
    path = path.absolute()
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and "/." not in _below(path, file) and not file.name.endswith(".partial")
    )


def folder_digest(path: Path) -> str:
    """sha256 over the folder's sorted lines "relative path, NUL, sha256 of the file, newline", in hexadecimal.

    Of the files of `folder_files`, source.json at the top is left out: it records this digest.
    """
    files = sorted((_below(path.absolute(), file)[1:], file) for file in folder_files(path))
    lines = (f"{name}\0{file_digest(file)}\n" for name, file in files if name != "source.json")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _below(path: Path, file: Path) -> str:
    """ "/name" or "/folder/name" of what lies below `path`, which may be remote."""
    return str(file)[len(str(path)) :]
