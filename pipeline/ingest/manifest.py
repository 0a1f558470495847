"""Landing manifest: which content each path of the landing zone holds, and which contents stand.

Belongs here: the table ``files``, what follows when a content comes to a path or leaves it, and which rows of ``quarantine``
stand by it. Does not: reading files (``pipeline.ingest.readers``), judging rows (``pipeline.ingest.row_rules``), changing tables
(``pipeline.ingest.landing``).

A content is the SHA-256 of a file's bytes. It stands by one record with the status ``landed``, its owner; other paths that hold
it are ``duplicate``. It is superseded where a path that held it comes to hold another content, unless it lies elsewhere in the
zone (then its owner moves there), or a file of the zone was renamed over it (then it stays, as after a deletion).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ingest.files import FileRefused, LandingFile, digest, discover
from pipeline.ingest.row_rules import QUARANTINE, text_sql
from pipeline.lake import Lake

if TYPE_CHECKING:
    from pipeline.workflow import Source, Workflow

Status = Literal["landed", "refused", "duplicate", "landing"]
Place = tuple[str, str]
"""A source's name and a path."""


@dataclass(frozen=True)
class FileRecord:
    """One row of the manifest: what became of one content of one path.

    The path holds it while ``superseded_at`` and ``left_at`` are None. ``left_at``: a file that stood already was renamed
    over it, and its rows stay. ``known_from``: the path had held another content, so that its rows are known from then on at
    the earliest. ``landed_at`` of a ``landed`` record is when its rows landed, under whatever path, and
    ``mapping`` the digest of what they were mapped and judged by (None: an earlier release did not write it down).
    """

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
    left_at: datetime | None = None
    mapping: str | None = None
    known_from: datetime | None = None

    @property
    def place(self) -> Place:
        return self.source, self.path

    @property
    def stands(self) -> bool:
        """Whether it is neither refused, nor interrupted, nor superseded."""
        return self.status in ("landed", "duplicate") and self.superseded_at is None


FILES = pa.schema(
    [(name, pa.string()) for name in ("source", "path", "file_id")]
    + [(name, pa.int64()) for name in ("size", "rows", "accepted", "quarantined")]
    + [(name, pa.string()) for name in ("status", "reason", "duplicate_of", "supersedes")]
    + [(name, pa.timestamp("us")) for name in ("landed_at", "superseded_at", "left_at")]
    + [("mapping", pa.string()), ("known_from", pa.timestamp("us"))]
)


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


def mapping_digest(workflow: Workflow, name: str) -> str:
    """SHA-256 of what decides how a source's rows are mapped and judged: its SQL, its settings, the events' contract."""
    source, events = workflow.sources[name], workflow.contract.events
    # without what has its default, so that a release which adds a setting changes no digest
    settings = source.model_dump(mode="json", exclude_defaults=True, exclude={"files", "sql"})
    contract = events.model_dump(mode="json", exclude_defaults=True, exclude={"max_quarantined_share", "expectations"})
    text = json.dumps([workflow.sql(source.sql), settings, contract], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Zone:
    """Which content each path of a source holds now; a file that nobody has read yet is looked at when it is asked for."""

    def __init__(self, root: str, source: Source, max_bytes: int) -> None:
        self.root, self.source, self.max_bytes = root, source, max_bytes
        self.contents: dict[str, str | None] = {}
        """Path → SHA-256; None where it cannot be read."""

    @cached_property
    def files(self) -> dict[str, LandingFile]:
        """Every file of the source, whatever the days of the run."""
        return {file.name: file for file in discover(self.root, self.source)}

    def holds(self, path: str, file_id: str) -> bool:
        """Whether a path holds a content."""
        if path not in self.contents:
            try:
                found = digest(self.files[path], max_bytes=self.max_bytes)[0] if path in self.files else None
            except FileRefused:
                found = None
            self.contents[path] = found
        return self.contents[path] == file_id


class Manifest:
    """The records by path and by content, as they will stand; ``before``: what stands in the lake of those that changed."""

    def __init__(self, records: Iterable[FileRecord]) -> None:
        self.records: dict[Place, list[FileRecord]] = {}
        self.before: dict[Place, list[FileRecord]] = {}
        self._paths: dict[tuple[str, str | None], set[str]] = {}
        for record in records:
            self.records.setdefault(record.place, []).append(record)
            self._paths.setdefault((record.source, record.file_id), set()).add(record.path)

    @classmethod
    def read(cls, lake: Lake, table: str) -> Manifest:
        """As it stands in the lake; empty where nothing has landed."""
        return cls(FileRecord(**row) for row in (lake.read(table).to_pylist() if lake.exists(table) else ()))

    def put(self, place: Place, records: list[FileRecord]) -> None:
        if records == self.records.get(place, []):
            return
        self.before.setdefault(place, self.records.get(place, []))
        self.records[place] = records
        for record in records:
            self._paths.setdefault((record.source, record.file_id), set()).add(record.path)

    def change(self, record: FileRecord, **fields: object) -> FileRecord:
        """Put a record's new form in its place."""
        new = replace(record, **fields)  # type: ignore[arg-type]
        self.put(record.place, [new if r is record else r for r in self.records[record.place]])
        return new

    def settled(self, place: Place) -> list[FileRecord]:
        """The records of a path without what was refused or interrupted there."""
        return [r for r in self.records.get(place, []) if r.status in ("landed", "duplicate")]

    def current(self, place: Place) -> FileRecord | None:
        """What a path holds, by the manifest."""
        return next((r for r in self.settled(place) if r.stands and r.left_at is None), None)

    def of(self, source: str, file_id: str | None) -> list[FileRecord]:
        """Every record of a content, sorted by when it came and where."""
        paths = self._paths.get((source, file_id), set())
        found = [r for p in paths for r in self.records.get((source, p), []) if r.file_id == file_id]
        return sorted(found, key=lambda r: (r.landed_at, r.path))

    def owner(self, source: str, file_id: str | None) -> FileRecord | None:
        """The record by which a content stands; None where it never landed or is superseded."""
        return next((r for r in self.of(source, file_id) if r.stands and r.status == "landed"), None)

    def owners(self) -> list[FileRecord]:
        """The contents that stand."""
        return [r for found in self.records.values() for r in found if r.stands and r.status == "landed"]

    def superseded(self, source: str, file_id: str | None) -> FileRecord | None:
        """The newest record under which a content was superseded; None where it stands or never landed."""
        if self.owner(source, file_id) is not None:
            return None
        gone = [r for r in self.of(source, file_id) if r.status == "landed" and r.superseded_at is not None]
        return gone[-1] if gone else None

    def heirs(self, record: FileRecord, zone: Zone) -> list[FileRecord]:
        """Records of other paths by which a content that stands lies in the zone, too."""
        return [
            r
            for r in self.of(record.source, record.file_id)
            if r.path != record.path and r.stands and r.left_at is None and r.reason is None
            and zone.holds(r.path, r.file_id or "")
        ]  # fmt: skip

    def pass_on(self, owner: FileRecord, heir: FileRecord, at: datetime) -> None:
        """A content's rows stand under another path from now on; nothing of the rows changes."""
        kept = ("rows", "accepted", "quarantined", "landed_at", "supersedes", "mapping", "known_from")
        self.change(heir, status="landed", duplicate_of=None, **{name: getattr(owner, name) for name in kept})
        self.change(owner, superseded_at=owner.superseded_at or at)
        for other in self.of(owner.source, owner.file_id):
            if other.stands and other.status == "duplicate":
                self.change(other, duplicate_of=heir.path)

    def follow(self, source: str, file_id: str, zone: Zone, at: datetime) -> None:
        """Where a content's owner holds it no more and another path does, that path is its owner."""
        owner = self.owner(source, file_id)
        if owner is not None and (owner.left_at is not None or not zone.holds(owner.path, file_id)):
            found = [
                r for r in self.of(source, file_id)
                if r is not owner and r.stands and r.left_at is None and r.reason is None and zone.holds(r.path, file_id)
            ]  # fmt: skip
            if found:
                self.pass_on(owner, found[0], at)

    def restates(self, record: FileRecord, zone: Zone, moved: bool) -> bool:
        """Whether the content of a path would be superseded if another came to the path (``moved``: by a renaming)."""
        return self.owner(*_content_of(record)) is not None and not moved and not self.heirs(record, zone)

    def leave(self, place: Place, file_id: str, zone: Zone, moved: bool, at: datetime) -> bool:
        """A path has come to hold another content. Whether the one it held is superseded by that."""
        found = [r for r in self.settled(place) if r.file_id == file_id and r.stands and r.left_at is None]
        if not found:
            return False
        old = found[0]
        owner = self.owner(*_content_of(old))
        if owner is None:
            self.change(old, superseded_at=at)
            return False
        heirs = self.heirs(old, zone)
        if heirs and old is owner:
            self.pass_on(old, heirs[0], at)
        elif heirs or (moved and old is not owner):
            self.change(old, superseded_at=at)
        elif moved:
            self.change(old, left_at=at)
        else:
            for record in self.of(*_content_of(old)):
                if record.stands and record.reason is None:
                    self.change(record, superseded_at=at)
            return True
        return False


def _content_of(record: FileRecord) -> tuple[str, str | None]:
    return record.source, record.file_id


def content_where(source: str, ids: Sequence[str]) -> pc.Expression:
    """The rows of some contents of a source."""
    return (pc.field("source") == source) & pc.field("source_file_id").isin(pa.array(list(ids), pa.string()))


def content_sql(source: str, ids: Sequence[str]) -> str:
    """The same as a Delta predicate."""
    return f"source = {text_sql(source)} AND source_file_id IN ({', '.join(text_sql(i) for i in ids)})"


def write(lake: Lake, table: str, records: Mapping[Place, list[FileRecord]]) -> None:
    """Put the records of some paths in the place of those that stand; all sources of a path are among them."""
    paths = {path for _, path in records}
    rows = [asdict(r) for found in records.values() for r in found]
    predicate = f"path IN ({', '.join(text_sql(p) for p in sorted(paths))})"
    lake.replace(table, pa.Table.from_pylist(rows, FILES), predicate=predicate, partition_by=())


def read_quarantine(
    lake: Lake, table: str, where: pc.Expression | None = None, *, without: Sequence[str] = ()
) -> pa.Table:
    """Quarantined rows with every column of ``QUARANTINE``, null where an earlier release did not write it.

    ``where`` may speak of the columns alone that every release wrote: Delta leaves out files that lack one.
    """
    wanted = pa.schema([f for f in QUARANTINE if f.name not in without])
    if not lake.exists(table):
        return wanted.empty_table()
    written = lake.read(table, where=pc.field("landed_day").is_null()).column_names
    rows = lake.read(table, where=where, columns=[name for name in wanted.names if name in written])
    for field in wanted:
        if field.name not in written:
            rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows.select(wanted.names).cast(wanted)


def standing(records: Manifest, rows: pa.Table) -> pa.Table:
    """Those of some quarantined rows whose content stands."""
    rows = rows.filter(pc.is_null(rows["superseded_at"]))
    owners: dict[str, list[str | None]] = {}
    for record in records.owners():
        owners.setdefault(record.source, []).append(record.file_id)
    keep = [rows.filter(content_where(s, [i for i in ids if i])) for s, ids in sorted(owners.items())]
    return pa.concat_tables(keep) if keep else rows.slice(0, 0)


def standing_quarantine(workflow: Workflow, lake: Lake, days: Sequence[date]) -> pa.Table:
    """The quarantined rows of some days whose content stands; ``day`` is the day of landing where none was written."""
    rows = read_quarantine(lake, workflow.table("quarantine"), without=("raw", "detail"))
    day = pc.coalesce(rows["day"], rows["landed_day"])
    rows = rows.set_column(rows.column_names.index("day"), QUARANTINE.field("day"), day)
    rows = rows.filter(pc.is_in(day, pa.array(list(days), pa.date32())))
    return standing(Manifest.read(lake, workflow.table("files")), rows)
