"""Guardrails: invariants refuse, limits hold, and nothing else stops a batch."""

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_checks.guardrails import Guardrails, check, sentence
from tests.support.properties import examples

MONEY = st.integers(-(2**62), 2**62)


def batch(before: list[Any], after: list[Any], **other: list[Any]) -> pa.Table:
    rows = len(before)
    columns = {
        "entity_id": pa.array(other.get("entity_id", [f"e{i}" for i in range(rows)]), pa.string()),
        "unit": pa.array(other.get("unit", [f"u{i // 2}" for i in range(rows)]), pa.string()),
        "arm": pa.array(other.get("arm", ["champion"] * rows), pa.string()),
        "before": pa.array(before, pa.int64()),
        "after": pa.array(after, pa.int64()),
        "changed": pa.array(other.get("changed", [b != a for b, a in zip(before, after, strict=True)]), pa.bool_()),
        "review": pa.array(other.get("review", [False] * rows), pa.bool_()),
    }
    return pa.table(columns)


def found(table: pa.Table, spec: Guardrails, **more: Any) -> dict[str, tuple[str, Any]]:
    return {f["name"]: (f["status"], f["observed"]) for f in check(table, spec, **more).findings}


@st.composite
def transfers(draw: st.DrawFn) -> tuple[list[int], list[int], list[str]]:
    """Budgets of up to three arms and a reallocation within each arm that keeps its money."""
    before = draw(st.lists(st.integers(0, 2**61), min_size=2, max_size=20))
    arms = draw(
        st.lists(st.sampled_from(["champion", "challenger", "explore"]), min_size=len(before), max_size=len(before))
    )
    after = list(before)
    for _ in range(draw(st.integers(0, 10))):
        source, target = draw(st.integers(0, len(before) - 1)), draw(st.integers(0, len(before) - 1))
        if arms[source] == arms[target]:
            amount = draw(st.integers(0, min(after[source], 2**62 - after[target])))
            after[source] -= amount
            after[target] += amount
    return before, after, arms


@settings(max_examples=examples(60))
@given(transfers())
def test_money_moved_within_an_arm_is_ready(moved: tuple[list[int], list[int], list[str]]) -> None:
    before, after, arms = moved
    assert check(batch(before, after, arm=arms), Guardrails(pool="conserved")).status == "READY"


@settings(max_examples=examples(60))
@given(transfers(), st.data())
def test_one_micro_more_or_less_in_an_arm_is_refused_and_names_the_arm(
    moved: tuple[list[int], list[int], list[str]], data: st.DataObject
) -> None:
    before, after, arms = moved
    line, step = data.draw(st.integers(0, len(before) - 1)), data.draw(st.sampled_from([1, -1]))
    after[line] += step
    verdict = check(batch(before, after, arm=arms), Guardrails(pool="conserved"))
    assert verdict.status == "REFUSED"
    assert [(f["name"], f["arm"], f["observed"] - f["limit"]) for f in verdict.findings] == [("pool", arms[line], step)]


@settings(max_examples=examples(40))
@given(transfers(), st.data())
def test_money_moved_between_arms_is_refused_although_the_whole_is_kept(
    moved: tuple[list[int], list[int], list[str]], data: st.DataObject
) -> None:
    before, after, arms = moved
    other = next((i for i, a in enumerate(arms) if a != arms[0]), None)
    if other is None:
        return
    after[0] += 1
    after[other] -= 1
    verdict = check(batch(before, after, arm=arms), Guardrails(pool="conserved"))
    assert verdict.status == "REFUSED" and {f["arm"] for f in verdict.findings} == {arms[0], arms[other]}


@settings(max_examples=examples(60))
@given(st.lists(MONEY, min_size=1, max_size=8))
def test_sums_beyond_64_bits_are_exact(values: list[int]) -> None:
    after = [*values[:-1], values[-1] + 1]
    finding = check(batch(values, after), Guardrails(pool="conserved")).findings[0]
    assert (finding["limit"], finding["observed"]) == (sum(values), sum(values) + 1)


def test_a_ceiling_allows_unspent_money_and_no_more_than_the_pool() -> None:
    spec = Guardrails(pool="ceiling")
    assert check(batch([5, 5], [4, 5]), spec).status == "READY"
    assert found(batch([5, 5], [6, 5]), spec) == {"pool": ("REFUSED", 11)}


def test_pools_given_replace_what_was_there_before_and_every_arm_needs_one() -> None:
    table = batch([5, 5], [6, 6], arm=["champion", "explore"])
    assert check(table, Guardrails(pool="conserved"), pools={"champion": 6, "explore": 6}).status == "READY"
    assert "arm without a pool" in found(table, Guardrails(pool="conserved"), pools={"champion": 6})
    assert found(table, Guardrails(pool="conserved"), pools={"champion": 6, "explore": 6, "challenger": 1}) == {
        "pool": ("REFUSED", 0)
    }


@settings(max_examples=examples(40))
@given(st.integers(0, 9), st.integers(-5, 5).filter(bool))
def test_a_touched_holdout_is_refused_and_named(line: int, step: int) -> None:
    before = list(range(10, 20))
    after = [b + step * (i == line) for i, b in enumerate(before)]
    verdict = check(batch(before, after, arm=["holdout"] * 10), Guardrails())
    assert verdict.status == "REFUSED"
    assert [(f["name"], f["examples"]) for f in verdict.findings] == [("frozen arm changed", [f"e{line}"])]


@pytest.mark.parametrize(
    ("name", "table", "spec"),
    [
        ("duplicate entity", batch([1, 2], [1, 2], entity_id=["a", "a"]), Guardrails()),
        ("null after", batch([1, 2], [1, None], changed=[False, False]), Guardrails()),
        ("null before", batch([None, 2], [1, 2], changed=[False, False]), Guardrails()),
        ("null entity_id", batch([1, 2], [1, 2], entity_id=[None, "a"]), Guardrails()),
        ("null arm", batch([1, 2], [1, 2], arm=[None, "champion"]), Guardrails()),
        ("outside levels", batch([3, 3], [3, 6]), Guardrails(levels=(1, 5))),
        ("outside levels", batch([3, 3], [0, 3]), Guardrails(levels=(1, 5))),
        ("sign reversed", batch([3, 3], [-1, 3]), Guardrails(keep_sign=True)),
        ("sign reversed", batch([-3, 3], [1, 3]), Guardrails(keep_sign=True)),
        ("changed is not what before and after say", batch([1, 2], [1, 3], changed=[False, False]), Guardrails()),
        ("changed is not what before and after say", batch([1, 2], [1, 2], changed=[True, False]), Guardrails()),
        ("changed although left to people", batch([1, 2], [1, 3], review=[False, True]), Guardrails()),
    ],
)
def test_a_broken_invariant_is_refused_by_name(name: str, table: pa.Table, spec: Guardrails) -> None:
    verdict = check(table, spec)
    assert verdict.status == "REFUSED"
    assert [f["name"] for f in verdict.findings if f["status"] == "REFUSED"] == [name]


def test_a_value_outside_the_levels_that_is_kept_is_nobodys_fault() -> None:
    assert check(batch([9, 3], [9, 4]), Guardrails(levels=(1, 5))).status == "READY"


@pytest.mark.parametrize(
    ("over", "at"),
    [
        ({"max_rows": 3}, {"max_rows": 4}),
        ({"max_changed": 1}, {"max_changed": 2}),
        ({"max_share_changed": 0.49}, {"max_share_changed": 0.5}),
        ({"max_share_units": 0.49}, {"max_share_units": 0.5}),
        ({"max_change": 0.19}, {"max_change": 0.2}),
        ({"max_absolute_change": 19}, {"max_absolute_change": 20}),
        ({"max_total_change": 0.0749}, {"max_total_change": 0.075}),
        ({"max_net_change": 0.0249}, {"max_net_change": 0.025}),
    ],
)
def test_a_batch_over_a_limit_is_held_and_at_the_limit_is_ready(over: dict[str, Any], at: dict[str, Any]) -> None:
    table = batch([100, 100, 100, 100], [120, 90, 100, 100])
    verdict = check(table, Guardrails(**over))
    assert verdict.status == "HELD" and len(verdict.findings) == 1
    assert verdict.findings[0]["limit"] == next(iter(over.values()))
    assert check(table, Guardrails(**at)).status == "READY"


def test_the_largest_changes_are_named_and_something_from_nothing_is_held() -> None:
    verdict = check(batch([100, 100, 100], [150, 180, 100]), Guardrails(max_change=0.2))
    assert verdict.findings[0]["examples"] == ["e1", "e0"] and verdict.findings[0]["observed"] == pytest.approx(0.8)
    assert found(batch([0, 5], [1, 5]), Guardrails(max_change=0.2)) == {"change": ("HELD", "from nothing")}
    assert "e1, e0" in sentence(verdict.findings[0])


def test_a_broken_invariant_outweighs_a_limit() -> None:
    verdict = check(batch([1, 2], [2, 2]), Guardrails(pool="conserved", max_rows=1))
    assert verdict.status == "REFUSED" and {f["status"] for f in verdict.findings} == {"REFUSED", "HELD"}


def test_an_empty_batch_is_ready() -> None:
    assert check(batch([], []), Guardrails(pool="conserved", max_change=0.1)).status == "READY"


def test_a_missing_column_and_money_in_floats_are_errors_that_name_it() -> None:
    with pytest.raises(ValueError, match="'review' is missing"):
        check(batch([1], [1]).drop_columns(["review"]), Guardrails())
    table = batch([1], [1])
    with pytest.raises(ValueError, match="'after' is double"):
        check(table.set_column(4, "after", table["after"].cast(pa.float64())), Guardrails())


def test_an_unknown_limit_and_levels_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_row"):
        Guardrails.model_validate({"max_row": 3})
    with pytest.raises(ValidationError, match="above the highest"):
        Guardrails(levels=(5, 1))


def test_changed_values_off_the_declared_unit_are_held_by_name() -> None:
    rows = batch([10_000, 20_000, 33_333, 5], [20_000, 10_000, 33_333, 4])
    assert check(rows, Guardrails()).status == "READY"
    (finding,) = check(rows, Guardrails(unit=10_000)).findings
    assert (finding["name"], finding["status"], finding["observed"]) == ("not in whole units", "HELD", 1)
    assert finding["examples"] == ["e3"], "what is kept off the grid is not this batch's doing"
    assert "allowed multiples of 10000, such as e3" in sentence(finding)
