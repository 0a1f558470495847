"""Any history of batches, people, faults and kills, rolled back in any order: every value is right or listed."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from delivery.connectors.base import Capabilities
from delivery.ledger import BatchRow
from delivery.push import PushError
from delivery.rollback import Batch, Since
from tests.support.desks import PushHarness, opened
from tests.support.fakes import DAY, Clock, Fault
from tests.support.properties import examples

START = {"a": 100, "b": 200, "c": 300, "d": 400, "e": 500}
ARMS = {"a": "champion", "b": "champion", "c": "champion", "d": "explore", "e": "explore"}
SYSTEMS = [
    Capabilities(conditional_write=True, bulk_read=10),
    Capabilities(idempotency_key=True),
    Capabilities(change_history=True, bulk_read=3),
    Capabilities(stale_reads_s=2.0),
]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A migrated ledger to copy, since migrating takes longer than an example."""
    folder = tmp_path_factory.mktemp("empty")
    opened(folder, Clock()).close()
    yield folder


def moved(now: dict[str, int], shares: list[int]) -> dict[str, int]:
    """What a batch decides: the money that an arm holds, shared out anew."""
    after = {}
    for arm in set(ARMS.values()):
        keys = [key for key in START if ARMS[key] == arm]
        total = min(sum(now[key] for key in keys), sum(START[key] for key in keys))
        weights = [shares[list(START).index(key)] for key in keys]
        parts = [total * weight // sum(weights) for weight in weights]
        after |= dict(zip(keys, parts, strict=True))
    return after


def expected(desk: PushHarness, key: str, taken_back: set[str]) -> int | None:
    """The last value that somebody else than the batches taken back (and their rollbacks) set."""
    for entity, value, who in reversed(desk.world.log):
        if entity == key and who not in taken_back and not who.startswith("rollback-"):
            return value
    return START[key]


step = st.one_of(
    st.tuples(st.just("batch"), st.lists(st.integers(1, 9), min_size=5, max_size=5), st.none() | st.integers(5, 60)),
    st.tuples(st.just("batch"), st.lists(st.integers(1, 9), min_size=5, max_size=5), st.none()),
    st.tuples(st.just("person"), st.sampled_from(sorted(START)), st.sampled_from([-60, -30, 40])),
)
FAULTS: list[Fault] = ["", "", "", "unknown_applied", "unknown_lost", "not_applied", "conflict", "unavailable"]


@settings(max_examples=examples(8), suppress_health_check=list(HealthCheck))
@given(
    can=st.sampled_from(SYSTEMS),
    steps=st.lists(step, min_size=2, max_size=5),
    which=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    since=st.booleans(),
    between=st.none() | st.sampled_from(sorted(START)),
    missing=st.none() | st.lists(st.sampled_from(sorted(START)), min_size=1, max_size=5, unique=True),
    kills=st.lists(st.integers(1, 90), max_size=2),
    faults=st.lists(st.sampled_from(FAULTS), min_size=7, max_size=7),
)
# the third batch was killed on its way; what its push finds there later is what the other two's rollbacks had set
@example(
    can=Capabilities(
        conditional_write=False, idempotency_key=False, bulk_read=3, bulk_write=1, validate_only=False,
        change_history=True, stale_reads_s=0.0,
    ),
    steps=[("person", "a", -60), ("batch", [5, 3, 8, 4, 1], None), ("batch", [3, 8, 6, 8, 9], None), ("batch", [4, 7, 1, 4, 6], 55)],
    which=[4, 0], since=True, between=None, missing=None, kills=[], faults=[""] * 7,
)  # fmt: skip
# the third batch's push was killed while it found out what the second, killed on its way, had left: that one was sealed already
@example(
    can=SYSTEMS[0],
    steps=[("batch", [1, 1, 1, 1, 7], None), ("batch", [1, 1, 5, 1, 1], 32), ("batch", [1, 1, 1, 1, 1], 37)],
    which=[0], since=False, between=None, missing=None, kills=[], faults=[""] * 7,
)  # fmt: skip
def test_every_value_is_right_or_listed(
    empty: Path,
    can: Capabilities,
    steps: list[tuple[str, Any, Any]],
    which: list[int],
    since: bool,
    between: str | None,
    missing: list[str] | None,
    kills: list[int],
    faults: list[Fault],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(empty, folder, dirs_exist_ok=True)
        desk = PushHarness(Path(folder), START, can, arms=ARMS)
        try:
            lived(desk, steps, faults)
            rolled_back(desk, which, since, between, missing or [], kills, faults)
        finally:
            desk.ledger.close()


def at_times(desk: PushHarness, faults: list[Fault]) -> None:
    """Calls go wrong in turn, fourteen of them; then nothing does."""
    turn = itertools.chain(itertools.islice(itertools.cycle(faults), 14), itertools.repeat(""))

    def fault(op: str, key: str) -> Fault:
        one: Any = next(turn)
        return one if (op == "apply") != (one == "unavailable") else ""

    desk.world.fault = fault


def known(desk: PushHarness) -> None:
    """A person's change comes to be seen: within the time in which reads are stale nobody can know of it."""
    desk.world.clock.sleep(desk.world.can.stale_reads_s)


def lived(desk: PushHarness, steps: list[tuple[str, Any, Any]], faults: list[Fault]) -> None:
    """Batches pushed (some killed on the way and never taken up again) and people who change values in between."""
    for n, (kind, what, how) in enumerate(steps):
        if kind == "person":
            desk.world.person(what, max(0, (desk.world.value(what) or 0) + how))
            known(desk)
            continue
        name = desk.batch(f"b{n}", moved(desk.values(), what))
        at_times(desk, faults)
        if how is not None:
            desk.mortal(lambda ledger, name=name: desk.push(name, ledger), how)
        else:
            desk.push(name)
        desk.well()
        desk.world.settle()


def rolled_back(
    desk: PushHarness,
    which: list[int],
    since: bool,
    between: str | None,
    missing: list[str],
    kills: list[int],
    faults: list[Fault],
) -> None:
    """``missing``: entities that are not there at the first run, for as long as it takes."""
    batches = desk.ledger.batches("ad_budget", kind="decision")
    if not batches:
        return
    chosen = [batches[n % len(batches)] for n in which]
    asked: list[tuple[Any, list[BatchRow]]] = [(Batch(one.batch_id), [one]) for one in chosen]
    if since:
        asked.append((Since(chosen[0].day), [one for one in batches if one.day >= chosen[0].day]))
    taken_back: set[str] = set()
    short: set[str] = set()
    for n, (selection, meant) in enumerate(asked):
        if n == 1 and between is not None:
            desk.world.person(between, (desk.world.value(between) or 0) + 7)
            known(desk)
        at_times(desk, faults)
        for at in kills:
            desk.mortal(lambda ledger, selection=selection: desk.back(selection, ledger), at)
        desk.well()
        for key in missing:
            desk.world.end(key, "missing")
        desk.back(selection)
        for key in missing:
            desk.world.end(key, "open")
        for _ in range(3):
            if (report := desk.back(selection)).complete:
                break
        assert report.complete, report
        for one in report.batches:
            lists = (one.conflicts, one.not_reversible, one.left, one.partly, one.open)
            counted = one.restored + one.never_sent + one.untouched + sum(len(some) for some in lists)
            assert counted == len(desk.ledger.deliveries(one.batch_id)), "each delivery is counted once, or listed"
        taken_back |= {one.batch_id for one in meant}
        short |= {
            one.entity for batch in report.batches for one in (*batch.partly, *batch.left) if "no money" in one.says
        }
        short |= {one.entity for batch in report.batches for one in batch.partly}
    for key in START:
        wanted = expected(desk, key, taken_back)
        assert desk.world.value(key) == wanted or key in short, (key, wanted, desk.world.log, report)
    assert not desk.over
    assert not desk.world.lost
    if desk.world.can.conditional_write or desk.world.can.idempotency_key:
        assert max(Counter(a.key for a in desk.world.applied if a.by == "us").values(), default=1) == 1
    assert desk.ledger.verify().ok


def test_a_newer_decision_waits_for_a_rollback_that_is_not_complete(empty: Path, tmp_path: Path) -> None:
    shutil.copytree(empty, tmp_path, dirs_exist_ok=True)
    desk = PushHarness(tmp_path, START, arms=ARMS)
    desk.sent("b1", moved(desk.values(), [9, 4, 3, 2, 1]))
    desk.fault("read", "a", "unavailable")
    assert not desk.back(Batch("b1")).complete
    desk.well()
    newer = desk.batch("b2", moved(desk.values(), [5, 4, 3, 2, 1]))
    with pytest.raises(PushError, match="rollback-b1"):
        desk.push(newer)
    assert desk.back(Since(DAY)).complete
    desk.ledger.close()
