"""What a person sees of the figures: the picture and the page.

Belongs here: the plot and the page. Does not: the figures (``data_checks.performance.estimation``).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.page import Picture, Table, Text, page

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from data_checks.performance.estimation import windows
from data_checks.performance.spec import ASSUMES, SCHEMA, Kind

# --- for people -------------------------------------------------------------------------------------------------------


_SHARES = frozenset({"brier", "accuracy", "roc_auc", "calibration_error", "coverage"})
"""Metrics that lie between 0 and 1; every other is at least 0."""


def within(row: Mapping[str, Any]) -> dict[str, Any]:
    """A figure with the ends of its interval held to what its metric can be; stored they stand as they were estimated."""
    most = 1.0 if row["metric"] in _SHARES else float("inf")
    return {**row, **{end: None if row[end] is None else min(max(row[end], 0.0), most) for end in ("low", "high")}}


def newest(history: pa.Table) -> pa.Table:
    """Of figures told on several days, the newest telling of each day scored, metric and kind; windows left out.

    An estimate stands only where nothing mature is realised.
    """
    daily = history.filter(pc.equal(history["first"], history["last"])).sort_by("day")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in daily.to_pylist():
        found[(row["metric"], row["kind"], row["last"])] = row
    kept = sorted(found.items(), key=lambda e: (e[0][0], e[0][1], e[0][2]))
    return pa.Table.from_pylist([row for _, row in kept], schema=SCHEMA)


def plot(history: pa.Table, metrics: Sequence[str] | None = None) -> Figure:
    """Each metric by the day scored: realised with its interval (hollow while it matures), estimated, and the baseline."""
    from matplotlib.figure import Figure

    daily = newest(history)
    names = [m for m in dict.fromkeys(history["metric"].to_pylist()) if metrics is None or m in metrics]
    figure = Figure(figsize=(10, 2.6 * max(len(names), 1)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(max(len(names), 1), 1, sharex=True))
    looks = (("estimated", True, "C1", "s", "estimated"), ("realised", False, "0.6", "o", "maturing"), ("realised", True, "C0", "o", "realised"))  # fmt: skip
    for axis, name in zip(axes, names, strict=False):
        mine = [within(r) for r in daily.to_pylist() if r["metric"] == name]
        for kind, mature, colour, marker, label in looks:
            some = [r for r in mine if r["kind"] == kind and (kind == "estimated" or r["mature"] is mature)]
            if some:
                value = np.array([r["value"] for r in some])
                ends = np.array([[r["low"] if r["low"] is not None else r["value"] for r in some],
                                 [r["high"] if r["high"] is not None else r["value"] for r in some]])  # fmt: skip
                axis.errorbar(
                    [r["last"] for r in some], value, yerr=np.abs(ends - value), fmt=marker, color=colour,
                    markersize=3.5, linewidth=0.8, label=label,
                )  # fmt: skip
        told = windows(history).filter(pc.field("metric") == name).sort_by("day").to_pylist()
        line = [(r["day"], r["baseline"]) for r in told if r["baseline"] is not None and r["kind"] == "realised"]
        if line:
            axis.plot(*zip(*line, strict=True), color="0.3", linestyle="--", linewidth=1, label="baseline")
        axis.set(ylabel=name)
        axis.legend(fontsize=7, ncols=4, loc="best")
    axes[-1].tick_params(axis="x", rotation=30)
    return figure


def report(workflow: str, judged: pa.Table, history: pa.Table, kind: Kind) -> str:
    """One HTML page: the windows judged on a day, what the estimate assumes, and every metric over time."""
    import matplotlib

    sink = io.StringIO()
    # ids in the picture are salted at random otherwise: the same input gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "signalbox"}):
        plot(history).savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    picture = text[text.index("<svg") :]
    rows = [within(row) for row in windows(judged).to_pylist()]
    shown = (
        "metric",
        "kind",
        "value",
        "low",
        "high",
        "n",
        "known",
        "baseline",
        "baseline_is",
        "worse",
        "worse_low",
        "version",
    )
    none_yet = [] if rows else ["No window can be judged yet: too few mature days of the version that scores."]
    return page(
        f"Performance of {workflow}",
        Text([ASSUMES[kind], *none_yet]),
        Picture("Each metric by the day scored", picture),
        Table(
            [*(s.replace("_", " ") for s in shown), "remark"],
            [("warn" if (r["worse_low"] or 0) > 0 else "good", [*(r[s] for s in shown), r["text"]]) for r in rows],
        ),
    )
