"""Every way in which a file has come in bad: a clear error or a quarantined row, and nothing half-landed."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipeline import ingest as landing
from pipeline.ingest import FileRefused, IngestResult, discover, ingest, readers
from pipeline.lake import Lake
from pipeline.workflow import Contract, Source, Workflow

NOW = datetime(2024, 5, 2, 4)
HEADER = "order,day,spend,clicks\n"
GOOD = HEADER + "a,1/5/2024,10.5,3\nb,30/4/2024,2.25,1\n"
SQL = """
SELECT source_row, "order" AS order_id, parse_time(day, '%d/%m/%Y') AS event_at, spend, clicks
FROM raw
"""
CONTRACT = {
    "events": {
        "columns": {
            "order_id": {"type": "VARCHAR", "required": True},
            "spend": {"type": "DOUBLE", "required": True, "min": 0},
            "clicks": {"type": "BIGINT", "min": 0},
        },
        "unique": ["order_id", "event_at"],
    }
}
FIELDS: dict[str, Any] = {
    "files": "*",
    "format": "csv",
    "sql": "orders.sql",
    "known_at": "landing",
    "columns": ["order", "day", "spend", "clicks"],
}


@dataclass
class BadInputHarness:
    """A landing zone with one workflow, and the lake behind it."""

    root: Path
    lake: Lake

    @property
    def zone(self) -> Path:
        return self.root / "landing" / "shop"

    def put(self, name: str, content: str | bytes) -> Path:
        path = self.zone / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def land(
        self, now: datetime = NOW, sql: str = SQL, max_bytes: int = landing.MAX_BYTES, **fields: Any
    ) -> IngestResult:
        (self.root / "orders.sql").write_text(sql)
        workflow = Workflow.model_construct(
            name="shop",
            sources={"orders": Source.model_validate({**FIELDS, **fields})},
            contract=Contract.model_validate(CONTRACT),
            folder=self.root,
        )
        return ingest(workflow, self.lake, self.root / "landing", now=now, max_bytes=max_bytes)

    def rows(self, table: str) -> list[dict[str, Any]]:
        return self.lake.read(f"shop/{table}").to_pylist() if self.lake.exists(f"shop/{table}") else []

    def refusal(self, name: str, **fields: Any) -> str:
        """Land a bad file beside a good one; the good one lands, of the bad one nothing does."""
        self.put("good.csv", GOOD)
        found = self.land(**fields)
        assert list(found.refused) == [name]
        assert {e["source_file"] for e in self.rows("events")} == {"good.csv"}
        assert self.rows("quarantine") == []
        (record,) = [r for r in self.rows("files") if r["path"] == name]
        assert (record["status"], record["reason"], record["rows"]) == ("refused", found.refused[name], 0)
        assert name in found.refused[name]
        return found.refused[name]

    def broken(self, content: str, **fields: Any) -> list[tuple[int, str, str]]:
        """Land one file; the quarantined rows as (row, rule, detail), after counting that no row is lost."""
        self.put("orders.csv", content)
        found = self.land(**fields)
        assert found.refused == {}
        (record,) = found.files
        assert record.accepted + record.quarantined == record.rows
        assert (len(self.rows("events")), len(self.rows("quarantine"))) == (record.accepted, record.quarantined)
        return [(q["source_row"], q["rule"], q["detail"]) for q in self.rows("quarantine")]


@pytest.fixture
def desk(tmp_path: Path) -> BadInputHarness:
    return BadInputHarness(tmp_path, Lake(str(tmp_path / "lake")))


def test_a_good_file_lands_with_its_place_and_times(desk: BadInputHarness) -> None:
    assert desk.broken(GOOD) == []
    first = desk.rows("events")[0] if desk.rows("events")[0]["order_id"] == "a" else desk.rows("events")[1]
    assert first["spend"] == 10.5 and first["clicks"] == 3
    assert first["event_at"] == datetime(2024, 5, 1) and first["known_at"] == NOW
    assert (first["source"], first["source_file"], first["source_row"]) == ("orders", "orders.csv", 1)
    assert first["day"].isoformat() == "2024-05-01" and first["superseded_at"] is None


def test_a_truncated_gzip_is_refused_with_the_bytes_that_were_good(desk: BadInputHarness) -> None:
    rows = "".join(f"o{i},1/5/2024,{i}.5,{i * 7919 % 1000}\n" for i in range(5000))
    desk.put("orders.csv.gz", gzip.compress((HEADER + rows).encode())[:-2000])
    said = desk.refusal("orders.csv.gz")
    assert "truncated" in said
    good = int(said.split(" bytes were good")[0].rsplit(" ", 1)[1].replace(",", ""))
    assert 1000 < good < len(HEADER + rows)


def test_a_gzip_with_a_flipped_byte_is_refused(desk: BadInputHarness) -> None:
    packed = bytearray(gzip.compress(GOOD.encode()))
    packed[-6] ^= 0xFF
    desk.put("orders.csv.gz", bytes(packed))
    assert "damaged" in desk.refusal("orders.csv.gz")


def test_gzip_members_one_after_the_other_are_one_file(desk: BadInputHarness) -> None:
    desk.put("orders.csv.gz", gzip.compress(GOOD.encode()) + gzip.compress(b"c,1/5/2024,1,1\n"))
    assert desk.land().accepted == 3


def test_a_wrong_delimiter_is_refused_with_the_right_one(desk: BadInputHarness) -> None:
    desk.put("orders.csv", GOOD.replace(",", ";"))
    said = desk.refusal("orders.csv")
    assert "4 columns at a semicolon" in said and 'delimiter: ";"' in said


def test_a_wrong_delimiter_is_found_where_no_columns_are_declared(desk: BadInputHarness) -> None:
    desk.put("orders.csv", GOOD.replace(",", "\t"))
    assert "columns at a tab" in desk.refusal("orders.csv", columns=None)


def test_a_byte_order_mark_is_no_part_of_the_first_column(desk: BadInputHarness) -> None:
    desk.put("orders.csv", b"\xef\xbb\xbf" + GOOD.encode())
    assert desk.land().accepted == 2


def test_utf16_with_its_mark_is_read_where_declared_and_refused_with_a_hint_elsewhere(desk: BadInputHarness) -> None:
    desk.put("orders.csv", GOOD.encode("utf-16"))
    assert "utf-16" in desk.land().refused["orders.csv"]
    assert desk.land(encoding="utf-16").accepted == 2


def test_latin_1_is_refused_with_line_and_byte_and_lands_where_declared(desk: BadInputHarness) -> None:
    text = HEADER + "a,1/5/2024,1,1\nb,1/5/2024,1,1\nm\u00fcller,1/5/2024,1,1\n"
    desk.put("orders.csv", text.encode("latin-1"))
    said = desk.refusal("orders.csv")
    assert "line 4" in said and f"byte {text.index(chr(0xFC))} " in said and "encoding: latin-1" in said
    desk.land(encoding="latin-1")
    assert "m\u00fcller" in {e["order_id"] for e in desk.rows("events")}
    assert [r["status"] for r in desk.rows("files") if r["path"] == "orders.csv"] == ["landed"]


def test_the_place_of_a_wrong_byte_is_right_beyond_the_first_block(
    desk: BadInputHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK", 7)
    body = HEADER.encode() + "\u00e4\u20ac,1/5/2024,1,1\n".encode() * 9
    desk.put("orders.csv", body + b"\xff,1/5/2024,1,1\n")
    said = desk.refusal("orders.csv")
    assert "line 11" in said and f"byte {len(body)} (0xff)" in said


def test_a_duplicate_header_is_refused_and_lands_with_given_names(desk: BadInputHarness) -> None:
    desk.put("orders.csv", GOOD.replace("clicks", "spend"))
    said = desk.refusal("orders.csv")
    assert "'spend' twice" in said and "header: given" in said
    assert desk.land(columns=None).refused["orders.csv"] == said
    assert "orders.csv" in desk.land(header="given").new


def test_names_that_differ_in_case_only_are_one_name_twice(desk: BadInputHarness) -> None:
    desk.put("orders.csv", GOOD.replace("clicks", "SPEND"))
    assert "twice" in desk.refusal("orders.csv", columns=None)


def test_given_names_that_do_not_cover_the_header_are_refused(desk: BadInputHarness) -> None:
    desk.put("orders.csv", "order,day,spend\na,1/5/2024,1\n")
    assert "has 3 columns" in desk.refusal("orders.csv", header="given")


def test_a_missing_column_is_refused_by_name(desk: BadInputHarness) -> None:
    desk.put("orders.csv", "order,day,clicks\na,1/5/2024,1\n")
    assert "column 'spend' is missing" in desk.refusal("orders.csv")


def test_a_missing_column_is_refused_where_only_the_sql_names_it(desk: BadInputHarness) -> None:
    desk.put("orders.csv", "order,day,clicks\na,1/5/2024,1\n")
    said = desk.refusal("orders.csv", columns=None)
    assert "orders.sql" in said and "spend" in said


def test_a_new_column_is_refused_by_name_unless_it_may_be_ignored(desk: BadInputHarness) -> None:
    desk.put("orders.csv", "order,day,spend,clicks,colour\nn,1/5/2024,1,1,red\n")
    said = desk.refusal("orders.csv")
    assert "new column 'colour'" in said and "extra_columns: ignore" in said
    assert desk.land(extra_columns="ignore").accepted == 1


def test_columns_in_another_order_land_by_name(desk: BadInputHarness) -> None:
    assert desk.broken("clicks,spend,day,order\n3,10.5,1/5/2024,a\n") == []
    assert (desk.rows("events")[0]["order_id"], desk.rows("events")[0]["clicks"]) == ("a", 3)


def test_dates_in_the_wrong_order_are_quarantined_with_the_format_they_missed(desk: BadInputHarness) -> None:
    found = desk.broken(HEADER + "a,4/30/2024,1,1\nb,2024-04-30,1,1\nc,30/4/24,1,1\nd,30/4/2024,1,1\n")
    assert [(row, rule) for row, rule, _ in found] == [(1, "type:event_at"), (2, "type:event_at"), (3, "type:event_at")]
    assert "4/30/2024" in found[0][2] and "%d/%m/%Y" in found[0][2]


def test_an_event_after_it_was_known_is_from_the_future(desk: BadInputHarness) -> None:
    ((row, rule, detail),) = desk.broken(HEADER + "a,1/6/2024,1,1\nb,1/5/2024,1,1\n")
    assert (row, rule) == (1, "from_the_future")
    assert "event_at = 2024-06-01" in detail and "known_at = 2024-05-02" in detail


def test_numbers_with_commas_are_quarantined(desk: BadInputHarness) -> None:
    found = desk.broken(
        HEADER + 'a,1/5/2024,"1,234.50",1\nb,1/5/2024,"1.234,50",1\nc,1/5/2024,1_000,1\nd,1/5/2024,1e3,1\n'
    )
    assert [(row, rule) for row, rule, _ in found] == [(1, "type:spend"), (2, "type:spend"), (3, "type:spend")]
    assert found[0][2] == "spend = 1,234.50 is not a DOUBLE"
    assert [e["spend"] for e in desk.rows("events")] == [1000.0]


def test_an_unquoted_comma_in_a_number_is_a_malformed_row_with_its_line(desk: BadInputHarness) -> None:
    ((row, rule, detail),) = desk.broken(HEADER + "a,1/5/2024,1,234.50,1\nb,1/5/2024,1,1\n")
    assert (row, rule, detail) == (1, "malformed", "line 2: 5 fields where the header has 4")
    assert json.loads(desk.rows("quarantine")[0]["raw"]) == {"line": "a,1/5/2024,1,234.50,1"}


def test_a_fraction_is_never_rounded_into_a_whole_number(desk: BadInputHarness) -> None:
    assert [rule for _, rule, _ in desk.broken(HEADER + "a,1/5/2024,1,1.5\nb,1/5/2024,1,2.0\n")] == ["type:clicks"]
    assert [e["clicks"] for e in desk.rows("events")] == [2]


def test_nan_infinite_and_negative_money_is_quarantined(desk: BadInputHarness) -> None:
    found = desk.broken(
        HEADER
        + "a,1/5/2024,NaN,1\nb,1/5/2024,inf,1\nc,1/5/2024,-Infinity,1\n"
        + "d,1/5/2024,1e999,1\ne,1/5/2024,-0.01,1\nf,1/5/2024,0,1\n"
    )
    assert [rule for _, rule, _ in found] == ["not_finite:spend"] * 4 + ["below_min:spend"]
    assert found[4][2] == "spend = -0.01 is below 0"
    assert json.loads(desk.rows("quarantine")[0]["raw"]) == {
        "order": "a",
        "day": "1/5/2024",
        "spend": "NaN",
        "clicks": "1",
    }


def test_a_file_of_0_bytes_is_refused(desk: BadInputHarness) -> None:
    desk.put("orders.csv", b"")
    assert "empty file (0 bytes)" in desk.refusal("orders.csv")


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf", b"\n\r\n\n", gzip.compress(b"", mtime=0)])
def test_a_file_without_a_header_is_refused(desk: BadInputHarness, content: bytes) -> None:
    desk.put("orders.csv", content)
    assert "empty file" in desk.refusal("orders.csv")


def test_a_file_with_a_header_and_no_rows_lands_no_rows(desk: BadInputHarness) -> None:
    assert desk.broken(HEADER) == []
    assert desk.rows("files")[0]["status"] == "landed"
    assert desk.lake.exists("shop/events") and desk.lake.exists("shop/quarantine")


def test_a_file_of_1000_columns_is_refused_in_a_short_sentence(desk: BadInputHarness) -> None:
    desk.put("orders.csv", ",".join(f"column_{i}" for i in range(1000)) + "\n" + ",".join("1" * 1000) + "\n")
    said = desk.refusal("orders.csv", columns=None)
    assert "1,000 columns" in said and len(said) < 200
    assert len(desk.land().refused["orders.csv"]) < 200


def _replaced_on_read(monkeypatch: pytest.MonkeyPatch, victim: Path, contents: list[bytes]) -> None:
    """Each time the file is opened, another content takes its place before it is read to the end."""
    usual: Callable[..., Any] = LocalFileSystem.open

    def opened(self: LocalFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        file = usual(self, path, *args, **kwargs)
        if Path(path) == victim and contents:
            beside = victim.with_suffix(".part")
            beside.write_bytes(contents.pop(0))
            os.replace(beside, victim)
        return file

    monkeypatch.setattr(LocalFileSystem, "open", opened)


def test_a_file_replaced_while_it_is_read_is_read_again(desk: BadInputHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = desk.put("orders.csv", GOOD)
    _replaced_on_read(monkeypatch, victim, [(HEADER + "z,1/5/2024,1,1\n").encode()])
    assert desk.land().accepted == 1
    assert [e["order_id"] for e in desk.rows("events")] == ["z"]


def test_a_file_replaced_again_and_again_is_refused_and_lands_later(
    desk: BadInputHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = desk.put("orders.csv", GOOD)
    _replaced_on_read(monkeypatch, victim, [GOOD.encode(), (HEADER + "z,1/5/2024,1,1\n").encode()])
    assert "replaced while it was read" in desk.land().refused["orders.csv"]
    assert desk.rows("events") == []
    assert desk.land().accepted == 1
    assert [r["status"] for r in desk.rows("files")] == ["landed"]


def test_the_same_file_landed_twice_adds_nothing(desk: BadInputHarness) -> None:
    desk.put("orders.csv", GOOD)
    desk.land()
    again = desk.land()
    assert (again.new, again.accepted) == ((), 0)
    desk.put("orders (1).csv", GOOD)
    copied = desk.land()
    assert (copied.accepted, copied.quarantined) == (0, 0)
    assert len(desk.rows("events")) == 2
    found = {r["path"]: (r["status"], r["duplicate_of"]) for r in desk.rows("files")}
    assert found == {"orders.csv": ("landed", None), "orders (1).csv": ("duplicate", "orders.csv")}


def test_rows_that_another_file_holds_already_are_duplicates_with_the_place_of_the_first(desk: BadInputHarness) -> None:
    desk.put("a.csv", GOOD)
    desk.put("b.csv", HEADER + "c,1/5/2024,1,1\na,1/5/2024,99,1\n")
    desk.land()
    desk.put("c.csv", HEADER + "c,1/5/2024,5,1\n")
    desk.land()
    found = {(q["source_file"], q["source_row"]): (q["rule"], q["detail"]) for q in desk.rows("quarantine")}
    assert found["b.csv", 2] == (
        "duplicate",
        "order_id = a, event_at = 2024-05-01 00:00:00 stands already in row 1 of a.csv",
    )
    assert found["c.csv", 1][1].endswith("row 1 of b.csv") and len(found) == 2


@pytest.mark.parametrize(
    "pattern", ["../other/*.csv", "/etc/passwd", "a/../../x.csv", "..\\x.csv", "C:\\x.csv", "memory://a/../b"]
)
def test_a_pattern_that_climbs_out_of_the_landing_zone_is_refused(desk: BadInputHarness, pattern: str) -> None:
    desk.put("good.csv", GOOD)
    with pytest.raises(FileRefused, match="climbs out of the landing zone"):
        desk.land(files=pattern)
    assert desk.rows("files") == []


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_link_out_of_the_landing_zone_is_refused(desk: BadInputHarness, whole_folder: bool) -> None:
    outside = desk.root / "outside" / "orders.csv"
    outside.parent.mkdir()
    outside.write_text(GOOD)
    desk.zone.mkdir(parents=True)
    if whole_folder:
        (desk.zone / "in").symlink_to(outside.parent)
    else:
        (desk.zone / "in").mkdir()
        (desk.zone / "in" / "orders.csv").symlink_to(outside)
    found = desk.land(files="in/*.csv")
    assert "leads out of the landing zone" in found.refused["in/orders.csv"]
    assert desk.rows("events") == desk.rows("quarantine") == []


def test_a_link_within_the_landing_zone_is_followed_and_one_to_nothing_refused(desk: BadInputHarness) -> None:
    real = desk.put("in/orders.csv", GOOD)
    (desk.zone / "link.csv").symlink_to(real)
    (desk.zone / "nothing.csv").symlink_to(desk.zone / "gone.csv")
    found = desk.land(files="*.csv")
    assert found.new == ("link.csv",) and "link to nothing" in found.refused["nothing.csv"]


def test_a_pipe_in_the_landing_zone_is_refused_and_does_not_hang(desk: BadInputHarness) -> None:
    desk.zone.mkdir(parents=True)
    os.mkfifo(desk.zone / "pipe.csv")
    assert "not a plain file" in desk.refusal("pipe.csv")


def test_hidden_and_unfinished_files_are_left_alone(desk: BadInputHarness) -> None:
    for name in (".orders.csv", "orders.csv.tmp", "orders.csv.PART", ".hidden/orders.csv"):
        desk.put(name, "never read")
    desk.put("good.csv", GOOD)
    found = discover(desk.zone, Source.model_validate({**FIELDS, "files": "**"}))
    assert [f.name for f in found] == ["good.csv"]


def _zip(members: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return packed.getvalue()


def test_a_zip_with_one_data_file_lands(desk: BadInputHarness) -> None:
    desk.put("orders.zip", _zip({"export/": "", "export/orders.csv": GOOD, "__MACOSX/export/._orders.csv": "x"}))
    assert desk.land().accepted == 2


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"../orders.csv": GOOD}, "climbs out"),
        ({"/orders.csv": GOOD}, "climbs out"),
        ({"..\\orders.csv": GOOD}, "climbs out"),
        ({"a.csv": GOOD, "b.csv": GOOD}, "holds 2"),
        ({}, "holds 0"),
    ],
)
def test_a_zip_with_another_content_is_refused(desk: BadInputHarness, members: dict[str, str], said: str) -> None:
    desk.put("orders.zip", _zip(members))
    assert said in desk.refusal("orders.zip")


def test_a_truncated_or_damaged_zip_is_refused(desk: BadInputHarness) -> None:
    packed = bytearray(_zip({"orders.csv": GOOD * 50}))
    desk.put("short.zip", bytes(packed[:-30]))
    packed[60] ^= 0xFF
    desk.put("damaged.zip", bytes(packed))
    found = desk.land()
    assert all("the zip is damaged" in said for said in found.refused.values()) and len(found.refused) == 2
    assert desk.rows("events") == []


@pytest.mark.parametrize("pack", ["gzip", "zip"])
def test_a_bomb_is_refused_before_it_unpacks(desk: BadInputHarness, pack: str) -> None:
    text = HEADER + "a,1/5/2024,1,1\n" * 200_000
    desk.put("bomb", gzip.compress(text.encode()) if pack == "gzip" else _zip({"orders.csv": text}))
    assert "unpacks to more than 100,000 bytes" in desk.refusal("bomb", max_bytes=100_000)


def test_a_file_larger_than_the_bound_is_refused(desk: BadInputHarness) -> None:
    desk.put("orders.csv", HEADER + "a,1/5/2024,1,1\n" * 100)
    assert "larger than 1,000 bytes" in desk.refusal("orders.csv", max_bytes=1000)


def test_a_quote_that_never_closes_refuses_the_file_and_what_follows_it_is_no_row(desk: BadInputHarness) -> None:
    rows = "".join(f"c{i},1/5/2024,1,1\n" for i in range(300))
    desk.put("orders.csv", HEADER + 'a,1/5/2024,1,1\n"b,1/5/2024,1,1\n' + rows)
    said = desk.refusal("orders.csv")
    assert "line 3" in said and "never closes" in said and 'quote: ""' in said


def test_text_after_a_closing_quote_refuses_the_file(desk: BadInputHarness) -> None:
    text = HEADER + '"he said \\"hi\\"\nT-999,1/5/2024,1,1\nbye",1/5/2024,1,1\n'
    desk.put("orders.csv", text)
    said = desk.refusal("orders.csv")
    assert "line 2" in said and "follows a closing quote" in said


def test_a_quoted_field_that_swallows_lines_is_one_malformed_row_with_all_its_text(desk: BadInputHarness) -> None:
    found = desk.broken(HEADER + '"a,1/5/2024,1,1\nb,1/5/2024,1,1\n",1\nc,1/5/2024,1,1\n')
    assert found == [(1, "malformed", "line 2: 2 fields where the header has 4")]
    assert json.loads(desk.rows("quarantine")[0]["raw"])["line"] == '"a,1/5/2024,1,1\nb,1/5/2024,1,1\n",1'
    assert {e["order_id"]: e["source_row"] for e in desk.rows("events")} == {"c": 2}


def test_quotes_are_text_where_a_file_does_not_quote(desk: BadInputHarness) -> None:
    assert desk.broken(HEADER + '"b,1/5/2024,1,1\nc",1/5/2024,1,1\n', quote="") == []
    assert {e["order_id"] for e in desk.rows("events")} == {'"b', 'c"'}


def test_a_quoted_line_break_is_part_of_its_field(desk: BadInputHarness) -> None:
    assert desk.broken(HEADER + '"a\nand more, of it",1/5/2024,1,1\nb,1/5/2024,1,1\n') == []
    found = {e["source_row"]: e["order_id"] for e in desk.rows("events")}
    assert found == {1: "a\nand more, of it", 2: "b"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_way_and_blank_lines_are_no_rows(desk: BadInputHarness, end: str) -> None:
    text = "order,day,spend,clicks\na,1/5/2024,1,1\n\nb,1/5/2024,1,1\nc,1/5/2024,1,1"
    assert desk.broken(text.replace("\n", end)) == []
    assert [e["source_row"] for e in sorted(desk.rows("events"), key=lambda e: e["order_id"])] == [1, 2, 3]


def test_a_carriage_return_outside_of_quotes_ends_no_record_of_a_file_of_line_feeds(desk: BadInputHarness) -> None:
    text = "a,1/5/2024,1,1\nb\rT-999,1/5/2024,1,1\nc\r,1/5/2024,1,1\r\nd,1/5/2024,1,1\n"
    found = desk.broken(HEADER + text)
    assert [(row, rule) for row, rule, _ in found] == [(2, "malformed"), (3, "malformed")]
    assert json.loads(desk.rows("quarantine")[0]["raw"])["line"] == "b\rT-999,1/5/2024,1,1"
    assert {e["order_id"] for e in desk.rows("events")} == {"a", "d"}


def test_a_bad_json_line_is_malformed_and_the_others_land(desk: BadInputHarness) -> None:
    good = '{"order": "a", "day": "1/5/2024", "spend": 10.5, "clicks": 3}\n'
    bad = [
        "{",
        "[1]",
        '{"order": "b", "order": "c", "day": "1/5/2024", "spend": 1, "clicks": 1}',
        '{"order": "\\ud800", "day": "1/5/2024", "spend": 1, "clicks": 1}',
    ]
    nan = [f'{{"order": "n", "day": "1/5/2024", "spend": {v}, "clicks": null}}' for v in ("NaN", "-Infinity", "1e400")]
    found = desk.broken(good + "\n".join(bad) + "\n\n" + "\n".join(nan), format="jsonl")
    assert [(row, rule) for row, rule, _ in found] == [
        *((i, "malformed") for i in range(2, 8)),
        (8, "not_finite:spend"),
    ]
    assert found[4][2] == "line 7: NaN is no JSON value; write null where there is no number"
    assert (desk.rows("events")[0]["spend"], desk.rows("events")[0]["clicks"]) == (10.5, 3)


def test_json_lines_with_new_or_missing_keys_are_refused(desk: BadInputHarness) -> None:
    desk.put("new.jsonl", '{"order": "a", "day": "1/5/2024", "spend": 1, "clicks": 1, "colour": 1}\n')
    desk.put("old.jsonl", '{"order": "a", "day": "1/5/2024", "spend": 1}\n')
    found = desk.land(format="jsonl", files="*.jsonl").refused
    assert "new column 'colour'" in found["new.jsonl"] and "'clicks' is missing" in found["old.jsonl"]


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink)
    return sink.getvalue()


def test_parquet_lands_with_native_types_and_refuses_what_is_not_whole(desk: BadInputHarness) -> None:
    table = pa.table({"order": ["a", "b"], "day": ["1/5/2024"] * 2, "spend": [1.5, float("nan")], "clicks": [2.0, 1.5]})
    desk.put("a.parquet", _parquet(table))
    desk.put("b.parquet", _parquet(table)[:-20])
    desk.put("c.parquet", _parquet(table.drop_columns(["spend"])))
    found = desk.land(format="parquet")
    assert (found.accepted, found.quarantined, found.rules) == (1, 1, {"type:clicks": 1})
    assert (
        "not a whole Parquet file" in found.refused["b.parquet"] and "'spend' is missing" in found.refused["c.parquet"]
    )


@pytest.mark.parametrize("clause", ["WHERE clicks > '1'", "UNION ALL SELECT * FROM raw", "LIMIT 1"])
def test_a_sql_that_drops_or_repeats_rows_is_refused_by_name(desk: BadInputHarness, clause: str) -> None:
    desk.put("orders.csv", GOOD)
    shape = "SELECT source_row, \"order\" AS order_id, parse_time(day, '%d/%m/%Y') AS event_at, spend, clicks FROM raw "
    found = desk.land(sql=shape + clause.replace("*", "source_row, \"order\", '2024-05-01', spend, clicks"))
    assert "orders.sql: must yield each of the 2 rows of raw once" in found.refused["orders.csv"]
    assert desk.rows("events") == desk.rows("quarantine") == []


def test_a_sql_cannot_read_other_files(desk: BadInputHarness) -> None:
    desk.put("orders.csv", GOOD)
    found = desk.land(sql=f"SELECT * FROM read_csv('{desk.zone}/orders.csv')")
    assert "orders.sql" in found.refused["orders.csv"] and "no files" in found.refused["orders.csv"]


def test_a_refusal_hides_the_secrets_of_an_address() -> None:
    said = landing.without_secrets("s3://key:secret@bucket/a.csv?X-Token=abc is gone, https://h/p?sig=x")
    assert said == "s3://bucket/a.csv is gone, https://h/p"


def test_an_id_in_floating_point_numbers_of_json_is_quarantined_by_name(desk: BadInputHarness) -> None:
    lines = [
        f'{{"order": {v}, "day": "1/5/2024", "spend": 1.5, "clicks": 1}}\n' for v in ("7", "12345.0", "1e20", '"8"')
    ]
    found = desk.broken("".join(lines), format="jsonl")
    assert [(row, rule) for row, rule, _ in found] == [(2, "type:order_id"), (3, "type:order_id")]
    assert found[0][2] == ("order_id = 12345.0 is a number with a fraction or exponent, not a VARCHAR; send it as text")
    assert {e["order_id"] for e in desk.rows("events")} == {"7", "8"}


def test_a_text_that_looks_like_a_number_with_a_fraction_is_a_text(desk: BadInputHarness) -> None:
    lines = [
        f'{{"order": "{v}", "day": "1/5/2024", "spend": {s}, "clicks": 1}}\n' for v, s in (("1.5", 1.5), ("2.0", 7.5))
    ]
    assert desk.broken("".join(lines), format="jsonl") == []
    assert {e["order_id"] for e in desk.rows("events")} == {"1.5", "2.0"}


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32(), pa.decimal128(25, 2)])
def test_an_id_in_floating_point_numbers_of_parquet_refuses_the_file_by_name(
    desk: BadInputHarness, kind: pa.DataType
) -> None:
    columns = {"day": ["1/5/2024"], "spend": [1.5], "clicks": [1]}
    desk.put("floats.parquet", _parquet(pa.table({"order": pa.array([12345], pa.int64()).cast(kind), **columns})))
    desk.put("whole.parquet", _parquet(pa.table({"order": pa.array([12345], pa.int64()), **columns})))
    found = desk.land(format="parquet")
    assert list(found.refused) == ["floats.parquet"]
    assert "column 'order_id' comes as" in found.refused["floats.parquet"]
    assert "CAST(CAST(order_id AS BIGINT) AS VARCHAR)" in found.refused["floats.parquet"]
    assert [e["order_id"] for e in desk.rows("events")] == ["12345"]


def test_nanoseconds_of_parquet_land_cut_to_microseconds(desk: BadInputHarness) -> None:
    at = pa.array([1_714_557_600_123_456_789], pa.timestamp("ns", "Asia/Tokyo"))
    desk.put("a.parquet", _parquet(pa.table({"order": ["a"], "day": at, "spend": [1.0], "clicks": [1]})))
    sql = 'SELECT source_row, "order" AS order_id, day AS event_at, spend, clicks FROM raw'
    assert desk.land(format="parquet", sql=sql).rules == {}
    assert desk.rows("events")[0]["event_at"] == datetime(2024, 5, 1, 10, 0, 0, 123456)


def test_a_type_that_cannot_be_read_refuses_its_file_and_no_other(desk: BadInputHarness) -> None:
    columns = {"order": ["a"], "day": ["1/5/2024"], "clicks": [1]}
    desk.put("a.parquet", _parquet(pa.table({**columns, "spend": pa.array([1], pa.decimal256(60, 2))})))
    desk.put("b.parquet", _parquet(pa.table({**columns, "spend": [1.0]})))
    found = desk.land(format="parquet")
    assert found.new == ("b.parquet",) and "type cannot be read" in found.refused["a.parquet"]


def test_a_name_that_is_not_utf_8_is_refused_and_no_other_file(desk: BadInputHarness) -> None:
    desk.put("good.csv", GOOD)
    (desk.zone / os.fsdecode(b"m\xfcller.csv")).write_text(GOOD)
    for _ in range(2):
        assert desk.land().refused == {"m\\udcfcller.csv": "m\\udcfcller.csv: its name is not UTF-8; rename it"}
    assert {e["source_file"] for e in desk.rows("events")} == {"good.csv"}


def test_an_id_with_the_character_nul_is_malformed_and_no_other_row(desk: BadInputHarness) -> None:
    found = desk.broken(HEADER + "a\0b,1/5/2024,1,1\nfine,1/5/2024,1,1\n")
    assert found == [(1, "malformed", "line 2: holds the character NUL, which no database keeps")]
    assert [e["order_id"] for e in desk.rows("events")] == ["fine"]


def test_zeros_that_fill_up_a_gzip_are_no_damage_and_anything_else_is(desk: BadInputHarness) -> None:
    desk.put("padded.csv.gz", gzip.compress(GOOD.encode()) + b"\0" * 3_000_000)
    desk.put("other.csv.gz", gzip.compress(GOOD.encode()) + b"\0left over")
    found = desk.land()
    assert found.new == ("padded.csv.gz",) and "damaged" in found.refused["other.csv.gz"]


def test_a_gzip_within_a_zip_is_refused_by_name(desk: BadInputHarness) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("orders.csv.gz", gzip.compress(GOOD.encode()))
    desk.put("orders.zip", packed.getvalue())
    assert "is a gzip within a zip; pack the file once" in desk.refusal("orders.zip", encoding="latin-1")
