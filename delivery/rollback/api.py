"""What callers do: take batches back, newest first, and close a rollback that cannot come to its end.

Belongs here: the order of the steps. Does not: sending (``delivery.push``, under the rules of any push).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from delivery.ledger import OPEN, Result, utc_now
from delivery.push import PushSettings, push, resolve
from delivery.rollback.newer_batches import leave_to_newer
from delivery.rollback.outcome import NEVER_SENT, counted, result_of
from delivery.rollback.prior_values import record_rollback
from delivery.rollback.selection import Known, choose, find, last_action, newer_that_stand, rollback_id, workflow_of
from delivery.rollback.types import Batch, RollbackError, RollbackReport, RolledBack, Selection

if TYPE_CHECKING:
    from delivery.connectors.base import Connector
    from delivery.ledger import BatchRow, Holder, Lease, Ledger
    from delivery.push import Progress


def roll_back(  # noqa: PLR0913 - given by name
    ledger: Ledger,
    connector_of: Callable[[str], Connector],
    which: Selection,
    *,
    actor: str,
    reason: str,
    trigger: Literal["person", "guard"] = "person",
    evidence: Mapping[str, Any] | None = None,
    settings: PushSettings | None = None,
    run_id: str = "",
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
    rng: random.Random | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    holder: Holder | None = None,
) -> RollbackReport:
    """Bring back what stood before the chosen batches, as far as nobody changed it since; run it again until ``complete``.

    It is recorded for all of them before anything else is done: from then on no newer batch of the workflow goes out.
    ``connector_of``: workflow → its downstream system; the caller closes it. ``evidence``: what the guard saw. A person's
    rollback goes out while the workflow is stopped, a guard's does not (``push.Stopped``). ``stop``: set it to end after the
    calls under way. The rest is as in ``push``, and so is what it raises; RollbackError before anything is sent.
    """
    if not reason.strip():
        raise RollbackError("say why it is rolled back: --reason REASON")
    chosen, known = choose(ledger, which), Known.of(ledger, workflow_of(ledger, which))
    retired = [one for one in chosen if one.retired and not known.done(one)]
    chosen = [one for one in chosen if not one.retired or known.done(one)]
    asked: dict[str, Any] = {"actor": actor, "reason": reason, "trigger": trigger, "evidence": evidence}
    closed = ask(ledger, chosen, known, asked, anew=isinstance(which, Batch) and trigger == "person")
    for gone in retired:
        if last_action(ledger, gone.batch_id) == "asked":  # before its rows went
            ledger.rollback_closed(gone.batch_id, **(asked | {"evidence": {"retired": True}}))
    how: dict[str, Any] = {
        "settings": settings, "run_id": run_id, "clock": clock, "sleep": sleep, "monotonic": monotonic, "rng": rng,
        "stop": stop, "holder": holder,
    }  # fmt: skip
    sends = {"progress": progress, "by_person": trigger == "person"}
    done: list[RolledBack] = []
    for batch in chosen:
        undoing = known.undoing.get(batch.batch_id)
        if batch.batch_id in closed or known.done(batch):
            one = result_of(ledger, batch, undoing, already=True, push=None)
        else:
            clean = {o.batch_id for o in done if not (o.left or o.partly or o.open or o.closed)}
            one = take_back(ledger, connector_of(batch.workflow), batch, how, sends, clean=clean)
        if one.complete and last_action(ledger, batch.batch_id) not in ("complete", "closed"):
            ledger.rollback_complete(batch.batch_id, **(asked | {"evidence": counted(one)}))
        done.append(one)
        if not one.complete:
            break
    waiting = tuple(one.batch_id for one in chosen[len(done) :])
    newer = newer_that_stand(ledger, [*chosen, *retired])
    return RollbackReport(tuple(done), waiting, newer, tuple(one.batch_id for one in retired))


def ask(ledger: Ledger, chosen: Sequence[BatchRow], known: Known, asked: Mapping[str, Any], *, anew: bool) -> set[str]:
    """Record that these are to be taken back, those that are no less; returns those that a person had closed.

    ``anew``: asked for by name, a rollback that was closed before it was begun is begun all the same.
    """
    last = {one.batch_id: one for one in ledger.rollbacks()}
    closed = {one.batch_id for one in chosen if (found := last.get(one.batch_id)) and found.action == "closed"}
    if anew:
        closed &= known.undoing.keys()
    for batch in chosen:
        past = last.get(batch.batch_id)
        pending = past is not None and past.action == "asked"
        same = past is not None and (past.actor, past.reason, past.trigger) == (
            asked["actor"], asked["reason"], asked["trigger"],
        )  # fmt: skip
        if not (known.done(batch) or batch.batch_id in closed or (pending and same)):
            ledger.rollback_asked(batch.batch_id, **asked)
    return closed


def take_back(
    ledger: Ledger,
    connector: Connector,
    batch: BatchRow,
    how: Mapping[str, Any],
    sends: Mapping[str, Any],
    *,
    clean: Collection[str],
) -> RolledBack:
    """Take one batch back, or go on with it. ``clean``: newer ones of which nothing stands any more."""
    rid = rollback_id(batch.batch_id)
    if batch.system not in (None, connector.system):
        raise RollbackError(
            f"batch {batch.batch_id} was delivered to {batch.system}, and {batch.workflow} now delivers to "
            f"{connector.system}: connect it to {batch.system} again to take the batch back, or close its rollback"
        )
    if batch.delivery != "COMPLETE":
        # First of all nothing more of it goes out. What stays unknown is in the rollback too: reading will tell.
        resolve(ledger, connector, batch.batch_id, by=NEVER_SENT, **how)
    settings: PushSettings = how["settings"] or PushSettings()
    lease = ledger.lease(connector.system, how["holder"], settings.lease_s)
    try:
        known = Known.of(ledger, batch.workflow)
        undoing = known.undoing.get(batch.batch_id)
        if undoing is None:
            undoing = record_rollback(
                ledger, connector, ledger.batch(batch.batch_id), known, how["clock"](), how["run_id"]
            )
        if undoing.delivery != "COMPLETE":
            lease = ledger.renew(lease, settings.lease_s)
            if leave_to_newer(ledger, lease, batch, rid, known, clean):
                # By then a reading shows whether they landed: as a value that a rollback does not write over.
                how["sleep"](max(connector.capabilities.stale_reads_s, settings.late_s))
    finally:
        ledger.release(lease)
    report = push(ledger, connector, rid, **how, **sends)
    return result_of(ledger, ledger.batch(batch.batch_id), ledger.batch(rid), already=False, push=report)


def close(
    ledger: Ledger,
    system_of: Callable[[str], str],
    which: Selection,
    *,
    actor: str,
    reason: str,
    settings: PushSettings | None = None,
    run_id: str = "",
    holder: Holder | None = None,
) -> RollbackReport:
    """End rollbacks that were asked for and cannot come to their end, with what is left listed; nothing is sent or read.

    What is open of a rollback, or unknown of the batch that it takes back, ends as NOT_REVERSIBLE and stays as it is
    downstream; what of the batch was never sent never is. Newer batches of the workflow go out again. ``system_of``:
    workflow → the name of its downstream system, asked where nothing was sent yet.

    Raises RollbackError where no rollback of them was asked for; ``ledger.Busy`` where a push or a rollback is under way.
    """
    if not reason.strip():
        raise RollbackError("say why it is closed: --reason REASON")
    if isinstance(which, Batch) and (named := ledger.batch(which.batch_id)).reverses is not None:
        which = Batch(named.reverses)
    chosen = [ledger.batch(which.batch_id)] if isinstance(which, Batch) else choose(ledger, which)
    last = {one.batch_id: one.action for one in ledger.rollbacks()}
    chosen = [
        one for one in chosen if one.batch_id in last and (isinstance(which, Batch) or last[one.batch_id] == "asked")
    ]
    if not chosen:
        what = which.batch_id if isinstance(which, Batch) else "these batches"
        raise RollbackError(f"no rollback of {what} is asked for and open: there is nothing to close")
    done = []
    for batch in chosen:
        undoing = find(ledger, rollback_id(batch.batch_id))
        over = last[batch.batch_id] != "asked"
        if not over:
            system = batch.system or (undoing.system if undoing else None) or system_of(batch.workflow)
            lease = ledger.lease(system, holder, (settings or PushSettings()).lease_s)
            try:
                for row in (batch, undoing):
                    if row is not None:
                        end_unsent(ledger, lease, row, run_id)
            finally:
                ledger.release(lease)
            batch, undoing = ledger.batch(batch.batch_id), find(ledger, rollback_id(batch.batch_id))
        one = result_of(ledger, batch, undoing, already=over, push=None, closing=not over)
        if not over:
            ledger.rollback_closed(batch.batch_id, actor=actor, reason=reason, trigger="person", evidence=counted(one))
        done.append(one)
    return RollbackReport(tuple(done))


def end_unsent(ledger: Ledger, lease: Lease, row: BatchRow, run_id: str) -> None:
    """Settle what is open of a batch without asking the system, and seal it."""
    if row.delivery == "COMPLETE" or row.status == "REFUSED" or row.retired:
        return
    results = []
    for d in ledger.deliveries(row.batch_id, OPEN):
        if row.kind == "decision" and d.state == "PENDING":
            results.append(Result(d.n, "SKIPPED", says=NEVER_SENT))
        else:
            seen = d.says or ("it was not read" if d.observed is None else f"{d.observed} stood there")
            results.append(Result(d.n, "NOT_REVERSIBLE", says=f"closed by a person; last seen: {seen}"))
    ledger.open_push(lease, row.batch_id, run_id)
    ledger.settle(lease, row.batch_id, results)
    ledger.close_push(lease, row.batch_id, True)
