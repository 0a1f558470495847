"""What an asset may ask for: the lake, the registry, the landing zone, the reports and the time.

Belongs here: Dagster resources and the settings behind them. Does not: what is done with them (the stages do).
Everything lies below ``SIGNALBOX_HOME`` unless a variable says otherwise; nothing is read from the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from assets.lake import Lake
from assets.workflow import utc
from delivery.ledger import Ledger, LedgerError
from models.registry import Registry


def home() -> Path:
    """The folder of all state: ``SIGNALBOX_HOME``, else ``.signalbox`` in the current folder."""
    return Path(os.environ.get("SIGNALBOX_HOME") or ".signalbox").resolve()


def _setting(name: str, default: str) -> str:
    return os.environ.get(f"SIGNALBOX_{name}") or default


def mlflow_uri() -> str:
    """MLflow's server or database: ``SIGNALBOX_MLFLOW_URI``, else SQLite in the state folder."""
    return _setting("MLFLOW_URI", f"sqlite:///{home() / 'mlflow.db'}")


def mlflow_artifacts() -> str:
    """Where new experiments put their artifacts: ``SIGNALBOX_MLFLOW_ARTIFACTS``, else the state folder."""
    return _setting("MLFLOW_ARTIFACTS", (home() / "mlflow-artifacts").as_uri())


def ledger_url() -> str:
    """The ledger's database: ``SIGNALBOX_LEDGER_URL``, else SQLite in the state folder."""
    return _setting("LEDGER_URL", f"sqlite:///{home() / 'ledger.db'}")


def ledger_key() -> bytes:
    """The key under which names of people and entities are digested: ``SIGNALBOX_LEDGER_KEY``, else a file made once.

    Whoever loses it can no longer tell which digest was whose; it belongs in the backup, apart from the ledger's.
    """
    given = os.environ.get("SIGNALBOX_LEDGER_KEY")
    if given:
        if len(given.encode()) < 16:
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


class LakeResource(dg.ConfigurableResource):
    """The Delta tables. ``root``: a folder or an object store's URL; options for it come from ``SIGNALBOX_LAKE_OPTIONS`` (JSON)."""

    root: str

    @property
    def lake(self) -> Lake:
        """The lake itself. Options (they may hold secrets) are read from the environment at use and stored nowhere."""
        return Lake(self.root, json.loads(os.environ.get("SIGNALBOX_LAKE_OPTIONS", "{}")))


class LandingResource(dg.ConfigurableResource):
    """Where upstream systems leave their files: ``<root>/<workflow>/…``."""

    root: str

    def of(self, workflow: str) -> str:
        """The landing folder of one workflow."""
        return f"{self.root.rstrip('/')}/{workflow}"


class RegistryResource(dg.ConfigurableResource):
    """MLflow. Left unset, address and artifacts are read from the environment at use, since Dagster shows its configuration
    and an address may hold a password."""

    ui: str
    uri: str | None = None
    artifacts: str | None = None

    @property
    def registry(self) -> Registry:
        """The registry itself."""
        return Registry(self.uri or mlflow_uri(), self.artifacts or mlflow_artifacts())

    def version_url(self, name: str, number: int) -> str:
        """The page of a version in the MLflow UI."""
        return f"{self.ui}/#/models/{name}/versions/{number}"


class LedgerResource(dg.ConfigurableResource):
    """The ledger. Address and key are read from the environment at use: an address may hold a password."""

    url: str | None = None

    def open(self, clock: Callable[[], datetime]) -> Ledger:
        """The ledger itself; the caller closes it. ``SIGNALBOX_LEDGER_URL`` and ``SIGNALBOX_LEDGER_KEY`` replace the defaults."""
        return Ledger.open(self.url or ledger_url(), key=ledger_key(), clock=clock)


class ReportsResource(dg.ConfigurableResource):
    """Pages for people: contract results and drift reports as files, and the Evidently workspace."""

    root: str
    ui: str
    evidently_workspace: str
    evidently_ui: str

    def write(self, workflow: str, day: date, name: str, text: str) -> tuple[Path, str]:
        """Write one page; returns its file and the address under which ``signalbox serve`` shows it."""
        path = Path(self.root, workflow, day.isoformat(), name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path, f"{self.ui}/{workflow}/{day.isoformat()}/{name}"


class ClockResource(dg.ConfigurableResource):
    """The time. ``fixed`` (ISO 8601) replaces the wall clock where a run must be repeatable."""

    fixed: str | None = None

    def now(self) -> datetime:
        """Now, as naive UTC."""
        return utc(datetime.fromisoformat(self.fixed)) if self.fixed else datetime.now(UTC).replace(tzinfo=None)


def resources(now: str | None = None) -> dict[str, Any]:
    """Every resource under its name, from the settings in the environment."""
    at = home()
    return {
        "lake": LakeResource(root=_setting("LAKE", str(at / "lake"))),
        "landing": LandingResource(root=_setting("LANDING", str(at / "landing"))),
        "registry": RegistryResource(
            ui=_setting("MLFLOW_UI", "http://127.0.0.1:5000"),
        ),
        "ledger": LedgerResource(),
        "reports": ReportsResource(
            root=_setting("REPORTS", str(at / "reports")),
            ui=_setting("REPORTS_UI", "http://127.0.0.1:8001"),
            evidently_workspace=_setting("EVIDENTLY_WORKSPACE", str(at / "evidently")),
            evidently_ui=_setting("EVIDENTLY_UI", "http://127.0.0.1:8000"),
        ),
        "clock": ClockResource(fixed=now),
    }


def preview(table: pa.Table, rows: int = 8) -> dg.MarkdownMetadataValue:
    """The first rows of a table as Markdown, for an asset's metadata."""

    def shown(value: Any) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return (text if len(text) <= 60 else text[:57] + "…").replace("|", "\\|").replace("\n", " ")

    names = table.schema.names
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(shown(row[n]) for n in names) + " |" for row in table.slice(0, rows).to_pylist()]
    return dg.MetadataValue.md("\n".join(lines))
