"""The advertising API on this machine: the official contract, with the simulated world behind it.

Belongs here: a server that takes what Google's document ``searchads360`` v23 allows and refuses the rest in Google's words;
campaign budgets, their change history, a day that happens; a person's hand and faults on request. Does not: the truth about
what spend earns (``worlds.advertising``), or the connector. The contract and the client are official, this server is ours:
it was written from the document and Google's public guides, and has never been compared with the real one.

A line of the world is one campaign with one budget, both named like the line. Budgets, campaigns, changes and the days that
happened live in a SQLite file, so a restarted server goes on; samples and faults are gone with the process.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit
from zoneinfo import ZoneInfo

import numpy as np

from delivery.connectors.discovery import Document
from delivery.sandbox import private
from delivery.sandbox.advertising_query import Language, Query, QueryError, camel
from delivery.sandbox.worlds import advertising

if TYPE_CHECKING:
    import pyarrow as pa

UNIT = advertising.CENT
LARGEST_AMOUNT = 10**15
MOST_OPERATIONS = 5_000
LARGEST_PAGE = 10_000
LARGEST_BODY = 8 << 20
FAILURE = "type.googleapis.com/google.ads.searchads360.v23.errors.SearchAds360Failure"
BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"
PREFIX = "GoogleAdsSearchads360V23"
STATUS = {  # HTTP → (google.rpc name, words, the error in its details)
    400: ("INVALID_ARGUMENT", "Request contains an invalid argument.", None),
    401: ("UNAUTHENTICATED", "Request had invalid authentication credentials.", None),
    403: ("PERMISSION_DENIED", "The caller does not have permission", None),
    404: ("NOT_FOUND", "Requested entity was not found.", None),
    409: ("ABORTED", "The operation was aborted.", ("databaseError", "CONCURRENT_MODIFICATION")),
    429: ("RESOURCE_EXHAUSTED", "Resource has been exhausted.", ("quotaError", "RESOURCE_TEMPORARILY_EXHAUSTED")),
    500: ("INTERNAL", "Internal error encountered.", ("internalError", "INTERNAL_ERROR")),
    503: ("UNAVAILABLE", "The service is currently unavailable.", ("internalError", "TRANSIENT_ERROR")),
    504: ("DEADLINE_EXCEEDED", "Deadline expired.", ("internalError", "DEADLINE_EXCEEDED")),
}
MUTABLE = {"amountMicros", "name", "explicitlyShared", "totalAmountMicros"}

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
class Trouble:
    """A fault that the next ``times`` calls meet."""

    on: str = "any"
    """mutate, search or any."""
    times: int = 1
    status: int | None = None
    """Answer with this instead."""
    retry_after_s: float | None = None
    delay_s: float = 0.0
    """Wait before doing anything."""
    applied: bool = False
    """Do what was asked before failing: the answer lies about it."""
    close: bool = False
    """Close the connection instead of answering."""


@dataclass
class Refusal:
    """The next ``times`` updates of this budget are refused with this error."""

    line: str
    kind: str = "campaignBudgetError"
    reason: str = "MONEY_AMOUNT_TOO_LARGE"
    times: int = 1_000_000


@dataclass
class Samples:
    """The live total after every write, by anybody: over all budgets and by group of lines."""

    group_of: dict[str, str] = field(default_factory=dict)
    count: int = 0
    most: int = 0
    groups: dict[str, int] = field(default_factory=dict)
    groups_most: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Error:
    """One error about an operation (or the call, ``operation`` None)."""

    kind: str
    reason: str
    operation: int | None = None
    path: tuple[str, ...] = ()
    trigger: str | None = None
    message: str = ""
    retry_delay_s: float | None = None


class Refused(Exception):
    """A call that is answered with an error."""

    def __init__(
        self, status: int, errors: Sequence[_Error] = (), message: str = "", violations: Sequence[tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.status, self.errors, self.message, self.violations = status, tuple(errors), message, tuple(violations)


class AdvertisingSandbox:
    """The account behind the API. Thread-safe.

    Args:
        folder: Holds ``advertising.sqlite``; made if it is not there. What stands in it wins over the other arguments.
        world: What the budgets earn. A folder goes with one world; another one is refused (ValueError).
        next_day: The first day that has not happened yet.
        token: The only access token that is taken.
        budgets: Micros by line to begin with, whole cents; lines that are not named get the incumbent's of ``next_day``.
        user_email: Who the token belongs to, in the change history.
        time_zone: The account's clock; only the change history shows it.
        clock: Now, naive UTC.
        history_delay_s: How late a change appears in the change history.
    """

    def __init__(
        self,
        folder: Path,
        world: advertising.World,
        *,
        next_day: date,
        token: str,
        budgets: Mapping[str, int] | None = None,
        customer_id: str = "1234567890",
        user_email: str = "signalbox@example.com",
        time_zone: str = "Europe/Berlin",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC).replace(tzinfo=None),
        history_delay_s: float = 0.0,
    ) -> None:
        self.folder, self.world, self.token = folder, world, token
        self.customer_id, self.user_email, self.history_delay_s = customer_id, user_email, history_delay_s
        self.zone = ZoneInfo(time_zone)
        self.samples = Samples()
        self.troubles: list[Trouble] = []
        self.refusals: list[Refusal] = []
        self.calls: dict[str, int] = {"mutate": 0, "search": 0}
        self.document = Document.shipped("searchads360", "v23")
        self._clock = clock
        self._lock = threading.RLock()
        self._mutate_schema = self.document.body_of("customers", "campaignBudgets", "mutate")
        self._search_schema = self.document.body_of("customers", "searchAds360", "search")
        self._words = self.document.properties(f"{PREFIX}Errors__ErrorCode")
        resources = {
            "campaign_budget": (f"{PREFIX}Resources__CampaignBudget", ("customer",)),
            "campaign": (f"{PREFIX}Resources__Campaign", ("campaign_budget", "customer")),
            "change_event": (f"{PREFIX}Resources__ChangeEvent", ("customer",)),
            "customer": (f"{PREFIX}Resources__Customer", ()),
        }
        self._language = Language(self.document, resources)
        self._pages: OrderedDict[str, tuple[str, list[dict[str, Any]], str]] = OrderedDict()
        self._requests = 0
        file = private.database(private.folder(folder) / "advertising.sqlite")
        self._db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._open(next_day, budgets)
        self._last_micros = self._db.execute("SELECT coalesce(max(micros), 0) FROM changes").fetchone()[0]
        self._begin_samples()

    # --- what stands

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

    def state(self) -> dict[str, Any]:
        """Everything that stands, for tests and for people."""
        with self._lock:
            return {
                "next_day": self.next_day.isoformat(),
                "customer_id": self.customer_id,
                "budgets": [asdict(b) for b in self.budgets.values()],
                "campaigns": [asdict(c) for c in self.campaigns.values()],
                "applications": sum(b.applications for b in self.budgets.values()),
                "calls": dict(self.calls),
                "samples": self.sampled(),
            }

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
            self._last_micros = max(self._last_micros + 1, _micros(self._clock()))
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

    def trouble(self, trouble: Trouble) -> None:
        """The next calls meet this fault."""
        with self._lock:
            self.troubles.append(trouble)

    def refuse(self, refusal: Refusal) -> None:
        """Updates of this budget are refused from now on."""
        self._named(refusal.line)
        with self._lock:
            self.refusals.append(refusal)

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

    # --- the API

    def mutate(self, body: Any, marks: Mapping[str, str]) -> dict[str, Any]:
        """``campaignBudgets.mutate``. Raises Refused."""
        self._valid(self._mutate_schema, body)
        operations = body.get("operations") or []
        if not operations:
            raise Refused(400, [_Error("fieldError", "REQUIRED", path=("operations",))])
        if len(operations) > MOST_OPERATIONS:
            raise Refused(400, [_Error("requestError", "TOO_MANY_MUTATE_OPERATIONS")])
        for n, operation in enumerate(operations):
            if len({"create", "update", "remove"} & operation.keys()) > 1:
                says = "Invalid value (oneof), oneof field 'operation' is already set. Cannot set another."
                raise Refused(400, message=says, violations=[(f"operations[{n}]", says)])
        partial, only_validate = body.get("partialFailure", False), body.get("validateOnly", False)
        errors: list[_Error] = []
        results: list[dict[str, Any]] = []
        seen: set[str] = set()
        with self._lock:
            planned: list[tuple[Budget, dict[str, Any]] | None] = []
            for n, operation in enumerate(operations):
                try:
                    planned.append(self._planned(n, operation, seen))
                except Refused as refused:
                    errors += refused.errors
                    planned.append(None)
            if errors and not partial:
                raise Refused(400, errors)
            if not only_validate:
                with self._transaction():
                    for one in planned:
                        if one is None:
                            results.append({})
                            continue
                        budget, changes = one
                        self._set(budget, changes, self.user_email, "GOOGLE_ADS_API", marks)
                        result: dict[str, Any] = {"resourceName": self._name(budget)}
                        if body.get("responseContentType") == "MUTABLE_RESOURCE":
                            result["campaignBudget"] = self._budget_row(budget)
                        results.append(result)
        answer: dict[str, Any] = {"results": results} if results else {}
        if errors:
            answer["partialFailureError"] = self._status(3, errors)
        return answer

    def _planned(self, n: int, operation: Mapping[str, Any], seen: set[str]) -> tuple[Budget, dict[str, Any]]:
        def wrong(kind: str, reason: str, *path: str, trigger: str | None = None) -> Refused:
            return Refused(400, [_Error(kind, reason, n, path, trigger)])

        if "create" in operation:
            raise wrong("operationAccessDeniedError", "CREATE_OPERATION_NOT_PERMITTED", "create")
        if not operation or ("update" not in operation and "remove" not in operation):
            raise wrong("requestError", "OPERATION_REQUIRED")
        verb = "update" if "update" in operation else "remove"
        name = operation["remove"] if verb == "remove" else operation["update"].get("resourceName", "")
        at = (verb,) if verb == "remove" else (verb, "resource_name")
        if not name:
            raise wrong("requestError", "RESOURCE_NAME_MISSING", *at)
        found = re.fullmatch(r"customers/([0-9]+)/campaignBudgets/([0-9]{1,18})", name)
        if found is None:
            raise wrong("requestError", "RESOURCE_NAME_MALFORMED", *at, trigger=name)
        budget = self.budgets.get(int(found[2]))
        if found[1] != self.customer_id or budget is None:
            raise wrong("mutateError", "RESOURCE_NOT_FOUND", *at, trigger=name)
        if name in seen:
            raise wrong("mutateError", "ID_EXISTS_IN_MULTIPLE_MUTATES", *at, trigger=name)
        seen.add(name)
        if budget.status == "REMOVED":
            raise wrong("campaignBudgetError", "CAMPAIGN_BUDGET_REMOVED", *at, trigger=name)
        for refusal in self.refusals:
            if refusal.line == budget.line and refusal.times > 0:
                refusal.times -= 1
                raise wrong(refusal.kind, refusal.reason, verb, "amount_micros")
        if verb == "remove":
            if operation.get("updateMask"):
                raise wrong("fieldMaskError", "FIELD_MASK_NOT_ALLOWED", "update_mask")
            if any(c.budget == budget.id and c.status != "REMOVED" for c in self.campaigns.values()):
                raise wrong("campaignBudgetError", "CAMPAIGN_BUDGET_IN_USE", *at)
            return budget, {"status": "REMOVED"}
        return budget, self._updated(n, operation, wrong)

    def _updated(self, n: int, operation: Mapping[str, Any], wrong: Callable[..., Refused]) -> dict[str, Any]:
        update, mask = operation["update"], operation.get("updateMask", "")
        if not mask:
            raise wrong("fieldMaskError", "FIELD_MASK_MISSING", "update_mask")
        changes: dict[str, Any] = {}
        for part in mask.split(","):
            name = camel(part)
            known = self.document.properties(f"{PREFIX}Resources__CampaignBudget")
            if name not in known:
                raise wrong("fieldMaskError", "FIELD_NOT_FOUND", "update_mask", trigger=part)
            if name not in MUTABLE:
                raise wrong("fieldError", "IMMUTABLE_FIELD", "update", part)
            if name == "totalAmountMicros":
                reason = "TOTAL_BUDGET_AMOUNT_MUST_BE_UNSET_FOR_BUDGET_PERIOD_DAILY"
                raise wrong("campaignBudgetError", reason, "update", "total_amount_micros")
            if name not in update:
                raise wrong("fieldError", "FIELD_CANNOT_BE_CLEARED", "update", part)
            if name == "amountMicros":
                amount = int(update[name])
                for bad, kind, reason in (
                    (amount < 0, "campaignBudgetError", "NEGATIVE_MONEY_AMOUNT"),
                    (amount % UNIT != 0, "campaignBudgetError", "NON_MULTIPLE_OF_MINIMUM_CURRENCY_UNIT"),
                    (amount < UNIT, "campaignBudgetError", "BUDGET_BELOW_PER_DAY_MINIMUM"),
                    (amount > LARGEST_AMOUNT, "campaignBudgetError", "MONEY_AMOUNT_TOO_LARGE"),
                ):
                    if bad:
                        raise wrong(kind, reason, "update", "amount_micros", trigger=str(amount))
                changes["amount"] = amount
            elif name == "name":
                if not 1 <= len(update[name].strip().encode()) <= 255:
                    raise wrong("fieldError", "INVALID_VALUE", "update", "name")
                if any(b.name == update[name] and b.status == "ENABLED" for b in self.budgets.values()):
                    raise wrong("campaignBudgetError", "DUPLICATE_NAME", "update", "name", trigger=update[name])
                changes["name"] = update[name]
            elif name == "explicitlyShared":
                changes["shared"] = bool(update[name])
        return changes

    def search(self, body: Any) -> dict[str, Any]:
        """``searchAds360.search``. Raises Refused."""
        self._valid(self._search_schema, body)
        text = body.get("query", "")
        if not text:
            raise Refused(400, [_Error("requestError", "REQUIRED_FIELD_MISSING", path=("query",))])
        size = body.get("pageSize", 0) or LARGEST_PAGE
        if not 1 <= size <= LARGEST_PAGE:
            raise Refused(400, [_Error("requestError", "INVALID_PAGE_SIZE", path=("page_size",))])
        token = body.get("pageToken", "")
        try:
            query = self._language.parse(text)
        except QueryError as error:
            raise Refused(400, [_Error("queryError", error.reason, message=str(error))]) from None
        if body.get("validateOnly"):
            return {}
        mask = ",".join(".".join(self._language.path(name)[0]) for name in query.fields)
        with self._lock:
            if token:
                asked, rows, mask = self._pages.get(token.split(".")[0], ("", [], ""))
                start = int(token.split(".")[1]) if re.fullmatch(r"[0-9]+\.[0-9]{1,9}", token) else 0
                if asked != text or not start:
                    raise Refused(400, [_Error("requestError", "INVALID_PAGE_TOKEN", path=("page_token",))])
                mark = token.split(".")[0]
            else:
                rows, start = self._language.select(query, self._candidates(query)), 0
                mark = str(self._requests)
        answer: dict[str, Any] = {"results": rows[start : start + size]} if rows[start:] else {}
        answer["fieldMask"] = mask
        if (body.get("searchSettings") or {}).get("returnTotalResultsCount"):
            answer["totalResultsCount"] = str(len(rows))
        if start + size < len(rows):
            with self._lock:  # the pages of one search show one moment
                self._pages[mark] = (text, rows, mask)
                while len(self._pages) > 64:
                    self._pages.popitem(last=False)
            answer["nextPageToken"] = f"{mark}.{start + size}"
        return answer

    def _candidates(self, query: Query) -> list[dict[str, Any]]:
        """The rows that the query can be about, found by name or number where it asks for some."""
        customer = {
            "resourceName": f"customers/{self.customer_id}",
            "id": self.customer_id,
            "descriptiveName": "Signalbox sandbox",
            "currencyCode": "EUR",
            "timeZone": str(self.zone),
            "status": "ENABLED",
            "testAccount": True,
        }
        if query.resource == "customer":
            return [{"customer": customer}]
        if query.resource == "change_event":
            return [{"changeEvent": event, "customer": customer} for event in self._events(query)]
        by_name, users = self._index()
        if query.resource == "campaign_budget":
            budgets = list(self.budgets.values())
            asked = {name: query.asked(f"campaign_budget.{name}") for name in ("id", "name", "resource_name")}
            if asked["id"] is not None:
                budgets = [self.budgets[int(i)] for i in dict.fromkeys(asked["id"]) if int(i) in self.budgets]
            elif asked["name"] is not None:
                budgets = [b for name in dict.fromkeys(asked["name"]) for b in by_name.get(name, [])]
            return [{"campaignBudget": self._budget_row(b, users), "customer": customer} for b in budgets]
        rows = []
        names = query.asked("campaign.name")
        wanted = set(names) if names is not None else None
        for campaign in self.campaigns.values():
            if wanted is None or campaign.line in wanted:
                budget = self.budgets[campaign.budget]
                row = {
                    "resourceName": f"customers/{self.customer_id}/campaigns/{campaign.id}",
                    "id": str(campaign.id),
                    "name": campaign.line,
                    "status": campaign.status,
                    "servingStatus": "SERVING" if campaign.status == "ENABLED" else "ENDED",
                    "campaignBudget": self._name(budget),
                }
                rows.append({"campaign": row, "campaignBudget": self._budget_row(budget, users), "customer": customer})
        return rows

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

    def _name(self, budget: Budget) -> str:
        return f"customers/{self.customer_id}/campaignBudgets/{budget.id}"

    def _budget_row(self, budget: Budget, users: Mapping[int, int] | None = None) -> dict[str, Any]:
        row = {
            "resourceName": self._name(budget),
            "id": str(budget.id),
            "name": budget.name,
            "amountMicros": str(budget.amount),
            "status": budget.status,
            "period": "DAILY",
            "type": "STANDARD",
            "deliveryMethod": "STANDARD",
            "explicitlyShared": budget.shared,
        }
        if users is not None:
            row["referenceCount"] = str(users.get(budget.id, 0))
        return row

    def _events(self, query: Query) -> list[dict[str, Any]]:
        """Changes within the time that the query must name, as the change history shows them."""
        now = self._clock()
        when = [c for c in query.where if c.field == "change_event.change_date_time"]
        starts = [c.values[0] for c in when if c.operator in (">", ">=", "BETWEEN", "=")]
        ends = [c.values[-1] for c in when if c.operator in ("<", "<=", "BETWEEN", "=")]
        if not starts or not ends:
            raise Refused(400, [_Error("changeEventError", "CHANGE_DATE_RANGE_INFINITE")])
        if query.limit is None:
            raise Refused(400, [_Error("changeEventError", "LIMIT_NOT_SPECIFIED")])
        if query.limit > 10_000:
            raise Refused(400, [_Error("changeEventError", "INVALID_LIMIT_CLAUSE")])
        try:
            first, last = (datetime.fromisoformat(t).replace(tzinfo=self.zone) for t in (max(starts), min(ends)))
        except ValueError:
            raise Refused(400, [_Error("queryError", "INVALID_DATE_FORMAT")]) from None
        if first.astimezone(UTC).replace(tzinfo=None) < now - timedelta(days=30):
            raise Refused(400, [_Error("changeEventError", "START_DATE_TOO_OLD")])
        if last < first:
            raise Refused(400, [_Error("changeEventError", "CHANGE_DATE_RANGE_NEGATIVE")])
        names = query.asked("change_event.change_resource_name")
        ids = None if names is None else {int(n.rsplit("/", 1)[-1]) for n in names if n.rsplit("/", 1)[-1].isdigit()}
        # Two changes of one moment are told apart by a microsecond, so without a delay the last may lie just ahead
        late = timedelta(seconds=self.history_delay_s)
        shown = _micros(now - late) if late else 2**62
        found = self._db.execute(
            "SELECT micros, budget, field, operation, before, after, actor, client FROM changes "
            "WHERE micros BETWEEN ? AND ? ORDER BY micros",
            (int(first.timestamp() * 1e6), min(int(last.timestamp() * 1e6) + 1, shown)),
        )
        return [self._event(*row) for row in found if ids is None or row[1] in ids]

    def _event(
        self, micros: int, budget: int, name: str, operation: str, before: str, after: str, actor: str, client: str
    ) -> dict[str, Any]:
        local = datetime.fromtimestamp(micros // 1_000_000, self.zone).replace(
            tzinfo=None, microsecond=micros % 1_000_000
        )
        shown = {"amount": "amountMicros", "name": "name", "status": "status", "shared": "explicitlyShared"}[name]
        resource = f"customers/{self.customer_id}/campaignBudgets/{budget}"

        def part(value: str) -> dict[str, Any]:
            told: Any = value == "True" if name == "shared" else value
            return {"campaignBudget": {"resourceName": resource, shown: told}}

        return {
            "resourceName": f"customers/{self.customer_id}/changeEvents/{micros}~0~0",
            "changeDateTime": f"{local:%Y-%m-%d %H:%M:%S.%f}",
            "changeResourceType": "CAMPAIGN_BUDGET",
            "changeResourceName": resource,
            "resourceChangeOperation": operation,
            "changedFields": shown,
            "clientType": client,
            "userEmail": actor,
            "oldResource": part(before),
            "newResource": part(after),
        }

    # --- errors, as Google writes them

    def _valid(self, schema: str, body: Any) -> None:
        problems = self.document.problems(schema, body)
        if problems:
            violations = [tuple(problem.split(": ", 1)) for problem in problems]
            says = "; ".join(f"Invalid JSON payload received. {words} at '{place}'" for place, words in violations)
            raise Refused(400, message=says[:2_000], violations=[(place, words) for place, words in violations])

    def _error(self, error: _Error) -> dict[str, Any]:
        node = self._words[error.kind]
        says = error.message or node["enumDescriptions"][node["enum"].index(error.reason)]
        out: dict[str, Any] = {"errorCode": {error.kind: error.reason}, "message": says}
        if error.trigger is not None:
            out["trigger"] = {"stringValue": error.trigger}
        place: list[dict[str, Any]] = [{"fieldName": part} for part in error.path]
        if error.operation is not None:
            place = [{"fieldName": "operations", "index": error.operation}, *place]
        if place:
            out["location"] = {"fieldPathElements": place}
        if error.retry_delay_s is not None:
            quota = {
                "rateScope": "ACCOUNT",
                "rateName": "Requests per account",
                "retryDelay": f"{error.retry_delay_s:g}s",
            }
            out["details"] = {"quotaErrorDetails": quota}
        return out

    def _status(self, code: int, errors: Sequence[_Error], message: str = "") -> dict[str, Any]:
        listed = [self._error(e) for e in errors]
        if not message:
            first = listed[0]["message"]
            place = ".".join(
                f"{p['fieldName']}[{p['index']}]" if "index" in p else p["fieldName"]
                for p in listed[0].get("location", {}).get("fieldPathElements", [])
            )
            message = f"{first}{f', at {place}' if place else ''}"
            if len(listed) > 1:
                message = f"Multiple errors in ‘details’. First error: {message}"
        detail = {"@type": FAILURE, "errors": listed, "requestId": f"sandbox-{self._requests}"}
        return {"code": code, "message": message, "details": [detail]}

    def refused(self, refused: Refused) -> dict[str, Any]:
        """The body of an error answer."""
        name, words, _ = STATUS[refused.status]
        error: dict[str, Any] = {"code": refused.status, "message": refused.message or words, "status": name}
        if refused.errors:
            error["details"] = self._status(3, refused.errors, "-")["details"]
        elif refused.violations:
            listed = [{"field": place, "description": words} for place, words in refused.violations]
            error["details"] = [{"@type": BAD_REQUEST, "fieldViolations": listed}]
        return {"error": error}

    # --- one request

    def authorise(self, headers: Mapping[str, str]) -> None:
        """Raises Refused unless the token is the one."""
        if headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(401, [_Error("authenticationError", "OAUTH_TOKEN_INVALID")])

    def answer(
        self, method: str, target: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[int, dict[str, Any]]:
        """Status and body for one request; ``headers`` by lower-case name. Never raises for what a client sends."""
        with self._lock:
            self._requests += 1
        try:
            parts = urlsplit(target)
            path = unquote(parts.path)
            self.authorise(headers)
            if path.startswith("/sandbox/"):
                return 200, self._control(method, path.removeprefix("/sandbox/"), content)
            unknown = [name for name, _ in parse_qsl(parts.query) if name not in self.document.content["parameters"]]
            if unknown:
                says = f'Invalid JSON payload received. Unknown name "{unknown[0]}": Cannot bind query parameter.'
                raise Refused(400, message=says, violations=[(unknown[0], says)])
            return 200, self._served(method, path, headers, content)
        except Refused as refused:
            return refused.status, self.refused(refused)

    def _served(self, method: str, path: str, headers: Mapping[str, str], content: bytes) -> dict[str, Any]:
        if (method, path) == ("GET", "/v23/customers:listAccessibleCustomers"):
            return {"resourceNames": [f"customers/{self.customer_id}"]}
        found = re.fullmatch(r"/v23/customers/([^/]+)/(campaignBudgets:mutate|searchAds360:search)", path)
        if found is None or method != "POST":
            raise Refused(404, message="Method not found.")
        if not found[1].isdigit():
            raise Refused(400, [_Error("requestError", "INVALID_CUSTOMER_ID")])
        if found[1] != self.customer_id:
            raise Refused(403, [_Error("authorizationError", "USER_PERMISSION_DENIED")])
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            raise Refused(400, message="Invalid JSON payload received. Unexpected token.") from None
        kind = "mutate" if "mutate" in found[2] else "search"
        trouble = None
        with self._lock:
            self.calls[kind] += 1
            trouble = next((t for t in self.troubles if t.times > 0 and t.on in (kind, "any")), None)
            if trouble is not None:
                trouble.times -= 1
        if trouble is None:
            return self._call(kind, body, headers)
        time.sleep(trouble.delay_s)
        result = self._call(kind, body, headers) if trouble.applied or not (trouble.status or trouble.close) else {}
        if trouble.close:
            raise ConnectionAbortedError
        if trouble.status is None:
            return result
        fault = STATUS[trouble.status][2]
        errors = [_Error(*fault, retry_delay_s=trouble.retry_after_s)] if fault else []
        raise Refused(trouble.status, errors)

    def _call(self, kind: str, body: Any, headers: Mapping[str, str]) -> dict[str, Any]:
        return self.mutate(body, headers) if kind == "mutate" else self.search(body)

    def _control(self, method: str, what: str, content: bytes) -> dict[str, Any]:
        """What a person or a test asks of the sandbox itself."""
        try:
            given = json.loads(content) if content else {}
            match method, what:
                case "GET", "state":
                    return self.state()
                case "GET", "samples":
                    return self.sampled()
                case "GET", "changes":
                    return {"changes": self.changes()}
                case "POST", "samples":
                    self.group(given["groups"]) if "groups" in given else self.reset_samples()
                case "POST", "set":
                    self.by_hand(given["line"], given["amount"], given.get("actor", "person@example.com"))
                case "POST", "remove":
                    self.remove(given["line"], given.get("actor", "person@example.com"))
                case "POST", "share":
                    self.share(given["line"], given["with"], given.get("actor", "person@example.com"))
                case "POST", "trouble":
                    if given.get("status") not in (None, *STATUS):
                        raise ValueError(f"status is one of {sorted(STATUS)}")
                    self.trouble(Trouble(**given))
                case "POST", "refuse":
                    refusal = Refusal(**given)
                    if refusal.reason not in self._words[refusal.kind]["enum"]:
                        raise ValueError(f"{refusal.kind} has no {refusal.reason}")
                    self.refuse(refusal)
                case "POST", "advance":
                    landing = Path(given["landing"]) if given.get("landing") else None
                    multipliers = {line: (m, p) for line, (m, p) in (given.get("multipliers") or {}).items()}
                    rows = self.advance(landing, multipliers=multipliers)
                    day = rows.column("date")[0].as_py().isoformat()
                    return {"day": day, "rows": rows.num_rows, "next_day": self.next_day.isoformat()}
                case _:
                    raise Refused(404, message=f"The sandbox has no {method} {what}.")
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(400, message=f"{type(error).__name__}: {error}") from None
        return {}


def _land(rows: pa.Table, landing: Path, day: date) -> Path:
    """Write the day's export into the landing zone, whole or not at all."""
    folder = landing / "export"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=landing, prefix=".advertising-") as aside:
        written = advertising.export_day(rows, Path(aside), day)
        os.replace(written, folder / written.name)
    return folder / written.name


def _micros(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)


def budgets_of(rows: pa.Table, day: date | None = None) -> dict[str, int]:
    """Micros by line of the exported rows' newest day (or of ``day``): what stands downstream when that day is over."""
    table = rows.select(["date", "line_id", "budget"]).to_pydict()
    wanted = day or max(table["date"])
    cents = zip(table["date"], table["line_id"], table["budget"], strict=True)
    return {line: round(budget * 100) * UNIT for at, line, budget in cents if at == wanted}


class Server:
    """The sandbox over HTTP on this machine, in threads of this process; a context manager."""

    def __init__(self, sandbox: AdvertisingSandbox, port: int = 0) -> None:
        self.sandbox = sandbox
        self._http = _HttpServer(("127.0.0.1", port), _handler(sandbox))
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name="advertising", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is closed (for a process that does nothing else)."""
        self._thread.join()

    def close(self) -> None:
        """Stop answering; open connections are cut. The sandbox itself stays usable."""
        self._http.shutdown()
        self._http.server_close()
        self._http.cut()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(sandbox: AdvertisingSandbox, port: int = 0) -> Server:
    """Serve on 127.0.0.1; port 0: a free one, see ``url``."""
    return Server(sandbox, port)


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is printed by the base class."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError | ValueError | OSError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        for one in list(self._open):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it is closed already


def _handler(sandbox: AdvertisingSandbox) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        timeout = 120

        def _do(self) -> None:
            length = self.headers.get("content-length", "0")
            if not length.isdigit() or int(length) > LARGEST_BODY or self.headers.get("transfer-encoding"):
                self.close_connection = True
                self._send(400, sandbox.refused(Refused(400, message="Request payload size is not acceptable.")))
                return
            content = self.rfile.read(int(length))
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                status, body = sandbox.answer(self.command, self.path, headers, content)
            except ConnectionAbortedError:
                self.close_connection = True
                return
            self._send(status, body)

        def _send(self, status: int, body: Mapping[str, Any]) -> None:
            content = json.dumps(body, separators=(",", ":")).encode()
            head = f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}\r\n"
            head += f"Content-Type: application/json; charset=UTF-8\r\nContent-Length: {len(content)}\r\n\r\n"
            self.wfile.write(head.encode() + content)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _do

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is logged: a header could hold the token."""

    return Handler
