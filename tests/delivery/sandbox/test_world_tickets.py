"""The ticket world: same seed same bytes, no ticket lost, no work beyond capacity, the load that was asked for."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from datetime import date, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from delivery.sandbox.worlds.tickets import COLUMNS, EPOCH, SERVICE_LEVEL_HOURS, Drift, World, export_day, history
from delivery.sandbox.worlds.working_hours import DAY, HOUR, service_seconds

START = date(2026, 1, 5)
DAYS = 28


def seconds(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.int64())) // 1_000_000


@pytest.fixture(scope="module")
def served() -> tuple[World, pa.Table]:
    world = World(7, load=0.9)
    return world, history(world, START, DAYS)


def test_one_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    def files(seed: int, folder: Path) -> list[bytes]:
        world = World(seed)
        days = [START + timedelta(days=d) for d in range(3)]
        return [export_day(world.step(day), folder, day).read_bytes() for day in days]

    first = files(3, tmp_path / "a")
    assert files(3, tmp_path / "b") == first
    assert files(4, tmp_path / "c") != first


def test_every_ticket_opens_once_and_ends_closed_or_still_open(served: tuple[World, pa.Table]) -> None:
    world, rows = served
    by_ticket = defaultdict(list)
    for ticket, state, updates in zip(*(rows[c].to_pylist() for c in ("ticket_id", "state", "updates")), strict=True):
        by_ticket[ticket].append((state, updates))
    assert sorted(by_ticket) == world.ticket_id
    still_open = set(world.open_tickets()["ticket_id"].to_pylist())
    for ticket, events in by_ticket.items():
        assert [u for _, u in events] == list(range(1, len(events) + 1)), ticket
        states = [s for s, _ in events]
        assert states[0] == "open"
        assert states.count("closed") == (states[-1] == "closed") <= 1
        assert (ticket in still_open) == (states[-1] in ("open", "waiting"))
    assert sum(e[-1][0] == "closed" for e in by_ticket.values()) > 0.7 * len(by_ticket)


def test_agents_work_one_ticket_at_a_time_and_only_in_their_teams_hours(served: tuple[World, pa.Table]) -> None:
    world, rows = served
    teams = {t.name: t for t in world.teams}
    begun: dict[str, tuple[str, int]] = {}
    intervals = defaultdict(list)
    columns = (*(rows[c].to_pylist() for c in ("ticket_id", "state", "assignee")), seconds(rows["updated_at"]).tolist())
    for ticket, state, assignee, at in zip(*columns, strict=True):
        working = assignee is not None and state == "open"
        if ticket in begun and not (working and begun[ticket][0] == assignee):
            agent, since = begun.pop(ticket)
            intervals[agent].append((since, at))
        if working and ticket not in begun:
            begun[ticket] = (assignee, at)
    assert len(intervals) == sum(t.agents for t in world.teams)
    for agent, spans in intervals.items():
        team = teams[agent.split("/")[0]]
        assert int(agent.split("/")[1]) <= team.agents
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), agent
        for at in (t for span in spans for t in span):
            second, weekday = at % DAY, (EPOCH + timedelta(days=at // DAY)).weekday()
            assert weekday in team.weekdays
            assert team.opens * HOUR <= second <= team.closes * HOUR


def test_the_work_that_arrives_is_the_load_asked_for_in_every_team() -> None:
    weeks, ratios = 8, []
    for seed in range(5):
        world = World(seed, load=0.9)
        work = np.zeros(len(world.teams))
        for d in range(7 * weeks):
            for request in world.requests(START + timedelta(days=d)):
                work[request.team] += request.effort / HOUR
                for team in request.wrong_teams:
                    work[team] += 0.1
        ratios.append(work / weeks / [t.hours_per_week for t in world.teams])
    assert np.mean(ratios) == pytest.approx(0.9, rel=0.04)
    assert np.all(np.abs(np.mean(ratios, axis=0) / 0.9 - 1) < 0.2)


def test_a_service_level_is_counted_in_service_hours_from_the_priority_at_opening(
    served: tuple[World, pa.Table],
) -> None:
    world, _ = served
    allowed = service_seconds(np.array(world.due)) - service_seconds(np.array(world.opened))
    promised = [SERVICE_LEVEL_HOURS[i + u - 1] * HOUR for i, u in zip(world.impact, world.urgency, strict=True)]
    assert allowed.tolist() == promised
    friday_evening = int(datetime(2026, 1, 9, 17).timestamp() - datetime(1970, 1, 1).timestamp())
    monday = service_seconds(np.array([friday_evening, friday_evening + 2 * DAY + 16 * HOUR]))
    assert monday[1] - monday[0] == 2 * HOUR


def test_a_miss_is_said_when_it_happens_and_a_hit_only_at_closing(served: tuple[World, pa.Table]) -> None:
    _, rows = served
    due, at, missed = seconds(rows["due_at"]), seconds(rows["updated_at"]), rows["sla_missed"].to_pylist()
    states, reopens = rows["state"].to_pylist(), rows["reopens"].to_pylist()
    assert {s for s, m in zip(states, missed, strict=True) if m is False} == {"closed"}
    assert all(a >= d for a, d, m in zip(at, due, missed, strict=True) if m)
    columns = zip(at, due, states, missed, reopens, strict=True)
    late = [m for a, d, s, m, r in columns if s == "open" and a > d and not r]
    assert late
    assert all(late)
    effort = rows["effort_hours"]
    assert pc.all(pc.equal(pc.is_valid(effort), pc.is_in(rows["state"], pa.array(["resolved", "closed"])))).as_py()


def test_the_world_lies_within_the_public_facts_it_is_calibrated_on(served: tuple[World, pa.Table]) -> None:
    _, rows = served
    closed = rows.filter(pc.equal(rows["state"], "closed"))
    met = 1 - pc.mean(closed["sla_missed"].cast(pa.float64())).as_py()
    assert 0.40 <= met <= 0.90
    assert 0.3 < pc.mean(pc.greater(closed["reassignments"], 0).cast(pa.float64())).as_py() < 0.5
    assert 4 < rows.num_rows / pc.count_distinct(rows["ticket_id"]).as_py() < 7
    assert pc.count_distinct(rows["team"]).as_py() >= 10
    efforts = np.sort(np.asarray(closed["effort_hours"]))
    tenth = efforts[-len(efforts) // 10 :].sum() / efforts.sum()
    assert tenth > 0.35, "efforts have a heavy tail: a tenth of the tickets is over a third of the work"


def test_priorities_given_change_who_is_served_but_not_what_is_asked() -> None:
    world = World(5, load=1.1)
    history(world, START, 10)
    day, waiting = START + timedelta(days=10), world.open_tickets()
    last = waiting.filter(pc.equal(waiting["priority"], 5))["ticket_id"].to_pylist()
    assert len(last) > 20
    pushed, left = world.branch(), world.branch()
    rows = pushed.step(day, dict.fromkeys(last, 1))
    left.step(day)
    changed = rows.filter(pc.and_(pc.is_in(rows["ticket_id"], pa.array(last)), pc.equal(rows["priority"], 1)))
    assert set(changed["ticket_id"].to_pylist()) == set(last)
    assert pushed.ticket_id == left.ticket_id
    assert (pushed.opened, pushed.due) == (left.opened, left.due)
    for d in range(1, 5):
        pushed.step(day + timedelta(days=d))
        left.step(day + timedelta(days=d))
    numbers = [world.ticket_id.index(t) for t in last]
    assert sum(pushed.resolved[i] is not None for i in numbers) > 2 * sum(left.resolved[i] is not None for i in numbers)
    assert len(world.open_tickets()) == len(waiting), "a branch must not change the world it came from"


def test_what_a_step_cannot_take_is_refused_with_the_ticket_and_the_reason() -> None:
    world = World(1)
    world.step(START)
    with pytest.raises(ValueError, match=r"2026-01-06 is next"):
        world.step(START)
    with pytest.raises(KeyError, match="T9999999"):
        world.step(START + timedelta(days=1), {"T9999999": 1})
    with pytest.raises(ValueError, match=r"T0000001.*priority 6"):
        world.step(START + timedelta(days=1), {"T0000001": 6})
    with pytest.raises(ValueError, match="teams 0"):
        World(1, teams=0)
    with pytest.raises(ValueError, match="load -1"):
        World(1, load=-1)


def test_a_closed_ticket_keeps_its_priority() -> None:
    world = World(2)
    rows = history(world, START, 8)
    closed = rows.filter(pc.equal(rows["state"], "closed"))["ticket_id"].to_pylist()
    assert closed
    later = world.step(START + timedelta(days=8), dict.fromkeys(closed, 1))
    assert not set(later["ticket_id"].to_pylist()) & set(closed)


@pytest.mark.parametrize("kind", ["new_category", "efforts"])
def test_drift_changes_nothing_before_its_day_and_the_named_thing_after(kind: str) -> None:
    start = START + timedelta(days=7)
    plain, drifted = World(3), World(3, drift=Drift(start, kind, team=2, size=0.6))  # type: ignore[arg-type]
    assert history(plain, START, 7).equals(history(drifted, START, 7))
    calm, changed = history(plain, start, 14), history(drifted, start, 14)
    new = set(changed["category"].to_pylist()) - set(calm["category"].to_pylist())
    if kind == "new_category":
        assert new == {"collaboration suite"}
        flood = changed.filter(pc.equal(changed["category"], "collaboration suite"))
        settled = flood.filter(pc.equal(flood["state"], "closed"))
        assert set(settled["team"].to_pylist()) == {drifted.teams[2].name}
    else:
        assert not new
        grown = [sum(e) for e in (plain._effort, drifted._effort)]
        before = sum(r.effort for d in range(7) for r in plain.requests(START + timedelta(days=d)))
        assert (grown[1] - before) / (grown[0] - before) == pytest.approx(1.6, rel=1e-3)


def test_an_export_holds_every_row_with_the_columns_in_order(tmp_path: Path) -> None:
    rows = World(1).step(START)
    path = export_day(rows, tmp_path, START)
    assert path.name == "tickets-2026-01-05.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    assert len(lines) == rows.num_rows
    assert all(tuple(line) == COLUMNS for line in lines)
    first = rows.slice(0, 1).to_pylist()[0]
    assert lines[0]["ticket_id"] == first["ticket_id"]
    assert lines[0]["opened_at"] == str(first["opened_at"])
    assert lines[0]["exported_at"] == "2026-01-06 01:00:00"
    assert lines[0]["sla_missed"] == "" and lines[0]["effort_hours"] == ""


def test_a_broken_schema_renames_the_category_and_nothing_else(tmp_path: Path) -> None:
    rows = World(1).step(START)

    def read(path: Path) -> list[dict[str, object]]:
        return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]

    sound = read(export_day(rows, tmp_path / "sound", START))
    broken = read(export_day(rows, tmp_path / "broken", START, break_schema=True))
    assert "category" not in broken[0]
    assert [{"category" if k == "category_name" else k: v for k, v in line.items()} for line in broken] == sound
