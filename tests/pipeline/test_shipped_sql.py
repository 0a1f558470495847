"""What the shipped workflows' SQL makes of rows that come late, come again, or do not come."""

from __future__ import annotations

import gzip
import json
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline import ingest, point_in_time
from pipeline.lake import Lake
from pipeline.workflow import FOLDER, Workflow, load

D = date(2026, 4, 3)
HEADER = (
    "date,line_id,campaign,segment,format,placement,impressions,clicks,cost,revenue,budget,explore_multiplier,"
    "explore_probability,exported_at\n"
)


def before(days: int) -> date:
    return D - timedelta(days=days)


class Desk:
    """A landing zone and a lake of one shipped workflow."""

    def __init__(self, root: Path, name: str) -> None:
        self.workflow: Workflow = load(FOLDER / name)
        self.root, self.lake, self.files = root / "landing", Lake(str(root / "lake")), 0

    def put(self, *rows: Any) -> None:
        """One more file of the source ``export``, and what lands of it; each row is accepted."""
        self.files += 1
        name = (self.root / self.workflow.name / self.workflow.sources["export"].files).as_posix()
        path = Path(name.replace("{day}", f"2026-01-{self.files:02d}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = (
            HEADER + "".join(rows) if self.workflow.name == "ad_budget" else "".join(json.dumps(r) + "\n" for r in rows)
        )
        path.write_bytes(gzip.compress(whole.encode()))
        got = ingest.ingest(self.workflow, self.lake, self.root, now=datetime(2026, 4, 20))
        assert not got.quarantined and not got.refused, (got.rules, got.refused)

    def features(self, day: date = D) -> dict[str, dict[str, Any]]:
        ((_, table),) = point_in_time.features(self.workflow, self.lake, [day])
        return {" ".join(filter(None, (r["entity_id"], r.get("moment")))): r for r in table.to_pylist()}

    def outcomes(self, *days: date) -> dict[date, list[dict[str, Any]]]:
        return {d: t.to_pylist() for d, t in point_in_time.outcomes(self.workflow, self.lake, days)}

    def decided(self, day: date = D) -> list[str]:
        ((_, table),) = point_in_time.features(self.workflow, self.lake, [day])
        return point_in_time.chosen(self.workflow, table, "policy.decide_on")["entity_id"].to_pylist()


# --- ad_budget --------------------------------------------------------------------------------------------------------


def line(
    day: date, name: str = "a", *, cost: float = 5, revenue: float = 10, budget: str = "6.00", known: date | None = None,
    multiplier: float = 1, impressions: int = 1000,
) -> str:  # fmt: skip
    known = known or day + timedelta(days=1)
    clicks = 10 if impressions else 0
    return f"{day},{name},c1,new,video,feed,{impressions},{clicks},{cost},{revenue},{budget},{multiplier},,{known} 01:30:00\n"


@pytest.fixture
def ads(tmp_path: Path) -> Desk:
    return Desk(tmp_path, "ad_budget")


def test_a_restated_figure_of_a_past_day_counts_from_when_it_is_known(ads: Desk) -> None:
    ads.put(line(before(1), revenue=10))
    ads.put(line(D, revenue=11), line(before(1), revenue=25, known=D + timedelta(days=1)))
    assert ads.features(before(1))["a"]["value_7"] == 10, "a day that was decided sees what was known then"
    assert ads.features(D)["a"]["value_7"] == 36
    told = ads.outcomes(before(1), D)
    assert [(r["for_day"], r["value"]) for r in told[before(1)]] == [(before(2), 10)]
    assert sorted((r["for_day"], r["value"]) for r in told[D]) == [(before(2), 25), (before(1), 11)]
    for stage, made in (("features", point_in_time.features), ("outcomes", point_in_time.outcomes)):
        span = [before(2), before(1), D]
        tables = [t for _, t in made(ads.workflow, ads.lake, span)]
        if stage == "features":  # a row of the day before, so that there is something to answer
            tables[0] = tables[1].set_column(
                tables[1].schema.get_field_index("day"), "day", pa.array([before(2)], pa.date32())
            )
        ads.lake.replace_days(f"ad_budget/{stage}", pa.concat_tables(tables, promote_options="default"), span)
    for day, value in ((before(1), 10), (D, 25)):
        rows = point_in_time.training_set(ads.workflow, ads.lake, day).to_pylist()
        assert [r["value"] for r in rows if r["day"] == before(2)] == [value], "a training takes the latest known"


@pytest.mark.parametrize(
    ("day_itself", "why"),
    [
        ([], "no row of the day"),
        ([line(D, cost=0, revenue=0, impressions=0)], "a row of zeros with its budget"),
        ([line(D, cost=0, revenue=0, impressions=0, budget="")], "a row of zeros without a budget"),
    ],
)
def test_a_line_without_impressions_keeps_its_budget_and_is_decided_on_again(
    ads: Desk, day_itself: list[str], why: str
) -> None:
    ads.put(line(before(2), budget="7.00"), line(before(1)), line(before(1), "other"))
    ads.put(*day_itself, line(D, "other"))
    row = ads.features(D)["a"]
    assert row["budget_micros"] == 6_000_000 and sorted(ads.decided(D)) == ["a", "other"], why
    assert row["budget_age"] == (0 if day_itself and "6.00" in day_itself[0] else 1)


def test_without_known_budgets_the_last_cost_above_zero_stands_in(ads: Desk) -> None:
    ads.put(line(before(2), cost=3, budget=""), line(before(1), cost=4, budget=""), line(D, cost=0, budget=""))
    assert ads.features(D)["a"]["budget_micros"] == 4_000_000


def test_a_line_has_ended_after_a_week_without_a_row_or_with_a_budget_of_zero(ads: Desk) -> None:
    ads.put(
        line(before(7), "gone"), line(before(6), "quiet"), line(before(1), "off"), line(D, "off", cost=0, budget="0")
    )
    rows = ads.features(D)
    assert {name: r["budget_micros"] for name, r in rows.items()} == {"gone": 0, "quiet": 6_000_000, "off": 0}
    assert rows["gone"]["budget_age"] is None and ads.decided(D) == ["quiet"]


def test_a_line_that_was_switched_on_again_has_its_new_budget_at_once(ads: Desk) -> None:
    ads.put(line(before(9), budget="9.00"), line(D, budget="2.00", multiplier=1.2))
    row = ads.features(D)["a"]
    assert (row["budget_micros"], row["budget_age"], row["explore_multiplier_today"]) == (2_000_000, 0, 1.2)


def test_the_multiplier_is_of_the_row_that_the_budget_is_of(ads: Desk) -> None:
    ads.put(line(before(2), budget="12.00", multiplier=1.2), line(D, "other"))
    row = ads.features(D)["a"]
    assert (row["budget_micros"], row["explore_multiplier_today"], row["budget_age"]) == (12_000_000, 1.2, 2)


# --- ticket_priority --------------------------------------------------------------------------------------------------


def update(at: datetime, state: str, updates: int, known: date, **more: Any) -> dict[str, Any]:
    said = dict.fromkeys(load(FOLDER / "ticket_priority").sources["export"].columns or ())
    told = {
        "ticket_id": "T1", "updated_at": f"{at}", "exported_at": f"{known + timedelta(days=1)} 01:00:00", "state": state,
        "opened_at": f"{datetime.combine(before(2), time(9))}", "due_at": f"{datetime.combine(D, time(9))}", "priority": 3,
        "impact": 2, "urgency": 2, "team": "network", "category": "c", "reassignments": 0, "reopens": 0, "updates": updates,
    }  # fmt: skip
    return said | told | more


def at(day: date, hour: int) -> datetime:
    return datetime.combine(day, time(hour))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, "ticket_priority")


def test_an_older_update_that_comes_in_late_opens_no_closed_ticket(desk: Desk) -> None:
    day = before(2)
    desk.put(update(at(day, 10), "open", 0, day), update(at(day, 15), "closed", 2, day, sla_missed=False))
    desk.put(update(at(day, 12), "open", 1, before(1), priority=2))
    assert not desk.decided(before(1)) and "T1 open" not in desk.features(before(1))
    told = desk.outcomes(day, before(1), D)
    assert [(r["handling_hours"], r["open_hours"]) for r in told[day]] == [(6.0, None)]
    assert not told[before(1)] and not told[D], "what was told of it stands"


def test_of_an_open_tickets_updates_the_newest_describes_it_whichever_came_last(desk: Desk) -> None:
    day = before(2)
    desk.put(update(at(day, 10), "open", 0, day), update(at(day, 15), "open", 2, day, priority=1, team="mail"))
    desk.put(update(at(day, 12), "waiting", 1, before(1), priority=4))
    row = desk.features(before(1))["T1 open"]
    assert (row["priority"], row["team"], row["state"], row["updates"]) == (1, "mail", "open", 2)


def test_updates_of_one_moment_are_ordered_by_their_count(desk: Desk) -> None:
    day = before(2)
    desk.put(
        update(at(day, 10), "open", 0, day),
        update(at(day, 15), "resolved", 2, day),
        update(at(day, 15), "open", 1, day),
    )
    assert not desk.decided(day)
    desk.put(update(at(day, 15), "open", 3, before(1), reopens=1))
    assert desk.decided(before(1)) == ["T1"], "reopened"


def test_a_newer_update_that_is_known_after_the_cut_off_is_not_seen(desk: Desk) -> None:
    day = before(2)
    desk.put(update(at(day, 10), "open", 0, day), update(at(day, 15), "closed", 1, before(1), sla_missed=False))
    assert desk.decided(day) == ["T1"] and not desk.decided(before(1))
    assert [r["open_hours"] for r in desk.outcomes(day)[day]] == [18.0]
