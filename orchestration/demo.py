"""``signalbox demo``: both workflows over generated days, as a data team would live them, with a closing summary.

Belongs here: the story (which days, what goes wrong when). Does not: the worlds (``delivery.sandbox.worlds``) or the runs
(``orchestration.runner``). Nothing is acted on yet: the worlds go on under their incumbents.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from assets import deciding
from assets.resources import home, resources
from assets.workflow import FOLDER, Workflow, load
from delivery.sandbox.worlds import advertising, tickets
from models.registry import CHAMPION
from orchestration import automation, runner

SEED = 7
HISTORY_DAYS = 35
LIVE_DAYS = 10
BREAK_ON = {"ad_budget": 2, "ticket_priority": 1}
"""The live day (from 0) on which upstream breaks its schema."""
DRIFT_ON = {"ad_budget": 3, "ticket_priority": 3}
"""The live day (from 0) on which the world changes."""


@dataclass
class Story:
    """What happened, for the closing summary."""

    events: list[tuple[date, str, str]] = field(default_factory=list)
    durations: dict[str, float] = field(default_factory=dict)


def sources(start: date) -> dict[str, Callable[[date, Path, bool], Path]]:
    """For each workflow: write the export of a day; days are asked for in order."""
    live = start + timedelta(days=HISTORY_DAYS)
    ads = advertising.World(SEED, "easy", 120, origin=start, drift_on=live + timedelta(days=DRIFT_ON["ad_budget"]))
    ad_rows = advertising.history(ads, start, HISTORY_DAYS + LIVE_DAYS)
    queue = tickets.World(
        SEED,
        load=0.9,
        teams=12,
        drift=tickets.Drift(live + timedelta(days=DRIFT_ON["ticket_priority"]), "new_category", size=1.0),
    )
    ticket_days = {
        start + timedelta(days=n): queue.step(start + timedelta(days=n)) for n in range(HISTORY_DAYS + LIVE_DAYS)
    }

    def export_ads(day: date, folder: Path, broken: bool) -> Path:
        return advertising.export_day(ad_rows, folder, day, break_schema=broken)

    def export_tickets(day: date, folder: Path, broken: bool) -> Path:
        return tickets.export_day(ticket_days[day], folder, day, break_schema=broken)

    return {"ad_budget": export_ads, "ticket_priority": export_tickets}


def at(day: date, clock: str) -> str:
    """A time of the day after ``day``, when ``day`` is decided."""
    return f"{day + timedelta(days=1)}T{clock}:00"


def land(workflow: Workflow, export: Callable[[date, Path, bool], Path], day: date, broken: bool = False) -> Path:
    """Let upstream drop a day's export, stamped with the time at which it would have come."""
    folder = home() / "landing" / workflow.name / Path(workflow.sources["export"].files).parent
    path = export(day, folder, broken)
    came = datetime.fromisoformat(at(day, "01:30") + "+00:00").timestamp()
    os.utime(path, (came, came))
    return path


def _failed_checks(result: dg.ExecuteInProcessResult) -> list[str]:
    return [f"{r['asset']} {r['check']}: {r['says']}" for r in runner.check_rows(result) if r["result"] == "ERROR"]


def _live_day(
    workflow: Workflow, day: date, number: int, export: Any, instance: dg.DagsterInstance, story: Story, lake: Any
) -> str:
    """One morning of a workflow; returns what to print."""
    broken = BREAK_ON.get(workflow.name) == number
    land(workflow, export, day, broken)
    now = at(day, "04:00")
    result = runner.run(
        workflow,
        "daily",
        day,
        day,
        now=now,
        instance=instance,
        tags={"signalbox/cause": "new file in the landing zone"},
    )
    said = ""
    if not result.success or _failed_checks(result):
        reasons = _failed_checks(result) or list(runner.failed_steps(result))
        story.events.append((day, workflow.name, f"stopped before deciding: {reasons[0][:140]}"))
    due = datetime.fromisoformat(at(day, "06:05"))
    request = automation.deadline_request(workflow, lake, due)
    if isinstance(request, dg.RunRequest):
        runner.run(workflow, "decide", day, day, now=due.isoformat(), instance=instance, tags=dict(request.tags))
        batch = lake.read(workflow.table("batches"), days=[day]).to_pylist()[0]
        story.events.append(
            (
                day,
                workflow.name,
                f"deadline came undecided: step '{batch['step']}' ({'; '.join(batch['reasons'])[:120]})",
            )
        )
    if broken:
        land(workflow, export, day, False)
        again = runner.run(
            workflow,
            "prepare",
            day,
            day,
            now=at(day, "10:00"),
            instance=instance,
            tags={"signalbox/cause": "repaired file"},
        )
        story.events.append(
            (
                day,
                workflow.name,
                f"upstream sent a repaired file at 10:00: {'landed' if again.success else 'still refused'}",
            )
        )
    request = automation.retrain_request(workflow, lake)
    if isinstance(request, dg.RunRequest):
        retrained = runner.run(
            workflow, "retrain", day, day, now=at(day, "05:00"), instance=instance, tags=dict(request.tags)
        )
        verdict = next(
            (r["says"] for r in runner.check_rows(retrained) if r["check"] == "gate"),
            "; ".join(runner.failed_steps(retrained)),
        )
        story.events.append(
            (day, workflow.name, f"{request.tags['signalbox/cause'][:110]} → retrained; gate: {verdict[:110]}")
        )
    batch = lake.read(workflow.table("batches"), days=[day]).to_pylist()
    if batch:
        said = f"{batch[0]['step']}, {batch[0]['status']}, {batch[0]['changed']} of {batch[0]['rows']} changed"
    return said


def tell(console: Console) -> None:
    """Generate, ingest, train, decide a week day by day, and sum up. A state folder that holds days already is refused."""
    began = time.monotonic()
    state = runner.prepare_home()
    if any((state / "lake").iterdir()):
        console.print(
            f"[yellow]{state} already holds days.[/yellow] Look at them with make serve, or start over with make clean demo."
        )
        raise SystemExit(1)
    workflows = {w.name: w for w in (load(FOLDER / n) for n in ("ad_budget", "ticket_priority"))}
    start = min(w.start for w in workflows.values())
    given = resources()
    lake, story = given["lake"].lake, Story()
    console.print(f"State: {state}")
    with console.status("Simulating both worlds"):
        exports = sources(start)
    last = start + timedelta(days=HISTORY_DAYS - 1)
    with dg.DagsterInstance.get() as instance:
        for name, workflow in workflows.items():
            for n in range(HISTORY_DAYS):
                land(workflow, exports[name], start + timedelta(days=n))
            clock = time.monotonic()
            with console.status(f"{name}: {HISTORY_DAYS} days of history in one run"):
                result = runner.run(workflow, "prepare", start, last, now=at(last, "04:00"), instance=instance)
            _must(result, f"{name}: history")
            with console.status(f"{name}: first model"):
                result = runner.run(workflow, "retrain", last, last, now=at(last, "05:00"), instance=instance)
            _must(result, f"{name}: first model")
            console.print(
                f"{name:<16} {HISTORY_DAYS} days of history and a first model in {time.monotonic() - clock:.0f} s"
            )
        for number in range(LIVE_DAYS):
            day = last + timedelta(days=1 + number)
            for name, workflow in workflows.items():
                clock = time.monotonic()
                with console.status(f"{day} {name}"):
                    said = _live_day(workflow, day, number, exports[name], instance, story, lake)
                console.print(f"{day}  {name:<16} {said:<55} {time.monotonic() - clock:4.1f} s")
    _summary(console, workflows, story, lake, given["registry"].registry)
    console.print(f"Told in {time.monotonic() - began:.0f} s. Now: [bold]make serve[/bold]")


def _must(result: dg.ExecuteInProcessResult, what: str) -> None:
    if not result.success:
        raise SystemExit(f"{what} failed: {'; '.join(runner.failed_steps(result))}")


def _summary(console: Console, workflows: dict[str, Workflow], story: Story, lake: Any, registry: Any) -> None:
    table = Table(title="What happened", title_justify="left")
    for column in ("day", "workflow", "event"):
        table.add_column(column, overflow="fold")
    for day, name, what in sorted(story.events, key=lambda e: (e[0], e[1])):
        table.add_row(str(day), name, what)
    console.print(table)
    for name, workflow in workflows.items():
        champion = registry.by_alias(name, CHAMPION)
        batch = lake.read(workflow.table("batches")).sort_by("day").to_pylist()[-1]
        decisions = lake.read(workflow.table("decisions"), days=[batch["day"]])
        largest = deciding.largest_changes(decisions, 3).to_pylist()
        quarantined = (
            lake.read(workflow.table("quarantine"), columns=["rule"])
            if lake.exists(workflow.table("quarantine"))
            else pa.table({"rule": []})
        )
        console.print(
            f"\n[bold]{name}[/bold]: champion is version {champion.number if champion else '–'}; "
            f"{lake.read(workflow.table('events'), columns=['day']).num_rows} events, {quarantined.num_rows} rows in quarantine; "
            f"batch {batch['batch_id']} ({batch['step']}, {batch['status']})"
        )
        for arm, certificate in sorted(json.loads(batch["certificates"]).items()):
            console.print(f"  arm {arm}: {json.dumps(certificate)[:200]}")
        for row in largest:
            console.print(f"  {row['entity_id']}: {row['before']} → {row['after']}. {' '.join(row['reasons'])}")
