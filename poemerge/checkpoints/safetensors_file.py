"""One safetensors file, read with pread: the header is checked before anything is allocated, nothing is mapped.

Memory-mapped pages count as resident memory, so a merge that maps its inputs looks (and to a memory limit is) as large
as they are; pread into a buffer of our own does not. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoints.remote import RemotePath
from poemerge.errors import CheckpointError, Problem

__all__ = ["DTYPES", "FLOATS", "HEADER_LIMIT", "SafetensorsFile", "TensorEntry", "dtype_name"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""What can be merged; other dtypes are carried from the base as they are."""

HEADER_LIMIT = 100_000_000
"""The safetensors library's own limit on the header, in bytes."""

_READ_CHUNK = 1 << 30
_REMOTE_CHUNK = 1 << 26
_ADVICE = "fetch or write the file again: it is truncated or damaged"
_TOLD = 3
"""A truncated file makes a problem of every tensor behind the cut: so many are told, the others counted."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name that a safetensors header uses for `dtype`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file: `start` and `end` are byte offsets from the file's beginning."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class SafetensorsFile:
    """The tensors of one safetensors file, by name, each read on demand into memory of its own.

    `entries` is in order of position in the file. Reading is safe from several threads.
    """

    def __init__(self, path: Path, entries: dict[str, TensorEntry], metadata: dict[str, str]) -> None:
        self.path = path
        self.entries = entries
        self.metadata = metadata
        self._descriptor: int | None = None

    @staticmethod
    def open(path: Path, expert: str | None = None) -> SafetensorsFile:
        """The file `path`, its header read and checked; `expert` names it in messages.

        Raises CheckpointError with every problem of the header.
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as handle:
                prefix = handle.read(8)
                length = int.from_bytes(prefix, "little")
                text = handle.read(length) if 0 < length <= min(HEADER_LIMIT, size - 8) else b""
        except OSError as error:
            raise CheckpointError(
                Problem(
                    str(path),
                    error.strerror or str(error),
                    "a readable safetensors file",
                    "check path and rights",
                    expert,
                )
            ) from error
        if size < 8 or not text:
            raise CheckpointError(
                Problem(
                    str(path),
                    f"a file of {size} bytes whose header should have {length if size >= 8 else '?'} bytes",
                    f"a safetensors header of at most {HEADER_LIMIT} bytes that lies inside the file",
                    "fetch the file again; it is truncated or no safetensors file",
                    expert,
                )
            )
        entries, metadata, problems = _parse(path, text, size - 8 - len(text), 8 + len(text), expert)
        if problems:
            raise CheckpointError(problems)
        return SafetensorsFile(path, entries, metadata)

    def read(self, name: str, rows: slice | None = None, pin: bool = False) -> Tensor:
        """The tensor `name`, or the given `rows` (contiguous, along the first axis) of it, in its stored dtype.

        `pin` puts it into page-locked memory, from which a CUDA device copies without waiting.

        Raises CheckpointError when the file ends early (it was cut since it was opened).
        """
        entry = self.entries[name]
        if rows is None:
            start, shape = entry.start, entry.shape
        else:
            first, last, _ = rows.indices(entry.shape[0])
            row = entry.nbytes // max(entry.shape[0], 1)
            start, shape = entry.start + first * row, (max(last - first, 0), *entry.shape[1:])
        out = torch.empty(shape, dtype=entry.dtype, pin_memory=pin)
        self._fill(name, out, start)
        return out

    def _fill(self, name: str, out: Tensor, start: int) -> None:
        if not out.numel():
            return
        place: Any = self.path
        if isinstance(place, RemotePath):
            self._fill_remotely(place, name, out, start)
            return
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        buffer = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(buffer):
            count = os.preadv(self._descriptor, [buffer[done : done + _READ_CHUNK]], start + done)
            if count == 0:
                raise self._ended(name, done, len(buffer))
            done += count

    def _fill_remotely(self, path: RemotePath, name: str, out: Tensor, start: int) -> None:
        buffer = memoryview(out.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for first in range(0, len(buffer), _REMOTE_CHUNK):
            size = min(_REMOTE_CHUNK, len(buffer) - first)
            data = path.read_range(start + first, start + first + size)
            if len(data) != size:
                raise self._ended(name, first + len(data), len(buffer))
            buffer[first : first + size] = data

    def _ended(self, name: str, done: int, size: int) -> CheckpointError:
        return CheckpointError(
            Problem(
                str(self.path),
                f"the end of the file after {done} of {size} bytes",
                "the whole tensor, as when the file was opened",
                "do not write to inputs during a merge; fetch the file again",
                tensor=name,
            )
        )

    def close(self) -> None:
        """Give the file descriptor back; a later read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


class _TwiceError(ValueError):
    """A JSON object holds one key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [key for key, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return result


def load_json(path: Path, text: bytes, expert: str | None) -> dict[str, Any]:
    """The JSON object in `text`; raises CheckpointError for anything else, keys that stand twice included."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise CheckpointError(
            Problem(str(path), "this name twice", "each name once", "fetch or write the file again", expert, str(error))
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            Problem(str(path), f"no JSON: {str(error)[:200]}", "a JSON object", "fetch the file again", expert)
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            Problem(str(path), f"a JSON {type(value).__name__}", "a JSON object", "fetch the file again", expert)
        )
    return value


def _parse(
    path: Path, text: bytes, room: int, origin: int, expert: str | None
) -> tuple[dict[str, TensorEntry], dict[str, str], list[Problem]]:
    """Entries by name in order of position, metadata, and what is wrong with the header; `room` is the data's size."""
    raw = load_json(path, text, expert)
    metadata = raw.pop("__metadata__", {})
    problems = list(_metadata_problems(path, metadata, expert))
    entries: list[TensorEntry] = []
    for name, value in raw.items():
        found = _entry(name, value, room, origin)
        if isinstance(found, TensorEntry):
            entries.append(found)
        else:
            got, expected = found
            problems.append(Problem(str(path), got, expected, _ADVICE, expert, name))
    entries.sort(key=lambda entry: (entry.start, entry.end))
    at = origin
    for entry in entries if not problems else ():
        if entry.start != at:
            kind = "overlapping" if entry.start < at else "a gap before"
            problems.append(
                Problem(
                    str(path),
                    f"{kind} the bytes at {entry.start - origin}",
                    "tensors one after the other, each byte once",
                    _ADVICE,
                    expert,
                    entry.name,
                )
            )
        at = max(at, entry.end)
    if not problems and at != origin + room:
        problems.append(
            Problem(
                str(path),
                f"{room} bytes of data",
                f"{at - origin} bytes, what the header describes",
                "fetch the file again; it is truncated or has something appended",
                expert,
            )
        )
    if len(problems) > _TOLD:
        more = f"{len(problems) - _TOLD} further tensors of this file are wrong too"
        problems = [*problems[:_TOLD], Problem(str(path), more, "none", _ADVICE, expert)]
    return {entry.name: entry for entry in entries}, metadata, problems


def _metadata_problems(path: Path, metadata: object, expert: str | None) -> Iterator[Problem]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        yield Problem(
            str(path), "__metadata__ that is not text to text", "text to text", "fetch or write the file again", expert
        )


def _entry(name: str, value: object, room: int, origin: int) -> TensorEntry | tuple[str, str]:
    """The entry that a header's `value` describes, or (got, expected) where it describes none."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return f"{str(value)[:80]}", "dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {str(dtype)[:40]}", f"one of {', '.join(DTYPES)}"
    if not _counts(shape) or len(shape) > 8:
        return f"shape {str(shape)[:80]}", "at most 8 counts, none negative"
    if not _counts(offsets) or len(offsets) != 2:
        return f"data_offsets {str(offsets)[:80]}", "two counts, none negative"
    start, end = offsets
    need = math.prod(shape) * DTYPES[dtype].itemsize
    if not start <= end <= room:
        return f"bytes {start} to {end}", f"a range inside the file's {room} bytes of data"
    if end - start != need:
        return f"{end - start} bytes for shape {tuple(shape)} of {dtype}", f"{need} bytes"
    return TensorEntry(name, DTYPES[dtype], tuple(shape), origin + start, origin + end)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
