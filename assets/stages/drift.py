"""Stage 8, ``drift``: how far a day's features lie from the days before, as a report for people and figures for a sensor.

Belongs here: choosing the two windows, and the asset. Does not: the distances (``data_checks.drift``) or the decision to
retrain (``orchestration.automation``, which reads what is stored here).
"""

import json
from datetime import date, datetime, timedelta

import dagster as dg
import pyarrow as pa

from assets.resources import LakeResource, ReportsResource
from assets.stages.common import days, folded, stage
from assets.workflow import Workflow


def windows(workflow: Workflow, day: date) -> tuple[list[date], list[date]]:
    """The days judged together at ``day``, and the days that they are compared with."""
    spec = workflow.drift
    window = [day - timedelta(days=n) for n in range(spec.window_days)]
    return window, [window[-1] - timedelta(days=n) for n in range(1, spec.reference_days + 1)]


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, drift]."""
    spec = workflow.drift

    @stage(
        workflow,
        "drift",
        deps=["features"],
        description=f"The features of the last {spec.window_days} days beside those of the {spec.reference_days} days before, by Evidently.",
        kinds={"evidently"},
        checks={"stable": (False, "The share of drifted columns is below the limit")},
    )
    def drift(context: dg.AssetExecutionContext, lake: LakeResource, reports: ReportsResource) -> dg.MaterializeResult:
        from data_checks import drift as evidently

        judged: dict[date, tuple[bool, str]] = {}
        stored, links = [], {}
        span = days(context)
        table = workflow.table("features")
        numeric, categorical = workflow.drift_columns
        columns = ["day", *numeric, *categorical]
        for day in span:
            window, before = windows(workflow, day)
            current = lake.lake.read(table, days=window, columns=columns)
            reference = lake.lake.read(table, days=before, columns=columns)
            if current.num_rows < spec.min_rows or reference.num_rows < spec.min_rows:
                text = f"not judged: {current.num_rows} rows beside {reference.num_rows}, {spec.min_rows} of each are needed"
                judged[day] = (True, text)
                stored.append(
                    {
                        "day": day,
                        "judged": False,
                        "drifted": False,
                        "share": None,
                        "columns": "{}",
                        "page": "",
                        "text": text,
                    }
                )
                continue
            report = evidently.drift(
                current,
                reference,
                numeric=numeric,
                categorical=categorical,
                spec=spec,
            )
            _, page = reports.write(workflow.name, day, "drift.html", report.html)
            project, snapshot = evidently.save(
                reports.evidently_workspace,
                workflow.name,
                report,
                timestamp=datetime.combine(day, datetime.min.time()),
                tags=[f"day:{day}"],
            )
            text = evidently.sentence(report)
            judged[day] = (not report.drifted, text)
            stored.append(
                {"day": day, "judged": True, "drifted": report.drifted, "share": report.share_drifted,
                 "columns": json.dumps(report.columns, sort_keys=True), "page": page, "text": text}
            )  # fmt: skip
            links = {
                "report": dg.MetadataValue.url(page),
                "in Evidently": dg.MetadataValue.url(f"{reports.evidently_ui}/projects/{project}/reports/{snapshot}"),
                "columns": dg.MetadataValue.json(report.columns),
            }
            context.add_asset_metadata(
                {"share drifted": report.share_drifted, "report": dg.MetadataValue.url(page)},
                partition_key=day.isoformat(),
            )
        schema = pa.schema(
            {"day": pa.date32(), "judged": pa.bool_(), "drifted": pa.bool_(), "share": pa.float64(),
             "columns": pa.string(), "page": pa.string(), "text": pa.string()}
        )  # fmt: skip
        lake.lake.replace_days(workflow.table("drift"), pa.Table.from_pylist(stored, schema=schema), span)
        return dg.MaterializeResult(
            metadata={"days judged": sum(s["judged"] is True for s in stored), **links},
            check_results=[folded("stable", judged, warn=True)],
        )

    return drift
