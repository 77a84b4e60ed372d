"""The page of a sweep: how the score depends on each setting, and every trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poemerge.report.html import Safe, Section, document, esc, figure, paragraph, percent, points, table
from poemerge.report.style import OTHERS, OURS, family_name, method_name, svg_of
from poemerge.report.style import figure as new_figure
from poemerge.wholefile import write_whole

__all__ = ["write_surface"]

LOGARITHMIC = ("scale_factor", "prior_precision")
NUMBERS = ("scale_factor", "prior_precision", "pooling", "coefficient")
AUTOMATIC = 0.0
"""Where the axis of the coefficient shows trials whose length is automatic; no coefficient of a sweep is that small."""
MARKS = "os^Dv*P"

Trial = Mapping[str, Any]


def write_surface(result: Mapping[str, Any], path: Path, model: str) -> Path:
    """Writes the page of a sweep (`result`, the content of its JSON) to `path`, as self-contained as the report."""
    trials, best, now = result["trials"], result["best"], result["current"]
    ahead = best["score"] - now["score"]
    scores = f"Best {percent(best['score'], 2)}, params.yaml {percent(now['score'], 2)}."
    verdict = (
        f"{_words(best['point'])}: {points(ahead)} points over params.yaml"
        if ahead > 0
        else "Nothing better than params.yaml as it is"
    )
    head = Safe(
        f'<h1>{esc(model)}, sweep</h1><p class="verdict">{esc(verdict)}</p><p class="because">'
        + esc(
            f"{len(trials)} trials on the split {result['settings']['split']} of {len(result['suites'])} suites; the "
            f"score is the mean of merged ÷ expert. {scores}"
        )
        + "</p>"
    )
    sections = []
    good = [trial for trial in trials if trial["suites"]]
    slices = _slices(good)
    if slices is not None:
        sections.append(Section("surface", "Response to each setting", slices))
    plane = _plane(good)
    if plane is not None:
        sections.append(Section("plane", "Two settings at once", plane))
    sections.append(Section("trials", "Every trial", _trials(trials, best, now)))
    path.parent.mkdir(parents=True, exist_ok=True)
    foot = paragraph("Chosen on validation data; test data took no part.")
    write_whole(path, document(f"{model} sweep · poemerge", head, sections, foot))
    return path


def _kind(point: Mapping[str, Any]) -> str:
    if point["method"] != "poe":
        return method_name(point["method"])
    return f"{family_name(point['family'])}, {point['side']}"


def _words(point: Mapping[str, Any]) -> str:
    return (
        f"{_kind(point)}"
        + "".join(f", {name.replace('_', ' ')} {point[name]:g}" for name in NUMBERS if name in point)
        + (", automatic length" if _automatic(point) else "")
    )


def _automatic(point: Mapping[str, Any]) -> bool:
    """Whether the length of the merge is left to the task vectors'."""
    return point["method"] == "poe" and "coefficient" not in point


def _place(point: Mapping[str, Any], name: str) -> float | None:
    """Where the axis of the setting `name` has the point, if anywhere."""
    if name == "coefficient" and _automatic(point):
        return AUTOMATIC
    value = point.get(name)
    return None if value is None else float(value)


def _looks(trials: Sequence[Trial]) -> dict[str, tuple[str, str]]:
    kinds = sorted({_kind(trial["point"]) for trial in trials})
    colours = (OURS, *OTHERS)
    return {kind: (colours[i % len(colours)], MARKS[i % len(MARKS)]) for i, kind in enumerate(kinds)}


def _slices(trials: Sequence[Trial]) -> Safe | None:
    names = [name for name in NUMBERS if len({_place(trial["point"], name) for trial in trials} - {None}) > 1]
    if not names:
        return None
    looks = _looks(trials)
    across = len(names) if len(names) < 4 else 2
    down = -(-len(names) // across)
    with new_figure(8.6, 3.0 * down + 0.6, nrows=down, ncols=across, sharey=True, squeeze=False) as (drawn, axes):
        for one, name in zip(axes.flat, names, strict=False):
            for kind, (colour, mark) in looks.items():
                own = [t for t in trials if _kind(t["point"]) == kind and _place(t["point"], name) is not None]
                xs, ys = [_place(t["point"], name) for t in own], [100 * t["score"] for t in own]
                one.scatter(xs, ys, s=34, color=colour, marker=mark, label=kind, linewidths=0)
            if name in LOGARITHMIC:
                one.set_xscale("log")
            if name == "coefficient" and any(_automatic(trial["point"]) for trial in trials):
                one.set_xticks([AUTOMATIC, 0.5, 1.0, 1.5], ["automatic", "0.5", "1", "1.5"])
            one.set_xlabel(name.replace("_", " "))
        for row in axes:
            row[0].set_ylabel("mean normalised score, %")
        handles, labels = axes.flat[len(names) - 1].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside upper center", ncols=min(len(looks), 4), fontsize=9)
    low, high = min(t["score"] for t in trials), max(t["score"] for t in trials)
    words = f"{len(trials)} trials between {percent(low)} and {percent(high)}, by {', '.join(names)}."
    return figure(
        Safe(svg_of(drawn, "slices", "Score by setting", words)), "A mark for each trial; its shape is the kind."
    )


def _plane(trials: Sequence[Trial]) -> Safe | None:
    """Contours of the score over scale factor (or coefficient) and prior precision, through the trials."""
    for across, up in (("scale_factor", "prior_precision"), ("coefficient", "prior_precision")):
        own = [trial for trial in trials if across in trial["point"] and up in trial["point"]]
        xs = np.array([trial["point"][across] for trial in own], dtype=float)
        ys = np.array([trial["point"][up] for trial in own], dtype=float)
        if len(set(zip(xs.tolist(), ys.tolist(), strict=True))) < 6 or not _spans(np.log(xs), np.log(ys)):
            continue
        scores = 100 * np.array([trial["score"] for trial in own])
        with new_figure(7.2, 4.2) as (drawn, axes):
            x = np.log10(xs) if across in LOGARITHMIC else xs
            filled = axes.tricontourf(x, np.log10(ys), scores, levels=10, cmap="cividis")
            drawn.colorbar(filled, ax=axes, label="mean normalised score, %")
            axes.scatter(x, np.log10(ys), s=18, color="white", edgecolors="#17202b", linewidths=0.8, clip_on=False)
            axes.set_xlabel(f"log10 {across.replace('_', ' ')}" if across in LOGARITHMIC else across)
            axes.set_ylabel(f"log10 {up.replace('_', ' ')}")
        top = int(scores.argmax())
        words = f"The highest of {len(own)} trials, {scores[top]:.1f} %, lies at {xs[top]:g} and {ys[top]:g}."
        svg = svg_of(drawn, "plane", f"Score over {across} and {up}", words)
        return figure(
            Safe(svg), "Between the trials (dots) the surface is interpolated; all families and sides together."
        )
    return None


def _spans(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> bool:
    """Whether the points lie on no line."""
    return bool(np.linalg.matrix_rank(np.stack([x - x.mean(), y - y.mean()]), tol=1e-6) == 2)


def _trials(trials: Sequence[Trial], best: Trial, now: Trial) -> Safe:
    names = list(dict.fromkeys(name for trial in trials for name in trial["point"]))
    rows = []
    for trial in sorted(trials, key=lambda one: -one["score"]):
        point = trial["point"]
        mark = "best" if trial["number"] == best["number"] else ""
        if trial["number"] == now["number"]:
            mark = f"{mark}, params.yaml".removeprefix(", ")
        cells = [_shown(point, name) for name in names]
        score = (
            percent(trial["score"], 2) if trial["suites"] else Safe(f'<span class="bad">{esc(trial["note"])}</span>')
        )
        rows.append([trial["number"], *cells, score, f"{trial['seconds']:.0f} s", mark])
    return table(["trial", *(name.replace("_", " ") for name in names), "score", "time", ""], rows)


def _shown(point: Mapping[str, Any], name: str) -> str:
    value = point.get(name)
    if value is None:
        return "automatic" if name == "coefficient" and _automatic(point) else "–"
    if name == "family":
        return family_name(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
