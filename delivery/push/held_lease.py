"""The lease of a system while a push runs: taken, renewed in time, given back.

Belongs here: keeping it, and whether it may still be believed in. Does not: granting it (``delivery.ledger.leases``).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from delivery.ledger import Holder, Lease, Ledger
from delivery.push.types import PushSettings


def steady() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps, as leases do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


@contextlib.contextmanager
def leased(
    ledger: Ledger, system: str, settings: PushSettings, monotonic: Callable[[], float], holder: Holder | None
) -> Iterator[Held]:
    """The lease of a system; given back at the end unless it was taken from us."""
    asked = monotonic()  # its end counts from the grant, and not from whenever the answer came
    held = Held(ledger, ledger.lease(system, holder, settings.lease_s), settings.lease_s, monotonic, asked)
    try:
        yield held
    except Exception:
        # What went wrong is already on its way up; a ledger that is down must not hide it.
        try:
            held.give_back()
        except Exception:
            ledger.abandon(held.lease)
        raise
    except BaseException:
        held.give_back()
        raise
    held.give_back()


class Held:
    """A lease that is renewed in time; ``sure`` says whether it may still be believed in without asking."""

    def __init__(
        self, ledger: Ledger, lease: Lease, ttl_s: float, monotonic: Callable[[], float], asked: float
    ) -> None:
        self.lease, self._ledger, self._ttl, self._monotonic = lease, ledger, ttl_s, monotonic
        self._renewed = asked

    @property
    def sure(self) -> bool:
        """Asked by the threads before every write: a process that slept through its lease writes nothing."""
        return self._monotonic() - self._renewed < self._ttl

    def keep(self) -> None:
        """Renew when a third of it has passed; raises Fenced where another process has it."""
        now = self._monotonic()
        if now - self._renewed >= self._ttl / 3:
            self.lease = self._ledger.renew(self.lease, self._ttl)
            self._renewed = now

    def give_back(self) -> None:
        self._ledger.release(self.lease)


class NoLease(Held):
    """What a dry run has: never sure enough to write."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic

    @property
    def sure(self) -> bool:
        return False

    def keep(self) -> None:
        pass
