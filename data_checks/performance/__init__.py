"""How well scores do: estimated while their outcomes are missing, realised as they become known, both beside a baseline.

Belongs here: metrics as sums over rows, their intervals, the estimates with their assumptions, the picture. Does not:
which scores meet which outcomes (``pipeline.monitoring.labels``) or what a fall starts (``pipeline.lifecycle.retraining``).

Every metric is a function of sums over rows. So days add up to a window, and rows count as often as they have outcomes:
where one outcome answers every row of an entity (a ticket described anew each day that it is open), the entity counts once.
The interval of a window is two-way, by day and by entity (Cameron, Gelbach and Miller, Journal of Business & Economic
Statistics 29, 2011): rows of one day share their day, rows of one entity its fate, and neither alone says how much a figure
moves. What days share is a delete-a-day jackknife, what entities share beyond their days is added.
"""

from data_checks.performance.estimation import (
    Estimate,
    estimate,
    foreseen,
    jackknife,
    judge,
    realised,
    two_way,
    windows,
)
from data_checks.performance.metrics import (
    Metric,
    Spread,
    amount_metrics,
    calibrated,
    calibration_error,
    coverage,
    mean_of,
    probability_metrics,
    roc_auc,
)
from data_checks.performance.page import newest, plot, report
from data_checks.performance.spec import (
    ASSUMES,
    BINS,
    GROUPS,
    LEAST,
    LEVEL,
    METRICS,
    RULE,
    SCHEMA,
    Array,
    Better,
    Columns,
    Kind,
    PerformanceSpec,
)

__all__ = [
    "ASSUMES",
    "BINS",
    "GROUPS",
    "LEAST",
    "LEVEL",
    "METRICS",
    "RULE",
    "SCHEMA",
    "Array",
    "Better",
    "Columns",
    "Estimate",
    "Kind",
    "Metric",
    "PerformanceSpec",
    "Spread",
    "amount_metrics",
    "calibrated",
    "calibration_error",
    "coverage",
    "estimate",
    "foreseen",
    "jackknife",
    "judge",
    "mean_of",
    "newest",
    "plot",
    "probability_metrics",
    "realised",
    "report",
    "roc_auc",
    "two_way",
    "windows",
]  # fmt: skip
