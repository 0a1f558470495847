"""The declarative REST connector: what its YAML may say, and servers that do not do what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from common.yaml_config import models_of
from delivery.connectors.base import Misconfigured, Unavailable, Write
from delivery.connectors.rest import RestConnector, RestSettings, connect, load
from delivery.connectors.rest_spec import RestSystem, Test, Values
from delivery.connectors.template import ABSENT, at, fill, fill_path, placeholders
from tests.support.properties import examples
from tests.support.rest_servers import Reply, Request, Scripted, serving, talking

NOW = datetime(2026, 3, 1, 12)
TOKEN = "t0ken/+secret=="
BASE: dict[str, Any] = {
    "system": "test-1",
    "base_url": "https://api.example/v1",
    "auth": {"kind": "bearer", "token_env": "T_TOKEN"},
    "timeout_s": 2,
    "read": {"one": {"path": "/t/{entity}"}, "key": "id", "value": "/v"},
    "values": {"kind": "integer"},
    "write": {"one": {"method": "PUT", "path": "/t/{entity}", "body": {"v": "{value}"}}},
}
LISTED = {"path": "/t", "query": {"ids": "{entities}"}, "at_most": 50, "items": "/items"}
MANY = {
    "method": "POST",
    "path": "/bulk",
    "body": {"rows": "{rows}"},
    "row": {"id": "{entity}", "v": "{value}"},
    "at_most": 50,
}


def changed(**paths: Any) -> dict[str, Any]:
    """BASE with values set at dotted paths (written with __); None removes."""
    said = copy.deepcopy(BASE)
    for path, value in paths.items():
        *way, last = path.split("__")
        place = said
        for step in way:
            place = place.setdefault(step, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return said


def written_to(folder: Path, said: Any) -> Path:
    file = folder / "system.yaml"
    file.write_text(said if isinstance(said, str) else yaml.safe_dump(said))
    return file


@contextmanager
def against(folder: Path, script: Callable[[Request], Reply], **paths: Any) -> Iterator[tuple[Scripted, RestConnector]]:
    written_to(folder, changed(**paths))
    api = Scripted(script)
    with serving(api) as url:
        which = RestSettings(kind="rest", file="system.yaml", base_url=url)
        connector = connect(which, environ={"T_TOKEN": TOKEN}, folder=folder, clock=lambda: NOW)
        yield api, connector
        connector.close()


def a_write(key: str = "1", value: int = 5, token: str | None = None, target: str | None = None) -> Write:
    return Write(key, target or key, value, 3, token, f"key-{key}", f"decision-{key}", "batch-9", "run-8")


def always(status: int, body: Any = None, **headers: str) -> Callable[[Request], Reply]:
    return lambda request: (status, body, {k.replace("_", "-"): v for k, v in headers.items()})


# --------------------------------------------------------------------------- the YAML


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ({"reed": 1}, "reed: unknown key; did you mean 'read'? (allowed here: allow_plain_http, auth, base_url"),
        (
            {"read__one__pth": "/x"},
            "read.one.pth: unknown key; did you mean 'path'? (allowed here: body, headers, item, method, path, query)",
        ),
        ({"read__value": None}, "read.value: is required (allowed here: closed, errors,"),
        (
            {"auth__token": "abc"},
            "auth.bearer.token: unknown key; did you mean 'token_env'? (allowed here: kind, token_env)",
        ),
        (
            {"auth__kind": "kerberos"},
            "auth: Input tag 'kerberos' found using 'kind' does not match any of the expected tags: 'bearer', 'basic'",
        ),
        ({"auth__token_env": "not a name!"}, "auth.bearer.token_env"),
        ({"system": "Has Space"}, "system: String should match pattern"),
        (
            {"base_url": "http://api.example"},
            "would show the token to the network; use https, or say `allow_plain_http: true`",
        ),
        (
            {"base_url": "https://me:hunter2@api.example"},
            "holds a user or password; name environment variables instead",
        ),
        ({"read__one__path": "/t"}, "read.one: must hold {entity}, or every entity would read the same"),
        ({"read__one__path": "/t/{id}"}, "read.one: unknown placeholder {id} (allowed here: {entity})"),
        ({"read__one__path": "https://evil.example/{entity}"}, "must begin with one / and hold no"),
        ({"read__one__path": "//evil.example/{entity}"}, "must begin with one /"),
        ({"read__one__path": "/a/../{entity}"}, "climbs"),
        ({"read__one__path": "/t/{entity}?x=1"}, "(see `query`)"),
        ({"read__value": "v[0]"}, "must be a JSON pointer such as /ticket/priority, or names with dots"),
        ({"read__closed": [{"at": "/s"}]}, "asks exactly one of present, not_empty, one_of"),
        ({"read__closed": [{"at": "/s", "matches": "("}]}, "matches is no regular expression"),
        ({"read__many": LISTED, "read__key": None}, "`many` needs `key`"),
        ({"read__many": {**LISTED, "query": {}}}, "must hold {entities} or {rows}, or everything would be listed"),
        ({"read__many": {**LISTED, "pages": {"kind": "pages"}}}, "read.many.pages: Input tag 'pages'"),
        ({"read__token": {"header": "ETag"}}, "{token} and read.token belong together"),
        ({"write__one__headers": {"If-Match": "{token}"}}, "{token} and read.token belong together"),
        ({"read__token": {"header": "Last-Modified"}}, "Last-Modified is a time in whole seconds; say `exact: false`"),
        ({"write__one__body": {"v": 5}}, "write.one: must hold {value} and {entity} or {target}"),
        ({"write__one__body": {"v": "{value}", "x": "{"}}, "a brace that is no placeholder is written {{ or }}"),
        ({"write__one__headers": {"X\r\nY": "1"}}, "is no name of a header"),
        ({"write__remembers_key": True}, "write.remembers_key needs {idempotency_key} to be sent"),
        ({"write__many": {**MANY, "body": {}}}, "write.many: body must hold {rows}"),
        ({"write__many": {**MANY, "row": {"v": "{value}"}}}, "write.many: must hold {value} and {entity} or {target}"),
        ({"write__statuses": {409: "clash"}}, "write.statuses.409: Input should be 'accepted', 'conflict'"),
        ({"values": {"kind": "names"}}, "`names` stand with kind: names, and only there"),
        (
            {"values": {"kind": "names", "names": {"a": 1, "b": 1}}},
            "two names stand for one number; which one would be written?",
        ),
        ({"values": {"kind": "names", "names": {"a": 1}, "null_is": 1}}, "two names stand for one number"),
        ({"values": {"kind": "names", "names": {"a": True}}}, "values.names.a: Input should be a valid integer"),
        ({"values": {"kind": "names", "names": {True: 1}}}, "put it in quotes"),
        (
            {"history": {"path": "/h", "items": "", "value": "/v", "time": "/t", "actor": "/a"}},
            "history.own_actor: is required",
        ),
        (
            {"headers": {"X-Api-Key": "hunter2"}},
            "headers: X-Api-Key holds a secret, which never stands in a file; use `auth`",
        ),
        ({"entity": "("}, "entity is no regular expression"),
    ],
)
def test_a_wrong_yaml_is_refused_with_file_path_and_what_is_allowed(
    tmp_path: Path, paths: dict[str, Any], says: str
) -> None:
    file = written_to(tmp_path, changed(**paths))
    with pytest.raises(Misconfigured) as caught:
        load(file)
    assert says in str(caught.value) and str(file) in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("a: 1\na: 2", "key 'a' stands twice"), ("- a", "must hold keys and values, found list"), ("a: [", "is not YAML")],
)
def test_what_is_no_yaml_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(Misconfigured, match=says):
        load(written_to(tmp_path, text))


def test_the_file_stays_in_its_folder_and_is_there(tmp_path: Path) -> None:
    written_to(tmp_path, BASE)
    (tmp_path / "in").mkdir()
    for file, says in (("../system.yaml", "outside the workflow's folder"), ("none.yaml", "cannot be read")):
        with pytest.raises(Misconfigured, match=says):
            connect(RestSettings(kind="rest", file=file), environ={}, folder=tmp_path / "in", clock=lambda: NOW)
    for token, says in (("", "T_TOKEN is not set"), ("a\nb", "T_TOKEN holds a character")):
        with pytest.raises(Misconfigured, match=says) as caught:
            connect(
                RestSettings(kind="rest", file="system.yaml"),
                environ={"T_TOKEN": token},
                folder=tmp_path,
                clock=lambda: NOW,
            )
        assert not token or token not in str(caught.value)


def test_capabilities_are_what_the_yaml_promises(tmp_path: Path) -> None:
    def of(**paths: Any) -> Any:
        spec = load(written_to(tmp_path, changed(**paths)))
        return RestConnector(spec, environ={"T_TOKEN": "x"}, clock=lambda: NOW).capabilities

    plain = of(stale_reads_s=4)
    assert (plain.conditional_write, plain.idempotency_key, plain.bulk_read, plain.bulk_write) == (False, False, 1, 1)
    assert plain.stale_reads_s == 4 and "not seen by the system" in plain.guarantee
    etag = of(read__token={"header": "ETag"}, write__one__headers={"If-Match": "{token}"})
    assert etag.guarantee == "each decision is applied exactly once (conditional writes)"
    seconds = of(
        read__token={"at": "updated_at", "exact": False}, write__one__headers={"If-Unmodified-Since": "{token}"}
    )
    assert not seconds.conditional_write
    key = of(write__remembers_key=True, write__one__headers={"Idempotency-Key": "{idempotency_key}"})
    assert key.guarantee == "each decision is applied exactly once (the idempotency key)"
    bulk = of(read__many=LISTED, write__many=MANY)
    assert (bulk.bulk_read, bulk.bulk_write) == (50, 50)


# --------------------------------------------------------------------------- small parts


def test_pointers_find_what_stands_there() -> None:
    document = {"a": [{"b/c": 1, "~": 2}], "": 3, "n": None}
    assert [at(document, p) for p in ("/a/0/b~1c", "/a/0/~0", "/", "", "/n")] == [1, 2, 3, document, None]
    assert all(at(document, p) is ABSENT for p in ("/a/1", "/a/-1", "/a/00", "/a/b", "/n/x", "/a/0/b~1c/0"))


def test_placeholders_keep_their_type_where_they_stand_alone() -> None:
    values = {"value": 5, "entity": "7", "rows": [1]}
    template = {
        "v": "{value}",
        "t": "{value:text}",
        "id": "{entity:integer}",
        "r": "{rows}",
        "s": "{{{value}}} of {entity}",
        "c": [True, 1.5],
    }
    assert fill(template, values) == {"v": 5, "t": "5", "id": 7, "r": [1], "s": "{5} of 7", "c": [True, 1.5]}
    assert placeholders(template) == {"value", "entity", "rows"}
    with pytest.raises(ValueError, match="no whole number"):
        fill("{entity:integer}", {"entity": "7a"})


@given(st.text())
def test_no_id_adds_a_part_to_a_path_or_climbs(text: str) -> None:
    try:
        path = fill_path("/t/{entity}/x", {"entity": text})
    except ValueError:
        return
    assert path.count("/") == 3 and path.isascii() and not any(c in path for c in "?#\\ \r\n")


@pytest.mark.parametrize(
    "text", ["", ".", "..", "%2e%2e", "../a", "a/../b", "..%2fa", "%252e%252e", "a\\..", "a//b", "a\nb"]
)
def test_an_id_that_climbs_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a path"):
        fill_path("/t/{entity}", {"entity": text})


@pytest.mark.parametrize(
    ("found", "number"),
    [
        (3, 3), ("3", 3), (3.0, 3), ("-3", -3), (0, 0), (2**63 - 1, 2**63 - 1), ("9223372036854775807", 2**63 - 1), (-(2**63), -(2**63)),
        (2**63, None), ("9223372036854775808", None), (1e300, None), (2.0**60, None), (3.5, None), (True, None), (False, None),
        (None, None), ("", None), ("03", None), (" 3", None), ("3.0", 3), ("3,0", None), ("3e0", None), ("٣", None),
        ("3 - Moderate", None), ([3], None), ({}, None),
        (ABSENT, None),
    ],
)  # fmt: skip
def test_only_a_whole_number_of_64_bits_is_a_value(found: Any, number: int | None) -> None:
    value, says = Values(kind="integer").read(found)
    assert value == number and type(value) is type(number) and (value is None) == bool(says)


def test_values_are_written_as_the_system_has_them() -> None:
    names = Values(kind="names", names={"low": 4, "high": 2}, null_is=5)
    assert [names.write(v) for v in (4, 2, 5)] == ["low", "high", None]
    assert [names.read(v)[0] for v in ("low", "high", None, "Low", "4", 4, ["low"])] == [
        4,
        2,
        5,
        None,
        None,
        None,
        None,
    ]
    assert (Values(kind="text").write(5), Values(kind="integer").write(5)) == ("5", 5)
    for values, value in ((names, 3), (Values(kind="integer", min=1), 0), (Values(kind="integer"), 2**63)):
        with pytest.raises(ValueError):
            values.write(value)


def test_questions_to_a_document_do_not_mix_up_true_and_one() -> None:
    def ask(document: Any, **question: Any) -> bool:
        return Test(at="/x", **question).holds(document)

    assert ask({"x": 1}, one_of=[1]) and not ask({"x": True}, one_of=[1]) and not ask({"x": 1}, one_of=[True])
    assert ask({}, none_of=[1]) and ask({"x": None}, one_of=[None]) and not ask({}, one_of=[None])
    assert ask({"x": None}, present=True) and ask({}, present=False)
    assert [ask({"x": v}, not_empty=True) for v in (0, "", [], None, False, {}, "a", [0], 1)] == [False] * 6 + [
        True
    ] * 3
    assert ask({"x": ["ok", "Permission Denied"]}, matches="(?i)denied") and not ask({"x": 5}, matches="5")


# --------------------------------------------------------------------------- reading


def items(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"items": list(rows), **more}


def test_ids_out_of_the_data_stay_one_part_of_the_path(tmp_path: Path) -> None:
    paths: list[str] = []

    def script(request: Request) -> Reply:
        paths.append(request.path)
        return 404, None, {}

    # Everything is let through by the pattern: what then keeps an id in its place is the quoting
    with against(tmp_path, script, entity="(?s).*") as (_, connector):

        @settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
        @given(st.text(alphabet="./\\%2eEfF?#&=: \r\n\0aé\u202e,{}", max_size=8))
        def tries(key: str) -> None:
            assert connector.read([key])[key].state == "missing"

        tries()
    assert paths and all(p.startswith("/t/") and "/" not in p[3:] and p[3:] not in (".", "..") for p in paths)


def test_an_id_of_another_shape_is_never_sent(tmp_path: Path) -> None:
    with against(tmp_path, always(200, {"id": "x", "v": 1}), entity="[0-9]+", read__many=LISTED) as (api, connector):
        odd = ["1,2", "1^ORactive=true", "1 OR 1=1", "", "x" * 500, "1\n"]
        found = connector.read(odd)
        assert {r.state for r in found.values()} == {"missing"} and set(found) == set(odd)
        assert [w.outcome for w in connector.apply([a_write(k) for k in odd])] == ["refused"] * len(odd)
        assert not api.requests


def test_an_answer_about_another_entity_is_not_believed(tmp_path: Path) -> None:
    with (
        against(tmp_path, always(200, {"id": "2", "v": 1})) as (_, connector),
        pytest.raises(Unavailable, match="told of another"),
    ):
        connector.read(["1"])
    two = always(200, [{"id": "1", "v": 1}, {"id": "1", "v": 2}])
    with against(tmp_path, two) as (_, connector), pytest.raises(Unavailable, match="2 items for one entity"):
        connector.read(["1"])
    with against(tmp_path, always(200, [])) as (_, connector):
        assert connector.read(["1"])["1"].state == "missing"


@pytest.mark.parametrize("body", [5, None, "x", [5], {"error": "try later", "id": "1", "v": 3}])
def test_an_answer_of_another_shape_is_asked_for_again(tmp_path: Path, body: Any) -> None:
    errors = [{"at": "/error", "present": True}]
    with against(tmp_path, always(200, body), read__errors=errors) as (_, connector), pytest.raises(Unavailable):
        connector.read(["1"])


@pytest.mark.parametrize(
    "payload", [b'{"id": "1", "v": 3, "v": 9}', b'{"id": "1", "v": NaN}', b"<html>", b"", b'{"id": "1", "v": 3']
)
def test_a_body_that_is_not_clean_json_is_never_a_value(tmp_path: Path, payload: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
    with talking(lambda c: c.sendall(head + payload)) as url:
        spec = load(written_to(tmp_path, changed()), url)
        connector = RestConnector(spec, environ={"T_TOKEN": TOKEN}, clock=lambda: NOW)
        with pytest.raises(Unavailable):
            connector.read(["1"])
        [written] = connector.apply([a_write()])
        assert written.outcome == ("accepted" if not payload else "unknown")


@pytest.mark.parametrize(
    ("status", "error", "retry"),
    [(500, Unavailable, None), (503, Unavailable, 7), (429, Unavailable, 7), (401, Misconfigured, None), (403, Misconfigured, None),
     (400, Misconfigured, None), (302, Misconfigured, None), (418, Unavailable, None)],
)  # fmt: skip
def test_what_a_status_means_for_a_read(
    tmp_path: Path, status: int, error: type[Exception], retry: float | None
) -> None:
    headers = {"Retry_After": "7"} if retry else {}
    script = always(status, {"message": f"no {TOKEN}"}, Location="https://evil.example/", **headers)
    with against(tmp_path, script, read__statuses={418: "unavailable", 451: "missing"}) as (_, connector):
        with pytest.raises(error) as caught:
            connector.read(["1"])
        assert TOKEN not in str(caught.value) and str(status) in str(caught.value)
        assert getattr(caught.value, "retry_after", None) == retry
    with against(tmp_path, always(451), read__statuses={451: "missing"}) as (_, connector):
        assert connector.read(["1"])["1"].state == "missing"


PAGES: dict[str, tuple[dict[str, Any], Callable[[Request, list[Any]], Reply]]] = {
    "page": (
        {"kind": "page", "size_param": "per", "size": 3, "last": "/last"},
        lambda r, rows: (200, items(*rows[2 * int(r.query["page"][0]) - 2 :][:2], last=(len(rows) + 1) // 2), {}),
    ),
    "offset": (
        {"kind": "offset", "size": 3},
        lambda r, rows: (200, items(*rows[int(r.query["offset"][0]) :][:2]), {}),
    ),
    "cursor": (
        {"kind": "cursor", "param": "after", "next": "/next"},
        lambda r, rows: (200, items(*rows[(i := int(r.query.get("after", ["0"])[0])) :][:2], next=str(i + 2) if i + 2 < len(rows) else None), {}),
    ),
    "next_url": (
        {"kind": "next_url", "next": "/next"},
        lambda r, rows: (200, items(*rows[(i := int(r.query.get("i", ["0"])[0])) :][:2], next=f"?i={i + 2}" if i + 2 < len(rows) else ""), {}),
    ),
    "link": (
        {"kind": "link"},
        lambda r, rows: (200, items(*rows[(i := int(r.query.get("i", ["0"])[0])) :][:2]), {
            "Link": f'<http://{r.headers["host"]}/t?i=0>; rel="first"' + (f', </t?i={i + 2}>; title="a, b"; rel="last next"' if i + 2 < len(rows) else "")
        }),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAGES)
def test_pages_that_are_smaller_than_asked_for_are_followed_to_the_end(tmp_path: Path, kind: str) -> None:
    pages, answer = PAGES[kind]
    rows = [{"id": n, "v": n * 10} for n in range(1, 8)]
    with against(tmp_path, lambda r: answer(r, rows), read__one=None, read__many={**LISTED, "pages": pages}) as (
        api,
        connector,
    ):
        found = connector.read([str(n) for n in range(1, 8)])
        assert {k: r.value for k, r in found.items()} == {str(n): n * 10 for n in range(1, 8)}
        assert len(api.requests) == 4
        assert connector.read(["1", "99"])["99"].state == "missing"


def test_pages_that_shift_under_reading_lose_nobody(tmp_path: Path) -> None:
    rows = [{"id": str(n), "v": n} for n in range(6)]

    def script(request: Request) -> Reply:
        if request.path != "/t":
            return 200, next(r for r in rows if r["id"] == request.path[3:]), {}
        start = int(request.query["offset"][0])
        page = rows[start : start + 2]
        if start == 0:
            rows.insert(
                5, rows.pop(0)
            )  # the first sinks to the end, and the third moves up to where it is never listed
        return 200, items(*page), {}

    many = {**LISTED, "pages": {"kind": "offset"}}
    for one in ({"path": "/t/{entity}"}, None):
        rows.sort(key=lambda r: r["id"])
        with against(tmp_path, script, read__one=one, read__many=many) as (_, connector):
            assert {k: r.state for k, r in connector.read([str(n) for n in range(6)]).items()} == {
                str(n): "open" for n in range(6)
            }


def test_a_filter_that_is_ignored_costs_pages_but_no_entity(tmp_path: Path) -> None:
    def script(request: Request) -> Reply:
        if request.path == "/t":
            start = int(request.query["offset"][0])
            return 200, items(*({"id": str(n), "v": n} for n in range(start, start + 2))), {}
        return 200, {"id": request.path[3:], "v": 7}, {}

    many = {**LISTED, "pages": {"kind": "offset", "at_most": 3}}
    with against(tmp_path, script, read__many=many) as (api, connector):
        assert {k: r.value for k, r in connector.read(["1", "900"]).items()} == {"1": 1, "900": 7}
        assert len(api.requests) == 4
    with (
        against(tmp_path, script, read__many=many, read__one=None) as (_, connector),
        pytest.raises(Unavailable, match="more than 3 pages"),
    ):
        connector.read(["1", "900"])


def test_a_next_page_elsewhere_never_gets_the_token(tmp_path: Path) -> None:
    thief = Scripted(always(200, items()))
    with serving(thief) as elsewhere:
        for url in (f"{elsewhere}/t", "//" + elsewhere[7:] + "/t"):
            script = always(200, items({"id": "1", "v": 1}, next=url))
            many = {**LISTED, "pages": {"kind": "next_url", "next": "/next"}}
            with (
                against(tmp_path, script, read__many=many) as (_, connector),
                pytest.raises(Misconfigured, match="leads away"),
            ):
                connector.read(["1", "2"])
    assert not thief.requests


def test_pages_that_go_round_end(tmp_path: Path) -> None:
    many = {**LISTED, "pages": {"kind": "next_url", "next": "/next"}}
    with against(tmp_path, always(200, items(next="/t?again")), read__many=many) as (api, connector):
        with pytest.raises(Unavailable, match="circle"):
            connector.read(["1", "2"])
        assert len(api.requests) <= 3


def test_one_that_a_listing_shows_twice_and_differently_is_asked_for_by_itself(tmp_path: Path) -> None:
    def script(request: Request) -> Reply:
        twice = items({"id": "1", "v": 5}, {"id": "2", "v": 6}, {"id": "1", "v": 9})
        return 200, twice if request.path == "/t" else {"id": request.path[3:], "v": 7}, {}

    with against(tmp_path, script, read__many=LISTED) as (_, connector):
        assert {k: r.value for k, r in connector.read(["1", "2"]).items()} == {"1": 7, "2": 6}


def test_one_id_that_spoils_a_listing_does_not_spoil_the_others(tmp_path: Path) -> None:
    def script(request: Request) -> Reply:
        if request.path == "/t":
            return 400, {"message": "no such id"}, {}
        return (404, None, {}) if request.path == "/t/2" else (200, {"id": request.path[3:], "v": 7}, {})

    with against(tmp_path, script, read__many=LISTED) as (_, connector):
        assert {k: r.state for k, r in connector.read(["1", "2", "3"]).items()} == {
            "1": "open",
            "2": "missing",
            "3": "open",
        }


def test_an_id_that_cannot_stand_in_a_list_is_asked_for_by_itself(tmp_path: Path) -> None:
    def script(request: Request) -> Reply:
        rows = [{"id": i, "v": 7} for i in request.query.get("ids", [""])[0].split(",")]
        return 200, items(*rows) if request.path == "/t" else {"id": "a,b", "v": 8}, {}

    for one, state in (({"path": "/t/{entity}"}, "open"), (None, "missing")):
        with against(tmp_path, script, entity=".*", read__many=LISTED, read__one=one) as (_, connector):
            found = connector.read(["1", "a,b", "b"])
            assert {k: r.state for k, r in found.items()} == {"1": "open", "a,b": state, "b": "open"}
    typed = {
        "method": "POST",
        "path": "/t",
        "body": {"ids": "{rows}"},
        "row": "{entity:integer}",
        "at_most": 9,
        "items": "/items",
    }
    with against(
        tmp_path, lambda r: (200, items({"id": 1, "v": r.body["ids"][0]}), {}), read__many=typed, read__one=None
    ) as (_, c):
        assert {k: r.value for k, r in c.read(["1", "x"]).items()} == {"1": 1, "x": None}


# --------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(200, "accepted"), (202, "accepted"), (204, "accepted"), (302, "refused"), (400, "refused"), (403, "refused"), (404, "refused"),
     (409, "conflict"), (412, "conflict"), (422, "conflict"), (429, "not_applied"), (500, "unknown"), (503, "not_applied"), (504, "unknown")],
)  # fmt: skip
def test_what_a_status_means_for_a_write(tmp_path: Path, status: int, outcome: str) -> None:
    script = always(status, None if status < 300 else {"error": {"message": f"because {TOKEN}"}}, Retry_After="9")
    with against(tmp_path, script, write__statuses={422: "conflict", 503: "not_applied"}) as (_, connector):
        [written] = connector.apply([a_write()])
        assert (written.key, written.outcome, written.retry_after) == ("1", outcome, 9)
        assert TOKEN not in written.says and (status < 300 or status == 302 or "because …" in written.says)


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ({"ok": True}, "accepted"), ({"ok": False}, "unknown"), ({"error": "no"}, "refused"), ({"errors": ["busy"]}, "not_applied"),
        (["Saved", "Permission denied"], "refused"), (["Saved"], "accepted"), ({"errors": []}, "accepted"), ({"code": "STALE"}, "conflict"),
    ],
)  # fmt: skip
def test_an_error_inside_a_200_is_found(tmp_path: Path, body: Any, outcome: str) -> None:
    rules = [
        {"at": "/error", "present": True, "outcome": "refused", "says": "/error"},
        {"at": "/errors", "not_empty": True, "outcome": "not_applied"},
        {"at": "/code", "one_of": ["STALE"], "outcome": "conflict"},
        {"at": "/ok", "one_of": [False]},
        {"at": "", "matches": "(?i)denied", "outcome": "refused"},
    ]
    with against(tmp_path, always(200, body), write__errors=rules) as (_, connector):
        assert connector.apply([a_write()])[0].outcome == outcome


def test_a_page_of_html_with_200_proves_nothing(tmp_path: Path) -> None:
    html = b"<html>Sign in</html>"
    with talking(lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(html), html))) as url:
        connector = RestConnector(
            load(written_to(tmp_path, changed()), url), environ={"T_TOKEN": "x"}, clock=lambda: NOW
        )
        assert connector.apply([a_write()])[0].outcome == "unknown"
    assert connector.apply([a_write()])[0].outcome == "not_applied", "nobody listens any more: nothing was sent"
    with talking(lambda c: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")) as url:
        connector = RestConnector(
            load(written_to(tmp_path, changed()), url), environ={"T_TOKEN": "x"}, clock=lambda: NOW
        )
        assert connector.apply([a_write()])[0].outcome == "unknown"


def test_what_a_call_can_carry_goes_with_it(tmp_path: Path) -> None:
    headers = {"Idempotency-Key": "{idempotency_key}", "X-Batch": "{batch_id}", "X-Why": "{run_id}/{decision_id}"}
    with against(tmp_path, always(204), write__one__headers=headers, headers={"X-App": "signalbox"}) as (
        api,
        connector,
    ):
        connector.apply([a_write("7", 4)])
        [request] = api.requests
        sent = [request.headers[n] for n in ("idempotency-key", "x-batch", "x-why", "x-app", "authorization")]
        assert sent == ["key-7", "batch-9", "run-8/decision-7", "signalbox", f"Bearer {TOKEN}"]
        assert (request.method, request.path, request.body) == ("PUT", "/t/7", {"v": 4})


def test_a_version_goes_back_as_it_came_and_none_is_no_write(tmp_path: Path) -> None:
    script = always(200, {"id": "1", "v": 3, "lock": 12}, ETag='W/"a,b"')
    etag = {"read__token": {"header": "ETag"}, "write__one__headers": {"If-Match": "{token}"}}
    with against(tmp_path, script, **etag) as (api, connector):
        token = connector.read(["1"])["1"].token
        [written] = connector.apply([a_write(token=token)])
        assert token == 'W/"a,b"' == api.requests[-1].headers["if-match"] and written.token == token
        for bad in (None, "", 'x"\r\nX-Evil: 1', "x\ny"):
            [written] = connector.apply([a_write(token=bad)])
            assert written.outcome == "refused"
        assert len(api.requests) == 2
    lock = {
        "read__token": {"at": "lock"},
        "write__one__body": {"v": "{value}", "lock": "{token:integer}"},
        "write__one__item": "",
    }
    with against(tmp_path, script, **lock) as (api, connector):
        [written] = connector.apply([a_write(token=connector.read(["1"])["1"].token)])
        assert api.requests[-1].body == {"v": 5, "lock": 12} and written.token == "12"
    since = {
        "read__token": {"header": "Last-Modified", "exact": False},
        "write__one__headers": {"If-Unmodified-Since": "{token}"},
    }
    with against(
        tmp_path, always(200, {"id": "1", "v": 3}, Last_Modified="Sun, 01 Mar 2026 11:00:00 GMT"), **since
    ) as (api, connector):
        [written] = connector.apply([a_write(token=connector.read(["1"])["1"].token)])
        assert (
            api.requests[-1].headers["if-unmodified-since"] == "Sun, 01 Mar 2026 11:00:00 GMT" and written.token is None
        )


def test_a_refused_token_never_hides_what_was_written_before(tmp_path: Path) -> None:
    def script(request: Request) -> Reply:
        return (200, {}, {}) if len(api.requests) == 1 else (401, {"message": "expired"}, {})

    many = {**MANY, "at_most": 2}
    with against(tmp_path, script, write__many=many) as (api, connector):
        written = connector.apply([a_write(str(n)) for n in range(5)])
        assert [w.outcome for w in written] == ["accepted", "accepted", "not_applied", "not_applied", "not_applied"]
        with pytest.raises(Misconfigured, match="T_TOKEN"):
            connector.apply([a_write()])


# --------------------------------------------------------------------------- bulk


def bulk(answer: Callable[[list[Any]], Reply]) -> Callable[[Request], Reply]:
    return lambda request: answer(request.body["rows"]) if request.path == "/bulk" else (204, None, {})


KEYED = {
    **MANY,
    "results": {"rows": "/done", "key": "/id"},
    "failures": {"rows": "/failed", "key": "/ids", "says": "/why"},
}


def test_each_row_of_a_bulk_answer_counts_for_itself(tmp_path: Path) -> None:
    said = {"done": [{"id": 3}, {"id": "1"}, {"id": "unasked"}], "failed": [{"ids": ["2", 5], "why": f"no {TOKEN}"}]}
    with against(tmp_path, bulk(lambda rows: (207, said, {})), write__many=KEYED) as (_, connector):
        written = connector.apply([a_write(str(n)) for n in range(1, 6)])
        assert [w.outcome for w in written] == ["accepted", "refused", "accepted", "unknown", "refused"]
        assert written[1].says == "no …" and "nothing of this row" in written[3].says


def test_a_row_that_stands_among_the_failed_did_not_succeed(tmp_path: Path) -> None:
    said = {"done": [{"id": "1"}, {"id": "2"}], "failed": [{"ids": "2"}]}
    with against(tmp_path, bulk(lambda rows: (200, said, {})), write__many=KEYED) as (_, connector):
        assert [w.outcome for w in connector.apply([a_write("1"), a_write("2")])] == ["accepted", "refused"]


def test_rows_in_the_order_sent_and_a_list_of_another_length(tmp_path: Path) -> None:
    rule = {"at": "/status", "none_of": ["ok"], "outcome": "refused", "says": "/status"}
    many = {**MANY, "results": {"rows": "/out", "errors": [rule]}}

    def script(rows: list[Any]) -> Reply:
        out = [{"status": "ok" if row["id"] != "2" else "locked"} for row in rows]
        return 200, {"out": out[:-1] if len(out) == 4 else out}, {}

    with against(tmp_path, bulk(script), write__many=many) as (_, connector):
        assert [w.outcome for w in connector.apply([a_write(str(n)) for n in (1, 2, 3)])] == [
            "accepted",
            "refused",
            "accepted",
        ]
        assert [w.outcome for w in connector.apply([a_write(str(n)) for n in (1, 2, 3, 4)])] == ["unknown"] * 4


@pytest.mark.parametrize("one", [True, False])
def test_one_bad_row_that_turns_the_whole_call_away_does_not_take_the_others_along(tmp_path: Path, one: bool) -> None:
    def script(request: Request) -> Reply:
        if request.method == "GET":
            return 200, {"id": request.path[3:], "v": 3}, {}
        rows = request.body["rows"] if request.path == "/bulk" else [{"id": request.path[3:], "v": request.body["v"]}]
        return (400, {"message": "bad row"}, {}) if any(r["id"] == "2" for r in rows) else (200, {"done": rows}, {})

    more = {} if one else {"write__one": None}
    with against(tmp_path, script, write__many=KEYED, **more) as (api, connector):
        written = connector.apply([a_write(str(n)) for n in (1, 2, 3)])
        assert [w.outcome for w in written] == ["accepted", "refused", "accepted"]
        assert len([r for r in api.requests if r.method != "GET"]) == 4


def test_a_value_that_may_not_be_sent_stays_out_of_the_call(tmp_path: Path) -> None:
    with against(tmp_path, bulk(lambda rows: (200, {"done": rows}, {})), write__many=KEYED, values__max=9) as (
        api,
        connector,
    ):
        written = connector.apply([a_write("1", 5), a_write("2", 10), a_write("3", 9)])
        assert [w.outcome for w in written] == ["accepted", "refused", "accepted"]
        assert [r["id"] for r in api.requests[0].body["rows"]] == ["1", "3"]


def test_a_bulk_call_without_an_answer_leaves_every_row_unknown(tmp_path: Path) -> None:
    for status, outcome in ((500, "unknown"), (429, "not_applied")):
        with against(tmp_path, always(status, None, Retry_After="3"), write__many=KEYED) as (_, connector):
            written = connector.apply([a_write("1"), a_write("2")])
            assert [(w.outcome, w.retry_after) for w in written] == [(outcome, 3)] * 2
    with against(tmp_path, always(200, None), write__many=KEYED) as (_, connector):
        assert [w.outcome for w in connector.apply([a_write("1"), a_write("2")])] == ["unknown"] * 2


def test_every_write_gets_one_answer_in_its_place(tmp_path: Path) -> None:
    said: dict[str, Any] = {}
    means = {"done": "accepted", "failed": "refused", "both": "refused", "silent": "unknown"}
    with against(tmp_path, lambda r: (207, said, {}), write__many=KEYED, write__one=None) as (_, connector):

        @settings(max_examples=examples(40))
        @given(st.lists(st.sampled_from(list(means)), min_size=1, max_size=12), st.randoms())
        def tries(kinds: list[str], shuffled: Any) -> None:
            rows = [(str(n), kind) for n, kind in enumerate(kinds)]
            said["done"] = [{"id": k} for k, kind in rows if kind in ("done", "both")]
            said["failed"] = [{"ids": [k for k, kind in rows if kind in ("failed", "both")]}]
            shuffled.shuffle(said["done"])
            written = connector.apply([a_write(k) for k, _ in rows])
            assert [(w.key, w.outcome) for w in written] == [(k, means[kind]) for k, kind in rows]

        tries()


# --------------------------------------------------------------------------- history


HISTORY = {"path": "/h/{entity}", "items": "/log", "value": "/v", "time": "/at", "actor": "/by", "own_actor": "7"}


def test_history_of_whole_seconds_misses_nothing_of_the_second_it_begins_in(tmp_path: Path) -> None:
    log = [
        {"v": 1, "at": "2026-03-01T11:59:59Z", "by": 3},
        {"v": "2", "at": "2026-03-01T12:00:00", "by": 7},
        {"v": 4, "at": 1772366400, "by": "ann"},
        {"v": 5, "at": "2026-03-01T13:00:00.250+01:00", "by": 3},
        {"v": "?", "at": 1772366401000, "by": 3},
    ]
    since = datetime(2026, 3, 1, 12, 0, 0, 500_000)
    for newest_first in (False, True):
        script = always(200, {"log": log[::-1] if newest_first else log})
        with against(tmp_path, script, history={**HISTORY, "newest_first": newest_first}) as (_, connector):
            found = connector.history(["1"], since)
            assert [(c.value, c.actor, c.ours) for c in found] == [
                (2, "7", True),
                (4, "ann", False),
                (None, "3", False),
            ]
            assert found[-1].at == datetime(2026, 3, 1, 12, 0, 1)


def test_a_history_that_cannot_be_read_whole_is_no_history(tmp_path: Path) -> None:
    endless = {**HISTORY, "pages": {"kind": "offset", "at_most": 2}}
    for body, says in (
        ({"log": [{"v": 1, "at": "2026-03-01T12:00:01Z", "by": 3}]}, "more than 2 pages"),
        ({"log": [{"v": 1, "at": "soon"}]}, "no time"),
        ({}, "no list"),
    ):
        with (
            against(tmp_path, always(200, body), history=endless) as (_, connector),
            pytest.raises(Unavailable, match=says),
        ):
            connector.history(["1"], NOW)
    with against(tmp_path, always(200, {})) as (api, connector):
        assert connector.history(["1"], NOW) == [] and not api.requests


# --------------------------------------------------------------------------- threads, secrets, docs


def test_many_threads_read_and_write_at_once(tmp_path: Path) -> None:
    store = {str(n): 0 for n in range(20)}

    def script(request: Request) -> Reply:
        key = request.path[3:]
        if request.method == "PUT":
            store[key] = request.body["v"]
            return 204, None, {}
        return 200, {"id": key, "v": store[key]}, {}

    with against(tmp_path, script) as (_, connector):

        def once(n: int) -> bool:
            key = str(n % 20)
            connector.apply([a_write(key, n % 20 + 1)])
            return connector.read([key])[key].value == n % 20 + 1

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(once, range(160)))


def test_checking_without_writing_is_not_pretended(tmp_path: Path) -> None:
    with against(tmp_path, always(204)) as (api, connector), pytest.raises(Misconfigured, match="cannot check"):
        connector.apply([a_write()], validate_only=True)
    assert not api.requests and not connector.capabilities.validate_only


def test_no_secret_in_any_text(tmp_path: Path) -> None:
    with against(tmp_path, always(400, {"message": [TOKEN, {"x": f"Bearer {TOKEN}"}]})) as (_, connector):
        with pytest.raises(Misconfigured) as caught:
            connector.read(["1"])
        shown = (
            repr(connector) + str(caught.value) + repr(caught.value.__context__) + repr(connector.apply([a_write()]))
        )
        assert TOKEN not in shown and "…" in shown


def tables() -> str:
    """The documentation's tables: one for each part of the YAML, in the order in which they are met."""
    from tests.test_docs import made

    out: list[str] = []
    met: list[type[BaseModel]] = [RestSystem]
    for model in met:
        out += [
            f"### {model.__name__}",
            "",
            (model.__doc__ or "").replace("``", "`"),
            "",
            made(f"fields delivery.connectors.rest_spec:{model.__name__}"),
        ]
        inside = [m for field in model.model_fields.values() for m in models_of(field.annotation)]
        met += [m for m in dict.fromkeys(inside) if m not in met]
    return "\n".join(out).strip() + "\n"


def test_the_page_explains_every_key_as_the_code_does() -> None:
    page = (Path(__file__).parents[3] / "docs" / "connectors.md").read_text()
    begin, end = "<!-- keys: begin -->\n", "<!-- keys: end -->"
    assert page.split(begin)[1].split(end)[0].strip() == tables().strip(), (
        "docs/connectors.md: run PYTHONPATH=. .venv/bin/python tests/delivery/connectors/test_rest.py"
    )


if __name__ == "__main__":
    file = Path(__file__).parents[3] / "docs" / "connectors.md"
    before, after = file.read_text().split("<!-- keys: begin -->\n")[0], file.read_text().split("<!-- keys: end -->")[1]
    file.write_text(f"{before}<!-- keys: begin -->\n{tables()}<!-- keys: end -->{after}")
