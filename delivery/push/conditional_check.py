"""Whether a system that promises conditional writes turns one away.

Belongs here: that one trial. Does not: what the promise is used for (``delivery.push.evidence``, ``sending``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from delivery.connectors.base import Unavailable, on_another_version
from delivery.push import sending
from delivery.push.reconciliation import Item
from delivery.push.run import Run
from delivery.push.sending import idempotency_key

CONDITIONS_TRIED = 3
"""Entities for which a write is tried that its condition must turn away, until one of them tells."""


def try_conditions(run: Run, items: Sequence[Item]) -> None:
    """Ask a system that promises conditional writes to turn one away, once, before anything depends on it.

    What is sent is the value that was just read: where the condition is ignored, nothing else stands there than before.
    Only entities that are to be changed are asked for; where none of a few tells, the promise stands as it is. It is not
    tried where a reading may be old: an old value, taken, would be somebody's loss.
    """
    if not run.can.conditional_write or run.can.stale_reads_s > 0:
        return
    tries = (i for i in items if not i.done and not i.maybe and i.expected is not None)
    for item in itertools.islice(tries, CONDITIONS_TRIED):
        try:
            reading = run.read([item.key]).get(item.key)
        except Unavailable:
            continue
        stands = None if reading is None else reading.value
        if (
            reading is None
            or reading.state != "open"
            or stands is None
            or stands != item.expected
            or stands == item.value
        ):
            continue
        run.bucket.take()
        if run.must_stop() or not run.held.sure:
            return
        key = idempotency_key(item.batch_id, item.key, stands)
        write = replace(sending.write_of(run, item, reading), value=stands, idempotency_key=key)
        answer = on_another_version(run.connector, write)
        if answer is None or answer.outcome == "conflict":
            return
        if answer.outcome == "accepted":
            said = {"workflow": run.batch.workflow, "batch_id": run.batch.batch_id, "system": run.system}
            run.timed(run.ledger.note, "condition ignored", said)
            run.set_capabilities(run.connector.capabilities)
            return
        if answer.retry_after is not None:
            run.pause.ask(answer.retry_after)
            return
        if answer.outcome == "unknown":  # nothing else is sent while it may still arrive
            run.nap_until(run.monotonic() + run.late_s)
            return
