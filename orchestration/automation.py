"""Everything that can start a run unattended, declared in one place and off until somebody turns it on.

Belongs here: sensors and schedules. Does not: computing anything; a sensor reads what an asset stored.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import dagster as dg

from assets.resources import ClockResource, LakeResource, LandingResource, LedgerResource, RegistryResource
from common import clock, errors
from delivery.ledger import Ledger, Rollback, generation
from models.registry import Registry
from orchestration.jobs import jobs_of
from orchestration.landing_sensor import SETTLE, Landed, Manifest, Memory, closed_days, day_of, look
from pipeline import dispatch
from pipeline.decisions import in_effect
from pipeline.lake import Lake, TableMissing
from pipeline.lifecycle import hold, promotion, retraining
from pipeline.monitoring import verdicts
from pipeline.workflow import Workflow

__all__ = [
    "SETTLE", "Unattended", "closed_days", "day_of", "deadline_request", "deadline_times", "delivery_requests",
    "ended_runs", "guard_requests",
    "is_decided", "landing_requests", "newest_decided", "open_rollbacks", "registry_requests", "retrain_request", "running_days",
    "training_runs", "unattended",
]  # fmt: skip

RETRY_MINUTES = 10
"""How often a push, an answer or a rollback that did not come to its end is started again."""
HOURLY_AFTER = timedelta(hours=1)
"""A rollback that is this old is started again once an hour: what is left of it may need a person."""
DEAD_AFTER = timedelta(hours=1)
"""A run of a day that has reported nothing for so long counts as dead: a killed process reports no end."""
DEADLINE_AGAIN = (0, 10, 30, 70, 150, 310)
"""Minutes after the deadline at which the schedule looks: a decision that died is asked for again."""
_CLOSED: frozenset[str] = frozenset({"closed"})
"""A person ended the rollback with its remainder listed: nobody takes it up again unasked."""
_ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE)


@dataclass(frozen=True)
class Unattended:
    """One thing that can start runs by itself."""

    name: str
    starts: str
    when: str
    definition: dg.SensorDefinition | dg.ScheduleDefinition


def landing_requests(
    workflow: Workflow,
    landing_root: str,
    seen: Mapping[str, Any],
    now: datetime,
    *,
    decided: date | None = None,
    running: Collection[date] = (),
    landed: Landed | None = None,
    ended: Mapping[str, bool] | None = None,
) -> tuple[list[dg.RunRequest], dict[str, Any]]:
    """Runs for days whose files are new or changed or whose run died, and what is remembered by then; see ``landing_sensor.look``."""
    found = look(
        workflow, landing_root, seen, now, decided=decided, running=running, landed=landed, ended=ended
    )  # fmt: skip
    return found.requests, found.cursor


def is_decided(workflow: Workflow, lake: Lake, book: Ledger | None, day: date) -> bool:
    """Whether ledger and lake both hold the newest decision batch of a day, no backfill; without a ledger it is not."""
    rows = [] if book is None else [b for b in book.batches(workflow.name, since=day, kind="decision") if b.day == day]
    rows = [b for b in rows if not b.backfill]
    if not rows:
        return False
    try:
        stands = lake.read(workflow.table("batches"), days=[day], columns=["batch_id"])["batch_id"].to_pylist()
    except TableMissing:
        return False
    # the same content decided again has a name of its own in the ledger
    newest = generation(max(rows, key=lambda b: b.sequence).batch_id)[0]
    return newest in {generation(batch_id)[0] for batch_id in stands}


def newest_decided(workflow: Workflow, lake: Lake, book: Ledger, now: datetime) -> date | None:
    """The newest day that is decided (no backfill); None where none is."""
    for since in (now.date() - timedelta(days=30), None):
        days = {b.day for b in book.batches(workflow.name, since=since, kind="decision") if not b.backfill}
        for day in sorted(days, reverse=True):
            # a kill between ledger and lake is mended while the day's effect lasts
            if now >= in_effect.over(day) or is_decided(workflow, lake, book, day):
                return day
    return None


def _unfinished(record: dg.RunRecord) -> bool:
    """Whether a run waits or goes on. Dagster stamps its records with the machine's clock, whatever time the story has."""
    if record.dagster_run.is_finished:
        return False
    changed = record.update_timestamp
    changed = changed if changed.tzinfo else changed.replace(tzinfo=UTC)
    return record.dagster_run.status == dg.DagsterRunStatus.QUEUED or clock.now() - changed < DEAD_AFTER


def running_days(instance: dg.DagsterInstance, workflow: Workflow, jobs: Sequence[str]) -> frozenset[date]:
    """Days of which a run of one of the jobs waits or is in progress, by Dagster's own records."""
    days: set[date] = set()
    going = [s for s in dg.DagsterRunStatus if s not in (*_ENDED, dg.DagsterRunStatus.CANCELED)]
    for job in jobs:
        asked = dg.RunsFilter(job_name=f"{workflow.name}_{job}", statuses=going)
        for one in filter(_unfinished, instance.get_run_records(asked, limit=100)):
            tags = one.dagster_run.tags
            first = tags.get("dagster/partition") or tags.get("dagster/asset_partition_range_start")
            last = tags.get("dagster/partition") or tags.get("dagster/asset_partition_range_end")
            if first and last:
                begin, end = date.fromisoformat(first), date.fromisoformat(last)
                days |= {begin + timedelta(days=n) for n in range((end - begin).days + 1)}
    return frozenset(days)


def ended_runs(instance: dg.DagsterInstance, keys: Collection[str]) -> dict[str, bool]:
    """Run key → whether its run succeeded, of those that have ended or died; one that a person cancelled counts as done."""
    ended: dict[str, bool] = {}
    for key in keys:
        for one in instance.get_run_records(dg.RunsFilter(tags={"dagster/run_key": key}), limit=1):
            if not _unfinished(one):
                ended[key] = one.dagster_run.status in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.CANCELED)
    return ended


def training_runs(instance: dg.DagsterInstance, workflow: Workflow) -> retraining.Runs:
    """The runs of a workflow's retraining job by the day they train for, from Dagster's own records (the newest hundred)."""
    records = instance.get_run_records(dg.RunsFilter(job_name=f"{workflow.name}_retrain"), limit=100)
    # Dagster stamps its records with the machine's clock, whatever time the story has
    old = clock.now() - timedelta(hours=workflow.retraining.longest_hours)
    found: dict[str, set[date]] = {"trained": set(), "running": set(), "failed": set()}
    for one in records:
        tags = one.dagster_run.tags
        of = tags.get("dagster/partition") or tags.get("dagster/asset_partition_range_end")
        if of is None:
            continue
        status, changed = one.dagster_run.status, one.update_timestamp
        changed = changed if changed.tzinfo else changed.replace(tzinfo=UTC)
        ended = "trained" if status == dg.DagsterRunStatus.SUCCESS else "failed"
        found["running" if not one.dagster_run.is_finished and changed > old else ended].add(date.fromisoformat(of))
    return retraining.Runs(
        frozenset(found["trained"]),
        frozenset(found["running"]),
        frozenset(found["failed"] - found["trained"] - found["running"]),
    )


def retrain_request(
    workflow: Workflow,
    lake: Lake,
    book: Ledger,
    now: datetime,
    runs: retraining.Runs,
    more: Mapping[date, retraining.Evidence] | None = None,
) -> dg.RunRequest | dg.SkipReason:
    """A retraining where the evidence asks for one and nothing holds it back; every trigger goes into the ledger."""
    made = retraining.look(workflow, lake, book, runs=runs, now=now, more=more)
    asked = next((t for t in made if t.action == "asked"), None)
    if asked is None:
        said = "; ".join(f"{t.text}: {t.action}, {t.reason}" for t in made) or "nothing new asks for a retraining"
        return dg.SkipReason(f"{workflow.name}: {said}")
    return dg.RunRequest(
        run_key=asked.run_key,
        partition_key=asked.day.isoformat(),
        tags={"signalbox/cause": asked.text[:250]},
    )


def deadline_request(
    workflow: Workflow, lake: Lake, now: datetime, book: Ledger | None = None, *, running: Collection[date] = ()
) -> dg.RunRequest | dg.SkipReason:
    """A decision with what is there, for the day whose deadline has come undecided, by ledger and lake.

    ``running``: days that the job ``decide`` is deciding already.
    """
    day = now.date() - timedelta(days=1)
    if day < workflow.start:
        return dg.SkipReason(f"{workflow.name}: starts on {workflow.start}")
    if now < workflow.deadline_of(day):
        return dg.SkipReason(f"{workflow.name}: the deadline of {day} has not come")
    if is_decided(workflow, lake, book, day):
        return dg.SkipReason(f"{workflow.name}: {day} is decided")
    if day in running:
        return dg.SkipReason(f"{workflow.name}: {day} is being decided")
    return dg.RunRequest(
        run_key=f"{workflow.name}:deadline:{day}",  # remembered within one tick of a schedule only
        partition_key=day.isoformat(),
        tags={"signalbox/cause": f"the deadline of {day} came and no batch stood"},
    )


def _rollbacks(book: Ledger) -> dict[str, list[Rollback]]:
    """Everything recorded of rollbacks, by the batch that was to be taken back, oldest first."""
    by_batch: dict[str, list[Rollback]] = {}
    for row in book.rollbacks():
        by_batch.setdefault(row.batch_id, []).append(row)
    return by_batch


def open_rollbacks(workflow: Workflow, book: Ledger) -> dict[str, list[Rollback]]:
    """By batch, what is recorded of rollbacks that were asked for and are neither complete nor closed; the newest batch first."""
    left = {batch_id: rows for batch_id, rows in _rollbacks(book).items() if rows[-1].action == "asked"}
    if not left:
        return {}
    own = [b for b in book.batches(workflow.name, kind="decision") if b.batch_id in left]
    newest_first = sorted(own, key=lambda b: (b.day, b.sequence), reverse=True)
    return {b.batch_id: left[b.batch_id] for b in newest_first}


def delivery_requests(workflow: Workflow, book: Ledger, now: datetime) -> list[dg.RunRequest]:
    """Pushes of batches that may go now and are not at their end; a held one once its approvals stand; none beside an open
    rollback, which blocks them, and none of a version on hold."""
    if open_rollbacks(workflow, book):
        return []
    requests = []
    condemned = {batch_id for batch_id, _ in dispatch.condemned(book, workflow)}
    condemned |= {batch_id for one in verdicts.condemned(book, workflow) for batch_id in one.batches}
    for batch in dispatch.open_batches(book, workflow, now):
        if batch.batch_id in condemned:
            continue  # a guard wants it back
        if hold.of_batch(book, batch) is not None:
            continue  # an alert over its version stands, and nobody has answered it
        attempt = dispatch.pushes(book, batch)
        requests.append(
            dg.RunRequest(
                run_key=f"{batch.batch_id}:push:{attempt}:{_slot(now)}",
                partition_key=batch.day.isoformat(),
                tags={"signalbox/cause": f"batch {batch.batch_id} is {batch.status}, push {attempt + 1}"},
            )
        )
    return requests


def _slot(now: datetime, since: datetime | None = None) -> str:
    """Stands in the key of what is tried again until it is done: a run key is remembered for ever, whatever became of the
    run. What was asked for long ago (``since``) is tried once an hour."""
    if since is not None and now - since >= HOURLY_AFTER:
        return f"{now:%Y-%m-%dT%H}"
    return f"{now:%Y-%m-%dT%H}:{now.minute // RETRY_MINUTES * RETRY_MINUTES:02d}"


def guard_requests(workflow: Workflow, book: Ledger, now: datetime) -> list[dg.RunRequest]:
    """Rollbacks of batches over which a deterministic guard has spoken, of what stands under a verdict ROLLBACK, unless
    they are taken back already; and of what anybody asked to take back and did not come to its end."""
    left = open_rollbacks(workflow, book)
    closed = {batch_id for batch_id, rows in _rollbacks(book).items() if rows[-1].action in _CLOSED}
    asked: list[tuple[str, dict[str, Any], set[str]]] = []
    by_guard = {"actor": "guard", "trigger": "guard"}
    for batch_id, reason in dispatch.condemned(book, workflow):
        if batch_id in closed:
            continue
        asked.append((f"{batch_id}:guard", {"batch": batch_id, "reason": reason, **by_guard}, {batch_id}))
    for one in verdicts.condemned(book, workflow):
        if one.batches and closed.issuperset(one.batches):
            continue
        # The verdict stands in the key: the same version let act anew and condemned anew is another rollback.
        key = f"{workflow.name}:{one.comparison.replace(' ', '-')}:{one.version or 'rule'}:verdict-{one.attempt}"
        which = {"since": one.since.isoformat()} if one.version is None else {"model": one.version}
        asked.append((key, {**which, "reason": one.reason, **by_guard}, set(one.batches)))
    guarded = {batch_id for _, _, batches in asked for batch_id in batches}
    # The newest first, as any rollback goes; the next once that one is complete or closed.
    for batch_id in [batch_id for batch_id in left if batch_id not in guarded][:1]:
        last = left[batch_id][-1]
        if now - last.at < timedelta(minutes=RETRY_MINUTES):
            continue  # it may be going on
        who = (last.actor or "unknown").removeprefix("dagster:")
        again = {"batch": batch_id, "reason": last.reason or "asked for before", "actor": who, "trigger": last.trigger}
        asked.append((f"{batch_id}:rollback", again, {batch_id}))
    op = f"{workflow.name}_take_back"
    requests = []
    for key, config, batches in asked:
        since = min((left[batch_id][0].at for batch_id in batches if batch_id in left), default=None)
        requests.append(
            dg.RunRequest(
                run_key=f"{key}:{_slot(now, since)}",
                run_config={"ops": {op: {"config": config}}},
                tags={"signalbox/cause": str(config["reason"])[:250]},
            )
        )
    return requests


def _delivery_sensor(workflow: Workflow) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{workflow.name}_push",
        job_name=f"{workflow.name}_deliver",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="A batch within its limits, or approved, is sent; a push that broke off is taken up again.",
    )
    def ready(context: dg.SensorEvaluationContext, ledger: LedgerResource, clock: ClockResource) -> Any:
        book = ledger.open(clock.now)
        try:
            if book.stopped(workflow.name):
                return dg.SkipReason(f"{workflow.name} is stopped: signalbox resume {workflow.name}")
            requests = delivery_requests(workflow, book, clock.now())
            waits_for = list(open_rollbacks(workflow, book))
        finally:
            book.close()
        if waits_for:
            return dg.SkipReason(f"{workflow.name}: pushes wait for the rollback of {', '.join(waits_for)}")
        return requests or dg.SkipReason("no batch may go now")

    return ready


def _guard_sensor(workflow: Workflow) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{workflow.name}_guard",
        job_name=f"{workflow.name}_rollback",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="A guard over rejections, overrides or spend has spoken, or a verdict ROLLBACK stands: it is taken back.",
    )
    def spoken(context: dg.SensorEvaluationContext, ledger: LedgerResource, clock: ClockResource) -> Any:
        book = ledger.open(clock.now)
        try:
            if book.stopped(workflow.name):
                return dg.SkipReason(f"{workflow.name} is stopped; a person may roll back: signalbox rollback")
            requests = guard_requests(workflow, book, clock.now())
        finally:
            book.close()
        return requests or dg.SkipReason("no guard has spoken")

    return spoken


def registry_requests(workflow: Workflow, registry: Registry, book: Ledger, now: datetime) -> list[dg.RunRequest]:
    """A run that answers what was moved or deleted in MLflow, while aliases and ledger differ; under the same key for the
    same difference, so that it starts once, and again after a while should it fail."""
    said = promotion.pending(registry, book, workflow.name)
    if not said:
        return []
    # what has been answered since stands in the key: the same alias may be moved again to where it was put back from
    answered = [len(book.promotions(workflow.name)), len(book.events(promotion.REQUEST, workflow.name)), said]
    digest = hashlib.sha256(json.dumps(answered).encode()).hexdigest()[:16]
    return [
        dg.RunRequest(
            run_key=f"{workflow.name}:registry:{digest}:{_slot(now)}", tags={"signalbox/cause": "; ".join(said)[:250]}
        )
    ]


def _registry_sensor(workflow: Workflow) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{workflow.name}_registry",
        job_name=f"{workflow.name}_reconcile",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="An alias moved or a version deleted in MLflow is a request: judged, then recorded or put back.",
    )
    def asked(
        context: dg.SensorEvaluationContext, registry: RegistryResource, ledger: LedgerResource, clock: ClockResource
    ) -> Any:
        try:
            with ledger.open(clock.now) as book:
                requests = registry_requests(workflow, registry.registry, book, clock.now())
        except errors.unreachable() as error:
            said = f"{type(error).__name__}: {errors.first_line(error)}"
            return dg.SkipReason(f"MLflow does not answer, nothing is changed and the day goes by the ledger: {said}")
        return requests or dg.SkipReason("the aliases stand where the ledger says")

    return asked


def _landing_sensor(
    workflow: Workflow, jobs: "Sequence[dg.UnresolvedAssetJobDefinition | dg.JobDefinition]"
) -> dg.SensorDefinition:
    starts = {f"{workflow.name}_daily", f"{workflow.name}_prepare"}

    @dg.sensor(
        name=f"{workflow.name}_landing",
        jobs=[job for job in jobs if job.name in starts],
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="A new file in the landing zone starts its day, once the day's cut-off has passed, and again while its run "
        "dies; a file of a decided day or an older one is prepared alone.",
    )
    def landed(
        context: dg.SensorEvaluationContext,
        lake: LakeResource,
        landing: LandingResource,
        ledger: LedgerResource,
        clock: ClockResource,
    ) -> dg.SensorResult:
        seen = json.loads(context.cursor) if context.cursor else {}
        now = clock.now()
        with ledger.open(clock.now) as book:
            decided = newest_decided(workflow, lake.lake, book, now)
        asked = [one["key"] for one in Memory.read(seen).prepared.values()]
        found = look(
            workflow,
            landing.of(workflow.name),
            seen,
            now,
            decided=decided,
            running=running_days(context.instance, workflow, ("daily", "decide")),
            landed=Manifest(lake.lake, workflow).holds,
            ended=ended_runs(context.instance, asked),
        )
        if found.requests:
            for note in found.notes:
                context.log.info(note)
            return dg.SensorResult(run_requests=found.requests, cursor=json.dumps(found.cursor))
        said = "; ".join(("no new file whose day's cut-off has passed", *found.notes))
        return dg.SensorResult(skip_reason=said, cursor=json.dumps(found.cursor))

    return landed


def _drift_sensor(workflow: Workflow) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{workflow.name}_retrain_on_drift",
        job_name=f"{workflow.name}_retrain",
        minimum_interval_seconds=300,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="A fall of the metric, realised or estimated, or drift starts a retraining, within cooldown and budget.",
    )
    def drifted(
        context: dg.SensorEvaluationContext, lake: LakeResource, ledger: LedgerResource, clock: ClockResource
    ) -> Any:
        with ledger.open(clock.now) as book:
            return retrain_request(workflow, lake.lake, book, clock.now(), training_runs(context.instance, workflow))

    return drifted


def deadline_times(deadline: time) -> list[str]:
    """When the schedule looks, as cron: at the deadline, and some times after it before the day is over."""
    at = deadline.hour * 60 + deadline.minute
    return [f"{m % 60} {m // 60} * * *" for m in (at + later for later in DEADLINE_AGAIN) if m < 24 * 60]


def _deadline_schedule(workflow: Workflow) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{workflow.name}_deadline",
        job_name=f"{workflow.name}_decide",
        cron_schedule=deadline_times(workflow.deadline),
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="At the deadline an undecided day is decided with what is there; a few more times after it, should that die.",
    )
    def deadline(context: dg.ScheduleEvaluationContext, lake: LakeResource, ledger: LedgerResource) -> Any:
        at = context.scheduled_execution_time.astimezone(UTC).replace(tzinfo=None)
        running = running_days(context.instance, workflow, ("decide",))
        with ledger.open(lambda: at) as book:
            return deadline_request(workflow, lake.lake, at, book, running=running)

    return deadline


def _weekly_schedule(workflow: Workflow) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{workflow.name}_weekly_retrain",
        job_name=f"{workflow.name}_retrain",
        cron_schedule="0 8 * * 1",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="A candidate every Monday, whatever drift says, outside the cooldown and within the budget.",
    )
    def weekly(context: dg.ScheduleEvaluationContext, lake: LakeResource, ledger: LedgerResource) -> Any:
        at = context.scheduled_execution_time.astimezone(UTC).replace(tzinfo=None)
        day = at.date() - timedelta(days=1)
        if day < workflow.start:
            return dg.SkipReason(f"{workflow.name}: starts on {workflow.start}")
        with ledger.open(lambda: at) as book:
            runs = training_runs(context.instance, workflow)
            return retrain_request(workflow, lake.lake, book, at, runs, {day: retraining.calendar(day)})

    return weekly


def unattended(
    workflows: Sequence[Workflow], jobs: "Sequence[dg.UnresolvedAssetJobDefinition | dg.JobDefinition] | None" = None
) -> list[Unattended]:
    """The whole list. What is not in it does not exist: ``definitions`` takes its sensors and schedules from here only.

    ``jobs``: the workflows' jobs; Dagster wants a sensor that may start several to name the very objects.
    """
    found = []
    every = [job for workflow in workflows for job in jobs_of(workflow)] if jobs is None else jobs
    for workflow in workflows:
        name = workflow.name
        found += [
            Unattended(
                f"{name}_landing",
                f"{name}_daily, {name}_prepare",
                "a new file, after its day's cut-off; of a day that is decided, or an older one, the second",
                _landing_sensor(workflow, every),
            ),
            Unattended(
                f"{name}_retrain_on_drift",
                f"{name}_retrain",
                "a fallen metric or drift, within cooldown and budget",
                _drift_sensor(workflow),
            ),
            Unattended(
                f"{name}_deadline",
                f"{name}_decide",
                f"{workflow.deadline:%H:%M} UTC, undecided",
                _deadline_schedule(workflow),
            ),
            Unattended(
                f"{name}_registry",
                f"{name}_reconcile",
                "an alias moved or a version deleted in MLflow",
                _registry_sensor(workflow),
            ),
            Unattended(f"{name}_weekly_retrain", f"{name}_retrain", "Mondays 08:00 UTC", _weekly_schedule(workflow)),
        ]
        if workflow.delivery is not None:
            found += [
                Unattended(f"{name}_push", f"{name}_deliver", "a batch that may go", _delivery_sensor(workflow)),
                Unattended(
                    f"{name}_guard",
                    f"{name}_rollback",
                    "a guard has spoken, a verdict is ROLLBACK, or a rollback broke off",
                    _guard_sensor(workflow),
                ),
            ]
    return found
