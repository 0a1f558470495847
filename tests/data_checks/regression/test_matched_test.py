"""The matched exact test and the rules on it: size, power where the replay points, and every reason to say nothing."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_checks.regression import matched_test as m
from data_checks.regression.replay import Replayed

SPEC = m.MatchedSpec(permutations=199)


def replayed(
    rng: np.random.Generator, *, weeks: int = 4, teams: int = 12, held: int = 3, harm: float = 0.0
) -> Replayed:
    """Weeks in which the replay expects 5% to 25% more late; ``harm``: the share of it that truly comes, where treated."""
    size = weeks * teams
    unit, epoch = np.tile(np.arange(teams), weeks), np.repeat(np.arange(weeks), teams)
    treated = np.ones(size, dtype=bool)
    for e in range(weeks):
        treated[e * teams + rng.permutation(teams)[:held]] = False
    n = rng.integers(40, 90, size).astype(float)
    base = np.round(n * rng.uniform(0.1, 0.3, size))
    pol = base + np.round(n * rng.uniform(0.05, 0.25, size))
    actual = base + rng.normal(0, 0.03, size) * n + harm * treated * (pol - base)
    hours = n * 1.5
    return Replayed(
        unit,
        epoch,
        treated,
        n,
        base,
        pol,
        actual,
        np.zeros(size),
        rng.normal(0, 0.1, size),
        np.zeros(size),
        hours,
        hours,
    )


def until(found: Replayed, weeks: int) -> Replayed:
    at = found.epoch < weeks
    return dataclasses.replace(
        found,
        **{f.name: getattr(found, f.name)[at] for f in dataclasses.fields(found) if f.name not in ("reasons", "pace")},
    )


def looked(found: Replayed, seed: int = 1, spec: m.MatchedSpec = SPEC) -> list[m.Look]:
    return m.judge([(7.0 * k, until(found, k)) for k in range(1, 5)], spec=spec, seed=seed)


def test_contrast_worked_out_by_hand() -> None:
    # means 3 and 1; squares 2 + 2 with 2 degrees of freedom; room 2·2/4 = 1
    z = m.contrast(np.array([2.0, 4, 0, 2]), np.array([1.0, 1, 0, 0]), np.zeros(4, dtype=np.int64))
    assert z == pytest.approx(2 / math.sqrt(2))


@pytest.mark.parametrize("values", [[1.0, 1, 1, 1], [math.nan] * 4])
def test_contrast_tells_nothing_where_nothing_varies(values: list[float]) -> None:
    assert math.isnan(m.contrast(np.array(values), np.array([1.0, 1, 0, 0]), np.zeros(4, dtype=np.int64)))


def test_the_statistic_is_the_t_of_a_weighted_regression() -> None:
    found = replayed(np.random.default_rng(5), harm=0.5)
    found = dataclasses.replace(found, own=np.random.default_rng(6).normal(0, 0.1, len(found.n)))
    t = m.statistics(found, found.treated[None, :].astype(float), matched=True, spec=SPEC)[0]
    n, w = found.n, (found.pol - found.base) / found.n + 0.02
    root = np.sqrt(np.minimum(n, 2 * n.mean()))
    x = np.column_stack([found.treated * w, w, found.own, *(found.epoch == e for e in range(4))]) * root[:, None]
    y = (found.actual - found.base) / n * root
    beta = np.linalg.solve(x.T @ x, x.T @ y)
    s2 = ((y - x @ beta) ** 2).sum() / (len(y) - x.shape[1])
    assert t == pytest.approx(beta[0] / math.sqrt(s2 * np.linalg.inv(x.T @ x)[0, 0]))


def test_harm_as_the_replay_expects_it_is_found_and_no_harm_is_not() -> None:
    rng = np.random.default_rng(7)
    found = [m.told(looked(replayed(rng, harm=1.0))) for _ in range(20)]
    assert sum(f["ROLLBACK"] is not None for f in found) >= 19
    assert sum(f["HOLD"] is not None and f["HOLD"] <= 7 for f in found) >= 18


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_permuted_arms_keep_each_weeks_draw_whole(seed: int) -> None:
    found = replayed(np.random.default_rng(seed))
    arms = m.permuted_arms(found.unit, found.epoch, found.treated.astype(float), 50, [seed])
    for e in range(4):
        assert (arms[:, found.epoch == e].sum(1) == 9).all()
    fewer = until(found, 2)
    again = m.permuted_arms(fewer.unit, fewer.epoch, fewer.treated.astype(float), 50, [seed])
    assert np.array_equal(arms[:, found.epoch < 2], again), "a later week changes no earlier draw"


def test_permuted_labels_cross_as_often_as_alpha_allows() -> None:
    # nothing depends on the arms: over their draws at most 5% cross; 300 draws, beyond 29 has a chance of 0.1%
    rng = np.random.default_rng(8)
    crossed = 0
    for k in range(300):
        looks = looked(replayed(rng, harm=0.0), seed=k, spec=dataclasses.replace(SPEC, permutations=99))
        crossed += any(x.statistic > x.bound for x in looks)
    assert 2 <= crossed <= 29


def test_names_and_the_order_of_rows_change_nothing() -> None:
    found = replayed(np.random.default_rng(9), harm=0.5)
    order = np.lexsort((np.random.default_rng(1).random(len(found.n)), found.epoch))
    other = dataclasses.replace(
        found,
        **{
            f.name: getattr(found, f.name)[order]
            for f in dataclasses.fields(found)
            if f.name not in ("reasons", "pace")
        },
    )
    one, two = looked(found), looked(other)
    assert [x.alert for x in one] == [x.alert for x in two]
    assert np.allclose([x.statistic for x in one], [x.statistic for x in two])
    assert repr(one) == repr(looked(found)), "the same rows and seed give the same looks"


def test_a_later_look_changes_no_earlier_one() -> None:
    found = replayed(np.random.default_rng(10), harm=0.6)
    whole = looked(found)
    assert repr(m.judge([(7.0, until(found, 1)), (14.0, until(found, 2))], spec=SPEC, seed=1)) == repr(whole[:2])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reasons": ("no roster of hands seen at work: team 1 in week 0",)}, "no roster"),
        ({"effort": "treated"}, "efforts fell in the treated arm"),
        ({"moved": "treated"}, "moved between units differs by arm"),
    ],
)
def test_where_the_replay_is_blind_it_says_so_and_no_more(changes: dict, reason: str) -> None:
    rng = np.random.default_rng(11)
    found = replayed(rng, harm=1.0)
    noise = rng.normal(0, 0.05, len(found.n))
    changes = {
        k: noise + (-0.4 if k == "effort" else 0.4) * found.treated if v == "treated" else v for k, v in changes.items()
    }
    last = looked(dataclasses.replace(found, **changes))[-1]
    assert last.alert == "INCONCLUSIVE"
    assert any(reason in text for text in last.reasons)


def test_longer_efforts_in_the_treated_arm_silence_nothing() -> None:
    rng = np.random.default_rng(12)
    found = replayed(rng, harm=1.0)
    effort = rng.normal(0, 0.05, len(found.n)) + 0.4 * found.treated
    assert looked(dataclasses.replace(found, effort=effort))[-1].alert == "ROLLBACK"


def test_a_replay_that_expects_no_harm_takes_nothing_back_and_nothing_promotes() -> None:
    found = replayed(np.random.default_rng(13), harm=1.0)
    calm = looked(dataclasses.replace(found, pol=found.base))
    better = looked(dataclasses.replace(found, actual=found.base - 0.2 * found.treated * found.n, pol=found.base * 0.5))
    assert {x.alert for x in (*calm, *better)} == {"CONTINUE"}


def test_hold_asks_that_hands_did_what_the_replay_has_them_do() -> None:
    found = until(replayed(np.random.default_rng(14), harm=1.0), 1)
    spec = dataclasses.replace(SPEC, alpha=1e-9)  # no ROLLBACK before it
    (held,) = m.judge([(5.0, found)], spec=spec, seed=1)
    (idle,) = m.judge([(5.0, dataclasses.replace(found, hours=found.hours * 0.95))], spec=spec, seed=1)
    assert (held.alert, idle.alert) == ("HOLD", "CONTINUE")
    assert held.p <= spec.hold_p and "no finding" in held.reasons[0]


def test_few_clusters_and_no_rows_say_nothing() -> None:
    found = replayed(np.random.default_rng(15), teams=6, held=1, weeks=1, harm=1.0)
    (look,) = m.judge([(7.0, found)], spec=SPEC, seed=1)
    assert math.isnan(look.statistic) and look.alert != "ROLLBACK"
    nothing = until(found, 0)
    (empty,) = m.judge([(1.0, nothing)], spec=SPEC, seed=1)
    assert empty.alert == "CONTINUE" and math.isnan(empty.effect.d)
    assert m.judge([], spec=SPEC, seed=1) == []


QUIET = dataclasses.replace(SPEC, alpha=1e-9)
"""No ROLLBACK comes before the HOLD that is asked about."""


def one_week(lost: np.ndarray, expected: np.ndarray) -> Replayed:
    """A week of 12 teams of 100 rows each, of which the first 3 are held out: late beyond the replay, and what it expects, by team."""
    base, n = np.full(12, 40.0), np.full(12, 100.0)
    zero = np.zeros(12)
    return Replayed(
        np.arange(12), np.zeros(12, dtype=np.int64), np.arange(12) >= 3, n, base, base + expected, base + lost, zero,
        zero, zero, n, n,
    )  # fmt: skip


NOISE = np.array([0.0, 1, 0, 1, 0, 2, 1, 0, 1, 2, 0, 1])
TREATED = np.where(np.arange(12) >= 3, 1.0, 0.0)


@pytest.mark.parametrize(
    ("lost", "expected", "alert"),
    [
        (10 * TREATED + NOISE, 10 + NOISE, "HOLD"),
        (3 * TREATED + 0.1 * NOISE, 10 + NOISE, "CONTINUE"),  # o under d/2
        (10 * TREATED + NOISE, 90.0 * (np.arange(12) == 5), "CONTINUE"),  # d within 3 of its errors: all in one team
        (10 + NOISE[::-1], 10 + NOISE, "CONTINUE"),  # as much is lost where it is held out
        (np.array([-50.0] * 3 + [50] * 5 + [-40] * 4), 10 + NOISE, "CONTINUE"),  # o within 2 of its errors
        (10 * TREATED + NOISE, 1.5 + 0.1 * NOISE, "CONTINUE"),  # d within the margin
    ],
)
def test_hold_asks_for_each_of_its_conditions(lost: np.ndarray, expected: np.ndarray, alert: str) -> None:
    (look,) = m.judge([(5.0, one_week(lost, expected))], spec=QUIET, seed=1)
    assert look.alert == alert, look


def test_a_bound_once_crossed_stays_crossed() -> None:
    found = replayed(np.random.default_rng(16), harm=1.0)
    turned = np.where(found.epoch >= 2, -1.0, 1.0) * found.treated * (found.pol - found.base)
    looks = looked(dataclasses.replace(found, actual=found.base + turned))
    assert looks[1].alert == "ROLLBACK" and looks[1].statistic > looks[1].bound
    assert looks[3].alert == "ROLLBACK" and not looks[3].statistic > looks[3].bound


@pytest.mark.parametrize(("spread", "alert"), [(1.0, "ROLLBACK"), (6.0, "CONTINUE")])
def test_rollback_asks_that_the_replay_is_sure(spread: float, alert: str) -> None:
    found = replayed(np.random.default_rng(17), harm=1.0)
    gap = found.pol - found.base
    concentrated = np.where(found.unit < 2, gap * spread, gap / spread)
    found = dataclasses.replace(found, pol=found.base + concentrated, actual=found.base + found.treated * concentrated)
    assert looked(found)[-1].alert == alert


def test_a_rollback_must_stand_with_efforts_as_long_as_the_other_arms() -> None:
    rng = np.random.default_rng(18)
    found = replayed(rng, harm=1.0)
    effort = rng.normal(0, 0.05, len(found.n)) - 0.02 * found.treated
    found = dataclasses.replace(found, effort=effort)
    looks = [(7.0 * k, until(found, k)) for k in range(1, 5)]
    assert m.judge(looks, spec=SPEC, seed=1)[-1].alert == "ROLLBACK"
    asked: list[float] = []

    def again(k: int, shift: float) -> Replayed:
        asked.append(shift)
        one = looks[k][1]
        return dataclasses.replace(one, actual=one.base)  # with those efforts nothing is late beyond the replay

    last = m.judge(looks, spec=SPEC, seed=1, again=again)[-1]
    assert last.alert == "HOLD" and last.reasons[-1] == m.DOUBTED and asked and all(s < 0 for s in asked)
    assert m.judge(looks, spec=SPEC, seed=1, again=lambda k, shift: looks[k][1])[-1].alert == "ROLLBACK"


def test_how_sure_the_replay_is_comes_from_all_units() -> None:
    found = replayed(np.random.default_rng(19))
    said = m.difference(found)
    gap = found.pol - found.base
    assert said.d_all == pytest.approx(gap.sum() / found.n.sum()) and said.se_all < said.se_d * 1.05
    assert said.d == pytest.approx(gap[found.treated].sum() / found.n[found.treated].sum())
