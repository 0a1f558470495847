"""From features to decisions: the steps of a bad day, the batch, and the same decision again from its row.

Belongs here: which model counts for a day, what is recorded of it, replay. Does not: how a model scores or a policy
chooses (``models``), or what is shown (``assets.stages``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from assets import code, point_in_time
from assets.lake import Lake, TableMissing, content_digest
from assets.workflow import Workflow
from data_checks import guardrails
from models import arms, budget, catalog, priority
from models.registry import ModelMissing, ModelUnreadable, Registry, Version

STEPS = ("champion", "previous_champion", "rule", "no_change")
SEED = 20_260_101


class FeaturesMissing(RuntimeError):
    """The features of a day are not there yet, and there is still time to wait for them."""


class ReplayImpossible(RuntimeError):
    """What a decision was made from cannot be found again; the message names it."""


@dataclass(frozen=True)
class Scored:
    """The scores of a day with the step of the bad-day ladder that gave them and why."""

    table: pa.Table
    step: str
    reasons: tuple[str, ...]
    model: Version | None
    features_version: int | None
    outcomes_version: int | None


@dataclass(frozen=True)
class Batch:
    """The decisions of one workflow and day, and what a person and a push need to know of them."""

    decisions: pa.Table
    batch_id: str
    digest: str
    status: str
    findings: tuple[dict[str, Any], ...]
    certificates: dict[str, Any] = field(default_factory=dict)


def learner_spec(workflow: Workflow) -> dict[str, Any]:
    """What a learner is given: the model section with the feature lists."""
    return {
        **workflow.model.model_dump(mode="json"),
        "numeric": list(workflow.features.numeric),
        "categorical": list(workflow.features.categorical),
    }


def fit_rule(workflow: Workflow, lake: Lake, day: date, features_version: int | None, outcomes_version: int | None) -> Any:
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
        raise ModelUnreadable(f"model {name!r} version {number}: carries digest {version.digest[:12]}…, expected {digest[:12]}…")
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


def score_day(workflow: Workflow, lake: Lake, registry: Registry, day: date, *, now: datetime) -> Scored:
    """Score a day by the best step that is to be had: champion → previous champion → rule → no change.

    After the deadline of a day that is still to take effect the models are skipped (the next step that is sure to be
    quick); a day whose effect is past is a backfill and has no deadline. Raises FeaturesMissing before the deadline:
    there is time to repair what holds them up.
    """
    from mlflow.exceptions import MlflowException

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
        return Scored(pa.table({}), "no_change", tuple(reasons), None, features_version, outcomes_version)
    rows = _ordered(rows)
    late = now > deadline and not backfill
    if late:
        reasons.append(f"the deadline {deadline:%H:%M} UTC had passed when scoring began at {now:%H:%M}: no model was tried")
    else:
        try:
            candidates = registry.as_of(workflow.name, day)
        except (MlflowException, OSError) as error:
            candidates = []
            reasons.append(f"the registry cannot be read: {type(error).__name__}: {error}")
        if not candidates and not reasons:
            reasons.append(f"no version of {workflow.name!r} had passed its gate by {day}")
        for step, version in zip(STEPS[:2], candidates, strict=False):
            try:
                table = read_model(workflow, registry, version).score(rows)
                return Scored(table, step, tuple(reasons), version, features_version, outcomes_version)
            except (ModelMissing, ModelUnreadable, MlflowException, OSError) as error:
                reasons.append(f"{step} (version {version.number}) cannot be used: {error}")
    try:
        table = fit_rule(workflow, lake, day, features_version, outcomes_version).score(rows)
        return Scored(table, "rule", tuple(reasons), None, features_version, outcomes_version)
    except (TableMissing, ValueError) as error:
        reasons.append(f"the rule has nothing to go by: {error}")
    return Scored(pa.table({}), "no_change", tuple(reasons), None, features_version, outcomes_version)


def _ordered(features: pa.Table) -> pa.Table:
    keys = [k for k in ("entity_id", "moment") if k in features.schema.names]
    return features.sort_by([(k, "ascending") for k in keys])


def decide(workflow: Workflow, day: date, features: pa.Table, scores: pa.Table, step: str) -> tuple[pa.Table, dict[str, Any]]:
    """Arms and the policy over one day's entities: a pure function of its arguments.

    ``features``: the day's rows; ``scores``: rows with the same keys, or none (step ``no_change``: everybody keeps the
    status quo). Returns decisions sorted by entity_id, and certificates by arm where the policy has them.
    """
    chosen = point_in_time.rows_where(_ordered(features), workflow.policy.decide_on)
    spec = workflow.arms
    units = pc.unique(chosen[spec.unit].cast(pa.string())).sort().to_pylist()
    epoch, in_washout = arms.epoch_of(day, workflow.start, spec.epoch, spec.washout)
    drawn = arms.draw(units, workflow=workflow.name, design=spec.design, epoch=epoch, shares=spec.shares)
    raise NotImplementedError((in_washout, drawn))


def _aligned(chosen: pa.Table, scores: pa.Table) -> pa.Table:
    """The scores of the chosen rows, in their order."""
    keys = [k for k in ("entity_id", "moment") if k in chosen.schema.names]
    place = chosen.select(keys).append_column("place", pa.array(np.arange(chosen.num_rows)))
    return place.join(scores, keys, join_type="inner").sort_by("place").drop_columns(["place"])


_SCORING = pa.schema(
    {
        "day": pa.date32(),
        "step": pa.string(),
        "reasons": pa.list_(pa.string()),
        "model_version": pa.int64(),
        "model_digest": pa.string(),
        "features_version": pa.int64(),
        "outcomes_version": pa.int64(),
    }
)


def write_scores(workflow: Workflow, lake: Lake, day: date, scored: Scored) -> None:
    """Write a day's scores, then the record of how they were made (what the decisions read first)."""
    if scored.table.num_rows or lake.exists(workflow.table("scores")):
        dated = scored.table.append_column("day", pa.array([day] * scored.table.num_rows, pa.date32()))
        if scored.table.num_rows == 0:
            dated = lake.read(workflow.table("scores"), days=[]).slice(0, 0)
        lake.replace_days(workflow.table("scores"), dated, [day])
    record = {
        "day": day,
        "step": scored.step,
        "reasons": list(scored.reasons),
        "model_version": scored.model.number if scored.model else None,
        "model_digest": scored.model.digest if scored.model else None,
        "features_version": scored.features_version,
        "outcomes_version": scored.outcomes_version,
    }
    lake.replace_days(workflow.table("scoring"), pa.Table.from_pylist([record], schema=_SCORING), [day])
