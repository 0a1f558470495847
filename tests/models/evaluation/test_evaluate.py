"""Examining: a candidate beside the champion on the same rows, and everything that the gate refuses it for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models.booster import Encoding
from models.evaluation import gate
from models.evaluation.evaluate import HELD_OUT, Terms, contract, examine
from models.policies.budget import BudgetPolicy

POLICY = BudgetPolicy(spend="budget_micros")
N, DAYS = 60, 7


def rows(**changed: Any) -> pa.Table:
    """Seven days of sixty lines in three cities and two sizes."""
    day = np.repeat(np.arange(DAYS), N)
    table = {
        "entity_id": [f"l{i:02d}" for i in np.tile(np.arange(N), DAYS)], "unit": ["u"] * len(day),
        "day": pa.array([date(2026, 3, 2) + timedelta(days=int(d)) for d in day], pa.date32()),
        "city": np.tile(np.array(["bern", "oslo", "rome"]), len(day) // 3), "x": np.tile(np.linspace(0, 1, N), DAYS),
        "budget_micros": np.full(len(day), 100_000_000), "value": 100 + 10 * np.random.default_rng(5).standard_normal(len(day)),
        "explore_multiplier_today": np.ones(len(day)),
    }  # fmt: skip
    return pa.table({**table, **changed})


@dataclass
class Model:
    """Misses the value by ``off`` (a number, or by city), and says of itself what it is told to."""

    off: Any = 1.0
    claims: dict[str, float] = field(default_factory=dict)
    numeric: tuple[str, ...] = ("x",)
    categorical: tuple[str, ...] = ("city",)
    size: int = 1000

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.numeric, dict.fromkeys(self.categorical, ()))

    def _off(self, table: pa.Table) -> Any:
        off = [self.off[c] for c in table["city"].to_pylist()] if isinstance(self.off, dict) else self.off
        return np.broadcast_to(np.asarray(off, dtype=np.float64), table.num_rows)

    def expect(self, table: pa.Table) -> Any:
        sign = np.where(np.arange(table.num_rows) % 2, 1, -1)  # wrong both ways: no bias
        return table["value"].to_numpy() + sign * self._off(table)

    def evaluate(self, table: pa.Table) -> dict[str, float]:
        error = self.expect(table) - table["value"].to_numpy()
        mae, bias = float(np.abs(error).mean()), float(error.mean())
        return {"mae": mae, "bias": bias, "mean_value": float(table["value"].to_numpy().mean()), **self.claims}

    def score(self, table: pa.Table) -> pa.Table:
        spends = table["budget_micros"].to_numpy()[:, None] * np.array([0.5, 1.0, 1.5])
        slope = 1 + table["x"].to_numpy()[:, None]
        return pa.table({
            "entity_id": table["entity_id"], "level": 100.0 + self._off(table),
            "spends": spends.astype(np.int64).tolist(), "values": (slope * np.array([50.0, 100, 140])).tolist(),
        })  # fmt: skip

    def files(self) -> dict[str, bytes]:
        return {"level.txt": b"x" * self.size, "meta.json": repr((self.off, self.claims)).encode()}


def terms(**spec: Any) -> Terms:
    said = {"slices": ("city",), "attributes": ("city",), "slice_min_rows": 50, **spec}
    return Terms("response", gate.GateSpec(**said), POLICY, ("x",), ("city",), 3)


def ask(mine: Model, champion: Model | None, table: pa.Table | None = None, **spec: Any) -> gate.Verdict:
    table = rows() if table is None else table
    verdict, _ = examine(
        mine, Model(9.0), champion, table, metric="mae", better="lower", margin=0.02, terms=terms(**spec), decided=table
    )
    return verdict


EQUAL = Model({"bern": 1.0, "oslo": 1.0, "rome": 1.0 + 1e-3})
"""As good as ``Model(1.0)``, and another model."""


def test_a_candidate_that_is_as_good_as_the_champion_passes() -> None:
    found = ask(EQUAL, Model())
    assert found.passed and 0 < found.figures["harm"]["point"] < 1e-3
    assert found.figures["against"] == "champion" and len(found.figures["slices"]) == 3


@pytest.mark.parametrize("champion", [Model(), Model(1.0 + 1e-9)], ids=["its files", "its scores but for rounding"])
def test_a_candidate_that_is_the_champion_is_refused(champion: Model) -> None:
    for mine in (Model(), champion):
        found = ask(mine, champion)
        assert not found.passed and not found.held and "harm" not in found.figures
        assert found.reasons == (
            "the candidate and the champion are the same model: of a model beside itself nothing can be told",
        )


def test_a_kind_of_model_without_a_comparison_is_refused_and_named() -> None:
    table = rows()
    other = Terms("survival", gate.GateSpec(), POLICY, ("x",), ("city",), 3)
    found, _ = examine(
        Model(0.5), Model(9.0), Model(1.0), table, metric="mae", better="lower", margin=0.02, terms=other, decided=table
    )
    assert not found.passed and not found.held
    assert "models of kind 'survival' have no comparison (there is one for duration, response)" in found.reasons[0]


def test_held_out_rows_without_an_outcome_never_pass() -> None:
    table = rows(value=pa.nulls(N * DAYS, pa.float64()))
    found, _ = examine(
        Silent(0.5),
        Silent(9.0),
        Silent(1.0),
        table,
        metric="mae",
        better="lower",
        margin=0.02,
        terms=terms(),
        decided=table,
    )
    assert not found.passed and f"none of {N * DAYS} held-out rows has a known outcome" in found.reasons[0]


class Silent(Model):
    """Says figures without looking at outcomes."""

    def evaluate(self, table: pa.Table) -> dict[str, float]:
        return {"mae": float(self.off), "bias": 0.0, "mean_value": 1.0}


def test_one_that_is_better_everywhere_passes_and_one_that_is_worse_everywhere_does_not() -> None:
    assert ask(Model(1.0), Model(1.1)).passed
    found = ask(Model(1.1), Model(1.0))
    assert not found.passed and found.figures["harm"]["point"] == pytest.approx(0.1)


def test_one_that_is_worse_in_one_slice_only_is_refused_and_the_slice_is_named() -> None:
    mine = Model({"bern": 0.7, "oslo": 0.7, "rome": 1.5})
    found = ask(mine, Model(1.0))
    assert found.figures["candidate"] < found.figures["champion"], "the metric alone lets it pass"
    assert not found.passed
    (named,) = [r for r in found.reasons if r.startswith("slice")]
    assert "city = rome" in named and "+50.00%" in named
    assert ask(mine, Model(1.0), slice_margin=0.6).passed
    assert ask(mine, Model(1.0), slice_min_rows=141).passed, "a slice of 140 rows was not asked for"
    assert ask(mine, None).passed, "without a champion there is nobody to be worse than"


def test_a_slice_that_is_worse_by_chance_refuses_nobody() -> None:
    table = rows()
    noise = np.random.default_rng(8).uniform(0.2, 1.8, table.num_rows)
    mine, refused = Model(), 0
    for seed in range(12):
        mine.off = np.random.default_rng(seed).uniform(0.2, 1.8, table.num_rows)
        refused += any(r.startswith("slice") for r in ask(mine, Model(noise), table, slice_margin=0.0).reasons)
    assert refused <= 1


def test_a_figure_that_is_not_what_the_rows_say_is_caught() -> None:
    found = ask(Model(3.0, {"mae": 0.5}), Model(1.0))
    assert not found.passed
    assert any("candidate's mae 0.5 is not the mean of its rows, which is 3" in r for r in found.reasons)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("off", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_never_pass(off: float) -> None:
    found = ask(Model(off), Model(1.0))
    assert not found.passed
    json.dumps(found.figures, allow_nan=False)


@pytest.mark.filterwarnings("ignore:Mean of empty", "ignore:invalid value")
def test_no_held_out_rows_never_pass() -> None:
    nothing = rows().slice(0, 0)
    verdict, _ = examine(
        Model(), Model(9.0), None, nothing, metric="mae", better="lower", margin=0.0, terms=terms(), decided=nothing
    )
    assert not verdict.passed and "no matured rows" in verdict.reasons[0]


def test_bias_beyond_the_limit_is_refused_unless_the_champion_is_as_far_off() -> None:
    biased = Model(1.0 + 1e-3, {"bias": 30.0})
    found = ask(biased, Model(1.0))
    assert not found.passed and any(
        "bias as a share of the mean value 0.3" in r and "above 0.15" in r for r in found.reasons
    )
    assert ask(biased, Model(1.0, {"bias": -31.0})).passed, "the world has moved: nobody is right"
    assert ask(biased, Model(1.0), calibration=None).passed
    assert not ask(Model(1.0, {"bias": float("nan")}), Model(1.1)).passed


def test_size_and_speed_have_limits() -> None:
    big = Model(size=3_000_000)
    assert ask(big, EQUAL).passed
    assert any("3.0 MB" in r for r in ask(big, EQUAL, max_megabytes=2).reasons)
    slow = ask(Model(), EQUAL, min_rows_per_s=1e12)
    assert not slow.passed and any("rows a second" in r for r in slow.reasons)


def test_with_interval_evidence_a_candidate_must_prove_that_it_is_not_worse() -> None:
    table, theirs = rows(), Model(1.0)
    by_day = np.array([0.6, 1.35, 0.8, 1.2, 0.7, 1.25, 1.0])  # better on average, and nobody can be sure of it
    mine = Model(np.repeat(by_day, N))
    assert ask(mine, theirs, table, slice_margin=9).passed
    found = ask(mine, theirs, table, slice_margin=9, evidence="interval")
    assert not found.passed and any("not proven to be within the margin" in r for r in found.reasons)
    assert ask(Model(0.5), Model(1.0), evidence="interval").passed


def test_groups_are_told_and_judged_only_where_a_limit_is_set() -> None:
    one = Model()
    found = ask(one, EQUAL)
    assert [g["value"] for g in found.figures["groups"]] == ["bern", "oslo", "rome"]
    assert any(r.startswith("decided against:") and "city" in r for r in found.reasons)
    assert not ask(one, EQUAL, max_disparity=0.0).passed
    assert ask(one, EQUAL, max_disparity=1.0).passed


def test_without_randomised_rows_the_policy_is_not_measured_and_nothing_follows() -> None:
    found = ask(Model(), EQUAL)
    assert found.passed and "not measured" in found.figures["policy_value"][HELD_OUT]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"numeric": ("x", "y")}, "model reads column 'y' as numeric; the workflow's features do not name it"),
        ({"numeric": ()}, "model does not read column 'x', which the workflow's features name as numeric"),
        (
            {"numeric": (), "categorical": ("city", "x")},
            "'x' as categorical; the workflow's features name it as numeric",
        ),
    ],
)
def test_a_model_that_reads_other_columns_is_refused_with_the_column_named(changed: Any, named: str) -> None:
    found = ask(Model(0.1, **changed), Model(1.0))
    assert not found.passed and any(named in r for r in found.reasons)


def test_the_recorded_recipe_and_the_rows_are_part_of_the_contract() -> None:
    assert contract(Model(), terms(), rows(), {"numeric": ["x"], "categorical": ["city"]}) == ()
    assert contract(Model(), terms(), rows(), {}) == (), "registered by hand: it says nothing"
    (said,) = contract(Model(), terms(), rows(), {"numeric": ["x", "age"], "categorical": ["city"]})
    assert "recorded recipe reads column 'age'" in said
    (said,) = contract(Model(), terms(), rows(x=["a"] * N * DAYS))
    assert "'x' is string in the features and read as numeric" in said
    assert contract(Model(), terms(), rows().drop_columns(["city"])) == ("the features have no column 'city'",)


def test_columns_that_a_learner_makes_itself_are_no_part_of_the_contract() -> None:
    from models.learners.response import SPEND_SHIFTS

    assert contract(Model(numeric=("x", *SPEND_SHIFTS)), terms(), rows()) == ()


def test_everything_is_told_in_the_card_and_the_tags() -> None:
    found = ask(Model({"bern": 0.7, "oslo": 0.7, "rome": 1.5}), Model(1.0))
    text = gate.card(
        name="shop", description="What it is for.", trained_day=date(2026, 3, 9), verdict=found, metrics={}, facts={}
    )
    assert "## Beside the champion" in text and "## By slice" in text and "## Who is decided for and against" in text
    assert "| city = rome | 140 | 1.5 | 1 | +50.00%" in text
    assert "policy's value, held-out days | not measured" in text
    tags = gate.tags(found)
    assert tags["signalbox.gate_slices"] == "3 compared, worst +50.0%" and all(len(t) < 5000 for t in tags.values())
    assert {"signalbox.gate_harm", "signalbox.gate_fairness", "signalbox.gate_rows_per_s"} <= set(tags)
    json.dumps(found.figures, allow_nan=False)


def test_the_same_candidate_gets_the_same_verdict_again() -> None:
    mine, theirs = Model({"bern": 0.9, "oslo": 1.0, "rome": 1.1}), Model(1.0)
    one, other = ask(mine, theirs), ask(mine, theirs)
    assert one.reasons == other.reasons
    assert {**one.figures, "rows_per_s": 0} == {**other.figures, "rows_per_s": 0}
