"""How much of what there is to gain does the budget policy capture in the generated advertising world?

`python -m benchmarks.advertising_world [--seeds 30]`. Each seed is a world of 200 lines with some days of explored
history. The policy sees the exported rows and today's budgets, and reallocates the next day's money within +-50% of
each budget. Its share is

    (true value of its budgets - true value of leaving them) / (true value of the world's optimum in the same bounds -
    true value of leaving them).

Here belongs the measuring only: the truth is `delivery.sandbox.worlds.advertising`, the policy `models.elasticity`
and `models.policies.budget`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np

from delivery.sandbox.worlds.advertising import Setting, World, history
from models.elasticity import fit_elasticities, response
from models.policies.allocation import allocate

Floats = np.ndarray[Any, np.dtype[np.float64]]
Micros = np.ndarray[Any, np.dtype[np.int64]]

START = date(2026, 1, 1)
LARGEST_CHANGE = 0.5  # of a budget, up or down, in the one reallocation that is judged
HALF_LIFE = 10.0  # days, of a day's say in a line's level
POINTS = 41  # of a response curve
CASES: tuple[tuple[Setting, int, float | None], ...] = (("easy", 14, 0.95), ("hard", 28, 0.50), ("hard", 90, 0.70))


@dataclass(frozen=True)
class Seen:
    """The exported rows as (days, lines), money in currency units: all that a policy may look at."""

    value: Floats
    base: Floats
    multiplier: Floats
    spend: Floats


def level(seen: Seen, elasticity: Floats, budgets: Floats) -> Floats:
    """Expected value at `budgets`: the line's recent value per unit of status-quo budget, shrunk to the ratio of all
    lines.
    """
    weight = 0.5 ** (np.arange(len(seen.value))[::-1, None] / HALF_LIFE)
    unperturbed = seen.value / seen.multiplier ** np.clip(elasticity, 0, 1)
    money = (weight * seen.base).sum(0)
    ratio = (weight * unperturbed).sum(0) / money
    overall = np.average(ratio, weights=money)
    noise = (weight**2 * (unperturbed - ratio * seen.base) ** 2).sum(0) / money**2
    spread = max(np.average((ratio - overall) ** 2 - noise, weights=money), 1e-9)
    return np.asarray((overall + (ratio - overall) * spread / (spread + noise)) * budgets)


def observed_slopes(world: World, group: np.ndarray[Any, Any], days: int) -> Floats:
    """The way not to do it: the same estimator on unexplored days, fed each day's spend over the line's mean as if
    it had been drawn.
    """
    rows = history(world, START, days, explore_share=0.0)
    budget = rows["budget"].to_numpy().reshape(days, world.lines)
    not_drawn = budget / budget.mean(0)
    fitted = fit_elasticities(rows["line_id"], group, rows["date"], budget.ravel(), rows["revenue"], not_drawn.ravel())
    return fitted.of(world.line_id, group[: world.lines])[0]


def share_captured(setting: Setting, days: int, seed: int, step: float, **world_options: Any) -> dict[str, float]:
    """Share of the lift captured by each way of deciding, in one world; and what exploring cost."""
    world = World(seed, setting, **world_options)
    rows = history(world, START, days, explore_step=step, explore_share=1.0)
    shape = (days, world.lines)
    budget, multiplier = rows["budget"].to_numpy().reshape(shape), rows["explore_multiplier"].to_numpy().reshape(shape)
    seen = Seen(
        rows["revenue"].to_numpy().reshape(shape),
        budget / multiplier,
        multiplier,
        rows["cost"].to_numpy().reshape(shape),
    )
    group = np.char.add(np.char.add(rows["segment"].to_numpy().astype(str), "|"), rows["format"].to_numpy().astype(str))
    fitted = fit_elasticities(
        rows["line_id"],
        group,
        rows["date"],
        budget.ravel(),
        seen.value.ravel(),
        multiplier.ravel(),
        probability=rows["explore_probability"],
    )
    ours, _ = fitted.of(rows["line_id"][: world.lines], group[: world.lines])
    constant = np.full(world.lines, fitted.overall_mean)

    day = START + timedelta(days=days)
    before = world.incumbent_budgets(day)
    floor, cap = (
        np.ceil(before * (1 - LARGEST_CHANGE)).astype(np.int64),
        np.floor(before * (1 + LARGEST_CHANGE)).astype(np.int64),
    )
    total = int(before.sum())
    spends = np.rint(np.linspace(floor, cap, POINTS, axis=1)).astype(np.int64)

    def planned(values: Floats) -> float:
        plan = allocate(spends, values, total=total, floor=floor, cap=cap, before=before, largest_change=None)
        return float(world.expected_value(plan.spend, day).sum())

    def by_curve(elasticity: Floats) -> float:
        at_before = level(seen, elasticity, before / 1e6)
        return planned(response(at_before, before.astype(float), spends.astype(float), elasticity))

    week = slice(-7, None)
    trailing = seen.value[week].sum(0) / seen.spend[week].sum(0)
    kept = float(world.expected_value(before, day).sum())
    optimum = world.optimum(day, total, floor, cap)
    lift = float(world.expected_value(optimum, day).sum()) - kept
    found = {
        "policy": by_curve(ours),
        "constant elasticity": by_curve(constant),
        "trailing ratio": planned(trailing[:, None] * spends / 1e6),
        "observed slopes": by_curve(observed_slopes(world, group, days)),
    }
    return {k: (v - kept) / lift for k, v in found.items()} | {
        "lift there is": lift / kept,
        "cost of exploring": cost_of_exploring(world, np.rint(budget * 1e6).astype(np.int64)),
    }


def cost_of_exploring(world: World, budgets: Micros) -> float:
    """Share of the true value that the explored budgets (days, lines) gave up against the incumbent's own."""
    kept = explored = 0.0
    for offset, set_that_day in enumerate(budgets):
        day = START + timedelta(days=offset)
        kept += float(world.expected_value(world.incumbent_budgets(day), day).sum())
        explored += float(world.expected_value(set_that_day, day).sum())
    return 1 - explored / kept


def interval(x: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95% interval (normal)."""
    values = np.asarray(x)
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float(
        "nan"
    )


def measure(seeds: range, step: float, **world_options: Any) -> bool:
    """Print the table; True when every target is met by the mean."""
    print(f"{len(seeds)} seeds from {seeds.start}, 200 lines, every budget explored by +-{step:.0%} every day")
    print("Mean over seeds +- its 95% interval.")
    print(f"One reallocation, each budget within +-{LARGEST_CHANGE:.0%}.")
    met = True
    for setting, days, target in CASES:
        runs = [share_captured(setting, days, seed, step, **world_options) for seed in seeds]
        print(f"\n{setting} world, {days} days" + (f" (target for the policy: {target:.0%})" if target else ""))
        for name in runs[0]:
            mean, half = interval([run[name] for run in runs])
            print(f"  {name:22s} {mean:8.2%} +- {half:.2%}")
        met &= target is None or interval([run["policy"] for run in runs])[0] >= target
    return met


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--step", type=float, default=0.2, help="size of the perturbation")
    parser.add_argument("--return-spread", type=float, default=None, help="easy world: sd of the log of lines' returns")
    given = parser.parse_args()
    options = {} if given.return_spread is None else {"return_spread": given.return_spread}
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    if not measure(seeds, given.step, **options):
        raise SystemExit("a target was missed")


if __name__ == "__main__":
    main()
