"""The stage ``events``: landing zone → events and quarantine, with the contract's checks.

Belongs here: the asset and what a person sees of it. Does not: reading files (``pipeline.ingest``) or judging them
(``data_checks.contract``).
"""

from dataclasses import asdict
from datetime import date, timedelta
from statistics import median

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc

from assets.common import days, folded, stage
from assets.resources import ClockResource, LakeResource, LandingResource, ReportsResource, preview
from common.progress import each
from pipeline import ingest as landing_zone
from pipeline.lake import Lake
from pipeline.workflow import EventsContract, Workflow


def _rows(live: pa.Table, contract: EventsContract) -> dict[date, int]:
    """Live rows of each day; where ``known_at`` tells a restated row from the first one, the two count once."""
    names = [c for c in contract.unique if c != "known_at"] if "known_at" in contract.unique else []
    once = live.group_by(["day", *names]).aggregate([]) if names else live
    counts = once.group_by("day").aggregate([([], "count_all")])
    return dict(zip(counts["day"].to_pylist(), counts["count_all"].to_pylist(), strict=True))


def _usual(lake: Lake, workflow: Workflow, day: date) -> float | None:
    """The median of live rows on the same weekday of the four weeks before; None where none of them has any."""
    before, contract = [day - timedelta(weeks=w) for w in range(1, 5)], workflow.contract.events
    columns = list(dict.fromkeys(["day", *contract.unique]))
    live = lake.read(workflow.table("events"), days=before, columns=columns, where=pc.field("superseded_at").is_null())
    return float(median(found)) if (found := _rows(live, contract).values()) else None


def _volume(lake: Lake, workflow: Workflow, day: date, rows: int) -> tuple[bool, str, float | None]:
    """Whether so many live rows of a day are usual, a sentence, and how many are (None: nothing to compare with)."""
    usual = _usual(lake, workflow, day)
    if rows == 0:
        return False, "no events at all", usual
    if usual is None:
        return True, f"{rows} events; no earlier weeks to compare with", usual
    said = f"{rows} events, {usual:g} on the same weekday of the weeks before"
    return 0.3 * usual <= rows <= 3 * usual, said, usual


def _files(done: landing_zone.IngestResult, workflow: Workflow) -> dg.AssetCheckResult:
    """The check ``files``: what could not be read, what was new, and what stands by an earlier mapping."""
    refused = [f for f in done.files if f.status == "refused"]
    read = len(done.files) - len(refused)
    other = len(done.new) - len(done.landed)
    if not done.files:
        said = ["no file of these days lies in the landing zone; what landed before stands"]
    else:
        said = [f"{f.path}: {f.reason}" for f in refused]
        said.append(
            f"{read} files read whole: {len(done.landed)} new, {read - len(done.new)} known"
            + (f", {other} with a content that was known under another name" if other else "")
        )
    if done.admitted:
        said.append(f"{done.admitted} rows came in from quarantine: the rows that they doubled have left")
    if done.outdated:
        said.append(
            f"{len(done.outdated)} files, such as {done.outdated[0]}, landed by another mapping or contract than the present one; "
            f"map them again: signalbox remap {workflow.name}"
        )
    return dg.AssetCheckResult(
        check_name="files",
        passed=not refused,
        description="\n".join(said),
        metadata={
            "refused": len(refused),
            "new": len(done.landed),
            "known": read - len(done.new),
            "under another name": other,
            "by an earlier mapping": len(done.outdated),
        },
    )


def _within(share: landing_zone.Share, most: float, weight: str | None) -> tuple[bool, str]:
    """Whether a day's quarantine is within the contract, and a sentence; a day without a row has no verdict."""
    repeated = f"; {share.repeated} rows repeat what stands and do not count" if share.repeated else ""
    if share.told_later:
        repeated += f"; {share.told_later} rows were told later in the same file and do not count"
    if share.of_rows is None:
        return False, f"no verdict: no row of the day stands, accepted or quarantined{repeated}"
    said = f"{share.quarantined} of {share.accepted + share.quarantined} rows ({share.of_rows:.2%})"
    if weight is not None:
        said += f", {share.of_weight:.2%} of {weight}" if share.of_weight is not None else f", no {weight} to judge"
        said += f" ({share.unweighed} rows of unknown {weight})" if share.unweighed else ""
    return max(share.of_rows, share.of_weight or 0.0) <= most, f"{said}; {most:.2%} allowed{repeated}"


def _quarantine(
    shares: dict[date, landing_zone.Share], promised: EventsContract, rules: dict[str, int]
) -> dg.AssetCheckResult:
    """The check ``quarantine``: each day by what stands of it. Days without a verdict alone warn."""
    verdicts = {day: _within(share, promised.max_quarantined_share, promised.weight) for day, share in shares.items()}
    over = any(share.of_rows is not None and not verdicts[day][0] for day, share in shares.items())
    figures = [
        {"day": str(day), "share": share.of_rows, "weight share": share.of_weight, **asdict(share)}
        for day, share in shares.items()
    ]
    by_rule = "\n".join(f"- `{rule}`: {count}" for rule, count in sorted(rules.items())) or "none"
    return folded(
        "quarantine",
        verdicts,
        warn=not over,
        metadata={
            "share": max((share.of_rows or 0.0 for share in shares.values()), default=0.0),
            "weight share": max((share.of_weight or 0.0 for share in shares.values()), default=0.0),
            "by day": dg.MetadataValue.json(figures),
            "by rule of this run": dg.MetadataValue.md(by_rule),
        },
    )


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
            "quarantine": (True, "Each day's share of quarantined rows, and of their weight, is within the contract"),
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
        usual: dict[date, float | None] = {}
        counts: dict[date, int] = {}
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
        for day in each("events: contract", span, len(span)):
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
            counts[day] = _rows(rows, promised).get(day, 0)
            passed, sentence, usual[day] = _volume(lake.lake, workflow, day, counts[day])
            volumes[day] = passed, sentence
            context.add_asset_metadata(
                {"dagster/partition_row_count": rows.num_rows, "contract page": dg.MetadataValue.url(url)},
                partition_key=day.isoformat(),
            )
        by_rule = "\n".join(f"- `{rule}`: {count}" for rule, count in sorted(done.rules.items())) or "none"
        return dg.MaterializeResult(
            metadata={
                "files": len(done.files),
                "rows accepted": done.accepted,
                "rows quarantined": done.quarantined,
                "rows admitted from quarantine": done.admitted,
                "quarantined by rule": dg.MetadataValue.md(by_rule),
                "first rows": preview(landed.slice(0, 5)),
                "table version": lake.lake.version(workflow.table("events")),
            },
            check_results=[
                _files(done, workflow),
                _quarantine(landing_zone.shares(workflow, lake.lake, span, landed), promised, dict(done.rules)),
                folded(
                    "contract",
                    checked,
                    metadata={
                        "page": dg.MetadataValue.url(page),
                        "failed expectations": dg.MetadataValue.json(examples[:20]),
                    },
                ),
                folded(
                    "volume",
                    volumes,
                    warn=True,
                    metadata={
                        "by day": dg.MetadataValue.json(
                            [{"day": str(day), "rows": counts[day], "usual": usual[day]} for day in span]
                        )
                    },
                ),
            ],
        )

    return events
