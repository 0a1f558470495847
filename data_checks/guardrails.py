"""Blast radius: may this batch of decisions be sent, must a person look at it, or is it refused.

Belongs here: judging a batch before anything is sent. Does not: choosing (``models``), or what happens while sending
(``delivery``). Two kinds of finding: a broken invariant is REFUSED and nobody can approve it; more than an automatic
limit is HELD for a named person.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

EXAMPLES = 5
_COLUMNS = ("entity_id", "unit", "arm", "before", "after", "changed", "review")

Status = Literal["READY", "HELD", "REFUSED"]


class Guardrails(BaseModel):
    """Limits of a batch. ``max_*`` over the limit waits for a person; the others are invariants. Values are in the unit
    of the decision (micros of money, or priority levels)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_rows: int | None = Field(default=None, gt=0, description="Decisions in a batch")
    max_changed: int | None = Field(default=None, ge=0, description="Changed decisions in a batch")
    max_share_changed: float | None = Field(
        default=None, ge=0, le=1, description="Share of the entities whose value changes"
    )
    max_share_units: float | None = Field(
        default=None, ge=0, le=1, description="Share of the units with a changed entity"
    )
    max_change: float | None = Field(
        default=None, gt=0, description="Largest change of one entity, as a share of its value before"
    )
    max_absolute_change: int | None = Field(
        default=None, gt=0, description="Largest change of one entity, in the unit of the decision"
    )
    max_total_change: float | None = Field(
        default=None, gt=0, description="Sum of all absolute changes, as a share of the sum before"
    )
    max_net_change: float | None = Field(
        default=None, ge=0, description="Change of the total of an arm, as a share of the sum before"
    )
    pool: Literal["conserved", "ceiling"] | None = Field(
        default=None,
        description="conserved: each arm decides its pool to the last unit; ceiling: at most its pool; null: no pools",
    )
    levels: tuple[int, int] | None = Field(default=None, description="Lowest and highest value that may be decided")
    unit: int | None = Field(
        default=None,
        gt=0,
        description="Changed values are whole multiples of this, because the system downstream takes no others (10000: cents "
        "in micros)",
    )
    keep_sign: bool = Field(
        default=False, description="A value that was not negative may not become negative, nor the reverse"
    )
    frozen_arms: tuple[str, ...] = Field(default=("holdout",), description="Arms whose decisions may not change")

    @model_validator(mode="after")
    def _levels_in_order(self) -> Guardrails:
        if self.levels and self.levels[0] > self.levels[1]:
            raise ValueError(f"levels: the lowest ({self.levels[0]}) is above the highest ({self.levels[1]})")
        return self


@dataclass(frozen=True)
class GuardrailResult:
    """The verdict on a batch with everything that speaks against it.

    ``findings``: mappings with name, status (HELD | REFUSED), limit, observed, arm (or None), examples (entity ids).
    """

    status: Status
    findings: tuple[dict[str, Any], ...]


def _totals(arm: pa.ChunkedArray, values: np.ndarray) -> dict[str, int]:
    """Exact sums by arm: Arrow's 64-bit sums wrap round silently, so halves are added apart."""
    number = pa.array(values, pa.int64())
    halves = pa.table(
        {
            "arm": arm,
            "high": pc.shift_right(number, 31),
            "low": pc.bit_wise_and(number, pa.scalar(2**31 - 1, pa.int64())),
        }
    )
    summed = halves.group_by("arm").aggregate([("high", "sum"), ("low", "sum")])
    return {r["arm"]: (r["high_sum"] << 31) + r["low_sum"] for r in summed.to_pylist()}


def check(decisions: pa.Table, spec: Guardrails, *, pools: Mapping[str, int] | None = None) -> GuardrailResult:  # noqa: C901 - limits one after another, as the report lists them
    """Judge a batch.

    ``decisions``: the decision columns (entity_id, unit, arm, before BIGINT, after BIGINT, changed, review). ``pools``:
    the money of each arm; by default what its decisions held before, so conserved means that the sum is kept. Raises
    ValueError naming a column that is missing or has the wrong type. An empty batch is READY: there is nothing to send.
    """
    lacking = [c for c in _COLUMNS if c not in decisions.schema.names]
    if lacking:
        raise ValueError(
            f"decisions: column {', '.join(map(repr, lacking))} is missing; guardrails need {', '.join(_COLUMNS)}"
        )
    for name in ("before", "after"):
        if decisions.schema.field(name).type != pa.int64():
            raise ValueError(f"decisions: column {name!r} is {decisions.schema.field(name).type}, it must be BIGINT")
    if decisions.num_rows == 0:
        return GuardrailResult("READY", ())
    findings: list[dict[str, Any]] = []

    def add(
        name: str, status: Status, limit: Any, observed: Any, rows: pa.Table | None = None, arm: str | None = None
    ) -> None:
        examples = [] if rows is None else rows["entity_id"].slice(0, EXAMPLES).to_pylist()
        findings.append(
            {"name": name, "status": status, "limit": limit, "observed": observed, "arm": arm, "examples": examples}
        )

    def refuse(name: str, limit: Any, broken: Any) -> None:
        rows = decisions.filter(broken)
        if rows.num_rows:
            add(name, "REFUSED", limit, rows.num_rows, rows)

    nulls = [pc.is_null(decisions[c]) for c in ("entity_id", "unit", "arm", "before", "after", "changed")]
    for column, empty in zip(("entity_id", "unit", "arm", "before", "after", "changed"), nulls, strict=True):
        refuse(f"null {column}", 0, empty)
    counts = decisions.group_by("entity_id").aggregate([([], "count_all")])
    refuse(
        "duplicate entity",
        1,
        pc.is_in(decisions["entity_id"], counts.filter(pc.greater(counts["count_all"], 1))["entity_id"]),
    )
    # What follows counts only complete rows; an incomplete one has been refused already.
    for empty in nulls:
        nulls[0] = pc.or_(nulls[0], empty)
    rows = decisions.filter(pc.invert(nulls[0]))
    before, after = (rows[c].combine_chunks().to_numpy(zero_copy_only=False) for c in ("before", "after"))
    differs = before != after

    def refuse_where(name: str, limit: Any, broken: np.ndarray) -> None:
        found = rows.filter(pa.array(broken))
        if found.num_rows:
            add(name, "REFUSED", limit, found.num_rows, found)

    refuse_where(
        "changed is not what before and after say",
        0,
        differs != rows["changed"].to_numpy(zero_copy_only=False).astype(bool),
    )
    review = pc.fill_null(rows["review"], False).to_numpy(zero_copy_only=False).astype(bool)
    refuse_where("changed although left to people", 0, differs & review)
    frozen = pc.is_in(rows["arm"], pa.array(spec.frozen_arms, pa.string())).to_numpy(zero_copy_only=False).astype(bool)
    refuse_where("frozen arm changed", 0, differs & frozen)
    if spec.levels:
        # A value that already lay outside and is kept is not this batch's doing.
        refuse_where(
            "outside levels", list(spec.levels), differs & ((after < spec.levels[0]) | (after > spec.levels[1]))
        )
    if spec.keep_sign:
        refuse_where("sign reversed", 0, ((before >= 0) & (after < 0)) | ((before < 0) & (after > 0)))

    held, decided = (_totals(rows["arm"], values) for values in (before, after))
    if spec.pool is not None:
        own = dict(held) if pools is None else dict(pools)
        for arm in sorted(held | own):
            total, pool = decided.get(arm, 0), own.get(arm)
            if pool is None:
                add("arm without a pool", "REFUSED", None, total, arm=arm)
            elif total > pool or (spec.pool == "conserved" and total != pool):
                add("pool", "REFUSED", pool, total, arm=arm)

    def hold(
        name: str, limit: float | None, observed: float, found: pa.Table | None = None, arm: str | None = None
    ) -> None:
        if limit is not None and observed > limit:
            add(name, "HELD", limit, observed, found, arm)

    # In float64, because a difference of two BIGINTs may not fit into one; exactness matters to the invariants only.
    change = np.abs(after.astype(np.float64) - before.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(change == 0, 0.0, change / np.abs(before.astype(np.float64)))
    changed = rows.filter(pa.array(differs))
    hold("rows", spec.max_rows, decisions.num_rows)
    hold("changed", spec.max_changed, changed.num_rows)
    for name, limit, column in (
        ("share changed", spec.max_share_changed, "entity_id"),
        ("share of units", spec.max_share_units, "unit"),
    ):
        if rows.num_rows:
            hold(name, limit, pc.count_distinct(changed[column]).as_py() / pc.count_distinct(rows[column]).as_py())
    for name, limit, sizes in (
        ("change", spec.max_change, share),
        ("absolute change", spec.max_absolute_change, change),
    ):
        if limit is not None and sizes.size and sizes.max() > limit:
            most = np.argsort(-sizes, kind="stable")[:EXAMPLES]
            found = rows.take(pa.array(most[sizes[most] > limit]))
            # An entity that had nothing has no share: its change is endless, which JSON cannot say.
            largest = float(sizes.max())
            hold(name, limit, largest, found) if np.isfinite(largest) else add(
                name, "HELD", limit, "from nothing", found
            )
    if spec.unit is not None:
        off = rows.filter(pa.array(differs & (after % spec.unit != 0)))
        if off.num_rows:
            add("not in whole units", "HELD", f"multiples of {spec.unit}", off.num_rows, off)
    whole = float(np.abs(before.astype(np.float64)).sum())
    if whole:
        hold("total change", spec.max_total_change, float(change.sum()) / whole)
    for arm in sorted(held):
        if held[arm]:
            hold("net change", spec.max_net_change, abs(decided[arm] - held[arm]) / abs(held[arm]), arm=arm)
    statuses = {f["status"] for f in findings}
    status: Status = "REFUSED" if "REFUSED" in statuses else "HELD" if statuses else "READY"
    return GuardrailResult(status, tuple(findings))


def sentence(finding: Mapping[str, Any]) -> str:
    """One finding as a sentence."""
    where = f" in arm {finding['arm']}" if finding["arm"] else ""
    observed = finding["observed"]
    value = f"{observed:.6g}" if isinstance(observed, float) else str(observed)
    among = f", such as {', '.join(map(str, finding['examples']))}" if finding["examples"] else ""
    return f"{finding['status']}: {finding['name']}{where}: {value}, allowed {finding['limit']}{among}"
