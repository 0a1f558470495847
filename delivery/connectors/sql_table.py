"""A table in PostgreSQL or SQLite as a downstream system: one row an entity, one column the value, compare-and-set.

Belongs here: reading rows, changing them under a condition, and telling what became of a change. Does not: retries.

A row is changed by ``UPDATE … WHERE key = ? AND value IS NOT DISTINCT FROM expected [AND version = token]``, so that a
change made by anybody since it was read is never overwritten: no row matches, and the outcome is ``conflict``. The writes
of one call share a transaction, sorted by key so that two such calls cannot deadlock; if the database refuses one of them,
all are undone and each is tried in a transaction of its own, so that one bad row costs only itself. An error before the
commit is sent means that nothing was written; a commit whose answer was lost is ``unknown``, and a later read tells.
A row that an insert made (``missing_means``) is taken back by writing that value, not by deleting the row.
"""

from __future__ import annotations

import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import exc
from sqlalchemy.pool import QueuePool

from delivery.connectors.base import (
    Capabilities,
    Change,
    Misconfigured,
    Outcome,
    Reading,
    Unavailable,
    Write,
    Writes,
    Written,
    meaning,
)
from delivery.connectors.value_codec import Cells

ABSENT = "absent"
"""The token of a row that is not there: a write with it inserts."""

_REFUSED = ("22", "23", "44", "P0")
"""PostgreSQL's classes of error for data, constraints, views' checks and triggers: trying again changes nothing."""
_NEVER = ("42", "3D", "3F", "28", "0A")
"""Its classes for names that do not exist and rights that are missing: no write can succeed."""
_LOST = ("08", "57P", "40003", "XX")
"""Answers to a commit that leave open whether it happened."""
_NO_ENTRY = re.compile(r"authentication failed|no password supplied|does not exist|pg_hba\.conf|permission denied")


class Closed(BaseModel):
    """Rows that can no longer be changed: those where a column holds one of some values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str = Field(description="The column that tells")
    values: tuple[str | int | bool, ...] = Field(min_length=1, description="A row with one of these is closed")


class Version(BaseModel):
    """A column that every change of the row changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str = Field(description="The column that holds it")
    kind: Literal["integer", "timestamp"] = Field(
        description="integer: grows by one; timestamp: the time of the change"
    )
    changed_by: Literal["us", "database"] = Field(
        default="us", description="database: a trigger changes it with each update, and we must not"
    )


class SqlTableSettings(Cells):
    """``kind: sql_table`` in a workflow's ``delivery`` section."""

    kind: Literal["sql_table"]
    url_env: str = Field(description="Name of the environment variable that holds the database's URL with its password")
    table: str = Field(description="The table or updatable view that holds the values")
    schema_name: str | None = Field(default=None, description="The table's schema, where it is not the default one")
    key: str = Field(description="Column that holds the entity; text, integer or uuid, unique")
    value: str = Field(description="Column that holds the value")
    version: Version | None = None
    closed: Closed | None = None
    batch_id: str | None = Field(default=None, description="Column to note the batch in with each change")
    decision_id: str | None = Field(default=None, description="Column to note the decision in with each change")
    run_id: str | None = Field(default=None, description="Column to note the run in with each change")
    missing_means: int | None = Field(
        default=None,
        description="An entity without a row has this value, and its row is inserted; without: it is missing",
    )
    bulk: int = Field(default=200, ge=1, le=10_000, description="Rows a call, and a transaction")
    timeout_s: float = Field(default=10.0, gt=0, description="Longest wait for a connection, a lock, or a statement")


SETTINGS = SqlTableSettings


def mapping(settings: SqlTableSettings, folder: Path) -> str:
    """What gives a value its meaning (``base.meaning``)."""
    own = {"kind", "table", "schema_name", "key", "value", "decimals", "names", "missing_means"}
    return meaning(**settings.model_dump(mode="json", include=own))


def writes(settings: SqlTableSettings, folder: Path) -> Writes:
    """Which column of which table; the database is known by the variable that holds its address."""
    table = f"{settings.schema_name}.{settings.table}" if settings.schema_name else settings.table
    return Writes(f"sql_table:{settings.url_env}", f"{table}.{settings.value}")


def writer(settings: SqlTableSettings, folder: Path) -> Callable[[int], object]:
    """What stands in the cell of a value."""
    return settings.put


def connect(
    settings: SqlTableSettings, *, environ: Mapping[str, str], folder: Path, clock: Callable[[], datetime]
) -> SqlTable:
    """The table that the settings name. Misconfigured where the URL is missing or of another database; opens nothing yet."""
    text = environ.get(settings.url_env, "")
    if not text:
        raise Misconfigured(f"the environment variable {settings.url_env} is not set: it must hold the database's URL")
    try:
        url = sa.make_url(text)
    except (exc.ArgumentError, ValueError):
        # SQLAlchemy's message shows the URL, and with it the password
        raise Misconfigured(
            f"{settings.url_env} holds no database URL; write postgresql://user:password@host/database "
            "or sqlite:////path/to/file"
        ) from None
    return SqlTable(settings, url, folder=folder, clock=clock)


@dataclass(frozen=True)
class _Shape:
    """The table as the database describes it."""

    table: sa.Table
    key_type: Literal["text", "integer", "uuid"]
    float_value: bool
    zoned_version: bool


class _TooMany(Exception):
    """One key matched several rows."""


class SqlTable:
    """One value column of one table. See the module for what its outcomes mean."""

    def __init__(self, settings: SqlTableSettings, url: sa.URL, *, folder: Path, clock: Callable[[], datetime]) -> None:
        self.mapping = mapping(settings, folder)
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._known: _Shape | None = None
        backend = url.get_backend_name()
        query_secret = url.query.get("password")
        self._secrets = [s for s in (url.password, query_secret) if isinstance(s, str) and s]
        common: dict[str, Any] = {"hide_parameters": True, "pool_size": 16, "max_overflow": 0}
        common |= {"pool_timeout": settings.timeout_s, "poolclass": QueuePool}
        if backend == "postgresql":
            url = url.set(drivername="postgresql+psycopg2")
            wait = max(1, round(settings.timeout_s))
            arguments = {"connect_timeout": wait, "application_name": "signalbox"}
            self._engine = sa.create_engine(url, connect_args=arguments, **common)
            host = url.host or url.query.get("host") or "local"
            self._place = f"{host}{f':{url.port}' if url.port else ''}/{url.database}"
        elif backend == "sqlite":
            if not url.database or url.database == ":memory:":
                raise Misconfigured(f"{settings.url_env} names no file; write sqlite:////path/to/file")
            file = (folder / url.database).resolve()
            self._engine = sa.create_engine("sqlite://", creator=lambda: self._open_sqlite(file), **common)
            self._place = str(file)
        else:
            raise Misconfigured(f"{settings.url_env} names a {backend} database; PostgreSQL and SQLite are known")
        self._sqlite = backend == "sqlite"
        name = f"{settings.schema_name}.{settings.table}" if settings.schema_name else settings.table
        # With the column: another workflow may write another one of the same rows
        self.system = f"sql_table:{self._place}/{name}.{settings.value}"

    def __repr__(self) -> str:
        return f"SqlTable({self.system})"

    @property
    def capabilities(self) -> Capabilities:
        bulk = self._settings.bulk
        return Capabilities(conditional_write=True, bulk_read=bulk, bulk_write=bulk, validate_only=True)

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        found: dict[str, Reading] = {}
        asked = list(dict.fromkeys(keys))
        try:
            for start in range(0, len(asked), self._settings.bulk):
                found |= self._read_some(asked[start : start + self._settings.bulk])
        except _TooMany:
            raise Misconfigured(
                f"{self.system}: several rows have the same {self._settings.key!r}; name a column that is unique"
            ) from None
        except (exc.SQLAlchemyError, OSError, _NoFile) as error:
            raise self._of_read(error) from None
        return found

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        """See the protocol. ``validate_only`` makes the changes and rolls them back: locks are taken, triggers run."""
        try:
            shape = self._shape()
        except (exc.SQLAlchemyError, OSError, _NoFile) as error:
            failure = self._of_read(error)
            if isinstance(failure, Misconfigured):
                raise failure from None
            return [Written(w.key, "not_applied", str(failure)) for w in writes]
        order = sorted(range(len(writes)), key=lambda i: (writes[i].key, i))
        answers: list[Written] = []
        for start in range(0, len(order), self._settings.bulk):
            some = [writes[i] for i in order[start : start + self._settings.bulk]]
            try:
                together = self._attempt(shape, some, validate_only)
                if together is not None:
                    answers += together
                    continue
                # A row was refused and took the others with it; nothing of it is written. One by one tells which.
                for one in some:
                    answers += self._attempt(shape, [one], validate_only) or []
            except Misconfigured as error:
                if not answers:
                    raise
                # Some are written and must be told; the rest would have raised.
                answers += [Written(writes[i].key, "refused", str(error)) for i in order[len(answers) :]]
                break
        by_place = dict(zip(order, answers, strict=True))
        return [by_place[i] for i in range(len(writes))]

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        return []

    def close(self) -> None:
        self._engine.dispose()

    # -- reading

    def _shape(self) -> _Shape:
        with self._lock:
            if self._known is None:
                self._known = self._reflect()
            return self._known

    def _reflect(self) -> _Shape:
        s = self._settings
        table = sa.Table(s.table, sa.MetaData(), schema=s.schema_name)
        try:
            with self._watched(self._engine.connect()) as connection:
                inspector = sa.inspect(connection)
                described = {c["name"]: c["type"] for c in inspector.get_columns(s.table, schema=s.schema_name)}
                unique = s.missing_means is None or self._is_unique(inspector)
        except exc.NoSuchTableError:
            raise Misconfigured(f"{self.system}: there is no such table, or this user may not see it") from None
        named = [s.key, s.value, s.version and s.version.column, s.closed and s.closed.column]
        for column in filter(None, [*named, s.batch_id, s.decision_id, s.run_id]):
            if column not in described:
                raise Misconfigured(f"{self.system}: no column {column!r}; there are {sorted(described)}")
            if column not in table.c:
                # Raw, so that a cell that is not what its column says (SQLite) is told rather than raised
                raw = column in (s.value, s.version and s.version.column)
                table.append_column(sa.Column(column, _Raw() if raw else described[column]))
        if not unique:
            raise Misconfigured(
                f"{self.system}: rows are to be inserted (missing_means), but {s.key!r} is neither the primary key nor unique"
            )
        key, value = described[s.key], described[s.value]
        kinds: list[tuple[type, Literal["text", "integer", "uuid"]]] = [
            (sa.String, "text"), (sa.Integer, "integer"), (sa.Uuid, "uuid"),
        ]  # fmt: skip
        key_type = next((kind for of, kind in kinds if isinstance(key, of)), None)
        if key_type is None:
            raise Misconfigured(f"{self.system}: the key {s.key!r} is a {key}; text, integer or uuid is needed")
        wanted: tuple[type, ...] = (sa.String, sa.Enum) if s.names is not None else (sa.Integer, sa.Numeric, sa.Float)
        if not isinstance(value, wanted):
            need = "text, because names are given" if s.names is not None else "a number, or names must be given"
            raise Misconfigured(f"{self.system}: the value {s.value!r} is a {value}; it must be {need}")
        if isinstance(value, sa.Integer) and s.decimals:
            raise Misconfigured(f"{self.system}: {s.value!r} holds whole numbers, so decimals must be 0")
        zoned = s.version is not None and getattr(described[s.version.column], "timezone", False)
        return _Shape(table, key_type, isinstance(value, sa.Float), zoned)

    def _is_unique(self, inspector: sa.Inspector) -> bool:
        s = self._settings
        sets: list[Sequence[str | None]] = []
        sets += [inspector.get_pk_constraint(s.table, schema=s.schema_name)["constrained_columns"]]
        sets += [c["column_names"] for c in inspector.get_unique_constraints(s.table, schema=s.schema_name)]
        sets += [i["column_names"] for i in inspector.get_indexes(s.table, schema=s.schema_name) if i["unique"]]
        return [s.key] in sets

    def _db_key(self, shape: _Shape, key: str) -> Any:
        """The key as the column holds it; None where no row can have it ('007' is not the integer 7)."""
        if shape.key_type == "integer":
            number = int(key) if re.fullmatch(r"-?\d{1,19}", key, re.ASCII) else None
            return number if number is not None and str(number) == key and abs(number) < 2**63 else None
        if shape.key_type == "uuid":
            with suppress(ValueError):
                return uuid.UUID(key) if str(uuid.UUID(key)) == key else None
            return None
        return None if "\0" in key or not _is_text(key) else key

    def _read_some(self, keys: Sequence[str]) -> dict[str, Reading]:
        s, shape = self._settings, self._shape()
        c = shape.table.c
        asked = {key: k for key in keys if (k := self._db_key(shape, key)) is not None}
        columns: list[sa.ColumnElement[Any]] = [sa.type_coerce(c[s.key], _Raw()), c[s.value]]
        columns.append(c[s.version.column] if s.version else sa.null())
        columns.append(sa.case((self._is_closed(shape), 1), else_=0) if s.closed else sa.literal(0))
        query = sa.select(*columns).where(c[s.key].in_(list(asked.values())))
        with self._watched(self._engine.connect()) as connection:
            rows = connection.execute(query).all() if asked else []
        found: dict[str, Reading] = {}
        for db_key, cell, version, closed in rows:
            key = str(db_key)
            if isinstance(c[s.key].type, sa.CHAR):
                key = key.rstrip(" ")  # PostgreSQL fills CHAR(n) up with spaces
            if key in found:
                raise _TooMany
            value, says = s.take(cell)
            token = _token(version) if s.version else None
            found[key] = Reading(key, key, value, token, "closed" if closed else "open", says)
        absent = (
            Reading("", "", None, state="missing", says="no such row")
            if s.missing_means is None
            else Reading("", "", s.missing_means, ABSENT, says="no row yet")
        )
        return {
            key: found.get(key) or Reading(key, key, absent.value, absent.token, absent.state, absent.says)
            if key in asked
            else Reading(key, key, None, state="missing", says=f"a {shape.key_type} key cannot be this")
            for key in keys
        }

    # -- writing

    def _attempt(self, shape: _Shape, writes: Sequence[Write], validate_only: bool) -> list[Written] | None:
        """All in one transaction. None: the database refused one of several, and nothing is written."""
        committing = False
        try:
            with self._watched(self._engine.connect()) as connection:
                try:
                    self._begin(connection, writes)
                    answers = [self._change(connection, shape, write) for write in writes]
                    if validate_only:
                        if not self._sqlite:
                            connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")
                    else:
                        committing = True
                        connection.commit()
                        committing = False
                finally:
                    with suppress(exc.SQLAlchemyError):  # a connection that is gone has nothing left to undo
                        connection.rollback()
                return answers
        except (exc.SQLAlchemyError, OSError, _NoFile, _TooMany) as error:
            outcome, says = self._of_write(error, committing)
            if outcome == "refused" and len(writes) > 1:
                return None
            return [Written(write.key, outcome, says) for write in writes]

    def _begin(self, connection: sa.Connection, writes: Sequence[Write]) -> None:
        if self._sqlite:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # the write lock first: no deadlock with another writer
            return
        # For this transaction only. An audit trigger may read signalbox.batch_id and signalbox.run_id.
        limit = max(1, round(self._settings.timeout_s * 1000))
        batches, runs = {w.batch_id for w in writes}, {w.run_id for w in writes}
        said = {"lock_timeout": str(limit), "statement_timeout": str(limit * 3 // 2)}  # so that a lock is called a lock
        said |= {"signalbox.batch_id": batches.pop()} if len(batches) == 1 else {}
        said |= {"signalbox.run_id": runs.pop()} if len(runs) == 1 else {}
        connection.execute(sa.select(*(sa.func.set_config(name, value, True) for name, value in said.items())))

    def _change(self, connection: sa.Connection, shape: _Shape, write: Write) -> Written:
        s, c = self._settings, shape.table.c
        db_key = self._db_key(shape, write.key)
        if db_key is None:
            return Written(write.key, "refused", f"a {shape.key_type} key cannot be this")
        try:
            values: dict[str, Any] = {s.value: self._cell(shape, write.value)}
            expected = None if write.expected is None else self._cell(shape, write.expected)
        except ValueError as error:
            return Written(write.key, "refused", str(error))
        for column, carried in (
            (s.batch_id, write.batch_id),
            (s.decision_id, write.decision_id),
            (s.run_id, write.run_id),
        ):
            if column:
                values[column] = carried
        inserts = s.missing_means is not None and write.token == ABSENT
        if s.version and s.version.changed_by == "us":
            values[s.version.column] = self._next_version(shape, write.token, inserts)
        if inserts:
            made = connection.execute(self._insert(shape).values({s.key: db_key, **values}).on_conflict_do_nothing())
            if made.rowcount == 1:
                return Written(write.key, "accepted", "inserted")
            return Written(write.key, "conflict", "somebody inserted the row since it was read")
        statement = sa.update(shape.table).where(c[s.key] == db_key).values(values)
        statement = statement.where(c[s.value].is_not_distinct_from(sa.literal(expected, _Raw())))
        if s.version and write.token is not None and write.token != ABSENT:
            token = sa.literal(self._version_of(write.token), _Raw())
            statement = statement.where(c[s.version.column].is_not_distinct_from(token))
        if s.closed:
            statement = statement.where(sa.not_(sa.func.coalesce(self._is_closed(shape), sa.false())))
        changed = connection.execute(statement).rowcount
        if changed > 1:
            raise _TooMany
        if changed == 1:
            return Written(write.key, "accepted", "1 row changed")
        return Written(write.key, "conflict", "no row with the expected value and version, or it is closed")

    def _insert(self, shape: _Shape) -> Any:
        from sqlalchemy.dialects import postgresql, sqlite

        return sqlite.insert(shape.table) if self._sqlite else postgresql.insert(shape.table)

    def _cell(self, shape: _Shape, value: int) -> Any:
        cell = self._settings.put(value)
        # SQLite has no decimals: its NUMERIC holds the nearest float, as people's own tools store it
        return float(cell) if isinstance(cell, Decimal) and (self._sqlite or shape.float_value) else cell

    def _is_closed(self, shape: _Shape) -> sa.ColumnElement[bool]:
        assert self._settings.closed is not None
        return shape.table.c[self._settings.closed.column].in_(self._settings.closed.values)

    def _next_version(self, shape: _Shape, token: str | None, inserts: bool) -> Any:
        assert self._settings.version is not None
        column = shape.table.c[self._settings.version.column]
        if self._settings.version.kind == "integer":
            return 1 if inserts else sa.func.coalesce(column, 0) + 1
        now, before = self._clock(), None
        with suppress(ValueError):
            before = datetime.fromisoformat(token or "")
        if before is not None:
            before = before.astimezone(UTC).replace(tzinfo=None) if before.tzinfo else before
            now = max(now, before + timedelta(microseconds=1))  # a version never stays or goes back
        if self._sqlite:
            return now.isoformat(" ", "microseconds")
        return now.replace(tzinfo=UTC) if shape.zoned_version else now

    def _version_of(self, token: str) -> Any:
        assert self._settings.version is not None
        if token == "":
            return None
        with suppress(ValueError):  # SQLite may hold anything: then as it was read
            if self._settings.version.kind == "integer":
                return int(token)
            return token if self._sqlite else datetime.fromisoformat(token)
        return token

    # -- connections and errors

    def _open_sqlite(self, file: Path) -> Any:
        import sqlite3

        if not file.exists():  # SQLite would make an empty one
            raise _NoFile(f"there is no file {file}")
        timeout = self._settings.timeout_s
        address = f"file:{quote(str(file))}?mode=rw"
        return sqlite3.connect(address, uri=True, timeout=timeout, isolation_level=None, check_same_thread=False)

    @contextmanager
    def _watched(self, connection: sa.Connection) -> Iterator[sa.Connection]:
        """Cuts the line to a server that says nothing for so long: libpq itself would wait for ever."""
        with connection:
            if self._sqlite:
                yield connection
                return
            with socket.socket(fileno=_dup(connection.connection.driver_connection)) as line:
                timer = threading.Timer(self._settings.timeout_s * 2, _cut, (line,))
                timer.daemon = True
                timer.start()
                try:
                    yield connection
                finally:
                    timer.cancel()

    def _says(self, error: BaseException) -> str:
        """The database's own first sentence: no statement, no parameters, no detail with a row's values, no password."""
        original = getattr(error, "orig", None) or error
        diagnosed = getattr(getattr(original, "diag", None), "message_primary", None)
        text = str(diagnosed or original).strip().split("\n")[0]
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return re.sub(r"[\x00-\x1f\x7f]", " ", text)[:300]

    def _of_read(self, error: BaseException) -> Unavailable | Misconfigured:
        says, code = self._says(error), _code(error)
        if isinstance(error, _NoFile):
            return Misconfigured(f"{self.system}: {says}; {self._settings.url_env} must name a database that exists")
        if code.startswith(_NEVER) or (not code and not self._sqlite and _NO_ENTRY.search(says)):
            return Misconfigured(f"{self.system}: {says}; look at {self._settings.url_env} and the user's rights")
        if self._sqlite and re.search(r"no such (table|column)|not a database|readonly", says):
            return Misconfigured(f"{self.system}: {says}")
        return Unavailable(f"{self.system}: {says}")

    def _of_write(self, error: BaseException, committing: bool) -> tuple[Outcome, str]:
        """What became of a transaction that failed; raises Misconfigured where no other can succeed."""
        if isinstance(error, _TooMany):
            return "refused", f"several rows have the same {self._settings.key!r}; none was changed"
        says, code = self._says(error), _code(error)
        if self._sqlite:
            if isinstance(error, exc.IntegrityError | exc.DataError):
                return "refused", says
            if committing and "locked" not in says and "full" not in says:
                return "unknown", f"the commit failed: {says}"
        elif committing and (not code or code.startswith(_LOST)):
            return "unknown", f"the answer to the commit was lost: {says}"
        elif code.startswith(_REFUSED):
            return "refused", says
        failure = self._of_read(error)
        if isinstance(failure, Misconfigured):
            raise failure from None
        return "not_applied", says


class _NoFile(Exception):
    """The SQLite file is not there."""


class _Raw(sa.types.NullType):
    """Whatever the driver takes and gives, untouched."""

    cache_ok = True


def _token(version: object) -> str:
    if version is None:
        return ""
    return version.isoformat() if isinstance(version, datetime) else str(version)


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _code(error: BaseException) -> str:
    return getattr(getattr(error, "orig", None), "pgcode", None) or ""


def _dup(driver_connection: Any) -> int:
    import os

    return os.dup(driver_connection.fileno())


def _cut(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
