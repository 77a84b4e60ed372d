"""How every figure looks: colours that the colour-blind can tell apart, text as text, nothing drawn in vain."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

__all__ = ["GREY", "OTHERS", "OURS", "family_name", "figure", "method_name", "svg_of", "write_png"]

OURS = "#0072b2"
"""Ours is always this blue; Okabe and Ito's palette, https://jfly.uni-koeln.de/color/."""
OTHERS = ("#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#7f7f7f", "#8c6bb1")
GREY = "#8a8f98"

_METHODS = {
    "poe": "product of experts",
    "mean": "mean",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_ties": "DARE-TIES",
    "tsv_m": "TSV-M",
    "iso_c": "Iso-C",
    "wudi": "WUDI",
    "karcher": "Karcher mean",
}


def method_name(method: str) -> str:
    """How people write the name of a method of params.yaml."""
    return _METHODS.get(method, method)


_FAMILIES = {
    "gaussian": "Gaussian",
    "student_t": "Student-t",
    "cauchy": "Cauchy",
    "laplace": "Laplace",
    "weibull": "Weibull",
}


def family_name(family: str) -> str:
    """How people write the name of a family of expert.json and tail.json."""
    return _FAMILIES.get(family, family)


_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 120,
    "svg.hashsalt": "poemerge",
}


@contextmanager
def figure(width: float, height: float, **kwargs: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure of `width` × `height` inches and its axes, in our style; no display is needed and none is touched."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewFigure

    with mpl.rc_context(_SETTINGS):
        drawn = NewFigure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn, drawn.subplots(**kwargs)


def write_png(drawn: Figure, path: Path, dpi: int) -> None:
    """The figure as the PNG `path`, its folder made where it is missing; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    drawn.savefig(partial, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    partial.replace(path)


def svg_of(drawn: Figure, identity: str, title: str, description: str) -> str:
    """The figure as an inline SVG: sized by the page, its black text in the page's colour, with a text alternative.

    `identity` is put before every id inside, so that several figures may share a page.
    """
    from html import escape

    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context(_SETTINGS):  # text as text is decided here, when the figure is written
        drawn.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{identity}-", svg)
    # What matplotlib draws black is the page's own ink: in dark mode it turns light.
    svg = re.sub(r"(fill|stroke): #(000000|000)\b", r"\1: currentColor", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own font
    head = re.match(r"<svg[^>]*>", svg)
    assert head is not None
    box = re.search(r'viewBox="[^"]*"', head[0])
    assert box is not None
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" '
        f'aria-labelledby="{identity}-title {identity}-desc"><title id="{identity}-title">{escape(title)}</title>'
        f'<desc id="{identity}-desc">{escape(description)}</desc>'
    )
    return opening + svg[head.end() :]
