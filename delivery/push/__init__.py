"""Sending a batch downstream and proving by read-back that it is there: the heart of the product.

``engine`` takes the steps; ``reconciliation`` says what one reading means (verified, conflict, overwritten, send again); ``pools``
keep the money, ``rate_limit`` the pace; ``types`` is what goes in and comes out.

Belongs here: what may be sent when, and what became of it. Does not: the record (``delivery.ledger``), how any one system is called
(``delivery.connectors``).
"""

from delivery.push.engine import dry_run, idempotency_key, push, resolve
from delivery.push.types import (
    Blocked,
    Changed,
    Diff,
    DiffRow,
    NotApproved,
    Progress,
    PushError,
    PushSettings,
    Refused,
    Report,
    Stopped,
)

__all__ = [
    "Blocked", "Changed", "Diff", "DiffRow", "NotApproved", "Progress", "PushError", "PushSettings", "Refused", "Report", "Stopped",
    "dry_run", "idempotency_key", "push", "resolve",
]  # fmt: skip
