"""What a push is told and what it tells: settings, errors, progress, report, diff. Cheap to import.

Belongs here: values only. Does not: doing anything (``delivery.push``, which also exports them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from common.errors import SignalboxError


class PushError(SignalboxError, RuntimeError):
    """A push that may not begin or cannot go on; the message says why and the way out. Nothing is lost by it."""


class Refused(PushError):
    """The batch was refused by its guardrails and is never sent."""


class NotApproved(PushError):
    """The batch waits for a named person."""


class Stopped(PushError):
    """The workflow was stopped by a person."""


class Blocked(PushError):
    """A rollback of the same workflow is not complete; it comes first."""


class Changed(PushError):
    """The connector's settings say something else of values than when the batch was decided, or approved."""


class PushSettings(BaseModel):
    """How a workflow's batches are sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    concurrency: int = Field(default=8, ge=1, le=64, description="Calls at the same time")
    rate_per_s: float | None = Field(
        default=None, gt=0, description="Most calls a second, reads and writes together; none: no limit"
    )
    wave: int = Field(default=200, ge=1, description="Deliveries between two commits of the ledger")
    attempts: int = Field(default=5, ge=1, description="Writes of one value, before it is given up as rejected")
    patience_s: float = Field(
        default=120.0, ge=0, description="Seconds for which a system that does not answer is asked again"
    )
    backoff_s: tuple[float, float] = Field(
        default=(0.2, 20.0), description="First and longest bound of the random wait between tries"
    )
    breaker_failures: int = Field(
        default=10, ge=1, description="Entities that failed in a row, after which the system is left alone"
    )
    breaker_cooldown_s: float = Field(
        default=15.0, gt=0, description="Seconds for which it is left alone before one call probes it"
    )
    lease_s: float = Field(
        default=60.0, gt=0, description="Seconds after which another machine may take over from a silent pusher"
    )
    late_s: float = Field(
        default=2.0, ge=0,
        description="Seconds for which an unanswered write may still be applied; only waited where the system has no "
        "conditional write, and before an unknown one is taken for lost",
    )  # fmt: skip
    unit: int = Field(
        default=1,
        ge=1,
        description="What a value that had to be replanned is rounded down to (10000: cents, in micros)",
    )
    four_eyes: bool = Field(default=False, description="A held batch wants two different approvers")


@dataclass(frozen=True)
class Progress:
    """How far a push is: ``done`` of ``total`` deliveries are over; ``counts`` by state."""

    batch_id: str
    done: int
    total: int
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """What became of a push. ``complete``: every delivery is over, nothing is left that running it again could do.

    ``why``: why it is not, or why nothing was sent. ``window_*_ms``: from before the reading that a write was based on until
    its answer, in milliseconds; within it a change by somebody else can be overwritten where the system has no conditional
    write. ``repeats``: writes repeated although the first may have been applied, where the system knows neither keys nor
    conditions. ``replanned``: entities that got less than decided. ``dead_letters``, ``conflicts``, ``overwritten``,
    ``beside`` (the value stands, other watched fields changed with it): entity and words; they and ``counts`` are of the
    whole batch, the rest is of this run. ``sends``: writes that left for the system. ``reads``: entities read.
    """

    batch_id: str
    system: str
    complete: bool
    counts: Mapping[str, int]
    guarantee: str
    why: str = ""
    window_max_ms: float | None = None
    window_median_ms: float | None = None
    sends: int = 0
    reads: int = 0
    repeats: int = 0
    replanned: tuple[tuple[str, int, int], ...] = ()
    dead_letters: tuple[tuple[str, str], ...] = ()
    conflicts: tuple[tuple[str, str], ...] = ()
    overwritten: tuple[tuple[str, str], ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    ledger_seconds: float = 0.0

    def failure(self, max_rejected_share: float | None = None) -> str:
        """Why a push that came to its end did not do what it was for: nothing of it stands, or more than the guard's share was
        rejected, of however few deliveries. Empty: it did, or it had nothing to send."""
        total, landed = sum(self.counts.values()), sum(self.counts.get(state, 0) for state in ("ACKED", "OVERWRITTEN"))
        tried = total - self.counts.get("SKIPPED", 0) - self.counts.get("PENDING", 0)
        rejected = self.counts.get("REJECTED", 0)
        if total and not landed:
            return f"none of {total} deliveries was acknowledged: {dict(sorted(self.counts.items()))}"
        if max_rejected_share is not None and tried and rejected / tried > max_rejected_share:
            return f"{rejected} of {tried} tried deliveries were rejected (limit {max_rejected_share:.2%})"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For a command's --json and for metadata."""
        return asdict(self)


@dataclass(frozen=True)
class DiffRow:
    """What a push would do to one entity: from ``now`` to ``would`` (None: it would be left), or ``why`` not."""

    entity: str
    arm: str | None
    now: int | None
    would: int | None
    action: str
    """SEND, or the state that it would end in without a write."""
    why: str = ""


@dataclass(frozen=True)
class Diff:
    """The exact difference between a batch and what stands downstream. ``notes``: what would keep a push from beginning."""

    batch_id: str
    system: str
    rows: tuple[DiffRow, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a command's --json."""
        return asdict(self)
