"""Ranking a queue: the index of each ticket, the order within its team, and the level that follows from the team's capacity.

Belongs here: pure functions of arrays. Does not: which tickets, arms and reasons (``models.policies.priority``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def index(
    cost: np.ndarray, p_now: np.ndarray, p_later: np.ndarray, effort: np.ndarray, *, late_cost: float = 0.0
) -> np.ndarray:
    """Cost avoided per hour of work by beginning each ticket now rather than later; the largest goes first.

    cost x ([P(miss | later) - P(miss | now)] + late_cost x P(miss | now)) / E[effort]; all arrays of shape (n,), effort
    in hours. ``late_cost=0`` is the plain rule, which never serves a lost ticket before one that can be saved.
    """
    return np.asarray(cost * (np.maximum(p_later - p_now, 0.0) + late_cost * p_now) / effort)


def rank(team: pa.Array, value: np.ndarray, due: pa.Array, entity_id: pa.Array) -> np.ndarray:
    """Positions of the tickets team by team, largest index first; ties by due time (unknown last), then by name.

    Returns a permutation of 0..n-1; it orders the same tickets the same way in whatever order they come.
    """
    table = pa.table({"team": team, "value": pa.array(value), "due": due, "entity_id": entity_id})
    keys = [("team", "ascending"), ("value", "descending"), ("due", "ascending"), ("entity_id", "ascending")]
    return np.asarray(pc.sort_indices(table, sort_keys=keys))


def work_before(order: np.ndarray, team: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per ticket (in the callers' order): seconds of work ranked before it in its team, and its rank there from 1.

    order: from ``rank``; team: codes of shape (n,); seconds: whole seconds, so that sums are exact.
    """
    sorted_team, sorted_work = team[order], seconds[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = sorted_team[1:] != sorted_team[:-1]
    start = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    before = np.cumsum(sorted_work) - sorted_work
    out, place = np.empty(len(order), dtype=np.int64), np.empty(len(order), dtype=np.int64)
    out[order] = before - before[start]
    place[order] = np.arange(len(order)) - start + 1
    return out, place


def levels(before: np.ndarray, capacity: np.ndarray, level_days: tuple[float, ...]) -> np.ndarray:
    """The priority of each ticket: 1 + the cuts that the work ranked before it reaches.

    A ticket is within a cut when its team can begin it there: the tickets of priorities 1..k hold at most
    ``level_days[k-1]`` days of work beside the last of them. before: seconds; capacity: hours a day.
    """
    cuts = np.asarray(level_days) * (capacity * 3600.0)[:, None]
    return np.asarray(1 + np.sum(before[:, None] >= cuts, axis=1, dtype=np.int64))


def looked_up(keys: pa.Array, values: Mapping[str, float], other: float) -> np.ndarray:
    """The value of each key, ``other`` for one that has none."""
    at = pc.fill_null(pc.index_in(keys, value_set=pa.array(list(values), pa.string())), len(values))
    return np.asarray(np.array([*values.values(), other], dtype=np.float64)[np.asarray(at)])
