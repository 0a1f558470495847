"""How the ledger reaches its database: engine, migrations, bulk writes, and errors in plain words.

Belongs here: whatever differs between SQLite and PostgreSQL. Does not: what the rows mean (``delivery.ledger``).
"""

from __future__ import annotations

import functools
import io
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa
from sqlalchemy import Connection, Engine, Table, create_engine, event, inspect, select, table, text
from sqlalchemy import column as sql_column
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from common.errors import SignalboxError
from delivery.ledger.schema import VERSION_TABLE

HEAD = "0002"
"""The schema that this code writes: the newest migration."""
BUSY_S = 30
"""How long a writer waits for another one."""
_MIGRATING = 0x5167_6E61  # an advisory lock's number, of no meaning
_CHUNK = 50_000
_FETCH = 5_000
"""Rows that are read at once: few enough to stay near the processor while they become columns."""


class LedgerError(SignalboxError, RuntimeError):
    """Base of what the ledger raises: it names the thing and the way out, and never a value or a password."""


class LedgerNewer(LedgerError):
    """The database was made by a newer Signalbox."""


class LedgerUnavailable(LedgerError):
    """The database is down, locked or its disk is full. Nothing was half written: mend it and run again."""


class LedgerMismatch(LedgerError):
    """What was asked contradicts what stands in the ledger."""


class DaySent(LedgerError):
    """A batch of the day was sent, so it is not decided anew unasked."""


class Fenced(LedgerError):
    """Another writer holds the lease by now; nothing was written."""


class Unknown(LedgerError):
    """The ledger holds no such batch, decision or delivery."""


P = ParamSpec("P")
R = TypeVar("R")


def plainly(method: Callable[P, R]) -> Callable[P, R]:
    """Turn what the database raises into a ``LedgerError``.

    Raised outside the handler: SQLAlchemy's errors print parameters and URLs, and must not hang on to ours as context.
    """

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (SQLAlchemyError, sqlite3.Error) as error:
            said = _said(error)
        except Exception as error:
            if not type(error).__module__.startswith("psycopg2"):
                raise
            said = _said(error)
        raise said

    return wrapped


def _said(error: BaseException) -> LedgerError:
    """Our error for the database's, in words of our own."""
    cause = (error.orig if isinstance(error, DBAPIError) else None) or error
    words = str(cause).lower() if type(cause).__module__.startswith(("sqlite3", "psycopg2")) else ""
    code = getattr(cause, "pgcode", None) or ""
    after = "nothing was half written; "
    if "disk is full" in words or "no space left" in words or code == "53100":
        return LedgerUnavailable(f"the ledger's disk is full: {after}free some space and run it again")
    if "is locked" in words or isinstance(error, PoolTimeout):
        return LedgerUnavailable(f"the ledger has been held by another process for {BUSY_S} s: {after}run it again")
    if "readonly" in words or "read-only" in words:
        return LedgerUnavailable(f"the ledger cannot be written to: {after}give write permission to it and its folder")
    if "unable to open" in words:
        return LedgerUnavailable("the ledger's file cannot be opened: look at its path and permissions")
    if "disk i/o error" in words:
        return LedgerUnavailable(f"the ledger's disk fails or is full: {after}look at the disk and run it again")
    if "malformed" in words or "not a database" in words:
        return LedgerUnavailable("the ledger's file is damaged: restore it from a backup, then prove it with verify")
    if "password" in words or code.startswith("28"):
        return LedgerUnavailable(
            "the ledger's database refuses the user or its password: look at the URL and PGPASSWORD"
        )
    if isinstance(error, IntegrityError):
        return LedgerMismatch(
            f"the ledger refuses a row that contradicts another one: {after}this is a defect of the caller"
        )
    if isinstance(error, DBAPIError) and (error.connection_invalidated or code[:2] in ("08", "53", "57", "25", "40")):
        return LedgerUnavailable(
            f"the ledger's database went away or gave up: {after}see that it runs and run it again"
        )
    if type(cause).__name__ in ("OperationalError", "InterfaceError"):
        return LedgerUnavailable(f"the ledger's database does not answer: {after}see that it runs and run it again")
    return LedgerError(
        f"the ledger's database raised {type(cause).__name__} {code}".rstrip() + f": {after}this is a defect"
    )


def engine_for(url: str) -> Engine:
    """An engine for ``sqlite:///path`` or ``postgresql://…``; makes the folder of an SQLite file."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise LedgerError("the ledger's URL must begin with sqlite:/// or postgresql://")
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg2")
        return create_engine(parsed, hide_parameters=True, pool_size=10, max_overflow=20, pool_pre_ping=True)
    return _sqlite(parsed)


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise LedgerError("a ledger must outlive its process: give it a file, as in sqlite:////folder/ledger.db")
    try:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        # For its owner only: it maps digests to people. SQLite gives its other files the same mode.
        os.close(os.open(url.database, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        reason = error.strerror
    else:
        reason = None
    if reason:
        raise LedgerUnavailable(f"the ledger {url.database} cannot be made or written to: {reason}")
    engine = create_engine(
        url,
        hide_parameters=True,
        pool_size=10,
        max_overflow=20,
        connect_args={"timeout": BUSY_S, "isolation_level": None},
    )

    @event.listens_for(engine, "connect")
    def settings(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        until = time.monotonic() + BUSY_S
        while True:
            try:
                cursor.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                # Two processes that open an empty file at once: SQLite does not wait here by itself.
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.02)
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute("PRAGMA cache_size=-65536")  # 64 MiB, used as needed: bulk writes stay in memory
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def is_sqlite(connection: Connection | Engine) -> bool:
    return connection.dialect.name == "sqlite"


def reading(engine: Engine) -> Connection:
    """A connection that sees one state of the database throughout."""
    connection = engine.connect()
    return connection if is_sqlite(engine) else connection.execution_options(isolation_level="REPEATABLE READ")


def writing(engine: Engine) -> Connection:
    """A connection whose transaction writes."""
    return engine.connect().execution_options(writes=True)


_ALEMBIC = threading.Lock()
"""Alembic's context is one for the whole process."""


def migrate(engine: Engine) -> None:
    """Bring the database to ``HEAD``; refuse one that a newer Signalbox made. Safe from several processes at once."""
    with reading(engine) as connection:
        if _version(connection) == HEAD:
            return
    with writing(engine) as connection, connection.begin():
        if not is_sqlite(connection):
            connection.execute(text("SELECT pg_advisory_xact_lock(:n)"), {"n": _MIGRATING})
        stands = _version(connection)  # again: somebody may have been faster
        if stands == HEAD:
            return
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        if stands is not None and stands not in {
            s.revision for s in ScriptDirectory.from_config(config).walk_revisions()
        }:
            raise LedgerNewer(
                f"the ledger's schema {stands} is unknown to this Signalbox, which knows up to {HEAD}: "
                "a newer one made it; install that, nothing was changed"
            )
        config.attributes["connection"] = connection
        with _ALEMBIC:
            command.upgrade(config, "head")


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.execute(
        select(sql_column("version_num")).select_from(table(VERSION_TABLE))
    ).scalar()
    return version


def insert_bulk(connection: Connection, into: Table, rows: pa.Table, *, ignore_known: bool = False) -> None:
    """Insert many rows in the open transaction; ``rows`` names its columns as the table does.

    ``ignore_known``: rows whose primary key is there already are left out.
    """
    columns = ", ".join(f'"{c}"' for c in rows.column_names)
    if is_sqlite(connection):
        marks = ", ".join("?" * rows.num_columns)
        statement = f'INSERT {"OR IGNORE " if ignore_known else ""}INTO "{into.name}" ({columns}) VALUES ({marks})'
        cursor = connection.connection.cursor()
        for start in range(0, rows.num_rows, _CHUNK):
            part = rows.slice(start, _CHUNK)
            cursor.executemany(statement, list(zip(*(c.to_pylist() for c in part.columns), strict=True)))
        cursor.close()
        return
    from pyarrow import csv

    options = csv.WriteOptions(include_header=False, quoting_style="all_valid")
    name = f'"{into.name}"'
    cursor = connection.connection.cursor()
    if ignore_known:
        name = '"bulk_rows"'
        cursor.execute(f'CREATE TEMP TABLE {name} (LIKE "{into.name}") ON COMMIT DROP')
    for start in range(0, rows.num_rows, _CHUNK):
        buffer = io.BytesIO()
        csv.write_csv(rows.slice(start, _CHUNK), buffer, options)
        buffer.seek(0)
        cursor.copy_expert(f"COPY {name} ({columns}) FROM STDIN WITH (FORMAT csv)", buffer)
    if ignore_known:
        cursor.execute(f'INSERT INTO "{into.name}" ({columns}) SELECT {columns} FROM {name} ON CONFLICT DO NOTHING')
        cursor.execute(f"DROP TABLE {name}")
    cursor.close()


def select_bulk(connection: Connection, statement: str, values: Sequence[Any], schema: pa.Schema) -> pa.Table:
    """Rows of a raw query (``?`` marks values) as Arrow columns, without SQLAlchemy's cost for each cell."""
    if not is_sqlite(connection):
        statement = statement.replace("%", "%%").replace("?", "%s")
    cursor = connection.connection.cursor()
    try:
        cursor.execute(statement, tuple(values))
        parts = []
        while rows := cursor.fetchmany(_FETCH):
            columns = zip(*rows, strict=True)
            arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
            parts.append(pa.Table.from_arrays(arrays, schema=schema))
    finally:
        cursor.close()
    return pa.concat_tables(parts) if parts else schema.empty_table()


def chunks(values: Iterable[Any], size: int = 500) -> list[list[Any]]:
    """Pieces that fit into one ``IN (…)``."""
    known = list(values)
    return [known[i : i + size] for i in range(0, len(known), size)]
