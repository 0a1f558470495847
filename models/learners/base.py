"""What a kind of model is: the protocols of its classes, and what is known of it where it is not imported for itself.

Belongs here: protocols, and what is declared of a kind. Does not: which kinds there are (``models.catalog``), or any one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import lightgbm
    from matplotlib.figure import Figure

    from models.booster import Because, Encoding

Floats = np.ndarray[Any, np.dtype[np.float64]]
Small = Callable[[np.ndarray, np.ndarray, str, np.ndarray | None], "lightgbm.Booster"]
"""Fits a student's Booster: features (n, columns), what the teacher says (n,), the objective, weights (n,) or None."""


class ModelSettings(BaseModel):
    """The section ``model`` of a workflow.yaml; each kind adds its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str


class Scorer(Protocol):
    """What a model and a rule have in common. ``spec`` is the workflow's model section plus its feature lists."""

    learns: ClassVar[bool]
    """Whether ``fit`` looks at the rows at all."""

    @classmethod
    def fit(cls, rows: pa.Table, spec: Mapping[str, Any], *, seed: int, device: str, threads: int) -> Self:
        """Learn from matured rows sorted by (day, key): features with their outcome columns."""
        ...

    def score(self, features: pa.Table) -> pa.Table:
        """Key and score columns, one row a feature row, in the same order."""
        ...

    def files(self) -> dict[str, bytes]:
        """Everything needed to score again: Booster texts and JSON."""
        ...

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Self:
        """The model that ``files()`` described; scores are equal to the bit."""
        ...

    def evaluate(self, rows: pa.Table) -> dict[str, float]:
        """Figures on rows with known outcomes."""
        ...

    def because(self, row: pa.Table) -> Because:
        """What made the score of one row: the heads that count, with what each feature moved."""
        ...


class Learner(Scorer, Protocol):
    """A model that is registered."""

    encoding: Encoding

    def reads(self) -> dict[str, bool]:
        """The feature columns that ``score`` looks at, where the features have them; False: scores do not depend on it."""
        ...

    def losses(self, rows: pa.Table) -> dict[str, dict[int, float]]:
        """What is lost on rows with known outcomes after ever more rounds: by name of the loss, by number of rounds."""
        ...

    def plots(self, rows: pa.Table) -> dict[str, Figure]:
        """Pictures for the registry."""
        ...

    def contributions(self, features: pa.Table) -> pa.Table:
        """The features that moved each score most."""
        ...

    def unread(self, features: pa.Table) -> dict[str, list[str]]:
        """Columns that are missing in some rows and never were in training, with those rows' entities: they get no score."""
        ...

    def gains(self) -> dict[str, float]:
        """Each feature column's share of what the Boosters learned; a column made by the learner counts for those it is made from."""
        ...


@dataclass(frozen=True)
class Range:
    """The values of one field that are searched: whole numbers or reals from ``low`` to ``high``, both included."""

    low: float
    high: float
    whole: bool = False
    log: bool = True


@dataclass(frozen=True)
class Comparison:
    """How two models of a kind are compared row by row."""

    actual: str
    """Outcome column; a row where it is null judges nobody."""
    predict: Callable[[Any, pa.Table], Floats]
    losses: Mapping[str, Callable[[Floats, Floats], Floats]]
    """Metric of ``evaluate()`` -> loss of each row, given (predictions, actual); the metric is its mean, lower is better."""
    calibration: Callable[[Mapping[str, float]], float]
    """From the figures of ``evaluate()``: 0 where predictions are right on average."""
    calibration_is: str
    says: Callable[[Any, pa.Table], Floats]
    """What decides of each row, from its features alone: no outcome is looked at."""
    apart: Callable[[Floats, Floats], float]
    """How far two models' ``says`` lie apart: a mean of squares, 0 where they are the same."""
    whole: Mapping[str, str] = field(default_factory=dict)
    """Metric of ``evaluate()`` that is no mean over rows → why: it has neither an interval nor slices."""


@dataclass(frozen=True)
class Kind:
    """A kind of model: its settings and classes, and what each part of the product asks of it.

    What it cannot do stands in ``absent`` with the reason, and is None (``comparison``, ``space``, ``student``).
    """

    settings: type[ModelSettings]
    learner: type[Learner]
    rule: type[Scorer]
    """The baseline that each candidate must beat."""
    policy: str
    """The kind of policy that can read its scores."""
    scores: Literal["probability", "amount"]
    principal: str
    """The score column that says most."""
    answer: str
    """The outcome column that the scores are held against."""
    read_with: tuple[str, ...]
    """Further outcome columns that ``read`` looks at, where there are such."""
    blank: str | None
    """The score column that is null where a row has no score and is judged by nobody; None: no row is without one."""
    read: Callable[[pa.Table], dict[str, np.ndarray]]
    """Scores with their outcomes, a row each, as figures: predicted, actual (NaN until known), and of an interval or a set of outcomes
    what it promised and whether it held."""
    features: tuple[str, ...]
    """Feature columns that it reads beyond those that the workflow lists; without one it raises KeyError."""
    outcomes: tuple[str, ...]
    """Outcome columns without which nothing can be learned or measured."""
    metrics: Mapping[str, Literal["lower", "higher"]]
    """What the model's and the rule's ``evaluate`` both measure and a candidate can be judged by, and which way is better."""
    columns: Callable[[Any], Mapping[str, tuple[str, ...]]]
    """Field of the settings → feature columns that it names."""
    adds: tuple[str, ...] = ()
    """Columns that it makes itself beside the features."""
    comparison: Comparison | None = None
    space: Mapping[str, Range] | None = None
    """Fields of the settings that a hyper-parameter search moves."""
    student: Callable[[Any, Any, pa.Table, Small, int], None] | None = None
    """Make a copy of a teacher (first) small (second), by fitting its Boosters to what the teacher says of rows, with so many threads."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """What it cannot do → why: comparison, search, distillation, held-out baseline."""

    @property
    def name(self) -> str:
        """What ``kind`` says in a workflow.yaml."""
        (said,) = self.settings.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
        return str(said)


def squares_apart(mine: Floats, theirs: Floats) -> float:
    """The mean square of the difference of two models' scores."""
    return float(np.mean((mine - theirs) ** 2))


def squares_apart_by_size(mine: Floats, theirs: Floats) -> float:
    """Squares as a share of the amount they lie in, weighted by it: an amount's noise grows with it, and of plain squares
    the largest lines would be all that counts."""
    size = (np.abs(mine) + np.abs(theirs)) / 2
    told = size > 0
    return float(np.sum((mine - theirs)[told] ** 2 / size[told]) / size[told].sum()) if told.any() else 0.0


def numbers(column: pa.ChunkedArray) -> Floats:
    """A column of numbers or of booleans as float64 (n,); a null is NaN."""
    column = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    return np.array(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
