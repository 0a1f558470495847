"""The ledger: what was decided, sent, approved, promoted and taken back, and the proof that nobody changed it since.

Belongs here: the names that callers use, and what they mean; each method is one transaction. Does not: what is done in it (the
modules beside this one, a concern each), talking to a downstream system (``delivery.push``), who may approve
(``delivery.approvals``), or judging outcomes. SQLite or PostgreSQL, safe from several threads and processes. Names of entities and
people stand only in the table ``names``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa
from sqlalchemy import Engine, Table, and_, select, text, update

from common.clock import utc_now
from delivery.ledger import (
    acknowledged,
    batches,
    chained,
    decisions,
    deliveries,
    erasure,
    hash_chain,
    leases,
    pushes,
    rollbacks,
    schema,
    verify,
)
from delivery.ledger.database import (
    LedgerError,
    LedgerMismatch,
    Unknown,
    engine_for,
    migrate,
    plainly,
    reading,
    writing,
)
from delivery.ledger.decisions import to_stored
from delivery.ledger.events import CHAINED
from delivery.ledger.leases import ABANDONED, Holder, Lease
from delivery.ledger.pseudonyms import People
from delivery.ledger.records import (  # fmt: skip
    Acknowledged,
    Approval,
    Approver,
    Attempt,
    AttemptRow,
    BatchRow,
    Conflict,
    Delivery,
    Event,
    Head,
    Leftover,
    NewBatch,
    Promotion,
    Result,
    Rollback,
    Switch,
    Verdict,
)
from delivery.ledger.transaction import Transaction

_OWN = frozenset({*CHAINED, "batch", "push begun", "push ended", "taken back", "superseded", "forgotten", "retention"})


class Ledger:
    """Open one with ``Ledger.open``; close it, or use it in a ``with``."""

    def __init__(self, engine: Engine, people: People, clock: Callable[[], datetime]) -> None:
        self.engine = engine
        self.people = people
        self.clock = clock
        self._opened: set[tuple[str, int]] = set()
        """(batch, fence) of pushes that are known to be open, so that not every write asks the events."""

    @staticmethod
    @plainly
    def open(url: str, *, key: bytes, clock: Callable[[], datetime] = utc_now) -> Ledger:
        """Open the ledger at ``url`` (``sqlite:///path`` or ``postgresql://…``), making or migrating its tables.

        ``key`` makes the digests of names; it must be the one that the ledger was made with. Raises LedgerNewer,
        LedgerMismatch (another key), LedgerUnavailable.
        """
        ledger = Ledger(engine_for(url), People(key), clock)
        try:
            migrate(ledger.engine)
            ledger._claim()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _claim(self) -> None:
        """The ledger belongs to the key that it was made with."""
        mine = self.people.digest("ledger", "key")
        found = select(schema.meta.c.value).where(schema.meta.c.name == "key")
        with reading(self.engine) as connection:
            stands = connection.execute(found).scalar()
        if stands is None:
            with writing(self.engine) as connection, connection.begin():
                new = text("INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT DO NOTHING")
                connection.execute(new, [{"name": "key", "value": mine}, {"name": "chain", "value": "lock"}])
                stands = connection.execute(found).scalar()
        if stands != mine:
            raise LedgerMismatch(
                "the ledger was made with another key: give the one in use then; digests cannot be remade"
            )

    def __repr__(self) -> str:
        return f"Ledger({self.engine.url.render_as_string(hide_password=True)})"

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of connections."""
        self.engine.dispose()

    @contextmanager
    def _reading(self) -> Iterator[Transaction]:
        with reading(self.engine) as connection, connection.begin():
            yield Transaction(connection, self.people, self.clock, self._opened)

    @contextmanager
    def _writing(self) -> Iterator[Transaction]:
        with writing(self.engine) as connection, connection.begin():
            yield Transaction(connection, self.people, self.clock, self._opened)

    # --- chain and names

    @plainly
    def note(self, kind: str, body: Mapping[str, Any]) -> int:
        """Add an event of another kind (a guard's verdict, a failed proof of identity); returns its number.

        Names belong under ``actor``, ``approver``, ``person`` or ``entity``, or in lists under ``entities`` or ``examples``:
        there they are kept as digests, and can be forgotten.
        """
        if kind in _OWN:
            raise LedgerError(f"events of kind {kind!r} are the ledger's own: use the method that makes them")
        with self._writing() as tx:
            return tx.append(kind, body)

    @plainly
    def events(self, kind: str | None = None, workflow: str | None = None) -> list[Event]:
        """The chain's events, oldest first, of one kind or one workflow."""
        with self._reading() as tx:
            return chained.events(tx, kind, workflow)

    @plainly
    def head(self) -> Head:
        """The last link, to be kept elsewhere."""
        e = schema.events.c
        with self._reading() as tx:
            last = tx.connection.execute(select(e.seq, e.hash).order_by(e.seq.desc()).limit(1)).first()
        return Head(last.seq, last.hash) if last else Head(0, hash_chain.NOTHING)

    @plainly
    def verify(self, *, head: Head | None = None) -> Verdict:
        """Recompute everything; with a ``head`` exported earlier, also that nothing was cut off since."""
        with self._reading() as tx:
            problems, events, batches, now = verify.examine(tx.connection, self.people, head)
        return Verdict(not problems, events, batches, problems, now)

    # --- batches

    @plainly
    def record_batch(self, new: NewBatch, decisions: pa.Table, *, unless_sent: bool = False) -> BatchRow:
        """Record a batch, its decisions and a PENDING delivery for each changed one, in one transaction; returns its row.

        Deciding the same again changes nothing while it is still what may be sent. After something else was decided for the
        day, or after it was superseded or taken back, it is a new decision: ``X.2`` (``generation``), with decision ids of
        its own. The same id with another content raises LedgerMismatch. ``decisions``: the columns that the stage writes,
        entities and ids unique. ``unless_sent``: raises DaySent where another batch of the day was sent, or is being sent:
        between the look at a day and its record a push may begin.
        """
        stored, mapping = to_stored(self.people, new, decisions)
        root = hash_chain.merkle_root(hash_chain.leaf_hashes(stored))
        with self._writing() as tx:
            return batches.record(tx, new, stored, root, mapping, unless_sent=unless_sent)

    @plainly
    def newest(self, batch_id: str) -> BatchRow:
        """The batch under which the content of ``batch_id`` was decided last: itself, or ``X.2`` and so on; raises Unknown."""
        with self._reading() as tx:
            return batches.rows_of(tx, [batches.newest(tx, batches.find(tx, batch_id))])[0]

    @plainly
    def batch(self, batch_id: str) -> BatchRow:
        """One batch; raises Unknown."""
        with self._reading() as tx:
            return batches.batch(tx, batch_id)

    @plainly
    def batches(
        self,
        workflow: str | None = None,
        *,
        since: date | None = None,
        model_version: int | None = None,
        kind: str | None = None,
    ) -> list[BatchRow]:
        """Batches in the order in which they were recorded; ``since``: of that day or later; ``model_version``: decided by
        it, or by it in the arm challenger."""
        with self._reading() as tx:
            return batches.batches(tx, workflow, since=since, model_version=model_version, kind=kind)

    @plainly
    def decisions(self, batch_id: str, entities: Sequence[str] | None = None) -> pa.Table:
        """A batch's decisions in their order, columns as they were given and ``n``; names that were forgotten are null."""
        with self._reading() as tx:
            return decisions.decisions(tx, batch_id, entities)

    @plainly
    def decision(self, decision_id: str) -> dict[str, Any]:
        """One decision's row and, as ``batch``, its BatchRow; raises Unknown."""
        with self._reading() as tx:
            return decisions.decision(tx, decision_id)

    # --- deliveries

    @plainly
    def deliveries(self, batch_id: str, states: Collection[str] | None = None) -> list[Delivery]:
        """A batch's deliveries in the order of its decisions, those in ``states`` only where given."""
        with self._reading() as tx:
            return deliveries.deliveries(tx, batch_id, states)

    @plainly
    def deliveries_of(self, decision_id: str) -> list[Delivery]:
        """The delivery of a decision, as a list: empty where nothing was to be changed; raises Unknown."""
        d = schema.deliveries.c
        with self._reading() as tx:
            at = decisions.find_decision(tx, decision_id)
            return deliveries.read_deliveries(tx, [d.sequence == at.sequence, d.n == at.n])

    @plainly
    def delivered(self, batch_id: str) -> pa.Table:
        """What became of a batch's deliveries, in bulk: n, state, sent, observed, verified_at (naive UTC), in their order."""
        with self._reading() as tx:
            return deliveries.delivered(tx, batch_id)

    @plainly
    def attempts(self, batch_id: str, n: int | None = None) -> list[AttemptRow]:
        """What was tried, of a whole batch or of one delivery, in order."""
        with self._reading() as tx:
            return deliveries.attempts(tx, batch_id, n)

    @plainly
    def conflicts(self, batch_id: str) -> list[Conflict]:
        """Deliveries of a batch that met, or replaced, somebody else's value."""
        with self._reading() as tx:
            return deliveries.conflicts(tx, batch_id)

    @plainly
    def begin(self, lease: Lease, batch_id: str, attempts: Sequence[Attempt]) -> None:
        """Note that these are about to be tried, before anything is sent: IN_FLIGHT, with an attempt row each.

        An attempt that is still open from a process that died ends as ``unknown``. Raises Fenced; LedgerError for a
        delivery in a final state.
        """
        if attempts:
            with self._writing() as tx:
                deliveries.begin(tx, lease, batch_id, attempts)

    @plainly
    def settle(self, lease: Lease, batch_id: str, results: Sequence[Result]) -> None:
        """Write down what became of these: deliveries, their open attempts, acknowledged values and conflicts.

        Raises Fenced; LedgerError where a final state would change (only ACKED may become OVERWRITTEN).
        """
        if results:
            with self._writing() as tx:
                deliveries.settle(tx, lease, batch_id, results)

    @plainly
    def acknowledged(
        self, system: str, entities: Sequence[str], *, workflow: str | None = None
    ) -> dict[str, Acknowledged]:
        """The last proven value of ours for each entity that has one, also where it was sent for another entity of the
        same target. ``workflow``: of this workflow alone; what another one proved since does not count as its own."""
        with self._reading() as tx:
            return acknowledged.acknowledged(tx, system, entities, workflow=workflow)

    @plainly
    def setters(self, system: str, entities: Sequence[str], workflow: str) -> dict[str, tuple[int, str]]:
        """Where another workflow proved a value last: entity → (value, workflow)."""
        with self._reading() as tx:
            return acknowledged.setters(tx, system, entities, workflow)

    @plainly
    def open_push(self, lease: Lease, batch_id: str, run_id: str = "") -> None:
        """Note that a push begins, or goes on, and by which run.

        Raises Fenced; LedgerError where the batch is refused or complete; LedgerMismatch where its decisions are not those
        that were recorded, and approved: nothing of it is sent then.
        """
        with self._writing() as tx:
            pushes.open_push(tx, lease, batch_id, run_id)

    @plainly
    def take_back(self, lease: Lease, batch_id: str, entities: Collection[str] = ()) -> int:
        """Give a delivery to what the batch leaves alone although an earlier batch's value stands there; returns how many.

        That is every unchanged decision whose entity shows, by the last value that a decision of the same workflow proved
        after this batch's ``as_of``, something else than was decided here; and ``entities``, of which an earlier batch's
        write may still land. The push must be open. Raises Fenced.
        """
        with self._writing() as tx:
            return pushes.take_back(tx, lease, batch_id, entities)

    @plainly
    def close_push(self, lease: Lease, batch_id: str, complete: bool) -> None:
        """Note that a push ends, with a root over what it left; ``complete`` seals the batch for good.

        Raises Fenced; LedgerError where ``complete`` and a delivery is still open. Nothing happens to a sealed batch.
        """
        with self._writing() as tx:
            pushes.close_push(tx, lease, batch_id, complete)

    @plainly
    def supersede(self, lease: Lease, older_batch_ids: Sequence[str], by: str) -> None:
        """Skip what is still PENDING of older batches; one with nothing open left is sealed. Raises Fenced.

        One with something left that may have been sent stays open, as after ``open_push``: what is found out of it is
        settled next, and ``close_push`` seals it.
        """
        with self._writing() as tx:
            pushes.supersede(tx, lease, older_batch_ids, by)

    @plainly
    def would_take_back(self, system: str, batch_id: str) -> list[Delivery]:
        """The deliveries that ``take_back`` would add now, as they would be."""
        with self._reading() as tx:
            return pushes.would_take_back(tx, system, batch_id)

    @plainly
    def proven(self, workflow: str, since: datetime, until: datetime) -> pa.Table:
        """Values of a workflow's deliveries that a read-back proved after ``since`` and by ``until``.

        Columns: entity_id (rows whose name was forgotten are left out), value, prior (what stood before the delivery's first
        write), verified_at, batch_id, sequence, kind and day of the batch; in the order of proof. Of batches whose rows
        were retired only the last value of each entity is known.
        """
        with self._reading() as tx:
            return acknowledged.proven(tx, workflow, since, until)

    # --- leases

    @plainly
    def lease(self, system: str, holder: Holder | None = None, ttl_s: float = 60.0) -> Lease:
        """The right to write to ``system`` for ``ttl_s`` seconds; raises Busy.

        Granted where it is free, or its holder is a process of this host that is gone, or, for another host's, where it
        has expired. A process that lives on this host keeps it, whatever the clock says.
        """
        now = self.clock()
        with self._writing() as tx:
            return leases.grant(tx, system, holder or Holder.here(), now, ttl_s)

    @plainly
    def renew(self, lease: Lease, ttl_s: float = 60.0) -> Lease:
        """The same lease for another ``ttl_s`` seconds from now; raises Fenced."""
        expires_at = self.clock() + timedelta(seconds=ttl_s)
        table = schema.leases
        with self._writing() as tx:
            leases.check_fence(tx, lease)
            tx.connection.execute(update(table).where(table.c.system == lease.system).values(expires_at=expires_at))
        return replace(lease, expires_at=expires_at)

    @plainly
    def release(self, lease: Lease) -> None:
        """Give the lease back; nothing happens where it is somebody else's by now."""
        table = schema.leases
        mine = and_(table.c.system == lease.system, table.c.fence == lease.fence)
        with self._writing() as tx:
            tx.connection.execute(update(table).where(mine).values(held=False))

    def abandon(self, lease: Lease) -> None:
        """Say that this process no longer uses a lease that it could not release; the next one asked for is granted."""
        ABANDONED.add((str(self.engine.url), lease.system, lease.fence))

    # --- people: approvals, switches, promotions, rollbacks

    @plainly
    def approve(
        self, batch_id: str, digest: str, approver: str, reason: str, at: datetime, expires_at: datetime
    ) -> Approval:
        """Record an approval of exactly this content; raises LedgerMismatch where the batch has another digest.

        Who ``approver`` is must have been proved before (``delivery.approvals``).
        """
        with self._writing() as tx:
            if batches.find(tx, batch_id).digest != digest:
                raise LedgerMismatch(f"batch {batch_id} has another content than the one approved: look at it again")
            values = {"batch_id": batch_id, "digest": digest, "approver": approver, "reason": reason, "at": at}
            tx.record("approval", {**values, "expires_at": expires_at})
        return Approval(batch_id, digest, approver, reason, at, expires_at)

    def _chained(self, table: Table, columns: Sequence[Any], where: Any = None) -> list[list[Any]]:
        with self._reading() as tx:
            return chained.chained_rows(tx, table, columns, where)

    @plainly
    def approvals(self, batch_id: str) -> list[Approval]:
        """Approvals of a batch, oldest first; whether they count is for ``delivery.approvals`` to say."""
        a = schema.approvals
        return [
            Approval(*row) for row in self._chained(
                a, [a.c.batch_id, a.c.digest, a.c.approver, a.c.reason, a.c.at, a.c.expires_at], a.c.batch_id == batch_id
            )
        ]  # fmt: skip

    @plainly
    def set_approver(self, name: str, secret_hash: str) -> None:
        """Enrol an approver or replace the secret; only its hash is given, and the one before it is erased."""
        with self._writing() as tx:
            tx.lock()
            chained.set_approver(tx, name, True, secret_hash)

    @plainly
    def revoke_approver(self, name: str) -> None:
        """An approver no more; raises Unknown where there is none of that name."""
        if name not in {one.name for one in self.approvers()}:
            raise Unknown(f"there is no approver {name!r}")
        with self._writing() as tx:
            tx.lock()
            chained.set_approver(tx, name, False, None)

    @plainly
    def approvers(self) -> list[Approver]:
        """Who may approve now, by name."""
        a = schema.approvers
        latest = {name: (active, secret, at) for name, active, secret, at in self._chained(
            a, [a.c.approver, a.c.active, a.c.secret_hash, a.c.at]
        )}  # fmt: skip
        return [
            Approver(name, secret, at) for name, (active, secret, at) in sorted(
                item for item in latest.items() if item[0] is not None
            ) if active
        ]  # fmt: skip

    @plainly
    def switch(self, workflow: str, stopped: bool, actor: str, reason: str) -> Switch:
        """Stop a workflow, or let it go on."""
        one = Switch(workflow, stopped, actor, reason, self.clock())
        with self._writing() as tx:
            tx.record("switch", asdict(one))
        return one

    @plainly
    def stopped(self, workflow: str) -> Switch | None:
        """The switch that stops the workflow; None where it may act."""
        s = schema.switches
        columns = [s.c.workflow, s.c.stopped, s.c.actor, s.c.reason, s.c.at]
        last = [Switch(*row) for row in self._chained(s, columns, s.c.workflow == workflow)][-1:]
        return last[0] if last and last[0].stopped else None

    @plainly
    def promotion(
        self, workflow: str, version: int | None, action: str, actor: str, evidence: Mapping[str, Any] | None = None
    ) -> Promotion:
        """Record that a model version was moved (promoted, taken back, blocked …)."""
        one = Promotion(workflow, version, action, actor, dict(evidence or {}), self.clock())
        with self._writing() as tx:
            tx.record("promotion", {**asdict(one), "evidence": one.evidence})
        return one

    @plainly
    def promotions(self, workflow: str) -> list[Promotion]:
        """What happened to a workflow's versions, oldest first."""
        p = schema.promotions
        columns = [p.c.workflow, p.c.version, p.c.action, p.c.actor, p.c.evidence, p.c.at]
        return [Promotion(*row) for row in self._chained(p, columns, p.c.workflow == workflow)]

    @plainly
    def rollback_asked(
        self, batch_id: str, *, actor: str, reason: str, trigger: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Record that somebody or a guard (``trigger``) wants a batch taken back; raises Unknown."""
        self._rollback(batch_id, "asked", actor, reason, trigger, evidence)

    @plainly
    def rollback_complete(
        self, batch_id: str, *, actor: str, reason: str, trigger: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Record that the batch is taken back, with what could not be in ``evidence``; raises Unknown."""
        self._rollback(batch_id, "complete", actor, reason, trigger, evidence)

    @plainly
    def rollback_closed(
        self, batch_id: str, *, actor: str, reason: str, trigger: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Record that a person ended the rollback of a batch with what was left, counted in ``evidence``; raises Unknown."""
        self._rollback(batch_id, "closed", actor, reason, trigger, evidence)

    def _rollback(
        self, batch_id: str, action: str, actor: str, reason: str, trigger: str, evidence: Mapping[str, Any] | None
    ) -> None:
        values = {
            "batch_id": batch_id, "action": action, "actor": actor, "reason": reason, "trigger": trigger,
            "evidence": dict(evidence or {}), "at": self.clock(),
        }  # fmt: skip
        with self._writing() as tx:
            batches.find(tx, batch_id)
            tx.record("rollback", values)

    @plainly
    def rollbacks(self, batch_id: str | None = None) -> list[Rollback]:
        """Rollbacks asked for, complete and closed, oldest first."""
        r = schema.rollbacks
        columns = [r.c.batch_id, r.c.action, r.c.actor, r.c.reason, r.c.trigger, r.c.evidence, r.c.at]
        where = None if batch_id is None else r.c.batch_id == batch_id
        return [Rollback(*row) for row in self._chained(r, columns, where)]

    @plainly
    def pending_rollbacks(self, workflow: str) -> list[str]:
        """Batches of a workflow whose rollback was asked for and is neither complete nor closed, oldest request first."""
        with self._reading() as tx:
            return rollbacks.pending(tx, workflow)

    @plainly
    def taken_back_since(self, batch_id: str) -> str | None:
        """A rollback of an entity that the batch would change, recorded after the batch was decided, or under way by then: its
        values were proven later. None: there is none."""
        with self._reading() as tx:
            return rollbacks.taken_back_since(tx, batch_id)

    @plainly
    def held_by(self, undoing: str, batch_id: str, standing: Sequence[str], undone: Sequence[str]) -> dict[int, str]:
        """Which deliveries of the rollback ``undoing`` of ``batch_id``, not sent yet, are of entities or targets that a newer
        batch holds: n → the newest of them.

        ``standing``: newer batches that are not rolled back, each of which holds what it proved. ``undone``: rollbacks of
        newer batches; what one of them did not bring back is still held. One pass over the rows of those batches.
        """
        if not standing and not undone:
            return {}
        with self._reading() as tx:
            return rollbacks.held_by(tx, undoing, batch_id, standing, undone)

    @plainly
    def left_of(self, batch_id: str, undone: Sequence[str]) -> list[Leftover]:
        """What these rollbacks left, or brought back, of the entities that ``batch_id`` decides on."""
        with self._reading() as tx:
            return rollbacks.left_of(tx, batch_id, undone)

    # --- erasing

    @plainly
    def forget(self, name: str) -> int:
        """Erase a name, whatever it named, and what systems said about that entity; returns how many mappings went.

        Where it is quoted in words about somebody else (what a system said of another entity, what a guardrail found, why
        somebody approved), ``(erased)`` stands in its place. The digests stay, so the chain still verifies, and nobody can
        read them any more. An approver is revoked by it.
        """
        with self._writing() as tx:
            return erasure.forget(tx, name)

    @plainly
    def retention(self, keep_days: int) -> list[str]:
        """Remove the rows of batches that are complete or refused and older than ``keep_days``; returns their ids.

        Their roots, events and acknowledged values stay, and so does a record that this policy removed the rows. They
        cannot be rolled back or explained afterwards. Names that nothing mentions any more go too.
        """
        if keep_days < 1:
            raise LedgerError(f"a retention of {keep_days} days would remove everything: keep one day at least")
        with self._writing() as tx:
            return erasure.retire(tx, keep_days)
