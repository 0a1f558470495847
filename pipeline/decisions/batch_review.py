"""One batch as a person looks at it before it is sent, and after: sums, the largest changes, objections, what became of it.

Belongs here: reading that from the ledger. Does not: printing it (the command and the home page do), or acting on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from data_checks import guardrails
from delivery.approvals import Standing, standing
from delivery.ledger import BatchRow, Delivery, Ledger, Switch
from delivery.push.reconciliation import BESIDE
from models import catalog
from models.policies.allocation import money_text
from pipeline.decisions import tables
from pipeline.workflow import Workflow


@dataclass(frozen=True)
class BatchReview:
    """A batch, and what the ledger knows beside it. Values in the unit of the decision (micros of money, priority levels)."""

    batch: BatchRow
    standing: Standing
    stopped: Switch | None
    """By whom the workflow is stopped."""
    totals: dict[str, dict[str, int]]
    """arm → entities, changed, before, after, up, down."""
    largest: list[dict[str, Any]]
    """The largest changes, with what ``stands`` there now as far as it was read."""
    not_as_intended: Sequence[Delivery]
    """Deliveries that are neither proven nor still to come."""
    beside: Sequence[Delivery]
    """Deliveries whose watched fields changed with the value."""

    @property
    def objections(self) -> list[str]:
        """What its guardrails said, as sentences."""
        return [guardrails.sentence(finding) for finding in self.batch.findings]

    def as_dict(self) -> dict[str, Any]:
        """The document of ``signalbox show --json``."""
        b = self.batch
        fields = ("entity", "state", "before", "after", "stands", "observed", "says")
        return {
            "batch": b.batch_id, "workflow": b.workflow, "kind": b.kind, "day": b.day, "status": b.status,
            "step": b.step, "digest": b.digest, "rows": b.rows, "changed": b.changed, "delivery": b.delivery,
            "states": b.counts, "findings": b.findings, "approval": self.standing.text, "totals": self.totals,
            "largest changes": self.largest, "stopped": bool(self.stopped),
            "not as intended": [{name: getattr(d, name) for name in fields} for d in self.not_as_intended],
            "changed besides": [{"entity": d.entity, "says": d.says} for d in self.beside],
        }  # fmt: skip


def review(ledger: Ledger, workflow: Workflow, batch_id: str, now: datetime, limit: int = 10) -> BatchReview:
    """A batch of ``workflow`` as of ``now`` (naive UTC), with its ``limit`` largest changes. Raises the ledger's error where
    nobody knows the batch."""
    batch = ledger.batch(batch_id)
    decisions = ledger.decisions(batch_id)
    rows = ledger.deliveries(batch_id)
    four_eyes = workflow.delivery.approval.four_eyes if workflow.delivery else False
    largest = tables.largest_changes(decisions, limit).to_pylist()
    there = {d.entity: d.stands for d in rows if d.entity is not None}
    for row in largest:
        row["stands"] = there.get(row["entity_id"])
    return BatchReview(
        batch,
        standing(ledger, batch, now, four_eyes),
        ledger.stopped(batch.workflow),
        tables.totals(decisions),
        largest,
        [d for d in rows if d.state not in ("ACKED", "PENDING")],
        [d for d in rows if BESIDE in (d.says or "")],
    )


def teller(workflow: Workflow) -> Callable[[int | None], str]:
    """A value of the workflow as people say it: money for a budget, the number for a priority, a dash for none."""
    money = catalog.policy(workflow.policy.kind).money

    def say(value: int | None) -> str:
        return "–" if value is None else money_text(value) if money else str(value)

    return say
