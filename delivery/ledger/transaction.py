"""One open transaction of the ledger: adds events to the chain, and keeps the names that they mention.

Belongs here: what every step of a transaction shares (appending, digests and their names). Does not: what is recorded
(``delivery.ledger.batches``, ``deliveries`` and so on), or opening a transaction (``delivery.ledger.ledger``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

from sqlalchemy import Connection, Row, insert, select, text

from delivery.ledger import hash_chain, schema
from delivery.ledger.database import LedgerError, chunks, is_sqlite
from delivery.ledger.events import CHAINED, body_of
from delivery.ledger.pseudonyms import PEOPLE, People

JSON = frozenset({"evidence"})


AnyRow: TypeAlias = "Row[*tuple[Any, ...]]"


@dataclass(frozen=True)
class Transaction:
    """One transaction on ``connection``, with what its steps need of the ledger that opened it."""

    connection: Connection
    people: People
    clock: Callable[[], datetime]
    opened: set[tuple[str, int]]
    """(batch, fence) of pushes that are known to be open, so that not every write asks the events."""

    def lock(self) -> None:
        """One appender at a time; SQLite has only one writer anyway."""
        if not is_sqlite(self.connection):
            self.connection.execute(select(schema.meta.c.value).where(schema.meta.c.name == "chain").with_for_update())

    def append(self, kind: str, body: Mapping[str, Any], at: datetime | None = None) -> int:
        """Add an event and return its number."""
        self.lock()
        sealed, mapping = self.people.sealed(body)
        self.remember(mapping)
        canonical = hash_chain.canonical(sealed)
        e = schema.events.c
        last = self.connection.execute(select(e.seq, e.hash).order_by(e.seq.desc()).limit(1)).first()
        seq, previous = (last.seq + 1, last.hash) if last else (1, hash_chain.NOTHING)
        at = at or self.clock()
        self.connection.execute(
            insert(schema.events),
            {
                "seq": seq, "at": at, "kind": kind, "body": canonical, "previous": previous,
                "hash": hash_chain.event_hash(previous, seq, at, kind, canonical),
            },
        )  # fmt: skip
        return int(seq)

    def record(self, kind: str, values: Mapping[str, Any]) -> int:
        """Add an event and the row that repeats it."""
        table = CHAINED[kind]
        seq = self.append(kind, body_of(values, self.people), values["at"])
        row = {k: self.people.digest(PEOPLE[k], v) if k in PEOPLE else v for k, v in values.items()}
        row |= {k: hash_chain.canonical(self.people.sealed({k: row[k]})[0][k]) for k in JSON & row.keys()}
        self.connection.execute(insert(table), {"seq": seq, **row})
        return seq

    def remember(self, mapping: Iterable[tuple[str, str, str]]) -> None:
        rows = [{"digest": d, "kind": k, "name": n} for d, k, n in mapping]
        if any("\0" in row["name"] for row in rows):
            raise LedgerError("a name holds the character 0, which no database keeps: mend it where it comes from")
        if rows:
            statement = "INSERT INTO names (digest, kind, name) VALUES (:digest, :kind, :name) ON CONFLICT DO NOTHING"
            self.connection.execute(text(statement), sorted(rows, key=lambda row: row["digest"]))

    def names(self, digests: Iterable[str | None]) -> dict[str | None, str]:
        known: dict[str | None, str] = {}
        for some in chunks({d for d in digests if d}):
            n = schema.names.c
            found = self.connection.execute(select(n.digest, n.name).where(n.digest.in_(some)))
            known |= {row.digest: row.name for row in found}
        return known
