"""How far a day's rows lie from those of a reference: on every row, against what chance alone gives, in Evidently's pictures.

Belongs here: compressing columns, distances, null shares, volume, new and vanished categories and columns, the verdict of a
day, the report and its place in an Evidently workspace. Does not: what chance alone gives (``data_checks.drift_calibration``),
choosing the windows (``assets.drift``) or what follows from drift (``pipeline.lifecycle.retraining``).

Distances only, never p-values of the usual tests: with enough rows every difference is significant. A column is judged by the
Wasserstein distance in standard deviations of the reference (numbers, winsorised: a few ratios to nearly nothing would be both
the deviation and the distance) or the Jensen-Shannon distance (categories). It has
drifted when the distance passes an effect floor *and* is not what resampled reference days give, corrected over all columns.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property, partial
from typing import Any, Literal, Self, TypeVar
from uuid import UUID, uuid5

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from common.errors import SignalboxError
from data_checks.common import page, without_collection
from data_checks.drift_calibration import (
    LEAST_DAYS,
    Counted,
    Counts,
    Floats,
    Null,
    Tail,
    benjamini_hochberg,
    cells,
    chance_of_moved,
    chance_of_none,
    compress_counts,
    compress_numbers,
    counts_in,
    jensen_shannon,
    means_of,
    standard_deviation,
    volume_null,
    wasserstein,
)

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
# The same for a volume that is judged by itself, and must speak on k of m days.
VOLUME_LEVEL = 0.01
_NAMESPACE = UUID("6f1c1f0e-6b8e-5a53-9f0e-2f5d1a0c7b11")
_METHODS = {"numeric": "wasserstein", "categorical": "jensenshannon"}
_SHOWN = 20
MANY_RUNS = 10_000
# From so many rows columns are compressed several at once.
THREADED_ROWS = 100_000
MOST_THREADS = 4
_Asked = TypeVar("_Asked")
_Made = TypeVar("_Made")


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
    share: float = Field(default=0.3, gt=0, le=1, description="Share of drifted columns from which the day speaks")
    importance_share: float = Field(
        default=0.2, gt=0, le=1, description="Share of the champion's gain in drifted columns from which the day speaks"
    )
    k: int = Field(default=2, gt=0, description="Days that must speak among the last m before drift is found")
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
            raise ValueError(f"k: {self.k} of {self.m} days can never speak; it must be at most m")
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
    """Whether drift is found: what cannot wait, or k of the last m days spoke (``spoke``: oldest first, the day's own last)."""
    return grave or (bool(spoke) and spoke[-1] and sum(spoke[-spec.m :]) >= spec.k)


def _evidently() -> Any:
    # Read by Evidently's telemetry at each event.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with without_collection():
        import evidently

    return evidently


def _numbers(column: pa.ChunkedArray, name: str) -> Floats:
    """The column as float64; what is not finite is missing."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    elif not any(
        is_(kind) for is_ in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    ):
        way_out = "list it as categorical or leave it out of the features"
        raise DriftImpossible(f"column {name!r} is {kind}, not a number; {way_out}")
    # A nullable whole number would be dropped by Evidently unjudged.
    values: Floats = column.cast(pa.float64()).to_numpy()
    return values


def _texts(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DriftImpossible(
            f"column {name!r} is {column.type}, not a category; leave it out of the features"
        ) from error


class _Side:
    """One window: its rows in the order of their days, and where each day begins."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.rows = table, table.num_rows
        self.starts = np.array([0, self.rows])
        self.dated = "day" in table.schema.names
        if self.dated:
            days = table["day"].cast(pa.date32()).cast(pa.int32()).to_numpy()
            runs = np.flatnonzero(np.diff(days, prepend=days[0] - 1))
            if (np.diff(days[runs]) < 0).any():
                if len(runs) <= MANY_RUNS:  # files of whole days: their slices change places, no row is copied
                    ends = np.append(runs[1:], self.rows)
                    order = np.argsort(days[runs], kind="stable")
                    self.table = pa.concat_tables([table.slice(runs[n], ends[n] - runs[n]) for n in order])
                else:
                    self.table = table.take(pa.array(np.argsort(days, kind="stable")))
                days = np.sort(days, kind="stable")
            self.starts = np.append(np.flatnonzero(np.diff(days, prepend=days[0] - 1)), self.rows)

    @property
    def days(self) -> int:
        return len(self.starts) - 1

    @property
    def by_day(self) -> Counts:
        return np.diff(self.starts).astype(np.int64)

    def column(self, name: str) -> pa.ChunkedArray:
        return self.table[name]

    def newest(self) -> Self:
        """The rows of the last day alone."""
        return type(self)(self.table.slice(int(self.starts[-2])))


def _each(judge: Callable[[_Asked], _Made], asked: Iterable[_Asked], rows: int) -> list[_Made]:
    """``judge`` of every column, in their order; of many rows several columns at once (sorting and counting let others run)."""
    if rows < THREADED_ROWS:
        return [judge(one) for one in asked]
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(judge, asked))


def _bounds(ordered: Floats, reach: float | None) -> tuple[float, float]:
    """From where to where a number counts as it is (``DriftSpec.winsorise``); a side on which 99% are the median has no bound."""
    if reach is None or not len(ordered):
        return -math.inf, math.inf
    low, middle, high = (float(ordered[round(q * (len(ordered) - 1))]) for q in (0.01, 0.5, 0.99))
    return (
        middle - reach * (middle - low) if low < middle else -math.inf,
        middle + reach * (high - middle) if high > middle else math.inf,
    )


def _winsorised(ordered: Floats, bounds: tuple[float, float]) -> int:
    """Draws what lies beyond the bounds to them, in place (``ordered`` ascending); returns how many values."""
    first, last = (int(np.searchsorted(ordered, bounds[0], "left")), int(np.searchsorted(ordered, bounds[1], "right")))
    ordered[:first], ordered[last:] = bounds
    return int(first + len(ordered) - last)


def _sorted(side: _Side, name: str, *, by_day: bool) -> tuple[Floats, list[Floats], Counts]:
    """A column's values in order, those of each day in order (only ``by_day``), and how many are missing on each day."""
    values = _numbers(side.column(name), name)
    held, nulls = np.isfinite(values), np.zeros(side.days, np.int64)
    if not held.all():
        nulls = side.by_day - np.add.reduceat(held, side.starts[:-1], dtype=np.int64)
        values = values[held]
    elif not values.flags.writeable:  # the table's own memory
        values = values.copy()
    slices = np.split(values, np.cumsum(side.by_day - nulls)[:-1]) if by_day else []
    for one in slices:
        one.sort()
    ordered = values.copy() if by_day else values
    ordered.sort()
    return ordered, slices, nulls


@dataclass(frozen=True)
class _Numbers:
    """A column of numbers in one window: the sorted values (compressed where they are many), how many there are, and their
    standard deviation, over every row, and the counts of nulls a day."""

    values: Floats
    count: int
    nulls: Counts
    deviation: float

    @classmethod
    def of(cls, side: _Side, ordered: Floats, nulls: Counts) -> _Numbers:
        rows = max(1, round(FULL_ROWS * len(ordered) / side.rows))
        small = ordered
        if side.rows > FULL_ROWS and len(ordered) > rows:
            small = compress_numbers(ordered, rows)
        return cls(small, len(ordered), nulls, standard_deviation(ordered))

    def filled(self, rows: int) -> Floats:
        """The column as Evidently gets it: at most DRAWN_ROWS rows in order, missing ones (NaN) last."""
        whole = min(rows, DRAWN_ROWS)
        held = min(self.count, max(1, round(whole * self.count / rows)))
        values = compress_numbers(self.values, held) if len(self.values) > held else self.values
        return np.concatenate([values, np.full(whole - held, np.nan)])


@dataclass(frozen=True)
class _Texts:
    """A column of categories in one window: counts (days × names, the most frequent first), nulls a day."""

    names: tuple[str, ...]
    counts: Counts
    nulls: Counts

    @classmethod
    def of(cls, side: _Side, name: str) -> _Texts:
        encoded = _texts(side.column(name), name).dictionary_encode().combine_chunks()
        encoded = encoded if isinstance(encoded, pa.DictionaryArray) else encoded.chunk(0)
        names = encoded.dictionary.to_pylist()
        codes = pc.fill_null(encoded.indices, len(names)).to_numpy(zero_copy_only=False)
        by_day = np.split(codes, side.starts[1:-1])
        wide = np.stack([np.bincount(one, minlength=len(names) + 1) for one in by_day])
        total = wide[:, :-1].sum(axis=0)
        order = sorted(range(len(names)), key=lambda n: (-int(total[n]), names[n]))
        return cls(tuple(names[n] for n in order), wide[:, order].astype(np.int64), wide[:, -1].astype(np.int64))

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def total(self) -> Counts:
        return np.asarray(self.counts.sum(axis=0))


@dataclass(frozen=True)
class _Reference:
    """One column of the reference, compressed, with what chance alone does to it."""

    kind: str
    side: _Numbers | _Texts
    counted: Counted | None
    nulls: Counted
    norm: float = 1.0
    bounds: tuple[float, float] = (-math.inf, math.inf)
    kept: int = 0
    unseen: Tail | None = None


def _numeric_reference(side: _Side, name: str, winsorise: float | None) -> _Reference:
    ordered, slices, nulls = _sorted(side, name, by_day=True)
    bounds = _bounds(ordered, winsorise)
    for one in (ordered, *slices):
        _winsorised(one, bounds)
    found = _Numbers.of(side, ordered, nulls)
    counted, norm = None, 1.0
    if found.count:
        norm = max(found.deviation, LEAST_DEVIATION)
        inner = cells(ordered)
        counted = Counted(name, counts_in(slices, inner), np.diff(means_of(ordered, inner)) / norm)
    return _Reference("numeric", found, counted, _null_counts(name, side, nulls), norm, bounds)


def _null_counts(name: str, side: _Side, nulls: Counts) -> Counted:
    return Counted(f"{name}:nulls", np.stack([nulls, side.by_day - nulls], axis=1), np.ones(1))


def _categorical_reference(side: _Side, name: str, block: int) -> _Reference:
    found = _Texts.of(side, name)
    kept = min(len(found.names), MAX_CATEGORIES)
    cut = np.concatenate([found.counts[:, :kept], found.counts[:, kept:].sum(axis=1, keepdims=True)], axis=1)
    counted = Counted(name, cut, None) if found.count else None
    unseen = None
    if side.days >= LEAST_DAYS and found.count:
        # the share of rows in categories that no day outside the block has
        block = max(1, min(block, side.days // LEAST_DAYS))
        sums = np.cumsum(np.concatenate([np.zeros_like(found.counts[:1]), found.counts]), axis=0)
        moving = sums[block:] - sums[:-block]
        alone = np.where(moving == found.total(), moving, 0).sum(axis=1)
        unseen = Tail(alone / np.maximum(moving.sum(axis=1), 1))
    return _Reference("categorical", found, counted, _null_counts(name, side, found.nulls), kept=kept, unseen=unseen)


class Baseline:
    """A reference, compressed once and used for any number of days: its columns, its days' volume, and what chance does.

    Its size does not depend on its rows. ``said`` says which days and versions it was, for the record. ``winsorise`` as in
    DriftSpec: what is judged beside it is drawn to the same bounds.
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        numeric: Sequence[str],
        categorical: Sequence[str],
        block: int = 1,
        said: Mapping[str, Any] | None = None,
        winsorise: float | None = DriftSpec.model_fields["winsorise"].default,
    ) -> None:
        if table.num_rows == 0:
            raise DriftImpossible("the reference window has no rows; materialise the features of its days first")
        side = _Side(table)
        self.said = dict(said or {})
        self.rows, self.days, self.dated = side.rows, side.days, side.dated
        self.by_day, self.names = side.by_day, tuple(table.schema.names)
        numbers = [n for n in numeric if n in self.names]
        here = [*numbers, *(n for n in categorical if n in self.names)]

        def compressed(name: str) -> _Reference:
            return (
                _numeric_reference(side, name, winsorise)
                if name in numbers
                else _categorical_reference(side, name, block)
            )

        self.columns = dict(zip(here, _each(compressed, here, side.rows), strict=True))


@dataclass(frozen=True)
class _Signal:
    """One thing judged of a column: how large it is, its floor, and the chance of that with nothing changed (``chance`` itself,
    or asked of ``null`` when it is needed: resampling takes longer than everything else)."""

    column: str
    what: str
    effect: float
    floor: float
    known: float | None
    moved: float
    text: str
    null: Callable[[], Null] | None = None
    cannot_wait: bool = False
    of_share: bool = True

    @cached_property
    def chance(self) -> float:
        if self.known is None:
            assert self.null is not None
            return self.null().chance(self.effect)
        return self.known

    @property
    def large(self) -> bool:
        return self.effect >= self.floor and self.moved > LEAST_MOVED - 0.5

    def is_grave(self, times: float) -> bool:
        """Whether it is too large to wait: so many times its floor; for shares half of all is always enough."""
        enough = times * self.floor
        return self.cannot_wait or self.effect >= (min(enough, GRAVE_SHARE) if self.of_share else enough)


@dataclass
class _Judged:
    """One window beside the reference, before correction over the columns."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    signals: list[_Signal] = field(default_factory=list)
    sides: dict[str, _Numbers | _Texts] = field(default_factory=dict)


def _nulls(name: str, now: Counts, rows: int, before: _Reference, block: int, spec: DriftSpec) -> list[_Signal]:
    share = float(now.sum()) / rows
    usual = float(before.nulls.counts[:, 0].sum() / before.nulls.counts.sum())
    if share == usual:
        return []
    gap = abs(share - usual)
    text = f"nulls {usual:.0%} → {share:.0%}"
    null = partial(before.nulls.null, rows, block)
    return [_Signal(name, "nulls", gap, spec.null_share_change, None, gap * rows, text, null)]


def _numeric(
    name: str, now: _Numbers, before: _Reference, block: int, spec: DriftSpec, entry: dict[str, Any]
) -> list[_Signal]:
    assert before.counted is not None and isinstance(before.side, _Numbers)
    distance, apart = wasserstein(now.values, before.side.values, before.norm)
    null = partial(before.counted.null, now.count, block)
    entry["distance"] = distance
    return [
        _Signal(
            name,
            "distance",
            distance,
            spec.numeric_threshold,
            None,
            apart * now.count,
            "",
            null,
            of_share=False,
        )
    ]


def _aligned(now: _Texts, before: _Texts, kept: int) -> tuple[Counts, Counts, list[str]]:
    """Counts of both windows over the same categories: the reference's most frequent, the new ones (where the reference has
    no rest to put them into), and the rest."""
    place = {c: n for n, c in enumerate(now.names)}
    here, there = now.total(), before.total()
    names = list(before.names[:kept])
    found = np.array([here[place[c]] if c in place else 0 for c in names], dtype=np.int64)
    rest = int(there[kept:].sum())
    known = set(before.names)
    new = [] if rest else [c for c in now.names if c not in known][:_SHOWN]
    mine = np.concatenate([found, [here[place[c]] for c in new]]).astype(np.int64)
    theirs = np.concatenate([there[:kept], np.zeros(len(new), np.int64)]).astype(np.int64)
    others = (int(here.sum()) - int(mine.sum()), rest)
    if any(others):
        mine, theirs = np.append(mine, others[0]), np.append(theirs, others[1])
        return mine, theirs, [*names, *new, OTHERS]
    return mine, theirs, [*names, *new]


def _categorical(
    name: str, now: _Texts, before: _Reference, dated: bool, block: int, spec: DriftSpec, entry: dict[str, Any]
) -> list[_Signal]:
    assert before.counted is not None and isinstance(before.side, _Texts)
    there = before.side
    mine, theirs, _ = _aligned(now, there, before.kept)
    shares = [c / c.sum() for c in (mine, theirs)]
    distance = float(jensen_shannon(*shares))
    null = partial(before.counted.null, now.count, block)
    entry["distance"] = distance
    moved = float(np.abs(shares[0] - shares[1]).sum()) / 2 * now.count
    signals = [_Signal(name, "distance", distance, spec.categorical_threshold, None, moved, "", null)]
    raw = dict(zip(now.names, now.total().tolist(), strict=True))
    usual = there.total()
    # vanished: present on every day of the reference, and now not once
    wanted = (usual / usual.sum() >= spec.category_share) & (there.counts > 0)[there.counts.sum(axis=1) > 0].all(axis=0)
    if wanted.any():
        chances = chance_of_none(there.counts[:, wanted], there.counts.sum(axis=1), now.count) * int(wanted.sum())
        gone = np.array([raw.get(c, 0) == 0 for c, w in zip(there.names, wanted, strict=True) if w])
        if gone.any():
            lost = [(c, usual[n] / usual.sum()) for n, c in enumerate(there.names) if wanted[n] and c not in raw]
            text = "vanished: " + ", ".join(f"{c} ({s:.1%} of the reference)" for c, s in lost[:3])
            biggest = max(s for _, s in lost)
            least = float(min(1.0, chances[gone].min()))
            expected = biggest * now.count
            signals.append(
                _Signal(name, "vanished", biggest, spec.category_share, least, expected, text, cannot_wait=True)
            )
    known = set(there.names)
    unseen = [c for c in now.names if c not in known]
    if unseen:
        rows = sum(raw[c] for c in unseen)
        share = rows / now.count
        if before.unseen is not None:
            chance = before.unseen.chance(share)
        else:
            # without days: how often a category of the reference came once says how much is yet unseen (Good-Turing)
            expected = now.count * (int((usual == 1).sum()) + 1) / usual.sum()
            chance = float(np.exp(-expected + rows - rows * np.log(rows / expected))) if rows > expected else 1.0
        text = f"new: {', '.join(unseen[:3])}{', …' if len(unseen) > 3 else ''} ({share:.1%} of the rows)"
        signals.append(_Signal(name, "new", share, spec.category_share, chance, rows, text))
    entry["rare_moved"] = _rare(now, there, raw, spec.false_alarms)
    return signals


def _rare(now: _Texts, before: _Texts, raw: Mapping[str, int], level: float) -> list[str]:
    """Categories rarer than 1 in 10,000 on both sides whose raw counts moved by more than chance and a factor of three."""
    usual = dict(zip(before.names, before.total().tolist(), strict=True))
    rows = (now.count, before.count)
    names = [
        c
        for c in sorted({*raw, *usual})
        if raw.get(c, 0) < RARE * rows[0] and usual.get(c, 0) < RARE * rows[1] and raw.get(c, 0) + usual.get(c, 0) > 3
    ]
    if not names:
        return []
    here, there = (np.array([side.get(c, 0) for c in names], dtype=np.int64) for side in (raw, usual))
    chances = chance_of_moved(here, there, rows) * len(names)
    rates = (here + 0.5) / rows[0], (there + 0.5) / rows[1]
    far = np.abs(np.log(rates[0] / rates[1])) >= np.log(RARE_FACTOR)
    found = np.flatnonzero((chances <= level) & far)
    found = found[np.argsort(chances[found], kind="stable")][:_SHOWN]
    return [f"{names[n]}: {there[n]} of {rows[1]} → {here[n]} of {rows[0]}" for n in found]


def _beside(side: _Side, baseline: Baseline, names: Mapping[str, str], block: int, spec: DriftSpec) -> _Judged:
    """Every column of one window beside the reference."""

    def column(name: str) -> tuple[dict[str, Any], _Numbers | _Texts | None, list[_Signal]]:
        kind = names[name]
        here, before = name in side.table.schema.names, baseline.columns.get(name)
        entry: dict[str, Any] = {
            "distance": None, "method": _METHODS[kind], "threshold": None, "chance": None, "drifted": False, "grave": False,
            "importance": None, "null_share_current": None, "null_share_reference": None, "new_categories": [],
            "vanished_categories": [], "rare_moved": [], "judged": False, "reason": None, "winsorised": None,
        }  # fmt: skip
        if not here and before is None:
            raise DriftImpossible(
                f"column {name!r} is in neither window; correct features.{kind} in workflow.yaml or the features' SQL"
            )
        if not here:
            entry |= {"drifted": True, "grave": True, "reason": "missing from the current window"}
            return entry, None, []
        now: _Numbers | _Texts
        if kind == "numeric":
            ordered, _, nulls = _sorted(side, name, by_day=False)
            entry["winsorised"] = _winsorised(ordered, before.bounds) / max(len(ordered), 1) if before else 0.0
            now = _Numbers.of(side, ordered, nulls)
        else:
            now = _Texts.of(side, name)
        if before is None or (not before.side.count and now.count):
            entry["reason"] = f"new: the reference window {'lacks it' if before is None else 'has no value of it'}"
            return entry, None, []
        entry["null_share_current"] = float(now.nulls.sum()) / side.rows
        entry["null_share_reference"] = float(before.nulls.counts[:, 0].sum() / before.nulls.counts.sum())
        signals = _nulls(name, now.nulls, side.rows, before, block, spec)
        if isinstance(now, _Texts) and isinstance(before.side, _Texts):
            known, found = set(before.side.names), set(now.names)
            entry["new_categories"] = [c for c in now.names if c not in known][:_SHOWN]
            entry["vanished_categories"] = [c for c in before.side.names if c not in found][:_SHOWN]
        if min(now.count, before.side.count) < spec.min_rows:
            entry["reason"] = f"{now.count} values beside {before.side.count}: too few for a distance"
            return entry, now, signals
        entry["judged"] = True
        if isinstance(now, _Numbers):
            signals += _numeric(name, now, before, block, spec, entry)
        else:
            signals += _categorical(name, now, before, baseline.dated, block, spec, entry)
        return entry, now, signals

    judged = _Judged()
    for name, (entry, now, signals) in zip(names, _each(column, names, side.rows), strict=True):
        judged.entries[name] = entry
        judged.signals += signals
        if now is not None:
            judged.sides[name] = now
    return judged


@dataclass(frozen=True)
class Volume:
    """The rows of a mean day of a window beside a mean day of the reference."""

    ratio: float
    unlike: bool
    """Whether it is beyond its floor and what the reference's own days do."""
    text: str


def volume(rows: int, baseline: Baseline, spec: DriftSpec) -> Volume | None:
    """Judge how many rows came, by itself: none at all is a finding, and no reason to say nothing.

    ``rows``: those of the window's ``window_days``. None where the reference has too few days to know how they vary.
    """
    null = volume_null(baseline.by_day, spec.window_days) if baseline.dated else None
    if null is None:
        return None
    size, usual = rows / spec.window_days, baseline.rows / baseline.days
    moved = abs(math.log((size + 1) / (usual + 1)))
    unlike = moved >= math.log1p(spec.volume_change) and float(null.chance(moved)) <= VOLUME_LEVEL
    kind = "collapsed to" if size < usual else "grew to"
    text = f"{size:.3g} rows a day, {usual:.3g} in the reference"
    return Volume(size / usual, unlike, f"the volume {kind} {size / usual:.2f}×: {text}" if unlike else text)


@dataclass(frozen=True)
class Findings:
    """What the columns say, before Evidently has drawn them. ``names``: column → numeric | categorical."""

    names: dict[str, str]
    entries: dict[str, dict[str, Any]]
    sides: dict[str, _Numbers | _Texts]
    share: float
    importance_share: float
    weighted: bool
    grave: tuple[str, ...]
    volume: float
    volume_drifted: bool
    new_columns: tuple[str, ...]
    rows: int
    daily_rows: float
    spoke: bool


def _and(*texts: str | None) -> str | None:
    return "; ".join(t for t in texts if t) or None


def measure(
    current: pa.Table,
    baseline: Baseline,
    *,
    numeric: Sequence[str],
    categorical: Sequence[str],
    spec: DriftSpec,
    importances: Mapping[str, float] | None = None,
) -> Findings:
    """Judge a window beside a reference, without Evidently: the same figures, in milliseconds a column.

    ``importances``: column → share of the champion's gain (all of its columns add up to 1); None: every column counts alike.
    Every column is judged over the whole window, and the newest day also by itself, for what is too large to wait.
    Raises as ``drift``.
    """
    if current.num_rows == 0:
        raise DriftImpossible("the current window has no rows; materialise the features of its days first")
    names = {**dict.fromkeys(numeric, "numeric"), **dict.fromkeys(categorical, "categorical")}
    side = _Side(current)
    block = side.days if side.dated else 1
    judged = _beside(side, baseline, names, block, spec)
    entries = judged.entries
    chances = _each(lambda signal: signal.chance, judged.signals, side.rows)
    rejected, cut = benjamini_hochberg(chances, spec.false_alarms)
    for signal, is_rejected in zip(judged.signals, rejected, strict=True):
        entry = entries[signal.column]
        if signal.what == "distance" and signal.null is not None:
            entry["chance"] = signal.chance
            entry["threshold"] = max(signal.floor, signal.null().at(cut))
        if is_rejected and signal.large:
            far = (
                f"distance {signal.effect:.3g} of {entry['threshold']:.3g}"
                if signal.what == "distance"
                else signal.text
            )
            entry |= {"drifted": True, "reason": _and(entry["reason"], far)}
    scales = [("", judged)]
    if block > 1:
        scales.append(("the newest day alone: ", _beside(side.newest(), baseline, names, 1, spec)))
    for which, one in scales:
        # of what is not that large nobody asks the chance: it counts as 1, which makes the correction stricter
        large = [s.large and s.is_grave(spec.grave) for s in one.signals]
        alone, _ = benjamini_hochberg(
            [s.chance if asked else 1.0 for s, asked in zip(one.signals, large, strict=True)], GRAVE_LEVEL
        )
        for signal, is_rejected, is_large in zip(one.signals, alone, large, strict=True):
            if is_rejected and is_large:
                entry = entries[signal.column]
                text = signal.text or f"distance {signal.effect:.3g}"
                entry["reason"] = _and(entry["reason"], which + text) if which else entry["reason"]
                entry |= {"drifted": True, "grave": True}
    # volume: days of the window without any row count as empty days
    days = max(side.days, 1) if side.dated else 1
    usual = baseline.rows / max(baseline.days if baseline.dated else spec.reference_days, 1)
    volume = side.rows / days / usual
    volume_drifted, volume_grave = False, False
    change = math.log1p(spec.volume_change)
    if baseline.dated and side.dated:
        for size, length in ((side.rows / days, block), (float(side.by_day[-1]), 1)):
            moved = abs(math.log((size + 1) / (usual + 1)))
            null = volume_null(baseline.by_day, length)
            if null is None or moved < change:
                continue
            chance = float(null.chance(moved))
            volume_drifted |= length == block and chance <= spec.false_alarms / max(len(names), 1)
            volume_grave |= length == 1 and moved >= GRAVE_VOLUME * change and chance <= GRAVE_LEVEL
    weighted = importances is not None and any(importances.get(n, 0.0) > 0 for n in names)
    for name, entry in entries.items():
        entry["importance"] = float((importances or {}).get(name, 0.0)) if weighted else 1 / len(names)
    share = sum(e["drifted"] for e in entries.values()) / len(entries)
    importance_share = float(sum(e["importance"] for e in entries.values() if e["drifted"]))
    grave = [f"{n} ({e['reason'] or 'moved far'})" for n, e in entries.items() if e["grave"]]
    grave += [f"volume {volume:.2f}×"] if volume_grave else []
    spoke = share >= spec.share or bool(grave) or volume_drifted
    spoke |= weighted and importance_share >= spec.importance_share
    known = {*names, "day", "entity_id", "moment"}
    new = tuple(c for c in current.schema.names if c not in baseline.names and c not in known)
    return Findings(
        names, entries, judged.sides, share, importance_share, weighted, tuple(grave), volume,
        volume_drifted or volume_grave, new, side.rows, side.rows / days, spoke,
    )  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """A column as Evidently gets it: at most DRAWN_ROWS rows a side."""

    current: Any
    reference: Any
    threshold: float
    distance: float = float("nan")
    """Between exactly these rows: what Evidently must find."""


def _pair(now: _Numbers | _Texts, rows: int, before: _Reference, before_rows: int, threshold: float) -> _Pair:
    if isinstance(now, _Numbers) and isinstance(before.side, _Numbers):
        sides = now.filled(rows), before.side.filled(before_rows)
        held = [one[~np.isnan(one)] for one in sides]
        distance, _ = wasserstein(held[0], held[1], max(float(np.std(held[1])), LEAST_DEVIATION))
        # Evidently also plots along the row number: sorted values would look like a trend.
        mixed = [np.random.default_rng(0).permutation(one) for one in sides]
        return _Pair(mixed[0], mixed[1], threshold, distance)
    assert isinstance(now, _Texts) and isinstance(before.side, _Texts)
    mine, theirs, names = _aligned(now, before.side, before.kept)
    filled, shares = [], []
    for counts, total in ((mine, rows), (theirs, before_rows)):
        sizes = counts
        if total > DRAWN_ROWS:
            sizes = compress_counts(counts, max(1, round(DRAWN_ROWS * int(counts.sum()) / total)))
        column = np.full(min(total, DRAWN_ROWS), None, dtype=object)
        column[: int(sizes.sum())] = np.repeat(np.array(names, dtype=object), sizes)
        filled.append(column)
        shares.append(sizes / sizes.sum())
    return _Pair(filled[0], filled[1], threshold, float(jensen_shannon(*shares)))


def _run(columns: dict[str, tuple[str, _Pair]], share: float) -> tuple[Any, dict[str, float]]:
    """Evidently's snapshot and the distance of each column."""
    import pandas as pd

    evidently = _evidently()
    from evidently.metrics import DriftedColumnsCount, MissingValueCount, RowCount, ValueDrift

    by_kind = {kind: [n for n, (k, _) in columns.items() if k == kind] for kind in _METHODS}
    definition = evidently.DataDefinition(
        numerical_columns=by_kind["numeric"], categorical_columns=by_kind["categorical"]
    )
    # The share is over Evidently's columns alone; nulls and vanished columns are counted in DriftReport.
    metrics = [
        DriftedColumnsCount(
            drift_share=share,
            num_method=_METHODS["numeric"],
            cat_method=_METHODS["categorical"],
            per_column_threshold={n: p.threshold for n, (_, p) in columns.items()},
        ),
        *(ValueDrift(column=n, method=_METHODS[k], threshold=p.threshold) for n, (k, p) in columns.items()),
        RowCount(),
        *(MissingValueCount(column=n) for n in columns),
    ]
    sides = [
        evidently.Dataset.from_pandas(pd.DataFrame({n: getattr(p, side) for n, (_, p) in columns.items()}), definition)
        for side in ("current", "reference")
    ]
    with np.errstate(all="ignore"):
        snapshot = evidently.Report(metrics).run(*sides, timestamp=datetime(1970, 1, 1))
    found = {
        m["config"]["column"]: float(m["value"])
        for m in snapshot.dict()["metrics"]
        if m["config"]["type"].endswith(":ValueDrift")
    }
    return snapshot, found


def _drawn(measured: dict[str, tuple[str, _Pair]], spec: DriftSpec) -> Any:
    """Evidently's snapshot; of the rows that it gets its distances must be ours."""
    try:
        snapshot, distances = _run(measured, spec.share)
    except Exception as error:
        # Evidently does not say which column it was.
        for name, one in measured.items():
            try:
                _run({name: one}, spec.share)
            except Exception as cause:
                raise DriftImpossible(
                    f"column {name!r}: Evidently could not judge it ({type(cause).__name__}: {cause}); "
                    "leave it out of the features, or correct its values or its kind"
                ) from error
        raise
    for name in measured:
        distance = distances.get(name, float("nan"))
        if not np.isfinite(distance):
            raise DriftImpossible(
                f"column {name!r}: Evidently gave no distance; leave it out of the features, or correct its kind"
            )
        # of the same rows: all rows' own distance differs from it by what the compression to Evidently's rows rounds off
        ours = measured[name][1].distance
        if abs(distance - ours) > 1e-6 * max(ours, 1.0):
            raise DriftImpossible(
                f"column {name!r}: Evidently measures {distance:.6g} where the same rows give {ours:.6g}; "
                "report it, and leave the column out of the features until then"
            )
    return snapshot


def drift(
    current: pa.Table,
    reference: pa.Table | Baseline,
    *,
    numeric: Sequence[str],
    categorical: Sequence[str],
    spec: DriftSpec,
    importances: Mapping[str, float] | None = None,
    title: str = "Drift of the features",
    plots: bool = True,
) -> DriftReport:
    """Compare a window with a reference, column by column.

    Every row counts. A column that the current window lacks has drifted; one that only the reference lacks is new and
    is named. Columns with too few values are judged by their share of nulls alone. Days (a column ``day``, date) on both
    sides let whole days be resampled; without them rows are taken as independent. ``plots``: have Evidently measure and draw
    it too (``snapshot`` is None otherwise). Raises DriftImpossible for a column that is
    in neither window, is of the wrong type, or that Evidently cannot judge, and where nothing can be measured.
    """
    for side, rows in (("current", current.num_rows), ("reference", getattr(reference, "num_rows", 1))):
        if rows == 0:
            raise DriftImpossible(f"the {side} window has no rows; materialise the features of its days first")
    if not isinstance(reference, Baseline):
        reference = Baseline(
            reference, numeric=numeric, categorical=categorical, block=spec.window_days, winsorise=spec.winsorise
        )
    found = measure(current, reference, numeric=numeric, categorical=categorical, spec=spec, importances=importances)
    columns = found.entries
    measured = {
        n: (
            found.names[n],
            _pair(found.sides[n], found.rows, reference.columns[n], reference.rows, columns[n]["threshold"]),
        )
        for n, c in columns.items()
        if c["judged"]
    }
    if not measured:
        raise DriftImpossible(
            f"no column has {spec.min_rows} values in both windows; lower drift.min_rows or look at the features"
        )
    snapshot = _drawn(measured, spec) if plots else None
    rows = (found.rows, reference.rows)
    return DriftReport(
        columns, found.share, found.importance_share, found.weighted, found.spoke, found.grave, found.volume,
        found.volume_drifted, found.new_columns, rows, found.daily_rows, reference.said,
        _page(title, found, rows, reference.said, spec), snapshot,
    )  # fmt: skip


def sentence(report: DriftReport) -> str:
    """The report in one sentence, with the columns that moved most."""
    moved = [(n, c) for n, c in report.columns.items() if c["drifted"]]
    moved.sort(key=lambda e: (-((e[1]["distance"] or 0.0) / e[1]["threshold"] if e[1]["threshold"] else np.inf), e[0]))
    named = "; ".join(f"{n} ({c['reason']})" for n, c in moved[:5]) + ("; …" if len(moved) > 5 else "")
    unmeasured = ", ".join(n for n, c in report.columns.items() if not c["judged"])
    text = f"{len(moved)} of {len(report.columns)} columns drifted"
    text += f" with {report.importance_share:.0%} of the model's gain" if report.weighted and moved else ""
    text += f", volume {report.volume:.2f}×{' (drifted)' if report.volume_drifted else ''}"
    text += f": {named}" if named else ""
    text += f"; new columns: {', '.join(report.new_columns)}" if report.new_columns else ""
    return text + (f"; not measured: {unmeasured}" if unmeasured else "")


def _page(title: str, found: Findings, rows: tuple[int, int], said: Mapping[str, Any], spec: DriftSpec) -> str:
    def worst_first(item: tuple[str, dict[str, Any]]) -> tuple[bool, bool, float]:
        entry = item[1]
        return not entry["grave"], not entry["drifted"], -(entry["distance"] or 0.0) / (entry["threshold"] or 1.0)

    rest = (
        "distance", "threshold", "chance", "method", "importance", "null_share_current", "null_share_reference",
        "new_categories", "vanished_categories", "rare_moved",
    )  # fmt: skip
    body: list[tuple[str, list[Any]]] = []
    for name, entry in sorted(found.entries.items(), key=worst_first):
        state, word = ("good", "stable") if entry["judged"] else ("warn", "not measured")
        if entry["drifted"]:
            state, word = "bad", "drifted"
        body.append((state, [word, name, *(entry[k] for k in rest), entry["reason"]]))
    lead = [
        f"{'DRIFTED' if found.spoke else 'Stable'}: {found.share:.0%} of the columns drifted; from {spec.share:.0%} the day "
        f"speaks, and {spec.k} of {spec.m} days must speak before drift is found.",
        f"{rows[0]} rows beside {rows[1]} of the reference; a mean day has {found.volume:.2f} times its rows"
        + (", more than its days vary." if found.volume_drifted else "."),
    ]
    if found.weighted:
        lead.append(
            f"The drifted columns carry {found.importance_share:.0%} of the champion's gain; from "
            f"{spec.importance_share:.0%} the day speaks."
        )
    if found.grave:
        lead.append(f"Cannot wait for a second day: {'; '.join(found.grave)}.")
    if found.new_columns:
        lead.append(f"Columns that the reference does not have: {', '.join(found.new_columns)}.")
    if said:
        lead.append("Reference: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in said.items()) + ".")
    lead.append(
        "Distances as Evidently measures them: Wasserstein in standard deviations for numbers, Jensen-Shannon for categories."
        " The threshold is the floor or what resampled days of the reference pass by chance, whichever is larger, corrected"
        " over all columns. Plots are in the Evidently UI."
    )
    return page(
        title,
        lead,
        ["", "column", *(k.replace("_", " ") for k in rest), "remark"],
        body,
    )


def save(
    workspace_path: str, project_name: str, report: DriftReport, *, timestamp: datetime, tags: Sequence[str] = ()
) -> tuple[str, str]:
    """Put a report's snapshot into an Evidently workspace; returns the ids of its project and of itself.

    One snapshot a project and day (of ``timestamp``): saving again replaces it. A new project gets panels of the share
    of drifted columns and of every column's distance, null share, and of the volume, over time. In the UI a snapshot lies under
    ``/projects/<project>/reports/<snapshot>``.
    """
    _evidently()
    from evidently.sdk.models import DashboardModel, DashboardTabModel, PanelMetric, ProjectModel
    from evidently.sdk.panels import line_plot_panel
    from evidently.ui.workspace import Workspace

    project = uuid5(_NAMESPACE, project_name)
    snapshot = uuid5(project, timestamp.date().isoformat())
    workspace = Workspace(workspace_path)
    if workspace.get_project(project) is None:
        workspace.add_project(
            ProjectModel(
                id=project, name=project_name, description="Each day's features beside those of the days before"
            )
        )
        panels = [
            line_plot_panel(
                "Share of drifted columns",
                [PanelMetric(legend="share", metric="DriftedColumnsCount", metric_labels={"value_type": "share"})],
            ),
            line_plot_panel("Distance of each column", [PanelMetric(metric="ValueDrift")]),
            line_plot_panel("Rows of a mean day", [PanelMetric(legend="rows", metric="RowCount")]),
            line_plot_panel(
                "Share of nulls in each column",
                [PanelMetric(metric="MissingValueCount", metric_labels={"value_type": "share"})],
            ),
        ]
        for panel in panels:
            panel.id = uuid5(project, panel.title)
        tab = DashboardTabModel(id=uuid5(project, "tab"), title="Drift", panels=[p.id for p in panels])
        workspace.save_dashboard(project, DashboardModel(tabs=[tab], panels=panels))
    model = report.snapshot.to_snapshot_model()
    model.name, model.timestamp, model.tags = f"{project_name} {timestamp:%Y-%m-%d}", timestamp, list(tags)
    model.metadata = {
        "share_drifted": f"{report.share_drifted:.4f}",
        "importance_share": f"{report.importance_share:.4f}",
        "volume": f"{report.volume:.4f}",
        **{f"reference_{k}": str(v) for k, v in report.reference.items()},
    }
    for result in model.metric_results.values():
        params = result.metric_value_location.metric.params
        # The UI starts another line wherever a parameter differs, and thresholds move with the number of rows.
        for moving in ("threshold", "per_column_threshold"):
            params.pop(moving, None)
        # Evidently saw the compressed rows: what every row says takes the place of what it counted there.
        if params["type"].endswith(":RowCount"):
            result.value = report.daily_rows
        elif params["type"].endswith(":MissingValueCount"):
            share = report.columns[params["column"]]["null_share_current"]
            result.count.value, result.share.value = float(round(share * report.rows[0])), share
        elif params["type"].endswith(":ValueDrift"):
            result.value = report.columns[params["column"]]["distance"]
        elif params["type"].endswith(":DriftedColumnsCount"):
            result.share.value = report.share_drifted
            result.count.value = float(sum(c["drifted"] for c in report.columns.values()))
    workspace.state.write_snapshot(project, snapshot, model)
    return str(project), str(snapshot)
