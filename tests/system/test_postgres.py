"""PostgreSQL tried for real: Dagster's instance and MLflow's registry on a server, by configuration alone."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy

from assets.resources import resources
from delivery.sandbox.worlds import advertising
from models.registry import CHAMPION, files_digest
from orchestration import runner
from pipeline.workflow import FOLDER, load
from tests.support.aliases import promote
from tests.support.postgres import PASSWORD, Server

pytestmark = pytest.mark.system


def counted(url: str, sql: str) -> int:
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(sqlalchemy.text(sql)).scalar_one()
    engine.dispose()
    return int(found)


def test_runs_and_materialisations_lie_in_postgres(
    postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database("dagster")
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    monkeypatch.setenv("SIGNALBOX_DAGSTER_CONFIG", "postgres")
    monkeypatch.setenv("SIGNALBOX_DAGSTER_POSTGRES_URL", url)
    workflow = load(FOLDER / "ad_budget")
    days = [workflow.start + timedelta(days=n) for n in range(3)]
    rows = advertising.history(advertising.World(3, "easy", 20, origin=workflow.start), workflow.start, len(days))
    for day in days:
        advertising.export_day(rows, tmp_path / "landing" / "ad_budget" / "export", day)
    after = f"{days[-1] + timedelta(days=1)}T04:00:00"

    result = runner.run(workflow, "prepare", days[0], days[-1], now=after)

    assert result.success, runner.failed_steps(result)
    assert "postgres" in (tmp_path / "dagster" / "dagster.yaml").read_text()
    with dg.DagsterInstance.get() as instance:
        assert instance.get_run_by_id(result.run_id).status is dg.DagsterRunStatus.SUCCESS
        done = instance.get_materialized_partitions(dg.AssetKey(["ad_budget", "features"]))
    assert done == {day.isoformat() for day in days}
    run = f"run_id = '{result.run_id}'"
    assert counted(url, f"SELECT count(*) FROM runs WHERE {run} AND status = 'SUCCESS'") == 1
    materialised = "dagster_event_type = 'ASSET_MATERIALIZATION'"
    assert counted(url, f"SELECT count(*) FROM event_logs WHERE {run} AND {materialised}") == 3 * len(days)
    assert counted(url, "SELECT count(*) FROM asset_check_executions WHERE execution_status = 'SUCCEEDED'") == 5
    assert not list(tmp_path.rglob("*.db")), "something went to SQLite beside it"
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and PASSWORD.encode() in f.read_bytes()]


def test_models_are_registered_and_read_back_from_postgres(
    postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lightgbm
    import numpy as np

    url = postgres.database("mlflow")
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    monkeypatch.setenv("SIGNALBOX_MLFLOW_URI", url)
    registry = resources()["registry"].registry
    x = np.arange(40, dtype=float).reshape(-1, 1)
    settings = {"verbosity": -1, "num_threads": 1, "min_data_in_leaf": 2}
    booster = lightgbm.train(settings, lightgbm.Dataset(x, x[:, 0], params=settings), num_boost_round=2)
    files = {"level.txt": booster.model_to_string().encode(), "meta.json": b"{}"}

    made = [
        registry.register(
            "ad_budget", files, trained_day=day, passed=True, params={"recipe": "{}"}, metrics={"mae": 1.0}, tags={},
            plots={}, card="# card", seed=1,
        )
        for day in (date(2026, 4, 1), date(2026, 4, 8))
    ]  # fmt: skip
    for version in made:
        promote(registry, version)

    assert registry.by_alias("ad_budget", CHAMPION) == made[1]
    assert registry.as_of("ad_budget", date(2026, 4, 9)) == [made[1], made[0]]
    assert registry.load(made[0]) == files and files_digest(files) == made[0].digest
    assert registry.recipe(made[1]) == {}
    assert counted(url, "SELECT count(*) FROM model_versions") == 2
    assert counted(url, "SELECT count(*) FROM experiments WHERE name = 'ad_budget'") == 1
    assert not list(tmp_path.rglob("*.db")), "something went to SQLite beside it"
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and PASSWORD.encode() in f.read_bytes()]
