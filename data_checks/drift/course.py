"""How a column's days hang together: what they share with the day before, and where they are going.

Belongs here: autocorrelation, trend, and what both do to the spread between windows, from a column's days; NumPy only. Does not:
distances and their chances (``data_checks.drift.calibration``).

The days of a column of numbers are their means (of amounts, hardly any below zero, the logarithms: they grow by shares), those of
categories their shares. They are taken as a straight line and an autoregression of the first order around it, with what the rows
of a day vary by chance beside it. Least squares find a month's autocorrelation too small by about (2 + 4r) / n, a mean and a slope being taken
out (Kendall, Biometrika 41, 1954; Marriott and Pope, ibid.), which is put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

LEAST_DAYS = 14
"""With fewer days nothing is said of trend and autocorrelation."""
PARTS = 64
_LEVELS = (np.arange(PARTS) + 0.5) / PARTS
WEEK = 7
_MOST_RHO = 0.9
_MOST_TIMES = 1e6
_LEAST_SHARE = 0.2
_PRIOR_RHO, _PRIOR_DAYS = 0.5, 14
"""What days share seldom ends overnight: autocorrelation is drawn there, as by so many days more."""
_TREND_LEVEL = 4.0
"""Below so many times its own variance (two standard errors) a slope counts as none."""


@dataclass(frozen=True)
class Trend:
    """Where a column of numbers is going. ``days``: means of equal parts of each day's sorted values (days × PARTS); ``slope``:
    by how much, or ``amounts``: by what share (its logarithm), all of them move in a day, drawn towards nothing as little is
    known of it."""

    days: Floats
    dates: Floats
    slope: float
    amounts: bool

    def moved(self, values: Floats, days: Floats | float) -> Floats:
        """The values so many days later."""
        return np.asarray(values * np.exp(self.slope * days) if self.amounts else values + self.slope * days)

    def carried(self, date: float) -> Floats | None:
        """What the reference would be on ``date``, in order; None further ahead than the reference is long."""
        if date - self.dates[-1] > self.dates[-1] - self.dates[0]:
            return None
        return np.sort(self.moved(self.days, (date - self.dates)[:, None]).ravel())

    def still(self, slices: Sequence[Floats]) -> list[Floats]:
        """The sorted values of each day as they would be in the middle of the reference."""
        middle = float(self.dates.mean())
        return [self.moved(one, middle - date) for one, date in zip(slices, self.dates.tolist(), strict=True)]


@dataclass(frozen=True)
class Shared:
    """What all rows of a day share. ``rho``: its autocorrelation. ``times``: its variance, as a multiple of what a day's mean
    varies by because it has so many rows and no more."""

    rho: float = 0.0
    times: float = 0.0


@dataclass(frozen=True)
class Course:
    """``any_days``: as days follow one another. ``weeks``: weekdays beside their like, which is all that windows of whole
    weeks can differ by."""

    any_days: Shared = Shared()
    weeks: Shared = Shared()
    trend: Trend | None = None

    def shared(self, window: int) -> Shared:
        """What windows of so many days see."""
        return self.weeks if window % WEEK == 0 else self.any_days


def of_numbers(slices: Sequence[Floats], dates: Floats) -> Course:
    """From the sorted values of each day, none of them empty, and the days' dates (whole numbers)."""
    n = len(slices)
    if n < LEAST_DAYS:
        return Course()
    mean, square = (np.array([float(np.mean(x**power)) for x in slices]) for power in (1, 2))
    days = np.stack([_parts(one) for one in slices])
    amounts = bool(days[:, 0].mean() >= 0 and (mean > 0).all())
    seen = np.log(mean) if amounts else mean
    by_rows = (square - mean**2) / [len(one) for one in slices] / (mean**2 if amounts else 1.0)
    time = dates - dates.mean()
    long = float((time**2).sum())
    tilt = float((time * seen).sum()) / long
    rest = seen - seen.mean() - time * tilt
    any_days, weeks = _both(rest[:, None], dates, float(by_rows.mean()))
    near = any_days.rho * any_days.times / (1 + any_days.times)
    doubt = float((rest**2).sum()) / (n - 2) * (1 + near) / (1 - near) / long
    if tilt**2 <= _TREND_LEVEL * doubt:
        return Course(any_days, weeks)
    sure = 1 - _TREND_LEVEL * doubt / tilt**2
    return Course(any_days, weeks, Trend(days, dates, sure * tilt, amounts))


def of_categories(counts: Floats, dates: Floats) -> Course:
    """From counts (days × categories), none of the days empty. Of shares no trend is taken."""
    if len(counts) < LEAST_DAYS:
        return Course()
    rows = counts.sum(axis=1, keepdims=True)
    shares, time = counts / rows, dates - dates.mean()
    mean = shares.mean(axis=0)
    rest = shares - mean - time[:, None] * (time[:, None] * shares).sum(axis=0) / (time**2).sum()
    return Course(*_both(rest, dates, float((mean * (1 - mean)).sum() * np.mean(1 / rows))))


def _both(rest: Floats, dates: Floats, by_rows: float) -> tuple[Shared, Shared]:
    weekday = dates.astype(np.int64) % WEEK
    every = _shared(rest, by_rows, 2)
    if len(rest) < 3 * WEEK:
        return every, every
    of_weekday = np.stack([np.bincount(weekday, one, minlength=WEEK) for one in rest.T], axis=1)
    usual = of_weekday / np.maximum(np.bincount(weekday, minlength=WEEK), 1)[:, None]
    return every, _shared(rest - usual[weekday], by_rows, 1 + len(np.unique(weekday)))


def _parts(ordered: Floats) -> Floats:
    """Means of equal parts; quantiles where there are fewer values than parts."""
    if len(ordered) < PARTS:
        return np.quantile(ordered, _LEVELS)
    edges = np.linspace(0, len(ordered), PARTS + 1).astype(np.int64)
    return np.asarray(np.add.reduceat(ordered, edges[:-1]) / np.diff(edges))


def _shared(rest: Floats, by_rows: float, taken: int) -> Shared:
    """From what is left beside a line (days × any) after ``taken`` figures were fitted to it; rows alone give ``by_rows``."""
    n, total = len(rest), float((rest**2).sum())
    if not total > 0:
        return Shared()
    # less than the standard error of a variance of so few days is none
    more = max(total / (n - taken) / by_rows - 1 - np.sqrt(2 / (n - taken)), 0.0) if by_rows > 0 else _MOST_TIMES
    near = (n * float((rest[1:] * rest[:-1]).sum()) / total + taken) / (n - 4)
    own = min(near / max(more / (1 + more), _LEAST_SHARE), 1.0)
    rho = (n * own + _PRIOR_DAYS * _PRIOR_RHO) / (n + _PRIOR_DAYS)
    return Shared(float(np.clip(rho, 0.0, _MOST_RHO)), float(min(more, _MOST_TIMES)))


@lru_cache(maxsize=4096)
def mean_variance(days: int, rho: float) -> float:
    """Variance of the mean of so many neighbouring days, each with a variance of 1 (first-order autoregression)."""
    apart = np.arange(1, days)
    return float((1 + 2 * ((1 - apart / days) * rho**apart).sum()) / days)


def wider(window: int, days: int, shared: Shared) -> float:
    """How many times the variance between a window and ``days`` of reference is what rows alone give."""
    true = mean_variance(window, shared.rho) + mean_variance(days, shared.rho)
    return 1 + shared.times * true / (1 / window + 1 / days)


def carried_wider(window: int, days: int) -> float:
    """How many times the variance beside a trend that is carried to the next window is that beside the mean."""
    ahead, long = (days + window) / 2, days * (days**2 - 1) / 12
    return 1 + ahead**2 / long / (1 / window + 1 / days)


def freedom(days: int, rho: float) -> float:
    """Degrees of freedom of a variance between days of which each is like the one before (Bartlett, JRSS Supplement 8, 1946)."""
    return max(2.0, days * (1 - rho**2) / (1 + rho**2) - 1)
