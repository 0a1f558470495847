"""Small batches and a clock for tests of the ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa

from delivery.ledger import NewBatch

KEY = b"a key for tests only"
NOW = datetime(2026, 4, 11, 4)


class Clock:
    """Naive UTC that moves when told to."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def add(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def new_batch(batch_id: str = "b1", **other: Any) -> NewBatch:
    said: dict[str, Any] = {
        "batch_id": batch_id, "workflow": "ad_budget", "kind": "decision", "day": date(2026, 4, 10), "digest": "d" * 64,
        "status": "READY", "step": "champion", "as_of": NOW, "decided_at": NOW, "run_id": "run-1",
        "record": {"model_version": 3, "shadow_price": 0.25}, "findings": [{"rule": "blast", "entity": "line-0"}],
        "pools": {"champion": 10**9},
    }  # fmt: skip
    return NewBatch(**(said | other))


def some_decisions(
    batch_id: str = "b1", entities: int | Sequence[str] = 4, *, changed: Sequence[bool] | None = None, **columns: Any
) -> pa.Table:
    """Decisions from 100 to 120, all changed; ``columns`` replace whole columns."""
    names = [f"line-{i}" for i in range(entities)] if isinstance(entities, int) else list(entities)
    n = len(names)
    said: dict[str, Any] = {
        "decision_id": [hashlib.sha256(f"{batch_id}\0{e}".encode()).hexdigest()[:20] for e in names],
        "entity_id": names,
        "unit": pa.array([f"campaign-{i % 2}" for i in range(n)], pa.string()),
        "arm": pa.array(["champion"] * n, pa.string()),
        "arm_probability": pa.array([0.8] * n, pa.float64()),
        "perturbation": pa.array([None] * n, pa.float64()),
        "perturbation_probability": pa.array([None] * n, pa.float64()),
        "before": pa.array([100] * n, pa.int64()),
        "after": pa.array([120] * n, pa.int64()),
        "changed": pa.array([True] * n if changed is None else list(changed), pa.bool_()),
        "review": pa.array([False] * n, pa.bool_()),
        "expected_gain": pa.array([1.5 + i for i in range(n)], pa.float64()),
        "reasons": pa.array([["more is earned here", 'a "quoted", word']] * n, pa.list_(pa.string())),
    }
    said["entity_id"] = pa.array(said["entity_id"], pa.string())
    said["decision_id"] = pa.array(said["decision_id"], pa.string())
    return pa.table(said | columns)
