"""Rollback: what stood before stands again, people's changes stay, what cannot be is listed, whenever it is killed."""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from delivery import ledger as ledgers
from delivery.connectors.base import Capabilities
from delivery.ledger import Delivery
from delivery.push import PushError, Stopped
from delivery.rollback import (
    Batch,
    Model,
    RollbackError,
    RollbackReport,
    Since,
    close,
    dry_run,
    roll_back,
    rollback_id,
    undone,
)  # fmt: skip
from delivery.rollback.outcome import became
from tests.support.desks import PushHarness, entities
from tests.support.fakes import DAY, START, Crash, Mortal, Process, dead_holder, record

STEP = 1 if os.environ.get("SIGNALBOX_SOAK") else 17
"""How many calls apart a rollback is killed."""


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[PushHarness]:
    made = PushHarness(tmp_path, {"a": 100, "b": 200, "c": 300, "d": 400})
    yield made
    made.ledger.close()


@pytest.fixture
def pooled(tmp_path: Path) -> Iterator[PushHarness]:
    """All of them share one pool of 1000."""
    made = PushHarness(tmp_path, {"a": 100, "b": 200, "c": 300, "d": 400}, arms=dict.fromkeys("abcd", "champion"))
    yield made
    made.ledger.close()


def only(report: RollbackReport) -> Any:
    (one,) = report.batches
    return one


# --- one batch


def test_what_stood_before_stands_again_proven_by_reading(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150, "b": 150})
    report = desk.back(Batch("b1"))
    assert report.complete and only(report).restored == 2
    assert desk.values() == desk.start
    assert {d.state for d in desk.ledger.deliveries(rollback_id("b1"))} == {"ACKED"}
    assert [r.action for r in desk.ledger.rollbacks("b1")] == ["asked", "complete"]
    assert desk.ledger.verify().ok


def test_a_second_rollback_says_so_and_does_nothing(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150})
    desk.back(Batch("b1"))
    desk.world.person("a", 150)
    writes, head = len(desk.world.writes), desk.ledger.head()
    again = desk.back(Batch("b1"))
    assert again.complete and only(again).already and only(again).restored == 1
    assert (len(desk.world.writes), desk.ledger.head()) == (writes, head)
    assert desk.values()["a"] == 150


def test_a_persons_change_is_left_and_reported(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.world.person("a", 777)
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.conflicts) == ["a"] and "777" in one.conflicts[0].says
    assert desk.values() == desk.start | {"a": 777}


def test_a_persons_change_while_it_is_rolled_back_is_left(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150, "b": 250})

    def meanwhile(key: str) -> None:
        if key == "a" and desk.world.value("a") != 777:
            desk.world.person("a", 777)

    desk.world.before_write = meanwhile
    one = only(desk.back(Batch("b1")))
    assert entities(one.conflicts) == ["a"]
    assert desk.values() == desk.start | {"a": 777}


def test_what_cannot_be_undone_is_listed(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150, "c": 350})
    desk.world.end("a", "closed")
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.not_reversible) == ["a"] and one.restored == 1
    assert {s.state for s in one.not_reversible} == {"NOT_REVERSIBLE"}
    assert desk.world.value("c") == 300


def test_what_is_missing_for_a_while_stays_open_and_comes_back_with_the_next_run(desk: PushHarness) -> None:
    """A token without rights, a wrong base path: what a batch had proven to be there is not gone for good."""
    desk.sent("b0", {"c": 350})
    desk.sent("b1", {"a": 150, "b": 250, "d": 450})
    desk.world.end("b", "missing")
    for _ in range(2):
        report = desk.back(Since(DAY))
        one = only(report)
        assert not report.complete and not one.complete and report.waiting == ("b0",)
        assert entities(one.open) == ["b"] and "is not there downstream" in one.open[0].says and one.restored == 2
    desk.world.end("b", "open")
    assert desk.back(Since(DAY)).complete and desk.values() == desk.start
    assert desk.ledger.verify().ok


@pytest.mark.parametrize("kind", ["one by one", "bulk"])
def test_a_rollback_of_which_nothing_is_there_says_that_it_is_the_address(desk: PushHarness, kind: str) -> None:
    desk.world.can = Capabilities(conditional_write=True, bulk_read=10 if kind == "bulk" else 1)
    desk.sent("b1", {"a": 150, "b": 250})
    for key in desk.start:
        desk.world.end(key, "missing")
    report = desk.back(Batch("b1"))
    assert not report.complete and "is the address of fake right" in (only(report).push or {})["why"]
    for key in desk.start:
        desk.world.end(key, "open")
    assert desk.back(Batch("b1")).complete and desk.values() == desk.start


@pytest.mark.parametrize("landed", [True, False])
def test_what_was_in_flight_and_cannot_be_found_is_not_given_up(desk: PushHarness, landed: bool) -> None:
    name = desk.batch("b1", {"a": 150})
    desk.push_dies(name, 1, landed=landed)
    desk.world.end("a", "missing")
    assert not desk.back(Batch(name)).complete
    desk.world.end("a", "open")
    report = desk.back(Batch(name))
    assert report.complete and desk.values() == desk.start


def test_an_erased_name_is_listed_and_the_rest_comes_back(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.ledger.forget("a")
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.not_reversible) == ["(erased)"] and one.restored == 1
    assert desk.values() == desk.start | {"a": 150}
    assert desk.ledger.verify().ok


def test_an_overwritten_change_goes_back_to_what_the_person_had(tmp_path: Path) -> None:
    desk = PushHarness(tmp_path, {"a": 100, "b": 200}, Capabilities(change_history=True, bulk_read=10))
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
    desk = PushHarness(tmp_path, {"a": 100}, Capabilities(change_history=history))
    desk.fault("apply", "a", "clamp")
    assert desk.push(desk.batch("b1", {"a": 150})).counts == {"REJECTED": 1}
    desk.well()
    one = only(desk.back(Batch("b1")))
    assert one.complete and desk.values() == {"a": expected}
    assert entities(one.conflicts) == ([] if history else ["a"]), "left, and said"


def test_what_the_system_never_took_is_not_touched(desk: PushHarness) -> None:
    desk.fault("apply", "a", "refuse")
    desk.push(desk.batch("b1", {"a": 150, "b": 250}))
    desk.world.person("a", 150)  # the same value, by a person: not ours to take back
    one = only(desk.back(Batch("b1")))
    assert one.complete and one.restored == 1
    assert desk.values() == desk.start | {"a": 150}


def test_a_value_that_stood_there_already_was_not_ours_to_take_back(desk: PushHarness) -> None:
    name = desk.batch("b1", {"a": 150, "b": 250})
    desk.world.person("a", 150)
    assert desk.push(name).counts == {"ACKED": 2}
    one = only(desk.back(Batch("b1")))
    assert one.complete and one.restored == 1
    assert desk.values() == desk.start | {"a": 150}


# --- batches that are not all delivered


def test_a_batch_that_was_never_sent_is_never_sent(desk: PushHarness) -> None:
    for status in ("READY", "HELD"):
        name = desk.batch(status, {"a": 150}, status=status)
        one = only(desk.back(Batch(name)))
        assert (one.complete, one.never_sent, one.restored) == (True, 1, 0)
        assert desk.push(name).sends == 0
    assert desk.values() == desk.start and not desk.world.writes


def test_a_partly_delivered_batch_comes_back_and_never_goes_on(desk: PushHarness) -> None:
    name = desk.batch("b1", {"a": 150, "b": 250, "c": 350, "d": 450})
    desk.push_dies(name, 2)
    assert 0 < len(desk.world.applied) < 4
    one = only(desk.back(Batch(name)))
    assert one.complete and one.never_sent > 0
    assert desk.values() == desk.start
    assert desk.push(name).sends == 0
    assert desk.values() == desk.start


@pytest.mark.parametrize("at_write", [1, 2, 3, 4])
def test_what_was_in_flight_when_a_push_died_is_found_by_reading(desk: PushHarness, at_write: int) -> None:
    name = desk.batch("b1", {"a": 150, "b": 250, "c": 350, "d": 450})
    desk.push_dies(name, at_write)
    assert desk.ledger.deliveries(name, ["IN_FLIGHT"])
    one = only(desk.back(Batch(name)))
    assert one.complete, one
    assert desk.values() == desk.start


def test_what_left_late_in_its_wave_is_not_taken_for_never_sent(tmp_path: Path) -> None:
    """The ledger knows when a wave began; its last write left later, and a stale reading does not show it yet."""
    desk = PushHarness(tmp_path, {"a": 100, "b": 200}, Capabilities(stale_reads_s=2.0))
    name = desk.batch("b1", {"a": 150, "b": 250})
    desk.world.before_write = lambda key: desk.clock.sleep(3)
    desk.push_dies(name, 1)
    report = desk.back(Batch(name))
    assert report.complete and desk.values() == desk.start


def test_an_entity_that_cannot_be_read_does_not_keep_the_others_from_coming_back(desk: PushHarness) -> None:
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


def test_a_refused_batch_has_nothing_to_roll_back(desk: PushHarness) -> None:
    desk.batch("b1", {"a": 150}, status="REFUSED")
    with pytest.raises(RollbackError, match="refused by its guardrails"):
        desk.back(Batch("b1"))
    with pytest.raises(RollbackError, match="nothing to roll back"):
        desk.back(Since(DAY))


def test_a_rollback_is_not_rolled_back_but_decided_again(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150}, day=0)
    desk.back(Batch("b1"))
    with pytest.raises(RollbackError, match="decide 2026-03-01 of ad_budget again"):
        desk.back(Batch(rollback_id("b1")))
    desk.sent("b1-again", {"a": 160}, day=0)
    assert desk.values()["a"] == 160
    assert desk.back(Batch("b1-again")).complete
    assert desk.values() == desk.start


def test_the_same_decided_again_is_sent_and_taken_back_again(desk: PushHarness) -> None:
    for again in range(3):
        desk.batch("b1", {"a": 150, "b": 250}, day=0)
        assert desk.push("b1").complete and desk.values() == desk.start | {"a": 150, "b": 250}, again
        name = desk.ledger.batches(kind="decision")[-1].batch_id
        assert name == ("b1" if again == 0 else f"b1.{again + 1}")
        one = only(desk.back(Batch(name)))
        assert (
            one.complete and one.rollback_id == f"rollback-{name}" and one.restored == 2 and desk.values() == desk.start
        )
    assert only(desk.back(Batch("b1"))).already
    assert desk.ledger.verify().ok


def test_a_generation_that_stands_is_named_where_the_first_one_is_taken_back(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150}, day=0)
    desk.back(Batch("b1"))
    desk.batch("b1", {"a": 150}, day=0)
    desk.push("b1")
    report = desk.back(Batch("b1"))
    assert only(report).already and report.newer == ("b1.2",) and desk.values()["a"] == 150


def test_a_batch_whose_rows_were_removed_is_refused_by_name(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150})
    desk.clock.sleep(86_400 * 50)
    assert desk.ledger.retention(30) == ["b1"]
    with pytest.raises(RollbackError, match="b1: the retention policy"):
        desk.back(Batch("b1"))


@pytest.mark.parametrize("which", [Since(DAY), Since(DAY, "ad_budget"), Model("ad_budget", 1)])
@pytest.mark.parametrize("trigger", ["person", "guard"])
def test_of_a_version_older_than_the_retention_the_young_batches_come_back(
    desk: PushHarness, which: Any, trigger: Any
) -> None:
    desk.sent("b1", {"a": 150})
    desk.sent("b2", {"b": 250}, day=40)
    desk.sent("b3", {"a": 160, "c": 350}, day=41)
    desk.clock.sleep(86_400 * 50)
    assert desk.ledger.retention(30) == ["b1"]
    report = desk.back(which, trigger=trigger)
    assert report.complete and report.retired == ("b1",) and report.as_dict()["retired"] == ("b1",)
    assert [one.batch_id for one in report.batches] == ["b3", "b2"]
    assert desk.values() == desk.start | {"a": 150}, "what is there is restored, and no more is known"
    again = desk.back(which, trigger=trigger)
    assert again.complete and all(one.already for one in again.batches) and again.retired == ("b1",)


def test_where_the_retention_removed_everything_it_is_listed_and_nothing_waits(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150})
    desk.ledger.rollback_asked("b1", actor="anna", reason="harm", trigger="person")
    desk.clock.sleep(86_400 * 50)
    desk.ledger.retention(30)
    report = desk.back(Model("ad_budget", 1))
    assert report.complete and report.retired == ("b1",) and not report.batches
    assert desk.ledger.rollbacks("b1")[-1].action == "closed", "nothing waits for it any more"


def test_an_unknown_batch_and_a_missing_reason_are_refused(desk: PushHarness) -> None:
    with pytest.raises(ledgers.Unknown, match="nothing-like-it"):
        desk.back(Batch("nothing-like-it"))
    desk.sent("b1", {"a": 150})
    with pytest.raises(RollbackError, match="--reason"):
        desk.back(Batch("b1"), reason=" ")
    assert desk.values()["a"] == 150


def test_while_stopped_a_person_may_roll_back_and_a_guard_may_not(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150})
    desk.ledger.switch("ad_budget", True, "anna", "look first")
    with pytest.raises(Stopped):
        desk.back(Batch("b1"), trigger="guard")
    assert desk.values()["a"] == 150
    assert desk.back(Batch("b1")).complete
    assert desk.values() == desk.start


def test_a_system_that_the_workflow_was_moved_away_from_is_not_taken_for_the_new_one(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150})
    desk.world.system = "fake:another-account"
    with pytest.raises(
        RollbackError, match="was delivered to fake, and ad_budget now delivers to fake:another-account"
    ):
        desk.back(Batch("b1"))
    assert desk.values()["a"] == 150
    desk.world.system = "fake"
    assert desk.back(Batch("b1")).complete and desk.values() == desk.start


@pytest.mark.parametrize("theirs", [150, 777])
def test_what_another_workflow_has_set_since_is_a_conflict(desk: PushHarness, theirs: int) -> None:
    """Also where it is the same value: that workflow decided it, and it stands for its sake."""
    desk.sent("b1", {"a": 150, "b": 250})
    record(
        desk.ledger, [{"entity": "a", "before": 150, "after": theirs}, {"entity": "c", "before": 300, "after": 350}], "t1",
        workflow="ticket_priority", as_of=desk.clock(),
    ) if theirs != 150 else record(
        desk.ledger, [{"entity": "a", "before": 140, "after": theirs}], "t1", workflow="ticket_priority", as_of=START
    )  # fmt: skip
    desk.clock.sleep(1)
    desk.push("t1")
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.conflicts) == ["a"] and one.restored == 1
    assert desk.world.value("a") == theirs and desk.world.value("b") == 200


# --- asked, and closed


def actions(desk: PushHarness, batch_id: str) -> list[str]:
    return [one.action for one in desk.ledger.rollbacks(batch_id)]


def test_all_of_them_are_asked_for_before_anything_else_is_done(desk: PushHarness) -> None:
    for n in range(3):
        desk.sent(f"b{n}", {"a": 150 + n})

    def nobody(workflow: str) -> Any:
        assert [actions(desk, f"b{n}") for n in range(3)] == [["asked"]] * 3
        raise ConnectionError("the password is not set")

    with pytest.raises(ConnectionError):
        roll_back(desk.ledger, nobody, Since(DAY), actor="anna", reason="harm", **desk.how())
    assert desk.values()["a"] == 152
    assert desk.back(Since(DAY), reason="harm").complete and desk.values() == desk.start
    assert [actions(desk, f"b{n}") for n in range(3)] == [["asked", "complete"]] * 3, "asked once, not with each run"


def closed(desk: PushHarness, which: Any, **how: Any) -> RollbackReport:
    asked = {"actor": "Robin Berg", "reason": "the line was deleted"} | how
    return close(desk.ledger, lambda workflow: "fake", which, holder=dead_holder(), **asked)


def test_a_person_closes_a_rollback_that_cannot_come_to_its_end(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.world.end("a", "missing")
    desk.back(Batch("b1"))
    desk.fault("read", "b", "unavailable")  # and the system itself need not answer
    reads = desk.world.calls["read"]
    report = closed(desk, Batch("b1"))
    one = only(report)
    assert report.complete and one.closed and one.restored == 1 and desk.world.calls["read"] == reads
    (left,) = one.not_reversible
    assert left.entity == "a" and "closed by a person; last seen: is not there downstream" in left.says
    assert {d.entity: d.state for d in desk.ledger.deliveries("rollback-b1")} == {"a": "NOT_REVERSIBLE", "b": "ACKED"}
    assert desk.ledger.batch("rollback-b1").delivery == "COMPLETE"
    last = desk.ledger.rollbacks("b1")[-1]
    assert (last.action, last.actor, last.evidence["not_reversible"]) == ("closed", "Robin Berg", 1)
    with sqlite3.connect(desk.folder / "ledger.db") as raw:
        assert not [body for (body,) in raw.execute("SELECT body FROM events") if "Robin" in body or '"a"' in body]
    assert desk.ledger.verify().ok
    # it is over: run again it does nothing, and newer batches go out
    desk.well()
    head, again = desk.ledger.head(), desk.back(Batch("b1"))
    assert only(again).already and only(again).closed and desk.ledger.head() == head
    assert closed(desk, Batch("b1")).complete and desk.ledger.head() == head
    assert desk.push(desk.batch("b2", {"c": 333})).complete


def test_a_batch_that_cannot_be_resolved_is_closed_with_its_rollback(desk: PushHarness) -> None:
    name = desk.batch("b1", {"a": 150, "b": 250, "c": 350})
    desk.push_dies(name, 2)
    for key in desk.start:
        desk.fault("read", key, "unavailable")
    desk.world.fault = lambda op, key: "unavailable" if op == "read" else ""
    assert not desk.back(Batch(name)).complete
    one = only(closed(desk, Batch(name)))
    assert one.complete and entities([*one.not_reversible]) == sorted(
        d.entity or "" for d in desk.ledger.deliveries(name) if d.state == "NOT_REVERSIBLE"
    )
    assert one.never_sent + len(one.not_reversible) == 3
    assert desk.ledger.batch(name).delivery == "COMPLETE" and desk.ledger.verify().ok
    desk.well()
    assert desk.push(name).sends == 0, "and what had not gone out never does"


@pytest.mark.parametrize("sent", [True, False])
def test_a_rollback_that_was_only_asked_for_can_be_closed(desk: PushHarness, sent: bool) -> None:
    desk.sent("b1", {"a": 150}) if sent else desk.batch("b1", {"a": 150})
    with pytest.raises(RollbackError, match="no rollback of b1 is asked for"):
        closed(desk, Batch("b1"))
    desk.ledger.rollback_asked("b1", actor="anna", reason="harm", trigger="person")
    one = only(closed(desk, Batch("b1")))
    assert one.complete and one.closed and actions(desk, "b1") == ["asked", "closed"]
    assert entities(one.not_reversible) == (["a"] if sent else []) and one.never_sent == (0 if sent else 1)
    assert desk.push("b1").sends == 0 and desk.values()["a"] == (150 if sent else 100)
    guards = desk.back(Model("ad_budget", 1), trigger="guard")
    assert guards.complete and only(guards).closed and actions(desk, "b1") == ["asked", "closed"], "it stays closed"
    if sent:
        assert desk.back(Batch("b1")).complete and desk.values() == desk.start, "but for who asks for it by name"
        assert actions(desk, "b1") == ["asked", "closed", "asked", "complete"]


def test_a_close_waits_for_a_push_that_is_under_way_and_wants_a_reason(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150})
    desk.ledger.rollback_asked("b1", actor="anna", reason="harm", trigger="person")
    with pytest.raises(RollbackError, match="--reason"):
        closed(desk, Batch("b1"), reason=" ")
    lease = desk.ledger.lease("fake")
    with pytest.raises(ledgers.Busy):
        closed(desk, Batch("b1"))
    desk.ledger.release(lease)
    assert closed(desk, Batch("rollback-b1") if desk.ledger.batches(kind="rollback") else Batch("b1")).complete


def test_several_are_closed_at_once(desk: PushHarness) -> None:
    for n in range(3):
        desk.sent(f"b{n}", {"a": 150 + n})
    desk.world.end("a", "missing")
    assert not desk.back(Since(DAY)).complete
    assert {one.batch_id for one in closed(desk, Since(DAY)).batches} == {"b0", "b1", "b2"}
    assert {actions(desk, f"b{n}")[-1] for n in range(3)} == {"closed"}


# --- several batches


def test_several_batches_come_back_newest_first(desk: PushHarness) -> None:
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


def test_a_model_versions_batches_come_back_and_the_newer_one_stays(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150}, version=1)
    desk.sent("b2", {"a": 160, "b": 260}, version=2)
    desk.sent("b3", {"b": 270}, version=3)
    report = desk.back(Model("ad_budget", 2))
    assert [one.batch_id for one in report.batches] == ["b2"] and report.newer == ("b3",)
    assert [(one.entity, "b3" in one.says) for one in only(report).left] == [("b", True)]
    assert desk.values() == desk.start | {"a": 150, "b": 270}
    with pytest.raises(RollbackError, match="version 9"):
        desk.back(Model("ad_budget", 9))


def test_an_older_batchs_value_that_was_left_to_a_newer_one_comes_back_with_that_one(desk: PushHarness) -> None:
    """Rolled back in the wrong order: nothing of the harmful batch may come up again from below."""
    desk.sent("b1", {"a": 150})
    desk.sent("b2", {"a": 160})
    assert entities(only(desk.back(Batch("b1"))).left) == ["a"]
    assert desk.values()["a"] == 160
    assert desk.back(Batch("b2")).complete
    assert desk.values() == desk.start


def test_a_newer_batch_that_was_pushed_between_two_runs_of_a_rollback_is_left(desk: PushHarness) -> None:
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
def test_a_newer_batchs_write_of_which_nothing_is_known_is_never_written_over(desk: PushHarness, landed: bool) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.batch("b2", {"a": 500})
    desk.push_dies("b2", 1, landed=landed)
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.conflicts) == (["a"] if landed else [])
    assert desk.values() == desk.start | ({"a": 500} if landed else {})
    assert desk.back(Batch("b2")).complete
    assert desk.values() == desk.start, "nor does what was rolled back come up again from below"


def test_an_older_batch_waits_until_the_newer_one_is_back(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150})
    desk.sent("b2", {"b": 250})
    desk.fault("read", "b", "unavailable")
    report = desk.back(Since(DAY))
    assert not report.complete and report.waiting == ("b1",)
    assert desk.values()["a"] == 150
    desk.well()
    assert desk.back(Since(DAY)).complete
    assert desk.values() == desk.start


def test_its_cost_does_not_grow_with_the_number_of_newer_batches(tmp_path: Path) -> None:
    """Calls of the ledger for one batch, and rows of newer batches that are carried into the process: none."""
    calls: dict[int, Counter[str]] = {}
    for newer in (2, 12):
        desk = PushHarness(tmp_path / str(newer), {"a": 100, "b": 200, "c": 300})
        desk.sent("b0", {"a": 150, "b": 250})
        for n in range(newer):
            desk.sent(f"n{n}", {"a": 160 + n, "c": 310 + n})
        desk.back(Since(DAY + timedelta(days=1 + newer // 2)))
        counted = Counting(desk.ledger)
        one = only(desk.back(Batch("b0"), counted))
        assert entities(one.left) == ["a"] and one.restored == 1
        calls[newer] = counted.calls
        desk.ledger.close()
    assert calls[2] == calls[12]


class Counting:
    """A ledger that counts its calls."""

    def __init__(self, ledger: ledgers.Ledger) -> None:
        self._ledger, self.calls = ledger, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += callable(getattr(self._ledger, name))
        return getattr(self._ledger, name)


# --- fields that a write empties, or changes besides


def empties(desk: PushHarness, key: str, *, ours: bool = True) -> None:
    """The system takes the value of this entity, says yes, and holds none afterwards."""
    well = desk.world._apply

    def apply(write: Any, value: int) -> Any:
        answer = well(write, value)
        if write.key == key:
            desk.world._set(key, None, "us" if ours else "anna")
        return answer

    desk.world._apply = apply  # type: ignore[method-assign]


@pytest.mark.parametrize("history", [True, False])
def test_a_field_that_our_own_write_emptied_is_filled_again_or_listed(tmp_path: Path, history: bool) -> None:
    desk = PushHarness(tmp_path, {"a": 100, "b": 200}, Capabilities(change_history=history))
    whole = desk.world._apply
    empties(desk, "a")
    assert desk.push(desk.batch("b1", {"a": 150, "b": 250})).counts == {"REJECTED": 1, "ACKED": 1}
    desk.world._apply = whole  # type: ignore[method-assign]
    one = only(desk.back(Batch("b1")))
    assert one.complete and desk.world.value("b") == 200
    if history:
        assert one.restored == 2 and desk.world.value("a") == 100
    else:
        assert one.restored == 1 and entities(one.conflicts) == ["a"], "it may be a person's doing: said, and left"
    desk.ledger.close()


def test_a_value_that_cannot_be_read_any_more_is_listed(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150, "b": 250})
    desk.world.person("a", None)
    one = only(desk.back(Batch("b1")))
    assert one.complete and entities(one.conflicts) == ["a"] and one.restored == 1


def test_where_no_value_stood_before_it_is_listed(desk: PushHarness) -> None:
    desk.world.person("a", None)
    record(desk.ledger, [{"entity": "a", "before": None, "after": 150}], "b1", as_of=desk.clock())
    assert desk.push("b1").counts == {"ACKED": 1}
    one = only(desk.back(Batch("b1")))
    assert (
        one.complete and entities(one.not_reversible) == ["a"] and "no value stood there" in one.not_reversible[0].says
    )


def test_what_a_write_changed_besides_is_named_and_not_restored(desk: PushHarness) -> None:
    plain, team = desk.world._reading, {"a": "sales", "b": "sales"}
    apply = desk.world._apply
    desk.world._reading = lambda key: replace(plain(key), watched={"team": team.get(key, "")})  # type: ignore[method-assign]

    def clears(write: Any, value: int) -> Any:
        team[write.key] = "" if write.key == "a" else team[write.key]
        return apply(write, value)

    desk.world._apply = clears  # type: ignore[method-assign]
    desk.sent("b1", {"a": 150, "b": 250})
    one = only(desk.back(Batch("b1")))
    assert one.complete and one.restored == 2 and entities(one.beside) == ["a"] and "team" in one.beside[0].says
    assert desk.ledger.rollbacks("b1")[-1].evidence["beside"] == 1


# --- tried first


def test_a_dry_run_shows_what_each_batch_would_bring_back_and_writes_nothing(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150, "b": 250, "c": 350})
    desk.sent("b2", {"a": 160, "d": 450})
    desk.batch("b3", {"a": 170})
    desk.world.person("b", 777)
    desk.world.end("c", "missing")
    head, writes = desk.ledger.head(), len(desk.world.writes)
    diffs = dry_run(desk.ledger, lambda workflow: desk.world, Since(DAY))
    assert [diff.batch_id for diff in diffs] == ["rollback-b3", "rollback-b2", "rollback-b1"]
    assert not diffs[0].rows and "1 deliveries of b3 were not sent" in diffs[0].notes[0]
    assert {r.entity: (r.action, r.now, r.would) for diff in diffs[1:] for r in diff.rows if diff is diffs[1]} == {
        "a": ("SEND", 160, 150), "d": ("SEND", 450, 400),
    }  # fmt: skip
    assert {r.entity: (r.action, r.now, r.would) for r in diffs[2].rows} == {
        "a": ("SEND", 150, 100), "b": ("CONFLICT", 777, None), "c": ("PENDING", None, None),
    }  # fmt: skip
    assert (desk.ledger.head(), len(desk.world.writes)) == (head, writes)
    desk.back(Since(DAY))
    after = dry_run(desk.ledger, lambda workflow: desk.world, Since(DAY))
    assert "taken back already" in after[0].notes[0]
    assert [(r.entity, r.action) for r in after[2].rows] == [("c", "PENDING")], "what is left of one that is under way"


def test_a_dry_run_of_a_system_that_cannot_be_read_says_so(desk: PushHarness) -> None:
    desk.sent("b1", {"a": 150})
    desk.fault("read", "a", "unavailable")
    with pytest.raises(PushError, match="fake cannot be read"):
        dry_run(desk.ledger, lambda workflow: desk.world, Batch("b1"))


# --- money


def test_the_total_stays_within_the_pool_at_every_instant(pooled: PushHarness) -> None:
    pooled.sent("b1", {"a": 10, "b": 20, "c": 30, "d": 940})
    assert pooled.back(Batch("b1")).complete
    assert pooled.values() == pooled.start and not pooled.over


def test_where_a_decrease_cannot_come_back_the_increases_get_only_what_is_free(pooled: PushHarness) -> None:
    pooled.sent("b1", {"a": 10, "b": 20, "c": 30, "d": 900})
    pooled.world.end("d", "closed")  # holds 900 of 1000, for good
    one = only(pooled.back(Batch("b1")))
    assert one.complete and not pooled.over
    assert entities(one.not_reversible) == ["d"]
    assert sum(pooled.values().values()) == 1000
    assert one.restored + len(one.partly) + len(one.left) == 3, "and everything that is short is said"


def test_an_erased_entity_still_counts_in_the_total(pooled: PushHarness) -> None:
    pooled.sent("b1", {"a": 10, "b": 20, "c": 30, "d": 940})
    pooled.ledger.forget("d")
    one = only(pooled.back(Batch("b1")))
    assert one.complete and not pooled.over
    assert sum(pooled.values().values()) <= 1000


# --- killed


def test_killed_at_any_call_it_ends_the_same(tmp_path: Path) -> None:
    """Before and after calls of the ledger and of the system, from the first to the last of them, a step apart."""
    first = PushHarness(tmp_path / "start", {"a": 100, "b": 200, "c": 300}, arms=dict.fromkeys("abc", "champion"))
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
        (
            {"state": "REJECTED", "sent": 2, "prior": 1, "observed": None, "says": "stored no value instead of 2"},
            (None, 1),
        ),
        ({"state": "REJECTED", "sent": 2, "prior": 1, "observed": None, "says": "is not there downstream"}, (2, 1)),
        ({"state": "REJECTED", "sent": 2, "prior": 1, "observed": None, "says": None}, (2, 1)),
        ({"sent": 2, "prior": None, "expected": None}, None),
    ],
)
def test_what_a_delivery_goes_back_to(said: dict[str, Any], goes_back: tuple[int, int] | None) -> None:
    assert undone(delivery(**said), 3, knows_authors=True) == goes_back


STATES = (
    "ACKED",
    "REJECTED",
    "CONFLICT",
    "OVERWRITTEN",
    "SKIPPED",
    "NOT_REVERSIBLE",
    "PENDING",
    "IN_FLIGHT",
    "UNKNOWN",
)
WORDS = (
    None,
    "is not there downstream",
    "is closed downstream and cannot be changed",
    "stored no value instead of 2",
    "x",
)


@pytest.mark.parametrize("knows", [True, False])
def test_of_whatever_was_sent_it_is_put_back_or_listed_or_proven_not_to_stand(knows: bool) -> None:
    """Every state × what was sent × what stood before × what was read: nothing ends in silence."""
    tried = itertools.product(STATES, (None, 2), (None, 1, 2), (None, 1), (None, 1, 2, 8), WORDS, ("e", None))
    silent = 0
    for state, sent, prior, expected, observed, says, entity in tried:
        d = delivery(
            state=state, sent=sent, prior=prior, expected=expected, observed=observed, says=says, entity=entity
        )
        pair = undone(d, 2, knows_authors=knows)
        back = replace(d, state="ACKED", observed=d.after) if pair is not None and entity is not None else None
        where, words = became(d, back, begun=True)
        assert where in ("restored", "partly", "conflicts", "not_reversible", "left", "open", "untouched")
        assert where in ("restored", "untouched") or words is not None
        if back is not None:
            assert where == ("open" if state in ledgers.OPEN else "restored"), d
            continue
        before = expected if prior is None else prior
        stands = {
            "ACKED": sent is not None and sent != before,
            "OVERWRITTEN": sent is not None,
            "CONFLICT": sent is not None,
            "REJECTED": sent is not None and observed not in (None, before),
        }.get(state, False)
        if stands:
            assert where in ("conflicts", "not_reversible"), (d, where)
        elif where == "untouched":
            silent += 1
            standing = sent is not None and observed == sent and sent != before and entity is not None
            assert not standing or state in ("SKIPPED",), d
    assert silent
