"""Digests of files and folders: the identity of every input and output."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["file_digest", "folder_digest"]

_CHUNK = 1 << 22


def file_digest(path: Path) -> str:
    """sha256 of the bytes of the file `path`, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_digest(path: Path) -> str:
    """sha256 over the folder's sorted lines "relative path, NUL, sha256 of the file, newline", in hexadecimal.

    source.json at the top is left out (it records this digest), and so are names beginning with a dot and *.partial.
    """
    files = sorted(
        (file.relative_to(path).as_posix(), file)
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and not file.name.endswith(".partial")
    )
    lines = (f"{name}\0{file_digest(file)}\n" for name, file in files if name != "source.json")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
