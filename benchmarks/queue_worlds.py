"""Hostile worlds for the replay of the ticket queue: how often ROLLBACK and HOLD are false, and how soon a gross harm is found.

Belongs here: the worlds, simulated apart from the product's own ticket world, and the counts. Does not: replay and test
(``data_checks/regression/queue_replay.py``, ``data_checks/regression/matched_test.py``).

Run: ``python -m benchmarks.queue_worlds [--months 400] [--only NAME]``. Exits with 1 where an aim is missed; prints what was missed.

A month is 12 teams, 4 weeks before and 4 under arms drawn by team and week. Time is working hours: 10 a day, 5 days a week, so there
are 20 looks a month. The order that is asked for turns the priorities around, in every world: by the replay it always does harm. Where
it is ``obeyed`` it truly does; elsewhere the teams leave it aside, and an alert is false. In all worlds work takes a fifth more or
less than the effort that is logged for it, and the hands vary by day.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

from data_checks.regression import matched_test  # noqa: E402
from data_checks.regression.queue_replay import QueueReplay, Shifts, TeamWeek, serve  # noqa: E402

DAY, WEEK, BEFORE, LIVE = 10.0, 50.0, 4, 4
ALLOWED = np.array([4.0, 6.0, 10.0, 20.0, 40.0])
BURN_IN = 3
LOAD = 0.955
"""Expected work over working hours: chosen, on other seeds, so that obeying a turned order costs 15 points on time."""
FIRST_SEED = 9000


@dataclass(frozen=True)
class Case:
    """One world; ``obeyed``: the share of tickets whose order follows what was asked for, in treated teams."""

    name: str
    obeyed: float = 0.0
    teams: int = 12
    sigma: float = 0.8
    """Spread of the log efforts."""
    giant: bool = False
    habits: bool = False
    """From the first live day on every team takes most tickets newest first."""
    capacity: bool = False
    """In live weeks every team loses 5% to 25% of its hours, and no roster shows it."""
    batching: float = 0.0
    """Share of the work that treated teams save by working in batches; the logged effort stays."""
    reassigned: float = 0.0
    """Share of tickets that held-out teams hand to treated ones."""
    logged: float = 1.0
    """Factor on the efforts that treated teams log; the work stays."""

    @property
    def harmful(self) -> bool:
        return self.obeyed > 0 and not self.batching


HARM = 1.0
CASES = (
    Case("null: what is asked for is left aside"),
    Case("gross harm", obeyed=HARM),
    Case("all teams change their habits", habits=True),
    Case("unlogged capacity fall in all teams", capacity=True),
    Case("batching helps", obeyed=0.2, batching=0.2),
    Case("heavy tails, null", sigma=1.5),
    Case("heavy tails, gross harm", sigma=1.5, obeyed=HARM),
    Case("tickets reassigned to treated teams", reassigned=0.12),
    Case("one giant team, null", giant=True),
    Case("one giant team, gross harm", giant=True, obeyed=HARM),
    Case("six teams, null", teams=6),
    Case("six teams, gross harm", teams=6, obeyed=HARM),
    Case("treated teams log shorter efforts", logged=0.85),
)


@dataclass
class Tickets:
    """All tickets of a month, with the truth; arrays of shape (tickets,)."""

    team: Any
    opened: Any
    due: Any
    effort: Any
    work: Any
    category: Any
    priority: Any
    follows: Any
    """Uniform draw: follows the order asked for where below the world's share."""
    newest: Any
    """Uniform draw: is taken newest first where habits change."""


def _requests(case: Case, rng: np.random.Generator) -> tuple[Tickets, Any]:
    """Tickets, and hands by team."""
    hands = rng.integers(2, 5, case.teams)
    if case.giant:
        hands[0] = 20
    hours = np.exp(rng.normal(0.3, 0.5, case.teams * 3))
    parts = []
    for team in range(case.teams):
        shares = rng.dirichlet([4.0, 3.0, 2.0])
        usual = float(shares @ hours[team * 3 : team * 3 + 3])
        count = int(rng.poisson(LOAD * 0.95 * hands[team] * WEEK * (BEFORE + LIVE) / usual))
        parts.append(np.stack([np.full(count, team), team * 3 + rng.choice(3, count, p=shares)]))
    team, category = np.concatenate(parts, axis=1)
    n = len(team)
    opened = rng.random(n) * WEEK * (BEFORE + LIVE)
    priority = rng.choice(5, n, p=[0.06, 0.13, 0.52, 0.17, 0.12])
    effort = hours[category] * np.exp(case.sigma * rng.standard_normal(n) - case.sigma**2 / 2)
    work = effort * np.exp(0.2 * rng.standard_normal(n))
    tickets = Tickets(
        team, opened, opened + ALLOWED[priority], effort, work, category, priority, rng.random(n), rng.random(n)
    )
    return tickets, hands


def _arms(case: Case, share: float, rng: np.random.Generator) -> Any:
    """Treated by week and team: each week held out is the share, rounded up or down by a coin."""
    treated = np.ones((LIVE, case.teams), dtype=bool)
    for week in range(LIVE):
        many = int(np.clip(np.floor(share * case.teams + rng.random()), 1, case.teams - 1))
        treated[week, rng.permutation(case.teams)[:many]] = False
    return treated


@dataclass(frozen=True)
class Scene:
    """All that a month has before it is lived: its tickets, where each is worked on, and the hands."""

    case: Case
    tickets: Tickets
    team: Any
    moved: Any
    """Whether a held-out team handed the ticket on."""
    treated: Any
    """Shape (live weeks, teams)."""
    rosters: list[list[Shifts]]
    """By team and week, as logged."""
    lost: Any
    """Share of the hours that no roster shows as lost; shape (live weeks, teams)."""


@dataclass
class Lived:
    """What became of the tickets: when done, and what was worked on each before each week began."""

    done: Any
    worked: Any
    """Shape (weeks, tickets): hours."""


def _live(scene: Scene, acting: bool) -> Lived:
    """Serves every team week by week; not ``acting``: as if nobody had been treated."""
    case, tickets, team, treated = scene.case, scene.tickets, scene.team, scene.treated
    n, weeks = len(team), BEFORE + LIVE
    done, left, worked = np.full(n, np.inf), tickets.work.copy(), np.zeros((weeks, n))
    for t, own in enumerate(scene.rosters):
        mine = np.flatnonzero(team == t)
        for week in range(weeks):
            start, end = week * WEEK, (week + 1) * WEEK
            worked[week, mine] = tickets.work[mine] - left[mine]
            at = mine[(tickets.opened[mine] < end) & ~np.isfinite(done[mine])]
            live = week - BEFORE
            acts = acting and live >= 0 and bool(treated[live, t])
            key = tickets.priority[at].astype(float)
            if case.habits and live >= 0:
                key = np.where(tickets.newest[at] < 0.6, -tickets.opened[at], key)
            if acts:
                key = np.where(tickets.follows[at] < case.obeyed, 4.0 - tickets.priority[at], key)
            pace = 1.0 - (case.batching if acts else 0.0)
            pace /= 1.0 - (scene.lost[live, t] if live >= 0 else 0.0)
            key = np.where(left[at] < tickets.work[at], -np.inf, key)
            need = left[at] * pace
            found, still = serve(np.maximum(tickets.opened[at], start), need, key, own[week])
            done[at], left[at] = found, still / pace
    return Lived(done, worked)


def month(
    case: Case, share: float, seed: int, spec: matched_test.MatchedSpec, *, logged: bool = True
) -> tuple[list[matched_test.Look], float]:
    """The looks of one month, and the true effect on the treated: late tickets more than left alone, as a share."""
    rng = np.random.default_rng([seed, 1])
    tickets, hands = _requests(case, rng)
    treated = _arms(case, share, np.random.default_rng([seed, 2]))
    rosters = []
    for t in range(case.teams):
        own = []
        for week in range(BEFORE + LIVE):
            opens = week * WEEK + DAY * np.arange(5.0)
            own.append(
                Shifts(opens, opens + DAY, np.maximum(hands[t] - rng.binomial(hands[t], 0.05, 5), 1).astype(float))
            )
        rosters.append(own)
    lost = rng.uniform(0.05, 0.25, treated.shape) if case.capacity else np.zeros(treated.shape)
    team, moved = tickets.team.copy(), np.zeros(len(tickets.team), dtype=bool)
    if case.reassigned:
        live = (tickets.opened // WEEK).astype(int) - BEFORE
        held = (live >= 0) & ~treated[np.maximum(live, 0), team]
        moved = held & (rng.random(len(team)) < case.reassigned)
        for i in np.flatnonzero(moved):
            team[i] = rng.choice(np.flatnonzero(treated[live[i]]))
    scene = Scene(case, tickets, team, moved, treated, rosters, lost)
    lived, alone = _live(scene, True), _live(scene, False)
    replay = _logged(scene, lived, logged)
    days = range(BURN_IN, LIVE * 5 + 1)
    ends = [BEFORE * WEEK + day * DAY for day in days]
    looks = [
        (float((day - 1) // 5 * 7 + (day - 1) % 5 + 1), replay.at(end)) for day, end in zip(days, ends, strict=True)
    ]
    when = (tickets.due // WEEK).astype(int) - BEFORE
    counted = (when >= 0) & (when < LIVE)
    counted &= treated[np.clip(when, 0, LIVE - 1), team]
    late, otherwise = (float((x.done > tickets.due)[counted].mean()) for x in (lived, alone))
    told = matched_test.judge(looks, spec=spec, seed=seed, again=lambda k, shift: replay.shifted(shift).at(ends[k]))
    return told, late - otherwise


def _logged(scene: Scene, lived: Lived, logged: bool) -> QueueReplay:
    """What the systems show of a month, as the replay reads it."""
    case, tickets, team, treated = scene.case, scene.tickets, scene.team, scene.treated
    effort = tickets.effort.copy()
    if case.logged != 1.0:
        live = np.clip((np.minimum(lived.done, WEEK * (BEFORE + LIVE) - 1) // WEEK).astype(int) - BEFORE, -1, LIVE - 1)
        effort[(live >= 0) & treated[live, team]] *= case.logged
    early = lived.done <= BEFORE * WEEK
    sums = np.bincount(tickets.category[early], effort[early], case.teams * 3)
    counts = np.bincount(tickets.category[early], minlength=case.teams * 3)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), float(effort[early].mean()))
    weeks: list[TeamWeek] = []
    for week in range(BEFORE + LIVE):
        start, end = week * WEEK, (week + 1) * WEEK
        for t in range(case.teams):
            at = np.flatnonzero((team == t) & (tickets.opened < end) & (lived.done > start))
            key = tickets.priority[at].astype(float)
            resolved = np.where(np.isfinite(lived.done[at]), lived.done[at], np.nan)
            weeks.append(
                TeamWeek(
                    t, week, bool(week >= BEFORE and treated[week - BEFORE, t]), start, end, tickets.opened[at], tickets.due[at],
                    resolved, np.where(np.isfinite(resolved), effort[at], np.nan), lived.worked[week, at], tickets.category[at],
                    key, 4.0 - key, scene.moved[at], scene.rosters[t][week],
                )
            )  # fmt: skip
    cut = BEFORE * case.teams
    return QueueReplay(weeks[cut:], weeks[:cut], means, logged=logged)


def interval(k: int, n: int) -> str:
    """The share with its 95% interval (Clopper and Pearson)."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return f"{k / n:6.1%} ({low:.1%} to {high:.1%})"


def measured(
    case: Case, share: float, months: int, spec: matched_test.MatchedSpec, *, logged: bool = True
) -> list[str]:
    """Prints one world's row; returns what was missed."""
    first: dict[str, list[float | None]] = {"ROLLBACK": [], "HOLD": []}
    effects = []
    for k in range(months):
        looks, effect = month(case, share, FIRST_SEED + k, spec, logged=logged)
        effects.append(effect)
        for name, day in matched_test.told(looks).items():
            first[name].append(day)
    missed, row = [], []
    for name, days in first.items():
        found = sorted(d for d in days if d is not None)
        week = sum(d <= 7 for d in found)
        row.append(
            f"{name} {interval(len(found), months)}, by day 7 {week / months:.0%}, median day {np.median(found) if found else '-'}"
        )
        plain = case.name == "gross harm"
        if name == "ROLLBACK" and not case.harmful and len(found) > 0.06 * months:
            missed.append(f"ROLLBACK false in {len(found) / months:.1%}, aim 6%")
        if name == "ROLLBACK" and plain and len(found) < (0.95 if share >= 0.5 else 0.85) * months:
            missed.append(f"ROLLBACK found in {len(found) / months:.1%}, aim {0.95 if share >= 0.5 else 0.85:.0%}")
        if name == "HOLD" and plain and week < 0.90 * months:
            missed.append(f"HOLD by day 7 in {week / months:.1%}, aim 90%")
    print(f"{case.name:<38} {share:.0%} held out, true effect {np.mean(effects):+.1%}: {'; '.join(row)}", flush=True)
    return [f"{case.name}, {share:.0%} held out: {text}" for text in missed]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--months", type=int, default=400)
    parser.add_argument("--permutations", type=int, default=999)
    parser.add_argument("--only", default="")
    parser.add_argument("--share", type=float, default=None)
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--effort-z", type=float, default=matched_test.MatchedSpec.effort_z)
    parser.add_argument("--means", action="store_true", help="replay with the categories' mean efforts alone")
    given = parser.parse_args()
    spec = matched_test.MatchedSpec(permutations=given.permutations, alpha=given.alpha, effort_z=given.effort_z)
    begun, missed = time.perf_counter(), []
    for case in CASES:
        for share in (0.2, 0.5):
            if given.only in case.name and given.share in (None, share):
                missed += measured(case, share, given.months, spec, logged=not given.means)
    print(
        f"{given.months} months a world, efforts {'by category' if given.means else 'as logged'}, {time.perf_counter() - begun:.0f} s"
    )
    for text in missed:
        print(f"MISSED {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
