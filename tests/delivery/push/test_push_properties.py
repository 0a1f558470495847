"""The push under everything at once: random faults, people, crashes at any instant, restarts, newer batches, a kill switch.

Checked after each step: never a false ACKED, people's values never overwritten under a condition and every overwrite listed
where there is a history, no decision lost, the live total never over a pool, each write applied once where the system has a
key or a condition and every repeat counted where not, no older batch over a newer one, and the ledger verifies.
``SIGNALBOX_SOAK`` multiplies how many histories are tried (``tests.support.properties``).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from delivery.connectors.base import Capabilities
from delivery.ledger import OPEN, Ledger, Result
from delivery.push import PushSettings, Report, Stopped, push
from tests.support.fakes import DAY, Clock, Crash, FakeSystem, Mortal, Process, dead_holder, record
from tests.support.properties import examples

KEYS = ("a", "b", "c", "d", "e")
ARMS = {"a": "x", "b": "x", "c": "x", "d": "y", "e": "y"}
APPLY = (
    "ignore", "clamp", "refuse", "not_applied", "slow_down", "unknown_applied", "unknown_lost", "late", "conflict",
    "crash_before", "crash_after", "person", "touch", "end",
)  # fmt: skip
READ = ("unavailable", "slow_down", "crash_before", "left_out")
CALLS = ("begin", "settle", "open_push", "close_push", "acknowledged", "supersede", "release", "deliveries")
SETTINGS = PushSettings(
    concurrency=2, wave=3, attempts=3, patience_s=10, backoff_s=(0.2, 2.0), late_s=2.0, breaker_failures=4
)
_EMPTY: list[Path] = []


def empty() -> Path:
    """An empty ledger, made once."""
    if not _EMPTY:
        path = Path(tempfile.mkdtemp(prefix="signalbox-empty-")) / "ledger.db"
        Ledger.open(f"sqlite:///{path}", key=b"k" * 32).close()
        _EMPTY.append(path)
    return _EMPTY[0]


class Machine(RuleBasedStateMachine):
    """One downstream system, one ledger, several days."""

    @initialize(
        can=st.sampled_from(
            [
                Capabilities(conditional_write=True),
                Capabilities(conditional_write=True, bulk_read=3, bulk_write=2),
                Capabilities(idempotency_key=True),
                Capabilities(idempotency_key=True, conditional_write=True, change_history=True),
                Capabilities(change_history=True),
                Capabilities(change_history=True, bulk_read=5),
                Capabilities(bulk_read=5, bulk_write=5),
                Capabilities(stale_reads_s=1.5, conditional_write=True),
                Capabilities(stale_reads_s=1.5, bulk_read=2),
            ]
        ),
        money=st.booleans(),
        values=st.lists(st.integers(10, 90), min_size=5, max_size=5),
    )
    def begin(self, can: Capabilities, money: bool, values: list[int]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="signalbox-push-"))
        shutil.copy(empty(), self.folder / "ledger.db")
        self.clock = Clock()
        self.ledger = Ledger.open(f"sqlite:///{self.folder / 'ledger.db'}", key=b"k" * 32, clock=self.clock)
        start = dict(zip(KEYS, values, strict=True))
        pools = {arm: sum(start[k] for k in KEYS if ARMS[k] == arm) for arm in ("x", "y")} if money else {}
        self.fake = FakeSystem(start, can=can, clock=self.clock, arms=ARMS, pools=pools)
        self.can, self.pools, self.money = can, pools, money
        self.days = self.pushes = self.unique = 0
        self.batches: list[str] = []
        self.decide([20, 30, 40, 50, 60])

    @rule(after=st.lists(st.integers(1, 99), min_size=5, max_size=5))
    def decide(self, after: list[int]) -> None:
        """A new day is decided from what stands downstream now."""
        if len(self.batches) >= 3:
            return
        self.days += 1
        self.clock.sleep(60)  # an export is not younger than the last push by less than the system's own delay
        rows: list[dict[str, Any]] = []
        room = {arm: pool - self.fake.live(arm) for arm, pool in self.pools.items()}
        for gain, (key, value) in enumerate(zip(KEYS, after, strict=True)):
            before = self.fake.value(key) or 0
            if self.money and value > before:
                value = before + max(0, min(value - before, room[ARMS[key]]))
            if self.money:
                room[ARMS[key]] -= value - before
            rows.append({"entity": key, "before": before, "after": value, "arm": ARMS[key], "gain": float(gain)})
        batch_id = f"b{self.days}"
        record(
            self.ledger, rows, batch_id, day=DAY + timedelta(days=self.days), pools=self.pools if self.money else None,
            as_of=self.clock(),
        )  # fmt: skip
        self.batches.append(batch_id)

    @rule(key=st.sampled_from(KEYS))
    def person(self, key: str) -> None:
        """Somebody sets a value that nobody else ever sets."""
        self.unique += 1
        self.fake.person(key, 1000 + self.unique)

    @rule(key=st.sampled_from(KEYS))
    def touch(self, key: str) -> None:
        self.fake.touch(key)

    @rule(seconds=st.sampled_from([1.0, 5.0, 3600.0]))
    def wait(self, seconds: float) -> None:
        self.clock.sleep(seconds)

    @rule(stopped=st.booleans())
    def switch(self, stopped: bool) -> None:
        self.ledger.switch("ad_budget", stopped, "zoe", "a reason")

    @rule(
        which=st.integers(0, 2),
        apply=st.lists(st.sampled_from(("", "", *APPLY)), max_size=8),
        read=st.lists(st.sampled_from(("", "", "", *READ)), max_size=8),
        crash=st.one_of(st.none(), st.tuples(st.sampled_from(CALLS), st.integers(1, 3), st.booleans())),
        jump=st.sampled_from([0, 0, 0, -1800, 1800]),
    )
    def send(self, which: int, apply: list[str], read: list[str], crash: Any, jump: int) -> None:
        """A process pushes one of the batches while all that goes wrong."""
        left = {"apply": list(apply), "read": list(read)}

        def fault(op: str, key: str) -> Any:
            kind = left[op].pop(0) if left.get(op) else ""
            if kind == "person":
                self.person(key)
                return ""
            if kind == "touch":
                self.fake.touch(key)
                return ""
            if kind == "end":
                self.fake.end(key, "closed")
                return ""
            if op == "apply" and kind == "late":
                self.fake.late_s = 1.0
            return kind

        calls: Counter[str] = Counter()

        def dies(method: str) -> Any:
            calls[method] += 1
            if crash is None or crash[0] != method or calls[method] != crash[1]:
                return ""
            return "crash_before" if crash[2] else "crash_after"

        self.fake.fault = fault
        batch_id = self.batches[which % len(self.batches)]
        with contextlib.suppress(Crash, Stopped):
            self.push(batch_id, dies, lambda p: self.clock.jump(jump) if jump and p.done == 1 else None)
        self.fake.fault = lambda op, key: ""

    def push(self, batch_id: str, dies: Any = lambda method: "", progress: Any = None) -> Report:
        self.pushes += 1
        self.fake.process = Process()
        seen = Watched(self, Mortal(self.ledger, self.fake.process, dies))
        return push(
            seen, self.fake, batch_id, settings=SETTINGS, run_id="run", clock=self.clock, sleep=self.clock.sleep,  # type: ignore[arg-type]
            monotonic=self.clock.monotonic, rng=random.Random(self.pushes), progress=progress, holder=dead_holder(self.pushes),
        )  # fmt: skip

    def settled(self, results: Sequence[Result], batch_id: str) -> None:
        """At the moment when it is written down that a value is there, it is there."""
        names = {d.n: str(d.entity) for d in self.ledger.deliveries(batch_id)}
        for result in results:
            if result.state in ("ACKED", "OVERWRITTEN"):
                now = self.fake.value(names[result.n])
                told = result.observed if result.state == "ACKED" else result.sent
                changed_since = now is not None and now >= 1000 and now in self.people()
                assert now == told or changed_since, f"{names[result.n]}: {result.state} {told}, and {now} stands there"

    def people(self) -> set[int]:
        return set(range(1001, 1001 + self.unique))

    @invariant()
    @precondition(lambda self: hasattr(self, "ledger"))
    def nothing_is_broken(self) -> None:
        fake = self.fake
        listed = " ".join(
            f"{d.state} {d.observed} {d.says}" for b in self.batches for d in self.ledger.deliveries(b)
            if d.state not in OPEN
        )  # fmt: skip
        waiting = any(d.state in OPEN for b in self.batches for d in self.ledger.deliveries(b))
        if self.can.conditional_write:
            assert not fake.lost, f"a person's value was overwritten under a condition: {fake.lost}"
        elif self.can.change_history and not waiting:
            for lost in fake.lost:
                assert str(lost.before) in listed, f"{lost} is not reported in: {listed}"
        decided = {
            (b, str(r["entity_id"])): r["before"] for b in self.batches for r in self.ledger.decisions(b).to_pylist()
        }
        order_of = {w.idempotency_key: w.batch_id for w in fake.writes}
        for one in fake.applied:
            if one.before in self.people() and one not in fake.lost:
                assert one.before == decided[order_of[one.key], one.target], (
                    f"a person's value was read and overwritten: {one}"
                )
        assert all(over <= 0 for _, over in fake.overs), fake.overs
        times = Counter(a.key for a in fake.applied)
        if self.can.conditional_write or self.can.idempotency_key:
            assert not [k for k, n in times.items() if n > 1], "applied twice"
        elif not waiting:
            counted = sum(d.repeats for b in self.batches for d in self.ledger.deliveries(b))
            assert counted >= sum(n - 1 for n in times.values()), "a repeated write was not counted"
        order = {a.idempotency_key: self.batches.index(a.batch_id) for a in fake.writes}
        for key in KEYS:
            of = [order[str(a.key)] for a in fake.applied if a.target == key]
            assert of == sorted(of), f"{key}: an older batch wrote after a newer one"
        for batch_id in self.batches:
            row = self.ledger.batch(batch_id)
            # more than it changes where an older batch, sent after this one was decided, is taken back
            assert sum(row.counts.values()) == len(self.ledger.deliveries(batch_id)) >= row.changed

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        try:
            self.ledger.switch("ad_budget", False, "zoe", "the end")
            self.clock.sleep(3600)
            for batch_id in self.batches:
                report = self.push(batch_id)
                assert report.complete and not set(report.counts) & OPEN, report
            self.fake.settle()
            self.nothing_is_broken()
            verdict = self.ledger.verify()
            assert verdict.ok, verdict.problems
        finally:
            self.ledger.close()
            shutil.rmtree(self.folder)


class Watched:
    """A ledger that tells the machine what is settled."""

    def __init__(self, machine: Machine, ledger: Mortal) -> None:
        self._machine, self._ledger = machine, ledger

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ledger, name)
        if name != "settle":
            return found

        def settle(lease: Any, batch_id: str, results: Sequence[Result]) -> None:
            self._machine.settled(results, batch_id)
            found(lease, batch_id, results)

        return settle


TestPush = Machine.TestCase
TestPush.settings = settings(
    max_examples=examples(25),
    stateful_step_count=8,
    suppress_health_check=list(HealthCheck),
    # Shrinking takes minutes here; a failure names its steps as they are. SIGNALBOX_SHRINK=1 turns it on.
    phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if "SIGNALBOX_SHRINK" in os.environ else [])],
)
