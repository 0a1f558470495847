"""What the pages read: ledger, lake, registry, workflows and the other pages' addresses.

Belongs here: opening them. Does not: what is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from delivery.ledger import Ledger
from models.registry import Registry
from pipeline.lake import Lake
from pipeline.workflow import Loaded, Workflow, load_all


@dataclass(frozen=True)
class Site:
    """One state folder as the pages see it."""

    lake: Lake
    open_ledger: Callable[[], Ledger]
    registry: Callable[[], Registry]
    reports: str
    """The folder of the pages that stages write: ``<workflow>/<day>/<name>.html``."""
    clock: Callable[[], datetime]
    """Naive UTC."""
    addresses: dict[str, str]
    """Dagster, MLflow, Evidently → where their pages are."""

    @classmethod
    def of_settings(cls, clock: Callable[[], datetime]) -> Site:
        """From the settings in the environment, as every command."""
        from assets.resources import resources

        given = resources()
        registry, reports, ledger = given["registry"], given["reports"], given["ledger"]
        return cls(
            lake=given["lake"].lake,
            open_ledger=lambda: ledger.open(clock),
            registry=lambda: registry.registry,
            reports=reports.root,
            clock=clock,
            addresses={
                "Dagster": os.environ.get("SIGNALBOX_DAGSTER_UI", "http://127.0.0.1:3000"),
                "MLflow": registry.ui,
                "Evidently": reports.evidently_ui,
            },
        )

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """The ledger, closed afterwards."""
        book = self.open_ledger()
        try:
            yield book
        finally:
            book.close()

    def workflows(self) -> Loaded:
        """Every workflow that can be read, and why the others cannot."""
        return load_all()

    def workflow(self, name: str) -> Workflow | None:
        """A workflow by its name; None where there is none."""
        return next((one for one in self.workflows().workflows if one.name == name), None)
