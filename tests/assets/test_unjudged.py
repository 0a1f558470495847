"""A collapse or a surge of rows is told by itself, and so are days on end without a judgement."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest

from assets import drift as stage
from assets.common import unjudged
from data_checks import drift
from models.registry import Registry
from tests.assets.test_drift import _resources
from tests.conftest import WorkflowHarness
from tests.support.ledgers import KEY

DAY = date(2026, 5, 1)


def reference(rows: int = 40, days: int = 28) -> drift.Baseline:
    draw = np.random.default_rng(1)
    each = draw.poisson(rows, days)
    on = np.repeat([DAY - timedelta(days=days - n) for n in range(days)], each)
    table = pa.table({"day": pa.array(list(on), pa.date32()), "x": draw.normal(size=len(on))})
    return drift.Baseline(table, numeric=["x"], categorical=[], block=7)


@pytest.mark.parametrize(
    ("rows", "unlike"), [(0, True), (7 * 12, True), (7 * 38, False), (7 * 45, False), (7 * 90, True)]
)
def test_rows_that_stay_away_or_pour_in_are_told_whatever_the_columns_say(rows: int, unlike: bool) -> None:
    found = drift.volume(rows, reference(), drift.DriftSpec())
    assert found is not None and found.unlike is unlike
    assert ("collapsed" in found.text or "grew" in found.text) is unlike


def test_a_reference_of_few_days_says_nothing_of_volume() -> None:
    assert drift.volume(0, reference(days=3), drift.DriftSpec()) is None


def test_quiet_days_raise_no_alarm_of_their_volume() -> None:
    """200 quiet weeks at 40 rows a day, whose weekdays differ."""
    draw, spec = np.random.default_rng(3), drift.DriftSpec()
    week = np.array([1.3, 1.3, 1.2, 1.1, 1.1, 0.5, 0.5]) * 40
    alarms = 0
    for _ in range(200):
        each = draw.poisson(np.tile(week, 4))
        on = np.repeat([DAY - timedelta(days=28 - n) for n in range(28)], each)
        table = pa.table({"day": pa.array(list(on), pa.date32()), "x": np.zeros(len(on))})
        found = drift.volume(
            int(draw.poisson(week).sum()), drift.Baseline(table, numeric=["x"], categorical=[], block=7), spec
        )
        alarms += found is not None and found.unlike
    print(f"{alarms} of 200 quiet weeks")
    assert alarms == 0


def test_days_without_a_judgement_are_counted_from_the_first_that_could_have_one() -> None:
    since = DAY - timedelta(days=10)
    assert unjudged(DAY, {DAY}, since, 7, "few rows") == (True, "judged")
    assert unjudged(DAY, {DAY - timedelta(days=6)}, since, 7, "few rows") == (True, "not judged: few rows")
    passed, text = unjudged(DAY, {DAY - timedelta(days=7)}, since, 7, "few rows")
    assert not passed and text.startswith(
        "not judged for 7 days, 7 are the limit (the last day that was is 2026-04-24)"
    )
    assert unjudged(since - timedelta(days=1), set(), since, 7, "")[0] and unjudged(since, set(), since, 7, "")[0]
    passed, text = unjudged(DAY, set(), since, 7, "few rows")
    assert not passed and "11 days" in text and "none ever was" in text


def test_a_desk_whose_tickets_stay_away_is_told_by_the_stage(
    ads: WorkflowHarness, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last three days have a single line each: too few to be judged, and that is what is told."""
    monkeypatch.setenv("SIGNALBOX_LEDGER_KEY", KEY.decode())
    bench = ads.copy(tmp_path / "bench")
    table = bench.workflow.table("features")
    for day in bench.days[-3:]:
        bench.lake.replace_days(table, bench.lake.read(table, days=[day]).slice(0, 1), [day])
    spec = bench.workflow.drift.model_copy(update={"unjudged_days": 2, "reference_days": 14})
    resources = _resources(bench, tmp_path, registry)
    result = dg.materialize(
        [stage.build(bench.workflow.model_copy(update={"drift": spec}))],
        resources=resources,
        tags={
            "dagster/asset_partition_range_start": str(bench.days[-3]),
            "dagster/asset_partition_range_end": str(bench.last),
        },
    )
    told = {c.check_name: (c.passed, str(c.description)) for c in result.get_asset_check_evaluations()}
    assert told["stable"][0] and not told["volume"][0] and not told["judged"][0]
    assert "the volume collapsed to 0.04×" in told["volume"][1]
    assert "2 are the limit" in told["judged"][1] and "rows beside" in told["judged"][1]
    row = bench.lake.read("ad_budget/drift", days=[bench.last]).to_pylist()[0]
    assert row["volume_drifted"] and row["volume_spoke"] and not row["judged"]
