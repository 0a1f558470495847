"""A workflow's folder: what it says wrongly is refused with the file, the path in it and what is allowed there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.workflow import FOLDER, Workflow, WorkflowInvalid, load, load_all, sharing

SHIPPED = ("ad_budget", "ticket_priority")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "ad_budget", tmp_path / "ad_budget"))


def put(folder: Path, path: str, value: Any, file: str = "workflow.yaml") -> None:
    """Set (or with ... remove) the value at a dotted path of a YAML file."""
    said = yaml.safe_load((folder / file).read_text())
    *above, last = path.split(".")
    place = said
    for part in above:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    (folder / file).write_text(yaml.safe_dump(said, sort_keys=False))


def refusal(folder: Path) -> str:
    with pytest.raises(WorkflowInvalid) as caught:
        load(folder)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_workflows_load(name: str) -> None:
    workflow = load(FOLDER / name)
    assert workflow.name == name
    assert workflow.sources and workflow.features.numeric and workflow.contract.events.columns
    assert workflow.cutoff_of(workflow.start) < workflow.deadline_of(workflow.start)


def test_every_folder_with_a_workflow_is_loaded() -> None:
    assert set(SHIPPED) <= {w.name for w in load_all().workflows}
    assert not load_all().refused


@pytest.mark.parametrize(
    ("file", "path", "meant", "allowed"),
    [
        ("workflow.yaml", "trainig", "training", "guardrails"),
        ("workflow.yaml", "training.min_row", "min_rows", "maturity_days"),
        ("workflow.yaml", "sources.export.delimeter", "delimiter", "encoding"),
        ("workflow.yaml", "features.numerical", "numeric", "lookback_days"),
        ("workflow.yaml", "model.round", "rounds", "learning_rate"),
        ("workflow.yaml", "policy.largest_daily_chance", "largest_daily_change", "floor_share"),
        ("workflow.yaml", "arms.epochs", "epoch", "washout"),
        ("workflow.yaml", "arms.explore.steps", "step", "step"),
        ("workflow.yaml", "guardrails.max_row", "max_rows", "levels"),
        ("workflow.yaml", "drift.reference_day", "reference_days", "window_days"),
        ("contract.yaml", "event", "events", "features"),
        ("contract.yaml", "events.columns.cost.minimum", "min", "required"),
        ("contract.yaml", "events.max_quarantine_share", "max_quarantined_share", "unique"),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_what_was_meant(
    folder: Path, file: str, path: str, meant: str, allowed: str
) -> None:
    put(folder, path, 1, file)
    said = refusal(folder)
    line = next(one for one in said.splitlines() if "unknown key" in one)
    assert str(folder / file) in line
    assert re.search(rf": (\w+\.)*{path.split('.')[-1]}: unknown key", line), line
    assert all(part in line for part in path.split("."))
    assert allowed in line.split("allowed here:")[1]
    if meant != "min":  # too short to be near
        assert f"did you mean '{meant}'" in line


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("training.device", "tpu", ("auto", "cpu", "gpu", "cuda", "tpu")),
        ("training.better", "smaller", ("lower", "higher")),
        ("sources.export.format", "xml", ("csv", "parquet", "jsonl")),
        ("sources.export.known_at", "never", ("mapped", "landing")),
        ("outcomes.join", "line", ("entity", "entity_day")),
        ("model.kind", "forest", ("duration", "response")),
        ("policy.kind", "bandit", ("priority_queue", "budget_allocation")),
        ("arms.design", "daily", ("entity", "cohort", "switchback")),
        ("arms.shares.winner", 0.1, ("holdout", "champion", "challenger", "explore")),
    ],
)
def test_a_value_that_is_not_one_of_the_allowed_is_refused_with_them(
    folder: Path, path: str, value: Any, named: tuple[str, ...]
) -> None:
    put(folder, path, value)
    said = refusal(folder)
    assert str(folder / "workflow.yaml") in said
    assert path.rsplit(".", 1)[0] in said
    assert all(name in said for name in named), said


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("features.lookback_days", "many", "many"),
        ("features.lookback_days", 0, "greater than 0"),
        ("features.numeric", "cost", "cost"),
        ("sources", [], "[]"),
        ("sources.export.delimiter", ";;", ";;"),
        ("training.margin", -0.1, "-0.1"),
        ("start", "soon", "soon"),
        ("cutoff", "25:00", "25:00"),
        ("deadline", "02:00", "later than the cutoff 03:00"),
        ("arms.epoch", 7, "at least 14"),
        ("arms.explore", None, "explore"),
        ("name", "Ad Budget", "Ad Budget"),
        ("model.grid", [0.5, 1.5], "1.0"),
    ],
)
def test_a_wrong_type_or_size_is_refused_with_its_path(folder: Path, path: str, value: Any, why: str) -> None:
    put(folder, path, value)
    said = refusal(folder)
    assert f"{folder / 'workflow.yaml'}: {path.split('.')[0]}" in said
    assert why in said


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("workflow.yaml", "owner"),
        ("workflow.yaml", "arms"),
        ("workflow.yaml", "features.numeric"),
        ("workflow.yaml", "sources.export.sql"),
        ("workflow.yaml", "model.kind"),
        ("contract.yaml", "events"),
        ("contract.yaml", "events.columns.cost.type"),
    ],
)
def test_a_missing_key_is_named(folder: Path, file: str, path: str) -> None:
    put(folder, path, ..., file)
    said = refusal(folder)
    assert str(folder / file) in said
    assert path.split(".")[-1] in said
    assert "required" in said or "discriminator" in said


@pytest.mark.parametrize("key", ["folder", "contract"])
def test_what_is_not_for_the_file_to_say_is_refused(folder: Path, key: str) -> None:
    put(folder, key, "/")
    assert f"{folder / 'workflow.yaml'}: {key}" in refusal(folder)


def test_a_key_that_stands_twice_is_refused_with_its_line(folder: Path) -> None:
    file = folder / "workflow.yaml"
    line = len(file.read_text().splitlines()) + 1
    file.write_text(file.read_text().rstrip("\n") + "\ndrift: {min_rows: 1}\n")
    said = refusal(folder)
    assert str(file) in said and "'drift'" in said and "twice" in said and f"line {line}" in said


@pytest.mark.parametrize("key", ["cutoff", "deadline"])
def test_a_time_that_yaml_reads_as_a_number_is_refused(folder: Path, key: str) -> None:
    # 12:30 without quotes is the number 750 in YAML 1.1, and 750 seconds would be 00:12:30
    text = re.sub(rf"(?m)^{key}: .*$", f"{key}: 12:30", (folder / "workflow.yaml").read_text())
    (folder / "workflow.yaml").write_text(text)
    said = refusal(folder)
    assert key in said and '"12:30"' in said


def test_a_key_that_is_no_text_is_refused(folder: Path) -> None:
    # null without quotes is no text in YAML
    text = (folder / "workflow.yaml").read_text().replace('"null": [""', 'null: [""')
    (folder / "workflow.yaml").write_text(text)
    said = refusal(folder)
    assert str(folder / "workflow.yaml") in said and "sources" in said and "april_may" in said


def test_a_name_other_than_the_folders_is_refused(folder: Path) -> None:
    put(folder, "name", "budget")
    said = refusal(folder)
    assert "'budget'" in said and "'ad_budget'" in said and "name" in said


@pytest.mark.parametrize("path", ["features.sql", "outcomes.sql", "sources.export.sql"])
@pytest.mark.parametrize("where", ["../other.sql", "{outside}"])
def test_sql_outside_the_folder_is_refused(folder: Path, path: str, where: str) -> None:
    outside = folder.parent / "other.sql"
    outside.write_text("SELECT 1")
    put(folder, path, where.format(outside=outside))
    said = refusal(folder)
    assert "outside" in said and "other.sql" in said and "workflow.yaml" in said


def test_sql_reached_through_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "other.sql").write_text("SELECT 1")
    (folder / "features.sql").unlink()
    (folder / "features.sql").symlink_to(folder.parent / "other.sql")
    assert "outside" in refusal(folder)


@pytest.mark.parametrize("path", ["features.sql", "outcomes.sql", "sources/export.sql"])
def test_missing_sql_is_named(folder: Path, path: str) -> None:
    (folder / path).unlink()
    said = refusal(folder)
    assert str(folder / path) in said and "missing" in said


def _gone(file: Path) -> None:
    file.unlink()


def _list(file: Path) -> None:
    file.write_text("- a\n- b\n")


def _torn(file: Path) -> None:
    file.write_text("name: [ad_budget\nowner: x")


def _empty(file: Path) -> None:
    file.write_text("")


def _bytes(file: Path) -> None:
    file.write_bytes(b"name: caf\xe9\n")


@pytest.mark.parametrize("name", ["workflow.yaml", "contract.yaml"])
@pytest.mark.parametrize("break_it", [_gone, _list, _torn, _empty, _bytes])
def test_a_file_that_is_gone_or_not_yaml_is_named(folder: Path, name: str, break_it: Callable[[Path], None]) -> None:
    break_it(folder / name)
    assert str(folder / name) in refusal(folder)


def test_a_folder_without_a_workflow_yaml_is_not_passed_over(folder: Path) -> None:
    (folder.parent / "lead_followup").mkdir()
    (folder.parent / "lead_followup" / "workflow.yml").write_text("name: lead_followup\n")
    found = load_all(folder.parent)
    assert "lead_followup/workflow.yaml: is missing" in found.refused["lead_followup"]
    assert [w.name for w in found.workflows] == ["ad_budget"], "and it hides no other"


def test_what_python_leaves_behind_is_no_workflow(folder: Path) -> None:
    for name in ("__pycache__", ".ipynb_checkpoints"):
        (folder.parent / name).mkdir()
    (folder.parent / "README.md").write_text("")
    assert [w.name for w in load_all(folder.parent).workflows] == ["ad_budget"]


@pytest.mark.parametrize("path", ["workflow.yaml", "contract.yaml", "features.sql", "sources/export.sql"])
def test_the_digest_covers_every_file(folder: Path, path: str) -> None:
    before = load(folder).digest
    assert load(folder).digest == before
    comment = "\n-- changed\n" if path.endswith("sql") else "\n# changed\n"
    (folder / path).write_text((folder / path).read_text() + comment)
    assert load(folder).digest != before


def test_a_workflow_cannot_be_changed_after_reading(folder: Path) -> None:
    workflow = load(folder)
    with pytest.raises(ValueError, match="frozen"):
        workflow.features.lookback_days = 1  # type: ignore[misc]
    assert isinstance(workflow, Workflow)


def other(folder: Path, name: str, **said: Any) -> Workflow:
    """The same workflow once more, under another name."""
    where = Path(shutil.copytree(folder, folder.parent / name))
    put(where, "name", name)
    for path, value in said.items():
        put(where, path.replace("__", "."), value)
    return load(where)


def test_of_two_workflows_that_may_write_the_same_field_the_newer_is_left_out(folder: Path) -> None:
    first, second = load(folder), other(folder, "a_copy", start="2026-03-09")
    told, left_out = sharing([second, first])
    assert list(left_out) == ["a_copy"] and told == {}, "what acted before goes on"
    assert re.search(r"a_copy and ad_budget may both write .* write `shared: true`", left_out["a_copy"])
    put(folder, "delivery.shared", True)
    # one of them does not know of it: whichever is newer, it is the one that is left out
    assert list(sharing([load(folder), second])[1]) == ["a_copy"]
    put(folder, "start", "2026-05-01")
    assert list(sharing([load(folder), second])[1]) == ["a_copy"]
    third = other(folder, "bids")
    told, left_out = sharing([load(folder), third])
    assert "with bids (the same field)" in told["ad_budget"][0] and not left_out
    found = load_all(folder.parent)
    assert [w.name for w in found.workflows] == ["ad_budget", "bids"] and list(found.refused) == ["a_copy"]
    assert found.shares.keys() == {"ad_budget", "bids"}


def test_workflows_that_share_a_system_are_named_and_others_are_not(folder: Path) -> None:
    put(
        folder,
        "delivery",
        {
            "connector": {
                "kind": "file_drop",
                "path": "p.csv",
                "shape": "state",
                "format": "csv",
                "key": "id",
                "value": "bid",
            },
            "push": {"unit": 10000},
        },
    )
    said = {
        "kind": "file_drop",
        "path": str(folder / "p.csv"),
        "shape": "state",
        "format": "csv",
        "key": "id",
        "value": "budget",
    }
    second = other(folder, "budgets", delivery__connector=said)
    elsewhere = other(folder, "apart", delivery__connector=said | {"path": "another.csv"})
    told, left_out = sharing([load(folder), second, elsewhere])
    assert (
        not left_out
        and set(told) == {"ad_budget", "budgets"}
        and told["ad_budget"][0].endswith("with budgets (budget)")
    )
    assert load_all().shares == {}
