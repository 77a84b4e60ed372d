"""What stands beside the weights in a merged folder: config and tokenizer, heads, merge.json, ledger, model card."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from poemerge.checkpoints import ExpertSet, model_config, save_tensors, weights_digest
from poemerge.checkpoints.remote import as_path
from poemerge.merging.card import model_card
from poemerge.merging.engine import Job
from poemerge.merging.identity import source_record
from poemerge.merging.plan import Plan
from poemerge.merging.staging import Staging
from poemerge.provenance import library_versions

__all__ = ["write_companions"]

_OURS = {"source.json", "merge.json", "expert.json", "adapter_config.json"}
_COPIED = {".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken", ".codes"}
_COPY_LIMIT = 500_000_000

_OF_A_MODEL = ("*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
"""What is copied from beside a base that is one file: the folder may hold anything else."""


def write_companions(
    job: Job,
    experts: ExpertSet,
    plan: Plan,
    staging: Staging,
    with_digests: bool,
    not_measured: Mapping[str, str],
    refinement: Mapping[str, Any],
) -> dict[str, Any]:
    """Write everything but the weights into the staging folder; returns the content of merge.json.

    `not_measured`: by expert why its sensitivity counts nowhere; `refinement`: what became of it.
    """
    records = {shard.file: staging.finished(shard, check=False) for shard in plan.shards}
    ledger = [line for record in records.values() if record is not None for line in record["ledger"]]
    base = as_path(job.base)
    _copy_companions(base, staging, job.params.dtype)
    for name, expert in experts.experts.items():
        private = expert.read_private()
        if private:
            save_tensors(staging.folder / "heads" / f"{name}.safetensors", private)
    outcomes = Counter(line["outcome"] for line in ledger)
    record = {
        "method": job.params.method,
        "settings": job.params.model_dump(mode="json"),
        "selection": asdict(job.selection) if job.params.method == "poe" else None,
        "base": source_record(base, with_digests),
        "experts": {
            name: {
                **source_record(as_path(path), with_digests),
                "kind": experts.experts[name].kind,
                "lacks": experts.experts[name].lacks,
                "sensitivity": not_measured.get(name, "measured"),
            }
            for name, path in sorted(job.experts.items())
        },
        "rules": {
            **{
                rule: [line["name"] for line in ledger if line["rule"] == rule]
                for rule in ("merged", "averaged", "left_at_base")
            },
            "private": {name: list(names) for name, names in plan.private.items()},
        },
        "outcomes": dict(sorted(outcomes.items())),
        "refinement": dict(refinement),
        "digest": weights_digest({file: one["sha256"] for file, one in records.items() if one is not None}),
        "device": ", ".join(sorted({one["device"] for one in records.values() if one is not None})),
        "dtype": job.params.dtype if job.params.dtype != "base" else _common_dtype(plan),
        "versions": library_versions(),
        "key": staging.key,
    }
    staging.write_text(
        staging.folder / "ledger.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ledger)
    )
    staging.write_text(staging.folder / "merge.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    staging.write_text(staging.folder / "README.md", model_card(staging.out.name, record, model_config(staging.folder)))
    return record


def _common_dtype(plan: Plan) -> str:
    counts: Counter[torch.dtype] = Counter()
    for one in plan.parameters:
        counts[one.dtype] += one.entries
    return str(counts.most_common(1)[0][0]).removeprefix("torch.")


def _copy_companions(base: Path, staging: Staging, dtype: str) -> None:
    """Config, tokenizer and the like; never code, never weights. config.json says the new dtype where there is one."""
    for name, file in _companions(base):
        if name == "config.json" and dtype != "base":
            config = json.dumps(_with_dtype(model_config(file.parent), dtype), indent=2) + "\n"
            staging.write_text(staging.folder / name, config)
            continue
        (staging.folder / name).parent.mkdir(exist_ok=True)
        partial = staging.folder / (name + ".partial")
        partial.write_bytes(file.read_bytes())
        partial.replace(staging.folder / name)


def _companions(base: Path) -> Iterator[tuple[str, Path]]:
    """The name in the output and the file of all that is copied: what lies beside the base's weights, and the modules
    that sentence-transformers puts behind a model (modules.json names their folders), with weights of their own."""
    folder = base if base.is_dir() else base.parent
    for file in sorted(folder.iterdir()):
        ours = file.name in _OURS or file.name.endswith(".safetensors.index.json") or file.name.startswith(".")
        told = base.is_dir() or any(fnmatchcase(file.name, glob) for glob in _OF_A_MODEL)
        if told and not ours and _is_copied(file, _COPIED):
            yield file.name, file
    for module in _modules(folder) if base.is_dir() else ():
        for file in sorted((folder / module).iterdir()):
            if _is_copied(file, {*_COPIED, ".safetensors"}):
                yield f"{module}/{file.name}", file


def _is_copied(file: Path, suffixes: Collection[str]) -> bool:
    return file.is_file() and file.suffix in suffixes and file.stat().st_size <= _COPY_LIMIT


def _modules(folder: Path) -> list[str]:
    """Folders beside the weights that modules.json names."""
    try:
        named = [str(module["path"]) for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [name for name in named if re.fullmatch(r"\w[\w.-]*", name) and (folder / name).is_dir()]


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    changed = {key: dtype for key in ("torch_dtype", "dtype") if key in config} or {"dtype": dtype}
    return {**config, **changed}
