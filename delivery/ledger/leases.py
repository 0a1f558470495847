"""Who holds the lease of a downstream system, and whether that process still lives.

Belongs here: naming this process beyond doubt, and looking for another one on the same host. Does not: granting leases
(``delivery.ledger``).
"""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from delivery.ledger.database import LedgerError


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
