"""What acted is read from deliveries: nothing that was not sent changes an answer about the past."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from delivery.connectors.base import Capabilities
from delivery.ledger import Attempt, BatchRow, Ledger, LedgerError, NewBatch, Result
from delivery.push import PushError, PushSettings, push
from delivery.rollback import Batch, RollbackError, roll_back
from pipeline import dispatch
from pipeline.decisions import in_effect
from pipeline.lake import Lake
from pipeline.monitoring import loop_health, verdicts
from pipeline.workflow import FOLDER, load
from tests.support.fakes import Clock, Crash, FakeSystem, Process, dead_holder, table

KEY = b"a key for tests only"
WORKFLOW = load(FOLDER / "ad_budget")
FIRST = date(2026, 4, 10)
START = {"a": 100, "b": 200, "c": 300}


def day_of(n: int) -> date:
    return FIRST + timedelta(days=n)


def morning(n: int, hour: float = 4) -> datetime:
    """Of the day on which the decisions of day ``n`` take effect."""
    return datetime.combine(day_of(n + 1), time()) + timedelta(hours=hour)


class Book:
    """A ledger at a clock; what became of deliveries is written into it as it is told."""

    def __init__(self, folder: Path) -> None:
        self.clock = Clock(morning(0))
        self.ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=KEY, clock=self.clock)

    def at(self, n: int, hour: float) -> None:
        self.clock.jump((morning(n, hour) - self.clock()).total_seconds())

    def decide(
        self, name: str, n: int, after: Mapping[str, int], *, hour: float = 4, before: Mapping[str, int] = START,
        status: Any = "READY", drawn: Mapping[str, float] | None = None, decided_at: datetime | None = None, **record: Any,
    ) -> BatchRow:  # fmt: skip
        """Record a batch of day ``n``, by default that morning."""
        self.clock.jump(((decided_at or morning(n, hour)) - self.clock()).total_seconds())
        rows = [{"entity": e, "before": v, "after": after.get(e, v)} for e, v in before.items()]
        given_ = table(rows, name)
        drawn = drawn or {}
        for column in ("perturbation", "perturbation_probability"):
            values = pa.array([drawn.get(e) for e in before], pa.float64())
            given_ = given_.set_column(given_.schema.get_field_index(column), column, values)
        new = NewBatch(
            batch_id=name, workflow=WORKFLOW.name, kind="decision", day=day_of(n), digest=name, status=status,
            step="champion", as_of=morning(n, 3), decided_at=self.clock(), run_id="run", record={"model_version": 1, **record},
        )  # fmt: skip
        return self.ledger.record_batch(new, given_)

    def back(self, name: str, n: int, restored: Mapping[str, tuple[int, int]], *, at: datetime) -> None:
        """A rollback of a batch of day ``n`` that is complete: entity → from, to."""
        self.clock.jump((at - self.clock()).total_seconds())
        rows = [{"entity": e, "before": now, "after": then} for e, (now, then) in restored.items()]
        new = NewBatch(
            batch_id=f"rollback-{name}", workflow=WORKFLOW.name, kind="rollback", day=day_of(n), digest=f"back {name}",
            status="READY", step="champion", as_of=datetime(9999, 12, 31), decided_at=at, run_id="run", record={}, reverses=name,
        )  # fmt: skip
        self.ledger.record_batch(new, table(rows, f"rollback-{name}"))
        self.ended(f"rollback-{name}", {e: ("ACKED", then) for e, (_, then) in restored.items()})

    def ended(self, name: str, ends: Mapping[str, tuple[str, int | None]], *, complete: bool = True) -> None:
        """Deliveries of a batch with their ends, as a push writes them: state and what was read back."""
        ledger, now = self.ledger, self.clock()
        lease = ledger.lease("fake", holder=dead_holder())
        ledger.open_push(lease, name)
        numbers = {d.entity: d for d in ledger.deliveries(name)}
        some = [(numbers[e], state, seen) for e, (state, seen) in ends.items()]
        ledger.begin(lease, name, [Attempt(d.n, d.after, d.before, f"{name}-{d.n}", now) for d, *_ in some])
        ledger.settle(lease, name, [
            Result(d.n, state, sent=d.after, prior=d.before, observed=seen, verified_at=now if seen is not None else None,
                   ended_at=now)  # type: ignore[arg-type]
            for d, state, seen in some
        ])  # fmt: skip
        ledger.close_push(lease, name, complete)
        ledger.release(lease)

    def sent(self, name: str, n: int, after: Mapping[str, int], *, hour: float = 4, **other: Any) -> None:
        """Decided, and every change of it proven half an hour later."""
        row = self.decide(name, n, after, hour=hour, **other)
        if "decided_at" not in other:
            self.at(n, hour + 0.5)
        self.ended(row.batch_id, {d.entity: ("ACKED", d.after) for d in self.ledger.deliveries(name) if d.entity})

    def told(self, n: int) -> dict[str, tuple[str, str | None, int]]:
        """Of each entity that something acted on: by which batch, the state of its delivery, and what stood."""
        found = in_effect.decided(self.ledger, WORKFLOW.name, day_of(n), day_of(n)).to_pylist()
        return {r["entity_id"]: (r["batch_id"], r["state"], r["standing"]) for r in found}


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    made = Book(tmp_path)
    yield made
    made.ledger.close()


SENT = {"a": ("x", "ACKED", 120), "b": ("x", None, 200), "c": ("x", None, 300)}


@pytest.mark.parametrize(
    "how",
    [
        {"hour": 6}, {"decided_at": morning(5)}, {"decided_at": morning(5), "backfill": True}, {"status": "HELD"},
        {"status": "REFUSED"},
    ],
    ids=["the same morning", "days later", "a backfill", "held", "refused"],
)  # fmt: skip
@pytest.mark.parametrize("after", [{"a": 150, "b": 150}, {}], ids=["other content", "nothing to change"])
def test_a_day_that_was_sent_is_told_by_what_was_sent_whatever_is_decided_of_it_later(
    book: Book, how: dict[str, Any], after: dict[str, int]
) -> None:
    book.sent("x", 0, {"a": 120}, drawn={"a": 1.2, "b": 1.0})
    drawn = dispatch.randomised(book.ledger, WORKFLOW.name, FIRST)
    assert book.told(0) == SENT and drawn == {"a": (1.2, 1.2), "b": (1.0, 1.0)}
    book.decide("y", 0, after, drawn={"a": 0.8}, **how)
    assert dispatch.batch_of(book.ledger, WORKFLOW.name, FIRST).batch_id == "y", (
        "what would be sent is another question"
    )
    assert book.told(0) == SENT
    assert dispatch.randomised(book.ledger, WORKFLOW.name, FIRST) == drawn


def test_where_nothing_was_sent_nobody_answers(book: Book) -> None:
    book.decide("x", 0, {"a": 120})
    book.decide("held", 1, {"a": 120}, status="HELD")
    book.decide("refused", 2, {}, status="REFUSED")
    book.decide("backfill", 3, {}, decided_at=morning(9), backfill=True)
    book.decide("afterwards", 4, {}, decided_at=morning(9))
    assert [book.told(n) for n in range(5)] == [{}] * 5


def test_a_batch_that_the_system_refused_wholly_has_not_acted(book: Book) -> None:
    book.decide("x", 0, {"a": 120, "b": 150})
    book.ended("x", {"a": ("REJECTED", 100), "b": ("CONFLICT", 77)})
    assert book.told(0) == {}


def test_what_had_nothing_to_send_answers_until_something_of_the_day_is_sent(book: Book) -> None:
    book.decide("x", 0, {})
    left = {e: ("x", None, v) for e, v in START.items()}
    assert book.told(0) == left
    book.decide("y", 0, {"a": 120}, hour=5)
    assert book.told(0) == left
    book.ended("y", {"a": ("ACKED", 120)})
    assert book.told(0) == {"a": ("y", "ACKED", 120), "b": ("y", None, 200), "c": ("y", None, 300)}


def test_of_two_batches_that_were_sent_each_entity_is_answered_by_its_last_proof(book: Book) -> None:
    book.sent("x", 0, {"a": 120, "b": 150})
    book.sent("y", 0, {"a": 140}, hour=6)
    assert book.told(0) == {"a": ("y", "ACKED", 140), "b": ("x", "ACKED", 150), "c": ("y", None, 300)}
    assert book.ledger.batch("y").sequence > book.ledger.batch("x").sequence
    # and one that people stood in the way of leaves the answer to the one that stood before it
    book.decide("z", 0, {"a": 160, "c": 310}, hour=8)
    book.ended("z", {"a": ("CONFLICT", 77), "c": ("ACKED", 310)})
    assert book.told(0) == {"a": ("y", "ACKED", 77), "b": ("x", "ACKED", 150), "c": ("z", "ACKED", 310)}


def test_a_rollback_of_the_day_itself_shows_and_a_later_one_does_not(book: Book) -> None:
    book.sent("x", 0, {"a": 120}, drawn={"a": 1.2})
    book.sent("y", 1, {"a": 130}, before={**START, "a": 120}, drawn={"a": 1.1})
    book.back("y", 1, {"a": (130, 120)}, at=morning(1, 20))
    assert book.told(1)["a"] == ("y", "ACKED", 120)
    assert dispatch.randomised(book.ledger, WORKFLOW.name, day_of(1)) == {}
    book.back("x", 0, {"a": (120, 100)}, at=morning(1, 21))
    assert book.told(0)["a"] == ("x", "ACKED", 120)
    assert dispatch.randomised(book.ledger, WORKFLOW.name, FIRST) == {"a": (1.2, 1.2)}


def test_a_rollback_of_an_older_day_shows_on_the_day_on_which_it_happened(book: Book) -> None:
    book.sent("x", 0, {"a": 120})
    book.sent("y", 1, {"b": 210}, before={**START, "a": 120})
    book.back("x", 0, {"a": (120, 100)}, at=morning(1, 12))
    assert book.told(1) == {"a": ("y", None, 100), "b": ("y", "ACKED", 210), "c": ("y", None, 300)}
    book.back("y", 1, {"b": (210, 200)}, at=morning(2, 1))
    assert book.told(1)["b"] == ("y", "ACKED", 210)


def test_what_was_sent_when_its_day_was_over_did_not_stand_on_it(book: Book) -> None:
    book.decide("late", 0, {"a": 120}, drawn={"a": 1.2})
    book.at(1, 6)
    book.ended("late", {"a": ("ACKED", 120)})
    assert book.told(0)["a"] == ("late", "ACKED", 100)
    assert dispatch.randomised(book.ledger, WORKFLOW.name, FIRST) == {}
    book.sent("x", 2, {"a": 120})
    book.decide("y", 2, {"a": 140}, hour=6)
    book.at(3, 6)
    book.ended("y", {"a": ("ACKED", 140)})
    assert book.told(2)["a"] == ("x", "ACKED", 120)


def test_an_overwritten_change_stands_no_more_and_somebody_elses_that_was_left_does(book: Book) -> None:
    book.decide("x", 0, {"a": 120, "b": 210, "c": 310})
    book.ended("x", {"a": ("OVERWRITTEN", 77), "b": ("CONFLICT", 78), "c": ("REJECTED", 305)})
    assert book.told(0) == {"a": ("x", "OVERWRITTEN", 120), "b": ("x", "CONFLICT", 78), "c": ("x", "REJECTED", 305)}


def test_an_entity_whose_name_was_forgotten_has_no_row(book: Book) -> None:
    book.sent("x", 0, {"a": 120, "b": 210})
    book.ledger.forget("a")
    assert book.told(0) == {"b": ("x", "ACKED", 210), "c": ("x", None, 300)}


def test_the_guard_and_health_tell_a_day_by_the_batch_that_acted(book: Book) -> None:
    book.sent("x", 0, {"a": 120})
    book.decide("y", 0, {"a": 150}, decided_at=morning(5), model_version=2)
    book.decide("z", 1, {"a": 130}, decided_at=morning(5, 1), backfill=True, model_version=2)
    book.at(5, 2)
    acted = verdicts._acted(WORKFLOW, book.ledger, day_of(6), book.clock())
    assert [b.batch_id for b in acted] == ["x"]
    found = loop_health.examine(book.ledger, WORKFLOW, until=book.clock())
    first, second = found.days[:2]
    assert (first["step"], first["late"], first["deliveries"]) == ("champion", False, 1)
    assert (second["step"], second["late"]) == (None, True), "a backfill decides no day in time"
    assert (found.now["newest_day_decided"], found.now["newest_day_delivered"]) == (str(FIRST), str(FIRST))


def test_backfills_before_the_first_day_are_no_missed_deadlines(book: Book) -> None:
    for n in range(3):
        book.decide(f"past-{n}", n, {"a": 120}, decided_at=morning(8), backfill=True)
    assert loop_health.examine(book.ledger, WORKFLOW, until=book.clock()).days == ()
    book.sent("x", 8, {"a": 120})
    assert [(d["day"], d["late"]) for d in loop_health.examine(book.ledger, WORKFLOW, until=book.clock()).days] == [
        (day_of(8), False)
    ]


def test_days_whose_stored_scores_are_not_of_the_version_that_acted_are_named(book: Book, tmp_path: Path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    assert in_effect.scored_by_others(book.ledger, WORKFLOW, lake) == set()
    versions = {0: 1, 1: 2, 2: 2, 3: None}
    rows = [{"day": day_of(n), "model_version": v} for n, v in versions.items()]
    schema = pa.schema({"day": pa.date32(), "model_version": pa.int64()})
    lake.replace_days(
        WORKFLOW.table("scoring"), pa.Table.from_pylist(rows, schema=schema), [day_of(n) for n in versions]
    )
    for n in (0, 1, 3):
        book.sent(f"x{n}", n, {"a": 120 + n})
    book.decide("y1", 1, {"a": 170}, decided_at=morning(4), model_version=2)
    book.decide("y2", 2, {"a": 170}, decided_at=morning(4, 5), model_version=2)
    assert in_effect.scored_by_others(book.ledger, WORKFLOW, lake) == {day_of(1), day_of(3)}


# --- any history ------------------------------------------------------------------------------------------------------

SOAK = int(os.environ.get("SIGNALBOX_SOAK") or 0)
EXAMPLES = 12 * max(1, SOAK)
HOW: dict[str, Any] = {"deadline": None, "derandomize": not SOAK}
CONTENTS = [{}, {"a": 120, "b": 180}, {"a": 80}, {"b": 230, "c": 270}, {"a": 110, "b": 190, "c": 310}]
SYSTEMS = [Capabilities(conditional_write=True, bulk_read=10), Capabilities(idempotency_key=True)]

step = st.one_of(
    st.just(("next",)),
    st.tuples(
        st.just("decide"), st.integers(0, 3), st.integers(0, len(CONTENTS) - 1), st.sampled_from(["READY", "READY", "HELD", "REFUSED"]),
        st.booleans(),
    ),
    st.tuples(st.just("push"), st.none() | st.integers(1, 2)),
    st.tuples(st.just("sent"), st.integers(1, len(CONTENTS) - 1)),
    st.tuples(st.just("back"), st.integers(0, 5)),
)  # fmt: skip


class Loop:
    """Days of decisions, pushes and rollbacks on a fake system, and every figure about the days that are past."""

    def __init__(self, ledger: Ledger, clock: Clock, can: Capabilities) -> None:
        self.ledger, self.clock, self.n, self.tries = ledger, clock, 0, 0
        self.world = FakeSystem(START, can=can, clock=clock)
        self.stood: dict[date, dict[str, int | None]] = {}
        """What the system showed when the day that a day took effect on had ended."""
        self.at(4)

    def at(self, hour: float) -> None:
        self.clock.sleep(max(0.0, (morning(self.n, hour) - self.clock()).total_seconds()))

    def values(self) -> dict[str, int | None]:
        return {key: self.world.value(key) for key in START}

    def next(self) -> None:
        self.clock.sleep((morning(self.n, 24) - self.clock()).total_seconds())
        self.world.settle()
        self.stood[day_of(self.n)] = self.values()
        self.n += 1
        self.at(4)

    def decide(self, back: int, content: int, status: Any, marked: bool) -> None:
        """A batch of today (0) or of a day before; ``marked``: as a backfill, where its effect is over."""
        n = max(0, self.n - back)
        now = self.values()
        before = {e: v if v is not None else START[e] for e, v in now.items()}
        after = {e: CONTENTS[content].get(e, v) for e, v in before.items()}
        name = f"{n}-{status}-{'-'.join(str(v) for v in (*before.values(), *after.values()))}"
        rows = [{"entity": e, "before": v, "after": after[e]} for e, v in before.items()]
        drawn = table(rows, name)
        for column in ("perturbation", "perturbation_probability"):
            values = pa.array([1.5] * len(rows), pa.float64())
            drawn = drawn.set_column(drawn.schema.get_field_index(column), column, values)
        backfill = {"backfill": True} if marked and n < self.n else {}
        record = {"model_version": content, **backfill}
        name = f"{name}-{'b' if backfill else ''}"
        self.ledger.record_batch(
            NewBatch(
                batch_id=name, workflow=WORKFLOW.name, kind="decision", day=day_of(n), digest=name, status=status,
                step="champion", as_of=self.clock(), decided_at=self.clock(), run_id="run", record=record,
            ),
            drawn,
        )  # fmt: skip
        self.clock.sleep(60)

    def push(self, dies: int | None) -> None:
        """The newest batch of today; ``dies``: its process, at that write."""
        with suppress(dispatch.NothingToDeliver):
            batch = dispatch.batch_of(self.ledger, WORKFLOW.name, day_of(self.n))
            if batch.status == "READY" and not batch.backfill:
                left = iter([""] * (dies - 1) + ["crash_after"] if dies else [])
                self.world.fault = lambda op, key: next(left, "") if op == "apply" else ""  # type: ignore[assignment]
                self._act(lambda how: push(self.ledger, self.world, batch.batch_id, **how))

    def back(self, which: int) -> None:
        acted = [b for b in self.ledger.batches(WORKFLOW.name, kind="decision") if b.acted]
        if acted:
            asked = {"actor": "anna", "reason": "it does harm"}
            chosen = Batch(acted[which % len(acted)].batch_id)
            self._act(lambda how: roll_back(self.ledger, lambda _: self.world, chosen, **asked, **how))  # type: ignore[arg-type]

    def _act(self, act: Callable[[dict[str, Any]], Any]) -> None:
        self.tries += 1
        quick = PushSettings(concurrency=1, patience_s=30, late_s=1)  # type: ignore[call-arg]
        how = {
            "settings": quick, "clock": self.clock, "sleep": self.clock.sleep, "monotonic": self.clock.monotonic,
            "holder": dead_holder(self.tries), "rng": random.Random(1),
        }  # fmt: skip
        try:
            act(how)
        except (Crash, PushError, LedgerError, RollbackError):
            pass
        finally:
            self.world.fault, self.world.process = lambda op, key: "", Process()
            self.clock.sleep(60)

    def past(self) -> dict[str, Any]:
        """Every figure about the days whose effect is over: who answers what with which value, by arm, and the loop's figures."""
        now, name = self.clock(), WORKFLOW.name
        days = [day_of(n) for n in range(self.n)]
        told = loop_health.examine(self.ledger, WORKFLOW, until=now)
        return {
            "outcomes": in_effect.decided(self.ledger, name, FIRST, day_of(self.n - 1)).to_pylist() if days else [],
            "randomised": {day: dispatch.randomised(self.ledger, name, day) for day in days},
            "acted": [b.batch_id for b in verdicts._acted(WORKFLOW, self.ledger, day_of(self.n), now)],
            "days": [one for one in told.days if one["day"] < day_of(self.n)],
            "delivered": told.now["newest_day_delivered"],
            "compared": verdicts.comparisons(WORKFLOW, self.ledger, day_of(self.n)),
        }


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated ledger to copy, since migrating takes longer than an example."""
    path = tmp_path_factory.mktemp("empty") / "ledger.db"
    Ledger.open(f"sqlite:///{path}", key=KEY, clock=Clock(morning(0))).close()
    return path


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), **HOW)
@given(steps=st.lists(step, min_size=3, max_size=14), can=st.sampled_from(SYSTEMS))
def test_nothing_that_was_not_sent_changes_a_figure_about_the_past(
    empty: Path, steps: list[tuple[Any, ...]], can: Capabilities
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, clock = Path(shutil.copy(empty, folder)), Clock(morning(0))
        with Ledger.open(f"sqlite:///{path}", key=KEY, clock=clock) as ledger:
            loop = Loop(ledger, clock, can)
            before = loop.past()
            for what, *how in steps:
                match what:
                    case "next":
                        loop.next()
                        before = loop.past()
                        continue
                    case "sent":
                        loop.decide(0, how[0], "READY", False)
                        loop.push(None)
                    case _:
                        getattr(loop, what)(*how)
                after = loop.past()
                if what in ("push", "sent"):
                    before["delivered"] = after["delivered"]  # of today
                # Of all this only what is sent today acts, and its day is not over.
                assert after == before, (what, how)
                before = after
            loop.next()
            for row in loop.past()["outcomes"]:
                if row["state"] not in ("UNKNOWN", "IN_FLIGHT", "PENDING"):
                    assert row["standing"] == loop.stood[row["decided_day"]][row["entity_id"]], row
