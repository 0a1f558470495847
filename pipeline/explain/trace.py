"""Why? One decision traced from what stands downstream back to the rows of the files that it came from.

Belongs here: the chain: delivery, batch, approvals, decision, score, model, tables, files; the replay; what would have changed it
(searched in ``pipeline.explain.counterfactual``). Does not: its words (``pipeline.explain.render``), reading downstream systems (a
caller hands in what it read), or the command line.

What is gone (cut by retention, a deleted model, a forgotten name) is said in its place of the chain; the rest is still told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError

from common import errors
from delivery.ledger.database import LedgerError, Unknown
from delivery.rollback import rollback_id, undone
from models import catalog
from models.booster import Because, Head
from models.registry import ModelMissing, ModelUnreadable, Registry
from pipeline import provenance
from pipeline.decisions import decide, in_effect, tables
from pipeline.decisions import replay as replaying
from pipeline.explain import counterfactual, render
from pipeline.lake import Lake, TableMissing
from pipeline.workflow import FOLDER, Workflow

if TYPE_CHECKING:
    from delivery.connectors.base import Reading
    from delivery.ledger import Ledger

ROWS_LISTED = 20
"""Source rows that are listed; all are counted."""
FEATURES_LISTED = 5
NOT_SEARCHED = "Not searched for."


@dataclass(frozen=True)
class Explanation:
    """The chain of one decision, from downstream back to its source rows. A link that is lost says why under ``gone``."""

    decision_id: str
    links: dict[str, Any]
    """downstream, deliveries, batch, approvals, decision, score, model, tables, sources, replay, would_change; and
    ``reverses`` (another chain) for a rollback."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: times in ISO 8601 (UTC), values in the unit of the decision (micros of money, priority levels)."""
        said: dict[str, Any] = _plain({"decision_id": self.decision_id, **self.links})
        return said

    def lines(self) -> list[str]:
        """For a terminal: read from the top, each link a step further back."""
        return list(render.lines(self.as_dict()))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def explain(
    ledger: Ledger,
    lake: Lake,
    registry: Registry,
    decision_id: str,
    *,
    reading: Reading | None = None,
    search: bool = True,
) -> Explanation:
    """The chain of a decision that the ledger (or, after its retention, the lake) knows.

    ``reading``: the entity as its downstream system shows it now, if the caller has asked. ``search``: whether to look for what
    would have changed it, which takes most of the time. Raises the ledger's error where nobody knows the decision.
    """
    row, batch, missing = _found(ledger, lake, decision_id)
    kind = batch["kind"]
    links: dict[str, Any] = {}
    sent = _or_gone("its deliveries", lambda: _deliveries(ledger, row, batch, missing))
    acted = {} if missing or kind != "decision" else _or_gone("what acted", lambda: _acted(ledger, row, batch))
    links["downstream"] = _downstream(sent, row, reading, acted)
    links["deliveries"] = sent
    links["batch"] = {k: v for k, v in batch.items() if k != "record"}
    links["batch"] |= _or_gone("its rollbacks", lambda: _rolled_back(ledger, batch))
    links["approvals"] = _or_gone("its approvals", lambda: {"given": _rows(ledger.approvals(batch["batch_id"]))})
    links["decision"] = {c: row.get(c) for c in tables.DECISIONS.names} | {
        "workflow": batch["workflow"], "day": batch["day"], "kind": kind, "money": _is_money(row, batch, lake),
    }  # fmt: skip
    if row.get("entity_id") is None:
        links["decision"]["forgotten"] = (
            "The entity's name was forgotten on request: what needs it (score, features, source rows, replay) is not told."
        )
    if kind == "rollback":
        links |= _reversal(ledger, lake, registry, row, batch)
        return Explanation(decision_id, links)
    links["batch"] |= _or_gone("why its step", lambda: {"step_reasons": _step_reasons(lake, batch)})
    links |= _reasoned(lake, registry, {**batch["record"], **row, **_own(batch)}, search)
    return Explanation(decision_id, links)


def _is_money(row: Mapping[str, Any], batch: Mapping[str, Any], lake: Lake) -> bool:
    """Whether the values are micros of money, as far as what the workflow said is kept."""
    digest = {**batch["record"], **row}.get("spec_digest")
    if digest is None and lake.exists(f"{batch['workflow']}/specs"):
        kept = lake.read(f"{batch['workflow']}/specs", columns=["digest"])["digest"].to_pylist()
        digest = kept[-1] if kept else None
    try:
        return catalog.policy(replaying.spec_of(batch["workflow"], lake, digest or "").policy.kind).money
    except _lost():
        return False


def _own(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {"workflow": batch["workflow"], "day": batch["day"], "step": batch["step"]}


# --- what the ledger knows --------------------------------------------------------------------------------------------


def _lost() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    told = (replaying.ReplayImpossible, TableMissing, ModelMissing, ModelUnreadable, DeltaError, LedgerError)
    return (*told, MlflowException, SQLAlchemyError, OSError, pa.ArrowInvalid)


def _or_gone(what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` gives, or the place where it stood and why it cannot be told."""
    try:
        return make()
    except _lost() as error:
        return {"gone": f"{what}: {errors.first_line(error)}"}


def _rows(found: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(one) if is_dataclass(one) and not isinstance(one, type) else dict(one) for one in found]


def _found(ledger: Ledger, lake: Lake, decision_id: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A decision's row, its batch, and what the ledger does not keep of it (empty: it keeps all)."""
    try:
        known = ledger.decision(decision_id)
    except Unknown as error:
        row = _in_lake(lake, decision_id)
        if row is None:
            raise
        why = f"the ledger does not keep this decision ({errors.first_line(error)}); it is told from the lake's row"
        erased = ledger.people.digest("entity", row["entity_id"])
        if any(erased in event.body.get("digests", ()) for event in ledger.events("forgotten")):
            row |= {"entity_id": None, "unit": None}
        try:
            (batch,) = _rows([ledger.batch(row["batch_id"])])
            return row, {**batch, "record": row}, why
        except Unknown:
            return row, _batch_in_lake(lake, row), why
    (batch,) = _rows([known["batch"]])
    return {k: v for k, v in known.items() if k != "batch"}, batch, ""


def _in_lake(lake: Lake, decision_id: str) -> dict[str, Any] | None:
    for name in sorted(p.name for p in FOLDER.iterdir() if p.is_dir()) if FOLDER.is_dir() else ():
        if lake.exists(f"{name}/decisions"):
            rows = lake.read(f"{name}/decisions", where=pc.field("decision_id") == decision_id).to_pylist()
            if rows:
                return dict(rows[0])
    return None


def _batch_in_lake(lake: Lake, row: Mapping[str, Any]) -> dict[str, Any]:
    where = pc.field("batch_id") == row["batch_id"]
    found = lake.read(f"{row['workflow']}/batches", where=where, days=[row["day"]]).to_pylist()
    said = {
        "batch_id": row["batch_id"], "workflow": row["workflow"], "kind": "decision", "day": row["day"],
        "step": row["step"], "record": row, "gone": "the ledger has no such batch: it is told from the lake's row",
    }  # fmt: skip
    if found:
        kept = ("digest", "status", "rows", "changed", "decided_at", "run_id")
        said |= {k: found[0][k] for k in kept} | {"findings": _findings(found[0]["findings"])}
    return said


def _findings(said: Any) -> Any:
    return json.loads(said) if isinstance(said, str) else said


def _step_reasons(lake: Lake, batch: Mapping[str, Any]) -> list[str]:
    """Why the batch took its step of the bad-day ladder; empty for the champion."""
    if batch["step"] == "champion":
        return []
    if "step_reasons" in batch["record"]:
        return list(batch["record"]["step_reasons"])
    where = pc.field("batch_id") == batch["batch_id"]
    found = lake.read(f"{batch['workflow']}/batches", where=where, days=[batch["day"]], columns=["reasons"])
    return list(found["reasons"][0].as_py()) if found.num_rows else ["the lake holds this batch no more"]


def _deliveries(ledger: Ledger, row: Mapping[str, Any], batch: Mapping[str, Any], missing: str) -> dict[str, Any]:
    if missing:
        return {"gone": missing}
    found = []
    for one in _rows(ledger.deliveries_of(row["decision_id"])):

        def tries(n: int = one["n"]) -> dict[str, Any]:
            return {"each": _rows(ledger.attempts(batch["batch_id"], n))}

        found.append({**one, "tries": _or_gone("its attempts", tries)})
    return {"each": found}


def _acted(ledger: Ledger, row: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Whether this decision is the one that acted on its entity that day, and which other one did instead.

    Empty where that is not known: the name was forgotten, or the rows of the day were removed.
    """
    if row.get("entity_id") is None:
        return {}
    answer = in_effect.of_entity(ledger, batch["workflow"], batch["day"], row["entity_id"])
    if answer is None:
        mine = ledger.batch(batch["batch_id"])
        return {} if mine.acted or not mine.changed else {"acted": False}
    if answer["decision_id"] == row["decision_id"]:
        return {"acted": True}
    return {"acted": False, "instead": {k: answer[k] for k in ("decision_id", "batch_id", "after", "standing")}}


def _downstream(
    sent: Mapping[str, Any], row: Mapping[str, Any], reading: Reading | None, acted: Mapping[str, Any]
) -> dict[str, Any]:
    """The value that stands downstream, as far as anybody has looked, and whether it is this decision that set it."""
    out: dict[str, Any] = {k: v for k, v in acted.items() if k != "gone"}
    if "gone" in sent:
        out["gone"] = sent["gone"]
    elif sent["each"]:
        last = sent["each"][-1]
        out |= {k: last.get(k) for k in ("state", "target", "observed", "verified_at", "says")}
        if last.get("state") == "OVERWRITTEN" and last.get("sent") is not None:
            out["observed"] = last["sent"]  # what was observed is the other's value, which ours has replaced
    else:
        out["says"] = "Nothing was to be sent: the decision changes nothing." if not row.get("changed") else (
            "Nothing has been sent yet: the batch has no delivery of this decision."
        )  # fmt: skip
    if reading is not None:
        out["now"] = {"value": reading.value, "state": reading.state, "target": reading.target, "says": reading.says}
        out["now"]["as_decided"] = reading.value == row.get("after") and acted.get("acted") is not False
    return out


def _rolled_back(ledger: Ledger, batch: Mapping[str, Any]) -> dict[str, Any]:
    back = [b for b in ledger.batches(batch["workflow"], kind="rollback") if b.reverses == batch["batch_id"]]
    return {"rolled_back_by": [{"batch_id": b.batch_id, "delivery": b.delivery, "at": b.decided_at} for b in back]}


def _reversal(
    ledger: Ledger, lake: Lake, registry: Registry, row: Mapping[str, Any], batch: Mapping[str, Any]
) -> dict[str, Any]:
    """What a rollback took back, and the chain of that; its value is made again from the delivery that it reverses."""
    reverses = batch["reverses"] or ""
    asked = _or_gone("who asked for it", lambda: {"each": _rows(ledger.rollbacks(reverses))})
    links: dict[str, Any] = {"rollback": {"reverses": reverses, "asked": asked}}
    none = f"A rollback is decided by no model: it pushes back what stood before batch {reverses}."
    links["would_change"] = {"says": [none]}
    of = str(row["decision_id"]).removeprefix(rollback_id(""))
    links["reverses"] = _or_gone("the decision that it reverses", lambda: explain(ledger, lake, registry, of).as_dict())

    def replay() -> dict[str, Any]:
        if not row["changed"]:
            return {"from": "it changes nothing, and only counts in the total of its arm", "prior": row["before"],
                    "after": row["after"], "equal": row["before"] == row["after"]}  # fmt: skip
        (sent,) = ledger.deliveries_of(of)
        found = {one.n: one.found for one in ledger.conflicts(sent.batch_id)}.get(sent.n)
        back = [undone(sent, found, knows_authors=knows) for knows in (True, False)]
        return {
            "from": "what stood before our first write, by the delivery that it reverses", "prior": sent.prior,
            "state": sent.state, "after": row["after"], "equal": (row["before"], row["after"]) in back,
        }  # fmt: skip

    links["replay"] = _or_gone("its replay", replay)
    return links


# --- score, model, tables, files --------------------------------------------------------------------------------------


def _reasoned(lake: Lake, registry: Registry, row: dict[str, Any], search: bool) -> dict[str, Any]:
    """From the score back to the source rows, the replay, and what would have changed it."""
    nameless = {"gone": "the entity's name was forgotten"}
    named = row.get("entity_id") is not None
    links: dict[str, Any] = {}
    held: dict[str, Any] = {}

    def inputs() -> counterfactual.Inputs:
        if "inputs" not in held:
            try:
                held["inputs"] = _inputs(row, lake, registry)
            except _lost() as error:
                held["inputs"] = error
        if isinstance(held["inputs"], Exception):
            raise held["inputs"]
        found: counterfactual.Inputs = held["inputs"]
        return found

    def score() -> dict[str, Any]:
        told, held["because"] = _score(inputs())
        return told

    links["score"] = _or_gone("what scored it", score) if named else nameless
    links["model"] = _or_gone("its model", lambda: _model(row, registry))
    links["tables"] = _tables(row, lake)
    links["sources"] = _or_gone("its source rows", lambda: _sources(row, lake)) if named else nameless
    links["replay"] = _or_gone("its replay", lambda: _replay(row, lake, registry)) if named else nameless

    def would_change() -> dict[str, Any]:
        if not search:
            return {"says": [NOT_SEARCHED]}
        if links["replay"].get("equal") is not True:
            return {"gone": "the replay does not give the recorded decision: nothing is claimed about others"}
        given = inputs()
        again, _ = decide.decide(
            given.workflow, given.day, given.features, given.scores, given.drawn, given.step
        )  # the batch as it was, for its limits
        return counterfactual.search(given, held.get("because"), again).as_dict()

    links["would_change"] = _or_gone("what would have changed it", would_change) if named else nameless
    return links


def _inputs(row: Mapping[str, Any], lake: Lake, registry: Registry) -> counterfactual.Inputs:
    found = replaying.made_from(row, lake, registry)
    recorded = {c: row[c] for c in tables.DECISIONS.names}
    return counterfactual.Inputs(
        recorded, found.workflow, found.day, found.features, found.scores, found.drawn, found.step, found.learner,
        found.scores_in,
    )  # fmt: skip


def _score(inputs: counterfactual.Inputs) -> tuple[dict[str, Any], Because | None]:
    if inputs.learner is None:
        return {"says": "Nothing was scored: the batch's step is 'no change'."}, None
    chosen = decide.of_policy(inputs.workflow, inputs.features)
    mine = chosen.filter(pc.equal(chosen["entity_id"], inputs.row["entity_id"]))
    if mine.num_rows != 1:
        raise replaying.ReplayImpossible(f"its row in the features of {inputs.day} is gone")
    because: Because = inputs.learner.because(mine)
    (score,) = inputs.learner.score(mine).to_pylist()
    told = {
        "step": inputs.step,
        "rests_on": because.says,
        "heads": [_head(one) for one in because.heads],
        "parts": because.parts,
        "score": {k: v for k, v in score.items() if k not in ("entity_id", "moment")},
        "features": {name: mine[name][0].as_py() for name in because.reads if name in mine.schema.names},
    }
    if inputs.row["arm"] in ("holdout", "explore"):
        told["unused"] = f"The arm {inputs.row['arm']} does not act on the score."
    return told, because


def _head(one: Head) -> dict[str, Any]:
    named = list(one.effects)[:FEATURES_LISTED]
    rest = math.fsum(v for k, v in one.effects.items() if k not in named)
    return {
        "name": one.name, "quantity": one.quantity, "unit": one.unit, "rests": one.rests, "decides": one.decides,
        "baseline": one.baseline, "score": one.score,
        "moved_most": [{"feature": n, "value": one.values[n], "effect": one.effects[n]} for n in named],
        "all_others": rest, "others": len(one.effects) - len(named),
    }  # fmt: skip


def _model(row: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    if row["step"] == "no_change":
        return {"says": "No model: the batch's step is 'no change'."}
    if row["step"] == "rule":
        return {
            "says": "No model: the rule decided, made again from the features (version "
            f"{row['features_version']}) and outcomes (version {row['outcomes_version']}) known at the cut-off."
        }
    canary = row.get("challenger_version") is not None and row.get("arm") == "challenger"
    name, who = row["workflow"], "challenger" if canary else "model"
    number, digest = row[f"{who}_version"], row[f"{who}_digest"]
    out: dict[str, Any] = {"name": name, "version": number, "digest": digest}
    if canary:
        out["arm"] = "The arm challenger was decided by the challenger (canary), the others by the champion."
    try:
        version = registry.by_number(name, number)
    except _lost() as error:
        return {**out, "gone": errors.first_line(error)}
    out |= {"trained_day": version.trained_day, "passed_gate": version.passed, "run_id": version.run_id}
    out["same_digest"] = version.digest == digest
    try:
        run = registry.client.get_run(version.run_id)
    except _lost() as error:
        return {**out, "run": {"gone": errors.first_line(error)}}
    started = datetime.fromtimestamp(run.info.start_time / 1000, UTC).replace(tzinfo=None)
    out["run"] = {"name": run.info.run_name, "status": run.info.status, "started_at": started}
    return out


def _tables(row: Mapping[str, Any], lake: Lake) -> dict[str, Any]:
    each = []
    for stage in ("features", "outcomes", "arms"):
        table, version = f"{row['workflow']}/{stage}", row.get(f"{stage}_version")
        line: dict[str, Any] = {"table": table, "version": version}
        if version is None:
            line["says"] = "there was none"
        else:

            def written(table: str = table, version: int = version) -> dict[str, Any]:
                return _written(lake, table, version)

            line |= _or_gone(f"version {version}", written)
        each.append(line)
    return {
        "each": each, "spec_digest": row.get("spec_digest"), "code_commit": row.get("code_commit"),
        "code_digest": row.get("code_digest"), "same_code": row.get("code_digest") == provenance.digest(row["workflow"]),
    }  # fmt: skip


def _written(lake: Lake, table: str, version: int) -> dict[str, Any]:
    """When a version of a table was committed."""
    if lake.version(table) is None:
        raise TableMissing(f"table {table!r} is gone")
    opened = deltalake.DeltaTable(lake.uri(table), version=version, storage_options=lake.storage_options or None)
    at = opened.history(1)[0]["timestamp"]
    return {"written_at": datetime.fromtimestamp(at / 1000, UTC).replace(tzinfo=None)}


def _sources(row: Mapping[str, Any], lake: Lake) -> dict[str, Any]:
    """The landed rows that speak of the entity, within the lookback and known by the cut-off, newest first."""
    workflow, day, entity = (
        replaying.spec_of(row["workflow"], lake, row["spec_digest"]),
        row["day"],
        row["entity_id"],
    )
    cutoff, lookback = workflow.cutoff_of(day), workflow.features.lookback_days
    table, stamp = workflow.table("events"), pa.timestamp("us", tz="UTC")
    at = pc.scalar(cutoff).cast(stamp)
    known = (pc.field("known_at") <= at) & (pc.field("day") >= pc.scalar(day - timedelta(days=lookback)))
    known &= pc.field("superseded_at").is_null() | (pc.field("superseded_at") > at)
    place = ["source", "source_file", "source_file_id", "source_row", "known_at"]
    everybody = lake.read(table, where=known, columns=["source", "source_file_id"])
    out: dict[str, Any] = {
        "cutoff": cutoff, "lookback_days": lookback, "events_version": lake.version(table),
        "events_known": everybody.num_rows, "files_known": everybody.group_by(["source", "source_file_id"]).aggregate([]).num_rows,
    }  # fmt: skip
    key = _key_of(workflow, lake, known, entity)
    if key is None:
        says = f"no column of the events holds {entity!r} as it stands: the features' SQL makes the name up"
        return {**out, "rows": None, "files": [], "listed": [], "says": says}
    mine = lake.read(table, where=known & (pc.field(key) == entity), columns=place)
    order = [("known_at", "descending"), ("source_file_id", "ascending"), ("source_row", "descending")]
    mine = mine.sort_by(order)
    landed = _landed(workflow, lake)
    files: dict[tuple[str, str], dict[str, Any]] = {}
    for one in mine.to_pylist():
        seen = files.setdefault((one["source"], one["source_file_id"]), {
            "source": one["source"], "file": one["source_file"], "sha256": one["source_file_id"], "rows": 0,
            "landed_at": landed.get((one["source"], one["source_file_id"])),
        })  # fmt: skip
        seen["rows"] += 1
    listed = [
        {"file": r["source_file"], "row": r["source_row"], "known_at": r["known_at"]}
        for r in mine.slice(0, ROWS_LISTED).to_pylist()
    ]
    ordered = sorted(files.values(), key=lambda f: (f["landed_at"] or datetime.min, f["file"]), reverse=True)
    return {
        **out, "column": key, "rows": mine.num_rows, "files_of_it": len(files), "files": ordered[:ROWS_LISTED],
        "listed": listed,
    }  # fmt: skip


def _key_of(workflow: Workflow, lake: Lake, known: pc.Expression, entity: str) -> str | None:
    """The events' column that names the entity: the first that holds it, those that name a row before the others."""
    events = workflow.contract.events
    texts = [n for n, c in events.columns.items() if c.type == "VARCHAR"]
    for name in sorted(texts, key=lambda n: (n not in events.unique, texts.index(n))):
        if lake.read(workflow.table("events"), where=known & (pc.field(name) == entity), columns=["day"]).num_rows:
            return name
    return None


def _landed(workflow: Workflow, lake: Lake) -> dict[tuple[str, str], datetime]:
    """When each landed content landed first, by source and SHA-256."""
    found = lake.read(workflow.table("files"), columns=["source", "file_id", "landed_at", "status"])
    out: dict[tuple[str, str], datetime] = {}
    for one in found.to_pylist():
        if one["status"] == "landed":
            key = (one["source"], one["file_id"])
            out[key] = min(one["landed_at"], out.get(key, one["landed_at"]))
    return out


def _replay(row: Mapping[str, Any], lake: Lake, registry: Registry) -> dict[str, Any]:
    again = replaying.replay_row(row, lake, registry)
    said = again.as_dict()
    return {
        "equal": again.equal, "after": row["after"], "again": said["again"], "differs_in": said["differs in"],
        "same_code": again.same_code,
    }  # fmt: skip
