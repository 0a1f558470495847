"""What sends a batch, and what takes one back, unattended: when it does, when it waits, and under which key it asks again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.resources import resources
from delivery import approvals
from delivery.abort_rules import Finding
from orchestration import assembly
from orchestration.automation import RETRY_MINUTES, delivery_requests, guard_requests, open_rollbacks, unattended
from pipeline import dispatch
from pipeline.workflow import FOLDER, Workflow, load
from tests.support.desks import KEY, PushHarness
from tests.support.fakes import DAY, START

NAME = "ad_budget"
SECRET = "nobody else's secret"
ENTITIES = {f"line-{n}": 100 for n in range(6)}
HIGHER = dict.fromkeys(ENTITIES, 120)
OVER = datetime.combine(DAY + timedelta(days=2), datetime.min.time())
"""When the day that a batch of DAY takes effect on has ended."""
REJECTED = Finding("max_rejected_share", 0.2, 0.5, True, "10 of 20 tried deliveries were rejected (limit 20%)")
LOOK = Finding("max_unknown_share", 0.2, 0.5, False, "10 of 20 tried deliveries have no known result")


@pytest.fixture(scope="module")
def workflow() -> Workflow:
    return load(FOLDER / NAME)


@pytest.fixture(scope="module")
def careful(workflow: Workflow) -> Workflow:
    """A held batch wants two people."""
    assert workflow.delivery is not None
    approval = workflow.delivery.approval.model_copy(update={"four_eyes": True})
    return workflow.model_copy(update={"delivery": workflow.delivery.model_copy(update={"approval": approval})})


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[PushHarness]:
    made = PushHarness(tmp_path, ENTITIES)
    yield made
    made.ledger.close()


def asked(workflow: Workflow, desk: PushHarness, now: datetime | None = None) -> dict[str, str]:
    """What would be pushed now, by run key: the partition."""
    requests = delivery_requests(workflow, desk.ledger, now or desk.clock())
    found = {str(r.run_key): str(r.partition_key) for r in requests}
    assert len(found) == len(requests), "two requests under one key: Dagster drops the second"
    return found


def approve(desk: PushHarness, batch_id: str, name: str, **how: Any) -> None:
    if name not in {a.name for a in desk.ledger.approvers()}:
        approvals.enrol(desk.ledger, name, SECRET)
    approvals.approve(desk.ledger, batch_id, name, SECRET, "as planned", **how)


# --- sending ----------------------------------------------------------------------------------------------------------


def test_a_batch_within_its_limits_is_asked_for_once_under_one_key(workflow: Workflow, desk: PushHarness) -> None:
    assert asked(workflow, desk) == {}
    desk.batch("b1", HIGHER, day=0)
    (request,) = delivery_requests(workflow, desk.ledger, desk.clock())
    assert request.partition_key == DAY.isoformat() and request.job_name in (None, f"{NAME}_deliver")
    assert "b1" in request.tags["signalbox/cause"] and "READY" in request.tags["signalbox/cause"]
    assert not request.run_config, "what a push needs stands in the ledger"
    assert asked(workflow, desk) == {request.run_key: DAY.isoformat()}


def test_a_batch_that_changes_nothing_is_not_asked_for(workflow: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", ENTITIES, day=0)
    assert asked(workflow, desk) == {}


def test_another_workflows_batch_is_not_asked_for(desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0)
    assert asked(load(FOLDER / "ticket_priority"), desk) == {}


def test_a_refused_batch_is_never_asked_for(workflow: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0, status="REFUSED")
    assert asked(workflow, desk) == {}


def test_a_held_batch_is_asked_for_from_its_approval_until_that_expires(workflow: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0, status="HELD")
    assert asked(workflow, desk) == {}
    approve(desk, "b1", "robin", valid_for=timedelta(hours=3))
    (request,) = delivery_requests(workflow, desk.ledger, desk.clock())
    assert request.partition_key == DAY.isoformat() and "HELD" in request.tags["signalbox/cause"]
    assert SECRET not in str(request) and "robin" not in str(request.run_config)
    given = desk.clock()
    assert asked(workflow, desk, given + timedelta(hours=2, minutes=59))
    assert asked(workflow, desk, given + timedelta(hours=3)) == {}


def test_an_approval_of_somebody_who_was_revoked_starts_nothing(workflow: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0, status="HELD")
    approve(desk, "b1", "robin")
    assert asked(workflow, desk)
    approvals.revoke(desk.ledger, "robin")
    assert asked(workflow, desk) == {}


def test_where_two_must_look_one_is_not_enough(careful: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0, status="HELD")
    approve(desk, "b1", "robin", four_eyes=True)
    assert asked(careful, desk) == {}
    approve(desk, "b1", "kim", four_eyes=True)
    assert len(asked(careful, desk)) == 1


def test_a_batch_of_another_content_does_not_inherit_the_approval(workflow: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0, status="HELD")
    approve(desk, "b1", "robin")
    desk.batch("b2", dict.fromkeys(ENTITIES, 130), day=0, status="HELD")
    assert asked(workflow, desk) == {}, "the day was decided again: the later batch counts, and nobody looked at it"


def test_of_a_day_decided_twice_only_the_later_batch_is_asked_for(workflow: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0)
    desk.batch("b2", dict.fromkeys(ENTITIES, 130), day=0)
    (key,) = asked(workflow, desk)
    assert key.startswith("b2:")


def test_a_complete_batch_is_asked_for_no_more(workflow: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0)
    assert desk.push("b1").complete
    assert asked(workflow, desk) == {}


@pytest.mark.parametrize(("before_the_end", "goes"), [(timedelta(microseconds=1), True), (timedelta(0), False)])
def test_a_batch_is_asked_for_until_its_day_is_over(
    workflow: Workflow, desk: PushHarness, before_the_end: timedelta, goes: bool
) -> None:
    desk.batch("b1", HIGHER, day=0)
    assert bool(asked(workflow, desk, OVER - before_the_end)) is goes


def test_an_unfinished_push_is_asked_for_again_under_another_key_and_a_tick_in_between_is_not(
    workflow: Workflow, desk: PushHarness
) -> None:
    desk.batch("b1", HIGHER, day=0)
    (first,) = asked(workflow, desk)
    desk.fault("apply", "line-3", "unknown_lost")
    desk.fault("read", "line-3", "unavailable")
    assert not desk.push("b1").complete
    (second,) = asked(workflow, desk)
    assert second != first and asked(workflow, desk) == {second: DAY.isoformat()}
    assert not desk.push("b1").complete
    (third,) = asked(workflow, desk)
    assert len({first, second, third}) == 3
    desk.well()
    assert desk.push("b1").complete and asked(workflow, desk) == {}


def test_a_run_that_failed_before_its_push_began_is_asked_for_again_later(
    workflow: Workflow, desk: PushHarness
) -> None:
    """A token that is missing, say: nothing stands in the ledger, and Dagster remembers the key."""
    desk.batch("b1", HIGHER, day=0)
    keys = [asked(workflow, desk, START + timedelta(minutes=n)).keys() for n in (1, 1.5, RETRY_MINUTES + 1)]
    assert keys[0] == keys[1] != keys[2]


def test_a_push_that_died_is_asked_for_again_under_another_key(workflow: Workflow, desk: PushHarness) -> None:
    desk.batch("b1", HIGHER, day=0)
    (first,) = asked(workflow, desk)
    desk.push_dies("b1", 1)
    (second,) = asked(workflow, desk)
    assert first != second


def test_what_was_taken_back_is_not_sent_again(workflow: Workflow, desk: PushHarness) -> None:
    from delivery.rollback import Batch

    desk.batch("b1", HIGHER, day=0)
    desk.fault("apply", "line-3", "unknown_lost")
    desk.fault("read", "line-3", "unavailable")
    assert not desk.push("b1").complete
    desk.well()
    assert desk.back(Batch("b1")).complete
    assert asked(workflow, desk) == {} and desk.values() == ENTITIES


# --- taking back ------------------------------------------------------------------------------------------------------


def test_a_guard_that_spoke_asks_for_the_rollback_of_its_batch_until_that_is_complete(
    workflow: Workflow, desk: PushHarness
) -> None:
    from delivery.rollback import Batch

    assert guard_requests(workflow, desk.ledger, desk.clock()) == []
    desk.sent("b1", HIGHER, day=0)
    row = desk.ledger.batch("b1")
    dispatch.note_findings(desk.ledger, row, [LOOK])
    assert guard_requests(workflow, desk.ledger, desk.clock()) == [], "a guard that asks for a look takes nothing back"
    dispatch.note_findings(desk.ledger, row, [REJECTED, LOOK])
    (request,) = guard_requests(workflow, desk.ledger, desk.clock())
    config = request.run_config["ops"][f"{NAME}_take_back"]["config"]
    assert (config["batch"], config["actor"], config["trigger"]) == ("b1", "guard", "guard")
    assert REJECTED.text in config["reason"] and REJECTED.text in request.tags["signalbox/cause"]
    assert [r.run_key for r in guard_requests(workflow, desk.ledger, desk.clock())] == [request.run_key]
    assert guard_requests(load(FOLDER / "ticket_priority"), desk.ledger, desk.clock()) == []
    assert desk.back(Batch("b1"), actor="guard", trigger="guard").complete
    assert guard_requests(workflow, desk.ledger, desk.clock()) == [] and desk.values() == ENTITIES


def test_a_rollback_of_a_guard_that_broke_off_is_asked_for_again_under_another_key(
    workflow: Workflow, desk: PushHarness
) -> None:
    """Dagster never runs the same key twice, and nobody else finishes what a guard began."""
    from delivery.rollback import Batch

    desk.sent("b1", HIGHER, day=0)
    dispatch.note_findings(desk.ledger, desk.ledger.batch("b1"), [REJECTED])
    (first,) = guard_requests(workflow, desk.ledger, desk.clock())
    desk.fault("read", "line-3", "unavailable")
    assert not desk.back(Batch("b1"), actor="guard", trigger="guard").complete
    (soon,) = guard_requests(workflow, desk.ledger, desk.clock())
    (later,) = guard_requests(workflow, desk.ledger, desk.clock() + timedelta(minutes=RETRY_MINUTES))
    assert first.run_key == soon.run_key != later.run_key, "a tick every 30 seconds is not a run every 30 seconds"


def restarts(workflow: Workflow, desk: PushHarness, begin: datetime, hours: float) -> list[tuple[int, dict[str, Any]]]:
    """After how many minutes which rollback would be begun, by a tick a minute: Dagster runs each key once."""
    keys: dict[str, tuple[int, dict[str, Any]]] = {}
    for minute in range(round(hours * 60)):
        for request in guard_requests(workflow, desk.ledger, begin + timedelta(minutes=minute)):
            config = request.run_config["ops"][f"{NAME}_take_back"]["config"]
            keys.setdefault(str(request.run_key), (minute, config))
    return list(keys.values())


def test_a_persons_rollback_that_broke_off_is_taken_up_again_first_soon_then_once_an_hour(
    workflow: Workflow, desk: PushHarness
) -> None:
    from delivery.rollback import Batch

    desk.sent("b1", HIGHER, day=0)
    desk.fault("read", "line-3", "unavailable")
    assert not desk.back(Batch("b1"), actor="dagster:kim", reason="too high").complete
    begin = desk.ledger.rollbacks("b1")[0].at
    found = restarts(workflow, desk, begin, 6)
    assert found[0][1] == {"batch": "b1", "reason": "too high", "actor": "kim", "trigger": "person"}
    minutes = [minute for minute, _ in found]
    assert min(minutes) >= RETRY_MINUTES, "it may be going on"
    assert 3 <= len([m for m in minutes if m < 60]) <= 6 and len([m for m in minutes if m >= 120]) == 4
    desk.well()
    assert desk.back(Batch("b1")).complete
    assert restarts(workflow, desk, begin, 6) == [] and desk.values() == ENTITIES


def test_a_guards_rollback_that_does_not_come_to_its_end_is_begun_once_an_hour(
    workflow: Workflow, desk: PushHarness
) -> None:
    from delivery.rollback import Batch

    desk.sent("b1", HIGHER, day=0)
    dispatch.note_findings(desk.ledger, desk.ledger.batch("b1"), [REJECTED])
    desk.fault("read", "line-3", "unavailable")
    assert not desk.back(Batch("b1"), actor="guard", trigger="guard").complete
    begin = desk.ledger.rollbacks("b1")[0].at
    found = restarts(workflow, desk, begin, 24)
    assert all(config["actor"] == "guard" for _, config in found)
    assert len(found) <= 6 + 24, "not every ten minutes for ever: what is left may need a person"


def test_of_several_rollbacks_that_broke_off_the_newest_batch_comes_first(
    workflow: Workflow, desk: PushHarness
) -> None:
    for n, name in enumerate(("b1", "b2")):
        desk.sent(name, dict.fromkeys(ENTITIES, 120 + n))
    for name in ("b1", "b2"):
        desk.ledger.rollback_asked(name, actor="kim", reason="harm", trigger="person")
    assert {config["batch"] for _, config in restarts(workflow, desk, desk.clock(), 3)} == {"b2"}
    desk.ledger.rollback_complete("b2", actor="kim", reason="harm", trigger="person")
    assert {config["batch"] for _, config in restarts(workflow, desk, desk.clock(), 3)} == {"b1"}


def test_a_rollback_that_a_person_closed_is_not_taken_up_again(workflow: Workflow, desk: PushHarness) -> None:
    desk.sent("b1", HIGHER, day=0)
    dispatch.note_findings(desk.ledger, desk.ledger.batch("b1"), [REJECTED])
    desk.ledger.rollback_asked("b1", actor="guard", reason="harm", trigger="guard")
    assert restarts(workflow, desk, desk.clock(), 1)
    asked_for, closed = desk.ledger.rollbacks("b1")[0], {"action": "closed"}
    with pytest.MonkeyPatch.context() as patch:
        rows = [asked_for, dataclasses.replace(asked_for, **closed)]  # type: ignore[arg-type]
        patch.setattr(desk.ledger, "rollbacks", lambda *_: rows)
        assert restarts(workflow, desk, desk.clock(), 1) == []
        assert open_rollbacks(workflow, desk.ledger) == {}


def test_an_open_rollback_holds_up_every_push_of_its_workflow(workflow: Workflow, desk: PushHarness) -> None:
    desk.sent("b1", HIGHER, day=0)
    desk.batch("b2", dict.fromkeys(ENTITIES, 130), day=0)
    assert asked(workflow, desk)
    desk.ledger.rollback_asked("b1", actor="kim", reason="harm", trigger="person")
    assert asked(workflow, desk) == {}
    assert open_rollbacks(load(FOLDER / "ticket_priority"), desk.ledger) == {}
    desk.ledger.rollback_complete("b1", actor="kim", reason="harm", trigger="person")
    assert open_rollbacks(workflow, desk.ledger) == {}


def test_the_request_fits_the_job_that_it_starts(workflow: Workflow, desk: PushHarness) -> None:
    desk.sent("b1", HIGHER, day=0)
    dispatch.note_findings(desk.ledger, desk.ledger.batch("b1"), [REJECTED])
    (request,) = guard_requests(workflow, desk.ledger, desk.clock())
    job = assembly.build([workflow]).get_repository_def().get_job(f"{NAME}_rollback")
    assert dg.validate_run_config(job, request.run_config)


# --- through Dagster itself -------------------------------------------------------------------------------------------


def test_both_sensors_are_declared_start_what_they_say_and_are_off(workflow: Workflow) -> None:
    declared = {u.name: u for u in unattended([workflow])}
    repository = assembly.build([workflow]).get_repository_def()
    for name, starts in ((f"{NAME}_push", f"{NAME}_deliver"), (f"{NAME}_guard", f"{NAME}_rollback")):
        sensor = repository.get_sensor_def(name)
        assert declared[name].starts == starts == sensor.job_name and repository.has_job(starts)
        assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    silent = workflow.model_copy(update={"delivery": None})
    names = {u.name for u in unattended([silent])}
    assert names and not names & {f"{NAME}_push", f"{NAME}_guard"}


def test_the_sensors_tick_on_what_stands_in_the_ledger(
    workflow: Workflow, desk: PushHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))  # the desk's ledger lies where the default one does
    monkeypatch.setenv("SIGNALBOX_LEDGER_KEY", KEY.decode())
    now = (START + timedelta(hours=1)).isoformat()
    repository, given = assembly.build([workflow], now=now).get_repository_def(), resources(now)
    push, guard = (repository.get_sensor_def(f"{NAME}_{which}") for which in ("push", "guard"))
    with dg.DagsterInstance.ephemeral() as instance:

        def tick(sensor: dg.SensorDefinition) -> Any:
            context = dg.build_sensor_context(instance=instance, repository_def=repository, resources=given)
            return sensor(context)

        def said(found: Any) -> str:
            assert isinstance(found, dg.SkipReason), found
            return str(found.skip_message)

        assert "no batch may go" in said(tick(push)) and "no guard has spoken" in said(tick(guard))
        desk.batch("b1", HIGHER, day=0)
        (request,) = tick(push)
        assert request.partition_key == DAY.isoformat() and request.run_key.startswith("b1:push:")
        desk.ledger.switch(NAME, True, "kim", "odd figures")
        assert f"signalbox resume {NAME}" in said(tick(push))
        dispatch.note_findings(desk.ledger, desk.ledger.batch("b1"), [REJECTED])
        assert "signalbox rollback" in said(tick(guard)), "while it is stopped only a person takes anything back"
        desk.ledger.switch(NAME, False, "kim", "explained")
        (back,) = tick(guard)
        assert back.run_config["ops"][f"{NAME}_take_back"]["config"]["batch"] == "b1"
        assert desk.push("b1").complete and "no batch may go" in said(tick(push))
        desk.ledger.rollback_asked("b1", actor="kim", reason="harm", trigger="person")
        assert "wait for the rollback of b1" in said(tick(push))


def test_the_push_sensor_asks_for_nothing_that_a_guard_wants_back(workflow: Workflow, desk: PushHarness) -> None:
    """Otherwise one sensor sends what the other takes back, in turns."""
    desk.batch("b1", HIGHER, day=0)
    desk.fault("apply", "line-3", "unknown_lost")
    desk.fault("read", "line-3", "unavailable")
    assert not desk.push("b1").complete
    dispatch.note_findings(desk.ledger, desk.ledger.batch("b1"), [REJECTED])
    assert guard_requests(workflow, desk.ledger, desk.clock()) and asked(workflow, desk) == {}
