"""Proof that nobody changed the ledger: everything is recomputed from the rows and held against the chain.

Belongs here: the comparison, and naming what does not fit. Does not: writing anything. What it cannot find by itself is a
ledger cut off at its end together with the rows of those events: that takes a head that was exported earlier.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Connection, func, select

from common.collector import without_collection
from delivery.ledger import hash_chain, schema
from delivery.ledger.database import select_bulk
from delivery.ledger.events import CHAINED, batch_body, body_of, root_of, stored_rows
from delivery.ledger.pseudonyms import PEOPLE, People, digests_in
from delivery.ledger.records import FINAL, OPEN, Head

_SAID = 20
"""Problems of one sort that are listed; the rest is counted."""
_BLOCK = 1_000_000
"""Rows of proofs, and digests, that are kept before they are put together."""
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
    ending: int = 0
    """The event by which a newer batch began to end this one."""


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
    words: dict[str, str] = field(default_factory=dict)
    """Digest of a text → of what it became when a name in it was erased."""
    fences: dict[str, int] = field(default_factory=dict)
    kept: Mapping[str, Any] | None = None
    """The newest retention event that seals the values that stood of retired batches."""
    ids: dict[int, str] = field(default_factory=dict)
    """sequence → batch."""
    known: pa.Array | None = None
    """Digests that have a name."""
    mentioned: list[tuple[str, pa.Array]] = field(default_factory=list)
    """Digests of names, by where they stand, that were not looked up yet."""
    mentions: int = 0
    proofs: list[pa.Table] = field(default_factory=list)
    """Deliveries that proved a value, as ``_PROVED``."""
    maybe: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)
    """(sequence, n) → system, entity, target, value, time of deliveries that may have proved a value: overwritten later."""

    def wrong(self, sort: str, text: str) -> None:
        self.said[sort] += 1
        if self.said[sort] <= _SAID:
            self.problems.append(text)

    def text(self, digest: str | None) -> str | None:
        """The digest of what a text is by now, given the digest of what it was recorded as."""
        for _ in range(len(self.words)):
            if digest is None or digest not in self.words:
                break
            digest = self.words[digest]
        return digest

    def mention(self, where: str, digests: pa.Array | pa.ChunkedArray) -> None:
        """Note that names stand somewhere as these digests; they are looked up many at a time."""
        some = pc.unique(digests.drop_null())
        self.mentioned.append((where, some))
        self.mentions += len(some)
        if self.mentions > _BLOCK:
            self.look_up()

    def look_up(self) -> None:
        """Find mentioned digests that have no name, and were not forgotten."""
        if not self.mentioned or self.known is None:
            return
        every = pa.chunked_array([some.cast(pa.string()) for _, some in self.mentioned]).combine_chunks()
        absent = pc.indices_nonzero(pc.invert(pc.is_in(every, self.known))).to_pylist()
        ends = list(itertools.accumulate(len(some) for _, some in self.mentioned))
        for index in absent:
            where = self.mentioned[bisect.bisect_right(ends, index)][0]
            if (digest := every[index].as_py()) not in self.forgotten:
                self.wrong(
                    "names",
                    f"names: the name of {digest} in {where} was deleted, and no event says that it was forgotten",
                )
        self.mentioned, self.mentions = [], 0

    @contextmanager
    def readable(self, what: str) -> Iterator[None]:
        """A row of the wrong shape is a finding, not a crash."""
        try:
            yield
        except _UNREADABLE as error:
            self.wrong(what, f"{what}: a row cannot be read ({type(error).__name__})")


def examine(connection: Connection, people: People, head: Head | None) -> tuple[list[str], int, int, Head]:
    """Problems, number of events, number of batches, head."""
    with without_collection():
        return _examine(_Proof(connection, people), head)


def _examine(proof: _Proof, head: Head | None) -> tuple[list[str], int, int, Head]:
    with proof.readable("events"):
        _events(proof)
    if head is not None:
        _head(proof, head)
    for kind in CHAINED:
        with proof.readable(CHAINED[kind].name):
            _chained(proof, kind)
    with proof.readable("names"):
        _names(proof)
    batches = 0
    with proof.readable("batches"):
        batches = _batches(proof)
    for check in (_orphans, _acknowledged, _mentions, _leases, _meta):
        with proof.readable(check.__name__.strip("_")):
            check(proof)
    for sort, count in proof.said.items():
        if count > _SAID:
            proof.problems.append(f"… and {count - _SAID} more of {sort}")
    now = Head(len(proof.hashes), proof.hashes[-1]) if proof.hashes else Head(0, hash_chain.NOTHING)
    return proof.problems, len(proof.hashes), batches, now


def _events(proof: _Proof) -> None:
    e = schema.events.c
    previous, last = hash_chain.NOTHING, 0
    for row in proof.connection.execute(select(schema.events).order_by(e.seq)):
        if row.seq != last + 1:
            proof.wrong("events", f"event {last + 1} is missing: {last} is followed by {row.seq}")
        elif row.previous != previous:
            proof.wrong("events", f"event {row.seq} does not follow on event {last}: its predecessor has another hash")
        if hash_chain.event_hash(row.previous, row.seq, row.at, row.kind, row.body) != row.hash:
            proof.wrong("events", f"event {row.seq} ({row.kind}) was changed: its hash is another one")
        last, previous = row.seq, row.hash
        proof.hashes.append(row.hash)
        with proof.readable(f"event {row.seq}"):
            body = json.loads(row.body)
            proof.events[row.kind][row.seq] = body
            _fold(proof, row.seq, row.kind, body)


def _fold(proof: _Proof, seq: int, kind: str, body: Mapping[str, Any]) -> None:
    if kind == "forgotten":
        proof.forgotten |= set(body["digests"])
        proof.words |= body.get("words", {})
    elif kind == "retention":
        proof.kept = body if "values_root" in body else proof.kept
        for batch_id in body["batches"]:
            proof.pushed[batch_id].retired = True
    elif kind == "taken back":
        proof.pushed[body["batch_id"]].taken_back |= set(body["n"])
    elif kind in ("push begun", "push ended", "superseded"):
        one = proof.pushed[body["batch_id"]]
        one.system, one.delivery, one.pushing = body["system"], "OPEN", kind != "push ended"
        proof.fences[body["system"]] = max(body["fence"], proof.fences.get(body["system"], 0))
        if kind == "superseded":
            one.superseded_by, one.ending = body["by"], seq
        if kind == "push ended" and not body["complete"] and one.ending == seq - 1:
            # Older ledgers sealed a batch in the same breath, before what was unknown of it was found out and sealed again.
            one.pushing = True
        elif kind == "push ended":
            one.roots = {name: body[name] for name in ("deliveries", "attempts", "conflicts")}
            if body["complete"]:
                one.delivery, one.counts = "COMPLETE", hash_chain.canonical(body["counts"])


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
        if "reason" in mine:
            body = {**body, "reason": proof.text(body["reason"])}
        if kind == "approver" and row.secret_hash is None and latest[row.approver] != row.seq:
            mine["secret_hash"] = body.get("secret_hash")  # erased when it was replaced
        if hash_chain.canonical(mine) != hash_chain.canonical(body):
            proof.wrong(table.name, f"{table.name}: row {row.seq} was changed: its event says otherwise")
    for seq in told:
        proof.wrong(table.name, f"{table.name}: row {seq} was deleted: event {seq} tells of it")


def _batches(proof: _Proof) -> int:
    told = dict(proof.events["batch"])
    rows = proof.connection.execute(select(schema.batches).order_by(schema.batches.c.sequence)).all()
    for row in rows:
        where = f"batch {row.batch_id}"
        body = told.pop(row.seq, None)
        if body is None:
            proof.wrong("batches", f"{where} was inserted: no event tells of it")
            continue
        with proof.readable(where):
            proof.ids[row.sequence] = row.batch_id
            values = {k: row._mapping[k] for k in body if k in row._mapping}
            recorded = {**body, "findings": proof.text(body["findings"])}
            if hash_chain.canonical(batch_body(values, proof.people)) != hash_chain.canonical(recorded):
                proof.wrong("batches", f"{where} was changed: event {row.seq} says otherwise")
            events = proof.pushed[row.batch_id]
            for name in ("delivery", "system", "superseded_by", "counts", "retired"):
                if getattr(row, name) != getattr(events, name):
                    proof.wrong("batches", f"{where}: its {name} was changed: the events say {getattr(events, name)}")
            if not events.retired:
                findings = json.loads(row.findings)
                named = [found.get(key) for found in findings for key in PEOPLE]
                named += [*digests_in(findings)]
                proof.mention(f"findings of {where}", pa.array([d for d in named if isinstance(d, str)], pa.string()))
            _rows(proof, where, row.sequence, body, events)
    for seq, body in told.items():
        proof.wrong("batches", f"batch {body.get('batch_id')} was deleted: event {seq} tells of it")
    return len(rows)


def _rows(proof: _Proof, where: str, sequence: int, body: Mapping[str, Any], events: _Pushed) -> None:
    """Everything of one batch, each table read once."""
    decided = stored_rows(proof.connection, schema.decisions, sequence)
    if events.retired:
        if decided.num_rows:
            proof.wrong(
                "decisions", f"{where}: its rows were removed by the retention policy, and some are there again"
            )
        return
    if decided.num_rows != body["rows"]:
        proof.wrong("decisions", f"{where} has {decided.num_rows} decisions, and was recorded with {body['rows']}")
    if root_of(decided) != body["root"]:
        proof.wrong(
            "decisions", f"{where}: a decision was changed, deleted, inserted or moved: the Merkle root is another one"
        )
    pushed = {
        table.name: stored_rows(proof.connection, table, sequence, with_words=True)
        for table in (schema.deliveries, schema.attempts, schema.conflicts)
    }
    delivered = pushed["deliveries"]
    back = pc.is_in(decided["n"], pa.array(sorted(events.taken_back), decided["n"].type))
    due = decided.filter(pc.or_(pc.not_equal(decided["changed"], 0), back))["n"]
    if not due.equals(delivered["n"]):
        proof.wrong(
            "deliveries", f"{where}: deliveries were deleted or inserted: they are not those of its changed decisions"
        )
    if events.roots is not None and not events.pushing:
        for name, rows in pushed.items():
            if root_of(rows) != events.roots[name]:
                proof.wrong(
                    name, f"{where}: its {name} were changed since its push ended: the Merkle root is another one"
                )
    else:
        _unsealed(proof, where, pushed, pristine=not events.pushing)
    entities = decided["entity"].combine_chunks()
    for name in ("deliveries", "attempts"):
        at = pc.index_in(pushed[name]["n"], decided["n"].combine_chunks())
        _says(proof, where, name, pushed[name], entities.take(at))
    _proved(
        proof,
        sequence,
        events.system,
        delivered,
        entities.take(pc.index_in(delivered["n"], decided["n"].combine_chunks())),
    )
    for table, column in ((decided, "entity"), (decided, "unit"), (delivered, "target")):
        proof.mention(f"{column} of {where}", table[column])


def _unsealed(proof: _Proof, where: str, pushed: Mapping[str, pa.Table], *, pristine: bool) -> None:
    delivered, tried, met = pushed["deliveries"], pushed["attempts"], pushed["conflicts"]
    states = set(delivered["state"].to_pylist())
    if pristine:
        touched = any(
            delivered[c].null_count != delivered.num_rows
            for c in delivered.column_names
            if c not in ("n", "state", "attempts", "repeats")
        ) or any(pc.any(pc.not_equal(delivered[c], 0)).as_py() for c in ("attempts", "repeats"))
        if states - {"PENDING"} or tried.num_rows or met.num_rows or touched:
            proof.wrong("deliveries", f"{where}: its deliveries were changed: no event tells of a push")
        return
    if states - OPEN - FINAL:
        proof.wrong(
            "deliveries", f"{where}: a delivery is in a state that there is not: {sorted(states - OPEN - FINAL)}"
        )
    counted = zip(*(delivered[c].to_pylist() for c in ("n", "attempts")), strict=True)
    due = [(n, attempt) for n, count in counted for attempt in range(1, count + 1)]
    if due != list(zip(*(tried[c].to_pylist() for c in ("n", "attempt")), strict=True)):
        proof.wrong("attempts", f"{where}: attempts were deleted or inserted: the deliveries count others")
    others = delivered.filter(pc.is_in(delivered["state"], pa.array(["CONFLICT", "OVERWRITTEN"])))
    if not others["n"].equals(met["n"]):
        proof.wrong("conflicts", f"{where}: conflicts were deleted or inserted: the deliveries tell of others")


def _says(proof: _Proof, where: str, name: str, rows: pa.Table, entities: pa.Array) -> None:
    """Free words against their digests, which are sealed; they may have been erased, or a name in them."""
    both = pa.table({"says": rows["says"], "digest": rows["says_digest"], "entity": entities, "n": rows["n"]})
    both = both.filter(pc.or_(pc.is_valid(both["says"]), pc.is_valid(both["digest"])))
    if not both.num_rows:
        return
    gone = pa.array(sorted(proof.forgotten), pa.string())
    erased = pc.and_(pc.is_null(both["says"]), pc.is_in(both["entity"], gone))
    texts = both.group_by(["says", "digest"]).aggregate([]).to_pylist()
    right = {(t["says"], t["digest"]) for t in texts if proof.people.text(t["says"]) == proof.text(t["digest"])}
    if len(right) == len(texts):
        return
    for row in both.filter(pc.invert(erased)).to_pylist():
        if (row["says"], row["digest"]) not in right:
            proof.wrong(name, f"{where}: what {name} {row['n']} says was changed")


_PROVED = ("system", "entity", "target", "value", "verified_at", "sequence", "n")


def _proved(proof: _Proof, sequence: int, system: str | None, delivered: pa.Table, entities: pa.Array) -> None:
    """Collect the deliveries of a batch that proved a value, and those that may have."""
    state = delivered["state"]
    overwritten = pc.equal(state, "OVERWRITTEN")
    ours = pc.and_(pc.fill_null(pc.equal(delivered["observed"], delivered["sent"]), False), overwritten)
    rows = pa.table(
        {
            "system": pa.array([system] * delivered.num_rows, pa.string()),
            "entity": entities,
            "target": delivered["target"],
            "value": delivered["observed"],
            "verified_at": delivered["verified_at"],
            "sequence": pa.array([sequence] * delivered.num_rows, pa.int64()),
            "n": delivered["n"],
        }
    )
    sure = pc.and_(pc.or_(pc.equal(state, "ACKED"), ours), pc.is_valid(delivered["verified_at"]))
    some = rows.filter(sure)
    if some.num_rows:
        proof.proofs.append(some)
        if sum(one.num_rows for one in proof.proofs[1:]) > _BLOCK:
            proof.proofs = [_newest(proof.proofs)]
    for row in rows.set_column(3, "value", delivered["sent"]).filter(pc.and_not(overwritten, sure)).to_pylist():
        proof.maybe[row["sequence"], row["n"]] = tuple(row[name] for name in _PROVED[:5])


def _newest(proofs: Sequence[pa.Table]) -> pa.Table:
    """The last proof of each entity on each system, by time and then by the order of deciding."""
    rows = pa.concat_tables(proofs)
    at = pc.cast(rows["verified_at"], pa.timestamp("us"))
    rows = rows.take(
        pc.sort_indices(
            rows.select(["sequence"]).append_column("at", at), [("at", "ascending"), ("sequence", "ascending")]
        )
    )
    others = [name for name in _PROVED if name not in ("system", "entity")]
    last = rows.group_by(["system", "entity"], use_threads=False).aggregate(
        [(name, "last", pc.ScalarAggregateOptions(skip_nulls=False)) for name in others]
    )
    return last.rename_columns({f"{name}_last": name for name in others}).select(_PROVED)


def _orphans(proof: _Proof) -> None:
    known = select(schema.batches.c.sequence)
    for table in (
        schema.decisions,
        schema.deliveries,
        schema.attempts,
        schema.conflicts,
        schema.acknowledged,
        schema.retired_values,
    ):
        count = proof.connection.execute(
            select(func.count()).select_from(table).where(table.c.sequence.not_in(known))
        ).scalar()
        if count:
            proof.wrong(table.name, f"{table.name}: {count} rows belong to no batch")


def _acknowledged(proof: _Proof) -> None:
    """Each entity's row is the newest proof that any delivery of ours gives, or gave before a retention removed it."""
    kept = stored_rows(proof.connection, schema.retired_values)
    if root_of(kept) != (proof.kept["values_root"] if proof.kept is not None else root_of(kept.slice(0, 0))):
        proof.wrong(
            "retired_values",
            "retired_values: what stood of batches that a retention removed was changed since: the Merkle root is another one",
        )
    stands = stored_rows(proof.connection, schema.acknowledged).select(_PROVED)
    for column in ("entity", "target"):
        proof.mention("acknowledged", stands[column])
    newest = _newest([kept.select(_PROVED), *proof.proofs])
    names = {name: f"{name}_proved" for name in _PROVED[2:]}
    both = stands.join(
        newest.rename_columns(names | {"system": "system", "entity": "entity"}),
        ["system", "entity"],
        join_type="full outer",
    )
    same = pa.array([True] * both.num_rows, pa.bool_())
    for name, other in names.items():
        nulls = pc.and_(pc.is_null(both[name]), pc.is_null(both[other]))
        same = pc.and_(same, pc.or_(pc.fill_null(pc.equal(both[name], both[other]), False), nulls))
    for row in both.filter(pc.invert(same)).to_pylist():
        _other_than_newest(proof, row)


def _other_than_newest(proof: _Proof, row: Mapping[str, Any]) -> None:
    """A row of the acknowledged values that is not the newest proof: which may be right in two cases."""
    batch = proof.ids.get(row["sequence"] if row["sequence"] is not None else row["sequence_proved"], "of nobody")
    if row["sequence"] is None:
        proof.wrong(
            "acknowledged", f"acknowledged: the value of batch {batch}, delivery {row['n_proved']}, was deleted"
        )
        return
    is_newest = row["sequence_proved"] is None or (row["verified_at"], row["sequence"]) > (
        row["verified_at_proved"], row["sequence_proved"]
    )  # fmt: skip
    held = proof.maybe.get((row["sequence"], row["n"]))
    # It was proved, and overwritten by somebody later: of then its delivery keeps what was sent.
    was_ours = (
        held is not None
        and held[:4] == tuple(row[name] for name in _PROVED[:4])
        and held[4] is not None
        and row["verified_at"] <= held[4]
    )
    # Ledgers in which retention kept no values: what stood cannot be told any more.
    lost = proof.pushed[batch].retired and proof.kept is None
    if not (is_newest and (was_ours or lost)):
        proof.wrong("acknowledged", f"acknowledged: the value of batch {batch}, delivery {row['n']}, was changed")


def _names(proof: _Proof) -> None:
    three = pa.schema([(c, pa.string()) for c in ("digest", "kind", "name")])
    known = select_bulk(proof.connection, "SELECT digest, kind, name FROM names ORDER BY digest", [], three)
    for kind in set(known["kind"].to_pylist()):
        some = known.filter(pc.equal(known["kind"], kind))
        right = pa.array(proof.people.digests(kind, some["name"].to_pylist()), pa.string())
        for digest in some.filter(pc.not_equal(some["digest"], right))["digest"].to_pylist():
            proof.wrong("names", f"names: the name of {digest} was changed")
    proof.known = known["digest"].combine_chunks()
    acting = [key for key, kind in PEOPLE.items() if kind == "person"]
    acted = {body.get(key) for events in proof.events.values() for body in events.values() for key in acting}
    proof.mention("events", pa.array(sorted(digest for digest in acted if isinstance(digest, str)), pa.string()))


def _mentions(proof: _Proof) -> None:
    proof.look_up()


def _leases(proof: _Proof) -> None:
    fences = {row.system: row.fence for row in proof.connection.execute(select(schema.leases))}
    for system, fence in proof.fences.items():
        if fences.get(system, 0) < fence:
            proof.wrong("leases", f"leases: {system} had the lease {fence}, and stands at {fences.get(system, 0)}")


def _meta(proof: _Proof) -> None:
    right = {"key": proof.people.digest("ledger", "key"), "chain": "lock"}
    if {row.name: row.value for row in proof.connection.execute(select(schema.meta))} != right:
        proof.wrong("meta", "meta: what says which key the ledger was made with was changed")
