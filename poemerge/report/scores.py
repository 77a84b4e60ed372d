"""The verdict, the table of scores with intervals, and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from poemerge.report.bars import bars_svg
from poemerge.report.html import Safe, Section, esc, figure, paragraph, percent, points, subheading, table
from poemerge.report.style import method_name

__all__ = ["lead", "scores_section"]


def lead(evaluation: Mapping[str, Any] | None, registration: Mapping[str, Any] | None, method: str) -> Safe:
    """The head of the page: what was decided, why, and the figures it rests on."""
    parts = [f'<p class="verdict">{esc(_decision(evaluation, registration))}</p>']
    if evaluation is None or evaluation["mean"]["merged"] is None:
        return Safe("".join(parts))
    mean = evaluation["mean"]
    because = f"Merged by {method_name(method)}: {percent(mean['merged'])} on average over {len(mean['suites'])} tasks"
    best = _best(mean)
    if best is not None:
        ahead = mean["lead"][best]
        low, high = ahead["interval"]
        side = "behind" if ahead["difference"] < 0 else "ahead of"
        sure = "within the noise of it" if low <= 0 <= high else "more than chance explains"
        because += (
            f", {abs(100 * ahead['difference']):.1f} points {side} {method_name(best)}, the best of the other methods: "
            f"{sure} (95 % interval {points(low)} to {points(high)})"
        )
    parts.append(f'<p class="because">{esc(because)}.</p>')
    cards = [
        ("merged", percent(mean["merged"]), _range(mean["interval"])),
        (
            "normalised accuracy",
            percent(mean["normalised"]),
            f"mean of ratios, {_range(mean['normalised_interval'])}; ratio of means "
            f"{percent(mean['normalised_ratio_of_means'])}",
        ),
        ("the experts, each on its own task", percent(mean["expert"]), _range(mean["expert_interval"])),
    ]
    if mean["base"] is not None:
        cards.append(("the base", percent(mean["base"]), _range(mean["base_interval"])))
    if best is not None:
        figures = mean["baselines"][best]
        cards.append((f"best other: {method_name(best)}", percent(figures["accuracy"]), _range(figures["interval"])))
    boxes = "".join(
        f'<div class="card"><div class="name">{esc(name)}</div><div class="value">{esc(value)}</div>'
        f'<div class="note">{esc(note)}</div></div>'
        for name, value, note in cards
    )
    parts.append(f'<div class="cards">{boxes}</div>')
    return Safe("".join(parts))


def _decision(evaluation: Mapping[str, Any] | None, registration: Mapping[str, Any] | None) -> str:
    """What registering led to, in the past tense: the champion may be another one when the page is read."""
    if registration is None:
        return "Merged and scored; not registered yet" if evaluation is not None else "Merged; not scored yet"
    version, before = registration["version"], registration.get("champion_before")
    if registration["promoted"]:
        return f"Version {version} became champion" + (
            f", in place of version {before}" if before != version and before else ""
        )
    if "champion" in registration["aliases"]:
        return f"Version {version} stayed champion"
    if registration.get("awaits_approval"):
        return f"Version {version} passed every gate, and its promotion needed approval"
    stayed = f"version {before} stayed champion" if before is not None else "there was no champion"
    return f"Version {version} was not promoted; {stayed}"


def _best(mean: Mapping[str, Any]) -> str | None:
    return max(mean["baselines"], key=lambda name: mean["baselines"][name]["accuracy"], default=None)


def _range(interval: list[float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}" if metric in {"perplexity", "nll"} or metric.startswith("loss") else f"{100 * value:.1f}"


def scores_section(evaluation: Mapping[str, Any]) -> Section:
    """Task × method with intervals, the bars, what is significant, and calibration."""
    suites = evaluation["suites"]
    methods = list(dict.fromkeys(name for suite in suites.values() for name in suite["baselines"]))
    order = ["base", *methods, "merged", "expert"]
    rows: list[list[object]] = []
    for name, suite in suites.items():
        scores = {"base": suite["base"], **suite["baselines"], "merged": suite["merged"], "expert": suite["expert"]}
        best = _winner({who: scores.get(who) for who in order[:-1]}, suite["higher_is_better"])
        cells = [_cell(scores.get(who), suite["metric"], suite["intervals"].get(who), who == best) for who in order]
        ratio = _small(percent(suite["normalised"]), suite["intervals"].get("normalised"))
        rows.append([name, _task(suite), *cells, ratio])
    mean = evaluation["mean"]
    if mean["merged"] is not None:
        cells = []
        figures = {
            "base": (mean["base"], mean["base_interval"]),
            "merged": (mean["merged"], mean["interval"]),
            "expert": (mean["expert"], mean["expert_interval"]),
        } | {who: (one["accuracy"], one["interval"]) for who, one in mean["baselines"].items()}
        best = _winner({who: figures[who][0] for who in order[:-1] if who in figures}, True)
        for who in order:
            value, interval = figures.get(who, (None, None))
            cells.append(_cell(value, "accuracy", interval, who == best))
        rows.append(["all tasks", f"{mean['examples']} examples", *cells,
                     _small(percent(mean["normalised"]), mean["normalised_interval"])])  # fmt: skip
    body = [
        table(
            ["task", "metric", *map(method_name, order), "normalised"],
            rows,
            text_columns=2,
            last_is_total=mean["merged"] is not None,
        ),
        paragraph(
            "Scores in percent where they are shares; small: 95 % bootstrap intervals over the examples, "
            f"{evaluation['bootstrap']['samples']} resamples. Bold: the best besides the expert. Normalised is merged "
            "÷ expert; the mean of the tasks' ratios stands in the last row, the ratio of the means "
            f"is {percent(mean.get('normalised_ratio_of_means'))}.",
            "note",
        ),
    ]
    if any(suite["expert"] for suite in suites.values()):
        body.append(
            figure(Safe(bars_svg(evaluation)), "Each method's share of the task's own expert, the dashed line.")
        )
    if mean.get("lead"):
        body += [subheading("Ahead of the others?"), _leads(mean)]
    calibration = _calibration(suites, order)
    if calibration:
        body += [subheading("Calibration"), calibration]
    return Section("scores", "Scores", Safe("".join(body)))


def _task(suite: Mapping[str, Any]) -> Safe:
    return Safe(f"{esc(suite['metric'])}<small>{esc(suite['examples'])} examples</small>")


def _winner(scores: Mapping[str, float | None], up: bool) -> str | None:
    known = {name: value if up else -value for name, value in scores.items() if value is not None}
    return max(known, key=lambda name: known[name], default=None)


def _cell(value: float | None, metric: str, interval: list[float] | None, best: bool) -> Safe:
    text = esc(_number(value, metric))
    if interval is not None:
        low, high = (_number(end, metric) for end in interval)
        text = Safe(f"{text}<small>{esc(low)}–{esc(high)}</small>")
    return Safe(f'<span class="best">{text}</span>') if best else text


def _small(text: str, interval: list[float] | None) -> Safe:
    return esc(text) if interval is None else Safe(f"{esc(text)}<small>{esc(_range(interval))}</small>")


def _leads(mean: Mapping[str, Any]) -> Safe:
    rows = []
    for name, ahead in mean["lead"].items():
        low, high = ahead["interval"]
        kind, word = ("good", "ahead") if low > 0 else ("bad", "behind") if high < 0 else ("even", "within the noise")
        p = ahead.get("p_value")
        rows.append(
            [
                method_name(name),
                points(ahead["difference"]),
                f"{points(low)} to {points(high)}",
                "–" if p is None else f"{ahead['ours_only']} : {ahead['theirs_only']}",
                "–" if p is None else ("< 0.0001" if p < 1e-4 else f"{p:.4f}"),
                Safe(f'<span class="{kind}">{word}</span>'),
            ]
        )
    headings = ["merged against", "difference, points", "95 % interval, paired", "right alone, ours : theirs",
                "p (McNemar, exact)", "verdict"]  # fmt: skip
    return table(headings, rows)


def _calibration(suites: Mapping[str, Any], order: list[str]) -> Safe | None:
    """Mean expected calibration error and negative log-likelihood over the suites that have them."""
    rows = []
    for who in order:
        found = [suite["scores"][who] for suite in suites.values() if "ece" in suite["scores"].get(who, {})]
        if found:
            rows.append(
                [
                    method_name(who),
                    percent(sum(one["ece"] for one in found) / len(found)),
                    f"{sum(one['nll'] for one in found) / len(found):.3f}",
                    percent(sum(one["macro_f1"] for one in found) / len(found)),
                ]
            )
    headings = ["model", "expected calibration error", "negative log-likelihood, nats", "macro-F1"]
    return table(headings, rows) if rows else None
