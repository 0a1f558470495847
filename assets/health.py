"""The stage ``health``: how the loop itself is doing, as one table and one picture.

Belongs here: the asset and its page. Does not: the figures (``pipeline.monitoring.loop_health``), or acting on them.
"""

import base64
from datetime import date, timedelta

import dagster as dg
import pyarrow as pa

from assets.common import days, stage
from assets.resources import ClockResource, LakeResource, LedgerResource, ReportsResource, preview
from common.page import Picture, Table, Text, page
from pipeline.decisions import in_effect
from pipeline.monitoring import loop_health as loop
from pipeline.monitoring import verdicts
from pipeline.workflow import Workflow


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, health], of a workflow that delivers."""

    @stage(
        workflow,
        "health",
        # the day's verdict, too, where one is given
        deps=["decisions", "decision_outcomes", *(["regression"] if verdicts.guarded(workflow) else [])],
        description=f"What the loop promoted, retrained and took back in {loop.WINDOW_DAYS} days, how fast, how often "
        "people stepped in, deadlines and bad days; from the ledger.",
        kinds={"deltalake"},
    )
    def health(
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        ledger: LedgerResource,
        clock: ClockResource,
        reports: ReportsResource,
    ) -> dg.MaterializeResult:
        span = days(context)
        book = ledger.open(clock.now)
        try:
            found = {
                # a day that is made again sees what the ledger knew by the end of the day on which it took effect
                day: loop.examine(book, workflow, until=min(clock.now(), in_effect.over(day)))
                for day in span
            }
        finally:
            book.close()
        rows = pa.Table.from_pylist([one.row(day) for day, one in found.items()], schema=loop.TABLE)
        lake.lake.replace_days(workflow.table("health"), rows, span)
        for day, one in found.items():
            numbers = {name: value for name, value in one.figures.items() if value is not None}
            context.add_asset_metadata(numbers, partition_key=day.isoformat())
        last = span[-1]
        picture = loop.plot(found[last])
        recent = lake.lake.read(
            workflow.table("health"), days=[last - timedelta(days=n) for n in range(loop.WINDOW_DAYS)]
        ).sort_by("day")
        _, url = reports.write(workflow.name, last, "health.html", _page(workflow, last, found[last], recent, picture))
        return dg.MaterializeResult(
            metadata={
                "says": dg.MetadataValue.md("\n".join(f"- {line.strip()}" for line in loop.lines(found[last]))),
                "plot": dg.MetadataValue.md(
                    f"![how the loop is doing](data:image/png;base64,{base64.b64encode(picture).decode()})"
                ),
                "page": dg.MetadataValue.url(url),
                "newest days": preview(recent.slice(max(recent.num_rows - 8, 0))),
                "document": dg.MetadataValue.json(found[last].as_dict()),
            }
        )

    return health


def _page(workflow: Workflow, day: date, found: loop.Health, recent: pa.Table, picture: bytes) -> str:
    return page(
        f"{workflow.name}: how the loop is doing, {day}",
        Text([line.strip() for line in loop.lines(found)], bullets=True),
        Picture("How the loop is doing", picture),
        Table(
            [name.replace("_", " ") for name in recent.schema.names],
            [("", list(row.values())) for row in recent.to_pylist()],
            title="The newest days",
            digits=3,
        ),
    )
