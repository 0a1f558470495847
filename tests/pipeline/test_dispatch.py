"""From a decided batch to the ledger, downstream, and to what became of it."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from assets import delivery as stage
from delivery.abort_rules import Finding
from delivery.connectors.base import Misconfigured, Unavailable
from delivery.connectors.sql_table import SqlTableSettings
from delivery.ledger import BatchRow, Ledger
from delivery.rollback import RollbackError
from models.registry import Registry
from pipeline import dispatch, point_in_time
from pipeline.decisions import replay, tables
from pipeline.workflow import Workflow
from tests.conftest import WorkflowHarness
from tests.support.aliases import step_back
from tests.support.fakes import Clock, FakeSystem


@pytest.fixture
def book(tmp_path: Path, bench: WorkflowHarness) -> Any:
    with Ledger.open(
        f"sqlite:///{tmp_path / 'ledger.db'}", key=b"k" * 32, clock=lambda: bench.morning(bench.last, 5)
    ) as ledger:
        yield ledger


def recorded(
    bench: WorkflowHarness, registry: Registry, book: Ledger, day: Any = None, workflow: Workflow | None = None
) -> BatchRow:
    day = day or bench.last
    said = replace(bench, workflow=workflow) if workflow else bench
    batch = said.decide(registry, day)
    return dispatch.record(said.workflow, book, day, batch, decided_at=bench.morning(day), run_id="run-1")


def downstream(book: Ledger, row: BatchRow, clock: Clock | None = None) -> FakeSystem:
    decided = book.decisions(row.batch_id).to_pylist()
    return FakeSystem({d["entity_id"]: d["before"] for d in decided}, clock=clock)


def send(bench: WorkflowHarness, book: Ledger, row: BatchRow, system: FakeSystem, hour: int = 5) -> dispatch.Delivered:
    system.clock = Clock(bench.morning(row.day, hour))
    return dispatch.deliver(
        bench.workflow, book, system, row, run_id="run-2", clock=system.clock, sleep=system.clock.sleep
    )


def test_a_decision_is_made_again_from_the_ledgers_record_alone(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    row = recorded(bench, registry, book)
    for decided in random.Random(1).sample(bench.decided(bench.last), 3):
        found = book.decision(decided["decision_id"])
        found |= {"day": row.day} | dict(row.record)
        again = replay.replay_row(found, bench.lake, registry)
        assert again.equal, again.as_dict()
        assert {c: found[c] for c in tables.DECISIONS.names} == {c: decided[c] for c in tables.DECISIONS.names}


def test_the_same_batch_is_recorded_once_and_a_day_decided_again_counts_as_decided_last(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    first = recorded(bench, registry, book)
    assert recorded(bench, registry, book).sequence == first.sequence
    step_back(registry, bench.workflow.name, 2, "to decide otherwise")
    second = recorded(bench, registry, book)
    assert second.batch_id != first.batch_id
    assert dispatch.batch_of(book, bench.workflow.name, bench.last).batch_id == second.batch_id
    assert len(book.batches(bench.workflow.name)) == 2, "nothing is replaced in the ledger"
    with pytest.raises(dispatch.NothingToDeliver, match="materialise"):
        dispatch.batch_of(book, bench.workflow.name, bench.last + timedelta(days=1))


def test_each_arm_of_money_has_its_own_pool_and_priorities_have_none(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    row = recorded(bench, registry, book)
    decided = bench.decided(bench.last)
    if bench.workflow.name == "ticket_priority":
        assert row.pools is None
    else:
        assert row.pools == {
            arm: sum(d["before"] for d in decided if d["arm"] == arm) for arm in {d["arm"] for d in decided}
        }
    assert row.as_of == bench.workflow.cutoff_of(bench.last)


def test_a_delivered_batch_stands_downstream_and_untouched_entities_are_not_sent(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    row = recorded(bench, registry, book)
    system = downstream(book, row)
    done = send(bench, book, row, system)
    decided = bench.decided(bench.last)
    assert done.report is not None and done.report.complete and done.batch.delivery == "COMPLETE"
    assert {e: t.value for e, t in system.targets.items()} == {d["entity_id"]: d["after"] for d in decided}
    assert {a.target for a in system.applied} == {d["entity_id"] for d in decided if d["changed"]}
    assert not [d for d in decided if d["arm"] == "holdout" and d["changed"]]


def test_a_push_of_which_nothing_was_acknowledged_fails_its_check_with_a_sentence(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    row = recorded(bench, registry, book)
    system = downstream(book, row)
    for target in system.targets.values():
        target.value = 4_999_999  # somebody's, everywhere
    done = send(bench, book, row, system)
    assert done.report is not None and done.report.complete and not done.report.counts.get("ACKED")
    reconciled, _ = stage._checks(bench.workflow, bench.last, done)
    assert not reconciled.passed and "was acknowledged" in str(reconciled.description)
    other = recorded(bench, registry, book, bench.days[-2])
    well = send(bench, book, other, downstream(book, other))
    assert well.report is None or well.report.why or stage._checks(bench.workflow, other.day, well)[0].passed


def test_which_batches_may_go(bench: WorkflowHarness, registry: Registry, book: Ledger) -> None:
    row = recorded(bench, registry, book)
    morning = bench.morning(bench.last, 5)
    may_go = lambda now: [b.batch_id for b in dispatch.open_batches(book, bench.workflow, now)]  # noqa: E731
    assert may_go(morning) == [row.batch_id]
    assert may_go(datetime.combine(bench.last + timedelta(days=2), time(0))) == [], "its day is over"
    send(bench, book, row, downstream(book, row))
    assert may_go(morning) == [] and dispatch.pushes(book, row) == 1


def test_a_held_batch_is_not_sent_and_says_what_it_waits_for(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    tight = bench.workflow.model_copy(
        update={"guardrails": bench.workflow.guardrails.model_copy(update={"max_changed": 0})}
    )
    row = recorded(bench, registry, book, workflow=tight)
    assert row.status == "HELD" and dispatch.open_batches(book, bench.workflow, bench.morning(bench.last, 5)) == []
    system = downstream(book, row)
    done = send(bench, book, row, system)
    assert done.report is None and "signalbox approve" in done.said and not system.applied


def test_a_batch_whose_day_is_over_is_not_sent_unasked(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    row = recorded(bench, registry, book)
    system = downstream(book, row)
    clock = Clock(datetime.combine(bench.last + timedelta(days=2), time(0)))
    with pytest.raises(dispatch.TooLate, match="is over"):
        dispatch.deliver(bench.workflow, book, system, row, run_id="r", clock=clock, sleep=clock.sleep)
    assert not system.applied
    done = dispatch.deliver(bench.workflow, book, system, row, run_id="r", clock=clock, sleep=clock.sleep, stale=True)
    assert done.report is not None and done.report.complete


def test_a_guard_speaks_once_and_its_batch_is_condemned_until_it_is_taken_back(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    row = recorded(bench, registry, book)
    finding = Finding("max_rejected_share", 0.2, 0.5, True, "10 of 20 tried deliveries were rejected")
    for _ in range(2):
        dispatch.note_findings(book, row, [finding])
    dispatch.note_findings(book, row, [])
    assert len(book.events("guard")) == 1
    assert dispatch.condemned(book, bench.workflow) == [(row.batch_id, finding.text)]
    book.rollback_asked(row.batch_id, actor="guard", reason="r", trigger="guard", evidence=None)
    assert dispatch.condemned(book, bench.workflow), "asked for is not done"
    book.rollback_complete(row.batch_id, actor="guard", reason="r", trigger="guard", evidence=None)
    assert dispatch.condemned(book, bench.workflow) == []


def test_what_a_look_only_finding_asks_for_is_no_rollback(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    row = recorded(bench, registry, book)
    dispatch.note_findings(book, row, [Finding("max_unknown_share", 0.1, 0.5, False, "half of them are unknown")])
    assert dispatch.condemned(book, bench.workflow) == []


def test_outcomes_stand_beside_the_decisions_that_they_answer(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    *_, day, last = bench.days
    row = recorded(bench, registry, book, day)
    send(bench, book, row, downstream(book, row))
    found = dispatch.outcomes_of_decisions(bench.workflow, bench.lake, book, last).to_pylist()
    decided = {d["entity_id"]: d for d in bench.decided(day)}
    outcomes = bench.lake.read(bench.workflow.table("outcomes"), days=[last]).to_pylist()
    if bench.workflow.outcomes.join == "entity_day":
        answered = {o["entity_id"] for o in outcomes if o["for_day"] == day}
    else:
        answered = {o["entity_id"] for o in outcomes if o["known_at"].date() > day}
    assert {f["entity_id"] for f in found} == answered & decided.keys() and found
    for row_ in found:
        mine = decided[row_["entity_id"]]
        assert (row_["arm"], row_["after"], row_["decision_id"]) == (mine["arm"], mine["after"], mine["decision_id"])
        assert row_["state"] == ("ACKED" if mine["changed"] else None)
        assert row_["standing"] == mine["after"]
    assert dispatch.outcomes_of_decisions(bench.workflow, bench.lake, book, bench.days[0]).num_rows == 0


def test_what_exploring_drew_is_told_only_where_it_stands(
    ads: WorkflowHarness, registry: Registry, tmp_path: Path
) -> None:
    bench = ads.copy(tmp_path / "bench")
    with Ledger.open(f"sqlite:///{tmp_path / 'l.db'}", key=b"k" * 32, clock=lambda: bench.morning(bench.last)) as book:
        row = recorded(bench, registry, book)
        explored = {d["entity_id"]: d for d in bench.decided(bench.last) if d["arm"] == "explore"}
        moved = sorted(e for e, d in explored.items() if d["changed"])
        assert moved and not set(moved) & dispatch.randomised(book, "ad_budget", bench.last).keys(), (
            "nothing stands yet"
        )
        system = downstream(book, row)
        system.targets[moved[0]].value = 1  # a person's
        send(bench, book, row, system)
        stands = dispatch.randomised(book, "ad_budget", bench.last)
        assert moved[0] not in stands and set(moved[1:]) <= stands.keys() <= explored.keys()
        assert all(stands[e] == (explored[e]["perturbation"], explored[e]["perturbation_probability"]) for e in stands)


def test_an_arm_that_spends_over_its_pool_is_found(ads: WorkflowHarness, registry: Registry, tmp_path: Path) -> None:
    bench = ads.copy(tmp_path / "bench")
    *_, day, last = bench.days
    with Ledger.open(f"sqlite:///{tmp_path / 'l.db'}", key=b"k" * 32, clock=lambda: bench.morning(bench.last)) as book:
        row = recorded(bench, registry, book, day)
        assert not dispatch.outcomes_of_decisions(bench.workflow, bench.lake, book, last).num_rows, "nothing was sent"
        send(bench, book, row, downstream(book, row))
        outcomes = dispatch.outcomes_of_decisions(bench.workflow, bench.lake, book, last)
        assert dispatch.spend_findings(bench.workflow, book, outcomes) == {}
        twice = outcomes.set_column(outcomes.schema.get_field_index("cost"), "cost", pc.multiply(outcomes["cost"], 2.0))
        found = dispatch.spend_findings(bench.workflow, book, twice)
        assert {f.arm for f in found[row.batch_id]} == {d["arm"] for d in bench.decided(day)}
        assert all(f.rollback for f in found[row.batch_id])


def test_a_delivered_day_that_is_decided_again_and_not_sent_keeps_its_outcomes(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    *_, day, last = bench.days
    row = recorded(bench, registry, book, day)
    send(bench, book, row, downstream(book, row))
    before = dispatch.outcomes_of_decisions(bench.workflow, bench.lake, book, last)
    drawn = dispatch.randomised(book, bench.workflow.name, day)
    step_back(registry, bench.workflow.name, 2, "to decide otherwise")
    again = recorded(bench, registry, book, day)
    assert dispatch.batch_of(book, bench.workflow.name, day).batch_id == again.batch_id != row.batch_id
    assert before.num_rows and dispatch.outcomes_of_decisions(bench.workflow, bench.lake, book, last) == before
    assert dispatch.randomised(book, bench.workflow.name, day) == drawn


def test_a_days_spend_is_judged_as_a_whole_where_two_of_its_batches_acted(
    ads: WorkflowHarness, registry: Registry, tmp_path: Path
) -> None:
    bench = ads.copy(tmp_path / "bench")
    *_, day, last = bench.days
    with Ledger.open(f"sqlite:///{tmp_path / 'l.db'}", key=b"k" * 32, clock=lambda: bench.morning(bench.last)) as book:
        first = recorded(bench, registry, book, day)
        system = downstream(book, first)
        send(bench, book, first, system)
        step_back(registry, bench.workflow.name, 2, "to decide otherwise")
        second = recorded(bench, registry, book, day)
        send(bench, book, second, system, hour=7)
        outcomes = dispatch.outcomes_of_decisions(bench.workflow, bench.lake, book, last)
        half = outcomes.num_rows // 2
        names = [first.batch_id] * half + [second.batch_id] * (outcomes.num_rows - half)
        outcomes = outcomes.set_column(outcomes.schema.get_field_index("batch_id"), "batch_id", [names])
        twice = outcomes.set_column(outcomes.schema.get_field_index("cost"), "cost", pc.multiply(outcomes["cost"], 2.0))
        found = dispatch.spend_findings(bench.workflow, book, twice)
        assert list(found) == [second.batch_id], "the newest of them has set what stood in the end"
        assert {f.arm for f in found[second.batch_id]} == {d["arm"] for d in bench.decided(day)}


def test_an_address_from_the_environment_replaces_the_workflows(
    ads: WorkflowHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNALBOX_ADS_TOKEN", "marked-secret-token")
    monkeypatch.setenv("SIGNALBOX_ADS_ENDPOINT", "http://127.0.0.1:9")
    connector = dispatch.connect(ads.workflow, datetime.now)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9") as error:
        connector.read(["line-0001"])
    assert "marked-secret" not in str(error.value)
    silent = ads.workflow.model_copy(update={"delivery": None})
    with pytest.raises(dispatch.NothingToDeliver, match="no section `delivery`"):
        dispatch.connect(silent, datetime.now)


def test_an_address_from_the_environment_replaces_a_databases_url(
    ads: WorkflowHarness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The variable that holds it is another one; its password stands nowhere else."""
    table = SqlTableSettings(kind="sql_table", url_env="CRM_URL", table="lines", key="id", value="budget")
    assert ads.workflow.delivery is not None
    said = ads.workflow.delivery.model_copy(update={"connector": table, "address_env": "STAGING_URL"})
    workflow = ads.workflow.model_copy(update={"delivery": said})
    for name, url in (("CRM_URL", "production"), ("STAGING_URL", "staging")):
        monkeypatch.setenv(name, f"sqlite:///{tmp_path}/{url}.db")
        assert f"{url}.db" in dispatch.connect(workflow, datetime.now).system
    monkeypatch.setenv("STAGING_URL", "postgresql//marked-secret@host")
    with pytest.raises(Misconfigured, match="STAGING_URL holds no database URL") as error:
        dispatch.connect(workflow, datetime.now)
    assert "marked-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "says"),
    [({}, "name one of"), ({"batch": "x", "model": 1}, "given: a batch, model"), ({"model": 1}, "name the workflow")],
)
def test_a_rollback_is_asked_for_one_thing(
    bench: WorkflowHarness, book: Ledger, asked: dict[str, Any], says: str
) -> None:
    wanted: dict[str, Any] = {"batch": None, "workflow": None, "since": None, "model": None} | asked
    with pytest.raises(RollbackError, match=says):
        dispatch.selection(book, **wanted)


def test_features_do_not_see_what_delivery_wrote(bench: WorkflowHarness, registry: Registry, book: Ledger) -> None:
    before = [t for _, t in point_in_time.features(bench.workflow, bench.lake, [bench.last])]
    row = recorded(bench, registry, book)
    send(bench, book, row, downstream(book, row))
    assert [t for _, t in point_in_time.features(bench.workflow, bench.lake, [bench.last])] == before
