"""What the regression guard is given to judge: which outcome counts for which arm and day, what was known, who acts since when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from delivery.ledger import Ledger, NewBatch
from pipeline.lake import Lake
from pipeline.lifecycle import rule_override
from pipeline.monitoring import observations, verdicts
from pipeline.point_in_time import StageSqlError
from pipeline.workflow import FOLDER, Workflow, load
from tests.support.fakes import table
from tests.support.ledgers import KEY

START = date(2026, 3, 2)
"""The first day of both shipped workflows; an epoch of ad_budget has 28 days, one of ticket_priority 7."""


def at(n: int) -> date:
    return START + timedelta(days=n)


def known(n: int, hour: int = 1) -> datetime:
    """An hour after midnight of the day after ``n``: before its cut-off at 03:00."""
    return datetime.combine(at(n + 1), time(hour))


@pytest.fixture(scope="module")
def ads_said() -> Workflow:
    return load(FOLDER / "ad_budget")


@pytest.fixture(scope="module")
def tickets_said() -> Workflow:
    return load(FOLDER / "ticket_priority")


class LakeHarness:
    """A lake that is written row by row."""

    def __init__(self, folder: Path, workflow: Workflow) -> None:
        self.lake, self.workflow = Lake(str(folder / "lake")), workflow
        self.rows: dict[str, list[dict[str, Any]]] = {"features": [], "outcomes": [], "arms": []}

    def line(self, entity: str, days: Iterable[int], campaign: str) -> None:
        self.rows["features"] += [{"entity_id": entity, "day": at(n), "campaign": campaign} for n in days]

    def ticket(self, entity: str, days: Iterable[int], team: str, moment: str = "open") -> None:
        self.rows["features"] += [{"entity_id": entity, "day": at(n), "team": team, "moment": moment} for n in days]

    def earned(
        self, entity: str, n: int, value: float | None, *, came: datetime | None = None, part: int | None = None
    ) -> None:
        """What a line earned on day ``n``: the outcome for the decision of the day before. ``part``: the partition."""
        came = came or known(n)
        day = came.date() - timedelta(days=1 if came.time() <= self.workflow.cutoff else 0)
        day = day if part is None else at(part)
        self.rows["outcomes"].append(
            {"entity_id": entity, "for_day": at(n - 1), "known_at": came, "cost": 1.0, "value": value, "day": day}
        )

    def went(self, entity: str, late: float | None, *, came: datetime, due: datetime | None) -> None:
        """What became known of a ticket."""
        day = came.date() - timedelta(days=1 if came.time() <= self.workflow.cutoff else 0)
        self.rows["outcomes"].append(
            {"entity_id": entity, "for_day": None, "known_at": came, "late": late, "settles_at": due, "day": day}
        )

    def draw(self, epoch: int, arms: Mapping[str, str]) -> None:
        self.rows["arms"] += [
            {"unit": u, "arm": a, "arm_probability": 0.5, "epoch": at(epoch).isoformat(), "drawn_on": at(epoch)}
            for u, a in arms.items()
        ]

    def write(self) -> LakeHarness:
        types = {
            "day": pa.date32(), "for_day": pa.date32(), "drawn_on": pa.date32(), "known_at": pa.timestamp("us"),
            "settles_at": pa.timestamp("us"), "cost": pa.float64(), "value": pa.float64(), "late": pa.float64(),
            "arm_probability": pa.float64(),
        }  # fmt: skip
        for stage, rows in self.rows.items():
            if rows:
                schema = pa.schema({name: types.get(name, pa.string()) for name in rows[0]})
                name, data = self.workflow.table(stage), pa.Table.from_pylist(rows, schema=schema)
                by = "epoch" if stage == "arms" else "day"
                self.lake.replace(name, data, predicate="true", partition_by=[by])
        return self

    def seen(self, first: int, last: int, by: int | None = None) -> list[dict[str, Any]]:
        self.write()
        found = observations.observations(
            self.workflow, self.lake, at(first), at(last), known=at(last if by is None else by)
        )
        return found.to_pylist()

    def due(self, first: int, last: int) -> list[dict[str, Any]]:
        """As ``seen``, without the teams' days on which nothing was due."""
        return [row for row in self.seen(first, last) if row["n"]]


@pytest.fixture
def ads_lake(tmp_path: Path, ads_said: Workflow) -> LakeHarness:
    return LakeHarness(tmp_path, ads_said)


@pytest.fixture
def desk_lake(tmp_path: Path, tickets_said: Workflow) -> LakeHarness:
    return LakeHarness(tmp_path, tickets_said)


# --- money: outcomes of a day -----------------------------------------------------------------------------------------


def test_a_day_counts_for_the_arm_of_the_decision_before_it_and_wash_out_follows_the_redraw(
    ads_lake: LakeHarness,
) -> None:
    ads_lake.draw(0, {"c1": "champion"})
    ads_lake.draw(28, {"c1": "holdout"})
    ads_lake.line("l1", range(26, 36), "c1")
    for n in range(27, 34):
        ads_lake.earned("l1", n, 10.0 + n)
    found = {(r["day"] - START).days: r for r in ads_lake.seen(27, 33)}
    assert {n: r["value"] for n, r in found.items()} == {n: 10.0 + n for n in range(27, 34)}
    # the decision of day 27, the last of the first epoch, acts on day 28; the redraw of day 28 acts from day 29 on
    assert {n: r["arm"] for n, r in found.items()} == {27: "champion", 28: "champion"} | dict.fromkeys(
        range(29, 34), "holdout"
    )
    assert {r["epoch"] for n, r in found.items() if n <= 28} == {START.isoformat()}
    assert [n for n, r in found.items() if r["washout"]] == [29, 30, 31], (
        "three days of wash-out, not in the first epoch"
    )


def test_what_became_known_after_the_cut_off_changes_nothing(ads_lake: LakeHarness) -> None:
    ads_lake.draw(0, {"c1": "champion"})
    ads_lake.line("l1", range(0, 8), "c1")
    ads_lake.earned("l1", 3, 10.0)
    before = ads_lake.seen(1, 5)
    ads_lake.earned("l1", 3, 99.0, came=known(5, 4))  # a correction, an hour after the cut-off of day 5
    ads_lake.earned("l1", 4, 50.0, came=known(5, 4))
    ads_lake.earned("l1", 5, 50.0, came=known(5, 4), part=5)  # whatever partition it lies in
    assert ads_lake.seen(1, 5) == before and [r["value"] for r in before] == [10.0]
    # a positive control: an hour before the cut-off both count, the correction in the place of the first figure
    ads_lake.earned("l1", 3, 99.0, came=known(5, 2))
    ads_lake.earned("l1", 4, 50.0, came=known(5, 2))
    assert [r["value"] for r in ads_lake.seen(1, 5)] == [99.0, 50.0]


def test_a_line_counts_where_it_was_when_it_was_decided_on(ads_lake: LakeHarness) -> None:
    ads_lake.draw(0, {"c1": "champion", "c2": "holdout"})
    ads_lake.line("l1", [0, 1, 2], "c1")
    ads_lake.line("l1", [3, 4, 5], "c2")  # moved between the decisions of day 2 and of day 3
    ads_lake.line("new", [4], "c2")  # there since day 4, decided on for the first time then
    for n in range(1, 6):
        ads_lake.earned("l1", n, 1.0)
    ads_lake.earned("new", 4, 7.0)  # earned before any decision on it; its campaign's money all the same
    found = {(r["unit"], (r["day"] - START).days): r["value"] for r in ads_lake.seen(1, 5)}
    assert {k: v for k, v in found.items() if v} == {
        ("c1", 1): 1.0, ("c1", 2): 1.0, ("c1", 3): 1.0, ("c2", 4): 8.0, ("c2", 5): 1.0,
    }  # fmt: skip


def test_a_campaign_that_was_switched_off_earns_nothing_rather_than_being_left_out(ads_lake: LakeHarness) -> None:
    ads_lake.draw(0, {"c1": "champion", "c2": "holdout"})
    ads_lake.line("l1", range(6), "c1")
    ads_lake.line("l2", range(6), "c2")
    ads_lake.earned("l1", 1, 5.0)
    for n in (1, 2):
        ads_lake.earned("l2", n, 5.0)
    found = [((r["day"] - START).days, r["unit"], r["arm"], r["n"], r["value"]) for r in ads_lake.seen(1, 5)]
    assert found == [
        (1, "c1", "champion", 1, 5.0), (1, "c2", "holdout", 1, 5.0), (2, "c1", "champion", 1, 0.0), (2, "c2", "holdout", 1, 5.0),
    ], "and a day of which nothing is known yet is no day of zeros"  # fmt: skip


def test_a_campaign_counts_for_nothing_on_the_days_before_it_was_drawn(ads_lake: LakeHarness) -> None:
    ads_lake.draw(0, {"c1": "champion"})
    ads_lake.draw(0, {"new": "holdout"})
    ads_lake.rows["arms"][-1]["drawn_on"] = at(3)
    ads_lake.line("l1", range(8), "c1")
    ads_lake.line("l2", range(3, 8), "new")
    for n in range(1, 7):
        ads_lake.earned("l1", n, 5.0)
    ads_lake.earned("l2", 5, 5.0)
    found = {(r["day"] - START).days: r["value"] for r in ads_lake.seen(1, 6) if r["unit"] == "new"}
    assert found == {4: 0.0, 5: 5.0, 6: 0.0}, (
        "drawn on day 3 it acts from day 4 on; from then on a day without a row is zero"
    )


def test_entities_that_share_the_arm_of_a_unit_are_not_judged_as_entities(
    desk_lake: LakeHarness, tickets_said: Workflow
) -> None:
    shared = {"design": "entity", "washout": 0, "unit": "team"}
    said = tickets_said.model_copy(update={"arms": tickets_said.arms.model_copy(update=shared)})
    with pytest.raises(StageSqlError, match=r"workflow\.yaml: arms\.unit: .* unit: entity_id"):
        observations.entities(said, desk_lake.lake, at(3), known=at(7))


def test_a_unit_that_was_not_drawn_has_no_arm(ads_lake: LakeHarness) -> None:
    ads_lake.draw(0, {"c1": "champion"})
    ads_lake.line("l1", range(4), "c1")
    ads_lake.line("l2", range(4), "c2")
    ads_lake.earned("l1", 2, 1.0)
    ads_lake.earned("l2", 2, 1.0)
    assert [(r["unit"], r["arm"]) for r in ads_lake.seen(1, 3)] == [("c1", "champion"), ("c2", None)]


def test_a_metric_column_that_outcomes_lack_is_an_error_with_column_and_file(
    ads_lake: LakeHarness, ads_said: Workflow
) -> None:
    spec = ads_said.regression
    assert spec is not None
    wrong = spec.model_copy(update={"metrics": (spec.metrics[0].model_copy(update={"column": "profit"}),)})
    ads_lake.workflow = ads_said.model_copy(update={"regression": wrong})
    ads_lake.line("l1", [1], "c1")
    ads_lake.earned("l1", 2, 1.0)
    with pytest.raises(
        StageSqlError, match=r"outcomes\.sql: yields no profit, .*workflow\.yaml names; it yields cost, value"
    ):
        ads_lake.seen(1, 3)


def test_a_lake_without_days_observes_nothing(ads_said: Workflow, tmp_path: Path) -> None:
    found = observations.observations(ads_said, Lake(str(tmp_path / "lake")), at(1), at(5), known=at(5))
    assert found.num_rows == 0 and found.schema.names == ["day", "unit", "arm", "epoch", "washout", "n", "value"]


# --- tickets: outcomes of an entity -----------------------------------------------------------------------------------


def test_a_ticket_counts_once_on_the_day_that_it_was_due_for_the_team_that_had_it_then(desk_lake: LakeHarness) -> None:
    desk_lake.draw(0, {"t1": "champion", "t2": "holdout"})
    due = datetime.combine(at(4), time(15))
    desk_lake.ticket("early", [0, 1], "t1")  # resolved on day 2, long before it was due, and closed on day 6
    desk_lake.went("early", 0.0, came=datetime.combine(at(2), time(10)), due=due)
    desk_lake.went("early", 0.0, came=datetime.combine(at(6), time(10)), due=due)
    desk_lake.ticket("late", [0, 1, 2], "t2")
    desk_lake.ticket("late", [3, 4, 5], "t1")  # passed on after the decision of day 2
    desk_lake.went("late", None, came=known(0, 3), due=due)  # open: nothing is known yet
    desk_lake.went("late", 1.0, came=due, due=due)
    found = desk_lake.due(1, 6)
    assert [((r["day"] - START).days, r["unit"], r["arm"], r["n"], r["late"]) for r in found] == [
        (4, "t1", "champion", 2, 1.0)
    ]
    assert desk_lake.due(1, 3) == [], (
        "one that was resolved early waits for its due day: the others of that day do, too"
    )


def test_a_due_time_before_the_deadline_belongs_to_the_day_before(desk_lake: LakeHarness) -> None:
    """The decision of day 6 is sent by 06:00 of day 8-1 = 7; a ticket due at 05:59 of day 8 was still in the order of day 6."""
    desk_lake.draw(0, {"t1": "champion"})
    desk_lake.draw(7, {"t1": "holdout"})
    for name, moment in (("a", datetime.combine(at(8), time(5, 59))), ("b", datetime.combine(at(8), time(6)))):
        desk_lake.ticket(name, [5, 6], "t1")
        desk_lake.went(name, 1.0, came=datetime.combine(at(8), time(6)), due=moment)
    found = [((r["day"] - START).days, r["arm"], r["washout"]) for r in desk_lake.due(1, 9)]
    assert found == [(7, "champion", False), (8, "holdout", True)]


def test_without_a_due_time_a_ticket_counts_when_its_outcome_first_became_known_with_the_newest_word(
    desk_lake: LakeHarness,
) -> None:
    desk_lake.draw(0, {"t1": "champion"})
    desk_lake.ticket("x", [0, 1], "t1")
    desk_lake.went("x", 0.0, came=datetime.combine(at(2), time(10)), due=None)
    desk_lake.went("x", 1.0, came=datetime.combine(at(4), time(10)), due=None)
    assert [((r["day"] - START).days, r["late"]) for r in desk_lake.due(1, 3)] == [(2, 0.0)]
    assert [((r["day"] - START).days, r["late"]) for r in desk_lake.due(1, 5)] == [(2, 1.0)]


def test_a_ticket_that_came_and_was_due_within_a_day_is_its_teams_though_nobody_decided_on_it(
    desk_lake: LakeHarness,
) -> None:
    desk_lake.draw(0, {"t1": "champion"})
    desk_lake.ticket("quick", [3], "t1", moment="intake")
    desk_lake.went("quick", 1.0, came=datetime.combine(at(3), time(18)), due=datetime.combine(at(3), time(17)))
    assert [((r["day"] - START).days, r["unit"], r["n"]) for r in desk_lake.due(1, 4)] == [(3, "t1", 1)]


def test_a_day_that_landed_with_nothing_due_is_told_from_one_that_never_landed(desk_lake: LakeHarness) -> None:
    desk_lake.draw(0, {"t1": "champion"})
    desk_lake.ticket("x", [0, 1], "t1")
    for n in (2, 3, 5):  # of day 4 no file came
        desk_lake.went("x", 1.0, came=datetime.combine(at(n), time(10)), due=datetime.combine(at(2), time(9)))
    assert [((r["day"] - START).days, r["n"], r["late"]) for r in desk_lake.seen(1, 6)] == [
        (2, 1, 1.0),
        (3, 0, 0.0),
        (5, 0, 0.0),
    ]


# --- who acts, and since when -----------------------------------------------------------------------------------------


class LedgerHarness:
    """A ledger in which batches and promotions are written at their hours."""

    def __init__(self, folder: Path, workflow: Workflow) -> None:
        self.now, self.workflow = datetime.combine(START, time()), workflow
        self.ledger = Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=KEY, clock=lambda: self.now)

    def moved(self, n: int, version: int, action: str, hour: int = 2) -> None:
        self.now = datetime.combine(at(n), time(hour))
        self.ledger.promotion(self.workflow.name, version, action, "kim", {})

    def batch(
        self,
        n: int,
        version: int | None,
        *,
        step: str = "champion",
        challenger: int | None = None,
        changed: bool = False,
    ) -> str:
        """The batch of day ``n``, recorded at 04:00 of the day after. One that changes something waits for its push."""
        self.now = datetime.combine(at(n + 1), time(4))
        new = NewBatch(
            batch_id=f"b{n}", workflow=self.workflow.name, kind="decision", day=at(n), digest=f"{n}", status="READY", step=step,
            as_of=self.now, decided_at=self.now, run_id="run",
            record={"model_version": version, "challenger_version": challenger},
        )  # fmt: skip
        self.ledger.record_batch(
            new, table([{"entity": "l1", "before": 1, "after": 2 if changed else 1}], new.batch_id)
        )
        return new.batch_id

    def again(self, n: int, version: int, *, hour: int = 6, **record: Any) -> str:
        """Day ``n`` decided anew on the morning of the eighth, with something to change, and never sent."""
        self.now = datetime.combine(at(8), time(hour))
        new = NewBatch(
            batch_id=f"again-{n}-{version}", workflow=self.workflow.name, kind="decision", day=at(n), digest=f"again {n}",
            status="READY", step="champion", as_of=self.now, decided_at=self.now, run_id="run",
            record={"model_version": version, **record},
        )  # fmt: skip
        return self.ledger.record_batch(new, table([{"entity": "l1", "before": 1, "after": 3}], new.batch_id)).batch_id

    def behind(self, n: int, version: int, hour: int = 5) -> None:
        """Outcomes show a version worse than the rule; said at the end of a morning, after its batch."""
        self.now = datetime.combine(at(n), time(hour))
        said = {
            "workflow": self.workflow.name,
            "day": str(at(n - 1)),
            "version": version,
            "text": "it does worse",
            "figures": {},
        }
        self.ledger.note(rule_override.KIND, said)

    def taken_back(self, n: int) -> None:
        self.now = datetime.combine(at(n + 1), time(8))
        self.ledger.rollback_complete(f"b{n}", actor="guard", reason="harm", trigger="guard")

    def compared(self, n: int, **shares: float) -> list[tuple[str, int | None, int]]:
        said = self.workflow
        if shares:
            said = said.model_copy(update={"arms": said.arms.model_copy(update={"shares": shares})})
        found = verdicts.comparisons(said, self.ledger, at(n))
        return [(c.name, c.version, (c.since - START).days) for c in found]

    def verdict(
        self,
        n: int,
        version: int | None,
        since: int,
        verdict: str = "ROLLBACK",
        comparison: str = "champion vs holdout",
    ) -> int:
        self.now = datetime.combine(at(n + 1), time(5))
        return self.ledger.note(
            "verdict",
            {"workflow": self.workflow.name, "comparison": comparison, "version": version, "since": at(since).isoformat(),
             "day": at(n).isoformat(), "verdict": verdict, "reasons": ["it earns less"], "figures": {}, "design": "cohort"},
        )  # fmt: skip

    def condemned(self) -> list[tuple[int | None, tuple[str, ...]]]:
        return [(c.version, c.batches) for c in verdicts.condemned(self.ledger, self.workflow)]


@pytest.fixture
def book(tmp_path: Path, ads_said: Workflow) -> Iterator[LedgerHarness]:
    made = LedgerHarness(tmp_path, ads_said)
    yield made
    made.ledger.close()


def test_the_champion_is_judged_since_its_version_began_to_act(book: LedgerHarness) -> None:
    assert book.compared(9) == []
    book.moved(3, 1, "promoted")
    for n in (3, 4):
        book.batch(n, 1)
    assert book.compared(3) == [], "the batch of a day acts on the next one: there is nothing to see of it yet"
    assert book.compared(4) == [("champion vs holdout", 1, 3)]
    book.moved(6, 2, "promoted", hour=2)
    for n in (5, 6, 7):
        book.batch(n, 2)
    assert book.compared(5) == [("champion vs holdout", 1, 3)], "judged as it stood at that day's cut-off"
    assert book.compared(8) == [("champion vs holdout", 2, 5)]


def test_a_version_spends_what_those_before_it_have_left_of_alpha(book: LedgerHarness) -> None:
    """And neither its own days nor those of other arms count."""
    spec = book.workflow.regression
    assert spec is not None

    def left(version: int, since: int, name: str = "champion vs holdout") -> float:
        one = verdicts.Comparison(name, "champion", "holdout", version, at(since))
        return verdicts._alpha_left(book.workflow, book.ledger, one)

    for n in range(1, 29):
        book.verdict(n, 1, 0, "CONTINUE")
    assert left(1, 0) == spec.alpha == left(2, 28, "challenger vs champion")
    assert left(2, 28) == pytest.approx(spec.alpha * 28 / 365)
    book.verdict(29, 2, 28, "CONTINUE")
    assert left(2, 28) == pytest.approx(spec.alpha * 28 / 365)
    assert left(3, 400) == pytest.approx(spec.alpha)


def test_a_comparison_knows_until_when_it_was_judged_without_harm(book: LedgerHarness) -> None:
    one = verdicts.Comparison("champion vs holdout", "champion", "holdout", 1, at(0))

    def until(day: int) -> int | None:
        found = verdicts._judged(book.workflow, book.ledger, one, at(day))
        return None if found is None else (found - START).days

    assert until(5) is None
    for n in (3, 4, 6):
        book.verdict(n, 1, 0, "CONTINUE")
    book.verdict(5, 1, 0, "CONTINUE", "challenger vs champion")
    assert [until(n) for n in (3, 4, 6, 7)] == [None, 3, 4, 6], "the day itself may be judged again"
    book.verdict(7, 1, 0)
    assert until(9) is None, "a harm that was found is found again"


def test_a_day_that_a_lower_step_decided_interrupts_nothing(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.moved(3, 2, "promoted", hour=3)
    book.batch(3, 2)
    book.batch(4, 1, step="previous_champion")
    book.batch(5, None, step="rule")
    book.batch(6, None, step="no_change")
    book.batch(7, 2)
    assert [book.compared(n) for n in (5, 6, 9)] == [[("champion vs holdout", 2, 3)]] * 3


def test_a_version_that_was_restored_does_not_answer_for_the_one_between(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.batch(3, 1)
    book.moved(5, 2, "promoted")
    book.batch(4, 2)
    book.batch(5, 2)
    book.moved(7, 2, "rolled back")
    book.moved(7, 1, "promoted", hour=3)
    assert book.compared(7) == [], "it acts no more, and its heir has not decided yet"
    book.batch(7, 1)
    assert book.compared(9) == [("champion vs holdout", 1, 7)]


def test_where_no_model_stands_the_rule_is_judged(book: LedgerHarness) -> None:
    book.batch(2, None, step="rule")
    book.batch(3, None, step="rule")
    assert book.compared(5) == [("champion vs holdout", None, 2)]
    book.moved(5, 1, "promoted")
    book.batch(4, 1)
    book.moved(7, 1, "rolled back")
    book.batch(7, None, step="rule")
    assert book.compared(9) == [("champion vs holdout", None, 7)]


def test_days_that_the_champion_left_to_the_rule_are_judged_as_the_rule_s(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    for n in (3, 4):
        book.batch(n, 1)
    book.batch(5, None, step="rule")  # after the deadline: that interrupts nothing
    book.batch(6, 1)
    book.behind(7, 1)
    assert book.compared(7) == [("champion vs holdout", 1, 3)], "what acts today it has decided"
    for n in (7, 8, 9):
        book.batch(n, None, step="rule")
    assert book.compared(7) == [("champion vs holdout", 1, 3)], "judged as it stood at that day's cut-off"
    assert [book.compared(n) for n in (8, 9, 10)] == [[("champion vs holdout", None, 7)]] * 3
    book.moved(11, 1, "rolled back")
    book.batch(10, None, step="rule")
    assert book.compared(12) == [("champion vs holdout", None, 7)], "no model stands now: it is the rule as before"
    assert book.compared(9) == [("champion vs holdout", None, 7)], "judged as it stood at that day's cut-off"


def test_a_version_that_acts_again_after_the_rule_is_judged_anew(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.batch(3, 1)
    book.behind(4, 1)
    for n in (4, 5):
        book.batch(n, None, step="rule")
    book.moved(7, 1, "lifted")
    assert book.compared(7) == [("champion vs holdout", None, 4)], "it has not decided yet"
    for n in (6, 7):
        book.batch(n, 1)
    assert book.compared(9) == [("champion vs holdout", 1, 6)]
    book.batch(8, None, step="rule")
    book.batch(9, 1)
    assert book.compared(10) == [("champion vs holdout", 1, 6)], "the rule decided that day for another reason"
    book.moved(11, 2, "promoted")
    book.batch(10, 2)
    assert book.compared(11) == [("champion vs holdout", 2, 10)]


def test_a_version_that_a_person_lifts_before_the_rule_has_decided_goes_on(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.batch(3, 1)
    book.behind(4, 1)
    book.moved(4, 1, "lifted", hour=9)
    book.batch(4, 1)
    assert book.compared(6) == [("champion vs holdout", 1, 3)]


def test_what_was_not_sent_has_not_acted(book: LedgerHarness) -> None:
    book.batch(3, 1, changed=True)
    assert book.ledger.batch("b3").delivery == "NONE" and book.compared(6) == []
    book.batch(4, 1)
    assert book.compared(6) == [("champion vs holdout", 1, 4)]


def test_a_day_that_is_decided_again_and_not_sent_is_judged_by_what_acted(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    for n in (3, 4, 5):
        book.batch(n, 1)
    book.again(4, 2)
    assert [b.batch_id for b in verdicts._acted(book.workflow, book.ledger, at(8), book.now)] == ["b3", "b4", "b5"]
    assert book.compared(8) == [("champion vs holdout", 1, 3)]


def test_a_challenger_is_judged_beside_the_champion_since_its_canary(book: LedgerHarness) -> None:
    shares = {"holdout": 0.2, "champion": 0.5, "challenger": 0.3}
    book.moved(3, 1, "promoted")
    book.batch(3, 1)
    book.moved(5, 2, "shadow")
    book.batch(4, 1)
    assert book.compared(6, **shares) == [("champion vs holdout", 1, 3)], "a shadow acts on nobody"
    book.moved(6, 2, "canary")
    for n in (5, 6):
        book.batch(n, 1, challenger=2)
    both = [("champion vs holdout", 1, 3), ("challenger vs champion", 2, 5)]
    assert book.compared(8, **shares) == both
    book.moved(8, 2, "put back")  # somebody gave it the alias champion, which went back
    assert book.compared(9, **shares) == both
    assert book.compared(9) == both[:1], "without units in the arm there is nothing to compare"
    book.moved(8, 2, "promoted", hour=3)
    assert book.compared(9, **shares) == both[:1], (
        "no canary any more, and its first batch as champion is still to come"
    )


# --- what a verdict asks for ------------------------------------------------------------------------------------------


def test_a_rollback_stands_until_the_version_and_its_batches_are_taken_back(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.batch(2, 1)
    book.moved(5, 2, "promoted")
    book.batch(4, 2)
    book.batch(5, 2)
    book.verdict(6, 2, 4, "CONTINUE")
    assert book.condemned() == []
    book.verdict(7, 2, 4)
    assert book.condemned() == [(2, ("b4", "b5"))]
    book.verdict(8, 2, 4, "CONTINUE")
    assert book.condemned() == [(2, ("b4", "b5"))], "a verdict once reached is not unsaid by figures that came later"
    book.moved(9, 2, "rolled back")
    book.taken_back(5)
    assert book.condemned() == [(2, ("b4",))], "the model went first; its batches are not all back"
    book.taken_back(4)
    assert book.condemned() == []
    book.verdict(9, 2, 4)
    assert book.condemned() == [], "judged once more before its end was known"


@pytest.mark.parametrize("record", [{}, {"backfill": True}], ids=["a day run again", "a backfill"])
def test_what_was_decided_of_a_past_day_and_never_sent_is_not_to_be_taken_back(
    book: LedgerHarness, record: dict[str, Any]
) -> None:
    book.moved(3, 2, "promoted")
    book.batch(2, 2)
    book.batch(3, 2)
    book.again(2, 2, **record)
    book.verdict(8, 2, 2)
    assert book.condemned() == [(2, ("b2", "b3"))]
    book.moved(9, 2, "rolled back")
    book.taken_back(3)
    book.taken_back(2)
    book.now = known(9)
    assert book.condemned() == [], "nothing of it is left downstream"


def test_without_promotions_the_one_that_acted_last_acts_now(book: LedgerHarness) -> None:
    book.batch(2, 1)
    book.again(3, 2)
    book.verdict(8, 1, 2)
    assert book.condemned() == [(1, ("b2",))]


def test_a_version_that_was_replaced_meanwhile_is_left(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.batch(2, 1)
    book.verdict(5, 1, 2)
    assert book.condemned() == [(1, ("b2",))]
    book.moved(7, 2, "promoted")
    assert book.condemned() == []


def test_a_version_that_was_lifted_and_promoted_anew_stands_under_a_new_verdict_only(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.batch(2, 1)
    first = book.verdict(5, 1, 2)
    book.moved(7, 1, "rolled back")
    book.taken_back(2)
    book.moved(8, 1, "lifted")
    book.moved(8, 1, "promoted", hour=3)
    book.batch(8, 1)
    assert book.condemned() == []
    again = book.verdict(11, 1, 8)
    (one,) = verdicts.condemned(book.ledger, book.workflow)
    assert (one.version, one.batches, one.attempt) == (1, ("b8",), again) and again != first


def test_a_challenger_under_a_rollback_is_condemned_with_the_batches_of_its_canary(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.batch(3, 1)
    book.moved(4, 2, "canary")
    assert book.condemned() == []
    book.verdict(5, 2, 4, comparison="challenger vs champion")
    assert book.condemned() == [(2, ())], "nothing decided by it yet: it is only to be blocked"
    book.batch(5, 1, challenger=2)
    assert book.condemned() == [(2, ("b5",))]
    book.moved(7, 2, "rolled back")
    assert book.condemned() == [(2, ("b5",))], "it was blocked before its next batch; its last one still stands"
    book.taken_back(5)
    assert book.condemned() == []


def test_the_rule_is_condemned_with_its_batches_since_it_began_and_not_with_later_ones(book: LedgerHarness) -> None:
    book.batch(2, None, step="rule")
    book.batch(3, None, step="rule")
    book.verdict(4, None, 2)
    assert book.condemned() == [(None, ("b2", "b3"))]
    book.taken_back(3)
    assert book.condemned() == [(None, ("b2",))]
    book.taken_back(2)
    book.batch(5, None, step="rule")
    assert book.condemned() == []


def test_the_rule_is_condemned_where_it_decides_in_a_champions_place(book: LedgerHarness) -> None:
    book.moved(3, 1, "promoted")
    book.batch(3, 1)
    book.batch(4, None, step="rule")
    book.verdict(5, None, 4)
    assert book.condemned() == [], "the champion acts; the rule stood in for a day"
    book.behind(6, 1)
    book.batch(5, None, step="rule")
    book.batch(6, None, step="rule")
    book.verdict(7, None, 5)
    assert book.condemned() == [(None, ("b5", "b6"))]
    book.moved(8, 2, "promoted", hour=6)
    assert book.condemned() == [], "another version decides: the rule does nothing any more"
    book.moved(9, 1, "promoted")
    assert book.condemned() == [], "a person promoted it anew"


# --- entities that are decided on once --------------------------------------------------------------------------------


def test_an_entity_counts_once_for_the_arm_of_its_decision_when_its_outcome_is_known(
    tmp_path: Path, tickets_said: Workflow
) -> None:
    said = tickets_said.model_copy(
        update={"arms": tickets_said.arms.model_copy(update={"design": "entity", "washout": 0, "unit": "entity_id"})}
    )
    lake = Lake(str(tmp_path / "lake"))
    rows = [
        {"entity_id": e, "decided_day": at(d), "arm": arm, "known_at": came, "late": late, "day": at(n)}
        for e, d, arm, came, late, n in [
            ("a", 3, "champion", datetime.combine(at(5), time(9)), None, 5),
            ("a", 3, "champion", datetime.combine(at(6), time(9)), 0.0, 6),
            ("a", 3, "champion", datetime.combine(at(7), time(9)), 1.0, 7),
            ("b", 3, "holdout", datetime.combine(at(6), time(9)), 1.0, 6),
            ("b", 3, "holdout", known(7, 4), 0.0, 8),  # an hour after the cut-off of day 7
            ("old", 2, "champion", datetime.combine(at(6), time(9)), 1.0, 6),  # decided before it began to act
        ]
    ]
    schema = pa.schema(
        {"entity_id": pa.string(), "decided_day": pa.date32(), "arm": pa.string(), "known_at": pa.timestamp("us"),
         "late": pa.float64(), "day": pa.date32()}
    )  # fmt: skip
    lake.replace(said.table("decision_outcomes"), pa.Table.from_pylist(rows, schema=schema), predicate="true")
    found = observations.entities(said, lake, at(3), known=at(7)).to_pylist()
    assert [(r["unit"], (r["day"] - START).days, r["arm"], r["n"], r["late"]) for r in found] == [
        ("a", 6, "champion", 1, 1.0), ("b", 6, "holdout", 1, 1.0),
    ]  # fmt: skip
    assert {r["unit"]: r["late"] for r in observations.entities(said, lake, at(3), known=at(8)).to_pylist()} == {
        "a": 1.0,
        "b": 0.0,
    }


def test_what_was_decided_on_before_the_comparison_takes_the_week_out_of_its_noise(
    tmp_path: Path, tickets_said: Workflow
) -> None:
    """Tickets late on some weekdays: known from the pre-period, that is no noise of the arms."""
    said = tickets_said.model_copy(
        update={
            "arms": tickets_said.arms.model_copy(
                update={
                    "design": "entity",
                    "unit": "entity_id",
                    "washout": 0,
                    "shares": {"champion": 0.5, "holdout": 0.5},
                }
            )
        }
    )
    assert said.regression is not None
    said = said.model_copy(update={"regression": said.regression.model_copy(update={"pre_days": 14})})
    rng, since = np.random.default_rng(5), 20
    rows = [
        {"entity_id": f"{d}-{i}", "decided_day": at(d), "arm": ("champion", "holdout")[int(rng.integers(2))],
         "known_at": datetime.combine(at(d + 1), time(12)), "late": float(rng.random() < (0.9 if d % 7 < 3 else 0.1)),
         "day": at(d + 1)}
        for d in range(40) for i in range(20)
    ]  # fmt: skip
    schema = pa.schema(
        {"entity_id": pa.string(), "decided_day": pa.date32(), "arm": pa.string(), "known_at": pa.timestamp("us"),
         "late": pa.float64(), "day": pa.date32()}
    )  # fmt: skip
    comparison = verdicts.Comparison("champion vs holdout", "champion", "holdout", 1, at(since))

    def looks(name: str, told: list[dict[str, Any]], day: int) -> list[dict[str, Any]]:
        lake = Lake(str(tmp_path / name))
        lake.replace(said.table("decision_outcomes"), pa.Table.from_pylist(told, schema=schema), predicate="true")
        found: list[dict[str, Any]] = verdicts.judge(said, lake, comparison, at(day)).judgement.looks.to_pylist()
        return found

    def widths(found: list[dict[str, Any]]) -> list[float]:
        return [row["high"] - row["low"] for row in found[-5:]]

    whole, day = looks("whole", rows, 36), at(since - 14)
    alone = looks("alone", [r for r in rows if r["decided_day"] >= at(since)], 36)
    kept = looks("kept", [r for r in rows if r["decided_day"] >= day], 36)
    assert kept == whole, "pre_days of it, and no more"
    assert np.mean(widths(whole)) < 0.75 * np.mean(widths(alone))
    # a word on a ticket of the pre-period that came after the comparison had begun changes no look
    late = [r | {"known_at": datetime.combine(at(30), time(9)), "late": 1.0, "day": at(30)} for r in rows[: since * 20]]
    assert looks("late", rows + late, 36) == whole
