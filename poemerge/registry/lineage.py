"""From a registered version back to everything it was made of, and from an input forward to every version that holds
it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from poemerge.checkpoints import file_digest, weights_digest
from poemerge.merging.card import licence_of
from poemerge.params import Params
from poemerge.project import Project
from poemerge.provenance import Origin, code_of, file_sha256, library_versions, origins
from poemerge.registry.journal import Journal
from poemerge.registry.removed import removed_versions
from poemerge.registry.skipped import skipped_experts
from poemerge.registry.versions import Version, list_versions

__all__ = ["chain", "describe", "graph", "recall", "run_json", "weight_shares"]

LINEAGE_FILE = "lineage.json"


def describe(project: Project, params: Params) -> dict[str, Any]:
    """The lineage of what lies in the project now, as it goes into the run: code, params, inputs, selection, device.

    Raises ProjectError when an input's source.json or merge.json is missing.
    """
    merge = json.loads(project.merge_json.read_text(encoding="utf-8"))
    code = code_of(project.root)
    found = origins(project)
    evaluation = _json_or_empty(project.evaluation_json)
    selected = _json_or_empty(project.expert_json)
    given = {name: expert.license for name, expert in params.experts.items()}
    merged_experts = merge.get("experts") or found["experts"]
    return {
        "model": params.register_.model,
        "digest": merge["digest"],
        "identity": identity(project, merge["digest"]),
        "git": {"commit": code.commit, "dirty": code.dirty, "changed": list(code.changed)},
        "dvc_lock_digest": file_sha256(project.dvc_lock),
        "params_digest": file_sha256(project.params_yaml),
        "sources_lock_digest": file_sha256(project.sources_lock),
        "method": merge.get("method", params.merge.method),
        "settings": merge.get("settings", {}),
        "selected": selected,
        "tail_digest": file_sha256(project.tail_json),
        "device": merge.get("device"),
        "dtype": merge.get("dtype"),
        "base": _origin(found["base"]["base"], licence_of(project.base)),
        "experts": {
            name: _origin(found["experts"][name], given.get(name) or licence_of(project.expert(name)))
            for name in merged_experts
            if name in found["experts"]
        },
        "suites": {
            name: {
                **(_origin(found["suites"][name], None) if name in found["suites"] else {}),
                "data_digest": suite.get("data_digest"),
            }
            for name, suite in evaluation.get("suites", {}).items()
        },
        "weight_shares": {
            name: sum(shares) / len(shares) for name, shares in weight_shares(project.ledger).items() if shares
        },
        "skipped": skipped_experts(project),
        "versions": library_versions(),
    }


def identity(project: Project, digest: str) -> str:
    """What makes the merged model the one it is: its weights' `digest` and, where tasks have heads, theirs."""
    heads = {f"heads/{path.name}": file_digest(path) for path in (project.merged / "heads").glob("*.safetensors")}
    return weights_digest({"weights": digest, **heads}) if heads else digest


def weight_shares(ledger: Path) -> dict[str, list[float]]:
    """By expert, its share of the weights in each matrix of the ledger that was merged with weights."""
    shares: dict[str, list[float]] = {}
    if not ledger.is_file():
        return shares
    with ledger.open(encoding="utf-8") as lines:
        for line in lines:
            weights = json.loads(line).get("weights") or {} if line.strip() else {}
            for name, share in weights.items():
                shares.setdefault(name, []).append(float(share))
    return shares


def chain(client: MlflowClient, version: Version) -> dict[str, Any]:
    """The whole lineage of a registered version: what its run recorded, its aliases, and every decision about it."""
    recorded = run_json(client, version.run_id, LINEAGE_FILE)
    journal = Journal.find(client, version.model)
    lines = [] if journal is None else [line for line in journal.lines() if line.version == version.version]
    return {
        **recorded,
        "version": int(version.version),
        "aliases": list(version.aliases),
        "run_id": version.run_id,
        "registered": version.created,
        "skipped": version.skipped,
        "mean": version.mean,
        "gates": version.gates,
        "decisions": [asdict(line) for line in lines],
    }


def recall(client: MlflowClient, model: str, wanted: str) -> list[tuple[Version, list[str]]]:
    """The versions of `model` that hold an input whose revision, digest, source or name begins with `wanted`, newest
    first, each with the names of those inputs (`base` for the base). Those that `poemerge gc` removed come last."""
    found = []
    journal = Journal.find(client, model)
    removed = removed_versions(journal) if journal is not None else []
    for version in [*list_versions(client, model), *removed]:
        inputs = {"base": version.base, **version.experts}
        held = [
            name
            for name, origin in inputs.items()
            if name == wanted
            or origin.get("source") == wanted
            or any(str(origin.get(key) or "").startswith(wanted) for key in ("revision", "digest"))
        ]
        if held:
            found.append((version, held))
    return found


def graph(document: Mapping[str, Any]) -> str:
    """The chain as a Mermaid flowchart, left to right: inputs, merge, version."""

    def quoted(*lines: object) -> str:
        return '"' + "<br/>".join(str(line).replace('"', "'") for line in lines if line) + '"'

    def short(text: object) -> str:
        return str(text)[:12] if text else ""

    def nodes() -> Iterator[str]:
        code = document.get("git", {})
        yield f"code[{quoted('code', short(code.get('commit')), 'changed' if code.get('dirty') else '')}]"
        base = document["base"]
        yield f"base[{quoted('base', base['source'], short(base.get('revision') or base['digest']))}]"
        for number, (name, origin) in enumerate(document["experts"].items()):
            yield f"e{number}[{quoted(name, origin['source'], short(origin.get('revision') or origin['digest']))}]"
        yield f"merge({quoted(document['method'], document.get('device'))})"
        aliases = ", ".join(document["aliases"])
        yield f"model[{quoted(document['model'] + ' ' + str(document['version']), aliases, short(document['digest']))}]"
        for number, (name, suite) in enumerate(document["suites"].items()):
            yield f"s{number}[/{quoted(name, short(suite.get('data_digest')))}/]"
        yield "code --> merge"
        yield "base --> merge"
        for number in range(len(document["experts"])):
            yield f"e{number} --> merge"
        yield "merge --> model"
        for number in range(len(document["suites"])):
            yield f"s{number} -. scored .-> model"

    return "\n".join(["flowchart LR", *(f"  {line}" for line in nodes())])


def run_json(client: MlflowClient, run_id: str, name: str) -> dict[str, Any]:
    """A JSON artifact of a run. Raises MlflowException when it is not there."""
    with tempfile.TemporaryDirectory(prefix="poemerge-") as folder:
        path = Path(client.download_artifacts(run_id, name, folder))
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _origin(origin: Origin, params_license: str | None) -> dict[str, Any]:
    return {**asdict(origin), "license": params_license or origin.license}


def _json_or_empty(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
