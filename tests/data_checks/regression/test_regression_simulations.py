"""The guard in worlds of which the truth is known: how often it speaks falsely, how soon it finds harm, what it must not believe.

Every test prints its counts; 5,000 runs of each are in ``benchmarks/regression.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date, timedelta

import numpy as np
import pytest

from data_checks import regression
from data_checks.regression import effects, sequential
from tests.support import comparisons
from tests.support.comparisons import BUDGET_WORLDS, DAYS, ENTITY_WORLDS, LESS, MORE, PRE, Runs

ALPHA, RUNS = 0.05, 500


def interval(count: int, runs: int) -> tuple[float, float]:
    """95% Clopper-Pearson interval of a share."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, count, runs - count + 1)) if count else 0.0
    return low, float(beta.ppf(0.975, count + 1, runs - count)) if count < runs else 1.0


def shown(what: str, hits: np.ndarray) -> float:
    count, runs = int(hits.sum()), len(hits)
    low, high = interval(count, runs)
    print(f"{what}: {count} of {runs} = {count / runs:.1%} (95%: {low:.1%} to {high:.1%})")
    return count / runs


def at_most_alpha(what: str, hits: np.ndarray) -> None:
    """As many as 5% may be at most: the 99.9% quantile of the binomial, since a file has many such counts."""
    from scipy.stats import binom

    shown(what, hits)
    assert hits.sum() <= binom.ppf(0.999, len(hits), ALPHA), what


ENTITIES = [(w, share, "higher") for w in ENTITY_WORLDS for share in (0.5, 0.2)] + [
    (w, 0.2, "lower") for w in ("zero-inflated revenue", "1% carry half of the value")
]


@pytest.mark.parametrize(("world", "share", "better"), ENTITIES)
def test_entities_with_no_effect_are_rarely_rolled_back(world: str, share: float, better: str) -> None:
    found = comparisons.entities(world, runs=RUNS, share=share, seed=41, a_day=200, better=better)
    name = f"entity, {world}, control {share:.0%}, {better} is better, seed 41"
    at_most_alpha(f"{name}: false ROLLBACK", found.rollback > 0)
    at_most_alpha(f"{name}: false PROMOTE", found.promote)
    if share == 0.5:
        assert shown(f"{name}: naive daily z-test", found.naive) > 0.12


@pytest.mark.parametrize("world", ["plain", "seasonal"])
def test_a_small_harm_to_independent_entities_is_found_within_the_month(world: str) -> None:
    """300 an arm a day, 0.1 sd of what the pre-period leaves (sd 1 in both worlds), half in the holdout."""
    found = comparisons.entities(world, runs=RUNS, share=0.5, seed=43, harm=0.1)
    days = found.rollback[found.rollback > 0]
    day = 0.1 / math.sqrt(2 / 300)  # the z that one day's outcomes are worth
    fixed = {p: ((1.645 + z) / day) ** 2 for p, z in ((0.5, 0.0), (0.95, 1.645))}
    share = shown(f"entity, {world}, harm 0.1 sd, seed 43: found", found.rollback > 0)
    print(
        f"  median day {np.median(days):.0f}, 95% by day {np.quantile(days, 0.95):.0f}; one look at a day fixed beforehand finds "
        f"half with {fixed[0.5]:.1f} days and 95% with {fixed[0.95]:.1f}"
    )
    assert share >= 0.95
    assert np.median(days) <= fixed[0.95]


@pytest.mark.parametrize("world", BUDGET_WORLDS)
def test_persistent_budgets_with_no_effect_are_rarely_rolled_back(world: str) -> None:
    found = comparisons.cohorts(world, runs=RUNS, units=60, share=1 / 3, seed=47)
    name = f"cohort, {world}, 60 campaigns, a third held out, seed 47"
    at_most_alpha(f"{name}: false ROLLBACK", found.rollback > 0)
    at_most_alpha(f"{name}: false PROMOTE", found.promote)
    assert shown(f"{name}: naive daily z-test over campaign-days", found.naive) > 0.12


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_shared_queue_with_no_effect_is_rarely_rolled_back(share: float) -> None:
    found = comparisons.switchbacks(runs=RUNS, teams=12, share=share, seed=53)
    name = f"switchback, 12 teams, weeks, {share:.0%} held out, seed 53"
    at_most_alpha(f"{name}: false ROLLBACK", found.rollback > 0)
    at_most_alpha(f"{name}: false PROMOTE", found.promote)
    assert shown(f"{name}: naive daily z-test over tickets", found.naive) > 0.12


def test_what_the_power_calculator_promises_for_persistent_budgets_is_found() -> None:
    harm, share, units = 0.08, 1 / 3, 60
    history = comparisons.budgets("seasonal", np.random.default_rng(59), days=112, units=units)
    promised = regression.power(
        comparisons.as_history({"value": history}), spec=MORE, design="cohort", treated="champion", control="holdout",
        shares={"holdout": share, "champion": 1 - share}, harm=harm, epoch_days=DAYS, runs=200,
    )  # fmt: skip
    print(promised.sentence())
    kept(promised, comparisons.cohorts("seasonal", runs=200, units=units, share=share, seed=61, harm=harm))


def test_what_the_power_calculator_promises_for_a_shared_queue_is_found() -> None:
    teams, share = 12, 0.5
    found = comparisons.switchbacks(runs=300, teams=teams, share=share, seed=67, harm=0.03)
    rng = np.random.default_rng(71)
    missed, due = comparisons.tickets(rng, days=112, teams=teams, newest=np.full((112, 1, teams), 0.3))
    promised = regression.power(
        comparisons.as_history({"missed": missed[:, 0], "due": due[:, 0]}), spec=LESS, design="switchback",
        treated="champion", control="holdout", shares={"holdout": share, "champion": 1 - share},
        harm=-float(np.median(found.lift)), epoch_days=7, washout_days=1, runs=200,
    )  # fmt: skip
    print(promised.sentence())
    kept(promised, found)


def test_what_the_power_calculator_promises_for_independent_entities_is_found() -> None:
    rng = np.random.default_rng(73)
    days, a_day, harm = 28, 200, 0.1
    own = rng.standard_normal((days, a_day))
    value = 10 + own + rng.standard_normal((days, a_day))
    history = comparisons.as_history({"value": value, "covariate": own})
    promised = regression.power(
        history, spec=MORE, design="entity", treated="champion", control="holdout",
        shares={"holdout": 0.5, "champion": 0.5}, harm=harm / 10, epoch_days=1, runs=150,
    )  # fmt: skip
    print(promised.sentence())
    found = comparisons.entities("plain", runs=200, share=0.5, seed=79, a_day=a_day, harm=harm)
    kept(promised, found)
    days_found = np.where(found.rollback > 0, found.rollback, 99)
    assert promised.days is not None and abs(np.quantile(days_found, 0.8) - promised.days) <= 4


def kept(promised: regression.Power, found: Runs) -> None:
    """The share found lies where the promise and the count of runs allow it."""
    hits = found.rollback > 0
    shown(f"{promised.design}: found by day {DAYS}", hits)
    low, high = interval(int(hits.sum()), len(hits))
    assert low <= promised.high and high >= promised.low
    assert promised.high - promised.low < 0.5, "a promise that wide says nothing"


@pytest.mark.parametrize("pools", ["own", "shared"])
def test_a_model_that_overstates_gains_nothing_where_each_arm_has_its_own_pool(pools: str) -> None:
    found = comparisons.cohorts("seasonal", runs=200, units=60, share=0.5, seed=83, overstated=1.3, pools=pools)
    mean, error = found.lift.mean(), found.lift.std() / math.sqrt(len(found.lift))
    print(
        f"two equal models, one overstates by 30%, pools {pools}: lift {mean:+.2%} ± {1.96 * error:.2%} (200 runs, seed 83)"
    )
    if pools == "own":
        assert abs(mean) <= 1.96 * error + 1e-9
        at_most_alpha("  false PROMOTE", found.promote)
        at_most_alpha("  false ROLLBACK", found.rollback > 0)
    else:
        assert mean - 1.96 * error > 0.03 and found.promote.mean() > 0.2


def test_a_model_that_overstates_gains_in_a_queue_only_where_tickets_are_the_arms() -> None:
    """With teams as arms a factor on all scores of a team changes no order, so nothing at all."""
    gap = {}
    for overstated in (1.0, 1.3):
        missed, due = comparisons.ticket_arms(
            np.random.default_rng(89), days=60, teams=12, runs=100, overstated=overstated
        )
        share = missed / due
        gap[overstated] = float((share[:, 0] - share[:, 1]).mean())
        print(
            f"tickets of one queue as arms, one model says {overstated:.1f} times: its tickets miss {gap[overstated]:+.1%} less"
        )
    assert abs(gap[1.0]) < 0.01 < gap[1.3]


@pytest.mark.parametrize(("shape", "near"), [("pocock", 2.46), ("obrien-fleming", 1.86)])
def test_constants_of_a_group_sequential_test_are_computed(shape: str, near: float) -> None:
    """And a simulated walk crosses as often as it may: 20,000 walks, 30 looks."""
    c = sequential.constant(30, ALPHA, shape)
    walks = np.random.default_rng(97).standard_normal((20_000, 30)).cumsum(1)
    k = np.arange(1, 31)
    crossed = (walks / np.sqrt(k if shape == "pocock" else 30.0) > c).any(1)
    share = shown(f"{shape}, constant {c:.3f}: crossed", crossed)
    assert abs(c - near) < 0.01 and abs(share - ALPHA) < 0.006


@pytest.mark.parametrize("shape", ["early", "late"])
@pytest.mark.parametrize("noisier", [1.0, 4.0])
def test_bounds_of_a_normal_statistic_spend_what_they_may_by_each_look(
    shape: sequential.Spending, noisier: float
) -> None:
    """Also where later days are noisier, and where a day adds next to nothing."""
    step = np.linspace(1, noisier, 30)
    step[10] = 1e-4
    walks = (np.random.default_rng(101).standard_normal((40_000, 30)) * step).cumsum(1)
    variance = np.cumsum(step**2)
    spending = sequential.spent(np.arange(1, 31) / 30, ALPHA, shape)
    bounds = np.array(sequential.normal_bounds(tuple(variance.tolist()), tuple(spending.tolist())))
    crossed = np.logical_or.accumulate(walks / np.sqrt(variance) > bounds, axis=1).mean(0)
    print(f"{shape}, {noisier}: crossed {crossed[-1]:.2%}, by the middle {crossed[14]:.2%} of {spending[14]:.2%}")
    assert (crossed <= spending + 4 * np.sqrt(spending / 40_000) + 1e-4).all()
    assert crossed[-1] > 0.9 * ALPHA
    earlier = sequential.normal_bounds(tuple(variance[:12].tolist()), tuple(spending[:12].tolist()))
    assert np.allclose(earlier, bounds[:12]), "a later look moves no earlier bound"


def test_effects_that_differ_by_unit_and_are_none_in_the_mean_are_rarely_rolled_back() -> None:
    """A canary of a fifth of 60 campaigns, half of them 35% up and half of them 35% down.

    12 units are few for an error that is right as units grow: 7.7% (6.4 to 9.1) of 1,500 months, where the usual error gave 15%.
    """
    found = comparisons.cohorts("seasonal", runs=RUNS, units=60, share=0.8, seed=111, uneven=0.35)
    assert (found.rollback > 0).mean() <= 0.11


def test_four_versions_a_month_are_rolled_back_falsely_in_a_tenth_of_the_years_at_most() -> None:
    """The account of α alone: each version spends what its week may, on paths without an effect."""
    begun: list[tuple[date, date]] = []
    spent = 0.0
    for week in range(52):
        first = comparisons.START + timedelta(days=7 * week)
        held = sequential.left(begun, first, ALPHA, 30, "early")
        begun.append((first, first + timedelta(days=6)))
        spent += float(sequential.spent(7 / 30, held, "early"))
        assert spent <= ALPHA * (1 + (7 * week) / 365) + 1e-12
    print(f"52 versions, a week each: {spent:.1%} of a year's versions in all, the last at {held:.2%}")
    assert spent <= 2 * ALPHA and held > 0.002, "and none goes unjudged"


def test_a_permuted_boundary_spends_what_it_may_whatever_the_paths() -> None:
    rng = np.random.default_rng(103)
    spending = sequential.spent(np.arange(1, 11) / 10, ALPHA)
    worlds: dict[str, Callable[[], np.ndarray]] = {
        "walks": lambda: rng.standard_normal((200, 10)).cumsum(1),
        "the same at every look": lambda: np.repeat(rng.standard_cauchy((200, 1)), 10, axis=1),
        "few values": lambda: rng.integers(0, 4, (200, 10)).astype(np.float64),
    }
    for name, draw in worlds.items():
        hits = np.array([sequential.permuted_bounds(draw(), spending)[1].any() for _ in range(2_000)])
        at_most_alpha(f"permuted boundary, {name}", hits)


def test_simulated_runs_are_judged_as_tables_are() -> None:
    """The arrays that the simulations judge give the same looks as `judge` on the rows they stand for."""
    rng = np.random.default_rng(107)
    value = comparisons.budgets("seasonal", rng, days=PRE + DAYS, units=40)
    arm = comparisons.arms_of(40, 0.5, 1, rng)
    own, weight = effects.adjusting(value[:PRE].mean(0), np.ones(40), MORE.largest_unit)
    none = np.zeros(DAYS, dtype=np.int64)
    clusters = effects.panel(
        value[PRE:], np.ones((DAYS, 40)), own, weight, arm, none, none == 0, comparisons.LOOKS, sign=-1
    )
    path = effects.randomised(clusters, comparisons.LOOKS + 1, metric=MORE.metrics[0], spec=MORE, seed=[5, 0])
    rows = comparisons.as_history({"value": value})
    names = np.where(np.tile(arm[0], PRE + DAYS) == 1, "champion", "holdout")
    start = comparisons.START + comparisons.timedelta(days=PRE)
    rows = rows.append_column("arm", [names]).append_column("epoch", [["one"] * len(names)])
    rows = rows.append_column("washout", [[False] * len(names)])
    judged = regression.judge(
        rows, rows, spec=MORE, design="cohort", treated="champion", control="holdout",
        shares={"champion": 0.5, "holdout": 0.5}, drawn=None, start=start, day=start + comparisons.timedelta(days=DAYS - 1), seed=5,
    )  # fmt: skip
    assert np.allclose(judged.looks["statistic"].to_numpy(), path.statistic)
    bound = np.array([np.inf if b is None else b for b in judged.looks["bound"].to_pylist()])
    assert np.allclose(bound, path.bound)
