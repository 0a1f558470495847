"""The gate for a version that is registered already: judged by its very files, beside the champion, on held-out days."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from delivery.ledger import Ledger
from models import catalog
from models.evaluation import evaluate, gate
from models.registry import Registry, Version
from pipeline import point_in_time
from pipeline.decisions import scoring
from pipeline.lifecycle import candidate_evaluation, promotion, state
from pipeline.monitoring import labels
from tests.conftest import WorkflowHarness, moved
from tests.support.aliases import promote
from tests.support.ledgers import KEY


def flipped(files: dict[str, bytes]) -> dict[str, bytes]:
    """Every elasticity negated: what somebody who edits a model's files might do."""
    meta = json.loads(files["meta.json"])
    slopes = meta["elasticities"]
    for name in [n for n in slopes if n.endswith("_mean")]:
        slopes[name] = [-x for x in slopes[name]] if isinstance(slopes[name], list) else -slopes[name]
    return {**files, "meta.json": json.dumps(meta, sort_keys=True).encode()}


def register(bench: WorkflowHarness, registry: Registry, day: date, files: Any = None, params: Any = None) -> Version:
    return registry.register(
        bench.workflow.name, files or bench.fit(day).files(), trained_day=day, passed=False, params=params or {},
        metrics={}, tags={}, plots={}, card="card", seed=1,
    )  # fmt: skip


def loose(bench: WorkflowHarness, **changed: Any) -> WorkflowHarness:
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
def made(tmp_path_factory: pytest.TempPathFactory, empty_registry_folder: Path, ads: WorkflowHarness) -> Versions:
    registry = moved(empty_registry_folder, tmp_path_factory.mktemp("gating") / "registry")
    recipe = {"recipe": json.dumps(scoring.learner_spec(ads.workflow))}
    files = ads.fit(ads.last).files()
    return Versions(
        registry,
        register(ads, registry, ads.last - timedelta(days=7)),
        register(ads, registry, ads.last, files, recipe),
        register(ads, registry, ads.last, flipped(files)),
    )


def judge(
    bench: WorkflowHarness, made: Versions, version: Version, against: Version | None, day: date | None = None
) -> gate.Verdict:
    return candidate_evaluation.judge(
        bench.workflow, bench.lake, made.registry, version, day or bench.last, against=against
    )


def test_a_version_with_its_slopes_turned_round_is_refused_by_what_its_policy_is_worth(
    ads: WorkflowHarness, made: Versions
) -> None:
    wide = loose(ads, margin=0.05)
    found = judge(wide, made, made.poisoned, made.champion)
    assert not found.passed, found.reasons
    (named,) = [r for r in found.reasons if "worse by more than" in r and "policy's value" in r]
    assert f"on the {evaluate.RANDOMISED}" in named
    harm = found.figures["policy_value"][evaluate.RANDOMISED]["harm"]
    assert harm["low"] > 0 and harm["point"] > 0.1 and harm["days"] == 20
    assert any("is not worse than the champion's" in r for r in found.reasons), "the metric alone lets it pass"
    lenient = loose(wide, value_margin=1.0)
    assert judge(lenient, made, made.poisoned, made.champion).passed, "nothing else stood in its way"


def test_an_honest_version_passes_and_carries_what_was_found(ads: WorkflowHarness, made: Versions) -> None:
    found = judge(ads, made, made.fresh, made.champion)
    assert found.passed, found.reasons
    assert found.figures["version"] == made.fresh.number
    assert found.figures["held_out_days"] == [str(ads.last - timedelta(days=6)), str(ads.last)]
    json.dumps(found.figures, allow_nan=False)
    tags = made.registry.client.get_model_version(made.fresh.name, str(made.fresh.number)).tags
    assert tags["signalbox.gate_against"] == "champion" and tags["signalbox.gate_harm"].startswith("-")
    assert any("may have learned from the held-out days" in r for r in found.reasons)


def test_an_older_version_is_laid_beside_a_champion_that_knows_the_held_out_days(
    ads: WorkflowHarness, made: Versions
) -> None:
    found = judge(ads, made, made.champion, made.fresh)
    # it has no recipe, so that it has no twin; by its files it is what the champion's twin is
    assert found.figures["against"] == "champion" and found.figures["harm"]["point"] > 0
    assert any("which flatters it: its twin is the candidate's" in r for r in found.reasons)
    assert any(f"no twins were judged: version {made.champion.number} has none" in r for r in found.reasons)


def test_a_champion_without_a_recipe_is_compared_as_it_is_and_that_is_said(
    ads: WorkflowHarness, made: Versions
) -> None:
    found = judge(ads, made, made.fresh, made.poisoned)
    assert found.figures["against"] == "champion"
    flattered = [r for r in found.reasons if "which flatters it: " in r]
    assert flattered and "its run says no recipe" in flattered[0] and flattered[0].startswith("twins: "), found.reasons


def test_the_champion_under_another_number_is_refused(ads: WorkflowHarness, made: Versions) -> None:
    again = register(ads, made.registry, ads.last, made.registry.load(made.fresh))
    found = judge(ads, made, again, made.fresh)
    assert not found.passed and not found.held and "harm" not in found.figures
    assert "are the same model: of a model beside itself nothing can be told" in found.reasons[0]


OVERFITTED = {"rounds": 80, "learning_rate": 0.3, "leaves": 31, "rows_in_leaf": 1, "l2": 0.0}
"""Knows every row that it has learned from by heart, and foresees others badly."""


def test_a_version_that_knows_the_held_out_days_by_heart_is_refused_by_its_twin(
    ads: WorkflowHarness, made: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    young = loose(ads, calibration=None, min_rows=20)
    spec = {**scoring.learner_spec(ads.workflow), **OVERFITTED}
    monkeypatch.setattr(scoring, "learner_spec", lambda workflow: spec)
    by_heart = register(young, made.registry, ads.last, params={"recipe": json.dumps(spec)})
    monkeypatch.undo()
    found = judge(young, made, by_heart, made.champion)
    assert found.figures["harm"]["point"] < 0, "by its files it is better: it has learned the answers"
    assert not found.passed and found.figures["twins"]["harm"]["point"] > 0.05
    assert any(r.startswith("twins: mae") and "is worse than the champion's" in r for r in found.reasons)


def test_a_version_that_does_not_say_when_it_was_trained_is_judged_as_it_is(
    ads: WorkflowHarness, made: Versions
) -> None:
    by_hand = replace(made.fresh, trained_day=date.max)
    found, dated = (judge(ads, made, one, made.champion) for one in (by_hand, made.fresh))
    assert found.passed and found.figures["harm"] == dated.figures["harm"]
    assert any("may have learned from the held-out days" in r for r in found.reasons)


def test_a_version_that_cannot_be_read_is_refused_with_the_reason(ads: WorkflowHarness, made: Versions) -> None:
    found = judge(ads, made, replace(made.fresh, digest="0" * 64), made.champion)
    assert not found.passed and "cannot be read" in found.reasons[0]


def test_a_version_that_reads_other_columns_is_refused_with_the_column_named(
    ads: WorkflowHarness, made: Versions
) -> None:
    said = ads.workflow.features
    fewer = said.model_copy(update={"numeric": said.numeric[:-1]})
    narrow = replace(ads, workflow=ads.workflow.model_copy(update={"features": fewer}))
    other = register(narrow, made.registry, ads.last)
    found = judge(ads, made, other, made.champion)
    assert not found.passed
    assert any(repr(said.numeric[-1]) in r and "does not read column" in r for r in found.reasons)
    assert found.figures["contract"] and "harm" not in found.figures


def test_without_matured_days_nothing_passes(ads: WorkflowHarness, made: Versions) -> None:
    found = judge(ads, made, made.fresh, made.champion, day=ads.days[3])
    assert not found.passed and "no matured rows are held out" in found.reasons[0]


def test_the_held_out_days_and_the_randomised_ones_before_them(ads: WorkflowHarness) -> None:
    rows = point_in_time.ordered(point_in_time.training_set(ads.workflow, ads.lake, ads.last), "day")
    held = candidate_evaluation.held_out(loose(ads, value_days=10).workflow, ads.lake, ads.last, rows)
    judged = set(held.rows["day"].to_pylist())
    # what the last day's budgets came to is known a day later
    assert judged == {ads.last - timedelta(days=n) for n in range(1, 7)} and min(judged) > held.split
    assert max(held.early["day"].to_pylist()) < held.split
    assert set(held.decided["day"].to_pylist()) == {ads.last - timedelta(days=n) for n in range(1, 10)}


def test_tickets_are_judged_by_the_order_of_their_queue(queue: WorkflowHarness, empty_registry: Registry) -> None:
    soon = loose(queue, maturity_days=1, holdout_days=4, slice_min_rows=30, margin=1.0)
    version = register(soon, empty_registry, soon.last - timedelta(days=6))
    found = candidate_evaluation.judge(soon.workflow, soon.lake, empty_registry, version, soon.last, against=version)
    assert found.figures["against"] == "rule" and found.figures["groups"], found.reasons
    value = found.figures["policy_value"][evaluate.HELD_OUT]
    assert isinstance(value, dict) and 0 < value["mine"] <= 1 and "misses" in value["of"]


def test_who_is_champion_is_what_the_ledger_says(ads: WorkflowHarness, made: Versions, tmp_path: Path) -> None:
    promote(made.registry, made.poisoned)  # an alias that somebody moved
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=lambda: ads.morning(ads.last)) as book:
        first = candidate_evaluation.champion_of(ads.workflow, made.registry, book, ads.last)
        assert first is not None and first.number == made.poisoned.number, "the ledger knows nobody yet"
        book.promotion(ads.workflow.name, made.champion.number, "promoted", "run 1", {})
        found = candidate_evaluation.champion_of(ads.workflow, made.registry, book, ads.last)
        assert found is not None and found.number == made.champion.number


def test_a_backfill_is_not_compared_with_what_was_learned_after_it(
    ads: WorkflowHarness, empty_registry: Registry, tmp_path: Path
) -> None:
    files = ads.fit(ads.last).files()
    old, new = (ads.register(empty_registry, ads.last - timedelta(days=n), files=files) for n in (5, 0))
    day = ads.last - timedelta(days=3)
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=lambda: ads.morning(ads.last)) as book:
        for one in (old, new):
            book.promotion(ads.workflow.name, one.number, "promoted", "run 1", {})
        found = candidate_evaluation.champion_of(ads.workflow, empty_registry, book, day)
        assert found is not None and found.number == old.number
        assert (
            candidate_evaluation.champion_of(ads.workflow, empty_registry, book, old.trained_day - timedelta(days=1))
            is None
        )
        champion = candidate_evaluation.champion_of(ads.workflow, empty_registry, book, ads.last)
        assert champion is not None and champion.number == new.number


# --- retrainings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Desk:
    """A workflow with maturing labels, whose champion is younger than the held-out days, and what a retraining needs."""

    bench: WorkflowHarness
    registry: Registry
    ledger: Ledger
    champion: Version
    tmp: Path

    def retrain(self, **changed: Any) -> Version:
        """What the stage does for the last day; ``changed``: fields of the model section."""
        import dagster as dg

        from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource
        from assets.training import build_model, build_training_set

        workflow = self.bench.workflow
        workflow = workflow.model_copy(update={"model": workflow.model.model_copy(update=changed)})
        done = dg.materialize(
            [build_training_set(workflow), build_model(workflow)],
            partition_key=self.bench.last.isoformat(),
            resources={
                "lake": LakeResource(root=str(self.bench.root / "lake")),
                "registry": RegistryResource(ui="", uri=self.registry.uri, artifacts=self.registry.artifacts),
                "ledger": LedgerResource(url=f"sqlite:///{self.tmp / 'ledger.db'}"),
                "clock": ClockResource(fixed=self.bench.morning(self.bench.last).isoformat()),
            },
        )
        assert done.success
        return self.registry.versions(workflow.name)[-1]

    def last(self) -> Any:
        return self.ledger.promotions(self.bench.workflow.name)[-1]

    def tags(self, version: Version) -> dict[str, str]:
        return dict(self.registry.client.get_model_version(version.name, str(version.number)).tags)


@pytest.fixture
def desk(
    ads: WorkflowHarness, empty_registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SIGNALBOX_LEDGER_KEY", KEY.decode())
    bench = loose(
        ads.copy(tmp_path / "bench"), holdout_days=4, maturity_days=5, min_rows=100, margin=0.05, calibration=None,
        slice_margin=1.0,
    )  # fmt: skip
    day = bench.last - timedelta(days=4)
    champion = empty_registry.register(
        bench.workflow.name, fitted(bench, day).files(), trained_day=day, passed=True,
        params={"recipe": json.dumps(scoring.learner_spec(bench.workflow))}, metrics={}, tags={}, plots={}, card="card",
        seed=1,
    )  # fmt: skip
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=lambda: bench.morning(bench.last)) as book:
        book.promotion(bench.workflow.name, champion.number, "promoted", "run 1", {"digest": champion.digest})
        promote(empty_registry, champion)
        yield Desk(bench, empty_registry, book, champion, tmp_path)


def fitted(bench: WorkflowHarness, day: date) -> Any:
    """As a retraining fits: with its number of threads."""
    rows = point_in_time.training_set(bench.workflow, bench.lake, day)
    spec, how = scoring.learner_spec(bench.workflow), {"seed": scoring.SEED, "device": "cpu"}
    return catalog.learner("response").fit(rows, spec, threads=candidate_evaluation.THREADS, **how)


def test_a_retraining_by_the_champions_own_recipe_is_measured_by_twins_of_both_ages(desk: Desk) -> None:
    made, day = desk.retrain(), desk.bench.last
    assert made.passed
    told = desk.last()
    assert told.version == made.number and told.action == "shadow"
    figures = told.evidence["figures"]
    assert figures["harm"]["point"] != 0.0 and figures["harm"]["low"] < figures["harm"]["high"]
    known = day - timedelta(days=4 + 9)  # as long before the held-out days as it is older than the candidate
    assert f"known by {known}, stands in for it" in told.evidence["compared"]
    assert 0 < figures["disagreement"]["ratio"] < 0.5
    tags = desk.tags(made)
    assert tags["signalbox.gate"] == "passed" and tags["signalbox.gate_disagreement"].endswith("times the twins'")
    assert (
        "disagreement on the newest rows"
        in desk.registry.client.get_model_version(made.name, str(made.number)).description
    )


def test_a_retraining_by_a_worse_recipe_is_refused(desk: Desk) -> None:
    made = desk.retrain(**OVERFITTED)
    assert not made.passed and desk.last().action == "refused"
    assert desk.last().evidence["figures"]["harm"]["point"] > 0.05
    assert desk.tags(made)["signalbox.gate"] == "refused"


def test_a_retraining_that_makes_the_champion_again_is_refused(desk: Desk) -> None:
    again = replace(desk, bench=replace(desk.bench, days=desk.bench.days[:-4]))
    made = again.retrain()
    assert made.digest == desk.champion.digest and not made.passed
    assert desk.last().action == "refused" and "are the same model (version 1)" in desk.last().evidence["verdict"][0]


def test_spoilt_newest_labels_hold_a_retraining_until_a_person_asks_for_it(desk: Desk) -> None:
    # two dozen lines and three weeks: twins lie far apart, and sound labels read 0.2
    desk = replace(desk, bench=loose(desk.bench, disagreement=1.5))
    bench = desk.bench
    spoil(bench, since=bench.last - timedelta(days=5))
    made = desk.retrain()
    told = desk.last()
    assert not made.passed and (told.version, told.action) == (made.number, "held")
    assert told.evidence["figures"]["disagreement"]["ratio"] > 1.5
    assert any("it is held for a person" in r for r in told.evidence["verdict"])
    assert desk.tags(made)["signalbox.gate"] == "held" and "signalbox.gate_held" in desk.tags(made)
    live = state.live(desk.ledger, bench.workflow)
    assert live["champion"] == desk.champion.number and live["challenger"] is None
    desk.registry.client.set_registered_model_alias(made.name, "champion", str(made.number))
    (answer,) = promotion.reconcile(bench.workflow, desk.registry, desk.ledger, bench.lake, bench.morning(bench.last))
    assert answer.answer == "recorded" and answer.reason.startswith(promotion.WAITED), answer
    assert state.live(desk.ledger, bench.workflow)["champion"] == made.number
    assert desk.tags(made)["signalbox.gate"] == "passed"


def spoil(bench: WorkflowHarness, since: date) -> None:
    """Upstream says twenty times of what was earned from a day on."""
    table = bench.workflow.table("outcomes")
    rows = bench.lake.read(table)
    wrong = pc.if_else(pc.greater(rows["for_day"], pa.scalar(since)), pc.multiply(rows["value"], 20.0), rows["value"])
    rows = rows.set_column(rows.schema.get_field_index("value"), "value", wrong)
    bench.lake.replace_days(table, rows, sorted(set(rows["day"].to_pylist())))


def test_what_the_champion_scored_live_stands_in_the_verdict(desk: Desk) -> None:
    bench = desk.bench
    days = [d for d in bench.days if d > desk.champion.trained_day]
    for day in days:
        bench.decide(desk.registry, day)
    found = candidate_evaluation.live(bench.workflow, bench.lake, desk.champion, bench.last)["live"]
    rows = labels.scored(bench.workflow, bench.lake, bench.last)
    known = rows.filter(~pc.is_nan(pc.field("actual")))
    lost = pc.mean(pc.abs(pc.subtract(known["predicted"], known["actual"]))).as_py()
    assert found["value"] == pytest.approx(lost) and found["rows"] == known.num_rows > 0
    assert (
        found["days"] == [str(days[0]), str(max(known["day"].to_pylist()))] and found["version"] == desk.champion.number
    )
    assert candidate_evaluation.live(bench.workflow, bench.lake, None, bench.last) == {}
    assert candidate_evaluation.live(bench.workflow, bench.lake, replace(desk.champion, number=9), bench.last) == {}
    text = gate.live_sentence(found)
    assert f"live, version {desk.champion.number}'s mae was" in text and "at the budgets that stood" in text


def test_with_too_little_history_for_a_twin_the_champion_is_compared_as_it_is_and_that_is_said(desk: Desk) -> None:
    young = loose(desk.bench, min_rows=5000)
    split = candidate_evaluation.twin_day(young.workflow, young.last)
    champion, note = candidate_evaluation.opponent(young.workflow, young.lake, desk.registry, desk.champion, split)
    assert champion is not None and champion.recipe is None and not champion.clean and note == ""
    assert "rows were known by" in champion.why and "5000 are needed (training.min_rows)" in champion.why
    # once the champion is as old as the held-out days it needs none
    later = candidate_evaluation.twin_day(young.workflow, desk.champion.trained_day + timedelta(days=9))
    champion, _ = candidate_evaluation.opponent(young.workflow, young.lake, desk.registry, desk.champion, later)
    assert champion is not None and champion.clean
