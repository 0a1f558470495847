"""Taking batches back: a rollback is a push of the values that stood before, newest batch first.

Belongs here: which batches, what each of their deliveries goes back to, and what the result was. Does not: sending
(``delivery.push`` does, under the rules of any push), moving a model's alias or stopping a workflow (the caller does).
Rerunnable: the rollback of a batch is itself a batch, with an id that follows from it, recorded before anything is sent.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Literal

from delivery.ledger import NewBatch, Result, Unknown, utc_now
from delivery.push import PushSettings, push, resolve

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
_NOT_BACK = ("SKIPPED", "REJECTED", "PENDING", "UNKNOWN", "IN_FLIGHT")
"""States of a rollback's delivery after which the value that was to be taken back may still stand."""


class RollbackError(RuntimeError):
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
    """What became of one batch.

    ``already``: an earlier run had completed it, and nothing was done. ``never_sent``: deliveries that still waited and now
    never go out. ``restored``: deliveries proven by read-back to hold the value from before. ``conflicts``: changed by a
    person since, left. ``not_reversible``: closed, gone, or the name erased. ``left``: changed since by a newer batch that
    stands, refused by the system, or without money in the pool. ``partly``: restored as far as the pool had money.
    ``open``: not known yet, run it again. ``push``: the last push of it, as ``Report.as_dict``.
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


@dataclass(frozen=True)
class RollbackReport:
    """All batches that were chosen, newest first. ``waiting``: not begun, since a newer one is not complete yet.

    ``newer``: batches of the same workflows that are newer than a chosen one, were not chosen and stay as they are.
    """

    batches: tuple[RolledBack, ...]
    waiting: tuple[str, ...] = ()
    newer: tuple[str, ...] = ()

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


def choose(ledger: Ledger, which: Selection) -> list[BatchRow]:
    """The batches meant, newest first (by day, then by when they were recorded).

    Raises RollbackError where there is none, or one that cannot be taken back; ``ledger.Unknown`` for an unknown id.
    """
    if isinstance(which, Batch):
        found = [ledger.batch(which.batch_id)]
        (one,) = found
        if one.kind == "rollback":
            raise RollbackError(
                f"{one.batch_id} is itself a rollback, which is not rolled back: decide {one.day} of {one.workflow} again "
                "and push that batch"
            )
        if one.status == "REFUSED":
            raise RollbackError(f"batch {one.batch_id} was refused by its guardrails: nothing of it was sent")
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
    if retired := [one.batch_id for one in found if one.retired and not _done(ledger, one)]:
        raise RollbackError(
            f"{', '.join(retired)}: the retention policy removed what was delivered, so it cannot be rolled back; "
            "choose batches that are younger"
        )
    return sorted(found, key=_age, reverse=True)


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

    ``connector_of``: workflow → its downstream system; the caller closes it. ``evidence``: what the guard saw. A person's
    rollback goes out while the workflow is stopped, a guard's does not (``push.Stopped``). ``stop``: set it to end after the
    calls under way. The rest is as in ``push``, and so is what it raises; RollbackError before anything is done.
    """
    if not reason.strip():
        raise RollbackError("say why it is rolled back: --reason REASON")
    chosen = choose(ledger, which)
    asked: dict[str, Any] = {"actor": actor, "reason": reason, "trigger": trigger, "evidence": evidence}
    how: dict[str, Any] = {
        "settings": settings, "run_id": run_id, "clock": clock, "sleep": sleep, "monotonic": monotonic, "rng": rng,
        "stop": stop, "holder": holder,
    }  # fmt: skip
    done: list[RolledBack] = []
    for batch in chosen:
        known = _find(ledger, rollback_id(batch.batch_id))
        if known is None or not _complete(batch, known):
            ledger.rollback_asked(batch.batch_id, **asked)
            one = _one(ledger, connector_of(batch.workflow), batch, how, progress, by_person=trigger == "person")
        else:
            one = _result(ledger, batch, known, already=True, push=None)
        if one.complete and not any(past.action == "complete" for past in ledger.rollbacks(batch.batch_id)):
            ledger.rollback_complete(batch.batch_id, **(asked | {"evidence": _counted(one)}))
        done.append(one)
        if not one.complete:
            break
    waiting = tuple(one.batch_id for one in chosen[len(done) :])
    return RollbackReport(tuple(done), waiting, _newer_that_stand(ledger, chosen))


def _one(
    ledger: Ledger,
    connector: Connector,
    batch: BatchRow,
    how: Mapping[str, Any],
    progress: Callable[[Progress], None] | None,
    *,
    by_person: bool,
) -> RolledBack:
    """Take one batch back, or go on with it."""
    rid = rollback_id(batch.batch_id)
    if batch.delivery != "COMPLETE":
        # First of all nothing more of it goes out. What stays unknown is in the rollback too: reading will tell.
        resolve(ledger, connector, batch.batch_id, by=_NEVER_SENT, **how)
    settings: PushSettings = how["settings"] or PushSettings()
    lease = ledger.lease(connector.system, how["holder"], settings.lease_s)
    try:
        known = _find(ledger, rid)
        if known is None:
            known = _record(ledger, connector, ledger.batch(batch.batch_id), how["clock"](), how["run_id"])
        if known.delivery != "COMPLETE":
            lease = ledger.renew(lease, settings.lease_s)
            if _leave_to_newer(ledger, lease, batch, rid):
                # By then a reading shows whether they landed: as a value that a rollback does not write over.
                how["sleep"](max(connector.capabilities.stale_reads_s, settings.late_s))
    finally:
        ledger.release(lease)
    report = push(ledger, connector, rid, progress=progress, by_person=by_person, **how)
    return _result(ledger, ledger.batch(batch.batch_id), ledger.batch(rid), already=False, push=report)


def undone(delivery: Delivery, tried: int | None, *, knows_authors: bool) -> tuple[int, int] | None:
    """What a delivery's value goes back to: (what of ours stands there, what stood before); None: nothing to take back.

    ``tried``: the value of the last attempt, where nothing is known of it yet. ``knows_authors``: the system has a change
    history, so that a value other than the one sent, under REJECTED, is known to be what the system made of ours. Without
    one it is compared with what was sent, and so left, since it may be a person's.
    """
    ours = tried if delivery.state in _UNKNOWN else delivery.sent
    # Killed between the write and noting it, it was written only where ``expected`` stood.
    prior = delivery.expected if delivery.prior is None else delivery.prior
    if delivery.state == "OVERWRITTEN":
        prior = delivery.observed  # what the person had
    elif delivery.state == "REJECTED" and delivery.observed not in (None, prior):
        ours = delivery.observed if knows_authors and ours is not None else ours
    elif delivery.state not in ("ACKED", *_UNKNOWN):
        return None
    return None if ours is None or prior is None or prior == ours else (ours, prior)


def _record(ledger: Ledger, connector: Connector, batch: BatchRow, now: datetime, run_id: str) -> BatchRow:
    """Write down the batch that takes ``batch`` back. The lease must be held: nothing of ``batch`` may go out meanwhile."""
    import pyarrow as pa
    import pyarrow.compute as pc

    deliveries = ledger.deliveries(batch.batch_id)
    tried = {d.n: ledger.attempts(batch.batch_id, d.n)[-1].value for d in deliveries if d.state in _UNKNOWN}
    sure = connector.capabilities.change_history
    back = {d.n: pair for d in deliveries if (pair := undone(d, tried.get(d.n), knows_authors=sure)) is not None}
    rejected = {d.entity: d.n for d in deliveries if d.n in back and d.state == "REJECTED" and d.entity is not None}
    for entity, proven in ledger.acknowledged(connector.system, list(rejected)).items():
        # what stands there instead is no clamped value of this batch but what another of ours, a rollback, has set since
        if proven.batch_id != batch.batch_id and proven.value == back[rejected[entity]][0]:
            del back[rejected[entity]]
    back = _further_back(
        ledger, batch, back, {d.entity: d.n for d in deliveries if d.n in back and d.entity is not None}
    )
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


def _further_back(
    ledger: Ledger, batch: BatchRow, back: Mapping[int, tuple[int, int]], numbers: Mapping[str, int]
) -> dict[int, tuple[int, int]]:
    """Go on to the value before an older batch, where its rollback had to leave an entity to this batch."""
    further = dict(back)
    older = [one for one in ledger.batches(batch.workflow, kind="decision") if _age(one) < _age(batch)]
    for one in sorted(older, key=_age, reverse=True):
        if _find(ledger, rollback_id(one.batch_id)) is None:
            continue
        for left in ledger.deliveries(rollback_id(one.batch_id), ("SKIPPED", "PENDING", "CONFLICT")):
            n = numbers.get(left.entity or "")
            if n not in further or left.after is None or further[n][1] != left.before:
                continue
            # a conflict is this batch's doing where it met this batch's value, else a person's
            if left.state != "CONFLICT" or left.observed == further[n][0]:
                further[n] = (further[n][0], left.after)
    return {n: pair for n, pair in further.items() if pair[0] != pair[1]}


def _leave_to_newer(ledger: Ledger, lease: Lease, batch: BatchRow, rid: str) -> bool:
    """Skip what a newer batch that stands has changed since, before anything goes out; again on every run.

    Returns whether newer batches have deliveries that may have landed or not.
    """
    waiting = [d for d in ledger.deliveries(rid, ("PENDING",)) if not d.attempts]
    if not waiting:
        return False
    unknown = False
    holders: dict[tuple[str, str], str] = {}
    for newer in ledger.batches(batch.workflow, kind="decision"):
        if _age(newer) <= _age(batch) or newer.delivery == "NONE":
            continue
        undoing = _find(ledger, rollback_id(newer.batch_id))
        came_back: set[str] | None = None
        if undoing is not None:
            tried = {d.entity: d for d in ledger.deliveries(undoing.batch_id) if d.entity is not None}
            came_back = {e for e, d in tried.items() if d.state not in _NOT_BACK and not _is_partly(d)}
            came_back |= {d.entity for d in ledger.deliveries(newer.batch_id) if d.entity and d.entity not in tried}
        unknown = unknown or bool(ledger.deliveries(newer.batch_id, _UNKNOWN))
        for d in ledger.deliveries(newer.batch_id, _LANDED):
            if d.entity is not None and (came_back is None or d.entity not in came_back):
                holders["entity", d.entity] = newer.batch_id
                if d.target is not None:
                    holders["target", d.target] = newer.batch_id
    targets = {rollback_id(d.decision_id): d.target for d in ledger.deliveries(batch.batch_id)}
    skipped = []
    for d in waiting:
        by = holders.get(("entity", d.entity or "")) or holders.get(("target", targets.get(d.decision_id) or ""))
        if by is not None:
            says = f"left as it is: batch {by}, which is newer and not rolled back, has changed it since"
            skipped.append(Result(d.n, "SKIPPED", says=says))
    if skipped:
        ledger.open_push(lease, rid)
        ledger.settle(lease, rid, skipped)
    return unknown


def _result(ledger: Ledger, batch: BatchRow, undoing: BatchRow, *, already: bool, push: Report | None) -> RolledBack:
    """What the ledger says became of a batch's rollback."""
    originals, back = ledger.deliveries(batch.batch_id), ledger.deliveries(undoing.batch_id)

    def listed(ours: Sequence[Delivery]) -> tuple[Left, ...]:
        return tuple(Left(d.entity or "(erased)", d.state, d.says or "") for d in ours)

    asked = {d.decision_id for d in back}
    unasked = [d for d in originals if d.sent is not None and rollback_id(d.decision_id) not in asked]
    erased = tuple(
        Left("(erased)", "NOT_REVERSIBLE", "its name was erased from the ledger, so the system cannot be asked for it")
        for d in unasked
        if d.entity is None and d.state in (*_LANDED, *_UNKNOWN)
    )
    lost = [d for d in unasked if d.entity is not None and d.state == "OVERWRITTEN"]
    open_ = ("PENDING", "IN_FLIGHT", "UNKNOWN")
    return RolledBack(
        batch_id=batch.batch_id,
        rollback_id=undoing.batch_id,
        complete=_complete(batch, undoing),
        already=already,
        never_sent=sum(d.state == "SKIPPED" and d.says == _NEVER_SENT for d in originals),
        restored=sum(d.state == "ACKED" and not _is_partly(d) for d in back),
        conflicts=listed([d for d in [*back, *lost] if d.state in ("CONFLICT", "OVERWRITTEN")]),
        not_reversible=listed([d for d in back if d.state == "NOT_REVERSIBLE"]) + erased,
        left=listed([d for d in back if d.state in ("SKIPPED", "REJECTED")]),
        partly=listed([d for d in back if _is_partly(d)]),
        open=listed([d for d in [*originals, *back] if d.state in open_]),
        push=push.as_dict() if push is not None else None,
    )


def _is_partly(delivery: Delivery) -> bool:
    """Proven at less than the value from before: the pool had no money for all of it."""
    return delivery.state == "ACKED" and delivery.observed != delivery.after


def _counted(one: RolledBack) -> dict[str, int]:
    """The numbers of a result, for the chain: no names."""
    return {
        "restored": one.restored, "never_sent": one.never_sent, "conflicts": len(one.conflicts),
        "not_reversible": len(one.not_reversible), "left": len(one.left), "partly": len(one.partly),
    }  # fmt: skip


def _newer_that_stand(ledger: Ledger, chosen: Sequence[BatchRow]) -> tuple[str, ...]:
    ids = {one.batch_id for one in chosen}
    oldest = {one.workflow: _age(one) for one in chosen}  # newest first: the last one stays
    return tuple(
        one.batch_id
        for workflow in sorted(oldest)
        for one in ledger.batches(workflow, kind="decision")
        if one.batch_id not in ids
        and one.status != "REFUSED"
        and _age(one) > oldest[workflow]
        and not _done(ledger, one)
    )


def _done(ledger: Ledger, batch: BatchRow) -> bool:
    undoing = _find(ledger, rollback_id(batch.batch_id))
    return undoing is not None and _complete(batch, undoing)


def _complete(batch: BatchRow, undoing: BatchRow) -> bool:
    """Both are settled: what was sent is known, and what was to go back has."""
    return batch.delivery == "COMPLETE" and undoing.delivery == "COMPLETE"


def _find(ledger: Ledger, batch_id: str) -> BatchRow | None:
    try:
        return ledger.batch(batch_id)
    except Unknown:
        return None


def _age(batch: BatchRow) -> tuple[date, int]:
    """The order of batches: by day, then by when they were recorded."""
    return batch.day, batch.sequence
