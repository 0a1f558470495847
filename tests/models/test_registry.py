"""The registry: the version that counts for a day, and files that are read by their digests and never run."""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import replace
from datetime import date, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from models import serving
from models.registry import (
    CHAMPION,
    PREVIOUS,
    Dataset,
    ModelBlocked,
    ModelMissing,
    ModelUnreadable,
    Registry,
    Version,
    files_digest,
    flat,
)
from pipeline import point_in_time
from tests.support.aliases import promote, step_back

NAME = "ad_budget"


def artifacts(registry: Registry, version: Version) -> Path:
    """The folder in which a version's files lie."""
    found = registry.client.get_model_version(version.name, str(version.number))
    model = registry.client.get_logged_model(str(found.source).removeprefix("models:/"))
    return Path(str(model.artifact_location).removeprefix("file://"))


def kept(registry: Registry, version: Version) -> Path:
    """Where the files lie that ``load`` reads."""
    return artifacts(registry, version) / "artifacts" / "files"


def refused(registry: Registry, version: Version) -> str:
    with pytest.raises(ModelUnreadable) as caught:
        registry.load(version)
    said = str(caught.value)
    assert repr(version.name) in said and f"version {version.number}" in said
    return said


def test_what_was_registered_is_read_back_to_the_byte(registry: Registry, ads: Any) -> None:
    version = registry.by_number(NAME, 2)
    files = registry.load(version)
    assert files == ads.fit(version.trained_day).files()
    assert version.digest == files_digest(files)
    assert version.passed and version.trained_day == ads.last - timedelta(days=1)


def test_the_digest_covers_names_and_contents() -> None:
    one = files_digest({"a.txt": b"1", "b.json": b"2"})
    assert one == files_digest({"b.json": b"2", "a.txt": b"1"})
    others = [
        {"a.txt": b"1", "b.json": b"3"},
        {"a.txt": b"1", "c.json": b"2"},
        {"a.txt": b"1"},
        {"a.txt": b"12", "b.json": b""},
    ]
    assert one not in {files_digest(o) for o in others}


@pytest.mark.parametrize("file", ["level.txt", "meta.json"])
def test_a_file_that_was_changed_is_refused_before_it_is_parsed(registry: Registry, file: str) -> None:
    version = registry.by_number(NAME, 2)
    path = kept(registry, version) / file
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    said = refused(registry, version)
    assert file in said and "differs" in said
    assert registry.load(registry.by_number(NAME, 1)), "the other version is as it was"


@pytest.mark.parametrize("file", ["artifacts/files/level.txt", "artifacts/files/meta.json", "MLmodel"])
def test_a_file_that_is_gone_is_named(registry: Registry, file: str) -> None:
    version = registry.by_number(NAME, 2)
    (artifacts(registry, version) / file).unlink()
    assert Path(file).name in refused(registry, version)


def test_artifacts_that_are_gone_are_unreadable(registry: Registry) -> None:
    version = registry.by_number(NAME, 2)
    folder = artifacts(registry, version)
    folder.rename(folder.with_name("elsewhere"))
    refused(registry, version)


def test_a_link_out_of_the_artifacts_is_refused(registry: Registry, tmp_path: Path) -> None:
    version = registry.by_number(NAME, 2)
    path = kept(registry, version) / "meta.json"
    (tmp_path / "meta.json").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "meta.json")
    refused(registry, version)


def test_a_file_name_that_climbs_out_is_refused(registry: Registry, tmp_path: Path) -> None:
    version = registry.by_number(NAME, 2)
    recorded = json.loads(registry.client.get_model_version(NAME, "2").tags["signalbox.files"])
    outside = os.path.relpath(tmp_path / "secret", kept(registry, version))
    (tmp_path / "secret").write_bytes(b"")
    recorded[outside] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    registry.client.set_model_version_tag(NAME, "2", "signalbox.files", json.dumps(recorded))
    assert "secret" in refused(registry, version)


def test_tags_that_were_changed_with_the_file_do_not_make_it_readable(registry: Registry) -> None:
    """The version's own digest covers all files: changing a file and what is recorded of it is not enough."""
    version = registry.by_number(NAME, 2)
    path = kept(registry, version) / "meta.json"
    path.write_bytes(b"{}")
    recorded = json.loads(registry.client.get_model_version(NAME, "2").tags["signalbox.files"])
    recorded["meta.json"] = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    registry.client.set_model_version_tag(NAME, "2", "signalbox.files", json.dumps(recorded))
    assert version.digest[:12] in refused(registry, version)


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


CODE: dict[str, Any] = {"loader_module": "mlflow.pyfunc.loaders.code_model", "model_code_path": "/x/pyfunc_model.py"}
"""The flavour python_function as it is registered."""


@pytest.mark.parametrize(
    "flavours",
    [
        {"sklearn": {"pickled_model": "model.pkl", "serialization_format": "pickle"}},
        {"python_function": {"loader_module": "mlflow.sklearn", "model_path": "model.pkl"}},
        {"python_function": {**CODE, "loader_module": "mlflow.pyfunc.model", "python_model": "model.pkl"}},
        {"python_function": {**CODE, "python_model": "model.pkl"}},
        {"python_function": {**CODE, "model_code_path": "/x/other.py"}},
        {"python_function": {"loader_module": CODE["loader_module"]}},
        {"python_function": CODE, "sklearn": {"pickled_model": "model.pkl"}},
        {"lightgbm": {"model_class": "lightgbm.sklearn.LGBMClassifier", "data": "model.pkl"}},
        {"lightgbm": {"model_class": "lightgbm.basic.Booster"}, "sklearn": {"pickled_model": "model.pkl"}},
        {},
        None,
    ],
)
def test_another_flavour_is_refused_and_never_run(registry: Registry, tmp_path: Path, flavours: Any) -> None:
    version = registry.by_number(NAME, 2)
    folder = artifacts(registry, version)
    (folder / "model.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    said = yaml.safe_load((folder / "MLmodel").read_text())
    (folder / "MLmodel").write_text(yaml.safe_dump({**said, "flavors": flavours}))
    refused(registry, version)
    assert not (tmp_path / "exploded").exists()


def test_no_code_of_a_version_is_run_when_its_files_are_read(registry: Registry, tmp_path: Path) -> None:
    version = registry.by_number(NAME, 2)
    folder = artifacts(registry, version)
    for file in (folder / "pyfunc_model.py", *(folder / "code").rglob("*.py")):
        file.write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    (folder / "python_model.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    before = list(sys.path)
    assert set(registry.load(version)) == {"level.txt", "meta.json"}
    assert not (tmp_path / "exploded").exists() and sys.path == before


def as_before(registry: Registry, version: Version) -> Path:
    """A version's artifacts as they were written before versions had code: a Booster of the flavour lightgbm with files beside it."""
    folder = artifacts(registry, version)
    kept(registry, version).rename(folder / "extra_files")
    (folder / "model.lgb").write_bytes((folder / "extra_files" / "level.txt").read_bytes())
    said = yaml.safe_load((folder / "MLmodel").read_text())
    said["flavors"] = {
        "lightgbm": {"code": None, "data": "model.lgb", "model_class": "lightgbm.basic.Booster"},
        "python_function": {"data": "model.lgb", "loader_module": "mlflow.lightgbm"},
    }
    (folder / "MLmodel").write_text(yaml.safe_dump(said))
    return folder


def test_a_version_from_before_versions_had_code_is_still_read(registry: Registry, ads: Any) -> None:
    version = registry.by_number(NAME, 2)
    folder = as_before(registry, version)
    assert registry.load(version) == ads.fit(version.trained_day).files()
    (folder / "extra_files" / "level.txt").write_bytes(b"tree")
    assert "level.txt" in refused(registry, version)


def test_code_beside_a_plain_booster_is_not_run(registry: Registry, tmp_path: Path) -> None:
    version = registry.by_number(NAME, 2)
    folder = as_before(registry, version)
    (folder / "model.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    (folder / "code" / "lightgbm.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    said = yaml.safe_load((folder / "MLmodel").read_text())
    said["flavors"]["python_function"] = {"loader_module": "mlflow.sklearn", "code": "code", "data": "model.pkl"}
    (folder / "MLmodel").write_text(yaml.safe_dump(said))
    assert set(registry.load(version)) == {"level.txt", "meta.json"}
    assert not (tmp_path / "exploded").exists()


def test_mlflow_is_told_not_to_unpickle(empty_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    empty_registry.client.search_registered_models()
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION

    assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False


def test_a_version_registered_by_hand_is_never_read_and_counts_for_no_day(registry: Registry, ads: Any) -> None:
    first = registry.client.get_model_version(NAME, "1")
    made = registry.client.create_model_version(NAME, source=first.source, run_id=first.run_id)
    registry.client.set_registered_model_alias(NAME, CHAMPION, made.version)
    by_hand = registry.by_number(NAME, int(made.version))
    assert "train it with the job ad_budget_retrain" in refused(registry, by_hand)
    assert by_hand.number not in {v.number for v in registry.as_of(NAME, ads.last)}
    assert by_hand.number not in {v.number for v in registry.as_of(NAME, date(2100, 1, 1))}


# --- which version counts ---------------------------------------------------------------------------------------------


def numbers(registry: Registry, day: date) -> list[int]:
    return [v.number for v in registry.as_of(NAME, day)]


def test_the_champion_comes_first_and_who_held_the_alias_before_it_second(registry: Registry, ads: Any) -> None:
    assert numbers(registry, ads.last) == [2, 1]
    held, before = registry.by_alias(NAME, CHAMPION), registry.by_alias(NAME, PREVIOUS)
    assert held is not None and before is not None
    assert (held.number, before.number) == (2, 1)


def test_promoting_the_champion_again_keeps_who_was_before_it(registry: Registry, ads: Any) -> None:
    promote(registry, registry.by_number(NAME, 2))
    assert numbers(registry, ads.last) == [2, 1]


@pytest.mark.parametrize(("days_ago", "expected"), [(0, [2, 1]), (1, [2, 1]), (2, [1]), (4, [1]), (5, [])])
def test_no_version_trained_after_a_day_counts_for_it(
    registry: Registry, ads: Any, days_ago: int, expected: list[int]
) -> None:
    assert numbers(registry, ads.last - timedelta(days=days_ago)) == expected


@pytest.mark.parametrize("alias_of", [1, 2])
def test_moving_the_alias_back_does_not_let_a_later_version_look_ahead(
    registry: Registry, ads: Any, alias_of: int
) -> None:
    """Champion 1 with 2 before it, as after a rollback: a backfill of a day between them must not fall back to 2."""
    promote(registry, registry.by_number(NAME, alias_of))
    for days_ago in range(7):
        day = ads.last - timedelta(days=days_ago)
        assert all(v.trained_day <= day for v in registry.as_of(NAME, day)), day


def test_a_version_that_did_not_pass_counts_only_when_somebody_gives_it_the_alias(registry: Registry, ads: Any) -> None:
    refused_one = ads.register(registry, ads.last, passed=False, files=registry.load(registry.by_number(NAME, 1)))
    assert not registry.by_number(NAME, refused_one.number).passed
    assert numbers(registry, ads.last) == [2, 1]
    promote(registry, refused_one)
    assert numbers(registry, ads.last) == [refused_one.number, 2]
    assert numbers(registry, ads.last - timedelta(days=1)) == [2, 1]


def test_a_deleted_version_is_missing_by_name(registry: Registry, ads: Any) -> None:
    version = registry.by_number(NAME, 2)
    registry.client.delete_model_version(NAME, "2")
    with pytest.raises(ModelMissing, match="'ad_budget' has no version 2"):
        registry.by_number(NAME, 2)
    with pytest.raises((ModelMissing, ModelUnreadable), match="version 2"):
        registry.load(version)
    assert numbers(registry, ads.last) == [1]


def test_a_model_that_does_not_exist_has_no_versions(empty_registry: Registry) -> None:
    assert empty_registry.as_of("nobody", date(2026, 3, 9)) == []
    assert empty_registry.versions("nobody") == []
    assert empty_registry.by_alias("nobody", CHAMPION) is None
    with pytest.raises(ModelMissing, match="nobody"):
        empty_registry.by_number("nobody", 1)


def test_two_registries_in_one_process_do_not_mix(registry: Registry, empty_registry: Registry, ads: Any) -> None:
    version = registry.by_number(NAME, 2)
    other = ads.register(empty_registry, ads.last)
    assert other.number == 1
    assert files_digest(registry.load(version)) == version.digest
    assert files_digest(empty_registry.load(other)) == other.digest


def test_a_registered_version_carries_its_evidence(empty_registry: Registry, ads: Any) -> None:
    rows = point_in_time.training_set(ads.workflow, ads.lake, ads.last)
    model = ads.fit(ads.last)
    dataset = Dataset(
        "ad_budget/training_set", "d" * 64, "/lake/ad_budget/training_set", 3, rows.schema, {"as_of": "2026-03-22"}
    )
    recipe = {"kind": "response", "rounds": 8, "grid": [0.5, 1.0], "numeric": ["shift_1"], "distill": {"rounds": 60}}
    version = empty_registry.register(
        NAME, model.files(), trained_day=ads.last, passed=True, params={"recipe": "{}", **flat(recipe)},
        metrics={"candidate_mae": 1.5}, tags={"signalbox.training_set": "version 3"}, plots={}, card="# the card", seed=9,
        served=serving.describe("response", model, rows), dataset=dataset, curves={"training_mae": {1: 3.0, 8: 2.0}},
    )  # fmt: skip
    assert replace(empty_registry.by_number(NAME, 1)) == version
    run = empty_registry.client.get_run(version.run_id)
    assert run.data.metrics["candidate_mae"] == 1.5 and run.data.params["seed"] == "9"
    assert run.data.tags["signalbox.training_set"] == "version 3"
    assert {k: v for k, v in run.data.params.items() if k.startswith("model.")} == {
        "model.kind": "response", "model.rounds": "8", "model.grid": "[0.5, 1.0]", "model.distill.rounds": "60",
    }  # fmt: skip
    assert [
        (m.step, m.value) for m in empty_registry.client.get_metric_history(version.run_id, "curve_training_mae")
    ] == [
        (1, 3.0),
        (8, 2.0),
    ]
    (given,) = run.inputs.dataset_inputs
    source = json.loads(given.dataset.source)
    assert given.dataset.name == "ad_budget/training_set" and given.dataset.digest == "d" * 36
    assert source == {"path": "/lake/ad_budget/training_set", "delta_table_version": 3}
    assert {t.key: t.value for t in given.tags} == {"mlflow.data.context": "training", "as_of": "2026-03-22"}
    assert not run.inputs.model_inputs and len(run.outputs.model_outputs) == 1, "the run made the model"
    made = empty_registry.client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert json.loads(made.tags["mlflow.modelVersions"])[0]["name"] == NAME
    assert empty_registry.client.get_model_version(NAME, "1").description == "# the card"
    folder = artifacts(empty_registry, version)
    said = yaml.safe_load((folder / "MLmodel").read_text())
    assert set(said["flavors"]) == {"python_function"} and "shift_1" in said["signature"]["inputs"]
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {
        "",
        ".py",
        ".j2",  # the page template of `common`, which nothing of a model reads
        ".json",
        ".txt",
        ".yaml",
        ".arrow",
        ".typed",
    }
    wanted = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert wanted == {name: metadata.version(name) for name in wanted} and {"mlflow", "lightgbm", "pyarrow"} <= set(
        wanted
    )
    assert empty_registry.client.search_runs([run.info.experiment_id], "params.`model.rounds` = '8'")


def test_a_version_that_did_harm_gives_way_and_never_comes_back_unasked(registry: Registry) -> None:
    name, day = "ad_budget", date(2030, 1, 1)
    first, second = registry.versions(name)
    assert registry.as_of(name, day) == [second, first]

    heir = step_back(registry, name, second.number, "spend over cap on 2026-03-20")

    assert heir is not None and heir.number == first.number
    assert [v.number for v in registry.as_of(name, day)] == [first.number]
    assert registry.by_alias(name, "previous_champion") is None
    blocked = registry.by_number(name, second.number)
    assert "spend over cap" in blocked.blocked
    with pytest.raises(ModelBlocked, match="version 2 was rolled back"):
        promote(registry, blocked)
    registry.client.set_registered_model_alias(name, "champion", str(second.number))  # by hand, past every rule
    assert [v.number for v in registry.as_of(name, day)] == [first.number]
    assert step_back(registry, name, second.number, "again") == heir, "rerunnable"

    registry.lift(name, second.number)
    assert promote(registry, registry.by_number(name, second.number))
    assert [v.number for v in registry.as_of(name, day)] == [second.number, first.number]


def test_when_the_only_version_did_harm_the_rule_decides(registry: Registry) -> None:
    for number in (2, 1):
        step_back(registry, "ad_budget", number, "harm")
    assert registry.as_of("ad_budget", date(2030, 1, 1)) == []
    assert registry.by_alias("ad_budget", "champion") is None
