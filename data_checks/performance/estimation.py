"""Figures of a window with their intervals, estimated and realised, beside a baseline.

Belongs here: intervals by day and entity, windows, baselines. Does not: a metric (``data_checks.performance.metrics``), pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    pass
from data_checks.performance.metrics import Metric, Spread, amount_metrics, calibrated, coverage, probability_metrics
from data_checks.performance.spec import GROUPS, LEAST, LEVEL, RULE, SCHEMA, Array, Columns, Kind, PerformanceSpec

# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error; ``freedom``: the degrees of freedom of that error (None: the normal's)."""

    value: float
    error: float
    freedom: int | None = None

    def reach(self) -> float:
        """Half the width of the 95% interval; NaN where there is none."""
        return self.error * _quantile(self.freedom)


def _quantile(freedom: int | None) -> float:
    from scipy.stats import norm, t

    return float(norm.ppf(0.5 + LEVEL / 2) if freedom is None else t.ppf(0.5 + LEVEL / 2, max(freedom, 1)))


def jackknife(metric: Metric, by_group: Array) -> Estimate:
    """The metric over all groups, with the standard error of leaving out one group at a time (Tukey 1958).

    ``by_group``: (groups, k) sums. Groups without rows do not count. The error is NaN with fewer than two.
    """
    whole = by_group.sum(axis=0)
    filled = by_group[np.abs(by_group).sum(axis=1) > 0]
    value, d = float(metric.value(whole)), len(filled)
    if d < 2:
        return Estimate(value, float("nan"), 1)
    without = metric.value(whole - filled)
    without = without[np.isfinite(without)]
    if len(without) < 2:
        return Estimate(value, float("nan"), 1)
    return Estimate(value, float(np.sqrt((d - 1) * np.var(without))), d - 1)


def _gradient(value: Callable[[Array], Array], total: Array) -> Array:
    """The derivative of a metric by each of its sums, at ``total`` (k,); central differences."""
    step = 1e-5 * np.maximum(np.abs(total), 1e-3)
    near = np.diag(step)
    moved = np.asarray(value(total + near)) - np.asarray(value(total - near))
    return np.asarray(np.nan_to_num(moved / (2 * step)))


def two_way(found: Estimate, metric: Metric, columns: Columns, total: Array, day: Array, entity: Array) -> Estimate:
    """``found``, whose error is between days, with what rows of one entity share beyond their days (see the module).

    ``day`` and ``entity`` (n,) whole numbers from 0 on. The variance is V(day) + V(entity) - V(entity and day), and no less
    than either of the first two; the degrees of freedom are those of the fewer of both. Where every entity has one row the
    last two are the same, and the error stays what it was.
    """
    if metric.each is None or not np.isfinite(found.error) or not len(entity):
        return found
    return _two_way(found, metric.each(columns, _gradient(metric.value, total)), day, entity)


def _two_way(found: Estimate, moves: Array, day: Array, entity: Array) -> Estimate:
    """As ``two_way``, from how far each row moves the figure (``moves``, adding up to 0)."""
    _, cell = np.unique(entity * (int(day.max()) + 1) + day, return_inverse=True)
    filled = np.bincount(entity) > 0
    by_entity, by_cell = (np.bincount(code, moves) for code in (entity, cell))
    n = int(filled.sum())
    if n < 2:
        return Estimate(found.value, float("nan"), 1)
    v_day, v_entity = found.error**2, float((by_entity**2).sum()) * n / (n - 1)
    v_cell = float((by_cell**2).sum()) * n / (n - 1)
    variance = max(v_day, v_entity, v_day + v_entity - v_cell) if n < len(by_cell) else v_day
    freedom = None if found.freedom is None else min(found.freedom, n - 1)
    return Estimate(found.value, float(np.sqrt(variance)), freedom)


def foreseen(metric: Metric, columns: Columns, group: Array, groups: int) -> tuple[Array, Array]:
    """Expected sums and their variances by group, (groups, k) each; raises ValueError where the metric cannot be foreseen."""
    if metric.expected is None:
        raise ValueError(f"metric {metric.name!r} cannot be estimated without outcomes")
    return metric.expected(columns, group, groups)


def estimate(metric: Metric, columns: Columns) -> Estimate:
    """What the metric will come to on these rows if the assumption holds (``ASSUMES``).

    The interval is that of the outcomes still to be drawn, not of the assumption.
    """
    assert metric.slope is not None
    total, variance = foreseen(metric, columns, np.zeros(len(columns["predicted"]), np.int64), 1)
    return Estimate(float(metric.value(total[0])), float(np.sqrt((metric.slope(total[0]) ** 2 * variance[0]).sum())))


def realised(metric: Metric, columns: Columns, group: Array | None = None) -> Estimate:
    """The metric on rows with an outcome; ``group`` (n,) names what rows share (a day, an entity), for the interval."""
    known = ~np.isnan(columns["actual"])
    group = np.arange(len(known)) % GROUPS if group is None else group
    names, code = np.unique(group[known], return_inverse=True)
    return jackknife(metric, metric.sums({k: v[known] for k, v in columns.items()}, code, len(names)))


def judge(
    rows: pa.Table,
    day: date,
    *,
    kind: Kind,
    spec: PerformanceSpec,
    maturity_days: int = 0,
    gate: Callable[[int], Mapping[str, float]] | None = None,
    more: Sequence[Metric] = (),
    outcome_of: Literal["row", "entity"] = "row",
) -> pa.Table:
    """Every figure that can be told at the cut-off of ``day``, in SCHEMA.

    outcome_of: ``row`` where every row has an outcome of its own (what a line earned that day), ``entity`` where one answers
    all rows of an entity: its rows of a day, of a window, of the reference then share a weight of 1 there.

    rows: what was scored up to ``day`` with what was known of it by then: day date32, entity_id, version int64 (null: the
    rule), predicted float64, actual float64 (null: not known), float64 columns that ``more`` metrics ask for; where
    ``promised`` and ``inside`` stand among them, ``coverage`` is told too, and where ``rule`` does (what the rule predicted of
    the row), the newest version is compared with it. ``gate`` gives a
    version's held-out figures by metric (nothing where it has none, or where they are not comparable).
    Days that may still change, and those of the window, get a figure each; the newest mature window of the version that
    scored last is judged against its baseline (realised), and so are the last days by their estimate.
    """
    rows = rows.filter((pc.field("day") <= pc.scalar(day)) & pc.is_finite(pc.field("predicted")))
    if rows.num_rows == 0:
        return SCHEMA.empty_table()
    return _Judging(rows, day, kind, spec, maturity_days, gate or (lambda _: {}), more, outcome_of).table()


class _Judging:
    """One call of ``judge``."""

    def __init__(
        self,
        rows: pa.Table,
        day: date,
        kind: Kind,
        spec: PerformanceSpec,
        maturity_days: int,
        gate: Callable[[int], Mapping[str, float]],
        more: Sequence[Metric],
        outcome_of: Literal["row", "entity"],
    ) -> None:
        self.day, self.spec, self.gate, self.kind = day, spec, gate, kind
        self.once = outcome_of == "entity"
        self.maturity_days = maturity_days
        days = rows["day"].to_numpy().astype("datetime64[D]")
        values, self.code = np.unique(days, return_inverse=True)
        self.days: list[date] = values.tolist()
        self.d = len(self.days)
        numeric = [f.name for f in rows.schema if pa.types.is_floating(f.type)]
        self.columns = {name: rows[name].to_numpy().astype(np.float64) for name in numeric}
        self.known = ~np.isnan(self.columns["actual"])
        entity = rows["entity_id"].combine_chunks().dictionary_encode()
        self.entity = np.asarray(entity.indices.to_numpy()).astype(np.int64)
        self.entities = len(entity.dictionary)
        version = pc.fill_null(rows["version"], -1).to_numpy()
        self.version = np.empty(self.d, np.int64)
        self.version[self.code] = version
        self.n = np.bincount(self.code, minlength=self.d)
        self.share = np.bincount(self.code, self.known, minlength=self.d) / self.n
        self.mature = np.array([d <= day - timedelta(days=maturity_days) for d in self.days]) & (
            self.share >= spec.min_known_share
        )
        self.current = int(self.version[-1])
        self.estimated, self.basis = self._basis()
        p = self.columns["predicted"]
        self.ruled = np.isfinite(self.columns[RULE]) if RULE in self.columns else np.zeros(len(p), bool)
        shown = np.concatenate([p, self.columns[RULE][self.ruled]]) if self.ruled.any() else p
        found = probability_metrics(shown) if kind == "probability" else amount_metrics(self.spread)
        promises = [coverage()] if {"promised", "inside"} <= set(self.columns) else []
        self.metrics = [*found, *promises, *more]
        self.rows: list[dict[str, Any]] = []

    def _basis(self) -> tuple[Array, str]:
        """The predictions that estimates are made from, and what they rest on; learns the spread of errors."""
        predicted, actual = self.columns["predicted"], self.columns["actual"]
        self.spread: Spread | None = None
        good = self.known & self.mature[self.code]
        mine = good & (self.version[self.code] == self.current)
        who = "its own"
        if mine.sum() < LEAST:
            mine, who = good, "all versions'"
        enough = mine.sum() >= LEAST
        if self.kind == "amount":
            if enough:
                self.spread = Spread.learn(predicted[mine], actual[mine])
                return predicted, f"errors of {who} {int(mine.sum())} matured rows"
            return predicted, f"{int(mine.sum())} matured rows are too few to know the size of errors"
        if enough and 0 < actual[mine].mean() < 1:
            known, told = predicted[mine], actual[mine]
            return calibrated(
                predicted, known, told, self._shares(mine)
            ), f"calibrated on {who} {int(mine.sum())} matured rows"
        return predicted, "scores as they are: too few matured rows to check their calibration"

    def table(self) -> pa.Table:
        for metric in self.metrics:
            self._metric(metric)
        return pa.Table.from_pylist(self.rows, schema=SCHEMA)

    def _shares(self, these: Array) -> Array:
        """What each of the rows ``these`` counts among them."""
        if not self.once:
            return np.ones(int(these.sum()))
        entity = self.entity[these]
        return np.asarray(1.0 / np.bincount(entity, minlength=self.entities)[entity])

    def _outcomes(self, these: Array) -> int:
        """How many outcomes the rows ``these`` have."""
        return len(np.unique(self.entity[these])) if self.once else int(these.sum())

    def _picked(self, these: Array, **other: Array) -> dict[str, Array]:
        """The columns of the rows ``these``, with what each counts; ``other`` columns take the place of those of their name."""
        return {**{k: other.get(k, v)[these] for k, v in self.columns.items()}, "weight": self._shares(these)}

    def _of_days(self, places: Sequence[int], which: Array) -> tuple[Array, Array]:
        """The rows of some days among ``which`` (a mask of all rows), and each one's day as its place in ``places``."""
        at = np.full(self.d, -1)
        at[list(places)] = np.arange(len(places))
        these = which & (at[self.code] >= 0)
        return these, at[self.code[these]]

    def _realised(self, metric: Metric, places: Sequence[int]) -> Estimate:
        """The metric over some days, where outcomes are known."""
        these, day = self._of_days(places, self.known)
        columns = self._picked(these)
        sums = metric.sums(columns, day, len(places))
        return two_way(jackknife(metric, sums), metric, columns, sums.sum(axis=0), day, self.entity[these])

    def _metric(self, metric: Metric) -> None:
        spec = self.spec
        since = self.day - timedelta(days=self.maturity_days + spec.window_days)
        shown = [i for i in range(self.d) if self.days[i] > since]
        can = metric.expected is not None and metric.slope is not None
        for i in shown:
            these, _ = self._of_days([i], self.known)
            if these.any():
                text = "" if self.mature[i] else f"maturing: {self.share[i]:.0%} of {self.n[i]} rows known"
                # rows of one day have no days between them: groups of entities stand in
                fine = metric.sums(self._picked(these), self.entity[these] % GROUPS, GROUPS)
                n = self._outcomes(these)
                self._row(metric, "realised", i, i, jackknife(metric, fine), n, self.version[i], text=text)
        for i in shown if can else ():
            if not self.mature[i]:
                every, day = self._of_days([i], np.ones(len(self.code), bool))
                total, variance = foreseen(metric, self._picked(every, predicted=self.estimated), day, 1)
                assert metric.slope is not None
                noise = float(np.sqrt((metric.slope(total[0]) ** 2 * variance[0]).sum()))
                one = Estimate(float(metric.value(total[0])), noise)
                self._row(metric, "estimated", i, i, one, self._outcomes(every), self.version[i], text=self.basis)
        self._window(metric)
        if can:
            self._expected_window(metric)
        if self.ruled.any() and metric.name != "coverage":
            self._beside_rule(metric)

    def _last(self, chosen: Array) -> list[int]:
        """The newest days among ``chosen`` within one window of the newest of them."""
        places = np.flatnonzero(chosen)
        if not len(places):
            return []
        newest = self.days[places[-1]]
        return [int(i) for i in places if newest - self.days[i] < timedelta(days=self.spec.window_days)]

    def _enough(self, places: list[int], rows: float) -> bool:
        return len(places) >= self.spec.min_days and rows >= self.spec.min_rows

    def _window(self, metric: Metric) -> None:
        """The newest mature days of the version that scores now, beside their baseline."""
        places = self._last(self.mature & (self.version == self.current))
        n = self._outcomes(self._of_days(places, self.known)[0])
        if not self._enough(places, n):
            return
        found = self._realised(metric, places)
        base, of = self._baseline(metric, places, found)
        self._row(metric, "realised", places[0], places[-1], found, n, self.current, base=base, of=of, days=len(places))

    def _expected_window(self, metric: Metric) -> None:
        """The last days by their estimate, beside the same baseline."""
        places = self._last(self.version == self.current)
        every, day = self._of_days(places, np.ones(len(self.code), bool))
        n = self._outcomes(every)
        if not self._enough(places, n):
            return
        total, variance = foreseen(metric, self._picked(every, predicted=self.estimated), day, len(places))
        between = jackknife(metric, total)
        assert metric.slope is not None
        slope = metric.slope(total.sum(axis=0))
        noise = float((slope**2 * variance.sum(axis=0)).sum())
        found = Estimate(between.value, float(np.sqrt(between.error**2 + noise)), between.freedom)
        base, of = self._baseline(metric, places, found)
        self._row(
            metric, "estimated", places[0], places[-1], found, n, self.current,
            base=base, of=of, days=len(places), text=self.basis,
        )  # fmt: skip

    def _beside_rule(self, metric: Metric) -> None:
        """The newest mature days of the newest version beside the rule, on the rows that both have scored."""
        models = np.flatnonzero(self.version >= 0)
        if not len(models):
            return
        number = int(self.version[models[-1]])
        places = self._last(self.mature & (self.version == number))
        told = self.known & self.ruled
        days = set(self.code[told].tolist())  # a day that the rule left out says nothing, and moves no figure
        places = [place for place in places if place in days]
        these, day = self._of_days(places, told)
        n = self._outcomes(these)
        if not self._enough(places, n):
            return
        both = [self._picked(these), self._picked(these, predicted=self.columns[RULE])]
        mine, rules = (metric.sums(columns, day, len(places)) for columns in both)
        base = Estimate(float(metric.value(rules.sum(axis=0))), float("nan"))
        k = mine.shape[1]
        apart = replace(metric, value=lambda t: metric.value(t[..., :k]) - metric.value(t[..., k:]))
        gap = jackknife(apart, np.concatenate([mine, rules], axis=1))
        if metric.each is not None and np.isfinite(gap.error):
            moves = [
                metric.each(c, _gradient(metric.value, s.sum(axis=0))) for c, s in zip(both, (mine, rules), strict=True)
            ]
            gap = _two_way(gap, moves[0] - moves[1], day, self.entity[these])
        found = self._realised(metric, places)
        found = Estimate(float(metric.value(mine.sum(axis=0))), found.error, found.freedom)
        self._row(
            metric, RULE, places[0], places[-1], found, n, number, base=base, of="rule", days=len(places), gap=gap
        )

    def _baseline(self, metric: Metric, window: list[int], found: Estimate) -> tuple[Estimate | None, str]:
        """What the window is compared with: the gate's held-out figure of the version, else the realised days before."""
        held_out = self.gate(self.current) if self.current >= 0 else {}
        if np.isfinite(held_out.get(metric.name, np.nan)):
            # The gate's few held-out days vary from day to day as those of the window do.
            return Estimate(float(held_out[metric.name]), found.error, found.freedom), "gate"
        first = self.days[window[0]]
        before = self.mature & np.array(
            [first - timedelta(days=self.spec.reference_days) <= d < first for d in self.days]
        )
        mine = before & (self.version == self.current)
        chosen = np.flatnonzero(mine if mine.sum() >= self.spec.min_days else before)
        if len(chosen) < self.spec.min_days:
            return None, ""
        return self._realised(metric, chosen.tolist()), "reference"

    def _waiting(self, first: int, last: int) -> str:
        """Rows of these days whose outcome is not known: what is known first (soon resolved, soon due) need not be like them."""
        here = (self.code >= first) & (self.code <= last)
        waiting = int((here & ~self.known).sum())
        return f"{waiting} of {int(here.sum())} rows not yet due or not known, and not counted" if waiting else ""

    def _row(  # noqa: PLR0913 - given by name
        self,
        metric: Metric,
        kind: str,
        first: int,
        last: int,
        found: Estimate,
        n: int,
        version: int,
        *,
        base: Estimate | None = None,
        of: str = "",
        days: int = 1,
        text: str = "",
        gap: Estimate | None = None,
    ) -> None:
        """``gap``: the figure less its baseline, where both are of the same rows; else their errors are independent."""
        if not np.isfinite(found.value):
            return
        reach = found.reach()
        worse = near = None
        if base is not None and np.isfinite(base.value) and base.value:
            sign = 1.0 if metric.better == "lower" else -1.0
            worse = sign * (found.value - base.value) / abs(base.value)
            error = float(np.hypot(found.error, base.error)) if gap is None else gap.error
            freedom = max((found.freedom or 0) + (base.freedom or 0 if of == "reference" else 0), 1)
            if gap is not None:
                freedom = gap.freedom or 1
            near = worse - error * _quantile(freedom) / abs(base.value)
        window = first != last or days > 1
        if window:
            who = "the rule" if version < 0 else f"version {version}"
            beside = f", baseline {base.value:.4g} ({of})" if base is not None else ", no baseline yet"
            moved = f": {abs(worse):.1%} {'worse' if worse > 0 else 'better'}" if worse is not None else ""
            what = "realised" if kind == RULE else kind
            said = f"{what} {metric.name} {found.value:.4g} of {who} on {days} days to {self.days[last]}{beside}{moved}"
            if kind == RULE and base is not None and worse is not None and near is not None and np.isfinite(near):
                # the interval of the difference on the same rows, in the metric's own unit, added to the rule's figure
                ends = sorted(base.value + sign * abs(base.value) * w for w in (near, 2 * worse - near))
                said = (
                    f"{metric.name} {found.value:.4g} vs {base.value:.4g} of the rule "
                    f"[{ends[0]:.4g}, {ends[1]:.4g}] for {who} on the same rows of {days} days to {self.days[last]}"
                )
            waits = "" if kind == "estimated" else self._waiting(first, last)
            text = "; ".join(part for part in (said, waits, text) if part)
        share = float(np.average(self.share[first : last + 1], weights=self.n[first : last + 1]))
        self.rows.append(
            {
                "day": self.day, "first": self.days[first], "last": self.days[last], "metric": metric.name, "kind": kind,
                "value": found.value, "low": _finite(found.value - reach), "high": _finite(found.value + reach), "n": n,
                "known": share, "mature": bool(self.mature[first : last + 1].all()),
                "baseline": base.value if base is not None else None, "baseline_is": of,
                "worse": worse, "worse_low": _finite(near), "version": None if version < 0 else int(version),
                "text": text,
            }
        )  # fmt: skip


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def windows(judged: pa.Table) -> pa.Table:
    """The rows of SCHEMA that speak of a window rather than of a day."""
    return judged.filter(pc.not_equal(judged["first"], judged["last"]))
