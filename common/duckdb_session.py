"""The one way in which SQL of a workflow's folder is run: in a DuckDB that is locked and sees the tables it is given.

Belongs here: opening that DuckDB, what such SQL may say, and turning its faults into a sentence with file and line. Does
not: which rows the tables hold (``pipeline.point_in_time``, ``pipeline.ingest``).

A workflow's SQL is one SELECT. It reads no file and no network, changes no table and no setting, reads no table but
those it is given by name, and calls nothing that answers differently tomorrow (``now()``, ``random()``): what it yields
follows from its tables and parameters alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from common.errors import SignalboxError

STAGE_PARAMETERS = ("day", "cutoff", "previous_cutoff")
"""What features.sql and outcomes.sql are given: a DATE and two TIMESTAMPs."""
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series", "repeat", "json_each", "json_tree"}
_KINDS = {"MULTI": "a PIVOT without IN (...)"}
_CLOCKS = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}
_CALLED_STEADY = {"current_localtime", "current_localtimestamp", "version"}
"""DuckDB calls them consistent: two read the clock, one says which DuckDB is installed."""
_AGE = "age() other than age(later, earlier)"
"""Of one time, also as ``seen.age()``, it counts from today."""


class StageSqlError(SignalboxError, ValueError):
    """A workflow's SQL cannot be used; the message names the file, the line or key, and what is wrong."""


@dataclass(frozen=True)
class Text:
    """SQL as its author wrote it: a whole file, or with ``key`` an expression that stands in a YAML file."""

    sql: str
    file: Path | str
    key: str | None = None

    def at(self, position: int | None = None, line: int | None = None) -> str:
        """The place of a byte of the text, or of a line (from 1), as messages name it."""
        if self.key is not None:
            return f"{self.file}: {self.key}"
        if position is not None:
            line = self.sql.encode()[:position].count(b"\n") + 1
        return f"{self.file}:{line}" if line else f"{self.file}"


def engine() -> duckdb.DuckDBPyConnection:
    """A database in memory that reads nothing but what it is handed, and whose settings nobody can change.

    One thread, UTC, rows in order: results do not depend on scheduling. ``cursor()`` of it sees its tables but not the
    temporary ones of another cursor.
    """
    connection = duckdb.connect()
    for setting in (
        "threads = 1",
        "GLOBAL TimeZone = 'UTC'",
        "preserve_insertion_order = true",
        "GLOBAL python_enable_replacements = false",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "allow_community_extensions = false",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
    return connection


@lru_cache(maxsize=1)
def _shared() -> duckdb.DuckDBPyConnection:
    """An engine without tables, for reading statements and for cursors with tables of their own."""
    return engine()


@lru_cache(maxsize=1)
def _unsteady() -> frozenset[str]:
    """Functions whose answer does not follow from their arguments, and macros that call one: DuckDB says nothing of these."""
    listed = (
        _shared()
        .cursor()
        .execute("SELECT function_name, stability, lower(macro_definition) FROM duckdb_functions()")
        .fetchall()
    )
    found = {name for name, stability, _ in listed if stability not in (None, "CONSISTENT")} - {"error"}
    found |= _CALLED_STEADY
    words = [(name, set(re.findall(r"\w+", macro))) for name, stability, macro in listed if stability is None and macro]
    while more := {name for name, said in words if name not in found and said & (found | _CLOCKS)}:
        found |= more
    return frozenset(found)


def _line_of_error(text: Text, message: str, before: int) -> int | None:
    """The line that DuckDB shows, or the first that holds what its message names."""
    shown = re.search(r"^LINE (\d+):", message, re.MULTILINE)
    if shown:
        return max(int(shown[1]) - before, 1)
    code = re.sub(r"--[^\n]*", "", text.sql)
    for named in (*re.findall(r'"([^"\n]+)"', message), *re.findall(r"\b(\w+)\(", message)):
        found = re.search(rf"(?<!\w){re.escape(named)}(?!\w)", code, re.IGNORECASE)
        if found:
            return code[: found.start()].count("\n") + 1
    return None


def explained(text: Text, error: duckdb.Error, what: str = "", before: int = 0) -> str:
    """A fault of DuckDB as one sentence with its place; ``what`` says for which day or file, ``before`` how many lines
    stood before the text in what was run."""
    message = str(error)
    said = re.sub(r"\n+LINE \d+:.*", "", message, flags=re.DOTALL)
    said = re.sub(r"(,? or|\s*Use) \"?SET [^\n]*?(\.|$)", ".", said, flags=re.MULTILINE)  # a setting is no way out here
    said = " ".join(said.split("Candidate functions:")[0].split()).rstrip(".")
    return f"{text.at(line=_line_of_error(text, message, before))}: {what + ': ' if what else ''}{said}"


def _nodes(tree: Any, named: frozenset[str]) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """The nodes of a statement, each with the names (in lower case) that a table may have in its place.

    A CTE is seen by those behind it and by what its own SELECT holds. Elsewhere its name would be that of whatever else is
    called so, such as a table of DuckDB's catalogue, and in its own query only the second half of a recursion sees it.
    """
    if isinstance(tree, list):
        for part in tree:
            yield from _nodes(part, named)
    if not isinstance(tree, dict):
        return
    yield tree, named
    for entry in tree["cte_map"]["map"] if "cte_map" in tree else ():
        yield from _nodes(entry["value"], named)
        named |= {entry["key"].lower()}
    for key, part in tree.items():
        if key != "cte_map":
            itself = key == "right" and tree.get("type") == "RECURSIVE_CTE_NODE"
            yield from _nodes(part, named | {tree["cte_name"].lower()} if itself else named)


@lru_cache(maxsize=256)
def _checked(text: Text, tables: frozenset[str]) -> frozenset[str]:
    """The names of the parameters of a text that may be run; ``tables`` in lower case."""
    predicate = text.key is not None
    sql = f"SELECT (\n{text.sql}\n)" if predicate else text.sql
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise StageSqlError(explained(text, error)) from error
    if len(statements) != 1:
        past = len(statements[0].query.encode()) if statements else 0
        raise StageSqlError(f"{text.at(past)}: holds {len(statements)} statements, it must be one SELECT")
    (statement,) = statements
    if statement.type != duckdb.StatementType.SELECT:
        raise StageSqlError(
            f"{text.at(line=1)}: this is {_KINDS.get(statement.type.name, statement.type.name)}, it must be one SELECT: workflow SQL reads its tables and "
            "changes nothing"
        )
    read = json.loads(_shared().cursor().execute("SELECT json_serialize_sql($1::VARCHAR)", [sql]).fetchall()[0][0])
    if read["error"]:
        raise StageSqlError(f"{text.at(line=1)}: must be one SELECT: {read['error_message']}")
    root = read["statements"][0]["node"]
    if predicate and not (root["type"] == "SELECT_NODE" and len(root["select_list"]) == 1 and _plain(root)):
        raise StageSqlError(f"{text.at()}: {text.sql.strip()!r} is not one expression that is true or false")
    for node, named in _nodes(read["statements"], tables):
        _refuse(text, node, named, tables, predicate)
    return frozenset(statement.named_parameters)


def _plain(root: dict[str, Any]) -> bool:
    empty = root["from_table"]["type"] == "EMPTY" and not root["modifiers"] and not root["cte_map"]["map"]
    return empty and not any(root[part] for part in ("where_clause", "having", "qualify", "group_expressions"))


def _refuse(text: Text, node: dict[str, Any], named: Collection[str], tables: Collection[str], predicate: bool) -> None:
    """Raise StageSqlError where a node of the statement is something that workflow SQL may not say."""
    kind, position = node.get("type"), node.get("query_location")
    at = text.at(position if isinstance(position, int) and position < 2**62 and not predicate else None)
    if isinstance(kind, str) and kind.endswith("_QUERY_NODE"):
        name = kind.removesuffix("_QUERY_NODE")
        raise StageSqlError(f"{text.at()}: holds {name}, it must only read")
    if kind == "BASE_TABLE":
        qualified = [p for p in (node["catalog_name"], node["schema_name"], node["table_name"]) if p]
        if len(qualified) > 1 or node["table_name"].lower() not in named:
            seen = ", ".join(sorted(tables)) or "no table"
            raise StageSqlError(f"{at}: there is no table {'.'.join(qualified)!r} here; this SQL sees {seen}")
    if (node.get("sample") or {}).get("repeatable") is False:
        raise StageSqlError(
            f"{at}: SAMPLE draws other rows each time; say REPEATABLE (seed), or choose by md5 of the key"
        )
    if kind == "SHOW_REF":
        raise StageSqlError(f"{at}: DESCRIBE, SHOW and SUMMARIZE are no SELECT; name the columns that it yields")
    if kind == "TABLE_FUNCTION" and (name := node["function"].get("function_name", "").lower()) not in _TABLE_FUNCTIONS:
        may = ", ".join(sorted(_TABLE_FUNCTIONS))
        raise StageSqlError(f"{at}: {name}() may not be read here: no files, no network, no catalogue (may be: {may})")
    called = node["function_name"].lower() if kind == "FUNCTION" else ""
    if kind == "COLUMN_REF" and len(node["column_names"]) == 1 and node["column_names"][0].lower() in _CLOCKS:
        called = node["column_names"][0].lower()
    if kind == "FUNCTION" and called == "age" and len(node.get("arguments") or node.get("children") or ()) != 2:
        called = _AGE
    if called in _unsteady() | _CLOCKS | {_AGE}:
        raise StageSqlError(
            f"{at}: {called} answers differently each time, so that the day could not be made again; use the parameters "
            f"{', '.join('$' + p for p in STAGE_PARAMETERS)} or the columns"
        )


def check(text: Text, tables: Collection[str], parameters: Collection[str] = ()) -> frozenset[str]:
    """The parameters that a text names, all of them among ``parameters``.

    Raises StageSqlError, with file and line, unless it is one SELECT (a text with a key: one expression) over
    ``tables`` that may be run here.
    """
    used = _checked(text, frozenset(t.lower() for t in tables))
    for name in sorted(used - set(parameters)):
        given = ", ".join("$" + p for p in parameters) or "none"
        line = next((n for n, said in enumerate(text.sql.splitlines(), 1) if f"${name}" in said), None)
        raise StageSqlError(f"{text.at(line=line)}: the parameter ${name} is not given here (there are: {given})")
    return used


def _arrow(
    connection: duckdb.DuckDBPyConnection, text: Text, sql: str, given: Mapping[str, Any], what: str = ""
) -> pa.Table:
    """What a statement yields, in a transaction that cannot write."""
    connection.execute("BEGIN TRANSACTION READ ONLY")
    try:
        return connection.sql(sql, params=dict(given)).to_arrow_table()
    except duckdb.Error as error:
        if "LINE " not in str(error):
            # what the relational interface refuses while binding comes without its place, execute() tells it
            connection.execute("ROLLBACK")
            connection.execute("BEGIN TRANSACTION READ ONLY")
            try:
                connection.execute(sql, dict(given))
            except duckdb.Error as placed:
                raise StageSqlError(explained(text, placed, what)) from placed
        raise StageSqlError(explained(text, error, what)) from error
    finally:
        connection.execute("ROLLBACK")


def select(
    connection: duckdb.DuckDBPyConnection,
    text: Text,
    tables: Collection[str],
    parameters: Mapping[str, Any] | None = None,
    what: str = "",
) -> pa.Table:
    """What a text yields over ``tables`` of a connection to an ``engine()``; ``what`` stands in messages.

    Raises StageSqlError naming file and line. The connection must not be in a transaction.
    """
    given = parameters or {}
    used = check(text, tables, list(given))
    return _arrow(connection, text, text.sql, {name: given[name] for name in used}, what)


def meets(text: Text, table: pa.Table, name: str = "features") -> pa.Array:
    """Which rows of ``table``, in their order, meet a predicate (null: does not); it sees the table under ``name``.

    Raises StageSqlError naming the YAML file and the key.
    """
    check(text, {name})
    cursor = _shared().cursor()
    try:
        cursor.register(name, table)
        found = _arrow(cursor, text, f'SELECT (\n{text.sql}\n) AS meets FROM "{name}"', {})["meets"]
    finally:
        cursor.close()
    if not (pa.types.is_boolean(found.type) or pa.types.is_null(found.type)):
        raise StageSqlError(f"{text.at()}: {text.sql.strip()!r} is {found.type}, it must be true or false")
    if len(found) != table.num_rows:
        raise StageSqlError(
            f"{text.at()}: {text.sql.strip()!r} answers {len(found)} times for {table.num_rows} rows; it must judge each row"
        )
    return found.cast(pa.bool_()).combine_chunks().fill_null(False)


def bind(
    text: Text, tables: Mapping[str, pa.Schema], parameters: Mapping[str, Any] | None = None, what: str = ""
) -> pa.Schema:
    """The columns that a text yields, found by running it over empty tables of these schemas.

    Raises StageSqlError naming file and line. A text with a key is a predicate over the one table: the schema then is
    that of its answer.
    """
    empty = {name: schema.empty_table() for name, schema in tables.items()}
    if text.key is not None:
        ((name, table),) = empty.items()
        return pa.schema([pa.field("meets", meets(text, table, name).type)])
    cursor = _shared().cursor()
    try:
        for name, table in empty.items():
            cursor.register(name, table)
        return select(cursor, text, tables.keys(), parameters, what).schema
    finally:
        cursor.close()


__all__ = ["STAGE_PARAMETERS", "StageSqlError", "Text", "bind", "check", "engine", "explained", "meets", "select"]
