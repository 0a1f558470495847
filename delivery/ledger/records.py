"""The rows that the ledger takes and gives, and its states.

Belongs here: values without behaviour. Does not: reading or writing them (``delivery.ledger``, which exports them all).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

from delivery.ledger.database import LedgerError

State = Literal[
    "PENDING", "IN_FLIGHT", "ACKED", "REJECTED", "UNKNOWN", "CONFLICT", "OVERWRITTEN", "SKIPPED", "NOT_REVERSIBLE"
]
OPEN = frozenset({"PENDING", "IN_FLIGHT", "UNKNOWN"})
"""States that a push still has to settle."""
FINAL = frozenset({"ACKED", "REJECTED", "CONFLICT", "OVERWRITTEN", "SKIPPED", "NOT_REVERSIBLE"})
"""States that stay, but for ACKED, of which an overwrite may be found later."""
ACTED = frozenset({"ACKED", "OVERWRITTEN", "UNKNOWN", "IN_FLIGHT"})
"""States of a delivery whose value was proven to stand downstream, or of which something was sent that may stand there."""


def generation(batch_id: str) -> tuple[str, int]:
    """A batch's name without, and with, the number of times that the same content was decided: ``X.2`` → (X, 2), ``X`` → (X, 1).

    Deciding the same again, after something else was decided or after it was taken back, is a new decision with a delivery
    of its own, and so a batch of its own.
    """
    base, dot, number = batch_id.rpartition(".")
    return (base, int(number)) if dot and number.isdigit() else (batch_id, 1)


@dataclass(frozen=True, kw_only=True)
class NewBatch:
    """A batch as it is handed to the ledger."""

    batch_id: str
    workflow: str
    kind: Literal["decision", "rollback"]
    day: date
    digest: str
    status: Literal["READY", "HELD", "REFUSED"]
    step: str
    as_of: datetime
    """What was known by then; a later own write supersedes a decision's ``before``."""
    decided_at: datetime
    run_id: str
    record: Mapping[str, Any]
    findings: Sequence[Mapping[str, Any]] = ()
    pools: Mapping[str, int] | None = None
    """Arm → most that its entities may hold together; None: no pools."""
    reverses: str | None = None


@dataclass(frozen=True, kw_only=True)
class BatchRow(NewBatch):
    """A batch as the ledger holds it."""

    sequence: int
    root: str
    rows: int
    changed: int
    recorded_at: datetime
    system: str | None
    """Where it is delivered to, from the first opened push on."""
    delivery: Literal["NONE", "OPEN", "COMPLETE"]
    superseded_by: str | None
    retired: bool
    """Its rows were removed by the retention policy."""
    counts: Mapping[str, int]
    """Deliveries by state."""

    @property
    def order_key(self) -> tuple[date, int]:
        """The order of batches: by day, then by when they were recorded."""
        return self.day, self.sequence

    @property
    def acted(self) -> bool:
        """Whether something of it was sent and stood downstream, or may. What nothing was sent of answers no question about
        the past."""
        return any(self.counts.get(state) for state in ACTED)

    @property
    def backfill(self) -> bool:
        """Whether it was decided after the day that it would have taken effect on: never sent, and never what acted."""
        return bool(self.record.get("backfill"))


@dataclass(frozen=True)
class Delivery:
    """One changed decision on its way; ``n`` is its row in the batch."""

    batch_id: str
    n: int
    decision_id: str
    entity: str | None
    """None where the name was forgotten."""
    arm: str | None
    before: int | None
    after: int | None
    gain: float | None
    state: State
    target: str | None
    expected: int | None
    """What the push compared the downstream value with."""
    sent: int | None
    """What was really sent last; a replanned one differs from ``after``."""
    prior: int | None
    """What stood downstream just before our first write."""
    observed: int | None
    verified_at: datetime | None
    attempts: int
    repeats: int
    says: str | None

    @property
    def stands(self) -> int | None:
        """The value that was there when it was last read. ``observed`` is somebody else's value where ours has replaced it."""
        return self.sent if self.state == "OVERWRITTEN" and self.sent is not None else self.observed


@dataclass(frozen=True)
class Attempt:
    """One delivery about to be tried."""

    n: int
    value: int | None
    expected: int | None
    idempotency_key: str
    started_at: datetime


@dataclass(frozen=True)
class AttemptRow:
    """One try, as the ledger holds it; ``ended_at`` None: it is under way, or its process died."""

    batch_id: str
    n: int
    attempt: int
    value: int | None
    expected: int | None
    idempotency_key: str
    started_at: datetime
    ended_at: datetime | None
    outcome: str | None
    window_ms: float | None
    says: str | None


@dataclass(frozen=True)
class Result:
    """What became of a delivery. None leaves what stands; ``prior`` is taken the first time only."""

    n: int
    state: State
    target: str | None = None
    expected: int | None = None
    prior: int | None = None
    sent: int | None = None
    observed: int | None = None
    verified_at: datetime | None = None
    says: str | None = None
    window_ms: float | None = None
    """Between the read and the write, in milliseconds."""
    outcome: str | None = None
    ended_at: datetime | None = None
    repeat: bool | int = False
    """An equal write that may have been applied twice; a number counts several."""
    found: int | None = None
    """Somebody else's value, for CONFLICT and OVERWRITTEN, where it is not what was ``observed`` last."""


@dataclass(frozen=True)
class Conflict:
    """A delivery that met somebody else's value."""

    batch_id: str
    n: int
    entity: str | None
    state: str
    expected: int | None
    found: int | None
    sent: int | None
    at: datetime


@dataclass(frozen=True)
class Acknowledged:
    """The last value of ours that a read-back proved."""

    value: int
    verified_at: datetime
    batch_id: str


@dataclass(frozen=True)
class Leftover:
    """What the rollback ``batch_id`` did not bring back; ``n`` is the same entity's row in the batch that was asked for."""

    batch_id: str
    n: int
    before: int | None
    after: int | None
    state: str
    observed: int | None


@dataclass(frozen=True)
class Approval:
    """A person's yes to exactly one batch."""

    batch_id: str
    digest: str
    approver: str | None
    reason: str
    at: datetime
    expires_at: datetime


@dataclass(frozen=True)
class Approver:
    """Who may approve."""

    name: str
    secret_hash: str = field(repr=False)
    at: datetime


@dataclass(frozen=True)
class Switch:
    """A workflow stopped or let go on."""

    workflow: str
    stopped: bool
    actor: str | None
    reason: str
    at: datetime


@dataclass(frozen=True)
class Promotion:
    """A model version moved."""

    workflow: str
    version: int | None
    action: str
    actor: str | None
    evidence: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True)
class Rollback:
    """A rollback asked for, complete, or closed by a person with what was left."""

    batch_id: str
    action: Literal["asked", "complete", "closed"]
    actor: str | None
    reason: str
    trigger: str
    evidence: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True)
class Event:
    """One link of the chain; names stand in ``body`` where they are not forgotten (then None)."""

    seq: int
    at: datetime
    kind: str
    body: Mapping[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class Head:
    """The last link of the chain. Kept elsewhere, it proves later that nothing was cut off."""

    seq: int
    hash: str

    def export(self, path: Path | str) -> None:
        """Write it to a file."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n")

    @staticmethod
    def read(path: Path | str) -> Head:
        """The head in a file; raises LedgerError where there is none."""
        try:
            said = json.loads(Path(path).read_text())
            return Head(int(said["seq"]), str(said["hash"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"{path} holds no head of a ledger ({type(error).__name__}): export one first") from None


@dataclass(frozen=True)
class Verdict:
    """What ``verify`` found; ``problems`` name the event, batch or row."""

    ok: bool
    events: int
    batches: int
    problems: list[str]
    head: Head
