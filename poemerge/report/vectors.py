"""Task vectors: how far each expert moved, and how alike the directions are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poemerge.report.heatmap import heatmap
from poemerge.report.html import Safe, Section, figure, paragraph, table

__all__ = ["vectors_section"]


def vectors_section(manifest: Mapping[str, Any]) -> Section:
    """Norms as a table with bars, cosines as a grid."""
    experts = manifest["experts"]
    longest = max((one["norm"] for one in experts.values()), default=0.0) or 1.0
    rows: list[list[object]] = [
        [
            name,
            one["kind"],
            Safe(f"{one['norm']:.3g}{_bar(one['norm'] / longest)}"),
            "–" if one["relative_norm"] is None else f"{100 * one['relative_norm']:.2f} %",
            f"{100 * one['density']:.1f} %",
            len(one["private"]),
        ]
        for name, one in experts.items()
    ]
    headings = ["expert", "kind", "norm", "of the base's norm", "entries changed", "private tensors"]
    body = [table(headings, rows, text_columns=2)]
    names, matrix = manifest["cosine"]["experts"], manifest["cosine"]["whole"]
    if len(names) > 1:
        pairs = [(matrix[i][j], names[i], names[j]) for i in range(len(names)) for j in range(i)]
        low, high = min(pairs), max(pairs)
        drawn = heatmap(
            "cosine",
            "Cosine similarity of the task vectors",
            f"From {low[0]:.3f} ({low[1]} and {low[2]}) to {high[0]:.3f} ({high[1]} and {high[2]}).",
            names,
            names,
            [[None if i == j else matrix[i][j] for j in range(len(names))] for i in range(len(names))],
            colour=lambda value: value,
            text=lambda value: f"{value:.2f}".replace("0.", ".").replace("-", "−"),
            tip=lambda r, c, value: f"{names[r]} and {names[c]}: cosine {value:.4f}",
        )
        body.append(
            figure(
                drawn,
                "Cosine between task vectors over all parameters: blue alike, orange opposed, grey unrelated. Experts "
                "that are unrelated disturb each other least.",
                wide=len(names) > 8,
            )
        )
    body += [paragraph(text, "bad") for text in manifest.get("warnings", [])]
    return Section("vectors", "Task vectors", Safe("".join(body)))


def _bar(share: float) -> Safe:
    width = max(0.0, min(1.0, share)) * 100
    return Safe(
        '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width:.1f}" height="6" fill="#0072b2"/></svg>'
    )
