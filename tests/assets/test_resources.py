"""Resources: what Dagster shows of them."""

import json

import pytest

from assets.resources import resources
from pipeline.settings import home, mlflow_uri
from pipeline.workflow import load_all


def test_a_password_in_the_registrys_address_is_no_part_of_what_dagster_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALBOX_MLFLOW_URI", "postgresql+psycopg2://me:marked-secret@127.0.0.1/mlflow")
    from dagster._core.remote_representation.external_data import RepositorySnap

    from orchestration.assembly import build

    shown = RepositorySnap.from_def(build(load_all().workflows).get_repository_def())
    assert "marked-secret" not in repr(shown)
    assert "marked-secret" not in json.dumps([r.model_dump() for r in resources().values()], default=str)
    assert resources()["registry"].registry.uri == mlflow_uri()


def test_everything_lies_below_the_state_folder_unless_a_variable_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    for name in ("LAKE", "LANDING", "MLFLOW_URI", "REPORTS"):
        monkeypatch.delenv(f"SIGNALBOX_{name}", raising=False)
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    assert home() == tmp_path
    given = resources()
    assert given["lake"].root == str(tmp_path / "lake") and given["reports"].root == str(tmp_path / "reports")
    assert mlflow_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("SIGNALBOX_LAKE", "s3://bucket/lake")
    assert resources()["lake"].lake.uri("w/events") == "s3://bucket/lake/w/events"
