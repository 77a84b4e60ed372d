"""A registered version as a Hugging Face folder with its model card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from mlflow.exceptions import MlflowException

from poemerge.checkpoints import model_config
from poemerge.errors import BadInputError, Problem
from poemerge.merging.card import model_card
from poemerge.project import Project
from poemerge.registry.evidence import model_folder
from poemerge.registry.lineage import chain, run_json
from poemerge.registry.tracking import connect, speaking, tracking_uri
from poemerge.registry.versions import Version, find_version

__all__ = ["export"]


def export(project: Project, wanted: str, out: Path, name: str | None = None) -> Version:
    """Writes the version `wanted` (number, alias, digest) to the new folder `out`: the merged folder, lineage.json,
    and a model card README.md titled `name` (default: the folder's) with the sources, the scores and the digest.

    Raises BadInputError when `out` holds something already, RegistryError when there is no such version.
    """
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise BadInputError(
            Problem("--out", got=f"{out}, which is not empty", expected="a new folder", next_step="choose another name")
        )
    with speaking(tracking_uri(project)):
        client = connect(project)
        version = find_version(client, project.load_params().register_.model, wanted)
        document = chain(client, version)
        try:
            evaluation = run_json(client, version.run_id, "evaluation/evaluation.json")
        except MlflowException:
            evaluation = None
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as scratch:
            folder = Path(scratch) / "model"
            shutil.copytree(model_folder(version), folder, copy_function=_copy_writable)
            record = json.loads((folder / "merge.json").read_text(encoding="utf-8"))
            card = model_card(name or out.name, record, model_config(folder), evaluation)
            registered = (
                f"Registered as {version.model} version {version.version}; lineage.json holds where it comes from.\n"
            )
            (folder / "README.md").write_text(f"{card.rstrip()}\n\n{registered}", encoding="utf-8")
            text = json.dumps(document, indent=1, ensure_ascii=False)
            (folder / "lineage.json").write_text(text + "\n", encoding="utf-8")
            if out.is_dir():
                out.rmdir()
            folder.replace(out)
    return version


def _copy_writable(source: str, target: str) -> None:
    """Artifacts linked from DVC's cache are read-only; an export is its owner's to change."""
    shutil.copyfile(source, target)
    os.utime(target)
