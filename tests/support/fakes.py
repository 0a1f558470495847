"""A downstream system in memory with switchable capabilities and faults, a clock that only sleeping moves, and processes
that die where they are told to.

Belongs here: what the tests of push and rollback stand on. Does not: real protocols (``tests/support/liars.py``).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, Literal

import pyarrow as pa

from delivery.connectors.base import Capabilities, Change, EntityState, Reading, Unavailable, Write, Written
from delivery.ledger import BatchRow, Holder, Ledger, NewBatch
from delivery.ledger.leases import this_host

START = datetime(2026, 3, 2, 4, 0)
DAY = date(2026, 3, 1)


class Crash(BaseException):
    """The process is killed at this instant; nothing of it runs any more."""


class Clock:
    """Wall and monotonic time that only ``sleep`` moves; ``jump`` sets the wall clock alone."""

    def __init__(self, now: datetime = START) -> None:
        self._lock = threading.Lock()
        self._now, self._at = now, 1000.0

    def __call__(self) -> datetime:
        with self._lock:
            return self._now

    def monotonic(self) -> float:
        with self._lock:
            return self._at

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._at += seconds
            self._now += timedelta(seconds=seconds)

    def jump(self, seconds: float) -> None:
        with self._lock:
            self._now += timedelta(seconds=seconds)


class Process:
    """Something that can die: everything that goes through it raises Crash from then on."""

    def __init__(self) -> None:
        self.dead = False

    def check(self) -> None:
        if self.dead:
            raise Crash

    def die(self) -> None:
        self.dead = True
        raise Crash


Fault = Literal[
    "", "ignore", "clamp", "refuse", "not_applied", "unknown_applied", "unknown_lost", "late", "conflict",
    "crash_before", "crash_after", "unavailable", "left_out", "slow_down", "broken",
]  # fmt: skip


@dataclass
class Target:
    """What holds a value."""

    value: int | None
    version: int = 0
    state: EntityState = "open"
    past: list[tuple[float, int | None, int]] = field(default_factory=list)
    """(monotonic, value, version), oldest first: what stale reads show."""


@dataclass(frozen=True)
class Applied:
    """One write that changed (or set again) a value."""

    target: str
    value: int
    by: str
    key: str | None
    before: int | None


class FakeSystem:
    """An in-memory ``Connector``. ``fault(op, key)`` is asked at every call for every entity and says what goes wrong.

    ``applied`` lists the writes that took effect. ``overs``: how far each write of ours left an arm above its pool, beyond what
    people had raised themselves. ``lost``: values of people that a write of ours replaced without having read them.
    """

    def __init__(
        self,
        values: Mapping[str, int | None],
        *,
        can: Capabilities | None = None,
        clock: Clock | None = None,
        targets: Mapping[str, str] | None = None,
        arms: Mapping[str, str] | None = None,
        pools: Mapping[str, int] | None = None,
        system: str = "fake",
    ) -> None:
        self.system = system
        self.can = can or Capabilities(conditional_write=True)
        self.clock = clock or Clock()
        self.target_of = {key: (targets or {}).get(key, key) for key in values}
        self.targets: dict[str, Target] = {}
        for key, value in values.items():
            self.targets.setdefault(self.target_of[key], Target(value))
        self.arms = {self.target_of[key]: arm for key, arm in (arms or {}).items()}
        self.pools = dict(pools or {})
        self.fault: Callable[[str, str], Fault] = lambda op, key: ""
        self.before_write: Callable[[str], None] = lambda key: None
        self.process = Process()
        self.late_s = 1.0
        self.applied: list[Applied] = []
        self.overs: list[tuple[str, int]] = []
        self.raised: Counter[str] = Counter()
        self.lost: list[Applied] = []
        self.calls: Counter[str] = Counter()
        self.writes: list[Write] = []
        self._changes: list[tuple[str, int | None, datetime, str]] = []
        self._keys: dict[str, Written] = {}
        self._late: list[tuple[float, Write]] = []
        self._persons: dict[str, int] = {}
        self._lock = threading.RLock()
        self.busy = self.busiest = 0

    # --- Connector

    @property
    def capabilities(self) -> Capabilities:
        return self.can

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        with self._lock:
            self.process.check()
            self._land()
            assert len(keys) <= self.can.bulk_read
            self.calls["read"] += 1
            out = {}
            for key in keys:
                match self.fault("read", key):
                    case "unavailable":
                        raise Unavailable("no answer")
                    case "slow_down":
                        raise Unavailable("too many calls", retry_after=2.0)
                    case "crash_before" | "crash_after":
                        self.process.die()
                    case "left_out":
                        continue
                    case "broken":
                        raise ZeroDivisionError("a bug in the connector")
                out[key] = self._reading(key)
            return out

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        with self._lock:
            self.process.check()
            self._land()
            assert 1 <= len(writes) <= self.can.bulk_write
            self.calls["validate" if validate_only else "apply"] += 1
            if validate_only:
                return [
                    Written(w.key, "refused" if self.fault("validate", w.key) == "refuse" else "accepted")
                    for w in writes
                ]
            return [self._one(write) for write in writes]

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        with self._lock:
            self.process.check()
            self.calls["history"] += 1
            if any(self.fault("history", key) == "unavailable" for key in keys):
                raise Unavailable("no history now")
            return [
                Change(key, value, at, actor, actor == "us")
                for target, value, at, actor in self._changes
                for key in keys
                if self.target_of.get(key) == target and at >= since
            ]

    def close(self) -> None:
        pass

    # --- people

    def person(self, key: str, value: int | None, actor: str = "anna") -> None:
        """Somebody sets a value in the system itself."""
        with self._lock:
            target = self.target_of[key]
            had = self.targets[target].value
            arm = self.arms.get(target)
            if arm is not None:
                self.raised[arm] += max(0, (value or 0) - (had or 0))
            self._set(target, value, actor)
            if value is not None:
                self._persons[target] = value

    def touch(self, key: str) -> None:
        """Somebody changes another field: a new version, the same value."""
        with self._lock:
            held = self.targets[self.target_of[key]]
            held.version += 1

    def end(self, key: str, state: EntityState) -> None:
        with self._lock:
            self.targets[self.target_of[key]].state = state

    def value(self, key: str) -> int | None:
        with self._lock:
            return self.targets[self.target_of[key]].value

    def settle(self) -> None:
        """Everything that is under way arrives."""
        with self._lock:
            self._land(everything=True)

    @property
    def counts(self) -> Counter[tuple[str, int]]:
        """How often each value was applied to each target by us."""
        return Counter((a.target, a.value) for a in self.applied if a.by == "us")

    def live(self, arm: str) -> int:
        with self._lock:
            return sum(
                t.value or 0 for name, t in self.targets.items() if self.arms.get(name) == arm and t.state != "missing"
            )

    # --- inside

    def _reading(self, key: str) -> Reading:
        target = self.target_of.get(key)
        held = None if target is None else self.targets[target]
        if target is None or held is None or held.state == "missing":
            return Reading(key, key, None, state="missing")
        value, version = held.value, held.version
        since = self.clock.monotonic() - self.can.stale_reads_s
        if self.can.stale_reads_s:
            for at, was, its in held.past:
                if at > since:
                    value, version = was, its
                    break
        token = str(version) if self.can.conditional_write else None
        return Reading(key, target, value, token, held.state, "" if value is not None else "something else")

    def _one(self, write: Write) -> Written:
        self.writes.append(write)
        self.before_write(write.key)
        match self.fault("apply", write.key):
            case "ignore":
                return Written(write.key, "accepted", "fine")
            case "refuse":
                return Written(write.key, "refused", "not allowed: too large")
            case "not_applied":
                return Written(write.key, "not_applied", "not now")
            case "slow_down":
                return Written(write.key, "not_applied", "too many calls", retry_after=3.0)
            case "conflict":
                return Written(write.key, "conflict", "changed")
            case "unknown_lost":
                return Written(write.key, "unknown", "no answer")
            case "late":
                self._late.append((self.clock.monotonic() + self.late_s, write))
                return Written(write.key, "unknown", "no answer")
            case "unknown_applied":
                self._apply(write, write.value)
                return Written(write.key, "unknown", "no answer")
            case "crash_before":
                self.process.die()
            case "crash_after":
                self._apply(write, write.value)
                self.process.die()
            case "clamp":
                return self._apply(write, write.value - write.value // 5)
            case "broken":
                self._apply(write, write.value)
                raise ZeroDivisionError("a bug in the connector")
        return self._apply(write, write.value)

    def _apply(self, write: Write, value: int) -> Written:
        if self.can.idempotency_key and write.idempotency_key in self._keys:
            return self._keys[write.idempotency_key]
        held = self.targets.get(write.target)
        if held is None or held.state == "missing":
            return Written(write.key, "refused", "no such thing")
        if held.state == "closed":
            return Written(write.key, "refused", "closed")
        if self.can.conditional_write and write.token != str(held.version):
            return Written(write.key, "conflict", "it was changed")
        before = held.value
        done = Applied(write.target, value, "us", write.idempotency_key, before)
        if (
            write.target in self._persons
            and before == self._persons[write.target]
            and before not in (write.expected, value)
        ):
            self.lost.append(done)
        self.applied.append(done)
        self._set(write.target, value, "us")
        arm = self.arms.get(write.target)
        if arm in self.pools and value > (before or 0):
            self.overs.append((arm, self.live(arm) - self.pools[arm] - self.raised[arm]))
        answer = Written(write.key, "accepted", "fine", token=str(held.version) if self.can.conditional_write else None)
        if self.can.idempotency_key:
            self._keys[write.idempotency_key] = answer
        return answer

    def _set(self, target: str, value: int | None, actor: str) -> None:
        held = self.targets[target]
        held.past.append((self.clock.monotonic(), held.value, held.version))
        held.value, held.version = value, held.version + 1
        self._changes.append((target, value, self.clock(), actor))

    def _land(self, everything: bool = False) -> None:
        now = self.clock.monotonic()
        due = [write for at, write in self._late if everything or at <= now]
        self._late = [(at, write) for at, write in self._late if not everything and at > now]
        for write in due:
            self._apply(write, write.value)


class Mortal:
    """A ledger as one process sees it: dead processes write nothing; ``fault(method)`` may kill before or after a call."""

    def __init__(self, ledger: Ledger, process: Process, fault: Callable[[str], Fault] = lambda method: "") -> None:
        self._ledger, self._process, self._fault = ledger, process, fault

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ledger, name)
        if not callable(found):
            return found

        def call(*args: Any, **named: Any) -> Any:
            self._process.check()
            fault = self._fault(name)
            if fault == "crash_before":
                self._process.die()
            answer = found(*args, **named)
            if fault == "crash_after":
                self._process.die()
            return answer

        return call


def dead_holder(number: int = 0) -> Holder:
    """A process of this host that is gone; as a push's ``holder`` it may be followed by another at once."""
    return Holder(this_host(), 2**22 + 1 + number, f"gone {number}")


def table(rows: Sequence[Mapping[str, Any]], prefix: str = "d") -> pa.Table:
    """Decisions as the stage writes them; a row needs ``entity``, ``before``, ``after``."""
    return pa.table(
        {
            "decision_id": [f"{prefix}-{n}" for n in range(len(rows))],
            "entity_id": [r["entity"] for r in rows],
            "unit": pa.array([r.get("unit", r["entity"]) for r in rows], pa.string()),
            "arm": pa.array([r.get("arm", "champion") for r in rows], pa.string()),
            "arm_probability": pa.array([1.0] * len(rows), pa.float64()),
            "perturbation": pa.array([None] * len(rows), pa.float64()),
            "perturbation_probability": pa.array([None] * len(rows), pa.float64()),
            "before": pa.array([r["before"] for r in rows], pa.int64()),
            "after": pa.array([r["after"] for r in rows], pa.int64()),
            "changed": pa.array([r["before"] != r["after"] for r in rows], pa.bool_()),
            "review": pa.array([False] * len(rows), pa.bool_()),
            "expected_gain": pa.array([r.get("gain") for r in rows], pa.float64()),
            "reasons": pa.array([["a reason"]] * len(rows), pa.list_(pa.string())),
        }
    )


def record(
    ledger: Ledger,
    rows: Sequence[Mapping[str, Any]],
    batch_id: str = "b1",
    *,
    workflow: str = "ad_budget",
    day: date = DAY,
    status: Literal["READY", "HELD", "REFUSED"] = "READY",
    kind: Literal["decision", "rollback"] = "decision",
    pools: Mapping[str, int] | None = None,
    as_of: datetime = START - timedelta(hours=1),
    reverses: str | None = None,
) -> BatchRow:
    """Record a batch of these rows."""
    new = NewBatch(
        batch_id=batch_id, workflow=workflow, kind=kind, day=day, digest=f"digest of {batch_id}", status=status,
        step="champion", as_of=as_of, decided_at=as_of, run_id="run-1", record={"model_version": 1}, pools=pools,
        reverses=reverses,
    )  # fmt: skip
    return ledger.record_batch(new, table(rows, batch_id))
