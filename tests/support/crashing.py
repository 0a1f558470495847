"""Killing the process that pushes: prepared children that die in a moment, downstream systems that count, and the checks.

Belongs here: what ``tests/system`` needs to SIGKILL a push or a rollback over a real ledger, a real connector and real HTTP,
and to say afterwards what was lost and what came twice. ``python -m tests.support.crashing --kills 300`` is the soak. Does
not: faults without a dead process (``tests/support/fakes.py``, ``tests/support/liars.py``).

A process that imports everything forks for each life, so that a kill costs a fraction of a second. It has no thread, engine
or connection; the child opens its own. A forked child is a process like any other: it has a pid, a lease and its own sockets.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from delivery.connectors import google_ads, helpdesk, sql_table
from delivery.connectors.base import Capabilities, Change, Connector, Reading, Write, Written
from delivery.ledger import FINAL, Ledger
from delivery.push import PushSettings, push
from delivery.rollback import Batch, roll_back, rollback_id
from delivery.sandbox.advertising_api import AdvertisingSandbox
from delivery.sandbox.advertising_server import serve
from delivery.sandbox.helpdesk import HelpdeskSandbox
from delivery.sandbox.worlds import advertising
from tests.support import fakes, helpdesks
from tests.support.ledgers import KEY

ROOT = Path(__file__).parents[2]
TOKEN = "marked-secret-0123456789"
ENVIRON = {"ADS_TOKEN": TOKEN, "DESK_TOKEN": TOKEN}
SETTINGS: dict[str, Any] = {
    "concurrency": 2, "wave": 6, "late_s": 0.4, "patience_s": 60.0, "backoff_s": [0.02, 0.2], "breaker_failures": 50,
    "unit": 1,
}  # fmt: skip
"""Small waves and few threads: a random instant lands in the middle of something."""
PATIENCE_S = 120.0
"""Longest life on the busiest machine."""


def utc_now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


# --- in the child


class Lagging:
    """A connector to a database in this process, with the way there and back taking as long as HTTP would."""

    def __init__(self, inner: Connector, lag_s: float) -> None:
        self._inner, self._lag_s, self.system = inner, lag_s, inner.system

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        time.sleep(self._lag_s)
        return self._inner.read(keys)

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        time.sleep(self._lag_s)
        answers = self._inner.apply(writes, validate_only=validate_only)
        time.sleep(self._lag_s)
        return answers

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        return self._inner.history(keys, since)

    def close(self) -> None:
        self._inner.close()


def connect(said: Mapping[str, Any], environ: Mapping[str, str], clock: Callable[[], datetime] = utc_now) -> Connector:
    """The connector that a job names."""
    given = {k: v for k, v in said.items() if k != "lag_s"}
    how: dict[str, Any] = {"environ": {**ENVIRON, **environ}, "folder": ROOT, "clock": clock}
    if said["kind"] == "google_ads":
        return google_ads.connect(google_ads.GoogleAdsSettings(**given), **how)
    if said["kind"] == "helpdesk":
        return helpdesk.connect(helpdesk.HelpdeskSettings(**given), **how)
    return Lagging(sql_table.connect(sql_table.SqlTableSettings(**given), **how), said.get("lag_s", 0.0))


class JumpingClock:
    """A wall clock that somebody sets by these days, in turn, at every ``every``-th look."""

    def __init__(self, days: Sequence[int], every: int = 1) -> None:
        self._days, self._every, self._looks = days, every, itertools.count()

    def __call__(self) -> datetime:
        return utc_now() + timedelta(days=self._days[next(self._looks) // self._every % len(self._days)])


def _do(job: Mapping[str, Any], begun: Callable[[], None]) -> dict[str, Any]:
    clock = JumpingClock(**job["clock"]) if "clock" in job else utc_now
    with (
        Ledger.open(job["ledger"], key=KEY, clock=clock) as ledger,
        closing(connect(job["connector"], job["environ"], clock)) as connector,
    ):
        how: dict[str, Any] = {
            "settings": PushSettings(**job["settings"]), "run_id": "run-crash", "rng": random.Random(job["seed"]),
            "clock": clock,
        }  # fmt: skip
        time.sleep(max(0.0, job.get("at", 0.0) - time.monotonic()))
        begun()
        if job["do"] == "push":
            return push(ledger, connector, job["batch"], **how).as_dict()
        report = roll_back(
            ledger, lambda _: connector, Batch(job["batch"]), actor="ada", reason="a test of crashes", **how
        )
        return report.as_dict()


def _live(job: Mapping[str, Any], out: int) -> None:
    """The whole life of a child, in its own process; never returns."""
    try:
        result: dict[str, Any] = {"report": _do(job, lambda: _say(out, {"begun": True}))}
    except Exception as error:
        result = {"error": type(error).__name__, "says": str(error), "trace": traceback.format_exc()}
    _say(out, result)
    os._exit(0)


def _say(out: int, what: Mapping[str, Any]) -> None:
    data = json.dumps(what, default=str).encode() + b"\n"
    while data:
        data = data[os.write(out, data) :]


# --- the process that forks


def _prepare() -> None:
    """Import what a child would import, so that it need not."""
    import googleapiclient.discovery  # noqa: F401
    import psycopg2
    import pyarrow.compute  # noqa: F401
    import sqlalchemy.dialects.postgresql.psycopg2
    import sqlalchemy.dialects.sqlite.pysqlite  # noqa: F401

    import delivery.approvals
    import delivery.ledger.verify  # noqa: F401

    google_ads.connect(
        google_ads.GoogleAdsSettings(customer_id="1", endpoint="http://127.0.0.1:1/", token_env="ADS_TOKEN"),
        environ=ENVIRON, folder=ROOT, clock=utc_now,
    ).close()  # fmt: skip
    assert psycopg2 and threading.active_count() == 1, "a process with threads must not fork"
    gc.freeze()


def forking() -> None:
    """Start, kill and bury children as told on standard input, until it ends; one JSON a line in both directions."""
    _prepare()
    _say(1, {"ready": True})
    children: dict[int, tuple[int, int]] = {}
    said: dict[int, bytes] = {}
    rest = b""
    while True:
        for fd in select.select([0, *children], [], [])[0]:
            data = os.read(fd, 1 << 16)
            if fd != 0:
                number, pid = children[fd]
                *lines, said[fd] = (said[fd] + data).split(b"\n")
                for line in lines:
                    _say(1, {"life": number, **json.loads(line)})
                if not data:
                    os.close(fd)
                    del children[fd]
                    status = os.waitpid(pid, 0)[1]
                    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                    _say(1, {"life": number, "ended": True, "signal": ended_by})
                continue
            if not data:
                for _, pid in children.values():
                    os.kill(pid, signal.SIGKILL)
                return
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                told = json.loads(line)
                if "kill" in told:
                    for number, pid in children.values():
                        if number == told["kill"]:
                            os.kill(pid, signal.SIGKILL)
                    continue
                ours, theirs = os.pipe()
                pid = os.fork()
                if pid == 0:
                    os.dup2(2, 1)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    for other in (ours, *children):
                        os.close(other)
                    _live(told["job"], theirs)
                os.close(theirs)
                children[ours], said[ours] = (told["start"], pid), b""
                _say(1, {"life": told["start"], "pid": pid})


class Life:
    """One child, from its fork to its end."""

    def __init__(self, number: int, kill: Callable[[], None]) -> None:
        self._changed = threading.Condition()
        self.number, self._kill = number, kill
        self.started = time.monotonic()
        self.pid = 0
        self.begun: float | None = None
        """Monotonic: ledger and connector are open, the push begins."""
        self.ended = False
        self.signal = 0
        self.result: dict[str, Any] = {}

    def hear(self, said: Mapping[str, Any]) -> None:
        with self._changed:
            self.pid = said.get("pid", self.pid)
            if "begun" in said:
                self.begun = time.monotonic()
            if "report" in said or "error" in said:
                self.result = dict(said)
            if "ended" in said:
                self.ended, self.signal = True, said["signal"]
            self._changed.notify_all()

    def wait(self, seconds: float, until: Callable[[Life], bool] = lambda life: life.ended) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: until(self) or self.ended, seconds)

    def kill(self) -> None:
        """SIGKILL; the process that forked it does it, so the pid cannot be another's by then."""
        self._kill()


class Prepared:
    """A process that has imported everything and forks a child for each job; a context manager."""

    def __init__(self) -> None:
        environ = {**os.environ, **ENVIRON, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.crashing", "--fork"], cwd=ROOT, env=environ,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._lives: dict[int, Life] = {}
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the process that forks did not start: see its words above")
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            self._lives[said["life"]].hear(said)

    def _tell(self, what: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()

    def start(self, job: Mapping[str, Any]) -> Life:
        number = len(self._lives)
        life = self._lives[number] = Life(number, lambda: self._tell({"kill": number}))
        self._tell({"start": number, "job": job})
        return life

    def run(self, job: Mapping[str, Any]) -> Life:
        """A life that nobody ends."""
        life = self.start(job)
        assert life.wait(PATIENCE_S), f"{job['do']} of {job['batch']} did not end in {PATIENCE_S:g} s"
        return life

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._reader.join(20)
        self._process.stdout.close()


# --- the systems, which live on


@dataclass(frozen=True)
class Row:
    """One decision of a batch."""

    entity: str
    before: int
    after: int
    arm: str = "champion"


class Downstream(Protocol):
    """A system that outlives the processes that write to it, and counts what they did."""

    name: str
    once: bool
    """It has a key or a condition: nothing may ever be applied twice."""

    @property
    def job(self) -> dict[str, Any]:
        """What a child needs to connect to it: ``connector`` and ``environ``."""
        ...

    def rows(self, rng: random.Random) -> tuple[list[Row], dict[str, int] | None]:
        """Decisions from what stands now, and their pools."""
        ...

    def values(self) -> dict[str, int]: ...

    def applied(self) -> list[tuple[str, int]]:
        """Every write of a value that it carried out, equal ones included, in their order: (entity, value)."""
        ...

    def hold(self, rng: random.Random, *, answer: bool, late_s: float) -> None:
        """Keep back the answer of a write to come for a while, ``answer``; or the write itself for ``late_s``."""
        ...

    def settled(self) -> None:
        """Wait until nothing is under way in it, and forget what was to be held back."""
        ...

    def over(self) -> dict[str, int]:
        """By how much each arm's live total has ever been over its pool."""
        ...


class SlowAds(AdvertisingSandbox):
    """The advertising sandbox, with time on the way, and a log of every amount that the API set."""

    way_s = 0.01

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.log: list[tuple[str, int]] = []
        self.late: list[float] = []
        self.held: list[float] = []
        self.late_lines: set[str] = set()
        """Lines whose write was held before it was carried out."""
        self.under_way = 0
        self.arrived = threading.Semaphore(0)
        """Counts the writes that were held before they were carried out."""
        self._mutating = threading.Lock()

    def answer(
        self, method: str, target: str, headers: Mapping[str, str], content: bytes
    ) -> tuple[int, dict[str, Any]]:
        writes = ":mutate" in target
        with self._mutating:
            self.under_way += 1
            late = self.late.pop() if writes and self.late else 0.0
            held = self.held.pop() if writes and self.held else 0.0
        try:
            if late:
                asked = [one["update"]["resourceName"] for one in json.loads(content)["operations"]]
                self.late_lines = {self.budgets[int(name.rsplit("/", 1)[1])].line for name in asked}
                self.arrived.release()
            time.sleep(self.way_s + late)
            answered = super().answer(method, target, headers, content)
            time.sleep(self.way_s + held)
            return answered
        finally:
            with self._mutating:
                self.under_way -= 1

    def mutate(self, body: Any, marks: Mapping[str, str]) -> dict[str, Any]:
        with self._mutating:
            answered = super().mutate(body, marks)
            for operation, result in zip(body["operations"], answered.get("results", []), strict=False):
                if result:
                    number = int(result["resourceName"].rsplit("/", 1)[1])
                    self.log.append((self.budgets[number].line, int(operation["update"]["amountMicros"])))
        return answered


class Ads:
    """Google Ads' contract on this machine: neither key nor condition, pools, a change history."""

    once = False
    name = "google_ads"

    def __init__(self, folder: Path, lines: int = 40) -> None:
        world = advertising.World(3, "easy", lines)
        self.sandbox = SlowAds(folder, world, next_day=date(2026, 3, 2), token=TOKEN)
        self.server = serve(self.sandbox)
        arms = ("champion", "challenger")
        self.arms = {line: "holdout" if n % 10 == 9 else arms[n % 2] for n, line in enumerate(world.line_id.tolist())}
        self.sandbox.group(self.arms)
        self.pools = {arm: g["now"] for arm, g in self.sandbox.sampled()["groups"].items()}

    @property
    def job(self) -> dict[str, Any]:
        said = {
            "kind": "google_ads", "customer_id": "1234567890", "endpoint": self.server.url, "token_env": "ADS_TOKEN",
            "user_email": "signalbox@example.com", "history_delay_s": 0.0, "stale_reads_s": 0.0, "timeout_s": 10.0,
            "bulk_read": 10, "bulk_write": 3,
        }  # fmt: skip
        return {"connector": said, "environ": {}}

    def rows(self, rng: random.Random) -> tuple[list[Row], dict[str, int] | None]:
        stands = self.values()
        out = []
        for arm in sorted(set(self.arms.values())):
            lines = sorted(line for line in stands if self.arms[line] == arm)
            if len(lines) % 2:  # the same one is left out each time
                alone = lines.pop()
                out.append(Row(alone, stands[alone], stands[alone], arm))
            rng.shuffle(lines)
            for one, other in zip(lines[::2], lines[1::2], strict=True):
                # What one gives, another gets: the pool is as full after it as before
                step = (
                    0
                    if arm == "holdout"
                    else max(1, stands[one] // 10_000 * rng.randint(500, 3_000) // 10_000) * 10_000
                )
                out += [
                    Row(one, stands[one], stands[one] - step, arm),
                    Row(other, stands[other], stands[other] + step, arm),
                ]
        return out, dict(self.pools)

    def values(self) -> dict[str, int]:
        return self.sandbox.amounts()

    def applied(self) -> list[tuple[str, int]]:
        return self.sandbox.log[:]

    def hold(self, rng: random.Random, *, answer: bool, late_s: float) -> None:
        self.sandbox.held = [0.15] * 4 if answer else []
        self.sandbox.late = [late_s] if late_s else []

    def settled(self) -> None:
        self.sandbox.held, self.sandbox.late = [], []
        until = time.monotonic() + 20
        while self.sandbox.under_way and time.monotonic() < until:
            time.sleep(0.02)

    def over(self) -> dict[str, int]:
        most = {arm: g["most"] for arm, g in self.sandbox.sampled()["groups"].items()}
        return {arm: most[arm] - pool for arm, pool in self.pools.items() if most[arm] > pool}

    def close(self) -> None:
        self.server.close()
        self.sandbox.close()


class Desk:
    """django-helpdesk itself, in a process of its own: neither key nor condition."""

    once = False
    name = "helpdesk"

    def __init__(self, folder: Path, templates: Path, tickets: int = 30) -> None:
        self.sandbox = HelpdeskSandbox(
            folder, helpdesks.world(), next_day=helpdesks.OPENED, token=TOKEN, templates=templates
        ).start()
        open_ = [name for name, ticket in self.sandbox.tickets().items() if ticket["status"] in (1, 2)]
        self.tickets = open_[-tickets:]
        self._late_s = 0.0
        self._log: list[tuple[str, int]] = []

    @property
    def job(self) -> dict[str, Any]:
        said = {"kind": "helpdesk", "url": self.sandbox.api_url, "token_env": "DESK_TOKEN", "key": "T{id:07d}"}
        return {"connector": {**said, "timeout_s": 10.0, "bulk_read": 10}, "environ": {}}

    def rows(self, rng: random.Random) -> tuple[list[Row], dict[str, int] | None]:
        stands = self.values()
        return [Row(t, stands[t], (stands[t] + rng.randint(0, 3)) % 5 + 1) for t in self.tickets], None

    def values(self) -> dict[str, int]:
        found = self.sandbox.tickets()
        return {t: found[t]["priority"] for t in self.tickets}

    def applied(self) -> list[tuple[str, int]]:
        return self._log + [(a["ticket"], a["value"]) for a in self.sandbox.applications()]

    def hold(self, rng: random.Random, *, answer: bool, late_s: float) -> None:
        if answer:
            self.sandbox.fault("delay_after", method="PATCH", times=4, seconds=0.15)
        if late_s:
            self.sandbox.fault("delay_before", method="PATCH", times=1, seconds=late_s)
        self._late_s = max(self._late_s, late_s)

    def settled(self) -> None:
        time.sleep(0.2 + self._late_s)
        seen = -1
        while seen != (seen := len(self.applied())):
            time.sleep(0.2)
        self._log, self._late_s = self.applied(), 0.0
        self.sandbox.reset()

    def over(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.sandbox.stop()


class Tables:
    """A table with compare-and-set, and a trigger that writes down every change: exactly once can be asked of it."""

    once = True
    name = "sql_table"

    def __init__(self, url: str, rows: int = 40) -> None:
        self.url = url
        self.engine = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg2://"))
        with self.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE budgets (line TEXT PRIMARY KEY, amount BIGINT NOT NULL)")
            kind = "BIGSERIAL" if self.engine.dialect.name == "postgresql" else "INTEGER"
            connection.exec_driver_sql(f"CREATE TABLE log (n {kind} PRIMARY KEY, line TEXT, was BIGINT, amount BIGINT)")
            note = "INSERT INTO log (line, was, amount) VALUES (NEW.line, OLD.amount, NEW.amount);"
            if self.engine.dialect.name == "postgresql":
                connection.exec_driver_sql(
                    f"CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {note} RETURN NEW; END $$"
                )
                connection.exec_driver_sql(
                    "CREATE TRIGGER note AFTER UPDATE ON budgets FOR EACH ROW EXECUTE FUNCTION note()"
                )
            else:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                connection.exec_driver_sql(f"CREATE TRIGGER note AFTER UPDATE ON budgets BEGIN {note} END")
            for n in range(rows):
                connection.exec_driver_sql(f"INSERT INTO budgets VALUES ('line-{n}', {100 + n})")

    @property
    def job(self) -> dict[str, Any]:
        said = {"kind": "sql_table", "url_env": "TABLE_URL", "table": "budgets", "key": "line", "value": "amount"}
        return {"connector": {**said, "bulk": 3, "lag_s": 0.01}, "environ": {"TABLE_URL": self.url}}

    def rows(self, rng: random.Random) -> tuple[list[Row], dict[str, int] | None]:
        return [Row(line, stands, stands + rng.randint(1, 50)) for line, stands in self.values().items()], None

    def values(self) -> dict[str, int]:
        with self.engine.connect() as connection:
            return {line: amount for line, amount in connection.exec_driver_sql("SELECT * FROM budgets")}

    def applied(self) -> list[tuple[str, int]]:
        with self.engine.connect() as connection:
            return [
                (line, value) for line, value in connection.exec_driver_sql("SELECT line, amount FROM log ORDER BY n")
            ]

    def hold(self, rng: random.Random, *, answer: bool, late_s: float) -> None:
        """Nothing to hold: the child's own way to it takes its time."""

    def settled(self) -> None:
        """What a dead process had not committed is gone; PostgreSQL may still be at a last commit."""
        time.sleep(0.1)

    def over(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.engine.dispose()


# --- killing


@dataclass
class Kill:
    """One SIGKILL that met a living process."""

    what: str
    """push or rollback."""
    plan: str
    """opening: any time from the fork on; instant: any time from the push's begin on; applied: as soon as the system had
    carried out so many writes more."""
    drawn: float
    after_s: float
    """From the fork."""
    at: datetime
    applied: int
    """Writes carried out by then, by this push's processes."""
    phase: str = ""
    written: frozenset[str] = frozenset()
    """Entities that had been written to by then."""
    unacknowledged: int = 0
    """Of those, how many were not yet proven in the ledger."""


@dataclass
class Tally:
    """What many kills came to."""

    kills: list[Kill] = field(default_factory=list)
    repeated: int = 0
    """Writes of a value that had been applied already."""
    counted: int = 0
    """Those that the ledger knows of."""
    batches: int = 0
    deliveries: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.kills + other.kills, self.repeated + other.repeated, self.counted + other.counted,
            self.batches + other.batches, self.deliveries + other.deliveries,
        )  # fmt: skip

    def __str__(self) -> str:
        by = Counter((k.what, k.phase) for k in self.kills)
        phases = "; ".join(f"{what}: {phase} {count}" for (what, phase), count in sorted(by.items()))
        between = sum(k.unacknowledged > 0 for k in self.kills)
        return (
            f"{len(self.kills)} kills over {self.batches} batches, {self.deliveries} deliveries ({phases}; {between} between "
            f"a write and its acknowledgement); {self.repeated} repeated equal writes ({self.counted} in the ledger)"
        )


class Lost(AssertionError):
    """What must hold after every crash does not."""


class CrashHarness:
    """Pushes and rollbacks over one downstream system and one ledger, ended over and over at drawn instants."""

    def __init__(self, prepared: Prepared, downstream: Downstream, ledger_url: str, seed: int) -> None:
        self.prepared, self.downstream, self.url, self.seed = prepared, downstream, ledger_url, seed
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.batches = 0
        self._complete = False
        self._why: Any = None
        self.kills: list[Kill] = []
        """Of the batch at hand, for the words of a failure."""
        with Ledger.open(ledger_url, key=KEY):
            pass

    def round(self, pushes: int, rollbacks: int) -> None:
        """A batch, pushed through so many kills until it is complete and then rolled back through so many more."""
        batch_id, rows = self.record()
        base = len(self.downstream.applied())
        kills = self._until_complete("push", batch_id, pushes, base, {r.entity: r.after for r in rows}, late=True)
        self.downstream.settled()
        self.check(batch_id, rows, base, kills, after=True)
        base = len(self.downstream.applied())
        kills = self._until_complete("rollback", batch_id, rollbacks, base, {r.entity: r.before for r in rows})
        self.downstream.settled()
        self.check(rollback_id(batch_id), rows, base, kills, after=False)

    def abandoned(self, rollbacks: int) -> None:
        """A batch whose push is killed once in the middle and then rolled back, through so many more kills."""
        batch_id, rows = self.record()
        before = len(self.downstream.applied())
        changed = {r.entity: r.after for r in rows if r.before != r.after}
        kill = None
        while kill is None and self._ledger(lambda ledger: ledger.batch(batch_id)).delivery != "COMPLETE":
            kill = self._life("push", batch_id, ("applied", self.rng.randint(1, len(changed) // 2)), before, changed)
        kills = [kill] if kill is not None else []
        self.kills += kills
        goal = {r.entity: r.before for r in rows}
        kills += self._until_complete("rollback", batch_id, rollbacks, before, goal)
        self.downstream.settled()
        self._stands(goal)
        self._ledger_is_whole(kills)
        states = self._ledger(lambda ledger: [d.state for d in ledger.deliveries(batch_id)])
        self._must(set(states) <= FINAL, f"not every delivery of {batch_id} is over: {Counter(states)}")
        tried = self._ledger(
            lambda ledger: Counter(
                (d.entity, a.value)
                for one in (batch_id, rollback_id(batch_id))
                for d in ledger.deliveries(one)
                for a in ledger.attempts(one, d.n)
            )
        )
        self._no_more_than(tried, before)
        self.tally.batches += 2
        self.tally.deliveries += len(states)

    def between(self, pushes: int, rollbacks: int) -> None:
        """What lies between batches, every step through kills.

        A day is sent, whole or in part, and decided anew: what the first batch changed and the second leaves alone goes back.
        Another workflow, which knows of none of it, meets conflicts. The next day is decided; the first is taken back before
        it is sent, and so it never is. The first day is decided once more as at first, sent, and taken back.
        """
        was = self.downstream.values()
        base = len(self.downstream.applied())
        day, as_of = self._next_day(), utc_now()
        (first, pools), (second, _) = (self.downstream.rows(self.rng) for _ in range(2))
        alone = self.rng.choice(sorted({r.arm for r in second} - {"holdout"}))
        second = [
            replace(r, after=r.before) if (r.arm == alone if pools else self.rng.random() < 0.4) else r for r in second
        ]
        x, y, z, theirs = (f"batch-{self.batches}-{name}" for name in ("x", "y", "z", "theirs"))
        self._record(x, first, day=day, pools=pools, as_of=as_of)
        goal = {r.entity: r.after for r in first}
        if self.rng.random() < 0.5:
            self._until_complete("push", x, pushes, base, goal)
        else:
            self._life("push", x, ("applied", self.rng.randint(1, 3)), base, goal)
        self.downstream.settled()
        self._record(y, second, day=day, pools=pools, as_of=as_of)
        goal = {r.entity: r.after for r in second}
        kills = self._until_complete("push", y, pushes, base, goal)
        self.downstream.settled()
        self._stands(goal)

        stale = [
            Row(r.entity, r.before, r.before + (2 if r.after == r.before + 1 else 1))
            for r in second
            if r.before != r.after
        ]
        self._record(theirs, stale, day=day, pools=None, as_of=as_of, workflow="another")
        kills += self._until_complete("push", theirs, 1, base, {})
        self._stands(goal)
        states = self._ledger(lambda ledger: Counter(d.state for d in ledger.deliveries(theirs)))
        self._must(states == {"CONFLICT": len(stale)}, f"{theirs}, of another workflow, ended as {dict(states)}")

        third, pools = self.downstream.rows(self.rng)
        self._record(z, third, day=self._next_day(), pools=pools, as_of=utc_now())
        for taken in (y, x):
            kills += self._until_complete("rollback", taken, rollbacks, base, was)
        self.downstream.settled()
        self._stands(was)
        kills += self._until_complete("push", z, 1, base, was)
        self._stands(was)
        states = self._ledger(lambda ledger: Counter(d.state for d in ledger.deliveries(z)))
        self._must(set(states) <= {"SKIPPED"}, f"{z}, decided before a rollback, ended as {dict(states)}")

        again = [z]
        self._record(z, third, day=date(2026, 3, 1) + timedelta(days=self.batches), pools=pools, as_of=as_of)
        again.append(f"{z}.2")
        kills += self._until_complete("push", z, pushes, base, {r.entity: r.after for r in third})
        self.downstream.settled()
        self._stands({r.entity: r.after for r in third})
        kills += self._until_complete("rollback", f"{z}.2", rollbacks, base, was)
        self.downstream.settled()
        self._stands(was)
        every = [x, y, theirs, *again]
        tried, deliveries = self._ledger(
            lambda ledger: (
                Counter(
                    (d.entity, a.value)
                    for one in [*every, *(rollback_id(b) for b in (x, y, f"{z}.2"))]
                    for d in ledger.deliveries(one)
                    for a in ledger.attempts(one, d.n)
                ),
                [d.state for one in every for d in ledger.deliveries(one)],
            )
        )
        self._must(set(deliveries) <= FINAL, f"not every delivery is over: {Counter(deliveries)}")
        applied = Counter(self.downstream.applied()[base:])
        self._must(applied <= tried, f"applied without having been written down before: {applied - tried}")
        over = self.downstream.over()
        self._must(not over, f"the live total was over the pool: {over}")
        self._ledger_is_whole(kills)
        self.tally.batches += 7
        self.tally.deliveries += len(deliveries)

    # --- steps

    def record(self) -> tuple[str, list[Row]]:
        day = self._next_day()
        rows, pools = self.downstream.rows(self.rng)
        batch_id = f"batch-{self.batches}"
        self._record(batch_id, rows, day=day, pools=pools, as_of=utc_now())
        return batch_id, rows

    def _next_day(self) -> date:
        self.batches += 1
        self.kills = []
        return date(2026, 3, 1) + timedelta(days=self.batches)

    def _record(self, batch_id: str, rows: Sequence[Row], *, workflow: str = "crashes", **said: Any) -> None:
        told = [{"entity": r.entity, "before": r.before, "after": r.after, "arm": r.arm} for r in rows]
        self._ledger(lambda ledger: fakes.record(ledger, told, batch_id, workflow=workflow, **said))

    def job(self, what: str, batch_id: str) -> dict[str, Any]:
        return {
            "do": what, "ledger": self.url, "batch": batch_id, "seed": self.rng.randrange(2**32), "settings": SETTINGS,
            **self.downstream.job,
        }  # fmt: skip

    def _until_complete(
        self, what: str, batch_id: str, most: int, base: int, goal: Mapping[str, int], late: bool = False
    ) -> list[Kill]:
        kills: list[Kill] = []
        for _ in range(most + 30):
            plan = self._plan(late) if len(kills) < most else None
            kill = self._life(what, batch_id, plan, base, goal)
            if kill is not None:
                kills.append(kill)
                self.kills.append(kill)
            elif self._complete:
                return kills
        self._must(False, f"{what} of {batch_id} does not come to an end: {self._why}")
        return kills

    def _plan(self, late: bool) -> tuple[str, float]:
        kind = self.rng.choices(("opening", "instant", "applied"), (1, 4, 5))[0]
        most = {"opening": 0.15, "instant": 0.9}
        drawn = self.rng.randint(1, 3) if kind == "applied" else self.rng.uniform(0, most[kind])
        # Now and then a write arrives later than anybody believes: it comes twice, and must have been counted.
        is_late = late and not self.downstream.once and self.rng.random() < 0.15
        self.downstream.hold(
            self.rng, answer=kind == "applied" and not is_late, late_s=SETTINGS["late_s"] * 5 if is_late else 0.0
        )
        return kind, drawn

    def _life(
        self, what: str, batch_id: str, plan: tuple[str, float] | None, base: int, goal: Mapping[str, int]
    ) -> Kill | None:
        """One process: None where it came to its own end."""
        life = self.prepared.start(self.job(what, batch_id))
        if plan is not None:
            self._wait(life, *plan)
            at, after_s = utc_now(), time.monotonic() - life.started
            life.kill()
        self._must(life.wait(PATIENCE_S), f"{what} of {batch_id} did not end in {PATIENCE_S:g} s")
        if life.signal:
            assert plan is not None
            self._must(life.signal == signal.SIGKILL, f"{what} of {batch_id} ended by signal {life.signal}")
            applied = self.downstream.applied()[base:]
            stands = self.downstream.values()
            done = all(stands[entity] == value for entity, value in goal.items())
            phase = "after the last write" if done else "in the middle" if applied else "before the first write"
            return Kill(
                what, *plan, after_s, at, len(applied), phase,
                frozenset(entity for entity, value in applied if value == goal.get(entity)),
            )  # fmt: skip
        self._must(
            "error" not in life.result, f"{what} of {batch_id}: {life.result.get('says')}\n{life.result.get('trace')}"
        )
        self._must("report" in life.result, f"{what} of {batch_id} ended without a word")
        report = life.result["report"]
        self._complete, self._why = bool(report["complete"]), report.get("why") or report
        return None

    def _wait(self, life: Life, kind: str, drawn: float) -> None:
        if kind == "opening":
            life.wait(drawn)
            return
        life.wait(PATIENCE_S, lambda one: one.begun is not None)
        if kind == "instant":
            life.wait(drawn)
            return
        base = len(self.downstream.applied())
        until = time.monotonic() + PATIENCE_S
        while not life.ended and len(self.downstream.applied()) < base + drawn and time.monotonic() < until:
            life.wait(0.002)

    # --- what must hold

    def _must(self, holds: bool, what: str) -> None:
        if not holds:
            killed = ", ".join(f"{k.what} {k.plan} {k.drawn:.3g} ({k.phase})" for k in self.kills) or "not at all"
            raise Lost(f"{self.downstream.name}, {self.url.split(':')[0]}, seed {self.seed}: {what}\nkilled: {killed}")

    def _ledger(self, ask: Callable[[Ledger], Any]) -> Any:
        """Opened for a moment only, so that no other process keeps alive what a dead one left behind."""
        with Ledger.open(self.url, key=KEY) as ledger:
            return ask(ledger)

    def _stands(self, goal: Mapping[str, int]) -> None:
        stands = self.downstream.values()
        wrong = {e: (stands.get(e), value) for e, value in goal.items() if stands.get(e) != value}
        self._must(not wrong, f"downstream is not what was intended (is, intended): {wrong}")

    def _no_more_than(self, tried: Counter[tuple[str, int]], base: int) -> Counter[tuple[str, int]]:
        applied = Counter(self.downstream.applied()[base:])
        self._must(applied <= tried, f"applied without having been written down before: {applied - tried}")
        if self.downstream.once:
            twice = {e: n for e, n in applied.items() if n > 1}
            self._must(not twice, f"applied twice: {twice}")
        over = self.downstream.over()
        self._must(not over, f"the live total was over the pool: {over}")
        return applied

    def check(self, batch_id: str, rows: Sequence[Row], base: int, kills: Sequence[Kill], *, after: bool) -> None:
        goal = {r.entity: r.after if after else r.before for r in rows}
        changed = {r.entity for r in rows if r.before != r.after}
        self._stands(goal)
        deliveries, tried = self._ledger(
            lambda ledger: (ledger.deliveries(batch_id), Counter(a.n for a in ledger.attempts(batch_id)))
        )
        states = Counter(d.state for d in deliveries)
        self._must(states == {"ACKED": len(changed)}, f"{batch_id} ended as {dict(states)}")
        self._must({d.entity for d in deliveries} == changed, f"{batch_id}: a decision is lost")
        attempts = Counter({(d.entity, goal[d.entity]): tried[d.n] for d in deliveries})
        applied = self._no_more_than(attempts, base)
        never = changed - {entity for entity, _ in applied}
        self._must(not never, f"proven, and never applied: {sorted(never)}")
        repeats = {d.entity: d.repeats for d in deliveries}
        missed = {e: (n - 1, repeats[e]) for (e, _), n in applied.items() if n - 1 > repeats[e]}
        self._must(not missed, f"repeated equal writes (applied, counted): {missed}")
        proven = {d.entity: d.verified_at for d in deliveries}
        for kill in kills:
            kill.unacknowledged = sum(proven[e] is None or proven[e] > kill.at for e in kill.written)
        self.tally.repeated += sum(applied.values()) - len(changed)
        self.tally.counted += sum(d.repeats for d in deliveries)
        self.tally.deliveries += len(changed)
        self.tally.batches += 1
        self._ledger_is_whole(kills)

    def _ledger_is_whole(self, kills: Sequence[Kill]) -> None:
        self.tally.kills += kills
        verdict = self._ledger(lambda ledger: ledger.verify())
        self._must(verdict.ok, f"the ledger does not verify: {verdict.problems}")
        with closing(connect(self.downstream.job["connector"], self.downstream.job["environ"])) as connector:
            system = connector.system
        self._ledger(lambda ledger: ledger.release(ledger.lease(system)))  # Busy if anything blocked it


# --- the soak


@contextmanager
def systems(folder: Path, database: Callable[[str], str]) -> Iterator[list[tuple[str, Downstream, str]]]:
    """Every system over every ledger: (name, system, the ledger's URL)."""
    with ExitStack() as stack:
        found: list[tuple[str, Downstream, str]] = []
        for kind in ("sqlite", "postgres"):
            for name in ("google_ads", "helpdesk", "sql_table"):
                own = folder / f"{name}-{kind}"
                own.mkdir()
                url = f"sqlite:///{own / 'ledger.db'}" if kind == "sqlite" else database(f"ledger_{name}")
                made: Any
                if name == "google_ads":
                    made = Ads(own / "ads")
                elif name == "helpdesk":
                    made = Desk(own / "desk", folder / "templates")
                else:
                    made = Tables(f"sqlite:///{own / 'table.db'}" if kind == "sqlite" else database("tables"))
                stack.callback(made.close)
                found.append((f"{name} over {kind}", made, url))
        yield found


def soak(kills: int, seed: int) -> int:
    """At least so many kills over every connector and database; returns how many, raises Lost."""
    from tests.support import postgres

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="signalbox-crash-")))
        server = stack.enter_context(postgres.started())
        os.environ["PGPASSWORD"] = postgres.PASSWORD
        prepared = stack.enter_context(Prepared())
        found = stack.enter_context(systems(folder, server.database))
        all_of = [(name, CrashHarness(prepared, made, url, seed + n)) for n, (name, made, url) in enumerate(found)]
        began = time.monotonic()
        while sum(len(one.tally.kills) for _, one in all_of) < kills:
            for name, one in all_of:
                one.round(8, 5)
                one.abandoned(3)
                one.between(3, 3)
                print(f"{time.monotonic() - began:6.0f} s  {name}: {one.tally}", flush=True)
        total = sum((one.tally for _, one in all_of), Tally())
        print(f"in all, seed {seed}, {time.monotonic() - began:.0f} s: {total}")
        return len(total.kills)


if __name__ == "__main__":
    options = argparse.ArgumentParser(prog="python -m tests.support.crashing")
    options.add_argument("--kills", type=int, default=300, help="at least so many")
    options.add_argument("--seed", type=int, default=int(time.time()))
    options.add_argument("--fork", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.fork:
        forking()
    else:
        soak(chosen.kills, chosen.seed)
