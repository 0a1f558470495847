"""The stage ``scores``: what a model, or the rule, says of each entity of a day.

Belongs here: the asset. Does not: the steps of a bad day (``pipeline.decisions.scoring``), who is champion and challenger
(``pipeline.lifecycle.state``) or the learners (``models.learners``).
"""

from datetime import date, datetime
from typing import Any

import dagster as dg

from assets.common import DayConfig, days, folded, stage
from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource, preview
from common import errors
from common.progress import each
from delivery.ledger import Busy, Ledger
from models.registry import Registry
from pipeline.decisions import decide, recomputation, scoring
from pipeline.lake import Lake
from pipeline.lifecycle import promotion
from pipeline.workflow import Workflow


def moved_on(
    workflow: Workflow, registry: Registry, ledger: Ledger, lake: Lake, day: date, now: datetime
) -> tuple[str, str]:
    """Move the challenger on before the day is scored, if it is due; what came of it and why. Never in the day's way."""
    if now > workflow.deadline_of(day):
        return "waits", "the deadline has passed, or the day is a backfill"
    later: tuple[type[Exception], ...] = (*errors.unreachable(), Busy)
    try:
        why = promotion.due(workflow, ledger, lake, day)[1]
        return promotion.advance(workflow, registry, ledger, lake, day, now), why
    except later as error:
        return "waits", f"{type(error).__name__}: {errors.first_line(error)}"


def _unread(scored: scoring.Scored) -> dict[str, Any]:
    """Columns that are missing where they never were in training: in how many rows, and whose."""
    return {column: {"rows": len(names), "such as": list(names[:5])} for column, names in scored.unread.items()}


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, scores]."""

    @stage(
        workflow,
        "scores",
        deps=["features"],
        description="Scores by the champion (the ledger says who that is); on a bad day by the previous champion or the rule, or "
        "none. The step is recorded. A challenger scores beside it. A day that has acted, or whose effect is over, keeps its scores.",
        kinds={"lightgbm", "deltalake"},
        checks={"step": (False, "The champion scored the day")},
    )
    def scores(
        context: dg.AssetExecutionContext,
        config: DayConfig,
        lake: LakeResource,
        registry: RegistryResource,
        ledger: LedgerResource,
        clock: ClockResource,
    ) -> dg.MaterializeResult:
        steps: dict[date, tuple[bool, str]] = {}
        last: scoring.Scored | None = None
        left: dict[str, str] = {}
        moves: dict[str, str] = {}
        span = days(context)
        for day in each("scores", span, len(span)):
            with ledger.open(clock.now) as book:
                decide.complete_lake(workflow, lake.lake, book, day)
                found = recomputation.today(workflow, book, day, clock.now(), again=config.again)
                if found.says:
                    context.log.info(f"{day}: {found.says}")
                if not found.decides:
                    assert found.recorded is not None, "a day that is not decided has been"
                    left[str(day)] = found.says
                    steps[day] = (True, f"{found.recorded.step} then; {found.says}")
                    continue
                move, why = "none", ""
                if not found.asked:
                    move, why = moved_on(workflow, registry.registry, book, lake.lake, day, clock.now())
                scored = scoring.score_day(
                    workflow, lake.lake, registry.registry, day, now=clock.now(), ledger=book,
                    late=False if found.asked else None,
                )  # fmt: skip
            scoring.write_scores(workflow, lake.lake, day, scored)
            if move != "none":
                moves[str(day)] = f"{move}: {why}"
                context.log.info(f"challenger, {day}: {move}: {why}")
            for column, names in scored.unread.items():
                shown = f"{', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
                context.log.warning(f"{day}: {column} is missing in {len(names)} rows, which get no score: {shown}")
            beside = scored.beside
            if beside is not None and beside.reason:
                context.log.warning(f"challenger version {beside.version.number} did not score {day}: {beside.reason}")
            steps[day] = (scored.step == "champion", f"{scored.step}: {'; '.join(scored.reasons) or 'as it should be'}")
            context.add_asset_metadata(
                {"dagster/partition_row_count": scored.table.num_rows, "step": scored.step},
                partition_key=day.isoformat(),
            )
            last = scored
        metadata: dict[str, Any] = {}
        if last is not None:
            metadata = {
                "step": last.step,
                "why": "; ".join(last.reasons) or "the champion scored",
                "first rows": preview(last.table.slice(0, 5)),
                **({"challenger": dg.MetadataValue.json(moves)} if moves else {}),
                **({"moved in MLflow": last.moved} if last.moved else {}),
                **({"rows without a score": dg.MetadataValue.json(_unread(last))} if last.unread else {}),
            }
            if last.model:
                url = registry.version_url(last.model.name, last.model.number)
                metadata["model"] = dg.MetadataValue.url(url)
        if left:
            metadata["left as it was"] = dg.MetadataValue.json(left)
        return dg.MaterializeResult(metadata=metadata, check_results=[folded("step", steps, warn=True)])

    return scores
