"""How long the ledger takes to record and to prove a batch of a million decisions, and where the time goes.

Belongs here: timing of ``delivery.ledger``. Does not: whether what it records is right (tests/delivery/ledger/test_ledger.py).
Run: ``python -m benchmarks.ledger [decisions]``; the target is 1,000,000 on SQLite in less than 20 s.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from delivery.ledger import Ledger, NewBatch, batches, hash_chain, ledger

TARGET_S = 20.0
NOW = datetime(2026, 4, 11, 4)


def decisions(n: int, batch: str) -> pa.Table:
    """Decisions as the stage writes them, every one changed: the most that a batch can cost."""
    rng = np.random.default_rng(0)
    before = rng.integers(10**6, 10**9, n)
    reasons = [["explored within the guardrails"], ["more is earned here", "largest daily change"], ["cap"]]
    return pa.table(
        {
            "decision_id": [hashlib.sha256(f"{batch}{i}".encode()).hexdigest()[:20] for i in range(n)],
            "entity_id": [f"line-{i:08d}" for i in range(n)],
            "unit": [f"campaign-{i // 20:06d}" for i in range(n)],
            "arm": np.array(["champion", "holdout", "explore"])[rng.integers(0, 3, n)],
            "arm_probability": np.full(n, 0.8),
            "perturbation": pa.array(rng.normal(size=n), mask=rng.random(n) < 0.8),
            "perturbation_probability": pa.array(np.full(n, 0.5), mask=rng.random(n) < 0.8),
            "before": before,
            "after": before + 10_000,
            "changed": np.ones(n, bool),
            "review": np.zeros(n, bool),
            "expected_gain": rng.normal(size=n),
            "reasons": pa.array([reasons[i] for i in rng.integers(0, 3, n)]),
        }
    )


def batch(batch_id: str) -> NewBatch:
    return NewBatch(
        batch_id=batch_id, workflow="ad_budget", kind="decision", day=date(2026, 4, 10), digest="0" * 64, status="READY",
        step="champion", as_of=NOW, decided_at=NOW, run_id="benchmark", record={"model_version": 1},
    )  # fmt: skip


class Split:
    """Seconds by part, measured around the functions that do it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def around(self, **parts: tuple[Any, str]) -> Iterator[None]:
        kept = [(owner, name, getattr(owner, name)) for owner, name in parts.values()]
        for said, (owner, name) in parts.items():
            setattr(owner, name, self._timed(said, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)

    def _timed(self, said: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[said] = self.seconds.get(said, 0.0) + time.perf_counter() - start

        return timed

    def __str__(self) -> str:
        return ", ".join(f"{said} {seconds:.1f}" for said, seconds in self.seconds.items())


def main() -> int:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        with Ledger.open(f"sqlite:///{path}", key=b"benchmark-benchmark", clock=lambda: NOW) as book:
            # On the second day the names are known already.
            for day in ("first", "second"):
                made = decisions(n, day)
                split = Split()
                start, busy = time.perf_counter(), time.process_time()
                with split.around(
                    columns=(ledger, "to_stored"),
                    leaves=(hash_chain, "leaf_hashes"),
                    tree=(hash_chain, "merkle_root"),
                    inserts=(batches, "insert_bulk"),
                ):
                    book.record_batch(batch(day), made)
                took = time.perf_counter() - start
                busy = time.process_time() - busy
                slowest = max(slowest, took)
                rest = took - sum(split.seconds.values())
                print(
                    f"record {n:,} decisions, {day} batch: {took:.1f} s, of which {busy:.1f} s processor ({split}, outbox and commit {rest:.1f})"
                )
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            print(f"on disk {size / 2**20:,.0f} MiB")
            start = time.perf_counter()
            verdict = book.verify()
            print(
                f"verify {2 * n:,} decisions: {time.perf_counter() - start:.1f} s, {'ok' if verdict.ok else verdict.problems}"
            )
            start = time.perf_counter()
            book.decisions("first")
            print(f"read {n:,} decisions: {time.perf_counter() - start:.1f} s")
    if slowest > TARGET_S * n / 1_000_000:
        print(f"over the target of {TARGET_S:.0f} s for 1,000,000")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
