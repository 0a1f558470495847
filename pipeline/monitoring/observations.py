"""What was observed of the arms: outcomes by the day on which they were acted on, with the unit and arm that they count for.

Belongs here: the tables that the statistics of the regression guard read, from the lake. Does not: the statistics
(``data_checks.regression``), which arms are compared since when (``pipeline.monitoring.verdicts``).

What counts for which arm. A decision of day D acts from the deadline of D on, that is on D+1: the day of an observation
is the day on which it was *acted on*, and its arm is the one that its unit was drawn into for the decision before. So no
outcome counts for an arm that did not act on it yet. All outcomes of a unit count, whether a decision changed the entity
or not: what was chosen to be changed differs between the arms, what a unit holds does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from common import duckdb_session
from data_checks.regression import effects
from models.booster import is_number
from pipeline.lake import Lake
from pipeline.point_in_time import StageSqlError, newest
from pipeline.workflow import Regression, Workflow


def observations(workflow: Workflow, lake: Lake, first: date, last: date, *, known: date) -> pa.Table:
    """The outcomes acted on from ``first`` to ``last``, summed by day and unit, with what was known at the cut-off of ``known``.

    Columns: day (acted on), unit, arm (null: the unit was not drawn), epoch, washout, n, and the columns that the
    workflow's metrics name. An outcome of the join ``entity_day`` was acted on the day after its for_day; n is 1, a
    unit's day, however many of its entities are left in it, and a unit without a row on a day that others have one of
    counts with zero there, from the day after it was drawn on: what was switched off earns nothing, and what was not there
    yet counts for nothing. One of the join ``entity`` counts once (n: how many; 0 on
    a day that landed without one), with what was known of it last: on the day by whose deadline it settled
    (``regression.settles_at``), else on the day when it became known. An entity's unit is the one that its newest
    features row says at the decision that acted, else the first row thereafter (it came and was decided within a day).
    Raises StageSqlError naming the column and the file where the outcomes lack a column.
    """
    spec = regression_of(workflow)
    columns = effects.measured(spec)
    by_day = workflow.outcomes.join == "entity_day"
    outcomes, features, drawn = (workflow.table(t) for t in ("outcomes", "features", "arms"))
    schema = _observed(columns)
    if not lake.exists(outcomes) or not lake.exists(features) or first > last:
        return schema.empty_table()
    cutoff = workflow.cutoff_of(known)
    reach = 1 if by_day else workflow.outcomes.lookback_days
    needed = [*columns, *([spec.settles_at] if spec.settles_at else [])]
    _needed(workflow, lake.read(outcomes, days=[]), needed)
    told = lake.read(
        outcomes, columns=list(dict.fromkeys(["entity_id", "for_day", "known_at", "day", *needed])),
        where=in_days(first - timedelta(days=reach), known) & (pc.field("known_at") <= _instant(cutoff)),
    )  # fmt: skip
    described = _described(
        workflow, lake, first - timedelta(days=1 if by_day else 1 + workflow.features.lookback_days), known
    )
    given = {
        "first": first, "last": last, "cutoff": cutoff, "start": workflow.start, "epoch": workflow.arms.epoch,
        "washout": workflow.arms.washout, "early": timedelta(hours=workflow.deadline.hour, minutes=workflow.deadline.minute),
    }  # fmt: skip
    connection = duckdb_session.engine()
    try:
        connection.register("told", told)
        connection.register("described", described)
        connection.register("drawn", drawn_units(lake, drawn, known))
        query = _summed_sql(workflow, columns)
        used = {name: value for name, value in given.items() if f"${name}" in query}
        return connection.sql(query, params=used).to_arrow_table().cast(schema)
    finally:
        connection.close()


def _summed_sql(workflow: Workflow, columns: Sequence[str]) -> str:
    """SQL over ``told`` (outcomes), ``described`` and ``drawn``: one row a day and unit, as ``observations`` says."""
    by_day, unit, settles_at = (
        workflow.outcomes.join == "entity_day",
        workflow.arms.unit,
        regression_of(workflow).settles_at,
    )
    read = ", ".join(f'CAST("{c}" AS DOUBLE) AS "{c}"' for c in columns)
    some = " OR ".join(f'"{c}" IS NOT NULL' for c in columns)
    settles = f'"{settles_at}"' if settles_at else "NULL::TIMESTAMP"
    if by_day:
        told_once = f"""
            SELECT entity_id, for_day + 1 AS day, {read} FROM told AS t
            WHERE for_day BETWEEN $first - 1 AND $last - 1
            {newest("entity_id", "for_day", day="t.day")}"""
    else:
        told_once = f"""
            SELECT * FROM (
                SELECT entity_id,
                    CAST(coalesce({settles}, min(known_at) OVER (PARTITION BY entity_id)) - $early AS DATE) AS day, {read}
                FROM told AS t WHERE ({some})
                {newest("entity_id", day="t.day")}
            ) WHERE day BETWEEN $first AND $last"""
    summed = ", ".join(f'sum("{c}") AS "{c}"' for c in columns)
    # What a cohort switched off leaves no row: its units count with zero on every day of which there are rows, from the one on
    # which they first acted. A team to which nothing came due has no rows either: its day is told from one that never landed.
    zero = ", ".join(f'0.0 AS "{c}"' for c in columns)
    counted = "1" if by_day else "count(*)"
    everyone = (
        f"(SELECT DISTINCT day FROM acted) AS s JOIN drawn AS u ON u.epoch = {_epoch('s.day - 1')} "
        "AND u.drawn_on < s.day"
        if by_day
        else "(SELECT DISTINCT day FROM told AS t WHERE t.day BETWEEN $first AND $last) AS s "
        "CROSS JOIN (SELECT DISTINCT unit FROM acted) AS u"
    )
    return f"""
        WITH once AS MATERIALIZED (SELECT * FROM ({told_once}) ORDER BY entity_id, day),
        units AS (
            SELECT entity_id, day, max_by(coalesce(CAST("{unit}" AS VARCHAR), '(none)'), moment) AS unit
            FROM described GROUP BY entity_id, day
        ),
        placed AS (
            SELECT o.*, coalesce(was.unit, came.unit) AS unit
            FROM once AS o
            ASOF LEFT JOIN units AS was ON was.entity_id = o.entity_id AND o.day - 1 >= was.day
            ASOF LEFT JOIN units AS came ON came.entity_id = o.entity_id AND o.day - 1 < came.day
        ),
        acted AS MATERIALIZED (
            SELECT day, unit, {counted} AS n, {summed}
            FROM (SELECT * FROM placed ORDER BY entity_id, day) WHERE unit IS NOT NULL GROUP BY day, unit
        ),
        whole AS (
            SELECT * FROM acted
            UNION ALL BY NAME
            SELECT s.day, u.unit, {1 if by_day else 0} AS n, {zero} FROM {everyone}
            ANTI JOIN acted AS a ON a.day = s.day AND a.unit = u.unit
        )
        SELECT w.day, w.unit, a.arm, CAST(a.epoch AS VARCHAR) AS epoch, {_washout("w.day - 1")} AS washout, CAST(w.n AS BIGINT) AS n,
            {", ".join(f'w."{c}"' for c in columns)}
        FROM whole AS w LEFT JOIN drawn AS a ON a.unit = w.unit AND a.epoch = {_epoch("w.day - 1")}
        ORDER BY w.day, w.unit"""


def _epoch(decided: str) -> str:
    """SQL: the epoch (its first day, as text) of a decision's day; see ``models.policies.arms.epoch_of``."""
    return f"CAST($start + CAST(({decided} - $start) // $epoch * $epoch AS INTEGER) AS VARCHAR)"


def _washout(decided: str) -> str:
    """SQL: whether a decision's day lies in the wash-out of its epoch."""
    return f"({decided} - $start >= $epoch AND ({decided} - $start) % $epoch < $washout)"


def _observed(columns: Sequence[str]) -> pa.Schema:
    return pa.schema(
        {
            "day": pa.date32(), "unit": pa.string(), "arm": pa.string(), "epoch": pa.string(), "washout": pa.bool_(),
            "n": pa.int64(), **dict.fromkeys(columns, pa.float64()),
        }
    )  # fmt: skip


def regression_of(workflow: Workflow) -> Regression:
    """What a workflow says of its guard."""
    assert workflow.regression is not None, "asked for workflows that have a section regression"
    return workflow.regression


def _needed(workflow: Workflow, told: pa.Table, columns: Sequence[str]) -> None:
    lacking = [c for c in columns if c not in told.schema.names]
    if lacking:
        own = [c for c in told.schema.names if c not in {"entity_id", "for_day", "known_at", "day"}]
        raise StageSqlError(
            f"{workflow.folder / workflow.outcomes.sql}: yields no {', '.join(lacking)}, which the section regression of "
            f"{workflow.folder / 'workflow.yaml'} names; it yields {', '.join(own)}"
        )
    for column in columns:
        kind = told.schema.field(column).type
        wanted = pa.types.is_timestamp(kind) if column == regression_of(workflow).settles_at else is_number(kind)
        if not wanted:
            raise StageSqlError(
                f"{workflow.folder / workflow.outcomes.sql}: {column} is {kind}, which the section regression of "
                f"{workflow.folder / 'workflow.yaml'} cannot use: a metric is a number, settles_at a TIMESTAMP"
            )


def in_days(first: date, last: date) -> pc.Expression:
    """Rows whose column day lies between the two, both included."""
    return (pc.field("day") >= pa.scalar(first, pa.date32())) & (pc.field("day") <= pa.scalar(last, pa.date32()))


def _instant(at: datetime) -> pa.Scalar:
    return pa.scalar(at, pa.timestamp("us")).cast(pa.timestamp("us", tz="UTC"))


def _described(workflow: Workflow, lake: Lake, first: date, known: date) -> pa.Table:
    """entity_id, day, the unit's column and moment of the features rows that may name a unit.

    Where a day has several rows of an entity the last moment by name counts.
    """
    table, unit = workflow.table("features"), workflow.arms.unit
    names = lake.read(table, days=[]).schema.names
    if unit not in names:
        raise StageSqlError(
            f"{workflow.folder / workflow.features.sql}: yields no {unit}, which arms.unit in "
            f"{workflow.folder / 'workflow.yaml'} names"
        )
    wanted = list(dict.fromkeys(["entity_id", "day", unit, *(["moment"] if "moment" in names else [])]))
    found = lake.read(table, where=in_days(first, known), columns=wanted)
    return found if "moment" in names else found.append_column("moment", pa.array([""] * found.num_rows, pa.string()))


def drawn_units(lake: Lake, table: str, known: date) -> pa.Table:
    """unit, arm, arm_probability, epoch, drawn_on of the units drawn by then."""
    columns = ["unit", "arm", "arm_probability", "epoch", "drawn_on"]
    if not lake.exists(table):
        kinds = [pa.string(), pa.string(), pa.float64(), pa.string(), pa.date32()]
        return pa.schema(list(zip(columns, kinds, strict=True))).empty_table()
    by_then = pc.field("drawn_on") <= pa.scalar(known, pa.date32())
    return lake.read(table, where=by_then, columns=columns).sort_by([("epoch", "ascending"), ("unit", "ascending")])


def entities(workflow: Workflow, lake: Lake, since: date, *, known: date, until: date | None = None) -> pa.Table:
    """For the design ``entity``: one row an entity that was decided on from ``since`` on (and before ``until``, where
    given) and whose outcome was known by then.

    As ``observations``, with the entity as its unit and the arm of its decision; day: when its outcome became known.
    Raises StageSqlError, too, where arms were drawn for units of several entities, which are no independent observations.
    """
    if workflow.arms.misjudged is not None:
        raise StageSqlError(f"{workflow.folder / 'workflow.yaml'}: arms.unit: {workflow.arms.misjudged}")
    columns = effects.measured(regression_of(workflow))
    table, schema = workflow.table("decision_outcomes"), _observed(columns)
    if not lake.exists(table):
        return schema.empty_table()
    cutoff = workflow.cutoff_of(known)
    told = lake.read(table, where=in_days(since, known) & (pc.field("known_at") <= _instant(cutoff)))
    _needed(workflow, told, columns)
    read = ", ".join(f'CAST("{c}" AS DOUBLE) AS "{c}"' for c in columns)
    some = " OR ".join(f'"{c}" IS NOT NULL' for c in columns)
    connection = duckdb_session.engine()
    try:
        connection.register("told", told)
        query = f"""
        SELECT CAST(min(known_at) OVER (PARTITION BY entity_id) - $early AS DATE) AS day, entity_id AS unit, arm,
            {_epoch("decided_day")} AS epoch, false AS washout, CAST(1 AS BIGINT) AS n, {read}
        FROM told AS t WHERE decided_day >= $since AND decided_day < $until AND ({some})
        {newest("entity_id", day="t.day")}
        ORDER BY 1, 2"""
        early = timedelta(hours=workflow.deadline.hour, minutes=workflow.deadline.minute)
        given = {
            "since": since, "until": until or date.max, "start": workflow.start, "epoch": workflow.arms.epoch, "early": early,
        }  # fmt: skip
        return connection.sql(query, params=given).to_arrow_table().cast(schema)
    finally:
        connection.close()


def past_entities(workflow: Workflow, lake: Lake, first: date, last: date) -> pa.Table:
    """For the design ``entity``: one row an outcome of the past, decided on or not, on the day when it became known."""
    columns = effects.measured(regression_of(workflow))
    told = lake.read(
        workflow.table("outcomes"),
        where=in_days(first, last) & (pc.field("known_at") <= _instant(workflow.cutoff_of(last))),
    )
    _needed(workflow, told, columns)
    some = " OR ".join(f'"{c}" IS NOT NULL' for c in columns)
    read = ", ".join(f'CAST("{c}" AS DOUBLE) AS "{c}"' for c in columns)
    connection = duckdb_session.engine()
    try:
        connection.register("told", told)
        return (
            connection.sql(
                f"""SELECT t.day, entity_id AS unit, NULL::VARCHAR AS arm, NULL::VARCHAR AS epoch, false AS washout,
                CAST(1 AS BIGINT) AS n, {read} FROM told AS t WHERE {some}
            {newest("entity_id", "for_day", day="t.day")}
            ORDER BY t.day, entity_id"""
            )
            .to_arrow_table()
            .cast(_observed(columns))
        )
    finally:
        connection.close()
