"""Measures the ticket policy against the usual rules in the generated ticket world.

Belongs here: the discrete-event replay of one world under several rules, with paired seeds. Does not: the world's truth
(``delivery/sandbox/worlds/tickets.py``), the policy (``models/policies/priority.py``).

Run: ``python -m benchmarks.priority_policy [--seeds 30]``.

Each seed is a world with 12 teams. 21 days are served by the priorities that people set (impact + urgency), then
the world branches: the same requests come to every rule for 21 more days. Judged are the tickets opened in those days
and due in them; one that is unresolved at the end has missed. Rules know what the upstream system shows: category,
subcategory, impact, due time, team, and per category and subcategory the mean and spread of ln(effort) in the tickets
resolved in the first 21 days. The seeds are not those on which the defaults of the policy were chosen.

Free: every rule orders the queue itself. Keys are set when a ticket joins a queue and again at every full hour.
Daily: as the product acts. At 06:00 the open tickets get priorities 1 to 5 from ``models.policies.priority.decide``; tickets
that arrive during the day stand in the same queue with the priority that people gave them; within a priority the
oldest goes first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from delivery.sandbox.worlds.tickets import EPOCH, Order, World, history
from delivery.sandbox.worlds.working_hours import DAY, HOUR, service_seconds
from models.policies.priority import PriorityPolicy, decide
from models.policies.ranking import index

START = date(2026, 1, 5)
BEFORE, JUDGED = 21, 21
LOADS = (0.8, 0.95, 1.1)
COST = {"1": 4.0, "2": 2.0, "3": 1.0}
DELAY = 10 * HOUR  # service seconds until the next chance to decide: one day of service
FIRST = ((START - EPOCH).days + BEFORE) * DAY
LAST = FIRST + JUDGED * DAY
MEASURES = ("misses %", "cost-weighted misses %", "mean lateness h")
FIRST_SEED = 1000
OURS, OURS_PLAIN, OURS_DAILY = "index", "index, late cost 0", "index, daily 1-5"


@dataclass(frozen=True)
class Known:
    """What a rule knows of each ticket from its arrival on; arrays by ticket number."""

    opened: np.ndarray
    due: np.ndarray
    due_service: np.ndarray  # service seconds at the due time
    mu: np.ndarray
    sigma: np.ndarray
    effort: np.ndarray
    cost: np.ndarray
    names: pa.Array

    @classmethod
    def of(cls, world: World, past: pa.Table) -> Known:
        """From the requests of a world served to the end, and the events of the time before the judged days."""
        done = past.filter(pc.and_(pc.equal(past["state"], "resolved"), pc.equal(past["reopens"], 0)))
        log_effort = np.log(np.asarray(done["effort_hours"]))
        mean, spread = log_effort.mean(), log_effort.std()
        kinds = np.array(_keys(world.category, world.subcategory))
        seen = np.array(_keys(done["category"].to_pylist(), done["subcategory"].to_pylist()))
        categories, category_seen = np.array(world.category), np.array(done["category"].to_pylist())
        mu, sigma = np.full(len(kinds), mean), np.full(len(kinds), spread)
        for category in np.unique(category_seen):
            of_category = log_effort[category_seen == category]
            centre = (of_category.sum() + 3 * mean) / (len(of_category) + 3)
            mu[categories == category] = centre
            squares, count = 5 * spread**2, 5
            for kind in np.unique(seen[category_seen == category]):
                of_kind = log_effort[seen == kind]
                estimate = (of_kind.sum() + 5 * centre) / (len(of_kind) + 5)
                mu[kinds == kind] = estimate
                squares, count = squares + ((of_kind - estimate) ** 2).sum(), count + len(of_kind)
            sigma[categories == category] = np.sqrt(squares / count)
        return cls(
            np.array(world.opened), np.array(world.due), service_seconds(np.array(world.due)), mu, sigma,
            np.exp(mu + sigma**2 / 2), np.array([COST[str(i)] for i in world.impact]), pa.array(world.ticket_id),
        )  # fmt: skip

    def risks(self, tickets: np.ndarray, now: int) -> tuple[np.ndarray, np.ndarray]:
        """P(miss) when begun now and when begun after DELAY: ln(effort) is normal, slack is in service hours."""
        from scipy.special import ndtr

        slack = self.due_service[tickets] - service_seconds(np.array([now]))
        mu, sigma = self.mu[tickets], self.sigma[tickets]

        def missed(left: np.ndarray) -> np.ndarray:
            hours = np.maximum(left, 1) / HOUR
            return np.where(left <= 0, 1.0, 1 - ndtr((np.log(hours) - mu) / sigma))

        return missed(slack), missed(slack - DELAY)


def _keys(*columns: Sequence[str]) -> list[str]:
    return ["\x1f".join(row) for row in zip(*columns, strict=True)]


def free_rules(known: Known, late_cost: float) -> dict[str, Order | None]:
    """Rules that order the queue themselves: name -> key, smallest first (None: the priority that people set)."""

    def by_index(late_cost: float) -> Order:
        def key(_: World, tickets: np.ndarray, now: int) -> np.ndarray:
            p_now, p_later = known.risks(tickets, now)
            return -index(known.cost[tickets], p_now, p_later, known.effort[tickets], late_cost=late_cost)

        return key

    return {
        "first in first out": lambda _, tickets, now: known.opened[tickets],
        "static priority": None,
        "earliest due date": lambda _, tickets, now: known.due[tickets],
        "plain c-mu": lambda _, tickets, now: -known.cost[tickets] / known.effort[tickets],
        OURS: by_index(late_cost),
        OURS_PLAIN: by_index(0.0),
    }


def daily_priorities(known: Known, world: World, policy: PriorityPolicy) -> dict[str, int]:
    """The product's decision for every open ticket, as it would be delivered at 06:00 of the next day."""
    shown = world.open_tickets()
    if shown.num_rows == 0 or world.next_day is None:
        return {}
    now = (world.next_day - EPOCH).days * DAY + 6 * HOUR
    tickets = np.asarray(pc.index_in(shown["ticket_id"], value_set=known.names))
    p_now, p_later = known.risks(tickets, now)
    features = shown.rename_columns({"ticket_id": "entity_id"}).append_column("unit", shown["team"])
    scores = pa.table(
        {
            "entity_id": features["entity_id"],
            "p_miss_now": p_now,
            "p_miss_later": p_later,
            "effort_hours": known.effort[tickets],
            "uncertainty": np.zeros(len(tickets)),
        }
    )
    names = [t.name for t in world.teams]
    arms = pa.table({"unit": names, "arm": ["champion"] * len(names), "arm_probability": [1.0] * len(names)})
    made = decide(features, scores, arms, policy)
    return dict(zip(made["entity_id"].to_pylist(), made["after"].to_pylist(), strict=True))


def judged(world: World, known: Known) -> tuple[float, float, float]:
    """MEASURES over the tickets opened and due in the judged days; lateness in calendar hours, 0 for those in time."""
    picked = np.flatnonzero((known.opened >= FIRST) & (known.due < LAST))
    resolved = np.array([LAST if r is None else r for r in world.resolved])[picked]
    late = np.maximum(resolved - known.due[picked], 0)
    cost = known.cost[picked]
    return 100 * float((late > 0).mean()), 100 * float(cost[late > 0].sum() / cost.sum()), float(late.mean() / HOUR)


def replay(seed: int, load: float) -> dict[str, tuple[float, float, float]]:
    """The measures of every rule in one world."""
    world = World(seed, load=load)
    past = history(world, START, BEFORE)
    days = [START + timedelta(days=BEFORE + d) for d in range(JUDGED)]

    def served(order: Order | None, priorities: Callable[[World], dict[str, int]] | None = None) -> World:
        branch = world.branch(order)
        for day in days:
            branch.advance(day, priorities(branch) if priorities is not None else None)
        return branch

    status_quo = served(None)
    known = Known.of(status_quo, past)
    policy = PriorityPolicy(
        kind="priority_queue", cost=COST, capacity_hours={t.name: t.hours_per_week / 5 for t in world.teams}
    )
    out = {
        name: judged(status_quo if order is None else served(order), known)
        for name, order in free_rules(known, policy.late_cost).items()
    }
    out[OURS_DAILY] = judged(served(None, lambda branch: daily_priorities(known, branch, policy)), known)
    return out


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half-width of its 95% interval (Student's t over the seeds)."""
    from scipy.stats import t

    return float(values.mean()), float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def _verdict(differences: dict[str, tuple[float, float]]) -> str:
    worse = [name for name, (mean, half) in differences.items() if mean - half > 0]
    tied = [name for name, (mean, half) in differences.items() if abs(mean) <= half]
    return f"worse than {', '.join(worse)}" if worse else f"best, tied with {', '.join(tied)}" if tied else "best"


def measure(seeds: int, loads: Sequence[float] = LOADS) -> None:
    """Prints the tables for `seeds` worlds at each load."""
    for load in loads:
        began = time.perf_counter()
        runs = [replay(seed, load) for seed in range(FIRST_SEED, FIRST_SEED + seeds)]
        values = {name: np.array([run[name] for run in runs]) for name in runs[0]}
        print(f"\nload {load:g} of capacity, {seeds} seeds, {time.perf_counter() - began:.0f} s; mean ± 95% interval")
        print(f"{'':22s}" + "".join(f"{m:>26s}" for m in MEASURES))
        for name, v in values.items():
            cells = (interval(v[:, m]) for m in range(len(MEASURES)))
            print(f"{name:22s}" + "".join(f"{mean:16.2f} ± {half:7.2f}" for mean, half in cells))
        peers = [name for name in values if name not in (OURS, OURS_PLAIN, OURS_DAILY)]
        for ours in (OURS, OURS_DAILY):
            for m, measure_name in enumerate(MEASURES):
                paired = {peer: interval(values[ours][:, m] - values[peer][:, m]) for peer in peers}
                told = ", ".join(f"{peer} {mean:+.2f} ± {half:.2f}" for peer, (mean, half) in paired.items())
                print(f"{ours}: {measure_name}: {_verdict(paired)} (paired difference to {told})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30, help="worlds at each load, at least 2 (default 30)")
    seeds = parser.parse_args().seeds
    if seeds < 2:
        parser.error("--seeds must be at least 2: an interval needs more than one world")
    measure(seeds)


if __name__ == "__main__":
    main()
