"""Before a workflow goes live: with this holdout, a harm of x is found in y days.

Belongs here: the power of each design, by running its own estimator on the workflow's past with arms redrawn. Does not:
the estimators (``data_checks/regression/effects.py``), reading the past from the lake.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_checks.regression.effects import (
    Design,
    Ints,
    Metric,
    Path,
    RegressionSpec,
    adjusting,
    codes_of,
    days_of,
    floats_of,
    measured,
    moments,
    panel,
    randomised,
    require,
    sequence,
    standardised,
    values_of,
    weekday_level,
)


@dataclass(frozen=True)
class Power:
    """How surely and how soon a harm would be found.

    ``days``: the first day by which it is found with probability ``wanted``, None where the horizon is too short. ``found``:
    probability of a ROLLBACK by the end of each day, shape (horizon_days,); ``low`` and ``high``: 95% interval of the last
    of them, from the number of runs and from how well the history tells the noise.
    """

    metric: str
    design: Design
    treated: str
    control: str
    share: float
    harm: float
    wanted: float
    days: int | None
    found: tuple[float, ...]
    low: float
    high: float
    units: int
    runs: int
    history_days: int

    def sentence(self) -> str:
        return sentence(self)


def sentence(power: Power) -> str:
    """What a power calculation says, for people."""
    noun = "entities a day" if power.design == "entity" else "units"
    start = f"{power.metric}: with {power.share:.0%} as {power.control} ({power.units} {noun} in all)"
    last = f"{power.found[-1]:.0%} ({power.low:.0%} to {power.high:.0%}) within {len(power.found)} days"
    if power.days is None:
        return f"{start}, a harm of {power.harm:.1%} is found in {last}; {power.wanted:.0%} is not reached."
    return f"{start}, a harm of {power.harm:.1%} is found in {power.days} days with {power.wanted:.0%} probability, and in {last}."


def power(  # noqa: PLR0913 - given by name
    history: pa.Table,
    *,
    spec: RegressionSpec,
    design: Design,
    treated: str,
    control: str,
    shares: Mapping[str, float],
    harm: float,
    epoch_days: int,
    washout_days: int = 0,
    metric: str | None = None,
    units: int | None = None,
    wanted: float = 0.8,
    runs: int = 300,
    seed: int = 0,
) -> Power:
    """How soon a harm is found with these arms: the guard itself, run on the workflow's own past with arms redrawn.

    Args:
        history: Rows as `judge` takes them in ``before``: no arm is read, all days count. Design ``entity``: one row an entity.
        harm: As a share of the metric's level; it strikes at once and for good.
        epoch_days, washout_days: As the workflow's arms are drawn.
        metric: Its name; None: the first of the spec. Its part of α is what it has among all metrics.
        units: Clusters' units, or entities a day of all arms; None: as many as the history has. Another number is resampled.
        wanted: The probability that ``days`` is stated for.

    A history shorter than ``pre_days`` + ``horizon_days`` is repeated by whole weeks, which hides how units wander: the answer
    is then hopeful.

    Raises ValueError for an unknown metric or a history of fewer than 14 days (clusters) or none (entities).
    """
    chosen = {m.name: m for m in spec.metrics}.get(metric or spec.metrics[0].name)
    if chosen is None:
        raise ValueError(f"metric: {metric!r} is unknown (allowed here: {', '.join(m.name for m in spec.metrics)})")
    for arm in (treated, control):
        if not shares.get(arm):
            raise ValueError(f"shares: the arm {arm!r} has none; found {dict(shares)}")
    require(history, "history", ["day", "unit", *measured(spec)])
    if not history.num_rows:
        raise ValueError("history: no rows; power needs days of the workflow's own outcomes")
    from scipy.special import ndtr, ndtri

    looks = np.arange(min(spec.burn_in_days, spec.horizon_days - 1), spec.horizon_days)
    rng = np.random.default_rng([seed, 29])
    make = _entity_runs if design == "entity" else _cluster_runs
    one, count, days = make(
        history, spec, chosen, shares, treated, control, harm, looks, epoch_days, washout_days, units, rng
    )
    paths = [one(None) for _ in range(runs)]
    by_day = np.zeros(spec.horizon_days)
    by_day[looks] = np.mean([np.logical_or.accumulate(p.harmful) for p in paths], axis=0)
    # how well the history tells the noise: the same on twenty resampled populations
    noise = [_mean([p.error[-1] / abs(p.level[-1]) for p in (one(g) for _ in range(10))]) for g in range(20)]
    noise, seen = [n for n in noise if math.isfinite(n)], _mean([p.statistic[-1] for p in paths])
    # where no run can be judged at all, no population makes a difference
    judged = len(noise) > 1 and math.isfinite(seen)
    unsure = statistics.stdev(noise) / statistics.fmean(noise) * max(seen, 0.0) if judged else 0.0
    p = float(by_day[-1])
    z = float(ndtri((p * runs + 0.5) / (runs + 1)))
    sd = math.hypot(
        unsure, math.sqrt(max(p * (1 - p), 0.5 / runs) / runs) / (math.exp(-z * z / 2) / math.sqrt(2 * math.pi))
    )
    low, high = float(ndtr(z - 1.96 * sd)), float(ndtr(z + 1.96 * sd))
    enough = np.flatnonzero(by_day >= wanted)
    return Power(
        chosen.name, design, treated, control, shares[control] / math.fsum(shares.values()), harm, wanted,
        int(enough[0]) + 1 if len(enough) else None, tuple(by_day.tolist()), min(low, p), max(high, p),
        count, runs, days,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    known = [float(v) for v in values if np.isfinite(v)]
    return statistics.fmean(known) if known else math.nan


_Run = Callable[[int | None], Path]


def _entity_runs(  # noqa: PLR0913 - given by name
    history: pa.Table, spec: RegressionSpec, metric: Metric, shares: Mapping[str, float], treated: str, control: str,
    harm: float, looks: Ints, epoch_days: int, washout_days: int, units: int | None, rng: np.random.Generator,
) -> tuple[_Run, int, int]:  # fmt: skip
    """Days of the history in the order of the week, entities resampled within a day, arms drawn anew."""
    start = pc.min(history["day"]).as_py()
    since = days_of(history, start)
    numerator, denominator, good = values_of(history, metric)
    covariate = floats_of(history, "covariate") if "covariate" in history.schema.names else np.zeros(history.num_rows)
    weekday = weekday_level(history, metric, start)
    columns = [
        standardised(covariate, covariate[np.isfinite(covariate)]),
        standardised(weekday, weekday)[(start.weekday() + since) % 7],
    ]
    x = np.stack([np.ones(len(since)), *(c for c in columns if c.any()), numerator, denominator], axis=1)[good]
    since = since[good]
    days = int(since.max()) + 1
    a_day = units or round(len(since) / len(np.unique(since)))
    total = math.fsum(shares.values())
    weeks = [np.flatnonzero(since % 7 == d) if days >= 7 else np.arange(len(since)) for d in range(7)]
    q, horizon = x.shape[1], spec.horizon_days
    day = np.repeat(np.arange(horizon), a_day)
    populations: dict[int, list[Any]] = {}

    def one(population: int | None) -> Path:
        pools = weeks
        if population is not None:
            pools = populations.setdefault(population, [w[rng.integers(0, max(len(w), 1), len(w))] for w in weeks])
        picked = np.concatenate([pools[d % 7][rng.integers(0, len(pools[d % 7]), a_day)] for d in range(horizon)])
        place = rng.random(len(day))
        is_treated, is_control = place < shares[treated] / total, place >= 1 - shares[control] / total
        kept = is_treated | is_control
        rows = x[picked[kept]]
        rows[is_treated[kept], q - 2] *= 1 + metric.sign * harm
        group = day[kept] * 2 + is_control[kept]
        sums = moments(rows, group, horizon * 2).reshape(horizon, 2, q, q).cumsum(0)[looks]
        return sequence(sums, looks + 1, metric=metric, spec=spec, information=(looks + 1).astype(np.float64))

    return one, a_day, days


def _cluster_runs(  # noqa: PLR0913 - given by name
    history: pa.Table, spec: RegressionSpec, metric: Metric, shares: Mapping[str, float], treated: str, control: str,
    harm: float, looks: Ints, epoch_days: int, washout_days: int, units: int | None, rng: np.random.Generator,
) -> tuple[_Run, int, int]:  # fmt: skip
    """Units with their own past before and after a day, that day moved by weeks, arms drawn anew every epoch."""
    require(history, "history", ["n"])
    start = pc.min(history["day"]).as_py()
    since = days_of(history, start)
    code, names = codes_of(history, "unit")
    days, m = int(since.max()) + 1, len(names)
    if days < 14:
        raise ValueError(f"history: {days} days; a pre-period and what follows it need 14 at least")
    *values, good = values_of(history, metric)
    place = (since * m + code)[good]
    numerator, denominator = (np.bincount(place, v[good], days * m).reshape(days, m).astype(np.float64) for v in values)
    pre = min(spec.pre_days, max(7, days // 2 // 7 * 7))
    horizon, count = spec.horizon_days, units or m
    usable = days - pre if days - pre >= horizon else max((days - pre) // 7 * 7, min(days - pre, 7))
    shifts = max((days - pre - horizon) // 7, 0) + 1
    total = math.fsum(shares.values())
    edges = np.array([shares[treated] / total, 1 - shares[control] / total])
    epoch = np.arange(horizon) // epoch_days
    counted = (epoch == 0) | (np.arange(horizon) % epoch_days >= washout_days)
    epochs = int(epoch.max()) + 1
    less = spec.model_copy(update={"permutations": min(spec.permutations, 499)})
    populations: dict[int, Ints] = {}

    def one(population: int | None) -> Path:
        pool = np.arange(m)
        if population is not None:
            pool = populations.setdefault(population, rng.integers(0, m, m))
        picked = pool if count == m else pool[rng.integers(0, m, count)]
        shift = 7 * int(rng.integers(0, shifts))
        after = shift + pre + np.arange(horizon) % usable
        n0, d0 = numerator[shift : shift + pre, picked].mean(0), denominator[shift : shift + pre, picked].mean(0)
        own, weight = adjusting(n0, d0, spec.largest_unit)
        arm = np.full((epochs, count), -1)
        for e in range(epochs):
            # as models.policies.arms draws: every arm gets its share of the units, rounded down or up
            place = np.empty(count)
            place[rng.permutation(count)] = (np.arange(count) + rng.random()) / count
            arm[e] = np.where(place < edges[0], 1, np.where(place >= edges[1], 0, -1))
        n, d = numerator[after][:, picked], denominator[after][:, picked]
        n *= np.where(arm[epoch] == 1, 1 + metric.sign * harm, 1.0)
        clusters = panel(n, d, own, weight, arm, epoch, counted, looks, sign=metric.sign)
        said = less if population is None else less.model_copy(update={"permutations": 1})
        return randomised(clusters, looks + 1, metric=metric, spec=said, seed=[int(rng.integers(2**31))])

    return one, count, days
