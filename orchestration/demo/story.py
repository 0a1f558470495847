"""``signalbox demo``: both workflows over generated days, as a data team would live them, with a closing summary.

Belongs here: the story (which days, what goes wrong when, what people do). Does not: the worlds and the systems before them
(``delivery.sandbox``), the runs (``orchestration.runner``), or what the decisions earned (``orchestration.demo.scorecard``).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv
from rich.console import Console
from rich.table import Table

from assets.resources import resources
from delivery import approvals
from delivery.ledger import Ledger
from delivery.sandbox import systems
from delivery.sandbox.worlds import advertising
from models import catalog, serving
from models.registry import CHAMPION, Registry
from orchestration import automation, runner
from orchestration.cli import sandbox
from orchestration.demo import scorecard
from pipeline import dispatch, ingest
from pipeline.decisions import scoring, tables
from pipeline.lake import Lake
from pipeline.lifecycle import promotion
from pipeline.lifecycle import state as lifecycle
from pipeline.settings import home
from pipeline.workflow import FOLDER, Workflow, load

SEED = 7
HISTORY_DAYS = 35
FIRST_MODEL_DAYS_AGO = 3
APPROVER, PERSON = "robin", "pat"


@dataclass(frozen=True)
class Script:
    """What happens on which live day (from 0), by workflow; nothing where a day is not given."""

    days: int
    lines: int = 360
    teams: int = 4
    """Few: the help desk loads every open ticket for each request, so that twice the tickets cost four times the seconds."""
    breaks: Mapping[str, int] = field(default_factory=dict)
    """Upstream breaks its schema."""
    drifts: Mapping[str, int] = field(default_factory=dict)
    """The world changes."""
    retrains: Mapping[str, int] = field(default_factory=dict)
    """The sensor that retrains is turned on; not given: on the first day. What a harmful version does to budgets is drift, too."""
    people: Mapping[str, int] = field(default_factory=dict)
    """People change some of what is about to be sent."""
    poison: Mapping[str, int] = field(default_factory=dict)
    """Somebody moves the alias to a model with its slopes turned around, which its gate can see."""
    restated: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """A backfill of upstream loses what exploring drew, in every file; and it is put right again."""
    harm: Mapping[str, int] = field(default_factory=dict)
    """Somebody moves the alias to such a model while the log is lost: its gate cannot measure what the policy would earn, lets
    it pass, and it harms live."""


STORY = Script(
    days=14,
    breaks={"ad_budget": 3, "ticket_priority": 1},
    drifts={"ad_budget": 9, "ticket_priority": 3},
    retrains={"ad_budget": 10},
    people={"ad_budget": 1, "ticket_priority": 2},
    poison={"ad_budget": 0},
    restated={"ad_budget": (1, 6)},
    harm={"ad_budget": 2},
)


@dataclass
class Story:
    """What happened, for the closing summary."""

    events: list[tuple[date, str, str]] = field(default_factory=list)

    def tell(self, day: date, workflow: str, what: str) -> None:
        """Remember an event."""
        self.events.append((day, workflow, what))


def at(day: date, clock: str) -> str:
    """A time of the day after ``day``, when ``day`` is decided."""
    return f"{day + timedelta(days=1)}T{clock}:00"


def stamp(path: Path, day: date) -> None:
    """Give a day's export the time at which it would have come."""
    exported_at = datetime.fromisoformat(at(day, "01:30") + "+00:00").timestamp()
    os.utime(path, (exported_at, exported_at))


def _failed_checks(result: dg.ExecuteInProcessResult) -> list[str]:
    return [f"{r['asset']} {r['check']}: {r['says']}" for r in runner.check_rows(result) if r["result"] == "ERROR"]


@dataclass
class Company:
    """Everything that a morning of a workflow needs."""

    console: Console
    workflows: dict[str, Workflow]
    both: systems.Systems
    lake: Lake
    registry: Registry
    instance: dg.DagsterInstance
    script: Script
    story: Story
    secret: str
    moment: list[str]
    """The time in the story, for the downstream systems' own clock."""
    sent: dict[Path, bytes] = field(default_factory=dict)
    """Files as they were before a backfill lost a part of them."""

    @contextmanager
    def ledger(self, moment: str) -> Iterator[Ledger]:
        """The ledger at a moment of the story."""
        book = resources()["ledger"].open(lambda: datetime.fromisoformat(moment))
        try:
            yield book
        finally:
            book.close()

    def run(self, workflow: Workflow, job: str, day: date, clock: str, cause: str) -> dg.ExecuteInProcessResult:
        """A run of a job, as a sensor or a person would start it."""
        self.moment[0] = at(day, clock)
        return runner.run(
            workflow, job, day, day, now=at(day, clock), instance=self.instance, tags={"signalbox/cause": cause[:250]}
        )

    # --- the world, and people in it

    def happen(self, workflow: Workflow, day: date, broken: bool) -> None:
        """The day passes downstream under the values that stand there; its export lands."""
        if workflow.name == "ad_budget":
            with self.ledger(at(day, "01:00")) as book:
                drawn = dispatch.randomised(book, workflow.name, day - timedelta(days=1))
            self.both.ads.advance(None, multipliers=drawn)
        else:
            self.both.desk.advance(home() / "landing" / workflow.name, break_schema=broken)
        self.export(workflow, day, broken)

    def export(self, workflow: Workflow, day: date, broken: bool) -> None:
        """Upstream drops a day's export, in its schema or in a broken one."""
        ingest = home() / "landing" / workflow.name
        if workflow.name == "ad_budget":
            rows = self.both.ads.rows(day)
            path = advertising.export_day(rows, ingest / "export", day, break_schema=broken)
        else:
            path = Path(self.both.desk.export(ingest, break_schema=broken)["export"])
        stamp(path, day)

    def people(self, workflow: Workflow, day: date) -> None:
        """Somebody changes three of the values that are about to be changed."""
        self.moment[0] = at(day, "06:30")
        rows = self.lake.read(workflow.table("decisions"), days=[day])
        changed = tables.largest_changes(rows.filter(pc.field("changed")), 3).to_pylist()
        for row in changed:
            if workflow.name == "ad_budget":
                self.both.ads.by_hand(row["entity_id"], row["before"] + 50_000_000, f"{PERSON}@example.org")
            else:
                self.both.desk.person(row["entity_id"], priority=3 if row["before"] != 3 else 4)
        names = ", ".join(r["entity_id"] for r in changed)
        self.story.tell(day, workflow.name, f"{PERSON} changed {names} by hand at 06:30, after the batch was decided")

    # --- a morning

    def morning(self, workflow: Workflow, day: date, number: int) -> str:
        """One morning of a workflow; returns what to print."""
        name, script = workflow.name, self.script
        broken = script.breaks.get(name) == number
        self.happen(workflow, day, broken)
        if script.poison.get(name) == number:
            self.promote_by_hand(workflow, day)
        if number in script.restated.get(name, ()):
            first = number == script.restated[name][0]
            self.restate(workflow, day, lost=first)
        if script.harm.get(name) == number:
            self.promote_by_hand(workflow, day)
        self.answer(workflow, day)
        result = self.run(workflow, "daily", day, "04:00", "new file in the landing zone")
        if not result.success or _failed_checks(result):
            reasons = _failed_checks(result) or list(runner.failed_steps(result))
            self.story.tell(day, name, f"checks spoke: {reasons[0][:160]}")
        self.moved(workflow, day)
        self.deadline(workflow, day)
        if broken:
            self.export(workflow, day, False)
            again = self.run(workflow, "prepare", day, "10:00", "repaired file")
            what = "landed" if again.success else "still refused"
            self.story.tell(day, name, f"upstream sent a repaired file at 10:00: {what}")
        self.guard(workflow, day)
        if self.lake.read(workflow.table("batches"), days=[day]).num_rows:
            if script.people.get(name) == number:
                self.people(workflow, day)
            self.send(workflow, day)
        if number >= script.retrains.get(name, 0):
            self.retrain(workflow, day)
        return self.batch_line(workflow, day)

    def answer(self, workflow: Workflow, day: date) -> None:
        """The run that the registry sensor would start where somebody moved an alias."""
        now = datetime.fromisoformat(at(day, "03:30"))
        with self.ledger(at(day, "03:30")) as book:
            requests = automation.registry_requests(workflow, self.registry, book, now)
        for request in requests:
            runner.run_op(workflow, "reconcile", request, now=at(day, "03:30"), instance=self.instance)
            with self.ledger(at(day, "03:30")) as book:
                for event in book.events(promotion.REQUEST, workflow.name):
                    if event.at >= now - timedelta(minutes=1):
                        body = event.body
                        self.story.tell(
                            day, workflow.name,
                            f"registry sensor: {body['alias']} → version {body['to']}: {body['answer'].upper()}; {_why(body['reason'])}",
                        )  # fmt: skip

    def moved(self, workflow: Workflow, day: date) -> None:
        """Steps of a version's life that the daily run took."""
        with self.ledger(at(day, "09:00")) as book:
            for one in book.promotions(workflow.name):
                if one.at >= datetime.fromisoformat(at(day, "03:45")) and one.action in ("canary", "promoted"):
                    self.story.tell(
                        day, workflow.name, f"version {one.version} {one.action}: its days in shadow are over"
                    )

    def guard(self, workflow: Workflow, day: date) -> None:
        """The rollbacks that the guard's sensor would start."""
        now = at(day, "06:30")
        with self.ledger(now) as book:
            requests = automation.guard_requests(workflow, book, datetime.fromisoformat(now))
        for request in requests:
            self.moment[0] = now
            done = runner.run_op(workflow, "rollback", request, now=now, instance=self.instance)
            with self.ledger(now) as book:
                state = lifecycle.live(book, workflow)
            outcome = "complete" if done.success else "NOT complete"
            report = _report(done)
            self.story.tell(
                day, workflow.name,
                f"guard: {request.tags['signalbox/cause'][:160]} → rolled back by itself, {outcome}: {report}; champion is version "
                f"{state['champion'] or '–'} again",
            )  # fmt: skip

    def deadline(self, workflow: Workflow, day: date) -> None:
        """At 06:05 an undecided day is decided with what is there."""
        due = datetime.fromisoformat(at(day, "06:05"))
        with self.ledger(at(day, "06:05")) as book:
            request = automation.deadline_request(workflow, self.lake, due, book)
        if not isinstance(request, dg.RunRequest):
            return
        self.run(workflow, "decide", day, "06:05", request.tags["signalbox/cause"])
        batch = self.lake.read(workflow.table("batches"), days=[day]).to_pylist()[0]
        why = "; ".join(batch["reasons"])[:120]
        self.story.tell(day, workflow.name, f"deadline came undecided: step '{batch['step']}' ({why})")

    def send(self, workflow: Workflow, day: date) -> None:
        """The push that the sensor would start; a held batch waits until a person has looked at it."""
        with self.ledger(at(day, "07:00")) as book:
            batch = dispatch.batch_of(book, workflow.name, day)
            if batch.status == "HELD":
                self.run(workflow, "deliver", day, "06:45", "batch decided")
                assert not any(d.attempts for d in book.deliveries(batch.batch_id)), "a held batch was sent"
                found = "; ".join(f"{f['name']} {f['observed']:.3g}, allowed {f['limit']}" for f in batch.findings)
                reason = "first days of a new policy, the totals are as planned"
                approvals.approve(book, batch.batch_id, APPROVER, self.secret, reason)
                self.story.tell(
                    day, workflow.name, f"batch HELD ({found[:110]}); {APPROVER} looked at it and approved it"
                )
        result = self.run(workflow, "deliver", day, "07:00", "a batch may go")
        with self.ledger(at(day, "07:30")) as book:
            row = book.batch(batch.batch_id)
            left = [d for d in book.deliveries(batch.batch_id) if d.state not in ("ACKED", "SKIPPED")]
        if left:
            what = ", ".join(f"{d.entity} {d.state}" for d in left[:4])
            self.story.tell(day, workflow.name, f"{len(left)} of {row.changed} not as intended: {what}")
        if not result.success or row.delivery != "COMPLETE":
            problems = list(runner.failed_steps(result)) or _failed_checks(result)
            self.story.tell(day, workflow.name, f"delivery is not complete: {'; '.join(problems)[:200]}")
        self.guard(workflow, day)

    def retrain(self, workflow: Workflow, day: date) -> None:
        """The retraining that the drift sensor would start."""
        now, runs = datetime.fromisoformat(at(day, "05:00")), automation.training_runs(self.instance, workflow)
        with self.ledger(at(day, "05:00")) as book:
            request = automation.retrain_request(workflow, self.lake, book, now, runs)
        if not isinstance(request, dg.RunRequest):
            return
        cause = request.tags["signalbox/cause"]
        result = self.run(workflow, "retrain", day, "05:00", cause)
        verdicts = [r["says"] for r in runner.check_rows(result) if r["check"] == "gate"]
        verdict = verdicts[0] if verdicts else "; ".join(runner.failed_steps(result))
        self.story.tell(day, workflow.name, f"{cause[:110]} → retrained; gate: {verdict[:110]}")

    def batch_line(self, workflow: Workflow, day: date) -> str:
        """The day's batch in one line."""
        with self.ledger(at(day, "09:00")) as book:
            try:
                batch = dispatch.batch_of(book, workflow.name, day)
            except dispatch.NothingToDeliver:
                return "no batch"
        states = ", ".join(f"{n} {state}" for state, n in sorted(batch.counts.items()))
        return f"{batch.step}, {batch.status}, {batch.changed} of {batch.rows} changed: {states or 'nothing to send'}"

    # --- harm

    def promote_by_hand(self, workflow: Workflow, day: date) -> None:
        """Somebody turns the slopes around in a copy of the champion's files, registers it and moves the alias in MLflow."""
        champion = self.registry.by_alias(workflow.name, CHAMPION)
        assert champion is not None, "the demo trained one"
        files = dict(self.registry.load(champion))
        meta = json.loads(files["meta.json"])
        rows = self.lake.read(workflow.table("features"), days=[day - timedelta(days=1)])
        _turn_around(meta["elasticities"], rows, scoring.read_model(workflow, self.registry, champion).score(rows))
        files["meta.json"] = json.dumps(meta, sort_keys=True, ensure_ascii=False).encode()
        made = self.registry.register(
            workflow.name, files, trained_day=day - timedelta(days=1), passed=False, params={"recipe": "{}"}, metrics={}, tags={},
            plots={}, card=f"Edited by hand from version {champion.number}. Not judged by the gate.", seed=0,
            served=serving.describe(workflow.model.kind, catalog.learner(workflow.model.kind).from_files(files), rows),
        )  # fmt: skip
        self.registry.client.set_registered_model_alias(workflow.name, CHAMPION, str(made.number))
        event = f"somebody moved the alias champion to version {made.number}, a copy of {champion.number} with its slopes turned around"
        self.story.tell(day, workflow.name, event)

    def restate(self, workflow: Workflow, day: date, *, lost: bool) -> None:
        """Upstream sends every file again: without what exploring drew, or as it was."""
        folder = home() / "landing" / workflow.name / "export"
        for file in sorted(folder.glob("advertising_*.csv.gz")) if lost else sorted(self.sent):
            if lost:
                self.sent[file] = file.read_bytes()
                table = csv.read_csv(pa.BufferReader(gzip.decompress(self.sent[file])), convert_options=_AS_TEXT)
                for name, text in (("explore_multiplier", "1"), ("explore_probability", "")):
                    where = table.schema.get_field_index(name)
                    table = table.set_column(where, name, pa.array([text] * table.num_rows))
                out = io.BytesIO()
                csv.write_csv(table, out, csv.WriteOptions(quoting_style="needed"))
                file.write_bytes(gzip.compress(out.getvalue(), mtime=0))
            else:
                file.write_bytes(self.sent[file])
        ingest.ingest(workflow, self.lake, home() / "landing", now=datetime.fromisoformat(at(day, "02:30")))
        how = "without the log of what exploring drew" if lost else "with the log of what exploring drew again"
        self.story.tell(day, workflow.name, f"upstream sent {len(self.sent)} files again, {how}")


_LINES = ("lines", "line_mean", "line_sd")
_AS_TEXT = csv.ConvertOptions(column_types={f.name: pa.string() for f in advertising.ROWS}, strings_can_be_null=False)


def _turn_around(slopes: dict[str, Any], rows: pa.Table, scores: pa.Table) -> None:
    """What earns most at the margin is said to earn least, and the other way round; the levels stay as they are."""
    spend = rows["budget_micros"].to_numpy() / 1e6
    level, slope = scores["level"].to_numpy(), scores["elasticity"].to_numpy()
    marginal = np.divide(level * slope, spend, out=np.zeros(len(spend)), where=spend > 0)
    turned = np.sort(marginal)[::-1][np.argsort(np.argsort(marginal, kind="stable"), kind="stable")]
    wrong = np.clip(np.divide(turned * spend, level, out=np.zeros(len(spend)), where=level > 0), 0.01, 0.99)
    known = {line: (m, sd) for line, m, sd in zip(*(slopes[k] for k in _LINES), strict=True)}
    known |= {line: (float(e), 0.05) for line, e in zip(scores["entity_id"].to_pylist(), wrong, strict=True)}
    for k, values in zip(_LINES, zip(*((n, m, sd) for n, (m, sd) in sorted(known.items())), strict=True), strict=True):
        slopes[k] = list(values)


def _why(reason: str) -> str:
    """Of a gate's reasons the one that refused, else what it could not measure, else the first."""
    clauses = reason.removeprefix("refused by its gate: ").split("; ")
    spoke = [c for c in clauses if "worse by more than" in c and "not worse" not in c and not c.startswith("none of")]
    return (spoke or [c for c in clauses if "not measured" in c] or clauses)[0][:220]


def _report(done: dg.ExecuteInProcessResult) -> str:
    """What a rollback's run came to, in a clause."""
    for event in done.filter_events(lambda e: e.is_successful_output):
        output: Any = event.event_specific_data
        report = output.metadata.get("report")
        if report is not None:
            batches = report.value["batches"]
            restored, unsent = (sum(b[k] for b in batches) for k in ("restored", "never_sent"))
            return f"{len(batches)} batches, {restored} values restored and read back, {unsent} not sent any more"
    return "; ".join(runner.failed_steps(done))[:200]


def tell(console: Console, script: Script = STORY) -> dict[str, Any]:
    """Generate, ingest, train, live the script's days with decisions that act, and sum up. A state folder that holds days is
    refused.
    """
    began = time.monotonic()
    state = runner.prepare_home()
    if any((state / "lake").iterdir()):
        console.print(
            f"[yellow]{state} already holds days.[/yellow] Look at them with make serve, or start over with make clean demo."
        )
        raise SystemExit(1)
    workflows = {w.name: w for w in (load(FOLDER / n) for n in ("ad_budget", "ticket_priority"))}
    start = min(w.start for w in workflows.values())
    opened = start + timedelta(days=HISTORY_DAYS)
    drifts = {name: opened + timedelta(days=number) for name, number in script.drifts.items()}
    setup = systems.Setup(
        SEED, start, HISTORY_DAYS, lines=script.lines, teams=script.teams, advertising_drift=drifts.get("ad_budget"),
        tickets_drift=drifts.get("ticket_priority"),
    )  # fmt: skip
    console.print(f"State: {state}")
    with console.status("Simulating both worlds up to today"):
        queue = systems.history(setup, state / "landing")
    last = opened - timedelta(days=1)
    given, moment = resources(), [at(last, "06:00")]
    clock = lambda: datetime.fromisoformat(moment[0])  # noqa: E731
    with (
        systems.Systems(sandbox.folder(), setup, ports=(0, 0), tickets_world=queue, clock=clock) as both,
        _environment(both.environment),
        dg.DagsterInstance.get() as instance,
    ):
        company = Company(
            console,
            workflows,
            both,
            given["lake"].lake,
            given["registry"].registry,
            instance,
            script,
            Story(),
            secrets.token_hex(12),
            moment,
        )
        with company.ledger(at(last, "05:00")) as book:
            approvals.enrol(book, APPROVER, company.secret)
        for workflow in workflows.values():
            _history(company, workflow, start, last)
        for number in range(script.days):
            day = opened + timedelta(days=number)
            for name, workflow in workflows.items():
                started = time.monotonic()
                with console.status(f"{day} {name}"):
                    line = company.morning(workflow, day, number)
                console.print(f"{day}  {name:<16} {line:<60} {time.monotonic() - started:4.1f} s", highlight=False)
        summary = _summary(company)
    console.print(f"Done in {time.monotonic() - began:.0f} s. Now: [bold]make serve[/bold]")
    return summary


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Addresses and tokens for the duration."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _history(company: Company, workflow: Workflow, start: date, last: date) -> None:
    for n in range(HISTORY_DAYS):
        day = start + timedelta(days=n)
        source = workflow.sources["export"].files.replace("{day}", day.isoformat())
        stamp(home() / "landing" / workflow.name / source, day)
    clock = time.monotonic()
    with company.console.status(f"{workflow.name}: {HISTORY_DAYS} days of history in one run"):
        result = runner.run(workflow, "prepare", start, last, now=at(last, "04:00"), instance=company.instance)
    _must(result, f"{workflow.name}: history")
    with company.console.status(f"{workflow.name}: first model"):
        # for some days ago, so that what happens in the first live days does not meet the cooldown
        day = last - timedelta(days=FIRST_MODEL_DAYS_AGO)
        result = runner.run(workflow, "retrain", day, day, now=at(last, "05:00"), instance=company.instance)
    _must(result, f"{workflow.name}: first model")
    took = time.monotonic() - clock
    company.console.print(f"{workflow.name:<16} {HISTORY_DAYS} days of history and a first model in {took:.0f} s")


def _must(result: dg.ExecuteInProcessResult, what: str) -> None:
    if not result.success:
        raise SystemExit(f"{what} failed: {'; '.join(runner.failed_steps(result))}")


def _summary(company: Company) -> dict[str, Any]:
    console, lake = company.console, company.lake
    table = Table(title="What happened", title_justify="left")
    for column in ("day", "workflow", "event"):
        table.add_column(column, overflow="fold")
    for day, name, what in sorted(company.story.events, key=lambda e: (e[0], e[1])):
        table.add_row(str(day), name, what)
    console.print(table)
    with company.ledger(at(company.both.setup.opened + timedelta(days=company.script.days), "09:00")) as book:
        for name, workflow in company.workflows.items():
            champion = company.registry.by_alias(name, CHAMPION)
            counts: dict[str, int] = {}
            for batch in book.batches(name):
                for state, n in batch.counts.items():
                    counts[state] = counts.get(state, 0) + n
            events = lake.read(workflow.table("events"), columns=["day"]).num_rows
            quarantined = (
                lake.read(workflow.table("quarantine"), columns=["rule"])
                if lake.exists(workflow.table("quarantine"))
                else pa.table({"rule": []})
            )
            console.print(
                f"\n[bold]{name}[/bold]: champion is version {champion.number if champion else '–'}; {events} events, "
                f"{quarantined.num_rows} rows in quarantine; deliveries: {', '.join(f'{n} {s}' for s, n in sorted(counts.items()))}",
                highlight=False,
            )
        verdict = book.verify()
        head = verdict.head
    worth = scorecard.show(console, company.both, lake, company.workflows)
    console.print(
        f"\nThe ledger {'verifies' if verdict.ok else 'DOES NOT VERIFY'}: {verdict.events} events, {verdict.batches} batches, head {head.hash[:16]}…"
    )
    if not verdict.ok:
        raise SystemExit("\n".join(verdict.problems[:20]))
    events = [{"day": day, "workflow": name, "event": what} for day, name, what in company.story.events]
    return {"events": events, "earned": worth, "ledger": {"events": verdict.events, "head": head.hash}}
