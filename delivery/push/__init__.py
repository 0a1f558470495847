"""Sending a batch downstream and proving by read-back that it is there: the heart of the product.

``api`` is what callers use; ``engine`` the order of the steps: ``superseding`` older batches, ``open_items``, ``conditional_check``,
``grouping`` by target, ``pool_phase``, ``waves``, ``report``. A ``worker`` reads, judges (``reconciliation`` with ``evidence``) and
writes (``sending``, which also does the retry after 429); ``run`` is what all of them share, ``held_lease`` keeps the lease.
``pools`` keep the money, ``rate_limit`` the pace; ``preview`` is the dry run; ``types`` is what goes in and comes out.

Belongs here: what may be sent when, and what became of it. Does not: the record (``delivery.ledger``), how any one system is called
(``delivery.connectors``).
"""

from delivery.push.api import dry_run, push, resolve
from delivery.push.sending import idempotency_key
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
