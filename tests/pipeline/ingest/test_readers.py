"""What stands in a file comes out as it stands: no row lost, none made, no text of a broken record taken for a row."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.ingest import FileRefused, Raw, Snapshot, read_rows, readers
from pipeline.workflow import Source
from tests.support.properties import examples

FIELDS: dict[str, Any] = {"files": "*", "format": "csv", "sql": "x.sql", "known_at": "landing"}


def _read(content: str | bytes, chunk: int = 20_000, max_bytes: int = 1 << 30, **fields: Any) -> Raw:
    usual, readers._CHUNK_LINES = readers._CHUNK_LINES, chunk
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a")
        path.write_bytes(content.encode(fields.get("encoding", "utf-8")) if isinstance(content, str) else content)
        try:
            source = Source.model_validate({**FIELDS, **fields})
            return read_rows(Snapshot("a", path, "", 0), source, max_bytes=max_bytes)
        finally:
            readers._CHUNK_LINES = usual


def _rows(raw: Raw) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in raw.table.drop_columns("source_row").to_pylist()]


def _counted(raw: Raw) -> None:
    numbers = [*raw.table["source_row"].to_pylist(), *(m[0] for m in raw.malformed)]
    assert sorted(numbers) == list(range(1, raw.rows + 1))


# --- CSV

_TEXT = st.text(st.sampled_from("ab,;\t\"\n\r '\\é\u2028"), max_size=8)
_WIDE = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(_TEXT, min_size=width, max_size=width), min_size=1, max_size=12)
)


def _written(rows: list[list[str]], delimiter: str, end: str, quoting: int = csv.QUOTE_MINIMAL) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([[f"c{n}" for n in range(len(rows[0]))], *rows])
    return text.getvalue()


@settings(max_examples=examples(150))
@given(
    rows=_WIDE,
    delimiter=st.sampled_from(",;\t|é"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    every=st.booleans(),
    chunk=st.integers(1, 30),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_table_written_by_the_standard_library_comes_back_as_it_was(
    rows: list[list[str]], delimiter: str, end: str, every: bool, chunk: int, encoding: str
) -> None:
    # Python before 3.13 leaves a carriage return unquoted where lines end otherwise: such a file has it outside of quotes
    every = every or any(c in "".join(map("".join, rows)) for c in "\r\n")
    text = _written(rows, delimiter, end, csv.QUOTE_ALL if every else csv.QUOTE_MINIMAL)
    raw = _read(text, chunk, delimiter=delimiter, encoding=encoding)
    assert _rows(raw) == [tuple(r) for r in rows] and raw.malformed == []
    assert raw.table["source_row"].to_pylist() == list(range(1, len(rows) + 1))


def _rfc_4180(text: str) -> list[list[str]]:
    """The records of a text, up to the place where it is none any more, by the grammar and nothing else."""
    records, record, at, blank = list[list[str]](), list[str](), 0, True
    while at < len(text):
        if text[at] == '"':
            value, at, blank = "", at + 1, False
            while True:
                close = text.find('"', at)
                if close < 0:
                    return records
                value, at = value + text[at:close], close + 1
                if text[at : at + 1] != '"':
                    break
                value, at = value + '"', at + 1
        else:
            end = min(e if (e := text.find(c, at)) >= 0 else len(text) for c in ",\n")
            value, at = text[at:end], end
            if text[at : at + 1] != ",":
                value = value.rstrip("\r")
        after = len(text[at:]) - len(text[at:].lstrip("\r"))
        if text[at + after : at + after + 1] in ("", "\n"):
            at += after
        record.append(value)
        if text[at : at + 1] == ",":
            at += 1
            if at == len(text):
                record.append("")
        elif text[at : at + 1] in ("", "\n"):
            at = text.find("\n", at) + 1 or len(text)
            records, record, blank = records if blank and record == [""] else [*records, record], [], True
        else:
            return records
    return [*records, record] if record else records


_PIECES = st.sampled_from(['"', '""', ",", "\n", "\r", "\r\n", "\0", " ", "\\", ',"', '",', '"\n', "x\nT,9,9\n"])


@settings(max_examples=examples(400))
@given(
    rows=st.lists(st.tuples(_TEXT, _TEXT, _TEXT), max_size=10),
    damage=st.lists(st.tuples(st.integers(0, 300), _PIECES), max_size=4),
    chunk=st.integers(1, 8),
    every=st.booleans(),
)
@example(rows=[("a", "b", "c")], damage=[(0, '"he said \\"hi\nT,9,9\nbye",')], chunk=8, every=False)
@example(rows=[("x\n" * 150 + "T,9,9", "b", "c"), ("d", "e", "f")], damage=[], chunk=8, every=True)
@example(rows=[], damage=[(0, '"'), (4, '"'), (5, "\r")], chunk=1, every=False)
@example(rows=[('" "', "b", "c")], damage=[(3, "\r")], chunk=1, every=True)
def test_no_damage_makes_a_row_that_is_no_record_of_the_file(
    rows: list[tuple[str, str, str]], damage: list[tuple[int, str]], chunk: int, every: bool
) -> None:
    header, _, text = _written([["", "", ""], *map(list, rows)], ",", "\n", csv.QUOTE_ALL if every else 0).partition(
        "\n"
    )
    for at, piece in damage:
        text = text[: min(at, len(text))] + piece + text[min(at, len(text)) :]
    try:
        raw = _read(f"{header}\n{text}", chunk)
    except FileRefused as error:
        assert '"' in text and "line " in str(error)
        return
    _counted(raw)
    whole = _read(f"{header}\n{text}")
    assert (whole.rows, whole.malformed, whole.table) == (raw.rows, raw.malformed, raw.table)
    records = _rfc_4180(text)
    found = dict(zip(raw.table["source_row"].to_pylist(), _rows(raw), strict=True))
    assert raw.rows == len(records)
    assert all(records[number - 1] == list(row) for number, row in found.items())
    for number, _, _ in raw.malformed:
        record = records[number - 1]
        assert len(record) != 3 or any(c in v for v in record for c in "\0\r")


def test_a_field_of_many_lines_is_one_field_wherever_parts_of_the_file_end() -> None:
    body = "hello\n" + "x\n" * 50 + "T-999,1\nbye"
    text = _written([[body, "1"], ["b", "2"], [body, "3"]], ",", "\n")
    for chunk in (1, 7, 20_000):
        assert _rows(_read(text, chunk)) == [(body, "1"), ("b", "2"), (body, "3")]


def test_a_field_of_ten_megabytes_is_one_field() -> None:
    body = "x\nT-999,1\n" * (1 << 20)
    assert _rows(_read(_written([[body, "1"], ["b", "2"]], ",", "\n"))) == [(body, "1"), ("b", "2")]


def test_a_field_over_the_limit_refuses_the_file_with_its_line() -> None:
    usual = csv.field_size_limit(100)
    try:
        with pytest.raises(FileRefused, match=r"line 3: a field is longer than .* is a quote not closed"):
            _read('a,b\n1,2\n"' + "x\n" * 100 + '"y",2\n3,4\n')
    finally:
        csv.field_size_limit(usual)


def test_a_malformed_record_has_its_own_line_and_all_its_text() -> None:
    raw = _read('a,b\n\n"1\n1",2\n\n"x\nT,9\ny"\n3,4\n', chunk=3)
    assert raw.malformed == [(2, '"x\nT,9\ny"', "line 6: 1 fields where the header has 2")]
    assert _rows(raw) == [("1\n1", "2"), ("3", "4")]


def test_a_header_over_two_lines_is_read_by_its_names() -> None:
    raw = _read('\n"spend\n(EUR)",b\n1,2\n', columns=["spend\n(EUR)", "b"])
    assert raw.table.column_names == ["spend\n(EUR)", "b", "source_row"] and _rows(raw) == [("1", "2")]


def test_a_quote_within_an_unquoted_field_is_text() -> None:
    assert _rows(_read('a,b\n5" pipe,2\nx"y",3\n')) == [('5" pipe', "2"), ('x"y"', "3")]


def test_the_character_nul_makes_its_row_malformed_and_no_other() -> None:
    raw = _read('a,b\nx\0y,1\n"\0",2\nz,3\n')
    assert [(m[0], m[2]) for m in raw.malformed] == [
        (n, f"line {n + 1}: holds the character NUL, which no database keeps") for n in (1, 2)
    ]
    assert _rows(raw) == [("z", "3")]


@pytest.mark.parametrize("row", [b"\\ud800,1\n", b"\\ud800\n", b'"\\ud800",1\n'])
def test_what_an_encoding_makes_that_is_no_character_refuses_the_file(row: bytes) -> None:
    with pytest.raises(FileRefused, match=r"holds U\+D800, which is no character"):
        _read(b"a,b\n" + row, encoding="raw_unicode_escape")


def test_a_header_with_the_character_nul_is_no_name() -> None:
    with pytest.raises(FileRefused, match="cannot be a name"):
        _read("a\0,b\n1,2\n")


@pytest.mark.parametrize("delimiter", ["\n", "\r", '"'])
def test_a_delimiter_that_is_a_line_end_or_the_quote_is_no_delimiter(delimiter: str) -> None:
    with pytest.raises(ValidationError, match="cannot be a line end or the quote"):
        Source.model_validate({**FIELDS, "delimiter": delimiter})


# --- JSON lines


def test_numbers_of_json_lines_keep_their_text() -> None:
    numbers = ["1", "1.0", "-0", "0.10", "1e400", "1E5", "12345678901234567890123", "9" * 5000]
    lines = "".join(f'{{"n": {n}, "in": {{"x": [{n}, "{n}", true, null]}}}}\n' for n in numbers)
    raw = _read(lines, format="jsonl")
    assert raw.malformed == []
    assert raw.table["n"].to_pylist() == numbers
    assert raw.table["in"].to_pylist() == [f'{{"x": [{n}, "{n}", true, null]}}' for n in numbers]


def test_columns_of_json_lines_with_floating_point_numbers_are_named() -> None:
    raw = _read('{"a": 1, "b": 1.0, "c": "1.0", "d": true}\n{"a": 2, "c": 3, "d": null}\n', format="jsonl")
    assert raw.floats == {"b"}
    assert _rows(raw) == [("1", "1.0", "1.0", "true"), ("2", None, "3", None)]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=examples(100))
@given(st.lists(st.fixed_dictionaries({"k": _JSON, "l": _JSON}), min_size=1, max_size=6), st.integers(1, 4))
def test_objects_written_as_json_lines_come_back_as_they_were(found: list[dict[str, Any]], chunk: int) -> None:
    text = "".join(json.dumps(r) + "\n" for r in found)
    raw = _read(text, chunk, format="jsonl")
    _counted(raw)
    broken = [n for n, line in enumerate(text.splitlines(), 1) if "\\u0000" in line or "\\ud" in line]
    assert {m[0] for m in raw.malformed} <= set(broken)
    rows = dict(zip(raw.table["source_row"].to_pylist(), raw.table.to_pylist(), strict=True))
    for n, row in rows.items():
        for key, value in found[n - 1].items():
            assert row[key] == value if isinstance(value, str) or value is None else json.loads(row[key]) == value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": [Infinity]}', "Infinity is no JSON value"),
        ('{"a": "x\\u0000y"}', "NUL"),
        ('{"a": "\\ud800"}', "surrogates"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"b": {"a": 1, "a": 2}}', "'a' stands twice"),
        ("[" * 100_000, "recursion"),
        ("1.5", "a number where an object is due"),
        ('"a"', "a text where an object is due"),
    ],
)
def test_a_line_that_is_no_object_is_malformed_by_name(line: str, said: str) -> None:
    raw = _read('{"a": "1", "b": "x"}\n' + line + "\n{}\n", format="jsonl")
    ((row, text, why),) = raw.malformed
    assert (row, text) == (2, line) and why.startswith("line 2: ") and said in why
    assert raw.table["a"].to_pylist() == ["1", None] and raw.table["source_row"].to_pylist() == [1, 3]


# --- Parquet


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink, **options)
    return sink.getvalue()


def test_times_of_a_parquet_file_are_cut_to_microseconds_of_utc() -> None:
    moments = pa.array([1_714_557_600_123_456_789, -1, None], pa.timestamp("ns"))
    table = pa.table({"ns": moments, "zoned": moments.cast(pa.timestamp("ns", "Europe/Berlin"))})
    raw = _read(_parquet(table), format="parquet")
    assert raw.table.schema.types[:2] == [pa.timestamp("us")] * 2
    assert raw.table["ns"].cast(pa.int64()).to_pylist() == [1_714_557_600_123_456, -1, None]
    assert raw.table["zoned"].equals(raw.table["ns"])


def test_a_parquet_file_that_points_a_million_times_at_one_text_is_refused_before_it_unpacks() -> None:
    rows = 100_000
    pointed = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 100_000]))
    packed = _parquet(pa.table({"a": pointed}), compression="zstd", store_schema=False)
    assert len(packed) < 10_000
    before = pa.total_allocated_bytes()
    with pytest.raises(FileRefused, match="unpacks to more than 100,000,000 bytes"):
        _read(packed, max_bytes=100_000_000, format="parquet")
    assert pa.total_allocated_bytes() - before < 100_000_000


def _pointing(rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 10_000]))


@pytest.mark.parametrize(
    "column",
    [
        pa.ListArray.from_arrays(pa.array([0, 50_000]), _pointing(50_000)),
        pa.StructArray.from_arrays([_pointing(50_000)], ["x"]),
        pa.MapArray.from_arrays(pa.array([0, 50_000]), pa.array(np.arange(50_000)), _pointing(50_000)),
        pa.ListArray.from_arrays(pa.array([0, 50_000]), pa.StructArray.from_arrays([_pointing(50_000)], ["x"])),
    ],
)
def test_texts_within_lists_and_structures_of_parquet_are_counted_before_they_unpack(column: pa.Array) -> None:
    packed = _parquet(pa.table({"a": column}), store_schema=False)
    with pytest.raises(FileRefused, match="unpacks to more than 100,000,000 bytes"):
        _read(packed, max_bytes=100_000_000, format="parquet")
    assert _read(packed, format="parquet", max_bytes=1 << 30).rows == len(column)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"a": pa.array(np.zeros(1_000_000, np.int64))}),
        pa.table({"a": pa.nulls(1_000_000, pa.float64())}),
        pa.table({"a": pa.array([[0] * 1_000_000], pa.list_(pa.int64()))}),
        pa.table({"a": pa.array([False] * 1_000_000)}),
    ],
)
def test_a_parquet_file_of_few_values_often_repeated_is_bounded_by_what_it_unpacks_to(table: pa.Table) -> None:
    packed = _parquet(table)
    assert len(packed) < 20_000
    with pytest.raises(FileRefused, match="unpacks to more than 7,000,000 bytes"):
        _read(packed, max_bytes=7_000_000, format="parquet")
    assert _read(packed, format="parquet").rows == table.num_rows


def test_a_column_that_is_not_read_does_not_count() -> None:
    table = pa.table({"a": [1], "b": ["x" * 1_000_000]})
    raw = _read(_parquet(table), max_bytes=1000, format="parquet", columns=["a"], extra_columns="ignore")
    assert _rows(raw) == [(1,)]


def test_every_kind_of_parquet_column_keeps_its_values() -> None:
    table = pa.table(
        {
            "a.b": pa.array(["x", None, "y"]).dictionary_encode(),
            "half": pa.array(np.array([1.5, 2, 3], np.float16)),
            "large": pa.array(["a", "b", None], pa.large_string()),
            "nested": [{"x": 1}, None, {"x": 2}],
            "lists": [["a", None], [], None],
            "large lists": pa.array([["a"], None, []], pa.large_list(pa.string())),
            "pairs": pa.array([["a", "b"], ["a", None], ["c", "d"]], pa.list_(pa.string(), 2)),
            "maps": pa.array([[("k", "v")], None, []], pa.map_(pa.string(), pa.string())),
            "structs": [[{"z": "a"}], None, [{"z": None}]],
            "json": pa.array(['{"a": 1}', None, "{}"], pa.json_()),
            "none": pa.nulls(3),
        }
    )
    raw = _read(_parquet(table, row_group_size=2), format="parquet")
    expected = zip(*(c.to_pylist() for c in table.columns), strict=True)
    assert _rows(raw) == list(expected) and raw.table["source_row"].to_pylist() == [1, 2, 3]


def test_texts_in_lists_that_outgrow_their_dictionary_are_read() -> None:
    lists = [[f"text {n:06d} {k}" for k in range(3)] for n in range(40_000)]
    packed = _parquet(pa.table({"a": lists}), dictionary_pagesize_limit=10_000, data_page_size=20_000)
    assert _read(packed, format="parquet").table["a"].to_pylist() == lists


def test_a_text_with_nul_makes_its_parquet_row_malformed_and_no_other() -> None:
    raw = _read(_parquet(pa.table({"id": ["a\0b", "fine", None], "n": [1, 2, 3]})), format="parquet")
    assert raw.malformed == [
        (1, '{"id": "a\\u0000b", "n": 1}', "row 1: holds the character NUL, which no database keeps")
    ]
    assert _rows(raw) == [("fine", 2), (None, 3)] and raw.table["source_row"].to_pylist() == [2, 3]


def test_a_parquet_text_that_is_not_utf_8_refuses_the_file() -> None:
    table = pa.table({"a": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())})
    with pytest.raises(FileRefused, match="not a whole Parquet file"):
        _read(_parquet(table), format="parquet")
