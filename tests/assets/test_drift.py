"""The stage ``drift``: its named references, what it records, and how days are counted."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from assets import drift as stage
from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource, ReportsResource
from delivery.ledger import Ledger
from models.registry import Registry
from pipeline.workflow import Workflow
from tests.conftest import WorkflowHarness
from tests.support.ledgers import KEY


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALBOX_LEDGER_KEY", KEY.decode())


@pytest.fixture
def book(tmp_path: Path, ads: WorkflowHarness) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY, clock=lambda: ads.morning(ads.last)) as opened:
        yield opened


def saying(workflow: Workflow, **drift: object) -> Workflow:
    return workflow.model_copy(update={"drift": workflow.drift.model_copy(update=drift)})


def test_a_reference_is_named_with_its_days_and_versions(
    ads: WorkflowHarness, tmp_path: Path, registry: Registry
) -> None:
    bench = ads.copy(tmp_path / "bench")
    champion = registry.as_of("ad_budget", bench.last)[0]
    trailing = stage.reference(bench.workflow, bench.lake, champion, bench.last, 3)
    window = bench.workflow.drift.window_days
    assert trailing.said == {
        "name": "trailing", "features_version": 3, "days": 28, "first_day": str(bench.last - timedelta(days=window + 27)),
        "last_day": str(bench.last - timedelta(days=window)),
    }  # fmt: skip
    pinned = saying(bench.workflow, reference="pinned", pinned_from=bench.days[2], pinned_to=bench.last)
    chosen = stage.reference(pinned, bench.lake, None, bench.last, 3)
    assert chosen.days == tuple(bench.days[2:-window]), "the window's own days are no reference for it"
    training = saying(bench.workflow, reference="training")
    with pytest.raises(stage.ReferenceMissing, match="no champion"):
        stage.reference(training, bench.lake, None, bench.last, 3)
    rows = pa.table({"day": bench.days[:9], "as_of": [champion.trained_day] * 9})
    at = bench.lake.replace("ad_budget/training_set", rows, predicate="true", partition_by=["as_of"])
    found = stage.reference(training, bench.lake, champion, bench.last, 3)
    assert found.days == tuple(bench.days[:9])
    assert (found.said["model_version"], found.said["training_set_version"]) == (champion.number, at)


def test_the_gain_of_the_champion_s_boosters_is_shared_among_its_features(
    ads: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    champion, gains, why = stage.importances(ads.workflow, registry, book, ads.last)
    assert champion is not None and gains is not None and not why
    assert sum(gains.values()) == pytest.approx(1.0) and max(gains.values()) <= 1
    # nothing of what the model learned goes unjudged: what it makes itself counts for what that is made from
    judged = {name for columns in ads.workflow.drift_columns for name in columns}
    assert set(ads.workflow.features.numeric) <= judged
    assert sum(gain for name, gain in gains.items() if name in judged) == pytest.approx(1.0)
    nobody, none, said = stage.importances(ads.workflow, registry, book, ads.days[0] - timedelta(days=400))
    assert nobody is None and none is None and "no champion" in said


def test_an_alias_that_somebody_moved_changes_neither_importances_nor_the_reference(
    ads: WorkflowHarness, registry: Registry, book: Ledger
) -> None:
    for number in (1, 2):
        digest = registry.by_number("ad_budget", number).digest
        book.promotion("ad_budget", number, "promoted", "run", {"digest": digest})
    before = stage.importances(ads.workflow, registry, book, ads.last)
    registry.follow("ad_budget", {"champion": 1})
    assert registry.as_of("ad_budget", ads.last)[0].number == 1
    assert stage.importances(ads.workflow, registry, book, ads.last) == before
    assert before[0] is not None and before[0].number == 2
    # once it is answered it counts
    book.promotion("ad_budget", 1, "promoted", "ann")
    after = stage.importances(ads.workflow, registry, book, ads.last)
    assert after[0] is not None and after[0].number == 1


def _resources(bench: WorkflowHarness, at: Path, registry: Registry) -> dict[str, Any]:
    return {
        "lake": LakeResource(root=str(bench.root / "lake")),
        "ledger": LedgerResource(url=f"sqlite:///{at / 'ledger.db'}"),
        "clock": ClockResource(),
        "registry": RegistryResource(ui="http://mlflow", uri=registry.uri, artifacts=registry.artifacts),
        "reports": ReportsResource(
            root=str(at / "reports"), ui="http://reports", evidently_workspace=str(at / "evidently"), evidently_ui="http://evidently",
        ),
    }  # fmt: skip


def test_a_unit_change_is_found_on_its_day_and_recorded_with_its_reference(
    ads: WorkflowHarness, tmp_path: Path, registry: Registry
) -> None:
    bench = ads.copy(tmp_path / "bench")
    table, broken = "ad_budget/features", bench.last
    rows = bench.lake.read(table, days=[broken])
    column = rows.schema.get_field_index("cost_per_click_7")
    cents = pa.array([None if v is None else v * 100 for v in rows["cost_per_click_7"].to_pylist()], pa.float64())
    bench.lake.replace_days(table, rows.set_column(column, "cost_per_click_7", cents), [broken])
    span = (broken - timedelta(days=1), broken)
    result = dg.materialize(
        [stage.build(bench.workflow)],
        resources=_resources(bench, tmp_path, registry),
        tags={
            "dagster/asset_partition_range_start": str(span[0]),
            "dagster/asset_partition_range_end": str(span[1]),
        },
        raise_on_error=True,
    )
    assert result.success
    calm, found = bench.lake.read("ad_budget/drift", days=list(span)).sort_by("day").to_pylist()
    assert calm["judged"] and not calm["drifted"] and not calm["spoke"]
    assert found["spoke"] and found["drifted"], "a hundredfold need not wait for a second day"
    assert json.loads(found["columns"])["cost_per_click_7"]["grave"]
    assert json.loads(found["reference"])["name"] == "trailing" and found["scores_drifted"] is None
    assert "scores not judged: no day has been scored" in found["text"]
    assert (tmp_path / "reports" / "ad_budget" / str(broken) / "drift.json").is_file()


def test_a_short_reference_is_not_judged_and_only_the_rows_of_one_moment_are(
    queue: WorkflowHarness, ads: WorkflowHarness, tmp_path: Path, registry: Registry
) -> None:
    def judged(bench: WorkflowHarness, workflow: Workflow) -> dict[str, object]:
        result = dg.materialize(
            [stage.build(workflow)],
            partition_key=str(bench.last),
            resources=_resources(bench, tmp_path, registry),
        )
        assert result.success
        (row,) = bench.lake.read(f"{workflow.name}/drift", days=[bench.last]).to_pylist()
        return dict(row)

    bench = queue.copy(tmp_path / "queue")
    early = judged(bench, bench.workflow)
    assert not early["judged"] and "5 days of reference have rows, 14 are needed" in str(early["text"])
    # tickets that stay open are described again every day: which of them are left is no drift of what comes
    assert bench.workflow.drift.moment == "intake"
    table = "ticket_priority/features"
    rows = bench.lake.read(table, days=[bench.last])
    left = pa.array(
        [
            500.0 if m == "open" else p
            for m, p in zip(*(rows[c].to_pylist() for c in ("moment", "priority")), strict=True)
        ]
    )
    place = rows.schema.get_field_index("priority")
    bench.lake.replace_days(
        table, rows.set_column(place, "priority", left.cast(rows.schema.field(place).type)), [bench.last]
    )
    daily = saying(bench.workflow, window_days=1, min_rows=20)
    arrived, every = (judged(bench, saying(daily, moment=m)) for m in ("intake", None))
    drifted = [json.loads(str(found["columns"]))["priority"]["drifted"] for found in (arrived, every)]
    assert drifted == [False, True]


def test_scores_are_judged_only_among_days_that_one_version_scored(ads: WorkflowHarness, tmp_path: Path) -> None:
    bench = ads.copy(tmp_path / "bench")
    days = bench.days[-12:]
    scoring = pa.table(
        {
            "day": days,
            "model_version": [1] * 3 + [2] * 9,
            "model_digest": ["a"] * 3 + ["b"] * 9,
        }
    )
    bench.lake.replace_days("ad_budget/scoring", scoring, days)

    def scores(level: float) -> pa.Table:
        each = 120
        return pa.table(
            {
                "day": [d for d in days for _ in range(each)],
                "entity_id": [str(n) for _ in days for n in range(each)],
                "level": [float(n % 30) + (level if d >= days[-2] else 0.0) for d in days for n in range(each)],
                "curve": [[1.0]] * (each * len(days)),
            }
        )

    bench.lake.replace_days("ad_budget/scores", scores(0.0), days)
    calm = stage._judge_scores(bench.workflow, bench.lake, bench.last)
    assert calm.spoke is False and "version 2" in calm.text and "not judged: curve" in calm.text
    bench.lake.replace_days("ad_budget/scores", scores(30.0), days)
    assert stage._judge_scores(bench.workflow, bench.lake, bench.last).spoke is True
    early = stage._judge_scores(bench.workflow, bench.lake, days[5])
    assert early.spoke is None and "version 2 has scored 3 days, 8 are needed" in early.text
    # what was scored anew after the day had acted is none of what acts
    assert (
        "are not of the version that acted" in stage._judge_scores(bench.workflow, bench.lake, days[5], {days[5]}).text
    )
    fewer = stage._judge_scores(bench.workflow, bench.lake, bench.last, set(days[4:7]))
    assert "version 2 has scored 6 days, 8 are needed" in fewer.text
