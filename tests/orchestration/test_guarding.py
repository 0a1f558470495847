"""From a harm that shows in the outcomes to the values and the model that stood before it; and how soon one would be found."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from typer.testing import CliRunner

from assets.resources import resources
from delivery.rollback import Batch, Model
from models.registry import CHAMPION, Registry
from orchestration import assembly, runner
from orchestration.automation import RETRY_MINUTES, delivery_requests, guard_requests
from orchestration.cli import command
from pipeline.lifecycle import hold, promotion
from pipeline.monitoring import power
from pipeline.monitoring import verdicts as guarding
from pipeline.workflow import FOLDER, Workflow, load
from tests.conftest import WorkflowHarness
from tests.support.desks import KEY, PushHarness
from tests.support.fakes import DAY, START
from tests.support.offices import Account, MorningHarness, environment

NAME = "ad_budget"
ENTITIES = {f"line-{n}": 100 for n in range(6)}
HIGHER = dict.fromkeys(ENTITIES, 120)
TOKEN = "marked-token-0123456789"
LENIENT = {"max_total_change": None, "max_share_changed": None}


@pytest.fixture(scope="module")
def workflow() -> Workflow:
    return load(FOLDER / NAME)


# --- the sensor -------------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[PushHarness]:
    made = PushHarness(tmp_path, ENTITIES)
    yield made
    made.ledger.close()


def verdict(
    desk: PushHarness, version: int | None, said: str = "ROLLBACK", *, since: date = DAY, n: int = 3, **more: Any
) -> int:
    body = {
        "workflow": NAME, "comparison": "champion vs holdout", "version": version, "since": since.isoformat(),
        "day": (DAY + timedelta(days=n)).isoformat(), "verdict": said, "reasons": ["it earns 12% less"], "figures": {},
        "design": "cohort",
    }  # fmt: skip
    return desk.ledger.note(guarding.VERDICT, body | more)


def promoted(desk: PushHarness, version: int, action: str = "promoted") -> None:
    desk.ledger.promotion(NAME, version, action, "kim", {})


def asked(workflow: Workflow, desk: PushHarness, later: timedelta = timedelta(0)) -> dict[str, dict[str, Any]]:
    """The rollbacks that would be started, by run key: their configuration."""
    requests = guard_requests(workflow, desk.ledger, desk.clock() + later)
    found = {str(r.run_key): r.run_config["ops"][f"{NAME}_take_back"]["config"] for r in requests}
    assert len(found) == len(requests), "two requests under one key: Dagster drops the second"
    return found


def test_only_a_verdict_that_says_rollback_asks_for_one(workflow: Workflow, desk: PushHarness) -> None:
    promoted(desk, 1)
    desk.sent("b1", HIGHER)
    for said in ("PROMOTE", "CONTINUE", "INCONCLUSIVE", "NO_DATA"):
        verdict(desk, 1, said)
    assert asked(workflow, desk) == {}
    verdict(desk, 1)
    (config,) = asked(workflow, desk).values()
    assert config == {
        "model": 1, "actor": "guard", "trigger": "guard", "reason": f"champion vs holdout, {DAY + timedelta(days=3)}: it earns 12% less",
    }  # fmt: skip
    assert asked(load(FOLDER / "ticket_priority"), desk) == {}


def test_it_is_asked_for_under_one_key_and_again_later_while_it_is_not_complete(
    workflow: Workflow, desk: PushHarness
) -> None:
    promoted(desk, 1)
    desk.sent("b1", HIGHER)
    verdict(desk, 1)
    (first,), (soon,) = asked(workflow, desk), asked(workflow, desk)
    (later,) = asked(workflow, desk, timedelta(minutes=RETRY_MINUTES))
    assert first == soon != later, "a tick every 30 seconds is not a run every 30 seconds"


def test_it_is_asked_for_until_version_and_batches_are_back_and_then_no_more(
    workflow: Workflow, desk: PushHarness
) -> None:
    promoted(desk, 7)
    promoted(desk, 1)
    desk.sent("b1", HIGHER)
    desk.sent("b2", dict.fromkeys(ENTITIES, 130))
    verdict(desk, 1)
    assert asked(workflow, desk)
    promoted(desk, 1, "rolled back")
    assert desk.back(Batch("b2"), actor="guard", trigger="guard").complete
    assert asked(workflow, desk), "the model is out, b1 is not back: broken off half-way"
    assert desk.back(Model(NAME, 1), actor="guard", trigger="guard").complete
    assert asked(workflow, desk) == {} and desk.values() == ENTITIES
    promoted(desk, 1, "lifted")
    promoted(desk, 1)
    desk.sent("b3", HIGHER)
    assert asked(workflow, desk) == {}, "a person let it act anew: an old verdict says nothing of that"
    verdict(desk, 1, n=9)
    assert [c["model"] for c in asked(workflow, desk).values()] == [1]


def test_a_version_that_acts_no_more_is_left(workflow: Workflow, desk: PushHarness) -> None:
    promoted(desk, 1)
    desk.sent("b1", HIGHER)
    verdict(desk, 1)
    promoted(desk, 2)
    assert asked(workflow, desk) == {}


def test_where_the_rule_does_harm_its_batches_are_asked_back_since_it_began(
    workflow: Workflow, desk: PushHarness
) -> None:
    desk.sent("b1", HIGHER)
    verdict(desk, None)
    assert asked(workflow, desk) == {}, "a model decided that batch"
    row = desk.ledger.batch("b1")
    assert row.day == DAY
    ruled = [guarding.Condemned("champion vs holdout", None, DAY, DAY, "it earns less", ("b1",), 7)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guarding, "condemned", lambda *_: ruled)
        ((key, config),) = asked(workflow, desk).items()
    assert config["since"] == DAY.isoformat() and "model" not in config and ":rule:" in key


def test_nothing_that_stands_under_a_rollback_is_pushed(workflow: Workflow, desk: PushHarness) -> None:
    """Otherwise one sensor sends what the other takes back, in turns."""
    promoted(desk, 1)
    desk.batch("b1", HIGHER)
    assert delivery_requests(workflow, desk.ledger, desk.clock())
    verdict(desk, 1)
    assert delivery_requests(workflow, desk.ledger, desk.clock()) == []


def test_a_version_on_hold_is_not_pushed_and_not_taken_back_until_somebody_answers(
    workflow: Workflow, desk: PushHarness
) -> None:
    promoted(desk, 1)
    desk.sent("b1", HIGHER)
    desk.batch("b2", dict.fromkeys(ENTITIES, 130))
    now = desk.clock()
    assert [r.run_key.split(":")[0] for r in delivery_requests(workflow, desk.ledger, now) if r.run_key] == ["b2"]
    verdict(desk, 1, "HOLD")
    verdict(desk, 1, "HOLD", n=4)  # the alert goes on
    assert asked(workflow, desk) == {}, "an alert takes nothing back"
    assert delivery_requests(workflow, desk.ledger, now) == []
    (held,) = hold.standing(desk.ledger, NAME).values()
    assert held.version == 1 and "it earns 12% less" in held.text and "signalbox lift" in held.text
    promoted(desk, 1, "lifted")
    assert hold.standing(desk.ledger, NAME) == {} and delivery_requests(workflow, desk.ledger, now)


def test_half_are_held_out_from_the_next_epoch_on_while_the_version_with_the_alert_decides(desk: PushHarness) -> None:
    given = {"holdout": 1, "champion": 3}
    before, after = (DAY + timedelta(days=3)).isoformat(), (DAY + timedelta(days=4)).isoformat()
    promoted(desk, 1)
    assert hold.shares(desk.ledger, NAME, given, after) == given
    verdict(desk, 1, "HOLD")
    assert hold.shares(desk.ledger, NAME, given, before) == given, "an epoch that had begun keeps its draw"
    assert hold.shares(desk.ledger, NAME, given, after) == {"holdout": 0.5, "champion": 0.5}
    assert hold.shares(desk.ledger, NAME, {"holdout": 3, "champion": 1}, after) == {"holdout": 3, "champion": 1}
    assert hold.shares(desk.ledger, NAME, {"champion": 1}, after) == {"champion": 1}
    promoted(desk, 1, "lifted")
    assert hold.shares(desk.ledger, NAME, given, after)["holdout"] == 0.5, "it goes on, beside half"
    promoted(desk, 2)
    assert hold.shares(desk.ledger, NAME, given, after) == given, "another version decides"


def test_the_sensor_ticks_on_a_verdict_and_its_request_fits_the_job(
    workflow: Workflow, desk: PushHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))  # the desk's ledger lies where the default one does
    monkeypatch.setenv("SIGNALBOX_LEDGER_KEY", KEY.decode())
    now = (START + timedelta(hours=1)).isoformat()
    repository, given = assembly.build([workflow], now=now).get_repository_def(), resources(now)
    sensor = repository.get_sensor_def(f"{NAME}_guard")
    promoted(desk, 1)
    desk.sent("b1", HIGHER)
    verdict(desk, 1)
    with dg.DagsterInstance.ephemeral() as instance:

        def tick() -> Any:
            return sensor(dg.build_sensor_context(instance=instance, repository_def=repository, resources=given))

        (request,) = tick()
        assert dg.validate_run_config(repository.get_job(f"{NAME}_rollback"), request.run_config)
        desk.ledger.switch(NAME, True, "kim", "odd figures")
        assert "signalbox rollback" in str(tick().skip_message), "while it is stopped only a person takes anything back"


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture
def morning(
    ads: WorkflowHarness, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MorningHarness]:
    """``ad_budget`` with every line a unit of its own, decided and delivered by version 2 on the bench's last day."""
    bench = ads.copy(tmp_path / "bench")
    said = bench.workflow
    assert said.regression is not None
    bench = WorkflowHarness(
        said.model_copy(update={
            "arms": said.arms.model_copy(update={"unit": "entity_id", "shares": {"holdout": 0.5, "champion": 0.5}}),
            "guardrails": said.guardrails.model_copy(update=LENIENT),
            "regression": said.regression.model_copy(update={"horizon_days": 8}),
        }),
        bench.root, bench.days, bench.write,
    )  # fmt: skip
    (tmp_path / "home").mkdir()
    account = Account(tmp_path / "account", bench, TOKEN)
    for variable, value in environment(bench, registry, tmp_path / "home", account).items():
        monkeypatch.setenv(variable, value)
    with dg.DagsterInstance.ephemeral() as instance:
        made = MorningHarness(bench, registry, account, instance)
        with made.ledger(3) as book:  # the ledger takes over who holds the aliases
            promotion.reconcile(bench.workflow, registry, book, bench.lake, bench.morning(bench.last, 3))
        assert made.run("decide", hour=4).success and made.run("deliver").success
        yield made
    account.close()


def goes_on(morning: MorningHarness, days: int, champion_earns: float) -> date:
    """The following days go as the week before them did, but for what the champion's lines earn. Returns the last day."""
    lake, name, last = morning.bench.lake, morning.workflow.table("outcomes"), morning.day
    arm = morning.decided("arm")
    day = last
    for n in range(1, days + 1):
        day = last + timedelta(days=n)
        like = lake.read(name, days=[day - timedelta(days=7 * ((n + 6) // 7))])
        like = like.filter(pc.equal(like["for_day"], pc.max(like["for_day"])))
        factor = pa.array([champion_earns if arm.get(e) == "champion" else 1.0 for e in like["entity_id"].to_pylist()])
        put = {
            "for_day": pa.array([day - timedelta(days=1)] * like.num_rows, pa.date32()),
            "known_at": pa.array([datetime.combine(day + timedelta(days=1), datetime.min.time())] * like.num_rows, pa.timestamp("us")),
            "day": pa.array([day] * like.num_rows, pa.date32()),
            "value": pc.multiply(like["value"], factor),
        }  # fmt: skip
        for column, values in put.items():
            like = like.set_column(like.schema.get_field_index(column), column, values)
        lake.replace_days(name, like, [day])
    return day


def review(morning: MorningHarness, day: date) -> dg.ExecuteInProcessResult:
    """The asset [ad_budget, regression] for a day, at 04:00 of the morning after it."""
    now = morning.bench.morning(day).isoformat()
    definitions = assembly.build([morning.workflow], now)
    job = dg.define_asset_job("review", dg.AssetSelection.assets(dg.AssetKey([NAME, "regression"])))
    jobs = dg.Definitions.merge(definitions, dg.Definitions(jobs=[job]))
    return (
        jobs.get_repository_def()
        .get_job("review")
        .execute_in_process(
            partition_key=day.isoformat(), instance=morning.instance, resources=resources(now), raise_on_error=False
        )
    )


def test_a_harm_that_shows_in_the_outcomes_takes_back_batches_and_model_once(
    morning: MorningHarness, tmp_path: Path
) -> None:
    before, after = morning.decided("before"), morning.decided("after")
    assert morning.stands() == after != before
    day = goes_on(morning, 8, champion_earns=0.3)

    result = review(morning, day)

    assert result.success, runner.failed_steps(result)
    (check,) = runner.check_rows(result)
    assert (check["check"], check["result"]) == ("no_regression", "ERROR"), check
    assert "ROLLBACK: version 2, champion vs holdout" in check["says"] and "beyond the margin" in check["says"]
    (event,) = result.get_asset_materialization_events()
    shown = event.materialization.metadata
    image = str(shown["sequence"].value).partition("base64,")[2].rstrip(")")
    assert base64.b64decode(image).startswith(b"\x89PNG"), "the sequence is not to be seen"
    page = tmp_path / "home" / "reports" / NAME / day.isoformat() / "regression.html"
    assert image in page.read_text() and "ROLLBACK" in page.read_text()
    stored = morning.bench.lake.read(f"{NAME}/regression", days=[day]).sort_by("look").to_pylist()
    assert (
        stored[-1]["look"] == day
        and {r["verdict"] for r in stored} == {"ROLLBACK"}
        and {r["version"] for r in stored} == {2}
    )
    assert any(r["low"] is not None and r["low"] > r["margin"] for r in stored)

    now = morning.bench.morning(day, 5)
    with morning.ledger() as book:
        (request,) = guard_requests(morning.workflow, book, now)
    done = runner.run_op(morning.workflow, "rollback", request, now=now.isoformat(), instance=morning.instance)

    assert done.success, runner.failed_steps(done)
    assert morning.stands() == before, "the values that stood before it"
    champion = morning.registry.by_alias(NAME, CHAMPION)
    assert champion is not None and champion.number == 1 and morning.registry.by_number(NAME, 2).blocked
    with morning.ledger() as book:
        assert guard_requests(morning.workflow, book, now) == []
        moves = [(p.version, p.action) for p in book.promotions(NAME)]
        assert moves[-2:] == [(2, "rolled back"), (1, "promoted")]
        assert next(p.actor for p in book.promotions(NAME) if p.action == "rolled back") == "dagster:guard"
        assert {r.trigger for r in book.rollbacks()} == {"guard"} and book.verify().ok
        verdicts = [e.body["verdict"] for e in book.events(guarding.VERDICT, NAME)]
    assert verdicts == ["ROLLBACK"]
    after_that = review(morning, goes_on(morning, 9, champion_earns=0.3))
    assert runner.check_rows(after_that)[0]["result"] == "passed", "version 2 acts no more, and version 1 not yet again"


def test_without_a_harm_the_same_days_pass_and_nothing_is_asked(morning: MorningHarness) -> None:
    day = goes_on(morning, 8, champion_earns=1.0)
    for _ in range(2):
        result = review(morning, day)
        (check,) = runner.check_rows(result)
        assert check["result"] == "passed" and "version 2, champion vs holdout" in check["says"], check
    with morning.ledger() as book:
        assert guard_requests(morning.workflow, book, morning.bench.morning(day, 5)) == []
        (event,) = book.events(guarding.VERDICT, NAME)
    assert event.body["verdict"] in ("INCONCLUSIVE", "PROMOTE"), "the same verdict is recorded once"
    assert set(event.body) == {
        "workflow",
        "comparison",
        "version",
        "since",
        "day",
        "verdict",
        "reasons",
        "figures",
        "design",
    }


# --- power ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def office(ads: WorkflowHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkflowHarness:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SIGNALBOX_LAKE", str(ads.root / "lake"))
    return ads


def test_power_says_how_soon_a_harm_would_be_found_with_this_holdout(office: WorkflowHarness) -> None:
    told = CliRunner().invoke(command.app, ["power", NAME, "--harm", "0.05", "--runs", "20"])
    assert told.exit_code == 0, (told.output, told.exception)
    assert "with 20% as holdout (3 units in all), a harm of 5.0% is found in" in " ".join(told.output.split())
    document = json.loads(
        CliRunner().invoke(command.app, ["power", NAME, "--harm", "0.9", "--runs", "20", "--json"]).stdout
    )
    (one,) = document["power"]
    assert (document["design"], one["harm"], one["units"], one["history_days"]) == ("cohort", 0.9, 3, 21)
    assert len(one["found"]) == 28 and 0 <= one["found"][-1] <= 1


def test_without_history_power_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    found = CliRunner().invoke(command.app, ["power", NAME])
    assert isinstance(found.exception, power.NoHistory)
    said = str(found.exception)
    assert (
        "the lake holds no outcomes and no features yet" in said
        and f"signalbox run {NAME} prepare --since 2026-03-02" in said
    )


@pytest.mark.parametrize("harm", ["0", "1", "-0.1"])
def test_a_harm_that_is_no_share_is_refused_in_words(office: WorkflowHarness, harm: str) -> None:
    found = CliRunner().invoke(command.app, ["power", NAME, "--harm", harm])
    assert found.exit_code == 2 and "between 0 and 1" in " ".join(found.output.split())
