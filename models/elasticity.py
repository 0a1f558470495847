"""Elasticity of a line's value to its own budget, learned from logged randomised perturbations, and the response
curve it gives.

Here belong the hierarchical estimate (line in group in all) and the curve. Not here: the level of the curve (the
learners), the choice of budgets (`models.policies.budget`). Observed spend never enters the slope: it chases demand, so its
slope is biased; only the multipliers that were drawn do.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Labels = Any  # names: a sequence or array of str, or an Arrow column

LOWEST, HIGHEST = (
    0.0,
    1.0,
)  # what a response curve is drawn with: value neither falls with spend nor grows faster than it


@dataclass(frozen=True)
class Elasticities:
    """What is believed of every line, every group, and all: means and standard deviations, of beliefs held to [0, 1],
    for lines never seen too.

    `lines` and `groups` are sorted; a group's figures are those of a new line in it, `overall` those of a new line in
    a new group.
    """

    lines: Sequence[str]
    line_mean: Floats
    line_sd: Floats
    groups: Sequence[str]
    group_mean: Floats
    group_sd: Floats
    overall_mean: float
    overall_sd: float
    spread_within: float
    """sd of elasticities between lines of a group."""
    spread_between: float
    """sd of the groups' means."""

    def of(self, line: Labels, group: Labels) -> tuple[Floats, Floats]:
        """Mean and sd for lines of the given groups (arrays of the same shape): the line's own, else its group's,
        else the overall one.
        """
        lines, groups = _text(line), _text(group)
        mean, sd = np.full(lines.shape, self.overall_mean), np.full(lines.shape, self.overall_sd)
        for known, means, sds, asked in (
            (self.groups, self.group_mean, self.group_sd, groups),
            (self.lines, self.line_mean, self.line_sd, lines),
        ):
            if len(known):
                names = np.asarray(known)
                at = np.minimum(np.searchsorted(names, asked), len(names) - 1)
                found = names[at] == asked
                mean, sd = np.where(found, means[at], mean), np.where(found, sds[at], sd)
        return mean, sd

    def to_json(self) -> str:
        """All of it as JSON; `from_json` gives the same figures to the bit."""
        return json.dumps({f.name: _plain(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> "Elasticities":
        read = json.loads(text)
        missing = {f.name for f in fields(cls)} - read.keys()
        if missing:
            raise ValueError(f"elasticities lack {sorted(missing)}: the text was not written by Elasticities.to_json")
        arrays = {k: np.array(read[k], dtype=float) for k in ("line_mean", "line_sd", "group_mean", "group_sd")}
        return cls(**{f.name: read[f.name] for f in fields(cls)} | arrays)


def response(level: Floats, base_spend: Floats, spends: Floats, elasticity: Floats) -> Floats:
    """Expected value at each of `spends` (n, k): level x (spend / base_spend) ** elasticity, the elasticity held to
    [0, 1].

    A power law has the same elasticity at every spend: true near `base_spend`, too steep far above it. `level` (n,)
    is the expected value at `base_spend` (n,), in any unit of money that `spends` shares. Without a base there is no
    curve: the value is `level` at every spend.
    """
    level, base, e = (np.asarray(x, dtype=float)[:, None] for x in (level, base_spend, elasticity))
    ratio = np.divide(np.asarray(spends, dtype=float), base, out=np.ones(np.shape(spends)), where=base > 0)
    return np.asarray(level * ratio ** np.clip(e, LOWEST, HIGHEST))


def fit_elasticities(  # noqa: PLR0913 - given by name
    line: Labels,
    group: Labels,
    day: Any,
    spend: Any,
    value: Any,
    multiplier: Any,
    *,
    probability: Any = None,
    expected: Any = None,
    prior_mean: float = 0.5,
    prior_sd: float = 0.29,
    block_days: int = 14,
) -> Elasticities:
    """Fit the hierarchy on one row a line a day (all arguments of the same length, any order; the result does not
    depend on the order of days).

    Args:
        line, group: Names; a line belongs to the group of its newest row. Lines of a group share their days' ups and
            downs.
        day: Dates (or day numbers).
        spend: What was set to be spent that day, perturbation included; `spend / multiplier` is the status quo before
            the draw. Give the budget: where a line spends less than its budget, realised cost would mix the draw with
            its effect.
        value: What came of it, >= 0; zeros welcome.
        multiplier: What the budget was multiplied with, drawn at random: 1 where the draw was "leave it".
        probability: Probability of the multiplier drawn; rows without one (NaN) were not randomised and are left out.
            None: all were.
        expected: Expected value at the status quo, if a model gives one (only from data before the day); else the
            status-quo spend stands in.
        prior_mean, prior_sd: Normal belief before any data, to be cut off at 0 and 1; the default has the moments of
            the uniform there. A third of the variance each lies in the overall mean, between groups, and within them;
            the latter two are then learned.
        block_days: A line's level may differ freely between blocks of so many days, so slow changes do not enter the
            slope.

    Method: within each line and block, E[value] = a x expected ** b x (group's day effect) x multiplier ** e, fitted
    by the quasi-Poisson score (Gourieroux, Monfort & Trognon 1984: consistent whenever the mean is right, whatever
    the distribution, zeros included). The multiplier is random given all the rest, so what the rest leaves
    unexplained costs precision and adds no bias. The error variance is each line's own dispersion, shrunk to a trend
    over the lines' levels (as Smyth 2004). Then normal-normal empirical Bayes over lines and groups, by EM, cut off
    at 0 and 1.

    Raises:
        ValueError: lengths differ, or a multiplier, spend or value is not a finite number in its range; the first row
            is named.
    """
    names, i = _codes(line)
    group_names, row_group = _codes(group)
    days = _days(day)
    y, m, s = (np.asarray(x, dtype=float) for x in (value, multiplier, spend))
    shape = s if expected is None else np.asarray(expected, dtype=float)
    for what, column, good in (
        ("value", y, y >= 0),
        ("multiplier", m, m > 0),
        ("spend", s, s >= 0),
        ("expected", shape, shape >= 0),
        ("group", row_group, row_group >= 0),
        ("day", days, days > np.iinfo(np.int64).min),  # not NaT
        ("line", i, i >= 0),
    ):
        if len(column) != len(i):
            raise ValueError(f"{what} has {len(column)} rows, line has {len(i)}: give one row a line a day")
        bad = np.flatnonzero(~(good & np.isfinite(column)))
        if len(bad):
            where = f"{what} of row {bad[0]} is {column[bad[0]]}"
            raise ValueError(f"{where}: {len(bad)} rows are missing, not finite or out of range, clean them first")
    newest = np.lexsort((days, i))
    line_group = np.zeros(len(names), dtype=np.int64)
    line_group[i[newest]] = row_group[newest]
    estimate, variance = np.zeros(len(names)), np.full(len(names), np.inf)
    keep = (shape > 0) & (s > 0)
    if probability is not None:
        keep &= np.isfinite(np.asarray(probability, dtype=float))
    if keep.any():
        z = np.log(shape[keep] / m[keep]) if expected is None else np.log(shape[keep])
        block = i[keep] * (np.ptp(days) // block_days + 1) + (days[keep] - days.min()) // block_days
        together = row_group[keep] * (np.ptp(days) + 1) + days[keep] - days.min()
        estimate, variance = _slopes(i[keep], len(names), _dense(block), _dense(together), y[keep], np.log(m[keep]), z)
    return _pool(names, group_names, line_group, estimate, variance, prior_mean, prior_sd)


def _slopes(i: Ints, n: int, block: Ints, together: Ints, y: Floats, x: Floats, z: Floats) -> tuple[Floats, Floats]:
    """Each line's own slope on `x` and its sampling variance (inf where its draws tell nothing)."""

    def total(code: Ints, what: Floats, size: int | None = None) -> Floats:
        return np.asarray(np.bincount(code, weights=what, minlength=size or 0), dtype=float)

    blocks = total(block, y)
    some = blocks[block] > 0  # a block that earned nothing has no level to compare within
    if not some.any():
        return np.zeros(n), np.full(n, np.inf)
    i, block, together, y, x, z = i[some], _dense(block[some]), _dense(together[some]), y[some], x[some], z[some]
    level, shared = np.zeros(block.max() + 1), np.zeros(len(y))
    pooled, b, slope = 0.0, 1.0, np.zeros(n)
    z = z - (total(block, z) / np.bincount(block))[block]

    def mean() -> Floats:
        return np.asarray(np.exp(level[block] + shared + b * z + slope[i] * x))

    def within(what: Floats, mu: Floats) -> Floats:
        return what - (total(block, mu * what) / total(block, mu))[block]

    fit = np.full(len(y), y.mean())
    for step in range(12):
        fit = mean()
        level += np.log(total(block, y) / total(block, fit))
        fit = mean()
        # A day's shared effect, from the other lines only (with its own value in it, a line's slope would be
        # explained away), is believed as far as it stands out of the lines' own noise (gamma-Poisson shrinkage).
        fit = fit / np.exp(shared)
        seen, foreseen = total(together, y), total(together, fit)
        noise = np.sum((y - fit) ** 2) / np.sum(fit)
        extra = np.sum((seen - foreseen) ** 2 - total(together, (y - fit) ** 2)) / np.sum(foreseen**2)
        weight = noise / max(extra, 1e-9)
        shared = np.log((seen[together] - y + weight) / np.maximum(foreseen[together] - fit + weight, 1e-300))
        fit = mean()
        xt, zt = within(x, fit), within(z, fit)
        if step < 6:  # first what all lines share, then each line's own
            normal = np.array([[np.sum(fit * p * q) for q in (xt, zt)] for p in (xt, zt)]) + 1e-9 * np.eye(2) * np.sum(
                fit
            )
            change = np.linalg.solve(normal, [np.sum(xt * (y - fit)), np.sum(zt * (y - fit))])
            pooled, b = float(np.clip(pooled + change[0], -1, 2)), float(np.clip(b + change[1], -1, 3))
            slope = np.full(n, pooled)
        else:
            information = total(i, fit * xt**2, n)
            score = total(i, xt * (y - fit), n)
            slope = np.clip(slope + np.divide(score, information, out=np.zeros(n), where=information > 0), -5, 6)
    fit = mean()
    information = total(i, fit * within(x, fit) ** 2, n)
    rows, own = np.bincount(i, minlength=n), np.bincount(i[np.unique(block, return_index=True)[1]], minlength=n)
    free = np.maximum(rows - own - 1.0, 0.0)
    squares = total(i, (y - fit) ** 2 / fit, n)
    size = np.log(np.maximum(total(i, fit, n) / np.maximum(rows, 1), 1e-300))
    informed = (information > 1e-12 * total(i, fit, n)) & (free > 0)
    if not informed.any():
        return slope, np.full(n, np.inf)
    dispersion = _shrunk_dispersion(squares[informed], free[informed], size[informed])
    variance = np.full(n, np.inf)
    variance[informed] = dispersion / information[informed]
    return slope, variance


def _shrunk_dispersion(squares: Floats, free: Floats, size: Floats, believed: float = 10.0) -> Floats:
    """A line's dispersion, drawn towards the trend over lines' levels as if that were `believed` more degrees of
    freedom.
    """
    own = np.maximum(squares / free, 1e-12)
    centred = size - np.average(size, weights=free)
    tilt = np.sum(free * centred * np.log(own)) / max(np.sum(free * centred**2), 1e-12) if len(own) > 2 else 0.0
    trend = np.exp(tilt * centred)
    trend = trend * np.sum(free * own / trend) / np.sum(free)
    return np.asarray((squares + believed * trend) / (free + believed))


def _pool(
    names: list[str], groups: list[str], group: Ints, y: Floats, variance: Floats, prior_mean: float, prior_sd: float
) -> Elasticities:
    """Normal-normal empirical Bayes, lines in groups in all: closed form given the two spreads, which EM finds."""
    start, believed = prior_sd**2 / 3, 4.0  # the prior's say in the spreads, in lines or groups
    updated = (start, start)
    told = np.isfinite(variance)
    precision = np.where(told, 1 / np.where(told, variance, 1.0), 0.0)
    y = np.where(told, y, 0.0)
    size = len(groups)
    informed = np.bincount(group, weights=told, minlength=size) > 0
    for _ in range(300):
        within, between = updated
        weight = precision / (1 + precision * within)
        mass = np.bincount(group, weights=weight, minlength=size)
        average = np.divide(
            np.bincount(group, weights=weight * y, minlength=size), mass, out=np.zeros(size), where=mass > 0
        )
        say = mass / (1 + mass * between)
        overall_variance = 1 / (1 / start + say.sum())
        overall = overall_variance * (prior_mean / start + np.sum(say * average))
        share = between * mass / (1 + between * mass)
        group_mean = overall + share * (average - overall)
        left = between / (1 + between * mass)
        group_variance = left + (1 - share) ** 2 * overall_variance
        trust = within * precision / (1 + within * precision)
        line_mean = group_mean[group] + trust * (y - group_mean[group])
        alone = within / (1 + within * precision)
        line_variance = alone + (1 - trust) ** 2 * group_variance[group]
        of_lines = (line_mean - group_mean[group]) ** 2 + alone + trust**2 * group_variance[group]
        of_groups = (group_mean - overall) ** 2 + left + share**2 * overall_variance
        updated = (
            float((of_lines[told].sum() + believed * start) / (told.sum() + believed)),
            float((of_groups[informed].sum() + believed * start) / (informed.sum() + believed)),
        )
        if max(abs(updated[0] - within), abs(updated[1] - between)) < 1e-8:
            break
    line_mean, line_sd = _held(line_mean, line_variance)
    group_mean, group_sd = _held(group_mean, group_variance + within)
    (overall,), (overall_sd,) = _held(np.array([overall]), np.array([overall_variance + between + within]))
    return Elasticities(
        lines=names,
        line_mean=line_mean,
        line_sd=line_sd,
        groups=groups,
        group_mean=group_mean,
        group_sd=group_sd,
        overall_mean=float(overall),
        overall_sd=float(overall_sd),
        spread_within=float(np.sqrt(within)),
        spread_between=float(np.sqrt(between)),
    )


def _held(mean: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """Mean and sd of a normal belief cut off at LOWEST and HIGHEST."""
    from scipy.special import ndtr

    sd = np.sqrt(variance)
    a, b = np.clip((LOWEST - mean) / sd, -30, 8), np.clip((HIGHEST - mean) / sd, -8, 30)
    mass = ndtr(b) - ndtr(a)
    at_a, at_b = (np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi) for t in (a, b))
    shift = (at_a - at_b) / mass
    left = 1 + (a * at_a - b * at_b) / mass - shift**2
    return np.clip(mean + sd * shift, LOWEST, HIGHEST), sd * np.sqrt(np.maximum(left, 1e-6))


def _text(labels: Labels) -> np.ndarray[Any, Any]:
    if isinstance(labels, (pa.Array, pa.ChunkedArray)):
        labels = labels.to_numpy(zero_copy_only=False) if isinstance(labels, pa.Array) else labels.to_numpy()
    return np.asarray(labels, dtype=str)


def _codes(labels: Labels) -> tuple[list[str], Ints]:
    """Sorted names and each row's index into them; -1 for null."""
    array = (
        labels
        if isinstance(labels, (pa.Array, pa.ChunkedArray))
        else pa.array(np.asarray(labels, dtype=object), pa.string())
    )
    coded = pa.chunked_array([array]) if isinstance(array, pa.Array) else array
    coded = coded.combine_chunks().dictionary_encode()
    coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
    names = np.array(coded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(names)
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    at = coded.indices.fill_null(-1).to_numpy().astype(np.int64)
    return names[order].tolist(), np.where(at >= 0, rank[at] if len(rank) else at, -1)


def _days(day: Any) -> Ints:
    if isinstance(day, (pa.Array, pa.ChunkedArray)):
        day = day.to_numpy(zero_copy_only=False) if isinstance(day, pa.Array) else day.to_numpy()
    array = np.asarray(day)
    return array.astype(np.int64) if array.dtype.kind in "iu" else array.astype("datetime64[D]").astype(np.int64)


def _dense(code: Ints) -> Ints:
    return np.asarray(np.unique(code, return_inverse=True)[1], dtype=np.int64)


def _plain(x: Any) -> Any:
    return x.tolist() if isinstance(x, np.ndarray) else list(x) if isinstance(x, (list, tuple)) else x
