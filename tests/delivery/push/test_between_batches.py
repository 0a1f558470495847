"""What lies between batches: a day decided again, a rollback not yet begun, limits against what stands, a shared system, a
record or a mapping that was changed after the approval."""

# ruff: noqa: F811

from __future__ import annotations

import random
import sqlite3
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from delivery import approvals
from delivery.connectors import file_drop
from delivery.connectors.base import Capabilities
from delivery.ledger import DaySent, Holder, LedgerMismatch, NewBatch
from delivery.push import Blocked, Changed, NotApproved, PushSettings, Refused, dry_run, push
from delivery.rollback import Batch, Since, roll_back
from tests.delivery.push.test_push import (  # noqa: F401
    CONDITION,
    EVERY,
    HISTORY,
    NEITHER,
    QUICK,
    Room,
    empty,
    room,
)
from tests.support.fakes import DAY, START, Crash, FakeSystem, Mortal, dead_holder, record, table


def rows(before: dict[str, int], after: dict[str, int]) -> list[dict[str, Any]]:
    return [{"entity": key, "before": before[key], "after": value} for key, value in after.items()]


def decided(room: Room, before: dict[str, int], after: dict[str, int], name: str, **said: Any) -> Any:
    """A batch with the terms that a workflow gives it."""
    kept = {
        "record": {},
        "day": DAY,
        "status": "READY",
        "as_of": START - timedelta(hours=1),
        "workflow": "ad_budget",
    } | said
    new = NewBatch(
        batch_id=name, workflow=kept["workflow"], kind="decision", day=kept["day"], digest=f"digest of {name}",
        status=kept["status"], step="champion", as_of=kept["as_of"], decided_at=kept["as_of"], run_id="run",
        record=kept["record"], pools=kept.get("pools"),
    )  # fmt: skip
    return room.ledger.record_batch(new, table(rows(before, after), name))


def back(room: Room, fake: FakeSystem, which: Any, **named: Any) -> Any:
    room.started += 1
    return roll_back(
        named.pop("ledger", room.ledger), lambda _: fake, which, actor="ann", reason="it does harm", settings=QUICK,
        clock=room.clock, sleep=room.clock.sleep, monotonic=room.clock.monotonic, rng=random.Random(1),
        holder=dead_holder(room.started), **named,
    )  # fmt: skip


# --- deciding again


def test_the_decision_made_last_is_sent_also_where_it_had_been_made_before(room: Room) -> None:
    fake = room.system()
    record(room.ledger, [{"entity": "a", "before": 100, "after": 110}], "X")
    record(room.ledger, [{"entity": "a", "before": 100, "after": 10}], "Y")
    again = record(room.ledger, [{"entity": "a", "before": 100, "after": 110}], "X")
    assert again.batch_id == "X.2" and again.sequence == 3
    superseded = room.push(fake, "Y")
    assert "superseded by X.2" in superseded.why and not superseded.sends
    assert room.push(fake, "X").batch_id == "X.2" and fake.value("a") == 110
    assert room.states("X.2") == {"a": "ACKED"} and room.states("X") == {"a": "SKIPPED"}
    ids = {d.decision_id for b in ("X", "X.2") for d in room.ledger.deliveries(b)}
    assert ids == {"X-0", "X-0.2"}, "each decision has an id of its own"


def test_a_step_that_runs_again_changes_nothing(room: Room) -> None:
    fake = room.system()
    record(room.ledger, [{"entity": "a", "before": 100, "after": 110}], "X")
    assert record(room.ledger, [{"entity": "a", "before": 100, "after": 110}], "X").batch_id == "X"
    room.push(fake, "X")
    assert record(room.ledger, [{"entity": "a", "before": 100, "after": 110}], "X").batch_id == "X"
    assert len(room.ledger.batches()) == 1


def test_after_a_rollback_the_same_decision_can_be_made_and_sent_again(room: Room) -> None:
    """Also where the system remembers the keys of writes: they are of another batch."""
    fake = room.system(can=Capabilities(idempotency_key=True))
    for n in range(1, 4):
        record(room.ledger, [{"entity": "a", "before": 100, "after": 120}], "X")
        assert room.push(fake, "X").complete and fake.value("a") == 120
        newest = room.ledger.newest("X").batch_id
        assert newest == ("X" if n == 1 else f"X.{n}")
        assert back(room, fake, Batch(newest)).complete and fake.value("a") == 100


def test_a_batch_that_was_never_sent_is_decided_anew_after_a_rollback(room: Room) -> None:
    fake = room.system()
    record(room.ledger, [{"entity": "a", "before": 100, "after": 120}], "monday")
    room.push(fake, "monday")
    tuesday = rows({"a": 120}, {"a": 140})
    record(room.ledger, tuesday, "tuesday", day=DAY + timedelta(days=1))
    back(room, fake, Batch("monday"))
    assert record(room.ledger, tuesday, "tuesday", day=DAY + timedelta(days=1)).batch_id == "tuesday.2"


@EVERY
@pytest.mark.parametrize("killed", [False, True], ids=["sent", "half sent"])
def test_what_the_first_batch_changed_and_the_second_leaves_alone_is_taken_back(
    room: Room, can: Capabilities, killed: bool
) -> None:
    before = {"a": 100, "b": 100, "c": 100}
    fake = room.system(before, can=can, arms=dict.fromkeys("abc", "champion"), pools={"champion": 300})
    decided(room, before, {"a": 150, "b": 50, "c": 100}, "X", pools={"champion": 300})
    if killed:
        fake.fault = lambda op, key: "unknown_applied" if (op, key) == ("apply", "a") else ""
        room.push(fake, "X", settings=PushSettings(patience_s=0.0, attempts=1, late_s=0.5))
        fake.fault = lambda op, key: ""
    else:
        assert room.push(fake, "X").complete
    decided(room, before, {"a": 100, "b": 80, "c": 120}, "Y", pools={"champion": 300})
    shown = dry_run(
        room.ledger, fake, "Y", settings=QUICK, clock=room.clock, sleep=room.clock.sleep, monotonic=room.clock.monotonic
    )
    if not killed:
        assert {r.entity: (r.now, r.would) for r in shown.rows} == {"a": (150, 100), "b": (50, 80), "c": (100, 120)}
    report = room.push(fake, "Y")
    assert report.complete and {k: fake.value(k) for k in "abc"} == {"a": 100, "b": 80, "c": 120}, report
    assert room.states("Y")["a"] == "ACKED" and all(over <= 0 for _, over in fake.overs)
    assert room.push(fake, "Y").complete and back(room, fake, Batch("Y")).complete


def test_a_day_decided_anew_as_no_change_takes_back_what_was_sent(room: Room) -> None:
    fake = room.system()
    record(room.ledger, [{"entity": "a", "before": 100, "after": 150}, {"entity": "b", "before": 50, "after": 50}], "X")
    room.push(fake, "X")
    fake.person("b", 55)
    record(room.ledger, [{"entity": "a", "before": 100, "after": 100}, {"entity": "b", "before": 50, "after": 50}], "Y")
    assert room.push(fake, "Y").complete
    assert (fake.value("a"), fake.value("b")) == (100, 55), "what a person set, and nobody decided on, is left"


def test_what_a_person_has_set_since_is_not_taken_back(room: Room) -> None:
    fake = room.system()
    record(room.ledger, [{"entity": "a", "before": 100, "after": 150}], "X")
    room.push(fake, "X")
    fake.person("a", 170)
    record(room.ledger, [{"entity": "a", "before": 100, "after": 100}], "Y")
    room.push(fake, "Y")
    assert fake.value("a") == 170 and room.states("Y") == {"a": "CONFLICT"}


def test_what_a_rollback_restored_is_not_set_back_by_a_decision_that_leaves_it_alone(room: Room) -> None:
    """Decided after the rollback, from an export of before it: only what it changes is its own."""
    fake = room.system()
    record(room.ledger, [{"entity": "a", "before": 100, "after": 150}], "X")
    room.push(fake, "X")
    back(room, fake, Batch("X"))
    stale = [{"entity": "a", "before": 150, "after": 150}, {"entity": "b", "before": 50, "after": 60}]
    record(room.ledger, stale, "Y", day=DAY + timedelta(days=1))
    assert room.push(fake, "Y").complete and (fake.value("a"), fake.value("b")) == (100, 60)


def test_a_backfill_is_never_sent(room: Room) -> None:
    fake = room.system({"a": 100})
    decided(room, {"a": 100}, {"a": 120}, "late", record={"backfill": True})
    with pytest.raises(Refused, match="is a backfill"):
        room.push(fake, "late")
    assert not fake.writes


@pytest.mark.parametrize("how", ["sent", "on its way", "not sent"])
def test_a_batch_sent_while_the_day_was_decided_anew_is_not_replaced_unasked(room: Room, how: str) -> None:
    fake = room.system()
    decided(room, {"a": 100}, {"a": 120}, "X")
    if how == "sent":
        room.push(fake, "X")
    elif how == "on its way":
        fake.fault = lambda op, key: "unavailable" if op == "read" else ""
        room.push(fake, "X", settings=PushSettings(patience_s=0.0))
    new = NewBatch(
        batch_id="Y", workflow="ad_budget", kind="decision", day=DAY, digest="y", status="READY", step="champion",
        as_of=START, decided_at=START, run_id="r", record={},
    )  # fmt: skip
    decisions = table(rows({"a": 100}, {"a": 130}), "Y")
    if how == "not sent":
        assert room.ledger.record_batch(new, decisions, unless_sent=True).batch_id == "Y"
        return
    with pytest.raises(DaySent, match=r"batch X of 2026-03-01 was sent .* --again"):
        room.ledger.record_batch(new, decisions, unless_sent=True)
    assert [b.batch_id for b in room.ledger.batches()] == ["X"]
    assert room.ledger.record_batch(new, decisions).batch_id == "Y"


def test_only_what_would_be_sent_can_be_approved(room: Room) -> None:
    approvals.enrol(room.ledger, "robin", "correct horse battery")
    decided(room, {"a": 100}, {"a": 300}, "X", status="HELD")
    decided(room, {"a": 100}, {"a": 200}, "Y", status="HELD")
    decided(room, {"a": 100}, {"a": 300}, "old", status="HELD", day=DAY - timedelta(days=9), record={"backfill": True})
    for name, words in (("X", "decided again as Y"), ("old", "is a backfill")):
        with pytest.raises(approvals.NothingToApprove, match=words):
            approvals.approve(room.ledger, name, "robin", "correct horse battery", "fine")
    approvals.approve(room.ledger, "Y", "robin", "correct horse battery", "fine")
    decided(room, {"a": 100}, {"a": 300}, "X", status="HELD")
    decided(room, {"a": 100}, {"a": 200}, "Y", status="HELD")
    with pytest.raises(NotApproved):
        room.push(room.system(), "Y")  # Y.2 is another decision, which nobody has agreed to


# --- rollbacks that were asked for


@pytest.mark.parametrize("kill", ["rollback_asked", "record_batch", "lease", "open_push"])
def test_a_rollback_comes_first_from_the_moment_it_is_asked_for(room: Room, kill: str) -> None:
    fake = room.system()
    record(room.ledger, [{"entity": "a", "before": 100, "after": 150}], "monday")
    room.push(fake, "monday")
    fake.process.dead = False
    with pytest.raises(Crash):
        back(
            room,
            fake,
            Batch("monday"),
            ledger=Mortal(room.ledger, fake.process, lambda m: "crash_after" if m == kill else ""),
        )
    fake.process.dead = False
    room.clock.sleep(86400)
    record(
        room.ledger,
        [{"entity": "a", "before": 150, "after": 160}],
        "tuesday",
        day=DAY + timedelta(days=1),
        as_of=room.clock(),
    )
    with pytest.raises(Blocked, match="rollback-monday"):
        room.push(fake, "tuesday")
    notes = dry_run(
        room.ledger, fake, "tuesday", clock=room.clock, sleep=room.clock.sleep, monotonic=room.clock.monotonic
    ).notes
    assert any("rollback-monday" in note for note in notes)
    assert back(room, fake, Batch("monday")).complete and fake.value("a") == 100
    assert room.ledger.pending_rollbacks("ad_budget") == []


def test_a_push_under_way_ends_when_a_rollback_is_asked_for(room: Room) -> None:
    values = {f"e{n}": 100 for n in range(12)}
    fake = room.system(values)
    record(room.ledger, rows(values, dict.fromkeys(values, 110)), "monday", as_of=START - timedelta(hours=2))
    room.push(fake, "monday")
    tuesday = rows(dict.fromkeys(values, 110), dict.fromkeys(values, 120))
    record(room.ledger, tuesday, "tuesday", day=DAY + timedelta(days=1), as_of=room.clock())
    asked: list[Any] = []

    def ask(progress: Any) -> None:
        if progress.done and not asked:
            asked.append(room.ledger.rollback_asked("monday", actor="ann", reason="harm", trigger="person"))

    report = room.push(fake, "tuesday", settings=PushSettings(concurrency=1, wave=3), progress=ask)
    assert "rollback-monday" in report.why and report.counts == {"ACKED": 3, "PENDING": 9}


def test_a_batch_decided_before_a_rollback_of_its_entities_is_superseded(room: Room) -> None:
    """One line went from 8,328 to 18,738, where half of it was allowed."""
    fake = room.system({"a": 8328, "b": 50})
    record(room.ledger, rows({"a": 8328, "b": 50}, {"a": 12492, "b": 50}), "monday")
    room.push(fake, "monday")
    room.clock.sleep(3600)
    both = rows({"a": 12492, "b": 50}, {"a": 18738, "b": 60})
    record(room.ledger, both, "tuesday", day=DAY + timedelta(days=1), as_of=room.clock())
    record(room.ledger, both[1:], "of b", day=DAY + timedelta(days=1), as_of=room.clock(), workflow="another")
    back(room, fake, Batch("monday"))
    report = room.push(fake, "tuesday")
    assert "superseded by rollback-monday" in report.why and "decide 2026-03-02 again" in report.why
    assert room.states("tuesday") == {"a": "SKIPPED", "b": "SKIPPED"} and fake.value("a") == 8328
    assert room.push(fake, "of b").complete and fake.value("b") == 60, "what it did not touch goes on"


def test_a_batch_decided_while_a_rollback_of_its_entities_was_under_way_is_superseded(room: Room) -> None:
    fake = room.system({"a": 100, "b": 50})
    record(room.ledger, rows({"a": 100, "b": 50}, {"a": 150, "b": 60}), "monday")
    room.push(fake, "monday")
    fake.fault = lambda op, key: "unavailable" if (op, key) == ("read", "a") else ""
    assert not back(room, fake, Batch("monday")).complete
    fake.fault = lambda op, key: ""
    room.clock.sleep(60)
    for name, key, stands in (("of a", "a", 150), ("of b", "b", 50)):
        said = {"day": DAY + timedelta(days=1), "as_of": room.clock(), "workflow": "ad_budget"}
        record(room.ledger, rows({key: stands}, {key: stands + 5}), name, **said)
    room.clock.sleep(60)
    assert back(room, fake, Batch("monday")).complete and fake.value("a") == 100
    assert room.ledger.taken_back_since("of a") == "rollback-monday", "it stood at 150 when that was decided"
    assert room.ledger.taken_back_since("of b") is None, "that had been taken back by then"


# --- limits against what stands


@pytest.mark.parametrize(
    ("limits", "stands", "after", "words"),
    [
        ({"max_change": 0.5}, 60, 120, "a change to 120 is 100% of it, and 50% is allowed"),
        ({"max_change": 0.5}, 90, 120, ""),
        ({"max_absolute_change": 30}, 60, 120, "larger than 30"),
        ({"max_absolute_change": 60}, 60, 120, ""),
        ({"keep_sign": True}, -5, 120, "would reverse its sign"),
        ({"max_change": 0.5}, 0, 120, "a change from nothing"),
        ({}, 1, 120, ""),
    ],
)
def test_a_change_is_judged_against_the_value_that_stands(
    room: Room, limits: dict[str, Any], stands: int, after: int, words: str
) -> None:
    """Our own later value stands where the batch was decided from an older one."""
    fake = room.system({"a": 100, "b": 50})
    record(room.ledger, rows({"a": 100}, {"a": stands}), "late", day=DAY)
    room.push(fake, "late")
    decided(
        room, {"a": 100, "b": 50}, {"a": after, "b": 55}, "next", day=DAY + timedelta(days=1), record={"limits": limits}
    )
    shown = dry_run(room.ledger, fake, "next", clock=room.clock, sleep=room.clock.sleep, monotonic=room.clock.monotonic)
    room.push(fake, "next")
    assert fake.value("b") == 55
    if words:
        assert room.states("next") == {"a": "SKIPPED", "b": "ACKED"} and words in room.says("a", "next")
        assert fake.value("a") == stands and words in next(r.why for r in shown.rows if r.entity == "a")
    else:
        assert fake.value("a") == after


def test_what_a_person_agreed_to_is_not_held_against_the_limits_again(room: Room) -> None:
    fake = room.system({"a": 100})
    record(room.ledger, rows({"a": 100}, {"a": 120}), "late")
    room.push(fake, "late")
    approvals.enrol(room.ledger, "robin", "correct horse battery")
    for name, after, goes in (("agreed", 300, True), ("beyond", 20, False)):
        stands = fake.value("a")
        decided(
            room,
            {"a": 100},
            {"a": after},
            name,
            day=DAY + timedelta(days=1),
            status="HELD",
            record={"limits": {"max_change": 0.5}},
        )
        approvals.approve(room.ledger, name, "robin", "correct horse battery", "agreed")
        room.push(fake, name)
        assert (fake.value("a") == after) is goes, (name, stands, room.ledger.deliveries(name))


def test_a_total_is_judged_against_what_stands(room: Room) -> None:
    values = {"a": 100, "b": 100, "c": 100, "d": 100}
    fake = room.system(values)
    record(room.ledger, rows(values, {"a": 50, "b": 50}), "late")
    room.push(fake, "late")
    wanted = {"a": 120, "b": 110, "c": 100, "d": 110}
    decided(room, values, wanted, "next", day=DAY + timedelta(days=1), record={"limits": {"max_total_change": 0.2}})
    report = room.push(fake, "next")
    assert report.counts == {"SKIPPED": 3} and not report.sends
    assert "46.7% of the total, and 20.0% is allowed" in room.says("a", "next")
    decided(
        room,
        values,
        {"a": 55, "b": 55},
        "small",
        day=DAY + timedelta(days=2),
        record={"limits": {"max_total_change": 0.2}},
    )
    assert room.push(fake, "small").counts == {"ACKED": 2}


# --- one system, two workflows


@pytest.mark.parametrize("can", [CONDITION, NEITHER, HISTORY], ids=["condition", "neither", "history"])
def test_what_another_workflow_proved_is_a_conflict_and_stays_reversible(room: Room, can: Capabilities) -> None:
    fake = room.system({"a": 100}, can=can)
    record(room.ledger, rows({"a": 100}, {"a": 70}), "old", workflow="prices", day=DAY - timedelta(days=1))
    record(room.ledger, rows({"a": 100}, {"a": 120}), "new")
    assert room.push(fake, "new").complete
    room.clock.sleep(60)
    assert room.push(fake, "old").counts == {"CONFLICT": 1} and fake.value("a") == 120
    assert "the workflow ad_budget has set it" in room.says("a", "old")
    assert back(room, fake, Batch("new")).batches[0].restored == 1 and fake.value("a") == 100


def test_an_own_value_is_known_again_after_another_workflow_has_set_and_given_it_back(room: Room) -> None:
    fake = room.system({"a": 100})
    record(room.ledger, rows({"a": 100}, {"a": 120}), "mine")
    room.push(fake, "mine")
    record(room.ledger, rows({"a": 120}, {"a": 90}), "theirs", workflow="prices")
    room.push(fake, "theirs")
    back(room, fake, Batch("theirs"))
    record(room.ledger, rows({"a": 100}, {"a": 130}), "next", day=DAY + timedelta(days=1))
    room.push(fake, "next")
    assert fake.value("a") == 130, "120 stands, which is what this workflow proved last"


# --- what was approved is what is sent


def test_a_decision_changed_since_it_was_recorded_stops_the_push_before_anything_is_sent(
    room: Room, tmp_path: Path
) -> None:
    fake = room.system()
    record(room.ledger, rows({"a": 100, "b": 50}, {"a": 120, "b": 40}))
    for change, undo in (
        ('update decisions set "after" = 999 where n = 0', 'update decisions set "after" = 120 where n = 0'),
        ("update batches set record = '{}'", None),
    ):
        with sqlite3.connect(tmp_path / "ledger.db") as c:
            kept = c.execute("select record from batches").fetchone()
            c.execute(change)
        with pytest.raises(LedgerMismatch, match="nothing of it is sent"):
            room.push(fake)
        with sqlite3.connect(tmp_path / "ledger.db") as c:
            c.execute(undo) if undo else c.execute("update batches set record = ?", kept)
    assert not fake.writes
    assert room.push(fake).complete


def _drop(folder: Path, names: dict[int, str]) -> file_drop.FileDrop:
    said = file_drop.FileDropSettings(
        kind="file_drop",
        path=str(folder / "prio.csv"),
        shape="state",
        format="csv",
        key="id",
        value="prio",
        names=names,
    )
    return file_drop.connect(said, environ={}, folder=folder, clock=lambda: START)


def test_a_mapping_changed_since_the_decision_stops_the_push_and_the_rollback(room: Room, tmp_path: Path) -> None:
    (tmp_path / "prio.csv").write_text("id,prio\na,normal\nb,normal\n")
    then, now = {1: "urgent", 2: "high", 3: "normal"}, {1: "low", 2: "high", 3: "normal", 4: "urgent"}
    how = {"settings": QUICK, "clock": room.clock, "sleep": room.clock.sleep, "monotonic": room.clock.monotonic}
    terms = {"mapping": _drop(tmp_path, then).mapping}
    decided(room, {"a": 3, "b": 3}, {"a": 1, "b": 1}, "b1", record=terms)
    with pytest.raises(Changed, match=r"put workflow\.yaml's section connector back"):
        push(room.ledger, _drop(tmp_path, now), "b1", **how)
    assert "urgent" not in (tmp_path / "prio.csv").read_text()
    assert push(room.ledger, _drop(tmp_path, then), "b1", **how).counts == {"ACKED": 2}
    with pytest.raises(Changed, match=r"put workflow\.yaml's section connector back"):
        roll_back(room.ledger, lambda _: _drop(tmp_path, now), Batch("b1"), actor="ann", reason="x", **how)  # type: ignore[arg-type]
    assert roll_back(room.ledger, lambda _: _drop(tmp_path, then), Batch("b1"), actor="ann", reason="x", **how).complete  # type: ignore[arg-type]
    assert (tmp_path / "prio.csv").read_text() == "id,prio\na,normal\nb,normal\n"


def test_an_approval_of_which_nobody_knows_what_its_values_meant_lets_nothing_go(room: Room, tmp_path: Path) -> None:
    (tmp_path / "prio.csv").write_text("id,prio\na,normal\n")
    decided(room, {"a": 3}, {"a": 1}, "b1", status="HELD")
    approvals.enrol(room.ledger, "robin", "correct horse battery")
    approvals.approve(room.ledger, "b1", "robin", "correct horse battery", "becomes urgent")
    with pytest.raises(Changed, match="decide 2026-03-01 again, and approve that batch"):
        push(
            room.ledger,
            _drop(tmp_path, {1: "low", 3: "normal"}),
            "b1",
            settings=QUICK,
            clock=room.clock,
            sleep=room.clock.sleep,
        )


# --- the lease


def test_who_slept_in_the_rate_limit_writes_nothing(room: Room) -> None:
    fake = room.system({"a": 100, "b": 50}, can=NEITHER)
    record(room.ledger, rows({"a": 100}, {"a": 120}))
    slept: list[int] = []

    def sleep(seconds: float) -> None:
        if threading.current_thread().name.startswith("push") and not slept:
            slept.append(1)
            room.clock.sleep(3600)  # the machine sleeps while a thread waits for its turn
            room.ledger.lease("fake", Holder("another host", 1, "x"), 60.0)
            fake.targets["a"].value = 100
            return
        room.clock.sleep(seconds)

    with pytest.raises(Exception, match="no longer ours"):
        push(
            room.ledger, fake, "b1", settings=PushSettings(concurrency=1, rate_per_s=0.5), clock=room.clock, sleep=sleep,
            monotonic=room.clock.monotonic, holder=Holder("this host", 1, "y"),
        )  # fmt: skip
    assert slept and not fake.writes


def test_a_lease_ends_counted_from_its_grant(room: Room) -> None:
    """The ledger took longer to answer than the lease lasts: it has run out already when the answer comes."""
    fake = room.system({"a": 100}, can=NEITHER)
    record(room.ledger, rows({"a": 100}, {"a": 120}))
    real = room.ledger.lease

    def slow(*args: Any, **named: Any) -> Any:
        granted = real(*args, **named)
        room.clock.sleep(61)
        real("fake", Holder("another host", 1, "x"), 60.0)
        return granted

    room.ledger.lease = slow  # type: ignore[method-assign]
    with pytest.raises(Exception, match="no longer ours"):
        room.push(fake, holder=Holder("this host", 1, "y"), settings=PushSettings(lease_s=60.0))
    assert not fake.writes


# --- rollbacks between rollbacks


def chain(room: Room, fake: FakeSystem, values: tuple[int, ...]) -> None:
    """A batch a day, each from what the one before has set."""
    stands = 100
    for n, value in enumerate(values):
        record(room.ledger, rows({"a": stands}, {"a": value}), f"B{n}", day=DAY + timedelta(days=n), as_of=room.clock())
        assert room.push(fake, f"B{n}").complete
        stands = value
        room.clock.sleep(60)


@pytest.mark.parametrize("first", [(), (1,), (1, 2), (0, 1), (2,)], ids=str)
def test_however_a_chain_of_days_is_taken_back_it_ends_where_it_began(room: Room, first: tuple[int, ...]) -> None:
    fake = room.system({"a": 100})
    chain(room, fake, (110, 120, 130))
    for n in first:
        back(room, fake, Batch(f"B{n}"))
    assert back(room, fake, Since(DAY)).complete and fake.value("a") == 100


def test_a_rollback_that_waits_is_finished_after_the_same_was_decided_and_taken_back_again(room: Room) -> None:
    fake = room.system({"a": 100})
    record(room.ledger, rows({"a": 100}, {"a": 120}), "X")
    room.push(fake, "X")
    fake.end("a", "missing")
    assert not back(room, fake, Batch("X")).complete
    again = record(room.ledger, rows({"a": 100}, {"a": 120}), "X")
    back(room, fake, Batch(again.batch_id))
    fake.end("a", "open")
    assert back(room, fake, Batch("X")).complete and fake.value("a") == 100


def test_what_an_older_batchs_rollback_restored_is_not_set_again_by_a_newer_ones(room: Room) -> None:
    """The newer one had decided the same value, and its write was lost."""
    fake = room.system({"a": 100})
    record(room.ledger, rows({"a": 100}, {"a": 120}), "X")
    room.push(fake, "X")
    room.clock.sleep(60)
    record(room.ledger, rows({"a": 120}, {"a": 100}), "T", day=DAY + timedelta(days=1), as_of=room.clock())
    fake.fault = lambda op, key: "unknown_lost" if op == "apply" else ""
    room.push(fake, "T", settings=PushSettings(patience_s=0.0, attempts=1, late_s=0.5))
    fake.fault = lambda op, key: ""
    for name in ("X", "T"):
        assert back(room, fake, Batch(name)).complete
    assert fake.value("a") == 100


def test_what_was_left_to_a_batch_that_had_nothing_to_send_goes_back_with_it(room: Room) -> None:
    fake = room.system({"a": 100})
    record(room.ledger, rows({"a": 100}, {"a": 120}), "X")
    room.push(fake, "X")
    record(room.ledger, rows({"a": 100}, {"a": 100}), "Y")
    again = record(room.ledger, rows({"a": 100}, {"a": 120}), "X")
    room.push(fake, again.batch_id)
    assert [one.entity for one in back(room, fake, Batch("X")).batches[0].left] == ["a"]
    report = back(room, fake, Batch(again.batch_id))
    assert report.complete and report.batches[0].restored == 1 and fake.value("a") == 100


@pytest.mark.parametrize("how", ["rolled back", "decided anew"])
def test_a_value_that_another_workflow_gave_back_is_ours_again(room: Room, how: str) -> None:
    fake = room.system({"a": 100})
    record(room.ledger, rows({"a": 100}, {"a": 120}), "X")
    room.push(fake, "X")
    room.clock.sleep(60)
    record(room.ledger, rows({"a": 120}, {"a": 90}), "theirs", workflow="prices", as_of=room.clock())
    room.push(fake, "theirs")
    room.clock.sleep(60)
    back(room, fake, Batch("theirs"))
    if how == "rolled back":
        assert back(room, fake, Batch("X")).complete
    else:
        record(room.ledger, rows({"a": 100}, {"a": 100}), "Y")
        assert room.push(fake, "Y").complete
    assert fake.value("a") == 100


def test_what_is_taken_back_counts_in_no_limit_of_the_total(room: Room) -> None:
    before = {"a": 100, "b": 100}
    fake = room.system(before)
    decided(room, before, {"a": 60, "b": 100}, "X", record={"limits": {"max_total_change": 0.2}})
    room.push(fake, "X")
    decided(room, before, {"a": 100, "b": 105}, "Y", record={"limits": {"max_total_change": 0.2}})
    assert room.push(fake, "Y").counts == {"ACKED": 2} and (fake.value("a"), fake.value("b")) == (100, 105)


def test_a_batch_that_its_limits_left_out_as_a_whole_can_be_decided_again(room: Room) -> None:
    fake = room.system({"a": 100})
    record(room.ledger, rows({"a": 100}, {"a": 50}), "late")
    room.push(fake, "late")
    said = {"day": DAY + timedelta(days=1), "record": {"limits": {"max_change": 0.5}}}
    decided(room, {"a": 100}, {"a": 120}, "next", **said)
    assert room.push(fake, "next").counts == {"SKIPPED": 1}
    assert decided(room, {"a": 100}, {"a": 120}, "next", **said).batch_id == "next.2"


@pytest.mark.parametrize("cut", [False, True])
def test_a_push_that_broke_off_is_judged_as_a_whole_one(room: Room, cut: bool) -> None:
    fake, stop = room.system({"p": 100, "q": 100}), threading.Event()
    record(room.ledger, rows({"p": 100, "q": 100}, {"p": 110, "q": 90}), "late")
    room.push(fake, "late")
    limits = {"limits": {"max_total_change": 0.2}}
    decided(room, {"p": 100, "q": 100}, {"p": 130, "q": 110}, "next", day=DAY + timedelta(days=1), record=limits)
    one = PushSettings(concurrency=1, wave=1)
    room.push(fake, "next", settings=one, stop=stop, progress=lambda p: cut and p.done and stop.set())
    room.push(fake, "next", settings=one)
    assert (fake.value("p"), fake.value("q")) == (130, 110)


def test_what_a_system_made_of_an_earlier_write_of_the_day_is_listed_and_not_passed_over(room: Room) -> None:
    fake = room.system({"a": 100, "b": 50})
    record(room.ledger, rows({"a": 100, "b": 50}, {"a": 200, "b": 50}), "X")
    fake.fault = lambda op, key: "clamp" if (op, key) == ("apply", "a") else ""
    room.push(fake, "X")
    fake.fault = lambda op, key: ""
    record(room.ledger, rows({"a": 100, "b": 50}, {"a": 100, "b": 60}), "Y")
    assert [entity for entity, _ in room.push(fake, "Y").conflicts] == ["a"] and fake.value("a") == 160


def test_a_clock_that_was_behind_hides_no_value_of_the_same_day(room: Room) -> None:
    fake = room.system()
    record(room.ledger, rows({"a": 100, "b": 50}, {"a": 120, "b": 45}), "X")
    room.clock.jump(-7200)
    room.push(fake, "X")
    room.clock.jump(7200)
    record(room.ledger, rows({"a": 100, "b": 50}, {"a": 100, "b": 60}), "Y")
    assert room.push(fake, "Y").counts == {"ACKED": 2} and (fake.value("a"), fake.value("b")) == (100, 60)


def test_a_rollback_of_other_entities_ends_no_batch_of_the_same_day(room: Room) -> None:
    fake = room.system()
    record(room.ledger, rows({"a": 100}, {"a": 120}), "X")
    record(room.ledger, rows({"b": 50}, {"b": 60}), "Y")
    back(room, fake, Batch("X"))
    assert room.push(fake, "Y").complete and fake.value("b") == 60
