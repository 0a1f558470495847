"""The life of a version through Dagster: the registry's sensor and its job, the mornings of a shadow, who moved an alias."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import flask
import mlflow.store.db.utils
import pytest

from assets.resources import resources
from delivery.ledger import Ledger
from models.evaluation.gate import Verdict
from models.registry import CHAMPION, Registry
from orchestration import alias_log, assembly, runner
from pipeline.lifecycle import candidate_evaluation, promotion, state
from pipeline.workflow import Promotion
from tests.conftest import WorkflowHarness

NAME = "ad_budget"


@pytest.fixture
def bench(ads: WorkflowHarness, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkflowHarness:
    """``ad_budget`` with a day of shadow, in a state folder of its own."""
    found = ads.copy(tmp_path / "bench")
    for name, value in {
        "SIGNALBOX_HOME": str(tmp_path / "home"), "SIGNALBOX_LAKE": str(found.root / "lake"),
        "SIGNALBOX_MLFLOW_URI": registry.uri, "SIGNALBOX_MLFLOW_ARTIFACTS": registry.artifacts,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "home").mkdir()
    shadowed = found.workflow.model_copy(update={"promotion": Promotion(shadow_days=1)})
    return replace(found, workflow=shadowed)


@pytest.fixture
def book(bench: WorkflowHarness, registry: Registry) -> Iterator[Ledger]:
    """The state folder's ledger; version 2 is champion."""
    found: Ledger = resources()["ledger"].open(lambda: bench.morning(bench.days[-2], 1))
    found.promotion(NAME, 2, "promoted", "run", {"digest": registry.by_number(NAME, 2).digest})
    yield found
    found.close()


def stands(registry: Registry) -> dict[str, int]:
    return dict(registry.standing(NAME).aliases)


def test_a_moved_alias_starts_one_run_that_answers_it(
    bench: WorkflowHarness, registry: Registry, book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = bench.morning(bench.last).isoformat()
    built, given = assembly.build([bench.workflow], now=now).get_repository_def(), resources(now)
    sensor, job = built.get_sensor_def(f"{NAME}_registry"), built.get_job(f"{NAME}_reconcile")
    with dg.DagsterInstance.ephemeral() as instance:

        def look() -> Any:
            found: Any = sensor(dg.build_sensor_context(instance=instance, repository_def=built, resources=given))
            return found if isinstance(found, dg.SkipReason) else found[0]

        def answer() -> Any:
            return job.execute_in_process(instance=instance, resources=given, raise_on_error=True)

        promotion.reconcile(bench.workflow, registry, book, bench.lake, bench.morning(bench.last))
        assert isinstance(look(), dg.SkipReason) and stands(registry) == {CHAMPION: 2}
        registry.follow(NAME, {CHAMPION: 1})
        alias_log.note("kim", NAME, CHAMPION, 1)
        first = look()
        assert "champion: stands at 1, the ledger says 2" in first.tags["signalbox/cause"]
        assert look().run_key == first.run_key, "the same difference starts one run"
        monkeypatch.setattr(candidate_evaluation, "judge", lambda *_, **__: Verdict(False, ("worse by 9%",)))
        assert answer().success
        assert stands(registry) == {CHAMPION: 2} and isinstance(look(), dg.SkipReason)
        told = book.promotions(NAME)[-1]
        assert (told.action, told.actor) == ("put back", "mlflow:kim") and "worse by 9%" in told.evidence["reason"]
        registry.follow(NAME, {CHAMPION: 1})
        assert look().run_key != first.run_key, "moved again, asked again"
        seen = []

        def judged(*_: Any, against: Any) -> Verdict:
            seen.append(against.number)
            return Verdict(True, ())

        monkeypatch.setattr(candidate_evaluation, "judge", judged)
        assert answer().success and seen == [2]
        assert state.live(book, NAME)["champion"] == 1 and stands(registry) == {CHAMPION: 1, "previous_champion": 2}

        monkeypatch.setattr(mlflow.store.db.utils, "MAX_RETRY_COUNT", 1)
        garbage = bench.root / "garbage.db"
        garbage.write_bytes(b"no database at all, but long enough to look like one" * 100)
        monkeypatch.setenv("SIGNALBOX_MLFLOW_URI", f"sqlite:///{garbage}")
        down = look()
        assert isinstance(down, dg.SkipReason) and "MLflow does not answer" in str(down.skip_message)


def test_a_challenger_spends_its_day_in_the_shadow_and_is_champion_the_morning_after(
    bench: WorkflowHarness, registry: Registry, book: Ledger, tmp_path: Path
) -> None:
    book.promotion(NAME, 1, "shadow", "run", {"digest": registry.by_number(NAME, 1).digest})
    registry.follow(NAME, {CHAMPION: 1})  # somebody moves the alias: it decides nothing
    decided = []
    with dg.DagsterInstance.ephemeral() as instance:
        for day in bench.days[-2:]:
            now = bench.morning(day).isoformat()
            result = runner.run(bench.workflow, "decide", day, day, now=now, instance=instance)
            assert result.success, runner.failed_steps(result)
            (batch,) = bench.lake.read(bench.workflow.table("batches"), days=[day]).to_pylist()
            decided.append((batch["model_version"], batch["step"]))
            said = {
                e.asset_key.path[-1]: e.event_specific_data.materialization.metadata  # type: ignore[union-attr]
                for e in result.filter_events(lambda e: e.is_step_materialization)
                if e.asset_key is not None
            }
            if day == bench.days[-2]:
                assert "champion stands at 1, the ledger says 2" in str(said["scores"]["moved in MLflow"].value)
                assert "decided differently" in str(said["decisions"]["challenger"].value)
    assert decided == [(2, "champion"), (1, "champion")]
    (row,) = bench.lake.read(bench.workflow.table("shadow")).to_pylist()
    assert (row["day"], row["version"], row["scored"], row["stage"]) == (bench.days[-2], 1, True, "shadow")
    page = tmp_path / "home" / "reports" / NAME / bench.days[-2].isoformat() / "shadow.html"
    assert "Version 1 (shadow) beside version 2" in page.read_text() and row["page"].endswith("shadow.html")
    assert state.live(book, NAME)["champion"] == 1
    assert book.promotions(NAME)[-1].evidence["day"] == str(bench.last)
    again = runner.run(
        bench.workflow, "decide", bench.last, bench.last, now=bench.morning(bench.last + timedelta(days=5)).isoformat()
    )
    assert again.success and len(book.promotions(NAME)) == 3, "a backfill moves nothing"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow's alias route behind our authentication, as MLflow calls it: more than once a request."""
    monkeypatch.setenv("SIGNALBOX_MLFLOW_ALIAS_LOG", str(tmp_path / "logs" / "aliases.jsonl"))
    mlflows = SimpleNamespace(
        authenticate_request_basic_auth=lambda: flask.request.authorization or flask.Response(status=401)
    )
    monkeypatch.setitem(sys.modules, "mlflow.server.auth", mlflows)
    app = flask.Flask("server")

    @app.before_request
    def before() -> Any:
        for _ in range(2):
            found = alias_log.authenticate()
        return found if isinstance(found, flask.Response) else None

    @app.route("/api/2.0/mlflow/registered-models/alias", methods=["POST", "DELETE", "GET"])
    @app.route("/ajax-api/2.0/mlflow/registered-models/alias", methods=["POST", "DELETE", "GET"])
    @app.route("/api/2.0/mlflow/registered-models/get", methods=["POST"])
    def alias() -> Any:
        return flask.Response("{}", 403 if flask.request.headers.get("X-Denied") else 200)

    yield app.test_client()


def test_the_server_writes_down_who_moved_an_alias(server: Any) -> None:
    def ask(method: str, user: str | None, where: str = "alias", api: str = "api", **more: Any) -> int:
        auth = (user, "secret") if user else None
        path = f"/{api}/2.0/mlflow/registered-models/{where}"
        return int(server.open(path, method=method, auth=auth, **more).status_code)

    body = {"name": NAME, "alias": CHAMPION, "version": "3"}
    assert alias_log.actor(NAME, CHAMPION, 3) is None, "no log"
    assert ask("POST", None, json=body) == 401 and not alias_log.path().exists()
    assert ask("POST", "kim", json=body) == 200
    assert alias_log.actor(NAME, CHAMPION, 3) == "mlflow:kim"
    assert ask("POST", "eve", json={**body, "version": "4"}, headers={"X-Denied": "1"}) == 403
    assert ask("GET", "eve", query_string=body) == 200 and ask("POST", "eve", "get", json=body) == 200
    assert alias_log.actor(NAME, CHAMPION, 3) == "mlflow:kim", "what was refused or only read has moved nothing"
    assert ask("DELETE", "ann", api="ajax-api", json={"name": NAME, "alias": CHAMPION}) == 200
    assert alias_log.actor(NAME, CHAMPION, None) == "mlflow:ann" and alias_log.actor(NAME, CHAMPION, 3) is None
    assert alias_log.actor("another", CHAMPION, None) is None
    assert [json.loads(one)["user"] for one in alias_log.path().read_text().splitlines()] == ["kim", "ann"]
    assert "secret" not in alias_log.path().read_text() and alias_log.path().stat().st_mode & 0o077 == 0
    with alias_log.path().open("a") as log:
        log.write('{"at": "2026-')  # the disk was full
    assert alias_log.actor(NAME, CHAMPION, None) == "mlflow:ann"


def test_the_server_is_started_with_that_function() -> None:
    ini = Path(__file__).resolve().parents[2] / "mlflow" / "basic_auth.ini"
    assert f"authorization_function = {alias_log.__name__}:{alias_log.authenticate.__name__}" in ini.read_text()
