"""Rows that repeat an event of the chain (approvals, approvers, switches, promotions, rollbacks), and the events themselves.

Belongs here: reading them with names for digests; who is an approver. Does not: appending (``delivery.ledger.transaction``),
who may approve (``delivery.approvals``), or the proof (``delivery.ledger.verify``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Table, select, update

from delivery.ledger import schema
from delivery.ledger.pseudonyms import MARK, PEOPLE, digests_in, unsealed
from delivery.ledger.records import Event
from delivery.ledger.transaction import JSON, Transaction


def events(tx: Transaction, kind: str | None = None, workflow: str | None = None) -> list[Event]:
    query = select(schema.events).order_by(schema.events.c.seq)
    if kind is not None:
        query = query.where(schema.events.c.kind == kind)
    rows = [(row, json.loads(row.body)) for row in tx.connection.execute(query)]
    rows = [(row, body) for row, body in rows if workflow is None or body.get("workflow") == workflow]
    known = tx.names((body.get(key) for _, body in rows for key in PEOPLE))
    deep = {row.seq for row, _ in rows if MARK in row.body}
    known |= tx.names((d for row, body in rows if row.seq in deep for d in digests_in(body)))
    return [
        Event(
            row.seq, row.at, row.kind,
            {
                k: known.get(v) if k in PEOPLE else unsealed(v, known) if row.seq in deep else v
                for k, v in body.items()
            },
            row.previous, row.hash,
        )
        for row, body in rows
    ]  # fmt: skip


def chained_rows(tx: Transaction, table: Table, columns: Sequence[Any], where: Any = None) -> list[list[Any]]:
    """Rows of a chained table, oldest first, with names for digests and values for JSON."""
    query = select(*columns).order_by(table.c.seq)
    if where is not None:
        query = query.where(where)
    rows = tx.connection.execute(query).all()
    known = tx.names(getattr(row, c.name) for row in rows for c in columns if c.name in PEOPLE)
    said = [getattr(row, c.name) for row in rows for c in columns if c.name in JSON]
    known |= tx.names(d for words in said if MARK in words for d in digests_in(json.loads(words)))
    return [
        [
            known.get(value) if c.name in PEOPLE else unsealed(json.loads(value), known) if c.name in JSON else value
            for c, value in zip(columns, row, strict=True)
        ]
        for row in rows
    ]


def set_approver(tx: Transaction, name: str, active: bool, secret_hash: str | None) -> None:
    a = schema.approvers
    digest = tx.people.digest("person", name)
    tx.connection.execute(update(a).where(a.c.approver == digest).values(secret_hash=None))
    values = {"approver": name, "active": active, "secret_hash": secret_hash, "at": tx.clock()}
    tx.record("approver", values)
