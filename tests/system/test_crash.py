"""The process that pushes is killed at any instant, over and over: nothing is lost, nothing is over the pool, all is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.crashing import SETTINGS, Ads, CrashHarness, Desk, Prepared, Tables, Tally
from tests.support.postgres import Server

pytestmark = pytest.mark.system

SEED = 20261121
LEAST = 40
"""Kills in all; ``python -m tests.support.crashing --kills 300`` is the soak."""


@pytest.fixture(scope="module")
def prepared(postgres: Server) -> Iterator[Prepared]:
    """After ``postgres``, whose password the children need."""
    with Prepared() as running:
        yield running


@pytest.fixture(scope="module")
def url(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """An empty database of a kind."""

    def make(kind: str, name: str) -> str:
        if kind == "postgres":
            return postgres.database(name)
        return f"sqlite:///{tmp_path_factory.mktemp(name) / 'database.db'}"

    return make


@pytest.fixture(scope="module")
def ads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ads]:
    with closing(Ads(tmp_path_factory.mktemp("crash-ads"))) as system:
        yield system


@pytest.fixture
def own_ads(tmp_path: Path) -> Iterator[Ads]:
    """For a test that holds writes back in its own way."""
    with closing(Ads(tmp_path / "ads")) as system:
        yield system


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    templates = tmp_path_factory.getbasetemp() / "helpdesk-templates"
    with closing(Desk(tmp_path_factory.mktemp("crash-desk"), templates)) as system:
        yield system


@pytest.fixture(scope="module")
def tallies(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, Tally]]]:
    """What each test counted, printed at the end with the sum."""
    found: list[tuple[str, Tally]] = []
    yield found
    plugins = request.config.pluginmanager
    reporter = plugins.getplugin("terminalreporter")
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        for name, tally in [*found, ("in all", sum((t for _, t in found), Tally()))]:
            reporter.write_line(f"crash test, {name}: {tally}")


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
@pytest.mark.parametrize("system", ["ads", "desk"])
def test_a_killed_push_and_a_killed_rollback_end_as_intended(
    request: pytest.FixtureRequest,
    prepared: Prepared,
    url: Callable[[str, str], str],
    tallies: list[tuple[str, Tally]],
    system: str,
    database: str,
) -> None:
    downstream: Any = request.getfixturevalue(system)
    crashes = CrashHarness(prepared, downstream, url(database, f"crash_{system}"), SEED + len(tallies))
    while (left := LEAST // 4 - len(crashes.tally.kills)) > 0:
        crashes.round(max(1, left - 4), 3)
        crashes.abandoned(1)
    tallies.append((f"{downstream.name} over {database}", crashes.tally))


@pytest.mark.parametrize("system", ["ads", "table"])
def test_what_lies_between_batches_ends_as_intended(
    request: pytest.FixtureRequest,
    prepared: Prepared,
    url: Callable[[str, str], str],
    tmp_path: Path,
    tallies: list[tuple[str, Tally]],
    system: str,
) -> None:
    """A day sent in part and decided anew, another workflow on the same system, a rollback between days, all through kills."""
    with closing(Tables(url("sqlite", "tables-between")) if system == "table" else Ads(tmp_path / "ads")) as made:
        crashes = CrashHarness(prepared, made, url("sqlite", f"ledger-between-{system}"), SEED)
        crashes.between(2, 2)
        tallies.append((f"between batches, {system}", crashes.tally))
        assert len(crashes.tally.kills) >= 5


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_where_writes_have_a_condition_each_is_applied_exactly_once(
    prepared: Prepared, url: Callable[[str, str], str], tallies: list[tuple[str, Tally]], database: str
) -> None:
    with closing(Tables(url(database, "crash_table"))) as table:
        crashes = CrashHarness(prepared, table, url(database, "crash_table_ledger"), SEED + len(tallies))
        crashes.round(4, 2)
        crashes.abandoned(1)
    assert crashes.tally.repeated == 0
    tallies.append((f"{table.name} over {database}", crashes.tally))


def late_write(ads: Ads, prepared: Prepared, job: dict[str, Any], hold_s: float, skip: int = 0) -> None:
    """Kill a push while one of its writes, the first after ``skip``, is held on its way for ``hold_s``."""
    ads.sandbox.late = [hold_s] + [1e-9] * skip
    life = prepared.start(job)
    for _ in range(skip + 1):
        assert ads.sandbox.arrived.acquire(timeout=60), life.result
    life.kill()
    assert life.wait(60) and life.signal


def test_a_write_that_lands_after_its_sender_died_is_repeated_equal_and_every_repeat_is_counted(
    prepared: Prepared, own_ads: Ads, url: Callable[[str, str], str]
) -> None:
    ads = own_ads
    crashes = CrashHarness(prepared, ads, url("sqlite", "late"), SEED)
    batch_id, rows = crashes.record()
    base = len(ads.applied())
    job = crashes.job("push", batch_id)
    began = time.monotonic()
    late_write(ads, prepared, job, 6.0)
    # The next one waits for late_s, takes the write for lost and sends it again; it dies before it can say so.
    ads.sandbox.held = [0.3] * 20
    again = prepared.start(job)
    while not ads.sandbox.late_lines & {line for line, _ in ads.applied()[base:]}:
        assert time.monotonic() < began + 6, "it was not sent again in time"
        time.sleep(0.002)
    again.kill()
    assert again.wait(60) and again.signal
    ads.sandbox.held = []
    ended = prepared.run(job)
    assert ended.result["report"]["complete"]
    ads.settled()
    applied = ads.applied()[base:]
    assert len(applied) > len(set(applied)), "the late write never came"
    crashes.check(batch_id, rows, base, [], after=True)


def test_a_write_on_its_way_when_its_sender_died_is_waited_for_however_long_ago_it_was_written_down(
    prepared: Prepared, own_ads: Ads, url: Callable[[str, str], str]
) -> None:
    ads = own_ads
    crashes = CrashHarness(prepared, ads, url("sqlite", "on_its_way"), SEED)
    batch_id, rows = crashes.record()
    settings = {**SETTINGS, "concurrency": 1, "wave": 100, "rate_per_s": 4.0, "late_s": 2.0}
    job = crashes.job("push", batch_id) | {"settings": settings}
    # The whole wave is written down at once; its fifth write leaves seconds later, and arrives within late_s.
    late_write(ads, prepared, job, 1.7, skip=4)
    ended = prepared.run(crashes.job("rollback", batch_id) | {"settings": settings | {"rate_per_s": None}})
    assert ended.result["report"]["complete"], ended.result
    time.sleep(2.0)
    assert {r.entity: ads.values()[r.entity] for r in rows} == {r.entity: r.before for r in rows}


def test_the_kills_were_enough_and_fell_everywhere(tallies: list[tuple[str, Tally]]) -> None:
    if len(tallies) < 6:
        pytest.skip("only with the whole file")
    kills = [kill for name, tally in tallies for kill in tally.kills if "sql_table" not in name]
    assert len(kills) >= LEAST
    assert {kill.what for kill in kills if kill.phase == "in the middle"} == {"push", "rollback"}
    assert sum(kill.unacknowledged > 0 for kill in kills) >= 5, "between a write and its acknowledgement"
