"""Why a decision: the chain back to the rows of the files, and what would have changed it, proved by deciding again."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from delivery import rollback
from delivery.connectors.base import Capabilities, Change, Reading, Write, Written
from delivery.ledger import Ledger, NewBatch, Unknown
from delivery.push import push
from models.registry import Registry
from pipeline import ingest, point_in_time
from pipeline.decisions import decide, scoring, tables
from pipeline.explain import counterfactual, trace
from pipeline.explain.trace import Explanation, explain
from tests.support.aliases import step_back

KEY = b"a key of the tests, not a secret"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}", key=KEY) as opened:
        yield opened


@dataclass(frozen=True)
class TraceHarness:
    """A day decided and delivered. Shared: what a test spoils it copies."""

    bench: Any
    registry: Registry
    batch: decide.Batch
    ledger: Ledger
    rows: list[dict[str, Any]]

    def explain(self, row: dict[str, Any], **other: Any) -> Explanation:
        return explain(self.ledger, self.bench.lake, self.registry, row["decision_id"], **other)

    def some(self, arm: str = "champion") -> dict[str, Any]:
        return next(r for r in self.rows if r["arm"] == arm and (r["changed"] or arm == "holdout"))


def made(bench: Any, folder: Path, versions: Path) -> Iterator[TraceHarness]:
    registry = Registry(f"sqlite:///{versions / 'mlflow.db'}", (versions / "artifacts").as_uri())  # only read
    batch = bench.decide(registry, bench.last)
    with Ledger.open(f"sqlite:///{folder / 'ledger.db'}", key=KEY) as opened:
        rows = record(opened, bench, batch)
        assert push(opened, Shelf(rows), batch.batch_id, run_id="run-1").complete
        yield TraceHarness(bench, registry, batch, opened, rows)


@pytest.fixture(scope="module")
def lines(ads: Any, _two_versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceHarness]:
    """``ad_budget``."""
    folder = tmp_path_factory.mktemp("lines")
    yield from made(ads.copy(folder / "bench"), folder, _two_versions)


@pytest.fixture(scope="module")
def tickets(queue: Any, _two_versions: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceHarness]:
    """``ticket_priority`` on a day on which open tickets stand close to their due times: who goes first matters."""
    folder = tmp_path_factory.mktemp("tickets")
    bench = queue.copy(folder / "bench")
    pressed(bench)
    yield from made(bench, folder, _two_versions)


@pytest.fixture(params=["lines", "tickets"])
def world(request: pytest.FixtureRequest) -> TraceHarness:
    """Each shipped workflow in turn."""
    found: TraceHarness = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def small(ads: Any, tmp_path: Path) -> Any:
    """``ad_budget`` alone, to write to."""
    return ads.copy(tmp_path / "small")


@pytest.fixture
def unsearched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the search: the chain is what matters."""
    monkeypatch.setattr(counterfactual, "MOST", 0)


class Shelf:
    """A downstream system in memory."""

    system = "shelf"
    capabilities = Capabilities(idempotency_key=True, bulk_read=100)

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.values = {row["entity_id"]: row["before"] for row in rows}
        self.lock = threading.Lock()

    def read(self, keys: Sequence[str]) -> dict[str, Reading]:
        with self.lock:
            return {key: Reading(key, f"target of {key}", self.values[key]) for key in keys}

    def apply(self, writes: Sequence[Write], *, validate_only: bool = False) -> list[Written]:
        with self.lock:
            self.values |= {} if validate_only else {write.key: write.value for write in writes}
        return [Written(write.key, "accepted", "taken") for write in writes]

    def history(self, keys: Sequence[str], since: datetime) -> list[Change]:
        return []

    def close(self) -> None:
        pass


def record(ledger: Ledger, bench: Any, batch: decide.Batch, **other: Any) -> list[dict[str, Any]]:
    """A batch as the stage hands it to the ledger; returns its rows."""
    day, table = bench.last, decide.with_record(bench.workflow, bench.last, batch)
    said: dict[str, Any] = {
        "batch_id": batch.batch_id, "workflow": bench.workflow.name, "kind": "decision", "day": day,
        "digest": batch.digest, "status": batch.status, "step": batch.step, "as_of": bench.workflow.cutoff_of(day),
        "decided_at": bench.morning(day), "run_id": "run-1", "record": batch.record, "findings": list(batch.findings),
    }  # fmt: skip
    ledger.record_batch(NewBatch(**said | other), table)
    return [dict(row) for row in bench.decided(day)]


def decided(bench: Any, registry: Registry, ledger: Ledger) -> list[dict[str, Any]]:
    return record(ledger, bench, bench.decide(registry, bench.last))


def gone(said: dict[str, Any]) -> dict[str, str]:
    """What is lost, by where it stood."""
    found = {}
    for name, link in said.items():
        if isinstance(link, dict):
            found |= {name: link["gone"]} if "gone" in link else {}
            found |= {f"{name}.{k}": v for k, v in gone(link).items()}
    return found


def pressed(bench: Any) -> None:
    """Due times close by, for every ticket of the last day."""
    table = bench.workflow.table("features")
    features = bench.lake.read(table, days=[bench.last])
    hours = pa.array([-5.0 + 4.5 * (n % 11) for n in range(features.num_rows)])
    at = features.schema.get_field_index("hours_to_due")
    bench.lake.replace_days(table, features.set_column(at, "hours_to_due", hours), [bench.last])


# --- the chain --------------------------------------------------------------------------------------------------------


def test_the_chain_leads_from_downstream_to_the_rows_of_the_files(world: TraceHarness, unsearched: None) -> None:
    row, bench, registry = world.some(), world.bench, world.registry
    told = world.explain(row)
    said = told.as_dict()
    assert not gone(said) and json.loads(json.dumps(said)) == said
    assert said["downstream"]["state"] == "ACKED" and said["downstream"]["observed"] == row["after"]
    assert datetime.fromisoformat(said["downstream"]["verified_at"])
    (sent,) = said["deliveries"]["each"]
    assert [t["outcome"] for t in sent["tries"]["each"]] == ["accepted"] and sent["prior"] == row["before"]
    assert said["batch"]["batch_id"] == row["batch_id"] and said["batch"]["digest"]
    assert said["approvals"]["given"] == []
    assert {c: said["decision"][c] for c in tables.DECISIONS.names} == {c: row[c] for c in tables.DECISIONS.names}
    version = registry.by_number(bench.workflow.name, 2)
    assert (said["model"]["version"], said["model"]["digest"]) == (2, version.digest)
    assert said["model"]["run_id"] == version.run_id and said["model"]["run"]["status"] == "FINISHED"
    assert [t["version"] for t in said["tables"]["each"]] == [
        row["features_version"], row["outcomes_version"], row["arms_version"],
    ]  # fmt: skip
    assert said["replay"]["equal"] is True and said["replay"]["same_code"] is True

    lines = told.lines()
    depth = [line.index("←") for line in lines if "←" in line]
    assert depth == sorted(depth) and len(depth) == 7, "each link a step further in"
    for word in (row["entity_id"], row["batch_id"], version.digest[:12], version.run_id, row["reasons"][0]):
        assert any(word in line for line in lines), word
    assert "Replay: the same decision to the bit" in lines


def test_the_source_rows_are_the_ones_in_the_landed_files(world: TraceHarness, unsearched: None) -> None:
    row, bench = world.some(), world.bench
    sources = world.explain(row).as_dict()["sources"]
    assert sources["rows"] >= len(sources["listed"]) > 0
    events = bench.lake.read(bench.workflow.table("events")).filter(pc.field(sources["column"]) == row["entity_id"])
    assert sources["rows"] == events.num_rows, "all that the entity has is known by then and within the lookback here"
    for one in sources["listed"][:3]:
        path = bench.root / "landing" / bench.workflow.name / one["file"]
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        lines = lines[1:] if path.name.endswith(".csv.gz") else lines
        assert row["entity_id"] in lines[one["row"] - 1]


def test_source_rows_are_told_as_they_were_known(lines: TraceHarness, small: Any, unsearched: None) -> None:
    """What replaced a file after the cut-off is not what the decision came from."""
    row = lines.some()
    before = lines.explain(row).as_dict()["sources"]
    shutil.copytree(lines.bench.root, small.root, dirs_exist_ok=True)
    file = small.folder() / f"advertising_{small.days[5]}.csv.gz"
    header, first, *rest = gzip.decompress(file.read_bytes()).splitlines(keepends=True)
    file.write_bytes(gzip.compress(header + b"".join(rest) + first))  # restated: the rows in another order
    late = small.morning(small.last) + timedelta(days=2)
    landed = ingest.ingest(small.workflow, small.lake, small.root / "landing", now=late)
    assert landed.accepted == len(rest) + 1
    after = explain(lines.ledger, small.lake, lines.registry, row["decision_id"]).as_dict()["sources"]
    assert after["events_version"] > before["events_version"]
    assert {k: v for k, v in after.items() if k != "events_version"} == {
        k: v for k, v in before.items() if k != "events_version"
    }


def test_a_ticket_says_which_heads_its_index_rests_on(tickets: TraceHarness, unsearched: None) -> None:
    score = tickets.explain(tickets.some()).as_dict()["score"]
    assert {h["name"]: h["decides"] for h in score["heads"]} == {"miss": False, "effort": True}
    assert "'effort'" in score["rests_on"] and "hours_to_due" in score["features"]
    for head in score["heads"]:
        moved = sum(m["effect"] for m in head["moved_most"]) + head["all_others"] + head["baseline"]
        assert moved == pytest.approx(head["score"], abs=1e-9)
        sizes = [abs(m["effect"]) for m in head["moved_most"]]
        assert sizes == sorted(sizes, reverse=True)


def test_what_the_system_shows_now_is_told_beside_what_was_read_back(lines: TraceHarness, unsearched: None) -> None:
    row = lines.some()
    now = Reading(row["entity_id"], "a budget", 1, state="closed", says="paused")
    said = lines.explain(row, reading=now)
    assert said.as_dict()["downstream"]["now"] == {
        "value": 1, "state": "closed", "target": "a budget", "says": "paused", "as_decided": False,
    }  # fmt: skip
    assert any("not what was decided" in line for line in said.lines())


def test_a_held_batch_tells_its_findings_and_who_approved_it(
    small: Any, registry: Registry, ledger: Ledger, unsearched: None
) -> None:
    tight = small.workflow.guardrails.model_copy(update={"max_total_change": 0.01})
    object.__setattr__(small, "workflow", small.workflow.model_copy(update={"guardrails": tight}))
    rows = decided(small, registry, ledger)
    batch = ledger.batch(rows[0]["batch_id"])
    assert batch.status == "HELD"
    at = small.morning(small.last)
    ledger.approve(batch.batch_id, batch.digest, "Ada", "looked at it", at, at + timedelta(hours=4))
    ledger.approve(batch.batch_id, batch.digest, "Bert", "so did I", at, at + timedelta(hours=4))
    ledger.forget("Bert")
    told = explain(ledger, small.lake, registry, rows[0]["decision_id"])
    assert [(a["approver"], a["reason"]) for a in told.as_dict()["approvals"]["given"]] == [
        ("Ada", "looked at it"), (None, "so did I"),
    ]  # fmt: skip
    lines = "\n".join(told.lines())
    assert "approved by Ada" in lines and "approved by (name forgotten)" in lines and "Bert" not in lines
    assert "HELD: total change" in lines
    (limit,) = (g for g in told.as_dict()["would_change"]["guardrails"] if g["name"] == "guardrails.max_total_change")
    assert limit["holds"] and limit["limit"] == 0.01 < limit["least_that_passes"] == limit["observed"]


# --- steps and arms ---------------------------------------------------------------------------------------------------


def test_the_rule_tells_what_it_counted_and_which_model_could_not_be_used(
    bench: Any, empty_registry: Registry, ledger: Ledger, unsearched: None
) -> None:
    row = next(r for r in decided(bench, empty_registry, ledger) if r["arm"] == "champion")
    told = explain(ledger, bench.lake, empty_registry, row["decision_id"])
    said = told.as_dict()
    assert not gone(said) and said["replay"]["equal"] and said["score"]["heads"] == []
    assert "the rule" in said["score"]["rests_on"] and said["score"]["parts"]
    assert "the rule decided" in said["model"]["says"]
    assert "had passed its gate" in said["batch"]["step_reasons"][0]
    assert any("had passed its gate" in line for line in told.lines())
    assert said["would_change"]["tried"], "the rule's features are searched as a model's are"


def test_a_day_without_change_says_that_nothing_was_scored(
    small: Any, empty_registry: Registry, ledger: Ledger
) -> None:
    shutil.rmtree(small.lake.uri(small.workflow.table("outcomes")))
    batch = small.decide(empty_registry, small.last)
    assert batch.step == "no_change"
    row = record(ledger, small, batch)[0]
    told = explain(ledger, small.lake, empty_registry, row["decision_id"])
    said = told.as_dict()
    assert said["replay"]["equal"] and "Nothing was scored" in said["score"]["says"]
    assert said["would_change"]["features"] == said["would_change"]["limits"] == []
    assert "no change" in said["would_change"]["says"][0]
    assert said["downstream"]["says"].startswith("Nothing was to be sent")
    assert any("the rule has nothing to go by" in r for r in said["batch"]["step_reasons"])


def test_a_holdout_says_that_only_another_arm_would_have_changed_it(lines: TraceHarness) -> None:
    row = lines.some("holdout")
    said = lines.explain(row).as_dict()
    found = said["would_change"]
    assert "holdout" in found["says"][0] and found["features"] == found["limits"] == found["tried"] == []
    assert "does not act on the score" in said["score"]["unused"]
    assert found["arms"]["champion"] == in_arm(lines, row, "champion") != row["after"]


def in_arm(world: TraceHarness, row: dict[str, Any], arm: str) -> Any:
    inputs = trace._inputs(row, world.bench.lake, world.registry)
    units = inputs.drawn["unit"].to_pylist()
    arms = [arm if u == row["unit"] else a for u, a in zip(units, inputs.drawn["arm"].to_pylist(), strict=True)]
    drawn = inputs.drawn.set_column(inputs.drawn.schema.get_field_index("arm"), "arm", pa.array(arms))
    return decide_again(inputs, drawn=drawn)


def test_an_exploring_line_says_that_its_coin_decided(lines: TraceHarness) -> None:
    row = lines.some("explore")
    found = lines.explain(row).as_dict()["would_change"]
    assert "fair coin" in found["says"][0] and found["features"] == found["tried"] == []
    assert "arms.explore.step" in found["limits_tried"] and found["arms"]["holdout"] == row["before"]
    inputs = trace._inputs(row, lines.bench.lake, lines.registry)
    assert found["limits"]
    for turn in found["limits"]:
        prove_limit(inputs, turn)


# --- what would have changed it ---------------------------------------------------------------------------------------


def decide_again(inputs: counterfactual.Inputs, features: Any = None, workflow: Any = None, drawn: Any = None) -> Any:
    """The whole day from scratch: scored and decided anew, nothing shared with the search."""
    features = inputs.features if features is None else features
    scores = inputs.learner.score(point_in_time.ordered(features))
    table, _ = decide.decide(
        workflow or inputs.workflow, inputs.day, features, scores, inputs.drawn if drawn is None else drawn, inputs.step
    )
    return next((r["after"] for r in table.to_pylist() if r["entity_id"] == inputs.row["entity_id"]), None)


def another(inputs: counterfactual.Inputs, after: int | None) -> bool:
    """Whether that is another decision, said independently of the search."""
    row = inputs.row
    if after is None:
        return True
    if inputs.workflow.policy.kind == "budget_allocation":
        return abs(after - row["after"]) >= 0.01 * row["before"]
    return bool(after != row["after"])


def prove_feature(inputs: counterfactual.Inputs, turn: dict[str, Any]) -> None:
    features, name = inputs.features, turn["name"]
    mine = pc.equal(features["entity_id"], inputs.row["entity_id"])
    if "moment" in features.schema.names:
        mine = pc.and_(mine, pc.equal(features["moment"], "open"))
    at = features.schema.get_field_index(name)
    for value, flips in ((turn["value"], True), (turn["unchanged_at"], False)):
        column = pc.if_else(mine, pa.scalar(value, features.schema.field(at).type), features[name])
        after = decide_again(inputs, features.set_column(at, name, column))
        assert another(inputs, after) is flips, (turn, value, after)
        assert after == turn["becomes"] or not flips
    assert features.filter(mine)[name].to_pylist() == [turn["now"]]
    close(turn)


def close(turn: dict[str, Any]) -> None:
    """A little less than what flips it is what does not: the turn lies between two values next to each other."""
    between, far = abs(turn["value"] - turn["unchanged_at"]), abs(turn["value"] - turn["now"])
    assert between <= (1 if isinstance(turn["value"], int) else 0.01 * far), turn


def prove_limit(inputs: counterfactual.Inputs, turn: dict[str, Any]) -> None:
    for value, flips in ((turn["value"], True), (turn["unchanged_at"], False)):
        raw = inputs.workflow.model_dump()
        *path, last = turn["name"].replace("[", ".").replace("]", "").split(".")
        place: Any = raw
        for part in path:
            if isinstance(place[part], tuple):
                place[part] = list(place[part])
            place = place[part]
        place[int(last) if isinstance(place, list) else last] = value
        after = decide_again(inputs, workflow=type(inputs.workflow).model_validate(raw))
        assert another(inputs, after) is flips, (turn, value, after)
        assert after == turn["becomes"] or not flips
    close(turn)


def test_the_smallest_changes_flip_the_decision_and_a_little_less_does_not(world: TraceHarness) -> None:
    rows = [r for r in world.rows if r["arm"] == "champion"]
    picked = rows[1 :: max(1, len(rows) // 2)]
    features, limits = 0, 0
    for row in picked:
        begun = time.process_time()
        found = world.explain(row).as_dict()["would_change"]
        assert time.process_time() - begun < 10, "seconds of one core"
        assert 0 < found["redecisions"] <= found["most"] and not found["stopped"]
        inputs = trace._inputs(row, world.bench.lake, world.registry)
        sizes = [turn["size"] for turn in found["features"]]
        assert sizes == sorted(sizes), "the smallest first"
        for turn in found["features"]:
            prove_feature(inputs, turn)
        for turn in found["limits"]:
            prove_limit(inputs, turn)
        features, limits = features + len(found["features"]), limits + len(found["limits"])
    assert features > len(picked) / 2 and limits >= len(picked), "the search finds what there is"


def test_a_ticket_left_to_people_says_where_the_review_line_would_have_to_lie(
    queue: Any, registry: Registry, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counterfactual, "FEATURES_TRIED", 0)
    bench = queue.copy(tmp_path / "queue")
    pressed(bench)
    policy = bench.workflow.policy.model_copy(update={"review_above": 0.22, "review": "uncertainty"})
    object.__setattr__(bench, "workflow", bench.workflow.model_copy(update={"policy": policy}))
    rows = [r for r in decided(bench, registry, ledger) if r["review"]]
    found = [explain(ledger, bench.lake, registry, r["decision_id"]).as_dict() for r in rows[:4]]
    turns = [t for one in found for t in one["would_change"]["limits"] if t["name"] == "policy.review_above"]
    assert turns and all(t["value"] > t["now"] == 0.22 for t in turns)
    for one, turn in ((o, t) for o in found for t in o["would_change"]["limits"] if t in turns):
        uncertain = one["score"]["score"]["uncertainty"]
        assert turn["unchanged_at"] < uncertain <= turn["value"], "at its own uncertainty it is decided on"


def test_a_search_that_is_cut_short_says_so(lines: TraceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counterfactual, "MOST", 30)
    told = lines.explain(lines.some())
    found = told.as_dict()["would_change"]
    assert found["stopped"] and found["redecisions"] <= found["most"]
    assert any("stopped after 30" in line for line in told.lines())


# --- what is gone -----------------------------------------------------------------------------------------------------


def test_a_decision_that_does_not_replay_claims_nothing_about_others(
    small: Any, registry: Registry, ledger: Ledger
) -> None:
    batch = small.decide(registry, small.last)
    row = next(r for r in batch.decisions.to_pylist() if r["changed"])
    after = [v + 5 * (e == row["entity_id"]) for e, v in
             zip(batch.decisions["entity_id"].to_pylist(), batch.decisions["after"].to_pylist(), strict=True)]  # fmt: skip
    at = batch.decisions.schema.get_field_index("after")
    object.__setattr__(batch, "decisions", batch.decisions.set_column(at, "after", pa.array(after, pa.int64())))
    record(ledger, small, batch)
    found = ledger.decisions(batch.batch_id, [row["entity_id"]]).to_pylist()[0]
    told = explain(ledger, small.lake, registry, found["decision_id"])
    said = told.as_dict()
    assert said["replay"]["equal"] is False and said["replay"]["differs_in"] == "after"
    assert said["replay"]["again"] == row["after"]
    assert "does not give the recorded decision" in gone(said)["would_change"]
    assert any(line.startswith("Replay: differs in after") for line in told.lines())


def lose_model(bench: Any, registry: Registry) -> None:
    registry.client.delete_model_version(bench.workflow.name, "2")


def lose_run(bench: Any, registry: Registry) -> None:
    version = registry.by_number(bench.workflow.name, 2)
    with registry_database(registry) as database:
        database.execute("DELETE FROM metrics WHERE run_uuid = ?", (version.run_id,))
        for table in ("latest_metrics", "params", "tags", "logged_model_metrics", "inputs"):
            names = [r[1] for r in database.execute(f"PRAGMA table_info({table})")]
            if "run_uuid" in names:
                database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (version.run_id,))
        database.execute("DELETE FROM runs WHERE run_uuid = ?", (version.run_id,))


def registry_database(registry: Registry) -> Any:
    import sqlite3

    return sqlite3.connect(registry.uri.removeprefix("sqlite:///"))


def lose(table: str) -> Callable[[Any, Registry], None]:
    return lambda bench, registry: shutil.rmtree(bench.lake.uri(bench.workflow.table(table)))


@pytest.mark.parametrize(
    ("losing", "lost", "kept"),
    [
        (lose_model, {"score", "model", "replay", "would_change"}, {"sources", "batch", "decision"}),
        (lose_run, {"model.run"}, {"score", "replay", "would_change"}),
        (lose("features"), {"score", "replay", "would_change"}, {"model", "sources"}),
        (lose("arms"), {"score", "replay", "would_change"}, {"model", "sources"}),
        (lose("events"), {"sources"}, {"model", "score", "replay", "would_change"}),
        (lose("specs"), {"score", "replay", "would_change", "sources"}, {"model"}),
    ],
    ids=["model", "run", "features", "arms", "events", "specs"],
)
def test_what_is_gone_is_said_in_its_place_and_the_rest_is_told(
    lines: TraceHarness,
    tmp_path: Path,
    registry: Registry,
    unsearched: None,
    losing: Any,
    lost: set[str],
    kept: set[str],
) -> None:
    bench = lines.bench.copy(tmp_path / "lost")
    losing(bench, registry)
    scoring._model.cache_clear()
    told = explain(lines.ledger, bench.lake, registry, lines.some()["decision_id"])
    found = gone(told.as_dict())
    assert set(found) == lost and not set(found) & kept, found
    assert all(found.values())
    assert sum("gone:" in line for line in told.lines()) >= len(lost)


def test_a_forgotten_name_is_not_told_again(lines: TraceHarness, ledger: Ledger) -> None:
    row = record(ledger, lines.bench, lines.batch)[0]
    ledger.forget(row["entity_id"])
    told = explain(ledger, lines.bench.lake, lines.registry, row["decision_id"])
    said = told.as_dict()
    assert set(gone(said)) == {"score", "sources", "replay", "would_change"}
    assert said["model"]["version"] == 2 and said["decision"]["after"] == row["after"]
    assert row["entity_id"] not in json.dumps(said) + "\n".join(told.lines())


def test_after_the_ledgers_retention_the_lake_tells(lines: TraceHarness, ledger: Ledger, unsearched: None) -> None:
    rows = record(ledger, lines.bench, lines.batch)
    lake, registry = lines.bench.lake, lines.registry
    push(ledger, Shelf(rows), rows[0]["batch_id"])
    row, other = rows[0], rows[1]
    ledger.forget(other["entity_id"])
    assert ledger.retention(1) == [row["batch_id"]]
    told = explain(ledger, lake, registry, row["decision_id"]).as_dict()
    assert set(gone(told)) == {"downstream", "deliveries"} and told["replay"]["equal"] is True
    assert told["batch"]["digest"] == ledger.batch(row["batch_id"]).digest
    assert other["entity_id"] not in json.dumps(explain(ledger, lake, registry, other["decision_id"]).as_dict())


def test_a_decision_that_the_ledger_never_had_is_told_from_the_lake_and_an_unknown_one_refused(
    lines: TraceHarness, ledger: Ledger, unsearched: None
) -> None:
    lake, registry = lines.bench.lake, lines.registry
    told = explain(ledger, lake, registry, lines.rows[0]["decision_id"])
    assert set(gone(told.as_dict())) == {"downstream", "deliveries", "batch"} and told.as_dict()["replay"]["equal"]
    assert told.lines()
    with pytest.raises(Unknown, match="no-such-decision"):
        explain(ledger, lake, registry, "no-such-decision")


# --- what acted ---------------


def test_a_decision_that_was_never_sent_is_not_told_as_what_stands(
    small: Any, registry: Registry, ledger: Ledger, unsearched: None
) -> None:
    rows = decided(small, registry, ledger)
    push(ledger, Shelf(rows), rows[0]["batch_id"])
    step_back(registry, "ad_budget", 2, "to decide otherwise")
    later = decided(small, registry, ledger)
    sent = {r["entity_id"]: r for r in rows}
    for row in (next(r for r in later if r["changed"]), next(r for r in later if not r["changed"])):
        mine = sent[row["entity_id"]]
        reading = Reading(row["entity_id"], "t", row["after"])
        told = explain(ledger, small.lake, registry, row["decision_id"], reading=reading)
        seen = told.as_dict()["downstream"]
        assert seen["acted"] is False and not seen["now"]["as_decided"], "the same value by chance"
        assert seen["instead"] == {k: mine[k] for k in ("decision_id", "batch_id", "after")} | {
            "standing": mine["before"]
        }
        lines = "\n".join(told.lines())
        assert f"decision {mine['decision_id']} of batch {mine['batch_id']} did" in lines
        assert "not by this decision" in lines
        first = explain(ledger, small.lake, registry, mine["decision_id"]).as_dict()["downstream"]
        assert first["acted"] is True and "instead" not in first


def test_a_decision_of_a_batch_of_which_nothing_was_sent_has_not_acted(
    small: Any, registry: Registry, ledger: Ledger, unsearched: None
) -> None:
    rows = decided(small, registry, ledger)
    row = next(r for r in rows if r["changed"])
    told = explain(ledger, small.lake, registry, row["decision_id"])
    assert told.as_dict()["downstream"]["acted"] is False
    assert any("nothing of its batch has been sent" in line for line in told.lines())


# --- rollbacks --------------------------------------------------------------------------------------------------------


def test_a_rollback_tells_what_it_took_back_and_who_asked(
    lines: TraceHarness, ledger: Ledger, unsearched: None
) -> None:
    rows = record(ledger, lines.bench, lines.batch)
    lake, registry = lines.bench.lake, lines.registry
    shelf = Shelf(rows)
    push(ledger, shelf, rows[0]["batch_id"])
    row = next(r for r in rows if r["changed"])
    report = rollback.roll_back(
        ledger, lambda workflow: shelf, rollback.Batch(row["batch_id"]), actor="Ada", reason="too bold"
    )
    assert report.complete and shelf.values[row["entity_id"]] == row["before"]
    back = ledger.decisions(rollback.rollback_id(row["batch_id"]), [row["entity_id"]]).to_pylist()[0]
    told = explain(ledger, lake, registry, back["decision_id"])
    said = told.as_dict()
    assert not gone(said), gone(said)
    assert (said["decision"]["before"], said["decision"]["after"]) == (row["after"], row["before"])
    assert {(a["actor"], a["reason"]) for a in said["rollback"]["asked"]["each"]} == {("Ada", "too bold")}
    assert said["reverses"]["decision_id"] == row["decision_id"] and said["reverses"]["replay"]["equal"]
    assert said["replay"]["equal"] and said["replay"]["prior"] == row["before"]
    lines = "\n".join(told.lines())
    assert "It reverses:" in lines and "too bold" in lines and "decided by no model" in lines
    original = explain(ledger, lake, registry, row["decision_id"])
    assert original.as_dict()["batch"]["rolled_back_by"][0]["delivery"] == "COMPLETE"
    assert isinstance(original, Explanation) and any("rolled back by" in line for line in original.lines())
