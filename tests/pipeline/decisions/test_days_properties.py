"""Whatever is run, sent again, decided anew, approved or taken back: the past stays as it was, and downstream stands what the
newest decision that may act says, or the rollback.

Belongs here: one machine over a real ledger, the fake system, and the functions that the stages, the push sensor and the
command call. Does not: Dagster (``tests/system/test_acted_days.py``), one push by itself
(``tests/delivery/push/test_push_properties.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import tempfile
from collections import Counter
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from delivery import approvals
from delivery.connectors.base import Capabilities
from delivery.ledger import OPEN, BatchRow, Ledger, NewBatch
from delivery.push import Blocked, NotApproved, PushError, PushSettings, Refused, Report, push
from delivery.rollback import Batch, RollbackError, Since, roll_back
from pipeline import dispatch
from pipeline.decisions import in_effect, recomputation, scoring
from pipeline.monitoring import verdicts
from pipeline.workflow import FOLDER, Workflow, load
from tests.support import properties
from tests.support.desks import World
from tests.support.fakes import Clock, Crash, Mortal, Process, dead_holder, table

FIRST = date(2026, 3, 2)
KEYS = ("a", "b", "c", "d")
ARMS = {"a": "champion", "b": "champion", "c": "explore", "d": "explore"}
LIMIT = 0.5
SETTINGS = PushSettings(concurrency=1, wave=2, attempts=2, patience_s=6, backoff_s=(0.2, 1.0), late_s=0.5)
MOVES = st.lists(st.sampled_from([-40, -20, 0, 0, 30]), min_size=4, max_size=4)
STATUS = st.sampled_from(["READY", "READY", "READY", "READY", "HELD", "REFUSED"])
_MADE: list[Any] = []


def made() -> tuple[Workflow, Path]:
    """The workflow, and a ledger with one approver: made once, since both take longer than a history."""
    if not _MADE:
        path = Path(tempfile.mkdtemp(prefix="signalbox-days-")) / "ledger.db"
        with Ledger.open(f"sqlite:///{path}", key=b"k" * 32) as book:
            approvals.enrol(book, "robin", "correct horse battery")
        _MADE.extend((load(FOLDER / "ad_budget"), path))
    return _MADE[0], _MADE[1]


class Days(RuleBasedStateMachine):
    """Some days of one workflow."""

    @initialize(
        can=st.sampled_from(
            [
                Capabilities(conditional_write=True, bulk_read=10),
                Capabilities(idempotency_key=True),
                Capabilities(change_history=True, bulk_read=3),
                Capabilities(),
            ]
        )
    )
    def begin(self, can: Capabilities) -> None:
        self.workflow, empty = made()
        self.folder = Path(tempfile.mkdtemp(prefix="signalbox-days-"))
        shutil.copy(empty, self.folder / "ledger.db")
        self.clock = Clock(datetime.combine(FIRST + timedelta(days=1), time(4)))
        self.ledger = Ledger.open(f"sqlite:///{self.folder / 'ledger.db'}", key=b"k" * 32, clock=self.clock)
        self.world = World(dict.fromkeys(KEYS, 100), can=can, clock=self.clock)
        self.pushes = self.persons = 0
        self.exports = {FIRST: self.values()}
        """What upstream's export of a day says stood at its end."""
        self.past: dict[date, Any] = {}
        """The figures of each day whose effect is over, as they were when it ended."""
        self.approved: set[str] = set()
        self.told: dict[str, int] = {}
        """How many writes there had been when a batch was decided."""
        self.decided: dict[date, list[tuple[list[int], str]]] = {}

    # --- what the machine stands on

    def values(self) -> dict[str, int]:
        return {key: self.world.value(key) or 0 for key in KEYS}

    @property
    def newest_day(self) -> date:
        return max(self.exports)

    def batches(self) -> list[BatchRow]:
        return self.ledger.batches(self.workflow.name, kind="decision")

    def figures(self, day: date) -> dict[str, Any]:
        """Everything that is asked about a past day, but for deliveries of which nobody knows yet."""
        rows = in_effect.decided(self.ledger, self.workflow.name, day, day).to_pylist()
        known = [r for r in rows if r["state"] not in OPEN]
        return {
            "decisions": {r["entity_id"]: (r["decision_id"], r["state"], r["standing"]) for r in known},
            "explored": dispatch.randomised(self.ledger, self.workflow.name, day),
            "open": {r["entity_id"] for r in rows if r["state"] in OPEN},
        }

    def acted(self) -> list[str]:
        until = self.newest_day + timedelta(days=1)
        return [b.batch_id for b in verdicts._acted(self.workflow, self.ledger, until, self.clock())]

    # --- what people, sensors and schedules do

    @rule()
    def next_day(self) -> None:
        """Midnight passes, and upstream exports what stands."""
        if len(self.exports) >= 5:
            return
        day = self.newest_day + timedelta(days=1)
        self.clock.sleep((datetime.combine(day + timedelta(days=1), time()) - self.clock()).total_seconds())
        self.exports[day] = self.values()
        for one in self.exports:
            if self.clock() >= in_effect.over(one) and one not in self.past:
                self.past[one] = self.figures(one)
        self.clock.sleep(4 * 3600)

    @rule(moves=MOVES, status=STATUS)
    def morning(self, moves: list[int], status: str) -> None:
        """An ordinary one: the new day is decided, and what may go goes."""
        self.next_day()
        self.decide(self.newest_day, moves, status, again=False)
        self.send(None, "")

    @rule(moves=MOVES, status=STATUS, sent=st.booleans(), repeat=st.none() | st.integers(0, 5))
    def decide_again(self, moves: list[int], status: str, sent: bool, repeat: int | None) -> None:
        """The newest day is decided anew, on the explicit word; ``repeat``: as it was decided once before."""
        past = self.decided.get(self.newest_day, [])
        if repeat is not None and past:
            moves, status = past[repeat % len(past)]
        self.decide(self.newest_day, moves, status, again=True)
        if sent:
            self.send(None, "")

    @rule(back=st.sampled_from([0, 0, 1, 1, 2, 3]), moves=MOVES, status=STATUS)
    def run_day(self, back: int, moves: list[int], status: str) -> None:
        """A day is run: by hand, by a backfill, or since a file of it was sent again."""
        day = self.newest_day - timedelta(days=back)
        if day in self.exports:
            self.decide(day, moves, status, again=False)

    def decide(self, day: date, moves: list[int], status: str, *, again: bool) -> None:
        """As the stages do."""
        self.clock.sleep(60)
        found = recomputation.today(self.workflow, self.ledger, day, self.clock(), again=again)
        was = [b.batch_id for b in self.batches() if b.day == day]
        over = self.clock() >= in_effect.over(day)
        assert not (was and over and found.decides), f"{day} is over and decided, and would be decided anew"
        assert again or not found.decides or not any(b.acted for b in self.batches() if b.day == day)
        if not found.decides:
            return
        standing = scoring.standing_of(self.workflow, self.ledger, day, self.clock())
        before = self.exports[day] | dict(
            zip(standing["entity_id"].to_pylist(), standing["value"].to_pylist(), strict=True)
        )
        if not was and day == self.newest_day:
            last = {entity: who for entity, _, who in self.world.log}
            own = {key: value for key, value in self.values().items() if last.get(key) != "person"}
            unseen = {key for key in KEYS if any(d.state in OPEN for d in self.of(key))}
            assert {k: before[k] for k in own if k not in unseen} == {k: v for k, v in own.items() if k not in unseen}
        rows = [
            {"entity": key, "before": before[key], "after": before[key] + before[key] * move // 100, "arm": ARMS[key]}
            for key, move in zip(KEYS, moves, strict=True)
        ]
        decisions = table(rows, "d")
        drawn = pa.array(
            [1.0 + move / 100 if ARMS[key] == "explore" else None for key, move in zip(KEYS, moves, strict=True)]
        )
        for name in ("perturbation", "perturbation_probability"):
            decisions = decisions.set_column(decisions.schema.get_field_index(name), name, drawn.cast(pa.float64()))
        name = hashlib.sha256(repr((rows, status)).encode()).hexdigest()[:8]
        ids = pc.binary_join_element_wise(f"{day}-{name}", decisions["decision_id"], "-")
        decisions = decisions.set_column(0, "decision_id", ids)
        row = self.ledger.record_batch(
            NewBatch(
                batch_id=f"{day}-{name}", workflow=self.workflow.name, kind="decision", day=day, digest=name, status=status,  # type: ignore[arg-type]
                step="champion", as_of=self.workflow.cutoff_of(day), decided_at=self.clock(), run_id="run",
                record={
                    "model_version": 1, "limits": {"max_change": LIMIT},
                    **({"backfill": True} if found.state == "backfill" else {}),
                },
            ),
            decisions,
        )  # fmt: skip
        assert row.backfill == over, f"{row.batch_id}: decided when its effect was over, and not marked"
        newest = max((b for b in self.batches() if b.day == day), key=lambda b: b.sequence)
        assert newest.batch_id == row.batch_id, f"{row.batch_id} was decided last, and {newest.batch_id} would be sent"
        self.decided.setdefault(day, []).append((moves, status))
        self.told[row.batch_id] = len(self.world.log)

    def of(self, key: str) -> list[Any]:
        return [d for b in self.batches() for d in self.ledger.deliveries(b.batch_id) if d.entity == key]

    @rule(
        crash=st.none() | st.integers(1, 40),
        fault=st.sampled_from(["", "", "unknown_applied", "unknown_lost", "clamp"]),
    )
    def send(self, crash: int | None, fault: str) -> None:
        """What the push sensor does."""
        for batch in dispatch.open_batches(self.ledger, self.workflow, self.clock()):
            self.push(batch.batch_id, crash, fault)

    @rule(which=st.integers(0, 20), crash=st.none() | st.integers(1, 40))
    def send_by_hand(self, which: int, crash: int | None) -> None:
        """Somebody sends whichever batch, of a day that is not over."""
        rows = [b for b in self.batches() if self.clock() < in_effect.over(b.day)]
        if rows:
            self.push(rows[which % len(rows)].batch_id, crash, "")

    @rule(which=st.integers(0, 20))
    def approve(self, which: int) -> None:
        rows = [b for b in self.batches() if b.status == "HELD"]
        if rows:
            batch = rows[which % len(rows)]
            with contextlib.suppress(approvals.ApprovalError):
                approvals.approve(self.ledger, batch.batch_id, "robin", "correct horse battery", "looked at")
                self.approved.add(batch.batch_id)

    @rule(key=st.sampled_from(KEYS))
    def person(self, key: str) -> None:
        """Somebody sets a value that nobody else ever sets."""
        self.persons += 1
        self.world.person(key, 1000 + self.persons)

    @rule(which=st.integers(0, 20), since=st.booleans(), crash=st.none() | st.integers(1, 60))
    def take_back(self, which: int, since: bool, crash: int | None) -> None:
        rows = self.batches()
        if not rows:
            return
        batch = rows[which % len(rows)]
        self.roll_back(Since(batch.day, self.workflow.name) if since else Batch(batch.batch_id), crash)

    # --- how they do it

    def mortal(self, crash: int | None, fault: str) -> Any:
        process, left = Process(), [crash if crash is not None else 10**9]
        self.world.process = process

        def step(_: str) -> Any:
            left[0] -= 1
            return "crash_before" if left[0] == 0 else ""

        faults = [fault]
        self.world.fault = lambda op, key: step(op) or (faults.pop() if op == "apply" and faults else "")
        return Mortal(self.ledger, process, step)

    def push(self, batch_id: str, crash: int | None, fault: str) -> Report | None:
        self.pushes += 1
        done = len(self.world.writes)
        report = None
        with contextlib.suppress(Crash, Refused, NotApproved, Blocked):
            report = push(self.mortal(crash, fault), self.world, batch_id, **self.how())
        self.world.fault = lambda op, key: ""
        self.world.process = Process()
        if len(self.world.writes) > done:
            self.was_the_one_to_send(self.ledger.newest(batch_id), done)
        return report

    def how(self) -> dict[str, Any]:
        return {
            "settings": SETTINGS, "clock": self.clock, "sleep": self.clock.sleep, "monotonic": self.clock.monotonic,
            "rng": random.Random(self.pushes), "holder": dead_holder(self.pushes),
        }  # fmt: skip

    def was_the_one_to_send(self, batch: BatchRow, done: int) -> None:
        """Only the newest decision of a day goes out, if it may, and no change is larger than its limit allows of what stood."""
        assert batch.status == "READY" or batch.batch_id in self.approved, (
            f"{batch.batch_id} was sent, and is {batch.status}"
        )
        assert not batch.backfill and self.clock() < in_effect.over(batch.day) + timedelta(hours=1)
        later = [b.batch_id for b in self.batches() if b.day == batch.day and b.sequence > batch.sequence]
        assert not later, f"{batch.batch_id} was sent after {later} had been decided"
        assert not self.ledger.pending_rollbacks(self.workflow.name)
        base = {d["entity_id"]: d["before"] for d in self.ledger.decisions(batch.batch_id).to_pylist()}
        taken = {
            d.entity: one.batch_id
            for one in self.ledger.batches(self.workflow.name, kind="rollback")
            if one.sequence > batch.sequence
            for d in self.ledger.deliveries(one.batch_id)
        }
        for write in self.world.writes[done:]:
            stood, what = write.expected or 0, f"{batch.batch_id}: {write.key} {write.expected} → {write.value}"
            assert abs(write.value - stood) <= LIMIT * stood + 1 or write.value == base[write.key], what
            assert write.key not in taken, f"{what}, after {taken[write.key]} took it back"

    def roll_back(self, which: Any, crash: int | None) -> Any:
        self.pushes += 1
        try:
            return roll_back(
                self.mortal(crash, ""), lambda _: self.world, which, actor="ann", reason="harm", **self.how()
            )
        except (Crash, RollbackError, PushError):
            return None
        finally:
            self.world.fault = lambda op, key: ""
            self.world.process = Process()

    # --- what holds

    @invariant()
    @precondition(lambda self: hasattr(self, "ledger"))
    def the_past_is_as_it_was(self) -> None:
        for day, was in self.past.items():
            now = self.figures(day)
            for entity, told in was["decisions"].items():
                assert now["decisions"].get(entity) == told, (
                    f"{day}, {entity}: {told} became {now['decisions'].get(entity)}"
                )
            new = now["decisions"].keys() - was["decisions"].keys() - was["open"]
            assert not new, f"{day}: {new} is told of only now"
            still = {k: v for k, v in was["explored"].items() if k not in was["open"]}
            assert {k: v for k, v in now["explored"].items() if k not in was["open"]} == still
        if self.world.can.conditional_write:
            assert not self.world.lost, self.world.lost
        if self.world.can.conditional_write or self.world.can.idempotency_key:
            assert max(Counter(a.key for a in self.world.applied).values(), default=1) == 1, "applied twice"

    def teardown(self) -> None:
        if not hasattr(self, "ledger"):
            return
        try:
            for _ in range(4):
                for batch_id in self.ledger.pending_rollbacks(self.workflow.name):
                    self.roll_back(Batch(batch_id), None)
            assert not self.ledger.pending_rollbacks(self.workflow.name)
            for _ in range(3):
                self.send(None, "")
            assert not dispatch.open_batches(self.ledger, self.workflow, self.clock())
            self.downstream_is_the_newest_decision_or_the_rollback()
            self.the_past_is_as_it_was()
            verdict = self.ledger.verify()
            assert verdict.ok, verdict.problems
        finally:
            self.ledger.close()
            shutil.rmtree(self.folder)

    def downstream_is_the_newest_decision_or_the_rollback(self) -> None:
        mine = [b for b in self.batches() if b.day == self.newest_day]
        newest = max(mine, key=lambda b: b.sequence, default=None)
        if newest is None or newest.status == "REFUSED" or newest.superseded_by:
            return
        if newest.status == "HELD" and not approvals.standing(self.ledger, newest, self.clock(), False).ok:
            return
        ended = {d.entity: d for d in self.ledger.deliveries(newest.batch_id)}
        for row in self.ledger.decisions(newest.batch_id).to_pylist():
            key = row["entity_id"]
            writes = [(n, who) for n, (entity, _, who) in enumerate(self.world.log) if entity == key]
            n, last = writes[-1] if writes else (-1, "")
            if last == "person" or (last.startswith("rollback-") and n >= self.told[newest.batch_id]):
                continue  # people win, and what was taken back since is taken back
            listed = key in ended and ended[key].state in ("SKIPPED", "CONFLICT", "REJECTED")
            assert self.world.value(key) == row["after"] or listed, (key, row["after"], self.world.log, ended.get(key))


TestDays = Days.TestCase
TestDays.settings = settings(
    max_examples=properties.examples(25),
    stateful_step_count=16,
    suppress_health_check=list(HealthCheck),
    # Shrinking takes minutes here; a failure names its steps as they are.
    phases=[Phase.explicit, Phase.generate],
)
