"""What the duration model and its rule promise: labels not biased to what is known early, scores that agree."""

from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from models.booster import WrongDigest
from models.learners import duration
from models.learners.duration import DurationLearner, DurationModel, DurationRule, Spread, figures, settle

DAYS = 30
FACTOR = np.array([0.3, 0.6, 1.0, 2.0, 4.0])
ALLOWED = np.array([20.0, 60.0, 90.0])
SPEC: dict[str, Any] = {
    "kind": "duration",
    "rounds": 25,
    "learning_rate": 0.15,
    "min_category_count": 3,
    "half_life_days": None,
    "numeric": ["priority", "age_hours", "hours_to_due", "allowed_hours"],
    "categorical": ["category"],
}


def tickets(
    seed: int = 0, n: int = 1500, *, due_known: bool = False, known_on: str = "closing"
) -> tuple[pa.Table, Any]:
    """Tickets of 30 days as the last cut-off knows them, and whether each will miss its service level.

    known_on: "closing" (misses and hits are told five days after resolution, so hits first) or "due" (a miss is told
    when the time is up, a hit only at closing, so misses first).
    """
    rng = np.random.default_rng(seed)
    opened = np.sort(rng.uniform(0, DAYS * 24, n))
    category, priority = rng.integers(0, len(FACTOR), n), rng.integers(0, len(ALLOWED), n)
    hours = 30 * FACTOR[category] * rng.lognormal(0, 0.8, n)
    allowed = ALLOWED[priority]
    missed, now = hours > allowed, DAYS * 24
    resolved = opened + hours <= now
    told = np.where(missed & (known_on == "due"), opened + allowed, opened + hours + 120) <= now
    return pa.table(
        {
            "entity_id": [f"T{i:05d}" for i in range(n)],
            "moment": ["intake"] * n,
            "day": pa.array([date(2026, 1, 1) + timedelta(days=int(h // 24)) for h in opened], pa.date32()),
            "priority": pa.array(priority + 1, pa.int64()),
            "category": [f"c{k}" for k in category],
            "age_hours": np.zeros(n),
            "hours_to_due": pa.array(allowed, mask=np.full(n, not due_known)),
            "allowed_hours": pa.array(allowed, mask=np.full(n, not due_known)),
            "missed": pa.array(missed, mask=~told),
            "handling_hours": pa.array(hours, mask=~resolved),
            "open_hours": pa.array(now - opened, mask=resolved),
            "effort_hours": pa.array(FACTOR[category] * rng.lognormal(0, 0.3, n), mask=~resolved),
        }
    ), missed


def fit(rows: pa.Table, learner: Any = DurationLearner, **more: Any) -> Any:
    return learner.fit(rows, {**SPEC, **more}, seed=1, device="cpu", threads=1)


@pytest.fixture(scope="module")
def model() -> DurationLearner:
    rows, _ = tickets()
    return fit(rows.drop_columns(["effort_hours"]))


@pytest.fixture(scope="module")
def timed() -> DurationLearner:
    rows, _ = tickets(due_known=True)
    return fit(rows)


@pytest.mark.parametrize("known_on", ["closing", "due"])
@pytest.mark.parametrize("due_known", [False, True])
def test_labels_as_known_have_far_less_bias_than_the_judged_rows_alone(known_on, due_known):
    rows, truth = tickets(n=3000, due_known=due_known, known_on=known_on)
    judged = rows["missed"].drop_null().to_numpy(zero_copy_only=False).mean()
    expected = settle(rows, "priority").missed
    assert abs(judged - truth.mean()) > 0.02
    assert abs(expected.mean() - truth.mean()) < 0.35 * abs(judged - truth.mean())
    assert np.isfinite(expected).all()
    assert (expected >= 0).all()
    assert (expected <= 1).all()


def test_open_rows_get_the_kaplan_meier_share_of_late_times():
    rows = pa.table(
        {
            "entity_id": list("abcdef"),
            "missed": [False, False, True, True, None, None],
            "handling_hours": [1.0, 2.0, 10.0, 20.0, None, None],
            "open_hours": [None, None, None, None, 1.5, 5.0],
        }
    )
    labels = settle(rows, "priority")
    # alive after 1, 2, 10, 20 hours: 5/6, 5/6 x 3/4, half of that, none. Of what outlives 1.5 hours 3/4 outlives 2.
    np.testing.assert_allclose(labels.missed, [0, 0, 1, 1, 0.75, 1.0])
    late = (np.log1p(10) + np.log1p(20)) / 2
    np.testing.assert_allclose(labels.log_hours[4:], [0.25 * np.log1p(2) + 0.75 * late, late])


def test_tickets_first_seen_when_old_do_not_make_the_others_look_long():
    rows, _ = tickets(n=3000)
    more, _ = tickets(seed=1, n=9000)
    old = more.filter(pc.greater(more["handling_hours"], 96.0))
    old = old.set_column(old.column_names.index("age_hours"), "age_hours", pa.array([96.0] * old.num_rows))
    old = old.set_column(0, "entity_id", pa.array([f"old-{i}" for i in range(old.num_rows)]))
    still = rows["open_hours"].is_valid().to_numpy() & (rows["open_hours"].to_numpy() < 72)
    alone = settle(rows, "priority").missed[still]
    mixed = settle(pa.concat_tables([rows, old]), "priority").missed[: rows.num_rows][still]
    assert abs(mixed.mean() - alone.mean()) < 0.03


def test_judged_rows_keep_their_label_and_no_judged_row_is_an_error():
    rows, truth = tickets(n=400)
    known = rows["missed"].is_valid().to_numpy()
    assert (settle(rows, "priority").missed[known] == truth[known]).all()
    unjudged = rows.set_column(rows.column_names.index("missed"), "missed", pa.nulls(400, pa.bool_()))
    with pytest.raises(ValueError, match="no outcome has been judged yet"):
        settle(unjudged, "priority")


def test_the_model_beats_the_rule_on_tickets_it_has_not_seen(model):
    rows, _ = tickets()
    fresh, truth = tickets(seed=99, n=2000)
    fresh = fresh.set_column(fresh.column_names.index("missed"), "missed", pa.array(truth))
    learned, counted = model.evaluate(fresh), fit(rows, DurationRule, rule_by=["priority"]).evaluate(fresh)
    assert learned["roc_auc"] > counted["roc_auc"] + 0.05
    assert learned["brier"] < counted["brier"]
    assert abs(np.mean(model.p_miss(fresh)) - truth.mean()) < 0.03
    assert learned["calibration_error"] < 0.06


def test_an_unknown_due_time_is_the_one_that_agrees_with_p_miss(model):
    rows, _ = tickets(seed=5, n=300)
    p = model.score(rows)["p_miss"].to_numpy()
    expected = duration.predict(model.duration, model.encoding.matrix(rows))
    implied = model.spread.quantile(expected, 1 - p)
    inside = implied > 1e-6
    assert inside.mean() > 0.9
    np.testing.assert_allclose(model.spread.late(expected, implied)[inside], p[inside], atol=1e-9)


@pytest.mark.parametrize("which", ["model", "timed", "rule"])
def test_starting_later_is_never_safer_and_a_longer_delay_never_safer_still(which, request):
    rows, _ = tickets(seed=6, n=300, due_known=which == "timed")
    scorer = fit(tickets()[0], DurationRule) if which == "rule" else request.getfixturevalue(which)
    scores = scorer.score(rows)
    longer = replace(scorer, spec={**scorer.spec, "delay_hours": 96}).score(rows)
    now, later = scores["p_miss_now"].to_numpy(), scores["p_miss_later"].to_numpy()
    much_later = longer["p_miss_later"].to_numpy()
    assert (later >= now).all()
    assert (much_later >= later).all()
    assert (later > now + 0.01).any()
    for name in ("p_miss", "p_miss_now", "p_miss_later", "uncertainty"):
        assert scores[name].to_numpy().min() >= 0
        assert scores[name].to_numpy().max() <= 1
    assert scores["entity_id"].equals(rows["entity_id"])


def test_a_known_due_time_counts_from_now(timed):
    rows, _ = tickets(seed=7, n=3, due_known=True)
    rows = rows.set_column(rows.column_names.index("hours_to_due"), "hours_to_due", pa.array([-1.0, 24.1, 5000.0]))
    scores = timed.score(rows)
    now, later = scores["p_miss_now"].to_pylist(), scores["p_miss_later"].to_pylist()
    assert (now[0], later[0]) == (1.0, 1.0)
    assert now[1] < 0.01
    assert later[1] > 0.5
    assert later[2] < 0.01


def test_hands_on_time_is_learned_where_it_is_recorded_and_assumed_elsewhere(timed, model):
    rows, _ = tickets(seed=8, n=500, due_known=True)
    category = np.array([int(c[1:]) for c in rows["category"].to_pylist()])
    effort = timed.score(rows)["effort_hours"].to_numpy()
    means = [effort[category == k].mean() for k in range(len(FACTOR))]
    np.testing.assert_allclose(means, FACTOR * np.exp(0.3**2 / 2), rtol=0.35)
    assert set(model.score(rows)["effort_hours"].to_pylist()) == {DurationModel(kind="duration").effort_hours}


def test_a_category_never_seen_is_scored(model):
    rows, _ = tickets(seed=9, n=5)
    rows = rows.set_column(rows.column_names.index("category"), "category", pa.array(["new", None, "c1", "c2", "new"]))
    p = model.score(rows)["p_miss"].to_numpy()
    assert np.isfinite(p).all()
    assert np.isfinite(fit(tickets()[0], DurationRule).score(rows)["p_miss"].to_numpy()).all()


@pytest.mark.parametrize("which", ["model", "timed", "rule"])
def test_scores_are_the_same_to_the_bit_from_files_and_in_any_company(which, request):
    scorer = fit(tickets()[0], DurationRule) if which == "rule" else request.getfixturevalue(which)
    rows, _ = tickets(seed=10, n=200, due_known=which == "timed")
    read = type(scorer).from_files(scorer.files())
    assert read.files() == scorer.files()
    whole = scorer.score(rows)
    assert read.score(rows).equals(whole)
    assert pa.concat_tables([read.score(rows.slice(i, 1)) for i in range(20)]).equals(whole.slice(0, 20))


def test_the_same_rows_give_the_same_files(timed):
    rows, _ = tickets(due_known=True)
    assert fit(rows).files() == timed.files()


def test_a_booster_that_meta_does_not_name_is_refused(model):
    files = model.files()
    other = fit(tickets(seed=1)[0]).files()
    with pytest.raises(WrongDigest):
        DurationLearner.from_files({**files, "duration.txt": other["duration.txt"]})


def test_a_missing_feature_is_named(model):
    with pytest.raises(KeyError, match="'category' is missing"):
        model.score(tickets(n=5)[0].drop_columns(["category"]))


def test_the_rule_draws_small_groups_towards_larger_ones():
    rows = pa.table(
        {
            "entity_id": [str(i) for i in range(120)],
            "priority": [1] * 100 + [2] * 20,
            "category": ["a"] * 99 + ["b"] + ["a"] * 20,
            "missed": [False] * 50 + [True] * 70,
            "handling_hours": [1.0] * 120,
        }
    )
    rule = fit(rows, DurationRule)
    overall, first = 70 / 120, (50 + 20 * 70 / 120) / 120
    ask = pa.table({"entity_id": ["x", "y", "z"], "priority": [1, 1, 9], "category": ["b", "never", "a"]})
    np.testing.assert_allclose(rule.p_miss(ask), [(1 + 20 * first) / 21, first, overall])


def test_figures_are_those_of_judged_rows_only(model):
    rows, _ = tickets(seed=11, n=300)
    judged = int(rows["missed"].is_valid().to_numpy().sum())
    assert 0 < judged < 300
    assert model.evaluate(rows)["rows"] == judged
    by_hand = figures(np.array([0.0, 1.0, 1.0, 0.0]), np.array([0.1, 0.8, 0.6, 0.7]))
    assert by_hand["roc_auc"] == 0.75
    assert by_hand["brier"] == pytest.approx((0.01 + 0.04 + 0.16 + 0.49) / 4)
    assert by_hand["base_rate"] == 0.5
    assert np.isnan(figures(np.zeros(3), np.full(3, 0.1))["roc_auc"])


def test_a_time_and_its_probability_are_each_others_inverse():
    rng = np.random.default_rng(0)
    expected = rng.normal(3, 1, 2000)
    spread = Spread.learn(expected, expected + rng.normal(0, 1 + (expected > 3), 2000))
    share = rng.uniform(0.02, 0.98, 2000)
    hours = spread.quantile(expected, share)
    early = hours > 1e-6
    np.testing.assert_allclose(spread.late(expected, hours)[early], 1 - share[early], atol=1e-9)
    wide, narrow = spread.residuals[-1], spread.residuals[0]
    assert np.ptp(wide[20:-20]) > 1.5 * np.ptp(narrow[20:-20])


def test_plots_and_contributions_name_what_matters(model):
    rows, _ = tickets(seed=12, n=100)
    assert set(model.plots(rows)) == {"calibration", "feature_importance", "review_line"}
    told = model.contributions(rows.slice(0, 10))
    assert told["entity_id"].equals(rows.slice(0, 10)["entity_id"])
    named = [row["features"][0] for row in told.to_pylist()]
    assert set(named) <= {"category", "priority"}


def test_a_wrong_key_in_the_model_section_is_refused():
    with pytest.raises(ValidationError, match="round"):
        DurationModel.model_validate({"kind": "duration", "round": 3})
