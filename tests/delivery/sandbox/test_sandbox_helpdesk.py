"""The sandboxed help desk: a world's tickets stand in it, what is set there changes what comes, and nothing is lost."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import httpx
import pytest

from delivery.sandbox.helpdesk import Controls, HelpdeskSandbox, SandboxError, recipe
from delivery.sandbox.helpdesk.desk import KEEP_DAYS
from delivery.sandbox.worlds import tickets, working_hours
from tests.support.helpdesks import OPENED, START, TOKEN, sandbox, world

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "helpdesk-templates"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, templates: Path) -> Iterator[HelpdeskSandbox]:
    with sandbox(tmp_path_factory.mktemp("desk"), templates) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_left_over(desk: HelpdeskSandbox) -> None:
    desk.reset()


def api(desk: Controls) -> httpx.Client:
    return httpx.Client(base_url=desk.api_url, headers={"Authorization": f"Token {TOKEN}"}, timeout=20)


def some_open(desk: Controls, count: int) -> list[str]:
    found = [name for name, ticket in desk.tickets().items() if ticket["status"] in (1, 2)]
    assert len(found) >= count
    return found[:count]


def open_in(now: tickets.World) -> dict[str, int]:
    return {row["ticket_id"]: row["priority"] for row in now.open_tickets().to_pylist()}


def test_the_worlds_open_tickets_stand_under_their_own_numbers(tmp_path: Path, templates: Path) -> None:
    with sandbox(tmp_path / "desk", templates) as desk, api(desk) as client:
        shown = {t["id"]: t for t in client.get("tickets/", params={"page_size": 1000}).json()["results"]}
    there = {int(row["ticket_id"][1:]): row for row in world().open_tickets().to_pylist()}
    assert there and there.keys() == {n for n, t in shown.items() if t["status"] in (1, 2)}
    for number, row in there.items():
        assert shown[number]["priority"] == row["priority"]
        assert shown[number]["on_hold"] == (row["state"] == "waiting")
        assert shown[number]["title"].startswith(row["category"])
        assert shown[number]["due_date"] == row["due_at"].isoformat() + "Z"
    teams = {shown[n]["queue"]: row["team"] for n, row in there.items()}
    assert len(teams) == len(set(teams.values())) == 3


def test_priorities_that_stand_in_the_help_desk_are_served_and_the_export_is_the_worlds(
    tmp_path: Path, templates: Path
) -> None:
    alone = world()
    with sandbox(tmp_path / "desk", templates) as desk, api(desk) as client:
        for n in range(3):
            day = OPENED + n * DAY
            names = some_open(desk, 6)
            set_here = {name: 5 - desk.tickets()[name]["priority"] // 2 for name in names}
            for name, priority in set_here.items():
                client.patch(f"tickets/{int(name[1:])}/", json={"priority": priority}).raise_for_status()
            said = desk.advance(tmp_path / "landing")
            events = alone.step(day, set_here)
            ours = tickets.export_day(events, tmp_path / "alone", day)
            assert Path(said["export"]) == tmp_path / "landing" / "export" / f"tickets-{day}.jsonl.gz"
            assert Path(said["export"]).read_bytes() == ours.read_bytes()
            assert [p.name for p in (tmp_path / "landing" / "export").iterdir() if p.name.startswith(".")] == []
            assert (said["day"], said["events"]) == (day.isoformat(), events.num_rows)
        assert open_in(alone) == {k: t["priority"] for k, t in desk.tickets().items() if t["status"] in (1, 2)}
        again = desk.replay()
    assert again.open_tickets().equals(alone.open_tickets())
    untouched = world()
    for n in range(3):
        untouched.advance(OPENED + n * DAY)
    assert not untouched.open_tickets().equals(alone.open_tickets()), "the priorities changed nothing"


def test_what_people_do_stays_while_days_go_by(desk: HelpdeskSandbox, tmp_path: Path) -> None:
    open_tickets = world().open_tickets().to_pylist()
    youngest = [row["ticket_id"] for row in sorted(open_tickets, key=lambda r: r["opened_at"])][-8:]
    chosen = [name for name in youngest if desk.tickets()[name]["status"] == 1]
    raised, closed = chosen[0], chosen[1]
    other = 1 if desk.tickets()[raised]["priority"] != 1 else 2
    desk.person(raised, priority=other)
    desk.person(closed, status=4)
    desk.advance(tmp_path)
    assert desk.tickets()[raised]["priority"] == other
    assert desk.replay().priority[int(raised[1:]) - 1] == other
    assert desk.tickets()[closed]["status"] in (3, 4), "the world took a closed ticket back"


def test_a_ticket_deleted_by_somebody_stays_deleted(desk: HelpdeskSandbox, tmp_path: Path) -> None:
    name = some_open(desk, 1)[0]
    with api(desk) as client:
        assert client.delete(f"tickets/{int(name[1:])}/").status_code == 204
    desk.advance(tmp_path)
    assert name not in desk.tickets()


def test_what_was_resolved_days_ago_is_archived(desk: HelpdeskSandbox, tmp_path: Path) -> None:
    for _ in range(KEEP_DAYS + 1):
        desk.advance(tmp_path)
    now = desk.replay()
    since = (now.next_day - KEEP_DAYS * DAY - tickets.EPOCH).days * working_hours.DAY
    closed = {name for name, ticket in desk.tickets().items() if ticket["status"] in (3, 4)}
    assert closed and all((now.resolved[int(name[1:]) - 1] or 0) >= since for name in closed if name in late(now))
    assert len(closed) < sum(state in ("resolved", "closed") for state in now.state) / 2


def late(now: tickets.World) -> set[str]:
    """Tickets that the world itself shows as resolved or closed (a person may close one before)."""
    return {name for name, state in zip(now.ticket_id, now.state, strict=True) if state in ("resolved", "closed")}


def test_a_killed_help_desk_goes_on_where_it_was(tmp_path: Path, templates: Path) -> None:
    kept = sandbox(tmp_path / "desk", templates)
    with kept as desk:
        name = some_open(desk, 1)[0]
        desk.person(name, priority=5)
        desk.advance(tmp_path)
        before = desk.tickets(), desk.state()
    # Ended in the middle of a day: it was written down and nothing of it was carried out; and in the middle of a line
    recipe.append(tmp_path / "desk", OPENED + DAY, {})
    with (tmp_path / "desk" / recipe.LOG).open("a") as log:
        log.write('{"day": "2026-03-1')
    straight = world()
    events = [straight.step(OPENED + n * DAY, {name: 5} if n == 0 else None) for n in range(2)]
    with kept as desk:
        assert desk.state()["next_day"] == (OPENED + 2 * DAY).isoformat()
        assert open_in(straight) == {k: t["priority"] for k, t in desk.tickets().items() if t["status"] in (1, 2)}
        said = desk.advance(tmp_path, day=OPENED + DAY)
        assert said["day"] == (OPENED + DAY).isoformat() == Path(said["export"]).name[8:18]
        desk.advance(tmp_path, day=OPENED + 2 * DAY)
        after = desk.tickets()
        with pytest.raises(SandboxError, match="2026-03-15 is next"):
            desk.advance(tmp_path, day=OPENED)
        again = desk.replay()
    events.append(straight.step(OPENED + 2 * DAY))
    assert again.open_tickets().equals(straight.open_tickets())
    assert before[1]["next_day"] == (OPENED + DAY).isoformat() and before[0].keys() != after.keys()
    assert open_in(straight) == {k: t["priority"] for k, t in after.items() if t["status"] in (1, 2)}
    for n in range(3):
        ours = tickets.export_day(events[n], tmp_path / "ours", OPENED + n * DAY)
        assert (tmp_path / "export" / ours.name).read_bytes() == ours.read_bytes()


def test_a_broken_export_is_written_again_whole(desk: HelpdeskSandbox, tmp_path: Path) -> None:
    said = desk.advance(tmp_path, break_schema=True)
    first = json.loads(gzip.decompress(Path(said["export"]).read_bytes()).split(b"\n")[0])
    assert "category_name" in first
    desk.export(tmp_path)
    again = json.loads(gzip.decompress(Path(said["export"]).read_bytes()).split(b"\n")[0])
    assert "category" in again and again["ticket_id"] == first["ticket_id"]


def test_a_day_whose_export_could_not_be_written_is_asked_for_again(desk: HelpdeskSandbox, tmp_path: Path) -> None:
    day = date.fromisoformat(desk.state()["next_day"])
    (tmp_path / "export").write_text("a file where the folder should be")
    with pytest.raises(SandboxError, match="export"):
        desk.advance(tmp_path, day=day)
    (tmp_path / "export").unlink()
    assert Path(desk.advance(tmp_path, day=day)["export"]).exists()
    assert desk.state()["next_day"] == (day + DAY).isoformat()
    world_now = desk.replay()
    open_now = {row["ticket_id"] for row in world_now.open_tickets().to_pylist()}
    assert {k for k, t in desk.tickets().items() if t["status"] in (1, 2)} <= open_now


def test_every_write_of_a_priority_is_counted(desk: HelpdeskSandbox) -> None:
    one, two = some_open(desk, 2)
    with api(desk) as client:

        def write(name: str, priority: int) -> int:
            return client.patch(f"tickets/{int(name[1:])}/", json={"priority": priority}).status_code

        assert [write(one, 2), write(one, 2), write(two, 9)] == [200, 200, 400]
        assert client.patch(f"tickets/{int(two[1:])}/", json={"on_hold": False}).status_code == 200
        desk.fault("error_after", method="PATCH", ticket=two)
        assert write(two, 3) == 500
        desk.fault("error_before", method="PATCH", times=2)
        assert [write(one, 4), write(two, 4), write(two, 5)] == [500, 500, 200]
    desk.person(one, priority=1)
    counted = [(a["ticket"], a["value"], a["by"]) for a in desk.applications()]
    assert counted == [(one, 2, "signalbox")] * 2 + [(two, 3, "signalbox"), (two, 5, "signalbox")]
    desk.reset()
    assert desk.applications() == []


def test_faults_come_as_often_as_asked_and_where_asked(desk: HelpdeskSandbox) -> None:
    one, two = some_open(desk, 2)
    desk.fault("too_many", ticket=one, times=1, seconds=7)
    with api(desk) as client:
        assert client.get(f"tickets/{int(two[1:])}/").status_code == 200
        refused = client.get(f"tickets/{int(one[1:])}/")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
        assert client.get(f"tickets/{int(one[1:])}/").status_code == 200
    with pytest.raises(SandboxError, match="explode"):
        desk.fault("explode")


def test_the_controls_want_the_token_and_say_what_they_know(desk: HelpdeskSandbox) -> None:
    stranger = Controls(desk.url, "another-token")
    with pytest.raises(SandboxError, match="token"):
        stranger.advance(Path("/nowhere"))
    stranger.close()
    for call, words in [
        (lambda: desk.person("T9999999", priority=1), "does not stand"),
        (lambda: desk.person("x", priority=1), "is not written like T0000123"),
        (lambda: desk._call("GET", "nothing"), "state, tickets and applications"),
        (lambda: desk._call("POST", "advance", {"today": 1}), "today"),
    ]:
        with pytest.raises(SandboxError, match=words):
            call()


def test_a_world_that_cannot_be_made_again_is_refused(tmp_path: Path, templates: Path) -> None:
    def start(other: tickets.World, next_day: date = OPENED, folder: str = "desk") -> None:
        HelpdeskSandbox(tmp_path / folder, other, next_day=next_day, token=TOKEN, templates=templates).start()

    with pytest.raises(ValueError, match="served until 2026-03-12"):
        start(world(), START)
    with pytest.raises(ValueError, match="order"):
        start(world().branch(lambda now, which, at: which))
    led = tickets.World(7, teams=3)
    for n in range((OPENED - START).days):
        names = led.open_tickets()["ticket_id"].to_pylist()
        led.advance(START + n * DAY, dict.fromkeys(names, 1))
    with pytest.raises(SandboxError, match="outside priorities"):
        start(led)
    with pytest.raises(ValueError, match="another world lives here"):
        start(world(seed=8))
    with pytest.raises(ValueError, match="8 to 40"):
        HelpdeskSandbox(tmp_path, world(), next_day=OPENED, token="short")


def test_it_ends_with_the_process_that_started_it(tmp_path: Path, templates: Path) -> None:
    desk = sandbox(tmp_path / "desk", templates).start()
    assert desk.process is not None and desk.process.stdin is not None
    desk.process.stdin.close()
    assert desk.process.wait(10) == 0
    desk.stop()


def test_the_token_stands_in_no_log_and_no_arguments(desk: HelpdeskSandbox) -> None:
    assert desk.process is not None
    assert TOKEN not in " ".join(desk.process.args)
    assert TOKEN not in (desk.folder / "server.log").read_text()
    assert TOKEN not in (desk.folder / recipe.RECIPE).read_text()
