"""Worlds in which two arms are compared: independent entities, persistent budgets with their own pools, a shared ticket queue.

Belongs here: drawing outcomes by arm, many runs at once, and having the guard's estimators judge them day by day; the tests
and ``benchmarks/regression.py`` share it. Does not: what a run must show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from data_checks.regression import effects, sequential
from data_checks.regression.effects import Metric, Path, RegressionSpec

Array = np.ndarray[Any, Any]

ENTITY_WORLDS = ("plain", "seasonal", "zero-inflated revenue", "heavy tails", "1% carry half of the value")


def _outcomes(world: str, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Covariate and outcome of entities who arrive once, of shape (runs, days, entities)."""
    week = 1 + 0.3 * np.sin(np.arange(shape[1]) * 2 * np.pi / 7)[:, None] + 0.01 * np.arange(shape[1])[:, None]
    own = rng.standard_normal(shape)
    noise = rng.standard_normal(shape)
    if world == "plain":
        return own, 10 + own + noise
    if world == "seasonal":
        return own, (10 + own) * week + noise
    if world == "zero-inflated revenue":  # 5% buy, and those who bought before more often
        buys = rng.random(shape) < 0.05 * (1 + 0.5 * np.tanh(own))
        return own, buys * np.exp(3 + noise) * week
    if world == "heavy tails":  # Student's t with 3 degrees of freedom, on a level that the covariate knows
        return own, 10 * week + own + rng.standard_t(3, shape)
    if world == "1% carry half of the value":
        large = np.where(rng.random(shape) < 0.01, 99.0, 1.0)
        value = large * np.exp(0.5 * noise - 0.125) * week
        return np.log(large) + own, value
    raise ValueError(world)


def entity_moments(
    world: str,
    *,
    runs: int,
    days: int,
    a_day: int,
    share: float,
    seed: int,
    harm: float = 0.0,
    chunk: int = 100,
    units: int | None = None,
) -> Iterator[Array]:
    """Moments of (1, covariate, weekday's level, outcome, 1) cumulated by day, shape (runs, days, 2, 5, 5); arm 0 is treated.

    ``share``: of the control; ``harm``: taken from the outcome of the treated. ``units``: how many units the entities belong to,
    which differ by 0.2 and are drawn as wholes; None: every entity is drawn by itself.
    """
    weekday = np.sin(np.arange(days) * 2 * np.pi / 7)
    rng = np.random.default_rng(seed)
    for first in range(0, runs, chunk):
        shape = (min(chunk, runs - first), days, a_day)
        x, y = _outcomes(world, rng, shape)
        treated = rng.random(shape) >= share
        if units is not None:
            who = rng.integers(units, size=shape).reshape(shape[0], -1)
            drawn, level = rng.random((shape[0], units)) >= share, 0.2 * rng.standard_normal((shape[0], units))
            treated = np.take_along_axis(drawn, who, 1).reshape(shape)
            y = y + np.take_along_axis(level, who, 1).reshape(shape)
        y = y - harm * treated
        out = np.empty((shape[0], days, 2, 5, 5))
        for arm, here in enumerate((treated.astype(np.float64), 1.0 - treated)):
            columns = {0: here, 1: x * here, 3: y * here}
            for i, j in ((0, 0), (0, 1), (0, 3), (1, 1), (1, 3), (3, 3)):
                out[:, :, arm, i, j] = np.einsum("rdn,rdn->rd", columns[i], columns[j])
            for i, j in ((0, 2), (1, 2), (2, 3)):
                out[:, :, arm, i, j] = out[:, :, arm, 0, i + j - 2] * weekday
            out[:, :, arm, 2, 2] = out[:, :, arm, 0, 2] * weekday
            out[:, :, arm, :4, 4] = out[:, :, arm, 0, :4]
            out[:, :, arm, 4, 4] = out[:, :, arm, 0, 0]
            above = np.triu_indices(5, 1)
            out[:, :, arm, above[1], above[0]] = out[:, :, arm, above[0], above[1]]
        yield out.cumsum(1)


def naive_z(sums: Array) -> Array:
    """The daily z statistic of (control - treated), without covariate, as a dashboard shows it."""
    n, total, square = sums[..., 0, 0], sums[..., 0, 3], sums[..., 3, 3]
    mean = total / n
    variance = (square / n - mean**2) / (n - 1)
    return np.asarray((mean[..., 1] - mean[..., 0]) / np.sqrt(variance.sum(-1)))


BUDGET_WORLDS = ("plain", "seasonal", "zero-inflated revenue", "heavy tails", "1% carry half of the value")


def budgets(world: str, rng: np.random.Generator, *, days: int, units: int) -> Array:
    """Daily value of campaigns whose budgets persist, shape (days, units): sizes, slow wandering, week, daily noise."""
    size = np.exp(rng.standard_normal(units) * 0.8)
    if world == "1% carry half of the value":
        size = np.where(np.arange(units) < max(1, units // 100), 0.99 * units / max(1, units // 100), 1.0) * size
    wander = np.empty((days, units))
    wander[0] = rng.standard_normal(units)
    for t in range(1, days):  # keeps half of it for two weeks; sd 8%
        wander[t] = 0.95 * wander[t - 1] + np.sqrt(1 - 0.95**2) * rng.standard_normal(units)
    week = (
        1.0
        if world == "plain"
        else (1 + 0.3 * np.sin(np.arange(days) * 2 * np.pi / 7) + 0.01 * np.arange(days))[:, None]
    )
    mean = size * np.exp(0.08 * wander) * week
    if world == "zero-inflated revenue":  # few conversions a day, each worth much or little
        sold = rng.poisson(mean * 0.5)
        return sold * np.exp(rng.standard_normal((days, units)))
    if world == "heavy tails":
        return mean * (1 + 0.3 * rng.standard_t(3, (days, units)))
    return mean * np.exp(0.2 * rng.standard_normal((days, units)))


def arms_of(units: int, share: float, epochs: int, rng: np.random.Generator) -> Array:
    """1 treated, 0 control by epoch and unit, the control's share rounded down or up, as models.policies.arms draws strata."""
    out = np.empty((epochs, units), dtype=np.int64)
    for e in range(epochs):
        place = (rng.permutation(units) + rng.random()) / units
        out[e] = place < 1 - share
    return out


def tickets(
    rng: np.random.Generator, *, days: int, teams: int, newest: Array, runs: int = 1, due: int = 2, ages: int = 12
) -> tuple[Array, Array]:
    """Missed and due tickets a day and team of a queue that a team's hands are shared in, each of shape (days, runs, teams).

    A team has about two and a half days of work before it and works a little harder when it has more. ``newest``, shape (days,
    runs, teams): the share of a day's hands that takes the newest ticket first; the rest takes the oldest. A ticket is
    missed when it still waits at the end of the ``due``-th day after its own, and counts on that day. Backlogs cross from
    week to week.
    """
    size = np.exp(rng.standard_normal((runs, teams)) * 0.5) * 30
    week = np.array([1.2, 1.1, 1.1, 1.0, 0.9, 0.85, 0.85])[np.arange(days) % 7][:, None, None]
    busy = np.exp(0.15 * rng.standard_normal((days, runs, teams)))
    arrivals = rng.poisson(size * week * busy).astype(np.float64)
    waiting = np.zeros((ages, runs, teams))
    waiting[0] = 1.5 * size
    missed, came = np.zeros(arrivals.shape), np.zeros(arrivals.shape)
    for t in range(days):
        waiting[-1] += waiting[-2]
        waiting[1:-1] = waiting[:-2].copy()
        waiting[0] = arrivals[t]
        hands = 0.4 * size + 0.24 * waiting.sum(0)
        for order, share in ((range(ages), newest[t]), (range(ages - 1, -1, -1), 1 - newest[t])):
            left = hands * share
            for age in order:
                took = np.minimum(waiting[age], left)
                waiting[age] -= took
                left -= took
        missed[t] = waiting[due]
        came[t] = arrivals[t - due] if t >= due else 1.0
    return missed, came


def ticket_arms(
    rng: np.random.Generator, *, days: int, teams: int, runs: int, overstated: float
) -> tuple[Array, Array]:
    """Missed tickets and due tickets by arm (0 exact, 1 overstating), each of shape (runs, 2), where the tickets of one team are
    split between two equal models: each ranks by how long a ticket has waited, one says it ``overstated`` times."""
    size = np.full((runs, teams), 30.0)
    busy = np.exp(0.15 * rng.standard_normal((days, runs, teams)))
    arrivals = rng.binomial(rng.poisson(size * busy), 0.5, (2, days, runs, teams)).astype(np.float64)
    ages, due = 12, 2
    rank = np.outer([1.0, overstated], np.arange(ages) + 1.0)
    order = [np.argwhere(rank == value) for value in np.unique(rank)[::-1]]
    waiting = np.zeros((2, ages, runs, teams))
    waiting[:, 0] = 0.75 * size
    missed, came = np.zeros((runs, 2)), np.zeros((runs, 2))
    for t in range(days):
        waiting[:, -1] += waiting[:, -2]
        waiting[:, 1:-1] = waiting[:, :-2].copy()
        waiting[:, 0] = arrivals[:, t]
        left = 0.34 * size + 0.22 * waiting.sum((0, 1))
        for equal in order:  # what ranks the same is taken in proportion
            arm, age = equal.T
            there = waiting[arm, age]
            took = np.minimum(1.0, np.divide(left, there.sum(0), out=np.ones_like(left), where=there.sum(0) > 0))
            waiting[arm, age] = there * (1 - took)
            left = left - (there * took).sum(0)
        if t >= due:
            missed += waiting[:, due].sum(-1).T
            came += arrivals[:, t - due].sum(-1).T
    return missed, came


# ---- judged runs

MORE = RegressionSpec(
    metrics=(Metric(name="value", column="value", better="higher"),), horizon_days=30, permutations=399
)
LESS = RegressionSpec(
    metrics=(Metric(name="missed", column="missed", per="due", better="lower"),), horizon_days=30, permutations=399
)
PRE, DAYS = 14, 30
JOINED = 9
"""Days before the tenth, on which units of a world are drawn late."""
LOOKS = np.arange(MORE.burn_in_days, DAYS)
START = date(2026, 3, 2)


@dataclass(frozen=True)
class Runs:
    """What many simulated comparisons came to, one entry a run."""

    rollback: Array
    """The day of the ROLLBACK, counted from 1; 0: none."""
    promote: Array
    """Whether harm was ever excluded."""
    lift: Array
    """Estimated gain at the last look, as a share of the control's level."""
    naive: Array
    """Whether a daily z-test over rows, without α spent, ever rejects."""

    @property
    def found(self) -> float:
        return float((self.rollback > 0).mean())


def _runs(paths: list[Path], naive: list[Any], metric: Metric) -> Runs:
    harmful = np.stack([p.harmful for p in paths])
    last = np.array([-metric.sign * p.effect[-1] / abs(p.level[-1]) for p in paths])
    first = np.where(harmful.any(1), LOOKS[harmful.argmax(1)] + 1, 0)
    return Runs(first, np.array([p.harmless.any() for p in paths]), last, np.array(naive))


def entities(
    world: str,
    *,
    runs: int,
    share: float,
    seed: int,
    a_day: int = 600,
    harm: float = 0.0,
    better: str = "higher",
    units: int | None = None,
) -> Runs:
    """Independent entities; harm in the outcome's unit, the share is the control's, ``units`` as `entity_moments` takes it."""
    spec = MORE.model_copy(update={"metrics": (Metric(name="value", column="value", better=better),)})  # type: ignore[arg-type]
    first, promote, lift, naive = [], [], [], []
    sign = spec.metrics[0].sign
    for sums in entity_moments(
        world, runs=runs, days=DAYS, a_day=a_day, share=share, seed=seed, harm=-sign * harm, units=units
    ):
        path = effects.sequence(sums[:, LOOKS], LOOKS + 1, metric=spec.metrics[0], spec=spec)
        first.append(np.where(path.harmful.any(1), LOOKS[path.harmful.argmax(1)] + 1, 0))
        promote.append(path.harmless.any(1))
        lift.append(-sign * path.effect[:, -1] / np.abs(path.level[:, -1]))
        naive.append((-sign * naive_z(sums) > 1.645).any(1))
    return Runs(*(np.concatenate(x) for x in (first, promote, lift, naive)))


def _rows_z(n: Array, treated: Array) -> bool:
    """Whether a z-test over unit-days as if they were independent ever finds the treated lower."""
    k = np.arange(1, len(n) + 1)
    parts = []
    for v in (n[:, treated], n[:, ~treated]):
        rows = k * v.shape[1]
        mean = np.cumsum(v.sum(1)) / rows
        parts.append((mean, (np.cumsum((v**2).sum(1)) / rows - mean**2) / rows))
    (m1, v1), (m0, v0) = parts
    with np.errstate(divide="ignore", invalid="ignore"):
        return bool(((m0 - m1) / np.sqrt(v1 + v0) > 1.645)[LOOKS].any())


def cohorts(
    world: str,
    *,
    runs: int,
    units: int,
    share: float,
    seed: int,
    harm: float = 0.0,
    overstated: float = 1.0,
    pools: str = "own",
    uneven: float = 0.0,
    since: int = 0,
    joined: float = 0.0,
    as_zero: bool = False,
) -> Runs:
    """Campaigns whose budgets persist, arms drawn once. ``harm``: share of the treated value that is lost, from day ``since``.
    ``uneven``: the share by which one half of the treated gains and the other half loses. ``joined``: the share of campaigns
    that are drawn on day 10; ``as_zero``: whether the days before count as zero, which they must not.

    ``overstated``: both arms reallocate budgets with equally good models, the treated one's estimates multiplied by this;
    ``pools``: each arm its own money, or one pool that is ``shared``.
    """
    rng = np.random.default_rng(seed)
    paths, naive = [], []
    for run in range(runs):
        value = budgets(world, rng, days=PRE + DAYS, units=units)
        arm = arms_of(units, share, 1, rng)
        own, weight = effects.adjusting(value[:PRE].mean(0), np.ones(units), MORE.largest_unit)
        late = np.arange(DAYS)[:, None] >= since
        after = value[PRE:] * np.where((arm[0] == 1) & late, 1 - harm, 1.0)
        if uneven:
            after = after * np.where(arm[0] == 1, 1 + uneven * rng.choice([-1, 1], units), 1.0)
        if overstated != 1.0:
            after = after * reallocated(rng, value[:PRE].mean(0), arm[0], overstated, pools)
        there = np.ones_like(after)
        if joined:
            new = rng.random(units) < joined
            own, weight = np.where(new, 0.0, own), np.where(new, 1.0, weight)
            there[:JOINED, new] = 0.0
        counted = np.ones_like(after) if as_zero else there
        none = np.zeros(DAYS, dtype=np.int64)
        clusters = effects.panel(after * there, counted, own, weight, arm, none, none == 0, LOOKS)
        paths.append(effects.randomised(clusters, LOOKS + 1, metric=MORE.metrics[0], spec=MORE, seed=[seed, run]))
        naive.append(_rows_z(after, arm[0] == 1))
    return _runs(paths, naive, MORE.metrics[0])


@dataclass(frozen=True)
class Years:
    """Years of versions that are each replaced after a week."""

    false: Array
    """Whether a year has a ROLLBACK of a version that does nothing, shape (runs,)."""
    found: Array
    """Whether a version is found out in its own week that does harm while those before it did not, shape (runs, versions)."""


def years(rule: str, *, runs: int, seed: int, harm: float, count: int = 48, alpha: float = 0.05) -> Years:
    """Versions whose weeks are normal walks of daily steps; the statistic alone, as `cohorts` and `entities` show it to be.

    Args:
        rule: ``each``: every version spends as one that stands alone; ``number``: the k-th α·6/(π²k²); ``account``: as
            `sequential.left` says; ``continued``: four versions share one comparison of 28 days, with its data.
        harm: In standard deviations of a day's step.
    """
    rng = np.random.default_rng(seed)
    looks = np.arange(MORE.burn_in_days, 28 if rule == "continued" else 7)
    horizon = MORE.horizon_days
    alphas: list[float] = []
    begun: list[tuple[date, date]] = []
    for k in range(count):
        first = START + timedelta(days=7 * k)
        account = sequential.left(begun, first, alpha, horizon, "early")
        begun.append((first, first + timedelta(days=6)))
        alphas.append({"number": alpha * 6 / (np.pi**2 * (k + 1) ** 2), "account": account}.get(rule, alpha))
    steps = rng.standard_normal((runs, count, 7))
    weeks, new = (steps, 1) if rule != "continued" else (steps.reshape(runs, count // 4, 28), 4)
    false, found = np.zeros(runs, dtype=bool), np.zeros((runs, count), dtype=bool)
    days = looks + 1.0
    for k in range(count):
        spending = sequential.spent(days / horizon, alphas[k], "early")
        bound = np.array(sequential.normal_bounds(tuple(days.tolist()), tuple(spending.tolist())))
        at = k % new * 7
        week = weeks[:, k // new]
        late = np.where((np.arange(week.shape[1]) >= at) & (np.arange(week.shape[1]) < at + 7), harm, 0.0)
        own = (looks >= at) & (looks < at + 7)
        crossed = week.cumsum(1)[:, looks] / np.sqrt(days) > bound
        false |= crossed[:, own].any(1)
        hit = (week + late).cumsum(1)[:, looks] / np.sqrt(days) > bound
        found[:, k] = hit[:, own].any(1)
    return Years(false, found)


def restated(*, runs: int, units: int, share: float, seed: int, harm: float = 0.0) -> dict[str, Runs]:
    """Campaigns whose outcomes become known over days, at a pace of their own, judged every day with what is known by then.

    By rule: ``every look``: a ROLLBACK from any look of any day's sequence; ``the newest``: from the newest of each day alone,
    as the guard does.
    """
    rng = np.random.default_rng(seed)
    first: dict[str, list[int]] = {"every look": [], "the newest": []}
    metric = MORE.metrics[0]
    for run in range(runs):
        value = budgets("seasonal", rng, days=PRE + DAYS, units=units)
        arm = arms_of(units, share, 1, rng)
        value[PRE:] *= np.where(arm[0] == 1, 1 - harm, 1.0)
        pace = 1.5 * np.exp(0.8 * rng.standard_normal(units))

        def known(day: int, value: Array = value, pace: Array = pace) -> Array:
            age = (day - np.arange(day + 1))[:, None]
            return np.asarray(value[: day + 1] * (1 - np.exp(-(age + 1) / pace)))

        own, weight = effects.adjusting(known(PRE - 1).mean(0), np.ones(units), MORE.largest_unit)
        hits = dict.fromkeys(first, 0)
        for day in range(MORE.burn_in_days, DAYS):
            looks, none = LOOKS[day >= LOOKS], np.zeros(day + 1, dtype=np.int64)
            after = known(PRE + day)[PRE:]
            clusters = effects.panel(after, np.ones_like(after), own, weight, arm, none, none == 0, looks)
            path = effects.randomised(clusters, looks + 1, metric=metric, spec=MORE, seed=[seed, run])
            for rule, harmful in (("every look", path.harmful.any()), ("the newest", path.harmful[-1])):
                hits[rule] = hits[rule] or (day + 1 if harmful else 0)
            if all(hits.values()):
                break
        for rule in first:
            first[rule].append(hits[rule])
    nothing = np.zeros(runs)
    return {rule: Runs(np.array(days), nothing > 0, nothing, nothing > 0) for rule, days in first.items()}


def reallocated(rng: np.random.Generator, spend: Array, arm: Array, overstated: float, pools: str) -> Array:
    """What a reallocation makes of each campaign's value: value = A·√spend, the optimum puts money in proportion to A², moves of
    half at most, and what is missing or over in a pool is shared out evenly."""
    truth = np.exp(0.3 * rng.standard_normal(len(spend)))
    said = truth * np.exp(0.2 * rng.standard_normal(len(spend))) * np.where(arm == 1, overstated, 1.0)
    factor = np.empty(len(spend))
    for pool in [arm == 1, arm == 0] if pools == "own" else [np.ones(len(spend), dtype=bool)]:
        best = said[pool] ** 2
        wanted = np.clip(best * spend[pool].sum() / (best * spend[pool]).sum(), 0.5, 1.5)
        factor[pool] = wanted * spend[pool].sum() / (wanted * spend[pool]).sum()
    return np.sqrt(factor)


def switchbacks(*, runs: int, teams: int, share: float, seed: int, base: float = 0.3, harm: float = 0.0) -> Runs:
    """Teams with a queue each, arms redrawn every week, one day of wash-out. ``harm``: more of the hands on the newest ticket."""
    rng = np.random.default_rng(seed)
    epoch = np.arange(DAYS) // 7
    arm = np.stack([arms_of(teams, share, int(epoch.max()) + 1, rng) for _ in range(runs)])
    newest = np.full((PRE + DAYS, runs, teams), base)
    newest[PRE:] += harm * arm[:, epoch].transpose(1, 0, 2)
    missed, due = tickets(rng, days=PRE + DAYS, teams=teams, newest=newest, runs=runs)
    counted = (epoch == 0) | (np.arange(DAYS) % 7 >= 1)
    paths, naive = [], []
    for run in range(runs):
        own, weight = effects.adjusting(missed[:PRE, run].mean(0), due[:PRE, run].mean(0), LESS.largest_unit)
        clusters = effects.panel(missed[PRE:, run], due[PRE:, run], own, weight, arm[run], epoch, counted, LOOKS)
        paths.append(effects.randomised(clusters, LOOKS + 1, metric=LESS.metrics[0], spec=LESS, seed=[seed, run]))
        # by ticket, as if tickets were independent
        on = arm[run][epoch] == 1
        c = [np.cumsum((v * m).sum(1))[LOOKS] for m in (on, ~on) for v in (missed[PRE:, run], due[PRE:, run])]
        with np.errstate(divide="ignore", invalid="ignore"):
            p1, p0 = c[0] / c[1], c[2] / c[3]
            naive.append(bool(((p1 - p0) / np.sqrt(p1 * (1 - p1) / c[1] + p0 * (1 - p0) / c[3]) > 1.645).any()))
    return _runs(paths, naive, LESS.metrics[0])


def as_history(values: dict[str, Array], n: Array | None = None) -> pa.Table:
    """Columns of shape (days, units) as rows a day and unit, from START on."""
    days, units = next(iter(values.values())).shape
    return pa.table(
        {
            "day": pa.array(np.repeat(np.array([START + timedelta(days=i) for i in range(days)]), units), pa.date32()),
            "unit": [f"u{i:04d}" for i in range(units)] * days,
            "n": np.ones(days * units) if n is None else n.ravel(),
            **{name: v.ravel() for name, v in values.items()},
        }
    )
