"""The day's report: Evidently's pictures of what was judged, the page, its place in an Evidently workspace.

Belongs here: what a person sees. Does not: the verdict (``data_checks.drift.judge``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid5

import numpy as np
import pyarrow as pa

from common.collector import without_collection
from common.page import State, Table, Text, page
from data_checks.drift.calibration import (
    compress_counts,
    jensen_shannon,
    wasserstein,
)
from data_checks.drift.columns import Baseline, Numbers, Reference, Texts
from data_checks.drift.judge import Findings, aligned_counts, measure
from data_checks.drift.spec import (
    DRAWN_ROWS,
    LEAST_DEVIATION,
    METHODS,
    NAMESPACE,
    DriftImpossible,
    DriftReport,
    DriftSpec,
)


def _evidently() -> Any:
    # Read by Evidently's telemetry at each event.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with without_collection():
        import evidently

    return evidently


@dataclass(frozen=True)
class _Pair:
    """A column as Evidently gets it: at most DRAWN_ROWS rows a side."""

    current: Any
    reference: Any
    threshold: float
    distance: float = float("nan")
    """Between exactly these rows: what Evidently must find."""


def _pair(now: Numbers | Texts, rows: int, before: Reference, before_rows: int, threshold: float) -> _Pair:
    if isinstance(now, Numbers) and isinstance(before.side, Numbers):
        sides = now.filled(rows), before.side.filled(before_rows)
        held = [one[~np.isnan(one)] for one in sides]
        distance, _ = wasserstein(held[0], held[1], max(float(np.std(held[1])), LEAST_DEVIATION))
        # Evidently also plots along the row number: sorted values would look like a trend.
        mixed = [np.random.default_rng(0).permutation(one) for one in sides]
        return _Pair(mixed[0], mixed[1], threshold, distance)
    assert isinstance(now, Texts) and isinstance(before.side, Texts)
    mine, theirs, names = aligned_counts(now, before.side, before.kept)
    filled, shares = [], []
    for counts, total in ((mine, rows), (theirs, before_rows)):
        sizes = counts
        if total > DRAWN_ROWS:
            sizes = compress_counts(counts, max(1, round(DRAWN_ROWS * int(counts.sum()) / total)))
        column = np.full(min(total, DRAWN_ROWS), None, dtype=object)
        column[: int(sizes.sum())] = np.repeat(np.array(names, dtype=object), sizes)
        filled.append(column)
        shares.append(sizes / sizes.sum())
    return _Pair(filled[0], filled[1], threshold, float(jensen_shannon(*shares)))


def _run(columns: dict[str, tuple[str, _Pair]], share: float) -> tuple[Any, dict[str, float]]:
    """Evidently's snapshot and the distance of each column."""
    import pandas as pd

    evidently = _evidently()
    from evidently.metrics import DriftedColumnsCount, MissingValueCount, RowCount, ValueDrift

    by_kind = {kind: [n for n, (k, _) in columns.items() if k == kind] for kind in METHODS}
    definition = evidently.DataDefinition(
        numerical_columns=by_kind["numeric"], categorical_columns=by_kind["categorical"]
    )
    # The share is over Evidently's columns alone; nulls and vanished columns are counted in DriftReport.
    metrics = [
        DriftedColumnsCount(
            drift_share=share,
            num_method=METHODS["numeric"],
            cat_method=METHODS["categorical"],
            per_column_threshold={n: p.threshold for n, (_, p) in columns.items()},
        ),
        *(ValueDrift(column=n, method=METHODS[k], threshold=p.threshold) for n, (k, p) in columns.items()),
        RowCount(),
        *(MissingValueCount(column=n) for n in columns),
    ]
    sides = [
        evidently.Dataset.from_pandas(pd.DataFrame({n: getattr(p, side) for n, (_, p) in columns.items()}), definition)
        for side in ("current", "reference")
    ]
    with np.errstate(all="ignore"):
        snapshot = evidently.Report(metrics).run(*sides, timestamp=datetime(1970, 1, 1))
    found = {
        m["config"]["column"]: float(m["value"])
        for m in snapshot.dict()["metrics"]
        if m["config"]["type"].endswith(":ValueDrift")
    }
    return snapshot, found


def _drawn(measured: dict[str, tuple[str, _Pair]], spec: DriftSpec) -> Any:
    """Evidently's snapshot; of the rows that it gets its distances must be ours."""
    try:
        snapshot, distances = _run(measured, spec.share)
    except Exception as error:
        # Evidently does not say which column it was.
        for name, one in measured.items():
            try:
                _run({name: one}, spec.share)
            except Exception as cause:
                raise DriftImpossible(
                    f"column {name!r}: Evidently could not judge it ({type(cause).__name__}: {cause}); "
                    "leave it out of the features, or correct its values or its kind"
                ) from error
        raise
    for name in measured:
        distance = distances.get(name, float("nan"))
        if not np.isfinite(distance):
            raise DriftImpossible(
                f"column {name!r}: Evidently gave no distance; leave it out of the features, or correct its kind"
            )
        # of the same rows: all rows' own distance differs from it by what the compression to Evidently's rows rounds off
        ours = measured[name][1].distance
        if abs(distance - ours) > 1e-6 * max(ours, 1.0):
            raise DriftImpossible(
                f"column {name!r}: Evidently measures {distance:.6g} where the same rows give {ours:.6g}; "
                "report it, and leave the column out of the features until then"
            )
    return snapshot


def drift(
    current: pa.Table,
    reference: pa.Table | Baseline,
    *,
    numeric: Sequence[str],
    categorical: Sequence[str],
    spec: DriftSpec,
    importances: Mapping[str, float] | None = None,
    title: str = "Drift of the features",
    plots: bool = True,
) -> DriftReport:
    """Compare a window with a reference, column by column.

    Every row counts. A column that the current window lacks has drifted; one that only the reference lacks is new and
    is named. Columns with too few values are judged by their share of nulls alone. Days (a column ``day``, date) on both
    sides let whole days be resampled; without them rows are taken as independent. ``plots``: have Evidently measure and draw
    it too (``snapshot`` is None otherwise). Raises DriftImpossible for a column that is
    in neither window, is of the wrong type, or that Evidently cannot judge, and where nothing can be measured.
    """
    for side, rows in (("current", current.num_rows), ("reference", getattr(reference, "num_rows", 1))):
        if rows == 0:
            raise DriftImpossible(f"the {side} window has no rows; materialise the features of its days first")
    if not isinstance(reference, Baseline):
        reference = Baseline(
            reference, numeric=numeric, categorical=categorical, block=spec.window_days, winsorise=spec.winsorise
        )
    found = measure(current, reference, numeric=numeric, categorical=categorical, spec=spec, importances=importances)
    columns = found.entries
    measured = {
        n: (
            found.names[n],
            _pair(found.sides[n], found.rows, reference.columns[n], reference.rows, columns[n]["threshold"]),
        )
        for n, c in columns.items()
        if c["judged"]
    }
    if not measured:
        raise DriftImpossible(
            f"no column has {spec.min_rows} values in both windows; lower drift.min_rows or look at the features"
        )
    snapshot = _drawn(measured, spec) if plots else None
    rows = (found.rows, reference.rows)
    return DriftReport(
        columns, found.share, found.importance_share, found.weighted, found.spoke, found.grave, found.volume,
        found.volume_drifted, found.new_columns, rows, found.daily_rows, reference.said,
        _page(title, found, rows, reference.said, spec), snapshot,
    )  # fmt: skip


def sentence(report: DriftReport) -> str:
    """The report in one sentence, with the columns that moved most."""
    moved = [(n, c) for n, c in report.columns.items() if c["drifted"]]
    moved.sort(key=lambda e: (-((e[1]["distance"] or 0.0) / e[1]["threshold"] if e[1]["threshold"] else np.inf), e[0]))
    named = "; ".join(f"{n} ({c['reason']})" for n, c in moved[:5]) + ("; …" if len(moved) > 5 else "")
    unmeasured = ", ".join(n for n, c in report.columns.items() if not c["judged"])
    text = f"{len(moved)} of {len(report.columns)} columns drifted"
    text += f" with {report.importance_share:.0%} of the model's gain" if report.weighted and moved else ""
    text += f", volume {report.volume:.2f}×{' (drifted)' if report.volume_drifted else ''}"
    text += f": {named}" if named else ""
    text += f"; new columns: {', '.join(report.new_columns)}" if report.new_columns else ""
    return text + (f"; not measured: {unmeasured}" if unmeasured else "")


def _page(title: str, found: Findings, rows: tuple[int, int], said: Mapping[str, Any], spec: DriftSpec) -> str:
    def worst_first(item: tuple[str, dict[str, Any]]) -> tuple[bool, bool, float]:
        entry = item[1]
        return not entry["grave"], not entry["drifted"], -(entry["distance"] or 0.0) / (entry["threshold"] or 1.0)

    rest = (
        "distance", "threshold", "chance", "method", "importance", "null_share_current", "null_share_reference",
        "new_categories", "vanished_categories", "rare_moved",
    )  # fmt: skip
    body: list[tuple[State, list[Any]]] = []
    for name, entry in sorted(found.entries.items(), key=worst_first):
        state: State = "good"
        state, word = ("good", "stable") if entry["judged"] else ("warn", "not measured")
        if entry["drifted"]:
            state, word = "bad", "drifted"
        body.append((state, [word, name, *(entry[k] for k in rest), entry["reason"]]))
    lead = [
        f"{'DRIFTED' if found.spoke else 'Stable'}: {found.share:.0%} of the columns drifted; from {spec.share:.0%} the day "
        f"alerts, and {spec.k} of {spec.m} days must alert before drift is found.",
        f"{rows[0]} rows beside {rows[1]} of the reference; a mean day has {found.volume:.2f} times its rows"
        + (", more than its days vary." if found.volume_drifted else "."),
    ]
    if found.weighted:
        lead.append(
            f"The drifted columns carry {found.importance_share:.0%} of the champion's gain; from "
            f"{spec.importance_share:.0%} the day alerts."
        )
    if found.grave:
        lead.append(f"Cannot wait for a second day: {'; '.join(found.grave)}.")
    if found.new_columns:
        lead.append(f"Columns that the reference does not have: {', '.join(found.new_columns)}.")
    if said:
        lead.append("Reference: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in said.items()) + ".")
    lead.append(
        "Distances as Evidently measures them: Wasserstein in standard deviations for numbers, Jensen-Shannon for categories."
        " The threshold is the floor or what resampled days of the reference pass by chance, whichever is larger, corrected"
        " over all columns. Plots are in the Evidently UI."
    )
    return page(title, Text(lead), Table(["", "column", *(k.replace("_", " ") for k in rest), "remark"], body))


def save(
    workspace_path: str, project_name: str, report: DriftReport, *, timestamp: datetime, tags: Sequence[str] = ()
) -> tuple[str, str]:
    """Put a report's snapshot into an Evidently workspace; returns the ids of its project and of itself.

    One snapshot a project and day (of ``timestamp``): saving again replaces it. A new project gets panels of the share
    of drifted columns and of every column's distance, null share, and of the volume, over time. In the UI a snapshot lies under
    ``/projects/<project>/reports/<snapshot>``.
    """
    _evidently()
    from evidently.sdk.models import DashboardModel, DashboardTabModel, PanelMetric, ProjectModel
    from evidently.sdk.panels import line_plot_panel
    from evidently.ui.workspace import Workspace

    project = uuid5(NAMESPACE, project_name)
    snapshot = uuid5(project, timestamp.date().isoformat())
    workspace = Workspace(workspace_path)
    if workspace.get_project(project) is None:
        workspace.add_project(
            ProjectModel(
                id=project, name=project_name, description="Each day's features beside those of the days before"
            )
        )
        panels = [
            line_plot_panel(
                "Share of drifted columns",
                [PanelMetric(legend="share", metric="DriftedColumnsCount", metric_labels={"value_type": "share"})],
            ),
            line_plot_panel("Distance of each column", [PanelMetric(metric="ValueDrift")]),
            line_plot_panel("Rows of a mean day", [PanelMetric(legend="rows", metric="RowCount")]),
            line_plot_panel(
                "Share of nulls in each column",
                [PanelMetric(metric="MissingValueCount", metric_labels={"value_type": "share"})],
            ),
        ]
        for panel in panels:
            panel.id = uuid5(project, panel.title)
        tab = DashboardTabModel(id=uuid5(project, "tab"), title="Drift", panels=[p.id for p in panels])
        workspace.save_dashboard(project, DashboardModel(tabs=[tab], panels=panels))
    model = report.snapshot.to_snapshot_model()
    model.name, model.timestamp, model.tags = f"{project_name} {timestamp:%Y-%m-%d}", timestamp, list(tags)
    model.metadata = {
        "share_drifted": f"{report.share_drifted:.4f}",
        "importance_share": f"{report.importance_share:.4f}",
        "volume": f"{report.volume:.4f}",
        **{f"reference_{k}": str(v) for k, v in report.reference.items()},
    }
    for result in model.metric_results.values():
        params = result.metric_value_location.metric.params
        # The UI starts another line wherever a parameter differs, and thresholds move with the number of rows.
        for moving in ("threshold", "per_column_threshold"):
            params.pop(moving, None)
        # Evidently saw the compressed rows: what every row says takes the place of what it counted there.
        if params["type"].endswith(":RowCount"):
            result.value = report.daily_rows
        elif params["type"].endswith(":MissingValueCount"):
            share = report.columns[params["column"]]["null_share_current"]
            result.count.value, result.share.value = float(round(share * report.rows[0])), share
        elif params["type"].endswith(":ValueDrift"):
            result.value = report.columns[params["column"]]["distance"]
        elif params["type"].endswith(":DriftedColumnsCount"):
            result.share.value = report.share_drifted
            result.count.value = float(sum(c["drifted"] for c in report.columns.values()))
    workspace.state.write_snapshot(project, snapshot, model)
    return str(project), str(snapshot)
