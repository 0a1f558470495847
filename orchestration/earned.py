"""What the demo's decisions earned: against the holdout as an analyst would see it, and against the worlds' own truth.

Belongs here: the closing table of the demo. Does not: verdicts that act (the regression guard), or the worlds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from assets.lake import Lake
from assets.workflow import Workflow
from delivery.sandbox import systems
from delivery.sandbox.worlds import tickets


def against_holdout(lake: Lake, workflow: Workflow, days: Sequence[date], before: Sequence[date]) -> float:
    """How the champion arm's value moved between two sets of days, relative to the holdout's (difference in differences).

    ``days``, ``before``: of the decisions; their outcomes are those of the day after.
    """
    from collections import defaultdict

    rows = lake.read(workflow.table("decision_outcomes")).to_pylist()
    sums: dict[tuple[str, bool], float] = defaultdict(float)
    for row in rows:
        for late, chosen in ((True, days), (False, before)):
            if row["decided_day"] in chosen and row["value"] is not None:
                sums[row["arm"], late] += row["value"] / len(chosen)
    champion = sums["champion", True] / sums["champion", False]
    return champion / (sums["holdout", True] / sums["holdout", False]) - 1


def advertising(both: systems.Systems, lake: Lake, workflow: Workflow) -> list[list[str]]:
    """Rows of the closing table for the advertising world: expected value by its own truth, and what the arms measured."""
    world, days = both.ads.world, both.ads.days()
    lines = world.line_id.tolist()
    first, *live = sorted(days)
    alone = np.array([days[first][line] for line in lines], dtype=np.int64)
    worth = {"as decided": 0.0, "left alone": 0.0, "the world's optimum": 0.0}
    for day in live:
        stood = np.array([days[day][line] for line in lines], dtype=np.int64)
        best = world.optimum(day, int(stood.sum()), np.zeros_like(stood), np.full_like(stood, int(stood.sum())))
        for name, budgets in (("as decided", stood), ("left alone", alone), ("the world's optimum", best)):
            worth[name] += float(world.expected_value(budgets, day).sum())
    lift = worth["the world's optimum"] - worth["left alone"]
    return [
        [
            name,
            f"{value:,.0f}",
            f"{value / worth['left alone'] - 1:+.1%}",
            f"{(value - worth['left alone']) / lift:.0%}",
        ]
        for name, value in worth.items()
    ]


def service(both: systems.Systems, until: date) -> list[list[str]]:
    """Rows of the closing table for the ticket world: service levels missed, beside leaving it alone and an oracle."""
    setup = both.setup
    decided = both.desk.replay()
    alone = setup.tickets()
    for n in range(setup.history_days):
        alone.advance(setup.start + timedelta(days=n))
    oracle = alone.branch(_shortest_that_can_be_saved)
    day = setup.opened
    while day < until:
        alone.advance(day)
        oracle.advance(day)
        day += timedelta(days=1)
    from_, to = (int((d - tickets.EPOCH).days) * tickets.DAY for d in (setup.opened + timedelta(days=1), until))
    rows = []
    for name, world in (("as decided", decided), ("left alone", alone), ("an oracle that knows every effort", oracle)):
        due = [i for i, at in enumerate(world.due) if from_ <= at < to]
        missed = sum(bool(world.missed[i]) or (world.resolved[i] or to) > world.due[i] for i in due)
        rows.append([name, f"{missed} of {len(due)}", f"{missed / len(due):.1%}"])
    return rows


def _shortest_that_can_be_saved(world: tickets.World, which: Any, now: int) -> Any:
    """Keys of queued tickets: least remaining work first among those that can still be in time, the others after them."""
    left = np.array([world._left[i] for i in which], dtype=np.float64)
    due = np.array([world.due[i] for i in which], dtype=np.float64)
    return np.where(now + left > due, 1e9 + left, left)


def show(console: Console, both: systems.Systems, lake: Lake, workflows: dict[str, Workflow]) -> None:
    """Print the closing tables."""
    first = both.setup.opened
    live = sorted(d for d in both.ads.days() if d > first)
    decided = sorted(set(lake.read(workflows["ad_budget"].table("decision_outcomes"))["decided_day"].to_pylist()))
    table = Table(
        title=f"ad_budget, {live[0]} to {live[-1]}: expected value by the world's own truth", title_justify="left"
    )
    for column in ("budgets", "value", "against left alone", "of the lift there is"):
        table.add_column(column)
    for row in advertising(both, lake, workflows["ad_budget"]):
        table.add_row(*row)
    console.print(table)
    if len(decided) > 1:
        measured = against_holdout(lake, workflows["ad_budget"], decided[1:], decided[:1])
        console.print(
            f"As an analyst sees it: the champion arm earned {measured:+.1%} against the holdout, compared with the first day."
        )
    until = date.fromisoformat(both.desk.state()["next_day"])
    table = Table(
        title=f"ticket_priority, due {first + timedelta(days=1)} to {until - timedelta(days=1)}: service levels missed",
        title_justify="left",
    )
    for column in ("priorities", "missed", "share"):
        table.add_column(column)
    for row in service(both, until):
        table.add_row(*row)
    console.print(table)
