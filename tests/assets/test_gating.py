"""The gate for a version that is registered already: judged by its very files, beside the champion, on held-out days."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from assets import deciding, gating, point_in_time
from delivery.ledger import Ledger
from models import examining, gate
from models.registry import Registry, Version
from tests.conftest import Bench, moved
from tests.support.ledgers import KEY


def flipped(files: dict[str, bytes]) -> dict[str, bytes]:
    """Every elasticity negated: what somebody who edits a model's files might do."""
    meta = json.loads(files["meta.json"])
    slopes = meta["elasticities"]
    for name in [n for n in slopes if n.endswith("_mean")]:
        slopes[name] = [-x for x in slopes[name]] if isinstance(slopes[name], list) else -slopes[name]
    return {**files, "meta.json": json.dumps(meta, sort_keys=True).encode()}


def register(bench: Bench, registry: Registry, day: date, files: Any = None, params: Any = None) -> Version:
    return registry.register(
        bench.workflow.name, files or bench.fit(day).files(), trained_day=day, passed=False, params=params or {},
        metrics={}, tags={}, plots={}, card="card", seed=1,
    )  # fmt: skip


def loose(bench: Bench, **changed: Any) -> Bench:
    """The workflow with another gate or margin."""
    training = bench.workflow.training
    spec = {k: v for k, v in changed.items() if k in gate.GateSpec.model_fields}
    rest = {k: v for k, v in changed.items() if k not in spec}
    training = training.model_copy(update={**rest, "gate": training.gate.model_copy(update=spec)})
    return replace(bench, workflow=bench.workflow.model_copy(update={"training": training}))


@dataclass(frozen=True)
class Versions:
    """``champion``: trained before the held-out days, so it is judged as it is. ``fresh``: trained on all of them."""

    registry: Registry
    champion: Version
    fresh: Version
    poisoned: Version


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, empty_registry_folder: Path, ads: Bench) -> Versions:
    registry = moved(empty_registry_folder, tmp_path_factory.mktemp("gating") / "registry")
    recipe = {"recipe": json.dumps(deciding.learner_spec(ads.workflow))}
    files = ads.fit(ads.last).files()
    return Versions(
        registry,
        register(ads, registry, ads.last - timedelta(days=7)),
        register(ads, registry, ads.last, files, recipe),
        register(ads, registry, ads.last, flipped(files)),
    )


def judge(
    bench: Bench, made: Versions, version: Version, against: Version | None, day: date | None = None
) -> gate.Verdict:
    return gating.judge(bench.workflow, bench.lake, made.registry, version, day or bench.last, against=against)


def test_a_version_with_its_slopes_turned_round_is_refused_by_what_its_policy_is_worth(
    ads: Bench, made: Versions
) -> None:
    wide = loose(ads, margin=0.05)
    found = judge(wide, made, made.poisoned, made.champion)
    assert not found.passed
    (named,) = [r for r in found.reasons if "worse by more than" in r and "policy's value" in r]
    assert f"on the {examining.RANDOMISED}" in named
    harm = found.figures["policy_value"][examining.RANDOMISED]["harm"]
    assert harm["low"] > 0 and harm["point"] > 0.1 and harm["days"] == 20
    assert any("is not worse than the champion's" in r for r in found.reasons), "the metric alone lets it pass"
    lenient = loose(wide, value_margin=1.0)
    assert judge(lenient, made, made.poisoned, made.champion).passed, "nothing else stood in its way"


def test_an_honest_version_passes_and_carries_what_was_found(ads: Bench, made: Versions) -> None:
    found = judge(ads, made, made.fresh, made.champion)
    assert found.passed, found.reasons
    assert found.figures["version"] == made.fresh.number
    assert found.figures["held_out_days"] == [str(ads.last - timedelta(days=6)), str(ads.last)]
    json.dumps(found.figures, allow_nan=False)
    tags = made.registry.client.get_model_version(made.fresh.name, str(made.fresh.number)).tags
    assert tags["signalbox.gate_against"] == "champion" and tags["signalbox.gate_harm"].startswith("-")
    assert any("may have learned from the held-out days" in r for r in found.reasons)


def test_a_champion_that_has_learned_from_the_held_out_days_is_stood_in_for_by_its_recipe(
    ads: Bench, made: Versions
) -> None:
    found = judge(ads, made, made.champion, made.fresh)
    assert any(f"Version {made.fresh.number} has learned from the held-out days" in r for r in found.reasons)
    assert found.figures["against"] == "champion" and found.passed
    # the same recipe on the same early rows, by another number of threads
    assert found.figures["champion"] == pytest.approx(found.figures["candidate"], rel=1e-6)


def test_a_champion_without_a_recipe_is_not_compared_and_that_is_said(ads: Bench, made: Versions) -> None:
    found = judge(ads, made, made.fresh, made.poisoned)
    assert found.figures["against"] == "rule"
    assert any(f"Version {made.poisoned.number} could not be compared" in r for r in found.reasons)


def test_a_version_that_does_not_say_when_it_was_trained_is_judged_as_it_is(ads: Bench, made: Versions) -> None:
    by_hand = replace(made.fresh, trained_day=date.max)
    found, dated = (judge(ads, made, one, made.champion) for one in (by_hand, made.fresh))
    assert found.passed and found.figures["harm"] == dated.figures["harm"]
    assert any("may have learned from the held-out days" in r for r in found.reasons)


def test_a_version_that_cannot_be_read_is_refused_with_the_reason(ads: Bench, made: Versions) -> None:
    found = judge(ads, made, replace(made.fresh, digest="0" * 64), made.champion)
    assert not found.passed and "cannot be read" in found.reasons[0]


def test_a_version_that_reads_other_columns_is_refused_with_the_column_named(ads: Bench, made: Versions) -> None:
    said = ads.workflow.features
    fewer = said.model_copy(update={"numeric": said.numeric[:-1]})
    narrow = replace(ads, workflow=ads.workflow.model_copy(update={"features": fewer}))
    other = register(narrow, made.registry, ads.last)
    found = judge(ads, made, other, made.champion)
    assert not found.passed
    assert any(repr(said.numeric[-1]) in r and "does not read column" in r for r in found.reasons)
    assert found.figures["contract"] and "harm" not in found.figures


def test_without_matured_days_nothing_passes(ads: Bench, made: Versions) -> None:
    found = judge(ads, made, made.fresh, made.champion, day=ads.days[3])
    assert not found.passed and "no matured rows are held out" in found.reasons[0]


def test_the_held_out_days_and_the_randomised_ones_before_them(ads: Bench) -> None:
    rows = point_in_time.ordered(point_in_time.training_set(ads.workflow, ads.lake, ads.last), "day")
    held = gating.held_out(loose(ads, value_days=10).workflow, ads.lake, ads.last, rows)
    judged = set(held.rows["day"].to_pylist())
    # what the last day's budgets came to is known a day later
    assert judged == {ads.last - timedelta(days=n) for n in range(1, 7)} and min(judged) > held.split
    assert max(held.early["day"].to_pylist()) < held.split
    assert set(held.decided["day"].to_pylist()) == {ads.last - timedelta(days=n) for n in range(1, 10)}


def test_tickets_are_judged_by_the_order_of_their_queue(queue: Bench, empty_registry: Registry) -> None:
    soon = loose(queue, maturity_days=1, holdout_days=4, slice_min_rows=30, margin=1.0)
    version = register(soon, empty_registry, soon.last - timedelta(days=6))
    found = gating.judge(soon.workflow, soon.lake, empty_registry, version, soon.last, against=version)
    assert found.figures["against"] == "rule" and found.figures["groups"], found.reasons
    value = found.figures["policy_value"][examining.HELD_OUT]
    assert isinstance(value, dict) and 0 < value["mine"] <= 1 and "misses" in value["of"]


def test_who_is_champion_is_what_the_ledger_says(ads: Bench, made: Versions, tmp_path: Path) -> None:
    made.registry.promote(made.poisoned)  # an alias that somebody moved
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=lambda: ads.morning(ads.last)) as book:
        first = gating.champion_of(ads.workflow, made.registry, book)
        assert first is not None and first.number == made.poisoned.number, "the ledger knows nobody yet"
        book.promotion(ads.workflow.name, made.champion.number, "promoted", "run 1", {})
        found = gating.champion_of(ads.workflow, made.registry, book)
        assert found is not None and found.number == made.champion.number
