"""Which batches are taken back, and how they and their rollbacks stand in the ledger.

Belongs here: reading batches and requests. Does not: what they go back to (``delivery.rollback.prior_values``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from delivery.ledger import Unknown
from delivery.rollback.types import Batch, RollbackError, Selection, Since

if TYPE_CHECKING:
    from delivery.ledger import BatchRow, Ledger


def rollback_id(batch_id: str) -> str:
    """The batch that takes ``batch_id`` back; it follows from the name, so that a second run finds the first one's."""
    return f"rollback-{batch_id}"


@dataclass(frozen=True)
class Known:
    """The batches of a workflow (None: of all) as they stand now, read at once."""

    decisions: tuple[BatchRow, ...]
    undoing: Mapping[str, BatchRow]
    """Batch → its rollback, where that is recorded."""

    @staticmethod
    def of(ledger: Ledger, workflow: str | None) -> Known:
        rows = ledger.batches(workflow)
        undoing = {one.reverses: one for one in rows if one.kind == "rollback" and one.reverses is not None}
        return Known(tuple(one for one in rows if one.kind == "decision"), undoing)

    def done(self, batch: BatchRow) -> bool:
        """Both are settled: what was sent is known, and what was to go back has."""
        undoing = self.undoing.get(batch.batch_id)
        return undoing is not None and is_complete(batch, undoing)


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
        undoing = find(ledger, rollback_id(one.batch_id))
        if one.retired and (undoing is None or not is_complete(one, undoing)):
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


def newer_that_stand(ledger: Ledger, chosen: Sequence[BatchRow]) -> tuple[str, ...]:
    ids = {one.batch_id for one in chosen}
    oldest = {one.workflow: one.order_key for one in chosen}  # newest first: the last one stays
    found = []
    for workflow in sorted(oldest):
        known = Known.of(ledger, workflow)
        found += [
            one.batch_id
            for one in known.decisions
            if one.batch_id not in ids
            and one.status != "REFUSED"
            and one.order_key > oldest[workflow]
            and not known.done(one)
        ]
    return tuple(found)


def workflow_of(ledger: Ledger, which: Selection) -> str | None:
    return ledger.batch(which.batch_id).workflow if isinstance(which, Batch) else which.workflow


def last_action(ledger: Ledger, batch_id: str) -> str | None:
    """What was last recorded of a batch's rollback: asked, complete or closed."""
    past = ledger.rollbacks(batch_id)
    return past[-1].action if past else None


def is_complete(batch: BatchRow, undoing: BatchRow) -> bool:
    """Both are settled: what was sent is known, and what was to go back has."""
    return batch.delivery == "COMPLETE" and undoing.delivery == "COMPLETE"


def find(ledger: Ledger, batch_id: str) -> BatchRow | None:
    try:
        return ledger.batch(batch_id)
    except Unknown:
        return None
