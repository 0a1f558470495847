"""Each worked example against a server that answers like its system: read, write, history, and a real push with people in between."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from delivery import push as pushing
from delivery.connectors.base import Misconfigured, Reading, Unavailable, Write
from delivery.connectors.rest import EXAMPLES, RestConnector, RestSettings, connect
from delivery.ledger import Ledger, NewBatch
from delivery.push import PushSettings, push
from tests.support import rest_servers as servers


@dataclass(frozen=True)
class Case:
    """One system: its server, six entities, how the decision's 3, 1 and 2 look there, and what its connector can promise."""

    name: str
    api: type[servers.Api]
    ids: tuple[str, ...]
    three: Any
    one: Any
    two: Any
    conditional: bool = False
    """A write that lost a race is turned away."""
    bulk: int = 1


TICKETS = ("101", "102", "103", "104", "105", "106", "199")
CASES = [
    Case("zendesk", servers.Zendesk, TICKETS, "normal", "urgent", "high", conditional=True),
    Case("jira", servers.Jira, tuple(f"ACME-{i}" for i in TICKETS), "3", "1", "2"),
    Case("servicenow", servers.ServiceNow, tuple(f"INC0010{i}" for i in TICKETS), "3", "1", "2"),
    Case("redmine", servers.Redmine, TICKETS, 3, 5, 4),
    Case("request_tracker", servers.RequestTracker, TICKETS, 3, 1, 2, conditional=True),
    Case("hubspot", servers.HubSpot, TICKETS, "MEDIUM", "URGENT", "HIGH", bulk=100),
    Case("gitlab", servers.GitLab, TICKETS, 3, 1, 2),
]
every = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)


@contextmanager
def system(case: Case, folder: Path, env: dict[str, str] | None = None) -> Iterator[tuple[servers.Api, RestConnector]]:
    """The example's own YAML, unchanged but for the host; six entities at 3, of which the fourth is closed."""
    shutil.copy(EXAMPLES / f"{case.name}.yaml", folder / "system.yaml")
    api = case.api(dict.fromkeys(case.ids[:6], case.three), closed=(case.ids[3],))
    with servers.serving(api) as url:
        settings = RestSettings(kind="rest", file="system.yaml", base_url=url + api.base)
        connector = connect(settings, environ=env or api.env, folder=folder, clock=now)
        try:
            yield api, connector
        finally:
            connector.close()


def write(reading: Reading, value: int) -> Write:
    key = reading.key
    return Write(key, reading.target, value, reading.value, reading.token, f"k-{key}", f"d-{key}", "batch-1", "run-1")


def test_every_example_has_a_server_that_answers_like_it() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {case.name for case in CASES}


@every
def test_reads_one_and_many_closed_and_missing(case: Case, tmp_path: Path) -> None:
    with system(case, tmp_path) as (_, connector):
        many = connector.read(case.ids)
        assert {k: (r.value, r.state) for k, r in many.items()} == {
            **{i: (3, "open") for i in case.ids[:6]},
            case.ids[3]: (3, "closed"),
            case.ids[6]: (None, "missing"),
        }
        assert connector.read([case.ids[0]])[case.ids[0]] == many[case.ids[0]]
        assert connector.read([case.ids[6]])[case.ids[6]].state == "missing"


@every
def test_writes_what_it_was_told_and_the_history_says_who(case: Case, tmp_path: Path) -> None:
    a, b = case.ids[:2]
    with system(case, tmp_path) as (api, connector):
        began = now()
        before = connector.read([a, b])
        written = connector.apply([write(before[a], 1), write(before[b], 2)])
        assert [(w.key, w.outcome) for w in written] == [(a, "accepted"), (b, "accepted")]
        assert (api.records[a].value, api.records[b].value) == (case.one, case.two)
        assert {k: r.value for k, r in connector.read([a, b]).items()} == {a: 1, b: 2}
        api.set(a, case.two)
        changes = connector.history([a], began)
        assert [(c.value, c.ours) for c in changes] == [(1, True), (2, False)]
        assert all(abs((c.at - now()).total_seconds()) < 60 for c in changes)
        assert connector.history([a], now() + timedelta(seconds=5)) == []


@every
def test_a_lost_race_is_turned_away_where_the_system_can(case: Case, tmp_path: Path) -> None:
    a = case.ids[0]
    with system(case, tmp_path) as (api, connector):
        before = connector.read([a])
        api.set(a, case.two)
        [written] = connector.apply([write(before[a], 1)])
        assert written.outcome == ("conflict" if case.conditional else "accepted")
        assert api.records[a].value == (case.two if case.conditional else case.one)


@every
def test_a_wrong_token_names_its_variable_and_never_shows_it(case: Case, tmp_path: Path) -> None:
    wrong = {name: f"wrong-{name.lower()}-5e3" for name in case.api.env}
    with system(case, tmp_path, wrong) as (_, connector):
        for call in (
            lambda: connector.read([case.ids[0]]),
            lambda: connector.read(case.ids),
            lambda: connector.apply([Write(case.ids[0], case.ids[0], 1, 3, "t", "k", "d", "b", "r")]),
        ):
            with pytest.raises(Misconfigured) as caught:
                call()
            assert list(case.api.env)[-1] in str(caught.value)
            assert [*wrong.values()][-1] not in str(caught.value)


@every
def test_a_missing_variable_is_named(case: Case, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=next(iter(case.api.env))), system(case, tmp_path, {"HOME": "/"}):
        pass


def batch(ledger: Ledger, decided: dict[str, int]) -> str:
    n, ids = len(decided), list(decided)
    rows = pa.table(
        {
            "decision_id": [f"d-{i}" for i in ids],
            "entity_id": ids,
            "unit": ids,
            "arm": ["champion"] * n,
            "arm_probability": [0.9] * n,
            "perturbation": pa.array([None] * n, pa.float64()),
            "perturbation_probability": pa.array([None] * n, pa.float64()),
            "before": pa.array([3] * n, pa.int64()),
            "after": pa.array(list(decided.values()), pa.int64()),
            "changed": [True] * n,
            "review": [False] * n,
            "expected_gain": [1.0] * n,
            "reasons": pa.array([["test"]] * n, pa.list_(pa.string())),
        }
    )
    new = NewBatch(
        batch_id="batch-1", workflow="ticket_priority", kind="decision", day=date(2026, 1, 5), digest="d" * 64,
        status="READY", step="champion", as_of=now(), decided_at=now(), run_id="run-1", record={},
    )  # fmt: skip
    ledger.record_batch(new, rows)
    return new.batch_id


@every
def test_a_push_with_people_in_between(case: Case, tmp_path: Path) -> None:
    """One plain, one changed by a person before, one there already, one closed, one missing, one changed in the window."""
    plain, before, there, closed, window, last, gone = case.ids
    settings = PushSettings(late_s=0.01, backoff_s=(0.01, 0.05), concurrency=4)
    with system(case, tmp_path) as (api, connector), Ledger.open(f"sqlite:///{tmp_path}/l.db", key=b"k" * 32) as ledger:
        # A second of its own for the person's change in the window: some systems tell whole seconds only
        time.sleep(1.05 - time.time() % 1 if case.name == "zendesk" else 0)
        name = batch(ledger, dict.fromkeys(case.ids, 1))
        api.set(before, case.two)
        api.set(there, case.one)

        def somebody(id_: str) -> None:
            if id_ == window and not api.applied[window]:
                api.before_write = None
                api.set(window, case.two)

        api.before_write = somebody
        diff = pushing.dry_run(ledger, connector, name)
        assert not api.writes(), "a dry run writes nothing"
        assert {r.entity: r.action for r in diff.rows} == {
            plain: "SEND", before: "CONFLICT", there: "ACKED", closed: "SKIPPED", window: "SEND", last: "SEND", gone: "REJECTED",
        }  # fmt: skip

        report = push(ledger, connector, name, settings=settings, run_id="run-1", rng=random.Random(1))

        states = {d.entity: d.state for d in ledger.deliveries(name)}
        assert report.complete
        assert states == {
            plain: "ACKED", before: "CONFLICT", there: "ACKED", closed: "SKIPPED",
            window: "CONFLICT" if case.conditional else "OVERWRITTEN", last: "ACKED", gone: "REJECTED",
        }, report  # fmt: skip
        kept = case.two if case.conditional else case.one
        assert [api.records[i].value for i in case.ids[:6]] == [
            case.one,
            case.two,
            case.one,
            case.three,
            kept,
            case.one,
        ]
        assert max(api.applied.values()) == 1 and not api.applied[there] and not api.applied[before]
        assert ledger.verify().ok
        again = push(ledger, connector, name, settings=settings)
        assert again.sends == 0
        text = repr(report) + "".join(p.read_text("latin-1") for p in tmp_path.glob("l.db*"))
        assert not [s for s in list(case.api.env.values())[-1:] if s in text]


# --------------------------------------------------------------------------- each system's own manners


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_a_query_that_servicenow_cancelled_is_asked_again_and_nobody_is_missing(tmp_path: Path) -> None:
    case = case_of("servicenow")
    with system(case, tmp_path) as (api, connector):
        for keys in (case.ids[:1], case.ids[:3]):
            api.cancelled = 1
            with pytest.raises(Unavailable, match="maximum execution time exceeded"):
                connector.read(keys)
        with Ledger.open(f"sqlite:///{tmp_path}/l.db", key=b"k" * 32) as ledger:
            name = batch(ledger, dict.fromkeys(case.ids[:3], 1))
            api.cancelled = 2
            report = push(ledger, connector, name, settings=PushSettings(backoff_s=(0.01, 0.05)), rng=random.Random(1))
            assert report.complete and report.counts == {"ACKED": 3}


def test_redmine_gets_no_note_for_a_priority_that_it_leaves_as_it_is(tmp_path: Path) -> None:
    case = case_of("redmine")
    with system(case, tmp_path) as (api, connector), Ledger.open(f"sqlite:///{tmp_path}/l.db", key=b"k" * 32) as ledger:
        api.locked = case.ids[:1]
        name = batch(ledger, {case.ids[0]: 1, case.ids[1]: 1})
        report = push(
            ledger, connector, name, settings=PushSettings(late_s=0.01, backoff_s=(0.01, 0.05)), rng=random.Random(1)
        )
        assert {d.entity: d.state for d in ledger.deliveries(name)} == {case.ids[0]: "REJECTED", case.ids[1]: "ACKED"}
        assert report.complete and api.notes == []
        assert [api.records[i].value for i in case.ids[:2]] == [3, 5], "Redmine's 5 is Immediate, the decision's 1"


@pytest.mark.parametrize(
    "words", ["Ticket {}: Permission Denied", "You may not modify that", "Priority: That is not allowed"]
)
def test_what_request_tracker_refuses_in_words_is_rejected_at_once(tmp_path: Path, words: str) -> None:
    case = case_of("request_tracker")
    with system(case, tmp_path) as (api, connector), Ledger.open(f"sqlite:///{tmp_path}/l.db", key=b"k" * 32) as ledger:
        api.locked, api.refusal = case.ids[:1], words
        name = batch(ledger, {case.ids[0]: 1})
        push(ledger, connector, name, settings=PushSettings(late_s=0.01, backoff_s=(0.01, 0.05)), rng=random.Random(1))
        [delivery] = ledger.deliveries(name)
        assert (delivery.state, delivery.says) == ("REJECTED", words.format(case.ids[0]))
        # one that a condition must turn away, and the one that was refused
        assert len(api.writes()) == 2 and not api.applied
