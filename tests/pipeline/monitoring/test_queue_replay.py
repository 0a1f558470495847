"""The replay of a queue through the product's own path: its inputs from lake and ledger, its alert, and what the alert stops."""

from __future__ import annotations

import dataclasses
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from assets import regression as page
from common.page import Picture, Text
from data_checks import regression
from data_checks.regression import matched_test
from data_checks.regression.replay import Difference
from delivery.ledger import Ledger
from orchestration import automation
from pipeline import dispatch
from pipeline.lake import Lake
from pipeline.lifecycle import hold
from pipeline.monitoring import queue_replay, verdicts
from pipeline.workflow import FOLDER, load
from tests.support.ledgers import KEY
from tests.support.ticket_desk import TicketDeskHarness

HALF = {"holdout": 0.5, "champion": 0.5}


def test_a_harmful_order_is_on_hold_within_the_week_and_taken_back_later(tmp_path: Path) -> None:
    desk = TicketDeskHarness(tmp_path, "harmful", seed=2, shares={"holdout": 0.25, "champion": 0.75})
    judged = None
    for n in range(7):
        day = desk.live()
        judged = desk.judge(day) if n >= 4 else None
        if judged is not None and judged.verdict == "HOLD":
            break
    assert judged is not None and judged.verdict == "HOLD", judged
    assert "alert, no finding" in judged.text and (judged.day - desk.first).days <= 7
    held = hold.standing(desk.ledger, desk.workflow.name)
    assert set(held) == {1} and "signalbox lift" in held[1].text

    # nothing more of it is sent: neither by the sensor nor by hand
    while desk.day < desk.first + timedelta(days=8):
        day = desk.live()
    now = desk.clock.now
    (waits,) = dispatch.open_batches(desk.ledger, desk.workflow, now)
    assert automation.delivery_requests(desk.workflow, desk.ledger, now) == []
    found = dispatch.deliver(
        desk.workflow, desk.ledger, None, waits, run_id="r", clock=desk.clock, sleep=lambda s: None,  # type: ignore[arg-type]
    )  # fmt: skip
    assert found.report is None and "is on hold" in found.said and not desk.ledger.batch(waits.batch_id).acted

    # half of the teams are held out from the next epoch on
    assert day == desk.first + timedelta(days=7) and desk.held_out(day) == 6
    assert desk.held_out(desk.first) == 3

    # a person lets it go on, and the exact test finds the harm
    desk.ledger.promotion(desk.workflow.name, 1, "lifted", "anna", {"reason": "we look on"})
    assert hold.standing(desk.ledger, desk.workflow.name) == {}
    for n in range(12):
        day = desk.live()
        judged = desk.judge(day) if n >= 3 else None
        if judged is not None and judged.verdict == "ROLLBACK":
            break
    assert judged is not None and judged.verdict == "ROLLBACK", judged
    assert [c.version for c in verdicts.condemned(desk.ledger, desk.workflow)] == [1]
    said, picture = page.replay_parts(judged)
    assert isinstance(said, Text) and said.title.startswith("The queue served anew")
    assert isinstance(picture, Picture) and picture.image[:4] == b"\x89PNG"


def test_an_honest_order_is_neither_held_nor_taken_back(tmp_path: Path) -> None:
    desk = TicketDeskHarness(tmp_path, "honest", seed=2, shares=HALF)
    for _ in range(9):
        day = desk.live()
    judged = desk.judge(day)
    assert judged is not None and judged.verdict == "CONTINUE", judged
    assert judged.replay is not None and len(judged.replay.looks) >= 4
    assert {look.alert for look in judged.replay.looks} == {"CONTINUE"}


# --- the inputs, piece by piece ---------------------------------------------------------------------------------------

MONDAY = date(2026, 4, 6)


def on(n: int) -> date:
    return MONDAY + timedelta(days=n)


def orders(*rows: tuple[str, int, float]) -> pa.Table:
    """entity, day, value."""
    return pa.table(
        {
            "entity_id": pa.array([r[0] for r in rows], pa.string()),
            "decided_day": pa.array([on(r[1]) for r in rows], pa.date32()),
            "value": pa.array([r[2] for r in rows], pa.float64()),
        }
    )


def test_what_people_wanted_is_what_stood_before_us_until_they_change_it() -> None:
    # we set 3 to 1, then to 2; a person sets 5, which we lower to 4
    said = [("a", 0, 3, 1), ("a", 1, 1, 2), ("a", 2, 5, 4), ("a", 3, 4, 4), ("b", 1, 2, 2), ("b", 2, 2, 2)]
    decided = pa.table(
        {
            "entity_id": [s[0] for s in said], "decided_day": pa.array([on(s[1]) for s in said], pa.date32()),
            "before": [s[2] for s in said], "standing": [s[3] for s in said],
        }
    )  # fmt: skip
    found = queue_replay._usual(decided.take([3, 5, 0, 4, 2, 1]))
    assert found["value"].to_pylist() == [3, 3, 5, 5, 2, 2]


def test_what_would_stand_is_what_was_asked_last_unless_people_changed_their_mind() -> None:
    previous = pa.table({"entity_id": ["a", "b"], "value": [1.0, 1.0], "usual": [3.0, 3.0]})
    today = orders(("a", 1, 3.0), ("b", 1, 5.0), ("c", 1, 2.0))
    assert queue_replay._carried(today, previous).tolist() == [1.0, 5.0, 2.0]
    assert queue_replay._carried(today, None).tolist() == [3.0, 5.0, 2.0]


def test_a_decision_holds_from_the_next_day_on_and_before_the_first_what_people_gave() -> None:
    names = pa.array(["a", "b", "c"])
    told = orders(("a", 0, 1.0), ("a", 2, 2.0), ("b", -5, 4.0), ("b", -9, 5.0), ("gone", 0, 9.0))
    found = queue_replay._by_day(names, told, on(0), 4, np.array([3.0, 3.0, 3.0]))
    assert found[:, 0].tolist() == [3, 1, 1, 2]
    assert found[:, 1].tolist() == [4, 4, 4, 4], "the newest of what was decided before the first day"
    assert found[:, 2].tolist() == [3, 3, 3, 3]


def test_hands_are_those_seen_at_work_on_a_day_on_which_the_unit_worked() -> None:
    def at(day: int, hour: int) -> datetime:
        return datetime.combine(on(day), time(hour))

    rows = [
        ("t", "u", "ann", at(0, 8), at(0, 12)),
        ("t", "u", "ann", at(0, 13), at(0, 15)),
        ("s", "u", "bob", at(0, 9), at(3, 10)),  # works on through days 1 and 2, and only on 1 did anybody else
        ("r", "u", "ann", at(1, 8), None),
        ("q", "v", "eve", at(2, 8), at(2, 9)),
    ]
    work = pa.Table.from_pylist([dict(zip(queue_replay.WORK.names, r, strict=True)) for r in rows], queue_replay.WORK)
    found = queue_replay._hands(work)
    assert found == {("u", on(0)): 2, ("u", on(1)): 2, ("u", on(3)): 2, ("v", on(2)): 1}


def told(alert: str, **more: Any) -> queue_replay.Told:
    effect = Difference(0.1, 0.1, 0.01, 0.01, 0.1, 0.01)
    look = matched_test.Look(5.0, alert, ("as it is",), effect, 0.0, 3.0, 2.0, 0.1)  # type: ignore[arg-type]
    return queue_replay.Told((look,), **more)


@pytest.mark.parametrize(
    ("said", "found", "verdict"),
    [
        ("CONTINUE", told("ROLLBACK"), "ROLLBACK"),
        ("PROMOTE", told("ROLLBACK"), "ROLLBACK"),
        ("CONTINUE", told("HOLD"), "HOLD"),
        ("INCONCLUSIVE", told("HOLD"), "HOLD"),
        ("PROMOTE", told("HOLD"), "PROMOTE"),
        ("ROLLBACK", told("HOLD"), "ROLLBACK"),
        ("NO_DATA", told("HOLD"), "NO_DATA"),
        ("NO_DATA", told("ROLLBACK"), "NO_DATA"),
        ("CONTINUE", told("HOLD", answered=True), "CONTINUE"),
        ("CONTINUE", told("ROLLBACK", answered=True), "ROLLBACK"),
        ("CONTINUE", queue_replay.Told(why_none="no roster"), "CONTINUE"),
    ],
)
def test_a_replay_adds_a_rollback_or_an_alert_and_takes_nothing_away(
    said: Any, found: queue_replay.Told, verdict: str
) -> None:
    judgement = regression.Judgement(said, ("by outcomes",), regression.LOOKS.empty_table(), {}, {"ok": True})
    one = verdicts.Comparison("champion vs holdout", "champion", "holdout", 1, MONDAY)
    made = verdicts._with_replay(judgement, found, one)
    assert made.verdict == verdict and made.figures["replay"]["verdict"] == found.verdict
    assert any("as it is" in r or "no roster" in r for r in made.reasons)
    # nothing is concluded from arms that are not as drawn, and the rule is put on no hold
    crooked = dataclasses.replace(judgement, sample_ratio={"ok": False})
    assert verdicts._with_replay(crooked, found, one).verdict == said
    rule = verdicts._with_replay(judgement, found, dataclasses.replace(one, version=None))
    assert rule.verdict == (said if verdict == "HOLD" else verdict)


def test_without_a_roster_there_is_no_verdict_and_the_page_says_why(tmp_path: Path) -> None:
    said = load(FOLDER / "ticket_priority")
    assert said.regression is not None and said.regression.replay is not None
    bare = said.regression.replay.model_copy(update={"work": None})
    workflow = said.model_copy(update={"regression": said.regression.model_copy(update={"replay": bare})})
    lake = Lake(str(tmp_path / "lake"))
    given: dict[str, Any] = {"treated": "champion", "since": MONDAY, "day": on(9), "alpha": 0.05, "seed": 1}
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY) as ledger:
        found = queue_replay.judge(workflow, lake, ledger, control="holdout", **given)
        canary = queue_replay.judge(said, lake, ledger, control="champion", **given)
    assert found.verdict == canary.verdict == "INCONCLUSIVE" and not found.looks
    assert "no roster" in found.why_none and "status quo" in canary.why_none
    one = verdicts.Comparison("champion vs holdout", "champion", "holdout", 1, MONDAY)
    judgement = regression.Judgement("CONTINUE", (), regression.LOOKS.empty_table(), {}, {"ok": True})
    (shown,) = page.replay_parts(verdicts.Judged(one, on(9), judgement, found))
    assert (
        isinstance(shown, Text)
        and shown.lines[0] == "There is no verdict by replay."
        and "no roster" in str(shown.lines[1])
    )
    assert page.replay_parts(verdicts.Judged(one, on(9), judgement)) == []
