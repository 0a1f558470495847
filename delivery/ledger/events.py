"""What an event of the chain says of a row, and the rows as they are hashed: what is written and what is proved go by it.

Belongs here: the bodies of events, the rows under a Merkle root, which tables repeat events. Does not: appending an event
(``delivery.ledger``), hashing itself (``delivery.ledger.hash_chain``), or the proof (``delivery.ledger.verify``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pyarrow as pa
from sqlalchemy import Connection, Table

from delivery.ledger import hash_chain, schema
from delivery.ledger.database import is_sqlite, select_bulk
from delivery.ledger.pseudonyms import People

CHAINED = {
    "approval": schema.approvals,
    "approver": schema.approvers,
    "rollback": schema.rollbacks,
    "switch": schema.switches,
    "promotion": schema.promotions,
}
"""Kinds of event that a table repeats row by row."""
WORDS = (
    schema.deliveries.c.says, schema.attempts.c.says, schema.batches.c.findings, schema.approvals.c.reason,
    schema.rollbacks.c.reason, schema.switches.c.reason,
)  # fmt: skip
"""Columns of free words, which may quote a name: the chain holds a keyed digest of each text, so that they can be erased."""
_WORDS = frozenset({"reason", "secret_hash"})


def body_of(values: Mapping[str, Any], people: People) -> dict[str, Any]:
    """The event's body for a row of a chained table: free words as digests."""
    return {k: people.text(v) if k in _WORDS else v for k, v in values.items()}


def batch_body(values: Mapping[str, Any], people: People) -> dict[str, Any]:
    """The event's body for a batch: everything that it was recorded with; findings may name somebody."""
    body = dict(values)
    body["record"] = json.loads(body["record"])
    body["pools"] = None if body["pools"] is None else json.loads(body["pools"])
    body["findings"] = people.text(body["findings"])
    return body


def stored_rows(
    connection: Connection, table: Table, sequence: int | None = None, *, with_words: bool = False
) -> pa.Table:
    """Rows of a table as they are hashed, in the key's order: of one batch all columns but ``sequence``, else all columns.

    Free words are left out, for they may be erased; ``with_words``: they stand in the last column, for ``root_of`` to drop.
    """
    fields, columns = [], []
    for column in table.columns:
        if (column.name == "sequence" and sequence is not None) or column.name == "says":
            continue
        kind = column.type.python_type
        shown = f'"{column.name}"'
        if kind is datetime and not is_sqlite(connection):
            shown = f"to_char({shown}, 'YYYY-MM-DD HH24:MI:SS.US')"  # as SQLite keeps it
        columns.append(shown)
        fields.append((column.name, {int: pa.int64(), float: pa.float64()}.get(kind, pa.string())))
    if with_words and "says" in table.columns:
        columns.append("says")
        fields.append(("says", pa.string()))
    query = f'SELECT {", ".join(columns)} FROM "{table.name}"'
    key = [c.name for c in table.primary_key.columns if c.name != "sequence" or sequence is None]
    if sequence is None:
        # Sorted here: databases sort text each in their own way.
        return select_bulk(connection, query, [], pa.schema(fields)).sort_by([(name, "ascending") for name in key])
    order = ", ".join(f'"{name}"' for name in key)
    return select_bulk(connection, f"{query} WHERE sequence = ? ORDER BY {order}", [sequence], pa.schema(fields))


def root_of(rows: pa.Table) -> str:
    """The Merkle root over rows as ``stored_rows`` gives them."""
    return hash_chain.merkle_root(
        hash_chain.leaf_hashes(rows.drop_columns("says") if "says" in rows.column_names else rows)
    )


def roots(connection: Connection, sequence: int) -> dict[str, str]:
    """Merkle roots over what a push left of a batch."""
    pushed = (schema.deliveries, schema.attempts, schema.conflicts)
    return {table.name: root_of(stored_rows(connection, table, sequence)) for table in pushed}
