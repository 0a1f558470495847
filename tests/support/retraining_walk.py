"""Asking for retrainings day by day, without Dagster and ledger.

Belongs here: the walk. Does not: the decision of each day (``pipeline.lifecycle.retraining``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa

from pipeline.lifecycle.retraining import Evidence, Runs, Trigger, decide, evidence
from pipeline.workflow import Retraining


class Walk:
    """The same decision day by day without Dagster and ledger, for a loop that trains when it is asked to.

    ``past`` holds every trigger with its end. Each one that is asked counts as trained at once.
    """

    def __init__(
        self, workflow: str, spec: Retraining, metric: str, *, trained: Iterable[date] = (), back: int = 1
    ) -> None:
        self.workflow, self.spec, self.metric, self.back = workflow, spec, metric, back
        self.trained = set(trained)
        self.past: list[Trigger] = []

    def step(
        self, day: date, performance: pa.Table | None, drift: Mapping[str, Any] | None, *more: Evidence
    ) -> Trigger | None:
        """The trigger that asks for a retraining for ``day``, or None. ``more``: such as ``calendar(day)``."""
        rows = performance.to_pylist() if performance is not None else []
        found = {day: (*evidence(self.spec, self.metric, rows, drift, back=self.back), *more)}
        made = decide(
            self.workflow, self.spec, found, judged=day, past=self.past, runs=Runs(frozenset(self.trained)),
            now=datetime.combine(day + timedelta(days=1), datetime.min.time()),
        )  # fmt: skip
        self.past += made
        asked = next((t for t in made if t.action == "asked"), None)
        if asked is not None:
            self.trained.add(asked.day)
        return asked
