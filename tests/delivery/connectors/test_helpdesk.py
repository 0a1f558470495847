"""The django-helpdesk connector: against django-helpdesk itself, and against servers that misbehave as proxies do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest
from pydantic import ValidationError

from delivery.connectors.base import Connector, Misconfigured, Reading, Unavailable, Write, Written
from delivery.connectors.helpdesk import HelpdeskConnector, HelpdeskSettings, connect
from delivery.sandbox.helpdesk import HelpdeskSandbox
from tests.support.helpdesks import TOKEN, Clock, connector, sandbox


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HelpdeskSandbox]:
    templates = tmp_path_factory.getbasetemp() / "helpdesk-templates"
    with sandbox(tmp_path_factory.mktemp("desk"), templates) as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def one(desk: HelpdeskSandbox, clock: Clock) -> Iterator[HelpdeskConnector]:
    desk.reset()
    opened = connector(desk.api_url, clock)
    yield opened
    opened.close()


def some_open(desk: HelpdeskSandbox, count: int = 1) -> list[str]:
    found = [name for name, ticket in desk.tickets().items() if ticket["status"] in (1, 2)]
    assert len(found) >= count
    return found[-count:]


def write(reading: Reading, value: int) -> Write:
    return Write(
        reading.key, reading.target, value, reading.value, reading.token, "key", "decision/1 é", "batch", "run"
    )  # fmt: skip


def other_than(*values: int | None) -> int:
    return next(v for v in (4, 3, 2, 1, 5) if v not in values)


def asked_of(one: HelpdeskConnector, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, str]]]:
    """Every request from here on: method, path, parameters."""
    seen: list[tuple[str, str, dict[str, str]]] = []
    send = one._http.request

    def request(method: str, path: str, *, params: Mapping[str, str] | None = None, **more: Any) -> Any:
        seen.append((method, path, dict(params or {})))
        return send(method, path, params=params, **more)

    monkeypatch.setattr(one._http, "request", request)
    return seen


def whole(desk: HelpdeskSandbox, name: str) -> dict[str, Any]:
    answer = httpx.get(f"{desk.api_url}/tickets/{int(name[1:])}/", headers={"Authorization": f"Token {TOKEN}"})
    found: dict[str, Any] = answer.json()
    return found


# Reading from django-helpdesk itself.


def test_every_ticket_is_read_as_it_stands(desk: HelpdeskSandbox, one: Connector) -> None:
    there = desk.tickets()
    assert {t["status"] for t in there.values()} >= {1, 3, 4}
    found = one.read(list(there))
    assert {k: (r.value, r.state) for k, r in found.items()} == {
        k: (t["priority"], "open" if t["status"] in (1, 2) else "closed") for k, t in there.items()
    }
    assert all(
        r.key == k and r.target == str(int(k[1:])) and r.says == "" for k, r in found.items() if r.state == "open"
    )


def test_many_are_read_by_pages_and_few_one_by_one_and_closed_tickets_are_not_loaded_for_them(
    desk: HelpdeskSandbox, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = some_open(desk, 30)
    pages = -(-len([t for t in desk.tickets().values() if t["status"] in (1, 2)]) // 10)
    one = connector(desk.api_url, clock, page=10)
    seen = asked_of(one, monkeypatch)
    assert len(one.read(names)) == 30 and len(seen) <= pages < 30
    assert {path for _, path, _ in seen} == {"tickets/"} and {p["status"] for _, _, p in seen} == {"1,2"}
    seen.clear()
    assert one.read(names[:2])[names[0]].state == "open"
    assert [path for _, path, _ in seen] == [f"tickets/{int(n[1:])}/" for n in names[:2]]
    assert {p["status"] for _, _, p in seen} == {"1,2"}
    assert one.read([]) == {}
    one.close()


def test_what_is_closed_merged_missing_or_written_otherwise_is_told_apart(
    desk: HelpdeskSandbox, one: Connector
) -> None:
    resolved, closed, duplicate, merged, reopened = names = some_open(desk, 5)
    for name, status in ((resolved, 3), (closed, 4), (duplicate, 5), (reopened, 2)):
        desk.person(name, status=status)
    headers = {"Authorization": f"Token {TOKEN}"}
    url = f"{desk.api_url}/tickets/{int(merged[1:])}/"
    httpx.patch(url, json={"merged_to": int(closed[1:])}, headers=headers).raise_for_status()
    odd = [
        "T9999999",
        f"T{int(reopened[1:])}",
        f"T0{reopened[1:]}",
        "INC0000001",
        "",
        "T00000001",
        "T٣٣٣٣٣٣٣",
        "T0000000",
        "T99999999999",
    ]
    try:
        found = one.read(names + odd)
    finally:
        httpx.patch(url, json={"merged_to": None}, headers=headers).raise_for_status()
        for name in names:
            desk.person(name, status=1)
    assert {k: r.state for k, r in found.items()} == {
        **dict.fromkeys((resolved, closed, duplicate, merged), "closed"), reopened: "open", **dict.fromkeys(odd, "missing"),
    }  # fmt: skip
    assert "resolved" in found[resolved].says and "duplicate" in found[duplicate].says
    assert str(int(closed[1:])) in found[merged].says
    assert found["T9999999"].value is None and "queues" in found["T9999999"].says
    assert "T{id:07d}" in found["INC0000001"].says


# Writing to django-helpdesk itself.


def test_a_write_changes_the_priority_and_nothing_else(desk: HelpdeskSandbox, one: Connector) -> None:
    name = some_open(desk)[0]
    before, reading = whole(desk, name), one.read([name])[name]
    value = other_than(reading.value)
    assert one.apply([write(reading, value)]) == [Written(name, "accepted")]
    assert whole(desk, name) == {**before, "priority": value}
    assert one.read([name])[name].value == value
    assert [(a["ticket"], a["value"]) for a in desk.applications()] == [(name, value)]


def test_a_ticket_closed_since_it_was_read_is_not_written_to(desk: HelpdeskSandbox, one: Connector) -> None:
    name = some_open(desk)[0]
    reading = one.read([name])[name]
    desk.person(name, status=4)
    try:
        (answer,) = one.apply([write(reading, other_than(reading.value))])
        # Also for one who has no token from a read
        (blind,) = one.apply([replace(write(reading, other_than(reading.value)), token=None)])
        assert answer.outcome == blind.outcome == "conflict" and "no longer of status 1" in answer.says
        assert desk.tickets()[name] == {"priority": reading.value, "status": 4}
        assert desk.applications() == []
    finally:
        desk.person(name, status=1)
    missing = replace(write(reading, 2), key="T9999999")
    odd = replace(write(reading, 2), key="ticket 1")
    assert [w.outcome for w in one.apply([missing, odd])] == ["conflict", "refused"]


def test_a_priority_that_there_is_not_is_refused_in_the_systems_own_words(
    desk: HelpdeskSandbox, one: Connector
) -> None:
    name = some_open(desk)[0]
    reading = one.read([name])[name]
    (answer,) = one.apply([write(reading, 9)])
    assert answer == Written(name, "refused", 'answers 400: priority: "9" is not a valid choice.')
    (checked,) = one.apply([write(reading, other_than(reading.value))], validate_only=True)
    assert checked.outcome == "not_applied"
    assert desk.tickets()[name]["priority"] == reading.value and not one.capabilities.validate_only


@pytest.mark.parametrize(
    ("fault", "seconds", "outcome", "applied"),
    [
        ("error_before", 0, "unknown", False),
        ("error_after", 0, "unknown", True),
        ("delay_after", 1.0, "unknown", True),
        ("too_many", 7, "not_applied", False),
    ],
)
def test_what_may_have_been_applied_is_never_called_otherwise(
    desk: HelpdeskSandbox, clock: Clock, fault: str, seconds: float, outcome: str, applied: bool
) -> None:
    desk.reset()
    one = connector(desk.api_url, clock, timeout_s=0.5)
    name = some_open(desk)[0]
    reading = one.read([name])[name]
    value = other_than(reading.value)
    desk.fault(fault, method="PATCH", seconds=seconds)
    (answer,) = one.apply([write(reading, value)])
    assert (answer.outcome, answer.retry_after) == (outcome, 7 if fault == "too_many" else None)
    assert desk.tickets()[name]["priority"] == (value if applied else reading.value)
    desk.fault(fault.replace("delay_after", "error_after"), method="GET", seconds=seconds)
    with pytest.raises(Unavailable) as refused:
        one.read([name])
    assert refused.value.retry_after == (7 if fault == "too_many" else None)
    assert one.read([name])[name].value == (value if applied else reading.value)
    one.close()


# People.


def test_a_change_on_the_pages_between_read_and_write_is_found(
    desk: HelpdeskSandbox, one: Connector, clock: Clock
) -> None:
    name, quiet = some_open(desk, 2)
    desk.person(name, priority=3)  # before the read: nobody was overwritten
    since = clock.now
    readings = one.read([name, quiet])
    desk.person(name, priority=1)
    sent = clock.now
    assert [w.outcome for w in one.apply([write(readings[n], 5) for n in (name, quiet)])] == ["accepted"] * 2
    change, ours = one.history([name], since)
    assert (change.key, change.value, change.ours) == (name, None, False) and change.actor.startswith("user ")
    assert since < change.at <= ours.at <= clock.now and (change.at - sent).total_seconds() <= 1
    assert (ours.value, ours.ours) == (5, True)
    assert [(c.value, c.ours) for c in one.history([quiet], since)] == [(5, True)]
    assert one.history([name], clock()) == []
    assert desk.tickets()[name]["priority"] == 5
    assert one.capabilities.change_history and "follow-up" in one.capabilities.guarantee


def test_it_is_also_found_when_the_answer_to_the_write_was_lost(
    desk: HelpdeskSandbox, one: Connector, clock: Clock
) -> None:
    name, untouched = some_open(desk, 2)
    since = clock.now
    readings = one.read([name, untouched])
    values = {n: other_than(r.value) for n, r in readings.items()}
    desk.person(name, priority=other_than(readings[name].value, values[name]))
    desk.fault("error_after", method="PATCH", ticket=name)
    desk.fault("error_before", method="PATCH", ticket=untouched)
    assert [w.outcome for w in one.apply([write(readings[n], values[n]) for n in values])] == ["unknown"] * 2
    assert one.history(list(values), since) == []
    again = one.read(list(values))
    assert (again[name].value, again[untouched].value) == (values[name], readings[untouched].value)
    assert [(c.key, c.value, c.ours) for c in one.history(list(values), since)] == [
        (name, None, False), (name, values[name], True),
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["pages", "api"])
@pytest.mark.parametrize("back", [False, True])
def test_a_change_after_our_write_is_somebody_elses(
    desk: HelpdeskSandbox, one: Connector, clock: Clock, how: str, back: bool
) -> None:
    name = some_open(desk)[0]
    reading = one.read([name])[name]
    ours = other_than(reading.value)
    one.apply([write(reading, ours)])
    since = clock()
    assert one.read([name])[name].value == ours and one.history([name], since) == []
    theirs = reading.value if back else other_than(reading.value, ours)
    desk.person(name, priority=theirs, how=how)
    for _ in range(2):
        assert one.read([name])[name].value == theirs
    assert [(c.value, c.ours) for c in one.history([name], since)] == [(theirs, False)]


def test_several_threads_read_and_write_at_once(desk: HelpdeskSandbox, one: Connector) -> None:
    names = some_open(desk, 8)
    went: list[tuple[int | None, int]] = []

    def work(name: str) -> None:
        for value in (2, 4):
            assert one.apply([write(one.read([name])[name], value)])[0].outcome == "accepted"
            went.append((one.read([name])[name].value, value))

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(went) == 16 and all(found == value for found, value in went)


# Wrong settings.


def test_a_refused_token_and_a_wrong_url_name_the_way_out(desk: HelpdeskSandbox, clock: Clock) -> None:
    wrong = connector(desk.api_url, clock, token="not-the-token-12345")
    with pytest.raises(Misconfigured, match="DESK_TOKEN") as refused:
        wrong.read(["T0000001"])
    assert "not-the-token" not in str(refused.value) and "not-the-token" not in repr(wrong.__dict__)
    with pytest.raises(Misconfigured, match="DESK_TOKEN"):
        wrong.apply([Write("T0000001", "1", 2, 3, None, "k", "d", "b", "r")])
    for keys in (["T0000001"], [f"T000000{n}" for n in range(9)]):
        elsewhere = connector(desk.api_url.replace("/api", "/apis"), clock)
        with pytest.raises(Misconfigured, match="HELPDESK_ACTIVATE_API_ENDPOINT"):
            elsewhere.read(keys)
        elsewhere.close()
    wrong.close()
    with pytest.raises(Misconfigured, match="DESK_TOKEN: is not set"):
        connect(
            HelpdeskSettings.model_validate({"kind": "helpdesk", "url": desk.api_url, "token_env": "DESK_TOKEN"}),
            environ={"DESK_TOKEN": " "}, folder=Path(), clock=clock,
        )  # fmt: skip
    with pytest.raises(Misconfigured, match="https"):
        connector("http://desk.example.org/helpdesk/api", clock)
    for key in ("T", "{id}{id}", "{id:d7}", "{number}", "{id}}"):
        with pytest.raises(ValidationError, match="exactly once"):
            connector(desk.api_url, clock, key=key)


def test_keys_may_be_written_in_several_ways(desk: HelpdeskSandbox, clock: Clock) -> None:
    number = int(some_open(desk)[0][1:])
    for pattern, key in (
        ("{id}", f"{number}"),
        ("INC-{id:09d}/x", f"INC-{number:09d}/x"),
        ("{id:03d}", f"{number:03d}"),
    ):
        one = connector(desk.api_url, clock, key=pattern)
        assert one.read([key])[key].state == "open"
        one.close()


# Servers that answer otherwise. A route says status, headers and body.

Said = tuple[int, dict[str, str], Any]


@contextmanager
def serving(route: Callable[[str, str, dict[str, str], Any], Said]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", 1 << 16

        def answer(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, headers, said = route(
                self.command, parts.path, dict(parse_qsl(parts.query)), json.loads(body) if body else dict(self.headers)
            )
            out = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", "content-length": str(len(out)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(out)

        do_GET = do_PATCH = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


NOT_FOUND = (404, {}, {"detail": "No Ticket matches the given query."})


def ticket(number: int, **more: Any) -> dict[str, Any]:
    return {"id": number, "status": 1, "priority": 3, "merged_to": None, "followup_set": [], **more}


def pages_of(rows: list[dict[str, Any]], params: Mapping[str, str]) -> Said:
    page, size = int(params["page"]), min(int(params["page_size"]), 4)
    part = rows[(page - 1) * size : page * size]
    if page > 1 and not part:
        return 404, {}, {"detail": "Invalid page."}
    return 200, {}, {"count": len(rows), "next": "http://elsewhere.invalid/" if page * size < len(rows) else None,
                     "results": part}  # fmt: skip


KEYS = [f"T{n:07d}" for n in range(1, 13)]


def test_a_filter_that_is_ignored_and_pages_that_shift_lose_no_ticket(clock: Clock) -> None:
    """After the first page three tickets go, so that all others move up and three stand on no page that is read."""
    rows = [ticket(n, status=4 if n == 9 else 1, priority=n % 5 + 1) for n in range(1, 13)]
    singly: list[str] = []

    def route(method: str, path: str, params: dict[str, str], _: Any) -> Said:
        if path == "/api/tickets/":
            return pages_of(rows if params["page"] == "1" else rows[3:], params)
        singly.append(path)
        return 200, {}, rows[int(path.split("/")[-2]) - 1]

    with serving(route) as url:
        one = connector(url, clock)
        found = one.read(KEYS)
        one.close()
    assert {k: r.value for k, r in found.items()} == {k: n % 5 + 1 for n, k in enumerate(KEYS, 1)}
    assert found["T0000009"].state == "closed" and singly == [f"/api/tickets/{n}/" for n in (5, 6, 7)]


def test_a_list_without_end_or_with_a_wrong_count_is_left(clock: Clock) -> None:
    for count in (12, 10**12, -1, None, "many"):
        asked = []

        def route(
            method: str, path: str, params: dict[str, str], _: Any, count: Any = count, asked: Any = asked
        ) -> Said:
            asked.append(path)
            if path == "/api/tickets/":
                return 200, {}, {"count": count, "next": "/again", "results": [ticket(99), ticket(98)]}
            return NOT_FOUND if path == "/api/tickets/12/" else (200, {}, ticket(int(path.split("/")[-2])))

        with serving(route) as url:
            one = connector(url, clock)
            found = one.read(KEYS)
            one.close()
        assert [r.state for r in found.values()] == ["open"] * 11 + ["missing"] and len(asked) < 60


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ((200, {"content-type": "text/html"}, b"<html>please log in</html>"), Unavailable, "not JSON"),
        ((200, {}, []), Misconfigured, "root"),
        ((200, {}, ticket(2)), Misconfigured, "another ticket"),
        ((200, {}, {"id": 1, "title": "x"}), Misconfigured, "without status"),
        ((403, {}, {"detail": "no"}), Misconfigured, "staff"),
        ((302, {"location": "https://elsewhere.example/?t=" + TOKEN}, b""), Misconfigured, "elsewhere.example"),
        ((404, {"content-type": "text/html"}, b"<html>not found</html>"), Misconfigured, "API's root"),
        ((503, {"retry-after": "30"}, {"detail": "later, " + TOKEN}), Unavailable, "later"),
        ((418, {}, {}), Misconfigured, "418"),
    ],
)
def test_an_answer_that_is_not_a_ticket_is_no_reading(
    clock: Clock, said: Said, error: type[Exception], words: str
) -> None:
    with serving(lambda *_: said) as url:
        one = connector(url, clock)
        with pytest.raises(error, match=words) as raised:
            one.read(["T0000001"])
        one.close()
    assert TOKEN not in str(raised.value)
    assert getattr(raised.value, "retry_after", None) == (30 if said[0] == 503 else None)


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ((200, {}, ticket(1, priority=2)), "accepted"),
        ((200, {}, ticket(1, priority=5)), "accepted"),  # the read-back will tell
        ((200, {}, ticket(7, priority=2)), "unknown"),
        ((200, {}, b"<html>please log in</html>"), "unknown"),
        ((204, {}, b""), "unknown"),
        ((404, {}, b"<html>not found</html>"), "refused"),
        ((409, {}, {"detail": TOKEN}), "conflict"),
        ((422, {}, {"priority": [TOKEN]}), "refused"),
        ((502, {}, b"bad gateway"), "unknown"),
    ],
)
def test_an_answer_to_a_write_is_taken_for_no_more_than_it_says(clock: Clock, said: Said, outcome: str) -> None:
    with serving(lambda *_: said) as url:
        one = connector(url, clock)
        (answer,) = one.apply([Write("T0000001", "1", 2, 3, "1.0", "k", "d", "b", "r")])
        one.close()
    assert answer.outcome == outcome and TOKEN not in answer.says
    assert (answer.says == "") == (said == (200, {}, ticket(1, priority=2)))


def test_a_server_that_is_not_there_took_nothing(clock: Clock) -> None:
    with serving(lambda *_: NOT_FOUND) as url:
        pass
    one = connector(url, clock)
    (answer,) = one.apply([Write("T0000001", "1", 2, 3, "1.0", "k", "d", "b", "r")])
    assert answer.outcome == "not_applied"
    with pytest.raises(Unavailable):
        one.read(["T0000001"])
    one.close()


def test_a_write_carries_the_run_the_batch_the_decision_and_only_the_priority(clock: Clock) -> None:
    """The condition on the status stands in the URL; django-helpdesk gives no place for the rest but headers."""
    seen: list[tuple[str, dict[str, str], Any]] = []

    class Raw(BaseHTTPRequestHandler):
        def do_PATCH(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, dict(self.headers), json.loads(body)))
            out = json.dumps(ticket(1, priority=2)).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Raw) as server:
        threading.Thread(target=server.handle_request).start()
        one = connector(f"http://127.0.0.1:{server.server_port}/api", clock)
        one.apply([Write("T0000001", "1", 2, 3, "2.17", "k", "decision é", "batch", "run")])
        one.close()
    ((path, headers, body),) = seen
    assert path == "/api/tickets/1/?status=2" and body == {"priority": 2}
    found = {k.lower(): v for k, v in headers.items() if k.lower().startswith("x-signalbox")}
    assert found == {
        "x-signalbox-run": "run",
        "x-signalbox-batch": "batch",
        "x-signalbox-decision": "decision%20%C3%A9",
    }
