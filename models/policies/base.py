"""What a kind of policy is: what each part of the product asks of it.

Belongs here: the protocol, and what more than one policy is made of. Does not: which kinds there are (``models.catalog``), or any
one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from models.evaluation.bootstrap import Interval
from models.policies.arms import Explore

Floats = np.ndarray[Any, np.dtype[np.float64]]
MATERIAL = 0.01
"""Money counts as changed from this share of what stood before on."""


class PolicySettings(BaseModel):
    """The section ``policy`` of a workflow.yaml; each kind adds its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    decide_on: str = "true"


@dataclass(frozen=True)
class Value:
    """What the candidate's policy is worth beside the other's, on the same days.

    mine, theirs: share of ``of``. harm: theirs - mine with its interval, in the same shares: positive is worse. loss: what is
    lost beside moving nothing, whoever the other is; None where moving nothing has no value to compare with, and
    ``no_loss`` says why.
    """

    mine: float
    theirs: float
    harm: Interval
    of: str
    assumes: str
    loss: Interval | None = None
    no_loss: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"mine": self.mine, "theirs": self.theirs, "harm": self.harm.as_dict(), "of": self.of,
                "assumes": self.assumes, "loss": None if self.loss is None else self.loss.as_dict()}  # fmt: skip


@dataclass(frozen=True)
class Decided:
    """What one model's policy decides on every held-out day, for the rows of ``at_status_quo`` in their order."""

    scores: pa.Table
    move: Floats
    """after - before."""
    favour: Floats
    """move, positive where it is in the entity's favour."""

    def where(self, kept: np.ndarray[Any, np.dtype[np.bool_]]) -> Decided:
        """For some of the rows."""
        return Decided(self.scores.filter(pa.array(kept)), self.move[kept], self.favour[kept])


@dataclass(frozen=True)
class Limit:
    """One number of a policy's settings that can touch a decision, and what the settings are with another value."""

    field: str
    now: float
    low: float
    high: float
    """It may be from ``low`` to ``high``."""
    change: Callable[[Any, float], Any]
    """(settings, value) → settings."""
    whole: bool = False
    """Whole numbers only."""
    inside: bool = False
    """``low`` and ``high`` themselves are out."""


def setting(name: str, to: Callable[[float], Any] = float) -> Callable[[Any, float], Any]:
    """The ``change`` of a Limit: one field of the settings."""
    return lambda spec, value: spec.model_copy(update={name: to(value)})


class Policy(Protocol):
    """A kind of policy. ``spec`` is its settings in a workflow.yaml."""

    settings: ClassVar[type[PolicySettings]]
    money: ClassVar[bool]
    """Whether what it decides is micros of money; else it is a level (a lower number is an earlier turn)."""
    explored: ClassVar[str | None]
    """The outcome column with the probability of a randomised perturbation: the value is measured on all days on which some were drawn.
    None: nothing is explored."""
    whole_columns: ClassVar[Mapping[str, str]]
    """Fields that name a feature column of whole numbers → what they count, in words."""
    columns: ClassVar[tuple[str, ...]]
    """Further fields that name a feature column."""
    absent: ClassVar[Mapping[str, str]]
    """What it cannot do → why: off-policy value, loss beside moving nothing, counterfactual, shadow."""

    def decide(
        self,
        spec: Any,
        features: pa.Table,
        scores: pa.Table,
        drawn: pa.Table,
        *,
        explore: Explore | None = None,
        key: str = "",
    ) -> tuple[pa.Table, dict[str, Any]]:
        """Decisions, and certificates by arm where the policy has them: a pure function of its arguments."""
        ...

    def status_quo(self, spec: Any) -> str:
        """The feature column that holds what stands before a decision."""
        ...

    def starts_from(self, spec: Any, rows: pa.Table) -> pa.Table:
        """The rows with the perturbation of the day itself taken out: where a decision starts from."""
        ...

    def competes_with(self, spec: Any, chosen: pa.Table, row: pa.Table, arm: pa.Array) -> pa.Array:
        """Which of the rows that are decided on can touch the decision of one; ``arm``: units in its arm."""
        ...

    def stands_in(self, spec: Any) -> set[str | None]:
        """Feature columns that are the status quo itself, so that they change no decision by what they say."""
        ...

    def least_change(self, before: int) -> float:
        """From which difference on another value is another decision."""
        ...

    def limits(self, spec: Any, row: pa.Table, arm: str) -> Iterator[Limit]:
        """The limits that are set and can touch a decision."""
        ...

    def against_guardrails(self, spec: Any, levels: tuple[int, int] | None, unit: int | None) -> list[str]:
        """What disagrees with the section guardrails, a sentence each."""
        ...

    def against_delivery(self, spec: Any, push_unit: int, connector_unit: int | None) -> list[str]:
        """What disagrees with the section delivery, a sentence each."""
        ...

    def value(self, spec: Any, rows: pa.Table, mine: Decided, theirs: Decided, how: dict[str, Any]) -> Value | str:
        """What the candidate's decisions are worth beside the other's; a sentence where that cannot be measured."""
        ...


def name_of(policy: Policy) -> str:
    """What ``kind`` says in a workflow.yaml."""
    (said,) = policy.settings.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
    return str(said)


def numbers(table: pa.Table, name: str, default: float | None = None) -> Floats:
    """A column as float64 (n,), a null as ``default`` (NaN where None)."""
    column = table.column(name)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    column = column.cast(pa.float64(), safe=False)
    filled = pc.fill_null(column, float("nan") if default is None else default)
    return np.asarray(filled.to_numpy(), dtype=np.float64)
