"""What an order of tickets is worth, from what was missed under the order that stood.

Belongs here: the off-policy value of priorities. Does not: when it is asked for (``models.evaluation.off_policy``), the order.

Of what was missed under the status quo, how much the model's order would have put within the team's capacity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.evaluation.bootstrap import Days
from models.policies import ranking
from models.policies.base import Decided, Floats, Value, numbers

if TYPE_CHECKING:
    from models.policies.priority import PriorityPolicy

ASSUMES = (
    "a ticket that was missed under the status quo, fell due within the day after and is ranked within a day of its "
    "team's capacity would have been saved; tickets that were not missed are not lost by the order"
)
_DAY = 86_400_000_000  # microseconds


def value(rows: pa.Table, mine: Decided, theirs: Decided, policy: PriorityPolicy, how: dict[str, Any]) -> Value | str:
    if "missed" not in rows.column_names:
        return "not measured: the outcomes do not say what was missed"
    missed = numbers(rows, "missed", 0.0) > 0
    if policy.due is None or policy.due not in rows.column_names:
        return (
            "not measured: tickets have no due time (policy.due), so nothing says which an order could still have saved"
        )
    due_at = rows.column(policy.due).cast(pa.timestamp("us")).combine_chunks()
    end = pc.add(rows.column("day").cast(pa.timestamp("us")), pa.scalar(_DAY, pa.duration("us")))
    near = pc.and_(pc.greater(due_at, end), pc.less_equal(due_at, pc.add(end, pa.scalar(_DAY, pa.duration("us")))))
    # lost already, or with time left, or without a due time: no order of this day decides it
    missed &= np.asarray(pc.fill_null(near, False))
    cost_key = rows.column(policy.cost_by).cast(pa.string()).combine_chunks()
    cost = ranking.looked_up(cost_key, policy.cost, policy.other_cost)
    if not missed.any():
        return "not measured: no ticket of the held-out days was missed within the day after, which an order could have saved"
    team = pc.fill_null(rows.column(policy.team).cast(pa.string()), "").combine_chunks()
    capacity = ranking.looked_up(team, policy.capacity_hours, policy.other_capacity_hours)
    if policy.capacity is not None:
        given = numbers(rows, policy.capacity, np.nan)
        capacity = np.where(given > 0, given, capacity)
    # work as it was recorded, else as the other model has it: an order does not win by calling everything quick
    effort = (
        numbers(rows, "effort_hours", np.nan) if "effort_hours" in rows.column_names else np.full(len(cost), np.nan)
    )
    effort = np.where(effort > 0, effort, numbers(theirs.scores, "effort_hours", 1.0))
    seconds = np.maximum(1, np.rint(np.nan_to_num(effort, nan=1.0) * 3600)).astype(np.int64)
    day_team = pc.binary_join_element_wise(rows.column("day").cast(pa.string()).combine_chunks(), team, "\x1f")
    codes = np.asarray(pc.index_in(day_team, value_set=pc.unique(day_team)))

    def saved(one: Decided) -> Floats:
        now, later, own = (
            np.nan_to_num(numbers(one.scores, c, np.nan)) for c in ("p_miss_now", "p_miss_later", "effort_hours")
        )
        index = ranking.index(cost, now, later, np.where(own > 0, own, 1.0), late_cost=policy.late_cost)
        order = ranking.rank(day_team, index, due_at, rows.column("entity_id").combine_chunks())
        before, _ = ranking.work_before(order, codes, seconds)
        return np.asarray(np.where(missed & (before < capacity * 3600), cost, 0.0))

    days = Days.of(rows, **how)
    total = days.sums(np.where(missed, cost, 0.0))
    ours, others = days.sums(saved(mine)), days.sums(saved(theirs))
    worse = days.interval(lambda a, b: a / b, others - ours, total)
    shares = [float(x.sum() / total.sum()) for x in (ours, others)]
    return Value(
        shares[0],
        shares[1],
        worse,
        f"the cost of {int(missed.sum())} misses within the day after",
        ASSUMES,
    )
