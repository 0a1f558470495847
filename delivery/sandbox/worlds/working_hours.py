"""When people work: the hours of a team, and the service hours that a due time is counted in.

Belongs here: arithmetic on seconds since 1970. Does not: tickets, and who works on which (``tickets``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HOUR, DAY = 3600, 86400
_OPENS, _CLOSES, _SERVICE_DAY = 8 * HOUR, 18 * HOUR, 10 * HOUR


@dataclass(frozen=True)
class Team:
    """Hands and hours: `agents` people, each from `opens` to `closes` (hours, UTC) on `weekdays` (0 = Monday)."""

    name: str
    agents: int
    opens: int
    closes: int
    weekdays: tuple[int, ...]

    @property
    def hours_per_week(self) -> int:
        """Working hours of all agents in a week."""
        return self.agents * (self.closes - self.opens) * len(self.weekdays)


def service_seconds(times: np.ndarray) -> np.ndarray:
    """Service seconds (Monday to Friday, 08:00 to 18:00) from the Monday before 1970 to each of `times` (seconds)."""
    days, second = np.divmod(times, DAY)
    weeks, weekday = np.divmod(days + 3, 7)
    served = np.where(weekday < 5, np.clip(second - _OPENS, 0, _SERVICE_DAY), 0)
    return np.asarray((weeks * 5 + np.minimum(weekday, 5)) * _SERVICE_DAY + served)


def due_at(opened: int, allowed: int) -> int:
    """`opened` plus `allowed` service seconds (Monday to Friday, 08:00 to 18:00)."""
    days, second = divmod(opened, DAY)
    weeks, weekday = divmod(days + 3, 7)  # 1970-01-01 was a Thursday
    served = min(max(second - _OPENS, 0), _SERVICE_DAY) if weekday < 5 else 0
    total = (weeks * 5 + min(weekday, 5)) * _SERVICE_DAY + served + allowed
    whole, rest = divmod(total - 1, _SERVICE_DAY)
    weeks, weekday = divmod(whole, 5)
    return (weeks * 7 + weekday - 3) * DAY + _OPENS + rest + 1


def on_shift(team: Team, now: int) -> bool:
    """Whether the team works at a moment."""
    days, second = divmod(now, DAY)
    return (days + 3) % 7 in team.weekdays and team.opens * HOUR <= second < team.closes * HOUR


def end_of_work(team: Team, start: int, work: int) -> int:
    """When `work` seconds, begun on shift at `start`, are done: nights and days off do not count."""
    midnight, close = start - start % DAY, team.closes * HOUR
    left = midnight + close - start
    while work > left:
        work -= left
        midnight += DAY
        while (midnight // DAY + 3) % 7 not in team.weekdays:
            midnight += DAY
        start, left = midnight + team.opens * HOUR, close - team.opens * HOUR
    return start + work
