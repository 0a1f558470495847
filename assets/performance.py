"""The stage ``performance``: how well the scores do, estimated while outcomes are missing and realised as they become known.

Belongs here: the asset. Does not: the figures (``data_checks.performance``), which scores meet which outcomes
(``pipeline.monitoring.labels``), or what a fall starts (``pipeline.lifecycle.retraining`` and ``pipeline.lifecycle.rule_override``,
which read what is stored here).
"""

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from assets.common import days, folded, key, stage, unjudged
from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource, ReportsResource
from common.progress import each
from data_checks import performance as figures
from delivery.ledger import Event
from pipeline.decisions import in_effect
from pipeline.lake import Lake
from pipeline.lifecycle import rule_override, state
from pipeline.monitoring import labels
from pipeline.workflow import Workflow

SHOWN_DAYS = 60
"""How far back the picture goes."""


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, performance]."""
    spec = workflow.retraining
    metric = labels.metric_of(workflow)
    table = workflow.table("performance")

    @stage(
        workflow,
        "performance",
        deps=["scores", "outcomes"],
        description=(
            f"{metric} and its like by the day scored: estimated while outcomes are missing, realised as they mature, "
            f"the last {spec.window_days} days beside their baseline and the newest version beside the rule. {figures.ASSUMES[labels.kind_of(workflow)]}"
        ),
        kinds={"deltalake"},
        checks={
            "performance": (
                False,
                f"{metric} is not worse than its baseline by more than its limit, nor than the rule's; it warns as long as the rule decides for that",
            ),
            "judged": (False, f"{metric} could be judged within the last {spec.unjudged_days} days"),
        },
    )
    def performance(
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        ledger: LedgerResource,
        registry: RegistryResource,
        clock: ClockResource,
        reports: ReportsResource,
    ) -> dg.MaterializeResult:
        span = days(context)
        judged: dict[date, pa.Table] = {}
        left: dict[date, Event | None] = {}
        links: dict[str, Any] = {}
        with ledger.open(clock.now) as book:
            others = in_effect.scored_by_others(book, workflow, lake.lake)
            for day in each("performance", span, len(span)):
                labels.score_by_rule(workflow, lake.lake, day, others)
                judged[day] = labels.judge(workflow, lake.lake, registry.registry, day, others)
                left[day] = state.behind(book, workflow.name, workflow.cutoff_of(day))
                row = rule_override.worse(metric, judged[day])
                # a day whose effect is over says nothing of now, and only the champion can be put back
                now = clock.now() < in_effect.over(day)
                if row is None or not now or row["version"] != state.live(book, workflow)["champion"]:
                    continue
                if noted := rule_override.note(book, workflow.name, day, row):
                    context.log.warning(f"{day}: from now on the rule decides: {noted}")
                    links["the rule decides"] = noted
        lake.lake.replace_days(table, pa.concat_tables(judged.values()), span)
        for day, found in judged.items():
            context.add_asset_metadata(_numbers(found, day), partition_key=day.isoformat())
            _observe(context, workflow, found)
        last = span[-1]
        if judged[last].num_rows:
            since = pc.field("day") >= pc.scalar(last - timedelta(days=SHOWN_DAYS))
            history = lake.lake.read(table, where=since & (pc.field("day") <= pc.scalar(last)))
            text = figures.report(workflow.name, judged[last], history, labels.kind_of(workflow))
            _, page = reports.write(workflow.name, last, "performance.html", text)
            links["report"] = dg.MetadataValue.url(page)
            if why := labels.no_gate_baseline(workflow):
                links["baseline"] = f"the days before, not what the gate measured: {why}"
        spoken = {day: verdict(workflow, found, left[day]) for day, found in judged.items()}
        waits = _unjudged(workflow, lake.lake, span)
        return dg.MaterializeResult(
            metadata={"figures": sum(f.num_rows for f in judged.values()), **links},
            check_results=[folded("performance", spoken, warn=True), folded("judged", waits, warn=True)],
        )

    return performance


def verdict(workflow: Workflow, found: pa.Table, left: Event | None = None) -> tuple[bool, str]:
    """Whether the workflow's metric holds on a day, and that in words; no data is no fall.

    ``left``: the event by which the champion has left its days to the rule (``pipeline.lifecycle.rule_override``), as of the day. As long as
    that stands the metric does not hold: what it said of the champion's scores is not unsaid by days that the rule scored.
    """
    metric = labels.metric_of(workflow)
    spec = workflow.retraining
    limits = {"realised": spec.realised_limit, "estimated": spec.estimated_limit, figures.RULE: 0.0}
    told = [r for r in figures.windows(found).to_pylist() if r["metric"] == metric]
    if left is not None:
        shown = "; ".join(r["text"] for r in told if r["kind"] != figures.RULE)
        return False, f"{rule_override.sentence(left)}{f'; meanwhile {shown}' if shown else ''}"
    if not told:
        return True, f"{metric} is not judged: too few days or rows of the version that scores"
    fell = [r for r in told if r["worse_low"] is not None and r["worse_low"] > limits[r["kind"]]]
    return not fell, "; ".join(r["text"] for r in fell or told)


def _unjudged(workflow: Workflow, lake: Lake, span: Sequence[date]) -> dict[date, tuple[bool, str]]:
    """Whether the metric was judged lately, for each day."""
    spec, training = workflow.retraining, workflow.training
    metric, back = labels.metric_of(workflow), timedelta(days=spec.unjudged_days)
    near = (pc.field("day") > pc.scalar(span[0] - back)) & (pc.field("day") <= pc.scalar(span[-1]))
    told = lake.read(workflow.table("performance"), where=near & (pc.field("metric") == metric))
    judged = set(figures.windows(told)["day"].to_pylist())
    since = workflow.start + timedelta(days=training.maturity_days + spec.window_days)
    why = f"fewer than {spec.min_rows} outcomes or {spec.min_days} days of the version that scores"
    return {day: unjudged(day, judged, since, spec.unjudged_days, why) for day in span}


def _numbers(found: pa.Table, day: date) -> dict[str, float]:
    """Numbers for Dagster to plot by partition: the windows judged on a day, and the estimate of the day itself."""
    numbers = {}
    for row in found.to_pylist():
        window = row["first"] != row["last"]
        if window or (row["last"] == day and row["kind"] == "estimated"):
            span = "" if window else " of the day"
            numbers[f"{row['kind']} {row['metric']}{span}"] = row["value"]
        if window and row["baseline"] is not None and row["kind"] == "realised":
            numbers[f"baseline {row['metric']}"] = row["baseline"]
    return numbers


def _observe(context: dg.AssetExecutionContext, workflow: Workflow, found: pa.Table) -> None:
    """A day scored earlier whose outcomes have now matured shows its realised figures in its own partition."""
    rows = [r for r in found.to_pylist() if r["kind"] == "realised" and r["first"] == r["last"] and r["mature"]]
    if rows:
        newest = max(r["last"] for r in rows)
        numbers = {f"realised {r['metric']} of the day": r["value"] for r in rows if r["last"] == newest}
        context.log_event(
            dg.AssetObservation(key(workflow, "performance"), partition=newest.isoformat(), metadata=numbers)
        )
