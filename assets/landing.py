"""Landing: files as they come become events, quarantined rows and a manifest of files.

Belongs here: finding files, taking a copy that cannot change, undoing gzip and zip, reading rows without losing one,
judging them by the contract, and landing each file whole and once. Does not: what a workflow's SQL and contract say
(its folder does), Dagster, and what later stages make of the events.

A file is refused as a whole (FileRefused, recorded in the manifest with the reason) when it cannot be read as declared;
a row is quarantined when it breaks a rule. Rules are tried in this order and the first broken one names the row:
``malformed``; then column by column of the contract ``type``, then likewise ``required``, ``not_finite``,
``below_min``, ``above_max``, ``not_allowed`` (each ``<rule>:<column>``); ``from_the_future``; the contract's named rows
in their order; ``duplicate`` last, so that only a row that stands can push out a later one.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import json
import os
import re
import stat
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import duckdb
import fsspec.core
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from assets.lake import Lake

if TYPE_CHECKING:
    from assets.workflow import Column, EventsContract, Source, Workflow

MAX_BYTES = 8 << 30
MAX_COLUMNS = 500
BATCH_ROWS = 1_000_000
_BLOCK = 1 << 20
_CHUNK_LINES = 20_000
_RECORD_LINES = 100
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_INTEGER = r"\s*[+-]?[0-9]+(\.0*)?\s*"
_NUMBER = r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*|\s*[+-]?(?i:nan|inf|infinity)\s*"

Status = Literal["landed", "refused", "duplicate", "landing"]


class FileRefused(ValueError):
    """A file cannot be read as declared; the message names the file, the place in it and the way out."""


class FileChanged(FileRefused):
    """A file was replaced or written to while it was read."""


@dataclass(frozen=True)
class LandingFile:
    """One file of the landing zone: its name in the manifest, and where it lies."""

    name: str
    path: str
    base: str
    fs: Any


@dataclass(frozen=True)
class Snapshot:
    """A private copy of a file: what it held at one moment, unpacked.

    ``file_id`` is the SHA-256 of the raw bytes, ``size`` their number.
    """

    name: str
    content: Path
    file_id: str
    size: int


@dataclass(frozen=True)
class Raw:
    """The rows of a file. ``table`` holds the well-formed ones with ``source_row`` (1-based), ``malformed`` the others.

    ``rows`` counts both; a blank line is no row.
    """

    table: pa.Table
    malformed: list[tuple[int, str, str]]
    rows: int


@dataclass(frozen=True)
class FileRecord:
    """One row of the manifest: what became of one content of one path. It is live while ``superseded_at`` is None."""

    source: str
    path: str
    file_id: str | None
    size: int | None
    rows: int
    accepted: int
    quarantined: int
    status: Status
    reason: str | None
    duplicate_of: str | None
    supersedes: str | None
    landed_at: datetime
    superseded_at: datetime | None = None


@dataclass(frozen=True)
class IngestResult:
    """What one run of ingest found. ``files`` are the records of every file seen, counts are of rows it landed itself.

    ``new`` holds the paths that were not in the manifest before, ``refused`` the reasons by path, ``versions`` the
    newest version of each table.
    """

    files: tuple[FileRecord, ...] = ()
    new: tuple[str, ...] = ()
    accepted: int = 0
    quarantined: int = 0
    rules: Mapping[str, int] = field(default_factory=dict)
    accepted_by_day: Mapping[date, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)


FILES = pa.schema(
    [(name, pa.string()) for name in ("source", "path", "file_id")]
    + [(name, pa.int64()) for name in ("size", "rows", "accepted", "quarantined")]
    + [(name, pa.string()) for name in ("status", "reason", "duplicate_of", "supersedes")]
    + [(name, pa.timestamp("us")) for name in ("landed_at", "superseded_at")]
)
QUARANTINE = pa.schema(
    [("source", pa.string()), ("source_file", pa.string()), ("source_file_id", pa.string()), ("source_row", pa.int64())]
    + [(name, pa.string()) for name in ("rule", "detail", "raw")]
    + [("landed_at", pa.timestamp("us")), ("landed_day", pa.date32())]
)


# --- finding and copying ---------------------------------------------------------------------------------------------


def without_secrets(text: str) -> str:
    """A text with its addresses without user, password, query and fragment."""
    return _ADDRESS.sub(lambda found: found[1] + re.split("[?#]", _without_user(found[2]), maxsplit=1)[0], text)


def _without_user(rest: str) -> str:
    """What follows ``://`` without user and password, also where the password was written with a raw / or @."""
    host, slash, path = rest.partition("/")
    if "@" in host:
        return host.rpartition("@")[2] + slash + path
    odd = re.search(r":(?!\d+$)", host) is not None and "@" in path
    return path.partition("@")[2] if odd else rest


# a chained address (zip://*.csv::https://…) is two
_ADDRESS = re.compile(r"(://)((?:(?!::)\S)*)")
_without_secrets = without_secrets


def _set_aside(name: str) -> bool:
    """Whether a name is that of a hidden or unfinished file."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return any(p.startswith((".", "__MACOSX")) for p in parts) or name.lower().endswith((".tmp", ".part"))


def _climbs_out(name: str) -> bool:
    flat = name.replace("\\", "/")
    return flat.startswith("/") or bool(re.match(r"[A-Za-z]:", flat)) or ".." in flat.split("/")


def discover(root: str | Path, source: Source, days: Sequence[date] | None = None) -> list[LandingFile]:
    """The files of a source, sorted by name; ``{day}`` in its pattern stands for each of ``days`` (any day when None).

    ``root`` is the workflow's landing folder (or an fsspec URL); hidden and unfinished files are left out.
    Raises FileRefused for a pattern that climbs out of the landing zone.
    """
    pattern, address = source.files, "://" in source.files
    if ".." in pattern.replace("\\", "/").split("/") or (not address and _climbs_out(pattern)):
        raise FileRefused(
            f"files: {_without_secrets(pattern)}: climbs out of the landing zone; "
            "name files below it, or an fsspec URL such as s3://bucket/folder/*.csv"
        )
    if address:
        fixed = re.split(r"[*?\[{]", pattern, maxsplit=1)[0].rsplit("/", 1)[0]
        relative = pattern[len(fixed) + 1 :]
    else:
        fixed, relative = str(root), pattern
    fs, base = fsspec.core.url_to_fs(fixed)
    fs.invalidate_cache()
    spans = [day.isoformat() for day in days] if days is not None else ["[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]"]
    found: dict[str, LandingFile] = {}
    for span in spans if "{day}" in relative else [""]:
        wanted = f"{glob.escape(base.rstrip('/'))}/{relative.replace('{day}', span)}"
        for path, info in fs.glob(wanted, detail=True).items():
            below = path[len(base.rstrip("/")) + 1 :]
            if info["type"] == "directory" or (info.get("islink") and os.path.isdir(path)) or _set_aside(below):
                continue
            name = _without_secrets(f"{fixed}/{below}") if address else below
            found[name] = LandingFile(name=name, path=path, base=base, fs=fs)
    return [found[name] for name in sorted(found)]


def _fingerprint(file: LandingFile) -> tuple[Any, ...]:
    """What changes when a file is replaced or written to; also refuses what is no plain file of the landing zone."""
    if isinstance(file.fs, LocalFileSystem):
        if not Path(os.path.realpath(file.path)).is_relative_to(os.path.realpath(file.base)):
            raise FileRefused(f"{file.name}: leads out of the landing zone through a link; copy the file into it")
        try:
            seen = os.stat(file.path)
        except FileNotFoundError:
            raise FileChanged(f"{file.name}: is gone, or a link to nothing; put the file back") from None
        if not stat.S_ISREG(seen.st_mode):
            raise FileRefused(f"{file.name}: is not a plain file")
        return seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_dev
    file.fs.invalidate_cache()
    info = file.fs.info(file.path)
    return tuple(
        str(info.get(k)) for k in ("size", "ETag", "etag", "mtime", "LastModified", "last_modified", "created")
    )


def _copy(file: LandingFile, target: Path, max_bytes: int) -> tuple[str, int]:
    """SHA-256 and number of the bytes copied."""
    digest, size = hashlib.sha256(), 0
    with file.fs.open(file.path, "rb") as incoming, target.open("wb") as kept:
        while block := incoming.read(_BLOCK):
            size += len(block)
            if size > max_bytes:
                raise FileRefused(f"{file.name}: is larger than {max_bytes:,} bytes; split it, or raise max_bytes")
            digest.update(block)
            kept.write(block)
    return digest.hexdigest(), size


def _gunzipped(packed: Path, name: str) -> Iterator[bytes]:
    good = 0
    with packed.open("rb") as file:
        stream, data = zlib.decompressobj(wbits=31), file.read(_BLOCK)
        while data:
            try:
                block = stream.decompress(data, _BLOCK)
            except zlib.error as error:
                raise FileRefused(
                    f"{name}: the gzip is damaged after {good:,} good bytes ({error}); send the file again"
                ) from error
            good += len(block)
            yield block
            data = stream.unconsumed_tail
            if stream.eof:
                data = stream.unused_data or file.read(_BLOCK)
                stream = zlib.decompressobj(wbits=31) if data else stream
            elif not data:
                data = file.read(_BLOCK)
        if not stream.eof:
            raise FileRefused(f"{name}: the gzip is truncated, {good:,} bytes were good; send the file again")


def _unzipped(packed: Path, name: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(packed) as archive:
            members = archive.infolist()
            climbing = next((m.orig_filename for m in members if _climbs_out(m.orig_filename)), None)
            if climbing is not None:
                raise FileRefused(f"{name}: the zip's member {climbing!r} climbs out of the archive; pack it anew")
            data = [m for m in members if not m.is_dir() and not _set_aside(m.filename)]
            if len(data) != 1:
                some = ", ".join(m.filename for m in data[:3]) or "none"
                raise FileRefused(
                    f"{name}: a zip must hold one data file, this one holds {len(data)} ({some}); pack each alone"
                )
            if data[0].flag_bits & 1:
                raise FileRefused(f"{name}: the zip's member {data[0].filename!r} is encrypted; send it unencrypted")
            with archive.open(data[0]) as member:
                while block := member.read(_BLOCK):
                    yield block
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise FileRefused(f"{name}: the zip is damaged ({error}); send the file again") from error


def _unpacked(packed: Path, target: Path, name: str, max_bytes: int) -> Path:
    """The content of a gzip or zip (known by its first bytes); any other file as it is."""
    with packed.open("rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        blocks = _gunzipped(packed, name)
    elif magic in (b"PK\x03\x04", b"PK\x05\x06"):
        blocks = _unzipped(packed, name)
    else:
        return packed
    size = 0
    with target.open("wb") as out:
        for block in blocks:
            size += len(block)
            if size > max_bytes:
                raise FileRefused(f"{name}: unpacks to more than {max_bytes:,} bytes; split it, or raise max_bytes")
            out.write(block)
    return target


def snapshot(file: LandingFile, folder: Path, *, max_bytes: int = MAX_BYTES) -> Snapshot:
    """Copy a file into a private folder while hashing it, and unpack it there.

    Raises FileChanged when the file was replaced or written to meanwhile (after a second try), and FileRefused when it
    is empty, damaged, larger than ``max_bytes`` (also when unpacked), or leads out of the landing zone.
    """
    for last in (False, True):
        before = _fingerprint(file)
        try:
            digest, size = _copy(file, folder / "packed", max_bytes)
            same = _fingerprint(file) == before and (not isinstance(before[0], int) or size == before[0])
        except FileNotFoundError:
            same = False
        except OSError as error:
            raise FileRefused(f"{file.name}: cannot be read ({error})") from error
        if same:
            break
        if last:
            raise FileChanged(
                f"{file.name}: was replaced while it was read, twice; write it beside as .part, then rename it"
            )
    if size == 0:
        raise FileRefused(f"{file.name}: empty file (0 bytes); send it again, or a file with a header and no rows")
    content = _unpacked(folder / "packed", folder / "content", file.name, max_bytes)
    return Snapshot(file.name, content, digest, size)


# --- reading rows ----------------------------------------------------------------------------------------------------


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(n[:40]) for n in names[:5])
    return shown + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _undecodable(path: Path, encoding: str, name: str) -> FileRefused:
    """The line and byte at which a file stops being what its encoding says."""
    decoder, done, lines = codecs.getincrementaldecoder(encoding)(), 0, 1
    with path.open("rb") as file:
        while True:
            block = file.read(_BLOCK)
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
        raise FileRefused(f"{name}: the header names {_some(twice)} twice; declare `header: given` with `columns`")
    if missing:
        raise FileRefused(f"{name}: column {_some(missing)} is missing; found {_some(found)}")
    if new and source.extra_columns == "refuse":
        raise FileRefused(f"{name}: new column {_some(new)}; add it to `columns`, or declare `extra_columns: ignore`")
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


# --- judging rows ----------------------------------------------------------------------------------------------------


def _q(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _s(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _typed(name: str, wanted: str, found: str) -> str:
    """SQL of a column cast to its type without loss, NULL where it does not cast.

    DuckDB alone would round 1.5 to a BIGINT, read 1_000 as a number, drop a time's offset and read 1-2-16 as a day of
    the year 1; times outside 1900 to 2200 do not count as times.
    """
    x, text = _q(name), found == "VARCHAR"
    if wanted == "VARCHAR":
        return f"CAST({x} AS VARCHAR)"
    value = x if found == wanted else f"TRY_CAST({x} AS {wanted})"
    if text and wanted in ("BIGINT", "DOUBLE"):
        shape = _INTEGER if wanted == "BIGINT" else _NUMBER
        value = f"CASE WHEN regexp_full_match({x}, {_s(shape)}) THEN TRY_CAST(trim({x}) AS {wanted}) END"
    elif text and wanted in ("TIMESTAMP", "DATE"):
        moment = f"CAST(TRY_CAST({x} AS TIMESTAMPTZ) AS TIMESTAMP)"
        whole = f"CAST({moment} AS DATE)"
        value = moment if wanted == "TIMESTAMP" else f"CASE WHEN {whole} = {moment} THEN {whole} END"
    elif found != wanted and not text:
        value = f"CASE WHEN TRY_CAST({value} AS {found}) = {x} THEN {value} END"
    if wanted in ("TIMESTAMP", "DATE"):
        value = f"CASE WHEN {value} >= DATE '1900-01-01' AND {value} < DATE '2200-01-01' THEN {value} END"
    return value


def _verdict(rule: str, detail: str) -> str:
    return f"{{'rule': {_s(rule)}, 'detail': {detail}}}"


def _value(name: str) -> str:
    """SQL that shows a column and its value."""
    return f"{_s(name + ' = ')} || coalesce(left(CAST({_q(name)} AS VARCHAR), 100), 'NULL')"


def _literal(value: str | int | float | bool, kind: str) -> str:
    return f"CAST({_s(str(value).lower() if isinstance(value, bool) else str(value))} AS {kind})"


def _rules(
    columns: Mapping[str, Column], required: Sequence[str], contract: EventsContract
) -> list[tuple[str, str, str]]:
    """(rule, SQL predicate that breaks it, SQL of the detail) over the typed columns, in the order of trial."""
    rules = [(f"required:{c}", f"{_q(c)} IS NULL", _s(f"{c} is NULL")) for c in required]
    for name, column in columns.items():
        if column.type == "DOUBLE":
            rules.append((f"not_finite:{name}", f"NOT isfinite({_q(name)})", _value(name)))
    for name, column in columns.items():
        if column.min is not None:
            low = f"{_value(name)} || {_s(f' is below {column.min:g}')}"
            rules.append((f"below_min:{name}", f"{_q(name)} < {_literal(column.min, 'DOUBLE')}", low))
    for name, column in columns.items():
        if column.max is not None:
            high = f"{_value(name)} || {_s(f' is above {column.max:g}')}"
            rules.append((f"above_max:{name}", f"{_q(name)} > {_literal(column.max, 'DOUBLE')}", high))
    for name, column in columns.items():
        if column.allowed is not None:
            options = ", ".join(_literal(v, column.type) for v in column.allowed)
            other = f"{_value(name)} || ' is not allowed'"
            rules.append((f"not_allowed:{name}", f"{_q(name)} NOT IN ({options})", other))
    times = f"{_value('event_at')} || ' is later than ' || {_value('known_at')}"
    rules.append(("from_the_future", '"event_at" > "known_at"', times))
    for rule in contract.rows:
        named = [c for c in columns if re.search(rf"\b{re.escape(c)}\b", rule.breaks_when, re.IGNORECASE)]
        shown = " || ', ' || ".join(_value(c) for c in named) or "''"
        rules.append((rule.name, f"({rule.breaks_when})", f"{_s(rule.breaks_when + ': ')} || {shown}"))
    return rules


@dataclass(frozen=True)
class Judged:
    """The rows of one file: accepted ones as events, the others as quarantine."""

    events: pa.Table
    quarantine: pa.Table


@dataclass(frozen=True)
class Landing:
    """Where rows come from and when they landed; ``restated`` when they replace an earlier content of the path."""

    source: str
    path: str
    file_id: str
    landed_at: datetime
    restated: bool = False


def event_columns(contract: EventsContract) -> dict[str, Column]:
    """The contract's columns, and the two times that every event has."""
    from assets.workflow import Column

    moment = Column(type="TIMESTAMP", required=True)
    return {**contract.columns, **{c: moment for c in ("event_at", "known_at") if c not in contract.columns}}


def _engine() -> duckdb.DuckDBPyConnection:
    """A database in memory that reads nothing but what it is handed."""
    con = duckdb.connect()
    con.execute("SET threads = 1")
    con.execute("SET enable_external_access = false")
    # what does not parse stays visible with the format it missed, and never casts by accident
    con.execute(
        "CREATE MACRO parse_time(text, format) AS "
        "coalesce(strftime(try_strptime(text, format), '%Y-%m-%d %H:%M:%S.%f'), text || ' (not ' || format || ')')"
    )
    return con


def _session(engine: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """A connection with temporary tables of its own: opening one costs microseconds, an engine tens of milliseconds."""
    con = engine.cursor()
    con.execute("SET TimeZone = 'UTC'")
    con.execute("SET python_enable_replacements = false")
    return con


def judge(
    raw: Raw,
    workflow: Workflow,
    source: Source,
    landing: Landing,
    keys: Callable[[Sequence[date]], pa.Table],
    engine: duckdb.DuckDBPyConnection | None = None,
) -> Judged:
    """Map a file's rows with the source's SQL and hold each against the contract.

    ``keys(days)`` gives the contract's unique columns of the live rows of other files with ``source_file`` and
    ``source_row``. Raises FileRefused when the SQL fails, or does not yield each row of ``raw`` exactly once.
    """
    contract = workflow.contract.events
    columns = event_columns(contract)
    place = f"{landing.path}: {source.sql}"
    con = _session(engine or _engine())

    def run(sql: str, what: str = place) -> duckdb.DuckDBPyConnection:
        try:
            return con.execute(sql)
        except duckdb.Error as error:
            raise FileRefused(f"{what}: {str(error).splitlines()[0]}") from error

    def table(sql: str) -> pa.Table:
        run(f'CREATE OR REPLACE TEMP TABLE "#out" AS {sql}')
        return con.sql('FROM "#out"').to_arrow_table()

    names = [c for c in raw.table.column_names if c != "source_row"]
    con.register("#file", raw.table)
    nulls = ", ".join(_s(text) for text in source.null)
    native = source.format == "parquet" or not nulls
    shown = [_q(n) if native else f"CASE WHEN {_q(n)} NOT IN ({nulls}) THEN {_q(n)} END AS {_q(n)}" for n in names]
    run(f'CREATE TEMP VIEW raw AS SELECT {", ".join([*shown, "source_row"])} FROM "#file"')
    run(f'CREATE TEMP TABLE "#mapped" AS\n{workflow.sql(source.sql)}')
    types = {row[0]: row[1] for row in run('DESCRIBE "#mapped"').fetchall()}
    supplied = {"known_at"} if source.known_at == "landing" else set[str]()
    lacking = [c for c in ["source_row", *columns] if c not in types and c not in supplied]
    beyond = [c for c in types if (c not in columns and c != "source_row") or c in supplied]
    if lacking:
        raise FileRefused(f"{place}: yields no column {_some(lacking)}, which the contract needs")
    if beyond:
        known = ", and known_at comes with the landing" if supplied else ""
        raise FileRefused(f"{place}: yields column {_some(beyond)}; contract.yaml does not name it{known}")
    kept = run(
        "SELECT count(*), count(DISTINCT m.source_row), count(r.source_row) "
        'FROM "#mapped" m LEFT JOIN "#file" r USING (source_row)'
    ).fetchall()[0]
    if set(kept) != {raw.table.num_rows}:
        raise FileRefused(
            f"{place}: must yield each of the {raw.table.num_rows} rows of raw once with its source_row, yields "
            f"{kept[0]} rows; take out WHERE, DISTINCT, GROUP BY and joins that drop or repeat rows"
        )

    known_at = f"TIMESTAMP '{landing.landed_at.isoformat(sep=' ')}'"
    typed = {c: known_at if c in supplied else _typed(c, spec.type, types[c]) for c, spec in columns.items()}
    misfits = "".join(
        f" WHEN {_q(c)} IS NOT NULL AND ({typed[c]}) IS NULL THEN "
        + _verdict(f"type:{c}", f"{_value(c)} || {_s(f' is not a {columns[c].type}')}")
        for c in columns
        if c not in supplied and columns[c].type != "VARCHAR"
    )
    misfit = f"CASE{misfits} END" if misfits else "NULL"
    run(
        f'CREATE TEMP TABLE "#typed" AS SELECT CAST(source_row AS BIGINT) AS source_row, '
        f'{", ".join(f"{sql} AS {_q(c)}" for c, sql in typed.items())}, {misfit} AS "#misfit" FROM "#mapped"'
    )
    required = [c for c, spec in columns.items() if spec.required or c in ("event_at", "known_at")]
    rules = _rules(columns, required, contract)
    tests = "".join(f" WHEN {test} THEN {_verdict(rule, detail)}" for rule, test, detail in rules)
    run(
        f'CREATE TEMP TABLE "#judged" AS SELECT *, coalesce("#misfit", CASE{tests} END) AS "#broken" FROM "#typed"',
        f"{landing.path}: a rule of the contract",
    )
    if contract.unique:
        _mark_duplicates(con, run, contract.unique, keys, landing.path)
    # a restated row cannot have been known before it landed: until then the earlier content of the path stands
    later = f"greatest(known_at, {known_at}) AS known_at"
    kept_columns = [later if landing.restated and c == "known_at" else _q(c) for c in columns]
    events = table(
        f"SELECT {', '.join(kept_columns)}, "
        f"CAST(event_at AS DATE) AS day, {_s(landing.source)} AS source, {_s(landing.path)} AS source_file, "
        f"{_s(landing.file_id)} AS source_file_id, source_row, CAST(NULL AS TIMESTAMP) AS superseded_at "
        'FROM "#judged" WHERE "#broken" IS NULL ORDER BY source_row'
    )
    fields = ", ".join(f"{_s(n)}: CAST(f.{_q(n)} AS VARCHAR)" for n in names)
    broken = table(
        'SELECT j.source_row, j."#broken".rule AS rule, j."#broken".detail AS detail, '
        f'CAST(to_json({{{fields}}}) AS VARCHAR) AS raw FROM "#judged" j JOIN "#file" f USING (source_row) '
        'WHERE j."#broken" IS NOT NULL ORDER BY 1'
    )
    con.close()
    malformed = pa.table(
        {
            "source_row": pa.array([m[0] for m in raw.malformed], pa.int64()),
            "rule": pa.array(["malformed"] * len(raw.malformed), pa.string()),
            "detail": pa.array([m[2] for m in raw.malformed], pa.string()),
            "raw": pa.array([json.dumps({"line": m[1]}, ensure_ascii=False) for m in raw.malformed], pa.string()),
        }
    )
    rejected = pa.concat_tables([broken.cast(malformed.schema), malformed]).sort_by("source_row")
    if events.num_rows + rejected.num_rows != raw.rows:
        raise FileRefused(
            f"{landing.path}: {raw.rows} rows in the file, but {events.num_rows} accepted and "
            f"{rejected.num_rows} quarantined; this is a fault of the program, and nothing of the file has landed"
        )
    constants: dict[str, Any] = {
        "source": landing.source,
        "source_file": landing.path,
        "source_file_id": landing.file_id,
        "landed_at": landing.landed_at,
        "landed_day": landing.landed_at.date(),
    }
    quarantine = [
        pa.repeat(pa.scalar(constants[f.name], f.type), rejected.num_rows) if f.name in constants else rejected[f.name]
        for f in QUARANTINE
    ]
    return Judged(events, pa.table(quarantine, schema=QUARANTINE))


def _mark_duplicates(
    con: duckdb.DuckDBPyConnection,
    run: Callable[..., duckdb.DuckDBPyConnection],
    unique: Sequence[str],
    keys: Callable[[Sequence[date]], pa.Table],
    path: str,
) -> None:
    """Mark rows that share the unique columns with an earlier row of the file that stands, or a live row of another."""
    span = 'SELECT min(event_at), max(event_at) FROM "#judged" WHERE "#broken" IS NULL HAVING count(*) > 0'
    found = run(span).fetchall()
    if not found:
        return
    first, last = found[0]
    days = [first.date() + timedelta(days=n) for n in range((last.date() - first.date()).days + 1)]
    con.register("#known", keys(days))
    key = ", ".join(_q(c) for c in unique)
    shared = " AND ".join(f"k.{_q(c)} IS NOT DISTINCT FROM s.{_q(c)}" for c in unique)
    run(
        'CREATE TEMP TABLE "#first" AS WITH s AS '
        f"(SELECT source_row, {key}, min(source_row) OVER (PARTITION BY {key}) AS first "
        'FROM "#judged" WHERE "#broken" IS NULL), k AS '
        f"(SELECT {key}, min({{'file': source_file, 'row': source_row}}) AS place FROM \"#known\" GROUP BY ALL) "
        f"SELECT s.source_row, coalesce(k.place, {{'file': {_s(path)}, 'row': s.first}}) AS place "
        f"FROM s LEFT JOIN k ON {shared} WHERE k.place IS NOT NULL OR s.source_row > s.first",
        f"{path}: unique of the contract",
    )
    said = " || ', ' || ".join(_value(c) for c in unique)
    run(
        "UPDATE \"#judged\" SET \"#broken\" = {'rule': 'duplicate', 'detail': "
        f"{said} || ' stands already in row ' || f.place.row || ' of ' || f.place.file}} "
        'FROM "#first" f WHERE "#judged".source_row = f.source_row'
    )


# --- landing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _only_writer(lake: Lake, workflow: str) -> Iterator[None]:
    """One ingest a workflow at a time in a local lake; in an object store the orchestrator's pool must see to it."""
    if "://" in lake.root:
        yield
        return
    import fcntl

    folder = Path(lake.root, workflow)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".ingest.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _of(source: str, ids: Sequence[str]) -> str:
    """Delta predicate: rows of some contents of a source."""
    return f"source = {_s(source)} AND source_file_id IN ({', '.join(_s(i) for i in ids)})"


class _Ingest:
    """One run: the manifest as it will stand, and the files judged but not yet written."""

    def __init__(self, workflow: Workflow, lake: Lake, now: datetime) -> None:
        self.workflow, self.lake, self.now, self.engine = workflow, lake, now, _engine()
        self.events, self.quarantine = f"{workflow.name}/events", f"{workflow.name}/quarantine"
        self.manifest = f"{workflow.name}/files"
        self.records: dict[tuple[str, str], list[FileRecord]] = {}
        if lake.exists(self.manifest):
            for row in lake.read(self.manifest).to_pylist():
                self.records.setdefault((row["source"], row["path"]), []).append(FileRecord(**row))
        self.before: dict[tuple[str, str], list[FileRecord]] = {}
        self.batch: list[tuple[Landing, Judged]] = []
        self.intents: list[FileRecord] = []
        self.retired: dict[str, datetime] = {}
        self.kept_times: dict[tuple[str, str, str | None], datetime] = {}
        self.known: pa.Table | None = None
        self.known_days: set[date | None] = set()
        self.seen: list[FileRecord] = []
        self.new: list[FileRecord] = []
        self.rules: Counter[str] = Counter()
        self.by_day: Counter[date] = Counter()

    # the manifest

    def live(self, source: str, path: str) -> FileRecord | None:
        found = self.records.get((source, path), [])
        return next((r for r in found if r.superseded_at is None and r.status in ("landed", "duplicate")), None)

    def holders(self, source: str, file_id: str) -> list[FileRecord]:
        """Live records of one content."""
        every = (self.live(s, p) for s, p in self.records if s == source)
        return [r for r in every if r is not None and r.file_id == file_id]

    def put(self, key: tuple[str, str], records: list[FileRecord]) -> None:
        if records != self.records.get(key, []):
            self.before.setdefault(key, self.records.get(key, []))
            self.records[key] = records

    def write_manifest(self, records: Mapping[tuple[str, str], list[FileRecord]]) -> None:
        paths = {path for _, path in records}
        rows = [asdict(r) for key, found in {**self.records, **records}.items() if key[1] in paths for r in found]
        predicate = f"path IN ({', '.join(_s(p) for p in sorted(paths))})"
        self.lake.replace(self.manifest, pa.Table.from_pylist(rows, FILES), predicate=predicate, partition_by=())

    def undo_interrupted(self) -> None:
        """Take back what an attempt that never reached its end had written; its landing time is kept for the next."""
        left = {key: [r for r in found if r.status != "landing"] for key, found in self.records.items()}
        open_ = [r for found in self.records.values() for r in found if r.status == "landing"]
        for attempt in open_:
            source, file_id, at = attempt.source, attempt.file_id or "", attempt.landed_at
            self.kept_times[source, attempt.path, file_id] = at
            if attempt.duplicate_of is None:
                self.rewrite(self.events, source, file_id, pc.field("superseded_at").is_valid())
                self.rewrite(self.quarantine, source, file_id, pc.field("landed_at") != at)
        for attempt in open_:
            if attempt.supersedes is not None:
                self.revive(attempt.source, attempt.supersedes, attempt.landed_at)
        if open_:
            changed = {key: left[key] for key in {(r.source, r.path) for r in open_}}
            self.records = left
            self.write_manifest(changed)

    def rewrite(self, table: str, source: str, file_id: str, keep: pc.Expression) -> None:
        if self.lake.exists(table):
            rows = self.lake.read(table, where=_content(source, [file_id])).filter(keep)
            day = ("landed_day",) if table == self.quarantine else ("day",)
            self.lake.replace(table, rows, predicate=_of(source, [file_id]), partition_by=day)

    def revive(self, source: str, file_id: str, at: datetime) -> None:
        if self.lake.exists(self.events):
            rows = self.lake.read(self.events, where=_content(source, [file_id]))
            self.lake.replace(self.events, _superseded(rows, file_id, at, None), predicate=_of(source, [file_id]))

    # one file

    def take(self, name: str, source: Source, file: LandingFile, max_bytes: int) -> None:
        key, size, file_id = (name, file.name), None, None
        others = [r for r in self.records.get(key, []) if r.status != "refused"]
        try:
            with tempfile.TemporaryDirectory(prefix="signalbox-") as folder:
                snap = snapshot(file, Path(folder), max_bytes=max_bytes)
                size, file_id = snap.size, snap.file_id
                current = self.live(*key)
                if current is not None and current.file_id == file_id:
                    self.put(key, others)
                    self.seen.append(current)
                    return
                record = self.land(name, source, snap, current, max_bytes)
        except FileRefused as error:
            reason = _without_secrets(str(error))
            record = FileRecord(name, file.name, file_id, size, 0, 0, 0, "refused", reason, None, None, self.now)
            same = next((r for r in self.records.get(key, []) if replace(r, landed_at=self.now) == record), None)
            record = same or record
            self.put(key, [*others, record])
        else:
            others = [r for r in self.records.get(key, []) if r.status != "refused"]
            self.put(key, [*others, record])
            self.new.append(record)
        self.seen.append(record)

    def land(self, name: str, source: Source, snap: Snapshot, current: FileRecord | None, max_bytes: int) -> FileRecord:
        """Judge a content that its path did not hold before; nothing is changed when it is refused."""
        landed_at = self.kept_times.get((name, snap.name, snap.file_id), self.now)
        supersedes = current.file_id if current else None
        record = FileRecord(
            name, snap.name, snap.file_id, snap.size, 0, 0, 0, "duplicate", None, None, supersedes, landed_at
        )
        twins = self.holders(name, snap.file_id)
        if twins:
            record = replace(record, duplicate_of=twins[0].duplicate_of or twins[0].path)
        else:
            raw = read_rows(snap, source, max_bytes=max_bytes)
            landing = Landing(name, snap.name, snap.file_id, landed_at, restated=current is not None)
            leaving = current.file_id if current and len(self.holders(name, current.file_id or "")) == 1 else None
            judged = judge(
                raw, self.workflow, source, landing, lambda days: self.keys(days, name, leaving), self.engine
            )
            accepted, quarantined = judged.events.num_rows, judged.quarantine.num_rows
            record = replace(record, status="landed", rows=raw.rows, accepted=accepted, quarantined=quarantined)
            self.batch.append((landing, judged))
            self.rules.update(judged.quarantine["rule"].to_pylist())
            for pair in judged.events["day"].value_counts().to_pylist():
                self.by_day[pair["values"]] += pair["counts"]
            self.remember(judged.events)
        if current is not None:
            self.retire(current, landed_at)
        self.intents.append(replace(record, status="landing"))
        return record

    def retire(self, record: FileRecord, at: datetime) -> None:
        """A path holds its content no more; the rows go with it unless another path holds the same."""
        key = (record.source, record.path)
        self.put(key, [replace(r, superseded_at=at) if r is record else r for r in self.records[key]])
        heirs = self.holders(record.source, record.file_id or "")
        if not heirs:
            self.retired[record.file_id or ""] = at
            self.forget(record.source, record.file_id or "")
        elif record.status == "landed":
            heir = heirs[0]
            counts = {c: getattr(record, c) for c in ("rows", "accepted", "quarantined")}
            promoted = replace(heir, status="landed", duplicate_of=None, **counts)
            place = (heir.source, heir.path)
            self.put(place, [promoted if r is heir else r for r in self.records[place]])

    # the unique columns of live rows

    def key_columns(self) -> list[str]:
        place = ("day", "source", "source_file", "source_file_id", "source_row")
        return list(dict.fromkeys([*self.workflow.contract.events.unique, *place]))

    def keys(self, days: Sequence[date], source: str, leaving: str | None) -> pa.Table:
        """Unique columns of the live rows, without those of a content that is about to leave.

        Where the unique columns hold event_at, only the file's days are read.
        """
        wanted: set[date | None] = set(days) if "event_at" in self.workflow.contract.events.unique else {None}
        missing = wanted - self.known_days
        if missing and self.lake.exists(self.events):
            live = pc.field("superseded_at").is_null()
            if self.retired:
                live &= ~_content(source, list(self.retired))
            span = None if None in missing else sorted(d for d in missing if d is not None)
            rows = self.lake.read(self.events, days=span, where=live, columns=self.key_columns())
            self.known = pa.concat_tables([self.known, rows], promote_options="default") if self.known else rows
        self.known_days |= missing
        if self.known is None:
            kinds = {"source_row": pa.int64()}
            return pa.table({c: pa.array([], kinds.get(c, pa.string())) for c in self.key_columns()})
        return self.known if leaving is None else self.known.filter(~_content(source, [leaving]))

    def remember(self, events: pa.Table) -> None:
        if self.workflow.contract.events.unique:
            rows = events.select(self.key_columns())
            self.known = pa.concat_tables([self.known, rows], promote_options="default") if self.known else rows

    def forget(self, source: str, file_id: str) -> None:
        if self.known is not None:
            self.known = self.known.filter(~_content(source, [file_id]))

    # writing

    def flush(self) -> None:
        """Write what was judged: the intent, quarantine, events, and last the manifest that makes it so."""
        if self.intents:
            keyed: dict[tuple[str, str], list[FileRecord]] = {}
            for intent in self.intents:
                key = (intent.source, intent.path)
                keyed[key] = [*self.before.get(key, []), intent]
            self.write_manifest(keyed)
            self.write_rows(self.intents[0].source)
        if self.before:
            self.write_manifest({key: self.records[key] for key in self.before})
        self.batch, self.intents, self.retired, self.before = [], [], {}, {}

    def write_rows(self, source: str) -> None:
        ids = [landing.file_id for landing, _ in self.batch]
        past = {r.file_id for found in self.records.values() for r in found if r.source == source and r.superseded_at}
        again = [i for i in ids if i in past]
        rejected = [judged.quarantine for _, judged in self.batch]
        events = [judged.events for _, judged in self.batch]
        if again and self.lake.exists(self.quarantine):
            times = pa.array({landing.landed_at for landing, _ in self.batch}, pa.timestamp("us"))
            earlier = self.lake.read(self.quarantine, where=_content(source, again))
            rejected.insert(0, earlier.filter(~pc.field("landed_at").isin(times)))
        if (again or self.retired) and self.lake.exists(self.events):
            earlier = self.lake.read(self.events, where=_content(source, [*again, *self.retired]))
            for file_id, at in self.retired.items():
                earlier = _superseded(earlier, file_id, None, at)
            events.insert(0, earlier)
        self.put_rows(self.quarantine, "landed_day", source, ids, rejected)
        self.put_rows(self.events, "day", source, [*ids, *self.retired], events)

    def put_rows(self, table: str, day: str, source: str, ids: Sequence[str], parts: list[pa.Table]) -> None:
        if not parts:
            return
        rows = pa.concat_tables(parts, promote_options="default")
        if not rows.num_rows and self.lake.exists(table):
            return
        predicate = _of(source, sorted(set(ids)))
        if rows.num_rows:
            span = pc.min_max(rows[day]).as_py()
            predicate += f" AND {day} >= '{span['min']}' AND {day} <= '{span['max']}'"
        self.lake.replace(table, rows, predicate=predicate, partition_by=(day,))

    def result(self) -> IngestResult:
        tables = {t: self.lake.version(t) for t in (self.events, self.quarantine, self.manifest)}
        return IngestResult(
            files=tuple(self.seen),
            new=tuple(r.path for r in self.new),
            accepted=sum(r.accepted for r in self.new),
            quarantined=sum(r.quarantined for r in self.new),
            rules=dict(sorted(self.rules.items())),
            accepted_by_day=dict(sorted(self.by_day.items())),
            refused={r.path: r.reason or "" for r in self.seen if r.status == "refused"},
            versions={t: v for t, v in tables.items() if v is not None},
        )


def _content(source: str, ids: Sequence[str]) -> pc.Expression:
    return (pc.field("source") == source) & pc.field("source_file_id").isin(list(ids))


def _superseded(rows: pa.Table, file_id: str, was: datetime | None, becomes: datetime | None) -> pa.Table:
    """Rows of a content with one time of supersession put in the place of another."""
    at = rows["superseded_at"]
    same = pc.is_null(at) if was is None else pc.fill_null(pc.equal(at, pa.scalar(was, at.type)), False)
    touched = pc.and_(same, pc.equal(rows["source_file_id"], file_id))
    column = pc.if_else(touched, pa.scalar(becomes, at.type), at)
    return rows.set_column(rows.column_names.index("superseded_at"), "superseded_at", column)


def ingest(
    workflow: Workflow,
    lake: Lake,
    landing_root: str | Path,
    *,
    now: datetime,
    days: Sequence[date] | None = None,
    max_bytes: int = MAX_BYTES,
) -> IngestResult:
    """Land every file of a workflow that has not landed yet; ``days`` limits patterns that hold ``{day}``.

    Files lie under ``<landing_root>/<workflow>/``. ``now`` (UTC) is the landing time. A content already landed by the
    same source is a duplicate and adds nothing. A path whose content changed is superseded: its earlier rows keep
    standing in the table with ``superseded_at``, and the new ones are known from ``now`` on at the earliest, so that
    every point in time sees exactly one of the two. A refused file is tried again by the next run, and so is
    everything that a crash interrupted: the outcome is the same.
    """
    moment = now.astimezone(UTC).replace(tzinfo=None) if now.tzinfo else now
    root = f"{str(landing_root).rstrip('/')}/{workflow.name}"
    with _only_writer(lake, workflow.name):
        run = _Ingest(workflow, lake, moment)
        run.undo_interrupted()
        for name, source in workflow.sources.items():
            for file in discover(root, source, days):
                run.take(name, source, file, max_bytes)
                if sum(judged.events.num_rows for _, judged in run.batch) >= BATCH_ROWS:
                    run.flush()
            run.flush()
        return run.result()
