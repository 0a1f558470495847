"""The stage ``outcomes``: what became of an entity, in the partition of the day for whose cut-off it became known.

The label for training now, the judge of decisions later. Belongs here: the asset. Does not: the SQL (the workflow's folder).
"""

import dagster as dg
import pyarrow as pa

from assets.common import days, stage
from assets.resources import LakeResource, preview
from common.progress import each
from pipeline import point_in_time
from pipeline.workflow import Workflow


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, outcomes]."""

    @stage(
        workflow,
        "outcomes",
        deps=["events"],
        description="What became known of entities for a day's cut-off and not before, with the time at which it became known.",
        kinds={"deltalake", "duckdb"},
    )
    def outcomes(context: dg.AssetExecutionContext, lake: LakeResource) -> dg.MaterializeResult:
        version = lake.lake.version(workflow.table("events"))
        tables = []
        span = days(context)
        for day, table in each(
            "outcomes", point_in_time.outcomes(workflow, lake.lake, span, version=version), len(span)
        ):
            tables.append(table)
            context.add_asset_metadata({"dagster/partition_row_count": table.num_rows}, partition_key=day.isoformat())
        whole = pa.concat_tables(tables, promote_options="default")
        written = lake.lake.replace_days(workflow.table("outcomes"), whole, span)
        return dg.MaterializeResult(
            metadata={
                "outcomes": whole.num_rows,
                "first rows": preview(whole.slice(0, 5)),
                "table version": written,
                "events version": version,
            }
        )

    return outcomes
