"""Deterministic guards: does what a push met, or what an arm spent, call for taking the batch back.

Belongs here: limits and judging counts against them. Does not: statistics over outcomes, starting a rollback or stopping a
workflow (the caller does), or limits before sending (``data_checks.guardrails``). Pure functions. No data is no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

TRIED = ("ACKED", "REJECTED", "UNKNOWN", "IN_FLIGHT", "CONFLICT", "OVERWRITTEN")
"""States of deliveries that met the downstream system; PENDING and SKIPPED never did, and say nothing about it."""


class Guards(BaseModel):
    """Limits of what may happen while a batch is sent and live. Null: not guarded. A limit is broken above it, not at it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_rejected_share: float | None = Field(
        default=None, ge=0, le=1, description="Share of the tried deliveries that the system rejected"
    )
    max_conflict_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the tried deliveries that a person had overridden (CONFLICT and OVERWRITTEN)",
    )
    max_unknown_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the tried deliveries of which nothing is known (UNKNOWN, IN_FLIGHT)",
    )
    max_overwritten: int | None = Field(
        default=None, ge=0, description="Changes of people that were overwritten, whatever the number of deliveries"
    )
    min_deliveries: int = Field(default=20, ge=1, description="Fewest tried deliveries of which a share says anything")
    max_spend_over_pool: float | None = Field(
        default=None, ge=0, description="What an arm may spend in a day above its pool, as a share of the pool"
    )


@dataclass(frozen=True)
class Finding:
    """A limit that was broken. ``rollback``: the guard asks for the batch to be taken back; otherwise it asks for a look."""

    name: str
    limit: float
    observed: float
    rollback: bool
    text: str
    arm: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a ledger event or a report."""
        return asdict(self)


def judge(counts: Mapping[str, int], guards: Guards) -> list[Finding]:
    """Judge the deliveries of one batch by their number in each state, as ``push`` reports them.

    Raises ValueError for a negative count. Unknown deliveries never ask for a rollback: no data is no verdict.
    """
    if wrong := sorted(state for state, n in counts.items() if n < 0):
        raise ValueError(f"a count below zero: {wrong}")
    tried = sum(counts.get(state, 0) for state in TRIED)
    found: list[Finding] = []
    for name, states, rollback, what in (
        ("max_rejected_share", ("REJECTED",), True, "were rejected by the downstream system"),
        ("max_conflict_share", ("CONFLICT", "OVERWRITTEN"), True, "had been changed by people"),
        ("max_unknown_share", ("UNKNOWN", "IN_FLIGHT"), False, "have no known result; push again to resolve them"),
    ):
        limit = getattr(guards, name)
        n = sum(counts.get(state, 0) for state in states)
        if limit is not None and tried >= guards.min_deliveries and n / tried > limit:
            text = f"{n} of {tried} tried deliveries {what} (limit {limit:.2%})"
            found.append(Finding(name, limit, n / tried, rollback, text))
    overwritten = counts.get("OVERWRITTEN", 0)
    if guards.max_overwritten is not None and overwritten > guards.max_overwritten:
        text = f"{overwritten} changes of people were overwritten (limit {guards.max_overwritten})"
        found.append(Finding("max_overwritten", guards.max_overwritten, overwritten, True, text))
    return found


def spend_over_pool(
    spend: Mapping[str, int | None], pools: Mapping[str, int | None] | None, guards: Guards
) -> list[Finding]:
    """Judge what each arm spent in a day beside its pool, both in the unit of the decision (micros of money), exact.

    An arm whose spend or pool is not known gets no verdict. Raises ValueError for a negative pool.
    """
    if guards.max_spend_over_pool is None:
        return []
    found = []
    for arm in sorted(spend):
        spent, pool = spend[arm], (pools or {}).get(arm)
        if spent is None or pool is None:
            continue
        if pool < 0:
            raise ValueError(f"the pool of arm {arm} is below zero: {pool}")
        # as written (0.15), not as the nearest binary number, so that exactly the limit is never over it
        if Decimal(spent - pool) > Decimal(pool) * Decimal(repr(guards.max_spend_over_pool)):
            over = (spent - pool) / max(pool, 1)
            text = f"arm {arm} spent {spent} where its pool is {pool} (limit {guards.max_spend_over_pool:.2%} above it)"
            found.append(Finding("max_spend_over_pool", guards.max_spend_over_pool, over, True, text, arm))
    return found
