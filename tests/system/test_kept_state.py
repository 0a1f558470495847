"""A state folder that an earlier ``main`` wrote, opened by the code of now: it verifies, reads, replays, explains and rolls back.

Modules move and code is renamed; what is stored is not. The folder and its recipe: ``tests/support/kept_state.py``.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from delivery import rollback
from delivery.ledger import BatchRow
from delivery.sandbox import advertising_api, advertising_server, systems
from orchestration import runner
from pipeline import dispatch, ingest, provenance
from pipeline.decisions import decide, replay, scoring
from pipeline.decisions import tables as decision_tables
from pipeline.decisions.tables import STEPS
from pipeline.explain import trace
from pipeline.workflow import FOLDER, Workflow
from tests.support import kept_state, ledger_content
from tests.support.fakes import Clock, FakeSystem
from tests.support.kept_state import DAYS, WORKFLOWS, at, opened

pytestmark = pytest.mark.system
AFTER = at(DAYS[-1], 8)
"""When everything in the folder has happened."""

KINDS = {
    "approval", "approver", "approver_right", "approver_tried", "batch", "promotion", "push begun", "push ended",
    "rollback", "switch", "verdict",
}  # fmt: skip
LEDGER = {
    "acknowledged", "approvals", "approvers", "attempts", "batches", "conflicts", "decisions", "deliveries", "events", "leases",
    "ledger_version", "meta", "names", "promotions", "rollbacks", "switches",
}  # fmt: skip
"""Tables of the ledger with rows in them; ``retired_values`` has none before a retention."""
STAGES = {
    "arms", "batches", "decision_outcomes", "decisions", "drift", "events", "features", "files", "health", "outcomes",
    "performance", "quarantine", "regression", "scores", "scoring", "specs", "training_set",
}  # fmt: skip
LAKE = {f"{name}/{table}" for name in WORKFLOWS for table in STAGES}
LAKE |= {"ad_budget/rule_scores", "ticket_priority/shadow", "ticket_priority/shadow_scores"}
EMPTY = {"ad_budget/quarantine", "ad_budget/regression", "ticket_priority/regression"}
"""Tables without a row: nothing was bad, and two days are too few for a verdict's figures."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder, not to be written to, and what was read from it when it was made."""
    home = tmp_path_factory.mktemp("kept")
    return home, kept_state.unpack(home)


@pytest.fixture
def home(kept: tuple[Path, dict[str, Any]]) -> Iterator[Path]:
    """The folder as the state folder of now."""
    with kept_state.environment(kept[0]):
        yield kept[0]


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """A folder of one's own, to write to."""
    kept_state.unpack(tmp_path / "home")
    with kept_state.environment(tmp_path / "home"):
        yield tmp_path / "home"


def batches(name: str, kind: str = "decision") -> list[BatchRow]:
    with opened(AFTER) as book:
        return sorted(book.batches(name, kind=kind), key=lambda b: b.sequence)


def spec(name: str, home: Path, day: date) -> Workflow:
    """The workflow as it was when a day was decided."""
    (row,) = kept_state.lake(home).read(f"{name}/batches", days=[day]).to_pylist()
    said = replay.spec_of(name, kept_state.lake(home), row["spec_digest"])
    return said.model_copy(update={"folder": FOLDER / name})


def test_the_folder_holds_every_kind_of_event_and_table_that_its_days_write(home: Path) -> None:
    with closing(sqlite3.connect(home / "ledger.db")) as database:
        names = [n for (n,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        filled = {n for n in names if database.execute(f'SELECT count(*) FROM "{n}"').fetchone()[0]}
        states = {state for (state,) in database.execute("SELECT DISTINCT state FROM deliveries")}
    assert kinds_in(home) == KINDS and filled == LEDGER and states == {"ACKED", "CONFLICT"}
    assert set(kept_state.tables(home)) == LAKE
    here = kept_state.lake(home)
    assert {table for table in LAKE if not here.read(table).num_rows} == EMPTY
    for name in WORKFLOWS:
        assert [(b.day, b.delivery, b.acted) for b in batches(name)] == [(day, "COMPLETE", True) for day in DAYS]
        assert len(list((home / "landing" / name / "export").iterdir())) == kept_state.HISTORY + kept_state.LIVE
    assert [b.reverses for b in batches("ad_budget", "rollback")] == [batches("ad_budget")[-1].batch_id]


def kinds_in(home: Path) -> set[str]:
    with closing(sqlite3.connect(home / "ledger.db")) as database:
        return {kind for (kind,) in database.execute("SELECT DISTINCT kind FROM events")}


def test_every_stored_name_is_still_a_name_in_the_code(home: Path) -> None:
    """A name that the code has renamed reads as a null or as nothing at all, and nothing fails: so it is looked for."""
    rooms = ("orchestration", "assets", "pipeline", "models", "data_checks", "delivery", "common", "workflows")
    files = [f for room in rooms for f in (kept_state.ROOT / room).rglob("*") if f.suffix in (".py", ".sql", ".yaml")]
    words = "\n".join(file.read_text() for file in files if file.suffix != ".yaml")
    # events are read with the literal of their kind; columns stand in SQL as words
    literals = set(re.findall(r"""["']([\w ]+)["']""", words))
    known = literals | set(re.findall(r"\w+", "\n".join(f.read_text() for f in files)))
    here = kept_state.lake(home)
    columns = {column for table in LAKE for column in here.read(table).column_names}
    assert kinds_in(home) - literals == set(), "kinds of events are hash-chained"
    assert {table.split("/")[1] for table in LAKE} - literals == set(), "tables of the lake"
    made_up = {f"days_by_{step}" for step in STEPS}
    assert columns - known - made_up == set(), "columns of the lake"
    with closing(sqlite3.connect(home / "ledger.db")) as database:
        tables = {n for (n,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        fields = {row[1] for n in tables for row in database.execute(f'PRAGMA table_info("{n}")')}
        bodies = database.execute("SELECT body FROM events UNION ALL SELECT record FROM batches").fetchall()
    assert (tables | fields) - known == set(), "tables and columns of the ledger"
    assert {key for (body,) in bodies for key in json.loads(body)} - known == set(), (
        "keys of events and of batches' records"
    )


def test_the_archive_names_no_machine_and_no_person(tmp_path: Path) -> None:
    kept_state.unpack(tmp_path, move=False)
    assert kept_state.machine_in(tmp_path, str(Path.home()) + "/", str(kept_state.ROOT) + "/") == []
    assert kept_state.ARCHIVE.stat().st_size < 410_000


def test_everything_is_read_as_it_was_when_it_was_written(kept: tuple[Path, dict[str, Any]]) -> None:
    home, expected = kept
    found = kept_state.examined(home)
    for table, was in expected["lake"].items():
        assert found["lake"][table] == was, table
    assert found == expected


def test_the_ledger_verifies_against_its_head_of_then(kept: tuple[Path, dict[str, Any]], home: Path) -> None:
    with opened(AFTER) as book:
        verdict = book.verify()
    assert verdict.ok and not verdict.problems and verdict.head.hash == kept[1]["head"]
    assert ledger_content.digests(home) == kept[1]["content"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_files_that_have_landed_are_known_and_land_no_second_time(own: Path, name: str) -> None:
    here = kept_state.lake(own)
    before = here.version(f"{name}/events")
    found = ingest.ingest(spec(name, own, DAYS[-1]), here, own / "landing", now=datetime.fromisoformat(AFTER))
    assert len(found.files) == kept_state.HISTORY + kept_state.LIVE and not found.new and not found.refused
    assert found.accepted == found.quarantined == 0 and here.version(f"{name}/events") == before
    assert not found.outdated, "the mapping of then is another one now: its rows would be remapped"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_champion_is_read_and_gives_the_scores_that_were_stored(home: Path, name: str) -> None:
    here, store = kept_state.lake(home), kept_state.registry(home)
    for day in DAYS:
        (made,) = here.read(f"{name}/scoring", days=[day]).to_pylist()
        workflow = spec(name, home, day)
        version = store.by_alias(name, "champion")
        assert version is not None and (version.number, version.digest) == (made["model_version"], made["model_digest"])
        (row,) = here.read(f"{name}/decisions", days=[day]).slice(0, 1).to_pylist()
        found = replay.made_from(row, here, store)
        stored = decision_tables.scores_of(workflow, here, day, made)
        keys = [(key, "ascending") for key in ("entity_id", "moment") if key in stored.column_names]
        again = scoring.read_model(workflow, store, version).score(found.features)
        assert again.select(stored.column_names).cast(stored.schema).sort_by(keys).equals(stored.sort_by(keys))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_decision_replays_to_the_bit_whatever_code_is_here_now(home: Path, name: str) -> None:
    """Replay refuses no other code: it says ``same code: False``, and the values must still be the same."""
    here, store = kept_state.lake(home), kept_state.registry(home)
    for day in DAYS:
        rows = here.read(f"{name}/decisions", days=[day]).to_pylist()
        found = replay.made_from(rows[0], here, store)
        again, _ = decide.decide(found.workflow, found.day, found.features, found.scores, found.drawn, found.step)
        recorded = pa.Table.from_pylist(rows, schema=again.schema).sort_by("entity_id")
        assert rows and again.sort_by("entity_id").equals(recorded)
        one = replay.replay(name, here, store, rows[0]["decision_id"])
        assert one.equal and one.as_dict()["equal to the bit"] and not one.as_dict()["differs in"]
        assert one.same_code == (rows[0]["code_digest"] == provenance.digest(name))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_day_decided_anew_comes_out_as_it_stands(own: Path, name: str) -> None:
    day = DAYS[0]
    with dg.DagsterInstance.ephemeral() as instance:
        runner.prepare_home()
        done = runner.run(spec(name, own, day), "decide", day, day, now=at(day, 40), instance=instance)
    assert done.success, runner.failed_steps(done)
    (same,) = [row for row in runner.check_rows(done) if row["check"] == "same_again"]
    assert same["result"] == "passed", same
    assert ledger_content.digests(own) == kept_state.unpack(own / "again")["content"]


def gone(said: Any, at: str = "") -> list[str]:
    """Where an explanation says that something is gone."""
    if isinstance(said, dict):
        here = [f"{at}: {said['gone']}"] if "gone" in said else []
        return here + [found for key, value in said.items() for found in gone(value, f"{at}.{key}")]
    return [found for value in said for found in gone(value, at)] if isinstance(said, list) else []


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_decision_is_explained_down_to_its_source_rows(home: Path, name: str) -> None:
    batch = batches(name)[0]
    with opened(AFTER) as book:
        sent = next(d for d in book.deliveries(batch.batch_id) if d.arm == "champion")
        found = trace.explain(book, kept_state.lake(home), kept_state.registry(home), sent.decision_id)
    said = found.as_dict()
    assert gone(said) == []
    assert said["replay"]["equal"] is True and said["decision"]["after"] == sent.after == said["replay"]["again"]
    assert said["sources"]["rows"] and all(one["landed_at"] for one in said["sources"]["files"])
    assert said["model"]["same_digest"] and said["model"]["run"]["status"] == "FINISHED"
    assert said["would_change"]["redecisions"] and any(sent.entity in line for line in found.lines())


def stands(name: str) -> dict[str, int]:
    """What the system held when the folder was left: what the ledger knows last of each value."""
    values: dict[str, int] = {}
    for batch in sorted([*batches(name), *batches(name, "rollback")], key=lambda b: b.sequence):
        with opened(AFTER) as book:
            rows = book.decisions(batch.batch_id).to_pylist()
            sent = {d.entity: d.observed for d in book.deliveries(batch.batch_id)}
        values |= {row["entity_id"]: sent.get(row["entity_id"], row["after"]) for row in rows}
    return values


def test_batches_that_were_sent_are_taken_back_from_a_system_that_holds_their_values(own: Path) -> None:
    sent, values = batches("ticket_priority"), stands("ticket_priority")
    assert {b.system for b in sent} == {sent[0].system} and sent[0].system
    world = FakeSystem(values, clock=(clock := Clock(datetime.fromisoformat(AFTER))), system=sent[0].system)
    first, prior = DAYS[0], dict(values)
    with opened(AFTER) as book:
        book.clock = clock
        ours = [[d for d in book.deliveries(b.batch_id) if d.attempts] for b in reversed(sent)]
        prior |= {d.entity: d.before for rows in ours for d in rows if d.entity and d.before}
        report = rollback.roll_back(
            book, lambda workflow: world, rollback.Since(first, "ticket_priority"), actor="robin", reason="as a test",
            clock=clock, sleep=clock.sleep, monotonic=clock.monotonic,
        )  # fmt: skip
        assert report.complete and book.verify().ok
    assert kinds_in(own) == KINDS, "the code of now writes another kind of event"
    assert [one.restored for one in report.batches] == [len(rows) for rows in ours]
    assert [one.untouched for one in report.batches] == [1, 0], "what somebody had done already is not taken back"
    assert {entity: world.value(entity) for entity in values} == prior != values


def test_a_sent_batch_is_taken_back_over_the_connector_of_its_workflow(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the real connector, from an account in which the values stand as they were sent."""
    first, second = batches("ad_budget")
    moment = datetime.fromisoformat(AFTER)
    world = systems.Setup(kept_state.SEED, kept_state.START, kept_state.HISTORY, lines=18).advertising()
    account = advertising_api.AdvertisingSandbox(
        tmp_path / "account", world, next_day=DAYS[-1] + timedelta(days=1), token="a-token-for-tests",
        budgets=stands("ad_budget"), customer_id=systems.CUSTOMER, user_email=systems.EMAIL, clock=lambda: moment,
    )  # fmt: skip
    with advertising_server.serve(account) as server, opened(AFTER) as book:
        monkeypatch.setenv("SIGNALBOX_ADS_TOKEN", "a-token-for-tests")
        monkeypatch.setenv("SIGNALBOX_ADS_ENDPOINT", server.url.rstrip("/"))
        how: dict[str, Any] = {
            "actor": "robin", "reason": "as a test", "trigger": "person", "run_id": "kept", "clock": lambda: moment,
            "sleep": lambda seconds: None,
        }  # fmt: skip
        store = kept_state.registry(own)
        again = dispatch.roll_back(book, store, rollback.Batch(second.batch_id), **how)
        report = dispatch.roll_back(book, store, rollback.Batch(first.batch_id), **how)
        assert again.complete and again.batches[0].already, "it had been taken back"
        (done,) = report.batches
        assert report.complete and done.restored + len(done.conflicts) == first.counts["ACKED"] and done.restored
        back = {d.entity: d.before for d in book.deliveries(first.batch_id)}
        assert book.verify().ok
    account.close()
    left = {one.entity for one in done.conflicts}
    values = account.amounts()
    assert {e: values[e] for e in back if e not in left} == {e: v for e, v in back.items() if e not in left}
