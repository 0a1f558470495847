"""Landing readers: the rows of a file, without losing one.

Belongs here: CSV, JSON lines and Parquet. Does not: what a row must be (``assets.landing.row_rules``).
"""

from __future__ import annotations

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from assets.landing.files import BLOCK, MAX_BYTES, FileRefused, Snapshot

if TYPE_CHECKING:
    from assets.workflow import Source

MAX_COLUMNS = 500
_CHUNK_LINES = 20_000
_RECORD_LINES = 100
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}


@dataclass(frozen=True)
class Raw:
    """The rows of a file. ``table`` holds the well-formed ones with ``source_row`` (1-based), ``malformed`` the others.

    ``rows`` counts both; a blank line is no row.
    """

    table: pa.Table
    malformed: list[tuple[int, str, str]]
    rows: int


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


def _lines(snap: Snapshot, encoding: str) -> Iterator[str]:
    """Physical lines with their ends, strictly decoded, without a byte-order mark."""
    try:
        with snap.content.open(encoding=encoding, newline="") as file:
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
            split = next(csv.reader([header], delimiter=other))
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
    nameless = [i + 1 for i in picked if not found[i].strip() or found[i].casefold() == "source_row"]
    if nameless:
        raise FileRefused(
            f"{name}: column {nameless[0]} of the header is called {found[nameless[0] - 1]!r}, which cannot be a name; "
            "declare `header: given` with `columns`"
        )
    return picked


def _texts(rows: Sequence[Sequence[str]], width: int) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * width
    return pa.table([pa.array(c, pa.string()) for c in columns], names=[str(i) for i in range(width)])


def _clean(lines: list[str], width: int, delimiter: str) -> pa.Table | None:
    """Lines that are one well-formed record each; None where that is not so."""
    text = "".join(lines)
    if '"' in text or not delimiter.isascii():
        try:
            rows = list(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error:
            return None
        return _texts(rows, width) if len(rows) == len(lines) and all(len(r) == width for r in rows) else None
    names = [str(i) for i in range(width)]
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(text.encode()),
            read_options=pa.csv.ReadOptions(use_threads=False, column_names=names),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, quote_char=False),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, check_utf8=False
            ),
        )
    except pa.ArrowInvalid:
        return None
    return table if table.num_rows == len(lines) else None


def _record(window: list[str], width: int, delimiter: str) -> tuple[list[str] | None, int, str]:
    """The record that starts with a window of lines: its fields, how many lines it took, or why it is malformed.

    A record over several lines that does not come out right is damage (a stray quote): only its first line is given up.
    """
    reader = csv.reader(window, delimiter=delimiter, strict=True)
    try:
        fields = next(reader)
    except csv.Error as error:
        return None, 1, str(error)
    if len(fields) == width or not fields:
        return fields, reader.line_num, ""
    return None, 1, f"{len(fields)} fields where the header has {width}"


def _csv_parts(
    lines: Iterator[str], width: int, delimiter: str, line: int
) -> Iterator[tuple[pa.Table, Any, list[tuple[int, str, str]]]]:
    """Well-formed records with their row numbers, and malformed ones as (row number, text, why); ``line`` were read."""
    row, buffer = 0, list[str]()
    while buffer := buffer + list(islice(lines, max(0, _CHUNK_LINES - len(buffer)))):
        part = _clean(buffer, width, delimiter)
        if part is not None:
            yield part, np.arange(row + 1, row + 1 + len(buffer)), []
            row, line, buffer = row + len(buffer), line + len(buffer), []
            continue
        good, numbers, bad, at = [], [], [], 0
        while at < min(len(buffer), _CHUNK_LINES):
            if len(buffer) - at < _RECORD_LINES:
                buffer += islice(lines, _RECORD_LINES)
            fields, used, why = _record(buffer[at : at + _RECORD_LINES], width, delimiter)
            if fields is None:
                row += 1
                bad.append((row, buffer[at].rstrip("\r\n"), f"line {line + 1}: {why}"))
            elif fields:
                row += 1
                good.append(fields)
                numbers.append(row)
            at, line = at + used, line + used
        buffer = buffer[at:]
        yield _texts(good, width), np.array(numbers, dtype=np.int64), bad


def _read_csv(snap: Snapshot, source: Source) -> Raw:
    lines, line, first = _lines(snap, source.encoding), 0, ""
    for first in lines:
        line += 1
        if first.strip():
            break
    else:
        raise FileRefused(f"{snap.name}: empty file (no header); send it again, or a file with a header and no rows")
    first = first.rstrip("\r\n")
    try:
        found = next(csv.reader([first], delimiter=source.delimiter, strict=True))
    except csv.Error as error:
        said = f"{snap.name}: line {line}: the header is not CSV ({error}); quote each name on one line"
        raise FileRefused(said) from error
    picked = _pick(found, source, snap.name, first)
    names = list(source.columns) if source.header == "given" and source.columns else [found[i] for i in picked]
    parts, malformed, rows = [_texts([], len(found)).append_column("source_row", pa.array([], pa.int64()))], [], 0
    for table, numbers, bad in _csv_parts(lines, len(found), source.delimiter, line):
        parts.append(table.append_column("source_row", pa.array(numbers, pa.int64())))
        malformed += bad
        rows += len(numbers) + len(bad)
    whole = pa.concat_tables(parts).select([*(str(i) for i in picked), "source_row"])
    return Raw(whole.rename_columns([*names, "source_row"]), malformed, rows)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"key {Counter(k for k, _ in pairs).most_common(1)[0][0]!r} stands twice")
    return found


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _read_jsonl(snap: Snapshot, source: Source) -> Raw:
    parts, malformed, row, line = [], list[tuple[int, str, str]](), 0, 0
    found: dict[str, None] = {}
    lines = _lines(snap, source.encoding)
    while chunk := list(islice(lines, _CHUNK_LINES)):
        good, numbers = [], []
        for text in chunk:
            line += 1
            if not text.strip():
                continue
            row += 1
            try:
                value = json.loads(text, object_pairs_hook=_no_key_twice)
                if not isinstance(value, dict):
                    raise ValueError(f"holds a {type(value).__name__} where an object is due")
                record = {k: _as_text(v) for k, v in value.items()}
                if "\\u" in text:
                    "".join([*record, *(v for v in record.values() if v)]).encode()
            except (ValueError, RecursionError) as error:
                malformed.append((row, text.rstrip("\r\n"), f"line {line}: {error}"))
                continue
            good.append(record)
            numbers.append(row)
            found.update(dict.fromkeys(record))
            if len(found) > MAX_COLUMNS:
                _pick(list(found), source, snap.name)
        names = list(dict.fromkeys(k for r in good for k in r))
        columns = [pa.array([r.get(n) for r in good], pa.string()) for n in names]
        parts.append(pa.table([*columns, pa.array(numbers, pa.int64())], names=[*names, "source_row"]))
    if not row:
        raise FileRefused(f"{snap.name}: empty file (no line); send it again")
    if not found:
        found = dict.fromkeys(source.columns or ())
    picked = [list(found)[i] for i in _pick(list(found), source, snap.name)]
    whole = pa.concat_tables(parts, promote_options="default")
    for name in picked:
        if name not in whole.column_names:
            whole = whole.append_column(name, pa.nulls(whole.num_rows, pa.string()))
    return Raw(whole.select([*picked, "source_row"]), malformed, row)


def _read_parquet(snap: Snapshot, source: Source, max_bytes: int) -> Raw:
    try:
        file = pa.parquet.ParquetFile(snap.content)
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        if size > max_bytes:
            raise FileRefused(f"{snap.name}: unpacks to more than {max_bytes:,} bytes; split it, or raise max_bytes")
        picked = _pick(file.schema_arrow.names, source, snap.name)
        table = file.read(use_threads=False).select(picked)
    except (pa.ArrowException, OSError) as error:
        raise FileRefused(f"{snap.name}: is not a whole Parquet file ({error}); send it again") from error
    return Raw(table.append_column("source_row", pa.array(np.arange(1, table.num_rows + 1))), [], table.num_rows)


def read_rows(snap: Snapshot, source: Source, *, max_bytes: int = MAX_BYTES) -> Raw:
    """The rows of a snapshot: text columns for CSV and JSON lines (texts as they stand), native types for Parquet.

    Raises FileRefused when the file is not of the declared format, encoding, delimiter or columns.
    """
    if source.format == "parquet":
        return _read_parquet(snap, source, max_bytes)
    return _read_csv(snap, source) if source.format == "csv" else _read_jsonl(snap, source)
