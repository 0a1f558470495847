"""What a rollback leaves alone: values that a newer batch or another workflow has set since.

Belongs here: skipping them before anything goes out. Does not: conflicts that a reading shows (``delivery.push``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from delivery.ledger import Result
from delivery.rollback.prior_values import UNKNOWN
from delivery.rollback.selection import Known, rollback_id

if TYPE_CHECKING:
    from delivery.ledger import BatchRow, Delivery, Lease, Ledger


def leave_to_newer(
    ledger: Ledger, lease: Lease, batch: BatchRow, rid: str, known: Known, clean: Collection[str] = ()
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
    skipped += set_by_others(ledger, lease.system, batch, [d for d in waiting if d.n not in over], own)
    if skipped:
        ledger.open_push(lease, rid)
        ledger.settle(lease, rid, skipped)
    return any(one.counts.get(state) for one in newer for state in UNKNOWN)


def set_by_others(
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
