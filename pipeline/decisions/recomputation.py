"""What a day is now, and whether what decided it would decide it so again.

Belongs here: whether a day may still be decided, the comparison of recorded decisions with the same day recomputed, and
the cause of each difference. Does not: deciding (``pipeline.decisions.decide``), what a delivery made of a batch, or what is shown
(``assets``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError

from common import duckdb_session, errors
from delivery.ledger import BatchRow, Ledger
from models.registry import Registry
from pipeline import point_in_time, provenance
from pipeline.decisions import decide, in_effect, scoring, tables
from pipeline.lake import Lake, TableMissing, content_digest
from pipeline.workflow import Workflow

DayState = Literal["fresh", "backfill", "decided", "sent", "over"]
"""fresh: not decided, and its effect lasts. backfill: not decided, and its effect is over. decided: decided, and nothing of
it was sent. sent: something of it was sent, or a push of it is under way, and its effect lasts. over: decided, and its
effect is over."""


def state_of(day: date, batches: Sequence[BatchRow], now: datetime) -> DayState:
    """What a day is at ``now``, from its decision batches in the ledger: a pure function."""
    over = now >= in_effect.over(day)
    if not batches:
        return "backfill" if over else "fresh"
    if over:
        return "over"
    return "sent" if any(b.acted or b.delivery == "OPEN" for b in batches) else "decided"


def decides(state: DayState, *, again: bool) -> bool:
    """Whether a run decides the day, or only recomputes and compares it. ``again``: somebody asked for it in so many words."""
    return state in ("fresh", "backfill", "decided") or (state == "sent" and again)


@dataclass(frozen=True)
class Today:
    """A day as a run finds it."""

    day: date
    state: DayState
    decides: bool
    asked: bool
    """It is decided anew although it was sent, because somebody asked."""
    recorded: BatchRow | None
    """The batch that acted, the newest of them; else the newest recorded; None where the day was never decided."""

    @property
    def says(self) -> str:
        """Why a run writes nothing, or what is special about what it writes; empty on an ordinary day."""
        if self.state == "backfill":
            return "a backfill: its effect is over, so it is recorded, never sent, and never counts as what acted"
        if self.recorded is None or (self.decides and not self.asked):
            return ""
        batch = self.recorded.batch_id
        if self.asked:
            return f"decided anew, as was asked for, after batch {batch} was sent"
        if self.state == "sent":
            return (
                f"batch {batch} was sent, and its effect lasts: it is recomputed and compared, nothing is written; it is "
                "decided anew only with `again` (signalbox run … --again, or the field of the assets in the Launchpad)"
            )
        return f"its effect is over and batch {batch} stands: it is recomputed and compared, nothing is written"


def today(workflow: Workflow, ledger: Ledger, day: date, now: datetime, *, again: bool = False) -> Today:
    """What a run of ``day`` at ``now`` may do."""
    batches = [b for b in ledger.batches(workflow.name, since=day, kind="decision") if b.day == day]
    state = state_of(day, batches, now)
    acted = [b for b in batches if b.acted and not b.backfill]
    recorded = max(acted or batches, key=lambda b: b.sequence, default=None)
    return Today(day, state, decides(state, again=again), state == "sent" and again, recorded)


# --- the same again ---------------------------------------------------------------------------------------------------

SHOWN = 20
"""Differing decisions that are shown; all are counted."""
_SHOWN = pa.schema(
    {"entity_id": pa.string(), "recorded": pa.int64(), "recomputed": pa.int64(), "differs_in": pa.string(), "why": pa.string()}
)  # fmt: skip
NO_CAUSE = "nothing that it was made from differs: not deterministic"


@dataclass(frozen=True)
class Compared:
    """The recorded decisions of a day beside the same day recomputed."""

    batch_id: str
    rows: int
    differing: int = 0
    causes: Mapping[str, int] = field(default_factory=dict)
    """Cause → how many of the differing decisions it may have changed."""
    unexplained: int = 0
    """Differing decisions without any cause."""
    first: pa.Table = field(default_factory=_SHOWN.empty_table)
    """The first differing decisions by entity: entity_id, recorded, recomputed (values after), differs_in, why."""
    impossible: str = ""
    """Why nothing could be compared; empty where it was."""

    @property
    def equal(self) -> bool:
        """Whether every decision is the same."""
        return not self.differing and not self.impossible

    @property
    def says(self) -> str:
        """One sentence for a check."""
        if self.impossible:
            return f"batch {self.batch_id} could not be recomputed: {self.impossible}"
        if self.equal:
            return f"batch {self.batch_id}: recomputed, all {self.rows} decisions are the same"
        said = "; ".join(f"{cause} ({n})" for cause, n in self.causes.items())
        if self.unexplained:
            said = "; ".join([*([said] if said else []), f"{NO_CAUSE} ({self.unexplained})"])
        return f"batch {self.batch_id}: recomputed, {self.differing} of {self.rows} decisions differ: {said}"

    def as_dict(self) -> dict[str, Any]:
        """For metadata."""
        return {
            "batch": self.batch_id, "decisions": self.rows, "differ": self.differing, "causes": dict(self.causes),
            "unexplained": self.unexplained, **({"impossible": self.impossible} if self.impossible else {}),
        }  # fmt: skip


def compare(workflow: Workflow, lake: Lake, registry: Registry, ledger: Ledger, recorded: BatchRow) -> Compared:
    """Recompute a recorded batch from what would decide its day now, and say what differs and why. Nothing is written."""
    if recorded.retired:
        gone = "the retention policy removed its rows"
        return Compared(recorded.batch_id, recorded.rows, impossible=gone)
    day = recorded.day
    try:
        again = decide.recompute_day(workflow, lake, registry, ledger, day, recorded)
    except (scoring.FeaturesMissing, TableMissing, DeltaError, KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {errors.first_line(error)}"
        return Compared(recorded.batch_id, recorded.rows, impossible=said)
    then, now = ledger.decisions(recorded.batch_id), _as_kept(again.decisions)
    forgotten = then["entity_id"].null_count
    then = then.filter(pc.is_valid(then["entity_id"]))
    differ = _differing(then.select(tables.DECISIONS.names), now, ["entity_id"])
    if forgotten:  # who was forgotten cannot be found among those of today
        differ = differ.filter(pc.not_equal(differ["what"], _NOT_THEN))
    if not differ.num_rows:
        return Compared(recorded.batch_id, recorded.rows)
    return _explained(workflow, lake, recorded, again, then, now, differ)


def _as_kept(decisions: pa.Table) -> pa.Table:
    """Decisions with numbers as the ledger keeps them: no NaN, no -0.0."""
    for name in decisions.schema.names:
        column = decisions[name]
        if pa.types.is_floating(column.type):
            kept = pc.add(pc.if_else(pc.is_nan(column), None, column), 0.0)
            decisions = decisions.set_column(decisions.schema.get_field_index(name), name, kept)
    return decisions


_NOT_THEN, _NOT_NOW = "it is decided on only now", "it is decided on no more"


def _differing(then: pa.Table, now: pa.Table, keys: Sequence[str]) -> pa.Table:
    """entity_id and, as ``what``, the columns in which the rows of the same keys differ; one row an entity, by name."""
    there, here = set(then.schema.names), set(now.schema.names)
    columns = sorted((there | here) - {*keys, "day"})
    pairs = [
        (name, f'a."{name}"' if name in there else "NULL", f'b."{name}"' if name in here else "NULL")
        for name in columns
    ]
    changed = [f"CASE WHEN {a} IS DISTINCT FROM {b} THEN '{name}' END" for name, a, b in pairs]
    joined = " AND ".join(f'a."{k}" = b."{k}"' for k in keys)
    connection = duckdb_session.engine()
    try:
        connection.register("then_rows", then.append_column("#", pa.array([True] * then.num_rows)))
        connection.register("now_rows", now.append_column("#", pa.array([True] * now.num_rows)))
        return connection.sql(
            "SELECT entity_id, string_agg(DISTINCT what, ', ' ORDER BY what) AS what FROM (SELECT "
            "coalesce(a.entity_id, b.entity_id) AS entity_id, "
            f"CASE WHEN a.\"#\" IS NULL THEN '{_NOT_THEN}' WHEN b.\"#\" IS NULL THEN '{_NOT_NOW}' "
            f"ELSE concat_ws(', ', {', '.join(changed)}) END AS what "
            f"FROM then_rows a FULL JOIN now_rows b ON {joined}) WHERE what <> '' GROUP BY entity_id ORDER BY entity_id"
        ).to_arrow_table()
    finally:
        connection.close()


def _explained(
    workflow: Workflow,
    lake: Lake,
    recorded: BatchRow,
    again: decide.Batch,
    then: pa.Table,
    now: pa.Table,
    differ: pa.Table,
) -> Compared:
    """Each differing decision with what it was made from that differs."""
    common = _common_causes(workflow, lake, recorded, again)
    restated, lost = _restated(workflow, lake, recorded, again)
    common += [lost] if lost else []
    arms = _differing(
        then.select(["entity_id", "arm", "unit"]), now.select(["entity_id", "arm", "unit"]), ["entity_id"]
    )
    theirs = dict(zip(*restated.to_pydict().values(), strict=True))
    moved = set(arms["entity_id"].to_pylist())
    causes: dict[str, int] = {}
    whys: list[str] = []
    unexplained = 0
    for entity in differ["entity_id"].to_pylist():
        why = list(common)
        if entity in theirs:
            why.append("its features were restated")
        elif theirs:
            why.append("features of others, with whom it shares a pool or a queue, were restated")
        if entity in moved:
            why.append("its arm is another one")
        elif moved:
            why.append("the arms of others are other ones")
        for cause in why:
            causes[cause] = causes.get(cause, 0) + 1
        unexplained += not why
        if len(whys) < SHOWN:
            own = f" ({theirs[entity]})" if entity in theirs else ""
            whys.append(("; ".join(why) or NO_CAUSE) + own)
    first = differ.slice(0, SHOWN)
    after = [dict(zip(t["entity_id"].to_pylist(), t["after"].to_pylist(), strict=True)) for t in (then, now)]
    names = first["entity_id"].to_pylist()
    shown = pa.table([names, *([values.get(e) for e in names] for values in after), first["what"], whys], schema=_SHOWN)
    return Compared(recorded.batch_id, recorded.rows, differ.num_rows, causes, unexplained, shown)


def _common_causes(workflow: Workflow, lake: Lake, recorded: BatchRow, again: decide.Batch) -> list[str]:
    """What the whole batch was made from that differs now."""
    then, now, found = recorded.record, again.record, []
    if then.get("step") != now["step"]:
        why = f" ({'; '.join(again.reasons)})" if again.reasons else ""
        found.append(f"step {then.get('step')} then, {now['step']} now{why}")
    for who in ("model", "challenger"):
        pair = [(r.get(f"{who}_version"), r.get(f"{who}_digest")) for r in (then, now)]
        if pair[0] != pair[1]:
            same = pair[0][0] == pair[1][0]
            found.append(f"{who} version {pair[0][0]} then, {pair[1][0]} now{' with other files' if same else ''}")
    if then.get("spec_digest") != now["spec_digest"]:
        found.append("workflow.yaml or contract.yaml says something else")
    if then.get("code_digest") != now["code_digest"]:
        found.append(
            f"the code or the SQL is another one (commit {str(then.get('code_commit'))[:12]} then, {provenance.commit()[:12]} now)"
        )
    if (then.get("epoch"), bool(then.get("washout"))) != (now["epoch"], bool(now["washout"])):
        found.append(f"epoch of the arms {then.get('epoch')} then, {now['epoch']} now")
    if then.get("step") == now["step"] == "rule":
        found += _learned_otherwise(workflow, lake, recorded, again)
    return found


def _learned_otherwise(workflow: Workflow, lake: Lake, recorded: BatchRow, again: decide.Batch) -> list[str]:
    """Whether the rows differ that the rule is fitted to."""
    versions = [(r.get("features_version"), r.get("outcomes_version")) for r in (recorded.record, again.record)]
    if versions[0] == versions[1]:
        return []
    try:
        sets = [
            point_in_time.training_set(workflow, lake, recorded.day, features_version=f, outcomes_version=o)
            for f, o in versions
        ]
    except (TableMissing, DeltaError, OSError) as error:
        return [f"the rows that the rule was fitted to are gone: {errors.first_line(error)}"]
    if content_digest(sets[0]) == content_digest(sets[1]):
        return []
    return ["outcomes, or the features of earlier days, that the rule is fitted to were restated"]


def _restated(workflow: Workflow, lake: Lake, recorded: BatchRow, again: decide.Batch) -> tuple[pa.Table, str]:
    """Entities whose features differ in content, with the columns; and why that cannot be told, empty where it can."""
    versions = [recorded.record.get("features_version"), again.record["features_version"]]
    nothing = pa.table({"entity_id": pa.array([], pa.string()), "what": pa.array([], pa.string())})
    if versions[0] == versions[1]:
        return nothing, ""
    if None in versions:
        return nothing, f"there were {'no' if versions[0] is None else ''} features then, and now it is otherwise"
    try:
        then, now = (lake.read(workflow.table("features"), version=v, days=[recorded.day]) for v in versions)
    except (TableMissing, DeltaError, OSError) as error:
        return nothing, f"the features of then are gone: {errors.first_line(error)}"
    keys = point_in_time.keys_of([c for c in now.schema.names if c in then.schema.names])
    return _differing(then, now, keys), ""
