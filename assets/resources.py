"""What an asset may ask for: the lake, the registry, the landing zone, the reports and the time.

Belongs here: Dagster resources. Does not: the settings behind them (``pipeline.settings``), or what is done with them (the
stages do).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from common.clock import utc_now
from delivery.ledger import Ledger
from models.registry import Registry
from pipeline.lake import Lake
from pipeline.settings import home, ledger_key, ledger_url, mlflow_artifacts, mlflow_uri, setting
from pipeline.workflow import utc


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
        return utc(datetime.fromisoformat(self.fixed)) if self.fixed else utc_now()


def resources(now: str | None = None) -> dict[str, Any]:
    """Every resource under its name, from the settings in the environment."""
    at = home()
    return {
        "lake": LakeResource(root=setting("LAKE", str(at / "lake"))),
        "landing": LandingResource(root=setting("LANDING", str(at / "landing"))),
        "registry": RegistryResource(
            ui=setting("MLFLOW_UI", "http://127.0.0.1:5000"),
        ),
        "ledger": LedgerResource(),
        "reports": ReportsResource(
            root=setting("REPORTS", str(at / "reports")),
            ui=setting("REPORTS_UI", "http://127.0.0.1:8001"),
            evidently_workspace=setting("EVIDENTLY_WORKSPACE", str(at / "evidently")),
            evidently_ui=setting("EVIDENTLY_UI", "http://127.0.0.1:8000"),
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
