"""What the commands share: the console, options, parsers of what is typed, and what is opened for one command.

Belongs here: what more than one group of commands reads or prints with. Does not: a command (``orchestration.cli.command``,
``orchestration.cli.operations``, ``orchestration.cli.sandbox``).
"""

from __future__ import annotations

import contextlib
import getpass
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.clock import utc_now

if TYPE_CHECKING:
    from delivery.ledger import BatchRow, Ledger

console = Console()
TRY, SET_UP, RUN, PAGES = "Try it", "Set up", "Run and send", "Pages"
LOOK, ACT, KEEP = "Look, and ask why", "Approve, stop, take back", "The record"
"""Under which head the help lists a command."""
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output")]
As = Annotated[str | None, typer.Option("--as", help="Your name for the ledger; default: your login")]
Reason = Annotated[str, typer.Option("--reason", help="The reason, in a sentence; the ledger records it")]
Workflow = Annotated[str, typer.Argument(help="The workflow's name, such as ad_budget")]
Batch = Annotated[str, typer.Argument(help="The batch's id, as `signalbox batches` prints it")]
Decision = Annotated[str, typer.Argument(help="The decision's id, as `signalbox decisions` prints it")]


def a_day(text: str) -> date:
    """A day as typed; anything else ends the command with a sentence."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a day such as 2026-03-31") from None


def moment_of(text: str | None) -> datetime:
    """A time as typed (ISO 8601), as naive UTC; now where none is given."""
    if text is None:
        return utc_now()
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time such as 2026-03-31T06:00") from None
    return given.astimezone(UTC).replace(tzinfo=None) if given.tzinfo else given


Day = Annotated[
    date | None, typer.Option(parser=a_day, metavar="YYYY-MM-DD", help="The day (UTC); default: the newest")
]


@contextlib.contextmanager
def ledger() -> Iterator[Ledger]:
    """The ledger, closed afterwards."""
    from delivery.ledger import Ledger
    from pipeline.settings import ledger_key, ledger_url

    # not by way of Dagster's resources: importing Dagster takes longer than most commands
    book = Ledger.open(ledger_url(), key=ledger_key(), clock=utc_now)
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
    """One JSON document, or a table; what is too long for a cell (reasons) stands below as text.

    Where the terminal is too narrow for the table, each row stands as lines, its id whole.
    """
    if as_json:
        print(json.dumps(rows, default=str))
        return
    short = [{k: v for k, v in row.items() if k != "reasons"} for row in rows]
    cells = [{k: _cell(v) for k, v in row.items()} for row in short]
    table = Table(title=title, title_justify="left")
    for name in cells[0] if cells else []:
        table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*row.values())
    if not rows:
        console.print(f"{title}: nothing")
    elif console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(table)
    else:  # too wide: a table would break ids and words, so that nobody could read or copy them
        console.print(title, highlight=False, markup=False)
        for row in cells:
            first = next((name for name in row if name.endswith("_id")), next(iter(row)))
            others = "  ".join(f"{name} {value}" for name, value in row.items() if name != first and value)
            console.print(row[first], style="bold", highlight=False, markup=False, soft_wrap=True)
            console.print(f"  {others}", highlight=False, markup=False)
    for row in rows:
        if reasons := row.get("reasons"):
            console.print(f"[bold]{next(iter(row.values()))}[/bold] {' '.join(reasons)}", highlight=False)


def who(name: str | None) -> str:
    """The name given, else the login."""
    return name or getpass.getuser()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return str(value)


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

    loaded = load_all()
    for name, why in loaded.refused.items():
        Console(stderr=True).print(f"{name} is left out: {why}", style="red", highlight=False, markup=False)
    return loaded.workflows


def workflow_of(batch: BatchRow) -> Any:
    """The workflow that a batch belongs to."""
    return workflow_named(batch.workflow)
