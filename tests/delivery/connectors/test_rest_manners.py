"""What systems do that a YAML must be able to say, and what their answers really mean: values, words, bulk, conditions."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from delivery.connectors.base import Misconfigured, Unavailable
from delivery.connectors.rest import connect, load, mapping
from delivery.connectors.rest_spec import RestSettings, Values
from delivery.connectors.rest_version import another
from delivery.ledger import Delivery, Ledger
from delivery.push import PushSettings, Report, push
from delivery.rollback import Batch, roll_back
from tests.delivery.connectors.test_rest import (
    KEYED,
    LISTED,
    MANY,
    NOW,
    TOKEN,
    a_write,
    against,
    always,
    changed,
    items,
    written_to,
)
from tests.support.ledgers import KEY, new_batch, some_decisions
from tests.support.properties import examples
from tests.support.rest_servers import Reply, Request, Scripted, serving

# --------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("said", "pairs"),
    [
        # numbers of the system's own, in another order (Freshdesk: 1 Low … 4 Urgent)
        ({"kind": "names", "names": {4: 1, 3: 2, 2: 3, 1: 4}}, [(4, 1), (3, 2), (2, 3), (1, 4)]),
        # a name is read, an id is written
        ({"kind": "names", "names": {"High": 2, "Low": 3}, "written": {2: 7, 3: 5}}, [("High", 2, 7), ("Low", 3, 5)]),
        # and the other way round
        ({"kind": "names", "names": {7: 2, 5: 3}, "written": {2: "High", 3: "Low"}}, [(7, 2, "High"), (5, 3, "Low")]),
        ({"kind": "integer", "written": {1: "P1", 2: "P2"}}, [(1, 1, "P1"), (2, 2, "P2")]),
        # empty is read, an empty text is written
        ({"kind": "names", "names": {"High": 1}, "null_is": 5, "written": {1: "High", 5: ""}}, [(None, 5, ""), ("", 5, "")]),
        # micros: units with decimals as number and as text, cents
        ({"kind": "decimal", "decimals": 6}, [(70.5, 70_500_000), (70, 70_000_000), (0.1, 100_000)]),
        ({"kind": "text", "decimals": 6, "places": 2}, [("70.50", 70_500_000), ("70.00", 70_000_000), ("-0.01", -10_000)]),
        ({"kind": "text", "decimals": 6}, [("70.5", 70_500_000), ("70", 70_000_000)]),
        ({"kind": "integer", "decimals": 4}, [(7050, 70_500_000)]),
        ({"kind": "text", "decimals": 4}, [("7050", 70_500_000)]),
        ({"kind": "boolean"}, [(True, 1), (False, 0)]),
    ],
)  # fmt: skip
def test_values_stand_as_the_system_has_them(said: dict[str, Any], pairs: list[tuple[Any, ...]]) -> None:
    values = Values.model_validate(said)
    for shown, number, *written in pairs:
        assert values.read(shown) == (number, "")
        form = values.write(number)
        assert (type(form), form) == (type(written[0] if written else shown), written[0] if written else shown)


@pytest.mark.parametrize(
    ("said", "shown", "number"),
    [
        # a number and its text are the same, trailing zeros change nothing
        ({"kind": "names", "names": {4: 1}}, "4", 1), ({"kind": "names", "names": {"4": 1}}, 4, 1), ({"kind": "names", "names": {4: 1}}, 4.0, 1),
        ({"kind": "integer"}, "70.00", 70), ({"kind": "decimal", "decimals": 6}, "70.500", 70_500_000), ({"kind": "text", "decimals": 2}, 70.5, 7050),
        ({"kind": "names", "names": {"High": 1}, "ignore_case": True}, "HIGH", 1), ({"kind": "names", "names": {"High": 1}}, "HIGH", None),
        # what is finer than the decision's unit, or is no number at all, is no value
        ({"kind": "decimal", "decimals": 1}, 70.55, None), ({"kind": "text", "decimals": 2}, "70,00", None), 
        ({"kind": "text", "decimals": 2}, "1,000.00", None),
        ({"kind": "text", "decimals": 2}, "1.000,00", None), ({"kind": "text", "decimals": 2}, "7E1", None), ({"kind": "decimal", "decimals": 2}, True, None),
        ({"kind": "decimal", "decimals": 6}, 2.0**52, None), ({"kind": "text", "decimals": 6}, "4503599627370496.25", None),
        ({"kind": "text", "decimals": 18}, "9.223372036854775807", 2**63 - 1), ({"kind": "text", "decimals": 18}, "9.223372036854775808", None),
        ({"kind": "boolean"}, 1, None), ({"kind": "boolean"}, "true", None), ({"kind": "names", "names": {"True": 1, 1: 2}}, True, None),
    ],
)  # fmt: skip
def test_what_is_read_is_a_value_or_none(said: dict[str, Any], shown: Any, number: int | None) -> None:
    found, says = Values.model_validate(said).read(shown)
    assert found == number and bool(says) == (number is None)


@pytest.mark.parametrize(
    ("said", "value", "says"),
    [
        ({"kind": "integer", "decimals": 4}, 70_505_000, "more than 0 digits"),
        ({"kind": "decimal", "decimals": 6, "places": 2}, 70_505_000, "more than 2 digits"),
        ({"kind": "decimal", "decimals": 6}, 12_345_678_901_234_567, "more digits than a JSON number keeps"),
        ({"kind": "decimal", "decimals": 6}, 2_345_678_901_234_567, None),
        ({"kind": "decimal", "decimals": 18}, 1_234_567_890_123_456_789, "more digits than a JSON number keeps"),
        ({"kind": "boolean"}, 2, "neither 1"),
        ({"kind": "integer", "written": {1: "P1"}}, 2, "not in `values.written`"),
    ],
)
def test_a_value_that_the_system_cannot_hold_is_not_sent(said: dict[str, Any], value: int, says: str | None) -> None:
    values = Values.model_validate(said)
    if says is None:
        assert values.read(values.write(value))[0] == value
        return
    with pytest.raises(ValueError, match=says):
        values.write(value)


@settings(max_examples=examples(200))
@given(st.integers(-(10**15), 10**15), st.integers(0, 9), st.sampled_from(["integer", "decimal", "text"]))
def test_what_is_written_reads_back_as_the_same_number(value: int, decimals: int, kind: str) -> None:
    values = Values.model_validate({"kind": kind, "decimals": decimals})
    try:
        form = values.write(value)
    except ValueError:
        assert kind == "integer" and value % 10**decimals
        return
    assert values.read(form) == (value, "")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "names", "names": {"a": 1}, "decimals": 2}, "`decimals` stand with kind: integer, decimal or text"),
        ({"kind": "integer", "places": 2}, "`places` stand with"),
        ({"kind": "text", "decimals": 1, "places": 2}, "no more than `decimals`"),
        ({"kind": "names", "names": {"5": 1, 5: 2}}, "two of the `names` read alike"),
        ({"kind": "names", "names": {"High": 1, "high": 2}, "ignore_case": True}, "two of the `names` read alike"),
        ({"kind": "names", "names": {"a": 1, "b": 2}, "written": {1: 7, 2: 7}}, "gives two numbers one form"),
        ({"kind": "names", "names": {"a": 1}, "written": {3: 7}}, "`written` holds 3, which none of the `names`"),
        ({"kind": "integer", "ignore_case": True}, "`ignore_case` stands with kind: names"),
    ],
)
def test_values_that_contradict_themselves_are_refused(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        load(written_to(tmp_path, changed(values=values)))
    assert says in str(caught.value)


def test_what_a_value_means_is_the_same_as_before_where_nothing_new_is_said(tmp_path: Path) -> None:
    """A batch that waits for its approval goes on after an upgrade; a new scale or id is a new meaning."""

    def of(values: dict[str, Any]) -> str:
        written_to(tmp_path, changed(values=values))
        return mapping(RestSettings(kind="rest", file="system.yaml"), tmp_path)

    assert of({"kind": "integer"}) == "3f1b08ef71d7c24f58a2ae5f2ae16be504b73835b0c37fa496124a73e56035fb"
    other: list[dict[str, Any]] = [
        {"kind": "integer", "decimals": 2}, {"kind": "integer", "written": {1: 2}}, {"kind": "text"},
    ]  # fmt: skip
    assert len({of({"kind": "integer"}), *map(of, other)}) == 4


class Priorities:
    """An issue shows id and name of its priority, and takes one of them: what is not its id is refused."""

    def __init__(self, takes: str) -> None:
        self.name, self.takes = "High", takes
        self.ids = {"Low": 1, "High": 4, "Urgent": 9}

    def __call__(self, request: Request) -> Reply:
        if request.method == "PUT":
            asked = request.body["v"]
            name = asked if self.takes == "name" else next((n for n, i in self.ids.items() if i == asked), None)
            if type(asked) is not (str if self.takes == "name" else int) or name not in self.ids:
                return 422, {"error": True, "errors": {"priority_id": ["is not included in the list"]}}, {}
            self.name = str(name)
            return 204, None, {}
        return 200, {"id": request.path[3:], "priority": {"id": self.ids[self.name], "name": self.name}}, {}


@pytest.mark.parametrize("takes", ["id", "name"])
@pytest.mark.parametrize("shows", ["id", "name"])
def test_an_id_may_be_read_and_a_name_written_and_the_other_way_round(tmp_path: Path, takes: str, shows: str) -> None:
    system = Priorities(takes)
    numbers = {"Low": 3, "High": 2, "Urgent": 1}
    names = {n if shows == "name" else system.ids[n]: number for n, number in numbers.items()}
    written = {number: n if takes == "name" else system.ids[n] for n, number in numbers.items()}
    values = {"kind": "names", "names": names, "written": written if takes != shows else {}}
    with against(tmp_path, system, read__value=f"/priority/{shows}", values=values) as (_, connector):
        assert connector.read(["1"])["1"].value == 2
        assert connector.apply([a_write(value=1)])[0].outcome == "accepted"
        assert system.name == "Urgent" and connector.read(["1"])["1"].value == 1


def test_a_history_may_hold_ids_where_the_item_shows_names(tmp_path: Path) -> None:
    values = {"kind": "names", "names": {"High": 2, "Low": 3}}
    log = {
        "path": "/h/{entity}", "items": "/log", "value": "/to", "time": "/at", "actor": "/by", "own_actor": "7",
        "values": {"kind": "names", "names": {4: 2, 1: 3}},
    }  # fmt: skip
    said = {"log": [{"to": "4", "at": "2026-03-01T12:00:01Z", "by": 7}]}
    with against(tmp_path, always(200, said), values=values, history=log) as (_, connector):
        assert [c.value for c in connector.history(["1"], NOW)] == [2]


# --------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"error": True, "errors": {"priority": ["must be 1 to 4", "is read only"]}}, "400 priority: must be 1 to 4; is read only"),
        ({"errors": [{"code": 17, "message": "not yours"}, {"code": 18, "message": "nor this"}]}, "400 not yours; nor this"),
        ({"errorMessages": [], "errors": {"priority": "Specify a valid priority"}}, "400 priority: Specify a valid priority"),
        ({"error": {"code": "E1", "message": None, "details": [{"issue": "over the cap"}]}}, "400 code: E1; details: issue: over the cap"),
        ({"message": ["a", {"b": "c"}]}, "400 a; b: c"),
        ({"ok": False, "status": 0, "reason": "closed"}, "400 reason: closed"),
        ({"error": True, "code": 17}, '400 {"error": true, "code": 17}'),
        (["Denied", "Try later"], "400 Denied; Try later"),
        (
            {"description": "Validation failed", "errors": [{"field": "priority", "message": "is 1 to 4", "code": "bad"}]},
            "400 Validation failed (priority: is 1 to 4)",
        ),
    ],
)  # fmt: skip
def test_only_text_counts_as_a_systems_words(tmp_path: Path, body: Any, says: str) -> None:
    with against(tmp_path, always(400, body)) as (_, connector):
        assert connector.apply([a_write()])[0].says == says
    rules = [{"at": "", "none_of": ["?"], "outcome": "refused"}]
    with against(tmp_path, always(200, body), write__errors=rules) as (_, connector):
        assert connector.apply([a_write()])[0].says == says.removeprefix("400 ")


def test_a_rule_that_points_at_true_still_finds_the_words(tmp_path: Path) -> None:
    body = {"error": True, "errors": {"priority": ["is read only"]}}
    rules = [{"at": "/error", "one_of": [True], "outcome": "refused", "says": "/error"}]
    with against(tmp_path, always(200, body), write__errors=rules) as (_, connector):
        assert connector.apply([a_write()])[0].says == "priority: is read only"


def test_a_pattern_is_looked_for_in_texts_however_they_are_nested(tmp_path: Path) -> None:
    rules = [{"at": "/errors", "matches": "read only", "outcome": "refused"}]
    body = {"errors": {"priority": [{"detail": "is read only"}]}}
    with against(tmp_path, always(200, body), write__errors=rules) as (_, connector):
        assert connector.apply([a_write()])[0].outcome == "refused"


def test_what_was_not_sent_is_not_said_to_have_been(tmp_path: Path) -> None:
    with against(tmp_path, always(204), values__max=9) as (api, connector):
        [written] = connector.apply([a_write(value=10)])
        assert written.outcome == "refused" and not written.sent and "nothing was sent" in written.says
        assert not api.requests
    [written] = connector.apply([a_write(value=5)])
    assert written.outcome == "not_applied" and not written.sent, "nobody listens any more"


# --------------------------------------------------------------------------- pushes


class Store:
    """Items with a version; ``lies`` change what becomes of a write."""

    def __init__(self, values: dict[str, Any], lie: Callable[[Store, Request], Reply | None] | None = None) -> None:
        self.values, self.versions = dict(values), dict.fromkeys(values, 1)
        self.lie = lie
        self.puts: list[str] = []

    def put(self, key: str, value: Any) -> None:
        self.puts.append(key)
        self.values[key], self.versions[key] = value, self.versions[key] + 1

    def __call__(self, request: Request) -> Reply:
        if request.method == "GET" and request.path == "/t":
            keys = request.query["ids"][0].split(",")
            return 200, items(*({"id": k, "v": self.values[k]} for k in keys if k in self.values)), {}
        key = request.path[3:]
        if request.method != "GET" and self.lie is not None and (said := self.lie(self, request)) is not None:
            return said
        if request.method != "GET":
            if request.headers.get("if-match") not in (None, f'"{self.versions[key]}"'):
                return 412, None, {}
            self.put(key, request.body["v"])
        return 200, {"id": key, "v": self.values[key]}, {"ETag": f'"{self.versions[key]}"'}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(f"sqlite:///{tmp_path}/ledger.db", key=KEY) as made:
        yield made


FAST = PushSettings(late_s=0.02, backoff_s=(0.01, 0.02), attempts=3, patience_s=2.0)
ETAG: dict[str, Any] = {"read__token": {"header": "ETag"}, "write__one__headers": {"If-Match": "{token}"}}


def pushed(ledger: Ledger, connector: Any, names: list[str], **more: Any) -> tuple[Report, dict[str, Delivery]]:
    ledger.record_batch(new_batch("b1", pools=None), some_decisions("b1", names))
    report = push(ledger, connector, "b1", settings=FAST.model_copy(update=more), rng=random.Random(1))
    return report, {d.entity or "": d for d in ledger.deliveries("b1")}


def test_what_a_bulk_call_took_before_it_failed_is_not_sent_again(tmp_path: Path, ledger: Ledger) -> None:
    """200, an error for the whole call, and three of four rows stand there."""

    def lie(store: Store, request: Request) -> Reply | None:
        rows = request.body["rows"] if request.path == "/bulk" else [{"id": request.path[3:], "v": request.body["v"]}]
        for row in rows:
            if row["id"] == "bad":
                return 200, {"error": True, "errors": [{"id": "bad", "message": "over the cap"}]}, {}
            store.put(row["id"], row["v"])
        return 200, {"done": rows}, {}

    store = Store(dict.fromkeys(["a", "b", "c", "bad", "d"], 100), lie)
    errors = [{"at": "/error", "one_of": [True], "outcome": "refused"}]
    more = {"read__many": LISTED, "write__many": KEYED, "write__errors": errors}
    with against(tmp_path, store, **more) as (_, connector):
        report, told = pushed(ledger, connector, list(store.values))
    assert {n: d.state for n, d in told.items()} == {**dict.fromkeys("abcd", "ACKED"), "bad": "REJECTED"}
    assert sorted(store.puts) == ["a", "b", "c", "d"], "each was applied once"
    assert "over the cap" in (told["bad"].says or "") and report.complete and report.repeats == 0


def test_a_turned_away_bulk_call_that_cannot_be_read_is_left_to_be_found_out(tmp_path: Path) -> None:
    def script(request: Request) -> Reply:
        return (400, {"message": "bad row"}, {}) if request.path == "/bulk" else (500, None, {})

    with against(tmp_path, script, write__many=MANY) as (api, connector):
        written = connector.apply([a_write("1"), a_write("2")])
        assert [w.outcome for w in written] == ["unknown", "unknown"] and "bad row" in written[0].says
        assert [r.path for r in api.requests if r.method != "GET"] == ["/bulk"]


def test_an_id_that_a_bulk_answer_tells_twice_did_not_succeed_if_one_of_them_failed(tmp_path: Path) -> None:
    rule = {"at": "/status", "none_of": ["ok"], "outcome": "refused"}
    many = {**MANY, "results": {"rows": "/out", "key": "/id", "errors": [rule]}}
    for twice in (["ok", "locked"], ["locked", "ok"]):
        said = {"out": [{"id": "1", "status": s} for s in twice] + [{"id": "2", "status": "ok"}]}
        with against(tmp_path, always(200, said), write__many=many) as (_, connector):
            assert [w.outcome for w in connector.apply([a_write("1"), a_write("2")])] == ["refused", "accepted"]


def test_what_was_stored_though_it_was_refused_is_ours_and_can_be_taken_back(tmp_path: Path, ledger: Ledger) -> None:
    def lie(store: Store, request: Request) -> Reply | None:
        if request.body["v"] != 120:
            return None
        store.put("a", request.body["v"])
        return 422, {"message": "rounded to cents"}, {}

    store = Store({"a": 100}, lie)
    with against(tmp_path, store) as (_, connector):
        _, told = pushed(ledger, connector, ["a"])
        assert (told["a"].state, told["a"].sent, told["a"].prior) == ("ACKED", 120, 100)
        assert "though the system refused our write (422 rounded to cents)" in (told["a"].says or "")
        roll_back(ledger, lambda _: connector, Batch("b1"), actor="kim", reason="harm", settings=FAST)
        assert store.values == {"a": 100}


# --------------------------------------------------------------------------- conditions


def test_a_condition_that_the_system_heeds_is_tried_once_and_relied_on(tmp_path: Path, ledger: Ledger) -> None:
    store = Store({"a": 100, "b": 100})
    with against(tmp_path, store, **ETAG) as (api, connector):
        report, told = pushed(ledger, connector, ["a", "b"])
        assert report.guarantee == "each decision is applied exactly once (conditional writes)"
        asked = [r for r in api.requests if r.method == "PUT" and r.body["v"] == 100]
        assert [r.headers["if-match"] for r in asked] == ['"0"'], (
            "the value that stood there, on a version that never was"
        )
    assert {d.state for d in told.values()} == {"ACKED"} and sorted(store.puts) == ["a", "b"]
    assert not ledger.events("condition ignored")


def test_an_etag_that_the_system_does_not_look_at_is_no_condition(tmp_path: Path, ledger: Ledger) -> None:
    def lie(store: Store, request: Request) -> Reply | None:
        store.put(request.path[3:], request.body["v"])
        return 200, {"id": request.path[3:], "v": request.body["v"]}, {}

    store = Store({"a": 100, "b": 100}, lie)
    with against(tmp_path, store, **ETAG) as (_, connector):
        report, told = pushed(ledger, connector, ["a", "b"])
        assert not connector.capabilities.conditional_write
    assert "only absolute values are written" in report.guarantee and "counts for nothing" in report.guarantee
    assert {d.state for d in told.values()} == {"ACKED"} and set(store.values.values()) == {120}
    assert [dict(e.body)["system"] for e in ledger.events("condition ignored")] == ["test-1"] and ledger.verify().ok


@pytest.mark.parametrize(
    ("answer", "says"),
    [((403, {"message": "not yours"}, {}), "exactly once"), ((429, None, {"Retry-After": "0"}), "exactly once")],
)
def test_an_answer_that_does_not_tell_leaves_the_promise_as_it_is(
    tmp_path: Path, ledger: Ledger, answer: Reply, says: str
) -> None:
    store = Store({"a": 100, "b": 100}, lambda store, request: answer if request.body["v"] == 100 else None)
    with against(tmp_path, store, **ETAG) as (_, connector):
        report, told = pushed(ledger, connector, ["a", "b"])
    assert says in report.guarantee and {d.state for d in told.values()} == {"ACKED"}


def test_nothing_is_sent_while_a_try_without_an_answer_may_still_arrive(tmp_path: Path, ledger: Ledger) -> None:
    """The old value, on a version that never was, comes late to a system that ignores conditions: before ours, not after."""
    came: list[Any] = []

    def lie(store: Store, request: Request) -> Reply | None:
        came.append(request.body["v"])
        if request.body["v"] == 100:
            threading.Timer(0.2, store.put, ("a", 100)).start()
            return 500, None, {}
        store.put("a", request.body["v"])
        return 204, None, {}

    store = Store({"a": 100}, lie)
    with against(tmp_path, store, **ETAG) as (_, connector):
        _, told = pushed(ledger, connector, ["a"], late_s=0.5)
    assert came == [100, 120] and store.puts == ["a", "a"] and store.values == {"a": 120}
    assert told["a"].state == "ACKED"


@pytest.mark.parametrize(
    "token", ['"3"', 'W/"1b-dVGv"', "12", "1", "0", "2026-03-01T12:00:00.123456Z", '"abc"', "xyz", "Ω", "…"]
)
def test_another_version_is_another_of_the_same_shape(token: str) -> None:
    other = another(token)
    assert other != token and len(other) == len(token)
    assert [c.isdigit() for c in other] == [c.isdigit() for c in token]


@pytest.mark.parametrize(
    ("token", "other"),
    [
        ("2026-03-01T00:00:00.000000Z", "2026-02-28T00:00:00.000000Z"), ("2026-03-01T12:00:00+00:00", "2026-02-28T12:00:00+00:00"),
        ("2026-03-01 12:00", "2026-02-28 12:00"), ("2026-01-01", "2025-12-31"), ("20260301120000", "20260228120000"),
        ("20260101T000000Z", "20251231T000000Z"), ("Sun, 01 Mar 2026 00:00:00 GMT", "Sat, 28 Feb 2026 00:00:00 GMT"),
        ('"2026-03-01T12:00:00-10:00"', '"2026-02-28T12:00:00-10:00"'), ("10", "9"), ('"10"', '"09"'), ('W/"20"', 'W/"19"'),
        ("1700000000", "1699999999"), ("1700000000.000", "1699999999.000"), ("0100", "0099"),
        ("1700000000.250", "1700000000.249"), ('W/"r100-b"', 'W/"r099-b"'), ("2026-13-41", "2026-13-40"),
    ],
)  # fmt: skip
def test_another_version_of_a_time_or_a_number_is_an_earlier_one(token: str, other: str) -> None:
    """A later one would be let through by a system that turns down only what is older than what stands."""
    assert another(token) == other


# --------------------------------------------------------------------------- systems by YAML alone


ODOO = """
system: odoo
base_url: https://replaced.example
auth: {kind: none}
body_secrets: {password: ODOO_PASSWORD}
read:
  one:
    method: POST
    path: /jsonrpc
    body:
      jsonrpc: "2.0"
      method: call
      params:
        service: object
        method: execute_kw
        args: [acme, 2, "{secret_password}", helpdesk.ticket, read, [["{entity:integer}"]], {fields: [priority]}]
    item: /result
  many:
    method: POST
    path: /jsonrpc
    body:
      jsonrpc: "2.0"
      method: call
      params:
        service: object
        method: execute_kw
        args: [acme, 2, "{secret_password}", helpdesk.ticket, read, ["{rows}"], {fields: [priority]}]
    row: "{entity:integer}"
    at_most: 100
    items: /result
  key: /id
  value: /priority
  errors: [{at: /error, present: true}]
values: {kind: names, names: {"3": 1, "2": 2, "1": 3, "0": 4}}
write:
  one:
    method: POST
    path: /jsonrpc
    body:
      jsonrpc: "2.0"
      method: call
      params:
        service: object
        method: execute_kw
        args: [acme, 2, "{secret_password}", helpdesk.ticket, write, [["{entity:integer}"], {priority: "{value}"}]]
  errors: [{at: /error, present: true, outcome: refused, says: /error/data}, {at: /result, none_of: [true]}]
"""


def odoo(request: Request) -> Reply:
    """JSON-RPC: 200 to everything, errors inside, the password in every body."""
    _, _, password, model, method, args, *_ = request.body["params"]["args"]
    assert model == "helpdesk.ticket"
    if password != "odoo-secret-8":
        wrong = {"code": 200, "message": "Odoo Server Error", "data": {"message": f"Access Denied ({password})"}}
        return 200, {"jsonrpc": "2.0", "error": wrong}, {}
    if method == "write":
        ids, said = args
        if ids == [9]:
            return (
                200,
                {"error": {"message": "Odoo Server Error", "data": {"message": "You are not allowed to modify"}}},
                {},
            )
        ODOO_ROWS[ids[0]] = said["priority"]
        return 200, {"jsonrpc": "2.0", "result": True}, {}
    return 200, {"result": [{"id": i, "priority": ODOO_ROWS[i], "name": "?"} for i in args[0] if i in ODOO_ROWS]}, {}


ODOO_ROWS: dict[int, str] = {}


def by_yaml(folder: Path, said: str, url: str, **environ: str) -> Any:
    (folder / "system.yaml").write_text(said)
    which = RestSettings(kind="rest", file="system.yaml", base_url=url)
    return connect(which, environ=environ, folder=folder, clock=lambda: NOW)


def test_a_system_that_wants_its_password_in_the_body_is_connected_and_never_shows_it(
    tmp_path: Path, ledger: Ledger
) -> None:
    ODOO_ROWS.update({1: "1", 2: "2", 9: "1"})
    ledger.record_batch(
        new_batch("b1", pools=None), some_decisions("b1", ["1", "2", "9"], before=[3, 3, 3], after=[1, 1, 1])
    )
    with serving(Scripted(odoo)) as url:
        connector = by_yaml(tmp_path, ODOO, url, ODOO_PASSWORD="odoo-secret-8")
        report = push(ledger, connector, "b1", settings=FAST, rng=random.Random(1))
        wrong = by_yaml(tmp_path, ODOO, url, ODOO_PASSWORD="wrong-secret-9")
        with pytest.raises(Unavailable, match="Odoo Server Error") as caught:
            wrong.read(["1"])
    told = {d.entity: (d.state, d.says) for d in ledger.deliveries("b1")}
    assert (
        told["1"][0] == "ACKED"
        and told["2"][0] == "CONFLICT"
        and told["9"] == ("REJECTED", "You are not allowed to modify")
    )
    assert ODOO_ROWS == {1: "3", 2: "2", 9: "1"}
    files = b"".join(p.read_bytes() for p in tmp_path.glob("ledger.db*"))
    assert b"odoo-secret" not in files and "secret-" not in repr(report) + str(caught.value) + repr(
        wrong.apply([a_write()])
    )


def test_a_second_secret_goes_in_a_header_of_its_own(tmp_path: Path) -> None:
    said = yaml.safe_dump(changed(secret_headers={"App-Token": "APP"}))
    script = always(401, {"message": "no session for app-secret-1"})
    with serving(api := Scripted(script)) as url:
        connector = by_yaml(tmp_path, said, url, T_TOKEN=TOKEN, APP="app-secret-1")
        with pytest.raises(Misconfigured, match="set T_TOKEN and APP to what is valid") as caught:
            connector.read(["1"])
        assert "app-secret" not in str(caught.value)
        sent = api.requests[0].headers
        assert (sent["app-token"], sent["authorization"]) == ("app-secret-1", f"Bearer {TOKEN}")
        with pytest.raises(Misconfigured, match="APP is not set; `secret_headers` names it"):
            by_yaml(tmp_path, said, url, T_TOKEN=TOKEN)


@pytest.mark.parametrize("where", ["path", "query", "headers"])
def test_a_secret_of_the_body_stands_nowhere_else(tmp_path: Path, where: str) -> None:
    place: dict[str, Any] = {
        "path": "/t/{entity}/{secret_key}",
        "query": {"k": "{secret_key}"},
        "headers": {"K": "{secret_key}"},
    }
    with pytest.raises(Misconfigured, match=r"\{secret_key\} stands in a body only"):
        load(written_to(tmp_path, changed(body_secrets={"key": "KEY"}, **{f"read__one__{where}": place[where]})))
    with pytest.raises(Misconfigured, match=r"unknown placeholder \{secret_other\}"):
        load(
            written_to(
                tmp_path, changed(body_secrets={"key": "KEY"}, write__one__body={"v": "{value}", "k": "{secret_other}"})
            )
        )


@dataclass(frozen=True)
class System:
    """One system as its public documentation shows it: how it shows one value, and where a write brings the new one."""

    said: str
    entity: str
    shows: Callable[[Any], Any]
    """The answer to a read of this value."""
    takes: Callable[[Request], Any]
    """The value in a write."""
    before: Any
    after: Any
    """How the decision's 100 and 120 stand there."""
    yes: Reply = (200, {}, {})
    no: Reply = (400, {"message": "not in the list"}, {})


SYSTEMS = {
    "freshdesk": System(
        """
read: {one: {path: "/api/v2/tickets/{entity}"}, key: /id, value: /priority, closed: [{at: /status, one_of: [5]}]}
values: {kind: names, names: {4: 120, 3: 100, 2: 80, 1: 60}}
write: {one: {method: PUT, path: "/api/v2/tickets/{entity}", body: {priority: "{value}"}}}
""",
        "7", lambda v: {"id": 7, "status": 2, "priority": v}, lambda r: r.body["priority"], 3, 4,
        no=(400, {"description": "Validation failed", "errors": [{"field": "priority", "message": "not in the list"}]}, {}),
    ),
    "zammad": System(
        """
read: {one: {path: "/api/v1/tickets/{entity}", query: {expand: true}}, key: /id, value: /priority}
values: {kind: names, names: {"3 high": 120, "2 normal": 100}, written: {120: 3, 100: 2}}
write: {one: {method: PUT, path: "/api/v1/tickets/{entity}", body: {priority_id: "{value}"}}}
""",
        "7", lambda v: {"id": 7, "priority_id": v, "priority": {3: "3 high", 2: "2 normal"}[v]}, lambda r: r.body["priority_id"], 2, 3,
    ),
    "meta": System(
        """
read: {one: {path: "/v21.0/{entity}", query: {fields: "id,daily_budget,effective_status"}}, key: /id, value: /daily_budget}
values: {kind: text}  # cents, as text; decided in cents
write:
  one: {method: POST, path: "/v21.0/{entity}", body: {daily_budget: "{value}"}}
  errors: [{at: /success, none_of: [true]}]
""",
        "238", lambda v: {"id": "238", "daily_budget": v}, lambda r: r.body["daily_budget"], "100", "120",
        yes=(200, {"success": True}, {}),
        no=(400, {"error": {"message": "not in the list", "type": "OAuthException", "code": 100}}, {}),
    ),
    "tiktok": System(
        """
read:
  one:
    path: /open_api/v1.3/campaign/get/
    query: {advertiser_id: "42", filtering: '{{"campaign_ids":["{entity}"]}}'}
    item: /data/list
  key: /campaign_id
  value: /budget
  errors: [{at: /code, none_of: [0]}]
values: {kind: decimal, decimals: 2}
write:
  one:
    method: POST
    path: /open_api/v1.3/campaign/update/
    body: {advertiser_id: "42", campaign_id: "{entity}", budget: "{value}"}
  errors: [{at: /code, none_of: [0], outcome: refused}]
""",
        "1790", lambda v: {"code": 0, "message": "OK", "data": {"list": [{"campaign_id": "1790", "budget": v}]}},
        lambda r: r.body["budget"], 1.0, 1.2, yes=(200, {"code": 0, "message": "OK"}, {}),
        no=(200, {"code": 40002, "message": "not in the list"}, {}),
    ),
    "linkedin": System(
        """
headers: {LinkedIn-Version: "202504", X-Restli-Protocol-Version: 2.0.0}
read: {one: {path: "/rest/adAccounts/42/adCampaigns/{entity}"}, key: /id, value: /dailyBudget/amount}
values: {kind: text, decimals: 2, places: 2}
write:
  one:
    method: POST
    path: /rest/adAccounts/42/adCampaigns/{entity}
    headers: {X-RestLi-Method: PARTIAL_UPDATE}
    body: {patch: {$set: {dailyBudget: {amount: "{value}", currencyCode: EUR}}}}
""",
        "7", lambda v: {"id": 7, "dailyBudget": {"amount": v, "currencyCode": "EUR"}},
        lambda r: r.body["patch"]["$set"]["dailyBudget"]["amount"], "1.00", "1.20", yes=(204, None, {}),
    ),
    "salesforce": System(
        """
read:
  one: {path: /services/data/v62.0/query, query: {q: "SELECT Id, Priority FROM Case WHERE Id = '{entity}'"}, item: /records}
  key: /Id
  value: /Priority
values: {kind: names, names: {High: 120, Medium: 100}}
write: {one: {method: PATCH, path: "/services/data/v62.0/sobjects/Case/{entity}", body: {Priority: "{value}"}}}
""",
        "500xx1", lambda v: {"totalSize": 1, "done": True, "records": [{"Id": "500xx1", "Priority": v}]},
        lambda r: r.body["Priority"], "Medium", "High", yes=(204, None, {}),
        no=(400, [{"message": "not in the list", "errorCode": "INVALID_OR_NULL_FOR_RESTRICTED_PICKLIST"}], {}),
    ),
    "znuny": System(
        """
body_secrets: {user: T_USER, password: T_PASSWORD}
read:
  one: {method: POST, path: "/Get/{entity}", body: {UserLogin: "{secret_user}", Password: "{secret_password}"}, item: /Ticket}
  key: /TicketID
  value: /PriorityID
  errors: [{at: /Error, present: true}]
values: {kind: names, names: {5: 120, 4: 100}}
write:
  one:
    method: PATCH
    path: /Ticket/{entity}
    body: {UserLogin: "{secret_user}", Password: "{secret_password}", Ticket: {PriorityID: "{value}"}}
  errors: [{at: /Error, present: true, outcome: refused}]
""",
        "7", lambda v: {"Ticket": [{"TicketID": 7, "PriorityID": str(v)}]}, lambda r: r.body["Ticket"]["PriorityID"], 4, 5,
        no=(200, {"Error": {"ErrorCode": "TicketUpdate.AccessDenied", "ErrorMessage": "not in the list"}}, {}),
    ),
    "microsoft ads": System(
        """
secret_headers: {DeveloperToken: T_DEVELOPER}
headers: {CustomerAccountId: "42"}
read:
  one: {method: POST, path: /Campaigns/QueryByIds, body: {AccountId: 42, CampaignIds: ["{entity:integer}"]}, item: /Campaigns}
  key: /Id
  value: /DailyBudget
values: {kind: decimal, decimals: 2}
write:
  one: {method: PUT, path: /Campaigns, body: {AccountId: 42, Campaigns: [{Id: "{entity:integer}", DailyBudget: "{value}"}]}}
  errors: [{at: /PartialErrors, not_empty: true, outcome: refused}]
""",
        "7", lambda v: {"Campaigns": [{"Id": 7, "DailyBudget": v}], "PartialErrors": []},
        lambda r: r.body["Campaigns"][0]["DailyBudget"], 1, 1.2, yes=(200, {"PartialErrors": []}, {}),
        no=(200, {"PartialErrors": [{"Index": 0, "Code": 1139, "Message": "not in the list"}]}, {}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("takes", [True, False])
def test_systems_are_connected_by_yaml_alone(tmp_path: Path, ledger: Ledger, name: str, takes: bool) -> None:
    """Each reads, writes, and says no in its own manner; what it says and what it holds both come out right."""
    one = SYSTEMS[name]
    held = [one.before]

    def script(request: Request) -> Reply:
        try:
            value = one.takes(request)
        except (KeyError, TypeError):
            return 200, one.shows(held[0]), {}
        assert (type(value), value) == (type(one.after), one.after)
        if not takes:
            return one.no
        held[0] = value
        return one.yes

    auth = "auth: {kind: bearer, token_env: T_TOKEN}"
    said = f"system: by-yaml\nbase_url: https://replaced.example\n{auth}\n{one.said}"
    with serving(Scripted(script)) as url:
        secrets = {"T_TOKEN": TOKEN, "T_USER": "u", "T_PASSWORD": "secret-pass-1", "T_DEVELOPER": "secret-dev-2"}
        report, told = pushed(ledger, by_yaml(tmp_path, said, url, **secrets), [one.entity])
    delivery = told[one.entity]
    assert held == [one.after if takes else one.before] and report.complete
    if takes:
        assert (delivery.state, delivery.observed, delivery.says) == ("ACKED", 120, None)
    else:
        assert delivery.state == "REJECTED" and "not in the list" in (delivery.says or "")
