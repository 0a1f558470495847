"""What the landing sensor asks for: which days the files of a landing zone start, by which job, and when it asks again.

Belongs here: from files, and what is decided, to requests, and the sensor's memory. Does not: the sensor itself
(``orchestration.automation``), reading files (``pipeline.ingest``).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from typing import Any

import dagster as dg
import pyarrow.compute as pc

from pipeline import ingest as landing_zone
from pipeline.ingest import day_of as day_of
from pipeline.lake import Lake
from pipeline.workflow import Workflow

SETTLE = timedelta(seconds=60)
"""A file that changed less than this ago may still be being written."""
FIRST_WAIT = timedelta(minutes=10)
"""How long a run that died is waited for before it is asked for again; each further wait is twice as long."""
LONGEST_WAIT = timedelta(minutes=40)
CATCH_UP_DAYS = 7
"""Of the days that are newer than the newest decided one, so many of the newest are decided; those before are prepared."""
GAP_DAYS = 7
"""Days that lie no further apart than this are prepared in one run, with what lies between."""
PREPARE_TRIES = 6
HASHED_BYTES = 64 << 20
"""A larger file is not read to find out whether it has landed: it counts as new, and landing it again adds nothing."""

Landed = Callable[[str, landing_zone.LandingFile, int, datetime | None], bool]
"""Whether a file (its source's name, itself, its size, when it changed) has landed with the content that it has now."""


def closed_days(workflow: Workflow, now: datetime) -> date:
    """The newest day whose cut-off has passed."""
    day = now.date() - timedelta(days=1)
    return day if now >= workflow.cutoff_of(day) else day - timedelta(days=1)


class Manifest:
    """Which content of which path has landed, or was refused, by the lake's table of files; read when first asked."""

    def __init__(self, lake: Lake, workflow: Workflow) -> None:
        self._lake, self._table = lake, workflow.table("files")

    @cached_property
    def _live(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        if not self._lake.exists(self._table):
            return {}
        columns = ["source", "path", "file_id", "size", "status", "landed_at", "superseded_at"]
        stands = pc.is_null(pc.field("superseded_at")) & (pc.field("status") != "landing")
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self._lake.read(self._table, columns=columns, where=stands).to_pylist():
            found.setdefault((row["source"], row["path"]), []).append(row)
        return found

    def holds(self, source: str, file: landing_zone.LandingFile, size: int, changed: datetime | None) -> bool:
        """Whether this content of the file was landed or refused; where time and size leave a doubt, it is hashed."""
        rows = [row for row in self._live.get((source, file.name), []) if row["size"] == size]
        if not rows:
            return False
        if changed is not None and any(changed <= row["landed_at"] for row in rows):
            return True
        if size > HASHED_BYTES:
            return False
        digest = hashlib.sha256()
        try:
            with file.fs.open(file.path, "rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
        except OSError:
            return False
        return digest.hexdigest() in {row["file_id"] for row in rows}


@dataclass
class Memory:
    """What the sensor keeps from one look to the next: a cursor in JSON."""

    files: dict[str, str] = field(default_factory=dict)
    """File → size and time of the content that was asked for, or left alone."""
    ahead: dict[str, list[str]] = field(default_factory=dict)
    """File whose clock is ahead → its size and time, and since when it has been seen so."""
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Day → the newest request to decide it: run key, at, tries."""
    prepared: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Run key of the first request for a range → run key, first, last, at, tries."""

    @staticmethod
    def read(cursor: Mapping[str, Any]) -> Memory:
        """From a cursor; one of an earlier version held nothing but the files."""
        if cursor.get("version") == 2:
            parts = ("files", "ahead", "asked", "prepared")
            return Memory(*(copy.deepcopy(dict(cursor.get(part) or {})) for part in parts))
        return Memory(files={name: str(mark) for name, mark in cursor.items()})

    def cursor(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "version": 2, "files": self.files, "ahead": self.ahead, "asked": self.asked, "prepared": self.prepared,
        }  # fmt: skip


@dataclass(frozen=True)
class Look:
    """One look at a landing zone: what to start, what to remember, and what a person should read."""

    requests: list[dg.RunRequest]
    cursor: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _New:
    """A file whose content was not seen before."""

    source: str
    file: landing_zone.LandingFile
    size: int
    changed: datetime | None
    mark: str

    @property
    def text(self) -> str:
        return f"{self.source}:{self.file.name}:{self.mark}"


def look(
    workflow: Workflow,
    landing_root: str,
    seen: Mapping[str, Any],
    now: datetime,
    *,
    decided: date | None = None,
    running: Collection[date] = (),
    landed: Landed | None = None,
    ended: Mapping[str, bool] | None = None,
) -> Look:
    """Requests for days whose files are new or changed, and for those whose run died.

    ``decided``: the newest decided day; a newer one starts ``daily``, the others ``prepare`` alone. ``running``: days of
    which a run that decides is in progress. ``landed``: what the lake holds already. ``ended``: run key → whether a run
    that was asked for succeeded. A file whose day's cut-off has not passed, or that may still be being written, is left
    for a later look. Without a memory (the first look) nobody knows which older files are new: those that have landed, or
    of which that cannot be told, are left alone.
    """
    memory, notes = Memory.read(seen), list[str]()
    new = _new_files(workflow, landing_root, memory, now, notes)
    daily = sorted(day for day in new if decided is None or day > decided)[-CATCH_UP_DAYS:]
    old: dict[date, list[_New]] = {}
    left = 0
    for day in sorted(new.keys() - set(daily)):
        for one in new[day]:
            # before anything is remembered, and with no manifest to look into, a file of a decided day counts as landed
            unknown = not seen and decided is not None and day <= decided
            there = landed(one.source, one.file, one.size, one.changed) if landed is not None else unknown
            left += there
            if not there:
                old.setdefault(day, []).append(one)
    if left:
        past = f"their days are decided or past (the newest decided: {decided or 'none'})"
        notes.append(f"{left} file(s) left alone: {past} and they have landed")
    requests = [_daily(workflow, memory, day, new[day], now) for day in daily]
    requests += _daily_again(workflow, memory, now, decided, running, skip=daily)
    requests += _prepare(workflow, memory, old, now)
    requests += _prepare_again(workflow, memory, now, ended or {})
    requests.sort(key=lambda r: (str(r.job_name), str(r.partition_key)))
    return Look(requests, memory.cursor(), tuple(notes))


def _new_files(
    workflow: Workflow,
    landing_root: str,
    memory: Memory,
    now: datetime,
    notes: list[str],
) -> dict[date, list[_New]]:
    """By day, the files that stand still with a content that was not seen before; from now on they are remembered."""
    newest, found, ahead = closed_days(workflow, now), dict[date, list[_New]](), dict[str, list[str]]()
    told: dict[bool, list[str]] = {True: [], False: []}
    for name, source in sorted(workflow.sources.items()):
        for file in landing_zone.discover(landing_root, source, None):
            info = file.fs.info(file.path)
            stamp = info.get("mtime") or info.get("LastModified") or info.get("last_modified")
            changed = _instant(stamp)
            mark = f"{info['size']}:{stamp}"
            if memory.files.get(file.name) == mark:
                continue
            day = day_of(source, file.name) if "{day}" in source.files else newest
            if day is None or day > newest or day < workflow.start:
                continue
            if isinstance(stamp, int | float) and changed is not None and now - changed < SETTLE:
                if changed <= now:
                    continue
                # Its time says nothing: it is still when it looks the same for as long.
                before = memory.ahead.get(file.name)
                since = before if before is not None and before[0] == mark else [mark, now.isoformat()]
                waits = now - datetime.fromisoformat(since[1]) < SETTLE
                told[waits].append(f"{file.name} by {_span(changed - now)}")
                if waits:
                    ahead[file.name] = since
                    continue
            found.setdefault(day, []).append(_New(name, file, info["size"], changed, mark))
            memory.files[file.name] = mark
    memory.ahead = ahead
    for waits, files in told.items():
        if files:
            then = "taken once it has stood still for a minute" if waits else "it stands still and is taken"
            notes.append(f"{len(files)} file(s) whose clock is ahead ({', '.join(files[:3])}): {then}")
    return found


def _instant(stamp: Any) -> datetime | None:
    """A file system's time as naive UTC; None where it is none."""
    if isinstance(stamp, int | float):
        return datetime.fromtimestamp(stamp, UTC).replace(tzinfo=None)
    if isinstance(stamp, datetime):
        return stamp.astimezone(UTC).replace(tzinfo=None) if stamp.tzinfo else stamp
    return None


def _span(span: timedelta) -> str:
    minutes = round(span.total_seconds() / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(minutes, 1)} min"


def _digest(files: Sequence[_New]) -> str:
    return hashlib.sha256(json.dumps(sorted(one.text for one in files)).encode()).hexdigest()[:16]


def _due(asked: Mapping[str, Any], now: datetime) -> bool:
    """Whether it is time to ask again: after 10, 20, 40, 40, … minutes."""
    wait = min(LONGEST_WAIT, FIRST_WAIT * (1 << min(int(asked["tries"]) - 1, 10)))
    return now - datetime.fromisoformat(str(asked["at"])) >= wait


def _again(key: str, now: datetime) -> str:
    """A key of its own for each further try: a run key is remembered for ever, whatever became of the run."""
    return f"{key}:{now:%Y-%m-%dT%H:%M}"


def _decide(workflow: Workflow, day: date, run_key: str, cause: str) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=run_key,
        job_name=f"{workflow.name}_daily",
        partition_key=day.isoformat(),
        tags={"signalbox/cause": cause},
    )


def _daily(workflow: Workflow, memory: Memory, day: date, files: Sequence[_New], now: datetime) -> dg.RunRequest:
    key = f"{workflow.name}:{day}:{_digest(files)}"
    memory.asked[day.isoformat()] = {"key": key, "at": now.isoformat(), "tries": 1}
    return _decide(workflow, day, key, f"{len(files)} new file(s) in the landing zone")


def _daily_again(
    workflow: Workflow,
    memory: Memory,
    now: datetime,
    decided: date | None,
    running: Collection[date],
    *,
    skip: Collection[date],
) -> list[dg.RunRequest]:
    """Days that were asked for, are not decided and have no run; until their deadline, from which on the schedule asks."""
    requests = []
    for text, asked in sorted(memory.asked.items()):
        day = date.fromisoformat(text)
        if (decided is not None and day <= decided) or (now >= workflow.deadline_of(day)):
            del memory.asked[text]
        elif day not in skip and day not in running and _due(asked, now):
            asked |= {"at": now.isoformat(), "tries": int(asked["tries"]) + 1}
            cause = f"{day} is asked for again (try {asked['tries']}): its run came to no decision"
            requests.append(_decide(workflow, day, _again(asked["key"], now), cause))
    return requests


def stretches(days: Collection[date], gap: int = GAP_DAYS) -> list[tuple[date, date]]:
    """First and last day of each stretch of days that lie no further apart than ``gap`` days."""
    found: list[tuple[date, date]] = []
    for day in sorted(days):
        if found and day - found[-1][1] <= timedelta(days=gap):
            found[-1] = (found[-1][0], day)
        else:
            found.append((day, day))
    return found


def _prepare_request(workflow: Workflow, first: date, last: date, run_key: str, cause: str) -> dg.RunRequest:
    span = {"dagster/asset_partition_range_start": str(first), "dagster/asset_partition_range_end": str(last)}
    return dg.RunRequest(
        run_key=run_key,
        job_name=f"{workflow.name}_prepare",
        partition_key=first.isoformat() if first == last else None,
        tags={"signalbox/cause": cause} | (span if first != last else {}),
    )


def _prepare(
    workflow: Workflow, memory: Memory, old: Mapping[date, Sequence[_New]], now: datetime
) -> list[dg.RunRequest]:
    """One run for each stretch of older days: their events, features and outcomes, and no decision."""
    requests = []
    for first, last in stretches(old):
        files = [one for day, found in old.items() if first <= day <= last for one in found]
        key = f"{workflow.name}:prepare:{first}:{last}:{_digest(files)}"
        memory.prepared[key] = {
            "key": key, "first": str(first), "last": str(last), "at": now.isoformat(), "tries": 1,
        }  # fmt: skip
        cause = f"{len(files)} new file(s) of days that are decided or past: prepared, nothing is decided"
        requests.append(_prepare_request(workflow, first, last, key, cause))
    return requests


def _prepare_again(workflow: Workflow, memory: Memory, now: datetime, ended: Mapping[str, bool]) -> list[dg.RunRequest]:
    """Ranges whose run failed or died: nobody else would land those files."""
    requests = []
    for base, asked in sorted(memory.prepared.items()):
        good = ended.get(asked["key"])
        if good or int(asked["tries"]) >= PREPARE_TRIES:
            del memory.prepared[base]
        elif good is False and _due(asked, now):
            asked |= {"key": _again(base, now), "at": now.isoformat(), "tries": int(asked["tries"]) + 1}
            first, last = date.fromisoformat(asked["first"]), date.fromisoformat(asked["last"])
            cause = f"asked for again (try {asked['tries']}): its run did not come to its end"
            requests.append(_prepare_request(workflow, first, last, asked["key"], cause))
    return requests
