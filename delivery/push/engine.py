"""Sends a batch downstream and proves by read-back that it is there: the heart of the product.

Belongs here: the steps of a push, what may be sent when, the dry run. Does not: what one reading means (``delivery.push.reconciliation``),
money (``delivery.push.pools``), pace (``delivery.push.rate_limit``), how any one system is called (``delivery.connectors``).

Every send is in the ledger before it goes out, so that a process may be killed at any instant: what was in flight is found
again and resolved by reading. Values are absolute, in the unit of the decision. Durations are measured on a monotonic clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

from delivery.connectors.base import (
    Capabilities,
    Change,
    Connector,
    Misconfigured,
    Reading,
    Unavailable,
    Write,
    Written,
    mapping_of,
    on_another_version,
)
from delivery.ledger import (
    OPEN,
    Attempt,
    AttemptRow,
    BatchRow,
    Delivery,
    Holder,
    Lease,
    Ledger,
    Result,
    State,
    utc_now,
)  # fmt: skip
from delivery.limits import Limits
from delivery.push import pools, reconciliation
from delivery.push.rate_limit import Backoff, Breaker, Bucket, Pause
from delivery.push.reconciliation import Final, Gone, Item, Judgement, Send, Third, Wait
from delivery.push.types import (  # fmt: skip
    Blocked,
    Changed,
    Diff,
    DiffRow,
    NotApproved,
    Progress,
    PushError,
    PushSettings,
    Refused,
    Report,
    Stopped,
)

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V")
CONDITIONS_TRIED = 3
"""Entities for which a write is tried that its condition must turn away, until one of them tells."""
CONFLICTS_IN_A_ROW = 3
"""Conditional writes tried at once, each on a fresh reading, while an entity changes around its value."""
SKEW = timedelta(hours=1)
"""How far a downstream system's clock may be off where its change history is asked for."""
TICK_S = 1.0
"""Longest time without a look at the lease and at the wish to stop."""
SHORTEST_POLL_S = 0.02


def steady() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps, as leases do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def idempotency_key(batch_id: str, entity: str, value: int) -> str:
    """The same for every try of one value for one entity in one batch, on any machine."""
    return hashlib.sha256(f"{batch_id}\0{entity}\0{value}".encode()).hexdigest()[:32]


def push(
    ledger: Ledger,
    connector: Connector,
    batch_id: str,
    *,
    settings: PushSettings | None = None,
    run_id: str = "",
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = steady,
    rng: random.Random | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    by_person: bool = False,
    holder: Holder | None = None,
) -> Report:
    """Send what differs, read it back, and record both; run it again until the report is ``complete``.

    ``stop``: set it to end after the calls that are under way. ``by_person``: a rollback that a person asked for is sent even
    while the workflow is stopped. ``holder``: who takes the lease, this process if not given.

    A name under which the same was decided several times (``ledger.generation``) means the last of them. Limits are judged
    against what stands when a value is sent (``delivery.limits``).

    Raises Refused, NotApproved, Stopped, Blocked, Changed (nothing was sent), ``ledger.Busy`` (another push has this system),
    ``ledger.Fenced`` (another process took over: this one sends nothing more), Misconfigured, and the ledger's errors;
    all of them leave a state from which running it again goes on.
    """
    batch = ledger.newest(batch_id)
    settings = settings or PushSettings()
    if batch.delivery == "COMPLETE":
        return _report(ledger, connector, batch, "it is complete already, nothing was sent")
    _may_begin(ledger, connector, batch, settings, clock(), by_person)
    with _begun(
        ledger, connector, batch, settings, holder, run_id=run_id, clock=clock, sleep=sleep, monotonic=monotonic,
        rng=rng or random.Random(), progress=progress, stop=stop or threading.Event(), by_person=by_person,
    ) as run:  # fmt: skip
        return run.push()


def resolve(
    ledger: Ledger,
    connector: Connector,
    batch_id: str,
    *,
    by: str,
    settings: PushSettings | None = None,
    run_id: str = "",
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = steady,
    rng: random.Random | None = None,
    stop: threading.Event | None = None,
    holder: Holder | None = None,
) -> Report:
    """End a batch without sending: what never went out is SKIPPED (``by`` says why), what is unknown is found by reading.

    For a batch that is about to be rolled back. Complete unless the system could not be read.
    """
    batch = ledger.batch(batch_id)
    settings = settings or PushSettings()
    if batch.delivery == "COMPLETE":
        return _report(ledger, connector, batch, "it is complete already")
    with _begun(
        ledger, connector, batch, settings, holder, run_id=run_id, clock=clock, sleep=sleep, monotonic=monotonic,
        rng=rng or random.Random(), progress=None, stop=stop or threading.Event(), by_person=True,
    ) as run:  # fmt: skip
        return run.resolve(by)


def dry_run(
    ledger: Ledger,
    connector: Connector,
    batch_id: str,
    *,
    settings: PushSettings | None = None,
    run_id: str = "",
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = steady,
    by_person: bool = False,
) -> Diff:
    """What a push would change now, exactly; writes nothing anywhere and takes no lease.

    Where the system can check a write without making it, it is asked to. With pools, as if every decrease succeeds.
    Raises PushError where the system cannot be read.
    """
    batch = ledger.newest(batch_id)
    settings = settings or PushSettings()
    notes = []
    try:
        _may_begin(ledger, connector, batch, settings, clock(), by_person)
    except PushError as error:
        notes.append(str(error))
    over = sum(count for state, count in batch.counts.items() if state not in OPEN)
    if over:
        notes.append(f"{over} of {batch.changed} deliveries are over already")
    if batch.delivery == "COMPLETE":
        return Diff(batch.batch_id, connector.system, (), tuple(notes))
    with _Push(
        ledger, connector, batch, settings, run_id=run_id, clock=clock, sleep=sleep, monotonic=monotonic,
        rng=random.Random(0), progress=None, stop=threading.Event(), by_person=by_person, held=_NoLease(monotonic),
    ) as run:  # fmt: skip
        rows, more = run.look()
    return Diff(batch.batch_id, connector.system, tuple(rows), (*notes, *more))


def _may_begin(
    ledger: Ledger, connector: Connector, batch: BatchRow, settings: PushSettings, now: datetime, by_person: bool
) -> None:
    """Whether people and guardrails let this batch go, to a system in which its values mean what they meant."""
    if batch.status == "REFUSED":
        raise Refused(f"batch {batch.batch_id} was refused by its guardrails and is not sent: decide the day again")
    if batch.backfill:
        raise Refused(
            f"batch {batch.batch_id} is a backfill: {batch.day} was decided when the day on which it would have acted was "
            "over, and it is never sent. Decide a newer day"
        )
    _means_the_same(ledger, connector, batch)
    if batch.status == "HELD":
        from delivery.approvals import standing

        stands = standing(ledger, batch, now, settings.four_eyes)
        if not stands.ok:
            raise NotApproved(stands.text)
    if not _allowed_while_stopped(batch, by_person) and (switch := ledger.stopped(batch.workflow)) is not None:
        raise Stopped(_stopped(switch.workflow, switch.actor, switch.reason))


def _means_the_same(ledger: Ledger, connector: Connector, batch: BatchRow) -> None:
    """Raise Changed where the connector's settings give values another meaning than when the batch was decided."""
    now = mapping_of(connector)
    of = batch if batch.reverses is None else ledger.batch(batch.reverses)
    then = of.record.get("mapping")
    if not now or now == then or (then is None and batch.status != "HELD"):
        return
    if then is None:
        raise Changed(
            f"batch {batch.batch_id}: the ledger does not hold what its values meant downstream when it was approved: decide "
            f"{batch.day} again, and approve that batch"
        )
    raise Changed(
        f"batch {batch.batch_id}: the connector of {batch.workflow} writes values differently than when it was decided "
        f"(names, columns, units or the like were changed): put workflow.yaml's section connector back as it was, or decide "
        f"{batch.day} again"
    )


def _allowed_while_stopped(batch: BatchRow, by_person: bool) -> bool:
    return batch.kind == "rollback" and by_person


def _stopped(workflow: str, actor: str | None, reason: str) -> str:
    return f"{workflow} was stopped by {actor or 'somebody'} ({reason}): signalbox resume {workflow} lets it go on"


@contextlib.contextmanager
def _leased(
    ledger: Ledger, system: str, settings: PushSettings, monotonic: Callable[[], float], holder: Holder | None
) -> Iterator[_Held]:
    """The lease of a system; given back at the end unless it was taken from us."""
    asked = monotonic()  # its end counts from the grant, and not from whenever the answer came
    held = _Held(ledger, ledger.lease(system, holder, settings.lease_s), settings.lease_s, monotonic, asked)
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


@contextlib.contextmanager
def _begun(
    ledger: Ledger, connector: Connector, batch: BatchRow, settings: PushSettings, holder: Holder | None, **how: Any
) -> Iterator[_Push]:
    """A push that has the lease of its system."""
    with (
        _leased(ledger, connector.system, settings, how["monotonic"], holder) as held,
        _Push(ledger, connector, batch, settings, held=held, **how) as run,
    ):
        yield run


class _Held:
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


class _NoLease(_Held):
    """What a dry run has: never sure enough to write."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic

    @property
    def sure(self) -> bool:
        return False

    def keep(self) -> None:
        pass


@dataclass
class _Done:
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


class _Push:
    """One push of one batch by one process. Only its own thread touches the ledger; the workers call the system."""

    def __init__(
        self,
        ledger: Ledger,
        connector: Connector,
        batch: BatchRow,
        settings: PushSettings,
        *,
        run_id: str,
        clock: Callable[[], datetime],
        sleep: Callable[[float], None],
        monotonic: Callable[[], float],
        rng: random.Random,
        progress: Callable[[Progress], None] | None,
        stop: threading.Event,
        by_person: bool,
        held: _Held,
    ) -> None:
        self.ledger, self.connector, self.batch, self.settings, self.run_id = ledger, connector, batch, settings, run_id
        self.clock, self.sleep, self.monotonic = clock, sleep, monotonic
        self.progress, self.stop, self.by_person, self.held = progress, stop, by_person, held
        self._can(connector.capabilities)
        self.bucket = Bucket(settings.rate_per_s, monotonic=monotonic, sleep=sleep)
        self.backoff = Backoff(*settings.backoff_s, rng)
        self.read_breaker = Breaker(settings.breaker_failures, settings.breaker_cooldown_s, monotonic=monotonic)
        self.write_breaker = Breaker(settings.breaker_failures, settings.breaker_cooldown_s, monotonic=monotonic)
        self.pause = Pause(monotonic=monotonic)
        self.halt = threading.Event()
        self.system = connector.system
        self.workers = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="push")
        self.owners = reconciliation.Owners()
        self.lock = threading.Lock()
        self.began = monotonic()
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
        self.obeys_switch = not _allowed_while_stopped(batch, by_person)
        self.counts: Counter[str] = Counter()
        self.total = 0

    def _can(self, can: Capabilities) -> None:
        self.can = can
        self.once = can.idempotency_key or can.conditional_write
        # How long a write without an answer may still change what is read. A condition makes a late one fail.
        self.late_s = max(can.stale_reads_s, self.settings.late_s)
        self.window_s = can.stale_reads_s if can.conditional_write else self.late_s

    # --- the steps

    def push(self) -> Report:
        batch, lease = self.batch, self.held.lease
        # Read again: between the first look and the lease another process may have been at it.
        batch = self.batch = self._timed(self.ledger.batch, batch.batch_id)
        if batch.delivery == "COMPLETE":
            return _report(self.ledger, self.connector, batch, "it is complete already, nothing was sent")
        others = [
            one for one in self._timed(self.ledger.batches, batch.workflow)
            if one.batch_id != batch.batch_id and one.system in (None, lease.system)
        ]  # fmt: skip
        if batch.kind == "decision":
            if (instead := self._instead(others)) is not None:
                return self._superseded(*instead)
            if pending := self._pending(
                one.batch_id for one in others if one.kind == "rollback" and one.delivery == "OPEN"
            ):
                raise Blocked(pending)
        self._timed(self.ledger.open_push, lease, batch.batch_id, self.run_id)
        older_may_hold: dict[str, int] = {}
        if batch.kind == "decision":
            older_may_hold = self._supersede([
                one for one in others
                if one.kind == "decision" and one.delivery != "COMPLETE" and one.status != "REFUSED" and _age(one) < _age(batch)
            ])  # fmt: skip
            self.may_hold = older_may_hold
            self._timed(self.ledger.take_back, lease, batch.batch_id, list(older_may_hold))
        items = self._items(batch, {one.batch_id: one for one in [*others, batch]})
        if not self.why:
            self._try_conditions(items)
            if batch.pools is not None:
                self._with_pools(items, batch.pools, older_may_hold)
            else:
                if self.can.bulk_read > 1:
                    items = self._grouped(items)
                self._run(items, "send")
        return self._close()

    def _try_conditions(self, items: Sequence[Item]) -> None:
        """Ask a system that promises conditional writes to turn one away, once, before anything depends on it.

        What is sent is the value that was just read: where the condition is ignored, nothing else stands there than before.
        Only entities that are to be changed are asked for; where none of a few tells, the promise stands as it is. It is not
        tried where a reading may be old: an old value, taken, would be somebody's loss.
        """
        if not self.can.conditional_write or self.can.stale_reads_s > 0:
            return
        tries = (i for i in items if not i.done and not i.maybe and i.expected is not None)
        for item in itertools.islice(tries, CONDITIONS_TRIED):
            try:
                reading = self._read([item.key]).get(item.key)
            except Unavailable:
                continue
            stands = None if reading is None else reading.value
            if (
                reading is None
                or reading.state != "open"
                or stands is None
                or stands != item.expected
                or stands == item.value
            ):
                continue
            self.bucket.take()
            if self._must_stop() or not self.held.sure:
                return
            key = idempotency_key(item.batch_id, item.key, stands)
            write = replace(self._write(item, reading), value=stands, idempotency_key=key)
            answer = on_another_version(self.connector, write)
            if answer is None or answer.outcome == "conflict":
                return
            if answer.outcome == "accepted":
                said = {"workflow": self.batch.workflow, "batch_id": self.batch.batch_id, "system": self.system}
                self._timed(self.ledger.note, "condition ignored", said)
                self._can(self.connector.capabilities)
                return
            if answer.retry_after is not None:
                self.pause.ask(answer.retry_after)
                return
            if answer.outcome == "unknown":  # nothing else is sent while it may still arrive
                self._nap_until(self.monotonic() + self.late_s)
                return

    def _instead(self, others: Sequence[BatchRow]) -> tuple[BatchRow, str] | None:
        """What stands in this batch's place, with the words for it; None where it is the one to be sent."""
        batch = self.batch
        later = [
            one for one in others
            # of rollbacks only its own: another one ends it where it took back an entity of it
            if one.reverses == batch.batch_id
            or (one.kind == "decision" and _age(one) > _age(batch) and (one.delivery != "NONE" or _replaces(one, batch)))
        ]  # fmt: skip
        if later:
            by = max(later, key=_age)
            what = "is newer and has been sent" if by.delivery != "NONE" else f"was decided for {by.day} after it"
            return by, f"superseded by {by.batch_id}, which {what}"
        undone = self._timed(self.ledger.taken_back_since, batch.batch_id)
        if undone is None:
            return None
        by = next(one for one in others if one.batch_id == undone)
        return by, (
            f"superseded by {undone}, which has taken back values that this batch was decided from: decide {batch.day} again"
        )

    def _pending(self, begun: Iterable[str] = ()) -> str:
        """Which rollback of the workflow comes first, in words; empty where none does. It counts from when it was asked for."""
        asked = self._timed(self.ledger.pending_rollbacks, self.batch.workflow)
        waits = list(dict.fromkeys([*(f"rollback-{one}" for one in asked), *begun]))
        if not waits:
            return ""
        return (
            f"the rollback {', '.join(waits[:3])} of {self.batch.workflow} is not complete: run it again first "
            f"(signalbox rollback {waits[0].removeprefix('rollback-')}), then push {self.batch.batch_id}"
        )

    def resolve(self, by: str) -> Report:
        self.obeys_switch = False  # it only reads
        self._timed(self.ledger.open_push, self.held.lease, self.batch.batch_id, self.run_id)
        self._resolve(self.batch, by)
        return self._close()

    def look(self) -> tuple[list[DiffRow], list[str]]:
        """The rows of a dry run, and what would keep the push from beginning."""
        self.obeys_switch = False  # it only reads
        notes: list[str] = []
        others = [one for one in self.ledger.batches(self.batch.workflow) if one.system in (None, self.system)]
        if self.batch.kind == "decision":
            if (instead := self._instead([one for one in others if one.batch_id != self.batch.batch_id])) is not None:
                notes.append(instead[1])
            elif pending := self._pending():
                notes.append(pending)
        back = self.ledger.would_take_back(self.system, self.batch.batch_id) if self.batch.kind == "decision" else []
        items, gone = self._look_up(self.batch, {one.batch_id: one for one in others}, also=back)
        rows = [_row(d.item, None, d.final.state, d.final.says) for d in gone if d.final is not None]
        decisions: list[dict[str, Any]] = []
        if self.batch.pools is not None:
            decisions = (
                self.ledger.decisions(self.batch.batch_id).select(["entity_id", "arm", "before", "after"]).to_pylist()
            )
        readings = self._read_all(
            [*(i.key for i in items), *(r["entity_id"] for r in decisions if r["entity_id"] is not None)]
        )
        if self.why:
            raise PushError(self.why)
        if len(items) > 1 and all(readings[i.key].state == "missing" for i in items):
            notes.append(self._all_missing(len(items)))
        sends = []
        by_target: dict[str, list[Item]] = {}
        for item in items:
            by_target.setdefault(readings[item.key].target, []).append(item)
        for target, sharing in by_target.items():
            if target and len({i.after for i in sharing}) > 1:
                said = " and ".join(f"{i.key} ({i.after})" for i in sharing)
                rows += [
                    _row(i, readings[i.key], "REJECTED", f"{said} share {target} and want different values")
                    for i in sharing
                ]
                continue
            for item in sharing:
                reading = readings[item.key]
                item.clear_at, item.target = 0.0, target
                judged = reconciliation.judge(item, reading, at=self.monotonic(), stale_s=0.0)
                if isinstance(judged, Final):
                    rows.append(_row(item, reading, judged.state, judged.says))
                elif isinstance(judged, Send):
                    sends.append(item)
                elif isinstance(judged, Gone):
                    rows.append(_row(item, reading, "PENDING", judged.says))
                else:
                    rows.append(
                        _row(item, reading, "UNKNOWN", "an earlier write is not settled, the push would find out")
                    )
        rows += self._would_send(sends, readings, decisions)
        order = {i.key: n for n, i in enumerate(items)}
        return sorted(rows, key=lambda row: order.get(row.entity, -1)), notes

    def _would_send(
        self, sends: Sequence[Item], readings: Mapping[str, Reading], decisions: Sequence[Mapping[str, Any]]
    ) -> list[DiffRow]:
        """The rows of what would be written, after the pools and the system's own check."""
        rows = []
        if self.batch.pools is not None:
            shown = dict(readings)
            for item in sends:
                if not _increases(item):
                    shown[item.key] = replace(readings[item.key], value=item.after)
            totals = pools.live(self._holdings(decisions, shown, [], {}))
            wanted = {i.key: i for i in sends if _increases(i)}
            for one in pools.plan(
                [pools.Increase(i.key, i.arms[0], i.expected or 0, i.after, i.gain) for i in wanted.values()],
                pools.headroom(self.batch.pools, totals), self.settings.unit,
            ):  # fmt: skip
                item = wanted[one.increase.key]
                if one.value is None:
                    said = _no_money(one.increase.arm, self.batch.pools, totals)
                    rows.append(_row(item, readings[item.key], "SKIPPED", said))
                    sends = [i for i in sends if i is not item]
                else:
                    item.value = one.value
        refused: dict[str, Written] = {}
        if self.can.validate_only:
            for chunk in _chunks(sends, self.can.bulk_write):
                self.bucket.take()
                answers = self.connector.apply([self._write(i, readings[i.key]) for i in chunk], validate_only=True)
                refused |= {a.key: a for a in answers if a.outcome == "refused"}
        for item in sends:
            answer = refused.get(item.key)
            if answer is not None:
                rows.append(_row(item, readings[item.key], "REJECTED", answer.says))
            else:
                why = "" if item.value == item.after else f"decided were {item.after}; the pool has no money for more"
                rows.append(_row(item, readings[item.key], "SEND", why))
        return rows

    def _superseded(self, by: BatchRow, why: str) -> Report:
        """This batch is older than what stands in its place: nothing of it goes out any more."""
        self.total = self.batch.changed
        self._timed(self.ledger.supersede, self.held.lease, [self.batch.batch_id], by.batch_id)
        self.why = why
        if self._timed(self.ledger.batch, self.batch.batch_id).delivery != "COMPLETE":
            self._resolve(self.batch, f"superseded by {by.batch_id}")
            return self._close()
        return _report(self.ledger, self.connector, self._timed(self.ledger.batch, self.batch.batch_id), self.why)

    def _supersede(self, older: Sequence[BatchRow]) -> dict[str, int]:
        """End older batches: what waits is skipped, what is unknown is read. Returns what they may still bring about."""
        if not older:
            return {}
        by = f"superseded by {self.batch.batch_id}"
        self._timed(self.ledger.supersede, self.held.lease, [one.batch_id for one in older], self.batch.batch_id)
        left: dict[str, int] = {}
        for one in older:
            if self._timed(self.ledger.batch, one.batch_id).delivery == "COMPLETE":
                continue
            for item in self._resolve(one, by):
                left[item.key] = max(left.get(item.key, item.value), item.value)
            complete = not self._timed(self.ledger.deliveries, one.batch_id, OPEN)
            self._timed(self.ledger.close_push, self.held.lease, one.batch_id, complete)
        return left

    def _resolve(self, batch: BatchRow, by: str) -> list[Item]:
        """Skip what never went out, read what may have; returns what stays unknown."""
        self.by = by
        items = self._items(batch, {}, ending=True)
        waiting = [i for i in items if not i.maybe]
        self._settle([_Done(i, Final("SKIPPED", by, None)) for i in waiting])
        self._run([i for i in items if i.maybe], "resolve")
        return [i for i in items if not i.done]

    def _items(self, batch: BatchRow, batches: Mapping[str, BatchRow], ending: bool = False) -> list[Item]:
        """What is open in the ledger and can be tried; the rest of it is settled here."""
        items, gone = self._look_up(batch, batches, ending)
        self._settle(gone)
        return items

    def _look_up(
        self, batch: BatchRow, batches: Mapping[str, BatchRow], ending: bool = False, also: Sequence[Delivery] = ()
    ) -> tuple[list[Item], list[_Done]]:
        """What is open in the ledger, with the value that each must show before it is written to; and what cannot be tried.

        ``also``: deliveries that are not in the ledger yet (a dry run's).
        """
        deliveries = [*self._timed(self.ledger.deliveries, batch.batch_id), *also]
        open_ = [d for d in deliveries if d.state in OPEN]
        if batch.batch_id == self.batch.batch_id:
            self.total = len(deliveries)
            self.counts = Counter(d.state for d in deliveries)
        tried: dict[int, list[AttemptRow]] = {}
        if any(d.attempts for d in open_):
            for attempt in self._timed(self.ledger.attempts, batch.batch_id):
                tried.setdefault(attempt.n, []).append(attempt)
        names = [d.entity for d in open_ if d.entity is not None]
        workflow = batch.workflow
        proved = self._timed(self.ledger.acknowledged, self.system, names, workflow=workflow) if names else {}
        self.foreign |= self._timed(self.ledger.setters, self.system, names, workflow) if names else {}
        limits = Limits.recorded(batch.record)
        now, at = self.clock(), self.monotonic()
        items, gone = [], []
        for d in open_:
            if d.after is None or d.entity is None:
                what = "its name was erased from the ledger" if d.entity is None else "the decision has no value"
                left: State = "NOT_REVERSIBLE" if batch.kind == "rollback" else "SKIPPED"
                gone.append(_Done(_item(batch, d, d.before), Final(left, what, None)))
                continue
            known = proved.get(d.entity)
            setter = batches.get(known.batch_id) if known else None
            # an earlier batch of the day is older whatever the clock said when it was proven
            earlier = setter is not None and setter.day == batch.day and setter.sequence < batch.sequence
            expected = known.value if known and (known.verified_at > batch.as_of or earlier) else d.before
            if d.before == d.after:  # left alone by this batch, and taken back from an earlier one
                expected = self.may_hold.get(d.entity, expected)
            item = _item(batch, d, expected)
            if known and known.batch_id != batch.batch_id and setter is not None:
                newer = setter.sequence > batch.sequence if batch.kind == "rollback" else _is_later(setter, batch)
                if newer and not d.attempts:
                    gone.append(
                        _Done(item, Final("SKIPPED", f"{known.batch_id}, which is newer, has set it since", None))
                    )
                    continue
            if (
                batch.kind == "decision"
                and not ending
                and not d.attempts
                and expected is not None
                and expected != d.before != d.after
            ):
                over = limits.broken(expected, d.before, d.after, approved=batch.status == "HELD")
                if over:
                    gone.append(_Done(item, Final("SKIPPED", f"{over}: decide the day again", None)))
                    continue
            if known and self.can.stale_reads_s > 0:
                fresh = (known.verified_at - now).total_seconds() + self.can.stale_reads_s
                item.due = at + min(max(0.0, fresh), self.can.stale_reads_s)
            if d.n in tried and (d.state != "PENDING" or d.sent is not None):
                item.sent = True
                item.first_sent_at = tried[d.n][0].started_at
            if d.n in tried and d.state != "PENDING":
                # It may have been sent by a process that died before it could say so.
                last = tried[d.n][-1]
                item.maybe = True
                if not self.once:
                    # Each of them may have arrived; those of processes that died before they could say so were not counted.
                    gone_out = [a for a in tried[d.n] if a.outcome in (None, "unknown", "accepted")]
                    item.repeats = max(0, len(gone_out) - 1 - d.repeats)
                item.value = last.value if last.value is not None else d.after
                item.expected = last.expected
                # The whole window from now on: what was begun with a wave may have left long after that. And a batch that is
                # ended has no second try: its late write must not come as a surprise to the next one.
                item.clear_at = at + (self.late_s if ending else self.window_s)
            items.append(item)
        if batch.kind == "decision" and not ending and (over := self._over_in_total(batch, limits, items, deliveries)):
            fresh_ones = [i for i in items if not i.sent and not i.maybe]
            gone += [_Done(i, Final("SKIPPED", f"{over}: decide the day again", None)) for i in fresh_ones]
            items = [i for i in items if i.sent or i.maybe]
        return items, gone

    def _over_in_total(
        self, batch: BatchRow, limits: Limits, items: Sequence[Item], deliveries: Sequence[Delivery]
    ) -> str:
        """Why the batch as a whole is over its limits, where what stands is not what it was decided from.

        What was delivered already counts from what had stood there; what is taken back is no change of this batch.
        """
        moved = {d.entity: d.prior for d in deliveries if d.state not in OPEN and d.prior is not None and d.entity}
        moved |= {i.key: i.expected for i in items if i.expected is not None}
        same = {d.entity: d.before for d in deliveries if d.entity}
        own = {d.entity for d in deliveries if d.before != d.after}
        moved = {key: stood for key, stood in moved.items() if key in own and stood != same[key]}
        if not moved:
            return ""
        rows = self._timed(self.ledger.decisions, batch.batch_id).select(["entity_id", "arm", "before", "after"])
        return limits.broken_in_total(
            (r["arm"] or "", moved.get(r["entity_id"], r["before"]), r["before"], r["after"])
            for r in rows.to_pylist()
            if r["before"] is not None and r["after"] is not None
        )

    def _grouped(self, items: Sequence[Item]) -> list[Item]:
        """Read everything once and put together what shares a target; settles what needs no write, returns the rest."""
        if not items:
            return []
        verified_at = self.clock()
        readings = self._read_all([i.key for i in items])
        by_target: dict[str, list[Item]] = {}
        alone = []
        for item in items:
            if item.key in readings and readings[item.key].state != "missing":
                by_target.setdefault(readings[item.key].target, []).append(item)
            else:
                alone.append(item)
        gone = [item for item in alone if item.key in readings]
        if len(gone) > 1 and not by_target:
            self.why = self.why or self._all_missing(len(gone))
        for item in gone:
            item.alone = bool(by_target)
        out, over = alone, []
        for target, sharing in by_target.items():
            first = _together(target, sharing)
            if len({i.after for i in sharing}) > 1:
                said = " and ".join(f"{i.key} ({i.after})" for i in sharing)
                over.append(_Done(first, Final("REJECTED", f"{said} share {target} and want different values", None)))
                continue
            if self.batch.pools is not None and len(set(first.arms)) > 1:
                said = " and ".join(f"{i.key} ({', '.join(i.arms)})" for i in sharing)
                over.append(_Done(first, Final("REJECTED", f"{said} share {target} and are in different arms", None)))
                continue
            judged = None if first.maybe else self._judge(first, readings[first.key])
            if isinstance(judged, Final):
                over.append(_Done(first, judged, verified_at=verified_at))
            else:
                out.append(first)
        self._settle(over)
        return out

    # --- money

    def _with_pools(self, items: Sequence[Item], limits: Mapping[str, int], floors: Mapping[str, int]) -> None:
        """Decreases first, proven; then the increases for which there is money, whatever lands and whatever fails."""
        decisions = self._timed(self.ledger.decisions, self.batch.batch_id).select(
            ["entity_id", "arm", "before", "after"]
        )
        rows = decisions.to_pylist()
        without = sorted({str(r["arm"]) for r in rows if r["arm"] not in limits})
        if without:
            raise PushError(f"batch {self.batch.batch_id} has decisions in {', '.join(without)}, an arm without a pool")
        items = self._grouped(items)
        for item in self._run([i for i in items if i.maybe], "free"):
            item.value, item.maybe = item.after, False
        self._run([i for i in items if not i.open_end and not _increases(i)], "send")
        while rest := [i for i in items if not i.open_end and _increases(i)]:
            if self.why or not self._nap_until(max([i.clear_at for i in items if i.sent], default=0.0)):
                return
            keys = [r["entity_id"] for r in rows if r["entity_id"] is not None]
            readings = self._read_all(keys)
            if len(readings) < len(set(keys)):
                self.why = self.why or "the live total could not be read: no increase was sent"
                return
            changed = [i for i in rest if readings[i.key].state != "open" or readings[i.key].value != i.expected]
            back = self._run(changed, "free")
            ready = [i for i in rest if i not in changed]
            if not ready:
                if len(back) == len(changed):
                    self.why = self.why or "values downstream change while they are read: no increase was sent"
                    return
                continue
            totals = pools.live(self._holdings(rows, readings, items, floors))
            planned = pools.plan(
                [pools.Increase(i.key, i.arms[0], i.expected or 0, i.after, i.gain) for i in ready],
                pools.headroom(limits, totals), self.settings.unit,
            )  # fmt: skip
            of = {i.key: i for i in ready}
            full = [of[p.increase.key] for p in planned if p.full]
            if full:
                self._run(full, "send")
                continue
            # Nothing fits as a whole. What is left is shared out only when nothing can give money back any more.
            unsettled = {a for i in items if not i.done and i not in ready for a in i.arms} | {
                a for i in back for a in i.arms
            }
            part, none = [], []
            for one in planned:
                item = of[one.increase.key]
                if one.increase.arm in unsettled:
                    item.left = True
                    self.note = f"increases of arm {one.increase.arm} wait for deliveries that are not settled"
                elif one.value is not None:
                    item.value = one.value
                    part.append(item)
                    self.replanned.append((item.key, item.after, one.value))
                elif not any(p.value is not None and p.increase.arm == one.increase.arm for p in planned):
                    none.append(
                        _Done(item, Final("SKIPPED", _no_money(one.increase.arm, limits, totals), item.expected))
                    )
            self._settle(none)
            self._run(part, "send")

    def _holdings(
        self,
        rows: Sequence[Mapping[str, Any]],
        readings: Mapping[str, Reading],
        items: Sequence[Item],
        floors: Mapping[str, int],
    ) -> list[pools.Holding]:
        """What each target may hold: what it shows, and what of ours may still arrive there or not be visible yet."""
        arms: dict[str, set[str]] = {}
        values: dict[str, list[int | None]] = {}
        mine: dict[str, list[int | None]] = {}
        # What a rollback cannot find stands there for all we know, and holds its money.
        ours = {item.key: item.expected for item in items if item.rollback and not item.done}
        for item in items:
            if (item.maybe and not item.done) or (item.sent and self.can.stale_reads_s > 0):
                mine.setdefault(item.target, []).append(item.value)
        for n, row in enumerate(rows):
            key = row["entity_id"]
            if key is None:
                target, held = f"erased {n}", [max(row["before"] or 0, row["after"] or 0)]
            else:
                reading = readings[key]
                target = reading.target if reading.state != "missing" else f"missing {key}"
                held = [0 if reading.value is None and reading.state != "open" else reading.value]
                held += [ours[key]] if key in ours and reading.state == "missing" else []
                held += [floors[key]] if key in floors else []
            arms.setdefault(target, set()).add(row["arm"])
            values.setdefault(target, mine.get(target, [])[:]).extend(held)
        return [pools.Holding(t, tuple(sorted(arms[t])), tuple(values[t])) for t in values]

    # --- waves

    def _run(self, items: Sequence[Item], mode: Mode) -> list[Item]:
        """Take the items through as many waves as they need; returns those that ``free`` hands back."""
        order = itertools.count()
        queue = [(item.due, next(order), item) for item in items if not item.open_end]
        heapq.heapify(queue)
        free: list[Item] = []
        while queue:
            self.why = self.why or self._must_stop()
            if self.why:
                break
            now = self.monotonic()
            blocked = self._blocked(sending=mode == "send")
            if blocked > 0 and now + blocked - self.moved > self.settings.patience_s:
                self.why = f"{self.system} has not answered for {now - self.moved:.0f} s: run it again later"
                break
            if blocked > 0 or queue[0][0] > now:
                self._nap(max(blocked, queue[0][0] - now))
                continue
            probing = self.read_breaker.half_open or (mode == "send" and self.write_breaker.half_open)
            bulk = self.settings.concurrency * self.can.bulk_write if self.can.bulk_write > 1 else 0
            size = 1 if probing else max(self.settings.wave, bulk)
            wave: list[Item] = []
            while queue and len(wave) < size and queue[0][0] <= now:
                wave.append(heapq.heappop(queue)[2])
            for done in self._wave(wave, mode):
                item = done.item
                if done.free:
                    free.append(item)
                elif done.final is None:
                    since = item.since if item.since is not None else now
                    if not done.window and done.until - since > self.settings.patience_s:
                        item.left = True
                    else:
                        heapq.heappush(queue, (done.until, next(order), item))
        for _, _, item in queue:
            item.left = True
        return free

    def _wave(self, wave: Sequence[Item], mode: Mode) -> list[_Done]:
        """Write down what is about to be tried, try it, write down what came of it."""
        now = self.monotonic()
        ready = [i for i in wave if mode == "send" and i.clear_at <= now and self._patient(i, now)]
        self._begin(ready)
        steps = [(chunk, True) for chunk in _chunks(ready, self.can.bulk_write)]
        begun = {id(i) for i in ready}
        steps += [(chunk, False) for chunk in _chunks([i for i in wave if id(i) not in begun], self.can.bulk_read)]
        futures = self._parallel([partial(self._step, chunk, may, mode) for chunk, may in steps])
        dones: list[_Done] = []
        wrong: BaseException | None = None
        for future, (chunk, _) in zip(futures, steps, strict=True):
            error = CancelledError() if future.cancelled() else future.exception()
            if error is None:
                dones += future.result()
                continue
            if not isinstance(error, Exception):
                raise error
            wrong = wrong or error
            dones += [_Done(i, until=now, says=f"not finished: {type(error).__name__}") for i in chunk]
        self._none_there(dones)
        self._settle(dones, begun)
        if wrong is not None:
            raise wrong
        return dones

    def _none_there(self, dones: Sequence[_Done]) -> None:
        """Where a whole wave is missing it is more likely the address than the entities: stop, and leave them open."""
        gone = [done for done in dones if done.missing and not done.item.alone]
        if any(done.missing is False for done in dones):
            for done in gone:
                done.item.alone = True
        elif len(gone) > 1 and not all(done.window for done in gone):
            self.why = self.why or self._all_missing(len(gone))
            for done in gone:
                done.final, done.until, done.window, done.says = None, float("inf"), False, self.why

    def _all_missing(self, count: int) -> str:
        return (
            f"none of {count} entities is there downstream: is the address of {self.system} right (its base path too), and "
            "the account? Nothing was concluded: mend it and run it again"
        )

    def _begin(self, items: Sequence[Item]) -> None:
        """In the ledger before anything is sent."""
        at = self.clock()
        for batch_id, own in _by_batch(items):
            self._timed(self.ledger.begin, self.held.lease, batch_id, [
                Attempt(d.n, i.value, i.expected, idempotency_key(batch_id, i.key, i.value), at)
                for i in own for d in i.deliveries
            ])  # fmt: skip
        for item in items:
            self._count(item, "IN_FLIGHT")
            if item.first_sent_at is None:
                item.first_sent_at = at

    def _settle(self, dones: Sequence[_Done], begun: Collection[int] = ()) -> None:
        """In the ledger, in one transaction for each batch: the ends, and how far those are that were begun."""
        of = {id(done.item): done for done in dones}
        now = self.clock()
        for batch_id, items in _by_batch([done.item for done in dones]):
            results = []
            for item in items:
                done = of[id(item)]
                if done.final is None and id(item) not in begun:
                    continue
                state: State = done.final.state if done.final else "UNKNOWN" if item.maybe else "PENDING"
                self._count(item, state)
                final = done.final
                theirs = final is not None and state in ("CONFLICT", "OVERWRITTEN")
                # a write that the system refused, and took or made something of all the same, is ours to take back
                taken = (
                    item.offered
                    and state in ("ACKED", "REJECTED")
                    and final is not None
                    and final.observed != item.prior
                )
                results += [
                    Result(
                        d.n, state, target=item.target or None, expected=item.expected, prior=item.prior,
                        sent=item.value if item.sent or taken else None,
                        observed=None if final is None else final.found if theirs else final.observed,
                        verified_at=done.verified_at if final is not None else None,
                        says=(final.says if final else done.says) or None, window_ms=done.window_ms, outcome=done.outcome,
                        ended_at=now, repeat=done.repeats + item.repeats,
                    )
                    for d in item.deliveries
                ]  # fmt: skip
            if results:
                self._timed(self.ledger.settle, self.held.lease, batch_id, results)
                for item in items:
                    if of[id(item)].final is not None or id(item) in begun:
                        self.repeats += item.repeats
                        item.repeats = 0
        for done in dones:
            self.repeats += done.repeats
            if done.window_ms is not None:
                self.windows.append(done.window_ms)
            if done.final is not None:
                done.item.done = True
            if done.final is not None or done.outcome == "accepted":
                self.moved = self.monotonic()
        if self.progress is not None and dones:
            over = sum(count for state, count in self.counts.items() if state not in OPEN)
            self.progress(Progress(self.batch.batch_id, over, self.total, dict(+self.counts)))

    # --- what the workers do

    def _step(self, items: Sequence[Item], may_send: bool, mode: Mode) -> list[_Done]:
        """Read, judge, write, read back; never waits for long: what needs time is handed back with when to look again."""
        dones = {id(i): _Done(i) for i in items}
        sent: set[int] = set()
        now = self.monotonic()
        for item in items:
            item.since = now if item.since is None else item.since
        open_ = list(items)
        while open_:
            started = self.monotonic()
            if self.halt.is_set() or (blocked := self._blocked(sending=False)) > 0:
                self._later(open_, dones, started if self.halt.is_set() else started + blocked, "")
                break
            try:
                readings = self._read([i.key for i in open_])
            except Unavailable as error:
                self._later(open_, dones, None, str(error), error.retry_after)
                break
            at, verified_at = self.monotonic(), self.clock()
            judged: list[tuple[Item, Reading, Judgement]] = []
            for item in open_:
                reading = readings.get(item.key)
                if reading is None:
                    self._later([item], dones, None, "the system left it out of its answer")
                elif (blocker := self._claim(item, reading)) is not None:
                    self._shared(item, blocker, dones)
                else:
                    item.target = reading.target
                    dones[id(item)].missing = reading.state == "missing"
                    judged.append((item, reading, self._judge(item, reading, at)))
            try:
                changes = self._history(judged)
            except Unavailable as error:
                self._later([i for i, _, _ in judged], dones, None, f"its change history: {error}", error.retry_after)
                break
            sends: list[tuple[Item, Reading]] = []
            for item, reading, judgement in judged:
                done = dones[id(item)]
                judgement = self._with_evidence(item, reading, judgement, changes)
                if isinstance(judgement, Send):
                    judgement = self._spent(item, reading)
                if isinstance(judgement, Final):
                    done.final, done.verified_at = reconciliation.with_beside(item, judgement, reading), verified_at
                elif isinstance(judgement, Gone):
                    done.until, done.window, done.says = float("inf"), False, judgement.says
                elif isinstance(judgement, Wait):
                    done.until, done.window = min(judgement.until, at + max(SHORTEST_POLL_S, self.window_s / 10)), True
                    done.says = "waits for a reading that is new enough"
                elif mode == "free":
                    done.free = True
                elif mode == "resolve":
                    done.final = Final("SKIPPED", f"{self.by}; what may have been sent is not there", reading.value)
                elif not may_send:
                    done.window = self._patient(item, at)
                    done.until = max(at, item.clear_at) if done.window else float("inf")
                elif id(item) in sent:
                    self._later([item], dones, None, f"answered, and still shows {reconciliation.shown(reading)}")
                else:
                    sends.append((item, reading))
            if not sends:
                break
            blocked = self._blocked(sending=True)
            if self.halt.is_set() or not self.held.sure or blocked > 0:
                self._later(
                    [i for i, _ in sends], dones, self.monotonic() + blocked, "not sent: the system is left alone"
                )
                break
            open_ = self._send(sends, dones, sent, started)
        return list(dones.values())

    def _send(
        self, sends: Sequence[tuple[Item, Reading]], dones: Mapping[int, _Done], sent: set[int], started: float
    ) -> list[Item]:
        """Write each once and take in the answers; returns those to be read (again)."""
        self.bucket.take()
        if self.halt.is_set() or not self.held.sure:
            # the wait for the rate limit may have been long: who slept through its lease writes nothing
            self._later(
                [i for i, _ in sends], dones, self.monotonic(), "not sent: the lease may have run out meanwhile"
            )
            return []
        try:
            answers = self.connector.apply([self._write(item, reading) for item, reading in sends])
        except Misconfigured:
            raise
        except BaseException:
            # Not what a connector may do; whatever it did before is found by reading.
            for item, _ in sends:
                item.sent = item.maybe = True
            raise
        now = self.monotonic()
        window_ms = (now - started) * 1000
        by_key = {answer.key: answer for answer in answers}
        again: list[Item] = []
        for item, reading in sends:
            done = dones[id(item)]
            answer = by_key.get(item.key) or Written(item.key, "unknown", "the system's answer does not mention it")
            done.outcome, done.says, item.answered = answer.outcome, answer.says, answer.says
            if answer.sent:
                done.window_ms, item.offered = window_ms, True
                item.prior = reading.value if item.prior is None else item.prior
            with self.lock:
                self.sends += answer.sent
                self.accepted += answer.outcome == "accepted"
            if answer.outcome == "not_applied":
                if answer.retry_after is None:
                    self.write_breaker.failed(item.key)
                else:
                    self.pause.ask(answer.retry_after)
                self._later([item], dones, None, answer.says, answer.retry_after)
                continue
            if answer.outcome == "unknown":
                self.write_breaker.failed(item.key)
                if answer.retry_after is not None:
                    self.pause.ask(answer.retry_after)
            else:
                self.write_breaker.succeeded()
            if answer.outcome == "refused":
                item.refused = answer.says or "refused, without a word"
                sent.add(id(item))
            elif answer.outcome == "conflict":
                item.conflicts += 1
                if item.conflicts % CONFLICTS_IN_A_ROW == 0:
                    sent.add(id(item))
            else:
                if item.sent and not self.once:
                    done.repeats += 1
                if not item.tries:
                    item.started_before = self.accepted
                item.sent = item.maybe = True
                item.accepted = answer.outcome == "accepted"
                item.tries += 1
                window_s = self.can.stale_reads_s if item.accepted else self.window_s
                item.clear_at = now + (max(window_s, self.backoff.wait(item.tries)) if window_s > 0 else 0.0)
                item.token_before, item.token_after = reading.token, answer.token
                item.beside = reading.watched
                if item.accepted:
                    item.since = now
                sent.add(id(item))
            again.append(item)
        return again

    def _write(self, item: Item, reading: Reading) -> Write:
        return Write(
            key=item.key, target=reading.target, value=item.value, expected=reading.value, token=reading.token,
            idempotency_key=idempotency_key(item.batch_id, item.key, item.value),
            decision_id=item.deliveries[0].decision_id, batch_id=item.batch_id, run_id=self.run_id,
        )  # fmt: skip

    def _judge(self, item: Item, reading: Reading, at: float | None = None) -> Judgement:
        return reconciliation.judge(
            item, reading, at=self.monotonic() if at is None else at, stale_s=self.can.stale_reads_s
        )

    def _history(self, judged: Sequence[tuple[Item, Reading, Judgement]]) -> dict[str, list[Change]] | None:
        """The changes of those whose judgement needs them; None where the system keeps none."""
        if not self.can.change_history:
            return None
        asked = [
            item for item, _, judgement in judged
            if isinstance(judgement, Third)
            or (isinstance(judgement, Send) and item.maybe)
            or (isinstance(judgement, Final) and item.sent and not self.can.conditional_write)
        ]  # fmt: skip
        if not asked:
            return {}
        since = min(item.first_sent_at or self.clock() for item in asked) - SKEW
        self.bucket.take()
        found: dict[str, list[Change]] = {item.key: [] for item in asked}
        for change in self.connector.history([item.key for item in asked], since):
            found.setdefault(change.key, []).append(change)
        return found

    def _with_evidence(
        self, item: Item, reading: Reading, judgement: Judgement, changes: Mapping[str, Sequence[Change]] | None
    ) -> Judgement:
        """The judgement, where the change history or another workflow's record has a say in it."""
        theirs = self.foreign.get(item.key)
        if isinstance(judgement, Final) and judgement.state == "CONFLICT" and theirs and theirs[0] == judgement.found:
            return replace(judgement, says=f"{judgement.says}; the workflow {theirs[1]} has set it")
        own = None if changes is None else changes.get(item.key)
        if isinstance(judgement, Third):
            judgement = reconciliation.third(item, reading, own)
        if own is None:
            return judgement
        if isinstance(judgement, Send) and item.maybe and reconciliation.set_back(item, own):
            judgement = reconciliation.conflict(
                item, reading.value, f"{reconciliation.shown(reading)} was set again after our write"
            )
        if isinstance(judgement, Final) and not self.can.conditional_write:
            return reconciliation.with_lost(item, judgement, own)
        return judgement

    def _spent(self, item: Item, reading: Reading) -> Judgement:
        """Whether another write of the same value is worth it."""
        if item.conflicts >= CONFLICTS_IN_A_ROW * self.settings.attempts:
            says = f"shows {reconciliation.shown(reading)}, and the system says at every write that it was changed"
            return reconciliation.conflict(item, reading.value, says)
        if item.tries >= self.settings.attempts:
            if item.accepted:
                return reconciliation.ignored(item, reading, self.can.stale_reads_s)
            if self.accepted > item.started_before:
                # Others are taken, this one never gets an answer: it is this one and not the system.
                says = f"no answer to {item.tries} writes while others got one, still shows {reconciliation.shown(reading)}"
                return Final("REJECTED", f"{says} ({item.answered})" if item.answered else says, reading.value)
        return Send(reading)

    def _patient(self, item: Item, now: float) -> bool:
        """Whether an unanswered write is worth another one; reading it goes on."""
        return not item.maybe or item.since is None or now - item.since <= self.settings.patience_s

    def _claim(self, item: Item, reading: Reading) -> Item | None:
        """The other item of this batch that has the same target; None where this one may go on."""
        if reading.state == "missing":
            return None
        with self.lock:
            return self.owners.claim(item, f"{item.batch_id}\0{reading.target}")

    def _shared(self, item: Item, other: Item, dones: Mapping[int, _Done]) -> None:
        """A target that was found to be shared while it is being sent: never both at once, never against each other."""
        done = dones[id(item)]
        if other.after != item.after:
            words = f"shares {other.target} with {other.key}, for which {other.after} was decided and not {item.after}"
            done.final = Final("REJECTED", words, None)
        elif other.done:
            with self.lock:
                self.owners.items[f"{item.batch_id}\0{other.target}"] = item
            done.until, done.window = self.monotonic(), True
        else:
            done.until, done.window = self.monotonic() + SHORTEST_POLL_S, True
            if other.left:
                done.until, done.window = float("inf"), False

    def _later(
        self,
        items: Iterable[Item],
        dones: Mapping[int, _Done],
        until: float | None,
        says: str,
        retry_after: float | None = None,
    ) -> None:
        """Hand back, to be looked at again at ``until`` or after a random wait that grows with each failure."""
        now = self.monotonic()
        for item in items:
            done = dones[id(item)]
            if until is None:
                item.failures += 1
                done.until = now + max(self.backoff.wait(item.failures), retry_after or 0.0)
            else:
                done.until = until
            done.says = says or done.says

    def _read(self, keys: Sequence[str]) -> dict[str, Reading]:
        """One call, or as many as the system's limit wants."""
        found: dict[str, Reading] = {}
        for some in _chunks(keys, self.can.bulk_read):
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

    def _blocked(self, *, sending: bool) -> float:
        """Seconds for which the system is to be left alone."""
        wait = max(self.pause.wait(), self.read_breaker.wait())
        return max(wait, self.write_breaker.wait()) if sending else wait

    # --- waiting

    def _read_all(self, keys: Sequence[str]) -> dict[str, Reading]:
        """Read many before anything is sent, patiently; what could not be read is left out."""
        found: dict[str, Reading] = {}
        missing = list(dict.fromkeys(keys))
        began = self.monotonic()
        for tried in itertools.count(1):
            chunks = _chunks(missing, self.can.bulk_read)
            wrong: BaseException | None = None
            says = ""
            for future in self._parallel([partial(self._read_once, chunk) for chunk in chunks]):
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
            wait = max(self._blocked(sending=False), self.backoff.wait(tried))
            self.why = self.why or self._must_stop()
            if not missing or self.why:
                break
            if self.monotonic() + wait - began > self.settings.patience_s:
                self.why = f"{self.system} cannot be read: {says or 'it leaves entities out of its answers'}"
                break
            self._nap(wait)
        return {key: found[key] for key in keys if key in found}

    def _read_once(self, keys: Sequence[str]) -> dict[str, Reading]:
        if self.halt.is_set():
            return {}
        if self._blocked(sending=False) > 0:
            raise Unavailable("it is left alone for a while")
        return self._read(keys)

    def _parallel(self, calls: Sequence[Callable[[], T]]) -> list[Future[T]]:
        """Run calls on the workers; meanwhile the lease is kept, and the wish to stop is heard."""
        futures = [self.workers.submit(call) for call in calls]
        try:
            waiting: Collection[Future[T]] = futures
            while waiting := wait(waiting, timeout=TICK_S).not_done:
                self.why = self.why or self._must_stop()
                if self.why:
                    self.halt.set()
        except BaseException:
            self.halt.set()
            for future in futures:
                future.cancel()
            wait(futures)
            raise
        return futures

    def _must_stop(self) -> str:
        """Why no more may be sent, if so; keeps the lease (raises Fenced)."""
        self._timed(self.held.keep)
        if self.stop.is_set():
            return "it was asked to stop: run it again"
        if self.obeys_switch:
            switch = self._timed(self.ledger.stopped, self.batch.workflow)
            if switch is not None:
                return _stopped(switch.workflow, switch.actor, switch.reason)
            if self.batch.kind == "decision" and (pending := self._pending()):
                return pending
        return ""

    def _nap(self, seconds: float) -> None:
        self.sleep(min(max(seconds, 0.001), TICK_S))

    def _nap_until(self, until: float) -> bool:
        """Wait for a moment of the monotonic clock; False where the push has to stop."""
        while (left := until - self.monotonic()) > 0:
            self.why = self.why or self._must_stop()
            if self.why:
                return False
            self._nap(left)
        return True

    # --- the end

    def _close(self) -> Report:
        left = self._timed(self.ledger.deliveries, self.batch.batch_id, OPEN)
        self._timed(self.ledger.close_push, self.held.lease, self.batch.batch_id, not left)
        batch = self._timed(self.ledger.batch, self.batch.batch_id)
        why = self.why
        if left and not why:
            said = next((d.says for d in left if d.says), "")
            why = f"{len(left)} deliveries are not settled yet{f' ({said})' if said else ''}: run it again"
            why = f"{self.note}; {why}" if self.note else why
        return replace(
            _report(self.ledger, self.connector, batch, why),
            window_max_ms=max(self.windows, default=None),
            window_median_ms=statistics.median(self.windows) if self.windows else None,
            sends=self.sends, reads=self.reads, repeats=self.repeats, replanned=tuple(self.replanned),
            seconds=self.monotonic() - self.began, ledger_seconds=self.ledger_s,
        )  # fmt: skip

    def _count(self, item: Item, state: State) -> None:
        if item.batch_id == self.batch.batch_id:
            self.counts[item.state] -= len(item.deliveries)
            self.counts[state] += len(item.deliveries)
        item.state = state

    def _timed(self, call: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        began = self.monotonic()
        try:
            return call(*args, **named)
        finally:
            self.ledger_s += self.monotonic() - began

    def __enter__(self) -> _Push:
        return self

    def __exit__(self, *_: object) -> None:
        self.halt.set()
        self.workers.shutdown(wait=True, cancel_futures=True)


def _item(batch: BatchRow, d: Delivery, expected: int | None) -> Item:
    after = d.after if d.after is not None else 0
    return Item(
        batch.batch_id, (d,), d.entity or "", after, after, expected, batch.kind == "rollback", d.target or "", d.prior,
        arms=(d.arm,) if d.arm is not None else (), gain=d.gain, state=d.state,
    )  # fmt: skip


def _row(item: Item, reading: Reading | None, action: str, why: str) -> DiffRow:
    now = None if reading is None else reading.value
    arm = ", ".join(item.arms) or None
    return DiffRow(item.key or "(erased)", arm, now, item.value if action == "SEND" else None, action, why)


def _together(target: str, sharing: Sequence[Item]) -> Item:
    """One item for all that share a target; what one of them has begun, all have."""
    sharing = sorted(sharing, key=lambda i: i.deliveries[0].n)
    begun = next((i for i in sharing if i.maybe), next((i for i in sharing if i.sent), sharing[0]))
    gains = [i.gain for i in sharing if i.gain is not None]
    return replace(
        begun, deliveries=tuple(d for i in sharing for d in i.deliveries), key=sharing[0].key, target=target,
        arms=tuple(sorted({a for i in sharing for a in i.arms})), gain=sum(gains) if gains else None,
        due=max(i.due for i in sharing), prior=next((i.prior for i in sharing if i.prior is not None), None),
    )  # fmt: skip


def _increases(item: Item) -> bool:
    """By what must stand there: nothing else is ever written over."""
    return item.after > (item.expected or 0)


def _no_money(arm: str, limits: Mapping[str, int], totals: pools.Totals) -> str:
    if arm in totals.unreadable:
        return f"what {', '.join(totals.unreadable[arm][:3])} holds cannot be read, so no increase in arm {arm} is safe"
    return f"no money left in the pool of arm {arm}: {totals.most.get(arm, 0)} of {limits[arm]} is held"


def _age(batch: BatchRow) -> tuple[Any, int]:
    return (batch.day, batch.sequence)


def _is_later(one: BatchRow, batch: BatchRow) -> bool:
    return one.reverses == batch.batch_id or _age(one) > _age(batch)


def _replaces(one: BatchRow, batch: BatchRow) -> bool:
    """Whether it is a newer decision of the same day: what is to be sent is the newest, whatever became of it."""
    return one.kind == "decision" and one.day == batch.day and one.sequence > batch.sequence and not one.backfill


def _chunks(items: Sequence[V], size: int) -> list[Sequence[V]]:
    size = max(1, size)
    return [items[i : i + size] for i in range(0, len(items), size)]


def _by_batch(items: Iterable[Item]) -> list[tuple[str, list[Item]]]:
    of: dict[str, list[Item]] = {}
    for item in items:
        of.setdefault(item.batch_id, []).append(item)
    return list(of.items())


def _report(ledger: Ledger, connector: Connector, batch: BatchRow, why: str) -> Report:
    """What the ledger says of a batch."""
    rest: dict[str, list[tuple[str, str]]] = {"REJECTED": [], "CONFLICT": [], "OVERWRITTEN": []}
    beside = []
    for d in ledger.deliveries(batch.batch_id, (*rest, "ACKED")):
        told = (d.entity or "(erased)", d.says or "")
        if d.state != "ACKED":
            rest[d.state].append(told)
        elif reconciliation.BESIDE in told[1]:
            beside.append(told)
    return Report(
        batch.batch_id, connector.system, batch.delivery == "COMPLETE", dict(batch.counts),
        connector.capabilities.guarantee, why, dead_letters=tuple(rest["REJECTED"]), conflicts=tuple(rest["CONFLICT"]),
        overwritten=tuple(rest["OVERWRITTEN"]), beside=tuple(beside),
    )  # fmt: skip
