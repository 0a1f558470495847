"""The hierarchical elasticity: right on randomised multipliers, deaf to everything else."""

from dataclasses import fields
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from delivery.sandbox.worlds.advertising import World, history
from models.elasticity import Elasticities, fit_elasticities, response


def simulate(
    seed: int, *, groups: int = 20, per_group: int = 20, days: int = 28, level: float = 30.0, step: float = 0.2
) -> dict[str, Any]:
    """Lines of known elasticity (normal in groups), with a week, demand that spend chases, and over-dispersed counts
    with zeros.
    """
    rng = np.random.default_rng(seed)
    n = groups * per_group
    group = np.repeat(np.arange(groups), per_group)
    truth = np.clip(0.5 + rng.normal(0, 0.12, groups)[group] + rng.normal(0, 0.12, n), 0.02, 0.98)
    size = level * np.exp(rng.normal(0, 1, n))
    week = 0.2 * np.cos(2 * np.pi * np.arange(days)[:, None] / 7 + rng.uniform(0, 6, groups)[group])
    demand = np.exp(week + np.cumsum(rng.normal(0, 0.02, (days, n)), axis=0))
    multiplier = np.where(rng.uniform(size=(days, n)) < 0.5, 1 + step, 1 - step) if step else np.ones((days, n))
    base = 100 * size * demand**0.7
    mean = size * demand * multiplier**truth * rng.gamma(50, 1 / 50, (days, n))
    value = 3.0 * rng.poisson(mean)
    day = np.datetime64("2026-01-01") + np.repeat(np.arange(days), n)
    return {
        "truth": truth,
        "names": np.array([f"l{i:04d}" for i in range(n)]),
        "groups": np.array([f"g{i:02d}" for i in group]),
        "line": np.tile([f"l{i:04d}" for i in range(n)], days),
        "group": np.tile([f"g{i:02d}" for i in group], days),
        "day": day,
        "spend": (base * multiplier).ravel(),
        "value": value.ravel(),
        "multiplier": multiplier.ravel(),
    }


def fit(data: dict[str, Any], **more: Any) -> Elasticities:
    return fit_elasticities(*(data[k] for k in ("line", "group", "day", "spend", "value", "multiplier")), **more)


def same(a: Elasticities, b: Elasticities) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Elasticities))


def test_truth_lies_within_the_stated_sd_as_often_as_it_should() -> None:
    inside, errors = [], []
    for seed in range(4):
        data = simulate(seed)
        mean, sd = fit(data).of(data["names"], data["groups"])
        errors.append(mean - data["truth"])
        inside.append(np.abs(errors[-1]) < 1.96 * sd)
    assert 0.92 < np.mean(inside) < 0.98
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.85 * np.std(data["truth"]), "better than knowing the overall mean alone"


def test_the_spreads_are_learned() -> None:
    got = fit(simulate(1, level=300.0, days=90))
    assert got.spread_within == pytest.approx(0.12, abs=0.02) and got.spread_between == pytest.approx(0.12, abs=0.05)


def test_more_days_and_larger_steps_say_more() -> None:
    spread = {
        name: np.std(fit(data).of(data["names"], data["groups"])[0] - data["truth"])
        for name, data in (("28", simulate(1)), ("90", simulate(1, days=90)), ("small", simulate(1, step=0.05)))
    }
    assert spread["90"] < spread["28"] < spread["small"]


def test_without_perturbation_there_is_the_prior_and_nothing_else() -> None:
    data = simulate(2, step=0.0)
    assert np.corrcoef(np.log(data["spend"]), np.log(data["value"] + 1))[0, 1] > 0.5, "spend and value do move together"
    nothing = fit_elasticities([], [], np.array([], dtype=np.int64), [], [], [])
    got = fit(data)
    mean, sd = got.of(data["names"], data["groups"])
    assert np.ptp(mean) < 1e-12 and mean[0] == pytest.approx(nothing.overall_mean) == pytest.approx(0.5)
    assert sd == pytest.approx(np.full(400, nothing.overall_sd))
    assert fit(data, prior_mean=0.2, prior_sd=0.1).overall_mean < 0.25


def test_observed_spend_is_biased_and_the_perturbations_are_not() -> None:
    observed, ours, truth = [], [], []
    for seed in range(3):
        world = World(seed, "hard")
        rows = history(world, date(2026, 1, 1), 56, explore_share=0.0)
        x, y = (np.log(np.maximum(rows[c].to_numpy(), 1)).reshape(56, 200) for c in ("budget", "revenue"))
        large = world.level > np.median(world.level)
        x, y = (x - x.mean(0))[:, large], (y - y.mean(0))[:, large]
        observed.append((x * y).sum() / (x * x).sum())
        explored = history(world, date(2026, 1, 1), 56, explore_share=1.0)
        columns = [explored[c] for c in ("line_id", "format", "date", "budget", "revenue", "explore_multiplier")]
        fitted = fit_elasticities(*columns, probability=explored["explore_probability"])
        ours.append(fitted.of(world.line_id, world.format)[0].mean())
        spend = [
            world.incumbent_budgets(date(2026, 1, 1) + timedelta(days=d)) / 1e6 / world.reference for d in range(56)
        ]
        ratio = np.mean(spend, axis=0)
        truth.append(np.mean(world.elasticity / ((1 - world.elasticity) * ratio + world.elasticity)))
    assert np.mean(observed) > np.mean(truth) + 0.7
    assert np.mean(ours) == pytest.approx(np.mean(truth), abs=0.05)


@pytest.mark.parametrize("size", [1, 3])
def test_a_line_in_a_small_group_is_not_explained_away_by_its_own_days(size: int) -> None:
    data = simulate(3, groups=300 // size, per_group=size, level=200.0)
    shared = np.exp(np.random.default_rng(0).normal(0, 0.5, (28, 300 // size))).repeat(size, axis=1).ravel()
    data["value"] = data["value"] * (shared if size > 1 else 1.0)
    mean, _ = fit(data).of(data["names"], data["groups"])
    assert mean.mean() == pytest.approx(data["truth"].mean(), abs=0.05)
    assert np.polyfit(mean, data["truth"], 1)[0] > 0.6, "the estimates' differences are believable"


def test_rows_that_were_not_randomised_are_left_out() -> None:
    data = simulate(4)
    probability = np.full(len(data["value"]), 0.5)
    outside = data["day"] >= np.datetime64("2026-01-15")
    probability[outside] = np.nan
    spoiled = dict(data, value=np.where(outside, data["value"] * data["multiplier"] ** 5, data["value"]))
    assert same(fit(data, probability=probability), fit(spoiled, probability=probability))
    assert not same(fit(data), fit(spoiled))


def test_zeros_are_data_and_a_line_that_never_earned_falls_back_on_its_group() -> None:
    data = simulate(5, level=0.7)
    assert np.mean(data["value"] == 0) > 0.4
    silent = data["line"] == "l0003"
    data["value"] = np.where(silent, 0.0, data["value"])
    with np.errstate(divide="raise", invalid="raise"):
        got = fit(data)
    mean, sd = got.of(data["names"], data["groups"])
    assert np.isfinite(mean).all() and (sd > 0).all()
    group_mean, group_sd = got.of(["unseen"], ["g00"])
    assert mean[3] == pytest.approx(group_mean[0]) and sd[3] == pytest.approx(group_sd[0])
    assert mean.mean() == pytest.approx(data["truth"].mean(), abs=0.12)


def test_an_unseen_line_gets_its_groups_belief_and_an_unseen_group_the_overall_one_each_wider() -> None:
    data = simulate(6)
    got = fit(data)
    mean, sd = got.of(["l0000", "new", "new"], ["g00", "g00", "elsewhere"])
    assert mean[1] == got.group_mean[0] and mean[2] == got.overall_mean
    assert sd[0] < sd[1] < sd[2]


def test_order_of_rows_and_unit_of_money_do_not_matter() -> None:
    data = simulate(7, groups=6)
    order = np.random.default_rng(0).permutation(len(data["value"]))
    rows = ("line", "group", "day", "spend", "value", "multiplier")
    shuffled = {k: data[k][order] for k in rows}
    richer = dict(data, spend=data["spend"] * 1e6, value=data["value"] * 1e3)
    base = fit(data)
    for other in (fit(shuffled), fit(richer)):
        assert other.lines == base.lines
        assert other.line_mean == pytest.approx(base.line_mean, abs=1e-6)
        assert other.line_sd == pytest.approx(base.line_sd, abs=1e-6)


def test_arrow_columns_and_dates_are_taken_as_they_are() -> None:
    data = simulate(8, groups=3)
    days = pa.array(data["day"].astype("datetime64[D]").tolist(), pa.date32())
    arrow = fit_elasticities(
        pa.array(data["line"].tolist()),
        pa.array(data["group"].tolist()),
        days,
        *(pa.array(data[k]) for k in ("spend", "value", "multiplier")),
    )
    assert same(arrow, fit(data))
    mean, _ = arrow.of(pa.array(data["names"].tolist()), pa.array(data["groups"].tolist()))
    assert mean.shape == (60,)


def test_an_expected_value_from_a_model_sharpens_the_estimate() -> None:
    errors: dict[str, list[float]] = {"with": [], "without": []}
    for seed in range(3):
        data = simulate(seed, level=300.0)
        data["spend"] = 100 * data["multiplier"]  # a status quo that says nothing of demand
        clean = simulate(seed, level=300.0)
        expected = (clean["spend"] / clean["multiplier"] / 100) ** (1 / 0.7)
        for name, more in (("with", {"expected": expected}), ("without", {})):
            mean, _ = fit(data, **more).of(data["names"], data["groups"])
            errors[name].append(np.mean((mean - data["truth"]) ** 2))
    assert np.mean(errors["with"]) < np.mean(errors["without"])


def test_json_gives_the_same_figures_to_the_bit() -> None:
    got = fit(simulate(9, groups=4))
    assert same(Elasticities.from_json(got.to_json()), got)
    with pytest.raises(ValueError, match=r"lack .*spread_within"):
        Elasticities.from_json('{"lines": []}')


@pytest.mark.parametrize(
    ("column", "wrong"), [("value", -1.0), ("value", np.nan), ("multiplier", 0.0), ("spend", np.inf)]
)
def test_bad_numbers_are_refused_with_column_and_row(column: str, wrong: float) -> None:
    data = simulate(10, groups=2)
    data[column] = data[column].astype(float)
    data[column][17] = wrong
    with pytest.raises(ValueError, match=f"{column} of row 17"):
        fit(data)


def test_columns_of_different_length_are_refused() -> None:
    data = simulate(10, groups=2)
    with pytest.raises(ValueError, match="value has 3 rows"):
        fit(dict(data, value=data["value"][:3]))


def test_the_curve_passes_through_the_level_rises_and_saturates() -> None:
    spends = np.linspace(50.0, 150.0, 11)[None, :].repeat(3, 0)
    values = response(np.array([10.0, 20.0, 30.0]), np.full(3, 100.0), spends, np.array([0.5, 0.0, 1.7]))
    assert values[:, 5].tolist() == [10.0, 20.0, 30.0]
    assert (np.diff(values[0]) > 0).all() and (np.diff(values[0], 2) < 0).all()
    assert np.ptp(values[1]) == 0
    assert values[2] == pytest.approx(0.3 * spends[2]), "an elasticity above one is held to one"
    assert response(np.array([4.0]), np.array([0.0]), spends[:1], np.array([0.5])).tolist() == [[4.0] * 11]
