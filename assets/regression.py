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
from common.page import Part, Picture, Table, Text, page
from common.progress import each
from data_checks.regression import guard
from pipeline.monitoring import verdicts as guarding
from pipeline.monitoring.power import power_sentences
from pipeline.workflow import Workflow

BAD = frozenset({"ROLLBACK", "HOLD"})
HOW_TO_READ = (
    "Of 100 tickets that came due in treated units: how many more should be late in the order that was asked for than in the one that "
    "people gave (asked), and how many more were late (came). Both serve the same tickets with the hands that were seen at work. The "
    "replay alone promotes nothing; HOLD is an alert and no finding."
)
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
        checks={"no_regression": (False, "No verdict is ROLLBACK, or the alert HOLD")},
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
            day: (not any(j.verdict in BAD for j in found), " | ".join(j.text for j in found) or NOTHING)
            for day, found in judged.items()
        }
        # an alert is no finding, and holds nothing up but what it names
        alert = not any(j.verdict == "ROLLBACK" for found in judged.values() for j in found)
        return dg.MaterializeResult(metadata=shown, check_results=[folded("no_regression", said, warn=alert)])

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


def replay_parts(judged: guarding.Judged) -> list[Part]:
    """What serving the queue anew says of a comparison, as parts of a page: the plot of both differences, or why there is none.

    None where the workflow declares no replay.
    """
    told = judged.replay
    if told is None:
        return []
    title = f"The queue served anew: {judged.comparison.who}, {judged.comparison.name}"
    if not told.looks:
        return [Text(["There is no verdict by replay.", *told.reasons], title=title)]
    picture = Picture("What the order asked for should cost, and what came", replay_plot(judged))
    return [Text([*told.reasons, HOW_TO_READ], title=title), picture]


def replay_plot(judged: guarding.Judged) -> bytes:
    """By day both differences with their errors, in shares of the tickets, and the statistic of the matched test beside its bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    looks_ = judged.replay.looks if judged.replay is not None else ()
    at = np.array([look.day for look in looks_])
    figure = Figure(figsize=(9, 3), dpi=80, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in (("d", "tab:blue"), ("o", "tab:orange")):
        value, error = (100 * np.array([getattr(look.effect, f) for look in looks_]) for f in (name, f"se_{name}"))
        times = 3 if name == "d" else 2
        left.fill_between(at, value - times * error, value + times * error, alpha=0.2, linewidth=0, color=colour)
        left.plot(at, value, marker=".", color=colour, label="asked, ± 3 errors" if name == "d" else "came, ± 2 errors")
    left.axhline(0, color="grey", linewidth=0.8)
    left.set_title("more late, of 100 tickets that came due", fontsize=8)
    right.plot(at, [look.statistic for look in looks_], marker=".", label="statistic")
    bound = np.array([look.bound for look in looks_])
    right.plot(at, np.where(np.isfinite(bound), bound, np.nan), linestyle="--", color="firebrick", label="bound")
    right.set_title(f"matched exact test and its bound ({judged.replay.verdict if judged.replay else ''})", fontsize=8)
    for look in looks_:
        if look.alert in BAD:
            left.axvline(
                look.day, color="firebrick" if look.alert == "ROLLBACK" else "goldenrod", linewidth=0.6, linestyle=":"
            )
    for panel in (left, right):
        panel.tick_params(labelsize=7)
        panel.set_xlabel("day of the comparison", fontsize=7)
        panel.legend(fontsize=7)
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
        *(part for one in found for part in replay_parts(one)),
        Text(power),
        Table(
            names,
            [("", [row[name] for name in names]) for row in newest.to_pylist()],
            title="The newest looks",
            note="Harm is positive, in the unit of its metric.",
            digits=4,
        ),
    )
