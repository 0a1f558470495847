"""The priority policy: what a decision may and may not do, whatever the tickets."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.policies.priority import PriorityPolicy, coverage_curve, decide
from models.policies.ranking import index
from tests.support.properties import examples

NOON = datetime(2026, 1, 5, 12)
SPEC: dict[str, Any] = {
    "kind": "priority_queue",
    "cost": {"1": 4, "2": 2, "3": 1},
    "capacity_hours": {"mail": 16},
    "other_capacity_hours": 8,
    "late_cost": 0.05,
}

probability = st.floats(0, 1)
ticket = st.fixed_dictionaries(
    {
        "team": st.sampled_from(["mail", "network"]),
        "priority": st.integers(1, 5),
        "impact": st.integers(1, 3),
        "due": st.one_of(st.none(), st.integers(-50, 50)),
        "p_miss_now": probability,
        "p_miss_later": probability,
        "effort_hours": st.floats(0.05, 60),
        "uncertainty": probability,
        "arm": st.sampled_from(["holdout", "champion", "challenger"]),
    }
)
queues = st.lists(ticket, min_size=1, max_size=40)


def tables(tickets: list[dict[str, Any]], ids: list[str] | None = None) -> tuple[pa.Table, pa.Table, pa.Table]:
    ids = ids or [f"T{i:03d}" for i in range(len(tickets))]

    def column(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([t[name] for t in tickets], kind)

    due = [None if t["due"] is None else NOON + timedelta(hours=t["due"]) for t in tickets]
    features = pa.table(
        {
            "entity_id": ids,
            "unit": ids,
            "team": column("team", pa.string()),
            "priority": column("priority", pa.int64()),
            "impact": column("impact", pa.int64()),
            "due_at": pa.array(due, pa.timestamp("us")),
        }
    )
    names = ("p_miss_now", "p_miss_later", "effort_hours", "uncertainty")
    scores = pa.table({"entity_id": ids, **{name: column(name, pa.float64()) for name in names}})
    arms = pa.table({"unit": ids, "arm": column("arm", pa.string()), "arm_probability": [0.5] * len(ids)})
    return features, scores, arms


def one(**changes: Any) -> dict[str, Any]:
    return {
        "team": "mail", "priority": 3, "impact": 2, "due": 5, "p_miss_now": 0.1, "p_miss_later": 0.6,
        "effort_hours": 1.0, "uncertainty": 0.2, "arm": "champion", **changes,
    }  # fmt: skip


def test_the_index_is_the_expected_cost_of_waiting_per_hour_of_work() -> None:
    got = index(np.array([4.0]), np.array([0.2]), np.array([0.7]), np.array([2.5]))
    assert got[0] == pytest.approx(0.8)
    late = index(np.array([4.0]), np.array([1.0]), np.array([1.0]), np.array([2.0]), late_cost=0.05)
    assert late[0] == pytest.approx(0.1)


@settings(max_examples=examples(40))
@given(queues, st.data())
def test_a_ticket_whose_miss_costs_more_never_goes_down(tickets: list[dict[str, Any]], data: st.DataObject) -> None:
    free = [{**t, "arm": "champion", "uncertainty": 0.0} for t in tickets]
    i = data.draw(st.integers(0, len(free) - 1))
    dearer = [{**t, "impact": max(1, t["impact"] - 1)} if j == i else t for j, t in enumerate(free)]
    before = decide(*tables(free), SPEC)["after"].to_pylist()
    after = decide(*tables(dearer), SPEC)["after"].to_pylist()
    assert after[i] <= before[i]
    assert all(a >= b for j, (a, b) in enumerate(zip(after, before, strict=True)) if j != i)


@settings(max_examples=examples(40))
@given(queues)
def test_holdout_and_review_keep_their_priority_and_say_so(tickets: list[dict[str, Any]]) -> None:
    made = decide(*tables(tickets), {**SPEC, "review_above": 0.6}).to_pylist()
    for t, d in zip(tickets, made, strict=True):
        assert d["before"] == t["priority"]
        assert d["changed"] == (d["after"] != d["before"])
        assert d["review"] == (t["uncertainty"] > 0.6 and t["arm"] != "holdout")
        if t["arm"] == "holdout" or d["review"]:
            assert d["after"] == d["before"]
            assert f"priority {d['before']} stays" in d["reasons"][-1]
        assert 1 <= d["after"] <= 5
        assert d["arm"] == t["arm"]


@settings(max_examples=examples(40))
@given(queues)
def test_a_team_can_begin_everything_of_a_priority_within_its_cut(tickets: list[dict[str, Any]]) -> None:
    free = [{**t, "arm": "champion", "uncertainty": 0.0} for t in tickets]
    made = decide(*tables(free), {**SPEC, "min_gain": 0.0})["after"].to_pylist()
    for team, hours in (("mail", 16.0), ("network", 8.0)):
        for level, days in enumerate((0.1, 0.2, 0.3, 2.0), start=1):
            work = [t["effort_hours"] for t, a in zip(free, made, strict=True) if t["team"] == team and a <= level]
            assert sum(work) - max(work, default=0) <= days * hours + 1e-9 + len(work) / 3600
            if work and sum(work) < days * hours - len(work) / 3600:
                assert len(work) == sum(t["team"] == team for t in free), "a cut with room left leaves nobody behind it"


@settings(max_examples=examples(40))
@given(queues, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(tickets: list[dict[str, Any]], random: Any) -> None:
    features, scores, arms = tables(tickets)
    straight = decide(features, scores, arms, SPEC)
    mixed = list(range(len(tickets)))
    random.shuffle(mixed)
    other = list(range(len(tickets)))
    random.shuffle(other)
    shuffled = decide(features.take(mixed), scores.take(other), arms.take(other[::-1]), SPEC)
    assert shuffled.equals(straight.take(mixed))


@settings(max_examples=examples(40))
@given(queues)
def test_another_teams_tickets_change_nothing_here(tickets: list[dict[str, Any]]) -> None:
    together = decide(*tables(tickets), SPEC)
    ids = [f"T{i:03d}" for i, t in enumerate(tickets) if t["team"] == "mail"]
    alone = decide(*tables([t for t in tickets if t["team"] == "mail"], ids), SPEC) if ids else together.slice(0, 0)
    assert together.filter(pc.is_in(together["entity_id"], pa.array(ids, pa.string()))).equals(alone)


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf"), -0.1])
@pytest.mark.parametrize("name", ["p_miss_now", "p_miss_later", "effort_hours", "uncertainty"])
def test_a_ticket_without_a_usable_score_keeps_its_priority_with_that_reason(name: str, broken: float | None) -> None:
    made = decide(*tables([one(), one(**{name: broken}), one(p_miss_later=0.9)]), SPEC).to_pylist()
    assert made[1]["after"] == 3 and not made[1]["changed"] and not made[1]["review"]
    assert made[1]["expected_gain"] is None
    assert made[1]["reasons"] == ["No usable score: priority 3 stays."]
    assert made[0]["changed"] and made[2]["changed"]


def test_a_ticket_that_was_not_scored_at_all_keeps_its_priority() -> None:
    features, scores, arms = tables([one(), one()])
    made = decide(features, scores.slice(0, 1), arms, SPEC).to_pylist()
    assert [d["after"] for d in made] == [1, 3]
    nothing = decide(features, scores.slice(0, 0), arms, SPEC)
    assert nothing["after"].equals(nothing["before"])


def test_a_ticket_that_can_be_saved_goes_before_a_lost_one_and_one_with_time() -> None:
    queue = [one(p_miss_now=1.0, p_miss_later=1.0), one(), one(p_miss_now=0.0, p_miss_later=0.0)]
    assert decide(*tables(queue), SPEC)["after"].to_pylist() == [5, 1, 5]


def test_reasons_carry_the_figures_and_the_gain_its_sign() -> None:
    made = decide(*tables([one(), one(priority=1, p_miss_now=0.5, p_miss_later=0.505)]), SPEC).to_pylist()
    assert made[0]["reasons"] == [
        "Begun now it misses the service level with probability 10%, begun later with 60%.",
        "A miss costs 2.0 (impact 2), the work takes 1.0 h: index 1.010 an hour.",
        "Rank 1 of 2 in team mail, behind 0.0 h of work at 16.0 h a day: priority 1.",
    ]
    assert made[0]["expected_gain"] == pytest.approx(1.0)
    assert made[1]["expected_gain"] == pytest.approx(-0.01)
    assert made[1]["reasons"][-1].endswith("priority 5, as going first gains it nothing.")


def test_a_ticket_falls_by_no_more_than_the_largest_drop_and_rises_freely() -> None:
    lost = one(priority=1, p_miss_now=1.0, p_miss_later=1.0)
    urgent = one(priority=5)
    made = decide(*tables([lost, urgent]), {**SPEC, "largest_drop": 1}).to_pylist()
    assert [d["after"] for d in made] == [2, 1]
    assert made[0]["reasons"][-1].endswith(
        "priority 2, as going first gains it nothing; it falls no further in one day."
    )
    assert "falls no further" not in made[1]["reasons"][-1]
    assert [d["after"] for d in decide(*tables([lost, urgent]), SPEC).to_pylist()] == [5, 1]


def test_priorities_left_to_people_are_never_changed() -> None:
    made = decide(*tables([one(priority=2), one(priority=3)]), {**SPEC, "keep": [2]}).to_pylist()
    assert [d["after"] for d in made] == [2, 1]
    assert made[0]["reasons"][-1] == "This priority is left to people: priority 2 stays."


def test_capacity_may_come_from_a_feature_column() -> None:
    queue = [one(effort_hours=4.0, due=i) for i in range(4)]
    features, scores, arms = tables(queue)
    features = features.append_column("hours", pa.array([400.0] * 4))
    assert decide(features, scores, arms, {**SPEC, "capacity": "hours"})["after"].to_pylist() == [1, 1, 1, 1]
    unknown = features.set_column(features.num_columns - 1, "hours", pa.array([None] * 4, pa.float64()))
    assert decide(unknown, scores, arms, {**SPEC, "capacity": "hours"})["after"].to_pylist() == [1, 3, 4, 4]


def test_scores_of_the_same_ticket_at_another_moment_are_not_mixed_up() -> None:
    features, scores, arms = tables([one(), one()])
    features = features.append_column("moment", pa.array(["open", "open"]))
    intake = tables([one(p_miss_now=1.0, p_miss_later=1.0)] * 2)[1].append_column("moment", pa.array(["intake"] * 2))
    both = pa.concat_tables([intake, scores.append_column("moment", pa.array(["open"] * 2))])
    assert decide(features, both, arms, SPEC).equals(decide(features, scores, arms, SPEC))


def test_decisions_have_the_agreed_columns_even_without_rows() -> None:
    features, scores, arms = tables([one()])
    full, empty = decide(features, scores, arms, SPEC), decide(features.slice(0, 0), scores, arms, SPEC)
    assert full.schema == empty.schema
    assert [(f.name, str(f.type)) for f in full.schema if f.name in ("after", "expected_gain", "perturbation")] == [
        ("perturbation", "double"), ("after", "int64"), ("expected_gain", "double"),
    ]  # fmt: skip


def test_what_is_missing_or_double_is_named() -> None:
    features, scores, arms = tables([one(), one()])
    with pytest.raises(ValueError, match=r"'T001' has no arm"):
        decide(features, scores, arms.slice(0, 1), SPEC)
    with pytest.raises(ValueError, match=r"'T000' stands twice"):
        decide(features.take([0, 0]), scores, arms, SPEC)
    with pytest.raises(KeyError, match=r"features: column 'impact' is missing"):
        decide(features.drop_columns(["impact"]), scores, arms, SPEC)
    with pytest.raises(ValidationError, match="cost_bye"):
        decide(features, scores, arms, {**SPEC, "cost_bye": "x"})
    with pytest.raises(ValidationError, match="ascend"):
        PriorityPolicy(kind="priority_queue", level_days=(1.0, 0.5))
    with pytest.raises(ValidationError, match="above 0"):
        PriorityPolicy(kind="priority_queue", cost={"1": 0.0})


def test_every_field_of_the_policy_is_described() -> None:
    assert [n for n, f in PriorityPolicy.model_fields.items() if n != "kind" and not f.description] == []


def test_the_coverage_curve_says_how_rightly_is_decided_under_each_limit() -> None:
    curve = coverage_curve(
        np.array([0.9, 0.1, 0.5, 0.1]), np.array([0.6, 0.1, 0.9, 0.8]), np.array([False, False, True, True])
    )
    assert curve["limit"].to_pylist() == [0.1, 0.5, 0.9]
    assert curve["coverage"].to_pylist() == [0.5, 0.75, 1.0]
    assert curve["accuracy"].to_pylist() == [1.0, 1.0, 0.75]
    assert curve["brier"].to_pylist() == pytest.approx([0.025, 0.02, 0.105])
    with pytest.raises(ValueError, match="matured"):
        coverage_curve(np.array([]), np.array([]), np.array([]))


def confident(
    scores: pa.Table, sets: list[tuple[bool | None, bool | None]], hours: tuple[float, float] | None
) -> pa.Table:
    n = scores.num_rows
    low, high = hours or (None, None)
    return pa.table(
        {
            **{name: scores[name] for name in scores.column_names},
            "may_miss": pa.array([m for m, _ in sets], pa.bool_()),
            "may_hit": pa.array([h for _, h in sets], pa.bool_()),
            "hours_low": pa.array([low] * n, pa.float64()),
            "hours_high": pa.array([high] * n, pa.float64()),
            "confidence": pa.array([None if m is None else 0.8 for m, _ in sets], pa.float64()),
        }
    )


def test_a_ticket_whose_set_holds_both_outcomes_goes_to_people_where_the_policy_says_so() -> None:
    tickets = [
        one(uncertainty=0.1),
        one(uncertainty=0.9),
        one(uncertainty=0.9),
        one(arm="holdout"),
        one(uncertainty=0.7),
    ]
    features, scores, arms = tables(tickets)
    sets = [(True, True), (True, False), (False, False), (True, True), (None, None)]
    told = confident(scores, sets, (2.4, 30.6))
    spec = {**SPEC, "review_above": 0.6}
    made = decide(features, told, arms, {**spec, "review": "conformal"}).to_pylist()
    # without a set, the limit of the uncertainty counts
    assert [d["review"] for d in made] == [True, False, True, False, True]
    assert made[0]["reasons"][-1] == (
        "Unsure whether it misses its service level (80%): a person decides, priority 3 stays."
    )
    assert "Uncertainty 0.70 is above 0.60" in made[4]["reasons"][-1]
    assert made[0]["reasons"][0].endswith(" It is resolved in between 2 and 31 h (80%).")
    assert made[0]["after"] == made[0]["before"]
    as_before = decide(features, scores, arms, spec)
    by_limit = decide(features, told, arms, spec)
    assert [d["review"] for d in as_before.to_pylist()] == [False, True, True, False, True]
    for name in as_before.column_names:
        if name != "reasons":
            assert by_limit[name].equals(as_before[name])
    nothing = confident(scores, [(None, None)] * 5, None)
    assert decide(features, nothing, arms, spec).equals(as_before), "without an interval nothing is told of one"
