"""What the commands share: the console, options, parsers of what is typed, and what is opened for one command.

Belongs here: what more than one group of commands reads or prints with. Does not: a command (``orchestration.cli.command``,
``orchestration.cli.operations``, ``orchestration.cli.sandbox``).
"""

from __future__ import annotations

import contextlib
import getpass
import json
from collections.abc import Iterator
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.clock import utc_now

if TYPE_CHECKING:
    from delivery.ledger import BatchRow, Ledger

console = Console()
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output")]
As = Annotated[str | None, typer.Option("--as", help="Your name as it shall stand in the ledger; default: your login")]
Reason = Annotated[str, typer.Option("--reason", help="Why, in a sentence; it stands in the ledger")]


def a_day(text: str) -> date:
    """A day as typed; anything else ends the command with a sentence."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a day such as 2026-03-31") from None


Day = Annotated[
    date | None, typer.Option(parser=a_day, metavar="YYYY-MM-DD", help="The day (UTC); default: the newest")
]


@contextlib.contextmanager
def ledger() -> Iterator[Ledger]:
    """The ledger, closed afterwards."""
    from assets.resources import resources

    book = resources()["ledger"].open(utc_now)
    try:
        yield book
    finally:
        book.close()


def told(found: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """One JSON document, or the lines."""
    if as_json:
        print(json.dumps(found, default=str))
    else:
        for line in lines:
            console.print(line, highlight=False, markup=False)


def shown(rows: list[dict[str, Any]], title: str, as_json: bool) -> None:
    """One JSON document, or a table; what is too long for a cell (reasons) stands below as text."""
    if as_json:
        print(json.dumps(rows, default=str))
        return
    table = Table(title=title, title_justify="left")
    short = [{k: v for k, v in row.items() if k != "reasons"} for row in rows]
    for name in short[0] if short else []:
        table.add_column(name, overflow="fold")
    for row in short:
        table.add_row(*[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    console.print(table if rows else f"{title}: nothing")
    for row in rows:
        if reasons := row.get("reasons"):
            console.print(f"[bold]{next(iter(row.values()))}[/bold] {' '.join(reasons)}", highlight=False)


def who(name: str | None) -> str:
    """The name given, else the login."""
    return name or getpass.getuser()


def workflow_named(name: str) -> Any:
    """A workflow by its name; an unknown or wrong one ends the command with a sentence."""
    from pipeline.workflow import FOLDER, WorkflowInvalid, load

    if not (FOLDER / name / "workflow.yaml").is_file():
        known = sorted(p.parent.name for p in FOLDER.glob("*/workflow.yaml"))
        raise typer.BadParameter(f"{name!r} is no workflow; there are {', '.join(known)}")
    try:
        return load(FOLDER / name)
    except WorkflowInvalid as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from None


def every_workflow() -> list[Any]:
    """Every workflow that can be read; those that cannot are named on standard error."""
    from pipeline.workflow import load_all

    found = load_all()
    for name, why in found.refused.items():
        Console(stderr=True).print(f"{name} is left out: {why}", style="red", highlight=False, markup=False)
    return found.workflows


def workflow_of(batch: BatchRow) -> Any:
    """The workflow that a batch belongs to."""
    return workflow_named(batch.workflow)
