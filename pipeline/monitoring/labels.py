"""Which scores meet which outcomes, by what was known at a day's cut-off, and what their figures are compared with.

Belongs here: reading scores, outcomes and a version's held-out figures, and what the rule would have said of the same rows.
Does not: the figures (``data_checks.performance``), or what a fall starts (``pipeline.lifecycle.retraining``, ``pipeline.lifecycle.rule_override``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date, timedelta
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import duckdb_session
from data_checks import performance
from models import catalog
from models.registry import Registry
from pipeline import point_in_time
from pipeline.decisions import scoring, tables
from pipeline.lake import Lake, TableMissing
from pipeline.workflow import Workflow

BASELINE = "held-out baseline"
"""What a kind can do whose gate judges what the score table says."""


def kind_of(workflow: Workflow) -> performance.Kind:
    """Whether a workflow's scores are probabilities or amounts."""
    return catalog.KINDS[workflow.model.kind].scores


def metric_of(workflow: Workflow) -> str:
    """The metric whose fall starts a retraining."""
    return workflow.retraining.metric or workflow.training.metric


def span(workflow: Workflow, day: date) -> list[date]:
    """The days whose scores count at ``day``: the reference, the window, and those that mature, oldest first."""
    spec = workflow.retraining
    back = spec.reference_days + spec.window_days + workflow.training.maturity_days
    return [d for n in range(back, -1, -1) if (d := day - timedelta(days=n)) >= workflow.start]


def scored(workflow: Workflow, lake: Lake, day: date, without: Collection[date] = ()) -> pa.Table:
    """Every score that counts at ``day`` with what was known of it at that day's cut-off, as ``performance.judge`` reads it.

    Empty where nothing was scored. An outcome that became known later, or that landed for a later day, is not seen.
    ``without``: days whose stored scores are not of the version that acted (``acting.scored_by_others``).
    """
    days = [d for d in span(workflow, day) if d not in without]
    if not days:
        return _EMPTY
    try:
        scores = tables.recorded_scores(workflow, lake, days)
        scored_by = lake.read(workflow.table("scoring"), days=days, columns=["day", "model_version", "step"])
    except TableMissing:
        return _EMPTY
    if scores.num_rows == 0:
        return _EMPTY
    keys = ["day", *point_in_time.keys_of(scores.schema.names)]
    if (judged := _judged(workflow, lake, days, None, keys)) is not None:
        scores = scores.join(judged.select(keys), keys=keys, join_type="left semi")
    known = (pc.field("day") <= pc.scalar(day)) & (pc.field("day") >= pc.scalar(days[0]))
    try:
        answers = lake.read(workflow.table("outcomes"), where=known)
    except TableMissing:
        return _EMPTY
    by_day = workflow.outcomes.join == "entity_day"
    joined = "s.entity_id = o.entity_id" + (" AND s.day = o.for_day" if by_day else "")
    kind = catalog.KINDS[workflow.model.kind]
    extra = [f'o."{c}"' for c in answers.schema.names if c in (kind.answer, *kind.read_with)]
    connection = duckdb_session.engine()
    try:
        for name, table in (("scores", scores), ("scoring", scored_by), ("answers", answers)):
            connection.register(name, table)
        rows = connection.sql(
            f"WITH o AS (SELECT * FROM answers WHERE known_at <= $cutoff "
            f"{point_in_time.newest(*point_in_time.outcome_keys(workflow))}) "
            f"SELECT s.*, g.model_version AS version, {', '.join(extra)} FROM scores s JOIN scoring g ON g.day = s.day "
            f"LEFT JOIN o ON {joined} ORDER BY {', '.join('s.' + k for k in keys)}",
            params={"cutoff": workflow.cutoff_of(day)},
        ).to_arrow_table()
    finally:
        connection.close()
    if kind.blank is not None:
        rows = rows.filter(pc.is_valid(rows[kind.blank]))
    read = {name: pa.array(column) for name, column in kind.read(rows).items()}
    # of these days alone: what was added since, for later days, changes nothing of what is told of this one
    rule = _rule_predicted(workflow, lake, [d for d in _settled(workflow, day) if d in days], rows, keys)
    read |= {} if rule is None else {performance.RULE: pa.array(rule)}
    return pa.table(
        {
            "day": rows["day"],
            "entity_id": rows["entity_id"].cast(pa.string()),
            "version": rows["version"].cast(pa.int64()),
            **read,
        }
    )


def _judged(
    workflow: Workflow, lake: Lake, days: Sequence[date], version: int | None, columns: Collection[str]
) -> pa.Table | None:
    """The features of the rows that ``training.evaluate_on`` names: its own columns and ``columns``; None where it names all."""
    predicate = workflow.training.evaluate_on
    if predicate.strip().lower() == "true":
        return None
    table = workflow.table("features")
    known = lake.read(table, version=version, days=[]).schema.names
    # a column that a predicate reads stands in its text
    needed = [c for c in known if c in columns or c.lower() in predicate.lower()]
    return point_in_time.chosen(
        workflow, lake.read(table, version=version, days=days, columns=needed), "training.evaluate_on"
    )


def _rule_predicted(
    workflow: Workflow, lake: Lake, days: Sequence[date], rows: pa.Table, keys: Sequence[str]
) -> np.ndarray | None:
    """What the rule predicted of each of ``rows``, read as a score is; NaN where it said nothing, None where it never did."""
    if not lake.exists(workflow.table("rule_scores")):
        return None
    said = lake.read(workflow.table("rule_scores"), days=days)
    ours, theirs = (
        pc.binary_join_element_wise(*(t[k].cast(pa.string()).combine_chunks() for k in keys), "\0", null_handling="replace")
        for t in (rows, said)
    )  # fmt: skip
    place = pc.index_in(ours, value_set=theirs)
    held = pc.is_valid(place)
    beside = rows.filter(held)
    aligned = said.take(place.drop_null())
    kind = catalog.KINDS[workflow.model.kind]
    for name in (kind.answer, *kind.read_with):
        if name in beside.schema.names and name not in aligned.schema.names:
            aligned = aligned.append_column(name, beside[name])
    found = np.full(rows.num_rows, np.nan)
    found[np.asarray(held)] = kind.read(aligned)["predicted"]
    return found


def _settled(workflow: Workflow, day: date) -> list[date]:
    """The days of the newest window whose outcomes have had their time by ``day``."""
    newest = day - timedelta(days=workflow.training.maturity_days)
    return [newest - timedelta(days=n) for n in range(workflow.retraining.window_days)]


def score_by_rule(workflow: Workflow, lake: Lake, day: date, without: Collection[date] = ()) -> list[date]:
    """What the rule would have said on the days whose outcomes have matured by ``day``, into the table ``rule_scores``.

    The rule is fitted as it would have been then: from what was known at the cut-off of the day that it scores, at the versions
    that the day's scoring read. A day is scored once; days on which no model scored are left out, and so are those on which the
    rule had nothing to go by. Returns the days that were added.
    """
    wanted = _settled(workflow, day)
    table = workflow.table("rule_scores")
    try:
        made = lake.read(workflow.table("scoring"), days=wanted).to_pylist()
    except TableMissing:
        return []
    done = set(lake.read(table, days=wanted, columns=["day"])["day"].to_pylist()) if lake.exists(table) else set()
    rule = catalog.rule(workflow.model.kind)
    added = []
    for row in sorted(made, key=lambda r: r["day"]):
        then = row["day"]
        if then in done or then in without or row["model_version"] is None or then < workflow.start:
            continue
        try:
            features = lake.read(workflow.table("features"), version=row.get("features_version"), days=[then])
            features = point_in_time.chosen(workflow, point_in_time.ordered(features), "training.evaluate_on")
            if rule.learns:
                fitted = scoring.fit_rule(
                    workflow, lake, then, row.get("features_version"), row.get("outcomes_version")
                )
            else:
                fitted = rule.fit(pa.table({}), scoring.learner_spec(workflow), seed=scoring.SEED, device="cpu", threads=1)  # fmt: skip
            scores = fitted.score(features)
        except (TableMissing, KeyError, ValueError):
            continue
        dated = scores.append_column("day", pa.array([then] * scores.num_rows, pa.date32()))
        lake.replace_days(table, dated, [then])
        added.append(then)
    return added


_EMPTY = pa.schema(
    {
        "day": pa.date32(),
        "entity_id": pa.string(),
        "version": pa.int64(),
        "predicted": pa.float64(),
        "actual": pa.float64(),
    }
).empty_table()


def no_gate_baseline(workflow: Workflow) -> str:
    """Why what the gate measured of a version is no baseline for its days; empty where it is."""
    return catalog.KINDS[workflow.model.kind].absent.get(BASELINE, "")


def held_out(workflow: Workflow, registry: Registry | None) -> Callable[[int], Mapping[str, float]]:
    """A version's own held-out figures from its run in MLflow, by metric.

    Nothing for a kind of model whose gate judges something else than its scores, for a version that is gone, and where the
    registry cannot be reached: the baseline is then the days before, and the figure says so.
    """

    @cache
    def of(number: int) -> Mapping[str, float]:
        if registry is None or no_gate_baseline(workflow):
            return {}
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        from models.registry import ModelMissing

        try:
            version = registry.by_number(workflow.name, number)
            metrics = registry.client.get_run(version.run_id).data.metrics
        except (ModelMissing, MlflowException, SQLAlchemyError, OSError):
            return {}
        return {k.removeprefix("candidate_"): float(v) for k, v in metrics.items() if k.startswith("candidate_")}

    return of


def judge(
    workflow: Workflow, lake: Lake, registry: Registry | None, day: date, without: Collection[date] = ()
) -> pa.Table:
    """The rows of ``<workflow>/performance`` of a day: every figure that can be told at its cut-off; ``without`` as in ``scored``."""
    return performance.judge(
        scored(workflow, lake, day, without),
        day,
        kind=kind_of(workflow),
        spec=workflow.retraining,
        maturity_days=workflow.training.maturity_days,
        gate=held_out(workflow, registry),
        outcome_of="entity" if workflow.outcomes.join == "entity" else "row",
    )
