"""Pools: exact in whole units, nothing over the pool, the best increases first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from delivery.push.pools import Holding, Increase, headroom, live, plan

MONEY = st.integers(0, 10**15)


def test_what_is_unresolved_counts_at_its_most() -> None:
    totals = live([
        Holding("a", ("x",), (100, 150)), Holding("b", ("x",), (30,)), Holding("c", ("y",), (7,)), Holding("d", ("x", "y"), (5,)),
    ])  # fmt: skip
    assert totals.most == {"x": 185, "y": 12} and not totals.unreadable
    assert headroom({"x": 200, "y": 10}, totals) == {"x": 15, "y": -2}


def test_an_arm_with_a_holding_that_cannot_be_read_has_no_room() -> None:
    totals = live([Holding("a", ("x",), (None,)), Holding("b", ("x",), (1,)), Holding("c", ("y",), (1,))])
    assert totals.unreadable == {"x": ("a",)} and headroom({"x": 100, "y": 100}, totals) == {"x": 0, "y": 99}


def test_increases_keep_their_value_by_gain_for_each_unit_and_the_last_gets_what_is_left() -> None:
    increases = [
        Increase("low", "x", 0, 10, 1.0), Increase("high", "x", 0, 100, 50.0), Increase("tie b", "x", 0, 10, 4.0),
        Increase("tie a", "x", 0, 10, 4.0), Increase("unknown", "x", 0, 10, None), Increase("alone", "y", 5, 6, float("nan")),
    ]  # fmt: skip
    planned = {p.increase.key: p.value for p in plan(increases, {"x": 115, "y": 1})}
    assert planned == {"high": 100, "tie a": 10, "tie b": 5, "low": None, "unknown": None, "alone": 6}


def test_a_share_is_rounded_down_to_the_unit_or_is_nothing() -> None:
    assert [p.value for p in plan([Increase("a", "x", 100, 200, 1.0)], {"x": 55}, unit=10)] == [150]
    assert [p.value for p in plan([Increase("a", "x", 105, 200, 1.0)], {"x": 4}, unit=10)] == [None]
    assert [p.value for p in plan([Increase("a", "x", 100, 200, 1.0)], {"x": -1})] == [None]


@given(
    st.lists(
        st.tuples(st.sampled_from("xy"), MONEY, st.integers(1, 10**15), st.one_of(st.none(), st.floats())), max_size=20
    ),
    st.dictionaries(st.sampled_from("xy"), st.integers(-(10**15), 10**16)),
    st.sampled_from([1, 7, 10_000]),
)
def test_no_plan_passes_its_room(
    rows: list[tuple[str, int, int, float | None]], room: dict[str, int], unit: int
) -> None:
    increases = [Increase(str(n), arm, now, now + more, gain) for n, (arm, now, more, gain) in enumerate(rows)]
    planned = plan(increases, room, unit)
    assert sorted(p.increase.key for p in planned) == sorted(i.key for i in increases)
    for arm in "xy":
        own = [p for p in planned if p.increase.arm == arm]
        added = sum(p.value - p.increase.now for p in own if p.value is not None)
        assert added <= max(0, room.get(arm, 0))
        assert all(p.value is None or p.increase.now < p.value <= p.increase.after for p in own)
        assert all(p.full or p.value is None or p.value % unit == 0 for p in own)
        # A prefix keeps its value, one may get less, the rest nothing.
        kinds = [2 if p.full else 1 if p.value is not None else 0 for p in own]
        assert kinds == sorted(kinds, reverse=True) and kinds.count(1) <= 1
        if sum(i.after - i.now for i in increases if i.arm == arm) <= room.get(arm, 0):
            assert all(p.full for p in own)
