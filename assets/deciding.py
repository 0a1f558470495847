"""From features to decisions: the steps of a bad day, the batch, and the same decision again from its row.

Belongs here: which model counts for a day, what is recorded of it, replay. Does not: how a model scores or a policy
chooses (``models``), or what is shown (``assets.stages``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError
from pydantic import ValidationError

from assets import code, point_in_time, promoting
from assets.lake import Lake, TableMissing, content_digest
from assets.workflow import Workflow
from data_checks import guardrails
from delivery.ledger import Ledger
from models import arms, budget, catalog, priority
from models.registry import ModelMissing, ModelUnreadable, Registry, Version

STEPS = ("champion", "previous_champion", "rule", "no_change")
SEED = 20_260_101


class FeaturesMissing(RuntimeError):
    """The features of a day are not there yet, and there is still time to wait for them."""


class ReplayImpossible(RuntimeError):
    """What a decision was made from cannot be found again; the message names it."""


@dataclass(frozen=True)
class Beside:
    """What the challenger made of a day beside the champion."""

    version: Version
    stage: str
    """shadow: acted on by nobody; canary: the arm challenger is decided by it."""
    table: pa.Table | None
    """Its scores; None where it could not score."""
    reason: str
    """Why it could not; empty where it did."""


@dataclass(frozen=True)
class Scored:
    """The scores of a day with the step of the bad-day ladder that gave them and why."""

    table: pa.Table
    step: str
    reasons: tuple[str, ...]
    model: Version | None
    features_version: int | None
    outcomes_version: int | None
    late: bool = False
    """The deadline had passed when scoring began."""
    beside: Beside | None = None
    """The challenger, where there is one and the day is no backfill."""
    moved: str = ""
    """Aliases that stand elsewhere than the ledger says, and so decide nothing."""


@dataclass(frozen=True)
class Batch:
    """The decisions of one workflow and day, and what a person and a push need to know of them."""

    decisions: pa.Table
    record: dict[str, Any]
    batch_id: str
    digest: str
    step: str
    reasons: tuple[str, ...]
    status: str
    findings: tuple[dict[str, Any], ...]
    late: bool
    certificates: dict[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """How many decisions change something."""
        return int(pc.sum(self.decisions["changed"]).as_py() or 0)

    @property
    def review(self) -> int:
        """How many are left to people."""
        return int(pc.sum(self.decisions["review"]).as_py() or 0)


def learner_spec(workflow: Workflow) -> dict[str, Any]:
    """What a learner is given: the model section with the feature lists."""
    return {
        **workflow.model.model_dump(mode="json"),
        "numeric": list(workflow.features.numeric),
        "categorical": list(workflow.features.categorical),
    }


def fit_rule(
    workflow: Workflow, lake: Lake, day: date, features_version: int | None, outcomes_version: int | None
) -> Any:
    """The baseline rule from what was known at the cut-off of ``day``; needs no registry."""
    rows = point_in_time.training_set(
        workflow, lake, day, features_version=features_version, outcomes_version=outcomes_version
    )
    return catalog.rule(workflow.model.kind).fit(rows, learner_spec(workflow), seed=SEED, device="cpu", threads=1)


@cache
def _model(kind: str, name: str, number: int, digest: str, registry: Registry) -> Any:
    """A version read once a process; versions never change, so their number and digest are the key."""
    version = registry.by_number(name, number)
    if version.digest != digest:
        raise ModelUnreadable(
            f"model {name!r} version {number}: carries digest {version.digest[:12]}…, expected {digest[:12]}…"
        )
    return catalog.learner(kind).from_files(registry.load(version))


def read_model(workflow: Workflow, registry: Registry, version: Version) -> Any:
    """The learner of a version, its files checked against their digests.

    Raises ModelMissing or ModelUnreadable with the place and the reason.
    """
    import lightgbm

    try:
        return _model(workflow.model.kind, version.name, version.number, version.digest, registry)
    except (lightgbm.basic.LightGBMError, ValueError, KeyError) as error:
        raise ModelUnreadable(f"model {version.name!r} version {version.number}: {error}") from error


def score_day(
    workflow: Workflow, lake: Lake, registry: Registry, day: date, *, now: datetime, ledger: Ledger | None = None
) -> Scored:
    """Score a day by the best step that is to be had: champion → previous champion → rule → no change.

    Who champion and previous champion are, the ``ledger`` says (``promoting.lineup``); without one, the registry's aliases.
    A challenger scores beside them; its failure is written down and touches nothing else.

    After the deadline of a day that is still to take effect the models are skipped (the next step that is sure to be
    quick); a day whose effect is past is a backfill and has no deadline. Raises FeaturesMissing before the deadline:
    there is time to repair what holds them up.
    """
    from lightgbm.basic import LightGBMError

    unreachable = promoting.unreachable()
    unusable: tuple[type[Exception], ...] = (ModelMissing, ModelUnreadable, *unreachable)
    reasons: list[str] = []
    deadline = workflow.deadline_of(day)
    backfill = now >= datetime.combine(day + timedelta(days=2), datetime.min.time())
    features_version, outcomes_version = (lake.version(workflow.table(t)) for t in ("features", "outcomes"))
    rows = (
        lake.read(workflow.table("features"), version=features_version, days=[day])
        if features_version is not None
        else pa.table({})
    )
    if rows.num_rows == 0:
        if now <= deadline or backfill:
            raise FeaturesMissing(
                f"{workflow.name}: no features of {day}; materialise [{workflow.name}, features] for that day "
                f"(after the deadline {deadline:%Y-%m-%d %H:%M} UTC the batch would be 'no change')"
            )
        reasons.append(f"features of {day} were not there by the deadline {deadline:%H:%M} UTC")
        return Scored(pa.table({}), "no_change", tuple(reasons), None, features_version, outcomes_version, late=True)
    rows = point_in_time.ordered(rows)
    found, beside = promoting.Lineup(()), None
    late = now > deadline and not backfill
    if late:
        reasons.append(
            f"the deadline {deadline:%H:%M} UTC had passed when scoring began at {now:%H:%M}: no model was tried"
        )
    else:
        try:
            found = promoting.lineup(registry, ledger, workflow.name, day)
        except unreachable as error:
            reasons.append(f"the registry cannot be read: {type(error).__name__}: {promoting.first_line(error)}")
        if not found.versions and not reasons:
            reasons.append(f"no version of {workflow.name!r} had passed its gate by {day}")
        for step, version, why in found.versions:
            if version is None:
                reasons.append(why)
                continue
            try:
                table = read_model(workflow, registry, version).score(rows)
                if found.challenger is not None and not backfill:
                    beside = _beside(workflow, registry, rows, *found.challenger)
                return Scored(
                    table,
                    step,
                    tuple(reasons),
                    version,
                    features_version,
                    outcomes_version,
                    beside=beside,
                    moved=found.moved,
                )
            except unusable as error:
                reasons.append(f"{step} (version {version.number}) cannot be used: {promoting.first_line(error)}")
            except (KeyError, TypeError, ValueError, LightGBMError) as error:
                reasons.append(
                    f"{step} (version {version.number}) cannot score the day's features: {promoting.first_line(error)}"
                )
    try:
        table = fit_rule(workflow, lake, day, features_version, outcomes_version).score(rows)
        return Scored(table, "rule", tuple(reasons), None, features_version, outcomes_version, late)
    except (TableMissing, KeyError, ValueError) as error:
        reasons.append(f"the rule has nothing to go by: {promoting.first_line(error)}")
    return Scored(pa.table({}), "no_change", tuple(reasons), None, features_version, outcomes_version, late)


def _beside(workflow: Workflow, registry: Registry, rows: pa.Table, version: Version, stage: str) -> Beside:
    """What the challenger makes of the day's rows. Whatever goes wrong with it is its own affair, never the day's."""
    try:
        return Beside(version, stage, read_model(workflow, registry, version).score(rows), "")
    except Exception as error:
        return Beside(version, stage, None, f"{type(error).__name__}: {promoting.first_line(error)}")


def decide(
    workflow: Workflow, day: date, features: pa.Table, scores: pa.Table, drawn: pa.Table, step: str
) -> tuple[pa.Table, dict[str, Any]]:
    """The policy over one day's entities: a pure function of its arguments.

    ``features``: the day's rows; ``scores``: rows with the same keys, none for the step ``no_change`` (everybody keeps the
    status quo); ``drawn``: unit, arm, arm_probability of every unit. Returns decisions sorted by entity_id, and
    certificates by arm where the policy has them.
    """
    if features.num_rows == 0:
        return DECISIONS.empty_table(), {}
    chosen = of_policy(workflow, features)
    spec = workflow.policy
    if step == "no_change" or chosen.num_rows == 0:
        return _unchanged(workflow, chosen, drawn), {}
    if isinstance(spec, priority.PriorityPolicy):
        return priority.decide(chosen, scores, drawn, spec).sort_by("entity_id"), {}
    decided, certificates = budget.decide(
        chosen, scores, drawn, spec, explore=workflow.arms.explore, key=f"{workflow.name} {day}"
    )
    return decided.sort_by("entity_id"), certificates


def mixed(workflow: Workflow, features: pa.Table, drawn: pa.Table, scores: pa.Table, challenger: pa.Table) -> pa.Table:
    """The scores that a day with a canary is decided by: the challenger's for entities whose unit is in its arm, the
    champion's for all others. Columns are the champion's; raises KeyError where the challenger lacks one."""
    units = drawn.filter(pc.equal(drawn["arm"], "challenger"))["unit"]
    chosen = of_policy(workflow, features)
    mine = chosen.filter(pc.is_in(chosen["unit"], value_set=units.combine_chunks()))["entity_id"].combine_chunks()
    if len(mine) == 0:
        return scores
    kept = scores.filter(pc.invert(pc.is_in(scores["entity_id"], value_set=mine)))
    theirs = challenger.filter(pc.is_in(challenger["entity_id"], value_set=mine))
    return pa.concat_tables([kept, theirs.select(scores.schema.names).cast(scores.schema)])


def of_policy(workflow: Workflow, features: pa.Table) -> pa.Table:
    """The rows that the policy decides on, in the order of their keys, with their ``unit``."""
    chosen = point_in_time.rows_where(point_in_time.ordered(features), workflow.policy.decide_on)
    unit = chosen[workflow.arms.unit].cast(pa.string())
    # a unit that upstream left empty is a unit of its own rather than nobody's
    unit = pc.fill_null(unit, "(none)")
    return (
        chosen.drop_columns(["unit"]).append_column("unit", unit)
        if "unit" in chosen.schema.names
        else chosen.append_column("unit", unit)
    )


def draw_arms(workflow: Workflow, day: date, units: list[str], keep: pa.Table | None) -> pa.Table:
    """Arms of the units for the epoch of ``day``: those drawn earlier in the epoch keep theirs."""
    spec = workflow.arms
    epoch, in_washout = arms.epoch_of(day, workflow.start, spec.epoch, spec.washout)
    earlier = keep.filter(pc.equal(keep["epoch"], epoch)) if keep is not None else None
    drawn = arms.draw(
        units,
        workflow=workflow.name,
        design=spec.design,
        epoch=epoch,
        shares=spec.shares,
        strata=None if spec.design == "entity" else [""] * len(units),
        keep=earlier,
    )
    return drawn.append_column("epoch", pa.array([epoch] * drawn.num_rows, pa.string())).append_column(
        "washout", pa.array([in_washout] * drawn.num_rows, pa.bool_())
    )


def _unchanged(workflow: Workflow, chosen: pa.Table, drawn: pa.Table) -> pa.Table:
    """Everybody keeps the status quo."""
    n = chosen.num_rows
    if n == 0:
        return DECISIONS.empty_table()
    place = pc.index_in(chosen["unit"], value_set=drawn["unit"].combine_chunks())
    spec = workflow.policy
    before = chosen[spec.priority if isinstance(spec, priority.PriorityPolicy) else spec.spend].cast(pa.int64())
    return pa.table(
        {
            "entity_id": chosen["entity_id"],
            "unit": chosen["unit"],
            "arm": drawn["arm"].take(place),
            "arm_probability": drawn["arm_probability"].take(place),
            "perturbation": pa.nulls(n, pa.float64()),
            "perturbation_probability": pa.nulls(n, pa.float64()),
            "before": before,
            "after": before,
            "changed": pa.array(np.zeros(n, bool)),
            "review": pa.array(np.zeros(n, bool)),
            "expected_gain": pa.array(np.zeros(n)),
            "reasons": pa.array([["Nothing is changed today: see the batch's step."]] * n, pa.list_(pa.string())),
        },
        schema=DECISIONS,
    )


DECISIONS = pa.schema(
    {
        "entity_id": pa.string(),
        "unit": pa.string(),
        "arm": pa.string(),
        "arm_probability": pa.float64(),
        "perturbation": pa.float64(),
        "perturbation_probability": pa.float64(),
        "before": pa.int64(),
        "after": pa.int64(),
        "changed": pa.bool_(),
        "review": pa.bool_(),
        "expected_gain": pa.float64(),
        "reasons": pa.list_(pa.string()),
    }
)
RECORD = pa.schema(
    {
        "workflow": pa.string(),
        "epoch": pa.string(),
        "washout": pa.bool_(),
        "step": pa.string(),
        "model_version": pa.int64(),
        "model_digest": pa.string(),
        "challenger_version": pa.int64(),
        "challenger_digest": pa.string(),
        "features_version": pa.int64(),
        "outcomes_version": pa.int64(),
        "arms_version": pa.int64(),
        "spec_digest": pa.string(),
        "code_commit": pa.string(),
        "code_digest": pa.string(),
    }
)


_SCORING = pa.schema(
    {
        "day": pa.date32(),
        "step": pa.string(),
        "reasons": pa.list_(pa.string()),
        "model_version": pa.int64(),
        "model_digest": pa.string(),
        "features_version": pa.int64(),
        "outcomes_version": pa.int64(),
        "late": pa.bool_(),
        "challenger_version": pa.int64(),
        "challenger_digest": pa.string(),
        "challenger_stage": pa.string(),
        "challenger_reason": pa.string(),
    }
)


def write_scores(workflow: Workflow, lake: Lake, day: date, scored: Scored) -> None:
    """Write a day's scores, then the record of how they were made (what the decisions read first)."""
    if scored.table.num_rows or lake.exists(workflow.table("scores")):
        dated = scored.table.append_column("day", pa.array([day] * scored.table.num_rows, pa.date32()))
        if scored.table.num_rows == 0:
            dated = lake.read(workflow.table("scores"), days=[]).slice(0, 0)
        lake.replace_days(workflow.table("scores"), dated, [day])
    beside = scored.beside
    if beside is not None and beside.table is not None:
        n = beside.table.num_rows
        stamped = beside.table.append_column("version", pa.array([beside.version.number] * n, pa.int64()))
        dated = stamped.append_column("day", pa.array([day] * n, pa.date32()))
        lake.replace_days(workflow.table("shadow_scores"), dated, [day])
    record = {
        "day": day,
        "step": scored.step,
        "reasons": list(scored.reasons),
        "model_version": scored.model.number if scored.model else None,
        "model_digest": scored.model.digest if scored.model else None,
        "features_version": scored.features_version,
        "outcomes_version": scored.outcomes_version,
        "late": scored.late,
        "challenger_version": beside.version.number if beside else None,
        "challenger_digest": beside.version.digest if beside else None,
        "challenger_stage": beside.stage if beside else None,
        "challenger_reason": beside.reason if beside else None,
    }
    lake.replace_days(workflow.table("scoring"), pa.Table.from_pylist([record], schema=_SCORING), [day])


def challenger_scores(workflow: Workflow, lake: Lake, day: date, made: Mapping[str, Any]) -> pa.Table | None:
    """What the challenger of a day's scoring (``made``, its row) said of each entity; None where there was none or it failed."""
    # a row from before there were challengers lacks the columns
    number = made.get("challenger_version")
    if number is None or made.get("challenger_reason"):
        return None
    mine = pc.field("version") == number
    return lake.read(workflow.table("shadow_scores"), days=[day], where=mine).drop_columns(["day", "version"])


def record_spec(workflow: Workflow, lake: Lake) -> str:
    """Keep what the workflow says now under its digest, so that a decision can name it; returns the digest."""
    said = workflow.model_dump_json(exclude={"folder"})
    digest = hashlib.sha256(said.encode()).hexdigest()
    table = workflow.table("specs")
    known = lake.exists(table) and lake.read(table, where=pc.field("digest") == digest, columns=["digest"]).num_rows
    if not known:
        row = pa.table({"digest": [digest], "said": [said], "kept": pa.array(["spec"])})
        lake.replace(table, row, predicate=f"digest = '{digest}'", partition_by=["kept"])
    return digest


def decide_day(workflow: Workflow, lake: Lake, day: date) -> Batch:
    """Decide a day from its recorded scoring; writes the arms that are drawn and nothing else.

    Raises TableMissing where the day was never scored.
    """
    scoring = lake.read(workflow.table("scoring"), days=[day]).to_pylist()
    if not scoring:
        raise TableMissing(
            f"{workflow.name}: {day} was never scored; materialise [{workflow.name}, scores] for it first"
        )
    made = scoring[0]
    scores = (
        lake.read(workflow.table("scores"), days=[day]).drop_columns(["day"])
        if made["step"] != "no_change"
        else pa.table({})
    )
    features = _features(workflow, lake, day, made["features_version"])
    arms_version, drawn = _arms(workflow, lake, day, features)
    reasons, decided = list(made["reasons"]), None
    if made["step"] == "champion" and made.get("challenger_stage") == "canary":
        theirs = challenger_scores(workflow, lake, day, made)
        try:
            if theirs is None:
                raise ValueError(made["challenger_reason"])
            both = mixed(workflow, features, drawn, scores, theirs)
            decided = decide(workflow, day, features, both, drawn, made["step"])
        except (KeyError, TypeError, ValueError) as error:
            # it is the challenger's failure, and never the day's
            reasons.append(f"the arm challenger is decided by the champion: {promoting.first_line(error)}")
    acts = decided is not None
    decisions, certificates = decided or decide(workflow, day, features, scores, drawn, made["step"])
    epoch, in_washout = arms.epoch_of(day, workflow.start, workflow.arms.epoch, workflow.arms.washout)
    record = {
        "workflow": workflow.name,
        "epoch": epoch,
        "washout": in_washout,
        "step": made["step"],
        "model_version": made["model_version"],
        "model_digest": made["model_digest"],
        "challenger_version": made["challenger_version"] if acts else None,
        "challenger_digest": made["challenger_digest"] if acts else None,
        "features_version": made["features_version"],
        "outcomes_version": made["outcomes_version"],
        "arms_version": arms_version,
        "spec_digest": record_spec(workflow, lake),
        "code_commit": code.commit(),
        "code_digest": code.digest(),
    }
    digest = hashlib.sha256(
        (content_digest(decisions) + json.dumps({**record, "day": str(day)}, sort_keys=True)).encode()
    ).hexdigest()
    batch_id = f"{workflow.name}-{day}-{digest[:12]}"
    result = guardrails.check(decisions, workflow.guardrails)
    return Batch(
        decisions=decisions,
        record=record,
        batch_id=batch_id,
        digest=digest,
        step=made["step"],
        reasons=tuple(reasons),
        late=made["late"],
        status=result.status,
        findings=tuple(result.findings),
        certificates=certificates,
    )


def _features(workflow: Workflow, lake: Lake, day: date, version: int | None) -> pa.Table:
    if version is None:
        columns = {"entity_id": pa.string(), workflow.arms.unit: pa.string()}
        return pa.schema(columns).empty_table()
    return lake.read(workflow.table("features"), version=version, days=[day])


def _arms(workflow: Workflow, lake: Lake, day: date, features: pa.Table) -> tuple[int | None, pa.Table]:
    """The arms of a day's units, drawn where the epoch has not drawn them yet, and the version of the table that holds them."""
    table = workflow.table("arms")
    if features.num_rows == 0:
        return lake.version(table), pa.table(
            {
                "unit": pa.array([], pa.string()),
                "arm": pa.array([], pa.string()),
                "arm_probability": pa.array([], pa.float64()),
            }
        )
    units = pc.unique(of_policy(workflow, features)["unit"]).sort().to_pylist()
    keep = lake.read(table) if lake.exists(table) else None
    drawn = draw_arms(workflow, day, units, keep)
    epoch = arms.epoch_of(day, workflow.start, workflow.arms.epoch, workflow.arms.washout)[0]
    earlier = keep.filter(pc.equal(keep["epoch"], epoch)) if keep is not None else None
    fresh = (
        drawn
        if earlier is None
        else drawn.filter(pc.invert(pc.is_in(drawn["unit"], value_set=earlier["unit"].combine_chunks())))
    )
    version = lake.version(table)
    if fresh.num_rows:
        dated = fresh.drop_columns(["washout"]).append_column("drawn_on", pa.array([day] * fresh.num_rows, pa.date32()))
        both = dated if earlier is None else pa.concat_tables([earlier.select(dated.schema.names), dated])
        version = lake.replace(table, both, predicate=f"epoch = '{epoch}'", partition_by=["epoch"])
    return version, drawn


_BATCHES = pa.schema(
    {
        "day": pa.date32(),
        "batch_id": pa.string(),
        "digest": pa.string(),
        "step": pa.string(),
        "reasons": pa.list_(pa.string()),
        "status": pa.string(),
        "findings": pa.string(),
        "certificates": pa.string(),
        "rows": pa.int64(),
        "changed": pa.int64(),
        "review": pa.int64(),
        "decided_at": pa.timestamp("us"),
        "late": pa.bool_(),
        "run_id": pa.string(),
        **{f.name: f.type for f in RECORD if f.name != "step"},
    }
)


def with_record(workflow: Workflow, day: date, batch: Batch) -> pa.Table:
    """The decisions as they are stored: each row names itself, its batch, and everything that it was made from."""
    n = batch.decisions.num_rows
    ids = [
        hashlib.sha256(f"{batch.batch_id}\0{e}".encode()).hexdigest()[:20]
        for e in batch.decisions["entity_id"].to_pylist()
    ]
    table = batch.decisions.append_column("decision_id", pa.array(ids, pa.string()))
    table = table.append_column("batch_id", pa.array([batch.batch_id] * n, pa.string()))
    table = table.append_column("day", pa.array([day] * n, pa.date32()))
    for column in RECORD:
        table = table.append_column(column.name, pa.array([batch.record[column.name]] * n, column.type))
    return table


def write_batch(workflow: Workflow, lake: Lake, day: date, batch: Batch, *, decided_at: datetime, run_id: str) -> None:
    """Write a day's decisions, then the batch that makes them count."""
    lake.replace_days(workflow.table("decisions"), with_record(workflow, day, batch), [day])
    row = {
        **batch.record,
        "day": day,
        "batch_id": batch.batch_id,
        "digest": batch.digest,
        "step": batch.step,
        "reasons": list(batch.reasons),
        "status": batch.status,
        "findings": json.dumps(batch.findings, default=str),
        "certificates": json.dumps(batch.certificates, default=str),
        "rows": batch.decisions.num_rows,
        "changed": batch.changed,
        "review": batch.review,
        "decided_at": decided_at,
        "late": batch.late,
        "run_id": run_id,
    }
    lake.replace_days(workflow.table("batches"), pa.Table.from_pylist([row], schema=_BATCHES), [day])


def by_arm(decisions: pa.Table) -> dict[str, int]:
    """How many entities each arm holds today; an arm that is missing compares with nothing."""
    counts = decisions.group_by("arm").aggregate([([], "count_all")]).sort_by("arm").to_pylist()
    return {row["arm"]: row["count_all"] for row in counts}


def totals(decisions: pa.Table) -> dict[str, dict[str, int]]:
    """What the batch does in sum, by arm: entities, how many change, the sum before and after, and of the changes up and down."""
    found: dict[str, dict[str, int]] = {}
    for arm in sorted(pc.unique(decisions["arm"]).to_pylist()) if decisions.num_rows else []:
        mine = decisions.filter(pc.equal(decisions["arm"], arm))
        before, after = mine["before"].to_numpy(), mine["after"].to_numpy()
        move = after - before
        found[arm] = {
            "entities": mine.num_rows, "changed": int((move != 0).sum()), "before": int(before.sum()),
            "after": int(after.sum()), "up": int(move[move > 0].sum()), "down": int(-move[move < 0].sum()),
        }  # fmt: skip
    return found


def largest_changes(decisions: pa.Table, rows: int = 10) -> pa.Table:
    """The decisions that change most, largest first (ties by entity): what a person wants to see of a batch."""
    if decisions.num_rows == 0:
        return decisions
    size = pc.abs(pc.subtract(pc.fill_null(decisions["after"], 0), pc.fill_null(decisions["before"], 0)))
    order = pc.sort_indices(
        pa.table({"size": size, "entity_id": decisions["entity_id"]}),
        sort_keys=[("size", "descending"), ("entity_id", "ascending")],
    )
    wanted = ["decision_id", "entity_id", "arm", "before", "after", "expected_gain", "review", "reasons"]
    return decisions.take(order[:rows]).select([c for c in wanted if c in decisions.schema.names])


@dataclass(frozen=True)
class Replayed:
    """A recorded decision beside the same decision made again."""

    decision_id: str
    recorded: dict[str, Any]
    again: dict[str, Any]
    same_code: bool

    @property
    def equal(self) -> bool:
        """Whether both are the same to the bit."""
        return self.recorded == self.again

    def as_dict(self) -> dict[str, Any]:
        """For a terminal or JSON."""
        differs = sorted(k for k in self.recorded if self.recorded[k] != self.again.get(k))
        return {
            "decision": self.decision_id,
            "entity": self.recorded["entity_id"],
            "before": self.recorded["before"],
            "after": self.recorded["after"],
            "again": self.again.get("after"),
            "equal to the bit": self.equal,
            "differs in": ", ".join(differs),
            "same code": self.same_code,
            "reasons": self.recorded["reasons"],
        }


@contextlib.contextmanager
def _kept(what: str) -> Iterator[None]:
    """Raise ReplayImpossible naming ``what`` where it can no longer be read."""
    try:
        yield
    except (TableMissing, ModelMissing, DeltaError, OSError, pa.ArrowInvalid) as error:
        raise ReplayImpossible(f"{what} is gone or cannot be read: {error}") from error


def spec_of(name: str, lake: Lake, digest: str) -> Workflow:
    """What a workflow said when it had this digest; raises ReplayImpossible where it is not kept."""
    with _kept(f"{name}/specs"):
        found = lake.read(f"{name}/specs", where=pc.field("digest") == digest)
    if not found.num_rows:
        raise ReplayImpossible(
            f"{name}: no workflow.yaml with digest {digest[:12]}… is kept; the table {name}/specs was cut"
        )
    said = {**json.loads(found["said"][0].as_py()), "folder": Path()}
    try:
        return Workflow.model_validate(said)
    except ValidationError as error:
        # what a later release took out of the format decides nothing any more; the replay shows whether that matters
        for problem in error.errors():
            if problem["type"] != "extra_forbidden":
                raise ReplayImpossible(
                    f"{name}: its workflow.yaml of then is not understood any more: {error}"
                ) from error
            place: Any = said
            for part in problem["loc"][:-1]:
                # the tag of a union stands in the path and not in the text
                place = place[part] if not isinstance(place, dict) or part in place else place
            place.pop(problem["loc"][-1])
    return Workflow.model_validate(said)


def replay(name: str, lake: Lake, registry: Registry, decision_id: str) -> Replayed:
    """Make one recorded decision again from its own row: the versions that it names are read, nothing newer.

    Raises ReplayImpossible where the row, a table version or the model is gone (retention), naming which.
    """
    with _kept(f"{name}/decisions"):
        found = lake.read(f"{name}/decisions", where=pc.field("decision_id") == decision_id)
    if not found.num_rows:
        raise ReplayImpossible(f"{name}: no decision {decision_id!r} is recorded")
    return replay_row(found.to_pylist()[0], lake, registry)


@dataclass(frozen=True)
class MadeFrom:
    """Everything that one recorded decision was made from, found again at the versions that it names."""

    workflow: Workflow
    day: date
    step: str
    features: pa.Table
    """The whole day's, in the order of their keys."""
    scores: pa.Table
    drawn: pa.Table
    learner: Any
    """What scored the row: a learner, the rule, or None for the step ``no_change``."""
    scores_in: Callable[[pa.Table], pa.Table] | None = None
    """In a batch with a canary: the scores that count with other arms drawn."""


def made_from(row: Mapping[str, Any], lake: Lake, registry: Registry) -> MadeFrom:
    """Find it, from a decision's row with its batch's record; raises ReplayImpossible naming what is gone."""
    name, day = row["workflow"], row["day"]
    workflow = spec_of(name, lake, row["spec_digest"])
    with _kept(f"{name}/features version {row['features_version']}"):
        features = point_in_time.ordered(_features(workflow, lake, day, row["features_version"]))
    with _kept(f"{name}/arms version {row['arms_version']}"):
        keep = lake.read(f"{name}/arms", version=row["arms_version"])
    drawn = draw_arms(workflow, day, pc.unique(of_policy(workflow, features)["unit"]).sort().to_pylist(), keep)
    learner: Any = None
    if row["step"] == "rule":
        with _kept(f"{name}/outcomes version {row['outcomes_version']}"):
            learner = fit_rule(workflow, lake, day, row["features_version"], row["outcomes_version"])
    elif row["step"] != "no_change":
        learner = _decided_by(workflow, registry, row["model_version"], row["model_digest"])
    scores = learner.score(features) if learner is not None else pa.table({})
    if row.get("challenger_version") is None:
        return MadeFrom(workflow, day, row["step"], features, scores, drawn, learner)
    challenger = _decided_by(workflow, registry, row["challenger_version"], row["challenger_digest"])
    theirs = challenger.score(features)

    def scores_in(arms_drawn: pa.Table) -> pa.Table:
        return mixed(workflow, features, arms_drawn, scores, theirs)

    mine = challenger if row.get("arm") == "challenger" else learner
    return MadeFrom(workflow, day, row["step"], features, scores_in(drawn), drawn, mine, scores_in)


def _decided_by(workflow: Workflow, registry: Registry, number: int, digest: str) -> Any:
    """The learner of a version that took part in a batch, if it is still the one that did."""
    with _kept(f"model {workflow.name!r} version {number}"):
        version = registry.by_number(workflow.name, number)
    if version.digest != digest:
        raise ReplayImpossible(
            f"model {workflow.name!r} version {version.number} is not the one that decided (digest differs)"
        )
    return read_model(workflow, registry, version)


def replay_row(row: Mapping[str, Any], lake: Lake, registry: Registry) -> Replayed:
    """As ``replay``, from the row itself."""
    found = made_from(row, lake, registry)
    again, _ = decide(found.workflow, found.day, found.features, found.scores, found.drawn, found.step)
    mine = again.filter(pc.equal(again["entity_id"], row["entity_id"])).to_pylist()
    recorded = {c: row[c] for c in DECISIONS.names}
    return Replayed(row["decision_id"], recorded, mine[0] if mine else {}, row["code_digest"] == code.digest())
