"""What was merged and what was not, where it came from, what it cost, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poemerge.merging.refinement import mean_divergence
from poemerge.project import STAGES, Project
from poemerge.provenance import code_of, file_sha256
from poemerge.report.html import Safe, Section, details, esc, paragraph, subheading, table
from poemerge.report.style import family_name, method_name

__all__ = ["cost_section", "gates_section", "lineage_section", "reproduce_section", "rules_section"]

MOST_NAMES = 400


def rules_section(merge: Mapping[str, Any]) -> Section:
    """Every parameter by what was done with it."""
    rules, method = merge["rules"], merge["method"]
    words = {
        "merged": f"merged by {method_name(method)}",
        "averaged": "averaged: no matrices, or embeddings",
        "left_at_base": "left at the base: no expert changed them, or they are excluded",
    }
    parts = [paragraph(_selected(merge))]
    for rule, text in words.items():
        names = rules.get(rule, [])
        parts.append(details(f"{len(names)} {text}", _names(names)))
    private = [f"{expert}: {name}" for expert, names in rules.get("private", {}).items() for name in names]
    parts.append(details(f"{len(private)} private to their task, kept beside the merged model", _names(private)))
    settings = json.dumps(merge.get("settings", {}), indent=1, ensure_ascii=False)
    parts.append(details("All settings of the merge", Safe(f"<pre>{esc(settings)}</pre>")))
    return Section("parameters", "What was merged", Safe("".join(parts)))


def _selected(merge: Mapping[str, Any]) -> str:
    settings = merge.get("settings", {})
    text = f"Method {method_name(merge['method'])}, computed on {merge['device']}, written as {merge['dtype']}."
    selection = merge.get("selection")
    if selection:
        model = selection["model"]
        nu = f" with tail index {model['tail_index']:.2f}" if model.get("tail_index") is not None else ""
        side = f"side {settings.get('side')}"
        if settings.get("side") == "both" and settings.get("pooling") is not None:
            side += f", pooling {settings['pooling']:g}"
        coefficient = settings.get("coefficient")
        length = "length automatic" if coefficient is None else f"coefficient {coefficient:g}"
        text += f" Experts: {family_name(model['family'])}{nu}, {side}, scale {settings.get('scale')} × "
        text += f"{settings.get('scale_factor')}, prior {settings.get('prior')} {settings.get('prior_precision')}, "
        text += f"{length}."
    refinement = merge.get("refinement", {})
    if (multiple := refinement.get("multiple", 1)) < 1:
        text += f" Too long for its experts as it was solved: {multiple:g} of it was added."
    if refinement.get("kept") and refinement["steps"]:
        before, after = mean_divergence(refinement)
        text += f" Refined by {refinement['steps']} steps: the mean divergence from the experts' predictions on random "
        text += f"texts fell from {before:.3f} to {after:.3f}."
    return text


def _names(names: Sequence[str]) -> Safe:
    listed = "".join(f"<li>{esc(name)}</li>" for name in names[:MOST_NAMES])
    more = paragraph(f"… and {len(names) - MOST_NAMES} more in merge.json") if len(names) > MOST_NAMES else ""
    return Safe(f'<ul class="names">{listed}</ul>{more}')


def gates_section(registration: Mapping[str, Any]) -> Section:
    """Each gate's verdict with its reason."""
    rows = [
        [gate["name"], Safe(f'<span class="{esc(gate["verdict"])}">{esc(gate["verdict"])}</span>'), gate["reason"]]
        for gate in registration["gates"]
    ]
    return Section("gates", "Gates", table(["gate", "verdict", "reason"], rows, text_columns=3))


def lineage_section(project: Project, merge: Mapping[str, Any], registration: Mapping[str, Any] | None) -> Section:
    """Every input with its revision and digest; the code; the registered version."""
    rows = [["base", *_origin(merge["base"])]]
    rows += [[name, *_origin(one)] for name, one in merge["experts"].items()]
    headings = ["input", "source", "revision", "digest", "licence"]
    code = code_of(project.root)
    facts: list[list[object]] = [
        ["merged weights", Safe(f"<code>{esc(merge['digest'])}</code>")],
        ["code", _commit(code.commit, len(code.changed))],
        ["dvc.lock", Safe(f"<code>{esc(file_sha256(project.dvc_lock) or 'not there')}</code>")],
        ["params.yaml", Safe(f"<code>{esc(file_sha256(project.params_yaml) or 'not there')}</code>")],
    ]
    if registration is not None:
        aliases = ", ".join(registration["aliases"]) or "no alias"
        named = f"{registration['model']} version {registration['version']} (then {aliases})"
        facts.insert(0, ["registered as", named])
        facts.insert(1, ["MLflow run", Safe(f"<code>{esc(registration['run_id'])}</code>")])
    versions = ", ".join(f"{name} {version}" for name, version in merge.get("versions", {}).items())
    facts.append(["libraries", versions])
    body = (
        table(headings, rows, text_columns=5) + subheading("Output and code") + table(["", ""], facts, text_columns=2)
    )
    return Section("lineage", "Lineage", Safe(body))


def _origin(one: Mapping[str, Any]) -> list[object]:
    def code(text: str | None) -> Safe:
        return Safe(f"<code>{esc(text[:12])}</code>") if text else Safe("–")

    return [one["source"], code(one.get("revision")), code(one.get("digest")), one.get("license") or "unknown"]


def _commit(commit: str | None, changed: int) -> Safe:
    if commit is None:
        return esc("no git here")
    extra = f", {changed} changed files (kept as code.patch in the MLflow run)" if changed else ""
    return Safe(f"<code>{esc(commit)}</code>{esc(extra)}")


def cost_section(project: Project, evaluation: Mapping[str, Any] | None) -> Section | None:
    """Seconds and peak memory of each stage, when it last ran."""
    seconds, memory = _numbers(project.stage_seconds), _numbers(project.stage_memory)
    rows: list[list[object]] = []
    for stage in STAGES:
        try:
            report = json.loads(project.stage_report(stage).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            report = {}
        took, peak = seconds.get(stage), memory.get(stage)
        if report or took is not None:
            rows.append(
                [
                    stage,
                    report.get("headline", "–"),
                    "–" if took is None else f"{took:,.1f} s",
                    "–" if peak is None else f"{peak / 1e6:,.0f} MB",
                ]
            )
    if not rows:
        return None
    total = sum(value for name, value in seconds.items() if name in STAGES)
    text = f"{total:,.0f} s in all, each stage as it last ran; a stage whose inputs did not change is not run again."
    if evaluation is not None:
        text += (
            f" Scored on {evaluation['runtime']['device']} in {evaluation['runtime']['dtype'].removeprefix('torch.')}."
        )
    headings = ["stage", "what it said", "time", "peak memory"]
    return Section("cost", "Time and memory", Safe(table(headings, rows, text_columns=2) + paragraph(text)))


def _numbers(path: Path) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def reproduce_section(project: Project, registration: Mapping[str, Any] | None) -> Section:
    """The commands that make it again, and params.yaml as it was."""
    commit = code_of(project.root).commit
    lines = [f"git checkout {commit}"] if commit else []
    if registration is not None:
        lines += [
            f"poemerge replay {registration['version']}    # the same inputs, code and settings; compares digests",
            f"poemerge lineage {registration['version']}   # everything that it was made of",
        ]
    else:
        lines.append("poemerge run    # stages whose inputs are unchanged are not run again")
    params = project.params_yaml.read_text(encoding="utf-8") if project.params_yaml.is_file() else ""
    body = f"<pre>{esc(chr(10).join(lines))}</pre>" + details("params.yaml", Safe(f"<pre>{esc(params)}</pre>"))
    return Section("reproduce", "Make it again", Safe(body))
