"""Students: a small Booster that says what a larger model says, for fast scoring (Hinton, Vinyals, Dean 2015, Distilling the Knowledge).

Belongs here: fitting the small Boosters to a teacher's scores, and how well they agree. Does not: what the scores mean
(``models.learners``), judging (``models.evaluation.gate``), registering.

A student is a learner like its teacher: same files, same scores, same policy. What is small is what takes the time, the
trees; everything else (calibration of times, elasticities, intervals) is the teacher's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from models import booster, catalog

if TYPE_CHECKING:
    import lightgbm

    from models.learners.base import Learner, Scorer

RECIPE = "distill"
"""The key of a student's recipe under which its own settings stand; the rest is its teacher's recipe."""


class Distill(BaseModel):
    """A small model that is trained on the champion's scores after each training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: int = Field(default=60, gt=0, description="Trees of each of the student's Boosters")
    leaves: int = Field(default=15, gt=1, description="Leaves of a tree")
    learning_rate: float = Field(default=0.15, gt=0, le=1, description="Shrinkage of a tree")
    promote: bool = Field(
        default=False,
        description="true: a student that passes the gate is admitted like any candidate; false: registered with its verdict",
    )


def distill(
    teacher: Learner, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int
) -> Learner:
    """A student of ``teacher``: its Boosters, each made small by learning what the teacher says of ``rows``.

    spec: the fields of Distill. rows: features; outcomes are not looked at, only (for amounts) the money spent.
    Raises TypeError for a learner whose kind declares no student.
    """
    said = Distill.model_validate(spec)
    params = {
        "num_leaves": said.leaves, "learning_rate": said.learning_rate, "min_data_in_leaf": 20, "lambda_l2": 1.0,
    }  # fmt: skip
    # a copy: whatever else a teacher carries, its student carries too
    student: Any = copy.copy(teacher)

    def small(x: np.ndarray, y: np.ndarray, objective: str, weight: np.ndarray | None) -> lightgbm.Booster:
        return booster.train(
            x, y, encoding=student.encoding, params={**params, "objective": objective}, rounds=said.rounds, seed=seed,
            device=device, threads=threads, weight=weight,
        )  # fmt: skip

    kind = next((one for one in catalog.KINDS.values() if isinstance(teacher, one.learner)), None)
    if kind is None or kind.student is None:
        raise TypeError(f"no student is known of a {type(teacher).__name__}")
    kind.student(teacher, student, rows, small, threads)
    return cast("Learner", student)


def of(learner: type[Learner], teacher: Callable[[pa.Table], Learner | None] = lambda rows: None) -> type[Learner]:
    """The learner, able to fit a student's recipe too: one with the key ``distill`` beside its teacher's recipe.

    teacher: who teaches on some rows; where it says None the teacher's recipe is fitted on these rows first, which is
    what judges a student on days that its teacher has learned from.
    """

    class Taught(learner):  # type: ignore[valid-type,misc]
        @classmethod
        def fit(cls, rows: pa.Table, spec: Mapping[str, Any], **how: Any) -> Any:
            recipe = {k: v for k, v in spec.items() if k != RECIPE}
            if RECIPE not in spec:
                return learner.fit(rows, recipe, **how)
            return distill(teacher(rows) or learner.fit(rows, recipe, **how), rows, spec[RECIPE], **how)

    Taught.__name__, Taught.__qualname__ = learner.__name__, learner.__qualname__
    return Taught


def unaware(rule: type[Scorer]) -> type[Scorer]:
    """A rule that can be given a student's recipe: it fits what the teacher's says."""

    class Unaware(rule):  # type: ignore[valid-type,misc]
        @classmethod
        def fit(cls, rows: pa.Table, spec: Mapping[str, Any], **how: Any) -> Any:
            return rule.fit(rows, {k: v for k, v in spec.items() if k != RECIPE}, **how)

    return Unaware


def agreement(teacher: Learner, student: Learner, rows: pa.Table) -> dict[str, float]:
    """How far a student says what its teacher says of ``rows``: Spearman's rank correlation and the mean absolute
    difference of the principal score, that difference as a share of the score's spread, and the size of the files as a
    share of the teacher's."""
    from scipy.stats import spearmanr

    scores = [one.score(rows) for one in (teacher, student)]
    column = next(k.principal for k in catalog.KINDS.values() if k.principal in scores[0].column_names)
    theirs, ours = (np.asarray(s.column(column).to_numpy(), dtype=np.float64) for s in scores)
    apart, spread = float(np.abs(ours - theirs).mean()), float(theirs.std())
    size = [sum(len(content) for content in one.files().values()) for one in (teacher, student)]
    return {
        "agreement_rank": float(spearmanr(theirs, ours).statistic),
        "agreement_mae": apart,
        "agreement_mae_share": apart / spread if spread > 0 else 0.0,
        "size_share": size[1] / size[0],
    }
