"""Landing readers: the rows of a file, without losing one and without making one.

Belongs here: CSV, JSON lines and Parquet; event logs come from ``pipeline.ingest.xes``. Does not: what a row must be
(``pipeline.ingest.row_rules``).

**CSV** is read as RFC 4180 says: a quoted field may hold delimiters and line ends, a quote within it is doubled.

- A whole record with another number of fields is one malformed row, over however many lines it goes.
- Where a quote is not closed, or text follows a closing quote, nobody can say whether what comes next is text or records: the
  file is refused with the line. ``quote: ""`` reads files that do not quote at all.
- A carriage return outside of quotes ends a record only where it ends the header, too; elsewhere its row is malformed.

Arrow's reader takes every part of a file in which all quotes are seen to be right, the standard library's strict reader takes
the other parts record by record. Neither Arrow nor DuckDB can have the whole file. DuckDB takes the line after a stray quote
for a record, so that text of a broken field becomes a row; it leaves out what follows an unclosed quote without a reject; its
rejects do not say which rows they were. Arrow reads ``"a"b`` as ``ab``.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from pipeline.ingest import xes
from pipeline.ingest.files import BLOCK, MAX_BYTES, FileRefused, Snapshot

if TYPE_CHECKING:
    from pipeline.workflow import Source

MAX_COLUMNS = 500
_CHUNK_LINES = 20_000
_BATCH_ROWS = 16_384
_MAX_FIELD = 256 << 20
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_BARE_CR = re.compile(r"\r(?!\n|\Z)")
_NUL = "holds the character NUL, which no database keeps"
_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8, "BYTE_ARRAY": 4}

Malformed = tuple[int, str, str]

csv.field_size_limit(_MAX_FIELD)


@dataclass(frozen=True)
class Raw:
    """The rows of a file. ``table`` holds the well-formed ones with ``source_row`` (1-based), ``malformed`` the others.

    ``rows`` counts both; a blank line is no row. ``floats`` names text columns in which the file has floating-point
    numbers (JSON lines, XES), not texts that look like them.
    """

    table: pa.Table
    malformed: list[Malformed]
    rows: int
    floats: frozenset[str] = field(default_factory=frozenset)


def some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(n[:40]) for n in names[:5])
    return shown + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _undecodable(path: Path, encoding: str, name: str) -> FileRefused:
    """The line and byte at which a file stops being what its encoding says."""
    decoder, done, lines = codecs.getincrementaldecoder(encoding)(), 0, 1
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            held = len(decoder.getstate()[0])
            try:
                lines += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                bad = error.object[error.start : error.start + 1].hex()
                lines += error.object[: error.start].decode(encoding).count("\n")
                at = done - held + error.start
                break
            done += len(block)
        file.seek(0)
        marked = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    hint = "utf-16" if marked else "latin-1"
    return FileRefused(
        f"{name}: line {lines}, byte {at} (0x{bad}) is not {encoding}; "
        f"if the file is right, declare its encoding, for example `encoding: {hint}`"
    )


def _lines(snap: Snapshot, encoding: str, newline: str = "") -> Iterator[str]:
    """Physical lines with their ends, strictly decoded, without a byte-order mark; ``newline`` as ``open`` has it."""
    try:
        with snap.content.open(encoding=encoding, newline=newline) as file:
            yield next(file, "").removeprefix("\ufeff")
            yield from file
    except LookupError:
        said = f"{snap.name}: encoding {encoding!r} is unknown; use one that Python knows, such as utf-8"
        raise FileRefused(said) from None
    except UnicodeDecodeError:
        raise _undecodable(snap.content, encoding, snap.name) from None


def _pick(found: Sequence[str], source: Source, name: str, header: str | None = None) -> list[int]:
    """Positions of the columns to read, in the file's order, after holding its header against the declared one."""
    if len(found) > MAX_COLUMNS:
        raise FileRefused(
            f"{name}: has {len(found):,} columns, at most {MAX_COLUMNS} are read; is this the right file and delimiter?"
        )
    if source.header == "given" and source.columns and header is not None:
        if len(found) < len(source.columns) or (len(found) > len(source.columns) and source.extra_columns == "refuse"):
            raise FileRefused(f"{name}: has {len(found)} columns, `columns` names {len(source.columns)}; align them")
        return list(range(len(source.columns)))
    declared = list(source.columns or found)
    missing = [c for c in declared if c not in found]
    new = [c for c in found if c not in declared]
    if header is not None and (missing or len(found) == 1):
        for other, called in _DELIMITERS.items():
            split = next(csv.reader(header.split("\n"), delimiter=other))
            if other != source.delimiter and len(split) > 1 and (not source.columns or set(missing) & set(split)):
                raise FileRefused(
                    f"{name}: the header does not split at {source.delimiter!r}, but into {len(split)} columns "
                    f"at a {called}; declare `delimiter: {json.dumps(other)}`"
                )
    twice = [c for c, n in Counter(c.casefold() for c in found).items() if n > 1]
    if twice:
        raise FileRefused(f"{name}: the header names {some(twice)} twice; declare `header: given` with `columns`")
    if missing:
        raise FileRefused(f"{name}: column {some(missing)} is missing; found {some(found)}")
    if new and source.extra_columns == "refuse":
        raise FileRefused(f"{name}: new column {some(new)}; add it to `columns`, or declare `extra_columns: ignore`")
    picked = [i for i, c in enumerate(found) if c in set(declared)]
    nameless = [
        i + 1 for i in picked if not found[i].strip() or "\0" in found[i] or found[i].casefold() == "source_row"
    ]
    if nameless:
        raise FileRefused(
            f"{name}: column {nameless[0]} of the header is called {found[nameless[0] - 1]!r}, which cannot be a name; "
            "declare `header: given` with `columns`"
        )
    return picked


class _Records:
    """The records of a CSV file, in parts."""

    def __init__(self, snap: Snapshot, source: Source) -> None:
        self.name, self.delimiter, self.quote = snap.name, source.delimiter, source.quote
        self.form: dict[str, Any] = {"delimiter": source.delimiter, "strict": True}
        self.form |= {"quotechar": source.quote} if source.quote else {"quoting": csv.QUOTE_NONE, "quotechar": None}
        if source.quote:
            q, d = source.quote, re.escape(source.delimiter)
            self.quoted = re.compile(rf"(?:(?<=[{d}\r\n])|\A){q}[^{q}]*+(?:{q}{q}[^{q}]*+)*+{q}(?=[{d}\r\n]|\Z)")
        kept: list[str] = []
        self.header = self._header(_lines(snap, source.encoding), kept)
        self.width = len(self.header)
        # how the header ends is how records end
        carriage = kept[-1].endswith("\r")
        self.lines = _lines(snap, source.encoding, "" if carriage else "\n")
        self.line = len(kept) if carriage else len(re.findall("[^\n]*\n|[^\n]+", "".join(kept)))
        self.row = 0
        for _ in islice(self.lines, self.line):
            pass

    def _header(self, lines: Iterator[str], kept: list[str]) -> list[str]:
        """The header's names; ``kept`` gets the lines up to its end."""
        for line in lines:
            kept.append(line)
            if line.strip():
                break
        else:
            said = f"{self.name}: empty file (no header); send it again, or a file with a header and no rows"
            raise FileRefused(said)
        buffer = [kept.pop()]
        reader = csv.reader(_drawn(buffer, lines), **self.form)
        try:
            found = next(reader)
        except csv.Error as error:
            said = f"{self.name}: line {len(kept) + 1}: the header is not CSV ({error}); quote each name as a whole"
            raise FileRefused(said) from error
        self.text = "".join(buffer).rstrip("\r\n")
        kept += buffer
        return found

    def parts(self) -> Iterator[tuple[pa.Table, Any, list[Malformed]]]:
        """Well-formed records with their row numbers, and malformed ones as (row number, text, why)."""
        while buffer := list(islice(self.lines, _CHUNK_LINES)):
            if self.quote and "".join(buffer).count(self.quote) % 2:
                # the last line ends within a field: what follows is part of it
                for line in islice(self.lines, _CHUNK_LINES):
                    buffer.append(line)
                    if line.count(self.quote) % 2:
                        break
            table = self._whole("".join(buffer))
            if table is not None:
                yield table, np.arange(self.row + 1, self.row + 1 + table.num_rows), []
                self.row += table.num_rows
            else:
                yield self._one_by_one(buffer)
            self.line += len(buffer)

    def _whole(self, text: str) -> pa.Table | None:
        """The records of a text in which nothing is wrong; None where something is, or may be."""
        quoted = bool(self.quote) and self.quote in text
        if "\0" in text or _BARE_CR.search(text) or (quoted and self.quote in self.quoted.sub("", text)):
            return None
        names, data = [str(i) for i in range(self.width)], text.encode()
        if not self.delimiter.isascii() or len(data) > 1 << 30:
            return None
        try:
            return pa.csv.read_csv(
                pa.BufferReader(data),
                read_options=pa.csv.ReadOptions(
                    use_threads=False, column_names=names, block_size=max(len(data), BLOCK)
                ),
                parse_options=pa.csv.ParseOptions(
                    delimiter=self.delimiter, quote_char=self.quote if quoted else False, newlines_in_values=quoted
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, check_utf8=False
                ),
            )
        except pa.ArrowInvalid:
            return None

    def _one_by_one(self, buffer: list[str]) -> tuple[pa.Table, Any, list[Malformed]]:
        """The same from the standard library's reader; the buffer grows by what its last record needs."""
        good, numbers, bad, at, end = list[list[str]](), list[int](), list[Malformed](), 0, len(buffer)
        nul = "\0" in "".join(buffer)
        while at < end:
            start, reader = at, csv.reader(_drawn(buffer, self.lines, at), **self.form)
            why = ""
            try:
                for fields in reader:
                    if fields:
                        self.row += 1
                        if len(fields) != self.width:
                            why = f"{len(fields)} fields where the header has {self.width}"
                        elif (nul or start + reader.line_num > end) and any("\0" in f for f in fields):
                            why = _NUL
                        if why:
                            break
                        good.append(fields)
                        numbers.append(self.row)
                    at = start + reader.line_num
                    if at >= end:
                        break
                used = start + reader.line_num
            except csv.Error as error:
                self.row += 1
                used = self._damaged(buffer, at, start + reader.line_num, error)
                why = "a carriage return outside of quotes"
            if why:
                bad.append((self.row, "".join(buffer[at:used]).rstrip("\r\n"), f"line {self.line + at + 1}: {why}"))
            at = used
        return _texts(good, self.width), np.array(numbers, dtype=np.int64), bad

    def _damaged(self, buffer: list[str], at: int, seen: int, error: csv.Error) -> int:
        """Where a record ends that is damaged by a carriage return alone. Raises FileRefused for any other damage."""
        try:
            if "new-line character" not in str(error):
                raise error
            reader = csv.reader((_BARE_CR.sub(" ", x) for x in _drawn(buffer, self.lines, at)), **self.form)
            next(reader)
            return at + reader.line_num
        except csv.Error as found:
            place = f"the record of line {self.line + at + 1}"
            if "unexpected end" in str(found):
                why = "a quote opens a field and never closes"
            elif "limit" in str(found):
                why = f"a field is longer than {_MAX_FIELD:,} characters; is a quote not closed?"
            else:
                why = f"text follows a closing quote in line {self.line + seen}"
            raise FileRefused(
                f"{self.name}: {place}: {why}, so what comes after it may be text or records; double the quotes within "
                'a quoted field, or declare `quote: ""` if the file does not quote'
            ) from found


def _drawn(buffer: list[str], lines: Iterator[str], at: int = 0) -> Iterator[str]:
    """The lines of a buffer from ``at`` on, then those that follow it, which are kept in it."""
    while True:
        if at == len(buffer):
            line = next(lines, None)
            if line is None:
                return
            buffer.append(line)
        yield buffer[at]
        at += 1


def _texts(rows: Sequence[Sequence[str]], width: int) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * width
    return pa.table([pa.array(c, pa.string()) for c in columns], names=[str(i) for i in range(width)])


def _read_csv(snap: Snapshot, source: Source) -> Raw:
    records = _Records(snap, source)
    found = records.header
    picked = _pick(found, source, snap.name, records.text)
    names = list(source.columns) if source.header == "given" and source.columns else [found[i] for i in picked]
    parts, malformed, rows = [_texts([], len(found)).append_column("source_row", pa.array([], pa.int64()))], [], 0
    for table, numbers, bad in records.parts():
        parts.append(table.append_column("source_row", pa.array(numbers, pa.int64())))
        malformed += bad
        rows += len(numbers) + len(bad)
    whole = pa.concat_tables(parts).select([*(str(i) for i in picked), "source_row"])
    return Raw(whole.rename_columns([*names, "source_row"]), malformed, rows)


class _Number(str):
    """A number as the file writes it."""


class _Float(_Number):
    """A number with a fraction or an exponent."""


def _as_json(value: Any) -> str:
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)}: {_as_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _as_text(value: Any) -> str | None:
    """Texts and numbers as they stand, what has parts as JSON."""
    return value if value is None or isinstance(value, str) else _as_json(value)


class _Keyed:
    """Rows that name their columns themselves, gathered into a table of texts."""

    def __init__(self, snap: Snapshot, source: Source) -> None:
        self.name, self.source = snap.name, source
        self.found: dict[str, None] = {}
        self.floats: set[str] = set()
        self.parts: list[pa.Table] = []
        self.records: list[Mapping[str, Any]] = []
        self.numbers: list[int] = []
        self.malformed: list[Malformed] = []
        self.row = 0

    def add(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)
        self.numbers.append(self.row)
        if not self.found.keys() >= record.keys():
            self.found.update(dict.fromkeys(record))
            if len(self.found) > MAX_COLUMNS:
                _pick(list(self.found), self.source, self.name)
        if len(self.records) == _CHUNK_LINES:
            self.close()

    def close(self) -> None:
        names = list(dict.fromkeys(k for r in self.records for k in r))
        columns = []
        for name in names:
            values = [r.get(name) for r in self.records]
            kinds = set(map(type, values))
            if _Float in kinds:
                self.floats.add(name)
            if kinds - {str, _Number, _Float, type(None)}:
                values = [_as_text(v) for v in values]
            columns.append(pa.array(values, pa.string()))
        self.parts.append(pa.table([*columns, pa.array(self.numbers, pa.int64())], names=[*names, "source_row"]))
        self.records, self.numbers = [], []

    def raw(self) -> Raw:
        self.close()
        found = list(self.found or dict.fromkeys(self.source.columns or ()))
        picked = [found[i] for i in _pick(found, self.source, self.name)]
        whole = pa.concat_tables(self.parts, promote_options="default")
        for name in picked:
            if name not in whole.column_names:
                whole = whole.append_column(name, pa.nulls(whole.num_rows, pa.string()))
        return Raw(
            whole.select([*picked, "source_row"]), self.malformed, self.row, frozenset(self.floats & set(picked))
        )


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"key {Counter(k for k, _ in pairs).most_common(1)[0][0]!r} stands twice")
    return found


def _no_number(token: str) -> NoReturn:
    raise ValueError(f"{token} is no JSON value; write null where there is no number")


_JSON = json.JSONDecoder(
    object_pairs_hook=_no_key_twice, parse_int=_Number, parse_float=_Float, parse_constant=_no_number
)


def _read_jsonl(snap: Snapshot, source: Source) -> Raw:
    rows = _Keyed(snap, source)
    for line, text in enumerate(_lines(snap, source.encoding), start=1):
        if not text.strip(" \t\r\n"):
            continue
        rows.row += 1
        try:
            value = _JSON.decode(text)
            if not isinstance(value, dict):
                raise ValueError(f"holds {_KINDS.get(type(value), 'a text')} where an object is due")
            if "\\u" in text:
                _storable([*value, *map(_as_text, value.values())])
        except (ValueError, RecursionError) as error:
            rows.malformed.append((rows.row, text.rstrip("\r\n"), f"line {line}: {error}"))
            continue
        rows.add(value)
    if not rows.row:
        raise FileRefused(f"{snap.name}: empty file (no line); send it again")
    return rows.raw()


_KINDS = {list: "a list", _Number: "a number", _Float: "a number", bool: "a boolean", type(None): "null"}


def _storable(texts: Sequence[str | None]) -> None:
    whole = "".join(t for t in texts if t)
    whole.encode()
    if "\0" in whole:
        raise ValueError(_NUL)


def _read_xes(snap: Snapshot, source: Source) -> Raw:
    rows = _Keyed(snap, source)
    for event in xes.events(snap):
        rows.row += 1
        why = event.why or (_NUL if any("\0" in v for v in event.values.values()) else "")
        if why:
            rows.malformed.append((rows.row, event.text(), f"line {event.line}: {why}"))
        else:
            rows.add({k: _Float(v) if k in event.floats else v for k, v in event.values.items()})
    return rows.raw()


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _decoded(kind: pa.DataType) -> pa.DataType:
    """A type without the dictionaries in it."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_decoded(f.type)) for f in kind])
    if pa.types.is_map(kind):
        return pa.map_(
            kind.key_field.with_type(_decoded(kind.key_type)), kind.item_field.with_type(_decoded(kind.item_type))
        )
    if _is_list(kind):
        inner = kind.value_field.with_type(_decoded(kind.value_type))
        if pa.types.is_large_list(kind):
            return pa.large_list(inner)
        return pa.list_(inner, kind.list_size) if pa.types.is_fixed_size_list(kind) else pa.list_(inner)
    return kind


def _unpacked_bytes(column: pa.Array) -> int:
    """Bytes of a column without its dictionaries; texts are counted before they are written out."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = pc.fill_null(pc.binary_length(column.dictionary), 0)
        return int(pc.sum(lengths.take(column.indices), min_count=0).as_py()) + 4 * len(column)
    if pa.types.is_struct(kind):
        return sum(_unpacked_bytes(c) for c in column.flatten())
    if pa.types.is_map(kind):
        return 4 * len(column) + _unpacked_bytes(column.keys) + _unpacked_bytes(column.items)
    if _is_list(kind):
        return 4 * len(column) + _unpacked_bytes(column.flatten())
    return int(column.nbytes)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times cut to whole microseconds in UTC, half-precision numbers as floats: what DuckDB compares without a cast."""
    if pa.types.is_timestamp(column.type):
        return pc.floor_temporal(column, unit="microsecond").cast(pa.timestamp("us"))
    return column.cast(pa.float32()) if pa.types.is_float16(column.type) else column


def _parquet_batches(snap: Snapshot, source: Source, max_bytes: int) -> Iterator[pa.Table]:
    """The columns to read, part by part; refused before more than ``max_bytes`` are unpacked.

    The sizes in the file's own metadata are those of its encodings: a text that stands once and is pointed at a million
    times counts once. So fixed widths are multiplied out before reading, and texts are read as dictionaries and counted.
    """
    too_large = FileRefused(f"{snap.name}: unpacks to more than {max_bytes:,} bytes; split it, or raise max_bytes")
    file = pa.parquet.ParquetFile(snap.content)
    arrow, meta = file.schema_arrow, file.metadata
    picked = [arrow.names[i] for i in _pick(arrow.names, source, snap.name)]
    size, texts = 8 * meta.num_rows, list[str]()
    for n in range(meta.num_columns):
        leaf = meta.schema.column(n)
        name = next((c for c in picked if leaf.path == c or leaf.path.startswith(f"{c}.")), None)
        if name is not None:
            chunks = [meta.row_group(i).column(n) for i in range(meta.num_row_groups)]
            width = _BYTES.get(leaf.physical_type, leaf.length)
            size += sum(max(c.total_uncompressed_size, c.num_values * width) for c in chunks)
            if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL":
                texts.append(leaf.path)
    if size > max_bytes:
        raise too_large
    size = 0
    file = pa.parquet.ParquetFile(snap.content, read_dictionary=texts)
    yield arrow.empty_table().select(picked)
    for group in range(meta.num_row_groups):
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=picked, use_threads=False):
            size += 8 * len(batch) + sum(_unpacked_bytes(column) for column in batch.columns)
            if size > max_bytes:
                raise too_large
            yield pa.Table.from_batches([batch]).select(picked)


def _read_parquet(snap: Snapshot, source: Source, max_bytes: int) -> Raw:
    try:
        parts = list(_parquet_batches(snap, source, max_bytes))
        schema = pa.schema([f.with_type(_decoded(f.type)) for f in parts[0].schema])
        table = pa.concat_tables([part.cast(schema) for part in parts])
        table = pa.table([_plain(c) for c in table.columns], names=table.column_names)
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FileRefused(f"{snap.name}: is not a whole Parquet file ({error}); send it again") from error
    rows = pa.array(np.arange(1, table.num_rows + 1))
    texts = [c for c in table.columns if pa.types.is_string(c.type) or pa.types.is_large_string(c.type)]
    marked = [pc.fill_null(pc.match_substring(c, "\0"), False) for c in texts]
    bad = [n for n, hit in enumerate(np.logical_or.reduce([m.to_numpy() for m in marked])) if hit] if marked else []
    malformed = [
        (n + 1, json.dumps(table.slice(n, 1).to_pylist()[0], default=str), f"row {n + 1}: {_NUL}") for n in bad
    ]
    whole = table.append_column("source_row", rows)
    if bad:
        whole = whole.filter(pa.array(~np.isin(np.arange(table.num_rows), bad)))
    return Raw(whole, malformed, table.num_rows)


def read_rows(snap: Snapshot, source: Source, *, max_bytes: int = MAX_BYTES) -> Raw:
    """The rows of a snapshot: text columns (texts and numbers as they stand), native types for Parquet.

    Raises FileRefused when the file is not of the declared format, encoding, delimiter or columns, or unpacks to more
    than ``max_bytes``.
    """
    if source.format == "parquet":
        return _read_parquet(snap, source, max_bytes)
    read = {"csv": _read_csv, "jsonl": _read_jsonl, "xes": _read_xes}[source.format]
    try:
        raw = read(snap, source)
        "".join(text for _, text, _ in raw.malformed).encode()
        return raw
    except UnicodeEncodeError as error:
        bad = f"U+{ord(error.object[error.start]):04X}"
        raise FileRefused(f"{snap.name}: holds {bad}, which is no character; is `encoding` the right one?") from error
