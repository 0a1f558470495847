"""The commands of the operations owner: look at a batch, approve it, send it, stop it, take it back, ask why, verify.

Belongs here: reading arguments, asking for a secret at the prompt, printing. Does not: doing (``pipeline.dispatch``,
``delivery``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.clock import utc_now
from orchestration.cli.console import (
    ACT,
    KEEP,
    LOOK,
    RUN,
    As,
    Batch,
    Decision,
    Json,
    Reason,
    Workflow,
    a_day,
    every_workflow,
    ledger,
    moment_of,
    told,
    who,
    workflow_named,
    workflow_of,
)

if TYPE_CHECKING:
    from delivery.ledger import Ledger

Approver = Annotated[str, typer.Argument(help="The approver's name")]


def register(app: typer.Typer) -> None:
    """Add these commands to the ``signalbox`` command."""
    app.command(rich_help_panel=LOOK)(status)
    app.command(rich_help_panel=LOOK)(show)
    app.command(rich_help_panel=RUN)(deliver)
    app.command(rich_help_panel=ACT)(approve)
    app.command(rich_help_panel=ACT)(stop)
    app.command(rich_help_panel=ACT)(resume)
    app.command(rich_help_panel=ACT)(rollback)
    app.command(rich_help_panel=LOOK)(explain)
    app.command(rich_help_panel=KEEP)(verify)
    app.command(rich_help_panel=KEEP)(forget)
    app.command(rich_help_panel=KEEP)(retain)
    app.command(rich_help_panel=ACT)(lift)
    app.command(rich_help_panel=LOOK)(power)
    app.command(rich_help_panel=RUN)(remap)
    people = typer.Typer(no_args_is_help=True, help="Manage the people who may approve a held batch.")
    people.command("add")(add_approver)
    people.command("list")(list_approvers)
    people.command("rotate")(rotate_approver)
    people.command("revoke")(revoke_approver)
    app.add_typer(people, name="approvers", rich_help_panel=ACT)


def status(
    workflow: Annotated[str | None, typer.Argument(help="Only this workflow; default: all")] = None,
    at: Annotated[
        str | None, typer.Option("--now", help="Report as of this time (ISO 8601, UTC); default: now")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the health of each workflow: the live version, what is open and who must act, and the last 30 days.

    If a workflow has decided nothing for 30 days, it says so, and the figures are of the 30 days before that.
    """
    from pipeline.monitoring import loop_health

    moment = moment_of(at)
    chosen = [workflow_named(workflow)] if workflow else every_workflow()
    with ledger() as book:
        health = [loop_health.examine(book, one, until=moment) for one in chosen]
        head = book.head()
    document = {
        "at": moment.isoformat(), "ledger": {"seq": head.seq, "head": head.hash},
        "workflows": {one.workflow: one.as_dict() for one in health},
    }  # fmt: skip
    lines = [line for one in health for line in loop_health.lines(one)]
    told(document, as_json, [*lines, f"ledger: {head.seq} events, head {head.hash}"])


def show(
    batch: Annotated[
        str, typer.Argument(help="A batch (the beginning of its id is enough), or a workflow for its newest batch")
    ],
    day: Annotated[
        date | None, typer.Argument(parser=a_day, metavar="[DAY]", help="With a workflow: the batch of this day")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many of the largest changes")] = 10,
    as_json: Json = False,
) -> None:
    """Show one batch: sums by arm, largest changes, guardrail findings, approvals and delivery result."""
    from pipeline.decisions import batch_review

    with ledger() as book:
        named = _batch(book, batch, day)
        workflow = workflow_of(named)
        review = batch_review.review(book, workflow, named.batch_id, utc_now(), limit)
    entry = review.batch
    say = batch_review.teller(workflow)
    lines = [
        f"{entry.batch_id}: {entry.kind} of {entry.day}, {entry.status}, step {entry.step}, digest {entry.digest[:16]}…",
        f"  {entry.rows} decisions, {entry.changed} change something; delivery: {entry.delivery} {entry.counts or ''}",
        f"  {review.standing.text}",
    ]
    if review.stopped:
        lines.append(f"  {entry.workflow} is stopped by {review.stopped.actor}: {review.stopped.reason}")
    lines += [f"  {objection}" for objection in review.objections]
    for arm, total in review.totals.items():
        lines.append(
            f"  arm {arm}: {total['changed']} of {total['entities']} change, {say(total['before'])} → {say(total['after'])} "
            f"(up {say(total['up'])}, down {say(total['down'])})"
        )
    for row in review.largest:
        if row["before"] != row["after"]:
            other = f", there {say(row['stands'])}" if row["stands"] not in (None, row["after"]) else ""
            lines.append(
                f"  {row['entity_id']}: {say(row['before'])} → {say(row['after'])}{other}  {' '.join(row['reasons'])}"
            )
    for d in review.not_as_intended[:limit]:
        there_now = "not read" if d.stands is None else f"there {say(d.stands)}"
        lines.append(f"  {d.state} {d.entity}: {say(d.before)} → {say(d.after)}, {there_now}. {d.says or ''}".rstrip())
    if review.beside:
        lines.append(
            f"  watched fields of {len(review.beside)} changed with the value; a rollback does not restore them:"
        )
    lines += [f"    {d.entity}: {d.says}" for d in review.beside[:limit]]
    told(review.as_dict(), as_json, lines)


def _batch(book: Ledger, named: str, day: date | None) -> Any:
    """A batch by its id or what its id alone begins with, or the newest of a workflow (or the one of a day)."""
    from pipeline import dispatch
    from pipeline.workflow import FOLDER

    if not (FOLDER / named / "workflow.yaml").is_file():
        begins = [b for b in book.batches() if b.batch_id.startswith(named)]
        exact = [b for b in begins if b.batch_id == named]
        if len(begins) > 1 and not exact:
            some = ", ".join(b.batch_id for b in begins[:3])
            raise typer.BadParameter(f"{len(begins)} batches begin with {named!r}, such as {some}: write more of it")
        (only,) = exact or begins or [book.batch(named)]
        return only
    if day is not None:
        return dispatch.batch_of(book, named, day)
    rows = book.batches(named, kind="decision")
    if not rows:
        raise dispatch.NothingToDeliver(
            f"{named}: no batch stands in the ledger; decide a day first: signalbox run {named}"
        )
    return max(rows, key=lambda b: (b.day, b.sequence))


def deliver(
    batch: Annotated[str, typer.Argument(help="A batch's id, or a workflow's name for its newest batch")],
    day: Annotated[
        date | None,
        typer.Option(parser=a_day, metavar="YYYY-MM-DD", help="With a workflow's name: the batch of this day"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print exactly what would be sent, and send nothing")
    ] = False,
    late: Annotated[bool, typer.Option("--late", help="Send it although its day is over")] = False,
    as_json: Json = False,
) -> None:
    """Send a batch downstream and verify it by reading back; run again to continue an interrupted push."""
    from delivery import push as pushing
    from pipeline import dispatch
    from pipeline.decisions import in_effect

    with ledger() as book:
        row = _batch(book, batch, day)
        workflow = workflow_of(row)
        connector = dispatch.connect(workflow, utc_now)
        try:
            if dry_run:
                diff = pushing.dry_run(book, connector, row.batch_id, settings=workflow.delivery.push, clock=utc_now)
                late_note = (
                    [] if utc_now() < in_effect.over(row.day) else ["its day is over: it is sent with --late only"]
                )
                told(
                    diff.as_dict() | {"notes": [*diff.notes, *late_note]},
                    as_json,
                    [*_diff_lines(workflow, diff), *late_note],
                )
                return
            with _bar(as_json) as progress:
                result = dispatch.deliver(
                    workflow, book, connector, row, run_id=f"cli:{os.getpid()}", clock=utc_now, sleep=time.sleep,
                    progress=progress, stale=late,
                )  # fmt: skip
        finally:
            connector.close()
    if result.report is None:
        told({"batch": row.batch_id, "sent": False, "why": result.said}, as_json, [result.said])
        raise typer.Exit(1)
    report = result.report
    failed = report.failure(workflow.delivery.guards.max_rejected_share)
    lines = [
        f"{row.batch_id}: {'complete' if report.complete else 'NOT complete: run it again'}; {report.counts}",
        f"  {report.guarantee}",
        *(f"  dead letter: {entity}: {says}" for entity, says in report.dead_letters[:SHOWN]),
        *([f"  beside the value, other watched fields of {len(report.beside)} changed:"] if report.beside else []),
        *(f"    {entity}: {says}" for entity, says in report.beside[:SHOWN]),
        *([f"  {report.why}"] if report.why else []),
        *([f"  FAILED: {failed}"] if failed else []),
    ]
    told(report.as_dict() | {"failed": failed}, as_json, lines)
    if not report.complete or failed:
        raise typer.Exit(1)


SHOWN = 20
"""Lines of one sort that are printed; ``--json`` has them all."""


def _diff_lines(workflow: Any, diff: Any, limit: int = SHOWN) -> list[str]:
    """What would be sent, by arm and in sum; the largest changes; then what would not be sent, and why."""
    from pipeline.decisions import batch_review

    say = batch_review.teller(workflow)
    sent, kept = _parted(diff.rows)
    lines = [
        f"{diff.batch_id} to {diff.system}: {len(sent)} of {len(diff.rows)} would be sent. Nothing was written.",
        *diff.notes,
        *_sums(workflow, sent),
    ]
    for name, rows in (("SEND", sent), ("others", kept)):
        for row in rows[:limit]:
            would = f" → {say(row.would)}" if row.would is not None else ""
            lines.append(f"  {row.action:<9} {row.entity}: {say(row.now)}{would}  {row.why}")
        if len(rows) > limit:
            lines.append(f"  {name}: {len(rows) - limit} more, --json lists them")
    return lines


def _parted(rows: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """What would be sent, the largest change first, and what would not."""
    sent = [row for row in rows if row.action == "SEND"]
    return (
        sorted(sent, key=lambda row: -abs(row.would - (row.now or 0))),
        [row for row in rows if row.action != "SEND"],
    )


def _sums(workflow: Any, sent: Iterable[Any]) -> list[str]:
    """By arm: how many would change, and by how much up and down together."""
    from pipeline.decisions import batch_review

    say = batch_review.teller(workflow)
    arms: dict[str, list[int]] = {}
    for row in sent:
        arms.setdefault(row.arm or "no arm", []).append(row.would - (row.now or 0))
    return [
        f"  arm {arm}: {len(steps)} change, up {say(sum(s for s in steps if s > 0))}, "
        f"down {say(-sum(s for s in steps if s < 0))}"
        for arm, steps in sorted(arms.items())
    ]


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Any]:
    """A progress bar on a terminal; nothing where the output is for a machine."""
    if quiet:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[states]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Delivering", total=None, states="")

        def update(progress: Any) -> None:
            states = " ".join(f"{k.lower()} {v}" for k, v in sorted(progress.counts.items()))
            bar.update(task, total=progress.total, completed=progress.done, states=states)

        yield update


def _secret(prompt: str) -> str:
    """A secret from the terminal, never echoed; from a pipe where there is no terminal."""
    return getpass.getpass(prompt) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")


def approve(
    batch: Batch,
    name: Annotated[str, typer.Option("--as", help="Your name as an approver")],
    reason: Reason,
    hours: Annotated[
        float | None, typer.Option(help="How long the approval is valid, in hours; default: as the workflow says")
    ] = None,
    as_json: Json = False,
) -> None:
    """Approve a held batch. Asks for your secret; the approval is for exactly this batch and expires."""
    from delivery import approvals

    with ledger() as book:
        row = _batch(book, batch, None)
        batch = row.batch_id
        workflow = workflow_of(row)
        spec = workflow.delivery.approval
        valid = timedelta(hours=hours if hours is not None else spec.valid_hours)
        secret = _secret(f"Secret of {name}: ")
        approval = approvals.approve(book, batch, name, secret, reason, valid_for=valid, four_eyes=spec.four_eyes)
    told(
        {"batch": batch, "approved_by": list(approval.who), "may_go": approval.ok, "missing": approval.missing},
        as_json,
        [approval.text],
    )


def add_approver(name: Approver, as_json: Json = False) -> None:
    """Add an approver; asks for a new secret, of which only a hash is kept."""
    from delivery import approvals

    secret = _secret(f"A new secret for {name} (at least {approvals.SHORTEST_SECRET} characters): ")
    if sys.stdin.isatty() and _secret("Again: ") != secret:
        raise typer.BadParameter("the two secrets differ; nothing was changed")
    with ledger() as book:
        approvals.enrol(book, name, secret)
    told({"approver": name}, as_json, [f"{name} may approve held batches."])


def list_approvers(as_json: Json = False) -> None:
    """List who may approve, and since when."""
    with ledger() as book:
        rows = [{"name": one.name, "since": one.at} for one in book.approvers()]
    lines = [f"{row['name']}  since {row['since']:%Y-%m-%d %H:%M} UTC" for row in rows]
    told({"approvers": rows}, as_json, lines or ["Nobody yet: signalbox approvers add NAME"])


def rotate_approver(name: Approver, as_json: Json = False) -> None:
    """Replace an approver's secret; asks for the old one and the new one. Current approvals stay valid."""
    from delivery import approvals

    old, fresh = _secret(f"Secret of {name}: "), _secret("A new one: ")
    if sys.stdin.isatty() and _secret("Again: ") != fresh:
        raise typer.BadParameter("the two secrets differ; nothing was changed")
    with ledger() as book:
        approvals.rotate(book, name, old, fresh)
    told({"rotated": name}, as_json, [f"{name} has a new secret."])


def revoke_approver(name: Approver, as_json: Json = False) -> None:
    """Remove an approver; their current approvals no longer count."""
    from delivery import approvals

    with ledger() as book:
        approvals.revoke(book, name)
    told({"revoked": name}, as_json, [f"{name} may no longer approve."])


def stop(workflow: Workflow, reason: Reason, name: As = None, as_json: Json = False) -> None:
    """Stop sending (kill switch): a push in progress ends after its wave. A person's rollback still runs, a guard's waits."""
    _switch(workflow, True, reason, name, as_json)


def resume(workflow: Workflow, reason: Reason, name: As = None, as_json: Json = False) -> None:
    """Let a stopped workflow send again."""
    _switch(workflow, False, reason, name, as_json)


def _switch(workflow: str, stopped: bool, reason: str, name: str | None, as_json: bool) -> None:
    workflow_named(workflow)
    with ledger() as book:
        book.switch(workflow, stopped, who(name), reason)
    sentence = f"{workflow} is {'stopped' if stopped else 'running again'} ({who(name)}: {reason})"
    told({"workflow": workflow, "stopped": stopped}, as_json, [sentence])


def rollback(
    reason: Annotated[
        str, typer.Option("--reason", help="The reason, in a sentence; the ledger records it. Not needed for --dry-run")
    ] = "",
    batch: Annotated[str | None, typer.Argument(help="The batch to roll back")] = None,
    since: Annotated[
        date | None,
        typer.Option(parser=a_day, metavar="YYYY-MM-DD", help="All batches of this day and later"),
    ] = None,
    model: Annotated[int | None, typer.Option(help="With --workflow: all batches that this version decided")] = None,
    workflow: Annotated[
        str | None, typer.Option(help="Only this workflow's batches; with --since, default: all workflows")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be restored, the largest first, and change nothing")
    ] = False,
    close: Annotated[
        bool,
        typer.Option("--close", help="End a rollback that cannot be completed; what is left of it is listed and stays"),
    ] = False,
    name: As = None,
    as_json: Json = False,
) -> None:
    """Restore the prior values, newest batch first. What a person changed since is left and listed; repeat until complete."""
    from delivery.rollback import RollbackReport
    from orchestration import runner
    from pipeline import dispatch

    if dry_run and close:
        raise typer.BadParameter("--dry-run tries a rollback and --close ends one: give one of them")
    if not (dry_run or reason.strip()):
        raise typer.BadParameter("say why: --reason REASON; it stands in the ledger")
    with ledger() as book:
        names: list[str | None] = [workflow]
        if since is not None and workflow is None and batch is None and model is None:
            names = list(sorted({one.workflow for one in book.batches(since=since, kind="decision")})) or [None]
        chosen = [dispatch.selection(book, batch=batch, workflow=one, since=since, model=model) for one in names]
        if dry_run:
            _tried(book, chosen, as_json)
            return
        reports = []
        for which in chosen:
            request: dict[str, Any] = {
                "actor": who(name),
                "reason": reason,
                "run_id": f"cli:{os.getpid()}",
                "clock": utc_now,
            }
            if close:
                reports.append(dispatch.close_rollback(book, which, **request))
                continue
            with _bar(as_json) as progress:
                reports.append(
                    dispatch.roll_back(
                        book, runner.registry(), which, trigger="person", sleep=time.sleep, progress=progress, **request
                    )
                )
    report = RollbackReport(
        tuple(b for r in reports for b in r.batches),
        tuple(b for r in reports for b in r.waiting),
        tuple(b for r in reports for b in r.newer),
        tuple(b for r in reports for b in r.retired),
    )
    told(report.as_dict(), as_json, [*dispatch.lines(report), *([] if report.complete else ["NOT complete."])])
    if not report.complete:
        raise typer.Exit(1)


def _tried(book: Ledger, chosen: Iterable[Any], as_json: bool) -> None:
    """Print what rollbacks would change: over all batches of a workflow first, then each batch."""
    from pipeline import dispatch

    diffs: list[Any] = []
    lines: list[str] = []
    for which in chosen:
        workflow_diffs = dispatch.try_roll_back(book, which, clock=utc_now)
        diffs += workflow_diffs
        workflow = workflow_of(book.batch(workflow_diffs[0].batch_id.removeprefix("rollback-")))
        before: dict[str, int | None] = {}
        net: dict[str, Any] = {}
        for row in (row for diff in workflow_diffs for row in diff.rows if row.action == "SEND"):
            before.setdefault(row.entity, row.now)
            net[row.entity] = dataclasses.replace(row, now=before[row.entity])
        if len(workflow_diffs) > 1:
            lines.append(f"{workflow.name}: {len(net)} entities would change over {len(workflow_diffs)} batches.")
            lines += _sums(workflow, net.values())
        for diff in workflow_diffs:
            lines += _diff_lines(workflow, diff, SHOWN if len(workflow_diffs) == 1 else 5)
    told({"batches": [diff.as_dict() for diff in diffs]}, as_json, lines)


def lift(
    workflow: Workflow,
    version: Annotated[int, typer.Argument(help="The model version")],
    reason: Reason,
    name: As = None,
    as_json: Json = False,
) -> None:
    """Unblock a model version that was rolled back, so that it may be promoted again."""
    from orchestration import runner
    from pipeline.lifecycle import promotion

    workflow_named(workflow)
    with ledger() as book:
        behind = promotion.lift(workflow, runner.registry(), book, version, actor=who(name), reason=reason)
    lines = [f"{workflow} version {version} may be promoted again."]
    if behind:
        lines.append(
            f"MLflow still says that it is blocked, it could not be told ({behind}); the ledger counts. The next reconcile "
            "mends it, or this command given again."
        )
    told({"workflow": workflow, "version": version, "lifted": True, "registry_behind": behind}, as_json, lines)


def explain(
    decision: Decision,
    live: Annotated[
        bool, typer.Option("--live", help="Also read the current value from the downstream system")
    ] = False,
    as_json: Json = False,
) -> None:
    """Explain a decision: from the value downstream back to the source rows, recomputed, and what would have changed it."""
    from assets.resources import resources
    from orchestration import runner
    from pipeline import dispatch
    from pipeline.explain import trace

    with ledger() as book:
        reading = None
        if live:
            row = book.decision(decision)
            connector = dispatch.connect(workflow_of(row["batch"]), utc_now)
            try:
                reading = connector.read([row["entity_id"]])[row["entity_id"]]
            finally:
                connector.close()
        explanation = trace.explain(book, resources()["lake"].lake, runner.registry(), decision, reading=reading)
    told(explanation.as_dict(), as_json, explanation.lines())


def verify(
    head: Annotated[Path | None, typer.Option(help="An earlier exported head: the ledger must contain it")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the head to this file; store it away from the ledger")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prove that no record of the ledger was changed, removed or reordered."""
    from delivery.ledger import Head

    with ledger() as book:
        verdict = book.verify(head=Head.read(head) if head else None)
    if export is not None and verdict.ok:
        verdict.head.export(export)
    lines = [
        f"{'The ledger verifies' if verdict.ok else 'THE LEDGER DOES NOT VERIFY'}: {verdict.events} events, {verdict.batches} batches",
        f"  head {verdict.head.seq} {verdict.head.hash}",
        *(f"  {problem}" for problem in verdict.problems[:50]),
    ]
    told(
        {
            "ok": verdict.ok,
            "events": verdict.events,
            "batches": verdict.batches,
            "head": verdict.head.hash,
            "seq": verdict.head.seq,
            "problems": verdict.problems,
        },
        as_json,
        lines,
    )
    if not verdict.ok:
        raise typer.Exit(1)


def power(
    workflow: Workflow,
    harm: Annotated[
        list[float] | None,
        typer.Option(help="A harm to be found, as a share of the metric's level (0.05: 5%); may be repeated"),
    ] = None,
    runs: Annotated[int, typer.Option(min=20, help="Simulated months for each harm")] = 300,
    day: Annotated[
        date | None,
        typer.Option(parser=a_day, metavar="YYYY-MM-DD", help="The last day of history to use; default: the newest"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate how soon a harm would be found with the current arms, by running the guard on the workflow's own past."""
    from assets.resources import resources
    from orchestration.automation import closed_days
    from pipeline.monitoring import power

    spec = workflow_named(workflow)
    if spec.regression is None:
        raise typer.BadParameter(
            f"{workflow} says nothing of what counts as harm: give its workflow.yaml a section regression"
        )
    harms = harm or list(power.SENTENCE_HARMS)
    if wrong := [h for h in harms if not 0 < h < 1]:
        raise typer.BadParameter(
            f"a harm is a share of the metric's level between 0 and 1, such as 0.05; found {wrong[0]}"
        )
    lake = resources()["lake"].lake
    table = spec.table("outcomes")
    if day is None and lake.exists(table):
        day = max(lake.read(table, columns=["day"])["day"].to_pylist(), default=None)
    results = power.power(spec, lake, day or closed_days(spec, utc_now()), harms, runs=runs)
    document = {
        "workflow": workflow,
        "design": spec.arms.design,
        "power": [dataclasses.asdict(one) for one in results],
    }
    told(document, as_json, [one.sentence() for one in results])


def forget(
    name: Annotated[str, typer.Argument(help="The name, exactly as it was written")], as_json: Json = False
) -> None:
    """Erase a person's or an entity's name from the ledger; its records stay without the name."""
    with ledger() as book:
        erased = book.forget(name)
    if not erased:
        raise typer.BadParameter(f"the ledger knows no {name!r}; names are written exactly as they came")
    told({"forgotten": erased}, as_json, ["The name is gone; the chain verifies as before."])


def retain(
    days: Annotated[int, typer.Option(help="Remove rows of finished batches older than this many days")],
    as_json: Json = False,
) -> None:
    """Remove old rows from the ledger. Roots and events stay, and the chain still verifies. Never runs by itself."""
    with ledger() as book:
        removed = book.retention(days)
    sentence = f"{len(removed)} batches older than {days} days: their rows are removed, their roots and events stay."
    told({"keep_days": days, "batches": removed}, as_json, [sentence])


def remap(
    workflow: Workflow,
    since: Annotated[
        date | None,
        typer.Option(
            parser=a_day, metavar="YYYY-MM-DD", help="Only files with rows of this day or later; default: all"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Apply a changed mapping (sources/*.sql) or contract.yaml to files that landed before and are still in the landing zone.

    The new rows replace the old ones and keep the time from which they are known. Files that are gone keep their rows.
    With a lake in an object store, do not run it while events of the workflow are being ingested: only a local lake has a lock.
    """
    from assets.resources import resources
    from pipeline import ingest

    spec, opened = workflow_named(workflow), resources()
    result = ingest.remap(spec, opened["lake"].lake, opened["landing"].root, now=utc_now(), since=since)
    document = {
        "workflow": spec.name, "gone": list(result.gone), "refused": dict(result.refused),
        "mapped": [
            {"source": new.source, "path": new.path, "rows": new.rows, "accepted": new.accepted, "quarantined": new.quarantined,
             "accepted before": old.accepted, "quarantined before": old.quarantined}
            for old, new in result.mapped
        ],
        "days": [str(day) for day in result.days or ()],
    }  # fmt: skip
    changed = [(old, new) for old, new in result.mapped if old.accepted != new.accepted]
    lines = [
        f"{spec.name}: {len(result.mapped)} files mapped again, {len(result.gone)} gone, {len(result.refused)} refused",
        *(f"  {new.path}: {old.accepted} → {new.accepted} of {new.rows} rows accepted" for old, new in changed[:SHOWN]),
        *([f"  {len(changed) - SHOWN} more, --json lists them"] if len(changed) > SHOWN else []),
        *(f"  gone, its rows stay as they are: {path}" for path in result.gone),
        *(f"  refused, its rows stay as they are: {reason}" for reason in result.refused.values()),
    ]
    if result.days:
        lines.append(f"  make the days anew that read them: signalbox run {spec.name} prepare --since {result.days[0]}")
    told(document, as_json, lines)
    if result.refused:
        raise typer.Exit(1)
