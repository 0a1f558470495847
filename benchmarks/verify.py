"""How long it takes to prove a ledger of two million decisions, each of them delivered with an attempt of its own.

Belongs here: timing ``Ledger.verify``. Does not: what it finds (tests/delivery/ledger/test_ledger_tampering.py).
Run: ``python -m benchmarks.verify [decisions a batch × batches …]``, as in ``5000x400``; the target is 60 s of a processor.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path

from sqlalchemy import text

from benchmarks.ledger import NOW, decisions
from delivery.ledger import Ledger, NewBatch
from delivery.ledger.database import writing

TARGET_S = 60.0
SHAPES = ((5_000, 400), (1_000_000, 2))
"""Decisions of a batch, and batches: a year of small days, and two very large ones."""


def fill(book: Ledger, size: int, batches: int) -> None:
    """Batches of one workflow, a day each, all delivered. The rows of their deliveries are written in bulk: sending two
    million is not what is measured."""
    lease = book.lease("ads")
    for n in range(batches):
        made, name = decisions(size, f"{n}-"), f"b{n:04d}"
        book.record_batch(
            NewBatch(
                batch_id=name, workflow="ad_budget", kind="decision", day=date(2025, 1, 1) + timedelta(days=n), digest="0" * 64,
                status="READY", step="champion", as_of=NOW, decided_at=NOW, run_id="benchmark", record={"model_version": 1},
            ),
            made,
        )  # fmt: skip
        book.open_push(lease, name)
        with writing(book.engine) as connection, connection.begin():
            for statement in DELIVERED:
                at = {"at": f"2026-04-{10 + n // 60:02d} 04:{n % 60:02d}:00.000000", "s": n + 1}
                connection.execute(text(statement), {k: v for k, v in at.items() if f":{k}" in statement})
        book.close_push(lease, name, True)


DELIVERED = (
    "UPDATE deliveries SET state = 'ACKED', target = c.entity, expected = c.before, sent = c.after, prior = c.before, "
    "observed = c.after, verified_at = :at, attempts = 1 FROM decisions c "
    "WHERE c.sequence = deliveries.sequence AND c.n = deliveries.n AND deliveries.sequence = :s",
    "INSERT INTO attempts SELECT sequence, n, 1, sent, expected, substr(target, 1, 32), :at, :at, 'accepted', 6.5, NULL, NULL "
    "FROM deliveries WHERE sequence = :s",
    "INSERT INTO acknowledged SELECT 'ads', c.entity, d.target, d.observed, d.verified_at, d.sequence, d.n FROM deliveries d "
    "JOIN decisions c ON c.sequence = d.sequence AND c.n = d.n WHERE d.sequence = :s ON CONFLICT (system, entity) DO UPDATE SET "
    "target = excluded.target, value = excluded.value, verified_at = excluded.verified_at, sequence = excluded.sequence, n = excluded.n",
)
"""What a push of a batch leaves when every delivery lands at once; its target is called as the entity is."""


def main() -> int:
    shapes = [(int(a), int(b)) for a, b in (one.split("x") for one in sys.argv[1:])] or SHAPES
    slowest = 0.0
    for size, batches in shapes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ledger.db"
            with Ledger.open(f"sqlite:///{path}", key=b"benchmark-benchmark", clock=lambda: NOW) as book:
                fill(book, size, batches)
                start, busy = time.perf_counter(), time.process_time()
                verdict = book.verify()
                took, busy = time.perf_counter() - start, time.process_time() - busy
                most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                said = "ok" if verdict.ok else verdict.problems[:3]
                print(
                    f"verify {size * batches:,} decisions in {batches} batches, all delivered: {took:.1f} s, of which {busy:.1f} s "
                    f"processor; {path.stat().st_size / 2**20:,.0f} MiB on disk, {most:.1f} GiB of memory: {said}",
                    flush=True,
                )
                slowest = max(slowest, busy * 2_000_000 / (size * batches))
    if slowest > TARGET_S:
        print(f"over the target of {TARGET_S:.0f} s for 2,000,000")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
