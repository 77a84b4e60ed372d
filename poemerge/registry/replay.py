"""What a replay needs from the registry, and how close its outcome is to what was registered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poemerge.checkpoints import Checkpoint
from poemerge.errors import RegistryError
from poemerge.project import Project
from poemerge.provenance import library_versions
from poemerge.registry.evidence import model_folder
from poemerge.registry.lineage import LINEAGE_FILE, run_json
from poemerge.registry.tracking import connect, speaking, tracking_uri
from poemerge.registry.versions import Version, find_version

__all__ = ["Comparison", "Recipe", "compare", "recipe"]

CLOSE = 1e-4
"""Relative difference up to which two devices agree; a replay on the same device must be identical."""


@dataclass(frozen=True)
class Recipe:
    """How a version was made: its lineage `document`, and a folder of the `files` as they were (params.yaml, dvc.yaml,
    dvc.lock, sources.lock, code.patch where the code differed from its commit)."""

    version: Version
    document: dict[str, Any]
    files: Path


@dataclass(frozen=True)
class Comparison:
    """`identical` digests, or the largest difference of an entry, over the largest entry of its tensor (`relative`),
    and the `tensor` it is in; what differs between then and now (`changed`: device, libraries) may explain it.
    """

    registered: str
    replayed: str
    relative: float
    tensor: str | None
    changed: dict[str, tuple[Any, Any]]

    @property
    def identical(self) -> bool:
        """Whether the bytes are the same."""
        return self.registered == self.replayed

    @property
    def reproduced(self) -> bool:
        """Identical; or close, where another device or library explains that it is no more than that."""
        return self.identical or (bool(self.changed) and self.relative <= CLOSE)


def recipe(project: Project, wanted: str, into: Path) -> Recipe:
    """The recipe of the version `wanted`, downloaded into the folder `into`. Raises RegistryError without one."""
    with speaking(tracking_uri(project)):
        client = connect(project)
        version = find_version(client, project.load_params().register_.model, wanted)
        document = run_json(client, version.run_id, LINEAGE_FILE)
        files = Path(client.download_artifacts(version.run_id, "project", str(into)))
    missing = [name for name in ("params.yaml", "dvc.yaml", "dvc.lock") if not (files / name).is_file()]
    if missing:
        raise RegistryError(
            f"Version {version.version} cannot be replayed.\n  got:      no {', '.join(missing)} kept with its run\n"
            "  expected: the project's files as they were\n  next:     `poemerge lineage` tells what is known of it"
        )
    return Recipe(version, document, files)


def compare(project: Project, made: Recipe, folder: Path) -> Comparison:
    """What the replay in `folder` made, against what is registered; tensors are read only where the digests differ."""
    record = json.loads((folder / "merge.json").read_text(encoding="utf-8"))
    document = made.document
    then = {"device": document["device"], **document["versions"]}
    now = {"device": record["device"], **library_versions()}
    # Of the libraries those count that touch the numbers.
    counted = ("device", "python", "torch", "numpy", "scipy", "safetensors")
    changed = {key: (then.get(key), now.get(key)) for key in counted if then.get(key) != now.get(key)}
    if record["digest"] == document["digest"]:
        return Comparison(document["digest"], record["digest"], 0.0, None, changed)
    with speaking(tracking_uri(project)):
        connect(project)
        registered = model_folder(made.version)
    relative, tensor = _largest_difference(registered, folder)
    return Comparison(document["digest"], record["digest"], relative, tensor, changed)


def _largest_difference(one: Path, other: Path) -> tuple[float, str | None]:
    """The largest difference of an entry over the largest entry of its tensor, and the tensor; one pair in memory."""
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    try:
        if set(first.names()) != set(second.names()):
            return float("inf"), sorted(set(first.names()) ^ set(second.names()))[0]
        worst: tuple[float, str | None] = (0.0, None)
        for name in first.names():
            a, b = first.read(name).double(), second.read(name).double()
            if a.shape != b.shape:
                return float("inf"), name
            top = float(a.abs().max()) if a.numel() else 0.0
            difference = float((a - b).abs().max()) / top if top else float((a - b).abs().max() if a.numel() else 0.0)
            if difference > worst[0]:
                worst = (difference, name)
        return worst
    finally:
        first.close()
        second.close()
