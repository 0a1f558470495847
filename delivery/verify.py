"""Proof that nobody changed the ledger: everything is recomputed from the rows and held against the chain.

Belongs here: the comparison, and naming what does not fit. Does not: writing anything. What it cannot find by itself is a
ledger cut off at its end together with the rows of those events: that takes a head that was exported earlier.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Connection, func, select

from delivery import chain, tables
from delivery.database import select_bulk
from delivery.ledger import CHAINED, batch_body, body_of, roots, stored_rows
from delivery.people import PEOPLE, People
from delivery.records import FINAL, OPEN, Head

_SAID = 20
"""Problems of one sort that are listed; the rest is counted."""
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, pa.ArrowException)


@dataclass
class _Pushed:
    """What the events say of a batch's delivery."""

    delivery: str = "NONE"
    pushing: bool = False
    system: str | None = None
    superseded_by: str | None = None
    counts: str | None = None
    roots: dict[str, str] | None = None
    retired: bool = False
    taken_back: set[int] = field(default_factory=set)
    """Decisions that change nothing and have a delivery all the same, since an earlier batch's value stood there."""


@dataclass
class _Proof:
    connection: Connection
    people: People
    said: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    events: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    """kind → seq → body."""
    hashes: list[str] = field(default_factory=list)
    pushed: dict[str, _Pushed] = field(default_factory=lambda: defaultdict(_Pushed))
    forgotten: set[str] = field(default_factory=set)
    fences: dict[str, int] = field(default_factory=dict)
    mentioned: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Digests of names, by where they stand."""

    def wrong(self, sort: str, text: str) -> None:
        self.said[sort] += 1
        if self.said[sort] <= _SAID:
            self.problems.append(text)

    @contextmanager
    def readable(self, what: str) -> Iterator[None]:
        """A row of the wrong shape is a finding, not a crash."""
        try:
            yield
        except _UNREADABLE as error:
            self.wrong(what, f"{what}: a row cannot be read ({type(error).__name__})")


def examine(connection: Connection, people: People, head: Head | None) -> tuple[list[str], int, int, Head]:
    """Problems, number of events, number of batches, head."""
    proof = _Proof(connection, people)
    with proof.readable("events"):
        _events(proof)
    if head is not None:
        _head(proof, head)
    for kind in CHAINED:
        with proof.readable(CHAINED[kind].name):
            _chained(proof, kind)
    batches = 0
    with proof.readable("batches"):
        batches = _batches(proof)
    for check in (_orphans, _acknowledged, _names, _leases):
        with proof.readable(check.__name__.strip("_")):
            check(proof)
    for sort, count in proof.said.items():
        if count > _SAID:
            proof.problems.append(f"… and {count - _SAID} more of {sort}")
    now = Head(len(proof.hashes), proof.hashes[-1]) if proof.hashes else Head(0, chain.NOTHING)
    return proof.problems, len(proof.hashes), batches, now


def _events(proof: _Proof) -> None:
    e = tables.events.c
    previous, last = chain.NOTHING, 0
    for row in proof.connection.execute(select(tables.events).order_by(e.seq)):
        if row.seq != last + 1:
            proof.wrong("events", f"event {last + 1} is missing: {last} is followed by {row.seq}")
        elif row.previous != previous:
            proof.wrong("events", f"event {row.seq} does not follow on event {last}: its predecessor has another hash")
        if chain.event_hash(row.previous, row.seq, row.at, row.kind, row.body) != row.hash:
            proof.wrong("events", f"event {row.seq} ({row.kind}) was changed: its hash is another one")
        last, previous = row.seq, row.hash
        proof.hashes.append(row.hash)
        with proof.readable(f"event {row.seq}"):
            body = json.loads(row.body)
            proof.events[row.kind][row.seq] = body
            _fold(proof, row.kind, body)


def _fold(proof: _Proof, kind: str, body: Mapping[str, Any]) -> None:
    if kind == "forgotten":
        proof.forgotten |= set(body["digests"])
    elif kind == "retention":
        for batch_id in body["batches"]:
            proof.pushed[batch_id].retired = True
    elif kind == "taken back":
        proof.pushed[body["batch_id"]].taken_back |= set(body["n"])
    elif kind in ("push begun", "push ended", "superseded"):
        one = proof.pushed[body["batch_id"]]
        one.system, one.delivery, one.pushing = body["system"], "OPEN", kind != "push ended"
        proof.fences[body["system"]] = max(body["fence"], proof.fences.get(body["system"], 0))
        if kind == "superseded":
            one.superseded_by = body["by"]
        if kind == "push ended":
            one.roots = {name: body[name] for name in ("deliveries", "attempts", "conflicts")}
            if body["complete"]:
                one.delivery, one.counts = "COMPLETE", chain.canonical(body["counts"])


def _head(proof: _Proof, head: Head) -> None:
    if head.seq > len(proof.hashes):
        proof.wrong(
            "head",
            f"events after {len(proof.hashes)} were cut off: the exported head is event {head.seq}, which is gone",
        )
    elif head.seq and proof.hashes[head.seq - 1] != head.hash:
        proof.wrong("head", f"event {head.seq} is not the one whose hash was exported: the chain was rewritten")


def _chained(proof: _Proof, kind: str) -> None:
    table = CHAINED[kind]
    told = dict(proof.events[kind])
    rows = proof.connection.execute(select(table).order_by(table.c.seq)).all()
    latest = {row.approver: row.seq for row in rows} if kind == "approver" else {}
    for row in rows:
        body = told.pop(row.seq, None)
        if body is None:
            proof.wrong(table.name, f"{table.name}: row {row.seq} was inserted: no event tells of it")
            continue
        values = {k: v for k, v in row._mapping.items() if k != "seq"}
        if "evidence" in values:
            values["evidence"] = json.loads(values["evidence"])
        mine = body_of(values, proof.people)
        if kind == "approver" and row.secret_hash is None and latest[row.approver] != row.seq:
            mine["secret_hash"] = body.get("secret_hash")  # erased when it was replaced
        if chain.canonical(mine) != chain.canonical(body):
            proof.wrong(table.name, f"{table.name}: row {row.seq} was changed: its event says otherwise")
    for seq in told:
        proof.wrong(table.name, f"{table.name}: row {seq} was deleted: event {seq} tells of it")


def _batches(proof: _Proof) -> int:
    told = dict(proof.events["batch"])
    rows = proof.connection.execute(select(tables.batches).order_by(tables.batches.c.sequence)).all()
    for row in rows:
        where = f"batch {row.batch_id}"
        body = told.pop(row.seq, None)
        if body is None:
            proof.wrong("batches", f"{where} was inserted: no event tells of it")
            continue
        with proof.readable(where):
            values = {k: row._mapping[k] for k in body if k in row._mapping}
            if chain.canonical(batch_body(values, proof.people)) != chain.canonical(body):
                proof.wrong("batches", f"{where} was changed: event {row.seq} says otherwise")
            for found in json.loads(row.findings):
                named = {found.get(key) for key in PEOPLE}
                proof.mentioned[f"findings of {where}"] |= {digest for digest in named if isinstance(digest, str)}
            events = proof.pushed[row.batch_id]
            for name in ("delivery", "system", "superseded_by", "counts", "retired"):
                if getattr(row, name) != getattr(events, name):
                    proof.wrong("batches", f"{where}: its {name} was changed: the events say {getattr(events, name)}")
            _rows(proof, where, row.sequence, body, events)
    for seq, body in told.items():
        proof.wrong("batches", f"batch {body.get('batch_id')} was deleted: event {seq} tells of it")
    return len(rows)


def _rows(proof: _Proof, where: str, sequence: int, body: Mapping[str, Any], events: _Pushed) -> None:
    decided = stored_rows(proof.connection, tables.decisions, sequence)
    if events.retired:
        if decided.num_rows:
            proof.wrong(
                "decisions", f"{where}: its rows were removed by the retention policy, and some are there again"
            )
        return
    if decided.num_rows != body["rows"]:
        proof.wrong("decisions", f"{where} has {decided.num_rows} decisions, and was recorded with {body['rows']}")
    if chain.merkle_root(chain.leaf_hashes(decided)) != body["root"]:
        proof.wrong(
            "decisions", f"{where}: a decision was changed, deleted, inserted or moved: the Merkle root is another one"
        )
    delivered = stored_rows(proof.connection, tables.deliveries, sequence)
    back = pc.is_in(decided["n"], pa.array(sorted(events.taken_back), decided["n"].type))
    due = decided.filter(pc.or_(pc.not_equal(decided["changed"], 0), back))["n"]
    if not due.equals(delivered["n"]):
        proof.wrong(
            "deliveries", f"{where}: deliveries were deleted or inserted: they are not those of its changed decisions"
        )
    if events.roots is not None and not events.pushing:
        for name, root in roots(proof.connection, sequence).items():
            if root != events.roots[name]:
                proof.wrong(
                    name, f"{where}: its {name} were changed since its push ended: the Merkle root is another one"
                )
    else:
        _unsealed(proof, where, sequence, delivered, pristine=not events.pushing)
    _says(proof, where, sequence)
    for table, column in ((decided, "entity"), (decided, "unit"), (delivered, "target")):
        proof.mentioned[f"{column} of {where}"] |= set(pc.unique(table[column].drop_null()).to_pylist())


def _unsealed(proof: _Proof, where: str, sequence: int, delivered: pa.Table, *, pristine: bool) -> None:
    tried = stored_rows(proof.connection, tables.attempts, sequence)
    states = set(delivered["state"].to_pylist())
    if pristine:
        touched = any(
            delivered[c].null_count != delivered.num_rows for c in ("target", "sent", "observed", "verified_at")
        )
        if states - {"PENDING"} or tried.num_rows or touched:
            proof.wrong("deliveries", f"{where}: its deliveries were changed: no event tells of a push")
        return
    if states - OPEN - FINAL:
        proof.wrong(
            "deliveries", f"{where}: a delivery is in a state that there is not: {sorted(states - OPEN - FINAL)}"
        )
    said = {n: count for n, count in zip(*(delivered[c].to_pylist() for c in ("n", "attempts")), strict=True) if count}
    if said != Counter(tried["n"].to_pylist()):
        proof.wrong("attempts", f"{where}: attempts were deleted or inserted: the deliveries count others")


def _says(proof: _Proof, where: str, sequence: int) -> None:
    for table in (tables.deliveries, tables.attempts):
        rows = proof.connection.execute(
            select(table.c.n, table.c.says, table.c.says_digest, tables.decisions.c.entity)
            .join(
                tables.decisions,
                (tables.decisions.c.sequence == table.c.sequence) & (tables.decisions.c.n == table.c.n),
            )
            .where(table.c.sequence == sequence, table.c.says.is_not(None) | table.c.says_digest.is_not(None))
        )
        for row in rows:
            if proof.people.text(row.says) != row.says_digest and (
                row.says is not None or row.entity not in proof.forgotten
            ):
                proof.wrong(table.name, f"{where}: what {table.name} {row.n} says was changed")


def _orphans(proof: _Proof) -> None:
    known = select(tables.batches.c.sequence)
    for table in (tables.decisions, tables.deliveries, tables.attempts, tables.conflicts, tables.acknowledged):
        count = proof.connection.execute(
            select(func.count()).select_from(table).where(table.c.sequence.not_in(known))
        ).scalar()
        if count:
            proof.wrong(table.name, f"{table.name}: {count} rows belong to no batch")


def _acknowledged(proof: _Proof) -> None:
    k, d, c, b = tables.acknowledged, tables.deliveries, tables.decisions, tables.batches
    rows = proof.connection.execute(
        select(k, b.c.batch_id, b.c.retired, b.c.system.label("at"), d.c.state, d.c.target.label("held"), d.c.observed,
               d.c.sent, d.c.verified_at.label("proved"), c.c.entity.label("decided"))
        .join(b, b.c.sequence == k.c.sequence)
        .outerjoin(d, (d.c.sequence == k.c.sequence) & (d.c.n == k.c.n))
        .outerjoin(c, (c.c.sequence == k.c.sequence) & (c.c.n == k.c.n))
    )  # fmt: skip
    for row in rows:
        if row.state is None:
            right = row.retired
        else:
            right = (row.at, row.held, row.decided) == (row.system, row.target, row.entity) and (
                (row.state == "ACKED" and (row.observed, row.proved) == (row.value, row.verified_at))
                or (row.state == "OVERWRITTEN" and row.value in (row.observed, row.sent))
            )
        if not right:
            proof.wrong(
                "acknowledged", f"acknowledged: the value of batch {row.batch_id}, delivery {row.n}, was changed"
            )
    query = (
        select(b.c.batch_id, d.c.n)
        .select_from(
            d.join(b, b.c.sequence == d.c.sequence)
            .join(c, (c.c.sequence == d.c.sequence) & (c.c.n == d.c.n))
            .outerjoin(k, (k.c.system == b.c.system) & (k.c.entity == c.c.entity))
        )
        .where(d.c.state == "ACKED", k.c.entity.is_(None))
    )
    for batch_id, n in proof.connection.execute(query):
        proof.wrong("acknowledged", f"acknowledged: the value of batch {batch_id}, delivery {n}, was deleted")


def _names(proof: _Proof) -> None:
    three = pa.schema([(c, pa.string()) for c in ("digest", "kind", "name")])
    known = select_bulk(proof.connection, "SELECT digest, kind, name FROM names ORDER BY digest", [], three)
    for kind in set(known["kind"].to_pylist()):
        some = known.filter(pc.equal(known["kind"], kind))
        right = pa.array(proof.people.digests(kind, some["name"].to_pylist()), pa.string())
        for digest in some.filter(pc.not_equal(some["digest"], right))["digest"].to_pylist():
            proof.wrong("names", f"names: the name of {digest} was changed")
    there = set(known["digest"].to_pylist())
    for events in proof.events.values():
        for body in events.values():
            acted = {body.get(key) for key, kind in PEOPLE.items() if kind == "person"}
            proof.mentioned["events"] |= {digest for digest in acted if isinstance(digest, str)}
    for where, digests in proof.mentioned.items():
        for digest in sorted(digests - there - proof.forgotten):
            proof.wrong(
                "names", f"names: the name of {digest} in {where} was deleted, and no event says that it was forgotten"
            )


def _leases(proof: _Proof) -> None:
    fences = {row.system: row.fence for row in proof.connection.execute(select(tables.leases))}
    for system, fence in proof.fences.items():
        if fences.get(system, 0) < fence:
            proof.wrong("leases", f"leases: {system} had the lease {fence}, and stands at {fences.get(system, 0)}")
