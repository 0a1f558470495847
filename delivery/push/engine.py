"""Sends a batch downstream and proves by read-back that it is there: the order of the steps.

Belongs here: what comes after what. Does not: the steps themselves (the modules that are called here), what one reading means
(``delivery.push.reconciliation``), how any one system is called (``delivery.connectors``).

Every send is in the ledger before it goes out, so that a process may be killed at any instant: what was in flight is found
again and resolved by reading. Values are absolute, in the unit of the decision. Durations are measured on a monotonic clock.
"""

from __future__ import annotations

from delivery.push import (
    conditional_check,
    grouping,
    open_items,
    pool_phase,
    report,
    superseding,
    waves,
)
from delivery.push.run import (
    Run,
)
from delivery.push.types import (
    Blocked,
    Report,
)


def send_batch(run: Run) -> Report:
    batch, lease = run.batch, run.held.lease
    # Read again: between the first look and the lease another process may have been at it.
    batch = run.batch = run.timed(run.ledger.batch, batch.batch_id)
    if batch.delivery == "COMPLETE":
        return report.report_of(run.ledger, run.connector, batch, "it is complete already, nothing was sent")
    others = [
        one for one in run.timed(run.ledger.batches, batch.workflow)
        if one.batch_id != batch.batch_id and one.system in (None, lease.system)
    ]  # fmt: skip
    if batch.kind == "decision":
        if (instead := superseding.instead_of(run, others)) is not None:
            return superseding.end_as_superseded(run, *instead)
        if pending := run.pending(one.batch_id for one in others if one.kind == "rollback" and one.delivery == "OPEN"):
            raise Blocked(pending)
    run.timed(run.ledger.open_push, lease, batch.batch_id, run.run_id)
    older_may_hold: dict[str, int] = {}
    if batch.kind == "decision":
        older_may_hold = superseding.supersede_older(run, [
            one for one in others
            if one.kind == "decision" and one.delivery != "COMPLETE" and one.status != "REFUSED" and one.order_key < batch.order_key
        ])  # fmt: skip
        run.may_hold = older_may_hold
        run.timed(run.ledger.take_back, lease, batch.batch_id, list(older_may_hold))
    items = open_items.take_up(run, batch, {one.batch_id: one for one in [*others, batch]})
    if not run.why:
        conditional_check.try_conditions(run, items)
        if batch.pools is not None:
            pool_phase.send_within_pools(run, items, batch.pools, older_may_hold)
        else:
            if run.can.bulk_read > 1:
                items = grouping.grouped(run, items)
            waves.run_waves(run, items, "send")
    return report.close(run)


def resolve_batch(run: Run, by: str) -> Report:
    run.obeys_switch = False  # it only reads
    run.timed(run.ledger.open_push, run.held.lease, run.batch.batch_id, run.run_id)
    superseding.resolve_open(run, run.batch, by)
    return report.close(run)
