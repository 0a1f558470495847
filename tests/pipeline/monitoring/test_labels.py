"""Scores meet their outcomes as these become known: the right day is updated, and nothing looks ahead."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest

from assets import performance as stage
from assets.resources import resources
from data_checks import performance as perf
from models.registry import Registry
from pipeline.decisions import scoring
from pipeline.lake import Lake
from pipeline.monitoring import labels
from pipeline.workflow import FOLDER, Workflow, WorkflowInvalid, load
from tests.conftest import WorkflowHarness

DAY = date(2026, 3, 20)


@pytest.fixture(scope="module")
def tickets() -> Workflow:
    return load(FOLDER / "ticket_priority")


@pytest.fixture(scope="module")
def ads_workflow() -> Workflow:
    return load(FOLDER / "ad_budget")


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / "lake"))


def put(lake: Lake, workflow: Workflow, day: date, scores: dict[str, Any], version: int | None = 1) -> None:
    n = len(scores["entity_id"])
    table = pa.table({**scores, "day": pa.array([day] * n, pa.date32())})
    lake.replace_days(workflow.table("scores"), table, [day])
    keys = table.select([c for c in ("day", "entity_id", "moment") if c in table.schema.names])
    lake.replace_days(workflow.table("features"), keys, [day])
    record = {
        "day": pa.array([day], pa.date32()),
        "model_version": pa.array([version], pa.int64()),
        "step": ["champion"],
    }
    lake.replace_days(workflow.table("scoring"), pa.table(record), [day])


def known(lake: Lake, workflow: Workflow, day: date, rows: list[tuple[str, bool | None, datetime]]) -> None:
    """Outcomes in the partition of ``day``."""
    entity, missed, at = zip(*rows, strict=True)
    table = pa.table(
        {
            "entity_id": list(entity),
            "for_day": pa.nulls(len(rows), pa.date32()),
            "known_at": pa.array(at, pa.timestamp("us")),
            "missed": pa.array(missed, pa.bool_()),
            "day": pa.array([day] * len(rows), pa.date32()),
        }
    )
    lake.replace_days(workflow.table("outcomes"), table, [day])


def answers(lake: Lake, workflow: Workflow, at: date) -> dict[tuple[date, str], float | None]:
    found = labels.scored(workflow, lake, at).to_pylist()
    return {(r["day"], r["entity_id"]): None if np.isnan(r["actual"]) else r["actual"] for r in found}


def test_an_outcome_known_days_later_updates_the_day_that_was_scored(tickets: Workflow, lake: Lake) -> None:
    scores = {"entity_id": ["a", "b"], "moment": ["intake", "intake"], "p_miss": [0.2, 0.7]}
    put(lake, tickets, DAY, scores)
    put(lake, tickets, DAY + timedelta(days=12), {k: v[:0] for k, v in scores.items()} | {
        "entity_id": pa.array(["c"]), "moment": pa.array(["intake"]), "p_miss": pa.array([0.5])
    })  # fmt: skip
    noon = datetime(2026, 3, 21, 1)
    known(lake, tickets, DAY, [("a", None, noon), ("b", True, noon)])
    known(lake, tickets, DAY + timedelta(days=12), [("a", False, noon + timedelta(days=12))])
    early, late = answers(lake, tickets, DAY), answers(lake, tickets, DAY + timedelta(days=12))
    assert early == {(DAY, "a"): None, (DAY, "b"): 1.0}
    assert late == {(DAY, "a"): 0.0, (DAY, "b"): 1.0, (DAY + timedelta(days=12), "c"): None}

    def brier(at: date) -> dict[str, Any]:
        rows = labels.judge(tickets, lake, None, at).to_pylist()
        return next(r for r in rows if r["metric"] == "brier" and r["kind"] == "realised" and r["last"] == DAY)

    assert brier(DAY)["value"] == pytest.approx(0.09) and brier(DAY)["n"] == 1 and not brier(DAY)["mature"]
    after = brier(DAY + timedelta(days=12))
    assert after["value"] == pytest.approx((0.04 + 0.09) / 2) and after["n"] == 2 and after["mature"]


def test_nothing_known_after_the_cut_off_is_seen_wherever_it_lies(tickets: Workflow, lake: Lake) -> None:
    put(lake, tickets, DAY, {"entity_id": ["a"], "moment": ["intake"], "p_miss": [0.2]})
    cutoff = tickets.cutoff_of(DAY)
    known(lake, tickets, DAY, [("a", True, cutoff + timedelta(microseconds=1))])
    assert answers(lake, tickets, DAY) == {(DAY, "a"): None}
    known(lake, tickets, DAY + timedelta(days=1), [("a", True, cutoff - timedelta(hours=1))])  # told for a later day
    assert answers(lake, tickets, DAY) == {(DAY, "a"): None}
    known(lake, tickets, DAY, [("a", True, cutoff)])
    assert answers(lake, tickets, DAY) == {(DAY, "a"): 1.0}


def test_a_line_is_judged_by_its_curve_at_the_budget_that_came_to_stand(ads_workflow: Workflow, lake: Lake) -> None:
    spends = [[5_000_000, 10_000_000, 15_000_000]] * 3
    put(lake, ads_workflow, DAY, {
        "entity_id": ["x", "y", "z"], "spends": spends, "values": [[6.0, 10.0, 12.0]] * 3, "level": [10.0] * 3,
        "value_low": [8.0] * 3, "value_high": [12.0] * 3, "confidence": [0.9] * 3,
    })  # fmt: skip
    day = DAY + timedelta(days=1)
    table = pa.table(
        {
            "entity_id": ["x", "y"],
            "for_day": pa.array([DAY, DAY], pa.date32()),
            "known_at": pa.array([ads_workflow.cutoff_of(day)] * 2, pa.timestamp("us")),
            "value": [13.0, 20.0],
            "budget": [12.5, 99.0],
            "day": pa.array([day, day], pa.date32()),
        }
    )
    lake.replace_days(ads_workflow.table("outcomes"), table, [day])
    found = labels.scored(ads_workflow, lake, day).to_pylist()
    assert [r["predicted"] for r in found] == [11.0, 12.0, 10.0], "along the curve; at its end; the status quo"
    assert [r["inside"] for r in found][:2] == [1.0, 0.0] and np.isnan(found[2]["inside"])
    assert np.isnan([r["actual"] for r in labels.scored(ads_workflow, lake, DAY).to_pylist()]).all()


def test_a_day_whose_scores_were_made_anew_after_it_acted_is_left_out(tickets: Workflow, lake: Lake) -> None:
    days = [DAY - timedelta(days=1), DAY]
    for day, version in zip(days, (1, 2), strict=True):
        put(lake, tickets, day, {"entity_id": ["a"], "moment": ["intake"], "p_miss": [0.2]}, version)
    known(lake, tickets, DAY, [("a", True, tickets.cutoff_of(DAY))])
    assert {r["day"] for r in labels.scored(tickets, lake, DAY).to_pylist()} == set(days)
    assert {r["day"] for r in labels.scored(tickets, lake, DAY, {days[0]}).to_pylist()} == {DAY}
    assert labels.scored(tickets, lake, DAY, set(labels.span(tickets, DAY))).num_rows == 0


def test_without_scores_or_outcomes_there_is_nothing_to_judge(tickets: Workflow, lake: Lake) -> None:
    assert labels.judge(tickets, lake, None, DAY).schema.equals(perf.SCHEMA)
    assert stage.verdict(tickets, labels.judge(tickets, lake, None, DAY))[0]


def test_held_out_figures_come_from_the_versions_run(
    registry: Registry, queue: WorkflowHarness, ads: WorkflowHarness, tmp_path: Path
) -> None:
    run = registry.by_number("ticket_priority", 2).run_id
    registry.client.log_metric(run, "candidate_brier", 0.125)
    of = labels.held_out(queue.workflow, registry)
    assert of(2)["brier"] == 0.125 and of(99) == {}
    assert labels.held_out(ads.workflow, registry)(2) == {}, "its gate knows the realised cost, a score does not"
    gone = Registry(f"sqlite:///{tmp_path / 'nowhere' / 'mlflow.db'}", tmp_path.as_uri())
    assert labels.held_out(queue.workflow, gone)(2) == {}


def test_a_metric_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "ticket_priority"
    folder.mkdir()
    for file in (FOLDER / "ticket_priority").rglob("*"):
        if file.is_file():
            (folder / file.relative_to(FOLDER / "ticket_priority")).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(FOLDER / "ticket_priority")).write_bytes(file.read_bytes())
    path = folder / "workflow.yaml"
    path.write_text(path.read_text().replace("  metric: brier", "  metric: average_precision"))
    with pytest.raises(WorkflowInvalid, match="retraining: metric: 'average_precision' is not measured"):
        load(folder)


def test_the_asset_tells_every_day_once_with_numbers_page_and_words(
    bench: WorkflowHarness, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Dagster, on both workflows' real scores: a run again gives the same rows."""
    training = bench.workflow.training.model_copy(
        update={"maturity_days": min(bench.workflow.training.maturity_days, 2)}
    )
    spec = bench.workflow.retraining.model_copy(update={"min_rows": 20, "window_days": 4})
    workflow = bench.workflow.model_copy(update={"training": training, "retraining": spec})
    days = bench.days[-8:]
    for day in days:
        scored = scoring.score_day(workflow, bench.lake, registry, day, now=bench.morning(day))
        scoring.write_scores(workflow, bench.lake, day, scored)
    monkeypatch.setenv("SIGNALBOX_HOME", str(bench.root))
    monkeypatch.setenv("SIGNALBOX_MLFLOW_URI", registry.uri)
    given = {k: v for k, v in resources(None).items() if k in ("lake", "ledger", "registry", "clock", "reports")}
    asset = stage.build(workflow)
    job = dg.Definitions(assets=[asset], resources=given).resolve_implicit_global_asset_job_def()
    table, seen = workflow.table("performance"), []
    with dg.DagsterInstance.ephemeral() as instance:
        for _ in range(2):
            tags = {
                "dagster/asset_partition_range_start": str(days[-2]),
                "dagster/asset_partition_range_end": str(days[-1]),
            }
            result = job.execute_in_process(instance=instance, tags=tags)
            assert result.success
            seen.append(
                bench.lake.read(table).sort_by([(c, "ascending") for c in ("day", "metric", "kind", "first", "last")])
            )
        checks = {c.check_name: c for c in result.get_asset_check_evaluations()}
        check = checks["performance"]
        assert set(checks) == {"performance", "judged"} and checks["judged"].severity == dg.AssetCheckSeverity.WARN
        assert check.severity == dg.AssetCheckSeverity.WARN and labels.metric_of(workflow) in str(check.description)
        events = instance.fetch_materializations(asset.key, limit=10).records
        numbers = {k: v for e in events for k, v in e.asset_materialization.metadata.items()}  # type: ignore[union-attr]
        observed = instance.fetch_observations(asset.key, limit=10).records
    assert seen[0].equals(seen[1]) and set(seen[0]["day"].to_pylist()) == set(days[-2:])
    metric = labels.metric_of(workflow)
    # 24 lines a day are too few to know the size of errors: nothing is estimated of amounts then
    assert (f"estimated {metric} of the day" in numbers) is (workflow.name == "ticket_priority")
    assert all(f"realised {metric} of the day" in e.asset_observation.metadata for e in observed)  # type: ignore[union-attr]
    assert {e.partition_key for e in observed} <= {str(d) for d in days[:-1]} and observed
    page = bench.root / "reports" / workflow.name / str(days[-1]) / "performance.html"
    assert "<svg" in page.read_text()
    rule = [r["version"] for r in seen[0].to_pylist() if r["first"] == days[0]]
    assert all(v is None for v in rule), "the rule scored before the first version was trained"
