"""What is measured of scores, what a workflow.yaml says of it, and the table of the figures.

Belongs here: names, settings, the schema, what estimates assume. Does not: any figure (``data_checks.performance.metrics``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    pass


if TYPE_CHECKING:
    pass

Array = np.ndarray
Columns = Mapping[str, Array]
"""Columns of scored rows by name, each (n,): ``predicted``, ``actual`` (NaN where unknown), ``weight`` (1 where it is missing)
and what a metric asks for."""
Better = Literal["lower", "higher"]
Kind = Literal["probability", "amount"]

LEVEL = 0.95
BINS = 512
GROUPS = 20
LEAST = 200
"""Rows with an outcome that a calibration or a spread of errors is learned from at least."""
METRICS: dict[Kind, tuple[str, ...]] = {
    "probability": ("brier", "log_loss", "accuracy", "roc_auc", "calibration_error", "coverage"),
    "amount": ("mae", "wape", "coverage"),
}
"""What is measured of scores of each kind; ``coverage`` where they promise intervals or sets."""
ASSUMES: dict[Kind, str] = {
    "probability": (
        "Estimated: what calibrated scores say of themselves (confidence-based performance estimation, after NannyML's"
        " CBPE). It holds while a score of 0.3 still means three in ten: it sees that cases became harder to tell apart,"
        " and cannot see that what the score means has changed (concept drift)."
    ),
    "amount": (
        "Estimated: the error that foreseen amounts of this size have had lately (after NannyML's direct loss"
        " estimation). It holds while the error at a given size is what it was: it sees that amounts became larger or"
        " smaller, and cannot see that the world answers differently (concept drift)."
    ),
}


class PerformanceSpec(BaseModel):
    """What performance is measured over."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str | None = Field(
        default=None, description="The metric whose fall starts a retraining; null: training.metric"
    )
    window_days: int = Field(default=7, gt=0, description="Days judged together; whole weeks keep weekdays out of it")
    reference_days: int = Field(
        default=28, gt=0, description="Days before the window that give the baseline where the gate gave none"
    )
    min_days: int = Field(default=3, ge=2, description="A window of fewer days by one version is not judged")
    min_rows: int = Field(default=200, gt=0, description="A window of fewer rows is not judged")
    unjudged_days: int = Field(
        default=14,
        gt=0,
        description="Days in a row on which no window of the metric could be judged, from which people are told",
    )
    min_known_share: float = Field(
        default=0.5, gt=0, le=1, description="A day is mature when its maturity_days are over and this share is known"
    )


SCHEMA = pa.schema(
    {
        "day": pa.date32(),
        "first": pa.date32(),
        "last": pa.date32(),
        "metric": pa.string(),
        "kind": pa.string(),
        "value": pa.float64(),
        "low": pa.float64(),
        "high": pa.float64(),
        "n": pa.int64(),
        "known": pa.float64(),
        "mature": pa.bool_(),
        "baseline": pa.float64(),
        "baseline_is": pa.string(),
        "worse": pa.float64(),
        "worse_low": pa.float64(),
        "version": pa.int64(),
        "text": pa.string(),
    }
)
"""One row a figure, as known at the cut-off of ``day``.

first, last: the days on which the scores were made; the same for a day's figure, a window's for the figure that is judged.
kind: realised | estimated | rule (realised of the newest version beside the rule on the same rows). value with its 95%
interval low..high over n outcomes (rows; entities where one outcome answers all rows of an entity). known: share of the scored
rows whose outcome is known. mature: no more outcomes are waited for. worse: how much worse than the baseline as a share of it,
positive is worse; worse_low: the near end of its interval. baseline_is: gate (the version's held-out figure) | reference (the
days before) | rule. version: who scored; null where the rule did.
"""
RULE = "rule"
"""The kind of a figure beside the rule, and the column with what the rule predicted (NaN: nothing)."""
