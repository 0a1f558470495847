"""Boundaries for a comparison that is looked at every day, with a known chance of a false alarm over all looks together.

Belongs here: spending of α, over the looks and over the versions of a year; the boundary of a normal and of a randomisation test. Does not: outcomes,
arms, verdicts (``data_checks/regression.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import date
from functools import lru_cache
from typing import Any, Literal

import numpy as np

Spending = Literal["early", "late"]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


def spent(fraction: Any, alpha: float, shape: Spending = "late") -> Floats:
    """How much of a one-sided ``alpha`` is spent by a fraction of the horizon.

    Lan and DeMets (Biometrika 1983). ``late``: little at first, the form that resembles O'Brien and Fleming, 2(1 - Φ(z_{α/2}/√t)).
    ``early``: nearly in proportion to time, the form that resembles Pocock, α·ln(1 + (e - 1)t).
    """
    from scipy.special import ndtr, ndtri

    t = np.clip(np.asarray(fraction, dtype=np.float64), 0, 1)
    if shape == "early":
        return np.asarray(alpha * np.log1p((math.e - 1) * t))
    with np.errstate(divide="ignore"):
        return np.asarray(2 * ndtr(ndtri(alpha / 2) / np.sqrt(t)))


YEAR = 365
"""Days in which what was spent of α comes back."""


def left(earlier: Iterable[tuple[date, date]], start: date, alpha: float, horizon_days: int, shape: Spending) -> float:
    """What a comparison that begins on ``start`` may spend of ``alpha``, where each version opens a comparison.

    An account: it holds at most α, each comparison takes from it what its days spend, and α comes back evenly over a year. So
    all comparisons that begin within any 365 days spend at most 2α together, however many versions there are, and a version
    that comes after a quiet year is judged at the whole of α. A schedule by number (α·6/(π²k²) for the k-th of a year) spends
    less and finds nothing after the tenth version; see ``benchmarks.regression``.

    Args:
        earlier: First and last judged day of the comparisons before it.
    """
    held, at = alpha, None
    for first, last in sorted(earlier):
        held = held if at is None else min(alpha, held + alpha * (first - at).days / YEAR)
        at = first
        held -= float(spent(((last - first).days + 1) / horizon_days, held, shape))
    return held if at is None else min(alpha, held + alpha * (start - at).days / YEAR)


@lru_cache(maxsize=64)
def normal_bounds(information: tuple[float, ...], spending: tuple[float, ...]) -> tuple[float, ...]:
    """Bounds for every look of a statistic that is normal, with independent increments.

    Lan and DeMets (Biometrika 1983): at each look as much of the probability crosses as may be spent by then. The density of
    the paths that have not crossed is carried from look to look at the nodes of a Gauss quadrature (Armitage, McPherson,
    Rowe 1969). No bound depends on a later look.

    Args:
        information: One over the squared error by look, up to a factor, not decreasing, above 0.
        spending: Cumulative α by look, not decreasing.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtr

    nodes, weights = np.polynomial.legendre.leggauss(240)
    bounds = []
    at, crossed, grid, density = 0.0, 0.0, np.zeros(1), np.ones(1)
    for total, may in zip(information, spending, strict=True):
        if may <= crossed or total <= at:
            bounds.append(math.inf)
            continue
        low, high, step = -6 * math.sqrt(total), 12 * math.sqrt(total), math.sqrt(total - at)
        # a step below the distance of the nodes would be lost; a longer one is on the safe side
        step = max(step, (grid[-1] - grid[0]) / 80)

        def over(c: float) -> float:
            return float(np.sum(density * ndtr((grid - c) / step)))  # noqa: B023 - called in this turn alone

        top = float(brentq(lambda c: over(c) - (may - crossed), low, high, xtol=1e-9 * high))  # noqa: B023
        bounds.append(top / math.sqrt(total))
        there = low + (nodes + 1) * (top - low) / 2
        kernel = np.exp(-(((there[:, None] - grid[None, :]) / step) ** 2) / 2) / (step * math.sqrt(2 * math.pi))
        at, crossed, grid, density = total, may, there, (kernel @ density) * weights * (top - low) / 2
    return tuple(bounds)


def permuted_bounds(paths: Floats, spending: Floats) -> tuple[Floats, Bools]:
    """Bounds for every look from paths under permuted arms; row 0 is the path that was observed.

    At each look those paths cross which lie highest among the ones that never crossed, as many as the spending allows for
    all looks so far. Under the null hypothesis the observed path is exchangeable with the others, so that it ever
    crosses with probability at most the last of ``spending``: exactly, for any number of paths, any dependence between looks.

    Args:
        paths: Statistics, shape (1 + permutations, looks); not a number counts as the smallest.
        spending: Cumulative α by look, shape (looks,), not decreasing.

    Returns:
        The bound of each look (infinite while nothing may be spent; a path crosses when strictly above), and
        whether the observed path lies above it.
    """
    alive = np.ones(len(paths), dtype=bool)
    bounds = np.full(paths.shape[1], np.inf)
    above = np.zeros(paths.shape[1], dtype=bool)
    values = np.nan_to_num(paths, nan=-np.inf)
    for k in range(paths.shape[1]):
        room = math.floor(spending[k] * len(paths) + 1e-9) - int((~alive).sum())
        living = values[alive, k]
        if room < 1 or len(living) <= room:
            continue
        bounds[k] = np.partition(living, len(living) - room - 1)[len(living) - room - 1]
        # arms that are permuted onto themselves differ in the last bits at most, and are no evidence
        just = bounds[k] + 1e-9 * max(1.0, abs(bounds[k])) if np.isfinite(bounds[k]) else bounds[k]
        above[k] = values[0, k] > just
        alive &= values[:, k] <= just
    return bounds, above


def constant(looks: int, alpha: float, shape: str) -> float:
    """The constant of a one-sided group-sequential boundary with equally spaced looks, by integration.

    ``pocock``: cross when z > c at any look; ``obrien-fleming``: when z·√(k/looks) > c. The density of the paths that have not
    crossed is carried from look to look at the nodes of a
    Gauss quadrature (Armitage, McPherson, Rowe 1969).
    """
    from scipy.optimize import brentq
    from scipy.special import ndtr

    if shape not in ("pocock", "obrien-fleming"):
        raise ValueError(f"shape: {shape!r} is unknown (allowed here: pocock, obrien-fleming)")
    nodes, weights = np.polynomial.legendre.leggauss(160)

    def excess(c: float) -> float:
        crossed, grid, density = 0.0, np.zeros(1), np.ones(1)
        for k in range(1, looks + 1):
            top, low = c * math.sqrt(k if shape == "pocock" else looks), -6 * math.sqrt(k)
            crossed += float(np.sum(density * ndtr(grid - top)))
            step = low + (nodes + 1) * (top - low) / 2
            kernel = np.exp(-((step[:, None] - grid[None, :]) ** 2) / 2) / math.sqrt(2 * math.pi)
            grid, density = step, (kernel @ density) * weights * (top - low) / 2
        return crossed - alpha

    return float(brentq(excess, 0.5, 6.0, xtol=1e-4))
