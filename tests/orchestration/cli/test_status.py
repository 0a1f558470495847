"""``signalbox status`` and the asset behind it, on a real state folder."""

from __future__ import annotations

import json
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from assets import health as stage
from assets.resources import resources
from orchestration import jobs
from orchestration.cli import command
from pipeline.monitoring import loop_health
from pipeline.workflow import FOLDER, load
from tests.pipeline.monitoring.test_loop_health import KNOWN, NOON, tell
from tests.support.ledgers import Clock


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    return tmp_path


def told(*words: str) -> Any:
    result = CliRunner().invoke(command.app, ["status", *words])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout) if "--json" in words else result.output


def schema(value: Any) -> Any:
    """The keys of a document, and what kind of value stands under each."""
    if isinstance(value, dict):
        return {k: schema(v) for k, v in value.items()}
    return "list" if isinstance(value, list) else "number" if isinstance(value, int | float) else type(value).__name__


def test_an_empty_state_says_nothing_yet_in_both_forms(home: Path) -> None:
    document = told("--json", "--now", "2026-04-11T12:00:00")
    assert document["ledger"] == {"seq": 0, "head": document["ledger"]["head"]}
    assert set(document["workflows"]) == {"ad_budget", "ticket_priority"}
    for one in document["workflows"].values():
        assert one["figures"]["rollbacks"] == 0
        assert one["figures"]["automatic_share"] is None
    assert told().count("nothing yet") == 2


def test_the_document_keeps_its_keys_whatever_happened(home: Path) -> None:
    empty = told("ad_budget", "--json")
    clock = Clock()
    with resources()["ledger"].open(clock) as book:
        tell(book, clock)
    full = told("ad_budget", "--json", "--now", NOON.isoformat())
    assert list(full) == list(empty) == ["at", "ledger", "workflows"]
    one, none = full["workflows"]["ad_budget"], empty["workflows"]["ad_budget"]
    assert (
        list(one)
        == ["workflow", "as_of", "figures", "retrainings_by_cause", "now", "months", "rollbacks"]
        == list(none)
    )
    assert one["figures"] == pytest.approx(KNOWN)
    for part in ("figures", "now"):
        assert list(one[part]) == list(none[part])
    assert schema(one["rollbacks"][0]) == {
        "began": "str", "noticed": "str", "asked": "str", "restored": "str", "automatic": "number", "reason": "str",
        "batches": "number", "versions": "list", "lifted": "number",
    }  # fmt: skip
    assert "37.7 h" in told("ad_budget", "--now", NOON.isoformat())
    wrong = CliRunner().invoke(command.app, ["status", "no_such"])
    assert wrong.exit_code == 2


def test_a_loop_that_stands_still_keeps_its_figures_and_shows_what_is_open_now(home: Path) -> None:
    clock = Clock()
    with resources()["ledger"].open(clock) as book:
        tell(book, clock)
    newest = told("ad_budget", "--json", "--now", NOON.isoformat())["workflows"]["ad_budget"]["now"][
        "newest_day_decided"
    ]
    over = f"{date.fromisoformat(newest) + timedelta(days=2)}T00:00:00"
    before = told("ad_budget", "--json", "--now", over)["workflows"]["ad_budget"]
    long_after = told("ad_budget", "--json")["workflows"]["ad_budget"]
    assert long_after["as_of"] == before["as_of"] == over and long_after["figures"] == before["figures"]
    assert long_after["figures"]["days_decided"] > 0
    assert "STANDS STILL" in told("ad_budget") and f"30 days to {over[:10]}" in told("ad_budget")
    assert "STANDS STILL" not in told("ad_budget", "--now", over)
    # what somebody does meanwhile is not of the past
    champion = long_after["now"]["champion"]
    assert champion is not None
    with resources()["ledger"].open(lambda: datetime.fromisoformat(over) + timedelta(days=60)) as book:
        book.promotion("ad_budget", champion, "rolled back", "robin", {"reason": "it did harm", "trigger": "person"})
    assert told("ad_budget", "--json")["workflows"]["ad_budget"]["now"]["champion"] != champion
    assert told("ad_budget", "--json", "--now", over)["workflows"]["ad_budget"]["now"]["champion"] == champion


def test_the_asset_stores_a_row_a_day_and_shows_the_newest(home: Path) -> None:
    workflow, clock = load(FOLDER / "ad_budget"), Clock()
    with resources()["ledger"].open(clock) as book:
        tell(book, clock)
    given = resources(now=NOON.isoformat())
    wanted = {name: given[name] for name in ("lake", "ledger", "clock", "reports")}
    asset = stage.build(workflow)
    # closed again: Dagster keeps the storage of the newest instance for the whole process
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            [asset], resources=wanted, partition_key=None, instance=instance,
            tags={"dagster/asset_partition_range_start": "2026-04-09", "dagster/asset_partition_range_end": "2026-04-10"},
        )  # fmt: skip
    assert result.success
    rows = given["lake"].lake.read(workflow.table("health")).sort_by("day").to_pylist()
    assert [row["day"] for row in rows] == [date(2026, 4, 9), date(2026, 4, 10)]
    assert rows[1] == pytest.approx({"day": date(2026, 4, 10), **KNOWN})
    # the 9th as it stood when the day on which it took effect was over
    assert rows[0]["days_decided"] == 8
    page = Path(given["reports"].root, "ad_budget", "2026-04-10", "health.html").read_text()
    assert "data:image/png;base64," in page and "4 rollbacks, 2 automatic" in page
    (shown,) = result.asset_materializations_for_node("ad_budget__health")[-1:]
    assert shown.metadata["override_share"].value == pytest.approx(2 / 18)


def test_the_daily_job_looks_at_the_loop_last() -> None:
    assert jobs.REVIEW[-1] == "health"
    workflow = load(FOLDER / "ad_budget")
    for one, after in (
        (workflow, {"decisions", "decision_outcomes", "regression"}),  # the day's verdict comes first
        (workflow.model_copy(update={"regression": None}), {"decisions", "decision_outcomes"}),
    ):
        deps = stage.build(one).asset_deps
        assert {key.path[-1] for keys in deps.values() for key in keys} == after
    assert loop_health.TABLE.names[0] == "day"
