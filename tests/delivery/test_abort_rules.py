"""Guards judge what is known, exactly, and say nothing where nothing is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from delivery.abort_rules import TRIED, Guards, judge, spend_over_pool
from delivery.push.types import Report

EVERY = Guards(
    max_rejected_share=0.1, max_conflict_share=0.1, max_unknown_share=0.1, max_overwritten=0, max_spend_over_pool=0.15
)


def test_a_guard_that_is_not_set_finds_nothing() -> None:
    assert judge({"REJECTED": 1000, "OVERWRITTEN": 50}, Guards()) == []
    assert spend_over_pool({"champion": 10**12}, {"champion": 1}, Guards()) == []


def test_a_broken_limit_names_itself_its_limit_and_what_was_seen() -> None:
    (finding,) = judge({"ACKED": 80, "REJECTED": 20}, EVERY)
    assert (finding.name, finding.limit, finding.observed, finding.rollback) == ("max_rejected_share", 0.1, 0.2, True)
    assert "20 of 100" in finding.text
    assert finding.as_dict()["name"] == "max_rejected_share"


@pytest.mark.parametrize(
    ("counts", "limit", "says"),
    [
        ({}, 0.2, ""),
        ({"ACKED": 8, "REJECTED": 2}, 0.2, ""),
        ({"ACKED": 7, "REJECTED": 3}, None, ""),
        ({"ACKED": 7, "REJECTED": 3, "SKIPPED": 90}, 0.2, "3 of 10 tried deliveries were rejected (limit 20.00%)"),
        ({"OVERWRITTEN": 1, "SKIPPED": 3}, 0.2, ""),
        ({"CONFLICT": 3}, None, "none of 3 deliveries was acknowledged: {'CONFLICT': 3}"),
        ({"REJECTED": 1, "SKIPPED": 1}, None, "none of 2 deliveries was acknowledged: {'REJECTED': 1, 'SKIPPED': 1}"),
        ({"SKIPPED": 4}, 0.2, "none of 4 deliveries was acknowledged: {'SKIPPED': 4}"),
    ],
)  # fmt: skip
def test_a_push_of_which_nothing_stands_or_too_much_was_rejected_says_so(
    counts: dict[str, int], limit: float | None, says: str
) -> None:
    assert Report("b1", "there", True, counts, "exactly once").failure(limit) == says


@pytest.mark.parametrize("state", ["REJECTED", "CONFLICT", "UNKNOWN"])
def test_exactly_the_limit_is_not_over_it(state: str) -> None:
    assert judge({"ACKED": 90, state: 10}, EVERY) == []
    assert len(judge({"ACKED": 89, state: 11}, EVERY)) == 1


def test_overrides_are_conflicts_and_overwrites_together() -> None:
    assert {f.name for f in judge({"ACKED": 80, "CONFLICT": 10, "OVERWRITTEN": 10}, EVERY)} == {
        "max_conflict_share",
        "max_overwritten",
    }


def test_what_is_unknown_never_asks_for_a_rollback() -> None:
    (finding,) = judge({"ACKED": 10, "UNKNOWN": 10, "IN_FLIGHT": 10}, EVERY)
    assert (finding.name, finding.rollback) == ("max_unknown_share", False)


def test_few_deliveries_give_no_verdict_on_shares() -> None:
    assert judge({"REJECTED": 19}, EVERY) == []
    assert judge({}, EVERY) == []
    assert judge({"REJECTED": 20}, EVERY) != []


def test_an_overwritten_change_counts_however_few_deliveries_there_are() -> None:
    assert [f.name for f in judge({"OVERWRITTEN": 1}, EVERY)] == ["max_overwritten"]


def test_deliveries_that_never_met_the_system_say_nothing() -> None:
    assert judge({"REJECTED": 10, "PENDING": 500, "SKIPPED": 500, "NOT_REVERSIBLE": 9}, EVERY) == []
    (finding,) = judge({"ACKED": 10, "REJECTED": 10, "PENDING": 5000, "SKIPPED": 5000}, EVERY)
    assert finding.observed == 0.5


@given(st.dictionaries(st.sampled_from([*TRIED, "PENDING", "SKIPPED", "NOT_REVERSIBLE"]), st.integers(0, 200)))
def test_more_that_was_acknowledged_never_breaks_a_limit(counts: dict[str, int]) -> None:
    more = counts | {"ACKED": counts.get("ACKED", 0) + 500}
    if sum(counts.get(state, 0) for state in TRIED) >= EVERY.min_deliveries:
        assert {f.name for f in judge(more, EVERY)} <= {f.name for f in judge(counts, EVERY)}


def test_spend_over_the_pool_is_exact() -> None:
    pools = {"champion": 100_000_000_000_000_000_000}  # above what a float can tell apart
    assert spend_over_pool({"champion": 115_000_000_000_000_000_000}, pools, EVERY) == []
    (finding,) = spend_over_pool({"champion": 115_000_000_000_000_000_001}, pools, EVERY)
    assert (finding.arm, finding.rollback) == ("champion", True)
    assert finding.observed == pytest.approx(0.15)


def test_each_arm_is_judged_beside_its_own_pool() -> None:
    found = spend_over_pool({"a": 50, "b": 200}, {"a": 100, "b": 100}, EVERY)
    assert [f.arm for f in found] == ["b"]


def test_an_arm_of_which_nothing_is_known_gets_no_verdict() -> None:
    assert spend_over_pool({"a": None, "b": 10**9}, {"a": 1, "c": 5}, EVERY) == []
    assert spend_over_pool({"a": 10**9}, None, EVERY) == []


def test_spend_of_an_arm_without_money_is_over_its_pool() -> None:
    assert len(spend_over_pool({"a": 1}, {"a": 0}, EVERY)) == 1
    assert spend_over_pool({"a": 0}, {"a": 0}, EVERY) == []


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="REJECTED"):
        judge({"REJECTED": -1}, EVERY)
    with pytest.raises(ValueError, match="arm a"):
        spend_over_pool({"a": 1}, {"a": -1}, EVERY)
    with pytest.raises(ValidationError):
        Guards.model_validate({"max_rejected_shares": 0.1})
    with pytest.raises(ValidationError):
        Guards(max_rejected_share=float("nan"))
