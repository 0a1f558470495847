"""The dry run: what taking batches back would change now; writes nothing anywhere.

Belongs here: its rows. Does not: a push's own dry run (``delivery.push.preview``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from delivery.connectors.base import Reading, Unavailable
from delivery.ledger import OPEN
from delivery.push import Diff, DiffRow, PushError, PushSettings, reconciliation
from delivery.push.rate_limit import Bucket
from delivery.rollback.outcome import ERASED
from delivery.rollback.prior_values import going_back
from delivery.rollback.selection import Known, choose, rollback_id
from delivery.rollback.types import Selection

if TYPE_CHECKING:
    from delivery.connectors.base import Connector
    from delivery.ledger import BatchRow, Delivery, Ledger


def dry_run(
    ledger: Ledger, connector_of: Callable[[str], Connector], which: Selection, *, settings: PushSettings | None = None
) -> tuple[Diff, ...]:
    """What taking these back would change now, newest batch first, each on what the newer ones would leave; writes nothing
    anywhere, not in the ledger either, and takes no lease.

    As if the pools have money for all of it. Raises RollbackError and PushError (the system cannot be read).
    """
    diffs = []
    shown: dict[tuple[str, str], Reading] = {}
    for batch in choose(ledger, which):
        known, connector = Known.of(ledger, batch.workflow), connector_of(batch.workflow)
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
        pairs = wanted(ledger, connector, batch, known)
        keys = [d.entity for d, _ in pairs if d.entity is not None]
        for key, reading in read(
            connector, [k for k in keys if (connector.system, k) not in shown], settings or PushSettings()
        ).items():
            shown[connector.system, key] = reading
        rows = []
        for d, (ours, prior) in pairs:
            row, after = would_become(d, shown.get((connector.system, d.entity or "")), ours, prior)
            rows.append(row)
            if after is not None:
                shown[connector.system, d.entity or ""] = after
        diffs.append(Diff(rid, connector.system, tuple(rows), tuple(notes)))
    return tuple(diffs)


def wanted(
    ledger: Ledger, connector: Connector, batch: BatchRow, known: Known
) -> list[tuple[Delivery, tuple[int | None, int]]]:
    """The deliveries that go back, each with what of ours stands there and what it goes back to."""
    undoing = known.undoing.get(batch.batch_id)
    if undoing is not None:
        open_ = ledger.deliveries(undoing.batch_id, OPEN)
        return [(d, (d.before, after)) for d in open_ if (after := d.after) is not None]
    back = going_back(ledger, connector, batch, known)
    return [(d, back[d.n]) for d in ledger.deliveries(batch.batch_id) if d.n in back]


def read(connector: Connector, keys: Sequence[str], settings: PushSettings) -> dict[str, Reading]:
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


def would_become(d: Delivery, reading: Reading | None, ours: int | None, prior: int) -> tuple[DiffRow, Reading | None]:
    """What would become of one, and what would be read there afterwards where that changes."""
    now = None if reading is None else reading.value
    would, after = None, None
    if d.entity is None:
        action, why = "NOT_REVERSIBLE", ERASED
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
