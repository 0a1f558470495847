"""What callers do with a batch: push it, resolve what is open of it, look at what a push would do.

Belongs here: the entries, and whether a push may begin. Does not: the steps (``delivery.push.engine``).
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime

from delivery.connectors.base import Connector, mapping_of
from delivery.ledger import OPEN, BatchRow, Holder, Ledger, utc_now
from delivery.push import engine, preview, report
from delivery.push.held_lease import NoLease, leased, steady
from delivery.push.run import Options, Run, allowed_while_stopped, stopped_text
from delivery.push.types import Changed, Diff, NotApproved, Progress, PushError, PushSettings, Refused, Report, Stopped


def push(  # noqa: PLR0913 - given by name
    ledger: Ledger,
    connector: Connector,
    batch_id: str,
    *,
    settings: PushSettings | None = None,
    run_id: str = "",
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = steady,
    rng: random.Random | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    by_person: bool = False,
    holder: Holder | None = None,
) -> Report:
    """Send what differs, read it back, and record both; run it again until the report is ``complete``.

    ``stop``: set it to end after the calls that are under way. ``by_person``: a rollback that a person asked for is sent even
    while the workflow is stopped. ``holder``: who takes the lease, this process if not given.

    A name under which the same was decided several times (``ledger.generation``) means the last of them. Limits are judged
    against what stands when a value is sent (``delivery.limits``).

    Raises Refused, NotApproved, Stopped, Blocked, Changed (nothing was sent), ``ledger.Busy`` (another push has this system),
    ``ledger.Fenced`` (another process took over: this one sends nothing more), Misconfigured, and the ledger's errors;
    all of them leave a state from which running it again goes on.
    """
    batch = ledger.newest(batch_id)
    settings = settings or PushSettings()
    if batch.delivery == "COMPLETE":
        return report.report_of(ledger, connector, batch, "it is complete already, nothing was sent")
    may_begin(ledger, connector, batch, settings, clock(), by_person)
    options = Options(run_id, clock, sleep, monotonic, rng, progress, stop, by_person)
    with _begun(ledger, connector, batch, settings, options, holder) as run:
        return engine.send_batch(run)


def resolve(  # noqa: PLR0913 - given by name
    ledger: Ledger,
    connector: Connector,
    batch_id: str,
    *,
    by: str,
    settings: PushSettings | None = None,
    run_id: str = "",
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = steady,
    rng: random.Random | None = None,
    stop: threading.Event | None = None,
    holder: Holder | None = None,
) -> Report:
    """End a batch without sending: what never went out is SKIPPED (``by`` says why), what is unknown is found by reading.

    For a batch that is about to be rolled back. Complete unless the system could not be read.
    """
    batch = ledger.batch(batch_id)
    settings = settings or PushSettings()
    if batch.delivery == "COMPLETE":
        return report.report_of(ledger, connector, batch, "it is complete already")
    options = Options(run_id, clock, sleep, monotonic, rng, None, stop, by_person=True)
    with _begun(ledger, connector, batch, settings, options, holder) as run:
        return engine.resolve_batch(run, by)


def dry_run(
    ledger: Ledger,
    connector: Connector,
    batch_id: str,
    *,
    settings: PushSettings | None = None,
    run_id: str = "",
    clock: Callable[[], datetime] = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = steady,
    by_person: bool = False,
) -> Diff:
    """What a push would change now, exactly; writes nothing anywhere and takes no lease.

    Where the system can check a write without making it, it is asked to. With pools, as if every decrease succeeds.
    Raises PushError where the system cannot be read.
    """
    batch = ledger.newest(batch_id)
    settings = settings or PushSettings()
    notes = []
    try:
        may_begin(ledger, connector, batch, settings, clock(), by_person)
    except PushError as error:
        notes.append(str(error))
    over = sum(count for state, count in batch.counts.items() if state not in OPEN)
    if over:
        notes.append(f"{over} of {batch.changed} deliveries are over already")
    if batch.delivery == "COMPLETE":
        return Diff(batch.batch_id, connector.system, (), tuple(notes))
    options = Options(run_id, clock, sleep, monotonic, random.Random(0), by_person=by_person)
    with Run(ledger, connector, batch, settings, options, NoLease(monotonic)) as run:
        rows, more = preview.look(run)
    return Diff(batch.batch_id, connector.system, tuple(rows), (*notes, *more))


def may_begin(
    ledger: Ledger, connector: Connector, batch: BatchRow, settings: PushSettings, now: datetime, by_person: bool
) -> None:
    """Whether people and guardrails let this batch go, to a system in which its values mean what they meant."""
    if batch.status == "REFUSED":
        raise Refused(f"batch {batch.batch_id} was refused by its guardrails and is not sent: decide the day again")
    if batch.backfill:
        raise Refused(
            f"batch {batch.batch_id} is a backfill: {batch.day} was decided when the day on which it would have acted was "
            "over, and it is never sent. Decide a newer day"
        )
    means_the_same(ledger, connector, batch)
    if batch.status == "HELD":
        from delivery.approvals import standing

        stands = standing(ledger, batch, now, settings.four_eyes)
        if not stands.ok:
            raise NotApproved(stands.text)
    if not allowed_while_stopped(batch, by_person) and (switch := ledger.stopped(batch.workflow)) is not None:
        raise Stopped(stopped_text(switch.workflow, switch.actor, switch.reason))


def means_the_same(ledger: Ledger, connector: Connector, batch: BatchRow) -> None:
    """Raise Changed where the connector's settings give values another meaning than when the batch was decided."""
    now = mapping_of(connector)
    of = batch if batch.reverses is None else ledger.batch(batch.reverses)
    then = of.record.get("mapping")
    if not now or now == then or (then is None and batch.status != "HELD"):
        return
    if then is None:
        raise Changed(
            f"batch {batch.batch_id}: the ledger does not hold what its values meant downstream when it was approved: decide "
            f"{batch.day} again, and approve that batch"
        )
    raise Changed(
        f"batch {batch.batch_id}: the connector of {batch.workflow} writes values differently than when it was decided "
        f"(names, columns, units or the like were changed): put workflow.yaml's section connector back as it was, or decide "
        f"{batch.day} again"
    )


@contextlib.contextmanager
def _begun(
    ledger: Ledger,
    connector: Connector,
    batch: BatchRow,
    settings: PushSettings,
    options: Options,
    holder: Holder | None,
) -> Iterator[Run]:
    """A push that has the lease of its system."""
    with (
        leased(ledger, connector.system, settings, options.monotonic, holder) as held,
        Run(ledger, connector, batch, settings, options, held) as run,
    ):
        yield run
