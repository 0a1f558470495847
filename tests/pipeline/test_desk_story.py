"""A desk whose new tickets are all late, behind a stock of tickets that stay open: the figure that is judged must not read better."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from assets import performance as stage
from data_checks import performance as figures
from pipeline.lake import Lake
from pipeline.monitoring import labels
from pipeline.workflow import FOLDER, Workflow, load
from tests.support.retraining_walk import Walk

FIRST = date(2026, 3, 2)
DAYS, FALL, NEW, STOCK = 80, 45, 30, 300


@pytest.fixture(scope="module")
def tickets() -> Workflow:
    return load(FOLDER / "ticket_priority")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tickets: Workflow) -> Lake:
    """30 new tickets a day; one in five is late, from day 45 on all are. A late one stays open for 25 days, and once it is
    overdue the model knows that. 300 old ones stay open throughout."""
    draw = np.random.default_rng(1)
    rows: dict[str, list[object]] = {"day": [], "entity_id": [], "moment": [], "p_miss": []}
    told: dict[str, list[object]] = {"day": [], "entity_id": [], "known_at": [], "missed": []}

    def say(day: int, name: str, moment: str, p: float) -> None:
        if 0 <= day < DAYS:
            for column, value in zip(rows, (FIRST + timedelta(days=day), name, moment, p), strict=True):
                rows[column].append(value)

    def known(day: int, name: str, missed: bool) -> None:
        if 0 <= day < DAYS:
            on = FIRST + timedelta(days=day)
            at = datetime.combine(on, time(12))
            for column, value in zip(told, (on, name, at, missed), strict=True):
                told[column].append(value)

    for day in range(DAYS):
        for n in range(NEW):
            name = f"t{day}-{n}"
            hard = draw.random() < 0.3
            p = 0.45 if hard else 0.1
            late = draw.random() < p if day < FALL else True
            say(day, name, "intake", p)
            for later in range(25 if late else 2):
                say(day + later, name, "open", p if later < 2 else 0.97)
            known(day + (9 if late else 2), name, late)
    for n in range(STOCK):
        for day in range(DAYS):
            say(day, f"old{n}", "open", 0.9)
        known(0, f"old{n}", n % 10 > 0)
    lake = Lake(str(tmp_path_factory.mktemp("desk") / "lake"))
    days = [FIRST + timedelta(days=n) for n in range(DAYS)]
    scores = pa.table(rows).cast(
        pa.schema([("day", pa.date32()), ("entity_id", pa.string()), ("moment", pa.string()), ("p_miss", pa.float64())])
    )
    lake.replace_days(tickets.table("scores"), scores, days)
    lake.replace_days(tickets.table("features"), scores.drop_columns(["p_miss"]), days)
    scoring = {"day": pa.array(days, pa.date32()), "model_version": [1] * DAYS, "step": ["champion"] * DAYS}
    lake.replace_days(tickets.table("scoring"), pa.table(scoring), days)
    outcomes = pa.table(
        {
            "day": pa.array(told["day"], pa.date32()),
            "entity_id": told["entity_id"],
            "for_day": pa.nulls(len(told["day"]), pa.date32()),
            "known_at": pa.array(told["known_at"], pa.timestamp("us")),
            "missed": pa.array(told["missed"], pa.bool_()),
        }
    )
    lake.replace_days(tickets.table("outcomes"), outcomes, days)
    return lake


def test_new_tickets_that_are_all_late_start_a_retraining_whatever_the_stock_of_open_ones_reads(
    desk: Lake, tickets: Workflow
) -> None:
    every = tickets.model_copy(update={"training": tickets.training.model_copy(update={"evaluate_on": "true"})})
    trained = FIRST - timedelta(days=30)
    walk = Walk(tickets.name, tickets.retraining, labels.metric_of(tickets), trained=[trained])
    asked: list[int] = []
    plain: dict[int, float] = {}
    for day in range(FALL + 8, FALL + 18):
        at = FIRST + timedelta(days=day)
        found = labels.judge(tickets, desk, None, at)
        if walk.step(at, found, None) is not None:
            asked.append(day - FALL)
            assert not stage.verdict(tickets, found)[0]
    for day in (FALL + 27, FALL + 34):
        at = FIRST + timedelta(days=day)
        rows = labels.scored(every, desk, at)
        old = figures.judge(rows, at, kind="probability", spec=tickets.retraining, maturity_days=12)
        told = [r for r in figures.windows(old).to_pylist() if r["metric"] == "brier" and r["kind"] == "realised"]
        plain[day - FALL] = min(r["worse"] for r in told)
    print(f"asked {asked} days after the fall; each row counting alike: {plain}")
    # the outcomes of the first late tickets are mature on day 12
    assert asked and 12 <= asked[0] <= 16
    assert plain and max(plain.values()) < -0.2, "where every row counts alike it reads better"


def test_an_entity_counts_once_however_many_rows_it_has(tmp_path: Path) -> None:
    """Three old cases with 88% of the rows' error are three of 303 cases."""
    day = date(2026, 5, 1)
    days = [day - timedelta(days=n) for n in range(40)]
    rows: dict[str, list[object]] = {"day": [], "entity_id": [], "predicted": [], "actual": []}
    for on in days:
        for n in range(5):
            for column, value in zip(rows, (on, f"{on}-{n}", 0.2, float(n == 0)), strict=True):
                rows[column].append(value)
        for n in range(3):
            for _ in range(10):
                for column, value in zip(rows, (on, f"old{n}", 0.9, 0.0), strict=True):
                    rows[column].append(value)
    table = pa.table({**rows, "version": pa.array([1] * len(rows["day"]), pa.int64())})
    table = table.set_column(0, "day", table["day"].cast(pa.date32()))
    spec = figures.PerformanceSpec(min_rows=20)
    brier = {}
    for of in ("row", "entity"):
        found = figures.windows(figures.judge(table, day, kind="probability", spec=spec, outcome_of=of)).to_pylist()
        (brier[of],) = [r for r in found if r["metric"] == "brier" and r["kind"] == "realised"]
    assert brier["row"]["value"] == pytest.approx((5 * 0.16 + 30 * 0.81) / 35)
    assert brier["entity"]["value"] == pytest.approx((35 * 0.16 + 3 * 0.81) / 38) and brier["entity"]["n"] == 38
