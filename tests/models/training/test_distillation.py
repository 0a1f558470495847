"""Students: a small model says what its teacher says, is a learner like it, and is judged by a twin of its teacher."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models import catalog
from models.training import distillation
from pipeline import point_in_time
from pipeline.decisions import scoring
from tests.conftest import WorkflowHarness

HOW: dict[str, Any] = {"seed": 5, "device": "cpu", "threads": 1}
SMALL = {"rounds": 30, "leaves": 15}


def world(shared: WorkflowHarness) -> tuple[pa.Table, Any, dict[str, Any]]:
    """Rows with outcomes, a teacher of 120 trees, and its recipe."""
    workflow = shared.workflow.model_copy(update={"model": shared.workflow.model.model_copy(update={"rounds": 120})})
    rows = point_in_time.training_set(workflow, shared.lake, shared.last)
    spec = scoring.learner_spec(workflow)
    return rows, catalog.learner(workflow.model.kind).fit(rows, spec, **HOW), spec


@pytest.fixture(scope="module", params=["ads", "queue"])
def taught(request: pytest.FixtureRequest) -> tuple[pa.Table, Any, dict[str, Any], Any]:
    rows, teacher, spec = world(request.getfixturevalue(request.param))
    return rows, teacher, spec, distillation.distill(teacher, rows, SMALL, **HOW)


def test_a_student_is_small_and_says_what_its_teacher_says(taught: Any) -> None:
    rows, teacher, _, student = taught
    found = distillation.agreement(teacher, student, rows)
    print(type(teacher).__name__, found)
    assert found["agreement_rank"] > 0.9 and found["agreement_mae_share"] < 0.15
    assert found["size_share"] < 0.8
    assert distillation.agreement(teacher, teacher, rows)["agreement_mae"] == 0.0


def test_a_student_is_nearly_as_good_as_its_teacher(taught: Any) -> None:
    rows, teacher, spec, student = taught
    metric = "brier" if spec["kind"] == "duration" else "mae"
    theirs, ours = (one.evaluate(rows)[metric] for one in (teacher, student))
    print(metric, theirs, ours)
    assert ours < theirs * 1.15


def test_the_files_of_a_student_are_those_of_any_learner(taught: Any) -> None:
    rows, _, spec, student = taught
    again = catalog.learner(spec["kind"]).from_files(student.files())
    assert again.score(rows) == student.score(rows) and again.files() == student.files()
    assert again.plots(rows) and again.contributions(rows.slice(0, 3)).num_rows == 3


def test_the_same_teacher_and_rows_give_the_same_student(taught: Any) -> None:
    rows, teacher, _, student = taught
    before = teacher.files()
    assert distillation.distill(teacher, rows, SMALL, **HOW).files() == student.files()
    assert teacher.files() == before, "a teacher is not changed by teaching"


def test_a_students_recipe_fits_its_teacher_first_and_the_teacher_at_hand_is_taken(taught: Any) -> None:
    rows, teacher, spec, student = taught
    recipe = {**spec, distillation.RECIPE: SMALL}
    learner = catalog.learner(spec["kind"])
    assert distillation.of(learner).fit(rows, recipe, **HOW).files() == student.files()
    asked: list[int] = []

    def at_hand(given: pa.Table) -> Any:
        asked.append(given.num_rows)
        return teacher if given is rows else None

    fitted = distillation.of(learner, at_hand).fit(rows, recipe, **HOW)
    assert fitted.files() == student.files() and asked == [rows.num_rows]
    # who judges a student must not have learned from the rows that judge: on earlier rows the teacher's twin teaches
    early = rows.slice(0, rows.num_rows * 2 // 3)
    twin = distillation.of(learner, at_hand).fit(early, recipe, **HOW)
    assert twin.files() == distillation.distill(learner.fit(early, spec, **HOW), early, SMALL, **HOW).files()
    assert twin.files() != distillation.distill(teacher, early, SMALL, **HOW).files()


def test_a_plain_recipe_is_fitted_as_ever(taught: Any) -> None:
    rows, teacher, spec, _ = taught
    learner = catalog.learner(spec["kind"])
    assert distillation.of(learner).fit(rows, spec, **HOW).files() == teacher.files()
    assert distillation.of(learner).__name__ == learner.__name__


def test_a_learner_of_another_kind_has_no_student() -> None:
    with pytest.raises(TypeError, match="no student is known of a int"):
        distillation.distill(3, pa.table({"a": np.zeros(1)}), SMALL, **HOW)  # type: ignore[arg-type]
