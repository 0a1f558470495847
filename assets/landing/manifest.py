"""Landing manifest: each content of each path, landed whole and once.

Belongs here: what stands in the tables ``files``, ``events`` and ``quarantine``, and how one ingest changes them. Does not: reading
(``assets.landing.readers``) or judging rows (``assets.landing.row_rules``).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.compute as pc

from assets.lake import Lake
from assets.landing.files import MAX_BYTES, FileRefused, LandingFile, Snapshot, discover, snapshot, without_secrets
from assets.landing.readers import read_rows
from assets.landing.row_rules import Judged, Landing, judge, open_engine, text_sql

if TYPE_CHECKING:
    from assets.workflow import Source, Workflow

BATCH_ROWS = 1_000_000

Status = Literal["landed", "refused", "duplicate", "landing"]


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
    return f"source = {text_sql(source)} AND source_file_id IN ({', '.join(text_sql(i) for i in ids)})"


class _Ingest:
    """One run: the manifest as it will stand, and the files judged but not yet written."""

    def __init__(self, workflow: Workflow, lake: Lake, now: datetime) -> None:
        self.workflow, self.lake, self.now, self.engine = workflow, lake, now, open_engine()
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
        predicate = f"path IN ({', '.join(text_sql(p) for p in sorted(paths))})"
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
            reason = without_secrets(str(error))
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
