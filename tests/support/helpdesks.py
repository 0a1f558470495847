"""A sandboxed help desk for tests: a small world, and one migrated database for all of a session's help desks."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from pathlib import Path

from delivery.connectors.helpdesk import HelpdeskConnector, HelpdeskSettings, connect
from delivery.sandbox.helpdesk import HelpdeskSandbox
from delivery.sandbox.worlds import tickets

START = date(2026, 3, 2)
OPENED = date(2026, 3, 12)
TOKEN = "marked-secret-0123456789"


class Clock:
    """A second goes by with every look at it."""

    def __init__(self) -> None:
        self.now = datetime(2026, 3, 13, 4)

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def world(seed: int = 7, teams: int = 3) -> tickets.World:
    """Served from START until OPENED, a Thursday."""
    made = tickets.World(seed, load=0.9, teams=teams)
    for n in range((OPENED - START).days):
        made.advance(START + timedelta(days=n))
    return made


def sandbox(folder: Path, templates: Path, *, teams: int = 3) -> HelpdeskSandbox:
    return HelpdeskSandbox(folder, world(teams=teams), next_day=OPENED, token=TOKEN, templates=templates)


def connector(url: str, clock: Clock, *, token: str = TOKEN, **settings: object) -> HelpdeskConnector:
    said = {"kind": "helpdesk", "url": url, "token_env": "DESK_TOKEN", "key": "T{id:07d}", **settings}
    return connect(HelpdeskSettings.model_validate(said), environ={"DESK_TOKEN": token}, folder=Path(), clock=clock)
