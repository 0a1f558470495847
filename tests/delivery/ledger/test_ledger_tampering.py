"""Whoever edits, deletes, inserts, reorders or cuts off rows of the ledger behind its back is found, on both databases."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from delivery.ledger import Attempt, Head, Ledger, Result, hash_chain, schema
from tests.support.ledgers import KEY, NOW, Clock, new_batch, some_decisions
from tests.support.postgres import Server

NUMBER = itertools.count()


def fill(book: Ledger) -> None:
    """Something in every table: b1 sealed, b2 with an ended push, b3 being pushed, b4 untouched, b5 retired."""
    book.set_approver("ann", "$argon2id$old")
    book.set_approver("ann", "$argon2id$new")
    for name in ("b1", "b2", "b3", "b4"):
        book.record_batch(new_batch(name), some_decisions(name, [f"{name}-{i}" for i in range(3)]))
    book.approve("b1", "d" * 64, "ann", "looks right", NOW, NOW + timedelta(hours=1))
    book.approve("b1", "d" * 64, "ann", "still does", NOW, NOW + timedelta(hours=2))
    book.switch("ad_budget", True, "ann", "too high")
    book.promotion("ad_budget", 3, "promoted", "ann", {"margin": 0.1})
    book.rollback_asked("b1", actor="ann", reason="harm", trigger="person")
    lease = book.lease("ads")
    for name in ("b1", "b2", "b3"):
        book.open_push(lease, name)
        book.begin(lease, name, [Attempt(n, 120, 100, f"{name}-{n}", NOW) for n in range(3)])
        last = "REJECTED" if name == "b1" else "UNKNOWN"
        book.settle(
            lease, name,
            [
                Result(0, "ACKED", target=f"t-{name}", sent=120, observed=120, verified_at=NOW, outcome="accepted", says="ok"),
                Result(1, "CONFLICT", observed=77, says="somebody else"),
                Result(2, last, says="went wrong"),
            ],
        )  # fmt: skip
        if name != "b3":
            book.close_push(lease, name, name == "b1")
    book.record_batch(new_batch("b5", day=date(2026, 1, 2), findings=[]), some_decisions("b5", ["b5-0"]))
    book.open_push(lease, "b5")
    book.settle(lease, "b5", [Result(0, "ACKED", target="t-b5", sent=120, observed=120, verified_at=NOW)])
    book.close_push(lease, "b5", True)
    assert book.retention(30) == ["b5"]
    book.note("guard", {"workflow": "ad_budget", "person": "bob"})


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('filled') / 'ledger.db'}"
    else:
        server: Server = request.getfixturevalue("postgres")
        url = server.database(f"tampered_{next(NUMBER)}")
    with Ledger.open(url, key=KEY, clock=Clock()) as book:
        fill(book)
        yield book


def problems_after(book: Ledger, tamper: Callable[[Connection], object], head: Head | None = None) -> list[str]:
    """What verify says after tampering; the tampering is undone."""
    from delivery.ledger import verify

    with book.engine.connect().execution_options(writes=True) as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("ROLLBACK") if connection.in_transaction() else None
        transaction = connection.begin()
        # An attacker is not held up by foreign keys.
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA defer_foreign_keys = ON")
        else:
            connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        try:
            tamper(connection)
            return verify.examine(connection, book.people, head)[0]
        finally:
            transaction.rollback()


def sql(*statements: str) -> Callable[[Connection], object]:
    return lambda connection: [connection.execute(text(s.replace(":", r"\:"))) for s in statements]


def test_what_was_not_tampered_with_verifies(filled: Ledger) -> None:
    assert problems_after(filled, lambda _: None) == []
    verdict = filled.verify(head=filled.head())
    assert verdict.ok and verdict.batches == 5 and verdict.head == filled.head()


# Columns whose edit means nothing: who holds a lease, and until when, is about now. (Its fence is checked.)
FREE = {("leases", c) for c in ("held", "host", "pid", "started", "expires_at")}


@pytest.mark.parametrize("name", schema.metadata.tables)
def test_an_edit_of_any_column_of_a_sealed_row_is_found(filled: Ledger, name: str) -> None:
    table = schema.metadata.tables[name]
    missed = []
    for column in table.columns:
        if (name, column.name) in FREE:
            continue
        new = {int: '"{0}" + 700', float: "0.123", str: "'x'", bool: 'NOT "{0}"'}.get(
            column.type.python_type, "'2020-01-01'"
        )
        if column.type.python_type in (int, float) and column.nullable:
            new = f"COALESCE({new}, 7)"
        if name == "leases":
            new = "0" if column.name == "fence" else "'other'"
        where = (
            f' WHERE "{column.name}" IS NULL OR "{column.name}" <> 0.123' if column.type.python_type is float else ""
        )
        statement = f'UPDATE "{name}" SET "{column.name}" = {new.format(column.name)}{where}'
        if "sequence" in table.columns and column.name not in ("sequence", "batch_id"):
            # b1 only: sealed; or the one that is retired
            one = 5 if name == "retired_values" else 1
            statement += (" AND " if where else " WHERE ") + f"sequence = {one}"
        if column.unique or (column.primary_key and column.type.python_type is str):
            key = (
                "batch_id = 'b1'"
                if name == "batches"
                else f'"{column.name}" = (SELECT MIN("{column.name}") FROM "{name}")'
            )
            statement = f'UPDATE "{name}" SET "{column.name}" = \'x\' WHERE {key}'
        if not problems_after(filled, sql(statement)):
            missed.append(statement)
    assert not missed, "\n".join(missed)


PUSHED = ("decisions", "deliveries", "attempts", "conflicts")
# Until a push ends nothing is sealed of what it writes, but for what the chain, the decisions or another table tell as well.
UNDER_WAY = {("deliveries", c) for c in ("expected", "sent", "prior", "repeats")} | {
    (table, c)
    for table, columns in {
        "attempts": ("value", "expected", "idempotency_key", "started_at", "ended_at", "outcome", "window_ms"),
        "conflicts": ("state", "expected", "found", "sent", "at"),
    }.items()
    for c in columns
}


@pytest.mark.parametrize("sequence", [1, 2, 3, 4], ids=["complete", "ended", "under way", "not begun"])
def test_an_edit_of_any_column_is_found_whatever_became_of_the_batch(filled: Ledger, sequence: int) -> None:
    if filled.engine.dialect.name != "sqlite":
        pytest.skip("the comparison is the same, and the server takes its time")
    missed, rows = set(), 0
    for name in PUSHED:
        table = schema.metadata.tables[name]
        with filled.engine.connect() as connection:
            there = connection.execute(text(f"SELECT COUNT(*) FROM {name} WHERE sequence = {sequence}")).scalar()
        rows += there
        for column in table.columns:
            kind, old = column.type.python_type, f'"{column.name}"'
            new = {int: f"COALESCE({old} + 700, 7)", float: f"COALESCE(0.5 + 2 * {old}, 7)", str: "'x'"}.get(
                kind, "'2020-01-01'"
            )
            statement = f'UPDATE "{name}" SET {old} = {new} WHERE sequence = {sequence}'
            if there and not problems_after(filled, sql(statement)):
                missed.add((name, column.name))
    assert rows and missed == (UNDER_WAY if sequence == 3 else set())


@pytest.mark.parametrize("name", schema.metadata.tables)
def test_a_deleted_row_of_any_table_is_found(filled: Ledger, name: str) -> None:
    key = [c.name for c in schema.metadata.tables[name].primary_key.columns]
    with filled.engine.connect() as connection:
        rows = connection.execute(text(f"SELECT {', '.join(key)} FROM {name}")).all()
    assert rows, "the test has something to delete"
    if filled.engine.dialect.name != "sqlite":
        rows = [*rows[:1], *rows[1:][-1:]]  # the comparison is the same, and the server takes its time
    for row in rows:
        where = " AND ".join(f'"{k}" = {v!r}' for k, v in zip(key, row, strict=True))
        found = problems_after(filled, sql(f'DELETE FROM "{name}" WHERE {where}'), filled.head())
        assert found or (name == "conflicts" and row[0] == 3), (name, row)


INSERTED = {
    "a name": "INSERT INTO names VALUES ('0123456789abcdef0123456789abcdef', 'entity', 'somebody')",
    "meta": "INSERT INTO meta VALUES ('other', 'x')",
    "a value of a batch that is retired": (
        "INSERT INTO retired_values SELECT 'tickets', entity, target, value, verified_at, sequence, n FROM retired_values"
    ),
    "conflicts of a push under way": (
        "INSERT INTO conflicts (sequence, n, state, at) VALUES (3, 0, 'CONFLICT', '2026-01-01')"
    ),
    "conflicts of a push that never began": (
        "INSERT INTO conflicts (sequence, n, state, at) VALUES (4, 0, 'CONFLICT', '2026-01-01')"
    ),
    "approvals": "INSERT INTO approvals SELECT 1, batch_id, digest, approver, reason, at, expires_at FROM approvals WHERE seq = 7",
    "switches": "INSERT INTO switches SELECT 1, workflow, NOT stopped, actor, reason, at FROM switches",
    "decisions": (
        'INSERT INTO decisions (sequence, n, decision_id, entity, changed, "before", "after") '
        "SELECT 1, 3, 'x', entity, 0, 1, 1 FROM decisions WHERE sequence = 1 AND n = 0"
    ),
    "deliveries of a decision that changed nothing": (
        "INSERT INTO deliveries (sequence, n, state, attempts, repeats) VALUES (4, 9, 'PENDING', 0, 0)"
    ),
    "attempts": (
        "INSERT INTO attempts (sequence, n, attempt, idempotency_key, started_at) VALUES (1, 0, 2, 'k', '2026-01-01')"
    ),
    "attempts of a push under way": (
        "INSERT INTO attempts (sequence, n, attempt, idempotency_key, started_at) VALUES (3, 0, 2, 'k', '2026-01-01')"
    ),
    "conflicts": "INSERT INTO conflicts (sequence, n, state, at) VALUES (1, 0, 'CONFLICT', '2026-01-01')",
    "acknowledged": (
        "INSERT INTO acknowledged (system, entity, target, value, verified_at, sequence, n) "
        "SELECT 'ads', 'x', 'y', 5, '2026-01-01', 1, 2"
    ),
    "rows of no batch": "INSERT INTO decisions (sequence, n, decision_id, entity, changed) VALUES (99, 0, 'x', 'y', 0)",
    "events": (
        "INSERT INTO events SELECT MAX(seq) + 1, MAX(at), 'guard', '{}', MAX(hash), MAX(hash) FROM events"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", INSERTED)
def test_an_inserted_row_is_found(filled: Ledger, what: str) -> None:
    assert problems_after(filled, sql(INSERTED[what]))


# --- what stands downstream


def proved(book: Ledger, name: str, entities: list[str], value: int, state: Any = "ACKED", **other: Any) -> None:
    """A batch whose every delivery was proved, a minute after whatever came before."""
    book.clock.add(60)  # type: ignore[attr-defined]
    book.record_batch(new_batch(name, findings=[], **other), some_decisions(name, entities))
    lease = book.lease("ads")
    book.open_push(lease, name)
    at = book.clock()
    found = [
        Result(n, state, target=f"t-{one}", sent=value, observed=value, verified_at=at)
        for n, one in enumerate(entities)
    ]
    book.settle(lease, name, found)
    book.close_push(lease, name, True)
    book.release(lease)


@pytest.fixture
def standing(tmp_path: Path) -> Iterator[Ledger]:
    """Entity a was set by b1, b2 and b3; b by b1 and b2; c by b1 alone, as somebody had changed it when b2 came."""
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=Clock()) as book:
        proved(book, "b1", ["a", "b", "c"], 110, day=date(2026, 1, 2))
        proved(book, "b2", ["a", "b"], 120, day=date(2026, 1, 3))
        proved(book, "b3", ["a"], 130)
        yield book


MINE = "entity = (SELECT digest FROM names WHERE name = '{}')"
OLDER = (
    "UPDATE acknowledged SET (target, value, verified_at, sequence, n) = (SELECT target, observed, verified_at, sequence, n "
    "FROM deliveries WHERE sequence = {} AND n = {}) WHERE " + MINE
)  # fmt: skip
FORGED = {
    "an older value put back": OLDER.format(2, 0, "a"),
    "the oldest value put back": OLDER.format(1, 0, "a"),
    "another entity's value": OLDER.format(2, 1, "a"),
    "one deleted": "DELETE FROM acknowledged WHERE " + MINE.format("b"),
    "all deleted": "DELETE FROM acknowledged",
    "another target": "UPDATE acknowledged SET target = 'x' WHERE " + MINE.format("c"),
    "no target": "UPDATE acknowledged SET target = NULL WHERE " + MINE.format("c"),
    "another system": "UPDATE acknowledged SET system = 'tickets' WHERE " + MINE.format("c"),
    "another value": "UPDATE acknowledged SET value = 5 WHERE " + MINE.format("c"),
    "no value": "UPDATE acknowledged SET value = NULL WHERE " + MINE.format("c"),
    "a later time": "UPDATE acknowledged SET verified_at = '2030-01-01 00:00:00.000000' WHERE " + MINE.format("c"),
    "another's entity": "UPDATE acknowledged SET entity = 'x' WHERE " + MINE.format("c"),
    "one more": "INSERT INTO acknowledged SELECT 'tickets', entity, target, value, verified_at, sequence, n FROM acknowledged",
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
def test_what_stands_downstream_is_the_newest_proof_or_it_is_found(standing: Ledger, what: str) -> None:
    assert standing.verify().ok
    assert any("acknowledged: " in said for said in problems_after(standing, sql(FORGED[what])))


@pytest.mark.parametrize("what", FORGED)
def test_and_so_it_is_after_the_deliveries_were_removed_by_the_retention(standing: Ledger, what: str) -> None:
    forged = FORGED[what]
    if "FROM deliveries" in forged:
        pytest.skip("there is no older delivery to put back")
    assert standing.retention(30) == ["b1", "b2"] and standing.verify().problems == []
    assert any("acknowledged: " in said for said in problems_after(standing, sql(forged)))


def test_the_value_of_a_retired_batch_put_back_over_a_newer_one_is_found(standing: Ledger) -> None:
    assert standing.retention(30) == ["b1", "b2"]
    proved(standing, "b4", ["b"], 140)
    assert standing.verify().ok, "a newer proof takes the place of what the retention kept"
    back = (
        "UPDATE acknowledged SET (target, value, verified_at, sequence, n) = (SELECT target, value, verified_at, sequence, n "
        "FROM retired_values r WHERE r.entity = acknowledged.entity) WHERE " + MINE.format("b")
    )  # fmt: skip
    assert problems_after(standing, sql(back)) == ["acknowledged: the value of batch b2, delivery 1, was changed"]
    standing.clock.add(90 * 86400)  # type: ignore[attr-defined]
    assert standing.retention(30) == ["b3", "b4"] and standing.verify().ok


def test_a_value_that_somebody_overwrote_later_is_still_the_last_of_ours(standing: Ledger) -> None:
    book = standing
    proved(book, "b4", ["a"], 140, "OVERWRITTEN")
    assert book.acknowledged("ads", ["a"])["a"].value == 140 and book.verify().problems == []
    book.clock.add(60)  # type: ignore[attr-defined]
    book.record_batch(new_batch("b5", findings=[]), some_decisions("b5", ["a"]))
    lease = book.lease("ads")
    book.open_push(lease, "b5")
    for state, seen in (("ACKED", 150), ("OVERWRITTEN", 7)):
        book.settle(lease, "b5", [Result(0, state, target="t-a", sent=150, observed=seen, verified_at=book.clock())])  # type: ignore[arg-type]
        book.clock.add(60)  # type: ignore[attr-defined]
    book.close_push(lease, "b5", True)
    assert book.acknowledged("ads", ["a"])["a"].value == 150 and book.verify().problems == []
    assert problems_after(book, sql("UPDATE acknowledged SET value = 7 WHERE " + MINE.format("a")))
    assert problems_after(book, sql(OLDER.format(4, 0, "a"))) == [], "what was proved before may not be told from it"


def test_a_clock_that_was_set_back_does_not_make_an_older_proof_the_newest(standing: Ledger) -> None:
    standing.clock.add(-3600)  # type: ignore[attr-defined]
    proved(standing, "b4", ["a"], 140)
    assert standing.acknowledged("ads", ["a"])["a"].value == 140 and standing.verify().problems == []


def test_a_ledger_whose_retention_kept_no_values_still_verifies(standing: Ledger) -> None:
    def as_before(connection: Connection) -> None:
        connection.execute(text("DELETE FROM retired_values"))
        row = connection.execute(schema.events.select().where(schema.events.c.kind == "retention")).one()
        body = hash_chain.canonical({k: v for k, v in json.loads(row.body).items() if not k.startswith("values")})
        own = hash_chain.event_hash(row.previous, row.seq, row.at, row.kind, body)
        connection.execute(schema.events.update().where(schema.events.c.seq == row.seq).values(body=body, hash=own))

    assert standing.retention(30) == ["b1", "b2"]
    assert problems_after(standing, as_before) == []


def test_rows_that_changed_places_are_found(filled: Ledger) -> None:
    for table in ("decisions", "deliveries"):
        swap = [
            f"UPDATE {table} SET n = {new} WHERE sequence = 1 AND n = {old}" for old, new in ((0, 9), (2, 0), (9, 2))
        ]
        assert any("b1" in said for said in problems_after(filled, sql(*swap))), table
    events = [f"UPDATE events SET seq = {new} WHERE seq = {old}" for old, new in ((3, 99), (4, 3), (99, 4))]
    assert any("event 3 " in said for said in problems_after(filled, sql(*events)))


def test_the_finding_names_the_row(filled: Ledger) -> None:
    said = problems_after(filled, sql("UPDATE switches SET stopped = NOT stopped"))
    assert len(said) == 1 and "switches: row" in said[0] and "was changed" in said[0]
    said = problems_after(filled, sql('UPDATE decisions SET "after" = 121 WHERE sequence = 2 AND n = 1'))
    assert said == ["batch b2: a decision was changed, deleted, inserted or moved: the Merkle root is another one"]
    said = problems_after(filled, sql("DELETE FROM names WHERE name = 'bob'"))
    assert len(said) == 1 and "in events was deleted, and no event says that it was forgotten" in said[0]


def forge_tail(connection: Connection, keep: int) -> None:
    """Cut the chain after ``keep`` events together with everything that those events tell of."""
    for table in ("approvals", "approvers", "rollbacks", "switches", "promotions", "events"):
        connection.execute(text(f"DELETE FROM {table} WHERE seq > {keep}"))


def test_a_cut_off_end_is_found_with_the_exported_head(filled: Ledger, tmp_path: Path) -> None:
    book = filled
    book.head().export(tmp_path / "head.json")
    head = Head.read(tmp_path / "head.json")
    cut = lambda connection: forge_tail(connection, head.seq - 1)  # noqa: E731
    assert problems_after(book, cut) == [], "the last event stands alone: nothing else tells of it"
    said = problems_after(book, cut, head)
    assert said == [f"events after {head.seq - 1} were cut off: the exported head is event {head.seq}, which is gone"]


def test_a_chain_rewritten_with_right_hashes_is_found_with_the_exported_head(filled: Ledger) -> None:
    def rewrite(connection: Connection) -> None:
        rows = connection.execute(text("SELECT seq, body FROM events ORDER BY seq")).all()
        events = {row.seq: row for row in connection.execute(schema.events.select())}
        previous = hash_chain.NOTHING
        for seq, body in rows:
            if events[seq].kind == "guard":
                body = hash_chain.canonical({**json.loads(body), "workflow": "ticket_priority"})
            own = hash_chain.event_hash(previous, seq, events[seq].at, events[seq].kind, body)
            connection.execute(
                schema.events.update().where(schema.events.c.seq == seq).values(body=body, previous=previous, hash=own)
            )
            previous = own

    assert problems_after(filled, rewrite) == []
    said = problems_after(filled, rewrite, filled.head())
    assert len(said) == 1 and "the chain was rewritten" in said[0]


def test_a_sealed_batch_stays_sealed_against_whoever_also_edits_its_state(filled: Ledger) -> None:
    reopened = "UPDATE batches SET delivery = 'OPEN', counts = NULL WHERE batch_id = 'b1'"
    edited = "UPDATE deliveries SET state = 'REJECTED' WHERE sequence = 1"
    assert len(problems_after(filled, sql(reopened, edited))) >= 2


def test_rows_that_cannot_be_read_are_findings(tmp_path: Path) -> None:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=Clock()) as book:
        fill(book)
        garbage: list[Any] = [
            "UPDATE decisions SET \"before\" = 'abc' WHERE sequence = 1 AND n = 1",
            "UPDATE decisions SET entity = x'ff' WHERE sequence = 1 AND n = 1",
            "UPDATE events SET body = '{' WHERE seq = 3",
            "UPDATE events SET at = 'yesterday' WHERE seq = 3",
            "UPDATE batches SET record = '{' WHERE batch_id = 'b1'",
            "UPDATE batches SET as_of = 'x' WHERE batch_id = 'b1'",
            "UPDATE deliveries SET verified_at = 5 WHERE sequence = 1",
            "UPDATE promotions SET evidence = 'x'",
        ]
        for statement in garbage:
            assert problems_after(book, sql(statement)), statement


def test_an_event_that_was_given_a_fitting_hash_no_longer_has_a_successor(filled: Ledger) -> None:
    def forge(connection: Connection) -> None:
        (seq,) = connection.execute(text("SELECT MIN(seq) FROM events WHERE kind = 'push begun'")).one()
        one = connection.execute(schema.events.select().where(schema.events.c.seq == seq)).one()
        body = hash_chain.canonical({**json.loads(one.body), "note": "forged"})
        own = hash_chain.event_hash(one.previous, seq, one.at, one.kind, body)
        connection.execute(schema.events.update().where(schema.events.c.seq == seq).values(body=body, hash=own))

    said = problems_after(filled, forge)
    assert len(said) == 1 and "its predecessor has another hash" in said[0]
