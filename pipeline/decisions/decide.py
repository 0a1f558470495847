"""From scores to decisions: the policy over a day's entities, the arms, the batch with its record, and writing it.

Belongs here: how a batch is made and what is recorded of it. Does not: which model scored (``pipeline.decisions.scoring``), the same
decision again (``pipeline.decisions.replay``), how a policy chooses (``models``), or what is shown (``assets``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common import errors
from data_checks import guardrails
from delivery.ledger import BatchRow, Ledger, generation
from models import catalog
from models.policies import arms
from models.registry import Registry
from pipeline import point_in_time, provenance
from pipeline.decisions import scoring, tables
from pipeline.ingest import without_secrets
from pipeline.lake import Lake, Moved, TableMissing, content_digest
from pipeline.lifecycle import hold
from pipeline.workflow import Workflow


@dataclass(frozen=True)
class Batch:
    """The decisions of one workflow and day, and what a person and a push need to know of them."""

    decisions: pa.Table
    record: dict[str, Any]
    batch_id: str
    digest: str
    step: str
    reasons: tuple[str, ...]
    status: str
    findings: tuple[dict[str, Any], ...]
    late: bool
    certificates: dict[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """How many decisions change something."""
        return int(pc.sum(self.decisions["changed"]).as_py() or 0)

    @property
    def review(self) -> int:
        """How many are left to people."""
        return int(pc.sum(self.decisions["review"]).as_py() or 0)


def decide(
    workflow: Workflow, day: date, features: pa.Table, scores: pa.Table, drawn: pa.Table, step: str
) -> tuple[pa.Table, dict[str, Any]]:
    """The policy over one day's entities: a pure function of its arguments.

    ``features``: the day's rows; ``scores``: rows with the same keys, none for the step ``no_change`` (everybody keeps the
    status quo); ``drawn``: unit, arm, arm_probability of every unit. Returns decisions sorted by entity_id, and
    certificates by arm where the policy has them.
    """
    if features.num_rows == 0:
        return tables.DECISIONS.empty_table(), {}
    chosen = of_policy(workflow, features)
    spec = workflow.policy
    if step == "no_change" or chosen.num_rows == 0:
        return _unchanged(workflow, chosen, drawn), {}
    decided, certificates = catalog.policy(spec.kind).decide(
        spec, chosen, scores, drawn, explore=workflow.arms.explore, key=f"{workflow.name} {day}"
    )
    return decided.sort_by("entity_id"), certificates


def mixed(workflow: Workflow, features: pa.Table, drawn: pa.Table, scores: pa.Table, challenger: pa.Table) -> pa.Table:
    """The scores that a day with a canary is decided by: the challenger's for entities whose unit is in its arm, the
    champion's for all others. Columns are the champion's; raises KeyError where the challenger lacks one."""
    units = drawn.filter(pc.equal(drawn["arm"], "challenger"))["unit"]
    chosen = of_policy(workflow, features)
    mine = chosen.filter(pc.is_in(chosen["unit"], value_set=units.combine_chunks()))["entity_id"].combine_chunks()
    if len(mine) == 0:
        return scores
    kept = scores.filter(pc.invert(pc.is_in(scores["entity_id"], value_set=mine)))
    theirs = challenger.filter(pc.is_in(challenger["entity_id"], value_set=mine))
    return pa.concat_tables([kept, theirs.select(scores.schema.names).cast(scores.schema)])


def of_policy(workflow: Workflow, features: pa.Table) -> pa.Table:
    """The rows that the policy decides on, in the order of their keys, with their ``unit``."""
    chosen = point_in_time.chosen(workflow, point_in_time.ordered(features), "policy.decide_on")
    unit = chosen[workflow.arms.unit].cast(pa.string())
    # a unit that upstream left empty is a unit of its own rather than nobody's
    unit = pc.fill_null(unit, "(none)")
    return (
        chosen.drop_columns(["unit"]).append_column("unit", unit)
        if "unit" in chosen.schema.names
        else chosen.append_column("unit", unit)
    )


def draw_arms(
    workflow: Workflow, day: date, units: list[str], keep: pa.Table | None, ledger: Ledger | None = None
) -> pa.Table:
    """Arms of the units for the epoch of ``day``: those drawn earlier in the epoch keep theirs.

    ``ledger``: says whether a version is on hold, so that half are held out (``pipeline.lifecycle.hold``); None: nobody is.
    """
    spec = workflow.arms
    epoch, in_washout = arms.epoch_of(day, workflow.start, spec.epoch, spec.washout)
    earlier = keep.filter(pc.equal(keep["epoch"], epoch)) if keep is not None else None
    drawn = arms.draw(
        units,
        workflow=workflow.name,
        design=spec.design,
        epoch=epoch,
        shares=hold.shares(ledger, workflow.name, spec.shares, epoch),
        strata=None if spec.design == "entity" else [""] * len(units),
        keep=earlier,
    )
    return drawn.append_column("epoch", pa.array([epoch] * drawn.num_rows, pa.string())).append_column(
        "washout", pa.array([in_washout] * drawn.num_rows, pa.bool_())
    )


def _unchanged(workflow: Workflow, chosen: pa.Table, drawn: pa.Table) -> pa.Table:
    """Everybody keeps the status quo."""
    n = chosen.num_rows
    if n == 0:
        return tables.DECISIONS.empty_table()
    place = pc.index_in(chosen["unit"], value_set=drawn["unit"].combine_chunks())
    before = chosen[scoring.status_quo(workflow)].cast(pa.int64())
    return pa.table(
        {
            "entity_id": chosen["entity_id"],
            "unit": chosen["unit"],
            "arm": drawn["arm"].take(place),
            "arm_probability": drawn["arm_probability"].take(place),
            "perturbation": pa.nulls(n, pa.float64()),
            "perturbation_probability": pa.nulls(n, pa.float64()),
            "before": before,
            "after": before,
            "changed": pa.array(np.zeros(n, bool)),
            "review": pa.array(np.zeros(n, bool)),
            "expected_gain": pa.array(np.zeros(n)),
            "reasons": pa.array([["Nothing is changed today: see the batch's step."]] * n, pa.list_(pa.string())),
        },
        schema=tables.DECISIONS,
    )


def said_by(workflow: Workflow) -> tuple[str, str]:
    """What the workflow says now, its addresses without user, password, query and fragment, and the digest of that."""
    said = workflow.model_dump_json(exclude={"folder"})
    clean = _clean(json.loads(said))
    if clean != json.loads(said):
        said = json.dumps(clean, separators=(",", ":"), ensure_ascii=False)
    return said, hashlib.sha256(said.encode()).hexdigest()


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _clean(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_clean(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


def record_spec(workflow: Workflow, lake: Lake) -> str:
    """Keep what the workflow says now under its digest, so that a decision can name it; returns the digest."""
    said, digest = said_by(workflow)
    table = workflow.table("specs")
    known = lake.exists(table) and lake.read(table, where=pc.field("digest") == digest, columns=["digest"]).num_rows
    if not known:
        row = pa.table({"digest": [digest], "said": [said], "kept": pa.array(["spec"])})
        lake.replace(table, row, predicate=f"digest = '{digest}'", partition_by=["kept"])
    return digest


def decide_day(workflow: Workflow, lake: Lake, day: date, *, ledger: Ledger | None = None) -> Batch:
    """Decide a day from its recorded scoring; writes the arms that are drawn and nothing else. ``ledger``: as ``draw_arms`` takes it.

    Raises TableMissing where the day was never scored.
    """
    stored = lake.read(workflow.table("scoring"), days=[day]).to_pylist()
    if not stored:
        raise TableMissing(
            f"{workflow.name}: {day} was never scored; materialise [{workflow.name}, scores] for it first"
        )
    made = stored[0]
    features = features_of(workflow, lake, day, made["features_version"], made.get("standing_version"))
    return _decided(
        workflow,
        day,
        made,
        features,
        tables.scores_of(workflow, lake, day, made),
        lambda: tables.challenger_scores(workflow, lake, day, made),
        _arms(workflow, lake, day, features, ledger),
        record_spec(workflow, lake),
    )


def recompute_day(
    workflow: Workflow, lake: Lake, registry: Registry, ledger: Ledger, day: date, recorded: BatchRow
) -> Batch:
    """Decide a day that is a fact anew from what would decide it now, in memory: nothing is written.

    As then are only the hour (whether the deadline had passed, whether it was a backfill) and what stood downstream.
    Raises what ``score_day`` raises.
    """
    stood = tables.standing_at(workflow, lake, day, recorded.record.get("standing_version"))
    late = bool(recorded.record.get("late"))
    scored = scoring.score_day(
        workflow, lake, registry, day, now=recorded.decided_at, ledger=ledger, late=late, standing=stood
    )
    made = {**scoring.scoring_of(day, scored), "standing_version": recorded.record.get("standing_version")}
    features = scoring.with_standing(
        workflow, features_of(workflow, lake, day, made["features_version"]), scored.standing
    )
    theirs = scored.beside.table if scored.beside else None
    drawn = _arms(workflow, lake, day, features, ledger, write=False)
    return _decided(workflow, day, made, features, scored.table, lambda: theirs, drawn, said_by(workflow)[1])


def _decided(
    workflow: Workflow,
    day: date,
    made: Mapping[str, Any],
    features: pa.Table,
    scores: pa.Table,
    challengers: Callable[[], pa.Table | None],
    arms_drawn: tuple[int | None, pa.Table],
    spec_digest: str,
) -> Batch:
    """The batch of a day from all that it is made from; ``made``: the record of its scoring."""
    arms_version, drawn = arms_drawn
    reasons, decided = list(made["reasons"]), None
    # beside the rule, where the champion does worse than it, a canary is tried as it is beside the champion
    if made["step"] in ("champion", "rule") and made.get("challenger_stage") == "canary":
        theirs = challengers()
        try:
            if theirs is None:
                raise ValueError(made["challenger_reason"])
            both = mixed(workflow, features, drawn, scores, theirs)
            decided = decide(workflow, day, features, both, drawn, made["step"])
        except (KeyError, TypeError, ValueError) as error:
            # it is the challenger's failure, and never the day's
            reasons.append(f"the arm challenger is decided by the {made['step']}: {errors.first_line(error)}")
    acts = decided is not None
    decisions, certificates = decided or decide(workflow, day, features, scores, drawn, made["step"])
    epoch, in_washout = arms.epoch_of(day, workflow.start, workflow.arms.epoch, workflow.arms.washout)
    record = {
        "workflow": workflow.name,
        "epoch": epoch,
        "washout": in_washout,
        "step": made["step"],
        "model_version": made["model_version"],
        "model_digest": made["model_digest"],
        "challenger_version": made["challenger_version"] if acts else None,
        "challenger_digest": made["challenger_digest"] if acts else None,
        "features_version": made["features_version"],
        "outcomes_version": made["outcomes_version"],
        "arms_version": arms_version,
        "standing_version": made.get("standing_version"),
        "spec_digest": spec_digest,
        "code_commit": provenance.commit(),
        "code_digest": provenance.digest(workflow.name),
    }
    digest = hashlib.sha256(
        (content_digest(decisions) + json.dumps({**record, "day": str(day)}, sort_keys=True)).encode()
    ).hexdigest()
    result = guardrails.check(decisions, workflow.guardrails)
    return Batch(
        decisions=decisions,
        record=record,
        batch_id=f"{workflow.name}-{day}-{digest[:12]}",
        digest=digest,
        step=made["step"],
        reasons=tuple(reasons),
        late=made["late"],
        status=result.status,
        findings=tuple(result.findings),
        certificates=certificates,
    )


def features_of(
    workflow: Workflow, lake: Lake, day: date, version: int | None, standing_version: int | None = None
) -> pa.Table:
    """A day's features as they decide: with the status quo that stood, where a record names it."""
    if version is None:
        columns = {"entity_id": pa.string(), workflow.arms.unit: pa.string()}
        return pa.schema(columns).empty_table()
    features = lake.read(workflow.table("features"), version=version, days=[day])
    return scoring.with_standing(workflow, features, tables.standing_at(workflow, lake, day, standing_version))


def _arms(
    workflow: Workflow,
    lake: Lake,
    day: date,
    features: pa.Table,
    ledger: Ledger | None = None,
    *,
    write: bool = True,
) -> tuple[int | None, pa.Table]:
    """The arms of a day's units, drawn where the epoch has not drawn them yet, and the version of the table that holds them.

    Of several days that draw at once each keeps what the others had drawn: a unit is in one arm over the whole epoch.
    """
    table = workflow.table("arms")
    if features.num_rows == 0:
        return lake.version(table), pa.table(
            {
                "unit": pa.array([], pa.string()),
                "arm": pa.array([], pa.string()),
                "arm_probability": pa.array([], pa.float64()),
            }
        )
    units = pc.unique(of_policy(workflow, features)["unit"]).sort().to_pylist()
    epoch = arms.epoch_of(day, workflow.start, workflow.arms.epoch, workflow.arms.washout)[0]
    while True:
        version = lake.version(table)
        keep = lake.read(table, version=version) if version is not None else None
        drawn = draw_arms(workflow, day, units, keep, ledger)
        earlier = keep.filter(pc.equal(keep["epoch"], epoch)) if keep is not None else None
        fresh = (
            drawn
            if earlier is None
            else drawn.filter(pc.invert(pc.is_in(drawn["unit"], value_set=earlier["unit"].combine_chunks())))
        )
        if not fresh.num_rows or not write:
            return version, drawn
        dated = fresh.drop_columns(["washout"]).append_column("drawn_on", pa.array([day] * fresh.num_rows, pa.date32()))
        both = dated if earlier is None else pa.concat_tables([earlier.select(dated.schema.names), dated])
        with contextlib.suppress(Moved):  # then another day has drawn: its arms are read, and kept
            version = lake.replace(table, both, predicate=f"epoch = '{epoch}'", partition_by=["epoch"], base=version)
            return version, drawn


def with_record(workflow: Workflow, day: date, batch: Batch) -> pa.Table:
    """The decisions as they are stored: each row names itself, its batch, and everything that it was made from."""
    base, number = generation(batch.batch_id)
    # the same content decided once more is another decision, and the ledger names it so
    suffix = f".{number}" if number > 1 else ""
    ids = [
        hashlib.sha256(f"{base}\0{e}".encode()).hexdigest()[:20] + suffix
        for e in batch.decisions["entity_id"].to_pylist()
    ]
    named = batch.decisions.append_column("decision_id", pa.array(ids, pa.string()))
    return _stamped(named, day, batch.batch_id, batch.record)


def _stamped(decisions: pa.Table, day: date, batch_id: str, record: Mapping[str, Any]) -> pa.Table:
    """Decisions with the columns that are the same in every row of a batch."""
    n = decisions.num_rows
    table = decisions.append_column("batch_id", pa.array([batch_id] * n, pa.string()))
    table = table.append_column("day", pa.array([day] * n, pa.date32()))
    for column in tables.RECORD:
        # a batch from before a column lacks it
        table = table.append_column(column.name, pa.array([record.get(column.name)] * n, column.type))
    return table


def write_batch(workflow: Workflow, lake: Lake, day: date, batch: Batch, *, decided_at: datetime, run_id: str) -> None:
    """Write a day's decisions, then the batch that makes them count. The ledger comes first: ``complete_lake`` brings the
    lake after it where a run ended in between."""
    row = {
        **batch.record,
        "day": day,
        "batch_id": batch.batch_id,
        "digest": batch.digest,
        "step": batch.step,
        "reasons": list(batch.reasons),
        "status": batch.status,
        "findings": json.dumps(batch.findings, default=str, sort_keys=True),
        "certificates": json.dumps(batch.certificates, default=str, sort_keys=True),
        "rows": batch.decisions.num_rows,
        "changed": batch.changed,
        "review": batch.review,
        "decided_at": decided_at,
        "late": batch.late,
        "run_id": run_id,
    }
    _write_batch(workflow, lake, day, with_record(workflow, day, batch), row)


def _write_batch(workflow: Workflow, lake: Lake, day: date, decisions: pa.Table, row: Mapping[str, Any]) -> None:
    lake.replace_days(workflow.table("decisions"), decisions, [day])
    lake.replace_days(workflow.table("batches"), pa.Table.from_pylist([dict(row)], schema=tables.BATCHES), [day])


def complete_lake(workflow: Workflow, lake: Lake, ledger: Ledger, day: date) -> str | None:
    """Bring the lake after the ledger: where the newest decision batch of a day does not stand in the lake, its decisions
    and its row are written from the ledger. Returns the batch's id where there was something to do.

    A batch whose rows the ledger has let go (retention) is left as it is, and so are decisions on forgotten names.
    """
    known = [b for b in ledger.batches(workflow.name, since=day, kind="decision") if b.day == day]
    newest = max(known, key=lambda b: b.sequence, default=None)
    if newest is None or newest.retired:
        return None
    table = workflow.table("batches")
    if lake.exists(table):
        stands = lake.read(table, days=[day], columns=["batch_id"])["batch_id"].to_pylist()
        if stands == [newest.batch_id]:
            return None
    found = ledger.decisions(newest.batch_id)
    found = found.filter(pc.is_valid(found["entity_id"]))
    decided = (
        found.select(tables.DECISIONS.names).cast(tables.DECISIONS).append_column("decision_id", found["decision_id"])
    )
    record = newest.record
    row = {
        **record,
        "day": day,
        "batch_id": newest.batch_id,
        "digest": newest.digest,
        "step": newest.step,
        "reasons": list(record.get("step_reasons", ())),
        "status": newest.status,
        "findings": json.dumps(list(newest.findings), default=str, sort_keys=True),
        "certificates": json.dumps(record.get("certificates", {}), default=str, sort_keys=True),
        "rows": newest.rows,
        "changed": newest.changed,
        "review": int(pc.sum(found["review"]).as_py() or 0),
        "decided_at": newest.decided_at,
        "late": bool(record.get("late")),
        "run_id": newest.run_id,
    }
    _write_batch(workflow, lake, day, _stamped(decided, day, newest.batch_id, record), row)
    return newest.batch_id
