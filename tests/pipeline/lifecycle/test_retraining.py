"""Why a retraining is asked for, what holds it back, and that every trigger comes to exactly one end in the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_checks.performance import SCHEMA
from delivery.ledger import Ledger
from pipeline.lake import Lake
from pipeline.lifecycle import retraining, rule_override
from pipeline.lifecycle.retraining import ORDER, Cause, Evidence, Runs, Trigger, decide, evidence
from pipeline.workflow import FOLDER, Retraining, Workflow, load
from tests.support.properties import examples
from tests.support.retraining_walk import Walk

DAY = date(2026, 4, 10)
NOW = datetime(2026, 4, 11, 5)
SPEC = Retraining(cooldown_days=7, budget=8, budget_days=30, retry_hours=6, attempts=3)


def ago(days: int) -> date:
    return DAY - timedelta(days=days)


def fell(kind: str, worse_low: float | None, **more: Any) -> dict[str, Any]:
    row = dict.fromkeys(SCHEMA.names)
    return row | {
        "day": DAY, "first": ago(18), "last": ago(12), "metric": "brier", "kind": kind, "value": 0.2, "low": 0.19,
        "high": 0.21, "baseline": 0.15, "baseline_is": "gate", "worse": 0.3, "worse_low": worse_low, "n": 900, "version": 4,
        "text": f"{kind} brier 0.2",
    } | more  # fmt: skip


def drifted(features: bool = False, scores: bool | None = False) -> dict[str, Any]:
    return {"day": DAY, "drifted": features, "scores_drifted": scores, "share": 0.4, "text": "3 of 7 columns drifted"}


def one(cause: Cause = "features", day: date = DAY) -> dict[date, Sequence[Evidence]]:
    return {day: [Evidence(cause, day - timedelta(days=6), "it moved")]}


def ask(
    found: Mapping[date, Sequence[Evidence]],
    *,
    past: Sequence[Trigger] = (),
    runs: Runs = Runs(),
    spec: Retraining = SPEC,
    now: datetime = NOW,
    judged: date | None = None,
) -> list[Trigger]:
    return decide("w", spec, found, judged=judged or max(found, default=DAY), past=past, runs=runs, now=now)


def only(made: list[Trigger]) -> Trigger:
    (trigger,) = made
    return trigger


def trained(*days: date) -> Runs:
    return Runs(frozenset(days))


# --- the order of evidence --------------------------------------------------------------------------------------------


def test_each_evidence_beats_the_next_and_all_of_it_is_kept() -> None:
    rows = [fell("estimated", 0.25), fell("realised", 0.15), fell("rule", 0.01)]
    everything = (*evidence(SPEC, "brier", rows, drifted(True, True), back=7), retraining.calendar(DAY))
    assert [e.cause for e in everything] == ["rule", "realised", "estimated", "scores", "features", "calendar"]
    assert list(ORDER) == [*(e.cause for e in everything), "person"]
    for n, strongest in enumerate(everything):
        trigger = only(ask({DAY: list(reversed(everything[n:]))}))
        assert trigger.cause == strongest.cause and trigger.action == "asked"
        assert [e.cause for e in trigger.evidence] == [e.cause for e in everything[n:]]
        assert list(trigger.body()["evidence"]) == [e.cause for e in everything[n:]]
        assert trigger.window == (strongest.first, DAY)


@pytest.mark.parametrize(
    ("row", "speaks"),
    [
        (fell("realised", 0.11), True),
        (fell("realised", 0.1), False),  # the limit itself is not passed
        (fell("realised", None), False),  # no interval, no verdict
        (fell("realised", 0.5, metric="roc_auc"), False),  # another metric
        (fell("realised", 0.5, first=ago(12)), False),  # a day's figure, not a window's
        (fell("estimated", 0.15), False),  # an estimate must say more
        (fell("estimated", 0.21), True),
    ],
)
def test_a_fall_counts_by_the_near_end_of_its_interval(row: dict[str, Any], speaks: bool) -> None:
    assert bool(evidence(SPEC, "brier", [row], None)) is speaks


def test_evidence_says_what_it_rests_on() -> None:
    (fall,) = evidence(SPEC, "brier", [fell("realised", 0.15)], drifted())
    assert fall.figures["baseline_is"] == "gate" and fall.figures["version"] == 4 and fall.first == ago(18)
    assert "limit is 10.0%" in fall.text
    (scores,) = evidence(SPEC, "brier", [], drifted(scores=True) | {"importance_share": 0.7}, back=7)
    assert (
        scores.cause == "scores"
        and scores.figures == {"share": 0.4, "importance_share": 0.7}
        and scores.first == ago(6)
    )
    old = {k: v for k, v in drifted(True).items() if k != "scores_drifted"}
    assert [e.cause for e in evidence(SPEC, "brier", [], old)] == ["features"], "a table from before there was a column"


def test_the_newest_judged_day_speaks_and_what_is_a_window_old_does_not() -> None:
    found = {**one(day=ago(3)), **one("realised", ago(5)), **one(day=ago(7))}
    made = ask(found, judged=DAY)
    assert {t.day: t.action for t in made} == {ago(5): "merged", ago(3): "asked"}
    assert str(ago(3)) in made[0].reason
    assert ask(one(day=ago(7)), judged=DAY) == []


# --- what holds back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days_ago", "action"), [(-1, "merged"), (0, "merged"), (1, "cooling"), (6, "cooling"), (7, "asked")]
)
def test_the_cooldown_counts_from_the_newest_training(days_ago: int, action: str) -> None:
    trigger = only(ask(one(), runs=trained(ago(30), ago(days_ago))))
    assert trigger.action == action
    if action == "cooling":
        assert "cooldown is 7 days" in trigger.reason


def test_a_realised_fall_may_have_a_shorter_cooldown() -> None:
    spec = SPEC.model_copy(update={"realised_cooldown_days": 2})
    assert only(ask(one("realised"), runs=trained(ago(2)), spec=spec)).action == "asked"
    assert only(ask(one("realised"), runs=trained(ago(1)), spec=spec)).action == "cooling"
    assert only(ask(one("estimated"), runs=trained(ago(2)), spec=spec)).action == "cooling"
    assert only(ask(one("realised"), runs=trained(ago(2)))).action == "cooling"


def test_a_stronger_evidence_of_the_same_day_comes_up_again_and_an_equal_one_does_not() -> None:
    spec = SPEC.model_copy(update={"realised_cooldown_days": 2})
    cooling = only(ask(one(), runs=trained(ago(3)), spec=spec))
    assert ask(one(), past=[cooling], runs=trained(ago(3)), spec=spec) == []
    stronger = only(ask({DAY: [*one()[DAY], *one("realised")[DAY]]}, past=[cooling], runs=trained(ago(3)), spec=spec))
    assert stronger.action == "asked" and stronger.cause == "realised"
    assert ask({DAY: one("realised")[DAY]}, past=[cooling, stronger], runs=trained(ago(3)), spec=spec) == []


def test_the_budget_counts_days_that_were_trained_or_asked_for() -> None:
    spec = SPEC.model_copy(update={"budget": 3, "budget_days": 30})
    days = [ago(10), ago(20), ago(29)]
    full = only(ask(one(), runs=trained(*days), spec=spec))
    assert full.action == "over budget" and "3 trainings" in full.reason and "a person may" in full.reason
    assert only(ask(one(), runs=trained(ago(10), ago(20), ago(30)), spec=spec)).action == "asked", "one of them is past"
    past = [only(ask(one(day=d), judged=d)) for d in days]
    assert only(ask(one(), runs=trained(ago(10)), past=past, spec=spec)).action == "over budget", "a day counts once"
    failed = Runs(frozenset({ago(20)}), frozenset(), frozenset({ago(10)}))
    assert only(ask(one(), runs=failed, past=past, spec=spec)).action == "asked", "what failed was no training"


def test_a_trigger_that_fires_while_a_training_runs_is_merged_and_not_lost() -> None:
    first = only(ask(one(day=ago(1))))
    assert first.action == "asked"
    running = Runs(running=frozenset({ago(1)}))
    assert ask(one(day=ago(1)), past=[first], runs=running) == [], "its own run is not another trigger"
    second = only(ask(one("estimated"), past=[first], runs=running))
    assert second.action == "merged" and str(ago(1)) in second.reason
    assert ask(one("estimated"), past=[first, second], runs=running) == []
    # the run ends and had seen less than the trigger: it is asked for, whatever the cooldown, even with no new evidence
    third = only(ask({}, judged=DAY, past=[first, second], runs=trained(ago(1))))
    assert third.action == "asked" and third.window == second.window and third.evidence == second.evidence
    assert "had not seen it" in third.reason
    assert ask({}, judged=DAY, past=[first, second, third], runs=Runs(frozenset({ago(1)}), frozenset({DAY}))) == []
    assert ask({}, judged=DAY, past=[first, second, third], runs=trained(ago(1), DAY)) == []


def test_a_merged_trigger_is_answered_by_a_training_that_saw_its_days() -> None:
    merged = only(ask(one(), runs=Runs(running=frozenset({DAY}))))
    assert merged.action == "merged"
    assert ask(one(), past=[merged], runs=trained(DAY)) == []
    assert only(ask(one(), past=[merged], runs=Runs(failed=frozenset({DAY})))).action == "asked", (
        "a failed one saw nothing"
    )


def test_a_merged_trigger_still_keeps_to_the_budget() -> None:
    spec = SPEC.model_copy(update={"budget": 1})
    merged = only(ask(one(), runs=Runs(frozenset({ago(9)}), frozenset({ago(1)}))))
    over = only(ask({}, judged=DAY, past=[merged], runs=trained(ago(9), ago(1)), spec=spec))
    assert over.action == "over budget"
    assert ask({}, judged=DAY, past=[merged, over], runs=trained(ago(9), ago(1)), spec=spec) == []


def test_of_several_merged_triggers_the_newest_speaks_for_all() -> None:
    spec = SPEC.model_copy(update={"budget": 1})
    running = Runs(frozenset({ago(9)}), frozenset({ago(2)}))
    merged = ask({**one(day=ago(1)), **one()}, runs=running)
    assert [t.action for t in merged] == ["merged", "merged"]
    ended = trained(ago(9), ago(2))
    assert only(ask({}, judged=DAY, past=merged, runs=ended)).day == DAY
    over = only(ask({}, judged=DAY, past=merged, runs=ended, spec=spec))
    assert (over.day, over.action) == (DAY, "over budget")
    assert ask({}, judged=DAY, past=[*merged, over], runs=ended, spec=spec) == []


def test_stronger_evidence_of_a_day_that_was_asked_for_adds_nothing() -> None:
    first = only(ask(one()))
    assert ask({DAY: [*one()[DAY], *one("realised")[DAY]]}, past=[first]) == []


# --- attempts and keys ------------------------------------------------------------------------------------------------


def test_a_failed_training_is_asked_for_again_after_a_while_and_not_for_ever() -> None:
    past = [only(ask(one()))]
    failed = Runs(failed=frozenset({DAY}))
    for attempt in (2, 3):
        last = past[-1].at
        assert last is not None
        assert ask(one(), past=past, runs=failed, now=last + timedelta(hours=5.9)) == []
        past += ask(one(), past=past, runs=failed, now=last + timedelta(hours=6))
        assert past[-1].attempt == attempt and past[-1].action == "asked" and "failed" in past[-1].reason
    assert ask(one(), past=past, runs=failed, now=NOW + timedelta(days=3)) == []
    assert len({t.run_key for t in past}) == 3
    lost = only(ask(one(), past=past[:1], now=NOW + timedelta(hours=6)))
    assert "did not come about" in lost.reason


def test_what_its_gate_refused_is_asked_for_again_after_the_cooldown_and_not_for_ever() -> None:
    past = [only(ask(one("features")))]
    for attempt in (2, 3):
        old = past[-1].day
        refused = Runs(frozenset({old}), refused=frozenset({old}))
        assert ask({}, judged=old + timedelta(days=6), past=past, runs=refused) == []
        assert ask({}, judged=old + timedelta(days=7), past=past, runs=trained(old)) == [], (
            "one that passed is answered"
        )
        again = only(ask({}, judged=old + timedelta(days=7), past=past, runs=refused))
        assert (again.action, again.cause, again.attempt, again.day) == (
            "asked",
            "features",
            attempt,
            old + timedelta(days=7),
        )
        assert again.window == (ago(6), again.day) and f"trained for {old} was refused" in again.reason
        assert again.evidence[0].text == f"it moved (said on {DAY})"
        past.append(again)
    refused = Runs(frozenset({past[-1].day}), refused=frozenset({past[-1].day}))
    assert ask({}, judged=past[-1].day + timedelta(days=30), past=past, runs=refused) == []
    assert len({t.run_key for t in past}) == 3


def test_a_refused_training_keeps_to_the_budget_and_says_so_once() -> None:
    past, refused = [only(ask(one("features")))], Runs(frozenset({DAY}), refused=frozenset({DAY}))
    tight = SPEC.model_copy(update={"budget": 1})
    over = only(ask({}, judged=DAY + timedelta(days=7), past=past, runs=refused, spec=tight))
    assert over.action == "over budget"
    assert ask({}, judged=DAY + timedelta(days=8), past=[*past, over], runs=refused, spec=tight) == []


@pytest.mark.parametrize("cause", ["calendar", "person"])
def test_what_was_asked_for_without_evidence_is_not_asked_for_again_when_refused(cause: Cause) -> None:
    past, refused = [only(ask(one(cause)))], Runs(frozenset({DAY}), refused=frozenset({DAY}))
    assert ask({}, judged=DAY + timedelta(days=7), past=past, runs=refused) == []


def test_a_run_key_carries_the_window_and_the_attempt() -> None:
    trigger = only(ask(one("scores")))
    assert trigger.run_key == f"w:retrain:scores:{ago(6)}:{DAY}:1"
    later = only(ask(one("scores", DAY + timedelta(days=7)), past=[trigger], runs=trained(DAY)))
    assert later.action == "asked" and later.run_key != trigger.run_key


def test_what_a_person_started_is_recorded_counts_and_is_not_repeated_for_them() -> None:
    made = retraining.by_people("w", Runs(frozenset({ago(2)}), frozenset({ago(1)})), [], NOW)
    assert [(t.day, t.cause, t.action) for t in made] == [(ago(2), "person", "asked"), (ago(1), "person", "asked")]
    assert retraining.by_people("w", trained(ago(2)), made, NOW) == []
    failed = Runs(failed=frozenset({ago(1), ago(2)}))
    assert ask({}, judged=DAY, past=made, runs=failed, now=NOW + timedelta(days=1)) == []


# --- the ledger -------------------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=b"k" * 16, clock=lambda: NOW) as ledger:
        yield ledger


@pytest.fixture(scope="module")
def workflow() -> Workflow:
    return load(FOLDER / "ticket_priority")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def store(lake: Lake, drift: dict[date, bool], falls: Mapping[date, float] | None = None) -> None:
    rows = [{"day": d, "drifted": x, "text": f"columns on {d}"} for d, x in drift.items()]
    schema = pa.schema({"day": pa.date32(), "drifted": pa.bool_(), "text": pa.string()})
    lake.replace_days("ticket_priority/drift", pa.Table.from_pylist(rows, schema=schema), list(drift))
    for day, near in (falls or {}).items():
        table = pa.Table.from_pylist([fell("realised", near, day=day)], schema=SCHEMA)
        lake.replace_days("ticket_priority/performance", table, [day])


def test_a_trigger_comes_back_from_the_ledger_as_it_went_in(book: Ledger) -> None:
    made = only(ask({DAY: evidence(SPEC, "brier", [fell("realised", 0.15)], drifted(True), back=7)}))
    retraining.record(book, [made])
    assert retraining.past(book, "w") == [made] and retraining.past(book, "other") == []
    (event,) = book.events("trigger", "w")
    assert {k: event.body[k] for k in ("workflow", "day", "cause", "action", "window")} == {
        "workflow": "w", "day": "2026-04-10", "cause": "realised", "action": "asked", "window": ["2026-03-23", "2026-04-10"]
    }  # fmt: skip
    assert book.verify().ok


def test_a_look_reads_what_is_stored_and_records_each_trigger_once(
    workflow: Workflow, lake: Lake, book: Ledger
) -> None:
    def look(**runs: frozenset[date]) -> list[Trigger]:
        return retraining.look(workflow, lake, book, runs=Runs(**runs), now=NOW)

    assert look() == [] and book.events("trigger") == []
    store(lake, {ago(1): False, DAY: True}, {DAY: 0.3})
    assert only(look()).cause == "realised"
    assert look() == [] and len(book.events("trigger")) == 1
    (kept,) = retraining.past(book, workflow.name)
    assert [e.cause for e in kept.evidence] == ["realised", "features"] and kept.evidence[1].first == ago(6)


def test_a_training_set_of_a_failed_run_is_no_training(workflow: Workflow, lake: Lake, book: Ledger) -> None:
    table = pa.table({"as_of": pa.array([ago(2)], pa.date32()), "entity_id": ["a"]})
    lake.replace("ticket_priority/training_set", table, predicate=f"as_of = '{ago(2)}'", partition_by=["as_of"])
    store(lake, {DAY: True})
    assert only(retraining.look(workflow, lake, book, runs=Runs(), now=NOW)).action == "cooling"
    store(lake, {DAY + timedelta(days=1): True})
    failed = Runs(failed=frozenset({ago(2)}))
    made = retraining.look(workflow, lake, book, runs=failed, now=NOW)
    assert [t.action for t in made] == ["asked"]


def test_the_ledger_says_which_training_was_refused(workflow: Workflow, lake: Lake, book: Ledger) -> None:
    store(lake, {DAY: True})
    name, later = workflow.name, DAY + timedelta(days=7)
    assert only(retraining.look(workflow, lake, book, runs=Runs(), now=NOW)).action == "asked"
    book.promotion(name, 2, "refused", "signalbox", {"figures": {}, "verdict": ["worse"], "day": str(DAY)})
    store(lake, {later: False})
    assert only(retraining.look(workflow, lake, book, runs=trained(DAY), now=NOW)).day == later
    book.promotion(name, 3, "shadow", "signalbox", {"figures": {}, "verdict": ["better"], "day": str(DAY)})
    assert retraining.look(workflow, lake, book, runs=trained(DAY), now=NOW + timedelta(minutes=1)) == []


def test_a_champion_behind_the_rule_goes_on_asking_until_another_is_promoted_or_a_person_lifts_it(
    workflow: Workflow, lake: Lake, tmp_path: Path
) -> None:
    """Its days have left the window long ago: no figure says it any more."""
    at, name = [datetime.combine(ago(40), time())], workflow.name
    with Ledger.open(f"sqlite:///{tmp_path / 'other.db'}", key=b"k" * 16, clock=lambda: at[0]) as book:

        def look(n: int, seen: int = 30) -> list[Trigger]:
            """The morning after the day ``n`` days ago, with a training ``seen`` days ago."""
            store(lake, {ago(n): False})
            at[0] = workflow.cutoff_of(ago(n)) + timedelta(hours=1)
            return retraining.look(workflow, lake, book, runs=trained(ago(seen)), now=at[0])

        book.promotion(name, 4, "promoted", "signalbox", {})
        assert look(20) == []
        said = {
            "workflow": name,
            "day": str(ago(20)),
            "version": 4,
            "text": "version 4 does worse",
            "figures": {"n": 300},
        }
        book.note(rule_override.KIND, said)
        made = look(19)
        assert [(t.cause, t.action, t.day) for t in made] == [("rule", "asked", ago(19))], (
            "not of a day that did not know it"
        )
        (found,) = made[0].evidence
        assert found.figures == {"n": 300, "version": 4} and found.text.endswith("UTC: version 4 does worse")
        assert [t.action for t in look(18, seen=19)] == ["cooling"]
        assert only([t for t in look(10, seen=19) if t.day == ago(10)]).action == "asked", "the cooldown is over"
        store(lake, {ago(2): False})
        at[0] = workflow.cutoff_of(ago(2)) + timedelta(hours=1)
        book.promotion(name, 4, "lifted", "ann", {})
        at[0] += timedelta(hours=1)
        made = retraining.look(workflow, lake, book, runs=trained(ago(10)), now=at[0])
        assert made == [], "it stood at that day's cut-off, and nothing is asked for any more"
        assert look(1, seen=10) == []


def test_a_walk_asks_day_by_day_as_the_sensor_would() -> None:
    walk = Walk("w", SPEC, "brier", trained=[ago(3)])
    asked = []
    for n in range(30):
        day = DAY + timedelta(days=n)
        rows = pa.Table.from_pylist([fell("realised", 0.2, day=day)] if n == 20 else [], schema=SCHEMA)
        if walk.step(day, rows, drifted(n < 12) | {"day": day}):
            asked.append(n)
    # trained three days before: four days of cooldown are left; then drift, then the fall nine days after that
    assert asked == [4, 11, 20]
    assert Counter(t.action for t in walk.past) == {"asked": 3, "cooling": 10} and len({t.day for t in walk.past}) == 13


# --- every trigger comes to one end -----------------------------------------------------------------------------------

CAUSES: list[Cause] = ["realised", "estimated", "scores", "features"]
DAILY = st.tuples(
    st.sets(st.sampled_from(CAUSES)),
    st.sampled_from(["runs on", "succeeds", "fails", "is refused"]),
    st.integers(1, 3),  # looks a day
    st.booleans(),  # a person trains
)


@settings(max_examples=examples(150))
@given(st.lists(DAILY, min_size=1, max_size=25), st.integers(1, 4), st.integers(0, 5))
def test_every_trigger_that_fires_comes_to_exactly_one_end(
    days: list[tuple[set[Cause], str, int, bool]], budget: int, cooldown: int
) -> None:
    """Whatever fires, runs, fails, and however often one looks: each window has one record of each attempt, merged ones are
    answered or asked for, and nothing runs twice or over budget."""
    spec = SPEC.model_copy(
        update={"budget": budget, "cooldown_days": cooldown, "realised_cooldown_days": cooldown // 2}
    )
    past: list[Trigger] = []
    done, failed, running, refused = set[date](), set[date](), set[date](), set[date]()
    found: dict[date, tuple[Evidence, ...]] = {}
    for n, (causes, fate, looks, person) in enumerate(days):
        day = DAY + timedelta(days=n)
        found[day] = tuple(Evidence(c, day, c) for c in causes)
        if person:
            done.add(day)
        for look in range(looks):
            now = datetime.combine(day + timedelta(days=1), datetime.min.time()) + timedelta(hours=7 * look)
            runs = Runs(frozenset(done), frozenset(running), frozenset(failed - done - running), frozenset(refused))
            past += retraining.by_people("w", runs, past, now)
            made = decide("w", spec, found, judged=day, past=past, runs=runs, now=now)
            asked = [t for t in made if t.action == "asked"]
            assert len(asked) <= 1 and (not asked or not running), "one training at a time"
            for trigger in asked:
                used = {d for d in done if trigger.day - timedelta(days=30) < d <= trigger.day} - {trigger.day}
                assert len(used) < budget or trigger.attempt > 1
                running.add(trigger.day)
            past += made
            assert (
                decide("w", spec, found, judged=day, past=past, runs=replace(runs, running=frozenset(running)), now=now)
                == []
            )
            if fate != "runs on":
                (failed if fate == "fails" else done).update(running)
                refused.update(running if fate == "is refused" else ())
                running.clear()
        if causes:
            assert day in {t.day for t in past}, "nothing that fired goes unrecorded"
    assert len({t.run_key for t in past if t.action == "asked"}) == sum(t.action == "asked" for t in past)
    ends = Counter((t.day, t.cause, t.action, t.attempt) for t in past)
    assert set(ends.values()) <= {1}, "each end of a window stands once"
    for day in {t.day for t in past}:
        mine = [t.action for t in past if t.day == day]
        assert mine == sorted(mine, key=["cooling", "over budget", "merged", "asked"].index) or "merged" in mine
        assert mine.count("merged") <= 1
    # let everything come to its end: what was merged is answered by a training that saw it, or the budget is spent
    last = max(found)
    later = datetime.combine(last + timedelta(days=2), datetime.min.time())
    done |= running
    for _ in range(len(days) + 3):
        runs = Runs(frozenset(done), frozenset(), frozenset(failed - done), frozenset(refused))
        made = decide("w", spec, found, judged=last, past=past, runs=runs, now=later)
        past += made
        done |= {t.day for t in made if t.action == "asked"}
    newest = max(done, default=date.min)
    for day in {t.day for t in past if t.action == "merged"}:
        latest = [t for t in past if t.day == day][-1]
        younger = {t.action for t in past if t.day > day}
        exhausted = any(t.action == "asked" and t.attempt >= spec.attempts for t in past if t.day >= day)
        assert newest >= day or latest.action == "over budget" or "over budget" in younger or exhausted
