"""What a day is now, and a day that is a fact recomputed: equal, or which decisions differ and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from delivery.ledger import BatchRow, Ledger
from models.registry import Registry
from pipeline import dispatch, provenance
from pipeline.decisions import decide, recomputation, scoring
from tests.conftest import WorkflowHarness
from tests.support.aliases import step_back
from tests.support.fakes import Clock, FakeSystem
from tests.support.ledgers import new_batch

DAY = date(2026, 4, 10)
MORNING = datetime(2026, 4, 11, 5)
OVER = datetime(2026, 4, 12)


def row(sequence: int = 1, delivery: str = "NONE", backfill: bool = False, **counts: int) -> BatchRow:
    given = vars(new_batch(f"b{sequence}", record={"backfill": True} if backfill else {}))
    return BatchRow(
        **given, sequence=sequence, root="r", rows=4, changed=4, recorded_at=MORNING, system=None, delivery=delivery,  # type: ignore[arg-type]
        superseded_by=None, retired=False, counts=counts or {"PENDING": 4},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("batches", "now", "state"),
    [
        ([], MORNING, "fresh"),
        ([], OVER - timedelta(seconds=1), "fresh"),
        ([], OVER, "backfill"),
        ([row()], MORNING, "decided"),
        ([row(SKIPPED=4, delivery="COMPLETE")], MORNING, "decided"),
        ([row(REJECTED=2, CONFLICT=2, delivery="COMPLETE")], MORNING, "decided"),
        ([row(delivery="OPEN")], MORNING, "sent"),
        ([row(ACKED=1, PENDING=3, delivery="OPEN")], MORNING, "sent"),
        ([row(UNKNOWN=1, REJECTED=3, delivery="COMPLETE")], MORNING, "sent"),
        ([row(OVERWRITTEN=4, delivery="COMPLETE"), row(2)], MORNING, "sent"),
        ([row(ACKED=4, delivery="COMPLETE")], OVER, "over"),
        ([row()], OVER, "over"),
        ([row(backfill=True)], OVER, "over"),
    ],
)
def test_what_a_day_is_follows_from_its_batches_and_the_hour(
    batches: list[BatchRow], now: datetime, state: recomputation.DayState
) -> None:
    assert recomputation.state_of(DAY, batches, now) == state


@pytest.mark.parametrize(
    ("state", "unasked", "again"),
    [
        ("fresh", True, True),
        ("backfill", True, True),
        ("decided", True, True),
        ("sent", False, True),
        ("over", False, False),
    ],
)
def test_a_fact_is_decided_anew_only_while_its_effect_lasts_and_only_when_asked(
    state: recomputation.DayState, unasked: bool, again: bool
) -> None:
    assert recomputation.decides(state, again=False) == unasked and recomputation.decides(state, again=again) == again


@pytest.fixture
def book(bench: WorkflowHarness, tmp_path: Path) -> Iterator[Ledger]:
    clock = lambda: bench.morning(bench.last, 5)  # noqa: E731
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.db", key=b"k" * 32, clock=clock) as opened:
        yield opened


def recorded(bench: WorkflowHarness, registry: Registry, book: Ledger, now: datetime | None = None) -> BatchRow:
    now = now or bench.morning(bench.last)
    scored = scoring.score_day(bench.workflow, bench.lake, registry, bench.last, now=now, ledger=book)
    scoring.write_scores(bench.workflow, bench.lake, bench.last, scored)
    batch = decide.decide_day(bench.workflow, bench.lake, bench.last)
    made = dispatch.record(bench.workflow, book, bench.last, batch, decided_at=now, run_id="r")
    decide.write_batch(bench.workflow, bench.lake, bench.last, batch, decided_at=now, run_id="r")
    return made


def compared(bench: WorkflowHarness, registry: Registry, book: Ledger, made: BatchRow) -> recomputation.Compared:
    before = {t: bench.lake.version(bench.workflow.table(t)) for t in TABLES}
    found = recomputation.compare(bench.workflow, bench.lake, registry, book, made)
    after = {t: bench.lake.version(bench.workflow.table(t)) for t in TABLES}
    assert after == before, "something was written"
    return found


TABLES = ("scores", "scoring", "shadow_scores", "standing", "arms", "specs", "decisions", "batches", "shadow")


@pytest.mark.parametrize("hour", [4, 7, 60])
def test_a_day_recomputed_from_the_same_is_the_same_whatever_its_hour(
    bench: WorkflowHarness, registry: Registry, book: Ledger, hour: int
) -> None:
    """On time, after the deadline (by the rule), and as a backfill."""
    now = bench.morning(bench.last, 0) + timedelta(hours=hour)
    made = recorded(bench, registry, book, now)
    bench.build([bench.last])  # the same content under another version
    found = compared(bench, registry, book, made)
    assert found.equal and not found.causes and found.rows == made.rows, found.says
    assert f"all {made.rows} decisions are the same" in found.says


def restate(bench: WorkflowHarness, entity: str, column: str) -> None:
    """Other figures of one entity in the features of the last day."""
    table = bench.workflow.table("features")
    rows = bench.lake.read(table, days=[bench.last])
    factor = 3.0 if bench.workflow.name == "ad_budget" else -3.0  # a due time that is over, or is not over any more
    moved = pc.if_else(pc.equal(rows["entity_id"], entity), pc.multiply(rows[column], factor), rows[column])
    bench.lake.replace_days(table, rows.set_column(rows.schema.get_field_index(column), column, moved), [bench.last])


def numeric(bench: WorkflowHarness) -> str:
    schema = bench.lake.read(bench.workflow.table("features"), days=[bench.last]).schema
    wanted = "revenue_7" if bench.workflow.name == "ad_budget" else "hours_to_due"
    names = [n for n in bench.workflow.features.numeric if pa.types.is_floating(schema.field(n).type)]
    return wanted if wanted in names else names[0]


def test_restated_features_are_named_as_the_cause_of_what_differs(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    made = recorded(bench, registry, book)
    changed = [d for d in bench.decided(bench.last) if d["changed"]]
    for decided in changed[: len(changed) // 2]:
        restate(bench, decided["entity_id"], numeric(bench))
    found = compared(bench, registry, book, made)
    assert 0 < found.differing <= found.rows and not found.unexplained, found.says
    assert "its features were restated" in found.causes
    assert all("features" in r["why"] and r["differs_in"] for r in found.first.to_pylist())
    own = [r for r in found.first.to_pylist() if "its features were restated" in r["why"]]
    assert own and all(numeric(bench) in r["why"] for r in own), "the columns are named"
    assert "(s" not in found.says and "differ" in found.says


def test_another_model_spec_and_code_are_named(
    bench: WorkflowHarness, registry: Registry, book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recorded(bench, registry, book)
    step_back(registry, bench.workflow.name, 2, "for the test")
    other = replace(
        bench,
        workflow=bench.workflow.model_copy(
            update={"arms": bench.workflow.arms.model_copy(update={"epoch": bench.workflow.arms.epoch + 1})}
        ),
    )
    monkeypatch.setattr(provenance, "digest", lambda workflow: "other code")
    found = compared(other, registry, book, made)
    said = "; ".join(found.causes)
    assert found.differing and not found.unexplained
    assert (
        "model version 2 then, 1 now" in said
        and "workflow.yaml" in said
        and "the code or the SQL is another one" in said
    )


def test_a_rule_that_is_fitted_to_other_outcomes_says_so(
    bench: WorkflowHarness, empty_registry: Registry, book: Ledger
) -> None:
    made = recorded(bench, empty_registry, book)
    assert made.step == "rule"
    table = bench.workflow.table("outcomes")
    days = list(bench.days[:-4])
    rows = bench.lake.read(table, days=days)
    bench.lake.replace_days(table, rows.slice(0, rows.num_rows // 3), days)
    found = compared(bench, empty_registry, book, made)
    if bench.workflow.name == "ad_budget":
        assert found.equal, "that rule is fitted to nothing"
    else:
        assert found.differing and not found.unexplained and "outcomes" in "; ".join(found.causes), found.says


def test_a_difference_without_a_cause_is_said_to_be_one(
    bench: WorkflowHarness, registry: Registry, book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, honest = recorded(bench, registry, book), decide.decide

    def fickle(*given: Any) -> Any:
        decisions, certificates = honest(*given)
        gains = pc.add(decisions["expected_gain"], 1e-9)
        return decisions.set_column(
            decisions.schema.get_field_index("expected_gain"), "expected_gain", gains
        ), certificates

    monkeypatch.setattr(decide, "decide", fickle)
    found = compared(bench, registry, book, made)
    assert found.unexplained == found.differing > 0 and not found.causes
    assert recomputation.NO_CAUSE in found.says and found.first["why"][0].as_py() == recomputation.NO_CAUSE
    assert found.first["differs_in"][0].as_py() == "expected_gain"


def test_what_cannot_be_recomputed_says_why(bench: WorkflowHarness, registry: Registry, book: Ledger) -> None:
    made = recorded(bench, registry, book)
    table = bench.workflow.table("features")
    bench.lake.replace_days(table, bench.lake.read(table, days=[bench.last]).slice(0, 0), [bench.last])
    found = compared(bench, registry, book, made)
    assert not found.equal and not found.unexplained and f"no features of {bench.last}" in found.says
    retired = recomputation.compare(bench.workflow, bench.lake, registry, book, replace(made, retired=True))
    assert "retention" in retired.says and not retired.equal


def test_forgotten_names_are_left_out_of_the_comparison(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    made = recorded(bench, registry, book)
    book.forget(bench.decided(bench.last)[0]["entity_id"])
    found = compared(bench, registry, book, made)
    assert found.equal, found.says


def test_the_batch_that_acted_is_compared_and_not_a_newer_one(
    bench: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    made = recorded(bench, registry, book)
    values = {d["entity_id"]: d["before"] for d in book.decisions(made.batch_id).to_pylist()}
    clock = Clock(bench.morning(bench.last, 5))
    system = FakeSystem(values, clock=clock)
    status = replace(made, status="READY")
    if made.status != "READY":
        pytest.skip("a held batch is not sent")
    dispatch.deliver(bench.workflow, book, system, status, run_id="r", clock=clock, sleep=clock.sleep)
    step_back(registry, bench.workflow.name, 2, "to decide otherwise")
    newer = recorded(bench, registry, book)
    found = recomputation.today(bench.workflow, book, bench.last, bench.morning(bench.last, 6))
    assert newer.batch_id != made.batch_id and found.state == "sent" and not found.decides
    assert found.recorded is not None and found.recorded.batch_id == made.batch_id
    assert "--again" in found.says and made.batch_id in found.says
    asked = recomputation.today(bench.workflow, book, bench.last, bench.morning(bench.last, 6), again=True)
    assert asked.decides and asked.asked
