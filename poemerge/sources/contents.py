"""Which files of a source are taken, and whether what lies there is a whole checkpoint."""

from __future__ import annotations

import fnmatch
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from poemerge.sources.refusal import Refusal

__all__ = ["Kind", "Refusal", "check_complete", "license_of", "needed", "require_weights"]

Kind = Literal["checkpoint", "data"]

SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*")
WEIGHTS = ("model.safetensors", "model-*.safetensors", "adapter_model*.safetensors", "head.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5")
UNFINISHED = ("*.partial", "*.part", "*.tmp", "*.incomplete", "*.crdownload", "*.filepart", ".*.??????")
"""Names that copying tools give a file until it is whole; the last is rsync's."""

CONVERT = (
    "convert it first: transformers.AutoModel.from_pretrained(SOURCE).save_pretrained(FOLDER, safe_serialization=True)"
)


def needed(paths: Iterable[str], kind: Kind) -> list[str]:
    """Those of the relative `paths` that are taken, sorted.

    Of a checkpoint: the top level's safetensors, JSON, tokenizer and licence files, never pickles; where a repository
    holds its weights twice (`model*.safetensors` beside `consolidated.safetensors`) the former alone. Of a suite's
    data: everything but hidden files, pickles and code.
    """
    visible = [p for p in paths if not any(part.startswith(".") for part in p.split("/")) and p != "source.json"]
    if kind == "data":
        return sorted(p for p in visible if not _any_match(p.rsplit("/", 1)[-1], (*PICKLES, "*.py", *UNFINISHED)))
    top = [p for p in visible if "/" not in p]
    weights = [p for p in top if _any_match(p, WEIGHTS)]
    if all(p == "head.safetensors" for p in weights):
        weights = [p for p in top if p.endswith(".safetensors")]
    return sorted({*weights, *(p for p in top if _any_match(p, SMALL))})


def require_weights(paths: Iterable[str]) -> None:
    """Raise Refusal when the relative `paths` of a source cannot be a checkpoint, before any of them is read."""
    top = sorted(p for p in paths if "/" not in p and not p.startswith("."))
    if not top:
        raise Refusal(
            "no files",
            "a model folder: config.json with *.safetensors, or adapter_config.json with adapter_model.safetensors",
            "check the address, and the sub-folder if the model lies in one",
        )
    if not any(p.endswith(".safetensors") for p in top):
        pickles = [p for p in top if _any_match(p, PICKLES)]
        if pickles:
            raise Refusal(
                f"only pickled weights: {', '.join(pickles[:5])}",
                "weights as safetensors (pickles can run code when they are read)",
                CONVERT,
            )
        raise Refusal(f"no weights; there is {_listing(top)}", "*.safetensors", "check the address")
    if not {"config.json", "adapter_config.json"} & set(top):
        raise Refusal(
            f"neither config.json nor adapter_config.json; there is {_listing(top)}",
            "a Hugging Face model folder or a PEFT adapter",
            "add the configuration the model was saved with",
        )


def check_complete(folder: Path) -> None:
    """Raise Refusal when the checkpoint in `folder` is not one, or is not whole (a copy that has not ended).

    Only headers and sizes are read. A refusal for a copy that has not ended is transient.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    unfinished = sorted(name for name in names if _any_match(name, UNFINISHED))
    if unfinished:
        raise _half_copied(f"an unfinished file: {', '.join(unfinished[:3])}")
    require_weights(names)
    for name in sorted(name for name in names if name.endswith(".json")):
        _check_json(folder / name)
    for name in needed(names, "checkpoint"):
        if name.endswith(".safetensors"):
            _check_safetensors(folder / name)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        missing = sorted({shard for shard in _shards(index) if shard not in names})
        if missing:
            raise _half_copied(f"{index.name} names {', '.join(missing[:3])}, not there")


def license_of(folder: Path) -> str | None:
    """The licence that the model card README.md in `folder` declares in its front matter, or None."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    parts = text.split("---", 2)
    if parts[0].strip() or len(parts) < 3:
        return None
    try:
        card = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    found = (
        card.get("license_name" if card.get("license") == "other" else "license") if isinstance(card, dict) else None
    )
    if isinstance(found, list):
        return ", ".join(map(str, found)) or None
    return str(found) if found else None


def _half_copied(got: str) -> Refusal:
    return Refusal(
        got,
        "a whole checkpoint",
        "wait until the copy has ended, or copy it again; best copy beside it and rename the folder at the end",
        transient=True,
    )


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _half_copied(f"{path.name} is no JSON: {error}") from error


def _check_safetensors(path: Path) -> None:
    """Compare the size of the file with what its header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise _half_copied(f"{path.name} has {size} bytes")
        (length,) = struct.unpack("<Q", head)
        if length > min(size, 100_000_000):
            raise _half_copied(f"{path.name} is cut off or no safetensors file: a header of {length} in {size} bytes")
        try:
            header = json.loads(file.read(length))
            end = max((int(t["data_offsets"][1]) for k, t in header.items() if k != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _half_copied(f"the header of {path.name} cannot be read: {error}") from error
    if size != 8 + length + end:
        raise _half_copied(f"{path.name} has {size} bytes, its header says {8 + length + end}")


def _shards(index: Path) -> Iterator[str]:
    weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
    yield from (str(shard) for shard in weight_map.values())


def _any_match(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _listing(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
