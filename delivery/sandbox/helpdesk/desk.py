"""The help desk's tickets and its clock: what the world shows stands in django-helpdesk, and a day goes by on request.

Belongs here: carrying a world's tickets into the database and its priorities back. Does not: HTTP, faults, the process.
Tickets keep their number (T0000123 is ticket 123). django-helpdesk reads every ticket that a request may reach, so what
was resolved more than ``KEEP_DAYS`` ago is archived. Only what changed in the world is written: what people set stays.
"""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from delivery.sandbox.helpdesk import recipe
from delivery.sandbox.worlds import tickets, working_hours

KEEP_DAYS = 3
OPEN, REOPENED, RESOLVED, CLOSED = 1, 2, 3, 4
PUSHER, PERSON = "signalbox", "pat"
_COLUMNS = ("status", "on_hold", "queue_id")


class Shown(NamedTuple):
    """What the world shows of a ticket and may change from day to day; the priority belongs to the help desk."""

    status: int
    on_hold: bool
    queue: int


class Desk:
    """The tickets of one world in django-helpdesk's database; one at a time moves the clock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.world: tickets.World
        self.next_day: date
        self._events: pa.Table | None = None
        self._standing: dict[int, Shown] | None = None
        """What the world showed when the database was last brought up to it; None: never."""
        synced = self._synced()
        for next_day, world, events in recipe.served(folder):
            self.world, self.next_day, self._events = world, next_day, events
            if next_day == synced:
                self._standing = self._look()
        # A day may have been written down and not carried out before the process ended
        if synced != self.next_day:
            self._sync()

    @staticmethod
    def name(number: int) -> str:
        """The world's name of a ticket number."""
        return f"T{number:07d}"

    @staticmethod
    def number(name: str) -> int:
        """The number of a ticket by its name in the world. Raises ValueError."""
        if not (name[:1] == "T" and name[1:].isascii() and name[1:].isdigit()):
            raise ValueError(f"ticket {name!r}: is not written like T0000123")
        return int(name[1:])

    # What the controls do.

    def state(self) -> dict[str, Any]:
        """The day that comes next, and how many tickets are open, standing in the help desk, and ever seen."""
        from helpdesk.models import Ticket

        with self.lock:
            return {
                "next_day": self.next_day.isoformat(),
                "open": Ticket.objects.filter(status__in=(OPEN, REOPENED)).count(),
                "standing": Ticket.objects.count(),
                "ever": len(self.world.ticket_id),
            }

    def tickets(self) -> dict[str, Any]:
        """Priority and status of every ticket that stands in the help desk, by the world's names."""
        from helpdesk.models import Ticket

        rows = Ticket.objects.order_by("id").values_list("id", "priority", "status")
        return {self.name(i): {"priority": priority, "status": status} for i, priority, status in rows}

    def person(
        self, ticket: str, priority: int | None = None, status: int | None = None, how: str = "pages"
    ) -> dict[str, Any]:
        """Somebody else changes a ticket: on the help desk's pages (leaves a follow-up), or over its API (leaves none)."""
        with self.lock:
            return self._person(ticket, priority, status, how)

    def _person(self, ticket: str, priority: int | None, status: int | None, how: str) -> dict[str, Any]:
        from django.contrib.auth import get_user_model
        from helpdesk.models import Ticket
        from helpdesk.update_ticket import update_ticket

        try:
            found = Ticket.objects.get(pk=self.number(ticket))
        except Ticket.DoesNotExist:
            raise ValueError(f"ticket {ticket!r}: does not stand in the help desk") from None
        if how == "pages":
            update_ticket(
                get_user_model().objects.get(username=PERSON), found, comment="",
                priority=found.priority if priority is None else priority,
                new_status=found.status if status is None else status,
            )  # fmt: skip
        elif how == "api":
            found.priority = found.priority if priority is None else priority
            found.status = found.status if status is None else status
            found.save()
        else:
            raise ValueError(f"how {how!r}: is pages or api")
        return {"ticket": ticket, "priority": found.priority, "status": found.status}

    def advance(self, landing: str, day: str | None = None, break_schema: bool = False) -> dict[str, Any]:
        """Serve the next day with the priorities that stand now; its export lands in ``landing``/export.

        day: the one that is meant, for callers who do not know whether they asked before: the day served last is
        exported again and not served twice; any other but the next is refused.
        """
        with self.lock:
            begun = time.perf_counter()
            meant = self.next_day if day is None else date.fromisoformat(day)
            priorities: dict[str, int] = {}
            if meant != self.next_day:
                if self._events is None or meant != self.next_day - timedelta(days=1):
                    raise ValueError(f"day {meant}: days follow each other, {self.next_day} is next")
            else:
                priorities = self._priorities()
                recipe.append(self.folder, meant, priorities)
                self._events = self.world.step(meant, priorities)
                self.next_day = meant + timedelta(days=1)
            self._sync()
            exported = self.export(landing, break_schema)
            return exported | {
                "changed_priorities": len(priorities),
                "next_day": self.next_day.isoformat(),
                "seconds": round(time.perf_counter() - begun, 3),
            }

    def export(self, landing: str, break_schema: bool = False) -> dict[str, Any]:
        """Write the last served day's export once more, whole or not at all."""
        with self.lock:
            if self._events is None:
                raise ValueError("export: no day was served yet; advance first")
            day = self.next_day - timedelta(days=1)
            folder = Path(landing) / "export"
            draft = tickets.export_day(self._events, folder / ".draft", day, break_schema=break_schema)
            final = folder / draft.name
            os.replace(draft, final)
            draft.parent.rmdir()
            return {"day": day.isoformat(), "events": self._events.num_rows, "export": str(final)}

    # Between the world and the database.

    def _look(self) -> dict[int, Shown]:
        """What the world shows at the start of ``next_day``."""
        world = self.world
        archived = (self.next_day - timedelta(days=KEEP_DAYS) - tickets.EPOCH).days * working_hours.DAY
        shown = {}
        for i, state in enumerate(world.state):
            if state in ("open", "waiting"):
                status = REOPENED if world._reopened[i] else OPEN
            elif state in ("resolved", "closed") and (world.resolved[i] or 0) >= archived:
                status = RESOLVED if state == "resolved" else CLOSED
            else:
                continue
            shown[i + 1] = Shown(status, state == "waiting", world.team[i] + 1)
        return shown

    def _priorities(self) -> dict[str, int]:
        """The priorities of open tickets that stand in the help desk and are not the world's."""
        from helpdesk.models import Ticket

        world, found = self.world, {}
        for number, priority in Ticket.objects.values_list("id", "priority"):
            i = number - 1
            if i < len(world.state) and world.state[i] in ("open", "waiting") and world.priority[i] != priority:
                found[self.name(number)] = priority
        return dict(sorted(found.items()))

    def _sync(self) -> None:
        """Carry what changed in the world since the last time into the database, all of it or nothing."""
        from django.db import connection, transaction
        from helpdesk.models import Queue, Ticket

        now = datetime.combine(self.next_day, datetime.min.time(), UTC)
        shown, before = self._look(), self._standing or {}
        with transaction.atomic():
            if self._standing is None:
                for n, team in enumerate(self.world.teams, start=1):
                    Queue.objects.get_or_create(id=n, defaults={"title": team.name, "slug": f"team-{n}"})
            here = set(Ticket.objects.values_list("id", flat=True))
            gone = sorted(here - shown.keys())
            for at in range(0, len(gone), 500):
                Ticket.objects.filter(id__in=gone[at : at + 500]).delete()
            # One that stood here and does not now was deleted by somebody: it stays so
            new = [self._ticket(n, what, now) for n, what in shown.items() if n not in here and n not in before]
            Ticket.objects.bulk_create(new, batch_size=200)
            with connection.cursor() as cursor:
                for place, column in enumerate(_COLUMNS):
                    changed = [
                        (what[place], now, n)
                        for n, what in shown.items()
                        if n in here and n in before and what[place] != before[n][place]
                    ]
                    cursor.executemany(
                        f"UPDATE helpdesk_ticket SET {column} = %s, modified = %s WHERE id = %s", changed
                    )
                cursor.execute("DELETE FROM sandbox_clock")
                cursor.execute("INSERT INTO sandbox_clock VALUES (%s)", [self.next_day.isoformat()])
        self._standing = shown

    def _ticket(self, number: int, shown: Shown, now: datetime) -> Any:
        from helpdesk.models import Ticket

        world, i = self.world, number - 1
        symptom, contact, location, caller, _ = world._other[i]
        return Ticket(
            id=number, queue_id=shown.queue, status=shown.status, on_hold=shown.on_hold, priority=world.priority[i],
            title=f"{world.category[i]}: {symptom}", submitter_email=f"{caller}@example.org",
            description=f"{world.subcategory[i]}, by {contact} from {location}", secret_key=f"sandbox-{number}",
            created=datetime.fromtimestamp(world.opened[i], UTC), modified=now,
            due_date=datetime.fromtimestamp(world.due[i], UTC),
        )  # fmt: skip

    def _synced(self) -> date | None:
        """The day that the tickets in the database stand at the start of."""
        from django.db import connection

        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE IF NOT EXISTS sandbox_clock (next_day TEXT NOT NULL)")
            cursor.execute("SELECT next_day FROM sandbox_clock")
            row = cursor.fetchone()
        return None if row is None else date.fromisoformat(row[0])
