"""``signalbox sandbox``: both local downstream systems on 127.0.0.1, with the generated worlds behind them.

Belongs here: starting them and moving their clock. Does not: what they are (``delivery.sandbox``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestration.cli.console import TRY, ledger, told
from pipeline.settings import home

_RUNNING = "running.json"


def folder() -> Path:
    """Where the state of the sandbox lies."""
    return home() / "sandbox"


def environment() -> None:
    """Addresses and tokens of this state folder's sandbox, for what the environment leaves open."""
    for name in ("tokens.json", _RUNNING):
        with contextlib.suppress(FileNotFoundError):
            for variable, value in json.loads((folder() / name).read_text()).items():
                os.environ.setdefault(variable, value)


def register(app: typer.Typer) -> None:
    """Add ``sandbox up`` and ``sandbox advance``."""
    commands = typer.Typer(
        no_args_is_help=True,
        help="Two local downstream systems to try delivery with: an advertising API and a help desk.",
    )
    commands.command("up")(up)
    commands.command("advance")(advance)
    app.add_typer(commands, name="sandbox", rich_help_panel=TRY)


def up(
    seed: Annotated[int, typer.Option(help="Random seed of the simulated worlds, when the sandbox is created")] = 7,
    days: Annotated[int, typer.Option(help="Days of history to generate, when the sandbox is created")] = 35,
    ports: Annotated[tuple[int, int], typer.Option(help="Ports of the advertising API and the help desk")] = (
        8101,
        8102,
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on standard output, once both answer")
    ] = False,
) -> None:
    """Start both systems and wait; Ctrl-C ends them. An existing sandbox continues where it was."""
    from delivery.sandbox import systems
    from orchestration import runner
    from pipeline.workflow import FOLDER, load

    state = runner.prepare_home()
    setup, queue = systems.Setup.read(folder()), None
    if setup is None:
        start = min(load(FOLDER / name).start for name in ("ad_budget", "ticket_priority"))
        setup = systems.Setup(seed, start, days)
        with Console(stderr=True).status(f"Generating {days} days of both worlds"):
            queue = systems.history(setup, state / "landing")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with systems.Systems(folder(), setup, ports=ports, tickets_world=queue) as both:
        running = {k: v for k, v in both.environment.items() if not k.endswith("_TOKEN")}
        (folder() / _RUNNING).write_text(json.dumps(running))
        pages = f"{both.desk.url}/helpdesk/"
        next_days = str(both.ads.next_day), both.desk.state()["next_day"]
        lines = [
            f"Advertising API  {running['SIGNALBOX_ADS_ENDPOINT']}  next day {next_days[0]}",
            f"Help desk        {pages}  next day {next_days[1]}",
            "Their tokens lie in the state folder; every `signalbox` command finds them. Ctrl-C ends both.",
        ]
        told(running | {"pages": pages, "next_day": next_days[0]}, as_json, lines)
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        (folder() / _RUNNING).unlink(missing_ok=True)


def advance(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output")] = False,
) -> None:
    """Let one day pass in both running systems with their current values; their exports land as files."""
    import httpx

    from delivery.sandbox.helpdesk import Controls
    from delivery.sandbox.systems import Setup
    from orchestration import runner
    from pipeline import dispatch

    if Setup.read(folder()) is None or not (folder() / _RUNNING).exists():
        raise SystemExit("No sandbox is running on this state folder; start one with: signalbox sandbox up")
    at = runner.prepare_home() / "landing"
    ads, desk = os.environ["SIGNALBOX_ADS_ENDPOINT"], os.environ["SIGNALBOX_HELPDESK_URL"].removesuffix("/helpdesk/api")
    try:
        with ledger() as book:
            day = date.fromisoformat(
                httpx.get(f"{ads}/sandbox/state", headers=_bearer()).raise_for_status().json()["next_day"]
            )
            drawn = dispatch.randomised(book, "ad_budget", day - timedelta(days=1))
        request = {"landing": str(at / "ad_budget"), "multipliers": drawn}
        answer = (
            httpx.post(f"{ads}/sandbox/advance", json=request, headers=_bearer(), timeout=60).raise_for_status().json()
        )
        controls = Controls(desk, os.environ["SIGNALBOX_HELPDESK_TOKEN"])
        try:
            tickets = controls.advance(at / "ticket_priority")
        finally:
            controls.close()
    except httpx.ConnectError:
        raise SystemExit(
            f"Nothing answers at {ads}: the sandbox was ended. Start it with: signalbox sandbox up"
        ) from None
    exported_at = datetime.combine(day + timedelta(days=1), datetime.min.time(), UTC).timestamp() + 5400
    for path in (at / "ad_budget" / "export" / f"advertising_{day}.csv.gz", Path(tickets["export"])):
        os.utime(path, (exported_at, exported_at))
    line = f"{day} is over: {answer['rows']} advertising rows, {tickets['events']} ticket events landed"
    told({"day": day, "advertising": answer, "tickets": tickets}, as_json, [line])


def _bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {os.environ['SIGNALBOX_ADS_TOKEN']}"}
