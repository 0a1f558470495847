"""Performance: what scores say of themselves beside the truth, what they cannot see, and that nothing looks ahead."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from data_checks import performance as perf
from data_checks.performance import Array, PerformanceSpec, estimation, judge
from data_checks.performance.page import within

DAY = date(2026, 5, 1)
SPEC = PerformanceSpec()


def drawn(seed: int, rows: int = 3000) -> tuple[np.random.Generator, Array]:
    rng = np.random.default_rng(seed)
    return rng, rng.beta(1, 4, rows)


def by_name(p: Array) -> dict[str, perf.Metric]:
    return {m.name: m for m in perf.probability_metrics(p)}


def value(metric: perf.Metric, p: Array, y: Array) -> float:
    return float(metric.value(metric.sums({"predicted": p, "actual": y}, np.zeros(len(p), np.int64), 1)[0]))


# --- the estimate from scores alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["brier", "log_loss", "accuracy", "roc_auc"])
def test_calibrated_scores_say_how_well_they_will_do_and_how_surely(name: str) -> None:
    """400 draws of the outcomes from the scores themselves: the estimate is their mean, its interval holds 95% of them."""
    rng, p = drawn(1)
    metric = by_name(p)[name]
    found = perf.estimate(metric, {"predicted": p})
    truth = np.array([value(metric, p, (rng.random(len(p)) < p).astype(float)) for _ in range(400)])
    assert found.value == pytest.approx(truth.mean(), abs=4 * truth.std() / 20)
    assert found.error == pytest.approx(truth.std(), rel=0.15)
    inside = (np.abs(truth - found.value) < found.reach()).mean()
    print(f"{name}: estimate {found.value:.4f}, truth {truth.mean():.4f}, inside the interval {inside:.1%} of 400")
    assert 0.92 <= inside <= 0.98


@pytest.mark.parametrize("rows", [5, 40, 5000])
def test_metrics_are_the_textbooks(rows: int) -> None:
    from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

    rng, p = drawn(2, rows)
    y = (rng.random(rows) < p).astype(float)
    y[:2] = (0, 1)
    metrics = by_name(p)
    assert value(metrics["brier"], p, y) == pytest.approx(brier_score_loss(y, p))
    assert value(metrics["log_loss"], p, y) == pytest.approx(log_loss(y, p))
    assert value(metrics["accuracy"], p, y) == pytest.approx(((p >= 0.5) == y).mean())
    assert value(metrics["roc_auc"], p, y) == pytest.approx(roc_auc_score(y, p), abs=0 if rows <= perf.BINS else 1e-3)


def test_ties_and_few_rows_do_not_bend_the_area() -> None:
    rng = np.random.default_rng(3)
    p = rng.choice([0.2, 0.5, 0.8], 12)
    metric = by_name(p)["roc_auc"]
    truth = [value(metric, p, (rng.random(12) < p).astype(float)) for _ in range(4000)]
    # a row is never both positive and negative: with twelve rows that moves the plain estimate by far more
    assert perf.estimate(metric, {"predicted": p}).value == pytest.approx(np.nanmean(truth), abs=0.01)


def test_where_one_class_alone_is_known_there_is_no_area() -> None:
    p = np.array([0.1, 0.9])
    assert np.isnan(value(by_name(p)["roc_auc"], p, np.ones(2)))


def test_the_estimate_is_wrong_where_scores_no_longer_mean_what_they_say() -> None:
    """The assumption. A concept drift that scores cannot see: the estimate stands still, the truth falls."""
    rng, p = drawn(4, 20_000)
    metric = by_name(p)["brier"]
    before = value(metric, p, (rng.random(len(p)) < p).astype(float))
    after = value(metric, p, (rng.random(len(p)) < np.clip(p * 2.2, 0, 1)).astype(float))
    found = perf.estimate(metric, {"predicted": p})
    assert abs(found.value - before) < found.reach()
    assert after - found.value > 10 * found.reach()
    assert "cannot see" in perf.ASSUMES["probability"] and "cannot see" in perf.ASSUMES["amount"]


def test_outcomes_that_are_known_put_miscalibrated_scores_right() -> None:
    rng, true = drawn(5, 20_000)
    p = 1 / (1 + np.exp(-(2.0 * np.log(true / (1 - true)) + 0.7)))  # overconfident and too high
    y = (rng.random(len(p)) < true).astype(float)
    new = p[10_000:]
    metric = by_name(p)["brier"]
    # Brier's expectation uses p twice: as the forecast and as the truth. Calibrated, both are the same again
    put_right = perf.calibrated(new, p[:10_000], y[:10_000])
    assert np.abs(put_right - true[10_000:]).mean() < 0.01 < np.abs(new - true[10_000:]).mean() / 5
    found = perf.estimate(metric, {"predicted": put_right})
    assert abs(found.value - value(metric, put_right, y[10_000:])) < found.reach()
    assert perf.calibrated(new[:5], p[:0], y[:0]) == pytest.approx(new[:5]), "nothing known changes nothing"


def test_scores_that_are_far_off_are_put_right_rather_than_carried_to_certainty() -> None:
    draw = np.random.default_rng(3)
    p = 1 - draw.beta(1, 300, 4_000)  # nearly all sure of a miss
    y = (draw.random(4_000) < 0.3).astype(float)
    put_right = perf.calibrated(p, p, y)
    assert put_right.mean() == pytest.approx(y.mean(), abs=0.02)
    assert put_right.min() > 0.05 and put_right.max() < 0.95


def test_the_error_of_amounts_is_foreseen_by_their_size() -> None:
    rng = np.random.default_rng(6)

    def world(mean: float, rows: int = 5000) -> tuple[Array, Array]:
        foreseen = rng.gamma(2, mean / 2, rows)
        return foreseen, foreseen * rng.gamma(4, 1 / 4, rows)

    spread = perf.Spread.learn(*world(10))
    metrics = {m.name: m for m in perf.amount_metrics(spread)}
    p, y = world(14)  # larger amounts than those learned from, errors by size as before
    found, known = perf.estimate(metrics["mae"], {"predicted": p}), value(metrics["mae"], p, y)
    narrow = perf.Spread.learn(*world(10), bins=1).of(p)[0].mean()
    assert abs(found.value - known) < abs(narrow - known) / 2
    assert found.value == pytest.approx(known, rel=0.1)
    shaken = np.where(rng.random(len(p)) < 0.5, 0.0, y)  # half of them earn nothing: sizes do not tell
    assert value(metrics["mae"], p, shaken) > 1.2 * found.value


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_by_day_hold_where_rows_share_their_day() -> None:
    """300 windows of seven days whose level moves from day to day: by day the interval holds, by row it does not."""
    rng = np.random.default_rng(7)
    metric = perf.amount_metrics(None)[0]
    by_day = by_row = 0
    for _ in range(300):
        level = np.repeat(rng.normal(0, 1, 7), 50)
        error = np.abs(level + rng.normal(0, 1, 350))
        columns = {"predicted": np.zeros(350), "actual": error}
        truth = np.sqrt(2) * np.sqrt(2 / np.pi)
        one, other = perf.realised(metric, columns, np.repeat(np.arange(7), 50)), perf.realised(metric, columns)
        by_day += abs(one.value - truth) < one.reach()
        by_row += abs(other.value - truth) < other.reach()
    print(f"by day {by_day / 300:.1%}, by row {by_row / 300:.1%} of 300")
    assert by_day >= 0.87 * 300 > by_row + 60


@pytest.mark.parametrize("world", ["days move", "entities differ", "both", "one row each"])
def test_intervals_by_day_and_entity_hold_where_either_is_shared(world: str) -> None:
    """400 windows of seven days, 60 entities of which a third is there on every day: two-way the interval holds."""
    rng = np.random.default_rng(17)
    metric = perf.amount_metrics(None)[0]
    stays = np.arange(60) < 20
    entity = np.concatenate([np.where(stays, np.arange(60), 60 * (day + 1) + np.arange(60)) for day in range(7)])
    entity = np.arange(420) if world == "one row each" else np.unique(entity, return_inverse=True)[1]
    day = np.repeat(np.arange(7), 60)
    moves, differ = world in ("days move", "both", "one row each"), world in ("entities differ", "both")
    truth = 10.0
    inside = by_day = 0
    for _ in range(400):
        error = truth + rng.normal(0, 1, 420)
        error += rng.normal(0, 1, 7)[day] * moves + rng.normal(0, 3, 420)[entity] * differ
        columns = {"predicted": np.zeros(420), "actual": error}
        sums = metric.sums(columns, day, 7)
        one = perf.jackknife(metric, sums)
        both = perf.two_way(one, metric, columns, sums.sum(axis=0), day, entity)
        inside += abs(both.value - truth) < both.reach()
        by_day += abs(one.value - truth) < one.reach()
        if world == "one row each":
            assert both == one
    print(f"{world}: two-way {inside / 400:.1%}, by day {by_day / 400:.1%} of 400")
    assert 0.93 * 400 <= inside <= 0.995 * 400
    if world == "entities differ":
        assert by_day < 0.8 * 400


@pytest.mark.parametrize("name", ["brier", "roc_auc", "calibration_error"])
def test_how_far_a_row_moves_a_figure_is_what_leaving_it_out_moves_it(name: str) -> None:
    rng, p = drawn(11, 800)
    y = (rng.random(800) < p).astype(float)
    weight = rng.choice([0.2, 1.0], 800)
    metric = by_name(p)[name]
    columns = {"predicted": p, "actual": y, "weight": weight}
    total = metric.sums(columns, np.zeros(800, np.int64), 1)[0]
    assert metric.each is not None
    moves = metric.each(columns, estimation._gradient(metric.value, total))
    assert moves.sum() == pytest.approx(0, abs=1e-6)
    for row in (3, 77, 500):
        kept = np.arange(800) != row
        less = metric.sums({k: v[kept] for k, v in columns.items()}, np.zeros(799, np.int64), 1)[0]
        assert metric.value(total) - metric.value(less) == pytest.approx(moves[row], abs=3e-5, rel=0.05)


# --- day by day -------------------------------------------------------------------------------------------------------


def scored(
    days: int = 60,
    *,
    rows: int = 100,
    maturity: int = 12,
    truth: Callable[[int, Array], Array] = lambda ago, p: p,
    version: Callable[[int], int | None] = lambda ago: 1,
    seed: int = 8,
) -> pa.Table:
    """What ``judge`` reads at DAY: ``ago`` days before it, outcomes known of those older than ``maturity`` days only."""
    rng = np.random.default_rng(seed)
    tables = []
    for ago in range(days):
        p = rng.beta(1, 4, rows)
        y = (rng.random(rows) < truth(ago, p)).astype(float)
        late = rng.random(rows) < (0.9 if ago < maturity else 0.0)
        tables.append(
            pa.table(
                {
                    "day": pa.array([DAY - timedelta(days=ago)] * rows, pa.date32()),
                    "entity_id": [f"e{i}" for i in range(rows)],
                    "version": pa.array([version(ago)] * rows, pa.int64()),
                    "predicted": p,
                    "actual": np.where(late, np.nan, y),
                }
            )
        )
    return pa.concat_tables(tables).sort_by([("day", "ascending"), ("entity_id", "ascending")])


def told(
    rows: pa.Table, *, metric: str = "brier", spec: PerformanceSpec = SPEC, **more: Any
) -> dict[str, dict[str, Any]]:
    """The window of each kind."""
    found = perf.windows(judge(rows, DAY, kind="probability", spec=spec, maturity_days=12, **more))
    return {r["kind"]: r for r in found.to_pylist() if r["metric"] == metric}


def test_a_window_is_judged_beside_the_days_before_it() -> None:
    found = told(scored())
    assert set(found) == {"realised", "estimated"}
    realised, estimated = found["realised"], found["estimated"]
    assert (realised["first"], realised["last"]) == (DAY - timedelta(days=18), DAY - timedelta(days=12))
    assert (estimated["first"], estimated["last"]) == (DAY - timedelta(days=6), DAY)
    assert realised["baseline_is"] == "reference" and realised["known"] == 1 and realised["version"] == 1
    assert realised["worse_low"] < 0.05 and estimated["worse_low"] < 0.05
    assert realised["low"] < realised["value"] < realised["high"]


def test_the_gates_held_out_figure_is_the_baseline_where_there_is_one() -> None:
    found = told(scored(), gate=lambda number: {"brier": 0.08} if number == 1 else {})
    for row in found.values():
        assert row["baseline"] == 0.08 and row["baseline_is"] == "gate" and row["worse_low"] > 0.2
        assert "baseline 0.08 (gate)" in row["text"] and "worse" in row["text"]
    assert told(scored(), gate=lambda number: {"brier": float("nan")})["realised"]["baseline_is"] == "reference"


def test_a_fall_is_realised_once_it_has_matured_and_no_estimate_sees_it_before() -> None:
    def fallen(since: int) -> dict[str, dict[str, Any]]:
        return told(scored(truth=lambda ago, p: np.clip(p * 2.5, 0, 1) if ago < since else p))

    young, old = fallen(12), fallen(19)
    assert young["realised"]["worse_low"] < 0.05 and old["realised"]["worse_low"] > 0.1
    assert young["estimated"]["worse_low"] < 0.05


def test_harder_cases_are_estimated_before_any_outcome_is_known() -> None:
    rows = scored()
    recent = pc.greater(rows["day"], pa.scalar(DAY - timedelta(days=7)))
    middling = pc.if_else(recent, 0.5, rows["predicted"])
    found = told(rows.set_column(rows.schema.get_field_index("predicted"), "predicted", middling))
    assert found["estimated"]["worse_low"] > 0.5 > found["realised"]["worse_low"]


def test_only_days_of_the_version_that_scores_now_speak_of_it() -> None:
    fresh = told(scored(version=lambda ago: 2 if ago < 5 else 1))
    assert "realised" not in fresh and fresh["estimated"]["version"] == 2
    assert fresh["estimated"]["first"] == DAY - timedelta(days=4) and fresh["estimated"]["baseline_is"] == "reference"
    assert told(scored(version=lambda ago: 2 if ago < 2 else 1)) == {}, "two days are too few"
    rule = told(scored(version=lambda ago: None))["realised"]
    assert rule["version"] is None and "of the rule" in rule["text"]


def test_few_rows_or_days_are_not_judged() -> None:
    assert told(scored(rows=20)) == {}
    short = told(scored(days=14))
    assert "realised" not in short and short["estimated"]["baseline"] is None and short["estimated"]["worse"] is None
    assert judge(scored().slice(0, 0), DAY, kind="probability", spec=SPEC).num_rows == 0


def test_a_day_of_which_too_little_is_known_is_not_mature_however_old() -> None:
    rows = scored()
    known = pc.if_else(pc.less(rows["day"], pa.scalar(DAY - timedelta(days=14))), rows["actual"], np.nan)
    found = told(rows.set_column(rows.schema.get_field_index("actual"), "actual", known))
    assert found["realised"]["last"] == DAY - timedelta(days=15)


def test_a_young_day_is_not_mature_however_much_is_known() -> None:
    """What is known early is what went quickly: it says nothing of the rest."""
    rng = np.random.default_rng(10)
    rows = scored(maturity=0)  # everything is known
    young = pc.greater(rows["day"], pa.scalar(DAY - timedelta(days=12)))
    quick = np.where(young.to_numpy() & (rng.random(rows.num_rows) < 0.3), np.nan, rows["actual"].to_numpy())
    found = told(rows.set_column(rows.schema.get_field_index("actual"), "actual", pa.array(quick)))
    assert found["realised"]["last"] == DAY - timedelta(days=12)


@pytest.mark.parametrize("metric", ["brier", "log_loss", "accuracy", "roc_auc"])
def test_worse_is_positive_whichever_direction_is_better(metric: str) -> None:
    found = told(scored(truth=lambda ago, p: np.full(len(p), 0.5) if ago < 19 else p), metric=metric)["realised"]
    assert found["worse"] > found["worse_low"] > 0.1 and "worse" in found["text"]


def test_days_that_still_change_have_a_figure_each_and_an_estimate_beside_it() -> None:
    found = judge(scored(), DAY, kind="probability", spec=SPEC, maturity_days=12).to_pylist()
    daily = {(r["kind"], r["last"]): r for r in found if r["metric"] == "brier" and r["first"] == r["last"]}
    young, old = DAY - timedelta(days=3), DAY - timedelta(days=15)
    assert "maturing" in daily["realised", young]["text"] and daily["realised", young]["known"] < 0.3
    assert daily["realised", old]["mature"] and not daily["realised", young]["mature"]
    assert ("estimated", young) in daily and ("estimated", old) not in daily
    assert daily["realised", old]["low"] < daily["realised", old]["value"] < daily["realised", old]["high"]
    assert not [r for r in found if r["metric"] == "calibration_error" and r["kind"] == "estimated"]


def test_scores_of_later_days_change_nothing_and_order_neither() -> None:
    rows = scored()
    before = DAY - timedelta(days=5)
    seen = rows.filter(pc.less_equal(rows["day"], pa.scalar(before)))
    args: Any = {"kind": "probability", "spec": SPEC, "maturity_days": 12}
    assert judge(rows, before, **args).equals(judge(seen, before, **args))


@pytest.mark.slow
def test_without_a_change_a_limit_of_a_tenth_is_rarely_passed() -> None:
    """30 worlds in which nothing happens, 100 rows a day."""
    passed = {"realised": 0, "estimated": 0}
    for seed in range(30):
        for kind, row in told(scored(seed=100 + seed)).items():
            passed[kind] += row["worse_low"] > 0.1
    print(f"false falls in 30 quiet windows: {passed}")
    assert passed["realised"] <= 1 and passed["estimated"] == 0


@pytest.mark.parametrize("worse", [False, True])
def test_the_newest_version_is_compared_with_the_rule_on_the_same_rows(worse: bool) -> None:
    rows = scored(truth=lambda ago, p: 1 - p if worse and ago < 30 else p)
    rule = np.full(rows.num_rows, 0.2)
    rule[:50] = np.nan  # where it said nothing, nothing is compared
    found = told(rows.append_column(perf.RULE, pa.array(rule)))[perf.RULE]
    assert found["baseline_is"] == "rule" and found["version"] == 1 and found["n"] == 700
    assert (found["worse_low"] > 0) is worse and (found["worse"] > 0) is worse
    assert "of the rule [" in found["text"] and "for version 1 on the same rows" in found["text"]
    # days after which the rule scored itself still speak of the version before
    since = told(scored(version=lambda ago: None if ago < 3 else 1).append_column(perf.RULE, pa.array(rule)))[perf.RULE]
    assert since["version"] == 1


@pytest.mark.parametrize("ruled", [2, 3])
def test_days_on_which_the_rule_scored_nothing_do_not_count_beside_it(ruled: int) -> None:
    rows = scored()
    last = DAY - timedelta(days=12)
    said = pc.and_(
        pc.less_equal(rows["day"], pa.scalar(last)), pc.greater(rows["day"], pa.scalar(last - timedelta(days=ruled)))
    )
    rule = np.where(said.to_numpy(), 0.2, np.nan)
    spec = SPEC.model_copy(update={"min_rows": 50})
    found = told(rows.append_column(perf.RULE, pa.array(rule)), spec=spec).get(perf.RULE)
    if ruled < SPEC.min_days:
        assert found is None, "two days are too few to tell noise from a difference, however many rows they hold"
        return
    assert found is not None and found["n"] == 300
    assert found["first"] == last - timedelta(days=2) and "of 3 days" in found["text"]


@pytest.mark.slow
def test_a_version_as_good_as_the_rule_is_rarely_found_worse() -> None:
    """60 windows in which both say nearly the same, equally well."""
    rng = np.random.default_rng(12)
    passed = 0
    for seed in range(60):
        rows = scored(days=20, seed=300 + seed)
        p = rows["predicted"].to_numpy()
        noisy = [np.clip(p + rng.normal(0, 0.1, len(p)), 0.01, 0.99) for _ in range(2)]
        rows = rows.set_column(rows.schema.get_field_index("predicted"), "predicted", pa.array(noisy[0]))
        passed += told(rows.append_column(perf.RULE, pa.array(noisy[1])))[perf.RULE]["worse_low"] > 0
    print(f"found worse than the rule in {passed} of 60 windows without a difference")
    assert passed <= 4


def test_coverage_counts_promises_only() -> None:
    rows = scored()
    promised = np.full(rows.num_rows, 0.9)
    promised[::2] = np.nan
    rng = np.random.default_rng(9)
    inside = np.where(np.isnan(rows["actual"].to_numpy()) | np.isnan(promised), np.nan, rng.random(len(promised)) < 0.7)
    found = told(
        rows.append_column("promised", pa.array(promised)).append_column("inside", pa.array(inside)), metric="coverage"
    )
    assert found["realised"]["value"] == pytest.approx(0.7, abs=0.06)
    assert found["estimated"]["value"] == pytest.approx(0.9)


def test_the_page_says_what_is_assumed_and_is_the_same_twice() -> None:
    rows = scored()
    days = [DAY - timedelta(days=n) for n in (2, 1, 0)]
    history = pa.concat_tables([judge(rows, d, kind="probability", spec=SPEC, maturity_days=12) for d in days])
    judged = history.filter(pc.equal(history["day"], pa.scalar(DAY)))
    page = perf.report("tickets", judged, history, "probability")
    assert "concept drift" in page and "<svg" in page and "realised brier" in page
    assert "<script" not in page and page == perf.report("tickets", judged, history, "probability")
    kept = perf.newest(history).to_pylist()
    assert len({(r["metric"], r["kind"], r["last"]) for r in kept}) == len(kept)
    assert max(r["day"] for r in kept) == DAY


def test_no_page_draws_or_lists_a_figure_beyond_what_its_metric_can_be() -> None:
    wide = {"metric": "accuracy", "value": 0.97, "low": -0.2, "high": 1.3}
    assert within(wide) == {**wide, "low": 0.0, "high": 1.0} and wide["high"] == 1.3
    assert within({"metric": "mae", "low": -3.0, "high": 40.0}) == {"metric": "mae", "low": 0.0, "high": 40.0}
    assert within({"metric": "brier", "low": None, "high": None}) == {"metric": "brier", "low": None, "high": None}
    history = judge(scored(), DAY, kind="probability", spec=SPEC, maturity_days=12)
    low, high = history.schema.get_field_index("low"), history.schema.get_field_index("high")
    beyond = history.set_column(low, "low", pa.array([-9.0] * len(history)))
    beyond = beyond.set_column(high, "high", pa.array([9.0] * len(history)))
    (axis, *_), shares = perf.plot(beyond, ["accuracy"]).axes, perf.report("tickets", beyond, beyond, "probability")
    assert axis.dataLim.ymin >= 0 and axis.dataLim.ymax <= 1
    assert ">-9<" not in shares
