"""A world of tickets that can be made again: its recipe, and the log of the days it was served with their priorities.

Belongs here: writing both down, and serving the same days again from them. Does not: the help desk, HTTP, Django.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from delivery.sandbox.worlds import tickets

RECIPE, LOG = "world.json", "days.jsonl"


@dataclass(frozen=True)
class Recipe:
    """What a ``tickets.World`` was made of, and until when it was served before the help desk took over."""

    seed: int
    load: float
    teams: int
    drift: dict[str, Any] | None
    start: date
    opened: date
    """The first day that the help desk serves; the days before it ran without outside priorities."""
    shows: str
    """Digest of the tickets open at the start of ``opened``, to know that the same world came out again."""

    @classmethod
    def of(cls, world: tickets.World, next_day: date) -> Recipe:
        """The recipe of a world that was served up to ``next_day`` without outside priorities and in its own order.

        Raises ValueError where it stands at another day or has an order of its own.
        """
        if world.next_day not in (None, next_day):
            raise ValueError(f"next_day {next_day}: the world was served until {world.next_day}; give that day")
        if world.order is not None:
            raise ValueError("order: a help desk serves by priority; give a world without an order of its own")
        drift = None if world.drift is None else asdict(world.drift) | {"start": world.drift.start.isoformat()}
        start = min(world._drawn, default=next_day) if world.next_day is not None else next_day
        return cls(world.seed, world.load, len(world.teams), drift, start, next_day, _shows(world))

    def world(self) -> tickets.World:
        """The world, served until ``opened``. Raises ValueError where it does not come out the same."""
        drift = self.drift and tickets.Drift(**(self.drift | {"start": date.fromisoformat(self.drift["start"])}))
        world = tickets.World(self.seed, load=self.load, teams=self.teams, drift=drift or None)
        for n in range((self.opened - self.start).days):
            world.advance(self.start + timedelta(days=n))
        if _shows(world) != self.shows:
            raise ValueError(
                "the world does not come out again from its seed: it was served with outside priorities before "
                f"{self.opened}; hand over one that was not, and let the help desk serve the days with priorities"
            )
        return world

    def write(self, folder: Path) -> None:
        """Keep it in ``folder``. Raises ValueError where another world is kept there already."""
        file = folder / RECIPE
        if file.exists():
            if (kept := read(folder)) != self:
                raise ValueError(f"{file}: another world lives here ({kept}); use an empty folder, or that world")
            return
        _replace(file, json.dumps(asdict(self), default=date.isoformat, indent=1))


def read(folder: Path) -> Recipe:
    """The recipe kept in ``folder``. Raises FileNotFoundError where none is."""
    found = json.loads((folder / RECIPE).read_text())
    return Recipe(
        **found | {"start": date.fromisoformat(found["start"]), "opened": date.fromisoformat(found["opened"])}
    )


def days(folder: Path) -> list[tuple[date, dict[str, int]]]:
    """The days served so far, each with the priorities that stood in the help desk and were new to the world."""
    file = folder / LOG
    lines = file.read_text().split("\n") if file.exists() else []
    # A line without its end is a day that was not begun: it is cut off by the next ``append``
    found = [json.loads(line) for line in lines[:-1]]
    return [(date.fromisoformat(d["day"]), d["priorities"]) for d in found]


def append(folder: Path, day: date, priorities: dict[str, int]) -> None:
    """Write a day down before it is served; from here on it will be, whatever happens to the process."""
    line = json.dumps({"day": day.isoformat(), "priorities": priorities}) + "\n"
    with (folder / LOG).open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def served(folder: Path) -> Iterator[tuple[date, tickets.World, pa.Table]]:
    """Serve the kept world's days again, one by one, with the events of each; first, the opening with no events."""
    recipe = read(folder)
    world = recipe.world()
    yield recipe.opened, world, None
    for day, priorities in days(folder):
        yield day + timedelta(days=1), world, world.step(day, priorities)


def replay(folder: Path) -> tickets.World:
    """The world as it stands, made again from the folder of a help desk: to branch from it, or to look at its truth."""
    return list(served(folder))[-1][1]


def _shows(world: tickets.World) -> str:
    rows = world.open_tickets().select(["ticket_id", "state", "priority", "team"]).to_pylist()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _replace(file: Path, text: str) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_text(text)
    os.replace(draft, file)
