"""The guard's verdict: what it follows from, what may not change it, and when it refuses to speak."""

from __future__ import annotations

from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_checks import regression
from data_checks.regression import Judgement, Metric, RegressionSpec, effects, sequential
from tests.support.properties import examples

START = date(2026, 3, 2)
VALUE = Metric(name="value", column="value", better="higher")
SPEC = RegressionSpec(metrics=(VALUE,), horizon_days=20, permutations=399)
DESIGNS = ("entity", "cohort", "switchback")


def world(
    design: str,
    *,
    harm: float = 0.0,
    seed: int = 1,
    days: int = 20,
    units: int = 24,
    share: float = 0.5,
    level: float = 10.0,
) -> tuple[pa.Table, pa.Table | None]:
    """Rows of a comparison and of its pre-period; the control's share is ``share``, harm a share of the level."""
    rng = np.random.default_rng(seed)
    if design == "entity":
        rows = days * 60
        own = rng.standard_normal(rows)
        treated = rng.random(rows) >= share
        value = level + own + 0.5 * rng.standard_normal(rows) - harm * level * treated
        return pa.table(
            {
                "day": pa.array([START + timedelta(days=i // 60) for i in range(rows)], pa.date32()),
                "unit": [f"e{i:05d}" for i in range(rows)],
                "arm": np.where(treated, "champion", "holdout"),
                "value": value,
                "clicks": rng.poisson(20, rows).astype(np.float64),
                "covariate": own,
            }
        ), None
    size = np.exp(0.5 * rng.standard_normal(units)) * level
    length = days if design == "cohort" else 7
    arm = np.stack([rng.permutation(np.arange(units) >= round(share * units)) for _ in range(-(-days // length))])
    columns: dict[str, list[Any]] = {k: [] for k in ("day", "unit", "arm", "epoch", "washout", "n", "value", "clicks")}
    for d in range(-14, days):
        treated = arm[max(d, 0) // length]
        value = size * np.exp(0.1 * rng.standard_normal(units)) * np.where(treated & (d >= 0), 1 - harm, 1.0)
        columns["day"] += [START + timedelta(days=d)] * units
        columns["unit"] += [f"u{i:02d}" for i in range(units)]
        columns["arm"] += np.where(treated, "champion", "holdout").tolist()
        columns["epoch"] += [(START + timedelta(days=max(d, 0) // length * length)).isoformat()] * units
        columns["washout"] += [design == "switchback" and d >= 7 and d % 7 == 0] * units
        columns["n"] += [3] * units
        columns["value"] += value.tolist()
        columns["clicks"] += rng.poisson(20, units).tolist()
    table = pa.table({**columns, "day": pa.array(columns["day"], pa.date32())})
    early = pc.less(table["day"], pa.scalar(START, pa.date32()))
    return table.filter(pc.invert(early)), table.filter(early)


def judged(design: str, observed: pa.Table, before: pa.Table | None, **more: Any) -> Judgement:
    said: dict[str, Any] = {
        "spec": SPEC, "treated": "champion", "control": "holdout", "shares": {"champion": 0.5, "holdout": 0.5},
        "drawn": None, "start": START, "day": START + timedelta(days=19), "seed": 7,
    }  # fmt: skip
    return regression.judge(observed, before, design=design, **{**said, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("design", DESIGNS)
def test_harm_is_rolled_back_and_a_gain_promoted(design: str) -> None:
    worse, better = judged(design, *world(design, harm=0.2)), judged(design, *world(design, harm=-0.2))
    assert (worse.verdict, better.verdict) == ("ROLLBACK", "PROMOTE")
    assert "beyond the margin" in worse.reasons[0] and worse.figures["since"] < "2026-03-21"
    last = worse.looks.to_pylist()[-1]
    assert last["low"] > 0 and last["statistic"] > last["bound"] and last["low"] < last["estimate"] < last["high"]
    assert 0.1 < last["estimate"] / last["level"] < 0.3


@pytest.mark.parametrize("design", DESIGNS)
def test_harm_within_the_margin_is_tolerated_and_less_than_the_margin_is_promoted(design: str) -> None:
    spec = SPEC.model_copy(update={"metrics": (VALUE.model_copy(update={"margin": 0.3}),)})
    judgement = judged(design, *world(design, harm=0.1), spec=spec)
    assert judgement.verdict == "PROMOTE"
    assert judged(design, *world(design, harm=0.5), spec=spec).verdict == "ROLLBACK"


@pytest.mark.parametrize("design", DESIGNS)
def test_without_a_proof_it_goes_on_until_the_horizon(design: str) -> None:
    observed, before = world(design)
    spec = SPEC.model_copy(update={"horizon_days": 20})
    early = judged(design, observed, before, spec=spec, day=START + timedelta(days=12))
    late = judged(design, observed, before, spec=spec)
    assert (early.verdict, late.verdict) == ("CONTINUE", "INCONCLUSIVE")
    assert judged(design, observed, before, day=START + timedelta(days=1)).looks.num_rows == 0
    assert judged(design, observed, before, day=START + timedelta(days=1)).verdict == "CONTINUE"


@pytest.mark.parametrize("design", DESIGNS)
def test_later_rows_change_no_earlier_look(design: str) -> None:
    """Units that come later, outcomes that come later: the sequence only grows."""
    observed, before = world(design, harm=0.03, units=20)
    if design != "entity":  # two units appear on the tenth day
        late = pc.is_in(observed["unit"], value_set=pa.array(["u03", "u07"]))
        observed = observed.filter(pc.invert(pc.and_(late, pc.less(observed["day"], START + timedelta(days=10)))))
    whole = judged(design, observed, before)
    for day in (5, 9, 10, 15):
        until = START + timedelta(days=day)
        part = judged(design, observed, before, day=until)
        same = whole.looks.filter(pc.less_equal(whole.looks["day"], until))
        assert part.looks.equals(same)
        cut = observed.filter(pc.less_equal(observed["day"], until))
        assert judged(design, cut, before, day=until).looks.equals(same)


@pytest.mark.parametrize("design", DESIGNS)
def test_a_rollback_once_reached_stays_reached(design: str) -> None:
    """The harm is gone in the second half: the early look still says it."""
    observed, before = world(design, harm=0.25)
    days = np.array([(d - START).days for d in observed["day"].to_pylist()])
    treated = np.array(observed["arm"].to_pylist()) == "champion"
    value = observed["value"].to_numpy() * np.where(treated & (days >= 9), 2.0, 1.0)
    later = observed.set_column(observed.schema.get_field_index("value"), "value", pa.array(value))
    judgement = judged(design, later, before)
    assert judgement.verdict == "ROLLBACK"
    assert judgement.figures["since"] <= (START + timedelta(days=9)).isoformat()
    assert judgement.looks.to_pylist()[-1]["verdict"] != "ROLLBACK"


@pytest.mark.parametrize("design", DESIGNS)
def test_a_look_that_was_judged_before_is_not_asked_again(design: str) -> None:
    """Outcomes told anew move it, and only looks since then, or the newest, may end in a rollback."""
    observed, before = world(design, harm=0.25)
    days = np.array([(d - START).days for d in observed["day"].to_pylist()])
    treated = np.array(observed["arm"].to_pylist()) == "champion"
    value = observed["value"].to_numpy() * np.where(treated & (days >= 9), 2.0, 1.0)
    told = observed.set_column(observed.schema.get_field_index("value"), "value", pa.array(value))
    last = START + timedelta(days=19)
    assert judged(design, told, before, judged=last - timedelta(days=1)).verdict != "ROLLBACK"
    since = judged(design, told, before, judged=START + timedelta(days=3))
    assert since.verdict == "ROLLBACK" and since.figures["since"] > str(START + timedelta(days=3))
    assert judged(design, observed, before, judged=last).verdict == "ROLLBACK", (
        "the newest look counts whatever was judged"
    )


@settings(max_examples=examples(12), suppress_health_check=[HealthCheck.too_slow])
@given(
    design=st.sampled_from(DESIGNS), harm=st.sampled_from([-0.1, 0.0, 0.05, 0.2]), seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-6, 0.3, 1e6]),
)  # fmt: skip
def test_order_names_units_of_measure_and_direction_change_nothing(
    design: str, harm: float, seed: int, scale: float
) -> None:
    observed, before = world(design, harm=harm, seed=seed)
    rng = np.random.default_rng(seed)
    names = {u: f"{rng.integers(1 << 30):x}-{u}" for u in pc.unique(observed["unit"]).sort().to_pylist()}
    spec = SPEC.model_copy(update={"metrics": (VALUE.model_copy(update={"margin": 0.02}),)})
    turned = SPEC.model_copy(update={"metrics": (Metric(name="value", column="value", better="lower", margin=0.02),)})

    def changed(table: pa.Table | None, factor: float, shuffle: bool, rename: bool) -> pa.Table | None:
        if table is None:
            return None
        value = pa.array(table["value"].to_numpy() * factor)
        table = table.set_column(table.schema.get_field_index("value"), "value", value)
        if rename:
            units = [names[u] for u in table["unit"].to_pylist()]
            table = table.set_column(table.schema.get_field_index("unit"), "unit", [units])
        return table.take(rng.permutation(table.num_rows)) if shuffle else table

    first = judged(design, observed, before, spec=spec)

    def same(other: Judgement, factor: float) -> None:
        assert other.verdict == first.verdict
        assert other.looks["verdict"].equals(first.looks["verdict"])
        for name, by in (("statistic", 1.0), ("bound", 1.0), ("estimate", factor), ("margin", factor)):
            a, b = (np.array(t[name].to_pylist(), dtype=np.float64) for t in (first.looks, other.looks))
            assert np.allclose(a * by, b, rtol=1e-6, atol=1e-9 * by, equal_nan=True), name

    same(judged(design, changed(observed, 1, True, False), changed(before, 1, True, False), spec=spec), 1)
    same(judged(design, changed(observed, 1, True, True), changed(before, 1, True, True), spec=spec), 1)
    same(judged(design, changed(observed, scale, False, False), changed(before, scale, False, False), spec=spec), scale)
    same(judged(design, changed(observed, -1, False, False), changed(before, -1, False, False), spec=turned), 1)


@pytest.mark.parametrize("design", DESIGNS)
def test_no_data_is_no_verdict(design: str) -> None:
    observed, before = world(design, harm=0.5)
    none = judged(design, observed.slice(0, 0), before)
    one = judged(design, observed.filter(pc.equal(observed["arm"], "champion")), before)
    later = judged(design, observed, before, start=START + timedelta(days=40), day=START + timedelta(days=50))
    empty = observed.set_column(
        observed.schema.get_field_index("value"), "value", pa.nulls(observed.num_rows, pa.float64())
    )
    for judgement in (none, one, later, judged(design, empty, before)):
        assert judgement.verdict == "NO_DATA" and judgement.looks.num_rows == 0
        assert "no data is no verdict" in judgement.reasons[0]


@pytest.mark.parametrize("design", DESIGNS)
def test_values_that_are_missing_are_left_out_and_counted_and_missing_days_named(design: str) -> None:
    observed, before = world(design, harm=0.2)
    gone = [START + timedelta(days=6)]
    observed = observed.filter(pc.invert(pc.is_in(observed["day"], value_set=pa.array(gone, pa.date32()))))
    value = observed["value"].to_numpy().copy()
    value[5:25] = np.nan
    mask = np.arange(len(value)) < 12
    holed = observed.set_column(observed.schema.get_field_index("value"), "value", pa.array(value, mask=mask))
    judgement = judged(design, holed, before)
    assert judgement.verdict == "ROLLBACK"
    assert sum(judgement.figures["metrics"]["value"]["missing_values"].values()) == 25
    assert any("rows without a value left out" in r for r in judgement.reasons)
    assert judgement.figures["missing_days"] == ["2026-03-08"] and gone[0] not in judgement.looks["day"].to_pylist()


@pytest.mark.parametrize("design", DESIGNS)
def test_arms_that_are_not_as_drawn_refuse_a_verdict(design: str) -> None:
    observed, before = world(design, harm=0.3, units=60)
    shares = {"champion": 0.9, "holdout": 0.1}
    judgement = judged(design, observed, before, shares=shares)
    assert (
        judgement.verdict == "INCONCLUSIVE" and not judgement.sample_ratio["ok"] and judgement.sample_ratio["p"] < 0.001
    )
    assert "not as drawn" in judgement.reasons[0]
    assert not set(judgement.looks["verdict"].to_pylist()) & {"ROLLBACK"} or "ROLLBACK" not in judgement.verdict


def test_recorded_probabilities_count_before_the_shares() -> None:
    observed, before = world("cohort", harm=0.3, units=60)
    units, at = np.unique(observed["unit"].to_numpy(zero_copy_only=False), return_index=True)
    drawn = pa.table(
        {"unit": units.tolist(), "arm": observed["arm"].take(pa.array(at)), "arm_probability": [0.5] * len(units),
         "epoch": [START.isoformat()] * len(units), "drawn_on": pa.array([START] * len(units), pa.date32())}
    )  # fmt: skip
    assert (
        judged("cohort", observed, before, drawn=drawn, shares={"champion": 0.9, "holdout": 0.1}).verdict == "ROLLBACK"
    )
    stranger = drawn.set_column(1, "arm", [["explore"] * len(units)])
    assert judged("cohort", observed, before, drawn=stranger).verdict == "INCONCLUSIVE"


def test_a_ratio_mismatch_that_comes_later_takes_no_rollback_back() -> None:
    observed, before = world("cohort", harm=0.4, units=40)
    units, at = np.unique(observed["unit"].to_numpy(zero_copy_only=False), return_index=True)
    late = [f"late{i}" for i in range(60)]
    drawn = pa.table(
        {"unit": [*units.tolist(), *late], "arm": [*observed["arm"].take(pa.array(at)).to_pylist(), *["champion"] * 60],
         "epoch": [START.isoformat()] * 100,
         "drawn_on": pa.array([START] * 40 + [START + timedelta(days=15)] * 60, pa.date32())}
    )  # fmt: skip
    judgement = judged("cohort", observed, before, drawn=drawn)
    assert judgement.verdict == "ROLLBACK" and not judgement.sample_ratio["ok"]
    assert judgement.figures["since"] < (START + timedelta(days=15)).isoformat()


def test_entities_whose_shares_changed_while_judged_refuse_a_verdict() -> None:
    observed, _ = world("entity", harm=0.3)
    n = observed.num_rows
    drawn = observed.select(["unit", "arm"])
    drawn = drawn.append_column("epoch", [[f"2026-03-{2 + i // 60:02d}" for i in range(n)]])
    same, other = [0.5] * n, [0.5 if i < n // 2 else 0.4 for i in range(n)]
    assert judged("entity", observed, None, drawn=drawn.append_column("arm_probability", [same])).verdict == "ROLLBACK"
    judgement = judged("entity", observed, None, drawn=drawn.append_column("arm_probability", [other]))
    assert "changed while it was judged" in " ".join(judgement.reasons)


@pytest.mark.parametrize("design", ["cohort", "switchback"])
def test_fewer_clusters_than_asked_are_inconclusive(design: str) -> None:
    observed, before = world(design, harm=0.5, units=4, days=13)
    judgement = judged(design, observed, before, day=START + timedelta(days=6))
    assert judgement.verdict == "INCONCLUSIVE" and "clusters" in judgement.reasons[0]
    later = judged(design, observed, before, day=START + timedelta(days=12))
    assert (later.verdict == "INCONCLUSIVE") == (design == "cohort")  # a second week makes eight clusters


def test_washed_out_days_count_for_nothing() -> None:
    observed, before = world("switchback")
    wild = np.where(observed["washout"].to_numpy(zero_copy_only=False), 1e9, observed["value"].to_numpy())
    other = observed.set_column(observed.schema.get_field_index("value"), "value", pa.array(wild))
    assert judged("switchback", other, before).looks.equals(judged("switchback", observed, before).looks)
    assert judged("switchback", observed, before).figures["missing_days"] == []


def test_the_pre_period_before_the_start_alone_is_read() -> None:
    observed, before = world("cohort", harm=0.1)
    assert before is not None
    both = pa.concat_tables([before, observed])
    assert judged("cohort", observed, both).looks.equals(judged("cohort", observed, before).looks)


def test_the_pre_period_of_a_unit_sharpens_the_estimate() -> None:
    observed, before = world("cohort", harm=0.1)
    sharp, blunt = judged("cohort", observed, before), judged("cohort", observed, None)
    assert sharp.verdict == "ROLLBACK" and blunt.verdict != "ROLLBACK"
    entities, _ = world("entity", harm=0.02)
    with_it, without = (
        judged("entity", t, None).looks.to_pylist()[-1] for t in (entities, entities.drop(["covariate"]))
    )
    assert with_it["high"] - with_it["low"] < 0.6 * (without["high"] - without["low"])


@pytest.mark.parametrize("design", DESIGNS)
def test_a_ratio_metric_is_the_ratio_of_sums_with_the_delta_methods_error(design: str) -> None:
    """Value per click where the arm changes both: the level is exact, and more clicks at the same value each are no gain."""
    observed, _ = world(design, seed=5, units=60)
    clicks = observed["clicks"].to_numpy().astype(np.float64)
    treated = np.array(observed["arm"].to_pylist()) == "champion"
    rng = np.random.default_rng(5)
    clicks = clicks * np.where(treated, 1.3, 1.0)
    value = clicks * (2 + 0.2 * rng.standard_normal(len(clicks)))
    table = observed.set_column(observed.schema.get_field_index("clicks"), "clicks", pa.array(clicks))
    table = table.set_column(table.schema.get_field_index("value"), "value", pa.array(value))
    ratio = SPEC.model_copy(update={"metrics": (VALUE.model_copy(update={"per": "clicks"}),), "pre_days": 0})
    if design == "entity":
        table = table.drop(["covariate"])
    judgement = judged(design, table, None, spec=ratio)
    last = judgement.looks.to_pylist()[-1]
    assert judgement.verdict == "INCONCLUSIVE"
    keep = ~treated
    if design == "switchback":
        keep &= ~table["washout"].to_numpy(zero_copy_only=False)
    assert last["level"] == pytest.approx(value[keep].sum() / clicks[keep].sum())
    if design == "entity":
        errors = []
        for here in (treated, ~treated):
            r = value[here].sum() / clicks[here].sum()
            errors.append((value[here] - r * clicks[here]).var() / clicks[here].mean() ** 2 / here.sum())
        assert last["estimate"] / last["statistic"] == pytest.approx(sum(errors) ** 0.5, rel=0.03)
    worse = table.set_column(
        table.schema.get_field_index("value"), "value", pa.array(value * np.where(treated, 0.9, 1.0))
    )
    assert judged(design, worse, None, spec=ratio).verdict == "ROLLBACK"


def test_alpha_is_split_over_metrics_by_weight() -> None:
    metrics = (
        Metric(name="value", column="value", better="higher", weight=3),
        Metric(name="clicks", column="clicks", better="higher"),
    )
    spec = SPEC.model_copy(update={"metrics": metrics})
    assert [spec.alpha_of(m) for m in metrics] == pytest.approx([0.0375, 0.0125])
    judgement = judged("cohort", *world("cohort", harm=0.2), spec=spec)
    assert judgement.verdict == "ROLLBACK" and judgement.reasons[0].startswith("value:")
    ends = {r["metric"]: r["alpha_spent"] for r in judgement.looks.to_pylist()}
    assert ends == pytest.approx({"value": 0.0375, "clicks": 0.0125})
    assert set(judgement.figures["metrics"]) == {"value", "clicks"}


def test_one_metrics_harm_is_enough_and_every_metric_must_be_harmless() -> None:
    observed, before = world("cohort", harm=-0.3)
    metrics = (VALUE, Metric(name="clicks", column="clicks", better="higher"))
    spec = SPEC.model_copy(update={"metrics": metrics})
    assert judged("cohort", observed, before).verdict == "PROMOTE"
    assert judged("cohort", observed, before, spec=spec).verdict == "INCONCLUSIVE"


def test_what_cannot_be_judged_is_refused_with_what_is_wrong() -> None:
    observed, before = world("cohort")
    with pytest.raises(ValueError, match=r"observed: no column value \(there are: .*unit"):
        judged("cohort", observed.drop(["value"]), before)
    with pytest.raises(ValueError, match="shares: the arm 'challenger' has none"):
        judged("cohort", observed, before, treated="challenger")
    with pytest.raises(ValueError, match="allowed here: entity, cohort, switchback"):
        judged("weekly", observed, before)
    arms = observed["arm"].to_pylist()
    arms[-24] = "holdout" if arms[-24] == "champion" else "champion"
    torn = observed.set_column(observed.schema.get_field_index("arm"), "arm", [arms])
    with pytest.raises(ValueError, match="'u00' stands in two arms in the epoch '2026-03-02'"):
        judged("cohort", torn, before)
    entities, _ = world("entity")
    with pytest.raises(ValueError, match="the entity 'e00000' stands more than once"):
        judged("entity", pa.concat_tables([entities, entities.slice(0, 1)]), None)
    with pytest.raises(ValidationError, match="stands twice"):
        RegressionSpec(metrics=(VALUE, VALUE))


def test_outcomes_without_any_spread_prove_nothing() -> None:
    for design in DESIGNS:
        observed, before = world(design)
        flat = observed.set_column(
            observed.schema.get_field_index("value"), "value", pa.array(np.ones(observed.num_rows))
        )
        assert judged(design, flat, before).verdict in ("INCONCLUSIVE", "CONTINUE"), design


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_power_rises_with_the_harm_and_says_so_in_a_sentence(design: str) -> None:
    observed, before = world(design, days=42, harm=0.0)
    history = observed if before is None else pa.concat_tables([before, observed])
    said: dict[str, Any] = {
        "spec": SPEC, "design": design, "treated": "champion", "control": "holdout",
        "shares": {"champion": 0.6, "holdout": 0.2, "explore": 0.2}, "epoch_days": 7 if design == "switchback" else 42, "runs": 40,
    }  # fmt: skip
    none, some, much = (regression.power(history, harm=h, **said) for h in (0.0, 0.02, 0.3))
    assert none.found[-1] <= 0.2 < 0.9 < much.found[-1] and none.found[-1] <= some.found[-1] + 0.05
    assert much.days is not None and (none.days is None) and much.low <= much.found[-1] <= much.high
    assert list(much.found) == sorted(much.found) and len(much.found) == SPEC.horizon_days
    assert f"a harm of 30.0% is found in {much.days} days with 80% probability" in much.sentence()
    assert "80% is not reached" in none.sentence() and "20% as holdout" in none.sentence()
    assert regression.power(history, harm=0.3, **said) == much
    if design != "entity":
        more = regression.power(history, harm=0.05, units=96, **said)
        assert more.units == 96 and more.found[-1] > regression.power(history, harm=0.05, **said).found[-1]


def test_power_refuses_a_history_that_says_nothing() -> None:
    observed, _ = world("cohort", days=8)
    said: dict[str, Any] = {
        "spec": SPEC, "treated": "champion", "control": "holdout", "shares": {"champion": 1, "holdout": 1}, "harm": 0.1, "epoch_days": 14,
    }  # fmt: skip
    with pytest.raises(ValueError, match="8 days; a pre-period and what follows it need 14"):
        regression.power(observed, design="cohort", **said)
    with pytest.raises(ValueError, match="no rows"):
        regression.power(observed.slice(0, 0), design="cohort", **said)
    with pytest.raises(ValueError, match=r"unknown \(allowed here: value\)"):
        regression.power(observed, design="cohort", metric="revenue", **said)


@pytest.mark.filterwarnings("error")
def test_where_nothing_can_be_judged_power_is_none() -> None:
    """Units too few for any verdict: no harm is found, however large, and the answer is a number without a warning."""
    history = world("cohort", days=42)[0]
    few = history.filter(pc.is_in(history["unit"], pc.unique(history["unit"])[:4]))
    said = regression.power(
        few, spec=SPEC, design="cohort", treated="champion", control="holdout", shares={"champion": 1, "holdout": 1},
        harm=0.5, epoch_days=42, runs=20,
    )  # fmt: skip
    assert said.days is None and said.found[-1] == 0 == said.low and 0 <= said.high < 0.3
    assert "80% is not reached" in said.sentence()


def test_spending_is_little_at_first_and_all_at_the_end() -> None:
    spent = sequential.spent(np.arange(0, 31) / 30, 0.05)
    assert (
        spent[0] == 0
        and spent[1] < 1e-9
        and spent[15] == pytest.approx(0.0056, abs=1e-3)
        and spent[30] == pytest.approx(0.05)
    )
    assert (np.diff(spent) >= 0).all()


def test_a_constant_of_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed here: pocock"):
        sequential.constant(10, 0.05, "wald")


def test_alpha_comes_back_within_a_year_and_the_first_version_has_the_whole() -> None:
    day = date(2026, 3, 2)

    def left(*earlier: tuple[int, int], start: int) -> float:
        spans = [(day + timedelta(days=a), day + timedelta(days=b)) for a, b in earlier]
        return sequential.left(spans, day + timedelta(days=start), 0.05, 28, "early")

    assert left(start=0) == 0.05
    whole = (0, 27)
    assert left(whole, start=28) == pytest.approx(0.05 * 28 / 365)
    assert left(whole, start=365) == pytest.approx(0.05) == left(whole, start=2_000)
    week = left((0, 6), start=7)
    assert 0.02 < week < 0.05, "a version that lived a week has spent its week's part"
    assert left((7, 13), (0, 6), start=14) == left((0, 6), (7, 13), start=14) < week
    assert left((0, 500), start=501) == pytest.approx(0.05), "one that lived long has spent no more than the whole"


@pytest.mark.parametrize("design", DESIGNS)
def test_less_of_alpha_finds_less_and_is_said(design: str) -> None:
    observed, before = world(design, harm=0.04 if design == "entity" else 0.12)
    whole, left = (judged(design, observed, before, alpha=a) for a in (0.05, 0.002))
    bounds = zip(*(one.looks["bound"].to_pylist() for one in (whole, left)), strict=True)
    told = [(a, b) for a, b in bounds if a is not None and b is not None]
    assert len(told) > 5 and all(a < b for a, b in told)
    assert left.looks["alpha_spent"].to_pylist()[-1] == pytest.approx(0.002)
    assert any("α 0.20%" in reason for reason in left.reasons) and not any("α" in reason for reason in whole.reasons)
    high = [one.looks["high"].to_pylist()[-1] for one in (whole, left)]
    assert high[0] == pytest.approx(high[1], rel=0.1), "PROMOTE is judged as before"


def test_the_robust_error_is_that_of_hc2() -> None:
    rng = np.random.default_rng(7)
    size, rows = 20, 3
    arms = np.array([rng.permutation(np.arange(size) < 6) for _ in range(5)]).astype(np.float64)
    y, x = (rng.standard_normal((rows, size)) for _ in range(2))
    y, x = y - y.mean(1, keepdims=True), x - x.mean(1, keepdims=True)
    sxx = (x * x).sum(1)
    rest = y - ((x * y).sum(1) / sxx)[:, None] * x
    share = np.full(size, 0.3)
    along = arms @ x.T / sxx
    tau = (arms @ rest.T) / ((arms - share) @ (arms - share).T).diagonal()[:, None]
    found = effects._spread(share, arms, x, rest, along, tau)
    for p, arm in enumerate(arms):
        for k in range(rows):
            treatment = arm - share - along[p, k] * x[k]
            left = rest[k] - tau[p, k] * treatment
            leverage = np.where(arm == 1, 1 / 6, 1 / 14)
            assert found[p, k] == pytest.approx((treatment**2 * left**2 / (1 - leverage)).sum())
