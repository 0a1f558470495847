"""Why? One decision traced from what stands downstream back to the rows of the files that it came from.

Belongs here: the chain and its words: delivery, batch, approvals, decision, score, model, tables, files; the replay; what
would have changed it (searched in ``pipeline.explain.counterfactual``). Does not: reading downstream systems (a caller hands in what it
read), or the command line.

What is gone (cut by retention, a deleted model, a forgotten name) is said in its place of the chain; the rest is still told.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import deltalake
import pyarrow as pa
import pyarrow.compute as pc
from deltalake.exceptions import DeltaError

from common import errors
from data_checks import guardrails
from delivery.ledger.database import LedgerError, Unknown
from delivery.rollback import rollback_id, undone
from models.booster import Because, Head
from models.policies.budget import MICROS, BudgetPolicy
from models.registry import ModelMissing, ModelUnreadable, Registry
from pipeline import provenance
from pipeline.decisions import decide, in_effect, tables
from pipeline.decisions import replay as replaying
from pipeline.explain import counterfactual
from pipeline.lake import Lake, TableMissing
from pipeline.workflow import FOLDER, Workflow

if TYPE_CHECKING:
    from delivery.connectors.base import Reading
    from delivery.ledger import Ledger

ROWS_LISTED = 20
"""Source rows that are listed; all are counted."""
FEATURES_LISTED = 5
FILES_SHOWN, ROWS_SHOWN = 3, 6
"""Of these, how many a terminal shows."""


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
        return list(_told(self.as_dict()))


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
    ledger: Ledger, lake: Lake, registry: Registry, decision_id: str, *, reading: Reading | None = None
) -> Explanation:
    """The chain of a decision that the ledger (or, after its retention, the lake) knows.

    ``reading``: the entity as its downstream system shows it now, if the caller has asked. Raises the ledger's error
    where nobody knows the decision.
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
    links |= _reasoned(lake, registry, {**batch["record"], **row, **_own(batch)})
    return Explanation(decision_id, links)


def _is_money(row: Mapping[str, Any], batch: Mapping[str, Any], lake: Lake) -> bool:
    """Whether the values are micros of money, as far as what the workflow said is kept."""
    digest = {**batch["record"], **row}.get("spec_digest")
    if digest is None and lake.exists(f"{batch['workflow']}/specs"):
        kept = lake.read(f"{batch['workflow']}/specs", columns=["digest"])["digest"].to_pylist()
        digest = kept[-1] if kept else None
    try:
        return isinstance(replaying.spec_of(batch["workflow"], lake, digest or "").policy, BudgetPolicy)
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


def _reasoned(lake: Lake, registry: Registry, row: dict[str, Any]) -> dict[str, Any]:
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


# --- words ------------------------------------------------------------------------------------------------------------


def _told(said: Mapping[str, Any]) -> Iterator[str]:
    """The chain as indented lines."""
    decision = said["decision"]
    value = _money if decision["money"] else str
    name = decision["entity_id"] if decision["entity_id"] is not None else "(name forgotten)"

    def indented(depth: int, lines: Iterator[str]) -> Iterator[str]:
        first = True
        for line in lines:
            yield "  " * depth + ("← " if first and depth else "  " if depth else "") + line
            first = False

    moved = f"{_shown(decision['before'], value)} → {_shown(decision['after'], value)}"
    yield f"{decision['workflow']}, {decision['day']}: {name}: {moved}"
    links = [
        _downstream_lines(said["downstream"], value),
        _delivery_lines(said["deliveries"], value),
        _batch_lines(said["batch"], said["approvals"]),
        _decision_lines(decision, value),
    ]
    if decision["kind"] == "rollback":
        links.append(_rollback_lines(said))
    else:
        links += [
            _score_lines(said["score"]),
            _model_lines(said["model"]),
            _table_lines(said["tables"]),
            _source_lines(said["sources"]),
        ]
    for depth, link in enumerate(links):
        yield from indented(depth, link)
    if "forgotten" in decision:
        yield decision["forgotten"]
    yield from _replay_lines(said["replay"], value)
    yield from _would_change_lines(said["would_change"], decision, value)
    if "gone" not in said.get("reverses", {"gone": ""}):
        yield "It reverses:"
        yield from ("  " + line for line in _told(said["reverses"]))


def _money(micros: int) -> str:
    return f"{micros / MICROS:,.2f}"


def _shown(value: Any, words: Callable[[Any], str]) -> str:
    return "nothing" if value is None else words(value)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.2f}"
    return "null" if value is None else str(value)


def _when(text: str | None) -> str:
    return f"{text.replace('T', ' ').partition('.')[0]} UTC" if text else "at a time that is not recorded"


def _short(digest: Any) -> str:
    return f"{str(digest)[:12]}…" if digest else "(none)"


def _downstream_lines(said: Mapping[str, Any], value: Callable[[Any], str]) -> Iterator[str]:
    if "gone" in said:
        yield f"Downstream: gone: {said['gone']}"
    elif "state" in said:
        read = f"read back {_when(said['verified_at'])}" if said["verified_at"] else "not read back"
        yield f"Downstream: {_shown(said['observed'], value)}, {read} ({said['state']})"
        if said.get("says"):
            yield f"it says: {said['says']}"
    else:
        yield f"Downstream: {said['says']}"
    if "instead" in said:
        other = said["instead"]
        yield (
            f"not what acted that day: decision {other['decision_id']} of batch {other['batch_id']} did, and "
            f"{_shown(other['standing'], value)} stood"
        )
    elif said.get("acted") is False:
        yield "nothing of its batch has been sent: this decision has not acted"
    if "now" in said:
        now = said["now"]
        stands = "as decided" if now["as_decided"] else "not what was decided"
        stands = "not by this decision" if said.get("acted") is False else stands
        yield f"now: {_shown(now['value'], value)} ({now['state']}, {stands}){': ' + now['says'] if now['says'] else ''}"


def _delivery_lines(said: Mapping[str, Any], value: Callable[[Any], str]) -> Iterator[str]:
    if "gone" in said:
        yield f"Delivery: gone: {said['gone']}"
        return
    if not said["each"]:
        yield "Delivery: none"
    for one in said["each"]:
        tries = one["tries"]
        count = "attempts gone" if "gone" in tries else f"attempts: {len(tries['each'])}"
        differs = "" if one["sent"] in (None, one["after"]) else f", sent {value(one['sent'])} (replanned)"
        yield (
            f"Delivery {one['state']}, {count}, expected {_shown(one['expected'], value)}, "
            f"found {_shown(one['prior'], value)} before the first write{differs}"
        )
        if "gone" in tries:
            yield f"gone: {tries['gone']}"
        for t in tries.get("each", ()):
            took = "" if t["window_ms"] is None else f", {t['window_ms']:.1f} ms between read and write"
            answer = t["outcome"] or "no answer recorded"
            words = f": {t['says']}" if t.get("says") else ""
            yield f"{_when(t['started_at'])}: {_shown(t['value'], value)} → {answer}{took}{words}"


def _batch_lines(said: Mapping[str, Any], approvals: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Batch {said['batch_id']} ({said['kind']}), {said.get('status', 'status unknown')}, step {said['step']}, "
        f"{said.get('changed', '?')} of {said.get('rows', '?')} changed, digest {_short(said.get('digest'))}"
    )
    if "gone" in said:
        yield f"gone: {said['gone']}"
    if said.get("decided_at"):
        yield f"decided {_when(said['decided_at'])} in run {said.get('run_id')}"
    yield from (f"step {said['step']}: {reason}" for reason in said.get("step_reasons") or ())
    for finding in said.get("findings") or ():
        yield f"guardrail {guardrails.sentence(finding)}"
    if not said.get("findings"):
        yield "no guardrail spoke against it"
    for one in said.get("rolled_back_by") or ():
        yield f"rolled back by {one['batch_id']} ({one['delivery']})"
    if "gone" in approvals:
        yield f"approvals gone: {approvals['gone']}"
    for one in approvals.get("given", ()):
        who = one["approver"] if one["approver"] is not None else "(name forgotten)"
        yield f"approved by {who} {_when(one['at'])}: {one['reason']} (valid until {_when(one['expires_at'])})"
    if not approvals.get("given", True):
        needed = {"READY": "it needed nobody", "HELD": "it waits for a person", "REFUSED": "nobody may approve it"}
        yield f"nobody approved it: {needed.get(said.get('status', ''), 'whether it needed to be is not known')}"


def _decision_lines(said: Mapping[str, Any], value: Callable[[Any], str]) -> Iterator[str]:
    moved = f"{_shown(said['before'], value)} → {_shown(said['after'], value)}"
    probability = "" if said["arm_probability"] is None else f" (probability {_figure(said['arm_probability'])})"
    yield f"Decision {moved}, arm {said['arm']}{probability}, expected gain {_figure(said['expected_gain'])}"
    if said["perturbation"] is not None:
        yield (
            f"perturbed by {_figure(said['perturbation'])} (probability {_figure(said['perturbation_probability'])})"
        )
    if said["review"]:
        yield "left to people (review)"
    yield from said["reasons"] or ()


def _score_lines(said: Mapping[str, Any]) -> Iterator[str]:
    if "gone" in said:
        yield f"Score: gone: {said['gone']}"
        return
    if "says" in said:
        yield f"Score: {said['says']}"
        return
    yield f"Score by {said['step']}: {said['rests_on']}"
    if "unused" in said:
        yield said["unused"]
    for head in said["heads"]:
        role = "" if head["decides"] else ", not the choice itself"
        yield (
            f"{head['name']}: {head['quantity']} {_figure(head['score'])} {head['unit']} "
            f"(baseline {_figure(head['baseline'])}); on it rests {head['rests']}{role}"
        )
        for one in head["moved_most"]:
            yield f"  {one['effect']:+.4f} {one['feature']} = {_figure(one['value'])}"
        yield f"  {head['all_others']:+.4f} {head['others']} other features"
    told = {**{k: v for k, v in said["score"].items() if not isinstance(v, list)}, **said["parts"]}
    yield "figures: " + ", ".join(f"{k} {_figure(v)}" for k, v in told.items())
    if said["features"]:
        yield "read beside: " + ", ".join(f"{k} = {_figure(v)}" for k, v in said["features"].items())


def _model_lines(said: Mapping[str, Any]) -> Iterator[str]:
    if "says" in said:
        yield f"Model: {said['says']}"
        return
    yield f"Model {said['name']} version {said['version']}, digest {_short(said['digest'])}"
    if "gone" in said:
        yield f"gone: {said['gone']}"
        return
    if not said["same_digest"]:
        yield "the registry now holds another digest under this number"
    yield f"trained on what was known on {said['trained_day']}, gate {'passed' if said['passed_gate'] else 'refused'}"
    if "arm" in said:
        yield said["arm"]
    run = said["run"]
    about = (
        f"gone: {run['gone']}"
        if "gone" in run
        else f"{run['name']}, {run['status']}, started {_when(run['started_at'])}"
    )
    yield f"MLflow run {said['run_id']}: {about}"


def _table_lines(said: Mapping[str, Any]) -> Iterator[str]:
    yield "Tables: " + ", ".join(f"{one['table']} version {one['version']}" for one in said["each"])
    for one in said["each"]:
        if "gone" in one:
            yield f"{one['table']}: gone: {one['gone']}"
        elif "says" in one:
            yield f"{one['table']}: {one['says']}"
        else:
            yield f"{one['table']}: written {_when(one['written_at'])}"
    same = "the code of now" if said["same_code"] else "other code than now"
    yield f"workflow.yaml {_short(said['spec_digest'])}, commit {_short(said['code_commit'])}, {same}"


def _source_lines(said: Mapping[str, Any]) -> Iterator[str]:
    if "gone" in said:
        yield f"Files: gone: {said['gone']}"
        return
    if said["rows"] is None:
        yield f"Files: {said['says']}"
    else:
        yield f"Files: {said['rows']} rows of {said['files_of_it']} files name it in the column {said['column']}"
    yield (
        f"known by {_when(said['cutoff'])} within {said['lookback_days']} days, where all entities have {said['events_known']} "
        f"rows in {said['files_known']} files (events version {said['events_version']})"
    )
    for one in said["files"][:FILES_SHOWN]:
        yield f"{one['file']} (SHA-256 {_short(one['sha256'])}, landed {_when(one['landed_at'])}): {one['rows']} rows"
    if len(said["files"]) > FILES_SHOWN:
        yield f"and {said['files_of_it'] - FILES_SHOWN} more files"
    if said["listed"]:
        shown = said["listed"][:ROWS_SHOWN]
        places = ", ".join(f"{r['file'].rsplit('/', 1)[-1]}:{r['row']}" for r in shown)
        more = said["rows"] - len(shown)
        yield f"rows, newest first: {places}" + (f", and {more} more" if more else "")


def _rollback_lines(said: Mapping[str, Any]) -> Iterator[str]:
    yield f"Rollback of batch {said['rollback']['reverses']}"
    asked = said["rollback"]["asked"]
    if "gone" in asked:
        yield f"who asked for it is gone: {asked['gone']}"
    for one in asked.get("each", ()):
        who = one.get("actor") or "(name forgotten)"
        yield f"{one.get('action', 'asked')} by {who} ({one.get('trigger')}) {_when(one.get('at'))}: {one.get('reason')}"
    if "gone" in said.get("reverses", {}):
        yield f"gone: {said['reverses']['gone']}"


def _replay_lines(said: Mapping[str, Any], value: Callable[[Any], str]) -> Iterator[str]:
    if "gone" in said:
        yield f"Replay: gone: {said['gone']}"
    elif "from" in said:
        same = "which gives this decision" if said["equal"] else "which does not give this decision"
        yield f"Replay: {said['from']}: {_shown(said['prior'], value)}, {same}"
    elif said["equal"]:
        other = "" if said["same_code"] else ", though the code is another one"
        yield f"Replay: the same decision to the bit{other}"
    else:
        yield f"Replay: differs in {said['differs_in']}: {_shown(said['again'], value)} now; the code is " + (
            "the same" if said["same_code"] else "another one"
        )


def _would_change_lines(
    said: Mapping[str, Any], decision: Mapping[str, Any], value: Callable[[Any], str]
) -> Iterator[str]:
    yield "What would have changed it:"
    if "gone" in said:
        yield f"  gone: {said['gone']}"
        return
    yield from (f"  {line}" for line in said["says"])
    if "redecisions" not in said:
        return

    def becomes(after: Any) -> str:
        return "it would not be decided on" if after is None else f"it becomes {value(after)}"

    for what, turns, tried in (
        ("feature", said["features"], said["tried"]),
        ("limit", said["limits"], said["limits_tried"]),
    ):
        for one in turns:
            far = f"{one['size']:.2g} standard deviations" if what == "feature" else f"{one['size']:.2%} of it"
            yield (
                f"  {what} {one['name']}: {one['now']!r} → {one['value']!r} ({far}): {becomes(one['becomes'])}; "
                f"at {_figure(one['unchanged_at'])} it is still the same"
            )
        if tried and not turns:
            within = " within what was seen" if what == "feature" else ""
            yield f"  {what}: none found{within} (tried: {', '.join(tried)})"
    for arm, after in said["arms"].items():
        yield f"  arm {arm} (with its whole unit): {becomes(after)}"
    for one in said["guardrails"]:
        waits = "the batch waits for a person" if one["holds"] else "it does not hold the batch"
        from_ = (
            f"; a limit from {_figure(one['least_that_passes'])} on lets it pass" if "least_that_passes" in one else ""
        )
        yield f"  {one['name']}: limit {_figure(one['limit'])}, observed {_figure(one['observed'])}: {waits}{from_}"
    if decision["money"]:
        yield f"  (a budget counts as changed from {counterfactual.MATERIAL:.0%} of what stood before on)"
    yield f"  ({said['redecisions']} re-decisions of at most {said['most']})"
