"""The tables of scores, decisions and batches: their Arrow schemas, their rows as the records mean them, and their sums.

Belongs here: what is read by more than one stage. Does not: how rows come about (``pipeline.decisions.scoring``, ``pipeline.decisions.decide``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.lake import Lake
from pipeline.workflow import Workflow

STEPS = ("champion", "previous_champion", "rule", "no_change")
STANDING = pa.schema(
    {"entity_id": pa.string(), "value": pa.int64(), "batch_id": pa.string(), "verified_at": pa.timestamp("us")}
)
"""What stands downstream where it is known better than the day's features say: the value, what proved it, and when."""
DECISIONS = pa.schema(
    {
        "entity_id": pa.string(),
        "unit": pa.string(),
        "arm": pa.string(),
        "arm_probability": pa.float64(),
        "perturbation": pa.float64(),
        "perturbation_probability": pa.float64(),
        "before": pa.int64(),
        "after": pa.int64(),
        "changed": pa.bool_(),
        "review": pa.bool_(),
        "expected_gain": pa.float64(),
        "reasons": pa.list_(pa.string()),
    }
)
RECORD = pa.schema(
    {
        "workflow": pa.string(),
        "epoch": pa.string(),
        "washout": pa.bool_(),
        "step": pa.string(),
        "model_version": pa.int64(),
        "model_digest": pa.string(),
        "challenger_version": pa.int64(),
        "challenger_digest": pa.string(),
        "features_version": pa.int64(),
        "outcomes_version": pa.int64(),
        "arms_version": pa.int64(),
        "standing_version": pa.int64(),
        "spec_digest": pa.string(),
        "code_commit": pa.string(),
        "code_digest": pa.string(),
    }
)
SCORING = pa.schema(
    {
        "day": pa.date32(),
        "step": pa.string(),
        "reasons": pa.list_(pa.string()),
        "model_version": pa.int64(),
        "model_digest": pa.string(),
        "features_version": pa.int64(),
        "outcomes_version": pa.int64(),
        "late": pa.bool_(),
        "challenger_version": pa.int64(),
        "challenger_digest": pa.string(),
        "challenger_stage": pa.string(),
        "challenger_reason": pa.string(),
        "scoring_id": pa.string(),
        "scores_version": pa.int64(),
        "shadow_version": pa.int64(),
        "standing_version": pa.int64(),
    }
)
"""The record of a day's scoring. ``scoring_id`` stands in its rows of ``scores`` too; a row from before has none, nor versions."""


def standing_at(workflow: Workflow, lake: Lake, day: date, version: int | None) -> pa.Table:
    """What stood for a day, as a record names it; none where it names no version."""
    if version is None:
        return STANDING.empty_table()
    found = lake.read(workflow.table("standing"), version=version, days=[day])
    return found.select(STANDING.names).cast(STANDING).sort_by("entity_id").combine_chunks()


def recorded_scores(
    workflow: Workflow,
    lake: Lake,
    days: Sequence[date],
    *,
    where: pc.Expression | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """The scores of days as the records of their scoring mean them, whatever a run that was killed left in their place.

    ``columns`` come with ``day`` and ``scoring_id``. Raises TableMissing where nothing was ever scored.
    """
    table, kept = workflow.table("scores"), columns

    def read(of: Sequence[date], version: int | None = None) -> pa.Table:
        return lake.read(table, version=version, days=of, where=where, columns=kept)

    known = lake.read(table, days=[]).schema.names
    if "scoring_id" not in known or not lake.exists(workflow.table("scoring")):
        return read(days)
    kept = None if columns is None else list(dict.fromkeys([*columns, "day", "scoring_id"]))
    found = read(days)
    made = lake.read(workflow.table("scoring"), days=days).to_pylist()
    named = {row["day"]: row for row in made if row.get("scores_version") is not None}
    stands = found.group_by(["day", "scoring_id"]).aggregate([]).to_pylist()
    torn = sorted({r["day"] for r in stands if r["day"] in named and r["scoring_id"] != named[r["day"]]["scoring_id"]})
    if not torn:
        return found
    whole = found.filter(pc.invert(pc.is_in(found["day"], value_set=pa.array(torn, pa.date32()))))
    parts = [read([d], named[d]["scores_version"]) for d in torn]
    return pa.concat_tables([whole, *parts], promote_options="default")


def challenger_scores(workflow: Workflow, lake: Lake, day: date, made: Mapping[str, Any]) -> pa.Table | None:
    """What the challenger of a day's scoring (``made``, its row) said of each entity; None where there was none or it failed."""
    # a row from before there were challengers lacks the columns
    number = made.get("challenger_version")
    if number is None or made.get("challenger_reason"):
        return None
    mine, version = pc.field("version") == number, made.get("shadow_version")
    found = lake.read(workflow.table("shadow_scores"), version=version, days=[day], where=mine)
    return found.drop_columns(["day", "version"])


def scores_of(workflow: Workflow, lake: Lake, day: date, made: Mapping[str, Any]) -> pa.Table:
    """The scores that a record of a day's scoring (``made``) means; none for the step ``no_change``."""
    if made["step"] == "no_change":
        return pa.table({})
    # a row from before scores were named lacks the columns
    found = lake.read(workflow.table("scores"), version=made.get("scores_version"), days=[day])
    return found.drop_columns([c for c in ("day", "scoring_id") if c in found.schema.names])


BATCHES = pa.schema(
    {
        "day": pa.date32(),
        "batch_id": pa.string(),
        "digest": pa.string(),
        "step": pa.string(),
        "reasons": pa.list_(pa.string()),
        "status": pa.string(),
        "findings": pa.string(),
        "certificates": pa.string(),
        "rows": pa.int64(),
        "changed": pa.int64(),
        "review": pa.int64(),
        "decided_at": pa.timestamp("us"),
        "late": pa.bool_(),
        "run_id": pa.string(),
        **{f.name: f.type for f in RECORD if f.name != "step"},
    }
)


def by_arm(decisions: pa.Table) -> dict[str, int]:
    """How many entities each arm holds today; an arm that is missing compares with nothing."""
    counts = decisions.group_by("arm").aggregate([([], "count_all")]).sort_by("arm").to_pylist()
    return {row["arm"]: row["count_all"] for row in counts}


def totals(decisions: pa.Table) -> dict[str, dict[str, int]]:
    """What the batch does in sum, by arm: entities, how many change, the sum before and after, and of the changes up and down."""
    found: dict[str, dict[str, int]] = {}
    for arm in sorted(pc.unique(decisions["arm"]).to_pylist()) if decisions.num_rows else []:
        mine = decisions.filter(pc.equal(decisions["arm"], arm))
        before, after = mine["before"].to_numpy(), mine["after"].to_numpy()
        move = after - before
        found[arm] = {
            "entities": mine.num_rows, "changed": int((move != 0).sum()), "before": int(before.sum()),
            "after": int(after.sum()), "up": int(move[move > 0].sum()), "down": int(-move[move < 0].sum()),
        }  # fmt: skip
    return found


def largest_changes(decisions: pa.Table, rows: int = 10) -> pa.Table:
    """The decisions that change most, largest first (ties by entity): what a person wants to see of a batch."""
    if decisions.num_rows == 0:
        return decisions
    size = pc.abs(pc.subtract(pc.fill_null(decisions["after"], 0), pc.fill_null(decisions["before"], 0)))
    order = pc.sort_indices(
        pa.table({"size": size, "entity_id": decisions["entity_id"]}),
        sort_keys=[("size", "descending"), ("entity_id", "ascending")],
    )
    wanted = ["decision_id", "entity_id", "arm", "before", "after", "expected_gain", "review", "reasons"]
    return decisions.take(order[:rows]).select([c for c in wanted if c in decisions.schema.names])
