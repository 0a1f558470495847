"""Which tickets a team should take first, and the priorities 1 to 5 that say so downstream.

Belongs here: the index, the ranking within a team's capacity, the review list, the coverage-against-accuracy curve,
reasons. Does not: predicting (``models/learners/duration.py``), drawing arms, sending.

The index is the generalised c-mu rule: serve first what loses most by waiting, per hour of work (J. A. van Mieghem,
Annals of Applied Probability 5(3), 1995; A. Mandelbaum and A. L. Stolyar, Operations Research 52(6), 2004). There the
cost of delay is convex and smooth; here it is a step at the due time, so that the loss from waiting is a difference of
two probabilities, and their theorems (heavy traffic, convex costs) do not cover it: ``benchmarks/priority_policy.py``
measures it instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, Field, field_validator

from models.policies import priority_value
from models.policies.base import Decided, Limit, PolicySettings, Value, setting
from models.policies.ranking import index, levels, looked_up, rank, work_before

SCORES = ("p_miss_now", "p_miss_later", "effort_hours", "uncertainty")
CONFIDENT = ("may_miss", "may_hit", "hours_low", "hours_high", "confidence")
"""Score columns that may be missing or null: calibrated sets and intervals (``models.evaluation.conformal``)."""


class PriorityPolicy(PolicySettings):
    """How scores of open tickets become priorities."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    kind: Literal["priority_queue"]
    decide_on: str = Field(
        default="true", description="SQL predicate over the features: the tickets decided on, one row a ticket"
    )
    priority: str = Field(
        default="priority", description="Feature column with the priority that stands downstream (1 = first)"
    )
    team: str = Field(
        default="team", description="Feature column with the team that does the work; ranks are within it"
    )
    due: str | None = Field(
        default="due_at", description="Feature column with the due time: of equal indices the earliest goes first"
    )
    cost_by: str = Field(default="impact", description="Feature column that tells what a missed service level costs")
    cost: dict[str, float] = Field(default={}, description="Cost of a miss by value of `cost_by`, in any one unit")
    other_cost: float = Field(default=1.0, gt=0, description="Cost of a miss for a value that `cost` does not name")
    late_cost: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of the cost of a miss that further delay of a ticket already lost still costs; with 0 a "
        "lost ticket waits until nothing else can be saved",
    )
    capacity: str | None = Field(
        default=None, description="Feature column with the hours of work that the ticket's team gets done a day"
    )
    capacity_hours: dict[str, float] = Field(
        default={}, description="The same by team, where the column is null or not named"
    )
    other_capacity_hours: float = Field(default=24.0, gt=0, description="The same for a team named nowhere else")
    level_days: tuple[float, ...] = Field(
        default=(0.1, 0.2, 0.3, 2.0),
        min_length=1,
        description="Cuts in days of the team's work: priority 1 is what it can begin within the first, and so on; "
        "what lies behind the last cut gets the number after it. What the first cuts leave of a day is for tickets "
        "that arrive during it, with the priority that people give them",
    )
    min_gain: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="A ticket that gains less (difference of probabilities) from going first ...",
    )
    rest_level: int = Field(default=5, ge=1, description="... gets no priority above this one")
    largest_drop: int | None = Field(
        default=None,
        ge=1,
        description="A ticket falls by at most so many priorities a day, so that people can object; null: any",
    )
    review: Literal["uncertainty", "conformal"] = Field(
        default="uncertainty",
        description="What makes a ticket one for people: uncertainty (above `review_above`), or conformal (both outcomes "
        "or none lie in its prediction set at the model's `confidence`; without a set, `review_above` counts)",
    )
    review_above: float = Field(
        default=0.8, ge=0, le=1, description="A ticket with a larger uncertainty keeps its priority and goes to people"
    )
    keep: tuple[int, ...] = Field(
        default=(), description="Priorities that are left to people: such a ticket is never changed"
    )

    @field_validator("level_days")
    @classmethod
    def _cuts_ascend(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if value[0] <= 0 or any(b <= a for a, b in pairwise(value)):
            raise ValueError(f"cuts must be above 0 and ascend, found {list(value)}")
        return value

    @field_validator("cost", "capacity_hours")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        for name, number in value.items():
            if not (np.isfinite(number) and number > 0):
                raise ValueError(f"{name}: must be a number above 0, found {number}")
        return value


def decide(features: pa.Table, scores: pa.Table, arms: pa.Table, spec: Mapping[str, Any] | PriorityPolicy) -> pa.Table:
    """One decision for each row of `features`, in its order.

    features: `entity_id` (each once), the columns that `spec` names, and `unit` where `arms` is keyed by it.
    scores: `entity_id` (and `moment`, where features have it), `p_miss_now`, `p_miss_later`, `effort_hours`,
        `uncertainty`. A ticket without a row, or with a score that is null or out of range, keeps its priority.
        CONFIDENT where there are such: told in the reasons, and what `review: conformal` goes by.
    arms: `arm`, `arm_probability` by `unit` or by `entity_id` (with `unit`); `holdout` keeps its priority.
    Tickets that keep their priority (holdout, review, `keep`) still take their place in the team's capacity.
    Returns entity_id, unit, arm, arm_probability, perturbation, perturbation_probability (both null), before, after,
    changed, review, expected_gain, reasons. `expected_gain` is cost x [P(miss | later) - P(miss | now)], positive for a
    ticket that moves up, negative for one that moves down, 0 for one that stays, null without a score.
    Raises KeyError for a missing column, ValueError for a ticket that stands twice or has no arm.
    """
    policy = spec if isinstance(spec, PriorityPolicy) else PriorityPolicy.model_validate(dict(spec))
    n = features.num_rows
    ids = _column(features, "entity_id", "features")
    if len(pc.unique(ids)) != n:
        twice = [v["values"].as_py() for v in pc.value_counts(ids) if v["counts"].as_py() > 1]
        raise ValueError(f"features: entity_id {twice[0]!r} stands twice; `decide_on` must pick one row a ticket")
    unit, arm, arm_probability = _arms(features, arms, ids)
    team_name = pc.fill_null(_column(features, policy.team, "features").cast(pa.string()), "")
    before = _column(features, policy.priority, "features").cast(pa.int64())
    known = _scores(features, scores, ids)
    p_now, p_later, effort, uncertainty = (known[name] for name in SCORES)
    may_miss, may_hit, hours_low, hours_high, confidence = (known[name] for name in CONFIDENT)
    valid = np.asarray(before.is_valid())
    scored = (
        (p_now >= 0) & (p_now <= 1) & (p_later >= 0) & (p_later <= 1) & (effort > 0) & np.isfinite(effort)
        & (uncertainty >= 0) & (uncertainty <= 1) & valid
    )  # fmt: skip
    cost_key = _column(features, policy.cost_by, "features").cast(pa.string())
    cost = looked_up(cost_key, policy.cost, policy.other_cost)
    capacity = looked_up(team_name, policy.capacity_hours, policy.other_capacity_hours)
    if policy.capacity is not None:
        given = _floats(_column(features, policy.capacity, "features"))
        capacity = np.where(np.isfinite(given) & (given > 0), given, capacity)
    due = _column(features, policy.due, "features") if policy.due is not None else pa.nulls(n, pa.timestamp("us"))

    rows = np.flatnonzero(scored)
    gain = np.where(scored, np.maximum(p_later - p_now, 0.0), 0.0)
    value = np.full(n, np.nan)
    value[rows] = index(cost[rows], p_now[rows], p_later[rows], effort[rows], late_cost=policy.late_cost)
    order = rank(team_name.take(rows), value[rows], due.take(rows), ids.take(rows))
    codes = np.asarray(pc.index_in(team_name, value_set=pc.unique(team_name)))
    seconds = np.maximum(1, np.round(effort[rows] * 3600)).astype(np.int64)
    work, place = work_before(order, codes[rows], seconds)
    level = np.full(n, 1, dtype=np.int64)
    level[rows] = levels(work, capacity[rows], policy.level_days)
    idle = scored & (gain < policy.min_gain)
    lowest = len(policy.level_days) + 1
    level = np.where(idle, np.maximum(level, min(policy.rest_level, lowest)), level)

    now = np.asarray(pc.fill_null(before, 0))
    held = np.asarray(pc.equal(arm, "holdout"))
    kept = np.isin(now, policy.keep)
    by_set = ~np.isnan(may_miss + may_hit) if policy.review == "conformal" else np.zeros(n, dtype=bool)
    # an empty set, too, is of no help: neither outcome looks like those that were calibrated on
    unsure = np.where(by_set, may_miss == may_hit, uncertainty > policy.review_above)
    review = scored & unsure & ~held
    acts = scored & ~held & ~kept & ~review
    softened = np.zeros(n, dtype=bool)
    if policy.largest_drop is not None:
        softened = acts & (level > now + policy.largest_drop)
        level = np.where(softened, now + policy.largest_drop, level)
    after = np.where(acts, level, now)
    expected = np.sign(now - after) * cost * gain

    before_work, places = np.zeros(n), np.zeros(n, dtype=np.int64)
    in_team = np.bincount(codes[rows], minlength=n + 1)[codes]
    before_work[rows], places[rows] = work / 3600, place
    reasons = _reasons(
        {"scored": scored, "held": held, "kept": kept, "review": review, "idle": idle, "acts": acts, "softened": softened},
        p_now=p_now, p_later=p_later, cost=cost, cost_key=cost_key, cost_by=policy.cost_by, effort=effort, value=value,
        place=places, of=in_team, team=team_name, work=before_work, capacity=capacity, after=after, before=now,
        uncertainty=uncertainty, limit=policy.review_above, valid=valid, by_set=by_set, hours_low=hours_low,
        hours_high=hours_high, confidence=confidence,
    )  # fmt: skip
    return pa.table({
        "entity_id": ids,
        "unit": unit,
        "arm": arm,
        "arm_probability": arm_probability,
        "perturbation": pa.nulls(n, pa.float64()),
        "perturbation_probability": pa.nulls(n, pa.float64()),
        "before": before,
        "after": pa.array(after, mask=~valid),
        "changed": pa.array(after != now),
        "review": pa.array(review),
        "expected_gain": pa.array(expected + 0.0, mask=~scored),
        "reasons": reasons,
    })  # fmt: skip


def coverage_curve(uncertainty: np.ndarray, p_miss: np.ndarray, missed: np.ndarray) -> pa.Table:
    """What is decided, and how rightly, at each review limit (selective prediction; Geifman and El-Yaniv, NIPS 2017).

    uncertainty, p_miss in [0, 1] and missed (bool): shape (n,), of tickets whose outcome is known.
    Returns one row a distinct uncertainty, ascending: `limit`, `coverage` (share of tickets at or under it), `accuracy`
    (share of those where p_miss >= 0.5 agrees with the outcome), `brier` (mean squared error of p_miss on them).
    """
    if len(uncertainty) == 0:
        raise ValueError("no ticket with a known outcome: the curve needs matured outcomes")
    order = np.argsort(uncertainty, kind="stable")
    u, right = uncertainty[order], ((p_miss >= 0.5) == missed)[order]
    squared = ((p_miss - missed) ** 2)[order]
    last = np.append(u[1:] != u[:-1], True)
    count = np.arange(1, len(u) + 1)
    return pa.table({
        "limit": u[last],
        "coverage": (count / len(u))[last],
        "accuracy": (np.cumsum(right) / count)[last],
        "brier": (np.cumsum(squared) / count)[last],
    })  # fmt: skip


def _column(table: pa.Table, name: str, what: str) -> pa.Array:
    if name not in table.column_names:
        raise KeyError(f"{what}: column {name!r} is missing; there are {', '.join(table.column_names)}")
    column = table.column(name).combine_chunks()
    return column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)


def _floats(column: pa.Array) -> np.ndarray:
    return np.asarray(pc.fill_null(column.cast(pa.float64()), float("nan")))


def _arms(features: pa.Table, arms: pa.Table, ids: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """unit, arm and arm_probability of each row of `features`."""
    by = "entity_id" if "entity_id" in arms.column_names else "unit"
    keys = ids if by == "entity_id" else _column(features, "unit", "features").cast(pa.string())
    at = pc.index_in(keys, value_set=_column(arms, by, "arms").cast(pa.string()))
    if at.null_count:
        raise ValueError(f"arms: {by} {keys.filter(pc.is_null(at))[0].as_py()!r} has no arm; draw one for every {by}")
    probability = _column(arms, "arm_probability", "arms").cast(pa.float64())
    return _column(arms, "unit", "arms").take(at), _column(arms, "arm", "arms").take(at), probability.take(at)


def _scores(features: pa.Table, scores: pa.Table, ids: pa.Array) -> dict[str, np.ndarray]:
    """The score columns aligned with `features`; NaN where there is none."""
    keys, theirs = ids.cast(pa.string()), _column(scores, "entity_id", "scores").cast(pa.string())
    if "moment" in features.column_names and "moment" in scores.column_names:
        keys = pc.binary_join_element_wise(_column(features, "moment", "features"), keys, "\x1f")
        theirs = pc.binary_join_element_wise(_column(scores, "moment", "scores"), theirs, "\x1f")
    at = pc.index_in(keys, value_set=theirs)
    told = {name: _floats(_column(scores, name, "scores").take(at)) for name in SCORES}
    for name in CONFIDENT:
        there = name in scores.column_names
        column = _column(scores, name, "scores").take(at) if there else None
        if column is not None and pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        told[name] = np.full(len(ids), np.nan) if column is None else _floats(column)
    return told


def _text(values: np.ndarray, digits: int) -> pa.Array:
    """Numbers as text with a fixed count of digits behind the point."""
    shown = np.nan_to_num(np.round(values, digits), nan=0.0, posinf=0.0, neginf=0.0) + 0.0
    return pa.array(np.char.mod(f"%.{digits}f", shown).astype(object), pa.string())


def _join(*parts: pa.Array | str) -> pa.Array:
    return pc.binary_join_element_wise(*parts, "")


def _reasons(mark: dict[str, np.ndarray], **of: Any) -> pa.Array:
    """LIST<VARCHAR>: for each ticket why, in sentences with its figures."""
    n = len(of["after"])
    stays, sure = _join("priority ", _text(of["before"], 0), " stays."), _text(100 * of["confidence"], 0)
    kept = pc.if_else(
        pa.array(~of["valid"]), "No priority is set downstream: none is set here.",
        pc.if_else(
            pa.array(mark["held"]), _join("Holdout, kept for comparison: ", stays),
            pc.if_else(
                pa.array(~mark["scored"]), _join("No usable score: ", stays),
                pc.if_else(
                    pa.array(mark["review"]),
                    pc.if_else(
                        pa.array(of["by_set"]),
                        _join("Unsure whether it misses its service level (", sure, "%): a person decides, ", stays),
                        _join("Uncertainty ", _text(of["uncertainty"], 2), " is above ", f"{of['limit']:.2f}",
                              ": a person decides, ", stays),
                    ),
                    _join("This priority is left to people: ", stays),
                ),
            ),
        ),
    )  # fmt: skip
    risk = _join(
        "Begun now it misses the service level with probability ", _text(100 * of["p_now"], 0), "%, begun later with ",
        _text(100 * of["p_later"], 0), "%.",
        pc.if_else(
            pa.array(np.isfinite(of["hours_low"] + of["hours_high"])),
            _join(" It is resolved in between ", _text(of["hours_low"], 0), " and ", _text(of["hours_high"], 0), " h (",
                  sure, "%)."),
            "",
        ),
    )  # fmt: skip
    worth = _join(
        "A miss costs ", _text(of["cost"], 1), " (", of["cost_by"], " ", pc.fill_null(of["cost_key"], "unknown"),
        "), the work takes ", _text(of["effort"], 1), " h: index ", _text(of["value"], 3), " an hour.",
    )  # fmt: skip
    seat = _join(
        "Rank ", _text(of["place"], 0), " of ", _text(of["of"], 0), " in team ", of["team"], ", behind ",
        _text(of["work"], 1), " h of work at ", _text(of["capacity"], 1), " h a day: priority ", _text(of["after"], 0),
        pc.if_else(pa.array(mark["idle"]), ", as going first gains it nothing", ""),
        pc.if_else(pa.array(mark["softened"]), "; it falls no further in one day.", "."),
    )  # fmt: skip
    last = pc.if_else(pa.array(mark["acts"]), seat, kept)
    sentences = [risk, worth, last]
    # a ticket without a score has nothing but the last sentence
    counts = np.where(mark["scored"], 3, 1)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    flat = np.empty(3 * n, dtype=np.int64)
    flat[0::3], flat[1::3], flat[2::3] = np.arange(n), n + np.arange(n), 2 * n + np.arange(n)
    wanted = np.repeat(mark["scored"], 3)
    wanted[2::3] = True
    words = pa.concat_arrays([s.cast(pa.string()) for s in sentences]).take(pa.array(flat[wanted]))
    return pa.ListArray.from_arrays(pa.array(offsets), words)


class PriorityQueue:
    """The kind ``priority_queue``."""

    settings = PriorityPolicy
    money = False
    explored = None
    whole_columns: ClassVar[Mapping[str, str]] = {"priority": "priorities"}
    columns = ("team", "due", "cost_by", "capacity")
    absent: ClassVar[Mapping[str, str]] = {
        "loss beside moving nothing": "the priorities that stood are an order themselves, and what was missed was missed "
        "under it: nothing says what that order has saved",
    }

    def decide(
        self, spec: PriorityPolicy, features: pa.Table, scores: pa.Table, drawn: pa.Table, **exploring: Any
    ) -> tuple[pa.Table, dict[str, Any]]:
        """See ``decide``; nothing is explored, and an order has no certificate."""
        return decide(features, scores, drawn, spec), {}

    def status_quo(self, spec: PriorityPolicy) -> str:
        """The priority that stands downstream."""
        return spec.priority

    def starts_from(self, spec: PriorityPolicy, rows: pa.Table) -> pa.Table:
        """The rows themselves: nothing was perturbed."""
        return rows

    def competes_with(self, spec: PriorityPolicy, chosen: pa.Table, row: pa.Table, arm: pa.Array) -> pa.Array:
        """A team's tickets share its hands."""
        team = chosen[spec.team].cast(pa.string())
        return pc.equal(pc.fill_null(team, ""), row[spec.team][0].as_py() or "")

    def stands_in(self, spec: PriorityPolicy) -> set[str | None]:
        """The priority."""
        return {spec.priority}

    def least_change(self, before: int) -> float:
        """One level."""
        return 1.0

    def limits(self, spec: PriorityPolicy, row: pa.Table, arm: str) -> Iterator[Limit]:
        """Review, drop, gain, levels, their cuts, and the capacity and cost that hold for the ticket."""
        if spec.review == "uncertainty":
            yield Limit("review_above", spec.review_above, 0.0, 1.0, setting("review_above"))
        lowest = len(spec.level_days) + 1
        if spec.largest_drop is not None:
            yield Limit("largest_drop", spec.largest_drop, 1, lowest, setting("largest_drop", int), whole=True)
        yield Limit("min_gain", spec.min_gain, 0.0, 1.0, setting("min_gain"))
        yield Limit("rest_level", spec.rest_level, 1, lowest, setting("rest_level", int), whole=True)
        yield Limit("late_cost", spec.late_cost, 0.0, 1.0, setting("late_cost"))
        cuts = spec.level_days
        for i, cut in enumerate(cuts):
            low, high = cuts[i - 1] if i else 0.0, cuts[i + 1] if i + 1 < len(cuts) else math.inf
            yield Limit(f"level_days[{i}]", cut, low, high, setting("level_days", _cut_at(cuts, i)), inside=True)
        for field, other, column in (
            ("capacity_hours", "other_capacity_hours", spec.team),
            ("cost", "other_cost", spec.cost_by),
        ):
            key, named = str(row[column][0].as_py()), getattr(spec, field)
            if key in named:
                now = named[key]
                yield Limit(f"{field}.{key}", now, now * 0.01, math.inf, setting(field, _with(named, key)))
            else:
                now = getattr(spec, other)
                yield Limit(other, now, now * 0.01, math.inf, setting(other))

    def against_guardrails(self, spec: PriorityPolicy, levels: tuple[int, int] | None, unit: int | None) -> list[str]:
        """Every level that can be decided is allowed."""
        if levels is None:
            return []
        wrong, within = [], f"guardrails.levels allows {levels[0]} to {levels[1]}"
        deepest = len(spec.level_days) + 1
        if deepest > levels[1] or levels[0] > 1:
            wrong.append(
                f"policy.level_days: {len(spec.level_days)} cuts give the priorities 1 to {deepest}, but {within}; take out cuts, or "
                "widen the levels"
            )
        if not levels[0] <= spec.rest_level <= levels[1]:
            wrong.append(f"policy.rest_level: {spec.rest_level} can never be decided: {within}")
        return wrong + [
            f"policy.keep: {kept} never stands: {within}" for kept in spec.keep if not levels[0] <= kept <= levels[1]
        ]

    def against_delivery(self, spec: PriorityPolicy, push_unit: int, connector_unit: int | None) -> list[str]:
        """Levels are sent as they are."""
        return [] if push_unit == 1 else [f"delivery.push.unit: {push_unit} would round priorities; leave it out (1)"]

    def value(
        self, spec: PriorityPolicy, rows: pa.Table, mine: Decided, theirs: Decided, how: dict[str, Any]
    ) -> Value | str:
        """See ``models.policies.priority_value``."""
        return priority_value.value(rows, mine, theirs, spec, how)


def _cut_at(cuts: tuple[float, ...], i: int) -> Callable[[float], tuple[float, ...]]:
    return lambda v: (*cuts[:i], v, *cuts[i + 1 :])


def _with(named: dict[str, float], key: str) -> Callable[[float], dict[str, float]]:
    return lambda v: {**named, key: v}


KIND = PriorityQueue()
