"""From features to decisions: the steps of a bad day, the batch, and the same decision again from its row.

Belongs here: which model counts for a day, what is recorded of it, replay. Does not: how a model scores or a policy
chooses (``models``), or what is shown (``assets.stages``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from assets import code, fallback, point_in_time, promoting
from assets.lake import Lake, Moved, TableMissing, content_digest
from assets.landing import without_secrets
from assets.workflow import Workflow
from data_checks import guardrails
from delivery.ledger import BatchRow, Ledger, generation
from models import arms, budget, catalog, priority
from models.registry import ModelMissing, ModelUnreadable, Registry, Version

STEPS = ("champion", "previous_champion", "rule", "no_change")
SEED = 20_260_101
MOST_WITHOUT_SCORE = 0.5
"""The share of the rows that a day is decided on above which a version that leaves them without a score does not decide it.

A row without a score keeps what stands, which is right for the few whose values went missing: the version knows the others
better than the next step does. Where it is most of them, a column is gone; then nearly nothing would be decided, and the day
would still count as one that the champion decided. The next step has a score for those rows, too. Half is where more is lost
by the rows that stand still than is won by the others.
"""


class FeaturesMissing(RuntimeError):
    """The features of a day are not there yet, and there is still time to wait for them."""


class NotANumber(ValueError):
    """Scores that nothing can be decided by: NaN or infinite."""


class NoScores(ValueError):
    """Too few of the rows that a day is decided on have a score."""


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


STANDING = pa.schema(
    {"entity_id": pa.string(), "value": pa.int64(), "batch_id": pa.string(), "verified_at": pa.timestamp("us")}
)
"""What stands downstream where it is known better than the day's features say: the value, what proved it, and when."""


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
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column → entities without a score, because it is missing there and never was in the model's training."""
    standing: pa.Table = field(default_factory=STANDING.empty_table)
    """Status quo of entities that were moved after the day that its features describe, as STANDING."""


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


def standing_of(
    workflow: Workflow, ledger: Ledger, day: date, until: datetime, features: pa.Table | None = None
) -> pa.Table:
    """What stood downstream before the day's own batches acted, where the day's features cannot know it: STANDING by entity.

    It is the last value that the delivery of another day's batch, or a rollback, proved after the end of ``day`` and by
    ``until``; else what stood just before the first delivery of the day's own batches. Other entities have no row. Where
    ``features`` know an entity's status quo of an older day only (``policy.spend_age``), what was proven since that day ended
    counts likewise.
    """
    since = datetime.combine(day + timedelta(days=1), datetime.min.time())
    found = ledger.proven(workflow.name, since, until) if until > since else None
    unseen = _unseen(workflow, features)
    if found is not None and unseen.num_rows:
        oldest = since - timedelta(days=pc.max(unseen["age"]).as_py())
        earlier = ledger.proven(workflow.name, oldest, since).join(unseen, "entity_id", join_type="inner")
        reached = pc.greater(earlier["verified_at"], pc.subtract(pa.scalar(since, pa.timestamp("us")), earlier["ago"]))
        found = pa.concat_tables([earlier.filter(reached).select(found.schema.names).cast(found.schema), found])
    if found is None or not found.num_rows:
        return STANDING.empty_table()
    connection = point_in_time.connect()
    try:
        connection.register("found", found)
        made = connection.sql(
            "WITH f AS (SELECT *, kind = 'decision' AND day = $day AS own FROM found), others AS (SELECT * FROM f WHERE NOT own "
            "QUALIFY row_number() OVER (PARTITION BY entity_id ORDER BY verified_at DESC, sequence DESC) = 1), "
            "mine AS (SELECT * REPLACE (prior AS value) FROM f WHERE own AND prior IS NOT NULL "
            "QUALIFY row_number() OVER (PARTITION BY entity_id ORDER BY verified_at, sequence) = 1) "
            "SELECT entity_id, value, batch_id, verified_at FROM (SELECT * FROM others UNION ALL "
            "SELECT * FROM mine ANTI JOIN others USING (entity_id)) ORDER BY entity_id",
            params={"day": day},
        ).to_arrow_table()
    finally:
        connection.close()
    return made.cast(STANDING)


def _unseen(workflow: Workflow, features: pa.Table | None) -> pa.Table:
    """entity_id, age (days) and ago of the rows whose status quo is older than the day."""
    column = getattr(workflow.policy, "spend_age", None)
    if features is None or column is None or column not in features.schema.names:
        return pa.table({"entity_id": pa.array([], pa.string()), "age": pa.array([], pa.int64())})
    rows = pa.table({"entity_id": features["entity_id"].cast(pa.string()), "age": features[column].cast(pa.int64())})
    rows = rows.filter(pc.field("age") > 0)
    day = pa.scalar(86_400_000_000, pa.int64())
    return rows.append_column("ago", pc.multiply(rows["age"], day).cast(pa.duration("us")))


def with_standing(workflow: Workflow, features: pa.Table, standing: pa.Table) -> pa.Table:
    """Feature rows whose status quo is what stands, where that is known; rows that the policy never looks at keep theirs."""
    column = status_quo(workflow)
    if not standing.num_rows or not features.num_rows or column not in features.schema.names:
        return features
    where = features.schema.get_field_index(column)
    at = pc.index_in(features["entity_id"], value_set=standing["entity_id"].combine_chunks())
    stands = pc.coalesce(standing["value"].take(at).cast(features[column].type), features[column])
    moved = features.set_column(where, column, stands)
    if "moment" not in features.schema.names:
        return moved
    # another moment of the entity lies in the past: what stands now was not its status quo
    number = pa.array(np.arange(features.num_rows))
    chosen = [
        point_in_time.chosen(workflow, table.append_column("#row", number), "policy.decide_on")["#row"]
        for table in (features, moved)
    ]
    now = pc.is_in(number, value_set=pa.concat_arrays([c.combine_chunks() for c in chosen]))
    return features.set_column(where, column, pc.if_else(now, stands, features[column]))


def status_quo(workflow: Workflow) -> str:
    """The feature column that holds what stands before a decision."""
    spec = workflow.policy
    return spec.priority if isinstance(spec, priority.PriorityPolicy) else spec.spend


def _usable(workflow: Workflow, rows: pa.Table, scores: pa.Table) -> pa.Table:
    """The scores, if every number for the rows that are decided on is one. Null says that there is no score, and may.

    Raises NotANumber naming the column.
    """
    mine = _decided_on(workflow, rows, scores)
    for name, column in zip(mine.schema.names, mine.columns, strict=True):
        values = column.combine_chunks()
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = values.flatten()
        if not pa.types.is_floating(values.type):
            continue
        wrong = len(values) - values.null_count - (pc.sum(pc.is_finite(values)).as_py() or 0)
        if wrong:
            raise NotANumber(f"{wrong} of {len(values)} values of {name} are NaN or infinite")
    return scores


def _decided_on(workflow: Workflow, rows: pa.Table, scores: pa.Table) -> pa.Table:
    """The scores of the rows that are decided on."""
    chosen = point_in_time.chosen(workflow, rows, "policy.decide_on")
    theirs, decided = (
        pc.binary_join_element_wise(*(t[k].cast(pa.string()).combine_chunks() for k in _keys(rows, scores)), "\0", null_handling="replace")
        for t in (scores, chosen)
    )  # fmt: skip
    return scores.filter(pc.is_in(theirs, value_set=decided))


def _keys(rows: pa.Table, scores: pa.Table) -> list[str]:
    return [k for k in point_in_time.keys_of(rows.schema.names) if k in scores.schema.names]


def _scored_by(workflow: Workflow, rows: pa.Table, learner: Any) -> tuple[pa.Table, Mapping[str, Sequence[str]]]:
    """A version's scores of a day, and what it could not read (``Scored.unread``).

    Raises NotANumber, and NoScores where most of the rows that are decided on have none (``MOST_WITHOUT_SCORE``).
    """
    table, unread = _usable(workflow, rows, learner.score(rows)), learner.unread(rows)
    mine = _decided_on(workflow, rows, table) if unread else table.slice(0, 0)
    empty = np.ones(mine.num_rows, bool)
    for name in set(mine.schema.names) - set(_keys(rows, table)):
        empty &= np.asarray(mine[name].is_null())
    if empty.sum() > MOST_WITHOUT_SCORE * mine.num_rows:
        raise NoScores(
            f"{empty.sum()} of {mine.num_rows} rows that are decided on have no score ({empty.mean():.0%}, more than "
            f"{MOST_WITHOUT_SCORE:.0%}): {', '.join(unread)} is missing there, and never was in its training"
        )
    return table, unread


def score_day(
    workflow: Workflow,
    lake: Lake,
    registry: Registry,
    day: date,
    *,
    now: datetime,
    ledger: Ledger | None = None,
    late: bool | None = None,
    standing: pa.Table | None = None,
) -> Scored:
    """Score a day by the best step that is to be had: champion → previous champion → rule → no change.

    Who champion and previous champion are, the ``ledger`` says (``promoting.lineup``); without one, the registry's aliases.
    A champion that was found to do worse than the rule (``assets.fallback``) leaves the day to the rule.
    A challenger scores beside them; its failure is written down and touches nothing else. Scores that are NaN or infinite,
    and no score for most of the rows (``MOST_WITHOUT_SCORE``), are a failure like any other.

    After the deadline of a day that is still to take effect the models are skipped (the next step that is sure to be
    quick); a day whose effect is past is a backfill and has no deadline. ``late`` says it in the clock's place. Raises
    FeaturesMissing before the deadline: there is time to repair what holds them up.
    ``standing`` (STANDING) replaces what the ledger would say of what stands.
    """
    deadline = workflow.deadline_of(day)
    backfill = now >= promoting.over(day)
    late = (now > deadline and not backfill) if late is None else late
    features_version, outcomes_version = (lake.version(workflow.table(t)) for t in ("features", "outcomes"))
    rows = (
        lake.read(workflow.table("features"), version=features_version, days=[day])
        if features_version is not None
        else pa.table({})
    )
    if rows.num_rows == 0:
        if not late:
            raise FeaturesMissing(
                f"{workflow.name}: no features of {day}; materialise [{workflow.name}, features] for that day "
                f"(after the deadline {deadline:%Y-%m-%d %H:%M} UTC the batch would be 'no change')"
            )
        why = f"features of {day} were not there by the deadline {deadline:%H:%M} UTC"
        return Scored(pa.table({}), "no_change", (why,), None, features_version, outcomes_version, late=True)
    if standing is None:
        # a backfill sees what stood when the day would have been decided
        until = deadline if backfill else now
        standing = standing_of(workflow, ledger, day, until, rows) if ledger is not None else STANDING.empty_table()
    standing = standing.filter(pc.is_in(standing["entity_id"], value_set=rows["entity_id"].combine_chunks()))
    rows = with_standing(workflow, point_in_time.ordered(rows), standing)

    def scored(table: pa.Table, step: str, model: Version | None = None, **more: Any) -> Scored:
        return Scored(
            table, step, tuple(reasons), model, features_version, outcomes_version, late, standing=standing, **more
        )

    reasons: list[str] = []
    made: _Made | None = None
    if late:
        reasons.append(
            f"the deadline {deadline:%H:%M} UTC had passed when scoring began at {now:%H:%M}: no model was tried"
        )
    else:
        until = deadline if backfill else now
        made = _by_models(workflow, registry, ledger, day, rows, reasons, until, beside=not backfill)
    try:
        if made is not None and made.version is not None:
            return scored(
                made.table, made.step, made.version, beside=made.challenger, moved=made.moved, unread=made.unread
            )
        rule = fit_rule(workflow, lake, day, features_version, outcomes_version)
        table = _usable(workflow, rows, rule.score(rows))
        return scored(table, "rule", beside=made.challenger if made else None, moved=made.moved if made else "")
    except (TableMissing, KeyError, ValueError) as error:
        said = "the rule's scores cannot be used" if isinstance(error, NotANumber) else "the rule has nothing to go by"
        reasons.append(f"{said}: {promoting.first_line(error)}")
    return scored(pa.table({}), "no_change")


@dataclass(frozen=True)
class _Made:
    """What the versions make of a day; ``version`` None: they leave it to the rule."""

    table: pa.Table
    step: str
    version: Version | None
    challenger: Beside | None
    moved: str
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)


def _by_models(
    workflow: Workflow,
    registry: Registry,
    ledger: Ledger | None,
    day: date,
    rows: pa.Table,
    reasons: list[str],
    until: datetime,
    *,
    beside: bool,
) -> _Made | None:
    """The scores of the first version that can give them, or the word that the rule does better, as known at ``until``.

    A challenger scores beside either. None where no version can score; why not is added to ``reasons``.
    """
    from lightgbm.basic import LightGBMError

    unreachable = promoting.unreachable()
    unusable: tuple[type[Exception], ...] = (ModelMissing, ModelUnreadable, *unreachable)
    found = promoting.Lineup(())
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
        behind = fallback.in_force(ledger, workflow.name, version.number, until) if ledger is not None else ""
        if behind:
            reasons.append(behind)
            return _Made(pa.table({}), "rule", None, _challenger(workflow, registry, rows, found, beside), found.moved)
        try:
            table, unread = _scored_by(workflow, rows, read_model(workflow, registry, version))
        except unusable as error:
            reasons.append(f"{step} (version {version.number}) cannot be used: {promoting.first_line(error)}")
        except (KeyError, TypeError, ValueError, LightGBMError) as error:
            reasons.append(
                f"{step} (version {version.number}) cannot score the day's features: {promoting.first_line(error)}"
            )
        else:
            challenger = _challenger(workflow, registry, rows, found, beside)
            # without names: reasons are kept in the ledger
            reasons.extend(
                f"{len(names)} rows have no score: {column} is missing there, and never was in the training of version "
                f"{version.number}"
                for column, names in unread.items()
            )
            return _Made(table, step, version, challenger, found.moved, unread)
    return None


def _challenger(
    workflow: Workflow, registry: Registry, rows: pa.Table, found: promoting.Lineup, wanted: bool
) -> Beside | None:
    return _beside(workflow, registry, rows, *found.challenger) if wanted and found.challenger else None


def _beside(workflow: Workflow, registry: Registry, rows: pa.Table, version: Version, stage: str) -> Beside:
    """What the challenger makes of the day's rows. Whatever goes wrong with it is its own affair, never the day's."""
    try:
        return Beside(version, stage, _scored_by(workflow, rows, read_model(workflow, registry, version))[0], "")
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
    chosen = point_in_time.chosen(workflow, point_in_time.ordered(features), "policy.decide_on")
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
    before = chosen[status_quo(workflow)].cast(pa.int64())
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
        "standing_version": pa.int64(),
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
        "scoring_id": pa.string(),
        "scores_version": pa.int64(),
        "shadow_version": pa.int64(),
        "standing_version": pa.int64(),
    }
)
"""The record of a day's scoring. ``scoring_id`` stands in its rows of ``scores`` too; a row from before has none, nor versions."""


def scoring_of(day: date, scored: Scored) -> dict[str, Any]:
    """How a day was scored, without where it was written."""
    beside = scored.beside
    return {
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


def write_scores(workflow: Workflow, lake: Lake, day: date, scored: Scored) -> None:
    """Write a day's scores, then the record of how they were made (what the decisions read first).

    The record names the very commits of its scores: what a killed run or another run of the day left in the tables is not
    taken for them.
    """
    record = scoring_of(day, scored)
    said = content_digest(scored.table) + json.dumps(record, sort_keys=True, default=str)
    record["scoring_id"] = hashlib.sha256(said.encode()).hexdigest()[:16]
    record["standing_version"] = _write_standing(workflow, lake, day, scored.standing)
    n, beside = scored.table.num_rows, scored.beside
    if n or lake.exists(workflow.table("scores")):
        named = scored.table.append_column("scoring_id", pa.array([record["scoring_id"]] * n, pa.string()))
        dated = _of_day(named, day) if n else lake.read(workflow.table("scores"), days=[]).slice(0, 0)
        record["scores_version"] = lake.replace_days(workflow.table("scores"), dated, [day])
    if beside is not None and beside.table is not None:
        version = pa.array([beside.version.number] * beside.table.num_rows, pa.int64())
        dated = _of_day(beside.table.append_column("version", version), day)
        record["shadow_version"] = lake.replace_days(workflow.table("shadow_scores"), dated, [day])
    lake.replace_days(workflow.table("scoring"), pa.Table.from_pylist([record], schema=_SCORING), [day])


def _of_day(table: pa.Table, day: date) -> pa.Table:
    return table.append_column("day", pa.array([day] * table.num_rows, pa.date32()))


def _write_standing(workflow: Workflow, lake: Lake, day: date, standing: pa.Table) -> int | None:
    """The version of the table ``standing`` that holds a day's rows: the one recorded before where they are the same."""
    if not standing.num_rows:
        return None
    table = workflow.table("standing")
    for made in lake.read(workflow.table("scoring"), days=[day]).to_pylist() if lake.exists(table) else ():
        version = made.get("standing_version")
        if version is not None and standing_at(workflow, lake, day, version).equals(standing.sort_by("entity_id")):
            return int(version)
    return lake.replace_days(table, _of_day(standing, day), [day])


def standing_at(workflow: Workflow, lake: Lake, day: date, version: int | None) -> pa.Table:
    """What stood for a day, as a record names it; none where it names no version."""
    if version is None:
        return STANDING.empty_table()
    found = lake.read(workflow.table("standing"), version=version, days=[day])
    return found.select(STANDING.names).cast(STANDING).sort_by("entity_id").combine_chunks()


def recorded_scores(
    workflow: Workflow,
    lake: Lake,
    days: Sequence[date],
    *,
    where: pc.Expression | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The scores of days as the records of their scoring mean them, whatever a run that was killed left in their place.

    ``columns`` come with ``day`` and ``scoring_id``. Raises TableMissing where nothing was ever scored.
    """
    table, kept = workflow.table("scores"), columns

    def read(of: Sequence[date], version: int | None = None) -> pa.Table:
        return lake.read(table, version=version, days=of, where=where, columns=kept)

    known = lake.read(table, days=[]).schema.names
    if "scoring_id" not in known or not lake.exists(workflow.table("scoring")):
        return read(days)
    kept = None if columns is None else list(dict.fromkeys([*columns, "day", "scoring_id"]))
    found = read(days)
    made = lake.read(workflow.table("scoring"), days=days).to_pylist()
    named = {row["day"]: row for row in made if row.get("scores_version") is not None}
    stands = found.group_by(["day", "scoring_id"]).aggregate([]).to_pylist()
    torn = sorted({r["day"] for r in stands if r["day"] in named and r["scoring_id"] != named[r["day"]]["scoring_id"]})
    if not torn:
        return found
    whole = found.filter(pc.invert(pc.is_in(found["day"], value_set=pa.array(torn, pa.date32()))))
    parts = [read([d], named[d]["scores_version"]) for d in torn]
    return pa.concat_tables([whole, *parts], promote_options="default")


def challenger_scores(workflow: Workflow, lake: Lake, day: date, made: Mapping[str, Any]) -> pa.Table | None:
    """What the challenger of a day's scoring (``made``, its row) said of each entity; None where there was none or it failed."""
    # a row from before there were challengers lacks the columns
    number = made.get("challenger_version")
    if number is None or made.get("challenger_reason"):
        return None
    mine, version = pc.field("version") == number, made.get("shadow_version")
    found = lake.read(workflow.table("shadow_scores"), version=version, days=[day], where=mine)
    return found.drop_columns(["day", "version"])


def scores_of(workflow: Workflow, lake: Lake, day: date, made: Mapping[str, Any]) -> pa.Table:
    """The scores that a record of a day's scoring (``made``) means; none for the step ``no_change``."""
    if made["step"] == "no_change":
        return pa.table({})
    # a row from before scores were named lacks the columns
    found = lake.read(workflow.table("scores"), version=made.get("scores_version"), days=[day])
    return found.drop_columns([c for c in ("day", "scoring_id") if c in found.schema.names])


def said_by(workflow: Workflow) -> tuple[str, str]:
    """What the workflow says now, its addresses without user, password, query and fragment, and the digest of that."""
    said = workflow.model_dump_json(exclude={"folder"})
    clean = _clean(json.loads(said))
    if clean != json.loads(said):
        said = json.dumps(clean, separators=(",", ":"), ensure_ascii=False)
    return said, hashlib.sha256(said.encode()).hexdigest()


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clean(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_clean(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


def record_spec(workflow: Workflow, lake: Lake) -> str:
    """Keep what the workflow says now under its digest, so that a decision can name it; returns the digest."""
    said, digest = said_by(workflow)
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
    features = _features(workflow, lake, day, made["features_version"], made.get("standing_version"))
    return _decided(
        workflow,
        day,
        made,
        features,
        scores_of(workflow, lake, day, made),
        lambda: challenger_scores(workflow, lake, day, made),
        _arms(workflow, lake, day, features),
        record_spec(workflow, lake),
    )


def recompute_day(
    workflow: Workflow, lake: Lake, registry: Registry, ledger: Ledger, day: date, recorded: BatchRow
) -> Batch:
    """Decide a day that is a fact anew from what would decide it now, in memory: nothing is written.

    As then are only the hour (whether the deadline had passed, whether it was a backfill) and what stood downstream.
    Raises what ``score_day`` raises.
    """
    stood = standing_at(workflow, lake, day, recorded.record.get("standing_version"))
    late = bool(recorded.record.get("late"))
    scored = score_day(workflow, lake, registry, day, now=recorded.decided_at, ledger=ledger, late=late, standing=stood)
    made = {**scoring_of(day, scored), "standing_version": recorded.record.get("standing_version")}
    features = with_standing(workflow, _features(workflow, lake, day, made["features_version"]), scored.standing)
    theirs = scored.beside.table if scored.beside else None
    drawn = _arms(workflow, lake, day, features, write=False)
    return _decided(workflow, day, made, features, scored.table, lambda: theirs, drawn, said_by(workflow)[1])


def _decided(
    workflow: Workflow,
    day: date,
    made: Mapping[str, Any],
    features: pa.Table,
    scores: pa.Table,
    challengers: Callable[[], pa.Table | None],
    arms_drawn: tuple[int | None, pa.Table],
    spec_digest: str,
) -> Batch:
    """The batch of a day from all that it is made from; ``made``: the record of its scoring."""
    arms_version, drawn = arms_drawn
    reasons, decided = list(made["reasons"]), None
    # beside the rule, where the champion does worse than it, a canary is tried as it is beside the champion
    if made["step"] in ("champion", "rule") and made.get("challenger_stage") == "canary":
        theirs = challengers()
        try:
            if theirs is None:
                raise ValueError(made["challenger_reason"])
            both = mixed(workflow, features, drawn, scores, theirs)
            decided = decide(workflow, day, features, both, drawn, made["step"])
        except (KeyError, TypeError, ValueError) as error:
            # it is the challenger's failure, and never the day's
            reasons.append(f"the arm challenger is decided by the {made['step']}: {promoting.first_line(error)}")
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
        "standing_version": made.get("standing_version"),
        "spec_digest": spec_digest,
        "code_commit": code.commit(),
        "code_digest": code.digest(workflow.name),
    }
    digest = hashlib.sha256(
        (content_digest(decisions) + json.dumps({**record, "day": str(day)}, sort_keys=True)).encode()
    ).hexdigest()
    result = guardrails.check(decisions, workflow.guardrails)
    return Batch(
        decisions=decisions,
        record=record,
        batch_id=f"{workflow.name}-{day}-{digest[:12]}",
        digest=digest,
        step=made["step"],
        reasons=tuple(reasons),
        late=made["late"],
        status=result.status,
        findings=tuple(result.findings),
        certificates=certificates,
    )


def _features(
    workflow: Workflow, lake: Lake, day: date, version: int | None, standing_version: int | None = None
) -> pa.Table:
    """A day's features as they decide: with the status quo that stood, where a record names it."""
    if version is None:
        columns = {"entity_id": pa.string(), workflow.arms.unit: pa.string()}
        return pa.schema(columns).empty_table()
    features = lake.read(workflow.table("features"), version=version, days=[day])
    return with_standing(workflow, features, standing_at(workflow, lake, day, standing_version))


def _arms(
    workflow: Workflow, lake: Lake, day: date, features: pa.Table, *, write: bool = True
) -> tuple[int | None, pa.Table]:
    """The arms of a day's units, drawn where the epoch has not drawn them yet, and the version of the table that holds them.

    Of several days that draw at once each keeps what the others had drawn: a unit is in one arm over the whole epoch.
    """
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
    epoch = arms.epoch_of(day, workflow.start, workflow.arms.epoch, workflow.arms.washout)[0]
    while True:
        version = lake.version(table)
        keep = lake.read(table, version=version) if version is not None else None
        drawn = draw_arms(workflow, day, units, keep)
        earlier = keep.filter(pc.equal(keep["epoch"], epoch)) if keep is not None else None
        fresh = (
            drawn
            if earlier is None
            else drawn.filter(pc.invert(pc.is_in(drawn["unit"], value_set=earlier["unit"].combine_chunks())))
        )
        if not fresh.num_rows or not write:
            return version, drawn
        dated = fresh.drop_columns(["washout"]).append_column("drawn_on", pa.array([day] * fresh.num_rows, pa.date32()))
        both = dated if earlier is None else pa.concat_tables([earlier.select(dated.schema.names), dated])
        with contextlib.suppress(Moved):  # then another day has drawn: its arms are read, and kept
            version = lake.replace(table, both, predicate=f"epoch = '{epoch}'", partition_by=["epoch"], base=version)
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
    base, number = generation(batch.batch_id)
    # the same content decided once more is another decision, and the ledger names it so
    suffix = f".{number}" if number > 1 else ""
    ids = [
        hashlib.sha256(f"{base}\0{e}".encode()).hexdigest()[:20] + suffix
        for e in batch.decisions["entity_id"].to_pylist()
    ]
    named = batch.decisions.append_column("decision_id", pa.array(ids, pa.string()))
    return _stamped(named, day, batch.batch_id, batch.record)


def _stamped(decisions: pa.Table, day: date, batch_id: str, record: Mapping[str, Any]) -> pa.Table:
    """Decisions with the columns that are the same in every row of a batch."""
    n = decisions.num_rows
    table = decisions.append_column("batch_id", pa.array([batch_id] * n, pa.string()))
    table = table.append_column("day", pa.array([day] * n, pa.date32()))
    for column in RECORD:
        # a batch from before a column lacks it
        table = table.append_column(column.name, pa.array([record.get(column.name)] * n, column.type))
    return table


def write_batch(workflow: Workflow, lake: Lake, day: date, batch: Batch, *, decided_at: datetime, run_id: str) -> None:
    """Write a day's decisions, then the batch that makes them count. The ledger comes first: ``complete_lake`` brings the
    lake after it where a run ended in between."""
    row = {
        **batch.record,
        "day": day,
        "batch_id": batch.batch_id,
        "digest": batch.digest,
        "step": batch.step,
        "reasons": list(batch.reasons),
        "status": batch.status,
        "findings": json.dumps(batch.findings, default=str, sort_keys=True),
        "certificates": json.dumps(batch.certificates, default=str, sort_keys=True),
        "rows": batch.decisions.num_rows,
        "changed": batch.changed,
        "review": batch.review,
        "decided_at": decided_at,
        "late": batch.late,
        "run_id": run_id,
    }
    _write_batch(workflow, lake, day, with_record(workflow, day, batch), row)


def _write_batch(workflow: Workflow, lake: Lake, day: date, decisions: pa.Table, row: Mapping[str, Any]) -> None:
    lake.replace_days(workflow.table("decisions"), decisions, [day])
    lake.replace_days(workflow.table("batches"), pa.Table.from_pylist([dict(row)], schema=_BATCHES), [day])


def complete_lake(workflow: Workflow, lake: Lake, ledger: Ledger, day: date) -> str | None:
    """Bring the lake after the ledger: where the newest decision batch of a day does not stand in the lake, its decisions
    and its row are written from the ledger. Returns the batch's id where there was something to do.

    A batch whose rows the ledger has let go (retention) is left as it is, and so are decisions on forgotten names.
    """
    known = [b for b in ledger.batches(workflow.name, since=day, kind="decision") if b.day == day]
    newest = max(known, key=lambda b: b.sequence, default=None)
    if newest is None or newest.retired:
        return None
    table = workflow.table("batches")
    if lake.exists(table):
        stands = lake.read(table, days=[day], columns=["batch_id"])["batch_id"].to_pylist()
        if stands == [newest.batch_id]:
            return None
    found = ledger.decisions(newest.batch_id)
    found = found.filter(pc.is_valid(found["entity_id"]))
    decided = found.select(DECISIONS.names).cast(DECISIONS).append_column("decision_id", found["decision_id"])
    record = newest.record
    row = {
        **record,
        "day": day,
        "batch_id": newest.batch_id,
        "digest": newest.digest,
        "step": newest.step,
        "reasons": list(record.get("step_reasons", ())),
        "status": newest.status,
        "findings": json.dumps(list(newest.findings), default=str, sort_keys=True),
        "certificates": json.dumps(record.get("certificates", {}), default=str, sort_keys=True),
        "rows": newest.rows,
        "changed": newest.changed,
        "review": int(pc.sum(found["review"]).as_py() or 0),
        "decided_at": newest.decided_at,
        "late": bool(record.get("late")),
        "run_id": newest.run_id,
    }
    _write_batch(workflow, lake, day, _stamped(decided, day, newest.batch_id, record), row)
    return newest.batch_id


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
    # a decision from before what stood was recorded lacks the column
    with _kept(f"{name}/standing version {row.get('standing_version')}"):
        features = with_standing(workflow, features, standing_at(workflow, lake, day, row.get("standing_version")))
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
    return Replayed(
        row["decision_id"], recorded, mine[0] if mine else {}, row["code_digest"] == code.digest(found.workflow.name)
    )
