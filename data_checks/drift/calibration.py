"""What chance alone does to a distance: distances on compressed columns, resampled from the reference, and corrected over columns.

Belongs here: arithmetic on counts and quantiles, NumPy only. Does not: tables, columns' kinds, Evidently, verdicts
(``data_checks.drift``).

A column of the reference is a matrix of counts, one row a day and one column a cell (a stretch of values, or a category).
Rows of one day are not independent of one another, so whole days are resampled, in blocks as long as the window that is
judged (block bootstrap: Künsch, Annals of Statistics 17, 1989), and the same days for every column: what moves all columns
together moves them together in the draws. A month has few blocks, so the far tail is taken from rows resampled at the batch's
own size and stretched to the spread of the blocks; the larger of both chances counts. What days add to the spread of rows is
widened by how long it goes on, and by how little a month says of it (``data_checks.drift.course``; Student's t).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from data_checks.drift.course import Course, carried_wider, freedom, wider

NO_COURSE = Course()
Floats = np.ndarray[Any, np.dtype[np.float64]]
Counts = np.ndarray[Any, np.dtype[np.int64]]

DRAWS = 400
LEAST_DAYS = 4
"""With fewer days of reference there is no spread between days to speak of: rows are resampled alone."""
_CELLS = 64
_TAIL_RATIO = 1.3
_TAIL_SHARE = 0.2
_BUCKET = 0.1
_PIECE = 32_768


def wasserstein(one: Floats, other: Floats, norm: float) -> tuple[float, float]:
    """How far two sorted samples (any sizes, no NaN) are apart: the area between their distribution functions, divided by
    ``norm`` (the distance), and the largest difference of the two (the share of rows that must have moved at least).
    """
    every = np.concatenate([one, other])
    every.sort()
    shares = [np.searchsorted(side, every[:-1], "right") / len(side) for side in (one, other)]
    apart = np.abs(shares[0] - shares[1])
    return float(np.sum(apart * np.diff(every))) / norm, float(apart.max(initial=0.0))


def jensen_shannon(one: Floats, other: Floats) -> Floats:
    """Jensen-Shannon distance (natural logarithm) of shares along the last axis, each side adding up to 1."""
    middle = (one + other) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(side > 0, side * np.log(side / middle), 0.0) for side in (one, other)]
    return np.asarray(np.sqrt(np.maximum((parts[0] + parts[1]).sum(axis=-1) / 2, 0.0)))


def standard_deviation(values: Floats) -> float:
    """Of every value (population), in pieces that stay in the processor's cache; 0 for none."""
    if not len(values):
        return 0.0
    mean = values.mean()
    pieces = (values[n : n + _PIECE] - mean for n in range(0, len(values), _PIECE))
    return float(np.sqrt(sum(float(np.square(one, out=one).sum()) for one in pieces) / len(values)))


def compress_numbers(ordered: Floats, rows: int) -> Floats:
    """Sorted values as ``rows`` values: means of equal parts. The mean is kept exactly, quantiles to within a part."""
    edges = np.linspace(0, len(ordered), rows + 1).astype(np.int64)
    return np.asarray(np.add.reduceat(ordered, edges[:-1]) / np.diff(edges))


def compress_counts(counts: Counts, rows: int) -> Counts:
    """Counts scaled to a total of ``rows`` (largest remainders), each within one of its exact share."""
    exact = counts * (rows / counts.sum())
    whole: Counts = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: rows - int(whole.sum())]] += 1
    return whole


def cells(ordered: Floats) -> Floats:
    """Bounds of cells over sorted values: equal parts in the middle, ever smaller ones towards both ends.

    A heavy tail's few values carry most of a distance's noise, so that they may not share one cell.
    """
    n = len(ordered)
    steps = int(np.log(max(n / _CELLS, 2)) / np.log(_TAIL_RATIO))
    reach = np.unique((_TAIL_RATIO ** np.arange(steps + 1)).astype(np.int64))
    ranks = np.concatenate([np.linspace(0, n - 1, _CELLS + 1).astype(np.int64), reach - 1, n - reach])
    return np.unique(ordered[ranks[(ranks >= 0) & (ranks < n)]])


def counts_in(slices: Sequence[Floats], bounds: Floats) -> Counts:
    """How many values of each sorted slice lie in each cell; cell k holds what is at least bound k (the first: everything below too)."""
    below = np.array([np.append(np.searchsorted(one, bounds[1:], "left"), len(one)) for one in slices], dtype=np.int64)
    return np.diff(below, axis=1, prepend=0)


def means_of(ordered: Floats, bounds: Floats) -> Floats:
    """The mean value of each cell (of the sorted values that made the bounds: none is empty)."""
    starts = np.searchsorted(ordered, bounds, "left")
    return np.asarray(np.add.reduceat(ordered, starts) / np.diff(np.append(starts, len(ordered))))


class Tail:
    """Chance of passing a value, from draws: counted in the middle, a generalised Pareto in the upper fifth.

    Fitted by probability-weighted moments (Hosking and Wallis, Technometrics 29, 1987), its shape kept within 0 and 0.5:
    never lighter than an exponential. Draws that never differ from zero give a chance of 0 to anything above it.
    """

    def __init__(self, draws: Floats) -> None:
        self.draws = np.sort(draws)
        self.edge = float(np.quantile(self.draws, 1 - _TAIL_SHARE))
        excess = self.draws[self.draws > self.edge] - self.edge
        self.share = len(excess) / len(draws)
        self.scale = self.shape = 0.0
        if len(excess):
            mean = float(excess.mean())
            weighted = float(np.mean(excess * (1 - (np.arange(1, len(excess) + 1) - 0.35) / len(excess))))
            self.shape = float(np.clip(2 - mean / (mean - 2 * weighted), 0.0, 0.5)) if mean > 2 * weighted else 0.5
            self.scale = mean * (1 - self.shape)

    def chance(self, value: float) -> float:
        """P(a draw is at least ``value``)."""
        if value <= self.edge:
            return max(float(np.mean(self.draws >= value)), 1 / (len(self.draws) + 1))
        if not self.scale:
            return 0.0
        far = (value - self.edge) / self.scale
        return self.share * float((1 + self.shape * far) ** (-1 / self.shape) if self.shape > 1e-6 else np.exp(-far))

    def at(self, chance: float) -> float:
        """The value that is passed with ``chance``."""
        if not self.scale or chance >= self.share:
            return float(np.quantile(self.draws, 1 - chance))
        less = self.share / chance
        far = (less**self.shape - 1) / self.shape if self.shape > 1e-6 else np.log(less)
        return self.edge + self.scale * float(far)


@dataclass(frozen=True)
class Null:
    """Distances of windows in which nothing changed: of resampled rows, and of resampled days where there are enough.

    ``together``: the latter draw by draw, the same days drawn for every column.
    """

    rows: Tail
    days: Tail | None
    together: Floats | None = None

    def chance(self, distance: float) -> float:
        """How often chance alone goes as far."""
        return max(t.chance(distance) for t in (self.rows, self.days) if t is not None)

    def at(self, chance: float) -> float:
        """The distance that chance alone passes with ``chance``."""
        return max(t.at(chance) for t in (self.rows, self.days) if t is not None)


@dataclass(frozen=True)
class Counted:
    """A reference column: ``counts`` (days × cells), and the steps between the cells' values in units of the norm
    (numbers), or None (categories). ``course``: how its days hang together."""

    name: str
    counts: Counts
    steps: Floats | None
    course: Course = NO_COURSE

    def gap(self, one: Floats, other: Floats) -> Floats:
        """Distances between shares (draws × cells)."""
        if self.steps is None:
            return jensen_shannon(one, other)
        return np.asarray((np.abs(np.cumsum(one - other, axis=-1)[..., :-1]) * self.steps).sum(axis=-1))

    @cached_property
    def _known(self) -> dict[tuple[int, int], Null]:
        return {}

    def null(self, values: int, block: int) -> Null:
        """What windows of ``block`` days with ``values`` values lie from the reference by chance; kept for the next call.

        ``values`` is rounded down by up to a tenth: days of nearly the same size share one calibration. The draws follow
        from the column's name, the size and the block alone, those of days from the numbers of days.
        """
        bucket = int(np.floor(np.log(max(values, 1)) / _BUCKET))
        key = (bucket, block)
        if key not in self._known:
            size = max(1, round(np.exp(bucket * _BUCKET)))
            draw = np.random.default_rng([zlib.crc32(self.name.encode()), bucket, block])
            self._known[key] = self._resampled(size, block, draw)
        return self._known[key]

    def _resampled(self, size: int, block: int, draw: np.random.Generator) -> Null:
        whole = self.counts.sum(axis=0)
        total = int(whole.sum())
        shares = whole / total
        # one sample of this size beside the fixed shares varies as two samples beside each other
        both = size * total / (size + total)
        by_rows = self.gap(_shares(draw.poisson(shares * both, (DRAWS, len(shares)))), shares)
        held = self.counts[self.counts.sum(axis=1) > 0]
        days = len(held)
        if days < LEAST_DAYS:
            return Null(Tail(by_rows), None)
        length = max(1, min(block, days // LEAST_DAYS))
        drawn = _days_again(days, length, block)
        # not a matrix product: BLAS would start threads for it, and they slow it tenfold on a busy machine
        sides = [np.einsum("ij,jk->ik", one, held.astype(np.float64)) for one in drawn.sides]
        current = _shares(sides[0])
        # a batch smaller than the reference's days varies more than they do
        expected = total / days * block
        if size < 0.9 * expected:
            thinner = 1 / (1 / size - 1 / expected)
            current = _shares(draw.poisson(current * thinner))
        blocks = days / length
        by_days = self.gap(current, _shares(sides[1])) * np.sqrt(blocks / (blocks - 1))
        # days spread wider than rows would where they differ from one another, and less where the same entities come every day
        usual = float(np.sqrt(np.mean(by_rows**2)))
        shown = float(np.sqrt(np.mean(by_days**2))) / usual if usual else 1.0
        # a few blocks show too little of what goes on for longer than they do: single days and what they share say more
        shared = self.course.shared(block)
        spread = max(shown, float(np.sqrt(wider(block, days, shared))))
        if not usual or not shown:
            return Null(Tail(by_rows), Tail(by_days), by_days)
        more = 1 - 1 / spread**2 if spread > 1 else 0.0  # what is more than rows vary is known from these days alone
        scale = np.sqrt(1 - more + more * drawn.doubt(freedom(days, shared.rho)))
        if self.course.trend is not None:
            scale = scale * np.sqrt(carried_wider(block, days))
        by_days = by_days * scale * (spread / shown)
        return Null(Tail(by_rows * spread * scale[::-1]), Tail(by_days), by_days)


@dataclass(frozen=True)
class _Drawn:
    """Days drawn again, the same for every column: ``sides`` (draws × days each) how often each day comes in the window and in
    the reference, ``chances`` (draws) uniform in (0, 1)."""

    sides: tuple[Floats, Floats]
    chances: Floats

    def doubt(self, freedom: float) -> Floats:
        """How many times a variance may be what was found with so many degrees of freedom, a value for each draw."""
        from scipy.special import chdtri

        return np.asarray(freedom / chdtri(freedom, self.chances))


@lru_cache(maxsize=32)
def _days_again(days: int, length: int, block: int) -> _Drawn:
    draw = np.random.default_rng([days, length, block])
    window, reference = (_drawn_days(draw, days, length, -(-n // length)) for n in (block, days))
    return _Drawn((window, reference), draw.permutation((np.arange(DRAWS) + 0.5) / DRAWS))


def _shares(counts: np.ndarray) -> Floats:
    return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1))


def _drawn_days(draw: np.random.Generator, days: int, length: int, blocks: int) -> Floats:
    """How often each day comes (draws × days) in ``blocks`` blocks of ``length`` neighbouring days."""
    first = draw.integers(0, days - length + 1, (DRAWS, blocks))
    place = (first[:, :, None] + np.arange(length)).reshape(DRAWS, -1) + np.arange(DRAWS)[:, None] * days
    return np.bincount(place.ravel(), minlength=DRAWS * days).reshape(DRAWS, days).astype(np.float64)


def volume_null(rows: Counts, block: int) -> Tail | None:
    """|log ratio| of the rows of a mean day between windows of ``block`` days and the reference; None: too few days."""
    days = len(rows)
    if days < LEAST_DAYS:
        return None
    draw = np.random.default_rng([days, block])
    length = max(1, min(block, days // LEAST_DAYS))
    means = [
        _drawn_days(draw, days, length, -(-n // length)) @ rows.astype(np.float64) / (-(-n // length) * length)
        for n in (block, days)
    ]
    blocks = days / length
    return Tail(np.abs(np.log((means[0] + 1) / (means[1] + 1))) * np.sqrt(blocks / (blocks - 1)))


def benjamini_hochberg(chances: Sequence[float], level: float) -> tuple[np.ndarray, float]:
    """Which hypotheses to reject so that at most ``level`` of the rejected are false, in the mean; and the chance up to which.

    Benjamini and Hochberg, JRSS B 57, 1995. With nothing to reject the cut is that of a single rejection.
    """
    if not len(chances):
        return np.zeros(0, dtype=bool), level
    found = np.asarray(chances)
    limits = level * np.arange(1, len(found) + 1) / len(found)
    passed = np.flatnonzero(np.sort(found) <= limits)
    cut = float(limits[passed[-1]] if len(passed) else limits[0])
    return found <= cut, cut


def chance_of_none(by_day: Counts, totals: Counts, values: int) -> Floats:
    """P(a category does not occur among ``values`` values), for each column of ``by_day`` (days × categories).

    Poisson, or negative binomial where a category's daily counts spread wider than that.
    """
    share = by_day.sum(axis=0) / max(int(totals.sum()), 1)
    spread = np.ones(len(share))
    if len(by_day) >= LEAST_DAYS:
        expected = totals[:, None] * share
        with np.errstate(divide="ignore", invalid="ignore"):
            pearson = np.where(expected > 0, (by_day - expected) ** 2 / expected, 0.0)
        spread = np.maximum(1.0, pearson.sum(axis=0) / (len(by_day) - 1))
    mean = values * share
    factor = np.where(spread > 1 + 1e-9, np.log(spread) / np.maximum(spread - 1, 1e-9), 1.0)
    return np.asarray(np.exp(-mean * factor))


def chance_of_moved(now: Counts, before: Counts, rows: tuple[int, int]) -> Floats:
    """An upper bound of the chance that counts moved so far from ``before`` to ``now``, each category by itself.

    Given both counts, the first is binomial; Chernoff's bound, for both directions.
    """
    both = now + before
    if not rows[0] or not rows[1]:
        return np.ones(len(both))
    usual = rows[0] / (rows[0] + rows[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(both > 0, now / np.maximum(both, 1), usual)
        bits = np.where(found > 0, found * np.log(found / usual), 0.0)
        bits = bits + np.where(found < 1, (1 - found) * np.log((1 - found) / (1 - usual)), 0.0)
    return np.asarray(np.minimum(1.0, 2 * np.exp(-both * bits)))
