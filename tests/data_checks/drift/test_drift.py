"""Drift: what moved is found and named, what did not move is left alone, and nothing goes unjudged in silence."""

import json
import os
import socket
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from data_checks import drift as subject
from data_checks.drift import (
    DriftImpossible,
    DriftReport,
    DriftSpec,
    calibration,
    drift,
    save,
    sentence,
)
from data_checks.drift import columns as drift_columns
from data_checks.drift import report as drift_report

NUMERIC = ("x", "count", "flag", "nothing")
CATEGORICAL = ("team", "code")
SPEC = DriftSpec(reference_days=4, min_rows=50)


def window(rows: int, seed: int, **replaced: Any) -> pa.Table:
    draw = np.random.default_rng(seed)
    columns = {
        "x": pa.array(draw.normal(10, 2, rows)),
        "count": pa.array(draw.poisson(20, rows), pa.int64(), mask=draw.random(rows) < 0.1),
        "flag": pa.array(draw.random(rows) < 0.3),
        "nothing": pa.nulls(rows, pa.float64()),
        "team": pa.array(draw.choice(["red", "green", "blue"], rows, p=[0.5, 0.3, 0.2])),
        "code": pa.array(draw.integers(1, 6, rows), pa.int64()),
    }
    return pa.table({**columns, **{k: v for k, v in replaced.items() if v is not None}}).drop_columns(
        [k for k, v in replaced.items() if v is None]
    )


def compare(current: pa.Table, reference: pa.Table | None = None, spec: DriftSpec = SPEC) -> DriftReport:
    return drift(current, reference or window(1600, 1), numeric=NUMERIC, categorical=CATEGORICAL, spec=spec)


@pytest.fixture(scope="module")
def clean() -> DriftReport:
    return compare(window(400, 2))


def moved(report: DriftReport) -> set[str]:
    return {name for name, column in report.columns.items() if column["drifted"]}


def test_the_same_distribution_is_stable_and_every_column_with_values_is_measured(clean: DriftReport) -> None:
    assert moved(clean) == set() and not clean.drifted and clean.share_drifted == 0
    assert {n for n, c in clean.columns.items() if not c["judged"]} == {"nothing"}
    assert clean.volume == pytest.approx(1.0)
    assert "not measured: nothing" in sentence(clean)


def test_distances_are_those_of_scipy_on_the_rows_themselves(clean: DriftReport) -> None:
    now, before = window(400, 2), window(1600, 1)
    a, b = (t["count"].drop_null().to_numpy().astype(float) for t in (now, before))
    assert clean.columns["count"]["distance"] == pytest.approx(wasserstein_distance(a, b) / b.std())
    shares = [[t["team"].to_pylist().count(c) / t.num_rows for c in ("red", "green", "blue")] for t in (now, before)]
    assert clean.columns["team"]["distance"] == pytest.approx(jensenshannon(*shares))
    assert clean.columns["count"]["null_share_current"] == now["count"].null_count / 400


def test_what_moved_is_found_and_named_and_the_rest_is_left_alone() -> None:
    draw = np.random.default_rng(5)
    report = compare(
        window(
            400,
            3,
            x=pa.array(draw.normal(11.2, 2, 400)),
            count=pa.array(draw.poisson(20, 400), pa.int64(), mask=draw.random(400) < 0.9),
            team=pa.array(draw.choice(["red", "green", "violet"], 400, p=[0.5, 0.3, 0.2])),
        )
    )
    assert moved(report) == {"x", "count", "team"} and report.share_drifted == 0.5 and report.drifted
    assert report.columns["x"]["distance"] == pytest.approx(0.6, abs=0.15)
    assert (report.columns["team"]["new_categories"], report.columns["team"]["vanished_categories"]) == (
        ["violet"],
        ["blue"],
    )
    assert "nulls 10% → 89%" in report.columns["count"]["reason"] and not report.columns["count"]["judged"]
    assert "violet" in report.html and "DRIFTED" in report.html
    assert sentence(report).startswith("3 of 6 columns drifted, volume 1.00×: ")


def test_a_column_that_loses_every_value_has_drifted_without_breaking_the_report() -> None:
    report = compare(window(400, 2, x=pa.nulls(400, pa.float64()), team=pa.nulls(400, pa.string())))
    assert moved(report) == {"x", "team"}
    assert report.columns["x"]["null_share_current"] == 1.0 and report.columns["x"]["distance"] is None
    assert report.columns["team"]["vanished_categories"] == ["red", "green", "blue"], "the most frequent first"


def test_infinite_and_undefined_numbers_count_as_missing() -> None:
    values = window(400, 2)["x"].to_numpy().copy()
    values[:200] = np.inf
    values[200:300] = np.nan
    report = compare(window(400, 2, x=pa.array(values)))
    assert report.columns["x"]["null_share_current"] == 0.75 and moved(report) == {"x"}
    assert report.columns["x"]["judged"] and np.isfinite(report.columns["x"]["distance"])


def test_a_column_missing_from_the_day_has_drifted_and_a_new_one_is_named() -> None:
    report = compare(window(400, 2, team=None), window(1600, 1, x=None))
    assert moved(report) == {"team"} and report.columns["team"]["reason"] == "missing from the current window"
    assert not report.columns["x"]["judged"] and "new" in report.columns["x"]["reason"]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x": None}, r"'x' is in neither window; correct features\.numeric"),
        ({"x": pa.array(["a"] * 100)}, "'x' is string, not a number; list it as categorical"),
        ({"x": pa.array([datetime(2020, 1, 1)] * 100)}, r"'x' is timestamp\[us\], not a number"),
        ({"team": pa.array([["a"]] * 100)}, "'team' is list.*, not a category"),
    ],
)
def test_a_column_that_cannot_be_judged_is_an_error_with_the_way_out(replaced: dict[str, Any], message: str) -> None:
    with pytest.raises(DriftImpossible, match=message):
        compare(window(100, 2, **replaced), window(100, 1, **replaced))


def test_empty_windows_and_too_few_values_everywhere_are_errors() -> None:
    with pytest.raises(DriftImpossible, match="current window has no rows"):
        compare(window(100, 2).slice(0, 0))
    with pytest.raises(DriftImpossible, match="no column has 500 values"):
        compare(window(100, 2), spec=DriftSpec(min_rows=500))


def test_a_column_on_which_evidently_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = drift_report._run

    def fails_on_team(columns: dict[str, Any], share: float) -> Any:
        if "team" in columns:
            raise ZeroDivisionError("somewhere inside")
        return run(columns, share)

    monkeypatch.setattr(drift_report, "_run", fails_on_team)
    with pytest.raises(
        DriftImpossible, match=r"'team': Evidently could not judge it \(ZeroDivisionError: somewhere inside\)"
    ):
        drift(window(100, 2), window(100, 1), numeric=["x"], categorical=["team"], spec=SPEC)


def test_a_distance_that_evidently_does_not_give_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift_report, "_run", lambda columns, share: (None, {}))
    with pytest.raises(DriftImpossible, match="'x': Evidently gave no distance"):
        compare(window(100, 2))


def test_many_rows_are_compressed_and_every_row_still_counts() -> None:
    draw = np.random.default_rng(8)
    sides = [draw.lognormal(0, 1, 60_000), draw.lognormal(0.1, 1, 45_000)]
    teams = [draw.choice([f"t{i}" for i in range(30)], len(s)) for s in sides]
    codes = [np.where(np.arange(len(s)) == 7, "once", "a") for s in sides]
    now, before = (pa.table({"x": s, "team": t}) for s, t in zip(sides, teams, strict=True))
    now = now.append_column("code", pa.array(codes[0]))
    before = before.append_column("code", pa.array(np.full(45_000, "a")))
    report = drift(now, before, numeric=["x"], categorical=["team", "code"], spec=SPEC)
    exact = wasserstein_distance(*sides) / sides[1].std()
    assert report.columns["x"]["distance"] == pytest.approx(exact, abs=0.005)
    shares = [np.unique(t, return_counts=True)[1] / len(t) for t in teams]
    assert report.columns["team"]["distance"] == pytest.approx(jensenshannon(*shares), abs=0.002)
    assert report.columns["code"]["new_categories"] == ["once"], "one row of 60,000 is seen"


def test_compression_keeps_mean_missing_share_and_counts() -> None:
    values = np.random.default_rng(3).normal(5, 1, 30_000)
    values[:7_500] = np.nan
    ordered = np.sort(values[7_500:])
    small = calibration.compress_numbers(ordered, 750)
    assert len(small) == 750 and small.mean() == pytest.approx(ordered.mean(), rel=1e-12)
    side = drift_columns.Side(pa.table({"x": values}))
    kept = drift_columns.Numbers.of(side, *drift_columns.sorted_values(side, "x", by_day=True)[::2]).filled(30_000)
    assert len(kept) == subject.DRAWN_ROWS and np.isnan(kept).mean() == 0.25
    assert np.nanmean(kept) == pytest.approx(ordered.mean(), rel=1e-3)
    assert (side.column("x").to_numpy()[7_500:] == values[7_500:]).all(), "the table itself is not sorted"
    counts = calibration.compress_counts(np.array([70_000, 29_999, 1]), 1_000)
    assert counts.sum() == 1_000 and np.abs(counts - [700, 299.99, 0.01]).max() < 1


def test_columns_compressed_at_once_say_what_they_say_one_by_one(
    clean: DriftReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drift_columns, "THREADED_ROWS", 0)
    assert compare(window(400, 2)).json == clean.json
    with pytest.raises(DriftImpossible, match="'x' is string, not a number"):
        compare(window(100, 2, x=pa.array(["a"] * 100)))


def test_categories_and_nulls_are_counted_on_their_own_days() -> None:
    days = pa.array([date(2016, 5, 2)] * 2 + [date(2016, 5, 1)] * 3, pa.date32())
    side = drift_columns.Side(pa.table({"day": days, "team": ["b", None, "a", "a", "b"]}))
    found = drift_columns.Texts.of(side, "team")
    assert found.names == ("a", "b") and found.counts.tolist() == [[2, 1], [0, 1]] and found.nulls.tolist() == [0, 1]


def test_categories_beyond_the_limit_are_one_and_rare_ones_do_not_slow_or_alarm() -> None:
    sides = [np.random.default_rng(s).integers(0, 3_000, n).astype(str) for s, n in ((1, 600), (2, 3_000))]
    report = drift(
        *(pa.table({"caller": s}) for s in sides), numeric=[], categorical=["caller"], spec=DriftSpec(min_rows=50)
    )
    assert moved(report) == set() and len(report.columns["caller"]["new_categories"]) == 20


def test_distances_are_evidently_s_own_on_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, float] = {}
    run = drift_report._run

    def kept(columns: dict[str, Any], share: float) -> Any:
        snapshot, distances = run(columns, share)
        found.update(distances)
        return snapshot, distances

    monkeypatch.setattr(drift_report, "_run", kept)
    few = compare(window(400, 3))
    assert found == pytest.approx({n: c["distance"] for n, c in few.columns.items() if c["judged"]}, abs=1e-12)
    many = compare(window(30_000, 4), window(40_000, 5))
    exact = {n: c["distance"] for n, c in many.columns.items() if c["judged"]}
    numbers = [n for n in NUMERIC if n in exact]
    assert [found[n] for n in numbers] == pytest.approx([exact[n] for n in numbers], abs=5e-4), (
        "Evidently's deviation is that of the compressed rows, ours that of every row"
    )
    assert found == pytest.approx(exact, abs=0.002), "counts of categories are exact here, and rounded for Evidently"


def test_the_report_is_json_and_the_page_opens_without_a_network(clean: DriftReport) -> None:
    assert json.loads(json.dumps(clean.json)) == clean.json
    assert set(clean.json["columns"]) == {*NUMERIC, *CATEGORICAL}
    assert "://" not in clean.html and "<script" not in clean.html
    assert compare(window(400, 2)).html == clean.html


def dated(days: int, rows: int, seed: int) -> pa.Table:
    said = [date(2016, 5, 1) + timedelta(days=seed + n) for n in range(days) for _ in range(rows)]
    return window(days * rows, seed).append_column("day", pa.array(said, pa.date32()))


def test_days_whose_volume_moved_are_json_too() -> None:
    moved = compare(dated(2, 150, 40), dated(10, 400, 1), DriftSpec(reference_days=4, min_rows=50, volume_change=0.2))
    assert moved.volume_drifted and moved.drifted
    assert json.loads(json.dumps(moved.json)) == moved.json


def test_hundreds_of_categories_round_off_in_the_pictures_and_not_in_the_verdict() -> None:
    shares = 1 / np.arange(1, 181)
    sides = [
        pa.table({"site": np.random.default_rng(seed).choice(180, 60_000, p=shares / shares.sum()).astype(str)})
        for seed in (1, 2)
    ]
    report = drift(*sides, numeric=[], categorical=["site"], spec=SPEC)
    counts = [np.bincount(s["site"].to_numpy().astype(int), minlength=180) / 60_000 for s in sides]
    assert report.columns["site"]["distance"] == pytest.approx(jensenshannon(*counts)) and not report.drifted


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_saving_a_day_again_replaces_it_and_another_day_is_added(clean: DriftReport, tmp_path: Path) -> None:
    from evidently.ui.workspace import Workspace

    day, after = datetime(2016, 5, 1), datetime(2016, 5, 2)
    first = save(str(tmp_path), "ticket_priority", clean, timestamp=day, tags=["day:2016-05-01"])
    once = files(tmp_path)
    assert save(str(tmp_path), "ticket_priority", clean, timestamp=day, tags=["day:2016-05-01"]) == first
    assert files(tmp_path) == once, "the same report saved again gives the same bytes"
    second = save(str(tmp_path), "ticket_priority", clean, timestamp=after)
    other = save(str(tmp_path), "ad_budget", clean, timestamp=day)
    assert second[0] == first[0] and second[1] != first[1] and other[0] != first[0]

    workspace = Workspace(str(tmp_path))
    assert {str(i) for i in workspace.list_runs(first[0])} == {first[1], second[1]}
    kept = workspace.get_run(first[0], first[1])
    assert kept is not None
    assert (kept.timestamp, kept.tags, kept.metadata["share_drifted"]) == (day, ["day:2016-05-01"], "0.0000")
    assert {p.name for p in workspace.list_projects()} == {"ticket_priority", "ad_budget"}


def test_the_panels_draw_one_line_a_column_over_the_days(clean: DriftReport, tmp_path: Path) -> None:
    import asyncio
    from uuid import UUID

    from evidently.ui.service.base import SeriesFilter
    from evidently.ui.service.storage.local import create_local_project_manager
    from evidently.ui.workspace import Workspace

    # Another number of rows gives other thresholds, which must not start other lines.
    for day, report in ((1, clean), (2, compare(dated(2, 200, 6)))):
        project, _ = save(str(tmp_path), "ticket_priority", report, timestamp=datetime(2016, 5, day))
    dashboard = Workspace(str(tmp_path)).get_dashboard(UUID(project))
    assert [p.title for p in dashboard.panels] == [
        "Share of drifted columns",
        "Distance of each column",
        "Rows of a mean day",
        "Share of nulls in each column",
    ]
    storage = create_local_project_manager(str(tmp_path), False).data_storage
    lines = {}
    for panel in dashboard.panels:
        value = panel.values[0]
        wanted = [SeriesFilter(tags=[], metadata={}, metric=value.metric, metric_labels=value.metric_labels)]
        series = asyncio.run(storage.get_data_series(UUID(project), wanted, None, None)).series
        lines[panel.title] = {s.params.get("column"): s.values for s in series}
    assert lines["Share of drifted columns"] == {None: [0.0, 0.0]}
    assert lines["Distance of each column"]["x"][0] == clean.columns["x"]["distance"]
    assert lines["Rows of a mean day"] == {None: [400.0, 200.0]}
    nulls = lines["Share of nulls in each column"]
    assert nulls["count"][0] == clean.columns["count"]["null_share_current"] and nulls["x"] == [0.0, 0.0]
    assert {c: len(v) for c, v in lines["Distance of each column"].items()} == dict.fromkeys(
        ("x", "count", "flag", "team", "code"), 2
    )


def test_judging_writes_no_file_and_calls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measuring drift must not use the network")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    report = drift(window(100, 2), window(100, 1), numeric=["x"], categorical=[], spec=SPEC)
    save(str(tmp_path / "workspace"), "w", report, timestamp=datetime(2016, 5, 1))
    assert os.listdir(tmp_path) == ["workspace"] and os.environ["DO_NOT_TRACK"] == "1"


# --- ratios to nearly nothing -----------------------------------------------------------------------------------------


def _ratios(rows: int, seed: int, tiny: float, days: int) -> pa.Table:
    """Value over cost; a share of the lines cost 0.0002 or so, and their ratios go to hundreds."""
    draw = np.random.default_rng(seed)
    ratio = draw.lognormal(0.5, 0.6, rows)
    ratio = np.where(draw.random(rows) < tiny, draw.uniform(100, 540, rows), ratio)
    return pa.table({"day": [date(2026, 3, 1) + timedelta(days=n * days // rows) for n in range(rows)], "ratio": ratio})


def _ratio_drift(reference: pa.Table, current: pa.Table, winsorise: float | None) -> dict[str, Any]:
    spec = DriftSpec(window_days=2, reference_days=14, min_rows=40, numeric_threshold=0.05, winsorise=winsorise)
    base = subject.Baseline(reference, numeric=["ratio"], categorical=[], block=2, winsorise=winsorise)
    found = subject.measure(current, base, numeric=["ratio"], categorical=[], spec=spec)
    return found.entries["ratio"]


def test_a_few_ratios_to_nearly_nothing_neither_hide_a_shift_nor_are_one() -> None:
    before = _ratios(5600, 1, 0.004, 14)
    shifted = _ratios(800, 2, 0.004, 2)
    shifted = shifted.set_column(1, "ratio", pa.array(shifted["ratio"].to_numpy() * 1.3))
    kept, drawn = (_ratio_drift(before, shifted, w) for w in (None, 2.0))
    print(f"every ratio 30% higher: distance {kept['distance']:.3f} as it is, {drawn['distance']:.3f} winsorised")
    assert drawn["drifted"] and drawn["distance"] > 0.3 > 3 * kept["distance"]
    # a few more of them are no drift of the others
    clean, some = _ratios(5600, 3, 0.0, 14), _ratios(800, 4, 0.01, 2)
    kept, drawn = (_ratio_drift(clean, some, w) for w in (None, 2.0))
    print(f"8 of 800 lines near nothing: distance {kept['distance']:.3f} as it is, {drawn['distance']:.3f} winsorised")
    assert kept["distance"] > 1 and drawn["distance"] < 0.15 and 0 < drawn["winsorised"] < 0.02


def test_what_is_drawn_to_the_bounds_is_measured_as_scipy_measures_it() -> None:
    before, now = _ratios(5600, 5, 0.004, 14), _ratios(800, 6, 0.02, 2)
    low, middle, high = np.quantile(before["ratio"].to_numpy(), [0.01, 0.5, 0.99], method="nearest")
    a, b = (np.clip(t["ratio"].to_numpy(), middle - 2 * (middle - low), middle + 2 * (high - middle)) for t in (now, before))  # fmt: skip
    found = _ratio_drift(before, now, 2.0)
    assert found["distance"] == pytest.approx(wasserstein_distance(a, b) / b.std(), abs=0.002)


def test_a_side_without_a_spread_has_no_bound() -> None:
    """99.5% zeros: what the few others do, and that all of them change, is still seen."""
    values = np.zeros(4000)
    values[::200] = 7.0
    assert drift_columns._bounds(np.sort(values), 2.0) == (-np.inf, np.inf)
    base = subject.Baseline(pa.table({"x": values}), numeric=["x"], categorical=[])
    found = subject.measure(
        pa.table({"x": np.full(400, 5.0)}), base, numeric=["x"], categorical=[], spec=DriftSpec(min_rows=40)
    )
    assert found.entries["x"]["drifted"]
