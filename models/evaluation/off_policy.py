"""What a model is worth to its policy, from what happened while somebody else decided (off-policy).

Belongs here: the policy's decisions by a model's scores on held-out days, and what they would have brought, with the
assumption that this rests on. Does not: figures of the predictions themselves (``models.evaluation.paired``), the verdict.

Budgets: a line-day of the arm ``explore`` was moved up or down by a fair coin, so value x sign / (2 x probability)
estimates without bias what one step up changes (inverse-probability weighting; Horvitz and Thompson 1952). A level that was
known before the draw is taken off first, which takes noise away and no bias in (doubly robust; Dudik, Langford and Li 2011).
A plan is worth what comes of moving each of these lines by the drawn step in the plan's direction; money it adds or takes on
the whole is charged at the average of what such money earned, so that no plan wins by spending more.

Priorities: of what was missed under the status quo, how much the model's order would have put within the team's capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models import catalog
from models.evaluation.paired import Days, Floats, Interval
from models.policies import budget, priority

BUDGETS_ASSUME = (
    "moved by one drawn step in the direction of the plan, each line answers as it did to the logged coin, and lines do "
    "not compete with one another"
)
PRIORITIES_ASSUME = (
    "a ticket that was missed under the status quo, fell due within the day after and is ranked within a day of its "
    "team's capacity would have been saved; tickets that were not missed are not lost by the order"
)
_DAY = 86_400_000_000  # microseconds
KINDS = ("budget_allocation", "priority_queue")
"""Kinds of policy whose value is measured here."""


@dataclass(frozen=True)
class Value:
    """What the candidate's policy is worth beside the other's, on the same days.

    mine, theirs: share of ``of``. harm: theirs - mine with its interval, in the same shares: positive is worse. loss: what is
    lost beside moving nothing, whoever the other is; None where moving nothing has no value to compare with, and
    ``no_loss`` says why.
    """

    mine: float
    theirs: float
    harm: Interval
    of: str
    assumes: str
    loss: Interval | None = None
    no_loss: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"mine": self.mine, "theirs": self.theirs, "harm": self.harm.as_dict(), "of": self.of,
                "assumes": self.assumes, "loss": None if self.loss is None else self.loss.as_dict()}  # fmt: skip


@dataclass(frozen=True)
class Decided:
    """What one model's policy decides on every held-out day, for the rows of ``at_status_quo`` in their order."""

    scores: pa.Table
    move: Floats
    """after - before."""
    favour: Floats
    """move, positive where it is in the entity's favour."""

    def where(self, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> Decided:
        """For some of the rows."""
        return Decided(self.scores.filter(pa.array(kept)), self.move[kept], self.favour[kept])


def at_status_quo(rows: pa.Table, policy: budget.BudgetPolicy | priority.PriorityPolicy) -> pa.Table:
    """The rows sorted by day, with the perturbation of the day itself taken out: where a plan starts from."""
    rows = rows.take(pc.sort_indices(rows, sort_keys=[("day", "ascending"), ("entity_id", "ascending")]))
    if not isinstance(policy, budget.BudgetPolicy) or policy.multiplier is None:
        return rows
    drawn = _floats(rows, policy.multiplier, 1.0)
    spend = _floats(rows, policy.spend)
    # what stands in whole steps was drawn in whole steps: a line beyond them would keep its budget
    step = np.where(spend % policy.unit_micros == 0, policy.unit_micros, 1)
    spend = np.rint(spend / np.where(drawn > 0, drawn, 1.0) / step) * step
    for name, values in (
        (policy.spend, pa.array(spend.astype(np.int64))),
        (policy.multiplier, pa.array(drawn * 0 + 1)),
    ):
        rows = rows.set_column(rows.column_names.index(name), name, values)
    return rows


def decisions(rows: pa.Table, scorer: Any, policy: budget.BudgetPolicy | priority.PriorityPolicy) -> Decided:
    """The policy over each day's rows (``at_status_quo``) by a model's scores, everybody in one arm that follows it."""
    scores = scorer.score(rows)
    day = rows.column("day").cast(pa.date32()).cast(pa.int32()).to_numpy(zero_copy_only=False)
    edges = [0, *(np.flatnonzero(np.diff(day)) + 1).tolist(), len(day)]
    moves = [np.zeros(0)]
    for start, end in pairwise(edges):
        if start == end:
            continue
        mine, said = rows.slice(start, end - start), scores.slice(start, end - start)
        arms = pa.table({"unit": pc.unique(mine.column("unit").cast(pa.string()))})
        arms = arms.append_column("arm", pa.array(["champion"] * arms.num_rows))
        arms = arms.append_column("arm_probability", pa.array([1.0] * arms.num_rows))
        if isinstance(policy, priority.PriorityPolicy):
            decided = priority.decide(mine, said, arms, policy)
        else:
            decided, _ = budget.decide(mine, said, arms, policy)
        moves.append(_floats(decided, "after", np.nan) - _floats(decided, "before", np.nan))
    move = np.nan_to_num(np.concatenate(moves))
    # a lower number is an earlier turn
    return Decided(scores, move, -move if isinstance(policy, priority.PriorityPolicy) else move)


def value(
    rows: pa.Table,
    mine: Decided,
    theirs: Decided,
    policy: budget.BudgetPolicy | priority.PriorityPolicy,
    *,
    draws: int,
    seed: int,
    confidence: float,
) -> Value | str:
    """What the candidate's decisions are worth beside the other's; a sentence where that cannot be measured.

    rows: as ``at_status_quo`` gives them, with their outcomes.
    """
    if policy.kind not in KINDS:
        return f"not measured: {catalog.why_not(policy.kind, 'off-policy value')}"
    how = {"draws": draws, "seed": seed, "confidence": confidence}
    if isinstance(policy, priority.PriorityPolicy):
        return _of_priorities(rows, mine, theirs, policy, how)
    return _of_budgets(rows, mine, theirs, how)


def _of_budgets(rows: pa.Table, mine: Decided, theirs: Decided, how: dict[str, Any]) -> Value | str:
    absent = {"explore_multiplier", "explore_probability", "budget", "value"} - set(rows.column_names)
    if absent:
        return f"not measured: the outcomes have no {', '.join(sorted(absent))}"
    multiplier, chance = _floats(rows, "explore_multiplier", 1.0), _floats(rows, "explore_probability", np.nan)
    kept = (chance > 0) & (chance < 1) & (multiplier > 0) & (multiplier != 1) & (_floats(rows, "budget", 0.0) > 0)
    if not kept.any():
        return "not measured: no line of the held-out days was perturbed at random"
    spent, earned = _floats(rows, "budget")[kept], _floats(rows, "value", 0.0)[kept]
    sign, step = np.sign(multiplier[kept] - 1), np.abs(spent - spent / multiplier[kept])
    # what was known before the draw; the other model's, so that a candidate cannot blur its own figure
    level = np.nan_to_num(_floats(theirs.scores, "level", 0.0)[kept], posinf=0.0, neginf=0.0)
    gain = sign * (earned - level) / (2 * chance[kept])
    days = Days.of(rows.filter(pa.array(kept)), **how)

    def sums(one: Decided) -> tuple[Floats, Floats]:
        way = np.clip(one.move[kept] / budget.MICROS / step, -1.0, 1.0)
        return days.sums(way * gain), days.sums(way * step)

    def worth(earns: Floats, costs: Floats, gains: Floats, steps: Floats, total: Floats) -> Floats:
        return np.asarray((earns - costs * gains / steps) / total)

    common = days.sums(gain), days.sums(step), days.sums(earned)
    ours, others = sums(mine), sums(theirs)
    flat = [float(worth(*[x.sum() for x in (*one, *common)])) for one in (ours, others)]
    if not np.isfinite(flat).all():
        return "not measured: the lines that were perturbed at random earned nothing"
    worse = days.interval(worth, others[0] - ours[0], others[1] - ours[1], *common)
    lost = days.interval(worth, -ours[0], -ours[1], *common)
    of = f"what {int(kept.sum())} randomly perturbed line-days earned"
    return Value(flat[0], flat[1], worse, of, BUDGETS_ASSUME, lost)


def _of_priorities(
    rows: pa.Table, mine: Decided, theirs: Decided, policy: priority.PriorityPolicy, how: dict[str, Any]
) -> Value | str:
    if "missed" not in rows.column_names:
        return "not measured: the outcomes do not say what was missed"
    missed = _floats(rows, "missed", 0.0) > 0
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
    cost = priority.looked_up(cost_key, policy.cost, policy.other_cost)
    if not missed.any():
        return "not measured: no ticket of the held-out days was missed within the day after, which an order could have saved"
    team = pc.fill_null(rows.column(policy.team).cast(pa.string()), "").combine_chunks()
    capacity = priority.looked_up(team, policy.capacity_hours, policy.other_capacity_hours)
    if policy.capacity is not None:
        given = _floats(rows, policy.capacity, np.nan)
        capacity = np.where(given > 0, given, capacity)
    # work as it was recorded, else as the other model has it: an order does not win by calling everything quick
    effort = (
        _floats(rows, "effort_hours", np.nan) if "effort_hours" in rows.column_names else np.full(len(cost), np.nan)
    )
    effort = np.where(effort > 0, effort, _floats(theirs.scores, "effort_hours", 1.0))
    seconds = np.maximum(1, np.rint(np.nan_to_num(effort, nan=1.0) * 3600)).astype(np.int64)
    day_team = pc.binary_join_element_wise(rows.column("day").cast(pa.string()).combine_chunks(), team, "\x1f")
    codes = np.asarray(pc.index_in(day_team, value_set=pc.unique(day_team)))

    def saved(one: Decided) -> Floats:
        now, later, own = (
            np.nan_to_num(_floats(one.scores, c, np.nan)) for c in ("p_miss_now", "p_miss_later", "effort_hours")
        )
        index = priority.index(cost, now, later, np.where(own > 0, own, 1.0), late_cost=policy.late_cost)
        order = priority.rank(day_team, index, due_at, rows.column("entity_id").combine_chunks())
        before, _ = priority.work_before(order, codes, seconds)
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
        PRIORITIES_ASSUME,
        no_loss=catalog.why_not(policy.kind, "loss beside moving nothing"),
    )


def _floats(table: pa.Table, name: str, default: float | None = None) -> Floats:
    """A column as float64, a null as ``default`` (NaN where None)."""
    column = table.column(name)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    column = column.cast(pa.float64(), safe=False)
    filled = pc.fill_null(column, float("nan") if default is None else default)
    return np.asarray(filled.to_numpy(), dtype=np.float64)
