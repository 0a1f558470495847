"""What is wrong with a workflow before a row has landed: its SQL and predicates bound on empty tables, its names held against each other.

Belongs here: pure functions over a workflow that was read. Does not: the shape of its files (``pipeline.workflow`` refuses that on
reading), running SQL on data (``pipeline.point_in_time``, ``pipeline.ingest``), Dagster.

A table that nobody has seen yet is known by the contract's types. What depends on its rows (whether an entity stands twice) is tried
on a few made-up rows that the contract lets in; what cannot be tried is said by ``notes``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from common import clock, duckdb_session
from common.duckdb_session import StageSqlError, Text
from data_checks.regression.effects import measured
from delivery.connectors import catalog as connectors
from delivery.connectors.base import Misconfigured
from models.booster import is_number
from models.catalog import KINDS, POLICIES
from pipeline.ingest.row_rules import event_columns, name_sql, open_engine
from pipeline.monitoring import queue_replay
from pipeline.workflow import ENGINE_COLUMNS, Column, Source, Workflow, engines_own, twice

_ARROW = {
    "VARCHAR": pa.string(), "BIGINT": pa.int64(), "DOUBLE": pa.float64(), "BOOLEAN": pa.bool_(), "TIMESTAMP": pa.timestamp("us"),
    "DATE": pa.date32(),
}  # fmt: skip
_ENGINE_TYPES = {"day": "DATE", "source_row": "BIGINT", "superseded_at": "TIMESTAMP"}
_OF_TEXT = ("csv", "jsonl", "xes")
"""Formats whose every field is a text, so that a mapping can be bound before a file is there."""
_OUTCOME_KEYS = ("entity_id", "for_day", "known_at")
_OBSERVED = ("day", "unit", "arm", "epoch", "washout", "n")
"""What the regression guard calls its own columns beside the metrics'."""
_FAR = timedelta(days=366)
_TRIED = 40
"""Made-up entities at most."""


def problems(workflow: Workflow, *, today: date | None = None, thorough: bool = True) -> list[str]:
    """Everything that is wrong, a sentence each with file, place and way out; none where all is well.

    ``today``: for a start that lies too far ahead; the clock's by default. ``thorough``: whether the stages' SQL is tried on made-up
    rows, and the expectations' arguments are held against Great Expectations, whose import takes seconds.
    """
    wrong = [
        *_start(workflow, today or clock.now().date()),
        *_contract(workflow),
        *(line for name in workflow.sources for line in _mapping(workflow, name)[0]),
        *_connector(workflow),
    ]
    events = _events(workflow)
    features = _yields(workflow, workflow.features.sql, events, wrong)
    outcomes = _yields(workflow, workflow.outcomes.sql, events, wrong)
    if features is not None:
        wrong += [*_features(workflow, features), *_predicate(workflow, "policy.decide_on", _with_day(features))]
        wrong += _predicate(workflow, "training.evaluate_on", _with_day(features))
    if outcomes is not None:
        wrong += _outcomes(workflow, outcomes)
    wrong += _replay(workflow, events)
    if features is not None and outcomes is not None:
        joined, clashes = _training_set(workflow, features, outcomes)
        wrong += [*clashes, *_predicate(workflow, "training.train_on", joined)]
    wrong += _expectations(workflow, "events", events, thorough)
    if features is not None:
        wrong += _expectations(workflow, "features", _with_day(features), thorough)
    if thorough:
        for path, stage, bound in (
            (workflow.features.sql, "features", features),
            (workflow.outcomes.sql, "outcomes", outcomes),
        ):
            wrong += _repeated(workflow, path, stage)[0] if bound is not None else []
    return list(dict.fromkeys(wrong))


def notes(workflow: Workflow, *, today: date | None = None) -> list[str]:
    """What could not be judged without data, and why; for people, no fault."""
    told = [line for name in workflow.sources for line in _mapping(workflow, name)[1]]
    if workflow.start > (today or clock.now().date()):
        told.append(f"start: no day can be run before {workflow.start}")
    for path, stage in ((workflow.features.sql, "features"), (workflow.outcomes.sql, "outcomes")):
        told += _repeated(workflow, path, stage)[1]
    return told


# --- sentences --------------------------------------------------------------------------------------------------------


def _yaml(workflow: Workflow, key: str, text: str) -> str:
    return f"{workflow.folder / 'workflow.yaml'}: {key}: {text}"


def _near(name: str, known: Sequence[str]) -> str:
    """Words that lead from a name that is not there to one that is."""
    lower = {k.lower(): k for k in known}
    near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, 1)]
    shown = ", ".join(known[:30]) + (f" and {len(known) - 30} more" if len(known) > 30 else "")
    return (f"did you mean {near[0]!r}? " if near else "") + f"There are {shown or 'none'}"


def _absent(workflow: Workflow, key: str, names: Sequence[str], schema: pa.Schema, path: str) -> list[str]:
    """The names at a key of workflow.yaml that a SQL does not yield."""
    return [
        _yaml(workflow, key, f"{workflow.folder / path} yields no column {n!r}; {_near(n, schema.names)}")
        for n in names
        if n not in schema.names
    ]


@lru_cache(maxsize=1)
def _engine() -> duckdb.DuckDBPyConnection:
    """One for all questions, each through a cursor of its own: opening another takes tens of milliseconds."""
    return open_engine()


# --- tables -----------------------------------------------------------------------------------------------------------


def _events(workflow: Workflow) -> pa.Schema:
    """The table that features and outcomes are made from."""
    columns = event_columns(workflow.contract.events)
    own = {n: _ENGINE_TYPES.get(n, "VARCHAR") for n in ENGINE_COLUMNS["events"]}
    return pa.schema([(n, _ARROW[c.type]) for n, c in columns.items()] + [(n, _ARROW[t]) for n, t in own.items()])


def _with_day(schema: pa.Schema) -> pa.Schema:
    return schema if "day" in schema.names else schema.append(pa.field("day", pa.date32()))


def _given(workflow: Workflow) -> dict[str, Any]:
    """The parameters of stage SQL, for the first day."""
    day = workflow.start
    return {
        "day": day, "cutoff": workflow.cutoff_of(day), "previous_cutoff": workflow.cutoff_of(day - timedelta(days=1)),
    }  # fmt: skip


def _yields(workflow: Workflow, path: str, events: pa.Schema, wrong: list[str]) -> pa.Schema | None:
    """The columns of a stage's SQL as the lake keeps them; None where it does not bind, which ``wrong`` then says."""
    try:
        found = duckdb_session.bind(
            Text(workflow.sql(path), workflow.folder / path), {"events": events}, _given(workflow)
        )
    except StageSqlError as error:
        wrong.append(str(error))
        return None
    for name, first in twice(found.names):
        wrong.append(f"{workflow.folder / path}: yields {name} beside {first}: SQL does not tell case; rename one")
    return pa.schema([pa.field(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in found])


# --- the parts --------------------------------------------------------------------------------------------------------


def _start(workflow: Workflow, today: date) -> list[str]:
    if workflow.start <= today + _FAR:
        return []
    return [
        _yaml(workflow, "start", f"{workflow.start} lies in the far future; write the first day of which there is data")
    ]


def _contract(workflow: Workflow) -> list[str]:
    """Allowed values and row rules."""
    contract, at = workflow.contract.events, workflow.folder / "contract.yaml"
    wrong = []
    for name, column in contract.columns.items():
        for value in column.allowed or ():
            if not _casts(value, column.type):
                wrong.append(
                    f"{at}: events.columns.{name}.allowed: {value!r} is no {column.type}; take it out, or change the type"
                )
    typed = pa.schema([(n, _ARROW[c.type]) for n, c in event_columns(contract).items()] + [("source_row", pa.int64())])
    for n, rule in enumerate(contract.rows):
        wrong += _bound_predicate(
            Text(rule.breaks_when, at, f"events.rows[{n}].breaks_when ({rule.name})"), "row", typed
        )
    return wrong


def _casts(value: object, kind: str) -> bool:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return bool(_engine().cursor().execute(f"SELECT TRY_CAST($1 AS {kind}) IS NOT NULL", [text]).fetchall()[0][0])


def _bound_predicate(text: Text, name: str, schema: pa.Schema) -> list[str]:
    try:
        duckdb_session.bind(text, {name: schema})
    except StageSqlError as error:
        return [str(error)]
    return []


def _predicate(workflow: Workflow, key: str, schema: pa.Schema) -> list[str]:
    section, name = key.split(".")
    sql: str = getattr(getattr(workflow, section), name)
    if sql.strip().lower() == "true" or twice(schema.names):
        return []
    return _bound_predicate(Text(sql, workflow.folder / "workflow.yaml", key), "features", schema)


def _mapping(workflow: Workflow, name: str) -> tuple[list[str], list[str]]:
    """What is wrong with a source's SQL, and what cannot be known of it yet."""
    source, columns = workflow.sources[name], event_columns(workflow.contract.events)
    at, text = workflow.folder / source.sql, Text(workflow.sql(source.sql), workflow.folder / source.sql)
    engine = _engine().cursor()
    try:
        duckdb_session.check(text, {"raw"})
        types = _mapped(engine, source, text)
        if types is None:
            return [], [
                f"sources.{name}: the types of a {source.format} file are known when one lands; its SQL was not tried"
            ]
        lacking = [
            c
            for c in ("source_row", *columns)
            if c not in types and not (c == "known_at" and source.known_at == "landing")
        ]
        beyond = [c for c in types if c not in columns and c != "source_row"]
        wrong = []
        for column in lacking:
            why = "which names the row" if column == "source_row" else "which contract.yaml needs"
            also = "; or say known_at: landing in workflow.yaml" if column == "known_at" else ""
            wrong.append(f"{at}: yields no column {column!r}, {why}; add it{also}")
        for column in beyond:
            wrong.append(
                f"{at}: yields the column {column!r}, which contract.yaml does not name; {_near(column, list(columns))}"
            )
        if source.known_at == "landing" and "known_at" in types:
            wrong.append(
                f"{at}: yields known_at, but sources.{name}.known_at in workflow.yaml says landing; take one of the two out"
            )
        there = {column: spec for column, spec in columns.items() if column in types}
        for column, spec in {} if _may_cast(engine, there) else there.items():
            if not _may_cast(engine, {column: spec}):
                wrong.append(
                    f"{at}: {column} is {types[column]}, which is never a {spec.type} as contract.yaml wants; cast it"
                )
        if "source_row" in types:
            rows = engine.execute(
                'SELECT count(*), count(DISTINCT source_row) FROM "#mapped" WHERE source_row IN (1, 2)'
            ).fetchall()
            every = engine.execute('SELECT count(*) FROM "#mapped"').fetchall()
            if rows != [(2, 2)] or every != [(2,)]:
                wrong.append(
                    f"{at}: must yield each row of raw once with its source_row; of two rows without any value it yields "
                    f"{every[0][0]} rows; take out WHERE, DISTINCT, GROUP BY and joins that drop or repeat rows"
                )
        return wrong, []
    except StageSqlError as error:
        return [str(error)], []
    finally:
        engine.close()


def _mapped(engine: duckdb.DuckDBPyConnection, source: Source, text: Text) -> dict[str, str] | None:
    """The columns of a source's SQL with their types, its rows of two made-up ones in the table ``#mapped``; None where that
    takes a file. Raises StageSqlError."""
    names = list(source.columns or ())
    while True:
        raw = {n: pa.array([None, None], pa.string()) for n in names} | {"source_row": pa.array([1, 2], pa.int64())}
        engine.register("#file", pa.table(raw))
        engine.execute('CREATE OR REPLACE TEMP VIEW raw AS SELECT * FROM "#file"')
        try:
            engine.execute(f'CREATE OR REPLACE TEMP TABLE "#mapped" AS\n{text.sql}')
        except duckdb.Error as error:
            unknown = _unknown_column(error)
            if source.columns is None and unknown and unknown not in names and len(names) < 500:
                names.append(unknown)  # nobody declared what the file holds
                continue
            if source.format not in _OF_TEXT and not unknown:
                return None
            raise StageSqlError(duckdb_session.explained(text, error, before=1)) from error
        return {row[0]: row[1] for row in engine.execute('DESCRIBE "#mapped"').fetchall()}


def _unknown_column(error: duckdb.Error) -> str | None:
    said = str(error)
    return said.split('"')[1] if 'Referenced column "' in said else None


def _may_cast(engine: duckdb.DuckDBPyConnection, columns: Mapping[str, Column]) -> bool:
    """Whether columns of ``#mapped`` are of types that can be cast to those of the contract."""
    cast = ", ".join(f"TRY_CAST({name_sql(n)} AS {c.type})" for n, c in columns.items()) or "1"
    try:
        engine.execute(f'SELECT {cast} FROM "#mapped" LIMIT 0')
    except duckdb.Error:
        return False
    return True


def _connector(workflow: Workflow) -> list[str]:
    """The files that the connector's settings name, and whether it can write what may be decided."""
    if workflow.delivery is None:
        return []
    settings, folder = workflow.delivery.connector, workflow.folder
    pem = getattr(settings, "ca_file", None)
    if pem is not None and not (folder / pem).is_file():
        return [_yaml(workflow, "delivery.connector.ca_file", f"{folder / pem} is missing")]
    try:
        write = connectors.writer(settings, folder)
        connectors.writes(settings, folder)
    except Misconfigured as error:
        return str(error).splitlines()
    levels = workflow.guardrails.levels
    if write is None or levels is None or POLICIES[workflow.policy.kind].money:
        return []
    wrong = []
    for level in range(levels[0], min(levels[1], levels[0] + 100) + 1):
        try:
            write(level)
        except ValueError as error:
            wrong.append(
                _yaml(workflow, "delivery.connector", f"cannot write {level}, which guardrails.levels allows: {error}")
            )
    return wrong


def _features(workflow: Workflow, schema: pa.Schema) -> list[str]:
    """What the rest of workflow.yaml wants of the features."""
    path, kind = workflow.features.sql, KINDS[workflow.model.kind]
    at = workflow.folder / path
    wrong = _keys(at, schema, {"entity_id": pa.string()})
    if "moment" in schema.names:
        wrong += _keys(at, schema, {"moment": pa.string()})
    for name in schema.names:
        if engines_own(name, "features") or name.lower() in kind.adds:
            who = f"a model of kind {workflow.model.kind}" if name.lower() in kind.adds else "the engine"
            wrong.append(f"{at}: yields {name}, which {who} itself adds; call it something else, or leave it out")
        if name.lower() == "unit" and workflow.arms.unit != name:
            wrong.append(
                f"{at}: yields {name}, which the engine fills with {workflow.arms.unit} (arms.unit); call it something else"
            )
    for key in ("numeric", "categorical"):
        names = getattr(workflow.features, key)
        wrong += _absent(workflow, f"features.{key}", names, schema, path)
        named = getattr(workflow.drift, key)
        if named is not None:
            wrong += _absent(workflow, f"drift.{key}", named, schema, path)
        for where, listed in ((f"features.{key}", names), (f"drift.{key}", named or ())):
            for n in listed if key == "numeric" else ():
                if n in schema.names and not is_number(schema.field(n).type):
                    wrong.append(
                        _yaml(
                            workflow,
                            where,
                            f"{n} is {_sql_name(schema.field(n).type)}, no number; list it under categorical, or cast it in {at}",
                        )
                    )
    for n in kind.features:
        if n not in schema.names:
            wrong.append(
                f"{at}: yields no {n}, which a model of kind {workflow.model.kind} reads; {_near(n, schema.names)}"
            )
    for field, columns in kind.columns(workflow.model).items():
        wrong += _absent(workflow, f"model.{field}", columns, schema, path)
    wrong += _absent(workflow, "arms.unit", [workflow.arms.unit], schema, path)
    if workflow.arms.misjudged is not None:
        wrong.append(_yaml(workflow, "arms.unit", workflow.arms.misjudged))
    gate = workflow.training.gate
    wrong += _absent(workflow, "training.gate.slices", gate.slices, schema, path)
    wrong += _absent(workflow, "training.gate.attributes", gate.attributes, schema, path)
    if workflow.drift.moment is not None and "moment" not in schema.names:
        wrong.append(
            _yaml(
                workflow, "drift.moment", f"{at} yields no column moment; leave drift.moment out, or let it yield one"
            )
        )
    return wrong + _of_policy(workflow, schema)


def _of_policy(workflow: Workflow, schema: pa.Schema) -> list[str]:
    """What the policy wants of the features: the columns that it names, with whole numbers where it counts."""
    path, kind, wrong = workflow.features.sql, POLICIES[workflow.policy.kind], []
    for field in (*kind.whole_columns, *kind.columns):
        name = getattr(workflow.policy, field)
        if name is None:
            continue
        wrong += _absent(workflow, f"policy.{field}", [name], schema, path)
        if field in kind.whole_columns and name in schema.names and not _is_whole(schema.field(name).type):
            wrong.append(
                f"{workflow.folder / path}: {name} is {_sql_name(schema.field(name).type)}, but policy.{field} needs whole "
                f"{kind.whole_columns[field]}; cast it to BIGINT"
            )
    return wrong


def _keys(at: Path, schema: pa.Schema, keys: Mapping[str, pa.DataType]) -> list[str]:
    """What is wrong with columns that a stage's SQL must yield with a type."""
    wrong = []
    for name, kind in keys.items():
        if name not in schema.names:
            wrong.append(f"{at}: must yield {name}; {_near(name, schema.names)}")
        elif not _same_kind(schema.field(name).type, kind):
            found, wanted = _sql_name(schema.field(name).type), _sql_name(kind)
            wrong.append(f"{at}: {name} is {found}, it must be {wanted}; cast it ({name}::{wanted})")
    return wrong


def _same_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_timestamp(wanted):
        return bool(pa.types.is_timestamp(found) and found.tz is None)
    return bool(found == wanted)


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0))


def _sql_name(kind: pa.DataType) -> str:
    """An Arrow type as DuckDB calls it, where a contract can say it."""
    if pa.types.is_timestamp(kind) and kind.tz is None:
        return "TIMESTAMP"
    return next((name for name, arrow in _ARROW.items() if arrow == kind), str(kind))


def _outcomes(workflow: Workflow, schema: pa.Schema) -> list[str]:
    """What the rest of workflow.yaml wants of the outcomes."""
    path, kind = workflow.outcomes.sql, KINDS[workflow.model.kind]
    at = workflow.folder / path
    keys = {"entity_id": pa.string(), "known_at": pa.timestamp("us")}
    if workflow.outcomes.join == "entity_day" or "for_day" not in schema.names:
        keys["for_day"] = pa.date32()
    wrong = _keys(at, schema, keys)
    for name in schema.names:
        if engines_own(name, "outcomes"):
            wrong.append(f"{at}: yields {name}, which the engine itself adds; call it something else, or leave it out")
    for n in kind.outcomes:
        if n not in schema.names:
            wrong.append(
                f"{at}: yields no {n}, which a model of kind {workflow.model.kind} learns from; {_near(n, schema.names)}"
            )
        elif not is_number(schema.field(n).type):
            wrong.append(
                f"{at}: {n} is {_sql_name(schema.field(n).type)}, which a model of kind {workflow.model.kind} reads as a number"
            )
    spec = workflow.regression
    if spec is not None:
        for n in measured(spec):
            wrong += _absent(workflow, "regression.metrics", [n], schema, path)
            if n in schema.names and not is_number(schema.field(n).type):
                wrong.append(
                    _yaml(
                        workflow,
                        "regression.metrics",
                        f"{n} is {_sql_name(schema.field(n).type)}, no number; cast it in {at}",
                    )
                )
            if n.lower() in _OBSERVED:
                wrong.append(
                    _yaml(
                        workflow,
                        "regression.metrics",
                        f"{n} is a name of the engine's own; let {at} call it something else",
                    )
                )
        if spec.settles_at is not None:
            wrong += _absent(workflow, "regression.settles_at", [spec.settles_at], schema, path)
            if spec.settles_at in schema.names and not pa.types.is_timestamp(schema.field(spec.settles_at).type):
                found = _sql_name(schema.field(spec.settles_at).type)
                wrong.append(
                    _yaml(
                        workflow,
                        "regression.settles_at",
                        f"{spec.settles_at} is {found}, it must be TIMESTAMP; cast it in {at}",
                    )
                )
    if workflow.delivery is not None and workflow.delivery.spend is not None:
        wrong += _absent(workflow, "delivery.spend", [workflow.delivery.spend], schema, path)
    return wrong


def _replay(workflow: Workflow, events: pa.Schema) -> list[str]:
    """What the replay of a queue wants of the arms, the policy, and its SQL."""
    spec = workflow.regression.replay if workflow.regression is not None else None
    if spec is None:
        return []
    wrong = []
    if workflow.arms.design != "switchback":
        wrong.append(
            _yaml(
                workflow,
                "regression.replay",
                f"a queue is compared by units that share its hands, in turns: arms.design is {workflow.arms.design}, it must be "
                "switchback; change it, or leave the replay out",
            )
        )
    if not workflow.arms.shares.get("holdout"):
        wrong.append(
            _yaml(
                workflow,
                "regression.replay",
                "compares with the status quo, and no arm keeps it: give arms.shares a holdout",
            )
        )
    if POLICIES[workflow.policy.kind].money:
        wrong.append(
            _yaml(
                workflow,
                "regression.replay.kind",
                f"a policy of kind {workflow.policy.kind} decides on money, and a queue has an order; leave the replay out",
            )
        )
    for path, schema in ((spec.tickets, queue_replay.TICKETS), (spec.work, queue_replay.WORK)):
        found = None if path is None else _yields(workflow, path, events, wrong)
        if path is None or found is None:
            continue
        at = workflow.folder / path
        for name, kind in zip(schema.names, schema.types, strict=True):
            if name in found.names and (is_number(kind) and is_number(found.field(name).type)):
                continue
            wrong += _keys(at, found, {name: kind})
    return wrong


def _training_set(workflow: Workflow, features: pa.Schema, outcomes: pa.Schema) -> tuple[pa.Schema, list[str]]:
    """The columns of the training set, and which would stand in it twice."""
    mine = _with_day(features)
    taken = {n.lower(): n for n in mine.names}
    extra = [f for f in outcomes if f.name not in (*_OUTCOME_KEYS, "day")]
    wrong = [
        f"{workflow.folder / workflow.outcomes.sql}: yields {f.name}, which {workflow.features.sql} yields too ({taken[f.name.lower()]}): the "
        "training set would hold it twice among its features; rename one"
        for f in extra
        if f.name.lower() in taken
    ]
    added = [f for f in extra if f.name.lower() not in taken]
    joined = pa.schema([*mine, *added, pa.field("outcome_known_at", pa.timestamp("us"))])
    return (mine if twice(joined.names) else joined), wrong


def _expectations(workflow: Workflow, table: str, schema: pa.Schema, thoroughly: bool) -> list[str]:
    """Columns and bounds of the expectations on events or features."""
    from data_checks import contract

    at, specs = workflow.folder / "contract.yaml", getattr(workflow.contract, table).expectations
    wrong = []
    for n, spec in enumerate(specs):
        place, said = f"{at}: {table}.expectations[{n}]", spec.arguments
        named = [said[k] for k in ("column", "column_A", "column_B") if isinstance(said.get(k), str)]
        if isinstance(said.get("column_list"), list):
            named += said["column_list"]
        if spec.type != "expect_column_to_exist":
            wrong += [
                f"{place}: {c!r} is no column of the {table}; {_near(str(c), schema.names)}"
                for c in named
                if c not in schema.names
            ]
        low, high = said.get("min_value"), said.get("max_value")
        if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
            wrong.append(f"{place}: min_value {low:g} is above max_value {high:g}: it would never be met")
    if thoroughly:
        wrong += [f"{at}: {line}" for line in contract.unbuildable(specs, schema, f"{table}.expectations")]
    return wrong


# --- made-up rows -----------------------------------------------------------------------------------------------------


def _repeated(workflow: Workflow, path: str, stage: str) -> tuple[list[str], list[str]]:
    """Whether a stage's SQL names a key twice on made-up events that the contract lets in; and why that cannot be told."""
    at = workflow.folder / path
    rows = _made_up(workflow)
    if rows is None:
        return [], [
            f"{path}: whether an entity stands twice shows with data only (the contract names no `unique` columns)"
        ]
    connection = _engine().cursor()
    try:
        connection.register("events", rows)
        found = duckdb_session.select(connection, Text(workflow.sql(path), at), {"events"}, _given(workflow))
    except StageSqlError:
        # it may well be made for other values than those made up
        return [], [f"{path}: whether an entity stands twice shows with data only (it cannot be run on made-up rows)"]
    finally:
        connection.close()
    wanted = ("entity_id", "moment") if stage == "features" else ("entity_id", "for_day")
    keys = [k for k in wanted if k in found.schema.names]
    if "entity_id" not in keys or twice(found.schema.names):
        return [], []
    counted = found.group_by(keys).aggregate([([], "count_all")])
    again = next((r for r in counted.to_pylist() if r["count_all"] > 1), None)
    if again is None:
        return [], []
    key = ", ".join(keys)
    return [
        f"{at}: of made-up events that the contract lets in it yields {key} more than once (two events of one entity); keep one row, such as "
        "by QUALIFY row_number() OVER (PARTITION BY … ORDER BY known_at DESC, source_file_id, source_row) = 1"
    ], []


def _made_up(workflow: Workflow) -> pa.Table | None:
    """Events of each made-up entity that differ in time, an entity for every allowed value, and only such as break no rule. None
    where the contract does not say what names a row."""
    contract = workflow.contract.events
    if not contract.unique:
        return None
    columns = event_columns(contract)
    rows = []
    for number, chosen in enumerate(_variants(columns)):
        seen: set[tuple[Any, ...]] = set()
        for event in range(3):
            row = _event(workflow, columns, number, event, chosen)
            if (key := _unique(row, contract.unique)) not in seen:  # else an entity has one event: its case is one row
                seen.add(key)
                rows.append(row)
    try:
        table = pa.Table.from_pylist(rows, schema=_events(workflow))
    except pa.ArrowInvalid:
        return None  # an allowed value of another type, which is said elsewhere
    for rule in contract.rows:
        try:
            broken = duckdb_session.meets(Text(rule.breaks_when, "contract.yaml", rule.name), table, "row")
        except StageSqlError:
            continue  # said elsewhere
        table = table.filter(pa.compute.invert(broken))
    return table


def _unique(row: Mapping[str, Any], unique: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[c] for c in unique)


def _variants(columns: Mapping[str, Column]) -> Iterator[dict[str, Any]]:
    """Values that a made-up entity takes beyond the usual ones."""
    yield {}
    several = [(n, value) for n, c in columns.items() for value in (c.allowed or ())]
    for name, value in several[: _TRIED - 1]:
        yield {name: value}


def _event(
    workflow: Workflow, columns: Mapping[str, Column], number: int, event: int, chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """The ``event``-th (from 0) of a made-up entity's events.

    What the contract lets in need not occur: where only the time tells two events apart, a source of days may have one a day.
    So they lie on two days, both known on the first day; the third is the second once more, known later.
    """
    unique, begin = workflow.contract.events.unique, datetime.combine(workflow.start, datetime.min.time())
    row: dict[str, Any] = {}
    for name, column in columns.items():
        # what is no time of the event itself was before it, such as when a ticket was opened
        at = begin if name in unique else begin - timedelta(days=1)
        row[name] = chosen[name] if name in chosen else _value(column, number if name in unique else 0, at)
    row["event_at"], row["known_at"] = begin + timedelta(hours=6), begin + timedelta(hours=8 + event)
    moments = [
        n for n in unique if columns[n].type in ("TIMESTAMP", "DATE") and not columns[n].allowed and n != "known_at"
    ]
    if event == 0 and moments:
        for name in {*moments, "event_at"}:
            row[name] -= timedelta(days=1)
    for name, value in row.items():
        if columns[name].type == "BOOLEAN" and not isinstance(value, bool):
            row[name] = str(value).lower() == "true"
    if event and not moments and "known_at" not in unique:
        row["event_at"] += timedelta(hours=1)
        other = next((n for n in reversed(unique) if len(columns[n].allowed or ()) > 1 and n not in chosen), None)
        if other is not None:
            row[other] = columns[other].allowed[1]  # type: ignore[index]
    own = {
        "day": row["event_at"].date(),
        "source": next(iter(workflow.sources)),
        "source_file": "made-up",
        "source_file_id": "made-up",
    }
    return {**row, **own, "source_row": 3 * number + event, "superseded_at": None}


def _value(column: Column, number: int, begin: datetime) -> Any:
    """A value that a column may hold; another one for another number, where that is possible."""
    if column.allowed:
        return column.allowed[0]
    if column.type in ("BIGINT", "DOUBLE"):
        low = column.min if column.min is not None else min(column.max or 1.0, 1.0)
        value = max(min(1.0, column.max if column.max is not None else 1.0), low) + number
        return int(value) if column.type == "BIGINT" else float(value)
    made: dict[str, Any] = {
        "VARCHAR": f"x{number}", "BOOLEAN": True, "DATE": begin.date(), "TIMESTAMP": begin + timedelta(hours=6),
    }  # fmt: skip
    return made[column.type]
