"""Registering what a training made, a student among it: what MLflow shows of a version is gathered here, in one place.

Belongs here: parameters, metrics, curves, dataset and example of a run. Does not: MLflow itself (``models.registry``), training,
judging, what becomes of a version (``pipeline.lifecycle.promotion``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa

from models import serving
from models.evaluation import gate
from models.learners.base import Learner
from models.registry import Dataset, Registry, Version, flat
from models.training.fit import Fitted
from pipeline.decisions import scoring
from pipeline.lifecycle import candidate_evaluation
from pipeline.workflow import Workflow

CURVE_ROWS = 20_000
"""Rows from which a curve is drawn at most: it is looked at, not decided by."""


def register(  # noqa: PLR0913 - given by name
    workflow: Workflow,
    registry: Registry,
    fitted: Fitted,
    learn: pa.Table,
    held: candidate_evaluation.Held,
    *,
    spec: Mapping[str, Any],
    day: date,
    device: str,
    passed: bool,
    facts: Mapping[str, Any],
    card: str,
    dataset: Dataset | None,
    agrees: Mapping[str, float] | None = None,
) -> Version:
    """Register a fitted model with its evidence. ``learn``: the rows it learned from; ``agrees``: a student's figures."""
    figures = {f"{who}_{name}": value for who, one in fitted.metrics.items() for name, value in one.items()}
    return registry.register(
        workflow.name,
        fitted.model.files(),
        trained_day=day,
        passed=passed,
        params={
            "recipe": json.dumps(spec), "device": device, "day": day.isoformat(), "threads": candidate_evaluation.THREADS, **flat(spec),
        },
        metrics=figures | dict(agrees or {}),
        tags={f"signalbox.{k.replace(' ', '_')}": str(v) for k, v in facts.items()} | gate.tags(fitted.verdict),
        plots=fitted.model.plots(held.rows if held.rows.num_rows else learn),
        card=card,
        seed=scoring.SEED,
        served=serving.describe(workflow.model.kind, fitted.model, learn),
        dataset=dataset,
        curves=curves(fitted.judged, held),
    )  # fmt: skip


def curves(judged: Learner | None, held: candidate_evaluation.Held) -> dict[str, dict[int, float]]:
    """What the judged twin loses after ever more rounds on rows that it learned from (training) and on the held-out days
    (validation), by name and rounds: says whether it has too many of them, or too few."""
    if judged is None:
        return {}
    tables = {"training": held.early, "validation": held.rows}
    return {
        f"{where}_{loss}": one for where, rows in tables.items() for loss, one in judged.losses(_some(rows)).items()
    }


def _some(rows: pa.Table) -> pa.Table:
    if rows.num_rows <= CURVE_ROWS:
        return rows
    return rows.take(pa.array(np.linspace(0, rows.num_rows - 1, CURVE_ROWS).astype(np.int64)))
