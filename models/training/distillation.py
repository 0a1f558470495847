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

from models import booster

if TYPE_CHECKING:
    import lightgbm

    from models.catalog import Learner, Scorer

KINDS = ("duration", "response")
"""Kinds of model of which there are students."""
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

    spec: the fields of Distill. rows: features; outcomes are not looked at, only (for kind response) the money spent.
    Raises TypeError for a learner of another kind than duration and response.
    """
    from models.learners import response
    from models.learners.duration import DurationLearner

    said = Distill.model_validate(spec)
    params = {
        "num_leaves": said.leaves, "learning_rate": said.learning_rate, "min_data_in_leaf": 20, "lambda_l2": 1.0,
    }  # fmt: skip
    # a copy: whatever else a teacher carries, its student carries too
    student: Any = copy.copy(teacher)

    def small(x: np.ndarray, y: np.ndarray, objective: str, weight: np.ndarray | None = None) -> lightgbm.Booster:
        return booster.train(
            x, y, encoding=student.encoding, params={**params, "objective": objective}, rounds=said.rounds, seed=seed,
            device=device, threads=threads, weight=weight,
        )  # fmt: skip

    if isinstance(teacher, DurationLearner):
        x = teacher.encoding.matrix(rows)
        student.miss = [small(x, teacher.p_miss(rows), "cross_entropy")]
        student.calibration = dict.fromkeys(teacher.calibration, (1.0, 0.0))  # what it learned from is calibrated
        student.duration = small(x, booster.predict(teacher.duration, x, threads=threads), "regression")
        if teacher.effort is not None:
            student.effort = small(x, booster.predict(teacher.effort, x, threads=threads), "regression")
    elif isinstance(teacher, response.ResponseLearner):
        # at what is usually spent, as scoring asks, and at what was, as evaluation does
        spends = [response._usual_spend(rows)]
        if "cost" in rows.column_names:
            spends.append(response._numbers(rows, "cost") / response._multiplier(rows))
        x = np.concatenate([teacher.encoding.matrix(response._with_shifts(rows, spend)) for spend in spends])
        level = np.concatenate([teacher.level(rows, spend) for spend in spends])
        said_of = booster.predict(teacher.booster, x, threads=threads, raw=True)
        told = level > 0
        if not told.any():
            raise ValueError(f"the teacher expects nothing of any of {rows.num_rows} rows: there is nothing to learn")
        # an error counts by the money that it moves, as it does for the teacher
        student.booster = small(x[told], said_of[told], "regression", level[told] / level[told].mean())
    else:
        raise TypeError(f"no student is known of a {type(teacher).__name__}: of duration and response there is")
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


PRINCIPAL = ("p_miss", "level")
"""The score column by which a student is compared with its teacher, whichever there is."""


def agreement(teacher: Learner, student: Learner, rows: pa.Table) -> dict[str, float]:
    """How far a student says what its teacher says of ``rows``: Spearman's rank correlation and the mean absolute
    difference of the principal score, that difference as a share of the score's spread, and the size of the files as a
    share of the teacher's."""
    from scipy.stats import spearmanr

    scores = [one.score(rows) for one in (teacher, student)]
    column = next(c for c in PRINCIPAL if c in scores[0].column_names)
    theirs, ours = (np.asarray(s.column(column).to_numpy(), dtype=np.float64) for s in scores)
    apart, spread = float(np.abs(ours - theirs).mean()), float(theirs.std())
    size = [sum(len(content) for content in one.files().values()) for one in (teacher, student)]
    return {
        "agreement_rank": float(spearmanr(theirs, ours).statistic),
        "agreement_mae": apart,
        "agreement_mae_share": apart / spread if spread > 0 else 0.0,
        "size_share": size[1] / size[0],
    }
