"""Columns as drift sees them: compressed to quantiles or counts, of the day and of its reference.

Belongs here: compressing, null counts, the baseline that is made once. Does not: what is far (``data_checks.drift.judge``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_checks.drift.calibration import (
    LEAST_DAYS,
    Counted,
    Counts,
    Floats,
    Tail,
    cells,
    compress_numbers,
    counts_in,
    means_of,
    standard_deviation,
)
from data_checks.drift.course import Course, Trend, of_categories, of_numbers
from data_checks.drift.spec import (
    DRAWN_ROWS,
    FULL_ROWS,
    LEAST_DEVIATION,
    MANY_RUNS,
    MAX_CATEGORIES,
    MOST_THREADS,
    THREADED_ROWS,
    Asked,
    DriftImpossible,
    DriftSpec,
    Made,
)


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


class Side:
    """One window: its rows in the order of their days, and where each day begins."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.rows = table, table.num_rows
        self.starts = np.array([0, self.rows])
        self.dates = np.zeros(1)
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
            self.dates = days[self.starts[:-1]].astype(np.float64)

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


def in_threads(judge: Callable[[Asked], Made], asked: Iterable[Asked], rows: int) -> list[Made]:
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


def winsorised(ordered: Floats, bounds: tuple[float, float]) -> int:
    """Draws what lies beyond the bounds to them, in place (``ordered`` ascending); returns how many values."""
    first, last = (int(np.searchsorted(ordered, bounds[0], "left")), int(np.searchsorted(ordered, bounds[1], "right")))
    ordered[:first], ordered[last:] = bounds
    return int(first + len(ordered) - last)


def sorted_values(side: Side, name: str, *, by_day: bool) -> tuple[Floats, list[Floats], Counts]:
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
class Numbers:
    """A column of numbers in one window: the sorted values (compressed where they are many), how many there are, and their
    standard deviation, over every row, and the counts of nulls a day."""

    values: Floats
    count: int
    nulls: Counts
    deviation: float

    @classmethod
    def of(cls, side: Side, ordered: Floats, nulls: Counts) -> Numbers:
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
class Texts:
    """A column of categories in one window: counts (days × names, the most frequent first), nulls a day."""

    names: tuple[str, ...]
    counts: Counts
    nulls: Counts

    @classmethod
    def of(cls, side: Side, name: str) -> Texts:
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
class Reference:
    """One column of the reference, compressed, with what chance alone does to it."""

    kind: str
    side: Numbers | Texts
    counted: Counted | None
    nulls: Counted
    norm: float = 1.0
    bounds: tuple[float, float] = (-math.inf, math.inf)
    kept: int = 0
    unseen: Tail | None = None
    trend: Trend | None = None


def _numeric_reference(side: Side, name: str, winsorise: float | None) -> Reference:
    ordered, slices, nulls = sorted_values(side, name, by_day=True)
    bounds = _bounds(ordered, winsorise)
    for one in (ordered, *slices):
        winsorised(one, bounds)
    found = Numbers.of(side, ordered, nulls)
    counted, norm, trend = None, 1.0, None
    if found.count:
        norm = max(found.deviation, LEAST_DEVIATION)
        filled = np.array([len(one) > 0 for one in slices])
        slices = [one for one in slices if len(one)]
        course = of_numbers(slices, side.dates[filled]) if side.dated else Course()
        trend = course.trend
        if trend is not None:  # what days vary by beside it
            slices = trend.still(slices)
            ordered = np.sort(np.concatenate(slices))
        inner = cells(ordered)
        counted = Counted(name, counts_in(slices, inner), np.diff(means_of(ordered, inner)) / norm, course)
    return Reference("numeric", found, counted, _null_counts(name, side, nulls), norm, bounds, trend=trend)


def _null_counts(name: str, side: Side, nulls: Counts) -> Counted:
    return Counted(f"{name}:nulls", np.stack([nulls, side.by_day - nulls], axis=1), np.ones(1))


def _categorical_reference(side: Side, name: str, block: int) -> Reference:
    found = Texts.of(side, name)
    kept = min(len(found.names), MAX_CATEGORIES)
    cut = np.concatenate([found.counts[:, :kept], found.counts[:, kept:].sum(axis=1, keepdims=True)], axis=1)
    filled = cut.sum(axis=1) > 0
    course = of_categories(cut[filled].astype(np.float64), side.dates[filled]) if side.dated else Course()
    counted = Counted(name, cut, None, course) if found.count else None
    unseen = None
    if side.days >= LEAST_DAYS and found.count:
        # the share of rows in categories that no day outside the block has
        block = max(1, min(block, side.days // LEAST_DAYS))
        sums = np.cumsum(np.concatenate([np.zeros_like(found.counts[:1]), found.counts]), axis=0)
        moving = sums[block:] - sums[:-block]
        alone = np.where(moving == found.total(), moving, 0).sum(axis=1)
        unseen = Tail(alone / np.maximum(moving.sum(axis=1), 1))
    return Reference("categorical", found, counted, _null_counts(name, side, found.nulls), kept=kept, unseen=unseen)


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
        side = Side(table)
        self.said = dict(said or {})
        self.rows, self.days, self.dated = side.rows, side.days, side.dated
        self.by_day, self.names = side.by_day, tuple(table.schema.names)
        numbers = [n for n in numeric if n in self.names]
        here = [*numbers, *(n for n in categorical if n in self.names)]

        def compressed(name: str) -> Reference:
            return (
                _numeric_reference(side, name, winsorise)
                if name in numbers
                else _categorical_reference(side, name, block)
            )

        self.columns = dict(zip(here, in_threads(compressed, here, side.rows), strict=True))
