"""The learners and policies that a workflow.yaml may name, found by their kind.

Belongs here: names and what goes by them; a learner is imported when it is asked for, since LightGBM takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.figure import Figure

    from models.booster import Because, Encoding


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


_LEARNERS = {
    "duration": ("models.learners.duration", "DurationLearner", "DurationRule"),
    "response": ("models.learners.response", "ResponseLearner", "ResponseRule"),
}


@dataclass(frozen=True)
class Kind:
    """What a workflow must know of a kind of model, without importing it."""

    policy: str
    """The kind of policy that can read its scores."""
    features: tuple[str, ...]
    """Feature columns that it reads beyond those that the workflow lists; without one it raises KeyError."""
    outcomes: tuple[str, ...]
    """Outcome columns without which nothing can be learned or measured."""
    metrics: Mapping[str, Literal["lower", "higher"]]
    """What the model's and the rule's ``evaluate`` both measure and a candidate can be judged by, and which way is better."""
    adds: tuple[str, ...] = ()
    """Columns that it makes itself beside the features."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """What it cannot do → why, for what some kinds of model can: comparison, search, distillation, held-out baseline."""


@dataclass(frozen=True)
class Policy:
    """What is known of a kind of policy, without importing it."""

    absent: Mapping[str, str] = field(default_factory=dict)
    """What it cannot do → why, for what some kinds of policy can: off-policy value, loss beside moving nothing,
    counterfactual, shadow."""


POLICIES = {
    "budget_allocation": Policy(),
    "priority_queue": Policy(
        absent={
            "loss beside moving nothing": "the priorities that stood are an order themselves, and what was missed was missed "
            "under it: nothing says what that order has saved",
        }
    ),
}


KINDS = {
    "duration": Kind(
        policy="priority_queue",
        features=(),
        outcomes=("missed",),
        metrics={
            "brier": "lower", "log_loss": "lower", "calibration_error": "lower", "roc_auc": "higher", "average_precision": "higher",
        },
    ),
    "response": Kind(
        policy="budget_allocation",
        features=(
            "budget_micros", "explore_multiplier_today", "delivered_7", "ratio_7", "campaign_ratio_28", "cost_1", "cost_7", "cost_28",
            "value_1", "value_7", "value_28", "active_days_7", "active_days_28",
        ),
        outcomes=("cost", "value", "budget", "explore_multiplier", "explore_probability"),
        metrics={"mae": "lower"},
        adds=("spend_shift_1", "spend_shift_7"),
        absent={
            "held-out baseline": "its gate knows what was really spent, a score does not: the two errors are not alike",
        },
    ),
}  # fmt: skip


def why_not(kind: str, ability: str) -> str:
    """Why a kind of model or of policy lacks an ability, as it is declared here; who would have used it says so."""
    known: Mapping[str, Kind | Policy] = {**KINDS, **POLICIES}
    said = known[kind].absent.get(ability) if kind in known else None
    return said or f"models.catalog declares no reason why kind {kind!r} has no {ability}"


def learner(kind: str) -> type[Learner]:
    """The model's class of a kind."""
    module, name, _ = _LEARNERS[kind]
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def rule(kind: str) -> type[Scorer]:
    """The baseline rule's class of a kind."""
    module, _, name = _LEARNERS[kind]
    return getattr(import_module(module), name)  # type: ignore[no-any-return]
