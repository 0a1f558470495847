"""A push in the ledger: it is begun, gives deliveries to what is taken back, supersedes older batches, and is sealed.

Belongs here: from ``open_push`` to ``close_push``, and which batch may be written to. Does not: single deliveries
(``delivery.ledger.deliveries``), or sending (``delivery.push``).
A function that bears the name of a method of ``Ledger`` is what that method does
inside its transaction: what it means and raises stands there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import and_, func, insert, select, update

from delivery.ledger import acknowledged, batches, hash_chain, leases, schema
from delivery.ledger.database import LedgerError, LedgerMismatch, chunks, select_bulk
from delivery.ledger.events import batch_body, roots, stored_rows
from delivery.ledger.leases import Lease
from delivery.ledger.records import OPEN, Delivery
from delivery.ledger.transaction import AnyRow, Transaction


def open_batch(tx: Transaction, lease: Lease, batch_id: str) -> AnyRow:
    """The batch, where its push over this lease's system is open."""
    leases.check_fence(tx, lease)
    row = batches.find(tx, batch_id)
    if row.delivery != "OPEN":
        why = "complete: it cannot be changed" if row.delivery == "COMPLETE" else "not open: open_push comes first"
        raise LedgerError(f"the push of batch {batch_id} is {why}")
    if row.system != lease.system:
        raise LedgerMismatch(f"batch {batch_id} is delivered to {row.system}, and the lease is one of {lease.system}")
    if (batch_id, lease.fence) not in tx.opened:
        refuse_if_ended(tx, batch_id)
        tx.opened.add((batch_id, lease.fence))
    return row


def refuse_if_ended(tx: Transaction, batch_id: str) -> None:
    """Raise LedgerError where the last push of a batch has ended: what it left is sealed, and a change would break the seal."""
    e = schema.events.c
    named = f'"batch_id":{hash_chain.canonical(batch_id)}'
    query = select(e.kind).where(
        e.kind.in_(("push begun", "push ended", "superseded")), e.body.contains(named, autoescape=True)
    )
    if tx.connection.execute(query.order_by(e.seq.desc()).limit(1)).scalar() == "push ended":
        raise LedgerError(f"the push of batch {batch_id} has ended, and is sealed as it stands: open_push comes first")


def open_push(tx: Transaction, lease: Lease, batch_id: str, run_id: str = "") -> None:
    leases.check_fence(tx, lease)
    tx.lock()
    row = batches.find(tx, batch_id)
    if row.status == "REFUSED" or row.delivery == "COMPLETE":
        what = "refused" if row.status == "REFUSED" else "already delivered"
        raise LedgerError(f"batch {batch_id} is {what}: there is nothing to push")
    if row.system not in (None, lease.system):
        raise LedgerMismatch(f"batch {batch_id} is delivered to {row.system}, and the lease is one of {lease.system}")
    check_as_recorded(tx, row)
    body = {"batch_id": batch_id, "workflow": row.workflow, "system": lease.system, "fence": lease.fence}
    tx.append("push begun", body | ({"run_id": run_id} if run_id else {}))
    b = schema.batches
    tx.connection.execute(
        update(b).where(b.c.sequence == row.sequence).values(delivery="OPEN", system=lease.system, counts=None)
    )


def check_as_recorded(tx: Transaction, row: AnyRow) -> None:
    """The decisions, the pools and the record are those that the chain holds: an approval is for exactly them."""
    e = schema.events.c
    event = tx.connection.execute(select(e.body).where(e.seq == row.seq)).scalar()
    body = json.loads(event) if event else {}
    values = {k: row._mapping[k] for k in body if k in row._mapping and k != "findings"}
    same = bool(body) and all(
        hash_chain.canonical(value) == hash_chain.canonical(body[name])
        for name, value in batch_body({"findings": "", **values}, tx.people).items()
        if name != "findings"  # words, of which a name may have been erased
    )
    if not same or row.root != hash_chain.merkle_root(
        hash_chain.leaf_hashes(stored_rows(tx.connection, schema.decisions, row.sequence))
    ):
        raise LedgerMismatch(
            f"batch {row.batch_id}: its decisions or its record are not those that were recorded and approved: nothing "
            "of it is sent. signalbox verify says what was changed; decide the day again"
        )


def take_back(tx: Transaction, lease: Lease, batch_id: str, entities: Collection[str] = ()) -> int:
    d = schema.deliveries
    row = open_batch(tx, lease, batch_id)
    numbers = left_standing(tx, row, lease.system, entities)
    if not numbers:
        return 0
    rows = [
        {"sequence": row.sequence, "n": n, "state": "PENDING", "attempts": 0, "repeats": 0} for n in sorted(numbers)
    ]
    tx.connection.execute(insert(d), rows)
    body = {"batch_id": batch_id, "workflow": row.workflow, "system": lease.system, "fence": lease.fence}
    tx.append("taken back", {**body, "n": numbers})
    return len(numbers)


def close_push(tx: Transaction, lease: Lease, batch_id: str, complete: bool) -> None:
    leases.check_fence(tx, lease)
    tx.lock()
    if batches.find(tx, batch_id).delivery == "COMPLETE":
        return
    row = open_batch(tx, lease, batch_id)
    seal(tx, lease, row, complete)


def seal(tx: Transaction, lease: Lease, row: AnyRow, complete: bool) -> None:
    d, b = schema.deliveries.c, schema.batches
    query = select(d.state, func.count()).where(d.sequence == row.sequence).group_by(d.state)
    counts = {state: count for state, count in tx.connection.execute(query)}
    left = sum(counts.get(state, 0) for state in OPEN)
    if complete and left:
        raise LedgerError(f"batch {row.batch_id} is not complete: {left} deliveries are still open")
    body = {
        "batch_id": row.batch_id, "workflow": row.workflow, "system": lease.system, "fence": lease.fence,
        "complete": complete, "counts": counts, **roots(tx.connection, row.sequence),
    }  # fmt: skip
    tx.append("push ended", body)
    tx.opened.discard((row.batch_id, lease.fence))
    if complete:
        tx.connection.execute(
            update(b)
            .where(b.c.sequence == row.sequence)
            .values(delivery="COMPLETE", system=lease.system, counts=hash_chain.canonical(counts))
        )


def supersede(tx: Transaction, lease: Lease, older_batch_ids: Sequence[str], by: str) -> None:
    d, b = schema.deliveries, schema.batches
    leases.check_fence(tx, lease)
    tx.lock()
    batches.find(tx, by)
    says = f"superseded by {by}"
    for batch_id in older_batch_ids:
        row = batches.find(tx, batch_id)
        if row.delivery == "COMPLETE" or batch_id == by:
            continue
        if row.system not in (None, lease.system):
            raise LedgerMismatch(f"batch {batch_id} is delivered to {row.system}, the lease is one of {lease.system}")
        skipped = tx.connection.execute(
            update(d)
            .where(d.c.sequence == row.sequence, d.c.state == "PENDING")
            .values(state="SKIPPED", says=says, says_digest=tx.people.text(says))
        ).rowcount
        body = {"batch_id": batch_id, "workflow": row.workflow, "system": lease.system, "fence": lease.fence}
        tx.append("superseded", {**body, "by": by, "skipped": skipped})
        tx.connection.execute(
            update(b)
            .where(b.c.sequence == row.sequence)
            .values(superseded_by=by, delivery="OPEN", system=lease.system, counts=None)
        )
        open_left = tx.connection.execute(
            select(func.count()).where(d.c.sequence == row.sequence, d.c.state.in_(OPEN))
        ).scalar()
        if not open_left:
            seal(tx, lease, row, complete=True)


def would_take_back(tx: Transaction, system: str, batch_id: str) -> list[Delivery]:
    c, e = schema.decisions, schema.names
    row = batches.find(tx, batch_id)
    numbers = left_standing(tx, row, system, ())
    found: list[Delivery] = []
    for some in chunks(numbers):
        query = (
            select(c.c.n, c.c.decision_id, e.c.name, c.c.arm, c.c.before, c.c.after, c.c.expected_gain)
            .select_from(c.outerjoin(e, e.c.digest == c.c.entity))
            .where(c.c.sequence == row.sequence, c.c.n.in_(some))
            .order_by(c.c.n)
        )
        nothing = dict.fromkeys(("target", "expected", "sent", "prior", "observed", "verified_at", "says"))
        found += [
            Delivery(
                batch_id, n, decision, entity, arm, before, after, gain, "PENDING", attempts=0, repeats=0, **nothing
            )
            for n, decision, entity, arm, before, after, gain in tx.connection.execute(query)
        ]
    return found


def left_standing(tx: Transaction, row: AnyRow, system: str, entities: Collection[str]) -> list[int]:
    """Decisions of a batch that change nothing, have no delivery, and whose entity shows an earlier batch's value."""
    k, b, c, d = schema.acknowledged, schema.batches, schema.decisions, schema.deliveries
    same_day = and_(b.c.day == row.day, b.c.kind == "decision", b.c.sequence < row.sequence)
    # Whoever proved last: where that was another workflow, what this one had proved before may stand there again.
    since = select(k.c.entity).join(b, b.c.sequence == k.c.sequence)
    since = since.where(
        k.c.system == system, (k.c.verified_at > row.as_of) | and_(b.c.workflow == row.workflow, same_day)
    )
    own = acknowledged.last_proven(tx, system, tx.connection.execute(since).scalars().all(), row.workflow)
    stands: dict[str, int | None] = {
        entity: one.value
        for entity, one in own.items()
        if one.kind == "decision"
        and one.sequence < row.sequence
        and (one.verified_at > row.as_of or one.day == row.day)
    }
    # What a system made of an earlier write of the day, or what that write replaced, proves no value of ours.
    odd = (
        select(c.c.entity, d.c.observed)
        .select_from(
            d.join(c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n)).join(b, b.c.sequence == d.c.sequence)
        )
        .where(
            b.c.workflow == row.workflow, same_day, d.c.state.in_(("REJECTED", "OVERWRITTEN")), d.c.sent.is_not(None),
            d.c.observed.is_not(None), d.c.observed != d.c.prior,
        )
    )  # fmt: skip
    stands = {one.entity: one.observed for one in tx.connection.execute(odd)} | stands
    stands |= dict.fromkeys(tx.people.digests("entity", list(entities)))
    if not stands:
        return []
    left = select_bulk(
        tx.connection,
        'SELECT n, entity, "after" FROM decisions WHERE sequence = ? AND changed = 0 AND "after" IS NOT NULL',
        [row.sequence],
        pa.schema({"n": pa.int64(), "entity": pa.string(), "after": pa.int64()}),
    )
    left = left.filter(pc.is_in(left["entity"], pa.array(list(stands), pa.string())))
    numbers = {r["n"] for r in left.to_pylist() if stands[r["entity"]] != r["after"]}
    for some in chunks(sorted(numbers)):
        known = select(d.c.n).where(d.c.sequence == row.sequence, d.c.n.in_(some))
        numbers -= set(tx.connection.execute(known).scalars())
    return sorted(numbers)
