"""The gate: a candidate passes on evidence only, better than the rule, not worse than the champion by the margin."""

from __future__ import annotations

import math
from datetime import date
from typing import Any

import pytest

from models.evaluation.bootstrap import Interval
from models.evaluation.gate import Disagreement, Evidence, GateSpec, Verdict, card, judge, tags
from models.policies.base import Value


def verdict(mine: float, rule: float, champion: float | None = None, **changed: Any) -> bool:
    said: dict[str, Any] = {"metric": "mae", "better": "lower", "margin": 0.02, "rows": 100, **changed}
    return judge(
        **said,
        candidate={said["metric"]: mine},
        rule={said["metric"]: rule},
        champion=None if champion is None else {said["metric"]: champion},
    ).passed


@pytest.mark.parametrize(
    ("better", "mine", "rule", "passes"),
    [
        ("lower", 0.99, 1.0, True),
        ("lower", 1.0, 1.0, False),
        ("lower", 1.01, 1.0, False),
        ("higher", 1.01, 1.0, True),
        ("higher", 1.0, 1.0, False),
        ("higher", 0.99, 1.0, False),
        ("lower", -2.0, -1.0, True),
        ("higher", -2.0, -1.0, False),
    ],
)
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_rule_must_be_beaten_strictly_whatever_the_margin(
    better: str, mine: float, rule: float, passes: bool, margin: float
) -> None:
    assert verdict(mine, rule, better=better, margin=margin) is passes


@pytest.mark.parametrize(
    ("better", "mine", "champion", "passes"),
    [
        ("lower", 0.5, 1.0, True),
        ("lower", 1.0, 1.0, True),
        ("lower", 1.019, 1.0, True),
        ("lower", 1.021, 1.0, False),
        ("higher", 0.981, 1.0, True),
        ("higher", 0.979, 1.0, False),
        # the margin is a share of the size of a figure: a negative one is not loosened the wrong way
        ("lower", -0.981, -1.0, True),
        ("lower", -0.979, -1.0, False),
        ("higher", -1.019, -1.0, True),
        ("higher", -1.021, -1.0, False),
    ],
)
def test_the_champion_may_be_missed_by_the_margin_only(better: str, mine: float, champion: float, passes: bool) -> None:
    rule = 9.0 if better == "lower" else -9.0
    assert verdict(mine, rule, champion, better=better) is passes


def test_without_a_margin_a_candidate_as_good_as_the_champion_passes_and_a_worse_one_does_not() -> None:
    assert verdict(1.0, 2.0, 1.0, margin=0.0)
    assert not verdict(math.nextafter(1.0, 2.0), 2.0, 1.0, margin=0.0)


def test_beating_the_champion_does_not_excuse_losing_to_the_rule() -> None:
    assert not verdict(1.0, 0.9, 5.0)


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_figure_that_is_no_number_never_passes(better: str, odd: float, place: int) -> None:
    figures = [1.0, 2.0, 1.0] if better == "lower" else [1.0, 0.5, 1.0]
    assert verdict(*figures, better=better)
    figures[place] = odd
    assert not verdict(*figures, better=better)


@pytest.mark.parametrize("place", ["candidate", "rule", "champion"])
def test_a_missing_figure_never_passes_and_is_named(place: str) -> None:
    who = {"candidate": {"mae": 1.0, "bias": 0.0}, "rule": {"mae": 2.0}, "champion": {"mae": 1.0}}
    who[place] = {"bias": 0.0}
    found = judge(metric="mae", better="lower", margin=0.0, rows=9, **who)  # type: ignore[arg-type]
    assert not found.passed
    assert any("mae" in reason and "bias" in reason and place in reason for reason in found.reasons)


def test_no_held_out_rows_is_no_evidence() -> None:
    assert not verdict(0.1, 9.0, 9.0, rows=0)


def test_every_comparison_is_told_with_its_figures() -> None:
    found = judge(
        metric="mae", better="lower", margin=0.02, rows=77, candidate={"mae": 1.5}, rule={"mae": 2.5},
        champion={"mae": 1.0},
    )  # fmt: skip
    assert len(found.reasons) == 2
    assert all("1.5" in reason and "77" in reason for reason in found.reasons)
    assert "beats the rule's 2.5" in found.reasons[0]
    assert "is worse than the champion's 1" in found.reasons[1] and "2.0%" in found.reasons[1]
    assert any("no champion" in reason for reason in judge(
        metric="mae", better="lower", margin=0.0, rows=1, candidate={"mae": 1.0}, rule={"mae": 2.0}, champion=None
    ).reasons)  # fmt: skip


@pytest.mark.parametrize("passed", [True, False])
def test_the_card_says_the_verdict_the_figures_and_what_it_was_made_from(passed: bool) -> None:
    figures = {"candidate": {"mae": 1.25, "bias": -0.5}, "rule": {"mae": 2.0 if passed else 1.0}}
    found = judge(metric="mae", better="lower", margin=0.0, rows=5, champion=None, **figures)
    text = card(
        name="shop", description="What it is for.", trained_day=date(2026, 3, 9), verdict=found, metrics=figures,
        facts={"code commit": "abc", "held-out rows": 5},
    )  # fmt: skip
    assert ("passed" in text) is passed and ("refused" in text) is not passed
    assert "2026-03-09" in text and "What it is for." in text
    assert "| mae | 1.25 |" in text
    assert "| bias | -0.5 | – |" in text  # a figure that the rule does not have
    assert "code commit: abc" in text
    assert all(reason in text for reason in found.reasons)


def _judged_by(worth: Value) -> Verdict:
    """Everything else is as it should be."""
    evidence = Evidence("champion", None, {}, {"held-out days": worth}, (), (), ("bias", 0.0, 0.0), 1.0, 1e6)
    return judge(
        metric="mae", better="lower", margin=0.02, rows=9, candidate={"mae": 1.0}, rule={"mae": 2.0},
        champion={"mae": 1.0}, evidence=evidence, spec=GateSpec(value_margin=0.02),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("point", "low", "high", "passes"),
    [(0.05, 0.01, 0.09, False), (0.05, -0.01, 0.11, True), (0.015, 0.01, 0.02, True), (0.05, None, None, True)],
)
def test_what_the_policy_is_worth_refuses_beyond_its_margin_and_beyond_noise(
    point: float, low: float | None, high: float | None, passes: bool
) -> None:
    worth = Value(0.10, 0.10 + point, Interval(point, low, high, 0.01, 7, 99), "what was moved", "the coin is fair")
    found = _judged_by(worth)
    assert found.passed is passes
    assert any("policy's value on the held-out days: 10.00% beside the champion's" in r for r in found.reasons)
    assert found.figures["policy_value"]["held-out days"]["harm"]["point"] == point


@pytest.mark.parametrize(("low", "passes"), [(0.01, False), (-0.01, True)])
def test_a_plan_that_loses_by_itself_is_refused_beside_a_champion_that_loses_as_much(low: float, passes: bool) -> None:
    same = Interval(0.0, 0.0, 0.0, 1.0, 7, 99)
    worth = Value(-0.05, -0.05, same, "what was moved", "the coin is fair", Interval(0.05, low, 0.09, 0.01, 7, 99))
    found = _judged_by(worth)
    assert found.passed is passes
    assert any("beside moving nothing" in r for r in found.reasons) is not passes


def held_by(found: Disagreement | str | None, **spec: Any) -> Verdict:
    evidence = Evidence(
        "champion",
        Interval(0.0, -0.01, 0.01, 0.5, 7, 100),
        {},
        {},
        (),
        (),
        ("calibration error", 0.01, 0.01),
        1.0,
        1e4,
        found,
    )
    return judge(
        metric="mae", better="lower", margin=0.02, candidate={"mae": spec.pop("mine", 1.0)}, rule={"mae": 2.0},
        champion={"mae": 1.0}, rows=100, evidence=evidence, spec=GateSpec(**spec),
    )  # fmt: skip


def test_what_disagrees_with_the_champion_far_more_than_its_twin_does_is_held_for_a_person() -> None:
    found = held_by(Disagreement(0.0096, 0.001, 700))
    assert not found.passed and found.held and found.word == "held"
    (said,) = [r for r in found.reasons if "held for a person" in r]
    assert (
        "on the 700 newest rows" in said
        and "9.6 times" in said
        and "5 are allowed" in said
        and "moving the alias" in said
    )
    assert found.figures["disagreement"] == {"newest": 0.0096, "twins": 0.001, "ratio": 9.6, "rows": 700}
    assert tags(found)["signalbox.gate_disagreement"] == "9.6 times the twins'" and "signalbox.gate_held" in tags(found)


@pytest.mark.parametrize("ratio", [0.4, 3.2, 5.0])
def test_what_disagrees_as_twins_do_passes(ratio: float) -> None:
    found = held_by(Disagreement(ratio / 1000, 0.001, 700))
    assert found.passed and not found.held and found.word == "passed" and "signalbox.gate_held" not in tags(found)
    assert any("times as much as their twins, 5 are allowed" in r for r in found.reasons)


def test_what_is_refused_is_not_held_and_a_limit_can_be_set_or_taken_away() -> None:
    spoilt = Disagreement(0.0096, 0.001, 700)
    refused = held_by(spoilt, mine=1.5)
    assert not refused.passed and not refused.held and refused.word == "refused"
    assert held_by(spoilt, disagreement=10).passed and held_by(spoilt, disagreement=None).passed
    assert held_by(Disagreement(0.001, 0.001, 700), disagreement=0.5).held


def test_a_disagreement_that_could_not_be_measured_is_said() -> None:
    found = held_by("not measured, version 3 has no twin: its run says no recipe")
    assert found.passed and found.figures["disagreement"].startswith("not measured")
    assert (
        "disagreement on the newest rows: not measured, version 3 has no twin: its run says no recipe" in found.reasons
    )
    text = card(name="shop", description="", trained_day=date(2026, 3, 9), verdict=found, metrics={}, facts={})
    assert "| disagreement on the newest rows | not measured" in text


def test_a_disagreement_that_is_no_number_is_not_within_the_limit() -> None:
    found = held_by(Disagreement(float("nan"), 0.001, 700))
    assert not any("are allowed" in r for r in found.reasons)
    assert any(r.startswith("disagreement on the newest rows: not measured: ") for r in found.reasons)
    assert found.figures["disagreement"].startswith("not measured: ")


@pytest.mark.parametrize(
    ("low", "same_rows", "how", "passes"),
    [
        (-0.02, 1.05, "point", True),
        (-0.02, 1.04, "point", True),
        (-0.02, 1.02, "point", False),
        (-0.02, math.nan, "point", False),
        (0.01, 1.05, "point", False),
        (None, 1.05, "point", False),
        (-0.02, None, "point", False),
        (-0.02, 1.05, "interval", False),
    ],
    ids=[
        "may be chance", "within the margin", "a worse recipe", "no figure", "no chance", "nobody knows", "unknown recipe",
        "to be proven",
    ],
)  # fmt: skip
def test_what_newer_rows_are_worth_may_be_chance_and_what_the_recipe_is_worth_may_not(
    low: float | None, same_rows: float | None, how: str, passes: bool
) -> None:
    harm = Interval(0.05, low, None if low is None else 0.11, 0.1, 7, 100)
    evidence = Evidence("champion", harm, {}, {}, (), (), ("calibration error", 0.01, 0.01), 1.0, 1e4)
    said: dict[str, Any] = {"metric": "mae", "better": "lower", "margin": 0.02, "rows": 100, "evidence": evidence}
    figures = {"candidate": {"mae": 1.05}, "rule": {"mae": 2.0}, "champion": {"mae": 1.0}}
    found = judge(**said, **figures, spec=GateSpec(evidence=how), same_rows=same_rows)
    assert found.passed is passes
    if same_rows == 1.02:
        told = "mae 1.05 is worse than that of the champion's recipe on the same rows, 1.02 by more than 2.0%"
        assert any(reason.startswith(told) for reason in found.reasons)
    if passes:
        assert found.figures["champion's recipe"] == same_rows
        assert any("a difference of +5.00% [-2.00%, +11.00%] may be chance" in reason for reason in found.reasons)
        alike = "the champion's recipe on the same rows has the same mae" in found.reasons
        assert alike is (same_rows == 1.05), "an ordinary retraining has the champion's recipe"
        beaten = {**figures, "rule": {"mae": 1.04}}
        assert not judge(**said, **beaten, spec=GateSpec(), same_rows=same_rows).passed, "the rule must be beaten"


def test_newer_rows_do_not_excuse_a_worse_recipe() -> None:
    harm = Interval(-0.2, -0.3, -0.1, 0.99, 7, 100)
    evidence = Evidence("champion", harm, {}, {}, (), (), ("calibration error", 0.01, 0.01), 1.0, 1e4)
    said: dict[str, Any] = {"metric": "mae", "better": "lower", "margin": 0.02, "rows": 100, "evidence": evidence}
    figures = {"candidate": {"mae": 1.0}, "rule": {"mae": 2.0}, "champion": {"mae": 1.25}}
    assert judge(**said, **figures, same_rows=0.99).passed
    assert not judge(**said, **figures, same_rows=0.9).passed


@pytest.mark.parametrize(("how", "passes"), [("point", True), ("interval", False)])
def test_a_metric_without_an_interval_proves_nothing_where_proof_is_asked_for(how: str, passes: bool) -> None:
    evidence = Evidence(
        "champion", None, {}, {}, (), (), ("calibration error", 0.01, 0.01), 1.0, 1e4, no_interval="no mean over rows"
    )
    found = judge(
        metric="auc", better="higher", margin=0.02, candidate={"auc": 0.8}, rule={"auc": 0.7}, champion={"auc": 0.8},
        rows=100, evidence=evidence, spec=GateSpec(evidence=how),
    )  # fmt: skip
    assert found.passed is passes
    assert any("auc has no interval" in reason and "no mean over rows" in reason for reason in found.reasons)


def test_two_models_that_no_row_tells_apart_are_not_said_to_be_equal() -> None:
    for width, said in ((0.0, True), (0.01, False)):
        harm = Interval(0.0, -width, width, 0.5, 7, 100)
        evidence = Evidence("champion", harm, {}, {}, (), (), ("calibration error", 0.01, 0.01), 1.0, 1e4)
        found = judge(
            metric="mae", better="lower", margin=0.02, candidate={"mae": 1.0}, rule={"mae": 2.0},
            champion={"mae": 1.0}, rows=100, evidence=evidence,
        )  # fmt: skip
        assert any("no row tells them apart" in reason for reason in found.reasons) is said


def test_what_the_champion_really_scored_stands_beside() -> None:
    live = {"version": 3, "metric": "mae", "value": 1.25, "rows": 70, "days": ["2026-03-02", "2026-03-08"], "at": ""}
    found = held_by(None).told(live=live)
    said = "live, version 3's mae was 1.25 on 70 rows of 2026-03-02 to 2026-03-08"
    assert tags(found)["signalbox.gate_live"] == said
    text = card(name="shop", description="", trained_day=date(2026, 3, 9), verdict=found, metrics={}, facts={})
    assert f"Beside it: {said}." in text
