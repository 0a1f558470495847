"""What the gate needs of a workflow: the held-out days, whom a candidate is compared with, and its terms; and the gate
itself for a version that is registered already.

Belongs here: reading rows and versions for the gate, in one place for training and for a person's request. Does not: what
is measured (``models.evaluation.evaluate``) and what follows from it (``models.evaluation.gate``), or what a verdict does to a version
(``pipeline.lifecycle.promotion``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from delivery.ledger import Ledger
from models import catalog
from models.evaluation import evaluate, gate, paired
from models.registry import CHAMPION, ModelMissing, ModelUnreadable, Registry, Version
from models.training import fit
from pipeline import point_in_time
from pipeline.decisions import decide, scoring
from pipeline.lake import Lake
from pipeline.lifecycle import state
from pipeline.monitoring import labels
from pipeline.workflow import Workflow

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
    newest: fit.Newest
    """Features of as many newest days as are held out, before ``day`` and before ``split``."""


def twin_day(workflow: Workflow, trained: date) -> date:
    """The ``split`` of a version trained for a day: a twin fitted on what was known then is as old on the first held-out day
    as the version is on the day of its training, whoever else is judged on these days."""
    return trained - timedelta(days=workflow.training.holdout_days + workflow.training.maturity_days)


def _known(workflow: Workflow, lake: Lake, day: date) -> pa.Table:
    """What may be learned from by who is trained for ``day``."""
    return point_in_time.chosen(workflow, point_in_time.training_set(workflow, lake, day), "training.train_on")


def held_out(workflow: Workflow, lake: Lake, day: date, rows: pa.Table) -> Held:
    """Split ``rows``, the training set of ``day`` sorted by day and key."""
    training = workflow.training
    split = twin_day(workflow, day)
    mature = day - timedelta(days=training.maturity_days)
    late = (pc.field("day") > pc.scalar(split)) & (pc.field("day") <= pc.scalar(mature))
    mine = late
    logged = catalog.policy(workflow.policy.kind).explored
    if logged in rows.column_names:
        since = pc.scalar(mature - timedelta(days=training.gate.value_days))
        drawn = pc.unique(rows.filter(pc.is_valid(rows[logged]))["day"].combine_chunks())
        mine = late | ((pc.field("day") > since) & (pc.field("day") <= pc.scalar(split)) & pc.field("day").isin(drawn))
    return Held(
        split,
        mature,
        _known(workflow, lake, split),
        point_in_time.chosen(workflow, rows.filter(late), "training.evaluate_on"),
        decide.of_policy(workflow, rows.filter(mine)),
        fit.Newest(*(_newest(workflow, lake, until) for until in (day, split))),
    )


def _newest(workflow: Workflow, lake: Lake, until: date) -> pa.Table:
    training = workflow.training
    since = until - timedelta(days=training.holdout_days)
    where = (pc.field("day") > pc.scalar(since)) & (pc.field("day") <= pc.scalar(until))
    rows = point_in_time.chosen(workflow, lake.read(workflow.table("features"), where=where), "training.evaluate_on")
    return point_in_time.ordered(rows, "day")


def terms(workflow: Workflow) -> evaluate.Terms:
    """What a workflow asks of a candidate beyond its metric."""
    return evaluate.Terms(
        workflow.model.kind,
        workflow.training.gate,
        workflow.policy,
        tuple(workflow.features.numeric),
        tuple(workflow.features.categorical),
        scoring.SEED,
    )


def asked(workflow: Workflow, device: str) -> dict[str, Any]:
    """What every candidate of a workflow is fitted and judged with (keywords of ``models.training.fit.fit_and_judge``)."""
    training = workflow.training
    return {
        "rule": catalog.rule(workflow.model.kind), "min_rows": training.min_rows, "metric": training.metric,
        "better": training.better, "margin": training.margin, "seed": scoring.SEED, "device": device, "threads": THREADS,
        "terms": terms(workflow),
    }  # fmt: skip


def champion_of(workflow: Workflow, registry: Registry, ledger: Ledger, day: date) -> Version | None:
    """Who is champion for what is trained for ``day``: by the ledger; by the alias where the ledger knows no version.

    Where the champion was trained later than ``day`` (a backfill) it is the newest version by then that had passed its gate:
    a candidate of an earlier day is not compared with what was learned after it.
    """
    lifecycle = state.LifecycleState.read(ledger, workflow)
    if not lifecycle.moves:
        held = registry.by_alias(workflow.name, CHAMPION)
    else:
        number = lifecycle.live()["champion"]
        try:
            held = None if number is None else registry.by_number(workflow.name, number)
        except ModelMissing:
            held = None
    if held is None or held.trained_day <= day or held.trained_day == date.max:
        return held
    found = state.lineup(registry, ledger, workflow.name, day).versions
    return found[0][1] if found else None


def opponent(
    workflow: Workflow, lake: Lake, registry: Registry, champion: Version | None, split: date
) -> tuple[fit.Champion | None, str]:
    """Whom a candidate is compared with, and a sentence where the champion cannot be read.

    Where its files cannot be read it could not decide either: what acts then is the rule, which the candidate must beat.
    """
    if champion is None:
        return None, ""
    try:
        model = scoring.read_model(workflow, registry, champion)
    except (ModelMissing, ModelUnreadable) as error:
        return None, f" Version {champion.number} could not be compared: {error}."
    found = fit.Champion(f"version {champion.number}", model, champion.trained_day <= split)
    try:
        recipe = registry.recipe(champion)
    except ModelUnreadable as error:
        return replace(found, why=str(error)), ""
    if not recipe or champion.trained_day == date.max:
        return replace(found, why="its run says no recipe, or not for which day it was trained"), ""
    day = twin_day(workflow, champion.trained_day)
    rows = _known(workflow, lake, day)
    if rows.num_rows < workflow.training.min_rows:
        least = f"{workflow.training.min_rows} are needed (training.min_rows)"
        return replace(found, why=f"{rows.num_rows} rows were known by {day}, {least}"), ""
    return replace(found, recipe=recipe, aged=rows, aged_day=day), ""


def live(workflow: Workflow, lake: Lake, champion: Version | None, day: date) -> dict[str, Any]:
    """What the champion really scored on the days since its training whose outcomes were known at the cut-off of ``day``.

    ``live`` with its version, metric, value, rows and days; empty where there is nothing, and for a metric that is no mean
    over rows. A score knows the budget that stood and not what was spent of it: amounts are foreseen at the budget.
    """
    if champion is None:
        return {}
    rows = labels.scored(workflow, lake, day)
    told = (
        (pc.field("version") == champion.number)
        & (pc.field("day") > pc.scalar(champion.trained_day))
        & ~pc.is_nan(pc.field("predicted"))
        & ~pc.is_nan(pc.field("actual"))
    )
    rows = rows.filter(told)
    kind, metric = workflow.model.kind, workflow.training.metric
    if not rows.num_rows or not paired.comparable(kind):
        return {}
    lost = paired.losses(kind, metric, rows["predicted"].to_numpy(), rows["actual"].to_numpy())
    if lost is None:
        return {}
    days = pc.min_max(rows["day"]).as_py()
    found = {
        "version": champion.number, "metric": metric, "value": float(lost.mean()), "rows": rows.num_rows,
        "days": [str(days["min"]), str(days["max"])],
        "at": "" if labels.kind_of(workflow) == "probability" else ", at the budgets that stood",
    }  # fmt: skip
    return {"live": found}


def judge(
    workflow: Workflow, lake: Lake, registry: Registry, version: Version, day: date, *, against: Version | None
) -> gate.Verdict:
    """Judge a registered version on the matured days held out by ``day``, beside ``against``.

    It is judged by its very files: what its run says of it need not be so. Where it, or ``against``, has learned from the
    held-out days, that flatters it; then the twins of both are judged as at a training, and it must pass both ways. Where a
    twin cannot be had the files alone are judged, and the verdict says so.
    A version that cannot be read, cannot score the held-out rows, or is ``against`` itself under another number is refused.
    What was found becomes tags of the version. Raises TableMissing where features or outcomes were never materialised, and
    MLflow's error where the registry is down.
    """
    found = _judge(workflow, lake, registry, version, day, against)
    registry.tag(version.name, version.number, gate.tags(found))
    return found


def _judge(
    workflow: Workflow, lake: Lake, registry: Registry, version: Version, day: date, against: Version | None
) -> gate.Verdict:
    from lightgbm.basic import LightGBMError

    against = None if against is not None and against.number == version.number else against
    rows = point_in_time.ordered(point_in_time.training_set(workflow, lake, day), "day")
    held = held_out(workflow, lake, day, rows)
    mine, trouble = opponent(workflow, lake, registry, version, held.split)
    if mine is None:
        return gate.refused(f"version {version.number} cannot be read:{trouble}")
    if not held.rows.num_rows or not held.early.num_rows:
        return gate.refused(f"no matured rows are held out by {day}: nothing to judge version {version.number} on")
    champion, note = opponent(workflow, lake, registry, against, held.split)
    if champion is not None and fit.is_champion(mine.model, champion, held.rows):
        return gate.refused(
            f"version {version.number} and the champion, {champion.name}, are the same model: of a model beside itself "
            "nothing can be told"
        )
    try:
        recorded: dict[str, Any] | None = registry.recipe(version)
    except ModelUnreadable:
        recorded = None  # registered by hand: there is only what its files say
    try:
        verdict = _both_ways(workflow, held, mine, champion, recorded)
    except (KeyError, TypeError, ValueError, LightGBMError) as error:
        return gate.refused(
            f"version {version.number} cannot be judged on the held-out rows: {type(error).__name__}: {error}"
        )
    if not mine.clean:
        note += f" Version {version.number} may have learned from the held-out days, which flatters it."
    days: dict[str, Any] = {
        "held_out_days": [str(held.split + timedelta(days=1)), str(held.mature)],
        "version": version.number,
    }
    days["has_seen_them"] = not mine.clean
    if champion is not None and against is not None:
        days |= live(workflow, lake, against, day)
    return verdict.told(*([note.strip()] if note.strip() else []), **days)


def _both_ways(
    workflow: Workflow,
    held: Held,
    mine: fit.Champion,
    champion: fit.Champion | None,
    recorded: Mapping[str, Any] | None,
) -> gate.Verdict:
    """The verdict on a version's files, and on its twin where it, or the champion, has learned from the held-out days."""
    training, kind = workflow.training, workflow.model.kind
    learner = catalog.learner(kind)
    how: dict[str, Any] = {"seed": scoring.SEED, "device": "cpu", "threads": THREADS}
    rule = catalog.rule(kind).fit(held.early, scoring.learner_spec(workflow), **how)

    def examined(model: Any, other: Any, **more: Any) -> gate.Verdict:
        verdict, _ = evaluate.examine(
            model, rule, other, held.rows, metric=training.metric, better=training.better, margin=training.margin,
            terms=terms(workflow), decided=held.decided, **more,
        )  # fmt: skip
        return verdict

    if champion is None:
        return examined(mine.model, None, recorded=recorded)
    if mine.clean and champion.clean:
        other, note = fit.opponent(mine.model, champion, None, "", held.rows)
        return examined(mine.model, other, recorded=recorded).told(note.strip())
    twin, why = fit.champions_twin(mine, learner, how)
    its_twin, its_why = fit.champions_twin(champion, learner, how)
    # who has seen these days is laid beside who has seen them too; who has not, beside a twin that has not
    as_it_is = replace(champion, clean=champion.clean or not mine.clean)
    other, note = fit.opponent(mine.model, as_it_is, its_twin, its_why, held.rows)
    by_files = examined(mine.model, other, recorded=recorded).told(note.strip())
    if twin is None:
        return by_files.told(f"no twins were judged: {mine.name} has none, {why}")
    other, note = fit.opponent(twin, champion, its_twin, its_why, held.rows)
    if any(one is not None and paired.same(twin, one, held.rows) for one in (its_twin, other)):
        return by_files.told("no twins were judged: by recipe and day they are one model, and only the files differ")
    apart = fit.disagreement(kind, mine.model, twin, champion, its_twin, its_why, held.newest)
    alike = None
    if other is not None and mine.recipe is not None and mine.aged is not None:
        alike = fit.same_rows(
            twin, mine.recipe, champion, learner, mine.aged, held.rows, training.metric, how
        )  # fmt: skip
    by_twins = examined(twin, other, apart=apart, same_rows=alike).told(note.strip())
    passed = by_files.passed and by_twins.passed
    return gate.Verdict(
        passed,
        (*by_files.reasons, *(f"twins: {reason}" for reason in by_twins.reasons)),
        {**by_files.figures, "twins": by_twins.figures, "disagreement": by_twins.figures.get("disagreement")},
        held=not passed and all(one.passed or one.held for one in (by_files, by_twins)),
    )
