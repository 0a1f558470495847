"""What was known at a day's cut-off: features, outcomes and training sets as SQL over the lake.

Belongs here: the one place where ``known_at`` is compared with a cut-off, so that no workflow's SQL can look ahead.
Does not: what the SQL computes (the workflow's folder says that).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from common import duckdb_session
from common.duckdb_session import StageSqlError
from pipeline.lake import Lake, TableMissing
from pipeline.workflow import Workflow

_BEGINNING = datetime(1900, 1, 1)
SYSTEM_ORDER = "known_at, source_file_id, source_row"


def keys_of(columns: Sequence[str]) -> list[str]:
    """What names a feature row of a day: the entity, and the moment where the workflow describes several."""
    return ["entity_id", "moment"] if "moment" in columns else ["entity_id"]


def _as_of(
    workflow: Workflow, lake: Lake, days: Sequence[date], lookback_days: int, version: int | None
) -> Iterator[tuple[date, duckdb.DuckDBPyConnection]]:
    """Each day with a connection whose table ``events`` holds just what was known at that day's cut-off."""
    first, last = min(days), max(days)
    known = (pc.field("known_at") <= pc.scalar(workflow.cutoff_of(last)).cast(pa.timestamp("us", tz="UTC"))) & (
        pc.field("day") >= pc.scalar(first - timedelta(days=lookback_days))
    )
    engine = duckdb_session.engine()
    try:
        ours, theirs = engine.cursor(), engine.cursor()  # what is temporary in ours, theirs cannot read
        ours.register("landed", lake.read(workflow.table("events"), version=version, where=known))
        ours.execute(f"CREATE TEMP TABLE sorted_events AS SELECT * FROM landed ORDER BY {SYSTEM_ORDER}")
        ours.unregister("landed")
        for day in sorted(days):
            # A table of its own for each day: rows that a later day adds cannot move chunk boundaries under a sum.
            ours.execute(
                "CREATE OR REPLACE TABLE events AS SELECT * FROM sorted_events WHERE known_at <= $cutoff "
                "AND (superseded_at IS NULL OR superseded_at > $cutoff) AND day >= $first",
                {"cutoff": workflow.cutoff_of(day), "first": day - timedelta(days=lookback_days)},
            )
            yield day, theirs
    finally:
        engine.close()


def _run(workflow: Workflow, path: str, connection: duckdb.DuckDBPyConnection, day: date, what: str) -> pa.Table:
    previous = _BEGINNING if day <= workflow.start else workflow.cutoff_of(day - timedelta(days=1))
    given = {"day": day, "cutoff": workflow.cutoff_of(day), "previous_cutoff": previous}
    text = duckdb_session.Text(workflow.sql(path), workflow.folder / path)
    return duckdb_session.select(connection, text, {"events"}, given, f"{what} of {day}")


def _entities_once(found: pa.Table, keys: Sequence[str], where: str) -> None:
    """Raise StageSqlError unless ``entity_id`` is text, stands in every row, and no key stands twice."""
    kind = found.schema.field("entity_id").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise StageSqlError(f"{where}: entity_id is {kind}, it must be VARCHAR; cast it")
    if found["entity_id"].null_count:
        raise StageSqlError(f"{where}: entity_id is null in {found['entity_id'].null_count} rows")
    twice = found.group_by(list(keys)).aggregate([([], "count_all")]).filter(pc.field("count_all") > 1)
    if twice.num_rows:
        raise StageSqlError(
            f"{where}: {twice.num_rows} keys stand more than once, such as {twice.slice(0, 1).to_pylist()[0]}"
        )


def _finite(found: pa.Table, where: str) -> None:
    """Raise StageSqlError where a number is none: dividing by zero or ``ln(0)`` gives NaN or infinity in DuckDB."""
    for field in found.schema:
        if not pa.types.is_floating(field.type):
            continue
        odd = found.filter(pc.invert(pc.fill_null(pc.is_finite(found[field.name]), True)))
        if odd.num_rows:
            raise StageSqlError(
                f"{where}: {field.name} is {odd[field.name][0].as_py()} for {odd['entity_id'][0].as_py()!r} "
                f"({odd.num_rows} of {found.num_rows} rows); divide by nullif(..., 0), take ln of nullif(..., 0), so that "
                "what is not known is NULL"
            )


def _stamped(table: pa.Table, day: date) -> pa.Table:
    column = pa.array([day] * table.num_rows, pa.date32())
    return (
        table.append_column("day", column)
        if "day" not in table.schema.names
        else table.set_column(table.schema.get_field_index("day"), "day", column)
    )


def features(
    workflow: Workflow, lake: Lake, days: Sequence[date], *, version: int | None = None
) -> Iterator[tuple[date, pa.Table]]:
    """The features of each day: entities as of its cut-off, sorted by key, with ``day`` added.

    ``version`` is the version of the events table to read (newest where None). Raises StageSqlError where the SQL
    fails, yields no ``entity_id``, names an entity twice or yields a number that is NaN or infinite.
    """
    for day, connection in _as_of(workflow, lake, days, workflow.features.lookback_days, version):
        found = _run(workflow, workflow.features.sql, connection, day, "features")
        if "entity_id" not in found.schema.names:
            raise StageSqlError(
                f"{workflow.folder / workflow.features.sql}: must yield entity_id, yields {found.schema.names}"
            )
        missing = [
            c for c in (*workflow.features.numeric, *workflow.features.categorical) if c not in found.schema.names
        ]
        if missing:
            raise StageSqlError(
                f"{workflow.folder / workflow.features.sql}: does not yield {', '.join(missing)}, which features.numeric "
                "or features.categorical in workflow.yaml name"
            )
        keys = keys_of(found.schema.names)
        where = f"{workflow.folder / workflow.features.sql}: features of {day}"
        _entities_once(found, keys, where)
        _finite(found, where)
        yield day, _stamped(found.sort_by([(k, "ascending") for k in keys]), day)


def outcomes(
    workflow: Workflow, lake: Lake, days: Sequence[date], *, version: int | None = None
) -> Iterator[tuple[date, pa.Table]]:
    """What became known for each day's cut-off and not for the one before: ``entity_id``, ``for_day``, ``known_at``, outcomes."""
    for day, connection in _as_of(workflow, lake, days, workflow.outcomes.lookback_days, version):
        found = _run(workflow, workflow.outcomes.sql, connection, day, "outcomes")
        absent = {"entity_id", "for_day", "known_at"} - set(found.schema.names)
        if absent:
            raise StageSqlError(f"{workflow.folder / workflow.outcomes.sql}: must yield {', '.join(sorted(absent))}")
        previous = _BEGINNING if day <= workflow.start else workflow.cutoff_of(day - timedelta(days=1))
        fresh = found.filter(
            (pc.field("known_at") > pc.scalar(previous)) & (pc.field("known_at") <= pc.scalar(workflow.cutoff_of(day)))
        )
        where = f"{workflow.folder / workflow.outcomes.sql}: outcomes of {day}"
        _entities_once(fresh, ["entity_id", "for_day"], where)
        _finite(fresh, where)
        # sorted by its key: the same outcomes give the same bytes whatever order the SQL found them in
        yield day, _stamped(fresh.sort_by([("entity_id", "ascending"), ("for_day", "ascending")]), day)


def selected(workflow: Workflow, lake: Lake, paths: Sequence[str], day: date, lookback_days: int) -> list[pa.Table]:
    """What SQL files of the folder yield over the events of ``lookback_days`` that were known at a day's cut-off, in their order.

    Raises StageSqlError where one fails.
    """
    found: list[pa.Table] = []
    for _, connection in _as_of(workflow, lake, [day], lookback_days, None):
        found = [_run(workflow, path, connection, day, Path(path).stem) for path in paths]
    return found


def newest(*keys: str, day: str = "day") -> str:
    """The end of a SELECT over outcomes that keeps, of the rows of a key, what became known last (on one instant, of the later day)."""
    return f"QUALIFY row_number() OVER (PARTITION BY {', '.join(keys)} ORDER BY known_at DESC, {day} DESC) = 1"


def outcome_keys(workflow: Workflow) -> tuple[str, ...]:
    """What an outcome answers: an entity, or an entity's day."""
    return ("entity_id", "for_day") if workflow.outcomes.join == "entity_day" else ("entity_id",)


def training_set(
    workflow: Workflow,
    lake: Lake,
    day: date,
    *,
    features_version: int | None = None,
    outcomes_version: int | None = None,
) -> pa.Table:
    """Feature rows up to ``day`` with the outcomes that were known by its cut-off, sorted by (day, key).

    Only matured rows: a feature row without a known outcome is left out. Where an entity's outcome became known more
    than once (``join: entity``), the latest known counts. Raises TableMissing where a stage was never materialised.
    """
    since = day - timedelta(days=workflow.training.history_days)
    span = (pc.field("day") <= pc.scalar(day)) & (pc.field("day") >= pc.scalar(since))
    rows = lake.read(workflow.table("features"), version=features_version, where=span)
    answers = lake.read(workflow.table("outcomes"), version=outcomes_version, where=span)
    keys = ["day", *keys_of(rows.schema.names)]
    extra = ", ".join(f'o."{c}"' for c in answers.schema.names if c not in {"entity_id", "for_day", "known_at", "day"})
    joined = "f.entity_id = o.entity_id" + (" AND f.day = o.for_day" if workflow.outcomes.join == "entity_day" else "")
    connection = duckdb_session.engine()
    try:
        connection.register("f", rows)
        connection.register("all_outcomes", answers)
        return connection.sql(
            f"WITH o AS (SELECT * FROM all_outcomes WHERE known_at <= $cutoff {newest(*outcome_keys(workflow))}) "
            f"SELECT f.*, {extra}, o.known_at AS outcome_known_at FROM f JOIN o ON {joined} "
            f"ORDER BY {', '.join('f.' + k for k in keys)}",
            params={"cutoff": workflow.cutoff_of(day)},
        ).to_arrow_table()
    finally:
        connection.close()


def ordered(features: pa.Table, *first: str) -> pa.Table:
    """Feature rows in the order of ``first`` and then of their keys."""
    return features.sort_by([(k, "ascending") for k in (*first, *keys_of(features.schema.names))])


def chosen(workflow: Workflow, table: pa.Table, key: str) -> pa.Table:
    """The rows of a table of features, in their order, that a predicate of workflow.yaml chooses.

    ``key``: where it stands there, such as ``policy.decide_on``. Raises StageSqlError naming file and key.
    """
    section, name = key.split(".")
    return rows_where(table, getattr(getattr(workflow, section), name), workflow.folder / "workflow.yaml", key)


def rows_where(table: pa.Table, predicate: str, file: Path | str = "", key: str = "a predicate") -> pa.Table:
    """The rows of ``table`` that meet a SQL predicate, in their order; it stands in ``file`` under ``key``."""
    if predicate.strip().lower() == "true":
        return table
    return table.filter(duckdb_session.meets(duckdb_session.Text(predicate, file, key), table))


__all__ = [
    "StageSqlError",
    "TableMissing",
    "chosen",
    "features",
    "keys_of",
    "newest",
    "ordered",
    "outcome_keys",
    "outcomes",
    "rows_where",
    "training_set",
]
