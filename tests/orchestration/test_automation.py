"""What can start a run unattended: when it does, when it waits, and that all of it is declared and off."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from assets.resources import resources
from delivery.ledger import Ledger, NewBatch
from orchestration import assembly, automation
from orchestration.automation import (
    SETTLE,
    closed_days,
    day_of,
    deadline_request,
    deadline_times,
    ended_runs,
    landing_requests,
    newest_decided,
    retrain_request,
    running_days,
    training_runs,
    unattended,
)
from orchestration.landing_sensor import PREPARE_TRIES, Manifest, look
from pipeline.ingest import FILES
from pipeline.lake import Lake
from pipeline.workflow import FOLDER, Source, Workflow, load
from tests.support.fakes import table as decisions

DAY = date(2026, 3, 10)


def after(hours: float) -> datetime:
    """So many hours after the end of DAY; its cut-off is at 3, its deadline at 6."""
    return datetime(2026, 3, 11) + timedelta(hours=hours)


@pytest.fixture(scope="module")
def workflow() -> Workflow:
    return load(FOLDER / "ad_budget")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


class Zone:
    """A landing zone, the sensor's memory, and what it asks for."""

    def __init__(self, root: Path, workflow: Workflow) -> None:
        self.root, self.workflow, self.seen = root, workflow, dict[str, Any]()

    def put(
        self, day: date | str, at: datetime, text: str = "x", name: str = "export/advertising_{day}.csv.gz"
    ) -> None:
        path = self.root / name.format(day=day)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        stamp = at.replace(tzinfo=UTC).timestamp()
        os.utime(path, (stamp, stamp))

    def look(self, now: datetime, **known: Any) -> list[dg.RunRequest]:
        """One tick; what it remembers has been through JSON, as a cursor is."""
        requests, seen = landing_requests(self.workflow, str(self.root), self.seen, now, **known)
        self.seen = json.loads(json.dumps(seen))
        return requests

    def notes(self, now: datetime, **known: Any) -> str:
        return "; ".join(look(self.workflow, str(self.root), self.seen, now, **known).notes)

    def minutes(self, begin: datetime, end: datetime, **known: Any) -> dict[str, list[dg.RunRequest]]:
        """What is asked for at which time of day, by a tick a minute."""
        ticks = [begin + timedelta(minutes=n) for n in range(round((end - begin).total_seconds() / 60))]
        found = {f"{now:%H:%M}": self.look(now, **known) for now in ticks}
        return {at: requests for at, requests in found.items() if requests}


@pytest.fixture
def zone(tmp_path: Path, workflow: Workflow) -> Zone:
    (tmp_path / "landing").mkdir()
    return Zone(tmp_path / "landing", workflow)


@pytest.mark.parametrize(("hours", "newest"), [(2.99, 9), (3, 10), (23.9, 10), (26.9, 10), (27, 11)])
def test_a_day_is_closed_from_its_cut_off_on(workflow: Workflow, hours: float, newest: int) -> None:
    assert closed_days(workflow, after(hours)) == date(2026, 3, newest)


def test_a_file_waits_for_the_cut_off_of_its_day_and_starts_it_once(zone: Zone) -> None:
    zone.put(DAY, after(1))
    assert zone.look(after(2.99)) == []
    (request,) = zone.look(after(3))
    assert request.partition_key == DAY.isoformat() and "1 new file" in request.tags["signalbox/cause"]
    assert zone.look(after(3)) == [] == zone.look(after(30))


def test_a_file_of_a_day_to_come_waits(zone: Zone) -> None:
    zone.put(DAY + timedelta(days=2), after(1))
    assert zone.look(after(26.9)) == []
    assert [r.partition_key for r in zone.look(after(51))] == ["2026-03-12"]


def test_a_file_that_may_still_be_written_waits_until_it_has_settled(zone: Zone) -> None:
    assert timedelta(seconds=60) == SETTLE
    zone.put(DAY, after(4))
    assert zone.look(after(4) + timedelta(seconds=59)) == []
    assert len(zone.look(after(4) + timedelta(seconds=60))) == 1


def test_a_changed_file_starts_its_day_again_under_another_key(zone: Zone) -> None:
    zone.put(DAY, after(1))
    (first,) = zone.look(after(4))
    zone.put(DAY, after(5), text="y")  # same size, another time
    (second,) = zone.look(after(6))
    zone.put(DAY, after(5), text="longer")  # same time, another size
    (third,) = zone.look(after(6))
    assert len({first.run_key, second.run_key, third.run_key}) == 3
    assert {r.partition_key for r in (first, second, third)} == {DAY.isoformat()}


def test_a_lost_memory_asks_under_the_same_key_so_that_nothing_runs_twice(zone: Zone) -> None:
    zone.put(DAY, after(1))
    (first,) = zone.look(after(4))
    zone.seen = {}
    (again,) = zone.look(after(9))
    assert again.run_key == first.run_key


def test_files_of_one_day_start_one_run_and_of_two_days_two(zone: Zone) -> None:
    for days_ago in (2, 1):
        zone.put(DAY - timedelta(days=days_ago), after(1))
    requests = zone.look(after(4))
    assert [r.partition_key for r in requests] == ["2026-03-08", "2026-03-09"]
    assert len({r.run_key for r in requests}) == 2


def test_a_file_without_a_day_in_its_pattern_belongs_to_the_newest_closed_day(zone: Zone) -> None:
    zone.put("x", after(1), name="april_may_{day}.csv.gz")
    zone.put(DAY, after(1))
    (request,) = zone.look(after(4))
    assert request.partition_key == DAY.isoformat() and "2 new file" in request.tags["signalbox/cause"]


def test_a_file_of_a_day_before_the_start_starts_nothing(zone: Zone, workflow: Workflow) -> None:
    zone.put(workflow.start - timedelta(days=1), after(1))
    zone.put(workflow.start, after(1))
    assert [r.partition_key for r in zone.look(after(4))] == [workflow.start.isoformat()]


def test_a_date_that_does_not_exist_stops_no_other_file(zone: Zone) -> None:
    zone.put("2026-02-31", after(1))
    zone.put("2026-99-99", after(1))
    zone.put(DAY, after(1))
    assert [r.partition_key for r in zone.look(after(4))] == [DAY.isoformat()]


@pytest.mark.parametrize(
    ("pattern", "name", "day"),
    [
        ("export/a_{day}.csv.gz", "export/a_2026-03-10.csv.gz", DAY),
        ("{day}/*.csv", "2026-03-10/b.csv", DAY),
        ("{day}/a_{day}.csv", "2026-03-10/a_2026-03-10.csv", DAY),
        ("2026-01-01_{day}_[ab].csv", "2026-01-01_2026-03-10_a.csv", DAY),
        ("a.b+({day}).csv", "a.b+(2026-03-10).csv", DAY),
        ("a_*.csv", "a_2026-03-10.csv", None),
        ("a_{day}.csv", "a_2026-02-30.csv", None),
        ("memory://bucket/in/a_{day}.csv", "memory://bucket/in/a_2026-03-10.csv", DAY),
    ],
)
def test_the_day_is_read_where_the_pattern_says(pattern: str, name: str, day: date | None) -> None:
    source = Source.model_validate({"files": pattern, "format": "csv", "sql": "s.sql", "known_at": "mapped"})
    assert day_of(source, name) == day


# --- a day whose run died


def test_a_day_whose_run_died_is_asked_for_again_ever_more_rarely_until_its_deadline(zone: Zone) -> None:
    zone.put(DAY, after(1))
    found = zone.minutes(after(3), after(9))
    assert list(found) == ["03:00", "03:10", "03:30", "04:10", "04:50", "05:30"], "from 06:00 on the schedule asks"
    requests = [r for some in found.values() for r in some]
    assert {r.partition_key for r in requests} == {DAY.isoformat()} and len({r.run_key for r in requests}) == 6
    assert "(try 2)" in requests[1].tags["signalbox/cause"] and requests[1].job_name == "ad_budget_daily"


def test_while_its_run_goes_on_or_once_it_is_decided_a_day_is_not_asked_for_again(zone: Zone) -> None:
    zone.put(DAY, after(1))
    assert len(zone.look(after(3))) == 1
    assert zone.minutes(after(3.1), after(4), running={DAY}) == {}
    assert list(zone.minutes(after(4), after(4.1))) == ["04:00"], "the run is gone, and nothing was decided"
    assert zone.minutes(after(4.1), after(6), decided=DAY) == {}
    assert zone.minutes(after(4.1), after(6)) == {}, "what was decided is forgotten, not put off"


def test_the_same_memory_gives_the_same_answer(zone: Zone) -> None:
    zone.put(DAY, after(1))
    zone.look(after(3))
    before = json.dumps(zone.seen)
    twice = [landing_requests(zone.workflow, str(zone.root), zone.seen, after(3.5))[0][0].run_key for _ in range(2)]
    assert twice[0] == twice[1] and json.dumps(zone.seen) == before


def test_a_new_content_is_asked_for_at_once_whatever_was_waited_for(zone: Zone) -> None:
    zone.put(DAY, after(1))
    zone.look(after(3))
    zone.put(DAY, after(3), text="another")
    assert [r.partition_key for r in zone.look(after(3) + SETTLE)] == [DAY.isoformat()]
    assert list(zone.minutes(after(3) + SETTLE, after(3.5))) == ["03:11"], "the wait begins anew"


def test_a_file_that_comes_after_the_deadline_starts_its_undecided_day_once(zone: Zone) -> None:
    zone.put(DAY, after(6.5))
    found = zone.minutes(after(6.5), after(12), decided=DAY - timedelta(days=1))
    assert list(found) == ["06:31"] and found["06:31"][0].job_name == "ad_budget_daily"


def test_a_memory_of_the_time_before_is_understood(zone: Zone) -> None:
    zone.put(DAY - timedelta(days=1), after(1))
    zone.put(DAY, after(1))
    name = f"export/advertising_{DAY - timedelta(days=1)}.csv.gz"
    zone.seen = {name: f"1:{after(1).replace(tzinfo=UTC).timestamp()}"}
    assert [r.partition_key for r in zone.look(after(4))] == [DAY.isoformat()]


# --- days that are decided, or older


def days_ago(n: int) -> date:
    return DAY - timedelta(days=n)


def span_of(request: dg.RunRequest) -> tuple[str, str]:
    keys = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
    whole = (request.partition_key or "",) * 2
    return whole if request.partition_key else (request.tags[keys[0]], request.tags[keys[1]])


def test_a_file_of_a_decided_or_an_older_day_is_prepared_alone(zone: Zone) -> None:
    assert zone.look(after(4), decided=days_ago(1)) == []
    for n in (0, 1, 2):
        zone.put(days_ago(n), after(3))
    found = {r.job_name: span_of(r) for r in zone.look(after(4), decided=days_ago(1))}
    assert found == {
        "ad_budget_daily": (str(DAY), str(DAY)), "ad_budget_prepare": (str(days_ago(2)), str(days_ago(1))),
    }  # fmt: skip


def test_older_days_are_prepared_in_one_run_for_each_stretch(zone: Zone, workflow: Workflow) -> None:
    later = DAY + timedelta(days=60)
    zone.look(after(24 * 60 + 4), decided=later)
    for n in (50, 49, 43, 20, 2):
        zone.put(later - timedelta(days=n), after(1))
    requests = zone.look(after(24 * 60 + 4), decided=later)
    whole = {span_of(r): r.job_name for r in requests}
    wanted = [(50, 43), (20, 20), (2, 2)]
    assert whole == {tuple(str(later - timedelta(days=n)) for n in s): "ad_budget_prepare" for s in wanted}
    assert len({r.run_key for r in requests}) == 3
    assert all((r.partition_key is None) == (span_of(r)[0] != span_of(r)[1]) for r in requests)


def test_after_a_long_pause_the_newest_days_are_decided_and_those_before_only_prepared(zone: Zone) -> None:
    end = date(2026, 4, 30)
    for n in range(30):
        zone.put(end - timedelta(days=n), after(1))
    requests = zone.look(datetime(2026, 5, 1, 4))
    daily = [str(r.partition_key) for r in requests if r.job_name == "ad_budget_daily"]
    assert daily == [str(end - timedelta(days=n)) for n in range(6, -1, -1)]
    assert [span_of(r) for r in requests if r.job_name == "ad_budget_prepare"] == [("2026-04-01", "2026-04-23")]


def test_a_range_that_was_not_prepared_to_its_end_is_asked_for_again_a_few_times(zone: Zone) -> None:
    zone.look(after(4), decided=DAY)
    zone.put(days_ago(1), after(3))
    (first,) = zone.look(after(5), decided=DAY)
    assert zone.minutes(after(5), after(8), decided=DAY) == {}, "its run goes on, or nobody knows of it yet"
    seen, keys, now = zone.seen, [str(first.run_key)], after(8)
    for _ in range(300):
        now += timedelta(minutes=10)
        again = zone.look(now, decided=DAY, ended={keys[-1]: False})
        assert {(r.job_name, r.partition_key) for r in again} <= {("ad_budget_prepare", str(days_ago(1)))}
        keys += [str(r.run_key) for r in again]
    assert len(keys) == len(set(keys)) == PREPARE_TRIES
    zone.seen = seen
    assert zone.look(after(9), decided=DAY, ended={keys[0]: True}) == []
    assert zone.look(after(10), decided=DAY, ended={keys[0]: False}) == [], "it was done"


def manifest(zone: Zone, lake: Lake, days: list[date], at: datetime, text: str = "x", **said: Any) -> Any:
    """The lake's table of files once these had landed."""
    row = {
        "source": "export", "file_id": hashlib.sha256(text.encode()).hexdigest(), "size": len(text), "rows": 1, "accepted": 1,
        "quarantined": 0, "status": "landed", "landed_at": at,
    } | said  # fmt: skip
    rows = [row | {"path": f"export/advertising_{day}.csv.gz"} for day in days]
    table = pa.Table.from_pylist(rows, FILES)
    lake.replace("ad_budget/files", table, predicate="true", partition_by=())
    return Manifest(lake, zone.workflow).holds


def test_the_first_look_leaves_alone_what_has_landed_and_says_of_how_many_files(zone: Zone, lake: Lake) -> None:
    for n in range(9):
        zone.put(days_ago(n), after(1))
    holds = manifest(zone, lake, [days_ago(n) for n in range(1, 9)], after(2))
    assert "8 file(s) left alone" in zone.notes(after(4), decided=days_ago(1), landed=holds)
    (request,) = zone.look(after(4), decided=days_ago(1), landed=holds)
    assert (request.job_name, request.partition_key) == ("ad_budget_daily", str(DAY))
    assert zone.look(after(4), decided=DAY, landed=holds) == [] and zone.notes(after(4), decided=DAY) == ""


def test_the_first_look_leaves_alone_older_files_of_which_nobody_can_tell_whether_they_landed(zone: Zone) -> None:
    for n in range(9):
        zone.put(days_ago(n), after(1))
    assert zone.look(after(4), decided=DAY) == []
    zone.put(days_ago(3), after(2), text="restated")
    (request,) = zone.look(after(4), decided=DAY)
    assert (request.job_name, request.partition_key) == ("ad_budget_prepare", str(days_ago(3)))


@pytest.mark.parametrize(
    ("said", "lies"),
    [
        ({}, True),
        ({"at": after(0)}, True),  # the file was touched since: its content is the same
        ({"status": "refused"}, True),
        ({"status": "landing"}, False),
        ({"superseded_at": after(3)}, False),
        ({"text": "y", "at": after(0)}, False),  # the same size, another content
        ({"text": "longer"}, False),
        ({"source": "another"}, False),
    ],
)
def test_an_older_file_is_prepared_unless_it_landed_with_this_content(
    zone: Zone, lake: Lake, said: dict[str, Any], lies: bool
) -> None:
    zone.put(days_ago(5), after(1))
    holds = manifest(zone, lake, [days_ago(5)], **({"at": after(2)} | said))
    assert [r.job_name for r in zone.look(after(4), decided=DAY, landed=holds)] == ["ad_budget_prepare"] * (not lies)


# --- clocks


def test_a_file_whose_clock_is_ahead_is_taken_once_it_stood_still_for_a_minute(zone: Zone) -> None:
    zone.put(DAY, after(12))
    assert "1 file(s) whose clock is ahead" in zone.notes(after(4)) and "by 8 h 0 min" in zone.notes(after(4))
    assert zone.look(after(4)) == []
    assert zone.look(after(4) + timedelta(seconds=59)) == []
    zone.put(DAY, after(12), text="it grew")
    assert zone.look(after(4) + timedelta(seconds=61)) == []
    assert "stands still and is taken" in zone.notes(after(4) + timedelta(seconds=121))
    assert [r.partition_key for r in zone.look(after(4) + timedelta(seconds=121))] == [DAY.isoformat()]
    assert zone.look(after(4) + timedelta(seconds=181)) == [] and zone.seen["ahead"] == {}


def test_a_file_with_an_old_clock_is_noticed_when_it_comes(zone: Zone) -> None:
    zone.look(after(4))
    zone.put(DAY, after(-300))
    assert [r.partition_key for r in zone.look(after(4))] == [DAY.isoformat()]


# --- retraining -------------------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=b"k" * 16) as ledger:
        yield ledger


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as found:
        yield found


def measured(lake: Lake, drifted: dict[date, bool]) -> None:
    table = pa.table(
        {
            "day": pa.array(list(drifted), pa.date32()),
            "drifted": list(drifted.values()),
            "text": [f"3 of 4 columns on {d}" for d in drifted],
        }
    )
    lake.replace_days("ad_budget/drift", table, list(drifted))


def trained(lake: Lake, day: date) -> None:
    table = pa.table({"as_of": pa.array([day], pa.date32()), "entity_id": ["a"]})
    lake.replace("ad_budget/training_set", table, predicate=f"as_of = '{day}'", partition_by=["as_of"])


def skipped(found: dg.RunRequest | dg.SkipReason) -> str:
    assert isinstance(found, dg.SkipReason), found
    return str(found.skip_message)


def asked(found: dg.RunRequest | dg.SkipReason) -> dg.RunRequest:
    assert isinstance(found, dg.RunRequest), found
    return found


def a_run(instance: dg.DagsterInstance, day: date, status: str, job: str = "ad_budget_retrain") -> None:
    instance.create_run_for_job(
        _retrain_job if job == "ad_budget_retrain" else _other_job,
        status=dg.DagsterRunStatus[status],
        tags={"dagster/partition": day.isoformat()},
    )


@dg.op
def nothing() -> None: ...


@dg.job(name="ad_budget_retrain")
def _retrain_job() -> None:
    nothing()


@dg.job(name="ad_budget_daily")
def _other_job() -> None:
    nothing()


class Watch:
    """What the sensor asks for at an hour, given what stands in the lake, the ledger and Dagster."""

    def __init__(self, workflow: Workflow, lake: Lake, book: Ledger, instance: dg.DagsterInstance) -> None:
        self.workflow, self.lake, self.book, self.instance = workflow, lake, book, instance

    def look(self, hours: float = 4) -> dg.RunRequest | dg.SkipReason:
        runs = training_runs(self.instance, self.workflow)
        return retrain_request(self.workflow, self.lake, self.book, after(hours), runs)

    def actions(self) -> list[str]:
        return [e.body["action"] for e in self.book.events("trigger", "ad_budget")]


@pytest.fixture
def watch(workflow: Workflow, lake: Lake, book: Ledger, instance: dg.DagsterInstance) -> Watch:
    return Watch(workflow, lake, book, instance)


def test_without_evidence_nothing_is_retrained_nor_recorded(watch: Watch) -> None:
    assert "nothing new asks" in skipped(watch.look())
    measured(watch.lake, {DAY: False})
    assert "nothing new asks" in skipped(watch.look()) and watch.actions() == []


def test_the_newest_drifted_day_is_retrained_for_with_its_reason(watch: Watch) -> None:
    measured(watch.lake, {DAY - timedelta(days=3): True, DAY - timedelta(days=1): True, DAY: False})
    request = asked(watch.look())
    assert request.partition_key == "2026-03-09" and "3 of 4 columns" in request.tags["signalbox/cause"]
    first = date(2026, 3, 9) - timedelta(days=watch.workflow.drift.window_days - 1)
    assert request.run_key == f"ad_budget:retrain:features:{first}:2026-03-09:1"
    assert watch.actions() == ["merged", "asked"]


def test_a_trigger_is_asked_for_once_and_a_later_one_under_another_key(watch: Watch) -> None:
    measured(watch.lake, {DAY: True})
    first = asked(watch.look()).run_key
    assert "nothing new asks" in skipped(watch.look())
    a_run(watch.instance, DAY, "SUCCESS")
    measured(watch.lake, {DAY + timedelta(days=7): True})
    assert asked(watch.look()).run_key != first


@pytest.mark.parametrize(("days_ago", "waits"), [(-1, True), (0, True), (6, True), (7, False), (8, False)])
def test_the_cooldown_counts_from_the_newest_training(watch: Watch, days_ago: int, waits: bool) -> None:
    assert watch.workflow.retraining.cooldown_days == 7
    measured(watch.lake, {DAY: True})
    trained(watch.lake, DAY - timedelta(days=30))
    trained(watch.lake, DAY - timedelta(days=days_ago))
    found = watch.look()
    if waits:
        assert ("cooldown is 7 days" if days_ago > 0 else "had seen it") in skipped(found)
        assert watch.actions() == ["cooling" if days_ago > 0 else "merged"]
    else:
        assert asked(found).partition_key == DAY.isoformat()


@pytest.mark.parametrize("status", ["NOT_STARTED", "STARTING", "STARTED", "CANCELING"])
def test_while_a_retraining_is_unfinished_a_trigger_is_merged_and_asked_for_after_it(watch: Watch, status: str) -> None:
    """By Dagster's own run records."""
    measured(watch.lake, {DAY - timedelta(days=1): True})
    asked(watch.look())
    a_run(watch.instance, DAY - timedelta(days=1), status)
    measured(watch.lake, {DAY: True})
    assert "merged" in skipped(watch.look()) and "nothing new" in skipped(watch.look(5))
    (record,) = watch.instance.get_run_records()
    watch.instance.report_run_failed(record.dagster_run) if status == "CANCELING" else _succeed(watch.instance, record)
    request = asked(watch.look(6))
    assert request.partition_key == DAY.isoformat() and watch.actions() == ["asked", "merged", "asked"]


def _succeed(instance: dg.DagsterInstance, record: Any) -> None:
    event = dg.DagsterEvent("PIPELINE_SUCCESS", record.dagster_run.job_name)
    instance.report_dagster_event(event, record.dagster_run.run_id)
    assert instance.get_run_by_id(record.dagster_run.run_id).status == dg.DagsterRunStatus.SUCCESS  # type: ignore[union-attr]


def test_a_failed_retraining_is_asked_for_again_under_another_key(watch: Watch) -> None:
    measured(watch.lake, {DAY: True})
    first = asked(watch.look(4))
    trained(watch.lake, DAY)  # the set was made, the model was not
    a_run(watch.instance, DAY, "FAILURE")
    assert "nothing new" in skipped(watch.look(9))
    again = asked(watch.look(10.1))
    assert again.run_key == first.run_key.removesuffix(":1") + ":2"
    a_run(watch.instance, DAY, "SUCCESS")
    assert "nothing new" in skipped(watch.look(24))


def test_a_run_that_never_reports_its_end_does_not_block_for_ever(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(watch.lake, {DAY: True})
    a_run(watch.instance, DAY - timedelta(days=1), "STARTED")  # and was killed
    a_run(watch.instance, DAY, "STARTED", job="ad_budget_daily")  # another job
    assert training_runs(watch.instance, watch.workflow).running == {DAY - timedelta(days=1)}
    short = watch.workflow.retraining.model_copy(update={"longest_hours": 1e-6})
    impatient = watch.workflow.model_copy(update={"retraining": short})
    assert training_runs(watch.instance, impatient).failed == {DAY - timedelta(days=1)}


def test_what_a_person_trained_stands_in_the_ledger_and_cools(watch: Watch) -> None:
    a_run(watch.instance, DAY - timedelta(days=2), "SUCCESS")
    measured(watch.lake, {DAY: True})
    assert "cooling" in skipped(watch.look())
    assert [(e.body["cause"], e.body["action"]) for e in watch.book.events("trigger")] == [
        ("person", "asked"),
        ("features", "cooling"),
    ]


# --- the deadline -----------------------------------------------------------------------------------------------------


def test_an_undecided_day_is_decided_at_its_deadline(workflow: Workflow, lake: Lake) -> None:
    assert "has not come" in skipped(deadline_request(workflow, lake, after(5.99)))
    request = asked(deadline_request(workflow, lake, after(6)))
    assert request.partition_key == DAY.isoformat() and "no batch stood" in request.tags["signalbox/cause"]
    assert request.run_key == asked(deadline_request(workflow, lake, after(9))).run_key


def in_lake(lake: Lake, day: date, batch_id: str) -> None:
    table = pa.table({"day": pa.array([day], pa.date32()), "batch_id": [batch_id]})
    lake.replace_days("ad_budget/batches", table, [day])


def in_ledger(book: Ledger, day: date, batch_id: str, **said: Any) -> None:
    decided = datetime.combine(day + timedelta(days=1), datetime.min.time()) + timedelta(hours=4)
    new = NewBatch(
        batch_id=batch_id, workflow="ad_budget", kind="decision", day=day, digest=f"digest of {batch_id}", status="READY",
        step="champion", as_of=decided, decided_at=decided, run_id="run", record=said,
    )  # fmt: skip
    book.record_batch(
        new, decisions([{"entity": "a", "before": 1, "after": 2, "arm": "champion", "gain": 1.0}], batch_id)
    )


def test_a_day_is_decided_once_ledger_and_lake_hold_the_same_batch(
    workflow: Workflow, lake: Lake, book: Ledger
) -> None:
    def request() -> Any:
        return deadline_request(workflow, lake, after(6), book)

    assert asked(request()).partition_key == DAY.isoformat()
    in_lake(lake, days_ago(1), "a")
    in_ledger(book, days_ago(1), "a")
    assert asked(request()).partition_key == DAY.isoformat(), "another day is"
    in_lake(lake, DAY, "b")
    assert asked(request()), "a kill between the two: the ledger never heard of it"
    in_ledger(book, DAY, "b")
    assert "is decided" in skipped(request())
    in_ledger(book, DAY, "c")
    assert asked(request()), "decided anew in the ledger, and the lake still holds the batch before"
    in_lake(lake, DAY, "c")
    assert "is decided" in skipped(request())
    assert asked(deadline_request(workflow, lake, after(6))), "without a ledger nothing is known to be decided"


def test_the_same_content_decided_again_is_the_same_in_the_lake(workflow: Workflow, lake: Lake, book: Ledger) -> None:
    in_ledger(book, DAY, "b.2")
    in_lake(lake, DAY, "b")
    assert "is decided" in skipped(deadline_request(workflow, lake, after(6), book))


def test_a_backfill_decides_no_day(workflow: Workflow, lake: Lake, book: Ledger) -> None:
    in_ledger(book, DAY, "b", backfill=True)
    in_lake(lake, DAY, "b")
    assert asked(deadline_request(workflow, lake, after(6), book))
    assert newest_decided(workflow, lake, book, after(4)) is None


def test_while_the_deadlines_run_goes_on_it_is_not_asked_for_again(workflow: Workflow, lake: Lake) -> None:
    assert "is being decided" in skipped(deadline_request(workflow, lake, after(6.5), running={DAY}))
    assert asked(deadline_request(workflow, lake, after(6.5), running={days_ago(1)}))


@pytest.mark.parametrize(
    ("deadline", "times"),
    [
        ("06:00", ["0 6 * * *", "10 6 * * *", "30 6 * * *", "10 7 * * *", "30 8 * * *", "10 11 * * *"]),
        ("23:45", ["45 23 * * *", "55 23 * * *"]),  # at midnight the day that it decides for is over
    ],
)
def test_the_deadline_is_looked_at_again_until_its_day_is_over(deadline: str, times: list[str]) -> None:
    assert deadline_times(datetime.strptime(deadline, "%H:%M").time()) == times


def test_the_newest_decided_day_is_the_ledgers(workflow: Workflow, lake: Lake, book: Ledger) -> None:
    assert newest_decided(workflow, lake, book, after(4)) is None
    in_ledger(book, days_ago(5), "old")
    assert newest_decided(workflow, lake, book, after(4)) == days_ago(5)
    assert newest_decided(workflow, lake, book, after(24 * 90)) == days_ago(5), "however long ago"
    in_ledger(book, DAY, "b")
    assert newest_decided(workflow, lake, book, after(4)) == days_ago(5), "killed before the lake heard of it"
    in_lake(lake, DAY, "b")
    assert newest_decided(workflow, lake, book, after(4)) == DAY


def test_days_that_are_being_decided_are_read_from_dagsters_records(
    workflow: Workflow, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(status: str, **tags: str) -> None:
        marks = {f"dagster/{key}": value for key, value in tags.items()}
        here = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "__repository__")
        origin = RemoteJobOrigin(here, _other_job.name)
        state = dg.DagsterRunStatus[status]
        instance.create_run_for_job(_other_job, status=state, tags=marks, remote_job_origin=origin)

    run("STARTED", partition=str(DAY), run_key="a")
    run("QUEUED", partition=str(days_ago(1)), run_key="b")
    run("FAILURE", partition=str(days_ago(2)), run_key="c")
    run("SUCCESS", partition=str(days_ago(3)), run_key="d")
    run("CANCELED", partition=str(days_ago(4)), run_key="e")
    run("STARTING", asset_partition_range_start=str(days_ago(8)), asset_partition_range_end=str(days_ago(6)))
    going = {DAY, days_ago(1), days_ago(6), days_ago(7), days_ago(8)}
    assert running_days(instance, workflow, ("daily", "decide")) == going
    assert running_days(instance, workflow, ("decide",)) == frozenset()
    assert ended_runs(instance, ["a", "b", "c", "d", "e", "f"]) == {"c": False, "d": True, "e": True}
    monkeypatch.setattr(automation, "DEAD_AFTER", timedelta(0))
    assert running_days(instance, workflow, ("daily",)) == {days_ago(1)}, (
        "killed: they report no end; a queued one waits"
    )
    assert ended_runs(instance, ["a", "b"]) == {"a": False}


def test_before_the_first_day_there_is_nothing_to_decide(workflow: Workflow, lake: Lake) -> None:
    morning = datetime.combine(workflow.start, datetime.min.time()) + timedelta(hours=7)
    assert "start" in skipped(deadline_request(workflow, lake, morning))
    assert asked(deadline_request(workflow, lake, morning + timedelta(days=1))).partition_key == "2026-03-02"


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, workflow: Workflow) -> dg.RepositoryDefinition:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGNALBOX_HOME", str(tmp_path_factory.mktemp("home")))
        return assembly.build([workflow, load(FOLDER / "ticket_priority")]).get_repository_def()


def test_everything_that_can_start_a_run_is_declared_and_off(
    repository: dg.RepositoryDefinition, workflow: Workflow
) -> None:
    declared = {u.name: u for u in unattended([workflow, load(FOLDER / "ticket_priority")])}
    found = {d.name: d for d in (*repository.sensor_defs, *repository.schedule_defs)}
    assert set(found) == set(declared) and len(found) == 14
    for name, definition in found.items():
        assert definition.default_status.value == "STOPPED", name
        jobs = {job.name for job in definition.jobs} if name.endswith("_landing") else {str(definition.job_name)}
        assert jobs == set(declared[name].starts.split(", ")) and all(repository.has_job(job) for job in jobs)
    keys = repository.asset_graph.get_all_asset_keys()
    assert keys and all(repository.asset_graph.get(k).automation_condition is None for k in keys)


def test_schedules_run_in_utc_at_the_workflows_own_deadline(
    repository: dg.RepositoryDefinition, workflow: Workflow
) -> None:
    schedules = {s.name: s for s in repository.schedule_defs}
    assert {s.execution_timezone for s in schedules.values()} == {"UTC"}
    assert schedules["ad_budget_deadline"].cron_schedule[0] == "0 6 * * *"
    later = workflow.model_copy(update={"deadline": datetime(2026, 1, 1, 7, 30).time()})
    (other,) = [u.definition for u in unattended([later]) if u.name == "ad_budget_deadline"]
    assert isinstance(other, dg.ScheduleDefinition) and other.cron_schedule[0] == "30 7 * * *"


def test_the_sensors_tick_on_what_lies_there(
    repository: dg.RepositoryDefinition, workflow: Workflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Dagster itself: the landing sensor remembers, the deadline schedule decides the day before."""
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    now = after(4).isoformat()
    built, given = assembly.build([workflow], now=now).get_repository_def(), resources(now)
    zone = Zone(tmp_path / "landing" / "ad_budget", workflow)
    zone.put(DAY, after(1))
    landed = built.get_sensor_def("ad_budget_landing")
    with dg.instance_for_test() as instance:
        first = landed(dg.build_sensor_context(instance=instance, repository_def=built, resources=given))
        assert [r.partition_key for r in first.run_requests] == [DAY.isoformat()]
        second = landed(
            dg.build_sensor_context(instance=instance, repository_def=built, resources=given, cursor=first.cursor)
        )
        assert not second.run_requests and second.skip_reason
        book = given["ledger"].open(lambda: after(4))
        in_ledger(book, DAY, "b")
        in_lake(given["lake"].lake, DAY, "b")
        book.close()
        zone.put(DAY, after(2), text="sent again")
        zone.put(DAY - timedelta(days=1), after(2))
        third = landed(
            dg.build_sensor_context(instance=instance, repository_def=built, resources=given, cursor=second.cursor)
        )
        (request,) = third.run_requests
        assert request.job_name == "ad_budget_prepare" and span_of(request) == (str(days_ago(1)), str(DAY))
        fresh = landed(dg.build_sensor_context(instance=instance, repository_def=built, resources=given))
        assert [r.job_name for r in fresh.run_requests] == ["ad_budget_prepare"], "none of them has landed"
        deadline = built.get_schedule_def("ad_budget_deadline")
        with dg.build_schedule_context(
            instance=instance,
            repository_def=built,
            resources=given,
            scheduled_execution_time=after(6).replace(tzinfo=UTC),
        ) as context:
            assert "is decided" in skipped(deadline(context))
        deadline = built.get_schedule_def("ad_budget_deadline")
        weekly: Any = built.get_schedule_def("ad_budget_weekly_retrain")

        def scheduled(schedule: Any, moment: datetime) -> Any:
            # closed again: it opens the instance a second time, and whenever it is collected it would make this test's
            # instance the current one of another test
            with dg.build_schedule_context(
                instance=instance, repository_def=built, resources=given, scheduled_execution_time=moment
            ) as context:
                return schedule(context)

        assert asked(scheduled(deadline, after(30).replace(tzinfo=UTC))).partition_key == "2026-03-11"

        def calendar(moment: datetime) -> Any:
            return scheduled(weekly, moment)

        monday = datetime(2026, 3, 16, 8, tzinfo=UTC)
        assert asked(calendar(monday)).partition_key == "2026-03-15"
        assert "nothing new" in skipped(calendar(monday))
        a_run(instance, date(2026, 3, 15), "SUCCESS")
        assert asked(calendar(monday + timedelta(days=7))).partition_key == "2026-03-22"
        a_run(instance, date(2026, 3, 22), "STARTED")
        assert "merged" in skipped(calendar(monday + timedelta(days=14)))
        early = datetime.combine(workflow.start, datetime.min.time(), UTC)
        assert "starts on" in skipped(calendar(early))
        # the sensor finds in the ledger and in Dagster what the calendar started
        measured(given["lake"].lake, {date(2026, 3, 29): True})
        tick = built.get_sensor_def("ad_budget_retrain_on_drift")
        found = tick(dg.build_sensor_context(instance=instance, repository_def=built, resources=given))
        assert "nothing new" in skipped(found)
        book = given["ledger"].open(datetime.now)
        assert [(e.body["cause"], e.body["action"]) for e in book.events("trigger")] == [
            ("calendar", "asked"), ("calendar", "asked"), ("calendar", "merged")
        ]  # fmt: skip
        book.close()
