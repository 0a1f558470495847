"""What rollbacks hold and leave: which are pending, and which newer batch holds an entity or a target.

Belongs here: questions about batches that are taken back. Does not: taking one back (``delivery.rollback``).
A function that bears the name of a method of ``Ledger`` is what that method does
inside its transaction: what it means and raises stands there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Connection, and_, func, select

from delivery.ledger import batches, schema
from delivery.ledger.database import chunks
from delivery.ledger.records import Leftover
from delivery.ledger.transaction import Transaction

_STOOD = "d.state IN ('ACKED', 'OVERWRITTEN')"


_ROWS = "deliveries d JOIN decisions c ON c.sequence = d.sequence AND c.n = d.n"


_PROVED = f"SELECT c.entity, MAX(d.sequence) FROM {_ROWS}"


_PROVED_AT = "SELECT d.target, MAX(d.sequence) FROM deliveries d"


_OF_ORIGINAL = "c.decision_id = substr(uc.decision_id, 10) AND c.sequence + 0 = {newer}"


_NOT_BACK = (
    'SELECT c.entity, d.target, uc."after" FROM deliveries u JOIN decisions uc ON uc.sequence = u.sequence AND uc.n = u.n'
    f" JOIN decisions c ON {_OF_ORIGINAL} JOIN deliveries d ON d.sequence = c.sequence AND d.n = c.n"
    f" WHERE u.sequence = {{undoing}} AND {_STOOD}"
    " AND (u.state IN ('SKIPPED', 'REJECTED', 'PENDING', 'UNKNOWN', 'IN_FLIGHT')"
    " OR (u.state = 'ACKED' AND u.observed <> uc.\"after\"))"
)


_LEFT = (
    'SELECT d.sequence, c.entity, c."before", c."after", d.state, d.observed FROM ' + _ROWS +
    " WHERE d.sequence IN ({undone}) AND d.state IN ('SKIPPED', 'PENDING', 'CONFLICT', 'ACKED')"
    " AND c.entity IN (SELECT entity FROM decisions WHERE sequence = {mine})"
)  # fmt: skip


def _waiting(undoing: int, newer: int) -> str:
    """Deliveries of a rollback that were not sent yet, with the entity and the target that the batch had found for it."""
    return (
        "SELECT u.n, uc.entity AS entity, d.target AS target FROM deliveries u"
        " JOIN decisions uc ON uc.sequence = u.sequence AND uc.n = u.n"
        f" LEFT JOIN decisions c ON {_OF_ORIGINAL.format(newer=newer)}"
        " LEFT JOIN deliveries d ON d.sequence = c.sequence AND d.n = c.n"
        f" WHERE u.sequence = {undoing} AND u.state = 'PENDING' AND u.sent IS NULL"
    )


def _raw(connection: Connection, statement: str) -> list[tuple[Any, ...]]:
    """Rows of a query in which no value comes from outside, without SQLAlchemy's cost for each cell."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement)
        return list(cursor.fetchall())
    finally:
        cursor.close()


def pending(tx: Transaction, workflow: str) -> list[str]:
    r, b = schema.rollbacks, schema.batches
    query = select(r.c.batch_id, r.c.action).join(b, b.c.batch_id == r.c.batch_id).where(b.c.workflow == workflow)
    last = {row.batch_id: row.action for row in tx.connection.execute(query.order_by(r.c.seq))}
    return [batch_id for batch_id, action in last.items() if action == "asked"]


def taken_back_since(tx: Transaction, batch_id: str) -> str | None:
    b, d = schema.batches, schema.deliveries
    row = batches.find(tx, batch_id)
    proven = select(d.c.n).where(d.c.sequence == b.c.sequence, d.c.verified_at > row.recorded_at)
    later = select(b.c.sequence, b.c.batch_id).where(
        b.c.workflow == row.workflow, b.c.kind == "rollback", (b.c.sequence > row.sequence) | proven.exists()
    )
    undone = tx.connection.execute(later.order_by(b.c.sequence.desc())).all()
    mine = changed_entities(tx, row.sequence) if undone else pa.array([], pa.string())
    for one in undone:
        since = None if one.sequence > row.sequence else row.recorded_at
        if pc.any(pc.is_in(changed_entities(tx, one.sequence, since), mine)).as_py():
            return str(one.batch_id)
    return None


def changed_entities(tx: Transaction, sequence: int, proven_since: datetime | None = None) -> pa.Array:
    """The digests of the entities that a batch changes; ``proven_since``: of which it proved a value after that."""
    c, d = schema.decisions, schema.deliveries
    query = select(c.c.entity).where(c.c.sequence == sequence, c.c.changed != 0)
    if proven_since is not None:
        query = query.join(d, and_(d.c.sequence == c.c.sequence, d.c.n == c.c.n))
        query = query.where(d.c.verified_at > proven_since)
    return pa.array(tx.connection.execute(query).scalars().all(), pa.string())


def held_by(
    tx: Transaction, undoing: str, batch_id: str, standing: Sequence[str], undone: Sequence[str]
) -> dict[int, str]:
    of = sequences(tx, [undoing, batch_id, *standing, *undone])
    named = {sequence: name for name, (sequence, _) in of.items()}
    waiting = _waiting(of[undoing][0], of[batch_id][0])
    held: dict[str, int] = {}
    for column, query in (("entity", _PROVED), ("target", _PROVED_AT)):
        for some in chunks(of[name][0] for name in standing):
            where = f"d.sequence IN ({', '.join(map(str, some))}) AND {column} IN (SELECT {column} FROM ({waiting}) w)"
            for key, sequence in _raw(tx.connection, f"{query} WHERE {where} AND {_STOOD} GROUP BY {column}"):
                held[key] = max(sequence, held.get(key, 0))
    for name in undone:
        sequence, reverses = of[name]
        newer = batches.find(tx, reverses).sequence if reverses else 0
        named[newer] = reverses or ""
        kept = _raw(tx.connection, _NOT_BACK.format(undoing=sequence, newer=newer))
        past = brought_back(tx, of[undoing][0], {entity for entity, *_ in kept}) if kept else {}
        for entity, target, after in kept:
            if past.get((entity, after), 0) > newer:
                continue  # a newer batch's rollback has brought back what stood before this one
            for key in (entity, target):
                if key is not None:
                    held[key] = max(newer, held.get(key, 0))
    rows = _raw(tx.connection, waiting) if held else []
    found = {n: held.get(entity) or held.get(target or "") for n, entity, target in rows}
    return {n: named[sequence] for n, sequence in found.items() if sequence}


def brought_back(tx: Transaction, undoing: int, entities: Collection[str]) -> dict[tuple[str, int], int]:
    """What rollbacks of the same workflow brought back: (entity, value) → the newest batch of which it was."""
    d, c, r = schema.deliveries, schema.decisions, schema.batches.alias("r")
    original, mine = schema.batches.alias("o"), schema.batches.alias("m")
    query = (
        select(c.c.entity, c.c.after, func.max(original.c.sequence))
        .select_from(
            d.join(c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n))
            .join(r, r.c.sequence == d.c.sequence)
            .join(original, original.c.batch_id == r.c.reverses)
            .join(mine, mine.c.workflow == r.c.workflow)
        )
        .where(mine.c.sequence == undoing, d.c.state == "ACKED", d.c.observed == c.c.after)
        .group_by(c.c.entity, c.c.after)
    )
    found: dict[tuple[str, int], int] = {}
    for some in chunks(entities):
        rows = tx.connection.execute(query.where(c.c.entity.in_(some)))
        found |= {(entity, after): int(newest) for entity, after, newest in rows}
    return found


def left_of(tx: Transaction, batch_id: str, undone: Sequence[str]) -> list[Leftover]:
    mine = batches.find(tx, batch_id).sequence
    of = {sequence: name for name, (sequence, _) in sequences(tx, undone).items()}
    rows: list[tuple[Any, ...]] = []
    for some in chunks(of):
        rows += _raw(tx.connection, _LEFT.format(undone=", ".join(map(str, some)), mine=mine))
    numbers = dict(_raw(tx.connection, f"SELECT entity, n FROM decisions WHERE sequence = {mine}")) if rows else {}
    return [Leftover(of[sequence], numbers[entity], *rest) for sequence, entity, *rest in rows]


def sequences(tx: Transaction, batch_ids: Sequence[str]) -> dict[str, tuple[int, str | None]]:
    """Name → number, and the batch that it reverses."""
    b = schema.batches.c
    found: dict[str, tuple[int, str | None]] = {}
    for some in chunks(batch_ids):
        rows = tx.connection.execute(select(b.batch_id, b.sequence, b.reverses).where(b.batch_id.in_(some)))
        found |= {row.batch_id: (row.sequence, row.reverses) for row in rows}
    return found
