"""A day that has acted, through Dagster and a real downstream system: run again in every way, it stays what it was."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from assets.resources import resources
from delivery.ledger import Ledger
from models.registry import Registry
from orchestration import runner
from pipeline.lake import Lake
from tests.conftest import WorkflowHarness
from tests.support.aliases import step_back
from tests.support.offices import Account, MorningHarness, checks, environment, metadata

pytestmark = pytest.mark.system
LENIENT = {"max_total_change": None, "max_share_changed": None}
KEPT = ("scores", "scoring", "shadow", "shadow_scores", "standing", "arms", "specs", "decisions", "batches")
"""What a day that is a fact never writes."""


@pytest.fixture
def morning(
    ads: WorkflowHarness, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MorningHarness]:
    (tmp_path / "home").mkdir()
    bench = ads.copy(tmp_path / "bench")
    account = Account(tmp_path / "account", bench, "marked-token-0123456789")
    for variable, value in environment(bench, registry, tmp_path / "home", account).items():
        monkeypatch.setenv(variable, value)
    with dg.DagsterInstance.ephemeral() as instance:
        yield MorningHarness(bench, registry, account, instance)
    account.close()


def run(
    morning: MorningHarness,
    job: str,
    hour: int,
    *,
    day: date | None = None,
    first: date | None = None,
    again: bool = False,
) -> dg.ExecuteInProcessResult:
    """A run at so many hours after the end of the bench's last day."""
    last, now = day or morning.day, (morning.bench.morning(morning.day, 0) + timedelta(hours=hour)).isoformat()
    return runner.run(
        morning.saying(guardrails=LENIENT), job, first or last, last, now=now, instance=morning.instance,
        given=resources(now), again=again,
    )  # fmt: skip


def written(morning: MorningHarness) -> dict[str, str]:
    """Every file of the tables that a fact never writes, and every row of the ledger, as digests."""
    root = Path(morning.bench.lake.root, morning.workflow.name)
    found = {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for table in KEPT
        for file in sorted((root / table).rglob("*"))
        if file.is_file()
    }
    with sqlite3.connect(Path(resources()["ledger"].url or ledger_file())) as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if name not in ("leases", "sqlite_sequence", "events"):
                rows = repr(sorted(map(repr, database.execute(f'SELECT * FROM "{name}"').fetchall())))
                found[f"ledger {name}"] = hashlib.sha256(rows.encode()).hexdigest()
    return found


def ledger_file() -> str:
    from pipeline.settings import home

    return str(home() / "ledger.db")


def restated(morning: MorningHarness) -> None:
    """Upstream sends the last day's file again, with other figures."""
    table = morning.workflow.table("events")
    rows = morning.bench.lake.read(table, days=[morning.day])
    morning.bench.lake.replace_days(table, rows.slice(0, rows.num_rows // 2), [morning.day])


@pytest.mark.parametrize("hour", [9, 30])
@pytest.mark.parametrize("how", ["decide", "daily", "range", "restated"])
def test_a_delivered_day_run_again_stays_as_it_was(morning: MorningHarness, hour: int, how: str) -> None:
    assert run(morning, "decide", 4).success and run(morning, "deliver", 5).success
    batch, stands, before = morning.batch(), morning.system.values(), written(morning)
    assert batch.acted
    features = morning.bench.lake.version(morning.workflow.table("features"))
    if how == "restated":
        restated(morning)
        morning.bench.build([morning.day])
        result = run(morning, "decide", hour)
    elif how == "range":
        older = morning.day - timedelta(days=1)
        assert run(morning, "decide", 4, day=older).success
        before = written(morning)
        result = run(morning, "decide", hour, first=older)
    else:
        result = run(morning, how, hour)
    assert result.success, runner.failed_steps(result)
    assert written(morning) == before, [k for k, v in written(morning).items() if before.get(k) != v]
    assert morning.batch() == batch and morning.system.values() == stands
    (verdict, said), shown = checks(result)["same_again"], metadata_of(result)
    told = shown["recomputed"][str(morning.day)]
    if how == "restated":
        assert verdict == "WARN" and told["differ"] > 0 and told["unexplained"] == 0 and "restated" in said
        assert "restated" in shown["decisions that differ"]
        assert morning.bench.lake.version(morning.workflow.table("features")) != features
    else:
        assert verdict == "passed" and told == {
            "batch": batch.batch_id, "decisions": batch.rows, "differ": 0, "causes": {}, "unexplained": 0,
        }  # fmt: skip
    assert ("--again" in shown["days"][str(morning.day)]) == (hour == 9)
    assert run(morning, "deliver", hour if hour == 9 else 6).success and morning.system.values() == stands


def metadata_of(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """The metadata of the decisions; a range has a materialisation for each day."""
    events = [e for e in result.get_asset_materialization_events() if e.asset_key.path[-1] == "decisions"]  # type: ignore[union-attr]
    return {name: value.value for e in events for name, value in e.materialization.metadata.items()}


def test_a_sent_day_is_decided_anew_when_somebody_asks_and_by_the_model_although_the_deadline_is_over(
    morning: MorningHarness,
) -> None:
    assert run(morning, "decide", 4).success and run(morning, "deliver", 5).success
    first = morning.batch()
    step_back(morning.registry, morning.workflow.name, 2, "to decide otherwise")
    assert run(morning, "decide", 9).success and morning.batch() == first
    result = run(morning, "decide", 9, again=True)
    assert result.success, runner.failed_steps(result)
    second = morning.batch()
    assert second.sequence > first.sequence and second.step == "champion" and second.record["model_version"] == 1
    assert not second.record["late"]
    assert metadata(result, "decisions")["batch"] == second.batch_id
    assert "as was asked for" in metadata(result, "decisions")["days"][str(morning.day)]
    decided = {d["entity_id"]: d["before"] for d in morning.bench.decided(morning.day)}
    with morning.ledger() as book:
        before = {d["entity_id"]: d["before"] for d in book.decisions(first.batch_id).to_pylist()}
    assert decided == before, "the day's own batch is what it starts from"
    assert {d["batch_id"] for d in morning.bench.decided(morning.day)} == {second.batch_id}
    last = run(morning, "decide", 30)
    told = metadata_of(last)["recomputed"][str(morning.day)]
    assert told["batch"] == first.batch_id, "what acted is compared, not what was only decided"


def test_a_day_that_was_not_sent_is_decided_anew_freely(morning: MorningHarness) -> None:
    assert run(morning, "decide", 4).success
    first = morning.batch()
    step_back(morning.registry, morning.workflow.name, 2, "to decide otherwise")
    result = run(morning, "decide", 5)
    assert result.success and morning.batch().batch_id != first.batch_id
    assert checks(result)["same_again"] == ("passed", f"{morning.day}: decided by this run: nothing to compare with")


def test_a_past_day_that_was_never_decided_is_a_backfill_once(morning: MorningHarness) -> None:
    older = morning.day - timedelta(days=3)
    result = run(morning, "decide", 4, day=older)
    assert result.success, runner.failed_steps(result)
    with morning.ledger() as book:
        (batch,) = book.batches(morning.workflow.name)
    assert (
        batch.backfill
        and not batch.record["late"]
        and "a backfill" in metadata(result, "decisions")["days"][str(older)]
    )
    assert {d["batch_id"] for d in morning.bench.decided(older)} == {batch.batch_id}
    before = written(morning)
    again = run(morning, "decide", 5, day=older)
    assert again.success and written(morning) == before
    assert checks(again)["same_again"][0] == "passed" and metadata_of(again)["recomputed"][str(older)]["differ"] == 0


@pytest.mark.parametrize("where", ["ledger", "decisions", "batches", "scores", "scoring"])
def test_a_run_killed_at_any_write_leaves_a_day_that_the_next_run_completes(
    morning: MorningHarness, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class Killed(BaseException):
        pass

    honest: Callable[..., int] = Lake.replace_days

    def dying(self: Lake, table: str, data: pa.Table, days: Any) -> int:
        if table.endswith(f"/{where}"):
            raise Killed
        return honest(self, table, data, days)

    def unrecorded(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if where == "ledger":
            patch.setattr(Ledger, "record_batch", unrecorded)
        else:
            patch.setattr(Lake, "replace_days", dying)
        assert not run(morning, "decide", 4).success
    lake, name = morning.bench.lake, morning.workflow.table("batches")
    with morning.ledger() as book:
        known = [b.batch_id for b in book.batches(morning.workflow.name)]
    stands = lake.read(name, days=[morning.day])["batch_id"].to_pylist() if lake.exists(name) else []
    assert not stands and bool(known) == (where in ("decisions", "batches")), "decided in the lake alone"
    # hours after its effect is over: what the ledger has is completed, and nothing is decided over it
    result = run(morning, "decide", 30)
    assert result.success, runner.failed_steps(result)
    batch = morning.batch()
    assert lake.read(name, days=[morning.day])["batch_id"].to_pylist() == [batch.batch_id]
    assert {d["batch_id"] for d in morning.bench.decided(morning.day)} == {batch.batch_id}
    assert not known or (known == [batch.batch_id] and not batch.backfill)
    assert checks(result)["same_again"][0] == "passed"
