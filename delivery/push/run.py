"""What the steps of one push share: the batch, the system and its limits, the clocks, the counts, the wish to stop.

Belongs here: state, reading, waiting. Does not: the steps (``delivery.push.engine`` and what it calls).
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Literal, ParamSpec, TypeVar

from delivery.connectors.base import Capabilities, Connector, Reading, Unavailable
from delivery.ledger import BatchRow, Ledger, State, utc_now
from delivery.push import reconciliation
from delivery.push.held_lease import Held, steady
from delivery.push.rate_limit import Backoff, Breaker, Bucket, Pause
from delivery.push.reconciliation import Final, Item
from delivery.push.types import Progress, PushSettings

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V")
TICK_S = 1.0
"""Longest time without a look at the lease and at the wish to stop."""
SHORTEST_POLL_S = 0.02


def allowed_while_stopped(batch: BatchRow, by_person: bool) -> bool:
    return batch.kind == "rollback" and by_person


def stopped_text(workflow: str, actor: str | None, reason: str) -> str:
    return f"{workflow} was stopped by {actor or 'somebody'} ({reason}): signalbox resume {workflow} lets it go on"


def chunks(items: Sequence[V], size: int) -> list[Sequence[V]]:
    size = max(1, size)
    return [items[i : i + size] for i in range(0, len(items), size)]


@dataclass(frozen=True)
class Options:
    """How a push goes: its clocks and chance, whom it tells, what stops it, and who asked for it."""

    run_id: str = ""
    clock: Callable[[], datetime] = utc_now
    sleep: Callable[[float], None] = time.sleep
    monotonic: Callable[[], float] = steady
    rng: random.Random | None = None
    progress: Callable[[Progress], None] | None = None
    stop: threading.Event | None = None
    by_person: bool = False


@dataclass
class Done:
    """What one step made of one item; ``final`` None: to be looked at again at ``until``."""

    item: Item
    final: Final | None = None
    until: float = 0.0
    window: bool = False
    """Waiting for the staleness window (not bounded by patience), not for a system that does not answer."""
    missing: bool | None = None
    """Whether the last reading found nothing there; None: it was not read."""
    free: bool = False
    """It shows what we expect, nothing of ours is on its way, and this step was not to send."""
    outcome: str | None = None
    window_ms: float | None = None
    repeats: int = 0
    says: str = ""
    verified_at: datetime | None = None


Mode = Literal["send", "free", "resolve"]
"""send: write where it is right; free: read only, and hand back what might be sent; resolve: read only, skip the rest."""


class Run:
    """One push of one batch by one process: what its steps share. Only its own thread touches the ledger; the workers call the
    system."""

    def __init__(
        self,
        ledger: Ledger,
        connector: Connector,
        batch: BatchRow,
        settings: PushSettings,
        options: Options,
        held: Held,
    ) -> None:
        self.ledger, self.connector, self.batch, self.settings, self.held = ledger, connector, batch, settings, held
        self.run_id, self.progress, self.stop = options.run_id, options.progress, options.stop or threading.Event()
        self.clock, self.sleep, self.monotonic = options.clock, options.sleep, options.monotonic
        self.set_capabilities(connector.capabilities)
        self.bucket = Bucket(settings.rate_per_s, monotonic=self.monotonic, sleep=self.sleep)
        self.backoff = Backoff(*settings.backoff_s, options.rng or random.Random())
        self.read_breaker = Breaker(settings.breaker_failures, settings.breaker_cooldown_s, monotonic=self.monotonic)
        self.write_breaker = Breaker(settings.breaker_failures, settings.breaker_cooldown_s, monotonic=self.monotonic)
        self.pause = Pause(monotonic=self.monotonic)
        self.halt = threading.Event()
        self.system = connector.system
        self.workers = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="push")
        self.owners = reconciliation.Owners()
        self.lock = threading.Lock()
        self.began = self.monotonic()
        self.moved = self.began
        self.accepted = self.sends = self.reads = self.repeats = 0
        self.windows: list[float] = []
        self.replanned: list[tuple[str, int, int]] = []
        self.ledger_s = 0.0
        self.may_hold: dict[str, int] = {}
        """What writes of earlier batches of the day may still bring about, by entity."""
        self.foreign: dict[str, tuple[int, str]] = {}
        """Values that another workflow proved last, and which one, by entity."""
        self.why = ""
        """Why no more is sent by this push."""
        self.note = ""
        self.by = ""
        self.obeys_switch = not allowed_while_stopped(batch, options.by_person)
        self.counts: Counter[str] = Counter()
        self.total = 0

    def set_capabilities(self, can: Capabilities) -> None:
        self.can = can
        self.once = can.idempotency_key or can.conditional_write
        # How long a write without an answer may still change what is read. A condition makes a late one fail.
        self.late_s = max(can.stale_reads_s, self.settings.late_s)
        self.window_s = can.stale_reads_s if can.conditional_write else self.late_s

    def pending(self, begun: Iterable[str] = ()) -> str:
        """Which rollback of the workflow comes first, in words; empty where none does. It counts from when it was asked for."""
        asked = self.timed(self.ledger.pending_rollbacks, self.batch.workflow)
        waits = list(dict.fromkeys([*(f"rollback-{one}" for one in asked), *begun]))
        if not waits:
            return ""
        return (
            f"the rollback {', '.join(waits[:3])} of {self.batch.workflow} is not complete: run it again first "
            f"(signalbox rollback {waits[0].removeprefix('rollback-')}), then push {self.batch.batch_id}"
        )

    def all_missing(self, count: int) -> str:
        return (
            f"none of {count} entities is there downstream: is the address of {self.system} right (its base path too), and "
            "the account? Nothing was concluded: mend it and run it again"
        )

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        """One call, or as many as the system's limit wants."""
        found: dict[str, Reading] = {}
        for some in chunks(keys, self.can.bulk_read):
            self.bucket.take()
            try:
                found |= self.connector.read(some)
            except Unavailable as error:
                if error.retry_after is None:
                    self.read_breaker.failed(some[0])
                else:
                    self.pause.ask(error.retry_after)
                raise
            self.read_breaker.succeeded()
            with self.lock:
                self.reads += len(some)
        return found

    def blocked(self, *, sending: bool) -> float:
        """Seconds for which the system is to be left alone."""
        wait = max(self.pause.wait(), self.read_breaker.wait())
        return max(wait, self.write_breaker.wait()) if sending else wait

    def read_all(self, keys: Sequence[str]) -> dict[str, Reading]:
        """Read many before anything is sent, patiently; what could not be read is left out."""
        found: dict[str, Reading] = {}
        missing = list(dict.fromkeys(keys))
        began = self.monotonic()
        for tried in itertools.count(1):
            wrong: BaseException | None = None
            says = ""
            for future in self.parallel(
                [partial(self.read_once, chunk) for chunk in chunks(missing, self.can.bulk_read)]
            ):
                error = CancelledError() if future.cancelled() else future.exception()
                if error is None:
                    found |= future.result()
                elif isinstance(error, Unavailable):
                    says = str(error)
                else:
                    wrong = wrong or error
            if wrong is not None:
                raise wrong
            missing = [key for key in missing if key not in found]
            wait = max(self.blocked(sending=False), self.backoff.wait(tried))
            self.why = self.why or self.must_stop()
            if not missing or self.why:
                break
            if self.monotonic() + wait - began > self.settings.patience_s:
                self.why = f"{self.system} cannot be read: {says or 'it leaves entities out of its answers'}"
                break
            self.nap(wait)
        return {key: found[key] for key in keys if key in found}

    def read_once(self, keys: Sequence[str]) -> dict[str, Reading]:
        if self.halt.is_set():
            return {}
        if self.blocked(sending=False) > 0:
            raise Unavailable("it is left alone for a while")
        return self.read(keys)

    def parallel(self, calls: Sequence[Callable[[], T]]) -> list[Future[T]]:
        """Run calls on the workers; meanwhile the lease is kept, and the wish to stop is heard."""
        futures = [self.workers.submit(call) for call in calls]
        try:
            waiting: Collection[Future[T]] = futures
            while waiting := wait(waiting, timeout=TICK_S).not_done:
                self.why = self.why or self.must_stop()
                if self.why:
                    self.halt.set()
        except BaseException:
            self.halt.set()
            for future in futures:
                future.cancel()
            wait(futures)
            raise
        return futures

    def must_stop(self) -> str:
        """Why no more may be sent, if so; keeps the lease (raises Fenced)."""
        self.timed(self.held.keep)
        if self.stop.is_set():
            return "it was asked to stop: run it again"
        if self.obeys_switch:
            switch = self.timed(self.ledger.stopped, self.batch.workflow)
            if switch is not None:
                return stopped_text(switch.workflow, switch.actor, switch.reason)
            if self.batch.kind == "decision" and (pending := self.pending()):
                return pending
        return ""

    def nap(self, seconds: float) -> None:
        self.sleep(min(max(seconds, 0.001), TICK_S))

    def nap_until(self, until: float) -> bool:
        """Wait for a moment of the monotonic clock; False where the push has to stop."""
        while (left := until - self.monotonic()) > 0:
            self.why = self.why or self.must_stop()
            if self.why:
                return False
            self.nap(left)
        return True

    def count(self, item: Item, state: State) -> None:
        if item.batch_id == self.batch.batch_id:
            self.counts[item.state] -= len(item.deliveries)
            self.counts[state] += len(item.deliveries)
        item.state = state

    def timed(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        began = self.monotonic()
        try:
            return call(*args, **named)
        finally:
            self.ledger_s += self.monotonic() - began

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.halt.set()
        self.workers.shutdown(wait=True, cancel_futures=True)
