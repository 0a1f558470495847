"""The budget policy: spend where the next unit of money earns most, within bounds, and certify the plan.

Belongs here: the allocation over response curves with its certificate, and the decisions of one day with their reasons.
Does not: where the curves come from (the learners, ``models.elasticity``), drawing arms (``models.policies.arms``), sending.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from models.policies.arms import Explore, perturb

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]

MICROS = 1_000_000
EXACT_POINTS = 4096  # lines x points up to which the curves themselves are searched where the envelope is not tight
EXACT_NODES = 2000  # sub-problems that this search may look at
CHUNK = 4096  # lines treated at a time, so that a chunk stays in the processor's cache
ROUNDING = 1e-12  # relative difference that is taken for floating-point rounding


class BudgetPolicy(BaseModel):
    """The section `policy` of a workflow.yaml with kind `budget_allocation`. Money columns hold micros."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["budget_allocation"] = "budget_allocation"
    decide_on: str = Field(default="true", description="SQL predicate over the features: lines that are decided on")
    spend: str = Field(default="budget_micros", description="Feature column with a line's budget today: the status quo")
    spend_age: str | None = Field(
        default=None,
        description="Feature column with how many days before the day the status quo was set (0: on it). Where it is "
        "older, what a delivery has proved since counts, and exploring leaves the line alone; null: always of the day",
    )
    floor: str | None = Field(
        default=None, description="Feature column with the least a line may get; null there: no floor"
    )
    cap: str | None = Field(default=None, description="Feature column with the most a line may get; null there: no cap")
    floor_share: float = Field(default=0.0, ge=0, le=1, description="No line falls below this share of its status quo")
    cap_share: float | None = Field(
        default=None, ge=1, description="No line rises above this multiple of its status quo"
    )
    largest_daily_change: float | None = Field(
        default=0.3, gt=0, description="A line moves by at most this share of its status quo a day; null: no limit"
    )
    target_return: float | None = Field(
        default=None,
        gt=0,
        description="Expected value for each unit of money, over an arm; then the total is a ceiling",
    )
    largest_doubt: float | None = Field(
        default=None,
        gt=0,
        description="A line whose interval (`value_low` to `value_high`) is wider than this share of its expected value "
        "at today's budget keeps it; null: no line does. A score without an interval is not held to it",
    )
    total: Literal["same"] = Field(default="same", description="An arm's pool; same: what its lines have today")
    unit_micros: int = Field(
        default=1,
        gt=0,
        description="Smallest step of money that the downstream system takes (10000: cents). A line whose budget is not in "
        "whole steps keeps it; where most of an arm's are not, each moves by whole steps",
    )
    multiplier: str | None = Field(
        default="explore_multiplier_today",
        description="Feature column with today's exploring multiplier, which exploring takes out before it draws "
        "anew; null: none",
    )


@dataclass(frozen=True)
class Plan:
    """An allocation with its certificate. Money in micros, value in currency units, prices in value per
    currency unit."""

    spend: Ints
    value: float
    """Expected value of `spend` on the curves themselves."""
    bound: float
    """No allocation within the bounds is worth more: the dual function at the prices, or what the exact search
    left open."""
    gap: float
    """bound - value, at least 0."""
    shadow_price: float
    """What one more unit of money would earn (0 where money is left over; below 0 where the total forces a loss)."""
    return_price: float
    """What relaxing the target return by one unit of value would earn; 0 where it does not bind or is not set."""
    unspent: int
    """total - sum(spend); below 0 where the plan is infeasible and the status quo is above the total."""
    feasible: bool
    reason: str
    """Why it is infeasible, or why money is left over; else empty."""
    method: str
    """envelope | envelope, exact (it is tight) | branch and bound, exact | branch and bound, stopped | none
    (infeasible)."""


def allocate(
    spends: Ints,
    values: Floats,
    *,
    total: int,
    floor: Ints,
    cap: Ints,
    before: Ints,
    largest_change: float | None,
    target_return: float | None = None,
) -> Plan:
    """Maximise the summed value of piecewise-linear curves under a total and bounds.

    Each curve is cut to what its line may get (floor, cap, largest change around `before`, the curve's own ends; a
    bound
    between two grid points is interpolated) and replaced by its upper concave envelope. On envelopes the problem is a
    linear programme whose optimum spends on segments in the order of their slopes until the money is gone (Lagrangian
    dual; Everett 1963). At most one line then ends between two corners, so at most one line can be off its envelope.
    With few lines (n x k <= EXACT_POINTS) and an envelope that is not tight, branch and bound on the curves themselves:
    the off-envelope line is split at a grid point, each half has tighter envelopes, and the search is finite.

    Without a target return the whole total is spent if the bounds permit: flat segments take money as any other, and
    segments that lose value take it last, when nothing else is left (the shadow price is then negative). With a target
    return R the total is a ceiling: sum(s) <= total and sum(v - R s) >= 0, as in Balseiro et al., arXiv 2302.08530,
    each
    with its own dual price; flat and losing segments get nothing, and the return holds on the curves, not on envelopes.

    Args:
        spends: (n, k) micros, not descending along a line; equal neighbours must have equal values.
        values: (n, k) expected value in currency units at these spends.
        total: Micros.
        floor, cap, before: (n,) micros.
        largest_change: Share of `before` by which a line may move; None: no limit.
        target_return: Value for each currency unit over all lines; None: no target.

    Returns:
        A Plan with sum(spend) + unspent == total. An infeasible one keeps `before`, and its reason names line and
        figures.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite or negative money, spends that descend.
    """
    spends, values = np.asarray(spends, dtype=np.int64), np.asarray(values, dtype=np.float64)
    floor, cap, before = (np.asarray(a, dtype=np.int64) for a in (floor, cap, before))
    _refuse(spends, values, floor, cap, before, int(total), largest_change, target_return)
    if len(before) == 0:
        return Plan(
            before,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            int(total),
            True,
            "no line may be moved" if total else "",
            "envelope, exact",
        )
    low, high = _bounds(spends, floor, cap, before, largest_change)

    def refused(reason: str, bound: float = np.nan) -> Plan:
        here = float(_at(spends, values, before).sum())
        return Plan(before, here, bound, np.nan, np.nan, np.nan, int(total - before.sum()), False, reason, "none")

    clash = np.flatnonzero(low > high)
    if len(clash):
        i = int(clash[0])
        at_least, at_most = (int(a[i]) for a in _limits(floor, cap, before, largest_change))
        return refused(
            f"{len(clash)} lines cannot meet their bounds at once; line {i} must get at least {_money(at_least)} "
            f"and at most {_money(at_most)}, and its curve spans {_money(spends[i, 0])} to {_money(spends[i, -1])}"
        )
    least, most = int(low.sum()), int(high.sum())
    if least > total:
        return refused(f"the lines' lower bounds sum to {_money(least)}, the total is {_money(total)}")
    money = min(int(total), most)
    curves = _Curves.cut(spends, values, low, high)
    best = _solve(curves, money, target_return)
    if best is None:
        return refused(
            f"no allocation within the bounds and {_money(total)} returns {target_return:g} for each unit of money"
        )
    spend, value, bound, method = best.spend, best.value, best.bound, "envelope"
    if best.tight:
        method = "envelope, exact"
    elif spends.size <= EXACT_POINTS:
        spend, value, bound, stopped = _branch(curves, best, money, target_return)
        method = "branch and bound, stopped" if stopped else "branch and bound, exact"
    if spend is None:
        return refused(
            f"no allocation was found that returns {target_return:g} for each unit of money; on the curves' "
            "concave envelopes there is one",
            bound,
        )
    left = int(total - spend.sum())
    reason = ""
    if left and target_return is None:
        reason = f"{_money(left)} cannot be spent: the lines' upper bounds sum to {_money(most)}"
    elif left:
        reason = (
            f"{_money(left)} is left: spending it would break the return of {target_return:g} for each unit of money, "
            "earn nothing at all, or pass a bound"
        )
    price = 0.0 if money < total else best.shadow_price
    return Plan(spend, value, bound, max(0.0, bound - value), price, best.return_price, left, True, reason, method)


def _refuse(
    spends: Ints,
    values: Floats,
    floor: Ints,
    cap: Ints,
    before: Ints,
    total: int,
    change: float | None,
    target: float | None,
) -> None:
    n = len(before)
    if spends.ndim != 2 or spends.shape[0] != n or spends.shape[1] < 1 or values.shape != spends.shape:
        raise ValueError(
            f"spends and values must both be ({n}, k) with k >= 1, found {spends.shape} and {values.shape}"
        )
    if floor.shape != (n,) or cap.shape != (n,):
        raise ValueError(f"floor and cap must be ({n},) like before, found {floor.shape} and {cap.shape}")
    for name, number in (("total", float(total)), ("largest_change", change), ("target_return", target)):
        if number is not None and not (np.isfinite(number) and number >= 0):
            raise ValueError(f"{name} is {number}: it must be a finite number of zero or more")
    flat = spends[:, 1:] == spends[:, :-1]
    for what, bad in (
        ("a value that is not finite", ~np.isfinite(values)),
        ("spends that descend", spends[:, 1:] < spends[:, :-1]),
        ("two values at one spend", flat & (values[:, 1:] != values[:, :-1]) if flat.any() else flat),
        ("a negative spend", spends[:, :1] < 0),
        ("negative money in before, floor or cap", (np.minimum(np.minimum(before, floor), cap) < 0)[:, None]),
    ):
        if bad.any():
            rows = np.flatnonzero(bad.any(axis=1))
            raise ValueError(
                f"line {rows[0]} has {what} ({len(rows)} such lines): leave them out, or correct their curves"
            )


def _limits(floor: Ints, cap: Ints, before: Ints, change: float | None) -> tuple[Ints, Ints]:
    """Least and most that the rules allow each line."""
    if change is None:
        return floor, cap
    step = np.floor(before * change + 1e-6).astype(np.int64)  # 0.1 x 30 must be 3 whole micros
    return np.maximum(floor, before - step), np.minimum(cap, before + step)


def _bounds(spends: Ints, floor: Ints, cap: Ints, before: Ints, change: float | None) -> tuple[Ints, Ints]:
    least, most = _limits(floor, cap, before, change)
    return np.maximum(least, spends[:, 0]), np.minimum(most, spends[:, -1])


def _at(spends: Ints, values: Floats, where: Ints) -> Floats:
    """Value of each line's own curve at `where` (n,), linear between points and constant beyond its ends."""
    rows = np.arange(len(where))
    left = np.maximum((spends <= where[:, None]).sum(axis=1) - 1, 0)
    right = np.minimum(left + 1, spends.shape[1] - 1)
    x, v = spends[rows, left], values[rows, left]
    width = spends[rows, right] - x
    share = np.divide(np.maximum(where - x, 0), width, out=np.zeros(len(where)), where=width > 0)
    return np.asarray(v + (values[rows, right] - v) * share)


@dataclass(frozen=True)
class _Curves:
    """Curves cut to their bounds, and the slopes of their envelopes.

    `spends` (n, k) start at the lower and end at the upper bound (points outside collapse onto them); `slopes` (n, k
    - 1), value per micro, never ascend along a line, and are the same number along one edge of the envelope.
    """

    spends: Ints
    values: Floats
    slopes: Floats

    @classmethod
    def cut(cls, spends: Ints, values: Floats, low: Ints, high: Ints) -> _Curves:
        n, k = spends.shape
        out = cls(np.empty((n, k), dtype=np.int64), np.empty((n, k)), np.empty((n, k - 1)))
        for start in range(0, n, CHUNK):
            at = slice(start, start + CHUNK)
            x, v = _held(spends[at], values[at], low[at], high[at])
            out.spends[at], out.values[at], out.slopes[at] = x, v, _envelope(x, v)
        return out

    def narrowed(self, line: int, low: int, high: int) -> _Curves:
        """The same with one line held between two of its own points."""
        spends, values, slopes = self.spends.copy(), self.values.copy(), self.slopes.copy()
        at = slice(line, line + 1)
        spends[at], values[at] = _held(spends[at], values[at], np.array([low]), np.array([high]))
        slopes[at] = _envelope(spends[at], values[at])
        return _Curves(spends, values, slopes)


def _held(spends: Ints, values: Floats, low: Ints, high: Ints) -> tuple[Ints, Floats]:
    """Curves between two bounds: points outside collapse onto the bound, with the curve's value there."""
    below, above = spends < low[:, None], spends > high[:, None]
    kept = np.where(
        below, _at(spends, values, low)[:, None], np.where(above, _at(spends, values, high)[:, None], values)
    )
    return np.clip(spends, low[:, None], high[:, None]), kept


def _envelope(spends: Ints, values: Floats) -> Floats:
    """Slopes (n, k - 1) of the upper concave envelopes, all lines at once by gift wrapping (Jarvis 1973).

    From each point the steepest line to a later one is the envelope's edge if the point is on the envelope; a walk from
    the first point keeps the edges that are.
    """
    x, v = np.ascontiguousarray(spends.T, dtype=np.float64), np.ascontiguousarray(values.T)
    k, n = x.shape
    out = np.zeros((k - 1, n))
    steepest, until = np.full((k, n), -np.inf), np.full((k, n), k - 1, dtype=np.int32)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i in range(k - 1):
            for j in range(i + 1, k):
                through = (v[j] - v[i]) / (x[j] - x[i])
                better = through >= steepest[i]  # false for the NaN of two points in one place
                np.copyto(steepest[i], through, where=better)
                np.copyto(until[i], j, where=better)
    edge, end = steepest[0].copy(), until[0].copy()
    for m in range(k - 1):
        if m:
            np.copyto(edge, np.minimum(steepest[m], edge), where=end <= m)  # rounding must not let slopes ascend
            np.copyto(end, until[m], where=end <= m)
        np.copyto(out[m], edge, where=x[m + 1] > x[m])
    return out.T


@dataclass(frozen=True)
class _Solved:
    """Optimum on the envelopes, and what the curves themselves make of it."""

    spend: Ints | None
    """A plan that keeps every constraint on the curves; None: rounding off the envelope left none."""
    value: float
    bound: float
    shadow_price: float
    return_price: float
    tight: bool
    """The plan is worth the bound."""
    line: int
    """The line that ends between two corners of its envelope; -1: none does."""
    at: int
    """Where it does, micros."""


def _solve(curves: _Curves, money: int, target_return: float | None) -> _Solved | None:
    """Optimum on the envelopes; None: there is none within the constraints."""
    low, width = curves.spends[:, 0], np.diff(curves.spends, axis=1)
    slope, weight = curves.slopes.ravel(), width.ravel()
    room = money - int(low.sum())
    if room < 0 or (target_return is None and room > int(weight.sum())):
        return None
    value = float(curves.values[:, 0].sum())
    shadow_price = return_price = 0.0
    pays = slope > 0 if target_return is not None else None
    full, partial, rest = _cut(slope, weight if pays is None else weight * pays, room)
    if pays is not None:
        full &= pays
    taken, earned = _taken(slope, width, full)
    last = 0.0  # what the partial segment earns
    if partial >= 0:
        shadow_price = float(slope[partial])
        last = shadow_price * float(rest)
    if target_return is not None:
        required = target_return / MICROS  # value per micro
        spent = int(low.sum() + taken.sum()) + int(rest)
        if value + earned + last < required * spent - ROUNDING * max(1.0, required * spent):
            if shadow_price >= required:
                return None
            lean = slope >= required
            slack = value - required * int(low.sum()) + float(((slope[lean] - required) * weight[lean]).sum())
            if slack < 0:
                return None
            fat = (slope > 0) & ~lean
            full, partial, left = _cut(
                np.where(fat, slope, -np.inf), np.where(fat, required - slope, 0.0) * weight, slack
            )
            full = (full & fat) | lean
            taken, earned = _taken(slope, width, full)
            shadow_price = last = 0.0
            if partial >= 0:
                theta = float(slope[partial])
                return_price = theta / (required - theta)
                last = return_price * float(left)
                rest = min(int(left / (required - theta) * (1 + ROUNDING)), int(weight[partial]))
    bound = value + earned + last
    spend = np.asarray(low + taken, dtype=np.int64)
    line, at = -1, 0
    if partial >= 0:  # even where nothing is left for the segment: the line may stand in the middle of an edge
        line = partial // width.shape[1]
        spend[line] += int(rest)
        at = int(spend[line])
    worth = _at(curves.spends, curves.values, spend)
    tight = line < 0 or bool(
        _below(curves, line, np.array([at]))[0] <= ROUNDING * max(1.0, float(np.abs(curves.values[line]).max()))
    )
    solved = _Solved(spend, float(worth.sum()), bound, shadow_price * MICROS, return_price, tight, line, at)
    if tight or target_return is None:
        return solved
    return _finish(curves, solved, money, required)


def _taken(slope: Floats, width: Ints, full: Bools) -> tuple[Ints, float]:
    """Money (n,) that the full segments of each line take, and what all of it earns on the envelopes."""
    money, earned = np.empty(len(width), dtype=np.int64), 0.0
    slope, full = slope.reshape(width.shape), full.reshape(width.shape)
    for start in range(0, len(width), CHUNK):
        at = slice(start, start + CHUNK)
        part = np.where(full[at], width[at], 0)
        money[at] = part.sum(axis=1)
        earned += float(np.einsum("ij,ij->", part, slope[at]))
    return money, earned


def _cut(slope: Floats, weight: np.ndarray[Any, Any], capacity: float) -> tuple[Bools, int, Any]:
    """Take segments by descending slope (equal ones in order) while their weight fits.

    Returns those that fit whole, the one that does not (-1: all fit), and the capacity left for it.
    """
    if weight.sum() <= capacity:
        return np.ones(len(slope), dtype=bool), -1, 0
    some, its, left, rng = slope, weight, capacity, np.random.default_rng(0)
    while (
        len(some) > 4096
    ):  # weighted selection between two sampled pivots: linear, where sorting 8 million slopes takes a second
        pick = rng.integers(0, len(some), 2048)
        pick = pick[np.argsort(-some[pick])]
        sums = np.cumsum(its[pick])
        near = int(np.searchsorted(sums, float(left) / float(its.sum()) * float(sums[-1])))
        upper, lower = some[pick[max(near - 128, 0)]], some[pick[min(near + 128, len(pick) - 1)]]
        above, between = some > upper, (some <= upper) & (some >= lower)
        heavy, middle = its[above].sum(), its[between].sum()
        keep = above if heavy > left else between if heavy + middle > left else some < lower
        if keep.all() or not keep.any():
            break
        left = left if keep is above else left - heavy if keep is between else left - heavy - middle
        some, its = some[keep], its[keep]
    order = np.argsort(-some, kind="stable")
    theta = some[order[min(int(np.searchsorted(np.cumsum(its[order]), left, side="right")), len(order) - 1)]]
    full = slope > theta
    left = capacity - weight[full].sum()
    ties = np.flatnonzero(slope == theta)
    sums = np.cumsum(weight[ties])
    fit = min(int(np.searchsorted(sums, left, side="right")), len(ties) - 1)
    full[ties[:fit]] = True
    return full, int(ties[fit]), left - (sums[fit - 1] if fit else 0)


def _below(curves: _Curves, line: int, where: Ints) -> Floats:
    """How far one line's curve lies below its envelope at some spends."""
    x, v, slope = curves.spends[line], curves.values[line], curves.slopes[line]
    envelope = v[0] + (slope * np.clip(where[:, None] - x[:-1], 0, np.diff(x))).sum(axis=1)
    return np.asarray(envelope - np.interp(where, x, v))


def _finish(curves: _Curves, solved: _Solved, money: int, required: float) -> _Solved:
    """Under a target return: the best spend of the one line that is off its envelope, all others held."""
    assert solved.spend is not None
    x, v, line = curves.spends[solved.line], curves.values[solved.line], solved.line
    others = int(solved.spend.sum()) - solved.at
    worth = solved.value - float(np.interp(solved.at, x, v))
    points = np.unique(np.append(x[x <= money - others], min(money - others, int(x[-1]))))
    points = points[points >= x[0]]
    slack = worth + np.interp(points, x, v) - required * (others + points)
    turn = np.flatnonzero(np.diff(np.sign(slack)) != 0)
    zero = points[turn] + np.diff(points)[turn] * slack[turn] / (slack[turn] - slack[turn + 1])
    points = np.unique(np.concatenate([points, np.floor(zero).astype(np.int64), np.ceil(zero).astype(np.int64)]))
    gain = np.interp(points, x, v)
    fits = worth + gain - required * (others + points) >= -ROUNDING * max(1.0, required * money)
    if not fits.any():
        return replace(solved, spend=None, value=-np.inf)
    best = int(points[fits][np.argmax(gain[fits])])
    spend = solved.spend.copy()
    spend[line] = best
    return replace(solved, spend=spend, value=worth + float(np.interp(best, x, v)))


def _branch(
    curves: _Curves, root: _Solved, money: int, target_return: float | None
) -> tuple[Ints | None, float, float, bool]:
    """Best-first branch and bound on the curves: plan, value, bound, and whether the search was stopped."""
    best, count = root, 0
    open_nodes: list[tuple[float, int, _Curves, _Solved]] = [(-root.bound, 0, curves, root)]
    while open_nodes and -open_nodes[0][0] > best.value + ROUNDING * max(1.0, abs(root.bound)):
        if count >= EXACT_NODES:
            return best.spend, best.value, -open_nodes[0][0], True
        _, _, here, node = heapq.heappop(open_nodes)
        x = here.spends[node.line]
        inner = np.unique(x[(x > x[0]) & (x < x[-1])])
        below = _below(here, node.line, inner)
        loose = inner[below > 0.5 * ROUNDING * max(1.0, float(np.abs(here.values[node.line]).max()))]
        split = int(loose[np.argmin(np.abs(loose - node.at))])
        for low, high in ((int(x[0]), split), (split, int(x[-1]))):
            count += 1
            child = here.narrowed(node.line, low, high)
            solved = _solve(child, money, target_return)
            if solved is None:
                continue
            if solved.value > best.value:
                best = solved
            if not solved.tight:
                heapq.heappush(open_nodes, (-solved.bound, count, child, solved))
    return best.spend, best.value, max(best.value, -open_nodes[0][0] if open_nodes else -np.inf), False


def _money(micros: float) -> str:
    return f"{micros / MICROS:,.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# One day's decisions


def decide(
    features: pa.Table,
    scores: pa.Table,
    arms: pa.Table,
    spec: Mapping[str, Any] | BudgetPolicy,
    *,
    explore: Explore | None = None,
    key: str = "",
) -> tuple[pa.Table, dict[str, dict[str, Any]]]:
    """Budgets for every line, each arm within its own pool: the sum of what its lines have today.

    holdout keeps; champion and challenger are allocated; explore moves pairs of lines around their status quo by the
    toss of
    a coin (`models.policies.arms.perturb`), today's multiplier taken out first. So that a line may swing from the lower to
    the upper
    side within the largest daily change c, the step is held to c / (2 + c). A line without a usable curve, or whose
    bounds conflict, keeps its status quo, and so does an arm that has no feasible plan; the reasons say so. Lines move by
    whole steps of `unit_micros`, so each arm's money is kept to the micro whatever a few lines hold beyond whole steps.

    Args:
        features: `entity_id` (each once), the columns that the spec names (micros), and `unit` where `arms` is keyed
        by it. scores: `entity_id`, `spends` (list of micros), `values` (list of currency units); lines may be missing.
            `value_low`, `value_high`, `confidence` where there are such: told in the reasons, judged by `largest_doubt`.
        arms: `arm`, `arm_probability` by `unit` or by `entity_id` (with `unit`).
        spec: The fields of `BudgetPolicy`; an unknown key is refused.
        explore: The step; None: lines of the arm explore keep their status quo.
        key: Names the draw of the perturbations, for example workflow and day.

    Returns:
        The decisions, in the order of `features` (`perturbation` is the multiplier: after / status quo), and for
        each arm its
        certificate: lines, movable, changed, pool, spent, unspent (micros), value, value_before, bound, gap,
        shadow_price, return_price (of the movable lines; None where nothing was optimised), feasible, reason, method.

    Raises:
        ValueError: a missing column, a repeated or null entity, a budget that is null or negative, an entity without
            an arm.
    """
    policy = spec if isinstance(spec, BudgetPolicy) else BudgetPolicy.model_validate(dict(spec))
    order = pc.sort_indices(_column(features, "entity_id", "features").cast(pa.string()))
    features = features.take(order)  # so that ties fall the same way whatever the order of the rows
    ids = _column(features, "entity_id", "features").cast(pa.string())
    if ids.null_count or pc.count_distinct(ids).as_py() != len(ids):
        raise ValueError("features: entity_id is null or stands more than once; give one row a line")
    before = _micros(features, policy.spend, ids)
    unit, arm, probability = _arms(features, arms, ids)
    spends, values, trouble = _curves(ids, scores, before)
    floor = np.maximum(
        _micros(features, policy.floor, ids, 0), np.ceil(before * policy.floor_share - 1e-6).astype(np.int64)
    )
    cap = _micros(features, policy.cap, ids, _NO_CAP)
    if policy.cap_share is not None:
        cap = np.minimum(cap, np.floor(before * policy.cap_share + 1e-6).astype(np.int64))
    low, high = _bounds(spends, floor, cap, before, policy.largest_daily_change)
    trouble = np.where((trouble == 0) & (low > high), _CONFLICT, trouble)

    least_worth, most_worth, sure = _intervals(ids, scores)
    worth = _at(spends, values, before)
    if policy.largest_doubt is not None:
        # a nan compares false: what has no interval is not held to it
        trouble = np.where((trouble == 0) & (most_worth - least_worth > policy.largest_doubt * worth), _DOUBT, trouble)

    grain = policy.unit_micros
    beyond = before % grain  # a line keeps what it holds beyond whole steps: it moves by whole ones
    # rows that were made before the column was asked for tell of no age: their budgets were the day's own
    age = _micros(features, policy.spend_age if policy.spend_age in features.column_names else None, ids, 0)
    after, say = before.copy(), _Reasons(len(before))
    perturbation, perturbed = np.full(len(before), np.nan), np.full(len(before), np.nan)
    certificates: dict[str, dict[str, Any]] = {}
    now, was = before / MICROS, worth
    for name in np.unique(arm):
        mine = arm == name
        plan: Plan | None = None
        odd = mine & (beyond > 0)
        if 2 * odd.sum() > mine.sum():  # such budgets are what this source knows, such as realised costs
            odd[:] = False
        movable = mine & (trouble == 0) & ~odd
        if name == "holdout":
            say.add(mine, "Holdout: kept at ", now, ", so that the effect of the other arms can be measured.")
        elif name == "explore":
            movable = mine & ~odd & (age == 0)
            if explore is None:
                say.add(mine, "Exploring is switched off: kept at ", now, ".")
            else:
                at, rest = np.flatnonzero(movable), beyond[movable]
                low_, high_ = (x - rest for x in _limits(floor[at], cap[at], before[at], policy.largest_daily_change))
                here = before[at] // grain
                least, most = np.minimum(-(-low_ // grain), here), np.maximum(high_ // grain, here)
                step, base = _status_quo(features, policy, explore.step, ids, here, least, most, at)
                drawn = perturb(ids.take(pa.array(at)).to_pylist(), base, least, most, step=step, key=key)
                perturbation[mine], perturbed[mine] = 1.0, 1.0
                after[at], perturbed[at] = drawn.after * grain + rest, drawn.probability
                base = base * grain + rest
                perturbation[at] = np.divide(after[at], base, out=np.ones(len(at)), where=base > 0)
                _explain_exploring(say, movable, after, perturbation, explore.step, step, policy.largest_daily_change)
                say.add(mine & ~odd & (age > 0), "Exploring leaves it at ", now, ": its budget is an older day's, so nothing "
                        "says what of it was drawn.")  # fmt: skip
                say.add(odd, "Kept at ", now, _ODD.format(_money(grain)))
        else:
            at = np.flatnonzero(movable)
            plan = allocate(
                spends[at], values[at], total=int(before[at].sum()), floor=floor[at], cap=cap[at], before=before[at],
                largest_change=policy.largest_daily_change, target_return=policy.target_return,
            )  # fmt: skip
            if plan.feasible and grain > 1:
                rest = beyond[at]
                whole = _in_whole_units(plan.spend - rest, low[at] - rest, high[at] - rest, grain) + rest
                value = float(_at(spends[at], values[at], whole).sum())
                left = plan.unspent + int(plan.spend.sum() - whole.sum())
                plan = replace(plan, spend=whole, value=value, gap=max(0.0, plan.bound - value), unspent=left)
            if plan.feasible:
                after[at] = plan.spend
            gain = _at(spends, values, after) - was
            _explain(say, name, movable, plan, before, after, gain, (low, high), (floor, cap), policy)
            for code, why in _TROUBLE.items():
                say.add(mine & (trouble == code), "Kept at ", now, ": ", why, ".")
            say.add(odd & (trouble == 0), "Kept at ", now, _ODD.format(_money(grain)))
            say.add(mine & (trouble == _DOUBT), "Kept at ", now, ": what it earns is too uncertain, the interval is wider "
                    f"than {policy.largest_doubt or 0:.0%} of what is expected.")  # fmt: skip
            for level in np.unique(sure[mine & ~np.isnan(sure)]):
                say.add(mine & (sure == level), "At today's budget its day is worth between ", least_worth, " and ",
                        most_worth, f" ({level:.0%}).")  # fmt: skip
        certificates[str(name)] = _certificate(mine, movable, before, after, was, plan)

    known = np.isin(trouble, (0, _CONFLICT, _DOUBT))
    inside = (after >= spends[:, 0]) & (after <= spends[:, -1])
    gain = np.where(known & inside, _at(spends, values, after) - was, np.nan)
    decisions = pa.table(
        {
            "entity_id": ids,
            "unit": unit,
            "arm": pa.array(arm, pa.string()),
            "arm_probability": probability,
            "perturbation": pa.array(perturbation, from_pandas=True),
            "perturbation_probability": pa.array(perturbed, from_pandas=True),
            "before": before,
            "after": after,
            "changed": after != before,
            "review": np.zeros(len(before), dtype=bool),
            "expected_gain": pa.array(gain, from_pandas=True),
            "reasons": say.column(),
        }
    )
    return decisions.take(pa.array(np.argsort(np.asarray(order)))), certificates


_NO_CAP = 2**62
_CONFLICT, _DOUBT = 4, 5
_ODD = ": it is not in whole steps of {}, and the system downstream takes no others."
_TROUBLE = {
    1: "the model gave no response curve for this line",
    2: "its response curve is not usable (lengths differ, a value is not finite, or spends descend)",
    3: "its response curve does not reach today's budget",
    _CONFLICT: "its floor, its cap and its largest daily change cannot be met at once",
}


def _column(table: pa.Table, name: str, where: str) -> pa.Array:
    if name not in table.column_names:
        raise ValueError(f"{where}: column {name!r} is missing (there are: {', '.join(table.column_names)})")
    return table[name].combine_chunks()


def _micros(features: pa.Table, name: str | None, ids: pa.Array, default: int | None = None) -> Ints:
    """A column of money; a null is the default, or refused where there is none."""
    if name is None:
        return np.full(len(ids), default, dtype=np.int64)
    column = _column(features, name, "features").cast(pa.int64())
    if default is None and column.null_count:
        raise ValueError(
            f"features: {name} of {ids.filter(pc.is_null(column))[0].as_py()!r} is null; a line needs a status quo"
        )
    money = np.asarray(column.fill_null(default or 0), dtype=np.int64)
    if (money < 0).any():
        raise ValueError(
            f"features: {name} of {ids[int(np.argmin(money))].as_py()!r} is {_money(money.min())}; money is zero "
            f"or more"
        )
    return money


def _arms(features: pa.Table, arms: pa.Table, ids: pa.Array) -> tuple[pa.Array, np.ndarray[Any, Any], pa.Array]:
    """unit, arm and arm_probability of each line."""
    by = "entity_id" if "entity_id" in arms.column_names else "unit"
    keys = ids if by == "entity_id" else _column(features, "unit", "features").cast(pa.string())
    at = pc.index_in(keys, value_set=_column(arms, by, "arms").cast(pa.string()))
    if at.null_count:
        raise ValueError(f"arms: {by} {keys.filter(pc.is_null(at))[0].as_py()!r} has no arm; draw one for every {by}")
    unit, arm, probability = (_column(arms, c, "arms").take(at) for c in ("unit", "arm", "arm_probability"))
    return (
        unit.cast(pa.string()),
        arm.cast(pa.string()).to_numpy(zero_copy_only=False).astype(str),
        probability.cast(pa.float64()),
    )


def _curves(ids: pa.Array, scores: pa.Table, before: Ints) -> tuple[Ints, Floats, Ints]:
    """Curves (n, k) in the order of the lines, shorter ones padded with their last point, and what is wrong
    with each."""
    n = len(ids)
    nothing = before[:, None], np.zeros((n, 1)), np.full(n, 1)
    if scores.num_rows == 0 or n == 0:
        return nothing
    at = pc.index_in(ids, value_set=_column(scores, "entity_id", "scores").cast(pa.string()))
    x = _column(scores, "spends", "scores").cast(pa.list_(pa.int64())).take(at)
    v = _column(scores, "values", "scores").cast(pa.list_(pa.float64())).take(at)
    count, other = (np.asarray(pc.list_value_length(c).fill_null(0), dtype=np.int64) for c in (x, v))
    k = int(count.max(initial=0))
    if k == 0:
        return nothing
    trouble = np.where(count == 0, 1, np.where(count != other, 2, 0))
    whole = trouble == 0
    column = np.minimum(np.arange(k), np.maximum(count, 1)[:, None] - 1)
    start = np.where(whole, np.cumsum(np.where(whole, count, 0)) - count, 0)
    flat_x, flat_v = (c.filter(pa.array(whole)).flatten() for c in (x, v))
    broken = np.zeros(n, dtype=bool)
    if flat_x.null_count or flat_v.null_count:
        null = np.asarray(pc.or_(pc.is_null(flat_x), pc.is_null(flat_v)))
        broken = (null[(start[:, None] + column).clip(0, max(len(null) - 1, 0))]).any(axis=1) & whole
    flat_x, flat_v = np.asarray(flat_x.fill_null(0)), np.asarray(flat_v.fill_null(0.0))
    spends, values = np.repeat(before[:, None], k, axis=1), np.zeros((n, k))
    cells = (start[:, None] + column)[whole]
    spends[whole], values[whole] = flat_x[cells], flat_v[cells]
    step = np.diff(spends, axis=1)
    broken |= ~np.isfinite(values).all(axis=1) | (step < 0).any(axis=1) | (spends[:, 0] < 0)
    broken |= ((step == 0) & (np.diff(np.nan_to_num(values), axis=1) != 0)).any(axis=1)
    trouble[whole & broken] = 2
    trouble[(trouble == 0) & ((before < spends[:, 0]) | (before > spends[:, -1]))] = 3
    bad = np.isin(trouble, (1, 2))
    spends[bad], values[bad] = before[bad, None], 0.0
    return spends, values, trouble


def _intervals(ids: pa.Array, scores: pa.Table) -> tuple[Floats, Floats, Floats]:
    """value_low, value_high and confidence of each line, NaN where there is none."""
    names = ("value_low", "value_high", "confidence")
    if scores.num_rows == 0 or not set(names) <= set(scores.column_names):
        nothing = np.full(len(ids), np.nan)
        return nothing, nothing, nothing
    at = pc.index_in(ids, value_set=_column(scores, "entity_id", "scores").cast(pa.string()))
    low, high, sure = (
        np.asarray(pc.fill_null(_column(scores, name, "scores").cast(pa.float64()).take(at), np.nan)) for name in names
    )
    return low, high, np.where(np.isfinite(low + high), sure, np.nan)


def _in_whole_units(spend: Ints, low: Ints, high: Ints, unit: int) -> Ints:
    """A plan in whole units of money within the bounds: rounded down, what that leaves handed out by the largest rest."""
    least, most = -(-low // unit), high // unit
    least, most = np.minimum(least, most), np.maximum(least, most)
    whole = np.clip(spend // unit, least, most)
    left = int(spend.sum()) // unit - int(whole.sum())
    rest = spend - whole * unit
    order = np.argsort(-rest if left > 0 else rest, kind="stable")
    room = (most - whole if left > 0 else whole - least)[order]
    for share in (np.minimum(room, 1), room):  # one unit each first, then as far as the bounds go
        given = np.clip(abs(left) - (np.cumsum(share) - share), 0, share)
        whole[order] += np.sign(left) * given
        room = room - given
        left -= int(np.sign(left) * given.sum())
    return np.asarray(whole * unit)


def _status_quo(
    features: pa.Table, policy: BudgetPolicy, step: float, ids: pa.Array, mine: Ints, least: Ints, most: Ints, at: Ints
) -> tuple[float, Ints]:
    """The step that may be used, and the arm's budgets with today's multiplier taken out; they sum to what `mine`
    sums to. `mine` and its bounds are in one unit of money, whichever it is.

    What taking it out leaves over (rounding; a partner that is gone) is spread over the lines by their room.
    """
    change = policy.largest_daily_change
    if policy.multiplier is None:
        return (step if change is None else min(step, change)), mine
    if change is not None:
        step = min(step, change / (2 + change))
    drawn = np.asarray(_column(features, policy.multiplier, "features").cast(pa.float64()).fill_null(1.0))[at]
    if not (np.isfinite(drawn) & (drawn > 0)).all():
        first = int(at[int(np.argmin(np.isfinite(drawn) & (drawn > 0)))])
        raise ValueError(f"features: {policy.multiplier} of {ids[first].as_py()!r} must be a finite number above zero")
    base = np.clip(np.rint(mine / drawn).astype(np.int64), least, most)
    left = int(mine.sum() - base.sum())
    sign = 1 if left > 0 else -1
    for exact in (False, True):
        room = np.minimum(most - base if sign > 0 else base - least, abs(left))
        if exact:  # the last few go to the first lines with room
            give = np.clip(abs(left) - (np.cumsum(room) - room), 0, room)
        else:
            give = np.floor(room * (abs(left) / max(int(room.sum()), 1) * (1 - 1e-12))).astype(np.int64)
        base += sign * give
        left -= sign * int(give.sum())
    return step, base


class _Reasons:
    """Sentences for rows, collected by column and put together at the end."""

    def __init__(self, rows: int) -> None:
        self.count, self.rows, self.texts = rows, [np.empty(0, dtype=np.int64)], [pa.array([], pa.string())]

    def add(self, mask: Bools, *parts: str | Floats) -> None:
        """One sentence for each row of the mask; arrays (n,) are written with two decimals."""
        at = np.flatnonzero(mask)
        if len(at):
            words = [p if isinstance(p, str) else _decimals(p[at]) for p in parts]
            self.rows.append(at)
            self.texts.append(
                pc.binary_join_element_wise(*words, "") if len(words) > 1 else pa.repeat(words[0], len(at))
            )

    def column(self) -> pa.Array:
        rows, texts = np.concatenate(self.rows), pa.concat_arrays(self.texts)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self.count))])
        return pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), texts.take(pa.array(np.argsort(rows, kind="stable")))
        )


def _decimals(numbers: Floats) -> pa.Array:
    return pc.round(pa.array(numbers, pa.float64()), 2).cast(pa.decimal128(38, 2)).cast(pa.string())


def _explain(
    say: _Reasons,
    arm: str,
    rows: Bools,
    plan: Plan,
    before: Ints,
    after: Ints,
    gain: Floats,
    bounds: tuple[Ints, Ints],
    limits: tuple[Ints, Ints],
    policy: BudgetPolicy,
) -> None:
    now, then, moved = before / MICROS, after / MICROS, np.abs(after - before) / MICROS
    if not plan.feasible:
        say.add(rows, "Kept at ", now, f": the {arm} arm has no feasible plan; {plan.reason}.")
        return
    percent = 100 * np.divide(moved, now, out=np.zeros(len(now)), where=now > 0)
    each = np.divide(gain, moved, out=np.zeros(len(now)), where=moved > 0)
    pool = f"the next unit of money in the {arm} pool earns {plan.shadow_price:.2f}"
    up, down = rows & (after > before), rows & (after < before)
    say.add(up, "Budget raised from ", now, " to ", then, " (+", percent, "%): the extra ", moved, " is expected "
        "to earn ", gain, ", or ", each,
            f" for each unit of money; {pool}.")  # fmt: skip
    say.add(down, "Budget lowered from ", now, " to ", then, " (-", percent, "%): the ", moved, " taken away was "
        "expected to earn ", -gain, ", or ", -each,
            f" for each unit of money; {pool}.")  # fmt: skip
    say.add(
        rows & (after == before),
        "Budget stays at ",
        now,
        f": no move within its bounds is expected to earn more than elsewhere; {pool}.",
    )
    change = policy.largest_daily_change
    step = np.full(len(before), _NO_CAP) if change is None else np.floor(before * change + 1e-6).astype(np.int64)
    for stopped, at_limit, rule in (
        (up & (after == bounds[1]), after == limits[1], "its cap"),
        (down & (after == bounds[0]), after == limits[0], "its floor"),
    ):
        daily = np.abs(after - before) == step
        say.add(stopped & daily, f"It goes no further: a line moves by at most {change or 0:.0%} a day.")
        say.add(stopped & ~daily & at_limit, f"It goes no further: this is {rule}.")
        say.add(stopped & ~daily & ~at_limit, "It goes no further: its response curve ends here.")
    if plan.reason:
        say.add(rows, f"In the {arm} pool {plan.reason}.")


def _explain_exploring(
    say: _Reasons, rows: Bools, after: Ints, multiplier: Floats, wished: float, step: float, change: float | None
) -> None:
    base, percent = after / MICROS / np.where(multiplier > 0, multiplier, 1), 100 * np.abs(multiplier - 1)
    for moved, sign in ((multiplier > 1, "+"), (multiplier < 1, "-")):
        say.add(
            rows & moved,
            f"Exploring: {sign}",
            percent,
            "% around its status quo of ",
            base,
            ", drawn by a fair coin (probability 0.5 for either sign).",
        )
    say.add(
        rows & (multiplier == 1),
        "Exploring: stays at its status quo of ",
        base,
        ", since it has no partner or no room to move both ways.",
    )
    if step < wished:
        say.add(
            rows,
            f"The step of {wished:.0%} is held to {step:.1%}, so that no line moves by more than {change or 0:.0%} "
            f"a day.",
        )


def _certificate(
    mine: Bools, movable: Bools, before: Ints, after: Ints, was: Floats, plan: Plan | None
) -> dict[str, Any]:
    pool, spent = int(before[mine].sum()), int(after[mine].sum())
    known: dict[str, Any] = {
        "lines": int(mine.sum()),
        "movable": int(movable.sum()) if plan is not None else 0,
        "changed": int((mine & (after != before)).sum()),
        "pool": pool,
        "spent": spent,
        "unspent": pool - spent,
    }
    names = ("value", "bound", "gap", "shadow_price", "return_price")
    figures = {f: getattr(plan, f) for f in names} if plan is not None else dict.fromkeys(names)
    return {
        **known,
        "value_before": float(was[movable].sum()) if plan is not None else None,
        **{f: float(x) if x is not None and np.isfinite(x) else None for f, x in figures.items()},
        "feasible": plan.feasible if plan is not None else True,
        "reason": plan.reason if plan is not None else "",
        "method": plan.method if plan is not None else "none",
    }
