"""The stage ``regression``: whether what acts does harm, as a verdict that a sensor can act on and a sequence that people can see.

Belongs here: the asset, its plot and its page. Does not: what is compared (``pipeline.monitoring.verdicts``), the statistics
(``data_checks.regression``), or taking anything back (``orchestration.automation`` starts that).
"""

import base64
import io
from collections.abc import Sequence
from datetime import date
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from assets.common import days, folded, stage
from assets.resources import ClockResource, LakeResource, LedgerResource, ReportsResource, preview
from common.page import Picture, Table, Text, page
from common.progress import each
from data_checks.regression import guard
from pipeline.monitoring import verdicts as guarding
from pipeline.monitoring.power import power_sentences
from pipeline.workflow import Workflow

NOTHING = "nothing is judged: no batch has acted yet, or the arms that would be compared have no share"
LOOKS = pa.schema(
    {
        "day": pa.date32(),
        "comparison": pa.string(),
        "version": pa.int64(),
        "verdict": pa.string(),
        "metric": pa.string(),
        "look": pa.date32(),
        **{f.name: f.type for f in guard.LOOKS if f.name not in ("metric", "day", "verdict")},
    }
)
"""``<workflow>/regression``: every look as it stands at the cut-off of ``day``, with the verdict of that day. Figures as in
``data_checks.regression.LOOKS``: harm is positive, in the metric's unit."""


def build(workflow: Workflow) -> dg.AssetsDefinition:
    """The asset [workflow, regression], of a workflow that delivers and has a section ``regression``."""
    spec = workflow.regression
    assert spec is not None, "asked for workflows that are guarded"

    @stage(
        workflow,
        "regression",
        deps=["decision_outcomes"],
        description=f"What acts beside the arm that it is compared with, looked at every day (design {workflow.arms.design}): "
        f"a harm beyond the margin is taken back, falsely with a probability of at most {spec.alpha:.0%}.",
        kinds={"duckdb"},
        checks={"no_regression": (False, "No verdict is ROLLBACK")},
    )
    def regression(
        context: dg.AssetExecutionContext,
        lake: LakeResource,
        ledger: LedgerResource,
        clock: ClockResource,
        reports: ReportsResource,
    ) -> dg.MaterializeResult:
        span = days(context)
        book = ledger.open(clock.now)
        try:
            judged = {
                day: guarding.judge_day(workflow, lake.lake, book, day) for day in each("regression", span, len(span))
            }
        finally:
            book.close()
        stored = [looks(one) for found in judged.values() for one in found]
        whole = pa.concat_tables(stored) if stored else LOOKS.empty_table()
        lake.lake.replace_days(workflow.table("regression"), whole, span)
        shown: dict[str, Any] = {}
        for day, found in judged.items():
            if found:
                shown = _shown(workflow, lake, reports, day, found)
                context.add_asset_metadata(
                    {"verdict": "; ".join(f"{j.comparison.name}: {j.verdict}" for j in found)},
                    partition_key=day.isoformat(),
                )
        said = {
            day: (all(j.verdict != "ROLLBACK" for j in found), " | ".join(j.text for j in found) or NOTHING)
            for day, found in judged.items()
        }
        return dg.MaterializeResult(metadata=shown, check_results=[folded("no_regression", said)])

    return regression


def looks(judged: guarding.Judged) -> pa.Table:
    """A judgement's looks as they are stored."""
    found, one = judged.judgement.looks, judged.comparison
    n = found.num_rows
    own = {
        "day": pa.array([judged.day] * n, pa.date32()),
        "comparison": pa.array([one.name] * n, pa.string()),
        "version": pa.array([one.version] * n, pa.int64()),
        "verdict": pa.array([judged.verdict] * n, pa.string()),
        "look": found["day"] if n else pa.array([], pa.date32()),
    }
    columns = [own[f.name] if f.name in own else found[f.name].cast(f.type) for f in LOOKS]
    return pa.table(columns, schema=LOOKS)


def _shown(
    workflow: Workflow,
    lake: LakeResource,
    reports: ReportsResource,
    day: date,
    found: Sequence[guarding.Judged],
) -> dict[str, Any]:
    """Verdicts, looks and the sequence for Dagster, and the same as a page."""
    power = power_sentences(workflow, lake.lake, day)
    picture = plot(found)
    tables = [looks(one) for one in found]
    newest = pa.concat_tables([t.slice(max(t.num_rows - 10, 0)) for t in tables])
    _, url = reports.write(workflow.name, day, "regression.html", _page(workflow, day, found, newest, picture, power))
    return {
        "verdicts": dg.MetadataValue.md("\n".join(f"- {one.text}" for one in found)),
        "sequence": dg.MetadataValue.md(
            f"![sequence of looks](data:image/png;base64,{base64.b64encode(picture).decode()})"
        ),
        "looks": preview(newest.drop_columns(["day", "verdict"]), 20),
        "power": " ".join(power),
        "page": dg.MetadataValue.url(url),
        "figures": dg.MetadataValue.json({one.comparison.name: guarding.plain(one.judgement.figures) for one in found}),
    }


def plot(found: Sequence[guarding.Judged]) -> bytes:
    """The sequence as a PNG: a row a comparison and metric; left the estimated harm with its interval, right the statistic
    beside its bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import dates as ticks
    from matplotlib.figure import Figure

    rows = [
        (one, metric)
        for one in found
        for metric in dict.fromkeys(looks(one)["metric"].to_pylist())
        if looks(one).num_rows
    ]
    figure = Figure(figsize=(9, 0.6 + 2.4 * max(len(rows), 1)), dpi=80, layout="constrained")
    if not rows:
        figure.text(0.5, 0.5, "No look yet", ha="center")
    panels: Any = figure.subplots(len(rows), 2, squeeze=False) if rows else []
    for (one, metric), (left, right) in zip(rows, panels, strict=True):
        table = looks(one)
        table = table.filter(pc.equal(table["metric"], metric)).sort_by("look")
        at = table["look"].to_pylist()
        estimate, low, high, statistic, bound, margin = (
            np.array([np.nan if v is None or not np.isfinite(v) else v for v in table[c].to_pylist()])
            for c in ("estimate", "low", "high", "statistic", "bound", "margin")
        )
        left.fill_between(at, low, high, alpha=0.25, linewidth=0)
        left.plot(at, estimate, marker=".")
        left.axhline(0, color="grey", linewidth=0.8)
        left.plot(at, margin, color="firebrick", linestyle="--", linewidth=0.8)
        left.set_title(f"{metric}: harm of {one.comparison.who}, {one.comparison.name}", fontsize=8)
        right.plot(at, statistic, marker=".", label="statistic")
        right.plot(at, bound, linestyle="--", color="firebrick", label="bound")
        right.set_title(f"{metric}: statistic and its bound ({one.verdict})", fontsize=8)
        right.legend(fontsize=7)
        for panel in (left, right):
            panel.tick_params(labelsize=7)
            panel.xaxis.set_major_locator(ticks.AutoDateLocator(maxticks=6))
            panel.xaxis.set_major_formatter(ticks.DateFormatter("%m-%d"))
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _page(
    workflow: Workflow,
    day: date,
    found: Sequence[guarding.Judged],
    newest: pa.Table,
    picture: bytes,
    power: Sequence[str],
) -> str:
    names = [c for c in newest.schema.names if c not in ("day", "verdict")]
    return page(
        f"{workflow.name}: regression guard, {day}",
        Text([one.text for one in found], bullets=True),
        Picture("The sequence of looks", picture),
        Text(power),
        Table(
            names,
            [("", [row[name] for name in names]) for row in newest.to_pylist()],
            title="The newest looks",
            note="Harm is positive, in the unit of its metric.",
            digits=4,
        ),
    )
