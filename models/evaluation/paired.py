"""Two models on the same held-out rows: what each row cost either of them, and how sure the difference is.

Belongs here: per-row losses by metric, the paired bootstrap by day, slices, groups. Does not: what follows from a
difference (``models.evaluation.gate``), or what a policy would make of the scores (``models.evaluation.off_policy``).

Whole days are resampled (cluster bootstrap; Cameron, Gelbach and Miller 2008), since the rows of a day share its ups and
downs. With few days percentiles are too narrow; they are widened as Hesterberg says ("What Teachers Should Know About the
Bootstrap", The American Statistician 69(4), 2015, the expanded percentile interval).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
LEAST_DRAWS = 2000


@dataclass(frozen=True)
class Kind:
    """How a kind of model is compared row by row."""

    actual: str
    """Outcome column; a row where it is null judges nobody."""
    predict: Callable[[Any, pa.Table], Floats]
    losses: Mapping[str, Callable[[Floats, Floats], Floats]]
    """Metric of ``evaluate()`` -> loss of each row, given (predictions, actual); the metric is its mean, lower is better."""
    calibration: Callable[[Mapping[str, float]], float]
    """From the figures of ``evaluate()``: 0 where predictions are right on average."""
    calibration_is: str
    says: Callable[[Any, pa.Table], Floats]
    """What decides of each row, from its features alone: no outcome is looked at."""
    apart: Callable[[Floats, Floats], float]
    """How far two models' ``says`` lie apart: a mean of squares, 0 where they are the same."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Metric of ``evaluate()`` that is no mean over rows → why: it has neither an interval nor slices."""


def _log_loss(p: Floats, missed: Floats) -> Floats:
    safe = np.clip(p, 1e-12, 1 - 1e-12)
    return np.asarray(-np.log(np.where(missed > 0, safe, 1 - safe)))


def _share_of_bias(figures: Mapping[str, float]) -> float:
    mean = abs(figures.get("mean_value", 0.0))
    return abs(figures.get("bias", float("nan"))) / mean if mean > 0 else float("nan")


def _apart(mine: Floats, theirs: Floats) -> float:
    return float(np.mean((mine - theirs) ** 2))


def _apart_by_size(mine: Floats, theirs: Floats) -> float:
    """Squares as a share of the amount they lie in, weighted by it: an amount's noise grows with it, and of plain squares
    the largest lines would be all that counts."""
    size = (np.abs(mine) + np.abs(theirs)) / 2
    told = size > 0
    return float(np.sum((mine - theirs)[told] ** 2 / size[told]) / size[told].sum()) if told.any() else 0.0


KINDS: dict[str, Kind] = {
    "response": Kind(
        "value",
        lambda model, rows: np.asarray(model.expect(rows), dtype=np.float64),
        {"mae": lambda p, value: np.abs(p - value)},
        _share_of_bias,
        "bias as a share of the mean value",
        lambda model, rows: np.asarray(model.score(rows)["level"].to_numpy(), dtype=np.float64),
        _apart_by_size,
    ),
    "duration": Kind(
        "missed",
        lambda model, rows: np.asarray(model.p_miss(rows), dtype=np.float64),
        {"brier": lambda p, missed: (p - missed) ** 2, "log_loss": _log_loss},
        lambda figures: figures.get("calibration_error", float("nan")),
        "expected calibration error",
        lambda model, rows: np.asarray(model.p_miss(rows), dtype=np.float64),
        _apart,
        {
            "calibration_error": "it is told of groups of rows with like probabilities",
            "roc_auc": "it is told of pairs of rows",
            "average_precision": "it is told of the order of all rows",
        },
    ),
}
"""Every kind of ``models.catalog``: one that is not here can be trained, and passes no gate."""
SAME = 1e-6
"""Relative difference up to which two figures, and two models' scores, are the same: another number of threads moves more
digits than the last, and no other recipe moves as few."""


def same(one: Any, other: Any, rows: pa.Table) -> bool:
    """Whether two models are one: the same files, or the same scores of every row of ``rows`` but for rounding."""
    if one is other or one.files() == other.files():
        return True
    if not rows.num_rows:
        return False
    mine, theirs = one.score(rows), other.score(rows)
    return bool(
        mine.column_names == theirs.column_names
        and all(_equal(mine.column(c), theirs.column(c)) for c in mine.column_names)
    )


def _equal(mine: pa.ChunkedArray, theirs: pa.ChunkedArray) -> bool:
    if pa.types.is_list(mine.type) and pa.types.is_list(theirs.type):
        mine, theirs = (pa.chunked_array([pc.list_flatten(one.combine_chunks())]) for one in (mine, theirs))
    if not (pa.types.is_floating(mine.type) and pa.types.is_floating(theirs.type)):
        return bool(mine.equals(theirs))
    a, b = (np.asarray(one.to_numpy(), dtype=np.float64) for one in (mine, theirs))
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=SAME, atol=0, equal_nan=True))


def disagreement(kind: str, one: Any, other: Any, rows: pa.Table) -> tuple[float, int]:
    """How far two models' scores of ``rows`` lie apart, and of how many rows that speaks: those that both score.

    The mean square for probabilities, for amounts the mean square of the relative difference, weighted by the amount. NaN
    where no row has both scores."""
    if not rows.num_rows:
        return float("nan"), 0
    how = KINDS[kind]
    mine, theirs = how.says(one, rows), how.says(other, rows)
    both = np.isfinite(mine) & np.isfinite(theirs)
    return how.apart(mine[both], theirs[both]) if both.any() else float("nan"), int(both.sum())


def known(kind: str, rows: pa.Table) -> tuple[pa.Table, Floats]:
    """The rows whose outcome is known, and the outcome as float64 (n,)."""
    column = KINDS[kind].actual
    found = rows.filter(pc.is_valid(rows.column(column)))
    actual = found.column(column)
    actual = actual.cast(pa.int8()) if pa.types.is_boolean(actual.type) else actual
    return found, np.asarray(actual.cast(pa.float64()).to_numpy(), dtype=np.float64)


def losses(kind: str, metric: str, predicted: Floats, actual: Floats) -> Floats | None:
    """Loss of each row (n,); None where the metric is no mean over rows (ROC AUC), so that it has no interval."""
    how = KINDS[kind].losses.get(metric)
    return None if how is None else np.asarray(how(predicted, actual), dtype=np.float64)


@dataclass(frozen=True)
class Interval:
    """A figure with its interval; ``low`` and ``high`` are None where one day alone, or nothing, says how sure it is.

    p_worse: one-sided p-value of "not above 0" (t of the bootstrap's spread, days - 1 degrees of freedom).
    """

    point: float
    low: float | None
    high: float | None
    p_worse: float
    days: int
    rows: int

    @property
    def proven(self) -> bool:
        """It is above 0, and not by noise alone: the whole interval is."""
        return self.low is not None and self.low > 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is no number is null."""
        return {k: _plain(v) for k, v in asdict(self).items()}

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.point:+.2%} (no interval: {self.days} day)"
        return f"{self.point:+.2%} [{self.low:+.2%}, {self.high:+.2%}]"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


@dataclass(frozen=True)
class Days:
    """The days of some rows and how they are drawn again: the same seed draws the same days for every figure.

    day: (n,) date of each row, as days (int64). confidence: of the two-sided interval.
    """

    day: Ints
    draws: int = 4000
    seed: int = 0
    confidence: float = 0.95

    @classmethod
    def of(cls, rows: pa.Table, *, draws: int, seed: int, confidence: float) -> Days:
        """From the column ``day``."""
        day = rows.column("day").cast(pa.date32()).cast(pa.int32()).to_numpy(zero_copy_only=False)
        return cls(np.asarray(day, dtype=np.int64), draws, seed, confidence)

    @cached_property
    def _place(self) -> tuple[Ints, int]:
        distinct, place = np.unique(self.day, return_inverse=True)
        return place.ravel(), len(distinct)

    @property
    def count(self) -> int:
        """Distinct days."""
        return self._place[1]

    @cached_property
    def drawn(self) -> Floats:
        """(draws, days): how often each day is in each draw."""
        if self.draws < LEAST_DRAWS:
            raise ValueError(f"{self.draws} draws are too few for an interval: at least {LEAST_DRAWS}")
        n = self.count
        return np.random.default_rng(self.seed).multinomial(n, np.full(n, 1 / n), size=self.draws).astype(np.float64)

    def sums(self, values: Floats, code: Ints | None = None, codes: int = 1) -> Floats:
        """Values (n,) summed by day, and by ``code`` where given: (days, codes)."""
        place, n = self._place
        at = place if code is None else place * codes + code
        return np.asarray(np.bincount(at, values, minlength=n * codes).reshape(n, codes), dtype=np.float64)

    def interval(self, figure: Callable[..., Floats], *sums: Floats, rows: int | None = None) -> Interval:
        """The interval of one figure; ``sums``: (days, 1) each, which ``figure`` puts together."""
        return self.intervals(figure, *sums, rows=[len(self.day) if rows is None else rows])[0]

    def intervals(self, figure: Callable[..., Floats], *sums: Floats, rows: Sequence[int]) -> list[Interval]:
        """As ``interval``, for k figures at once; ``sums``: (days, k) each."""
        from scipy.special import ndtr, stdtr, stdtrit

        n = self.count
        with np.errstate(divide="ignore", invalid="ignore"):
            points = np.asarray(figure(*[one.sum(axis=0) for one in sums]), dtype=np.float64)
            if n < 2:
                return [Interval(float(p), None, None, 1.0, n, r) for p, r in zip(points, rows, strict=True)]
            drawn = np.asarray(figure(*[self.drawn @ one for one in sums]), dtype=np.float64)
        wider = np.sqrt(n / (n - 1))
        tail = float(ndtr(wider * stdtrit(n - 1, (1 - self.confidence) / 2)))
        found = []
        for at, point in enumerate(points.tolist()):
            mine = drawn[:, at][np.isfinite(drawn[:, at])]  # a draw may hold no row of a small slice
            if len(mine) < self.draws / 2 or not np.isfinite(point):
                found.append(Interval(point, None, None, 1.0, n, rows[at]))
                continue
            low, high = np.quantile(mine, [tail, 1 - tail]).tolist()
            spread = float(mine.std()) * wider
            certain = 0.0 if point > 0 else 1.0  # every day says the same
            p = float(stdtr(n - 1, -point / spread)) if spread > 1e-15 * max(abs(point), 1e-300) else certain
            found.append(Interval(point, min(low, point), max(high, point), p, n, rows[at]))
        return found


def _relative(mine: Floats, theirs: Floats) -> Floats:
    return np.asarray((mine - theirs) / theirs)


def harm(days: Days, mine: Floats, theirs: Floats) -> Interval:
    """How much more the candidate loses than the other, as a share of what the other loses: positive is worse.

    mine, theirs: losses of the same rows (n,), 0 or more.
    """
    same = np.array_equal(mine, theirs)  # 0 / 0 is no difference either
    sums = days.sums(mine), days.sums(theirs)
    return days.interval(_relative if not same else lambda a, b: np.zeros(a.shape), *sums)


@dataclass(frozen=True)
class Slice:
    """One value of a declared column: how much worse the candidate is there, and whether that is more than noise."""

    column: str
    value: str
    harm: Interval
    mine: float
    theirs: float
    real: bool
    """Held by Benjamini-Hochberg over all slices."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**{k: _plain(v) for k, v in asdict(self).items() if k != "harm"}, "harm": self.harm.as_dict()}


def labels(rows: pa.Table, column: str) -> tuple[list[str], Ints]:
    """A column's distinct values in order as text, and each row's place among them; a null reads ``(none)``.

    Raises KeyError naming the columns that there are.
    """
    if column not in rows.column_names:
        raise KeyError(
            f"column {column!r} is missing, training.gate names it; the features have {', '.join(rows.column_names)}"
        )
    texts = pc.fill_null(rows.column(column).cast(pa.string()), "(none)").combine_chunks()
    names = sorted(pc.unique(texts).to_pylist())
    return names, np.asarray(pc.index_in(texts, value_set=pa.array(names, pa.string())), dtype=np.int64)


def slices(
    rows: pa.Table, columns: Sequence[str], days: Days, mine: Floats, theirs: Floats, *, min_rows: int, alpha: float
) -> list[Slice]:
    """Every value of the columns that has ``min_rows`` rows, in the order of columns and values.

    mine, theirs: losses of ``rows``. ``real`` controls the false discovery rate over all slices at ``alpha``.
    """
    named, found = [], []
    for column in columns:
        names, code = labels(rows, column)
        size = np.bincount(code, minlength=len(names))
        kept = np.flatnonzero(size >= min_rows)
        a, b = (days.sums(x, code, len(names))[:, kept] for x in (mine, theirs))
        differ = (days.sums((mine != theirs).astype(np.float64), code, len(names)).sum(axis=0) > 0)[kept]
        # where all losses are the same there is no difference, whatever 0 / 0 says
        figure = lambda x, y, differ=differ: np.where(differ, _relative(x, y), 0.0)  # noqa: E731
        found += days.intervals(figure, a, b, rows=size[kept].tolist())
        named += [
            (column, names[at], x / size[at], y / size[at])
            for at, x, y in zip(kept, a.sum(axis=0).tolist(), b.sum(axis=0).tolist(), strict=True)
        ]
    real = discoveries([one.p_worse for one in found], alpha)
    return [
        Slice(column, value, one, float(x), float(y), r)
        for (column, value, x, y), one, r in zip(named, found, real, strict=True)
    ]


def discoveries(p: Sequence[float], alpha: float) -> list[bool]:
    """Which p-values hold when the share of false ones may be ``alpha`` (Benjamini and Hochberg 1995)."""
    if not p:
        return []
    order = np.argsort(p, kind="stable")
    passing = np.flatnonzero(np.asarray(p)[order] <= alpha * np.arange(1, len(p) + 1) / len(p))
    held = np.zeros(len(p), dtype=bool)
    held[order[: passing[-1] + 1 if len(passing) else 0]] = True
    return held.tolist()


@dataclass(frozen=True)
class Group:
    """How often one value of a declared attribute is decided for and against: shares of its rows, by both models."""

    attribute: str
    value: str
    rows: int
    mine: tuple[float, float]
    """(for, against) by the candidate."""
    theirs: tuple[float, float] | None
    """The same by the champion, else by the rule."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def groups(
    rows: pa.Table, attributes: Sequence[str], mine: Floats, theirs: Floats | None, *, min_rows: int
) -> list[Group]:
    """The groups with at least ``min_rows`` rows.

    mine, theirs: what is decided for each row, above 0 in the entity's favour, below 0 against it.
    """
    found = []
    for attribute in attributes:
        names, code = labels(rows, attribute)
        size = np.bincount(code, minlength=len(names))
        tallies = [
            None if moved is None else [np.bincount(code, way, minlength=len(names)) for way in (moved > 0, moved < 0)]
            for moved in (mine, theirs)
        ]
        for at in np.flatnonzero(size >= min_rows):
            shares = [None if t is None else (float(t[0][at] / size[at]), float(t[1][at] / size[at])) for t in tallies]
            assert shares[0] is not None
            found.append(Group(attribute, names[at], int(size[at]), shares[0], shares[1]))
    return found
