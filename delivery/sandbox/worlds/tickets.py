"""A ticket queue as a simulated truth: who asks, how long work takes, and what a priority changes.

Belongs here: arrivals, routing, efforts, service levels, the service process of the teams, a day's export as a file.
Does not: HTTP (the sandbox's servers do that), reading exports back, deciding priorities.

The requests (times, categories, efforts, routes, pauses) are drawn day by day from the seed alone, so that two worlds
with one seed and different priorities serve the same tickets. Where the figures come from: ``docs/world_tickets.md``.
"""

from __future__ import annotations

import gzip
import heapq
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from delivery.sandbox.worlds.working_hours import DAY, HOUR, Team, due_at, end_of_work, on_shift

EPOCH = date(1970, 1, 1)

COLUMNS = (
    "ticket_id", "updated_at", "exported_at", "state", "opened_at", "due_at", "priority", "impact", "urgency", "team",
    "category", "subcategory", "symptom", "contact_type", "location", "caller", "opened_by", "assignee",
    "reassignments", "reopens", "updates", "sla_missed", "effort_hours",
)  # fmt: skip
EXPORT_AT = DAY + HOUR  # seconds after a day's midnight at which its export is written
PRIORITIES_AT = 6 * HOUR  # seconds after midnight at which a step's priorities stand in the queue
LOWEST = 5

# Service hours allowed by the priority at opening; they run Monday to Friday, 08:00 to 18:00.
SERVICE_LEVEL_HOURS = {1: 4, 2: 6, 3: 10, 4: 20, 5: 40}

_WEEKDAY = np.array([1.25, 1.05, 1.03, 0.88, 0.82, 0.14, 0.12])
_HOUR = np.array([1, 1, 1, 1, 1, 1, 2, 5, 11, 13, 12, 11, 7, 8, 10, 9, 8, 5, 3, 2, 2, 2, 1, 1], dtype=np.float64)
_HOPS = np.array([0.60, 0.25, 0.10, 0.05])  # wrong teams before the right one
_TRIAGE = 360  # seconds a wrong team works on a ticket before it passes it on
_WAITS = 0.22  # share of tickets that wait for their caller once
_REOPENS = 0.011
_CONTACT = (("phone", 0.55, 0.90), ("self service", 0.25, 1.0), ("e-mail", 0.15, 1.2), ("chat", 0.05, 0.8))
_SUBCATEGORY = (("failure", 0.40, 1.2), ("access", 0.30, 0.6), ("question", 0.20, 0.5), ("change", 0.10, 1.8))
_SYMPTOMS = ("does not start", "error message", "slow", "no access", "lost data", "how to", "new request", "other")
_CALLERS, _SITES, _DESKS = 900, 14, 16
_CATALOGUE = {
    "service desk": ("account", "password", "general"),
    "network": ("vpn", "wireless", "lan"),
    "workplace": ("laptop", "dock", "monitor"),
    "identity": ("single sign-on", "role", "certificate"),
    "mail": ("mailbox", "calendar", "spam"),
    "erp finance": ("invoice", "ledger", "closing"),
    "erp logistics": ("order", "stock", "shipping"),
    "database": ("query", "backup", "migration"),
    "storage": ("share", "restore", "quota"),
    "telephony": ("headset", "hotline", "mobile"),
    "printing": ("printer", "scanner", "label"),
    "security": ("phishing", "malware", "audit"),
    "web": ("shop", "intranet", "domain"),
    "reporting": ("dashboard", "extract", "licence"),
    "manufacturing": ("terminal", "sensor", "line control"),
    "human resources": ("payroll", "time sheet", "onboarding"),
}


@dataclass(frozen=True)
class Category:
    """A kind of request: its team (index), its share of that team's tickets, and ln(hours) of effort ~ N(mu, sigma)."""

    name: str
    team: int
    share: float
    mu: float
    sigma: float


@dataclass(frozen=True)
class Drift:
    """The world changes on a day: either a new category floods one team, or every effort grows by `size`."""

    start: date
    kind: Literal["new_category", "efforts"] = "new_category"
    team: int = 1
    size: float = 0.6
    category: str = "collaboration suite"


class Request(NamedTuple):
    """One ticket as it will come, with what nobody upstream knows: the truth about its work."""

    second: int  # after midnight
    category: str
    team: int  # the one that can do it
    effort: int  # seconds of work
    impact: int
    urgency: int
    subcategory: str
    shown: tuple[str, str, str, str, str]  # symptom, contact_type, location, caller, opened_by
    wrong_teams: tuple[int, ...]  # the teams that see it first
    pause: tuple[float, int]  # it waits for its caller after this share of the work, for so many seconds; 0: never
    after: tuple[int, int]  # seconds from resolution to reopening (0: never), and to closing


Order = Callable[["World", np.ndarray, int], np.ndarray]

# At one instant things happen in this order: a ticket resolved when it is due is in time.
_RANK, _ARRIVE, _FREE, _BACK, _SHIFT, _REOPEN, _CLOSE, _DUE = range(8)


class World:
    """A ticket queue in simulated time, advanced a day at a time.

    seed: everything follows from it, `load`, `teams`, `drift` and the priorities given.
    load: expected work that arrives in a week over working hours in that week, the same for every team.
    teams: how many teams (1 to 48).
    drift: a change of the world from a day on; nothing before that day differs.
    order: for experiments; (world, ticket numbers, now in seconds since 1970) -> one key a ticket, the smallest goes
        first, then the oldest. Asked when a ticket joins a queue and for all queued ones at every full hour. By default
        the key is the ticket's current priority.

    Within a team every agent works through one ticket at a time, in the team's hours, without interruption except that
    a ticket may wait for its caller. A ticket that reached a wrong team is looked at there, in that team's order, and
    passed on.
    """

    def __init__(
        self, seed: int, *, load: float = 0.9, teams: int = 12, drift: Drift | None = None, order: Order | None = None
    ) -> None:
        if not 0 < load <= 3:
            raise ValueError(f"load {load}: must lie above 0 and at most at 3 (1 = the teams' whole capacity)")
        if not 1 <= teams <= 48:
            raise ValueError(f"teams {teams}: must lie between 1 and 48")
        if drift is not None and not 0 <= drift.team < teams:
            raise ValueError(f"drift.team {drift.team}: is not one of the {teams} teams (0 to {teams - 1})")
        self.seed, self.load, self.drift, self.order = seed, load, drift, order
        self.teams, self.categories = _structure(seed, teams)
        self.rates = _rates(self.teams, self.categories, load)
        self.next_day: date | None = None
        self._calls = 0
        self._events: list[tuple[int, int, int, int]] = []
        self._drawn: dict[date, list[Request]] = {}  # shared by all branches: the same requests come to each
        self._queue: list[list[tuple[float, int, int]]] = [[] for _ in self.teams]
        self._idle = [list(range(t.agents)) for t in self.teams]
        self._rows: list[tuple[Any, ...]] = []
        self._number: dict[str, int] = {}
        # One list per attribute, indexed by ticket. Drawn at arrival:
        self.ticket_id: list[str] = []
        self.opened: list[int] = []
        self.due: list[int] = []
        self.impact: list[int] = []
        self.urgency: list[int] = []
        self.category: list[str] = []
        self.subcategory: list[str] = []
        self._other: list[tuple[str, str, str, str, str]] = []
        self._route: list[tuple[int, ...]] = []
        self._effort: list[int] = []
        self._pause: list[tuple[int, int]] = []
        self._after: list[tuple[int, int]] = []
        # Changing while it is served:
        self.state: list[str] = []
        self.priority: list[int] = []
        self.team: list[int] = []
        self.resolved: list[int | None] = []
        self.missed: list[bool | None] = []
        self._hop: list[int] = []
        self._left: list[int] = []
        self._worked: list[int] = []
        self._agent: list[int | None] = []
        self._reassignments: list[int] = []
        self._reopened: list[int] = []
        self._updates: list[int] = []

    def branch(self, order: Order | None = None) -> World:
        """A copy that goes its own way from here: the same requests will arrive, other priorities may be set."""
        other = object.__new__(World)
        for name, value in self.__dict__.items():
            if isinstance(value, list):
                value = [list(v) if isinstance(v, list) else v for v in value]
            elif name == "_number":
                value = dict(value)
            setattr(other, name, value)
        other.order = order
        if self.next_day is not None:
            other._rekey((self.next_day - EPOCH).days * DAY)
        return other

    def step(self, day: date, priorities: Mapping[str, int] | None = None) -> pa.Table:
        """Serves one day and returns its update events in the order in which they happened (columns: ``COLUMNS``).

        priorities: ticket_id -> 1 (first) to 5, standing in the queue from 06:00 on. A ticket resolved or closed by
            then keeps its own. Work already begun is not interrupted.
        Raises ValueError for a day out of order or a priority outside 1..5, KeyError for a ticket that does not exist.
        """
        self.advance(day, priorities)
        return self._table((day - EPOCH).days * DAY + EXPORT_AT)

    def advance(self, day: date, priorities: Mapping[str, int] | None = None) -> None:
        """As ``step``, for those who do not need the events."""
        if self.next_day is not None and day != self.next_day:
            raise ValueError(f"step({day}): days follow each other, {self.next_day} is next")
        for ticket, priority in (priorities or {}).items():
            if ticket not in self._number:
                raise KeyError(f"ticket {ticket!r}: does not exist in this world by {day}")
            if priority not in range(1, LOWEST + 1):
                raise ValueError(f"ticket {ticket!r}: priority {priority!r} is not one of 1 to {LOWEST}")
        midnight = (day - EPOCH).days * DAY
        self._rows = []
        self._arrivals(day, midnight)
        for team, hands in enumerate(self.teams):
            if day.weekday() in hands.weekdays:
                self._at(midnight + hands.opens * HOUR, _SHIFT, team)
        if self.order is not None:
            for hour in range(24):
                self._at(midnight + hour * HOUR, _RANK, 0)
        if priorities:
            self._run(midnight + PRIORITIES_AT)
            self._set(priorities, midnight + PRIORITIES_AT)
        self._run(midnight + DAY)
        self.next_day = day + timedelta(days=1)

    def open_tickets(self) -> pa.Table:
        """The tickets that are neither resolved nor closed now, as the upstream system shows them (no truth in it)."""
        picked = [i for i, state in enumerate(self.state) if state in ("open", "waiting")]
        return pa.table({
            "ticket_id": pa.array([self.ticket_id[i] for i in picked], pa.string()),
            "state": pa.array([self.state[i] for i in picked], pa.string()),
            "opened_at": _times([self.opened[i] for i in picked]),
            "due_at": _times([self.due[i] for i in picked]),
            "priority": pa.array([self.priority[i] for i in picked], pa.int64()),
            "impact": pa.array([self.impact[i] for i in picked], pa.int64()),
            "team": pa.array([self.teams[self.team[i]].name for i in picked], pa.string()),
            "category": pa.array([self.category[i] for i in picked], pa.string()),
            "subcategory": pa.array([self.subcategory[i] for i in picked], pa.string()),
        })  # fmt: skip

    # Arrivals: drawn from the seed and the day, whatever happened before.

    def requests(self, day: date) -> list[Request]:
        """A day's requests in the order in which they come; they follow from the seed and the day alone."""
        rng = np.random.default_rng([self.seed, 2, day.toordinal()])
        drifted = self.drift if self.drift is not None and day >= self.drift.start else None
        daily = np.array(self.rates) * _WEEKDAY[day.weekday()] / _WEEKDAY.sum()
        which = np.repeat(np.arange(len(daily)), rng.poisson(daily))
        drawn = self._draw(rng, which, self.categories)
        if drifted is not None and drifted.kind == "new_category":
            extra = np.random.default_rng([self.seed, 3, day.toordinal()])
            known = [c for c in self.categories if c.team == drifted.team]
            mu = max(c.mu for c in known)
            flood = Category(drifted.category, drifted.team, 1.0, mu, max(c.sigma for c in known))
            usual = sum(rate for rate, c in zip(daily, self.categories, strict=True) if c.team == drifted.team)
            drawn += self._draw(extra, np.zeros(extra.poisson(drifted.size * usual), dtype=np.int64), [flood])
        grown = 1 + drifted.size if drifted is not None and drifted.kind == "efforts" else 1.0
        return [r._replace(effort=max(60, round(r.effort * grown))) for r in sorted(drawn)]

    def _arrivals(self, day: date, midnight: int) -> None:
        if day not in self._drawn:
            self._drawn[day] = self.requests(day)
        for second, name, team, work, impact, urgency, sub, other, wrong, pause, after in self._drawn[day]:
            number = len(self.ticket_id)
            ticket = f"T{number + 1:07d}"
            self._number[ticket] = number
            self.ticket_id.append(ticket)
            self.opened.append(midnight + second)
            priority = impact + urgency - 1
            self.due.append(due_at(midnight + second, SERVICE_LEVEL_HOURS[priority] * HOUR))
            self.impact.append(impact)
            self.urgency.append(urgency)
            self.category.append(name)
            self.subcategory.append(sub)
            self._other.append(other)
            self._route.append((*wrong, team))
            self._effort.append(work)
            # a pause comes after a share of the work and lasts some calendar time
            self._pause.append((round(pause[0] * work), pause[1]) if pause[1] else (0, 0))
            self._after.append(after)
            self.state.append("new")
            self.priority.append(priority)
            self.team.append(self._route[-1][0])
            self.resolved.append(None)
            self.missed.append(None)
            self._hop.append(0)
            self._left.append(work)
            self._worked.append(0)
            self._agent.append(None)
            self._reassignments.append(0)
            self._reopened.append(0)
            self._updates.append(0)
            self._at(midnight + second, _ARRIVE, number)
            self._at(self.due[-1], _DUE, number)

    def _draw(self, rng: np.random.Generator, which: np.ndarray, categories: list[Category]) -> list[Request]:
        """One request for each of `which` (places in `categories`)."""
        n = len(which)
        mu = np.array([c.mu for c in categories])[which]
        sigma = np.array([c.sigma for c in categories])[which]
        home = np.array([c.team for c in categories], dtype=np.int64)[which]
        second = rng.choice(24, n, p=_HOUR / _HOUR.sum()) * HOUR + rng.integers(0, HOUR, n)
        contact, sub = rng.choice(4, n, p=[c[1] for c in _CONTACT]), rng.choice(4, n, p=[s[1] for s in _SUBCATEGORY])
        factor = np.array([c[2] for c in _CONTACT])[contact] * np.array([s[2] for s in _SUBCATEGORY])[sub]
        effort = HOUR * np.exp(mu + sigma * rng.standard_normal(n)) * factor
        impact = rng.choice([1, 2, 3], n, p=[0.10, 0.62, 0.28])
        # callers overstate: urgency leans high and follows impact only loosely
        urgency = np.where(rng.random(n) < 0.4, impact, rng.choice([1, 2, 3], n, p=[0.22, 0.58, 0.20]))
        caller = np.minimum((rng.pareto(1.1, n) * 12).astype(np.int64), _CALLERS - 1)
        symptom = np.where(rng.random(n) < 0.7, (2 * sub + rng.integers(0, 2, n)) % 8, rng.integers(0, 8, n))
        desk = rng.integers(0, _DESKS, n)
        hops = np.where(len(self.teams) > 3, rng.choice(4, n, p=_HOPS), 0)
        weight = np.log([t.hours_per_week for t in self.teams])
        tried = np.argsort(-(weight + rng.gumbel(size=(n, len(self.teams)))), axis=1, kind="stable")
        share, length = rng.random(n), HOUR * np.exp(np.log(4) + rng.standard_normal(n))
        pause = np.where(rng.random(n) < _WAITS, np.maximum(length, 600), 0).astype(np.int64)
        reopens = np.where(rng.random(n) < _REOPENS, rng.integers(2 * HOUR, 2 * DAY, n), 0)
        closes = rng.integers(1 * DAY, 5 * DAY, n)
        return [
            Request(
                int(second[i]), categories[which[i]].name, int(home[i]), round(effort[i]), int(impact[i]),
                int(urgency[i]), _SUBCATEGORY[sub[i]][0],
                (_SYMPTOMS[symptom[i]], _CONTACT[contact[i]][0], f"site-{caller[i] % _SITES + 1:02d}",
                 f"caller-{caller[i] + 1:04d}", f"desk-{desk[i] + 1:02d}"),
                tuple(int(t) for t in tried[i] if t != home[i])[: hops[i]],
                (float(share[i]), int(pause[i])),
                (int(reopens[i]), int(closes[i])),
            )
            for i in range(n)
        ]  # fmt: skip

    # The service process: a discrete-event simulation over all teams.

    def _at(self, time: int, kind: int, what: int) -> None:
        self._calls += 1
        heapq.heappush(self._events, (time, kind, self._calls, what))

    def _run(self, until: int) -> None:
        while self._events and self._events[0][0] < until:
            now, kind, _, what = heapq.heappop(self._events)
            if kind == _SHIFT:
                self._dispatch(what, now)
            elif kind == _RANK:
                self._rekey(now)
            elif kind == _FREE:
                self._leave(what, now)
            elif kind == _DUE:
                if self.resolved[what] is None and self.missed[what] is None:
                    self.missed[what] = True
                    self._emit(what, now)
            elif kind == _CLOSE:
                self.state[what] = "closed"
                self.missed[what] = bool(self.missed[what])
                self._emit(what, now)
            else:
                if kind == _REOPEN:
                    self._reopened[what] += 1
                    self.resolved[what] = None
                    self._left[what] = max(60, self._effort[what] // 2)
                    if now > self.due[what]:
                        self.missed[what] = True
                self.state[what] = "open"
                self._agent[what] = None
                self._emit(what, now)
                self._enqueue(what, now)

    def _enqueue(self, ticket: int, now: int) -> None:
        key = self.priority[ticket] if self.order is None else float(self.order(self, np.array([ticket]), now)[0])
        heapq.heappush(self._queue[self.team[ticket]], (key, self.opened[ticket], ticket))
        self._dispatch(self.team[ticket], now)

    def _dispatch(self, team: int, now: int) -> None:
        queue, idle = self._queue[team], self._idle[team]
        if not queue or not idle or not on_shift(self.teams[team], now):
            return
        while queue and idle:
            ticket = heapq.heappop(queue)[2]
            self._agent[ticket] = heapq.heappop(idle)
            work = self._segment(ticket)
            self._emit(ticket, now)
            self._at(end_of_work(self.teams[team], now, work), _FREE, ticket)

    def _segment(self, ticket: int) -> int:
        """Seconds of work until the agent lays the ticket down again."""
        if self._hop[ticket] < len(self._route[ticket]) - 1:
            return _TRIAGE
        after, length = self._pause[ticket]
        return max(60, after) if length else self._left[ticket]

    def _leave(self, ticket: int, now: int) -> None:
        team, agent, work = self.team[ticket], self._agent[ticket], self._segment(ticket)
        assert agent is not None
        heapq.heappush(self._idle[team], agent)
        self._worked[ticket] += work
        if self._hop[ticket] < len(self._route[ticket]) - 1:
            self._hop[ticket] += 1
            self.team[ticket] = self._route[ticket][self._hop[ticket]]
            self._reassignments[ticket] += 1
            self._agent[ticket] = None
            self._emit(ticket, now)
            self._enqueue(ticket, now)
        else:
            self._left[ticket] -= work
            length = self._pause[ticket][1]
            self._pause[ticket] = (0, 0)
            if length and self._left[ticket] > 0:
                self.state[ticket] = "waiting"
                self._at(now + length, _BACK, ticket)
            else:
                self.state[ticket] = "resolved"
                self.resolved[ticket] = now
                reopens, closes = self._after[ticket]
                if reopens and not self._reopened[ticket]:
                    self._at(now + reopens, _REOPEN, ticket)
                else:
                    self._at(now + closes, _CLOSE, ticket)
            self._emit(ticket, now)
        self._dispatch(team, now)

    def _set(self, priorities: Mapping[str, int], now: int) -> None:
        for ticket in sorted(priorities):
            i = self._number[ticket]
            if self.state[i] in ("open", "waiting") and self.priority[i] != priorities[ticket]:
                self.priority[i] = int(priorities[ticket])
                self._emit(i, now)
        self._rekey(now)

    def _rekey(self, now: int) -> None:
        """Puts every queue in the order of the keys as they are now."""
        queued = np.array([i for queue in self._queue for _, _, i in queue], dtype=np.int64)
        keys = iter((self.order(self, queued, now) if self.order is not None and len(queued) else queued).tolist())
        for team, queue in enumerate(self._queue):
            self._queue[team] = [
                (self.priority[i] if self.order is None else next(keys), opened, i) for _, opened, i in queue
            ]
            heapq.heapify(self._queue[team])

    # What the upstream system shows.

    def _emit(self, i: int, now: int) -> None:
        self._updates[i] += 1
        if self.state[i] == "new":
            self.state[i] = "open"
        done = self.state[i] in ("resolved", "closed")
        self._rows.append((
            i, now, self.state[i], self.priority[i], self.team[i], self._agent[i], self._reassignments[i],
            self._reopened[i], self._updates[i], self.missed[i], round(self._worked[i] / HOUR, 3) if done else None,
        ))  # fmt: skip

    def _table(self, exported: int) -> pa.Table:
        rows = self._rows
        n = [r[0] for r in rows]
        names = [t.name for t in self.teams]
        other = [self._other[i] for i in n]
        whom = [None if r[5] is None else f"{names[r[4]]}/{r[5] + 1}" for r in rows]
        text, number = pa.string(), pa.int64()
        columns = {
            "ticket_id": pa.array([self.ticket_id[i] for i in n], text),
            "updated_at": _times([r[1] for r in rows]),
            "exported_at": _times([exported] * len(rows)),
            "state": pa.array([r[2] for r in rows], text),
            "opened_at": _times([self.opened[i] for i in n]),
            "due_at": _times([self.due[i] for i in n]),
            "priority": pa.array([r[3] for r in rows], number),
            "impact": pa.array([self.impact[i] for i in n], number),
            "urgency": pa.array([self.urgency[i] for i in n], number),
            "team": pa.array([names[r[4]] for r in rows], text),
            "category": pa.array([self.category[i] for i in n], text),
            "subcategory": pa.array([self.subcategory[i] for i in n], text),
            "symptom": pa.array([o[0] for o in other], text),
            "contact_type": pa.array([o[1] for o in other], text),
            "location": pa.array([o[2] for o in other], text),
            "caller": pa.array([o[3] for o in other], text),
            "opened_by": pa.array([o[4] for o in other], text),
            "assignee": pa.array(whom, text),
            "reassignments": pa.array([r[6] for r in rows], number),
            "reopens": pa.array([r[7] for r in rows], number),
            "updates": pa.array([r[8] for r in rows], number),
            "sla_missed": pa.array([r[9] for r in rows], pa.bool_()),
            "effort_hours": pa.array([r[10] for r in rows], pa.float64()),
        }
        return pa.table({name: columns[name] for name in COLUMNS})


def history(world: World, start: date, days: int) -> pa.Table:
    """Update events of `days` days from `start` on, served without outside priorities."""
    return pa.concat_tables([world.step(start + timedelta(days=d)) for d in range(days)])


def export_day(rows: pa.Table, folder: Path, day: date, *, break_schema: bool = False) -> Path:
    """Writes one day's events as the upstream system would: ``tickets-YYYY-MM-DD.jsonl.gz``, the same bytes every time.

    rows: what ``World.step(day)`` returned. An empty field is ``""``, a time ``YYYY-MM-DD HH:MM:SS`` in UTC.
    break_schema: as after an upgrade of the upstream system, `category` is called `category_name`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tickets-{day:%Y-%m-%d}.jsonl.gz"
    names = ["category_name" if break_schema and n == "category" else n for n in rows.column_names]
    columns = [
        ["" if v is None else v.strftime("%Y-%m-%d %H:%M:%S") if isinstance(v, datetime) else v for v in c.to_pylist()]
        for c in rows.columns
    ]
    with path.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        text = io.TextIOWrapper(packed, encoding="utf-8", newline="\n")
        text.writelines(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in zip(*columns, strict=True))
        text.flush()
    return path


def _structure(seed: int, teams: int) -> tuple[list[Team], list[Category]]:
    """Teams and categories of a world: names are fixed, sizes, hours and efforts follow from the seed."""
    rng = np.random.default_rng([seed, 1])
    hands, kinds = [], []
    bases = list(_CATALOGUE)
    for t in range(teams):
        base, again = bases[t % len(bases)], t // len(bases)
        suffix = f" {again + 1}" if again else ""
        opens = int(rng.integers(7, 10))
        days = 6 if rng.random() < 0.15 else 5
        agents, closes = int(rng.integers(2, 6)), opens + int(rng.integers(8, 11))
        hands.append(Team(base + suffix, agents, opens, closes, tuple(range(days))))
        shares = rng.dirichlet([4.0, 3.0, 2.0])
        for name, share in zip(_CATALOGUE[base], shares, strict=True):
            mu, sigma = float(rng.normal(0.0, 0.7)), float(rng.uniform(0.6, 1.1))
            kinds.append(Category(name + suffix, t, float(share), mu, sigma))
    return hands, kinds


def _rates(teams: list[Team], categories: list[Category], load: float) -> list[float]:
    """Tickets a week of each category such that every team's expected work is `load` times its working hours.

    Work is the effort of a team's own tickets, half of it again for the few that reopen, and the looks at other teams'
    tickets that reached it first.
    """
    usual = sum(c[1] * c[2] for c in _CONTACT) * sum(s[1] * s[2] for s in _SUBCATEGORY)
    effort = [0.0] * len(teams)
    for c in categories:
        effort[c.team] += c.share * float(np.exp(c.mu + c.sigma**2 / 2)) * usual * (1 + _REOPENS / 2)
    hours = [float(t.hours_per_week) for t in teams]
    hops = float(_HOPS @ np.arange(4)) if len(teams) > 3 else 0.0
    weekly = [load * h / e for h, e in zip(hours, effort, strict=True)]
    for _ in range(60):  # a contraction: looks are a few per cent of the work
        looks = [
            sum(weekly[s] * h / (sum(hours) - hours[s]) for s in range(len(teams)) if s != t) * hops * _TRIAGE / HOUR
            for t, h in enumerate(hours)
        ]
        weekly = [(load * h - k) / e for h, k, e in zip(hours, looks, effort, strict=True)]
    return [weekly[c.team] * c.share for c in categories]


def _times(seconds: list[int]) -> pa.Array:
    """Seconds since 1970 as naive UTC timestamps."""
    return pa.array(np.array(seconds, dtype="datetime64[s]").astype("datetime64[us]"))
