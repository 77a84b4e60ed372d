"""`write_report`: one page that says what was merged, how good it is and why, and needs nothing but a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from poemerge.errors import ProjectError
from poemerge.params import Params
from poemerge.project import Project
from poemerge.report.html import Safe, Section, document, esc
from poemerge.report.provenance import (
    cost_section,
    gates_section,
    lineage_section,
    reproduce_section,
    rules_section,
)
from poemerge.report.scores import lead, scores_section
from poemerge.report.tails import tails_section
from poemerge.report.vectors import vectors_section
from poemerge.report.weights import weights_section
from poemerge.wholefile import write_whole

__all__ = ["write_report"]


def write_report(project: Project, params: Params, path: Path | None = None) -> Path:
    """Writes the page `path` (default: artifacts/report/index.html) from what the stages left in the project; returns
    its path.

    The page makes no request: styles, figures and images are inside it, and a policy in it forbids others. What a stage
    has not made yet is left out. Raises ProjectError when nothing is merged.
    """
    merge = _json(project.merge_json)
    if merge is None:
        raise ProjectError(
            f"Nothing to report yet.\n  got:      no {project.merge_json}\n  expected: what the merge stage makes\n"
            "  next:     poemerge run"
        )
    evaluation = _json(project.evaluation_json)
    registration = _json(project.registration_json)
    if registration is not None and registration["digest"] != merge["digest"]:
        registration = None  # of an earlier merge
    sections = [
        scores_section(evaluation) if evaluation is not None else None,
        gates_section(registration) if registration is not None else None,
        weights_section(_lines(project.ledger)),
        _tails(project),
        _vectors(project),
        rules_section(merge),
        lineage_section(project, merge, registration),
        cost_section(project, evaluation),
        reproduce_section(project, registration),
    ]
    title = f"{params.register_.model} {merge['digest'][:12]}"
    head = Safe(f"<h1>{esc(title)}</h1>{lead(evaluation, registration, merge['method'])}")
    foot = Safe(f"Written by poemerge from {esc(project.root.name)}. Everything on this page is inside this file.")
    page = document(f"{title} · poemerge", head, [section for section in sections if section is not None], foot)
    path = path or project.report_html
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def _tails(project: Project) -> Section | None:
    tail = _json(project.tail_json)
    return None if tail is None else tails_section(tail, _json(project.expert_json), project.residuals_png)


def _vectors(project: Project) -> Section | None:
    manifest = _json(project.task_vectors_manifest)
    return None if manifest is None else vectors_section(manifest)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
