"""A kind of policy that somebody adds: who earns more than the middle gets a step more, who earns less a step less.

Belongs here: the least that a kind of policy can be. Does not: anything that another file would have to know of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.policies.arms import Explore
from models.policies.base import Decided, Limit, PolicySettings, Value, setting


class NudgePolicy(PolicySettings):
    """The section ``policy`` with kind ``nudge``."""

    kind: Literal["nudge"]
    column: str = "budget_micros"
    step: float = 0.1


class Nudge:
    """The kind ``nudge``."""

    settings = NudgePolicy
    money = True
    explored = None
    whole_columns: ClassVar[Mapping[str, str]] = {"column": "micros of money"}
    columns = ()
    absent: ClassVar[Mapping[str, str]] = {"off-policy value": "what a nudge would have brought nobody logged"}

    def decide(
        self,
        spec: NudgePolicy,
        features: pa.Table,
        scores: pa.Table,
        drawn: pa.Table,
        *,
        explore: Explore | None = None,
        key: str = "",
    ) -> tuple[pa.Table, dict[str, Any]]:
        rows = features.join(scores.select(["entity_id", "earns"]), "entity_id").join(
            drawn.select(["unit", "arm", "arm_probability"]), "unit"
        )
        rows = rows.sort_by("entity_id")
        before, earns = rows[spec.column].to_numpy(), rows["earns"].to_numpy()
        follows = np.isin(rows["arm"].to_numpy(zero_copy_only=False), ["champion", "challenger"])
        move = (
            np.where(follows & np.isfinite(earns), np.sign(earns - np.nanmedian(earns)), 0)
            * np.rint(before * spec.step / 10_000)
            * 10_000
        )
        n, after = rows.num_rows, (before + move).astype(np.int64)
        return pa.table({
            "entity_id": rows["entity_id"], "unit": rows["unit"], "arm": rows["arm"], "arm_probability": rows["arm_probability"],
            "perturbation": pa.nulls(n, pa.float64()), "perturbation_probability": pa.nulls(n, pa.float64()),
            "before": before.astype(np.int64), "after": after, "changed": after != before, "review": np.zeros(n, dtype=bool),
            "expected_gain": pa.nulls(n, pa.float64()), "reasons": [["nudged"]] * n,
        }), {}  # fmt: skip

    def status_quo(self, spec: NudgePolicy) -> str:
        return spec.column

    def starts_from(self, spec: NudgePolicy, rows: pa.Table) -> pa.Table:
        return rows

    def competes_with(self, spec: NudgePolicy, chosen: pa.Table, row: pa.Table, arm: pa.Array) -> pa.Array:
        return pc.is_valid(chosen["unit"])

    def stands_in(self, spec: NudgePolicy) -> set[str | None]:
        return {spec.column}

    def least_change(self, before: int) -> float:
        return 1.0

    def limits(self, spec: NudgePolicy, row: pa.Table, arm: str) -> Iterator[Limit]:
        yield Limit("step", spec.step, spec.step * 0.01, 1.0, setting("step"))

    def against_guardrails(self, spec: NudgePolicy, levels: tuple[int, int] | None, unit: int | None) -> list[str]:
        return []

    def against_delivery(self, spec: NudgePolicy, push_unit: int, connector_unit: int | None) -> list[str]:
        return []

    def value(
        self, spec: NudgePolicy, rows: pa.Table, mine: Decided, theirs: Decided, how: dict[str, Any]
    ) -> Value | str:
        raise AssertionError("it is declared absent, so that nobody asks")


KIND = Nudge()
