"""Normalised accuracy by suite and method, as bars with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poemerge.report.style import GREY, OTHERS, OURS, figure, method_name, svg_of, write_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["bars_svg", "draw_bars"]


def draw_bars(evaluation: Mapping[str, Any], path: Path) -> None:
    """The figure as a PNG at `path`."""
    write_png(_draw(evaluation), path, dpi=150)


def bars_svg(evaluation: Mapping[str, Any]) -> str:
    """The figure as an inline SVG with the figures it shows as its text alternative."""
    rows = _rows(evaluation)
    words = "; ".join(
        f"{task}: " + ", ".join(f"{name} {value:.1%}" for name, (value, _) in row.items()) for task, row in rows.items()
    )
    return svg_of(_draw(evaluation), "bars", "Normalised accuracy by task and method", words)


def _rows(evaluation: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, list[float] | None]]]:
    """task → method → share of the expert's score and its interval; suites without an expert have none."""
    rows: dict[str, dict[str, tuple[float, list[float] | None]]] = {}
    for name, suite in evaluation["suites"].items():
        expert, up = suite["expert"], suite["higher_is_better"]
        if not expert:
            continue
        scores = {"base": suite["base"], **suite["baselines"], "merged": suite["merged"]}
        row: dict[str, tuple[float, list[float] | None]] = {
            who: (value / expert if up else expert / value, None) for who, value in scores.items() if value
        }
        if "merged" in row:
            row["merged"] = (row["merged"][0], suite["intervals"].get("normalised"))
        rows[name] = row
    mean = evaluation["mean"]
    if mean.get("merged") is not None:
        row = {"base": (mean["base_normalised"], None)} if mean["base_normalised"] else {}
        for who, figures in mean["baselines"].items():
            row[who] = (figures["normalised"], figures["normalised_interval"])
        rows["all tasks"] = {**row, "merged": (mean["normalised"], mean["normalised_interval"])}
    return rows


def _draw(evaluation: Mapping[str, Any]) -> Figure:
    rows = _rows(evaluation)
    methods = list(dict.fromkeys(name for row in rows.values() for name in row))
    colours = {"base": GREY, "merged": OURS}
    colours |= dict(zip([name for name in methods if name not in colours], OTHERS * 3, strict=False))
    thick = 0.8 / max(len(methods), 1)
    with figure(8.6, 0.9 + len(rows) * max(0.4, 0.15 * len(methods))) as (drawn, axes):
        for place, method in enumerate(methods):
            heights = [row + place * thick - 0.4 + thick / 2 for row in range(len(rows))]
            found = [row.get(method) for row in rows.values()]
            values = [100 * one[0] if one else 0.0 for one in found]
            axes.barh(heights, values, height=thick * 0.92, color=colours[method], label=method_name(method))
            for height, one in zip(heights, found, strict=True):
                if one and one[1]:
                    low, high = (100 * end for end in one[1])
                    axes.plot([low, high], [height, height], color="#000000", linewidth=1.1, solid_capstyle="butt")
            for height, value in zip(heights, values, strict=True):
                if method == "merged" and value:
                    axes.text(
                        1.0,
                        height,
                        f"{value:.1f}",
                        color="white",
                        va="center_baseline",
                        fontsize=7.5,
                        fontweight="bold",
                    )
        axes.axvline(100, color="#000000", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("share of the expert's score, % (dashed: the expert; lines: 95 % intervals)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(methods), 6), fontsize=9)
    return drawn
