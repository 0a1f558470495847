"""How sure a figure over days is: whole days are drawn again (cluster bootstrap).

Belongs here: intervals and the days that they are drawn from. Does not: which figure (``models.evaluation.paired``, policies).

Whole days are resampled (Cameron, Gelbach and Miller 2008), since the rows of a day share its ups and downs. With few days
percentiles are too narrow; they are widened as Hesterberg says ("What Teachers Should Know About the Bootstrap", The American
Statistician 69(4), 2015, the expanded percentile interval). Nor are neighbouring days independent: whoever is better today
often is so tomorrow for the same reason. The interval is √((1 + ρ) / (1 - ρ)) times as wide, for the variance of a mean of
first-order autoregressive days is that factor's square times that of independent ones (Priestley, Spectral Analysis and Time
Series, 1981, section 5.3). A week says little of ρ, so that it is drawn towards what is usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
LEAST_DRAWS = 2000
USUAL_RHO, USUAL_DAYS = 0.3, 14
"""Towards which an autocorrelation is drawn, and as by how many days that had shown it."""
MOST_RHO = 0.9


@dataclass(frozen=True)
class Interval:
    """A figure with its interval; ``low`` and ``high`` are None where one day alone, or nothing, says how sure it is.

    p_worse: one-sided p-value of "not above 0" (t of the bootstrap's spread, as much wider, days - 1 degrees of freedom).
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
        return {k: plain(v) for k, v in asdict(self).items()}

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.point:+.2%} (no interval: {self.days} day)"
        return f"{self.point:+.2%} [{self.low:+.2%}, {self.high:+.2%}]"


def autocorrelation(moves: Floats) -> Floats:
    """Of what each day adds to a figure, (days, k): (k,) from 0 to MOST_RHO, drawn towards USUAL_RHO; 0 where no day differs.

    Least squares find it too small by about (1 + 4r) / days (Kendall, Biometrika 41, 1954), which is put back first. Days
    without rows are passed over: the next one counts as their neighbour.
    """
    n = len(moves)
    rest = moves - moves.mean(axis=0)
    total = (rest**2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (rest[1:] * rest[:-1]).sum(axis=0) / total
    own = np.clip((n * found + 1) / max(n - 4, 1), -1.0, 1.0)
    drawn = (n * np.nan_to_num(own) + USUAL_DAYS * USUAL_RHO) / (n + USUAL_DAYS)
    scale = np.abs(moves).max(axis=0)
    return np.asarray(np.where(total > (1e-12 * scale) ** 2, np.clip(drawn, 0.0, MOST_RHO), 0.0))


def plain(value: Any) -> Any:
    """For JSON: a figure that is no number is null."""
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
            without = np.asarray(figure(*[one.sum(axis=0) - one for one in sums]), dtype=np.float64)
        lasting = np.sqrt((1 + (rho := autocorrelation(points - without))) / (1 - rho))
        wider = np.sqrt(n / (n - 1))
        tail = float(ndtr(wider * stdtrit(n - 1, (1 - self.confidence) / 2)))
        found = []
        for at, point in enumerate(points.tolist()):
            mine = drawn[:, at][np.isfinite(drawn[:, at])]  # a draw may hold no row of a small slice
            if len(mine) < self.draws / 2 or not np.isfinite(point):
                found.append(Interval(point, None, None, 1.0, n, rows[at]))
                continue
            low, high = (point + lasting[at] * (np.quantile(mine, [tail, 1 - tail]) - point)).tolist()
            spread = float(mine.std()) * wider * lasting[at]
            certain = 0.0 if point > 0 else 1.0  # every day says the same
            p = float(stdtr(n - 1, -point / spread)) if spread > 1e-15 * max(abs(point), 1e-300) else certain
            found.append(Interval(point, min(low, point), max(high, point), p, n, rows[at]))
        return found
