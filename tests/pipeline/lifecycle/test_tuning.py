"""Before and after a training: a search sees no day that judges, and a student is judged by a twin and admitted as asked."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from pydantic import ValidationError

from delivery.ledger import Ledger
from models import booster, catalog
from models.registry import CHAMPION, Registry
from models.training import distillation, fit, search
from pipeline import point_in_time
from pipeline.decisions import scoring
from pipeline.lifecycle import candidate_evaluation, state, tuning
from pipeline.workflow import Promotion, Training
from tests.conftest import WorkflowHarness
from tests.support.aliases import promote


def asking(bench: WorkflowHarness, **changed: Any) -> WorkflowHarness:
    from dataclasses import replace

    told = {**bench.workflow.training.model_dump(), "holdout_days": 3, "maturity_days": 1, "min_rows": 20, **changed}
    update = {"training": Training.model_validate(told), "promotion": Promotion()}
    return replace(bench, workflow=bench.workflow.model_copy(update=update))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(
        f"sqlite:///{tmp_path / 'ledger.db'}", key=b"k" * 32, clock=lambda: datetime(2026, 4, 1)
    ) as opened:
        yield opened


def days_of(table: Any) -> list[date]:
    return sorted(set(table["day"].to_pylist()))


def test_a_search_learns_and_judges_on_days_before_the_gates(
    ads: WorkflowHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = asking(ads, search={"trials": 2, "validation_days": 2})
    split = bench.last - timedelta(days=4)
    seen: list[tuple[Any, Any]] = []
    real = search.search

    def looked_at(learner: Any, before: Any, later: Any, *args: Any, **how: Any) -> Any:
        seen.append((before, later))
        return real(learner, before, later, *args, **how)

    monkeypatch.setattr(search, "search", looked_at)
    said: list[str] = []
    found = tuning.tune(bench.workflow, bench.lake, split, device="cpu", say=said.append, kept=tmp_path / "kept")
    (before, later), kept = seen[0], tmp_path / "kept" / "search.db"
    mature = split - timedelta(days=1)
    assert days_of(later) == [mature - timedelta(days=1), mature]
    inner = mature - timedelta(days=3)
    assert days_of(before)[-1] <= inner
    assert pc.max(before["outcome_known_at"]).as_py().replace(tzinfo=None) <= bench.workflow.cutoff_of(inner)
    assert pc.max(later["outcome_known_at"]).as_py().replace(tzinfo=None) <= bench.workflow.cutoff_of(split)
    assert found.trials.num_rows == 3 and kept.is_file()
    assert len(said) == 3 and said[0].startswith("search: trial 1:") and "0 trials" in said[-1]
    spec = scoring.learner_spec(bench.workflow)
    assert set(found.spec) == set(spec) and {k for k in spec if spec[k] != found.spec[k]} <= set(
        catalog.KINDS[spec["kind"]].space
    )


def test_without_enough_earlier_rows_the_section_stays_and_it_is_said(ads: WorkflowHarness) -> None:
    bench = asking(ads, early_stopping={"validation_days": 2}, min_rows=100_000)
    said: list[str] = []
    found = tuning.tune(bench.workflow, bench.lake, bench.last - timedelta(days=4), device="cpu", say=said.append)
    assert found.spec == scoring.learner_spec(bench.workflow) and not found.trials.num_rows
    assert "Nothing was searched" in found.note and "100000 are needed" in said[0]


def test_nothing_asked_changes_nothing(ads: WorkflowHarness) -> None:
    found = tuning.tune(ads.workflow, ads.lake, ads.last - timedelta(days=4), device="cpu", say=print)
    assert found.spec == scoring.learner_spec(ads.workflow) and found.card == "" and found.note == ""
    with tuning.resumable(ads.workflow):
        assert booster._resumable.get() is None


def test_a_killed_retraining_finds_its_boosters(
    ads: WorkflowHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    bench = asking(ads, checkpoint_rounds=4)
    with pytest.raises(KeyboardInterrupt), tuning.resumable(bench.workflow):
        bench.fit(bench.last)
        raise KeyboardInterrupt
    unfinished = tuning.folder(bench.workflow) / "unfinished"
    assert list(unfinished.glob("*.booster"))
    with tuning.resumable(bench.workflow):
        bench.fit(bench.last)
    assert not list(unfinished.iterdir())


def test_search_and_early_stopping_together_are_refused(ads: WorkflowHarness) -> None:
    with pytest.raises(ValidationError, match="leave early_stopping out"):
        asking(ads, search={"trials": 2}, early_stopping={})


# --- students ---------------------------------------------------------------------------------------------------------


def train(bench: WorkflowHarness, registry: Registry, ledger: Ledger, day: date) -> tuple[Any, str]:
    """What the stage does after a candidate was registered."""
    rows = point_in_time.ordered(point_in_time.training_set(bench.workflow, bench.lake, day), "day")
    held = candidate_evaluation.held_out(bench.workflow, bench.lake, day, rows)
    learn = point_in_time.rows_where(rows, bench.workflow.training.train_on)
    made = registry.by_alias(bench.workflow.name, CHAMPION)
    assert made is not None
    said = tuning.student(
        bench.workflow, registry, ledger, bench.lake, held, learn, made, day=day, device="cpu", run="run 7"
    )
    return registry.versions(bench.workflow.name)[-1], said


def recipe(bench: WorkflowHarness, registry: Registry, day: date) -> Any:
    """A champion with its recipe, as a training registers it."""
    import json

    made = registry.register(
        bench.workflow.name, bench.fit(day).files(), trained_day=day, passed=True,
        params={"recipe": json.dumps(scoring.learner_spec(bench.workflow))}, metrics={}, tags={}, plots={}, card="c",
        seed=1,
    )  # fmt: skip
    promote(registry, made)
    return made


@pytest.mark.parametrize("promote", [False, True], ids=["registered", "promoted"])
def test_a_student_is_judged_registered_and_admitted_as_asked(
    ads: WorkflowHarness, empty_registry: Registry, ledger: Ledger, promote: bool
) -> None:
    bench = asking(ads, distill={"rounds": 20, "promote": promote}, margin=1.0)
    teacher = recipe(bench, empty_registry, bench.last)
    student, said = train(bench, empty_registry, ledger, bench.last)
    tags = empty_registry.client.get_model_version(student.name, str(student.number)).tags
    assert student.number == teacher.number + 1 and tags[tuning.STUDENT_OF] == str(teacher.number)
    assert f"a student of version {teacher.number}: rank correlation" in said
    champion = empty_registry.by_alias(bench.workflow.name, CHAMPION)
    assert champion is not None
    run = empty_registry.client.get_run(student.run_id).data
    assert "rule_mae" in run.metrics and run.metrics["agreement_rank"] > 0.9
    assert "passed" in said, said
    assert run.params["model.distill.rounds"] == "20" and "curve_validation_mae" in run.metrics
    if promote:
        assert student.passed and said.endswith("its gate: passed; champion.")
        assert ledger.promotions(bench.workflow.name)[-1].version == student.number
        assert state.live(ledger, bench.workflow)["champion"] == student.number
    else:
        assert champion.number == teacher.number and not student.passed and "registered only" in said
        assert not ledger.promotions(bench.workflow.name)
    # what is registered was taught by the champion itself, on every row
    rows = point_in_time.ordered(point_in_time.training_set(bench.workflow, bench.lake, bench.last), "day")
    learn = point_in_time.rows_where(rows, bench.workflow.training.train_on)
    files = empty_registry.load(student)
    expected = distillation.distill(
        catalog.learner("response").from_files(empty_registry.load(teacher)), learn, {"rounds": 20},
        seed=scoring.SEED, device="cpu", threads=candidate_evaluation.THREADS,
    )  # fmt: skip
    assert files["level.txt"] == expected.files()["level.txt"]
    # and the next candidate can be compared with it: its recipe fits, teacher first
    split = candidate_evaluation.twin_day(bench.workflow, bench.last + timedelta(days=1))
    champion, _ = candidate_evaluation.opponent(bench.workflow, bench.lake, empty_registry, student, split)
    twin, why = fit.champions_twin(champion, catalog.learner("response"), {"seed": 1, "device": "cpu", "threads": 1})
    assert twin is not None and twin.booster.num_trees() == 20, why  # type: ignore[attr-defined]


def test_a_student_never_teaches_and_without_a_champion_there_is_none(
    ads: WorkflowHarness, empty_registry: Registry, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = asking(ads, distill={"rounds": 5})
    teacher = recipe(bench, empty_registry, bench.last)
    monkeypatch.setattr(Registry, "recipe", lambda self, v: {**scoring.learner_spec(bench.workflow), "distill": {}})
    failed = teacher.__class__(**{**vars(teacher), "passed": False})
    rows = point_in_time.training_set(bench.workflow, bench.lake, bench.last)
    held = candidate_evaluation.held_out(bench.workflow, bench.lake, bench.last, rows)
    said = tuning.student(
        bench.workflow, empty_registry, ledger, bench.lake, held, rows, failed, day=bench.last, device="cpu", run="r"
    )
    assert said == "No student was trained: there is no champion to learn from."
    assert len(empty_registry.versions(bench.workflow.name)) == 1


def test_a_retraining_searches_first_and_teaches_after(
    ads: WorkflowHarness, empty_registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import dagster as dg

    from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource
    from assets.training import build_model, build_training_set

    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SIGNALBOX_LEDGER_KEY", "k" * 32)
    asked = {"search": {"trials": 1, "validation_days": 3}, "checkpoint_rounds": 4, "distill": {"rounds": 6}}
    bench = asking(ads.copy(tmp_path / "bench"), margin=1.0, **asked)
    done = dg.materialize(
        [build_training_set(bench.workflow), build_model(bench.workflow)],
        partition_key=bench.last.isoformat(),
        resources={
            "lake": LakeResource(root=str(bench.root / "lake")),
            "registry": RegistryResource(ui="", uri=empty_registry.uri, artifacts=empty_registry.artifacts),
            "ledger": LedgerResource(url=f"sqlite:///{tmp_path / 'ledger.db'}"),
            "clock": ClockResource(fixed="2026-04-01T05:00:00"),
        },
    )
    metadata = done.asset_materializations_for_node("ad_budget__model")[0].metadata
    card = str(metadata["model card"].value)
    assert "## Search" in card and "By a search of 1 trials" in card and "| 0" in card and "| 1" in card
    made, *taught = empty_registry.versions("ad_budget")
    recipe = json.loads(empty_registry.client.get_run(made.run_id).data.params["recipe"])
    assert set(recipe) == set(scoring.learner_spec(bench.workflow))
    assert not list((tuning.folder(bench.workflow) / "unfinished").iterdir())
    assert (tuning.folder(bench.workflow) / "search.db").is_file()
    if made.passed:
        assert len(taught) == 1 and f"Version {taught[0].number} is a student of version {made.number}" in str(
            metadata["student"].value
        )
    else:
        assert not taught and "no champion to learn from" in str(metadata["student"].value)
