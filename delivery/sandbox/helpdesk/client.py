"""Starting, steering and looking at a sandboxed help desk from another process: for the demo, the command and tests.

Belongs here: the process and a client of its controls. Does not: Django (that process has it), the connector.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import SignalboxError
from delivery.connectors.http import Http
from delivery.sandbox import private
from delivery.sandbox.helpdesk import recipe
from delivery.sandbox.worlds import tickets


class SandboxError(SignalboxError, RuntimeError):
    """The help desk did not start, ended, or refused what a control asked; says what it said."""


class Controls:
    """The controls of a running help desk: ``url`` is its root, ``http://127.0.0.1:PORT``."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._http = Http(url, headers={"Authorization": f"Token {token}"}, timeout_s=60, secrets=[token])

    @property
    def api_url(self) -> str:
        """What the connector's setting ``url`` wants."""
        return f"{self.url}/helpdesk/api"

    def advance(self, landing: Path, *, day: date | None = None, break_schema: bool = False) -> dict[str, Any]:
        """Serve the next day with the priorities that stand in the help desk.

        landing: the workflow's landing folder; the export comes to ``landing/export/``. day: the one that is meant; the
        day served last is exported again and not served twice, so that a caller may ask again after any failure.
        Returns day, events, export (the file), changed_priorities, next_day, seconds. Raises SandboxError.
        """
        meant = None if day is None else day.isoformat()
        return self._call(
            "POST", "advance", {"landing": str(landing.resolve()), "day": meant, "break_schema": break_schema}
        )

    def export(self, landing: Path, *, break_schema: bool = False) -> dict[str, Any]:
        """Write the last served day's export again (after a broken one, say)."""
        return self._call("POST", "export", {"landing": str(landing.resolve()), "break_schema": break_schema})

    def state(self) -> dict[str, Any]:
        """next_day, and counts: open, standing (in the help desk), ever."""
        return self._call("GET", "state")

    def tickets(self) -> dict[str, dict[str, int]]:
        """Every ticket in the help desk: T0000123 → {priority, status}."""
        return self._call("GET", "tickets")

    def applications(self) -> list[dict[str, Any]]:
        """Every write of a priority over the API since start or ``reset``: ticket, value, by. In their order."""
        return list(self._call("GET", "applications")["applications"])

    def person(
        self, ticket: str, *, priority: int | None = None, status: int | None = None, how: str = "pages"
    ) -> dict[str, Any]:
        """Somebody else changes a ticket: ``how`` "pages" leaves a follow-up, "api" leaves no trace, as in real life."""
        return self._call("POST", "person", {"ticket": ticket, "priority": priority, "status": status, "how": how})

    def fault(
        self, kind: str, *, times: int = 1, method: str | None = None, ticket: str | None = None, seconds: float = 0.0
    ) -> None:
        """Let the next requests go wrong; kinds as in ``watch.Fault``."""
        self._call(
            "POST", "fault", {"kind": kind, "times": times, "method": method, "ticket": ticket, "seconds": seconds}
        )

    def reset(self) -> None:
        """Forget the faults and the applications."""
        self._call("POST", "reset", {})

    def close(self) -> None:
        """Let go of connections."""
        self._http.close()

    def _call(self, method: str, what: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self._http.request(method, f"sandbox/{what}", json=body)
        try:
            found: dict[str, Any] = json.loads(answer.body)
        except ValueError:
            found = {"error": f"answered {answer.status}"}
        if answer.status != 200:
            raise SandboxError(f"sandbox/{what}: {found.get('error')}")
        return found


class HelpdeskSandbox(Controls):
    """django-helpdesk with a world's tickets, in a process of its own; a context manager, or ``start`` and ``stop``.

    folder: holds the database, the recipe of the world and the log of its days. A folder that has them goes on where it
        was, in whatever state the process was ended.
    world: a world that was served up to ``next_day`` without outside priorities. It is made again in the other process
        and not touched here; ``replay`` gives the one that stands.
    token: of the API and of the controls, 8 to 40 characters.
    port: 0: any free one. templates: a folder shared by several, so that migrations are paid for once.
    """

    def __init__(
        self, folder: Path, world: tickets.World, *, next_day: date, token: str, port: int = 0,
        templates: Path | None = None, patience_s: float = 60.0,
    ) -> None:  # fmt: skip
        if not 8 <= len(token) <= 40:
            raise ValueError("token: 8 to 40 characters, as the help desk stores them")
        private.folder(folder)
        recipe.Recipe.of(world, next_day).write(folder)
        self.folder, self.port = folder, port
        self._token, self._templates, self._patience_s = token, templates or folder, patience_s
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> HelpdeskSandbox:
        """Start the process and wait until it answers. Raises SandboxError with the end of its log."""
        command = [
            sys.executable, "-m", "delivery.sandbox.helpdesk", "--folder", str(self.folder), "--port", str(self.port),
            "--templates", str(self._templates), "--with-parent",
        ]  # fmt: skip
        root = str(Path(__file__).parents[3])
        paths = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                env=os.environ | {"SIGNALBOX_HELPDESK_TOKEN": self._token, "PYTHONPATH": paths},
            )  # fmt: skip
        said = self._said(self.process)
        if not said.startswith(b"ready "):
            self.stop()
            raise SandboxError(f"the help desk in {self.folder} did not start: {self._log.read_text()[-600:].strip()}")
        self.port = int(said.split()[1])
        super().__init__(f"http://127.0.0.1:{self.port}", self._token)
        return self

    def stop(self) -> None:
        """End the process at once: everything that it answered is on disk."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process = None
        if hasattr(self, "_http"):
            self.close()

    def replay(self) -> tickets.World:
        """The world as it stands now, made again here: to branch from it, or to look at its truth."""
        return recipe.replay(self.folder)

    def __enter__(self) -> HelpdeskSandbox:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _said(self, process: subprocess.Popen[bytes]) -> bytes:
        """The first line of its output, or what came of it when it ended or took too long."""
        assert process.stdout is not None
        until, said = time.monotonic() + self._patience_s, b""
        while not said.endswith(b"\n") and (left := until - time.monotonic()) > 0:
            if select.select([process.stdout], [], [], left)[0]:
                piece = os.read(process.stdout.fileno(), 4096)
                if not piece:
                    break
                said += piece
        return said
