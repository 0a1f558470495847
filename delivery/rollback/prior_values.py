"""What each delivery of a batch goes back to, and the batch that takes it there.

Belongs here: values from before, by what the ledger knows. Does not: sending them (``delivery.push``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from delivery.ledger import NewBatch
from delivery.push import reconciliation
from delivery.rollback.selection import Known, rollback_id

if TYPE_CHECKING:
    from delivery.connectors.base import Connector
    from delivery.ledger import BatchRow, Delivery, Ledger

_NEVER = datetime(9999, 12, 31)
"""What a rollback expects to find is the value of the batch that it takes back and of no later one, whenever proven."""
UNKNOWN = ("UNKNOWN", "IN_FLIGHT")


def undone(delivery: Delivery, tried: int | None, *, knows_authors: bool) -> tuple[int | None, int] | None:
    """What a delivery's value goes back to: (what of ours stands there, what stood before); None: nothing to take back.

    ``tried``: the value of the last attempt, where nothing is known of it yet. ``knows_authors``: the system has a change
    history, so that a value other than the one sent, under REJECTED, is known to be what the system made of ours (None: it
    emptied the field). Without one it is compared with what was sent, and so left, since it may be a person's.
    """
    ours = tried if delivery.state in UNKNOWN else delivery.sent
    # Killed between the write and noting it, it was written only where ``expected`` stood.
    prior = delivery.expected if delivery.prior is None else delivery.prior
    if delivery.state == "OVERWRITTEN":
        prior = delivery.observed  # what the person had
    elif delivery.state not in ("ACKED", "REJECTED", *UNKNOWN):
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


def record_rollback(
    ledger: Ledger, connector: Connector, batch: BatchRow, known: Known, now: datetime, run_id: str
) -> BatchRow:
    """Write down the batch that takes ``batch`` back. The lease must be held: nothing of ``batch`` may go out meanwhile."""
    import pyarrow as pa
    import pyarrow.compute as pc

    back = going_back(ledger, connector, batch, known)
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


def going_back(
    ledger: Ledger, connector: Connector, batch: BatchRow, known: Known
) -> dict[int, tuple[int | None, int]]:
    """Delivery → what of ours stands there and what it goes back to, by what the ledger knows."""
    deliveries = ledger.deliveries(batch.batch_id)
    tried = {}
    if any(d.state in UNKNOWN for d in deliveries):
        tried = {attempt.n: attempt.value for attempt in ledger.attempts(batch.batch_id)}
    sure = connector.capabilities.change_history
    back = {d.n: pair for d in deliveries if (pair := undone(d, tried.get(d.n), knows_authors=sure)) is not None}
    rejected = {d.entity: d.n for d in deliveries if d.n in back and d.state == "REJECTED" and d.entity is not None}
    for entity, proven in ledger.acknowledged(connector.system, list(rejected)).items():
        # what stands there instead is no clamped value of this batch but what another of ours, a rollback, has set since
        if proven.batch_id != batch.batch_id and proven.value == back[rejected[entity]][0]:
            del back[rejected[entity]]
    unsent = {d.n: d.observed for d in deliveries if d.state == "ACKED" and d.sent is None and d.observed is not None}
    return further_back(ledger, batch, back, known, unsent)


def further_back(
    ledger: Ledger, batch: BatchRow, back: Mapping[int, tuple[int | None, int]], known: Known, unsent: Mapping[int, int]
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
        and leaves(undoing, batch)
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


def leaves(undoing: BatchRow, newer: BatchRow) -> bool:
    """Whether a rollback left, or may leave, an entity to a newer batch, or was made after that one was decided."""
    if undoing.delivery != "COMPLETE" or any(undoing.counts.get(state) for state in ("SKIPPED", "CONFLICT")):
        return True
    return undoing.sequence > newer.sequence
