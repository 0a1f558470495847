"""What a workflow's folder may say: every field typed and described, a wrong one refused with its file and path.

Belongs here: reading ``assets/workflows/<name>/``. Does not: doing what it says (the stages do).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_checks.contract import ExpectationSpec
from data_checks.drift import DriftSpec
from data_checks.guardrails import Guardrails
from data_checks.performance import METRICS, Kind, PerformanceSpec
from data_checks.regression import RegressionSpec
from delivery import said
from delivery.connectors import catalog
from delivery.connectors.catalog import ConnectorSettings
from delivery.guards import Guards
from delivery.reports import PushSettings
from models.arms import Arms
from models.budget import BudgetPolicy
from models.gate import GateSpec
from models.learners.duration import DurationModel
from models.learners.response import ResponseModel
from models.priority import PriorityPolicy
from models.search import EarlyStopping, Search
from models.students import Distill

FOLDER = Path(os.environ.get("SIGNALBOX_WORKFLOWS") or Path(__file__).parent / "workflows").resolve()
"""The workflows that are loaded: those shipped, or the folder that ``SIGNALBOX_WORKFLOWS`` names."""

ColumnType = Literal["VARCHAR", "BIGINT", "DOUBLE", "BOOLEAN", "TIMESTAMP", "DATE"]


class WorkflowInvalid(ValueError):
    """A workflow's folder says something that it may not; the message names file, path and what is allowed."""


class Strict(BaseModel):
    """Unknown keys are refused, values cannot be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """Files as an upstream system leaves them, and the SQL that maps them to the workflow's events."""

    files: str = Field(
        description="Glob below landing/<workflow>/, or an fsspec URL; {day} stands for a day (YYYY-MM-DD) and makes a run read only its own days' files"
    )
    format: Literal["csv", "parquet", "jsonl"] = Field(description="What the file holds after gzip or zip is undone")
    sql: str = Field(description="The mapping: a SELECT over `raw`, a path below the workflow's folder")
    known_at: Literal["mapped", "landing"] = Field(
        description="mapped: the SQL yields known_at; landing: a row is known from the time its file landed"
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="Between the fields of a CSV file")
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
    def _given_needs_columns(self) -> Source:
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
        default=0.05, ge=0, le=1, description="Above this share the day's batch is stopped"
    )
    expectations: tuple[ExpectationSpec, ...] = Field(
        default=(), description="Great Expectations on the day's accepted rows"
    )


class FeaturesContract(Strict):
    """The contract of the features."""

    expectations: tuple[ExpectationSpec, ...] = Field(
        default=(), description="Great Expectations on the day's features"
    )


class Contract(Strict):
    """contract.yaml."""

    events: EventsContract
    features: FeaturesContract = FeaturesContract()


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


SCORES: dict[str, Kind] = {"duration": "probability", "response": "amount"}
"""What the scores of each kind of model are."""

ModelSpec = Annotated[DurationModel | ResponseModel, Field(discriminator="kind")]
PolicySpec = Annotated[PriorityPolicy | BudgetPolicy, Field(discriminator="kind")]


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


class Regression(RegressionSpec):
    """What counts as harm done by what acts, and how it is found."""

    settles_at: str | None = Field(
        default=None,
        description="TIMESTAMP column of the outcomes, for the join entity: by then it is settled how it went (a due time), and "
        "it counts on that day, whatever became of it; null, or null in a row: on the day when it became known",
    )


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
            metric, known = value.metric or info.data["training"].metric, METRICS[SCORES[info.data["model"].kind]]
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
        return said.read(file)
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
        raise WorkflowInvalid(said.explain(folder / "contract.yaml", error, Contract)) from None
    try:
        workflow = Workflow.model_validate({**told, "contract": contract, "folder": folder})
    except ValidationError as error:
        raise WorkflowInvalid(said.explain(folder / "workflow.yaml", error, Workflow, _NOT_WRITTEN)) from None
    if workflow.name != folder.name:
        raise WorkflowInvalid(
            f"{folder / 'workflow.yaml'}: name: {workflow.name!r} is not the folder's name {folder.name!r}"
        )
    wanted = [workflow.features.sql, workflow.outcomes.sql, *(s.sql for s in workflow.sources.values())]
    for path in wanted:
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise WorkflowInvalid(f"{folder / 'workflow.yaml'}: {path}: lies outside the workflow's folder")
        if not (folder / path).is_file():
            raise WorkflowInvalid(f"{folder / path}: is missing; workflow.yaml names it")
    return workflow


def sharing(workflows: Sequence[Workflow]) -> dict[str, list[str]]:
    """Which workflows send to the same system, by the name of each that does, in words.

    Raises WorkflowInvalid where two may write the same field of it and one of them does not say ``shared: true``. Raises
    ``Misconfigured`` where a connector's file cannot be read.
    """
    by_system: dict[str, list[tuple[Workflow, str]]] = {}
    for workflow in workflows:
        if workflow.delivery is not None:
            found = catalog.writes(workflow.delivery.connector, workflow.folder)
            by_system.setdefault(found.system, []).append((workflow, found.field))
    told: dict[str, list[str]] = {}
    for system, users in sorted(by_system.items()):
        for workflow, field in users:
            others = [(other, theirs) for other, theirs in users if other is not workflow]
            same = [other.name for other, theirs in others if theirs == field]
            assert workflow.delivery is not None, "only those that deliver are among them"
            if same and not workflow.delivery.shared:
                raise WorkflowInvalid(
                    f"{workflow.folder / 'workflow.yaml'}: delivery: {workflow.name} and {', '.join(same)} may both write {field} of "
                    f"{system}; write `shared: true` in the delivery section of each if that is meant, or let one of them send "
                    "elsewhere"
                )
            words = [f"{other.name} ({'the same field' if theirs == field else theirs})" for other, theirs in others]
            if words:
                told[workflow.name] = [f"shares {system} with {', '.join(words)}"]
    return told


def load_all(folder: Path = FOLDER) -> list[Workflow]:
    """Every workflow below a folder, by name; adding one is adding a folder, and each must be one."""
    return [load(path) for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(("_", "."))]


def utc(moment: datetime) -> datetime:
    """A moment as naive UTC, the form in which times pass between the rooms."""
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
