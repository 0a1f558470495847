"""Gates through Dagster: what a broken day may not reach."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import dagster as dg
import pytest

from assets.resources import resources
from data_checks.contract import ExpectationSpec
from delivery.sandbox.worlds import advertising, tickets
from orchestration import runner
from orchestration.demo import story
from pipeline.settings import home
from pipeline.workflow import FOLDER, Workflow, load

DAYS = 8


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    with dg.DagsterInstance.ephemeral() as found:
        yield found


@pytest.fixture
def workflow(tmp_path: Path) -> Workflow:
    return load(FOLDER / "ad_budget")


def land(workflow: Workflow, days: int, broken: int | None = None) -> list[date]:
    world = advertising.World(3, "easy", 24, origin=workflow.start)
    rows = advertising.history(world, workflow.start, days)
    span = [workflow.start + timedelta(days=n) for n in range(days)]

    folder = home() / "landing" / workflow.name / "export"
    for number, day in enumerate(span):
        story.stamp(advertising.export_day(rows, folder, day, break_schema=number == broken), day)
    return span


def results(run: dg.ExecuteInProcessResult) -> dict[tuple[str, str], str]:
    return {(r["asset"].split("/")[-1], r["check"]): r["result"] for r in runner.check_rows(run)}


def test_a_broken_upstream_schema_stops_the_day_and_the_deadline_changes_nothing(
    instance: dg.DagsterInstance, workflow: Workflow
) -> None:
    *before, last = land(workflow, DAYS, broken=DAYS - 1)
    assert runner.run(
        workflow, "prepare", before[0], before[-1], now=story.at(before[-1], "04:00"), instance=instance
    ).success
    lake = resources()["lake"].lake
    versions = {t: lake.version(workflow.table(t)) for t in ("events", "features")}
    run = runner.run(workflow, "daily", last, last, now=story.at(last, "04:00"), instance=instance)
    found = results(run)
    assert found[("events", "files")] == "ERROR" and found[("events", "contract")] == "ERROR"
    assert ("features", "contract") not in found, "what depends on a failed gate may not run"
    assert {t: lake.version(workflow.table(t)) for t in versions} == versions
    says = next(r["says"] for r in runner.check_rows(run) if r["check"] == "files")
    assert "revenue" in says and "advertising_" in says
    late = runner.run(workflow, "decide", last, last, now=story.at(last, "06:05"), instance=instance)
    assert late.success
    batch = lake.read(workflow.table("batches"), days=[last]).to_pylist()[0]
    assert (batch["step"], batch["rows"], batch["late"]) == ("no_change", 0, True)


def test_features_that_break_their_contract_are_withheld(instance: dg.DagsterInstance, workflow: Workflow) -> None:
    span = land(workflow, DAYS)
    impossible = ExpectationSpec.model_validate(
        {"type": "expect_column_max_to_be_between", "column": "budget_micros", "max_value": 1}
    )
    promised = workflow.contract.model_copy(
        update={"features": workflow.contract.features.model_copy(update={"expectations": (impossible,)})}
    )
    strict = workflow.model_copy(update={"contract": promised})
    lake = resources()["lake"].lake
    good = runner.run(workflow, "prepare", span[0], span[-1], now=story.at(span[-1], "04:00"), instance=instance)
    assert good.success and lake.read(workflow.table("features"), days=[span[-1]]).num_rows == 24
    run = runner.run(strict, "prepare", span[-1], span[-1], now=story.at(span[-1], "04:30"), instance=instance)
    assert results(run)[("features", "contract")] == "ERROR"
    assert lake.read(workflow.table("features"), days=[span[-1]]).num_rows == 0
    assert lake.read(workflow.table("features"), days=[span[-2]]).num_rows == 24
    page = Path(resources()["reports"].root, "ad_budget", span[-1].isoformat(), "features-contract.html")
    assert "expect_column_max_to_be_between" in page.read_text()


@pytest.mark.parametrize("left", ["the header alone", "no file"])
@pytest.mark.parametrize("name", ["ad_budget", "ticket_priority"])
def test_an_empty_day_goes_no_further_and_one_sentence_says_why(
    instance: dg.DagsterInstance, name: str, left: str
) -> None:
    workflow = load(FOLDER / name)
    before, last = workflow.start, workflow.start + timedelta(days=1)
    if name == "ad_budget":
        land(workflow, 2)
    else:
        world, folder = tickets.World(3, load=0.9, teams=2), home() / "landing" / name / "export"
        for day in (before, last):
            story.stamp(tickets.export_day(world.step(day), folder, day), day)
    (file,) = (home() / "landing" / name / "export").glob(f"*{last}*")
    if left == "no file":
        file.unlink()
    else:
        header = gzip.decompress(file.read_bytes()).split(b"\n")[0] + b"\n" if name == "ad_budget" else b""
        file.write_bytes(gzip.compress(header))
        story.stamp(file, last)
    assert runner.run(workflow, "prepare", before, before, now=story.at(before, "04:00"), instance=instance).success
    run = runner.run(workflow, "daily", last, last, now=story.at(last, "04:00"), instance=instance)
    found = {(r["asset"].split("/")[-1], r["check"]): r for r in runner.check_rows(run)}
    contract = found[("events", "contract")]
    assert (contract["result"], contract["says"]) == ("ERROR", f"{last}: no event of the day has landed")
    assert ("features", "contract") not in found, "the day goes no further"
