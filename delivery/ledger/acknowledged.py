"""Acknowledged values: what a read-back proved last of each entity, by whom, and what was proved in a time.

Belongs here: looking up proven values. Does not: writing them down (``delivery.ledger.deliveries`` settles a delivery).
A function that bears the name of a method of ``Ledger`` is what that method does
inside its transaction: what it means and raises stands there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime

import pyarrow as pa
from sqlalchemy import and_, select

from delivery.ledger import schema
from delivery.ledger.database import chunks
from delivery.ledger.records import Acknowledged
from delivery.ledger.transaction import AnyRow, Transaction


def proved_last(tx: Transaction, system: str, entities: Sequence[str]) -> dict[str, tuple[datetime, int, int]]:
    """When the value that stands acknowledged of each entity was proved, and by which delivery."""
    k = schema.acknowledged.c
    found: dict[str, tuple[datetime, int, int]] = {}
    for some in chunks(entities):
        query = select(k.entity, k.verified_at, k.sequence, k.n).where(k.system == system, k.entity.in_(some))
        found |= {row.entity: (row.verified_at, row.sequence, row.n) for row in tx.connection.execute(query)}
    return found


def acknowledged(
    tx: Transaction, system: str, entities: Sequence[str], *, workflow: str | None = None
) -> dict[str, Acknowledged]:
    by_digest = dict(zip(tx.people.digests("entity", entities), entities, strict=True))
    own = last_proven(tx, system, by_digest, workflow)
    return {by_digest[digest]: Acknowledged(row.value, row.verified_at, row.batch_id) for digest, row in own.items()}


def last_proven(tx: Transaction, system: str, digests: Iterable[str], workflow: str | None) -> dict[str, AnyRow]:
    k, b = schema.acknowledged, schema.batches
    rows = select(
        k.c.entity, k.c.target, k.c.value, k.c.verified_at, k.c.sequence, b.c.batch_id, b.c.workflow, b.c.kind, b.c.day
    ).join(b, b.c.sequence == k.c.sequence)
    own: list[AnyRow] = []
    # Two steps, each along an index: the entities, then whoever else shares their targets.
    for some in chunks(digests):
        own += tx.connection.execute(rows.where(k.c.system == system, k.c.entity.in_(some))).all()
    targets: list[AnyRow] = []
    for some in chunks({row.target for row in own if row.target}):
        targets += tx.connection.execute(rows.where(k.c.system == system, k.c.target.in_(some))).all()
    if workflow is not None and (others := {r.entity for r in (*own, *targets) if r.workflow != workflow}):
        before = proved_by(tx, system, others, workflow)
        own, targets = (
            [before.get(r.entity, r) if r.workflow != workflow else r for r in some] for some in (own, targets)
        )
        own, targets = ([r for r in some if r.workflow == workflow] for some in (own, targets))
    latest: dict[str, AnyRow] = {}
    for row in targets:
        known = latest.get(row.target)
        if known is None or (known.verified_at, known.sequence) < (row.verified_at, row.sequence):
            latest[row.target] = row
    return {row.entity: latest.get(row.target, row) for row in own}


def proved_by(tx: Transaction, system: str, digests: Iterable[str], workflow: str) -> dict[str, AnyRow]:
    """A workflow's own last proven values, where another workflow has proved one on the same entity since."""
    d, c, b = schema.deliveries, schema.decisions, schema.batches
    query = (
        select(
            c.c.entity, d.c.target, d.c.observed.label("value"), d.c.verified_at, d.c.sequence, b.c.batch_id, b.c.workflow,
            b.c.kind, b.c.day,
        )
        .select_from(
            d.join(c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n)).join(b, b.c.sequence == d.c.sequence)
        )
        .where(b.c.workflow == workflow, b.c.system == system, d.c.state == "ACKED")
        .order_by(d.c.verified_at, d.c.sequence)
    )  # fmt: skip
    found: dict[str, AnyRow] = {}
    for some in chunks(digests):
        found |= {row.entity: row for row in tx.connection.execute(query.where(c.c.entity.in_(some)))}
    return found


def setters(tx: Transaction, system: str, entities: Sequence[str], workflow: str) -> dict[str, tuple[int, str]]:
    by_digest = dict(zip(tx.people.digests("entity", entities), entities, strict=True))
    k, b = schema.acknowledged, schema.batches
    rows = select(k.c.entity, k.c.value, b.c.workflow).join(b, b.c.sequence == k.c.sequence)
    found: dict[str, tuple[int, str]] = {}
    for some in chunks(by_digest):
        query = rows.where(k.c.system == system, k.c.entity.in_(some), b.c.workflow != workflow)
        found |= {by_digest[r.entity]: (r.value, r.workflow) for r in tx.connection.execute(query)}
    return found


def proven(tx: Transaction, workflow: str, since: datetime, until: datetime) -> pa.Table:
    b, d, c, k, e = schema.batches.c, schema.deliveries, schema.decisions, schema.acknowledged, schema.names
    whole = select(d.c.sequence, c.c.entity, d.c.observed.label("value"), d.c.prior, d.c.verified_at).join(
        c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n)
    )
    ours = (d.c.state == "ACKED") | ((d.c.state == "OVERWRITTEN") & (d.c.observed == d.c.sent))
    last = select(k.c.sequence, k.c.entity, k.c.value, k.c.value.label("prior"), k.c.verified_at)
    found: list[AnyRow] = []
    batches = {
        row.sequence: row
        for row in tx.connection.execute(
            select(b.sequence, b.batch_id, b.kind, b.day, b.retired).where(b.workflow == workflow, b.delivery != "NONE")
        )
    }
    pushed = pushed_since(tx, workflow, since)
    for some in chunks(s for s, row in batches.items() if row.batch_id in pushed and not row.retired):
        inside = (d.c.verified_at > since) & (d.c.verified_at <= until)
        found += tx.connection.execute(whole.where(d.c.sequence.in_(some), ours, inside)).all()
    for some in chunks(s for s, row in batches.items() if row.batch_id in pushed and row.retired):
        inside = (k.c.verified_at > since) & (k.c.verified_at <= until)
        found += tx.connection.execute(last.where(k.c.sequence.in_(some), inside)).all()
    known: dict[str, str] = {}
    for some in chunks({row.entity for row in found}):
        names = tx.connection.execute(select(e.c.digest, e.c.name).where(e.c.digest.in_(some)))
        known |= {row.digest: row.name for row in names}
    found = sorted((r for r in found if r.entity in known), key=lambda r: (r.verified_at, r.sequence, r.entity))
    of = [batches[r.sequence] for r in found]
    return pa.table(
        {
            "entity_id": pa.array([known[r.entity] for r in found], pa.string()),
            "value": pa.array([r.value for r in found], pa.int64()),
            "prior": pa.array([r.prior for r in found], pa.int64()),
            "verified_at": pa.array([r.verified_at for r in found], pa.timestamp("us")),
            "batch_id": pa.array([b.batch_id for b in of], pa.string()),
            "sequence": pa.array([r.sequence for r in found], pa.int64()),
            "kind": pa.array([b.kind for b in of], pa.string()),
            "day": pa.array([b.day for b in of], pa.date32()),
        }
    )


def pushed_since(tx: Transaction, workflow: str, since: datetime) -> set[str]:
    """Batches of a workflow of which a push was under way at some time after ``since``."""
    e, b = schema.events.c, schema.batches.c
    ended = select(e.body).where(e.kind.in_(["push begun", "push ended"]), e.at > since)
    bodies = (json.loads(row.body) for row in tx.connection.execute(ended))
    still = select(b.batch_id).where(b.workflow == workflow, b.delivery == "OPEN")
    return {body["batch_id"] for body in bodies if body.get("workflow") == workflow} | set(
        tx.connection.execute(still).scalars()
    )
