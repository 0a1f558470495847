"""The lake: atomic replacement, versions, and content that is the same whatever files it lies in."""

import datetime as dt
import decimal
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pytest

from pipeline.lake import Lake, Moved, TableMissing, TypeChanged, VersionMissing, content_digest

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


# --- a column that changes its type ------------------------------------------------------------------------------------

KINDS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "flag": (pa.bool_(), [True, False]),
    "whole": (pa.int32(), [2, 5]),
    "huge": (pa.int64(), [2**60 + 1]),
    "unsigned": (pa.uint32(), [2**32 - 1]),
    "single": (pa.float32(), [0.1, float("nan")]),
    "fraction": (pa.float64(), [2.7, 0.1, 3.0]),
    "money": (pa.decimal128(5, 2), [decimal.Decimal("0.10")]),
    "exact": (pa.decimal128(38, 20), [decimal.Decimal("1.00000000000000000001")]),
    "text": (pa.string(), ["2", "x"]),
    "day": (pa.date32(), [MONDAY]),
    "time": (pa.timestamp("us"), [dt.datetime(2026, 3, 2, 3)]),
    "bytes": (pa.binary(), [b"2"]),
    "wholes": (pa.list_(pa.int64()), [[1, 2], []]),
    "fractions": (pa.list_(pa.float64()), [[1.5]]),
    "empty lists": (pa.list_(pa.null()), [[]]),
    "nothing": (pa.null(), [None]),
    "no fraction": (pa.float64(), [None]),
    "no lists": (pa.list_(pa.int64()), [None]),
}


def column(day: dt.date, kind: str) -> pa.Table:
    arrow, said = KINDS[kind]
    return pa.table({"day": pa.array([day] * len(said), pa.date32()), "x": pa.array(said, arrow)})


def held(lake: Lake, day: dt.date, version: int | None = None) -> list[Any]:
    found = lake.read("w/t", days=[day], version=version)["x"].to_pylist()
    return sorted(map(exact, found), key=repr)


def exact(value: Any) -> Any:
    """A value such that equal ones are the same value, in whatever type of number: 2.7 is not 2, and true is not 1."""
    if isinstance(value, list):
        return [exact(v) for v in value]
    if isinstance(value, bool) or value is None or value != value:
        return repr(value)
    return Fraction(value) if isinstance(value, int | float) else value


def same(found: list[Any], kind: str) -> bool:
    arrow, said = KINDS[kind]
    if pa.types.is_decimal(arrow):  # a fraction that gives the decimal back is it
        quantum = decimal.Decimal(1).scaleb(-arrow.scale)
        back = [float(f) if isinstance(f, Fraction) else f for f in found]
        return [decimal.Decimal(repr(b) if isinstance(b, float) else b).quantize(quantum) for b in back] == said
    return found == sorted(map(exact, pa.array(said, arrow).to_pylist()), key=repr)


@pytest.mark.parametrize("old", KINDS)
def test_no_value_changes_when_its_columns_type_does(tmp_path: Path, old: str) -> None:
    """Whatever type meets whatever other: both days stand as they were given, or the write is refused by name."""
    empty = {k for k in KINDS if k.startswith("no")}
    Lake(str(tmp_path / "first")).replace_days("w/t", column(MONDAY, old), [MONDAY])
    for new in KINDS:
        lake = Lake(str(shutil.copytree(tmp_path / "first", tmp_path / new)))
        try:
            lake.replace_days("w/t", column(TUESDAY, new), [TUESDAY])
        except TypeChanged as error:
            assert all(word in str(error) for word in ("'w/t'", "'x'", "Cast it to", "name of its own"))
            assert lake.version("w/t") == 0 and same(held(lake, MONDAY), old) and not held(lake, TUESDAY)
            assert not {old, new} & empty, "where one has no value, nothing can be lost"
            continue
        assert lake.version("w/t") == 1, new
        assert same(held(lake, MONDAY), old), f"what stood, after {new}"
        assert same(held(lake, TUESDAY), new), f"{new} as it was written"
        assert same(held(lake, MONDAY, version=0), old), f"the version before {new}"


def test_the_older_type_may_come_again(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    for kind, day in (("whole", MONDAY), ("fraction", TUESDAY), ("whole", MONDAY), ("fraction", TUESDAY)):
        lake.replace_days("w/t", column(day, kind), [day])
    assert same(held(lake, MONDAY), "whole") and same(held(lake, TUESDAY), "fraction")


def test_whole_numbers_become_fractions_and_an_untyped_column_takes_its_first_value(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    for old, new, kind in (
        ("whole", "fraction", "double"),
        ("nothing", "fraction", "double"),
        ("nothing", "flag", "bool"),
    ):
        home = replace(lake, root=str(tmp_path / f"{old} {new}"))
        home.replace_days("w/t", column(MONDAY, old), [MONDAY])
        home.replace_days("w/t", column(TUESDAY, new), [TUESDAY])
        assert str(home.read("w/t").schema.field("x").type) == kind
        assert home.read("w/t", days=[MONDAY])["x"].to_pylist() == KINDS[old][1]
        assert home.read("w/t", version=0)["x"].to_pylist() == KINDS[old][1], "an old version reads as it did"


def test_a_day_that_is_made_anew_in_another_type_replaces_what_it_was(tmp_path: Path) -> None:
    """Only what stays in the table has to agree: the day's own old rows are on their way out."""
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", column(MONDAY, "nothing"), [MONDAY])
    lake.replace_days("w/t", column(TUESDAY, "text"), [TUESDAY])
    lake.replace_days("w/t", column(TUESDAY, "whole"), [TUESDAY])
    assert lake.read("w/t").schema.field("x").type == pa.int32()
    assert held(lake, TUESDAY) == [Fraction(2), Fraction(5)] and lake.read("w/t", days=[MONDAY])["x"].null_count == 1


def test_widening_keeps_every_other_column_and_row_and_its_own_rules(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    many = pa.table({"day": pa.array([MONDAY] * 200_000, pa.date32()), "x": pa.array(range(200_000)),
                     "at": pa.array([dt.datetime(2026, 3, 2, 3)] * 200_000, pa.timestamp("us")),
                     "tags": pa.array([["a"]] * 200_000), "o'dd \"name": pa.array(["z"] * 200_000)})  # fmt: skip
    lake.replace_days("w/t", many, [MONDAY])
    wide = pa.table({"day": pa.array([TUESDAY], pa.date32()), "x": [0.5], "new": [1]})
    with pytest.raises(ValueError, match="predicate"):
        lake.replace_days("w/t", wide, [MONDAY])
    with pytest.raises(Moved):
        lake.replace("w/t", wide, predicate="day = '2026-03-03'", base=None)
    lake.replace_days("w/t", wide, [TUESDAY])
    back = lake.read("w/t", days=[MONDAY]).sort_by("x")
    assert back["x"].cast(pa.int64()).equals(many["x"]) and back["new"].null_count == 200_000
    for name in ("at", "tags", "o'dd \"name"):
        assert back[name].to_pylist()[::1000] == many[name].to_pylist()[::1000] and not back[name].null_count
    opened = deltalake.DeltaTable(lake.uri("w/t"))
    assert opened.metadata().partition_columns == ["day"]
    assert opened.metadata().configuration["delta.logRetentionDuration"] == "interval 3650 days"


def test_writers_of_two_types_at_once_lose_nothing(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    lake.replace_days("w/t", column(MONDAY, "whole"), [MONDAY])
    days = [TUESDAY + dt.timedelta(days=n) for n in range(6)]
    kinds = ["fraction", "whole", "single", "money", "no fraction", "nothing"]
    start = threading.Barrier(len(days))

    def write(n: int) -> None:
        start.wait()
        lake.replace_days("w/t", column(days[n], kinds[n]), [days[n]])

    with ThreadPoolExecutor(len(days)) as pool:
        list(pool.map(write, range(len(days))))
    assert same(held(lake, MONDAY), "whole")
    for day, kind in zip(days, kinds, strict=True):
        assert same(held(lake, day), kind)


@pytest.mark.parametrize("kind", [pa.time64("us"), pa.duration("us"), pa.float16(), pa.month_day_nano_interval()])
def test_a_type_that_cannot_be_kept_is_refused_by_name(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"day": pa.array([MONDAY], pa.date32()), "x": pa.nulls(1, kind)})
    with pytest.raises(TypeChanged, match=r"'w/t', column 'x'"):
        Lake(str(tmp_path)).replace_days("w/t", table, [MONDAY])


def test_a_number_beyond_what_can_be_kept_is_refused_by_name(tmp_path: Path) -> None:
    table = pa.table({"day": pa.array([MONDAY], pa.date32()), "x": pa.array([2**63 + 5], pa.uint64())})
    with pytest.raises(TypeChanged, match=r"'w/t', column 'x': uint64"):
        Lake(str(tmp_path)).replace_days("w/t", table, [MONDAY])


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
