"""Landing runs: files of the landing zone become rows of ``events`` and ``quarantine``, or are mapped again.

Belongs here: one run of ``ingest`` or ``remap``: which file lands, what leaves for it, what is judged. Does not: which content
stands under which path (``pipeline.ingest.manifest``), how the tables change (``pipeline.ingest.landing_step``), judging a row
(``pipeline.ingest.row_rules``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

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
from pipeline.ingest.landing_step import LandingStep, by_source, with_end
from pipeline.ingest.manifest import FileRecord, Place, Zone, _only_writer, content_where, read_quarantine, standing
from pipeline.ingest.readers import read_rows
from pipeline.ingest.row_rules import Landing, judge
from pipeline.lake import Lake

if TYPE_CHECKING:
    from pipeline.workflow import Workflow

BATCH_ROWS = 1_000_000


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


class _Run(LandingStep):
    """One run over the files of the zone."""

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
        held = self._held(name)

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

    def _held(self, name: str) -> dict[str | None, set[str]]:
        """The paths of a source that hold each content."""
        held: dict[str | None, set[str]] = {}
        for found in self.book.records.values():
            for record in found:
                if record.source == name and record.stands:
                    held.setdefault(record.file_id, set()).add(record.path)
        return held

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
            return known if leaving is None else with_end(known, landing.source, leaving, landing.landed_at)

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
            for source, ids in by_source(self.hidden).items()
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
