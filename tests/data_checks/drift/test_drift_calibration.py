"""What chance alone does: never found drifted for it, and what is no chance found within two days, at stated sizes and seeds."""

from collections.abc import Iterator
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import drift as world
from data_checks import drift as subject
from data_checks.drift import Baseline, DriftSpec, course, measure, settled
from data_checks.drift.calibration import (
    Counted,
    Tail,
    benjamini_hochberg,
    cells,
    chance_of_moved,
    chance_of_none,
    counts_in,
    means_of,
    volume_null,
    wasserstein,
)

SEED = 5


@pytest.fixture(scope="module")
def baselines() -> Iterator[dict[int, Baseline]]:
    yield {rows: world.reference(rows, SEED) for rows in (200, 2_000)}


@pytest.mark.parametrize("rows", [200, 2_000])
def test_thirty_clean_days_of_fifty_columns_raise_at_most_one_false_alarm(
    baselines: dict[int, Baseline], rows: int
) -> None:
    alarms, spoke, flagged = world.clean_days(baselines[rows], rows, SEED, 30)
    print(f"{rows} rows a day, seed {SEED}: {alarms} alarms, {spoke} days spoke, {flagged} of 1500 columns flagged")
    assert alarms <= 1 and flagged <= 0.005 * 1500


@pytest.mark.parametrize("what", list(world.SHIFTS))
def test_what_is_no_chance_is_found_within_two_days(baselines: dict[int, Baseline], what: str) -> None:
    name, change = world.SHIFTS[what]
    took = {rows: world.found_after(baselines[rows], rows, SEED + 1, name, change) for rows in (200, 2_000)}
    print(f"{what}, seed {SEED + 1}: day found by rows a day {took}")
    assert took[2_000] is not None
    # 200 rows cannot tell a fifth of a deviation, nor the absence of 7 expected rows, from chance in fifty columns
    assert (took[200] is not None) == (what in ("a column 90% null", "a unit change (x100)"))


def test_evidently_s_preset_cries_wolf_where_this_is_silent(baselines: dict[int, Baseline]) -> None:
    names = ("normal_0", "pareto_0", *world.CATEGORICAL)
    before = pa.concat_tables([world.day(n, 200, SEED) for n in range(7)])
    count, _ = world.preset(before.select(["day", *names]), world.day(28, 200, SEED).select(["day", *names]))
    flagged = world.clean_days(baselines[200], 200, SEED, 1)[2]
    print(
        f"200 rows, seed {SEED}, nothing changed: the preset flags {count} of {len(names)} columns, this {flagged} of 50"
    )
    assert count >= 3 > flagged


@pytest.mark.parametrize("values", ["normal", "lognormal"])
def test_a_chance_is_as_frequent_as_it_says(values: str) -> None:
    draw = np.random.default_rng(11)
    sample = getattr(draw, values)
    found = []
    for _ in range(12):
        days = [np.sort(sample(size=300)) for _ in range(28)]
        ordered = np.sort(np.concatenate(days))
        bounds = cells(ordered)
        counted = Counted("x", counts_in(days, bounds), np.diff(means_of(ordered, bounds)) / ordered.std())
        null = counted.null(300, 1)
        found += [null.chance(wasserstein(np.sort(sample(size=300)), ordered, ordered.std())[0]) for _ in range(40)]
    rates = {level: float(np.mean(np.array(found) <= level)) for level in (0.2, 0.05, 0.01)}
    print(values, rates)
    assert all(rate <= 1.6 * level + 0.005 for level, rate in rates.items())
    assert rates[0.2] >= 0.08, "not so careful that nothing is ever found"


def days_of(rows: int, numbers: range, seed: int, mean: float = 0.0, weekend: float = 0.0) -> pa.Table:
    """A column whose mean moves at weekends and by the day."""
    tables = []
    for n in numbers:
        draw = np.random.default_rng([seed, n])
        at = date(2026, 1, 5) + timedelta(days=n)
        x = draw.normal(mean + weekend * (at.weekday() >= 5), 1, rows)
        tables.append(pa.table({"day": pa.array([at] * rows, pa.date32()), "x": x}))
    return pa.concat_tables(tables)


def test_days_that_differ_from_one_another_are_no_drift_though_their_rows_are_no_chance() -> None:
    spec = DriftSpec(window_days=1)
    reference = days_of(2_000, range(28), 3, weekend=1.5)
    saturday = days_of(2_000, range(33, 34), 3, weekend=1.5)
    dated = Baseline(reference, numeric=["x"], categorical=())
    undated = Baseline(reference.drop_columns(["day"]), numeric=["x"], categorical=())
    assert not measure(saturday, dated, numeric=["x"], categorical=(), spec=spec).entries["x"]["drifted"]
    assert measure(saturday, undated, numeric=["x"], categorical=(), spec=spec).entries["x"]["drifted"]


def test_the_same_days_give_the_same_verdict_whatever_was_judged_before() -> None:
    spec = DriftSpec(window_days=1)
    reference = days_of(300, range(28), 4)
    used = Baseline(reference, numeric=["x"], categorical=())
    for n in (30, 31):
        measure(days_of(250, range(n, n + 1), 4), used, numeric=["x"], categorical=(), spec=spec)
    fresh = Baseline(
        reference.take(pa.array(np.random.default_rng(0).permutation(28 * 300))), numeric=["x"], categorical=()
    )
    now = days_of(300, range(32, 33), 4)
    one, other = (measure(now, b, numeric=["x"], categorical=(), spec=spec).entries for b in (used, fresh))
    assert one == other


def test_volume_is_judged_by_how_the_days_vary() -> None:
    steady, unsteady = np.full(28, 1_000), np.tile([2_000, 2_000, 2_000, 2_000, 2_000, 300, 300], 4)
    assert volume_null(np.array([5, 5]), 1) is None
    calm, wild = volume_null(steady, 1), volume_null(unsteady, 1)
    assert calm is not None and wild is not None
    usual = float(unsteady.mean())
    assert calm.chance(abs(np.log(300 / 1_000))) == 0 and wild.chance(abs(np.log(300 / usual))) > 0.05
    spec = DriftSpec(window_days=1)
    baseline = Baseline(days_of(300, range(28), 6), numeric=["x"], categorical=())
    few = measure(days_of(120, range(30, 31), 6), baseline, numeric=["x"], categorical=(), spec=spec)
    as_ever = measure(days_of(300, range(30, 31), 6), baseline, numeric=["x"], categorical=(), spec=spec)
    assert few.volume_drifted and few.spoke and few.volume == pytest.approx(0.4)
    assert not as_ever.volume_drifted and not as_ever.spoke


def test_one_strange_row_in_a_constant_column_is_not_drift_and_five_are() -> None:
    table = days_of(2_000, range(28), 7)
    constant = table.set_column(1, "x", pa.array(np.zeros(table.num_rows)))
    baseline = Baseline(constant, numeric=["x"], categorical=())
    spec = DriftSpec(window_days=1)
    for strange, drifted in ((1, False), (5, True)):
        now = days_of(2_000, range(30, 31), 7)
        now = now.set_column(1, "x", pa.array(np.where(np.arange(2_000) < strange, 1.0, 0.0)))
        assert measure(now, baseline, numeric=["x"], categorical=(), spec=spec).entries["x"]["drifted"] == drifted


def test_categories_rarer_than_one_in_ten_thousand_are_judged_on_raw_counts() -> None:
    def codes(rare: int) -> pa.Table:
        return pa.table({"code": ["often"] * (400_000 - rare - 20) + ["seldom"] * 20 + ["rare"] * rare})

    baseline = Baseline(codes(3), numeric=(), categorical=["code"])
    spec = DriftSpec(window_days=1)
    moved = measure(codes(30), baseline, numeric=(), categorical=["code"], spec=spec)
    assert moved.entries["code"]["rare_moved"] == ["rare: 3 of 400000 → 30 of 400000"] and not moved.spoke
    assert measure(codes(5), baseline, numeric=(), categorical=["code"], spec=spec).entries["code"]["rare_moved"] == []


def test_the_champion_s_gain_decides_whether_one_column_is_enough() -> None:
    names = [f"x{n}" for n in range(8)]
    draw = np.random.default_rng(9)
    reference = pa.table({n: draw.normal(size=5_000) for n in names})
    now = pa.table({n: draw.normal(0.3 * (n == "x2"), 1, 2_000) for n in names})
    baseline = Baseline(reference, numeric=names, categorical=())

    def judged(gains: dict[str, float] | None) -> subject.Findings:
        return measure(now, baseline, numeric=names, categorical=(), spec=DriftSpec(), importances=gains)

    heavy, light, alike = judged({"x2": 0.4, "other": 0.6}), judged({"x2": 0.01, "x1": 0.99}), judged(None)
    assert [f.spoke for f in (heavy, light, alike)] == [True, False, False]
    assert heavy.importance_share == pytest.approx(0.4) and alike.importance_share == pytest.approx(1 / 8)


def test_k_of_m_days_must_speak_and_the_grave_need_not_wait() -> None:
    spec = DriftSpec(k=2, m=3)
    assert not settled([True], False, spec) and settled([True], True, spec)
    assert settled([True, False, True], False, spec) and not settled([True, True, False], False, spec)
    assert not settled([True, False, False, True], False, spec), "longer ago than m days"


def test_the_week_is_judged_and_its_newest_day_by_itself_for_what_cannot_wait() -> None:
    spec = DriftSpec(window_days=7)
    baseline = Baseline(days_of(2_000, range(28), 8), numeric=["x"], categorical=(), block=7)
    calm = days_of(2_000, range(28, 34), 8)
    broken = days_of(2_000, range(34, 35), 8)
    nulled = broken.set_column(1, "x", pa.array(broken["x"].to_numpy(), mask=np.arange(2_000) % 10 > 0))
    found = measure(pa.concat_tables([calm, nulled]), baseline, numeric=["x"], categorical=(), spec=spec)
    assert found.grave and "the newest day alone: nulls 0% → 90%" in found.entries["x"]["reason"]
    assert not measure(pa.concat_tables([calm, broken]), baseline, numeric=["x"], categorical=(), spec=spec).grave


def test_benjamini_and_hochberg_s_own_example() -> None:
    chances = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1.0,
    ]
    rejected, cut = benjamini_hochberg(chances, 0.05)
    assert rejected.sum() == 4 and cut == pytest.approx(4 * 0.05 / 15)
    assert benjamini_hochberg([], 0.05)[0].size == 0


def test_a_category_absent_by_chance_and_one_that_vanished() -> None:
    days = np.random.default_rng(2).poisson([100.0, 2.0], (28, 2))
    bursts = np.zeros((28, 1), np.int64)
    bursts[::7] = 700
    totals = np.full(28, 2_000)
    often, seldom = chance_of_none(days, totals, 2_000)
    assert often < 1e-30 and seldom > 0.05
    assert chance_of_none(bursts, totals, 2_000)[0] > 0.3, "it comes once a week: absent on most days"
    same, more = chance_of_moved(np.array([10, 40]), np.array([10, 10]), (1_000, 1_000))
    assert same == 1.0 and more < 0.01


def test_the_tail_of_draws_is_continued_and_inverted() -> None:
    tail = Tail(np.abs(np.random.default_rng(0).normal(size=400)))
    assert tail.chance(tail.at(0.001)) == pytest.approx(0.001)
    assert 1e-5 < tail.chance(3.3) < 0.01 and tail.chance(0.0) == 1.0
    assert Tail(np.zeros(10)).chance(0.1) == 0.0


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"k": 4, "m": 3}, "4 of 3 days"),
        ({"reference": "pinned"}, "needs pinned_from and pinned_to"),
        ({"pinned_from": date(2026, 1, 1)}, "has no meaning with reference: trailing"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused(said: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DriftSpec.model_validate(said)


# --- days that are not independent ------------------------------------------------------------------------------------

NAMES = tuple(f"x{n}" for n in range(6))


def joined(
    effect: np.ndarray, seed: int, *, rows: int = 200, growth: float = 0.0, step: float = 0.0, late: int = 7
) -> pa.Table:
    """Six columns of 35 days, moved by ``effect`` (days × 1 or 6): amounts that grow, and on the ``late`` last days a step."""
    draw, tables = np.random.default_rng(seed), []
    for n, moved in enumerate(effect):
        x = draw.normal(size=(rows, len(NAMES))) + moved + step * (n >= len(effect) - late)
        amounts = (3 + x) * (1 + growth) ** n
        day = pa.array([date(2026, 1, 5) + timedelta(days=n)] * rows, pa.date32())
        tables.append(pa.table({"day": day, **{name: amounts[:, at] for at, name in enumerate(NAMES)}}))
    return pa.concat_tables(tables)


def found(table: pa.Table, spec: DriftSpec) -> subject.Findings:
    """The last window beside the days before it."""
    days = len(set(table["day"].to_pylist()))
    rows = table.num_rows // days
    cut = (days - spec.window_days) * rows
    baseline = Baseline(table.slice(0, cut), numeric=NAMES, categorical=(), block=spec.window_days)
    return measure(table.slice(cut), baseline, numeric=NAMES, categorical=(), spec=spec)


def lasting(seed: int, columns: int) -> np.ndarray:
    """Effects of 35 days with a deviation of 0.15, each like the day before (0.7)."""
    effect = np.random.default_rng(seed).normal(size=(35, columns)) * 0.15
    for n in range(1, 35):
        effect[n] = 0.7 * effect[n - 1] + np.sqrt(1 - 0.7**2) * effect[n]
    return effect


def test_days_on_which_all_columns_move_together_seldom_alert_and_a_shift_does() -> None:
    spec, months = DriftSpec(), 20
    alerts = sum(found(joined(lasting(n, 1), n), spec).spoke for n in range(months))
    shifted = [found(joined(lasting(n, 1), n, step=1.0), spec).spoke for n in range(8)]
    print(f"{alerts} of {months} weeks alert; of {len(shifted)} with a step of a deviation {sum(shifted)}")
    assert alerts <= 1
    assert sum(shifted) >= 7


def test_growth_that_goes_on_is_no_drift_and_a_step_in_it_is() -> None:
    spec = DriftSpec(window_days=2, numeric_threshold=0.05, share=0.3)
    still = np.zeros((35, 1))
    growing = [found(joined(still, n, growth=0.01), spec) for n in range(8)]
    for one in growing:
        far = [one.entries[name]["distance"] for name in NAMES]
        left = [one.entries[name]["beside_trend"] for name in NAMES]
        assert min(far) > 0.3 and np.median(left) < 0.4 * np.median(far)
    assert sum(one.spoke for one in growing) <= 1
    assert all(found(joined(still, n, growth=0.01, step=0.5, late=2), spec).spoke for n in range(8))
    alike = found(joined(still, 3), spec)
    assert all(alike.entries[name]["beside_trend"] is None for name in NAMES)


def test_a_trend_is_carried_no_further_than_it_was_seen() -> None:
    slices = [np.sort(np.random.default_rng(n).lognormal(0.02 * n, 1, 500)) for n in range(28)]
    found = course.of_numbers(slices, np.arange(28.0))
    assert found.trend is not None and found.trend.amounts
    assert found.trend.slope == pytest.approx(0.02, abs=0.004)
    near = found.trend.carried(34.0)
    assert near is not None and near.mean() == pytest.approx(np.exp(0.02 * 34 + 0.5), rel=0.08)
    assert found.trend.carried(55.0) is None


def test_what_days_share_is_told_from_what_their_rows_vary_by() -> None:
    dates, draw = np.arange(28.0), np.random.default_rng(1)

    def of(effect: np.ndarray) -> course.Shared:
        return course.of_numbers([np.sort(draw.normal(e, 1, 400)) for e in effect], dates).any_days

    calm = [of(np.zeros(28)) for _ in range(30)]
    moved = [of(lasting(n, 1)[:28, 0]) for n in range(30)]
    assert np.mean([s.times for s in calm]) < 0.1
    assert np.mean([s.times for s in moved]) > 3, "a variance of 0.15² beside 1/400, less what a line takes of it"
    assert 0.45 < np.mean([s.rho for s in moved]) < 0.75
    weekend = 0.5 * (np.arange(28) % 7 >= 5)
    found = course.of_numbers([np.sort(draw.normal(e, 1, 400)) for e in weekend], dates)
    assert found.any_days.times > 10 > 10 * found.weeks.times, "whole weeks differ by no weekday"
