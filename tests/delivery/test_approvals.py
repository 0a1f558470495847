"""Approvals: who may let a held batch go, that they prove it, and that an approval is for exactly that batch, for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from argon2 import PasswordHasher

from delivery import approvals
from delivery.approvals import ApprovalError, Locked, NotAuthenticated, NothingToApprove, Standing
from delivery.ledger import BatchRow, Ledger, NewBatch

NOON = datetime(2026, 3, 2, 12)
ANNA, BERT = "correct horse battery", "staple-and-a-hammer"


class Clock:
    """Stands still until moved."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that cost nothing, where what they cost is not the matter."""
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(approvals, "_hasher", lambda: cheap)
    monkeypatch.setattr(approvals, "_DECOY", cheap.hash("nobody's"))


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock, quick: None) -> Iterator[Ledger]:
    with opened(tmp_path, clock) as made:
        yield made


def opened(folder: Path, clock: Callable[[], datetime]) -> Any:
    return Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=b"k" * 32, clock=clock)


def batch(ledger: Ledger, batch_id: str = "b1", status: Any = "HELD", digest: str = "d" * 64) -> BatchRow:
    new = NewBatch(
        batch_id=batch_id, workflow="ad_budget", kind="decision", day=date(2026, 3, 1), digest=digest, status=status,
        step="champion", as_of=NOON, decided_at=NOON, run_id="run", record={}, findings=[], pools=None, reverses=None,
    )  # fmt: skip
    return ledger.record_batch(
        new,
        pa.table(
            {
                "decision_id": [f"{batch_id}-1"], "entity_id": ["line-1"], "unit": ["u"], "arm": ["champion"],
                "arm_probability": [1.0], "perturbation": [0.0], "perturbation_probability": [1.0],
                "before": pa.array([100], pa.int64()), "after": pa.array([200], pa.int64()), "changed": [True],
                "review": [False], "expected_gain": [1.0], "reasons": pa.array([["more"]], pa.list_(pa.string())),
            }
        ),
    )  # fmt: skip


def stands(ledger: Ledger, now: datetime, four_eyes: bool = False, batch_id: str = "b1") -> Standing:
    return approvals.standing(ledger, ledger.batch(batch_id), now, four_eyes)


def enrolled(ledger: Ledger, clock: Clock) -> None:
    approvals.enrol(ledger, "Anna", ANNA)
    approvals.enrol(ledger, "Bert", BERT)


def test_a_held_batch_waits_until_a_named_person_approves_it(ledger: Ledger, clock: Clock) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    before = stands(ledger, clock())
    assert (before.ok, before.missing, before.who) == (False, 1, ())
    assert "signalbox approve b1" in before.text
    after = approvals.approve(ledger, "b1", "Anna", ANNA, "the sale begins")
    assert (after.ok, after.missing, after.who) == (True, 0, ("anna",))
    assert stands(ledger, clock()) == after


def test_a_ready_batch_needs_nobody_and_a_refused_one_can_have_nobody(ledger: Ledger, clock: Clock) -> None:
    batch(ledger, "ready", "READY")
    batch(ledger, "refused", "REFUSED")
    enrolled(ledger, clock)
    assert stands(ledger, clock(), True, "ready").ok
    assert not stands(ledger, clock(), False, "refused").ok
    for name, says in (("ready", "nothing to approve"), ("refused", "nobody can approve it")):
        with pytest.raises(NothingToApprove, match=says):
            approvals.approve(ledger, name, "Anna", ANNA, "go")
        assert list(ledger.approvals(name)) == []


def test_an_approval_that_stands_in_the_ledger_of_a_refused_batch_lets_nothing_go(ledger: Ledger, clock: Clock) -> None:
    made = batch(ledger, status="REFUSED")
    enrolled(ledger, clock)
    ledger.approve("b1", made.digest, "anna", "by another door", clock(), clock() + timedelta(days=1))
    assert not stands(ledger, clock()).ok


def test_an_approval_is_for_exactly_one_content_of_a_batch(ledger: Ledger, clock: Clock) -> None:
    made = batch(ledger)
    enrolled(ledger, clock)
    approvals.approve(ledger, "b1", "Anna", ANNA, "go")
    again = approvals.standing(ledger, replace(made, digest="e" * 64), clock(), False)
    assert (again.ok, again.missing) == (False, 1)
    assert "another content" in again.text


def test_an_approval_expires(ledger: Ledger, clock: Clock) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    approvals.approve(ledger, "b1", "Anna", ANNA, "go", valid_for=timedelta(hours=2))
    assert stands(ledger, NOON + timedelta(hours=2) - timedelta(microseconds=1)).ok
    late = stands(ledger, NOON + timedelta(hours=2))
    assert not late.ok and "expired" in late.text
    clock.forward(hours=3)
    assert approvals.approve(ledger, "b1", "Anna", ANNA, "again").ok


@pytest.mark.parametrize("valid_for", [timedelta(0), timedelta(-1), timedelta(days=8)])
def test_an_approval_is_valid_for_a_while_and_no_longer(ledger: Ledger, clock: Clock, valid_for: timedelta) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    with pytest.raises(ApprovalError, match="at most 7 days"):
        approvals.approve(ledger, "b1", "Anna", ANNA, "go", valid_for=valid_for)


def test_an_approval_from_the_future_does_not_count_until_then(ledger: Ledger, clock: Clock) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    clock.forward(days=365)
    approvals.approve(ledger, "b1", "Anna", ANNA, "go")
    assert "still to come" in stands(ledger, NOON).text
    assert not stands(ledger, NOON).ok


def test_four_eyes_are_two_different_people(ledger: Ledger, clock: Clock) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    one = approvals.approve(ledger, "b1", "Anna", ANNA, "go", four_eyes=True)
    assert (one.ok, one.missing) == (False, 1)
    for spelling in ("Anna", "ANNA", " anna ", "Ａｎｎａ"):
        with pytest.raises(ApprovalError, match="different person"):
            approvals.approve(ledger, "b1", spelling, ANNA, "go again", four_eyes=True)
    two = approvals.approve(ledger, "b1", "Bert", BERT, "go", four_eyes=True)
    assert (two.ok, two.who) == (True, ("anna", "bert"))


def test_the_same_approval_twice_is_one_pair_of_eyes(ledger: Ledger, clock: Clock) -> None:
    made = batch(ledger)
    enrolled(ledger, clock)
    for hours in (1, 2):
        ledger.approve("b1", made.digest, "anna", "go", clock(), clock() + timedelta(hours=hours))
    assert stands(ledger, clock(), True).missing == 1


def test_two_spellings_never_become_two_approvers(ledger: Ledger) -> None:
    approvals.enrol(ledger, "Anna Berg", ANNA)
    with pytest.raises(ApprovalError, match="already"):
        approvals.enrol(ledger, "anna  BERG", BERT)
    for bad in ("", "  ", "a\x00b", "a​b", "x" * 201):
        with pytest.raises(ApprovalError, match="name"):
            approvals.enrol(ledger, bad, BERT)


def test_a_revoked_approvers_standing_approvals_count_no_more(ledger: Ledger, clock: Clock) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    approvals.approve(ledger, "b1", "Anna", ANNA, "go")
    clock.forward(minutes=1)
    approvals.revoke(ledger, "anna")
    gone = stands(ledger, clock())
    assert not gone.ok and "revoked" in gone.text
    with pytest.raises(NotAuthenticated):
        approvals.approve(ledger, "b1", "Anna", ANNA, "go")
    clock.forward(minutes=1)
    approvals.enrol(ledger, "Anna", "another secret of hers")
    assert not stands(ledger, clock()).ok, "coming back does not bring back what was given before"
    assert approvals.approve(ledger, "b1", "Anna", "another secret of hers", "go").ok
    with pytest.raises(ApprovalError, match="not an approver"):
        approvals.revoke(ledger, "carl")


def test_revoked_and_enrolled_again_within_the_same_instant_the_old_approval_does_not_count(
    ledger: Ledger, clock: Clock
) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    approvals.approve(ledger, "b1", "Anna", ANNA, "go")
    approvals.revoke(ledger, "anna")
    approvals.enrol(ledger, "Anna", ANNA)
    assert not stands(ledger, clock()).ok


def test_a_rotated_secret_replaces_the_old_one_and_approvals_stand(ledger: Ledger, clock: Clock) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    approvals.approve(ledger, "b1", "Anna", ANNA, "go")
    clock.forward(minutes=1)
    with pytest.raises(NotAuthenticated):
        approvals.rotate(ledger, "Anna", BERT, "something new entirely")
    with pytest.raises(ApprovalError, match="old one"):
        approvals.rotate(ledger, "Anna", ANNA, ANNA)
    approvals.rotate(ledger, "Anna", ANNA, "something new entirely")
    assert stands(ledger, clock()).ok
    with pytest.raises(NotAuthenticated):
        approvals.authenticate(ledger, "Anna", ANNA)
    approvals.authenticate(ledger, "Anna", "something new entirely")


@pytest.mark.parametrize(
    "secret", ["", "elevenchars", "            ", "aaaaaaaaaaaaaaaa", "anna anna anna", "x" * 1025]
)
def test_a_weak_secret_is_refused(ledger: Ledger, secret: str) -> None:
    with pytest.raises(ApprovalError, match="characters"):
        approvals.enrol(ledger, "Anna", secret)
    assert [one.name for one in ledger.approvers()] == []


def test_a_name_is_locked_for_a_growing_while(ledger: Ledger, clock: Clock) -> None:
    enrolled(ledger, clock)
    for _ in range(5):
        with pytest.raises(NotAuthenticated):
            approvals.authenticate(ledger, "Anna", "a wrong secret")
    locks = []
    for _ in range(4):
        with pytest.raises(Locked) as locked:
            approvals.authenticate(ledger, "Anna", ANNA)  # the right one does not help while locked
        locks.append((locked.value.until - clock()).total_seconds())
        clock.now = locked.value.until
        with pytest.raises(NotAuthenticated):
            approvals.authenticate(ledger, "Anna", "a wrong secret")
    assert locks == [60, 120, 240, 480]
    approvals.authenticate(ledger, "Bert", BERT)  # others are not locked
    clock.forward(days=1)
    approvals.authenticate(ledger, "Anna", ANNA)
    with pytest.raises(NotAuthenticated):  # counted afresh
        approvals.authenticate(ledger, "Anna", "a wrong secret")
    approvals.authenticate(ledger, "Anna", ANNA)


def test_trying_while_locked_does_not_lock_for_longer(ledger: Ledger, clock: Clock) -> None:
    enrolled(ledger, clock)
    for _ in range(5):
        with pytest.raises(NotAuthenticated):
            approvals.authenticate(ledger, "Anna", "a wrong secret")
    for _ in range(30):
        with pytest.raises(Locked):
            approvals.authenticate(ledger, "Anna", "a wrong secret")
    clock.forward(seconds=60)
    approvals.authenticate(ledger, "Anna", ANNA)


def test_the_lock_outlives_the_process_and_a_clock_that_goes_back(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    enrolled(ledger, clock)
    for _ in range(5):
        with pytest.raises(NotAuthenticated):
            approvals.authenticate(ledger, "Anna", "a wrong secret")
    ledger.close()
    clock.forward(hours=-5)
    with opened(tmp_path, clock) as again, pytest.raises(Locked):
        approvals.authenticate(again, "Anna", ANNA)


def test_guesses_made_at_the_same_time_are_all_counted(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty guessers pass the first look at the lock together: five secrets are compared, no more."""
    import threading

    enrolled(ledger, clock)
    gate, compared = threading.Barrier(20), []
    look, hasher = approvals._refuse_locked, approvals._hasher

    def together(ledger: Ledger, name: str, now: datetime, before: int | None) -> None:
        look(ledger, name, now, before)
        if before is None:
            gate.wait(20)

    def counted() -> Any:
        compared.append(1)
        return hasher()

    monkeypatch.setattr(approvals, "_refuse_locked", together)
    monkeypatch.setattr(approvals, "_hasher", counted)
    said: list[str] = []

    def guess() -> None:
        try:
            approvals.authenticate(ledger, "Anna", "a wrong secret")
        except ApprovalError as error:
            said.append(type(error).__name__)

    guessers = [threading.Thread(target=guess) for _ in range(20)]
    for one in guessers:
        one.start()
    for one in guessers:
        one.join(30)
    assert (said.count("NotAuthenticated"), said.count("Locked"), len(compared)) == (5, 15, 5)


def test_a_name_that_is_no_approvers_is_answered_and_locked_like_one_that_is(ledger: Ledger, clock: Clock) -> None:
    enrolled(ledger, clock)
    answers = []
    for name in ("anna", "carl"):
        said = []
        for _ in range(6):
            with pytest.raises(ApprovalError) as error:
                approvals.authenticate(ledger, name, "a wrong secret")
            said.append(f"{type(error.value).__name__}: {error.value}".replace(name, "NAME"))
        answers.append(said)
    assert answers[0] == answers[1]


def test_a_name_that_is_no_approvers_takes_as_long(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = 0
    verify = PasswordHasher.verify

    def counted(self: PasswordHasher, kept: str, secret: bytes) -> Any:
        nonlocal hashed
        hashed += 1
        began = time.process_time()
        try:
            return verify(self, kept, secret)
        finally:
            cost.append(time.process_time() - began)

    cost: list[float] = []
    monkeypatch.setattr(PasswordHasher, "verify", counted)
    from argon2 import extract_parameters

    with opened(tmp_path, clock) as ledger:
        approvals.enrol(ledger, "Anna", ANNA)
        for name in ("Anna", "Carl"):
            with pytest.raises(NotAuthenticated):
                approvals.authenticate(ledger, name, "a wrong secret")
        assert hashed == 2
        (anna,) = ledger.approvers()
        assert extract_parameters(anna.secret_hash) == extract_parameters(approvals._DECOY)
        assert anna.secret_hash.startswith("$argon2id$")


def test_the_decoys_secret_opens_nothing(ledger: Ledger, clock: Clock) -> None:
    with pytest.raises(NotAuthenticated):
        approvals.authenticate(ledger, "Carl", "nobody's")


def test_no_secret_stands_in_any_error_row_or_file(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    batch(ledger)
    secrets = [ANNA, "MARKED-wrong-one", "MARKED-new-secret", "MARKED-\ud800-broken", "short-MARK"]
    approvals.enrol(ledger, "Anna", ANNA)
    errors: list[BaseException] = []
    for act in (
        lambda: approvals.enrol(ledger, "Bert", "short-MARK"),
        lambda: approvals.authenticate(ledger, "Anna", "MARKED-wrong-one"),
        lambda: approvals.authenticate(ledger, "Anna", "MARKED-\ud800-broken"),
        lambda: approvals.rotate(ledger, "Anna", "MARKED-wrong-one", "MARKED-new-secret"),
        lambda: approvals.approve(ledger, "b1", "Anna", "MARKED-wrong-one", "why"),
        lambda: approvals.approve(ledger, "b1", "Anna", ANNA, f"because {ANNA}"),
        lambda: approvals.approve(ledger, "b1", "Anna", ANNA, " "),
    ):
        with pytest.raises(ApprovalError) as caught:
            act()
        error: BaseException | None = caught.value
        while error is not None:
            errors.append(error)
            error = error.__cause__ or error.__context__
    approvals.rotate(ledger, "Anna", ANNA, "MARKED-new-secret")
    approvals.approve(ledger, "b1", "Anna", "MARKED-new-secret", "the sale begins")
    said = "\n".join(
        [*(f"{e!r} {e} {e.args}" for e in errors), repr(list(ledger.approvals("b1"))), repr(list(ledger.approvers()))]
        + [repr(event) for event in ledger.events()]
    )
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    for secret in secrets:
        assert secret not in said
        assert secret.encode("utf-8", "surrogatepass") not in files
    assert "$argon2" not in said, "nor its hash, in what is shown"
    assert b"$argon2id$" in files


def test_a_mistyped_secret_at_the_name_prompt_is_not_kept(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(NotAuthenticated):
        approvals.authenticate(ledger, "marked secret typed as name", "whatever it is")
    assert b"marked secret" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_an_approval_that_the_chain_does_not_know_lets_nothing_go(ledger: Ledger, clock: Clock) -> None:
    made = batch(ledger)
    enrolled(ledger, clock)
    with ledger.engine.connect().execution_options(writes=True) as connection, connection.begin():
        first = connection.exec_driver_sql("SELECT min(seq) FROM events").scalar()
        connection.exec_driver_sql(
            "INSERT INTO approvals (seq, batch_id, digest, approver, reason, at, expires_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                first, "b1", made.digest, ledger.people.digest("person", "anna"), "slipped in",
                str(NOON), str(NOON + timedelta(days=1)),
            ),
        )  # fmt: skip
    with pytest.raises(ApprovalError, match="signalbox verify"):
        stands(ledger, clock())


def test_an_approval_stands_in_the_chain_and_the_chain_verifies(ledger: Ledger, clock: Clock) -> None:
    batch(ledger)
    enrolled(ledger, clock)
    with pytest.raises(NotAuthenticated):
        approvals.authenticate(ledger, "Anna", "a wrong secret")
    approvals.approve(ledger, "b1", "Anna", ANNA, "the sale begins")
    assert ledger.verify().ok
