"""Both local downstream systems of one state folder: an advertising account and a help desk, each with its world.

Belongs here: which worlds, where their state lies, starting and stopping them together. Does not: the systems themselves
(``advertising_api``, ``helpdesk``), or what is decided.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from common.clock import utc_now
from delivery.sandbox import advertising_api, advertising_server, private
from delivery.sandbox.helpdesk import HelpdeskSandbox
from delivery.sandbox.worlds import advertising, tickets

CUSTOMER, EMAIL = "1000000001", "signalbox@example.org"
PORTS = (8101, 8102)
_SETUP = "setup.json"
EXPLORED_DAYS = 27
"""Days before the systems opened in which budgets were already perturbed at random."""


@dataclass(frozen=True)
class Setup:
    """Which worlds: everything follows from it."""

    seed: int
    start: date
    """The first day of both worlds."""
    history_days: int
    """Days that ran under the people in charge before the systems opened."""
    lines: int = 120
    teams: int = 6
    load: float = 0.8
    advertising_drift: date | None = None
    tickets_drift: date | None = None

    @property
    def opened(self) -> date:
        """The first day that the systems serve."""
        return self.start + timedelta(days=self.history_days)

    def advertising(self) -> advertising.World:
        """The advertising world."""
        return advertising.World(self.seed, "easy", self.lines, origin=self.start, drift_on=self.advertising_drift)

    def tickets(self) -> tickets.World:
        """The ticket world, on its first day."""
        drift = tickets.Drift(self.tickets_drift, "new_category", size=1.0) if self.tickets_drift else None
        return tickets.World(self.seed, load=self.load, teams=self.teams, drift=drift)

    def write(self, folder: Path) -> None:
        """Keep it in a folder."""
        private.folder(folder)
        (folder / _SETUP).write_text(json.dumps(asdict(self), default=str) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Setup | None:
        """What a folder keeps; None where no sandbox was ever set up there."""
        try:
            said = json.loads((folder / _SETUP).read_text())
        except FileNotFoundError:
            return None
        days = {k: date.fromisoformat(said[k]) if said[k] else None for k in ("advertising_drift", "tickets_drift")}
        return cls(**(said | days | {"start": date.fromisoformat(said["start"])}))


class Systems:
    """Both systems, running; a context manager. A folder that has served days goes on where it was.

    ``ports``: of the advertising API and of the help desk; 0 takes a free one. ``tickets_world``: the ticket world served
    up to the first day of the systems, where the caller has it already (serving it again takes seconds). ``clock``: what
    the advertising account's change history takes for now (naive UTC).
    """

    def __init__(
        self,
        folder: Path,
        setup: Setup,
        *,
        ports: tuple[int, int] = PORTS,
        tickets_world: tickets.World | None = None,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self.setup = setup
        private.folder(folder)
        tokens = _tokens(folder)
        self.ads = advertising_api.AdvertisingSandbox(
            folder / "advertising", setup.advertising(), next_day=setup.opened, token=tokens["SIGNALBOX_ADS_TOKEN"],
            customer_id=CUSTOMER, user_email=EMAIL, clock=clock,
        )  # fmt: skip
        world = tickets_world
        if world is None:
            world = setup.tickets()
            for n in range(setup.history_days):
                world.advance(setup.start + timedelta(days=n))
        self.desk = HelpdeskSandbox(
            folder / "helpdesk", world, next_day=setup.opened, token=tokens["SIGNALBOX_HELPDESK_TOKEN"], port=ports[1]
        )
        setup.write(folder)  # last: what does not fit the folder has been refused by now
        self._port, self._tokens = ports[0], tokens
        self._server: advertising_server.Server | None = None

    def __enter__(self) -> Systems:
        self.desk.start()
        try:
            self._server = advertising_server.serve(self.ads, self._port)
        except OSError:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.desk.stop()
        if self._server is not None:
            self._server.close()
        self.ads.close()

    @property
    def environment(self) -> dict[str, str]:
        """Addresses and tokens under the names that the shipped workflows look up."""
        assert self._server is not None, "the systems are not running"
        return {
            **self._tokens,
            "SIGNALBOX_ADS_ENDPOINT": self._server.url.rstrip("/"),
            "SIGNALBOX_HELPDESK_URL": self.desk.api_url,
        }


def _tokens(folder: Path) -> dict[str, str]:
    """The tokens of a folder's systems, made once; for nobody but this user to read."""
    path = folder / "tokens.json"
    if not path.exists():
        names = ("SIGNALBOX_ADS_TOKEN", "SIGNALBOX_HELPDESK_TOKEN")
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump({name: secrets.token_hex(16) for name in names}, file)
    path.chmod(0o600)
    found: dict[str, str] = json.loads(path.read_text())
    return found


def history(setup: Setup, landing: Path) -> tickets.World:
    """Write the exports of the days before the systems opened, and return the ticket world as it then stands.

    ``landing``: the landing zone; files go to ``<workflow>/export/`` below it.
    """
    quiet = max(0, setup.history_days - EXPLORED_DAYS)
    world, begun = setup.advertising(), setup.start + timedelta(days=quiet)
    rows = pa.concat_tables(
        [
            advertising.history(world, setup.start, quiet, explore_share=0.0),
            advertising.history(world, begun, setup.history_days - quiet),
        ]
    )
    queue = setup.tickets()
    for n in range(setup.history_days):
        day = setup.start + timedelta(days=n)
        advertising.export_day(rows, landing / "ad_budget" / "export", day)
        events: pa.Table = queue.step(day)
        tickets.export_day(events, landing / "ticket_priority" / "export", day)
    return queue
