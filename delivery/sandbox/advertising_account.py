"""The advertising account on this machine: its budgets and campaigns, who changed them, and the days that happen under them.

Belongs here: what stands (in a SQLite file), a person's hand, samples of the live total, a day of the simulated world. Does not: the
API (``advertising_api``), or the truth about what spend earns (``worlds.advertising``).

A line of the world is one campaign with one budget, both named like the line. Budgets, campaigns, changes and the days that
happened live in a SQLite file, so a restarted server goes on; samples are gone with the process.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delivery.sandbox import private
from delivery.sandbox.worlds import advertising

if TYPE_CHECKING:
    import pyarrow as pa

UNIT = advertising.CENT

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE budgets (id INTEGER PRIMARY KEY, line TEXT NOT NULL UNIQUE, name TEXT NOT NULL, amount INTEGER NOT NULL,
    status TEXT NOT NULL, shared INTEGER NOT NULL, applications INTEGER NOT NULL);
CREATE TABLE campaigns (id INTEGER PRIMARY KEY, line TEXT NOT NULL UNIQUE, budget INTEGER NOT NULL, status TEXT NOT NULL);
CREATE TABLE changes (micros INTEGER PRIMARY KEY, budget INTEGER NOT NULL, field TEXT NOT NULL, operation TEXT NOT NULL,
    before TEXT, after TEXT, actor TEXT NOT NULL, client TEXT NOT NULL, batch TEXT NOT NULL, run TEXT NOT NULL,
    decisions TEXT NOT NULL);
CREATE TABLE days (day TEXT PRIMARY KEY, budgets TEXT NOT NULL, multipliers TEXT NOT NULL);
"""


@dataclass
class Budget:
    """One budget as it stands; ``line`` is the one that it was made for."""

    id: int
    line: str
    name: str
    amount: int
    status: str
    shared: bool
    applications: int
    """How often the API has set its amount, equal values included."""


@dataclass
class Campaign:
    id: int
    line: str
    budget: int
    status: str


@dataclass
class Samples:
    """The live total after every write, by anybody: over all budgets and by group of lines."""

    group_of: dict[str, str] = field(default_factory=dict)
    count: int = 0
    most: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    groups_most: dict[str, int] = field(default_factory=dict)


class Account:
    """What stands in an account, and how it changes. Thread-safe. The arguments are those of ``advertising_api.AdvertisingSandbox``."""

    def __init__(
        self,
        folder: Path,
        world: advertising.World,
        *,
        next_day: date,
        budgets: Mapping[str, int] | None,
        clock: Callable[[], datetime],
    ) -> None:
        self.folder, self.world = folder, world
        self.samples = Samples()
        self._clock = clock
        self._lock = threading.RLock()
        file = private.database(private.folder(folder) / "advertising.sqlite")
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._open(next_day, budgets)
        self._last_micros = self._db.execute("SELECT coalesce(max(micros), 0) FROM changes").fetchone()[0]
        self._begin_samples()

    def _open(self, next_day: date, budgets: Mapping[str, int] | None) -> None:
        w = self.world
        world = json.dumps([w.seed, w.setting, w.lines, w.origin.isoformat(), w.drift_on and w.drift_on.isoformat()])
        lines: list[str] = w.line_id.tolist()
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            start = dict(zip(lines, w.incumbent_budgets(next_day).tolist(), strict=True))
            unknown = sorted(set(budgets or {}) - set(start))
            if unknown:
                raise ValueError(
                    f"the world has no line {unknown[0]!r} (and {len(unknown) - 1} more of the budgets given)"
                )
            start |= budgets or {}
            wrong = [line for line, amount in start.items() if amount < UNIT or amount % UNIT]
            if wrong:
                raise ValueError(f"the budget of {wrong[0]} is {start[wrong[0]]} micros: whole cents, at least one")
            self._db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            with self._transaction():
                self._db.executemany(
                    "INSERT INTO budgets VALUES (?, ?, ?, ?, 'ENABLED', 0, 0)",
                    [(7_000_001 + i, line, line, int(start[line])) for i, line in enumerate(lines)],
                )
                self._db.executemany(
                    "INSERT INTO campaigns VALUES (?, ?, ?, 'ENABLED')",
                    [(5_000_001 + i, line, 7_000_001 + i) for i, line in enumerate(lines)],
                )
                self._db.executemany(
                    "INSERT INTO meta VALUES (?, ?)", [("world", world), ("next_day", next_day.isoformat())]
                )
        meta = dict(self._db.execute("SELECT key, value FROM meta"))
        if meta.get("world") != world:
            raise ValueError(
                f"{self.folder} holds another world ({meta.get('world')}, here {world}): use another folder, or delete it"
            )
        self._load()

    def _load(self) -> None:
        self._indexed: tuple[dict[str, list[Budget]], dict[int, int]] | None = None
        (self.next_day,) = map(
            date.fromisoformat, self._db.execute("SELECT value FROM meta WHERE key = 'next_day'").fetchone()
        )
        self.budgets = {b.id: b for b in self._load_budgets()}
        self.campaigns = {r[0]: Campaign(*r) for r in self._db.execute("SELECT * FROM campaigns")}
        self._by_line = {b.line: b for b in self.budgets.values()}

    def _load_budgets(self) -> list[Budget]:
        rows = self._db.execute("SELECT id, line, name, amount, status, shared, applications FROM budgets")
        return [
            Budget(i, line, name, amount, status, bool(shared), n) for i, line, name, amount, status, shared, n in rows
        ]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            self._load()  # memory may be ahead of what stands
            raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def amounts(self) -> dict[str, int]:
        """Micros that each line may spend in a day as things stand; campaigns that share a budget share it equally."""
        with self._lock:
            users: dict[int, list[Campaign]] = {}
            for campaign in self.campaigns.values():
                if campaign.status == "ENABLED" and self.budgets[campaign.budget].status == "ENABLED":
                    users.setdefault(campaign.budget, []).append(campaign)
            out = dict.fromkeys(self._by_line, 0)
            for budget, together in users.items():
                part = self.budgets[budget].amount // len(together) // UNIT * UNIT
                out |= {campaign.line: part for campaign in together}
                if len(together) == 1:
                    out[together[0].line] = self.budgets[budget].amount
            return out

    def changes(self) -> list[dict[str, Any]]:
        """Every change so far, oldest first, with the batch, run and decisions that the call named."""
        with self._lock:
            found = self._db.execute("SELECT * FROM changes ORDER BY micros")
            names = [column[0] for column in found.description]
            rows = [dict(zip(names, row, strict=True)) for row in found]
        for row in rows:
            row["line"] = self.budgets[row["budget"]].line
        return rows

    # --- samples

    def _begin_samples(self) -> None:
        s = self.samples
        s.groups = dict.fromkeys(sorted(set(s.group_of.values())), 0)
        for budget in self.budgets.values():
            group = s.group_of.get(budget.line)
            if group is not None and budget.status == "ENABLED":
                s.groups[group] += budget.amount
        self._total = sum(b.amount for b in self.budgets.values() if b.status == "ENABLED")
        s.count, s.most, s.groups_most = 0, self._total, dict(s.groups)

    def group(self, group_of: Mapping[str, str]) -> None:
        """From now on sample these groups of lines (line → group) too; begins the samples anew."""
        with self._lock:
            self.samples = Samples(group_of=dict(group_of))
            self._begin_samples()

    def reset_samples(self) -> None:
        with self._lock:
            self._begin_samples()

    def sampled(self) -> dict[str, Any]:
        """The live totals now and the largest since the samples began (micros)."""
        with self._lock:
            s = self.samples
            groups = {g: {"now": s.groups[g], "most": s.groups_most[g]} for g in s.groups}
            return {"samples": s.count, "total": {"now": self._total, "most": s.most}, "groups": groups}

    def _moved(self, budget: Budget, by: int) -> None:
        s = self.samples
        self._total += by
        s.count += 1
        s.most = max(s.most, self._total)
        group = s.group_of.get(budget.line)
        if group is not None:
            s.groups[group] += by
            s.groups_most[group] = max(s.groups_most[group], s.groups[group])

    # --- writing, by the API or by hand

    def _set(
        self,
        budget: Budget,
        changes: Mapping[str, Any],
        actor: str,
        client: str,
        marks: Mapping[str, str] | None = None,
    ) -> None:
        """Within a transaction and the lock."""
        called = [(marks or {}).get(f"x-signalbox-{name}", "") for name in ("batch", "run", "decisions")]
        before = budget.amount if budget.status == "ENABLED" else 0
        for name, value in changes.items():
            old = getattr(budget, name)
            if name == "amount" and client == "GOOGLE_ADS_API":
                budget.applications += 1
            if old == value:
                continue
            setattr(budget, name, value)
            if name != "amount":
                self._indexed = None
            self._last_micros = max(self._last_micros + 1, micros(self._clock()))
            operation = "REMOVE" if name == "status" and value == "REMOVED" else "UPDATE"
            self._db.execute(
                "INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (self._last_micros, budget.id, name, operation, str(old), str(value), actor, client, *called),
            )
        self._db.execute(
            "UPDATE budgets SET name = ?, amount = ?, status = ?, shared = ?, applications = ? WHERE id = ?",
            (budget.name, budget.amount, budget.status, budget.shared, budget.applications, budget.id),
        )
        self._moved(budget, (budget.amount if budget.status == "ENABLED" else 0) - before)

    def by_hand(self, line: str, amount: int, actor: str = "person@example.com") -> None:
        """A person sets a budget in the web interface. Whole cents, at least one (ValueError)."""
        if amount < UNIT or amount % UNIT:
            raise ValueError(f"{amount} micros: the web interface takes whole cents, at least one")
        with self._lock, self._transaction():
            self._set(self._named(line), {"amount": int(amount)}, actor, "GOOGLE_ADS_WEB_CLIENT")

    def remove(self, line: str, actor: str = "person@example.com") -> None:
        """A person removes a line's campaign with its budget."""
        with self._lock, self._transaction():
            budget = self._named(line)
            self._set(budget, {"status": "REMOVED"}, actor, "GOOGLE_ADS_WEB_CLIENT")
            for campaign in self.campaigns.values():
                if campaign.budget == budget.id:
                    campaign.status = "REMOVED"
                    self._indexed = None
                    self._db.execute("UPDATE campaigns SET status = 'REMOVED' WHERE id = ?", (campaign.id,))

    def share(self, line: str, others: Sequence[str], actor: str = "person@example.com") -> None:
        """A person lets the other lines' campaigns spend this line's budget, and removes their own budgets."""
        with self._lock, self._transaction():
            budget = self._named(line)
            self._set(budget, {"shared": True}, actor, "GOOGLE_ADS_WEB_CLIENT")
            for other in others:
                campaign = next(c for c in self.campaigns.values() if c.line == other)
                old = self.budgets[campaign.budget]
                campaign.budget = budget.id
                self._indexed = None
                self._db.execute("UPDATE campaigns SET budget = ? WHERE id = ?", (budget.id, campaign.id))
                if not any(c.budget == old.id for c in self.campaigns.values()):
                    self._set(old, {"status": "REMOVED"}, actor, "GOOGLE_ADS_WEB_CLIENT")

    def _named(self, line: str) -> Budget:
        if line not in self._by_line:
            raise KeyError(f"there is no line {line!r}")
        return self._by_line[line]

    def _index(self) -> tuple[dict[str, list[Budget]], dict[int, int]]:
        """Budgets by name, and how many campaigns use each; made anew after either has changed."""
        if self._indexed is None:
            by_name: dict[str, list[Budget]] = {}
            for budget in self.budgets.values():
                by_name.setdefault(budget.name, []).append(budget)
            users: dict[int, int] = {}
            for campaign in self.campaigns.values():
                if campaign.status != "REMOVED":
                    users[campaign.budget] = users.get(campaign.budget, 0) + 1
            self._indexed = (by_name, users)
        return self._indexed

    # --- time

    def advance(
        self, landing: Path | None, *, multipliers: Mapping[str, tuple[float, float]] | None = None
    ) -> pa.Table:
        """The next day happens under the budgets that stand; its rows (``advertising.ROWS``), and the clock moves on.

        ``landing``: the workflow's folder in the landing zone; the file goes to ``export/advertising_<day>.csv.gz``
        below it, whole or not at all. ``multipliers``: by line, what was randomised in the budgets that stand and with
        which probability. The file is written before the day counts as over, so a crash between them repeats the day.
        """
        with self._lock:
            day, amounts = self.next_day, self.amounts()
            given = {line: (float(m), float(p)) for line, (m, p) in (multipliers or {}).items()}
            for line in given:
                self._named(line)
            rows = self._happen(day, amounts, given)
            if landing is not None:
                _land(rows, landing, day)
            after = day + timedelta(days=1)
            with self._transaction():
                self._db.execute(
                    "INSERT OR REPLACE INTO days VALUES (?, ?, ?)",
                    (day.isoformat(), json.dumps(amounts), json.dumps(given)),
                )
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'next_day'", (after.isoformat(),))
            self.next_day = after
            return rows

    def _happen(
        self, day: date, amounts: Mapping[str, int], multipliers: Mapping[str, tuple[float, float]]
    ) -> pa.Table:
        lines = self.world.line_id.tolist()
        return self.world.step(
            day,
            np.array([amounts[line] for line in lines], dtype=np.int64),
            multipliers=np.array([multipliers.get(line, (1.0, np.nan))[0] for line in lines]),
            probabilities=np.array([multipliers.get(line, (1.0, np.nan))[1] for line in lines]),
        )

    def days(self) -> dict[date, dict[str, int]]:
        """Every day that happened, with the micros that each line might spend."""
        with self._lock:
            return {date.fromisoformat(d): json.loads(b) for d, b in self._db.execute("SELECT day, budgets FROM days")}

    def rows(self, day: date) -> pa.Table:
        """A day that happened, again: the same rows."""
        with self._lock:
            found = self._db.execute(
                "SELECT budgets, multipliers FROM days WHERE day = ?", (day.isoformat(),)
            ).fetchone()
        if found is None:
            raise KeyError(f"{day} has not happened here; the next day is {self.next_day}")
        return self._happen(day, json.loads(found[0]), {k: (v[0], v[1]) for k, v in json.loads(found[1]).items()})


def _land(rows: pa.Table, landing: Path, day: date) -> Path:
    """Write the day's export into the landing zone, whole or not at all."""
    folder = landing / "export"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=landing, prefix=".advertising-") as aside:
        written = advertising.export_day(rows, Path(aside), day)
        os.replace(written, folder / written.name)
    return folder / written.name


def micros(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)


def budgets_of(rows: pa.Table, day: date | None = None) -> dict[str, int]:
    """Micros by line of the exported rows' newest day (or of ``day``): what stands downstream when that day is over."""
    table = rows.select(["date", "line_id", "budget"]).to_pydict()
    wanted = day or max(table["date"])
    cents = zip(table["date"], table["line_id"], table["budget"], strict=True)
    return {line: round(budget * 100) * UNIT for at, line, budget in cents if at == wanted}
