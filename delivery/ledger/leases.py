"""Leases of downstream systems: who holds one, and whether that process still lives.

Belongs here: granting a lease and checking its fence, naming this process beyond doubt, and looking for another one on the same
host. Does not: keeping a lease while a push runs (``delivery.push.held_lease``).
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import bindparam, select, text, update

from delivery.ledger import schema
from delivery.ledger.database import Fenced, LedgerError
from delivery.ledger.transaction import Transaction


@dataclass(frozen=True)
class Holder:
    """One process on one host. ``started`` tells it from a later process with the same number."""

    host: str
    pid: int
    started: str

    @staticmethod
    def here() -> Holder:
        """This process."""
        return Holder(this_host(), os.getpid(), process_started(os.getpid()) or "unknown")

    def is_dead(self) -> bool:
        """Whether this host can tell that the process is gone; False for another host's."""
        return self.host == this_host() and process_started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Lease:
    """The right to write to one system; ``fence`` grows with each grant, and every write checks it."""

    system: str
    fence: int
    holder: Holder
    expires_at: datetime


ABANDONED: set[tuple[str, str, int]] = set()
"""Leases (ledger, system, fence) of this process that it no longer uses and could not give back, say on a full disk."""


class Busy(LedgerError):
    """Somebody else holds the lease of the system."""

    def __init__(self, system: str, holder: Holder, expires_at: datetime) -> None:
        super().__init__(
            f"{system} is being written to by {holder}, whose lease runs to {expires_at:%Y-%m-%d %H:%M:%S} UTC: "
            "wait for it, or end that process"
        )
        self.system = system
        self.holder = holder
        self.expires_at = expires_at


def this_host() -> str:
    """The host's name, with what tells apart two machines or containers that bear the same one."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()[:8]
    except OSError:
        machine = ""
    try:
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        space = ""
    return "/".join(part for part in (socket.gethostname(), machine, space) if part)


def process_started(pid: int) -> str | None:
    """When a process began, in a form that no later process of the same number shares; None where none runs.

    Linux: boot and clock ticks from ``/proc``. Elsewhere: what ``ps`` says.
    """
    if Path("/proc/self/stat").exists():
        try:
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        except OSError:
            return None
        # A zombie has ended: it only waits for its parent to notice.
        return None if after_name[0] in "ZX" else f"{boot}-{after_name[19]}"
    said = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return said.stdout.strip() or None


def check_fence(tx: Transaction, lease: Lease) -> None:
    """The fence: the lease is still ours, and stays so until this transaction ends."""
    row = tx.connection.execute(
        select(schema.leases).where(schema.leases.c.system == lease.system).with_for_update()
    ).first()
    if row is None or not row.held or row.fence != lease.fence:
        now = "nobody" if row is None or not row.held else str(Holder(row.host, row.pid, row.started))
        raise Fenced(
            f"the lease {lease.fence} of {lease.system} is no longer ours ({now} holds it): nothing was written"
        )


def grant(tx: Transaction, system: str, holder: Holder, now: datetime, ttl_s: float) -> Lease:
    table = schema.leases
    expires_at = now + timedelta(seconds=ttl_s)
    tx.connection.execute(
        text(
            "INSERT INTO leases (system, fence, held, host, pid, started, expires_at) "
            "VALUES (:system, 0, :held, '', 0, '', :now) ON CONFLICT DO NOTHING"
        ).bindparams(bindparam("now", type_=table.c.expires_at.type), bindparam("held", type_=table.c.held.type)),
        {"system": system, "held": False, "now": now},
    )
    row = tx.connection.execute(select(table).where(table.c.system == system).with_for_update()).one()
    if row.held:
        other = Holder(row.host, row.pid, row.started)
        here = other.host == Holder.here().host
        left = (str(tx.connection.engine.url), system, row.fence) in ABANDONED
        if not (left or (other.is_dead() if here else row.expires_at <= now)):
            raise Busy(system, other, row.expires_at)
    fence = row.fence + 1
    tx.connection.execute(
        update(table).where(table.c.system == system).values(
            fence=fence, held=True, host=holder.host, pid=holder.pid, started=holder.started, expires_at=expires_at
        )
    )  # fmt: skip
    return Lease(system, fence, holder, expires_at)
