"""The policy's value off-policy: what the coin says of a plan, and what an order would have saved."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models.elasticity import response
from models.evaluation.off_policy import at_status_quo, decisions, value
from models.policies.base import Value
from models.policies.budget import BudgetPolicy
from models.policies.priority import PriorityPolicy

START = date(2026, 3, 2)
HOW: dict[str, Any] = {"draws": 2000, "seed": 3, "confidence": 0.95}
BUDGETS = BudgetPolicy(spend="budget_micros", largest_daily_change=0.5)
GRID = np.array([0.5, 0.75, 1.0, 1.25, 1.5])


class Curves:
    """Scores with given levels and slopes: what a response model says, right or wrong."""

    def __init__(self, slope: Any, level: Any = None) -> None:
        self.slope, self.level = slope, level

    def score(self, rows: pa.Table) -> pa.Table:
        line, spend = rows["line"].to_numpy(), rows["budget_micros"].to_numpy()
        slope = np.asarray(self.slope)[line]
        level = rows["usual"].to_numpy() if self.level is None else np.full(len(line), float(self.level))
        spends = np.rint(spend[:, None] * GRID).astype(np.int64)
        values = response(level, spend, spends, slope)
        return pa.table({
            "entity_id": rows["entity_id"], "level": level, "spends": spends.tolist(), "values": values.tolist(),
        })  # fmt: skip


def world(seed: int = 1, lines: int = 40, n: int = 12, noise: float = 0.2, drawn: bool = True) -> tuple[pa.Table, Any]:
    """Lines with slopes between 0.1 and 0.9; every line-day is moved by ±20% by a fair coin. Also gives the slopes."""
    rng = np.random.default_rng(seed)
    slope, usual, spend = rng.uniform(0.1, 0.9, lines), rng.uniform(50, 150, lines), rng.uniform(80, 120, lines)
    line, day = np.tile(np.arange(lines), n), np.repeat(np.arange(n), lines)
    coin = rng.choice([0.8, 1.2], len(line)) if drawn else np.ones(len(line))
    shock = np.exp(0.15 * rng.standard_normal(n))[day]
    earned = usual[line] * coin ** slope[line] * shock * rng.gamma(1 / noise**2, noise**2, len(line))
    return pa.table({
        "entity_id": [f"l{i:03d}" for i in line], "line": line, "unit": ["c"] * len(line),
        "day": pa.array([START + timedelta(days=int(d)) for d in day], pa.date32()),
        "usual": usual[line], "budget_micros": np.rint(spend[line] * 1e6).astype(np.int64),
        "explore_multiplier_today": np.ones(len(line)), "explore_multiplier": coin,
        "explore_probability": pa.array(np.full(len(line), 0.5), mask=np.full(len(line), not drawn)),
        "budget": spend[line] * coin, "value": earned, "kind": ["x"] * len(line),
    }), slope  # fmt: skip


def compare(rows: pa.Table, mine: Any, theirs: Any, policy: Any = BUDGETS) -> Value | str:
    rows = at_status_quo(rows, policy)
    return value(rows, decisions(rows, mine, policy), decisions(rows, theirs, policy), policy, **HOW)


def test_a_model_with_its_slopes_turned_round_is_worth_clearly_less() -> None:
    rows, slope = world()
    found = compare(rows, Curves(1 - slope), Curves(slope))
    assert isinstance(found, Value) and found.harm.proven and found.harm.point > 0.02 and found.theirs > found.mine
    back = compare(rows, Curves(slope), Curves(1 - slope))
    assert isinstance(back, Value) and not back.harm.proven and back.harm.point < 0


def test_a_plan_that_loses_does_so_whoever_it_is_compared_with() -> None:
    rows, slope = world(n=28)
    turned = compare(rows, Curves(1 - slope), Curves(1 - slope))
    assert isinstance(turned, Value) and turned.loss is not None
    assert turned.harm.point == 0.0 and turned.loss.proven and turned.loss.point == pytest.approx(-turned.mine)
    right = compare(rows, Curves(slope), Curves(1 - slope))
    assert isinstance(right, Value) and right.loss is not None and not right.loss.proven


def test_the_estimate_is_what_the_step_would_truly_have_brought() -> None:
    """Against the truth, over many draws of the coin: no bias, whatever the level that is taken off first."""
    bare, known, truth = [], [], []
    for seed in range(16):
        rows, slope = world(seed=seed, lines=60, n=2, noise=0.2)
        rows = at_status_quo(rows, BUDGETS)
        mine = decisions(rows, Curves(1 - slope, 100.0), BUDGETS)
        line, step = rows["line"].to_numpy(), 0.2 * rows["budget_micros"].to_numpy() / 1e6
        for level, into in ((rows["usual"].to_numpy(), known), (np.zeros(rows.num_rows), bare)):
            theirs = type(mine)(pa.table({"level": level}), mine.move, mine.favour)
            found = value(rows, mine, theirs, BUDGETS, **HOW)
            assert isinstance(found, Value)
            into.append(found.mine)
        up = rows["usual"].to_numpy() * (1.2 ** slope[line] - 0.8 ** slope[line]) / 2
        way, total = np.clip(mine.move / 1e6 / step, -1, 1), rows["usual"].to_numpy().sum()
        truth.append(float((way * up).sum() - (way * step).sum() * up.sum() / step.sum()) / total)
    for estimates in (bare, known):
        error = np.array(estimates) - truth
        assert abs(error.mean()) < 3 * error.std() / np.sqrt(len(error)), (error.mean(), np.mean(truth))
    assert np.std(np.array(known) - truth) < 0.5 * np.std(np.array(bare) - truth), "a known level takes noise away"


def test_a_plan_wins_nothing_by_spending_more() -> None:
    rows, slope = world()
    spender = Curves(slope)
    policy = BudgetPolicy(spend="budget_micros", largest_daily_change=0.5)
    given = at_status_quo(rows, policy)
    plain = decisions(given, spender, policy)
    more = type(plain)(plain.scores, np.abs(plain.move) + 30e6, plain.favour)  # everybody gets more
    found = value(given, more, plain, policy, **HOW)
    assert isinstance(found, Value)
    assert found.mine == pytest.approx(0.0, abs=1e-9) and found.theirs > 0


def test_identical_models_are_worth_the_same() -> None:
    rows, slope = world()
    found = compare(rows, Curves(slope), Curves(slope))
    assert isinstance(found, Value) and (found.harm.point, found.harm.low, found.harm.high) == (0.0, 0.0, 0.0)


def test_without_randomised_rows_nothing_is_measured() -> None:
    rows, slope = world(drawn=False)
    assert "no line of the held-out days was perturbed at random" in str(compare(rows, Curves(slope), Curves(slope)))
    bare = rows.drop_columns(["explore_probability"])
    assert "explore_probability" in str(compare(bare, Curves(slope), Curves(slope)))


def test_the_perturbation_of_the_day_itself_is_no_part_of_where_a_plan_starts() -> None:
    rows, slope = world()
    coin = np.random.default_rng(9).choice([0.8, 1.2], rows.num_rows)
    moved = np.rint(rows["budget_micros"].to_numpy() * coin).astype(np.int64)
    given = rows.set_column(rows.column_names.index("budget_micros"), "budget_micros", pa.array(moved))
    given = given.set_column(
        given.column_names.index("explore_multiplier_today"), "explore_multiplier_today", pa.array(coin)
    )
    assert (
        np.abs(
            at_status_quo(given, BUDGETS)["budget_micros"].to_numpy()
            - at_status_quo(rows, BUDGETS)["budget_micros"].to_numpy()
        ).max()
        <= 1
    )
    found, plain = compare(given, Curves(1 - slope), Curves(slope)), compare(rows, Curves(1 - slope), Curves(slope))
    assert isinstance(found, Value) and isinstance(plain, Value)
    assert found.harm.point == pytest.approx(plain.harm.point, abs=1e-3)


# --- priorities -------------------------------------------------------------------------------------------------------

QUEUE = PriorityPolicy(kind="priority_queue", cost_by="impact", cost={"1": 4.0}, other_capacity_hours=8.0)


class Order:
    """Scores that put the tickets with the largest ``risk`` first, or last."""

    def __init__(self, turned: bool = False, effort: float = 1.0) -> None:
        self.turned, self.effort = turned, effort

    def score(self, rows: pa.Table) -> pa.Table:
        risk = rows["risk"].to_numpy()
        risk = 1 - risk if self.turned else risk
        n = rows.num_rows
        return pa.table({
            "entity_id": rows["entity_id"], "p_miss": risk, "p_miss_now": np.zeros(n), "p_miss_later": risk,
            "effort_hours": np.full(n, self.effort), "uncertainty": np.zeros(n),
        })  # fmt: skip


def queue(seed: int = 2, n: int = 7, tickets: int = 40, due_in_hours: float = 12.0) -> pa.Table:
    """Each day 40 open tickets of an hour's work, 8 hours of hands; who is at risk is missed."""
    rng = np.random.default_rng(seed)
    rows = n * tickets
    day = np.repeat(np.arange(n), tickets)
    risk = rng.uniform(size=rows)
    end = [datetime.combine(START, datetime.min.time()) + timedelta(days=int(d) + 1, hours=due_in_hours) for d in day]
    return pa.table({
        "entity_id": [f"t{i:04d}" for i in range(rows)], "unit": ["desk"] * rows, "team": ["desk"] * rows,
        "day": pa.array([START + timedelta(days=int(d)) for d in day], pa.date32()), "priority": [3] * rows,
        "impact": ["2"] * rows, "due_at": pa.array(end, pa.timestamp("us")), "risk": risk,
        "missed": rng.uniform(size=rows) < risk, "effort_hours": np.ones(rows),
    })  # fmt: skip


def test_an_order_turned_round_saves_clearly_less() -> None:
    found = compare(queue(), Order(turned=True), Order(), QUEUE)
    assert isinstance(found, Value) and found.harm.proven and found.theirs > 2 * found.mine
    assert found.theirs < 8 / 40 * 3, "more than hands can do is saved by nobody"


def test_tickets_without_a_due_time_say_nothing() -> None:
    rows = queue()
    said = compare(rows.set_column(rows.column_names.index("due_at"), "due_at", pa.nulls(rows.num_rows, pa.timestamp("us"))),
                   Order(turned=True), Order(), QUEUE)  # fmt: skip
    assert isinstance(said, str) and "not measured" in said


def test_an_order_does_not_win_by_calling_the_work_quick() -> None:
    found = compare(queue(), Order(effort=0.01), Order(), QUEUE)
    assert isinstance(found, Value) and found.harm.point == 0.0
    unrecorded = queue().drop_columns(["effort_hours"])
    found = compare(unrecorded, Order(effort=0.01), Order(effort=2.0), QUEUE)
    assert isinstance(found, Value) and found.harm.point == 0.0
    less = compare(unrecorded, Order(), Order(), QUEUE)
    assert isinstance(less, Value) and less.theirs > 1.5 * found.theirs, "work that takes twice as long is half as much"


@pytest.mark.parametrize("due_in_hours", [-1.0, 30.0])
def test_what_was_lost_already_or_had_time_left_says_nothing(due_in_hours: float) -> None:
    said = compare(queue(due_in_hours=due_in_hours), Order(turned=True), Order(), QUEUE)
    assert isinstance(said, str) and "not measured" in said


def test_a_plan_starts_from_whole_steps_where_what_was_drawn_stands_in_whole_steps() -> None:
    policy = BudgetPolicy(unit_micros=10_000)
    rows = pa.table(
        {
            "day": pa.array([date(2026, 3, 1)] * 3, pa.date32()),
            "entity_id": ["a", "b", "c"],
            "budget_micros": pa.array([14_810_000, 9_870_000, 9_873_412], pa.int64()),
            "explore_multiplier_today": [1.2, 0.8, 1.0],
        }
    )
    assert at_status_quo(rows, policy)["budget_micros"].to_pylist() == [12_340_000, 12_340_000, 9_873_412]
