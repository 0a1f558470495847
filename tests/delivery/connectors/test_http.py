"""The HTTP client against servers that lie, drip, flood and redirect, over real sockets."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import httpcore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delivery.connectors.base import Misconfigured
from delivery.connectors.http import (
    BadAnswer,
    Http,
    NoAnswer,
    NotSent,
    _Stream,
    clean,
    outcome_of,
    retry_after,
    strict_json,
)
from tests.support.properties import examples
from tests.support.rest_servers import Request, Scripted, serving, talking

SECRET = "s3cr3t/+token=="


def client(url: str, **more: Any) -> Http:
    return Http(url, headers={"authorization": f"Bearer {SECRET}"}, secrets=[SECRET], **{"timeout_s": 0.3, **more})


def answering(payload: bytes, headers: str = "") -> Callable[[socket.socket], None]:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(payload)}\r\n{headers}\r\n".encode()
    return lambda connection: connection.sendall(head + payload)


def test_sends_what_it_is_told_and_reads_the_answer() -> None:
    seen: list[Request] = []

    def script(request: Request) -> Any:
        seen.append(request)
        return 200, {"ok": [1]}, {"ETag": '"7"', "Set-Cookie": "session=1"}

    with serving(Scripted(script)) as url:
        http = client(f"{url}/base/")
        answer = http.request(
            "PATCH", "/a%20b", params=[("q", "x y&z"), ("q", "é")], json={"n": 1}, headers={"If-Match": "*"}
        )
        assert (answer.status, answer.json(), answer.headers["etag"]) == (200, {"ok": [1]}, '"7"')
        http.request("POST", f"{url}/base/next?page=2")
        assert (seen[0].path, seen[0].query, seen[0].body) == ("/base/a%20b", {"q": ["x y&z", "é"]}, {"n": 1})
        assert seen[0].headers["if-match"] == "*" and seen[0].headers["authorization"] == f"Bearer {SECRET}"
        assert seen[1].query == {"page": ["2"]} and "cookie" not in seen[1].headers
        http.close()


def test_many_threads_share_it() -> None:
    with serving(Scripted(lambda r: (200, {"path": r.path}, {}))) as url:
        http = client(url, pool=4, timeout_s=10)
        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda n: http.request("GET", f"/{n}").json()["path"], range(1000)))
        assert answers == [f"/{n}" for n in range(1000)]


def test_what_never_left_is_told_from_what_may_have_been_applied() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(NotSent):
        client(f"http://127.0.0.1:{port}").request("POST", "/", json=1)
    with talking(lambda c: None) as url, pytest.raises(NoAnswer):
        client(url).request("POST", "/", json=1)


def test_a_failed_handshake_and_a_full_pool_have_sent_nothing() -> None:
    with serving(Scripted(lambda r: (200, {}, {}))) as url, pytest.raises(NotSent):
        client(url.replace("http:", "https:")).request("POST", "/", json=1)
    with talking(lambda c: drip(c, b"HTTP/1.1 200 OK\r\n\r\n")) as url:
        http = client(url, pool=1, timeout_s=0.2)

        def busy() -> None:
            with pytest.raises(NoAnswer):
                http.request("POST", "/")

        first = threading.Thread(target=busy)
        first.start()
        time.sleep(0.05)
        with pytest.raises(NotSent):
            http.request("POST", "/", json=1)
        first.join()


def drip(connection: socket.socket, head: bytes) -> None:
    connection.sendall(head)
    for _ in range(200):
        connection.sendall(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "talk",
    [
        lambda c: time.sleep(2),
        lambda c: drip(c, b"HTTP/1.1 200 OK\r\nX-Long: "),
        lambda c: drip(c, b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
        lambda c: drip(c, b"HTTP/1.1 200 OK\r\n\r\n"),
    ],
    ids=["silent", "drips the head", "drips the body", "drips without a length"],
)
def test_nobody_holds_it_longer_than_twice_the_timeout(talk: Callable[[socket.socket], None]) -> None:
    with talking(talk) as url:
        began = time.monotonic()
        with pytest.raises(NoAnswer):
            client(url, timeout_s=0.2).request("POST", "/", json=1)
        assert time.monotonic() - began < 1.0


def test_no_single_wait_is_longer_than_what_is_left_of_the_whole() -> None:
    waits: list[float | None] = []

    class Recorded(httpcore.NetworkStream):
        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            waits.append(timeout)
            return b""

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            waits.append(timeout)

    now = threading.local()
    now.deadline = time.monotonic() + 5
    stream = _Stream(Recorded(), now)
    stream.read(1, 10)
    stream.write(b"x", 10)
    stream.read(1, 1)
    assert waits[0] is not None and waits[0] <= 5 and waits[1] is not None and waits[1] <= 5 and waits[2] == 1
    now.deadline = time.monotonic() - 1
    with pytest.raises(httpcore.ReadTimeout):
        stream.read(1, 10)


def test_a_server_that_takes_nothing_in_cannot_hold_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = time.monotonic()
        with pytest.raises(NoAnswer):
            client(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout_s=0.2).request(
                "POST", "/", content=bytes(50 << 20)
            )
        assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nha", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 200),
        (b"HTTP/1.1 412 No\r\nContent-Length: 10\r\n\r\nhalf", 412),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", None),
        (b"nonsense\r\n\r\n", None),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000 + b"\r\n", None),
    ],
)
def test_a_broken_answer_may_have_been_applied(head: bytes, status: int | None) -> None:
    with talking(lambda c: c.sendall(head)) as url:
        with pytest.raises(NoAnswer) as caught:
            client(url).request("PUT", "/", json=1)
        assert caught.value.status == status


def test_a_gigabyte_is_not_read() -> None:
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        for _ in range(1 << 14):
            connection.sendall(piece)
            sent += 1 << 16

    with talking(flood) as url, pytest.raises(NoAnswer, match="larger than 1,048,576"):
        client(url, largest_body=1 << 20, timeout_s=5).request("GET", "/")
    assert sent < 16 << 20
    told = b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n"
    with talking(lambda c: c.sendall(told)) as url, pytest.raises(NoAnswer, match="larger"):
        client(url).request("GET", "/")


def test_a_gzip_bomb_does_not_unfold() -> None:
    bomb = gzip.compress(bytes(1 << 28), 1)
    assert len(bomb) < 2 << 20
    with talking(answering(bomb, "Content-Encoding: gzip\r\n")) as url:
        http = client(url, largest_body=4 << 20, timeout_s=5)
        tracemalloc.start()
        try:
            with pytest.raises(NoAnswer, match="larger"):
                http.request("GET", "/")
            assert tracemalloc.get_traced_memory()[1] < 24 << 20
        finally:
            tracemalloc.stop()


def test_gzip_is_read_to_its_end_and_no_further() -> None:
    whole = gzip.compress(b'{"a": 1}')
    with talking(answering(whole, "Content-Encoding: gzip\r\n")) as url:
        assert client(url).request("GET", "/").json() == {"a": 1}
    for broken in (whole[:-9], whole + b"{}", b'{"a": 1}', whole[:12] + b"\xff" * 8):
        with talking(answering(broken, "Content-Encoding: gzip\r\n")) as url, pytest.raises(NoAnswer, match="gzip"):
            client(url).request("GET", "/")
    with talking(answering(whole, "Content-Encoding: br\r\n")) as url, pytest.raises(NoAnswer, match="nobody asked"):
        client(url).request("GET", "/")


def test_a_redirect_is_an_answer_and_the_token_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    thief = Scripted(lambda r: (200, {}, {}))
    with serving(thief) as elsewhere:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere)
        with serving(Scripted(lambda r: (307, None, {"Location": f"{elsewhere}/take"}))) as url:
            http = client(url)
            assert http.request("PUT", "/", json=1).status == 307
            port = elsewhere.rsplit(":", 1)[1]
            for away in (
                f"{elsewhere}/next",
                f"http://localhost:{port}/",
                "https://evil.example/",
                f"https{url[4:]}/",
                "file:///etc/passwd",
            ):
                with pytest.raises(Misconfigured, match="leads away"):
                    http.request("GET", away)
            assert http.url("//evil.example/x") == f"{url}/evil.example/x"
    assert thief.requests == []


@pytest.mark.parametrize(
    "path", ["/a/../b", "/a/%2e%2E/b", "/%252e%252e", "/./a", "/a b", "/a\r\nX: y", "/a\\..\\b", "/a#b", "/é"]
)
def test_a_path_cannot_climb_or_break_out(path: str) -> None:
    with pytest.raises(Misconfigured):
        client("https://api.example/base").url(path)


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\0", "a ", "\u20ac", "a\x7f"])
def test_a_header_cannot_become_two(value: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        Http("https://api.example", headers={"authorization": SECRET + value}, secrets=[])
    assert "authorization" in str(caught.value) and SECRET not in str(caught.value)
    with pytest.raises(Misconfigured):
        client("https://api.example").request("GET", "/", headers={"if-match": value})


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example",
        "ftp://api.example",
        "api.example",
        "https://u:hunter2@api.example",
        "https://a/?k=hunter2",
        "https://a:x/",
    ],
)
def test_a_base_url_that_would_show_the_token_is_refused(url: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        client(url)
    assert "hunter2" not in str(caught.value)
    assert client("http://api.example", allow_plain_http=True)


def test_no_error_shows_the_secret() -> None:
    def echo(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 Bearer {SECRET}\r\n\r\n".encode())

    with talking(echo) as url:
        with pytest.raises(NoAnswer) as caught:
            client(url).request("GET", "/")
        chain: list[str] = []
        error: BaseException | None = caught.value
        while error is not None:
            chain.append(repr(error))
            error = error.__cause__
        assert SECRET not in " ".join(chain) + repr(client(url))


NOW = datetime(2026, 3, 1, 12, 0, 0)


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("3", 3), ("0", 0), ("-5", 0), ("1.5", 1.5), ("999999999", 3600), ("", None), ("soon", None), ("nan", None), ("inf", None),
        ("Sun, 01 Mar 2026 12:00:30 GMT", 30), ("Sun, 01 Mar 2026 11:00:00 GMT", 0), ("Sun, 01 Mar 2099 11:00:00 GMT", 3600),
        ("Sun, 99 Mar 2026 12:00:30 GMT", None), ("9" * 400, None),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(said: str, seconds: float | None) -> None:
    assert retry_after({"retry-after": said}, NOW) == seconds


@given(st.text())
def test_retry_after_never_breaks(said: str) -> None:
    found = retry_after({"retry-after": said}, NOW)
    assert found is None or 0 <= found <= 3600


@given(st.text(max_size=400), st.integers(0, 400))
def test_clean_texts_are_one_short_line_without_the_secret(text: str, where: int) -> None:
    shown = clean(text[:where] + SECRET + text[where:], [SECRET])
    assert SECRET not in shown and shown.isprintable() and len(shown) <= 300
    assert "s3cr3t%2F%2Btoken%3D%3D" not in clean("https://h/?t=s3cr3t%2F%2Btoken%3D%3D", [SECRET])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda c: st.lists(c) | st.dictionaries(st.text(), c),
)


@settings(max_examples=examples(50))
@given(JSON)
def test_json_comes_back_as_it_was(value: Any) -> None:
    assert strict_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>", b'{"a": 1, "a": 2}', b'[{"x": {"a": 1, "b": 0, "a": 1}}]', b"NaN", b'{"v": Infinity}', b"[-Infinity]", b"1e999",
        b"\xff\xfe", b"[" * 200_000, b'{"a": 1} x', b"1" * 10_000, b'{"a": 1',
    ],
)  # fmt: skip
def test_json_that_readers_read_differently_is_refused(body: bytes) -> None:
    with pytest.raises(BadAnswer):
        strict_json(body)


def test_what_a_status_says_of_a_write() -> None:
    said = {
        "accepted": (200, 201, 202, 204, 207), "conflict": (409, 412, 428), "not_applied": (425, 429),
        "unknown": (408, 500, 502, 503, 504, 599), "refused": (301, 302, 304, 307, 308, 400, 401, 403, 404, 410, 413, 422),
    }  # fmt: skip
    assert {s: outcome_of(s) for statuses in said.values() for s in statuses} == {
        s: o for o, ss in said.items() for s in ss
    }
