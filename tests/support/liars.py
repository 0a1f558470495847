"""A downstream HTTP server whose entities lie, each in its own way, and which knows the truth all the same.

``GET /items/ID`` (ETag), ``GET /items?ids=…&page=…``, ``PATCH /items/ID`` (If-Match, Idempotency-Key), ``POST /items/bulk``.
A lie is chosen by the entity's name; ``Liar.truth`` is what is really stored, ``Liar.applied`` how often it was changed.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "marked-secret-4711"
GIGABYTE = 1 << 30


@dataclass
class Ask:
    """One question for one entity."""

    id: str
    value: Any = None
    if_match: str | None = None
    key: str | None = None
    nth: int = 0
    """How many writes (or reads) of this entity came before."""


@dataclass
class Reply:
    status: int = 200
    body: Any = None
    """Sent as JSON; bytes are sent as they are; None: no body."""
    headers: Mapping[str, str] = field(default_factory=dict)
    manner: str = "whole"
    """whole, or how the answer goes wrong: hang, close, mid_body, drip, huge, huge_chunked."""


Lie = Callable[["Liar", Ask], Reply]


def honest_read(liar: Liar, ask: Ask) -> Reply:
    with liar.lock:
        item = liar.truth.get(ask.id)
        return Reply(404, {"error": "no such item"}) if item is None else Reply(200, dict(item), liar.tag(ask.id))


def honest_write(liar: Liar, ask: Ask) -> Reply:
    return liar.store(ask, ask.value)


def unless(times: int, lie: Lie, otherwise: Lie) -> Lie:
    """The lie for the first questions, then something else."""
    return lambda liar, ask: (lie if ask.nth < times else otherwise)(liar, ask)


def applies_then(reply: Reply) -> Lie:
    """Stores the value, but answers something else (where it stored: a failed condition is still told)."""

    def write(liar: Liar, ask: Ask) -> Reply:
        told = liar.store(ask, ask.value)
        return told if told.status >= 300 else reply

    return write


def only(reply: Reply | Callable[[Liar], Reply]) -> Lie:
    """Does nothing and answers this."""
    return lambda liar, ask: reply(liar) if callable(reply) else reply


def stores(change: Callable[[Any], Any], other: Any = "kept") -> Lie:
    """Stores something else than it was asked to, and answers as if it had not."""

    def write(liar: Liar, ask: Ask) -> Reply:
        told = liar.store(ask, change(ask.value), other)
        body = {"id": ask.id, "value": ask.value, "other": "kept"}
        return told if told.status >= 300 else Reply(200, body, told.headers)

    return write


def late(seconds: float) -> Lie:
    """Takes longer than anybody waits, and applies then, under the conditions of then."""

    def write(liar: Liar, ask: Ask) -> Reply:
        liar.over.wait(seconds)
        return liar.store(ask, ask.value)

    return write


def stale(seconds: float) -> Lie:
    """Shows for a while what stood there before the last change."""

    def read(liar: Liar, ask: Ask) -> Reply:
        with liar.lock:
            past = [item for at, item in liar.past[ask.id] if at > time.monotonic() - seconds]
            if past:
                return Reply(200, dict(past[0]), {"ETag": f'"{past[0]["version"]}"'})
        return honest_read(liar, ask)

    return read


def behind(seconds: float, value: Any) -> Lie:
    """Shows an old value, in its old version, until so long after it was first asked."""
    first: list[float] = []

    def read(liar: Liar, ask: Ask) -> Reply:
        with liar.lock:
            first.append(time.monotonic())
            if first[-1] - first[0] < seconds:
                return Reply(200, {**liar.truth[ask.id], "value": value}, {"ETag": '"0"'})
        return honest_read(liar, ask)

    return read


def after(seconds: float) -> Callable[[Liar], Reply]:
    """429 with a date so many seconds from now."""

    def reply(liar: Liar) -> Reply:
        moment = datetime.now(UTC) + timedelta(seconds=seconds)
        return Reply(429, {"error": "slow down"}, {"Retry-After": format_datetime(moment, usegmt=True)})

    return reply


class Liar:
    """The server; ``read`` and ``write`` give each entity's lie, an entity without one is served honestly."""

    def __init__(
        self,
        values: Mapping[str, int],
        *,
        read: Mapping[str, Lie] | None = None,
        write: Mapping[str, Lie] | None = None,
        bulk: Callable[[Liar, list[dict[str, Any]]], Reply] | None = None,
        listing: Callable[[Liar, list[str], int], Reply] | None = None,
    ) -> None:
        self.truth: dict[str, dict[str, Any]] = {
            id: {"id": id, "value": value, "other": "kept", "version": 1} for id, value in values.items()
        }
        self.read, self.write = dict(read or {}), dict(write or {})
        self.bulk, self.listing = bulk or honest_bulk, listing or honest_listing
        self.applied: Counter[str] = Counter()
        self.seen: Counter[tuple[str, str]] = Counter()
        self.past: dict[str, list[tuple[float, dict[str, Any]]]] = {id: [] for id in values}
        self.remembered: dict[str, Reply] = {}
        self.writes: list[tuple[float, str]] = []
        self.probed: Counter[str] = Counter()
        """Writes of the value that stood there on a version that it never had: asked by a push, and turned away honestly."""
        self.tokens: list[str | None] = []
        """The Authorization of every request."""
        self.carried: list[dict[str, Any]] = []
        self.sent = 0
        """Bytes of the huge bodies that somebody took."""
        self.heeds = True
        """It turns away what a push asks on a version that never was, whatever it does with other writes."""
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def heal(self) -> None:
        """Tell the truth from now on."""
        self.read, self.write, self.bulk, self.listing = {}, {}, honest_bulk, honest_listing

    def value(self, id: str) -> Any:
        with self.lock:
            return self.truth[id]["value"]

    def tag(self, id: str) -> dict[str, str]:
        return {"ETag": f'"{self.truth[id]["version"]}"'}

    def by_person(self, id: str, value: int) -> None:
        """Somebody else changes it."""
        with self.lock:
            self._set(id, value, "kept")

    def _set(self, id: str, value: Any, other: Any) -> None:
        item = self.truth[id]
        self.past[id].append((time.monotonic(), dict(item)))
        self.truth[id] = {**item, "value": value, "other": other, "version": item["version"] + 1}

    def store(self, ask: Ask, value: Any, other: Any = "kept") -> Reply:
        """What a good server does with a write: the key, the condition, the value."""
        with self.lock:
            if ask.key is not None and ask.key in self.remembered:
                return self.remembered[ask.key]
            if ask.id not in self.truth:
                return Reply(404, {"error": "no such item"})
            if ask.if_match is not None and ask.if_match != self.tag(ask.id)["ETag"]:
                return Reply(412, {"error": "changed since"})
            self._set(ask.id, value, other)
            self.applied[ask.id] += 1
            reply = Reply(200, dict(self.truth[ask.id]), self.tag(ask.id))
            if ask.key is not None:
                self.remembered[ask.key] = reply
            return reply

    def ask(self, kind: str, id: str, **more: Any) -> Ask:
        with self.lock:
            nth = self.seen[kind, id]
            self.seen[kind, id] += 1
            if kind == "write":
                self.writes.append((time.monotonic(), id))
        return Ask(id, nth=nth, **more)

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def honest_bulk(liar: Liar, rows: list[dict[str, Any]]) -> Reply:
    results = []
    for row in rows:
        ask = liar.ask("write", row["id"], value=row["value"], if_match=row.get("tag"), key=row.get("key"))
        told = liar.write.get(ask.id, honest_write)(liar, ask)
        error = None if told.status < 300 else (told.body or {}).get("error", "failed")
        results.append({"id": ask.id, "status": told.status, "error": error})
    return Reply(200, {"results": results})


def honest_listing(liar: Liar, ids: list[str], page: int) -> Reply:
    size = 5
    with liar.lock:
        found = [dict(liar.truth[id]) for id in ids if id in liar.truth]
    for item in found:
        item["tag"] = f'"{item["version"]}"'
    return Reply(200, {"items": found[size * (page - 1) : size * page], "pages": -(-len(found) // size)})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up on a liar is no news."""


def _handler(liar: Liar) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            liar.tokens.append(self.headers["Authorization"])
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if url.path == "/items":
                self.reply(liar.listing(liar, query["ids"].split(","), int(query.get("page", 1))))
            else:
                ask = liar.ask("read", url.path.rsplit("/", 1)[1])
                self.reply(liar.read.get(ask.id, honest_read)(liar, ask))

        def do_PATCH(self) -> None:
            liar.tokens.append(self.headers["Authorization"])
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            liar.carried.append(body)
            if self.path == "/items/bulk":
                row = body["rows"][0]
                if len(body["rows"]) == 1 and self.probes(row["id"], row["value"], row.get("tag")):
                    self.reply(Reply(200, {"results": [{"id": row["id"], "status": 412, "error": "changed since"}]}))
                    return
                self.reply(liar.bulk(liar, body["rows"]))
                return
            if self.probes(self.path.rsplit("/", 1)[1], body.get("value"), self.headers["If-Match"]):
                self.reply(Reply(412, {"error": "changed since"}))
                return
            ask = liar.ask(
                "write", self.path.rsplit("/", 1)[1], value=body["value"],
                if_match=self.headers["If-Match"], key=self.headers["Idempotency-Key"],
            )  # fmt: skip
            self.reply(liar.write.get(ask.id, honest_write)(liar, ask))

        do_POST = do_PATCH

        def probes(self, id: str, value: Any, tag: str | None) -> bool:
            with liar.lock:
                item = liar.truth.get(id)
                found = bool(tag and item and liar.tag(id)["ETag"] != tag and item["value"] == value and liar.heeds)
                liar.probed[id] += found
                return found

        def reply(self, reply: Reply) -> None:
            content = b"" if reply.body is None else reply.body
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            if reply.manner == "hang":
                liar.over.wait(5)
                self.close_connection = True
                return
            if reply.manner == "close":
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.manner == "huge_chunked":
                self.send_header("Transfer-Encoding", "chunked")
            elif reply.status != 204:
                self.send_header("Content-Length", str(GIGABYTE if reply.manner == "huge" else len(content)))
            self.end_headers()
            if reply.manner in ("huge", "huge_chunked"):
                self._huge(chunked=reply.manner == "huge_chunked")
            elif reply.manner == "mid_body":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif reply.manner == "drip":
                for n in range(len(content)):
                    self.wfile.write(content[n : n + 1])
                    if liar.over.wait(1.0):
                        break
                self.close_connection = True
            elif reply.status != 204:
                self.wfile.write(content)

        def _huge(self, *, chunked: bool) -> None:
            self.close_connection = True
            piece = b" " * (1 << 16)
            with contextlib.suppress(OSError):
                for _ in range(GIGABYTE // len(piece)):
                    if liar.over.is_set():
                        return
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                    with liar.lock:
                        liar.sent += len(piece)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


class Elsewhere:
    """Another host, to which a liar redirects: writes down who came, and with what."""

    def __init__(self) -> None:
        self.came: list[tuple[str, str | None]] = []
        came = self.came

        class Handler(BaseHTTPRequestHandler):
            def _note(self) -> None:
                came.append((self.path, self.headers["Authorization"]))
                body = json.dumps({"id": "x", "value": 120}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PATCH = do_PUT = _note

            def log_message(self, *_: Any) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        # Another name for another host: a port alone would be one already, a name is one to every client
        self.url = f"http://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def lying(values: Mapping[str, int], **lies: Any) -> Iterator[Liar]:
    """A liar that stops at the end."""
    liar = Liar(values, **lies)
    try:
        yield liar
    finally:
        liar.close()


VARIANTS: Sequence[str] = ("etag", "key", "neither")


def described(
    liar: Liar, variant: str, *, timeout_s: float = 0.3, stale_s: float = 0.0, bulk: bool = False, more: str = ""
) -> str:
    """The YAML of a system that has conditional writes, or remembers keys, or neither; ``bulk``: by lists."""
    tag, key = variant == "etag", variant == "key"
    one = f"""
  one:
    method: PATCH
    path: /items/{{entity}}
    headers: {{{"If-Match: '{token}'" if tag else "Idempotency-Key: '{idempotency_key}'" if key else ""}}}
    body: {{value: "{{value}}", batch: "{{batch_id}}", decision: "{{decision_id}}", run: "{{run_id}}"}}"""
    many = f"""
  many:
    method: POST
    path: /items/bulk
    at_most: 50
    body: {{rows: "{{rows}}", batch: "{{batch_id}}"}}
    row: {{id: "{{entity}}", value: "{{value}}"{', tag: "{token}"' if tag else ', key: "{idempotency_key}"' if key else ""}}}
    results:
      rows: results
      key: id
      errors: [{{at: status, one_of: [412], outcome: conflict}}, {{at: error, not_empty: true, outcome: refused, says: error}}]"""
    reads = (
        "many: {path: /items, query: {ids: '{entities}'}, at_most: 50, items: items, pages: {kind: page, last: pages}}"
        if bulk
        else "one: {path: '/items/{entity}'}"
    )
    token = "token: {at: tag}" if bulk else "token: {header: ETag}"
    return f"""
system: liar-{variant}
base_url: {liar.url}
timeout_s: {timeout_s}
largest_body: 65536
stale_reads_s: {stale_s}
auth: {{kind: bearer, token_env: LIAR_TOKEN}}
read:
  {reads}
  key: id
  value: value
  watch: [other]
  {token if tag else ""}
values: {{kind: integer}}
write:{many if bulk else one}
  errors: [{{at: error, not_empty: true, outcome: refused, says: error}}]
  remembers_key: {str(key).lower()}
{more}"""
