"""The queue served anew: cases worked out by hand, no look-ahead, and no verdict without a roster."""

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_checks.regression.queue_replay import QueueReplay, Shifts, TeamWeek, replay_week, serve
from data_checks.regression.replay import difference

WEEK = 50.0


def shifts(hands: float = 1.0, days: int = 5, start: float = 0.0) -> Shifts:
    opens = start + 10.0 * np.arange(days)
    return Shifts(opens, opens + 10.0, np.full(days, hands))


def week(
    opened: list[float], due: list[float], effort: list[float], usual: list[float], asked: list[float],
    resolved: list[float] | None = None, *, hands: float = 1.0, team: int = 0, number: int = 0, treated: bool = True,
) -> TeamWeek:  # fmt: skip
    n = len(opened)
    return TeamWeek(
        team, number, treated, WEEK * number, WEEK * (number + 1), np.array(opened), np.array(due),
        np.array(resolved if resolved is not None else [math.nan] * n), np.array(effort), np.zeros(n),
        np.zeros(n, dtype=np.int64), np.array(usual), np.array(asked), np.zeros(n, dtype=bool),
        shifts(hands, start=WEEK * number),
    )  # fmt: skip


def random_week(
    seed: int, *, n: int = 60, team: int = 0, number: int = 0, treated: bool = True, same: bool = False
) -> TeamWeek:
    rng = np.random.default_rng(seed)
    opened = WEEK * number + rng.random(n) * WEEK
    usual = rng.integers(1, 6, n).astype(float)
    resolved = opened + rng.exponential(8, n)
    return dataclasses.replace(
        week(
            opened.tolist(), (opened + rng.uniform(2, 20, n)).tolist(), rng.exponential(1.5, n).tolist(), usual.tolist(),
            (usual if same else 6 - usual).tolist(), resolved.tolist(), hands=2, team=team, number=number, treated=treated,
        )
    )  # fmt: skip


def test_free_hands_take_the_smallest_key_and_of_equal_ones_the_oldest() -> None:
    opened, key = np.array([0.0, 0.0, 0.0, 1.0]), np.array([2.0, 1.0, 2.0, 1.0])
    done, left = serve(opened, np.array([1.0, 2.0, 3.0, 1.0]), key, shifts())
    # 1 from 0 to 2, then 3 (key 1, here since 1) to 3, then 0 to 4, then 2 to 7
    assert done.tolist() == [4.0, 2.0, 7.0, 3.0]
    assert left.tolist() == [0.0] * 4


def test_two_hands_work_beside_each_other() -> None:
    done, _ = serve(np.zeros(3), np.array([4.0, 1.0, 1.0]), np.array([1.0, 2.0, 3.0]), shifts(hands=2))
    assert done.tolist() == [4.0, 1.0, 2.0]


def test_work_stops_at_the_end_of_a_shift_and_goes_on_first_thing_in_the_next() -> None:
    opened, work = np.array([8.0, 9.0]), np.array([4.0, 1.0])
    nights = Shifts(np.array([0.0, 24.0]), np.array([10.0, 34.0]), np.array([1.0, 1.0]))
    done, _ = serve(opened, work, np.array([5.0, 1.0]), nights)
    assert done.tolist() == [26.0, 27.0]
    first_only = Shifts(np.array([0.0]), np.array([10.0]), np.array([1.0]))
    done, left = serve(opened, work, np.array([5.0, 1.0]), first_only)
    assert np.isinf(done).all() and left.tolist() == [2.0, 1.0]


def test_nobody_there_serves_nobody() -> None:
    done, left = serve(np.zeros(2), np.ones(2), np.ones(2), shifts(hands=0))
    assert np.isinf(done).all() and left.tolist() == [1.0, 1.0]


def test_base_and_pol_of_a_week_worked_out_by_hand() -> None:
    # Two tickets of 3 hours at 0. The usual order takes the first (due 3), the other is done at 6 (due 7): none late.
    # Turned around the second goes first, and the first is done at 6: late. In truth it was done at 5: late.
    one = week([0, 0], [3, 7], [3, 3], [1, 2], [2, 1], [5, 6])
    found = replay_week(one, np.array([1.0]), 40.0)
    assert (found.n, found.base, found.pol, found.actual) == (2, 0, 1, 1)
    assert found.hours == found.base_hours == 6.0
    assert found.effort == pytest.approx(math.log(3))


def test_open_tickets_have_their_categorys_effort_and_a_forecast() -> None:
    # At 2 nothing is done: the mean of 2 hours says that both would be done at 4 and 2; forecast from now: 4 and 6.
    one = week([0, 0], [4, 5], [math.nan, math.nan], [2, 1], [2, 1])
    found = replay_week(one, np.array([2.0]), 2.0)
    assert (found.n, found.base, found.pol) == (2, 0, 0)
    assert found.actual == 1  # the one that goes first is done at 4, before 5; the other at 6, after 4
    assert math.isnan(found.effort)


def test_what_is_begun_is_finished_first_under_any_order() -> None:
    one = dataclasses.replace(week([0, 0], [1, 9], [3, 1], [2, 1], [2, 1], [1, 2]), done=np.array([2.0, 0.0]))
    found = replay_week(one, np.array([1.0]), 40.0)
    assert (found.base, found.pol) == (0, 0)


def test_means_alone_leave_the_logged_effort_aside() -> None:
    one = week([0, 0], [3, 7], [3, 3], [1, 2], [2, 1], [5, 6])
    shorter = dataclasses.replace(one, effort=one.effort / 3)
    means = np.array([3.0])
    asked, told = (replay_week(w, means, 40.0, logged=False) for w in (one, shorter))
    assert (asked.base, asked.pol) == (told.base, told.pol) == (0, 1)
    assert replay_week(shorter, means, 40.0).pol == 0


@given(st.integers(0, 10_000), st.floats(1, 60))
@settings(max_examples=40)
def test_an_order_equal_to_the_status_quo_differs_in_nothing(seed: int, now: float) -> None:
    weeks = [random_week(seed + t, team=t, same=True) for t in range(3)]
    found = QueueReplay(weeks, [], np.array([1.5])).at(now)
    assert (found.pol == found.base).all()
    assert difference(found).d == 0 or not found.n.sum()


@given(st.integers(0, 10_000), st.floats(1, 49))
@settings(max_examples=40)
def test_what_happens_later_changes_nothing(seed: int, now: float) -> None:
    one = random_week(seed)
    later, open_ = one.opened > now, one.resolved > now
    other = dataclasses.replace(
        one,
        effort=np.where(open_, 99.0, one.effort),
        resolved=np.where(open_, one.resolved + 7, one.resolved),
        due=np.where(later, one.due - 1, one.due),
        usual=np.where(later, 0.0, one.usual),
    )
    means = np.array([1.5])
    assert repr(replay_week(one, means, now)) == repr(replay_week(other, means, now))


@given(st.integers(0, 10_000))
@settings(max_examples=20)
def test_the_arm_enters_no_figure(seed: int) -> None:
    weeks = [random_week(seed + t, team=t, treated=t == 0) for t in range(3)]
    turned = [dataclasses.replace(w, treated=not w.treated) for w in weeks]
    one, other = (QueueReplay(w, [], np.array([1.5])).at(40.0) for w in (weeks, turned))
    for name in ("n", "base", "pol", "actual", "effort", "hours", "base_hours"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


def test_the_same_rows_give_the_same_figures_in_whatever_order_it_is_asked() -> None:
    weeks = [random_week(10 * t + k, team=t, number=k) for t in range(4) for k in range(2)]
    means = np.array([1.5])
    asked_twice = QueueReplay(weeks, [], means)
    asked_twice.at(120.0)
    for now in (130.0, 90.0, 60.0):
        one, other = asked_twice.at(now), QueueReplay(weeks, [], means).at(now)
        assert np.array_equal(one.base, other.base) and np.array_equal(one.actual, other.actual)


@pytest.mark.parametrize("gone", [None, "a shift"])
def test_no_roster_is_said_and_left_out(gone: str | None) -> None:
    missing = None if gone is None else dataclasses.replace(shifts(), hands=np.array([1, 1, math.nan, 1, 1.0]))
    weeks = [random_week(1), dataclasses.replace(random_week(2, team=1), shifts=missing)]
    found = QueueReplay(weeks, [], np.array([1.5])).at(40.0)
    assert found.unit.tolist() == [0]
    assert found.reasons == ("no roster of hands seen at work: team 1 in week 0",)


def test_own_level_is_what_the_replay_left_unsaid_before() -> None:
    # before: one late of two, none by the replay
    before = week([0, 0], [3, 7], [3, 3], [1, 2], [2, 1], [5, 6])
    now = random_week(3, number=1)
    found = QueueReplay([now], [before], np.array([1.0])).at(90.0)
    assert found.own.tolist() == [0.5]
    bare = QueueReplay([now], [], np.array([1.0])).at(90.0)
    assert found.effort[0] == pytest.approx(bare.effort[0] - math.log(3))


def test_difference_sums_over_treated_units_and_clusters_by_unit() -> None:
    found = QueueReplay([random_week(t, team=t, treated=t < 3) for t in range(4)], [], np.array([1.5])).at(60.0)
    n, gap = found.n[:3], (found.pol - found.base)[:3]
    said = difference(found)
    assert said.d == pytest.approx(gap.sum() / n.sum())
    rest = gap - said.d * n
    assert said.se_d == pytest.approx(math.sqrt((rest**2).sum() * 1.5) / n.sum())


def test_nothing_treated_is_no_figure() -> None:
    said = difference(QueueReplay([random_week(1, treated=False)], [], np.array([1.5])).at(60.0))
    assert math.isnan(said.d) and math.isnan(said.se_o)


def test_a_look_at_twelve_teams_and_four_weeks_takes_well_under_a_second() -> None:
    weeks = [random_week(100 * t + k, n=120, team=t, number=k) for t in range(12) for k in range(4)]
    begun = time.perf_counter()
    found = QueueReplay(weeks, weeks[:12], np.array([1.5])).at(200.0)
    assert time.perf_counter() - begun < 1.0
    assert found.n.sum() > 4000


def test_an_order_may_change_before_each_shift_and_what_is_begun_is_still_finished_first() -> None:
    # Day 1 takes the first of three tickets of 8 hours, begins the second and stops; day 2 would take the third first.
    opened, work = np.zeros(3), np.full(3, 8.0)
    keys = np.array([[1.0, 2.0, 3.0], [9.0, 8.0, 1.0], [9.0, 8.0, 1.0]])
    done, _ = serve(opened, work, keys, shifts(days=3))
    assert done.tolist() == [8.0, 16.0, 24.0]
    waiting, _ = serve(opened, np.array([10.0, 8.0, 8.0]), keys, shifts(days=3))
    assert waiting.tolist() == [10.0, 26.0, 18.0], "on day 2 the third is first"


def test_a_shift_to_come_has_the_hands_that_were_expected() -> None:
    one = week([0, 12], [9, 19], [8, 8], [1, 2], [1, 2], [8, math.nan])
    assert one.shifts is not None
    missing = dataclasses.replace(one.shifts, hands=np.array([1, 0, 1, 1, 1.0]), expected=np.ones(5))
    one = dataclasses.replace(one, shifts=missing)
    means = np.array([7.0])
    early, later = replay_week(one, means, 9.0), replay_week(one, means, 40.0)
    assert (early.n, later.n) == (1, 2), "the second has not come yet"
    assert later.base == 1, "nobody came on day 2"
    same_day = replay_week(dataclasses.replace(one, opened=np.array([0.0, 8.0])), means, 9.0)
    assert same_day.base == 0, "on day 1 somebody was expected on day 2"


def test_what_comes_due_in_the_wash_out_is_served_and_not_counted() -> None:
    one = week([0, 0], [3, 12], [3, 3], [1, 2], [2, 1], [5, 6])
    washed = replay_week(dataclasses.replace(one, counts_from=10.0), np.array([1.0]), 40.0)
    assert (washed.n, washed.base, washed.pol, washed.actual) == (1, 0, 0, 0)


def test_efforts_shifted_are_those_of_the_treated_arm_alone() -> None:
    weeks = [random_week(t, team=t, treated=t == 0) for t in range(2)]
    replay = QueueReplay(weeks, [], np.array([1.5]))
    shifted = replay.shifted(-0.5)
    assert np.allclose(shifted.weeks[0].effort, weeks[0].effort * math.exp(0.5))
    assert shifted.weeks[1] is weeks[1]
    assert shifted.at(60.0).effort[0] == pytest.approx(replay.at(60.0).effort[0] + 0.5, abs=0.02)


def test_pace_is_the_hours_of_the_pre_period_over_the_replays() -> None:
    # the replay serves both in the week; in truth one was done
    before = week([0, 0], [3, 7], [3, math.nan], [1, 2], [2, 1], [5, math.nan])
    found = QueueReplay([random_week(3, number=1)], [before], np.array([3.0])).at(90.0)
    assert found.pace is not None and found.pace.tolist() == [0.5]
