"""The stage ``features``: an entity as of a date, from what was known at the day's cut-off.

Belongs here: the asset. Does not: the filter by ``known_at`` (``pipeline.point_in_time``) or the SQL (the workflow's folder).
"""

from datetime import date

import dagster as dg
import pyarrow as pa

from assets.common import days, folded, stage
from assets.resources import LakeResource, ReportsResource, preview
from common.progress import each
from pipeline import point_in_time
from pipeline.lake import content_digest
from pipeline.workflow import Workflow


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, features]."""

    @stage(
        workflow,
        "features",
        deps=["events"],
        description=f"Entities as of the cut-off ({workflow.cutoff:%H:%M} UTC of the next day): only rows known by then count.",
        kinds={"deltalake", "duckdb"},
        checks={"contract": (True, "Great Expectations on the features of each day")},
    )
    def features(
        context: dg.AssetExecutionContext, lake: LakeResource, reports: ReportsResource
    ) -> dg.MaterializeResult:
        from data_checks import contract

        version = lake.lake.version(workflow.table("events"))
        tables: list[pa.Table] = []
        checked: dict[date, tuple[bool, str]] = {}
        page = ""
        span = days(context)
        for day, table in each(
            "features", point_in_time.features(workflow, lake.lake, span, version=version), len(span)
        ):
            result = contract.validate(
                table, list(workflow.contract.features.expectations), name=f"{workflow.name} features {day}"
            )
            _, url = reports.write(workflow.name, day, "features-contract.html", result.html)
            if not page or result.blocking_failed:
                page = url
            broken = [r for r in result.results if not r["success"]]
            good = not result.blocking_failed and table.num_rows > 0
            text = "; ".join(contract.sentence(r) for r in broken) or f"{len(result.results)} expectations met"
            checked[day] = (good, text if table.num_rows else "no entities: events of the lookback are missing")
            # A day that breaks its contract is withheld: neither the deadline's run nor a training may take it up.
            tables.append(table if good else table.slice(0, 0))
            context.add_asset_metadata(
                {
                    "dagster/partition_row_count": table.num_rows,
                    "digest": content_digest(table),
                    "events version": version,
                },
                partition_key=day.isoformat(),
            )
        whole = pa.concat_tables(tables, promote_options="default")
        written = lake.lake.replace_days(workflow.table("features"), whole, span)
        return dg.MaterializeResult(
            metadata={"entities": whole.num_rows, "first rows": preview(whole.slice(0, 5)), "table version": written},
            check_results=[folded("contract", checked, metadata={"page": dg.MetadataValue.url(page)})],
        )

    return features
