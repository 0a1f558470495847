"""The stages ``delivery`` and ``decision_outcomes``: the batch sent downstream and proved by reading it back; and what became of its decisions.

Belongs here: the two assets. Does not: sending (``delivery.push``), which batch counts (``pipeline.dispatch``), or giving
an approval (the ``signalbox`` command): a run only consumes one that stands in the ledger.
"""

import json
import time
from typing import Any

import dagster as dg
import pyarrow as pa

from assets.common import days, folded, stage
from assets.resources import ClockResource, LakeResource, LedgerResource, preview
from delivery.push import Progress
from pipeline import dispatch
from pipeline.workflow import Workflow


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, delivery], of a workflow that has a section ``delivery``."""
    spec = workflow.delivery
    assert spec is not None, "asked for workflows that deliver"

    @stage(
        workflow,
        "delivery",
        deps=["decisions"],
        description=f"The day's batch in {spec.connector.kind}, each change verified by reading it back.",
        kinds={spec.connector.kind},
        checks={
            "reconciled": (True, "Every change that was to be sent has ended, some stand, and none is unknown"),
            "guards": (True, "Rejections and overrides stay under the limits over which a batch is taken back"),
        },
        pool=f"downstream_{workflow.name}",
    )
    def delivery(
        context: dg.AssetExecutionContext, ledger: LedgerResource, clock: ClockResource
    ) -> dg.MaterializeResult:
        *earlier, day = days(context)
        book = ledger.open(clock.now)
        connector = dispatch.connect(workflow, clock.now)
        last_told = [0.0]

        def tell(progress: Progress) -> None:
            if progress.done == progress.total or time.monotonic() - last_told[0] > 5:
                last_told[0] = time.monotonic()
                context.log.info(f"{progress.done} of {progress.total} delivered: {progress.counts}")

        try:
            batch = dispatch.batch_of(book, workflow.name, day)
            done = dispatch.deliver(
                workflow,
                book,
                connector,
                batch,
                run_id=context.run_id,
                clock=clock.now,
                sleep=time.sleep,
                progress=tell,
            )
            metadata = _shown(book, done, earlier)
        finally:
            connector.close()
            book.close()
        return dg.MaterializeResult(metadata=metadata, check_results=_checks(workflow, day, done))

    return delivery


def _checks(workflow: Workflow, day: Any, done: dispatch.Delivered) -> list[dg.AssetCheckResult]:
    report = done.report
    if report is None:
        waits = done.batch.status == "HELD"
        return [
            folded("reconciled", {day: (done.batch.backfill, done.said)}, warn=waits),
            folded("guards", {day: (True, "nothing was sent")}),
        ]
    assert workflow.delivery is not None, "asked for workflows that deliver"
    text = f"{report.counts}" if report.complete else f"not at its end, run it again: {report.counts}; {report.why}"
    # an older batch that a newer one has ended was not to be sent
    judged = report.complete and done.batch.superseded_by is None
    failure = report.failure(workflow.delivery.guards.max_rejected_share) if judged else ""
    if failure and report.why:
        failure = f"{failure}; {report.why}"
    over = "; ".join(f.text for f in done.findings)
    return [
        folded("reconciled", {day: (report.complete and not failure, failure or text)}),
        folded("guards", {day: (not done.findings, over or "within the limits")}),
    ]


def _shown(book: Any, done: dispatch.Delivered, earlier: list[Any]) -> dict[str, Any]:
    """What a person would look at."""
    batch, report = done.batch, done.report
    metadata: dict[str, Any] = {"batch": batch.batch_id, "status": batch.status, "changed": batch.changed}
    if done.said:
        metadata["waits"] = done.said
    if earlier:
        metadata["not sent"] = f"{len(earlier)} earlier days of this run: only the newest takes effect"
    if report is not None:
        rows = [d for d in book.deliveries(batch.batch_id) if d.state not in ("ACKED", "SKIPPED")]
        metadata |= {
            "states": dg.MetadataValue.json(dict(report.counts)),
            "guarantee": report.guarantee,
            "report": dg.MetadataValue.json(json.loads(json.dumps(report.as_dict(), default=str))),
        }
        if rows:
            metadata["not as intended"] = preview(
                pa.table(
                    {
                        name: [str(getattr(d, name)) for d in rows]
                        for name in ("entity", "state", "before", "after", "stands", "says")
                    }
                )
            )
    return metadata


def build_outcomes(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, decision_outcomes]."""

    @stage(
        workflow,
        "decision_outcomes",
        deps=["outcomes", "delivery"],
        description="What became known of decisions by a day's cut-off, each beside the arm and the value that stood.",
        kinds={"deltalake", "duckdb"},
        checks={"spend": (False, "No arm spends over its pool by more than the guard allows")},
    )
    def decision_outcomes(
        context: dg.AssetExecutionContext, lake: LakeResource, ledger: LedgerResource, clock: ClockResource
    ) -> dg.MaterializeResult:
        book = ledger.open(clock.now)
        try:
            tables = {d: dispatch.outcomes_of_decisions(workflow, lake.lake, book, d) for d in days(context)}
            spoken = {}
            for table in tables.values():
                for batch_id, findings in dispatch.spend_findings(workflow, book, table).items():
                    dispatch.note_findings(book, book.batch(batch_id), findings)
                    spoken[batch_id] = "; ".join(f.text for f in findings)
        finally:
            book.close()
        dated = [t.append_column("day", pa.array([d] * t.num_rows, pa.date32())) for d, t in tables.items()]
        whole = pa.concat_tables(dated, promote_options="default")
        name = workflow.table("decision_outcomes")
        if whole.num_rows or lake.lake.exists(name):
            lake.lake.replace_days(name, whole, list(tables))
        by_arm = whole.group_by("arm").aggregate([([], "count_all")]).to_pylist() if whole.num_rows else []
        return dg.MaterializeResult(
            metadata={
                "decisions with an outcome": whole.num_rows,
                "by arm": dg.MetadataValue.json({r["arm"]: r["count_all"] for r in by_arm}),
                "first rows": preview(whole.slice(0, 5)),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="spend",
                    passed=not spoken,
                    severity=dg.AssetCheckSeverity.ERROR,
                    description="; ".join(f"{b}: {t}" for b, t in spoken.items())
                    or "no arm spent over its pool's limit",
                )
            ],
        )

    return decision_outcomes
