"""The figure of the tail fit: log–log density of |R| at the reference merges, the fits over it, Hill's curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from poemerge.checkpoints.roles import block
from poemerge.numerics.families import FAMILIES
from poemerge.report.style import GREY, OTHERS, OURS, figure, write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["draw_residuals"]

# Colours of Okabe and Ito; shapes and dashes tell the same in grey.
REFERENCES: dict[str, tuple[str, str, str]] = {
    "mean": ("mean", "#0072b2", "o"),
    "task_arithmetic": ("task arithmetic", "#d55e00", "^"),
    "ties": ("TIES", "#009e73", "s"),
}
LINES: dict[str, tuple[str, str, Any, float]] = {
    "student_t": ("Student-t", "#000000", "-", 1.5),
    "cauchy": ("Cauchy", "#7f7f7f", (0, (7, 2, 1.5, 2)), 1.3),
    "weibull": ("Weibull", "#e69f00", (0, (1, 1.3)), 1.8),
    "laplace": ("Laplace", "#cc79a7", (0, (3, 1.5, 1, 1.5)), 1.3),
    "gaussian": ("Gaussian", "#56b4e9", (0, (5, 2)), 1.3),
}
RESIDUAL = {"output": "Aᵀ(Θ − A)", "input": "(Θ − A)Aᵀ", "both": "Âᵀ(Θ − A)Âᵀ"}
COLUMNS = 3
LEFT = 0.1
"""In medians: below, every density of R is flat."""


def draw_residuals(tail: Mapping[str, Any], path: Path) -> None:
    """Draw tail.json's content into the PNG `path`: a panel for the whole model, one a layer group, and two of tail
    indices.

    Points are the density of the standardised |R| at each reference merge, lines the fits to all references together.
    The last two panels show Hill's estimate from the k largest entries of the whole model, with its interval, and ν of
    the single matrices along the depth.
    """
    write_png(_draw(tail), path, dpi=200)


def _draw(tail: Mapping[str, Any]) -> Figure:
    panels = [("whole model", tail["model"]), *tail["groups"].items()]
    panels = [(name, fits) for name, fits in panels if fits["pooled"] is not None]
    rows = -(-(len(panels) + 2) // COLUMNS)
    with figure(9.0, 2.45 * rows + 0.9, nrows=rows, ncols=COLUMNS, squeeze=False) as (drawn, grid):
        if not panels:
            drawn.suptitle("No residual differs from zero: nothing to fit.")
        cells = list(grid.flat)
        limits = _limits([fits for _, fits in panels])
        for place, (axes, (name, fits)) in enumerate(zip(cells, panels, strict=False)):
            _density_panel(axes, name, fits, limits)
            if place % COLUMNS == 0:
                axes.set_ylabel("density of R", fontsize=9)
            if place + COLUMNS >= len(panels):
                axes.set_xlabel("|R| / median |R|", fontsize=9)
            else:
                axes.tick_params(labelbottom=False)
        if panels:
            _hill_panel(cells[len(panels)], tail["model"])
            _depth_panel(cells[len(panels) + 1], tail)
            side = RESIDUAL[tail["side"]]
            drawn.suptitle(f"Residuals R = {side} of {len(tail['experts'])} experts", fontsize=11, x=0.01, ha="left")
        for axes in cells[len(panels) + 2 * bool(panels) :]:
            axes.set_axis_off()
        drawn.legend(handles=_handles(tail["references"]), loc="outside lower center", ncols=8, fontsize=8.5)
    return drawn


def _limits(fits: list[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Largest magnitude, smallest and largest density of the data, not of the fits: a Gaussian falls off the page."""
    shown = [one["histogram"] for fit in fits for one in fit["references"].values() if one is not None]
    magnitudes = [value for one in shown for value in one["magnitude"]]
    densities = [value for one in shown for value in one["density"]]
    return max(magnitudes, default=1.0) * 1.5, min(densities, default=1.0) / 4, max(densities, default=1.0) * 3


def _density_panel(axes: Axes, name: str, fits: Mapping[str, Any], limits: tuple[float, float, float]) -> None:
    pooled, (right, bottom, top) = fits["pooled"], limits
    x = torch.from_numpy(np.geomspace(LEFT, right, 200))
    for family, (_, colour, dashes, width) in LINES.items():
        density = FAMILIES[family].log_density(x, pooled["fits"][family]["parameters"]).exp()
        axes.plot(x.numpy(), density.numpy(), color=colour, linestyle=dashes, linewidth=width, zorder=2)
    for reference, one in fits["references"].items():
        if one is not None:
            _, colour, marker = REFERENCES[reference]
            style: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 0.8, "markersize": 3.4}
            points = one["histogram"]["magnitude"], one["histogram"]["density"]
            axes.plot(*points, linestyle="none", marker=marker, color=colour, zorder=3, **style)
    axes.set(xscale="log", yscale="log", xlim=(LEFT, right), ylim=(bottom, top))
    curve = pooled["hill"]
    at = curve["chosen"]
    words = [
        f"best: {LINES[pooled['best']['family']][0]}",
        f"Student-t ν = {pooled['fits']['student_t']['parameters']['tail_index']:.2f}",
        f"Hill {curve['tail_index'][at]:.2f} [{curve['low'][at]:.2f}, {curve['high'][at]:.2f}]",
    ]
    axes.text(0.04, 0.05, "\n".join(words), transform=axes.transAxes, fontsize=8, linespacing=1.35)
    _finish(axes, name[0].upper() + name[1:])


def _hill_panel(axes: Axes, fits: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    for reference, one in fits["references"].items():
        if one is None:
            continue
        _, colour, marker = REFERENCES[reference]
        curve = one["hill"]
        at = curve["chosen"]
        axes.fill_between(curve["k"], curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)
        axes.plot(curve["k"], curve["tail_index"], color=colour, linewidth=1.3)
        axes.plot(curve["k"][at], curve["tail_index"][at], marker=marker, color=colour, markersize=6)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("k largest entries (marked: read off)", fontsize=9)
    axes.set_ylabel("tail index", fontsize=9)
    _finish(axes, "Hill, whole model")


def _depth_panel(axes: Axes, tail: Mapping[str, Any]) -> None:
    """Median ν over experts and references of the matrices of each block, one line a layer group."""
    from matplotlib.ticker import MaxNLocator

    groups = [group for group, fits in tail["groups"].items() if fits["pooled"] is not None]
    found: dict[str, dict[int, list[float]]] = {group: {} for group in groups}
    for name, matrix in tail["matrices"].items():
        at = block(name)
        values = [fit.get("tail_index") for one in matrix["experts"].values() for fit in one.values()]
        if at is not None and matrix["group"] in found:
            found[matrix["group"]].setdefault(at, []).extend(value for value in values if value is not None)
    highest = 10.0
    for group, colour, marker in zip(groups, (OURS, *OTHERS), "o^sDvP*X", strict=False):
        points = sorted((at, float(np.median(values))) for at, values in found[group].items() if values)
        if points:
            highest = max(highest, *(nu for _, nu in points))
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.2, label=group)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], labels=["1", "2", "5", "10", "20", "50", "100"])
    axes.set_ylim(0.8, 5 * highest)  # room for the legend
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block", fontsize=9)
    axes.set_ylabel("Student-t ν", fontsize=9)
    axes.legend(fontsize=6.5, ncols=2, loc="upper center", handlelength=1.4, columnspacing=0.8, labelspacing=0.3)
    _finish(axes, "ν along the depth (median)")


def _finish(axes: Axes, title: str) -> None:
    axes.minorticks_off()
    axes.set_title(title, fontsize=9.5)
    axes.tick_params(labelsize=8)


def _handles(references: list[str]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    points = [
        Line2D(
            [], [], linestyle="none", marker=marker, color=colour, markerfacecolor="white", markersize=5, label=label
        )
        for label, colour, marker in (REFERENCES[name] for name in references)
    ]
    lines = [
        Line2D([], [], color=colour, linestyle=dashes, linewidth=width, label=label)
        for label, colour, dashes, width in LINES.values()
    ]
    return points + lines
