"""A desk for tests of rollbacks: a ledger, the fake system, batches decided from what stands, and kills at any call."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from delivery.connectors.base import Capabilities, Write, Written
from delivery.ledger import Ledger, NewBatch
from delivery.push import PushSettings, Report, push
from delivery.rollback import RollbackReport, roll_back
from tests.support.fakes import DAY, Clock, Crash, FakeSystem, Fault, Mortal, Process, dead_holder, table

KEY = b"a key for tests only"
CAN = Capabilities(conditional_write=True, bulk_read=10)


def opened(folder: Path, clock: Clock) -> Ledger:
    return Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=KEY, clock=clock)


class Killer:
    """Counts the calls of a process to its ledger and its system; at the ``at``-th one it ends."""

    def __init__(self, at: float) -> None:
        self.at, self.calls, self.process = at, 0, Process()
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self.process.check()
            self.calls += 1
            if self.calls >= self.at:
                self.process.die()


class World(FakeSystem):
    """The fake system, with who set each value: a batch, or ``person``."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.log: list[tuple[str, int | None, str]] = []

    def person(self, key: str, value: int | None, actor: str = "anna") -> None:
        super().person(key, value, actor)
        self.log.append((key, value, "person"))

    def _apply(self, write: Write, value: int) -> Written:
        applied = len(self.applied)
        answer = super()._apply(write, value)
        if len(self.applied) > applied:
            self.log.append((write.key, value, write.batch_id))
        return answer


class PushHarness:
    """Values that stood at the start, and whatever is done to them. ``pooled``: all entities share one arm's money."""

    def __init__(
        self, folder: Path, values: Mapping[str, int], can: Capabilities = CAN, *, arms: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.start, self.arms, self.clock = folder, dict(values), dict(arms or {}), Clock()
        pools: dict[str, int] = {}
        for key, arm in self.arms.items():
            pools[arm] = pools.get(arm, 0) + values[key]
        self.pools = pools or None
        self.ledger = opened(folder, self.clock)
        self.world = World(values, can=can, clock=self.clock, arms=self.arms, pools=pools)
        self.settings = PushSettings(concurrency=2, wave=3, patience_s=30, late_s=1)  # type: ignore[call-arg]
        self.day = 0

    def values(self) -> dict[str, int]:
        return {key: self.world.value(key) or 0 for key in self.start}

    @property
    def over(self) -> bool:
        """Whether a write of ours ever left an arm above its pool."""
        return any(over > 0 for _, over in self.world.overs)

    def fault(self, op: str, key: str, fault: Fault) -> None:
        """From now on every such call for this entity goes wrong."""
        self.world.fault = lambda o, k: fault if (o, k) == (op, key) else ""

    def well(self) -> None:
        """Nothing goes wrong any more."""
        self.world.fault = lambda op, key: ""
        self.world.before_write = lambda key: None

    def batch(
        self, name: str, after: Mapping[str, int], *, day: int | None = None, version: int = 1, status: Any = "READY"
    ) -> str:
        """Decide from what stands now, each on a day of its own."""
        self.clock.sleep(1)
        now = self.values()
        rows = [
            {"entity": k, "before": v, "after": after.get(k, v), "arm": self.arms.get(k, "champion"), "gain": 1.0}
            for k, v in now.items()
        ]
        new = NewBatch(
            batch_id=name, workflow="ad_budget", kind="decision", day=DAY + timedelta(days=self.day if day is None else day),
            digest=f"digest of {name}", status=status, step="champion", as_of=self.clock(), decided_at=self.clock(),
            run_id="run", record={"model_version": version}, pools=self.pools,
        )  # fmt: skip
        self.ledger.record_batch(new, table(rows, name))
        self.day += 1
        self.clock.sleep(1)
        return name

    def how(self) -> dict[str, Any]:
        return {
            "settings": self.settings, "clock": self.clock, "sleep": self.clock.sleep, "monotonic": self.clock.monotonic,
            "holder": dead_holder(),
        }  # fmt: skip

    def push(self, name: str, ledger: Any = None) -> Report:
        report = push(ledger or self.ledger, self.world, name, **self.how())
        self.clock.sleep(1)
        return report

    def sent(self, name: str, after: Mapping[str, int], **said: Any) -> str:
        report = self.push(self.batch(name, after, **said))
        assert report.complete, report
        return name

    def back(self, which: Any, ledger: Any = None, **how: Any) -> RollbackReport:
        asked = {"actor": "anna", "reason": "it does harm"} | self.how() | how
        report = roll_back(ledger or self.ledger, lambda workflow: self.world, which, **asked)
        self.clock.sleep(1)
        return report

    def mortal(self, act: Callable[[Any], Any], at: float) -> Any:
        """Do it in a process that dies at its ``at``-th call, before or after it; None if it died."""
        killer, well = Killer(at), self.world.fault
        self.world.process = killer.process

        def fault(op: str, key: str) -> Fault:
            killer.step()
            return well(op, key)

        ledger = _Stepping(self.ledger, killer)
        self.world.fault = fault
        try:
            return act(ledger)
        except Crash:
            return None
        finally:
            self.world.fault, self.world.process = well, Process()

    def push_dies(self, name: str, after_write: int, *, landed: bool = True) -> None:
        """A push whose process dies right after its n-th write arrived (or just before), before anybody notes it."""
        count = iter(range(1, 1_000))
        end: Fault = "crash_after" if landed else "crash_before"
        self.world.fault = lambda op, key: end if op == "apply" and next(count) == after_write else ""
        try:
            push(Mortal(self.ledger, self.world.process), self.world, name, **self.how())  # type: ignore[arg-type]
        except Crash:
            self.well()
            self.world.process = Process()
            return
        raise AssertionError(f"{name} has fewer than {after_write} writes")

    def copy(self, folder: Path) -> PushHarness:
        """The same desk as it stands, with a ledger of its own; this one must be closed."""
        shutil.copytree(self.folder, folder)
        other = PushHarness(folder, self.start, self.world.can, arms=self.arms)
        other.clock.sleep(self.clock.monotonic() - other.clock.monotonic())
        other.day = self.day
        other.world.targets = {k: replace(t, past=list(t.past)) for k, t in self.world.targets.items()}
        other.world._changes = list(self.world._changes)
        return other


class _Stepping:
    """A ledger of which every call counts twice: before and after it."""

    def __init__(self, ledger: Ledger, killer: Killer) -> None:
        self._ledger, self._killer = ledger, killer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ledger, name)
        if not callable(found):
            return found

        def call(*args: Any, **named: Any) -> Any:
            self._killer.step()
            answer = found(*args, **named)
            self._killer.step()
            return answer

        return call


def entities(listed: Sequence[Any]) -> list[str]:
    """Who stands in a list of a report."""
    return sorted(one.entity for one in listed)
