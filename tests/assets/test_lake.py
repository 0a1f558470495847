"""The lake: atomic replacement, versions, and content that is the same whatever files it lies in."""

import datetime as dt
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import deltalake
import pyarrow as pa
import pytest

from assets.lake import Lake, Moved, TableMissing, VersionMissing, content_digest

MONDAY = dt.date(2026, 3, 2)
TUESDAY = MONDAY + dt.timedelta(days=1)


def rows(day: dt.date, *values: float) -> pa.Table:
    return pa.table(
        {
            "day": pa.array([day] * len(values), pa.date32()),
            "value": pa.array(values, pa.float64()),
            "at": pa.array([dt.datetime(2026, 3, 2, 3)] * len(values), pa.timestamp("us")),
            "notes": pa.array([["a", "b"]] * len(values), pa.list_(pa.string())),
        }
    )


def values(table: pa.Table) -> list[float]:
    return sorted(table["value"].to_pylist())


def test_replacing_a_day_leaves_the_others_alone(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", rows(MONDAY, 1, 2), [MONDAY])
    lake.replace_days("w/t", rows(TUESDAY, 3), [TUESDAY])
    lake.replace_days("w/t", rows(MONDAY, 9), [MONDAY])
    assert values(lake.read("w/t")) == [3, 9]
    assert values(lake.read("w/t", days=[MONDAY])) == [9]


def test_an_older_version_still_answers_after_a_replacement(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    first = lake.replace_days("w/t", rows(MONDAY, 1, 2), [MONDAY])
    second = lake.replace_days("w/t", rows(MONDAY, 5), [MONDAY])
    assert second > first
    assert values(lake.read("w/t", version=first)) == [1, 2]
    assert lake.version("w/t") == second


def test_a_day_can_be_emptied(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", rows(MONDAY, 1), [MONDAY])
    lake.replace_days("w/t", rows(MONDAY), [MONDAY])
    assert lake.read("w/t").num_rows == 0


def test_rows_outside_the_replaced_days_are_refused(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", rows(MONDAY, 1), [MONDAY])
    with pytest.raises(Exception, match=r"predicate|day"):
        lake.replace_days("w/t", rows(TUESDAY, 2), [MONDAY])
    assert values(lake.read("w/t")) == [1]


def test_times_and_lists_come_back_as_they_went_in(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", rows(MONDAY, 1), [MONDAY])
    back = lake.read("w/t").to_pylist()[0]
    assert back["at"] == dt.datetime(2026, 3, 2, 3)
    assert back["notes"] == ["a", "b"]


def test_a_new_column_is_added_and_old_rows_lack_it(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", rows(MONDAY, 1), [MONDAY])
    lake.replace_days("w/t", rows(TUESDAY, 2).append_column("new", pa.array([7])), [TUESDAY])
    assert {r["value"]: r["new"] for r in lake.read("w/t").to_pylist()} == {1.0: None, 2.0: 7}


def test_a_table_that_was_never_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableMissing, match="w/absent"):
        Lake(str(tmp_path)).read("w/absent")
    assert Lake(str(tmp_path)).version("w/absent") is None


def test_a_digest_depends_on_content_and_order_alone() -> None:
    whole = rows(MONDAY, 1, 2, 3)
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 2)])
    assert content_digest(whole) == content_digest(pieces)
    assert content_digest(whole) == content_digest(rows(MONDAY, 0, 1, 2, 3).slice(1, 3))
    assert content_digest(whole) != content_digest(rows(MONDAY, 1, 3, 2))
    assert content_digest(whole) != content_digest(rows(MONDAY, 1, 2, 3.0000000000000004))


def test_versions_are_kept_beyond_deltas_own_thirty_days_and_a_missing_one_is_named(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", rows(MONDAY, 1), [MONDAY])
    kept = deltalake.DeltaTable(lake.uri("w/t")).metadata().configuration["delta.logRetentionDuration"]
    assert kept == "interval 3650 days"
    with pytest.raises(VersionMissing, match="no longer has version 7"):
        lake.read("w/t", version=7)


def test_a_folder_that_delta_cannot_read_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="SIGNALBOX_HOME"):
        Lake("/somewhere/with[brackets]")


# --- several writers at once ------------------------------------------------------------------------------------------


def test_a_write_on_a_version_that_is_not_the_newest_any_more_is_refused(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    first = lake.replace("w/t", rows(MONDAY, 1), predicate="day = '2026-03-02'", base=None)
    lake.replace_days("w/t", rows(TUESDAY, 2), [TUESDAY])
    for base in (first, None):
        with pytest.raises(Moved, match="w/t"):
            lake.replace("w/t", rows(MONDAY, 9), predicate="day = '2026-03-02'", base=base)
    assert values(lake.read("w/t")) == [1, 2]
    last = lake.replace("w/t", rows(MONDAY, 9), predicate="day = '2026-03-02'", base=lake.version("w/t"))
    assert last == lake.version("w/t") and values(lake.read("w/t")) == [2, 9]


def test_a_broken_write_is_an_error_and_not_taken_for_a_lost_race(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", rows(MONDAY, 1), [MONDAY])
    with pytest.raises(Exception, match="day") as caught:
        lake.replace("w/t", rows(TUESDAY, 2), predicate="day = '2026-03-02'", base=0)
    assert not isinstance(caught.value, Moved)


@pytest.mark.parametrize("exists", [False, True])
def test_of_writers_at_once_each_gets_the_version_of_its_own_commit_and_one_partition_holds_one_writers_rows(
    tmp_path: Path, exists: bool
) -> None:
    lake = Lake(str(tmp_path))
    if exists:
        lake.replace_days("w/t", rows(MONDAY, 0), [MONDAY])
    days = [MONDAY, MONDAY, TUESDAY, TUESDAY]
    start = threading.Barrier(len(days))

    def write(n: int) -> list[tuple[int, dt.date, list[float]]]:
        start.wait()
        mine = [[n * 100.0 + i, n * 100.0 + i + 0.5] for i in range(5)]
        return [(lake.replace_days("w/t", rows(days[n], *said), [days[n]]), days[n], said) for said in mine]

    with ThreadPoolExecutor(len(days)) as pool:
        done = [one for some in pool.map(write, range(len(days))) for one in some]
    assert len({version for version, _, _ in done}) == len(done)
    for version, day, said in done:
        assert values(lake.read("w/t", version=version, days=[day])) == said, "another writer's rows, or both"
    for day in set(days):
        last = max(v for v, d, _ in done if d == day)
        assert values(lake.read("w/t", days=[day])) == next(said for v, _, said in done if v == last)
