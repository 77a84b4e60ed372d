"""The gates as pure judgements: what counts as worse, what is noise, and that different data is never compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poemerge.params import GateParams
from poemerge.registry.gates import Evidence, Gate, Scored, judge, passed

EXAMPLES = 400


def scored(right: int, *, of: int = EXAMPLES, offset: int = 0, expert: float | None = 0.9, data: str = "d1") -> Scored:
    """A suite of which `right` examples in a row, from `offset` on, are right."""
    predicted = np.zeros(of, dtype=np.int64)
    predicted[(offset + np.arange(right)) % of] = 1
    columns = {"target": np.ones(of, dtype=np.int64), "predicted": predicted}
    return Scored("accuracy", right / of, expert, data, columns)


def gates(
    candidate: Mapping[str, Scored],
    champion: Mapping[str, Scored] | str,
    rules: dict[str, Any] | None = None,
    **facts: Any,
) -> dict[str, Gate]:
    found = judge(Evidence(candidate, **facts), champion, GateParams.model_validate(rules or {}), samples=300)
    return {gate.name: gate for gate in found}


def test_a_first_candidate_is_not_compared() -> None:
    found = gates({"a": scored(300)}, "there is no champion yet")
    assert (found["mean"].verdict, found["suites"].verdict) == ("skip", "skip")
    assert passed(list(found.values()))


def test_better_passes_and_says_by_how_much() -> None:
    found = gates({"a": scored(320), "b": scored(300)}, {"a": scored(300), "b": scored(300)})
    assert found["mean"].verdict == "pass"
    assert found["mean"].figures["gain"] == pytest.approx(20 / 400 / 0.9 / 2)
    low, high = found["mean"].figures["interval"]
    assert low < found["mean"].figures["gain"] < high


def test_a_broken_task_model_does_not_inflate_what_it_divides() -> None:
    """Task model b scores 0.1: relative to it a gain of 2 % in b would count as 20 % and hide the loss in a."""
    candidate = {"a": scored(290), "b": scored(308, expert=0.1)}
    champion = {"a": scored(300), "b": scored(300)}
    found = gates(candidate, champion)
    assert found["mean"].figures["gain"] == pytest.approx((8 - 10) / 400 / 0.9 / 2)
    assert found["mean"].verdict == "fail"


def test_a_lower_mean_fails_and_a_margin_is_wanted_in_full() -> None:
    same = {"a": scored(300)}
    assert gates(same, same)["mean"].verdict == "pass"
    assert gates({"a": scored(299)}, same)["mean"].verdict == "fail"
    assert gates({"a": scored(301)}, same, {"min_gain": 0.01})["mean"].verdict == "fail"
    assert gates({"a": scored(310)}, same, {"min_gain": 0.01})["mean"].verdict == "pass"
    assert gates({"a": scored(299)}, same, {"min_gain": -0.01})["mean"].verdict == "pass"


def test_a_suite_that_is_clearly_worse_fails_even_when_the_mean_rises() -> None:
    found = gates({"a": scored(250), "b": scored(390)}, {"a": scored(300), "b": scored(300)})
    assert found["mean"].verdict == "pass"
    assert found["suites"].verdict == "fail"
    assert "a 0.139" in found["suites"].reason
    assert found["suites"].figures["suites"]["a"]["p_value"] < 1e-6


def test_a_drop_inside_the_noise_does_not_count() -> None:
    """20 examples in 400 fewer, but 180 and 200 discordant ones: McNemar's p is 0.33."""
    champion, candidate = scored(200), scored(180, offset=200)
    found = gates({"a": candidate}, {"a": champion}, {"min_gain": -1.0})
    assert found["suites"].figures["suites"]["a"]["drop"] == pytest.approx(0.05 / 0.9)
    assert found["suites"].verdict == "pass"
    assert "inside it: a" in found["suites"].reason
    again = gates({"a": scored(180)}, {"a": champion}, {"min_gain": -1.0})
    assert again["suites"].verdict == "fail", "the same drop without a single example gained is no noise"


def test_a_drop_within_the_tolerance_passes_however_sure_it_is() -> None:
    found = gates({"a": scored(3930, of=4000)}, {"a": scored(3980, of=4000)}, {"min_gain": -1.0})
    assert found["suites"].figures["suites"]["a"]["p_value"] < 1e-6
    assert found["suites"].verdict == "pass"


def test_different_data_is_never_compared() -> None:
    found = gates({"a": scored(400, data="d2")}, {"a": scored(300, data="d1")})
    assert (found["mean"].verdict, found["suites"].verdict) == ("fail", "fail")
    assert "different data: a" in found["mean"].reason


def test_metrics_other_than_accuracy_are_judged_by_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    nll = rng.gamma(2.0, 1.0, 500)

    def losses(values: Any) -> Scored:
        return Scored("loss", float(values.mean()), 1.5, "d", {"value": values})

    worse = gates({"a": losses(nll + 0.3)}, {"a": losses(nll)}, {"min_gain": -1.0})
    assert worse["suites"].verdict == "fail"
    noisy = gates({"a": losses(rng.permutation(nll) + 0.05)}, {"a": losses(nll)}, {"min_gain": -1.0})
    assert noisy["suites"].verdict == "pass"
    assert noisy["suites"].figures["suites"]["a"]["p_value"] > 0.05


def test_a_suite_that_is_no_longer_scored_is_told_and_does_not_hold_up_a_recall() -> None:
    found = gates({"a": scored(300)}, {"a": scored(300), "poisoned": scored(300)})
    assert found["suites"].verdict == "pass"
    assert "no longer scored: poisoned" in found["suites"].reason


def test_floors_hold_for_each_suite_named() -> None:
    rules = {"floors": {"a": 0.8, "gone": 0.1}}
    found = gates({"a": scored(300)}, "first", rules)
    assert found["floors"].verdict == "fail"
    assert "a 0.7500, floor 0.8" in found["floors"].reason
    assert "gone has a floor of 0.1 and was not scored" in found["floors"].reason
    assert gates({"a": scored(330)}, "first", {"floors": {"a": 0.8}})["floors"].verdict == "pass"


def test_an_expert_outvoted_everywhere_fails() -> None:
    shares = {"a": [0.6, 0.49], "b": [0.39, 0.5], "c": [0.01, 0.01]}
    rules = {"min_weight_share": 0.1}
    assert gates({}, "first", rules, weight_shares=shares)["heard"].verdict == "fail"
    assert "c (0.030)" in gates({}, "first", rules, weight_shares=shares)["heard"].reason
    heard_once = shares | {"c": [0.01, 0.2]}
    assert gates({}, "first", rules, weight_shares=heard_once)["heard"].verdict == "pass"


def test_files_licences_and_size() -> None:
    found = gates(
        {},
        "first",
        {"licenses": ["MIT", "apache-2.0"], "max_size": "1KB"},
        nonfinite=["encoder.w"],
        licenses={"base": "Apache-2.0", "a": None, "b": "cc-by-nc-4.0"},
        size=1001,
    )
    assert {found[name].verdict for name in ("finite", "licenses", "size")} == {"fail"}
    assert found["licenses"].reason == "not allowed: a: unknown, b: cc-by-nc-4.0"
    assert gates({}, "first", {"max_size": "1KB"}, size=1000)["size"].verdict == "pass"


def test_what_was_rolled_back_fails_its_gate() -> None:
    assert gates({}, "first", withdrawn="ann: complaints")["not_withdrawn"].verdict == "fail"


@given(st.integers(0, EXAMPLES), st.integers(0, EXAMPLES), st.integers(0, EXAMPLES - 1))
def test_candidate_and_champion_swapped_swap_the_sign(first: int, second: int, offset: int) -> None:
    one, other = scored(first), scored(second, offset=offset)
    there = gates({"a": one}, {"a": other})["mean"].figures["gain"]
    back = gates({"a": other}, {"a": one})["mean"].figures["gain"]
    assert there == pytest.approx(-back)
