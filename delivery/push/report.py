"""The end of a push: its deliveries as the ledger has them, as a report.

Belongs here: closing a push, and the numbers of it. Does not: the form of a report (``delivery.push.types``).
"""

from __future__ import annotations

import statistics
from dataclasses import replace

from delivery.connectors.base import Connector
from delivery.ledger import OPEN, BatchRow, Ledger
from delivery.push import reconciliation
from delivery.push.run import Run
from delivery.push.types import Report


def close(run: Run) -> Report:
    left = run.timed(run.ledger.deliveries, run.batch.batch_id, OPEN)
    run.timed(run.ledger.close_push, run.held.lease, run.batch.batch_id, not left)
    batch = run.timed(run.ledger.batch, run.batch.batch_id)
    why = run.why
    if left and not why:
        said = next((d.says for d in left if d.says), "")
        why = f"{len(left)} deliveries are not settled yet{f' ({said})' if said else ''}: run it again"
        why = f"{run.note}; {why}" if run.note else why
    return replace(
        report_of(run.ledger, run.connector, batch, why),
        window_max_ms=max(run.windows, default=None),
        window_median_ms=statistics.median(run.windows) if run.windows else None,
        sends=run.sends, reads=run.reads, repeats=run.repeats, replanned=tuple(run.replanned),
        seconds=run.monotonic() - run.began, ledger_seconds=run.ledger_s,
    )  # fmt: skip


def report_of(ledger: Ledger, connector: Connector, batch: BatchRow, why: str) -> Report:
    """What the ledger says of a batch."""
    rest: dict[str, list[tuple[str, str]]] = {"REJECTED": [], "CONFLICT": [], "OVERWRITTEN": []}
    beside = []
    for d in ledger.deliveries(batch.batch_id, (*rest, "ACKED")):
        told = (d.entity or "(erased)", d.says or "")
        if d.state != "ACKED":
            rest[d.state].append(told)
        elif reconciliation.BESIDE in told[1]:
            beside.append(told)
    return Report(
        batch.batch_id, connector.system, batch.delivery == "COMPLETE", dict(batch.counts),
        connector.capabilities.guarantee, why, dead_letters=tuple(rest["REJECTED"]), conflicts=tuple(rest["CONFLICT"]),
        overwritten=tuple(rest["OVERWRITTEN"]), beside=tuple(beside),
    )  # fmt: skip
