"""One bad workflow hides no other: the code location loads the rest, and shows the bad one as an asset that fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from typer.testing import CliRunner

from orchestration.assembly import build, loaded
from pipeline import workflow as reading
from pipeline.workflow import FOLDER, load_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "workflows"))


def put(folder: Path, name: str, **said: Any) -> None:
    file = folder / name / "workflow.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **said}))


def keys(definitions: dg.Definitions) -> set[tuple[str, ...]]:
    return {tuple(k.path) for k in definitions.get_repository_def().asset_graph.get_all_asset_keys()}


def test_a_workflow_that_cannot_be_read_stands_as_an_asset_that_fails_with_its_sentence(folder: Path) -> None:
    put(folder, "ticket_priority", owner="nobody in particular")
    shutil.copytree(folder / "ad_budget", folder / "half-made")
    (folder / "half-made" / "workflow.yaml").unlink()

    definitions = loaded(load_all(folder))

    every = keys(definitions)
    assert ("ad_budget", "decisions") in every and ("ad_budget", "broken") not in every
    assert {k for k in every if k[0] != "ad_budget"} == {("ticket_priority", "broken"), ("half_made", "broken")}
    (asset,) = [
        a
        for a in definitions.assets or ()
        if isinstance(a, dg.AssetsDefinition) and a.key.path == ["ticket_priority", "broken"]
    ]
    (spec,) = asset.specs
    assert spec.group_name == "ticket_priority" and "must be team:name or an e-mail" in str(spec.description)
    result = dg.materialize([asset], raise_on_error=False)
    assert not result.success
    assert "must be team:name or an e-mail" in str(result.filter_events(lambda e: e.is_step_failure))


def test_a_mistake_that_a_run_would_meet_is_shown_beside_the_assets(folder: Path) -> None:
    put(folder, "ad_budget", drift={"numeric": ["ratio_77"]})
    every = keys(loaded(load_all(folder)))
    assert {("ad_budget", "broken"), ("ad_budget", "decisions"), ("ticket_priority", "decisions")} <= every
    assert ("ticket_priority", "broken") not in every


def test_what_dagster_refuses_of_one_workflow_leaves_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestration import assembly

    def refusing(workflow: Any) -> list[Any]:
        if workflow.name == "ad_budget":
            raise dg.DagsterInvalidDefinitionError("no such thing")
        return made(workflow)

    made = assembly.assets_of
    monkeypatch.setattr(assembly, "assets_of", refusing)
    every = keys(loaded(load_all(folder)))
    assert ("ad_budget", "broken") in every and ("ticket_priority", "decisions") in every
    assert ("ad_budget", "decisions") not in every


def test_the_shipped_workflows_have_no_broken_asset() -> None:
    found = load_all()
    assert keys(loaded(found)) == keys(build(found.workflows))


def test_the_commands_go_on_with_the_good_ones_and_name_the_bad_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestration.cli.command import app

    put(folder, "ticket_priority", owner="nobody in particular")
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(reading.load_all, "__defaults__", (folder,))
    (tmp_path / "home").mkdir()
    status = CliRunner().invoke(app, ["status", "--json"])
    assert status.exit_code == 0, status.output
    assert list(json.loads(status.stdout)["workflows"]) == ["ad_budget"]
    assert "ticket_priority is left out" in status.stderr and "must be team:name" in status.stderr
    checked = CliRunner().invoke(app, ["validate", "--json"])
    rows = {row["workflow"]: row for row in json.loads(checked.stdout)}
    assert checked.exit_code == 1
    assert rows["ad_budget"]["result"] == "good" and rows["ticket_priority"]["result"] == "bad"
    assert "workflow.yaml: owner: must be team:name" in rows["ticket_priority"]["reasons"][0]
    shown = CliRunner().invoke(app, ["validate"])
    assert "ticket_priority: " in shown.stdout and "must be team:name" in shown.stdout
