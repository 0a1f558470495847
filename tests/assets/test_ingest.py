"""The stage ``events``: each day judged by what stands of it, whichever run landed it; what the checks say of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from assets import ingest as stage
from assets.resources import ClockResource, LakeResource, LandingResource, ReportsResource
from pipeline import ingest
from pipeline.lake import Lake
from pipeline.workflow import FOLDER, EventsContract, Workflow, load

HEADER = (
    "date,line_id,campaign,segment,format,placement,impressions,clicks,cost,revenue,budget,explore_multiplier,"
    "explore_probability,exported_at\n"
)
FIRST = date(2026, 3, 10)
WEEK = [FIRST + timedelta(days=n) for n in range(7)]


class Office:
    """A landing zone of the advertising workflow, its lake, and the asset ``events`` over them."""

    def __init__(self, root: Path, **events: Any) -> None:
        said = load(FOLDER / "ad_budget")
        promised = said.contract.model_copy(
            update={"events": said.contract.events.model_copy(update={"weight": None, **events})}
        )
        self.workflow: Workflow = said.model_copy(update={"contract": promised})
        self.root, self.lake = root, Lake(str(root / "lake"))
        self.exports = root / "landing" / "ad_budget" / "export"
        self.exports.mkdir(parents=True)

    def path(self, day: date) -> Path:
        return self.exports / f"advertising_{day}.csv.gz"

    def export(
        self, day: date, rows: int = 20, broken: int = 0, cost: float = 5, broken_clicks: int = 0, revenue: float = 10
    ) -> None:
        """A day's file; ``broken`` rows have a cost below 0, ``broken_clicks`` ones more clicks than impressions."""
        lines = [
            f"{day},line-{n:02d},c{n % 3},new,video,feed,1000,{2000 if broken <= n < broken + broken_clicks else 10},"
            f"{-1 if n < broken else cost if n < broken + broken_clicks else 5},{revenue},6.00,1,,{day + timedelta(days=1)} 01:30:00\n"
            for n in range(rows)
        ]
        self.path(day).write_text(HEADER + "".join(lines))

    def land(self, day: date, hour: int = 4) -> ingest.IngestResult:
        at = datetime.combine(day + timedelta(days=1), datetime.min.time()) + timedelta(hours=hour)
        return ingest.ingest(self.workflow, self.lake, self.root / "landing", now=at)

    def shares(self, days: Sequence[date] = WEEK) -> dict[date, ingest.Share]:
        rows = self.lake.read("ad_budget/events", days=days)
        return ingest.shares(self.workflow, self.lake, days, rows.filter(pa.compute.is_null(rows["superseded_at"])))

    def verdict(self, days: Sequence[date] = WEEK) -> dg.AssetCheckResult:
        return stage._quarantine(self.shares(days), self.workflow.contract.events, {})

    def run(self, day: date, now: str = "") -> Mapping[str, dg.AssetCheckEvaluation]:
        """The asset materialised for a day; its checks by name."""
        result = dg.materialize(
            [stage.build(self.workflow)],
            partition_key=day.isoformat(),
            raise_on_error=False,
            resources={
                "lake": LakeResource(root=str(self.root / "lake")),
                "landing": LandingResource(root=str(self.root / "landing")),
                "reports": ReportsResource(
                    root=str(self.root / "reports"), ui="", evidently_workspace="", evidently_ui=""
                ),
                "clock": ClockResource(now=now or f"{day + timedelta(days=1)}T04:00:00"),
            },
        )
        return {e.check_name: e for e in result.get_asset_check_evaluations()}


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    yield Office(tmp_path)


def test_a_broken_day_is_broken_however_often_it_is_run(office: Office) -> None:
    office.export(FIRST, broken=10)
    for _ in range(2):
        checks = office.run(FIRST)
        assert not checks["quarantine"].passed and checks["quarantine"].severity is dg.AssetCheckSeverity.ERROR
        assert checks["quarantine"].description == f"{FIRST}: 10 of 20 rows (50.00%); 10.00% allowed"
    office.export(FIRST)
    checks = office.run(FIRST, now="2026-03-11T05:00:00")
    assert checks["quarantine"].passed, "mended, and the rows of the content before do not count"


def test_the_check_of_files_says_how_many_were_new_and_how_many_known(office: Office) -> None:
    office.export(FIRST)
    assert office.run(FIRST)["files"].description == "1 files read whole: 1 new, 0 known"
    assert office.run(FIRST)["files"].description == "1 files read whole: 0 new, 1 known"
    office.path(FIRST).unlink()
    found = office.run(FIRST)["files"]
    assert found.passed and "no file of these days lies in the landing zone" in str(found.description)


def test_one_broken_day_of_a_week_is_not_diluted(office: Office) -> None:
    for day in WEEK:
        office.export(day, broken=10 if day == WEEK[3] else 0)
    office.land(WEEK[-1])
    found = office.verdict()
    assert not found.passed and found.severity is dg.AssetCheckSeverity.ERROR
    assert found.description == f"{WEEK[3]}: 10 of 20 rows (50.00%); 10.00% allowed"


def test_a_day_without_a_row_has_no_verdict(office: Office) -> None:
    office.export(FIRST)
    office.land(FIRST)
    found = office.verdict(WEEK[:2])
    assert not found.passed and found.severity is dg.AssetCheckSeverity.WARN
    assert found.description == f"{WEEK[1]}: no verdict: no row of the day stands, accepted or quarantined"


def test_rows_without_a_time_count_for_the_day_of_their_files_name(office: Office) -> None:
    office.export(FIRST)
    office.path(FIRST).write_text(office.path(FIRST).read_text() + "torn\n" * 3)
    office.land(WEEK[5])  # late, so that the day before the landing is another one
    assert (office.shares()[FIRST].accepted, office.shares()[FIRST].quarantined) == (20, 3)


def test_a_time_that_cannot_be_counts_for_the_day_of_its_file(office: Office) -> None:
    office.export(FIRST)
    text = office.path(FIRST).read_text()
    office.path(FIRST).write_text(text.replace(f"{FIRST},line-00", "2199-03-10,line-00"))
    office.land(FIRST)
    (rejected,) = office.lake.read("ad_budget/quarantine").to_pylist()
    assert (rejected["rule"], rejected["day"]) == ("from_the_future", FIRST)


def test_a_file_that_is_sent_again_repeats_rows_and_breaks_none(office: Office) -> None:
    office.export(FIRST)
    office.land(FIRST)
    shutil.copy(office.path(FIRST), office.exports / f"advertising_{WEEK[1]}.csv.gz")
    with office.path(WEEK[1]).open("a") as file:  # yesterday's rows once more, with one that says something else
        file.write(office.path(FIRST).read_text().splitlines()[1].replace(",5,", ",7,") + "\n")
    office.land(WEEK[1])
    share = office.shares()[FIRST]
    assert (share.accepted, share.quarantined, share.repeated) == (20, 1, 20)
    assert office.verdict([FIRST]).passed
    assert "20 rows repeat what stands" in str(office.verdict([FIRST]).description)


def test_few_rows_with_much_weight_stop_the_day(tmp_path: Path) -> None:
    for weight, passes in ((None, True), ("cost", False)):
        office = Office(tmp_path / str(weight), weight=weight)
        office.export(FIRST, broken_clicks=1, cost=35)
        office.land(FIRST)
        assert office.verdict([FIRST]).passed is passes
    assert office.verdict([FIRST]).description == f"{FIRST}: 1 of 20 rows (5.00%), 26.92% of cost; 10.00% allowed"


def test_a_weight_that_the_contract_refuses_is_unknown_and_counts_as_a_row(tmp_path: Path) -> None:
    office = Office(tmp_path, weight="cost")
    office.export(FIRST, broken=1)
    office.path(FIRST).write_text(office.path(FIRST).read_text().replace(",5,10,", ",x,10,", 1))
    office.land(FIRST)
    assert office.verdict([FIRST]).description == (
        f"{FIRST}: 2 of 20 rows (10.00%), 0.00% of cost (2 rows of unknown cost); 10.00% allowed"
    )


def test_a_weight_must_be_a_number_of_the_contract() -> None:
    columns = {"id": {"type": "VARCHAR"}, "amount": {"type": "DOUBLE"}}
    for wrong in ("id", "missing"):
        with pytest.raises(
            ValueError, match=f"'{wrong}' is no BIGINT or DOUBLE column of the events; choose one of amount"
        ):
            EventsContract.model_validate({"columns": columns, "weight": wrong})
    assert EventsContract.model_validate({"columns": columns, "weight": "amount"}).weight == "amount"


def _line(day: date, line: str, revenue: float, known: datetime) -> str:
    return f"{day},{line},c1,new,video,feed,1000,10,5,{revenue},6.00,1,,{known}\n"


def _standing(office: Office) -> list[tuple[str, float, datetime]]:
    rows = office.lake.read("ad_budget/events")
    live = rows.filter(pa.compute.is_null(rows["superseded_at"])).sort_by("line_id").to_pylist()
    return [(r["line_id"], r["value"], r["known_at"]) for r in live]


def test_of_rows_that_a_restatement_makes_equal_what_upstream_told_last_stands(office: Office) -> None:
    early, late = datetime(2026, 3, 11, 1, 30), datetime(2026, 3, 11, 2, 30)
    both = _line(FIRST, "a", 5, early) + _line(FIRST, "a", 7, late)
    office.path(FIRST).write_text(HEADER + both)
    office.land(FIRST)
    assert _standing(office) == [("a", 5.0, early), ("a", 7.0, late)], "a restated figure is a row of its own"
    office.path(FIRST).write_text(HEADER + both + _line(FIRST, "b", 1, early))
    office.land(FIRST, hour=50)
    landed = datetime.combine(FIRST + timedelta(days=1), datetime.min.time()) + timedelta(hours=50)
    assert _standing(office) == [("a", 7.0, landed), ("b", 1.0, landed)]


def test_a_row_that_a_restatement_makes_equal_to_a_later_one_is_no_bad_record(office: Office) -> None:
    early, late = datetime(2026, 3, 11, 1, 30), datetime(2026, 3, 11, 2, 30)
    rows = [_line(FIRST, "a", 5, early), _line(FIRST, "a", 7, late), _line(FIRST, "b", 1, early)]
    office.path(FIRST).write_text(HEADER + "".join(rows))
    office.land(FIRST)
    assert office.verdict([FIRST]).passed
    rows += [_line(FIRST, "c", 1, early), _line(FIRST, "a", 6, early)]  # the last is a double that nothing has moved
    office.path(FIRST).write_text(HEADER + "".join(rows))
    assert office.land(FIRST, hour=50).rules == {"told_later": 1, "duplicate": 1}
    share = office.shares()[FIRST]
    assert (share.accepted, share.quarantined, share.repeated, share.told_later) == (3, 1, 0, 1)
    assert "; 1 rows were told later in the same file and do not count" in str(office.verdict([FIRST]).description)
    found = office.lake.read("ad_budget/quarantine").to_pylist()
    (told,) = [q["detail"] for q in found if q["rule"] == "told_later"]
    assert told.startswith("line_id = a, ") and told.endswith(
        " was told later in row 2 of export/advertising_2026-03-10.csv.gz"
    )


def test_a_row_told_later_never_comes_in_for_the_one_that_was_told_last(office: Office) -> None:
    early, late = datetime(2026, 3, 11, 1, 30), datetime(2026, 3, 11, 2, 30)
    both = _line(FIRST, "a", 5, early) + _line(FIRST, "a", 7, late)
    office.path(FIRST).write_text(HEADER + _line(FIRST, "z", 1, early))
    office.path(WEEK[1]).write_text(HEADER + _line(FIRST, "z", 2, early))
    office.land(FIRST)
    # both restated in one run: what the first file says of the line pushes out what the second says
    office.path(FIRST).write_text(HEADER + _line(FIRST, "a", 4, early))
    office.path(WEEK[1]).write_text(HEADER + both)
    office.land(FIRST, hour=50)
    assert [value for _, value, _ in _standing(office)] == [4.0]
    office.path(FIRST).write_text(HEADER + _line(FIRST, "b", 1, early))
    office.land(FIRST, hour=60)
    assert [(line, value) for line, value, _ in _standing(office)] == [("a", 7.0), ("b", 1.0)]


def test_an_old_row_repeated_after_its_restatement_stands_beside_nothing(office: Office) -> None:
    told = datetime(2026, 3, 11, 1, 30)
    office.path(FIRST).write_text(HEADER + _line(FIRST, "a", 5, told))
    office.land(FIRST)
    office.path(FIRST).write_text(HEADER + _line(FIRST, "a", 6, told))
    office.land(FIRST, hour=50)
    # in a file of its own: as a copy of the first content it would not even be judged
    office.path(WEEK[1]).write_text(HEADER + _line(FIRST, "a", 5, told) + _line(FIRST, "b", 1, told))
    assert office.land(FIRST, hour=60).rules == {"duplicate": 1}
    assert [(line, value) for line, value, _ in _standing(office)] == [("a", 6.0), ("b", 1.0)]


def test_a_double_is_not_admitted_beside_the_restated_row_of_its_moment(office: Office) -> None:
    told = datetime(2026, 3, 11, 1, 30)
    office.path(FIRST).write_text(HEADER + _line(FIRST, "a", 5, told) + _line(FIRST, "b", 5, told))
    office.land(FIRST)
    office.path(WEEK[1]).write_text(HEADER + _line(FIRST, "a", 5, told))
    office.land(WEEK[1])
    office.path(FIRST).write_text(HEADER + _line(FIRST, "a", 5, told) + _line(FIRST, "b", 6, told))
    office.land(FIRST, hour=60)
    assert [(line, value) for line, value, _ in _standing(office)] == [("a", 5.0), ("b", 6.0)]


def test_volume_is_of_live_rows(office: Office) -> None:
    for week in range(1, 4):
        for attempt in range(3):
            office.export(FIRST - timedelta(weeks=week), revenue=10 + attempt)
            office.land(FIRST - timedelta(weeks=week), hour=4 + attempt)
    assert stage._usual(office.lake, office.workflow, FIRST) == 20
    assert stage._volume(office.lake, office.workflow, FIRST, 20)[0]
    assert not stage._volume(office.lake, office.workflow, FIRST, 61)[0]


def test_a_restated_row_does_not_count_twice_in_the_volume(office: Office) -> None:
    for week in range(4):
        day = FIRST - timedelta(weeks=week)
        office.export(day)
        rows = office.path(day).read_text()
        later = day + timedelta(days=2)
        again = rows.partition("\n")[2].replace(f"{day + timedelta(days=1)} 01:30:00", f"{later} 01:30:00")
        office.path(day).write_text(rows + again * (week > 0))
        office.land(day, hour=30)
    assert office.lake.read("ad_budget/events", days=[FIRST - timedelta(weeks=1)]).num_rows == 40
    assert stage._usual(office.lake, office.workflow, FIRST) == 20
    office.path(FIRST).write_text(office.path(FIRST).read_text() + again.replace(str(day), str(FIRST)))
    (counted,) = json.loads(json.dumps(office.run(FIRST)["volume"].metadata["by day"].value))
    assert (counted["rows"], counted["usual"]) == (20, 20)


def test_volume_and_quarantine_can_be_read_as_numbers(office: Office) -> None:
    office.export(FIRST, broken=1)
    checks = office.run(FIRST)
    volume = json.loads(json.dumps(checks["volume"].metadata["by day"].value))
    assert volume == [{"day": str(FIRST), "rows": 19, "usual": None}]
    (day,) = json.loads(json.dumps(checks["quarantine"].metadata["by day"].value))
    assert (day["accepted"], day["quarantined"], day["share"]) == (19, 1, 0.05)


def _as_an_earlier_release_wrote(lake: Lake) -> None:
    """Both tables without the columns that have come since."""
    for table, added in (
        ("quarantine", ["day", "weight", "event", "superseded_at"]),
        ("files", ["left_at", "mapping", "known_from"]),
    ):
        rows = lake.read(f"ad_budget/{table}").drop_columns(added)
        shutil.rmtree(Path(lake.uri(f"ad_budget/{table}")))
        lake.replace(
            f"ad_budget/{table}", rows, predicate="true", partition_by=["landed_day"] if table == "quarantine" else []
        )


def test_a_lake_of_an_earlier_release_is_judged_by_the_day_of_landing(office: Office) -> None:
    office.export(FIRST, broken=10)
    office.land(FIRST)
    office.export(FIRST, broken=4)
    office.land(FIRST, hour=5)
    _as_an_earlier_release_wrote(office.lake)
    share = office.shares()[WEEK[1]]
    assert (share.accepted, share.quarantined) == (0, 4), "those of the superseded content do not count"
    office.export(WEEK[1], broken=2)
    office.land(WEEK[1], hour=5)
    assert office.shares()[WEEK[1]].quarantined == 6 and office.shares()[FIRST].quarantined == 0
    assert office.land(WEEK[1], hour=6).outdated == (), "what an earlier release landed is not called outdated"
