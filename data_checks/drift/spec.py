"""What a workflow.yaml says of drift, and what a day's report says in figures.

Belongs here: settings, errors, the report's fields, whether a finding is settled. Does not: judging (``data_checks.drift.judge``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, Self, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.errors import SignalboxError

# Above this many rows a column of numbers is compressed before distances are taken.
FULL_ROWS = 5_000
# Above this many rows Evidently draws compressed ones; below, it sees the rows themselves.
DRAWN_ROWS = 2_000
# Beyond these, the rarest categories are one: Evidently takes milliseconds for each.
MAX_CATEGORIES = 200
OTHERS = "(all others)"
# Rarer categories have no row of their own among the compressed ones: they are judged on the raw counts.
RARE = 1e-4
RARE_FACTOR = 3.0
# Evidently divides by no less.
LEAST_DEVIATION = 0.001
# Fewer rows that moved are never drift, however impossible they were in the reference.
LEAST_MOVED = 5
# Chance that a finding of one day may have and still not wait for a second day.
GRAVE_LEVEL = 0.001
GRAVE_SHARE = 0.5
GRAVE_VOLUME = 3.0
# The same for a volume that is judged by itself, and must alert on k of m days.
VOLUME_LEVEL = 0.01
# Chance of so many columns as far off on the same day, with nothing changed, up to which the day may alert.
TOGETHER_LEVEL = 0.01
NAMESPACE = UUID("6f1c1f0e-6b8e-5a53-9f0e-2f5d1a0c7b11")
METHODS = {"numeric": "wasserstein", "categorical": "jensenshannon"}
SHOWN = 20
MANY_RUNS = 10_000
# From so many rows columns are compressed several at once.
THREADED_ROWS = 100_000
MOST_THREADS = 4
Asked = TypeVar("Asked")
Made = TypeVar("Made")


class DriftImpossible(SignalboxError, ValueError):
    """A column cannot be judged as it is declared; the message names it and the way out."""


class DriftSpec(BaseModel):
    """When a day counts as drifted. A change must pass its floor and what chance alone would give."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: Literal["trailing", "training", "pinned"] = Field(
        default="trailing",
        description="What a window is compared with: the days before it (trailing), the days that the champion was trained on "
        "(training), or the days from pinned_from to pinned_to (pinned)",
    )
    pinned_from: date | None = Field(default=None, description="First day of the reference `pinned`")
    pinned_to: date | None = Field(default=None, description="Last day of the reference `pinned`")
    window_days: int = Field(
        default=7,
        gt=0,
        description="Days judged together, the partition's own the last: a week, so that no weekday is mistaken for drift",
    )
    reference_days: int = Field(default=28, gt=0, description="Days before the window that `trailing` compares with")
    moment: str | None = Field(
        default=None,
        description="Rows judged: those of this moment, of features and scores alike; null: all. What stays from day to day moves "
        "with the work that is left, and is no drift of what comes",
    )
    min_rows: int = Field(
        default=100, gt=1, description="Fewer rows, or fewer values of a column, on either side are not measured"
    )
    numeric_threshold: float = Field(
        default=0.1, gt=0, description="Effect floor: Wasserstein distance in standard deviations of the reference"
    )
    categorical_threshold: float = Field(
        default=0.15, gt=0, le=1, description="Effect floor: Jensen-Shannon distance (natural logarithm, at most 0.83)"
    )
    winsorise: float | None = Field(
        default=2.0,
        ge=1,
        description="A number counts at most so many times as far from the reference's median as its 1st or 99th percentile lies, "
        "on that side; null: as it is. A ratio to nearly nothing would outweigh all others",
    )
    null_share_change: float = Field(
        default=0.2, gt=0, le=1, description="Effect floor: change of a column's share of nulls"
    )
    category_share: float = Field(
        default=0.02,
        gt=0,
        le=1,
        description="Effect floor: share of rows of a category that vanished, or of all new ones",
    )
    volume_change: float = Field(
        default=0.5,
        gt=0,
        description="Effect floor: change of the rows of a mean day, as a share (0.5: half as much again)",
    )
    unjudged_days: int = Field(
        default=7,
        gt=0,
        description="Days in a row that could not be judged, from which people are told: nobody looks meanwhile",
    )
    false_alarms: float = Field(
        default=0.05, gt=0, lt=1, description="Share of the columns found drifted that may be so by chance, in the mean"
    )
    grave: float = Field(
        default=5.0,
        ge=1,
        description="Times its floor, a change of the newest day alone need not wait for a second day (for shares half of all "
        "is enough); nor does a vanished category or column",
    )
    share: float = Field(default=0.3, gt=0, le=1, description="Share of drifted columns from which the day alerts")
    importance_share: float = Field(
        default=0.2, gt=0, le=1, description="Share of the champion's gain in drifted columns from which the day alerts"
    )
    k: int = Field(default=2, gt=0, description="Days that must alert among the last m before drift is found")
    m: int = Field(default=3, gt=0, description="See k")
    numeric: tuple[str, ...] | None = Field(
        default=None, description="Feature columns measured as numbers; null: those of the model"
    )
    categorical: tuple[str, ...] | None = Field(
        default=None, description="Feature columns measured as categories; null: those of the model"
    )

    @property
    def least_days(self) -> int:
        """Days with rows that a reference needs: two windows, for nobody knows from less how far one lies from another."""
        return min(2 * self.window_days, self.reference_days)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.k > self.m:
            raise ValueError(f"k: {self.k} of {self.m} days can never alert; it must be at most m")
        days = (self.pinned_from, self.pinned_to)
        if self.reference == "pinned" and (None in days or str(days[0]) > str(days[1])):
            raise ValueError("reference: pinned needs pinned_from and pinned_to, in this order")
        if self.reference != "pinned" and days != (None, None):
            raise ValueError(f"pinned_from: has no meaning with reference: {self.reference}; say reference: pinned")
        return self


@dataclass(frozen=True)
class DriftReport:
    """What was found.

    ``columns``: name → distance, method, threshold (floor and chance together), chance (of going as far with nothing changed),
    drifted, grave, importance (share of the champion's gain), winsorised (share of the window's numbers that were drawn to the
    bounds), null_share_current, null_share_reference, new_categories,
    vanished_categories, rare_moved (categories rarer than 1 in 10,000 whose raw counts moved), judged (a distance was measured),
    reason (why it drifted or was not measured), all JSON-ready. ``drifted``: the day's own verdict (what it says before k of
    m days are asked). ``grave``: findings that need not wait. ``volume``: rows of a mean day beside a mean day of the
    reference, ``volume_drifted`` whether its days do not vary so. ``html``: a page that opens offline. ``snapshot``:
    Evidently's, with its plots.
    """

    columns: dict[str, dict[str, Any]]
    share_drifted: float
    importance_share: float
    weighted: bool
    drifted: bool
    grave: tuple[str, ...]
    volume: float
    volume_drifted: bool
    new_columns: tuple[str, ...]
    rows: tuple[int, int]
    daily_rows: float
    reference: Mapping[str, Any]
    html: str
    snapshot: Any

    @property
    def json(self) -> dict[str, Any]:
        """Everything but the plots, JSON-ready."""
        return {
            "drifted": self.drifted,
            "grave": list(self.grave),
            "share_drifted": self.share_drifted,
            "importance_share": self.importance_share,
            "importances": "of the champion" if self.weighted else "equal",
            "volume": self.volume,
            "volume_drifted": self.volume_drifted,
            "new_columns": list(self.new_columns),
            "rows": {"current": self.rows[0], "reference": self.rows[1]},
            "reference": dict(self.reference),
            "columns": self.columns,
        }


def settled(spoke: Sequence[bool], grave: bool, spec: DriftSpec) -> bool:
    """Whether drift is found: what cannot wait, or k of the last m days alerted (``spoke``: oldest first, the day's own last)."""
    return grave or (bool(spoke) and spoke[-1] and sum(spoke[-spec.m :]) >= spec.k)
