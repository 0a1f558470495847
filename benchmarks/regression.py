"""Measures the regression guard where the truth is known: 5,000 comparisons of each kind, and how long a judgement takes.

Belongs here: the counts and what is asked of them. Does not: the worlds (``tests/support/comparisons.py``), the guard.

Run: ``python -m benchmarks.regression [--runs 5000]``. Exits with 1 when a claim is missed: false verdicts compatible with 5% (one-sided
binomial at 0.1%), harm of 0.1 sd found in at least 95%, detection as the power calculator promised, no false lift.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from datetime import timedelta

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

from data_checks import regression  # noqa: E402
from data_checks.regression import sequential  # noqa: E402
from tests.support import comparisons as worlds  # noqa: E402

ALPHA = 0.05
FOUND = 0.95


class Table:
    """Rows as they are measured, and the claims that were missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []
        print(f"{'world':<66} {'what':<26} {'count':>13} {'share':>7}   95% interval")

    def row(self, world: str, what: str, hits: np.ndarray) -> tuple[float, float]:
        k, n = int(hits.sum()), len(hits)
        z = 1.96  # Wilson, Journal of the American Statistical Association 1927
        middle, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
        low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        print(f"{world:<66} {what:<28} {k:>6} of {n:>5} {k / n:>7.1%}   {low:.1%} to {high:.1%}", flush=True)
        return low, high

    def at_most_alpha(self, world: str, what: str, hits: np.ndarray) -> None:
        from scipy.stats import binom

        self.row(world, what, hits)
        self.claim(hits.sum() <= binom.ppf(0.999, len(hits), ALPHA), f"{world}: {what} above 5%")

    def claim(self, holds: bool, text: str) -> None:
        if not holds:
            self.missed.append(text)


def falsely(table: Table, runs: int) -> None:
    cases = [(w, s, "higher") for w in worlds.ENTITY_WORLDS for s in (0.5, 0.2)]
    cases += [(w, 0.2, "lower") for w in ("zero-inflated revenue", "1% carry half of the value")]
    for world, share, better in cases:
        found = worlds.entities(world, runs=runs, share=share, seed=1, a_day=200, better=better)
        name = f"entity, {world}, control {share:.0%}, {better} is better"
        table.at_most_alpha(name, "false ROLLBACK", found.rollback > 0)
        table.at_most_alpha(name, "false PROMOTE", found.promote)
        table.row(name, "naive daily z-test", found.naive)
    for world in worlds.BUDGET_WORLDS:
        found = worlds.cohorts(world, runs=runs, units=60, share=1 / 3, seed=2)
        name = f"cohort, {world}, 60 campaigns, a third held out"
        table.at_most_alpha(name, "false ROLLBACK", found.rollback > 0)
        table.at_most_alpha(name, "false PROMOTE", found.promote)
        table.row(name, "naive daily z-test", found.naive)
    for share in (0.5, 0.25):
        found = worlds.switchbacks(runs=runs, teams=12, share=share, seed=3)
        name = f"switchback, 12 teams by week, {share:.0%} held out"
        table.at_most_alpha(name, "false ROLLBACK", found.rollback > 0)
        table.at_most_alpha(name, "false PROMOTE", found.promote)
        table.row(name, "naive daily z-test", found.naive)


def harmed(table: Table, runs: int) -> None:
    day = 0.1 / math.sqrt(2 / 300)
    fixed = ((2 * 1.645) / day) ** 2
    for world in ("plain", "seasonal"):
        found = worlds.entities(world, runs=runs, share=0.5, seed=4, harm=0.1)
        name = f"entity, {world}, 300 an arm a day, harm 0.1 sd"
        table.row(name, "found within 30 days", found.rollback > 0)
        days = found.rollback[found.rollback > 0]
        print(
            f"{'':<66} median day {np.median(days):.0f}, 95% by day {np.quantile(days, 0.95):.0f}; a single look at a day fixed "
            f"beforehand finds half with {(1.645 / day) ** 2:.1f} days, 95% with {fixed:.1f}"
        )
        table.claim(found.found >= FOUND, f"{name}: found in {found.found:.1%}, asked {FOUND:.0%}")


def promised(table: Table, runs: int) -> None:
    """Power from one history, and how often the harm is then found."""
    history = worlds.budgets("seasonal", np.random.default_rng(5), days=112, units=60)
    for harm in (0.05, 0.08, 0.12):
        power = regression.power(
            worlds.as_history({"value": history}), spec=worlds.MORE, design="cohort", treated="champion", control="holdout",
            shares={"holdout": 1, "champion": 2}, harm=harm, epoch_days=worlds.DAYS, runs=500,
        )  # fmt: skip
        _kept(table, power, worlds.cohorts("seasonal", runs=runs, units=60, share=1 / 3, seed=6, harm=harm))
    rng = np.random.default_rng(7)
    missed, due = worlds.tickets(rng, days=112, teams=12, newest=np.full((112, 1, 12), 0.3))
    for harm in (0.03, 0.06):
        found = worlds.switchbacks(runs=runs, teams=12, share=0.5, seed=8, harm=harm)
        power = regression.power(
            worlds.as_history({"missed": missed[:, 0], "due": due[:, 0]}), spec=worlds.LESS, design="switchback",
            treated="champion", control="holdout", shares={"holdout": 1, "champion": 1}, harm=-float(np.median(found.lift)),
            epoch_days=7, washout_days=1, runs=500,
        )  # fmt: skip
        _kept(table, power, found)


def _kept(table: Table, power: regression.Power, found: worlds.Runs) -> None:
    print(f"  {power.sentence()}")
    name = f"{power.design}, harm {power.harm:.0%}, promised {power.low:.0%} to {power.high:.0%}"
    low, high = table.row(name, "found within 30 days", found.rollback > 0)
    table.claim(low <= power.high and high >= power.low, f"{name}: found in {found.found:.1%}")


def uneven(table: Table, runs: int) -> None:
    """Effects that differ by unit and are none in the mean, and what the error that is robust to them costs in power."""
    for share, who in ((0.8, "a canary of a fifth"), (0.2, "a fifth held out")):
        found = worlds.cohorts("seasonal", runs=runs, units=60, share=share, seed=11, uneven=0.35)
        name = f"cohort, {who} of 60, ±35% by unit"
        low, _ = table.row(name, "false ROLLBACK", found.rollback > 0)
        table.claim(low <= 0.06, f"{name}: false ROLLBACK above 6%")
        found = worlds.cohorts("seasonal", runs=runs, units=60, share=share, seed=12, harm=0.08)
        table.row(f"cohort, {who} of 60, harm 8%", "found within 30 days", found.rollback > 0)


def joined(table: Table, runs: int) -> None:
    """Units that are drawn on day 10."""
    for as_zero, how in ((True, "zero before"), (False, "nothing before")):
        name = f"cohort, a third of 60 drawn on day 10, {how}"
        found = worlds.cohorts("seasonal", runs=runs, units=60, share=1 / 3, seed=13, joined=1 / 3, as_zero=as_zero)
        table.row(name, "false ROLLBACK", found.rollback > 0)
        found = worlds.cohorts(
            "seasonal", runs=runs, units=60, share=1 / 3, seed=14, joined=1 / 3, as_zero=as_zero, harm=0.12
        )
        table.row(f"{name}, harm 12%", "found within 30 days", found.rollback > 0)


def replaced(table: Table, runs: int) -> None:
    """Four versions a month, each judged on its own week: how α is spent over the versions of a year."""
    for rule in ("each", "number", "continued", "account"):
        found = worlds.years(rule, runs=10 * runs, seed=15, harm=1.6)
        name = f"48 versions a year, {rule}"
        low, _ = table.row(name, "years with a false ROLLBACK", found.false)
        for k in (0, 3, 11, 47):
            table.row(f"  harm in version {k + 1} alone", "found in its week", found.found[:, k])
        table.row("  harm in one version, the mean of all", "found in its week", found.found.ravel())
        table.claim(rule != "account" or low <= 0.10, f"{name}: above 10% a year")


def told_anew(table: Table, runs: int) -> None:
    """Outcomes that mature by unit."""
    for harm, what in ((0.0, "false ROLLBACK"), (0.08, "found within 30 days")):
        for rule, found in worlds.restated(runs=runs, units=60, share=1 / 3, seed=16, harm=harm).items():
            name = f"cohort, outcomes mature by unit, harm {harm:.0%}, {rule}"
            low, _ = table.row(name, what, found.rollback > 0)
            if (found.rollback > 0).any():
                print(f"{'':<66} median day {np.median(found.rollback[found.rollback > 0]):.0f}")
            table.claim(harm > 0 or rule == "every look" or low <= ALPHA, f"{name}: {what} above 5%")


def shared_arms(table: Table, runs: int) -> None:
    """What `signalbox validate` refuses: entities judged as if independent whose arm is that of their unit."""
    found = worlds.entities("plain", runs=runs, share=0.5, seed=17, a_day=200, units=60)
    table.row("entity, arms of 60 units (refused by validate)", "false ROLLBACK", found.rollback > 0)
    for harm in (0.02, 0.04):
        found = worlds.entities("plain", runs=runs, share=0.5, seed=18, harm=harm)
        table.row(f"entity, plain, 300 an arm a day, harm {harm:.2f} sd", "found within 30 days", found.rollback > 0)


def overstated(table: Table, runs: int) -> None:
    for pools in ("own", "shared"):
        found = worlds.cohorts("seasonal", runs=runs, units=60, share=0.5, seed=9, overstated=1.3, pools=pools)
        mean, error = float(found.lift.mean()), 1.96 * float(found.lift.std()) / math.sqrt(len(found.lift))
        print(f"two equal models, one overstates by 30%, pools {pools}: lift {mean:+.2%} ± {error:.2%}")
        table.row(f"  pools {pools}", "false PROMOTE", found.promote)
        if pools == "own":
            table.claim(abs(mean) <= max(1.5 * error, 0.005), f"own pools: false lift of {mean:+.2%}")
        else:
            table.claim(mean - error > 0.02, "a shared pool shows the false lift no more: the world says nothing")


def speed() -> None:
    rng = np.random.default_rng(10)
    value = worlds.budgets("seasonal", rng, days=worlds.PRE + worlds.DAYS, units=200)
    arm = worlds.arms_of(200, 0.5, 1, rng)
    rows = worlds.as_history({"value": value})
    rows = rows.append_column("arm", [np.where(np.tile(arm[0], len(value)) == 1, "champion", "holdout")])
    rows = rows.append_column("epoch", [["e"] * rows.num_rows]).append_column("washout", [[False] * rows.num_rows])
    start = worlds.START + timedelta(days=worlds.PRE)
    spec = worlds.MORE.model_copy(update={"permutations": 1999})
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        regression.judge(
            rows, rows, spec=spec, design="cohort", treated="champion", control="holdout", shares={"champion": 1, "holdout": 1},
            drawn=None, start=start, day=start + timedelta(days=worlds.DAYS - 1), seed=1,
        )  # fmt: skip
        took.append(time.perf_counter() - begun)
    print(f"judging 200 campaigns, 28 looks, 1,999 permutations: {min(took) * 1000:.0f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5_000)
    runs = parser.parse_args().runs
    begun = time.perf_counter()
    shapes = {shape: sequential.constant(30, ALPHA, shape) for shape in ("pocock", "obrien-fleming")}
    print("constants for 5% over 30 one-sided looks: " + ", ".join(f"{s} {c:.3f}" for s, c in shapes.items()))
    table = Table()
    falsely(table, runs)
    harmed(table, runs)
    promised(table, min(runs, 1_000))
    overstated(table, min(runs, 1_000))
    hard = min(runs, 1_500)
    for measure in (uneven, joined, replaced, shared_arms):
        measure(table, hard)
    told_anew(table, min(runs, 500))
    speed()
    print(f"{time.perf_counter() - begun:.0f} s")
    for text in table.missed:
        print(f"MISSED {text}")
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
