"""Landing shares: how much of a day stands in quarantine, in rows and in weight.

Belongs here: counting what stands in the lake, whichever run landed it. Does not: the bound, and what follows from it (the
stage ``events``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.ingest.manifest import standing_quarantine
from pipeline.ingest.row_rules import event_columns, from_json, name_sql, open_engine, session

if TYPE_CHECKING:
    from pipeline.lake import Lake
    from pipeline.workflow import EventsContract, Workflow


@dataclass(frozen=True)
class Share:
    """What of a day stands as events and what in quarantine.

    ``quarantined`` counts the rows that are missing; ``repeated`` those that say what a row that stands says, too;
    ``told_later`` those of which upstream has told a later state that landed with them.
    ``accepted_weight`` and ``quarantined_weight`` are sums of the contract's weight (None: it names none), ``unweighed`` the
    missing rows whose weight nobody knows: they count as rows alone.
    """

    accepted: int
    quarantined: int
    repeated: int
    accepted_weight: float | None = None
    quarantined_weight: float | None = None
    unweighed: int = 0
    told_later: int = 0

    @property
    def of_rows(self) -> float | None:
        """The share of missing rows; None where there is no row, which is no verdict."""
        total = self.accepted + self.quarantined
        return self.quarantined / total if total else None

    @property
    def of_weight(self) -> float | None:
        """The share of missing weight; None where there is no weight to judge."""
        if self.accepted_weight is None or self.quarantined_weight is None:
            return None
        total = self.accepted_weight + self.quarantined_weight
        return self.quarantined_weight / total if total else None


def shares(workflow: Workflow, lake: Lake, days: Sequence[date], events: pa.Table) -> dict[date, Share]:
    """The share of each day; ``events`` are the live events of the days."""
    rejected = standing_quarantine(workflow, lake, days)
    told_later = pc.equal(rejected["rule"], "told_later")
    older, rejected = rejected.filter(told_later), rejected.filter(pc.invert(told_later))
    repeated = _repeated(workflow.contract.events, rejected, events)
    missing, again = rejected.filter(pc.invert(repeated)), rejected.filter(repeated)
    weight = workflow.contract.events.weight
    own = pa.nulls(events.num_rows, pa.float64())
    if weight is not None:
        own = pc.max_element_wise(pc.cast(events[weight], pa.float64()), 0.0, skip_nulls=False)
    live = _by_day(pa.table({"day": events["day"], "weight": own}))
    absent, double, before = _by_day(missing), _by_day(again), _by_day(older)
    return {
        day: Share(
            accepted=live.get(day, _NOTHING)[0],
            quarantined=absent.get(day, _NOTHING)[0],
            repeated=double.get(day, _NOTHING)[0],
            accepted_weight=None if weight is None else live.get(day, _NOTHING)[1],
            quarantined_weight=None if weight is None else absent.get(day, _NOTHING)[1],
            unweighed=0 if weight is None else absent.get(day, _NOTHING)[2],
            told_later=before.get(day, _NOTHING)[0],
        )
        for day in days
    }


_NOTHING = (0, 0.0, 0)


def _by_day(rows: pa.Table) -> dict[date, tuple[int, float, int]]:
    """Of each day: rows, the sum of their known weights, and rows without one."""
    sums = rows.group_by("day").aggregate([([], "count_all"), ("weight", "sum"), ("weight", "count")]).to_pylist()
    return {r["day"]: (r["count_all"], r["weight_sum"] or 0.0, r["count_all"] - r["weight_count"]) for r in sums}


def _repeated(contract: EventsContract, rejected: pa.Table, events: pa.Table) -> pa.Array:
    """Which quarantined rows are duplicates of a live event with the same values, whenever that was known."""
    if not contract.unique or not rejected.num_rows:
        return pa.array([False] * rejected.num_rows, pa.bool_())
    columns = event_columns(contract)
    equal = " AND ".join(
        f's."#e".{name_sql(c)} IS NOT DISTINCT FROM k.{name_sql(c)}' for c in columns if c != "known_at"
    )
    con = session(open_engine())
    con.register("#rejected", rejected.select(["event"]).append_column("#n", pa.array(range(rejected.num_rows))))
    con.register("#events", events.select(list(columns)))
    same = con.sql(
        f'WITH s AS (SELECT "#n", {from_json("event", columns)} AS "#e" FROM "#rejected" WHERE event IS NOT NULL) '
        f'SELECT s."#n" FROM s SEMI JOIN "#events" k ON {equal}'
    ).to_arrow_table()
    con.close()
    return pc.is_in(pa.array(range(rejected.num_rows)), same["#n"].combine_chunks())
