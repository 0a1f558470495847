"""The digest of the code: what decides changes it, what does not decide leaves it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline import provenance, workflow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the source, with the shipped workflows in it, to change."""
    for package in ("assets", "pipeline", "models", "data_checks", "delivery", "common", "orchestration", "workflows"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    monkeypatch.setattr(workflow, "FOLDER", tmp_path / "workflows")
    return tmp_path


def digest(name: str = "ad_budget") -> str:
    provenance._python.cache_clear()
    return provenance.digest(name)


@pytest.fixture(autouse=True)
def _own_python() -> object:
    yield
    provenance._python.cache_clear()


def changed(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


@pytest.mark.parametrize(
    "file",
    [
        "workflows/ad_budget/features.sql", "workflows/ad_budget/outcomes.sql",
        "workflows/ad_budget/sources/export.sql", "pipeline/decisions/scoring.py", "pipeline/decisions/decide.py", "models/learners/response.py",
        "data_checks/guardrails.py", "delivery/push/engine.py", "delivery/connectors/google_ads.py",
    ],
)  # fmt: skip
def test_one_byte_of_what_decides_changes_the_digest(tree: Path, file: str) -> None:
    before = digest()
    changed(tree / file)
    assert digest() != before


@pytest.mark.parametrize(
    "file",
    [
        "delivery/sandbox/advertising_api.py", "delivery/sandbox/worlds/tickets.py", "delivery/sandbox/__init__.py",
        "orchestration/cli/command.py", "workflows/ticket_priority/features.sql", "workflows/ad_budget/workflow.yaml",
        "delivery/connectors/examples/jira.yaml",
    ],
)  # fmt: skip
def test_a_byte_of_what_does_not_decide_leaves_it(tree: Path, file: str) -> None:
    """What workflow.yaml says has a digest of its own in every decision."""
    before = digest()
    changed(tree / file)
    assert digest() == before


def test_files_that_come_go_or_move_change_it(tree: Path) -> None:
    before, folder = digest(), tree / "workflows" / "ad_budget"
    (folder / "sources" / "more.sql").write_text("SELECT 1")
    more = digest()
    (folder / "sources" / "more.sql").rename(folder / "more.sql")
    moved = digest()
    (folder / "more.sql").unlink()
    assert len({before, more, moved}) == 3 and digest() == before


def test_workflows_that_lie_elsewhere_count_where_they_lie(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tree / "workflows" / "ad_budget", elsewhere / "ad_budget")
    monkeypatch.setattr(workflow, "FOLDER", elsewhere)
    before = digest()
    changed(tree / "workflows" / "ad_budget" / "features.sql")
    assert digest() == before
    changed(elsewhere / "ad_budget" / "features.sql")
    assert digest() != before


def test_sql_that_changes_while_a_process_runs_is_seen(tree: Path) -> None:
    before = digest()
    changed(tree / "workflows" / "ad_budget" / "features.sql")
    assert provenance.digest("ad_budget") != before
