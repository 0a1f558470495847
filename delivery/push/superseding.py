"""Which batch stands in the place of another, and ending the older one.

Belongs here: superseded batches, and what is open of them. Does not: rolling back (``delivery.rollback``).
"""

from __future__ import annotations

from collections.abc import Sequence

from delivery.ledger import OPEN, BatchRow
from delivery.push import open_items, report, waves
from delivery.push.reconciliation import Final, Item
from delivery.push.run import Done, Run
from delivery.push.types import Report


def instead_of(run: Run, others: Sequence[BatchRow]) -> tuple[BatchRow, str] | None:
    """What stands in this batch's place, with the words for it; None where it is the one to be sent."""
    batch = run.batch
    later = [
        one for one in others
        # of rollbacks only its own: another one ends it where it took back an entity of it
        if one.reverses == batch.batch_id
        or (one.kind == "decision" and one.order_key > batch.order_key and (one.delivery != "NONE" or replaces(one, batch)))
    ]  # fmt: skip
    if later:
        by = max(later, key=lambda one: one.order_key)
        what = "is newer and has been sent" if by.delivery != "NONE" else f"was decided for {by.day} after it"
        return by, f"superseded by {by.batch_id}, which {what}"
    undone = run.timed(run.ledger.taken_back_since, batch.batch_id)
    if undone is None:
        return None
    by = next(one for one in others if one.batch_id == undone)
    return by, (
        f"superseded by {undone}, which has taken back values that this batch was decided from: decide {batch.day} again"
    )


def end_as_superseded(run: Run, by: BatchRow, why: str) -> Report:
    """This batch is older than what stands in its place: nothing of it goes out any more."""
    run.total = run.batch.changed
    run.timed(run.ledger.supersede, run.held.lease, [run.batch.batch_id], by.batch_id)
    run.why = why
    if run.timed(run.ledger.batch, run.batch.batch_id).delivery != "COMPLETE":
        resolve_open(run, run.batch, f"superseded by {by.batch_id}")
        return report.close(run)
    return report.report_of(run.ledger, run.connector, run.timed(run.ledger.batch, run.batch.batch_id), run.why)


def supersede_older(run: Run, older: Sequence[BatchRow]) -> dict[str, int]:
    """End older batches: what waits is skipped, what is unknown is read. Returns what they may still bring about."""
    if not older:
        return {}
    by = f"superseded by {run.batch.batch_id}"
    run.timed(run.ledger.supersede, run.held.lease, [one.batch_id for one in older], run.batch.batch_id)
    left: dict[str, int] = {}
    for one in older:
        if run.timed(run.ledger.batch, one.batch_id).delivery == "COMPLETE":
            continue
        for item in resolve_open(run, one, by):
            left[item.key] = max(left.get(item.key, item.value), item.value)
        complete = not run.timed(run.ledger.deliveries, one.batch_id, OPEN)
        run.timed(run.ledger.close_push, run.held.lease, one.batch_id, complete)
    return left


def resolve_open(run: Run, batch: BatchRow, by: str) -> list[Item]:
    """Skip what never went out, read what may have; returns what stays unknown."""
    run.by = by
    items = open_items.take_up(run, batch, {}, ending=True)
    waiting = [i for i in items if not i.maybe]
    waves.settle(run, [Done(i, Final("SKIPPED", by, None)) for i in waiting])
    waves.run_waves(run, [i for i in items if i.maybe], "resolve")
    return [i for i in items if not i.done]


def replaces(one: BatchRow, batch: BatchRow) -> bool:
    """Whether it is a newer decision of the same day: what is to be sent is the newest, whatever became of it."""
    return one.kind == "decision" and one.day == batch.day and one.sequence > batch.sequence and not one.backfill
