"""The response learner: a level that the Booster corrects, a slope from what was drawn, the curve; and the rule."""

import json
import logging
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from models.booster import WrongDigest
from models.learners.response import ResponseLearner, ResponseModel, ResponseRule

SPEC: dict[str, Any] = {
    "kind": "response",
    "rounds": 30,
    "learning_rate": 0.2,
    "rows_in_leaf": 10,
    "numeric": ["shift_1", "active_days_7"],
    "categorical": ["format"],
}
HOW: dict[str, Any] = {"seed": 3, "device": "cpu", "threads": 1}


def rows(lines: int = 40, days: int = 30, *, explored: bool = True, elasticity: float = 0.4, seed: int = 0) -> pa.Table:
    """Lines of steady return and known elasticity; `search` earns a fifth more than its trailing return says."""
    rng = np.random.default_rng(seed)
    n = lines * days
    line = np.tile(np.arange(lines), days)
    budget = np.tile(rng.integers(20, 200, lines).astype(float), days)
    ratio = np.tile(rng.uniform(1, 4, lines), days)
    search = line % 2 == 0
    multiplier = rng.choice([0.8, 1.2], n) if explored else np.ones(n)
    level = budget * ratio * np.where(search, 1.2, 1.0)
    return pa.table(
        {
            "day": pa.array(np.repeat([date(2026, 1, 1) + timedelta(days=d) for d in range(days)], lines), pa.date32()),
            "entity_id": [f"line-{i:03d}" for i in line],
            "campaign": [f"c{i % 4}" for i in line],
            "segment": ["new" if i % 3 else None for i in line],
            "format": np.where(search, "search", "video").tolist(),
            "budget_micros": np.rint(budget * 1e6).astype(np.int64),
            "explore_multiplier_today": np.ones(n),
            "delivered_7": np.ones(n),
            "active_days_7": np.full(n, 7),
            "active_days_28": np.full(n, 28),
            "shift_1": rng.normal(0, 0.01, n),
            **{f"cost_{w}": budget * w for w in (1, 7, 28)},
            **{f"value_{w}": budget * ratio * w for w in (1, 7, 28)},
            "ratio_7": ratio,
            "campaign_ratio_28": np.full(n, 2.5),
            "cost": budget * multiplier,
            "budget": budget * multiplier,
            "value": level * multiplier**elasticity * rng.lognormal(0, 0.05, n),
            "explore_multiplier": multiplier,
            "explore_probability": pa.array(np.full(n, 0.5) if explored else [None] * n, pa.float64()),
        }
    )


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


@pytest.fixture(scope="module")
def learned() -> ResponseLearner:
    return ResponseLearner.fit(rows(), SPEC, **HOW)


def grids(scores: pa.Table) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.array(scores["spends"].to_pylist()), np.array(scores["values"].to_pylist())


def test_values_rise_with_spend_and_never_faster_than_before(learned: ResponseLearner) -> None:
    spends, values = grids(learned.score(rows(days=1)))
    slopes = np.diff(values) / np.diff(spends)
    assert (np.diff(values) > 0).all()
    assert (np.diff(slopes) < 0).all()


def test_the_curve_passes_through_the_level_at_the_status_quo(learned: ResponseLearner) -> None:
    features = rows(days=1)
    scores = learned.score(features)
    spends, values = grids(scores)
    middle = learned.spec.grid.index(1.0)
    assert spends[:, middle].tolist() == features["budget_micros"].to_pylist()
    assert values[:, middle].tolist() == scores["level"].to_pylist()
    usual = features["budget_micros"].to_numpy() / 1e6
    assert scores["level"].to_numpy() == pytest.approx(learned.level(features, usual), rel=1e-15)


def test_the_level_corrects_what_the_trailing_return_misses(learned: ResponseLearner) -> None:
    features = rows(days=1)
    trailing = features["ratio_7"].to_numpy() * features["cost_1"].to_numpy()
    correction = learned.score(features)["level"].to_numpy() / trailing
    search = np.array(features["format"].to_pylist()) == "search"
    assert correction[search].mean() == pytest.approx(1.2, abs=0.06)
    assert correction[~search].mean() == pytest.approx(1.0, abs=0.06)


def test_the_slope_is_what_was_drawn_into_the_data(learned: ResponseLearner) -> None:
    elasticity = learned.score(rows(days=1))["elasticity"].to_numpy()
    assert elasticity.mean() == pytest.approx(0.4, abs=0.05)
    assert learned.evaluate(rows(seed=1))["elasticity_is_prior"] == 0
    assert "1200 perturbed of 1200 drawn line-days of 40 lines" in learned.notes[0]


def test_todays_perturbation_counts_with_the_elasticity_and_not_with_a_constant_return(
    learned: ResponseLearner,
) -> None:
    features = rows(days=1)
    raised = replaced(features, "budget_micros", np.rint(features["budget_micros"].to_numpy() * 1.25).astype(np.int64))
    raised = replaced(raised, "cost_1", features["cost_1"].to_numpy() * 1.25)
    raised = replaced(raised, "value_1", features["value_1"].to_numpy() * 1.25)
    raised = replaced(raised, "explore_multiplier_today", np.full(features.num_rows, 1.25))
    before, after = learned.score(features), learned.score(raised)
    lift = after["level"].to_numpy() / before["level"].to_numpy()
    assert lift == pytest.approx(1.25 ** before["elasticity"].to_numpy(), rel=1e-6)


def test_scores_are_equal_to_the_bit_after_files_and_back(learned: ResponseLearner) -> None:
    features = rows(days=2, seed=5)
    again = ResponseLearner.from_files(learned.files())
    assert again.score(features).equals(learned.score(features))
    assert again.files() == learned.files()
    assert again.contributions(features).equals(learned.contributions(features))


def test_the_same_rows_and_seed_give_the_same_files(learned: ResponseLearner) -> None:
    assert ResponseLearner.fit(rows(), SPEC, **HOW).files() == learned.files()


def test_a_changed_booster_file_is_refused(learned: ResponseLearner) -> None:
    files = learned.files()
    with pytest.raises(WrongDigest):
        ResponseLearner.from_files({**files, "level.txt": files["level.txt"].replace(b"search", b"Search") + b" "})


def test_a_line_scores_the_same_whatever_else_is_in_the_batch(learned: ResponseLearner) -> None:
    features = rows(days=1)
    alone = pa.concat_tables([learned.score(features.slice(i, 1)) for i in range(features.num_rows)])
    assert alone.combine_chunks().equals(learned.score(features).combine_chunks())


def test_a_line_never_seen_takes_its_campaigns_return_and_its_groups_slope(learned: ResponseLearner) -> None:
    new = rows(days=1).slice(0, 1)
    for name in ("cost_1", "cost_7", "cost_28", "value_1", "value_7", "value_28"):
        new = replaced(new, name, [0.0])
    new = replaced(replaced(new, "entity_id", ["line-new"]), "ratio_7", pa.array([None], pa.float64()))
    new = replaced(replaced(new, "format", ["audio"]), "delivered_7", pa.array([None], pa.float64()))
    scores = learned.score(new)
    spend = new["budget_micros"].to_numpy() / 1e6
    assert 0.5 * 2.5 * spend < scores["level"][0].as_py() < 2 * 2.5 * spend
    assert scores["elasticity"][0].as_py() == learned.elasticities.overall_mean
    assert scores["elasticity_sd"][0].as_py() > learned.score(rows(days=1))["elasticity_sd"].to_numpy().max()


def test_a_line_without_a_budget_is_worth_nothing_at_any_spend(learned: ResponseLearner) -> None:
    scores = learned.score(replaced(rows(days=1), "budget_micros", np.zeros(40, dtype=np.int64)))
    assert np.array_equal(scores["level"].to_numpy(), np.zeros(40))
    assert not np.array(scores["values"].to_pylist()).any()


def test_without_logged_perturbations_the_slope_is_the_prior_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    spec = {**SPEC, "prior_elasticity": 0.3, "prior_elasticity_sd": 0.2, "prior_source": "a test"}
    with caplog.at_level(logging.INFO, logger="models.learners.response"):
        model = ResponseLearner.fit(rows(explored=False), spec, **HOW)
    scores = model.score(rows(days=1))
    assert set(scores["elasticity"].to_pylist()) == {0.3}
    assert set(scores["elasticity_sd"].to_pylist()) == {0.2}
    assert model.notes == ("elasticities are the prior, mean 0.3, sd 0.2 (a test): no perturbation was logged",)
    assert model.notes[0] in caplog.text
    assert json.loads(model.files()["meta.json"])["notes"] == list(model.notes)
    assert model.evaluate(rows(seed=1, explored=False))["elasticity_is_prior"] == 1


def test_multipliers_without_a_recorded_probability_do_not_become_a_slope() -> None:
    unrecorded = replaced(rows(), "explore_probability", pa.array([None] * 1200, pa.float64()))
    model = ResponseLearner.fit(unrecorded, SPEC, **HOW)
    assert model.elasticities.overall_mean == ResponseModel(kind="response").prior_elasticity


def test_the_rule_is_trailing_ratio_times_cost_to_the_bit() -> None:
    judged = rows(days=3)
    gone = pa.array([None if i == 4 else r for i, r in enumerate(judged["ratio_7"].to_pylist())], pa.float64())
    judged = replaced(judged, "ratio_7", gone)
    rule = ResponseRule.fit(judged, SPEC, **HOW)
    expected = [(r or 0.0) * c for r, c in zip(gone.to_pylist(), judged["cost"].to_pylist(), strict=True)]
    assert rule.expect(judged).tolist() == expected
    errors = [abs(e - v) for e, v in zip(expected, judged["value"].to_pylist(), strict=True)]
    assert rule.evaluate(judged)["mae"] == pytest.approx(sum(errors) / len(errors), rel=1e-12)
    scores = rule.score(judged)
    levels = [
        (r or 0.0) * (b / 1e6) for r, b in zip(gone.to_pylist(), judged["budget_micros"].to_pylist(), strict=True)
    ]
    assert scores["level"].to_pylist() == levels
    _, values = grids(scores)
    assert values[0] == pytest.approx(levels[0] * np.array(rule.spec.grid) ** rule.spec.prior_elasticity, rel=1e-6)


def test_the_rule_survives_files_and_gives_the_columns_of_the_model(learned: ResponseLearner) -> None:
    rule = ResponseRule.fit(rows(), SPEC, **HOW)
    again = ResponseRule.from_files(rule.files())
    assert again.score(rows(days=1)).equals(rule.score(rows(days=1)))
    assert rule.score(rows(days=1)).schema == learned.score(rows(days=1)).schema


def test_evaluate_sets_the_models_error_beside_the_rules_on_the_same_rows(learned: ResponseLearner) -> None:
    judged = rows(seed=1)
    rule = ResponseRule.fit(judged, SPEC, **HOW)
    figures = learned.evaluate(judged)
    assert figures["rule_mae"] == rule.evaluate(judged)["mae"]
    assert figures["mae"] == pytest.approx(np.abs(learned.expect(judged) - judged["value"].to_numpy()).mean())
    assert figures["better_than_rule"] == pytest.approx(1 - figures["mae"] / figures["rule_mae"])
    assert figures["better_than_rule"] > 0.3


def test_plots_are_drawn_and_nothing_of_them_is_empty(learned: ResponseLearner) -> None:
    plots = learned.plots(rows(days=3))
    assert set(plots) == {"predicted_realised", "importance", "elasticity"}
    assert all(axes.has_data() for figure in plots.values() for axes in figure.axes)


@pytest.mark.parametrize("grid", [(0.5, 1.5), (1.0, 0.5), (1.0, 1.0, 2.0), (-0.5, 1.0)])
def test_a_grid_that_is_no_curve_around_the_status_quo_is_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match=r"ascending, not negative, and hold 1\.0"):
        ResponseModel(kind="response", grid=grid)


def test_an_unknown_key_of_the_model_section_is_refused() -> None:
    with pytest.raises(ValidationError, match="trees"):
        ResponseLearner.fit(rows(days=2), {**SPEC, "trees": 3}, **HOW)


def test_a_missing_column_and_a_multiplier_of_zero_are_named() -> None:
    with pytest.raises(KeyError, match="explore_multiplier"):
        ResponseLearner.fit(rows(days=5).drop_columns("explore_multiplier"), SPEC, **HOW)
    bad = rows(days=5)
    with pytest.raises(ValueError, match="explore_multiplier of row 7 is not above 0"):
        ResponseLearner.fit(
            replaced(bad, "explore_multiplier", [0.0 if i == 7 else 1.0 for i in range(200)]), SPEC, **HOW
        )
    with pytest.raises(ValueError, match="none of 200 rows has a cost"):
        ResponseLearner.fit(replaced(bad, "cost", np.zeros(200)), SPEC, **HOW)
