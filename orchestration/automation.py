"""Everything that can start a run unattended, declared in one place and off until somebody turns it on.

Belongs here: sensors and schedules. Does not: computing anything; a sensor reads what an asset stored.
"""

import fnmatch
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg

from assets import delivering
from assets import landing as landing_zone
from assets.lake import Lake, TableMissing
from assets.resources import ClockResource, LakeResource, LandingResource, LedgerResource
from assets.workflow import Source, Workflow
from delivery.ledger import Ledger

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


def retrain_request(workflow: Workflow, lake: Lake) -> dg.RunRequest | dg.SkipReason:
    """A retraining for the newest day found drifted, unless one was trained within the cooldown."""
    try:
        rows = (
            lake.read(workflow.table("drift"), columns=["day", "drifted", "text"])
            .sort_by([("day", "descending")])
            .to_pylist()
        )
    except TableMissing:
        return dg.SkipReason(f"{workflow.name}: no drift has been measured yet")
    drifted = next((r for r in rows if r["drifted"]), None)
    if drifted is None:
        return dg.SkipReason(f"{workflow.name}: no day has drifted")
    try:
        trained = max(lake.read(workflow.table("training_set"), columns=["as_of"])["as_of"].to_pylist(), default=None)
    except TableMissing:
        trained = None
    day, cooldown = drifted["day"], workflow.retraining.cooldown_days
    if trained is not None and (day - trained).days < cooldown:
        return dg.SkipReason(
            f"{workflow.name}: drift on {day}, but a model was trained for {trained}: cooldown is {cooldown} days"
        )
    # The window stands in the key: the same drift starts one retraining, a later one starts another.
    return dg.RunRequest(
        run_key=f"{workflow.name}:drift:{day}",
        partition_key=day.isoformat(),
        tags={"signalbox/cause": f"drift on {day}: {drifted['text']}"[:250]},
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
    """Rollbacks of batches over which a deterministic guard has spoken, unless they are taken back already."""
    op = f"{workflow.name}_take_back"
    return [
        dg.RunRequest(
            run_key=f"{batch_id}:guard:{_slot(now)}",
            run_config={
                "ops": {op: {"config": {"batch": batch_id, "reason": reason, "actor": "guard", "trigger": "guard"}}}
            },
            tags={"signalbox/cause": reason[:250]},
        )
        for batch_id, reason in delivering.condemned(book, workflow)
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
        description="A guard over rejections, overrides or spend has spoken: the batch is taken back.",
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
        description="A day whose features drifted starts a retraining, at most one within the cooldown.",
    )
    def drifted(context: dg.SensorEvaluationContext, lake: LakeResource) -> Any:
        return retrain_request(workflow, lake.lake)

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
        description="A candidate every Monday, whatever drift says.",
    )
    def weekly(context: dg.ScheduleEvaluationContext) -> Any:
        day = context.scheduled_execution_time.astimezone(UTC).date() - timedelta(days=1)
        if day < workflow.start:
            return dg.SkipReason(f"{workflow.name}: starts on {workflow.start}")
        return dg.RunRequest(run_key=f"{workflow.name}:weekly:{day}", partition_key=day.isoformat())

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
                f"{name}_retrain_on_drift", f"{name}_retrain", "drift, outside the cooldown", _drift_sensor(workflow)
            ),
            Unattended(
                f"{name}_deadline",
                f"{name}_decide",
                f"{workflow.deadline:%H:%M} UTC, undecided",
                _deadline_schedule(workflow),
            ),
            Unattended(f"{name}_weekly_retrain", f"{name}_retrain", "Mondays 08:00 UTC", _weekly_schedule(workflow)),
        ]
        if workflow.delivery is not None:
            found += [
                Unattended(f"{name}_push", f"{name}_deliver", "a batch that may go", _delivery_sensor(workflow)),
                Unattended(f"{name}_guard", f"{name}_rollback", "a guard has spoken", _guard_sensor(workflow)),
            ]
    return found
