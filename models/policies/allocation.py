"""How much money goes where: the plan of the highest value within floors, caps and changes, with its certificate.

Belongs here: the optimiser and its dual bound, pure functions of curves. Does not: which lines, arms and reasons
(``models.policies.budget``).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
MICROS = 1_000_000
EXACT_POINTS = 4096  # lines x points up to which the curves themselves are searched where the envelope is not tight
EXACT_NODES = 2000  # sub-problems that this search may look at
CHUNK = 4096  # lines treated at a time, so that a chunk stays in the processor's cache
ROUNDING = 1e-12  # relative difference that is taken for floating-point rounding


def money_text(micros: float) -> str:
    """Micros as a person reads money: units with two decimals."""
    return f"{micros / MICROS:,.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# One day's decisions


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
    low, high = line_bounds(spends, floor, cap, before, largest_change)

    def refused(reason: str, bound: float = np.nan) -> Plan:
        here = float(value_at(spends, values, before).sum())
        return Plan(before, here, bound, np.nan, np.nan, np.nan, int(total - before.sum()), False, reason, "none")

    clash = np.flatnonzero(low > high)
    if len(clash):
        i = int(clash[0])
        at_least, at_most = (int(a[i]) for a in line_limits(floor, cap, before, largest_change))
        return refused(
            f"{len(clash)} lines cannot meet their bounds at once; line {i} must get at least {money_text(at_least)} "
            f"and at most {money_text(at_most)}, and its curve spans {money_text(spends[i, 0])} to {money_text(spends[i, -1])}"
        )
    least, most = int(low.sum()), int(high.sum())
    if least > total:
        return refused(f"the lines' lower bounds sum to {money_text(least)}, the total is {money_text(total)}")
    money = min(int(total), most)
    curves = _Curves.cut(spends, values, low, high)
    best = _solve(curves, money, target_return)
    if best is None:
        return refused(
            f"no allocation within the bounds and {money_text(total)} returns {target_return:g} for each unit of money"
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
        reason = f"{money_text(left)} cannot be spent: the lines' upper bounds sum to {money_text(most)}"
    elif left:
        reason = (
            f"{money_text(left)} is left: spending it would break the return of {target_return:g} for each unit of money, "
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


def line_limits(floor: Ints, cap: Ints, before: Ints, change: float | None) -> tuple[Ints, Ints]:
    """Least and most that the rules allow each line."""
    if change is None:
        return floor, cap
    step = np.floor(before * change + 1e-6).astype(np.int64)  # 0.1 x 30 must be 3 whole micros
    return np.maximum(floor, before - step), np.minimum(cap, before + step)


def line_bounds(spends: Ints, floor: Ints, cap: Ints, before: Ints, change: float | None) -> tuple[Ints, Ints]:
    least, most = line_limits(floor, cap, before, change)
    return np.maximum(least, spends[:, 0]), np.minimum(most, spends[:, -1])


def value_at(spends: Ints, values: Floats, where: Ints) -> Floats:
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
        below, value_at(spends, values, low)[:, None], np.where(above, value_at(spends, values, high)[:, None], values)
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
    worth = value_at(curves.spends, curves.values, spend)
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
