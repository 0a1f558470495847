"""How the loop is doing: a ledger whose history is known gives exactly these figures; an empty one gives zeros."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from delivery.ledger import Attempt, Ledger, Result
from pipeline import dispatch
from pipeline.lifecycle import rule_override
from pipeline.monitoring import loop_health, verdicts
from pipeline.workflow import FOLDER, load
from tests.support.ledgers import KEY, Clock, new_batch, some_decisions

NOON = datetime(2026, 4, 11, 12)
WORKFLOW = load(FOLDER / "ad_budget")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock, tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=clock) as opened:
        yield opened


def april(day: int, hour: float) -> datetime:
    return datetime(2026, 4, day) + timedelta(hours=hour)


class Story:
    """Writes a history into a ledger, at the times that it tells."""

    def __init__(self, book: Ledger, clock: Clock) -> None:
        self.book, self.clock = book, clock

    def decided(self, day: int, *, hour: float = 4, name: str = "", **other: Any) -> str:
        self.clock.now = april(day + 1, hour)
        batch_id = name or f"b{day}"
        said = {"day": date(2026, 4, day), "decided_at": self.clock.now, "pools": None, "record": {"model_version": 2}}
        self.book.record_batch(new_batch(batch_id, **(said | other)), some_decisions(batch_id))
        return batch_id

    def pushed(self, day: int, states: str, *, complete: bool = True) -> None:
        """A letter a delivery: Acked, Conflict, Overwritten, Rejected."""
        self.clock.now, batch = april(day + 1, 4.5), f"b{day}"
        named = {"A": "ACKED", "C": "CONFLICT", "O": "OVERWRITTEN", "R": "REJECTED"}
        lease = self.book.lease("ads")
        self.book.open_push(lease, batch)
        self.book.begin(
            lease, batch, [Attempt(n, 120, 100, f"{batch}-{n}", self.clock.now) for n in range(len(states))]
        )
        results = [
            Result(n, named[s], sent=120, prior=100, observed=120, verified_at=self.clock.now, ended_at=self.clock.now,
                   found=77 if s in "CO" else None)  # type: ignore[arg-type]
            for n, s in enumerate(states)
        ]  # fmt: skip
        self.book.settle(lease, batch, results)
        self.book.close_push(lease, batch, complete)
        self.book.release(lease)

    def rollback(self, what: str, batch: str, at: datetime, *, trigger: str, reason: str) -> None:
        self.clock.now = at
        ask = self.book.rollback_asked if what == "asked" else self.book.rollback_complete
        ask(batch, actor="ann", reason=reason, trigger=trigger)

    def moved(self, version: int, action: str, at: datetime, **evidence: Any) -> None:
        self.clock.now = at
        self.book.promotion("ad_budget", version, action, "ann", evidence)

    def trigger(self, cause: str, action: str, at: datetime) -> None:
        self.clock.now = at
        self.book.note("trigger", {"workflow": "ad_budget", "day": "2026-04-01", "cause": cause, "evidence": {},
                                   "action": action, "window": []})  # fmt: skip


def tell(book: Ledger, clock: Clock) -> None:
    """Six weeks: two retrainings, one promotion, four rollbacks of which one is open, bad days, people who step in."""
    story = Story(book, clock)
    story.trigger("person", "asked", datetime(2026, 2, 20))
    story.moved(1, "promoted", datetime(2026, 2, 20))
    story.moved(9, "rolled back", datetime(2026, 2, 22), reason="old", trigger="person")
    story.trigger("realised", "asked", datetime(2026, 3, 20))
    story.moved(2, "promoted", datetime(2026, 3, 20, 1))
    story.decided(1)
    story.pushed(1, "AAAA")
    story.trigger("features", "asked", april(2, 5))
    story.moved(3, "refused", april(2, 6))
    story.decided(2)
    story.pushed(2, "AACR")
    # a guard takes back both batches of version 2, which a person lifts six days later
    clock.now = april(3, 10)
    book.note(dispatch.GUARD, {"workflow": "ad_budget", "batch_id": "b2", "rollback": True, "findings": []})
    story.moved(2, "rolled back", april(3, 11), reason="conflicts", trigger="guard")
    story.moved(1, "promoted", april(3, 11), **{"heir of": 2})
    for batch, asked, ended in (("b2", 11, 12), ("b1", 12, 13.5)):
        story.rollback("asked", batch, april(3, asked), trigger="guard", reason="conflicts")
        story.rollback("complete", batch, april(3, ended), trigger="guard", reason="conflicts")
    story.trigger("features", "cooling", april(3, 14))
    story.decided(3, step="rule", record={"late": True})
    story.decided(4)
    story.pushed(4, "AAAO")
    # a person's rollback needs a second try, with another reason
    story.rollback("asked", "b4", april(5, 9), trigger="person", reason="wrong prices")
    story.rollback("asked", "b4", april(6, 10), trigger="person", reason="again")
    story.rollback("complete", "b4", april(6, 10.5), trigger="person", reason="again")
    # the 5th is never decided; the 6th by version 1, after the deadline
    story.moved(4, "canary", april(6, 4))
    story.decided(6, hour=7, step="previous_champion")
    story.decided(7, name="b7-first", step="no_change")
    story.decided(7, hour=4.2)
    # a canary without batches of its own is condemned by the regression guard
    clock.now = april(8, 5)
    body = {"workflow": "ad_budget", "comparison": "challenger vs champion", "version": 4, "since": "2026-04-06",
            "day": "2026-04-07", "verdict": "ROLLBACK", "reasons": ["harm"], "figures": {}, "design": "cohort"}  # fmt: skip
    book.note(verdicts.VERDICT, body)
    story.moved(4, "rolled back", april(8, 6), reason="harm", trigger="guard")
    story.decided(8)
    story.pushed(8, "AA", complete=False)
    story.moved(2, "lifted", april(9, 9), reason="it was the prices")
    story.decided(9)
    story.pushed(9, "AAAA")
    story.rollback("asked", "b9", april(10, 5), trigger="person", reason="looks odd")
    story.decided(10, status="HELD")
    clock.now = NOON


KNOWN: dict[str, Any] = {
    "window_days": 30, "promotions": 1, "refused": 1, "held_for_a_person": 0, "behind_the_rule": 0, "retrainings": 2, "triggers_held": 1,
    "rollbacks": 4, "automatic_rollbacks": 2, "automatic_share": 0.5, "rollbacks_open": 1, "false_rollbacks": 1,
    # harm began with the first push (2nd 04:30, 5th 04:30, canary 6th 04:00, 10th 04:30)
    "hours_to_notice": (29.5 + 4.5 + 49 + 0.5) / 4,
    "hours_to_restore": (3.5 + 25.5 + 1) / 3,
    "hours_from_harm_to_restored": (33 + 30 + 50) / 3,
    "deliveries": 4 + 4 + 4 + 2 + 4, "overrides": 2, "override_share": 2 / 18, "rejected": 1,
    "days_decided": 9, "days_undecided": 1, "deadline_misses": 3,
    "days_by_champion": 7, "days_by_previous_champion": 1, "days_by_rule": 1, "days_by_no_change": 0,
}  # fmt: skip


def test_a_known_history_gives_exactly_its_figures(book: Ledger, clock: Clock) -> None:
    tell(book, clock)
    found = loop_health.examine(book, WORKFLOW, until=NOON)
    assert found.figures == pytest.approx(KNOWN)
    assert list(found.figures) == loop_health.TABLE.names[1:]
    assert found.causes == {"features": 1, "realised": 1}
    assert found.months == (
        {"month": "2026-02", "promotions": 1, "retrainings": 1, "rollbacks": 1, "automatic_rollbacks": 0, "deadline_misses": 0},
        {"month": "2026-03", "promotions": 1, "retrainings": 1, "rollbacks": 0, "automatic_rollbacks": 0, "deadline_misses": 0},
        {"month": "2026-04", "promotions": 0, "retrainings": 1, "rollbacks": 4, "automatic_rollbacks": 2, "deadline_misses": 3},
    )  # fmt: skip
    first = found.rollbacks[0].as_dict()
    assert first == {
        "began": "2026-04-02T04:30:00", "noticed": "2026-04-03T10:00:00", "asked": "2026-04-03T11:00:00",
        "restored": "2026-04-03T13:30:00", "automatic": True, "reason": "conflicts", "batches": 2, "versions": [2],
        "lifted": True,
    }  # fmt: skip


def test_what_is_open_is_named_with_whom_it_waits_for(book: Ledger, clock: Clock) -> None:
    tell(book, clock)
    book.note(dispatch.GUARD, {"workflow": "ad_budget", "batch_id": "b9", "rollback": True,
                                 "findings": [{"text": "too many conflicts"}]})  # fmt: skip
    book.switch("ad_budget", True, "bea", "looking into it")
    now = loop_health.examine(book, WORKFLOW, until=NOON).now
    assert now["stopped"] == {"by": "bea", "since": "2026-04-11T12:00:00", "reason": "looking into it"}
    (held,) = now["held"]
    assert (held["batch"], held["approvals_missing"], held["until"]) == ("b10", 1, "2026-04-12T00:00:00")
    assert "signalbox approve b10" in held["says"]
    assert now["open_pushes"] == [
        {"batch": "b8", "kind": "decision", "day": "2026-04-08", "states": {"ACKED": 2, "PENDING": 2}}
    ]
    assert now["condemned"] == [{"batch": "b9", "version": None, "says": "too many conflicts"}]
    assert (now["champion"], now["champion_since"]) == (1, "2026-04-03T11:00:00")
    assert now["challenger"] is None
    assert now["blocked"] == [4, 9]
    assert (now["newest_day_decided"], now["newest_day_delivered"]) == ("2026-04-10", "2026-04-09")
    told = "\n".join(loop_health.lines(loop_health.examine(book, WORKFLOW, until=NOON)))
    for words in (
        "STOPPED by bea",
        "open push: b8",
        "to be taken back: b9",
        "from harm to restored 37.7 h",
        "4 rollbacks, 2 automatic",
    ):
        assert words in told
    # a batch whose day is over waits for nobody, and one that was never decided in time is missed
    later = loop_health.examine(book, WORKFLOW, until=april(12, 7))
    assert later.now["held"] == []
    assert later.figures["days_undecided"] == 2
    assert later.figures["deadline_misses"] == 4


@pytest.mark.parametrize(
    "other", [{}, {"record": {"backfill": True}}, {"status": "REFUSED"}], ids=["run again", "backfill", "refused"]
)
def test_a_range_of_past_days_run_again_changes_no_figure(book: Ledger, clock: Clock, other: dict[str, Any]) -> None:
    tell(book, clock)
    before = loop_health.examine(book, WORKFLOW, until=NOON).as_dict()
    again = Story(book, clock)
    for day in (1, 2, 4, 5, 6, 8):
        clock.now = NOON
        said = {"day": date(2026, 4, day), "decided_at": NOON, "pools": None, "record": {"model_version": 4}} | other
        again.book.record_batch(new_batch(f"again-{day}", **said), some_decisions(f"again-{day}"))
    assert loop_health.examine(book, WORKFLOW, until=NOON).as_dict() == before
    told = "\n".join(loop_health.lines(loop_health.examine(book, WORKFLOW, until=NOON)))
    assert "newest day decided 2026-04-10, delivered 2026-04-09" in told


def test_a_day_of_which_two_batches_met_the_system_counts_the_deliveries_of_both(book: Ledger, clock: Clock) -> None:
    story = Story(book, clock)
    story.decided(1)
    story.pushed(1, "RRRR")
    story.decided(1, name="b1-again", hour=5, step="rule")
    clock.now = april(2, 5.5)
    lease = book.lease("ads")
    book.open_push(lease, "b1-again")
    book.begin(lease, "b1-again", [Attempt(n, 120, 100, f"again-{n}", clock.now) for n in range(4)])
    book.settle(lease, "b1-again", [
        Result(n, "ACKED", sent=120, prior=100, observed=120, verified_at=clock.now, ended_at=clock.now) for n in range(4)
    ])  # fmt: skip
    book.close_push(lease, "b1-again", True)
    found = loop_health.examine(book, WORKFLOW, until=april(2, 7))
    assert (found.figures["deliveries"], found.figures["rejected"]) == (8, 4)
    assert found.figures["days_by_rule"] == 1 and found.now["newest_day_delivered"] == "2026-04-01"


def test_the_past_is_seen_as_it_was(book: Ledger, clock: Clock) -> None:
    tell(book, clock)
    then = loop_health.examine(book, WORKFLOW, until=april(5, 10))
    assert (then.figures["rollbacks"], then.figures["rollbacks_open"], then.figures["false_rollbacks"]) == (2, 1, 0)
    assert then.figures["days_decided"] == 4
    assert (then.now["champion"], then.now["champion_since"], then.now["blocked"]) == (1, "2026-04-03T11:00:00", [2, 9])
    before = loop_health.examine(book, WORKFLOW, until=april(3, 10)).now
    assert (before["champion"], before["champion_since"], before["blocked"]) == (2, "2026-03-20T01:00:00", [9])
    assert loop_health.examine(book, WORKFLOW, until=april(7, 0)).now["challenger"] == {"version": 4, "stage": "canary"}
    earlier = loop_health.examine(book, WORKFLOW, until=NOON, window_days=3)
    assert (earlier.figures["rollbacks"], earlier.figures["days_decided"], earlier.figures["retrainings"]) == (1, 3, 0)


@pytest.mark.parametrize(
    ("at", "lifted"), [(april(3, 12), 1), (april(17, 10), 1), (april(17, 12), 0)], ids=["soon", "in time", "too late"]
)
def test_a_version_lifted_within_a_fortnight_was_taken_back_for_nothing(
    book: Ledger, clock: Clock, at: datetime, lifted: int
) -> None:
    story = Story(book, clock)
    story.moved(2, "rolled back", april(3, 11), reason="x", trigger="guard")
    story.moved(2, "lifted", at)
    assert loop_health.examine(book, WORKFLOW, until=april(18, 0)).figures["false_rollbacks"] == lifted


def test_the_same_reason_days_later_is_another_rollback(book: Ledger, clock: Clock) -> None:
    story = Story(book, clock)
    for day in (1, 2, 5):
        story.decided(day)
    for batch, at in (("b1", april(6, 1)), ("b2", april(6, 2)), ("b5", april(8, 1))):
        story.rollback("asked", batch, at, trigger="person", reason="prices")
        story.rollback("complete", batch, at, trigger="person", reason="prices")
    found = loop_health.examine(book, WORKFLOW, until=NOON).rollbacks
    assert [sorted(one.batches) for one in found] == [["b1", "b2"], ["b5"]]
    # nothing of them was ever pushed: no harm began
    assert [one.began for one in found] == [None, None]


def test_a_champion_behind_the_rule_and_versions_that_wait_for_a_person_are_told(book: Ledger, clock: Clock) -> None:
    story = Story(book, clock)
    story.moved(1, "held", april(1, 4), digest="a")
    story.moved(2, "promoted", april(2, 4))
    story.moved(3, "held", april(3, 4), digest="b")
    story.moved(4, "held", april(3, 5), digest="c")
    story.moved(4, "refused", april(3, 6))
    clock.now = april(5, 5)
    said = {
        "workflow": "ad_budget",
        "day": "2026-04-04",
        "version": 2,
        "text": "version 2 does worse than the rule",
        "figures": {},
    }
    book.note(rule_override.KIND, said)
    clock.now = april(9, 0)
    found = loop_health.examine(book, WORKFLOW, until=april(6, 0))
    assert (found.figures["behind_the_rule"], found.figures["held_for_a_person"]) == (1, 3)
    assert found.now["behind_the_rule"] == {
        "since": "2026-04-05T05:00:00",
        "says": "version 2 does worse than the rule",
    }
    assert found.now["versions_held"] == [3], "1 is older than the champion, 4 was refused since"
    told = "\n".join(loop_health.lines(found))
    assert "THE RULE DECIDES since 2026-04-05T05:00: version 2 does worse" in told
    assert "held by their gate for a person: version 3" in told
    before = loop_health.examine(book, WORKFLOW, until=april(4, 0))
    assert before.figures["behind_the_rule"] == 0 and before.now["behind_the_rule"] is None
    story.moved(3, "promoted", april(9, 1))
    after = loop_health.examine(book, WORKFLOW, until=april(9, 2))
    assert after.figures["behind_the_rule"] == 0 and after.now["versions_held"] == []


def test_another_workflows_history_is_not_ours(book: Ledger, clock: Clock) -> None:
    tell(book, clock)
    other = loop_health.examine(book, load(FOLDER / "ticket_priority"), until=NOON)
    assert not any(v for k, v in other.figures.items() if k != "window_days")
    assert other.months == ()


def test_an_empty_ledger_gives_zeros_and_nothing_yet(book: Ledger) -> None:
    found = loop_health.examine(book, WORKFLOW, until=NOON)
    nulls = {name for name, value in found.figures.items() if value is None}
    assert nulls == {"automatic_share", "override_share", *(n for n in found.figures if n.startswith("hours_"))}
    assert all(value == 0 for name, value in found.figures.items() if name not in nulls | {"window_days"})
    assert "nothing yet" in loop_health.lines(found)[0]
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()
    assert loop_health.plot(found).startswith(b"\x89PNG")


def test_the_document_and_the_row_are_plain_and_the_same_each_time(book: Ledger, clock: Clock) -> None:
    tell(book, clock)
    found = loop_health.examine(book, WORKFLOW, until=NOON)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()
    row = pa.Table.from_pylist([found.row(date(2026, 4, 10))], schema=loop_health.TABLE).to_pylist()[0]
    assert row == {"day": date(2026, 4, 10), **found.figures}
    again = loop_health.examine(book, WORKFLOW, until=NOON)
    assert again.as_dict() == found.as_dict()
    assert loop_health.plot(again) == loop_health.plot(found)
