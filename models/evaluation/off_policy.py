"""What a model is worth to its policy, from what happened while somebody else decided (off-policy).

Belongs here: the policy's decisions by a model's scores on held-out days, and what they would have brought, with the
assumption that this rests on. Does not: figures of the predictions themselves (``models.evaluation.paired``), the verdict.

How a policy's value is measured, its kind says (``models.policies``).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models import catalog
from models.policies.base import Decided, PolicySettings, Value, numbers


def at_status_quo(rows: pa.Table, policy: PolicySettings) -> pa.Table:
    """The rows sorted by day, with the perturbation of the day itself taken out: where a plan starts from."""
    rows = rows.take(pc.sort_indices(rows, sort_keys=[("day", "ascending"), ("entity_id", "ascending")]))
    return catalog.policy(policy.kind).starts_from(policy, rows)


def decisions(rows: pa.Table, scorer: Any, policy: PolicySettings) -> Decided:
    """The policy over each day's rows (``at_status_quo``) by a model's scores, everybody in one arm that follows it."""
    kind, scores = catalog.policy(policy.kind), scorer.score(rows)
    day = rows.column("day").cast(pa.date32()).cast(pa.int32()).to_numpy(zero_copy_only=False)
    edges = [0, *(np.flatnonzero(np.diff(day)) + 1).tolist(), len(day)]
    moves = [np.zeros(0)]
    for start, end in pairwise(edges):
        if start == end:
            continue
        mine, said = rows.slice(start, end - start), scores.slice(start, end - start)
        arms = pa.table({"unit": pc.unique(mine.column("unit").cast(pa.string()))})
        arms = arms.append_column("arm", pa.array(["champion"] * arms.num_rows))
        arms = arms.append_column("arm_probability", pa.array([1.0] * arms.num_rows))
        decided, _ = kind.decide(policy, mine, said, arms)
        moves.append(numbers(decided, "after", np.nan) - numbers(decided, "before", np.nan))
    move = np.nan_to_num(np.concatenate(moves))
    # a lower number is an earlier turn
    return Decided(scores, move, move if kind.money else -move)


def value(
    rows: pa.Table,
    mine: Decided,
    theirs: Decided,
    policy: PolicySettings,
    *,
    draws: int,
    seed: int,
    confidence: float,
) -> Value | str:
    """What the candidate's decisions are worth beside the other's; a sentence where that cannot be measured.

    rows: as ``at_status_quo`` gives them, with their outcomes.
    """
    kind = catalog.policy(policy.kind)
    if "off-policy value" in kind.absent:
        return f"not measured: {catalog.why_not(policy.kind, 'off-policy value')}"
    found = kind.value(policy, rows, mine, theirs, {"draws": draws, "seed": seed, "confidence": confidence})
    if isinstance(found, Value) and found.loss is None:
        return replace(found, no_loss=catalog.why_not(policy.kind, "loss beside moving nothing"))
    return found
