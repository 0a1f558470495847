"""Whatever is done to a ledger in whatever order, it holds what a simple model in memory holds, and verifies."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from delivery.ledger import (
    FINAL,
    OPEN,
    Attempt,
    Busy,
    Fenced,
    Head,
    Holder,
    Lease,
    Ledger,
    LedgerError,
    LedgerMismatch,
    Result,
)  # fmt: skip
from tests.support.ledgers import KEY, Clock, new_batch, some_decisions
from tests.support.properties import examples

ENTITIES = [f"line-{i}" for i in range(5)]
PEOPLE = ["ann", "bob"]
NAMES = st.sampled_from([*ENTITIES, *PEOPLE, "nobody"])
STATES = st.sampled_from(sorted(OPEN | FINAL))


@dataclass
class Batch:
    """What the model knows of one batch."""

    entities: list[str]
    states: dict[int, str]
    attempts: dict[int, int]
    delivery: str = "NONE"
    opened: bool = False
    """Whether a push of it has begun and not ended: else it is sealed as it stands."""
    approvals: list[str | None] = field(default_factory=list)


class Model(RuleBasedStateMachine):
    """Rules do the same to the ledger and to dictionaries."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="signalbox-model-"))
        self.clock = Clock()
        self.book = Ledger.open(f"sqlite:///{self.folder / 'ledger.db'}", key=KEY, clock=self.clock)
        self.batches: dict[str, Batch] = {}
        self.leases: list[Lease] = []
        self.held = False
        self.known: set[str] = set()
        self.proved: dict[str, int] = {}
        self.stopped = False
        self.head = Head(0, "0" * 64)

    def teardown(self) -> None:
        if hasattr(self, "book"):
            self.book.close()
            shutil.rmtree(self.folder)

    def one(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.batches)), label="batch")

    @property
    def lease(self) -> Lease:
        return self.leases[-1]

    @rule(entities=st.lists(st.sampled_from(ENTITIES), unique=True), data=st.data())
    def record(self, entities: list[str], data: st.DataObject) -> None:
        name = f"b{len(self.batches)}"
        changed = data.draw(st.lists(st.booleans(), min_size=len(entities), max_size=len(entities)))
        self.book.record_batch(new_batch(name, findings=[]), some_decisions(name, entities, changed=changed))
        states = {n: "PENDING" for n, is_changed in enumerate(changed) if is_changed}
        self.batches[name] = Batch(entities, states, dict.fromkeys(states, 0))
        self.known |= set(entities)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def record_again(self, data: st.DataObject) -> None:
        name = self.one(data)
        if not self.batches[name].entities:
            return
        with pytest.raises(LedgerMismatch):
            self.book.record_batch(new_batch(name, digest="e" * 64), some_decisions(name, self.batches[name].entities))

    @rule(here=st.booleans())
    def take_lease(self, here: bool) -> None:
        holder = Holder.here() if here else Holder("elsewhere", 1, "then")
        if self.held:
            with pytest.raises(Busy):
                self.book.lease("ads", holder, 60)
            return
        self.leases.append(self.book.lease("ads", holder, 60))
        self.held = True

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.book.release(self.lease)
        self.held = False

    @precondition(lambda self: self.held)
    @rule()
    def outlive_the_lease(self) -> None:
        self.clock.add(61)
        if self.lease.holder.host == "elsewhere":
            self.leases.append(self.book.lease("ads"))
        else:
            with pytest.raises(Busy):
                self.book.lease("ads")

    @precondition(lambda self: self.batches and len(self.leases) > self.held)
    @rule(data=st.data())
    def write_through_a_lost_lease(self, data: st.DataObject) -> None:
        lost = data.draw(st.sampled_from(self.leases[:-1] if self.held else self.leases))
        name = self.one(data)
        for write in (
            lambda: self.book.open_push(lost, name),
            lambda: self.book.begin(lost, name, [Attempt(0, 1, 1, "k", self.clock())]),
            lambda: self.book.settle(lost, name, [Result(0, "PENDING")]),
            lambda: self.book.close_push(lost, name, False),
            lambda: self.book.supersede(lost, [name], name),
        ):
            with pytest.raises(Fenced):
                write()

    @precondition(lambda self: self.batches and self.held)
    @rule(data=st.data())
    def open_push(self, data: st.DataObject) -> None:
        name = self.one(data)
        if self.batches[name].delivery == "COMPLETE":
            with pytest.raises(LedgerError):
                self.book.open_push(self.lease, name)
            return
        self.book.open_push(self.lease, name)
        self.batches[name].delivery, self.batches[name].opened = "OPEN", True

    @precondition(lambda self: self.held and any(b.delivery == "OPEN" and b.states for b in self.batches.values()))
    @rule(data=st.data(), state=STATES, begin=st.booleans(), value=st.integers(1, 3))
    def push_some(self, data: st.DataObject, state: str, begin: bool, value: int) -> None:
        name = data.draw(st.sampled_from([k for k, b in self.batches.items() if b.delivery == "OPEN" and b.states]))
        batch = self.batches[name]
        some = data.draw(st.lists(st.sampled_from(sorted(batch.states)), unique=True, min_size=1))
        now = self.clock()
        if begin:
            tried = [Attempt(n, value, 100, f"{name}-{n}", now) for n in some]
            if not batch.opened or any(batch.states[n] in FINAL for n in some):
                with pytest.raises(LedgerError):
                    self.book.begin(self.lease, name, tried)
            else:
                self.book.begin(self.lease, name, tried)
                for n in some:
                    batch.states[n] = "IN_FLIGHT"
                    batch.attempts[n] += 1
        # Each entity has a target of its own here.
        results = [
            Result(n, state, target=f"t-{batch.entities[n]}", sent=value, observed=value, verified_at=now, says=state)  # type: ignore[arg-type]
            for n in some
        ]
        allowed = batch.opened and all(
            batch.states[n] in OPEN or state == batch.states[n] or (batch.states[n], state) == ("ACKED", "OVERWRITTEN")
            for n in some
        )
        if not allowed:
            with pytest.raises(LedgerError):
                self.book.settle(self.lease, name, results)
            return
        self.book.settle(self.lease, name, results)
        for n in some:
            batch.states[n] = state
            self.known.add(f"t-{batch.entities[n]}")
            if state in ("ACKED", "OVERWRITTEN"):
                self.proved[batch.entities[n]] = value

    @precondition(lambda self: self.held and any(b.delivery == "OPEN" for b in self.batches.values()))
    @rule(data=st.data(), complete=st.booleans())
    def close_push(self, data: st.DataObject, complete: bool) -> None:
        name = data.draw(st.sampled_from([k for k, b in self.batches.items() if b.delivery == "OPEN"]))
        batch = self.batches[name]
        if complete and set(batch.states.values()) & OPEN:
            with pytest.raises(LedgerError):
                self.book.close_push(self.lease, name, True)
            return
        self.book.close_push(self.lease, name, complete)
        batch.opened = False
        batch.delivery = "COMPLETE" if complete else "OPEN"

    @precondition(lambda self: self.held and len(self.batches) > 1)
    @rule(data=st.data())
    def supersede(self, data: st.DataObject) -> None:
        older, by = self.one(data), sorted(self.batches)[-1]
        if older == by or self.batches[older].delivery == "COMPLETE":
            return
        self.book.supersede(self.lease, [older], by)
        batch = self.batches[older]
        batch.states = {n: "SKIPPED" if state == "PENDING" else state for n, state in batch.states.items()}
        batch.opened = bool(set(batch.states.values()) & OPEN)
        batch.delivery = "OPEN" if batch.opened else "COMPLETE"

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), who=st.sampled_from(PEOPLE), right=st.booleans())
    def approve(self, data: st.DataObject, who: str, right: bool) -> None:
        name, now = self.one(data), self.clock()
        if not right:
            with pytest.raises(LedgerMismatch):
                self.book.approve(name, "other", who, "reason", now, now)
            return
        self.book.approve(name, "d" * 64, who, "reason", now, now + timedelta(hours=1))
        self.batches[name].approvals.append(who)
        self.known.add(who)

    @rule(stopped=st.booleans(), who=st.sampled_from(PEOPLE))
    def switch(self, stopped: bool, who: str) -> None:
        self.book.switch("ad_budget", stopped, who, "reason")
        self.stopped = stopped
        self.known.add(who)

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        gone = self.book.forget(name)
        assert (gone > 0) == (name in self.known)
        self.known -= {name, f"t-{name}"}

    @rule()
    def export_the_head(self) -> None:
        self.head = self.book.head()

    @invariant()
    def the_ledger_verifies(self) -> None:
        if hasattr(self, "book"):
            verdict = self.book.verify(head=self.head)
            assert verdict.ok, verdict.problems

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "book"):
            return
        assert [row.batch_id for row in self.book.batches()] == list(self.batches)
        for name, batch in self.batches.items():
            row, deliveries = self.book.batch(name), self.book.deliveries(name)
            assert row.delivery == batch.delivery
            assert {d.n: (d.state, d.attempts) for d in deliveries} == {
                n: (state, batch.attempts[n]) for n, state in batch.states.items()
            }
            assert sum(row.counts.values()) == len(batch.states)
            assert len(self.book.attempts(name)) == sum(batch.attempts.values())
            for d in deliveries:
                assert d.entity == (batch.entities[d.n] if batch.entities[d.n] in self.known else None)
            approvers = [a.approver for a in self.book.approvals(name)]
            assert approvers == [who if who in self.known else None for who in batch.approvals]
        known = self.book.acknowledged("ads", ENTITIES)
        assert {name: one.value for name, one in known.items()} == self.proved
        assert (self.book.stopped("ad_budget") is not None) == self.stopped


TestLedger = Model.TestCase
TestLedger.settings = settings(
    max_examples=examples(12), stateful_step_count=20, suppress_health_check=list(HealthCheck)
)
