"""The budget policy: spend where the next unit of money earns most, within bounds, and certify the plan.

Belongs here: the decisions of one day with their reasons, and what the rest of the product asks of the kind.
Does not: the optimiser (``models.policies.allocation``), where the curves come from (the learners, ``models.elasticity``), drawing
arms (``models.policies.arms``), sending.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from models.policies import budget_value
from models.policies.allocation import MICROS, Plan, allocate, line_bounds, line_limits, money_text, value_at
from models.policies.arms import Explore, perturb
from models.policies.base import MATERIAL, Decided, Limit, PolicySettings, Value, numbers, setting

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


class BudgetPolicy(PolicySettings):
    """The section `policy` of a workflow.yaml with kind `budget_allocation`. Money columns hold micros."""

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
    low, high = line_bounds(spends, floor, cap, before, policy.largest_daily_change)
    trouble = np.where((trouble == 0) & (low > high), _CONFLICT, trouble)

    least_worth, most_worth, sure = _intervals(ids, scores)
    worth = value_at(spends, values, before)
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
                low_, high_ = (
                    x - rest for x in line_limits(floor[at], cap[at], before[at], policy.largest_daily_change)
                )
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
                say.add(odd, "Kept at ", now, _ODD.format(money_text(grain)))
        else:
            at = np.flatnonzero(movable)
            plan = allocate(
                spends[at], values[at], total=int(before[at].sum()), floor=floor[at], cap=cap[at], before=before[at],
                largest_change=policy.largest_daily_change, target_return=policy.target_return,
            )  # fmt: skip
            if plan.feasible and grain > 1:
                rest = beyond[at]
                whole = _in_whole_units(plan.spend - rest, low[at] - rest, high[at] - rest, grain) + rest
                value = float(value_at(spends[at], values[at], whole).sum())
                left = plan.unspent + int(plan.spend.sum() - whole.sum())
                plan = replace(plan, spend=whole, value=value, gap=max(0.0, plan.bound - value), unspent=left)
            if plan.feasible:
                after[at] = plan.spend
            gain = value_at(spends, values, after) - was
            _explain(say, name, movable, plan, before, after, gain, (low, high), (floor, cap), policy)
            for code, why in _TROUBLE.items():
                say.add(mine & (trouble == code), "Kept at ", now, ": ", why, ".")
            say.add(odd & (trouble == 0), "Kept at ", now, _ODD.format(money_text(grain)))
            say.add(mine & (trouble == _DOUBT), "Kept at ", now, ": what it earns is too uncertain, the interval is wider "
                    f"than {policy.largest_doubt or 0:.0%} of what is expected.")  # fmt: skip
            for level in np.unique(sure[mine & ~np.isnan(sure)]):
                say.add(mine & (sure == level), "At today's budget its day is worth between ", least_worth, " and ",
                        most_worth, f" ({level:.0%}).")  # fmt: skip
        certificates[str(name)] = _certificate(mine, movable, before, after, was, plan)

    known = np.isin(trouble, (0, _CONFLICT, _DOUBT))
    inside = (after >= spends[:, 0]) & (after <= spends[:, -1])
    gain = np.where(known & inside, value_at(spends, values, after) - was, np.nan)
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
            f"features: {name} of {ids[int(np.argmin(money))].as_py()!r} is {money_text(money.min())}; money is zero "
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


class BudgetAllocation:
    """The kind ``budget_allocation``."""

    settings = BudgetPolicy
    money = True
    explored = "explore_probability"
    whole_columns: ClassVar[Mapping[str, str]] = {
        "spend": "micros of money",
        "spend_age": "days",
        "floor": "micros of money",
        "cap": "micros of money",
    }
    columns = ("multiplier",)
    absent: ClassVar[Mapping[str, str]] = {}

    def decide(
        self,
        spec: BudgetPolicy,
        features: pa.Table,
        scores: pa.Table,
        drawn: pa.Table,
        *,
        explore: Explore | None = None,
        key: str = "",
    ) -> tuple[pa.Table, dict[str, Any]]:
        """See ``decide``."""
        return decide(features, scores, drawn, spec, explore=explore, key=key)

    def status_quo(self, spec: BudgetPolicy) -> str:
        """What a line has today."""
        return spec.spend

    def starts_from(self, spec: BudgetPolicy, rows: pa.Table) -> pa.Table:
        """The rows with the day's exploring multiplier taken out of the budget."""
        if spec.multiplier is None:
            return rows
        drawn = numbers(rows, spec.multiplier, 1.0)
        spend = numbers(rows, spec.spend)
        # what stands in whole steps was drawn in whole steps: a line beyond them would keep its budget
        step = np.where(spend % spec.unit_micros == 0, spec.unit_micros, 1)
        spend = np.rint(spend / np.where(drawn > 0, drawn, 1.0) / step) * step
        for name, values in (
            (spec.spend, pa.array(spend.astype(np.int64))),
            (spec.multiplier, pa.array(drawn * 0 + 1)),
        ):
            rows = rows.set_column(rows.column_names.index(name), name, values)
        return rows

    def competes_with(self, spec: BudgetPolicy, chosen: pa.Table, row: pa.Table, arm: pa.Array) -> pa.Array:
        """An arm's lines share its pool."""
        return pc.is_in(chosen["unit"], value_set=arm)

    def stands_in(self, spec: BudgetPolicy) -> set[str | None]:
        """The budget and the multiplier in it."""
        return {spec.spend, spec.multiplier}

    def least_change(self, before: int) -> float:
        """One in a hundred of what stood before, at least a micro."""
        return max(1.0, MATERIAL * abs(before))

    def limits(self, spec: BudgetPolicy, row: pa.Table, arm: str) -> Iterator[Limit]:
        """Of the change, floor, cap and return; what explores is not held to a return."""
        if (now := spec.largest_daily_change) is not None:
            yield Limit("largest_daily_change", now, now * 0.01, math.inf, setting("largest_daily_change"))
        if spec.floor_share:
            yield Limit("floor_share", spec.floor_share, 0.0, 1.0, setting("floor_share"))
        if spec.cap_share is not None:
            yield Limit("cap_share", spec.cap_share, 1.0, math.inf, setting("cap_share"))
        if (now := spec.target_return) is not None and arm != "explore":
            yield Limit("target_return", now, now * 0.01, math.inf, setting("target_return"))

    def against_guardrails(self, spec: BudgetPolicy, levels: tuple[int, int] | None, unit: int | None) -> list[str]:
        """Money comes in steps that the guardrails take."""
        if unit is None or not spec.unit_micros % unit:
            return []
        return [
            f"guardrails.unit: policy.unit_micros {spec.unit_micros} is no multiple of {unit}, so that every batch would be held; write "
            f"the same in both"
        ]

    def against_delivery(self, spec: BudgetPolicy, push_unit: int, connector_unit: int | None) -> list[str]:
        """Money comes in steps that the system takes."""
        wrong = []
        if connector_unit is not None and spec.unit_micros % connector_unit:
            wrong.append(
                f"policy.unit_micros: {spec.unit_micros} is no multiple of {connector_unit}, the smallest amount that the connector takes "
                f"(delivery.connector.unit_micros); write {connector_unit}"
            )
        if push_unit % spec.unit_micros:
            wrong.append(
                f"delivery.push.unit: {push_unit} is no multiple of policy.unit_micros {spec.unit_micros}, so that a replanned "
                f"value would be one that is never decided; write {spec.unit_micros}"
            )
        return wrong

    def value(
        self, spec: BudgetPolicy, rows: pa.Table, mine: Decided, theirs: Decided, how: dict[str, Any]
    ) -> Value | str:
        """See ``models.policies.budget_value``."""
        return budget_value.value(rows, mine, theirs, how)


KIND = BudgetAllocation()
