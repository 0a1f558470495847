"""What a workflow's folder may say: every field typed and described, a wrong one refused with its file and path.

Belongs here: reading ``workflows/<name>/``. Does not: doing what it says (the stages do).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common import yaml_config
from common.errors import SignalboxError
from data_checks.contract import ExpectationSpec
from data_checks.drift import DriftSpec
from data_checks.guardrails import Guardrails
from data_checks.performance import METRICS, PerformanceSpec
from data_checks.regression import RegressionSpec
from delivery.abort_rules import Guards
from delivery.connectors import catalog
from delivery.connectors.base import Misconfigured
from delivery.connectors.catalog import ConnectorSettings
from delivery.push.types import PushSettings
from models.catalog import KINDS, POLICIES
from models.evaluation.gate import GateSpec
from models.learners.base import ModelSettings
from models.policies.arms import ARMS, Arms
from models.policies.base import PolicySettings
from models.training.distillation import Distill
from models.training.search import EarlyStopping, Search

FOLDER = Path(os.environ.get("SIGNALBOX_WORKFLOWS") or Path(__file__).parent.parent / "workflows").resolve()
"""The workflows that are loaded: those shipped, or the folder that ``SIGNALBOX_WORKFLOWS`` names."""

ColumnType = Literal["VARCHAR", "BIGINT", "DOUBLE", "BOOLEAN", "TIMESTAMP", "DATE"]

ENGINE_COLUMNS: dict[str, tuple[str, ...]] = {
    "events": ("day", "source", "source_file", "source_file_id", "source_row", "superseded_at"),
    "features": ("as_of", "day", "outcome_known_at"),
    "outcomes": (
        "after", "arm", "arm_probability", "as_of", "batch_id", "before", "day", "decided_day", "decision_id",
        "outcome_known_at", "perturbation", "standing", "state", "unit",
    ),
}  # fmt: skip
"""Columns that the engine adds to a table, so that neither a contract nor SQL may name one of its own so. DuckDB does not
tell letters' case: nor may they differ from one by it. Names that begin with ``#`` are the engine's everywhere."""
_ENGINE_RULES = ("duplicate", "from_the_future", "malformed", "told_later")


def engines_own(name: str, table: str) -> bool:
    """Whether a column of this name, in whatever case, is one that the engine adds to a table (of ENGINE_COLUMNS)."""
    return name.startswith("#") or name.lower() in ENGINE_COLUMNS[table]


def twice(names: Sequence[str]) -> list[tuple[str, str]]:
    """Each name that stands again, or differs from an earlier one by case alone, with that earlier one."""
    found: list[tuple[str, str]] = []
    first: dict[str, str] = {}
    for name in names:
        if name.lower() in first:
            found.append((name, first[name.lower()]))
        first.setdefault(name.lower(), name)
    return found


class WorkflowInvalid(SignalboxError, ValueError):
    """A workflow's folder says something that it may not; the message names file, path and what is allowed."""


class Strict(BaseModel):
    """Unknown keys are refused, values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """Files as an upstream system leaves them, and the SQL that maps them to the workflow's events."""

    files: str = Field(
        description="Glob below landing/<workflow>/, or an fsspec URL; {day} stands for a day (YYYY-MM-DD) and makes a run read only its own days' files"
    )
    format: Literal["csv", "parquet", "jsonl", "xes"] = Field(
        description="What the file holds after gzip or zip is undone; xes: an event log (IEEE 1849), a row an event"
    )
    sql: str = Field(description="The mapping: a SELECT over `raw`, a path below the workflow's folder")
    known_at: Literal["mapped", "landing"] = Field(
        description="mapped: the SQL yields known_at; landing: a row is known from the time its file landed"
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="Between the fields of a CSV file")
    quote: Literal['"', "'", ""] = Field(
        default='"',
        description="Around a CSV field that holds delimiters or line ends; empty: no field does, quotes are text",
    )
    encoding: str = Field(default="utf-8", description="Decoded strictly; a byte that does not fit refuses the file")
    null: tuple[str, ...] = Field(default=("",), description="Texts that mean null")
    columns: tuple[str, ...] | None = Field(
        default=None, description="The header that must stand in the file, in any order unless given"
    )
    header: Literal["strict", "given"] = Field(
        default="strict",
        description="given: the first line is skipped and `columns` are the names (for ambiguous headers)",
    )
    extra_columns: Literal["refuse", "ignore"] = Field(
        default="refuse", description="What a column beyond `columns` does to the file"
    )

    @model_validator(mode="after")
    def _can_be_read(self) -> Source:
        if self.delimiter in ("\r", "\n", self.quote):
            raise ValueError("delimiter: it cannot be a line end or the quote")
        if self.header == "given" and not self.columns:
            raise ValueError("header: given needs `columns`")
        return self


class Column(Strict):
    """What one column of the events holds; a row that breaks it is quarantined under the rule's name."""

    type: ColumnType = Field(description="DuckDB type that the text is cast to")
    required: bool = Field(default=False, description="Null is a broken row")
    min: float | None = Field(default=None, description="Smallest allowed value")
    max: float | None = Field(default=None, description="Largest allowed value")
    allowed: tuple[str | int | bool, ...] | None = Field(
        default=None, description="The only values that may stand here"
    )

    @model_validator(mode="after")
    def _bounds_of_numbers(self) -> Column:
        if (self.min, self.max) != (None, None) and self.type not in ("BIGINT", "DOUBLE"):
            raise ValueError(
                f"min and max are bounds of a BIGINT or a DOUBLE, this column is {self.type}; leave them out"
            )
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: no value could stand here")
        return self


class RowRule(Strict):
    """A named rule about one row."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="The reason that stands beside a quarantined row")
    breaks_when: str = Field(description="SQL predicate over the typed columns; true quarantines the row")


class EventsContract(Strict):
    """The contract of the events."""

    columns: dict[str, Column] = Field(description="Columns by name, in order")
    unique: tuple[str, ...] = Field(
        default=(), description="Columns that name a row; later rows with the same are `duplicate`"
    )
    rows: tuple[RowRule, ...] = Field(default=(), description="Row rules beyond those of the columns")
    max_quarantined_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Above this share of a day's rows, or of their weight, its batch is stopped",
    )
    weight: str | None = Field(
        default=None,
        description="BIGINT or DOUBLE column that weighs the rows (money): max_quarantined_share holds for its sum, too",
    )
    expectations: tuple[ExpectationSpec, ...] = Field(
        default=(), description="Great Expectations on the day's accepted rows"
    )

    @field_validator("weight")
    @classmethod
    def _weight_is_a_number(cls, value: str | None, info: Any) -> str | None:
        numbers = [name for name, c in info.data.get("columns", {}).items() if c.type in ("BIGINT", "DOUBLE")]
        if value is not None and "columns" in info.data and value not in numbers:
            raise ValueError(
                f"{value!r} is no BIGINT or DOUBLE column of the events; choose one of {', '.join(numbers)}"
            )
        return value


class FeaturesContract(Strict):
    """The contract of the features."""

    expectations: tuple[ExpectationSpec, ...] = Field(
        default=(), description="Great Expectations on the day's features"
    )


class Contract(Strict):
    """contract.yaml."""

    events: EventsContract
    features: FeaturesContract = FeaturesContract()

    @field_validator("events")
    @classmethod
    def _names_of_its_own(cls, events: EventsContract) -> EventsContract:
        names = list(events.columns)
        wrong = [
            f"columns.{n}: the engine itself adds a column of this name (reserved: names with #, "
            f"{', '.join(ENGINE_COLUMNS['events'])}); call it something else"
            for n in names
            if engines_own(n, "events")
        ]
        wrong += [
            f"columns.{n}: is the same name as {first}: SQL does not tell case; rename one" for n, first in twice(names)
        ]
        wrong += [
            f"columns.{n}: must be {{type: TIMESTAMP}}, found {column.type}"
            for n, column in events.columns.items()
            if n in ("event_at", "known_at") and column.type != "TIMESTAMP"
        ]
        known = ", ".join({**events.columns, "event_at": None, "known_at": None})
        wrong += [
            f"unique: {n!r} is no column; there are {known}"
            for n in events.unique
            if n not in events.columns and n not in ("event_at", "known_at")
        ]
        rules = [rule.name for rule in events.rows]
        wrong += [
            f"rows: the name {n} is the engine's own rule; call it something else" for n in rules if n in _ENGINE_RULES
        ]
        wrong += [f"rows: {n} stands twice; a rule's name is given once" for n, _ in twice(rules)]
        if wrong:
            raise ValueError("; ".join(wrong))
        return events


class Features(Strict):
    """An entity as of a date."""

    sql: str = Field(default="features.sql", description="A SELECT over `events`, a path below the workflow's folder")
    lookback_days: int = Field(gt=0, description="How many days of events the SQL sees")
    numeric: tuple[str, ...] = Field(description="Feature columns that the model reads as numbers")
    categorical: tuple[str, ...] = Field(default=(), description="Feature columns that the model reads as categories")


class Outcomes(Strict):
    """What became of an entity."""

    sql: str = Field(default="outcomes.sql", description="A SELECT over `events`, a path below the workflow's folder")
    lookback_days: int = Field(gt=0, description="How many days of events the SQL sees")
    join: Literal["entity", "entity_day"] = Field(
        description="entity: answers every feature row of the entity; entity_day: the features of for_day"
    )


if TYPE_CHECKING:
    ModelSpec: TypeAlias = ModelSettings
    PolicySpec: TypeAlias = PolicySettings
else:  # the sections of the kinds in the catalog
    ModelSpec = Annotated[Union[tuple(one.settings for one in KINDS.values())], Field(discriminator="kind")]  # noqa: UP007
    PolicySpec = Annotated[Union[tuple(one.settings for one in POLICIES.values())], Field(discriminator="kind")]  # noqa: UP007


class Training(Strict):
    """When and on what a model is trained, and what it must beat."""

    train_on: str = Field(default="true", description="SQL predicate over the features: rows to learn from")
    evaluate_on: str = Field(
        default="true",
        description="SQL predicate over the features: rows that the gate and the performance judge, such as those of the moment "
        "at which it is decided",
    )
    history_days: int = Field(gt=0, description="How many days of features the training set reaches back")
    holdout_days: int = Field(
        gt=0, description="The last matured days are kept out of training and judge the candidate"
    )
    maturity_days: int = Field(
        default=0,
        ge=0,
        description="Days after which a row's outcome is (nearly) always known; younger rows judge nobody",
    )
    min_rows: int = Field(default=200, gt=0, description="Fewer training rows are refused")
    metric: str = Field(description="The workflow's own metric, as the learner's evaluate() names it")
    better: Literal["lower", "higher"] = Field(description="Which direction of the metric is better")
    margin: float = Field(
        ge=0, description="A candidate may be worse than the champion by this share of the metric at most"
    )
    gate: GateSpec = Field(default=GateSpec(), description="What a candidate must hold beyond the metric")
    device: Literal["auto", "cpu", "gpu", "cuda"] = Field(
        default="auto", description="Asked for and missing is an error; auto takes what is there and says which"
    )
    search: Search | None = Field(
        default=None, description="Parameters are searched before each training, on days before the held-out ones"
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="The number of trees is found so; null: as the section `model` says"
    )
    checkpoint_rounds: int | None = Field(
        default=None,
        gt=0,
        description="Rounds after which a Booster in training is kept, so that a killed training goes on; null: never",
    )
    distill: Distill | None = Field(
        default=None, description="A small student of the champion is trained too, for fast scoring; null: none"
    )

    @model_validator(mode="after")
    def _one_way_to_rounds(self) -> Training:
        if self.search is not None and self.early_stopping is not None:
            raise ValueError("search already finds the number of trees: leave early_stopping out")
        return self


class Retraining(PerformanceSpec):
    """What starts a retraining, and how often one may."""

    realised_limit: float = Field(
        default=0.1,
        ge=0,
        description="A realised metric worse than its baseline by more than this share of it, with its interval",
    )
    estimated_limit: float = Field(
        default=0.2,
        ge=0,
        description="The same for the estimate while outcomes are missing; it assumes more, so it must say more",
    )
    cooldown_days: int = Field(default=7, ge=0, description="Days after a training in which nothing starts another")
    realised_cooldown_days: int | None = Field(
        default=None, ge=0, description="The same for a fall of the realised metric; null: cooldown_days"
    )
    budget: int = Field(default=8, ge=1, description="Trainings within budget_days; beyond it a person must start them")
    budget_days: int = Field(default=30, gt=0, description="Days over which the budget counts")
    retry_hours: float = Field(
        default=6,
        gt=0,
        description="Hours after which a retraining that was asked for and did not come about is asked for again",
    )
    attempts: int = Field(default=3, ge=1, description="How often one trigger is asked for at most")
    longest_hours: float = Field(
        default=24,
        gt=0,
        description="Hours after which an unfinished training run counts as failed: a killed process reports no end",
    )


class Promotion(Strict):
    """The steps of a version between its gate and the alias champion."""

    shadow_days: int = Field(
        default=0,
        ge=0,
        description="Days that a version which passed its gate is scored beside the champion, acted on by nobody; 0: none",
    )
    canary_days: int = Field(
        default=0,
        ge=0,
        description="Least days in which the arm challenger is decided by it, until the guard's verdict; 0: no canary",
    )
    max_disagreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="A version leaves its shadow unasked only where it decides at most this share of the entities "
        "differently, in the mean of its shadow days; null: whatever it decides",
    )
    inconclusive: Literal["wait", "promote"] = Field(
        default="wait",
        description="What the guard's INCONCLUSIVE does to a canary: wait for a person, or promote what is not shown to harm",
    )


class Replay(Strict):
    """The same arrivals served anew, in the order of the status quo and in the one that was asked for."""

    kind: Literal["queue"] = Field(
        description="queue: tickets that share the hands of their unit (arms of design switchback)"
    )
    tickets: str = Field(
        description="A SELECT over `events`, a path below the workflow's folder: one row a ticket with entity_id, unit, arrived_at, "
        "due_at, resolved_at, effort_hours, category, priority and moved"
    )
    work: str | None = Field(
        default=None,
        description="The same, one row a stretch of work with entity_id, unit, worker, begun_at and laid_at: the hands seen at "
        "work. Without it there is no verdict by replay",
    )
    margin: float = Field(
        default=0.02, ge=0, lt=1, description="Harm up to this share of the tickets that come due is tolerated"
    )
    weight: float = Field(default=1.0, gt=0, description="This test's share of α, among the weights of all metrics")


class Regression(RegressionSpec):
    """What counts as harm done by what acts, and how it is found."""

    settles_at: str | None = Field(
        default=None,
        description="TIMESTAMP column of the outcomes, for the join entity: by then it is settled how it went (a due time), and "
        "it counts on that day, whatever became of it; null, or null in a row: on the day when it became known",
    )
    replay: Replay | None = Field(default=None, description="Left out: no queue is served anew, and no verdict is HOLD")

    def of_outcomes(self, control: str) -> Regression:
        """The terms on which outcomes are compared with those of an arm: beside the holdout a replay takes its part of α."""
        if self.replay is None or control != "holdout":
            return self
        others = sum(metric.weight for metric in self.metrics)
        return self.model_copy(update={"alpha": self.alpha * others / (others + self.replay.weight)})


class Approval(Strict):
    """What a batch over the automatic limits waits for."""

    valid_hours: float = Field(default=24, gt=0, le=168, description="Hours for which an approval counts")
    four_eyes: bool = Field(default=False, description="Two different people must approve")


class Delivery(Strict):
    """Where decisions go, and on what terms."""

    connector: ConnectorSettings = Field(description="The downstream system")
    address_env: str | None = Field(
        default=None,
        pattern=r"^[A-Z][A-Z0-9_]*$",
        description="Environment variable that replaces the connector's address where it is set (staging, production)",
    )
    shared: bool = Field(
        default=False,
        description="Another workflow may write the same field of the same system; each then meets the other's values as conflicts",
    )
    push: PushSettings = Field(
        default_factory=lambda: PushSettings.model_validate({}), description="Pace, patience and size of waves"
    )
    guards: Guards = Field(default_factory=Guards, description="Limits that ask for a rollback at once")
    spend: str | None = Field(
        default=None,
        description="Outcome column with what was spent (currency units), for the guard max_spend_over_pool",
    )
    approval: Approval = Field(default_factory=Approval, description="Who must look at a held batch")


_EMAIL = r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,7}"


class Workflow(Strict):
    """One business decision automated end to end: everything that its folder says."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", description="The folder's name")
    owner: str = Field(description="Who answers for it, as Dagster shows it: team:name or an e-mail address")
    description: str = Field(description="One or two sentences for the asset catalogue")
    start: date = Field(description="The first day (UTC)")
    cutoff: time = Field(
        default=time(3), description="What is known by this time (UTC) of the next day counts for a day"
    )
    deadline: time = Field(default=time(6), description="A day must be decided by this time (UTC) of the next day")
    sources: dict[str, Source] = Field(min_length=1, description="Named sources")
    features: Features
    outcomes: Outcomes
    model: ModelSpec = Field(description="The learner and its parameters")
    training: Training
    policy: PolicySpec = Field(description="How scores become decisions")
    arms: Arms
    regression: Regression | None = Field(
        default=None, description="Left out: no version is compared with another arm while it acts"
    )
    guardrails: Guardrails
    drift: DriftSpec
    retraining: Retraining = Field(default=Retraining(), validate_default=True)
    promotion: Promotion = Promotion()
    delivery: Delivery | None = Field(
        default=None, validate_default=True, description="Left out: decisions are recorded and sent nowhere"
    )
    contract: Contract = Field(description="contract.yaml; never written in workflow.yaml")
    folder: Path = Field(description="Where it was read; never written in workflow.yaml")

    @field_validator("owner")
    @classmethod
    def _owner_as_dagster_reads_it(cls, value: str) -> str:
        # where Dagster refuses an owner it loads no asset of any workflow
        if not (re.fullmatch(r"team:.+", value) or re.fullmatch(_EMAIL, value)):
            raise ValueError(f"must be team:name or an e-mail address, found {value!r}")
        return value

    @field_validator("regression")
    @classmethod
    def _settles_once(cls, value: Regression | None, info: Any) -> Regression | None:
        if (
            value is not None
            and value.settles_at
            and "outcomes" in info.data
            and info.data["outcomes"].join != "entity"
        ):
            raise ValueError(
                "settles_at: an outcome of the join entity_day counts on the day after its for_day; leave it out"
            )
        return value

    @field_validator("retraining")
    @classmethod
    def _measured(cls, value: Retraining, info: Any) -> Retraining:
        if "training" in info.data and "model" in info.data:
            metric, known = value.metric or info.data["training"].metric, METRICS[KINDS[info.data["model"].kind].scores]
            if metric not in known:
                raise ValueError(
                    f"metric: {metric!r} is not measured day by day, so its fall would start nothing; "
                    f"choose one of {', '.join(known)}"
                )
        return value

    @field_validator("promotion")
    @classmethod
    def _canary_has_an_arm(cls, value: Promotion, info: Any) -> Promotion:
        shares = info.data["arms"].shares if "arms" in info.data else {"challenger": 1}
        if value.canary_days and not shares.get("challenger"):
            raise ValueError(
                f"canary_days: {value.canary_days} days need units in the arm challenger; give it a share in arms.shares"
            )
        if value.canary_days and "regression" in info.data and info.data["regression"] is None:
            raise ValueError(
                f"canary_days: {value.canary_days} days end with the regression guard's verdict, which nobody would give; "
                "write a section regression, or leave canary_days out"
            )
        return value

    @field_validator("delivery")
    @classmethod
    def _canary_is_sent(cls, value: Delivery | None, info: Any) -> Delivery | None:
        if value is None and "promotion" in info.data and (waits := info.data["promotion"].canary_days):
            raise ValueError(
                f"promotion.canary_days: {waits} days end with the regression guard's verdict on what was sent, and nothing "
                "is; write a section delivery, or leave canary_days out"
            )
        return value

    @field_validator("cutoff", "deadline", mode="wrap")
    @classmethod
    def _plain_time(cls, value: Any, read: Any) -> time:
        # YAML reads 12:30 without quotes as the number 750, which would pass as so many seconds
        found: time | None = read(value) if isinstance(value, str | time) else None
        if found is None or found.tzinfo is not None:
            raise ValueError(f'must be a time of day in UTC in quotes, such as "12:30", found {value!r}')
        return found

    @field_validator("deadline")
    @classmethod
    def _deadline_after_cutoff(cls, value: time, info: Any) -> time:
        if "cutoff" in info.data and value <= info.data["cutoff"]:
            raise ValueError(f"must be later than the cutoff {info.data['cutoff']:%H:%M}")
        return value

    def cutoff_of(self, day: date) -> datetime:
        """The time (naive UTC) up to which rows count for ``day``."""
        return datetime.combine(day + timedelta(days=1), self.cutoff)

    def deadline_of(self, day: date) -> datetime:
        """The time (naive UTC) by which ``day`` must be decided."""
        return datetime.combine(day + timedelta(days=1), self.deadline)

    @property
    def drift_columns(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The numeric and the categorical feature columns that drift is measured on."""
        numeric = self.features.numeric if self.drift.numeric is None else self.drift.numeric
        categorical = self.features.categorical if self.drift.categorical is None else self.drift.categorical
        return numeric, categorical

    def table(self, stage: str) -> str:
        """The lake's name of a stage's table."""
        return f"{self.name}/{stage}"

    def sql(self, path: str) -> str:
        """Text of a SQL file of the folder."""
        return (self.folder / path).read_text(encoding="utf-8")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every file of the folder: what the workflow said when a decision was made."""
        whole = hashlib.sha256()
        for file in sorted(p for p in self.folder.rglob("*") if p.suffix in {".yaml", ".sql"}):
            whole.update(file.relative_to(self.folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
        return whole.hexdigest()


_NOT_WRITTEN = ("contract", "folder")


def _yaml(file: Path) -> dict[str, Any]:
    try:
        return yaml_config.read(file)
    except FileNotFoundError:
        raise WorkflowInvalid(f"{file}: is missing; every workflow has workflow.yaml and contract.yaml") from None
    except ValueError as error:
        raise WorkflowInvalid(str(error)) from error


def load(folder: Path) -> Workflow:
    """Read one workflow's folder.

    Raises WorkflowInvalid naming the file, the path in it and what is allowed there.
    """
    told, promised = _yaml(folder / "workflow.yaml"), _yaml(folder / "contract.yaml")
    for reserved in _NOT_WRITTEN:
        if reserved in told:
            raise WorkflowInvalid(f"{folder / 'workflow.yaml'}: {reserved}: unknown key (it is not written here)")
    try:
        contract = Contract.model_validate(promised)
    except ValidationError as error:
        raise WorkflowInvalid(yaml_config.explain(folder / "contract.yaml", error, Contract)) from None
    try:
        workflow = Workflow.model_validate({**told, "contract": contract, "folder": folder})
    except ValidationError as error:
        raise WorkflowInvalid(yaml_config.explain(folder / "workflow.yaml", error, Workflow, _NOT_WRITTEN)) from None
    if workflow.name != folder.name:
        raise WorkflowInvalid(
            f"{folder / 'workflow.yaml'}: name: {workflow.name!r} is not the folder's name {folder.name!r}"
        )
    wanted = [workflow.features.sql, workflow.outcomes.sql, *(s.sql for s in workflow.sources.values())]
    if workflow.regression is not None and workflow.regression.replay is not None:
        wanted += [path for path in (workflow.regression.replay.tickets, workflow.regression.replay.work) if path]
    for path in wanted:
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise WorkflowInvalid(f"{folder / 'workflow.yaml'}: {path}: lies outside the workflow's folder")
        if not (folder / path).is_file():
            raise WorkflowInvalid(f"{folder / path}: is missing; workflow.yaml names it")
    if wrong := [*_of_sources(workflow), *_of_model(workflow), *_of_limits(workflow)]:
        raise WorkflowInvalid("\n".join(f"{folder / 'workflow.yaml'}: {line}" for line in wrong))
    return workflow


# What no section can see by itself. It is asked when a folder is read, not when a recorded spec is (a replay): what a day was
# once decided by stays readable.


def _of_sources(workflow: Workflow) -> list[str]:
    """What is wrong with where the files come from."""
    wrong = []
    for name, source in workflow.sources.items():
        at, address = f"sources.{name}.files", "://" in source.files
        flat = source.files.replace("\\", "/")
        if ".." in flat.split("/") or (not address and (flat.startswith("/") or re.match("[A-Za-z]:", flat))):
            wrong.append(
                f"{at}: {source.files!r} climbs out of the landing zone by .. or from the root; name files below "
                f"landing/{workflow.name}/, or an fsspec URL such as s3://bucket/folder/*.csv"
            )
        for other in re.findall(r"\{[^}]*\}", source.files.replace("{day}", "")):
            wrong.append(f"{at}: {other} stands for nothing, so that no file would be found; {{day}} stands for a day")
        columns = source.columns or ()
        for column, first in twice(columns):
            wrong.append(
                f"sources.{name}.columns: {column} is the same name as {first}: SQL does not tell case; rename one"
            )
        for column in columns:
            if column.lower() == "source_row":
                wrong.append(f"sources.{name}.columns: {column} is the engine's own name of a row's number; rename it")
    several = list(workflow.sources.items())
    for n, (name, source) in enumerate(several):
        for other, theirs in several[:n]:
            if _may_both_match(source.files, theirs.files):
                wrong.append(
                    f"sources.{name}.files: {source.files!r} and {theirs.files!r} of sources.{other} can match the same file, "
                    "which would land twice; give each a folder or a prefix of its own"
                )
    return wrong


def _may_both_match(one: str, other: str) -> bool:
    """Whether there is a path that two patterns match. A set like [a-c] counts as any character."""
    parts = re.compile(r"\*\*|\*|\?|\[[^\]]*\]|.", re.DOTALL)
    left, right = (
        ["digit" if p == "\0" else p for p in parts.findall(text.replace("{day}", "\0\0\0\0-\0\0-\0\0"))]
        for text in (one, other)
    )

    @cache
    def meet(i: int, j: int) -> bool:
        a, b = left[i] if i < len(left) else "", right[j] if j < len(right) else ""
        if not a and not b:
            return True
        if a in ("*", "**"):
            return meet(i + 1, j) or (bool(b) and (b != "/" or a == "**") and meet(i, j + 1))
        if b in ("*", "**"):
            return meet(i, j + 1) or (bool(a) and (a != "/" or b == "**") and meet(i + 1, j))
        return bool(a and b) and _same_character(a, b) and meet(i + 1, j + 1)

    return meet(0, 0)


def _same_character(a: str, b: str) -> bool:
    pair = {a, b}
    if any(p == "?" or (len(p) > 1 and p.startswith("[")) for p in pair):
        return "/" not in pair
    if "digit" in pair:
        return all(p == "digit" or p.isdigit() for p in pair)
    return a == b


def _of_model(workflow: Workflow) -> list[str]:
    """What is wrong between features, model, training and policy."""
    wrong, kind, training = [], KINDS[workflow.model.kind], workflow.training
    listed = [
        (f"features.{which}", n) for which in ("numeric", "categorical") for n in getattr(workflow.features, which)
    ]
    for at, name in listed:
        if engines_own(name, "features") or name.lower() in (*kind.adds, "entity_id"):
            wrong.append(f"{at}: {name} is a column that the engine or the model itself adds; name another feature")
        if re.search(r'[\s,:\[\]{}"]', name):
            wrong.append(
                f"{at}: {name!r} cannot be a feature's name: LightGBM refuses , : [ ] {{ }} and quotes, and renames blanks; "
                f"call it {re.sub(r'[^0-9A-Za-z]+', '_', name).strip('_') or 'something'} in {workflow.features.sql} and here"
            )
    for name, _ in twice([n for _, n in listed]):
        wrong.append(f"features: {name} stands twice in numeric and categorical; a feature is listed once")
    if workflow.policy.kind != kind.policy:
        wrong.append(
            f"policy.kind: {workflow.policy.kind} cannot read the scores of a model of kind {workflow.model.kind}; "
            f"write {kind.policy}, or another model"
        )
    if training.metric not in kind.metrics:
        wrong.append(
            f"training.metric: {training.metric!r} is nothing that a candidate of kind {workflow.model.kind} is judged by; choose one of "
            f"{', '.join(kind.metrics)}"
        )
    elif training.better != kind.metrics[training.metric]:
        wrong.append(
            f"training.better: of {training.metric} {kind.metrics[training.metric]} is better, found {training.better}"
        )
    tuned = training.search or training.early_stopping
    kept = training.holdout_days + training.maturity_days + (tuned.validation_days if tuned else 0)
    if training.history_days <= kept:
        also = " and validation_days" if tuned else ""
        wrong.append(
            f"training.history_days: {training.history_days} days leave nothing to learn from: holdout_days, maturity_days{also} "
            f"take the newest {kept}; reach back further"
        )
    return wrong


def _of_limits(workflow: Workflow) -> list[str]:
    """What is wrong between policy, guardrails and delivery."""
    wrong, policy, levels, sends = [], workflow.policy, workflow.guardrails.levels, workflow.delivery
    for arm in workflow.guardrails.frozen_arms:
        if arm not in ARMS:
            wrong.append(f"guardrails.frozen_arms: {arm!r} is no arm; there are {', '.join(ARMS)}")
    kind = POLICIES[policy.kind]
    wrong += kind.against_guardrails(policy, levels, workflow.guardrails.unit)
    if sends is None:
        return wrong
    if sends.guards.max_spend_over_pool is not None and sends.spend is None:
        wrong.append(
            "delivery.abort_rules.max_spend_over_pool: needs delivery.spend, the outcome column with what was spent; name it, or leave "
            "the guard out"
        )
    wrong += kind.against_delivery(policy, sends.push.unit, getattr(sends.connector, "unit_micros", None))
    return wrong


def sharing(workflows: Sequence[Workflow]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Which workflows send to the same system, in words by name; and which are left out, with the sentence why.

    Two may write the same field of a system only where each says ``shared: true``. Where one does not, it is left out; where
    neither does, the one that starts later (then the later by name): what acted before goes on. A connector whose file cannot be
    read takes no part (``pipeline.workflow_validation`` names it).
    """
    by_system: dict[str, list[tuple[Workflow, str]]] = {}
    for workflow in workflows:
        if workflow.delivery is not None:
            with suppress(Misconfigured):
                found = catalog.writes(workflow.delivery.connector, workflow.folder)
                by_system.setdefault(found.system, []).append((workflow, found.field))
    told: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    for system, users in sorted(by_system.items()):
        stays: list[tuple[Workflow, str]] = []
        for workflow, field in sorted(users, key=lambda u: (not _says_shared(u[0]), u[0].start, u[0].name)):
            same = [other for other, theirs in stays if theirs == field]
            if same and not all(map(_says_shared, (workflow, *same))):
                names = ", ".join(other.name for other in same)
                left_out[workflow.name] = (
                    f"{workflow.folder / 'workflow.yaml'}: delivery: {workflow.name} and {names} may both write {field} of {system}, so "
                    f"{workflow.name} is left out; write `shared: true` in the delivery section of each if that is meant, or let one "
                    "of them send elsewhere"
                )
            else:
                stays.append((workflow, field))
        for workflow, field in stays:
            words = [
                f"{other.name} ({'the same field' if theirs == field else theirs})"
                for other, theirs in stays
                if other is not workflow
            ]
            if words:
                told[workflow.name] = [f"shares {system} with {', '.join(sorted(words))}"]
    return told, left_out


def _says_shared(workflow: Workflow) -> bool:
    return workflow.delivery is not None and workflow.delivery.shared


@dataclass(frozen=True)
class Loaded:
    """Every folder that was found: a bad one hides no other."""

    workflows: list[Workflow]
    """Those that can run, by name."""
    refused: dict[str, str]
    """The others: the folder's name, and what is wrong with it, a line each."""
    shares: dict[str, list[str]]
    """Which of them send to the same system, in words."""


def load_all(folder: Path = FOLDER) -> Loaded:
    """Read every folder below a folder, by name; adding a workflow is adding a folder, and each must be one."""
    good: list[Workflow] = []
    refused: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(("_", ".")):
            try:
                good.append(load(path))
            except WorkflowInvalid as error:
                refused[path.name] = str(error)
            except OSError as error:
                refused[path.name] = f"{path}: cannot be read ({error})"
    shares, left_out = sharing(good)
    return Loaded([w for w in good if w.name not in left_out], {**refused, **left_out}, shares)


def utc(moment: datetime) -> datetime:
    """A moment as naive UTC, the form in which times pass between the rooms."""
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
