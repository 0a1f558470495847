"""A registered champion is what MLflow alone can load: the pipeline's own scores, elsewhere, from the rows of its features."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models import catalog
from models.registry import Registry, Version
from models.training import fit
from pipeline import point_in_time
from pipeline.decisions import scoring
from pipeline.lifecycle import candidate_evaluation, registration
from tests.conftest import WorkflowHarness, moved
from tests.support.aliases import promote

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("ad_budget", "ticket_priority")


@dataclass(frozen=True)
class Registered:
    """Champions that were registered as a training registers them, and a day that they score."""

    registry: Registry
    versions: Mapping[str, Version]
    rows: Mapping[str, pa.Table]
    scores: Mapping[str, pa.Table]


def trained(bench: WorkflowHarness, registry: Registry) -> Version:
    """What the stage ``model`` does between the training set and the first place of a version."""
    workflow, day = bench.workflow, bench.last
    rows = point_in_time.ordered(point_in_time.training_set(workflow, bench.lake, day), "day")
    held = candidate_evaluation.held_out(workflow, bench.lake, day, rows)
    learn = point_in_time.rows_where(rows, workflow.training.train_on)
    spec = scoring.learner_spec(workflow)
    fitted = fit.fit_and_judge(
        learn, held.early, held.rows, learner=catalog.learner(workflow.model.kind), champion=None, spec=spec, day=day,
        decided=held.decided, **candidate_evaluation.asked(workflow, "cpu"),
    )  # fmt: skip
    made = registration.register(
        workflow, registry, fitted, learn, held, spec=spec, day=day, device="cpu", passed=True, facts={"device": "cpu"},
        card="# card", dataset=None,
    )  # fmt: skip
    promote(registry, made)
    return made


@pytest.fixture(scope="module")
def registered(
    tmp_path_factory: pytest.TempPathFactory, empty_registry_folder: Path, ads: WorkflowHarness, queue: WorkflowHarness
) -> Registered:
    registry = moved(empty_registry_folder, tmp_path_factory.mktemp("registering") / "registry")
    benches = {one.workflow.name: one for one in (ads, queue)}
    versions = {name: trained(one, registry) for name, one in benches.items()}
    rows, scores = {}, {}
    for name, one in benches.items():
        rows[name] = point_in_time.ordered(one.lake.read(one.workflow.table("features"), days=[one.last]))
        scored = scoring.score_day(one.workflow, one.lake, registry, one.last, now=one.morning(one.last))
        assert scored.step == "champion"
        scores[name] = scored.table
    return Registered(registry, versions, rows, scores)


def same(found: pd.DataFrame, scores: pa.Table) -> None:
    """The pipeline's own scores, to 1e-12."""
    assert list(found.columns) == scores.column_names and len(found) == scores.num_rows
    for name in scores.column_names:
        ours, theirs = scores.column(name).to_pylist(), found[name].tolist()
        if pa.types.is_list(scores.column(name).type):
            ours, theirs = [x for row in ours for x in row], [x for row in theirs for x in row]
        if isinstance(ours[0], float | int) and not isinstance(ours[0], bool):
            a, b = (np.array(x, dtype=np.float64) for x in (ours, theirs))
            np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12, err_msg=name)
        else:
            assert [x for x in theirs if not pd.isna(x)] == [x for x in ours if x is not None], name


def elsewhere(registry: Registry) -> dict[str, str]:
    """The environment of somebody who has MLflow and no checkout, and reads no pickle."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP") and "SIGNALBOX" not in k}
    said = {"MLFLOW_TRACKING_URI": registry.uri, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    return env | said | {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}


ALONE = """
import importlib.util, json, sys
from pathlib import Path

site = [p for p in sys.path if "site-packages" in p or "lib/python" in p or p.endswith(".zip")]
sys.path[:] = site
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
assert importlib.util.find_spec("models") is None, "a package models is here without the version's own"

import mlflow.pyfunc
import pandas as pd

for name in sys.argv[2:]:
    if name == "ticket_priority":
        others = {one: type(sys)(one) for one in ("models", "common")}  # of the user, who may have such
        sys.modules.update(others)
    folder = Path(sys.argv[1]) / name
    model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
    rows = pd.read_parquet(folder / "rows.parquet")
    model.predict(rows).to_parquet(folder / "scores.parquet")
    model.predict(rows.iloc[[3]]).to_parquet(folder / "one.parquet")
    score = model.unwrap_python_model().model.learner.score
    (folder / "code").write_text(score.__func__.__code__.co_filename)
assert all(sys.modules.pop(one) is other for one, other in others.items())
loaded = [m for m in sys.modules if m.split(".")[0] in ("assets", "pipeline", "common", "delivery", "data_checks", "orchestration", "models")]
assert not loaded, loaded
"""


def test_a_champion_gives_the_pipelines_scores_in_a_process_with_mlflow_alone(
    registered: Registered, tmp_path: Path
) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        pq.write_table(registered.rows[name], tmp_path / name / "rows.parquet")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path), *NAMES], env=elsewhere(registered.registry), cwd=tmp_path,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    for name in NAMES:
        same(pd.read_parquet(tmp_path / name / "scores.parquet"), registered.scores[name])
        same(pd.read_parquet(tmp_path / name / "one.parquet"), registered.scores[name].slice(3, 1))
        code = Path((tmp_path / name / "code").read_text())
        assert code.parts[-4:-2] == ("code", "models") and not code.is_relative_to(ROOT)


@pytest.mark.parametrize("name", NAMES)
def test_mlflow_models_predict_gives_the_pipelines_scores(registered: Registered, tmp_path: Path, name: str) -> None:
    records = json.dumps({"dataframe_records": registered.rows[name].to_pylist()}, default=str)
    (tmp_path / "rows.json").write_text(records)
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "models", "predict", "-m", f"models:/{name}@champion", "-i", "rows.json",
         "-o", "scores.json", "--env-manager", "local"],
        env=elsewhere(registered.registry), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-3000:]
    found = json.loads((tmp_path / "scores.json").read_text())["predictions"]
    same(pd.DataFrame(found, columns=registered.scores[name].column_names), registered.scores[name])


def in_this_process(registered: Registered, name: str) -> Any:
    import mlflow.pyfunc

    registered.registry.client.search_registered_models()
    mlflow.set_tracking_uri(registered.registry.uri)
    return mlflow.pyfunc.load_model(f"models:/{name}@champion")


def code_of(model: Any) -> Path:
    """Where the code lies that scores."""
    return Path(type(model.unwrap_python_model().model.learner).score.__code__.co_filename)


def test_each_version_runs_its_own_code_and_leaves_that_of_the_process(registered: Registered, tmp_path: Path) -> None:
    """A process that has imported ``models`` loads a version of other code beside it; of the same code there is one."""
    import mlflow.pyfunc

    name, mine = "ad_budget", sys.modules["models.learners.response"]
    same_code = in_this_process(registered, name)
    assert code_of(same_code).is_relative_to(ROOT)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path)))
    module = folder / "code" / "models" / "learners" / "response.py"
    module.write_text(module.read_text().replace("FARTHEST = 5.0", "FARTHEST = 1.0"))
    other_code = mlflow.pyfunc.load_model(str(folder))
    assert code_of(other_code) == module and sys.modules["models.learners.response"] is mine
    assert code_of(in_this_process(registered, name)).is_relative_to(ROOT)
    rows = registered.rows[name].to_pandas()
    assert not np.array_equal(other_code.predict(rows)["level"], same_code.predict(rows)["level"])
    (folder / "code" / "models" / "serving.py").unlink()
    with pytest.raises(FileNotFoundError, match="the version's own code is gone"):
        mlflow.pyfunc.load_model(str(folder))


def test_the_signature_holds_what_is_read_and_no_more(registered: Registered) -> None:
    from mlflow.exceptions import MlflowException

    for name in NAMES:
        model, rows = in_this_process(registered, name), registered.rows[name].to_pandas()
        takes = {one.name: one.required for one in model.metadata.signature.inputs}
        assert [one.name for one in model.metadata.signature.outputs] == registered.scores[name].column_names
        same(model.predict(rows[list(takes)]), registered.scores[name])
        assert [one for one, required in takes.items() if not required] == ["entity_id"] * (name == "ticket_priority")
        for left_out in ("entity_id", list(takes)[-1]):
            fewer = rows[[c for c in takes if c != left_out]]
            if takes[left_out]:
                with pytest.raises(MlflowException, match=f"missing inputs .*{left_out}"):
                    model.predict(fewer)
            else:
                same(model.predict(fewer), registered.scores[name].drop_columns([left_out]))
        example = model.input_example
        assert len(example) == 3 and len(model.predict(example)) == 3
        assert set(example["entity_id"]) == {"example-1", "example-2", "example-3"}


def test_what_mlflow_shows_of_a_training(registered: Registered) -> None:
    version, client = registered.versions["ad_budget"], registered.registry.client
    run = client.get_run(version.run_id)
    assert run.data.params["model.rounds"] == "8" and json.loads(run.data.params["recipe"])["rounds"] == 8
    for where in ("training", "validation"):
        points = client.get_metric_history(version.run_id, f"curve_{where}_mae")
        assert [point.step for point in points] == list(range(1, 9))


def test_the_last_point_of_a_curve_is_what_the_gate_measured(ads: WorkflowHarness) -> None:
    rows = point_in_time.ordered(point_in_time.training_set(ads.workflow, ads.lake, ads.last), "day")
    held = candidate_evaluation.held_out(ads.workflow, ads.lake, ads.last, rows)
    model: Any = ads.fit(held.split)
    drawn = registration.curves(model, held)
    assert drawn["validation_mae"][8] == pytest.approx(model.evaluate(held.rows)["mae"], rel=1e-9)
    assert registration.curves(None, held) == {}


def test_curves_of_tickets_have_every_head_and_fall(queue: WorkflowHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = point_in_time.ordered(point_in_time.training_set(queue.workflow, queue.lake, queue.last), "day")
    none = rows.slice(0, 0)
    held = candidate_evaluation.Held(queue.last, queue.last, rows, none, none, fit.Newest(none, none))
    monkeypatch.setattr(registration, "CURVE_ROWS", 500)
    drawn = registration.curves(queue.fit(queue.last), held)
    assert set(drawn) == {f"training_{loss}" for loss in ("log_loss", "hours_error", "effort_error")}
    for one in drawn.values():
        assert list(one) == list(range(1, 9)) and one[8] < one[1]
