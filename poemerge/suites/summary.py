"""What metrics/evaluation.json says: scores with intervals by suite, their means, and our lead over each method."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poemerge.suites.evaluation import OpenSuite, Results
from poemerge.suites.scores import (
    Columns,
    Metric,
    interval,
    mcnemar,
    mean_of_ratios,
    normalised,
    ratio_of_means,
    resampled,
)
from poemerge.suites.store import ScoreStore

__all__ = ["summarise", "table_of", "verdict_of"]

Floats = NDArray[np.float64]
LEVEL = 0.95
OURS, EXPERT, BASE = "merged", "expert", "base"


def summarise(
    suites: Sequence[OpenSuite], results: Results, store: ScoreStore, root: Path, *, samples: int, seed: int
) -> dict[str, Any]:
    """The content of metrics/evaluation.json but for its times.

    Arguments: `samples` bootstrap resamples of each suite's examples, the same for every model, drawn by `seed` and the
    suite's name; `root`, what paths of predictions are relative to.
    """
    tables: dict[str, Any] = {}
    points: dict[str, dict[str, float]] = {}
    draws: dict[str, dict[str, Floats]] = {}
    for suite in suites:
        row, metric = results[suite.name], suite.suite.metric
        columns = {name: predictions for name, (_, predictions) in row.items()}
        points[suite.name] = {name: metric(predictions) for name, predictions in columns.items()}
        rng = np.random.default_rng([seed, zlib.crc32(suite.name.encode())])
        drawn = resampled(metric, list(columns.values()), samples=samples, rng=rng)
        draws[suite.name] = dict(zip(columns, drawn, strict=True))
        tables[suite.name] = _suite(suite, metric, columns, points[suite.name], draws[suite.name]) | {
            "scores": {name: dict(scored.scores) for name, (scored, _) in row.items()},
            "predictions": {
                name: store.parquet(scored.key).relative_to(root).as_posix() for name, (scored, _) in row.items()
            },
        }
    return {
        "suites": tables,
        "mean": _mean(suites, points, draws, tables),
        "bootstrap": {"samples": samples, "seed": seed, "level": LEVEL},
    }


def _suite(
    suite: OpenSuite,
    metric: Metric,
    columns: Mapping[str, Columns],
    point: Mapping[str, float],
    draw: Mapping[str, Floats],
) -> dict[str, Any]:
    up = metric.higher_is_better
    paired = EXPERT in point and OURS in point
    methods = [name for name in point if name not in (OURS, EXPERT, BASE)]
    rivals = [name for name in (BASE, *methods) if name in point and OURS in point]
    return {
        "kind": suite.spec.settings.kind,
        "metric": metric.name,
        "higher_is_better": up,
        "examples": suite.examples,
        "expert_name": suite.expert,
        "data_digest": suite.data_digest,
        BASE: point.get(BASE),
        EXPERT: point.get(EXPERT),
        OURS: point.get(OURS),
        "normalised": _number(normalised(point[OURS], point[EXPERT], up)) if paired else None,
        "interval": list(interval(draw[OURS])) if OURS in draw else None,
        "baselines": {name: point[name] for name in methods},
        "intervals": {name: list(interval(values)) for name, values in draw.items()}
        | ({"normalised": _interval(normalised(draw[OURS], draw[EXPERT], up))} if paired else {}),
        "lead": {
            name: _lead(point[OURS] - point[name], draw[OURS] - draw[name], up) | _mcnemar(columns[OURS], columns[name])
            for name in rivals
        },
    }


def _lead(difference: float, draws: Floats, up: bool) -> dict[str, Any]:
    """How far we are ahead, positive where we are better, with the paired interval."""
    sign = 1.0 if up else -1.0
    return {"difference": sign * difference, "interval": list(interval(sign * draws))}


def _right(columns: Columns) -> NDArray[np.bool_] | None:
    for target, predicted in (("target", "predicted"), ("target_text", "predicted_text")):
        if target in columns and predicted in columns:
            return np.asarray(columns[target] == columns[predicted])
    return None


def _mcnemar(ours: Columns, theirs: Columns) -> dict[str, Any]:
    first, second = _right(ours), _right(theirs)
    if first is None or second is None:
        return {}
    test = mcnemar(first, second)
    return {"ours_only": test.first_only, "theirs_only": test.second_only, "p_value": test.p_value}


def _mean(
    suites: Sequence[OpenSuite],
    points: Mapping[str, Mapping[str, float]],
    draws: Mapping[str, Mapping[str, Floats]],
    tables: Mapping[str, Any],
) -> dict[str, Any]:
    """Means over the suites that have an expert and whose score is better when higher.

    A perplexity and an accuracy have no common mean: suites of the other sort count in none of these figures.
    """
    chosen = [s.name for s in suites if s.suite.metric.higher_is_better and EXPERT in points[s.name]]
    everyone = [name for name in (points[chosen[0]] if chosen else ()) if all(name in points[s] for s in chosen)]
    out: dict[str, Any] = {"suites": chosen, "examples": sum(tables[name]["examples"] for name in chosen)}
    point = {name: np.array([points[suite][name] for suite in chosen]) for name in everyone}
    draw = {name: np.stack([draws[suite][name] for suite in chosen]) for name in everyone}
    figures: dict[str, dict[str, Any]] = {
        name: {
            "accuracy": float(point[name].mean()),
            "interval": list(interval(draw[name].mean(0))),
            "normalised": _number(mean_of_ratios(point[name], point[EXPERT])),
            "normalised_interval": _interval(mean_of_ratios(draw[name], draw[EXPERT])),
            "normalised_ratio_of_means": _number(ratio_of_means(point[name], point[EXPERT])),
            "normalised_ratio_of_means_interval": _interval(ratio_of_means(draw[name], draw[EXPERT])),
        }
        for name in everyone
    }
    for name in (BASE, EXPERT, OURS):
        out[name] = figures[name]["accuracy"] if name in figures else None
    ours = figures.get(OURS, {})
    for key in ("normalised", "normalised_ratio_of_means", "interval"):
        out[key] = ours.get(key)
    for key in ("normalised_interval", "normalised_ratio_of_means_interval"):
        out[key] = ours.get(key)
    out["base_interval"] = figures.get(BASE, {}).get("interval")
    out["base_normalised"] = figures.get(BASE, {}).get("normalised")
    out["expert_interval"] = figures.get(EXPERT, {}).get("interval")
    out["baselines"] = {name: figures[name] for name in everyone if name not in (BASE, EXPERT, OURS)}
    out["lead"] = {
        name: _lead(point[OURS].mean() - point[name].mean(), draw[OURS].mean(0) - draw[name].mean(0), True)
        | _pooled(tables, chosen, name)
        for name in everyone
        if name not in (EXPERT, OURS) and OURS in figures
    }
    return out


def _pooled(tables: Mapping[str, Any], suites: Sequence[str], name: str) -> dict[str, Any]:
    """McNemar over the examples of all suites together."""
    from scipy.stats import binomtest

    leads = [tables[suite]["lead"][name] for suite in suites]
    if not leads or any("p_value" not in lead for lead in leads):
        return {}
    ours, theirs = (sum(lead[side] for lead in leads) for side in ("ours_only", "theirs_only"))
    p = float(binomtest(ours, ours + theirs, 0.5).pvalue) if ours + theirs else 1.0
    return {"ours_only": ours, "theirs_only": theirs, "p_value": p}


def _number(value: Floats) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(draws: Floats) -> list[float] | None:
    return None if np.isnan(draws).any() else list(interval(draws))


def table_of(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows suite × (base, each baseline, merged, expert, normalised), the mean last, in fractions."""
    suites, mean = evaluation["suites"], evaluation["mean"]
    methods = list(dict.fromkeys(name for suite in suites.values() for name in suite["baselines"]))
    rows = [
        {"task": name, BASE: suite[BASE]}
        | {method: suite["baselines"].get(method) for method in methods}
        | {OURS: suite[OURS], EXPERT: suite[EXPERT], "normalised": suite["normalised"]}
        for name, suite in suites.items()
    ]
    if mean["suites"]:
        rows.append(
            {"task": "mean", BASE: mean[BASE]}
            | {method: mean["baselines"].get(method, {}).get("accuracy") for method in methods}
            | {OURS: mean[OURS], EXPERT: mean[EXPERT], "normalised": mean["normalised"]}
        )
    return rows


def verdict_of(evaluation: Mapping[str, Any]) -> str:
    """The outcome in one line: the merged mean, its share of the experts', and its lead over the best other method."""
    mean = evaluation["mean"]
    if mean[OURS] is None:
        return f"{len(evaluation['suites'])} suites scored"
    line = f"merged {mean[OURS]:.4f}, {mean['normalised']:.1%} of the experts' ({mean[EXPERT]:.4f})"
    if not mean["baselines"]:
        return line
    best = max(mean["baselines"], key=lambda name: mean["baselines"][name]["accuracy"])
    lead = mean["lead"][best]
    low, high = lead["interval"]
    sure = "inside the noise" if low <= 0 <= high else "outside the noise"
    return f"{line}; {lead['difference']:+.4f} over {best}, the best other ({sure}: {low:+.4f} to {high:+.4f})"
