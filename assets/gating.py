"""What the gate needs of a workflow: the held-out days, whom a candidate is compared with, and its terms; and the gate
itself for a version that is registered already.

Belongs here: reading rows and versions for the gate, in one place for training and for a person's request. Does not: what
is measured (``models.examining``) and what follows from it (``models.gate``), or what a verdict does to a version
(``assets.promoting``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from assets import deciding, point_in_time, promoting
from assets.lake import Lake
from assets.workflow import Workflow
from delivery.ledger import Ledger
from models import catalog, examining, fitting, gate
from models.budget import BudgetPolicy
from models.registry import CHAMPION, ModelMissing, ModelUnreadable, Registry, Version

THREADS = 2
"""Fixed: sums over another number of threads differ in their last bits, and a run repeated must give the same bytes."""


@dataclass(frozen=True)
class Held:
    """The rows of one judgement, by what was known at the cut-off of its day.

    Held-out days: the days after ``split`` up to ``mature``.
    """

    split: date
    mature: date
    early: pa.Table
    """What was known at the cut-off of ``split`` and may be learned from by who is judged."""
    rows: pa.Table
    """The held-out rows that the gate judges."""
    decided: pa.Table
    """The rows that the policy decides on: the held-out days', and earlier ones with randomised decisions."""


def held_out(workflow: Workflow, lake: Lake, day: date, rows: pa.Table) -> Held:
    """Split ``rows``, the training set of ``day`` sorted by day and key."""
    training = workflow.training
    split = day - timedelta(days=training.holdout_days + training.maturity_days)
    mature = day - timedelta(days=training.maturity_days)
    early = point_in_time.training_set(workflow, lake, split)
    late = (pc.field("day") > pc.scalar(split)) & (pc.field("day") <= pc.scalar(mature))
    mine = late
    if isinstance(workflow.policy, BudgetPolicy) and "explore_probability" in rows.column_names:
        since = pc.scalar(mature - timedelta(days=training.gate.value_days))
        drawn = pc.unique(rows.filter(pc.is_valid(rows["explore_probability"]))["day"].combine_chunks())
        mine = late | ((pc.field("day") > since) & (pc.field("day") <= pc.scalar(split)) & pc.field("day").isin(drawn))
    return Held(
        split,
        mature,
        point_in_time.chosen(workflow, early, "training.train_on"),
        point_in_time.chosen(workflow, rows.filter(late), "training.evaluate_on"),
        deciding.of_policy(workflow, rows.filter(mine)),
    )


def terms(workflow: Workflow) -> examining.Terms:
    """What a workflow asks of a candidate beyond its metric."""
    return examining.Terms(
        workflow.model.kind,
        workflow.training.gate,
        workflow.policy,
        tuple(workflow.features.numeric),
        tuple(workflow.features.categorical),
        deciding.SEED,
    )


def asked(workflow: Workflow, device: str) -> dict[str, Any]:
    """What every candidate of a workflow is fitted and judged with (keywords of ``models.fitting.fit_and_judge``)."""
    training = workflow.training
    return {
        "rule": catalog.rule(workflow.model.kind), "min_rows": training.min_rows, "metric": training.metric,
        "better": training.better, "margin": training.margin, "seed": deciding.SEED, "device": device, "threads": THREADS,
        "terms": terms(workflow),
    }  # fmt: skip


def champion_of(workflow: Workflow, registry: Registry, ledger: Ledger) -> Version | None:
    """Who is champion by the ledger; by the alias where the ledger knows no version of the workflow."""
    if not ledger.promotions(workflow.name):
        return registry.by_alias(workflow.name, CHAMPION)
    number = promoting.live(ledger, workflow)["champion"]
    try:
        return None if number is None else registry.by_number(workflow.name, number)
    except ModelMissing:
        return None


def opponent(
    workflow: Workflow, registry: Registry, champion: Version | None, split: date
) -> tuple[catalog.Scorer | None, dict[str, Any] | None, str]:
    """Whom a candidate is compared with: the champion as it is, or its recipe where it has learned from the held-out
    days; and a sentence about it."""
    if champion is None:
        return None, None, ""
    try:
        if champion.trained_day <= split:
            model = deciding.read_model(workflow, registry, champion)
            return model, None, f" Compared with version {champion.number} as it is."
        recipe = registry.recipe(champion)
    except (ModelMissing, ModelUnreadable) as error:
        return None, None, f" Version {champion.number} could not be compared: {error}."
    stands_in = "its recipe, fitted before them, stands in for it"
    return None, recipe, f" Version {champion.number} has learned from the held-out days: {stands_in}."


def judge(
    workflow: Workflow, lake: Lake, registry: Registry, version: Version, day: date, *, against: Version | None
) -> gate.Verdict:
    """Judge a registered version, as it is, on the matured days held out by ``day``, beside ``against``.

    What somebody registered by hand is judged by its very files, never by a recipe that it claims: it may have learned
    from the held-out days, which flatters it, and the verdict says so. A version that cannot be read or cannot score the
    held-out rows is refused. What was found becomes tags of the version. Raises TableMissing where features or outcomes
    were never materialised, and MLflow's error where the registry is down.
    """
    found = _judge(workflow, lake, registry, version, day, against)
    registry.tag(version.name, version.number, gate.tags(found))
    return found


def _judge(
    workflow: Workflow, lake: Lake, registry: Registry, version: Version, day: date, against: Version | None
) -> gate.Verdict:
    from lightgbm.basic import LightGBMError

    try:
        model = deciding.read_model(workflow, registry, version)
    except (ModelMissing, ModelUnreadable) as error:
        return gate.refused(f"version {version.number} cannot be read: {error}")
    try:
        recorded: dict[str, Any] | None = registry.recipe(version)
    except ModelUnreadable:
        recorded = None  # registered by hand: there is only what its files say
    rows = point_in_time.ordered(point_in_time.training_set(workflow, lake, day), "day")
    held = held_out(workflow, lake, day, rows)
    training = workflow.training
    if not held.rows.num_rows or not held.early.num_rows:
        return gate.refused(f"no matured rows are held out by {day}: nothing to judge version {version.number} on")
    same = against is not None and against.number == version.number
    champion, recipe, note = opponent(workflow, registry, None if same else against, held.split)
    how: dict[str, Any] = {"seed": deciding.SEED, "device": "cpu", "threads": THREADS}
    other: catalog.Scorer | None = champion
    if recipe is not None:
        other, trouble = fitting.stand_in(catalog.learner(workflow.model.kind), held.early, recipe, how)
        note += trouble
    rule = catalog.rule(workflow.model.kind).fit(held.early, deciding.learner_spec(workflow), **how)
    try:
        verdict, _ = examining.examine(
            model,
            rule,
            other,
            held.rows,
            metric=training.metric,
            better=training.better,
            margin=training.margin,
            terms=terms(workflow),
            decided=held.decided,
            recorded=recorded,
        )
    except (KeyError, TypeError, ValueError, LightGBMError) as error:
        return gate.refused(
            f"version {version.number} cannot be judged on the held-out rows: {type(error).__name__}: {error}"
        )
    if version.trained_day > held.split:
        note += f" Version {version.number} may have learned from the held-out days, which flatters it."
    notes = (note.strip(),) if note.strip() else ()
    days = {"held_out_days": [str(held.split + timedelta(days=1)), str(held.mature)], "version": version.number}
    return gate.Verdict(verdict.passed, (*verdict.reasons, *notes), {**verdict.figures, **days})
