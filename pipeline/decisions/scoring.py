"""From features to scores: the steps of a bad day, what stands downstream, and what is recorded of a day's scoring.

Belongs here: which model counts for a day, reading and fitting one, writing its scores. Does not: how a model scores
(``models``), who is champion (``pipeline.lifecycle.state``), or what is chosen by the scores (``pipeline.decisions.decide``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import duckdb_session, errors
from common.errors import SignalboxError
from delivery.ledger import Ledger
from models import catalog
from models.policies import priority
from models.registry import ModelMissing, ModelUnreadable, Registry, Version
from pipeline import point_in_time
from pipeline.decisions import in_effect, tables
from pipeline.lake import Lake, TableMissing, content_digest
from pipeline.lifecycle import rule_override, state
from pipeline.workflow import Workflow

SEED = 20_260_101
"""Of every model that is fitted."""
MOST_WITHOUT_SCORE = 0.5
"""The share of the rows that a day is decided on above which a version that leaves them without a score does not decide it.

A row without a score keeps what stands, which is right for the few whose values went missing: the version knows the others
better than the next step does. Where it is most of them, a column is gone; then nearly nothing would be decided, and the day
would still count as one that the champion decided. The next step has a score for those rows, too. Half is where more is lost
by the rows that stand still than is won by the others.
"""


class FeaturesMissing(SignalboxError, RuntimeError):
    """The features of a day are not there yet, and there is still time to wait for them."""


class NotANumber(SignalboxError, ValueError):
    """Scores that nothing can be decided by: NaN or infinite."""


class NoScores(SignalboxError, ValueError):
    """Too few of the rows that a day is decided on have a score."""


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
    unread: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column → entities without a score, because it is missing there and never was in the model's training."""
    standing: pa.Table = field(default_factory=tables.STANDING.empty_table)
    """Status quo of entities that were moved after the day that its features describe, as STANDING."""


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
        return tables.STANDING.empty_table()
    connection = duckdb_session.engine()
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
    return made.cast(tables.STANDING)


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

    Who champion and previous champion are, the ``ledger`` says (``pipeline.lifecycle.state.lineup``); without one, the registry's aliases.
    A champion that was found to do worse than the rule (``pipeline.lifecycle.rule_override``) leaves the day to the rule.
    A challenger scores beside them; its failure is written down and touches nothing else. Scores that are NaN or infinite,
    and no score for most of the rows (``MOST_WITHOUT_SCORE``), are a failure like any other.

    After the deadline of a day that is still to take effect the models are skipped (the next step that is sure to be
    quick); a day whose effect is past is a backfill and has no deadline. ``late`` says it in the clock's place. Raises
    FeaturesMissing before the deadline: there is time to repair what holds them up.
    ``standing`` (STANDING) replaces what the ledger would say of what stands.
    """
    deadline = workflow.deadline_of(day)
    backfill = now >= in_effect.over(day)
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
        standing = (
            standing_of(workflow, ledger, day, until, rows) if ledger is not None else tables.STANDING.empty_table()
        )
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
        reasons.append(f"{said}: {errors.first_line(error)}")
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

    unreachable = errors.unreachable()
    unusable: tuple[type[Exception], ...] = (ModelMissing, ModelUnreadable, *unreachable)
    found = state.Lineup(())
    try:
        found = state.lineup(registry, ledger, workflow.name, day)
    except unreachable as error:
        reasons.append(f"the registry cannot be read: {type(error).__name__}: {errors.first_line(error)}")
    if not found.versions and not reasons:
        reasons.append(f"no version of {workflow.name!r} had passed its gate by {day}")
    for step, version, why in found.versions:
        if version is None:
            reasons.append(why)
            continue
        behind = rule_override.in_force(ledger, workflow.name, version.number, until) if ledger is not None else ""
        if behind:
            reasons.append(behind)
            return _Made(pa.table({}), "rule", None, _challenger(workflow, registry, rows, found, beside), found.moved)
        try:
            table, unread = _scored_by(workflow, rows, read_model(workflow, registry, version))
        except unusable as error:
            reasons.append(f"{step} (version {version.number}) cannot be used: {errors.first_line(error)}")
        except (KeyError, TypeError, ValueError, LightGBMError) as error:
            reasons.append(
                f"{step} (version {version.number}) cannot score the day's features: {errors.first_line(error)}"
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
    workflow: Workflow, registry: Registry, rows: pa.Table, found: state.Lineup, wanted: bool
) -> Beside | None:
    return _beside(workflow, registry, rows, *found.challenger) if wanted and found.challenger else None


def _beside(workflow: Workflow, registry: Registry, rows: pa.Table, version: Version, stage: str) -> Beside:
    """What the challenger makes of the day's rows. Whatever goes wrong with it is its own affair, never the day's."""
    try:
        return Beside(version, stage, _scored_by(workflow, rows, read_model(workflow, registry, version))[0], "")
    except Exception as error:
        return Beside(version, stage, None, f"{type(error).__name__}: {errors.first_line(error)}")


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
    lake.replace_days(workflow.table("scoring"), pa.Table.from_pylist([record], schema=tables.SCORING), [day])


def _of_day(table: pa.Table, day: date) -> pa.Table:
    return table.append_column("day", pa.array([day] * table.num_rows, pa.date32()))


def _write_standing(workflow: Workflow, lake: Lake, day: date, standing: pa.Table) -> int | None:
    """The version of the table ``standing`` that holds a day's rows: the one recorded before where they are the same."""
    if not standing.num_rows:
        return None
    table = workflow.table("standing")
    for made in lake.read(workflow.table("scoring"), days=[day]).to_pylist() if lake.exists(table) else ():
        version = made.get("standing_version")
        if version is not None and tables.standing_at(workflow, lake, day, version).equals(
            standing.sort_by("entity_id")
        ):
            return int(version)
    return lake.replace_days(table, _of_day(standing, day), [day])
