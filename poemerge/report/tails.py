"""How heavy the residuals' tails are: the selected expert with its reason, the figure, and the fits by layer group."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from poemerge.report.html import Safe, Section, esc, figure, paragraph, table
from poemerge.report.style import family_name

__all__ = ["tails_section"]


def tails_section(tail: Mapping[str, Any], selected: Mapping[str, Any] | None, picture: Path) -> Section:
    """The tail fit of every layer group; `picture` is the figure that the tail stage drew."""
    body = []
    if selected is not None:
        chosen = f"The merge uses the {family_name(selected['family'])} expert"
        if selected.get("tail_index") is not None:
            chosen += f" with tail index {selected['tail_index']:.2f}"
        reason = selected.get("reason")
        body.append(paragraph(f"{chosen}: {reason}" if reason else f"{chosen}."))
    rows = [_row("whole model", tail["model"]), *(_row(name, one) for name, one in tail["groups"].items())]
    found = [row for row in rows if row is not None]
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        words = "; ".join(f"{row[0]}: best {row[1]}, Student-t with {row[2]} degrees of freedom" for row in found)
        alternative = esc(f"Log–log density of the residuals with the fitted families. {words}")
        image = f'<img alt="{alternative}" src="data:image/png;base64,{data}">'
        body.append(
            figure(
                Safe(image),
                "Density of the residuals' magnitudes at the reference merges, by layer group, with the families "
                "fitted to them; a straight line downwards is a heavy tail.",
            )
        )
    headings = ["layer group", "best family", "Student-t ν", "Hill's tail index (95 %)", "KS distance", "entries"]
    body.append(table(headings, found, text_columns=2))
    return Section("tails", "Tails of the residuals", Safe("".join(body)))


def _row(name: str, one: Mapping[str, Any]) -> list[object] | None:
    fit = one["pooled"]
    if fit is None:
        return None
    best, hill = fit["best"]["family"], fit["hill"]
    at = hill["chosen"]
    return [
        name,
        family_name(best),
        f"{fit['fits']['student_t']['parameters']['tail_index']:.2f}",
        f"{hill['tail_index'][at]:.2f} ({hill['low'][at]:.2f} to {hill['high'][at]:.2f})",
        f"{fit['fits'][best]['ks']:.4f}",
        f"{fit['entries']:,}",
    ]
