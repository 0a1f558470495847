"""What the demo's decisions earned: against the holdout as an analyst would see it, and against the worlds' own truth.

Belongs here: the closing table of the demo. Does not: verdicts that act (the regression guard), or the worlds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from delivery.sandbox import systems
from delivery.sandbox.worlds import tickets, working_hours
from pipeline.lake import Lake
from pipeline.workflow import Workflow


def against_holdout(lake: Lake, workflow: Workflow, days: Sequence[date], before: Sequence[date], drawn: date) -> float:
    """How the champion arm's value moved between two sets of days, relative to the holdout's (difference in differences).

    ``days``, ``before``: of the decisions, their outcomes are those of the day after; ``drawn``: a day whose decisions say
    which line is in which arm. One number without an interval: what an analyst would look at first.
    """
    arm = {r["entity_id"]: r["arm"] for r in lake.read(workflow.table("decisions"), days=[drawn]).to_pylist()}
    earned: dict[tuple[str, bool], float] = defaultdict(float)
    outcomes = lake.read(workflow.table("outcomes"), columns=["entity_id", "for_day", "value", "known_at"]).sort_by(
        "known_at"
    )
    newest = {(r["entity_id"], r["for_day"]): r["value"] for r in outcomes.to_pylist()}  # a restated day counts once
    for (entity, day), value in newest.items():
        for late, chosen in ((True, days), (False, before)):
            if day in chosen:
                earned[arm.get(entity, ""), late] += value / len(chosen)
    champion = earned["champion", True] / earned["champion", False]
    return champion / (earned["holdout", True] / earned["holdout", False]) - 1


def advertising(both: systems.Systems, lake: Lake, workflow: Workflow) -> list[list[str]]:
    """Rows of the closing table for the advertising world: expected value by its own truth.

    All lines, and the champion arm's alone: the others are held out or explored, and no policy moves money between arms.
    """
    world, days = both.ads.world, both.ads.days()
    lines = world.line_id.tolist()
    first, *live = sorted(days)
    last = max(lake.read(workflow.table("decisions"), columns=["day"])["day"].to_pylist())
    arm = {r["entity_id"]: r["arm"] for r in lake.read(workflow.table("decisions"), days=[last]).to_pylist()}
    mine = np.array([arm.get(line) == "champion" for line in lines])
    alone = np.array([days[first][line] for line in lines], dtype=np.int64)
    worth: dict[tuple[str, str], float] = defaultdict(float)
    for day in live:
        stood = np.array([days[day][line] for line in lines], dtype=np.int64)
        nothing, all_of_it = np.zeros_like(stood), int(stood.sum())
        best = world.optimum(day, all_of_it, nothing, np.full_like(stood, all_of_it))
        pool = int(stood[mine].sum())
        best_mine = world.optimum(day, all_of_it, np.where(mine, 0, stood), np.where(mine, pool, stood))
        for name, budgets, champion in (
            ("as decided", stood, stood),
            ("left alone", alone, np.where(mine, alone, stood)),
            ("the world's optimum", best, best_mine),
        ):
            worth["all lines", name] += float(world.expected_value(budgets, day).sum())
            worth["champion arm", name] += float(world.expected_value(champion, day)[mine].sum())
    rows = []
    for whose in ("all lines", "champion arm"):
        least = worth[whose, "left alone"]
        lift = worth[whose, "the world's optimum"] - least
        for name in ("as decided", "left alone", "the world's optimum"):
            value = worth[whose, name]
            rows.append([whose, name, f"{value:,.0f}", f"{value / least - 1:+.1%}", f"{(value - least) / lift:.0%}"])
    return rows


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
    from_, to = (int((d - tickets.EPOCH).days) * working_hours.DAY for d in (setup.opened + timedelta(days=1), until))
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


def show(console: Console, both: systems.Systems, lake: Lake, workflows: dict[str, Workflow]) -> dict[str, Any]:
    """Print the closing tables; returns them."""
    first = both.setup.opened
    live = sorted(d for d in both.ads.days() if d > first)
    decided = sorted(set(lake.read(workflows["ad_budget"].table("decision_outcomes"))["decided_day"].to_pylist()))
    table = Table(
        title=f"ad_budget, {live[0]} to {live[-1]}: expected value by the world's own truth", title_justify="left"
    )
    for column in ("lines", "budgets", "value", "against left alone", "of the lift there is"):
        table.add_column(column)
    budgets = advertising(both, lake, workflows["ad_budget"])
    for row in budgets:
        table.add_row(*row)
    console.print(table)
    past = [first - timedelta(days=n) for n in range(2, 16)]
    measured = against_holdout(lake, workflows["ad_budget"], decided, past, decided[-1])
    console.print(
        f"As an analyst sees it: since then the champion arm earned {measured:+.1%} against the holdout, compared with the 14 days before "
        "(few campaigns are held out: the figure is noisy, the truth stands above)."
    )
    until = date.fromisoformat(both.desk.state()["next_day"])
    table = Table(
        title=f"ticket_priority, due {first + timedelta(days=1)} to {until - timedelta(days=1)}: service levels missed",
        title_justify="left",
    )
    for column in ("priorities", "missed", "share"):
        table.add_column(column)
    queue = service(both, until)
    for row in queue:
        table.add_row(*row)
    console.print(table)
    return {"ad_budget": budgets, "against the holdout": measured, "ticket_priority": queue}
