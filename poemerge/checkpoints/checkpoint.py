"""A checkpoint folder: one safetensors file, or shards with an index, as one set of named tensors read lazily."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poemerge.checkpoints.remote import as_path
from poemerge.checkpoints.safetensors_file import SafetensorsFile, load_json
from poemerge.errors import CheckpointError, Problem

__all__ = ["HEAD", "INDEX", "PICKLES", "SINGLE", "Checkpoint", "model_config"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "head.safetensors"
"""Private tensors that a task model keeps beside its weights."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX_LIMIT = 100_000_000


class Checkpoint:
    """Named tensors in one or more safetensors files.

    Reading copies one tensor into memory of its own; nothing is mapped and nothing is cached.
    """

    def __init__(self, path: Path, files: list[SafetensorsFile]) -> None:
        self.path = path
        self.files = files
        self._file = {name: file for file in files for name in file.entries}

    @staticmethod
    def open(path: Path, expert: str | None = None) -> Checkpoint:
        """The checkpoint at `path`: a folder (model.safetensors, or shards with an index) or one safetensors file.

        Every header is read and checked, no tensor is. Raises CheckpointError with every problem found: pickles,
        missing or truncated files, an index that names files outside the folder or disagrees with them.
        """
        path = as_path(path)
        if path.is_file():
            if path.suffix in PICKLES:
                raise CheckpointError(_pickle(path, [path], expert))
            return Checkpoint(path, [SafetensorsFile.open(path, expert)])
        if not path.is_dir():
            raise CheckpointError(
                Problem(str(path), "no such folder", "a folder with safetensors weights", "check the path", expert)
            )
        # As transformers does: an index beside a single file is a stale one.
        if (path / SINGLE).is_file():
            return Checkpoint(path, [SafetensorsFile.open(path / SINGLE, expert)])
        if (path / INDEX).is_file():
            return Checkpoint(path, _open_shards(path, expert))
        found = sorted(p for p in path.glob("*.safetensors") if p.name not in {HEAD, "adapter_model.safetensors"})
        if len(found) == 1 and "-of-" not in found[0].name:
            return Checkpoint(path, [SafetensorsFile.open(found[0], expert)])
        pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES and p.name != "training_args.bin")
        if pickles and not found:
            raise CheckpointError(_pickle(path, pickles, expert))
        raise CheckpointError(
            Problem(
                str(path),
                f"{len(found)} safetensors files without {INDEX}" if found else "no safetensors file",
                f"{SINGLE}, or shards with {INDEX}",
                "save the model with save_pretrained, or fetch the whole folder again",
                expert,
            )
        )

    def names(self) -> list[str]:
        """Names of all tensors, in the order in which they lie in the files."""
        return list(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __len__(self) -> int:
        return len(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""
        return self._file[name].entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of the tensor `name`."""
        return self._file[name].entries[name].dtype

    def nbytes(self, name: str) -> int:
        """Stored size of the tensor `name`, in bytes."""
        return self._file[name].entries[name].nbytes

    def file(self, name: str) -> SafetensorsFile:
        """The file that the tensor `name` lies in."""
        return self._file[name]

    def read(self, name: str, rows: slice | None = None, pin: bool = False) -> Tensor:
        """The tensor `name` (or some `rows` of it) on the CPU, in its stored dtype; a copy that the caller owns."""
        return self._file[name].read(name, rows, pin)

    def total_bytes(self, names: Iterable[str] | None = None) -> int:
        """Stored size of the tensors `names` (default: all), in bytes."""
        return sum(self.nbytes(name) for name in (self._file if names is None else names))

    def close(self) -> None:
        """Give the file descriptors back."""
        for file in self.files:
            file.close()


def model_config(path: Path) -> dict[str, Any]:
    """config.json of the folder `path`, or an empty mapping where it has none that can be read."""
    try:
        value = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _pickle(path: Path, files: list[Path], expert: str | None) -> Problem:
    folder = path if path.is_dir() else path.parent
    return Problem(
        str(path),
        f"pickled weights only: {', '.join(file.name for file in files)}",
        "safetensors (a pickle can run any code when it is read)",
        'convert it in an environment you trust: python -c "from transformers import AutoModel; '
        f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"",
        expert,
    )


def _open_shards(path: Path, expert: str | None) -> list[SafetensorsFile]:
    """The shards that the folder's index names, in order of name; raises CheckpointError with every problem."""
    index = path / INDEX
    try:
        if index.stat().st_size > _INDEX_LIMIT:
            raise CheckpointError(
                Problem(str(index), "more than 100 MB", "an index of names", "fetch the folder again", expert)
            )
        text = index.read_bytes()
    except OSError as error:
        raise CheckpointError(
            Problem(str(index), error.strerror or str(error), "a readable index", "check path and rights", expert)
        ) from error
    weight_map = load_json(index, text, expert).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            Problem(str(index), "no weight_map", "a weight_map of tensor to file", "fetch the folder again", expert)
        )
    problems: list[Problem] = []
    wanted: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file and "\\" not in file
        if plain and "\0" not in file:
            wanted.setdefault(file, set()).add(tensor)
        else:
            problems.append(
                Problem(
                    str(index),
                    f"file {str(file)[:120]!r}",
                    "the plain name of a .safetensors file in the same folder",
                    "do not use this checkpoint before you know who wrote its index",
                    expert,
                    tensor,
                )
            )
    files = []
    for name in sorted(wanted):
        try:
            file = SafetensorsFile.open(path / name, expert)
        except CheckpointError as error:
            problems += error.problems
            continue
        files.append(file)
        for tensor in sorted(wanted[name] - set(file.entries)):
            problems.append(
                Problem(
                    str(path / name),
                    "no such tensor",
                    f"{INDEX} says it is here",
                    "fetch the folder again",
                    expert,
                    tensor,
                )
            )
        for tensor in sorted(set(file.entries) - wanted[name]):
            problems.append(
                Problem(
                    str(path / name),
                    "a tensor that the index does not place here",
                    "shards and index that agree",
                    "fetch the folder again",
                    expert,
                    tensor,
                )
            )
    if problems:
        raise CheckpointError(problems)
    return files
