"""What of a day lies too far from its reference: by column, by null share, by volume, new and gone.

Belongs here: signals, corrections, findings. Does not: what chance alone gives (``data_checks.drift.calibration``), pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from data_checks.drift.calibration import (
    Counts,
    Null,
    benjamini_hochberg,
    chance_of_moved,
    chance_of_none,
    jensen_shannon,
    volume_null,
    wasserstein,
)
from data_checks.drift.columns import Baseline, Numbers, Reference, Side, Texts, in_threads, sorted_values, winsorised
from data_checks.drift.spec import (
    GRAVE_LEVEL,
    GRAVE_SHARE,
    GRAVE_VOLUME,
    LEAST_MOVED,
    METHODS,
    OTHERS,
    RARE,
    RARE_FACTOR,
    SHOWN,
    TOGETHER_LEVEL,
    VOLUME_LEVEL,
    DriftImpossible,
    DriftSpec,
)


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
    sides: dict[str, Numbers | Texts] = field(default_factory=dict)


def _nulls(name: str, now: Counts, rows: int, before: Reference, block: int, spec: DriftSpec) -> list[_Signal]:
    share = float(now.sum()) / rows
    usual = float(before.nulls.counts[:, 0].sum() / before.nulls.counts.sum())
    if share == usual:
        return []
    gap = abs(share - usual)
    text = f"nulls {usual:.0%} → {share:.0%}"
    null = partial(before.nulls.null, rows, block)
    return [_Signal(name, "nulls", gap, spec.null_share_change, None, gap * rows, text, null)]


def _numeric(
    name: str, now: Numbers, before: Reference, date: float, block: int, spec: DriftSpec, entry: dict[str, Any]
) -> list[_Signal]:
    assert before.counted is not None and isinstance(before.side, Numbers)
    distance, apart = wasserstein(now.values, before.side.values, before.norm)
    null = partial(before.counted.null, now.count, block)
    entry["distance"] = distance
    # days that have grown by a hundredth each for a month are as far from its mean today as they will be tomorrow
    carried = None if before.trend is None else before.trend.carried(date)
    if carried is not None:
        entry["beside_trend"], _ = wasserstein(now.values, carried, before.norm)
    return [
        _Signal(
            name,
            "distance",
            distance if carried is None else min(distance, entry["beside_trend"]),
            spec.numeric_threshold,
            None,
            apart * now.count,
            "",
            null,
            of_share=False,
        )
    ]


def aligned_counts(now: Texts, before: Texts, kept: int) -> tuple[Counts, Counts, list[str]]:
    """Counts of both windows over the same categories: the reference's most frequent, the new ones (where the reference has
    no rest to put them into), and the rest."""
    place = {c: n for n, c in enumerate(now.names)}
    here, there = now.total(), before.total()
    names = list(before.names[:kept])
    found = np.array([here[place[c]] if c in place else 0 for c in names], dtype=np.int64)
    rest = int(there[kept:].sum())
    known = set(before.names)
    new = [] if rest else [c for c in now.names if c not in known][:SHOWN]
    mine = np.concatenate([found, [here[place[c]] for c in new]]).astype(np.int64)
    theirs = np.concatenate([there[:kept], np.zeros(len(new), np.int64)]).astype(np.int64)
    others = (int(here.sum()) - int(mine.sum()), rest)
    if any(others):
        mine, theirs = np.append(mine, others[0]), np.append(theirs, others[1])
        return mine, theirs, [*names, *new, OTHERS]
    return mine, theirs, [*names, *new]


def _categorical(
    name: str, now: Texts, before: Reference, block: int, spec: DriftSpec, entry: dict[str, Any]
) -> list[_Signal]:
    assert before.counted is not None and isinstance(before.side, Texts)
    there = before.side
    mine, theirs, _ = aligned_counts(now, there, before.kept)
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


def _rare(now: Texts, before: Texts, raw: Mapping[str, int], level: float) -> list[str]:
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
    found = found[np.argsort(chances[found], kind="stable")][:SHOWN]
    return [f"{names[n]}: {there[n]} of {rows[1]} → {here[n]} of {rows[0]}" for n in found]


def _beside(side: Side, baseline: Baseline, names: Mapping[str, str], block: int, spec: DriftSpec) -> _Judged:
    """Every column of one window beside the reference."""
    date = float(side.dates.mean())

    def column(name: str) -> tuple[dict[str, Any], Numbers | Texts | None, list[_Signal]]:
        kind = names[name]
        here, before = name in side.table.schema.names, baseline.columns.get(name)
        entry: dict[str, Any] = {
            "distance": None, "method": METHODS[kind], "threshold": None, "chance": None, "drifted": False, "grave": False,
            "importance": None, "null_share_current": None, "null_share_reference": None, "new_categories": [],
            "vanished_categories": [], "rare_moved": [], "beside_trend": None, "judged": False, "reason": None, "winsorised": None,
        }  # fmt: skip
        if not here and before is None:
            raise DriftImpossible(
                f"column {name!r} is in neither window; correct features.{kind} in workflow.yaml or the features' SQL"
            )
        if not here:
            entry |= {"drifted": True, "grave": True, "reason": "missing from the current window"}
            return entry, None, []
        now: Numbers | Texts
        if kind == "numeric":
            ordered, _, nulls = sorted_values(side, name, by_day=False)
            entry["winsorised"] = winsorised(ordered, before.bounds) / max(len(ordered), 1) if before else 0.0
            now = Numbers.of(side, ordered, nulls)
        else:
            now = Texts.of(side, name)
        if before is None or (not before.side.count and now.count):
            entry["reason"] = f"new: the reference window {'lacks it' if before is None else 'has no value of it'}"
            return entry, None, []
        entry["null_share_current"] = float(now.nulls.sum()) / side.rows
        entry["null_share_reference"] = float(before.nulls.counts[:, 0].sum() / before.nulls.counts.sum())
        signals = _nulls(name, now.nulls, side.rows, before, block, spec)
        if isinstance(now, Texts) and isinstance(before.side, Texts):
            known, found = set(before.side.names), set(now.names)
            entry["new_categories"] = [c for c in now.names if c not in known][:SHOWN]
            entry["vanished_categories"] = [c for c in before.side.names if c not in found][:SHOWN]
        if min(now.count, before.side.count) < spec.min_rows:
            entry["reason"] = f"{now.count} values beside {before.side.count}: too few for a distance"
            return entry, now, signals
        entry["judged"] = True
        if isinstance(now, Numbers):
            signals += _numeric(name, now, before, date, block, spec, entry)
        else:
            signals += _categorical(name, now, before, block, spec, entry)
        return entry, now, signals

    judged = _Judged()
    for name, (entry, now, signals) in zip(names, in_threads(column, names, side.rows), strict=True):
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
    sides: dict[str, Numbers | Texts]
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


def _together(
    entries: Mapping[str, Mapping[str, Any]],
    moved: Mapping[str, Sequence[_Signal]],
    weight: Mapping[str, float],
    least: float,
) -> float:
    """How often days drawn again have columns of ``least`` weight as far off as they were found, all on the same days.

    Columns that move together for a day are one finding and not many. What moved and was never drawn (a vanished category)
    is no chance.
    """
    shares, drawn = 0.0, []
    for name, entry in entries.items():
        if not entry["drifted"]:
            continue
        found = [(s.effect, s.null().together) for s in moved.get(name, ()) if s.null is not None]
        if not found or len(found) < len(moved[name]):
            continue
        far = [null >= effect for effect, null in found if null is not None]
        if far:
            drawn.append(weight[name] * np.logical_or.reduce(far))
        else:  # too few days to know what they share: the columns speak for themselves
            shares += weight[name]
    if not drawn:
        return 0.0
    return float(np.mean(shares + np.sum(drawn, axis=0) >= least - 1e-12))


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
    side = Side(current)
    block = side.days if side.dated else 1
    judged = _beside(side, baseline, names, block, spec)
    entries = judged.entries
    chances = in_threads(lambda signal: signal.chance, judged.signals, side.rows)
    rejected, cut = benjamini_hochberg(chances, spec.false_alarms)
    distant: dict[str, list[_Signal]] = {}
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
            distant.setdefault(signal.column, []).append(signal)
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
    spoke = bool(grave) or volume_drifted
    alike = dict.fromkeys(names, 1 / len(names))
    spoke |= share >= spec.share and _together(entries, distant, alike, spec.share) <= TOGETHER_LEVEL
    if weighted and importance_share >= spec.importance_share:
        gains = {name: entry["importance"] for name, entry in entries.items()}
        spoke |= _together(entries, distant, gains, spec.importance_share) <= TOGETHER_LEVEL
    known = {*names, "day", "entity_id", "moment"}
    new = tuple(c for c in current.schema.names if c not in baseline.names and c not in known)
    return Findings(
        names, entries, judged.sides, share, importance_share, weighted, tuple(grave), volume,
        volume_drifted or volume_grave, new, side.rows, side.rows / days, spoke,
    )  # fmt: skip
