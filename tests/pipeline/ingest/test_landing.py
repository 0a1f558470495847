"""Landing: each file whole and once, whatever crashes between; restated files; no row ever lost."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline import ingest as landing
from pipeline.ingest import IngestResult, discover, ingest, landing_step, manifest, readers
from pipeline.lake import Lake, content_digest
from pipeline.workflow import Contract, Source, Workflow
from tests.support.properties import examples

NOW = datetime(2024, 5, 2, 4)
LATER = NOW + timedelta(days=1)
SQL = "SELECT source_row, id, happened AS event_at, known AS known_at, amount, side FROM raw"
CONTRACT: dict[str, Any] = {
    "events": {
        "columns": {
            "id": {"type": "VARCHAR", "required": True},
            "amount": {"type": "DOUBLE", "required": True, "min": 0, "max": 1000},
            "side": {"type": "VARCHAR", "allowed": ["left", "right"]},
        },
        "unique": ["id"],
        "rows": [{"name": "too_dear_on_the_left", "breaks_when": "side = 'left' AND amount > 100"}],
    }
}
FIELDS: dict[str, Any] = {
    "files": "*.csv",
    "format": "csv",
    "sql": "mapping.sql",
    "known_at": "mapped",
    "columns": ["id", "happened", "known", "amount", "side"],
}
HEADER = "id,happened,known,amount,side\n"


def line(name: str, at: str = "2024-05-01", known: str = "2024-05-02", amount: object = 1, side: str = "left") -> str:
    return f"{name},{at},{known},{amount},{side}\n"


class LandingHarness:
    """A landing zone with one workflow, and the lake behind it."""

    def __init__(self, root: Path, lake: Path | None = None) -> None:
        self.root, self.zone = root, root / "landing" / "shop"
        self.zone.mkdir(parents=True)
        self.lake = Lake(str(lake or root / "lake"))
        (root / "mapping.sql").write_text(SQL)

    def put(self, name: str, *lines: str) -> None:
        path = self.zone / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(HEADER + "".join(lines))

    def land(
        self,
        now: datetime = NOW,
        days: list[date] | None = None,
        contract: dict[str, Any] = CONTRACT,
        sources: dict[str, dict[str, Any]] | None = None,
        **fields: Any,
    ) -> IngestResult:
        said = sources or {"first": {}}
        workflow = Workflow.model_construct(
            name="shop",
            sources={name: Source.model_validate({**FIELDS, **fields, **own}) for name, own in said.items()},
            contract=Contract.model_validate(contract),
            folder=self.root,
        )
        return ingest(workflow, self.lake, self.root / "landing", now=now, days=days)

    def table(self, name: str) -> pa.Table:
        order = {"events": ["source_file", "source_file_id", "source_row", "known_at"], "files": ["path", "landed_at"]}
        keys = order.get(name, ["source_file", "source_file_id", "source_row", "landed_at"])
        return self.lake.read(f"shop/{name}").sort_by([(k, "ascending") for k in keys])

    def rows(self, name: str) -> list[dict[str, Any]]:
        return self.table(name).to_pylist()

    def live(self) -> dict[str, float]:
        return {e["id"]: e["amount"] for e in self.rows("events") if e["superseded_at"] is None}

    def digests(self) -> dict[str, str]:
        return {
            n: content_digest(self.table(n)) for n in ("events", "quarantine", "files") if self.lake.exists(f"shop/{n}")
        }


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[LandingHarness]:
    yield LandingHarness(tmp_path)


def test_the_first_broken_rule_in_the_documented_order_names_the_row(desk: LandingHarness) -> None:
    desk.put(
        "a.csv",
        line("a", amount="x", side="up"),
        line("", amount=2000),
        line("c", amount="nan", side="up"),
        line("d", amount=-1, side="up"),
        line("e", amount=2000, side="up"),
        line("f", at="2024-06-01", side="up"),
        line("g", at="2024-06-01", amount=200),
        line("h", amount=200),
        line("i"),
        line("i", amount=200),
        line("i", amount=2),
        line("j", known=""),
        line("k", known="", amount=-1, side=""),
    )
    found = desk.land()
    assert [q["rule"] for q in desk.rows("quarantine")] == [
        "type:amount",
        "required:id",
        "not_finite:amount",
        "below_min:amount",
        "above_max:amount",
        "not_allowed:side",
        "from_the_future",
        "too_dear_on_the_left",
        "too_dear_on_the_left",
        "duplicate",
        "required:known_at",
        "required:known_at",
    ]
    assert (found.accepted, found.quarantined, found.accepted_by_day) == (1, 12, {date(2024, 5, 1): 1})
    assert found.rules["too_dear_on_the_left"] == 2 and sum(found.rules.values()) == 12
    details = [q["detail"] for q in desk.rows("quarantine")]
    assert details[7] == "side = 'left' AND amount > 100: amount = 200.0, side = left"
    assert details[9] == "id = i stands already in row 9 of a.csv"


def test_a_row_that_is_broken_itself_pushes_out_no_other(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a", amount=-1), line("a", amount=7))
    desk.land()
    assert desk.live() == {"a": 7.0}


def test_texts_that_mean_null_are_null_and_stand_in_the_raw_row(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a", side="?"), line("?", side="left"))
    desk.land(null=["?"])
    assert [e["side"] for e in desk.rows("events")] == [None]
    assert json.loads(desk.rows("quarantine")[0]["raw"])["id"] == "?"


def test_times_with_an_offset_are_turned_to_utc(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a", at="2024-05-01T00:30:00+02:00"), line("b", at="2024-05-01 00:30:00Z"))
    desk.land()
    found = {e["id"]: (e["event_at"], e["day"]) for e in desk.rows("events")}
    assert found["a"] == (datetime(2024, 4, 30, 22, 30), date(2024, 4, 30))
    assert found["b"] == (datetime(2024, 5, 1, 0, 30), date(2024, 5, 1))


@pytest.mark.parametrize("at", ["0016-05-01", "infinity", "9999-12-31", "5/1/2024", "2024-02-30", "1-2-16"])
def test_a_time_that_cannot_be_meant_is_quarantined(desk: LandingHarness, at: str) -> None:
    desk.put("a.csv", line("a", at=at))
    assert desk.land().rules == {"type:event_at": 1}


def test_every_row_of_every_file_is_accepted_or_quarantined(desk: LandingHarness) -> None:
    for day in range(1, 6):
        desk.put(
            f"2024-05-0{day}.csv", *(line(f"{day}-{i}", amount=i - 2) for i in range(50)), "too,few\n", line("same")
        )
    found = desk.land()
    assert found.accepted + found.quarantined == 5 * 52
    assert [(f.rows, f.accepted, f.quarantined) for f in found.files] == [(52, 49, 3), *[(52, 48, 4)] * 4]
    assert (len(desk.rows("events")), len(desk.rows("quarantine"))) == (found.accepted, found.quarantined)
    assert found.versions == {f"shop/{t}": desk.lake.version(f"shop/{t}") for t in ("events", "quarantine", "files")}


def test_days_choose_among_files_that_name_their_day(desk: LandingHarness) -> None:
    for day in (1, 2, 3):
        desk.put(f"in-2024-05-0{day}.csv", line(str(day)))
    desk.put("in-latest.csv", line("never"))
    found = desk.land(files="in-{day}.csv", days=[date(2024, 5, 2), date(2024, 5, 7)])
    assert found.new == ("in-2024-05-02.csv",)
    assert set(desk.land(files="in-{day}.csv").new) == {"in-2024-05-01.csv", "in-2024-05-03.csv"}
    assert set(desk.live()) == {"1", "2", "3"}


def test_a_landing_zone_whose_path_looks_like_a_pattern_is_read_as_it_is(tmp_path: Path) -> None:
    desk = LandingHarness(tmp_path / "a[bc]*", tmp_path / "lake")
    other = LandingHarness(tmp_path / "ab")
    other.put("never.csv", line("never"))
    desk.put("it's ü.csv", line("a"))
    assert desk.land().new == ("it's ü.csv",)
    assert desk.land().new == ()


def test_files_at_an_address_land_without_its_secrets_in_the_manifest(desk: LandingHarness) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/in/a.csv", (HEADER + line("a")).encode())
    try:
        assert desk.land(files="memory://bucket/in/*.csv").new == ("memory://bucket/in/a.csv",)
    finally:
        memory.rm("/bucket", recursive=True)


def test_two_sources_of_one_workflow_may_read_the_same_file(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"), line("b"))
    (desk.root / "other.sql").write_text(SQL.replace("id,", "'o-' || id AS id,"))
    found = desk.land(sources={"first": {}, "second": {"sql": "other.sql"}})
    assert found.accepted == 4 and set(desk.live()) == {"a", "b", "o-a", "o-b"}
    assert {(r["source"], r["status"]) for r in desk.rows("files")} == {("first", "landed"), ("second", "landed")}


def test_a_refused_file_is_recorded_once_however_often_it_is_tried(desk: LandingHarness) -> None:
    desk.put("bad.csv", "a,b\n")
    (desk.zone / "bad.csv").write_text("a,b\n1,2\n")
    first = desk.land()
    again = desk.land(now=LATER)
    assert first.refused == again.refused and first.versions == again.versions
    assert [r["landed_at"] for r in desk.rows("files")] == [NOW]


def test_landing_times_are_kept_when_a_file_is_seen_again(desk: LandingHarness) -> None:
    (desk.root / "mapping.sql").write_text(SQL.replace("known AS known_at,", ""))
    desk.put("a.csv", line("a"))
    desk.land(known_at="landing")
    before = desk.digests()
    assert desk.rows("events")[0]["known_at"] == NOW
    desk.land(now=LATER, known_at="landing")
    assert desk.digests() == before


# --- restated files


def test_a_restated_file_supersedes_its_rows_and_is_known_from_then_on(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a", amount=1), line("b", amount=2), line("c", amount=-1))
    desk.put("b.csv", line("z"))
    desk.land()
    desk.put("a.csv", line("a", amount=10), line("c", amount=3))
    found = desk.land(now=LATER)
    assert found.new == ("a.csv",) and found.rules == {}
    assert desk.live() == {"a": 10.0, "c": 3.0, "z": 1.0}
    old = [e for e in desk.rows("events") if e["superseded_at"] is not None]
    assert {(e["id"], e["amount"], e["superseded_at"]) for e in old} == {("a", 1.0, LATER), ("b", 2.0, LATER)}
    new = [e for e in desk.rows("events") if e["source_file"] == "a.csv" and e["superseded_at"] is None]
    assert {e["known_at"] for e in new} == {LATER}
    assert len(desk.rows("quarantine")) == 1
    states = [(r["status"], r["landed_at"], r["superseded_at"]) for r in desk.rows("files") if r["path"] == "a.csv"]
    assert states == [("landed", NOW, LATER), ("landed", LATER, None)]


def test_every_point_in_time_sees_one_content_of_a_path(desk: LandingHarness) -> None:
    times = [NOW + timedelta(hours=h) for h in range(3)]
    for now, amount in zip(times, (1, 2, 1), strict=True):
        desk.put("a.csv", line("a", amount=amount), line("b", amount=amount))
        desk.land(now=now)
    events = desk.rows("events")
    for cutoff, amount in zip(times, (1, 2, 1), strict=True):
        seen = [
            e for e in events if e["known_at"] <= cutoff and (e["superseded_at"] is None or e["superseded_at"] > cutoff)
        ]
        assert sorted((e["id"], e["amount"]) for e in seen) == [("a", amount), ("b", amount)]
    assert len(events) == 6 and len(desk.rows("files")) == 3


def test_a_bad_replacement_leaves_the_landed_rows_live(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    desk.land()
    (desk.zone / "a.csv").write_text("nonsense\n1\n")
    assert "a.csv" in desk.land(now=LATER).refused
    assert desk.live() == {"a": 1.0}
    desk.put("a.csv", line("a"))
    desk.land(now=LATER)
    assert [r["status"] for r in desk.rows("files")] == ["landed"]


def test_rows_stay_while_another_path_holds_the_same_content(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    desk.put("b.csv", line("a"))
    desk.land()
    desk.put("a.csv", line("c"))
    desk.land(now=LATER)
    assert set(desk.live()) == {"a", "c"}
    status = {(r["path"], r["status"], r["accepted"]) for r in desk.rows("files") if r["superseded_at"] is None}
    assert status == {("a.csv", "landed", 1), ("b.csv", "landed", 1)}


def test_two_paths_that_swap_their_contents_keep_every_row_once(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    desk.put("b.csv", line("b"))
    desk.land()
    desk.put("a.csv", line("b"))
    desk.put("b.csv", line("a"))
    desk.land(now=LATER)
    live = [e["id"] for e in desk.rows("events") if e["superseded_at"] is None]
    assert sorted(live) == ["a", "b"]


def test_a_landing_into_one_day_leaves_the_files_of_other_days_alone(desk: LandingHarness) -> None:
    days = [date(2024, 1, 1) + timedelta(days=n) for n in range(8)]
    for day in days:
        desk.put(f"{day}.csv", *(line(f"{day}-{i}", at=str(day)) for i in range(3)))
    desk.land()
    before = {p for p in (desk.root / "lake").rglob("*.parquet") if "events" in p.parts}
    desk.put("late.csv", line("late", at="2024-01-05"))
    desk.land(now=LATER)
    new = {p for p in (desk.root / "lake").rglob("*.parquet") if "events" in p.parts} - before
    assert {p.parent.name for p in new} == {"day=2024-01-05"}


def test_a_second_ingest_of_the_workflow_waits_for_the_first(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"))
    with ThreadPoolExecutor(1) as pool:
        with manifest._only_writer(desk.lake, "shop"):
            second = pool.submit(desk.land)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.3)
            assert not desk.lake.exists("shop/files")
        assert second.result(timeout=60).accepted == 1


# --- crashes


@contextmanager
def _dying(monkeypatch: pytest.MonkeyPatch, at: int, after: bool = False) -> Iterator[None]:
    """The process dies at (or right after) its nth write to a table."""
    writes = 0

    def mortal(usual: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: Lake, *args: Any, **kwargs: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == at and not after:
                raise KeyboardInterrupt
            done = usual(self, *args, **kwargs)
            if writes == at:
                raise KeyboardInterrupt
            return done

        return write

    with monkeypatch.context() as patched:
        for name in ("replace", "restore"):
            patched.setattr(Lake, name, mortal(getattr(Lake, name)))
        yield


def _stage_one(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a"), line("b", amount=-1), line("c", at="2024-04-30"))
    desk.put("b.csv", line("d"), "torn\n")
    (desk.zone / "bad.csv").write_text("x\n1\n")
    desk.land()


def _stage_two(desk: LandingHarness) -> None:
    desk.put("a.csv", line("a", amount=5), line("b", amount=-2), line("e"))
    desk.put("c.csv", line("f"), line("d", amount=3))
    desk.put("copy.csv", line("f"), line("d", amount=3))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    desk = LandingHarness(tmp_path_factory.mktemp("undisturbed"))
    _stage_one(desk)
    _stage_two(desk)
    desk.land(now=LATER)
    return desk.digests()


@pytest.mark.parametrize("after", [False, True], ids=["before_the_write", "after_the_write"])
@pytest.mark.parametrize("at", range(1, 5))
def test_a_crash_at_any_write_ends_in_the_same_tables(
    desk: LandingHarness, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, at: int, after: bool
) -> None:
    _stage_one(desk)
    _stage_two(desk)
    with _dying(monkeypatch, at, after), pytest.raises(KeyboardInterrupt):
        desk.land(now=LATER)
    # the landing time of an interrupted attempt is kept from its first write on
    desk.land(now=LATER if (at, after) == (1, False) else LATER + timedelta(hours=7))
    found = desk.digests()
    assert (found["events"], found["quarantine"]) == (undisturbed["events"], undisturbed["quarantine"])
    assert found["files"] == undisturbed["files"]


def test_a_crash_in_the_recovery_of_a_crash_ends_in_the_same_tables(
    desk: LandingHarness, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _stage_one(desk)
    _stage_two(desk)
    for last in (4, 1, 2, 3, 5, 6, 7, 4, 2):
        with _dying(monkeypatch, last), pytest.raises(KeyboardInterrupt):
            desk.land(now=LATER)
    desk.land(now=LATER)
    assert desk.digests() == undisturbed


@pytest.mark.parametrize("at", [2, 3, 4])
def test_what_an_earlier_release_left_interrupted_is_taken_back(
    desk: LandingHarness, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    _stage_one(desk)
    _stage_two(desk)

    def unsaid(record: landing.FileRecord, **fields: Any) -> landing.FileRecord:
        return dataclasses.replace(record, **fields | ({"reason": None} if fields.get("status") == "landing" else {}))

    with monkeypatch.context() as patched:
        patched.setattr(landing_step, "replace", unsaid)
        with _dying(monkeypatch, at), pytest.raises(KeyboardInterrupt):
            desk.land(now=LATER)
    assert [r["reason"] for r in desk.rows("files") if r["status"] == "landing"] == [None] * 3
    desk.land(now=LATER)
    assert desk.digests() == undisturbed


def test_an_interrupted_file_that_changed_before_the_next_run_leaves_nothing_behind(
    desk: LandingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.put("a.csv", line("a"))
    desk.land()
    desk.put("a.csv", line("b"), line("c", amount=-1))
    with _dying(monkeypatch, 3, after=True), pytest.raises(KeyboardInterrupt):
        desk.land(now=LATER)
    assert len(desk.rows("events")) == 2
    desk.put("a.csv", line("a"))
    desk.land(now=LATER)
    assert desk.live() == {"a": 1.0} and len(desk.rows("events")) == 1
    assert desk.rows("quarantine") == []
    assert [(r["status"], r["superseded_at"]) for r in desk.rows("files")] == [("landed", None)]


# --- damage of any kind


_DAMAGE = st.sampled_from(['"', ",", "\n", "\r", "\x00", ";", "nan", "-", "1e999", "é", " ", '""', "\\", "'"])


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 2000)), max_size=12),
    damage=st.lists(st.tuples(st.integers(0, 400), _DAMAGE), max_size=4),
    chunk=st.integers(1, 6),
)
def test_no_damage_loses_a_row(rows: list[tuple[str, int]], damage: list[tuple[int, str]], chunk: int) -> None:
    text = "".join(line(name, amount=amount) for name, amount in rows)
    for at, piece in damage:
        at = min(at, len(text))
        text = text[:at] + piece + text[at:]
    try:
        snap_rows = _read(HEADER + text, chunk)
    except landing.FileRefused as error:
        assert '"' in text and "quote" in str(error)
        with pytest.raises(landing.FileRefused, match=re.escape(str(error))):
            _read(HEADER + text, 20_000)
        return
    numbers = [*snap_rows.table["source_row"].to_pylist(), *(m[0] for m in snap_rows.malformed)]
    assert sorted(numbers) == list(range(1, snap_rows.rows + 1))
    if '"' not in text:
        physical = [part.strip("\r") for part in text.split("\n") if part.strip("\r")]
        assert snap_rows.rows == len(physical)
        assert {m[1] for m in snap_rows.malformed} <= set(physical)
        bad = [part for part in physical if part.count(",") != 4 or "\r" in part or "\0" in part]
        assert len(snap_rows.malformed) == len(bad)
    whole = _read(HEADER + text, 20_000)
    assert (whole.rows, whole.malformed, whole.table) == (snap_rows.rows, snap_rows.malformed, snap_rows.table)
    # each character of the file is in an accepted field or in a malformed line
    fields = "".join(v for column in whole.table.drop_columns("source_row").columns for v in column.to_pylist())
    kept = sorted(fields + "".join(m[1] for m in whole.malformed))
    for character in set(text) - set('",\r\n'):
        assert kept.count(character) >= text.count(character)


def _read(text: str, chunk: int) -> landing.Raw:
    source = Source.model_validate(FIELDS)
    usual = readers._CHUNK_LINES
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(text.encode())
        readers._CHUNK_LINES = chunk
        try:
            return landing.read_rows(landing.Snapshot("a.csv", path, "", 0), source)
        finally:
            readers._CHUNK_LINES = usual


@settings(max_examples=examples(15))
@example(rows=[], damage=[(0, '"')])
@given(
    rows=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-3, 2000)), max_size=10),
    damage=st.lists(st.tuples(st.integers(0, 400), _DAMAGE), max_size=3),
)
def test_a_damaged_file_lands_whole_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], damage: list[tuple[int, str]]
) -> None:
    desk = LandingHarness(tmp_path_factory.mktemp("damaged"))
    text = "".join(line(name, amount=amount) for name, amount in rows)
    for at, piece in damage:
        text = text[: min(at, len(text))] + piece + text[min(at, len(text)) :]
    (desk.zone / "a.csv").write_bytes((HEADER + text).encode())
    (record,) = desk.land().files
    if record.status == "refused":
        tables = [name for name in ("events", "quarantine") if desk.lake.exists(f"shop/{name}")]
        assert '"' in text and not any(desk.rows(name) for name in tables)
        return
    assert record.accepted + record.quarantined == record.rows == _read(HEADER + text, 20_000).rows
    assert (len(desk.rows("events")), len(desk.rows("quarantine"))) == (record.accepted, record.quarantined)
    assert all(json.loads(q["raw"]) and q["detail"] for q in desk.rows("quarantine"))
    amounts = [e["amount"] for e in desk.rows("events")]
    assert all(0 <= a <= 1000 for a in amounts)


def test_the_files_of_a_source_come_sorted_whatever_the_order_of_days(desk: LandingHarness) -> None:
    for day in (3, 1, 2):
        desk.put(f"2024-05-0{day}.csv", line("a"))
    source = Source.model_validate({**FIELDS, "files": "{day}.csv"})
    names = [f.name for f in discover(desk.zone, source, [date(2024, 5, d) for d in (2, 3, 1)])]
    assert names == ["2024-05-01.csv", "2024-05-02.csv", "2024-05-03.csv"]
