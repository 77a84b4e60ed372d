"""What a candidate must show before it may become champion: pure judgements over scores, weights and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from poemerge.params import GateParams, parse_bytes
from poemerge.suites.scores import Columns, interval, mcnemar, metric_named, normalised, resampled

__all__ = ["Evidence", "Gate", "Scored", "Verdict", "judge", "passed"]

Verdict = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class Scored:
    """One suite of one model: the `metric`, the model's `score` and its task model's (`expert`, None where it has
    none), the digest of the data, and the predictions by column, `[example]`, where they are kept.
    """

    metric: str
    score: float
    expert: float | None
    data_digest: str
    predictions: Columns | None = None


@dataclass(frozen=True)
class Evidence:
    """What the gates look at in a candidate.

    Arguments: its `suites`; `weight_shares`, by expert, its share of the weights in each matrix of the ledger;
    `nonfinite`, names of tensors that hold NaN or infinity; `licenses` by source (None: unknown); `size` of its files
    in bytes; `withdrawn`, why an earlier promotion of it was rolled back, or None.
    """

    suites: Mapping[str, Scored]
    weight_shares: Mapping[str, Sequence[float]] = field(default_factory=dict)
    nonfinite: Sequence[str] = ()
    licenses: Mapping[str, str | None] = field(default_factory=dict)
    size: int = 0
    withdrawn: str | None = None


@dataclass(frozen=True)
class Gate:
    """One judgement: `verdict`, the `figures` it rests on, and the `reason` in words."""

    name: str
    verdict: Verdict
    figures: dict[str, Any]
    reason: str


def passed(gates: Sequence[Gate]) -> bool:
    """Whether no gate failed."""
    return all(gate.verdict != "fail" for gate in gates)


def judge(
    candidate: Evidence,
    champion: Mapping[str, Scored] | str,
    rules: GateParams,
    *,
    samples: int = 2_000,
    seed: int = 0,
) -> list[Gate]:
    """Every gate's verdict on `candidate` against the `champion`'s suites (a text: why there is nothing to compare
    with).

    Champion and candidate must have been scored on the same data: a suite whose data digests differ fails, it is
    never compared. `samples` bootstrap resamples, drawn with `seed`.
    """
    return [
        *_against_champion(candidate.suites, champion, rules, samples, seed),
        _floors(candidate.suites, rules),
        _heard(candidate.weight_shares, rules),
        _finite(candidate.nonfinite),
        _licenses(candidate.licenses, rules),
        _size(candidate.size, rules),
        _not_withdrawn(candidate.withdrawn),
    ]


def _against_champion(
    candidate: Mapping[str, Scored], champion: Mapping[str, Scored] | str, rules: GateParams, samples: int, seed: int
) -> list[Gate]:
    if isinstance(champion, str):
        return [Gate("mean", "skip", {}, champion), Gate("suites", "skip", {}, champion)]
    common = [name for name in candidate if name in champion]
    foreign = [name for name in common if candidate[name].data_digest != champion[name].data_digest]
    if foreign or not common:
        what = f"scored on different data: {', '.join(foreign)}" if foreign else "no suite in common with the champion"
        reason = f"{what}; run `poemerge run`, which scores the champion on the candidate's data"
        return [Gate("mean", "fail", {}, reason), Gate("suites", "fail", {"suites": foreign}, reason)]
    missing = sorted(set(champion) - set(candidate))
    pairs = {name: _Pair(candidate[name], champion[name], samples, seed) for name in common}
    # A suite without a task model has nothing to be normalised by: it counts in no mean, as in the evaluation.
    counted = {name: pair for name, pair in pairs.items() if candidate[name].expert is not None}
    return [_mean(counted or pairs, rules), _suites(pairs, missing, rules)]


class _Pair:
    """Candidate and champion on one suite, both relative to the better of the task models that they were made with.

    A landing that is broken has a low score of its own; taken as the divisor it would blow the ratios up. Where there
    is no task model they are relative to the champion.
    """

    def __init__(self, candidate: Scored, champion: Scored, samples: int, seed: int) -> None:
        metric = metric_named(candidate.metric)
        higher = metric.higher_is_better
        self.score = (candidate.score, champion.score)
        experts = [score for score in (candidate.expert, champion.expert) if score is not None]
        self.expert = (max if higher else min)(experts, default=champion.score)
        self.normalised = [float(normalised(score, self.expert, higher)) for score in self.score]
        self.gain = self.normalised[0] - self.normalised[1]
        self.resampled: Any = None
        self.p_value: float | None = None
        if candidate.predictions is None or champion.predictions is None:
            return
        both = (candidate.predictions, champion.predictions)
        scores = resampled(metric, both, samples=samples, rng=np.random.default_rng(seed))
        ratios = normalised(scores, self.expert, higher)
        self.resampled = ratios[0] - ratios[1]
        if candidate.metric == "accuracy":
            right = [np.asarray(columns["target"] == columns["predicted"]) for columns in both]
            self.p_value = mcnemar(right[0], right[1]).p_value
        else:
            # Two-sided, from the share of resamples on the other side of zero.
            other_side = float(np.mean(self.resampled >= 0 if self.gain < 0 else self.resampled <= 0))
            self.p_value = min(1.0, 2 * other_side)


def _mean(pairs: Mapping[str, _Pair], rules: GateParams) -> Gate:
    """The mean normalised score must exceed the champion's by `min_gain` at least."""
    gain = float(np.mean([pair.gain for pair in pairs.values()]))
    figures: dict[str, Any] = {
        "candidate": float(np.mean([pair.normalised[0] for pair in pairs.values()])),
        "champion": float(np.mean([pair.normalised[1] for pair in pairs.values()])),
        "gain": gain,
        "min_gain": rules.min_gain,
        "suites": len(pairs),
    }
    noise = ""
    if all(pair.resampled is not None for pair in pairs.values()):
        low, high = interval(np.mean([pair.resampled for pair in pairs.values()], axis=0), 1 - rules.level)
        figures["interval"] = [low, high]
        noise = f"; {1 - rules.level:.0%} interval {low:+.4f} to {high:+.4f}"
        if low <= 0 <= high:
            noise += ", inside the noise"
    good = gain >= rules.min_gain - 1e-12
    return Gate(
        "mean",
        "pass" if good else "fail",
        figures,
        f"mean normalised score {figures['candidate']:.4f}, champion {figures['champion']:.4f}: {gain:+.4f}, at least "
        f"{rules.min_gain:+.4f} is wanted{noise}",
    )


def _suites(pairs: Mapping[str, _Pair], missing: Sequence[str], rules: GateParams) -> Gate:
    """No suite may be worse by more than `max_suite_drop` (normalised) where that is no noise at `level`."""
    figures: dict[str, Any] = {"max_suite_drop": rules.max_suite_drop, "level": rules.level, "suites": {}}
    worse: list[str] = []
    noise: list[str] = []
    for name, pair in pairs.items():
        figures["suites"][name] = {
            "candidate": pair.score[0],
            "champion": pair.score[1],
            "drop": -pair.gain,
            "p_value": pair.p_value,
        }
        if -pair.gain > rules.max_suite_drop:
            tell = f"{name} {-pair.gain:.3f}" + ("" if pair.p_value is None else f" (p {pair.p_value:.2g})")
            (worse if pair.p_value is None or pair.p_value < rules.level else noise).append(tell)
    reason = (
        f"worse than the champion by more than {rules.max_suite_drop}: {', '.join(worse)}"
        if worse
        else f"none of {len(pairs)} worse than the champion by more than {rules.max_suite_drop}"
        + (f" beyond the noise (inside it: {', '.join(noise)})" if noise else "")
    )
    if missing:
        # Leaving a suite out is the team's own act in params.yaml: a recalled expert takes its suite with it.
        figures["no_longer_scored"] = list(missing)
        reason += f"; no longer scored: {', '.join(missing)}"
    return Gate("suites", "fail" if worse else "pass", figures, reason)


def _floors(suites: Mapping[str, Scored], rules: GateParams) -> Gate:
    """Each suite with a floor must score it at least (at most, where less is better)."""
    if not rules.floors:
        return Gate("floors", "skip", {}, "no floors are set")
    figures: dict[str, Any] = {}
    below = []
    for name, floor in rules.floors.items():
        scored = suites.get(name)
        figures[name] = {"floor": floor, "score": None if scored is None else scored.score}
        if scored is None:
            below.append(f"{name} has a floor of {floor} and was not scored")
            continue
        short = scored.score < floor if metric_named(scored.metric).higher_is_better else scored.score > floor
        if short:
            below.append(f"{name} {scored.score:.4f}, floor {floor}")
    return Gate("floors", "fail" if below else "pass", figures, "; ".join(below) or "every floor is reached")


def _heard(shares: Mapping[str, Sequence[float]], rules: GateParams) -> Gate:
    """No expert may be outvoted everywhere: its largest share in any matrix, over an equal share, reaches the
    minimum.
    """
    if not shares:
        return Gate("heard", "skip", {}, "this method weighs no experts")
    largest = {name: max(values) * len(shares) for name, values in shares.items() if values}
    figures = {"min_weight_share": rules.min_weight_share, "largest_over_equal": largest}
    out = [f"{name} ({share:.3f})" for name, share in largest.items() if share < rules.min_weight_share]
    reason = (
        f"outvoted in every matrix, weight below {rules.min_weight_share} of an equal share: {', '.join(out)}"
        if out
        else "every expert has its say somewhere"
    )
    return Gate("heard", "fail" if out else "pass", figures, reason)


def _finite(nonfinite: Sequence[str]) -> Gate:
    if nonfinite:
        some = ", ".join(nonfinite[:3]) + (" …" if len(nonfinite) > 3 else "")
        return Gate("finite", "fail", {"tensors": len(nonfinite)}, f"NaN or infinity in {some}")
    return Gate("finite", "pass", {"tensors": 0}, "every tensor is finite")


def _licenses(licenses: Mapping[str, str | None], rules: GateParams) -> Gate:
    if rules.licenses is None:
        return Gate("licenses", "skip", {"found": dict(licenses)}, "no list of allowed licences is set")
    allowed = {name.lower() for name in rules.licenses}
    bad = [f"{name}: {found or 'unknown'}" for name, found in licenses.items() if (found or "").lower() not in allowed]
    figures = {"allowed": sorted(allowed), "found": dict(licenses)}
    return Gate(
        "licenses", "fail" if bad else "pass", figures, f"not allowed: {', '.join(bad)}" if bad else "all allowed"
    )


def _size(size: int, rules: GateParams) -> Gate:
    if rules.max_size is None:
        return Gate("size", "skip", {"bytes": size}, "no limit is set")
    limit = parse_bytes(rules.max_size)
    figures = {"bytes": size, "max_size": limit}
    return Gate("size", "fail" if size > limit else "pass", figures, f"{size:,} bytes, at most {limit:,}")


def _not_withdrawn(why: str | None) -> Gate:
    if why is None:
        return Gate("not_withdrawn", "pass", {}, "never rolled back")
    return Gate("not_withdrawn", "fail", {}, f"it was champion and was rolled back: {why}")
