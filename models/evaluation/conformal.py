"""Confidence that holds: sets of outcomes and intervals calibrated on whole days (split conformal prediction).

Belongs here: quantiles over days, the set of two outcomes, bands around a prediction, how often they held. Does not:
predicting (``models.learners``), what a policy makes of an unsure prediction (``models.policies.priority``, ``models.policies.budget``).

Rows of one day share its luck, so the day is what is exchangeable and not the row: with a quantile over pooled rows a
hundred lines of one bad day count as a hundred observations, and the set is too small. Each of K calibration days
therefore weighs 1 / (K + 1) whatever its rows, and 1 / (K + 1) is kept for the day to come (hierarchical conformal
prediction: Dunn, Wasserman and Ramdas, JASA 2022; Lee, Barber and Willett, arXiv 2306.06342). For predictions of a model
that had not seen these days, a row of a new exchangeable day is then covered with at least the stated probability; for one
day each this is split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates 2023). The learners take both
halves of the days in turn, each predicted by a twin taught on the other (``halves``; cross-conformal, Vovk 2015): what
that gives up is its proof, so that coverage is measured on held-out days like any figure.

What holds over all rows need not hold within a part of them that is harder: a declared part with rows enough is calibrated by
itself (Mondrian conformal prediction: Vovk, Lindsay, Nouretdinov and Gammerman 2003; Vovk, Gammerman and Shafer, Algorithmic
Learning in a Random World, 2005, section 4.5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SLACK = 1e-9  # what sums of 1 / (K + 1) may miss a level by
LARGEST_STEP = 0.2
LEAST_WEIGHT = 0.5  # a day with less of a row than this says nothing
LEAST_OF_PART = 50.0  # rows with each outcome that a part needs to be calibrated by itself


def fewest_days(level: float, tails: int = 1) -> int:
    """Days below which no finite bound holds with probability ``level`` (0 < level < 1), over one or two tails."""
    miss = (1.0 - level) / tails
    return max(1, math.ceil((1.0 - miss) / miss - SLACK))


def quantile(score: Array, day: Array, level: float, weight: Array | None = None) -> float:
    """The smallest bound that a score of a new day stays at or under with probability at least ``level``.

    score, day, weight (of a row within its day; all alike where None): shape (n,). Infinity with fewer than
    ``fewest_days(level)`` days, of which those with less than LEAST_WEIGHT are left out.
    """
    weight = np.ones(len(score)) if weight is None else weight
    _, code = np.unique(day, return_inverse=True)
    total = np.bincount(code, weight, minlength=1)
    counted = total >= LEAST_WEIGHT
    days = int(counted.sum())
    if days < fewest_days(level):
        return math.inf
    mine = counted[code] & (weight > 0)
    order = np.argsort(score[mine], kind="stable")
    mass = np.cumsum((weight[mine] / total[code[mine]])[order]) / (days + 1)
    at = int(np.searchsorted(mass, level - SLACK, side="left"))
    return float(score[mine][order][min(at, len(order) - 1)])


def coverage(held: Array, day: Array) -> float:
    """The share of rows whose set or interval ``held`` (bool, shape (n,)), each day counting alike; NaN without rows."""
    if not len(held):
        return math.nan
    _, code = np.unique(day, return_inverse=True)
    return float((np.bincount(code, held) / np.bincount(code)).mean())


def halves(day: Array, entity: Array | None = None) -> Iterator[tuple[Array, Array]]:
    """(rows to teach a twin, rows that it then predicts), masks of shape (n,): the later days by the earlier, and back.

    With ``entity`` nobody who is predicted is taught either. Nothing where one of the two would be empty.
    """
    known = np.unique(day)
    for mine in (day > known[(len(known) - 1) // 2], day <= known[(len(known) - 1) // 2]) if len(known) else ():
        others = ~mine if entity is None else ~mine & ~np.isin(entity, np.unique(entity[mine]))
        if mine.any() and others.any():
            yield others, mine


def coarser(rounds: int, learning_rate: float) -> dict[str, Any]:
    """``rounds`` and ``learning_rate`` of a quick twin: as much shrinkage in fewer steps, each of LARGEST_STEP.

    It is no better than the model that it stands in for, so that what it calibrates is rather too wide than too narrow.
    """
    fewer = min(rounds, max(1, math.ceil(rounds * learning_rate / LARGEST_STEP)))
    return {"rounds": fewer, "learning_rate": min(1.0, learning_rate * rounds / fewer)}


@dataclass(frozen=True)
class Sets:
    """Which of two outcomes a probability leaves possible, by group and by part of it.

    Each outcome is held with the stated probability among the rows that end with it (label-conditional: Vovk 2012), so
    that a rare outcome is not bought with the common one. limits: group, or ``[group, part]`` as JSON → (p from which *yes*
    is possible, p up to which *no* is). A part that had too few rows or days takes its group's; ``""`` holds for groups
    that had too few days of their own, or were never seen.
    """

    confidence: float
    limits: dict[str, tuple[float, float]]

    @classmethod
    def learn(
        cls, p: Array, share: Array, day: Array, group: Array, confidence: float, part: Array | None = None
    ) -> Sets:
        """From unseen probabilities ``p`` and labels ``share`` in [0, 1] (expected, where not known yet), shape (n,)."""
        limits: dict[str, tuple[float, float]] = {}

        def add(name: str, mine: Array) -> None:
            yes = quantile(-p[mine], day[mine], confidence, share[mine])
            no = quantile(p[mine], day[mine], confidence, 1.0 - share[mine])
            if math.isfinite(yes) and math.isfinite(no):
                limits[name] = (-yes, no)

        for name in ["", *np.unique(group).tolist()]:
            add(str(name), np.ones(len(p), bool) if name == "" else group == name)
        if part is not None:
            keys, code = _parts(group, part)
            yes, no = np.bincount(code, share), np.bincount(code, 1.0 - share)
            for at in np.flatnonzero(np.minimum(yes, no) >= LEAST_OF_PART).tolist():
                add(json.dumps(list(keys[at]), ensure_ascii=False), code == at)
        return cls(confidence, limits)

    def of(self, p: Array, group: Array, part: Array | None = None) -> tuple[Array, Array, Array]:
        """Whether *yes* and *no* are possible, and whether that is known at all: bool, shape (n,)."""
        keys, code = _parts(group, np.full(len(p), "") if part is None else part)
        everybody = self.limits.get("", (math.nan, math.nan))
        found = [
            self.limits.get(json.dumps(list(key), ensure_ascii=False), self.limits.get(key[0], everybody))
            for key in keys
        ]
        limit = np.array(found, np.float64).reshape(-1, 2)[code]
        return p >= limit[:, 0], p <= limit[:, 1], ~np.isnan(limit[:, 0])

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"confidence": self.confidence, "limits": {k: list(v) for k, v in self.limits.items()}}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Sets:
        """What ``to_dict`` gave."""
        return cls(raw["confidence"], {k: (v[0], v[1]) for k, v in raw["limits"].items()})


def _parts(group: Array, part: Array) -> tuple[list[tuple[str, str]], Array]:
    """The distinct (group, part), and each row's place among them."""
    groups, mine = np.unique(group, return_inverse=True)
    parts, its = np.unique(part, return_inverse=True)
    code, place = np.unique(mine * max(len(parts), 1) + its, return_inverse=True)
    return [(str(groups[c // len(parts)]), str(parts[c % len(parts)])) for c in code.tolist()], place


@dataclass(frozen=True)
class Bands:
    """What lies around a prediction, by how large the prediction is: one (low, high) for each level of it.

    edges: the levels' inner bounds, ascending. low, high: of the rest that ``learn`` was given; NaN where there were
    fewer days than both tails need.
    """

    confidence: float
    edges: Array
    low: Array
    high: Array

    @classmethod
    def learn(cls, predicted: Array, rest: Array, day: Array, confidence: float, levels: int = 3) -> Bands:
        """From unseen predictions and their rest (a difference or a ratio, as the caller will add or multiply it back).

        Rows whose rest is not finite are left out. Half of what may be missed lies in each tail.
        """
        known = np.isfinite(rest) & np.isfinite(predicted)
        predicted, rest, day = predicted[known], rest[known], day[known]
        level = 0.5 + confidence / 2
        wanted = levels if len(rest) >= 200 * levels else 1
        edges = np.unique(np.quantile(predicted, np.linspace(0, 1, wanted + 1)[1:-1])) if wanted > 1 else np.zeros(0)
        code = np.searchsorted(edges, predicted, side="right")
        whole = (-quantile(-rest, day, level), quantile(rest, day, level))
        bounds = []
        for one in range(len(edges) + 1):
            mine = code == one
            low, high = -quantile(-rest[mine], day[mine], level), quantile(rest[mine], day[mine], level)
            bounds.append((low, high) if math.isfinite(low) and math.isfinite(high) else whole)
        found = np.array(bounds, np.float64)
        found[~np.isfinite(found).all(axis=1)] = np.nan
        return cls(confidence, edges, found[:, 0], found[:, 1])

    def around(self, predicted: Array) -> tuple[Array, Array]:
        """The lower and the upper rest of each prediction, shape (n,); NaN where it is not known."""
        level = np.searchsorted(self.edges, predicted, side="right")
        return self.low[level], self.high[level]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: no NaN."""
        sides = {
            name: [None if math.isnan(x) else x for x in side.tolist()]
            for name, side in (("low", self.low), ("high", self.high))
        }
        return {"confidence": self.confidence, "edges": self.edges.tolist(), **sides}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Bands:
        """What ``to_dict`` gave."""
        return cls(raw["confidence"], *(np.array(raw[name], np.float64) for name in ("edges", "low", "high")))
