"""How well scores do: estimated while their outcomes are missing, realised as they become known, both beside a baseline.

Belongs here: metrics as sums over rows, their intervals, the estimates with their assumptions, the picture. Does not:
which scores meet which outcomes (``pipeline.monitoring.labels``) or what a fall starts (``pipeline.lifecycle.retraining``).

Every metric is a function of sums over rows. So days add up to a window, and rows count as often as they have outcomes:
where one outcome answers every row of an entity (a ticket described anew each day that it is open), the entity counts once.
The interval of a window is two-way, by day and by entity (Cameron, Gelbach and Miller, Journal of Business & Economic
Statistics 29, 2011): rows of one day share their day, rows of one entity its fate, and neither alone says how much a figure
moves. What days share is a delete-a-day jackknife, what entities share beyond their days is added.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from data_checks.common import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray
Columns = Mapping[str, Array]
"""Columns of scored rows by name, each (n,): ``predicted``, ``actual`` (NaN where unknown), ``weight`` (1 where it is missing)
and what a metric asks for."""
Better = Literal["lower", "higher"]
Kind = Literal["probability", "amount"]

LEVEL = 0.95
BINS = 512
GROUPS = 20
LEAST = 200
"""Rows with an outcome that a calibration or a spread of errors is learned from at least."""
METRICS: dict[Kind, tuple[str, ...]] = {
    "probability": ("brier", "log_loss", "accuracy", "roc_auc", "calibration_error", "coverage"),
    "amount": ("mae", "wape", "coverage"),
}
"""What is measured of scores of each kind; ``coverage`` where they promise intervals or sets."""
ASSUMES: dict[Kind, str] = {
    "probability": (
        "Estimated: what calibrated scores say of themselves (confidence-based performance estimation, after NannyML's"
        " CBPE). It holds while a score of 0.3 still means three in ten: it sees that cases became harder to tell apart,"
        " and cannot see that what the score means has changed (concept drift)."
    ),
    "amount": (
        "Estimated: the error that foreseen amounts of this size have had lately (after NannyML's direct loss"
        " estimation). It holds while the error at a given size is what it was: it sees that amounts became larger or"
        " smaller, and cannot see that the world answers differently (concept drift)."
    ),
}


class PerformanceSpec(BaseModel):
    """What performance is measured over."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str | None = Field(
        default=None, description="The metric whose fall starts a retraining; null: training.metric"
    )
    window_days: int = Field(default=7, gt=0, description="Days judged together; whole weeks keep weekdays out of it")
    reference_days: int = Field(
        default=28, gt=0, description="Days before the window that give the baseline where the gate gave none"
    )
    min_days: int = Field(default=3, ge=2, description="A window of fewer days by one version is not judged")
    min_rows: int = Field(default=200, gt=0, description="A window of fewer rows is not judged")
    unjudged_days: int = Field(
        default=14,
        gt=0,
        description="Days in a row on which no window of the metric could be judged, from which people are told",
    )
    min_known_share: float = Field(
        default=0.5, gt=0, le=1, description="A day is mature when its maturity_days are over and this share is known"
    )


SCHEMA = pa.schema(
    {
        "day": pa.date32(),
        "first": pa.date32(),
        "last": pa.date32(),
        "metric": pa.string(),
        "kind": pa.string(),
        "value": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
        "n": pa.int64(),
        "known": pa.float64(),
        "mature": pa.bool_(),
        "baseline": pa.float64(),
        "baseline_is": pa.string(),
        "worse": pa.float64(),
        "worse_low": pa.float64(),
        "version": pa.int64(),
        "text": pa.string(),
    }
)
"""One row a figure, as known at the cut-off of ``day``.

first, last: the days on which the scores were made; the same for a day's figure, a window's for the figure that is judged.
kind: realised | estimated | rule (realised of the newest version beside the rule on the same rows). value with its 95%
interval low..high over n outcomes (rows; entities where one outcome answers all rows of an entity). known: share of the scored
rows whose outcome is known. mature: no more outcomes are waited for. worse: how much worse than the baseline as a share of it,
positive is worse; worse_low: the near end of its interval. baseline_is: gate (the version's held-out figure) | reference (the
days before) | rule. version: who scored; null where the rule did.
"""
RULE = "rule"
"""The kind of a figure beside the rule, and the column with what the rule predicted (NaN: nothing)."""


# --- metrics ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One metric as a function of sums over rows.

    sums(columns, group, groups): (groups, k) over rows whose outcome is known. value((..., k)): (...), NaN where undefined.
    each(columns, (k,)): (n,), what every row adds to the sums, times a number for each of them; it says how far a row moves
    the value. None: entities are not told apart in its interval.
    expected(columns, group, groups): the sums to be expected without outcomes and their variances, both (groups, k), and
    slope((k,)): (k,), the derivative of the value by each sum; both None where nothing can be foreseen.
    """

    name: str
    better: Better
    sums: Callable[[Columns, Array, int], Array]
    value: Callable[[Array], Array]
    expected: Callable[[Columns, Array, int], tuple[Array, Array]] | None = None
    slope: Callable[[Array], Array] | None = None
    each: Callable[[Columns, Array], Array] | None = None


def mean_of(
    name: str,
    better: Better,
    loss: Callable[[Columns], Array],
    expected: Callable[[Columns], tuple[Array, Array]] | None = None,
    per: Callable[[Columns], Array] | None = None,
    per_foreseen: Callable[[Columns], Array] | None = None,
) -> Metric:
    """The mean of ``loss`` over rows, or Σloss / Σper (Σper_foreseen in the estimate).

    ``expected``: the mean and the variance of each row's loss, from scores alone.
    """

    def one(columns: Columns) -> Array:
        return np.ones(len(columns["predicted"]))

    def sums(columns: Columns, group: Array, groups: int) -> Array:
        w = _weight(columns)
        return _added([loss(columns) * w, (per or one)(columns) * w], group, groups)

    def each(columns: Columns, by: Array) -> Array:
        return np.asarray((by[0] * loss(columns) + by[1] * (per or one)(columns)) * _weight(columns))

    def foreseen(columns: Columns, group: Array, groups: int) -> tuple[Array, Array]:
        assert expected is not None
        mean, variance = expected(columns)
        w = _weight(columns)
        total = _added([mean * w, (per_foreseen or one)(columns) * w], group, groups)
        return total, _added([variance * w, np.zeros(len(mean))], group, groups)

    def slope(total: Array) -> Array:
        return np.array([1.0 / total[1], 0.0]) if total[1] else np.zeros(2)

    return Metric(name, better, sums, _ratio, foreseen if expected else None, slope if expected else None, each)


def _weight(columns: Columns) -> Array:
    """What each row counts. Rows that share one outcome share a weight of 1: their common variance is the mean of theirs."""
    return columns["weight"] if "weight" in columns else np.ones(len(columns["predicted"]))


def _added(columns: Sequence[Array], group: Array, groups: int) -> Array:
    return np.stack([np.bincount(group, c, minlength=groups) for c in columns], axis=1)


def _ratio(total: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(total[..., 1] > 0, total[..., 0] / total[..., 1], np.nan))


def coverage() -> Metric:
    """The share of outcomes inside the interval or set that a score promised.

    Columns: ``inside`` (n,) 1, 0, or NaN where nothing was promised or is known; ``promised`` (n,) the probability that was
    promised, NaN where none was. Rows without a promise do not count.
    """

    def promised(c: Columns) -> tuple[Array, Array]:
        p = np.nan_to_num(c["promised"])
        return p, p * (1 - p)

    return mean_of(
        "coverage",
        "higher",
        lambda c: np.nan_to_num(c["inside"]),
        promised,
        per=lambda c: np.isfinite(c["inside"]).astype(np.float64),
        per_foreseen=lambda c: np.isfinite(c["promised"]).astype(np.float64),
    )


def _safe(p: Array) -> Array:
    return np.asarray(np.clip(p, 1e-12, 1 - 1e-12))


def _brier(c: Columns) -> tuple[Array, Array]:
    p = c["predicted"]
    return p * (1 - p), p * (1 - p) * (1 - 2 * p) ** 2


def _log_loss(c: Columns) -> tuple[Array, Array]:
    p = _safe(c["predicted"])
    return -(p * np.log(p) + (1 - p) * np.log(1 - p)), p * (1 - p) * np.log(p / (1 - p)) ** 2


def _accuracy(c: Columns) -> tuple[Array, Array]:
    p = c["predicted"]
    return np.maximum(p, 1 - p), p * (1 - p)


def _realised_log_loss(c: Columns) -> Array:
    p = _safe(c["predicted"])
    return np.asarray(-np.log(np.where(c["actual"] > 0, p, 1 - p)))


def probability_metrics(predicted: Array) -> list[Metric]:
    """Brier score, log loss, accuracy at 0.5, ROC AUC and (realised only) the calibration error over ten bins.

    ``predicted``: the probabilities that they will be used on, for the edges of bins. With Y ~ Bernoulli(p) a row's
    expected loss and its variance follow from p alone: that is the whole of the estimate.
    """
    return [
        mean_of("brier", "lower", lambda c: (c["predicted"] - c["actual"]) ** 2, _brier),
        mean_of("log_loss", "lower", _realised_log_loss, _log_loss),
        mean_of(
            "accuracy",
            "higher",
            lambda c: ((c["predicted"] >= 0.5) == (c["actual"] > 0)).astype(np.float64),
            _accuracy,
        ),
        roc_auc(predicted),
        calibration_error(predicted),
    ]


def _edges(predicted: Array, bins: int) -> Array:
    """Inner edges of equally filled bins; every value its own where there are no more than ``bins``."""
    values = np.unique(predicted)
    if len(values) > bins:
        values = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)[:-1], method="lower"))
    return np.asarray(values[1:])


def roc_auc(predicted: Array) -> Metric:
    """ROC AUC over the thresholds between bins of equal fill (within 0.001 of the exact one; exact for few values).

    The estimate is the area under expected true- and false-positive rates, pairs of a row with itself left out: a row is
    never both. Its sampling variance is that of the first-order (delta) expansion in the bins' expected positives.
    """
    edges = _edges(predicted, BINS)
    bins = len(edges) + 1

    def cells(columns: Columns, group: Array) -> Array:
        return np.asarray(group * bins + np.searchsorted(edges, columns["predicted"], side="right"))

    def counted(columns: Columns, group: Array, groups: int, positive: Array, doubt: Array) -> Array:
        cell, w = cells(columns, group), _weight(columns)
        rows = np.bincount(cell, w, minlength=groups * bins).reshape(groups, bins)
        good = np.bincount(cell, positive * w, minlength=groups * bins).reshape(groups, bins)
        own = np.bincount(group, doubt * w, minlength=groups)[:, None]
        return np.concatenate([good, rows, own], axis=1).astype(np.float64)

    def sums(columns: Columns, group: Array, groups: int) -> Array:
        return counted(columns, group, groups, columns["actual"], np.zeros(len(group)))

    def expected(columns: Columns, group: Array, groups: int) -> tuple[Array, Array]:
        p = columns["predicted"]
        total = counted(columns, group, groups, p, p * (1 - p))
        variance = np.zeros_like(total)
        variance[:, :bins] = np.bincount(
            cells(columns, group), p * (1 - p) * _weight(columns), minlength=groups * bins
        ).reshape(groups, bins)  # fmt: skip
        return total, variance

    def parts(total: Array) -> tuple[Array, Array, Array, Array]:
        good, rows, own = total[..., :bins], total[..., bins : 2 * bins], total[..., -1]
        bad = rows - good
        below = np.cumsum(bad, axis=-1) - bad / 2
        won = (good * below).sum(axis=-1) - own / 2
        pairs = good.sum(axis=-1) * bad.sum(axis=-1) - own
        return good, bad, won, pairs

    def value(total: Array) -> Array:
        _, _, won, pairs = parts(total)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(pairs > 1e-9, won / pairs, np.nan))

    def slope(total: Array) -> Array:
        good, bad, won, pairs = parts(total)
        out = np.zeros(2 * bins + 1)
        if pairs > 1e-9:
            below, above = np.cumsum(bad) - bad / 2, np.cumsum(good[::-1])[::-1] - good / 2
            # one more positive in a bin is one negative less there: it wins over those below, and is no longer beaten
            out[:bins] = (below - above) / pairs - won / pairs**2 * (bad.sum() - good.sum())
        return out

    def each(columns: Columns, by: Array) -> Array:
        bin_ = cells(columns, np.zeros(len(columns["predicted"]), np.int64))
        return np.asarray((by[bin_] * columns["actual"] + by[bins + bin_]) * _weight(columns))

    return Metric("roc_auc", "higher", sums, value, expected, slope, each)


def calibration_error(predicted: Array, bins: int = 10) -> Metric:
    """Mean distance between predicted and realised shares over equally filled bins (ECE); calibration assumed, none to foresee."""
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1])) if len(predicted) else np.zeros(0)
    bins = len(edges) + 1

    def sums(columns: Columns, group: Array, groups: int) -> Array:
        cell, w = group * bins + np.searchsorted(edges, columns["predicted"], side="right"), _weight(columns)
        gap = (columns["predicted"] - columns["actual"]) * w
        apart = np.bincount(cell, gap, minlength=groups * bins).reshape(groups, bins)
        return np.concatenate([apart, np.bincount(group, w, minlength=groups)[:, None]], axis=1)

    def value(total: Array) -> Array:
        return _ratio(np.stack([np.abs(total[..., :-1]).sum(axis=-1), total[..., -1]], axis=-1))

    def each(columns: Columns, by: Array) -> Array:
        cell = np.searchsorted(edges, columns["predicted"], side="right")
        return np.asarray((by[cell] * (columns["predicted"] - columns["actual"]) + by[-1]) * _weight(columns))

    return Metric("calibration_error", "lower", sums, value, each=each)


def amount_metrics(spread: Spread | None) -> list[Metric]:
    """Mean absolute error, and its sum as a share of the realised amounts (wape); estimated from ``spread`` where there is one."""

    def expected(c: Columns) -> tuple[Array, Array]:
        assert spread is not None
        return spread.of(c["predicted"])

    def loss(c: Columns) -> Array:
        return np.asarray(np.abs(c["predicted"] - c["actual"]))

    foreseen = None if spread is None else expected
    return [
        mean_of("mae", "lower", loss, foreseen),
        mean_of(
            "wape",
            "lower",
            loss,
            foreseen,
            per=lambda c: np.abs(c["actual"]),
            per_foreseen=lambda c: np.abs(c["predicted"]),
        ),
    ]


# --- what the estimates rest on ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """How large errors have been by the size of what was foreseen: the mean absolute error and its variance, by bins of it."""

    edges: Array
    mean: Array
    variance: Array

    @classmethod
    def learn(cls, predicted: Array, actual: Array, bins: int = 10) -> Spread:
        """From rows whose outcome is known; bins are equally filled."""
        edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)[1:-1]))
        cell = np.searchsorted(edges, predicted, side="right")
        error = np.abs(predicted - actual)
        n = np.maximum(np.bincount(cell, minlength=len(edges) + 1), 1)
        mean = np.bincount(cell, error, minlength=len(edges) + 1) / n
        square = np.bincount(cell, error**2, minlength=len(edges) + 1) / n
        return cls(edges, mean, np.maximum(square - mean**2, 0.0))

    def of(self, predicted: Array) -> tuple[Array, Array]:
        """Expected absolute error of each row, and its variance."""
        cell = np.searchsorted(self.edges, predicted, side="right")
        return self.mean[cell], self.variance[cell]


def calibrated(predicted: Array, known: Array, actual: Array, weight: Array | None = None) -> Array:
    """``predicted`` drawn to what probabilities have meant lately: Platt's scaling (1999), a line in log odds.

    Learned from rows whose outcome is known (``known`` the probabilities, ``actual`` 0 or 1, ``weight`` what each counts, 1
    where it is None), by Newton's method, with as much weight as one row for the line that changes nothing.
    """
    w = np.ones(len(known)) if weight is None else weight

    def log_odds(p: Array) -> Array:
        p = np.clip(p, 1e-6, 1 - 1e-6)
        return np.asarray(np.log(p / (1 - p)))

    def chance(z: Array) -> Array:
        return np.asarray((1 + np.tanh(z / 2)) / 2)

    x = np.stack([np.ones(len(known)), log_odds(known)], axis=1)
    line, prior = np.array([0.0, 1.0]), np.array([0.0, 1.0])

    def loss(line: Array) -> float:
        z = x @ line
        return float(np.sum(w * (np.logaddexp(0, z) - actual * z)) + np.sum((line - prior) ** 2) / 2)

    stands = loss(line)
    for _ in range(50):
        p = chance(x @ line)
        gradient = x.T @ (w * (actual - p)) - (line - prior)
        step = np.linalg.solve((x * (w * p * (1 - p))[:, None]).T @ x + np.eye(2), gradient)
        # halved until it is one downhill: from far off, a whole step of Newton's leads ever further away
        while (better := loss(line + step)) > stands and np.abs(step).max() > 1e-10:
            step = step / 2
        line, stands = line + step, min(better, stands)
        if np.abs(step).max() < 1e-10:
            break
    return chance(line[0] + line[1] * log_odds(predicted))


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error; ``freedom``: the degrees of freedom of that error (None: the normal's)."""

    value: float
    error: float
    freedom: int | None = None

    def reach(self) -> float:
        """Half the width of the 95% interval; NaN where there is none."""
        return self.error * _quantile(self.freedom)


def _quantile(freedom: int | None) -> float:
    from scipy.stats import norm, t

    return float(norm.ppf(0.5 + LEVEL / 2) if freedom is None else t.ppf(0.5 + LEVEL / 2, max(freedom, 1)))


def jackknife(metric: Metric, by_group: Array) -> Estimate:
    """The metric over all groups, with the standard error of leaving out one group at a time (Tukey 1958).

    ``by_group``: (groups, k) sums. Groups without rows do not count. The error is NaN with fewer than two.
    """
    whole = by_group.sum(axis=0)
    filled = by_group[np.abs(by_group).sum(axis=1) > 0]
    value, d = float(metric.value(whole)), len(filled)
    if d < 2:
        return Estimate(value, float("nan"), 1)
    without = metric.value(whole - filled)
    without = without[np.isfinite(without)]
    if len(without) < 2:
        return Estimate(value, float("nan"), 1)
    return Estimate(value, float(np.sqrt((d - 1) * np.var(without))), d - 1)


def _gradient(value: Callable[[Array], Array], total: Array) -> Array:
    """The derivative of a metric by each of its sums, at ``total`` (k,); central differences."""
    step = 1e-5 * np.maximum(np.abs(total), 1e-3)
    near = np.diag(step)
    moved = np.asarray(value(total + near)) - np.asarray(value(total - near))
    return np.asarray(np.nan_to_num(moved / (2 * step)))


def two_way(found: Estimate, metric: Metric, columns: Columns, total: Array, day: Array, entity: Array) -> Estimate:
    """``found``, whose error is between days, with what rows of one entity share beyond their days (see the module).

    ``day`` and ``entity`` (n,) whole numbers from 0 on. The variance is V(day) + V(entity) - V(entity and day), and no less
    than either of the first two; the degrees of freedom are those of the fewer of both. Where every entity has one row the
    last two are the same, and the error stays what it was.
    """
    if metric.each is None or not np.isfinite(found.error) or not len(entity):
        return found
    return _two_way(found, metric.each(columns, _gradient(metric.value, total)), day, entity)


def _two_way(found: Estimate, moves: Array, day: Array, entity: Array) -> Estimate:
    """As ``two_way``, from how far each row moves the figure (``moves``, adding up to 0)."""
    _, cell = np.unique(entity * (int(day.max()) + 1) + day, return_inverse=True)
    filled = np.bincount(entity) > 0
    by_entity, by_cell = (np.bincount(code, moves) for code in (entity, cell))
    n = int(filled.sum())
    if n < 2:
        return Estimate(found.value, float("nan"), 1)
    v_day, v_entity = found.error**2, float((by_entity**2).sum()) * n / (n - 1)
    v_cell = float((by_cell**2).sum()) * n / (n - 1)
    variance = max(v_day, v_entity, v_day + v_entity - v_cell) if n < len(by_cell) else v_day
    freedom = None if found.freedom is None else min(found.freedom, n - 1)
    return Estimate(found.value, float(np.sqrt(variance)), freedom)


def foreseen(metric: Metric, columns: Columns, group: Array, groups: int) -> tuple[Array, Array]:
    """Expected sums and their variances by group, (groups, k) each; raises ValueError where the metric cannot be foreseen."""
    if metric.expected is None:
        raise ValueError(f"metric {metric.name!r} cannot be estimated without outcomes")
    return metric.expected(columns, group, groups)


def estimate(metric: Metric, columns: Columns) -> Estimate:
    """What the metric will come to on these rows if the assumption holds (``ASSUMES``).

    The interval is that of the outcomes still to be drawn, not of the assumption.
    """
    assert metric.slope is not None
    total, variance = foreseen(metric, columns, np.zeros(len(columns["predicted"]), np.int64), 1)
    return Estimate(float(metric.value(total[0])), float(np.sqrt((metric.slope(total[0]) ** 2 * variance[0]).sum())))


def realised(metric: Metric, columns: Columns, group: Array | None = None) -> Estimate:
    """The metric on rows with an outcome; ``group`` (n,) names what rows share (a day, an entity), for the interval."""
    known = ~np.isnan(columns["actual"])
    group = np.arange(len(known)) % GROUPS if group is None else group
    names, code = np.unique(group[known], return_inverse=True)
    return jackknife(metric, metric.sums({k: v[known] for k, v in columns.items()}, code, len(names)))


def judge(
    rows: pa.Table,
    day: date,
    *,
    kind: Kind,
    spec: PerformanceSpec,
    maturity_days: int = 0,
    gate: Callable[[int], Mapping[str, float]] | None = None,
    more: Sequence[Metric] = (),
    outcome_of: Literal["row", "entity"] = "row",
) -> pa.Table:
    """Every figure that can be told at the cut-off of ``day``, in SCHEMA.

    outcome_of: ``row`` where every row has an outcome of its own (what a line earned that day), ``entity`` where one answers
    all rows of an entity: its rows of a day, of a window, of the reference then share a weight of 1 there.

    rows: what was scored up to ``day`` with what was known of it by then: day date32, entity_id, version int64 (null: the
    rule), predicted float64, actual float64 (null: not known), float64 columns that ``more`` metrics ask for; where
    ``promised`` and ``inside`` stand among them, ``coverage`` is told too, and where ``rule`` does (what the rule predicted of
    the row), the newest version is compared with it. ``gate`` gives a
    version's held-out figures by metric (nothing where it has none, or where they are not comparable).
    Days that may still change, and those of the window, get a figure each; the newest mature window of the version that
    scored last is judged against its baseline (realised), and so are the last days by their estimate.
    """
    rows = rows.filter((pc.field("day") <= pc.scalar(day)) & pc.is_finite(pc.field("predicted")))
    if rows.num_rows == 0:
        return SCHEMA.empty_table()
    return _Judging(rows, day, kind, spec, maturity_days, gate or (lambda _: {}), more, outcome_of).table()


class _Judging:
    """One call of ``judge``."""

    def __init__(
        self,
        rows: pa.Table,
        day: date,
        kind: Kind,
        spec: PerformanceSpec,
        maturity_days: int,
        gate: Callable[[int], Mapping[str, float]],
        more: Sequence[Metric],
        outcome_of: Literal["row", "entity"],
    ) -> None:
        self.day, self.spec, self.gate, self.kind = day, spec, gate, kind
        self.once = outcome_of == "entity"
        self.maturity_days = maturity_days
        days = rows["day"].to_numpy().astype("datetime64[D]")
        values, self.code = np.unique(days, return_inverse=True)
        self.days: list[date] = values.tolist()
        self.d = len(self.days)
        numeric = [f.name for f in rows.schema if pa.types.is_floating(f.type)]
        self.columns = {name: rows[name].to_numpy().astype(np.float64) for name in numeric}
        self.known = ~np.isnan(self.columns["actual"])
        entity = rows["entity_id"].combine_chunks().dictionary_encode()
        self.entity = np.asarray(entity.indices.to_numpy()).astype(np.int64)
        self.entities = len(entity.dictionary)
        version = pc.fill_null(rows["version"], -1).to_numpy()
        self.version = np.empty(self.d, np.int64)
        self.version[self.code] = version
        self.n = np.bincount(self.code, minlength=self.d)
        self.share = np.bincount(self.code, self.known, minlength=self.d) / self.n
        self.mature = np.array([d <= day - timedelta(days=maturity_days) for d in self.days]) & (
            self.share >= spec.min_known_share
        )
        self.current = int(self.version[-1])
        self.estimated, self.basis = self._basis()
        p = self.columns["predicted"]
        self.ruled = np.isfinite(self.columns[RULE]) if RULE in self.columns else np.zeros(len(p), bool)
        shown = np.concatenate([p, self.columns[RULE][self.ruled]]) if self.ruled.any() else p
        found = probability_metrics(shown) if kind == "probability" else amount_metrics(self.spread)
        promises = [coverage()] if {"promised", "inside"} <= set(self.columns) else []
        self.metrics = [*found, *promises, *more]
        self.rows: list[dict[str, Any]] = []

    def _basis(self) -> tuple[Array, str]:
        """The predictions that estimates are made from, and what they rest on; learns the spread of errors."""
        predicted, actual = self.columns["predicted"], self.columns["actual"]
        self.spread: Spread | None = None
        good = self.known & self.mature[self.code]
        mine = good & (self.version[self.code] == self.current)
        who = "its own"
        if mine.sum() < LEAST:
            mine, who = good, "all versions'"
        enough = mine.sum() >= LEAST
        if self.kind == "amount":
            if enough:
                self.spread = Spread.learn(predicted[mine], actual[mine])
                return predicted, f"errors of {who} {int(mine.sum())} matured rows"
            return predicted, f"{int(mine.sum())} matured rows are too few to know the size of errors"
        if enough and 0 < actual[mine].mean() < 1:
            known, told = predicted[mine], actual[mine]
            return calibrated(
                predicted, known, told, self._shares(mine)
            ), f"calibrated on {who} {int(mine.sum())} matured rows"
        return predicted, "scores as they are: too few matured rows to check their calibration"

    def table(self) -> pa.Table:
        for metric in self.metrics:
            self._metric(metric)
        return pa.Table.from_pylist(self.rows, schema=SCHEMA)

    def _shares(self, these: Array) -> Array:
        """What each of the rows ``these`` counts among them."""
        if not self.once:
            return np.ones(int(these.sum()))
        entity = self.entity[these]
        return np.asarray(1.0 / np.bincount(entity, minlength=self.entities)[entity])

    def _outcomes(self, these: Array) -> int:
        """How many outcomes the rows ``these`` have."""
        return len(np.unique(self.entity[these])) if self.once else int(these.sum())

    def _picked(self, these: Array, **other: Array) -> dict[str, Array]:
        """The columns of the rows ``these``, with what each counts; ``other`` columns take the place of those of their name."""
        return {**{k: other.get(k, v)[these] for k, v in self.columns.items()}, "weight": self._shares(these)}

    def _of_days(self, places: Sequence[int], which: Array) -> tuple[Array, Array]:
        """The rows of some days among ``which`` (a mask of all rows), and each one's day as its place in ``places``."""
        at = np.full(self.d, -1)
        at[list(places)] = np.arange(len(places))
        these = which & (at[self.code] >= 0)
        return these, at[self.code[these]]

    def _realised(self, metric: Metric, places: Sequence[int]) -> Estimate:
        """The metric over some days, where outcomes are known."""
        these, day = self._of_days(places, self.known)
        columns = self._picked(these)
        sums = metric.sums(columns, day, len(places))
        return two_way(jackknife(metric, sums), metric, columns, sums.sum(axis=0), day, self.entity[these])

    def _metric(self, metric: Metric) -> None:
        spec = self.spec
        since = self.day - timedelta(days=self.maturity_days + spec.window_days)
        shown = [i for i in range(self.d) if self.days[i] > since]
        can = metric.expected is not None and metric.slope is not None
        for i in shown:
            these, _ = self._of_days([i], self.known)
            if these.any():
                text = "" if self.mature[i] else f"maturing: {self.share[i]:.0%} of {self.n[i]} rows known"
                # rows of one day have no days between them: groups of entities stand in
                fine = metric.sums(self._picked(these), self.entity[these] % GROUPS, GROUPS)
                n = self._outcomes(these)
                self._row(metric, "realised", i, i, jackknife(metric, fine), n, self.version[i], text=text)
        for i in shown if can else ():
            if not self.mature[i]:
                every, day = self._of_days([i], np.ones(len(self.code), bool))
                total, variance = foreseen(metric, self._picked(every, predicted=self.estimated), day, 1)
                assert metric.slope is not None
                noise = float(np.sqrt((metric.slope(total[0]) ** 2 * variance[0]).sum()))
                one = Estimate(float(metric.value(total[0])), noise)
                self._row(metric, "estimated", i, i, one, self._outcomes(every), self.version[i], text=self.basis)
        self._window(metric)
        if can:
            self._expected_window(metric)
        if self.ruled.any() and metric.name != "coverage":
            self._beside_rule(metric)

    def _last(self, chosen: Array) -> list[int]:
        """The newest days among ``chosen`` within one window of the newest of them."""
        places = np.flatnonzero(chosen)
        if not len(places):
            return []
        newest = self.days[places[-1]]
        return [int(i) for i in places if newest - self.days[i] < timedelta(days=self.spec.window_days)]

    def _enough(self, places: list[int], rows: float) -> bool:
        return len(places) >= self.spec.min_days and rows >= self.spec.min_rows

    def _window(self, metric: Metric) -> None:
        """The newest mature days of the version that scores now, beside their baseline."""
        places = self._last(self.mature & (self.version == self.current))
        n = self._outcomes(self._of_days(places, self.known)[0])
        if not self._enough(places, n):
            return
        found = self._realised(metric, places)
        base, of = self._baseline(metric, places, found)
        self._row(metric, "realised", places[0], places[-1], found, n, self.current, base=base, of=of, days=len(places))

    def _expected_window(self, metric: Metric) -> None:
        """The last days by their estimate, beside the same baseline."""
        places = self._last(self.version == self.current)
        every, day = self._of_days(places, np.ones(len(self.code), bool))
        n = self._outcomes(every)
        if not self._enough(places, n):
            return
        total, variance = foreseen(metric, self._picked(every, predicted=self.estimated), day, len(places))
        between = jackknife(metric, total)
        assert metric.slope is not None
        slope = metric.slope(total.sum(axis=0))
        noise = float((slope**2 * variance.sum(axis=0)).sum())
        found = Estimate(between.value, float(np.sqrt(between.error**2 + noise)), between.freedom)
        base, of = self._baseline(metric, places, found)
        self._row(
            metric, "estimated", places[0], places[-1], found, n, self.current,
            base=base, of=of, days=len(places), text=self.basis,
        )  # fmt: skip

    def _beside_rule(self, metric: Metric) -> None:
        """The newest mature days of the newest version beside the rule, on the rows that both have scored."""
        models = np.flatnonzero(self.version >= 0)
        if not len(models):
            return
        number = int(self.version[models[-1]])
        places = self._last(self.mature & (self.version == number))
        told = self.known & self.ruled
        days = set(self.code[told].tolist())  # a day that the rule left out says nothing, and moves no figure
        places = [place for place in places if place in days]
        these, day = self._of_days(places, told)
        n = self._outcomes(these)
        if not self._enough(places, n):
            return
        both = [self._picked(these), self._picked(these, predicted=self.columns[RULE])]
        mine, rules = (metric.sums(columns, day, len(places)) for columns in both)
        base = Estimate(float(metric.value(rules.sum(axis=0))), float("nan"))
        k = mine.shape[1]
        apart = replace(metric, value=lambda t: metric.value(t[..., :k]) - metric.value(t[..., k:]))
        gap = jackknife(apart, np.concatenate([mine, rules], axis=1))
        if metric.each is not None and np.isfinite(gap.error):
            moves = [
                metric.each(c, _gradient(metric.value, s.sum(axis=0))) for c, s in zip(both, (mine, rules), strict=True)
            ]
            gap = _two_way(gap, moves[0] - moves[1], day, self.entity[these])
        found = self._realised(metric, places)
        found = Estimate(float(metric.value(mine.sum(axis=0))), found.error, found.freedom)
        self._row(
            metric, RULE, places[0], places[-1], found, n, number, base=base, of="rule", days=len(places), gap=gap
        )

    def _baseline(self, metric: Metric, window: list[int], found: Estimate) -> tuple[Estimate | None, str]:
        """What the window is compared with: the gate's held-out figure of the version, else the realised days before."""
        held_out = self.gate(self.current) if self.current >= 0 else {}
        if np.isfinite(held_out.get(metric.name, np.nan)):
            # The gate's few held-out days vary from day to day as those of the window do.
            return Estimate(float(held_out[metric.name]), found.error, found.freedom), "gate"
        first = self.days[window[0]]
        before = self.mature & np.array(
            [first - timedelta(days=self.spec.reference_days) <= d < first for d in self.days]
        )
        mine = before & (self.version == self.current)
        chosen = np.flatnonzero(mine if mine.sum() >= self.spec.min_days else before)
        if len(chosen) < self.spec.min_days:
            return None, ""
        return self._realised(metric, chosen.tolist()), "reference"

    def _row(
        self,
        metric: Metric,
        kind: str,
        first: int,
        last: int,
        found: Estimate,
        n: int,
        version: int,
        *,
        base: Estimate | None = None,
        of: str = "",
        days: int = 1,
        text: str = "",
        gap: Estimate | None = None,
    ) -> None:
        """``gap``: the figure less its baseline, where both are of the same rows; else their errors are independent."""
        if not np.isfinite(found.value):
            return
        reach = found.reach()
        worse = near = None
        if base is not None and np.isfinite(base.value) and base.value:
            sign = 1.0 if metric.better == "lower" else -1.0
            worse = sign * (found.value - base.value) / abs(base.value)
            error = float(np.hypot(found.error, base.error)) if gap is None else gap.error
            freedom = max((found.freedom or 0) + (base.freedom or 0 if of == "reference" else 0), 1)
            if gap is not None:
                freedom = gap.freedom or 1
            near = worse - error * _quantile(freedom) / abs(base.value)
        window = first != last or days > 1
        if window:
            who = "the rule" if version < 0 else f"version {version}"
            beside = f", baseline {base.value:.4g} ({of})" if base is not None else ", no baseline yet"
            moved = f": {abs(worse):.1%} {'worse' if worse > 0 else 'better'}" if worse is not None else ""
            what = "realised" if kind == RULE else kind
            said = f"{what} {metric.name} {found.value:.4g} of {who} on {days} days to {self.days[last]}{beside}{moved}"
            if kind == RULE and base is not None and worse is not None and near is not None and np.isfinite(near):
                # the interval of the difference on the same rows, in the metric's own unit, added to the rule's figure
                ends = sorted(base.value + sign * abs(base.value) * w for w in (near, 2 * worse - near))
                said = (
                    f"{metric.name} {found.value:.4g} vs {base.value:.4g} of the rule "
                    f"[{ends[0]:.4g}, {ends[1]:.4g}] for {who} on the same rows of {days} days to {self.days[last]}"
                )
            text = f"{said}; {text}" if text else said
        share = float(np.average(self.share[first : last + 1], weights=self.n[first : last + 1]))
        self.rows.append(
            {
                "day": self.day, "first": self.days[first], "last": self.days[last], "metric": metric.name, "kind": kind,
                "value": found.value, "low": _finite(found.value - reach), "high": _finite(found.value + reach), "n": n,
                "known": share, "mature": bool(self.mature[first : last + 1].all()),
                "baseline": base.value if base is not None else None, "baseline_is": of,
                "worse": worse, "worse_low": _finite(near), "version": None if version < 0 else int(version),
                "text": text,
            }
        )  # fmt: skip


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def windows(judged: pa.Table) -> pa.Table:
    """The rows of SCHEMA that speak of a window rather than of a day."""
    return judged.filter(pc.not_equal(judged["first"], judged["last"]))


# --- for people -------------------------------------------------------------------------------------------------------


def newest(history: pa.Table) -> pa.Table:
    """Of figures told on several days, the newest telling of each day scored, metric and kind; windows left out.

    An estimate stands only where nothing mature is realised.
    """
    daily = history.filter(pc.equal(history["first"], history["last"])).sort_by("day")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in daily.to_pylist():
        found[(row["metric"], row["kind"], row["last"])] = row
    kept = sorted(found.items(), key=lambda e: (e[0][0], e[0][1], e[0][2]))
    return pa.Table.from_pylist([row for _, row in kept], schema=SCHEMA)


def plot(history: pa.Table, metrics: Sequence[str] | None = None) -> Figure:
    """Each metric by the day scored: realised with its interval (hollow while it matures), estimated, and the baseline."""
    from matplotlib.figure import Figure

    daily = newest(history)
    names = [m for m in dict.fromkeys(history["metric"].to_pylist()) if metrics is None or m in metrics]
    figure = Figure(figsize=(10, 2.6 * max(len(names), 1)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(max(len(names), 1), 1, sharex=True))
    looks = (("estimated", True, "C1", "s", "estimated"), ("realised", False, "0.6", "o", "maturing"), ("realised", True, "C0", "o", "realised"))  # fmt: skip
    for axis, name in zip(axes, names, strict=False):
        mine = [r for r in daily.to_pylist() if r["metric"] == name]
        for kind, mature, colour, marker, label in looks:
            some = [r for r in mine if r["kind"] == kind and (kind == "estimated" or r["mature"] is mature)]
            if some:
                value = np.array([r["value"] for r in some])
                ends = np.array([[r["low"] if r["low"] is not None else r["value"] for r in some],
                                 [r["high"] if r["high"] is not None else r["value"] for r in some]])  # fmt: skip
                axis.errorbar(
                    [r["last"] for r in some], value, yerr=np.abs(ends - value), fmt=marker, color=colour,
                    markersize=3.5, linewidth=0.8, label=label,
                )  # fmt: skip
        told = windows(history).filter(pc.field("metric") == name).sort_by("day").to_pylist()
        line = [(r["day"], r["baseline"]) for r in told if r["baseline"] is not None and r["kind"] == "realised"]
        if line:
            axis.plot(*zip(*line, strict=True), color="0.3", linestyle="--", linewidth=1, label="baseline")
        axis.set(ylabel=name)
        axis.legend(fontsize=7, ncols=4, loc="best")
    axes[-1].tick_params(axis="x", rotation=30)
    return figure


def report(workflow: str, judged: pa.Table, history: pa.Table, kind: Kind) -> str:
    """One HTML page: the windows judged on a day, what the estimate assumes, and every metric over time."""
    import matplotlib

    sink = io.StringIO()
    # ids in the picture are salted at random otherwise: the same input gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "signalbox"}):
        plot(history).savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    picture = text[text.index("<svg") :]
    rows = windows(judged).to_pylist()
    shown = (
        "metric",
        "kind",
        "value",
        "low",
        "high",
        "n",
        "known",
        "baseline",
        "baseline_is",
        "worse",
        "worse_low",
        "version",
    )
    made = page(
        f"Performance of {workflow}",
        [
            ASSUMES[kind],
            *([] if rows else ["No window can be judged yet: too few mature days of the version that scores."]),
        ],
        [*(s.replace("_", " ") for s in shown), "remark"],
        [("warn" if (r["worse_low"] or 0) > 0 else "good", [*(r[s] for s in shown), r["text"]]) for r in rows],
    )
    return made.replace("<table>", f"{picture}\n<table>", 1)
