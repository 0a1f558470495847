"""The table connector over PostgreSQL and SQLite: nobody's change is overwritten, and what became of a write is told right."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from delivery.connectors import sql_table
from delivery.connectors.base import Misconfigured, Reading, Unavailable, Write
from delivery.connectors.sql_table import SqlTable, SqlTableSettings
from delivery.ledger import Ledger
from delivery.push import push
from tests.support import postgres as postgres_server
from tests.support.ledgers import KEY, new_batch, some_decisions

NOW = datetime(2026, 5, 1, 6, 0)


class TableHarness:
    """A database with one table ``lines``, its connector, and somebody else's hands on it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.engine = sa.create_engine(url)
        self.sqlite = url.startswith("sqlite")
        self.made: list[SqlTable] = []

    def run(self, statement: str, **values: Any) -> list[tuple[Any, ...]]:
        with self.engine.begin() as connection:
            result = connection.execute(sa.text(statement), values)
            return [tuple(row) for row in result] if result.returns_rows else []

    def table(self, columns: str = "", rows: int = 3, key: str = "TEXT", value: str = "BIGINT") -> None:
        self.run("DROP TABLE IF EXISTS lines")
        self.run(f"CREATE TABLE lines (id {key} PRIMARY KEY, amount {value} {columns and ',' + columns})")
        for n in range(rows):
            self.run(
                "INSERT INTO lines (id, amount) VALUES (:id, :amount)", id=f"e{n}" if key == "TEXT" else n, amount=100
            )

    def connect(self, environ: dict[str, str] | None = None, **more: Any) -> SqlTable:
        said = {
            "kind": "sql_table",
            "url_env": "LINES_URL",
            "table": "lines",
            "key": "id",
            "value": "amount",
            "timeout_s": 1,
        }
        settings = SqlTableSettings.model_validate(said | more)
        environ = {"LINES_URL": self.url.replace("+psycopg2", "")} if environ is None else environ
        self.made.append(sql_table.connect(settings, environ=environ, folder=self.folder, clock=lambda: NOW))
        return self.made[-1]

    def amounts(self) -> dict[str, Any]:
        return {str(key): value for key, value in self.run("SELECT id, amount FROM lines ORDER BY id")}

    def close(self) -> None:
        for one in self.made:
            one.close()
        self.engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TableHarness]:
    if request.param == "sqlite":
        sqlite3.connect(tmp_path / "downstream.db").close()
        made = TableHarness(f"sqlite:///{tmp_path / 'downstream.db'}", tmp_path)
    else:
        made = _postgres(request, tmp_path)
    yield made
    made.close()


@pytest.fixture
def pg(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TableHarness]:
    made = _postgres(request, tmp_path)
    yield made
    made.close()


def _postgres(request: pytest.FixtureRequest, folder: Path) -> TableHarness:
    server: postgres_server.Server = request.getfixturevalue("postgres")
    if not hasattr(_postgres, "url"):
        _postgres.url = server.database("sql_table_" + uuid.uuid4().hex[:8])  # type: ignore[attr-defined]
    return TableHarness(_postgres.url, folder)  # type: ignore[attr-defined]


def write(reading: Reading, value: int, **more: Any) -> Write:
    made = Write(
        reading.key, reading.target, value, reading.value, reading.token, "key", f"d-{reading.key}", "batch-1", "run-1"
    )
    return replace(made, **more)


# -- compare and set


def test_a_read_shows_what_stands_and_a_write_changes_it(place: TableHarness) -> None:
    place.table()
    table = place.connect()
    seen = table.read(["e0", "e1", "nobody"])
    assert [(r.value, r.state) for r in seen.values()] == [(100, "open"), (100, "open"), (None, "missing")]
    answers = table.apply([write(seen["e1"], 120), write(seen["e0"], 90), write(seen["nobody"], 5)])
    assert [(w.key, w.outcome) for w in answers] == [("e1", "accepted"), ("e0", "accepted"), ("nobody", "conflict")]
    assert place.amounts() == {"e0": 90, "e1": 120, "e2": 100}


def test_a_value_that_somebody_changed_since_the_read_is_a_conflict_and_stays(place: TableHarness) -> None:
    place.table()
    table = place.connect()
    seen = table.read(["e0", "e1", "e2"])
    place.run("UPDATE lines SET amount = 77 WHERE id = 'e0'")
    place.run("UPDATE lines SET amount = NULL WHERE id = 'e1'")
    answers = table.apply([write(seen[k], 120) for k in ("e0", "e1", "e2")])
    assert [w.outcome for w in answers] == ["conflict", "conflict", "accepted"]
    assert place.amounts() == {"e0": 77, "e1": None, "e2": 120}


def test_an_empty_value_is_compared_as_one(place: TableHarness) -> None:
    place.table()
    place.run("UPDATE lines SET amount = NULL WHERE id = 'e0'")
    table = place.connect()
    seen = table.read(["e0"])["e0"]
    assert seen.value is None and "empty" in seen.says
    assert table.apply([write(seen, 5)])[0].outcome == "accepted"
    assert table.apply([write(seen, 6)])[0].outcome == "conflict"
    assert place.amounts()["e0"] == 5


@pytest.mark.parametrize("by", ["us", "database"])
def test_a_version_catches_a_change_that_came_and_went(place: TableHarness, by: str) -> None:
    place.table("version INTEGER")
    if by == "database":
        if place.sqlite:
            place.run(
                "CREATE TRIGGER t AFTER UPDATE OF amount ON lines BEGIN "
                "UPDATE lines SET version = coalesce(old.version, 0) + 1 WHERE id = new.id; END"
            )
        else:
            place.run(
                "CREATE OR REPLACE FUNCTION up() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN new.version := coalesce(old.version, 0) + 1; RETURN new; END $$"
            )
            place.run("CREATE TRIGGER t BEFORE UPDATE ON lines FOR EACH ROW EXECUTE FUNCTION up()")
    table = place.connect(version={"column": "version", "kind": "integer", "changed_by": by})
    seen = table.read(["e0"])["e0"]
    assert seen.token == ""  # no version yet is a version, too
    assert table.apply([write(seen, 110)])[0].outcome == "accepted"
    now = table.read(["e0"])["e0"]
    assert (now.value, now.token) == (110, "1")
    person = "" if by == "database" else ", version = version + 1"
    place.run(f"UPDATE lines SET amount = 1{person} WHERE id = 'e0'")
    place.run(f"UPDATE lines SET amount = 110{person} WHERE id = 'e0'")
    assert table.apply([write(now, 120)])[0].outcome == "conflict"
    assert place.amounts()["e0"] == 110


@pytest.mark.parametrize("column", ["TIMESTAMP", "TIMESTAMP WITH TIME ZONE"])
def test_a_timestamp_is_a_version_that_never_stays_or_goes_back(place: TableHarness, column: str) -> None:
    place.table(f"changed_at {column}")
    later = "2026-05-02 10:00:00.5" if place.sqlite else "2026-05-02 10:00:00.5+00"
    place.run("UPDATE lines SET changed_at = :at WHERE id = 'e0'", at=later)
    table = place.connect(version={"column": "changed_at", "kind": "timestamp"})
    seen = table.read(["e0", "e1"])
    answers = table.apply([write(seen["e0"], 110), write(seen["e1"], 110)])
    assert [w.outcome for w in answers] == ["accepted", "accepted"], answers
    again = table.read(["e0", "e1"])
    # e0 had a version of tomorrow, by our clock: it moves on all the same
    assert again["e0"].token is not None and "2026-05-02" in again["e0"].token and "500001" in again["e0"].token
    assert again["e1"].token is not None and "2026-05-01" in again["e1"].token
    assert [w.outcome for w in table.apply([write(seen["e0"], 110, expected=110)])] == ["conflict"]
    assert table.apply([write(again["e1"], 120)])[0].outcome == "accepted"


def test_a_closed_row_is_told_and_never_changed(place: TableHarness) -> None:
    place.table("status TEXT")
    place.run("UPDATE lines SET status = 'paid' WHERE id = 'e0'")
    table = place.connect(closed={"column": "status", "values": ["paid", "void"]})
    seen = table.read(["e0", "e1"])
    assert (seen["e0"].state, seen["e1"].state) == ("closed", "open")
    place.run("UPDATE lines SET status = 'void' WHERE id = 'e1'")  # closed between the read and the write
    assert [w.outcome for w in table.apply([write(r, 5) for r in seen.values()])] == ["conflict", "conflict"]
    assert table.apply([write(table.read(["e2"])["e2"], 5)])[0].outcome == "accepted"  # no status at all is open
    assert place.amounts() == {"e0": 100, "e1": 100, "e2": 5}


def test_many_writers_at_once_each_row_is_won_once(place: TableHarness) -> None:
    place.table(rows=20)
    keys = [f"e{n}" for n in range(20)]
    pushers = [place.connect(bulk=7, timeout_s=20) for _ in range(4)]
    seen = pushers[0].read(keys)

    def push(n: int) -> list[tuple[str, str]]:
        order = keys if n % 2 else keys[::-1]
        return [(w.key, w.outcome) for w in pushers[n].apply([write(seen[k], 200 + n) for k in order])]

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(push, range(4)))
    won = {key: n for n, answers in enumerate(told) for key, outcome in answers if outcome == "accepted"}
    assert sorted(won) == sorted(keys) and sum(o == "accepted" for a in told for _, o in a) == len(keys)
    assert all(o in ("accepted", "conflict") for a in told for _, o in a)
    assert place.amounts() == {key: 200 + n for key, n in won.items()}


# -- what a column can hold


def test_a_bad_row_costs_only_itself(place: TableHarness) -> None:
    place.table("CHECK (amount < 1000)", rows=5)
    table = place.connect()
    seen = table.read([f"e{n}" for n in range(5)])
    answers = table.apply([write(r, 5000 if r.key == "e2" else 7) for r in seen.values()])
    assert [w.outcome for w in answers] == ["accepted", "accepted", "refused", "accepted", "accepted"]
    assert "check" in answers[2].says.lower()
    assert place.amounts() == {"e0": 7, "e1": 7, "e2": 100, "e3": 7, "e4": 7}


def test_a_value_that_no_column_holds_is_refused(pg: TableHarness) -> None:
    pg.table(value="SMALLINT")
    table = pg.connect()
    seen = table.read(["e0", "e1"])
    answers = table.apply([write(seen["e0"], 40_000), write(seen["e1"], 2**70)])
    assert [w.outcome for w in answers] == ["refused", "refused"] and "range" in answers[0].says


@pytest.mark.parametrize("column", ["NUMERIC(12,2)", "DOUBLE PRECISION"])
def test_money_in_units_is_read_and_compared_exactly(place: TableHarness, column: str) -> None:
    place.table(value=column)
    place.run("UPDATE lines SET amount = 0.1 WHERE id = 'e0'")
    place.run("UPDATE lines SET amount = 12.34 WHERE id = 'e1'")
    table = place.connect(decimals=6)
    seen = table.read(["e0", "e1", "e2"])
    assert [r.value for r in seen.values()] == [100_000, 12_340_000, 100_000_000]
    assert [w.outcome for w in table.apply([write(r, 12_350_000) for r in seen.values()])] == ["accepted"] * 3
    assert {r.value for r in table.read(list(seen)).values()} == {12_350_000}


def test_a_fraction_of_the_unit_is_no_value(place: TableHarness) -> None:
    place.table(value="NUMERIC(12,2)")
    place.run("UPDATE lines SET amount = 80.5 WHERE id = 'e0'")
    seen = place.connect().read(["e0"])["e0"]
    assert seen.value is None and "80.5" in seen.says and seen.state == "open"


def test_names_stand_for_values(place: TableHarness) -> None:
    place.table(value="TEXT", rows=0)
    for key, name in (("e0", "high"), ("e1", "whatever")):
        place.run("INSERT INTO lines (id, amount) VALUES (:k, :n)", k=key, n=name)
    table = place.connect(names={1: "urgent", 2: "high"})
    seen = table.read(["e0", "e1"])
    assert seen["e0"].value == 2 and seen["e1"].value is None and "whatever" in seen["e1"].says
    assert [w.outcome for w in table.apply([write(seen["e0"], 1), write(seen["e1"], 2), write(seen["e0"], 3)])] == [
        "accepted", "conflict", "refused",
    ]  # fmt: skip
    assert place.amounts() == {"e0": "urgent", "e1": "whatever"}


def test_a_sqlite_cell_that_is_not_what_its_column_says_is_told(tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "x.db").close()
    place = TableHarness(f"sqlite:///{tmp_path / 'x.db'}", tmp_path)
    place.table()
    place.run("UPDATE lines SET amount = 'a lot' WHERE id = 'e0'")
    seen = place.connect().read(["e0"])["e0"]
    assert seen.value is None and "a lot" in seen.says
    place.close()


@pytest.mark.parametrize("kind", ["integer", "uuid"])
def test_keys_of_other_types(pg: TableHarness, kind: str) -> None:
    pg.table(key=kind, rows=0)
    key = "7" if kind == "integer" else str(uuid.UUID(int=7))
    pg.run(f"INSERT INTO lines (id, amount) VALUES (CAST(:k AS {kind}), 1)", k=key)
    table = pg.connect()
    odd = ["007", "x", "7 ", "9" * 30, "\0", "\ud800", key.upper() + "A", "٧"]
    seen = table.read([key, *odd])
    assert seen[key].value == 1 and {seen[k].state for k in odd} == {"missing"}
    answers = table.apply([write(seen[key], 2), *(write(seen[k], 2) for k in odd)])
    assert [w.outcome for w in answers] == ["accepted", *["refused"] * len(odd)]


def test_odd_text_keys_are_only_text(place: TableHarness) -> None:
    place.table(rows=0)
    keys = ["'; DROP TABLE lines; --", "ünï%s:x", " e0", '"quoted"', "%(amount)s"]
    for key in keys:
        place.run("INSERT INTO lines (id, amount) VALUES (:k, 1)", k=key)
    table = place.connect()
    seen = table.read([*keys, "\0", "\ud800"])
    assert [w.outcome for w in table.apply([write(seen[k], 2) for k in keys])] == ["accepted"] * len(keys)
    assert seen["\0"].state == seen["\ud800"].state == "missing"
    assert set(place.amounts().values()) == {2}


def test_identifiers_are_quoted(place: TableHarness) -> None:
    place.run('DROP TABLE IF EXISTS "sel;ect "')
    place.run("""CREATE TABLE "sel;ect " ("the key'" TEXT PRIMARY KEY, "va lue""" + '"' + """ INTEGER, "Order" TEXT)""")
    place.run("""INSERT INTO "sel;ect " VALUES ('a', 1, 'x')""")
    table = place.connect(table="sel;ect ", key="the key'", value="va lue", closed={"column": "Order", "values": ["z"]})
    seen = table.read(["a"])["a"]
    assert table.apply([write(seen, 3)])[0].outcome == "accepted"
    assert table.read(["a"])["a"].value == 3


def test_two_columns_of_one_table_are_two_systems(place: TableHarness) -> None:
    """The ledger knows a value by system and entity: a budget must not be taken for a priority."""
    place.table("priority INTEGER")
    assert place.connect().system != place.connect(value="priority").system


# -- what is carried, inserted, only tried


def test_the_batch_the_decision_and_the_run_go_with_the_change(place: TableHarness) -> None:
    place.table("batch TEXT, decision TEXT, run TEXT")
    table = place.connect(batch_id="batch", decision_id="decision", run_id="run")
    table.apply([write(table.read(["e0"])["e0"], 5)])
    assert place.run("SELECT batch, decision, run FROM lines WHERE id = 'e0'") == [("batch-1", "d-e0", "run-1")]


def test_an_audit_trigger_sees_the_batch_and_the_run(pg: TableHarness) -> None:
    pg.table("note TEXT")
    pg.run(
        "CREATE OR REPLACE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "new.note := current_setting('signalbox.batch_id', true) || '/' || current_setting('signalbox.run_id', true); "
        "RETURN new; END $$"
    )
    pg.run("CREATE TRIGGER t BEFORE UPDATE ON lines FOR EACH ROW EXECUTE FUNCTION note()")
    table = pg.connect()
    table.apply([write(table.read(["e0"])["e0"], 5)])
    assert pg.run("SELECT note FROM lines WHERE id = 'e0'") == [("batch-1/run-1",)]


def test_a_row_that_is_not_there_is_inserted_once(place: TableHarness) -> None:
    place.table("version INTEGER", rows=1)
    table = place.connect(missing_means=3, version={"column": "version", "kind": "integer"})
    seen = table.read(["e0", "new"])
    assert (seen["new"].value, seen["new"].state, seen["new"].token) == (3, "open", sql_table.ABSENT)
    assert table.apply([write(seen["new"], 4)])[0].outcome == "accepted"
    assert table.apply([write(seen["new"], 5)])[0].outcome == "conflict"  # it is there by now
    again = table.read(["new"])["new"]
    assert (again.value, again.token) == (4, "1")
    assert table.apply([write(again, 3)])[0].outcome == "accepted"  # taken back: the value, the row stays
    assert place.amounts() == {"e0": 100, "new": 3}


def test_rows_are_not_inserted_where_the_key_is_not_unique(place: TableHarness) -> None:
    place.run("DROP TABLE IF EXISTS lines")
    place.run("CREATE TABLE lines (id TEXT, amount INTEGER)")
    place.run("INSERT INTO lines VALUES ('a', 1), ('a', 1), ('b', 1)")
    with pytest.raises(Misconfigured, match="primary key nor unique"):
        place.connect(missing_means=3).read(["a"])
    table = place.connect()
    with pytest.raises(Misconfigured, match="several rows"):
        table.read(["a"])
    answers = table.apply([write(Reading(k, k, 1), 2) for k in ("a", "b")])
    assert [w.outcome for w in answers] == ["refused", "accepted"] and "none was changed" in answers[0].says
    assert place.run("SELECT id, amount FROM lines ORDER BY id") == [("a", 1), ("a", 1), ("b", 2)]


def test_validate_only_tries_and_writes_nothing(place: TableHarness) -> None:
    place.table("CHECK (amount < 1000)")
    table = place.connect()
    seen = table.read(["e0", "e1", "e2"])
    place.run("UPDATE lines SET amount = 1 WHERE id = 'e2'")
    tried = [write(seen["e0"], 5), write(seen["e1"], 5000), write(seen["e2"], 5)]
    assert [w.outcome for w in table.apply(tried, validate_only=True)] == ["accepted", "refused", "conflict"]
    assert place.amounts() == {"e0": 100, "e1": 100, "e2": 1}


# -- what is wrong with the settings


def test_what_no_call_can_succeed_with_is_told_without_a_secret(place: TableHarness) -> None:
    place.table()
    with pytest.raises(Misconfigured, match="LINES_URL is not set"):
        place.connect(environ={})
    with pytest.raises(Misconfigured, match="holds no database URL") as told:
        place.connect(environ={"LINES_URL": "postgresql//user:hunter2@host/x"})
    assert "hunter2" not in str(told.value) and told.value.__cause__ is None and told.value.__suppress_context__
    with pytest.raises(Misconfigured, match="a mysql database"):
        place.connect(environ={"LINES_URL": "mysql://u:p@h/x"})
    for more, match in (
        ({"table": "lanes"}, "no such table"),
        ({"value": "amont"}, "no column 'amont'"),
        ({"value": "id"}, "must be a number"),
        ({"names": {1: "x"}}, "must be text"),
        ({"decimals": 2}, "decimals must be 0"),
    ):
        with pytest.raises(Misconfigured, match=match):
            place.connect(**more).read(["e0"])
        with pytest.raises(Misconfigured, match=match):
            place.connect(**more).apply([write(Reading("e0", "e0", 100), 5)])


def test_a_wrong_password_is_told_without_it(pg: TableHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGPASSWORD")
    host = pg.url.split("host=")[1]
    name = pg.url.split("/")[3].split("?")[0]
    for url in (
        f"postgresql://signalbox:marked-secret@/{name}?host={host}",
        f"postgresql://signalbox:marked-secret@/nowhere?host={host}",
        f"postgresql://signalbox@/{name}?host={host}",
    ):
        table = pg.connect(environ={"LINES_URL": url})
        assert "marked-secret" not in repr(table) + table.system
        with pytest.raises(Misconfigured) as told:
            table.read(["e0"])
        assert "LINES_URL" in str(told.value) and "marked-secret" not in str(told.value)
        with pytest.raises(Misconfigured):
            table.apply([write(Reading("e0", "e0", 100), 5)])


def test_a_user_without_the_right_to_write_is_told(pg: TableHarness) -> None:
    pg.table()
    pg.run("DROP ROLE IF EXISTS reader")
    pg.run("CREATE ROLE reader LOGIN PASSWORD 'marked-secret'")
    pg.run("GRANT SELECT ON lines TO reader")
    table = pg.connect(environ={"LINES_URL": pg.url.replace("signalbox@", "reader:marked-secret@", 1)})
    seen = table.read(["e0", "e1"])
    with pytest.raises(Misconfigured, match="permission denied"):
        table.apply([write(r, 5) for r in seen.values()])
    pg.run("DROP OWNED BY reader")
    pg.run("DROP ROLE reader")


def test_a_sqlite_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    place = TableHarness(f"sqlite:///{tmp_path / 'gone.db'}", tmp_path)
    with pytest.raises(Misconfigured, match="no file"):
        place.connect().read(["e0"])
    with pytest.raises(Misconfigured, match="no file"):
        place.connect().apply([write(Reading("e0", "e0", 1), 2)])
    assert not (tmp_path / "gone.db").exists()
    (tmp_path / "gone.db").write_text("this is a letter, not a database; " * 100)
    with pytest.raises(Misconfigured, match="not a database"):
        place.connect().read(["e0"])


def test_a_sqlite_path_may_hold_any_character_and_be_relative(tmp_path: Path) -> None:
    file = tmp_path / "down stream #1%20.db"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE lines (id TEXT PRIMARY KEY, amount INTEGER)")
        database.execute("INSERT INTO lines VALUES ('e0', 1)")
    database.close()
    place = TableHarness("sqlite:///" + quote(file.name), tmp_path)
    assert place.connect().read(["e0"])["e0"].value == 1
    place.close()


# -- a database that is away


def test_a_locked_database_is_not_applied(place: TableHarness) -> None:
    place.table()
    table = place.connect(timeout_s=0.2)
    seen = table.read(["e0"])["e0"]
    with place.engine.connect() as person:
        person.execute(sa.text("UPDATE lines SET amount = 55 WHERE id = 'e0'"))
        answer = table.apply([write(seen, 5)])[0]
        person.rollback()
    assert answer.outcome == "not_applied" and "lock" in answer.says
    assert table.apply([write(seen, 5)])[0].outcome == "accepted"
    assert place.amounts()["e0"] == 5


class Line:
    """Between the connector and the server: passes bytes on, and does to the commit what the test wants."""

    def __init__(self, to: str, folder: Path, at_commit: Callable[[Line, socket.socket, bytes], None]) -> None:
        self.server, self.path, self.at_commit = to, folder / ".s.PGSQL.5432", at_commit
        self.commits, self.open = 0, True
        self.gate = threading.Event()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()

    def _accept(self) -> None:
        while self.open:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.server)
            for pair in ((client, server, True), (server, client, False)):
                self.threads.append(threading.Thread(target=self._pass, args=pair, daemon=True))
                self.threads[-1].start()

    def _pass(self, come: socket.socket, go: socket.socket, up: bool) -> None:
        try:
            while data := come.recv(65536):
                if up and b"COMMIT" in data:
                    self.commits += 1
                    self.at_commit(self, go, data)
                    come.shutdown(socket.SHUT_RDWR)
                    break
                if not up and self.commits:
                    self.gate.set()  # the answer to the commit: nobody hears it
                    continue
                go.sendall(data)
        except OSError:
            pass
        finally:
            with suppress(OSError):
                go.shutdown(socket.SHUT_WR)
            if not up:
                come.close()
                go.close()

    def close(self) -> None:
        self.open = False
        self.gate.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.mark.parametrize("reaches", [True, False])
def test_a_commit_whose_answer_was_lost_is_unknown(
    pg: TableHarness, tmp_path_factory: pytest.TempPathFactory, reaches: bool
) -> None:
    pg.table()
    direct = pg.url.split("host=")[1]
    folder = Path(tmp_path_factory.mktemp("line"))

    def at_commit(line: Line, server: socket.socket, data: bytes) -> None:
        if reaches:
            server.sendall(data)
            assert line.gate.wait(5)

    line = Line(f"{direct}/.s.PGSQL.5432", folder, at_commit)
    table = pg.connect(environ={"LINES_URL": pg.url.replace(direct, str(folder))}, timeout_s=3)
    seen = table.read(["e0", "e1"])
    answers = table.apply([write(r, 5) for r in seen.values()])
    assert [w.outcome for w in answers] == ["unknown", "unknown"] and "answer to the commit" in answers[0].says
    assert line.commits == 1
    assert pg.connect().read(["e0"])["e0"].value == (5 if reaches else 100)  # a read tells
    line.close()


def test_a_connection_cut_before_the_commit_is_not_applied(pg: TableHarness) -> None:
    pg.table("CHECK (amount < 1000)")
    table = pg.connect()
    seen = table.read(["e0"])["e0"]
    pg.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'signalbox' AND datname = current_database()"
    )
    answer = table.apply([write(seen, 5)])[0]
    assert answer.outcome == "not_applied" and pg.amounts()["e0"] == 100
    assert table.apply([write(seen, 5)])[0].outcome == "accepted"


def test_a_server_that_is_down_hangs_or_comes_back(tmp_path: Path) -> None:
    """Its own server: it is stopped, frozen and killed."""
    with pytest.MonkeyPatch.context() as patch, postgres_server.started() as server:
        patch.setenv("PGPASSWORD", postgres_server.PASSWORD)
        place = TableHarness(server.database("lines"), tmp_path)
        place.table()
        table = place.connect(timeout_s=0.3)
        seen = table.read(["e0"])["e0"]
        place.engine.dispose()
        # frozen: every process of it, so that nothing answers
        family = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True).stdout.split()
        frozen = [server.process.pid, *map(int, family)]

        def each(what: signal.Signals) -> None:
            for pid in frozen:
                with suppress(ProcessLookupError):  # a backend whose client has just gone
                    os.kill(pid, what)

        try:
            each(signal.SIGSTOP)
            start = time.monotonic()
            with pytest.raises(Unavailable):
                table.read(["e0"])
            assert table.apply([write(seen, 5)])[0].outcome == "not_applied"
            assert time.monotonic() - start < 10, "a frozen server held us"
        finally:
            each(signal.SIGCONT)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(20)
        with pytest.raises(Unavailable):
            table.read(["e0"])
        assert table.apply([write(seen, 5)])[0].outcome == "not_applied"
        with pytest.raises(Unavailable):
            place.connect(timeout_s=0.3).read(["e0"])  # one that has never seen the table
        assert place.connect(timeout_s=0.3).apply([write(seen, 5)])[0].outcome == "not_applied"
        server.process = subprocess.Popen(
            [server.bin / "postgres", "-D", server.folder / "data", "-k", server.folder, "-c", "listen_addresses=", "-F"],
            cwd=server.folder, user=server.user, stdout=server.log, stderr=server.log,
        )  # fmt: skip
        while server._run("pg_isready", "-h", str(server.folder), "-q", check=False).returncode:
            time.sleep(0.05)
        assert table.read(["e0"])["e0"].value == 100
        assert table.apply([write(seen, 5)])[0].outcome == "accepted"
        place.close()


# -- with the ledger and the push


def test_a_push_ends_right_whatever_people_and_the_database_do(place: TableHarness, tmp_path: Path) -> None:
    place.table("status TEXT, batch TEXT, CHECK (amount < 1000)", rows=0)
    for key, amount, status in (
        ("plain", 100, None), ("persons", 77, None), ("closed", 100, "void"), ("there", 120, None), ("bad", 100, None),
    ):  # fmt: skip
        place.run("INSERT INTO lines VALUES (:k, :a, :s, NULL)", k=key, a=amount, s=status)
    table = place.connect(closed={"column": "status", "values": ["void"]}, batch_id="batch", timeout_s=10)
    names = ["plain", "persons", "closed", "there", "bad", "gone"]
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY) as ledger:
        after = [120, 120, 120, 120, 5000, 120]
        ledger.record_batch(new_batch(pools=None), some_decisions("b1", names, after=after))
        report = push(ledger, table, "b1")
        assert report.complete and "exactly once (conditional writes)" in report.guarantee
        assert {str(d.entity): d.state for d in ledger.deliveries("b1")} == {
            "plain": "ACKED", "persons": "CONFLICT", "closed": "SKIPPED", "there": "ACKED", "bad": "REJECTED", "gone": "REJECTED",
        }  # fmt: skip
        assert report.sends == 2
    assert place.amounts() == {"bad": 100, "closed": 100, "persons": 77, "plain": 120, "there": 120}
    assert place.run("SELECT id FROM lines WHERE batch = 'b1'") == [("plain",)]
