"""From a decided batch to the ledger and downstream: what is recorded, which batch counts for a day, when it may go.

Belongs here: the bridge between a workflow's lake tables and ``delivery``. Does not: sending, verifying or reversing
(``delivery``), or what is shown (``assets.delivery``).
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from common import duckdb_session
from common.errors import SignalboxError
from delivery import abort_rules, rollback
from delivery import push as pushing
from delivery.abort_rules import Finding
from delivery.connectors import catalog
from delivery.connectors.base import Connector
from delivery.ledger import BatchRow, Ledger, NewBatch
from delivery.limits import RECORDED, Limits
from models.registry import Registry
from pipeline.decisions import decide, in_effect
from pipeline.lake import Lake
from pipeline.lifecycle import hold, promotion
from pipeline.workflow import FOLDER, Workflow, load


class NothingToDeliver(SignalboxError, LookupError):
    """No batch of that day stands in the ledger."""


class TooLate(SignalboxError, RuntimeError):
    """The day that a batch was decided for is over; its changes are not sent unasked."""


def pools(workflow: Workflow, decisions: pa.Table) -> dict[str, int] | None:
    """What each arm's entities may hold together while a batch is sent: what they held when it was decided.

    None for a workflow whose guardrails know no pool (priorities are not money).
    """
    if workflow.guardrails.pool is None:
        return None
    held = decisions.group_by("arm").aggregate([("before", "sum")]).to_pylist()
    return {row["arm"]: int(row["before_sum"]) for row in sorted(held, key=lambda r: r["arm"])}


def record(
    workflow: Workflow,
    ledger: Ledger,
    day: date,
    batch: decide.Batch,
    *,
    decided_at: datetime,
    run_id: str,
    unless_sent: bool = False,
) -> BatchRow:
    """Write a decided batch to the ledger, with what each of its decisions needs to be replayed; the same batch once.

    ``unless_sent``: raises ``ledger.DaySent`` where another batch of the day was sent by then.
    """
    new = NewBatch(
        batch_id=batch.batch_id,
        workflow=workflow.name,
        kind="decision",
        day=day,
        digest=batch.digest,
        status=batch.status,  # type: ignore[arg-type]
        step=batch.step,
        as_of=workflow.cutoff_of(day),
        decided_at=decided_at,
        run_id=run_id,
        record={
            **batch.record,
            "step_reasons": list(batch.reasons),
            "late": batch.late,
            "certificates": batch.certificates,
            **_terms(workflow),
        },
        findings=[dict(f) for f in batch.findings],
        pools=pools(workflow, batch.decisions),
        reverses=None,
    )
    return ledger.record_batch(new, decide.with_record(workflow, day, batch), unless_sent=unless_sent)


def _terms(workflow: Workflow) -> dict[str, Any]:
    """On what terms a batch was decided, and may be approved: the limits of a change, and what values mean downstream."""
    if workflow.delivery is None:
        return {}
    kept = {f.name for f in dataclasses.fields(Limits)}
    limits = workflow.guardrails.model_dump(mode="json", include=kept, exclude_none=True)
    return {RECORDED: limits, "mapping": catalog.mapping(workflow.delivery.connector, workflow.folder)}


def batch_of(ledger: Ledger, workflow: str, day: date) -> BatchRow:
    """What is to be sent of a day: the batch decided last. Raises NothingToDeliver.

    What acted is another question (``pipeline.decisions.in_effect``): a batch of which nothing was sent never answers it.
    """
    found = [b for b in ledger.batches(workflow, since=day, kind="decision") if b.day == day]
    if not found:
        raise NothingToDeliver(
            f"{workflow}: no batch of {day} stands in the ledger; materialise [{workflow}, decisions] for that day"
        )
    return max(found, key=lambda b: b.sequence)


def open_batches(ledger: Ledger, workflow: Workflow, now: datetime) -> list[BatchRow]:
    """Batches that could go now: decided for a day that is not over, and not delivered to the end; oldest first.

    A held batch without the approvals that it needs is not among them.
    """
    from delivery.approvals import standing

    assert workflow.delivery is not None, "asked for workflows that deliver"
    since = now.date() - timedelta(days=1)
    newest: dict[date, BatchRow] = {}
    begun: set[date] = set()
    for row in sorted(ledger.batches(workflow.name, since=since, kind="decision"), key=lambda b: b.sequence):
        if earlier := newest.get(row.day):
            begun |= {row.day} if earlier.delivery != "NONE" else set()
        newest[row.day] = row
    four_eyes = workflow.delivery.approval.four_eyes
    return [
        row
        for day, row in sorted(newest.items())
        if row.delivery != "COMPLETE"
        and not row.backfill
        # one that changes nothing still takes back what an earlier batch of the day has sent
        and (row.changed or day in begun)
        and now < in_effect.over(day)
        and standing(ledger, row, now, four_eyes).ok
    ]


def connect(workflow: Workflow, clock: Callable[[], datetime]) -> Connector:
    """The workflow's downstream system; its secrets and the replaced address come from the environment.

    Raises Misconfigured naming what is missing, NothingToDeliver where the workflow sends nothing.
    """
    spec = workflow.delivery
    if spec is None:
        raise NothingToDeliver(f"{workflow.name}: workflow.yaml has no section `delivery`, so nothing is sent")
    settings: Any = spec.connector
    address = os.environ.get(spec.address_env or "")
    if address:
        fields = type(settings).model_fields
        field = next(f for f in ("base_url", "url", "endpoint", "path", "url_env") if f in fields)
        # a database's URL holds its password: the settings go on naming only the variable in which it stands
        said = {field: spec.address_env if field == "url_env" else address}
        settings = type(settings).model_validate({**settings.model_dump(), **said})
    return catalog.connect(settings, environ=os.environ, folder=workflow.folder, clock=clock)


@dataclass(frozen=True)
class Delivered:
    """A batch after a push was tried: what the push reports, or why there was none."""

    batch: BatchRow
    report: pushing.Report | None
    said: str
    findings: tuple[Finding, ...] = ()
    """What the guards found over it; recorded in the ledger."""


def deliver(
    workflow: Workflow,
    ledger: Ledger,
    connector: Connector,
    batch: BatchRow,
    *,
    run_id: str,
    clock: Callable[[], datetime],
    sleep: Callable[[float], None],
    progress: Callable[[pushing.Progress], None] | None = None,
    stale: bool = False,
) -> Delivered:
    """Push a batch on the workflow's terms.

    A batch that is refused, held without its approvals, or of a version on hold is not sent: ``said`` says so. Raises TooLate where the day
    it was decided for is over (``stale`` sends it all the same), and what ``push`` raises.
    """
    assert workflow.delivery is not None, "asked for workflows that deliver"
    if batch.status == "REFUSED":
        return Delivered(batch, None, f"REFUSED by its guardrails: batch {batch.batch_id} is never sent")
    if batch.backfill:
        return Delivered(
            batch, None, f"a backfill: batch {batch.batch_id} was decided when its day was over, and is never sent"
        )
    if batch.delivery != "COMPLETE" and (held := hold.of_batch(ledger, batch)) is not None:
        return Delivered(batch, None, f"batch {batch.batch_id} waits: {held.text}")
    if not stale and clock() >= in_effect.over(batch.day) and batch.delivery != "COMPLETE":
        raise TooLate(
            f"batch {batch.batch_id} was decided for {batch.day + timedelta(days=1)}, which is over; decide a newer day, "
            f"or send it all the same with: signalbox deliver {batch.batch_id} --late"
        )
    try:
        report = pushing.push(
            ledger, connector, batch.batch_id, settings=_push_settings(workflow), run_id=run_id, clock=clock, sleep=sleep,
            rng=random.Random(batch.digest), progress=progress,
        )  # fmt: skip
    except pushing.NotApproved as error:
        return Delivered(batch, None, str(error))
    findings = abort_rules.judge(report.counts, workflow.delivery.guards)
    note_findings(ledger, batch, findings)
    return Delivered(ledger.batch(batch.batch_id), report, "", tuple(findings))


def pushes(ledger: Ledger, batch: BatchRow) -> int:
    """How many pushes of a batch have begun."""
    return sum(event.body.get("batch_id") == batch.batch_id for event in ledger.events("push begun", batch.workflow))


GUARD = "guard"
"""Kind of the ledger event in which a deterministic guard has spoken over a batch."""


def note_findings(ledger: Ledger, batch: BatchRow, findings: Sequence[Finding]) -> None:
    """Record what the guards found over a batch, once for the same findings; nothing found is nothing recorded."""
    body = {
        "workflow": batch.workflow,
        "batch_id": batch.batch_id,
        "findings": [f.as_dict() for f in findings],
        "rollback": any(f.rollback for f in findings),
    }
    if findings and body not in [dict(e.body) for e in ledger.events(GUARD, batch.workflow)]:
        ledger.note(GUARD, body)


def condemned(ledger: Ledger, workflow: Workflow) -> list[tuple[str, str]]:
    """Batches that a guard wants taken back and of which no rollback is complete or closed, each with the guard's words."""
    done = {r.batch_id for r in ledger.rollbacks() if r.action in ("complete", "closed")}
    found = {}
    for event in ledger.events(GUARD, workflow.name):
        if event.body["rollback"] and event.body["batch_id"] not in done:
            found[event.body["batch_id"]] = "; ".join(f["text"] for f in event.body["findings"])
    return sorted(found.items())


def selection(
    ledger: Ledger, *, batch: str | None, workflow: str | None, since: date | None, model: int | None
) -> rollback.Selection:
    """What a rollback was asked for. Raises RollbackError unless it is exactly one of batch, since and model."""
    given = [name for name, value in (("a batch", batch), ("since", since), ("model", model)) if value is not None]
    if len(given) != 1:
        raise rollback.RollbackError(
            f"name one of a batch, since or model to take back; given: {', '.join(given) or 'none'}"
        )
    if batch is not None:
        ledger.batch(batch)  # an unknown one is refused here, by name
        return rollback.Batch(batch)
    if workflow is None:
        raise rollback.RollbackError("name the workflow, too, whose batches are to be taken back")
    if model is not None:
        return rollback.Model(workflow, model)
    assert since is not None, "one of the three was given"
    return rollback.Since(since, workflow)


def roll_back(
    ledger: Ledger,
    registry: Registry,
    which: rollback.Selection,
    *,
    actor: str,
    reason: str,
    trigger: Literal["person", "guard"],
    run_id: str,
    clock: Callable[[], datetime],
    sleep: Callable[[float], None],
    progress: Callable[[pushing.Progress], None] | None = None,
) -> rollback.RollbackReport:
    """Push the prior values of the chosen batches; of a model version, also block it and give its aliases back.

    The model goes first: while values are being restored nobody should decide by it. A challenger that has decided nothing
    yet is blocked, and nothing is taken back. Rerunnable until the report is complete. Raises what ``delivery.rollback``
    and the registry raise.
    """
    if isinstance(which, rollback.Model):
        promotion.step_back(
            which.workflow, registry, ledger, which.version, actor=actor, reason=reason, trigger=trigger
        )
        if not ledger.batches(which.workflow, model_version=which.version, kind="decision") and any(
            p.version == which.version and p.action in ("shadow", "canary") for p in ledger.promotions(which.workflow)
        ):
            return rollback.RollbackReport(())
    workflow = _whose(ledger, which)
    connector = connect(workflow, clock)
    try:
        return rollback.roll_back(
            ledger, lambda _: connector, which, actor=actor, reason=reason, trigger=trigger, run_id=run_id, clock=clock,
            sleep=sleep, progress=progress, settings=_push_settings(workflow),
        )  # fmt: skip
    finally:
        connector.close()


def try_roll_back(
    ledger: Ledger, which: rollback.Selection, *, clock: Callable[[], datetime]
) -> tuple[pushing.Diff, ...]:
    """What taking these back would change now, a difference a batch, newest first; nothing is written anywhere."""
    workflow = _whose(ledger, which)
    connector = connect(workflow, clock)
    try:
        return rollback.dry_run(ledger, lambda _: connector, which, settings=_push_settings(workflow))
    finally:
        connector.close()


def close_rollback(
    ledger: Ledger,
    which: rollback.Selection,
    *,
    actor: str,
    reason: str,
    run_id: str,
    clock: Callable[[], datetime],
) -> rollback.RollbackReport:
    """End rollbacks that cannot come to their end, with what is left listed. Raises what ``delivery.rollback.close`` raises."""
    workflow = _whose(ledger, which)

    def system(_: str) -> str:
        connector = connect(workflow, clock)
        try:
            return connector.system
        finally:
            connector.close()

    return rollback.close(
        ledger, system, which, actor=actor, reason=reason, run_id=run_id, settings=_push_settings(workflow)
    )


def _whose(ledger: Ledger, which: rollback.Selection) -> Workflow:
    name = ledger.batch(which.batch_id).workflow if isinstance(which, rollback.Batch) else which.workflow
    assert name is not None, "a selection names its workflow"
    return load(FOLDER / name)


def _push_settings(workflow: Workflow) -> pushing.PushSettings:
    assert workflow.delivery is not None, "asked for workflows that deliver"
    return workflow.delivery.push.model_copy(update={"four_eyes": workflow.delivery.approval.four_eyes})


def lines(report: rollback.RollbackReport) -> list[str]:
    """A rollback's report for a terminal or a log: what came back, and everything that did not, with the reason."""
    told = []
    for one in report.batches:
        how = "complete" if one.complete else "NOT complete: run it again"
        how = "closed by a person with what was left" if one.closed else "was complete already" if one.already else how
        told.append(f"{one.batch_id}: {how}; {one.restored} restored, {one.never_sent} had not been sent")
        for what in dataclasses.fields(one):
            found = getattr(one, what.name)
            name = "changed besides, not restored" if what.name == "beside" else what.name.replace("_", " ")
            if isinstance(found, tuple) and found:
                told.append(f"  {name}: {len(found)}")
                told += [f"    {left.entity}: {left.says}" for left in found]
    told += [f"{batch_id}: waits, a newer one comes first" for batch_id in report.waiting]
    told += [f"{batch_id}: newer, not chosen, left as it is" for batch_id in report.newer]
    told += [
        f"{batch_id}: older than the retention, what it changed is not known any more and stays"
        for batch_id in report.retired
    ]
    return told or ["Nothing to take back."]


def spend_findings(workflow: Workflow, ledger: Ledger, outcomes: pa.Table) -> dict[str, list[Finding]]:
    """What the guard over spending finds in the outcomes of delivered decisions, by batch; money in micros.

    A day's arm is judged as a whole. Where several batches of the day answer for it, the newest of them has set what stood in
    the end: its pools count, and it is the one that is named.
    """
    spec = workflow.delivery
    found: dict[str, list[Finding]] = {}
    if spec is None or spec.spend is None or not outcomes.num_rows:
        return found
    spent = outcomes.group_by(["decided_day", "arm"]).aggregate([(spec.spend, "sum"), ("batch_id", "distinct")])
    days: dict[date, list[dict[str, Any]]] = {}
    for row in spent.to_pylist():
        days.setdefault(row["decided_day"], []).append(row)
    for rows in days.values():
        by_arm = {r["arm"]: round(r[f"{spec.spend}_sum"] * 1e6) for r in rows if r[f"{spec.spend}_sum"] is not None}
        answering = {batch_id for r in rows for batch_id in r["batch_id_distinct"]}
        batch = max((ledger.batch(batch_id) for batch_id in answering), key=lambda b: b.sequence)
        findings = abort_rules.spend_over_pool(by_arm, batch.pools, spec.guards)
        if findings:
            found[batch.batch_id] = findings
    return found


def outcomes_of_decisions(workflow: Workflow, lake: Lake, ledger: Ledger, day: date) -> pa.Table:
    """The outcomes that became known for the cut-off of ``day``, each beside the decision that it answers.

    An outcome of the join ``entity_day`` answers the decision of its ``for_day``; one of ``entity`` answers the entity's
    newest decision that had been made when it became known. Only decisions that acted answer (``pipeline.decisions.in_effect``). Columns:
    decision_id, batch_id, decided_day, entity_id, unit, arm, arm_probability, perturbation, before, after, state (of the
    delivery; null: nothing was to be sent), standing (the value that stood downstream when the day of its effect ended),
    then known_at and the outcome's own columns.
    """
    outcomes = lake.read(workflow.table("outcomes"), days=[day]) if lake.exists(workflow.table("outcomes")) else None
    if outcomes is None or not outcomes.num_rows:
        return _DECIDED.empty_table()
    by_day = workflow.outcomes.join == "entity_day"
    answered = set(pc.unique(outcomes["for_day"]).to_pylist()) if by_day else None
    first = min(answered) if answered else day - timedelta(days=workflow.outcomes.lookback_days)
    decided = _decided(workflow, ledger, first, day, answered)
    join = "o.for_day = d.decided_day" if by_day else "d.decided_at < o.known_at"
    newest = "" if by_day else "QUALIFY row_number() OVER (PARTITION BY d.entity_id ORDER BY d.decided_day DESC) = 1"
    with duckdb_session.engine() as con:
        con.register("d", decided)
        con.register("o", outcomes)
        return con.sql(
            f"SELECT d.* EXCLUDE (decided_at), o.* EXCLUDE (entity_id, for_day, day) FROM o JOIN d ON d.entity_id = o.entity_id AND {join} "
            f"{newest} ORDER BY d.entity_id, d.decided_day"
        ).to_arrow_table()


_DECIDED = pa.schema([f for f in in_effect.DECIDED if f.name not in ("perturbation_probability", "decided_at")])


def _decided(workflow: Workflow, ledger: Ledger, first: date, last: date, only: set[date] | None) -> pa.Table:
    """The decisions that acted on the days ``first``…``last``, with what came of sending them."""
    return in_effect.decided(ledger, workflow.name, first, last, only=only).drop_columns(["perturbation_probability"])


def randomised(ledger: Ledger, workflow: str, day: date) -> dict[str, tuple[float, float]]:
    """What exploring drew on ``day`` and really stood: entity → (multiplier, probability).

    What a reporting export joins to the platform's rows, since the platform knows nothing of it. A value that was not sent,
    was replanned, or was taken back before the day of its effect was over is none of it.
    """
    drawn = in_effect.decided(ledger, workflow, day, day)
    stood = drawn.filter(pc.is_valid(pc.field("perturbation")) & (pc.field("standing") == pc.field("after")))
    return {
        r["entity_id"]: (r["perturbation"], r["perturbation_probability"])
        for r in stood.select(["entity_id", "perturbation", "perturbation_probability"]).to_pylist()
    }
