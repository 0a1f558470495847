"""The one clock: every time of day that is not handed on as an argument is read here.

Belongs here: what time it is, in UTC. Does not: durations (``time.monotonic``), or which day is decided (``pipeline.workflow``).
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeAlias

Clock: TypeAlias = Callable[[], datetime]
"""What tells the time as naive UTC; tests hand on one of their own."""


def now() -> datetime:
    """Now, with its time zone (UTC)."""
    return datetime.now(UTC)


def utc_now() -> datetime:
    """Now, as naive UTC: how times stand in the lake and in the ledger."""
    return now().replace(tzinfo=None)
