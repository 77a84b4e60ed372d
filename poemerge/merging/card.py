"""The model card: what was merged, how, and under which licences, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["licence_clash", "licence_of", "model_card"]

_SHARE_ALIKE = {
    "gpl",
    "gpl-2.0",
    "gpl-3.0",
    "agpl-3.0",
    "lgpl",
    "lgpl-3.0",
    "cc-by-sa-4.0",
    "cc-by-sa-3.0",
    "cc-by-nc-sa-4.0",
}
_NON_COMMERCIAL = re.compile(r"(^|-)nc(-|$)|non-?commercial|research", re.IGNORECASE)
_HUB_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)$")
_FRONT_MATTER_LIMIT = 1_000_000


def licence_of(folder: Path) -> str | None:
    """The licence that a checkpoint's folder states: in source.json, else in the front matter of its README.md."""
    try:
        known = json.loads((folder / "source.json").read_text(encoding="utf-8")).get("license")
        if known:
            return str(known)
    except (OSError, ValueError, AttributeError):
        pass
    try:
        with (folder / "README.md").open(encoding="utf-8") as handle:
            text = handle.read(_FRONT_MATTER_LIMIT)
        found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        front = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return str(licence) if licence else None


def licence_clash(licences: Mapping[str, str | None]) -> str | None:
    """Why the licences of the sources (by name) cannot simply be carried on to the merged model; None when they can."""
    unknown = sorted(name for name, licence in licences.items() if not licence)
    known = {licence.lower() for licence in licences.values() if licence}
    if known & _SHARE_ALIKE and len(known) > 1:
        strict = ", ".join(sorted(known & _SHARE_ALIKE))
        return f"{strict} asks that derived works carry the same licence, but other sources are under {_others(known)}"
    if any(_NON_COMMERCIAL.search(licence) for licence in known) and len(known) > 1:
        strict = ", ".join(sorted(licence for licence in known if _NON_COMMERCIAL.search(licence)))
        return (
            f"{strict} restricts commercial use, which then holds for the merged model, though other sources allow it"
        )
    if len(known) > 1:
        return f"the sources are under different licences ({', '.join(sorted(known))}): it must meet all of them"
    if unknown and known:
        return f"no licence is stated for {', '.join(unknown)}: ask before you publish the merged model"
    return None


def _others(known: set[str]) -> str:
    return ", ".join(sorted(known - _SHARE_ALIKE)) or ", ".join(sorted(known))


def model_card(
    name: str,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a merged model, from what merge.json holds, and metrics/evaluation.json where it is known."""
    experts: Mapping[str, Mapping[str, Any]] = record["experts"]
    base: Mapping[str, Any] = record["base"]
    licences = {"the base": base.get("license"), **{n: one.get("license") for n, one in experts.items()}}
    clash = licence_clash(licences)
    known = sorted({licence.lower() for licence in licences.values() if licence})
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "model-merging", "poemerge"]}
    if known:
        front["license"] = known[0] if len(known) == 1 and clash is None else "other"
        if front["license"] == "other":
            front["license_name"] = "see-the-sources"
    hub = [m[1] for one in (base, *experts.values()) if (m := _HUB_NAME.match(str(one.get("source") or "")))]
    if hub:
        front["base_model"] = hub
        front["base_model_relation"] = "merge"
    if config.get("model_type"):
        front["tags"].append(str(config["model_type"]))
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {name}", ""]
    lines += [
        f"{len(experts)} fine-tuned models of one base, merged by "
        f"[poemerge](https://arxiv.org/abs/2607.01689) with the method `{record['method']}`{_family(record)}.",
        "",
        "## Sources",
        "",
        "| | source | revision | kind | licence |",
        "|---|---|---|---|---|",
        _source_row("base", base, "full"),
        *(_source_row(expert, one, one["kind"]) for expert, one in experts.items()),
        "",
    ]
    if clash is not None:
        lines += [f"**Licences clash:** {clash}.", ""]
    lines += _what(record)
    if evaluation and evaluation.get("suites"):
        lines += _scores(evaluation)
    lines += [
        "## Settings",
        "",
        "```yaml",
        yaml.safe_dump(_telling(record["settings"]), sort_keys=True, allow_unicode=True).strip(),
        "```",
        "",
        f"Digest of the weights: `{record['digest']}`. merge.json holds the inputs, ledger.jsonl a line for "
        "every parameter.",
        "",
    ]
    return "\n".join(lines)


def _family(record: Mapping[str, Any]) -> str:
    selection = record.get("selection")
    if record["method"] != "poe" or not selection:
        return ""
    model = selection["model"]
    index = f", {model['tail_index']:.3g} degrees of freedom" if model.get("tail_index") else ""
    return f" ({model['family']} experts{index})"


def _telling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that somebody who merges again would give: none of the machine, and none that was left open."""
    ours = {"dask_address", "device", "engine", "max_memory", "max_shard_size"}
    return {key: value for key, value in settings.items() if key not in ours and value not in (None, {}, [], ())}


def _source_row(name: str, one: Mapping[str, Any], kind: str) -> str:
    cells = [name, one.get("source") or "?", (one.get("revision") or "")[:12], kind, one.get("license") or "not stated"]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _what(record: Mapping[str, Any]) -> list[str]:
    rules = record["rules"]
    private = {name: names for name, names in rules["private"].items() if names}
    lines = [
        "## What became of the parameters",
        "",
        f"{len(rules['merged'])} merged, {len(rules['averaged'])} averaged, "
        f"{len(rules['left_at_base'])} left at the base.",
    ]
    if private:
        lines += [
            "",
            "Each task's own parameters lie in heads/: "
            + "; ".join(f"{name} ({', '.join(names)})" for name, names in private.items())
            + ".",
        ]
    return [*lines, ""]


def _scores(evaluation: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Evaluation",
        "",
        "| suite | metric | base | expert | merged | normalised |",
        "|---|---|---|---|---|---|",
    ]
    for name, suite in evaluation["suites"].items():
        figures: Sequence[object] = [suite.get(key) for key in ("base", "expert", "merged", "normalised")]
        shown = [f"{value:.3f}" if isinstance(value, (int, float)) else "" for value in figures]
        lines.append(f"| {name} | {suite.get('metric', '')} | {' | '.join(shown)} |")
    return [*lines, ""]
