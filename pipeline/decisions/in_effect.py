"""What acted: read from deliveries. Of a day the batches of which something was sent, and of each entity the value that stood.

Belongs here: the one answer to that question, for guards, outcomes, the exploring log, health and explanations. Does not: what
is to be sent, which is the newest decision (``pipeline.dispatch.batch_of``).

A batch of which nothing was sent answers nothing about the past, however late it was decided; nor does a backfill. Where no
batch of a day has acted, one that was decided in time and had nothing to send answers for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from common import duckdb_session
from delivery.ledger import BatchRow, Ledger
from pipeline.lake import Lake
from pipeline.workflow import Workflow

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_NAIVE = pa.timestamp("us")
DECIDED = pa.schema(
    {
        "decision_id": pa.string(),
        "batch_id": pa.string(),
        "decided_day": pa.date32(),
        "entity_id": pa.string(),
        "unit": pa.string(),
        "arm": pa.string(),
        "arm_probability": pa.float64(),
        "perturbation": pa.float64(),
        "perturbation_probability": pa.float64(),
        "before": pa.int64(),
        "after": pa.int64(),
        "state": pa.string(),
        "standing": pa.int64(),
        "decided_at": _NAIVE,
    }
)
"""``decided``: state of the decision's delivery (null: nothing was to be sent); standing: the value that stood downstream when
the day on which it took effect ended; decided_at: when the day was first decided by a batch that acted (naive UTC)."""


def over(day: date) -> datetime:
    """When the day that a decision of ``day`` takes effect on has ended: from then on ``day`` is history."""
    return datetime.combine(day + timedelta(days=2), datetime.min.time())


def afterwards(batch: BatchRow) -> bool:
    """Whether a batch was decided when the day that it would have taken effect on was over, marked as a backfill or not."""
    return batch.backfill or batch.decided_at >= over(batch.day)


# --- which batches ----------------------------------------------------------------------------------------------------


def by_day(batches: Iterable[BatchRow]) -> dict[date, list[BatchRow]]:
    """Of each day the batches that acted, oldest first; where none did, the newest one that had nothing to send.

    ``batches``: a workflow's, in any order; only its decisions are looked at.
    """
    acted: dict[date, list[BatchRow]] = {}
    idle: dict[date, list[BatchRow]] = {}
    for batch in sorted(batches, key=lambda b: b.sequence):
        if batch.kind != "decision" or batch.backfill or batch.status == "REFUSED":
            continue
        if batch.acted:
            acted.setdefault(batch.day, []).append(batch)
        elif not batch.changed and not afterwards(batch):
            idle[batch.day] = [batch]
    return dict(sorted((idle | acted).items()))


def newest(batches: Iterable[BatchRow]) -> dict[date, BatchRow]:
    """Of each day the newest batch that acted: by whose model and step the day is told."""
    return {day: rows[-1] for day, rows in by_day(batches).items()}


def told(batches: Sequence[BatchRow]) -> dict[date, BatchRow]:
    """By which batch a day is told: the newest that acted, else the newest that was decided before its effect was over.

    What was decided afterwards and never sent tells nothing of a day.
    """
    in_time = [b for b in sorted(batches, key=lambda b: b.sequence) if b.kind == "decision" and not afterwards(b)]
    return dict(sorted(({b.day: b for b in in_time} | newest(batches)).items()))


# --- which decisions, and what stood ----------------------------------------------------------------------------------


def decided(
    ledger: Ledger,
    workflow: str,
    first: date,
    last: date,
    *,
    only: Collection[date] | None = None,
    entities: Sequence[str] | None = None,
) -> pa.Table:
    """The decisions that answer for the days ``first``…``last`` (``only``: of these alone), one an entity and day; see DECIDED.

    Of several batches of a day the one answers whose delivery of the entity was proven last, and the newest where none was:
    what it left alone it has left alone. Of a day on which nothing acted there is no row, nor of an entity whose name was
    forgotten. A rollback during the day shows in ``standing``; a later one changes nothing about that day.
    """
    batches = ledger.batches(workflow)
    rollbacks = [b for b in batches if b.kind == "rollback" and b.delivery != "NONE"]
    acted = by_day(b for b in batches if first <= b.day <= last and (only is None or b.day in only))
    if not acted:
        return DECIDED.empty_table()
    with duckdb_session.engine() as con:
        tables = [_day(con, ledger, day, rows, _taken_back(rollbacks, day), entities) for day, rows in acted.items()]
    return pa.concat_tables(tables)


def of_entity(ledger: Ledger, workflow: str, day: date, entity: str) -> dict[str, Any] | None:
    """The decision that answers for an entity and day, as a row of DECIDED; None where nothing acted on it."""
    rows = decided(ledger, workflow, day, day, entities=[entity]).to_pylist()
    return rows[0] if rows else None


def _taken_back(rollbacks: Sequence[BatchRow], day: date) -> list[BatchRow]:
    """Rollbacks that may have set a value which stood on the day that ``day`` took effect on: of its own batches, and those
    of older days that were begun by then."""
    begun = datetime.combine(day, datetime.min.time())
    return [b for b in rollbacks if b.day == day or (b.day < day and begun <= b.decided_at < over(day))]


def _day(
    con: DuckDBPyConnection,
    ledger: Ledger,
    day: date,
    batches: Sequence[BatchRow],
    back: Sequence[BatchRow],
    entities: Sequence[str] | None,
) -> pa.Table:
    given = {"over": over(day), "begins": datetime.combine(day + timedelta(days=1), datetime.min.time())}
    con.register("told", pa.concat_tables([_with_deliveries(ledger, b, entities) for b in (*batches, *back)]))
    con.register("batches", _sent(day, batches, back))
    return con.sql(_ANSWERS, params=given).to_arrow_table().cast(DECIDED)


def _with_deliveries(ledger: Ledger, batch: BatchRow, entities: Sequence[str] | None) -> pa.Table:
    """A batch's decisions by row number, each beside what became of its delivery (null: there was none)."""
    wanted = [n for n in DECIDED.names if n not in ("batch_id", "decided_day", "state", "standing", "decided_at")]
    rows = ledger.decisions(batch.batch_id, entities).select([*wanted, "n"])
    rows = rows.append_column("sequence", pa.array([batch.sequence] * rows.num_rows, pa.int64()))
    sent = ledger.delivered(batch.batch_id)
    place = pc.index_in(rows["n"], value_set=sent["n"].combine_chunks())
    for name in ("state", "sent", "observed", "verified_at"):
        rows = rows.append_column(name, sent[name].take(place))
    return rows


def _sent(day: date, batches: Sequence[BatchRow], back: Sequence[BatchRow]) -> pa.Table:
    every = [*batches, *back]
    return pa.table(
        {
            "sequence": pa.array([b.sequence for b in every], pa.int64()),
            "batch_id": pa.array([b.batch_id for b in every], pa.string()),
            "decides": pa.array([b.kind == "decision" for b in every], pa.bool_()),
            "own": pa.array([b.day == day for b in every], pa.bool_()),
            "day": pa.array([day] * len(every), pa.date32()),
            "decided_at": pa.array([b.decided_at for b in every], _NAIVE),
        }
    )


# An overwritten change of somebody stands no more: what was sent does. Any other read-back says itself what stood.
_ANSWERS = """
WITH rows AS MATERIALIZED (
    SELECT t.*, b.batch_id, b.decides, b.own, b.day, b.decided_at,
        CASE WHEN state = 'OVERWRITTEN' THEN coalesce(sent, observed) ELSE observed END AS shown,
        coalesce(verified_at < $over, false) AND state IN ('ACKED', 'OVERWRITTEN') AS proven
    FROM told AS t JOIN batches AS b ON b.sequence = t.sequence WHERE entity_id IS NOT NULL
),
stood AS (
    SELECT entity_id, shown FROM rows
    WHERE shown IS NOT NULL AND coalesce(verified_at < $over, true) AND (own OR verified_at >= $begins)
    QUALIFY row_number() OVER (PARTITION BY entity_id ORDER BY verified_at DESC NULLS LAST, sequence DESC) = 1
),
began AS (
    SELECT sequence, coalesce(min(verified_at) >= $over, false) AS too_late FROM rows WHERE decides GROUP BY sequence
),
answers AS (
    SELECT r.*, min(r.decided_at) OVER (PARTITION BY r.entity_id) AS first_decided
    FROM rows AS r JOIN began AS g ON g.sequence = r.sequence
    QUALIFY row_number() OVER (
        PARTITION BY r.entity_id
        ORDER BY r.proven DESC, CASE WHEN r.proven THEN r.verified_at END DESC NULLS LAST, g.too_late, r.sequence DESC
    ) = 1
)
SELECT a.decision_id, a.batch_id, a.day AS decided_day, a.entity_id, a.unit, a.arm, a.arm_probability, a.perturbation,
    a.perturbation_probability, a."before", a."after", a.state, coalesce(s.shown, a."before") AS standing,
    a.first_decided AS decided_at
FROM answers AS a LEFT JOIN stood AS s ON s.entity_id = a.entity_id
ORDER BY a.entity_id"""


# --- whose scores -----------------------------------------------------------------------------------------------------


def scored_by_others(ledger: Ledger, workflow: Workflow, lake: Lake) -> set[date]:
    """Days whose stored scores are of another version than the one that acted: they say nothing about what acts.

    A day on which nothing has acted (yet) is none of them.
    """
    if not lake.exists(workflow.table("scoring")):
        return set()
    stored = lake.read(workflow.table("scoring"), columns=["day", "model_version"])
    acted = newest(ledger.batches(workflow.name, kind="decision"))
    pairs = zip(stored["day"].to_pylist(), stored["model_version"].to_pylist(), strict=True)
    return {day for day, version in pairs if day in acted and version != _version(acted[day].record)}


def _version(record: Mapping[str, Any]) -> int | None:
    value = record.get("model_version")
    return None if value is None else int(value)
