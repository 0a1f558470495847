"""How far a day's rows lie from the rows of the days before: Evidently's distances, and what it does not look at.

Belongs here: distances, null shares, new and vanished categories, volume, the report and its place in an Evidently
workspace. Does not: choosing the windows (``assets.stages.drift``) or what follows from drift (``orchestration``).

Distances only, never p-values: with enough rows every difference is significant. A column is judged by the Wasserstein
distance in standard deviations of the reference (numbers) or the Jensen-Shannon distance (categories).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from data_checks.common import page, without_collection

# Above this many rows a column is compressed before Evidently sees it; below, it sees the rows themselves.
FULL_ROWS = 10_000
# Beyond these, the rarest categories are one: Evidently takes milliseconds for each.
MAX_CATEGORIES = 200
OTHERS = "(all others)"
_NAMESPACE = UUID("6f1c1f0e-6b8e-5a53-9f0e-2f5d1a0c7b11")
_METHODS = {"numeric": "wasserstein", "categorical": "jensenshannon"}


class DriftImpossible(ValueError):
    """A column cannot be judged as it is declared; the message names it and the way out."""


class DriftSpec(BaseModel):
    """When a day counts as drifted. A distance must pass its threshold and what chance alone would give."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window_days: int = Field(
        default=7,
        gt=0,
        description="Days judged together, the partition's own the last: a week, so that no weekday is mistaken for drift",
    )
    reference_days: int = Field(default=28, gt=0, description="Days before the window that it is compared with")
    min_rows: int = Field(
        default=100, gt=1, description="Fewer rows, or fewer values of a column, on either side are not measured"
    )
    numeric_threshold: float = Field(
        default=0.2, gt=0, description="Wasserstein distance in standard deviations of the reference"
    )
    categorical_threshold: float = Field(
        default=0.15, gt=0, le=1, description="Jensen-Shannon distance (natural logarithm, at most 0.83)"
    )
    null_share_change: float = Field(
        default=0.2, gt=0, le=1, description="Change of a column's share of nulls that counts as drift"
    )
    share: float = Field(
        default=0.3, gt=0, le=1, description="Share of drifted columns from which the day counts as drifted"
    )
    numeric: tuple[str, ...] | None = Field(
        default=None, description="Feature columns measured as numbers; null: those of the model"
    )
    categorical: tuple[str, ...] | None = Field(
        default=None, description="Feature columns measured as categories; null: those of the model"
    )


@dataclass(frozen=True)
class DriftReport:
    """What was found.

    ``columns``: name → distance, method, threshold (with the allowance for chance), drifted, null_share_current,
    null_share_reference, new_categories, vanished_categories, judged (a distance was measured), reason (why it drifted
    or was not measured), all JSON-ready. ``volume``: rows of a mean day beside a mean day of the reference. ``html``: a page that
    opens offline. ``snapshot``: Evidently's, with its plots.
    """

    columns: dict[str, dict[str, Any]]
    share_drifted: float
    drifted: bool
    volume: float
    rows: tuple[int, int]
    html: str
    snapshot: Any

    @property
    def json(self) -> dict[str, Any]:
        """Everything but the plots, JSON-ready."""
        return {
            "drifted": self.drifted,
            "share_drifted": self.share_drifted,
            "volume": self.volume,
            "rows": {"current": self.rows[0], "reference": self.rows[1]},
            "columns": self.columns,
        }


def _evidently() -> Any:
    # Read by Evidently's telemetry at each event.
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with without_collection():
        import evidently

    return evidently


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Finite values are numbers, everything else is missing (NaN)."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    elif not any(
        is_(kind) for is_ in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    ):
        way_out = "list it as categorical or leave it out of the features"
        raise DriftImpossible(f"column {name!r} is {kind}, not a number; {way_out}")
    # A nullable whole number would be dropped by Evidently unjudged.
    values: np.ndarray = column.cast(pa.float64()).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)


def _texts(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DriftImpossible(
            f"column {name!r} is {column.type}, not a category; leave it out of the features"
        ) from error


def compress_numbers(values: np.ndarray, rows: int) -> np.ndarray:
    """A column of numbers (NaN: missing) as ``rows`` values: means of equal parts of the sorted values.

    The mean is kept exactly, quantiles to within a part, the share of missing values to within half a row.
    """
    ordered = np.sort(values[~np.isnan(values)])
    kept = max(1, round(rows * len(ordered) / len(values)))
    edges = np.linspace(0, len(ordered), kept + 1).astype(np.int64)
    means = np.add.reduceat(ordered, edges[:-1]) / np.diff(edges)
    whole = np.concatenate([means, np.full(rows - kept, np.nan)])
    # Evidently also plots along the row number: sorted values would look like a trend.
    return np.random.default_rng(0).permutation(whole)


def compress_counts(counts: np.ndarray, rows: int) -> np.ndarray:
    """Counts scaled to a total of ``rows`` (largest remainders), each within one of its exact share."""
    exact = counts * (rows / counts.sum())
    whole: np.ndarray = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: rows - int(whole.sum())]] += 1
    return whole


def chance_numbers(reference: np.ndarray, rows: int) -> float:
    """A Wasserstein distance (in standard deviations) that ``rows`` values drawn from the reference rarely pass.

    Under no change E|F̂−Ĝ| is at most √(F(1−F)(1/n+1/m)) at every value; twice its integral leaves about 1 in 1,000.
    """
    ordered = np.sort(reference)
    below = np.arange(1, len(ordered)) / len(ordered)
    spread = float(np.sum(np.sqrt(below * (1 - below)) * np.diff(ordered)))
    return 2 * spread * float(np.sqrt(1 / rows + 1 / len(ordered))) / max(float(np.std(reference)), 0.001)


def chance_categories(categories: int, rows: int, reference_rows: int) -> float:
    """A Jensen-Shannon distance that two samples of the same distribution rarely pass.

    With Δ = Σ(p−q)²/(p+q) the divergence is at most Δ·ln2/2 (Topsøe, IEEE Trans. Inf. Theory 46, 2000), and
    under no change 2Δ/(1/n+1/m) is about χ² with one degree of freedom less than categories: its mean and three
    standard deviations.
    """
    free = max(categories - 1, 0)
    return float(np.sqrt((free + 3 * np.sqrt(2 * free)) * np.log(2) / 4 * (1 / rows + 1 / reference_rows)))


@dataclass(frozen=True)
class _Column:
    """One column of both windows, as Evidently gets it, with what it does not look at."""

    current: Any
    reference: Any
    nulls: tuple[float, float]
    values: tuple[int, int]
    chance: float
    new: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()


def _numeric_column(name: str, current: pa.ChunkedArray, reference: pa.ChunkedArray, least: int) -> _Column:
    sides = [_numbers(c, name) for c in (current, reference)]
    nulls = [float(np.isnan(s).mean()) for s in sides]
    values = [int((~np.isnan(s)).sum()) for s in sides]
    chance = chance_numbers(sides[1][~np.isnan(sides[1])], values[0]) if min(values) >= least else 0.0
    small = [
        compress_numbers(s, FULL_ROWS) if len(s) > FULL_ROWS and v else s for s, v in zip(sides, values, strict=True)
    ]
    return _Column(small[0], small[1], (nulls[0], nulls[1]), (values[0], values[1]), chance)


def _categorical_column(name: str, current: pa.ChunkedArray, reference: pa.ChunkedArray, least: int) -> _Column:
    texts = [_texts(c, name) for c in (current, reference)]
    counted = [{e["values"]: e["counts"] for e in pc.value_counts(t.drop_null()).to_pylist()} for t in texts]
    names = sorted(counted[0] | counted[1], key=lambda c: (-counted[0].get(c, 0) - counted[1].get(c, 0), c))
    kept, rest = names[:MAX_CATEGORIES], names[MAX_CATEGORIES:]
    values = [sum(c.values()) for c in counted]
    filled = []
    for text, counts, total in zip(texts, counted, values, strict=True):
        sizes = np.array(
            [counts.get(c, 0) for c in kept] + [sum(counts.get(c, 0) for c in rest)] * bool(rest), np.int64
        )
        rows = min(len(text), FULL_ROWS)
        if len(text) > FULL_ROWS and total:
            sizes = compress_counts(sizes, max(1, round(FULL_ROWS * total / len(text))))
        column = np.full(rows, None, dtype=object)
        column[: int(sizes.sum())] = np.repeat(np.array([*kept, OTHERS][: len(sizes)], dtype=object), sizes)
        filled.append(column)
    chance = chance_categories(len(kept) + bool(rest), *values) if min(values) >= least else 0.0
    nulls = [t.null_count / len(t) for t in texts]
    new, vanished = (tuple(c for c in names if c not in other) for other in (counted[1], counted[0]))
    return _Column(filled[0], filled[1], (nulls[0], nulls[1]), (values[0], values[1]), chance, new, vanished)


def _run(columns: dict[str, tuple[str, _Column, float]], share: float) -> tuple[Any, dict[str, float]]:
    """Evidently's snapshot and the distance of each column."""
    import pandas as pd

    evidently = _evidently()
    from evidently.metrics import DriftedColumnsCount, ValueDrift

    by_kind = {kind: [n for n, (k, _, _) in columns.items() if k == kind] for kind in _METHODS}
    definition = evidently.DataDefinition(
        numerical_columns=by_kind["numeric"], categorical_columns=by_kind["categorical"]
    )
    # The share is over Evidently's columns alone; nulls and vanished columns are counted in DriftReport.
    metrics = [
        DriftedColumnsCount(
            drift_share=share,
            num_method=_METHODS["numeric"],
            cat_method=_METHODS["categorical"],
            per_column_threshold={n: t for n, (_, _, t) in columns.items()},
        ),
        *(ValueDrift(column=n, method=_METHODS[k], threshold=t) for n, (k, _, t) in columns.items()),
    ]
    sides = [
        evidently.Dataset.from_pandas(
            pd.DataFrame({n: getattr(c, side) for n, (_, c, _) in columns.items()}), definition
        )
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


def drift(
    current: pa.Table, reference: pa.Table, *, numeric: Sequence[str], categorical: Sequence[str], spec: DriftSpec
) -> DriftReport:
    """Compare two windows, column by column.

    Every row counts. A column that the current window lacks has drifted; one that only the reference lacks is new and
    is named. Columns with too few values are judged by their share of nulls alone. Raises DriftImpossible for a column
    that is in neither window, is of the wrong type, or that Evidently cannot judge, and where nothing can be measured.
    """
    for side, table in (("current", current), ("reference", reference)):
        if table.num_rows == 0:
            raise DriftImpossible(f"the {side} window has no rows; materialise the features of its days first")
    columns: dict[str, dict[str, Any]] = {}
    measured: dict[str, tuple[str, _Column, float]] = {}
    for name, kind in [*((n, "numeric") for n in numeric), *((n, "categorical") for n in categorical)]:
        here, before = name in current.schema.names, name in reference.schema.names
        entry: dict[str, Any] = {
            "distance": None,
            "method": _METHODS[kind],
            "threshold": None,
            "drifted": False,
            "null_share_current": None,
            "null_share_reference": None,
            "new_categories": [],
            "vanished_categories": [],
            "judged": False,
            "reason": None,
        }
        columns[name] = entry
        if not here and not before:
            raise DriftImpossible(
                f"column {name!r} is in neither window; correct features.{kind} in workflow.yaml or the features' SQL"
            )
        if not here or not before:
            reason = "new: the reference window lacks it" if here else "missing from the current window"
            entry |= {"drifted": not here, "reason": reason}
            continue
        prepare = _numeric_column if kind == "numeric" else _categorical_column
        column = prepare(name, current[name], reference[name], spec.min_rows)
        entry |= {
            "null_share_current": column.nulls[0],
            "null_share_reference": column.nulls[1],
            "new_categories": list(column.new[:20]),
            "vanished_categories": list(column.vanished[:20]),
        }
        change = column.nulls[0] - column.nulls[1]
        if abs(change) > spec.null_share_change:
            entry |= {"drifted": True, "reason": f"nulls {column.nulls[1]:.0%} → {column.nulls[0]:.0%}"}
        if min(column.values) < spec.min_rows:
            too_few = f"{column.values[0]} values beside {column.values[1]}: too few for a distance"
            entry["reason"] = f"{entry['reason']}; {too_few}" if entry["reason"] else too_few
            continue
        least = spec.numeric_threshold if kind == "numeric" else spec.categorical_threshold
        threshold = float(np.hypot(least, column.chance))
        entry["threshold"] = threshold
        measured[name] = (kind, column, threshold)
    if not measured:
        raise DriftImpossible(
            f"no column has {spec.min_rows} values in both windows; lower drift.min_rows or look at the features"
        )
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
        entry = columns[name]
        entry |= {"distance": distance, "judged": True}
        if distance >= entry["threshold"]:
            far = f"distance {distance:.3g} of {entry['threshold']:.3g}"
            entry |= {"drifted": True, "reason": f"{entry['reason']}; {far}" if entry["reason"] else far}
    share = sum(c["drifted"] for c in columns.values()) / len(columns)
    days = pc.count_distinct(reference["day"]).as_py() if "day" in reference.schema.names else spec.reference_days
    mine = pc.count_distinct(current["day"]).as_py() if "day" in current.schema.names else 1
    volume = (current.num_rows / max(mine, 1)) / (reference.num_rows / max(days, 1))
    rows = (current.num_rows, reference.num_rows)
    drifted = share >= spec.share
    return DriftReport(
        columns, share, drifted, volume, rows, _page(columns, share, drifted, volume, rows, spec), snapshot
    )


def sentence(report: DriftReport) -> str:
    """The report in one sentence, with the columns that moved most."""
    moved = [(n, c) for n, c in report.columns.items() if c["drifted"]]
    moved.sort(key=lambda e: (-((e[1]["distance"] or 0.0) / e[1]["threshold"] if e[1]["threshold"] else np.inf), e[0]))
    named = "; ".join(f"{n} ({c['reason']})" for n, c in moved[:5]) + ("; …" if len(moved) > 5 else "")
    unmeasured = ", ".join(n for n, c in report.columns.items() if not c["judged"])
    text = f"{len(moved)} of {len(report.columns)} columns drifted, volume {report.volume:.2f}×" + (
        f": {named}" if named else ""
    )
    return text + (f"; not measured: {unmeasured}" if unmeasured else "")


def _page(
    columns: dict[str, dict[str, Any]],
    share: float,
    drifted: bool,
    volume: float,
    rows: tuple[int, int],
    spec: DriftSpec,
) -> str:
    def worst_first(item: tuple[str, dict[str, Any]]) -> tuple[bool, float]:
        return not item[1]["drifted"], -(item[1]["distance"] or 0.0) / (item[1]["threshold"] or 1.0)

    rest = ("distance", "threshold", "method", "null_share_current", "null_share_reference", "new_categories")
    body: list[tuple[str, list[Any]]] = []
    for name, found in sorted(columns.items(), key=worst_first):
        state, word = ("good", "stable") if found["judged"] else ("warn", "not measured")
        if found["drifted"]:
            state, word = "bad", "drifted"
        body.append((state, [word, name, *(found[k] for k in (*rest, "vanished_categories", "reason"))]))
    verdict = "DRIFTED" if drifted else "Stable"
    return page(
        "Drift of the features",
        [
            f"{verdict}: {share:.0%} of the columns drifted; from {spec.share:.0%} the day counts as drifted.",
            f"{rows[0]} rows beside {rows[1]} of the reference, {volume:.2f} times a mean day of it.",
            "Distances by Evidently: Wasserstein in standard deviations for numbers, Jensen-Shannon for categories."
            " The threshold holds what chance alone gives at this number of rows. Plots are in the Evidently UI.",
        ],
        ["", "column", *(k.replace("_", " ") for k in rest), "vanished categories", "remark"],
        body,
    )


def save(
    workspace_path: str, project_name: str, report: DriftReport, *, timestamp: datetime, tags: Sequence[str] = ()
) -> tuple[str, str]:
    """Put a report's snapshot into an Evidently workspace; returns the ids of its project and of itself.

    One snapshot a project and day (of ``timestamp``): saving again replaces it. A new project gets panels of the share
    of drifted columns and of every column's distance over time. In the UI a snapshot lies under
    ``/projects/<project>/reports/<snapshot>``.
    """
    _evidently()
    from evidently.sdk.models import DashboardModel, DashboardTabModel, PanelMetric, ProjectModel
    from evidently.sdk.panels import line_plot_panel
    from evidently.ui.workspace import Workspace

    project = uuid5(_NAMESPACE, project_name)
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
        ]
        for panel in panels:
            panel.id = uuid5(project, panel.title)
        tab = DashboardTabModel(id=uuid5(project, "tab"), title="Drift", panels=[p.id for p in panels])
        workspace.save_dashboard(project, DashboardModel(tabs=[tab], panels=panels))
    model = report.snapshot.to_snapshot_model()
    model.name, model.timestamp, model.tags = f"{project_name} {timestamp:%Y-%m-%d}", timestamp, list(tags)
    model.metadata = {"share_drifted": f"{report.share_drifted:.4f}", "volume": f"{report.volume:.4f}"}
    # The UI starts another line wherever a parameter differs, and thresholds move with the number of rows.
    for result in model.metric_results.values():
        for moving in ("threshold", "per_column_threshold"):
            result.metric_value_location.metric.params.pop(moving, None)
    workspace.state.write_snapshot(project, snapshot, model)
    return str(project), str(snapshot)
