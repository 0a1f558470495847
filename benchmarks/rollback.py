"""How long it takes to bring the values of many days back, on the ledger of a year.

Belongs here: timing of ``delivery.rollback``. Does not: whether what it brings back is right (tests/delivery/rollback/test_rollback.py).
Run: ``python -m benchmarks.rollback [days] [decisions a day] [days taken back]``; the target is that 60 of 365 days of 5,000
decisions, all of them changed, are back within 15 minutes on SQLite. ``--keep FOLDER`` builds the year there once and works on
a copy.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from datetime import date, datetime, timedelta
from pathlib import Path

from benchmarks.ledger import decisions
from delivery import rollback
from delivery.connectors.base import Capabilities
from delivery.ledger import Ledger, NewBatch
from delivery.push import PushSettings
from tests.support.fakes import Clock, FakeSystem, dead_holder

TARGET_S = 900.0
FIRST = date(2025, 4, 1)
SYSTEM = "advertising"
STEP = 10_000
"""What each day adds to each budget, in micros."""
CAN = Capabilities(conditional_write=True, bulk_read=1_000, bulk_write=1_000)


def opened(folder: Path, clock: Clock) -> Ledger:
    return Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=b"benchmark-benchmark", clock=clock)


def build(folder: Path, days: int, size: int) -> None:
    """A ledger of so many days, each of which changed every value and proved it."""
    clock = Clock(datetime.combine(FIRST, datetime.min.time()) + timedelta(hours=28))
    base = decisions(size, "base").select(
        [c for c in decisions(1, "base").column_names if c not in ("decision_id", "before", "after")]
    )
    start = decisions(size, "base")["before"].to_pylist()
    with opened(folder, clock) as book:
        for n in range(days):
            clock.sleep(86_400 if n else 0)
            made = (
                base.append_column("decision_id", [[f"d{n}-{i}" for i in range(size)]])
                .append_column("before", [[value + STEP * n for value in start]])
                .append_column("after", [[value + STEP * (n + 1) for value in start]])
            )
            name = f"day{n}"
            row = book.record_batch(
                NewBatch(
                    batch_id=name, workflow="ad_budget", kind="decision", day=FIRST + timedelta(days=n), digest=f"{n:064d}",
                    status="READY", step="champion", as_of=clock() - timedelta(hours=1), decided_at=clock(), run_id="benchmark",
                    record={"model_version": 1},
                ),
                made,
            )  # fmt: skip
            lease = book.lease(SYSTEM, dead_holder(n))
            book.open_push(lease, name)
            _prove(book, row.sequence, clock())
            book.close_push(lease, name, True)
            book.release(lease)
            if n % 50 == 49:
                print(f"{n + 1} days are built", flush=True)


def _prove(book: Ledger, sequence: int, at: datetime) -> None:
    """What a push of everything leaves behind, without the push: it is not what is measured."""
    with book.engine.begin() as connection:
        for statement in (
            "UPDATE deliveries SET state = 'ACKED', attempts = 1, verified_at = ?, (target, expected, prior, sent, observed) ="
            " (SELECT 't' || substr(c.entity, 2), c.before, c.before, c.after, c.after FROM decisions c"
            "  WHERE c.sequence = deliveries.sequence AND c.n = deliveries.n) WHERE sequence = ?",
            "INSERT INTO attempts (sequence, n, attempt, value, idempotency_key, started_at, ended_at, outcome)"
            " SELECT sequence, n, 1, sent, 'key', verified_at, ?, 'accepted' FROM deliveries WHERE sequence = ?",
            "INSERT OR REPLACE INTO acknowledged (system, entity, target, value, verified_at, sequence, n)"
            f" SELECT '{SYSTEM}', c.entity, d.target, d.observed, ?, d.sequence, d.n FROM deliveries d"
            " JOIN decisions c ON c.sequence = d.sequence AND c.n = d.n WHERE d.sequence = ?",
        ):
            connection.exec_driver_sql(statement, (at.isoformat(" ", "microseconds"), sequence))


class Year:
    """A built ledger and what it left downstream."""

    def __init__(self, folder: Path, days: int, size: int) -> None:
        self.clock = Clock(datetime.combine(FIRST + timedelta(days=days), datetime.min.time()) + timedelta(hours=7))
        last = decisions(size, "base")
        held = zip(*(last[c].to_pylist() for c in ("entity_id", "before")), strict=True)
        self.fake = FakeSystem({e: v + STEP * days for e, v in held}, can=CAN, clock=self.clock, system=SYSTEM)
        self.folder = folder

    def take_back(self, which: rollback.Selection) -> float:
        """Seconds that it takes."""
        with opened(self.folder, self.clock) as book:
            start = time.perf_counter()
            report = rollback.roll_back(
                book, lambda _: self.fake, which, actor="benchmark", reason="how long it takes",
                settings=PushSettings(wave=2_000, late_s=0.1), clock=self.clock, sleep=self.clock.sleep,
                monotonic=self.clock.monotonic, holder=dead_holder(10_000),
            )  # fmt: skip
            took = time.perf_counter() - start
        restored, left = (sum(one.restored for one in report.batches), sum(len(one.left) for one in report.batches))
        done = "complete" if report.complete else "NOT complete"
        print(
            f"{which}: {done}, {len(report.batches)} batches, {restored:,} restored, {left:,} left: {took:.1f} s",
            flush=True,
        )
        return took


def main() -> int:
    """Print the seconds; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("days", type=int, nargs="?", default=365)
    parser.add_argument("size", type=int, nargs="?", default=5_000)
    parser.add_argument("back", type=int, nargs="?", default=60)
    parser.add_argument("--keep", type=Path)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        kept = said.keep or Path(temporary) / "year"
        if not (kept / "ledger.db").exists():
            kept.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            build(kept, said.days, said.size)
            print(
                f"built {said.days} days of {said.size:,} decisions in {time.perf_counter() - start:.0f} s", flush=True
            )
        year = Year(Path(shutil.copytree(kept, Path(temporary) / "copy")), said.days, said.size)
        year.take_back(rollback.Batch(f"day{said.days - said.back - 1}"))
        year.take_back(rollback.Batch(f"day{said.days // 2}"))
        year.take_back(rollback.Since(FIRST + timedelta(days=said.days - max(1, said.back // 10)), "ad_budget"))
        took = year.take_back(rollback.Since(FIRST + timedelta(days=said.days - said.back), "ad_budget"))
    print(f"{said.back} days: {took / 60:.1f} minutes")
    if took > TARGET_S * (said.back * said.size) / (60 * 5_000):
        print(f"over the target of {TARGET_S / 60:.0f} minutes for 60 days of 5,000")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
