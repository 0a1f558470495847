"""What sets and intervals promise: at least the stated coverage on new days, whatever the rows of a day share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models.evaluation.conformal import Bands, Sets, coarser, coverage, fewest_days, halves, quantile
from models.learners.duration import DurationLearner, DurationRule
from models.learners.response import ResponseLearner, ResponseRule
from tests.models.learners import test_duration, test_response

Array = np.ndarray[Any, Any]
RUNS = 400


def a_world(rng: np.random.Generator, days: int, together: float) -> tuple[Array, Array]:
    """Scores of rows and their days: ``together`` is the share of the variance that a day's rows have in common."""
    rows = rng.integers(5, 120, days)
    day = np.repeat(np.arange(days), rows)
    luck = rng.normal(0, 1, days)[day]
    return np.sqrt(together) * luck + np.sqrt(1 - together) * rng.normal(0, 1, len(day)), day


def by_rows(score: Array, day: Array, level: float) -> float:
    """Split conformal over pooled rows: what is wrong where a day's rows go together."""
    rank = int(np.ceil(level * (len(score) + 1)))
    return float(np.sort(score)[min(rank, len(score)) - 1])


def held(bound: Callable[[Array, Array, float], float], together: float, days: int, level: float) -> Array:
    """The share of a new day's rows under the bound, in each of RUNS worlds."""
    rng = np.random.default_rng(20_260_314)
    shares = []
    for _ in range(RUNS):
        score, day = a_world(rng, days + 1, together)
        past = day < days
        shares.append(np.mean(score[~past] <= bound(score[past], day[past], level)))
    return np.array(shares)


@pytest.mark.parametrize("together", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("days", [9, 14, 40])
def test_a_row_of_a_new_day_is_covered_as_stated_whatever_its_day_shares(together: float, days: int) -> None:
    found = held(quantile, together, days, 0.9)
    slack = 2.6 * found.std() / np.sqrt(RUNS)
    print(f"{RUNS} worlds, {days} days, {together:.0%} in common: coverage {found.mean():.3f} ± {slack:.3f}")
    assert found.mean() + slack >= 0.9
    # and not by being endless: at most what the day to come is kept for, twice
    assert found.mean() - slack <= 0.9 + 2 / (days + 1)


def test_pooled_rows_cover_less_than_stated_where_a_days_rows_go_together() -> None:
    rows, days = held(by_rows, 0.95, 14, 0.9), held(quantile, 0.95, 14, 0.9)
    print(f"14 days, 95% in common: rows {rows.mean():.3f}, days {days.mean():.3f}")
    assert rows.mean() + 2.6 * rows.std() / np.sqrt(RUNS) < 0.9
    assert days.mean() > rows.mean()


def test_too_few_days_bound_nothing() -> None:
    assert [fewest_days(level) for level in (0.5, 0.8, 0.9, 0.95)] == [1, 4, 9, 19]
    assert fewest_days(0.9, tails=2) == 19
    score, day = np.arange(90.0), np.arange(90) % 9
    assert quantile(score, day, 0.9) == 89.0
    assert quantile(score, day % 8, 0.9) == np.inf
    # a day with next to nothing of a row is none
    assert quantile(score, day, 0.9, np.where(day == 3, 0.01, 1.0)) == np.inf


def test_each_day_counts_alike_however_many_rows_it_has() -> None:
    few = quantile(np.repeat(np.arange(19.0), 2), np.repeat(np.arange(19), 2), 0.9)
    uneven = np.repeat(np.arange(19), np.where(np.arange(19) == 18, 500, 2))
    assert few == quantile(uneven.astype(float), uneven, 0.9) == 17.0
    assert coverage(np.array([True, True, True, False]), np.array([1, 1, 1, 2])) == 0.5
    assert np.isnan(coverage(np.zeros(0, bool), np.zeros(0)))


@pytest.mark.parametrize("together", [0.0, 2.0])
def test_each_outcome_is_in_its_set_as_stated_even_the_rare_one(together: float) -> None:
    rng = np.random.default_rng(5)
    hits, misses = [], []
    for _ in range(120):
        day = np.repeat(np.arange(31), 60)
        truth = rng.normal(-1.8, 1.5, len(day)) + rng.normal(0, together, 31)[day]
        missed = rng.random(len(day)) < 1 / (1 + np.exp(-truth))
        p = 1 / (1 + np.exp(-(truth + rng.normal(0, 0.5, len(day)))))
        past = day < 30
        sets = Sets.learn(p[past], missed[past].astype(float), day[past], np.full(past.sum(), "open"), 0.9)
        may_miss, may_hit, known = sets.of(p[~past], np.full((~past).sum(), "open"))
        assert known.all()
        now = missed[~past]
        if now.any() and not now.all():
            misses.append(may_miss[now].mean())
            hits.append(may_hit[~now].mean())
    for shares in (misses, hits):
        slack = 2.6 * np.std(shares) / np.sqrt(len(shares))
        assert 0.9 - slack <= np.mean(shares) <= 0.9 + 2 / 31 + slack


def test_expected_labels_count_with_their_share() -> None:
    rng = np.random.default_rng(1)
    p, day = rng.random(3000), np.repeat(np.arange(30), 100)
    share = p  # a calibrated model: of rows with probability p that share will miss
    drawn = (rng.random((40, 3000)) < p).astype(float)
    group = np.full(3000, "x")
    known = [Sets.learn(p, one, day, group, 0.9).limits["x"] for one in drawn]
    assert Sets.learn(p, share, day, group, 0.9).limits["x"] == pytest.approx(np.mean(known, axis=0), abs=0.03)


def test_a_group_with_too_few_days_takes_everybodys_limits_and_none_where_there_are_none() -> None:
    rng = np.random.default_rng(2)
    day = np.repeat(np.arange(20), 30)
    p, group = rng.random(600), np.where(day < 5, "new", "old")
    sets = Sets.learn(p, (rng.random(600) < p).astype(float), day, group, 0.9)
    assert set(sets.limits) == {"", "old"}
    asked = np.array(["new", "old", "never"])
    for at, name in enumerate(["", "old", ""]):
        miss, hit, known = sets.of(np.full(3, 0.5), asked)
        assert known[at]
        low, high = sets.limits[name]
        assert (miss[at], hit[at]) == (low <= 0.5, high >= 0.5)
    nothing = Sets.learn(p[day < 5], p[day < 5], day[day < 5], group[day < 5], 0.9)
    assert not any(mark.any() for mark in nothing.of(p, group))


@pytest.mark.parametrize("together", [0.0, 0.9])
def test_an_interval_holds_as_stated_at_each_level(together: float) -> None:
    rng = np.random.default_rng(11)
    inside = []
    for _ in range(150):
        day = np.repeat(np.arange(41), 60)
        predicted = rng.uniform(0, 3, len(day))
        luck = np.sqrt(together) * rng.normal(0, 1, 41)[day] + np.sqrt(1 - together) * rng.normal(0, 1, len(day))
        rest = luck * (0.2 + predicted)
        past = day < 40
        bands = Bands.learn(predicted[past], rest[past], day[past], 0.9)
        assert len(bands.edges) == 2
        low, high = bands.around(predicted[~past])
        assert (high - low)[predicted[~past] > 2.5].min() > 2 * (high - low)[predicted[~past] < 0.5].max()
        inside.append(((low <= rest[~past]) & (rest[~past] <= high)).mean())
    print(f"150 worlds, 40 days, {together:.0%} in common: {np.mean(inside):.3f} within 90% intervals")
    assert np.mean(inside) + 2.6 * np.std(inside) / np.sqrt(150) >= 0.9
    few = Bands.learn(predicted[day < 18], rest[day < 18], day[day < 18], 0.9)
    assert np.isnan(few.around(predicted)[0]).all()


def test_a_twin_is_taught_neither_the_days_nor_the_entities_that_it_predicts() -> None:
    rng = np.random.default_rng(3)
    day, entity = rng.integers(0, 15, 500), rng.integers(0, 200, 500).astype(str)
    asked = np.zeros(500, int)
    for others, mine in halves(day, entity):
        asked += mine
        assert not set(day[others]) & set(day[mine])
        assert not set(entity[others]) & set(entity[mine])
    assert (asked == 1).all()
    assert list(halves(np.zeros(9))) == []
    assert coarser(150, 0.04) == {"rounds": 30, "learning_rate": pytest.approx(0.2)}
    assert coarser(3, 0.5) == {"rounds": 3, "learning_rate": 0.5}


def with_day_luck(rows: pa.Table, seed: int) -> pa.Table:
    """The advertising rows of test_response with values that a whole day shares."""
    rng = np.random.default_rng(seed)
    _, code = np.unique(rows["day"].to_numpy(), return_inverse=True)
    luck = rng.lognormal(0, 0.25, code.max() + 1)[code] * rng.lognormal(0, 0.15, len(code))
    return test_response.replaced(rows, "value", rows["value"].to_numpy() * luck)


@pytest.fixture(scope="module")
def worth() -> ResponseLearner:
    return ResponseLearner.fit(with_day_luck(test_response.rows(), 1), test_response.SPEC, **test_response.HOW)


@pytest.fixture(scope="module")
def late() -> DurationLearner:
    return test_duration.fit(test_duration.tickets(n=3000)[0])  # type: ignore[no-any-return]


def test_a_days_value_lies_in_its_interval_on_days_that_nobody_had_seen(worth: ResponseLearner) -> None:
    fresh = with_day_luck(test_response.rows(days=60, seed=9), 2)
    found = worth.evaluate(fresh)
    assert 0.88 <= found["coverage"] <= 1.0
    assert 0.5 < found["width"] < 2.0
    scores = worth.score(fresh)
    low, level, high = (scores[name].to_numpy() for name in ("value_low", "level", "value_high"))
    assert ((low < level) & (level < high)).all()
    assert set(scores["confidence"].to_pylist()) == {0.9}


def test_an_outcome_lies_in_its_set_on_tickets_that_nobody_had_seen(late: DurationLearner) -> None:
    rows, truth = test_duration.tickets(seed=77, n=3000)
    rows = rows.set_column(rows.column_names.index("missed"), "missed", pa.array(truth))
    found = late.evaluate(rows)
    assert 0.88 <= found["coverage"] <= 1.0
    assert 1.0 <= found["width"] == pytest.approx(1 + found["unsure"], abs=0.2)
    assert 0.85 <= found["hours_coverage"] <= 1.0
    scores = late.score(rows)
    both = scores["may_miss"].to_numpy(zero_copy_only=False) & scores["may_hit"].to_numpy(zero_copy_only=False)
    p = scores["p_miss"].to_numpy()
    assert p[both].min() > p[~both & (p < 0.5)].max()  # the unsure are those in the middle
    assert (scores["hours_low"].to_numpy() <= scores["hours_high"].to_numpy()).all()


@pytest.mark.parametrize("name", ["worth", "late"])
def test_confidence_survives_files_to_the_bit_and_old_files_give_nulls(
    name: str, request: pytest.FixtureRequest
) -> None:
    import json

    model = request.getfixturevalue(name)
    features = test_response.rows(days=2) if name == "worth" else test_duration.tickets(seed=4, n=200)[0]
    again = type(model).from_files(model.files())
    assert again.files() == model.files()
    assert again.score(features).equals(model.score(features))
    meta = json.loads(model.files()["meta.json"])
    parts = [part for part in ("bands", "sets", "hours") if meta.pop(part, None) is not None]
    assert parts == (["bands"] if name == "worth" else ["sets", "hours"])
    old = type(model).from_files({**model.files(), "meta.json": json.dumps(meta).encode()})
    scores, now = old.score(features), model.score(features)
    assert scores.schema == now.schema
    new = {"value_low", "value_high", "confidence", "may_miss", "may_hit", "hours_low", "hours_high"}
    for column in now.column_names:
        if column in new:
            assert scores[column].null_count == features.num_rows
            assert now[column].null_count == 0
        else:
            assert scores[column].equals(now[column])
    assert "coverage" not in old.evaluate(features)


def test_few_days_calibrate_nothing_and_say_so_by_nulls() -> None:
    model = ResponseLearner.fit(test_response.rows(days=12), test_response.SPEC, **test_response.HOW)
    assert model.score(test_response.rows(days=1))["value_low"].null_count == 40
    assert "coverage" not in model.evaluate(test_response.rows(days=3, seed=1))
    assert b"NaN" not in model.files()["meta.json"]
    for rule, rows in ((ResponseRule, test_response.rows(days=1)), (DurationRule, test_duration.tickets(n=50)[0])):
        spec = test_response.SPEC if rule is ResponseRule else test_duration.SPEC
        scores = rule.fit(rows, spec, seed=1, device="cpu", threads=1).score(rows)  # type: ignore[attr-defined]
        assert scores["confidence"].null_count == rows.num_rows


def two_teams(rng: np.random.Generator, days: int) -> tuple[Array, Array, Array, Array]:
    """(p, missed, day, team) of rows of which one team is told well and the other hardly, by probabilities of one shape."""
    day = np.repeat(np.arange(days), 60)
    team = np.where(rng.random(len(day)) < 0.5, "plain", "hard")
    p = rng.uniform(0.02, 0.98, len(day))
    truth = np.where(team == "plain", 1 / (1 + np.exp(-8 * (p - 0.5))), 0.35 + 0.3 * p)
    return p, rng.random(len(day)) < truth, day, team


def held_by_team(by_part: bool) -> dict[str, float]:
    rng, shares = np.random.default_rng(12), {"plain": [], "hard": []}  # type: ignore[var-annotated]
    for _ in range(60):
        p, missed, day, team = two_teams(rng, 41)
        past, group = day < 40, np.full(len(p), "open")
        sets = Sets.learn(
            p[past], missed[past].astype(float), day[past], group[past], 0.8, team[past] if by_part else None
        )
        miss, hit, known = sets.of(p[~past], group[~past], team[~past])
        assert known.all()
        inside = np.where(missed[~past], miss, hit)
        for name, found in shares.items():
            found.append(inside[team[~past] == name].mean())
    return {name: float(np.mean(found)) for name, found in shares.items()}


def test_within_a_declared_part_sets_hold_what_they_state_where_one_measure_for_all_does_not() -> None:
    alike, apart = held_by_team(False), held_by_team(True)
    print(f"stated 0.8; one measure for all {alike}, by team {apart}")
    assert alike["hard"] < 0.74 and alike["plain"] > 0.86
    assert all(0.78 <= share <= 0.84 for share in apart.values())


def test_a_part_with_few_rows_takes_its_groups_limits_and_files_without_parts_say_what_they_said() -> None:
    p, missed, day, team = two_teams(np.random.default_rng(3), 40)
    team = np.where((np.arange(len(p)) % 60 == 7) & (team == "hard"), "small", team)
    group = np.full(len(p), "open")
    old = Sets.learn(p, missed.astype(float), day, group, 0.8)
    new = Sets.learn(p, missed.astype(float), day, group, 0.8, team)
    assert set(old.limits) == {"", "open"}
    assert set(new.limits) == {"", "open", '["open", "hard"]', '["open", "plain"]'}
    asked = (np.full(3, 0.42), np.array(["open", "open", "never"]), np.array(["small", "new", "hard"]))
    for mine, before in zip(new.of(*asked), old.of(*asked[:2]), strict=True):
        assert (mine == before).all()
    again = Sets.from_dict(old.to_dict())
    assert all((a == b).all() for a, b in zip(again.of(p, group, team), old.of(p, group), strict=True))


def test_a_version_registered_before_parts_scores_as_it_did() -> None:
    rows, _ = test_duration.tickets(n=3000)
    new = test_duration.fit(rows, calibrate_by="category")
    old = test_duration.fit(rows)
    fresh = test_duration.tickets(seed=77, n=400)[0]
    assert "calibrate_by" not in old.spec and old.reads().keys() == new.reads().keys()
    assert set(old.sets.limits) < set(new.sets.limits)
    assert type(old).from_files(old.files()).score(fresh).equals(old.score(fresh))
    assert (
        new.score(fresh)
        .drop_columns(["may_miss", "may_hit"])
        .equals(old.score(fresh).drop_columns(["may_miss", "may_hit"]))
    )
    found = new.evaluate(test_duration.tickets(seed=78, n=2000)[0])
    assert found["coverage_least"] <= found["coverage"] <= found["coverage_most"]
    assert found["rows"] + found["not_judged"] == 2000
