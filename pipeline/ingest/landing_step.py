"""One step of a landing run: how the tables change together, and what an interrupted step left.

Belongs here: the intent with the tables' versions (in ``files``), quarantine, events, and last ``files``, which makes it so; keys of the
rows as they will stand; duplicates that come in because the row that they doubled has left. Does not: which files land and why
(``pipeline.ingest.landing``).

What an interrupted step wrote is taken back to the versions of its intent by the next run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from typing import TYPE_CHECKING

import deltalake
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ingest.manifest import (
    FileRecord,
    Manifest,
    Place,
    content_sql,
    content_where,
    mapping_digest,
    read_quarantine,
    standing,
    write,
)
from pipeline.ingest.row_rules import (
    Judged,
    Landing,
    event_columns,
    follow_ends,
    from_json,
    name_sql,
    open_engine,
    same_key,
    session,
)
from pipeline.lake import Lake

if TYPE_CHECKING:
    from pipeline.workflow import Workflow

_TAKEN_BACK = "an interrupted landing, taken back; the time is kept for the next try"


class LandingStep:
    """The manifest as it will stand, and what was judged but not yet written."""

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
                rows = with_end(rows, source, file_id, at)
            live = pc.field("superseded_at").is_null()
            for source, ids in by_source(self.hidden).items():
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
            self.known = with_end(self.known, source, file_id, at)

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
            for source, ids in by_source(gone).items()
        )
        if not leaving.num_rows:
            return None
        days = pc.unique(leaving["day"])
        known = self.keys(days.to_pylist())
        doubles = pc.field("rule") == "duplicate"
        stored = standing(self.book, read_quarantine(self.lake, self.quarantine, doubles))
        for source, ids in by_source(self.remapped | self.hidden).items():
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
        self._count(admitted)
        return admitted

    def _count(self, admitted: pa.Table) -> None:
        """Rows that came in from quarantine count as accepted."""
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
                earlier = with_end(earlier, source, file_id, at)
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


def by_source(contents: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Contents (source, SHA-256) as the SHA-256s of each source."""
    found: dict[str, list[str]] = {}
    for source, file_id in sorted(contents):
        found.setdefault(source, []).append(file_id)
    return found


def with_end(rows: pa.Table, source: str, file_id: str, at: datetime) -> pa.Table:
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
