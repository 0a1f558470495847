"""How soon a harm would be found with the arms that a workflow has.

Belongs here: the history that power is simulated from, the sentences that an asset keeps. Does not: the simulation
(``data_checks.regression``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import date, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from common.errors import SignalboxError
from data_checks import regression
from models.policies import arms
from pipeline.lake import Lake
from pipeline.monitoring.observations import in_days, observations, past_entities, regression_of
from pipeline.monitoring.verdicts import Comparison
from pipeline.workflow import Workflow


class NoHistory(SignalboxError, LookupError):
    """Nothing is there to tell from how soon a harm would be found; the message says what is missing, and the way to it."""


def power(
    workflow: Workflow, lake: Lake, day: date, harms: Sequence[float], *, runs: int = 300, wanted: float = 0.8
) -> list[regression.Power]:
    """How soon each harm (a share of the metric's level) would be found with these arms, from the days up to ``day``.

    By comparison that the shares allow, metric and harm. Raises NoHistory where the lake holds too little of it.
    """
    spec, shares = regression_of(workflow), arms.normalised(workflow.arms.shares)
    history = _history(workflow, lake, day)
    pairs = [p for p in (("champion", "holdout"), ("challenger", "champion")) if set(p) <= shares.keys()]
    if not pairs:
        raise NoHistory(
            f"{workflow.name}: no two arms are compared; arms.shares in {workflow.folder / 'workflow.yaml'} needs a holdout "
            "beside the champion"
        )
    try:
        return [
            regression.power(
                history, spec=spec.of_outcomes(control), design=workflow.arms.design, treated=treated, control=control, shares=shares,
                harm=harm, epoch_days=workflow.arms.epoch, washout_days=workflow.arms.washout, metric=metric.name,
                wanted=wanted, runs=runs, seed=Comparison("power", treated, control, None, workflow.start).seed(workflow.name),
            )
            for treated, control in pairs for metric in spec.metrics for harm in harms
        ]  # fmt: skip
    except ValueError as error:
        raise NoHistory(f"{workflow.name}: {error}; {_prepare(workflow)}") from None


SENTENCE_HARMS = (0.05, 0.2)
"""Harms, as shares of the metric's level, of which the asset says how soon they would be found."""
_TOLD_FOR_DAYS = 28


def power_sentences(workflow: Workflow, lake: Lake, day: date) -> list[str]:
    """What the asset says of its own power: told anew every four weeks, or when arms or metrics are changed, and kept.

    Simulating takes seconds, so it waits until there is a pre-period and two weeks after it to simulate from.
    """
    spec, table = regression_of(workflow), workflow.table("power")
    said = json.dumps([spec.model_dump(mode="json"), workflow.arms.model_dump(mode="json")], sort_keys=True)
    digest = hashlib.sha256(said.encode()).hexdigest()
    if lake.exists(table):
        mine = in_days(day - timedelta(days=_TOLD_FOR_DAYS - 1), day) & (pc.field("digest") == digest)
        kept = lake.read(table, where=mine).sort_by([("day", "descending"), ("n", "ascending")]).to_pylist()
        if kept:
            return [row["says"] for row in kept if row["day"] == kept[0]["day"]]
    wanted = spec.pre_days + 14
    if (day - workflow.start).days + 1 < wanted:
        return [
            f"How soon a harm would be found is told once there are {wanted} days of history; signalbox power {workflow.name}"
        ]
    try:
        says = [found.sentence() for found in power(workflow, lake, day, SENTENCE_HARMS, runs=100)]
    except NoHistory as error:
        return [str(error)]
    rows = [{"day": day, "digest": digest, "n": n, "says": text} for n, text in enumerate(says)]
    kinds = {"day": pa.date32(), "digest": pa.string(), "n": pa.int64(), "says": pa.string()}
    lake.replace_days(table, pa.Table.from_pylist(rows, schema=pa.schema(kinds)), [day])
    return says


def _history(workflow: Workflow, lake: Lake, day: date) -> pa.Table:
    """As many days up to ``day`` as a pre-period, a horizon and four weeks to choose from take, as ``regression.power`` reads them."""
    spec = regression_of(workflow)
    lacking = [t for t in ("outcomes", "features") if not lake.exists(workflow.table(t))]
    if lacking:
        raise NoHistory(f"{workflow.name}: the lake holds no {' and no '.join(lacking)} yet; {_prepare(workflow)}")
    first = max(workflow.start, day - timedelta(days=spec.pre_days + spec.horizon_days + 28))
    by_entity = workflow.arms.design == "entity"
    found = (
        past_entities(workflow, lake, first, day) if by_entity else observations(workflow, lake, first, day, known=day)
    )
    if not found.num_rows:
        raise NoHistory(f"{workflow.name}: no outcome was known of the days {first} to {day}; {_prepare(workflow)}")
    return found


def _prepare(workflow: Workflow) -> str:
    return f"land past days below landing/{workflow.name} and run: signalbox run {workflow.name} prepare --since {workflow.start}"
