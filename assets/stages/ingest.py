"""The stage ``events``: landing zone → events and quarantine, with the contract's checks.

Belongs here: the asset and what a person sees of it. Does not: reading files (``assets.landing``) or judging them
(``data_checks.contract``).
"""

from datetime import date, timedelta
from statistics import median

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from assets import landing as landing_zone
from assets.lake import Lake
from assets.resources import ClockResource, LakeResource, LandingResource, ReportsResource, preview
from assets.stages.common import days, folded, stage
from assets.workflow import Workflow


def _volume(lake: Lake, workflow: Workflow, day: date, rows: int) -> tuple[bool, str]:
    """Rows of a day beside the median of the same weekday over the four weeks before (none: nothing to compare)."""
    before = [day - timedelta(weeks=w) for w in range(1, 5)]
    counts = (
        lake.read(workflow.table("events"), days=before, columns=["day"]).group_by("day").aggregate([([], "count_all")])
    )
    if rows == 0:
        return False, "no events at all"
    if counts.num_rows == 0:
        return True, f"{rows} events; no earlier weeks to compare with"
    usual = median(counts["count_all"].to_pylist())
    return 0.3 * usual <= rows <= 3 * usual, f"{rows} events, {usual:g} on the same weekday of the weeks before"


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, events]."""
    promised = workflow.contract.events

    @stage(
        workflow,
        "events",
        deps=[],
        pool=f"{workflow.name}_ingest",  # one writer of a landing zone at a time, also where no file lock can say so
        description="Rows as upstream systems left them, each with its source file and row. Rows that break a rule lie in quarantine.",
        kinds={"deltalake", "duckdb", "greatexpectations"},
        checks={
            "files": (True, "Every file of the days could be read whole; a refused file lands no row"),
            "quarantine": (True, "The share of quarantined rows is within the contract"),
            "contract": (True, "Great Expectations on the accepted rows of each day"),
            "volume": (False, "Rows of each day beside the same weekday of the weeks before"),
        },
    )
    def events(
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        landing: LandingResource,
        reports: ReportsResource,
        clock: ClockResource,
    ) -> dg.MaterializeResult:
        from data_checks import contract

        span = days(context)
        done = landing_zone.ingest(workflow, lake.lake, landing.root, now=clock.now(), days=span)
        refused = [f for f in done.files if f.status == "refused"]
        if not lake.lake.exists(workflow.table("events")):
            raise dg.Failure(
                "No event has ever landed. "
                + (
                    "\n".join(f"{f.path}: {f.reason}" for f in refused)
                    or f"No file in {landing.of(workflow.name)} fits {', '.join(landing_zone.without_secrets(s.files) for s in workflow.sources.values())}."
                )
            )
        landed = lake.lake.read(workflow.table("events"), days=span)
        landed = landed.filter(pc.is_null(landed["superseded_at"]))
        checked: dict[date, tuple[bool, str]] = {}
        volumes: dict[date, tuple[bool, str]] = {}
        page = ""
        examples: list[dict[str, object]] = []
        implied = contract.implied(promised)
        over = ""
        if len(span) > 1:
            # What ingest has enforced row by row is judged once over a range; what a day must look like, for each day.
            whole = contract.validate(landed, implied, name=f"{workflow.name} events {span[0]} to {span[-1]}")
            _, page = reports.write(workflow.name, span[-1], "events-contract-range.html", whole.html)
            implied = []
            if whole.blocking_failed:
                missed = contract.sentences(whole, "no event has landed")
                over = f"over {span[0]} to {span[-1]}: {'; '.join(missed)}"
        for day in span:
            rows = landed.filter(pc.equal(landed["day"], pa.scalar(day)))
            result = contract.validate(rows, [*implied, *promised.expectations], name=f"{workflow.name} events {day}")
            _, url = reports.write(workflow.name, day, "events-contract.html", result.html)
            if not page or result.blocking_failed:
                page = url
            broken = [r for r in result.results if not r["success"]]
            said = [over] * (bool(over) and day == span[0]) + contract.sentences(
                result, "no event of the day has landed"
            )
            checked[day] = (
                not result.blocking_failed and not (over and day == span[0]),
                "; ".join(said) or f"{len(result.results)} expectations met",
            )
            examples += [{"day": str(day), **r} for r in broken][:20]
            volumes[day] = _volume(lake.lake, workflow, day, rows.num_rows)
            context.add_asset_metadata(
                {"dagster/partition_row_count": rows.num_rows, "contract page": dg.MetadataValue.url(url)},
                partition_key=day.isoformat(),
            )
        total = done.accepted + done.quarantined
        share = done.quarantined / total if total else 0.0
        by_rule = "\n".join(f"- `{rule}`: {count}" for rule, count in sorted(done.rules.items())) or "none"
        return dg.MaterializeResult(
            metadata={
                "files": len(done.files),
                "rows accepted": done.accepted,
                "rows quarantined": done.quarantined,
                "quarantined by rule": dg.MetadataValue.md(by_rule),
                "first rows": preview(landed.slice(0, 5)),
                "table version": lake.lake.version(workflow.table("events")),
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name="files",
                    passed=not refused,
                    description="\n".join(f"{f.path}: {f.reason}" for f in refused)
                    or f"{len(done.files)} new files landed whole",
                    metadata={"refused": len(refused)},
                ),
                dg.AssetCheckResult(
                    check_name="quarantine",
                    passed=share <= promised.max_quarantined_share,
                    description=f"{done.quarantined} of {total} rows ({share:.2%}); {promised.max_quarantined_share:.2%} allowed",
                    metadata={"share": share, "by rule": dg.MetadataValue.md(by_rule)},
                ),
                folded(
                    "contract",
                    checked,
                    metadata={
                        "page": dg.MetadataValue.url(page),
                        "failed expectations": dg.MetadataValue.json(examples[:20]),
                    },
                ),
                folded("volume", volumes, warn=True),
            ],
        )

    return events
