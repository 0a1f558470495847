"""Everything that can start a run unattended, declared in one place and off until somebody turns it on.

Belongs here: sensors and schedules. Does not: computing anything; a sensor reads what an asset stored.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg

from assets import delivering, guarding, promoting, retraining
from assets import landing as landing_zone
from assets.lake import Lake, TableMissing
from assets.resources import ClockResource, LakeResource, LandingResource, LedgerResource, RegistryResource
from assets.workflow import Source, Workflow
from delivery.ledger import Ledger
from models.registry import Registry

SETTLE = timedelta(seconds=60)
"""A file that changed less than this ago may still be being written."""
RETRY_MINUTES = 10
"""How often a push or a guard's rollback that did not come to its end is started again."""


@dataclass(frozen=True)
class Unattended:
    """One thing that can start runs by itself."""

    name: str
    starts: str
    when: str
    definition: dg.SensorDefinition | dg.ScheduleDefinition


def closed_days(workflow: Workflow, now: datetime) -> date:
    """The newest day whose cut-off has passed."""
    day = now.date() - timedelta(days=1)
    return day if now >= workflow.cutoff_of(day) else day - timedelta(days=1)


def day_of(source: Source, name: str) -> date | None:
    """The day that ``{day}`` stands for in a file's name; None where the pattern has none or the name no real day."""
    if "{day}" not in source.files:
        return None
    pattern = (
        fnmatch.translate(source.files.replace("{day}", "\0"))
        .replace("\\\0", "\0")
        .replace("\0", r"(\d{4}-\d{2}-\d{2})", 1)
    )
    found = re.match(pattern, name) or re.search(r"(\d{4}-\d{2}-\d{2})", name)
    try:
        return date.fromisoformat(found[1]) if found else None
    except ValueError:
        return None  # 2026-02-31 has the form of a day and is none


def landing_requests(
    workflow: Workflow, landing_root: str, seen: dict[str, str], now: datetime
) -> tuple[list[dg.RunRequest], dict[str, str]]:
    """Runs for days whose files are new or changed, and what has been seen by then.

    A file whose day's cut-off has not passed, or that may still be being written, is left for a later look.
    """
    newest = closed_days(workflow, now)
    found: dict[date, list[str]] = {}
    after = dict(seen)
    for name, source in sorted(workflow.sources.items()):
        for file in landing_zone.discover(landing_root, source, None):
            info = file.fs.info(file.path)
            changed = info.get("mtime") or info.get("LastModified") or info.get("last_modified")
            mark = f"{info['size']}:{changed}"
            if seen.get(file.name) == mark:
                continue
            if (
                isinstance(changed, int | float)
                and now - datetime.fromtimestamp(changed, UTC).replace(tzinfo=None) < SETTLE
            ):
                continue
            day = day_of(source, file.name) if "{day}" in source.files else newest
            if day is None or day > newest or day < workflow.start:
                continue
            found.setdefault(day, []).append(f"{name}:{file.name}:{mark}")
            after[file.name] = mark
    requests = [
        dg.RunRequest(
            run_key=f"{workflow.name}:{day}:{hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:16]}",
            partition_key=day.isoformat(),
            tags={"signalbox/cause": f"{len(files)} new file(s) in the landing zone"},
        )
        for day, files in sorted(found.items())
    ]
    return requests, after


def training_runs(instance: dg.DagsterInstance, workflow: Workflow) -> retraining.Runs:
    """The runs of a workflow's retraining job by the day they train for, from Dagster's own records (the newest hundred)."""
    records = instance.get_run_records(dg.RunsFilter(job_name=f"{workflow.name}_retrain"), limit=100)
    # Dagster stamps its records with the machine's clock, whatever time the story has
    old = datetime.now(UTC) - timedelta(hours=workflow.retraining.longest_hours)
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


def deadline_request(workflow: Workflow, lake: Lake, now: datetime) -> dg.RunRequest | dg.SkipReason:
    """A decision with what is there, for the day whose deadline has come undecided."""
    day = now.date() - timedelta(days=1)
    if day < workflow.start:
        return dg.SkipReason(f"{workflow.name}: starts on {workflow.start}")
    if now < workflow.deadline_of(day):
        return dg.SkipReason(f"{workflow.name}: the deadline of {day} has not come")
    try:
        decided = lake.read(workflow.table("batches"), days=[day], columns=["batch_id"]).num_rows > 0
    except TableMissing:
        decided = False
    if decided:
        return dg.SkipReason(f"{workflow.name}: {day} is decided")
    return dg.RunRequest(
        run_key=f"{workflow.name}:deadline:{day}",
        partition_key=day.isoformat(),
        tags={"signalbox/cause": f"the deadline of {day} came and no batch stood"},
    )


def delivery_requests(workflow: Workflow, book: Ledger, now: datetime) -> list[dg.RunRequest]:
    """Pushes of batches that may go now and are not at their end; a held one once its approvals stand."""
    requests = []
    condemned = {batch_id for batch_id, _ in delivering.condemned(book, workflow)}
    condemned |= {batch_id for one in guarding.condemned(book, workflow) for batch_id in one.batches}
    for batch in delivering.open_batches(book, workflow, now):
        if batch.batch_id in condemned:
            continue  # a guard wants it back
        attempt = delivering.pushes(book, batch)
        requests.append(
            dg.RunRequest(
                run_key=f"{batch.batch_id}:push:{attempt}:{_slot(now)}",
                partition_key=batch.day.isoformat(),
                tags={"signalbox/cause": f"batch {batch.batch_id} is {batch.status}, push {attempt + 1}"},
            )
        )
    return requests


def _slot(now: datetime) -> str:
    """Stands in the key of what is tried again until it is done: a run key is remembered for ever, whatever became of the run."""
    return f"{now:%Y-%m-%dT%H}:{now.minute // RETRY_MINUTES * RETRY_MINUTES:02d}"


def guard_requests(workflow: Workflow, book: Ledger, now: datetime) -> list[dg.RunRequest]:
    """Rollbacks of batches over which a deterministic guard has spoken, and of what stands under a verdict ROLLBACK,
    unless they are taken back already.
    """
    asked: list[tuple[str, dict[str, Any], str]] = [
        (f"{batch_id}:guard", {"batch": batch_id}, reason) for batch_id, reason in delivering.condemned(book, workflow)
    ]
    for one in guarding.condemned(book, workflow):
        # The verdict stands in the key: the same version let act anew and condemned anew is another rollback.
        key = f"{workflow.name}:{one.comparison.replace(' ', '-')}:{one.version or 'rule'}:verdict-{one.attempt}"
        which = {"since": one.since.isoformat()} if one.version is None else {"model": one.version}
        asked.append((key, which, one.reason))
    op = f"{workflow.name}_take_back"
    return [
        dg.RunRequest(
            run_key=f"{key}:{_slot(now)}",
            run_config={"ops": {op: {"config": {**which, "reason": reason, "actor": "guard", "trigger": "guard"}}}},
            tags={"signalbox/cause": reason[:250]},
        )
        for key, which, reason in asked
    ]


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
        finally:
            book.close()
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
    said = promoting.pending(registry, book, workflow.name)
    if not said:
        return []
    # what has been answered since stands in the key: the same alias may be moved again to where it was put back from
    answered = [len(book.promotions(workflow.name)), len(book.events(promoting.REQUEST, workflow.name)), said]
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
        except promoting.unreachable() as error:
            said = f"{type(error).__name__}: {promoting.first_line(error)}"
            return dg.SkipReason(f"MLflow does not answer, nothing is changed and the day goes by the ledger: {said}")
        return requests or dg.SkipReason("the aliases stand where the ledger says")

    return asked


def _landing_sensor(workflow: Workflow) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{workflow.name}_landing",
        job_name=f"{workflow.name}_daily",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="A new file in the landing zone starts its day, once the day's cut-off has passed.",
    )
    def landed(context: dg.SensorEvaluationContext, landing: LandingResource, clock: ClockResource) -> dg.SensorResult:
        seen = json.loads(context.cursor) if context.cursor else {}
        requests, after = landing_requests(workflow, landing.of(workflow.name), seen, clock.now())
        if not requests:
            return dg.SensorResult(skip_reason="no new file whose day's cut-off has passed", cursor=json.dumps(after))
        return dg.SensorResult(run_requests=requests, cursor=json.dumps(after))

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


def _deadline_schedule(workflow: Workflow) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"{workflow.name}_deadline",
        job_name=f"{workflow.name}_decide",
        cron_schedule=f"{workflow.deadline.minute} {workflow.deadline.hour} * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="At the deadline an undecided day is decided with what is there.",
    )
    def deadline(context: dg.ScheduleEvaluationContext, lake: LakeResource) -> Any:
        at = context.scheduled_execution_time.astimezone(UTC).replace(tzinfo=None)
        return deadline_request(workflow, lake.lake, at)

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


def unattended(workflows: Sequence[Workflow]) -> list[Unattended]:
    """The whole list. What is not in it does not exist: ``definitions`` takes its sensors and schedules from here only."""
    found = []
    for workflow in workflows:
        name = workflow.name
        found += [
            Unattended(
                f"{name}_landing", f"{name}_daily", "a new file, after its day's cut-off", _landing_sensor(workflow)
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
                    "a guard has spoken, or a verdict is ROLLBACK",
                    _guard_sensor(workflow),
                ),
            ]
    return found
