"""A named person lets a held batch go: who may, how they prove it, and whether an approval stands.

Belongs here: approvers' secrets, giving an approval, and judging what stands in the ledger. Does not: asking for a secret
at a prompt (the command does), whether a batch is held (its guardrails), or sending (``delivery.push``).
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from common.errors import SignalboxError

if TYPE_CHECKING:
    from argon2 import PasswordHasher

    from delivery.ledger import Approver, BatchRow, Ledger

SHORTEST_SECRET = 12
LONGEST_SECRET = 1024
"""Characters; a longer one would only cost time to hash."""
LONGEST_VALID = timedelta(days=7)
FREE_TRIES = 5
"""Wrong secrets in a row before a name is locked."""
FIRST_LOCK = timedelta(minutes=1)
"""Doubles with every further wrong secret, up to ``LONGEST_LOCK``."""
LONGEST_LOCK = timedelta(days=1)
CLOCK_SLACK = timedelta(minutes=5)
"""How far ahead of us the clock of another machine may have been when it took an approval."""

TRIED, RIGHT = "approver_tried", "approver_right"
"""Events: a secret is about to be compared; it was the right one. A try without a right one after it was wrong."""

_DECOY = "$argon2id$v=19$m=65536,t=3,p=4$WL33pRUtgDb2GXEFoLYnAg$JQ7ATzcV4PMtosxOzUM7eOm7NjBn8QX4WFWZM3G+0U4"
"""Hash of a random secret that nobody kept: what a name is compared with that is no approver's."""


class ApprovalError(SignalboxError, RuntimeError):
    """An approval or a change of approvers was refused; the message says why and the way out, never a secret."""


class NotAuthenticated(ApprovalError):
    """The name is not an approver's, or the secret is not theirs; which of the two is not said."""


class Locked(ApprovalError):
    """Too many wrong secrets for this name; ``until`` says when the next try counts."""

    def __init__(self, message: str, until: datetime) -> None:
        super().__init__(message)
        self.until = until


class NothingToApprove(ApprovalError):
    """The batch is not one that waits for a person."""


@dataclass(frozen=True)
class Standing:
    """Whether a batch may be sent as far as people are asked.

    ``who``: the approvers whose approvals count, sorted; ``missing``: how many more are needed; ``text``: for people.
    """

    ok: bool
    who: tuple[str, ...]
    missing: int
    text: str


def standing(ledger: Ledger, batch: BatchRow, now: datetime, four_eyes: bool) -> Standing:
    """Judge the approvals of a batch as of ``now`` (naive UTC); reads the ledger, changes nothing.

    An approval counts when it is for exactly this batch's digest, has not expired, and its approver has not been revoked
    since. A READY batch needs none; a REFUSED one cannot have any.
    """
    if batch.status == "REFUSED":
        return Standing(False, (), 0, f"batch {batch.batch_id} was refused by its guardrails: nobody can approve it")
    if batch.status != "HELD":
        return Standing(True, (), 0, f"batch {batch.batch_id} is within the automatic limits: no approval needed")
    counts: dict[str, datetime] = {}
    void: dict[str, str] = {}
    # in this order, so that what happens meanwhile is seen as late as can be
    rows = ledger.approvals(batch.batch_id)
    numbers = [event.seq for event in ledger.events("approval") if event.body["batch_id"] == batch.batch_id]
    if len(numbers) < len(rows):
        raise ApprovalError(
            f"batch {batch.batch_id} has an approval that no event in the chain knows: signalbox verify"
        )
    ended = _rights_ended(ledger)
    for seq, given in zip(numbers, rows, strict=False):
        name = given.approver or "somebody whose name was erased"
        if given.digest != batch.digest:
            void[name] = "is for another content of the batch"
        elif given.approver is None or ended.get(name, seq) >= seq:
            void[name] = "is void: the approver has been revoked since"
        elif given.at > now + CLOCK_SLACK:
            void[name] = f"is dated {given.at:%Y-%m-%d %H:%M} UTC, which is still to come"
        elif given.expires_at <= now:
            void[name] = f"expired at {given.expires_at:%Y-%m-%d %H:%M} UTC"
        else:
            counts[name] = max(given.expires_at, counts.get(name, given.expires_at))
    missing = max((2 if four_eyes else 1) - len(counts), 0)
    parts = []
    if counts:
        valid = ", ".join(f"{name} until {until:%Y-%m-%d %H:%M} UTC" for name, until in sorted(counts.items()))
        parts.append(f"approved by {valid}")
    parts += [f"the approval of {name} {why}" for name, why in sorted(void.items()) if name not in counts]
    if missing:
        people = "1 more person" if missing == 1 else f"{missing} different people"
        parts.append(f"waits for {people}: signalbox approve {batch.batch_id} --as NAME --reason REASON")
    return Standing(not missing, tuple(sorted(counts)), missing, f"batch {batch.batch_id} is held; " + "; ".join(parts))


def enrol(ledger: Ledger, name: str, secret: str) -> None:
    """Make ``name`` an approver who proves it by ``secret``; only its argon2 hash is kept.

    Raises ApprovalError for a name that is one already, or a secret that is too short.
    """
    name = known_as(name)
    _fit(secret, name)
    if _approver(ledger, name) is not None:
        raise ApprovalError(f"{name} is an approver already; rotate the secret, or revoke {name} first")
    ledger.set_approver(name, _hasher().hash(_bytes(secret)))
    ledger.note(RIGHT, _who(ledger, name))  # wrong secrets of an earlier enrolment no longer count


def rotate(ledger: Ledger, name: str, secret: str, new_secret: str) -> None:
    """Replace an approver's secret; approvals already given stand. Raises as ``authenticate`` does, and as ``enrol``."""
    name = known_as(name)
    _fit(new_secret, name)
    if new_secret == secret:
        raise ApprovalError("the new secret is the old one; choose another")
    authenticate(ledger, name, secret)
    ledger.set_approver(name, _hasher().hash(_bytes(new_secret)))


def revoke(ledger: Ledger, name: str) -> None:
    """End an approver's right; approvals that stand from before no longer count. ApprovalError: not an approver."""
    name = known_as(name)
    if _approver(ledger, name) is None:
        raise ApprovalError(f"{name} is not an approver; `signalbox approvers list` names them")
    ledger.revoke_approver(name)


def approve(
    ledger: Ledger,
    batch_id: str,
    name: str,
    secret: str,
    reason: str,
    *,
    valid_for: timedelta = timedelta(days=1),
    four_eyes: bool = False,
) -> Standing:
    """Let a held batch go, in the name of an approver, for exactly the content that it has now; gives what stands then.

    Raises NothingToApprove (not held, or all of it is dealt with), NotAuthenticated, Locked, or ApprovalError for a missing
    reason, a duration that is too long, or one who has approved it already where another person must.
    """
    name, reason = known_as(name), " ".join(reason.split())
    if not reason:
        raise ApprovalError(f"say why batch {batch_id} may be sent: --reason REASON")
    if secret in reason:
        raise ApprovalError("the reason holds the secret; reasons are stored for all to read: leave it out")
    if not timedelta(0) < valid_for <= LONGEST_VALID:
        raise ApprovalError(f"an approval is valid for more than nothing and at most {LONGEST_VALID.days} days")
    batch = ledger.batch(batch_id)
    if batch.status == "REFUSED":
        raise NothingToApprove(
            f"batch {batch_id} was refused by its guardrails: nobody can approve it; correct its cause and decide again"
        )
    if batch.status != "HELD":
        raise NothingToApprove(f"batch {batch_id} is within the automatic limits: there is nothing to approve")
    if batch.superseded_by is not None:
        raise NothingToApprove(f"batch {batch_id} is superseded by {batch.superseded_by}: look at that one")
    newer = [
        one.batch_id
        for one in ledger.batches(batch.workflow, since=batch.day, kind="decision")
        if one.day == batch.day and one.sequence > batch.sequence and not one.backfill
    ]
    if newer:
        raise NothingToApprove(
            f"batch {batch_id} is not what would be sent: {batch.day} was decided again as {newer[-1]}, look at that one"
        )
    if batch.backfill:
        raise NothingToApprove(f"batch {batch_id} is a backfill, which is never sent: there is nothing to approve")
    if batch.delivery == "COMPLETE":
        raise NothingToApprove(f"batch {batch_id} is dealt with already: there is nothing left to approve")
    authenticate(ledger, name, secret)
    now = ledger.clock()
    before = standing(ledger, batch, now, four_eyes)
    if name in before.who and before.missing:
        raise ApprovalError(f"{name} has approved batch {batch_id} already; it waits for a different person")
    ledger.approve(batch_id, batch.digest, name, reason, now, now + valid_for)
    return standing(ledger, batch, now, four_eyes)


def authenticate(ledger: Ledger, name: str, secret: str) -> None:
    """Return if ``secret`` is that approver's. Raises NotAuthenticated or Locked, alike for names that are not approvers'.

    A try is written down before the secret is compared, so that guesses made at the same time are counted too.
    """
    from argon2.exceptions import InvalidHashError, VerifyMismatchError

    name, now = known_as(name), ledger.clock()
    _refuse_locked(ledger, name, now, before=None)
    mine = ledger.note(TRIED, _who(ledger, name))
    _refuse_locked(ledger, name, now, before=mine)
    approver = _approver(ledger, name)
    # an unknown name costs the same hash as a wrong secret
    known = approver.secret_hash if approver is not None else _DECOY
    try:
        _hasher().verify(known, _bytes(secret))
    except VerifyMismatchError:
        right = False
    except InvalidHashError:
        raise ApprovalError(f"the hash kept for {name} cannot be read; revoke {name} and enrol again") from None
    else:
        right = approver is not None
    if not right:
        # raised outside the except block: the exception from argon2 has nothing to add
        raise NotAuthenticated(
            f"{name} is not an approver, or the secret is wrong (`signalbox approvers list` names them)"
        )
    ledger.note(RIGHT, _who(ledger, name))


def known_as(name: str) -> str:
    """The one spelling under which an approver is known: two spellings never make two people. ApprovalError if empty."""
    spelt = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    if not spelt or len(spelt) > 200 or not spelt.isprintable():
        raise ApprovalError("an approver needs a name of 1 to 200 printable characters")
    return spelt


def _refuse_locked(ledger: Ledger, name: str, now: datetime, before: int | None) -> None:
    """Locked if the wrong secrets in a row for this name, those written down earlier than event ``before``, forbid a try."""
    who = _who(ledger, name)
    wrong: list[datetime] = []
    for event in sorted([*ledger.events(TRIED), *ledger.events(RIGHT)], key=lambda event: event.seq):
        if event.body == who and (before is None or event.seq < before):
            wrong = [*wrong, event.at] if event.kind == TRIED else []
    if len(wrong) < FREE_TRIES:
        return
    # the exponent is bounded: the lock has long reached its longest by then
    until = wrong[-1] + min(FIRST_LOCK * 2 ** min(len(wrong) - FREE_TRIES, 20), LONGEST_LOCK)
    if now < until:
        text = f"{len(wrong)} wrong secrets for {name}: locked until {until:%Y-%m-%d %H:%M:%S} UTC; then try once more"
        raise Locked(text, until)


def _who(ledger: Ledger, name: str) -> dict[str, str]:
    """The body of an event about a name: its digest alone, since what was typed as a name may be a secret."""
    return {"who": ledger.people.digest("person", name)}


def _approver(ledger: Ledger, name: str) -> Approver | None:
    """The approver of that name, as of now."""
    return next((one for one in ledger.approvers() if one.name == name), None)


def _rights_ended(ledger: Ledger) -> dict[str, int]:
    """For each approver the event that last ended their right, 0 if none did: in the chain's order, not by any clock."""
    ended: dict[str, int] = {}
    for event in ledger.events("approver"):
        if (name := event.body["approver"]) is not None:
            ended[name] = ended.get(name, 0) if event.body["active"] else event.seq
    return ended


def _fit(secret: str, name: str) -> None:
    """ApprovalError for a secret that is too short, or is the name."""
    if len(secret.strip()) < SHORTEST_SECRET or len(set(secret)) < 4 or name in secret.casefold():
        raise ApprovalError(
            f"a secret needs at least {SHORTEST_SECRET} characters, four of them different, and not the name in it"
        )
    if len(secret) > LONGEST_SECRET:
        raise ApprovalError(f"a secret has at most {LONGEST_SECRET} characters")


def _bytes(secret: str) -> bytes:
    """The same bytes however the keyboard composed them; never fails, since such an error would print the secret."""
    return unicodedata.normalize("NFC", secret).encode("utf-8", "surrogatepass")


def _hasher() -> PasswordHasher:
    from argon2 import PasswordHasher

    return PasswordHasher(time_cost=3, memory_cost=65536, parallelism=4)  # as in _DECOY
