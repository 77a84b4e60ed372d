"""Safetensors out: sharded, each tensor written at its place as it comes, each file whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from poemerge.checkpoints.checkpoint import INDEX, SINGLE
from poemerge.checkpoints.safetensors_file import dtype_name
from poemerge.errors import PoemergeError
from poemerge.wholefile import write_whole

__all__ = ["Shard", "ShardFile", "plan_shards", "save_tensors", "weights_digest", "write_index"]


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name and its tensors (name, dtype, shape) in the order in which they lie in it."""

    file: str
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.tensors)


def plan_shards(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], max_bytes: int) -> list[Shard]:
    """`tensors` in their order, cut into shards of at most `max_bytes` (a larger tensor gets one of its own)."""
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = []
    room = 0
    for tensor in tensors:
        size = math.prod(tensor[2]) * tensor[1].itemsize
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= size
    if len(groups) <= 1:
        return [Shard(SINGLE, tuple(groups[0] if groups else ()))]
    return [Shard(f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors", tuple(g)) for i, g in enumerate(groups)]


class ShardFile:
    """A shard being written under a temporary name, tensors or blocks of their rows in any order; `finish` names it.

    What comes in the order of the file is hashed on its way. Raises PoemergeError where the disk is full or the folder
    cannot be written.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path = folder / shard.file
        self.shard = shard
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._place: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        at = 0
        for name, dtype, shape in shard.tensors:
            end = at + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [at, end]}
            self._place[name] = (at, dtype, shape)
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._origin = 8 + len(text)
        self._left = at
        self._size = self._origin + at
        self._hash = hashlib.sha256()
        self._hashed = 0
        # A name of its own: two machines may write the same shard when one of them was given up too early.
        self._partial = self.path.with_name(f"{self.path.name}.{os.urandom(4).hex()}.partial")
        self._descriptor = -1
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(self._descriptor, 0, self._size)  # a full disk is told now, not after the work
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
            self._write(len(text).to_bytes(8, "little") + text, 0)
        except OSError as error:
            self.abandon()
            raise _cannot_write(self._partial, error) from error

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        """Put `tensor` (CPU, dtype as planned) at its place: the whole parameter, or its rows from `row` on."""
        start, dtype, shape = self._place[name]
        whole = tuple(tensor.shape) == shape
        if tensor.dtype != dtype or not (whole or (tensor.shape[1:] == shape[1:] and row + len(tensor) <= shape[0])):
            raise ValueError(f"{name}: got {tensor.dtype} {tuple(tensor.shape)} at row {row}, planned {dtype} {shape}")
        if not tensor.numel():
            return
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        at = self._origin + start + row * (math.prod(shape[1:]) * dtype.itemsize)
        try:
            self._write(data, at)
        except OSError as error:
            raise _cannot_write(self._partial, error) from error
        self._left -= len(data)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        if at == self._hashed:
            self._hash.update(view)
            self._hashed += len(view)
        while view:
            count = os.pwrite(self._descriptor, view[: 1 << 30], at)
            view, at = view[count:], at + count

    def finish(self) -> str:
        """Give the file its name and return its sha256; every byte must have been written."""
        if self._left:
            raise ValueError(f"{self.path.name} lacks {self._left} of {self._size} bytes")
        try:
            while self._hashed < self._size:
                piece = os.pread(self._descriptor, 1 << 22, self._hashed)
                self._hash.update(piece)
                self._hashed += len(piece)
            os.close(self._descriptor)
            self._descriptor = -1
            self._partial.replace(self.path)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Close and remove the partial file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._partial.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors` (CPU) to the safetensors file `path`, whole or not at all; returns its sha256."""
    shard = Shard(path.name, tuple((name, value.dtype, tuple(value.shape)) for name, value in sorted(tensors.items())))
    file = ShardFile(path.parent, shard)
    try:
        for name, value in sorted(tensors.items()):
            file.write(name, value)
        return file.finish()
    except BaseException:
        file.abandon()
        raise


def write_index(folder: Path, shards: Sequence[Shard]) -> Path | None:
    """Write the index of `shards`; a single file needs none (None is returned)."""
    if len(shards) == 1:
        return None
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": dict(sorted((name, shard.file) for shard in shards for name, _, _ in shard.tensors)),
    }
    path = folder / INDEX
    write_whole(path, json.dumps(index, indent=2) + "\n")
    return path


def weights_digest(digests: Mapping[str, str]) -> str:
    """sha256 over the sorted lines "file, NUL, sha256, newline": one digest for all weight files of a model."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _cannot_write(path: Path, error: OSError) -> PoemergeError:
    free = {
        errno.ENOSPC: "free space on that disk, or choose another --out",
        errno.EDQUOT: "free space in your quota, or choose another --out",
        errno.EROFS: "choose a folder that can be written",
        errno.EACCES: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
    }
    advice = free.get(error.errno or 0, "look at the disk")
    return PoemergeError(
        f"Cannot write {path}\n  got:      {error.strerror}\n  expected: a disk with room and the right to write\n"
        f"  next:     {advice}; what was finished is kept and the same command goes on"
    )
