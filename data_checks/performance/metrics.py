"""Metrics as sums over rows, and what estimates rest on.

Belongs here: each metric, calibration, the spread of errors. Does not: intervals and windows (``data_checks.performance.estimation``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from data_checks.performance.spec import BINS, Array, Better, Columns

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
