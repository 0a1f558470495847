"""A day's batch through Dagster to the two real downstream systems: sent, held, broken off, taken back, and what it did."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from delivery import approvals
from delivery.sandbox import advertising_api
from models.registry import Registry
from orchestration import assembly, automation, runner
from pipeline import dispatch
from pipeline.lake import Lake
from pipeline.workflow import FOLDER, load
from tests.conftest import WorkflowHarness
from tests.support.offices import Account, MorningHarness, Queue, checks, environment, metadata

pytestmark = pytest.mark.system
SECRET = "nobody else's secret"
TOKEN = "marked-token-0123456789"
LENIENT = {"max_total_change": None, "max_share_changed": None}
"""A model of eight rounds changes what it likes: here the batch shall go, whatever is in it."""
IMPATIENT = {"patience_s": 0.5, "backoff_s": (0.05, 0.1), "late_s": 0.2}


@pytest.fixture(scope="module")
def desk(queue: WorkflowHarness, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    """One help desk for the module: each test finds its priorities as they were."""
    templates = tmp_path_factory.getbasetemp() / "helpdesk-templates"
    running = Queue(tmp_path_factory.mktemp("desk"), queue, TOKEN, templates)
    yield running
    running.close()


@pytest.fixture
def mornings(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], MorningHarness]]:
    """The morning of a workflow, by the name of its bench."""
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.ephemeral() as instance:
        accounts = []

        def make(name: str) -> MorningHarness:
            shared: WorkflowHarness = request.getfixturevalue(name)
            bench, system = shared.copy(tmp_path / "bench"), None
            if name == "ads":
                system = Account(tmp_path / "account", bench, TOKEN)
                accounts.append(system)
            else:
                system = request.getfixturevalue("desk")
                system.as_it_was()
            for variable, value in environment(bench, registry, tmp_path / "home", system).items():
                monkeypatch.setenv(variable, value)
            return MorningHarness(bench, registry, system, instance)

        yield make
        for account in accounts:
            account.close()


@pytest.fixture(params=["ads", "queue"])
def morning(request: pytest.FixtureRequest, mornings: Callable[[str], MorningHarness]) -> MorningHarness:
    """Each shipped workflow in turn."""
    return mornings(request.param)


@pytest.fixture
def ads_morning(mornings: Callable[[str], MorningHarness]) -> MorningHarness:
    return mornings("ads")


def decided(morning: MorningHarness, **guardrails: Any) -> dg.ExecuteInProcessResult:
    result = morning.run("decide", morning.saying(guardrails=LENIENT | guardrails), hour=4)
    # a batch over its limits fails its blocking check, and with it the run
    assert result.success == (morning.batch().status != "REFUSED"), runner.failed_steps(result)
    return result


def step_error(result: dg.ExecuteInProcessResult) -> str:
    assert not result.success
    return " ".join(runner.failed_steps(result))


def test_a_ready_batch_is_delivered_and_its_asset_says_so(morning: MorningHarness) -> None:
    decided(morning)
    before, intended, standing = morning.decided("before"), morning.decided("after"), morning.system.values()
    changed = {entity for entity in intended if intended[entity] != before[entity]}
    assert changed and morning.stands() == before, "the system is not where the export left it"

    result = morning.run("deliver")

    assert result.success and checks(result)["reconciled"] == (
        "passed", f"{morning.day}: {{'ACKED': {len(changed)}}}",
    )  # fmt: skip
    assert checks(result)["guards"][0] == "passed"
    shown, row = metadata(result, "delivery"), morning.batch()
    assert (shown["batch"], shown["status"], shown["changed"]) == (row.batch_id, "READY", len(changed))
    assert shown["states"] == row.counts == {"ACKED": len(changed)} and "guarantee" in shown
    assert shown["report"]["complete"] and shown["report"]["sends"] == len(changed)
    assert not {"waits", "not sent", "not as intended"} & shown.keys()
    assert row.delivery == "COMPLETE" and morning.stands() == intended
    untouched = standing.keys() - changed
    assert {e: v for e, v in morning.system.values().items() if e in untouched} == {e: standing[e] for e in untouched}
    with morning.ledger() as book:
        assert book.verify().ok
    if isinstance(morning.system, Account):
        calls = [change for change in morning.system.sandbox.changes() if change["client"] == "GOOGLE_ADS_API"]
        assert {(c["batch"], c["run"]) for c in calls} == {(row.batch_id, result.run_id)}
        ids = morning.decided("decision_id")
        assert all(ids[c["line"]] in c["decisions"] for c in calls)

    applied = morning.system.applied()
    again = morning.run("deliver")

    assert again.success and checks(again)["reconciled"][0] == "passed" and morning.system.applied() == applied


def test_a_held_batch_waits_for_an_approval_and_then_the_same_job_sends_it(morning: MorningHarness) -> None:
    said = checks(decided(morning, max_changed=1))
    assert said["guardrails"][0] == "WARN" and morning.batch().status == "HELD"
    before, batch = morning.decided("before"), morning.batch()

    waiting = morning.run("deliver")

    result, says = checks(waiting)["reconciled"]
    assert waiting.success and result == "WARN" and f"signalbox approve {batch.batch_id}" in says
    assert "waits for 1 more person" in metadata(waiting, "delivery")["waits"]
    assert checks(waiting)["guards"] == ("passed", f"{morning.day}: nothing was sent")
    assert morning.stands() == before and morning.system.applied() == 0
    with morning.ledger(6) as book:
        assert automation.delivery_requests(morning.workflow, book, morning.bench.morning(morning.day, 6)) == []
        approvals.enrol(book, "robin", SECRET)
        approvals.approve(book, batch.batch_id, "robin", SECRET, "as planned")
        (request,) = automation.delivery_requests(morning.workflow, book, morning.bench.morning(morning.day, 6))
    assert request.partition_key == morning.day.isoformat()

    approved = morning.run("deliver", hour=6)

    assert approved.success and checks(approved)["reconciled"][0] == "passed"
    assert "waits" not in metadata(approved, "delivery") and morning.stands() == morning.decided("after")


def test_a_system_that_is_down_fails_the_day_in_words_and_the_next_run_completes_it(morning: MorningHarness) -> None:
    decided(morning)
    impatient = morning.saying(push=IMPATIENT)
    before = morning.decided("before")
    morning.system.down()

    result = morning.run("deliver", impatient)

    verdict, says = checks(result)["reconciled"]
    assert not result.success and verdict == "ERROR"
    assert "run it again" in says and "cannot be read" in says and "127.0.0.1" in says and TOKEN not in says, says
    assert checks(result)["guards"][0] == "passed", "no data is no verdict"
    assert metadata(result, "delivery")["states"] == {"PENDING": morning.batch().changed}
    morning.system.up()
    assert morning.stands() == before

    again = morning.run("deliver", impatient)

    assert again.success and checks(again)["reconciled"][0] == "passed", checks(again)
    assert morning.stands() == morning.decided("after") and morning.batch().delivery == "COMPLETE"


def test_a_system_that_goes_down_between_a_write_and_its_answer_is_taken_up_where_it_was(
    ads_morning: MorningHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    morning, sandbox = ads_morning, ads_morning.system.sandbox
    decided(morning)
    impatient, carried_out = morning.saying(push=IMPATIENT), sandbox.mutate

    def last_act(body: Any, marks: Any) -> Any:
        carried_out(body, marks)
        sandbox.trouble(advertising_api.Trouble(times=1_000_000, close=True))
        raise ConnectionAbortedError

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "mutate", last_act)
        result = morning.run("deliver", impatient)

    states = metadata(result, "delivery")["states"]
    assert not result.success and checks(result)["reconciled"][0] == "ERROR"
    assert states.keys() & {"UNKNOWN", "IN_FLIGHT"} and "ACKED" not in states, "claims what nobody has read back"
    assert sandbox.state()["applications"] and morning.batch().delivery == "OPEN"
    sandbox.troubles.clear()
    assert checks(morning.run("deliver", impatient))["reconciled"][0] == "passed"
    assert morning.stands() == morning.decided("after")
    changed = {e for e, after in morning.decided("after").items() if after != morning.decided("before")[e]}
    assert sorted(c["line"] for c in sandbox.changes()) == sorted(changed), "a value was changed twice, or never"
    assert morning.system.applied() == len(changed), "a value that stood was sent again"


def test_rejections_over_the_limit_ask_for_a_rollback_which_restores_what_stood(ads_morning: MorningHarness) -> None:
    morning = ads_morning
    guarded = morning.saying(guards={"min_deliveries": 5})
    decided(morning)
    before, after = morning.decided("before"), morning.decided("after")
    changed = sorted(e for e in after if after[e] != before[e])
    refused = random.Random(3).sample(changed, len(changed) // 2)
    morning.system.refuse(refused)

    result = morning.run("deliver", guarded)

    shown = metadata(result, "delivery")
    verdict, says = checks(result)["guards"]
    assert verdict == "ERROR" and "were rejected by the downstream system (limit 20.00%)" in says
    with morning.ledger() as book:
        rejected = {d.entity for d in book.deliveries(morning.batch().batch_id, ["REJECTED"])}
    # a refused decrease frees no money: some increases are left out, and never meet the refusal
    assert rejected <= set(refused) and shown["states"]["REJECTED"] == len(rejected) > 0.2 * len(changed)
    assert all(line in shown["not as intended"] for line in list(rejected)[:1]), shown["not as intended"]
    verdict, says = checks(result)["reconciled"]
    assert verdict == "ERROR" and "were rejected" in says, "every change has ended, and too many did not land"
    assert morning.stands() != before, "nothing to take back"
    _take_back(morning)
    assert morning.stands() == before


def test_overrides_over_the_limit_ask_for_a_rollback_which_leaves_peoples_values(
    mornings: Callable[[str], MorningHarness],
) -> None:
    morning = mornings("queue")
    guarded = morning.saying(guards={"min_deliveries": 5})
    decided(morning)
    before, after = morning.decided("before"), morning.decided("after")
    changed = sorted(e for e in after if after[e] != before[e])
    theirs = {e: next(v for v in (5, 4, 3, 2, 1) if v not in (before[e], after[e])) for e in changed[::2]}
    for entity, value in theirs.items():
        morning.system.person(entity, value)

    result = morning.run("deliver", guarded)

    verdict, says = checks(result)["guards"]
    assert verdict == "ERROR" and "had been changed by people (limit 30.00%)" in says
    assert metadata(result, "delivery")["states"]["CONFLICT"] == len(theirs)
    assert {e: morning.stands()[e] for e in theirs} == theirs
    _take_back(morning)
    assert morning.stands() == before | theirs


def _take_back(morning: MorningHarness) -> None:
    """Execute what the guard's sensor would ask for; it asks once and no more when it is done."""
    batch, now = morning.batch(), morning.bench.morning(morning.day, 6)
    with morning.ledger(6) as book:
        (request,) = automation.guard_requests(morning.workflow, book, now)
    result = runner.run_op(morning.workflow, "rollback", request, now=now.isoformat(), instance=morning.instance)
    assert result.success, runner.failed_steps(result)
    with morning.ledger(6) as book:
        assert automation.guard_requests(morning.workflow, book, now) == []
        (asked, complete) = book.rollbacks(batch.batch_id)
        assert (asked.action, complete.action) == ("asked", "complete") and asked.trigger == "guard"
        (reverse,) = book.batches(morning.workflow.name, kind="rollback")
        assert reverse.reverses == batch.batch_id and reverse.delivery == "COMPLETE" and book.verify().ok
        again = automation.delivery_requests(morning.workflow, book, now)
    assert again == [], "what was taken back would be sent again"


def test_of_several_days_in_one_run_only_the_newest_is_sent(morning: MorningHarness) -> None:
    older = morning.day - timedelta(days=1)
    both = morning.run("decide", morning.saying(guardrails=LENIENT), first=older)
    assert both.success, runner.failed_steps(both)

    result = morning.run("deliver", first=older)

    assert result.success and checks(result)["reconciled"][0] == "passed", checks(result)
    with morning.ledger() as book:
        sent, left = morning.batch(), morning.batch(older)
        shown = [
            {name: value.value for name, value in e.materialization.metadata.items()}
            for e in result.get_asset_materialization_events()
        ]
        assert all(s["batch"] == sent.batch_id and s["not sent"].startswith("1 earlier days") for s in shown) and shown
        assert sent.delivery == "COMPLETE" and not any(d.attempts for d in book.deliveries(left.batch_id))
        assert set(left.counts) == {"SKIPPED"}, "an older batch waits for nothing any more"
    stands = morning.system.values()
    assert {e: stands[e] for e in morning.decided("after")} == morning.decided("after")
    applied = morning.system.applied()
    again = morning.run("deliver", day=older)
    assert again.success and morning.system.applied() == applied and morning.system.values() == stands


def test_a_day_that_is_over_is_not_sent_and_the_run_says_how_it_could_be(ads_morning: MorningHarness) -> None:
    day = ads_morning.day
    assert ads_morning.run("decide", ads_morning.saying(guardrails=LENIENT)).success
    said = step_error(ads_morning.run("deliver", hour=24 + 5))
    assert f"decided for {day + timedelta(days=1)}, which is over" in said and "--late" in said
    assert ads_morning.system.applied() == 0


def test_a_backfill_is_no_fault_and_is_never_sent(ads_morning: MorningHarness) -> None:
    older = ads_morning.day - timedelta(days=1)
    assert ads_morning.run("decide", ads_morning.saying(guardrails=LENIENT), day=older).success
    result = ads_morning.run("deliver", day=older)
    assert result.success and "a backfill" in checks(result)["reconciled"][1]
    assert ads_morning.system.applied() == 0


def test_what_the_next_day_brings_stands_beside_the_decisions_that_it_answers(morning: MorningHarness) -> None:
    decided(morning)
    assert morning.run("deliver").success
    after, ids, batch = morning.decided("after"), morning.decided("decision_id"), morning.batch()
    following = morning.day + timedelta(days=1)
    if isinstance(morning.system, Account):
        with morning.ledger() as book:
            drawn = dispatch.randomised(book, morning.workflow.name, morning.day)
        morning.system.sandbox.advance(morning.bench.root / "landing" / morning.workflow.name, multipliers=drawn)
    else:
        morning.bench.write(following, morning.bench.folder())

    result = morning.run("daily", morning.saying(guardrails=LENIENT), day=following, hour=4)

    assert result.success, runner.failed_steps(result)
    assert checks(result)["spend"][0] == "passed"
    lake = Lake(str(morning.bench.root / "lake"))
    rows = lake.read(morning.workflow.table("decision_outcomes"), days=[following]).to_pylist()
    own = [row for row in rows if row["batch_id"] == batch.batch_id]
    assert own and len(rows) == metadata(result, "decision_outcomes")["decisions with an outcome"]
    assert {(r["entity_id"], r["decision_id"], r["after"], r["standing"]) for r in own} == {
        (r["entity_id"], ids[r["entity_id"]], after[r["entity_id"]], after[r["entity_id"]]) for r in own
    }
    assert {r["state"] for r in own} <= {"ACKED", None} and "ACKED" in {r["state"] for r in own}
    assert {r["decided_day"] for r in own} == {morning.day}
    if isinstance(morning.system, Account):
        assert {r["entity_id"] for r in own} == after.keys(), "every line has spent something by the next day"
        spent = sum(r["cost"] for r in own)
        assert 0 < spent <= sum(after.values()) / 1e6 * 1.01, "more was spent than the budgets that stood"


def test_outcomes_answer_the_decision_that_stood_also_when_their_day_is_run_again(morning: MorningHarness) -> None:
    """By then that day has a batch of its own, made after its outcomes were known."""
    decided(morning)
    assert morning.run("deliver").success
    following = morning.day + timedelta(days=1)
    morning.bench.land([following])
    morning.bench.build([following])
    found = []
    with morning.ledger() as book:
        found.append(dispatch.outcomes_of_decisions(morning.workflow, morning.bench.lake, book, following))
        assert found[0].num_rows
        assert morning.run("decide", morning.saying(guardrails=LENIENT), day=following).success
        found.append(dispatch.outcomes_of_decisions(morning.workflow, morning.bench.lake, book, following))
    answered = [dict(zip(t["entity_id"].to_pylist(), t["batch_id"].to_pylist(), strict=True)) for t in found]
    assert answered[0] == answered[1]


def test_of_two_runs_at_once_one_sends(morning: MorningHarness) -> None:
    decided(morning)
    changed = [d for d in morning.bench.decided(morning.day) if d["changed"]]
    morning.system.slow(2.0)  # the first write waits, with the lease in the first run's hands
    results: dict[str, dg.ExecuteInProcessResult] = {}

    def first() -> None:
        with dg.DagsterInstance.ephemeral() as own:
            results["first"] = MorningHarness(morning.bench, morning.registry, morning.system, own).run("deliver")

    thread = threading.Thread(target=first)
    thread.start()
    _until(lambda: morning.batch().delivery == "OPEN")
    second = morning.run("deliver")
    thread.join(60)

    assert "is being written to by process" in step_error(second)
    assert results["first"].success and checks(results["first"])["reconciled"][0] == "passed"
    assert morning.stands() == morning.decided("after") and morning.system.applied() == len(changed)
    assert checks(morning.run("deliver"))["reconciled"][0] == "passed" and morning.system.applied() == len(changed)


def _until(true: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)


def test_a_stopped_workflow_fails_the_run_in_words_and_goes_on_when_it_may(ads_morning: MorningHarness) -> None:
    morning = ads_morning
    decided(morning)
    with morning.ledger() as book:
        book.switch(morning.workflow.name, True, "kim", "odd figures")
    said = step_error(morning.run("deliver"))
    assert "stopped by kim (odd figures)" in said and "signalbox resume ad_budget" in said
    assert morning.stands() == morning.decided("before")
    with morning.ledger() as book:
        book.switch(morning.workflow.name, False, "kim", "explained")
    assert checks(morning.run("deliver"))["reconciled"][0] == "passed"


def test_a_day_without_a_batch_fails_the_run_in_words(ads_morning: MorningHarness) -> None:
    said = step_error(ads_morning.run("deliver"))
    assert "no batch of" in said and "materialise [ad_budget, decisions]" in said


def test_no_job_takes_a_secret_in_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster stores what a run was configured with and shows it to everybody."""
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    definitions = assembly.build([load(FOLDER / name) for name in ("ad_budget", "ticket_priority")])
    repository = definitions.get_repository_def()
    fields: set[str] = set()
    for job in repository.get_all_jobs():
        schema = job.run_config_schema
        for kind in schema.config_type.type_iterator():
            found = set(getattr(kind, "fields", {}) or {})
            fields |= found - ({"key"} if found == {"key", "value", "limit"} else set())  # an executor's tags
    assert {"batch", "since", "model", "actor", "reason", "trigger"} <= fields, "the rollback's were not looked at"
    secretive = re.compile(r"secret|token|passw|credential|approv|(^|_)(key|pin|auth)(_|$)", re.IGNORECASE)
    assert sorted(name for name in fields if secretive.search(name)) == []
