"""The ``signalbox`` command: for the operations owner, and for the first ten minutes of everybody.

Belongs here: reading arguments and printing. Does not: doing (``orchestration.runner`` and the rooms below).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestration.cli import operations, sandbox
from orchestration.cli.console import (
    LOOK,
    PAGES,
    RUN,
    SET_UP,
    TRY,
    Day,
    Decision,
    Json,
    Workflow,
    a_day,
    console,
    ledger,
    moment_of,
    shown,
    told,
    workflow_named,
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("signalbox"))
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end")
    ] = False,
) -> None:
    """Turn data into decisions that act on other systems, every day, and take them back when they do harm.

    Start with `signalbox demo`, then `signalbox serve` and `signalbox status`; docs/tour.md explains the parts. Every command
    but web takes --json. A command that fails, or leaves something undone, does not exit with status 0.
    """


@app.command(rich_help_panel=SET_UP)
def init(as_json: Json = False) -> None:
    """Create the state folder and Dagster's configuration in it; existing files are kept."""
    from orchestration import runner

    at = runner.prepare_home()
    told({"state": str(at)}, as_json, [f"State lies in {at}"])


@app.command(rich_help_panel=SET_UP)
def validate(as_json: Json = False) -> None:
    """Check every workflow's folder, run its SQL on empty tables, and name each mistake by file, place and fix."""
    from pipeline import workflow_validation
    from pipeline.workflow import load_all

    loaded = load_all()
    rows: list[dict[str, Any]] = [
        {"workflow": name, "result": "bad", "reasons": why.splitlines()} for name, why in loaded.refused.items()
    ]
    for workflow in loaded.workflows:
        wrong = workflow_validation.problems(workflow)
        notes = [*loaded.shares.get(workflow.name, ()), *workflow_validation.notes(workflow)]
        row: dict[str, Any] = {"workflow": workflow.name, "result": "bad" if wrong else "good"}
        rows.append({**row, **({"reasons": wrong or notes} if wrong or notes else {})})
    rows.sort(key=lambda row: str(row["workflow"]))
    shown(rows if as_json else [{**row, "reasons": ()} for row in rows], "Workflows", as_json)
    for row in () if as_json else rows:
        for line in row.get("reasons", ()):
            console.print(f"{row['workflow']}: {line}", highlight=False, markup=False, soft_wrap=True)
    if any(r["result"] != "good" for r in rows):
        raise typer.Exit(1)


@contextlib.contextmanager
def _watched(quiet: bool) -> Iterator[None]:
    """Which stage and day a run is at, on standard error: one line that moves on a terminal, else a line every ten seconds."""
    from common import progress

    if quiet:
        yield
        return
    out = Console(stderr=True)
    last_stage, last_printed = "", 0.0

    def show(step: progress.Step) -> None:
        nonlocal last_stage, last_printed
        text = f"{step.stage} {step.number}/{step.total} {step.at}"
        if line is not None:
            line.update(text)
        elif time.monotonic() - last_printed >= 10 or step.stage != last_stage:
            print(text, file=sys.stderr, flush=True)
            last_stage, last_printed = step.stage, time.monotonic()

    with out.status("starting") if out.is_terminal else contextlib.nullcontext() as line, progress.heard_by(show):
        yield


@app.command(rich_help_panel=RUN)
def run(
    workflow: Workflow,
    job: Annotated[str, typer.Argument(help="The job: daily, prepare, retrain, decide or deliver")] = "daily",
    day: Day = None,
    since: Annotated[date | None, typer.Option(parser=a_day, metavar="YYYY-MM-DD", help="First day of a range")] = None,
    now: Annotated[str | None, typer.Option(help="Use this time as the current one (ISO 8601, UTC)")] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Decide a day again that was sent and still takes effect; only for daily and decide"
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a job of a workflow in this process, for one day or for a range of days."""
    if again and job not in ("daily", "decide"):
        raise typer.BadParameter(
            f"--again asks for decisions, and the job {job} makes none; use it with daily or decide"
        )
    from orchestration import runner
    from orchestration.automation import closed_days

    spec = workflow_named(workflow)
    last = day or closed_days(spec, moment_of(now))
    with _watched(as_json):
        result = runner.run(spec, job, since or last, last, now=now, again=again)
    shown(
        runner.check_rows(result),
        f"{workflow} {job} {since or last} – {last}: {'done' if result.success else 'FAILED'}",
        as_json,
    )
    if not result.success:
        for failed in runner.failed_steps(result):
            Console(stderr=True).print(failed, style="red", highlight=False, markup=False)
        raise typer.Exit(1)


@app.command(rich_help_panel=LOOK)
def batches(workflow: Workflow, as_json: Json = False) -> None:
    """List the batches of a workflow: step, status, number of changes, and delivery result."""
    with ledger() as book:
        entries = book.batches(workflow_named(workflow).name)
    rows = [
        {
            "day": b.day, "kind": b.kind, "step": b.step, "status": b.status, "rows": b.rows, "changed": b.changed,
            "delivery": b.delivery, "states": ", ".join(f"{n} {state}" for state, n in sorted(b.counts.items())),
            "batch_id": b.batch_id, "reasons": list(b.record.get("step_reasons", ())),
        }
        for b in sorted(entries, key=lambda b: (b.day, b.sequence))
    ]  # fmt: skip
    shown(rows, f"Batches of {workflow}", as_json)


@app.command(rich_help_panel=LOOK)
def decisions(
    workflow: Workflow,
    day: Day = None,
    limit: Annotated[int, typer.Option(help="How many, the largest changes first")] = 20,
    as_json: Json = False,
) -> None:
    """List the decisions of a day with their reasons."""
    from assets.resources import resources
    from pipeline.decisions import batch_review, tables

    spec = workflow_named(workflow)
    lake = resources()["lake"].lake
    if day is None:
        day = max(lake.read(spec.table("batches"), columns=["day"])["day"].to_pylist())
    rows = tables.largest_changes(lake.read(spec.table("decisions"), days=[day])).slice(0, limit).to_pylist()
    if not as_json:  # the document has micros, as the ledger; people read units of money
        say = batch_review.teller(spec)
        rows = [{**row, "before": say(row["before"]), "after": say(row["after"])} for row in rows]
    shown(rows, f"Decisions of {workflow}, {day}", as_json)


@app.command(rich_help_panel=LOOK)
def replay(workflow: Workflow, decision_id: Decision, as_json: Json = False) -> None:
    """Recompute a recorded decision from its row alone and compare the two to the bit."""
    from assets.resources import resources
    from pipeline.decisions import replay as replaying

    spec = workflow_named(workflow)
    opened = resources()
    result = replaying.replay(spec.name, opened["lake"].lake, opened["registry"].registry, decision_id)
    shown([result.as_dict()], f"Replay of {decision_id}", as_json)
    if not result.equal:
        raise typer.Exit(1)


def _teller(as_json: bool) -> Console:
    """Where a command that tells as it goes prints: beside the document, if one is asked for."""
    return Console(stderr=True) if as_json else console


@app.command(rich_help_panel=TRY)
def demo(as_json: Json = False) -> None:
    """Run two workflows over seven weeks of generated data, and print a summary."""
    from orchestration.demo import story

    summary = story.tell(_teller(as_json))
    if as_json:
        print(json.dumps(summary, default=str))


@app.command(rich_help_panel=TRY)
def real(
    data: Annotated[Path, typer.Option(help="Folder that contains uci498/ and online_advertising/")] = Path(
        "../shared/data"
    ),
    workflow: Annotated[str | None, typer.Option(help="Only this workflow; default: both")] = None,
    as_json: Json = False,
) -> None:
    """Run both workflows on the real data sets that docs/real_data.md describes, in a separate state folder."""
    from orchestration.demo import real_data

    results = real_data.run(_teller(as_json), data, only=workflow)
    if as_json:
        print(json.dumps({name: one.as_dict() for name, one in results.items()}, default=str))


@app.command(rich_help_panel=PAGES)
def web(
    port: Annotated[int | None, typer.Option(help="Port; default: that of SIGNALBOX_REPORTS_UI, or 8001")] = None,
) -> None:
    """Start only the home page, on 127.0.0.1: each workflow's day, what is open, approving, rolling back, explaining."""
    from urllib.parse import urlsplit

    from assets.resources import resources
    from orchestration.web import app as home_page

    home_page.serve("127.0.0.1", port or urlsplit(resources()["reports"].ui).port or 8001)


@app.command(rich_help_panel=PAGES)
def serve(as_json: Json = False) -> None:
    """Start the home page, Dagster, the MLflow server and the Evidently UI on the state folder, on 127.0.0.1 only."""
    from orchestration import servers

    servers.serve(_teller(as_json), ready=(lambda up: print(json.dumps(up), flush=True)) if as_json else None)


operations.register(app)
sandbox.register(app)


def main() -> None:
    """Entry point: Dagster's state beside the rest, and what a user can mend as a sentence rather than a traceback."""
    from common.errors import SignalboxError
    from pipeline.settings import home

    sandbox.environment()
    os.environ.setdefault("DAGSTER_HOME", str(home() / "dagster"))
    try:
        app()
    except SignalboxError as error:
        Console(stderr=True).print(str(error), style="red", highlight=False, markup=False)
        _leave(1)
    except SystemExit as done:
        if isinstance(done.code, str):
            print(done.code, file=sys.stderr)
        _leave(done.code if isinstance(done.code, int) else int(done.code is not None))


def _leave(code: int) -> None:
    """End the process with everything written: now and then a native library's thread aborts an ordinary exit
    ("terminate called without an active exception"), and a finished demo would look failed."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
