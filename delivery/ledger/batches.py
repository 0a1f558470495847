"""Batches: recording one with its decisions and deliveries, which of them counts, and reading them.

Belongs here: the rows of batches. Does not: the rows of decisions (``delivery.ledger.decisions``), or pushing a batch
(``delivery.ledger.pushes``).
A function that bears the name of a method of ``Ledger`` is what that method does
inside its transaction: what it means and raises stands there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import func, insert, select

from delivery.ledger import hash_chain, schema
from delivery.ledger.database import DaySent, LedgerMismatch, Unknown, chunks, insert_bulk
from delivery.ledger.events import batch_body
from delivery.ledger.pseudonyms import MARK, PEOPLE, digests_in, unsealed
from delivery.ledger.records import BatchRow, NewBatch, generation
from delivery.ledger.transaction import AnyRow, Transaction


def record(
    tx: Transaction, new: NewBatch, stored: pa.Table, root: str, mapping: pa.Table, *, unless_sent: bool
) -> BatchRow:
    """``Ledger.record_batch``, of rows as ``decisions.to_stored`` gives them, and the Merkle root over them."""
    b = schema.batches.c
    tx.lock()
    row = tx.connection.execute(select(schema.batches).where(b.batch_id == new.batch_id)).first()
    if row is not None and (row.digest, row.root) != (new.digest, root):
        raise LedgerMismatch(
            f"batch {new.batch_id} stands in the ledger with another content: a batch is recorded once; "
            "decide again under a new id"
        )
    if row is not None:
        last_decided = newest(tx, row)
        if counts_still(tx, last_decided):
            return batch(tx, last_decided.batch_id)
        number = generation(last_decided.batch_id)[1] + 1
        new = replace(new, batch_id=f"{row.batch_id}.{number}")
        ids = pc.binary_join_element_wise(stored["decision_id"], str(number), ".")
        stored = stored.set_column(stored.schema.get_field_index("decision_id"), "decision_id", ids)
        root = hash_chain.merkle_root(hash_chain.leaf_hashes(stored))
    if unless_sent:
        refuse_if_sent(tx, new)
    last = tx.connection.execute(select(func.max(b.sequence))).scalar() or 0
    insert_batch(tx, new, last + 1, root, stored, mapping)
    return batch(tx, new.batch_id)


def refuse_if_sent(tx: Transaction, new: NewBatch) -> None:
    b = schema.batches.c
    day = select(schema.batches).where(b.workflow == new.workflow, b.day == new.day, b.kind == "decision")
    for one in rows_of(tx, tx.connection.execute(day).all()):
        if one.acted or one.delivery == "OPEN":
            raise DaySent(
                f"{new.workflow}: batch {one.batch_id} of {new.day} was sent while the day was decided anew, and what was "
                "decided is not recorded. Whoever wants it in the place of what was sent says so: signalbox run "
                f"{new.workflow} decide --day {new.day} --again"
            )


def newest(tx: Transaction, row: AnyRow) -> AnyRow:
    """The last time that the content of a batch was decided; a rollback is made once for the batch that it takes back."""
    if row.kind != "decision":
        return row
    b = schema.batches.c
    same = tx.connection.execute(
        select(schema.batches).where(
            b.workflow == row.workflow, b.day == row.day, b.kind == row.kind, b.sequence >= row.sequence
        )
    )
    base = generation(row.batch_id)[0]
    mine = [one for one in same if one.batch_id == row.batch_id or generation(one.batch_id)[0] == base]
    return max(mine, key=lambda one: generation(one.batch_id)[1])


def counts_still(tx: Transaction, row: AnyRow) -> bool:
    """Whether a batch is still what may be sent, or was: nothing was decided, superseded or taken back since."""
    if row.kind != "decision":
        return True
    b, r = schema.batches.c, schema.rollbacks.c
    own = tx.connection.execute(select(func.count()).where(r.batch_id == row.batch_id)).scalar()
    newer = select(func.count()).where(b.workflow == row.workflow, b.sequence > row.sequence)
    decided = tx.connection.execute(newer.where(b.kind == "decision", b.day == row.day)).scalar()
    undone = row.delivery == "NONE" and tx.connection.execute(newer.where(b.kind == "rollback")).scalar()
    # all of it was left out, by its limits from what stood then: deciding it again is another try
    skipped = row.delivery == "COMPLETE" and json.loads(row.counts or "{}").keys() == {"SKIPPED"}
    return not (row.superseded_by or own or decided or undone or skipped)


def insert_batch(tx: Transaction, new: NewBatch, sequence: int, root: str, stored: pa.Table, mapping: pa.Table) -> None:
    now = tx.clock()
    findings = [tx.people.sealed(finding) for finding in new.findings]
    record, in_record = tx.people.sealed({"record": new.record})
    values = {
        "batch_id": new.batch_id, "workflow": new.workflow, "kind": new.kind, "day": new.day, "digest": new.digest,
        "status": new.status, "step": new.step, "as_of": new.as_of, "decided_at": new.decided_at, "run_id": new.run_id,
        "record": hash_chain.canonical(record["record"]), "findings": hash_chain.canonical([body for body, _ in findings]),
        "pools": None if new.pools is None else json.dumps(dict(new.pools), sort_keys=True),
        "reverses": new.reverses, "sequence": sequence, "root": root, "rows": stored.num_rows, "changed": pc.sum(stored["changed"]).as_py() or 0,
        "recorded_at": now,
    }  # fmt: skip
    seq = tx.append("batch", batch_body(values, tx.people), now)
    tx.connection.execute(
        insert(schema.batches), {**values, "seq": seq, "delivery": "NONE", "retired": False}
    )  # fmt: skip
    tx.remember([*in_record, *(one for _, named in findings for one in named)])
    insert_bulk(tx.connection, schema.names, mapping, ignore_known=True)
    numbers = pa.array([sequence] * stored.num_rows, pa.int64())
    insert_bulk(tx.connection, schema.decisions, stored.add_column(0, "sequence", numbers))
    tx.connection.exec_driver_sql(
        "INSERT INTO deliveries (sequence, n, state, attempts, repeats) "
        f"SELECT sequence, n, 'PENDING', 0, 0 FROM decisions WHERE sequence = {int(sequence)} AND changed <> 0"
    )


def batch(tx: Transaction, batch_id: str) -> BatchRow:
    row = find(tx, batch_id)
    return rows_of(tx, [row])[0]


def find(tx: Transaction, batch_id: str) -> AnyRow:
    row = tx.connection.execute(select(schema.batches).where(schema.batches.c.batch_id == batch_id)).first()
    if row is None:
        raise Unknown(f"the ledger holds no batch {batch_id!r}: `signalbox batches` lists them")
    return row


def rows_of(tx: Transaction, rows: Sequence[AnyRow]) -> list[BatchRow]:
    d = schema.deliveries.c
    counted: dict[int, dict[str, int]] = {}
    for some in chunks(row.sequence for row in rows if row.counts is None and row.delivery == "OPEN"):
        query = select(d.sequence, d.state, func.count()).where(d.sequence.in_(some)).group_by(d.sequence, d.state)
        for sequence, state, count in tx.connection.execute(query):
            counted.setdefault(sequence, {})[state] = count
    findings = {row.sequence: json.loads(row.findings) for row in rows}
    named = [found for some in findings.values() for found in some]
    known = tx.names(found[key] for found in named for key in PEOPLE if isinstance(found.get(key), str))
    records = {row.sequence: json.loads(row.record) for row in rows}
    known |= tx.names(digests_in([named, *(records[r.sequence] for r in rows if MARK in r.record)]))
    records |= {row.sequence: unsealed(records[row.sequence], known) for row in rows if MARK in row.record}
    for found in named:
        found |= {
            k: known.get(v) if k in PEOPLE and isinstance(v, str) else unsealed(v, known) for k, v in found.items()
        }
    out = []
    for row in rows:
        own = {k: v for k, v in row._mapping.items() if k != "seq"}
        own |= {"record": records[row.sequence], "findings": findings[row.sequence]}
        own["pools"] = None if row.pools is None else json.loads(row.pools)
        if row.counts is not None:
            own["counts"] = json.loads(row.counts)
        elif row.delivery == "OPEN":
            own["counts"] = counted.get(row.sequence, {})
        else:
            own["counts"] = {"PENDING": row.changed} if row.changed else {}
        out.append(BatchRow(**own))
    return out


def batches(
    tx: Transaction,
    workflow: str | None = None,
    *,
    since: date | None = None,
    model_version: int | None = None,
    kind: str | None = None,
) -> list[BatchRow]:
    b = schema.batches.c
    query = select(schema.batches).order_by(b.sequence)
    if workflow is not None:
        query = query.where(b.workflow == workflow)
    if since is not None:
        query = query.where(b.day >= since)
    if kind is not None:
        query = query.where(b.kind == kind)
    rows = rows_of(tx, tx.connection.execute(query).all())
    by = ("model_version", "challenger_version")
    return [row for row in rows if model_version is None or str(model_version) in {str(row.record.get(k)) for k in by}]
