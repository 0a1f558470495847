"""A batch's decisions as the database keeps them, and read back as they were given.

Belongs here: the rows of decisions, both ways. Does not: recording them (``delivery.ledger.batches``).
A function that bears the name of a method of ``Ledger`` is what that method does
inside its transaction: what it means and raises stands there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import select

from delivery.ledger import batches, schema
from delivery.ledger.database import LedgerError, Unknown, chunks, select_bulk
from delivery.ledger.pseudonyms import People
from delivery.ledger.records import NewBatch
from delivery.ledger.transaction import AnyRow, Transaction

_GIVEN = (
    "decision_id", "entity_id", "unit", "arm", "arm_probability", "perturbation", "perturbation_probability", "before",
    "after", "changed", "review", "expected_gain", "reasons",
)  # fmt: skip


_RAW = pa.schema(
    {
        "decision_id": pa.string(), "entity_id": pa.string(), "unit": pa.string(), "arm": pa.string(),
        "arm_probability": pa.float64(), "perturbation": pa.float64(), "perturbation_probability": pa.float64(),
        "before": pa.int64(), "after": pa.int64(), "changed": pa.int64(), "review": pa.int64(),
        "expected_gain": pa.float64(), "reasons": pa.string(), "n": pa.int64(),
    }
)  # fmt: skip


def _numbers(size: int) -> pa.Array:
    import numpy as np

    return pa.array(np.arange(size, dtype=np.int64))


def _as_json(lists: pa.Array) -> pa.Array:
    """Lists of text as JSON text; each distinct list is written once, since a batch repeats few of them."""
    lists = pc.cast(lists, pa.list_(pa.string()))
    words = pc.list_flatten(lists).dictionary_encode()
    codes = pc.fill_null(pc.cast(words.indices, pa.string()), "")
    ends = pc.cumulative_sum(pc.fill_null(pc.list_value_length(lists), 0))
    offsets = pa.concat_arrays([pa.array([0], pa.int32()), pc.cast(ends, pa.int32())])
    # A comma after each code tells no words from one null.
    coded = pa.ListArray.from_arrays(offsets, pc.binary_join_element_wise(codes, "", ","))
    rows = pc.if_else(pc.is_null(lists), None, pc.binary_join(coded, "")).dictionary_encode()
    known = words.dictionary.to_pylist()
    texts = [
        json.dumps([known[int(code)] if code else None for code in row.split(",")[:-1]])
        for row in rows.dictionary.to_pylist()
    ]
    return pa.array(texts, pa.string()).take(rows.indices)


def to_stored(people: People, new: NewBatch, decisions: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The rows as the database keeps them (all but ``sequence``), and the names that they mention."""
    where = f"batch {new.batch_id}"
    absent = [c for c in _GIVEN if c not in decisions.column_names]
    if absent:
        raise LedgerError(f"{where}: the decisions lack the columns {', '.join(absent)}")
    size = decisions.num_rows
    given = {c: decisions[c].combine_chunks() for c in _GIVEN}
    for column in ("decision_id", "entity_id"):
        values = given[column] = pc.cast(given[column], pa.string())
        if values.null_count or pc.count_distinct(values).as_py() != size:
            raise LedgerError(f"{where}: {column} must be there and differ in every row")
    for column in ("decision_id", "entity_id", "unit", "arm"):
        if pc.any(pc.match_substring(pc.cast(given[column], pa.string()), "\0")).as_py():
            raise LedgerError(f"{where}: {column} holds the character 0, which no database keeps")
    both = pa.chunked_array([given["entity_id"], pc.cast(given["unit"], pa.string())]).combine_chunks()
    coded = both.dictionary_encode()
    words = coded.dictionary.to_pylist()
    digests = pa.array(people.digests("entity", words), pa.string())
    of_rows = digests.take(coded.indices)

    def real(column: str) -> Any:
        values = pc.cast(given[column], pa.float64())
        # Neither database keeps NaN from null or -0.0 from 0.0 in the same way: settled before hashing.
        return pc.add(pc.if_else(pc.is_nan(values), None, values), 0.0)

    stored = pa.table(
        {
            "n": _numbers(size),
            "decision_id": given["decision_id"],
            "entity": of_rows.slice(0, size),
            "unit": of_rows.slice(size),
            "arm": pc.cast(given["arm"], pa.string()),
            "arm_probability": real("arm_probability"),
            "perturbation": real("perturbation"),
            "perturbation_probability": real("perturbation_probability"),
            "before": pc.cast(given["before"], pa.int64()),
            "after": pc.cast(given["after"], pa.int64()),
            "changed": pc.fill_null(pc.cast(given["changed"], pa.int64()), 0),
            "review": pc.cast(given["review"], pa.int64()),
            "expected_gain": real("expected_gain"),
            "reasons": _as_json(given["reasons"]),
        }
    )
    mapping = pa.table({"digest": digests, "kind": pa.array(["entity"] * len(words), pa.string()), "name": words})
    # In the order of the key: neighbours in the table are written together.
    return stored, mapping.sort_by("digest")


def decisions(tx: Transaction, batch_id: str, entities: Sequence[str] | None = None) -> pa.Table:
    sequence = batches.find(tx, batch_id).sequence
    if entities is None:
        return read_decisions(tx, "d.sequence = ?", [sequence])
    parts = []
    for some in chunks(tx.people.digests("entity", dict.fromkeys(entities))):
        where = f"d.sequence = ? AND d.entity IN ({', '.join('?' * len(some))})"
        parts.append(read_decisions(tx, where, [sequence, *some]))
    if not parts:
        return no_decisions()
    return pa.concat_tables(parts).sort_by("n")


def read_decisions(tx: Transaction, where: str, values: Sequence[Any]) -> pa.Table:
    raw = select_bulk(
        tx.connection,
        "SELECT d.decision_id, e.name, u.name, d.arm, d.arm_probability, d.perturbation, d.perturbation_probability,"
        ' d."before", d."after", d.changed, d.review, d.expected_gain, d.reasons, d.n FROM decisions d'
        " LEFT JOIN names e ON e.digest = d.entity LEFT JOIN names u ON u.digest = d.unit"
        f" WHERE {where} ORDER BY d.n",
        values,
        _RAW,
    )
    coded = raw["reasons"].combine_chunks().dictionary_encode()
    known = pa.array([json.loads(said) for said in coded.dictionary.to_pylist()], pa.list_(pa.string()))
    columns = {f.name: raw[f.name] for f in _RAW}
    columns["changed"] = pc.cast(raw["changed"], pa.bool_())
    columns["review"] = pc.cast(raw["review"], pa.bool_())
    columns["reasons"] = known.take(coded.indices)
    return pa.table(columns)


def no_decisions() -> pa.Table:
    kinds = {"changed": pa.bool_(), "review": pa.bool_(), "reasons": pa.list_(pa.string())}
    return pa.schema([(f.name, kinds.get(f.name, f.type)) for f in _RAW]).empty_table()


def decision(tx: Transaction, decision_id: str) -> dict[str, Any]:
    at = find_decision(tx, decision_id)
    row: dict[str, Any] = read_decisions(tx, "d.sequence = ? AND d.n = ?", [at.sequence, at.n]).to_pylist()[0]
    found = tx.connection.execute(select(schema.batches).where(schema.batches.c.sequence == at.sequence)).one()
    row["batch"] = batches.rows_of(tx, [found])[0]
    return row


def find_decision(tx: Transaction, decision_id: str) -> AnyRow:
    d = schema.decisions.c
    query = select(d.sequence, d.n).where(d.decision_id == decision_id).order_by(d.sequence.desc()).limit(1)
    at = tx.connection.execute(query).first()
    if at is None:
        raise Unknown(f"the ledger holds no decision {decision_id!r}: `signalbox decisions` lists them")
    return at
