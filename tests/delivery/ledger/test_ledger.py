"""The ledger keeps what it is given, all or nothing, for one writer at a time, on SQLite and on PostgreSQL."""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from sqlalchemy import create_engine, inspect, text

from delivery.ledger import (
    FINAL,
    Attempt,
    Busy,
    Fenced,
    Head,
    Holder,
    Lease,
    Ledger,
    LedgerError,
    LedgerMismatch,
    LedgerNewer,
    LedgerUnavailable,
    Result,
    Unknown,
    database,
    pseudonyms,
    schema,
    verify,
)  # fmt: skip
from tests.support.ledgers import KEY, NOW, Clock, new_batch, some_decisions
from tests.support.postgres import Server

NUMBER = itertools.count()
ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    server: Server = request.getfixturevalue("postgres")
    return server.database(f"ledger_{next(NUMBER)}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(url: str, clock: Clock) -> Iterator[Ledger]:
    with Ledger.open(url, key=KEY, clock=clock) as opened:
        yield opened


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def file_book(file_url: str, clock: Clock) -> Iterator[Ledger]:
    """On SQLite only, where the database makes no difference."""
    with Ledger.open(file_url, key=KEY, clock=clock) as opened:
        yield opened


def acked(n: int, value: int = 120, **other: Any) -> Result:
    said = {
        "target": f"budget-{n}",
        "expected": 100,
        "prior": 100,
        "sent": value,
        "observed": value,
        "verified_at": NOW,
    }
    return Result(n, "ACKED", **(said | {"outcome": "accepted", "ended_at": NOW, "window_ms": 1.5} | other))


def attempt(n: int, value: int = 120) -> Attempt:
    return Attempt(n, value, 100, f"key-{n}", NOW)


def pushed(book: Ledger, batch_id: str = "b1", results: list[Result] | None = None, system: str = "ads") -> None:
    """Record a batch of four and push it."""
    book.record_batch(new_batch(batch_id), some_decisions(batch_id))
    results = results or [acked(n) for n in range(4)]
    lease = book.lease(system)
    book.open_push(lease, batch_id)
    book.begin(lease, batch_id, [attempt(one.n) for one in results])
    book.settle(lease, batch_id, results)
    book.close_push(lease, batch_id, all(one.state in FINAL for one in results) and len(results) == 4)
    book.release(lease)


# --- batches


def test_a_batch_comes_back_as_it_was_given_with_a_delivery_for_each_change(book: Ledger) -> None:
    given = some_decisions(changed=[True, False, True, True], perturbation=pa.array([0.1, None, -0.25, 1e-17]))
    row = book.record_batch(new_batch(), given)
    assert (row.sequence, row.rows, row.changed, row.delivery, row.counts) == (1, 4, 3, "NONE", {"PENDING": 3})
    asked = new_batch()
    assert {name: getattr(row, name) for name in vars(asked)} == vars(asked)
    assert book.batch("b1") == row
    back = book.decisions("b1")
    assert back.drop_columns(["n"]).select(given.column_names).equals(given)
    assert back["n"].to_pylist() == [0, 1, 2, 3]
    deliveries = book.deliveries("b1")
    assert [(d.n, d.entity, d.state, d.before, d.after, d.attempts) for d in deliveries] == [
        (n, f"line-{n}", "PENDING", 100, 120, 0) for n in (0, 2, 3)
    ]
    assert book.deliveries("b1", {"ACKED"}) == []
    assert book.verify().ok


def test_values_at_the_edges_survive(book: Ledger) -> None:
    odd = some_decisions(
        entities=["", "a,b", 'quote"', "new\nline", "ü\u2028"],
        unit=pa.array([None, "", "\\N", "NULL", "x"]),
        before=pa.array([None, -(2**63), 2**63 - 1, 0, 1]),
        expected_gain=pa.array([float("nan"), -0.0, 5e-324, float("inf"), 0.1 + 0.2]),
        reasons=pa.array([None, [], [""], [None], ["a\0b", "c"]], pa.list_(pa.string())),
    )
    book.record_batch(new_batch(), odd)
    back = book.decisions("b1")
    assert back["entity_id"].to_pylist() == odd["entity_id"].to_pylist()
    assert back["unit"].to_pylist() == [None, "", "\\N", "NULL", "x"]
    assert back["before"].to_pylist() == [None, -(2**63), 2**63 - 1, 0, 1]
    assert back["expected_gain"].to_pylist() == [None, 0.0, 5e-324, float("inf"), 0.1 + 0.2]
    assert back["reasons"].to_pylist() == [None, [], [""], [None], ["a\0b", "c"]]
    assert book.verify().ok


def test_an_empty_batch_is_a_batch(book: Ledger) -> None:
    row = book.record_batch(new_batch(), some_decisions(entities=0))
    assert (row.rows, row.counts) == (0, {})
    assert book.decisions("b1").num_rows == 0 and book.verify().ok


def test_recording_again_changes_nothing_and_other_content_is_refused(file_book: Ledger) -> None:
    first = file_book.record_batch(new_batch(), some_decisions())
    assert file_book.record_batch(new_batch(), some_decisions()) == first
    for new, decisions in (
        (new_batch(digest="e" * 64), some_decisions()),
        (new_batch(), some_decisions(after=pa.array([121, 120, 120, 120]))),
        (new_batch(), some_decisions(entities=3)),
    ):
        with pytest.raises(LedgerMismatch, match="b1 stands in the ledger with another content"):
            file_book.record_batch(new, decisions)
    assert len(file_book.events()) == 1 and file_book.verify().ok


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"entity_id": pa.array(["a", "a"])}, "entity_id must be there and differ"),
        ({"decision_id": pa.array(["a", None])}, "decision_id must be there"),
        ({"entity_id": pa.array(["a\0", "b"])}, "entity_id holds the character 0"),
    ],
)
def test_decisions_that_cannot_be_kept_are_refused_by_name(
    file_book: Ledger, columns: dict[str, Any], words: str
) -> None:
    with pytest.raises(LedgerError, match=f"batch b1: {words}"):
        file_book.record_batch(new_batch(), some_decisions(entities=2, **columns))
    with pytest.raises(LedgerError, match="lack the columns arm"):
        file_book.record_batch(new_batch(), some_decisions().drop_columns(["arm"]))
    assert file_book.batches() == []


def test_batches_are_found_by_workflow_day_kind_and_model(file_book: Ledger) -> None:
    for i, (workflow, version) in enumerate([("ad_budget", 3), ("ad_budget", 4), ("ticket_priority", 4)]):
        said = {"workflow": workflow, "day": date(2026, 4, 1 + i), "record": {"model_version": version}}
        file_book.record_batch(new_batch(f"b{i}", **said), some_decisions(f"b{i}"))
    file_book.record_batch(new_batch("r", kind="rollback", reverses="b1"), some_decisions("r"))

    def ids(*args: Any, **kwargs: Any) -> list[str]:
        return [row.batch_id for row in file_book.batches(*args, **kwargs)]

    assert ids() == ["b0", "b1", "b2", "r"]
    assert ids("ad_budget", kind="decision") == ["b0", "b1"]
    assert ids(since=date(2026, 4, 2), kind="decision") == ["b1", "b2"]
    assert ids(model_version=4) == ["b1", "b2"]
    assert file_book.batch("r").reverses == "b1"


def test_decisions_and_deliveries_are_found_by_name(book: Ledger) -> None:
    pushed(book)
    some = book.decisions("b1", ["line-3", "line-1", "nobody"])
    assert some["entity_id"].to_pylist() == ["line-1", "line-3"]
    assert book.decisions("b1", []).schema.equals(some.schema)
    one = book.decision(some["decision_id"][0].as_py())
    assert (one["entity_id"], one["batch"].batch_id, one["n"]) == ("line-1", "b1", 1)
    assert [d.target for d in book.deliveries_of(one["decision_id"])] == ["budget-1"]
    for call in (lambda: book.batch("no"), lambda: book.decision("no"), lambda: book.deliveries("no")):
        with pytest.raises(Unknown, match=r"no (batch|decision) 'no'"):
            call()


# --- pushing


def test_a_delivery_is_in_flight_before_it_is_sent_and_settles_with_its_attempt(book: Ledger, clock: Clock) -> None:
    book.record_batch(new_batch(), some_decisions())
    lease = book.lease("ads")
    book.open_push(lease, "b1")
    book.begin(lease, "b1", [attempt(0), attempt(1), attempt(2)])
    assert book.batch("b1").counts == {"IN_FLIGHT": 3, "PENDING": 1}
    book.settle(
        lease, "b1",
        [
            acked(0),
            Result(1, "CONFLICT", target="budget-1", observed=77, says="changed by somebody"),
            Result(2, "UNKNOWN", prior=100, sent=120, outcome="unknown", repeat=True),
            Result(3, "REJECTED", says="no such line"),
        ],
    )  # fmt: skip
    zero, one, two, three = book.deliveries("b1")
    assert (zero.state, zero.sent, zero.observed, zero.prior, zero.verified_at) == ("ACKED", 120, 120, 100, NOW)
    assert (one.state, one.says, one.expected) == ("CONFLICT", "changed by somebody", 100)
    assert (two.state, two.repeats, two.prior) == ("UNKNOWN", 1, 100)
    assert (three.state, three.attempts, three.says) == ("REJECTED", 0, "no such line")
    assert [(c.n, c.entity, c.expected, c.found, c.sent) for c in book.conflicts("b1")] == [
        (1, "line-1", 100, 77, None)
    ]
    assert [(a.n, a.outcome, a.window_ms) for a in book.attempts("b1")] == [
        (0, "accepted", 1.5),
        (1, None, None),
        (2, "unknown", None),
    ]
    with pytest.raises(LedgerError, match="b1 is not complete: 1 deliveries"):
        book.close_push(lease, "b1", True)
    book.begin(lease, "b1", [attempt(2)])
    book.settle(lease, "b1", [acked(2, prior=120)])
    again = book.deliveries("b1")[2]
    assert (again.prior, again.attempts, again.repeats) == (100, 2, 1), "what stood before our first write stays"
    book.close_push(lease, "b1", True)
    assert book.batch("b1").delivery == "COMPLETE" and book.verify().ok
    for call in (
        lambda: book.settle(lease, "b1", [acked(2)]),
        lambda: book.begin(lease, "b1", [attempt(2)]),
        lambda: book.open_push(lease, "b1"),
    ):
        with pytest.raises(LedgerError, match=r"complete|already delivered"):
            call()
    book.close_push(lease, "b1", True)


def test_an_attempt_left_open_by_a_crash_ends_as_unknown(file_book: Ledger) -> None:
    file_book.record_batch(new_batch(), some_decisions())
    lease = file_book.lease("ads")
    file_book.open_push(lease, "b1")
    file_book.begin(lease, "b1", [attempt(0)])
    file_book.begin(lease, "b1", [attempt(0)])
    assert [(a.attempt, a.outcome) for a in file_book.attempts("b1", 0)] == [(1, "unknown"), (2, None)]


def test_a_final_state_stays_but_an_overwrite_may_be_found_later(file_book: Ledger) -> None:
    file_book.record_batch(new_batch(), some_decisions())
    lease = file_book.lease("ads")
    file_book.open_push(lease, "b1")
    file_book.settle(lease, "b1", [acked(0), Result(1, "REJECTED")])
    with pytest.raises(LedgerError, match="delivery 1 is REJECTED, which stays"):
        file_book.settle(lease, "b1", [Result(1, "ACKED", observed=1, verified_at=NOW)])
    with pytest.raises(LedgerError, match="is REJECTED and is not sent again"):
        file_book.begin(lease, "b1", [attempt(1)])
    with pytest.raises(LedgerError, match="ACKED needs what the read-back showed"):
        file_book.settle(lease, "b1", [Result(2, "ACKED")])
    with pytest.raises(LedgerError, match="named twice"):
        file_book.settle(lease, "b1", [acked(2), acked(2)])
    with pytest.raises(Unknown, match="b1 has no delivery 9"):
        file_book.settle(lease, "b1", [acked(9)])
    file_book.settle(lease, "b1", [Result(0, "OVERWRITTEN", found=77, says="ann wrote 77")])
    assert [(c.state, c.found, c.sent) for c in file_book.conflicts("b1")] == [("OVERWRITTEN", 77, 120)]
    assert file_book.verify().ok


def test_a_push_that_is_not_open_writes_nothing(file_book: Ledger) -> None:
    file_book.record_batch(new_batch(), some_decisions())
    file_book.record_batch(new_batch("refused", status="REFUSED"), some_decisions("refused"))
    lease, other = file_book.lease("ads"), file_book.lease("tickets")
    with pytest.raises(LedgerError, match="open_push comes first"):
        file_book.begin(lease, "b1", [attempt(0)])
    with pytest.raises(LedgerError, match="refused: there is nothing to push"):
        file_book.open_push(lease, "refused")
    file_book.open_push(lease, "b1")
    with pytest.raises(LedgerMismatch, match="delivered to ads, and the lease is one of tickets"):
        file_book.begin(other, "b1", [attempt(0)])
    with pytest.raises(LedgerMismatch, match="delivered to ads"):
        file_book.open_push(other, "b1")


def test_what_was_proved_last_is_known_by_entity_and_by_shared_target(book: Ledger, clock: Clock) -> None:
    pushed(book)
    later = NOW + timedelta(hours=1)
    shared = [acked(n, 130 + n, target="budget-0", verified_at=later) for n in (0, 1)]
    pushed(book, "b2", [*shared, Result(2, "REJECTED"), Result(3, "SKIPPED")])
    known = book.acknowledged("ads", [f"line-{n}" for n in range(5)])
    assert {name: (one.value, one.batch_id) for name, one in known.items() if name not in ("line-0", "line-1")} == {
        "line-2": (120, "b1"), "line-3": (120, "b1"),
    }  # fmt: skip
    assert known["line-0"] == known["line-1"], "one budget holds one value"
    assert book.acknowledged("tickets", ["line-0"]) == {}


def test_superseding_skips_what_was_not_sent_and_seals_what_has_nothing_open(book: Ledger) -> None:
    for name in ("b1", "b2", "b3"):
        book.record_batch(new_batch(name), some_decisions(name))
    lease = book.lease("ads")
    book.open_push(lease, "b2")
    book.begin(lease, "b2", [attempt(0)])
    book.supersede(lease, ["b1", "b2"], "b3")
    assert (book.batch("b1").counts, book.batch("b1").delivery) == ({"SKIPPED": 4}, "COMPLETE")
    assert (book.batch("b2").counts, book.batch("b2").delivery) == ({"SKIPPED": 3, "IN_FLIGHT": 1}, "OPEN")
    assert book.batch("b2").superseded_by == "b3"
    assert {d.says for d in book.deliveries("b1")} == {"superseded by b3"}
    assert book.verify().ok


def test_a_superseded_batch_is_sealed_only_after_what_was_unknown_of_it_is_found_out(
    book: Ledger, clock: Clock
) -> None:
    for name in ("b1", "b2"):
        book.record_batch(new_batch(name), some_decisions(name, ["a", "b"]))
    lease = book.lease("ads")
    book.open_push(lease, "b1")
    book.begin(lease, "b1", [Attempt(0, 120, 100, "k", clock())])
    book.supersede(lease, ["b1"], "b2")
    assert book.verify().ok
    book.settle(lease, "b1", [Result(0, "ACKED", target="t", sent=120, observed=120, verified_at=clock())])
    assert book.verify().problems == [], "a process that dies here leaves it open, and it is nobody's forgery"
    book.close_push(lease, "b1", True)
    assert book.verify().ok and book.batch("b1").delivery == "COMPLETE"


def test_what_a_push_left_is_sealed_until_it_is_opened_again(book: Ledger, file_url: str, clock: Clock) -> None:
    book.record_batch(new_batch("b1"), some_decisions("b1", ["a", "b_%"]))
    book.record_batch(new_batch("b_1"), some_decisions("b_1", ["a", "b"]))
    lease = book.lease("ads")
    book.open_push(lease, "b_1")
    book.open_push(lease, "b1")
    book.close_push(lease, "b1", False)
    late = Result(0, "ACKED", target="t", sent=120, observed=120, verified_at=clock())
    for write in (
        lambda: book.settle(lease, "b1", [late]),
        lambda: book.begin(lease, "b1", [Attempt(0, 120, 100, "k", clock())]),
    ):
        with pytest.raises(LedgerError, match="b1 has ended, and is sealed as it stands: open_push comes first"):
            write()
    book.settle(lease, "b_1", [late])
    book.open_push(lease, "b1")
    book.settle(lease, "b1", [late])
    assert book.verify().ok


# --- one writer


def test_a_lease_keeps_others_out_until_it_is_released(book: Ledger) -> None:
    first = book.lease("ads", ttl_s=30)
    with pytest.raises(Busy, match=f"ads is being written to by process {os.getpid()}") as busy:
        book.lease("ads")
    assert busy.value.holder == Holder.here() and busy.value.expires_at == NOW + timedelta(seconds=30)
    assert book.lease("tickets").fence == 1, "each system has its own"
    book.release(first)
    assert book.lease("ads").fence == 2


def test_a_live_process_of_this_host_keeps_its_lease_when_the_clock_jumps(book: Ledger, clock: Clock) -> None:
    lease = book.lease("ads", ttl_s=30)
    clock.add(10 * 365 * 86400)
    with pytest.raises(Busy):
        book.lease("ads")
    assert book.renew(lease, 30).expires_at == clock.now + timedelta(seconds=30)


def test_a_dead_process_of_this_host_loses_its_lease_at_once(file_book: Ledger, file_url: str) -> None:
    code = f"from delivery.ledger import Ledger; print(Ledger.open({file_url!r}, key={KEY!r}).lease('ads', ttl_s=1e6))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert file_book.lease("ads").fence == 2


def test_a_killed_process_that_nobody_has_waited_for_counts_as_dead(file_book: Ledger) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline()
    holder = replace(Holder.here(), pid=child.pid, started=str(ledger_started(child.pid)))
    file_book.lease("ads", holder)
    with pytest.raises(Busy):
        file_book.lease("ads")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert file_book.lease("ads").fence == 2
    child.wait()


def ledger_started(pid: int) -> str | None:
    from delivery.ledger.leases import process_started

    return process_started(pid)


def test_another_process_with_the_number_of_a_dead_one_is_not_its_holder(file_book: Ledger) -> None:
    file_book.lease("ads", replace(Holder.here(), started="an earlier one"))
    assert file_book.lease("ads").fence == 2


def test_a_lease_of_another_host_ends_when_it_expires(book: Ledger, clock: Clock) -> None:
    theirs = book.lease("ads", Holder("elsewhere", os.getpid(), "then"), ttl_s=60)
    clock.add(59)
    with pytest.raises(Busy):
        book.lease("ads")
    clock.add(1)
    ours = book.lease("ads")
    assert ours.fence == theirs.fence + 1
    with pytest.raises(Fenced, match="the lease 1 of ads is no longer ours"):
        book.renew(theirs)
    book.release(theirs)
    assert book.renew(ours).fence == ours.fence, "giving back what is no longer ours takes nothing from its holder"


def test_every_write_through_a_lost_lease_is_fenced(book: Ledger, clock: Clock) -> None:
    book.record_batch(new_batch(), some_decisions())
    lost = book.lease("ads", Holder("elsewhere", 1, "then"))
    book.open_push(lost, "b1")
    book.begin(lost, "b1", [attempt(0)])
    clock.add(3600)
    book.lease("ads")
    before = (book.deliveries("b1"), book.attempts("b1"), book.head())
    writes: list[Callable[[], object]] = [
        lambda: book.open_push(lost, "b1"),
        lambda: book.begin(lost, "b1", [attempt(1)]),
        lambda: book.settle(lost, "b1", [acked(0)]),
        lambda: book.close_push(lost, "b1", False),
        lambda: book.supersede(lost, ["b1"], "b1"),
        lambda: book.settle(Lease("ads", 99, Holder.here(), NOW), "b1", [acked(0)]),
        lambda: book.settle(Lease("no such system", 1, Holder.here(), NOW), "b1", [acked(0)]),
    ]
    for write in writes:
        with pytest.raises(Fenced):
            write()
    assert (book.deliveries("b1"), book.attempts("b1"), book.head()) == before


def test_of_many_that_want_a_lease_at_once_one_gets_it(book: Ledger) -> None:
    got: list[object] = []
    gate = threading.Barrier(6)

    def want() -> None:
        gate.wait()
        try:
            got.append(book.lease("ads"))
        except Busy:
            got.append(None)

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6 and sum(one is not None for one in got) == 1


# --- people


def test_people_are_recorded_and_come_back_by_name(book: Ledger) -> None:
    book.record_batch(new_batch(status="HELD"), some_decisions())
    book.set_approver("ann", "$argon2id$one")
    book.set_approver("bob", "$argon2id$two")
    book.set_approver("ann", "$argon2id$three")
    assert [(one.name, one.secret_hash) for one in book.approvers()] == [
        ("ann", "$argon2id$three"),
        ("bob", "$argon2id$two"),
    ]
    assert "argon2" not in repr(book.approvers())
    book.revoke_approver("bob")
    assert [one.name for one in book.approvers()] == ["ann"]
    with pytest.raises(Unknown, match="no approver 'bob'"):
        book.revoke_approver("bob")
    expires = NOW + timedelta(hours=4)
    made = book.approve("b1", "d" * 64, "ann", "looks right", NOW, expires)
    assert book.approvals("b1") == [made] and made.approver == "ann"
    with pytest.raises(LedgerMismatch, match="another content than the one approved"):
        book.approve("b1", "e" * 64, "ann", "looks right", NOW, expires)

    assert book.stopped("ad_budget") is None
    stop = book.switch("ad_budget", True, "ann", "too high")
    assert book.stopped("ad_budget") == stop and book.stopped("ticket_priority") is None
    book.switch("ad_budget", False, "ann", "fine again")
    assert book.stopped("ad_budget") is None

    promoted = book.promotion("ad_budget", 3, "promoted", "ann", {"margin": 0.1})
    assert book.promotions("ad_budget") == [promoted]
    book.rollback_asked("b1", actor="ann", reason="harm", trigger="person")
    book.rollback_complete("b1", actor="ann", reason="harm", trigger="person", evidence={"ACKED": 3})
    assert [(r.action, r.evidence) for r in book.rollbacks("b1")] == [("asked", {}), ("complete", {"ACKED": 3})]
    assert book.verify().ok


def taken_back(book: Ledger, batch_id: str, results: list[Result]) -> None:
    """Record the rollback of a batch of four and settle some of it."""
    decided = book.decisions(batch_id)
    ids = [f"rollback-{one}" for one in decided["decision_id"].to_pylist()]
    back = some_decisions(
        batch_id, decided["entity_id"].to_pylist(), before=pa.array([120] * 4), after=pa.array([100] * 4)
    )
    back = back.set_column(back.column_names.index("decision_id"), "decision_id", [ids])
    name = f"rollback-{batch_id}"
    book.record_batch(replace(new_batch(name), kind="rollback", reverses=batch_id), back)
    if results:
        lease = book.lease("ads")
        book.open_push(lease, name)
        book.settle(lease, name, results)
        book.close_push(lease, name, len(results) == 4)
        book.release(lease)


def test_which_newer_batch_holds_an_entity_is_asked_of_the_database(book: Ledger) -> None:
    pushed(book)
    taken_back(book, "b1", [])
    assert book.held_by("rollback-b1", "b1", [], []) == {}
    # of the newer ones, one holds line-0 by its name and line-1 by what holds its value, one was taken back in part
    for name, targets in (("n1", ("budget-0", "budget-1", "x2", "x3")), ("n2", ("y0", "y1", "y2", "y3"))):
        lines = ["line-0", "other", "z2", "z3"] if name == "n1" else ["w0", "w1", "line-2", "line-3"]
        book.record_batch(new_batch(name), some_decisions(name, lines))
        lease = book.lease("ads")
        book.open_push(lease, name)
        book.settle(lease, name, [acked(n, target=target) for n, target in enumerate(targets)])
        book.close_push(lease, name, True)
        book.release(lease)
    assert book.held_by("rollback-b1", "b1", ["n1", "n2"], []) == {0: "n1", 1: "n1", 2: "n2", 3: "n2"}
    back = [acked(n, 100, observed=100) for n in range(3)]
    taken_back(book, "n2", [*back, Result(3, "SKIPPED", says="no money")])
    assert book.held_by("rollback-b1", "b1", ["n1"], ["rollback-n2"]) == {0: "n1", 1: "n1", 3: "n2"}
    # what was sent already is not asked about
    lease = book.lease("ads")
    book.open_push(lease, "rollback-b1")
    book.settle(lease, "rollback-b1", [acked(0, 100), Result(3, "SKIPPED", says="left")])
    book.release(lease)
    assert book.held_by("rollback-b1", "b1", ["n1"], ["rollback-n2"]) == {1: "n1"}
    left = book.left_of("n2", ["rollback-b1", "rollback-n2"])
    assert {(one.batch_id, one.n, one.before, one.after, one.state) for one in left} == {
        ("rollback-b1", 2, 120, 100, "PENDING"), ("rollback-b1", 3, 120, 100, "SKIPPED"), ("rollback-n2", 3, 120, 100, "SKIPPED"),
        *(("rollback-n2", n, 120, 100, "ACKED") for n in range(3)),
    }  # fmt: skip
    assert book.verify().ok


def test_a_rollback_is_closed_in_the_chain(book: Ledger) -> None:
    book.record_batch(new_batch(), some_decisions())
    book.rollback_asked("b1", actor="ann", reason="harm", trigger="person")
    book.rollback_closed("b1", actor="ann", reason="it is gone", trigger="person", evidence={"not_reversible": 1})
    assert [(r.action, r.evidence) for r in book.rollbacks("b1")][-1] == ("closed", {"not_reversible": 1})
    assert book.verify().ok and "ann" not in str([e.body for e in book.events("rollback") if e.body["actor"] != "ann"])


def test_events_of_other_kinds_can_be_noted_and_the_ledgers_own_cannot(file_book: Ledger) -> None:
    assert file_book.note("guard", {"workflow": "ad_budget", "actor": "guard", "rejected": 0.5}) == 1
    (event,) = file_book.events("guard", "ad_budget")
    assert (event.seq, event.at, event.body["actor"], event.body["rejected"]) == (1, NOW, "guard", 0.5)
    assert file_book.events(workflow="ticket_priority") == []
    with pytest.raises(LedgerError, match="the ledger's own"):
        file_book.note("approval", {})


def test_no_name_stands_anywhere_but_in_names(file_book: Ledger, tmp_path: Path) -> None:
    pushed(file_book, results=[acked(n, target=f"ticket-of-zoe-{n}") for n in range(4)])
    file_book.record_batch(
        new_batch("b2", findings=[{"rule": "x", "entity": "zoe-1"}]), some_decisions("b2", ["zoe-1", "zoe-2"])
    )
    file_book.set_approver("zoe", "$argon2id$x")
    file_book.approve("b2", "d" * 64, "zoe", "reason", NOW, NOW)
    file_book.note("guard", {"entity": "zoe-1", "person": "zoe"})
    file_book.promotion("ad_budget", 3, "promoted", "zoe", {"examples": ["zoe-1"]})
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        for table in schema.metadata.tables:
            found = [row for row in raw.execute(f'SELECT * FROM "{table}"') if any("zoe" in str(cell) for cell in row)]
            assert bool(found) == (table == "names"), (table, found)
    raw.close()


def test_a_ledger_file_is_for_its_owner_only(file_book: Ledger, tmp_path: Path) -> None:
    file_book.note("x", {})
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == dict.fromkeys(
        ("ledger.db", "ledger.db-wal", "ledger.db-shm"), "0o600"
    )


def test_a_forgotten_name_is_gone_and_the_ledger_still_verifies(book: Ledger) -> None:
    pushed(book, results=[acked(n, says=f"line-{n} took it") for n in range(4)])
    book.set_approver("ann", "$argon2id$x")
    book.approve("b1", "d" * 64, "ann", "reason", NOW, NOW)
    head = book.head()
    assert book.forget("line-1") == 2, "its own name, and that of what holds its value"
    assert book.forget("ann") == 1
    assert book.forget("ann") == 0 and book.forget("never heard of") == 0
    one = book.deliveries("b1")[1]
    assert (one.entity, one.target, one.says, one.state) == (None, None, None, "ACKED")
    assert [a.says for a in book.attempts("b1", 1)] == [None]
    assert book.decisions("b1")["entity_id"].to_pylist() == ["line-0", None, "line-2", "line-3"]
    assert book.approvals("b1")[0].approver is None and book.approvers() == []
    book.forget("line-0")
    assert book.batch("b1").findings == [{"rule": "blast", "entity": None}]
    verdict = book.verify(head=head)
    assert verdict.ok, verdict.problems
    book.record_batch(new_batch("b2"), some_decisions("b2"))
    assert book.deliveries("b1")[1].entity == "line-1", "a name that comes again is known again"


ZOE = "zoe@example.org"


def everywhere(book: Ledger, words: str) -> set[str]:
    """Tables in which words stand, in any cell."""
    with book.engine.connect() as connection:
        return {
            name
            for name, table in schema.metadata.tables.items()
            for row in connection.execute(table.select())
            if any(words.lower() in str(cell).lower() for cell in row)
        }


def quote(book: Ledger, quoted: str) -> None:
    """Every way in which a writer may quote a name, as the ledger is told it."""
    finding = {
        "name": "change",
        "status": "HELD",
        "limit": 0.5,
        "observed": 8.0,
        "arm": None,
        "examples": [quoted, "bob"],
    }
    book.record_batch(
        new_batch("b1", status="HELD", findings=[finding], record={"model_version": 3, "entities": [quoted]}),
        some_decisions("b1", [quoted, "bob", "eve"]),
    )
    lease = book.lease("ads")
    book.open_push(lease, "b1")
    book.begin(lease, "b1", [attempt(n) for n in range(3)])
    both = f"{quoted} (120) and bob (90) share budget-1 and want different values"
    book.settle(
        lease, "b1",
        [
            Result(0, "REJECTED", target="budget-1", says=both),
            Result(1, "REJECTED", target="budget-1", says=both),
            Result(2, "UNKNOWN", says=f"the answer mentions {quoted.upper()} alone"),
        ],
    )  # fmt: skip
    book.close_push(lease, "b1", False)
    book.approve("b1", "d" * 64, "ann", f"{quoted} asked for it", NOW, NOW)
    book.switch("ad_budget", True, "ann", f"because of {quoted}")
    asked = {"actor": "ann", "reason": f"{quoted} was harmed", "trigger": "person"}
    book.rollback_asked("b1", **asked, evidence={"entities": [quoted], "worst": {"examples": [quoted]}})
    book.promotion("ad_budget", 3, "promoted", "ann", {"margin": 0.1, "examples": [quoted], "entity": quoted})
    book.note("guard", {"workflow": "ad_budget", "findings": [{"name": "rejected", "examples": [quoted]}]})
    book.note("verdict", {"workflow": "ad_budget", "entity": quoted, "people": {"person": quoted}})


def test_a_forgotten_name_stands_nowhere_whoever_quoted_it(book: Ledger) -> None:
    quote(book, ZOE)
    assert {"names", "batches", "deliveries", "attempts", "approvals", "switches", "rollbacks"} >= everywhere(book, ZOE)
    assert "events" not in everywhere(book, ZOE), "the chain never holds a name"
    assert book.batch("b1").findings[0]["examples"] == [ZOE, "bob"] and book.batch("b1").record["entities"] == [ZOE]
    assert book.promotions("ad_budget")[0].evidence == {"margin": 0.1, "examples": [ZOE], "entity": ZOE}
    assert book.rollbacks("b1")[0].evidence == {"entities": [ZOE], "worst": {"examples": [ZOE]}}
    assert book.events("guard")[0].body["findings"] == [{"name": "rejected", "examples": [ZOE]}]
    assert book.verify().problems == []

    assert book.forget(ZOE) > 0
    assert everywhere(book, ZOE) == set() and everywhere(book, "zoe") == set()
    assert book.verify().problems == []
    assert book.batch("b1").findings[0]["examples"] == ["(erased)", "bob"]
    said = {d.entity: d.says for d in book.deliveries("b1")}
    assert said == {
        None: None,
        "bob": "(erased) (120) and bob (90) share budget-1 and want different values",
        "eve": "the answer mentions (erased) alone",
    }
    assert book.approvals("b1")[0].reason == "(erased) asked for it"
    assert book.promotions("ad_budget")[0].evidence["examples"] == ["(erased)"]
    assert book.events("verdict")[0].body["people"] == {"person": "(erased)"}
    assert book.forget(ZOE) == 0

    assert book.forget("bob") > 0, "in words that were changed before"
    assert everywhere(book, "bob") == set() and book.verify().problems == []


def test_words_of_others_cannot_be_changed_under_the_cover_of_a_forgotten_name(book: Ledger) -> None:
    quote(book, ZOE)
    book.forget(ZOE)
    for statement in (
        "UPDATE deliveries SET says = 'something else' WHERE n = 1",
        "UPDATE deliveries SET says = NULL WHERE n = 1",
        "UPDATE approvals SET reason = 'somebody else asked for it'",
        "UPDATE batches SET findings = '[]'",
    ):
        with book.engine.connect().execution_options(writes=True) as connection, connection.begin() as undone:
            connection.execute(text(statement))
            assert verify.examine(connection, book.people, None)[0], statement
            undone.rollback()


def test_a_name_that_an_older_ledger_kept_in_its_findings_is_erased_from_them(book: Ledger) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # As it was before lists of names were sealed.
        patch.setattr("delivery.ledger.pseudonyms.LISTS", {})
        book.record_batch(
            new_batch("b1", findings=[{"name": "change", "examples": [ZOE, "bob"], "note": f'of "{ZOE}"'}]),
            some_decisions("b1", [ZOE, "bob"]),
        )
    assert book.verify().ok and "batches" in everywhere(book, ZOE)
    assert book.batch("b1").findings[0]["examples"] == [ZOE, "bob"]
    book.forget(ZOE)
    assert everywhere(book, ZOE) == set() and book.verify().problems == []
    assert book.batch("b1").findings[0]["examples"] == ["(erased)", "bob"]


def test_a_name_that_a_finding_mentions_outlives_the_retention_of_other_batches(book: Ledger, clock: Clock) -> None:
    pushed(book, "b0")
    clock.add(400 * 86400)
    today = clock().date()
    book.record_batch(new_batch("b1", day=today, findings=[{"name": "x", "examples": [ZOE]}]), some_decisions("b1", 1))
    assert book.retention(30) == ["b0"]
    assert book.batch("b1").findings[0]["examples"] == [ZOE] and book.verify().problems == []


def test_retention_removes_rows_by_policy_only_and_verify_knows(book: Ledger, clock: Clock) -> None:
    pushed(book)
    book.record_batch(new_batch("b2"), some_decisions("b2", ["other"]))
    book.record_batch(new_batch("b3", day=date(2026, 5, 30)), some_decisions("b3"))
    clock.now = datetime(2026, 6, 1)
    with pytest.raises(LedgerError, match="keep one day at least"):
        book.retention(0)
    assert book.retention(365) == [] and book.retention(30) == ["b1"], "b2 was never delivered, b3 is young"
    assert book.retention(30) == []
    assert (book.batch("b1").retired, book.batch("b1").counts) == (True, {"ACKED": 4})
    assert book.decisions("b1").num_rows == 0 and book.deliveries("b1") == []
    assert book.acknowledged("ads", ["line-0"])["line-0"].value == 120
    verdict = book.verify()
    assert verdict.ok, verdict.problems


# --- the database


def test_the_migrations_make_the_tables_that_the_code_writes(url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    Ledger.open(url, key=KEY).close()
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": schema.VERSION_TABLE})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_revision() == database.HEAD
    engine.dispose()
    assert ScriptDirectory(str(ROOT / "delivery" / "ledger" / "migrations")).get_heads() == [database.HEAD]


def test_a_ledger_of_a_newer_signalbox_is_refused_and_left_alone(url: str) -> None:
    Ledger.open(url, key=KEY).close()
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(LedgerNewer, match=r"schema 9999 is unknown.*install that, nothing was changed"):
        Ledger.open(url, key=KEY)
    with engine.connect() as connection:
        assert connection.execute(text(f"SELECT version_num FROM {schema.VERSION_TABLE}")).scalar() == "9999"
    engine.dispose()


def test_opening_again_imports_no_alembic(file_book: Ledger, file_url: str) -> None:
    code = f"import sys; from delivery.ledger import Ledger; Ledger.open({file_url!r}, key={KEY!r}); print('alembic' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "False"


def test_processes_that_open_an_empty_database_at_once_all_succeed(url: str) -> None:
    code = (
        "import sys; from delivery.ledger import Ledger; print('ready', flush=True); sys.stdin.read(1);"
        f"book = Ledger.open({url!r}, key={KEY!r}); book.note('hello', {{}}); book.close()"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for one in started:
        assert one.stdout is not None and one.stdout.readline()
    for one in started:
        assert one.stdin is not None
        one.stdin.write(b"x")
        one.stdin.flush()
    for one in started:
        _, said = one.communicate(timeout=60)
        assert one.returncode == 0, said.decode()
    with Ledger.open(url, key=KEY) as book:
        assert len(book.events("hello")) == 3 and book.verify().ok


def test_many_that_append_at_once_make_one_chain(url: str, book: Ledger) -> None:
    """Threads of this process and another process, on one chain."""
    code = (
        "from delivery.ledger import Ledger; from tests.support.ledgers import *;"
        f"book = Ledger.open({url!r}, key=KEY);"
        "[(book.note('theirs', {'i': i}), book.record_batch(new_batch(f'p{i}'), some_decisions(f'p{i}'))) for i in range(8)]"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    failures: list[BaseException] = []

    def append(who: int) -> None:
        try:
            for i in range(8):
                book.note("ours", {"who": who, "i": i})
                book.record_batch(new_batch(f"t{who}-{i}"), some_decisions(f"t{who}-{i}"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=append, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _, said = other.communicate(timeout=60)
    assert other.returncode == 0 and not failures, (said.decode(), failures)
    verdict = book.verify()
    assert verdict.ok, verdict.problems
    assert (verdict.events, verdict.batches) == (64, 32)
    assert sorted(row.sequence for row in book.batches()) == list(range(1, 33))


def test_the_same_batch_recorded_by_two_at_once_is_there_once(book: Ledger) -> None:
    rows: list[object] = []
    gate = threading.Barrier(3)

    def record() -> None:
        gate.wait()
        rows.append(book.record_batch(new_batch(), some_decisions()))

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2] and len(book.events("batch")) == 1


def test_another_key_is_refused(url: str, book: Ledger) -> None:
    with pytest.raises(LedgerMismatch, match="made with another key"):
        Ledger.open(url, key=b"another key than that")


# --- bad days


KILLED = """
import os, signal, sys
from delivery.ledger import Ledger, batches
from tests.support.ledgers import KEY, new_batch, some_decisions

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def after_bulk(times):
    real, calls = batches.insert_bulk, []
    def insert_bulk(*args, **kwargs):
        real(*args, **kwargs)
        calls.append(1)
        if len(calls) == times:
            die()
    batches.insert_bulk = insert_bulk

where = [
    lambda: after_bulk(1),                             # the event and the names are written
    lambda: after_bulk(2),                             # the decisions too
    lambda: setattr(batches, "batch", die),            # everything, but for the commit
    lambda: None,                                      # not at all
]
for number, prepare in enumerate(where):
    if os.fork() == 0:
        prepare()
        book = Ledger.open(sys.argv[1], key=KEY)
        book.record_batch(new_batch(f"b{number}"), some_decisions(f"b{number}", 3000))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_recorder_killed_before_its_commit_leaves_nothing_and_one_after_it_everything(url: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", KILLED, url], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.split() == ["-9", "-9", "-9", "0"]
    with Ledger.open(url, key=KEY) as book:
        assert [(row.batch_id, row.rows, row.counts) for row in book.batches()] == [("b3", 3000, {"PENDING": 3000})]
        assert len(book.events()) == 1 and book.verify().ok
        assert book.record_batch(new_batch("b0"), some_decisions("b0", 3000)).sequence == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 4 MiB; None where none may be mounted (then SQLite's own limit stands in for it)."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode  # fmt: skip
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_leaves_nothing_half_written_and_is_survived(
    small_disk: Path | None, tmp_path: Path
) -> None:
    folder = small_disk or tmp_path
    book = Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=KEY)
    filler = folder / "filler"
    pushed(book, "b0")
    if small_disk:
        free = os.statvfs(folder)
        filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - 300_000))
    else:
        set_limit(book, 200)
    before = book.head()
    with pytest.raises(LedgerUnavailable, match="disk is full: nothing was half written; free some space"):
        book.record_batch(new_batch(), some_decisions(entities=4000))
    assert book.head() == before and [row.batch_id for row in book.batches()] == ["b0"]
    if small_disk:
        filler.unlink()
    else:
        set_limit(book, 2**30)
    assert book.record_batch(new_batch(), some_decisions(entities=4000)).rows == 4000
    verdict = book.verify()
    assert verdict.ok, verdict.problems
    book.close()


def set_limit(book: Ledger, pages: int) -> None:
    with book.engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")


def test_no_password_and_no_value_is_told_by_an_error(postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = "marked-pa55word"
    folder = postgres.folder
    for url in (
        f"postgresql://signalbox:{marked}@/nothing?host={folder}",
        f"postgresql://signalbox:{marked}@127.0.0.1:1/x",
        f"mysql://u:{marked}@h/x",
        f"postgresql://u:{marked}@h:port/x",
        f"{marked}",
    ):
        with pytest.raises(LedgerError) as caught:
            Ledger.open(url, key=marked.encode() * 2)
        assert marked not in everything_said(caught.value)
    book = Ledger(
        database.engine_for(f"postgresql://signalbox:{marked}@/x?host={folder}"), pseudonyms.People(KEY), Clock()
    )
    assert marked not in repr(book)


def everything_said(error: BaseException) -> str:
    """The error and everything that hangs on to it."""
    said, seen = [], [error]
    while seen:
        one = seen.pop()
        said += [repr(one), str(one), repr(vars(one))]
        assert not type(one).__module__.startswith(("sqlalchemy", "psycopg2", "sqlite3")), one
        seen += [other for other in (one.__cause__, one.__context__) if other is not None]
    return " ".join(said)


def test_a_broken_database_is_a_ledger_error_without_values(file_book: Ledger, tmp_path: Path) -> None:
    pushed(file_book)
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        raw.execute("DROP TABLE switches")
    raw.close()
    with pytest.raises(LedgerError) as caught:
        file_book.switch("ad_budget", True, "marked-person", "marked-reason")
    assert "marked" not in everything_said(caught.value)
    not_one = tmp_path / "not.db"
    not_one.write_bytes(b"this is no database, and it is long enough to be taken for one" * 50)
    with pytest.raises(LedgerUnavailable, match="damaged"):
        Ledger.open(f"sqlite:///{not_one}", key=KEY)
    with pytest.raises(LedgerUnavailable, match="cannot be made or written to"):
        Ledger.open(f"sqlite:///{not_one}/below/ledger.db", key=KEY)
    with pytest.raises(LedgerError, match="must outlive its process"):
        Ledger.open("sqlite://", key=KEY)


def test_a_database_that_goes_away_is_said_and_comes_back(postgres: Server) -> None:
    name = f"ledger_{next(NUMBER)}"
    with Ledger.open(postgres.database(name), key=KEY) as book:
        book.note("before", {})
        admin = create_engine(
            f"postgresql+psycopg2://signalbox@/postgres?host={postgres.folder}", isolation_level="AUTOCOMMIT"
        )
        with admin.connect() as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"))
            with pytest.raises(LedgerUnavailable, match="see that it runs and run it again"):
                book.note("during", {})
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        admin.dispose()
        book.note("after", {})
        assert [event.kind for event in book.events()] == ["before", "after"]


def test_the_exported_head_comes_back_and_anything_else_is_said(file_book: Ledger, tmp_path: Path) -> None:
    assert file_book.head() == Head(0, "0" * 64)
    file_book.note("x", {})
    file_book.head().export(tmp_path / "head.json")
    assert Head.read(tmp_path / "head.json") == file_book.head()
    (tmp_path / "other").write_text("[]")
    for path in ("none", "other"):
        with pytest.raises(LedgerError, match=f"{path} holds no head"):
            Head.read(tmp_path / path)


def test_names_of_tables_do_not_meet_those_of_mlflow_or_dagster(file_book: Ledger) -> None:
    there = set(inspect(file_book.engine).get_table_names())
    assert "alembic_version" not in there and schema.VERSION_TABLE in there


def test_threads_of_one_process_open_new_ledgers_at_once(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def one(n: int) -> bool:
        with Ledger.open(f"sqlite:///{tmp_path / f'{n}.db'}", key=KEY) as book:
            return book.verify().ok

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(one, range(6)))


def test_what_a_workflow_proved_within_a_time_is_found_with_its_batch(book: Ledger, clock: Clock) -> None:
    clock.now = NOW + timedelta(hours=3)
    pushed(book, "b1", [acked(n, verified_at=NOW + timedelta(hours=n)) for n in range(4)])
    later = NOW + timedelta(hours=10)
    clock.now = later
    gone = Result(1, "CONFLICT", expected=100, found=7, ended_at=later, outcome="conflict")
    over = acked(2, 150, prior=120, observed=151, verified_at=later)
    pushed(book, "b2", [acked(0, 150, prior=120, verified_at=later), gone, replace(over, state="OVERWRITTEN")])

    def found(since: float, until: float, workflow: str = "ad_budget") -> list[tuple[Any, ...]]:
        table = book.proven(workflow, NOW + timedelta(hours=since), NOW + timedelta(hours=until))
        names = ("entity_id", "value", "prior", "batch_id", "kind", "day")
        return [tuple(row[n] for n in names) for row in table.to_pylist()]

    kept = ("decision", new_batch().day)
    assert found(0, 1) == [("line-1", 120, 100, "b1", *kept)]
    assert found(-1, 0) == [("line-0", 120, 100, "b1", *kept)]
    assert found(2, 20) == [("line-3", 120, 100, "b1", *kept), ("line-0", 150, 120, "b2", *kept)]
    assert found(10, 20) == [] == found(-9, 20, "another")
    book.forget("line-3")
    assert found(2, 20) == [("line-0", 150, 120, "b2", *kept)]
