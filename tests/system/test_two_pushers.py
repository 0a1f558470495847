"""Two processes that push at once, and clocks that jump: one writer at a time, nothing sent twice, the newer batch stands."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from delivery.ledger import FINAL, Ledger
from tests.support.crashing import PATIENCE_S, Ads, CrashHarness, Life, Prepared, Row
from tests.support.ledgers import KEY
from tests.support.postgres import Server

pytestmark = pytest.mark.system
SEED = 7


@pytest.fixture(scope="module")
def prepared(postgres: Server) -> Iterator[Prepared]:
    with Prepared() as running:
        yield running


@pytest.fixture
def ads(tmp_path: Path) -> Iterator[Ads]:
    with closing(Ads(tmp_path / "ads", lines=30)) as system:
        yield system


@pytest.fixture(params=["sqlite", "postgres"])
def crashes(
    request: pytest.FixtureRequest, prepared: Prepared, ads: Ads, postgres: Server, tmp_path: Path
) -> CrashHarness:
    name = f"pushers_{zlib.crc32(request.node.name.encode())}"
    url = postgres.database(name) if request.param == "postgres" else f"sqlite:///{tmp_path / 'ledger.db'}"
    return CrashHarness(prepared, ads, url, SEED)


def at_once(prepared: Prepared, jobs: list[dict[str, Any]]) -> list[Life]:
    """Both begin at one instant of the machine's clock, with everything open."""
    at = time.monotonic() + 1.0
    lives = [prepared.start(job | {"at": at}) for job in jobs]
    assert all(life.wait(PATIENCE_S) for life in lives)
    return lives


def changed(rows: list[Row]) -> dict[str, int]:
    return {r.entity: r.after for r in rows if r.before != r.after}


def wait_for(holds: Any) -> None:
    until = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_two_at_once_on_one_batch_one_wins_and_nothing_is_sent_twice(
    prepared: Prepared, crashes: CrashHarness, ads: Ads
) -> None:
    for _ in range(5):
        batch_id, rows = crashes.record()
        base = len(ads.applied())
        lives = at_once(prepared, [crashes.job("push", batch_id) for _ in range(2)])
        reports = [life.result["report"] for life in lives if "report" in life.result]
        assert reports and all(report["complete"] for report in reports), [life.result for life in lives]
        assert Counter(ads.applied()[base:]) == Counter(changed(rows).items())
        crashes.check(batch_id, rows, base, [], after=True)
        again = prepared.run(crashes.job("push", batch_id)).result["report"]
        assert again["complete"] and again["sends"] == 0 and "complete already" in again["why"]
        if len(reports) == 1:
            (won,) = (life for life in lives if "report" in life.result)
            (lost,) = (life for life in lives if life is not won)
            assert lost.result["error"] == "Busy"
            assert f"is being written to by process {won.pid} on" in lost.result["says"]
            assert "wait for it, or end that process" in lost.result["says"]
            return
    pytest.fail("they never met")  # once is nothing: on a busy machine the other one may come too late


@pytest.mark.parametrize("first", ["both", "older", "newer"])
def test_two_at_once_on_two_batches_the_newer_stands_and_nothing_is_sent_twice(
    prepared: Prepared, crashes: CrashHarness, ads: Ads, first: str
) -> None:
    older, old_rows = crashes.record()
    newer, new_rows = crashes.record()
    ads.sandbox.way_s = 0.03
    jobs = {"older": crashes.job("push", older), "newer": crashes.job("push", newer)}
    if first == "both":
        lives = dict(zip(jobs, at_once(prepared, list(jobs.values())), strict=True))
    else:
        lives = {first: prepared.start(jobs[first])}
        wait_for(lambda: len(ads.applied()) >= 2)
        other = "newer" if first == "older" else "older"
        lives[other] = prepared.run(jobs[other])
        assert lives[first].wait(PATIENCE_S)
    busy = [name for name, life in lives.items() if life.result.get("error") == "Busy"]
    older_was_sent = lives["older"].result.get("report", {}).get("sends", 0) > 0
    said = {name: life.result for name, life in lives.items()}
    if first == "older":
        assert busy == ["newer"], said
    assert first not in busy and not (busy == ["older"] and older_was_sent), said
    for name in busy:
        assert prepared.run(jobs[name]).result["report"]["complete"]

    goal = {r.entity: r.after for r in new_rows}
    assert {e: v for e, v in ads.values().items() if e in goal} == goal
    sent = [*changed(new_rows).items(), *(changed(old_rows).items() if older_was_sent else [])]
    assert Counter(ads.applied()) == Counter(sent)
    with Ledger.open(crashes.url, key=KEY) as ledger:
        states = Counter(d.state for d in ledger.deliveries(older))
        assert states == {"ACKED" if older_was_sent else "SKIPPED": len(changed(old_rows))}
        assert {d.state for d in ledger.deliveries(newer)} == {"ACKED"}
        assert ledger.verify().ok
    assert ads.over() == {}


def test_a_newer_batch_ends_an_older_one_whose_process_was_killed_in_the_middle(
    prepared: Prepared, crashes: CrashHarness, ads: Ads
) -> None:
    older, old_rows = crashes.record()
    newer, new_rows = crashes.record()
    life = prepared.start(crashes.job("push", older))
    wait_for(lambda: len(ads.applied()) >= 5)
    life.kill()
    assert life.wait(PATIENCE_S) and life.signal
    assert prepared.run(crashes.job("push", newer)).result["report"]["complete"]
    sent = len(ads.applied())
    late = prepared.run(crashes.job("push", older)).result["report"]
    assert late["complete"] and late["sends"] == 0 and len(ads.applied()) == sent
    assert max(Counter(ads.applied()).values()) == 1
    assert {e: ads.values()[e] for e in changed(new_rows)} == changed(new_rows)
    with Ledger.open(crashes.url, key=KEY) as ledger:
        states = Counter(d.state for d in ledger.deliveries(older))
        assert set(states) <= FINAL and states["SKIPPED"] > 0, states
        assert states["ACKED"] == len(set(changed(old_rows).items()) & set(ads.applied()))
        assert ledger.verify().ok
    assert ads.over() == {}


def test_a_clock_that_jumps_by_a_day_sends_nothing_twice_and_robs_nobody(
    prepared: Prepared, crashes: CrashHarness, ads: Ads
) -> None:
    batch_id, rows = crashes.record()
    job = crashes.job("push", batch_id) | {"clock": {"days": [0, 1, -1], "every": 3}}
    ads.sandbox.way_s = 0.1
    life = prepared.start(job)
    wait_for(lambda: len(ads.applied()) >= 3)
    for days in (2, -2):  # to this one the lease has run out long ago, or is not from yet
        robber = prepared.run(crashes.job("push", batch_id) | {"clock": {"days": [days]}})
        assert robber.result.get("error") == "Busy", robber.result
    assert not life.ended
    life.kill()
    assert life.wait(PATIENCE_S) and life.signal
    ads.sandbox.way_s = 0.01
    for days in ([1, 0], [-1, 1], [0, -1]):
        ended = prepared.run(job | {"clock": {"days": days, "every": 5}})
        assert "error" not in ended.result, ended.result
    assert ended.result["report"]["complete"]
    assert Counter(ads.applied()) == Counter(changed(rows).items())
    with Ledger.open(crashes.url, key=KEY) as ledger:
        assert {d.state for d in ledger.deliveries(batch_id)} == {"ACKED"}
        assert ledger.verify().ok
    assert ads.over() == {}
