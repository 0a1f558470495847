"""Where the state lies and which servers are used, as the environment says.

Belongs here: reading ``SIGNALBOX_…`` variables that more than one part needs. Does not: what is opened there (``assets.resources``).
Everything lies below ``SIGNALBOX_HOME`` unless a variable says otherwise; nothing is read from the network.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def home() -> Path:
    """The folder of all state: ``SIGNALBOX_HOME``, else ``.signalbox`` in the current folder."""
    return Path(os.environ.get("SIGNALBOX_HOME") or ".signalbox").resolve()


def setting(name: str, default: str) -> str:
    """``SIGNALBOX_<name>``, or the default where it is unset or empty."""
    return os.environ.get(f"SIGNALBOX_{name}") or default


def mlflow_uri() -> str:
    """MLflow's server or database: ``SIGNALBOX_MLFLOW_URI``, else SQLite in the state folder."""
    return setting("MLFLOW_URI", f"sqlite:///{home() / 'mlflow.db'}")


def mlflow_artifacts() -> str:
    """Where new experiments put their artifacts: ``SIGNALBOX_MLFLOW_ARTIFACTS``, else the state folder."""
    return setting("MLFLOW_ARTIFACTS", (home() / "mlflow-artifacts").as_uri())


def ledger_url() -> str:
    """The ledger's database: ``SIGNALBOX_LEDGER_URL``, else SQLite in the state folder."""
    return setting("LEDGER_URL", f"sqlite:///{home() / 'ledger.db'}")


def ledger_key() -> bytes:
    """The key under which names of people and entities are digested: ``SIGNALBOX_LEDGER_KEY``, else a file made once.

    Whoever loses it can no longer tell which digest was whose; it belongs in the backup, apart from the ledger's.
    """
    given = os.environ.get("SIGNALBOX_LEDGER_KEY")
    if given:
        if len(given.encode()) < 16:
            from delivery.ledger import LedgerError  # every command reads the state folder's place; few need the ledger

            raise LedgerError(
                "SIGNALBOX_LEDGER_KEY is too short: 16 random bytes at least; leave it out for a key file"
            )
        return given.encode()
    path = home() / "ledger.key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"ledger.key.{os.getpid()}")
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_hex(32).encode())
        # a link fails where another process was first, and nobody ever reads half a key
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path.read_bytes()
