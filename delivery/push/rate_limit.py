"""How fast and how often a downstream system is asked: rate limit, backoff, circuit breaker.

Belongs here: small thread-safe clocks' work, in seconds of a monotonic clock that is handed in. Does not: what a failure is,
or what is sent (``delivery.push``).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable


class Bucket:
    """A rate limit: ``take`` waits until one more call is allowed. ``rate_per_s`` None: no limit.

    A burst of at most one second's calls, never more than ``rate_per_s`` on average. Waiting calls queue up in order.
    """

    def __init__(
        self, rate_per_s: float | None, *, monotonic: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._rate = rate_per_s
        self._monotonic, self._sleep = monotonic, sleep
        self._lock = threading.Lock()
        self._most = max(1.0, rate_per_s or 0.0)
        self._tokens = self._most
        self._at = monotonic()

    def take(self) -> None:
        """Take one call, waiting for it if need be."""
        if self._rate is None:
            return
        with self._lock:
            now = self._monotonic()
            self._tokens = min(self._most, self._tokens + max(0.0, now - self._at) * self._rate)
            self._at = now
            self._tokens -= 1.0
            wait = -self._tokens / self._rate if self._tokens < 0 else 0.0
        if wait > 0:
            self._sleep(wait)


class Backoff:
    """Full jitter: a wait drawn evenly between nothing and a bound that doubles with each try, up to ``most_s``."""

    def __init__(self, first_s: float, most_s: float, rng: random.Random) -> None:
        self._first, self._most, self._rng = first_s, most_s, rng
        self._lock = threading.Lock()

    def wait(self, tried: int) -> float:
        """Seconds to wait after ``tried`` tries (1: the first has failed)."""
        bound = min(self._most, self._first * 2.0 ** min(max(tried - 1, 0), 60))
        with self._lock:
            return self._rng.uniform(0.0, bound)


class Breaker:
    """Opens when so many different entities failed with no success between them (one that always fails is its own trouble,
    not the system's); after the cooldown it is half open: one probe closes it or opens it again.

    Whoever calls the system asks ``wait()`` first, and while ``half_open`` sends one call only.
    """

    def __init__(self, failures: int, cooldown_s: float, *, monotonic: Callable[[], float]) -> None:
        self._limit, self._cooldown, self._monotonic = failures, cooldown_s, monotonic
        self._lock = threading.Lock()
        self._row: set[str] = set()
        self._opened: float | None = None

    def wait(self) -> float:
        """Seconds until a call may be made; 0: now."""
        with self._lock:
            if self._opened is None:
                return 0.0
            return max(0.0, self._opened + self._cooldown - self._monotonic())

    @property
    def closed(self) -> bool:
        return self._opened is None

    @property
    def half_open(self) -> bool:
        return self._opened is not None and self.wait() <= 0.0

    def succeeded(self) -> None:
        """The system answered in earnest."""
        with self._lock:
            self._row.clear()
            self._opened = None

    def failed(self, who: str) -> None:
        """It did not, asked for ``who``. A late answer to a call from before it opened does not prolong the cooldown."""
        with self._lock:
            now = self._monotonic()
            self._row.add(who)
            cooled = self._opened is not None and now - self._opened >= self._cooldown
            if cooled or (self._opened is None and len(self._row) >= self._limit):
                self._opened = now


class Pause:
    """What a system asked for by Retry-After: nobody calls before it is over."""

    def __init__(self, *, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._until = monotonic()

    def ask(self, seconds: float) -> None:
        """Pause for at least so long from now; never shortens a longer one."""
        with self._lock:
            self._until = max(self._until, self._monotonic() + max(0.0, seconds))

    def wait(self) -> float:
        """Seconds until it is over; 0: now."""
        with self._lock:
            return max(0.0, self._until - self._monotonic())
