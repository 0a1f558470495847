"""Both local downstream systems of a state folder together: set up, running, going on where they were; and their command."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from delivery.sandbox.systems import Setup, Systems, history
from delivery.sandbox.worlds import advertising, tickets
from orchestration.cli import command, sandbox
from pipeline.workflow import FOLDER, load

START = date(2026, 3, 2)
SETUP = Setup(3, START, 4, lines=12, teams=2)
DAY = timedelta(days=1)
NAMES = ("SIGNALBOX_ADS_TOKEN", "SIGNALBOX_HELPDESK_TOKEN", "SIGNALBOX_ADS_ENDPOINT", "SIGNALBOX_HELPDESK_URL")


def landed(landing: Path) -> list[str]:
    return sorted(p.relative_to(landing).as_posix() for p in landing.rglob("*") if p.is_file())


def exports(first: date, days: int) -> list[str]:
    span = [first + n * DAY for n in range(days)]
    return sorted(
        [f"ad_budget/export/advertising_{d}.csv.gz" for d in span]
        + [f"ticket_priority/export/tickets-{d}.jsonl.gz" for d in span]
    )


def open_tickets(world: tickets.World) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = world.open_tickets().to_pylist()
    return rows


# --- which worlds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setup",
    [
        SETUP,
        Setup(7, START, 35),
        replace(SETUP, load=0.75, advertising_drift=START + 9 * DAY, tickets_drift=START + DAY),
    ],
)
def test_a_setup_is_read_as_it_was_written(tmp_path: Path, setup: Setup) -> None:
    assert Setup.read(tmp_path) is None
    setup.write(tmp_path / "not" / "there" / "yet")
    assert Setup.read(tmp_path / "not" / "there" / "yet") == setup
    assert setup.opened == setup.start + setup.history_days * DAY
    assert len(asdict(setup)) == len(fields(Setup))


def test_the_same_setup_makes_the_same_worlds_and_another_seed_others() -> None:
    def seen(setup: Setup) -> tuple[Any, Any]:
        queue = setup.tickets()
        for n in range(3):
            queue.advance(START + n * DAY)
        rows = advertising.history(setup.advertising(), START, 3)
        return rows.drop_columns(
            ["exported_at"]
        ).to_pydict() if "exported_at" in rows.schema.names else rows.to_pydict(), open_tickets(queue)

    assert str(seen(SETUP)) == str(seen(SETUP))
    assert str(seen(SETUP)) != str(seen(replace(SETUP, seed=4)))
    assert SETUP.advertising().lines == 12 and len(SETUP.tickets().teams) == 2


def test_history_writes_every_days_exports_and_leaves_the_queue_where_it_stands_then(tmp_path: Path) -> None:
    queue = history(SETUP, tmp_path / "landing")
    assert landed(tmp_path / "landing") == exports(START, SETUP.history_days)
    again = SETUP.tickets()
    for n in range(SETUP.history_days):
        again.advance(START + n * DAY)
    assert open_tickets(queue) == open_tickets(again) and open_tickets(queue)
    assert queue.next_day in (None, SETUP.opened)


# --- both, running ----------------------------------------------------------------------------------------------------


def get(url: str, token: str, kind: str) -> httpx.Response:
    return httpx.get(url, headers={"Authorization": f"{kind} {token}"}, timeout=20)


def open_to_others(state: Path) -> list[str]:
    """Folders, databases and tokens below a folder that anybody but their owner may read."""
    secret = [f for f in (state, *state.rglob("*")) if f.is_dir() or "sqlite" in f.name or f.name == "tokens.json"]
    assert any(f.name.endswith("-wal") for f in secret), "the databases are in use"
    return [f"{f} {stat.S_IMODE(f.stat().st_mode):o}" for f in secret if stat.S_IMODE(f.stat().st_mode) & 0o077]


def test_both_run_on_free_ports_and_a_restart_goes_on_where_they_were(tmp_path: Path) -> None:
    landing, state = tmp_path / "landing", tmp_path / "sandbox"
    clock = lambda: datetime(2026, 3, 7, 4)  # noqa: E731
    with Systems(state, SETUP, ports=(0, 0), tickets_world=history(SETUP, landing), clock=clock) as both:
        said = both.environment
        assert sorted(said) == sorted(NAMES) and len({*said.values()}) == 4
        ads = get(f"{said['SIGNALBOX_ADS_ENDPOINT']}/sandbox/state", said["SIGNALBOX_ADS_TOKEN"], "Bearer")
        desk = get(f"{said['SIGNALBOX_HELPDESK_URL']}/tickets/", said["SIGNALBOX_HELPDESK_TOKEN"], "Token")
        assert ads.status_code == desk.status_code == 200 and desk.json()["results"]
        assert ads.json()["next_day"] == both.desk.state()["next_day"] == SETUP.opened.isoformat()
        assert httpx.get(f"{said['SIGNALBOX_ADS_ENDPOINT']}/sandbox/state").status_code == 401
        assert httpx.get(f"{said['SIGNALBOX_HELPDESK_URL']}/tickets/").status_code in (401, 403)
        assert stat.S_IMODE((state / "tokens.json").stat().st_mode) == 0o600, "everybody here can read the tokens"
        assert open_to_others(state) == [], "everybody here can read what holds tokens"
        line = sorted(both.ads.amounts())[0]
        ticket = next(name for name, t in both.desk.tickets().items() if t["status"] in (1, 2))
        both.ads.by_hand(line, 12_340_000)
        both.desk.person(ticket, priority=1)
        assert both.ads.changes()[0]["micros"] == (clock() - datetime(1970, 1, 1)) // timedelta(microseconds=1)
        both.ads.advance(landing / "ad_budget")
        both.desk.advance(landing / "ticket_priority")
        amounts, queue = both.ads.amounts(), both.desk.tickets()
        process = both.desk.process
    assert process is not None and process.poll() is not None
    for name in NAMES[2:]:
        with pytest.raises(httpx.ConnectError):
            httpx.get(said[name])
    assert landed(landing) == exports(START, SETUP.history_days + 1)

    with Systems(state, Setup.read(state) or SETUP, ports=(0, 0)) as both:  # made again without the world at hand
        assert {n: both.environment[n] for n in NAMES[:2]} == {n: said[n] for n in NAMES[:2]}, "new tokens"
        assert both.ads.amounts() == amounts and amounts[line] == 12_340_000
        assert both.desk.tickets() == queue
        assert both.ads.next_day.isoformat() == both.desk.state()["next_day"] == (SETUP.opened + DAY).isoformat()


def test_a_folder_keeps_its_worlds(tmp_path: Path) -> None:
    Systems(tmp_path, replace(SETUP, history_days=1), ports=(0, 0)).ads.close()
    with pytest.raises(ValueError, match="another world"):
        Systems(tmp_path, replace(SETUP, seed=4, history_days=1), ports=(0, 0))
    assert Setup.read(tmp_path) == replace(SETUP, history_days=1), "the folder now says another world than it holds"


def test_a_port_that_is_taken_ends_what_had_been_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        both = Systems(tmp_path, replace(SETUP, history_days=1), ports=(taken.getsockname()[1], 0))
        try:
            with pytest.raises(OSError, match="in use"):
                both.__enter__()
            left = both.desk.process
            assert left is None or left.poll() is not None, "the help desk runs on, and nobody holds it"
        finally:
            both.desk.stop()
            both.ads.close()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder, and an environment without the addresses of anybody's systems."""
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home" / "dagster"))
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the test sets
        monkeypatch.delenv(name)
    return tmp_path / "home"


def test_the_environment_fills_what_is_open_and_replaces_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.environment()
    assert not any(name in os.environ for name in NAMES), "there is no sandbox"
    folder = home / "sandbox"
    folder.mkdir(parents=True)
    (folder / "tokens.json").write_text(json.dumps({NAMES[0]: "token a", NAMES[1]: "token b"}))
    monkeypatch.setenv(NAMES[1], "of my own")
    sandbox.environment()
    assert (os.environ[NAMES[0]], os.environ[NAMES[1]]) == ("token a", "of my own") and NAMES[2] not in os.environ
    (folder / "running.json").write_text(json.dumps({NAMES[2]: "http://127.0.0.1:1", NAMES[3]: "http://127.0.0.1:2"}))
    sandbox.environment()
    assert [os.environ[n] for n in NAMES[2:]] == ["http://127.0.0.1:1", "http://127.0.0.1:2"]


def test_without_a_sandbox_no_day_passes_and_the_way_out_is_named(home: Path) -> None:
    result = CliRunner().invoke(command.app, ["sandbox", "advance"])
    assert result.exit_code != 0 and "signalbox sandbox up" in str(result.exception) + result.output


@dataclass
class Up:
    """``signalbox sandbox up`` in a process of its own."""

    process: subprocess.Popen[bytes]
    running: dict[str, str]
    output: Path

    def children(self) -> list[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]


def started(home: Path, *words: str) -> Up:
    output = home.with_name("up.log")
    with output.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestration.cli.command", "sandbox", "up", "--ports", "0", "0", *words],
            cwd=Path(command.__file__).parents[2], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONWARNINGS": "ignore", "COLUMNS": "200"},
        )  # fmt: skip
    file, until = home / "sandbox" / "running.json", time.monotonic() + 120
    while not (file.exists() and file.read_text().endswith("}")):
        assert process.poll() is None and time.monotonic() < until, output.read_text()
        time.sleep(0.05)
    return Up(process, json.loads(file.read_text()), output)


@pytest.fixture
def up(home: Path) -> Iterator[Up]:
    running = started(home, "--days", "2", "--seed", "3")
    yield running
    running.process.kill()
    running.process.wait()


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def answers(running: Mapping[str, str]) -> list[bool]:
    found = []
    for name in NAMES[2:]:
        try:
            found.append(httpx.get(running[name], timeout=5).status_code > 0)
        except httpx.ConnectError:
            found.append(False)
    return found


def test_the_command_runs_both_a_day_passes_in_both_and_a_signal_ends_both(up: Up, home: Path) -> None:
    start = min(load(FOLDER / name).start for name in ("ad_budget", "ticket_priority"))
    landing, opened = home / "landing", start + 2 * DAY
    assert landed(landing) == exports(start, 2)
    sandbox.environment()
    assert sorted(up.running) == sorted(NAMES[2:]) and answers(up.running) == [True, True]
    assert all(os.environ[name] == value for name, value in up.running.items())
    said = up.output.read_text()
    assert all(address.removesuffix("/api") in said for address in up.running.values())
    assert not any(os.environ[name] in said for name in NAMES[:2]), "a token on the terminal"

    result = CliRunner().invoke(command.app, ["sandbox", "advance", "--json"])

    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads(result.stdout)
    assert told["day"] == opened.isoformat() == told["tickets"]["day"] == told["advertising"]["day"]
    assert landed(landing) == exports(start, 3)
    came = datetime.combine(opened + DAY, datetime.min.time(), UTC).replace(hour=1, minute=30)
    for name in exports(opened, 1):
        assert datetime.fromtimestamp((landing / name).stat().st_mtime, UTC) == came, "when it would have come"

    (desk,) = up.children()
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(30) == 0, up.output.read_text()
    until = time.monotonic() + 10
    while not ended(desk) and time.monotonic() < until:
        time.sleep(0.05)
    assert ended(desk) and answers(up.running) == [False, False]
    assert not (home / "sandbox" / "running.json").exists() and "Traceback" not in up.output.read_text()
    result = CliRunner().invoke(command.app, ["sandbox", "advance"])
    assert "signalbox sandbox up" in str(result.exception)

    for name in NAMES:
        os.environ.pop(name, None)
    again = started(home)
    try:
        sandbox.environment()
        token = os.environ["SIGNALBOX_ADS_TOKEN"]
        state = get(f"{again.running['SIGNALBOX_ADS_ENDPOINT']}/sandbox/state", token, "Bearer").json()
        assert state["next_day"] == (opened + DAY).isoformat(), "it began anew"
        (desk,) = again.children()
        again.process.kill()  # no time to tidy up: the help desk must notice by itself
        again.process.wait()
        until = time.monotonic() + 10
        while not ended(desk) and time.monotonic() < until:
            time.sleep(0.05)
        assert ended(desk) and answers(again.running) == [False, False]
    finally:
        again.process.kill()
        again.process.wait()


def test_addresses_that_a_killed_sandbox_left_behind_are_said_to_be_dead(home: Path) -> None:
    SETUP.write(home / "sandbox")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name, said in (("tokens", {n: "t" * 16 for n in NAMES[:2]}), ("running", dict.fromkeys(NAMES[2:], address))):
        (home / "sandbox" / f"{name}.json").write_text(json.dumps(said))
    sandbox.environment()
    result = CliRunner().invoke(command.app, ["sandbox", "advance"])
    assert result.exit_code != 0 and "signalbox sandbox up" in result.output + str(result.exception)
