"""Rollback: what stood before stands again, people's changes stay, what cannot be is listed, whenever it is killed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from delivery import ledger as ledgers
from delivery.connectors.base import Capabilities
from delivery.ledger import Delivery
from delivery.push import Stopped
from delivery.rollback import Batch, Model, RollbackError, RollbackReport, Since, rollback_id, undone
from tests.support.desks import Desk, entities
from tests.support.fakes import DAY, Crash, Mortal, Process, dead_holder

STEP = 1 if os.environ.get("SIGNALBOX_SOAK") else 17
"""How many calls apart a rollback is killed."""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path, {"a": 100, "b": 200, "c": 300, "d": 400})
    yield made
    made.ledger.close()


@pytest.fixture
def pooled(tmp_path: Path) -> Iterator[Desk]:
    """All of them share one pool of 1000."""
    made = Desk(tmp_path, {"a": 100, "b": 200, "c": 300, "d": 400}, arms=dict.fromkeys("abcd", "champion"))
    yield made
    made.ledger.close()


def only(report: RollbackReport) -> Any:
    (one,) = report.batches
    return one


# --- one batch


def test_what_stood_before_stands_again_proven_by_reading(desk: Desk) -> None:
    desk.sent("b1", {"a": 150, "b": 150})
    report = desk.back(Batch("b1"))
    assert report.complete and only(report).restored == 2
    assert desk.values() == desk.start
    assert {d.state for d in desk.ledger.deliveries(rollback_id("b1"))} == {"ACKED"}
    assert [r.action for r in desk.ledger.rollbacks("b1")] == ["asked", "complete"]
    assert desk.ledger.verify().ok


def test_a_second_rollback_says_so_and_does_nothing(desk: Desk) -> None:
    desk.sent("b1", {"a": 150})
    desk.back(Batch("b1"))
    desk.world.person("a", 150)
    writes, head = len(desk.world.writes), desk.ledger.head()
    again = desk.back(Batch("b1"))
    assert again.complete and only(again).already and only(again).restored == 1
    assert (len(desk.world.writes), desk.ledger.head()) == (writes, head)
    assert desk.values()["a"] == 150


def test_a_persons_change_is_left_and_reported(desk: Desk) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.world.person("a", 777)
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.conflicts) == ["a"] and "777" in one.conflicts[0].says
    assert desk.values() == desk.start | {"a": 777}


def test_a_persons_change_while_it_is_rolled_back_is_left(desk: Desk) -> None:
    desk.sent("b1", {"a": 150, "b": 250})

    def meanwhile(key: str) -> None:
        if key == "a" and desk.world.value("a") != 777:
            desk.world.person("a", 777)

    desk.world.before_write = meanwhile
    one = only(desk.back(Batch("b1")))
    assert entities(one.conflicts) == ["a"]
    assert desk.values() == desk.start | {"a": 777}


def test_what_cannot_be_undone_is_listed(desk: Desk) -> None:
    desk.sent("b1", {"a": 150, "b": 250, "c": 350})
    desk.world.end("a", "closed")
    desk.world.end("b", "missing")
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.not_reversible) == ["a", "b"] and one.restored == 1
    assert {s.state for s in one.not_reversible} == {"NOT_REVERSIBLE"}
    assert desk.world.value("c") == 300


def test_an_erased_name_is_listed_and_the_rest_comes_back(desk: Desk) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.ledger.forget("a")
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.not_reversible) == ["(erased)"] and one.restored == 1
    assert desk.values() == desk.start | {"a": 150}
    assert desk.ledger.verify().ok


def test_an_overwritten_change_goes_back_to_what_the_person_had(tmp_path: Path) -> None:
    desk = Desk(tmp_path, {"a": 100, "b": 200}, Capabilities(change_history=True, bulk_read=10))
    desk.world.before_write = lambda key: desk.world.person("a", 777) if key == "a" else None
    assert desk.push(desk.batch("b1", {"a": 150, "b": 250})).counts == {"OVERWRITTEN": 1, "ACKED": 1}
    desk.well()
    one = only(desk.back(Batch("b1")))
    assert one.complete and one.restored == 2
    assert desk.values() == {"a": 777, "b": 200}


@pytest.mark.parametrize(("history", "expected"), [(True, 100), (False, 120)])
def test_what_the_system_made_of_ours_goes_back_where_its_history_proves_it(
    tmp_path: Path, history: bool, expected: int
) -> None:
    desk = Desk(tmp_path, {"a": 100}, Capabilities(change_history=history))
    desk.fault("apply", "a", "clamp")
    assert desk.push(desk.batch("b1", {"a": 150})).counts == {"REJECTED": 1}
    desk.well()
    one = only(desk.back(Batch("b1")))
    assert one.complete and desk.values() == {"a": expected}
    assert entities(one.conflicts) == ([] if history else ["a"]), "left, and said"


def test_what_the_system_never_took_is_not_touched(desk: Desk) -> None:
    desk.fault("apply", "a", "refuse")
    desk.push(desk.batch("b1", {"a": 150, "b": 250}))
    desk.world.person("a", 150)  # the same value, by a person: not ours to take back
    one = only(desk.back(Batch("b1")))
    assert one.complete and one.restored == 1
    assert desk.values() == desk.start | {"a": 150}


def test_a_value_that_stood_there_already_was_not_ours_to_take_back(desk: Desk) -> None:
    name = desk.batch("b1", {"a": 150, "b": 250})
    desk.world.person("a", 150)
    assert desk.push(name).counts == {"ACKED": 2}
    one = only(desk.back(Batch("b1")))
    assert one.complete and one.restored == 1
    assert desk.values() == desk.start | {"a": 150}


# --- batches that are not all delivered


def test_a_batch_that_was_never_sent_is_never_sent(desk: Desk) -> None:
    for status in ("READY", "HELD"):
        name = desk.batch(status, {"a": 150}, status=status)
        one = only(desk.back(Batch(name)))
        assert (one.complete, one.never_sent, one.restored) == (True, 1, 0)
        assert desk.push(name).sends == 0
    assert desk.values() == desk.start and not desk.world.writes


def test_a_partly_delivered_batch_comes_back_and_never_goes_on(desk: Desk) -> None:
    name = desk.batch("b1", {"a": 150, "b": 250, "c": 350, "d": 450})
    desk.push_dies(name, 2)
    assert 0 < len(desk.world.applied) < 4
    one = only(desk.back(Batch(name)))
    assert one.complete and one.never_sent > 0
    assert desk.values() == desk.start
    assert desk.push(name).sends == 0
    assert desk.values() == desk.start


@pytest.mark.parametrize("at_write", [1, 2, 3, 4])
def test_what_was_in_flight_when_a_push_died_is_found_by_reading(desk: Desk, at_write: int) -> None:
    name = desk.batch("b1", {"a": 150, "b": 250, "c": 350, "d": 450})
    desk.push_dies(name, at_write)
    assert desk.ledger.deliveries(name, ["IN_FLIGHT"])
    one = only(desk.back(Batch(name)))
    assert one.complete, one
    assert desk.values() == desk.start


def test_what_left_late_in_its_wave_is_not_taken_for_never_sent(tmp_path: Path) -> None:
    """The ledger knows when a wave began; its last write left later, and a stale reading does not show it yet."""
    desk = Desk(tmp_path, {"a": 100, "b": 200}, Capabilities(stale_reads_s=2.0))
    name = desk.batch("b1", {"a": 150, "b": 250})
    desk.world.before_write = lambda key: desk.clock.sleep(3)
    desk.push_dies(name, 1)
    report = desk.back(Batch(name))
    assert report.complete and desk.values() == desk.start


def test_an_entity_that_cannot_be_read_does_not_keep_the_others_from_coming_back(desk: Desk) -> None:
    desk.world.can = Capabilities(conditional_write=True)
    name = desk.batch("b1", {"a": 150, "b": 250, "c": 350})
    desk.push_dies(name, 2)
    stuck = desk.world.applied[-1].target
    desk.fault("read", stuck, "unavailable")
    report = desk.back(Batch(name))
    assert not report.complete and stuck in entities(only(report).open)
    assert {k: v for k, v in desk.values().items() if k != stuck} == {k: v for k, v in desk.start.items() if k != stuck}
    desk.well()
    assert desk.back(Batch(name)).complete
    assert desk.values() == desk.start


def test_a_refused_batch_has_nothing_to_roll_back(desk: Desk) -> None:
    desk.batch("b1", {"a": 150}, status="REFUSED")
    with pytest.raises(RollbackError, match="refused by its guardrails"):
        desk.back(Batch("b1"))
    with pytest.raises(RollbackError, match="nothing to roll back"):
        desk.back(Since(DAY))


def test_a_rollback_is_not_rolled_back_but_decided_again(desk: Desk) -> None:
    desk.sent("b1", {"a": 150}, day=0)
    desk.back(Batch("b1"))
    with pytest.raises(RollbackError, match="decide 2026-03-01 of ad_budget again"):
        desk.back(Batch(rollback_id("b1")))
    desk.sent("b1-again", {"a": 160}, day=0)
    assert desk.values()["a"] == 160
    assert desk.back(Batch("b1-again")).complete
    assert desk.values() == desk.start


def test_a_batch_whose_rows_were_removed_is_refused_by_name(desk: Desk) -> None:
    desk.sent("b1", {"a": 150})
    desk.clock.sleep(86_400 * 50)
    assert desk.ledger.retention(30) == ["b1"]
    with pytest.raises(RollbackError, match="b1: the retention policy"):
        desk.back(Batch("b1"))


def test_an_unknown_batch_and_a_missing_reason_are_refused(desk: Desk) -> None:
    with pytest.raises(ledgers.Unknown, match="nothing-like-it"):
        desk.back(Batch("nothing-like-it"))
    desk.sent("b1", {"a": 150})
    with pytest.raises(RollbackError, match="--reason"):
        desk.back(Batch("b1"), reason=" ")
    assert desk.values()["a"] == 150


def test_while_stopped_a_person_may_roll_back_and_a_guard_may_not(desk: Desk) -> None:
    desk.sent("b1", {"a": 150})
    desk.ledger.switch("ad_budget", True, "anna", "look first")
    with pytest.raises(Stopped):
        desk.back(Batch("b1"), trigger="guard")
    assert desk.values()["a"] == 150
    assert desk.back(Batch("b1")).complete
    assert desk.values() == desk.start


# --- several batches


def test_several_batches_come_back_newest_first(desk: Desk) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.sent("b2", {"a": 160, "c": 360})
    desk.sent("b3", {"a": 170, "d": 470})
    before = len(desk.world.writes)
    report = desk.back(Since(DAY + timedelta(days=1)))
    assert [one.batch_id for one in report.batches] == ["b3", "b2"] and report.complete
    assert desk.values() == desk.start | {"a": 150, "b": 250}
    order = [write.batch_id for write in desk.world.writes[before:]]
    assert order == sorted(order, key=["rollback-b3", "rollback-b2"].index)
    assert [one.batch_id for one in desk.back(Since(DAY)).batches] == ["b3", "b2", "b1"]
    assert desk.values() == desk.start


def test_a_model_versions_batches_come_back_and_the_newer_one_stays(desk: Desk) -> None:
    desk.sent("b1", {"a": 150}, version=1)
    desk.sent("b2", {"a": 160, "b": 260}, version=2)
    desk.sent("b3", {"b": 270}, version=3)
    report = desk.back(Model("ad_budget", 2))
    assert [one.batch_id for one in report.batches] == ["b2"] and report.newer == ("b3",)
    assert [(one.entity, "b3" in one.says) for one in only(report).left] == [("b", True)]
    assert desk.values() == desk.start | {"a": 150, "b": 270}
    with pytest.raises(RollbackError, match="version 9"):
        desk.back(Model("ad_budget", 9))


def test_an_older_batchs_value_that_was_left_to_a_newer_one_comes_back_with_that_one(desk: Desk) -> None:
    """Rolled back in the wrong order: nothing of the harmful batch may come up again from below."""
    desk.sent("b1", {"a": 150})
    desk.sent("b2", {"a": 160})
    assert entities(only(desk.back(Batch("b1"))).left) == ["a"]
    assert desk.values()["a"] == 160
    assert desk.back(Batch("b2")).complete
    assert desk.values() == desk.start


def test_a_newer_batch_that_was_pushed_between_two_runs_of_a_rollback_is_left(desk: Desk) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.world.fault = lambda op, key: "crash_before" if op == "apply" else ""
    with pytest.raises(Crash):
        desk.back(Batch("b1"), Mortal(desk.ledger, desk.world.process))
    desk.well()
    desk.world.process = Process()
    # another machine pushes a newer batch by force: it is not blocked by the rollback here
    newer = desk.batch("b2", {"a": 500})
    (d,) = desk.ledger.deliveries(newer)
    lease = desk.ledger.lease("fake", dead_holder())
    desk.ledger.open_push(lease, newer)
    desk.world.person("a", 500)
    result = ledgers.Result(d.n, "ACKED", target="a", sent=500, prior=150, observed=500, verified_at=desk.clock())
    desk.ledger.settle(lease, newer, [result])
    desk.ledger.close_push(lease, newer, True)
    desk.ledger.release(lease)
    one = only(desk.back(Batch("b1")))
    assert one.complete
    assert desk.values() == desk.start | {"a": 500}
    assert entities([*one.left, *one.conflicts]) == ["a"]


@pytest.mark.parametrize("landed", [True, False])
def test_a_newer_batchs_write_of_which_nothing_is_known_is_never_written_over(desk: Desk, landed: bool) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.batch("b2", {"a": 500})
    desk.push_dies("b2", 1, landed=landed)
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.conflicts) == (["a"] if landed else [])
    assert desk.values() == desk.start | ({"a": 500} if landed else {})
    assert desk.back(Batch("b2")).complete
    assert desk.values() == desk.start, "nor does what was rolled back come up again from below"


def test_an_older_batch_waits_until_the_newer_one_is_back(desk: Desk) -> None:
    desk.sent("b1", {"a": 150})
    desk.sent("b2", {"b": 250})
    desk.fault("read", "b", "unavailable")
    report = desk.back(Since(DAY))
    assert not report.complete and report.waiting == ("b1",)
    assert desk.values()["a"] == 150
    desk.well()
    assert desk.back(Since(DAY)).complete
    assert desk.values() == desk.start


# --- money


def test_the_total_stays_within_the_pool_at_every_instant(pooled: Desk) -> None:
    pooled.sent("b1", {"a": 10, "b": 20, "c": 30, "d": 940})
    assert pooled.back(Batch("b1")).complete
    assert pooled.values() == pooled.start and not pooled.over


def test_where_a_decrease_cannot_come_back_the_increases_get_only_what_is_free(pooled: Desk) -> None:
    pooled.sent("b1", {"a": 10, "b": 20, "c": 30, "d": 900})
    pooled.world.end("d", "closed")  # holds 900 of 1000, for good
    one = only(pooled.back(Batch("b1")))
    assert one.complete and not pooled.over
    assert entities(one.not_reversible) == ["d"]
    assert sum(pooled.values().values()) == 1000
    assert one.restored + len(one.partly) + len(one.left) == 3, "and everything that is short is said"


def test_an_erased_entity_still_counts_in_the_total(pooled: Desk) -> None:
    pooled.sent("b1", {"a": 10, "b": 20, "c": 30, "d": 940})
    pooled.ledger.forget("d")
    one = only(pooled.back(Batch("b1")))
    assert one.complete and not pooled.over
    assert sum(pooled.values().values()) <= 1000


# --- killed


def test_killed_at_any_call_it_ends_the_same(tmp_path: Path) -> None:
    """Before and after calls of the ledger and of the system, from the first to the last of them, a step apart."""
    first = Desk(tmp_path / "start", {"a": 100, "b": 200, "c": 300}, arms=dict.fromkeys("abc", "champion"))
    first.sent("b1", {"a": 50, "b": 250})
    first.push_dies(first.batch("b2", {"a": 20, "b": 255, "c": 325}), 2)
    first.ledger.close()
    kills = 0
    for at in itertools.count(1, STEP):
        desk = first.copy(tmp_path / f"at-{at}")
        report = desk.mortal(lambda ledger, desk=desk: desk.back(Since(DAY), ledger), at)
        assert desk.back(Since(DAY)).complete, at
        assert desk.values() == desk.start, at
        assert not desk.over, at
        assert max(desk.world.counts.values()) == 1, f"applied twice, killed at {at}"
        assert [r.action for r in desk.ledger.rollbacks("b1")].count("complete") == 1
        assert desk.ledger.verify().ok
        desk.ledger.close()
        if report is not None:
            break
        kills += 1
    assert kills > 100 / STEP, kills


# --- the pure part


def delivery(**said: Any) -> Delivery:
    return replace(
        Delivery(
            batch_id="b", n=0, decision_id="d", entity="e", arm=None, before=1, after=2, gain=None, state="ACKED",
            target=None, expected=None, sent=None, prior=None, observed=None, verified_at=None, attempts=1, repeats=0,
            says=None,
        ),
        **said,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("said", "goes_back"),
    [
        ({"sent": 2, "prior": 1}, (2, 1)),
        ({"sent": 2, "prior": None, "expected": 1}, (2, 1)),
        ({"sent": None, "prior": None, "expected": 1}, None),
        ({"sent": 2, "prior": 2}, None),
        ({"state": "OVERWRITTEN", "sent": 2, "prior": 1, "observed": 7}, (2, 7)),
        ({"state": "OVERWRITTEN", "sent": 2, "prior": 1, "observed": None}, None),
        ({"state": "UNKNOWN", "sent": 2, "prior": 1}, (3, 1)),
        ({"state": "IN_FLIGHT", "sent": None, "prior": None, "expected": 1}, (3, 1)),
        ({"state": "REJECTED", "sent": 2, "prior": 1, "observed": 8}, (8, 1)),
        ({"state": "REJECTED", "sent": 2, "prior": 1, "observed": 1}, None),
        ({"state": "REJECTED", "sent": None, "prior": None, "expected": 1, "observed": 8}, None),
        ({"state": "CONFLICT", "sent": 2, "prior": 1, "observed": 8}, None),
        ({"state": "PENDING", "sent": 2, "prior": 1}, None),
        ({"state": "SKIPPED", "sent": None}, None),
        ({"state": "NOT_REVERSIBLE", "sent": 2, "prior": 1}, None),
    ],
)
def test_what_a_delivery_goes_back_to(said: dict[str, Any], goes_back: tuple[int, int] | None) -> None:
    assert undone(delivery(**said), 3, knows_authors=True) == goes_back
