"""Deliveries: what is about to be tried, what became of it, and reading both.

Belongs here: the rows of deliveries, attempts and conflicts. Does not: beginning and ending a push (``delivery.ledger.pushes``).
A function that bears the name of a method of ``Ledger`` is what that method does
inside its transaction: what it means and raises stands there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import pyarrow as pa
from sqlalchemy import and_, bindparam, delete, insert, select, text, update

from delivery.ledger import acknowledged, batches, pushes, schema
from delivery.ledger.database import LedgerError, Unknown, chunks, is_sqlite, select_bulk
from delivery.ledger.leases import Lease
from delivery.ledger.records import FINAL, OPEN, Attempt, AttemptRow, Conflict, Delivery, Result
from delivery.ledger.transaction import AnyRow, Transaction

_DELIVERED = pa.schema(
    {"n": pa.int64(), "state": pa.string(), "sent": pa.int64(), "observed": pa.int64(), "verified_at": pa.string()}
)


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value


_ACKNOWLEDGE = text(
    "INSERT INTO acknowledged (system, entity, target, value, verified_at, sequence, n) "
    "VALUES (:system, :entity, :target, :value, :verified_at, :sequence, :n) ON CONFLICT (system, entity) DO UPDATE SET "
    "target = excluded.target, value = excluded.value, verified_at = excluded.verified_at, sequence = excluded.sequence, "
    "n = excluded.n"
).bindparams(bindparam("verified_at", type_=schema.acknowledged.c.verified_at.type))


def deliveries(tx: Transaction, batch_id: str, states: Collection[str] | None = None) -> list[Delivery]:
    d = schema.deliveries.c
    where = [d.sequence == batches.find(tx, batch_id).sequence]
    if states is not None:
        where.append(d.state.in_(list(states)))
    return read_deliveries(tx, where)


def delivered(tx: Transaction, batch_id: str) -> pa.Table:
    sequence = batches.find(tx, batch_id).sequence
    at = "verified_at" if is_sqlite(tx.connection) else "to_char(verified_at, 'YYYY-MM-DD HH24:MI:SS.US')"
    query = f"SELECT n, state, sent, observed, {at} FROM deliveries WHERE sequence = ? ORDER BY n"
    raw = select_bulk(tx.connection, query, [sequence], _DELIVERED)
    return raw.set_column(4, "verified_at", raw["verified_at"].cast(pa.timestamp("us")))


def read_deliveries(tx: Transaction, where: Sequence[Any]) -> list[Delivery]:
    d, c, b = schema.deliveries, schema.decisions, schema.batches
    entity, target = schema.names.alias("e"), schema.names.alias("t")
    query = (
        select(
            b.c.batch_id, d.c.n, c.c.decision_id, entity.c.name, c.c.arm, c.c.before, c.c.after, c.c.expected_gain,
            d.c.state, target.c.name, d.c.expected, d.c.sent, d.c.prior, d.c.observed, d.c.verified_at, d.c.attempts,
            d.c.repeats, d.c.says,
        )
        .select_from(
            d.join(c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n))
            .join(b, b.c.sequence == d.c.sequence)
            .outerjoin(entity, entity.c.digest == c.c.entity)
            .outerjoin(target, target.c.digest == d.c.target)
        )
        .where(*where)
        .order_by(d.c.sequence, d.c.n)
    )  # fmt: skip
    return [Delivery(*tuple(row)) for row in tx.connection.execute(query)]


def attempts(tx: Transaction, batch_id: str, n: int | None = None) -> list[AttemptRow]:
    a = schema.attempts.c
    query = select(
        a.n, a.attempt, a.value, a.expected, a.idempotency_key, a.started_at, a.ended_at, a.outcome, a.window_ms,
        a.says,
    ).where(a.sequence == batches.find(tx, batch_id).sequence)  # fmt: skip
    if n is not None:
        query = query.where(a.n == n)
    return [AttemptRow(batch_id, *tuple(row)) for row in tx.connection.execute(query.order_by(a.n, a.attempt))]


def conflicts(tx: Transaction, batch_id: str) -> list[Conflict]:
    k, c, e = schema.conflicts, schema.decisions, schema.names
    query = (
        select(k.c.n, e.c.name, k.c.state, k.c.expected, k.c.found, k.c.sent, k.c.at)
        .select_from(
            k.join(c, and_(c.c.sequence == k.c.sequence, c.c.n == k.c.n)).outerjoin(e, e.c.digest == c.c.entity)
        )
        .where(k.c.sequence == batches.find(tx, batch_id).sequence)
        .order_by(k.c.n)
    )
    return [Conflict(batch_id, *tuple(row)) for row in tx.connection.execute(query)]


def find_deliveries(tx: Transaction, row: AnyRow, numbers: Sequence[int]) -> dict[int, AnyRow]:
    d, c = schema.deliveries, schema.decisions
    if len(set(numbers)) != len(numbers):
        raise LedgerError(f"batch {row.batch_id}: a delivery is named twice in one call")
    found: dict[int, AnyRow] = {}
    for some in chunks(numbers):
        query = (
            select(d, c.c.entity)
            .select_from(d.join(c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n)))
            .where(d.c.sequence == row.sequence, d.c.n.in_(some))
        )
        found |= {r.n: r for r in tx.connection.execute(query)}
    absent = set(numbers) - found.keys()
    if absent:
        raise Unknown(f"batch {row.batch_id} has no delivery {min(absent)}")
    return found


def begin(tx: Transaction, lease: Lease, batch_id: str, attempts: Sequence[Attempt]) -> None:
    a, d = schema.attempts, schema.deliveries
    row = pushes.open_batch(tx, lease, batch_id)
    found = find_deliveries(tx, row, [one.n for one in attempts])
    for one in attempts:
        if found[one.n].state not in OPEN:
            raise LedgerError(f"batch {batch_id}: delivery {one.n} is {found[one.n].state} and is not sent again")
    again = [{"s": row.sequence, "k": o.n, "e": o.started_at} for o in attempts if found[o.n].attempts]
    if again:
        mine = and_(a.c.sequence == bindparam("s"), a.c.n == bindparam("k"), a.c.ended_at.is_(None))
        tx.connection.execute(update(a).where(mine).values(ended_at=bindparam("e"), outcome="unknown"), again)
    tx.connection.execute(
        insert(a),
        [
            {
                "sequence": row.sequence, "n": one.n, "attempt": found[one.n].attempts + 1, "value": one.value,
                "expected": one.expected, "idempotency_key": one.idempotency_key, "started_at": one.started_at,
            }
            for one in attempts
        ],
    )  # fmt: skip
    tx.connection.execute(
        update(d)
        .where(d.c.sequence == row.sequence, d.c.n == bindparam("k"))
        .values(state="IN_FLIGHT", expected=bindparam("x"), attempts=d.c.attempts + 1),
        [{"k": one.n, "x": one.expected} for one in attempts],
    )


def settle(tx: Transaction, lease: Lease, batch_id: str, results: Sequence[Result]) -> None:
    row = pushes.open_batch(tx, lease, batch_id)
    found = find_deliveries(tx, row, [one.n for one in results])
    for one in results:
        was = found[one.n].state
        if one.state not in OPEN | FINAL:
            raise LedgerError(f"batch {batch_id}: delivery {one.n}: there is no state {one.state!r}")
        if was in FINAL and one.state != was and (was, one.state) != ("ACKED", "OVERWRITTEN"):
            raise LedgerError(f"batch {batch_id}: delivery {one.n} is {was}, which stays: it cannot become {one.state}")
        if one.state == "ACKED" and (one.observed is None or one.verified_at is None):
            raise LedgerError(f"batch {batch_id}: delivery {one.n}: ACKED needs what the read-back showed, and when")
    write_results(tx, lease, row, found, results)


def write_results(
    tx: Transaction, lease: Lease, row: AnyRow, found: Mapping[int, AnyRow], results: Sequence[Result]
) -> None:
    now = tx.clock()
    targets = {one.target: tx.people.digest("target", one.target) for one in results if one.target is not None}
    tx.remember(((d, "target", t) for t, d in targets.items()))
    changes, ended, proved, met = [], [], [], []
    last = acknowledged.proved_last(tx, lease.system, [found[one.n].entity for one in results if one.verified_at])
    for one in results:
        was = found[one.n]
        said = tx.people.text(one.says)
        new = {
            "k": one.n, "state": one.state, "target": _or(targets.get(one.target or ""), was.target),
            "expected": _or(one.expected, was.expected), "sent": _or(one.sent, was.sent),
            "prior": _or(was.prior, one.prior), "observed": _or(one.observed, was.observed),
            "verified_at": _or(one.verified_at, was.verified_at), "repeats": was.repeats + int(one.repeat),
            "says": one.says, "says_digest": said,
        }  # fmt: skip
        changes.append(new)
        if was.attempts:
            ended.append(
                {
                    "k": one.n, "t": was.attempts, "e": one.ended_at or now, "o": one.outcome, "w": one.window_ms,
                    "y": one.says, "g": said,
                }
            )  # fmt: skip
        ours = one.verified_at is not None and one.observed is not None and one.observed == new["sent"]
        if one.state == "ACKED" or (one.state == "OVERWRITTEN" and ours):
            before = last.get(was.entity)
            if before is not None and before[1:] != (row.sequence, one.n):
                # A clock that was set back must not make what is proved last the older one.
                at = max(new["verified_at"], before[0])
                new["verified_at"] = at if (at, row.sequence) > before[:2] else at + timedelta(microseconds=1)
            proved.append(
                {
                    "system": lease.system, "entity": was.entity, "target": new["target"], "value": new["observed"],
                    "verified_at": new["verified_at"], "sequence": row.sequence, "n": one.n,
                }
            )  # fmt: skip
        if one.state in ("CONFLICT", "OVERWRITTEN"):
            met.append(
                {
                    "sequence": row.sequence, "n": one.n, "state": one.state, "expected": new["expected"],
                    "found": _or(one.found, new["observed"]), "sent": new["sent"], "at": one.ended_at or now,
                }
            )  # fmt: skip
    _write_rows(tx, row, changes, ended)
    if proved:
        tx.connection.execute(_ACKNOWLEDGE, proved)
    if met:
        tx.connection.execute(delete(schema.conflicts).where(
            schema.conflicts.c.sequence == row.sequence, schema.conflicts.c.n == bindparam("k")
        ), [{"k": one["n"]} for one in met])  # fmt: skip
        tx.connection.execute(insert(schema.conflicts), met)


def _write_rows(tx: Transaction, row: AnyRow, changes: list[dict[str, Any]], ended: list[dict[str, Any]]) -> None:
    """The new content of deliveries, and the ends of their open attempts."""
    d, a = schema.deliveries, schema.attempts
    names = [k for k in changes[0] if k != "k"]
    tx.connection.execute(
        update(d)
        .where(d.c.sequence == row.sequence, d.c.n == bindparam("k"))
        .values({name: bindparam(f"v_{name}") for name in names}),
        [{"k": c["k"], **{f"v_{name}": c[name] for name in names}} for c in changes],
    )
    if ended:
        tx.connection.execute(
            update(a)
            .where(
                a.c.sequence == row.sequence, a.c.n == bindparam("k"), a.c.attempt == bindparam("t"), a.c.ended_at.is_(None)
            )
            .values(
                ended_at=bindparam("e"), outcome=bindparam("o"), window_ms=bindparam("w"), says=bindparam("y"),
                says_digest=bindparam("g"),
            ),
            ended,
        )  # fmt: skip
