"""The push: each path of the state machine over an in-memory system, on time that only sleeping moves."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from delivery.connectors.base import Capabilities
from delivery.ledger import Busy, Fenced, Ledger, LedgerUnavailable
from delivery.push import (
    Blocked,
    NotApproved,
    Progress,
    PushError,
    PushSettings,
    Refused,
    Report,
    Stopped,
    dry_run,
    idempotency_key,
    push,
    resolve,
)  # fmt: skip
from tests.support.fakes import DAY, START, Clock, Crash, FakeSystem, Mortal, Process, dead_holder, record

CONDITION = Capabilities(conditional_write=True)
KEY = Capabilities(idempotency_key=True)
NEITHER = Capabilities()
HISTORY = Capabilities(change_history=True)
EVERY = pytest.mark.parametrize(
    "can", [CONDITION, KEY, NEITHER, HISTORY], ids=["condition", "key", "neither", "history"]
)
ROWS = [{"entity": "a", "before": 100, "after": 120}, {"entity": "b", "before": 50, "after": 40}]
QUICK = PushSettings(concurrency=4, patience_s=30, late_s=2.0)


class Room:
    """A ledger, a clock and a way to push."""

    def __init__(self, folder: Path, empty: Path) -> None:
        self.clock = Clock()
        shutil.copy(empty, folder / "ledger.db")
        self.ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=b"k" * 32, clock=self.clock)
        self.started = 0

    def system(self, values: Mapping[str, int | None] | None = None, **named: Any) -> FakeSystem:
        return FakeSystem({"a": 100, "b": 50} if values is None else values, clock=self.clock, **named)

    def push(self, fake: FakeSystem, batch_id: str = "b1", **named: Any) -> Report:
        self.started += 1
        fake.process = Process()
        named = {"settings": QUICK, "holder": dead_holder(self.started), "ledger": self.ledger, **named}
        ledger = Mortal(named.pop("ledger"), fake.process, named.pop("fault", lambda method: ""))
        return push(
            ledger, fake, batch_id, run_id="run-1", clock=self.clock, sleep=self.clock.sleep,  # type: ignore[arg-type]
            monotonic=self.clock.monotonic, rng=random.Random(1), **named,
        )  # fmt: skip

    def states(self, batch_id: str = "b1") -> dict[str, str]:
        return {str(d.entity): d.state for d in self.ledger.deliveries(batch_id)}

    def says(self, entity: str, batch_id: str = "b1") -> str:
        return next(d.says or "" for d in self.ledger.deliveries(batch_id) if d.entity == entity)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with its tables and nothing in them: making one takes longer than a push."""
    path = tmp_path_factory.mktemp("empty") / "ledger.db"
    Ledger.open(f"sqlite:///{path}", key=b"k" * 32).close()
    return path


@pytest.fixture
def room(tmp_path: Path, empty: Path) -> Iterator[Room]:
    room = Room(tmp_path, empty)
    yield room
    verdict = room.ledger.verify()
    room.ledger.close()
    assert verdict.ok, verdict.problems


def once(fault: str, key: str = "a", op: str = "apply", times: int = 1) -> Any:
    """A fault that happens the first times only."""
    left = [times]

    def say(what: str, which: str) -> str:
        if (what, which) == (op, key) and left[0] > 0:
            left[0] -= 1
            return fault
        return ""

    return say


def always(fault: str, key: str | None = "a", op: str = "apply") -> Any:
    return lambda what, which: fault if what == op and key in (None, which) else ""


# --- the plain way


@EVERY
def test_a_batch_is_sent_once_and_proven_by_read_back(room: Room, can: Capabilities) -> None:
    fake = room.system(can=can)
    record(room.ledger, ROWS)
    report = room.push(fake)
    assert report.complete and report.counts == {"ACKED": 2} and report.sends == 2 and report.repeats == 0
    assert (fake.value("a"), fake.value("b")) == (120, 40)
    assert set(fake.counts.values()) == {1}
    assert report.guarantee == can.guarantee and report.window_max_ms is not None
    for delivery in room.ledger.deliveries("b1"):
        assert delivery.prior == delivery.before and delivery.observed == delivery.sent == delivery.after
        assert delivery.verified_at is not None and delivery.attempts == 1
    again = room.push(fake)
    assert again.complete and again.counts == {"ACKED": 2} and len(fake.writes) == 2


def test_every_write_carries_its_run_batch_decision_and_a_key_that_follows_from_them(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS)
    room.push(fake)
    write = next(w for w in fake.writes if w.key == "a")
    assert (write.run_id, write.batch_id, write.decision_id, write.expected) == ("run-1", "b1", "b1-0", 100)
    assert write.idempotency_key == idempotency_key("b1", "a", 120)
    assert room.ledger.attempts("b1")[0].idempotency_key == write.idempotency_key


def test_only_what_differs_is_sent(room: Room) -> None:
    fake = room.system({"a": 120, "b": 50})
    record(room.ledger, ROWS)
    report = room.push(fake)
    assert report.sends == 1 and report.counts == {"ACKED": 2}
    assert [w.key for w in fake.writes] == ["b"]


def test_bulk_systems_are_asked_in_bulk_and_failures_are_handled_row_by_row(room: Room) -> None:
    values = {f"e{n}": 100 for n in range(25)}
    fake = room.system(values, can=Capabilities(conditional_write=True, bulk_read=10, bulk_write=10))
    record(room.ledger, [{"entity": key, "before": 100, "after": 110} for key in values])
    fake.fault = lambda op, key: {"e3": "refuse", "e7": "ignore"}.get(key, "") if op == "apply" else ""  # type: ignore[assignment]
    report = room.push(fake)
    assert report.complete and report.counts == {"ACKED": 23, "REJECTED": 2}
    assert fake.calls["apply"] < 3 + QUICK.attempts
    assert dict(report.dead_letters)["e3"] == "not allowed: too large"
    assert "still shows 100" in dict(report.dead_letters)["e7"]


def test_progress_counts_up_to_the_whole(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS)
    seen: list[Progress] = []
    room.push(fake, settings=PushSettings(wave=1), progress=seen.append)
    assert [p.done for p in seen] == [1, 2] and seen[-1].total == 2 and seen[-1].counts == {"ACKED": 2}


# --- what the system makes of it


@EVERY
def test_a_yes_that_changes_nothing_is_never_believed(room: Room, can: Capabilities) -> None:
    fake = room.system(can=can)
    fake.fault = always("ignore")
    record(room.ledger, ROWS)
    report = room.push(fake)
    assert report.complete and room.states() == {"a": "REJECTED", "b": "ACKED"}
    assert "answered yes 5 times and still shows 100 (it said: fine)" in room.says("a")
    assert report.repeats == (0 if can in (CONDITION, KEY) else 4)


@EVERY
def test_a_clamped_value_is_rejected_with_what_was_stored(room: Room, can: Capabilities) -> None:
    fake = room.system(can=can)
    fake.fault = always("clamp")
    record(room.ledger, ROWS)
    assert room.push(fake).complete and room.states()["a"] == "REJECTED"
    assert "stored 96 instead of 120" in room.says("a")
    assert next(d.observed for d in room.ledger.deliveries("b1") if d.entity == "a") == 96


@EVERY
def test_a_refusal_is_a_dead_letter_in_the_systems_own_words(room: Room, can: Capabilities) -> None:
    fake = room.system(can=can)
    fake.fault = always("refuse")
    record(room.ledger, ROWS)
    report = room.push(fake)
    assert report.complete and report.dead_letters == (("a", "not allowed: too large"),) and len(fake.writes) == 2


@EVERY
@pytest.mark.parametrize("fault", ["unknown_applied", "unknown_lost", "late"])
def test_a_write_without_an_answer_is_resolved_by_reading(room: Room, can: Capabilities, fault: str) -> None:
    fake = room.system(can=can)
    fake.fault = once(fault)
    record(room.ledger, ROWS)
    report = room.push(fake)
    fake.settle()
    assert report.complete and report.counts == {"ACKED": 2} and fake.value("a") == 120
    assert fake.counts["a", 120] == 1, "waited for the late one, or it failed its condition, or its key was known"
    assert report.repeats == (1 if can in (NEITHER, HISTORY) and fault == "unknown_lost" else 0)


@EVERY
def test_what_never_gets_an_answer_is_left_open_and_goes_on_later(room: Room, can: Capabilities) -> None:
    fake = room.system(can=can)
    fake.fault = always("unknown_lost", key=None)
    record(room.ledger, ROWS)
    report = room.push(fake)
    assert not report.complete and "run it again" in report.why
    assert set(room.states().values()) <= {"UNKNOWN", "PENDING"}
    fake.fault = always("")
    assert room.push(fake).counts == {"ACKED": 2}
    assert set(fake.counts.values()) == {1}


def test_one_that_never_gets_an_answer_while_others_do_is_given_up(room: Room) -> None:
    fake = room.system()
    fake.fault = always("unknown_lost")
    record(room.ledger, ROWS)
    report = room.push(fake, settings=PushSettings(concurrency=1))
    assert report.complete and room.states() == {"a": "REJECTED", "b": "ACKED"}
    assert "no answer to 5 writes while others got one" in room.says("a")


@EVERY
def test_a_system_that_says_not_now_is_tried_again_and_left_open_when_patience_is_over(
    room: Room, can: Capabilities
) -> None:
    fake = room.system(can=can)
    fake.fault = once("not_applied", times=3)
    record(room.ledger, ROWS)
    assert room.push(fake).counts == {"ACKED": 2}
    record(room.ledger, [{"entity": "a", "before": 120, "after": 130}], "b2", day=DAY + timedelta(days=1))
    fake.fault = always("not_applied")
    before = room.clock.monotonic()
    report = room.push(fake, "b2")
    assert not report.complete and room.states("b2") == {"a": "PENDING"} and "not now" in report.why
    assert room.clock.monotonic() - before < 60


def test_retry_after_is_kept(room: Room) -> None:
    fake = room.system()
    fake.fault = once("slow_down")
    record(room.ledger, ROWS)
    times: list[float] = []
    fake.before_write = lambda key: times.append(room.clock.monotonic())
    assert room.push(fake, settings=PushSettings(concurrency=1)).counts == {"ACKED": 2}
    assert times[1] - times[0] >= 3.0, "nobody is called before it is over, the other entity neither"


def test_a_longer_retry_after_than_patience_ends_the_push_at_once(room: Room) -> None:
    fake = room.system()
    fake.fault = always("slow_down", key=None)
    record(room.ledger, ROWS)
    before = room.clock.monotonic()
    report = room.push(fake, settings=PushSettings(patience_s=2))
    assert not report.complete and room.clock.monotonic() - before < 2 and set(room.states().values()) == {"PENDING"}


def test_a_system_that_is_down_is_left_alone_and_probed(room: Room) -> None:
    values = {f"e{n}": 1 for n in range(40)}
    fake = room.system(values)
    fake.fault = lambda op, key: "unavailable" if room.clock.monotonic() < 1040.0 else ""  # type: ignore[assignment]
    record(room.ledger, [{"entity": key, "before": 1, "after": 2} for key in values])
    report = room.push(fake, settings=PushSettings(breaker_failures=5, breaker_cooldown_s=10, patience_s=120))
    assert report.counts == {"ACKED": 40}
    assert fake.calls["read"] - 80 < 5 + 8 + 5, "a few until it opens, then one probe every ten seconds"


def test_a_breaker_that_stays_open_ends_the_push_and_leaves_it_resumable(room: Room) -> None:
    fake = room.system()
    fake.fault = always("unavailable", key=None, op="read")
    record(room.ledger, ROWS)
    report = room.push(fake, settings=PushSettings(breaker_failures=2, breaker_cooldown_s=5, patience_s=20))
    assert not report.complete and "fake has not answered for" in report.why
    fake.fault = always("")
    assert room.push(fake).counts == {"ACKED": 2}


def test_stale_reads_are_waited_out(room: Room) -> None:
    fake = room.system(can=Capabilities(conditional_write=False, stale_reads_s=5.0))
    record(room.ledger, ROWS)
    report = room.push(fake)
    assert report.counts == {"ACKED": 2} and report.sends == 2 and report.repeats == 0
    fake.fault = always("ignore")
    record(room.ledger, [{"entity": "a", "before": 120, "after": 100}], "b2", day=DAY + timedelta(days=1))
    # Right after the first batch a stale read still shows 100: it proves nothing.
    report = room.push(fake, "b2", settings=PushSettings(attempts=2))
    assert report.counts == {"REJECTED": 1} and fake.value("a") == 120
    assert "5 s later still shows 120" in room.says("a", "b2")


def test_an_entity_that_the_system_leaves_out_of_its_answer_is_not_taken_for_missing(room: Room) -> None:
    fake = room.system(can=Capabilities(conditional_write=True, bulk_read=10))
    fake.fault = once("left_out", op="read", times=3)
    record(room.ledger, ROWS)
    assert room.push(fake).counts == {"ACKED": 2}


@pytest.mark.parametrize("kind", ["decision", "rollback"])
def test_what_is_closed_or_gone_ends_as_such(room: Room, kind: Any) -> None:
    fake = room.system({"a": 100, "b": 50, "c": 10})
    fake.end("a", "closed")
    fake.end("b", "missing")
    record(room.ledger, [*ROWS, {"entity": "c", "before": 10, "after": 11}], kind=kind)
    assert room.push(fake).complete == (kind == "decision"), "what a rollback does not find is no end"
    states = {"a": "SKIPPED", "b": "REJECTED", "c": "ACKED"}
    assert room.states() == (states if kind == "decision" else {"a": "NOT_REVERSIBLE", "b": "PENDING", "c": "ACKED"})


BULK = Capabilities(conditional_write=True, bulk_read=10, bulk_write=10)
STALE = Capabilities(stale_reads_s=2.0)
PATHS = pytest.mark.parametrize(
    ("can", "pooled"),
    [(CONDITION, False), (BULK, False), (STALE, False), (CONDITION, True), (BULK, True)],
    ids=["one by one", "bulk", "stale reads", "pool", "pool and bulk"],
)


def of_many(room: Room, can: Capabilities, pooled: bool, kind: Any = "decision") -> FakeSystem:
    """Six entities in two waves of three, half of them going down and half up."""
    names = "abcdef"
    pools = {"champion": 600} if pooled else None
    fake = room.system(
        dict.fromkeys(names, 100), can=can, arms=dict.fromkeys(names, "champion") if pooled else None, pools=pools
    )
    rows = [{"entity": e, "before": 100, "after": 90 if n % 2 else 110, "gain": 1.0} for n, e in enumerate(names)]
    record(room.ledger, rows, kind=kind, pools=pools)
    return fake


@PATHS
@pytest.mark.parametrize("kind", ["decision", "rollback"])
def test_where_nothing_at_all_is_there_the_push_stops_and_everything_stays_open(
    room: Room, can: Capabilities, pooled: bool, kind: Any
) -> None:
    fake = of_many(room, can, pooled, kind)
    for name in "abcdef":
        fake.end(name, "missing")
    report = room.push(fake, settings=QUICK.model_copy(update={"wave": 3}))
    assert not report.complete and "is the address of fake right" in report.why and "account" in report.why
    assert set(room.states().values()) == {"PENDING"} and not fake.writes
    for name in "abcdef":
        fake.end(name, "open")
    assert room.push(fake).counts == {"ACKED": 6}


@PATHS
def test_one_that_is_missing_among_others_is_a_dead_letter_and_the_rest_goes_out(
    room: Room, can: Capabilities, pooled: bool
) -> None:
    fake = of_many(room, can, pooled)
    fake.end("b", "missing")
    report = room.push(fake, settings=QUICK.model_copy(update={"wave": 3}))
    assert report.complete and report.counts == {"REJECTED": 1, "ACKED": 5}
    assert "is not there downstream" in room.says("b")


@pytest.mark.parametrize("can", [BULK, STALE], ids=["bulk", "stale reads"])
def test_several_that_are_missing_among_others_are_dead_letters_although_a_wave_may_hold_only_them(
    room: Room, can: Capabilities
) -> None:
    fake = of_many(room, can, False)
    for name in "abc":
        fake.end(name, "missing")
    report = room.push(fake, settings=QUICK.model_copy(update={"wave": 3 if can is BULK else 6}))
    assert report.complete and report.counts == {"REJECTED": 3, "ACKED": 3}


def test_a_wave_of_which_nothing_is_there_any_more_stops_a_push_that_had_begun_well(room: Room) -> None:
    fake = of_many(room, CONDITION, False)
    fake.before_write = lambda key: [fake.end(name, "missing") for name in "def"] and None
    report = room.push(fake, settings=QUICK.model_copy(update={"wave": 3}))
    assert report.counts == {"ACKED": 3, "PENDING": 3} and "is the address of fake right" in report.why


def test_a_dry_run_says_that_nothing_is_there(room: Room) -> None:
    fake = of_many(room, CONDITION, False)
    for name in "abcdef":
        fake.end(name, "missing")
    notes = dry_run(
        room.ledger, fake, "b1", clock=room.clock, sleep=room.clock.sleep, monotonic=room.clock.monotonic
    ).notes
    assert any("is the address of fake right" in note for note in notes)


def test_what_a_rollback_cannot_find_still_holds_its_money(room: Room) -> None:
    """A token that may not see one line: what it holds is not shared out to the others."""
    arms = dict.fromkeys("abc", "champion")
    fake = room.system({"a": 800, "b": 100, "c": 100}, can=BULK, arms=arms, pools={"champion": 1000})
    rows = [
        {"entity": "a", "before": 800, "after": 100, "gain": 1.0}, {"entity": "b", "before": 100, "after": 450, "gain": 1.0},
        {"entity": "c", "before": 100, "after": 450, "gain": 1.0},
    ]  # fmt: skip
    record(room.ledger, rows, kind="rollback", pools={"champion": 1000})
    fake.end("a", "missing")
    report = room.push(fake)
    assert not report.complete and (fake.value("b"), fake.value("c")) == (100, 100)
    fake.end("a", "open")
    assert room.push(fake).counts == {"ACKED": 3} and not [over for _, over in fake.overs if over > 0]


def test_a_value_that_is_no_number_is_somebody_elses(room: Room) -> None:
    fake = room.system({"a": None, "b": 50})
    record(room.ledger, ROWS)
    room.push(fake)
    assert room.states() == {"a": "CONFLICT", "b": "ACKED"} and "something else" in room.says("a")


def test_a_first_value_is_written_where_none_was_expected(room: Room) -> None:
    fake = room.system({"a": None})
    record(room.ledger, [{"entity": "a", "before": None, "after": 5}])
    assert room.push(fake).counts == {"ACKED": 1} and fake.value("a") == 5


def test_a_bug_in_a_connector_is_not_swallowed_and_loses_nothing(room: Room) -> None:
    fake = room.system()
    fake.fault = once("broken")
    record(room.ledger, ROWS)
    with pytest.raises(ZeroDivisionError):
        room.push(fake)
    assert room.states()["a"] == "UNKNOWN"
    assert room.push(fake).counts == {"ACKED": 2} and fake.counts["a", 120] == 1


# --- people


@EVERY
def test_a_value_changed_before_the_push_is_left(room: Room, can: Capabilities) -> None:
    fake = room.system(can=can)
    fake.person("a", 77)
    record(room.ledger, ROWS)
    report = room.push(fake)
    assert room.states() == {"a": "CONFLICT", "b": "ACKED"} and fake.value("a") == 77
    assert report.conflicts == (("a", "shows 77 where 100 was expected"),)
    (found,) = room.ledger.conflicts("b1")
    assert (found.expected, found.found, found.sent) == (100, 77, None)


def test_a_change_between_reading_and_writing_meets_the_condition(room: Room) -> None:
    fake = room.system()
    fake.before_write = lambda key: fake.person("a", 77) if key == "a" and fake.value("a") == 100 else None
    record(room.ledger, ROWS)
    room.push(fake)
    assert room.states()["a"] == "CONFLICT" and fake.value("a") == 77 and not fake.lost


def test_an_overwrite_is_found_in_the_change_history(room: Room) -> None:
    fake = room.system(can=HISTORY)
    fake.before_write = lambda key: fake.person("a", 77) if key == "a" else None
    record(room.ledger, ROWS)
    report = room.push(fake)
    assert room.states() == {"a": "OVERWRITTEN", "b": "ACKED"} and len(fake.lost) == 1
    assert report.overwritten == (("a", "anna set 77 between our reading and our write"),)
    (found,) = room.ledger.conflicts("b1")
    assert (found.state, found.found, found.sent) == ("OVERWRITTEN", 77, 120)


def test_an_overwrite_is_found_after_a_crash_too(room: Room) -> None:
    fake = room.system(can=HISTORY)
    fake.before_write = lambda key: fake.person("a", 77) if key == "a" else None
    fake.fault = once("crash_after")
    record(room.ledger, ROWS)
    with pytest.raises(Crash):
        room.push(fake)
    room.push(fake)
    assert room.states()["a"] == "OVERWRITTEN"


def test_nothing_is_proven_while_the_history_cannot_be_read(room: Room) -> None:
    fake = room.system(can=HISTORY)
    fake.fault = always("unavailable", op="history")
    record(room.ledger, ROWS)
    assert not room.push(fake).complete and room.states()["a"] == "UNKNOWN"
    fake.fault = always("")
    assert room.push(fake).counts == {"ACKED": 2} and set(fake.counts.values()) == {1}


def test_another_field_changed_meanwhile_is_no_conflict(room: Room) -> None:
    fake = room.system()
    touched: list[str] = []

    def touch(key: str) -> None:
        if len(touched) < 2:
            touched.append(key)
            fake.touch(key)

    fake.before_write = touch
    record(room.ledger, ROWS[:1])
    assert room.push(fake).counts == {"ACKED": 1} and fake.value("a") == 120


def test_a_conflict_that_never_ends_is_one(room: Room) -> None:
    fake = room.system()
    fake.fault = always("conflict")
    record(room.ledger, ROWS)
    assert room.push(fake).complete and room.states()["a"] == "CONFLICT"


@pytest.mark.parametrize("can", [CONDITION, HISTORY], ids=["condition", "history"])
def test_a_change_after_our_write_wins_also_when_it_sets_the_old_value_back(room: Room, can: Capabilities) -> None:
    for value in (77, 100):
        fake = room.system(can=can)
        changed: list[str] = []

        def then(op: str, key: str, fake: FakeSystem = fake, changed: list[str] = changed, value: int = value) -> Any:
            if op == "read" and fake.value("a") == 120 and not changed:
                changed.append(key)
                fake.person("a", value)
            return ""

        fake.fault = then
        record(room.ledger, ROWS[:1], f"b{value}", day=DAY + timedelta(days=value))
        room.push(fake, f"b{value}")
        assert room.states(f"b{value}") == {"a": "CONFLICT"} and fake.value("a") == value and len(fake.writes) == 1


def test_a_late_write_of_ours_fails_its_condition_after_a_person_has_changed_the_value(room: Room) -> None:
    fake = room.system()
    fake.fault = once("late")
    fake.late_s = 60
    record(room.ledger, ROWS[:1])
    fake.before_write = lambda key: None
    with pytest.raises(Crash):
        room.push(fake, fault=lambda method: "crash_before" if method == "settle" else "")
    fake.person("a", 77)
    fake.settle()
    room.push(fake)
    assert room.states() == {"a": "CONFLICT"} and fake.value("a") == 77


def test_an_own_later_write_is_what_is_expected(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS)
    room.push(fake)
    # Decided from an export of before the first push: it did not know of 120 yet.
    record(room.ledger, [{"entity": "a", "before": 100, "after": 90}], "b2", day=DAY + timedelta(days=1))
    assert room.push(fake, "b2").counts == {"ACKED": 1} and fake.value("a") == 90


# --- who may send what


def test_a_refused_batch_is_never_sent(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS, status="REFUSED")
    with pytest.raises(Refused, match="decide the day again"):
        room.push(fake)
    assert not fake.calls


def test_a_held_batch_waits_for_a_valid_approval(room: Room) -> None:
    fake = room.system()
    batch = record(room.ledger, ROWS, status="HELD")
    for name in ("zoe", "max"):
        room.ledger.set_approver(name, "a hash")
    with pytest.raises(NotApproved, match="held"):
        room.push(fake)
    now = room.clock()
    room.ledger.approve("b1", batch.digest, "zoe", "looks right", now, now + timedelta(hours=1))
    with pytest.raises(NotApproved):
        room.push(fake, settings=PushSettings(four_eyes=True))
    room.clock.jump(3700)
    with pytest.raises(NotApproved):
        room.push(fake)
    assert not fake.calls
    now = room.clock()
    for name in ("zoe", "max"):
        room.ledger.approve("b1", batch.digest, name, "still right", now, now + timedelta(hours=1))
    assert room.push(fake, settings=PushSettings(four_eyes=True)).complete


def test_a_stopped_workflow_sends_nothing_but_a_persons_rollback(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS)
    record(room.ledger, ROWS, "r1", kind="rollback")
    room.ledger.switch("ad_budget", True, "zoe", "prices are wrong")
    with pytest.raises(Stopped, match=r"stopped by zoe \(prices are wrong\): signalbox resume ad_budget"):
        room.push(fake)
    with pytest.raises(Stopped):
        room.push(fake, "r1")
    assert not fake.calls
    assert room.push(fake, "r1", by_person=True).complete


def test_a_switch_thrown_in_mid_push_ends_it_before_the_next_wave(room: Room) -> None:
    values = {f"e{n}": 1 for n in range(30)}
    fake = room.system(values)
    record(room.ledger, [{"entity": key, "before": 1, "after": 2} for key in values])

    def throw(progress: Progress) -> None:
        if progress.done >= 10 and room.ledger.stopped("ad_budget") is None:
            room.ledger.switch("ad_budget", True, "zoe", "enough")

    report = room.push(fake, settings=PushSettings(wave=5), progress=throw)
    assert not report.complete and "stopped by zoe" in report.why and len(fake.writes) == 10
    assert report.counts == {"ACKED": 10, "PENDING": 20}
    room.ledger.switch("ad_budget", False, "zoe", "again")
    assert room.push(fake).counts == {"ACKED": 30} and set(fake.counts.values()) == {1}


def test_asked_to_stop_it_ends_and_can_go_on(room: Room) -> None:
    values = {f"e{n}": 1 for n in range(30)}
    fake = room.system(values)
    record(room.ledger, [{"entity": key, "before": 1, "after": 2} for key in values])
    stop = threading.Event()
    report = room.push(fake, settings=PushSettings(wave=5), stop=stop, progress=lambda p: stop.set())
    assert not report.complete and "run it again" in report.why and len(fake.writes) == 5
    assert room.push(fake).counts == {"ACKED": 30}


def test_ctrl_c_leaves_a_state_that_goes_on(room: Room) -> None:
    values = {f"e{n}": 1 for n in range(30)}
    fake = room.system(values)
    record(room.ledger, [{"entity": key, "before": 1, "after": 2} for key in values])

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        room.push(fake, settings=PushSettings(wave=5), progress=interrupt, holder=None)
    assert room.push(fake, holder=None).counts == {"ACKED": 30}, "the lease was given back by the same live process"
    assert set(fake.counts.values()) == {1}


def test_another_push_has_the_system(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS)
    lease = room.ledger.lease("fake")
    with pytest.raises(Busy, match="fake is being written to by process"):
        room.push(fake, holder=None)
    assert not fake.calls
    room.ledger.release(lease)
    assert room.push(fake, holder=None).complete


def test_who_loses_the_lease_sends_nothing_more(room: Room) -> None:
    values = {f"e{n}": 1 for n in range(30)}
    fake = room.system(values)
    record(room.ledger, [{"entity": key, "before": 1, "after": 2} for key in values])

    def rob(progress: Progress) -> None:
        if progress.done == 5:
            room.ledger.lease("fake", dead_holder(99))

    with pytest.raises(Fenced, match="no longer ours"):
        room.push(fake, settings=PushSettings(wave=5), progress=rob)
    assert len(fake.writes) == 5
    assert room.push(fake).counts == {"ACKED": 30} and set(fake.counts.values()) == {1}


def test_who_slept_through_its_lease_writes_nothing(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS)
    slept: list[str] = []

    def sleep(op: str, key: str) -> Any:
        if op == "read" and not slept:
            slept.append(key)
            room.clock.sleep(3600)  # a laptop's lid, between the reading and the write
            room.ledger.lease("fake", dead_holder(99))
        return ""

    fake.fault = sleep
    with pytest.raises(Fenced):
        room.push(fake, settings=PushSettings(concurrency=1))
    assert not fake.writes
    assert room.push(fake).counts == {"ACKED": 2}


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_a_clock_that_jumps_disturbs_nothing(room: Room, seconds: int) -> None:
    values = {f"e{n}": 1 for n in range(20)}
    fake = room.system(values, can=Capabilities(stale_reads_s=2.0))
    record(room.ledger, [{"entity": key, "before": 1, "after": 2} for key in values])
    before = room.clock.monotonic()
    report = room.push(fake, settings=PushSettings(wave=5), progress=lambda p: room.clock.jump(seconds))
    assert report.counts == {"ACKED": 20} and set(fake.counts.values()) == {1}
    assert room.clock.monotonic() - before < 60


@pytest.mark.parametrize("method", ["begin", "settle"])
def test_a_full_disk_ends_in_a_clear_error_and_goes_on(room: Room, method: str) -> None:
    fake = room.system()
    record(room.ledger, ROWS)

    def full(name: str) -> Any:
        if name == method:
            raise LedgerUnavailable("the disk is full; nothing was half written; run it again")
        return ""

    with pytest.raises(LedgerUnavailable, match="disk is full"):
        room.push(fake, fault=full)
    assert room.push(fake).counts == {"ACKED": 2} and set(fake.counts.values()) == {1}


# --- older and newer batches


def test_an_older_batch_is_never_sent_after_a_newer_one(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS, "old")
    record(room.ledger, [{"entity": "a", "before": 100, "after": 130}], "new", day=DAY + timedelta(days=1))
    assert room.push(fake, "new").complete
    report = room.push(fake, "old")
    assert report.complete and room.states("old") == {"a": "SKIPPED", "b": "SKIPPED"} and fake.value("a") == 130
    assert room.ledger.batch("old").superseded_by == "new"


def test_the_same_day_decided_again_wins_over_the_first(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS, "first")
    record(room.ledger, ROWS, "again")
    assert room.push(fake, "again").complete
    assert room.push(fake, "first").counts == {"SKIPPED": 2}


@pytest.mark.parametrize("fault", ["crash_before", "crash_after"])
def test_a_newer_batch_first_finds_out_what_an_older_one_left_open(room: Room, fault: str) -> None:
    fake = room.system()
    fake.fault = once(fault)
    record(room.ledger, ROWS, "old")
    with pytest.raises(Crash):
        room.push(fake, "old", settings=PushSettings(concurrency=1))
    record(room.ledger, [{"entity": "a", "before": 100, "after": 130}], "new", day=DAY + timedelta(days=1))
    report = room.push(fake, "new")
    assert report.counts == {"ACKED": 1} and fake.value("a") == 130
    assert room.states("old")["a"] == ("ACKED" if fault == "crash_after" else "SKIPPED")
    assert room.ledger.batch("old").delivery == "COMPLETE"


@pytest.mark.parametrize("when", ["supersede", "settle", "close_push"])
def test_a_push_that_dies_while_it_ends_an_older_one_leaves_a_ledger_that_verifies(room: Room, when: str) -> None:
    fake = room.system()
    fake.fault = once("crash_after")
    record(room.ledger, ROWS, "old")
    with pytest.raises(Crash):
        room.push(fake, "old", settings=PushSettings(concurrency=1))
    record(room.ledger, [{"entity": "a", "before": 100, "after": 130}], "new", day=DAY + timedelta(days=1))
    with pytest.raises(Crash):
        room.push(fake, "new", fault=lambda method: "crash_after" if method == when else "")
    assert room.ledger.verify().problems == []
    assert room.push(fake, "new").complete and room.ledger.verify().ok
    assert room.ledger.batch("old").delivery == "COMPLETE"


def test_a_rollback_that_is_not_complete_comes_before_new_decisions(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS, "r1", kind="rollback")
    fake.fault = always("not_applied")
    assert not room.push(fake, "r1").complete
    record(room.ledger, ROWS, "b2", day=DAY + timedelta(days=1))
    with pytest.raises(Blocked, match="rollback r1"):
        room.push(fake, "b2")
    fake.fault = always("")
    assert room.push(fake, "r1").complete and room.push(fake, "b2").complete


def test_a_rollback_leaves_what_a_newer_batch_has_set(room: Room) -> None:
    fake = room.system()
    record(room.ledger, ROWS, "b1")
    room.push(fake, "b1")
    record(
        room.ledger,
        [{"entity": "a", "before": 120, "after": 100}, {"entity": "b", "before": 40, "after": 50}],
        "r1", kind="rollback", reverses="b1", as_of=room.clock(),
    )  # fmt: skip
    record(room.ledger, [{"entity": "a", "before": 120, "after": 130}], "b2", day=DAY + timedelta(days=1))
    room.clock.sleep(1)
    room.push(fake, "b2")
    room.push(fake, "r1")
    assert room.states("r1") == {"a": "SKIPPED", "b": "ACKED"} and (fake.value("a"), fake.value("b")) == (130, 50)
    assert "b2, which is newer" in room.says("a", "r1")


def test_a_batch_can_be_ended_without_sending(room: Room) -> None:
    fake = room.system()
    fake.fault = once("crash_after", key="a")
    record(room.ledger, ROWS)
    with pytest.raises(Crash):
        room.push(fake, settings=PushSettings(concurrency=1))
    written = len(fake.writes)
    fake.process = Process()
    report = resolve(
        room.ledger, fake, "b1", by="rolled back before it was sent", clock=room.clock, sleep=room.clock.sleep,
        monotonic=room.clock.monotonic,
    )  # fmt: skip
    assert report.complete and room.states()["a"] == "ACKED" and len(fake.writes) == written
    assert set(room.states().values()) <= {"ACKED", "SKIPPED"}


# --- crashes


@EVERY
@pytest.mark.parametrize("place", ["begin", "settle", "open_push", "close_push", "acknowledged", "release"])
@pytest.mark.parametrize("fault", ["crash_before", "crash_after"])
def test_killed_around_any_call_of_the_ledger_it_goes_on(room: Room, can: Capabilities, place: str, fault: str) -> None:
    fake = room.system(can=can)
    record(room.ledger, ROWS)
    with pytest.raises(Crash):
        room.push(fake, fault=lambda method: fault if method == place else "")
    assert room.push(fake).counts == {"ACKED": 2}
    assert set(fake.counts.values()) == {1} and (fake.value("a"), fake.value("b")) == (120, 40)


@EVERY
@pytest.mark.parametrize("fault", ["crash_before", "crash_after"])
def test_killed_around_a_write_it_goes_on(room: Room, can: Capabilities, fault: str) -> None:
    fake = room.system(can=can)
    fake.fault = once(fault)
    record(room.ledger, ROWS)
    with pytest.raises(Crash):
        room.push(fake)
    assert room.states()["a"] == "IN_FLIGHT"
    before = room.clock.monotonic()
    report = room.push(fake)
    assert report.counts == {"ACKED": 2} and set(fake.counts.values()) == {1}
    if can in (NEITHER, HISTORY) and fault == "crash_before":
        assert room.clock.monotonic() - before >= QUICK.late_s, "it might still have arrived"


# --- targets and money


def test_entities_that_share_a_target_are_sent_once_or_not_at_all(room: Room) -> None:
    for bulk in (1, 10):
        values = {"a": 100, "b": 100, "c": 7, "d": 7, "e": 1}
        targets = {"a": "ab", "b": "ab", "c": "cd", "d": "cd"}
        fake = room.system(
            values, targets=targets, can=Capabilities(conditional_write=True, bulk_read=bulk), system=f"fake {bulk}"
        )
        rows = [
            {"entity": "a", "before": 100, "after": 120}, {"entity": "b", "before": 100, "after": 120},
            {"entity": "c", "before": 7, "after": 8}, {"entity": "d", "before": 7, "after": 9},
            {"entity": "e", "before": 1, "after": 2},
        ]  # fmt: skip
        batch_id = f"b{bulk}"
        record(room.ledger, rows, batch_id, day=DAY + timedelta(days=bulk), workflow=f"w{bulk}")
        report = room.push(fake, batch_id, settings=PushSettings(concurrency=1))
        assert report.complete and fake.counts["ab", 120] == 1 and fake.counts["e", 2] == 1
        states = room.states(batch_id)
        assert states["a"] == states["b"] == states["e"] == "ACKED" and states["d"] == "REJECTED"
        if bulk > 1:
            assert states["c"] == "REJECTED" and fake.value("c") == 7
            assert room.says("c", batch_id) == "c (8) and d (9) share cd and want different values"


MONEY = [
    {"entity": "down", "before": 500, "after": 300, "arm": "x"},
    {"entity": "best", "before": 100, "after": 220, "arm": "x", "gain": 120.0},
    {"entity": "good", "before": 100, "after": 180, "arm": "x", "gain": 40.0},
    {"entity": "same", "before": 50, "after": 50, "arm": "x"},
    {"entity": "other", "before": 10, "after": 20, "arm": "y", "gain": 5.0},
    {"entity": "less", "before": 30, "after": 20, "arm": "y"},
]
POOLS = {"x": 750, "y": 40}


def money(room: Room, **named: Any) -> FakeSystem:
    fake = room.system(
        {str(r["entity"]): int(str(r["before"])) for r in MONEY},
        arms={str(r["entity"]): str(r["arm"]) for r in MONEY}, pools=POOLS,
        **{"can": Capabilities(bulk_read=10, bulk_write=2), **named},
    )  # fmt: skip
    record(room.ledger, MONEY, pools=POOLS)
    return fake


def test_decreases_are_proven_before_increases_go_out(room: Room) -> None:
    fake = money(room)
    report = room.push(fake)
    assert report.complete and report.counts == {"ACKED": 5} and not report.replanned
    assert {a.target for a in fake.applied[:2]} == {"down", "less"}
    assert max(over for _, over in fake.overs) <= 0 and fake.live("x") == 750


def test_when_a_decrease_fails_the_rest_is_replanned_by_gain(room: Room) -> None:
    fake = money(room)
    fake.person("down", 600)
    fake.person("down", 400)  # people left 100 for x, not 200
    report = room.push(fake)
    assert report.complete and room.states() == {
        "down": "CONFLICT", "best": "ACKED", "good": "SKIPPED", "other": "ACKED", "less": "ACKED",
    }  # fmt: skip
    assert fake.value("best") == 200 and report.replanned == (("best", 220, 200),)
    assert "no money left in the pool of arm x: 750 of 750 is held" in room.says("good") or "650" in room.says("good")
    assert fake.live("x") == 750
    sent = {d.entity: d.sent for d in room.ledger.deliveries("b1")}
    assert sent["best"] == 200


def test_nothing_is_raised_where_a_person_has_taken_the_money(room: Room) -> None:
    fake = money(room)
    fake.person("same", 500)
    report = room.push(fake)
    assert report.complete and room.states() == {
        "down": "ACKED", "best": "SKIPPED", "good": "SKIPPED", "other": "ACKED", "less": "ACKED",
    }  # fmt: skip


def test_while_a_decrease_is_unknown_its_money_is_not_spent(room: Room) -> None:
    fake = money(room)
    fake.fault = lambda op, key: "not_applied" if (op, key) == ("apply", "down") else ""  # type: ignore[assignment]
    report = room.push(fake)
    assert not report.complete and room.states() == {
        "down": "PENDING", "best": "PENDING", "good": "PENDING", "other": "ACKED", "less": "ACKED",
    }  # fmt: skip
    assert "wait for deliveries that are not settled" in report.why
    fake.fault = always("")
    assert room.push(fake).counts == {"ACKED": 5} and fake.live("x") == 750


def test_one_arm_that_waits_does_not_keep_another_from_its_share(room: Room) -> None:
    fake = money(room)
    fake.person("less", 29)
    fake.person("less", 25)  # y keeps 5 fewer than planned: other gets 15 more than nothing, in part
    fake.pools["y"] = 40
    fake.fault = lambda op, key: "not_applied" if (op, key) == ("apply", "down") else ""  # type: ignore[assignment]
    record(room.ledger, MONEY, "b2", pools={"x": 750, "y": 42}, day=DAY + timedelta(days=1))
    report = room.push(fake, "b2")
    assert not report.complete and room.states("b2")["other"] == "ACKED" and fake.value("other") == 17
    assert room.states("b2")["best"] == "PENDING" and "arm x wait" in report.why


def test_a_stopped_workflow_can_still_find_out_what_arrived(room: Room) -> None:
    fake = room.system()
    fake.fault = once("crash_after")
    record(room.ledger, ROWS)
    with pytest.raises(Crash):
        room.push(fake, settings=PushSettings(concurrency=1))
    room.ledger.switch("ad_budget", True, "zoe", "prices are wrong")
    fake.process = Process()
    report = resolve(
        room.ledger, fake, "b1", by="rolled back", clock=room.clock, sleep=room.clock.sleep, monotonic=room.clock.monotonic
    )  # fmt: skip
    assert report.complete and room.states()["a"] == "ACKED"


def test_a_late_increase_counts_until_it_is_ruled_out(room: Room) -> None:
    fake = money(room)
    fake.fault = once("late", key="best")
    fake.late_s = 1.5
    report = room.push(fake)
    fake.settle()
    assert report.counts == {"ACKED": 5} and max(over for _, over in fake.overs) <= 0


def test_an_increase_that_stays_unknown_keeps_its_money(room: Room) -> None:
    rows = [
        {"entity": "down", "before": 500, "after": 300, "arm": "x"},
        {"entity": "best", "before": 100, "after": 220, "arm": "x", "gain": 120.0},
        {"entity": "good", "before": 100, "after": 190, "arm": "x", "gain": 40.0},
    ]  # fmt: skip
    fake = room.system(
        {"down": 500, "best": 100, "good": 100}, arms=dict.fromkeys(("down", "best", "good"), "x"), pools={"x": 700},
        can=Capabilities(bulk_read=10),
    )  # fmt: skip
    record(room.ledger, rows, pools={"x": 700})
    fake.fault = always("unknown_lost", key="best")
    report = room.push(fake)
    assert not report.complete and room.states() == {"down": "ACKED", "best": "UNKNOWN", "good": "PENDING"}
    assert fake.value("good") == 100, "best may still arrive"


def test_no_increase_is_sent_while_a_holding_cannot_be_read(room: Room) -> None:
    fake = money(room)
    fake.person("same", None)
    report = room.push(fake)
    assert report.complete and room.states()["best"] == "SKIPPED" and room.states()["other"] == "ACKED"
    assert "what same holds cannot be read" in room.says("best")


def test_money_is_rounded_down_to_the_systems_unit(room: Room) -> None:
    fake = money(room)
    fake.person("down", 437)
    room.push(fake, settings=PushSettings(unit=10))
    assert fake.value("best") == 160 and fake.live("x") <= 750


def test_an_arm_without_a_pool_is_refused_before_anything_is_sent(room: Room) -> None:
    fake = room.system({"a": 100, "b": 50})
    record(room.ledger, ROWS, pools={"x": 1})
    with pytest.raises(PushError, match="champion, an arm without a pool"):
        room.push(fake)
    assert not fake.writes


def test_a_system_that_cannot_be_read_gets_no_increase(room: Room) -> None:
    fake = money(room)
    fake.fault = lambda op, key: "unavailable" if op == "read" and key == "same" else ""  # type: ignore[assignment]
    report = room.push(fake)
    assert (not report.complete and not fake.writes) or {w.key for w in fake.writes} <= {"down", "less"}
    fake.fault = always("")
    assert room.push(fake).counts == {"ACKED": 5}


# --- dry run


def test_a_dry_run_shows_the_exact_difference_and_touches_nothing(room: Room) -> None:
    fake = room.system(
        {"a": 100, "b": 50, "c": 10, "d": 4, "e": 9}, can=Capabilities(conditional_write=True, validate_only=True)
    )
    rows = [
        *ROWS, {"entity": "c", "before": 10, "after": 12}, {"entity": "d", "before": 3, "after": 4},
        {"entity": "e", "before": 1, "after": 2},
    ]  # fmt: skip
    record(room.ledger, rows, status="HELD")
    head = room.ledger.head()
    fake.fault = lambda op, key: "refuse" if (op, key) == ("validate", "c") else ""  # type: ignore[assignment]
    diff = dry_run(
        room.ledger, fake, "b1", clock=room.clock, sleep=room.clock.sleep, monotonic=room.clock.monotonic
    )  # fmt: skip
    assert [(r.entity, r.now, r.would, r.action) for r in diff.rows] == [
        ("a", 100, 120, "SEND"), ("b", 50, 40, "SEND"), ("c", 10, None, "REJECTED"), ("d", 4, None, "ACKED"),
        ("e", 9, None, "CONFLICT"),
    ]  # fmt: skip
    assert "held" in diff.notes[0] and not fake.writes and room.ledger.head() == head
    assert set(room.states().values()) == {"PENDING"}
    assert diff.as_dict()["rows"][0]["entity"] == "a"


def test_a_dry_run_shares_out_the_pools(room: Room) -> None:
    fake = money(room)
    fake.person("down", 437)
    diff = dry_run(room.ledger, fake, "b1", clock=room.clock, sleep=room.clock.sleep, monotonic=room.clock.monotonic)
    would = {r.entity: (r.action, r.would) for r in diff.rows}
    assert would["best"] == ("SEND", 163) and would["good"] == ("SKIPPED", None) and would["down"] == ("CONFLICT", None)
    room.push(fake)
    assert fake.value("best") == 163


# --- two at once


def test_two_pushers_at_once_send_nothing_twice(tmp_path: Path) -> None:
    clock = Clock(START)
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    values = {f"e{n}": 1 for n in range(60)}
    for can in (CONDITION, NEITHER):
        for batches in (("one", "one"), ("one", "two")):
            fake = FakeSystem(values, can=can, clock=clock, system=f"fake {can.conditional_write} {batches}")
            with Ledger.open(url, key=b"k" * 32) as ledger:
                ids = {name: f"{name} {fake.system}" for name in batches}
                for n, batch_id in enumerate(ids.values()):
                    record(
                        ledger, [{"entity": key, "before": 1, "after": 2} for key in values], batch_id, workflow=fake.system,
                        day=DAY + timedelta(days=n),
                    )  # fmt: skip
            ended: list[str] = []
            ready = threading.Barrier(2)

            def run(
                batch_id: str, fake: FakeSystem = fake, ended: list[str] = ended, ready: threading.Barrier = ready
            ) -> None:
                with Ledger.open(url, key=b"k" * 32) as own:
                    ready.wait()
                    try:
                        push(own, fake, batch_id, settings=PushSettings(wave=10))
                        ended.append("complete")
                    except Busy:
                        ended.append("busy")

            threads = [threading.Thread(target=run, args=(ids[name],)) for name in batches]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert "complete" in ended and len(ended) == 2
            assert set(fake.counts.values()) == {1} and {fake.value(key) for key in values} == {2}


def test_no_state_is_forgotten(room: Room) -> None:
    """Each delivery ends in exactly one state, and the report counts all of them."""
    values = {f"e{n}": 10 for n in range(12)}
    fake = room.system(values)
    faults: Sequence[str] = (
        "ignore",
        "clamp",
        "refuse",
        "not_applied",
        "unknown_applied",
        "unknown_lost",
        "late",
        "conflict",
    )
    fake.fault = lambda op, key: faults[int(key[1:]) % 8] if op == "apply" else ""  # type: ignore[assignment]
    record(room.ledger, [{"entity": key, "before": 10, "after": 20} for key in values])
    report = room.push(fake)
    assert sum(report.counts.values()) == 12
    assert all((fake.value(e) == 20) for e, s in room.states().items() if s == "ACKED")
