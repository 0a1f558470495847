"""The ledger: what was decided, sent, approved, promoted and taken back, and the proof that nobody changed it since.

Belongs here: the record and its rules (one transaction, one writer, final is final). Does not: talking to a downstream system
(``delivery.push``), who may approve (``delivery.approvals``), or judging outcomes. SQLite or PostgreSQL; each method is one
transaction, safe from several threads and processes. Names of entities and people stand only in the table ``names``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date, datetime, timedelta
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import Connection, Engine, Row, Table, and_, bindparam, delete, func, insert, or_, select, text, update

from common.clock import utc_now
from delivery.ledger import hash_chain, schema, verify
from delivery.ledger.database import (  # fmt: skip
    DaySent,
    Fenced,
    LedgerError,
    LedgerMismatch,
    Unknown,
    chunks,
    engine_for,
    insert_bulk,
    is_sqlite,
    migrate,
    plainly,
    reading,
    select_bulk,
    writing,
)
from delivery.ledger.events import CHAINED, WORDS, batch_body, body_of, root_of, roots, stored_rows
from delivery.ledger.leases import ABANDONED, Busy, Holder, Lease
from delivery.ledger.pseudonyms import MARK, PEOPLE, People, digests_in, eraser, in_texts, unsealed
from delivery.ledger.records import (  # fmt: skip
    FINAL,
    OPEN,
    Acknowledged,
    Approval,
    Approver,
    Attempt,
    AttemptRow,
    BatchRow,
    Conflict,
    Delivery,
    Event,
    Head,
    Leftover,
    NewBatch,
    Promotion,
    Result,
    Rollback,
    Switch,
    Verdict,
    generation,
)

_OWN = frozenset({*CHAINED, "batch", "push begun", "push ended", "taken back", "superseded", "forgotten", "retention"})
_JSON = frozenset({"evidence"})
_GIVEN = (
    "decision_id", "entity_id", "unit", "arm", "arm_probability", "perturbation", "perturbation_probability", "before",
    "after", "changed", "review", "expected_gain", "reasons",
)  # fmt: skip


AnyRow: TypeAlias = "Row[*tuple[Any, ...]]"


class Ledger:
    """Open one with ``Ledger.open``; close it, or use it in a ``with``."""

    def __init__(self, engine: Engine, people: People, clock: Callable[[], datetime]) -> None:
        self.engine = engine
        self.people = people
        self.clock = clock
        self._opened: set[tuple[str, int]] = set()
        """(batch, fence) of pushes that are known to be open, so that not every write asks the events."""

    @staticmethod
    @plainly
    def open(url: str, *, key: bytes, clock: Callable[[], datetime] = utc_now) -> Ledger:
        """Open the ledger at ``url`` (``sqlite:///path`` or ``postgresql://…``), making or migrating its tables.

        ``key`` makes the digests of names; it must be the one that the ledger was made with. Raises LedgerNewer,
        LedgerMismatch (another key), LedgerUnavailable.
        """
        ledger = Ledger(engine_for(url), People(key), clock)
        try:
            migrate(ledger.engine)
            ledger._claim()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def _claim(self) -> None:
        """The ledger belongs to the key that it was made with."""
        mine = self.people.digest("ledger", "key")
        found = select(schema.meta.c.value).where(schema.meta.c.name == "key")
        with reading(self.engine) as connection:
            stands = connection.execute(found).scalar()
        if stands is None:
            with writing(self.engine) as connection, connection.begin():
                new = text("INSERT INTO meta (name, value) VALUES (:name, :value) ON CONFLICT DO NOTHING")
                connection.execute(new, [{"name": "key", "value": mine}, {"name": "chain", "value": "lock"}])
                stands = connection.execute(found).scalar()
        if stands != mine:
            raise LedgerMismatch(
                "the ledger was made with another key: give the one in use then; digests cannot be remade"
            )

    def __repr__(self) -> str:
        return f"Ledger({self.engine.url.render_as_string(hide_password=True)})"

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of connections."""
        self.engine.dispose()

    # --- chain and names

    def _lock(self, connection: Connection) -> None:
        """One appender at a time; SQLite has only one writer anyway."""
        if not is_sqlite(connection):
            connection.execute(select(schema.meta.c.value).where(schema.meta.c.name == "chain").with_for_update())

    def _append(self, connection: Connection, kind: str, body: Mapping[str, Any], at: datetime | None = None) -> int:
        """Add an event and return its number."""
        self._lock(connection)
        sealed, mapping = self.people.sealed(body)
        self._remember(connection, mapping)
        canonical = hash_chain.canonical(sealed)
        e = schema.events.c
        last = connection.execute(select(e.seq, e.hash).order_by(e.seq.desc()).limit(1)).first()
        seq, previous = (last.seq + 1, last.hash) if last else (1, hash_chain.NOTHING)
        at = at or self.clock()
        connection.execute(
            insert(schema.events),
            {
                "seq": seq, "at": at, "kind": kind, "body": canonical, "previous": previous,
                "hash": hash_chain.event_hash(previous, seq, at, kind, canonical),
            },
        )  # fmt: skip
        return int(seq)

    def _record(self, connection: Connection, kind: str, values: Mapping[str, Any]) -> int:
        """Add an event and the row that repeats it."""
        table = CHAINED[kind]
        seq = self._append(connection, kind, body_of(values, self.people), values["at"])
        row = {k: self.people.digest(PEOPLE[k], v) if k in PEOPLE else v for k, v in values.items()}
        row |= {k: hash_chain.canonical(self.people.sealed({k: row[k]})[0][k]) for k in _JSON & row.keys()}
        connection.execute(insert(table), {"seq": seq, **row})
        return seq

    def _remember(self, connection: Connection, mapping: Iterable[tuple[str, str, str]]) -> None:
        rows = [{"digest": d, "kind": k, "name": n} for d, k, n in mapping]
        if any("\0" in row["name"] for row in rows):
            raise LedgerError("a name holds the character 0, which no database keeps: mend it where it comes from")
        if rows:
            statement = "INSERT INTO names (digest, kind, name) VALUES (:digest, :kind, :name) ON CONFLICT DO NOTHING"
            connection.execute(text(statement), sorted(rows, key=lambda row: row["digest"]))

    def _names(self, connection: Connection, digests: Iterable[str | None]) -> dict[str | None, str]:
        known: dict[str | None, str] = {}
        for some in chunks({d for d in digests if d}):
            n = schema.names.c
            found = connection.execute(select(n.digest, n.name).where(n.digest.in_(some)))
            known |= {row.digest: row.name for row in found}
        return known

    @plainly
    def note(self, kind: str, body: Mapping[str, Any]) -> int:
        """Add an event of another kind (a guard's verdict, a failed proof of identity); returns its number.

        Names belong under ``actor``, ``approver``, ``person`` or ``entity``, or in lists under ``entities`` or ``examples``:
        there they are kept as digests, and can be forgotten.
        """
        if kind in _OWN:
            raise LedgerError(f"events of kind {kind!r} are the ledger's own: use the method that makes them")
        with writing(self.engine) as connection, connection.begin():
            return self._append(connection, kind, body)

    @plainly
    def events(self, kind: str | None = None, workflow: str | None = None) -> list[Event]:
        """The chain's events, oldest first, of one kind or one workflow."""
        query = select(schema.events).order_by(schema.events.c.seq)
        if kind is not None:
            query = query.where(schema.events.c.kind == kind)
        with reading(self.engine) as connection:
            rows = [(row, json.loads(row.body)) for row in connection.execute(query)]
            rows = [(row, body) for row, body in rows if workflow is None or body.get("workflow") == workflow]
            known = self._names(connection, (body.get(key) for _, body in rows for key in PEOPLE))
            deep = {row.seq for row, _ in rows if MARK in row.body}
            known |= self._names(connection, (d for row, body in rows if row.seq in deep for d in digests_in(body)))
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

    @plainly
    def head(self) -> Head:
        """The last link, to be kept elsewhere."""
        e = schema.events.c
        with reading(self.engine) as connection:
            last = connection.execute(select(e.seq, e.hash).order_by(e.seq.desc()).limit(1)).first()
        return Head(last.seq, last.hash) if last else Head(0, hash_chain.NOTHING)

    @plainly
    def verify(self, *, head: Head | None = None) -> Verdict:
        """Recompute everything; with a ``head`` exported earlier, also that nothing was cut off since."""
        with reading(self.engine) as connection, connection.begin():
            problems, events, batches, now = verify.examine(connection, self.people, head)
        return Verdict(not problems, events, batches, problems, now)

    # --- batches

    @plainly
    def record_batch(self, new: NewBatch, decisions: pa.Table, *, unless_sent: bool = False) -> BatchRow:
        """Record a batch, its decisions and a PENDING delivery for each changed one, in one transaction; returns its row.

        Deciding the same again changes nothing while it is still what may be sent. After something else was decided for the
        day, or after it was superseded or taken back, it is a new decision: ``X.2`` (``generation``), with decision ids of
        its own. The same id with another content raises LedgerMismatch. ``decisions``: the columns that the stage writes,
        entities and ids unique. ``unless_sent``: raises DaySent where another batch of the day was sent, or is being sent:
        between the look at a day and its record a push may begin.
        """
        stored, mapping = self._stored(new, decisions)
        root = hash_chain.merkle_root(hash_chain.leaf_hashes(stored))
        changed = pc.sum(stored["changed"]).as_py() or 0
        b = schema.batches.c
        with writing(self.engine) as connection, connection.begin():
            self._lock(connection)
            row = connection.execute(select(schema.batches).where(b.batch_id == new.batch_id)).first()
            if row is not None and (row.digest, row.root) != (new.digest, root):
                raise LedgerMismatch(
                    f"batch {new.batch_id} stands in the ledger with another content: a batch is recorded once; "
                    "decide again under a new id"
                )
            if row is not None:
                newest = self._newest(connection, row)
                if self._counts_still(connection, newest):
                    return self._batch(connection, newest.batch_id)
                number = generation(newest.batch_id)[1] + 1
                new = replace(new, batch_id=f"{row.batch_id}.{number}")
                ids = pc.binary_join_element_wise(stored["decision_id"], str(number), ".")
                stored = stored.set_column(stored.schema.get_field_index("decision_id"), "decision_id", ids)
                root = hash_chain.merkle_root(hash_chain.leaf_hashes(stored))
            if unless_sent:
                self._not_sent(connection, new)
            last = connection.execute(select(func.max(b.sequence))).scalar() or 0
            self._insert_batch(connection, new, last + 1, root, stored, mapping, changed)
            return self._batch(connection, new.batch_id)

    def _not_sent(self, connection: Connection, new: NewBatch) -> None:
        b = schema.batches.c
        day = select(schema.batches).where(b.workflow == new.workflow, b.day == new.day, b.kind == "decision")
        for one in self._rows(connection, connection.execute(day).all()):
            if one.acted or one.delivery == "OPEN":
                raise DaySent(
                    f"{new.workflow}: batch {one.batch_id} of {new.day} was sent while the day was decided anew, and what was "
                    "decided is not recorded. Whoever wants it in the place of what was sent says so: signalbox run "
                    f"{new.workflow} decide --day {new.day} --again"
                )

    def _newest(self, connection: Connection, row: AnyRow) -> AnyRow:
        """The last time that the content of a batch was decided; a rollback is made once for the batch that it takes back."""
        if row.kind != "decision":
            return row
        b = schema.batches.c
        same = connection.execute(
            select(schema.batches).where(
                b.workflow == row.workflow, b.day == row.day, b.kind == row.kind, b.sequence >= row.sequence
            )
        )
        base = generation(row.batch_id)[0]
        mine = [one for one in same if one.batch_id == row.batch_id or generation(one.batch_id)[0] == base]
        return max(mine, key=lambda one: generation(one.batch_id)[1])

    def _counts_still(self, connection: Connection, row: AnyRow) -> bool:
        """Whether a batch is still what may be sent, or was: nothing was decided, superseded or taken back since."""
        if row.kind != "decision":
            return True
        b, r = schema.batches.c, schema.rollbacks.c
        own = connection.execute(select(func.count()).where(r.batch_id == row.batch_id)).scalar()
        newer = select(func.count()).where(b.workflow == row.workflow, b.sequence > row.sequence)
        decided = connection.execute(newer.where(b.kind == "decision", b.day == row.day)).scalar()
        undone = row.delivery == "NONE" and connection.execute(newer.where(b.kind == "rollback")).scalar()
        # all of it was left out, by its limits from what stood then: deciding it again is another try
        skipped = row.delivery == "COMPLETE" and json.loads(row.counts or "{}").keys() == {"SKIPPED"}
        return not (row.superseded_by or own or decided or undone or skipped)

    @plainly
    def newest(self, batch_id: str) -> BatchRow:
        """The batch under which the content of ``batch_id`` was decided last: itself, or ``X.2`` and so on; raises Unknown."""
        with reading(self.engine) as connection, connection.begin():
            return self._rows(connection, [self._newest(connection, self._find(connection, batch_id))])[0]

    def _stored(self, new: NewBatch, decisions: pa.Table) -> tuple[pa.Table, pa.Table]:
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
        digests = pa.array(self.people.digests("entity", words), pa.string())
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

    def _insert_batch(
        self,
        connection: Connection,
        new: NewBatch,
        sequence: int,
        root: str,
        stored: pa.Table,
        mapping: pa.Table,
        changed: int,
    ) -> None:
        now = self.clock()
        findings = [self.people.sealed(finding) for finding in new.findings]
        record, in_record = self.people.sealed({"record": new.record})
        values = {
            "batch_id": new.batch_id, "workflow": new.workflow, "kind": new.kind, "day": new.day, "digest": new.digest,
            "status": new.status, "step": new.step, "as_of": new.as_of, "decided_at": new.decided_at, "run_id": new.run_id,
            "record": hash_chain.canonical(record["record"]), "findings": hash_chain.canonical([body for body, _ in findings]),
            "pools": None if new.pools is None else json.dumps(dict(new.pools), sort_keys=True),
            "reverses": new.reverses, "sequence": sequence, "root": root, "rows": stored.num_rows, "changed": changed,
            "recorded_at": now,
        }  # fmt: skip
        seq = self._append(connection, "batch", batch_body(values, self.people), now)
        connection.execute(
            insert(schema.batches), {**values, "seq": seq, "delivery": "NONE", "retired": False}
        )  # fmt: skip
        self._remember(connection, [*in_record, *(one for _, named in findings for one in named)])
        insert_bulk(connection, schema.names, mapping, ignore_known=True)
        numbers = pa.array([sequence] * stored.num_rows, pa.int64())
        insert_bulk(connection, schema.decisions, stored.add_column(0, "sequence", numbers))
        connection.exec_driver_sql(
            "INSERT INTO deliveries (sequence, n, state, attempts, repeats) "
            f"SELECT sequence, n, 'PENDING', 0, 0 FROM decisions WHERE sequence = {int(sequence)} AND changed <> 0"
        )

    def _batch(self, connection: Connection, batch_id: str) -> BatchRow:
        row = self._find(connection, batch_id)
        return self._rows(connection, [row])[0]

    def _find(self, connection: Connection, batch_id: str) -> AnyRow:
        row = connection.execute(select(schema.batches).where(schema.batches.c.batch_id == batch_id)).first()
        if row is None:
            raise Unknown(f"the ledger holds no batch {batch_id!r}: `signalbox batches` lists them")
        return row

    def _rows(self, connection: Connection, rows: Sequence[AnyRow]) -> list[BatchRow]:
        d = schema.deliveries.c
        counted: dict[int, dict[str, int]] = {}
        for some in chunks(row.sequence for row in rows if row.counts is None and row.delivery == "OPEN"):
            query = select(d.sequence, d.state, func.count()).where(d.sequence.in_(some)).group_by(d.sequence, d.state)
            for sequence, state, count in connection.execute(query):
                counted.setdefault(sequence, {})[state] = count
        findings = {row.sequence: json.loads(row.findings) for row in rows}
        named = [found for some in findings.values() for found in some]
        known = self._names(
            connection, (found[key] for found in named for key in PEOPLE if isinstance(found.get(key), str))
        )
        records = {row.sequence: json.loads(row.record) for row in rows}
        known |= self._names(connection, digests_in([named, *(records[r.sequence] for r in rows if MARK in r.record)]))
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

    @plainly
    def batch(self, batch_id: str) -> BatchRow:
        """One batch; raises Unknown."""
        with reading(self.engine) as connection, connection.begin():
            return self._batch(connection, batch_id)

    @plainly
    def batches(
        self,
        workflow: str | None = None,
        *,
        since: date | None = None,
        model_version: int | None = None,
        kind: str | None = None,
    ) -> list[BatchRow]:
        """Batches in the order in which they were recorded; ``since``: of that day or later; ``model_version``: decided by
        it, or by it in the arm challenger."""
        b = schema.batches.c
        query = select(schema.batches).order_by(b.sequence)
        if workflow is not None:
            query = query.where(b.workflow == workflow)
        if since is not None:
            query = query.where(b.day >= since)
        if kind is not None:
            query = query.where(b.kind == kind)
        with reading(self.engine) as connection, connection.begin():
            rows = self._rows(connection, connection.execute(query).all())
        by = ("model_version", "challenger_version")
        return [
            row for row in rows if model_version is None or str(model_version) in {str(row.record.get(k)) for k in by}
        ]

    @plainly
    def decisions(self, batch_id: str, entities: Sequence[str] | None = None) -> pa.Table:
        """A batch's decisions in their order, columns as they were given and ``n``; names that were forgotten are null."""
        with reading(self.engine) as connection, connection.begin():
            sequence = self._find(connection, batch_id).sequence
            if entities is None:
                return self._decisions(connection, "d.sequence = ?", [sequence])
            parts = []
            for some in chunks(self.people.digests("entity", dict.fromkeys(entities))):
                where = f"d.sequence = ? AND d.entity IN ({', '.join('?' * len(some))})"
                parts.append(self._decisions(connection, where, [sequence, *some]))
        if not parts:
            return self._decisions_empty()
        return pa.concat_tables(parts).sort_by("n")

    def _decisions(self, connection: Connection, where: str, values: Sequence[Any]) -> pa.Table:
        raw = select_bulk(
            connection,
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

    def _decisions_empty(self) -> pa.Table:
        kinds = {"changed": pa.bool_(), "review": pa.bool_(), "reasons": pa.list_(pa.string())}
        return pa.schema([(f.name, kinds.get(f.name, f.type)) for f in _RAW]).empty_table()

    @plainly
    def decision(self, decision_id: str) -> dict[str, Any]:
        """One decision's row and, as ``batch``, its BatchRow; raises Unknown."""
        with reading(self.engine) as connection, connection.begin():
            at = self._at(connection, decision_id)
            row: dict[str, Any] = self._decisions(
                connection, "d.sequence = ? AND d.n = ?", [at.sequence, at.n]
            ).to_pylist()[0]
            found = connection.execute(select(schema.batches).where(schema.batches.c.sequence == at.sequence)).one()
            row["batch"] = self._rows(connection, [found])[0]
        return row

    def _at(self, connection: Connection, decision_id: str) -> AnyRow:
        d = schema.decisions.c
        query = select(d.sequence, d.n).where(d.decision_id == decision_id).order_by(d.sequence.desc()).limit(1)
        at = connection.execute(query).first()
        if at is None:
            raise Unknown(f"the ledger holds no decision {decision_id!r}: `signalbox decisions` lists them")
        return at

    # --- deliveries

    @plainly
    def deliveries(self, batch_id: str, states: Collection[str] | None = None) -> list[Delivery]:
        """A batch's deliveries in the order of its decisions, those in ``states`` only where given."""
        d = schema.deliveries.c
        with reading(self.engine) as connection, connection.begin():
            where = [d.sequence == self._find(connection, batch_id).sequence]
            if states is not None:
                where.append(d.state.in_(list(states)))
            return self._deliveries(connection, where)

    @plainly
    def deliveries_of(self, decision_id: str) -> list[Delivery]:
        """The delivery of a decision, as a list: empty where nothing was to be changed; raises Unknown."""
        d = schema.deliveries.c
        with reading(self.engine) as connection, connection.begin():
            at = self._at(connection, decision_id)
            return self._deliveries(connection, [d.sequence == at.sequence, d.n == at.n])

    @plainly
    def delivered(self, batch_id: str) -> pa.Table:
        """What became of a batch's deliveries, in bulk: n, state, sent, observed, verified_at (naive UTC), in their order."""
        with reading(self.engine) as connection, connection.begin():
            sequence = self._find(connection, batch_id).sequence
            at = "verified_at" if is_sqlite(connection) else "to_char(verified_at, 'YYYY-MM-DD HH24:MI:SS.US')"
            query = f"SELECT n, state, sent, observed, {at} FROM deliveries WHERE sequence = ? ORDER BY n"
            raw = select_bulk(connection, query, [sequence], _DELIVERED)
        return raw.set_column(4, "verified_at", raw["verified_at"].cast(pa.timestamp("us")))

    def _deliveries(self, connection: Connection, where: Sequence[Any]) -> list[Delivery]:
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
        return [Delivery(*_cells(row)) for row in connection.execute(query)]

    @plainly
    def attempts(self, batch_id: str, n: int | None = None) -> list[AttemptRow]:
        """What was tried, of a whole batch or of one delivery, in order."""
        a = schema.attempts.c
        with reading(self.engine) as connection, connection.begin():
            query = select(
                a.n, a.attempt, a.value, a.expected, a.idempotency_key, a.started_at, a.ended_at, a.outcome, a.window_ms,
                a.says,
            ).where(a.sequence == self._find(connection, batch_id).sequence)  # fmt: skip
            if n is not None:
                query = query.where(a.n == n)
            return [AttemptRow(batch_id, *_cells(row)) for row in connection.execute(query.order_by(a.n, a.attempt))]

    @plainly
    def conflicts(self, batch_id: str) -> list[Conflict]:
        """Deliveries of a batch that met, or replaced, somebody else's value."""
        k, c, e = schema.conflicts, schema.decisions, schema.names
        with reading(self.engine) as connection, connection.begin():
            query = (
                select(k.c.n, e.c.name, k.c.state, k.c.expected, k.c.found, k.c.sent, k.c.at)
                .select_from(
                    k.join(c, and_(c.c.sequence == k.c.sequence, c.c.n == k.c.n)).outerjoin(e, e.c.digest == c.c.entity)
                )
                .where(k.c.sequence == self._find(connection, batch_id).sequence)
                .order_by(k.c.n)
            )
            return [Conflict(batch_id, *_cells(row)) for row in connection.execute(query)]

    def _held(self, connection: Connection, lease: Lease) -> None:
        """The fence: the lease is still ours, and stays so until this transaction ends."""
        row = connection.execute(
            select(schema.leases).where(schema.leases.c.system == lease.system).with_for_update()
        ).first()
        if row is None or not row.held or row.fence != lease.fence:
            now = "nobody" if row is None or not row.held else str(Holder(row.host, row.pid, row.started))
            raise Fenced(
                f"the lease {lease.fence} of {lease.system} is no longer ours ({now} holds it): nothing was written"
            )

    def _pushing(self, connection: Connection, lease: Lease, batch_id: str) -> AnyRow:
        """The batch, where its push over this lease's system is open."""
        self._held(connection, lease)
        row = self._find(connection, batch_id)
        if row.delivery != "OPEN":
            why = "complete: it cannot be changed" if row.delivery == "COMPLETE" else "not open: open_push comes first"
            raise LedgerError(f"the push of batch {batch_id} is {why}")
        if row.system != lease.system:
            raise LedgerMismatch(
                f"batch {batch_id} is delivered to {row.system}, and the lease is one of {lease.system}"
            )
        if (batch_id, lease.fence) not in self._opened:
            self._opened_again(connection, batch_id)
            self._opened.add((batch_id, lease.fence))
        return row

    def _opened_again(self, connection: Connection, batch_id: str) -> None:
        """Raise LedgerError where the last push of a batch has ended: what it left is sealed, and a change would break the seal."""
        e = schema.events.c
        named = f'"batch_id":{hash_chain.canonical(batch_id)}'
        query = select(e.kind).where(
            e.kind.in_(("push begun", "push ended", "superseded")), e.body.contains(named, autoescape=True)
        )
        if connection.execute(query.order_by(e.seq.desc()).limit(1)).scalar() == "push ended":
            raise LedgerError(
                f"the push of batch {batch_id} has ended, and is sealed as it stands: open_push comes first"
            )

    def _states(self, connection: Connection, row: AnyRow, numbers: Sequence[int]) -> dict[int, AnyRow]:
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
            found |= {r.n: r for r in connection.execute(query)}
        absent = set(numbers) - found.keys()
        if absent:
            raise Unknown(f"batch {row.batch_id} has no delivery {min(absent)}")
        return found

    @plainly
    def begin(self, lease: Lease, batch_id: str, attempts: Sequence[Attempt]) -> None:
        """Note that these are about to be tried, before anything is sent: IN_FLIGHT, with an attempt row each.

        An attempt that is still open from a process that died ends as ``unknown``. Raises Fenced; LedgerError for a
        delivery in a final state.
        """
        if not attempts:
            return
        a, d = schema.attempts, schema.deliveries
        with writing(self.engine) as connection, connection.begin():
            row = self._pushing(connection, lease, batch_id)
            found = self._states(connection, row, [one.n for one in attempts])
            for one in attempts:
                if found[one.n].state not in OPEN:
                    raise LedgerError(
                        f"batch {batch_id}: delivery {one.n} is {found[one.n].state} and is not sent again"
                    )
            again = [{"s": row.sequence, "k": o.n, "e": o.started_at} for o in attempts if found[o.n].attempts]
            if again:
                mine = and_(a.c.sequence == bindparam("s"), a.c.n == bindparam("k"), a.c.ended_at.is_(None))
                connection.execute(update(a).where(mine).values(ended_at=bindparam("e"), outcome="unknown"), again)
            connection.execute(
                insert(a),
                [
                    {
                        "sequence": row.sequence, "n": one.n, "attempt": found[one.n].attempts + 1, "value": one.value,
                        "expected": one.expected, "idempotency_key": one.idempotency_key, "started_at": one.started_at,
                    }
                    for one in attempts
                ],
            )  # fmt: skip
            connection.execute(
                update(d)
                .where(d.c.sequence == row.sequence, d.c.n == bindparam("k"))
                .values(state="IN_FLIGHT", expected=bindparam("x"), attempts=d.c.attempts + 1),
                [{"k": one.n, "x": one.expected} for one in attempts],
            )

    @plainly
    def settle(self, lease: Lease, batch_id: str, results: Sequence[Result]) -> None:
        """Write down what became of these: deliveries, their open attempts, acknowledged values and conflicts.

        Raises Fenced; LedgerError where a final state would change (only ACKED may become OVERWRITTEN).
        """
        if not results:
            return
        with writing(self.engine) as connection, connection.begin():
            row = self._pushing(connection, lease, batch_id)
            found = self._states(connection, row, [one.n for one in results])
            for one in results:
                was = found[one.n].state
                if one.state not in OPEN | FINAL:
                    raise LedgerError(f"batch {batch_id}: delivery {one.n}: there is no state {one.state!r}")
                if was in FINAL and one.state != was and (was, one.state) != ("ACKED", "OVERWRITTEN"):
                    raise LedgerError(
                        f"batch {batch_id}: delivery {one.n} is {was}, which stays: it cannot become {one.state}"
                    )
                if one.state == "ACKED" and (one.observed is None or one.verified_at is None):
                    raise LedgerError(
                        f"batch {batch_id}: delivery {one.n}: ACKED needs what the read-back showed, and when"
                    )
            self._settle(connection, lease, row, found, results)

    def _settle(
        self, connection: Connection, lease: Lease, row: AnyRow, found: Mapping[int, AnyRow], results: Sequence[Result]
    ) -> None:
        now = self.clock()
        targets = {one.target: self.people.digest("target", one.target) for one in results if one.target is not None}
        self._remember(connection, ((d, "target", t) for t, d in targets.items()))
        changes, ended, proved, met = [], [], [], []
        last = self._proved_last(connection, lease.system, [found[one.n].entity for one in results if one.verified_at])
        for one in results:
            was = found[one.n]
            said = self.people.text(one.says)
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
        d, a = schema.deliveries, schema.attempts
        names = [k for k in changes[0] if k != "k"]
        connection.execute(
            update(d)
            .where(d.c.sequence == row.sequence, d.c.n == bindparam("k"))
            .values({name: bindparam(f"v_{name}") for name in names}),
            [{"k": c["k"], **{f"v_{name}": c[name] for name in names}} for c in changes],
        )
        if ended:
            connection.execute(
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
        if proved:
            connection.execute(_ACKNOWLEDGE, proved)
        if met:
            connection.execute(delete(schema.conflicts).where(
                schema.conflicts.c.sequence == row.sequence, schema.conflicts.c.n == bindparam("k")
            ), [{"k": one["n"]} for one in met])  # fmt: skip
            connection.execute(insert(schema.conflicts), met)

    def _proved_last(
        self, connection: Connection, system: str, entities: Sequence[str]
    ) -> dict[str, tuple[datetime, int, int]]:
        """When the value that stands acknowledged of each entity was proved, and by which delivery."""
        k = schema.acknowledged.c
        found: dict[str, tuple[datetime, int, int]] = {}
        for some in chunks(entities):
            query = select(k.entity, k.verified_at, k.sequence, k.n).where(k.system == system, k.entity.in_(some))
            found |= {row.entity: (row.verified_at, row.sequence, row.n) for row in connection.execute(query)}
        return found

    @plainly
    def acknowledged(
        self, system: str, entities: Sequence[str], *, workflow: str | None = None
    ) -> dict[str, Acknowledged]:
        """The last proven value of ours for each entity that has one, also where it was sent for another entity of the
        same target. ``workflow``: of this workflow alone; what another one proved since does not count as its own."""
        by_digest = dict(zip(self.people.digests("entity", entities), entities, strict=True))
        with reading(self.engine) as connection, connection.begin():
            own = self._acknowledged(connection, system, by_digest, workflow)
        return {
            by_digest[digest]: Acknowledged(row.value, row.verified_at, row.batch_id) for digest, row in own.items()
        }

    def _acknowledged(
        self, connection: Connection, system: str, digests: Iterable[str], workflow: str | None
    ) -> dict[str, AnyRow]:
        k, b = schema.acknowledged, schema.batches
        rows = select(
            k.c.entity,
            k.c.target,
            k.c.value,
            k.c.verified_at,
            k.c.sequence,
            b.c.batch_id,
            b.c.workflow,
            b.c.kind,
            b.c.day,
        ).join(b, b.c.sequence == k.c.sequence)
        own: list[AnyRow] = []
        # Two steps, each along an index: the entities, then whoever else shares their targets.
        for some in chunks(digests):
            own += connection.execute(rows.where(k.c.system == system, k.c.entity.in_(some))).all()
        targets: list[AnyRow] = []
        for some in chunks({row.target for row in own if row.target}):
            targets += connection.execute(rows.where(k.c.system == system, k.c.target.in_(some))).all()
        if workflow is not None and (others := {r.entity for r in (*own, *targets) if r.workflow != workflow}):
            before = self._proved_by(connection, system, others, workflow)
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

    def _proved_by(
        self, connection: Connection, system: str, digests: Iterable[str], workflow: str
    ) -> dict[str, AnyRow]:
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
            found |= {row.entity: row for row in connection.execute(query.where(c.c.entity.in_(some)))}
        return found

    @plainly
    def setters(self, system: str, entities: Sequence[str], workflow: str) -> dict[str, tuple[int, str]]:
        """Where another workflow proved a value last: entity → (value, workflow)."""
        by_digest = dict(zip(self.people.digests("entity", entities), entities, strict=True))
        k, b = schema.acknowledged, schema.batches
        rows = select(k.c.entity, k.c.value, b.c.workflow).join(b, b.c.sequence == k.c.sequence)
        found: dict[str, tuple[int, str]] = {}
        with reading(self.engine) as connection, connection.begin():
            for some in chunks(by_digest):
                query = rows.where(k.c.system == system, k.c.entity.in_(some), b.c.workflow != workflow)
                found |= {by_digest[r.entity]: (r.value, r.workflow) for r in connection.execute(query)}
        return found

    @plainly
    def open_push(self, lease: Lease, batch_id: str, run_id: str = "") -> None:
        """Note that a push begins, or goes on, and by which run.

        Raises Fenced; LedgerError where the batch is refused or complete; LedgerMismatch where its decisions are not those
        that were recorded, and approved: nothing of it is sent then.
        """
        with writing(self.engine) as connection, connection.begin():
            self._held(connection, lease)
            self._lock(connection)
            row = self._find(connection, batch_id)
            if row.status == "REFUSED" or row.delivery == "COMPLETE":
                what = "refused" if row.status == "REFUSED" else "already delivered"
                raise LedgerError(f"batch {batch_id} is {what}: there is nothing to push")
            if row.system not in (None, lease.system):
                raise LedgerMismatch(
                    f"batch {batch_id} is delivered to {row.system}, and the lease is one of {lease.system}"
                )
            self._as_recorded(connection, row)
            body = {"batch_id": batch_id, "workflow": row.workflow, "system": lease.system, "fence": lease.fence}
            self._append(connection, "push begun", body | ({"run_id": run_id} if run_id else {}))
            b = schema.batches
            connection.execute(
                update(b).where(b.c.sequence == row.sequence).values(delivery="OPEN", system=lease.system, counts=None)
            )

    def _as_recorded(self, connection: Connection, row: AnyRow) -> None:
        """The decisions, the pools and the record are those that the chain holds: an approval is for exactly them."""
        e = schema.events.c
        event = connection.execute(select(e.body).where(e.seq == row.seq)).scalar()
        body = json.loads(event) if event else {}
        values = {k: row._mapping[k] for k in body if k in row._mapping and k != "findings"}
        same = bool(body) and all(
            hash_chain.canonical(value) == hash_chain.canonical(body[name])
            for name, value in batch_body({"findings": "", **values}, self.people).items()
            if name != "findings"  # words, of which a name may have been erased
        )
        if not same or row.root != hash_chain.merkle_root(
            hash_chain.leaf_hashes(stored_rows(connection, schema.decisions, row.sequence))
        ):
            raise LedgerMismatch(
                f"batch {row.batch_id}: its decisions or its record are not those that were recorded and approved: nothing "
                "of it is sent. signalbox verify says what was changed; decide the day again"
            )

    @plainly
    def take_back(self, lease: Lease, batch_id: str, entities: Collection[str] = ()) -> int:
        """Give a delivery to what the batch leaves alone although an earlier batch's value stands there; returns how many.

        That is every unchanged decision whose entity shows, by the last value that a decision of the same workflow proved
        after this batch's ``as_of``, something else than was decided here; and ``entities``, of which an earlier batch's
        write may still land. The push must be open. Raises Fenced.
        """
        d = schema.deliveries
        with writing(self.engine) as connection, connection.begin():
            row = self._pushing(connection, lease, batch_id)
            numbers = self._left_standing(connection, row, lease.system, entities)
            if not numbers:
                return 0
            rows = [
                {"sequence": row.sequence, "n": n, "state": "PENDING", "attempts": 0, "repeats": 0}
                for n in sorted(numbers)
            ]
            connection.execute(insert(d), rows)
            body = {"batch_id": batch_id, "workflow": row.workflow, "system": lease.system, "fence": lease.fence}
            self._append(connection, "taken back", {**body, "n": numbers})
            return len(numbers)

    @plainly
    def close_push(self, lease: Lease, batch_id: str, complete: bool) -> None:
        """Note that a push ends, with a root over what it left; ``complete`` seals the batch for good.

        Raises Fenced; LedgerError where ``complete`` and a delivery is still open. Nothing happens to a sealed batch.
        """
        with writing(self.engine) as connection, connection.begin():
            self._held(connection, lease)
            self._lock(connection)
            if self._find(connection, batch_id).delivery == "COMPLETE":
                return
            row = self._pushing(connection, lease, batch_id)
            self._seal(connection, lease, row, complete)

    def _seal(self, connection: Connection, lease: Lease, row: AnyRow, complete: bool) -> None:
        d, b = schema.deliveries.c, schema.batches
        query = select(d.state, func.count()).where(d.sequence == row.sequence).group_by(d.state)
        counts = {state: count for state, count in connection.execute(query)}
        left = sum(counts.get(state, 0) for state in OPEN)
        if complete and left:
            raise LedgerError(f"batch {row.batch_id} is not complete: {left} deliveries are still open")
        body = {
            "batch_id": row.batch_id, "workflow": row.workflow, "system": lease.system, "fence": lease.fence,
            "complete": complete, "counts": counts, **roots(connection, row.sequence),
        }  # fmt: skip
        self._append(connection, "push ended", body)
        self._opened.discard((row.batch_id, lease.fence))
        if complete:
            connection.execute(
                update(b)
                .where(b.c.sequence == row.sequence)
                .values(delivery="COMPLETE", system=lease.system, counts=hash_chain.canonical(counts))
            )

    @plainly
    def supersede(self, lease: Lease, older_batch_ids: Sequence[str], by: str) -> None:
        """Skip what is still PENDING of older batches; one with nothing open left is sealed. Raises Fenced.

        One with something left that may have been sent stays open, as after ``open_push``: what is found out of it is
        settled next, and ``close_push`` seals it.
        """
        d, b = schema.deliveries, schema.batches
        with writing(self.engine) as connection, connection.begin():
            self._held(connection, lease)
            self._lock(connection)
            self._find(connection, by)
            says = f"superseded by {by}"
            for batch_id in older_batch_ids:
                row = self._find(connection, batch_id)
                if row.delivery == "COMPLETE" or batch_id == by:
                    continue
                if row.system not in (None, lease.system):
                    raise LedgerMismatch(
                        f"batch {batch_id} is delivered to {row.system}, the lease is one of {lease.system}"
                    )
                skipped = connection.execute(
                    update(d)
                    .where(d.c.sequence == row.sequence, d.c.state == "PENDING")
                    .values(state="SKIPPED", says=says, says_digest=self.people.text(says))
                ).rowcount
                body = {"batch_id": batch_id, "workflow": row.workflow, "system": lease.system, "fence": lease.fence}
                self._append(connection, "superseded", {**body, "by": by, "skipped": skipped})
                connection.execute(
                    update(b)
                    .where(b.c.sequence == row.sequence)
                    .values(superseded_by=by, delivery="OPEN", system=lease.system, counts=None)
                )
                open_left = connection.execute(
                    select(func.count()).where(d.c.sequence == row.sequence, d.c.state.in_(OPEN))
                ).scalar()
                if not open_left:
                    self._seal(connection, lease, row, complete=True)

    @plainly
    def would_take_back(self, system: str, batch_id: str) -> list[Delivery]:
        """The deliveries that ``take_back`` would add now, as they would be."""
        c, e = schema.decisions, schema.names
        with reading(self.engine) as connection, connection.begin():
            row = self._find(connection, batch_id)
            numbers = self._left_standing(connection, row, system, ())
            found: list[Delivery] = []
            for some in chunks(numbers):
                query = (
                    select(c.c.n, c.c.decision_id, e.c.name, c.c.arm, c.c.before, c.c.after, c.c.expected_gain)
                    .select_from(c.outerjoin(e, e.c.digest == c.c.entity))
                    .where(c.c.sequence == row.sequence, c.c.n.in_(some))
                    .order_by(c.c.n)
                )
                nothing = dict.fromkeys(("target", "expected", "sent", "prior", "observed", "verified_at", "says"))
                found += [
                    Delivery(
                        batch_id,
                        n,
                        decision,
                        entity,
                        arm,
                        before,
                        after,
                        gain,
                        "PENDING",
                        attempts=0,
                        repeats=0,
                        **nothing,
                    )
                    for n, decision, entity, arm, before, after, gain in connection.execute(query)
                ]
        return found

    def _left_standing(self, connection: Connection, row: AnyRow, system: str, entities: Collection[str]) -> list[int]:
        """Decisions of a batch that change nothing, have no delivery, and whose entity shows an earlier batch's value."""
        k, b, c, d = schema.acknowledged, schema.batches, schema.decisions, schema.deliveries
        same_day = and_(b.c.day == row.day, b.c.kind == "decision", b.c.sequence < row.sequence)
        # Whoever proved last: where that was another workflow, what this one had proved before may stand there again.
        since = select(k.c.entity).join(b, b.c.sequence == k.c.sequence)
        since = since.where(
            k.c.system == system, (k.c.verified_at > row.as_of) | and_(b.c.workflow == row.workflow, same_day)
        )
        own = self._acknowledged(connection, system, connection.execute(since).scalars().all(), row.workflow)
        stands: dict[str, int | None] = {
            entity: one.value
            for entity, one in own.items()
            if one.kind == "decision"
            and one.sequence < row.sequence
            and (one.verified_at > row.as_of or one.day == row.day)
        }
        # What a system made of an earlier write of the day, or what that write replaced, proves no value of ours.
        odd = (
            select(c.c.entity, d.c.observed)
            .select_from(
                d.join(c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n)).join(b, b.c.sequence == d.c.sequence)
            )
            .where(
                b.c.workflow == row.workflow, same_day, d.c.state.in_(("REJECTED", "OVERWRITTEN")), d.c.sent.is_not(None),
                d.c.observed.is_not(None), d.c.observed != d.c.prior,
            )
        )  # fmt: skip
        stands = {one.entity: one.observed for one in connection.execute(odd)} | stands
        stands |= dict.fromkeys(self.people.digests("entity", list(entities)))
        if not stands:
            return []
        left = select_bulk(
            connection,
            'SELECT n, entity, "after" FROM decisions WHERE sequence = ? AND changed = 0 AND "after" IS NOT NULL',
            [row.sequence],
            pa.schema({"n": pa.int64(), "entity": pa.string(), "after": pa.int64()}),
        )
        left = left.filter(pc.is_in(left["entity"], pa.array(list(stands), pa.string())))
        numbers = {r["n"] for r in left.to_pylist() if stands[r["entity"]] != r["after"]}
        for some in chunks(sorted(numbers)):
            known = select(d.c.n).where(d.c.sequence == row.sequence, d.c.n.in_(some))
            numbers -= set(connection.execute(known).scalars())
        return sorted(numbers)

    @plainly
    def proven(self, workflow: str, since: datetime, until: datetime) -> pa.Table:
        """Values of a workflow's deliveries that a read-back proved after ``since`` and by ``until``.

        Columns: entity_id (rows whose name was forgotten are left out), value, prior (what stood before the delivery's first
        write), verified_at, batch_id, sequence, kind and day of the batch; in the order of proof. Of batches whose rows
        were retired only the last value of each entity is known.
        """
        b, d, c, k, e = schema.batches.c, schema.deliveries, schema.decisions, schema.acknowledged, schema.names
        whole = select(d.c.sequence, c.c.entity, d.c.observed.label("value"), d.c.prior, d.c.verified_at).join(
            c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n)
        )
        ours = (d.c.state == "ACKED") | ((d.c.state == "OVERWRITTEN") & (d.c.observed == d.c.sent))
        last = select(k.c.sequence, k.c.entity, k.c.value, k.c.value.label("prior"), k.c.verified_at)
        found: list[AnyRow] = []
        with reading(self.engine) as connection, connection.begin():
            batches = {
                row.sequence: row
                for row in connection.execute(
                    select(b.sequence, b.batch_id, b.kind, b.day, b.retired).where(
                        b.workflow == workflow, b.delivery != "NONE"
                    )
                )
            }
            pushed = self._pushed_since(connection, workflow, since)
            for some in chunks(s for s, row in batches.items() if row.batch_id in pushed and not row.retired):
                inside = (d.c.verified_at > since) & (d.c.verified_at <= until)
                found += connection.execute(whole.where(d.c.sequence.in_(some), ours, inside)).all()
            for some in chunks(s for s, row in batches.items() if row.batch_id in pushed and row.retired):
                inside = (k.c.verified_at > since) & (k.c.verified_at <= until)
                found += connection.execute(last.where(k.c.sequence.in_(some), inside)).all()
            known: dict[str, str] = {}
            for some in chunks({row.entity for row in found}):
                names = connection.execute(select(e.c.digest, e.c.name).where(e.c.digest.in_(some)))
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

    def _pushed_since(self, connection: Connection, workflow: str, since: datetime) -> set[str]:
        """Batches of a workflow of which a push was under way at some time after ``since``."""
        e, b = schema.events.c, schema.batches.c
        ended = select(e.body).where(e.kind.in_(["push begun", "push ended"]), e.at > since)
        bodies = (json.loads(row.body) for row in connection.execute(ended))
        still = select(b.batch_id).where(b.workflow == workflow, b.delivery == "OPEN")
        return {body["batch_id"] for body in bodies if body.get("workflow") == workflow} | set(
            connection.execute(still).scalars()
        )

    # --- leases

    @plainly
    def lease(self, system: str, holder: Holder | None = None, ttl_s: float = 60.0) -> Lease:
        """The right to write to ``system`` for ``ttl_s`` seconds; raises Busy.

        Granted where it is free, or its holder is a process of this host that is gone, or, for another host's, where it
        has expired. A process that lives on this host keeps it, whatever the clock says.
        """
        holder = holder or Holder.here()
        table = schema.leases
        now = self.clock()
        expires_at = now + timedelta(seconds=ttl_s)
        with writing(self.engine) as connection, connection.begin():
            connection.execute(
                text(
                    "INSERT INTO leases (system, fence, held, host, pid, started, expires_at) "
                    "VALUES (:system, 0, :held, '', 0, '', :now) ON CONFLICT DO NOTHING"
                ).bindparams(
                    bindparam("now", type_=table.c.expires_at.type), bindparam("held", type_=table.c.held.type)
                ),
                {"system": system, "held": False, "now": now},
            )
            row = connection.execute(select(table).where(table.c.system == system).with_for_update()).one()
            if row.held:
                other = Holder(row.host, row.pid, row.started)
                here = other.host == Holder.here().host
                left = (str(self.engine.url), system, row.fence) in ABANDONED
                if not (left or (other.is_dead() if here else row.expires_at <= now)):
                    raise Busy(system, other, row.expires_at)
            fence = row.fence + 1
            connection.execute(
                update(table).where(table.c.system == system).values(
                    fence=fence, held=True, host=holder.host, pid=holder.pid, started=holder.started, expires_at=expires_at
                )
            )  # fmt: skip
        return Lease(system, fence, holder, expires_at)

    @plainly
    def renew(self, lease: Lease, ttl_s: float = 60.0) -> Lease:
        """The same lease for another ``ttl_s`` seconds from now; raises Fenced."""
        expires_at = self.clock() + timedelta(seconds=ttl_s)
        table = schema.leases
        with writing(self.engine) as connection, connection.begin():
            self._held(connection, lease)
            connection.execute(update(table).where(table.c.system == lease.system).values(expires_at=expires_at))
        return replace(lease, expires_at=expires_at)

    @plainly
    def release(self, lease: Lease) -> None:
        """Give the lease back; nothing happens where it is somebody else's by now."""
        table = schema.leases
        mine = and_(table.c.system == lease.system, table.c.fence == lease.fence)
        with writing(self.engine) as connection, connection.begin():
            connection.execute(update(table).where(mine).values(held=False))

    def abandon(self, lease: Lease) -> None:
        """Say that this process no longer uses a lease that it could not release; the next one asked for is granted."""
        ABANDONED.add((str(self.engine.url), lease.system, lease.fence))

    # --- people: approvals, switches, promotions, rollbacks

    @plainly
    def approve(
        self, batch_id: str, digest: str, approver: str, reason: str, at: datetime, expires_at: datetime
    ) -> Approval:
        """Record an approval of exactly this content; raises LedgerMismatch where the batch has another digest.

        Who ``approver`` is must have been proved before (``delivery.approvals``).
        """
        with writing(self.engine) as connection, connection.begin():
            if self._find(connection, batch_id).digest != digest:
                raise LedgerMismatch(f"batch {batch_id} has another content than the one approved: look at it again")
            values = {"batch_id": batch_id, "digest": digest, "approver": approver, "reason": reason, "at": at}
            self._record(connection, "approval", {**values, "expires_at": expires_at})
        return Approval(batch_id, digest, approver, reason, at, expires_at)

    @plainly
    def approvals(self, batch_id: str) -> list[Approval]:
        """Approvals of a batch, oldest first; whether they count is for ``delivery.approvals`` to say."""
        a = schema.approvals
        return [
            Approval(*row) for row in self._people(
                a, [a.c.batch_id, a.c.digest, a.c.approver, a.c.reason, a.c.at, a.c.expires_at], a.c.batch_id == batch_id
            )
        ]  # fmt: skip

    def _people(self, table: Table, columns: Sequence[Any], where: Any = None) -> list[list[Any]]:
        """Rows of a chained table, oldest first, with names for digests and values for JSON."""
        query = select(*columns).order_by(table.c.seq)
        if where is not None:
            query = query.where(where)
        with reading(self.engine) as connection, connection.begin():
            rows = connection.execute(query).all()
            known = self._names(connection, (getattr(row, c.name) for row in rows for c in columns if c.name in PEOPLE))
            said = [getattr(row, c.name) for row in rows for c in columns if c.name in _JSON]
            known |= self._names(
                connection, (d for words in said if MARK in words for d in digests_in(json.loads(words)))
            )
        return [
            [
                known.get(value)
                if c.name in PEOPLE
                else unsealed(json.loads(value), known)
                if c.name in _JSON
                else value
                for c, value in zip(columns, row, strict=True)
            ]
            for row in rows
        ]

    @plainly
    def set_approver(self, name: str, secret_hash: str) -> None:
        """Enrol an approver or replace the secret; only its hash is given, and the one before it is erased."""
        self._approver(name, True, secret_hash)

    @plainly
    def revoke_approver(self, name: str) -> None:
        """An approver no more; raises Unknown where there is none of that name."""
        if name not in {one.name for one in self.approvers()}:
            raise Unknown(f"there is no approver {name!r}")
        self._approver(name, False, None)

    def _approver(self, name: str, active: bool, secret_hash: str | None) -> None:
        with writing(self.engine) as connection, connection.begin():
            self._lock(connection)
            self._set_approver(connection, name, active, secret_hash)

    def _set_approver(self, connection: Connection, name: str, active: bool, secret_hash: str | None) -> None:
        a = schema.approvers
        digest = self.people.digest("person", name)
        connection.execute(update(a).where(a.c.approver == digest).values(secret_hash=None))
        values = {"approver": name, "active": active, "secret_hash": secret_hash, "at": self.clock()}
        self._record(connection, "approver", values)

    @plainly
    def approvers(self) -> list[Approver]:
        """Who may approve now, by name."""
        a = schema.approvers
        latest = {name: (active, secret, at) for name, active, secret, at in self._people(
            a, [a.c.approver, a.c.active, a.c.secret_hash, a.c.at]
        )}  # fmt: skip
        return [
            Approver(name, secret, at) for name, (active, secret, at) in sorted(
                item for item in latest.items() if item[0] is not None
            ) if active
        ]  # fmt: skip

    @plainly
    def switch(self, workflow: str, stopped: bool, actor: str, reason: str) -> Switch:
        """Stop a workflow, or let it go on."""
        one = Switch(workflow, stopped, actor, reason, self.clock())
        with writing(self.engine) as connection, connection.begin():
            self._record(connection, "switch", asdict(one))
        return one

    @plainly
    def stopped(self, workflow: str) -> Switch | None:
        """The switch that stops the workflow; None where it may act."""
        s = schema.switches
        columns = [s.c.workflow, s.c.stopped, s.c.actor, s.c.reason, s.c.at]
        last = [Switch(*row) for row in self._people(s, columns, s.c.workflow == workflow)][-1:]
        return last[0] if last and last[0].stopped else None

    @plainly
    def promotion(
        self, workflow: str, version: int | None, action: str, actor: str, evidence: Mapping[str, Any] | None = None
    ) -> Promotion:
        """Record that a model version was moved (promoted, taken back, blocked …)."""
        one = Promotion(workflow, version, action, actor, dict(evidence or {}), self.clock())
        with writing(self.engine) as connection, connection.begin():
            self._record(connection, "promotion", {**asdict(one), "evidence": one.evidence})
        return one

    @plainly
    def promotions(self, workflow: str) -> list[Promotion]:
        """What happened to a workflow's versions, oldest first."""
        p = schema.promotions
        columns = [p.c.workflow, p.c.version, p.c.action, p.c.actor, p.c.evidence, p.c.at]
        return [Promotion(*row) for row in self._people(p, columns, p.c.workflow == workflow)]

    @plainly
    def rollback_asked(
        self, batch_id: str, *, actor: str, reason: str, trigger: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Record that somebody or a guard (``trigger``) wants a batch taken back; raises Unknown."""
        self._rollback(batch_id, "asked", actor, reason, trigger, evidence)

    @plainly
    def rollback_complete(
        self, batch_id: str, *, actor: str, reason: str, trigger: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Record that the batch is taken back, with what could not be in ``evidence``; raises Unknown."""
        self._rollback(batch_id, "complete", actor, reason, trigger, evidence)

    @plainly
    def rollback_closed(
        self, batch_id: str, *, actor: str, reason: str, trigger: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        """Record that a person ended the rollback of a batch with what was left, counted in ``evidence``; raises Unknown."""
        self._rollback(batch_id, "closed", actor, reason, trigger, evidence)

    def _rollback(
        self, batch_id: str, action: str, actor: str, reason: str, trigger: str, evidence: Mapping[str, Any] | None
    ) -> None:
        values = {
            "batch_id": batch_id, "action": action, "actor": actor, "reason": reason, "trigger": trigger,
            "evidence": dict(evidence or {}), "at": self.clock(),
        }  # fmt: skip
        with writing(self.engine) as connection, connection.begin():
            self._find(connection, batch_id)
            self._record(connection, "rollback", values)

    @plainly
    def rollbacks(self, batch_id: str | None = None) -> list[Rollback]:
        """Rollbacks asked for, complete and closed, oldest first."""
        r = schema.rollbacks
        columns = [r.c.batch_id, r.c.action, r.c.actor, r.c.reason, r.c.trigger, r.c.evidence, r.c.at]
        where = None if batch_id is None else r.c.batch_id == batch_id
        return [Rollback(*row) for row in self._people(r, columns, where)]

    @plainly
    def pending_rollbacks(self, workflow: str) -> list[str]:
        """Batches of a workflow whose rollback was asked for and is neither complete nor closed, oldest request first."""
        r, b = schema.rollbacks, schema.batches
        query = select(r.c.batch_id, r.c.action).join(b, b.c.batch_id == r.c.batch_id).where(b.c.workflow == workflow)
        with reading(self.engine) as connection:
            last = {row.batch_id: row.action for row in connection.execute(query.order_by(r.c.seq))}
        return [batch_id for batch_id, action in last.items() if action == "asked"]

    @plainly
    def taken_back_since(self, batch_id: str) -> str | None:
        """A rollback of an entity that the batch would change, recorded after the batch was decided, or under way by then: its
        values were proven later. None: there is none."""
        b, d = schema.batches, schema.deliveries
        with reading(self.engine) as connection, connection.begin():
            row = self._find(connection, batch_id)
            proven = select(d.c.n).where(d.c.sequence == b.c.sequence, d.c.verified_at > row.recorded_at)
            later = select(b.c.sequence, b.c.batch_id).where(
                b.c.workflow == row.workflow, b.c.kind == "rollback", (b.c.sequence > row.sequence) | proven.exists()
            )
            undone = connection.execute(later.order_by(b.c.sequence.desc())).all()
            mine = self._changed(connection, row.sequence) if undone else pa.array([], pa.string())
            for one in undone:
                since = None if one.sequence > row.sequence else row.recorded_at
                if pc.any(pc.is_in(self._changed(connection, one.sequence, since), mine)).as_py():
                    return str(one.batch_id)
        return None

    def _changed(self, connection: Connection, sequence: int, proven_since: datetime | None = None) -> pa.Array:
        """The digests of the entities that a batch changes; ``proven_since``: of which it proved a value after that."""
        c, d = schema.decisions, schema.deliveries
        query = select(c.c.entity).where(c.c.sequence == sequence, c.c.changed != 0)
        if proven_since is not None:
            query = query.join(d, and_(d.c.sequence == c.c.sequence, d.c.n == c.c.n))
            query = query.where(d.c.verified_at > proven_since)
        return pa.array(connection.execute(query).scalars().all(), pa.string())

    @plainly
    def held_by(self, undoing: str, batch_id: str, standing: Sequence[str], undone: Sequence[str]) -> dict[int, str]:
        """Which deliveries of the rollback ``undoing`` of ``batch_id``, not sent yet, are of entities or targets that a newer
        batch holds: n → the newest of them.

        ``standing``: newer batches that are not rolled back, each of which holds what it proved. ``undone``: rollbacks of
        newer batches; what one of them did not bring back is still held. One pass over the rows of those batches.
        """
        if not standing and not undone:
            return {}
        with reading(self.engine) as connection, connection.begin():
            of = self._sequences(connection, [undoing, batch_id, *standing, *undone])
            named = {sequence: name for name, (sequence, _) in of.items()}
            waiting = _waiting(of[undoing][0], of[batch_id][0])
            held: dict[str, int] = {}
            for column, query in (("entity", _PROVED), ("target", _PROVED_AT)):
                for some in chunks(of[name][0] for name in standing):
                    where = f"d.sequence IN ({', '.join(map(str, some))}) AND {column} IN (SELECT {column} FROM ({waiting}) w)"
                    for key, sequence in _raw(connection, f"{query} WHERE {where} AND {_STOOD} GROUP BY {column}"):
                        held[key] = max(sequence, held.get(key, 0))
            for name in undone:
                sequence, reverses = of[name]
                newer = self._find(connection, reverses).sequence if reverses else 0
                named[newer] = reverses or ""
                kept = _raw(connection, _NOT_BACK.format(undoing=sequence, newer=newer))
                past = self._passed(connection, of[undoing][0], {entity for entity, *_ in kept}) if kept else {}
                for entity, target, after in kept:
                    if past.get((entity, after), 0) > newer:
                        continue  # a newer batch's rollback has brought back what stood before this one
                    for key in (entity, target):
                        if key is not None:
                            held[key] = max(newer, held.get(key, 0))
            rows = _raw(connection, waiting) if held else []
        found = {n: held.get(entity) or held.get(target or "") for n, entity, target in rows}
        return {n: named[sequence] for n, sequence in found.items() if sequence}

    def _passed(self, connection: Connection, undoing: int, entities: Collection[str]) -> dict[tuple[str, int], int]:
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
            rows = connection.execute(query.where(c.c.entity.in_(some)))
            found |= {(entity, after): int(newest) for entity, after, newest in rows}
        return found

    @plainly
    def left_of(self, batch_id: str, undone: Sequence[str]) -> list[Leftover]:
        """What these rollbacks left, or brought back, of the entities that ``batch_id`` decides on."""
        with reading(self.engine) as connection, connection.begin():
            mine = self._find(connection, batch_id).sequence
            of = {sequence: name for name, (sequence, _) in self._sequences(connection, undone).items()}
            rows: list[tuple[Any, ...]] = []
            for some in chunks(of):
                rows += _raw(connection, _LEFT.format(undone=", ".join(map(str, some)), mine=mine))
            numbers = dict(_raw(connection, f"SELECT entity, n FROM decisions WHERE sequence = {mine}")) if rows else {}
        return [Leftover(of[sequence], numbers[entity], *rest) for sequence, entity, *rest in rows]

    def _sequences(self, connection: Connection, batch_ids: Sequence[str]) -> dict[str, tuple[int, str | None]]:
        """Name → number, and the batch that it reverses."""
        b = schema.batches.c
        found: dict[str, tuple[int, str | None]] = {}
        for some in chunks(batch_ids):
            rows = connection.execute(select(b.batch_id, b.sequence, b.reverses).where(b.batch_id.in_(some)))
            found |= {row.batch_id: (row.sequence, row.reverses) for row in rows}
        return found

    # --- erasing

    @plainly
    def forget(self, name: str) -> int:
        """Erase a name, whatever it named, and what systems said about that entity; returns how many mappings went.

        Where it is quoted in words about somebody else (what a system said of another entity, what a guardrail found, why
        somebody approved), ``(erased)`` stands in its place. The digests stay, so the chain still verifies, and nobody can
        read them any more. An approver is revoked by it.
        """
        n, d, c, a = schema.names, schema.deliveries, schema.decisions, schema.attempts
        digests = [self.people.digest(kind, name) for kind in ("entity", "target", "person")]
        entity, _, person = digests
        with writing(self.engine) as connection, connection.begin():
            self._lock(connection)
            found = set(connection.execute(select(n.c.digest).where(n.c.digest.in_(digests))).scalars())
            v = schema.approvers
            last = select(v.c.active).where(v.c.approver == person).order_by(v.c.seq.desc()).limit(1)
            if found and connection.execute(last).scalar():
                self._set_approver(connection, name, False, None)
            # What holds the entity's value downstream names it too, unless other entities share it.
            at = connection.execute(select(c.c.sequence, c.c.n).where(c.c.entity == entity)).all()
            targets: set[str] = set()
            for sequence, number in at:
                row = connection.execute(select(d.c.target).where(d.c.sequence == sequence, d.c.n == number)).scalar()
                targets |= {row} if row else set()
                for table in (d, a):
                    mine = and_(table.c.sequence == sequence, table.c.n == number)
                    connection.execute(update(table).where(mine).values(says=None))
            for target in targets - found:
                shared = (
                    select(func.count())
                    .select_from(d.join(c, and_(c.c.sequence == d.c.sequence, c.c.n == d.c.n)))
                    .where(d.c.target == target, c.c.entity != entity)
                )
                if not connection.execute(shared).scalar():
                    found.add(target)
            gone = {name, *self._names(connection, found).values()}
            words = self._erase_from_words(connection, gone)
            if found or words:
                self._append(connection, "forgotten", {"digests": sorted(found)} | ({"words": words} if words else {}))
            return connection.execute(delete(n).where(n.c.digest.in_(sorted(found)))).rowcount

    def _erase_from_words(self, connection: Connection, names: Collection[str]) -> dict[str, str]:
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
            for row in connection.execute(select(*key, column).where(or_(*there))).all():
                old = row._mapping[column.name]
                new = hash_chain.canonical(in_texts(json.loads(old), erase)) if is_json else erase(old)
                if new == old:
                    continue
                mine = and_(*(one == row._mapping[one.name] for one in key))
                connection.execute(update(table).where(mine).values({column.name: new}))
                changed[self.people.digest("text", old)] = self.people.digest("text", new)
        return changed

    @plainly
    def retention(self, keep_days: int) -> list[str]:
        """Remove the rows of batches that are complete or refused and older than ``keep_days``; returns their ids.

        Their roots, events and acknowledged values stay, and so does a record that this policy removed the rows. They
        cannot be rolled back or explained afterwards. Names that nothing mentions any more go too.
        """
        if keep_days < 1:
            raise LedgerError(f"a retention of {keep_days} days would remove everything: keep one day at least")
        b = schema.batches
        with writing(self.engine) as connection, connection.begin():
            self._lock(connection)
            before = self.clock().date() - timedelta(days=keep_days)
            query = select(b.c.sequence, b.c.batch_id).where(
                b.c.day < before, b.c.retired.is_(False), (b.c.delivery == "COMPLETE") | (b.c.status == "REFUSED")
            )
            old = connection.execute(query.order_by(b.c.sequence)).all()
            if not old:
                return []
            for some in chunks(row.sequence for row in old):
                for table in (schema.attempts, schema.conflicts, schema.deliveries, schema.decisions):
                    connection.execute(delete(table).where(table.c.sequence.in_(some)))
                connection.execute(update(b).where(b.c.sequence.in_(some)).values(retired=True))
            kept = self._keep_values_of_retired(connection)
            n = schema.names
            used = select(schema.decisions.c.entity).union(
                select(schema.decisions.c.unit).where(schema.decisions.c.unit.is_not(None)),
                select(schema.acknowledged.c.entity),
            )
            found = connection.execute(
                select(b.c.findings).where(b.c.retired.is_(False), b.c.findings != "[]")
            ).scalars()
            quoted = self._quoted(connection, found)
            connection.execute(delete(n).where(n.c.kind == "entity", n.c.digest.not_in(used)))
            self._remember(connection, quoted)
            held = select(schema.deliveries.c.target).where(schema.deliveries.c.target.is_not(None)).union(
                select(schema.acknowledged.c.target).where(schema.acknowledged.c.target.is_not(None))
            )  # fmt: skip
            connection.execute(delete(n).where(n.c.kind == "target", n.c.digest.not_in(held)))
            ids = [row.batch_id for row in old]
            self._append(connection, "retention", {"keep_days": keep_days, "before": before, "batches": ids, **kept})
        return ids

    def _quoted(self, connection: Connection, texts: Iterable[str]) -> list[tuple[str, str, str]]:
        """The names of entities in findings, as (digest, kind, name)."""
        digests = set()
        for findings in map(json.loads, texts):
            digests |= {*digests_in(findings)} | {found.get("entity") for found in findings}
        known = self._names(connection, (d for d in digests if isinstance(d, str)))
        return [(digest, "entity", name) for digest, name in known.items() if digest is not None]

    def _keep_values_of_retired(self, connection: Connection) -> dict[str, Any]:
        """Copy the acknowledged values whose deliveries are gone to where they stay, and seal them: the root for the chain.

        Later deliveries may replace a row of ``acknowledged``; against the copy ``verify`` still tells what stood.
        """
        k, r, b = schema.acknowledged, schema.retired_values, schema.batches
        connection.execute(delete(r))
        of_retired = select(*(k.c[c.name] for c in r.columns)).join(b, b.c.sequence == k.c.sequence).where(b.c.retired)
        connection.execute(insert(r).from_select([c.name for c in r.columns], of_retired))
        rows = stored_rows(connection, r)
        return {"values": rows.num_rows, "values_root": root_of(rows)}


_RAW = pa.schema(
    {
        "decision_id": pa.string(), "entity_id": pa.string(), "unit": pa.string(), "arm": pa.string(),
        "arm_probability": pa.float64(), "perturbation": pa.float64(), "perturbation_probability": pa.float64(),
        "before": pa.int64(), "after": pa.int64(), "changed": pa.int64(), "review": pa.int64(),
        "expected_gain": pa.float64(), "reasons": pa.string(), "n": pa.int64(),
    }
)  # fmt: skip
_DELIVERED = pa.schema(
    {"n": pa.int64(), "state": pa.string(), "sent": pa.int64(), "observed": pa.int64(), "verified_at": pa.string()}
)
_ACKNOWLEDGE = text(
    "INSERT INTO acknowledged (system, entity, target, value, verified_at, sequence, n) "
    "VALUES (:system, :entity, :target, :value, :verified_at, :sequence, :n) ON CONFLICT (system, entity) DO UPDATE SET "
    "target = excluded.target, value = excluded.value, verified_at = excluded.verified_at, sequence = excluded.sequence, "
    "n = excluded.n"
).bindparams(bindparam("verified_at", type_=schema.acknowledged.c.verified_at.type))


_STOOD = "d.state IN ('ACKED', 'OVERWRITTEN')"
_ROWS = "deliveries d JOIN decisions c ON c.sequence = d.sequence AND c.n = d.n"
_PROVED = f"SELECT c.entity, MAX(d.sequence) FROM {_ROWS}"
_PROVED_AT = "SELECT d.target, MAX(d.sequence) FROM deliveries d"
# ``+ 0``: along the index of decision ids, and not through the whole batch for each row.
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


def _cells(row: AnyRow) -> tuple[Any, ...]:
    return tuple(row)


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


def _or(value: Any, other: Any) -> Any:
    return other if value is None else value
