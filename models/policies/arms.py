"""Arms: who is drawn into which, for how long, with what probability; and the randomised perturbations of the arm
``explore``.

Belongs here: the draw, the epochs, the perturbation, and what a workflow.yaml may say of them. Does not: what an arm
then does (the policies), or how arms are compared (the regression guard).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

Arm = Literal["holdout", "champion", "challenger", "explore"]
Design = Literal["entity", "cohort", "switchback"]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

ARMS: tuple[str, ...] = get_args(Arm)
SHORTEST_EPOCH: dict[str, int] = {"entity": 1, "cohort": 14, "switchback": 7}


class Explore(BaseModel):
    """Small randomised perturbations around the status quo, from which slopes are learned."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: float = Field(
        gt=0, lt=1, description="How far a line is moved up or down, as a share of its status quo (0.2: ±20%)"
    )


class Arms(BaseModel):
    """The section `arms` of a workflow.yaml: how decisions are compared with one another."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    design: Design = Field(
        description="entity: each is decided on once and affects no other; cohort: the action persists, arms stay "
        "drawn for an "
        "epoch; switchback: units share a resource and are redrawn every epoch"
    )
    unit: str = Field(
        min_length=1,
        description="Feature column that an arm is drawn for (entity_id, or what competes: campaign, team)",
    )
    epoch: int = Field(
        gt=0, description="Days for which an arm stays drawn (cohort: at least 14, switchback: at least 7)"
    )
    washout: int = Field(
        default=0, ge=0, description="First days of an epoch after a redraw, which count for no verdict"
    )
    shares: dict[Arm, float] = Field(description="Weight of each arm; normalised to sum to one")
    explore: Explore | None = Field(default=None, description="Needed where the arm explore has a share")

    @model_validator(mode="after")
    def _consistent(self) -> Arms:
        normalised(self.shares)
        if self.epoch < SHORTEST_EPOCH[self.design]:
            raise ValueError(
                f"epoch: {self.design} needs at least {SHORTEST_EPOCH[self.design]} days, found {self.epoch}"
            )
        if self.washout >= self.epoch:
            raise ValueError(f"washout: {self.washout} days leave nothing of an epoch of {self.epoch}")
        if self.design == "entity" and self.washout:
            raise ValueError("washout: an entity is decided on once, nothing carries over; leave it out")
        if self.shares.get("explore") and self.explore is None:
            raise ValueError("explore: the arm explore has a share; say its step, for example explore: {step: 0.2}")
        return self

    @property
    def misjudged(self) -> str | None:
        """Why outcomes under these arms may not be judged, with the way out; None where they may.

        Not refused on reading: what was decided under such arms must still be replayed. Judged as if independent, entities
        that share the arm of their unit were rolled back falsely in a sixth of the months without an effect.
        """
        if self.design != "entity" or self.unit == "entity_id":
            return None
        return (
            f"the design entity takes each entity for an observation of its own, but every {self.unit} has one arm for many; "
            "write unit: entity_id, or take the design cohort (what is decided lasts) or switchback (the entities of a unit "
            "share what serves them), which count units"
        )


def normalised(shares: Mapping[Any, float]) -> dict[str, float]:
    """Shares that sum to one, in the order of ARMS, arms without a share left out.

    Raises ValueError for an unknown arm, a negative or infinite share, or no share at all.
    """
    for arm, share in shares.items():
        if arm not in ARMS:
            raise ValueError(f"shares: unknown arm {arm!r} (allowed here: {', '.join(ARMS)})")
        if not (math.isfinite(share) and share >= 0):
            raise ValueError(f"shares: {arm} is {share}; a share is a finite number of zero or more")
    total = math.fsum(shares.values())
    if total <= 0:
        raise ValueError("shares: no arm has a share above zero")
    return {arm: shares[arm] / total for arm in ARMS if shares.get(arm)}


def _hashes(parts: Sequence[str], names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first 64 bits of SHA-256 over (parts, name), one for each name."""
    start = hashlib.sha256(json.dumps(list(parts)).encode() + b"\0")

    def digest(name: str) -> bytes:
        one = start.copy()
        one.update(name.encode())
        return one.digest()[:8]

    return np.frombuffer(b"".join(map(digest, names)), dtype=">u8").astype(np.uint64)


def _uniform(hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> Floats:
    return (hashes >> np.uint64(11)) / 2.0**53


def draw(
    units: Sequence[str],
    *,
    workflow: str,
    design: Design,
    epoch: str,
    shares: Mapping[Any, float],
    strata: Sequence[str] | None = None,
    keep: pa.Table | None = None,
) -> pa.Table:
    """Draw an arm for every unit; the same (workflow, epoch, unit) gives the same arm, in whatever order and company.

    Args:
        units: Distinct names.
        epoch: As `epoch_of` names it; another epoch is another draw.
        shares: Weights of the arms, normalised.
        strata: A label for each unit. Within a stratum of m units every arm then gets its share of m, rounded down
            or up
            (systematic sampling in the order of the hashes), and every unit still has the arm's share as its
            probability. Such a draw depends on which units are there: hold it for the epoch with `keep`.
        keep: What was drawn earlier in this epoch (unit, arm, arm_probability): these units keep it.

    Returns:
        unit, arm, arm_probability (of the arm that was drawn), in the order of `units`.

    Raises:
        ValueError: repeated units; strata of another length, or with design `entity`, whose units arrive one by one.
    """
    names = np.asarray(units, dtype=object)
    if len(set(units)) != len(names):
        first = Counter(units).most_common(1)[0][0]
        raise ValueError(f"units: {first!r} stands more than once; draw once for a unit, then join its entities")
    if design not in SHORTEST_EPOCH:
        raise ValueError(f"design: {design!r} is unknown (allowed here: {', '.join(SHORTEST_EPOCH)})")
    weights = normalised(shares)
    arm_of = np.full(len(names), "", dtype=object)
    probability = np.zeros(len(names))
    fresh = np.ones(len(names), dtype=bool)
    if keep is not None and keep.num_rows:
        known = {u: i for i, u in enumerate(keep["unit"].to_pylist())}
        at = np.array([known.get(u, -1) for u in units], dtype=np.int64)
        fresh = at < 0
        arm_of[~fresh] = np.asarray(keep["arm"].to_pylist(), dtype=object)[at[~fresh]]
        probability[~fresh] = keep["arm_probability"].to_numpy()[at[~fresh]]
    hashes = _hashes([workflow, epoch, "arm"], names[fresh].tolist())
    if strata is None:
        position = _uniform(hashes)
    elif design == "entity":
        raise ValueError(
            "strata: units of the design 'entity' arrive one by one and are drawn independently; leave strata out"
        )
    elif len(strata) != len(names):
        raise ValueError(f"strata: {len(strata)} labels for {len(names)} units")
    else:
        labels, stratum = np.unique(np.asarray(strata, dtype=str)[fresh], return_inverse=True)
        order = np.lexsort((names[fresh].astype(str), hashes, stratum))
        size = np.bincount(stratum, minlength=len(labels))
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - (np.cumsum(size) - size)[stratum[order]]
        # units that enter an epoch later start elsewhere, or each that comes alone would get the arm of the first
        later = sorted(names[fresh].tolist()) if not fresh.all() else []
        start = _uniform(_hashes([workflow, epoch, "stratum", *later], labels.tolist()))
        position = ((rank + start[stratum]) / size[stratum]) % 1.0
    arms = np.array(list(weights), dtype=object)
    edges = np.cumsum(list(weights.values()))[:-1]
    chosen = np.searchsorted(edges, position, side="right")
    arm_of[fresh], probability[fresh] = arms[chosen], np.array(list(weights.values()))[chosen]
    return pa.table(
        {
            "unit": pa.array(names, pa.string()),
            "arm": pa.array(arm_of, pa.string()),
            "arm_probability": pa.array(probability, pa.float64()),
        }
    )


def epoch_of(day: date, start: date, epoch_days: int, washout: int) -> tuple[str, bool]:
    """The epoch of a day, named by its first day (ISO), and whether the day lies in its wash-out.

    Epochs follow one another from ``start``; the first has no wash-out, since nothing was drawn before it.
    Raises ValueError for a day before ``start``.
    """
    since = (day - start).days
    if since < 0:
        raise ValueError(f"{day} lies before the workflow's start {start}: no arm is drawn")
    number, within = divmod(since, epoch_days)
    return (start + timedelta(days=number * epoch_days)).isoformat(), number > 0 and within < washout


@dataclass(frozen=True)
class Perturbed:
    """What exploring makes of the status quo; arrays in the order of the entities."""

    after: Ints
    multiplier: Floats
    """after / status quo; 1.0 where nothing was drawn."""
    probability: Floats
    """Probability of exactly this multiplier: 0.5 where a sign was drawn, 1.0 where nothing was."""


def perturb(entities: Sequence[str], base: Ints, low: Ints, high: Ints, *, step: float, key: str) -> Perturbed:
    """Move pairs of entities by the same amount in opposite directions, the direction a fair coin.

    Every entity may be moved by min(step x base, its room to `low`, its room to `high`), so that both directions stay
    inside the bounds; neighbours in that amount form a pair and move by the smaller of the two. So the sum is kept
    to the
    micro, the multipliers are symmetric around the status quo, and each sign has probability one half whatever the
    others drew. The odd one out (the smallest) and what cannot move stay.

    Args:
        entities: Distinct names; with `key` they decide the coins, so neither their order nor a second run changes one.
        base, low, high: Status quo and bounds, micros, shape (n,).
        key: Names the draw, for example workflow and day: another key gives other coins.
    """
    amount = np.minimum(np.floor(step * base).astype(np.int64), np.minimum(high - base, base - low))
    names = np.asarray(entities, dtype=object)
    order = np.lexsort((names.astype(str), amount))
    order = order[amount[order] >= 1]
    order = order[len(order) % 2 :]
    small, large = order[0::2], order[1::2]
    coin = _hashes([key, "perturb"], [f"{a}\0{b}" for a, b in zip(names[small], names[large], strict=True)])
    moved = np.where(coin >> np.uint64(63), 1, -1) * amount[small]
    after = np.array(base, dtype=np.int64)
    after[small] += moved
    after[large] -= moved
    probability = np.ones(len(names))
    probability[order] = 0.5
    return Perturbed(after, np.divide(after, base, out=np.ones(len(names)), where=base > 0), probability)
