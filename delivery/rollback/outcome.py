"""What became of a rollback: each delivery of its batch is counted once, or listed.

Belongs here: the result, by what the ledger says. Does not: its form (``delivery.rollback.types``).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from delivery.ledger import OPEN
from delivery.push import reconciliation
from delivery.rollback.prior_values import undone
from delivery.rollback.selection import is_complete, last_action, rollback_id
from delivery.rollback.types import Left, RolledBack

if TYPE_CHECKING:
    from delivery.ledger import BatchRow, Delivery, Ledger
    from delivery.push import Report

NEVER_SENT = "rolled back before it was sent"
ERASED = "its name was erased from the ledger, so the system cannot be asked for it"


def result_of(
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
        where, said = became(d, undo, begun=undoing is not None)
        counts[where] += 1
        shown = undo if undo is not None and d.state not in OPEN else d
        lists.setdefault(where, []).append(Left(d.entity or "(erased)", state_shown(where, shown), said))
    beside = [d for d in [*originals, *back.values()] if reconciliation.BESIDE in (d.says or "")]
    closed = closing or last_action(ledger, batch.batch_id) == "closed"
    return RolledBack(
        batch_id=batch.batch_id,
        rollback_id=rollback_id(batch.batch_id),
        complete=closed or (undoing is not None and is_complete(batch, undoing)),
        already=already,
        never_sent=counts["never_sent"],
        untouched=counts["untouched"],
        restored=counts["restored"],
        **{name: tuple(lists.get(name, ())) for name in ("conflicts", "not_reversible", "left", "partly", "open")},
        push=push.as_dict() if push is not None else None,
        beside=tuple(Left(d.entity or "(erased)", d.state, d.says or "") for d in beside),
        closed=closed,
    )


def state_shown(where: str, shown: Delivery) -> str:
    return "NOT_REVERSIBLE" if where == "not_reversible" else shown.state


_LISTED = {
    "CONFLICT": "conflicts", "OVERWRITTEN": "conflicts", "NOT_REVERSIBLE": "not_reversible", "SKIPPED": "left",
    "REJECTED": "left",
}  # fmt: skip


def became(d: Delivery, undo: Delivery | None, *, begun: bool) -> tuple[str, str]:
    """Where a delivery of a batch stands in the report of its rollback, and why in words. ``undo``: the one that takes it
    back; ``begun``: whether the rollback was recorded at all."""
    if d.state in OPEN:
        return "open", (undo.says if undo is not None and undo.says else d.says) or ""
    if undo is not None:
        if undo.state == "ACKED":
            return "partly" if is_partly(undo) else "restored", undo.says or ""
        return _LISTED.get(undo.state, "open"), undo.says or ""
    if d.state == "SKIPPED" and d.says == NEVER_SENT:
        return "never_sent", ""
    if d.state == "NOT_REVERSIBLE":
        return "not_reversible", d.says or ""
    if d.entity is None and d.attempts and (d.state == "SKIPPED" or undone(d, None, knows_authors=True) is not None):
        return "not_reversible", ERASED
    if d.sent is None:
        return "untouched", d.says or ""
    if d.state in ("CONFLICT", "OVERWRITTEN"):
        return "conflicts", d.says or ""
    if not begun and undone(d, None, knows_authors=True) is not None:
        return "not_reversible", f"closed before it was begun: {d.sent} was sent, {d.prior} stood there before"
    return unasked(d)


def unasked(d: Delivery) -> tuple[str, str]:
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


def is_partly(delivery: Delivery) -> bool:
    """Proven at less than the value from before: the pool had no money for all of it."""
    return delivery.state == "ACKED" and delivery.observed != delivery.after


def counted(one: RolledBack) -> dict[str, int]:
    """The numbers of a result, for the chain: no names."""
    return {
        "restored": one.restored, "never_sent": one.never_sent, "conflicts": len(one.conflicts),
        "not_reversible": len(one.not_reversible), "left": len(one.left), "partly": len(one.partly),
        "untouched": one.untouched, "beside": len(one.beside),
    }  # fmt: skip
