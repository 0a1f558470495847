"""The stage ``decisions``: the action chosen for each entity, with its reasons, and the guardrails over the batch.

Belongs here: the asset. Does not: the policies (``models``), the guardrails (``data_checks.guardrails``) or the batch's
record (``pipeline.decisions.decide``, ``pipeline.dispatch``), which days are facts (``pipeline.decisions.recomputation``), what the challenger would have
decided (``pipeline.lifecycle.shadow``). Sending a batch is the next stage's.
"""

from dataclasses import replace
from datetime import date, datetime
from typing import Any

import dagster as dg

from assets.common import DayConfig, days, folded, stage
from assets.resources import ClockResource, LakeResource, LedgerResource, RegistryResource, ReportsResource, preview
from common.progress import each
from data_checks import guardrails
from delivery.ledger import Ledger
from pipeline import dispatch
from pipeline.decisions import decide, recomputation, tables
from pipeline.lake import Lake
from pipeline.lifecycle import shadow as shadowing
from pipeline.workflow import Workflow


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, decisions]."""

    @stage(
        workflow,
        "decisions",
        deps=["scores", "features"],
        description="before → after for each entity, with arm, probability and reasons; the batch says by which step it was made. "
        "A day that was sent, or whose effect is over, is recomputed and compared.",
        kinds={"deltalake"},
        checks={
            "guardrails": (True, "Rows, shares, changes and totals are within bounds; each arm's money is conserved"),
            "same_again": (False, "A recorded day that is recomputed gives the same decisions, or it is known why not"),
        },
    )
    def decisions(
        context: dg.AssetExecutionContext,
        config: DayConfig,
        lake: LakeResource,
        registry: RegistryResource,
        ledger: LedgerResource,
        reports: ReportsResource,
        clock: ClockResource,
    ) -> dg.MaterializeResult:
        judged: dict[date, tuple[bool, str]] = {}
        compared: dict[date, recomputation.Compared] = {}
        last: decide.Batch | None = None
        refused, shadow, said = False, dict[str, Any](), dict[str, str]()
        with ledger.open(clock.now) as book:
            span = days(context)
            for day in each("decisions", span, len(span)):
                if completed := decide.complete_lake(workflow, lake.lake, book, day):
                    context.log.warning(f"{day}: a run had ended before the lake had batch {completed}: completed")
                found = recomputation.today(workflow, book, day, clock.now(), again=config.again)
                if found.says:
                    said[str(day)] = found.says
                    context.log.info(f"{day}: {found.says}")
                if not found.decides:
                    assert found.recorded is not None, "a day that is not decided has been"
                    compared[day] = recomputation.compare(workflow, lake.lake, registry.registry, book, found.recorded)
                    judged[day] = (True, f"{found.recorded.status} as recorded; {found.says}")
                    context.add_asset_metadata(
                        {"batch": found.recorded.batch_id, "same again": compared[day].says},
                        partition_key=day.isoformat(),
                    )
                    continue
                last = _decide(workflow, lake.lake, book, found, clock.now(), context.run_id)
                findings = "; ".join(guardrails.sentence(f) for f in last.findings)
                judged[day] = (last.status == "READY", findings or f"{last.status}, nothing to object to")
                refused = refused or last.status == "REFUSED"
                context.add_asset_metadata(
                    {
                        "dagster/partition_row_count": last.decisions.num_rows,
                        "batch": last.batch_id,
                        "status": last.status,
                        "step": last.step,
                        **({"backfill": True} if found.state == "backfill" else {}),
                    },
                    partition_key=day.isoformat(),
                )

                def write(page: str, day: date = day) -> str:
                    return reports.write(workflow.name, day, "shadow.html", page)[1]

                beside = shadowing.report(workflow, lake.lake, day, write)
                if beside is not None:
                    row, measured = beside
                    shadow = {"challenger": f"version {row['version']} ({row['stage']}): {row['text']}"}
                    if measured is not None:
                        by_arm = dg.MetadataValue.json({arm: dict(n) for arm, n in measured.by_arm.items()})
                        shadow |= {
                            "challenger by arm": by_arm,
                            "challenger's report": dg.MetadataValue.url(row["page"]),
                        }
                        share = {"decided differently": measured.share}
                        context.add_asset_metadata(share, partition_key=day.isoformat())
        return dg.MaterializeResult(
            metadata={**_shown(last), **shadow, **_shown_again(said, compared)},
            check_results=[
                # a held batch is no fault: the delivery waits for a person; a refused one is, and stops the run
                folded("guardrails", judged, warn=not refused),
                _same_again(list(judged), compared),
            ],
        )

    return decisions


def _decide(
    workflow: Workflow, lake: Lake, book: Ledger, found: recomputation.Today, now: datetime, run_id: str
) -> decide.Batch:
    """Decide a day and record it: in the ledger first, and in the lake under the id that the ledger gave it."""
    batch = decide.decide_day(workflow, lake, found.day, ledger=book)
    if found.state == "backfill":
        batch = replace(batch, record={**batch.record, "backfill": True})
    row = dispatch.record(workflow, book, found.day, batch, decided_at=now, run_id=run_id, unless_sent=not found.asked)
    batch = replace(batch, batch_id=row.batch_id)
    decide.write_batch(workflow, lake, found.day, batch, decided_at=now, run_id=run_id)
    return batch


def _shown(batch: decide.Batch | None) -> dict[str, Any]:
    """What a person would look at of the newest day that was decided."""
    if batch is None:
        return {}
    return {
        "batch": batch.batch_id,
        "step": batch.step,
        "status": batch.status,
        "decisions": batch.decisions.num_rows,
        "changed": batch.changed,
        "for review": batch.review,
        "entities by arm": dg.MetadataValue.json(tables.by_arm(batch.decisions)),
        "totals": dg.MetadataValue.json(tables.totals(batch.decisions)),
        "largest changes": preview(tables.largest_changes(batch.decisions)),
        "certificate": dg.MetadataValue.json(batch.certificates),
    }


def _shown_again(said: dict[str, str], compared: dict[date, recomputation.Compared]) -> dict[str, Any]:
    """What was special about the days, and what recomputing those that are facts came to."""
    metadata: dict[str, Any] = {"days": dg.MetadataValue.json(said)} if said else {}
    if compared:
        metadata["recomputed"] = dg.MetadataValue.json({str(d): one.as_dict() for d, one in compared.items()})
        differ = [one.first for one in compared.values() if one.differing]
        if differ:
            metadata["decisions that differ"] = preview(differ[-1], recomputation.SHOWN)
    return metadata


def _same_again(every: list[date], compared: dict[date, recomputation.Compared]) -> dg.AssetCheckResult:
    """Differences with a cause are worth a look; one without is an error."""
    by_day = {d: (one.equal, one.says) for d, one in compared.items()}
    by_day = by_day or {d: (True, "decided by this run: nothing to compare with") for d in every}
    figures = {"compared": len(compared), "differ": sum(one.differing for one in compared.values())}
    unexplained = sum(one.unexplained for one in compared.values())
    return folded("same_again", by_day, metadata={**figures, "without a cause": unexplained}, warn=not unexplained)
