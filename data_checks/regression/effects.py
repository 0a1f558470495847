"""How far two arms lie apart and how sure that is: the estimators of the three designs, look by look.

Belongs here: what a comparison may say (`Metric`, `RegressionSpec`), estimates with their errors and bounds, reading rows into
arrays. Does not: verdicts (``data_checks/regression.py``), boundaries as such (``data_checks/regression/sequential.py``).

- ``entity``: outcomes are independent. Difference of the arms' means, each adjusted by its own regression on the covariate
  and on the pre-period's weekday (Lin, Annals of Applied Statistics 2013); it is nearly normal, and α is spent over the looks
  (Lan and DeMets, Biometrika 1983).
- ``cohort`` and ``switchback``: the cluster is a unit in an epoch. Its cumulative outcome, adjusted for its own pre-period
  (ANCOVA, centred within epoch and stratum); arms are permuted within epoch, stratum and time of entry, as they were drawn; α
  is spent over the looks on the permuted paths themselves, so that no distribution is assumed. A unit counts at most as much
  as ``largest_unit`` average ones.

Ratios are linearised (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, field_validator

from data_checks.regression import sequential

Design = Literal["entity", "cohort", "switchback"]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


MOST_PERMUTATIONS = 9_999
"""Permutations at most where earlier comparisons have left little of α, unless the spec asks for more."""


class Metric(BaseModel):
    """One figure by which two arms are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="What people call it")
    column: str = Field(
        min_length=1, description="Numerator: a column of the outcomes, summed over a unit's rows of a day"
    )
    per: str | None = Field(
        default=None,
        description="Denominator column of a ratio metric (cost per click); null: the mean per row or entity",
    )
    better: Literal["higher", "lower"] = Field(description="Which direction is better")
    margin: float = Field(
        default=0.0, ge=0, lt=1, description="Harm up to this share of the control's level is tolerated"
    )
    weight: float = Field(default=1.0, gt=0, description="This metric's share of α, among the weights of all metrics")

    @property
    def sign(self) -> float:
        """Turns (treated - control) into harm."""
        return 1.0 if self.better == "lower" else -1.0


class RegressionSpec(BaseModel):
    """The section `regression` of a workflow.yaml: what counts as harm, and how sure a verdict must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: tuple[Metric, ...] = Field(min_length=1, description="What is compared; α is split over them by weight")
    alpha: float = Field(
        default=0.05,
        gt=0,
        lt=0.5,
        description="Chance of a false ROLLBACK over all looks and metrics of a comparison together, at most; all versions of a "
        "year together spend twice of it at most",
    )
    spending: sequential.Spending = Field(
        default="early",
        description="How α is spent over the looks: early finds a large harm within days; late finds a small "
        "one somewhat more surely by the end, and nothing in the first third",
    )
    horizon_days: int = Field(
        default=30, gt=0, description="Days after which a comparison ends, with or without a verdict"
    )
    burn_in_days: int = Field(
        default=2, ge=0, description="First days whose outcomes count but on which nothing is judged"
    )
    pre_days: int = Field(default=14, ge=0, description="Days before the start from which a unit's own level is taken")
    min_clusters: int = Field(default=8, ge=4, description="Fewer clusters (cohort, switchback) give no verdict")
    min_entities: int = Field(
        default=100, ge=4, description="Fewer entities in an arm (design entity) give no verdict yet"
    )
    srm_alpha: float = Field(
        default=0.001, gt=0, lt=0.5, description="Arms that came out as uneven as this by chance refuse a verdict"
    )
    permutations: int = Field(default=1999, ge=99, description="Draws of the randomisation test (cohort, switchback)")
    largest_unit: float | None = Field(
        default=2.0,
        gt=0,
        description="A cluster's unit counts at most as much as this many average units of the pre-period; null: by its size",
    )

    @field_validator("metrics")
    @classmethod
    def _distinct(cls, metrics: tuple[Metric, ...]) -> tuple[Metric, ...]:
        names = [m.name for m in metrics]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} stands twice; a metric's name is given once")
        return metrics

    def alpha_of(self, metric: Metric, alpha: float | None = None) -> float:
        """This metric's part of an α; None: of the whole."""
        whole = self.alpha if alpha is None else alpha
        return whole * metric.weight / math.fsum(m.weight for m in self.metrics)


@dataclass(frozen=True)
class Path:
    """One metric's looks as arrays of shape (looks,); effect is treated - control."""

    effect: Floats
    error: Floats
    level: Floats
    statistic: Floats
    """(harm - margin) / error."""
    bound: Floats
    promote: Floats
    """The same on the side of PROMOTE: proven when -statistic lies above it."""
    spent: Floats
    harmful: Bools
    harmless: Bools
    n_treated: Ints
    n_control: Ints


# ---- independent entities


def moments(columns: Floats, group: Ints, groups: int) -> Floats:
    """Sums of products by group: shape (groups, q, q) of columns of shape (rows, q)."""
    q = columns.shape[1]
    out = np.empty((groups, q, q))
    for i in range(q):
        for j in range(i, q):
            out[:, i, j] = out[:, j, i] = np.bincount(group, columns[:, i] * columns[:, j], groups)
    return out


def difference(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Adjusted difference of two arms from their moments.

    Args:
        sums: Cumulated moments of (1, covariates..., numerator, denominator), shape (..., 2, q, q); arm 0 is treated.

    Returns:
        treated - control, its standard error, and the control's level, each of shape (...). Every arm's ratio is linearised
        around itself, R + (N - R·D)/mean(D), then regressed on the covariates and predicted at the common mean. The error takes
        the larger of two variances, each arm's own and both arms' together: of few skewed outcomes the smaller arm knows its
        variance badly, and just then when its mean is off (1% of entities carry half of the value, a fifth in the control:
        one side was missed in 14% of runs with its own variance alone, where 5% are allowed).
    """
    q = sums.shape[-1]
    k = q - 3
    with np.errstate(divide="ignore", invalid="ignore"):
        n = sums[..., 0, 0]
        mean = sums[..., 0, :] / n[..., None]
        covariance = sums / n[..., None, None] - mean[..., :, None] * mean[..., None, :]
        ratio = mean[..., q - 2] / mean[..., q - 1]
        # L = R + (N - R D) / mean(D): the last two columns become one
        turn = np.stack([1 / mean[..., q - 1], -ratio / mean[..., q - 1]], axis=-1)
        spread = np.einsum("...i,...ij,...j->...", turn, covariance[..., q - 2 :, q - 2 :], turn)
        effect, between = ratio[..., 0] - ratio[..., 1], 0.0
        if k:
            x = covariance[..., 1 : k + 1, 1 : k + 1]
            along = np.einsum("...ij,...j->...i", covariance[..., 1 : k + 1, q - 2 :], turn)
            usable = np.asarray(np.isfinite(x).all((-1, -2)))[..., None, None]
            slope = np.linalg.solve(np.where(usable, x, 0.0) + 1e-9 * np.eye(k), along[..., None])[..., 0]
            spread = np.maximum(spread - (slope * along).sum(-1), 0)
            common = (mean[..., 1 : k + 1] * n[..., None]).sum(-2) / n.sum(-1)[..., None]
            shift = (slope * (mean[..., 1 : k + 1] - common[..., None, :])).sum(-1)
            effect = effect - (shift[..., 0] - shift[..., 1])
            gap = slope[..., 0, :] - slope[..., 1, :]
            both = (x * n[..., None, None]).sum(-3) / n.sum(-1)[..., None, None]
            between = np.einsum("...i,...ij,...j->...", gap, both, gap) / n.sum(-1)
        freedom = n - 1 - k
        apart = (spread / freedom).sum(-1)
        pooled = (spread * n).sum(-1) / freedom.sum(-1) * (1 / n).sum(-1)
        return effect, np.sqrt(np.maximum(apart, pooled) + between), ratio[..., 1]


def sequence(
    sums: Floats,
    elapsed: Ints,
    *,
    metric: Metric,
    spec: RegressionSpec,
    alpha: float | None = None,
    information: Floats | None = None,
) -> Path:
    """The path of a metric of independent entities.

    Args:
        sums: As `difference` takes them, cumulated by look, shape (..., looks, 2, q, q).
        elapsed: Days since the start by look, the first day is 1.
        alpha: What the comparison may spend on ROLLBACK; None: all that the spec says.
        information: Variance of the sum behind the difference by look, up to a factor, shape (looks,); None: as estimated (of
            several paths their mean).
    """
    effect, error, level = difference(sums)
    n = sums[..., 0, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = (metric.sign * effect - metric.margin * np.abs(level)) / error
        # the sum, not the mean, has independent increments where some days are noisier than others
        summed = (n.prod(-1) / n.sum(-1) * error) ** 2
    # a spread of rounding errors is none
    spread = error * np.sqrt(n.sum(-1)) > 1e-7 * np.abs(level)
    judged = (n.min(-1) >= spec.min_entities) & np.isfinite(statistic) & spread
    others = tuple(range(judged.ndim - 1))
    looked = judged.any(others)
    known = np.maximum.accumulate(np.nan_to_num(summed).mean(others)) if information is None else information
    spent_, promoting = (
        sequential.spent(elapsed / spec.horizon_days, a, spec.spending)
        for a in (spec.alpha_of(metric, alpha), spec.alpha)
    )
    bound, promote = (np.full(len(elapsed), np.inf) for _ in range(2))
    for bounds, spending in ((bound, spent_), (promote, promoting)):
        bounds[looked] = sequential.normal_bounds(tuple(known[looked].tolist()), tuple(spending[looked].tolist()))
    bound, promote = np.where(judged, bound, np.inf), np.where(judged, promote, np.inf)
    return Path(
        effect, error, level, statistic, bound, promote, np.broadcast_to(spent_, effect.shape),
        judged & (statistic > bound), judged & (-statistic > promote), n[..., 0].astype(np.int64), n[..., 1].astype(np.int64),
    )  # fmt: skip


# ---- clusters


@dataclass(frozen=True)
class Clusters:
    """Units in epochs, in the order of entry, with what is known of them at every look."""

    treated: Bools
    stratum: Ints
    """Epoch and stratum: arms were drawn, and outcomes are centred, within it; shape (m,)."""
    entry: Ints
    """The look at which a cluster first has outcomes, not decreasing; shape (m,)."""
    numerator: Floats
    denominator: Floats
    """Cumulated, weighted; shape (looks, m)."""
    before: Floats
    """The pre-period's deviation from the common level for as many days; shape (looks, m)."""


def _permuted(clusters: Clusters, permutations: int, seed: Sequence[int]) -> Floats:
    """Arms permuted within stratum and entry; shape (1 + permutations, m), row 0 as drawn.

    Clusters that enter together have a generator of their own, so that later ones change no earlier look.
    """
    out = np.empty((permutations + 1, len(clusters.treated)))
    out[0] = clusters.treated
    for entry in np.unique(clusters.entry):
        here = np.flatnonzero(clusters.entry == entry)
        here = here[np.argsort(clusters.stratum[here], kind="stable")]
        keys = np.random.default_rng([*seed, int(entry)]).random((permutations, len(here)))
        order = np.argsort(keys + clusters.stratum[here], axis=1)
        out[1:, here] = clusters.treated[here].astype(np.float64)[order]
    return out


def _centred(values: Floats, stratum: Ints) -> Floats:
    """Deviations from the mean of the stratum; values of shape (looks, m)."""
    _, codes = np.unique(stratum, return_inverse=True)
    member = np.zeros((len(codes), codes.max() + 1))
    member[np.arange(len(codes)), codes] = 1.0
    out: Floats = values - (values @ member / member.sum(0)) @ member.T
    return out


def _spread(share: Floats, arms: Floats, x: Floats, rest: Floats, along: Floats, tau: Floats) -> Floats:
    """Σ T̃² e² / (1 - h), by arms as permuted and look: the robust variance of the treatment's coefficient, times (Σ T̃²)².

    T̃ is the treatment freed of stratum and covariate, e = rest - tau·T̃ what is left of a cluster's outcome, h one over the
    clusters of its arm (HC2, MacKinnon and White, Journal of Econometrics 1985). As powers of ``along`` and ``tau``, so that it
    takes products of matrices and no array of arms times clusters times looks.

    Args:
        share: Of each cluster, the treated share of its stratum, shape (m,).
        arms: 0 and 1, as many ones in every row, shape (permutations, m).
        x, rest: Covariate and outcome, centred, shape (looks, m).
        along, tau: What x takes of the treatment, and its coefficient, shape (permutations, looks).
    """
    n = max(float(arms[0].sum()), 2.0), max(float((1 - arms[0]).sum()), 2.0)
    out = np.zeros_like(tau)
    for power, factor in ((4, 1.0), (3, -2.0), (2, 1.0)):
        inner = np.zeros_like(tau)
        for j in range(power, -1, -1):
            treated, other = (k / (k - 1) * (on - share) ** (power - j) for k, on in zip(n, (1.0, 0.0), strict=True))
            column = math.comb(power, j) * x**j * rest ** (4 - power)
            inner *= -along
            inner += arms @ (column * (treated - other)).T
            inner += column @ other
        out *= tau
        out += factor * inner
    return out


def randomised(
    clusters: Clusters,
    elapsed: Ints,
    *,
    metric: Metric,
    spec: RegressionSpec,
    seed: Sequence[int],
    alpha: float | None = None,
) -> Path:
    """The path of a metric of clusters, with bounds from permuted arms; ``alpha`` as `sequence` takes it.

    Outcomes are first freed of the harm that the null hypothesis allows (the margin). The statistic is the t of the treatment in
    an ANCOVA. Two null hypotheses: that there is no effect on any unit, under which nothing depends on the arms and the test is
    exact; and that there is none in the mean, though some units gain what others lose. For the second the error is robust to
    unequal spread of the arms (`_spread`), which makes the test right as the units grow (Chung and Romano, Annals of Statistics
    2013; with ±35% by unit, a canary of 12 among 60 was rolled back falsely in 15% of the months without it).
    """
    looks = len(clusters.numerator)
    width = max(looks, spec.horizon_days)
    # where little of α is left, as many more as it takes to have as many paths beyond the bound, while that takes seconds
    wanted = spec.permutations * spec.alpha / (spec.alpha if alpha is None else max(alpha, 1e-9))
    arms = _permuted(clusters, max(spec.permutations, math.ceil(min(wanted, MOST_PERMUTATIONS))), seed)
    treated = clusters.treated.astype(np.float64)
    present = np.searchsorted(clusters.entry, np.arange(looks), side="right")
    paths = np.full((len(arms), looks), np.nan)
    effect, error, level = (np.full(looks, np.nan) for _ in range(3))
    judged = np.zeros(looks, dtype=bool)
    n_treated, n_control = np.zeros(looks, dtype=np.int64), np.zeros(looks, dtype=np.int64)
    for size in np.unique(present):
        at = np.flatnonzero(present == size)
        if not size:
            continue
        t, stratum = treated[:size], clusters.stratum[:size]
        n_treated[at], n_control[at] = int(t.sum()), int(size - t.sum())
        share = _centred(t[None, :], stratum)[0]
        freedom = size - len(np.unique(stratum)) - 2
        if share @ share <= 0 or freedom < 1:
            continue
        # always as many rows as the horizon has days: products of matrices of one shape round alike, whatever comes later
        numerator, denominator, before = (np.zeros((width, size)) for _ in range(3))
        numerator[at], denominator[at] = clusters.numerator[at, :size], clusters.denominator[at, :size]
        before[at] = clusters.before[at, :size]
        with np.errstate(divide="ignore", invalid="ignore"):
            levels = (numerator @ (1 - t)) / (denominator @ (1 - t))
            allowed = metric.sign * metric.margin * np.abs(levels)
            freed = numerator - allowed[:, None] * denominator * t
            ratio = freed.sum(1) / denominator.sum(1)
            y = _centred((freed - ratio[:, None] * denominator) / denominator.mean(1)[:, None], stratum)
            x = _centred(before, stratum)
            sxx = (x * x).sum(1)
            useful = sxx > 1e-20 * (before * before).sum(1)
            slope = np.where(useful, (x * y).sum(1) / sxx, 0.0)
            rest = y - slope[:, None] * x
            along = np.where(useful, (arms[:, :size] @ x.T) / sxx, 0.0)
            room = share @ share - along**2 * sxx
            tau = (arms[:, :size] @ rest.T) / room
            se = np.sqrt(np.maximum(_spread(t - share, arms[:, :size], x, rest, along, tau), 0.0)) / room
            # a spread of rounding errors is none
            paths[:, at] = np.where(se > 1e-12 * np.abs(levels), metric.sign * tau / se, np.nan)[:, at]
        level[at], effect[at], error[at] = levels[at], (tau[0] + allowed)[at], se[0, at]
        judged[at] = (size >= spec.min_clusters) & (np.minimum(n_treated[at], n_control[at]) >= 2)
    paths[:, ~judged] = np.nan
    fraction = elapsed / spec.horizon_days
    spending = sequential.spent(fraction, spec.alpha_of(metric, alpha), spec.spending)
    bound, harmful = sequential.permuted_bounds(paths, spending)
    promote, harmless = sequential.permuted_bounds(-paths, sequential.spent(fraction, spec.alpha, spec.spending))
    return Path(
        effect, error, level, paths[0], bound, promote, spending, harmful, harmless, n_treated, n_control
    )  # fmt: skip


def assembled(
    total: Floats,
    base: Floats,
    expected: Floats,
    weight: Floats,
    is_treated: Bools,
    stratum: Ints,
    *,
    sign: float = 1.0,
) -> Clusters:
    """Clusters in the order of what is known of them, earliest first: names and later days decide nothing, and neither does
    whether a metric is told as a gain or as a loss (``sign``)."""
    looks = len(total)
    there = base != 0
    entry = np.where(there.any(0), there.argmax(0), looks) if looks else np.zeros(base.shape[1], dtype=np.int64)
    path = [values for k in range(looks - 1, -1, -1) for values in (sign * total[k], base[k], sign * expected[k])]
    order = np.lexsort([*path, weight, is_treated, stratum, entry])
    order = order[entry[order] < looks]
    return Clusters(
        is_treated[order], stratum[order], entry[order],
        (total * weight)[:, order], (base * weight)[:, order], (expected * weight)[:, order],
    )  # fmt: skip


def panel(
    n: Floats,
    d: Floats,
    own: Floats,
    weight: Floats,
    arm: Ints,
    epoch: Ints,
    counted: Bools,
    looks: Ints,
    *,
    sign: float = 1.0,
) -> Clusters:
    """Clusters of units that are all there on every day.

    Args:
        n, d: A day's numerators and denominators, shape (days, units).
        own, weight: By unit, as `adjusting` gives them.
        arm: 1 treated, 0 control, else neither; shape (epochs, units).
        epoch, counted: By day, the epoch's number and whether the day counts (no wash-out).
        looks: Days, from 0, at which is looked.
        sign: The metric's.
    """
    parts: list[tuple[Floats, ...]] = []
    for e in np.unique(epoch):
        kept = arm[e] >= 0
        inside = ((epoch == e) & counted)[:, None]
        cumulated = [np.cumsum(v[:, kept] * inside, axis=0)[looks] for v in (n, d)]
        expected = np.cumsum(inside, axis=0)[looks] * own[kept]
        parts.append((*cumulated, expected, weight[kept], arm[e, kept] == 1, np.full(int(kept.sum()), e)))
    return assembled(*(np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)), sign=sign)


def adjusting(n: Floats, d: Floats, largest: float | None) -> tuple[Floats, Floats]:
    """From the pre-period's numerators and denominators a day, by unit: deviation from the common level, and weight."""
    own = n - n.sum() / d.sum() * d if d.sum() else np.zeros(len(n))
    size = np.abs(n)
    if largest is None or not size.any():
        return own, np.ones(len(n))
    cap = largest * size.mean()
    return own, np.minimum(1.0, cap / np.maximum(size, cap))


# ---- reading rows


def floats_of(table: pa.Table, column: str) -> Floats:
    """A column as float64; null and what is not finite become NaN."""
    values = table[column].cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def values_of(table: pa.Table, metric: Metric) -> tuple[Floats, Floats, Bools]:
    """A metric's numerator and denominator by row, and where both are there."""
    numerator = floats_of(table, metric.column)
    counted = metric.per or ("n" if "n" in table.schema.names else None)
    denominator = floats_of(table, counted) if counted else np.ones(table.num_rows)
    return numerator, denominator, np.isfinite(numerator) & np.isfinite(denominator)


def days_of(table: pa.Table, start: date) -> Ints:
    days = table["day"].cast(pa.date32()).cast(pa.int32()).to_numpy(zero_copy_only=False).astype(np.int64)
    out: Ints = days - (start - date(1970, 1, 1)).days
    return out


def codes_of(table: pa.Table, column: str) -> tuple[Ints, list[str]]:
    """Codes of a text column in the order of its values, and the values."""
    column_ = table[column].cast(pa.string()).combine_chunks()
    values = pc.unique(column_).sort()
    return pc.index_in(column_, value_set=values).to_numpy(zero_copy_only=False).astype(np.int64), values.to_pylist()


def require(table: pa.Table, what: str, columns: Sequence[str]) -> None:
    missing = [c for c in columns if c not in table.schema.names]
    if missing:
        raise ValueError(f"{what}: no column {', '.join(missing)} (there are: {', '.join(table.schema.names)})")


def measured(spec: RegressionSpec) -> list[str]:
    """The columns that the metrics need, each once."""
    return sorted({c for m in spec.metrics for c in (m.column, m.per) if c is not None})


def standardised(values: Floats, by: Floats) -> Floats:
    """Values freed of mean and spread of ``by``; 0 where there is none, which is the mean."""
    sd = by.std() if len(by) else 0.0
    return np.where(np.isfinite(values), (values - by.mean()) / sd, 0.0) if sd > 0 else np.zeros(len(values))


def weekday_level(before: pa.Table, metric: Metric, start: date) -> Floats:
    """The metric's level by weekday in the pre-period, shape (7,); NaN where a weekday has none."""
    weekday = (start.weekday() + days_of(before, start)) % 7
    numerator, denominator, good = values_of(before, metric)
    with np.errstate(divide="ignore", invalid="ignore"):
        out: Floats = np.bincount(weekday[good], numerator[good], 7) / np.bincount(weekday[good], denominator[good], 7)
    return out
