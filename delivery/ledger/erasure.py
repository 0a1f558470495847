"""Erasing: a name that is to be forgotten, and rows that the retention policy removes.

Belongs here: everything that removes something from the ledger while the chain still verifies. Does not: how names become
digests (``delivery.ledger.pseudonyms``).
A function that bears the name of a method of ``Ledger`` is what that method does
inside its transaction: what it means and raises stands there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from datetime import timedelta
from typing import Any

from sqlalchemy import and_, delete, func, insert, or_, select, update

from delivery.ledger import chained, hash_chain, schema
from delivery.ledger.database import chunks
from delivery.ledger.events import WORDS, root_of, stored_rows
from delivery.ledger.pseudonyms import digests_in, eraser, in_texts
from delivery.ledger.transaction import Transaction


def forget(tx: Transaction, name: str) -> int:
    n, d, c, a = schema.names, schema.deliveries, schema.decisions, schema.attempts
    digests = [tx.people.digest(kind, name) for kind in ("entity", "target", "person")]
    entity, _, person = digests
    tx.lock()
    found = set(tx.connection.execute(select(n.c.digest).where(n.c.digest.in_(digests))).scalars())
    v = schema.approvers
    last = select(v.c.active).where(v.c.approver == person).order_by(v.c.seq.desc()).limit(1)
    if found and tx.connection.execute(last).scalar():
        chained.set_approver(tx, name, False, None)
    # What holds the entity's value downstream names it too, unless other entities share it.
    at = tx.connection.execute(select(c.c.sequence, c.c.n).where(c.c.entity == entity)).all()
    targets: set[str] = set()
    for sequence, number in at:
        row = tx.connection.execute(select(d.c.target).where(d.c.sequence == sequence, d.c.n == number)).scalar()
        targets |= {row} if row else set()
        for table in (d, a):
            mine = and_(table.c.sequence == sequence, table.c.n == number)
            tx.connection.execute(update(table).where(mine).values(says=None))
    for target in targets - found:
        shared = (
            select(func.count())
            .select_from(d.join(c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n)))
            .where(d.c.target == target, c.c.entity != entity)
        )
        if not tx.connection.execute(shared).scalar():
            found.add(target)
    gone = {name, *tx.names(found).values()}
    words = erase_from_words(tx, gone)
    if found or words:
        tx.append("forgotten", {"digests": sorted(found)} | ({"words": words} if words else {}))
    return tx.connection.execute(delete(n).where(n.c.digest.in_(sorted(found)))).rowcount


def erase_from_words(tx: Transaction, names: Collection[str]) -> dict[str, str]:
    """Put ``(erased)`` in the place of names wherever free words quote them; returns digest before → digest after."""
    erase = eraser(names)
    changed: dict[str, str] = {}
    for column in WORDS:
        table, is_json = column.table, column.name == "findings"
        quoted = [json.dumps(name, ensure_ascii=False)[1:-1] if is_json else name for name in names]
        # As it is and without regard to case, which SQLite knows of ASCII alone.
        there = [column.contains(q, autoescape=True) for q in quoted]
        there += [func.lower(column).contains(q.lower(), autoescape=True) for q in quoted]
        key = list(table.primary_key.columns)
        for row in tx.connection.execute(select(*key, column).where(or_(*there))).all():
            old = row._mapping[column.name]
            new = hash_chain.canonical(in_texts(json.loads(old), erase)) if is_json else erase(old)
            if new == old:
                continue
            mine = and_(*(one == row._mapping[one.name] for one in key))
            tx.connection.execute(update(table).where(mine).values({column.name: new}))
            changed[tx.people.digest("text", old)] = tx.people.digest("text", new)
    return changed


def retire(tx: Transaction, keep_days: int) -> list[str]:
    b = schema.batches
    tx.lock()
    before = tx.clock().date() - timedelta(days=keep_days)
    query = select(b.c.sequence, b.c.batch_id).where(
        b.c.day < before, b.c.retired.is_(False), (b.c.delivery == "COMPLETE") | (b.c.status == "REFUSED")
    )
    old = tx.connection.execute(query.order_by(b.c.sequence)).all()
    if not old:
        return []
    for some in chunks(row.sequence for row in old):
        for table in (schema.attempts, schema.conflicts, schema.deliveries, schema.decisions):
            tx.connection.execute(delete(table).where(table.c.sequence.in_(some)))
        tx.connection.execute(update(b).where(b.c.sequence.in_(some)).values(retired=True))
    kept = keep_values_of_retired(tx)
    n = schema.names
    used = select(schema.decisions.c.entity).union(
        select(schema.decisions.c.unit).where(schema.decisions.c.unit.is_not(None)),
        select(schema.acknowledged.c.entity),
    )
    found = tx.connection.execute(select(b.c.findings).where(b.c.retired.is_(False), b.c.findings != "[]")).scalars()
    in_findings = quoted(tx, found)
    tx.connection.execute(delete(n).where(n.c.kind == "entity", n.c.digest.not_in(used)))
    tx.remember(in_findings)
    held = select(schema.deliveries.c.target).where(schema.deliveries.c.target.is_not(None)).union(
        select(schema.acknowledged.c.target).where(schema.acknowledged.c.target.is_not(None))
    )  # fmt: skip
    tx.connection.execute(delete(n).where(n.c.kind == "target", n.c.digest.not_in(held)))
    ids = [row.batch_id for row in old]
    tx.append("retention", {"keep_days": keep_days, "before": before, "batches": ids, **kept})
    return ids


def quoted(tx: Transaction, texts: Iterable[str]) -> list[tuple[str, str, str]]:
    """The names of entities in findings, as (digest, kind, name)."""
    digests = set()
    for findings in map(json.loads, texts):
        digests |= {*digests_in(findings)} | {found.get("entity") for found in findings}
    known = tx.names(d for d in digests if isinstance(d, str))
    return [(digest, "entity", name) for digest, name in known.items() if digest is not None]


def keep_values_of_retired(tx: Transaction) -> dict[str, Any]:
    """Copy the acknowledged values whose deliveries are gone to where they stay, and seal them: the root for the chain.

    Later deliveries may replace a row of ``acknowledged``; against the copy ``verify`` still tells what stood.
    """
    k, r, b = schema.acknowledged, schema.retired_values, schema.batches
    tx.connection.execute(delete(r))
    of_retired = select(*(k.c[c.name] for c in r.columns)).join(b, b.c.sequence == k.c.sequence).where(b.c.retired)
    tx.connection.execute(insert(r).from_select([c.name for c in r.columns], of_retired))
    rows = stored_rows(tx.connection, r)
    return {"values": rows.num_rows, "values_root": root_of(rows)}
