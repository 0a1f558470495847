"""A champion that does worse than the rule: the rule decides, people are told, a training is asked for, and it can be taken back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from assets import performance as stage
from assets.resources import ClockResource, LedgerResource, resources
from data_checks import performance as figures
from delivery.ledger import Ledger
from models.registry import Registry
from pipeline import dispatch
from pipeline.decisions import decide, recomputation, replay, scoring
from pipeline.lifecycle import promotion, retraining, rule_override
from pipeline.monitoring import labels
from pipeline.workflow import Retraining
from tests.conftest import WorkflowHarness
from tests.support.ledgers import KEY
from tests.support.retraining_walk import Walk

BEHIND = {"metric": "wape", "value": 0.821, "baseline": 0.732, "worse": 0.12, "worse_low": 0.05, "n": 300, "kind": "rule",
          "low": 0.8, "high": 0.84, "first": date(2026, 3, 10), "last": date(2026, 3, 16), "version": 2,
          "text": "wape 0.821 vs 0.732 of the rule [0.77, 0.87]"}  # fmt: skip


@pytest.fixture
def small(ads: WorkflowHarness, tmp_path: Path) -> WorkflowHarness:
    """``ad_budget``, whose two dozen lines are enough to be judged by."""
    copy = ads.copy(tmp_path / "small")
    retrain = copy.workflow.retraining.model_copy(update={"min_rows": 20})
    return replace(copy, workflow=copy.workflow.model_copy(update={"retraining": retrain}))


@pytest.fixture
def moment(small: WorkflowHarness) -> list[datetime]:
    return [small.morning(small.last)]


@pytest.fixture
def book(tmp_path: Path, small: WorkflowHarness, registry: Registry, moment: list[datetime]) -> Iterator[Ledger]:
    """A ledger that knows both versions; 2 is champion."""
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=lambda: moment[0]) as opened:
        for number in (1, 2):
            digest = registry.by_number("ad_budget", number).digest
            opened.promotion("ad_budget", number, "promoted", "run", {"digest": digest})
        yield opened


def score(bench: WorkflowHarness, registry: Registry, book: Ledger, **more: Any) -> scoring.Scored:
    now = bench.morning(bench.last, 5)
    return scoring.score_day(bench.workflow, bench.lake, registry, bench.last, now=now, ledger=book, **more)


def test_the_day_of_a_version_that_does_worse_is_the_rule_s_until_another_is_champion(
    small: WorkflowHarness, registry: Registry, book: Ledger, moment: list[datetime]
) -> None:
    assert score(small, registry, book).step == "champion"
    assert rule_override.note(book, "ad_budget", small.last, BEHIND)
    assert not rule_override.note(book, "ad_budget", small.last, BEHIND), "once"
    scored = score(small, registry, book)
    assert scored.step == "rule" and scored.model is None and scored.table.num_rows
    assert scored.reasons == ("version 2 does worse than the rule: wape 0.821 vs 0.732 of the rule [0.77, 0.87]",)
    moment[0] += timedelta(minutes=5)
    book.promotion("ad_budget", 1, "promoted", "ann")
    again = score(small, registry, book)
    assert again.step == "champion" and again.model is not None and again.model.number == 1
    # an heir by itself changes nothing of what was found of it
    book.promotion("ad_budget", 2, "promoted", "signalbox", {"heir of": 1})
    assert score(small, registry, book).step == "rule"


def test_a_person_takes_it_back_and_it_is_not_done_again(
    small: WorkflowHarness, registry: Registry, book: Ledger, moment: list[datetime]
) -> None:
    rule_override.note(book, "ad_budget", small.last, BEHIND)
    moment[0] += timedelta(minutes=5)
    promotion.lift("ad_budget", registry, book, 2, actor="ann", reason="the outcomes were wrong")
    assert score(small, registry, book).step == "champion"
    assert not rule_override.note(book, "ad_budget", small.last, BEHIND)
    with pytest.raises(promotion.NotBlocked):
        promotion.lift("ad_budget", registry, book, 1, actor="ann", reason="never")


def test_what_was_found_later_changes_nothing_of_an_earlier_hour(
    small: WorkflowHarness, registry: Registry, book: Ledger, moment: list[datetime]
) -> None:
    moment[0] = small.morning(small.last, 12)
    rule_override.note(book, "ad_budget", small.last, BEHIND)
    assert score(small, registry, book).step == "champion"
    # a backfill sees what was known by the day's deadline
    late = small.morning(small.last) + timedelta(days=9)
    made = scoring.score_day(small.workflow, small.lake, registry, small.last, now=late, ledger=book)
    assert made.step == "champion"


def test_a_challenger_is_tried_beside_the_rule(small: WorkflowHarness, registry: Registry, book: Ledger) -> None:
    rule_override.note(book, "ad_budget", small.last, BEHIND)
    assert score(small, registry, book).beside is None
    book.promotion("ad_budget", 1, "shadow", "run", {"digest": registry.by_number("ad_budget", 1).digest})
    beside = score(small, registry, book).beside
    assert beside is not None and beside.version.number == 1 and beside.table is not None


def test_a_day_that_the_rule_took_is_replayed_and_recomputed_to_the_bit(
    small: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    rule_override.note(book, "ad_budget", small.last, BEHIND)
    scoring.write_scores(small.workflow, small.lake, small.last, score(small, registry, book))
    batch = decide.decide_day(small.workflow, small.lake, small.last)
    now = small.morning(small.last, 5)
    row = dispatch.record(small.workflow, book, small.last, batch, decided_at=now, run_id="test")
    batch = replace(batch, batch_id=row.batch_id)
    decide.write_batch(small.workflow, small.lake, small.last, batch, decided_at=now, run_id="test")
    assert batch.step == "rule" and "does worse than the rule" in batch.reasons[0]
    decided = small.decided(small.last)
    changed = next(d for d in decided if d["changed"])
    assert replay.replay("ad_budget", small.lake, registry, changed["decision_id"]).equal
    compared = recomputation.compare(small.workflow, small.lake, registry, book, row)
    assert compared.equal, compared.says
    # a new champion since then is a cause, and named
    book.promotion("ad_budget", 1, "promoted", "ann")
    later = recomputation.compare(small.workflow, small.lake, registry, book, row)
    assert not later.unexplained and (later.equal or "step rule then, champion now" in later.says)


def test_the_rule_of_a_day_is_what_it_would_have_been_then(
    queue: WorkflowHarness, registry: Registry, tmp_path: Path
) -> None:
    bench = queue.copy(tmp_path / "queue")
    training = bench.workflow.training.model_copy(update={"maturity_days": 4})
    workflow = bench.workflow.model_copy(update={"training": training})
    bench = replace(bench, workflow=workflow)
    scored_on = bench.days[-6:]
    for day in scored_on:
        made = scoring.score_day(workflow, bench.lake, registry, day, now=bench.morning(day))
        version = registry.by_number("ticket_priority", 1)
        made = replace(made, model=version)  # the first of these days have no version of their own
        scoring.write_scores(workflow, bench.lake, day, made)
    day = bench.last
    added = labels.score_by_rule(workflow, bench.lake, day)
    assert added == [d for d in scored_on if d <= day - timedelta(days=4)] and added
    assert labels.score_by_rule(workflow, bench.lake, day) == [], "once"
    then = added[0]
    rule = scoring.fit_rule(workflow, bench.lake, then, None, None)
    rows = bench.lake.read(workflow.table("features"), days=[then]).filter(pc.field("moment") == "intake")
    known = bench.lake.read(workflow.table("rule_scores"), days=[then])
    expected = dict(zip(rows["entity_id"].to_pylist(), rule.p_miss(rows), strict=True))
    assert dict(zip(known["entity_id"].to_pylist(), known["p_miss"].to_pylist(), strict=True)) == expected
    rows = labels.scored(workflow, bench.lake, day)
    ruled = rows.filter(pc.is_in(rows["day"], value_set=pa.array(added, pa.date32())))
    assert np.isfinite(ruled[figures.RULE].to_numpy()).all() and ruled.num_rows
    assert not np.isfinite(rows.filter(pc.field("day") > added[-1])[figures.RULE].to_numpy()).any()


def test_outcomes_that_show_it_put_the_champion_behind_and_ask_for_a_training(
    small: WorkflowHarness, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the stage: the champion's scores are three times too high on the days whose outcomes are known."""
    for day in small.days[-8:]:
        made = scoring.score_day(small.workflow, small.lake, registry, day, now=small.morning(day))
        high = made.table
        for name in ("values",):
            flat = pa.array(3 * np.asarray(pc.list_flatten(high[name])))
            lists = pa.ListArray.from_arrays(high[name].combine_chunks().offsets, flat)
            high = high.set_column(high.schema.get_field_index(name), name, lists)
        champion = registry.by_number("ad_budget", 2)
        scoring.write_scores(
            small.workflow, small.lake, day, replace(made, table=high, model=champion, step="champion")
        )
    monkeypatch.setenv("SIGNALBOX_HOME", str(small.root))
    monkeypatch.setenv("SIGNALBOX_MLFLOW_URI", registry.uri)
    monkeypatch.setenv("SIGNALBOX_LEDGER_KEY", KEY.decode())
    given = {k: v for k, v in resources(None).items() if k in ("lake", "ledger", "registry", "reports")}
    given["clock"] = ClockResource(fixed=small.morning(small.last).isoformat())
    clock = given["clock"].now
    with given["ledger"].open(clock) as book:
        for number in (1, 2):
            digest = registry.by_number("ad_budget", number).digest
            book.promotion("ad_budget", number, "promoted", "run", {"digest": digest})
    result = dg.materialize([stage.build(small.workflow)], partition_key=str(small.last), resources=given)
    (check,) = [c for c in result.get_asset_check_evaluations() if c.check_name == "performance"]
    assert not check.passed and "of the rule [" in str(check.description)
    rows = small.lake.read("ad_budget/performance", days=[small.last]).to_pylist()
    asked = retraining.evidence(small.workflow.retraining, "wape", rows, None)
    assert asked[0].cause == "rule" and "vs" in asked[0].text
    with given["ledger"].open(clock) as book:
        (event,) = book.events(rule_override.KIND, "ad_budget")
        assert event.body["version"] == 2 and event.body["figures"]["worse_low"] > 0
        made = scoring.score_day(
            small.workflow, small.lake, registry, small.last, now=small.morning(small.last, 5), ledger=book
        )
    assert made.step == "rule"


def test_the_check_warns_for_as_long_as_the_rule_decides_in_the_champions_place(
    small: WorkflowHarness,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the figures of the window say: the days that the version scored have left it."""
    first, name = small.days[-6], "ad_budget"
    url, moment = f"sqlite:///{tmp_path / 'other.db'}", [small.morning(small.days[-9])]
    with Ledger.open(url, key=KEY, clock=lambda: moment[0]) as book:
        book.promotion(name, 2, "promoted", "run", {"digest": registry.by_number(name, 2).digest})
        moment[0] = small.morning(first, 6)
        rule_override.note(book, name, first, BEHIND)
        moment[0] = small.morning(small.days[-2], 6)
        promotion.lift(name, registry, book, 2, actor="ann", reason="the outcomes were wrong")
    monkeypatch.setenv("SIGNALBOX_HOME", str(small.root))
    monkeypatch.setenv("SIGNALBOX_MLFLOW_URI", registry.uri)
    monkeypatch.setenv("SIGNALBOX_LEDGER_KEY", KEY.decode())
    given = {k: v for k, v in resources(None).items() if k in ("lake", "registry", "reports")}
    given["ledger"] = LedgerResource(url=url)
    given["clock"] = ClockResource(fixed=small.morning(small.last).isoformat())
    asset, said = stage.build(small.workflow), {}
    for day in (first, *small.days[-5:]):
        result = dg.materialize([asset], partition_key=str(day), resources=given)
        (check,) = [c for c in result.get_asset_check_evaluations() if c.check_name == "performance"]
        said[day] = (check.passed, str(check.description), check.severity)
    held = {day: passed for day, (passed, *_) in said.items()}
    assert held == {d: d in (first, small.last) for d in (first, *small.days[-5:])}, "each day by its own cut-off"
    _, text, severity = said[small.days[-4]]
    assert "version 2 does worse than the rule: wape 0.821 vs 0.732" in text and severity == dg.AssetCheckSeverity.WARN


def test_evidence_beside_the_rule_is_the_strongest() -> None:
    day = date(2026, 3, 20)
    fell = {**BEHIND, "kind": "realised", "baseline_is": "reference", "worse_low": 0.5}
    found = retraining.evidence(Retraining(), "wape", [fell, {**BEHIND, "baseline_is": "rule"}], None)
    assert [e.cause for e in found] == ["rule", "realised"]
    walk = Walk("ad_budget", Retraining(), "wape")
    rows = pa.Table.from_pylist([{**BEHIND, "day": day, "baseline_is": "rule", "known": 1.0, "mature": True}], schema=figures.SCHEMA)  # fmt: skip
    asked = walk.step(day, rows, None)
    assert asked is not None and asked.cause == "rule" and "worse than the rule" in asked.text
    assert retraining.Trigger.read(asked.body()) == asked
