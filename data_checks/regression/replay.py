"""What would have come of the same units under another policy: what a replay must yield, and how far it lies from what happened.

Belongs here: the protocol `Replay`, what it yields (`Replayed`), the two differences that verdicts rest on. Does not: a replay itself
(``data_checks/regression/queue_replay.py`` is the first), tests and verdicts on it (``data_checks/regression/matched_test.py``).

A replay reads nothing that happened after the instant that it is asked for, and is arm-blind: the same rows give the same figures in
either arm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Replayed:
    """What a replay yields, one entry a unit in an epoch (a team's week); all arrays of shape (m,)."""

    unit: Ints
    epoch: Ints
    treated: Bools
    n: Floats
    """Rows that the outcome counts: tickets that come due in that week, of those opened by then."""
    base: Floats
    """Bad outcomes if the status quo had stood, ``pol``: if what was asked for had; ``actual``: known, plus forecast."""
    pol: Floats
    actual: Floats
    own: Floats
    """The unit's (actual - base)/n in its pre-period; 0 where it had none."""
    effort: Floats
    """Mean log(effort / the category's pre-period mean) of what was done, less the unit's own pre-period level; NaN: nothing done."""
    moved: Floats
    """Share of the rows that came from another unit; NaN: no rows."""
    hours: Floats
    """Hours of work on what was finished by then, and ``base_hours`` as the replay has them: the fewer of its two orders' (an order that
    takes long work first has finished less)."""
    base_hours: Floats
    reasons: tuple[str, ...] = ()
    """Why no verdict may rest on it; empty: it may."""
    pace: Floats | None = None
    """The unit's hours over ``base_hours`` in its pre-period: what a replay leaves out (pauses) slows it; None: 1."""


class Replay(Protocol):
    """Something that can be served, or spent, anew under another policy."""

    def at(self, now: float) -> Replayed:
        """All units and epochs begun by ``now``, with what was known then."""
        ...


@dataclass(frozen=True)
class Difference:
    """What replay and reality say of the treated units, as shares of their rows; positive is worse."""

    d: float
    """Σ(pol - base)/Σn: what the order that was asked for should do."""
    o: float
    """Σ(actual - base - own pre-period)/Σn: what has happened beyond the status quo's replay."""
    se_d: float
    se_o: float
    """Over the treated units; NaN with fewer than two."""
    d_all: float
    """``d`` over all units, treated or held out, and its error: what was asked for is known of both, and more units are surer."""
    se_all: float


def difference(found: Replayed) -> Difference:
    """d, o and their errors; NaN where no treated unit has rows."""
    t = found.treated
    n, gaps = found.n[t], (found.pol - found.base)[t]
    beyond = (found.actual - found.base - found.own * found.n)[t]
    (d, se_d), (o, se_o) = (_ratio(found.unit[t], values, n) for values in (gaps, beyond))
    return Difference(d, o, se_d, se_o, *_ratio(found.unit, found.pol - found.base, found.n))


def _ratio(unit: Ints, values: Floats, n: Floats) -> tuple[float, float]:
    """Σvalues/Σn and its error over units (linearised)."""
    if not n.sum():
        return math.nan, math.nan
    ratio = float(values.sum() / n.sum())
    _, code = np.unique(unit, return_inverse=True)
    rest = np.bincount(code, values - ratio * n)
    m = len(rest)
    return ratio, float(np.sqrt((rest**2).sum() * m / (m - 1)) / n.sum()) if m > 1 else math.nan
