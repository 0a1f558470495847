"""Taking batches back: a rollback is a push of the values that stood before, newest batch first.

Belongs here: which batches, what each of their deliveries goes back to, what the result was, and closing one that cannot come
to its end. Does not: sending (``delivery.push`` does, under the rules of any push), moving a model's alias or stopping a
workflow (the caller does). Rerunnable: the rollback of a batch is itself a batch, with an id that follows from it, recorded
before anything is sent.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Literal

from common.errors import SignalboxError
from delivery.connectors.base import Reading, Unavailable
from delivery.ledger import OPEN, NewBatch, Result, Unknown, utc_now
from delivery.push import Diff, DiffRow, PushError, PushSettings, push, reconciliation, resolve
from delivery.push.rate_limit import Bucket

if TYPE_CHECKING:
    from delivery.connectors.base import Connector
    from delivery.ledger import BatchRow, Delivery, Holder, Lease, Ledger
    from delivery.push import Progress, Report

_NEVER_SENT = "rolled back before it was sent"
_NEVER = datetime(9999, 12, 31)
"""What a rollback expects to find is the value of the batch that it takes back and of no later one, whenever proven."""
_LANDED = ("ACKED", "OVERWRITTEN")
"""States of a delivery whose value was proven downstream."""
_UNKNOWN = ("UNKNOWN", "IN_FLIGHT")
_ERASED = "its name was erased from the ledger, so the system cannot be asked for it"


class RollbackError(SignalboxError, RuntimeError):
    """A rollback that cannot begin; says why and the way out."""


@dataclass(frozen=True)
class Batch:
    """This batch."""

    batch_id: str


@dataclass(frozen=True)
class Since:
    """Every batch that decided ``day`` or a later one, of one workflow or of all."""

    day: date
    workflow: str | None = None


@dataclass(frozen=True)
class Model:
    """Every batch that was decided with this version of a workflow's model, whole or in the arm challenger: a batch is
    taken back whole."""

    workflow: str
    version: int


Selection = Batch | Since | Model


@dataclass(frozen=True)
class Left:
    """A delivery that was not taken back, and why, in words."""

    entity: str
    state: str
    says: str


@dataclass(frozen=True)
class RolledBack:
    """What became of one batch: each of its deliveries is counted once, or stands in one list.

    ``already``: an earlier run had completed it, and nothing was done. ``closed``: a person ended it with what was left.
    ``never_sent``: deliveries that still waited and now never go out. ``untouched``: nothing of them stands (refused, never
    arrived, stood there already). ``restored``: deliveries proven by read-back to hold the value from before.
    ``conflicts``: changed by a person, or by another workflow, since; left. ``not_reversible``: closed, the name erased, no
    value stood there before, or given up by a person. ``left``: changed since by a newer batch that stands, refused by the
    system, or without money in the pool. ``partly``: restored as far as the pool had money. ``open``: not there, or not
    known yet: run it again. Beside these, ``beside``: watched fields that a write of the batch, or of its rollback, changed
    with the value; they are not restored. ``push``: the last push of it, as ``Report.as_dict``.
    """

    batch_id: str
    rollback_id: str
    complete: bool
    already: bool
    never_sent: int
    restored: int
    conflicts: tuple[Left, ...] = ()
    not_reversible: tuple[Left, ...] = ()
    left: tuple[Left, ...] = ()
    partly: tuple[Left, ...] = ()
    open: tuple[Left, ...] = ()
    push: dict[str, Any] | None = None
    untouched: int = 0
    beside: tuple[Left, ...] = ()
    closed: bool = False


@dataclass(frozen=True)
class RollbackReport:
    """All batches that were chosen, newest first. ``waiting``: not begun, since a newer one is not complete yet.

    ``newer``: batches of the same workflows that are newer than a chosen one, were not chosen and stay as they are.
    ``retired``: chosen, but the retention policy removed what was delivered: what they changed stays as it is.
    """

    batches: tuple[RolledBack, ...]
    waiting: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is left that running it again could bring back."""
        return not self.waiting and all(one.complete for one in self.batches)

    def as_dict(self) -> dict[str, Any]:
        """For a command's --json and for metadata."""
        return asdict(self) | {"complete": self.complete}


def rollback_id(batch_id: str) -> str:
    """The batch that takes ``batch_id`` back; it follows from the name, so that a second run finds the first one's."""
    return f"rollback-{batch_id}"


@dataclass(frozen=True)
class _Known:
    """The batches of a workflow (None: of all) as they stand now, read at once."""

    decisions: tuple[BatchRow, ...]
    undoing: Mapping[str, BatchRow]
    """Batch → its rollback, where that is recorded."""

    @staticmethod
    def of(ledger: Ledger, workflow: str | None) -> _Known:
        rows = ledger.batches(workflow)
        undoing = {one.reverses: one for one in rows if one.kind == "rollback" and one.reverses is not None}
        return _Known(tuple(one for one in rows if one.kind == "decision"), undoing)

    def done(self, batch: BatchRow) -> bool:
        """Both are settled: what was sent is known, and what was to go back has."""
        undoing = self.undoing.get(batch.batch_id)
        return undoing is not None and _complete(batch, undoing)


def choose(ledger: Ledger, which: Selection) -> list[BatchRow]:
    """The batches meant, newest first (by day, then by when they were recorded); those whose rows the retention policy removed
    are among them.

    Raises RollbackError where there is none, or one that cannot be taken back; ``ledger.Unknown`` for an unknown id.
    """
    if isinstance(which, Batch):
        found = [ledger.batch(which.batch_id)]
        (one,) = found
        if one.kind == "rollback":
            raise RollbackError(
                f"{one.batch_id} is itself a rollback, which is not rolled back: decide {one.day} of {one.workflow} again "
                "and push that batch; the same decisions get a batch of their own (such as X.2)"
            )
        if one.status == "REFUSED":
            raise RollbackError(f"batch {one.batch_id} was refused by its guardrails: nothing of it was sent")
        undoing = _find(ledger, rollback_id(one.batch_id))
        if one.retired and (undoing is None or not _complete(one, undoing)):
            raise RollbackError(
                f"{one.batch_id}: the retention policy removed what was delivered, so it cannot be rolled back; "
                "choose batches that are younger"
            )
        what = ""
    elif isinstance(which, Since):
        found = ledger.batches(which.workflow, since=which.day, kind="decision")
        what = f"no batch{f' of {which.workflow}' if which.workflow else ''} decided {which.day} or a later day"
    else:
        found = ledger.batches(which.workflow, model_version=which.version, kind="decision")
        what = f"no batch of {which.workflow} was decided with version {which.version} of its model"
    found = [one for one in found if one.status != "REFUSED"]
    if not found:
        raise RollbackError(f"{what}: nothing to roll back (signalbox batches lists them)")
    return sorted(found, key=lambda one: one.order_key, reverse=True)


def roll_back(
    ledger: Ledger,
    connector_of: Callable[[str], Connector],
    which: Selection,
    *,
    actor: str,
    reason: str,
    trigger: Literal["person", "guard"] = "person",
    evidence: Mapping[str, Any] | None = None,
    settings: PushSettings | None = None,
    run_id: str = "",
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
    rng: random.Random | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    holder: Holder | None = None,
) -> RollbackReport:
    """Bring back what stood before the chosen batches, as far as nobody changed it since; run it again until ``complete``.

    It is recorded for all of them before anything else is done: from then on no newer batch of the workflow goes out.
    ``connector_of``: workflow → its downstream system; the caller closes it. ``evidence``: what the guard saw. A person's
    rollback goes out while the workflow is stopped, a guard's does not (``push.Stopped``). ``stop``: set it to end after the
    calls under way. The rest is as in ``push``, and so is what it raises; RollbackError before anything is sent.
    """
    if not reason.strip():
        raise RollbackError("say why it is rolled back: --reason REASON")
    chosen, known = choose(ledger, which), _Known.of(ledger, _workflow(ledger, which))
    retired = [one for one in chosen if one.retired and not known.done(one)]
    chosen = [one for one in chosen if not one.retired or known.done(one)]
    asked: dict[str, Any] = {"actor": actor, "reason": reason, "trigger": trigger, "evidence": evidence}
    closed = _ask(ledger, chosen, known, asked, anew=isinstance(which, Batch) and trigger == "person")
    for gone in retired:
        if _last(ledger, gone.batch_id) == "asked":  # before its rows went
            ledger.rollback_closed(gone.batch_id, **(asked | {"evidence": {"retired": True}}))
    how: dict[str, Any] = {
        "settings": settings, "run_id": run_id, "clock": clock, "sleep": sleep, "monotonic": monotonic, "rng": rng,
        "stop": stop, "holder": holder,
    }  # fmt: skip
    done: list[RolledBack] = []
    for batch in chosen:
        undoing = known.undoing.get(batch.batch_id)
        if batch.batch_id in closed or known.done(batch):
            one = _result(ledger, batch, undoing, already=True, push=None)
        else:
            clean = {o.batch_id for o in done if not (o.left or o.partly or o.open or o.closed)}
            one = _one(
                ledger, connector_of(batch.workflow), batch, how, progress, by_person=trigger == "person", clean=clean
            )
        if one.complete and _last(ledger, batch.batch_id) not in ("complete", "closed"):
            ledger.rollback_complete(batch.batch_id, **(asked | {"evidence": _counted(one)}))
        done.append(one)
        if not one.complete:
            break
    waiting = tuple(one.batch_id for one in chosen[len(done) :])
    newer = _newer_that_stand(ledger, [*chosen, *retired])
    return RollbackReport(tuple(done), waiting, newer, tuple(one.batch_id for one in retired))


def _ask(
    ledger: Ledger, chosen: Sequence[BatchRow], known: _Known, asked: Mapping[str, Any], *, anew: bool
) -> set[str]:
    """Record that these are to be taken back, those that are no less; returns those that a person had closed.

    ``anew``: asked for by name, a rollback that was closed before it was begun is begun all the same.
    """
    last = {one.batch_id: one for one in ledger.rollbacks()}
    closed = {one.batch_id for one in chosen if (found := last.get(one.batch_id)) and found.action == "closed"}
    if anew:
        closed &= known.undoing.keys()
    for batch in chosen:
        past = last.get(batch.batch_id)
        pending = past is not None and past.action == "asked"
        same = past is not None and (past.actor, past.reason, past.trigger) == (
            asked["actor"], asked["reason"], asked["trigger"],
        )  # fmt: skip
        if not (known.done(batch) or batch.batch_id in closed or (pending and same)):
            ledger.rollback_asked(batch.batch_id, **asked)
    return closed


def close(
    ledger: Ledger,
    system_of: Callable[[str], str],
    which: Selection,
    *,
    actor: str,
    reason: str,
    settings: PushSettings | None = None,
    run_id: str = "",
    holder: Holder | None = None,
) -> RollbackReport:
    """End rollbacks that were asked for and cannot come to their end, with what is left listed; nothing is sent or read.

    What is open of a rollback, or unknown of the batch that it takes back, ends as NOT_REVERSIBLE and stays as it is
    downstream; what of the batch was never sent never is. Newer batches of the workflow go out again. ``system_of``:
    workflow → the name of its downstream system, asked where nothing was sent yet.

    Raises RollbackError where no rollback of them was asked for; ``ledger.Busy`` where a push or a rollback is under way.
    """
    if not reason.strip():
        raise RollbackError("say why it is closed: --reason REASON")
    if isinstance(which, Batch) and (named := ledger.batch(which.batch_id)).reverses is not None:
        which = Batch(named.reverses)
    chosen = [ledger.batch(which.batch_id)] if isinstance(which, Batch) else choose(ledger, which)
    last = {one.batch_id: one.action for one in ledger.rollbacks()}
    chosen = [
        one for one in chosen if one.batch_id in last and (isinstance(which, Batch) or last[one.batch_id] == "asked")
    ]
    if not chosen:
        what = which.batch_id if isinstance(which, Batch) else "these batches"
        raise RollbackError(f"no rollback of {what} is asked for and open: there is nothing to close")
    done = []
    for batch in chosen:
        undoing = _find(ledger, rollback_id(batch.batch_id))
        over = last[batch.batch_id] != "asked"
        if not over:
            system = batch.system or (undoing.system if undoing else None) or system_of(batch.workflow)
            lease = ledger.lease(system, holder, (settings or PushSettings()).lease_s)
            try:
                for row in (batch, undoing):
                    if row is not None:
                        _end(ledger, lease, row, run_id)
            finally:
                ledger.release(lease)
            batch, undoing = ledger.batch(batch.batch_id), _find(ledger, rollback_id(batch.batch_id))
        one = _result(ledger, batch, undoing, already=over, push=None, closing=not over)
        if not over:
            ledger.rollback_closed(batch.batch_id, actor=actor, reason=reason, trigger="person", evidence=_counted(one))
        done.append(one)
    return RollbackReport(tuple(done))


def dry_run(
    ledger: Ledger,
    connector_of: Callable[[str], Connector],
    which: Selection,
    *,
    settings: PushSettings | None = None,
) -> tuple[Diff, ...]:
    """What taking these back would change now, newest batch first, each on what the newer ones would leave; writes nothing
    anywhere, not in the ledger either, and takes no lease.

    As if the pools have money for all of it. Raises RollbackError and PushError (the system cannot be read).
    """
    diffs = []
    shown: dict[tuple[str, str], Reading] = {}
    for batch in choose(ledger, which):
        known, connector = _Known.of(ledger, batch.workflow), connector_of(batch.workflow)
        rid, notes = rollback_id(batch.batch_id), []
        if known.done(batch):
            diffs.append(Diff(rid, connector.system, (), (f"{batch.batch_id} is taken back already",)))
            continue
        if batch.retired:
            what = f"{batch.batch_id}: the retention policy removed what was delivered, it stays as it is"
            diffs.append(Diff(rid, connector.system, (), (what,)))
            continue
        if waiting := batch.counts.get("PENDING"):
            notes.append(f"{waiting} deliveries of {batch.batch_id} were not sent, and never will be")
        wanted = _wanted(ledger, connector, batch, known)
        keys = [d.entity for d, _ in wanted if d.entity is not None]
        for key, reading in _read(
            connector, [k for k in keys if (connector.system, k) not in shown], settings or PushSettings()
        ).items():
            shown[connector.system, key] = reading
        rows = []
        for d, (ours, prior) in wanted:
            row, after = _would(d, shown.get((connector.system, d.entity or "")), ours, prior)
            rows.append(row)
            if after is not None:
                shown[connector.system, d.entity or ""] = after
        diffs.append(Diff(rid, connector.system, tuple(rows), tuple(notes)))
    return tuple(diffs)


def _wanted(
    ledger: Ledger, connector: Connector, batch: BatchRow, known: _Known
) -> list[tuple[Delivery, tuple[int | None, int]]]:
    """The deliveries that go back, each with what of ours stands there and what it goes back to."""
    undoing = known.undoing.get(batch.batch_id)
    if undoing is not None:
        open_ = ledger.deliveries(undoing.batch_id, OPEN)
        return [(d, (d.before, after)) for d in open_ if (after := d.after) is not None]
    back = _back(ledger, connector, batch, known)
    return [(d, back[d.n]) for d in ledger.deliveries(batch.batch_id) if d.n in back]


def _read(connector: Connector, keys: Sequence[str], settings: PushSettings) -> dict[str, Reading]:
    bucket = Bucket(settings.rate_per_s, monotonic=time.monotonic, sleep=time.sleep)
    size = max(1, connector.capabilities.bulk_read)

    def some(start: int) -> dict[str, Reading]:
        bucket.take()
        return connector.read(keys[start : start + size])

    found: dict[str, Reading] = {}
    try:
        with ThreadPoolExecutor(settings.concurrency, thread_name_prefix="dry-run") as workers:
            for readings in workers.map(some, range(0, len(keys), size)):
                found |= readings
    except Unavailable as error:
        raise PushError(f"{connector.system} cannot be read: {error}") from None
    return found


def _would(d: Delivery, reading: Reading | None, ours: int | None, prior: int) -> tuple[DiffRow, Reading | None]:
    """What would become of one, and what would be read there afterwards where that changes."""
    now = None if reading is None else reading.value
    would, after = None, None
    if d.entity is None:
        action, why = "NOT_REVERSIBLE", _ERASED
    elif reading is None or reading.state == "missing":
        action, why = "PENDING", reconciliation.GONE if reading is not None else "the system left it out of its answer"
    elif reading.state == "closed":
        action, why = "NOT_REVERSIBLE", reconciliation.CLOSED
    elif now == prior:
        action, why = "ACKED", "stands there already"
    elif now != ours:
        action, why = (
            "CONFLICT",
            f"shows {reconciliation.shown(reading)} where {'no value' if ours is None else ours} was expected",
        )
    else:
        action, why, would = "SEND", "", prior
        after = replace(reading, value=prior)
    return DiffRow(d.entity or "(erased)", d.arm, now, would, action, why), after


def _end(ledger: Ledger, lease: Lease, row: BatchRow, run_id: str) -> None:
    """Settle what is open of a batch without asking the system, and seal it."""
    if row.delivery == "COMPLETE" or row.status == "REFUSED" or row.retired:
        return
    results = []
    for d in ledger.deliveries(row.batch_id, OPEN):
        if row.kind == "decision" and d.state == "PENDING":
            results.append(Result(d.n, "SKIPPED", says=_NEVER_SENT))
        else:
            seen = d.says or ("it was not read" if d.observed is None else f"{d.observed} stood there")
            results.append(Result(d.n, "NOT_REVERSIBLE", says=f"closed by a person; last seen: {seen}"))
    ledger.open_push(lease, row.batch_id, run_id)
    ledger.settle(lease, row.batch_id, results)
    ledger.close_push(lease, row.batch_id, True)


def _one(
    ledger: Ledger,
    connector: Connector,
    batch: BatchRow,
    how: Mapping[str, Any],
    progress: Callable[[Progress], None] | None,
    *,
    by_person: bool,
    clean: Collection[str],
) -> RolledBack:
    """Take one batch back, or go on with it. ``clean``: newer ones of which nothing stands any more."""
    rid = rollback_id(batch.batch_id)
    if batch.system not in (None, connector.system):
        raise RollbackError(
            f"batch {batch.batch_id} was delivered to {batch.system}, and {batch.workflow} now delivers to "
            f"{connector.system}: connect it to {batch.system} again to take the batch back, or close its rollback"
        )
    if batch.delivery != "COMPLETE":
        # First of all nothing more of it goes out. What stays unknown is in the rollback too: reading will tell.
        resolve(ledger, connector, batch.batch_id, by=_NEVER_SENT, **how)
    settings: PushSettings = how["settings"] or PushSettings()
    lease = ledger.lease(connector.system, how["holder"], settings.lease_s)
    try:
        known = _Known.of(ledger, batch.workflow)
        undoing = known.undoing.get(batch.batch_id)
        if undoing is None:
            undoing = _record(ledger, connector, ledger.batch(batch.batch_id), known, how["clock"](), how["run_id"])
        if undoing.delivery != "COMPLETE":
            lease = ledger.renew(lease, settings.lease_s)
            if _leave_to_newer(ledger, lease, batch, rid, known, clean):
                # By then a reading shows whether they landed: as a value that a rollback does not write over.
                how["sleep"](max(connector.capabilities.stale_reads_s, settings.late_s))
    finally:
        ledger.release(lease)
    report = push(ledger, connector, rid, progress=progress, by_person=by_person, **how)
    return _result(ledger, ledger.batch(batch.batch_id), ledger.batch(rid), already=False, push=report)


def undone(delivery: Delivery, tried: int | None, *, knows_authors: bool) -> tuple[int | None, int] | None:
    """What a delivery's value goes back to: (what of ours stands there, what stood before); None: nothing to take back.

    ``tried``: the value of the last attempt, where nothing is known of it yet. ``knows_authors``: the system has a change
    history, so that a value other than the one sent, under REJECTED, is known to be what the system made of ours (None: it
    emptied the field). Without one it is compared with what was sent, and so left, since it may be a person's.
    """
    ours = tried if delivery.state in _UNKNOWN else delivery.sent
    # Killed between the write and noting it, it was written only where ``expected`` stood.
    prior = delivery.expected if delivery.prior is None else delivery.prior
    if delivery.state == "OVERWRITTEN":
        prior = delivery.observed  # what the person had
    elif delivery.state not in ("ACKED", "REJECTED", *_UNKNOWN):
        return None
    if ours is None or prior is None:
        return None
    if delivery.state == "REJECTED":
        if delivery.observed == prior:
            return None
        stored = delivery.observed is not None or (delivery.says or "").startswith(reconciliation.STORED)
        if knows_authors and stored:
            return delivery.observed, prior
    return None if prior == ours else (ours, prior)


def _record(
    ledger: Ledger, connector: Connector, batch: BatchRow, known: _Known, now: datetime, run_id: str
) -> BatchRow:
    """Write down the batch that takes ``batch`` back. The lease must be held: nothing of ``batch`` may go out meanwhile."""
    import pyarrow as pa
    import pyarrow.compute as pc

    back = _back(ledger, connector, batch, known)
    rows = ledger.decisions(batch.batch_id)
    pools = None
    if batch.pools is not None:
        pools = dict(batch.pools)
        for row in rows.filter(pc.is_null(rows["entity_id"])).to_pylist():
            # A name that was erased cannot be asked for: it counts with the most that it may hold.
            pools[row["arm"]] = pools.get(row["arm"], 0) - max(row["before"] or 0, row["after"] or 0)
    rows = rows.filter(pc.is_valid(rows["entity_id"]))
    if pools is None:  # else every entity of an arm counts in its total
        rows = rows.filter(pc.is_in(rows["n"], pa.array(list(back), pa.int64())))
    numbers = rows["n"].to_pylist()
    pairs = [back.get(n, (before, before)) for n, before in zip(numbers, rows["before"].to_pylist(), strict=True)]
    said = [
        [f"takes back batch {batch.batch_id}"] if n in back else ["counts in the total of its arm"] for n in numbers
    ]
    table = pa.table(
        {
            "decision_id": [rollback_id(one) for one in rows["decision_id"].to_pylist()],
            **{name: rows[name] for name in ("entity_id", "unit", "arm", "arm_probability")},
            **{name: rows[name] for name in ("perturbation", "perturbation_probability")},
            "before": pa.array([before for before, _ in pairs], pa.int64()),
            "after": pa.array([after for _, after in pairs], pa.int64()),
            "changed": pa.array([n in back for n in numbers], pa.bool_()),
            "review": pa.array([False] * len(numbers), pa.bool_()),
            # what going back is expected to bring is the opposite of what going there was
            "expected_gain": pc.negate(rows["expected_gain"]),
            "reasons": pa.array(said, pa.list_(pa.string())),
        }
    )
    content = hashlib.sha256(f"{batch.batch_id}\0{batch.root}\0".encode())
    content.update(repr([(n, *pair) for n, pair in zip(numbers, pairs, strict=True)]).encode())
    return ledger.record_batch(
        NewBatch(
            batch_id=rollback_id(batch.batch_id), workflow=batch.workflow, kind="rollback", day=batch.day,
            digest=content.hexdigest(), status="READY", step=batch.step, as_of=_NEVER, decided_at=now, run_id=run_id,
            record={"reverses": batch.batch_id, "digest": batch.digest}, pools=pools, reverses=batch.batch_id,
        ),
        table,
    )  # fmt: skip


def _back(ledger: Ledger, connector: Connector, batch: BatchRow, known: _Known) -> dict[int, tuple[int | None, int]]:
    """Delivery → what of ours stands there and what it goes back to, by what the ledger knows."""
    deliveries = ledger.deliveries(batch.batch_id)
    tried = {}
    if any(d.state in _UNKNOWN for d in deliveries):
        tried = {attempt.n: attempt.value for attempt in ledger.attempts(batch.batch_id)}
    sure = connector.capabilities.change_history
    back = {d.n: pair for d in deliveries if (pair := undone(d, tried.get(d.n), knows_authors=sure)) is not None}
    rejected = {d.entity: d.n for d in deliveries if d.n in back and d.state == "REJECTED" and d.entity is not None}
    for entity, proven in ledger.acknowledged(connector.system, list(rejected)).items():
        # what stands there instead is no clamped value of this batch but what another of ours, a rollback, has set since
        if proven.batch_id != batch.batch_id and proven.value == back[rejected[entity]][0]:
            del back[rejected[entity]]
    unsent = {d.n: d.observed for d in deliveries if d.state == "ACKED" and d.sent is None and d.observed is not None}
    return _further_back(ledger, batch, back, known, unsent)


def _further_back(
    ledger: Ledger,
    batch: BatchRow,
    back: Mapping[int, tuple[int | None, int]],
    known: _Known,
    unsent: Mapping[int, int],
) -> dict[int, tuple[int | None, int]]:
    """Go on to the value before an older batch, where its rollback had to leave an entity to this batch, or has taken back
    meanwhile what stood before this one. ``unsent``: values that stood there already when this batch came to them.
    """
    further = {n: (stood, stood) for n, stood in unsent.items()} | dict(back)
    older = {
        undoing.batch_id: one.order_key
        for one in known.decisions
        if one.order_key < batch.order_key
        and (undoing := known.undoing.get(one.batch_id)) is not None
        and _leaves(undoing, batch)
    }
    since = {undoing.batch_id for undoing in known.undoing.values() if undoing.sequence > batch.sequence}
    left = ledger.left_of(batch.batch_id, list(older)) if older else []
    for one in sorted(left, key=lambda left: older[left.batch_id], reverse=True):
        if one.n not in further or one.after is None or further[one.n][1] != one.before:
            continue
        if one.state == "ACKED" and (one.batch_id not in since or one.n not in back):
            continue  # brought back before this batch was decided: what stood since was decided anew
        # a conflict is this batch's doing where it met this batch's value, else a person's
        if one.state != "CONFLICT" or one.observed == further[one.n][0]:
            further[one.n] = (further[one.n][0], one.after)
    return {n: pair for n, pair in further.items() if pair[0] != pair[1]}


def _leaves(undoing: BatchRow, newer: BatchRow) -> bool:
    """Whether a rollback left, or may leave, an entity to a newer batch, or was made after that one was decided."""
    if undoing.delivery != "COMPLETE" or any(undoing.counts.get(state) for state in ("SKIPPED", "CONFLICT")):
        return True
    return undoing.sequence > newer.sequence


def _leave_to_newer(
    ledger: Ledger, lease: Lease, batch: BatchRow, rid: str, known: _Known, clean: Collection[str] = ()
) -> bool:
    """Skip what a newer batch that stands has changed since, before anything goes out; again on every run. What another
    workflow has set since is a conflict.

    Returns whether newer batches have deliveries that may have landed or not. ``clean``: newer batches that need no look.
    """
    newer = [
        one for one in known.decisions
        if one.order_key > batch.order_key and one.delivery != "NONE" and one.batch_id not in clean and not one.retired
    ]  # fmt: skip
    waiting = [d for d in ledger.deliveries(rid, ("PENDING",)) if d.sent is None]
    if not waiting:
        return False
    standing = [one.batch_id for one in newer if one.batch_id not in known.undoing]
    undoing = [undone.batch_id for one in newer if (undone := known.undoing.get(one.batch_id)) is not None]
    skipped = [
        Result(
            n, "SKIPPED", says=f"left as it is: batch {by}, which is newer and not rolled back, has changed it since"
        )
        for n, by in sorted(ledger.held_by(rid, batch.batch_id, standing, undoing).items())
    ]
    over = {one.n for one in skipped}
    own = {one.batch_id for one in (*known.decisions, *known.undoing.values())}
    skipped += _of_others(ledger, lease.system, batch, [d for d in waiting if d.n not in over], own)
    if skipped:
        ledger.open_push(lease, rid)
        ledger.settle(lease, rid, skipped)
    return any(one.counts.get(state) for one in newer for state in _UNKNOWN)


def _of_others(
    ledger: Ledger, system: str, batch: BatchRow, waiting: Sequence[Delivery], own: Collection[str]
) -> list[Result]:
    """Conflicts: what another workflow has proven on the same system since ours was."""
    names = [d.entity for d in waiting if d.entity is not None]
    foreign = {e: one for e, one in ledger.acknowledged(system, names).items() if one.batch_id not in own}
    if not foreign:
        return []
    gave_back = {one.batch_id for one in ledger.batches(kind="rollback")}
    ours = {rollback_id(d.decision_id): d.verified_at for d in ledger.deliveries(batch.batch_id)}
    found = []
    for d in waiting:
        theirs, at = foreign.get(d.entity or ""), ours.get(d.decision_id)
        ours_again = theirs is not None and theirs.batch_id in gave_back and theirs.value == d.before
        if theirs is not None and at is not None and theirs.verified_at > at and not ours_again:
            says = f"batch {theirs.batch_id} of another workflow has set {theirs.value} since: not ours to take back"
            found.append(Result(d.n, "CONFLICT", observed=theirs.value, found=theirs.value, says=says))
    return found


def _result(
    ledger: Ledger,
    batch: BatchRow,
    undoing: BatchRow | None,
    *,
    already: bool,
    push: Report | None,
    closing: bool = False,
) -> RolledBack:
    """What the ledger says became of a batch's rollback: each delivery counted once, or listed."""
    originals = ledger.deliveries(batch.batch_id)
    back = {d.decision_id: d for d in ledger.deliveries(undoing.batch_id)} if undoing is not None else {}
    lists: dict[str, list[Left]] = {}
    counts: Counter[str] = Counter()
    for d in originals:
        undo = back.get(rollback_id(d.decision_id))
        where, said = _became(d, undo, begun=undoing is not None)
        counts[where] += 1
        shown = undo if undo is not None and d.state not in OPEN else d
        lists.setdefault(where, []).append(Left(d.entity or "(erased)", _state(where, shown), said))
    beside = [d for d in [*originals, *back.values()] if reconciliation.BESIDE in (d.says or "")]
    closed = closing or _last(ledger, batch.batch_id) == "closed"
    return RolledBack(
        batch_id=batch.batch_id,
        rollback_id=rollback_id(batch.batch_id),
        complete=closed or (undoing is not None and _complete(batch, undoing)),
        already=already,
        never_sent=counts["never_sent"],
        untouched=counts["untouched"],
        restored=counts["restored"],
        **{name: tuple(lists.get(name, ())) for name in ("conflicts", "not_reversible", "left", "partly", "open")},
        push=push.as_dict() if push is not None else None,
        beside=tuple(Left(d.entity or "(erased)", d.state, d.says or "") for d in beside),
        closed=closed,
    )


def _state(where: str, shown: Delivery) -> str:
    return "NOT_REVERSIBLE" if where == "not_reversible" else shown.state


_LISTED = {
    "CONFLICT": "conflicts", "OVERWRITTEN": "conflicts", "NOT_REVERSIBLE": "not_reversible", "SKIPPED": "left",
    "REJECTED": "left",
}  # fmt: skip


def _became(d: Delivery, undo: Delivery | None, *, begun: bool) -> tuple[str, str]:
    """Where a delivery of a batch stands in the report of its rollback, and why in words. ``undo``: the one that takes it
    back; ``begun``: whether the rollback was recorded at all."""
    if d.state in OPEN:
        return "open", (undo.says if undo is not None and undo.says else d.says) or ""
    if undo is not None:
        if undo.state == "ACKED":
            return "partly" if _is_partly(undo) else "restored", undo.says or ""
        return _LISTED.get(undo.state, "open"), undo.says or ""
    if d.state == "SKIPPED" and d.says == _NEVER_SENT:
        return "never_sent", ""
    if d.state == "NOT_REVERSIBLE":
        return "not_reversible", d.says or ""
    if d.entity is None and d.attempts and (d.state == "SKIPPED" or undone(d, None, knows_authors=True) is not None):
        return "not_reversible", _ERASED
    if d.sent is None:
        return "untouched", d.says or ""
    if d.state in ("CONFLICT", "OVERWRITTEN"):
        return "conflicts", d.says or ""
    if not begun and undone(d, None, knows_authors=True) is not None:
        return "not_reversible", f"closed before it was begun: {d.sent} was sent, {d.prior} stood there before"
    return _unasked(d)


def _unasked(d: Delivery) -> tuple[str, str]:
    """A value that was sent, in a rollback that had nothing to put back for it."""
    prior = d.expected if d.prior is None else d.prior
    if d.state == "ACKED" and prior is None:
        return "not_reversible", f"no value stood there before {d.sent} was set, and no value cannot be set"
    if d.state == "REJECTED" and d.observed is not None and (prior is None or prior == d.sent != d.observed):
        return (
            "not_reversible",
            f"{d.observed} stands there since {d.sent} was sent, and nothing else stood there before",
        )
    if d.state == "SKIPPED" and d.observed != prior and (d.says or "").startswith(reconciliation.CLOSED):
        return "not_reversible", d.says or ""
    return "untouched", d.says or ""


def _is_partly(delivery: Delivery) -> bool:
    """Proven at less than the value from before: the pool had no money for all of it."""
    return delivery.state == "ACKED" and delivery.observed != delivery.after


def _counted(one: RolledBack) -> dict[str, int]:
    """The numbers of a result, for the chain: no names."""
    return {
        "restored": one.restored, "never_sent": one.never_sent, "conflicts": len(one.conflicts),
        "not_reversible": len(one.not_reversible), "left": len(one.left), "partly": len(one.partly),
        "untouched": one.untouched, "beside": len(one.beside),
    }  # fmt: skip


def _newer_that_stand(ledger: Ledger, chosen: Sequence[BatchRow]) -> tuple[str, ...]:
    ids = {one.batch_id for one in chosen}
    oldest = {one.workflow: one.order_key for one in chosen}  # newest first: the last one stays
    found = []
    for workflow in sorted(oldest):
        known = _Known.of(ledger, workflow)
        found += [
            one.batch_id
            for one in known.decisions
            if one.batch_id not in ids
            and one.status != "REFUSED"
            and one.order_key > oldest[workflow]
            and not known.done(one)
        ]
    return tuple(found)


def _workflow(ledger: Ledger, which: Selection) -> str | None:
    return ledger.batch(which.batch_id).workflow if isinstance(which, Batch) else which.workflow


def _last(ledger: Ledger, batch_id: str) -> str | None:
    """What was last recorded of a batch's rollback: asked, complete or closed."""
    past = ledger.rollbacks(batch_id)
    return past[-1].action if past else None


def _complete(batch: BatchRow, undoing: BatchRow) -> bool:
    """Both are settled: what was sent is known, and what was to go back has."""
    return batch.delivery == "COMPLETE" and undoing.delivery == "COMPLETE"


def _find(ledger: Ledger, batch_id: str) -> BatchRow | None:
    try:
        return ledger.batch(batch_id)
    except Unknown:
        return None
