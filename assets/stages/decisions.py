"""The stage ``decisions``: the action chosen for each entity, with its reasons, and the guardrails over the batch.

Belongs here: the asset. Does not: the policies (``models``), the guardrails (``data_checks.guardrails``) or the batch's
record (``assets.deciding``, ``assets.delivering``), what the challenger would have decided (``assets.shadowing``). Sending a
batch is the next stage's.
"""

from datetime import date
from typing import Any

import dagster as dg

from assets import deciding, delivering, shadowing
from assets.resources import ClockResource, LakeResource, LedgerResource, ReportsResource, preview
from assets.stages.common import days, folded, stage
from assets.workflow import Workflow
from data_checks import guardrails


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, decisions]."""

    @stage(
        workflow,
        "decisions",
        deps=["scores", "features"],
        description="before → after for each entity, with arm, probability and reasons; the batch says by which step it was made.",
        kinds={"deltalake"},
        checks={
            "guardrails": (True, "Rows, shares, changes and totals are within bounds; each arm's money is conserved")
        },
    )
    def decisions(
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        ledger: LedgerResource,
        reports: ReportsResource,
        clock: ClockResource,
    ) -> dg.MaterializeResult:
        judged, last, refused, book = {}, None, False, ledger.open(clock.now)
        shadow: dict[str, Any] = {}
        for day in days(context):
            batch = deciding.decide_day(workflow, lake.lake, day)
            decided_at = clock.now()
            deciding.write_batch(workflow, lake.lake, day, batch, decided_at=decided_at, run_id=context.run_id)
            delivering.record(workflow, book, day, batch, decided_at=decided_at, run_id=context.run_id)
            text = "; ".join(guardrails.sentence(f) for f in batch.findings) or f"{batch.status}, nothing to object to"
            judged[day] = (batch.status == "READY", text)
            refused = refused or batch.status == "REFUSED"
            context.add_asset_metadata(
                {
                    "dagster/partition_row_count": batch.decisions.num_rows,
                    "batch": batch.batch_id,
                    "status": batch.status,
                    "step": batch.step,
                },
                partition_key=day.isoformat(),
            )
            last = batch

            def write(page: str, day: date = day) -> str:
                return reports.write(workflow.name, day, "shadow.html", page)[1]

            beside = shadowing.report(workflow, lake.lake, day, write)
            if beside is not None:
                row, found = beside
                shadow = {"challenger": f"version {row['version']} ({row['stage']}): {row['text']}"}
                if found is not None:
                    by_arm = dg.MetadataValue.json({arm: dict(n) for arm, n in found.by_arm.items()})
                    shadow |= {"challenger by arm": by_arm, "challenger's report": dg.MetadataValue.url(row["page"])}
                    share = {"decided differently": found.share}
                    context.add_asset_metadata(share, partition_key=day.isoformat())
        book.close()
        assert last is not None, "a run always has a day"
        return dg.MaterializeResult(
            metadata={
                "batch": last.batch_id,
                "step": last.step,
                "status": last.status,
                "decisions": last.decisions.num_rows,
                "changed": last.changed,
                "for review": last.review,
                "entities by arm": dg.MetadataValue.json(deciding.by_arm(last.decisions)),
                "totals": dg.MetadataValue.json(deciding.totals(last.decisions)),
                "largest changes": preview(deciding.largest_changes(last.decisions)),
                "certificate": dg.MetadataValue.json(last.certificates),
                **shadow,
            },
            # a held batch is no fault: the delivery waits for a person; a refused one is, and stops the run
            check_results=[folded("guardrails", judged, warn=not refused)],
        )

    return decisions
