"""Landing runs: files of the landing zone become rows of ``events`` and ``quarantine``, or are mapped again.

Belongs here: one run of ``ingest`` or ``remap``: what is judged, how the tables change, what a crash leaves. Does not: which
content stands under which path (``pipeline.ingest.manifest``), judging a row (``pipeline.ingest.row_rules``).

A run changes the tables in steps: the intent with the tables' versions (in ``files``), quarantine, events, and last ``files``,
which makes it so. What an interrupted step wrote is taken back to those versions by the next run.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import deltalake
import pyarrow as pa
import pyarrow.compute as pc

from common.progress import each
from pipeline.ingest.files import (
    MAX_BYTES,
    FileChanged,
    FileRefused,
    LandingFile,
    Snapshot,
    day_of,
    digest,
    discover,
    snapshot,
    without_secrets,
)
from pipeline.ingest.manifest import (
    FileRecord,
    Manifest,
    Place,
    Zone,
    _only_writer,
    content_sql,
    content_where,
    mapping_digest,
    read_quarantine,
    standing,
    write,
)
from pipeline.ingest.readers import read_rows
from pipeline.ingest.row_rules import (
    Judged,
    Landing,
    event_columns,
    follow_ends,
    from_json,
    judge,
    name_sql,
    open_engine,
    same_key,
    session,
)
from pipeline.lake import Lake

if TYPE_CHECKING:
    from pipeline.workflow import Workflow

BATCH_ROWS = 1_000_000
_TAKEN_BACK = "an interrupted landing, taken back; the time is kept for the next try"


@dataclass(frozen=True)
class IngestResult:
    """What one run of ingest found. ``files`` are the records of every file seen, counts are of rows it landed itself.

    ``new`` holds the paths that hold another content than before, ``landed`` those of them whose rows this run judged,
    ``refused`` the reasons by path, ``versions`` the newest version of each table.
    ``admitted``: rows that came in from quarantine, because the row that they doubled has left. ``outdated``: paths whose
    rows stand by another mapping or contract than the present one.
    """

    files: tuple[FileRecord, ...] = ()
    new: tuple[str, ...] = ()
    landed: tuple[str, ...] = ()
    accepted: int = 0
    quarantined: int = 0
    rules: Mapping[str, int] = field(default_factory=dict)
    accepted_by_day: Mapping[date, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    admitted: int = 0
    outdated: tuple[str, ...] = ()


@dataclass(frozen=True)
class RemapResult:
    """What one run of remap did: the records of the files mapped again, before and after.

    ``gone``: paths whose content lies in the zone no more, ``refused``: reasons by path; both keep the rows that they have.
    ``days``: the first and the last day of the rows that were there or came.
    """

    mapped: tuple[tuple[FileRecord, FileRecord], ...] = ()
    gone: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    days: tuple[date, date] | None = None


class _Run:
    """One run: the manifest as it will stand, and the files judged but not yet written."""

    def __init__(self, workflow: Workflow, lake: Lake, root: str, max_bytes: int, now: datetime) -> None:
        self.workflow, self.lake, self.root, self.max_bytes, self.now = workflow, lake, root, max_bytes, now
        self.engine = open_engine()
        self.events, self.quarantine = workflow.table("events"), workflow.table("quarantine")
        self.files = workflow.table("files")
        self.book = Manifest.read(lake, self.files)
        self.mappings = {name: mapping_digest(workflow, name) for name in workflow.sources}
        self.batch: list[tuple[Landing, Judged]] = []
        self.intents: list[FileRecord] = []
        self.retired: dict[tuple[str, str], datetime] = {}
        self.hidden: set[tuple[str, str]] = set()
        self.remapped: set[tuple[str, str]] = set()
        self.kept_times: dict[tuple[str, str, str | None], datetime] = {}
        self.known: pa.Table | None = None
        self.known_days: set[date | None] = set()
        self.seen: list[tuple[Place, FileRecord | None]] = []
        self.new: list[str] = []
        self.landed: list[str] = []
        self.accepted = self.quarantined = self.admitted = 0
        self.rules: Counter[str] = Counter()
        self.by_day: Counter[date] = Counter()

    # what a crash left

    def undo_interrupted(self) -> None:
        """Take back what a step that never reached its end had written; its landing times are kept for the next try."""
        left = [r for found in self.book.records.values() for r in found if r.status == "landing"]
        for record in left:
            self.kept_times[record.source, record.path, record.file_id] = record.landed_at
        open_ = [r for r in left if r.reason != _TAKEN_BACK]
        if not open_:
            return
        for table, version in self._versions_of(open_[0]).items():
            if self.lake.exists(table):
                self.lake.restore(table, version)
        for record in open_:
            self.book.change(record, reason=_TAKEN_BACK)
        self._write_manifest()

    def _versions_of(self, intent: FileRecord) -> dict[str, int | None]:
        """The tables' versions before a step, as its intent says."""
        if intent.reason is not None:
            found: dict[str, int | None] = json.loads(intent.reason)
            return found
        # an earlier release wrote the intent: what was committed after it is what it began

        def commits(table: str) -> list[tuple[int, int]]:
            where = self.lake.uri(table)
            opened = deltalake.DeltaTable(where, storage_options=self.lake.storage_options or None)
            return [(int(h["timestamp"]), int(h["version"])) for h in opened.history()]

        at = max(commits(self.files))[0]
        tables = [t for t in (self.events, self.quarantine) if self.lake.exists(t)]
        return {t: max((v for time, v in commits(t) if time <= at), default=None) for t in tables}

    # the files of one source

    def take(self, name: str, days: Sequence[date] | None) -> None:
        """Land the files of a source. All are hashed before one is judged: who holds what decides who supersedes whom."""
        source = self.workflow.sources[name]
        zone, sizes = Zone(self.root, source, self.max_bytes), dict[str, int]()
        files = {file.name: file for file in discover(self.root, source, days)}
        for path, file in each("events: files read", files.items(), len(files)):
            try:
                zone.contents[path], sizes[path] = digest(file, max_bytes=self.max_bytes)
            except FileRefused as error:
                zone.contents[path] = None
                self._refuse((name, path), None, None, error)
        held: dict[str | None, set[str]] = {}
        for found in self.book.records.values():
            for record in found:
                if record.source == name and record.stands:
                    held.setdefault(record.file_id, set()).add(record.path)

        def moved(file_id: str) -> bool:
            """Whether a content that paths held lies under none of them any more."""
            return bool(held.get(file_id)) and not any(zone.holds(p, file_id) for p in held[file_id])

        coming: list[str] = []
        for path in sizes:
            place, current = (name, path), self.book.current((name, path))
            if current is not None and current.file_id == zone.contents[path]:
                self.book.put(place, self.book.settled(place))
                self.seen.append((place, None))
            else:
                coming.append(path)
        # what stands already and was renamed or copied comes first: it decides what the others replace
        standing_ = [p for p in coming if self.book.owner(name, zone.contents[p]) is not None]
        former = {p: self.book.current((name, p)) for p in standing_}
        for path in standing_:
            self._double((name, path), zone.contents[path] or "", sizes[path])
        for path in standing_:
            file_id, old = zone.contents[path] or "", former[path]
            if old is not None:
                self._leave(old, file_id, zone, moved(file_id))
        for path in standing_:
            self.book.follow(name, zone.contents[path] or "", zone, self.now)
        for path in each("events: files landed", coming, len(coming)):
            if path not in former:
                self._land((name, path), files[path], zone, sizes[path], moved)
                if sum(judged.events.num_rows for _, judged in self.batch) >= BATCH_ROWS:
                    self.flush()
        self.flush()

    def _refuse(self, place: Place, file_id: str | None, size: int | None, error: FileRefused) -> None:
        """Put down why a content of a path did not land; what the path holds stays."""
        reason = without_secrets(str(error))
        record = FileRecord(*place, file_id, size, 0, 0, 0, "refused", reason, None, None, self.now)
        earlier = self.book.records.get(place, [])
        same = next((r for r in earlier if replace(r, landed_at=self.now) == record), None)
        self.book.put(place, [*self.book.settled(place), same or record])
        self.seen.append((place, same or record))

    def _come(self, place: Place, record: FileRecord) -> None:
        """A path holds a content from now on."""
        self.book.put(place, [*self.book.settled(place), record])
        self.intents.append(record)
        self.seen.append((place, None))
        self.new.append(record.path)

    def _double(self, place: Place, file_id: str, size: int, reason: str | None = None) -> None:
        """A path comes to hold a content whose rows stand already, or are superseded (``reason``)."""
        twin = self.book.owner(place[0], file_id) or self.book.superseded(place[0], file_id)
        at = self.kept_times.get((*place, file_id), self.now)
        of = twin.path if twin else None
        self._come(place, FileRecord(*place, file_id, size, 0, 0, 0, "duplicate", reason, of, None, at))

    def _leave(self, old: FileRecord, into: str, zone: Zone, moved: bool) -> None:
        """What a path held leaves it for another content."""
        new = next(r for r in self.book.settled(old.place) if r.file_id == into and r.stands and r.left_at is None)
        if self.book.leave(old.place, old.file_id or "", zone, moved, new.landed_at):
            self.book.change(new, supersedes=old.file_id)
            self._retire(old.source, old.file_id or "", new.landed_at)

    def _land(self, place: Place, file: LandingFile, zone: Zone, size: int, moved: Callable[[str], bool]) -> None:
        """Judge a content that stands nowhere; nothing is changed when it is refused."""
        name, file_id, old, renamed = place[0], zone.contents[file.name] or "", self.book.current(place), False
        gone = self.book.superseded(name, file_id)
        was_here = any(r.file_id == file_id and r.reason is None for r in self.book.settled(place))
        if self.book.owner(name, file_id) is not None:  # it landed in this very run
            self._double(place, file_id, size)
        elif gone is not None and not (old and (was_here or self.book.restates(old, zone, moved(file_id)))):
            renamed = moved(file_id)
            said = f"an old content under another name: it was superseded at {gone.superseded_at} in {gone.path}"
            self._double(place, file_id, size, said)
        else:
            try:
                with tempfile.TemporaryDirectory(prefix="signalbox-") as folder:
                    snap = snapshot(file, Path(folder), max_bytes=self.max_bytes)
                    if snap.file_id != file_id:  # changed since it was hashed: only what nobody knows can land so late
                        if self.book.of(name, snap.file_id) or snap.file_id in zone.contents.values():
                            raise FileChanged(f"{file.name}: was replaced while its folder was read; run the day again")
                        zone.contents[file.name], file_id = snap.file_id, snap.file_id
                    restates = old is not None and self.book.restates(old, zone, False)
                    at = self.kept_times.get((*place, file_id), self.now)
                    # a path that held something else: what was seen before this landing must not change
                    again = bool(self.book.settled(place))
                    landing = Landing(name, file.name, file_id, at, again, day_of(zone.source, file.name))
                    record = self._judge(snap, landing, old.file_id if old and restates else None)
            except FileRefused as error:
                self._refuse(place, file_id, size, error)
                return
            self.accepted += record.accepted
            self.quarantined += record.quarantined
            self._come(place, record)
            self.landed.append(record.path)
        if old is not None:
            self._leave(old, file_id, zone, renamed)

    def _judge(self, snap: Snapshot, landing: Landing, leaving: str | None = None) -> FileRecord:
        """Judge a content and keep its rows for the next write; its record."""
        source = self.workflow.sources[landing.source]
        raw = read_rows(snap, source, max_bytes=self.max_bytes)

        def keys(days: Sequence[date]) -> pa.Table:
            known = self.keys(days)
            return known if leaving is None else _left(known, landing.source, leaving, landing.landed_at)

        judged = judge(raw, self.workflow, source, landing, keys, self.engine)
        self.batch.append((landing, judged))
        self._remember(judged.events)
        self.rules.update(judged.quarantine["rule"].to_pylist())
        for pair in judged.events["day"].value_counts().to_pylist():
            self.by_day[pair["values"]] += pair["counts"]
        return FileRecord(
            landing.source, landing.path, landing.file_id, snap.size, raw.rows, judged.events.num_rows,
            judged.quarantine.num_rows, "landed", None, None, None, landing.landed_at, mapping=self.mappings[landing.source],
            known_from=landing.landed_at if landing.restated else None,
        )  # fmt: skip

    # the unique columns of rows

    def _key_columns(self) -> list[str]:
        place = ("day", "source", "source_file", "source_file_id", "source_row", "superseded_at")
        return list(dict.fromkeys([*self.workflow.contract.events.unique, *place]))

    def keys(self, days: Sequence[date]) -> pa.Table:
        """Unique columns of the rows, and when they left, as the tables will stand after the next write.

        Where the unique columns hold event_at, only the days that are asked for are read.
        """
        wanted: set[date | None] = set(days) if "event_at" in self.workflow.contract.events.unique else {None}
        missing = wanted - self.known_days
        if missing and self.lake.exists(self.events):
            span = None if None in missing else sorted(d for d in missing if d is not None)
            rows = self.lake.read(self.events, days=span, columns=self._key_columns())
            for (source, file_id), at in self.retired.items():
                rows = _left(rows, source, file_id, at)
            live = pc.field("superseded_at").is_null()
            for source, ids in _by_source(self.hidden).items():
                rows = rows.filter(~(content_where(source, ids) & live))
            self.known = pa.concat_tables([self.known, rows], promote_options="default") if self.known else rows
        self.known_days |= missing
        return self._no_keys() if self.known is None else self.known

    def _no_keys(self) -> pa.Table:
        kinds = {"source_row": pa.int64(), "superseded_at": pa.timestamp("us")}
        return pa.table({c: pa.array([], kinds.get(c, pa.string())) for c in self._key_columns()})

    def _remember(self, events: pa.Table) -> None:
        if self.workflow.contract.events.unique:
            rows = events.select(self._key_columns())
            self.known = pa.concat_tables([self.known, rows], promote_options="default") if self.known else rows

    def _retire(self, source: str, file_id: str, at: datetime) -> None:
        self.retired[source, file_id] = at
        if self.known is not None:
            self.known = _left(self.known, source, file_id, at)

    # duplicates of rows that left

    def _admit(self) -> pa.Table | None:
        """Events of quarantined duplicates whose unique columns stand in no row any more since this step.

        Of several with the same columns the one that landed first comes in, known from the end of the row that it doubled; where
        known_at is one of the columns, from the end of the last that stood in its place since (a restatement has moved it).
        """
        unique, gone = self.workflow.contract.events.unique, [*self.retired, *self.remapped]
        if not unique or not gone or not self.lake.exists(self.events):
            return None
        columns = list(dict.fromkeys([*unique, "day"]))
        live = pc.field("superseded_at").is_null()
        leaving = pa.concat_tables(
            self.lake.read(self.events, where=content_where(source, ids) & live, columns=columns)
            for source, ids in _by_source(gone).items()
        )
        if not leaving.num_rows:
            return None
        days = pc.unique(leaving["day"])
        known = self.keys(days.to_pylist())
        doubles = pc.field("rule") == "duplicate"
        stored = standing(self.book, read_quarantine(self.lake, self.quarantine, doubles))
        for source, ids in _by_source(self.remapped | self.hidden).items():
            stored = stored.filter(~content_where(source, ids))
        waiting = pa.concat_tables([stored, *(judged.quarantine.filter(doubles) for _, judged in self.batch)])
        waiting = waiting.filter(pc.field("event").is_valid())
        if "event_at" in unique:
            waiting = waiting.filter(pc.is_in(waiting["day"], days))
        if not waiting.num_rows:
            return None
        contract = event_columns(self.workflow.contract.events)
        key = ", ".join(name_sql(c) for c in unique)
        shared, rest = same_key(unique), same_key([c for c in unique if c != "known_at"])
        # of rows that the ends made equal, what upstream told last comes in
        order = '"#told" DESC, ' if "known_at" in unique else ""
        own = ", ".join(f"s.{name_sql(c)}" for c in contract)
        con = session(self.engine)
        for name, rows in {"#waiting": waiting, "#leaving": leaving, "#known": known}.items():
            con.register(name, rows)
        follow_ends(con.execute, unique, '"#leaving"')
        admitted = con.sql(
            "WITH read AS (SELECT source, source_file, source_file_id, source_row, landed_at, "
            f'{from_json("event", contract)} AS "#e" FROM "#waiting"), '
            f"""typed AS (SELECT * EXCLUDE ("#e"), {", ".join(f'"#e".{name_sql(c)} AS {name_sql(c)}' for c in contract)} """
            'FROM read WHERE "#e" IS NOT NULL), '
            f'free AS (SELECT s.* FROM typed s SEMI JOIN "#leaving" k ON {rest}), '
            'raised AS (SELECT s.* REPLACE (greatest(s.known_at, k."#end") AS known_at), s.known_at AS "#told" FROM free s '
            f'LEFT JOIN "#ended" k ON {shared}), '
            f'first AS (SELECT s.* FROM raised s ANTI JOIN (FROM "#known" WHERE superseded_at IS NULL) k ON {shared} '
            f"QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY {order}landed_at, source, source_file, source_row) = 1) "
            f"SELECT {own}, CAST(s.event_at AS DATE) AS day, s.source, s.source_file, s.source_file_id, s.source_row, "
            "CAST(NULL AS TIMESTAMP) AS superseded_at FROM first s ORDER BY source, source_file, source_row"
        ).to_arrow_table()
        con.close()
        if not admitted.num_rows:
            return None
        self._remember(admitted)
        landed = {(landing.source, landing.file_id) for landing, _ in self.batch}
        counts = admitted.group_by(["source", "source_file_id"]).aggregate([([], "count_all")])
        for row in counts.to_pylist():
            content, n = (row["source"], row["source_file_id"]), row["count_all"]
            owner = self.book.owner(*content)
            if owner is not None:
                self.book.change(owner, accepted=owner.accepted + n, quarantined=owner.quarantined - n)
            if content in landed:
                self.accepted, self.quarantined = self.accepted + n, self.quarantined - n
                self.rules["duplicate"] -= n
        self.admitted += admitted.num_rows
        return admitted

    # writing

    def _write_manifest(self, changed: Mapping[Place, list[FileRecord]] | None = None) -> None:
        """Write what has changed (or, before a step, the records that its intent adds to what stands in the lake)."""
        stands = {**self.book.records, **(self.book.before if changed is not None else {}), **(changed or {})}
        paths = {path for _, path in (changed if changed is not None else self.book.before)}
        if paths:
            write(self.lake, self.files, {place: found for place, found in stands.items() if place[1] in paths})
        if changed is None:
            self.book.before = {}

    def flush(self) -> None:
        """Write what was judged: the intent, quarantine, events, and last the manifest that makes it so."""
        if self.batch or self.retired:
            admitted = self._admit()
            versions = json.dumps({t: self.lake.version(t) for t in (self.events, self.quarantine)})
            intended: dict[Place, list[FileRecord]] = {}
            for record in self.intents:
                before = [r for r in self.book.before.get(record.place, []) if r.status != "landing"]
                intended[record.place] = [*before, replace(record, status="landing", reason=versions)]
            self._write_manifest(intended)
            sources = {landing.source for landing, _ in self.batch} | {source for source, _ in self.retired}
            sources |= set(admitted["source"].to_pylist()) if admitted is not None else set()
            for table in (self.quarantine, self.events):
                for source in sorted(sources):
                    self._write_rows(table, source, admitted)
        self._write_manifest()
        self.batch, self.intents, self.retired, self.remapped = [], [], {}, set()

    def _write_rows(self, table: str, source: str, admitted: pa.Table | None) -> None:
        """Put the rows of a source's contents in the place of those that stood before this step."""
        rejects, day = table == self.quarantine, "landed_day" if table == self.quarantine else "day"
        new = {landing.file_id: judged for landing, judged in self.batch if landing.source == source}
        gone = {file_id: at for (s, file_id), at in self.retired.items() if s == source}
        remapped = {file_id for s, file_id in self.remapped if s == source}
        came = admitted.filter(pc.field("source") == source) if admitted is not None else None
        came_ids = set(came["source_file_id"].to_pylist()) if came is not None else set()
        former = {i: r.superseded_at for i in new for r in self.book.of(source, i) if r.superseded_at}
        ids = sorted({*new, *gone, *came_ids})
        known = sorted({*gone, *remapped, *former, *(came_ids - set(new))})
        parts = [judged.quarantine if rejects else judged.events for judged in new.values()]
        days = [part[day] for part in parts]
        if known and self.lake.exists(table):
            where = content_where(source, known)
            earlier = read_quarantine(self.lake, table, where) if rejects else self.lake.read(table, where=where)
            days.append(earlier[day])
            earlier = earlier.filter(~(content_where(source, list(remapped)) & pc.field("superseded_at").is_null()))
            for file_id, at in {**{i: t for i, t in former.items() if i not in remapped}, **gone}.items():
                earlier = _left(earlier, source, file_id, at)
            parts.insert(0, earlier)
        if came is not None and not rejects:
            parts.append(came)
            days.append(came[day])
        if not parts or (not sum(len(d) for d in days) and self.lake.exists(table)):
            return
        rows = pa.concat_tables(parts, promote_options="default")
        if came is not None and rejects:
            rows = rows.filter(~(pc.field("superseded_at").is_null() & _rows_where(came)))
        predicate, span = (
            content_sql(source, ids),
            pc.min_max(pa.chunked_array([c for d in days for c in d.chunks], pa.date32())),
        )
        if span["min"].is_valid:
            predicate += f" AND {day} >= '{span['min']}' AND {day} <= '{span['max']}'"
        self.lake.replace(table, rows, predicate=predicate, partition_by=(day,))

    def result(self) -> IngestResult:
        tables = {t: self.lake.version(t) for t in (self.events, self.quarantine, self.files)}
        seen = [record or self.book.current(place) for place, record in self.seen]
        owners = self.book.owners()
        return IngestResult(
            files=tuple(sorted((r for r in seen if r is not None), key=self._place_in_order)),
            new=tuple(self.new),
            landed=tuple(self.landed),
            accepted=self.accepted,
            quarantined=self.quarantined,
            rules={rule: n for rule, n in sorted(self.rules.items()) if n},
            accepted_by_day=dict(sorted(self.by_day.items())),
            refused={r.path: r.reason or "" for r in seen if r is not None and r.status == "refused"},
            versions={t: v for t, v in tables.items() if v is not None},
            admitted=self.admitted,
            outdated=tuple(
                sorted(r.path for r in owners if r.mapping and self.mappings.get(r.source, r.mapping) != r.mapping)
            ),
        )

    def _place_in_order(self, record: FileRecord) -> tuple[int, str]:
        return list(self.workflow.sources).index(record.source), record.path

    # mapping again

    def remap(self, since: date | None) -> RemapResult:
        """Map the contents again that stand by another mapping, in the order in which they landed."""
        due = [r for r in self.book.owners() if r.mapping != self.mappings.get(r.source, r.mapping)]
        if since is not None:
            held = self._contents_since(since)
            due = [r for r in due if (day_of(self.workflow.sources[r.source], r.path) or held(r)) >= since]
        due.sort(key=lambda r: (r.landed_at, *self._place_in_order(r)))
        zones = {name: Zone(self.root, source, self.max_bytes) for name, source in self.workflow.sources.items()}
        there: list[tuple[FileRecord, LandingFile]] = []
        gone: list[str] = []
        refused: dict[str, str] = {}
        for record in due:
            zone = zones[record.source]
            paths = [record.path, *(heir.path for heir in self.book.heirs(record, zone))]
            path = next((p for p in paths if zone.holds(p, record.file_id or "")), None)
            if path is None:
                gone.append(record.path)
                continue
            try:  # once for its own sake: what would be refused keeps its rows, and the others are judged beside them
                self._map(record, zone.files[path], alone=True)
                there.append((record, zone.files[path]))
            except FileRefused as error:
                refused[record.path] = without_secrets(str(error))
        self.hidden = {(record.source, record.file_id or "") for record, _ in there}
        live = pc.field("superseded_at").is_null()
        days = [
            self.lake.read(self.events, where=content_where(source, ids) & live, columns=["day"])["day"]
            for source, ids in _by_source(self.hidden).items()
        ]
        mapped = []
        for record, file in there:
            new = self._map(record, file)
            changed = self.book.change(
                record, rows=new.rows, accepted=new.accepted, quarantined=new.quarantined, mapping=new.mapping
            )
            self.intents.append(changed)
            self.remapped.add((record.source, record.file_id or ""))
            mapped.append((record, changed))
            days.append(self.batch[-1][1].events["day"])
            if sum(judged.events.num_rows for _, judged in self.batch) >= BATCH_ROWS:
                self.flush()
        self.flush()
        span = pc.min_max(pa.chunked_array([c for d in days for c in d.chunks], pa.date32()))
        owners = {r.place: r for r in self.book.owners()}
        return RemapResult(
            mapped=tuple((old, owners[new.place]) for old, new in mapped),
            gone=tuple(gone),
            refused=refused,
            days=(span["min"].as_py(), span["max"].as_py()) if span["min"].is_valid else None,
        )

    def _map(self, record: FileRecord, file: LandingFile, alone: bool = False) -> FileRecord:
        """Judge a content that stands once more, as if it landed when it did."""
        # an earlier release wrote down no known_from
        again = record.known_from is not None or record.supersedes is not None
        source = self.workflow.sources[record.source]
        with tempfile.TemporaryDirectory(prefix="signalbox-") as folder:
            snap = snapshot(file, Path(folder), max_bytes=self.max_bytes)
            if snap.file_id != record.file_id:
                raise FileChanged(f"{file.name}: was replaced meanwhile; run remap again")
            landing = Landing(
                record.source, record.path, snap.file_id, record.landed_at, again, day_of(source, record.path)
            )
            if not alone:
                return self._judge(snap, landing)
            raw = read_rows(snap, source, max_bytes=self.max_bytes)
            judge(raw, self.workflow, source, landing, lambda days: self._no_keys(), self.engine)
            return record

    def _contents_since(self, since: date) -> Callable[[FileRecord], date]:
        """The last day of a content's rows that stand; where it has none, the day on which it landed."""
        last: dict[tuple[str, str], date] = {}
        live = pc.field("superseded_at").is_null() & (pc.field("day") >= pc.scalar(since))
        tables = [standing(self.book, read_quarantine(self.lake, self.quarantine))]
        if self.lake.exists(self.events):
            tables.append(self.lake.read(self.events, where=live, columns=["source", "source_file_id", "day"]))
        for rows in tables:
            days = rows.group_by(["source", "source_file_id"]).aggregate([("day", "max")]).to_pylist()
            for row in days:
                content = (row["source"], row["source_file_id"])
                last[content] = max(last.get(content, date.min), row["day_max"] or date.min)
        return lambda r: last.get((r.source, r.file_id or ""), r.landed_at.date() if not r.rows else date.min)


def _by_source(contents: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for source, file_id in sorted(contents):
        found.setdefault(source, []).append(file_id)
    return found


def _left(rows: pa.Table, source: str, file_id: str, at: datetime) -> pa.Table:
    """The live rows of a content superseded at a time."""
    stood = rows["superseded_at"]
    own = pc.and_(pc.equal(rows["source"], source), pc.equal(rows["source_file_id"], file_id))
    column = pc.if_else(pc.and_(own, pc.is_null(stood)), pa.scalar(at, stood.type), stood)
    return rows.set_column(rows.column_names.index("superseded_at"), "superseded_at", column)


def _rows_where(rows: pa.Table) -> pc.Expression:
    """The rows of contents that stand in a table."""
    found = pc.scalar(False)
    for file_id in pc.unique(rows["source_file_id"]).to_pylist():
        own = rows.filter(pc.field("source_file_id") == file_id)["source_row"].combine_chunks()
        found = found | ((pc.field("source_file_id") == file_id) & pc.field("source_row").isin(own))
    return found


def _opened(workflow: Workflow, lake: Lake, landing_root: str | Path, now: datetime, max_bytes: int) -> _Run:
    moment = now.astimezone(UTC).replace(tzinfo=None) if now.tzinfo else now
    run = _Run(workflow, lake, f"{str(landing_root).rstrip('/')}/{workflow.name}", max_bytes, moment)
    run.undo_interrupted()
    return run


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
    same source is a duplicate and adds nothing; where its path is gone or holds another, it moves to the new one with its
    rows as they are. A path whose content is nowhere else in the zone and that holds a new one is superseded: its earlier
    rows keep standing in the table with ``superseded_at``, and the new ones are known from ``now`` on at the earliest, so
    that every point in time sees exactly one of the two. A refused file is tried again by the next run, and so is
    everything that a crash interrupted: the outcome is the same.
    """
    with _only_writer(lake, workflow.name):
        run = _opened(workflow, lake, landing_root, now, max_bytes)
        for name in workflow.sources:
            run.take(name, days)
        return run.result()


def remap(
    workflow: Workflow,
    lake: Lake,
    landing_root: str | Path,
    *,
    now: datetime,
    since: date | None = None,
    max_bytes: int = MAX_BYTES,
) -> RemapResult:
    """Map files again that landed under another mapping or contract than the present one, from what lies in the zone.

    ``since`` (the day of rows) leaves files alone of which no row is of that day or later. The new rows take the place of
    those of the earlier mapping, as if they had landed when the file did: ``known_at`` is what the mapping says, or the
    landing time where the source says ``landing``, and never before the content stood. What is gone or refused keeps its rows.
    """
    with _only_writer(lake, workflow.name):
        return _opened(workflow, lake, landing_root, now, max_bytes).remap(since)
