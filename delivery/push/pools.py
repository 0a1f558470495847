"""Money in arms' pools: what they hold at most, and which increases still fit. Pure, in whole units, exact.

Belongs here: live totals that count what is unresolved at its most, and replanning when decreases fail. Does not: reading or
sending anything (``delivery.push``), or choosing the decisions (the policy).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Holding:
    """What one target may hold at this moment, as far as anybody can know.

    ``arms``: every arm that decides on it (one, unless a target is shared across arms; it then counts in each).
    ``values``: all values that it may hold: the last reading, and each value sent that is neither proven nor ruled out.
    None among them: what it holds cannot be read as money.
    """

    target: str
    arms: tuple[str, ...]
    values: tuple[int | None, ...]

    @property
    def most(self) -> int | None:
        """The largest possible value; None where it cannot be told."""
        return None if None in self.values else max((v for v in self.values if v is not None), default=0)


@dataclass(frozen=True)
class Totals:
    """Live totals by arm, each target at the most that it may hold, and the targets whose money cannot be read."""

    most: Mapping[str, int]
    unreadable: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Increase:
    """One increase that wants money: from ``now`` to ``after``; ``gain`` is what the decision expects of it."""

    key: str
    arm: str
    now: int
    after: int
    gain: float | None

    @property
    def rate(self) -> Fraction:
        """Gain for each unit of money, exact; nothing known counts as nothing gained."""
        if self.gain is None or not math.isfinite(self.gain):
            return Fraction(0)
        return Fraction(self.gain) / (self.after - self.now)


@dataclass(frozen=True)
class Planned:
    """What an increase gets: ``value`` (its own ``after``, or less), or None: nothing is left for it."""

    increase: Increase
    value: int | None

    @property
    def full(self) -> bool:
        return self.value == self.increase.after


def live(holdings: Iterable[Holding]) -> Totals:
    """The most that each arm's targets may hold together."""
    most: dict[str, int] = {}
    unreadable: dict[str, list[str]] = {}
    for holding in holdings:
        value = holding.most
        for arm in holding.arms:
            most[arm] = most.get(arm, 0) + (value or 0)
            if value is None:
                unreadable.setdefault(arm, []).append(holding.target)
    return Totals(most, {arm: tuple(sorted(targets)) for arm, targets in unreadable.items()})


def headroom(pools: Mapping[str, int], totals: Totals) -> dict[str, int]:
    """What may still be added in each arm; negative where more is held than its pool; 0 where a holding is unreadable."""
    return {
        arm: min(0, pool - totals.most.get(arm, 0)) if arm in totals.unreadable else pool - totals.most.get(arm, 0)
        for arm, pool in pools.items()
    }


def plan(increases: Iterable[Increase], room: Mapping[str, int], unit: int = 1) -> list[Planned]:
    """Share out what is left in each arm, by gain for each unit of money (ties by key).

    Increases keep their full value in that order; the first that does not fit gets what is left, as a multiple of ``unit``;
    those after it get nothing. The sum of the increments of an arm never passes its room.
    """
    left = dict(room)
    spent: set[str] = set()
    planned = []
    for increase in sorted(increases, key=lambda i: (-i.rate, i.key)):
        arm, needs = increase.arm, increase.after - increase.now
        if needs <= 0:
            raise ValueError(f"{increase.key}: {increase.now} to {increase.after} is no increase")
        available = left.get(arm, 0)
        if arm in spent or available <= 0:
            value = None
        elif needs <= available:
            value = increase.after
        else:
            value = (increase.now + available) // unit * unit
            value = value if value > increase.now else None
        if value is None or value < increase.after:
            spent.add(arm)
        if value is not None:
            left[arm] = available - (value - increase.now)
        planned.append(Planned(increase, value))
    return planned
