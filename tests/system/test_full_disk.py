"""The disk below the ledger fills up: a clear error, nothing more goes out, and after there is room it goes on."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import pytest
from sqlalchemy import event

from delivery.ledger import Holder, Ledger, LedgerUnavailable, Unknown
from delivery.push import PushSettings, push
from tests.support import fakes
from tests.support.crashing import Ads, connect, utc_now
from tests.support.ledgers import KEY

pytestmark = pytest.mark.system


class Disk(Protocol):
    ledger: Ledger

    def fill(self) -> None: ...

    def free(self) -> None: ...


class SmallDisk:
    """A file system of its own, with a file that takes what is left."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / "filler"
        self.ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=KEY)

    def fill(self) -> None:
        with self._filler.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while file.write(b"x" * size):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        self._filler.unlink()


class FewPages:
    """What SQLite says when no page can be added, on any disk: for where a test may not mount one."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=KEY)
        self._most = 2**30
        event.listen(self.ledger.engine, "checkout", self._limit)

    def _limit(self, connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count={self._most}").close()

    def fill(self) -> None:
        self._most = 1  # SQLite takes it for as many as there are

    def free(self) -> None:
        self._most = 2**30


@pytest.fixture(params=["small disk", "few pages"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with ExitStack() as stack:
        made: Any = FewPages
        if request.param == "small disk":
            made = SmallDisk
            mounted = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=16m", "signalbox-test", str(tmp_path)], capture_output=True, text=True
            ) if os.geteuid() == 0 else None  # fmt: skip
            if mounted is None or mounted.returncode:
                said = "not root" if mounted is None else mounted.stderr.strip()
                pytest.skip(f"a small file system cannot be mounted here ({said}); “few pages” stands in for it")
            stack.callback(subprocess.run, ["umount", str(tmp_path)], check=True)
        one: Disk = made(tmp_path)
        stack.callback(one.ledger.close)
        yield one


@pytest.fixture
def ads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ads]:
    with closing(Ads(tmp_path_factory.mktemp("full-disk"), lines=100)) as system:
        system.sandbox.way_s = 0.0
        yield system


def pushed(disk: Disk, ads: Ads, progress: Callable[[Any], None] | None = None, holder: Holder | None = None) -> Any:
    """By a process that ends with it, unless ``holder`` says otherwise."""
    with closing(connect(ads.job["connector"], {})) as connector:
        return push(
            disk.ledger, connector, "batch-1", rng=random.Random(1), progress=progress,
            settings=PushSettings(concurrency=2, wave=6, late_s=0.2), holder=holder or fakes.dead_holder(),
        )  # fmt: skip


def record(disk: Disk, rows: list[dict[str, Any]], pools: dict[str, int] | None, batch_id: str = "batch-1") -> None:
    fakes.record(disk.ledger, rows, batch_id, pools=pools, day=date(2026, 3, 2), as_of=utc_now())


def test_a_disk_that_fills_up_in_the_middle_of_a_push_stops_it_and_it_goes_on_afterwards(disk: Disk, ads: Ads) -> None:
    rows, pools = ads.rows(random.Random(3))
    record(disk, [vars(r) for r in rows], pools)
    changed = Counter({(r.entity, r.after): 1 for r in rows if r.before != r.after})

    def fill(progress: Any) -> None:
        if progress.done >= 12:
            disk.fill()

    with pytest.raises(LedgerUnavailable, match=r"the ledger's disk is full: .*free some space and run it again"):
        pushed(disk, ads, fill)
    stopped = ads.applied()
    assert 12 <= len(stopped) < len(changed)
    time.sleep(0.3)
    assert ads.applied() == stopped

    with pytest.raises(LedgerUnavailable, match="disk is full"):  # still full: it says so again, and sends nothing
        pushed(disk, ads)
    assert ads.applied() == stopped

    disk.free()
    assert disk.ledger.verify().ok
    tried = {d.entity for d in disk.ledger.deliveries("batch-1") if d.attempts}
    assert {entity for entity, _ in stopped} <= tried, "sent without having been written down"
    report = pushed(disk, ads)
    assert report.complete and report.counts == {"ACKED": len(changed)}
    assert Counter(ads.applied()) == changed
    assert ads.over() == {} and disk.ledger.verify().ok


def test_after_there_is_room_again_the_same_process_may_go_on(disk: Disk, ads: Ads) -> None:
    """A service that tries again does so in the process whose lease the full disk kept it from giving back."""
    rows, pools = ads.rows(random.Random(3))
    record(disk, [vars(r) for r in rows], pools)
    with pytest.raises(LedgerUnavailable):
        pushed(disk, ads, lambda progress: disk.fill() if progress.done >= 12 else None, Holder.here())
    disk.free()
    assert pushed(disk, ads, holder=Holder.here()).complete


def test_a_batch_that_no_longer_fits_is_not_half_recorded(disk: Disk) -> None:
    rows = [{"entity": f"line-{n}", "before": 100, "after": 200} for n in range(3_000)]
    record(disk, rows[:5], None, "before")
    disk.fill()
    with pytest.raises(
        LedgerUnavailable, match=r"the ledger's disk is full: nothing was half written; free some space"
    ):
        record(disk, rows, None)
    disk.free()
    with pytest.raises(Unknown):
        disk.ledger.batch("batch-1")
    assert [b.batch_id for b in disk.ledger.batches()] == ["before"] and disk.ledger.verify().ok
    record(disk, rows, None)
    assert disk.ledger.batch("batch-1").rows == 3_000 and disk.ledger.verify().ok
