"""What of a batch is still to be delivered, with the value that each entity must show before it is written to.

Belongs here: from the ledger's deliveries to items, and which of them may not be sent. Does not: sending them
(``delivery.push.waves``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from delivery.ledger import OPEN, Acknowledged, AttemptRow, BatchRow, Delivery, State
from delivery.limits import Limits
from delivery.push import waves
from delivery.push.reconciliation import Final, Item
from delivery.push.run import Done, Run


def take_up(run: Run, batch: BatchRow, batches: Mapping[str, BatchRow], ending: bool = False) -> list[Item]:
    """What is open in the ledger and can be tried; the rest of it is settled here."""
    items, gone = look_up(run, batch, batches, ending)
    waves.settle(run, gone)
    return items


def look_up(
    run: Run, batch: BatchRow, batches: Mapping[str, BatchRow], ending: bool = False, also: Sequence[Delivery] = ()
) -> tuple[list[Item], list[Done]]:
    """What is open in the ledger, with the value that each must show before it is written to; and what cannot be tried.

    ``also``: deliveries that are not in the ledger yet (a dry run's).
    """
    deliveries = [*run.timed(run.ledger.deliveries, batch.batch_id), *also]
    open_ = [d for d in deliveries if d.state in OPEN]
    if batch.batch_id == run.batch.batch_id:
        run.total = len(deliveries)
        run.counts = Counter(d.state for d in deliveries)
    tried: dict[int, list[AttemptRow]] = {}
    if any(d.attempts for d in open_):
        for attempt in run.timed(run.ledger.attempts, batch.batch_id):
            tried.setdefault(attempt.n, []).append(attempt)
    names = [d.entity for d in open_ if d.entity is not None]
    workflow = batch.workflow
    proved = run.timed(run.ledger.acknowledged, run.system, names, workflow=workflow) if names else {}
    run.foreign |= run.timed(run.ledger.setters, run.system, names, workflow) if names else {}
    limits = Limits.recorded(batch.record)
    now, at = run.clock(), run.monotonic()
    items, gone = [], []
    for d in open_:
        if d.after is None or d.entity is None:
            what = "its name was erased from the ledger" if d.entity is None else "the decision has no value"
            left: State = "NOT_REVERSIBLE" if batch.kind == "rollback" else "SKIPPED"
            gone.append(Done(item_of(batch, d, d.before), Final(left, what, None)))
            continue
        known = proved.get(d.entity)
        setter = batches.get(known.batch_id) if known else None
        item = item_of(batch, d, expected_value(run, batch, d, known, setter))
        why = set_by_newer(batch, d, setter) or ("" if ending else over_limits(batch, limits, d, item.expected))
        if why:
            gone.append(Done(item, Final("SKIPPED", why, None)))
            continue
        if known and run.can.stale_reads_s > 0:
            fresh = (known.verified_at - now).total_seconds() + run.can.stale_reads_s
            item.due = at + min(max(0.0, fresh), run.can.stale_reads_s)
        if d.n in tried:
            go_on_from(run, item, d, tried[d.n], at + (run.late_s if ending else run.window_s))
        items.append(item)
    if batch.kind == "decision" and not ending and (over := over_in_total(run, batch, limits, items, deliveries)):
        fresh_ones = [i for i in items if not i.sent and not i.maybe]
        gone += [Done(i, Final("SKIPPED", f"{over}: decide the day again", None)) for i in fresh_ones]
        items = [i for i in items if i.sent or i.maybe]
    return items, gone


def expected_value(
    run: Run, batch: BatchRow, d: Delivery, known: Acknowledged | None, setter: BatchRow | None
) -> int | None:
    """What must stand there: ``known``, the last value that we proved (by ``setter``), where it is newer than the decision's data."""
    # an earlier batch of the day is older whatever the clock said when it was proven
    earlier = setter is not None and setter.day == batch.day and setter.sequence < batch.sequence
    expected = known.value if known and (known.verified_at > batch.as_of or earlier) else d.before
    if d.before == d.after and d.entity is not None:  # left alone by this batch, and taken back from an earlier one
        expected = run.may_hold.get(d.entity, expected)
    return expected


def set_by_newer(batch: BatchRow, d: Delivery, setter: BatchRow | None) -> str:
    """Why a delivery that was never tried is not: the last proven value is a newer batch's; empty where it is not."""
    if setter is None or setter.batch_id == batch.batch_id or d.attempts:
        return ""
    newer = setter.sequence > batch.sequence if batch.kind == "rollback" else is_later(setter, batch)
    return f"{setter.batch_id}, which is newer, has set it since" if newer else ""


def over_limits(batch: BatchRow, limits: Limits, d: Delivery, expected: int | None) -> str:
    """Why a decision that was never tried is not: from the value that stands it goes over a limit; empty where it does not."""
    if batch.kind != "decision" or d.attempts or d.after is None or expected is None:
        return ""
    if expected == d.before or d.before == d.after:
        return ""
    over = limits.broken(expected, d.before, d.after, approved=batch.status == "HELD")
    return f"{over}: decide the day again" if over else ""


def go_on_from(run: Run, item: Item, d: Delivery, tried: Sequence[AttemptRow], clear_at: float) -> None:
    """What earlier attempts say of an item; ``clear_at``: from when on a reading shows the last of them."""
    if d.state != "PENDING" or d.sent is not None:
        item.sent = True
        item.first_sent_at = tried[0].started_at
    if d.state == "PENDING":
        return
    # It may have been sent by a process that died before it could say so.
    last = tried[-1]
    item.maybe = True
    if not run.once:
        # Each of them may have arrived; those of processes that died before they could say so were not counted.
        gone_out = [a for a in tried if a.outcome in (None, "unknown", "accepted")]
        item.repeats = max(0, len(gone_out) - 1 - d.repeats)
    item.value = last.value if last.value is not None else item.after
    item.expected = last.expected
    # The whole window from now on: what was begun with a wave may have left long after that. And a batch that is
    # ended has no second try: its late write must not come as a surprise to the next one.
    item.clear_at = clear_at


def over_in_total(
    run: Run, batch: BatchRow, limits: Limits, items: Sequence[Item], deliveries: Sequence[Delivery]
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
    rows = run.timed(run.ledger.decisions, batch.batch_id).select(["entity_id", "arm", "before", "after"])
    return limits.broken_in_total(
        (r["arm"] or "", moved.get(r["entity_id"], r["before"]), r["before"], r["after"])
        for r in rows.to_pylist()
        if r["before"] is not None and r["after"] is not None
    )


def item_of(batch: BatchRow, d: Delivery, expected: int | None) -> Item:
    after = d.after if d.after is not None else 0
    return Item(
        batch.batch_id, (d,), d.entity or "", after, after, expected, batch.kind == "rollback", d.target or "", d.prior,
        arms=(d.arm,) if d.arm is not None else (), gain=d.gain, state=d.state,
    )  # fmt: skip


def is_later(one: BatchRow, batch: BatchRow) -> bool:
    return one.reverses == batch.batch_id or one.order_key > batch.order_key
