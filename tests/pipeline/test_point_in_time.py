"""No look-ahead: what becomes known after a day's cut-off changes no byte of that day; and SQL that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from models.registry import files_digest
from pipeline import point_in_time
from pipeline.decisions import decide
from pipeline.lake import Lake, content_digest
from pipeline.point_in_time import StageSqlError
from pipeline.workflow import Workflow


def made(bench: Any, days: list[date]) -> dict[str, str]:
    """Digests of everything that is made of ``days``, up to the decisions of their last, after making it anew."""
    bench.build(days)
    workflow, lake, day = bench.workflow, bench.lake, days[-1]
    found = {}
    for one in days[-3:]:
        for stage in ("features", "outcomes"):
            rows = lake.read(workflow.table(stage), days=[one])
            found[f"{stage} of {one}"] = content_digest(rows.sort_by([(c, "ascending") for c in keys(rows)]))
    found["training set"] = content_digest(point_in_time.training_set(workflow, lake, day))
    model = bench.fit(day)
    found["model"] = files_digest(model.files())
    features = lake.read(workflow.table("features"), days=[day])
    features = features.sort_by([(c, "ascending") for c in keys(features)])
    scores = model.score(features)
    found["scores"] = content_digest(scores)
    units = pc.unique(decide.of_policy(workflow, features)["unit"]).sort().to_pylist()
    drawn = decide.draw_arms(workflow, day, units, None)
    decisions, _ = decide.decide(workflow, day, features, scores, drawn, "champion")
    assert pc.any(decisions["changed"]).as_py(), "a world in which nothing is decided proves nothing"
    found["decisions"] = content_digest(decisions)
    return found


def keys(rows: pa.Table) -> list[str]:
    return [c for c in ("entity_id", "moment", "for_day", "known_at") if c in rows.schema.names]


def rewrite(bench: Any, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace the events table by what ``change`` makes of it, in another physical order."""
    events = bench.lake.read(bench.workflow.table("events"))
    after = change(events)
    order = pc.sort_indices(after, sort_keys=[("source_row", "descending"), ("known_at", "descending")])
    days = sorted(set(events["day"].to_pylist()) | set(after["day"].to_pylist()))
    bench.lake.replace_days(bench.workflow.table("events"), after.take(order), days)


def edit(events: pa.Table, which: pa.Array, **columns: Any) -> pa.Table:
    for name, value in columns.items():
        at = events.schema.get_field_index(name)
        other = pa.scalar(value, events.schema.field(name).type) if not isinstance(value, pa.ChunkedArray) else value
        events = events.set_column(at, name, pc.if_else(which, other, events[name]))
    return events


DISTURBED: dict[str, dict[str, Any]] = {
    "ad_budget": {"value": 9e6, "cost": 1.0, "budget": 123.0, "clicks": 1},
    "ticket_priority": {"priority": 4, "state": "open", "missed": True, "effort_hours": 99.0, "reassignments": 9},
}


def late(events: pa.Table, cutoff: datetime, workflow: Workflow) -> pa.Table:
    """Rows that speak of the past and became known after the cut-off: disturbed copies of what was known."""
    again = events.filter(pc.less_equal(events["known_at"], pa.scalar(cutoff)))
    again = edit(again, pa.array([True] * again.num_rows), **DISTURBED[workflow.name], source_file_id="late")
    return edit(again, pa.array([True] * again.num_rows), known_at=cutoff + timedelta(microseconds=1))


def test_what_becomes_known_after_the_cut_off_changes_no_byte(bench: Any) -> None:
    workflow, day = bench.workflow, bench.last
    cutoff = workflow.cutoff_of(day)
    days = list(bench.days[-4:])
    wanted = made(bench, days)
    later = [day + timedelta(days=n) for n in (1, 2, 3)]

    # later files, files of old days restated afterwards, and late rows about days that were known already
    bench.land(later[:2])
    for old in days[-3:]:
        bench.write(later[2], bench.root / "other").replace(bench.write(old, bench.folder()))
    bench.land([later[0]], now=bench.morning(later[2]))
    rewrite(bench, lambda e: pa.concat_tables([e, late(e, cutoff, workflow)]))
    events = bench.lake.read(workflow.table("events"))
    unknown = pc.greater(events["known_at"], pa.scalar(cutoff))
    assert min(events.filter(unknown)["day"].to_pylist()) < day < max(events.filter(unknown)["day"].to_pylist())
    assert pc.any(pc.is_valid(events["superseded_at"])).as_py(), "a restated file supersedes what it held"
    assert made(bench, days) == wanted

    # every row known later changed, a part deleted, and what was superseded later superseded at other times
    def disturb(events: pa.Table) -> pa.Table:
        unknown = pc.greater(events["known_at"], pa.scalar(cutoff))
        events = edit(events, unknown, **{c: None for c in DISTURBED[workflow.name]})
        gone = pc.and_(unknown, pc.equal(pc.bit_wise_and(events["source_row"], pa.scalar(1)), 0))
        events = events.filter(pc.invert(gone))
        return edit(events, pc.is_valid(events["superseded_at"]), superseded_at=cutoff + timedelta(microseconds=1))

    rewrite(bench, disturb)
    assert made(bench, days) == wanted


def test_a_row_known_at_the_cut_off_counts(bench: Any) -> None:
    """The tests above can fail: the same disturbance, known in time, changes everything that is made."""
    workflow, day = bench.workflow, bench.last
    cutoff, days = workflow.cutoff_of(day), list(bench.days[-4:])
    wanted = made(bench, days)
    rewrite(
        bench,
        lambda e: pa.concat_tables(
            [e, edit(x := late(e, cutoff, workflow), pa.array([True] * x.num_rows), known_at=cutoff)]
        ),
    )
    found = made(bench, days)
    unchanged = {k for k in wanted if found[k] == wanted[k]}
    before = {f"{stage} of {one}" for stage in ("features", "outcomes") for one in days[:-1]}
    assert unchanged == before & set(wanted)


def test_a_row_superseded_by_the_cut_off_counts_no_more(bench: Any) -> None:
    day = bench.last
    cutoff = bench.workflow.cutoff_of(day)
    ((_, before),) = point_in_time.features(bench.workflow, bench.lake, [day])
    rewrite(bench, lambda e: edit(e, pc.equal(e["day"], pa.scalar(day)), superseded_at=cutoff))
    ((_, superseded),) = point_in_time.features(bench.workflow, bench.lake, [day])
    rewrite(bench, lambda e: e.filter(pc.not_equal(e["day"], pa.scalar(day))))
    ((_, absent),) = point_in_time.features(bench.workflow, bench.lake, [day])
    assert content_digest(superseded) == content_digest(absent) != content_digest(before)


def test_a_range_gives_the_bytes_of_its_days_one_by_one(bench: Any) -> None:
    days = list(bench.days[-4:])
    for stage in (point_in_time.features, point_in_time.outcomes):
        together = {d: content_digest(t) for d, t in stage(bench.workflow, bench.lake, days[::-1])}
        alone = {d: content_digest(t) for day in days for d, t in stage(bench.workflow, bench.lake, [day])}
        assert together == alone and sorted(together) == days


def test_an_older_version_of_the_events_can_be_read(bench: Any) -> None:
    day = bench.last
    version = bench.lake.version(bench.workflow.table("events"))
    ((_, before),) = point_in_time.features(bench.workflow, bench.lake, [day])
    rewrite(bench, lambda e: e.slice(0, 1))
    ((_, again),) = point_in_time.features(bench.workflow, bench.lake, [day], version=version)
    assert content_digest(again) == content_digest(before)


def test_an_outcome_is_told_once_and_in_the_day_it_became_known(bench: Any) -> None:
    days = list(bench.days)
    for day, table in point_in_time.outcomes(bench.workflow, bench.lake, days[-3:]):
        known = table["known_at"].to_pylist()
        assert known
        assert all(
            bench.workflow.cutoff_of(day - timedelta(days=1)) < k <= bench.workflow.cutoff_of(day) for k in known
        )


# --- a workflow of its own, small enough to say what must come out ----------------------------------------------------


@pytest.fixture
def tiny(ads: Any, tmp_path: Path) -> Callable[..., tuple[Workflow, Lake]]:
    """A workflow whose SQL a test writes, over events that a test gives: (id, amount, day, known hours later)."""

    def build(
        features: str,
        outcomes: str,
        rows: list[tuple[Any, float, date, float]],
        join: str = "entity",
        numeric: tuple[str, ...] = (),
    ) -> tuple[Workflow, Lake]:
        said = ads.workflow
        (tmp_path / "features.sql").write_text(features)
        (tmp_path / "outcomes.sql").write_text(outcomes)
        workflow = said.model_copy(
            update={
                "name": "tiny",
                "folder": tmp_path,
                "features": said.features.model_copy(update={"numeric": numeric, "categorical": ()}),
                "outcomes": said.outcomes.model_copy(update={"join": join}),
            }
        )
        lake = Lake(str(tmp_path / "tiny-lake"))
        events = pa.table(
            {
                "id": [r[0] for r in rows],
                "amount": [float(r[1]) for r in rows],
                "event_at": [datetime.combine(r[2], datetime.min.time()) for r in rows],
                "known_at": [datetime.combine(r[2], datetime.min.time()) + timedelta(hours=r[3]) for r in rows],
                "day": pa.array([r[2] for r in rows], pa.date32()),
                "source_file_id": ["f"] * len(rows),
                "source_row": list(range(len(rows))),
                "superseded_at": pa.nulls(len(rows), pa.timestamp("us")),
            }
        )
        lake.replace_days("tiny/events", events, sorted({r[2] for r in rows}))
        return workflow, lake

    return build


D = date(2026, 3, 10)
PLAIN = "SELECT id AS entity_id, sum(amount) AS amount FROM events GROUP BY id"
EVERYTHING = "SELECT id AS entity_id, NULL::DATE AS for_day, known_at, amount AS paid FROM events"
TOLD = f"{EVERYTHING} WHERE known_at > $previous_cutoff"


def materialise(workflow: Workflow, lake: Lake, days: list[date]) -> None:
    for stage, run in (("features", point_in_time.features), ("outcomes", point_in_time.outcomes)):
        tables = [t for _, t in run(workflow, lake, days)]
        lake.replace_days(f"tiny/{stage}", pa.concat_tables(tables, promote_options="default"), days)


def test_the_cut_off_is_inclusive_and_to_the_microsecond(tiny: Any) -> None:
    hours = 27.0  # the cut-off is 03:00 of the next day
    after = hours + 1e-6 / 3600
    workflow, lake = tiny(PLAIN, TOLD, [("in", 1, D, hours), ("out", 2, D, hours + 0.001), ("just", 4, D, after)])
    ((_, table),) = point_in_time.features(workflow, lake, [D])
    assert table["entity_id"].to_pylist() == ["in"]
    assert [r["entity_id"] for _, t in point_in_time.outcomes(workflow, lake, [D]) for r in t.to_pylist()] == ["in"]


def test_events_older_than_the_lookback_are_not_seen(tiny: Any) -> None:
    reach = 28
    rows = [("edge", 1, D - timedelta(days=reach), 1), ("old", 2, D - timedelta(days=reach + 1), 1)]
    workflow, lake = tiny(PLAIN, TOLD, rows)
    ((_, table),) = point_in_time.features(workflow, lake, [D])
    assert workflow.features.lookback_days == reach
    assert table["entity_id"].to_pylist() == ["edge"]


def test_outcomes_that_the_sql_tells_too_early_or_too_late_are_left_out(tiny: Any) -> None:
    ahead = EVERYTHING.replace("known_at,", "known_at + INTERVAL 1 DAY AS known_at,")
    rows = [("yesterday", 1, D - timedelta(days=1), 20), ("today", 2, D, 20)]
    workflow, lake = tiny(PLAIN, EVERYTHING, rows)
    ((_, table),) = point_in_time.outcomes(workflow, lake, [D])
    assert table["entity_id"].to_pylist() == ["today"]
    workflow, lake = tiny(PLAIN, ahead, rows)
    ((_, table),) = point_in_time.outcomes(workflow, lake, [D])
    assert table["entity_id"].to_pylist() == ["yesterday"]


def test_the_training_set_holds_only_what_was_known_by_the_day(tiny: Any) -> None:
    before, after = D - timedelta(days=1), D + timedelta(days=1)
    rows = [("a", 1, before, 1), ("a", 5, D, 1), ("a", 9, after, 5), ("b", 2, after, 5)]
    workflow, lake = tiny(PLAIN, TOLD, rows)
    materialise(workflow, lake, [before, D, after])
    table = point_in_time.training_set(workflow, lake, D)
    # the latest outcome that was known by then answers every row of the entity
    assert [(r["day"], r["entity_id"], r["paid"]) for r in table.to_pylist()] == [(before, "a", 5), (D, "a", 5)]
    assert {r["outcome_known_at"] for r in table.to_pylist()} == {
        datetime.combine(D, datetime.min.time()) + timedelta(hours=1)
    }


def test_a_cut_off_that_was_moved_forward_leaves_out_what_is_now_too_late(tiny: Any) -> None:
    workflow, lake = tiny(PLAIN, TOLD, [("in time", 1, D, 24), ("late", 2, D, 26)])
    materialise(workflow, lake, [D])
    assert point_in_time.training_set(workflow, lake, D).num_rows == 2
    earlier = workflow.model_copy(update={"cutoff": time(1)})
    assert point_in_time.training_set(earlier, lake, D)["entity_id"].to_pylist() == ["in time"]


def test_an_outcome_for_a_day_answers_that_days_features_only(tiny: Any) -> None:
    before = D - timedelta(days=1)
    told = TOLD.replace("NULL::DATE", '"day" - 1')
    workflow, lake = tiny(PLAIN, told, [("a", 1, before, 1), ("a", 5, D, 1)], join="entity_day")
    materialise(workflow, lake, [before, D])
    table = point_in_time.training_set(workflow, lake, D)
    assert [(r["day"], r["paid"]) for r in table.to_pylist()] == [(before, 5)]


@pytest.mark.parametrize(
    ("features", "why"),
    [
        ("SELEC 1", "features.sql"),
        ("SELECT id FROM events", "must yield entity_id"),
        ("SELECT id AS entity_id FROM events", "stand more than once"),
        ("SELECT NULL::VARCHAR AS entity_id, 1 AS amount", "entity_id is null"),
        ("SELECT 1 AS entity_id, 2 AS amount", "entity_id is"),
        ("SELECT id AS entity_id, nowhere FROM events", "nowhere"),
        ("SELECT DISTINCT id AS entity_id FROM events", "does not yield amount"),
    ],
)
def test_features_sql_that_cannot_be_used_names_its_file(tiny: Any, features: str, why: str) -> None:
    workflow, lake = tiny(features, TOLD, [("a", 1, D, 1), ("a", 2, D, 2)], numeric=("amount",))
    if "stand more" in why:
        workflow = replace_numeric(workflow)
    with pytest.raises(StageSqlError) as caught:
        list(point_in_time.features(workflow, lake, [D]))
    assert why in str(caught.value) and "features.sql" in str(caught.value)


@pytest.mark.parametrize("number", ["amount / 0", "ln(amount - amount)", "sqrt(-amount)", "1e308 * 10 * amount"])
def test_a_number_that_is_none_is_refused_by_file_column_and_entity(tiny: Any, number: str) -> None:
    """DuckDB 2 answers NaN or infinity where 1.x raised or said NULL, and LightGBM would learn from it."""
    given = [("a", 1, D, 20), ("b", 2, D, 20)]
    for sql, told, stage in (
        (f"SELECT id AS entity_id, amount, CASE WHEN id = 'b' THEN {number} END AS odd FROM events", TOLD, "features"),
        (PLAIN, TOLD.replace("SELECT", f"SELECT CASE WHEN id = 'b' THEN {number} END AS odd,", 1), "outcomes"),
    ):
        workflow, lake = tiny(sql, told, given)
        with pytest.raises(
            StageSqlError, match=rf"{stage}\.sql.*odd is (nan|inf|-inf) for 'b' \(1 of 2 rows\).*nullif"
        ):
            list(getattr(point_in_time, stage)(workflow, lake, [D]))


@pytest.mark.parametrize("table", ["sorted_events", "landed", "temp.sorted_events", "temp.main.sorted_events"])
def test_a_range_shows_a_day_no_row_of_a_later_one_under_any_name(tiny: Any, table: str) -> None:
    before = D - timedelta(days=1)
    peeking = f"SELECT id AS entity_id, amount FROM {table}"
    workflow, lake = tiny(peeking, TOLD, [("a", 1, before, 1), ("b", 2, D, 1)])
    with pytest.raises(StageSqlError, match=r"features\.sql:1: there is no table .* this SQL sees events"):
        list(point_in_time.features(workflow, lake, [before, D]))


def replace_numeric(workflow: Workflow) -> Workflow:
    return workflow.model_copy(update={"features": workflow.features.model_copy(update={"numeric": ()})})


@pytest.mark.parametrize(
    ("outcomes", "why"),
    [
        ("SELECT id AS entity_id, known_at FROM events", "must yield for_day"),
        ("SELECT * FROM nowhere", "nowhere"),
        (TOLD, "stand more than once"),
    ],
)
def test_outcomes_sql_that_cannot_be_used_names_its_file(tiny: Any, outcomes: str, why: str) -> None:
    workflow, lake = tiny(PLAIN, outcomes, [("a", 1, D, 20), ("a", 2, D, 21)])
    with pytest.raises(StageSqlError) as caught:
        list(point_in_time.outcomes(workflow, lake, [D]))
    assert why in str(caught.value) and "outcomes.sql" in str(caught.value)


def test_a_table_that_was_never_written_says_what_to_materialise(tiny: Any) -> None:
    workflow, lake = tiny(PLAIN, TOLD, [("a", 1, D, 1)])
    with pytest.raises(point_in_time.TableMissing, match="tiny/features"):
        point_in_time.training_set(workflow, lake, D)


def test_a_copy_of_the_lake_gives_the_same_bytes(bench: Any, tmp_path: Path) -> None:
    other = replace(bench.copy(tmp_path / "elsewhere"))
    deltalake.DeltaTable(other.lake.uri(other.workflow.table("events"))).optimize.compact()
    ((_, one),) = point_in_time.features(bench.workflow, bench.lake, [bench.last])
    ((_, two),) = point_in_time.features(other.workflow, other.lake, [bench.last])
    assert content_digest(one) == content_digest(two)
