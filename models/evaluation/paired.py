"""Two models on the same held-out rows: what each row cost either of them, and how sure the difference is.

Belongs here: per-row losses by metric, slices, groups. Does not: intervals (``models.evaluation.bootstrap``), what follows from a
difference (``models.evaluation.gate``), or what a policy would make of the scores (``models.evaluation.off_policy``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models import catalog
from models.evaluation.bootstrap import Days, Floats, Interval, Ints, plain
from models.learners.base import Comparison

SAME = 1e-6
"""Relative difference up to which two figures, and two models' scores, are the same: another number of threads moves more
digits than the last, and no other recipe moves as few."""


def comparable(kind: str) -> bool:
    """Whether models of a kind can be compared; one that cannot be passes no gate."""
    return kind in catalog.KINDS and catalog.KINDS[kind].comparison is not None


def comparison(kind: str) -> Comparison:
    """How models of a kind are compared. Raises KeyError where that is declared absent, with the reason."""
    found = catalog.KINDS[kind].comparison
    if found is None:
        raise KeyError(catalog.why_not(kind, "comparison"))
    return found


def same(one: Any, other: Any, rows: pa.Table) -> bool:
    """Whether two models are one: the same files, or the same scores of every row of ``rows`` but for rounding."""
    if one is other or one.files() == other.files():
        return True
    if not rows.num_rows:
        return False
    mine, theirs = one.score(rows), other.score(rows)
    return bool(
        mine.column_names == theirs.column_names
        and all(_equal(mine.column(c), theirs.column(c)) for c in mine.column_names)
    )


def _equal(mine: pa.ChunkedArray, theirs: pa.ChunkedArray) -> bool:
    if pa.types.is_list(mine.type) and pa.types.is_list(theirs.type):
        mine, theirs = (pa.chunked_array([pc.list_flatten(one.combine_chunks())]) for one in (mine, theirs))
    if not (pa.types.is_floating(mine.type) and pa.types.is_floating(theirs.type)):
        return bool(mine.equals(theirs))
    a, b = (np.asarray(one.to_numpy(), dtype=np.float64) for one in (mine, theirs))
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=SAME, atol=0, equal_nan=True))


def disagreement(kind: str, one: Any, other: Any, rows: pa.Table) -> tuple[float, int]:
    """How far two models' scores of ``rows`` lie apart, and of how many rows that speaks: those that both score.

    The mean square for probabilities, for amounts the mean square of the relative difference, weighted by the amount. NaN
    where no row has both scores."""
    if not rows.num_rows:
        return float("nan"), 0
    how = comparison(kind)
    mine, theirs = how.says(one, rows), how.says(other, rows)
    both = np.isfinite(mine) & np.isfinite(theirs)
    return how.apart(mine[both], theirs[both]) if both.any() else float("nan"), int(both.sum())


def known(kind: str, rows: pa.Table) -> tuple[pa.Table, Floats]:
    """The rows whose outcome is known, and the outcome as float64 (n,)."""
    column = comparison(kind).actual
    found = rows.filter(pc.is_valid(rows.column(column)))
    actual = found.column(column)
    actual = actual.cast(pa.int8()) if pa.types.is_boolean(actual.type) else actual
    return found, np.asarray(actual.cast(pa.float64()).to_numpy(), dtype=np.float64)


def losses(kind: str, metric: str, predicted: Floats, actual: Floats) -> Floats | None:
    """Loss of each row (n,); None where the metric is no mean over rows (ROC AUC), so that it has no interval."""
    how = comparison(kind).losses.get(metric)
    return None if how is None else np.asarray(how(predicted, actual), dtype=np.float64)


def _relative(mine: Floats, theirs: Floats) -> Floats:
    return np.asarray((mine - theirs) / theirs)


def harm(days: Days, mine: Floats, theirs: Floats) -> Interval:
    """How much more the candidate loses than the other, as a share of what the other loses: positive is worse.

    mine, theirs: losses of the same rows (n,), 0 or more.
    """
    same = np.array_equal(mine, theirs)  # 0 / 0 is no difference either
    sums = days.sums(mine), days.sums(theirs)
    return days.interval(_relative if not same else lambda a, b: np.zeros(a.shape), *sums)


@dataclass(frozen=True)
class Slice:
    """One value of a declared column: how much worse the candidate is there, and whether that is more than noise."""

    column: str
    value: str
    harm: Interval
    mine: float
    theirs: float
    real: bool
    """Held by Benjamini-Hochberg over all slices."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**{k: plain(v) for k, v in asdict(self).items() if k != "harm"}, "harm": self.harm.as_dict()}


def labels(rows: pa.Table, column: str) -> tuple[list[str], Ints]:
    """A column's distinct values in order as text, and each row's place among them; a null reads ``(none)``.

    Raises KeyError naming the columns that there are.
    """
    if column not in rows.column_names:
        raise KeyError(
            f"column {column!r} is missing, training.gate names it; the features have {', '.join(rows.column_names)}"
        )
    texts = pc.fill_null(rows.column(column).cast(pa.string()), "(none)").combine_chunks()
    names = sorted(pc.unique(texts).to_pylist())
    return names, np.asarray(pc.index_in(texts, value_set=pa.array(names, pa.string())), dtype=np.int64)


def slices(
    rows: pa.Table, columns: Sequence[str], days: Days, mine: Floats, theirs: Floats, *, min_rows: int, alpha: float
) -> list[Slice]:
    """Every value of the columns that has ``min_rows`` rows, in the order of columns and values.

    mine, theirs: losses of ``rows``. ``real`` controls the false discovery rate over all slices at ``alpha``.
    """
    named, found = [], []
    for column in columns:
        names, code = labels(rows, column)
        size = np.bincount(code, minlength=len(names))
        kept = np.flatnonzero(size >= min_rows)
        a, b = (days.sums(x, code, len(names))[:, kept] for x in (mine, theirs))
        differ = (days.sums((mine != theirs).astype(np.float64), code, len(names)).sum(axis=0) > 0)[kept]
        # where all losses are the same there is no difference, whatever 0 / 0 says
        figure = lambda x, y, differ=differ: np.where(differ, _relative(x, y), 0.0)  # noqa: E731
        found += days.intervals(figure, a, b, rows=size[kept].tolist())
        named += [
            (column, names[at], x / size[at], y / size[at])
            for at, x, y in zip(kept, a.sum(axis=0).tolist(), b.sum(axis=0).tolist(), strict=True)
        ]
    real = discoveries([one.p_worse for one in found], alpha)
    return [
        Slice(column, value, one, float(x), float(y), r)
        for (column, value, x, y), one, r in zip(named, found, real, strict=True)
    ]


def discoveries(p: Sequence[float], alpha: float) -> list[bool]:
    """Which p-values hold when the share of false ones may be ``alpha`` (Benjamini and Hochberg 1995)."""
    if not p:
        return []
    order = np.argsort(p, kind="stable")
    passing = np.flatnonzero(np.asarray(p)[order] <= alpha * np.arange(1, len(p) + 1) / len(p))
    held = np.zeros(len(p), dtype=bool)
    held[order[: passing[-1] + 1 if len(passing) else 0]] = True
    return held.tolist()


@dataclass(frozen=True)
class Group:
    """How often one value of a declared attribute is decided for and against: shares of its rows, by both models."""

    attribute: str
    value: str
    rows: int
    mine: tuple[float, float]
    """(for, against) by the candidate."""
    theirs: tuple[float, float] | None
    """The same by the champion, else by the rule."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def groups(
    rows: pa.Table, attributes: Sequence[str], mine: Floats, theirs: Floats | None, *, min_rows: int
) -> list[Group]:
    """The groups with at least ``min_rows`` rows.

    mine, theirs: what is decided for each row, above 0 in the entity's favour, below 0 against it.
    """
    found = []
    for attribute in attributes:
        names, code = labels(rows, attribute)
        size = np.bincount(code, minlength=len(names))
        tallies = [
            None if moved is None else [np.bincount(code, way, minlength=len(names)) for way in (moved > 0, moved < 0)]
            for moved in (mine, theirs)
        ]
        for at in np.flatnonzero(size >= min_rows):
            shares = [None if t is None else (float(t[0][at] / size[at]), float(t[1][at] / size[at])) for t in tallies]
            assert shares[0] is not None
            found.append(Group(attribute, names[at], int(size[at]), shares[0], shares[1]))
    return found
