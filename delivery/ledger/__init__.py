"""The append-only record of what was decided, sent, approved, promoted and taken back, and the proof that nobody changed it since.

``ledger`` is what callers open; ``batches``, ``decisions``, ``deliveries``, ``pushes``, ``acknowledged``, ``rollbacks``, ``chained``
and ``erasure`` are what its methods do, each in an open ``transaction``; ``records`` are the rows that it takes and gives;
``events`` and ``hash_chain`` make it tamper-evident; ``pseudonyms`` keep names out of the chain; ``verify`` reads it all again;
``schema``, ``database``, ``migrations`` and ``leases`` are how it is kept.

Belongs here: the record and its rules. Does not: talking to a downstream system (``delivery.push``), who may approve
(``delivery.approvals``).
"""

from common.clock import utc_now
from delivery.ledger.database import (
    DaySent,
    Fenced,
    LedgerError,
    LedgerMismatch,
    LedgerNewer,
    LedgerUnavailable,
    Unknown,
)
from delivery.ledger.leases import Busy, Holder, Lease
from delivery.ledger.ledger import Ledger
from delivery.ledger.records import (
    ACTED,
    FINAL,
    OPEN,
    Acknowledged,
    Approval,
    Approver,
    Attempt,
    AttemptRow,
    BatchRow,
    Conflict,
    Delivery,
    Event,
    Head,
    Leftover,
    NewBatch,
    Promotion,
    Result,
    Rollback,
    State,
    Switch,
    Verdict,
    generation,
)

__all__ = [
    "ACTED", "FINAL", "OPEN", "Acknowledged", "Approval", "Approver", "Attempt", "AttemptRow", "BatchRow", "Busy", "Conflict",
    "DaySent", "Delivery", "Event", "Fenced", "Head", "Holder", "Lease", "Ledger", "LedgerError", "LedgerMismatch", "LedgerNewer",
    "LedgerUnavailable", "Leftover", "NewBatch", "Promotion", "Result", "Rollback", "State", "Switch", "Unknown", "Verdict", "generation",
    "utc_now",
]  # fmt: skip
