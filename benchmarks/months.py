"""Months of both sandbox worlds in process, judged every day by the regression guard as the shipped workflows configure it.

Belongs here: playing a month under a policy that is honest, does nothing, or does harm, and counting what the guard says.
Does not: the guard (``data_checks.regression``), the worlds (``delivery.sandbox.worlds``) or the policies (``models``).

Run: ``python -m benchmarks.months [--months 100]``. Exits with 1 where more than 9 of 100 clean months are rolled back.
``--http`` plays one clean month of both instead, as the demo lives its days: through Dagster, and over HTTP to both local systems.

A month is 28 days of history and 30 days under arms drawn as the product draws them. ``clean``: the champion arm is decided
by an honest model. ``nothing``: the champion arm is left alone, too, the hardest case for false alarms. ``harmful``: a model
that looks like the honest one to a gate and turns its order around. ``slight``: budgets within 15% of the usual only, or half of
the tickets.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.priority_policy import Known, daily_priorities
from data_checks import regression
from delivery.sandbox.worlds import advertising, tickets, working_hours
from models.policies import allocation, arms, budget
from models.policies.priority import PriorityPolicy
from pipeline.workflow import FOLDER, Workflow
from pipeline.workflow import load as load_workflow

Kind = Literal["clean", "nothing", "slight", "harmful"]
START = date(2026, 3, 2)
BEFORE, LIVE = 28, 30
FIRST_SEED = 5000
LINES, TEAMS, LOAD = 240, 12, 0.9
MOST_FALSE = 9


@dataclass(frozen=True)
class Month:
    """What the guard said of one month, and what the month really was.

    ``rolled_back_on``: live day (from 1) of the first ROLLBACK, None: none. ``effect``: what the champion arm's units earned
    (ads) or missed (tickets) beside the same units and the same luck left alone: relative for money, in shares of tickets for
    misses; negative is worse. ``harm``: the same as the power calculator asks for it, relative to the level left alone.
    """

    seed: int
    kind: Kind
    verdict: str
    rolled_back_on: int | None
    effect: float
    harm: float


def _drawn(workflow: Workflow, units: Sequence[str], day: date, seed: int) -> pa.Table:
    """The arms of a day, as the product draws them, under the name of this month."""
    spec = workflow.arms
    epoch, washout = arms.epoch_of(day, START + timedelta(days=BEFORE), spec.epoch, spec.washout)
    table = arms.draw(
        units, workflow=f"{workflow.name} {seed}", design=spec.design, epoch=epoch, shares=spec.shares,
        strata=[""] * len(units),
    )  # fmt: skip
    n = table.num_rows
    return table.append_column("epoch", pa.array([epoch] * n)).append_column("washout", pa.array([washout] * n))


def _judged(
    workflow: Workflow,
    seed: int,
    kind: Kind,
    rows: list[pa.Table],
    before: list[pa.Table],
    drawn: pa.Table,
    effect: float,
    harm: float,
) -> Month:
    assert workflow.regression is not None, "both shipped workflows are guarded"
    start = START + timedelta(days=BEFORE)
    found = regression.judge(
        pa.concat_tables(rows), pa.concat_tables(before), spec=workflow.regression, design=workflow.arms.design,
        treated="champion", control="holdout", shares=arms.normalised(workflow.arms.shares), drawn=drawn,
        start=start, day=start + timedelta(days=LIVE - 1), seed=seed,
    )  # fmt: skip
    crossed = found.looks.filter(pc.field("verdict") == "ROLLBACK")["day"]
    on = (pc.min(crossed).as_py() - start).days + 1 if len(crossed) and found.verdict == "ROLLBACK" else None
    return Month(seed, kind, found.verdict, on, effect, harm)


# --- advertising: budgets persist, campaigns compete within themselves


def advertising_month(seed: int, kind: Kind, workflow: Workflow, lines: int = LINES) -> Month:
    """One month of the advertising world. The honest model knows each line's curve with an error of a fifth."""
    world = advertising.World(seed, "easy", lines, origin=START, return_spread=1.0)
    campaigns = sorted(set(world.campaign_id.tolist()))
    first = START + timedelta(days=BEFORE)
    drawn = _drawn(workflow, campaigns, first, seed)
    arm_of = dict(zip(drawn["unit"].to_pylist(), drawn["arm"].to_pylist(), strict=True))
    arm = np.array([arm_of[c] for c in world.campaign_id])
    mine = arm == "champion"
    rng = np.random.default_rng([seed, 77])
    wrong = np.exp(rng.normal(0, 0.2, (2, lines)))
    status_quo = world.incumbent_budgets(START)
    before = [_ad_rows(world.step(START + timedelta(days=n), status_quo), arm, "", False) for n in range(BEFORE)]
    stood, rows, earned, alone = status_quo.copy(), [], 0.0, 0.0
    policy = workflow.policy
    assert isinstance(policy, budget.BudgetPolicy), "ad_budget allocates"
    for n in range(LIVE):
        day = first + timedelta(days=n)
        if kind != "nothing" and mine.any():
            stood = _planned(world, day - timedelta(days=1), stood, status_quo, mine, wrong, kind, policy)
        coins = rng.random(lines) < 0.5
        shown = np.where((arm == "explore") & coins, stood * 12 // 10, stood)
        shown = np.where((arm == "explore") & ~coins, stood * 8 // 10, shown)
        drawn_today = _drawn(workflow, campaigns, day, seed)
        epoch, washout = drawn_today["epoch"][0].as_py(), drawn_today["washout"][0].as_py()
        if epoch != drawn["epoch"][0].as_py():
            break  # a new epoch redraws the arms: the month's comparison ends with its epoch
        rows.append(_ad_rows(world.step(day, shown), arm, epoch, washout))
        earned += float(world.expected_value(stood, day)[mine].sum())
        alone += float(world.expected_value(status_quo, day)[mine].sum())
    effect = earned / alone - 1 if alone else 0.0
    return _judged(workflow, seed, kind, rows, before, drawn, effect, max(-effect, 0.0))


def _planned(
    world: advertising.World,
    day: date,
    stood: Any,
    usual: Any,
    mine: Any,
    wrong: Any,
    kind: Kind,
    policy: budget.BudgetPolicy,
) -> Any:
    """Tomorrow's budgets of the champion arm, by a model that errs by ``wrong``."""
    at = np.flatnonzero(mine)
    spends = np.rint(stood[at][:, None] * np.array([0.5, 0.75, 1.0, 1.25, 1.5])).astype(np.int64)
    slope = np.clip(world.elasticity[at] * wrong[1][at], 0.05, 0.95)
    level = world.expected_value(stood, day)[at] * wrong[0][at]
    marginal = level * slope / stood[at]
    if kind in ("harmful", "slight"):
        # the curves turned around: what earns most at the margin is shown as earning least, at the same level
        turned = np.sort(marginal)[::-1][np.argsort(np.argsort(marginal))]
        slope = np.clip(turned * stood[at] / np.maximum(level, 1e-9), 0.0, 1.0)
    values = level[:, None] * (spends / stood[at][:, None]) ** slope[:, None]
    low, high = (np.rint(stood[at] * s).astype(np.int64) for s in (0.5, 1.5))
    if kind == "slight":
        low, high = (np.rint(usual[at] * s).astype(np.int64) for s in (0.85, 1.15))
        low, high = np.minimum(low, stood[at]), np.maximum(high, stood[at])
    plan = allocation.allocate(
        spends, values, total=int(stood[at].sum()), floor=low, cap=high, before=stood[at],
        largest_change=policy.largest_daily_change,
    )  # fmt: skip
    made = stood.copy()
    if plan.feasible:
        made[at] = plan.spend
    return made


def _ad_rows(exported: pa.Table, arm: Any, epoch: str, washout: bool) -> pa.Table:
    """A day's outcomes by campaign, as the guard reads them."""
    by = pa.table(
        {"unit": exported["campaign"], "arm": pa.array(arm), "value": exported["revenue"], "cost": exported["cost"]}
    )
    summed = by.group_by(["unit", "arm"], use_threads=False).aggregate(
        [("value", "sum"), ("cost", "sum"), ([], "count_all")]
    )
    n = summed.num_rows
    return pa.table({
        "day": pa.array([exported["date"][0].as_py()] * n, pa.date32()), "unit": summed["unit"], "arm": summed["arm"],
        "epoch": pa.array([epoch] * n), "washout": pa.array([washout] * n), "n": summed["count_all"],
        "value": summed["value_sum"], "cost": summed["cost_sum"],
    })  # fmt: skip


# --- tickets: a team's tickets share its hands


def tickets_month(seed: int, kind: Kind, workflow: Workflow, teams: int = TEAMS, load: float = LOAD) -> Month:
    """One month of the ticket world. The honest model knows the distribution of efforts by subcategory."""
    world = tickets.World(seed, load=load, teams=teams)
    past = tickets.history(world, START, BEFORE)
    alone = world.branch()
    days = [START + timedelta(days=BEFORE + n) for n in range(LIVE)]
    for day in days:
        alone.advance(day)
    known = Known.of(alone, past)
    hands = {t.name: t.hours_per_week / 5 for t in world.teams}
    policy = workflow.policy
    assert isinstance(policy, PriorityPolicy), "ticket_priority ranks"
    policy = policy.model_copy(update={"capacity_hours": hands})
    names = sorted(t.name for t in world.teams)
    acted = world.branch()
    arms_by_day = {day: _drawn(workflow, names, day, seed) for day in days}
    for day in days:
        treated = {
            unit for unit, arm in zip(*(arms_by_day[day][c].to_pylist() for c in ("unit", "arm")), strict=True)
            if arm == "champion"
        }  # fmt: skip
        acted.advance(day, _priorities(acted, known, policy, treated, kind))
    before = [_ticket_rows(acted, START + timedelta(days=n), None) for n in range(7, BEFORE)]
    rows = [_ticket_rows(acted, day, arms_by_day[day]) for day in days]
    treated_rows = pa.concat_tables(rows).filter(pc.field("arm") == "champion")
    left = pa.concat_tables([_ticket_rows(alone, day, arms_by_day[day]) for day in days]).filter(
        pc.field("arm") == "champion"
    )
    missed, otherwise = (pc.sum(t["late"]).as_py() / pc.sum(t["n"]).as_py() for t in (treated_rows, left))
    epochs = {t["epoch"][0].as_py(): t for t in arms_by_day.values()}
    return _judged(
        workflow,
        seed,
        kind,
        rows,
        before,
        pa.concat_tables(epochs.values()),
        otherwise - missed,
        max(missed / otherwise - 1, 0.0),
    )


def _priorities(
    world: tickets.World, known: Known, policy: PriorityPolicy, treated: set[str], kind: Kind
) -> dict[str, int]:
    if kind == "nothing":
        return {}
    made = daily_priorities(known, world, policy)
    shown = world.open_tickets()
    team = dict(zip(shown["ticket_id"].to_pylist(), shown["team"].to_pylist(), strict=True))
    mine = {t: p for t, p in made.items() if team[t] in treated}
    if kind in ("harmful", "slight"):
        turns = {t for i, t in enumerate(sorted(mine)) if kind == "harmful" or i % 2 == 0}
        mine = {t: 6 - p if t in turns else p for t, p in mine.items()}
    return mine


def _ticket_rows(world: tickets.World, day: date, drawn: pa.Table | None) -> pa.Table:
    """A day's tickets by team: due that day, and missed."""
    midnight = (day - tickets.EPOCH).days * working_hours.DAY
    due = np.array(world.due)
    end = (START + timedelta(days=BEFORE + LIVE) - tickets.EPOCH).days * working_hours.DAY
    resolved = np.array([end if r is None else r for r in world.resolved])
    mine = (due >= midnight) & (due < midnight + working_hours.DAY)
    team = np.array([route[-1] for route in world._route])
    n = np.bincount(team[mine], minlength=len(world.teams))
    missed = np.bincount(team[mine & (resolved > due)], minlength=len(world.teams))
    names = [t.name for t in world.teams]
    size = len(names)
    if drawn is None:
        arm, epoch, washout = [""] * size, [""] * size, [False] * size
    else:
        of = dict(zip(drawn["unit"].to_pylist(), drawn["arm"].to_pylist(), strict=True))
        arm, epoch = [of[name] for name in names], [drawn["epoch"][0].as_py()] * size
        washout = [drawn["washout"][0].as_py()] * size
    return pa.table({
        "day": pa.array([day] * size, pa.date32()), "unit": pa.array(names), "arm": pa.array(arm, pa.string()),
        "epoch": pa.array(epoch, pa.string()), "washout": pa.array(washout, pa.bool_()), "n": pa.array(n, pa.int64()),
        "late": pa.array(missed, pa.float64()),
    })  # fmt: skip


CASES: tuple[tuple[str, tuple[Kind, ...], int, bool], ...] = (
    ("ad_budget", ("clean", "nothing", "slight", "harmful"), 0, False),
    ("ticket_priority", ("clean", "nothing", "slight", "harmful"), TEAMS, False),
    ("ticket_priority", ("nothing", "harmful"), 2 * TEAMS, True),
)
"""Workflow, kinds of months, teams, whether with a larger holdout than shipped."""


def told(months: Sequence[Month]) -> str:
    """Verdicts, rollbacks, when, and what the months really were."""
    on = sorted(m.rolled_back_on for m in months if m.rolled_back_on is not None)
    effects = [m.effect for m in months]
    when = f", median day {int(np.median(on))} ({on[0]} to {on[-1]})" if on else ""
    verdicts = ", ".join(f"{n} {v}" for v, n in sorted(Counter(m.verdict for m in months).items()))
    return (
        f"{len(on)} of {len(months)} rolled back{when}; {verdicts}; true effect on the arm {np.mean(effects):+.1%} "
        f"({min(effects):+.1%} to {max(effects):+.1%})"
    )


def promised(name: str, workflow: Workflow, harm: float, teams: int) -> regression.Power:
    """What the power calculator says before a month begins: from eight weeks of one world left alone, a harm from the first
    day on."""
    assert workflow.regression is not None, "both shipped workflows are guarded"
    days, spec = [START + timedelta(days=n) for n in range(2 * BEFORE)], workflow.arms
    if name == "ad_budget":
        world = advertising.World(FIRST_SEED - 1, "easy", LINES, origin=START, return_spread=1.0)
        budgets, arm = world.incumbent_budgets(START), np.full(LINES, "")
        rows = [_ad_rows(world.step(day, budgets), arm, "", False) for day in days]
    else:
        queue = tickets.World(FIRST_SEED - 1, load=LOAD, teams=teams)
        for day in days:
            queue.advance(day)
        rows = [_ticket_rows(queue, day, None) for day in days[7:]]
    return regression.power(
        pa.concat_tables(rows), spec=workflow.regression, design=spec.design, treated="champion", control="holdout",
        shares=arms.normalised(spec.shares), harm=harm, epoch_days=spec.epoch, washout_days=spec.washout, seed=FIRST_SEED,
    )  # fmt: skip


def larger_holdout(workflow: Workflow) -> Workflow:
    """The ticket workflow with a larger holdout, for which a month is long enough."""
    return workflow.model_copy(
        update={"arms": workflow.arms.model_copy(update={"shares": {"holdout": 0.4, "champion": 0.6}})}
    )


def over_http() -> int:
    """A month in which nothing goes wrong, sent and read back; 1 where something was rolled back or left undone."""
    with tempfile.TemporaryDirectory() as state:
        os.environ |= {"SIGNALBOX_HOME": state, "DAGSTER_HOME": str(Path(state) / "dagster")}
        from rich.console import Console

        from orchestration.demo import story

        told = story.tell(Console(width=200), story.Script(days=LIVE))
    wrong = [e for e in told["events"] if "rolled back" in e["event"] or "not complete" in e["event"]]
    print(f"{len(wrong)} rollbacks or deliveries left undone in {LIVE} days of both workflows")
    return int(bool(wrong))


def main() -> int:
    """Prints a line for each world and kind of month; 1 where clean months are rolled back too often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--months", type=int, default=100, help="months of each kind (default 100)")
    parser.add_argument("--http", action="store_true", help="one clean month of both over HTTP instead")
    said = parser.parse_args()
    if said.http:
        return over_http()
    months = said.months
    short = False
    for name, kinds, teams, larger in CASES:
        workflow = load_workflow(FOLDER / name)
        workflow = larger_holdout(workflow) if larger else workflow
        units = f"{teams} teams by week" if name == "ticket_priority" else f"{LINES // 8} campaigns"
        print(f"{name}, {units}, holdout {arms.normalised(workflow.arms.shares)['holdout']:.0%}")
        for kind in kinds:
            began = time.perf_counter()
            played = [
                advertising_month(FIRST_SEED + n, kind, workflow) if name == "ad_budget"
                else tickets_month(FIRST_SEED + n, kind, workflow, teams)
                for n in range(months)
            ]  # fmt: skip
            print(f"  {kind:8s} {told(played)}; {time.perf_counter() - began:.0f} s", flush=True)
            false = sum(m.rolled_back_on is not None for m in played)
            short |= kind in ("clean", "nothing") and false > MOST_FALSE * months / 100
            if kind in ("slight", "harmful"):
                harm = float(np.mean([m.harm for m in played]))
                print(
                    f"           promised for a harm of {harm:.0%}: {promised(name, workflow, harm, teams).sentence()}"
                )
    return int(short)


if __name__ == "__main__":
    raise SystemExit(main())
