"""What a downstream system must be able to do to be decided on: read many, apply many, and say what it can promise.

Belongs here: the protocol and its values. Does not: any one system, retries, or judging what came back (``delivery.push``).
Values are whole numbers in the unit of the decision (micros of money, priority levels); a connector translates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from common.errors import SignalboxError

EntityState = Literal["open", "closed", "missing"]
"""open: can be changed; closed: is there and cannot be changed any more; missing: is not there."""

Outcome = Literal["accepted", "conflict", "refused", "not_applied", "unknown"]
"""What a system made of one write, as far as its answer says.

accepted: it says that it took it (proves nothing); conflict: the condition did not hold, nothing was written; refused: it
will never take it; not_applied: certainly nothing was written, and it may be tried again; unknown: it may have been
written.
"""


class Unavailable(SignalboxError, RuntimeError):
    """The system did not answer a read, or not usably; asking again may help. ``retry_after``: seconds, if it said so."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Misconfigured(SignalboxError, RuntimeError):
    """Asking again will not help: a missing secret, a refused token, an answer of another shape. Names the way out."""


@dataclass(frozen=True)
class Capabilities:
    """What a system can do; the guarantee of a push follows from it (DESIGN.md, invariant 5)."""

    conditional_write: bool = False
    """A write can depend on the version that was read (ETag, lock version, compare-and-set)."""
    idempotency_key: bool = False
    """The system remembers a write's key and applies a repeated one once."""
    bulk_read: int = 1
    """Most entities that one call of ``read`` should be given."""
    bulk_write: int = 1
    """Most writes that one call of ``apply`` should be given; 1: no bulk."""
    validate_only: bool = False
    """``apply(validate_only=True)`` checks on the system's side and writes nothing."""
    change_history: bool = False
    """``history`` says who changed what when."""
    stale_reads_s: float = 0.0
    """Seconds for which a read may still show what was there before a write."""
    condition_ignored: bool = False
    """It is said to make writes depend on a version, and was seen to take one on a version that it never had."""

    @property
    def guarantee(self) -> str:
        """What a push over this connector promises, in words."""
        if self.idempotency_key or self.conditional_write:
            how = "the idempotency key" if self.idempotency_key else "conditional writes"
            return f"each decision is applied exactly once ({how})"
        found = (
            "an overwrite of somebody's change is found in the change history"
            if self.change_history
            else "an overwrite of somebody's change within the window between read and write is not seen by the system"
        )
        promise = f"only absolute values are written, a repeated equal write is counted; {found}"
        if self.condition_ignored:
            return f"{promise}; the condition of a write counts for nothing: one on a version that never was has been taken"
        return promise


@dataclass(frozen=True)
class Reading:
    """One entity as the system shows it."""

    key: str
    """The entity, as decided on."""
    target: str
    """What holds the value downstream (a budget, a ticket); several entities may share one."""
    value: int | None
    """None where it holds none that can be read as the decision's unit; ``says`` then tells what stands there."""
    token: str | None = None
    """Version for a conditional write; opaque."""
    state: EntityState = "open"
    says: str = ""
    watched: Mapping[str, str] = field(default_factory=dict)
    """Other fields that a write must leave alone, by name, as text: a system may clear one while it takes the value."""


@dataclass(frozen=True)
class Write:
    """One absolute value to set, with everything that a call can carry."""

    key: str
    target: str
    value: int
    expected: int | None
    """What the last read showed."""
    token: str | None
    idempotency_key: str
    decision_id: str
    batch_id: str
    run_id: str


@dataclass(frozen=True)
class Written:
    """What the system answered to one write."""

    key: str
    outcome: Outcome
    says: str = ""
    """The system's own words, shortened, no secret in them."""
    retry_after: float | None = None
    token: str | None = None
    """The version after the write, where the answer names it."""
    sent: bool = True
    """False: nothing of it left this machine."""


@dataclass(frozen=True)
class Change:
    """One change of an entity's value in the system's own history."""

    key: str
    value: int | None
    at: datetime
    """Naive UTC."""
    actor: str
    ours: bool
    """Made with the connector's own credentials."""


def meaning(**said: Any) -> str:
    """SHA-256 over what a connector's settings say of values and entities: where these say something else, a number that was
    decided, or approved, means something else downstream. Addresses, secrets, pace and sizes are no part of it."""
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Writes:
    """What a connector writes, as its settings say: two that name the same one write over each other's values."""

    system: str
    """The system and account (a host, a database, a folder), as far as it is known without asking it."""
    field: str
    """The field or column in it."""


def mapping_of(connector: object) -> str:
    """A connector's ``mapping``; empty where it has none to speak of (a system without settings, as in tests)."""
    return str(getattr(connector, "mapping", ""))


def on_another_version(connector: object, write: Write) -> Written | None:
    """What a system that is said to make writes depend on a version makes of one on a version that it never had.

    ``write``: of the value that stands there, on its version. conflict: it heeds conditions; accepted: it does not, and the
    connector's capabilities say so from then on; anything else does not tell. None: this connector need not be asked.
    """
    ask = getattr(connector, "on_another_version", None)
    answer: Written | None = ask(write) if ask is not None else None
    return answer


class Connector(Protocol):
    """One downstream system. Thread-safe: several threads call ``read`` and ``apply`` at once."""

    system: str
    """Names the system and account; one writer at a time holds its lease."""

    @property
    def capabilities(self) -> Capabilities: ...

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        """Every key as it stands now; a key that does not exist comes back as ``missing``, never left out.

        Raises Unavailable (ask again) or Misconfigured (do not).
        """
        ...

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        """Try each write once, one answer for each in the same order; never raises for what a system does.

        No retries here. Raises Misconfigured where no call can succeed.
        """
        ...

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        """Changes of the values since then, oldest first; empty without the capability ``change_history``."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...
