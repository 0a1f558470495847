"""The learners and policies that a workflow.yaml may name, found by their kind.

Belongs here: names only; a learner is imported when it is asked for, since LightGBM takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure

    from models.booster import Because


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


_LEARNERS = {
    "duration": ("models.learners.duration", "DurationLearner", "DurationRule"),
    "response": ("models.learners.response", "ResponseLearner", "ResponseRule"),
}


def learner(kind: str) -> type[Learner]:
    """The model's class of a kind."""
    module, name, _ = _LEARNERS[kind]
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def rule(kind: str) -> type[Scorer]:
    """The baseline rule's class of a kind."""
    module, _, name = _LEARNERS[kind]
    return getattr(import_module(module), name)  # type: ignore[no-any-return]
